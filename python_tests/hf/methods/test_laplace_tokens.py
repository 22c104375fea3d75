"""Laplace posteriors of language models on labels of tokens: fit, predictions, folders."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accuracy import assert_same_but_rounding
from peft import LoraConfig, PeftModel
from tiny_models import adapted, bert, fill, gpt2, llama, t5
from torch import Tensor, nn

from bayes_kernels import laplace
from bayes_kernels.hf import (
    BlobConfig,
    bayesianize,
    drawn_weights,
    export_draws,
    generate,
    laplace_posterior,
    load_laplace,
    predict,
    predict_tokens,
    save_laplace,
)
from hf.letters import letters
from hf.methods.laplace_models import same, state

pytestmark = pytest.mark.cpu_only

TEXTS = torch.randint(3, 60, (5, 7), generator=torch.Generator().manual_seed(4))
TARGETS = TEXTS.clone()
TARGETS[:, :2] = TARGETS[1, 5:] = TARGETS[2, 4:] = TARGETS[4] = -100
MASK = torch.ones_like(TEXTS)
MASK[2, 5:] = 0
BATCH = {"input_ids": TEXTS, "attention_mask": MASK, "labels": TARGETS}
COUNT = int((TARGETS != -100).sum())


def masked_lm() -> Any:
    return bert(transformers.BertForMaskedLM, initializer_range=0.2)


def classifier() -> Any:
    return bert(transformers.BertForTokenClassification, num_labels=64, initializer_range=0.2)


BASES: dict[str, Any] = {
    "llama": lambda: llama(initializer_range=0.2),
    "gpt2": lambda: gpt2(transformers.GPT2LMHeadModel),
    "t5": t5,
    "masked": masked_lm,
    "classifier": classifier,
}
SHIFT = {"llama": 1, "gpt2": 1, "t5": 0, "masked": 0, "classifier": 0}


def trained(kind: str = "llama", config: Any = LoraConfig, **options: Any) -> Any:
    model = adapted(BASES[kind]().double(), config, task_type=None, **options)
    return fill(model, scale=0.3).eval()


def fit(model: nn.Module, data: Any = None, **options: Any) -> Any:
    return bayesianize(model, "laplace", data or [BATCH], **{"progress": False, **options})


@torch.no_grad()
def label_log_probs(model: Any, shift: int) -> Tensor:
    logits = model(**BATCH).logits
    targets = TARGETS[:, shift:]
    at = (targets != -100).nonzero(as_tuple=True)
    return logits.log_softmax(-1)[at].gather(1, targets[at][:, None])[:, 0]


@pytest.mark.parametrize("kind", list(BASES))
def test_fit_and_predictions(kind: str) -> None:
    """The likelihood of the labels, and draws of the weights one by one."""
    model, shift = trained(kind), SHIFT[kind]
    before, mean = state(model), label_log_probs(model, shift)
    report = fit(model, mc_samples=2)
    assert same(before, state(model)) and type(model.peft_config["default"]) is LoraConfig
    assert (report.examples, report.unit, report.fisher) == (COUNT, "labelled tokens", "mc")
    assert report.prediction == "weights" and f"{COUNT} labelled tokens" in str(report)
    assert report.log_likelihood == pytest.approx(float(mean.sum()), rel=1e-9)
    assert report.evidence_after >= report.evidence_before and report.effective_parameters > 0.5
    found = predict_tokens(model, BATCH, n_samples=3, seed=2)
    for i in range(3):
        with drawn_weights(model, seed=2, index=i):
            torch.testing.assert_close(
                found.draw_log_probs[i], label_log_probs(model, shift), rtol=1e-8, atol=1e-9
            )
    torch.testing.assert_close(predict_tokens(model, BATCH, n_samples=0).log_probs, mean)
    assert float(found.mutual_information.mean()) > 0 and same(before, state(model))


def test_equals_the_general_laplace() -> None:
    model = trained()
    report = fit(model, mc_samples=3, seed=4, prior="mackay")

    def logits(m: nn.Module, batch: Any) -> Tensor:
        return m(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[
            :, :-1
        ]

    plain = laplace.Laplace(
        model,
        laplace.linear_layers(model, r".*lora_[AB]\.default"),
        forward=logits,
        labels=lambda batch: batch["labels"][:, 1:],
        mask=lambda batch: None,
        fisher="mc",
        mc_samples=3,
        seed=4,
        tokens=report.tokens,
    ).fit([BATCH], verbose=False)
    plain.optimize_prior_precision()
    assert report.prior_precision == pytest.approx(float(plain.prior_precision), rel=1e-6)
    assert report.evidence_after == pytest.approx(float(plain.log_marginal_likelihood()), rel=1e-8)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_batches_and_the_side_of_padding_change_nothing(kind: str) -> None:
    found = []
    for left, right, size in ((0, 0, 5), (0, 0, 2), (3, 0, 5), (0, 2, 5)):
        pads = {"input_ids": 9, "attention_mask": 0, "labels": -100}
        batch = {
            name: nn.functional.pad(value, (left, right), value=pads[name])
            for name, value in BATCH.items()
        }
        batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
        parts = [{k: v[i : i + size] for k, v in batch.items()} for i in range(0, 5, size)]
        report = fit(trained(kind), parts)
        found.append((report.prior_precision, report.log_likelihood, report.effective_parameters))
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-6)


def test_one_label_in_each_text_is_a_choice() -> None:
    """The answer behind a prompt, among all tokens: labels of classes give the same posterior."""
    labels = torch.full_like(TEXTS, -100)
    labels[:, -1] = TEXTS[:, -1]
    tokens = {"input_ids": TEXTS, "labels": labels}
    classes = {"input_ids": TEXTS[:, :-1], "labels": TEXTS[:, -1]}
    vocabulary = trained().config.vocab_size
    found = []
    for data, choices in ((tokens, None), (classes, list(range(vocabulary)))):
        report = fit(trained(), [data], fisher="mc", choices=choices)
        found.append((report.prior_precision, report.evidence_after, report.examples))
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_the_prior_by_held_out_tokens() -> None:
    model = trained()
    report = fit(model, validation=[BATCH], n_samples=3)
    assert report.prior == "validation"
    posterior = laplace_posterior(model)
    assert posterior is not None
    nll = {}
    for delta in torch.logspace(-2, 4, 25, dtype=torch.float64)[::2].tolist():
        posterior.laplace.prior_precision = delta
        nll[delta] = predict_tokens(model, BATCH, n_samples=3, seed=0).nll
    assert report.prior_precision == pytest.approx(min(nll, key=nll.__getitem__))


def test_saved_loaded_and_exported(tmp_path: Path) -> None:
    model = trained()
    fit(model)
    expected = predict_tokens(model, BATCH, n_samples=4, seed=1)
    model.save_pretrained(tmp_path / "own")
    save_laplace(model, tmp_path / "own")
    loaded = PeftModel.from_pretrained(BASES["llama"]().double(), tmp_path / "own").double()
    found = load_laplace(loaded, tmp_path / "own")
    assert found.of_tokens and found.report["unit"] == "labelled tokens"
    for one in (loaded, copy.deepcopy(loaded)):
        again = predict_tokens(one, BATCH, n_samples=4, seed=1)
        torch.testing.assert_close(again.log_probs, expected.log_probs, rtol=1e-5, atol=1e-6)
    folders = export_draws(model, tmp_path / "draws", 2, seed=1)
    for i, folder in enumerate(folders):
        plain = PeftModel.from_pretrained(BASES["llama"]().double(), folder).double()
        assert_same_but_rounding(
            label_log_probs(plain, 1).float(), expected.draw_log_probs[i].float(), units=4096
        )


def test_texts_are_written_with_draws() -> None:
    model, tokenizer = trained(), letters()
    fit(model)
    found = generate(model, tokenizer, ["abc"], n_samples=3, max_new_tokens=4)
    assert len(found) == 1


def test_last_layers_and_a_bayesian_adapter() -> None:
    model = trained(config=BlobConfig)
    report = bayesianize(model, "laplace-last", [BATCH], progress=False)
    assert report.layers == "last" and report.examples == COUNT
    model = trained(target_modules=["lm_head"])  # low rank on the side of the vocabulary
    report = bayesianize(model, "laplace-last", [BATCH], progress=False, dense_below=8, rank=4)
    assert report.matrices == 2 and predict_tokens(model, BATCH, n_samples=2).nll > 0


def test_what_is_refused_leaves_the_model() -> None:
    model = trained(config=BlobConfig)
    before, config = state(model), model.peft_config["default"]
    for options, message in (
        ({"fisher": "ggn"}, r"laplace_: fisher must be one of .* for labels of tokens"),
        ({"tokens": "last"}, r"laplace_: tokens must be one of .* for labels of tokens"),
        ({"prediction": "mc"}, r"laplace_: prediction must be one of .* for labels of tokens"),
        ({"data": [{**BATCH, "labels": TARGETS[:, 0]}]}, r"labels must be token ids \(B, T\)"),
        ({"data": [{"input_ids": TEXTS}]}, r"labels \(B, T\), -100 where a token"),
        ({"data": [{**BATCH, "labels": TARGETS + 1000}]}, r"labels must be in \[0, 64\)"),
        ({"data": [{**BATCH, "labels": TARGETS * 0 - 100}]}, "at least one labelled token"),
    ):
        with pytest.raises(ValueError, match=message) as raised:
            fit(model, **options)
        assert "\n" not in str(raised.value)
        assert same(before, state(model)) and model.peft_config["default"] is config
        assert laplace_posterior(model) is None
    fit(model)
    for ask in (
        predict,
        functools.partial(predict, choices=[5, 6]),
        functools.partial(predict, n_samples=0),
    ):
        with pytest.raises(ValueError, match="labels of tokens; use predict_tokens"):
            ask(model, BATCH)
