"""Laplace: curvature, evidence, predictive covariance against explicit matrices and laplace-torch."""

from __future__ import annotations

import copy
import importlib
import math
import os
import subprocess
import sys
import warnings
import weakref
from collections import UserDict
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from bayes_kernels import functional, random, reference
from bayes_kernels.laplace import (
    Laplace,
    Layer,
    contraction,
    estimate_memory,
    factors,
    linear_layers,
    lora_layers,
)
from bayes_kernels.laplace.layers import Sites

D = torch.float64


class Adapted(nn.Module):
    """A frozen linear layer with a low-rank adapter, computed in one of two ways."""

    def __init__(self, n: int, m: int, r: int, *, fused: bool, scaling: float = 0.7) -> None:
        super().__init__()
        self.base = nn.Linear(n, m, bias=False).requires_grad_(False)
        self.lora_A = nn.Linear(n, r, bias=False)
        self.lora_B = nn.Linear(r, m, bias=False)
        self.fused, self.scaling = fused, scaling

    def forward(self, x):
        if not self.fused:
            return self.base(x) + self.lora_B(self.lora_A(x)) * self.scaling
        a, b = self.lora_A.weight, self.lora_B.weight
        return functional.lora(x, a, b, self.base(x), scaling=self.scaling)


class Sequences(nn.Module):
    """Two adapted layers with a dependence between tokens, then a head on the mean of valid ones."""

    def __init__(self, n=12, r=3, classes=4, *, fused=False, checkpointed=None) -> None:
        super().__init__()
        self.first = Adapted(n, n, r, fused=fused)
        self.second = Adapted(n, n + 2, r, fused=fused)
        self.head = nn.Linear(n + 2, classes)
        self.dropout = nn.Dropout(0.5)
        self.checkpointed = checkpointed

    def body(self, x):
        x = x + torch.tanh(self.first(self.dropout(x)))
        x = x + 0.3 * x.cumsum(1) / (1 + torch.arange(x.shape[1]))[:, None]
        return torch.tanh(self.second(x))

    def forward(self, x, mask=None):
        if self.checkpointed is not None:
            x = checkpoint(self.body, x, use_reentrant=self.checkpointed)
        else:
            x = self.body(x)
        if mask is None:
            return self.head(x.mean(1))
        return self.head((x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))


def sequences(*, seed=0, examples=9, tokens=5, dtype=D, **options):
    torch.manual_seed(seed)
    model = Sequences(**options).to(dtype)
    n = model.first.base.in_features
    x = torch.randn(examples, tokens, n, dtype=dtype)
    y = torch.randint(0, model.head.out_features, (examples,))
    return model, x, y


def adapters(model) -> list[Layer]:
    layers = []
    for name in ("first", "second"):
        module = getattr(model, name)
        layers += lora_layers(
            name, module, module.lora_A.weight, module.lora_B.weight, module.scaling
        )
    return layers


def mlp(*, bias=True, classes=3, dtype=D, seed=0, examples=20):
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(4, 6, bias=bias), nn.ReLU(inplace=True), nn.Linear(6, classes, bias=bias)
    ).to(dtype)
    return model, torch.randn(examples, 4, dtype=dtype), torch.randint(0, classes, (examples,))


def kronecker(la: Laplace) -> list[torch.Tensor]:
    """Each layer's curvature on vec(W), row-major, as a dense matrix."""
    return [
        torch.kron((b.q.double() * b.nu) @ b.q.double().T, (b.u.double() * b.mu) @ b.u.double().T)
        for b in la._fitted()
    ]


def jacobians(model, layers, *inputs) -> list[torch.Tensor]:
    """Explicit Jacobian (B, C, P) of each layer by torch.func."""
    names = {id(p): name for name, p in model.named_parameters()}
    wanted = {names[id(layer.weight)]: layer.weight.detach() for layer in layers}

    def f(weights):
        return torch.func.functional_call(model, weights, inputs)

    full = torch.func.jacrev(f)(wanted)
    return [full[names[id(layer.weight)]].detach().flatten(2) for layer in layers]


# --- curvature ---------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
def test_one_example_gives_the_exact_ggn(bias: bool):
    """For one example and one token the Kronecker product is no approximation."""
    model, x, y = mlp(bias=bias)
    la = Laplace(model, rank=None).fit([(x[:1], y[:1])])
    p = model(x[:1]).softmax(-1)[0].detach()
    hessian = torch.diag(p) - p[:, None] * p
    for ours, j in zip(kronecker(la), jacobians(model, la.layers, x[:1]), strict=True):
        torch.testing.assert_close(ours, j[0].T @ hessian @ j[0], rtol=1e-10, atol=1e-14)


