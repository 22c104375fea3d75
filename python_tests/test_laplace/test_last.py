"""The layer that makes the logits, and several columns at once: no backward pass for each class."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from bayes_kernels.laplace import Laplace, Layer, contraction, factors, linear_layers, lora_layers
from bayes_kernels.laplace.layers import Sites
from test_laplace.networks import Adapted, D, adapters, jacobians, kronecker, sequences
from test_laplace.test_memory import LiveBytes


class Classifier(nn.Module):
    """Hidden layer and head, plain or adapted; the head may be called otherwise than at the end."""

    def __init__(self, n: int, classes: int, *, bias: bool, adapted: bool) -> None:
        super().__init__()
        self.hidden = nn.Linear(n, n)
        self.head: Any = nn.Linear(n, classes, bias=bias)
        if adapted:
            self.head = Adapted(n, classes, 2, fused=False)
        self.call = "last"

    def forward(self, x):
        z = torch.tanh(self.hidden(x))
        if self.call == "checkpointed":
            return checkpoint(self.head, z, use_reentrant=False)
        if self.call == "twice":
            return self.head(torch.tanh(self.head(z)))
        return self.head(z)

    def layers(self, *, alone: bool) -> list[Layer]:
        head = self.head
        if isinstance(head, Adapted):
            found = lora_layers("head", head, head.lora_A.weight, head.lora_B.weight, head.scaling)
        else:
            found = linear_layers(self, ["head"])
        return found if alone else [*linear_layers(self, ["hidden"]), *found]


def classifier(*, n=9, classes=6, bias=True, adapted=False, dtype=D, examples=7, seed=0):
    torch.manual_seed(seed)
    model = Classifier(n, classes, bias=bias, adapted=adapted).to(dtype)
    x = torch.randn(examples, n, dtype=dtype)
    return model, x, torch.arange(examples) % classes


def behind(model, batch):
    """The same logits, not as the output of a layer."""
    return model(batch[0]) * 1


KINDS = {
    "dense": {"rank": None},
    "low-rank inputs": {"rank": 3, "dense_below": 8},  # 9 inputs, 6 classes
    "low-rank gradients": {"rank": 3, "dense_below": 4},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head", ["plain", "without bias", "adapted"])
@pytest.mark.parametrize("alone", [True, False])
def test_covariance_of_the_last_layer_against_explicit_jacobians(head: str, kind: str, alone: bool):
    model, x, y = classifier(bias=head != "without bias", adapted=head == "adapted")
    layers = model.layers(alone=alone)
    la = Laplace(model, layers, **KINDS[kind]).fit([(x, y)], verbose=False)
    la.prior_precision = torch.linspace(0.3, 2.0, len(layers))
    expected = sum(
        j @ torch.linalg.inv(h + delta * torch.eye(len(h), dtype=D)) @ j.mT
        for h, j, delta in zip(
            kronecker(la), jacobians(model, layers, x), la.prior_precision, strict=True
        )
    )
    for jacobian in ("vmap", "repeat"):
        la.jacobian = jacobian
        for call in ("last", "checkpointed"):
            model.call = call
            mean, cov = la.logits((x,))
            torch.testing.assert_close(cov, expected, rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(mean, model(x).detach())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fisher", ["ggn", "mc", "empirical"])
@pytest.mark.parametrize("head", ["plain", "adapted"])
@pytest.mark.parametrize("alone", [True, False])
def test_fit_of_the_last_layer_equals_backward_passes(head, fisher, kind, alone):
    """One pass for each column, through all layers, as the reference; truncated factors too."""
    model, x, y = classifier(adapted=head == "adapted")
    options = {"fisher": fisher, "mc_samples": 3, **KINDS[kind]}
    data = [(x[:3], y[:3]), (x[3:], y[3:])]
    layers = model.layers(alone=alone)
    passes = Laplace(model, layers, forward=behind, jacobian="repeat", **options)
    passes.fit(data, verbose=False)
    for call in ("last", "checkpointed"):
        model.call = call
        found = Laplace(model, layers, **options).fit(data, verbose=False)
        assert found.log_likelihood == pytest.approx(passes.log_likelihood, rel=1e-12)
        for a, b in zip(kronecker(passes), kronecker(found), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 6.0])
def test_rounding_of_the_last_layer(dtype: torch.dtype, scale: float):
    """Curvature and covariance are no further from fp64 than by backward passes, p near 0 and 1 too."""
    model, x, y = classifier(n=32, classes=20, dtype=dtype, examples=40)
    with torch.no_grad():
        model.head.weight.mul_(scale)
        model.head.bias.mul_(0)
    layers = model.layers(alone=True)
    ours = Laplace(model, layers, rank=None).fit([(x, y)], verbose=False)
    passes = Laplace(model, layers, rank=None, forward=behind, jacobian="repeat")
    passes.fit([(x, y)], verbose=False)
    # The exact functions of what the head saw and gave.
    z = torch.tanh(model.hidden(x)).detach().double()
    p = model(x).detach().double().softmax(-1)
    exact = torch.diag(p.sum(0)) - p.T @ p
    scaled = [
        (b.q.double() * b.nu) @ b.q.double().T for b in (la._fitted()[0] for la in (ours, passes))
    ]
    error, before = (float((s - exact).norm() / exact.norm()) for s in scaled)
    assert error <= 2 * before + 1e-6
    assert float((scaled[0].diagonal() / exact.diagonal() - 1).abs().max()) < 1e-4
    for la in (ours, passes):
        cov = torch.zeros(len(x), 20, 20, dtype=D)
        for h, rows in zip(kronecker(la), (z, torch.ones(len(x), 1, dtype=D)), strict=True):
            j = torch.einsum("ce,bi->bcei", torch.eye(20, dtype=D), rows).flatten(2)
            cov += j @ torch.linalg.inv(h + torch.eye(len(h), dtype=D)) @ j.mT
        found = la.logits((x,))[1]
        assert float((found - cov).abs().max() / cov.abs().max()) < 1e-5


@pytest.mark.parametrize("alone", [True, False])
def test_a_last_layer_that_is_used_twice_is_refused(alone: bool):
    model, x, y = classifier(n=6)
    la = Laplace(model, model.layers(alone=alone)).fit([(x, y)], verbose=False)
    model.call = "twice"
    for jacobian in ("vmap", "repeat"):
        la.jacobian = jacobian
        with pytest.raises(ValueError, match=r"head\.weight must be used once"):
            la.logits((x,))
        with pytest.raises(ValueError, match=r"head\.weight must be used once"):
            Laplace(model, la.layers, jacobian=jacobian).fit([(x, y)], verbose=False)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Columns of each call of a collector in `Laplace.fit`."""
    calls: list[int] = []
    collect = factors.Accumulator.collect

    def count(self, numbers, x, dy):
        calls.append(len(dy))
        collect(self, numbers, x, dy)

    monkeypatch.setattr(factors.Accumulator, "collect", count)
    return calls


