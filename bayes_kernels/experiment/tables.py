"""Tables of a comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..hf.method import METHODS
from .results import Summary

# The row of plain LoRA with a temperature, which is no run of its own.
TEMPERATURE = "temperature"
PLAIN = "map"


@dataclass(frozen=True)
class Failure:
    """A (method, seed) that did not end, and why."""

    method: str
    seed: int
    error: str


# --- Tables --------------------------------------------------------------------------------------

_SCORES = {
    "accuracy": "accuracy ↑",
    "nll": "NLL ↓",
    "ece": "ECE ↓",
    "brier": "Brier ↓",
    "aurc": "AURC ↓",
}


Lines = tuple[list[str], list[list[str]]]


def table(summaries: Sequence[Summary], failures: Sequence[Failure], seeds: int) -> Lines:
    """Headings and rows: scores as mean ± standard deviation, costs as means, failures below.

    ``extra numbers`` is what the adapter's file holds beyond that of plain LoRA.
    """
    plain = next((s.mean.get("parameters") for s in summaries if s.method == PLAIN), None)
    sets = list(summaries[0].ood) if summaries else []
    columns = [key for key in _SCORES if summaries and key in summaries[0].mean]
    headings = ["method", *(_SCORES[key] for key in columns)]
    headings += [f"AUROC {name} ↑" for name in sets]
    headings += ["train s", "convert s", "ms/text", "train MiB", "predict MiB", "extra numbers"]
    lines = []
    for one in summaries:
        name = one.name if len(one.seeds) == seeds else f"{one.name} ({len(one.seeds)} of {seeds})"
        cells = [name, *(_spread(one.mean[key], one.std.get(key)) for key in columns)]
        for key in sets:
            spread = one.ood_std.get(key, {}).get("auroc")
            cells.append(_spread(one.ood[key]["auroc"], spread))
        mean = one.mean
        cells += [
            _cost(mean, key, digits)
            for key, digits in (
                ("train_seconds", 0),
                ("conversion_seconds", 0),
                ("ms_per_example", 1),
                ("train_memory_mib", 0),
                ("predict_memory_mib", 0),
            )
        ]
        own = mean.get("parameters")
        if own is not None and plain is not None:
            cells.append("0" if own == plain else f"{own - plain:+,.0f}")
        else:
            cells.append("–")
        lines.append(cells)
    for failure in failures:
        title = f"{METHODS[failure.method].title}, seed {failure.seed}"
        lines.append([title, f"failed: {failure.error}"])
    return headings, lines


def shift_table(summaries: Sequence[Summary]) -> Lines | None:
    """Scores on the out-of-distribution sets whose examples have labels; None without any."""
    sets = [key for key, scores in summaries[0].ood.items() if "nll" in scores] if summaries else []
    if not sets:
        return None
    columns = [key for key in _SCORES if key in summaries[0].ood[sets[0]]]
    headings = ["method", *(f"{key}: {_SCORES[column]}" for key in sets for column in columns)]
    lines = []
    for one in summaries:
        cells = [one.name]
        for key in sets:
            deviations = one.ood_std.get(key, {})
            cells += [_spread(one.ood[key][name], deviations.get(name)) for name in columns]
        lines.append(cells)
    return headings, lines


def _spread(mean: float, std: float | None) -> str:
    text = f"{mean:.3f}" + ("" if std is None else f"±{std:.3f}")
    return text.replace("0.", ".") if mean < 1 else text.replace("±0.", "±.")


def _cost(mean: Mapping[str, float], key: str, digits: int) -> str:
    return f"{mean[key]:,.{digits}f}" if key in mean else "–"


def markdown(headings: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; short rows are filled."""
    width = len(headings)
    rows = [headings, ["---"] * width, *([*line, *[""] * (width - len(line))] for line in lines)]
    return "".join(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |\n" for row in rows)
