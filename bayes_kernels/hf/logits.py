"""Class logits of a model's outputs, and predictive distributions from draws of them."""

from __future__ import annotations

import copy
import inspect
import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from .. import functional, random, reference
from ..batches import inputs_of
from ._compat import without_padding
from .heads import ClassLogits

_TOKENS = ("input_ids", "inputs_embeds")


@dataclass(frozen=True)
class Prediction:
    """Class distributions of a batch, on the CPU.

    Attributes:
        log_probs: (B, C) log of the mean probability over the draws, fp64.
        entropy: (B,) entropy of the mean, nats: total uncertainty.
        expected_entropy: (B,) mean entropy of the draws, nats: noise in the data.
        n_samples: number of draws; 0 for the posterior mean.
        labels: (B,) labels of the batch, where it had them.
        sample_log_probs: (S, B, C) of the single draws, where asked for.
        entropy_bias: (B,) estimate of how much lower `entropy` is on average than with infinitely many
            draws, nats; None where it is not known: draws of logits, one set of weights, fewer than
            two independent draws or pairs.
        shared_layers: layers that ran once for all draws, below the first one in which draws differ.
        draws_used: (B,) draws that each example has, where `stop` ended some before n_samples.
    """

    log_probs: Tensor
    entropy: Tensor
    expected_entropy: Tensor
    n_samples: int
    labels: Tensor | None = None
    sample_log_probs: Tensor | None = None
    entropy_bias: Tensor | None = None
    shared_layers: int = 0
    draws_used: Tensor | None = None

    @property
    def probs(self) -> Tensor:
        """(B, C) mean probabilities."""
        return self.log_probs.exp()

    @property
    def mutual_information(self) -> Tensor:
        """(B,) entropy - expected_entropy, nats, at least 0: what more data could resolve.

        Of few draws it is too low on average, by about 1 / S of itself for S independent draws; for
        pairs by less where the draws differ little. `corrected_mutual_information` is not.
        """
        return (self.entropy - self.expected_entropy).clamp(min=0)

    @property
    def corrected_mutual_information(self) -> Tensor | None:
        """(B,) mutual information without the bias of few draws, nats; None where that is not known.

        entropy - expected_entropy + `entropy_bias`, which is

            sum_c var_c / (2 P p_c),

        with var_c the sample variance of the probability of class c over P independent draws, or over
        the means of P pairs: the second-order term of the entropy's expansion, and of its jackknife. For
        comparing different numbers of draws; its own error is a little larger.
        """
        if self.entropy_bias is None:
            return None
        return (self.entropy - self.expected_entropy + self.entropy_bias).clamp(min=0)

    @property
    def classes(self) -> Tensor:
        """(B,) most probable class."""
        return self.log_probs.argmax(-1)

    def __len__(self) -> int:
        return self.log_probs.shape[0]

    @property
    def logits(self) -> Tensor:
        """(B, C) `log_probs`, whose softmax is `probs`."""
        return self.log_probs

    @staticmethod
    def concatenate(parts: Sequence[Prediction]) -> Prediction:
        """Join the predictions of successive batches.

        Raises:
            ValueError: there are none, or their numbers of classes or draws differ.
        """
        return _concatenated(parts, "classes")


@dataclass(frozen=True)
class LabelPrediction:
    """Independent yes-or-no labels of a batch (multi-label classification), on the CPU, fp64.

    Attributes:
        probs: (B, L) mean probability of each label over the draws.
        entropy: (B, L) entropy of the Bernoulli distribution with that probability, nats.
        expected_entropy: (B, L) mean entropy of the draws, nats.
        n_samples: number of draws; 0 for the posterior mean.
        labels: (B, L) labels of the batch, where it had them.
        sample_probs: (S, B, L) of the single draws, where asked for.
        shared_layers: layers that ran once for all draws, below the first one in which draws differ.
    """

    probs: Tensor
    entropy: Tensor
    expected_entropy: Tensor
    n_samples: int
    labels: Tensor | None = None
    sample_probs: Tensor | None = None
    shared_layers: int = 0

    @property
    def mutual_information(self) -> Tensor:
        """(B, L) entropy - expected_entropy, nats, at least 0: what more data could resolve."""
        return (self.entropy - self.expected_entropy).clamp(min=0)

    @property
    def logits(self) -> Tensor:
        """(B, L) log-odds of `probs`, whose sigmoid they are."""
        return torch.logit(self.probs, eps=1e-15)

    def __len__(self) -> int:
        return self.probs.shape[0]

    @staticmethod
    def concatenate(parts: Sequence[LabelPrediction]) -> LabelPrediction:
        """Join the predictions of successive batches; raises as `Prediction.concatenate`."""
        return _concatenated(parts, "labels")


