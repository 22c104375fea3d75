"""Factors: sums over tokens, columns, batches and processes against explicit ones."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from programs import joined, together
from torch import nn

from bayes_kernels import random, reference
from bayes_kernels.laplace import TOKENS, Laplace, Layer, linear_layers
from bayes_kernels.laplace.errors import SoftmaxRoot, sampled_errors
from test_laplace.networks import D, adapters, jacobians, kronecker, mlp, sequences


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
            elif tokens == "sum":
                rows_a, rows_g = a[valid], g[valid]
            elif tokens == "sum_padded":
                rows_a, rows_g = a, g
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
@pytest.mark.parametrize("tokens", TOKENS)
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


@pytest.mark.parametrize("tokens", sorted({*TOKENS} - {"sum_padded"}))
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


@pytest.mark.parametrize("length", [1, 5])
def test_the_sum_over_tokens_is_their_number_times_the_mean(length: int):
    """Examples of T tokens: precisions are T times larger, so that delta T is the same posterior."""
    model, x, y = sequences(tokens=length)
    mean = Laplace(model, adapters(model), rank=None, prior_precision=2.0).fit([(x, y)])
    for tokens in ("sum", "sum_padded"):
        total = Laplace(model, adapters(model), rank=None, tokens=tokens).fit([(x, y)])
        for a, b in zip(kronecker(mean), kronecker(total), strict=True):
            torch.testing.assert_close(length * a, b, rtol=1e-10, atol=1e-13)
        total.prior_precision = 2.0 * length
        ours, theirs = total.logits((x, y))[1] * length, mean.logits((x, y))[1]
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_padded_sums_have_every_position():
    """Garbage behind the mask enters the factor of inputs, and only that: no gradient flows there."""
    model, x, y = sequences()
    garbage = torch.cat([x, torch.full_like(x[:, :2], 3.0)], 1)
    mask = (torch.arange(7) < 5).to(D).expand(9, 7)
    batch = {"x": garbage, "attention_mask": mask, "labels": y}
    found = {
        tokens: Laplace(
            model,
            linear_layers(model, "first.lora_A"),
            rank=None,
            tokens=tokens,
            forward=lambda m, b: m(b["x"], b["attention_mask"]),
        )
        .fit([batch])
        ._fitted()[0]
        for tokens in ("sum", "sum_padded")
    }
    inputs = {name: (b.u * b.mu) @ b.u.T for name, b in found.items()}
    extra = torch.full_like(inputs["sum"], 2 * 3.0**2)
    torch.testing.assert_close(inputs["sum_padded"], inputs["sum"] + extra, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found["sum"].nu, found["sum_padded"].nu, rtol=1e-10, atol=1e-13)


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
@pytest.mark.parametrize("tokens", ["expand", "sum", "last"])
def test_low_rank_factors_are_the_dense_ones_while_rows_are_few(tokens: str, buffer: int):
    """At most 60 rows: those of two masked sequences, three columns each; waiting or not."""
    model, x, y = sequences(n=70, examples=2, seed=5)
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


def _fit(folder: str, rank: int) -> None:
    model, x, y = sequences(n=70, examples=8)
    results = {}
    for name, options in {
        "dense": {"rank": None},
        "low": {"rank": 60},
        "mc": {"rank": None, "fisher": "mc"},
        "truncated": {"rank": 2},
    }.items():
        la = Laplace(model, adapters(model), dense_below=64, tokens="reduce", **options)
        la.fit([(x[rank::2], y[rank::2])])
        results.update({f"{name}.{i}": k for i, k in enumerate(kronecker(la))})
        results[name + ".ll"] = torch.tensor([la.log_likelihood, la.n_examples])
    torch.save(results, f"{folder}/{rank}.pt")


def test_two_processes_equal_one(tmp_path):
    together("test_laplace.test_factors", tmp_path)
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


def test_reflected_columns_are_the_softmax_hessian():
    logits = torch.randn(6, 5, dtype=D) * 4
    logits[0, 1:] = -800.0  # p = (1, 0, ...)
    errors = SoftmaxRoot(logits)
    assert errors.count == 4
    root = errors.columns(0, 4).movedim(0, -1)
    for cut in range(5):
        parts = torch.cat([errors.columns(0, cut), errors.columns(cut, 4)])
        assert torch.equal(parts, errors.columns(0, 4))
    p = logits.softmax(-1)
    expected = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    torch.testing.assert_close(root @ root.mT, expected, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(errors.total(), expected.sum(0), rtol=1e-12, atol=1e-15)


def test_labels_are_drawn_from_the_model():
    logits = torch.tensor([[1.0, 0.0, -1.0]], dtype=D).expand(20000, 3)
    key = random.key(5)
    (error,) = sampled_errors(logits, key, torch.arange(20000), 1).values
    p = logits[0].softmax(-1)
    drawn = (p - error).mean(0)
    assert float((drawn - p).abs().max()) < 4 * 0.5 / math.sqrt(20000)
    part = sampled_errors(logits[:10], key, torch.arange(500, 510), 1).values[0]
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
    for tokens in ("expand", "sum", "last"):
        inputs = x[:, :5] if tokens == "last" else x
        if tokens == "last":
            layer = Layer("score", model.score, model.score.weight)
        else:
            layer = linear_layers(model)[0]
        la = Laplace(model, [layer], tokens=tokens)
        la.fit([(inputs, y)], verbose=False)
        found[tokens] = la.logits((inputs, y))[1]
    torch.testing.assert_close(found["expand"], found["last"], rtol=1e-10, atol=0)
    torch.testing.assert_close(found["sum"], found["last"], rtol=1e-10, atol=0)


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


if __name__ == "__main__":
    with joined() as number:
        _fit(sys.argv[1], number)
