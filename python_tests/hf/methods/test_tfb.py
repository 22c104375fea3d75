"""TFB: regrouping, search, conversion, noise, persistence, and the way back after an error."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accuracy import assert_same_but_rounding
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import (
    BASES,
    BATCHES,
    IDS,
    LABELS,
    adapted,
    arguments,
    choices,
    fill,
    llama,
    logits,
    trained,
)
from torch import Tensor, nn

from bayes_kernels.hf import (
    BayesLoraConfig,
    BayesLoraModel,
    BayesTrainer,
    BlobConfig,
    ScalablConfig,
    bayesianize,
    compare_draws,
    export_lora,
    fold_samples,
    kl_divergence,
    posterior,
    predict,
    refresh_noise,
    rescale_,
)
from bayes_kernels.hf.layers import bayes_layers
from bayes_kernels.hf.method import METHODS
from bayes_kernels.hf.methods import tfb as tfb_module
from bayes_kernels.hf.methods.tfb import regroup, tfb_
from bayes_kernels.hf.methods.tfb_report import Trial
from bayes_kernels.hf.methods.tfb_search import bisect, least_nll
from bayes_kernels.hf.scale import DrawsReport

QUICK: dict[str, Any] = {"metric": "nll", "n_samples": 3, "max_trials": 4, "progress": False}


def convert(model: nn.Module, kind: str = "bert", **options: Any) -> Any:
    return bayesianize(model, "tfb", BATCHES, **{**QUICK, **choices(kind), **options})


# --- regrouping ----------------------------------------------------------------------------------


def test_regrouping_keeps_the_product() -> None:
    generator = torch.Generator().manual_seed(0)
    b, a = torch.randn(3, 50, 6, generator=generator), torch.randn(3, 6, 70, generator=generator)
    b[1, :, 5] = b[1, :, 0] + b[1, :, 4]  # rank 5
    b[2] = 0
    a2, b2, d = regroup(a, b)
    product = b.double() @ a.double()
    assert (b2 @ a2 - product).abs().max() < 1e-12 * product.abs().max()
    error = (b2.float() @ a2.float()).double() - product
    assert error.abs().max() < 1e-6 * product.abs().max()
    torch.testing.assert_close(b2.mT @ b2, torch.eye(6).double().expand(3, 6, 6))
    torch.testing.assert_close(d, torch.linalg.svdvals(b.double()), rtol=1e-10, atol=1e-12)
    assert d[1, 5] < 1e-6 and not d[2].any()
    # The published factors: B' = U diag(d), A' = V^T A.
    torch.testing.assert_close((b2[0] * d[0]) @ (a2[0] / d[0][:, None]), product[0])


@pytest.mark.parametrize("full_rank", [True, False])
def test_regrouping_below_the_rank(full_rank: bool) -> None:
    """A head of three classes with r = 8: the noise of B' A' is that of three directions."""
    a, b = torch.randn(8, 40), torch.randn(3, 8)
    if not full_rank:
        b[2] = b[0] - b[1]
    a2, b2, d = regroup(a, b)
    assert a2.shape == a.shape and b2.shape == b.shape
    torch.testing.assert_close(b2 @ a2, (b @ a).double(), rtol=0, atol=1e-5)
    rank = 3 if full_rank else 2
    assert (d[:rank] > 0.1).all() and (d[rank:] < 1e-6).all()
    kept = b2[:, :rank]
    torch.testing.assert_close(kept.T @ kept, torch.eye(rank).double(), rtol=0, atol=1e-6)


# --- search --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_validation_examples_choose_the_least_nll(kind: str) -> None:
    """Of all that was tried, and of a finer grid nothing is much better; anchors are not looked at."""
    model = trained(kind)
    report = convert(model, kind, validation=BATCHES, n_samples=4, high=3.2, low=0.01, max_trials=9)
    assert report.search == "validation" and report.labels == "true" and report.anchors == len(IDS)
    assert 3 <= len(report.trace) <= 9 and report.passes == 1 + len(report.trace)
    assert report.sigma == min(report.trace, key=lambda trial: trial.nll).sigma
    assert all(trial.complete for trial in report.trace)  # of 4 examples
    assert report.after is not None and not report.at_range_end
    law = {"n_samples": 4, "progress": False, **choices(kind)}
    said = compare_draws(model, BATCHES, **law)
    assert said.nll == pytest.approx(report.after.nll, abs=1e-6)
    assert said.mean_nll == pytest.approx(report.before.nll, abs=1e-5)
    assert report.after.change == pytest.approx(said.nll - said.mean_nll, abs=1e-5)
    for factor in (0.8, 1.25):
        other = copy.deepcopy(model)
        rescale_(other, factor)
        assert compare_draws(other, BATCHES, **law).nll > said.nll - 0.01
    assert "of least" not in str(report) and "4 validation examples" in str(report)
    # Without a word the search takes them where there are some, and the anchors where there are none.
    assert convert(trained(kind), kind).search == "bisection"
    again = convert(trained(kind), kind, validation=BATCHES, search="bisection")
    assert again.search == "bisection" and again.sigma == convert(trained(kind), kind).sigma


def test_what_validation_examples_must_have() -> None:
    bare = [{"input_ids": IDS}]
    for options, message in (
        ({"search": "validation"}, "validation must be held-out examples"),
        ({"validation": bare}, "validation must have labels"),
    ):
        model = trained()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with pytest.raises(ValueError, match=message):
            convert(model, **options)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_draws_that_do_harm_are_said() -> None:
    """Wide noise that anchors allow, on examples whose labels the mean predicts."""
    ids = torch.randint(1, int(IDS.max()), (40, 6), generator=torch.Generator().manual_seed(4))
    model = trained()
    held_out = [
        {"input_ids": ids, "labels": predict(model, {"input_ids": ids}, n_samples=0).classes}
    ]
    wide = {"tolerance": 1.0, "low": 4.0, "high": 8.0, "search": "bisection"}
    with pytest.warns(UserWarning, match=r"bayesianize: 3 draws raise the NLL of 40 examples"):
        convert(model, validation=iter(held_out), **wide)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        convert(trained(), **wide)
        convert(trained(), validation=held_out)


@pytest.mark.parametrize("sizes", [(40,), (7, 0, 26, 1, 16), (250, 251), (39,)])
@pytest.mark.parametrize("search", ["auto", "bisection"])
def test_what_has_chosen_does_not_check(
    sizes: tuple[int, ...], search: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each example has its number as its first token; of few examples all choose and check."""
    module = importlib.import_module("bayes_kernels.hf.bayesianize")
    rows = torch.arange(sum(sizes))
    held_out = [
        {"input_ids": part[:, None].expand(-1, 3), "labels": part * 0, "use_cache": False}
        for part in rows.split(sizes)
    ]
    found: dict[str, list[int]] = {}
    report = DrawsReport(9, 3, 1.0, 2.0, 0.9, 1.1)

    def note(kind: str, batches: Any, result: Any) -> Any:
        found[kind] = [int(row[0]) for batch in batches for row in batch["input_ids"]]
        return result

    conversion = dataclasses.replace(
        METHODS["tfb"].conversion,
        convert=lambda _, __, *, validation, search: note("chose", validation, 1),
    )
    methods = {"tfb": dataclasses.replace(METHODS["tfb"], conversion=conversion)}
    monkeypatch.setattr(module, "METHODS", methods)
    monkeypatch.setattr(
        module, "compare_draws", lambda _, data, **__: note("checked", data, report)
    )
    with pytest.warns(UserWarning) as said:
        bayesianize(trained(), "tfb", BATCHES, validation=held_out, search=search)
    same = search == "bisection" or sum(sizes) < 40
    assert sorted({*found["chose"], *found["checked"]}) == rows.tolist()
    assert bool({*found["chose"]} & {*found["checked"]}) == same
    if not same:
        assert min(len(rows) // 3, 150) <= len(found["checked"]) <= 200
        assert len(found["checked"]) <= len(found["chose"])
    (warning,) = (str(w.message) for w in said if "bayesianize: " in str(w.message))
    few = "and these chose the posterior's width" in warning
    assert few == (same and search == "auto")


def threshold(largest: float) -> tuple[Callable[[float], Trial], list[float]]:
    seen: list[float] = []

    def trial(sigma: float) -> Trial:
        seen.append(sigma)
        return Trial(sigma, sigma, sigma <= largest, 0.0, 0.0, 0.0)

    return trial, seen


@pytest.mark.parametrize(
    ("largest", "order", "feasible", "code"),
    [
        (0.0071, [0.008, 0.0045, 0.00625, 0.007125], 0.00625, 0.007125),
        (0.0110, [0.008, 0.0115, 0.00975, 0.010625], 0.010625, 0.0115),
        (0.1000, [0.008, 0.0115, 0.01325, 0.014125], 0.014125, 0.015),
        (0.0001, [0.008, 0.0045, 0.00275, 0.001875], 0.0, 0.001875),
        (0.0012, [0.008, 0.0045, 0.00275, 0.001875], 0.001, 0.001875),
    ],
)
def test_bisection_of_the_published_range(
    largest: float, order: list[float], feasible: float, code: float
) -> None:
    trial, seen = threshold(largest)
    sigma, trace = bisect(trial, 0.001, 0.015, 4, 5e-4)
    assert seen[:4] == pytest.approx(order) and sigma == pytest.approx(feasible)
    assert [t.sigma for t in trace] == seen
    assert len(seen) == (5 if largest < 0.0018 else 4)  # then low itself is tried
    trial, seen = threshold(largest)
    sigma, trace = bisect(trial, 0.001, 0.015, 4, 5e-4, "code")
    assert seen == pytest.approx(order) and sigma == pytest.approx(code)
    assert [t.sigma for t in trace] == seen


def of_nll(nll: Callable[[float], float]) -> tuple[Callable[[float, float], Trial], list[float]]:
    """Trials that end early where the NLL is above the limit; what they saw is better than the rest."""
    seen: list[float] = []

    def trial(sigma: float, limit: float) -> Trial:
        seen.append(sigma)
        early = nll(sigma) > limit
        found = nll(sigma) - 10 if early else nll(sigma)
        return Trial(sigma, found - 1.0, True, found, 0.5, 0.0, not early)

    return trial, seen


@pytest.mark.parametrize("best", [0.0004, 0.001, 0.003, 0.01, 0.02, 0.05, 0.2, 0.5])
@pytest.mark.parametrize("points", [1, 2, 3, 4, 7, 10])
@pytest.mark.parametrize("far", [2.0, 0.9])
def test_the_least_nll_is_that_of_the_whole_grid(best: float, points: int, far: float) -> None:
    """1 without noise, a dip, and beyond it a plateau with small dips, above or below the 1."""

    def nll(sigma: float) -> float:
        share = min(1.0, max(0.0, math.log(sigma / best) / 1.5))
        dip = math.exp(-(math.log(sigma / best) ** 2))
        return 1 - 0.3 * dip + (far - 1) * share + 0.01 * math.cos(9 * sigma / best) * share

    trial, seen = of_nll(nll)
    sigma, trace = least_nll(trial, 0.001, 0.2, points, 1.0)
    assert [found.sigma for found in trace] == seen and len(seen) <= points
    grid = [0.2 * (0.001 / 0.2) ** (i / max(points - 3, 1)) for i in range(max(points - 2, 1))]
    assert nll(sigma) <= min(map(nll, grid)) + 1e-12
    assert nll(sigma) == min(map(nll, seen))
    assert [found.complete for found in trace if found.sigma == sigma] == [True]
    if points == 10 and 0.02 <= best < 0.5:
        assert min(seen) > 0.001 and len(seen) < 9  # nor do all points below a dip help


def test_a_search_without_a_dip_goes_to_the_least_noise() -> None:
    trial, seen = of_nll(lambda sigma: 1 + sigma)
    assert least_nll(trial, 0.001, 0.2, 10, 1.0)[0] == pytest.approx(0.001)
    assert min(seen) == pytest.approx(0.001) and len(seen) == 9


@pytest.mark.parametrize("tokens", [False, True])
def test_trials_that_end_early_change_nothing(
    tokens: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An overconfident adapter, right but for the last examples: the sigma_q of complete trials."""
    ids = torch.randint(3, 60, (48, 5), generator=torch.Generator().manual_seed(1))
    base = llama(initializer_range=0.2) if tokens else None
    plain = trained() if base is None else fill(adapted(base, LoraConfig), rho=None, scale=1.0)
    plain.eval()
    with torch.no_grad():
        found = logits(plain, ids)
    labels = found.argmax(-1)
    labels[42:] = found[42:].argmin(-1)
    labels = labels.roll(1, 1) if tokens else labels
    held_out = [{"input_ids": ids[i : i + 8], "labels": labels[i : i + 8]} for i in range(0, 48, 8)]
    options = {"validation": held_out, "low": 0.01, "high": 20.0, "n_samples": 2, "max_trials": 7}
    options.update(search="validation", progress=False)
    model = copy.deepcopy(plain)
    early = tfb_(model, held_out, **options)
    ended = [trial for trial in early.trace if not trial.complete]
    assert ended and early.after is not None and early.after.complete
    monkeypatch.setattr(tfb_module, "loss_of", lambda part: 0.0)
    whole = tfb_(copy.deepcopy(plain), held_out, **options)
    assert whole.sigma == early.sigma and all(trial.complete for trial in whole.trace)
    assert [trial.sigma for trial in whole.trace] == [trial.sigma for trial in early.trace]
    same = {trial.sigma: trial for trial in whole.trace}
    for trial in early.trace:
        assert trial == same[trial.sigma] or same[trial.sigma].nll > early.after.nll
    _, _, rows = early.table()
    assert sum("worse" in row for row in rows) == len(ended)
    assert all(len(row) == 6 for row in rows)


@pytest.mark.parametrize("published", [0.005375, 0.00625, 0.0045, 0.00975])
def test_published_results_are_midpoints(published: float) -> None:
    """The deviations of the authors' scripts are what their rule returns in five halvings."""
    trial, seen = threshold(published - 1e-6)
    sigma, _ = bisect(trial, 0.001, 0.015, 5, 5e-4, "code")
    assert sigma == pytest.approx(published, abs=1e-9) and sigma in seen


def test_bisection_stops_early() -> None:
    trial, seen = threshold(0.01)
    bisect(trial, 0.001, 0.015, 50, 5e-4)
    assert len(seen) == 5  # 0.014 / 2^5 < 5e-4 <= 0.014 / 2^4


@pytest.mark.parametrize("kind", ["bert", "llama"])
@pytest.mark.parametrize("metric", ["nll", "accuracy", "flips"])
def test_search_keeps_its_tolerance(kind: str, metric: str) -> None:
    model = trained(kind)
    mean = logits(model)
    tolerance = {"nll": 0.01, "accuracy": 0.3, "flips": 0.3}[metric]
    report = convert(model, kind, metric=metric, tolerance=tolerance, high=2.0, max_trials=6)
    assert report.passes == 1 + len(report.trace) and report.labels == "true"
    assert (report.anchors, report.layers, report.before.change) == (4, 4, 0.0)
    assert report.after is not None and report.after.feasible
    assert report.after.change <= tolerance and report.sigma == report.after.sigma > 0
    assert all(t.feasible == (t.change <= tolerance) for t in report.trace)
    assert "sigma_q=" in str(report) and report.to_dict()["trace"][0]["sigma"] > 0
    torch.testing.assert_close(logits(model), mean, rtol=1e-4, atol=1e-4)
    # The scores of the search are those of the adapter as it is now.
    truth = LABELS
    found = predict(model, {"input_ids": IDS}, n_samples=3, **choices(kind))
    nll = -float(found.log_probs.gather(1, truth[:, None]).mean())
    assert report.after.nll == pytest.approx(nll, rel=1e-4)
    if metric != "nll":
        return
    # Common random numbers: a second search of the same adapter takes the same way.
    again = trained(kind)
    other = convert(again, kind, metric=metric, tolerance=tolerance, high=2.0, max_trials=6)
    assert [t.sigma for t in other.trace] == [t.sigma for t in report.trace]
    for a, b in zip(other.trace, report.trace, strict=True):
        assert (a.change, a.nll) == pytest.approx((b.change, b.nll), rel=1e-3)


def test_pseudo_labels_need_no_labels() -> None:
    unlabelled = [{"input_ids": batch["input_ids"]} for batch in BATCHES]
    reports = []
    for metric in ("accuracy", "flips"):
        model = trained()
        options = {**QUICK, "metric": metric, "high": 3.0, "tolerance": 0.25}
        report = bayesianize(model, "tfb", unlabelled, labels="auto", **options)
        assert report.labels == "pseudo" and report.before.accuracy == 1.0
        reports.append(report)
    assert [t.change for t in reports[0].trace] == [t.change for t in reports[1].trace]
    with pytest.raises(ValueError, match="anchors must have labels for labels='true'"):
        bayesianize(trained(), "tfb", unlabelled, labels="true", **QUICK)
    # The published code divides the change by the number of anchors.
    one = convert(trained(), high=2.0, per_anchor=True)
    two = convert(trained(), high=2.0)
    assert one.trace[0].change == pytest.approx(two.trace[0].change / 4)


def test_labels_are_class_indices() -> None:
    # A causal collator's labels: one for each token, and as many as the longest text has.
    ragged = [
        {**batch, "labels": batch["input_ids"][:, : 3 + i]} for i, batch in enumerate(BATCHES)
    ]
    model = trained()
    for labels in ("auto", "true"):
        with pytest.raises(ValueError, match=r"class indices \(B,\), got shape \(2, 3\) .*pseudo"):
            bayesianize(model, "tfb", ragged, labels=labels, **QUICK)
    soft = [{**batch, "labels": batch["labels"].float()} for batch in BATCHES]
    with pytest.raises(ValueError, match=r"of torch\.float32; pass labels='pseudo'"):
        bayesianize(model, "tfb", soft, **QUICK)
    ignored = [{**batch, "labels": batch["labels"] - 100} for batch in BATCHES]
    with pytest.raises(ValueError, match=r"labels must be in \[0, 3\), got -100 to -98"):
        bayesianize(model, "tfb", ignored, **QUICK)
    assert type(model.peft_config["default"]) is LoraConfig
    report = bayesianize(model, "tfb", ragged, labels="pseudo", **QUICK)
    assert report.labels == "pseudo" and report.before.accuracy == 1.0


def test_grid_interpolates_between_its_points() -> None:
    tolerance = 0.02
    report = convert(trained(), search="grid", low=0.1, high=6.4, max_trials=4, tolerance=tolerance)
    assert [t.sigma for t in report.trace] == pytest.approx([0.1, 0.4, 1.6, 6.4])
    points = [(0.0, 0.0), *((t.sigma, t.change) for t in report.trace)]
    first = next(i for i, (_, change) in enumerate(points) if change > tolerance)
    (x0, y0), (x1, y1) = points[first - 1], points[first]
    assert x0 <= report.sigma < x1 and report.after is None
    assert y0 + (y1 - y0) * (report.sigma - x0) / (x1 - x0) == pytest.approx(tolerance)
    everything = convert(trained(), search="grid", low=1e-4, high=2e-4, tolerance=1.0)
    assert everything.sigma == 2e-4 and everything.at_range_end
    assert "raise high" in str(everything)


def test_nothing_feasible_leaves_no_noise() -> None:
    model = trained()
    with pytest.warns(UserWarning, match="no sigma_q in"):
        report = convert(model, low=50.0, high=100.0, tolerance=1e-9)
    assert report.sigma == 0.0 and report.after is None
    with posterior(model, "sample"):
        draw = logits(model)
    torch.testing.assert_close(draw, logits(model), rtol=1e-6, atol=1e-6)


# --- noise ---------------------------------------------------------------------------------------


def test_noise_is_isotropic_in_the_column_space() -> None:
    """In the basis U the perturbation of B A has deviation sigma_q, in every direction of B."""
    plain = trained()
    old = {name: p.detach().double() for name, p in plain.named_parameters() if "lora_" in name}
    report = convert(plain, low=0.05, high=0.0500001, tolerance=100.0)
    assert report.sigma == pytest.approx(0.05, rel=1e-3)
    deficient = 0
    for item in bayes_layers(plain):
        prefix = f"base_model.model.{item.name}"
        before = old[f"{prefix}.lora_B.default.weight"] @ old[f"{prefix}.lora_A.default.weight"]
        b = item.layer.lora_B["default"].weight.detach().double()
        product = b @ item.mean.detach().double()
        assert (product - before).abs().max() < 1e-6 * before.abs().max()
        torch.testing.assert_close(b.T @ b, torch.eye(4).double(), rtol=0, atol=1e-6)
        u, d, _ = torch.linalg.svd(old[f"{prefix}.lora_B.default.weight"], full_matrices=False)
        draws = torch.stack([item.factors(s, seed=s)[0] for s in range(60)]).double()
        noise = u.T @ (b @ draws - before)  # (60, r, in)
        deviation = noise.std(dim=(0, 2))
        expected = 0.05 * d / (d + 1e-6)
        deficient += int((d < 1e-5).sum())
        torch.testing.assert_close(deviation, expected, rtol=0.08, atol=1e-5)
        assert (d[-1] < 1e-5) == (item.rho[-1] < 0.049)
        assert item.rho.shape == (4, 1) and not item.rho.requires_grad
    assert deficient == 1


def test_a_change_of_exactly_the_tolerance_is_within_it() -> None:
    """Shares of four anchors are exact numbers, so that a change can lie on the bound."""
    options = {"metric": "flips", "low": 1.0, "high": 1.000001, "max_trials": 1, "resolution": 1e-9}
    found = convert(trained(), tolerance=1.0, **options).trace[0]
    assert 0 < found.change < 1 and (4 * found.change).is_integer()
    report = convert(trained(), tolerance=found.change, **options)
    assert report.trace[0].change == found.change and report.trace[0].feasible and report.sigma > 0
    less = convert(trained(), tolerance=math.nextafter(found.change, 0.0), **options)
    assert not less.trace[0].feasible


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_train_and_eval_mode_with_sampling_on_and_off(kind: str, tmp_path: Path) -> None:
    model = trained(kind)
    convert(model, kind, low=0.5, high=0.500001, tolerance=100.0)
    mean = logits(model)
    assert torch.equal(mean, logits(model))
    with posterior(model, "sample", n_samples=3, seed=5):
        folded = logits(model, fold_samples({"input_ids": IDS}, 3)["input_ids"]).unflatten(
            0, (3, 4)
        )
    for s in (0, 2):
        with posterior(model, "sample", seed=5, first_sample=s):
            torch.testing.assert_close(logits(model), folded[s], rtol=1e-4, atol=1e-4)
    assert (folded[0] - mean).abs().max() > 1e-2
    model.train()
    refresh_noise(model, step=0)
    first, second = logits(model), logits(model)
    assert not torch.equal(first, second) and not torch.equal(first, mean)
    with posterior(model, "mean"):
        assert torch.equal(logits(model), mean)
    model.eval()
    model.save_pretrained(tmp_path / "saved")
    for low in (False, True):
        loaded = PeftModel.from_pretrained(BASES[kind](), tmp_path / "saved", low_cpu_mem_usage=low)
        config = loaded.peft_config["default"]
        assert isinstance(config, BayesLoraConfig) and config.method == "tfb"
        assert config.sigma_q == model.peft_config["default"].sigma_q > 0
        assert_same_but_rounding(logits(loaded), mean)
        with posterior(loaded, "sample", seed=5, first_sample=2):
            torch.testing.assert_close(logits(loaded), folded[2], rtol=1e-4, atol=1e-4)
    for which, expected in (("mean", mean), (2, folded[2])):
        folder = export_lora(model, tmp_path / str(which), which, seed=5)
        stock = PeftModel.from_pretrained(BASES[kind](), folder)
        assert type(stock.peft_config["default"]) is LoraConfig
        torch.testing.assert_close(logits(stock), expected, rtol=1e-4, atol=1e-4)
    with pytest.warns(UserWarning, match="posterior mean only"):
        merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), mean, rtol=1e-4, atol=1e-4)


