"""MC dropout: an adapter that was trained with dropout, which stays on in prediction.

Source: Gal and Ghahramani, "Dropout as a Bayesian Approximation", ICML 2016.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from ... import random
from ...batches import need_whole
from ..config import BayesLoraConfig
from ..draws import WeightDraws
from ..method import Method


def dropout_layers(model: nn.Module) -> list[tuple[str, nn.Dropout]]:
    """(name of the layer, dropout before its plain adapter), where the rate is above 0."""
    if isinstance(model, PeftModel):
        configs = model.peft_config.values()
        if any(isinstance(config, BayesLoraConfig) for config in configs):
            return []  # their dropout belongs to training
    found = []
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            for adapter in module.active_adapters:
                dropout = module.lora_dropout[adapter] if adapter in module.lora_dropout else None
                if isinstance(dropout, nn.Dropout) and dropout.p > 0:
                    found.append((name, dropout))
    return found


@contextlib.contextmanager
def dropout_draws(
    model: nn.Module,
    *,
    n_samples: int,
    seed: int,
    first_sample: int = 0,
    scope: Literal["token", "none"] = "token",
) -> Iterator[None]:
    """Inside, dropout before the adapters is on, also in eval mode, with masks that a seed decides.

    The batch holds `n_samples` copies of the examples, see `fold_samples`. Copy s has the mask of
    (seed, first_sample + s, layer): it depends neither on the other copies nor on torch's
    generator. With scope "token" every token has its own mask, by its place in the batch, as in training;
    with "none" all tokens and examples have one, which is a draw of the weights.

    Args:
        model: Plain LoRA with dropout.
        n_samples: Copies in the batch.
        seed: Seed of the masks.
        first_sample: Number of the first copy.
        scope: What has a mask of its own: "token", or "none" for one mask in each copy.

    Raises:
        ValueError: A count is out of range.

    Source: Gal and Ghahramani, "Dropout as a Bayesian Approximation", ICML 2016.
    """
    need_whole("dropout_draws: n_samples", n_samples, 1)
    need_whole("dropout_draws: first_sample", first_sample, 0)
    made: dict[torch.device, list[Tensor]] = {}

    def keys_on(device: torch.device) -> list[Tensor]:
        if device not in made:
            key = random.key(seed, device)
            made[device] = [random.fold_in(key, first_sample + s) for s in range(n_samples)]
        return made[device]

    def hook(stream: int) -> Any:
        def drop(module: nn.Dropout, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            x = args[0]
            width = x.shape[-1]
            tokens = x.numel() // width // n_samples
            rows = tokens if scope == "token" else 1
            masks = [
                random.dropout_mask(key, rows, width, module.p, stream=stream).expand(tokens, -1)
                for key in keys_on(x.device)
            ]
            kept = torch.cat(masks).view(x.shape)
            return torch.where(kept, x / (1 - module.p), 0.0)

        return drop

    with contextlib.ExitStack() as stack:
        for name, dropout in dropout_layers(model):
            handle = dropout.register_forward_hook(hook(random.layer_stream(name)))
            stack.callback(handle.remove)
        yield


class DropoutDraws(WeightDraws):
    """Passes with dropout before the adapters; the mean is a pass without it."""

    draws = True
    divisible = False  # masks go by a token's place in the batch

    def weights(
        self, draw: bool, *, n_samples: int, seed: int, first_sample: int, **law: str
    ) -> AbstractContextManager[None]:
        """Dropout masks of these draws."""
        if not draw:
            return contextlib.nullcontext()
        return dropout_draws(self.model, n_samples=n_samples, seed=seed, first_sample=first_sample)

    def drawn_modules(self) -> Sequence[nn.Module]:
        """The dropout before adapters."""
        return [dropout for _, dropout in dropout_layers(self.model)]

    @contextlib.contextmanager
    def throughout(
        self, n_samples: int, seed: int, examples: int, draws: str
    ) -> Iterator[dict[str, Any]]:
        """One mask for each draw: a token that is looked at again, or from a cache, has the same."""
        with contextlib.ExitStack() as stack:
            if n_samples:
                which = {"n_samples": n_samples, "seed": seed}
                stack.enter_context(dropout_draws(self.model, **which, scope="none"))
            yield {}


def dropout_predictor(model: nn.Module) -> DropoutDraws | None:
    """The predictor of plain LoRA with dropout; None for other models."""
    return DropoutDraws(model) if dropout_layers(model) else None


# Dropout in training and in prediction, at the rate of BLoB's published baseline.
METHOD = Method("dropout", "MC dropout", dropout=0.1, predictor=dropout_predictor)

__all__ = ["METHOD", "dropout_draws"]
