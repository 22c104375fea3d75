"""The Laplace posterior of an adapter: which weights it covers, and its file beside the adapter."""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ...batches import split
from ...files import replacing_file
from ...laplace import Laplace, Layer
from ..draws import WeightDraws
from ..experts import adapts_parameter
from ..logits import forward_logits
from ..model import BayesLoraModel
from ..swap import adapted_layers, the_adapter
from ..tokens import label_shift, labels_at_logits, token_logits
from ..variants import BayesVariant

LAPLACE_FILE = "laplace.safetensors"
FORMAT = 1

_ATTRIBUTE = "laplace_posterior"


@dataclass
class LaplacePosterior:
    """The posterior of a PEFT model's adapter: what `bayesianize(model, "laplace")` leaves there.

    Attributes:
        laplace: curvature, prior, evidence, draws of the weights: `bayes_kernels.laplace.Laplace`.
        layers: "all", "adapters" or "last".
        prediction: how `predict` gets from Gaussian logits to probabilities.
        choices: ids of the answer tokens, for logits of causal language models; None for classifiers, and
            where the posterior is of labels of tokens.
        report: as `bayesianize` returned it, as plain values.
    """

    laplace: Laplace
    layers: str
    prediction: str
    choices: list[int] | None
    report: dict[str, Any]

    @property
    def of_tokens(self) -> bool:
        """Whether the likelihood is that of labels of tokens."""
        return has_token_labels(self.laplace.model, self.choices)


def has_token_labels(model: nn.Module, choices: Sequence[int] | None) -> bool:
    """Whether a posterior with these choices is of labels of tokens (B, T)."""
    return choices is None and label_shift(model) is not None


def laplace_posterior(model: nn.Module) -> LaplacePosterior | None:
    """The Laplace posterior of a model, wrapped or not; None where it has none."""
    for module in model.modules():
        if isinstance(module, PeftModel):
            return module.__dict__.get(_ATTRIBUTE)
    return None


def set_posterior(peft_model: PeftModel, posterior: LaplacePosterior) -> None:
    """Give a PEFT model its posterior."""
    vars(peft_model)[_ATTRIBUTE] = posterior


def need_posterior(model: nn.Module, op: str) -> LaplacePosterior:
    """As `laplace_posterior`.

    Raises:
        ValueError: there is none; the message begins with ``op``.
    """
    found = laplace_posterior(model)
    if found is None:
        raise ValueError(
            f"{op}: the model must have a Laplace posterior, got none; call "
            "bayesianize(model, 'laplace', data)"
        )
    return found


@contextlib.contextmanager
def drawn_weights(model: nn.Module, seed: int = 0, index: int = 0) -> Iterator[None]:
    """The model with draw number `index` of the Laplace posterior in place of its weights.

    The trained weights come back at the end. Draws are known to fit worse than the linearised model
    that `predict` uses (Immer et al., arXiv 2008.08400); they are for looking at.

    Raises:
        ValueError: the model has no Laplace posterior, or its weights have changed since.
    """
    found = need_posterior(model, "drawn_weights")
    with found.laplace.sampled(seed, index):
        yield


class DrawnAdapters(WeightDraws):
    """Draws of a Laplace posterior for texts: each is an adapter of its own, which rows are sent to.

    Args:
        model: plain LoRA with a Laplace posterior of its factors.
        posterior: the posterior.
    """

    draws = True

    def __init__(self, model: nn.Module, posterior: LaplacePosterior) -> None:
        super().__init__(model)
        self.posterior = posterior

    def obstacle(self) -> str | None:
        """A head with a posterior, or an adapter that is not plain LoRA: rows cannot be sent to them."""
        model, name = the_adapter("generate", self.model)
        layers = adapted_layers(model, name)
        factors = {f"{key}.{part}" for key, _ in layers for part in ("lora_A", "lora_B")}
        heads = sorted({layer.name for layer in self.posterior.laplace.layers} - factors)
        if not heads and all(layer.lora_variant.get(name) is None for _, layer in layers):
            return None
        return (
            "a Laplace posterior must be of the factors of plain LoRA, got "
            f"{', '.join(heads) or 'another adapter'}"
        )

    @contextlib.contextmanager
    def throughout(
        self, n_samples: int, seed: int, examples: int, draws: str
    ) -> Iterator[dict[str, Any]]:
        """As `WeightDraws.throughout`; inside, the model has `n_samples` more adapters."""
        if not n_samples:
            yield {}
            return
        model, name = the_adapter("generate", self.model)
        layers = adapted_layers(model, name)
        drawn = [f"draw{i}-of-{name}" for i in range(n_samples)]
        try:
            with torch.random.fork_rng(devices=[]), torch.no_grad():
                for i, other in enumerate(drawn):
                    model.add_adapter(other, copy.copy(model.peft_config[name]))
                    sample = self.posterior.laplace.sample(seed, i)
                    for key, layer in layers:
                        for part in ("lora_A", "lora_B"):
                            own = getattr(layer, part)
                            value = sample.get(f"{key}.{part}", own[name].weight)
                            own[other].weight.copy_(value)
            model.eval()
            yield {"adapter_names": [other for other in drawn for _ in range(examples)]}
        finally:
            for other in drawn:
                if other in model.peft_config:
                    model.delete_adapter(other)

    def in_place(self, number: int, seed: int) -> AbstractContextManager[None]:
        """As `WeightDraws.in_place`."""
        return self.posterior.laplace.sampled(seed, number)


