"""Likelihoods of labelled tokens: per-token labels of language models, and answers of several tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..batches import (
    IGNORED,
    as_batches,
    batch_size,
    eval_mode,
    fold_samples,
    inputs_of,
    labels_of,
    need_whole,
    split,
    text_list,
    to_device,
)
from ..metrics.calibration import bin_rows
from ..progress import progress_bar
from .decoding import exact_dtype, means
from .draws import WeightDraws
from .folding import plan
from .heads import ClassLogits
from .logits import ClassSums, Prediction
from .predict import text_draws
from .texts import perplexity

# Numbers in fp64 at a time, so that the draws' distributions take little memory beside their logits.
_AT_ONCE = 1 << 22

# By `loss_type` of transformers: logits at a token predict its own label, or that of the next token.
_OWN = ("ForMaskedLM", "ForTokenClassification")
_NEXT = ("ForCausalLM", "ForConditionalGeneration")


@dataclass(frozen=True)
class TokenPrediction:
    """What the mean of the draws' distributions says of N labelled tokens, on the CPU, fp64.

        p(y_t) = 1/S sum_s p_s(y_t)

    All draws see the same text. Logs and entropies are in nats.

    Attributes:
        log_probs: (N,) log p of the label.
        confidence: (N,) largest probability of p.
        predicted: (N,) int64, the token that has it.
        correct: (N,) bool, whether that is the label.
        entropy: (N,) entropy of p: all uncertainty.
        expected_entropy: (N,) mean entropy of the p_s: what is left where the weights are known.
        draw_log_probs: (S, N) log p_s of the label; one row for the posterior mean.
        example: (N,) number of each token's example.
        position: (N,) place of its label in the example.
        n_examples: number of examples, those without a labelled token too.
        n_samples: S; 0 for the posterior mean.
        entropy_bias: (N,) as in `Prediction`; None where it is not known.
    """

    log_probs: Tensor
    confidence: Tensor
    predicted: Tensor
    correct: Tensor
    entropy: Tensor
    expected_entropy: Tensor
    draw_log_probs: Tensor
    example: Tensor
    position: Tensor
    n_examples: int
    n_samples: int
    entropy_bias: Tensor | None = None

    @property
    def nll(self) -> float:
        """Mean of -log p over the tokens."""
        return -float(self.log_probs.mean())

    @property
    def perplexity(self) -> float:
        """exp(nll)."""
        return token_scores(self.log_probs, self.confidence, self.correct)["perplexity"]

    @property
    def accuracy(self) -> float:
        """Share of labels that are the most probable token."""
        return float(self.correct.double().mean())

    @property
    def ece(self) -> float:
        """Expected calibration error of the most probable token, 15 bins, as `metrics.ece`."""
        return bin_rows(self.confidence, self.correct, 15).ece

    @property
    def mutual_information(self) -> Tensor:
        """(N,) entropy - expected_entropy, at least 0: the part that is due to the weights."""
        return (self.entropy - self.expected_entropy).clamp(min=0)

    @property
    def draw_sequence_log_probs(self) -> Tensor:
        """(S, n_examples) log-probability of all labels of an example under each draw."""
        zeros = self.draw_log_probs.new_zeros(len(self.draw_log_probs), self.n_examples)
        return zeros.index_add_(1, self.example, self.draw_log_probs)

    @property
    def sequence_log_probs(self) -> Tensor:
        """(n_examples,) log 1/S sum_s prod_t p_s(y_t): each draw writes its whole text."""
        found = self.draw_sequence_log_probs
        return found.logsumexp(0) - math.log(len(found))

    def __len__(self) -> int:
        return len(self.log_probs)

    def scores(self) -> dict[str, float]:
        """accuracy, nll, perplexity and ece by name."""
        return token_scores(self.log_probs, self.confidence, self.correct)

    @staticmethod
    def concatenate(parts: Sequence[TokenPrediction]) -> TokenPrediction:
        """Join the predictions of successive batches.

        Raises:
            ValueError: there are none, or their numbers of draws differ.
        """
        if len({part.n_samples for part in parts}) != 1:
            raise ValueError(
                "TokenPrediction.concatenate: parts must have one number of draws, got "
                f"{[part.n_samples for part in parts]}"
            )
        joined: dict[str, Any] = {}
        some = [part for part in parts if len(part)] or parts[:1]  # without tokens no bias is known
        for name in (field.name for field in fields(TokenPrediction)):
            values = [getattr(part, name) for part in some]
            if isinstance(values[0], Tensor) and not any(v is None for v in values):
                joined[name] = torch.cat(values, 1 if name == "draw_log_probs" else 0)
        starts = [0]
        for part in parts:
            starts.append(starts[-1] + part.n_examples)
        joined["example"] = torch.cat([p.example + s for p, s in zip(parts, starts, strict=False)])
        return TokenPrediction(**joined, n_examples=starts[-1], n_samples=parts[0].n_samples)


def token_scores(log_probs: Tensor, confidence: Tensor, correct: Tensor) -> dict[str, float]:
    """Scores of tokens (N,): as the properties of `TokenPrediction`, NaN where there is none."""
    nll = -float(log_probs.double().mean())
    return {
        "accuracy": float(correct.double().mean()),
        "nll": nll,
        "perplexity": perplexity(nll),
        "ece": bin_rows(confidence.double(), correct.bool(), 15).ece
        if len(log_probs)
        else math.nan,
    }


def label_shift(model: nn.Module) -> int | None:
    """By how many tokens labels follow the logits that predict them; None without labels of tokens."""
    base: Any = getattr(model, "get_base_model", lambda: model)()
    kind = getattr(base, "loss_type", None)
    if isinstance(base, ClassLogits):
        return None
    if getattr(getattr(base, "config", None), "is_encoder_decoder", False):
        return 0 if kind in _NEXT else None
    if kind in _OWN:
        return 0
    return 1 if kind in _NEXT or "LMHead" in type(base).__name__ else None


def token_inputs(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Inputs of a pass whose logits predict labels (B, T), on the device of the batch, without the labels.

    A model with a decoder gets what it reads from the labels; no model keeps a cache.
    """
    inputs, labels = inputs_of(batch), labels_of(batch)
    base: Any = getattr(model, "get_base_model", lambda: model)()
    decodes = getattr(base.config, "is_encoder_decoder", False)
    if decodes and inputs.get("decoder_input_ids") is None and labels is not None:
        inputs["decoder_input_ids"] = base.prepare_decoder_input_ids_from_labels(labels=labels)
    if getattr(base.config, "use_cache", False):
        inputs["use_cache"] = False
    return inputs


