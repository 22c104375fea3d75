"""Predictive distributions of classes, labels and numbers: S posterior draws folded into the batch."""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid
from tqdm.auto import tqdm

from .. import functional, random, reference
from ..batches import (
    as_batches,
    batch_size,
    eval_mode,
    fold_samples,
    inputs_of,
    labels_of,
    to_device,
)
from ._compat import without_padding
from .baselines import Ensemble, dropout_draws, dropout_layers
from .laplace_lora import LaplacePosterior, laplace_posterior
from .last_layer import class_logits, find_head, need_classes, target_kind
from .posterior import (
    bayes_layers,
    draws_weights,
    noise_state,
    posterior,
    warn_uncalled,
    without_effect,
)
from .variants import BayesVariant

_TOKENS = ("input_ids", "inputs_embeds")
# Share of free device memory, and bytes on the CPU, that activations of one pass may take.
_FREE_SHARE = 0.5
_CPU_BUDGET = 1 << 30


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
    """

    log_probs: Tensor
    entropy: Tensor
    expected_entropy: Tensor
    n_samples: int
    labels: Tensor | None = None
    sample_log_probs: Tensor | None = None

    @property
    def probs(self) -> Tensor:
        """(B, C) mean probabilities."""
        return self.log_probs.exp()

    @property
    def mutual_information(self) -> Tensor:
        """(B,) entropy - expected_entropy, nats, at least 0: what more data could resolve."""
        return (self.entropy - self.expected_entropy).clamp(min=0)

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
        """One prediction from those of successive batches.

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
    """

    probs: Tensor
    entropy: Tensor
    expected_entropy: Tensor
    n_samples: int
    labels: Tensor | None = None
    sample_probs: Tensor | None = None

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
        """One prediction from those of successive batches; raises as `Prediction.concatenate`."""
        return _concatenated(parts, "labels")


@dataclass(frozen=True)
class NumberPrediction:
    """Numbers of a batch (regression, rewards), on the CPU, fp64: Gaussian with

        mean = 1/S sum_s f_s(x),  variance = 1/(S - 1) sum_s (f_s(x) - mean)^2

    The variance is what the posterior of the weights leaves open; noise of the targets, which a model
    trained with squared errors does not estimate, comes on top.

    Attributes:
        mean: (B, D).
        variance: (B, D); 0 for fewer than two draws.
        n_samples: S; 0 for the posterior mean.
        labels: targets of the batch, where it had them.
        samples: (S, B, D) outputs of the single draws, where asked for.
    """

    mean: Tensor
    variance: Tensor
    n_samples: int
    labels: Tensor | None = None
    samples: Tensor | None = None

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
        """One prediction from those of successive batches; raises as `Prediction.concatenate`."""
        return _concatenated(parts, "columns")


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
    for name in names:
        tensors = [getattr(part, name) for part in parts]
        if name == "n_samples" or any(t is None for t in tensors):
            continue
        joined[name] = torch.cat(tensors, 1 if name.startswith("sample") else 0)
    return type(parts[0])(**joined)


@torch.no_grad()
def predict(
    model: nn.Module,
    batch: Mapping[str, Any],
    *,
    n_samples: int = 10,
    seed: int = 0,
    choices: Sequence[int] | None = None,
    samples_per_pass: int | None = None,
    memory_budget: int | None = None,
    return_samples: bool = False,
) -> Any:
    """Mean class probabilities over draws of the weights, with their uncertainty.

        p(c | x) = 1/S sum_s softmax(z_s(x))_c

    Models whose `problem_type` is "multi_label_classification" have a Bernoulli distribution for each
    label in place of it; those for regression (one column without a problem_type, as reward models
    have, is one too) mean and variance of their numbers. Without a problem_type floating-point labels
    in the batch mean independent labels, as they do for the loss. BLoB, ScalaBL, MC dropout and
    ensembles give all three; TFB, a variational last layer and a Laplace posterior are for classes.

    Draw s depends on (seed, s) only: results depend neither on how examples are batched (padding
    aside) nor on how many draws share a pass. The model is put into eval mode meanwhile.

    Draws of one seed are uncorrelated but not independent: they share |eps| and differ
    in its signs. The Monte-Carlo error of their mean therefore has a floor that more draws of the
    same seed do not lower; average over several seeds for independent draws.

    Plain LoRA that was trained with dropout is drawn from by dropout (MC dropout): its masks depend
    on (seed, s) and on the place of the example in the batch. The draws of an `Ensemble` are its
    members, whatever n_samples and seed are.

    A variational last layer (PoLAR-VBLL) needs one forward pass whatever S: its draws are draws of
    the logits, independent, and the same noise serves every example. So are those of a Laplace
    posterior, which takes one forward and C backward passes for the covariance of the logits; with
    prediction "probit", "bridge" or "quadrature" there are no draws, whatever n_samples is.

    Args:
        model: a model with Bayesian adapters, plain LoRA with dropout, or an `Ensemble`; its logits
            are (B, C), or (B, T, V) of a language model, of which the last token that the attention
            mask shows is taken: with an encoder and a decoder, the last token of
            `decoder_input_ids` that `decoder_attention_mask` shows.
        batch: its inputs as tensors; labels are set aside. A decoder classifier without a pad token
            takes one example.
        n_samples: S; 0 uses the posterior mean.
        seed: seed of the draws.
        choices: ids of the answer tokens, the classes; needed for (B, T, V) logits.
        samples_per_pass: draws folded into one pass; None for as many as fit the memory budget.
        memory_budget: bytes that the activations of one pass may take; None for half of the free
            memory of the GPU, or 1 GiB on the CPU. The estimate is that of a transformer without
            gradients, from the sizes in its configuration.
        return_samples: also return the distribution of each draw.

    Returns:
        `Prediction`, `LabelPrediction` or `NumberPrediction`, on the CPU. Cost: S forward passes of the
        batch, in ceil(S / samples_per_pass) calls; memory (S, B, C) for the draws' logits of one pass.

    Raises:
        ValueError: counts are out of range, the batch or the logits do not fit, there is no Bayesian
            adapter, or draws are asked for where neither the adapters nor the last layer have a
            posterior, or the adapters are disabled or merged.
    """
    if not isinstance(batch, Mapping):
        raise ValueError(
            f"predict: batch must be a mapping of input tensors, got {type(batch).__name__}; for "
            "texts pass tokenizer(texts, padding=True, return_tensors='pt')"
        )
    if n_samples < 0:
        raise ValueError(f"predict: n_samples must not be negative, got {n_samples}; 0 is the mean")
    if samples_per_pass is not None and samples_per_pass < 1:
        raise ValueError(f"predict: samples_per_pass must be at least 1, got {samples_per_pass}")
    if isinstance(model, Ensemble):
        n_samples = len(model)
    laplace = None if isinstance(model, Ensemble) else laplace_posterior(model)
    if laplace is not None:
        if choices is None:
            need_classes("predict", model)
        if choices is not None and [int(c) for c in choices] != laplace.choices:
            raise ValueError(
                f"predict: choices must be those of the Laplace posterior, {laplace.choices}, or None, "
                f"got {list(choices)}"
            )
        return _predict_laplace(laplace, batch, n_samples, seed, return_samples)
    bayesian = not isinstance(model, Ensemble) and not dropout_layers(model)
    if bayesian:
        noise_state(model)
    if bayesian and n_samples and find_head(model) is None and not draws_weights(model):
        raise ValueError(
            f"predict: n_samples must be 0 for adapters without a posterior (PoLAR), got "
            f"{n_samples}; pass n_samples=0, or use PolarVbllConfig"
        )
    if n_samples and find_head(model) is None and (why := without_effect(model)) is not None:
        raise ValueError(
            f"predict: draws need adapters that take part in the pass, got adapters that are {why}, or "
            "pass n_samples=0"
        )
    device = next(model.parameters()).device
    labels, inputs = labels_of(batch), to_device(inputs_of(batch), device)
    if find_head(model) is not None:
        if choices is not None:
            raise ValueError(
                f"predict: choices must be None for a model whose last layer has the classes, got "
                f"{list(choices)}"
            )
        with eval_mode(model):
            result = _predict_last_layer(model, inputs, n_samples, seed, return_samples)
        return result if labels is None else replace(result, labels=labels.cpu())
    size = batch_size(inputs)
    rows = LogitRows(model, batch, choices)  # whose mask the host may read without waiting
    draws = max(n_samples, 1)
    per_pass = samples_per_pass or _samples_that_fit(
        model, {**inputs, **rows.options}, memory_budget
    )
    gathered: Any = None
    with eval_mode(model), _unused_noticed(model), without_padding(model, inputs):
        for first in range(0, draws, per_pass):
            count = min(per_pass, draws - first)
            folded = fold_samples({**inputs, **rows.options}, count)
            draw = {"n_samples": count, "seed": seed, "first_sample": first}
            if isinstance(model, Ensemble):
                outputs = model(folded, first, count)
            else:
                context: contextlib.AbstractContextManager[Any]
                if bayesian:
                    mode = "sample" if n_samples else "mean"
                    context = posterior(model, mode, **draw)  # type: ignore[arg-type]
                else:
                    context = contextlib.nullcontext()
                    if n_samples:
                        context = dropout_draws(model, **draw)
                with context:
                    outputs = model(**folded)
            logits = rows.of(outputs, count)
            if gathered is None:
                kind = "classes"
                if choices is None:
                    kind = target_kind(model, logits.shape[1], labels)
                gathered = _GATHERED[kind](return_samples)
            accumulate = torch.float64 if logits.device.type != "mps" else torch.float32
            gathered.add(logits.to(accumulate).unflatten(0, (count, size)))
    return gathered.result(n_samples, None if labels is None else labels.cpu())


class _Classes:
    """Sums over draws of softmax, as logs, and of entropies."""

    def __init__(self, keep: bool) -> None:
        self.keep = keep
        self.kept: list[Tensor] = []
        self.draws = 0
        self.log_mean: Any = None
        self.entropy: Any = None

    def add(self, logits: Tensor) -> None:
        """Logits (count, B, C) of further draws."""
        log_probs = logits.log_softmax(-1)
        part, entropy = torch.logsumexp(log_probs, 0), _entropy(log_probs).sum(0)
        self.log_mean = part if self.draws == 0 else torch.logaddexp(self.log_mean, part)
        self.entropy = entropy if self.draws == 0 else self.entropy + entropy
        self.draws += len(logits)
        if self.keep:
            self.kept.append(log_probs.cpu())

    def result(self, n_samples: int, labels: Tensor | None) -> Prediction:
        """The mean over all draws."""
        log_mean = self.log_mean - math.log(self.draws)
        return Prediction(
            log_probs=log_mean.cpu(),
            entropy=_entropy(log_mean).cpu(),
            expected_entropy=(self.entropy / self.draws).cpu(),
            n_samples=n_samples,
            labels=labels,
            sample_log_probs=torch.cat(self.kept) if self.kept else None,
        )


class _Outputs:
    """The outputs (S, B, L) of all draws: a few numbers for each example."""

    def __init__(self, keep: bool) -> None:
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


_GATHERED = {"classes": _Classes, "labels": _Labels, "numbers": _Numbers}


@contextlib.contextmanager
def _unused_noticed(model: nn.Module) -> Iterator[None]:
    """Around a model's first prediction: one warning about adapted layers that it does not call."""
    # Compiled code need not look at hooks.
    compiled = any(m._compiled_call_impl or "_orig_mod" in m._modules for m in model.modules())
    if isinstance(model, Ensemble) or dropout_layers(model) or compiled:
        yield
        return
    state = noise_state(model)
    if state.calls_checked or without_effect(model) is not None:
        yield
        return
    state.calls_checked = True
    # Routers of experts leave layers out as the text has it.
    layers = {item.name: item.layer for item in bayes_layers(model) if not item.variant.routed}
    missing = dict.fromkeys(layers)
    with contextlib.ExitStack() as stack:
        for name, layer in layers.items():
            hook = layer.register_forward_pre_hook(lambda *_, name=name: missing.pop(name, None))
            stack.callback(hook.remove)
        yield
    if missing:
        warn_uncalled("predict", list(missing), len(layers))