@dataclass(frozen=True)
class NumberPrediction:
    """Numbers of a batch (regression, rewards), on the CPU, fp64: Gaussian with

        mean = 1/S sum_s f_s(x),  variance = 1/(S - 1) sum_s (f_s(x) - mean)^2

    The variance is due to the posterior of the weights. Noise of the targets comes on top; a model
    trained with squared errors does not estimate it.

    Attributes:
        mean: (B, D).
        variance: (B, D); 0 for fewer than two draws.
        n_samples: S; 0 for the posterior mean.
        labels: targets of the batch, where it had them.
        samples: (S, B, D) outputs of the single draws, where asked for.
        shared_layers: layers that ran once for all draws, below the first one in which draws differ.
    """

    mean: Tensor
    variance: Tensor
    n_samples: int
    labels: Tensor | None = None
    samples: Tensor | None = None
    shared_layers: int = 0

    @property
    def std(self) -> Tensor:
        """(B, D) root of the variance."""
        return self.variance.sqrt()

    @property
    def logits(self) -> Tensor:
        """(B, D) `mean`."""
        return self.mean

    def __getattr__(self, name: str) -> Tensor:
        if name in ("probs", "log_probs", "entropy", "expected_entropy", "mutual_information"):
            raise AttributeError(
                f"{name}: the model must have classes, got a head of numbers (num_labels=1, or "
                "problem_type='regression'); use mean and variance"
            )
        raise AttributeError(f"NumberPrediction has no attribute {name!r}")

    def __len__(self) -> int:
        return self.mean.shape[0]

    @staticmethod
    def concatenate(parts: Sequence[NumberPrediction]) -> NumberPrediction:
        """Join the predictions of successive batches; raises as `Prediction.concatenate`."""
        return _concatenated(parts, "columns")


AnyPrediction = Prediction | LabelPrediction | NumberPrediction


def _concatenated(parts: Sequence[Any], what: str) -> Any:
    """Parts of one kind as one: draws are the first dimension of "sample" tensors."""
    names = [field.name for field in fields(parts[0])] if parts else []
    shapes = {(getattr(part, names[0]).shape[1], part.n_samples) for part in parts}
    if len(shapes) != 1:
        raise ValueError(
            f"Prediction.concatenate: parts must have one number of {what} and draws, got "
            f"{sorted(shapes)}"
        )
    joined: dict[str, Any] = {"n_samples": parts[0].n_samples}
    joined["shared_layers"] = min(part.shared_layers for part in parts)
    for name in names:
        tensors = [getattr(part, name) for part in parts]
        if name in joined or any(t is None for t in tensors):
            continue
        joined[name] = torch.cat(tensors, 1 if name.startswith("sample") else 0)
    return type(parts[0])(**joined)