def token_logits(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """Logits (B, T, V) of a model with labels of tokens."""
    logits: Tensor = model(**token_inputs(model, batch)).logits
    return logits


def labels_at_logits(batch: Mapping[str, Any], shift: int) -> Tensor | None:
    """The labels (B, T) of a batch, each at the logits that predict it; None where it has none.

    Args:
        batch: a batch.
        shift: as `label_shift` says.

    Raises:
        ValueError: they are no labels of tokens.
    """
    labels = labels_of(batch)
    if labels is None:
        return None
    if labels.dim() != 2 or labels.is_floating_point():
        raise ValueError(
            "labels must be token ids (B, T), -100 where none counts, for a model with labels of tokens and "
            f"no choices, got {labels.dtype} {tuple(labels.shape)}; give choices=[ids] for labels (B,)"
        )
    return torch.nn.functional.pad(labels[:, shift:], (0, shift), value=IGNORED)


@torch.no_grad()
def predict_tokens(
    model: nn.Module,
    data: Mapping[str, Any] | Iterable[Any] | Dataset[Any],
    *,
    n_samples: int = 10,
    seed: int = 0,
    draws: str = "antithetic",
    memory_budget: int | None = None,
    batch_size: int = 8,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    progress: bool = False,
) -> TokenPrediction:
    """Likelihoods of labelled tokens under the mean of S draws' distributions.

        nll = -1/N sum_t log 1/S sum_s p_s(y_t | what is before it)

    The labels are those that a causal model (or one with a decoder, a masked language model, a token
    classifier) is trained with: (B, T), -100 where a token does not count. Draw s has the same weights for
    all tokens of all texts: this is `score_texts` for batches.

    Args:
        model: a model with an adapter, as for `generate`.
        data: a batch with labels, or several as `predict_dataset` takes them.
        n_samples: S; 0 for the posterior mean.
        seed: seed of the draws.
        draws: as for `generate`.
        memory_budget: bytes that the activations of a pass may take, as in `predict`: a batch is split
            into examples; all draws of an example are in one pass.
        batch_size, collate_fn: for a data set.
        progress: show a bar over the batches.

    Returns:
        `TokenPrediction` of all labelled tokens, in order. Cost: a forward pass of S copies of the
        batches; memory for their logits, S * T * vocabulary for one example at least.

    Raises:
        ValueError: as `generate`, the model has no labels of tokens, or the labels do not fit.

    Example:
        found = predict_tokens(model, [collate(rows)], n_samples=10)
        print(found.nll, found.perplexity, found.ece)
    """
    need_whole("predict_tokens: n_samples", n_samples, 0)
    shift = label_shift(model)
    if shift is None:
        raise ValueError(
            f"predict_tokens: model must be one with labels of tokens, got {type(model).__name__}; "
            "for one label of each text use predict"
        )
    drawing = text_draws("predict_tokens", model, n_samples, draws)
    batches = [data] if isinstance(data, Mapping) else as_batches(data, batch_size, collate_fn)
    parts = [
        part
        for batch in progress_bar(progress, batches, desc="predict tokens", unit="batch")
        for part in _of_batch(drawing, batch, shift, n_samples, seed, draws, memory_budget)
    ]
    if not parts:
        raise ValueError("predict_tokens: data must have at least one example, got none")
    return TokenPrediction.concatenate(parts)


def _of_batch(
    drawing: WeightDraws,
    batch: Mapping[str, Any],
    shift: int,
    n_samples: int,
    seed: int,
    draws: str,
    memory_budget: int | None,
) -> list[TokenPrediction]:
    """Parts of a batch that fit the memory."""
    model, labels = drawing.model, labels_of(batch)
    if labels is None or labels.dim() != 2 or labels.is_floating_point():
        got = "none" if labels is None else f"{labels.dtype} {tuple(labels.shape)}"
        raise ValueError(
            f"predict_tokens: labels must be token ids (B, T), -100 where none counts, got {got}"
        )
    inputs = token_inputs(model, to_device(batch, next(model.parameters()).device))
    copies = max(drawing.copies(n_samples), 1)
    size = batch_size(inputs)
    at_once, _ = plan(
        model, inputs, copies, samples_per_pass=copies, memory_budget=memory_budget, split=True
    )
    found = []
    with eval_mode(model):
        for part in split({**inputs, "labels": labels}, -(-size // at_once)):
            own = inputs_of(part)
            rows = batch_size(own)
            with drawing.throughout(n_samples, seed, rows, draws) as more:
                logits = drawing.generator(**fold_samples(own, copies), **more).logits
            targets = part["labels"][:, shift:]
            if logits.dim() != 3 or logits.shape[1] - shift != targets.shape[1]:
                raise ValueError(
                    f"predict_tokens: labels must be (B, T) for logits (B, T, V), got labels "
                    f"{tuple(part['labels'].shape)} and logits {tuple(logits.shape[-2:])} of each text"
                )
            logits = logits[:, : logits.shape[1] - shift].unflatten(0, (copies, rows))
            dependent = drawing.dependent(draws, "example")
            found.append(labelled(logits, targets, dependent, n_samples and copies, shift))
    return found


def labelled(
    logits: Tensor, labels: Tensor, dependent: int, n_samples: int, first: int = 0
) -> TokenPrediction:
    """What the mean of S distributions says of labels.

    Args:
        logits: (S, B, T, V).
        labels: (B, T), -100 where a token does not count.
        dependent: number of successive draws that depend on each other.
        n_samples: S, or 0 for the posterior mean.
        first: position of the first label in its text.

    Raises:
        ValueError: a label is no class.
    """
    example, position = (labels != IGNORED).nonzero(as_tuple=True)
    targets = labels[example, position]
    if len(targets) and not 0 <= int(targets.min()) <= int(targets.max()) < logits.shape[-1]:
        raise ValueError(
            f"predict_tokens: labels must be token ids below {logits.shape[-1]}, or -100, got "
            f"{int(targets.min())} to {int(targets.max())}"
        )
    parts: list[list[Tensor]] = [[] for _ in range(8)]
    count = max(16, _AT_ONCE // (len(logits) * logits.shape[-1]))
    for start in range(0, len(targets), count):
        where = slice(start, start + count)
        at = example[where].to(logits.device), position[where].to(logits.device)
        each = logits[:, at[0], at[1]].to(exact_dtype(logits))
        target = targets[where].to(logits.device)
        mean = means(each, dependent)
        top, best = mean.log_probs.max(-1)
        drawn = each.log_softmax(-1).gather(-1, target.expand(len(each), -1)[..., None])[..., 0]
        own = mean.log_probs.gather(-1, target[:, None])[:, 0]
        bias = torch.full_like(own, math.nan) if mean.entropy_bias is None else mean.entropy_bias
        for kept, value in zip(
            parts,
            (
                own,
                top.exp(),
                best == target,
                mean.entropy,
                mean.expected_entropy,
                bias,
                drawn.T,
                best,
            ),
            strict=True,
        ):
            kept.append(value.cpu())
    empty = torch.zeros(0, dtype=torch.float64)
    joined = [torch.cat(kept) if kept else empty for kept in parts]
    joined = [value if value.dtype == torch.bool else value.double() for value in joined]
    known = n_samples and len(targets) and not bool(joined[5].isnan().any())
    return TokenPrediction(
        log_probs=joined[0],
        confidence=joined[1],
        predicted=joined[7].long(),
        correct=joined[2].bool(),
        entropy=joined[3],
        expected_entropy=joined[4],
        draw_log_probs=joined[6].T if len(targets) else empty.expand(len(logits), 0),
        example=example.cpu(),
        position=position.cpu() + first,
        n_examples=len(labels),
        n_samples=n_samples,
        entropy_bias=joined[5] if known else None,
    )


def at_the_answer(batch: Mapping[str, Any], choices: Sequence[int]) -> dict[str, Any]:
    """A batch of texts with their answers as one of prompts, for `predict` with choices.

    Args:
        batch: with labels (B,), classes, which stays as it is; or with labels (B, T) of a causal model,
            whose first token that counts (not -100) is the answer.
        choices: ids of the answer tokens.

    Raises:
        ValueError: a row has no answer, or one that is no choice.
    """
    labels = labels_of(batch)
    if labels is None or labels.dim() != 2:
        return dict(batch)
    counted = labels != IGNORED
    where = counted.int().argmax(-1)
    answers = labels.gather(1, where[:, None])
    same = answers == torch.tensor(list(choices), device=labels.device)
    if not bool((same.any(-1) & (where > 0)).all()):
        row = int((~same.any(-1) | (where == 0)).int().argmax())
        raise ValueError(
            f"choices: the first token that counts in each row of labels must be one of {list(choices)}, "
            f"behind a prompt, got {int(answers[row])} at {int(where[row])}; mask the prompt with -100, or "
            "score answers of several tokens with score_answers"
        )
    before = torch.arange(labels.shape[1], device=labels.device) < where[:, None]
    mask = batch.get("attention_mask")
    hidden = before.long() if mask is None else mask * before
    return {**inputs_of(batch), "attention_mask": hidden, "labels": same.int().argmax(-1)}


def check_length(op: str, model: nn.Module, tokens: int) -> None:
    """Whether a text fits a decoder.

    Raises:
        ValueError: it has more tokens than the model has positions.
    """
    base: Any = getattr(model, "get_base_model", lambda: model)()
    room = positions(base)
    if room is not None and tokens > room:
        raise ValueError(
            f"{op}: each text, with its prompt, must fit the model's {room} positions, got {tokens} tokens; "
            "shorten it"
        )


def positions(model: Any) -> int | None:
    """How many tokens a model takes, by its configuration."""
    room = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return room if isinstance(room, int) else None


# --- Answers -------------------------------------------------------------------------------------


def common_beginning(ids: Sequence[int], beginning: Sequence[int]) -> int:
    """How many tokens two texts share at their beginnings."""
    count = 0
    for a, b in zip(ids, beginning, strict=False):
        if a != b:
            break
        count += 1
    return count


@torch.no_grad()
def score_answers(
    model: nn.Module,
    tokenizer: Any,
    prompts: str | Sequence[str],
    answers: Sequence[str],
    *,
    n_samples: int = 10,
    seed: int = 0,
    draws: str = "antithetic",
    per_token: bool = False,
    progress: bool = False,
) -> Prediction:
    """The distribution over answers of any number of tokens, by their probability behind a prompt.

        p(c | x) = 1/S sum_s l_s(c | x) / sum_c' l_s(c' | x),  l_s(c | x) = prod_t p_s(c_t | x, c_<t)

    For answers of one token these are the numbers of `predict(..., choices=...)`.

    Args:
        model: a causal model with an adapter, as for `generate`.
        tokenizer: its tokenizer.
        prompts: what comes before the answers, one text or several.
        answers: at least two, as they follow the prompt: " yes" with its space.
        n_samples: S; 0 for the posterior mean.
        seed: seed of the draws.
        draws: as for `generate`.
        per_token: l_s to the power of 1 / number of tokens, so that long answers are no less probable for
            their length alone.
        progress: show a bar over the prompts.

    Returns:
        `Prediction` with a row for each prompt and a class for each answer. Cost: S forward passes of each
        prompt with each answer.

    Raises:
        ValueError: as `generate`, there are fewer than two answers, one has no token of its own, or one is
            too long for the model.
    """
    need_whole("score_answers: n_samples", n_samples, 0)
    if isinstance(answers, str) or len(answers) < 2 or len(set(answers)) < len(answers):
        raise ValueError(
            f"score_answers: answers must be at least two texts, all different, got {answers!r}"
        )
    base: Any = getattr(model, "get_base_model", lambda: model)()
    if label_shift(model) != 1:
        raise ValueError(
            f"score_answers: model must be a causal model, got {type(base).__name__}; use predict"
        )
    given = text_list("score_answers: prompts", prompts)
    if not given:
        raise ValueError("score_answers: prompts must have at least one text, got none")
    drawing = text_draws("score_answers", model, n_samples, draws)
    found = []
    for prompt in progress_bar(progress, given, desc="score answers", unit="prompt"):
        batch = _rows_of_answers(tokenizer, prompt, answers)
        check_length("score_answers", model, batch["input_ids"].shape[1])
        tokens = predict_tokens(model, batch, n_samples=n_samples, seed=seed, draws=draws)
        scores = tokens.draw_sequence_log_probs
        if per_token:
            scores = scores / tokens.example.bincount(minlength=len(answers))
        sums = ClassSums(keep=False, dependent=drawing.dependent(draws, "example"))
        sums.add(scores[:, None])
        found.append(sums.result(tokens.n_samples, None))
    return Prediction.concatenate(found)


def _rows_of_answers(tokenizer: Any, prompt: str, answers: Sequence[str]) -> dict[str, Tensor]:
    """A prompt with each answer, padded on the right; labels are the answers' tokens."""
    rows = [list(tokenizer(prompt + answer)["input_ids"]) for answer in answers]
    before = tokenizer(prompt)["input_ids"]
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
    for i, (row, answer) in enumerate(zip(rows, answers, strict=True)):
        start = max(1, common_beginning(row, before))
        if start >= len(row):
            raise ValueError(
                f"score_answers: an answer must have a token of its own behind the prompt, got {answer!r}"
            )
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
        labels[i, start : len(row)] = ids[i, start : len(row)]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}