def explicit_factors(model, module, x, y, *, tokens, mask=None, fisher="ggn"):
    """E[a a^T] and sum of g g^T of a linear module, one example and one column at a time."""
    kept = {}
    handle = module.register_forward_hook(lambda m, args, out: kept.update(a=args[0], y=out))
    activation, gradient = 0, 0
    for i in range(len(x)):
        logits = model(x[i : i + 1]) if mask is None else model(x[i : i + 1], mask[i : i + 1])
        a, out = kept["a"][0].detach(), kept["y"]
        p = logits.softmax(-1)[0].detach()
        columns = (torch.diag(p.sqrt()) - p[:, None] * p.sqrt()).unbind(1)
        if fisher == "empirical":
            columns = [p - nn.functional.one_hot(y[i], len(p))]
        valid = torch.ones(len(a), dtype=torch.bool) if mask is None else mask[i].bool()
        if a.dim() == 1:
            a, valid = a[None], torch.ones(1, dtype=torch.bool)
        for c, column in enumerate(columns):
            (g,) = torch.autograd.grad(logits, out, column[None].to(logits), retain_graph=True)
            g = g[0].reshape(-1, g.shape[-1])
            if tokens == "expand":
                rows_a, rows_g = a[valid] / valid.sum().to(D).sqrt(), g[valid]
            elif tokens == "reduce":
                rows_a, rows_g = a[valid].mean(0)[None], g[valid].sum(0)[None]
            else:
                last = valid.nonzero()[-1]
                rows_a, rows_g = a[last], g[last]
            if c == 0:
                activation = activation + rows_a.T @ rows_a / len(x)
            gradient = gradient + rows_g.T @ rows_g
    handle.remove()
    return activation, gradient


