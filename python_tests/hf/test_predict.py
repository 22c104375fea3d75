"""Predictive distributions: folding, chunks, batches, causal and classification heads."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from programs import joined, together
from tiny_models import adapted, fill
from torch import Tensor, nn
from torch.utils.data import DataLoader

from bayes_kernels import metrics, random
from bayes_kernels.hf import (
    Prediction,
    Sampling,
    posterior,
    predict,
    predict_batches,
    predict_dataset,
    predict_several,
)
from bayes_kernels.hf.layers import bayes_layers, noise_state
from bayes_kernels.hf.noise import KINDS, using

IDS = torch.randint(3, 128, (5, 7), generator=torch.Generator().manual_seed(1))
CHOICES = [10, 20, 30]
CPU = torch.device("cpu")


def llama() -> Any:
    return fill(adapted(tiny_models.llama(initializer_range=0.2, vocab_size=128)), 0.6, 0.5)


def bert(dropout: float = 0.0) -> Any:
    rates = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    base = tiny_models.bert(num_labels=4, initializer_range=0.3, vocab_size=128, **rates)
    return fill(adapted(base), 0.6, 0.5)


def test_matches_one_pass_for_each_draw() -> None:
    model = bert().eval()
    each = []
    for s in range(6):
        with torch.no_grad(), posterior(model, "sample", seed=4, first_sample=s):
            each.append(model(input_ids=IDS).logits.double().softmax(-1))
    probs = torch.stack(each)
    mean = probs.mean(0)
    result = predict(model, {"input_ids": IDS}, n_samples=6, seed=4, return_samples=True)
    torch.testing.assert_close(result.probs, mean, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(result.sample_log_probs.exp(), probs, rtol=1e-4, atol=1e-6)
    entropy = torch.distributions.Categorical(mean).entropy()
    expected = torch.distributions.Categorical(probs).entropy().mean(0)
    torch.testing.assert_close(result.entropy, entropy, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(result.expected_entropy, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(result.mutual_information, entropy - expected, rtol=1e-3, atol=1e-5)
    assert result.mutual_information.min() > 1e-3
    assert result.log_probs.dtype == torch.float64 and result.n_samples == 6 and len(result) == 5
    torch.testing.assert_close(result.probs.sum(-1), torch.ones(5).double())
    assert torch.equal(result.classes, mean.argmax(-1))


SEVERAL = [
    Sampling(6),
    Sampling(0),
    Sampling(3, "independent"),
    Sampling(2),
    Sampling(3, scope="token"),
    Sampling(6),
]


def layer_rows(layer: nn.Module, run: Any) -> list[int]:
    """Rows of each call of a layer in `run`."""
    seen: list[int] = []
    hook = layer.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    run()
    hook.remove()
    return seen


@pytest.mark.parametrize("upper", [False, True], ids=["all layers", "upper layer"])
def test_several_predictions_share_what_they_can(upper: bool) -> None:
    base = tiny_models.bert(num_labels=4, initializer_range=0.3, vocab_size=128)
    model = fill(adapted(base, **({"layers_to_transform": [1]} if upper else {})), 0.6, 0.5)
    batch = {"input_ids": IDS, "labels": torch.arange(5) % 4}
    options: dict[str, Any] = {"seed": 4, "samples_per_pass": 1}
    expected = [predict(model, batch, **one._asdict(), **options) for one in SEVERAL]
    found = predict_several(model, batch, SEVERAL, **options)
    for one, two in zip(expected, found, strict=True):
        assert one.n_samples == two.n_samples and torch.equal(one.labels, two.labels)
        for name in ("log_probs", "entropy", "expected_entropy"):  # the same bits
            assert torch.equal(getattr(one, name), getattr(two, name))
        assert (one.entropy_bias is None) == (two.entropy_bias is None)
    assert [one.shared_layers for one in found] == [int(upper)] * len(SEVERAL)
    lower, top = model.base_model.model.bert.encoder.layer

    def run(**more: Any) -> Any:
        return lambda: predict_several(model, batch, SEVERAL, seed=4, **more)

    passes = 1 + 6 + 3 + 3
    assert layer_rows(top.intermediate.dense, run(samples_per_pass=1)) == [5] * passes
    assert layer_rows(lower.intermediate.dense, run()) == ([5] if upper else [10, 20, 5, 15, 15])
    assert sum(layer_rows(top.intermediate.dense, run())) == 5 * passes
    # Each with passes of its own size: up to rounding.
    for one, two in zip(expected, predict_several(model, batch, SEVERAL, seed=4), strict=True):
        torch.testing.assert_close(one.log_probs, two.log_probs, rtol=1e-4, atol=1e-6)
    # A batch that does not fit comes in parts, with those of the token scope whole.
    parts = predict_several(model, batch, SEVERAL, seed=4, memory_budget=1)
    for one, two in zip(expected, parts, strict=True):
        torch.testing.assert_close(one.log_probs, two.log_probs, rtol=1e-4, atol=1e-6)


def test_several_predictions_of_a_causal_model() -> None:
    model = llama()
    options: dict[str, Any] = {"choices": CHOICES, "samples_per_pass": 1, "return_samples": True}
    found = predict_several(model, {"input_ids": IDS}, [Sampling(2), Sampling(3)], **options)
    for count, one in zip((2, 3), found, strict=True):
        same = predict(model, {"input_ids": IDS}, n_samples=count, **options)
        assert torch.equal(one.sample_log_probs, same.sample_log_probs)
        assert torch.equal(one.log_probs, same.log_probs)


@pytest.mark.parametrize(
    ("samplings", "message"),
    [
        ([], "predict_several: samplings must be at least one, got none"),
        ([Sampling(-1)], "predict_several: n_samples must be an integer of at least 0, got -1"),
        ([Sampling(2), Sampling(2, "odd")], "predict_several: draws must be one of .* got 'odd'"),
        ([Sampling(2, scope="all")], "predict_several: scope must be one of .* got 'all'"),
    ],
)
def test_samplings_are_checked(samplings: list[Sampling], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        predict_several(bert(), {"input_ids": IDS}, samplings)


@pytest.mark.parametrize("per_pass", [1, 3, 4, 50])
def test_chunks_of_draws_change_nothing(per_pass: int) -> None:
    model = bert()
    whole = predict(model, {"input_ids": IDS}, n_samples=10, samples_per_pass=10)
    parts = predict(model, {"input_ids": IDS}, n_samples=10, samples_per_pass=per_pass)
    torch.testing.assert_close(parts.log_probs, whole.log_probs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(parts.expected_entropy, whole.expected_entropy, rtol=1e-5, atol=1e-6)


def test_batches_change_nothing() -> None:
    model = bert()
    whole = predict(model, {"input_ids": IDS, "labels": torch.arange(5)}, n_samples=4, seed=1)
    examples = [{"input_ids": IDS[i], "labels": torch.tensor(i)} for i in range(5)]
    batches = [
        {"input_ids": IDS[:2], "labels": torch.arange(2)},
        {"input_ids": IDS[2:], "labels": torch.arange(2, 5)},
    ]
    given = [examples, batches, DataLoader(examples, batch_size=3), iter(batches), examples]
    for data, workers in zip(given, (0, 0, 0, 0, 1), strict=True):
        split = predict_dataset(
            model, data, batch_size=2, num_workers=workers, n_samples=4, seed=1, progress=False
        )
        torch.testing.assert_close(split.log_probs, whole.log_probs, rtol=1e-5, atol=1e-6)
        assert torch.equal(split.labels, torch.arange(5)) and torch.equal(
            whole.labels, split.labels
        )
    other = predict(model, {"input_ids": IDS}, n_samples=4, seed=2)
    assert (other.log_probs - whole.log_probs).abs().max() > 1e-3


def test_a_bar_knows_how_many_batches_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where they have a number: without one a bar has no time left."""
    lengths = []

    def bar(enabled: bool, items: Any, **_: Any) -> Any:
        lengths.append(len(items))
        return items

    monkeypatch.setattr(importlib.import_module("bayes_kernels.hf.predict"), "progress_bar", bar)
    examples = [{"input_ids": row} for row in IDS]
    predict_dataset(bert(), examples, batch_size=2, n_samples=2)
    predict_dataset(bert(), [{"input_ids": IDS}], n_samples=2)
    assert lengths == [3, 1]


