"""Converting a trained adapter with the options of an experiment."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from peft import PeftModel

from ..hf.method import METHODS, Conversion, ConversionReport
from ..hf.tasks.encoder import TaskEncoder, batches_of
from .data.splits import choose_subset
from .held_out import chooses, encoded, held_out
from .recipe import Experiment


def _conversion(experiment: Experiment) -> Conversion:
    conversion = METHODS[experiment.method].conversion
    assert conversion is not None
    return conversion


def conversion_options(experiment: Experiment) -> dict[str, Any]:
    """Options of an experiment's conversion: the recipe's, and its draws and seed where those have none.

    Raises:
        ValueError: An option is out of range.
    """
    recipe = experiment.recipe
    options: dict[str, Any] = {
        "n_samples": recipe.n_samples or METHODS[experiment.method].n_samples,
        "seed": experiment.seed,
    }
    for name, value in (("draws", recipe.draws), ("scope", recipe.draw_scope)):
        if _conversion(experiment).takes(name):
            options[name] = value
    options.update(recipe.options)
    for name in ("anchors", "batch_size"):
        value = options.get(name, 1)
        if value is None and name == "anchors":
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"options: {name} must be an integer >= 1, got {value!r}")
    checked = {name: value for name, value in options.items() if name != "anchors"}
    _conversion(experiment).check(**checked)
    return options


def convert_model(
    experiment: Experiment,
    model: PeftModel,
    encoder: TaskEncoder,
    *,
    choices: Sequence[int] | None = None,
    progress: bool = True,
) -> ConversionReport:
    """Make a trained plain adapter Bayesian, in place, with the experiment's method.

    Options are those of the recipe; draws, seed and batch size are the experiment's unless they are
    among them. ``anchors`` is the number of training examples that it looks at, the same ones for
    every seed; by default what the method says, at most all. A method that chooses the width of its
    posterior on validation examples gets those of `held_out`, unless an option names another way.
    ``choices`` are the tokens that stand for classes, of a language model without a head for them.

    Raises:
        ValueError: An option is out of range, or there are no training examples.
    """
    recipe, conversion = experiment.recipe, _conversion(experiment)
    options = conversion_options(experiment)
    examples = encoder.task.train
    if not examples:
        raise ValueError(f"task {encoder.task.name!r}: expected training examples, got none")
    size = options.pop("anchors", conversion.examples) or len(examples)
    batch_size = options.pop("batch_size", recipe.eval_batch_size)
    rows = choose_subset(examples, min(size, len(examples)))
    data = encoder.dataset(rows, progress=progress)
    options.setdefault("progress", progress)
    if choices is not None:
        options["choices"] = list(choices)
    batches = list(batches_of(data, encoder, batch_size))
    examples = held_out(experiment, encoder.task).choosing if chooses(experiment) else []
    if examples:
        options["validation"] = encoded(examples, encoder, batch_size)
    # Not `bayesianize`, which compares mean and draws: `check_posterior` does, on other examples.
    return conversion.convert(model, batches, **conversion.fixed, **options)
