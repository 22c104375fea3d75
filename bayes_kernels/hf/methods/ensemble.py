"""Deep ensembles of plain LoRA: adapters of several seeds, whose probabilities are averaged.

Source: Lakshminarayanan, Pritzel and Blundell, "Simple and Scalable Predictive Uncertainty Estimation
using Deep Ensembles", NeurIPS 2017.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn

from ..config import BayesLoraConfig
from ..draws import Sampling, Step, WeightDraws
from ..logits import AnyPrediction
from ..method import Method


class Ensemble(nn.Module):
    """Plain adapters, trained from several seeds, whose probabilities are averaged.

    Attributes:
        models: One PeftModel with all members as adapters, `folded`; or one for each member.
        names: Names of the members: the adapters of the one model.
        folded: Whether all members are evaluated in one pass, each on its copy of the batch.
    """

    def __init__(self, models: Sequence[PeftModel], names: Sequence[str]) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)
        self.names = tuple(names)
        self.folded = len(models) == 1

    def __len__(self) -> int:
        return len(self.names)

    @property
    def config(self) -> Any:
        """That of the base model."""
        return self.models[0].config

    def get_base_model(self) -> nn.Module:
        """The base model of the first member."""
        return self.models[0].get_base_model()  # type: ignore[operator]

    def forward(self, folded_batch: Mapping[str, Any], first: int, count: int) -> Any:
        """Outputs of `count` members from number `first`, each on its copy of the batch.

        Members with separate bases come one at a time.
        """
        if not self.folded:
            (model,) = self.models[first : first + count]  # type: ignore[misc]
            return model(**folded_batch)
        # Models for multiple choice see every choice as a row.
        rows = folded_batch["input_ids"][..., 0].numel() // count
        names = [name for name in self.names[first : first + count] for _ in range(rows)]
        return self.models[0](**folded_batch, adapter_names=names)


def join_adapters(models: Sequence[PeftModel], folders: Sequence[str | Path]) -> Ensemble:
    """Adapters as an ensemble, in one model where their base models are the same.

    They differ where a part of the base that is not saved with the adapter was drawn from the seed,
    such as a pooler that the checkpoint lacks. Then every member keeps its own base, and members
    are evaluated one after the other.

    Args:
        models: Each member on its own base model, from `load_adapter`.
        folders: Their folders, in the same order.

    Raises:
        ValueError: fewer than two members, or one that is not plain LoRA.
    """
    if len(models) < 2 or len(models) != len(folders):
        raise ValueError(
            f"ensemble: expected at least two adapters, got {len(models)}; train more seeds"
        )
    for model, folder in zip(models, folders, strict=True):
        config = model.peft_config["default"]
        if isinstance(config, BayesLoraConfig) or not isinstance(config, LoraConfig):
            kind = type(config).__name__
            raise ValueError(f"ensemble: expected plain LoRA in {str(folder)!r}, got {kind}")
    names = [f"member{i}" for i in range(len(models))]
    first = _frozen(models[0])
    same = all(_equal(first, _frozen(model)) for model in models[1:])
    if not same:
        return Ensemble(models, names)
    names[0] = "default"
    for name, folder in zip(names[1:], folders[1:], strict=True):
        models[0].load_adapter(str(folder), adapter_name=name, is_trainable=False)
    return Ensemble([models[0].eval()], names)


def _frozen(model: PeftModel) -> dict[str, Tensor]:
    """Parameters and buffers of the base that are the same for all adapters."""
    own = ("lora_", "modules_to_save", "original_module")
    return {k: v for k, v in model.state_dict().items() if not any(part in k for part in own)}


def _equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


class MemberDraws(WeightDraws):
    """The members of an ensemble as draws: all of them, whatever n_samples and seed are."""

    model: Ensemble
    draws = True

    @property
    def one_per_pass(self) -> bool:
        """Where members have separate bases."""
        return not self.model.folded

    def outputs(self, folded: dict[str, Any], first: int, count: int) -> Any:
        """Outputs of `count` members from number `first`."""
        return self.model(folded, first, count)

    @property
    def generator(self) -> Any:
        """The model that has the members as adapters."""
        return self.model.models[0]

    def copies(self, n_samples: int) -> int:
        """The number of members."""
        return len(self.model)

    @contextlib.contextmanager
    def throughout(
        self, n_samples: int, seed: int, examples: int, draws: str
    ) -> Iterator[dict[str, Any]]:
        """The members, each on its part of the rows."""
        yield {"adapter_names": [name for name in self.model.names for _ in range(examples)]}

    def predict(self, batch: Mapping[str, Any], **options: Any) -> AnyPrediction:
        """As `WeightDraws.predict`, with a draw for each member."""
        return super().predict(batch, **{**options, "n_samples": len(self.model)})

    def several(
        self, batch: Mapping[str, Any], samplings: Sequence[Sampling], **options: Any
    ) -> Iterator[Step]:
        """As `WeightDraws.several`, with a draw for each member."""
        all_of_them = [one._replace(n_samples=len(self.model)) for one in samplings]
        return super().several(batch, all_of_them, **options)


def ensemble_predictor(model: nn.Module) -> MemberDraws | None:
    """The predictor of an ensemble; None for other models."""
    return MemberDraws(model) if isinstance(model, Ensemble) else None


METHOD = Method(
    "ensemble", "Ensemble", n_samples=3, predictor=ensemble_predictor, join=join_adapters
)

__all__ = ["METHOD", "Ensemble", "join_adapters"]
