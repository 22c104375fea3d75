"""Ranks, scalings and merges that differ by layer, for every method, with plain LoRA as the control."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.helpers import rescale_adapter_scale
from torch import Tensor

from bayes_kernels.hf import export_lora, import_lora, posterior
from bayes_kernels.hf.layers import bayes_layers
from hf.peft_adapters import ALL, CONFIGS, X, adapted, bayesian, every, fill, net

pytestmark = pytest.mark.filterwarnings("ignore")

PATTERNS: dict[str, Any] = {
    "r": 4,
    "lora_alpha": 6,
    "target_modules": ["0", "2"],
    "rank_pattern": {"2": 3},
    "alpha_pattern": {"0": 10},
}
# Rank and scaling of each layer.
PLAIN = {"0": (4, 10 / 4), "2": (3, 6 / 3)}
STABILISED = {"0": (4, 10 / math.sqrt(4)), "2": (3, 6 / math.sqrt(3))}
each_law = pytest.mark.parametrize("rslora", [False, True])


def patterned(method: str, rslora: bool) -> Any:
    config = ALL[method](**{**PATTERNS, "use_rslora": rslora})
    return fill(get_peft_model(net(), config)).eval()


def explicit(model: Any, draw: int | None, scalings: dict[str, float], seed: int = 0) -> Tensor:
    """The network in fp64, with scaling B A added to each weight."""
    base = copy.deepcopy(net()).double()
    for item in bayes_layers(model):
        a, b = item.factors(draw, seed)
        weight: Any = base[int(item.name)].weight
        weight.data += scalings[item.name] * (b.double() @ a.double())
    return base(X.double())


@bayesian
@each_law
@torch.no_grad()
def test_patterns(method: str, rslora: bool, tmp_path: Path) -> None:
    model = patterned(method, rslora)
    expected = STABILISED if rslora else PLAIN
    found = {}
    for item in bayes_layers(model):
        layer: Any = item.layer
        found[item.name] = (item.mean.shape[0], layer.scaling["default"])
    assert found == {name: (r, pytest.approx(s)) for name, (r, s) in expected.items()}
    scalings = {name: s for name, (_, s) in expected.items()}
    torch.testing.assert_close(
        model(X).double(), explicit(model, None, scalings), rtol=1e-4, atol=1e-4
    )
    model.save_pretrained(str(tmp_path / "own"))
    again = PeftModel.from_pretrained(net(), str(tmp_path / "own")).eval()
    assert torch.equal(again(X), model(X))
    export_lora(model, tmp_path / "mean")
    plain = PeftModel.from_pretrained(net(), str(tmp_path / "mean")).eval()
    torch.testing.assert_close(plain(X), model(X), rtol=1e-4, atol=1e-4)
    if method.startswith("polar"):
        return
    for number in (0, 3):
        with posterior(model, first_sample=number, seed=2):
            drawn = model(X)
        other = explicit(model, number, scalings, 2)
        torch.testing.assert_close(drawn.double(), other, rtol=1e-4, atol=1e-4)
        assert (drawn - model(X)).abs().max() > 1e-3
        export_lora(model, tmp_path / "draw", number, seed=2)
        plain = PeftModel.from_pretrained(net(), str(tmp_path / "draw")).eval()
        torch.testing.assert_close(plain(X), drawn, rtol=1e-4, atol=1e-4)


@every
@each_law
@torch.no_grad()
def test_scales_that_are_changed(method: str, rslora: bool) -> None:
    """`set_scale`, `scale_layer` and `rescale_adapter_scale` move mean and draws as they move plain LoRA."""
    model = patterned(method, rslora)
    base, before = net()[0](X), model.base_model.model[0](X)
    layer: Any = model.base_model.model[0]
    drawn = _draw(model, layer) if method in CONFIGS and not method.startswith("polar") else None
    for change, back in (
        (lambda: layer.set_scale("default", 2.0), lambda: layer.set_scale("default", 1.0)),
        (lambda: layer.scale_layer(2.0), lambda: layer.unscale_layer()),
        (lambda: layer.scale_layer(2.0), lambda: layer.unscale_layer(2.0)),
    ):
        change()
        torch.testing.assert_close(layer(X) - base, 2 * (before - base), rtol=1e-4, atol=1e-4)
        if drawn is not None:
            torch.testing.assert_close(
                _draw(model, layer) - base, 2 * (drawn - base), rtol=1e-4, atol=1e-4
            )
        back()
        torch.testing.assert_close(layer(X), before)
    with rescale_adapter_scale(model, 0.5):
        torch.testing.assert_close(layer(X) - base, (before - base) / 2, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer(X), before)


def _draw(model: Any, layer: Any) -> Tensor:
    with posterior(model, seed=2):
        return layer(X)


@bayesian
@each_law
@pytest.mark.parametrize("safe", [False, True])
@torch.no_grad()
def test_merged_with_patterns(method: str, rslora: bool, safe: bool) -> None:
    model = patterned(method, rslora)
    mean, weights = model(X), [p.clone() for p in net().parameters()]
    model.merge_adapter(safe_merge=safe)
    torch.testing.assert_close(model(X), mean, rtol=1e-4, atol=1e-4)
    with posterior(model, "sample" if not method.startswith("polar") else "mean"):
        torch.testing.assert_close(
            model(X), mean, rtol=1e-4, atol=1e-4
        )  # what is merged has no draws
    model.unmerge_adapter()
    torch.testing.assert_close(model(X), mean, rtol=1e-4, atol=1e-4)
    for index, old in ((0, weights[0]), (2, weights[2])):
        torch.testing.assert_close(
            model.base_model.model[index].get_base_layer().weight, old, rtol=1e-5, atol=1e-5
        )
    merged = model.merge_and_unload(safe_merge=safe)
    torch.testing.assert_close(merged(X), mean, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["blob", "scalabl", "polar"])
@each_law
@torch.no_grad()
def test_plain_lora_with_patterns_is_read(method: str, rslora: bool, tmp_path: Path) -> None:
    plain = patterned("lora", rslora)
    plain.save_pretrained(str(tmp_path))
    model = import_lora(net(), tmp_path, method=method).eval()
    torch.testing.assert_close(model(X), plain(X), rtol=1e-4, atol=1e-4)
    assert {item.mean.shape[0] for item in bayes_layers(model)} == {3, 4}


@bayesian
@torch.no_grad()
def test_two_adapters_are_merged_one_by_one(method: str) -> None:
    model = adapted(method)
    model.add_adapter("b", ALL[method](target_modules=["0"], r=2))
    tuner: Any = model.base_model
    fill(model)
    tuner.set_adapter(["default", "b"])
    both = model(X)
    model.merge_adapter(adapter_names=["b"])
    model.unmerge_adapter()
    torch.testing.assert_close(model(X), both, rtol=1e-4, atol=1e-4)
    model.merge_adapter()
    assert tuner.model[0].merged_adapters == ["default", "b"]
    torch.testing.assert_close(model(X), both, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    torch.testing.assert_close(model(X), both, rtol=1e-4, atol=1e-4)