def _in_pairs(n_samples: int) -> bool:
    """Whether logits are drawn in pairs mean + e, mean - e: where their number is even.

    Noise that all examples share and whose sum is not zero favours the same class in all of them:
    of two classes 1,000 draws without pairs took wide posteriors 5 points of accuracy below their
    means, where the exact integral never changes which of two classes is likelier.
    """
    return n_samples % 2 == 0


def _predict_last_layer(
    model: nn.Module, inputs: Mapping[str, Any], n_samples: int, seed: int, return_samples: bool
) -> Prediction:
    """Draws from a variational last layer: one pass of the model, then any number of logits.

    Every example has the same noise, so that results do not depend on how examples are batched; in
    pairs, see `_in_pairs`.
    """
    mean, variance = class_logits(model, inputs)
    size, classes = mean.shape
    if n_samples == 0:
        log_mean = mean.double().log_softmax(-1)
        entropy = _entropy(log_mean).cpu()
        return Prediction(
            log_probs=log_mean.cpu(),
            entropy=entropy,
            expected_entropy=entropy,
            n_samples=0,
            sample_log_probs=log_mean[None].cpu() if return_samples else None,
        )
    same = torch.zeros(size, dtype=torch.int64, device=mean.device)
    key = random.key(seed, mean.device)
    paired = _in_pairs(n_samples)
    found: Any = functional.mc_predict(
        mean, variance, n_samples=n_samples, key=key, ids=same, antithetic=paired
    )
    kept = None
    if return_samples:  # the draws that mc_predict has averaged, written out
        noise = reference.logit_noise(key, 1, n_samples, classes, ids=same[:1], antithetic=paired)
        samples = mean + variance.sqrt() * noise.transpose(0, 1).to(mean.dtype)
        kept = samples.double().log_softmax(-1).cpu()
    return Prediction(
        log_probs=found.log_probs.double().cpu(),
        entropy=found.entropy.double().cpu(),
        expected_entropy=found.expected_entropy.double().cpu(),
        n_samples=n_samples,
        sample_log_probs=kept,
    )