def forget_laplace(model: nn.Module) -> None:
    """Take the Laplace posterior off a model; nothing where it has none."""
    for module in model.modules():
        if isinstance(module, PeftModel):
            module.__dict__.pop(_ATTRIBUTE, None)


# --- layers --------------------------------------------------------------------------------------


def _adapted(peft_model: PeftModel, name: str) -> list[tuple[str, Any]]:
    """Adapted layers, by name in the base model, whose factors are linear layers."""
    found = adapted_layers(peft_model, name)
    for key, layer in found:
        if name in layer.lora_embedding_A:
            raise ValueError(f"laplace_: layer {key} cannot have a posterior: it is an embedding")
        if adapts_parameter(layer):
            raise ValueError(
                f"laplace_: layer {key} cannot have a posterior: its factors are added to a parameter "
                "(target_parameters); bayesianize(..., 'tfb') takes them"
            )
        variant = layer.lora_variant.get(name)
        parts = (layer.lora_A[name], layer.lora_B[name])
        plain = variant is None or isinstance(variant, BayesVariant)
        if not plain or not all(isinstance(part, nn.Linear) for part in parts):
            kind = type(variant if not plain else parts[0]).__name__
            raise ValueError(
                f"laplace_: layer {key} cannot have a posterior: it is no product of two linear "
                f"layers ({kind})"
            )
    return found


def _factors(key: str, layer: Any, name: str) -> list[Layer]:
    a, b = layer.lora_A[name], layer.lora_B[name]
    return [
        Layer(f"{key}.lora_A", a, a.weight, gate=b.weight),
        Layer(f"{key}.lora_B", b, b.weight, gate=a.weight),
    ]


def _ones(x: Tensor) -> Tensor:
    return x.new_ones(*x.shape[:-1], 1)


def _head_layers(peft_model: PeftModel, name: str) -> list[list[Layer]]:
    """Weight and bias of each linear layer of heads that were trained with the adapter."""
    tuner: Any = peft_model.base_model
    found = []
    for key, wrapper in tuner.model.named_modules():
        if not isinstance(wrapper, ModulesToSaveWrapper) or name not in wrapper.modules_to_save:
            continue
        for part, module in wrapper.modules_to_save[name].named_modules():
            if not isinstance(module, nn.Linear):
                continue
            full = f"{key}.{part}" if part else key
            pair = [Layer(f"{full}.weight", module, module.weight)]
            if module.bias is not None:
                pair.append(Layer(f"{full}.bias", module, module.bias, _ones))
            found.append(pair)
    return found


def weights_of(peft_model: PeftModel, name: str, which: str) -> list[Layer]:
    """The weight matrices (and biases) that have a posterior.

    Args:
        peft_model: the model.
        name: its adapter.
        which: "all", "adapters" or "last".

    Raises:
        ValueError: there is none, or a layer cannot have one.
    """
    adapted, heads = _adapted(peft_model, name), _head_layers(peft_model, name)
    if which == "last":
        adapted, heads = _last(peft_model, adapted, heads)
    layers = [factor for key, layer in adapted for factor in _factors(key, layer, name)]
    if which != "adapters":
        layers += [layer for pair in heads for layer in pair]
    if not layers:
        raise ValueError("laplace_: the adapter must have linear layers, got none")
    return layers


def _last(
    peft_model: PeftModel, adapted: list[tuple[str, Any]], heads: list[list[Layer]]
) -> tuple[list[tuple[str, Any]], list[list[Layer]]]:
    """What acts on the logits directly, or is next to that."""
    base: Any = peft_model.get_base_model()
    try:
        output = base.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        output = None
    at_output = [(key, layer) for key, layer in adapted if layer is output]
    if at_output:
        return at_output, []
    if heads:
        return [], heads[-1:]
    numbers = {key: [int(n) for n in re.findall(r"\.(\d+)(?=\.)", key)][:1] for key, _ in adapted}
    top = max(numbers.values(), default=[])
    return [(key, layer) for key, layer in adapted if numbers[key] == top], []


def _no_mask(batch: Any) -> None:
    return None


