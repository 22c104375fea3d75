"""Likelihoods of labelled tokens, against plain formulas over single draws."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig
from tiny_models import adapted, answering_llama, arguments, bert, fill, llama, t5, trained
from torch import Tensor, nn

from bayes_kernels import metrics
from bayes_kernels.hf import (
    BayesTrainer,
    BlobConfig,
    ScalablConfig,
    bayesianize,
    drawn_weights,
    posterior,
    predict,
    predict_tokens,
    score_answers,
    score_texts,
)
from bayes_kernels.hf.folding import plan
from bayes_kernels.hf.methods.dropout import dropout_draws
from bayes_kernels.hf.tokens import TokenPrediction, label_shift
from hf.letters import letters

pytestmark = pytest.mark.cpu_only

TOKENIZER = letters()
SEED, DRAWS = 3, 4
TEXTS = torch.randint(3, 60, (5, 7), generator=torch.Generator().manual_seed(4))
MASK = torch.ones_like(TEXTS)
MASK[1, :3] = MASK[2, 5:] = 0
TARGETS = TEXTS.masked_fill(MASK == 0, -100)
TARGETS[:, :2] = -100
TARGETS[4] = -100  # nothing counts
BATCH = {"input_ids": TEXTS, "attention_mask": MASK, "labels": TARGETS}

Weights = Callable[[nn.Module, int], Any]


def one_draw(model: nn.Module, draw: int) -> Any:
    return posterior(model, "sample", seed=SEED, first_sample=draw)


def masked_lm() -> Any:
    return bert(transformers.BertForMaskedLM, initializer_range=0.2)


def classifier() -> Any:
    return bert(transformers.BertForTokenClassification, num_labels=64, initializer_range=0.2)


BASES: dict[str, tuple[Callable[[], Any], int]] = {
    "llama": (lambda: llama(initializer_range=0.2), 1),
    "t5": (t5, 0),
    "masked": (masked_lm, 0),
    "classifier": (classifier, 0),
}


def model_of(kind: str = "llama", config: Any = BlobConfig) -> Any:
    base = BASES[kind][0]().double()
    return fill(adapted(base, config, task_type=None), rho=0.6, scale=1.0).eval()


@torch.no_grad()
def log_probs_of(model: Any, shift: int, draws: int, weights: Weights = one_draw) -> Tensor:
    """(S, N, V) of each draw alone, where a label counts."""
    found = []
    for draw in range(draws):
        with weights(model, draw):
            logits = model(**BATCH).logits.double().log_softmax(-1)
        at = logits[:, : logits.shape[1] - shift]
        found.append(at[TARGETS[:, shift:] != -100])
    return torch.stack(found)


def check(found: TokenPrediction, drawn: Tensor, shift: int) -> None:
    counted = TARGETS[:, shift:] != -100
    labels = TARGETS[:, shift:][counted]
    example, position = counted.nonzero(as_tuple=True)
    assert torch.equal(found.example, example) and torch.equal(found.position, position + shift)
    assert found.n_examples == len(TEXTS)
    probs = drawn.exp().mean(0)
    own = probs.gather(1, labels[:, None])[:, 0]
    torch.testing.assert_close(found.log_probs, own.log(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.entropy, torch.special.entr(probs).sum(-1))
    expected = torch.special.entr(drawn.exp()).sum(-1).mean(0)
    torch.testing.assert_close(found.expected_entropy, expected)
    assert found.nll == pytest.approx(-float(own.log().mean()), rel=1e-9)
    assert found.perplexity == pytest.approx(math.exp(found.nll), rel=1e-12)
    assert found.ece == pytest.approx(metrics.ece(probs.log(), labels), abs=1e-9)
    assert found.accuracy == pytest.approx(metrics.accuracy(probs.log(), labels))
    each = drawn.gather(-1, labels.expand(len(drawn), -1)[..., None])[..., 0]
    rows = [each[:, example == i].sum(-1) for i in range(len(TEXTS))]
    texts = torch.stack(rows, 1)
    torch.testing.assert_close(found.draw_sequence_log_probs, texts, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.sequence_log_probs.exp(), texts.exp().mean(0))
    assert found.scores() == pytest.approx(
        {"nll": found.nll, "perplexity": found.perplexity, "ece": found.ece}
        | {"accuracy": found.accuracy}
    )


@pytest.mark.parametrize("kind", BASES)
def test_tokens_are_scored_by_the_mean_of_the_draws(kind: str) -> None:
    model, shift = model_of(kind), BASES[kind][1]
    found = predict_tokens(model, BATCH, n_samples=DRAWS, seed=SEED)
    check(found, log_probs_of(model, shift, DRAWS), shift)
    assert found.mutual_information.max() > 1e-3 and found.entropy_bias is not None
    mean = predict_tokens(model, BATCH, n_samples=0)
    with torch.no_grad():
        loss = model(**BATCH).loss
    assert mean.nll == pytest.approx(float(loss), rel=1e-6)
    assert mean.n_samples == 0 and mean.draw_log_probs.shape == (1, len(mean))


def test_draws_of_other_methods() -> None:
    batch = {"input_ids": TEXTS[:, :4], "labels": torch.arange(5) % 3}
    plain = trained("llama").double()
    bayesianize(plain, "laplace", [batch], choices=[5, 6, 7], progress=False)
    cases: list[tuple[Any, Weights]] = [
        (model_of(config=ScalablConfig), one_draw),
        (plain, lambda model, draw: drawn_weights(model, SEED, draw)),
        (
            trained("llama", lora_dropout=0.3).double(),
            lambda model, draw: dropout_draws(
                model, n_samples=1, seed=SEED, first_sample=draw, scope="none"
            ),
        ),
    ]
    for model, weights in cases:
        found = predict_tokens(model, BATCH, n_samples=DRAWS, seed=SEED)
        check(found, log_probs_of(model, 1, DRAWS, weights), 1)


def test_parts_of_a_batch_are_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of()
    whole = predict_tokens(model, BATCH, n_samples=DRAWS)
    assert plan(model, BATCH, 4, samples_per_pass=4, memory_budget=1, split=True) == (1, 4)
    parts = predict_tokens(model, BATCH, n_samples=DRAWS, memory_budget=1)
    rows = [dict(zip(BATCH, values, strict=True)) for values in zip(*BATCH.values(), strict=True)]
    dataset = predict_tokens(model, rows, n_samples=DRAWS, batch_size=2)
    monkeypatch.setattr("bayes_kernels.hf.tokens._AT_ONCE", 1)
    long = {key: value.repeat(1, 3) for key, value in BATCH.items()}
    few = predict_tokens(model, long, n_samples=DRAWS)
    monkeypatch.undo()
    for a, b in ((whole, parts), (whole, dataset), (predict_tokens(model, long, n_samples=4), few)):
        assert len(b) == len(a) and b.n_examples == a.n_examples and b.n_samples == a.n_samples
        assert torch.equal(a.example, b.example) and torch.equal(a.position, b.position)
        for name in ("log_probs", "entropy", "expected_entropy", "entropy_bias", "draw_log_probs"):
            torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=1e-9, atol=1e-9)
    assert few.log_probs.numel() > 16


def test_it_is_score_texts_for_batches() -> None:
    model = model_of()
    (text,) = score_texts(model, TOKENIZER, "no way", n_samples=DRAWS, seed=SEED)
    ids = torch.tensor([TOKENIZER("no way")["input_ids"]])
    found = predict_tokens(model, {"input_ids": ids, "labels": ids}, n_samples=DRAWS, seed=SEED)
    assert text.log_probs == pytest.approx(found.log_probs.tolist(), rel=1e-9)
    assert text.perplexity == pytest.approx(found.perplexity, rel=1e-9)
    assert text.corrected_mutual_information == pytest.approx(
        (found.entropy - found.expected_entropy + found.entropy_bias).clamp(min=0).tolist(),
        abs=1e-9,
    )


@pytest.mark.parametrize("per_token", [False, True])
def test_answers_of_several_tokens(per_token: bool) -> None:
    model, prompts, answers = model_of(), ["no", "Why a"], ["way", "b", "QQ bed"]
    found = score_answers(
        model, TOKENIZER, prompts, answers, n_samples=DRAWS, seed=SEED, per_token=per_token
    )
    for i, prompt in enumerate(prompts):
        before = len(TOKENIZER(prompt)["input_ids"])
        rows = []
        for answer in answers:
            ids = torch.tensor([TOKENIZER(prompt + answer)["input_ids"]])
            each = []
            for draw in range(DRAWS):
                with torch.no_grad(), one_draw(model, draw):
                    own = model(input_ids=ids).logits.log_softmax(-1)[0, before - 1 : -1]
                values = own.gather(1, ids[0, before:, None])
                each.append(values.mean() if per_token else values.sum())
            rows.append(torch.stack(each))
        probs = torch.stack(rows, 1).softmax(-1)
        torch.testing.assert_close(found.probs[i], probs.mean(0))
        expected = torch.special.entr(probs).sum(-1).mean()
        torch.testing.assert_close(found.expected_entropy[i], expected)
    one = score_answers(model, TOKENIZER, "no", ["a", "b"], n_samples=DRAWS, seed=SEED)
    batch = TOKENIZER("no", return_tensors="pt")
    ids = TOKENIZER.convert_tokens_to_ids(["a", "b"])
    same = predict(model, batch, n_samples=DRAWS, seed=SEED, choices=ids)
    torch.testing.assert_close(one.probs, same.probs)
    torch.testing.assert_close(one.entropy_bias, same.entropy_bias)


def test_errors() -> None:
    model = model_of()
    for labels, message in (
        (None, "must be token ids .* got none"),
        (torch.zeros(5), r"got torch.float32 \(5,\)"),
        (TARGETS[:, :4], "labels must be .* for logits"),
        (TARGETS.masked_fill(TARGETS == -100, 64), "below 64, or -100"),
    ):
        batch = {**BATCH, "labels": labels}
        with pytest.raises(ValueError, match=f"predict_tokens: .*{message}"):
            predict_tokens(model, batch)
    with pytest.raises(ValueError, match="n_samples must be an integer of at least 0"):
        predict_tokens(model, BATCH, n_samples=-1)
    with pytest.raises(ValueError, match="n_samples must be 0 for adapters without a posterior"):
        predict_tokens(adapted(llama(), LoraConfig), BATCH)
    with pytest.raises(ValueError, match="data must have at least one example"):
        predict_tokens(model, [])
    for base in (bert(), answering_llama()):
        other = adapted(base)
        assert label_shift(other) is None
        with pytest.raises(ValueError, match="model must be one with labels of tokens"):
            predict_tokens(other, BATCH)
    with pytest.raises(ValueError, match="must be a causal model, got T5"):
        score_answers(model_of("t5"), TOKENIZER, "a", ["b", "c"])
    for answers in ("ab", ["a"], ["a", "a"]):
        with pytest.raises(ValueError, match="answers must be at least two texts"):
            score_answers(model, TOKENIZER, "a", answers)
    with pytest.raises(ValueError, match="must have a token of its own behind the prompt, got ''"):
        score_answers(model, TOKENIZER, "a", ["b", ""])


# --- Trainer -------------------------------------------------------------------------------------


def rows_of(batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    return [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]


def trainer_of(model: Any, folder: Path, data: Any, **options: Any) -> BayesTrainer:
    return BayesTrainer(
        model=model,
        args=arguments(folder, per_device_eval_batch_size=2, **options.pop("args", {})),
        train_dataset=data,
        eval_dataset=data,
        n_train=10,
        **options,
    )


@pytest.mark.parametrize("kind", ["llama", "masked"])
@pytest.mark.parametrize("concat", [True, False])
def test_trainer_scores_tokens_with_draws(kind: str, concat: bool, tmp_path: Path) -> None:
    model, seen = model_of(kind), []

    def count(found: Any) -> dict[str, float]:
        seen.append(found)
        return {"seen": 1.0}

    options: dict[str, Any] = {"eval_samples": DRAWS, "eval_seed": SEED}
    options["args"] = {"eval_do_concat_batches": concat}
    trainer = trainer_of(model, tmp_path, rows_of(BATCH), **options)
    expected = predict_tokens(model, BATCH, n_samples=DRAWS, seed=SEED)
    scores = trainer.evaluate()
    for name, value in expected.scores().items():
        assert scores[f"eval_{name}"] == pytest.approx(value, rel=1e-4), name
    assert scores["eval_loss"] == pytest.approx(expected.nll, rel=1e-4)
    trainer.compute_metrics = count
    assert trainer.evaluate(metric_key_prefix="test")["test_nll"] == scores["eval_nll"]
    assert len(seen) == 1
    if concat:
        log_probs, confidence, correct = seen[0].predictions
        counted = seen[0].label_ids != -100
        assert log_probs.shape == TEXTS.shape and counted.sum() == len(expected)
        assert log_probs[counted] == pytest.approx(expected.log_probs.numpy(), rel=1e-4)
        assert confidence[counted] == pytest.approx(expected.confidence.numpy(), rel=1e-4)
        assert (correct[counted] == expected.correct.numpy()).all()
    trainer.eval_scope = "token"
    with pytest.raises(ValueError, match="eval_scope must be 'example' for labels of tokens"):
        trainer.evaluate()


@pytest.mark.parametrize("samples", [0, DRAWS])
def test_trainer_scores_choices(samples: int, tmp_path: Path) -> None:
    model, choices = model_of(), [5, 6, 7]
    places, classes = torch.tensor([3, 4, 2, 6, 5]), torch.tensor([0, 2, 1, 0, 2])
    texts, labels = TEXTS.clone(), torch.full_like(TEXTS, -100)
    for i, (place, label) in enumerate(zip(places, classes, strict=True)):
        texts[i, place] = labels[i, place] = choices[label]
        labels[i, place + 1 :] = 2  # an end token, which is no part of the answer
    mask = torch.ones_like(texts)
    mask[1, :2] = 0
    data = rows_of({"input_ids": texts, "attention_mask": mask, "labels": labels})
    trainer = trainer_of(
        model, tmp_path, data, eval_samples=samples, eval_seed=SEED, choices=choices
    )
    probs = []
    for draw in range(max(samples, 1)):
        chosen = one_draw(model, draw) if samples else posterior(model, "mean")
        with torch.no_grad(), chosen:
            logits = model(input_ids=texts, attention_mask=mask).logits
        probs.append(logits[torch.arange(5), places - 1][:, choices].softmax(-1))
    mean = torch.stack(probs).mean(0)
    scores = trainer.evaluate()
    for name in ("nll", "ece", "accuracy"):
        expected = getattr(metrics, name)(mean.log(), classes)
        assert scores[f"eval_{name}"] == pytest.approx(expected, rel=1e-4, abs=1e-6), name
    assert "eval_perplexity" not in scores
    found = trainer.predict(data)
    assert found.predictions == pytest.approx(mean.log().numpy(), rel=1e-4)
    assert found.label_ids.tolist() == classes.tolist()
    trainer.choices = [5, 6]
    with pytest.raises(ValueError, match=r"must be one of \[5, 6\], behind a prompt, got 7 at 4"):
        trainer.evaluate()
    with pytest.raises(ValueError, match="BayesTrainer: choices must be at least two"):
        trainer_of(model, tmp_path, data, choices=[1])
