"""Predictive distributions of classes, labels and numbers: S posterior draws folded into the batch."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
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
from .draws import _samples_that_fit
from .layers import bayes_layers, draws_weights, noise_state, warn_uncalled, without_effect
from .logits import _GATHERED, LogitRows, Prediction, _entropy, _in_pairs, need_classes, target_kind
from .methods.dropout import dropout_draws, dropout_layers
from .methods.ensemble import Ensemble
from .methods.laplace import LaplacePosterior, laplace_posterior
from .methods.polar_vbll import class_logits, find_head
from .posterior import posterior


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
