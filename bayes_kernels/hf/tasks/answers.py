"""Answers to examples: predictions in batches, and what they say in words."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ...progress import progress_bar
from ...table import Table, shorten
from ...task import Example, Task
from ..draws import Sampling
from ..logits import Prediction
from ..predict import predict, prediction_steps
from .encoder import TaskEncoder


def synchronise(model: nn.Module) -> None:
    """Wait for the GPU, if the model is on one."""
    parameter = next(model.parameters(), None)
    if parameter is not None and parameter.device.type == "cuda":
        torch.cuda.synchronize(parameter.device)


class Answer(NamedTuple):
    """What a model says of one text.

    Attributes:
        text: The text.
        label: The most probable class in words; for multiple choice its letter and the choice.
        probability: Its probability.
        entropy: Entropy of the mean, nats: all uncertainty.
        mutual_information: The part of it that stems from the adapter's posterior, nats; None for one
            set of weights.
        probs: Probability of each class by its name.
        draws_used: Draws that it has had, where `stop` may have ended them; else None.
    """

    text: str
    label: str
    probability: float
    entropy: float
    mutual_information: float | None
    probs: dict[str, float]
    draws_used: int | None = None


@dataclass(frozen=True, repr=False)
class Answers(Sequence[Answer]):
    """What a model says of several texts; prints as a table. An element or iteration gives `Answer`.

    Attributes:
        texts: The texts, n of them.
        classes: Names of the C classes, the columns of `probs`.
        labels: For each text the most probable class in words.
        probs: (n, C) mean probabilities over the draws, fp64, on the CPU.
        entropy: (n,) entropy of the mean, nats: all uncertainty.
        mutual_information: (n,) the part of it that stems from the adapter's posterior, nats; None for
            one set of weights, or where the prediction has no draws to compare.
        n_samples: Draws; 0 for one set of weights.
        draws_used: (n,) draws that each text has had, at most n_samples, where `stop` may have ended them;
            else None.
    """

    texts: tuple[str, ...]
    classes: tuple[str, ...]
    labels: tuple[str, ...]
    probs: Tensor
    entropy: Tensor
    mutual_information: Tensor | None
    n_samples: int
    draws_used: Tensor | None = None

    @staticmethod
    def of(prediction: Prediction, task: Task, examples: Sequence[Example]) -> Answers:
        """A prediction for examples of a task, in words."""
        found = prediction.mutual_information if prediction.n_samples else None
        if found is not None and bool(found.isnan().any()):
            found = None
        return Answers(
            tuple(example.question for example in examples),
            task.label_names,
            tuple(
                answer(task, example, index)
                for example, index in zip(examples, prediction.classes.tolist(), strict=True)
            ),
            prediction.probs,
            prediction.entropy,
            found,
            prediction.n_samples,
            prediction.draws_used,
        )

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        information = self.mutual_information
        return Answer(
            self.texts[index],
            self.labels[index],
            float(self.probs[index].max()),
            float(self.entropy[index]),
            None if information is None else float(information[index]),
            dict(zip(self.classes, self.probs[index].tolist(), strict=True)),
            None if self.draws_used is None else int(self.draws_used[index]),
        )

    def __iter__(self) -> Iterator[Answer]:
        return (self[i] for i in range(len(self)))

    def table(self) -> Table:
        """Label, text, probability, entropy, mutual information, and with `stop` draws of each text."""
        rows = []
        for one in self:
            numbers = (one.probability, one.entropy, one.mutual_information)
            cells = ["–" if number is None else f"{number:.3f}" for number in numbers]
            cells += [] if one.draws_used is None else [str(one.draws_used)]
            rows.append([one.label, shorten(one.text), *cells])
        heads = ["label", "text", "prob", "entropy", "MI"]
        heads += [] if self.draws_used is None else ["draws"]
        return Table("", heads, rows, left=2)

    def __repr__(self) -> str:
        return self.table().text().rstrip("\n")

    def _repr_html_(self) -> str:
        return self.table().html()


def answer(task: Task, example: Example, index: int) -> str:
    """A class in words: its name, for multiple choice with the text of the choice."""
    name = task.label_names[index]
    if task.kind == "multiple_choice" and index < len(example.choices):
        return f"{name}) {example.choices[index]}"
    return name


def predict_examples(
    model: nn.Module,
    encoder: TaskEncoder,
    examples: Sequence[Example],
    *,
    n_samples: int = 0,
    seed: int = 0,
    draws: str = "antithetic",
    scope: str = "example",
    batch_size: int = 16,
    progress: bool = True,
    label: str = "predict",
    **options: Any,
) -> tuple[Prediction, float]:
    """Predictions for examples, in their order, and milliseconds per example.

    Batches hold texts of similar length, so that little padding is computed.

    Args:
        model: A model that `bayes_kernels.hf.predict` takes.
        encoder: Its encoder.
        examples: At least one.
        n_samples: Posterior draws; 0 for the mean, and for adapters without a posterior.
        seed: Seed of the draws.
        draws, scope: As in `bayes_kernels.hf.predict`.
        batch_size: Examples of a batch.
        progress: Whether to show a bar when it takes longer than two seconds.
        label: Name of the bar.
        options: More of `bayes_kernels.hf.predict`: `stop`, `stop_rule`, `min_samples`.

    Raises:
        ValueError: No examples, draws from an adapter that has no posterior, or logits that are nan.
    """
    batches = _Batches(encoder, examples, batch_size, label, progress)
    parts: list[Prediction] = []
    times: list[float] = []
    for batch in progress_bar(progress, batches, desc=label, unit="batch"):
        synchronise(model)
        begin = time.perf_counter()
        part = predict(
            model, batch, n_samples=n_samples, seed=seed, draws=draws, scope=scope, **options
        )
        synchronise(model)
        times.append(time.perf_counter() - begin)
        assert isinstance(part, Prediction), type(part)  # tasks have classes
        parts.append(part)
    return batches.joined(parts), batches.milliseconds(times)


class Sampled(NamedTuple):
    """What one sampling of several gives for examples.

    Attributes:
        prediction: Of all examples, in their order.
        milliseconds: Per example, as if it had been computed by itself.
        peak: The largest memory of its steps, as `watch` measured it; nan without.
    """

    prediction: Prediction
    milliseconds: float
    peak: float


class _Watched(Protocol):
    """What measures the memory of a step, see `bayes_kernels.experiment.machine.peak_memory`."""

    mib: float


@contextlib.contextmanager
def _unwatched() -> Iterator[_Watched]:
    yield SimpleNamespace(mib=math.nan)


def sample_examples(
    model: nn.Module,
    encoder: TaskEncoder,
    examples: Sequence[Example],
    samplings: Sequence[Sampling],
    *,
    seed: int = 0,
    batch_size: int = 16,
    apart: bool = False,
    watch: Callable[[], AbstractContextManager[_Watched]] = _unwatched,
    progress: bool = True,
    label: str = "predict",
) -> list[Sampled | Exception]:
    """`predict_examples` for several samplings in one loop over the batches.

    Predictions and costs are those of each sampling by itself; what they share
    (`bayes_kernels.hf.predict_several`) is computed once, and counts for each of them.

    Args:
        model, encoder, examples, seed, batch_size, progress, label: As in `predict_examples`.
        samplings: Numbers and kinds of draws.
        apart: Whether the others go on where a sampling fails, with its exception in its place; else it
            is raised at once.
        watch: Measures the memory of a step.

    Raises:
        ValueError: As `predict_examples`.
    """
    batches = _Batches(encoder, examples, batch_size, label, progress)
    parts: list[list[Prediction]] = [[] for _ in samplings]
    times: list[list[float]] = [[] for _ in samplings]
    peaks = [math.nan] * len(samplings)
    failed: dict[int, Exception] = {}

    def run(numbers: Sequence[int], batch: Mapping[str, Any]) -> Exception | None:
        try:
            found = _measured(model, batch, [samplings[i] for i in numbers], seed, watch)
        except Exception as error:
            if not apart:
                raise
            return error.with_traceback(None)  # whose frames hold the tensors of the pass
        for i, (part, seconds, peak) in zip(numbers, found, strict=True):
            parts[i].append(part)
            times[i].append(seconds)
            peaks[i] = peak if math.isnan(peaks[i]) else max(peaks[i], peak)
        return None

    for batch in progress_bar(progress, batches, desc=label, unit="batch"):
        left = [i for i in range(len(samplings)) if i not in failed]
        if not left:
            break
        if run(left, batch) is not None:  # which of them it is
            alone = {i: run([i], batch) for i in left}
            failed.update({i: error for i, error in alone.items() if error is not None})

    def result(i: int) -> Sampled | Exception:
        if i in failed:
            return failed[i]
        try:
            joined = batches.joined(parts[i])
        except ValueError as error:
            if not apart:
                raise
            return error
        return Sampled(joined, batches.milliseconds(times[i]), peaks[i])

    return [result(i) for i in range(len(samplings))]


def _measured(
    model: nn.Module,
    batch: Mapping[str, Any],
    samplings: Sequence[Sampling],
    seed: int,
    watch: Callable[[], AbstractContextManager[_Watched]],
) -> list[tuple[Prediction, float, float]]:
    """Predictions of a batch, the seconds that each takes by itself, and its peak memory."""
    found: dict[int, tuple[Prediction, float, float]] = {}
    common = 0.0, math.nan
    steps = prediction_steps(model, batch, samplings, seed=seed)
    while True:
        with watch() as memory:
            synchronise(model)
            begin = time.perf_counter()
            step = next(steps, None)
            synchronise(model)
            seconds = time.perf_counter() - begin
        if step is None:
            return [found[i] for i in range(len(samplings))]
        seconds, peak = seconds + common[0], memory.mib
        if not math.isnan(common[1]):
            peak = max(peak, common[1])
        if step.number is None:
            common = seconds, peak
            continue
        if step.after is not None:  # the draws that it went on from are its own too
            _, others, before = found[step.after]
            seconds, peak = seconds + others - common[0], max(peak, before)
        assert isinstance(step.prediction, Prediction), type(step.prediction)
        found[step.number] = step.prediction, seconds, peak


class _Batches:
    """Batches of texts of similar length, so that little padding is computed, in an order of their own.

    Raises:
        ValueError: There are no examples.
    """

    def __init__(
        self,
        encoder: TaskEncoder,
        examples: Sequence[Example],
        batch_size: int,
        label: str,
        progress: bool,
    ) -> None:
        if not examples:
            raise ValueError(f"{label}: expected at least one example, got none")
        self.encoder, self.label = encoder, label
        self.items = encoder.dataset(examples, progress=progress).items
        order = sorted(range(len(self.items)), key=lambda i: _length(self.items[i]))
        chunks = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
        shuffle = torch.Generator().manual_seed(0)
        self.chunks = [chunks[i] for i in torch.randperm(len(chunks), generator=shuffle).tolist()]

    def __len__(self) -> int:
        return len(self.chunks)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for chunk in self.chunks:
            yield self.encoder.collate([self.items[i] for i in chunk])

    def milliseconds(self, times: Sequence[float]) -> float:
        """Per example, from seconds of all batches, without the first five (at most half)."""
        discarded = min(5, len(self.chunks) // 2)
        kept = sum(len(chunk) for chunk in self.chunks[discarded:])
        return 1000 * sum(times[discarded:]) / kept

    def joined(self, parts: Sequence[Prediction]) -> Prediction:
        """Predictions of all batches as one, in the order of the examples.

        Raises:
            ValueError: Logits are nan.
        """
        joined = Prediction.concatenate([dataclasses.replace(part, labels=None) for part in parts])
        if bad := int(joined.log_probs.isnan().any(-1).sum()):
            raise ValueError(
                f"{self.label}: expected finite logits, got nan for {bad} of {len(self.items)} examples; "
                "weights of the adapter or of its base are damaged, or training diverged"
            )
        back = torch.tensor([i for chunk in self.chunks for i in chunk]).argsort()
        return dataclasses.replace(
            joined,
            log_probs=joined.log_probs[back],
            entropy=joined.entropy[back],
            expected_entropy=joined.expected_entropy[back],
            entropy_bias=None if joined.entropy_bias is None else joined.entropy_bias[back],
            draws_used=None if joined.draws_used is None else joined.draws_used[back],
        )


def _length(item: dict[str, Any]) -> int:
    ids = item["input_ids"]
    return max(map(len, ids)) if isinstance(ids[0], list) else len(ids)