@pytest.mark.parametrize("tokens", ["expand", "sum_padded", "reduce", "last"])
@pytest.mark.parametrize("options", [{"rank": None}, {"rank": 3, "dense_below": 8, "buffer": 5}])
def test_any_number_of_columns_at_once_gives_the_same(tokens, options, monkeypatch):
    model, x, y = sequences(classes=8, examples=5)
    mask = torch.tensor([5, 3, 4, 1, 5])[:, None] > torch.arange(5)
    batch = {"x": x, "mask": mask.to(x), "labels": y}
    calls = counted(monkeypatch)
    found = []
    for width in (1, 3, 7, 1000):
        monkeypatch.setitem(factors._COLUMN_BYTES, "cpu", width * x.nbytes * 26 // 12)
        la = Laplace(
            model,
            adapters(model),
            tokens=tokens,
            mask=lambda b: b["mask"],
            jacobian="repeat" if width == 1 else "vmap",
            **options,
        )
        la.fit([batch, {name: t[:3] for name, t in batch.items()}], verbose=False)
        if width > 1:
            assert max(calls) == min(width, 7)
        else:
            assert calls == [1] * 2 * 7 * 2
        calls.clear()
        found.append(kronecker(la))
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert float((a - b).norm() / a.norm()) < 1e-11


class Opaque(torch.autograd.Function):
    """The identity, whose backward pass cannot be vectorised."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        return dy * float(dy.isfinite().all())


@pytest.mark.parametrize("forward", [None, behind])
def test_models_that_cannot_be_vectorised_take_the_passes_one_by_one(forward, monkeypatch):
    """Layers above the operation got all columns before it failed: they are not counted twice."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(5, 6), nn.Identity(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 7)
    ).double()
    data = [(torch.randn(8, 5, dtype=D), torch.arange(8) % 7)] * 2
    expected = Laplace(model, rank=None, forward=forward).fit(data, verbose=False)
    monkeypatch.setattr(nn.Identity, "forward", lambda self, x: Opaque.apply(x))
    calls = counted(monkeypatch)
    found = Laplace(model, rank=None, forward=forward).fit(data, verbose=False)
    above = 1 if forward is None else 2
    assert calls == [6] * above + [1] * 6 + [1] * 6 * (above + 1)
    for a, b in zip(kronecker(expected), kronecker(found), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)