def test_batches_are_read_as_predictions_are_asked_for() -> None:
    model, read = bert(), []

    def endless() -> Iterator[dict[str, Tensor]]:
        for i in itertools.count():
            read.append(i)
            yield {"input_ids": IDS.roll(i, 0)[:2]}

    stream = predict_batches(model, endless(), n_samples=4, seed=1)
    assert read == []
    for i in range(3):
        part = next(stream)
        assert read == [*range(i + 1)]
        whole = predict(model, {"input_ids": IDS.roll(i, 0)[:2]}, n_samples=4, seed=1)
        assert torch.equal(part.log_probs, whole.log_probs)


def _share(folder: Path, rank: int) -> None:
    """What two processes predict together; the second has fewer batches."""
    model = bert()
    batches = [
        {"input_ids": IDS[i : i + 2], "labels": torch.arange(i, min(i + 2, 5))} for i in (0, 2, 4)
    ]
    passes: list[int] = []
    model.register_forward_pre_hook(
        lambda *args: passes.append(len(args[2]["input_ids"])), with_kwargs=True
    )
    options: Any = {"n_samples": 4, "seed": 1, "progress": False, "distributed": True}
    found = predict_dataset(model, batches, **options)
    assert sum(passes) == (12, 8)[rank], passes
    alone = predict_dataset(model, batches[:1], **options)  # one process has none
    torch.save([found.log_probs, found.labels, alone.log_probs], folder / f"{rank}.pt")
    # Every field, of draws that differ in number, and of one set of weights.
    for more in ({"stop": 0.4, "n_samples": 20}, {"return_samples": True}, {"n_samples": 0}):
        kinds = {**options, **more}
        shared = predict_dataset(model, batches, **kinds)
        single = predict_dataset(model, batches, **{**kinds, "distributed": False})
        for field in dataclasses.fields(single):
            one, two = getattr(shared, field.name), getattr(single, field.name)
            if isinstance(two, Tensor):
                assert one.dtype == two.dtype and torch.equal(one, two), field.name
            else:
                assert type(one) is type(two) and one == two, field.name
    with pytest.raises(ValueError if rank else RuntimeError) as caught:
        predict_dataset(model, batches, **{**options, "n_samples": -1 if rank else 4})
    assert "n_samples must" in str(caught.value), caught.value
    with pytest.raises(ValueError, match="at least one example, got none"):
        predict_dataset(model, [], **options)