def test_noise_in_chosen_layers_only(tmp_path: Path) -> None:
    model = trained()
    chosen = ["encoder.layer.1.attention.self.value"]
    report = convert(model, layers=chosen, low=0.5, high=0.500001, tolerance=100.0)
    assert report.layers == 1
    moved = [item.name for item in bayes_layers(model) if item.rho.any()]
    assert moved == ["bert.encoder.layer.1.attention.self.value"]
    with posterior(model, "sample", seed=1):
        draw = logits(model)
    assert not torch.equal(draw, logits(model))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(BASES["bert"](), tmp_path)
    assert loaded.peft_config["default"].noise_layers == chosen
    with posterior(loaded, "sample", seed=1):
        assert_same_but_rounding(logits(loaded), draw)
    by_kind = trained()
    assert convert(by_kind, layers=["value"]).layers == 2
    with pytest.raises(ValueError, match=r"layers must name adapted layers, got \['dense'\]"):
        convert(trained(), layers=["dense"])
    typo = trained()
    with pytest.raises(ValueError, match=r"got \['valeu'\], and there are \['query', 'value'\]"):
        convert(typo, layers=["query", "valeu"])
    assert type(typo.peft_config["default"]) is LoraConfig


# --- what can be converted -----------------------------------------------------------------------