@pytest.mark.parametrize("fisher", ["ggn", "empirical"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("tokens", ["expand", "reduce", "last"])
def test_factors_against_explicit_sums(tokens: str, padded: bool, fisher: str):
    model, x, y = sequences()
    mask = None
    if padded:
        mask = (torch.arange(5) < torch.randint(1, 6, (9, 1))).to(D)
        mask[0] = torch.tensor([0, 0, 1, 1, 1])  # padded on the left
    la = Laplace(
        model,
        linear_layers(model, "first.lora_[AB]|head"),
        rank=None,
        tokens=tokens,
        fisher=fisher,
        forward=lambda m, batch: m(batch[0], *batch[2:]),
        mask=lambda batch: batch[2] if padded else None,
    )
    extra = [] if mask is None else [mask]
    parts = [slice(0, 4), slice(4, 9)]
    la.fit([tuple(v[part] for v in (x, y, *extra)) for part in parts])
    model.eval()
    for layer, block in zip(la.layers, la._fitted(), strict=True):
        if layer.name == "head.bias":
            continue
        a, g = explicit_factors(model, layer.module, x, y, tokens=tokens, mask=mask, fisher=fisher)
        torch.testing.assert_close((block.u * block.mu) @ block.u.T, a, rtol=1e-10, atol=1e-13)
        torch.testing.assert_close((block.q * block.nu) @ block.q.T, g, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("tokens", ["expand", "reduce", "last"])
def test_padding_changes_nothing(tokens: str):
    """Examples of one length: padded with garbage or not, in any batch."""
    model, x, y = sequences()
    plain = Laplace(model, adapters(model), rank=None, tokens=tokens).fit([(x, y)])
    garbage = torch.cat([x, torch.full_like(x[:, :2], 1e3)], 1)
    mask = (torch.arange(7) < 5).to(D).expand(9, 7)
    masked = Laplace(
        model,
        adapters(model),
        rank=None,
        tokens=tokens,
        forward=lambda m, batch: m(batch["x"], batch["attention_mask"]),
    ).fit([{"x": garbage, "attention_mask": mask, "labels": y}])
    for a, b in zip(kronecker(plain), kronecker(masked), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)
    assert plain.log_likelihood == pytest.approx(masked.log_likelihood, rel=1e-12)


@pytest.mark.parametrize("rank", [None, 60])
@pytest.mark.parametrize("fisher", ["ggn", "mc"])
def test_factors_do_not_depend_on_the_batches(fisher: str, rank):
    """Dense factors to rounding; low-rank ones too while they have seen at most k rows."""
    model, x, y = sequences(n=70, examples=8)
    options = {"rank": rank, "dense_below": 64, "fisher": fisher, "buffer": 7}
    whole = Laplace(model, adapters(model), tokens="reduce", **options).fit([(x, y)])
    parts = [(x[i:j], y[i:j]) for i, j in ((0, 1), (1, 6), (6, 8))]
    split = Laplace(model, adapters(model), tokens="reduce", **options).fit(parts)
    assert whole._fitted()[0].u.shape == (70, 70 if rank is None else 60)
    for a, b in zip(kronecker(whole), kronecker(split), strict=True):
        assert float((a - b).norm() / a.norm()) < 1e-12
    assert whole.n_examples == split.n_examples == 8


@pytest.mark.parametrize("buffer", [4, 32])
@pytest.mark.parametrize("tokens", ["expand", "last"])
def test_low_rank_factors_are_the_dense_ones_while_rows_are_few(tokens: str, buffer: int):
    """At most 60 rows: those of two masked sequences, three columns each; waiting or not."""
    model, x, y = sequences(n=70, examples=2)
    batch = {
        "x": x,
        "attention_mask": torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]),
        "labels": y,
    }
    options = {"tokens": tokens, "forward": lambda m, b: m(b["x"], b["attention_mask"])}
    dense = Laplace(model, adapters(model), rank=None, **options).fit([batch])
    options |= {"rank": 60, "dense_below": 64, "buffer": buffer}
    low = Laplace(model, adapters(model), **options).fit([batch])
    for a, b in zip(kronecker(dense), kronecker(low), strict=True):
        assert float((a - b).norm() / a.norm()) < 1e-12
    torch.testing.assert_close(dense.logits(batch)[1], low.logits(batch)[1], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(
        dense.log_marginal_likelihood(), low.log_marginal_likelihood(), rtol=1e-12, atol=0
    )


def test_monte_carlo_fisher_has_the_ggn_as_its_mean():
    """The relative error falls as 1 / sqrt(draws): 0.1 is about four deviations here."""
    model, x, y = mlp()
    ggn = Laplace(model, rank=None).fit([(x, y)])
    mc = Laplace(model, rank=None, fisher="mc", mc_samples=200).fit([(x, y)])
    for a, b in zip(ggn._fitted(), mc._fitted(), strict=True):
        expected, ours = (a.q * a.nu) @ a.q.T, (b.q * b.nu) @ b.q.T
        assert float((expected - ours).norm() / expected.norm()) < 0.1
    other = Laplace(model, rank=None, fisher="mc", mc_samples=2, seed=1).fit([(x, y)])
    again = Laplace(model, rank=None, fisher="mc", mc_samples=2, seed=1).fit([(x, y)])
    assert all(
        torch.equal(a.nu, b.nu) for a, b in zip(other._fitted(), again._fitted(), strict=True)
    )


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


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool):
    model, x, y = sequences()
    plain = Laplace(model, adapters(model), rank=None).fit([(x, y)])
    expected = plain.logits((x,))[1]
    model.checkpointed = reentrant
    x = x.requires_grad_(reentrant)  # what the reentrant kind needs, as ever
    again = Laplace(model, adapters(model), rank=None).fit([(x, y)])
    for a, b in zip(kronecker(plain), kronecker(again), strict=True):
        torch.testing.assert_close(a, b)
    again.jacobian = "repeat"
    torch.testing.assert_close(again.logits((x,))[1], expected)
    again.jacobian = "vmap"
    for warned in (reentrant, False):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            torch.testing.assert_close(again.logits((x,))[1], expected)
        assert [("jacobian='repeat'" in str(w.message)) for w in told] == [True] * warned
        assert again.jacobian == ("repeat" if reentrant else "vmap")


def test_reentrant_checkpointing_of_what_is_not_watched():
    """Nothing of the checkpointed part has a posterior; other failures of a prediction stay errors."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.h = (nn.Linear(*s) for s in ((4, 6), (6, 6), (6, 3)))
            self.reentrant: bool | None = True

        def forward(self, x):
            x = self.a(x)
            if self.reentrant is None:
                x = Opaque.apply(self.b(x))
            else:
                x = checkpoint(nn.Sequential(self.b, nn.Tanh()), x, use_reentrant=self.reentrant)
            return self.h(x)

    class Opaque(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, dy):
            raise RuntimeError("no second way")

    torch.manual_seed(0)
    model = Block().double()
    x, y = torch.randn(7, 4, dtype=D), torch.arange(7) % 3
    la = Laplace(model, linear_layers(model, "a")).fit([(x, y)], verbose=False)
    model.reentrant = False
    expected = la.logits((x,))[1]
    model.reentrant = None
    with pytest.raises(RuntimeError):
        la.logits((x,))
    assert la.jacobian == "vmap"
    model.reentrant = True
    with pytest.warns(UserWarning, match="use_reentrant=False"):
        torch.testing.assert_close(la.logits((x,))[1], expected)


def test_the_model_is_left_as_it_was():
    model, x, y = sequences()
    model.train()
    model.second.eval()
    model.first.lora_A.weight.grad = torch.ones_like(model.first.lora_A.weight)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    flags = [(m.training, len(m._forward_hooks)) for m in model.modules()]
    needs = [p.requires_grad for p in model.parameters()]

    def check():
        assert flags == [(m.training, len(m._forward_hooks)) for m in model.modules()]
        assert needs == [p.requires_grad for p in model.parameters()]
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        assert len(grads) == 1 and bool((grads[0] == 1).all())

    la = Laplace(model, adapters(model)).fit([(x, y)])
    check()
    la.predict((x,))
    la.predict((x,), method="weights", n_samples=2)
    check()
    with pytest.raises(ZeroDivisionError), la.sampled(3):
        1 / 0  # noqa: B018
    check()
    with pytest.raises(ValueError, match="labels must be in"):
        la.fit([(x, y + 100)])
    check()
    # Dropout was off.
    torch.testing.assert_close(la.logits((x,))[0], la.logits((x,))[0], rtol=0, atol=0)


# --- evidence and prior ------------------------------------------------------------------------


def low_rank_posterior():
    model, x, y = sequences(n=20, r=3, examples=9)
    la = Laplace(model, adapters(model), rank=4, dense_below=8).fit([(x, y)])
    return model, x, y, la


def test_evidence_and_covariance_against_dense_matrices():
    """Low-rank sides: log-determinant and covariance of the dense precision, to 1e-10."""
    model, x, y, la = low_rank_posterior()
    la.prior_precision = torch.tensor([0.3, 1.7, 40.0, 0.02])
    evidence = torch.tensor(la.log_likelihood, dtype=D)
    cov = torch.zeros(len(x), 4, 4, dtype=D)
    model.eval()
    for h, delta, layer, j in zip(
        kronecker(la), la.prior_precision, la.layers, jacobians(model, la.layers, x), strict=True
    ):
        precision = h + delta * torch.eye(len(h), dtype=D)
        evidence = evidence - 0.5 * (
            torch.logdet(precision) - len(h) * delta.log() + delta * layer.weight.square().sum()
        )
        cov = cov + j @ torch.linalg.inv(precision) @ j.mT
    torch.testing.assert_close(la.log_marginal_likelihood(), evidence.detach(), rtol=1e-10, atol=0)
    ours = la.logits((x,))
    torch.testing.assert_close(ours[0], model(x).detach())
    torch.testing.assert_close(ours[1], cov.detach(), rtol=1e-10, atol=1e-10 * float(cov.max()))
    expected = nn.functional.cross_entropy(model(x), y, reduction="sum")
    assert la.log_likelihood == pytest.approx(-float(expected.detach()), rel=1e-12)


@pytest.mark.parametrize("tokens", [1, 2, 30])
def test_covariance_for_few_and_many_tokens(tokens: int):
    """Both ways to contract: with and without forming the layer's gradient."""
    model, x, y = sequences(n=16, examples=4, tokens=tokens)
    la = Laplace(model, adapters(model), rank=3, dense_below=8, prior_precision=0.5).fit([(x, y)])
    model.eval()
    expected = sum(
        j @ torch.linalg.inv(h + 0.5 * torch.eye(len(h), dtype=D)) @ j.mT
        for h, j in zip(kronecker(la), jacobians(model, la.layers, x), strict=True)
    )
    for jacobian in ("vmap", "repeat"):
        la.jacobian = jacobian
        torch.testing.assert_close(la.logits((x,))[1], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("structure", ["scalar", "layer"])
def test_mackay_is_the_optimum_of_the_evidence(structure: str):
    _, _, _, la = low_rank_posterior()
    best = la.optimize_prior_precision(structure=structure)
    assert best.shape == (() if structure == "scalar" else (4,))
    log_delta = best.log().clone().requires_grad_()
    value = la.log_marginal_likelihood(log_delta.exp())
    (slope,) = torch.autograd.grad(value, log_delta)
    assert float(slope.abs().max()) < 1e-10
    for factor in (0.5, 0.9, 1.1, 2.0):
        assert la.log_marginal_likelihood(best * factor) < value
    # gamma = delta |theta|^2, MacKay's condition.
    norms = torch.stack([layer.weight.detach().square().sum() for layer in la.layers])
    gamma = la.effective_parameters()
    if structure == "scalar":
        gamma, norms = gamma.sum(), norms.sum()
    torch.testing.assert_close(best * norms, gamma, rtol=1e-10, atol=0)
    la.prior_precision = 1.0
    adam = la.optimize_prior_precision("gradient", structure=structure, lr=0.1, steps=400)
    torch.testing.assert_close(adam, best, rtol=1e-3, atol=0)


def test_validation_takes_the_best_of_the_grid():
    _model, _x, _y, la = low_rank_posterior()
    held_out = torch.randn(12, 5, 20, dtype=D), torch.randint(0, 4, (12,))
    grid = torch.logspace(-2, 2, 9, dtype=D)
    scores = []
    for delta in grid:
        la.prior_precision = delta
        log_probs = la.predict((held_out[0],), method="probit").log_probs
        scores.append(float(log_probs.gather(1, held_out[1][:, None]).sum()))
    best = la.optimize_prior_precision("validation", loader=[held_out], grid=grid, refine=0)
    assert float(best) == float(grid[max(range(9), key=scores.__getitem__)])
    fine = la.optimize_prior_precision("validation", loader=[held_out], grid=grid, refine=2)
    la.prior_precision = fine
    log_probs = la.predict((held_out[0],), method="probit").log_probs
    assert float(log_probs.gather(1, held_out[1][:, None]).sum()) >= max(scores) - 1e-9


def test_callables_see_prepared_parts_in_fit_and_in_validation():
    model, x, y = mlp()
    seen = []

    def split(batch, count):
        cut = {name: rows.tensor_split(count) for name, rows in batch.items()}
        return [{name: rows[i] for name, rows in cut.items()} for i in range(count)]

    def labels(batch):
        seen.append((type(batch), batch["y"].device, len(batch["y"])))
        return batch["y"]

    def forward(model, batch):
        return model(batch["x"])

    loader = [UserDict(x=x, y=y)]  # a mapping like the batches of tokenizers: prepared, a dict
    la = Laplace(model, forward=forward, labels=labels, split=split).fit(loader, verbose=False)
    device = next(model.parameters()).device
    assert seen == [(dict, device, 10)] * 2
    seen.clear()
    best = la.optimize_prior_precision("validation", loader=loader, refine=0)
    assert seen == [(dict, device, n) for n in (7, 7, 6)]  # as many parts as classes
    whole = Laplace(model).fit([(x, y)], verbose=False)
    assert whole.optimize_prior_precision("validation", loader=[(x, y)], refine=0) == best


def test_repeated_batches_leave_what_examples_share():
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(6, 3)

        def forward(self, x, cache_position):
            return self.head((x * cache_position.to(x)[:, None]).sum(1))

    torch.manual_seed(0)
    model = Positions().to(D)
    # As many positions as examples.
    batch = {"x": torch.randn(4, 4, 6, dtype=D), "cache_position": torch.arange(4)}
    loader = [{**batch, "labels": torch.tensor([0, 1, 2, 0])}]
    one, other = (
        Laplace(model, jacobian=jacobian).fit(loader, verbose=False).logits(batch)
        for jacobian in ("vmap", "repeat")
    )
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("tokens", [1, 12])
def test_large_curvature_does_not_cancel(tokens: int, whole: bool):
    """mu nu / delta of 1e12 and a gradient inside the eigenvectors' span, in fp32.

    sigma^2 (<G, G> - sum w P P), the same in exact arithmetic, leaves nothing but noise.
    """
    torch.manual_seed(0)
    u, q = (torch.linalg.qr(torch.randn(8, 8, dtype=D))[0][:, : 8 if whole else 4] for _ in "uq")
    values = torch.linspace(1e3, 3e3, u.shape[1], dtype=D)
    a = torch.randn(2, tokens, u.shape[1], dtype=D) @ u.T
    g = torch.randn(2, 3, tokens, u.shape[1], dtype=D) @ q.T
    delta = 1e-6

    def cov(dtype):
        block = factors.Block(u.to(dtype), values, q.to(dtype), values)
        inner, rest = contraction.project(a.to(dtype), g.to(dtype), block)
        scaled = inner * (block.products + delta).rsqrt().flatten().to(dtype)
        total = scaled @ scaled.mT
        return total if rest is None else total + rest / delta

    gradient = (g.mT @ a[:, None]).flatten(2)
    p = (q.T @ (g.mT @ a[:, None]) @ u).flatten(2)
    w = (values[:, None] * values / (values[:, None] * values + delta)).flatten()
    truth = (p / (values[:, None] * values + delta).flatten()) @ p.mT
    naive = (gradient.float() @ gradient.float().mT - (p * w).float() @ p.float().mT) / delta
    assert float((naive.double() - truth).norm() / truth.norm()) > 1e3
    torch.testing.assert_close(cov(D), truth, rtol=1e-6, atol=1e-9 * float(truth.max()))
    error = (cov(torch.float32).double() - truth).norm() / truth.norm()
    assert float(error) < (1e-5 if whole else 0.1)


# --- prediction --------------------------------------------------------------------------------


def test_predictions_of_all_methods():
    _model, x, _y, la = low_rank_posterior()
    la.optimize_prior_precision()
    mean, cov = la.logits((x,))
    joint = la.predict((x,), n_samples=4000, seed=3)
    torch.testing.assert_close(joint.probs.sum(1), torch.ones(9, dtype=D))
    assert bool((joint.mutual_information > 0).all())
    torch.testing.assert_close(joint.logit_cov, cov)
    # 4 standard errors of 4000 draws, for independent normals of another generator.
    factor = torch.linalg.cholesky(cov + 1e-9 * torch.eye(4, dtype=D))
    draws = mean + torch.einsum("bce,sbe->sbc", factor, torch.randn(20000, 9, 4, dtype=D))
    error = (joint.probs - draws.softmax(-1).mean(0)).abs().max()
    assert float(error) < 4 * 0.5 / math.sqrt(4000)
    for method in ("mc_independent", "probit", "bridge"):
        other = la.predict((x,), method=method, n_samples=500)
        torch.testing.assert_close(other.probs.sum(1), torch.ones(9, dtype=D))
    # Draws belong to examples, not to batches.
    parts = [la.predict((x[i:j],), seed=3, row0=i).probs for i, j in ((0, 4), (4, 9))]
    whole = la.predict((x,), seed=3).probs
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-9, atol=1e-12)


def test_two_classes_need_no_draws():
    model, x, y = mlp(classes=2)
    la = Laplace(model).fit([(x, y)])
    exact = la.predict((x,), method="quadrature").probs
    drawn = la.predict((x,), n_samples=20000).probs
    assert float((exact - drawn).abs().max()) < 4 * 0.5 / math.sqrt(20000)


def test_weight_samples_have_the_posterior_covariance(monkeypatch: pytest.MonkeyPatch):
    """The draw is linear in its normals: unit vectors give the covariance's root exactly."""
    _, _, _, la = low_rank_posterior()
    la.prior_precision = 0.8
    columns: list[list[torch.Tensor]] = [[] for _ in la.layers]
    sizes = [layer.weight.numel() for layer in la.layers]
    for i in range(max(sizes)):

        def unit(key, size, *, stream=0, i=i):
            e = torch.zeros(math.prod(size))
            e[min(i, len(e) - 1)] = 1.0
            return e.reshape(size)

        monkeypatch.setattr(random, "normal", unit)
        draw = la.sample()
        for j, layer in enumerate(la.layers):
            if i < sizes[j]:
                columns[j].append((draw[layer.name] - layer.weight.detach()).flatten())
    for h, root in zip(kronecker(la), columns, strict=True):
        root = torch.stack(root, 1)
        expected = torch.linalg.inv(h + 0.8 * torch.eye(len(h), dtype=D))
        torch.testing.assert_close(root @ root.T, expected, rtol=1e-9, atol=1e-11)


def test_weight_samples_are_functions_of_seed_and_index():
    _model, x, _, la = low_rank_posterior()
    a, b, c = la.sample(1, 0), la.sample(1, 1), la.sample(1, 0)
    assert all(torch.equal(a[k], c[k]) and not torch.equal(a[k], b[k]) for k in a)
    with la.sampled(1, 0):
        for layer in la.layers:
            torch.testing.assert_close(layer.weight.detach(), a[layer.name])
    small = la.predict((x,), method="weights", n_samples=3, seed=5)
    assert torch.equal(small.probs, la.predict((x,), method="weights", n_samples=3, seed=5).probs)
    assert bool((small.mutual_information > 0).all())


# --- memory ------------------------------------------------------------------------------------


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
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parent.parent / "cuda_benchmarks"))
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