def _predict_laplace(
    posterior: LaplacePosterior,
    batch: Mapping[str, Any],
    n_samples: int,
    seed: int,
    return_samples: bool,
) -> Prediction:
    """The linearised model: Gaussian logits, then draws of them or a closed form.

    Every example has the same noise, so that results do not depend on how examples are batched; in
    pairs, see `_in_pairs`.
    """
    found, method = posterior.laplace, posterior.prediction
    labels, inputs = labels_of(batch), inputs_of(batch)
    rest: dict[str, Any] = {"labels": None if labels is None else labels.cpu()}
    if return_samples and n_samples and method not in ("mc", "mc_independent"):
        raise ValueError(
            f"predict: return_samples must be False where prediction is {method!r}, which has no draws "
            "of logits; use prediction='mc'"
        )
    if n_samples == 0:
        log_mean = found.mean_logits(inputs).double().log_softmax(-1).cpu()
        entropy = _entropy(log_mean)
        if return_samples:
            rest["sample_log_probs"] = log_mean[None]
        return Prediction(log_mean, entropy, entropy, n_samples=0, **rest)
    if method == "weights":
        drawn: Any = found.predict(inputs, method="weights", n_samples=n_samples, seed=seed)
    else:
        mean, cov = found.logits(inputs)
        if method == "mc_independent":
            method, cov = "mc", cov.diagonal(dim1=1, dim2=2).contiguous()
        key = random.key(seed, mean.device)
        same = torch.zeros(len(mean), dtype=torch.int64, device=mean.device)
        paired = method == "mc" and _in_pairs(n_samples)
        drawn = functional.mc_predict(
            mean, cov, method=method, n_samples=n_samples, key=key, ids=same, antithetic=paired
        )
        if return_samples:  # the draws that mc_predict has averaged, written out
            noise = reference.logit_noise(
                key, 1, n_samples, mean.shape[1], ids=same[:1], antithetic=paired
            )
            noise = noise.expand(len(mean), -1, -1).to(mean.dtype)
            samples = reference.sampled_logits(mean, cov, noise).transpose(0, 1)
            rest["sample_log_probs"] = samples.double().log_softmax(-1).cpu()
    expected = drawn.expected_entropy
    if expected is None:  # "probit" does not know
        expected = torch.full_like(drawn.entropy, math.nan)
    return Prediction(
        log_probs=drawn.log_probs.double().cpu(),
        entropy=drawn.entropy.double().cpu(),
        expected_entropy=expected.double().cpu(),
        n_samples=n_samples,
        **rest,
    )


