"""The scale of a posterior: what a factor does to draws, and which one held-out examples choose."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from peft import LoraConfig
from tiny_models import BASES, IDS, LABELS, adapted, fill, trained
from torch import Tensor, nn

from bayes_kernels import metrics
from bayes_kernels.hf import (
    BlobConfig,
    PolarConfig,
    PolarVbllConfig,
    ScalablConfig,
    bayesianize,
    predict,
)
from bayes_kernels.hf.last_layer import need_head
from bayes_kernels.hf.layers import bayes_layers
from bayes_kernels.hf.logits import Prediction
from bayes_kernels.hf.scale import (
    DrawsReport,
    ScaleReport,
    can_rescale,
    compare_draws,
    fit_scale_,
    report_draws,
    rescale_,
)

MAKERS: dict[str, Any] = {
    "square": lambda: fill(adapted(BASES["bert"](), BlobConfig)),
    "softplus": lambda: fill(adapted(BASES["bert"](), BlobConfig, std="softplus")),
    "direct": lambda: fill(adapted(BASES["bert"](), BlobConfig, std="direct")),
    "diagonal": lambda: fill(adapted(BASES["bert"](), ScalablConfig)),
    "full": lambda: fill(adapted(BASES["bert"](), ScalablConfig, covariance="full"), None),
}
HEADS = ("diagonal", "dense", "low_rank")


def head_model(covariance: str) -> nn.Module:
    model = fill(adapted(BASES["bert"](), PolarVbllConfig, head_covariance=covariance))
    head = need_head(model, "test")
    with torch.no_grad():
        for name in ("log_scale", "factor", "scale_tril"):
            if getattr(head, name) is not None:
                getattr(head, name).normal_(-1, 0.3, generator=torch.Generator().manual_seed(1))
    return model


def examples(model: nn.Module) -> list[dict[str, Tensor]]:
    """Forty examples whose labels the mean predicts."""
    ids = torch.randint(1, int(IDS.max()), (40, 6), generator=torch.Generator().manual_seed(4))
    found = predict(model.eval(), {"input_ids": ids}, n_samples=0)
    return [{"input_ids": ids, "labels": found.classes}]


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def unlike(before: dict[str, Tensor], model: nn.Module) -> list[str]:
    return [n for n, value in model.state_dict().items() if not torch.equal(before[n], value)]


@pytest.mark.parametrize("name", MAKERS)
def test_draws_deviate_by_the_factor(name: str) -> None:
    model = MAKERS[name]()
    before = state(model)

    def deviation() -> list[Tensor]:
        items = bayes_layers(model)
        return [(i.factors(draw=3)[0] - i.factors()[0]).detach() for i in items]

    first = deviation()
    rescale_(model, 0.3)
    for old, new in zip(first, deviation(), strict=True):
        assert old.abs().max() > 1e-3
        torch.testing.assert_close(new, 0.3 * old, rtol=1e-4, atol=1e-6)
    assert all("lora_A." not in n and "lora_B." not in n for n in unlike(before, model))
    with pytest.raises(ValueError, match="factor must be a positive number, got 0"):
        rescale_(model, 0)


@pytest.mark.parametrize("covariance", HEADS)
def test_covariances_of_a_last_layer_are_multiplied_by_the_square(covariance: str) -> None:
    model = head_model(covariance)
    head = need_head(model, "test")
    first, mean = head.covariance_matrix(), head.weight_mean.detach().clone()
    rescale_(model, 3.0)
    torch.testing.assert_close(head.covariance_matrix(), 9 * first, rtol=1e-5, atol=1e-6)
    assert torch.equal(head.weight_mean, mean)


def test_sigma_q_of_tfb_is_what_the_adapter_has() -> None:
    model = trained()
    sigma = bayesianize(model, "tfb", examples(model), tolerance=0.2, progress=False).sigma
    item = bayes_layers(model)[0]
    first = item.tensor("lora_A_sigma").clone()
    rescale_(model, 0.5)
    assert item.variant.config.sigma_q == sigma / 2
    assert torch.equal(item.tensor("lora_A_sigma"), first / 2)


@pytest.mark.parametrize("make", [*MAKERS.values(), lambda: head_model("dense")])
def test_harmful_draws_are_found_and_mended(make: Any) -> None:
    model = make().eval()
    batches = examples(model)
    rescale_(model, 16.0)
    before = state(model)
    found = fit_scale_(model, batches, n_samples=8, only_if_harmful=True, progress=False)
    assert found.before.harmful and found.factor < 0.5
    after = compare_draws(model, batches, n_samples=8, progress=False)
    assert after.nll == pytest.approx(found.nll, abs=1e-6)
    assert after.nll < found.before.nll and after.nll < after.mean_nll + 0.1
    assert min(nll for _, nll in found.trials) == found.nll
    assert "raise the NLL of 40 examples" in str(found) and unlike(before, model)


def test_harmless_draws_stay_as_they_are() -> None:
    model = MAKERS["square"]().eval()
    rescale_(model, 0.01)
    before = state(model)
    found = fit_scale_(model, examples(model), n_samples=4, only_if_harmful=True, progress=False)
    assert found.factor == 1 and not found.before.harmful and not unlike(before, model)
    assert "left as they are" in str(found)


def test_differences_that_nobody_sees_are_no_harm() -> None:
    """Draws of a posterior that changes nothing lie closely on one side of its mean."""
    labels = torch.zeros(20, dtype=torch.int64)
    mean = torch.tensor([0.6, 0.4]).log().expand(20, 2)
    for p, harmful in ((0.5999, False), (0.59, True), (0.61, False)):
        report = report_draws(mean, torch.tensor([p, 1 - p]).log().expand(20, 2), labels, 4)
        assert (report.low > 0) == (p < 0.6) and report.harmful == harmful


def test_wider_where_that_is_better() -> None:
    """Labels that contradict the mean: any width helps."""
    model = MAKERS["square"]().eval()
    rescale_(model, 0.5)
    batches = examples(model)
    batches[0]["labels"] = (batches[0]["labels"] + 1) % 3
    assert fit_scale_(model, batches, n_samples=8, progress=False).factor > 2


@pytest.mark.parametrize(
    ("odd", "examples", "taken"), [(0.3, 40, False), (0.8, 40, True), (0.8, 1, False)]
)
def test_what_one_half_chooses_must_hold_on_the_other(
    odd: float, examples: int, taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Narrower draws help every second example, and lower the NLL of all, but harm or help the others."""
    model = MAKERS["square"]().eval()
    rho = bayes_layers(model)[0].tensor("lora_A_rho")
    first = float(rho.detach()[0, 0])
    labels = torch.zeros(examples, dtype=torch.int64)

    def said(model: nn.Module, batches: Any, *, n_samples: int, **options: Any) -> Prediction:
        probs = torch.full((examples,), 0.5, dtype=torch.float64)
        if n_samples and float(rho.detach()[0, 0]) < 0.99 * first:
            probs[::2], probs[1::2] = 0.9, odd
        log_probs = torch.stack([probs, 1 - probs], 1).log()
        entropy = metrics.predictive_entropy(log_probs)
        return Prediction(log_probs, entropy, entropy, n_samples, labels)

    monkeypatch.setattr("bayes_kernels.hf.scale.predict_dataset", said)
    found = fit_scale_(model, [{"input_ids": IDS, "labels": LABELS}], n_samples=8, progress=False)
    assert min(nll for _, nll in found.trials) < found.before.nll - 0.03
    assert (found.factor < 1) == taken
    assert (float(rho.detach()[0, 0]) < first) == taken


