"""What a search for TFB's deviation found."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Trial:
    """One evaluation of the anchors.

    Attributes:
        sigma: deviation sigma_q.
        change: the metric's change, which the tolerance bounds.
        feasible: whether it is within it.
        nll, accuracy: against the labels of the search, nats and share.
        flips: share of anchors whose class differs from the mean's.
        complete: whether it saw all examples; not where search "validation" ended it, as it had to be worse
            than another. Its numbers then are those of the examples that it saw.
    """

    sigma: float
    change: float
    feasible: bool
    nll: float
    accuracy: float
    flips: float
    complete: bool = True


@dataclass(frozen=True)
class TfbReport:
    """What a search found.

    Attributes:
        sigma: the deviation sigma_q that the adapter has now; 0 where none was feasible.
        layers: number of layers with noise.
        metric, tolerance, rule, search, labels: as asked for; search not "auto", labels "true" or "pseudo".
            With search "validation" the metric is "nll", a change is NLL(sigma_q) - NLL(mean), and the
            tolerance 0.
        anchors: number of anchors; of validation examples with search "validation".
        n_samples: draws of an evaluation.
        passes: evaluations of the anchors, the one of the mean and those that ended early included.
        before: the mean's; `before.change` is 0.
        after: the evaluation at `sigma`; None where it was interpolated or was not evaluated.
        trace: all evaluations with noise, in their order.
        at_range_end: whether the search ended at the upper end of its range: more may be feasible.
        seconds: wall-clock time.
    """

    sigma: float
    layers: int
    metric: str
    tolerance: float
    rule: str
    search: str
    labels: str
    anchors: int
    n_samples: int
    passes: int
    before: Trial
    after: Trial | None
    trace: tuple[Trial, ...]
    at_range_end: bool
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, words, lists and dictionaries; without the time, which differs by run."""
        content = dataclasses.asdict(self)
        del content["seconds"]
        return {**content, "trace": list(content["trace"])}

    def table(self) -> tuple[str, tuple[str, ...], list[tuple[str, ...]]]:
        """Title, headings and rows of the search, for people."""
        rows: list[tuple[str, ...]] = [
            (
                f"{trial.sigma:.5f}",
                f"{trial.change:.5f}",
                "yes" if trial.feasible else "no",
                f"{trial.nll:.4f}",
                f"{trial.accuracy:.4f}",
                f"{trial.flips:.4f}",
            )
            if trial.complete
            else (f"{trial.sigma:.5f}", "", "no", "worse", "", "")
            for trial in (self.before, *self.trace)
        ]
        title = f"{len(rows)} evaluations of {self._examples}, {self.labels} labels"
        return title, ("sigma_q", f"change ({self.metric})", "within", "NLL", "ACC", "flips"), rows

    @property
    def _examples(self) -> str:
        held_out = self.search == "validation"
        return f"{self.anchors} {'validation examples' if held_out else 'anchors'}"

    def __str__(self) -> str:
        text = (
            f"TFB: {self.layers} layers, sigma_q={self.sigma:.6g} after {self.passes} evaluations of "
            f"{self._examples} ({self.seconds:.0f} s)"
        )
        if self.after is not None:
            text += (
                f"; {self.labels}-label NLL {self.before.nll:.4f} -> {self.after.nll:.4f}, "
                f"argmax flips {self.after.flips:.1%}"
            )
        return text + ("; the end of the range: raise high" if self.at_range_end else "")


__all__ = ["TfbReport", "Trial"]
