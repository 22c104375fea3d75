"""Labels of tokens: curvature against per-token Jacobians, with the labels enumerated."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bayes_kernels.laplace import Laplace, linear_layers
from bayes_kernels.laplace import tokens as token_labels
from bayes_kernels.laplace.tokens import LabelledTokens, TokenErrors

pytestmark = pytest.mark.cpu_only

V, T = 7, 5
VALID = torch.ones(3, T, dtype=torch.bool)
IDS = torch.tensor([[1, 4, 2, 6, 3], [5, 3, 0, 1, 2], [3, 1, 6, 6, 4]])
# One label, two, and none.
LABELS = torch.tensor([[-100, 2, -100, -100, -100], [-100, 0, -100, 2, -100], [-100] * T])
BATCH = {"ids": IDS, "attention_mask": VALID, "labels": LABELS}


class Causal(nn.Module):
    """A causal language model of one block: attention, a layer at each token, a head."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(V, width)
        self.query, self.value = nn.Linear(width, 3), nn.Linear(width, 3)
        self.key = nn.Linear(width, 3)
        self.up, self.head = nn.Linear(3, 4), nn.Linear(4, V, bias=False)

    def forward(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embed(ids)
        q, k, v = self.query(x), self.key(x), self.value(x)
        seen = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
        seen = seen & (attention_mask[:, None].bool() | torch.eye(len(seen), dtype=torch.bool))
        weights = (q @ k.mT).masked_fill(~seen, -math.inf).softmax(-1)
        return self.head(torch.tanh(self.up(weights @ v)))


def causal() -> Causal:
    torch.manual_seed(3)
    model = Causal().double()
    for p in model.parameters():
        p.data.mul_(2)
    return model


LAYERS = r"query|value|up|head"


def laplace(model: nn.Module, **options: Any) -> Laplace:
    options = {"rank": None, "fisher": "mc", **options}
    return Laplace(model, linear_layers(model, options.pop("layers", LAYERS)), **options)


def factors(la: Laplace) -> dict[str, tuple[Tensor, Tensor]]:
    """Input factor over examples, and gradient factor, by layer."""
    return {
        layer.name: (block.u * block.mu @ block.u.T, block.q * block.nu @ block.q.T)
        for layer, block in zip(la.layers, la._fitted(), strict=True)
    }


def assert_same(one: Laplace, other: Laplace, **kwargs: Any) -> None:
    a, b = factors(one), factors(other)
    assert a.keys() == b.keys() and one.n_examples == other.n_examples
    for name, pair in a.items():
        for x, y in zip(pair, b[name], strict=True):
            torch.testing.assert_close(x, y, **{"rtol": 1e-10, "atol": 1e-12, **kwargs})
    assert one.log_likelihood == pytest.approx(other.log_likelihood, rel=1e-10)


class Enumerated(TokenErrors):
    """All labels of all labelled tokens, each weighted by the root of its probability."""

    def __init__(self, tokens: LabelledTokens) -> None:
        rows = torch.tensor(list(itertools.product(range(V), repeat=tokens.total)))
        p = tokens.logits[tokens.where].softmax(-1)
        self.weights = p.gather(1, rows.T).prod(0).mul(len(rows)).sqrt()
        super().__init__(tokens, rows)

    def columns(self, start: int, stop: int) -> Tensor:
        return super().columns(start, stop) * self.weights[start:stop, None, None, None]


@pytest.fixture
def enumerated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LabelledTokens, "drawn", lambda self, *_: Enumerated(self))


def softmax_hessian(logits: Tensor) -> Tensor:
    p = logits.softmax(-1)
    return p.diag() - p[:, None] * p