# --- several processes, state ------------------------------------------------------------------

WORKER = """
import sys, torch
sys.path.insert(0, {tests!r})
from test_laplace import sequences, adapters, kronecker
from bayes_kernels.laplace import Laplace
rank, world, path = int(sys.argv[1]), 2, sys.argv[2]
torch.distributed.init_process_group("gloo", init_method="file://" + path + "/store",
                                     rank=rank, world_size=world)
model, x, y = sequences(n=70, examples=8)
results = {{}}
for name, options in {{"dense": dict(rank=None), "low": dict(rank=60), "mc": dict(rank=None, fisher="mc"),
                      "truncated": dict(rank=2)}}.items():
    la = Laplace(model, adapters(model), dense_below=64, tokens="reduce", **options)
    la.fit([(x[rank::2], y[rank::2])])
    results.update({{f"{{name}}.{{i}}": k for i, k in enumerate(kronecker(la))}})
    results[name + ".ll"] = torch.tensor([la.log_likelihood, la.n_examples])
torch.save(results, f"{{path}}/{{rank}}.pt")
"""


def test_two_processes_equal_one(tmp_path):
    code = WORKER.format(tests=os.path.dirname(os.path.abspath(__file__)))
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(rank), str(tmp_path)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]
    assert [run.wait(timeout=120) for run in runs] == [0, 0]
    first, second = (torch.load(tmp_path / f"{r}.pt", weights_only=True) for r in range(2))
    assert all(torch.equal(first[k], second[k]) for k in first)
    model, x, y = sequences(n=70, examples=8)
    for name, options in {
        "dense": {"rank": None},
        "low": {"rank": 60},
        "mc": {"rank": None, "fisher": "mc"},
        "truncated": {"rank": 2},
    }.items():
        la = Laplace(model, adapters(model), dense_below=64, tokens="reduce", **options)
        la.fit([(x, y)])
        # Truncation to two of some ten directions is not the same in another order.
        bound = 0.3 if name == "truncated" else 1e-6
        for i, expected in enumerate(kronecker(la)):
            error = (first[f"{name}.{i}"] - expected).norm() / expected.norm()
            assert float(error) < bound, (name, i)
        assert first[f"{name}.ll"].tolist() == pytest.approx([la.log_likelihood, 8])