def predict_dataset(
    model: nn.Module,
    data: Any,
    *,
    batch_size: int = 16,
    collate_fn: Any = None,
    progress: bool = True,
    **options: Any,
) -> Any:
    """`predict` over a data loader, an iterable of batches, or a data set.

    Args:
        model: a model with Bayesian adapters.
        data: a `DataLoader` or another iterable of batches (mappings); or a data set of examples,
            which is batched in order with `batch_size` and `collate_fn`.
        batch_size, collate_fn: for a data set.
        progress: show a bar where it takes longer than two seconds.
        options: those of `predict`.

    Returns:
        `Prediction`, `LabelPrediction` or `NumberPrediction` of all examples, in order.

    Raises:
        ValueError: as `predict`, or the data is empty.
    """
    batches = as_batches(data, batch_size, collate_fn)
    parts = [
        predict(model, batch, **options)
        for batch in tqdm(batches, desc="predict", delay=2, disable=not progress, leave=False)
    ]
    if not parts:
        raise ValueError("predict_dataset: data must have at least one example, got none")
    return parts[0].concatenate(parts)


def _entropy(log_probs: Tensor) -> Tensor:
    probs = log_probs.exp()
    return -torch.where(probs > 0, probs * log_probs, 0.0).sum(-1)


class LogitRows:
    """Takes the (B, C) class logits from the outputs of a model."""

    def __init__(
        self, model: nn.Module, inputs: Mapping[str, Any], choices: Sequence[int] | None
    ) -> None:
        self.choices = None if choices is None else [int(c) for c in choices]
        self.last: Tensor | None = None
        self.options: dict[str, Any] = {}
        if self.choices is None:
            return
        if len(self.choices) < 2:
            raise ValueError(f"predict: choices must be at least two token ids, got {self.choices}")
        base: Any = getattr(model, "get_base_model", lambda: model)()
        prefix = ""
        if getattr(getattr(base, "config", None), "is_encoder_decoder", False):
            prefix = "decoder_"  # whose tokens the logits belong to
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


