"""Passes: gradient checkpointing, modules that are not called, batches, and what is restored."""

from __future__ import annotations

import copy
import math
import warnings
from collections import UserDict
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from bayes_kernels.laplace import Laplace, linear_layers
from test_laplace.networks import D, adapters, kronecker, mlp, sequences


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
