"""What validation examples say of a posterior before it is saved."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

from peft import PeftModel

from ..hf.method import METHODS
from ..hf.predict import predictor_of
from ..hf.scale import can_rescale, compare_draws, fit_scale_, report_draws
from ..hf.tasks.encoder import TaskEncoder, batches_of
from ..task import Example, Task
from .data.splits import choose_subset
from .recipe import Experiment
from .scoring import Row

# Most validation examples that mean and draws are compared on: every trial takes all draws of them.
_EXAMPLES = 200
# Fewest by which a posterior is changed unasked. Draws help where the mean is wrong, and where it is wrong
# in none of n answers, it may be in up to 3 / n of all (95 %): a tenth for 30.
_LEAST = 30
# Most that a conversion chooses on.
_CHOOSING = 500


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What was found, and what was done.

    Attributes:
        text: one or two sentences.
        harmful: whether draws raised the NLL by more than chance, see `DrawsReport`.
        factor: what all deviations were multiplied by.
        report: all numbers.
    """

    text: str
    harmful: bool
    factor: float
    report: dict[str, Any]


def harm_in(rows: Sequence[Row]) -> str | None:
    """What to say of the rows of one adapter where its draws raise the NLL by more than chance."""
    own = [row for row in rows if row.temperature is None]
    mean = next((row for row in own if row.n_samples == 0), None)
    drawn = next((row for row in own if row.n_samples), None)
    if mean is None or drawn is None:
        return None
    found = report_draws(mean.log_probs, drawn.log_probs, drawn.labels, drawn.n_samples)
    return f"{found}; --n-samples 0 predicts with the mean" if found.harmful else None


class HeldOut(NamedTuple):
    """The labelled validation examples of a task, the same ones for every seed.

    Attributes:
        choosing: What a conversion chooses the width of its posterior on, at most 500.
        checking: What mean and draws are compared on, at most 200; other examples than these where a
            conversion chooses: what has chosen cannot check.
    """

    choosing: list[Example]
    checking: list[Example]


def chooses(experiment: Experiment) -> bool:
    """Whether validation examples, where there are some, choose the width of a conversion's posterior."""
    conversion = METHODS[experiment.method].conversion
    return (
        conversion is not None
        and conversion.takes("validation")
        and conversion.chooses(experiment.recipe.options)
    )


def held_out(experiment: Experiment, task: Task) -> HeldOut:
    """The validation examples that an experiment may choose on, and those that it is checked on."""
    found = [example for example in task.validation if example.label is not None]
    if not found:
        return HeldOut([], [])
    rows = choose_subset(found, None)
    if not chooses(experiment):
        return HeldOut([], rows[:_EXAMPLES])
    checked = min(_EXAMPLES, len(rows) // 2)
    return HeldOut(rows[checked:][:_CHOOSING], rows[:checked])


def encoded(
    examples: Sequence[Example], encoder: TaskEncoder, batch_size: int
) -> list[dict[str, Any]]:
    """Batches of examples, in their order."""
    return list(batches_of(encoder.dataset(list(examples)), encoder, batch_size))


def check_posterior(
    experiment: Experiment,
    model: PeftModel,
    encoder: TaskEncoder,
    *,
    choices: Sequence[int] | None = None,
    progress: bool = True,
) -> Verdict | None:
    """Compare draws with the mean on validation examples, and choose the scale as the recipe says.

    Scale "guard" changes nothing where fewer than 30 examples check the posterior.

    Args:
        experiment: method, draws, and what to do: `Experiment.scale`.
        model, encoder: an adapter with its posterior, which may be rescaled in place.
        choices: ids of the answer tokens, for a causal model that writes them; see `predict`.
        progress: whether to show bars.

    Returns:
        None where there is nothing to compare: no draws, no labelled validation examples, or scale "keep".
    """
    recipe, row = experiment.recipe, METHODS[experiment.method]
    draws = experiment.n_samples if row.bayesian and predictor_of(model).draws else 0
    if not draws or experiment.scale == "keep":
        return None
    examples = held_out(experiment, encoder.task).checking
    if not examples:
        return None
    batches = encoded(examples, encoder, recipe.eval_batch_size)
    options: dict[str, Any] = {
        "n_samples": draws,
        "seed": experiment.seed,
        "draws": recipe.draws,
        "scope": recipe.draw_scope,
        "choices": choices,
        "progress": progress,
    }
    name = f"{row.title}, seed {experiment.seed}"
    guarded = experiment.scale == "guard"
    if can_rescale(model) and not (guarded and len(examples) < _LEAST):
        found = fit_scale_(model, batches, only_if_harmful=guarded, **options)
        before, factor, text = found.before, found.factor, f"{name}: {found}"
        if guarded and factor != 1:
            text += "; --set scale=keep leaves them as they are"
        report: dict[str, Any] = dataclasses.asdict(found)
        report["trials"] = [list(trial) for trial in found.trials]
    else:
        before, factor = compare_draws(model, batches, **options), 1.0
        text = f"{name}: {before}"
        if before.harmful and can_rescale(model):
            text += (
                f"; fewer than {_LEAST} examples, deviations left as they are "
                "(--set scale=fit fits them)"
            )
        elif before.harmful:
            text += "; predict with n_samples=0, which is the mean"
        elif can_rescale(model):
            text += "; deviations left as they are"
        report = {"factor": 1.0, "before": dataclasses.asdict(before)}
    return Verdict(text, before.harmful, factor, report)
