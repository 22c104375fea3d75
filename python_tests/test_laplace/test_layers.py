"""Layers: which weights can have a posterior, and the memory of their curvature."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from bayes_kernels.laplace import Laplace, Layer, estimate_memory, factors, linear_layers
from bayes_kernels.laplace.layers import Sites
from test_laplace.networks import adapters, kronecker, mlp, sequences


@pytest.mark.parametrize("fused", [False, True])
def test_adapters_by_their_outer_layer_equal_their_modules(fused: bool):
    """Also where the adapter's modules are never called."""
    model, x, y = sequences()
    inner = Laplace(model, linear_layers(model, "(first|second).lora_[AB]"), rank=None)
    inner.fit([(x, y)])
    model.first.fused = model.second.fused = fused
    outer = Laplace(model, adapters(model), rank=None).fit([(x, y)])
    for a, b in zip(kronecker(inner), kronecker(outer), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-13)
    model.first.fused = model.second.fused = False
    expected = inner.logits((x,))[1]
    for jacobian in ("vmap", "repeat"):
        model.first.fused = model.second.fused = fused
        outer.jacobian = jacobian
        torch.testing.assert_close(outer.logits((x,))[1], expected, rtol=1e-9, atol=1e-12)


def test_memory_estimate():
    model, _, _ = sequences(n=70, dtype=torch.float32)
    la = Laplace(model, adapters(model), rank=5, dense_below=64, buffer=9)
    pairs = factors.Accumulator(Sites(model, la.layers), "last", rank=5, dense_below=64, buffer=9)
    sides = [side for pair in pairs.sides for side in pair]
    estimate = la.estimate_memory()
    assert estimate.factors == sum(s.sum.nbytes for s in sides)
    assert estimate.buffers == sum(s.buffer.nbytes for s in sides if s.buffer is not None)
    # Llama-2-7B: query, value and the head with rank 8, factors of rank 10.
    shapes = [(8, 4096), (4096, 8)] * 64 + [(8, 4096), (32000, 8)]
    assert len(shapes) == 2 * 65
    seven = estimate_memory(shapes)
    assert seven.total < 100e6 and seven.posterior < 25e6
    assert "MiB" in str(seven)
    # The peers' dense factors.
    assert estimate_memory(shapes, rank=None).factors > 8e9


def pruned(kind: str) -> Any:
    return lambda layer: prune.random_unstructured(layer, kind, 0.3)


COMPUTED = {
    "weight_norm": nn.utils.parametrizations.weight_norm,
    "old weight_norm": nn.utils.weight_norm,
    "spectral_norm": nn.utils.parametrizations.spectral_norm,
    "old spectral_norm": nn.utils.spectral_norm,
    "orthogonal": nn.utils.parametrizations.orthogonal,
    "pruned": pruned("weight"),
    "pruned bias": pruned("bias"),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
@pytest.mark.parametrize("names", [None, "2", ["2"]])
@pytest.mark.parametrize("change", COMPUTED)
def test_a_computed_weight_is_refused_by_name(change: str, names: Any):
    model, x, y = mlp()
    COMPUTED[change](model[2])
    kind = "bias" if "bias" in change else "weight"
    with pytest.raises(ValueError, match=f"{kind} of 2 must be a parameter.*leave the layer out"):
        linear_layers(model, names)
    layer = Layer("2", model[2], getattr(model[2], kind))
    with pytest.raises(ValueError, match="weight of layer 2 must be a parameter of the model"):
        Laplace(model, [layer])
    # The other layer can have a posterior, and so can this one when it is a plain layer again.
    Laplace(model, linear_layers(model, "0")).fit([(x, y)], verbose=False)
    if "pruned" in change:
        prune.remove(model[2], kind)
        la = Laplace(model, linear_layers(model, names)).fit([(x, y)], verbose=False)
        before = getattr(model[2], kind).detach().clone()
        with la.sampled(0):
            assert not torch.equal(getattr(model[2], kind), before)


def test_weights_of_another_model_and_shared_ones():
    model, x, y = mlp(classes=4)
    other = copy.deepcopy(model)
    with pytest.raises(ValueError, match=r"layer 0\.weight must be a parameter of the model"):
        Laplace(model, linear_layers(other))
    tied = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double()
    tied[2].weight = tied[0].weight
    with pytest.raises(ValueError, match=r"one parameter for 0\.weight and 2\.weight"):
        Laplace(tied)
    with pytest.raises(ValueError, match="one parameter for a and b"):
        Laplace(model, [Layer(n, model[0], model[0].weight) for n in "ab"])
    with pytest.warns(UserWarning, match=r"layer 2\.weight is also used as 0\.weight"):
        Laplace(tied, linear_layers(tied, "2")).fit([(x, y)], verbose=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Laplace(tied, linear_layers(tied, "2")[1:]).fit([(x, y)], verbose=False)  # its bias