def test_two_processes_predict_what_one_does(tmp_path: Path) -> None:
    together("hf.test_predict", tmp_path)
    expected = predict(bert(), {"input_ids": IDS}, n_samples=4, seed=1).log_probs
    for rank in range(2):
        log_probs, labels, alone = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        torch.testing.assert_close(log_probs, expected, rtol=1e-5, atol=1e-6)
        assert torch.equal(labels, torch.arange(5))
        torch.testing.assert_close(alone, expected[:2], rtol=1e-5, atol=1e-6)


def test_processes_need_a_group() -> None:
    with pytest.raises(ValueError, match="False without a process group; start with torchrun"):
        predict_dataset(bert(), [{"input_ids": IDS}], distributed=True)


def test_layers_behind_a_router_get_one_draw_in_each_pass() -> None:
    model = bert()
    passes: list[int] = []
    model.register_forward_pre_hook(
        lambda *args: passes.append(len(args[2]["input_ids"])), with_kwargs=True
    )
    whole = predict(model, {"input_ids": IDS}, n_samples=3, samples_per_pass=1)
    for item in bayes_layers(model):
        item.variant.routed = True
    routed = predict(model, {"input_ids": IDS}, n_samples=3)
    assert passes == [len(IDS)] * 6 and torch.equal(routed.log_probs, whole.log_probs)
    with pytest.raises(
        ValueError, match="sees routed or shared rows, so that 3 draws cannot be folded"
    ):
        predict(model, {"input_ids": IDS}, n_samples=3, samples_per_pass=3)


def test_zero_samples_is_the_mean() -> None:
    model = bert().eval()
    with torch.no_grad():
        logits = model(input_ids=IDS).logits
    result = predict(model, {"input_ids": IDS}, n_samples=0)
    torch.testing.assert_close(result.log_probs, logits.double().log_softmax(-1))
    assert result.mutual_information.max() == 0 and result.n_samples == 0