def _moved(t: Tensor, like: Tensor) -> Tensor:
    """t on the device of another; CUDA need not have finished its work for a small copy."""
    return t.to(like.device, non_blocking=like.is_cuda)


def _samples_that_fit(model: nn.Module, inputs: Mapping[str, Any], budget: int | None) -> int:
    """Draws whose activations fit the budget in one pass, at least 1."""
    if isinstance(model, Ensemble) and not model.folded:
        return 1
    for module in model.modules():
        for variant in getattr(module, "lora_variant", {}).values():
            if isinstance(variant, BayesVariant) and variant.routed:
                return 1
    parameter = next(model.parameters())
    if budget is None:
        budget = _CPU_BUDGET
        if parameter.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(parameter.device)
            cached = torch.cuda.memory_reserved(parameter.device)
            cached -= torch.cuda.memory_allocated(parameter.device)
            budget = int(_FREE_SHARE * (free + cached))
    config = getattr(model, "config", None)
    config = getattr(config, "text_config", None) or config

    def size(name: str, default: int) -> int:
        value = getattr(config, name, None)
        return value if isinstance(value, int) and value > 0 else default

    tokens = max((v.numel() for v in inputs.values() if isinstance(v, Tensor)), default=1)
    length = max((v.shape[-1] for v in inputs.values() if isinstance(v, Tensor)), default=1)
    hidden = size("hidden_size", 1024)
    # One layer is alive at a time: its residual, normalised, query, key, value and output rows, the
    # gate, up and product rows of the MLP, scores of attention twice; and logits of all tokens.
    per_token = 8 * hidden + 3 * size("intermediate_size", 4 * hidden)
    per_token += 2 * size("num_attention_heads", 16) * length
    if "logits_to_keep" not in inputs:
        per_token += 2 * size("vocab_size", 0) * (config is not None and _has_token_logits(model))
    per_sample = tokens * per_token * max(4, parameter.element_size())
    return max(1, budget // max(1, per_sample))


def _has_token_logits(model: nn.Module) -> bool:
    base = getattr(model, "get_base_model", lambda: model)()
    head = getattr(base, "get_output_embeddings", lambda: None)()
    return head is not None and getattr(head, "out_features", 0) > 1000