def test_last_layer_takes_the_memory_of_its_result(monkeypatch: pytest.MonkeyPatch):
    """No (B, C, out, in), no backward pass, and no (B, C, C) in a fit."""
    model, x, y = classifier(n=64, classes=80, dtype=torch.float32, examples=16)
    for name in ("contraction", "factors"):
        monkeypatch.setattr(
            f"bayes_kernels.laplace.{name}.backward_at_once", lambda *_, **__: pytest.fail("passes")
        )
    la = Laplace(model, model.layers(alone=True))
    with LiveBytes() as fitting:
        la.fit([(x, y)], verbose=False)
    with LiveBytes() as predicting:
        cov = la.logits((x,))[1]
    assert fitting.peak < cov.nbytes
    assert predicting.peak < 2.5 * cov.nbytes


def test_one_token_contracts_as_several_do():
    """The same layer, with and without the product of both sides."""
    torch.manual_seed(0)
    a, g = torch.randn(3, 1, 7, dtype=D), torch.randn(3, 5, 1, 6, dtype=D)
    for k_in, k_out in ((7, 6), (3, 6), (7, 2), (3, 2)):
        u, q = (torch.linalg.qr(torch.randn(d, k, dtype=D))[0] for d, k in ((7, k_in), (6, k_out)))
        block = factors.Block(u, torch.rand(k_in, dtype=D), q, torch.rand(k_out, dtype=D))
        sums = []
        for parts in (contraction.one_token, contraction.several_tokens):
            for root, rest, weight in parts(a, g, block, [0.2, 3.0]):
                part = root @ root.mT
                sums.append(part if rest is None else part + rest * weight)
        for one, other in zip(sums[:2], sums[2:], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)


class Pooled(nn.Module):
    """A head on all tokens, of which one counts, as in decoders with a classification head."""

    def __init__(self, n: int, classes: int) -> None:
        super().__init__()
        self.hidden, self.head = nn.Linear(n, n), nn.Linear(n, classes)

    def forward(self, x):
        position = x[:, :, 0].argmax(1)
        return self.head(torch.tanh(self.hidden(x)))[torch.arange(len(x)), position]


@pytest.mark.parametrize("kind", KINDS)
def test_a_head_whose_tokens_do_not_all_count_is_one_of_one_token(kind: str):
    torch.manual_seed(0)
    model, x = Pooled(9, 6).double(), torch.randn(5, 4, 9, dtype=D)
    la = Laplace(model, linear_layers(model, "hidden|head"), **KINDS[kind], prior_precision=0.6)
    la.fit([(x, torch.arange(5))], verbose=False)
    expected = sum(
        j @ torch.linalg.inv(h + 0.6 * torch.eye(len(h), dtype=D)) @ j.mT
        for h, j in zip(kronecker(la), jacobians(model, la.layers, x), strict=True)
    )
    for la.jacobian in ("vmap", "repeat"):
        torch.testing.assert_close(la.logits((x,))[1], expected, rtol=1e-9, atol=1e-12)


def test_memory_of_a_head_whose_tokens_do_not_all_count():
    """The gradients (C, B, T, C) of its output, and no (B, C, out, in)."""
    torch.manual_seed(0)
    model, x = Pooled(256, 40), torch.randn(8, 2, 256)
    la = Laplace(model, linear_layers(model, ["head"])).fit([(x, torch.arange(8))], verbose=False)
    with LiveBytes() as predicting:
        cov = la.logits((x,))[1]
    assert predicting.peak < cov.nbytes * 256 / 10


def test_columns_that_act_at_different_tokens():
    """Each column's gradients count at its own tokens, in dense and in low-rank factors."""
    torch.manual_seed(0)
    model = nn.Linear(4, 6, bias=False).double()
    x, dy = torch.randn(2, 3, 4, dtype=D), torch.zeros(3, 2, 3, 6, dtype=D)
    for column, token in ((0, 1), (1, 0), (2, 2)):
        dy[column, :, token, :4] = torch.randn(2, 4, dtype=D)
    rows = dy.reshape(-1, 6)
    for rank in (None, 4):
        sums = factors.Accumulator(
            Sites(model, linear_layers(model)), "expand", rank=rank, dense_below=1, buffer=3
        )
        sums._batch = 2
        sums(model, x, dy)
        sums.finish()
        found = sums.sides[0][1].sum
        found = found if rank is None else found @ found.T
        torch.testing.assert_close(found, rows.T @ rows, rtol=1e-10, atol=1e-12)
        inputs = sums.sides[0][0].sum  # of 4 entries: dense; tokens of the first column
        torch.testing.assert_close(inputs, x[:, 1].T @ x[:, 1], rtol=1e-10, atol=1e-12)
