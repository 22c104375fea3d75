"""Answers to examples: predictions in batches, and what they say in words."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...progress import progress_bar
from ...table import Table, shorten
from ..logits import Prediction
from ..predict import predict
from .encoder import TaskEncoder
from .task import Example, Task


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
    if not examples:
        raise ValueError(f"{label}: expected at least one example, got none")
    items = encoder.dataset(examples).items
    order = sorted(range(len(items)), key=lambda i: _length(items[i]))
    chunks = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    shuffle = torch.Generator().manual_seed(0)
    chunks = [chunks[i] for i in torch.randperm(len(chunks), generator=shuffle).tolist()]
    parts, times = [], []
    for chunk in progress_bar(progress, chunks, desc=label, unit="batch"):
        batch = encoder.collate([items[i] for i in chunk])
        synchronise(model)
        begin = time.perf_counter()
        part = predict(
            model, batch, n_samples=n_samples, seed=seed, draws=draws, scope=scope, **options
        )
        synchronise(model)
        times.append(time.perf_counter() - begin)
        assert isinstance(part, Prediction), type(part)  # tasks have classes
        parts.append(dataclasses.replace(part, labels=None))
    discarded = min(5, len(chunks) // 2)
    kept = sum(len(chunk) for chunk in chunks[discarded:])
    milliseconds = 1000 * sum(times[discarded:]) / kept
    joined = Prediction.concatenate(parts)
    if bad := int(joined.log_probs.isnan().any(-1).sum()):
        raise ValueError(
            f"{label}: expected finite logits, got nan for {bad} of {len(items)} examples; weights of "
            "the adapter or of its base are damaged, or training diverged"
        )
    back = torch.tensor([i for chunk in chunks for i in chunk]).argsort()
    prediction = dataclasses.replace(
        joined,
        log_probs=joined.log_probs[back],
        entropy=joined.entropy[back],
        expected_entropy=joined.expected_entropy[back],
        entropy_bias=None if joined.entropy_bias is None else joined.entropy_bias[back],
        draws_used=None if joined.draws_used is None else joined.draws_used[back],
    )
    return prediction, milliseconds


def _length(item: dict[str, Any]) -> int:
    ids = item["input_ids"]
    return max(map(len, ids)) if isinstance(ids[0], list) else len(ids)
