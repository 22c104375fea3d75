"""Peak memory of a fit and of a prediction, against estimates and bounds."""

from __future__ import annotations

import importlib
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from bayes_kernels.laplace import Laplace


class LiveBytes(TorchDispatchMode):
    """Peak bytes of the storages made while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(value, torch.Tensor):
                self.watch(value.untyped_storage())
        return out

    def watch(self, storage) -> None:
        pointer, size = storage.data_ptr(), storage.nbytes()
        if pointer in self.known or pointer == 0:
            return
        self.known.add(pointer)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self.forget, pointer, size)

    def forget(self, pointer: int, size: int) -> None:
        self.known.discard(pointer)
        self.live -= size


def deep(depth=24, n=128, classes=5):
    torch.manual_seed(0)
    blocks = [nn.Linear(n, n, bias=False) for _ in range(depth)]
    return nn.Sequential(*[m for b in blocks for m in (b, nn.Tanh())], nn.Linear(n, classes))


@pytest.mark.parametrize("tokens", [1, 40])
def test_prediction_never_holds_the_jacobian(tokens: int):
    model = deep()
    x, y = torch.randn(4, tokens, 128), torch.randint(0, 5, (4,))
    model = nn.Sequential(model, nn.Flatten(2)) if tokens == 1 else model
    la = Laplace(
        model,
        rank=8,
        dense_below=64,
        forward=lambda m, batch: m(batch[0]).mean(1),
        tokens="reduce",
    ).fit([(x, y)])
    with LiveBytes() as graph:
        logits = model(x)
        del logits
    with LiveBytes() as bytes_:
        la.logits((x,))
    parameters = sum(layer.weight.numel() for layer in la.layers)
    assert bytes_.peak - graph.peak < 0.15 * (4 * 5 * parameters * 4)


def test_curvature_holds_one_layer_at_a_time():
    """Beyond factors, buffers and the graph: no layer's rows are kept."""
    model = deep(depth=8)
    x, y = torch.randn(16, 40, 128), torch.randint(0, 5, (16,))
    la = Laplace(model, rank=4, dense_below=64, forward=lambda m, batch: m(batch[0]).mean(1))
    with LiveBytes() as graph:
        logits = model(x)
        del logits
    with LiveBytes() as bytes_:
        la.fit([(x, y)])
    layer = x.nbytes
    assert bytes_.peak < graph.peak + la.estimate_memory().total + 10 * layer


@pytest.mark.parametrize(
    ("shape", "options"),
    [((5, 400), {}), ((5, 300), {"rank": None}), ((5, 3000), {}), ((5, 800), {"rank": 100})],
)
def test_memory_estimate_is_the_peak_of_a_fit(shape, options, monkeypatch):
    """Of one layer and one example, whose own passes are nothing beside it."""
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "cuda_benchmarks"))
    peak_bytes = importlib.import_module("harness").peak_bytes
    torch.manual_seed(0)
    model = nn.Linear(shape[1], shape[0], bias=False)
    loader = [(torch.randn(1, shape[1]), torch.tensor([label])) for label in (0, 3)]
    la = Laplace(model, **options)
    peak = peak_bytes(lambda: la.fit(loader, verbose=False), "cpu")
    estimate = la.estimate_memory()
    assert peak is not None
    assert 0.98 * peak <= estimate.total + estimate.workspace <= 1.02 * peak
    assert sum(t.nbytes for t in la.state_dict().values()) == pytest.approx(
        estimate.posterior, abs=100
    )