def test_more_draws_converge() -> None:
    """The error of S draws falls like 1 / sqrt(S): a quarter of it with 16 times as many."""
    model = bert()
    truth = torch.stack(
        [predict(model, {"input_ids": IDS}, n_samples=64, seed=s).probs for s in range(100, 112)]
    ).mean(0)

    def error(n_samples: int) -> float:
        runs = [predict(model, {"input_ids": IDS}, n_samples=n_samples, seed=s) for s in range(12)]
        return float(torch.stack([(r.probs - truth).square().mean() for r in runs]).mean().sqrt())

    few, many = error(2), error(32)
    assert 0.1 < many / few < 0.5


def test_causal_model_takes_the_last_real_token() -> None:
    model = llama().eval()
    with torch.no_grad():
        reference = [
            model(input_ids=IDS[i : i + 1, : 3 + i]).logits[0, -1, CHOICES] for i in range(5)
        ]
    expected = torch.stack(reference).double().log_softmax(-1)
    right = IDS.clone()
    mask = torch.ones_like(IDS)
    for i in range(5):
        right[i, 3 + i :], mask[i, 3 + i :] = 0, 0
    batch = {"input_ids": right, "attention_mask": mask}
    result = predict(model, batch, n_samples=0, choices=CHOICES)
    torch.testing.assert_close(result.log_probs, expected, rtol=1e-4, atol=1e-5)
    left, positions = torch.zeros_like(IDS), torch.zeros_like(IDS)
    left_mask = torch.zeros_like(IDS)
    for i in range(5):
        length = min(3 + i, 7)
        left[i, 7 - length :], left_mask[i, 7 - length :] = IDS[i, :length], 1
        positions[i, 7 - length :] = torch.arange(length)
    batch = {"input_ids": left, "attention_mask": left_mask, "position_ids": positions}
    result = predict(model, batch, n_samples=0, choices=CHOICES)
    torch.testing.assert_close(result.log_probs, expected, rtol=1e-4, atol=1e-5)
    sampled = predict(model, batch, n_samples=3, choices=CHOICES)
    chunked = predict(model, batch, n_samples=3, choices=CHOICES, samples_per_pass=2)
    torch.testing.assert_close(sampled.log_probs, chunked.log_probs, rtol=1e-4, atol=1e-5)
    assert (sampled.log_probs - result.log_probs).abs().max() > 1e-3


def test_only_the_last_logits_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    shapes: list[tuple[int, ...]] = []
    head = model.get_base_model().lm_head
    head.register_forward_hook(lambda _m, _i, out: shapes.append(tuple(out.shape)))
    predict(model, {"input_ids": IDS}, n_samples=4, choices=CHOICES, samples_per_pass=4)
    assert shapes == [(20, 1, 128)]


def test_budget_counts_only_the_logits_that_are_computed() -> None:
    model = llama()
    sizes: list[int] = []
    model.get_base_model().lm_head.out_features = 100_000  # for the estimate alone
    model.config.vocab_size = 100_000
    model.get_base_model().lm_head.register_forward_hook(
        lambda _m, _i, out: sizes.append(out.shape[0])
    )
    batch = {"input_ids": IDS}
    # 35 tokens: their logits would take 28 MB a draw, all else 0.2 MB.
    predict(model, batch, n_samples=4, choices=CHOICES, memory_budget=5_000_000)
    assert sizes == [20]
    sizes.clear()
    mask = torch.ones_like(IDS)
    mask[0, -1] = 0  # the last tokens lie apart: all logits are computed
    batch["attention_mask"] = mask
    predict(model, batch, n_samples=4, choices=CHOICES, memory_budget=5_000_000)
    # One draw of the batch does not fit either. Of the texts alone, four end at their last token.
    assert sizes == [1] * 4 + [4] * 4


def test_modes_come_back() -> None:
    model = bert(dropout=0.5)
    model.train()
    model.get_base_model().bert.embeddings.eval()
    before = {name: module.training for name, module in model.named_modules()}
    one = predict(model, {"input_ids": IDS}, n_samples=2)
    two = predict(model, {"input_ids": IDS}, n_samples=2)
    assert torch.equal(one.log_probs, two.log_probs)
    assert {name: module.training for name, module in model.named_modules()} == before
    assert noise_state(model).mode is None

    class Broken(RuntimeError):
        pass

    def fail(*_: Any) -> None:
        raise Broken

    handle = model.get_base_model().classifier.register_forward_hook(fail)
    with pytest.raises(Broken):
        predict(model, {"input_ids": IDS}, n_samples=2)
    handle.remove()
    assert {name: module.training for name, module in model.named_modules()} == before
    assert noise_state(model).mode is None