def traces(model: Causal, ids: Tensor, mask: Tensor, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (T, V) of one text, a layer's inputs (T, n), and d logits / d its outputs (T, V, T, m)."""
    layer = getattr(model, name)
    kept: dict[str, Tensor] = {}

    def logits_of(shift: Tensor) -> Tensor:
        def hook(_: nn.Module, args: Any, y: Tensor) -> Tensor:
            kept["a"] = args[0][0].detach()
            return y + shift

        handle = layer.register_forward_hook(hook)
        try:
            return model(ids[None], mask[None])[0]
        finally:
            handle.remove()

    shift = torch.zeros(len(ids), layer.out_features, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(logits_of, shift)
    return logits_of(shift).detach(), kept["a"], jacobian


@pytest.mark.parametrize("name", ["query", "value", "up", "head"])
def test_labels_drawn_at_each_token_have_the_ggn_of_all_tokens(name: str) -> None:
    """Products of different tokens vanish in the mean: the weight's own curvature, by enumeration."""
    model = causal()
    for row in (0, 1):
        logits, a, jacobian = traces(model, IDS[row], VALID[row], name)
        exact = 0
        for t in (LABELS[row] != -100).nonzero()[:, 0]:
            of_weight = torch.einsum("csm,sn->cmn", jacobian[t], a).flatten(1)
            exact = exact + of_weight.T @ softmax_hessian(logits[t]) @ of_weight
        errors = Enumerated(LabelledTokens(logits[None], LABELS[row : row + 1]))
        columns = errors.columns(0, errors.count)[:, 0]
        of_weight = torch.einsum("vtc,tcsm,sn->vmn", columns, jacobian, a).flatten(1)
        torch.testing.assert_close(of_weight.T @ of_weight, exact, rtol=1e-10, atol=1e-12)


def expected_factors(
    model: Causal, name: str, rule: str, batch: dict[str, Tensor] = BATCH
) -> tuple[Tensor, Tensor]:
    """The rule written out, token by token, with the Fisher in closed form."""
    inputs, gradients, total = 0, 0, 0
    for ids, mask, labels in zip(*batch.values(), strict=True):
        at = (labels != -100).nonzero()[:, 0].tolist()
        if not at:
            continue
        logits, a, jacobian = traces(model, ids, mask, name)
        acting = [s for s in range(len(ids)) if bool(jacobian[at][:, :, s].any())]
        assert acting == (at if name != "value" else list(range(at[-1] + 1)))
        n, total = len(at), total + len(at)
        if rule == "reduce":
            mean = a[acting].mean(0)
            inputs = inputs + n * mean[:, None] * mean
            for t in at:
                summed = jacobian[t].sum(1)
                gradients = gradients + summed.T @ softmax_hessian(logits[t]) @ summed
            continue
        scale = n / len(acting) if rule == "expand" else n
        inputs = inputs + scale * a[acting].T @ a[acting]
        for t in at:
            for s in acting:
                g = jacobian[t][:, s]
                gradients = gradients + g.T @ softmax_hessian(logits[t]) @ g
    return inputs / total, gradients


@pytest.mark.usefixtures("enumerated")
@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("rule", ["expand", "sum", "reduce"])
def test_factors_are_those_of_the_rule(rule: str, at_once: bool) -> None:
    model = causal()
    jacobian = "vmap" if at_once else "repeat"
    la = laplace(model, tokens=rule, jacobian=jacobian, layers=r"query|value|up|head")
    found = factors(la.fit([BATCH], verbose=False))
    assert la.n_examples == 3
    for name in ("query", "value", "up", "head"):
        a, g = expected_factors(model, name, rule)
        torch.testing.assert_close(found[f"{name}.weight"][0], a, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(found[f"{name}.weight"][1], g, rtol=1e-9, atol=1e-12)
    log_p = model(IDS, VALID).log_softmax(-1)
    at = (LABELS != -100).nonzero(as_tuple=True)
    expected = log_p[at][range(3), LABELS[at]].sum()
    assert la.log_likelihood == pytest.approx(float(expected.detach()), rel=1e-12)


def test_drawn_labels_approach_the_mean() -> None:
    model = causal()
    la = laplace(model, mc_samples=700, seed=5).fit([BATCH], verbose=False)
    for name in ("query", "value", "head"):
        a, g = expected_factors(model, name, "expand")
        found = factors(la)[f"{name}.weight"]
        torch.testing.assert_close(found[0], a, rtol=1e-9, atol=1e-12)
        assert float((found[1] - g).norm() / g.norm()) < 0.1
    again = laplace(model, mc_samples=2, seed=5).fit([BATCH], verbose=False)
    other = laplace(model, mc_samples=2, seed=6).fit([BATCH], verbose=False)
    assert not torch.equal(factors(again)["up.weight"][1], factors(other)["up.weight"][1])


def test_labels_of_different_tokens_and_draws_are_independent() -> None:
    logits = torch.zeros(200, 6, V)
    tokens = LabelledTokens(logits, torch.zeros(200, 6, dtype=torch.int64))
    key = torch.tensor([11, 12])
    labels = tokens.drawn(key, torch.arange(200), 2).labels.view(2, 200, 6)
    pairs = [(labels[0, :, 0], labels[0, :, 1]), (labels[0, :, 2], labels[1, :, 2])]
    pairs.append((labels[0, :-1, 3], labels[0, 1:, 3]))
    for one, other in pairs:  # equal by chance one in seven times
        assert abs(float((one == other).double().mean()) - 1 / V) < 0.08
    frequency = labels.flatten().bincount(minlength=V) / labels.numel()
    assert float((frequency - 1 / V).abs().max()) < 0.03


FISHERS = pytest.mark.parametrize("fisher", ["mc", "empirical"])


@FISHERS
@pytest.mark.parametrize("rule", ["expand", "sum", "reduce"])
def test_batches_and_padding_change_nothing(rule: str, fisher: str) -> None:
    model, options = causal(), {"tokens": rule, "fisher": fisher, "mc_samples": 2}
    whole = laplace(model, **options).fit([BATCH], verbose=False)
    ones = [{name: value[i : i + 1] for name, value in BATCH.items()} for i in range(3)]
    assert_same(whole, laplace(model, **options).fit(ones, verbose=False))

    def halves(batch: Any, count: int) -> list[Any]:
        return [{k: v[:2] for k, v in batch.items()}, {k: v[2:] for k, v in batch.items()}]

    assert_same(whole, laplace(model, split=halves, **options).fit([BATCH], verbose=False))
    pads = {"ids": 6, "attention_mask": 0, "labels": -100}
    for left, right in ((2, 0), (0, 3), (1, 2)):
        padded = {
            name: nn.functional.pad(value.long(), (left, right), value=pads[name])
            for name, value in BATCH.items()
        }
        padded["attention_mask"] = padded["attention_mask"].bool()
        assert_same(whole, laplace(model, **options).fit([padded], verbose=False))
    # A mask is not needed: tokens that act on no label are left out without it.
    bare = laplace(model, mask=lambda batch: None, **options)
    assert_same(whole, bare.fit([padded], verbose=False))


@FISHERS
@pytest.mark.parametrize("rule", ["expand", "sum", "reduce"])
def test_one_label_in_each_text_is_a_class(rule: str, fisher: str) -> None:
    model, at = causal(), torch.tensor([1, 4, 2])
    labels = torch.full((3, T), -100)
    labels[range(3), at] = torch.tensor([3, 0, 6])
    texts = {**BATCH, "labels": labels}
    options = {
        "tokens": rule,
        "fisher": fisher,
        "mc_samples": 3,
        "seed": 2,
        "layers": "query|value",
    }

    def at_the_label(m: nn.Module, batch: Any) -> Tensor:
        return m(batch["ids"], batch["attention_mask"])[range(3), at]

    classes = laplace(model, forward=at_the_label, labels=lambda _: labels[range(3), at], **options)
    tokens = laplace(model, **options).fit([texts], verbose=False)
    assert_same(tokens, classes.fit([BATCH], verbose=False))
    assert float(tokens.optimize_prior_precision()) == pytest.approx(
        float(classes.optimize_prior_precision()), rel=1e-10
    )


@FISHERS
def test_tokens_are_examples_of_a_head(fisher: str) -> None:
    """Each labelled token is one of the head's examples, whether or not its outputs are the logits."""
    model = causal()
    hidden: list[Tensor] = []
    handle = model.head.register_forward_pre_hook(lambda _, args: hidden.append(args[0].detach()))
    model(IDS, VALID)
    handle.remove()
    at = (LABELS != -100).nonzero(as_tuple=True)
    head = nn.Sequential(model.head)
    options = {"fisher": fisher, "layers": ".*", "mc_samples": 200}
    alone = laplace(head, **options).fit([(hidden[0][at], LABELS[at])], verbose=False)
    for scale in (False, True):  # behind the head nothing, or an operation
        options["layers"] = "head"
        forward = lambda m, b: m(b["ids"], b["attention_mask"]) + 0.0  # noqa: E731
        la = laplace(model, forward=forward if scale else None, **options)
        la.fit([BATCH], verbose=False)
        (a, g), (expected_a, expected_g) = *factors(la).values(), *factors(alone).values()
        torch.testing.assert_close(a, expected_a)
        rtol = 1e-10 if fisher == "empirical" else 0.3  # the labels are drawn by other numbers
        torch.testing.assert_close(g, expected_g, rtol=rtol, atol=0 if rtol < 1e-3 else 0.1)
        assert la.log_likelihood == pytest.approx(alone.log_likelihood)


@pytest.mark.parametrize("rule", ["expand", "sum", "reduce"])
def test_low_rank_factors_are_the_dense_ones_while_rows_are_few(rule: str) -> None:
    model = causal()
    options = {"tokens": rule, "layers": "query|up|head"}  # which see the three labelled tokens
    dense = laplace(model, **options).fit([BATCH], verbose=False)
    low = laplace(model, **options, rank=3, dense_below=4, buffer=2)
    low.fit([BATCH], verbose=False)
    assert any(len(block.nu) < len(block.q) for block in low._fitted())
    assert_same(dense, low, rtol=1e-6, atol=1e-9)


def test_parts_of_a_batch_equal_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    model = causal()
    whole = laplace(model, mc_samples=2).fit([BATCH], verbose=False)
    monkeypatch.setattr(token_labels, "_AT_ONCE", V)  # one token at a time
    assert_same(whole, laplace(model, mc_samples=2).fit([BATCH], verbose=False))


def test_validation_and_predictions_are_of_draws_of_weights() -> None:
    model = causal()
    la = laplace(model, mc_samples=4).fit([BATCH], verbose=False)
    grid = torch.tensor([1e-3, 0.1, 3.0, 100.0], dtype=torch.float64)
    scores = []
    for delta in grid:
        la.prior_precision = delta
        p = 0
        for s in range(5):
            with la.sampled(0, s):
                p = p + model(IDS, VALID).softmax(-1).detach() / 5
        at = (LABELS != -100).nonzero(as_tuple=True)
        scores.append(float(p[at][range(3), LABELS[at]].log().sum()))
        predicted = la.predict(BATCH, method="weights", n_samples=5)
        torch.testing.assert_close(predicted.probs, p.float())
        assert predicted.mutual_information.shape == (3, T)
    assert len({round(s, 6) for s in scores}) == 4
    parts = ({name: value[i : i + 1] for name, value in BATCH.items()} for i in range(3))
    chosen = la.optimize_prior_precision(
        "validation", loader=parts, grid=grid, refine=0, prediction="weights", n_samples=5
    )
    assert float(chosen) == float(grid[scores.index(max(scores))])
    evidence = float(la.log_marginal_likelihood())
    assert math.isfinite(evidence) and evidence < la.log_likelihood
    torch.testing.assert_close(la.mean_logits(BATCH), model(IDS, VALID))


def test_what_labels_of_tokens_have_not() -> None:
    model = causal()
    for options, batch, message in (
        ({"fisher": "ggn"}, BATCH, "fisher must be 'mc' .* labels of tokens, got 'ggn'"),
        ({"tokens": "last"}, BATCH, "tokens must be one of .* got 'last'"),
        ({"tokens": "sum_padded"}, BATCH, "tokens must be one of .* got 'sum_padded'"),
        ({}, {**BATCH, "labels": None}, r"labels \(B, T\), -100 where"),
        ({}, {**BATCH, "labels": LABELS[:, 1:]}, r"labels must be class indices of shape \(3, 5\)"),
        ({}, {**BATCH, "labels": LABELS.clamp(max=-100)}, "at least one labelled token, got none"),
        ({}, {**BATCH, "labels": LABELS.clamp(min=-3)}, r"labels must be in \[0, 7\), got -3"),
    ):
        with pytest.raises(ValueError, match=message):
            laplace(model, **options).fit([batch], verbose=False)
    la = laplace(model).fit([BATCH], verbose=False)
    for ask in (
        lambda: la.predict(BATCH),
        lambda: la.logits(BATCH),
        lambda: la.optimize_prior_precision("validation", loader=[BATCH]),
    ):
        with pytest.raises(ValueError, match="use method='weights'"):
            ask()
    with torch.no_grad():
        model.embed.weight[1] = math.nan
    with pytest.raises(ValueError, match=r"labelled tokens must be finite.*query.*example 0"):
        laplace(model).fit([BATCH], verbose=False)
