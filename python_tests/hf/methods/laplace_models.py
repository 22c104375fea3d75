"""Adapters with a Laplace posterior."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import BATCHES, IDS, LABELS, choices, logits
from torch import Tensor, nn

from bayes_kernels.hf import bayesianize

BATCH = {"input_ids": IDS, "labels": LABELS}
KINDS = pytest.mark.parametrize("kind", ["bert", "llama"])


def fit(model: nn.Module, kind: str = "bert", data: Any = BATCHES, **options: Any) -> Any:
    method = options.pop("method", "laplace")
    return bayesianize(model, method, data, **{"progress": False, **choices(kind), **options})


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def class_logits(model: nn.Module, kind: str, ids: Tensor = IDS) -> Tensor:
    found = logits(model, ids)
    return found if kind == "bert" else found[:, -1][:, [5, 6, 7]]
