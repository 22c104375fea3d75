"""What the logits of a model stand for: classes, labels, numbers, tokens; and how a loss adds up."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from peft import LoraConfig
from tiny_models import IDS, arguments, fill, gpt2, llama, t5
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForNextSentencePrediction,
    BertForSequenceClassification,
    BertForTokenClassification,
    GPT2ForTokenClassification,
    LlamaForSequenceClassification,
    TrainerCallback,
)

from bayes_kernels.hf import (
    BayesTrainer,
    BlobConfig,
    LabelPrediction,
    NumberPrediction,
    PolarConfig,
    PolarVbllConfig,
    Prediction,
    ScalablConfig,
    bayesianize,
    join_adapters,
    posterior,
    predict,
    predict_dataset,
)

pytestmark = pytest.mark.cpu_only

MASK = torch.tensor([[1] * 6, [1] * 4 + [0] * 2, [1] * 5 + [0], [1] * 6])
BATCH = {"input_ids": IDS, "attention_mask": MASK}
SMALL: dict[str, Any] = {"num_hidden_layers": 1, "initializer_range": 0.3}


def bert(problem: str | None, width: int) -> nn.Module:
    return tiny_models.bert(num_labels=width, problem_type=problem, **SMALL)


def bart() -> nn.Module:
    torch.manual_seed(0)
    return BartForConditionalGeneration(
        BartConfig(
            vocab_size=64,
            d_model=32,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            max_position_embeddings=16,
            dropout=0.0,
            init_std=0.3,
        )
    )


def adapted(net: nn.Module, config: type[LoraConfig], targets: list[str], **options: Any) -> Any:
    options = {"target_modules": targets, "task_type": None, **options}
    return fill(tiny_models.adapted(net, config, **options), 0.6).eval()


def draws(model: Any, count: int, batch: dict[str, Tensor] = BATCH) -> Tensor:
    """(S, B, C) logits of single draws, fp64."""
    found = []
    for s in range(count):
        with torch.no_grad(), posterior(model, "sample", first_sample=s):
            found.append(model(**batch).logits.double())
    return torch.stack(found)


# --- regression and independent labels -----------------------------------------------------------

WEIGHTS = pytest.mark.parametrize("config", [BlobConfig, ScalablConfig])


@pytest.mark.parametrize("per_pass", [None, 2])
@pytest.mark.parametrize(("problem", "width"), [(None, 1), ("regression", 1), ("regression", 3)])
@WEIGHTS
def test_regression_is_a_gaussian(
    config: Any, problem: str | None, width: int, per_pass: int | None
) -> None:
    model = adapted(bert(problem, width), config, ["query", "value"], task_type="SEQ_CLS")
    each = draws(model, 5)
    batch = {**BATCH, "labels": torch.arange(4.0)}
    got = predict(model, batch, n_samples=5, samples_per_pass=per_pass, return_samples=True)
    assert isinstance(got, NumberPrediction) and len(got) == 4 and got.n_samples == 5
    torch.testing.assert_close(got.samples, each, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got.mean, each.mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got.variance, each.var(0), rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(got.std.square(), got.variance)
    assert got.variance.min() > 1e-6 and torch.equal(got.labels, torch.arange(4.0))
    with torch.no_grad():
        mean = model(**BATCH).logits.double()
    at_mean = predict(model, BATCH, n_samples=0)
    torch.testing.assert_close(at_mean.mean, mean, rtol=1e-4, atol=1e-5)
    assert at_mean.variance.max() == 0 and at_mean.samples is None
    one = predict(model, BATCH, n_samples=1)
    torch.testing.assert_close(one.mean, each[0], rtol=1e-4, atol=1e-5)
    assert one.variance.max() == 0
    for name in ("probs", "mutual_information"):
        with pytest.raises(AttributeError, match=f"{name}: .*num_labels=1.*use mean and variance"):
            getattr(one, name)
    assert not hasattr(one, "other")


@pytest.mark.parametrize("per_pass", [None, 2])
@WEIGHTS
def test_labels_are_bernoulli(config: Any, per_pass: int | None) -> None:
    net = bert("multi_label_classification", 3)
    model = adapted(net, config, ["query", "value"], task_type="SEQ_CLS")
    each = draws(model, 5).sigmoid()
    got = predict(model, BATCH, n_samples=5, samples_per_pass=per_pass, return_samples=True)
    assert isinstance(got, LabelPrediction) and len(got) == 4
    bernoulli = torch.distributions.Bernoulli
    torch.testing.assert_close(got.probs, each.mean(0), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(got.sample_probs, each, rtol=1e-4, atol=1e-6)
    entropy, expected = bernoulli(each.mean(0)).entropy(), bernoulli(each).entropy().mean(0)
    torch.testing.assert_close(got.entropy, entropy, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(got.expected_entropy, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(got.mutual_information, entropy - expected, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(got.logits.sigmoid(), got.probs)
    assert got.mutual_information.min() >= 0 and got.mutual_information.max() > 1e-4
    with torch.no_grad():
        mean = model(**BATCH).logits.double().sigmoid()
    at_mean = predict(model, BATCH, n_samples=0)
    torch.testing.assert_close(at_mean.probs, mean, rtol=1e-4, atol=1e-6)
    assert at_mean.mutual_information.max() < 1e-12 and at_mean.sample_probs is None


def test_labels_say_what_no_problem_type_says() -> None:
    """As for the loss, which notes the type in a configuration that is not saved with an adapter."""
    model = adapted(bert(None, 3), BlobConfig, ["query"], task_type="SEQ_CLS")
    classes = {**BATCH, "labels": torch.tensor([0, 1, 2, 0])}
    assert isinstance(predict(model, classes, n_samples=2), Prediction)
    answers = {**BATCH, "labels": torch.tensor([[1.0, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0]])}
    got = predict(model, answers, n_samples=2)
    assert isinstance(got, LabelPrediction)
    model(**answers)
    assert model.config.problem_type == "multi_label_classification"
    torch.testing.assert_close(predict(model, BATCH, n_samples=2).probs, got.probs)


def test_sure_labels_have_no_entropy_and_finite_logits() -> None:
    model = adapted(bert("multi_label_classification", 2), BlobConfig, ["query"])
    model.get_base_model().classifier.bias.data.copy_(torch.tensor([1e4, -1e4]))
    got = predict(model, BATCH, n_samples=3)
    assert got.entropy.abs().max() == 0 and got.expected_entropy.abs().max() == 0
    assert torch.isfinite(got.logits).all()


@pytest.mark.parametrize(
    ("problem", "width", "kind"),
    [
        (None, 1, NumberPrediction),
        ("multi_label_classification", 3, LabelPrediction),
        (None, 3, Prediction),
    ],
)
def test_data_sets_join_and_plain_draws_work(
    problem: str | None, width: int, kind: type, tmp_path: Path
) -> None:
    """MC dropout and ensembles take the same way as Bayesian adapters."""
    labels = torch.arange(4) % 2 if width > 1 else torch.arange(4.0)
    labels = torch.rand(4, 3) if kind is LabelPrediction else labels
    batch = {**BATCH, "labels": labels}
    parts = [{k: v[:1] for k, v in batch.items()}, {k: v[1:] for k, v in batch.items()}]
    bayesian = adapted(bert(problem, width), BlobConfig, ["query"], task_type="SEQ_CLS")
    dropout = {"lora_dropout": 0.5, "task_type": "SEQ_CLS"}
    plain = [adapted(bert(problem, width), LoraConfig, ["query"], **dropout) for _ in range(2)]
    for index, model in enumerate(plain):
        model.save_pretrained(tmp_path / str(index))
    ensemble = join_adapters(plain, [tmp_path / "0", tmp_path / "1"])
    for model in (bayesian, plain[1], ensemble):
        whole = predict(model, batch, n_samples=2, return_samples=True)
        assert type(whole) is kind
        joined = predict_dataset(model, parts, n_samples=2, return_samples=True, progress=False)
        assert type(joined) is kind and len(joined) == 4
        assert torch.equal(joined.labels, labels)
        if model is not plain[1]:  # whose masks go by the place in the batch
            torch.testing.assert_close(joined.logits, whole.logits, rtol=1e-4, atol=1e-5)
    other = predict(bayesian, batch, n_samples=3)
    with pytest.raises(ValueError, match=r"one number of .* and draws"):
        type(whole).concatenate([predict(bayesian, batch, n_samples=2), other])


UNFIT = [("regression", 3), (None, 1), ("multi_label_classification", 3)]


@pytest.mark.parametrize(("problem", "width"), UNFIT)
@pytest.mark.parametrize("method", ["polar-vbll", "tfb", "laplace", "laplace-last"])
def test_methods_of_classes_refuse_other_heads(
    method: str, problem: str | None, width: int
) -> None:
    """Whatever the labels are: without labels nothing else would notice."""
    with pytest.raises(ValueError, match=f"num_labels={width}, problem_type={problem!r}"):
        if method == "polar-vbll":
            adapted(bert(problem, width), PolarVbllConfig, ["query"], task_type="SEQ_CLS")
        else:
            model = adapted(bert(problem, width), LoraConfig, ["query"], task_type="SEQ_CLS")
            bayesianize(model, method, data=[BATCH], progress=False)


def test_one_class_and_a_posterior_of_another_head() -> None:
    model = adapted(bert(None, 1), BlobConfig, ["query"])
    model.get_base_model().config.problem_type = "single_label_classification"
    with pytest.raises(ValueError, match="num_labels must be at least 2"):
        predict(model, BATCH)
    plain = adapted(bert(None, 3), LoraConfig, ["query"], task_type="SEQ_CLS")
    bayesianize(plain, "laplace", data=[{**BATCH, "labels": torch.arange(4) % 3}], progress=False)
    plain.get_base_model().config.problem_type = "multi_label_classification"
    with pytest.raises(ValueError, match="problem_type='multi_label_classification'"):
        predict(plain, BATCH)


def test_choices_are_classes_whatever_their_number() -> None:
    base = tiny_models.bert(BertForMultipleChoice, num_labels=1, **SMALL)
    model = adapted(base, BlobConfig, ["query"])
    batch = {k: v[:, None] for k, v in BATCH.items()}
    assert isinstance(predict(model, batch, n_samples=2), Prediction)


@pytest.mark.parametrize(
    ("problem", "width", "labels", "loss"),
    [
        (None, 1, torch.arange(4.0), nn.functional.mse_loss),
        ("regression", 3, torch.rand(4, 3), nn.functional.mse_loss),
        (
            "multi_label_classification",
            3,
            torch.rand(4, 3).round(),
            nn.functional.binary_cross_entropy,
        ),
    ],
)
@WEIGHTS
def test_trainer_evaluates_with_draws(
    config: Any, problem: str | None, width: int, labels: Tensor, loss: Any, tmp_path: Path
) -> None:
    model = adapted(bert(problem, width), config, ["query"], task_type="SEQ_CLS")
    data = [{"input_ids": IDS[i], "attention_mask": MASK[i], "labels": labels[i]} for i in range(4)]
    args = arguments(tmp_path)
    trainer = BayesTrainer(
        model=model, args=args, train_dataset=data, eval_dataset=data, eval_samples=3
    )
    found = predict(model, BATCH, n_samples=3)
    at = found.probs if isinstance(found, LabelPrediction) else found.mean
    expected = loss(at.squeeze(), labels.double())
    assert trainer.evaluate()["eval_loss"] == pytest.approx(float(expected), rel=1e-4)


# --- encoder-decoders ----------------------------------------------------------------------------

CHOICES = [3, 4, 5]


@pytest.mark.parametrize("length", [1, 4, 9])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("make", "targets"), [(t5, ["q", "v"]), (bart, ["q_proj", "v_proj"])], ids=["t5", "bart"]
)
def test_choices_of_the_decoders_last_token(
    make: Callable[[], nn.Module], targets: list[str], masked: bool, length: int
) -> None:
    model = adapted(make(), BlobConfig, targets, task_type="SEQ_2_SEQ_LM")
    decoded = torch.randint(3, 64, (4, length), generator=torch.Generator().manual_seed(5))
    batch = {**BATCH, "decoder_input_ids": decoded}
    last = torch.full((4,), length - 1)
    if masked:
        last = torch.tensor([0, 1, 2, 3]).clamp(max=length - 1)
        batch["decoder_attention_mask"] = (torch.arange(length) <= last[:, None]).long()
    with torch.no_grad():
        logits = model(**batch).logits
    expected = logits[torch.arange(4), last][:, CHOICES].double().softmax(-1)
    got = predict(model, batch, n_samples=0, choices=CHOICES)
    torch.testing.assert_close(got.probs, expected, rtol=1e-4, atol=1e-6)
    each = draws(model, 3, batch)[:, torch.arange(4), last][..., CHOICES].softmax(-1)
    got = predict(model, batch, n_samples=3, choices=CHOICES)
    torch.testing.assert_close(got.probs, each.mean(0), rtol=1e-4, atol=1e-6)


def test_encoder_decoders_need_decoder_tokens() -> None:
    model = adapted(t5(), BlobConfig, ["q"], task_type="SEQ_2_SEQ_LM")
    with pytest.raises(ValueError, match="must have decoder_input_ids"):
        predict(model, BATCH, choices=CHOICES)


# --- one example, no pad token -------------------------------------------------------------------


def _decoder(kind: str, pad: int | None) -> nn.Module:
    if kind == "gpt2":
        return gpt2(pad_token_id=pad)
    options = {"num_hidden_layers": 1, "num_labels": 3, "pad_token_id": pad}
    return llama(LlamaForSequenceClassification, **options)


ONE = {"input_ids": IDS[:1], "attention_mask": MASK[:1], "labels": torch.tensor([1])}


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("method", ["blob", "scalabl", "dropout", "tfb", "laplace"])
def test_one_example_without_a_pad_token(kind: str, method: str) -> None:
    """As with a pad token that the text does not have."""
    targets = ["c_attn"] if kind == "gpt2" else ["q_proj"]
    found = []
    for pad in (None, 0):
        configs: dict[str, Any] = {"blob": BlobConfig, "scalabl": ScalablConfig}
        options = {"lora_dropout": 0.5} if method == "dropout" else {}
        kind_of = configs.get(method, LoraConfig)
        model = adapted(_decoder(kind, pad), kind_of, targets, task_type="SEQ_CLS", **options)
        if method == "tfb":
            bayesianize(model, "tfb", data=[ONE] * 3, progress=False)
        elif method == "laplace":
            bayesianize(model, "laplace", data=[ONE] * 3, jacobian="repeat", progress=False)
        got = predict(model, ONE, n_samples=4)
        found.append(got.probs)
        assert model.get_base_model().config.pad_token_id == pad
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


def test_one_example_as_embeddings_without_a_pad_token() -> None:
    model = adapted(_decoder("llama", None), BlobConfig, ["q_proj"], task_type="SEQ_CLS")
    with torch.no_grad():
        embedded = {"inputs_embeds": model.get_input_embeddings()(IDS[:1])}
    got = predict(model, embedded, n_samples=4).probs
    want = predict(model, {"input_ids": IDS[:1]}, n_samples=4).probs
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert model.get_base_model().config.pad_token_id is None


def test_several_examples_still_need_a_pad_token() -> None:
    model = adapted(_decoder("llama", None), BlobConfig, ["q_proj"], task_type="SEQ_CLS")
    with pytest.raises(ValueError, match="padding token"):
        predict(model, {"input_ids": IDS})
    assert model.get_base_model().config.pad_token_id is None


# --- gradient accumulation -----------------------------------------------------------------------

# Rows differ in how many targets count, so that the mean over micro-batches is not the right one.
TOKENS = torch.where(torch.arange(6) < 1 + torch.arange(8)[:, None] % 5, 1, -100)
ROWS = tiny_models.ROWS[:8]


def _bert(kind: Any, **options: Any) -> Callable[[], nn.Module]:
    return partial(tiny_models.bert, kind, **SMALL, **options)


def _in_one_row(labels: Tensor) -> Tensor:
    """Other micro-batches than that of the row have no targets at all."""
    return torch.where(torch.arange(8)[:, None] == 4, labels, -100)


_CLASS = ROWS[:, 0] % 2
_TOKEN_CLASS = torch.where(TOKENS > 0, ROWS % 3, -100)
_TOKEN_IDS = torch.where(TOKENS > 0, ROWS, -100)
HEADS: dict[str, tuple[Callable[[], nn.Module], list[str], Tensor]] = {
    "classes": (_bert(BertForSequenceClassification), ["query"], _CLASS),
    "variational": (_bert(BertForSequenceClassification), ["query"], _CLASS),
    "regression": (
        _bert(BertForSequenceClassification, problem_type="regression"),
        ["query"],
        torch.rand(8, 3),
    ),
    "labels": (
        _bert(BertForSequenceClassification, problem_type="multi_label_classification"),
        ["query"],
        torch.rand(8, 3).round(),
    ),
    "tokens": (_bert(BertForTokenClassification), ["query"], _TOKEN_CLASS),
    "gpt2 tokens": (partial(gpt2, GPT2ForTokenClassification), ["c_attn"], _TOKEN_CLASS),
    "few tokens": (_bert(BertForTokenClassification), ["query"], _in_one_row(_TOKEN_CLASS)),
    "masked": (_bert(BertForMaskedLM), ["query"], _TOKEN_IDS),
    "few masked": (_bert(BertForMaskedLM), ["query"], _in_one_row(_TOKEN_IDS)),
    "next sentence": (_bert(BertForNextSentencePrediction), ["query"], _CLASS),
    "causal": (llama, ["q_proj"], _TOKEN_IDS),
    "t5": (t5, ["q"], _TOKEN_IDS),
    "bart": (bart, ["q_proj"], _TOKEN_IDS),
}


def _one_step(
    head: str, folder: Path, batch: int, steps: int, **options: Any
) -> tuple[float, float, dict[str, Tensor]]:
    make, targets, labels = HEADS[head]
    config, task = (PolarConfig, None) if head != "variational" else (PolarVbllConfig, "SEQ_CLS")
    model = adapted(make(), config, targets, task_type=task)
    args = arguments(
        folder,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=steps,
        max_steps=1,
        learning_rate=0.0,
        **options,
    )
    data = [{"input_ids": row, "labels": label} for row, label in zip(ROWS, labels, strict=True)]
    trainer = BayesTrainer(model=model, args=args, train_dataset=data, n_train=8)
    seen: dict[str, Tensor] = {}

    class Seen(TrainerCallback):
        def on_pre_optimizer_step(self, *_: Any, **kw: Any) -> None:
            named = kw["model"].named_parameters()
            seen.update({n: p.grad.clone() for n, p in named if p.grad is not None})

    trainer.add_callback(Seen())
    trainer.train()
    log = trainer.state.log_history[0]
    return log["loss"], log["nll"], seen


@pytest.mark.parametrize(("head", "smoothing"), [*((head, 0.0) for head in HEADS), ("tokens", 0.2)])
def test_loss_and_gradients_do_not_depend_on_accumulation(
    head: str, smoothing: float, tmp_path: Path
) -> None:
    """8 rows at once, or as micro-batches of 3, 3 and 2."""
    options = {"label_smoothing_factor": smoothing}
    loss, nll, gradients = _one_step(head, tmp_path, 8, 1, **options)
    # The loss of a variational head has its divergence too, once for each step.
    assert nll == pytest.approx(loss, rel=1e-5) or (head == "variational" and nll < loss)
    assert len(gradients) > 0
    split = _one_step(head, tmp_path, 3, 3, **options)
    assert split[:2] == pytest.approx((loss, nll), rel=1e-4)
    assert split[2].keys() == gradients.keys()
    for name, grad in gradients.items():
        torch.testing.assert_close(split[2][name], grad, rtol=1e-3, atol=1e-6)