@pytest.mark.parametrize("config", [BlobConfig, ScalablConfig])
def test_the_mean_of_a_bayesian_adapter(config: Any, tmp_path: Path) -> None:
    model = trained(config=config)
    mean = logits(model)
    assert kl_divergence(model) > 0
    convert(model, low=0.5, high=0.500001, tolerance=100.0)
    torch.testing.assert_close(logits(model), mean, rtol=1e-4, atol=1e-4)
    names = {name.rpartition(".default")[0].rpartition(".")[2] for name in model.state_dict()}
    assert "lora_A_sigma" in names and not names & {"lora_A_rho", "lora_log_s"}
    assert float(kl_divergence(model)) == 0.0
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(BASES["bert"](), tmp_path)
    torch.testing.assert_close(logits(loaded), mean, rtol=1e-4, atol=1e-4)


def test_a_tfb_adapter_can_be_searched_again() -> None:
    model = trained()
    convert(model, low=0.05, high=0.0500001, tolerance=100.0)
    shares = [item.rho.detach() / 0.05 for item in bayes_layers(model)]
    convert(model, low=0.2, high=0.2000001, tolerance=100.0)
    for item, share in zip(bayes_layers(model), shares, strict=True):
        torch.testing.assert_close(item.rho, 0.2 * share, rtol=1e-3, atol=1e-7)