def test_prediction_then_training() -> None:
    model = bert()
    model.train()
    with torch.inference_mode():
        result = predict(model, {"input_ids": IDS}, n_samples=2)
    assert not result.log_probs.requires_grad
    model(input_ids=IDS, labels=torch.zeros(5, dtype=torch.long)).loss.backward()


def test_extreme_logits() -> None:
    class Steep(nn.Module):
        def forward(self, logits: Tensor) -> Tensor:
            return logits * 1e4

    model = bert()
    model.get_base_model().classifier = nn.Sequential(model.get_base_model().classifier, Steep())
    result = predict(model, {"input_ids": IDS}, n_samples=3)
    assert torch.isfinite(result.log_probs).all() and torch.isfinite(result.entropy).all()
    assert result.expected_entropy.max() < 0.1


def test_concatenate() -> None:
    half = math.log(0.5) * torch.ones(2, 2).double()
    part = Prediction(half, torch.zeros(2), torch.zeros(2), 3, labels=torch.tensor([0, 1]))
    joined = Prediction.concatenate([part, part])
    assert len(joined) == 4 and joined.n_samples == 3 and joined.labels.tolist() == [0, 1, 0, 1]
    other = Prediction(half, torch.zeros(2), torch.zeros(2), 4)
    with pytest.raises(ValueError, match="one number of classes and draws"):
        Prediction.concatenate([part, other])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_samples": -1}, "n_samples must be an integer of at least 0, got -1"),
        ({"n_samples": 2.5}, "n_samples must be an integer of at least 0, got 2.5"),
        ({"n_samples": None}, "n_samples must be an integer of at least 0, got None"),
        ({"n_samples": True}, "n_samples must be an integer of at least 0, got True"),
        ({"samples_per_pass": 0}, "samples_per_pass must be an integer of at least 1, got 0"),
        ({"samples_per_pass": True}, "samples_per_pass must be an integer of at least 1"),
        ({"samples_per_pass": "2"}, "samples_per_pass must be an integer of at least 1, got '2'"),
        ({"choices": [1]}, "at least two token ids"),
        ({"choices": [1, 2, 1]}, "at least two token ids, all different"),
        ({"choices": ["A", "B"]}, r"choices must be token ids, got \['A', 'B'\]"),
        ({"choices": [1, 2.5]}, r"choices must be token ids, got \[1, 2.5\]"),
        ({"choices": [1, 500]}, "token ids below 128"),
        ({}, "logits must be"),
    ],
)
def test_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        predict(llama(), {"input_ids": IDS}, **{"n_samples": 1, **options})


def test_more_errors() -> None:
    with pytest.raises(ValueError, match="must have a Bayesian adapter"):
        predict(nn.Linear(2, 2), {"input_ids": IDS})
    with pytest.raises(ValueError, match="batch must be a mapping with tensors"):
        predict(bert(), {"labels": torch.ones(2)})
    with pytest.raises(ValueError, match="at least one example"):
        predict_dataset(bert(), [], progress=False)


# --- laws of draws -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_predictions_use_the_draws_that_were_asked_for(kind: str) -> None:
    model = bert()
    found = predict(model, {"input_ids": IDS}, n_samples=5, draws=kind, return_samples=True)
    parts = predict(
        model, {"input_ids": IDS}, n_samples=5, draws=kind, return_samples=True, samples_per_pass=3
    )
    torch.testing.assert_close(parts.sample_log_probs, found.sample_log_probs, rtol=1e-4, atol=1e-5)
    for s in range(5):
        with torch.no_grad(), posterior(model, first_sample=s, kind=kind):
            alone = model(input_ids=IDS).logits.double().log_softmax(-1)
        torch.testing.assert_close(found.sample_log_probs[s], alone, rtol=1e-4, atol=1e-5)
    default = predict(model, {"input_ids": IDS}, n_samples=5)
    assert torch.allclose(default.probs, found.probs, atol=1e-5) == (kind == "antithetic")