def test_state_through_safetensors(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    model, x, _y, la = low_rank_posterior()
    la.optimize_prior_precision(structure="layer")
    safetensors.save_file(la.state_dict(), tmp_path / "posterior.safetensors")
    other = Laplace(model, adapters(model), rank=4, dense_below=8)
    other.load_state_dict(safetensors.load_file(tmp_path / "posterior.safetensors"))
    assert torch.equal(other.logits((x,))[1], la.logits((x,))[1])
    assert torch.equal(other.log_marginal_likelihood(), la.log_marginal_likelihood())
    state = la.state_dict()
    del state["first.lora_A.input_values"]
    with pytest.raises(
        ValueError, match=r"missing or unknown, such as 'first\.lora_A\.input_values'"
    ):
        other.load_state_dict(state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_models(dtype: torch.dtype):
    """Factors are summed in fp32: what is left is the rounding of the model's own passes."""
    model, x, y = sequences(n=16)
    expected = Laplace(model, adapters(model), rank=4, dense_below=8).fit([(x, y)])
    narrow, _, _ = sequences(n=16, dtype=dtype)
    narrow.load_state_dict(model.state_dict())
    ours = Laplace(narrow, adapters(narrow), rank=4, dense_below=8).fit([(x.to(dtype), y)])
    bound = 1e-5 if dtype == torch.float32 else 0.05
    for a, b in zip(kronecker(expected), kronecker(ours), strict=True):
        assert float((a - b).norm() / a.norm()) < bound
    cov, other = expected.logits((x,))[1], ours.logits((x.to(dtype),))[1]
    assert other.dtype == torch.float32
    assert float((cov - other).norm() / cov.norm()) < bound


# --- laplace-torch -----------------------------------------------------------------------------


def test_equals_laplace_torch():
    """Kron Laplace of laplace-torch with curvlinops' exact type-2 Fisher, in fp64.

    Both sum the same rows in fp64 and differ in the order only: 1e-9 leaves room for the condition
    of the eigendecompositions. Several batches: its factors are summed over them as ours are.
    """
    peer = pytest.importorskip("laplace")
    curvature = pytest.importorskip("laplace.curvature.curvlinops")
    model, x, y = mlp()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=5)
    theirs = peer.KronLaplace(
        model, "classification", prior_precision=0.7, backend=curvature.CurvlinopsGGN
    )
    theirs.fit(loader)
    ours = Laplace(model, rank=None, prior_precision=0.7).fit(loader)
    expected = theirs.posterior_precision.to_matrix()
    start = 0
    for block in kronecker(ours):
        stop = start + len(block)
        precision = block + 0.7 * torch.eye(len(block), dtype=D)
        peers = expected[start:stop, start:stop]
        torch.testing.assert_close(precision, peers, rtol=1e-9, atol=1e-9)
        start = stop
    assert start == len(expected)
    torch.testing.assert_close(
        ours.log_marginal_likelihood(),
        theirs.log_marginal_likelihood().detach().squeeze(),
        rtol=1e-9,
        atol=0,
    )
    mean, cov = theirs._glm_predictive_distribution(x)
    our_mean, our_cov = ours.logits((x,))
    torch.testing.assert_close(our_mean, mean.detach(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(our_cov, cov.detach(), rtol=1e-8, atol=1e-10)


# --- errors ------------------------------------------------------------------------------------


def test_untrained_adapters_are_found():
    model, x, y = sequences()
    nn.init.zeros_(model.second.lora_B.weight)
    with pytest.raises(ValueError, match=r"second\.lora_A must have gradients.*B before training"):
        Laplace(model, adapters(model)).fit([(x, y)])
    with pytest.raises(ValueError, match=r"second\.lora_A\.weight must have curvature.*B = 0"):
        Laplace(model, linear_layers(model, "second.lora_A"), rank=None).fit([(x, y)])


def test_errors():
    model, x, y = mlp()
    for options, text in (
        ({"fisher": "exact"}, "fisher must be one of"),
        ({"tokens": "all"}, "tokens must be one of"),
        ({"rank": 0}, "rank must be at least 1"),
        ({"prior_precision": -1.0}, "prior_precision must be one positive"),
        ({"prior_precision": torch.ones(3)}, "one for each of the 4 layers"),
        ({"layers": []}, "distinct names"),
    ):
        with pytest.raises(ValueError, match=text):
            Laplace(model, **options)
    la = Laplace(model)
    with pytest.raises(ValueError, match="fit must come first"):
        la.predict((x,))
    with pytest.raises(ValueError, match="at least one example"):
        la.fit([])
    with pytest.raises(ValueError, match="logits"):
        Laplace(model, forward=lambda m, b: m(b[0])[:, :1]).fit([(x, y)])
    with pytest.raises(ValueError, match="labels must be class indices"):
        la.fit([(x, y.double())])
    la.fit([(x,)])
    with pytest.raises(ValueError, match="fit must have seen labels"):
        la.log_marginal_likelihood()
    la.optimize_prior_precision()  # needs none
    with pytest.raises(ValueError, match="method must be"):
        la.predict((x,), method="magic")
    with pytest.raises(ValueError, match="must have a loader"):
        la.optimize_prior_precision("validation")
    with pytest.raises(ValueError, match="must have labels"):
        Laplace(model, fisher="empirical").fit([(x,)])
    with pytest.raises(ValueError, match=r"names must be nn\.Linear"):
        linear_layers(model, ["1"])
    twice = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    again = nn.Sequential(twice[0], twice[1], twice[0], twice[1], twice[2])
    with pytest.raises(ValueError, match="used once in a forward pass"):
        Laplace(again, linear_layers(again, "0")).fit([(x, y)])
    unused = nn.ModuleDict({"used": nn.Linear(4, 3), "idle": nn.Linear(4, 3)}).double()
    with pytest.raises(ValueError, match=r"idle\.weight must be called in the forward pass"):
        Laplace(unused, forward=lambda m, b: m["used"](b[0])).fit([(x, y)])


def test_reflected_columns_are_the_softmax_hessian():
    logits = torch.randn(6, 5, dtype=D) * 4
    logits[0, 1:] = -800.0  # p = (1, 0, ...)
    columns = factors.softmax_root(logits)
    assert len(columns) == 4
    root = torch.stack(columns, -1)
    p = logits.softmax(-1)
    expected = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    torch.testing.assert_close(root @ root.mT, expected, rtol=1e-12, atol=1e-15)


def test_labels_are_drawn_from_the_model():
    logits = torch.tensor([[1.0, 0.0, -1.0]], dtype=D).expand(20000, 3)
    key = random.key(5)
    (error,) = factors.sampled_errors(logits, key, torch.arange(20000), 1)
    p = logits[0].softmax(-1)
    drawn = (p - error).mean(0)
    assert float((drawn - p).abs().max()) < 4 * 0.5 / math.sqrt(20000)
    part = factors.sampled_errors(logits[:10], key, torch.arange(500, 510), 1)[0]
    assert torch.equal(part, error[500:510])
    assert reference.philox(key, torch.tensor(3)).shape == (4,)


@pytest.mark.parametrize("padding", [0, 3])
def test_tokens_that_do_not_act_on_the_logits_are_left_out(padding: int):
    """Below a head on the last token, all token rules are the same, and padding does not matter."""

    class LastToken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.score = nn.Linear(6, 3, bias=False, dtype=D)

        def forward(self, x):
            return self.score(x)[:, 4]

    torch.manual_seed(0)
    model = LastToken()
    x = torch.randn(8, 5 + padding, 6, dtype=D)
    y = torch.arange(8) % 3
    found = {}
    for tokens in ("expand", "last"):
        inputs = x if tokens == "expand" else x[:, :5]
        if tokens == "last":
            layer = Layer("score", model.score, model.score.weight)
        else:
            layer = linear_layers(model)[0]
        la = Laplace(model, [layer], tokens=tokens)
        la.fit([(inputs, y)], verbose=False)
        found[tokens] = la.logits((inputs, y))[1]
    torch.testing.assert_close(found["expand"], found["last"], rtol=1e-10, atol=0)


def test_a_prior_is_not_chosen_without_held_out_examples():
    model, x, y = mlp()
    la = Laplace(model, linear_layers(model))
    la.fit([(x, y)], verbose=False)
    before = la.prior_precision.clone()
    with pytest.raises(ValueError, match="must give held-out examples"):
        la.optimize_prior_precision("validation", loader=[])
    assert torch.equal(la.prior_precision, before)


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


class Attention(nn.Module):
    """A module inside that torch never calls, and a branch that is taken or not."""

    def __init__(self) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(4, 2, batch_first=True)
        self.branch, self.head = nn.Linear(4, 4), nn.Linear(4, 3)
        self.taken = self.acts = True

    def forward(self, x):
        z = self.mha(x[:, None], x[:, None], x[:, None])[0][:, 0]
        if self.taken:
            z = z + self.branch(z) if self.acts else z + 0 * self.branch(z).detach()
        return self.head(z)


@pytest.mark.parametrize("rank", [None, 2])
def test_layers_that_are_never_called_and_layers_that_do_not_act(rank: int | None):
    torch.manual_seed(0)
    model = Attention().double()
    data = [(torch.randn(6, 4, dtype=D), torch.arange(6) % 3)]
    options = {"rank": rank, "dense_below": 1}
    with pytest.raises(
        ValueError, match=r"mha\.out_proj\.weight must be called.*MultiheadAttention"
    ):
        Laplace(model, **options).fit(data, verbose=False)
    with pytest.raises(ValueError, match="must be called"):  # nothing but this layer
        Laplace(model, linear_layers(model, "mha.out_proj")).fit(data, verbose=False)
    layers = linear_layers(model, ["branch", "head"])
    la = Laplace(model, layers, **options).fit(data, verbose=False)
    for jacobian in ("vmap", "repeat"):
        la.jacobian = jacobian
        la.predict(data[0])
        model.taken = False
        with pytest.raises(ValueError, match=r"branch\.weight must be called in the forward pass"):
            la.predict(data[0])
        model.taken = True
    model.acts = False
    with pytest.raises(ValueError, match=r"branch\.weight must have curvature"):
        Laplace(model, layers, **options).fit(data, verbose=False)
    # Called for some of the batches is enough.
    model.acts, batches = True, [*data, *data]

    def turns(model, batch):
        model.taken = batch is not batches[1]
        return model(batch[0])

    Laplace(model, layers, forward=turns, **options).fit(batches, verbose=False)


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("fisher", ["ggn", "mc", "empirical"])
def test_a_saturated_softmax_is_named(fisher: str, rank: int | None):
    """No probability but 0 and 1, where the labels agree with them."""
    model, x, _ = mlp(dtype=torch.float32)
    model[1] = nn.Tanh()
    with torch.no_grad():
        model[2].weight.mul_(1e6)
    options = {"fisher": fisher, "rank": rank, "dense_below": 1}
    y = model(x).argmax(1)
    with pytest.raises(ValueError, match="got a softmax that is saturated for every example"):
        Laplace(model, **options).fit([(x, y)], verbose=False)
    with torch.no_grad():
        model[2].weight.mul_(1e-5)
    Laplace(model, **options).fit([(x, (y + 1) % 3)], verbose=False)


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_named(bad: float, rank: int | None):
    model, x, y = mlp()
    wrong = x.clone()
    wrong[3, 1] = bad
    batches = [(x, y), (wrong, y)]
    options = {"rank": rank, "dense_below": 1}
    with pytest.raises(ValueError, match=r"first in inputs of 0\.weight \(examples 20 to 39"):
        Laplace(model, **options).fit(batches, verbose=False)
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken[2].bias[1] = bad
    with pytest.raises(ValueError, match=r"first in outputs of 2\.weight"):
        Laplace(broken, **options).fit([(x, y)], verbose=False)
    behind = Laplace(model, forward=lambda m, batch: m(batch[0]) * bad, **options)
    with pytest.raises(ValueError, match="first in the logits, behind the last layer"):
        behind.fit([(x, y)], verbose=False)
    rooted = nn.Sequential(nn.Linear(4, 6), Root(), nn.Linear(6, 3)).double()
    with pytest.raises(ValueError, match=r"gradients of layer 0\.weight must be finite"):
        Laplace(rooted, **options).fit([(x, y)], verbose=False)


class Root(nn.Module):
    """Finite at 0, with an infinite slope there."""

    def forward(self, x):
        return x + (0 * x).sqrt()


@pytest.mark.parametrize("kind", ["tuple", "mapping", "split"])
def test_empty_batches(kind: str):
    """They change nothing in a pass over data, and have no prediction."""
    model, x, y = mlp()
    options: dict[str, Any] = {}
    if kind == "split":
        options["split"] = lambda batch, n: [
            tuple(p) for p in zip(*(t.chunk(n) for t in batch), strict=True)
        ]

    def batch(x, y):
        return (
            {"input": x, "labels": y, "position_ids": torch.arange(4)}
            if kind == "mapping"
            else (x, y)
        )

    if kind == "mapping":
        options["forward"] = lambda model, batch: model(batch["input"])
    empty = batch(x[:0], y[:0])
    found = []
    for batches in ([batch(x, y)], [empty, batch(x, y), empty]):
        la = Laplace(model, **options).fit(batches, verbose=False)
        delta = la.optimize_prior_precision("validation", loader=batches, refine=0)
        found.append((la.n_examples, la.log_likelihood, float(delta), *kronecker(la)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
    with pytest.raises(ValueError, match="at least one example, got none"):
        Laplace(model, **options).fit([empty, empty], verbose=False)
    for predict in (la.logits, la.mean_logits, la.predict, partial(la.predict, method="weights")):
        with pytest.raises(ValueError, match="at least one example, got an empty one"):
            predict(empty)