def test_a_factor_that_chance_explains_is_not_taken() -> None:
    """Of nine examples four are wrong: wider draws lower the NLL here, and nobody knows for others."""
    model = MAKERS["square"]().eval()
    rescale_(model, 0.1)
    batches = [{name: value[:9].clone() for name, value in examples(model)[0].items()}]
    batches[0]["labels"][:4] = (batches[0]["labels"][:4] + 1) % 3
    before = state(model)
    found = fit_scale_(model, batches, n_samples=8, progress=False)
    assert min(nll for _, nll in found.trials) < found.nll == found.before.nll
    assert found.factor == 1 and not unlike(before, model)


def test_what_stops_the_search_leaves_the_posterior(monkeypatch: pytest.MonkeyPatch) -> None:
    model = MAKERS["full"]().eval()
    batches = examples(model)
    rescale_(model, 16.0)
    before = state(model)
    calls = iter(range(100))

    def stopped(*args: Any, **options: Any) -> Any:
        if next(calls) == 4:
            raise KeyboardInterrupt
        return predict(args[0], args[1][0], n_samples=options["n_samples"])

    monkeypatch.setattr("bayes_kernels.hf.scale.predict_dataset", stopped)
    with pytest.raises(KeyboardInterrupt):
        fit_scale_(model, batches, progress=False)
    assert not unlike(before, model)


def test_adapters_without_deviations_are_refused() -> None:
    for config in (LoraConfig, PolarConfig):
        model = adapted(BASES["bert"](), config)
        assert not can_rescale(model)
        with pytest.raises(ValueError, match="rescale_: the adapter must have deviations"):
            rescale_(model, 2.0)
    model = MAKERS["square"]().eval()
    with pytest.raises(ValueError, match="examples must have class labels, got none"):
        compare_draws(model, [{"input_ids": IDS}], progress=False)


@pytest.mark.parametrize("compare", [compare_draws, fit_scale_])
@pytest.mark.parametrize("count", [0, True, 1.5])
def test_draws_are_compared_with_the_mean(compare: Any, count: Any) -> None:
    batch = {"input_ids": IDS, "labels": LABELS}
    with pytest.raises(ValueError, match="compare_draws: n_samples must be an integer of at least"):
        compare(MAKERS["square"]().eval(), [batch], n_samples=count, progress=False)


def test_empty_batches_are_left_out() -> None:
    model = MAKERS["square"]().eval()
    (batch,) = examples(model)
    empty = {name: value[:0] for name, value in batch.items()}
    options: dict[str, Any] = {"n_samples": 4, "progress": False}
    expected = compare_draws(model, [batch], **options)
    assert compare_draws(model, [empty, batch, empty], **options) == expected
    found = fit_scale_(model, [empty, batch], only_if_harmful=True, **options)
    assert found.before == expected


def test_reports_say_when_draws_change_nothing() -> None:
    same = DrawsReport(13, 10, 1.0972, 1.0971, -2e-4, 1e-4)
    assert str(same) == "10 draws leave the NLL of 13 examples at 1.097, that of the posterior mean"
    worse = dataclasses.replace(same, nll=1.2, low=0.05, high=0.2)
    assert "10 draws raise the NLL of 13 examples from 1.097" in str(worse)
    few, all_but = (str(ScaleReport(factor, worse, 1.0, ())) for factor in (0.5, 1e-3))
    assert few.endswith("deviations times 0.5: NLL 1.000")
    assert all_but.endswith("deviations times 0.001: NLL 1.000, and draws all but the mean")