class ClassSums:
    """Sums over draws of softmax, as logs, and of entropies; of squares over independent groups of draws.

    Args:
        keep: whether to keep the draws.
        dependent: number of successive draws that depend on each other, a group.
    """

    def __init__(self, keep: bool, dependent: int) -> None:
        self.keep, self.dependent = keep, dependent
        self.kept: list[Tensor] = []
        self.draws = 0
        self.log_mean: Any = None
        self.entropy: Any = None
        self.groups = 0
        self.sum: Any = 0.0
        self.squares: Any = 0.0
        self.rest: Tensor | None = None

    def add(self, logits: Tensor) -> None:
        """Logits (count, B, C) of further draws."""
        log_probs = logits.log_softmax(-1)
        part, entropy = torch.logsumexp(log_probs, 0), _entropy(log_probs).sum(0)
        self.log_mean = part if self.draws == 0 else torch.logaddexp(self.log_mean, part)
        self.entropy = entropy if self.draws == 0 else self.entropy + entropy
        self.draws += len(logits)
        self._add_groups(log_probs.exp())
        if self.keep:
            self.kept.append(log_probs.cpu())

    def _add_groups(self, probs: Tensor) -> None:
        """Groups may begin in one pass and end in the next."""
        probs = probs if self.rest is None else torch.cat([self.rest, probs])
        whole = len(probs) // self.dependent
        self.rest = probs[whole * self.dependent :]
        means = probs[: whole * self.dependent].unflatten(0, (whole, self.dependent)).mean(1)
        self.groups += whole
        self.sum, self.squares = self.sum + means.sum(0), self.squares + means.square().sum(0)

    def _entropy_bias(self, probs: Tensor) -> Tensor | None:
        if self.groups < 2:
            return None
        variance = (self.squares - self.sum.square() / self.groups) / (self.groups - 1)
        independent = self.draws / self.dependent
        least = torch.finfo(probs.dtype).tiny
        terms = variance.clamp(min=0) / (2 * independent * probs.clamp(min=least))
        return terms.sum(-1)

    def mean(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Log-probabilities (B, C) of the mean over all draws; its entropy, expected entropy, bias (B,)."""
        log_mean = self.log_mean - math.log(self.draws)
        bias = self._entropy_bias(log_mean.exp())
        return log_mean, _entropy(log_mean), self.entropy / self.draws, bias

    def result(self, n_samples: int, labels: Tensor | None) -> Prediction:
        """The mean over all draws."""
        log_mean, entropy, expected, bias = self.mean()
        return Prediction(
            log_probs=log_mean.cpu(),
            entropy=entropy.cpu(),
            expected_entropy=expected.cpu(),
            n_samples=n_samples,
            labels=labels,
            sample_log_probs=torch.cat(self.kept) if self.kept else None,
            entropy_bias=bias.cpu() if n_samples and bias is not None else None,
        )


class _Outputs:
    """The outputs (S, B, L) of all draws: a few numbers for each example."""

    def __init__(self, keep: bool, dependent: int) -> None:
        self.keep = keep
        self.parts: list[Tensor] = []

    def add(self, logits: Tensor) -> None:
        """Outputs (count, B, L) of further draws."""
        self.parts.append(logits.cpu())


class _Labels(_Outputs):
    def result(self, n_samples: int, labels: Tensor | None) -> LabelPrediction:
        """Bernoulli distributions with the mean probabilities."""
        logits = torch.cat(self.parts)
        probs = logits.sigmoid()
        of_draws = -(probs * logsigmoid(logits) + (1 - probs) * logsigmoid(-logits))
        mean, rest = probs.mean(0), (-logits).sigmoid().mean(0)
        return LabelPrediction(
            probs=mean,
            entropy=torch.special.entr(mean) + torch.special.entr(rest),
            expected_entropy=of_draws.mean(0),
            n_samples=n_samples,
            labels=labels,
            sample_probs=probs if self.keep else None,
        )


class _Numbers(_Outputs):
    def result(self, n_samples: int, labels: Tensor | None) -> NumberPrediction:
        """Mean and variance over the draws."""
        values = torch.cat(self.parts)
        single = len(values) < 2
        return NumberPrediction(
            mean=values.mean(0),
            variance=torch.zeros_like(values[0]) if single else values.var(0),
            n_samples=n_samples,
            labels=labels,
            samples=values if self.keep else None,
        )


GATHERED = {"classes": ClassSums, "labels": _Labels, "numbers": _Numbers}


def _entropy(log_probs: Tensor) -> Tensor:
    probs = log_probs.exp()
    return 0.0 - torch.where(probs == 0, 0.0, probs * log_probs).sum(-1)  # never -0.0


# --- Gaussian logits -----------------------------------------------------------------------------


def mean_prediction(logits: Tensor, labels: Tensor | None, *, keep: bool) -> Prediction:
    """The prediction of one set of logits (B, C): no draws, and no uncertainty of the weights.

    Args:
        logits: (B, C).
        labels: (B,), which the prediction carries along.
        keep: whether `sample_log_probs` holds it as the only draw.
    """
    log_probs = logits.double().log_softmax(-1).cpu()
    entropy = _entropy(log_probs)
    kept = log_probs[None] if keep else None
    return Prediction(log_probs, entropy, entropy, 0, labels, kept)


def gaussian_prediction(
    mean: Tensor,
    cov: Tensor,
    labels: Tensor | None,
    *,
    n_samples: int,
    seed: int,
    method: str = "mc",
    keep: bool = False,
) -> Prediction:
    """The prediction of Gaussian logits, by draws of them or in closed form.

    Every example has the same noise, so that results do not depend on how examples are batched. An
    even number of draws is drawn in pairs mean + e, mean - e: shared noise whose sum is not zero
    favours one class in all examples (of two classes, 1,000 draws without pairs took wide posteriors
    5 points of accuracy below their means, where the exact integral never changes which is likelier).

    Args:
        mean: (B, C).
        cov: variances (B, C), or covariances (B, C, C).
        labels: (B,), which the prediction carries along.
        n_samples: number of draws, at least 1.
        seed: seed of the draws.
        method: as in `bayes_kernels.functional.mc_predict`.
        keep: whether `sample_log_probs` holds the draws.

    Cost: draws are averaged as they are made; with `keep` their (S, B, C) logits are in memory.
    """
    key = random.key(seed, mean.device)
    same = torch.zeros(len(mean), dtype=torch.int64, device=mean.device)
    paired = method == "mc" and n_samples % 2 == 0
    drawn = functional.mc_predict(
        mean, cov, method=method, n_samples=n_samples, key=key, ids=same, antithetic=paired
    )
    kept = None
    if keep:  # the draws that mc_predict has averaged, written out
        classes = mean.shape[1]
        noise = reference.logit_noise(key, 1, n_samples, classes, ids=same[:1], antithetic=paired)
        noise = noise.expand(len(mean), -1, -1).to(mean.dtype)
        samples = reference.sampled_logits(mean, cov, noise).transpose(0, 1)
        kept = samples.double().log_softmax(-1).cpu()
    expected = drawn.expected_entropy
    if expected is None:  # "probit" does not know
        expected = torch.full_like(drawn.entropy, math.nan)
    return Prediction(
        log_probs=drawn.log_probs.double().cpu(),
        entropy=drawn.entropy.double().cpu(),
        expected_entropy=expected.double().cpu(),
        n_samples=n_samples,
        labels=labels,
        sample_log_probs=kept,
    )


# --- Logits of a pass ----------------------------------------------------------------------------


def token_choices(op: str, choices: Sequence[int]) -> list[int]:
    """Ids of answer tokens.

    Raises:
        ValueError: they are no integers, fewer than two, or not all different.
    """
    try:
        found = [operator.index(c) for c in choices]
    except TypeError:
        raise ValueError(
            f"{op}: choices must be token ids, got {choices!r}; for an answer pass the id that "
            "the tokenizer gives it"
        ) from None
    if len(found) < 2 or len(set(found)) < len(found):
        raise ValueError(
            f"{op}: choices must be at least two token ids, all different, got {found}"
        )
    return found


class LogitRows:
    """Takes the (B, C) class logits from the outputs of a model."""

    def __init__(
        self, model: nn.Module, inputs: Mapping[str, Any], choices: Sequence[int] | None
    ) -> None:
        self.choices: list[int] | None = None
        self.last: Tensor | None = None
        self.options: dict[str, Any] = {}
        if choices is None:
            return
        self.choices = token_choices("predict", choices)
        base: Any = getattr(model, "get_base_model", lambda: model)()
        prefix = ""
        if getattr(getattr(base, "config", None), "is_encoder_decoder", False):
            prefix = "decoder_"  # the logits are the decoder's
            if not any(inputs.get(f"decoder_{name}") is not None for name in _TOKENS):
                raise ValueError(
                    "predict: batch must have decoder_input_ids for choices of an encoder-decoder, "
                    f"got {sorted(inputs)}; begin with the model's decoder_start_token_id"
                )
        mask = inputs.get(f"{prefix}attention_mask")
        if mask is not None and mask.dim() == 2:
            positions = torch.arange(mask.shape[1], device=mask.device)
            self.last = (mask.ne(0) * positions).argmax(-1)
        at_the_end = mask is None or self.last is None
        if mask is not None and self.last is not None:
            at_the_end = bool((self.last == mask.shape[1] - 1).all())
        if at_the_end and "logits_to_keep" in inspect.signature(base.forward).parameters:
            self.options["logits_to_keep"] = 1
            self.last = None

    def select(self, rows: Tensor) -> LogitRows:
        """Of some rows of the batch, by number."""
        other = copy.copy(self)
        other.last = None if self.last is None else self.last[rows.to(self.last.device)]
        return other

    def of(self, outputs: Any, count: int) -> Tensor:
        """Class logits (count * B, C)."""
        logits = outputs["logits"] if isinstance(outputs, Mapping) else outputs[0]
        if logits.dim() == 2 and self.choices is None:
            return logits
        if logits.dim() != 3 or self.choices is None:
            raise ValueError(
                "predict: logits must be (B, C) without choices, or (B, T, V) with choices=[token "
                f"ids], got {tuple(logits.shape)} and choices={self.choices}"
            )
        if not 0 <= min(self.choices) <= max(self.choices) < logits.shape[-1]:
            raise ValueError(
                f"predict: choices must be token ids below {logits.shape[-1]}, got {self.choices}"
            )
        if self.last is None:
            logits = logits[:, -1]
        else:
            rows = torch.arange(len(logits), device=logits.device)
            logits = logits[rows, _moved(self.last.repeat(count), logits)]
        return logits.index_select(1, _moved(torch.tensor(self.choices), logits))


def forward_logits(
    model: nn.Module, batch: Mapping[str, Any], choices: Sequence[int] | None = None
) -> Tensor:
    """Class logits (B, C) of a forward pass: of a classifier, or of the answer tokens at the last token.

    Args:
        model: the model.
        batch: its inputs; labels are set aside.
        choices: ids of the answer tokens, for causal language models.
    """
    inputs = inputs_of(batch)
    rows = LogitRows(model, inputs, choices)
    with without_padding(model, inputs):
        return rows.of(model(**{**inputs, **rows.options}), 1)


def _moved(t: Tensor, like: Tensor) -> Tensor:
    """t on the device of another; CUDA need not have finished its work for a small copy."""
    return t.to(like.device, non_blocking=like.is_cuda)


# --- What a head predicts ------------------------------------------------------------------------


def target_kind(model: nn.Module, width: int, labels: Tensor | None = None) -> str:
    """What a model's logits of that width stand for: "classes", "labels" or "numbers".

    "labels": independent yes-or-no answers (`problem_type="multi_label_classification"`). "numbers":
    regression, which one column without a problem_type also means, as for reward models. Without a
    problem_type floating-point labels mean independent answers, as they do for transformers' loss.

    Raises:
        ValueError: one class only.
    """
    base: Any = getattr(model, "get_base_model", lambda: model)()
    choices = any("ForMultipleChoice" in cls.__name__ for cls in type(base).__mro__)
    if choices or isinstance(base, ClassLogits):
        return "classes"
    problem = getattr(getattr(base, "config", None), "problem_type", None)
    if problem == "multi_label_classification":
        return "labels"
    if problem == "regression" or (problem is None and width == 1):
        return "numbers"
    if problem is None and labels is not None and labels.is_floating_point():
        return "labels"
    if width == 1:
        raise ValueError(
            f"predict: num_labels must be at least 2 for problem_type={problem!r}, got 1; load the "
            "model with problem_type='regression', or with two classes"
        )
    return "classes"


def need_classes(op: str, model: nn.Module) -> None:
    """Refuse a model whose head gives numbers or labels, for methods whose posterior is of classes.

    Raises:
        ValueError: as it says; the message names num_labels and problem_type.
    """
    base: Any = getattr(model, "get_base_model", lambda: model)()
    config = getattr(base, "config", None)
    width, problem = getattr(config, "num_labels", 2), getattr(config, "problem_type", None)
    if target_kind(model, width) != "classes":
        raise ValueError(
            f"{op}: the head must have at least two classes, num_labels >= 2 and problem_type None or "
            f"'single_label_classification', got num_labels={width}, problem_type={problem!r}; "
            "methods that train a posterior of the weights, such as BLoB, predict numbers and "
            "independent labels too"
        )
