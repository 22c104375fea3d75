"""Predictive distributions of classes, labels and numbers."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from ..batches import as_batches, need_whole
from ..progress import progress_bar
from .draws import NoiseDraws, Predictor, Sampling, Step, WeightDraws
from .gathering import gather_tensors, text_of, text_tensors
from .layers import bayes_variants, without_effect
from .logits import AnyPrediction, LabelPrediction, NumberPrediction, Prediction
from .method import METHODS
from .noise import DRAW_SCOPES, KINDS
from .stopping import check_stop


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
    draws: str = "antithetic",
    scope: str = "example",
    share_layers: bool = True,
    stop: float | None = None,
    stop_rule: str = "normal",
    min_samples: int = 4,
    share_prefix: bool = False,
) -> AnyPrediction:
    """Mean class probabilities over draws of the weights, with their uncertainty.

        p(c | x) = 1/S sum_s softmax(z_s(x))_c

    Models whose `problem_type` is "multi_label_classification" have a Bernoulli distribution for each
    label in place of it; those for regression (one column without a problem_type, as reward models
    have, is one too) mean and variance of their numbers. Without a problem_type floating-point labels
    in the batch mean independent labels, as they do for the loss. BLoB, ScalaBL, MC dropout and
    ensembles give all three; TFB, a variational last layer and a Laplace posterior are for classes.

    Draw s depends on (seed, s) only, not on how examples are batched (padding aside) or how many draws
    share a pass. The model is in eval mode meanwhile. What a draw is depends on the adapter:

    * BLoB, TFB, ScalaBL: weights, in antithetic pairs: draws 2 p and 2 p + 1 are the mean plus and minus
      the same deviation, and pairs are independent. Ask for an even number of draws.
    * Plain LoRA that was trained with dropout (MC dropout): dropout masks, which depend on (seed, s)
      and on the place of the example in the batch.
    * An `Ensemble`: its members, all of them, whatever n_samples and seed are.
    * A variational last layer (PoLAR-VBLL): logits, from one forward pass, in pairs mean + e, mean - e where
      n_samples is even. All examples have the same noise.
    * A Laplace posterior: logits, likewise, from one forward and C backward passes for their
      covariance. Predictions "probit", "bridge" and "quadrature" have no draws, whatever n_samples is.
    * Plain LoRA without dropout, PoLAR: there are none, and n_samples must be 0.

    Args:
        model: a model with an adapter of any method, or an `Ensemble`; of a `DataParallel` the module on
            its first GPU is used. Its logits are (B, C), or
            (B, T, V) of a language model, of which the last token that the attention mask shows is
            taken: with an encoder and a decoder, the last token of `decoder_input_ids` that
            `decoder_attention_mask` shows.
        batch: its inputs as tensors; labels are set aside. A decoder classifier without a pad token
            takes one example.
        n_samples: S; 0 uses the posterior mean.
        seed: seed of the draws.
        choices: ids of the answer tokens, the classes; needed for (B, T, V) logits.
        samples_per_pass: draws folded into one pass; None for as many as bring it to 512 tokens for each
            thread of the CPU, 8192 on a GPU, and fit the memory budget.
        memory_budget: bytes that the activations of one pass may take; None for half of the free
            memory of the GPU, or 1 GiB on the CPU. It is estimated for a transformer without
            gradients, from the sizes in its configuration. A batch of which not even one draw fits is
            split, for the same numbers up to rounding; with MC dropout and the scope "token", whose draws
            go by the place in the batch, and with inputs that cannot be cut by example it stays whole.
        return_samples: also return the distribution of each draw.
        draws: how draws of weights hang together: "antithetic", "independent" or "shared"; `kind` of
            `posterior`. For BLoB, TFB and ScalaBL; the others keep their own rule.
        scope: "example", or for BLoB and TFB "token": new signs for each token and new numbers for each
            draw, the prediction noise of the authors' code. See `posterior`.
        share_layers: whether the layers below the first one in which draws differ run once for all draws
            of a batch; `shared_layers` of the prediction says how many did. The numbers are the
            same up to rounding, since products of other sizes add up in other orders. Models that are
            compiled or sharded, whose first adapted layer is their first, or whose layers hand on more
            than their outputs run all layers for each draw; the logger
            "bayes_kernels.hf.lower_layers" says why (INFO). For draws of weights and MC dropout.
        stop: an error rate alpha below 0.5, and a text gets no more draws once its most probable class is
            settled: all n_samples could not change it, or it is the class that infinitely many would
            prefer, with a probability of at least 1 - alpha; 0 for the first alone. `draws_used` of the
            prediction has the numbers; they and the draws depend on the seed and the text alone.
            Probabilities and mutual information are those of so many draws. None: n_samples for all.
        stop_rule: "normal" takes the leads of a class over others, of a pair of draws, for normal;
            "betting" makes no such assumption and takes many more draws where leads are small.
            `bayes_kernels.hf.stopping` has both.
        min_samples: the fewest draws of a text, with `stop`.
        share_prefix: compute what all texts of the batch begin with once for each draw, into a KV cache, and
            only the rest of each text by itself; the numbers are the same up to rounding. For decoders
            and draws of weights of whole texts, from `input_ids` and `attention_mask`. Lower layers are
            then not shared.

    Returns:
        `Prediction`, `LabelPrediction` or `NumberPrediction`, on the CPU. Cost: S forward passes of the
        batch, in ceil(S / samples_per_pass) calls for each part; memory (S, B, C) for the draws' logits of
        one pass.

    Raises:
        ValueError: counts or words are out of range, the batch or the logits do not fit, the model has no
            adapter, or draws are asked for and the adapter has none or is disabled or merged.
    """
    model = _checked("predict", model, batch, [Sampling(n_samples, draws, scope)], samples_per_pass)
    check_stop(stop, stop_rule, min_samples, return_samples)
    predictor = predictor_of(model)
    if stop is not None and not isinstance(predictor, WeightDraws):
        raise ValueError(
            f"predict: stop must be None where draws are of logits, which cost no passes, got {stop}"
        )
    if stop and draws == "shared" and isinstance(predictor, NoiseDraws):
        raise ValueError(
            f"predict: stop must be None or 0 for draws='shared', which depend on each other, got {stop}; "
            "use 'antithetic' or 'independent'"
        )
    if share_prefix and not isinstance(predictor, WeightDraws):
        raise ValueError(
            "predict: share_prefix must be False where draws are of logits; leave it out"
        )
    return predictor.predict(
        batch,
        n_samples=n_samples,
        seed=seed,
        choices=choices,
        samples_per_pass=samples_per_pass,
        memory_budget=memory_budget,
        return_samples=return_samples,
        draws=draws,
        scope=scope,
        share_layers=share_layers,
        stop=stop,
        stop_rule=stop_rule,
        min_samples=min_samples,
        share_prefix=share_prefix,
    )


def predict_several(
    model: nn.Module,
    batch: Mapping[str, Any],
    samplings: Sequence[Sampling],
    *,
    seed: int = 0,
    choices: Sequence[int] | None = None,
    samples_per_pass: int | None = None,
    memory_budget: int | None = None,
    return_samples: bool = False,
    share_layers: bool = True,
) -> list[AnyPrediction]:
    """Predictions of one batch with several numbers or kinds of draws, which share what they can.

    Each is that of `predict` with the same seed: the same bits where passes hold as many rows, else the same
    up to rounding. What they have in common is computed once:

    * Numbers of the same draws: the first N of them give the prediction of N, and go on to the next number.
    * Layers below the first one in which draws differ, for the posterior mean and all kinds of draws.
    * The one pass of a variational last layer; the covariances of logits of a Laplace posterior, for all
      numbers of draws above 0.

    Args:
        model, batch, seed, choices, samples_per_pass, memory_budget, return_samples, share_layers: as in
            `predict`.
        samplings: at least one number and kind of draws.

    Returns:
        The predictions, in the order of `samplings`. Cost for draws of weights: as many passes as the
        largest number of draws of each kind, and one for the mean. A batch that does not fit the memory
        budget shares nothing.

    Raises:
        ValueError: as `predict`, or there are no samplings.

    Example:
        mean, few, many = predict_several(model, batch, [Sampling(0), Sampling(4), Sampling(32)])
    """
    options: dict[str, Any] = {"samples_per_pass": samples_per_pass, "memory_budget": memory_budget}
    options.update(return_samples=return_samples, share_layers=share_layers)
    steps = prediction_steps(model, batch, samplings, seed=seed, choices=choices, **options)
    found = {step.number: step.prediction for step in steps}
    return [found[i] for i in range(len(samplings))]  # type: ignore[misc]


@torch.no_grad()
def prediction_steps(
    model: nn.Module,
    batch: Mapping[str, Any],
    samplings: Sequence[Sampling],
    *,
    seed: int = 0,
    choices: Sequence[int] | None = None,
    samples_per_pass: int | None = None,
    memory_budget: int | None = None,
    return_samples: bool = False,
    share_layers: bool = True,
) -> Iterator[Step]:
    """The work of `predict_several` step by step, for those who measure what each of them costs."""
    samplings = [Sampling(*one) for one in samplings]
    model = _checked("predict_several", model, batch, samplings, samples_per_pass)
    yield from predictor_of(model).several(
        batch,
        samplings,
        seed=seed,
        choices=choices,
        samples_per_pass=samples_per_pass,
        memory_budget=memory_budget,
        return_samples=return_samples,
        share_layers=share_layers,
    )


def _checked(
    op: str,
    model: nn.Module,
    batch: object,
    samplings: Sequence[Sampling],
    samples_per_pass: int | None,
) -> nn.Module:
    """The model whose passes are made.

    Raises:
        ValueError: batch, counts or words are none; the message begins with `op`.
    """
    if not isinstance(batch, Mapping):
        raise ValueError(
            f"{op}: batch must be a mapping of input tensors, got {type(batch).__name__}; for "
            "texts pass tokenizer(texts, padding=True, return_tensors='pt')"
        )
    if not samplings:
        raise ValueError(f"{op}: samplings must be at least one, got none")
    if samples_per_pass is not None:
        need_whole(f"{op}: samples_per_pass", samples_per_pass, 1)
    for one in samplings:
        need_whole(f"{op}: n_samples", one.n_samples, 0)
        for name, word, words in (
            ("draws", one.draws, KINDS),
            ("scope", one.scope, DRAW_SCOPES),
        ):
            if word not in words:
                raise ValueError(f"{op}: {name} must be one of {words}, got {word!r}; choose one")
    # DataParallel would cut the copies of the batch, and its threads know no draws.
    return model.module if isinstance(model, nn.DataParallel) else model


def predictor_of(model: nn.Module) -> Predictor:
    """The predictor of a model's adapter.

    Asked are first methods that join models, and those of the model's Bayesian adapters; then all, from
    the end of the table, whose first row takes any plain adapter.

    Raises:
        ValueError: the model has no adapter of any method.
    """
    own = {variant.config.method for variant in bayes_variants(model)}
    rows = list(METHODS.values())[::-1]
    rows.sort(key=lambda row: row.join is None and row.name not in own)
    for ask in dict.fromkeys(row.predictor for row in rows):
        found = ask(model)
        if found is not None:
            return found
    raise ValueError(
        f"predict: the model must have a Bayesian adapter or plain LoRA, got {type(model).__name__} "
        "without; make one with get_peft_model(model, BlobConfig(...))"
    )


def text_draws(op: str, model: nn.Module, n_samples: int, draws: str) -> WeightDraws:
    """How the weights of whole texts are drawn.

    Raises:
        ValueError: they have no such draws; the message begins with `op`.
    """
    if draws not in KINDS:
        raise ValueError(f"{op}: draws must be one of {KINDS}, got {draws!r}; choose one")
    predictor = predictor_of(model).texts
    if predictor is None:
        if n_samples:
            raise ValueError(
                f"{op}: n_samples must be 0 for a posterior whose draws are class logits, not weights, "
                f"got {n_samples}; pass n_samples=0"
            )
        predictor = WeightDraws(model)
    if n_samples and not predictor.draws:
        raise ValueError(
            f"{op}: n_samples must be 0 for adapters without a posterior, got {n_samples}; pass "
            "n_samples=0, or make the adapter Bayesian with bayesianize"
        )
    if n_samples and (why := without_effect(model)) is not None:
        raise ValueError(
            f"{op}: draws need adapters that take part in the pass, got adapters that are {why}, or "
            "pass n_samples=0"
        )
    if n_samples and (why := predictor.obstacle()) is not None:
        raise ValueError(f"{op}: {why}; pass n_samples=0, or write draws with export_draws")
    if n_samples > 1 and predictor.one_per_pass:
        raise ValueError(
            f"{op}: n_samples must be 0 or 1 where draws cannot share a pass (routed experts, ensemble "
            f"members with a base each), got {n_samples}"
        )
    return predictor


def predict_batches(
    model: nn.Module,
    data: Iterable[Any] | Dataset[Any],
    *,
    batch_size: int = 16,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    num_workers: int = 0,
    progress: bool = False,
    **options: Any,
) -> Iterator[AnyPrediction]:
    """`predict_dataset` as a stream: the prediction of each batch as soon as it is there, in order.

    A batch is read when its prediction is asked for (with `num_workers` a few before), and nothing is
    kept: memory does not grow with the data, which may be an iterable without an end.

    Args:
        model, data, batch_size, collate_fn, num_workers, options: as in `predict_dataset`.
        progress: show a bar where it takes longer than two seconds.

    Yields:
        `Prediction`, `LabelPrediction` or `NumberPrediction` of each batch.

    Raises:
        ValueError: as `predict`.

    Example:
        for part in predict_batches(model, loader, n_samples=10):
            print(part.classes.tolist())
    """
    batches = as_batches(data, batch_size, collate_fn, num_workers)
    for batch in progress_bar(progress, batches, desc="predict", unit="batch"):
        yield predict(model, batch, **options)


def predict_dataset(
    model: nn.Module,
    data: Iterable[Any] | Dataset[Any],
    *,
    batch_size: int = 16,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    num_workers: int = 0,
    progress: bool = True,
    distributed: bool = False,
    **options: Any,
) -> AnyPrediction:
    """`predict` over a data loader, an iterable of batches, or a data set.

    Args:
        model: a model with Bayesian adapters.
        data: a `DataLoader` or another iterable of batches (mappings); or a data set of examples,
            which is batched in order with `batch_size` and `collate_fn`.
        batch_size, collate_fn: for a data set.
        num_workers: processes that make the batches of a data set while the model runs.
        progress: show a bar where it takes longer than two seconds.
        distributed: share the batches among the processes of the default group (torchrun, one GPU each):
            process r of W predicts batches r, r + W, ... All are given the same data, and all get the
            prediction of all examples, in order. Draws go by the seed, so that it is that of one process.
        options: as in `predict`.

    Returns:
        `Prediction`, `LabelPrediction` or `NumberPrediction` of all examples, in order.

    Raises:
        ValueError: as `predict`, the data is empty, or with `distributed` there is no process group or the
            model is sharded.
        RuntimeError: with `distributed`, another process has failed.
    """
    batches = as_batches(data, batch_size, collate_fn, num_workers)
    rank, world = _processes(model) if distributed else (0, 1)
    parts: list[Any] = []
    error: Exception | None = None
    try:
        # All of them as they are: a part has no length, and a bar without one no time left.
        own = batches if world == 1 else itertools.islice(batches, rank, None, world)
        parts += predict_batches(model, own, progress=progress and rank == 0, **options)
    except Exception as caught:  # the others wait for this process
        if not distributed:
            raise
        error = caught
    if distributed:
        parts = _gathered(parts, error, model)
    if not parts:
        raise ValueError("predict_dataset: data must have at least one example, got none")
    return parts[0].concatenate(parts)


def _processes(model: nn.Module) -> tuple[int, int]:
    """Rank and number of processes.

    Raises:
        ValueError: there is no process group, or the model needs all processes in each pass.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        raise ValueError(
            "predict_dataset: distributed must be False without a process group; start with torchrun, and "
            "call torch.distributed.init_process_group first"
        )
    if any(hasattr(parameter, "placements") for parameter in model.parameters()):
        raise ValueError(
            "predict_dataset: distributed must be False for a sharded model, whose passes need all "
            "processes at once; give each process all batches"
        )
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def _gathered(parts: list[Any], error: Exception | None, model: nn.Module) -> list[Any]:
    """The parts of all processes, in order.

    Raises:
        RuntimeError: another process has failed; this one raises its own error.
    """
    own = text_tensors(None if error is None else repr(error))
    for i, part in enumerate(parts if error is None else ()):
        kind = type(part).__name__
        for field in fields(part):
            value = getattr(part, field.name)
            if value is not None:
                own[f"{i} {kind} {field.name}"] = torch.as_tensor(value)
    found = gather_tensors(own, model)
    if error is not None:
        raise error
    failed = [f"{rank}: {text_of(one)}" for rank, one in enumerate(found) if text_of(one)]
    if failed:
        raise RuntimeError(f"predict_dataset: a process has failed, {failed[0]}")
    rounds = itertools.zip_longest(*map(_predictions, found))
    return [part for one in rounds for part in one if part is not None]


def _predictions(tensors: Mapping[str, torch.Tensor]) -> list[Any]:
    """The predictions that a process has sent, in its order."""
    kinds = {kind.__name__: kind for kind in (Prediction, LabelPrediction, NumberPrediction)}
    values: dict[int, tuple[Any, dict[str, Any]]] = {}
    for name, value in tensors.items():
        number, kind, field = name.split()
        found = value if value.dim() else value.item()
        values.setdefault(int(number), (kinds[kind], {}))[1][field] = found
    return [kind(**options) for _, (kind, options) in sorted(values.items())]
