"""Tables of results: scores, scores under shift and costs, as text for people or as Markdown."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..hf.method import PLAIN
from ..table import Table, shorten
from .machine import memory_measure
from .results import COSTS, Summary
from .variants import title_of

# The row of plain LoRA with a temperature, which is no run of its own.
TEMPERATURE = "temperature"
# Rows of all methods with draws and a temperature on these.
TEMPERED_DRAWS = "temperature-draws"
# Headings by name of the metric.
SCORES = {
    "accuracy": "accuracy ↑",
    "nll": "NLL ↓",
    "ece": "ECE ↓",
    "ece_floor": "by chance",
    "signed_calibration_error": "over-confidence",
    "brier": "Brier ↓",
    "aurc": "AURC ↓",
}


@dataclass(frozen=True)
class Failure:
    """A (method, seed) that did not end, and why; variants, and values of a sweep, by their word."""

    method: str
    seed: int
    error: str


def score_table(summaries: Sequence[Summary], seeds: int = 1, title: str = "") -> Table:
    """Scores as mean ± standard deviation over seeds, those that all rows have.

    "by chance" is the ECE of a perfectly calibrated predictor with the row's confidences;
    "over-confidence" is mean confidence less accuracy, negative for an underconfident predictor.

    Args:
        summaries: At least one.
        seeds: Number of seeds that were asked for; names say where some are missing.
        title: The line above the table.
    """
    first = summaries[0]
    known = [key for key in SCORES if all(key in one.mean for one in summaries)]
    rows = []
    for one in summaries:
        name = one.name if len(one.seeds) >= seeds else f"{one.name} ({len(one.seeds)} of {seeds})"
        cells = [spread(key, one.mean, one.std) for key in known]
        cells += [spread("auroc", one.ood[key], one.ood_std.get(key, {})) for key in first.ood]
        rows.append([name, *cells])
    headings = [*(SCORES[key] for key in known), *(f"AUROC {name} ↑" for name in first.ood)]
    return Table(title, ["method", *headings], rows)


def shift_table(summaries: Sequence[Summary]) -> Table | None:
    """Scores on the out-of-distribution sets whose examples have labels; None without any."""
    first = summaries[0]
    sets = [key for key, scores in first.ood.items() if "nll" in scores]
    if not sets:
        return None
    columns = [key for key in SCORES if key in first.ood[sets[0]]]
    rows = [
        [
            one.name,
            key,
            *(spread(name, one.ood[key], one.ood_std.get(key, {})) for name in columns),
        ]
        for one in summaries
        for key in sets
    ]
    headings = ["method", "set", *(SCORES[key] for key in columns)]
    return Table("under shift", headings, rows, left=2)


def cost_table(summaries: Sequence[Summary]) -> Table:
    """Costs as means over seeds, those that are known of any method.

    ``extra numbers`` is what the adapter's file holds beyond that of plain LoRA.
    """
    plain = next((s.mean.get("parameters") for s in summaries if s.method == PLAIN), None)
    known = {name for one in summaries for name in one.mean}
    if plain is None:
        known.discard("parameters")
    columns = {name: column for name, column in COSTS.items() if name in known}
    rows = []
    for one in summaries:
        cells = []
        for name, (_, digits) in columns.items():
            value = one.mean.get(name)
            if value is None:
                cells.append("–")
            elif name == "parameters" and plain is not None:
                cells.append(f"{value - plain:+,.0f}" if value != plain else "0")
            else:
                cells.append(f"{value:,.{digits}f}")
        rows.append([one.name, *cells])
    headings = ["method", *(heading for heading, _ in columns.values())]
    return Table("cost", headings, rows)


def comparison_table(
    summaries: Sequence[Summary],
    failures: Sequence[Failure],
    seeds: int,
    titles: Mapping[str, str] | None = None,
) -> Table:
    """Scores and costs side by side, and below them what failed.

    Args:
        summaries: The rows.
        failures: What failed.
        seeds: Number of seeds that were asked for.
        titles: By word what failures are called that are no words of `compare`, such as values of a sweep.
    """
    headings, rows = ["method"], []
    if summaries:
        scores, costs = score_table(summaries, seeds), cost_table(summaries)
        headings = [*scores.headings, *costs.headings[1:]]
        rows = [[*a, *b[1:]] for a, b in zip(scores.rows, costs.rows, strict=True)]
    for failure in failures:
        word = failure.method
        name = titles[word] if titles and word in titles else title_of(word)
        title = f"{name}, seed {failure.seed}"
        rows.append([title, f"failed: {shorten(failure.error, 200)}"])
    return Table("", headings, rows)


def run_tables(summaries: Sequence[Summary], title: str) -> str:
    """All that there is to say about a few runs, as text: scores, under shift, costs, a legend."""
    tables = (score_table(summaries, title=title), shift_table(summaries), cost_table(summaries))
    return "".join(table.text() for table in tables if table is not None) + legend(summaries)


def legend(summaries: Sequence[Summary]) -> str:
    """What ± and MiB mean in the tables."""
    seeds = summaries[0].seeds
    spread = (
        f"mean ± standard deviation over {len(seeds)} seeds"
        if len(seeds) > 1
        else f"a single seed ({seeds[0]}): no spread"
    )
    measure = {
        "cuda allocated": "peak memory that torch allocated on the GPU",
        "resident, reset": "peak resident memory of the whole process, reset before each phase",
    }.get(memory_measure(), "highest resident memory of the process since it began")
    return f"{spread}; MiB: {measure}"


def spread(key: str, mean: Mapping[str, float], std: Mapping[str, float]) -> str:
    """A score as mean ± standard deviation, without the 0 before the point."""
    return bare(f"{mean[key]:.3f}" + (f"±{std[key]:.3f}" if key in std else ""))


def bare(text: str) -> str:
    """Numbers without the 0 before the point, and with a minus that is as wide as the plus."""
    return re.sub(r"(?<!\d)0\.", ".", text.replace("-", "−"))