def test_it_is_not_trained(tmp_path: Path) -> None:
    model = trained()
    convert(model)
    with pytest.raises(ValueError, match="method that is trained, got 'tfb'"):
        BayesTrainer(model=model, args=arguments(tmp_path), train_dataset=[{"input_ids": IDS[0]}])


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("config", [LoraConfig, BlobConfig])
def test_an_error_leaves_the_adapter_as_it_was(config: Any) -> None:
    model = trained(config=config)
    before, mean, types = state(model), logits(model), type(model.base_model)
    with pytest.raises(ValueError, match=r"choices=\[1, 2\]"):
        convert(model, choices=[1, 2])
    after = state(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert type(model.base_model) is types and torch.equal(logits(model), mean)
    assert type(model.peft_config["default"]) is type(config(target_modules=["x"]))
    assert model.peft_type == model.peft_config["default"].peft_type
    assert hasattr(model.get_base_model(), "bayes_noise") == (config is BlobConfig)
    convert(model)
    assert isinstance(model.base_model, BayesLoraModel)


def test_untrained_adapters_and_bad_options() -> None:
    untrained = adapted(BASES["bert"](), LoraConfig).eval()
    with pytest.raises(ValueError, match="must be trained, got B = 0 in all layers"):
        convert(untrained)
    assert type(untrained.peft_config["default"]) is LoraConfig
    broken = copy.deepcopy(trained())
    with torch.no_grad():
        broken.base_model.model.bert.encoder.layer[0].attention.self.query.lora_A["default"].weight[
            0, 0
        ] = float("nan")
    with pytest.raises(ValueError, match="must be finite"):
        convert(broken)
    two = trained()
    two.add_adapter("other", LoraConfig(target_modules=["query"]))
    with pytest.raises(ValueError, match=r"must have one adapter, got \['default', 'other'\]"):
        convert(two)
    with pytest.raises(ValueError, match="must be a PeftModel, got BertForSequence"):
        convert(BASES["bert"]())
    dora = get_peft_model(BASES["bert"](), LoraConfig(target_modules=["query"], use_dora=True))
    with pytest.raises(ValueError, match="use_dora"):
        convert(dora)
    merged = trained()
    merged.merge_adapter()
    with pytest.raises(ValueError, match="must not be merged"):
        convert(merged)
    for options, message in (
        ({"metric": "brier"}, "metric must be one of"),
        ({"rule": "best"}, "rule must be one of"),
        ({"low": 0.0}, "range must be 0 < low < high"),
        ({"tolerance": -1.0}, "tolerance must not be negative"),
        ({"n_samples": 0}, "n_samples must be at least 1"),
        ({"high": "wide"}, "high must be a number, got 'wide'"),
        ({"max_trials": 2.5}, "max_trials must be an integer, got 2.5"),
        ({"layers": "value"}, "layers must be a list of names, got 'value'"),
        ({"layers": []}, r"layers must name adapted layers, got \[\]"),
    ):
        with pytest.raises(ValueError, match=message):
            convert(trained(), **options)
    with pytest.raises(ValueError, match="at least one example"):
        bayesianize(trained(), "tfb", [])
    with pytest.raises(ValueError, match="data must be the anchor examples"):
        bayesianize(trained(), "tfb")
    with pytest.raises(ValueError, match="method must be one of"):
        bayesianize(trained(), "swag", BATCHES)


@pytest.mark.parametrize("data", [[1, 2], "texts", [(IDS, LABELS)]])
@pytest.mark.parametrize("method", ["tfb", "laplace", "laplace-last"])
def test_batches_of_conversions_are_mappings(method: str, data: Any) -> None:
    with pytest.raises(
        ValueError, match="batch must be a mapping with tensors of model inputs, got"
    ):
        bayesianize(trained(), method, data)


def test_anchors_may_be_a_data_set() -> None:
    data = [{"input_ids": ids, "labels": int(y)} for ids, y in zip(IDS, LABELS, strict=True)]
    one = convert(trained(), high=2.0)
    options = {**QUICK, "high": 2.0, "batch_size": 3}
    two = bayesianize(trained(), "tfb", data, **options)
    assert two.anchors == 4 and two.metric == "nll"
    assert [t.nll for t in two.trace] == pytest.approx([t.nll for t in one.trace], rel=1e-4)


@pytest.mark.parametrize("metric", ["nll", "accuracy", "flips"])
def test_labels_of_tokens(metric: str) -> None:
    """A language model: the search over its labelled tokens, against scores by hand."""
    ids = torch.randint(3, 64, (6, 7), generator=torch.Generator().manual_seed(3))
    labels = ids.clone()
    labels[:, :3] = -100
    data = [
        {"input_ids": ids[:4], "labels": labels[:4]},
        {"input_ids": ids[4:], "labels": labels[4:]},
    ]
    base = llama(initializer_range=0.2)
    model = fill(adapted(base, LoraConfig), rho=None, scale=1.0).eval()
    options = {"metric": metric, "tolerance": 0.1, "n_samples": 4, "seed": 3, "high": 2.0}
    report = bayesianize(model, "tfb", data, progress=False, **options)
    assert report.anchors == 6 * 4 and report.labels == "true" and 0 < report.sigma < 2.0

    @torch.no_grad()
    def probs(draw: int | None) -> torch.Tensor:
        mode = {"mode": "mean"} if draw is None else {"seed": 3, "first_sample": draw}
        with posterior(model, **mode):
            logits = model(input_ids=ids).logits[:, 2:-1]
        return logits.double().softmax(-1).flatten(0, 1)

    truth = labels[:, 3:].flatten()
    mean, drawn = probs(None), torch.stack([probs(draw) for draw in range(4)]).mean(0)
    found = []
    for one in (mean, drawn):
        nll = -one.gather(1, truth[:, None]).log().mean()
        found.append((float(nll), float((one.argmax(-1) == truth).double().mean())))
    flips = float((mean.argmax(-1) != drawn.argmax(-1)).double().mean())
    assert (report.before.nll, report.before.accuracy) == pytest.approx(found[0], abs=1e-5)
    assert report.after is not None
    assert (report.after.nll, report.after.accuracy) == pytest.approx(found[1], abs=1e-5)
    assert report.after.flips == pytest.approx(flips)
    for wrong in ({"labels": "pseudo"}, {"scope": "token"}):
        with pytest.raises(ValueError, match="labels of tokens must be true ones, with scope"):
            bayesianize(model, "tfb", data, progress=False, **wrong)
    with pytest.raises(ValueError, match="labels of tokens that count, got none"):
        nothing = [{"input_ids": ids, "labels": torch.full_like(ids, -100)}]
        bayesianize(model, "tfb", nothing, progress=False)
