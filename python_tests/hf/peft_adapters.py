"""Adapters of every method on two linear layers, and plain LoRA as the control."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from bayes_kernels.hf import BlobConfig, PolarConfig, ScalablConfig, TfbConfig

CONFIGS: dict[str, Callable[..., Any]] = {
    "blob": BlobConfig,
    "scalabl": ScalablConfig,
    "scalabl-full": lambda **options: ScalablConfig(covariance="full", **options),
    "polar": PolarConfig,
    "polar-diagonal": lambda **options: PolarConfig(core="diagonal", **options),
    "tfb": TfbConfig,
}
ALL = {"lora": LoraConfig, **CONFIGS}
IN, MIDDLE, OUT = 48, 32, 20
X = torch.randn(6, IN, generator=torch.Generator().manual_seed(3))
every = pytest.mark.parametrize("method", ALL)
bayesian = pytest.mark.parametrize("method", CONFIGS)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(IN, MIDDLE), nn.ReLU(), nn.Linear(MIDDLE, OUT))


def fill(model: nn.Module, size: float = 0.3) -> Any:
    """Adapters that do something: every trainable tensor moved, deviations too."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                noise = torch.randn(p.shape, generator=generator) * size
                p.copy_(noise.abs() if "sigma" in name and p.dim() == 2 else p + noise)
    return model


def adapted(method: str, **options: Any) -> PeftModel:
    options = {"target_modules": ["0", "2"], "r": 4, **options}
    return fill(get_peft_model(net(), ALL[method](**options))).eval()


def snapshot(model: nn.Module) -> dict[str, tuple[Any, ...]]:
    found: dict[str, tuple[Any, ...]] = {
        n: (p.shape, p.requires_grad, p.detach().clone()) for n, p in model.named_parameters()
    }
    for name, module in model.named_modules():
        if hasattr(module, "scaling"):
            found[f"{name}.scaling"] = (dict(module.scaling), type(module.scaling["default"]))
    return found


def same(a: dict[str, tuple[Any, ...]], b: dict[str, tuple[Any, ...]]) -> bool:
    return a.keys() == b.keys() and all(
        all(
            torch.equal(x, y) if isinstance(x, Tensor) else x == y
            for x, y in zip(a[k], b[k], strict=True)
        )
        for k in a
    )