def build_laplace(
    peft_model: PeftModel, name: str, which: str, choices: Sequence[int] | None, **options: Any
) -> Laplace:
    """The approximation of an adapter's posterior, to be fitted or filled from a file.

    Args:
        peft_model: the model, with a plain adapter.
        name: the adapter.
        which: "all", "adapters" or "last".
        choices: ids of the answer tokens, for causal language models; None for labels of tokens there.
        options: of `bayes_kernels.laplace.Laplace`.
    """
    shift = label_shift(peft_model) if choices is None else None
    if shift is None:
        reads: dict[str, Any] = {"forward": functools.partial(forward_logits, choices=choices)}
    else:
        reads = {
            "forward": token_logits,
            "labels": functools.partial(labels_at_logits, shift=shift),
        }
        if getattr(peft_model.get_base_model().config, "is_encoder_decoder", False):
            reads["mask"] = _no_mask  # of the encoder: tokens of both count where they act
    trained = [t for key, layer in _adapted(peft_model, name) for t in _factors(key, layer, name)]
    trained += [layer for pair in _head_layers(peft_model, name) for layer in pair]
    return Laplace(
        peft_model,
        weights_of(peft_model, name, which),
        split=split,
        depends_on=[layer.weight for layer in trained],
        **reads,
        **options,
    )


# --- folders -------------------------------------------------------------------------------------


def save_laplace(model: nn.Module, folder: str | Path) -> Path:
    """Write the Laplace posterior of a model beside its adapter, as `laplace.safetensors`.

    The adapter itself is what `model.save_pretrained(folder)` writes, which stock PEFT loads. The
    file holds eigenvectors and eigenvalues, a digest of the weights they belong to, and in its header
    how they were made. Readers see the old file or the whole new one.

    Returns:
        The file.

    Raises:
        ValueError: the model has no Laplace posterior, or its adapter has changed since.
    """
    found = need_posterior(model, "save_laplace")
    state = {name: value.cpu() for name, value in found.laplace.state_dict().items()}
    header = {
        "format": FORMAT,
        "layers": found.layers,
        "prediction": found.prediction,
        "choices": found.choices,
        "jacobian": found.laplace.jacobian,
        "seed": found.laplace.seed,
        "report": found.report,
    }
    path = Path(folder) / LAPLACE_FILE
    with replacing_file(path) as temporary:
        save_file(state, temporary, metadata={"format": "pt", "bayes_kernels": json.dumps(header)})
    return path


def load_laplace(model: nn.Module, folder: str | Path) -> LaplacePosterior:
    """Read the posterior that `save_laplace` wrote, for the adapter of the same folder.

    Args:
        model: the adapter on its base model, as `PeftModel.from_pretrained(base, folder)` loads it.
        folder: the folder, or the file.

    Returns:
        The posterior, which the model has from now on.

    Raises:
        ValueError: there is no such file, it is damaged, or it belongs to other weights: the adapter
            was trained again since.
    """
    path = Path(folder)
    path = path / LAPLACE_FILE if path.is_dir() else path
    if not path.is_file():
        raise ValueError(
            f"load_laplace: expected {LAPLACE_FILE} in {str(folder)!r}, found none; make it with "
            "bayesianize(model, 'laplace', data) and save_laplace"
        )
    header, state = _read(path)
    report, layers = header["report"], header["layers"]
    prediction, choices = header["prediction"], header["choices"]
    options = {name: report[name] for name in ("fisher", "tokens", "rank", "dense_below")}
    options.update(jacobian=header["jacobian"], seed=header["seed"])
    peft_model, name = the_adapter("load_laplace", model)
    if isinstance(peft_model.base_model, BayesLoraModel):
        raise ValueError(
            "load_laplace: the adapter must be plain LoRA, got a Bayesian one; load the folder's own "
            "adapter with PeftModel.from_pretrained"
        )
    found = build_laplace(peft_model, name, layers, choices, **options)
    try:
        found.load_state_dict(state)
    except ValueError as error:
        raise ValueError(
            f"load_laplace: {path} does not belong to this adapter: {error}; run bayesianize again"
        ) from None
    posterior = LaplacePosterior(found, layers, prediction, choices, report)
    set_posterior(peft_model, posterior)
    return posterior


def laplace_method(folder: str | Path) -> str | None:
    """The method of the posterior in an adapter folder, "laplace" or "laplace-last"; None without.

    Raises:
        ValueError: the file is damaged.
    """
    path = Path(folder) / LAPLACE_FILE
    if not path.is_file():
        return None
    return "laplace-last" if _read(path)[0]["layers"] == "last" else "laplace"


_HEADER = ("layers", "prediction", "choices", "jacobian", "seed", "report")


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors of a file of `save_laplace`."""
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})["bayes_kernels"])
            state = {key: file.get_tensor(key) for key in file.keys()}
        if header["format"] != FORMAT or any(name not in header for name in _HEADER):
            raise ValueError(f"a header of format {header['format']!r}, not {FORMAT}")
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"load_laplace: {path} must be what save_laplace wrote, got {error!r}"
        ) from None
    return header, state
