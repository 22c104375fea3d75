"""No more draws for texts whose class is settled: the rule, its error rate, and predictions with it."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_models
import torch
from peft import LoraConfig
from tiny_models import adapted, fill

from bayes_kernels.hf import PolarVbllConfig, Prediction, predict
from bayes_kernels.hf.stopping import Settling, settled

IDS = torch.randint(3, 128, (16, 7), generator=torch.Generator().manual_seed(1))
BATCH = {"input_ids": IDS, "labels": torch.arange(16) % 4}


def bert(**options: Any) -> Any:
    base = tiny_models.bert(num_labels=4, initializer_range=0.3, vocab_size=128, **options)
    return fill(adapted(base), 0.4, 0.2)


def run(logits: torch.Tensor, **options: Any) -> Settling:
    """The rule on logits (N, B, C), with all draws at hand."""
    given = {"dependent": 1, "stop": 0.0, "minimum": 1, **options}
    found = Settling(logits.shape[1], len(logits), **given)
    while found.drawn < len(logits) and len(found.open):
        count = found.next_pass(len(logits))
        found.add(logits[found.drawn : found.drawn + count, found.open])
    return found


@pytest.mark.parametrize("dependent", [1, 2])
@pytest.mark.parametrize("total", [7, 10])
def test_certain_decisions_are_those_of_all_draws(dependent: int, total: int) -> None:
    generator = torch.Generator().manual_seed(total)
    scale = torch.rand(400, 1, generator=generator) * 8
    logits = torch.randn(400, 3, generator=generator) * scale
    logits = logits + torch.randn(total, 400, 3, generator=generator).double() * 2
    found = run(logits, dependent=dependent)
    everything = logits.softmax(-1).mean(0)
    assert torch.equal(found.result(None).classes, everything.argmax(-1))
    assert 0.1 < float((found.used < total).float().mean()) < 1
    # One draw before, other draws could have changed the class.
    probs, used = logits.softmax(-1), found.used
    for row in (used < total).nonzero()[:20, 0].tolist():
        made = int(used[row]) - dependent
        if made >= dependent:
            so_far = probs[:made, row].sum(0)
            top = int(so_far.argmax())
            others = so_far.clone()
            others[top] = -1
            assert so_far[top] - others.max() <= total - made + 1e-12


def wrongly_settled(leads: torch.Tensor, rule: str, stop: float) -> tuple[float, float]:
    """Share of (G, n) leads of class 0 over class 1 that settle on class 0, and on any class."""
    groups = torch.stack([(1 + leads) / 2, (1 - leads) / 2], -1)
    wrong, going = torch.zeros(leads.shape[1]).bool(), torch.ones(leads.shape[1]).bool()
    for g in range(2, len(leads) + 1):
        found = settled(groups[:g], total=10**6, dependent=1, stop=stop, rule=rule)
        wrong |= going & found & (leads[:g].mean(0) > 0)
        going &= ~found
    return float(wrong.double().mean()), float((~going).double().mean())


def test_the_wrong_class_is_settled_on_as_often_as_said_at_most() -> None:
    """Leads without a mean: no class is right, and looking at each draw is no excuse."""
    generator = torch.Generator().manual_seed(0)
    normal = 0.1 * torch.randn(100, 4000, generator=generator, dtype=torch.float64)
    coins = torch.randint(0, 2, (100, 4000), generator=generator).double() * 1.96 - 0.98
    rates = [wrongly_settled(normal, "normal", 0.2), wrongly_settled(coins, "betting", 0.2)]
    for wrong, any_class in rates:
        assert 0.02 < wrong < 0.2 and any_class < 0.4
    fewer = wrongly_settled(normal, "normal", 0.05)
    assert fewer[0] < 0.05 and fewer[0] < rates[0][0]
    # A rare draw that turns the lead round: only bets foresee it.
    rare = torch.where(torch.rand(40, 2000, generator=generator) < 0.05, -0.95, 0.04).double()
    assert wrongly_settled(rare, "betting", 0.05)[0] < 0.05
    assert wrongly_settled(rare, "normal", 0.05)[0] > 0.3


def test_clear_leads_need_few_draws() -> None:
    noise = torch.randn(200, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def needed(lead: float, stop: float, rule: str) -> int:
        leads = lead + 0.02 * noise
        groups = torch.stack([(1 + leads) / 2, (1 - leads) / 2], -1)
        options = {"total": 10**6, "dependent": 1, "stop": stop, "rule": rule}
        return next(g for g in range(1, 200) if settled(groups[:g], **options))

    assert needed(0.2, 0.05, "normal") <= 5 and 20 < needed(0.2, 0.05, "betting") < 40
    assert 4 < needed(0.9, 0.05, "betting") < 9
    for rule in ("normal", "betting"):
        assert needed(0.05, 0.01, rule) > needed(0.2, 0.05, rule) > 1


def test_each_text_has_the_prediction_of_its_draws() -> None:
    model = bert()
    found = predict(model, BATCH, n_samples=40, seed=2, stop=0.05)
    assert isinstance(found, Prediction) and found.n_samples == 40
    used = found.draws_used
    assert used.min() >= 4 and len(used.unique()) > 3 and used.min() < 20
    assert torch.equal(found.labels, BATCH["labels"])
    for count in used.unique().tolist():
        plain = predict(model, BATCH, n_samples=count, seed=2)
        rows = used == count
        for name in ("log_probs", "entropy", "expected_entropy", "entropy_bias"):
            expected = getattr(plain, name)[rows]
            torch.testing.assert_close(getattr(found, name)[rows], expected, rtol=1e-4, atol=1e-6)


def test_draws_that_count_depend_on_the_text_and_the_seed_alone() -> None:
    model = bert()
    whole = predict(model, BATCH, n_samples=40, seed=2, stop=0.05).draws_used
    for per_pass in (1, 3, 40):
        other = predict(model, BATCH, n_samples=40, seed=2, stop=0.05, samples_per_pass=per_pass)
        assert torch.equal(other.draws_used, whole)
    split = predict(model, BATCH, n_samples=40, seed=2, stop=0.05, memory_budget=200_000)
    assert torch.equal(split.draws_used, whole)
    part = {"input_ids": IDS[5:9]}
    assert torch.equal(predict(model, part, n_samples=40, seed=2, stop=0.05).draws_used, whole[5:9])
    assert not torch.equal(predict(model, BATCH, n_samples=40, seed=3, stop=0.05).draws_used, whole)


def test_settled_texts_leave_the_passes() -> None:
    model = bert(num_hidden_layers=4)
    upper = fill(
        adapted(
            tiny_models.bert(
                num_labels=4, initializer_range=0.3, vocab_size=128, num_hidden_layers=4
            ),
            layers_to_transform=[2, 3],
        ),
        0.4,
        0.2,
    )
    for one in (model, upper):
        predict(one, BATCH, n_samples=2)
        rows: list[int] = []
        hook = one.base_model.model.bert.encoder.layer[3].register_forward_pre_hook(
            lambda _, args, rows=rows: rows.append(len(args[0]))
        )
        found = predict(one, BATCH, n_samples=40, stop=0.05, samples_per_pass=2)
        hook.remove()
        computed = sum(rows)
        assert found.shared_layers == (0 if one is model else 2)
        assert int(found.draws_used.sum()) <= computed <= 1.6 * int(found.draws_used.sum())
        assert computed < 0.9 * 16 * 40
        plain = predict(one, BATCH, n_samples=40, stop=0.05, share_layers=False)
        torch.testing.assert_close(found.log_probs, plain.log_probs, rtol=1e-4, atol=1e-6)
        assert torch.equal(found.draws_used, plain.draws_used)


def test_decisions_are_nearly_those_of_all_draws() -> None:
    model, off, used, texts = bert(), 0, 0, 0
    for seed in range(4):
        everything = predict(model, BATCH, n_samples=40, seed=seed).classes
        few = predict(model, BATCH, n_samples=40, seed=seed, stop=0.05)
        certain = predict(model, BATCH, n_samples=40, seed=seed, stop=0)
        assert torch.equal(certain.classes, everything)
        assert (few.draws_used <= certain.draws_used).all()
        off += int((few.classes != everything).sum())
        used, texts = used + int(few.draws_used.sum()), texts + len(IDS)
    assert off <= 0.05 * texts and used < 0.8 * 40 * texts


def test_masks_that_go_by_place_keep_the_batch_whole() -> None:
    base = tiny_models.bert(num_labels=4, initializer_range=0.3, vocab_size=128)
    model = fill(adapted(base, LoraConfig, lora_dropout=0.4), 0.6)
    found = predict(model, BATCH, n_samples=30, stop=0.05)
    count = int(found.draws_used.unique()[0])
    plain = predict(model, BATCH, n_samples=count)
    rows = found.draws_used == count
    assert count < 30 and not bool(rows.all())
    torch.testing.assert_close(found.log_probs[rows], plain.log_probs[rows])


def test_what_stops_nothing() -> None:
    model = bert()
    mean = predict(model, BATCH, n_samples=0, stop=0.05)
    assert mean.draws_used is None and mean.n_samples == 0
    joined = Prediction.concatenate(
        [predict(model, {"input_ids": IDS[i : i + 3]}, n_samples=8, stop=0.1) for i in (0, 3)]
    )
    assert joined.draws_used.shape == (6,)
    few = predict(model, BATCH, n_samples=2, stop=0.4)
    assert few.draws_used.tolist() == [2] * 16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stop": 0.5}, "stop must be None or an error rate .* got 0.5"),
        ({"stop": True}, "stop must be None or an error rate .* got True"),
        ({"stop": "certain"}, "got 'certain'"),
        ({"stop": 0.1, "stop_rule": "t"}, "stop_rule must be one of .* got 't'"),
        ({"stop": 0.1, "min_samples": 0}, "min_samples must be an integer of at least 1, got 0"),
        ({"stop": 0.1, "return_samples": True}, "return_samples must be False with stop"),
        ({"stop": 0.1, "draws": "shared"}, "draws='shared', which depend on each other"),
    ],
)
def test_bad_rules(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        predict(bert(), BATCH, **options)


def test_models_without_passes_or_classes() -> None:
    head = adapted(tiny_models.bert(vocab_size=128), PolarVbllConfig)
    with pytest.raises(ValueError, match="draws are of logits, which cost no passes"):
        predict(head, {"input_ids": IDS}, stop=0.1)
    numbers = fill(adapted(tiny_models.bert(vocab_size=128, num_labels=1)), 0.6, 0.5)
    with pytest.raises(ValueError, match="None for a model of numbers"):
        predict(numbers, {"input_ids": IDS}, stop=0.1)
