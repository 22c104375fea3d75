"""Load what `bayes-kernels train` wrote, and ask it."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from torch import nn

from ...batches import need_whole, text_list
from ...task import Example, Task
from ..checks import RECORD_NAME
from ..method import METHODS, Method
from ..noise import DRAW_SCOPES, KINDS
from ..predict import predictor_of
from ..stopping import stop_options
from .adapters import Base, load_adapter, pick_device
from .answers import Answers, predict_examples
from .encoder import TaskEncoder
from .record import Record, read_members, read_record, readable


def load(
    folder: str | os.PathLike[str],
    *more: str | os.PathLike[str],
    model: str | None = None,
    device: str | None = None,
) -> SavedAdapter:
    """A trained adapter on its base model, ready to be asked.

    The folder says everything: base model, prompt, names of the classes, and the method with its
    posterior (also that of Laplace-LoRA, of a last layer, and the dropout of MC dropout).

        p = load("runs/demo/blob").predict(["Return the sine of x."])
        print(p)                                              # a table
        p.labels, p.probs, p.entropy, p.mutual_information

    Args:
        folder: What `bayes-kernels train`, `demo` or `bayesianize` wrote, or an adapter or an
            ensemble of `compare`.
        more: More folders of plain LoRA: together they are an ensemble.
        model: Another base model than the recorded one, such as its new place.
        device: "cpu", "cuda" or "auto", which takes the GPU where there is one.

    Returns:
        The adapter.

    Raises:
        ValueError: The folder has no adapter, or does not say what it is for; files are damaged.
        ImportError, OSError: The base model is not installed or cannot be reached.
    """
    pick_device(device)
    folders = [Path(one) for one in (folder, *more)]
    if len(folders) == 1:
        folders = read_members(folders[0]) or folders
    records = [_record(one) for one in folders]
    first = records[0]
    with readable(first.folder):
        method, settings = method_of(first), first.fields["experiment"]
        recipe = settings["recipe"]
        draws = recipe["n_samples"] if recipe["n_samples"] is not None else method.n_samples
        batch_size, seed = recipe["eval_batch_size"], settings["seed"]
        law = {
            "draws": recipe.get("draws", KINDS[0]),
            "scope": recipe.get("draw_scope", DRAW_SCOPES[0]),
        }
    bases = []
    for record in records:
        with readable(record.folder):
            bases.append(base_of(record))
            if record.task != first.task:
                raise ValueError(
                    f"the classes {', '.join(record.task.label_names)}, expected those of "
                    f"{str(first.folder)!r}"
                )
    if model is not None:
        bases = [dataclasses.replace(base, model=model) for base in bases]
    loaded = [
        load_adapter(one.folder, base, one.task, max_length=one.max_length, device=device)
        for one, base in zip(records, bases, strict=True)
    ]
    found: nn.Module = loaded[0][0]
    if len(records) > 1:
        (method,) = (one for one in METHODS.values() if one.join is not None)
        assert method.join is not None
        found = method.join([member for member, _ in loaded], folders)
        draws = len(records)
    if not (method.bayesian and predictor_of(found).draws):
        draws = 0
    return SavedAdapter(found, loaded[0][1], method, draws, seed, batch_size, **law)


@dataclasses.dataclass(frozen=True)
class SavedAdapter:
    """A trained adapter on its base model, with all that turns texts into answers.

    Attributes:
        model: A model that `bayes_kernels.hf.predict` takes: a PeftModel, or an `Ensemble`.
        encoder: Turns examples into its input; `encoder.tokenizer` is the tokenizer.
        method: The row of the table of methods.
        n_samples: Default number of posterior draws; 0 for one set of weights.
        seed: Default seed of the draws.
        batch_size: Default number of texts in a batch.
        draws, scope: Defaults of these arguments of `bayes_kernels.hf.predict`.
    """

    model: nn.Module = dataclasses.field(repr=False)
    encoder: TaskEncoder = dataclasses.field(repr=False)
    method: Method = dataclasses.field(repr=False)
    n_samples: int
    seed: int
    batch_size: int
    draws: str = KINDS[0]
    scope: str = DRAW_SCOPES[0]

    @property
    def task(self) -> Task:
        """What it was trained for, without the examples."""
        return self.encoder.task

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes; for multiple choice letters."""
        return self.task.label_names

    def predict(
        self,
        texts: str | Sequence[str],
        *,
        context: str | Sequence[str] | None = None,
        choices: Sequence[str] | Sequence[Sequence[str]] | None = None,
        n_samples: int | None = None,
        seed: int | None = None,
        draws: str | None = None,
        scope: str | None = None,
        batch_size: int | None = None,
        progress: bool = True,
        stop: float | None = None,
        stop_rule: str | None = None,
        min_samples: int | None = None,
    ) -> Answers:
        """Class probabilities of texts, with their uncertainty.

        Args:
            texts: Texts or questions, at least one.
            context: A passage for each, where the task has them; of one text the passage itself.
            choices: The candidate answers of each, for multiple choice only; of one text they themselves.
            n_samples: Posterior draws; 0 is the mean. By default what the run used.
            seed: Seed of the draws; by default that of the run.
            draws, scope: As in `bayes_kernels.hf.predict`; by default as in the run.
            batch_size: Texts in a batch.
            progress: Whether to show a bar when it takes longer than two seconds.
            stop: An error rate below 0.5: no more draws for texts whose most probable class is settled;
                `draws_used` of the answers has the numbers. None: all draws for each.
            stop_rule, min_samples: As in `bayes_kernels.hf.predict`, with `stop`.

        Raises:
            ValueError: `texts` is no list of texts, or one is empty or not Unicode; numbers of texts,
                contexts and choices differ, choices are given where the task has classes, batch_size is
                below 1, draws are asked of an adapter without a posterior, `stop` is out of range or has no
                draws to end, or logits are not finite.
        """
        if isinstance(texts, str):
            texts = [texts]
            context = [context] if isinstance(context, str) else context
            if choices and isinstance(choices[0], str):
                choices = [cast(Sequence[str], choices)]
        texts = text_list("predict: texts", texts)
        if choices is not None and self.task.kind != "multiple_choice":
            raise ValueError(
                f"predict: choices must be None, as the task has the classes {', '.join(self.classes)}"
            )
        for name, found in (("context", context), ("choices", choices)):
            if isinstance(found, str) or (
                name == "choices" and any(isinstance(c, str) for c in found or ())
            ):
                raise ValueError(
                    f"predict: {name} must be one for each of {len(texts)} texts, got those of one; pass "
                    "a list of them"
                )
            if found is not None and len(found) != len(texts):
                raise ValueError(
                    f"predict: {name} must be one for each of {len(texts)} texts, got {len(found)}"
                )
        examples = [
            Example(
                f"text-{i + 1}",
                text,
                None,
                None if context is None else context[i],
                () if choices is None else tuple(choices[i]),
            )
            for i, text in enumerate(texts)
        ]
        return self.predict_examples(
            examples,
            n_samples=n_samples,
            seed=seed,
            draws=draws,
            scope=scope,
            batch_size=batch_size,
            progress=progress,
            stop=stop,
            stop_rule=stop_rule,
            min_samples=min_samples,
        )

    def predict_examples(
        self,
        examples: Sequence[Example],
        *,
        n_samples: int | None = None,
        seed: int | None = None,
        draws: str | None = None,
        scope: str | None = None,
        batch_size: int | None = None,
        progress: bool = True,
        stop: float | None = None,
        stop_rule: str | None = None,
        min_samples: int | None = None,
    ) -> Answers:
        """`predict` for examples, which bring their contexts and choices.

        Raises:
            ValueError: As `predict`.
        """
        self.method.check_draws(
            KINDS[0] if draws is None else draws, DRAW_SCOPES[0] if scope is None else scope
        )
        if batch_size is not None:
            need_whole("predict: batch_size", batch_size, 1)
        n_samples = self.n_samples if n_samples is None else n_samples
        rules = stop_options(stop, stop_rule, min_samples, n_samples)
        examples = [self._checked(example) for example in examples]
        task = dataclasses.replace(self.task, test=list(examples))  # how many choices there are
        prediction, _ = predict_examples(
            self.model,
            dataclasses.replace(self.encoder, task=task),
            examples,
            n_samples=n_samples,
            seed=self.seed if seed is None else seed,
            draws=self.draws if draws is None else draws,
            scope=self.scope if scope is None else scope,
            batch_size=batch_size or self.batch_size,
            progress=progress,
            **rules,
        )
        return Answers.of(prediction, task, examples)

    def stream_examples(
        self, examples: Iterable[Example], *, window: int = 8, **options: Any
    ) -> Iterator[Answers]:
        """`predict_examples` as a stream: answers in order, as soon as they are there.

        Args:
            examples: The examples, which may be without an end: no more are read than are needed.
            window: Batches that are answered at a time; texts of similar length share one of them.
            options: As in `predict_examples`.

        Yields:
            The answers to the next `window` batches.

        Raises:
            ValueError: As `predict`.
        """
        if isinstance(examples, Sequence):
            examples = [self._checked(example) for example in examples]  # before any is answered
        size = window * (options.get("batch_size") or self.batch_size)
        left = iter(examples)
        while part := list(itertools.islice(left, size)):
            yield self.predict_examples(part, **options)

    def _checked(self, example: Example) -> Example:
        if not isinstance(example.question, str) or not example.question.strip():
            raise ValueError(f"{example.id}: expected text, got {example.question!r}")
        if self.task.kind != "multiple_choice":
            return dataclasses.replace(example, choices=())
        if not 2 <= len(example.choices) <= self.task.n_classes:
            raise ValueError(
                f"{example.id}: expected 2 to {self.task.n_classes} choices, as the task is multiple "
                f"choice, got {len(example.choices)}"
            )
        return example


def _record(folder: Path) -> Record:
    record = read_record(folder)
    if record is None:
        raise ValueError(
            f"adapter {str(folder)!r}: expected {RECORD_NAME}, which names the classes and the prompt, "
            "found none: bayes-kernels did not train it; use PeftModel.from_pretrained and "
            "bayes_kernels.hf.predict"
        )
    return record


def base_of(record: Record) -> Base:
    """The base model of a record."""
    settings = record.fields["experiment"]
    names = [field.name for field in dataclasses.fields(Base) if field.name != "model"]
    return Base(record.path(settings["model"]), **{key: settings[key] for key in names})


def method_of(record: Record) -> Method:
    """The method of a record.

    Raises:
        ValueError: there is none of this name.
    """
    name = record.fields["experiment"]["method"]
    if name not in METHODS:
        raise ValueError(f"method {name!r}, expected one of {', '.join(METHODS)}")
    return METHODS[name]