def test_token_scope_is_the_noise_of_training() -> None:
    """Draw s is a training pass of BLoB under the key fold_in(key(seed), s): the authors' prediction."""
    model = bert()
    found = predict(
        model, {"input_ids": IDS}, n_samples=3, seed=4, scope="token", return_samples=True
    )
    state = noise_state(model)
    for s in range(3):
        with torch.no_grad(), posterior(model, "flipout"):
            held = state.snapshot()
            held.held, held.keys = True, {CPU: random.fold_in(random.key(4), s)}
            with using(state, held):
                alone = model(input_ids=IDS).logits.double().log_softmax(-1)
        torch.testing.assert_close(found.sample_log_probs[s], alone, rtol=1e-4, atol=1e-5)
    same = predict(model, {"input_ids": IDS[:1].repeat(3, 1)}, n_samples=2, scope="token")
    assert (same.probs[0] - same.probs[1]).abs().max() > 1e-4  # each token has signs of its own
    coherent = predict(model, {"input_ids": IDS[:1].repeat(3, 1)}, n_samples=2)
    torch.testing.assert_close(coherent.probs[0], coherent.probs[1])


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_the_two_scopes_have_the_same_law_for_one_token(mode: str) -> None:
    """Mean and variance of one layer's output over draws; several tokens differ in their covariance."""
    model = bert()
    item = bayes_layers(model)[0]
    x = torch.randn(1, 2, 32, generator=torch.Generator().manual_seed(5))
    x[0, 1] = x[0, 0]
    folded = x.expand(600, -1, -1)
    outputs = {}
    for scope in ("example", "token"):
        with torch.no_grad(), posterior(model, n_samples=600, kind="independent", scope=scope):
            outputs[scope] = item.layer.train(mode == "train")(folded).double()
    variances = {scope: y[:, 0].var(0) for scope, y in outputs.items()}
    torch.testing.assert_close(variances["token"], variances["example"], rtol=0.35, atol=0)
    ratio = variances["token"].mean() / variances["example"].mean()
    assert 0.85 < ratio < 1.18
    assert torch.equal(outputs["example"][:, 0], outputs["example"][:, 1])
    signs = torch.nn.functional.cosine_similarity(
        outputs["token"][:, 0] - outputs["token"][:, 0].mean(0),
        outputs["token"][:, 1] - outputs["token"][:, 1].mean(0),
    )
    assert signs.mean().abs() < 0.15


def test_pairs_lower_the_error_of_probabilities() -> None:
    """They cancel what is linear in the deviation: where that is small, nearly all of the error."""
    model = bert()
    for item in bayes_layers(model):
        item.rho.data.mul_(0.1)
    batch = {"input_ids": IDS}
    truth = predict(model, batch, n_samples=100, seed=99).probs

    def error(kind: str) -> float:
        found = [predict(model, batch, n_samples=6, seed=s, draws=kind).probs for s in range(8)]
        return float(torch.stack([(p - truth).square().mean() for p in found]).mean())

    assert error("antithetic") < 0.3 * error("independent")


@pytest.mark.parametrize("kind", ["antithetic", "independent"])
@pytest.mark.parametrize("per_pass", [2, 3, 6])
def test_corrected_mutual_information(kind: str, per_pass: int) -> None:
    """That of the metrics on the kept draws, whatever number of draws shares a pass."""
    model = bert()
    options = {"n_samples": 6, "draws": kind, "return_samples": True}
    found = predict(model, {"input_ids": IDS}, samples_per_pass=per_pass, **options)
    group = 2 if kind == "antithetic" else 1
    expected = metrics.corrected_mutual_information(found.sample_log_probs, group=group)
    torch.testing.assert_close(found.corrected_mutual_information, expected)
    assert bool((found.corrected_mutual_information > found.mutual_information).all())
    batches = [{"input_ids": IDS[:2]}, {"input_ids": IDS[2:]}]
    joined = predict_dataset(model, batches, progress=False, n_samples=6, draws=kind)
    torch.testing.assert_close(joined.corrected_mutual_information, expected, rtol=1e-3, atol=1e-6)
    for n_samples in (0, 1, 2):
        few = predict(model, {"input_ids": IDS}, n_samples=n_samples, draws=kind)
        assert (few.corrected_mutual_information is None) == (n_samples < 2 * group)


if __name__ == "__main__":
    with joined() as number:
        _share(Path(sys.argv[1]), number)
