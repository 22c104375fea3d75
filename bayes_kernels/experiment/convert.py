"""Converting a trained adapter with the options of an experiment."""

from __future__ import annotations

from typing import Any

from peft import PeftModel

from ..hf.bayesianize import bayesianize
from ..hf.method import METHODS, ConversionReport
from .data.tasks import choose_subset
from .encoder import TaskEncoder, _batches
from .recipe import Experiment

# --- Conversion ----------------------------------------------------------------------------------


# Most validation examples that a conversion looks at.
_HELD_OUT = 500


def conversion_options(experiment: Experiment) -> dict[str, Any]:
    """Options of an experiment's conversion: its own draws and seed, and the recipe's ``convert``.

    Raises:
        ValueError: An option is unknown or out of range, or ``anchors`` or ``batch_size`` is no
            positive integer.
    """
    recipe, method = experiment.recipe, METHODS[experiment.method]
    assert method.conversion is not None, method.name
    draws = recipe.n_samples or method.n_samples
    options: dict[str, Any] = {"n_samples": draws, "seed": experiment.seed}
    options.update(recipe.convert)
    known = method.options
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(
            f"convert: expected options among {', '.join(known)}, got {', '.join(unknown)}"
        )
    for name in ("anchors", "batch_size"):
        value = options.get(name, 1)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"convert: {name} must be an integer >= 1, got {value!r}")
    method.conversion.check(**{name: value for name, value in options.items() if name != "anchors"})
    return options


def convert_model(
    experiment: Experiment, model: PeftModel, encoder: TaskEncoder, *, progress: bool = True
) -> ConversionReport:
    """Make a trained plain adapter Bayesian, in place, with the experiment's method.

    Options are those of the recipe's ``convert``; draws, seed and batch size are the experiment's
    unless they are among them. ``anchors`` is the number of training examples that it looks at, the
    same ones for every seed: TFB 500, or all where there are fewer; Laplace all. Laplace chooses its
    prior on the validation split (at most 500 examples) where there is one and ``prior`` names no
    other way.

    Raises:
        ValueError: An option is unknown or out of range, or there are no training examples.
    """
    recipe, conversion = experiment.recipe, METHODS[experiment.method].conversion
    assert conversion is not None, experiment.method
    options = conversion_options(experiment)
    examples = encoder.task.train
    if not examples:
        raise ValueError(f"task {encoder.task.name!r}: expected training examples, got none")
    size = options.pop("anchors", None) or conversion.examples or len(examples)
    batch_size = options.pop("batch_size", recipe.eval_batch_size)
    data = encoder.dataset(choose_subset(examples, min(size, len(examples))))
    options.setdefault("progress", progress)
    batches = list(_batches(data, encoder, batch_size))
    held_out = [example for example in encoder.task.validation if example.label is not None]
    chosen = options.get("prior"), options.get("structure", "scalar")
    wanted = chosen in ((None, "scalar"), ("validation", "scalar"))
    if held_out and wanted and conversion.takes("validation"):
        held_out = choose_subset(held_out, min(_HELD_OUT, len(held_out)))
        options["validation"] = list(_batches(encoder.dataset(held_out), encoder, batch_size))
    return bayesianize(model, experiment.method, batches, **options)
