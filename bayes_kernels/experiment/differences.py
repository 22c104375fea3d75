"""Rows of a comparison beside plain LoRA on the same test examples: differences with intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from bayes_kernels import metrics

from ..hf.method import PLAIN
from ..table import Table
from .compare import RESULT_FILE, known_methods, load_run
from .results import Summary, summarise
from .run import Run
from .scoring import Row
from .tables import SCORES, bare, spread

# Scores with a column for the difference, in the order of the table.
_COMPARED = ("accuracy", "nll", "brier", "ece")
_OTHERS = ("ece_floor", "signed_calibration_error")


def runs_in(folder: Path) -> list[Run]:
    """The runs that `compare` or `sweep` has finished in a folder, in the order of its table.

    Raises:
        ValueError: There are none, or one is damaged.
    """
    found = [load_run(path) for path in sorted(Path(folder).glob(f"*/seed-*/{RESULT_FILE}"))]
    found = [one for one in found if one.rows]
    if not found:
        raise ValueError(f"{folder}: expected METHOD/seed-N/{RESULT_FILE} of compare, found none")
    words = known_methods()
    order = {word: i for i, word in enumerate(words)}
    return sorted(
        found, key=lambda one: (order.get(one.rows[0].method, len(words)), one.experiment.seed)
    )


def difference_table(runs: Sequence[Run], summaries: Sequence[Summary] | None = None) -> Table:
    """Scores as means over seeds, and less plain LoRA's on the same test examples.

    Differences are means over the seeds that both rows have, with the 95 % interval of the paired
    bootstrap over test examples (`metrics.paired_bootstrap`): of other test sets, not of other seeds.
    Out-of-distribution sets have the AUROC of predictive entropy, and their NLL where they have labels.

    Args:
        runs: From `compare`, with plain LoRA (`mle`) among them; without it there are no differences.
        summaries: The rows to show, in their order; all by default.
    """
    rows: dict[str, dict[int, Row]] = {}
    for run in runs:
        for row in run.rows:
            rows.setdefault(row.name, {})[run.experiment.seed] = row
    plain = next(
        (
            own
            for own in rows.values()
            if all(row.method == PLAIN and row.temperature is None for row in own.values())
        ),
        {},
    )
    shown = list(summarise(runs) if summaries is None else summaries)
    sets = list(shown[0].ood)
    labelled = [key for key in sets if "nll" in shown[0].ood[key]]
    headings = ["method"]
    for key in _COMPARED:
        headings += [SCORES[key], "less MLE's"]
    headings += [SCORES[key] for key in _OTHERS]
    headings += [f"AUROC {key} ↑" for key in sets] + [f"NLL {key} ↓" for key in labelled]
    table = []
    for one in shown:
        apart = {} if rows[one.name] is plain else _differences(rows[one.name], plain)
        cells = [one.name]
        for key in _COMPARED:
            cells += [spread(key, one.mean, one.std), _interval(apart.get(key))]
        cells += [spread(key, one.mean, one.std) for key in _OTHERS]
        cells += [spread("auroc", one.ood[key], one.ood_std.get(key, {})) for key in sets]
        cells += [spread("nll", one.ood[key], one.ood_std.get(key, {})) for key in labelled]
        table.append(cells)
    return Table("beside plain LoRA", headings, table)


def markdown(folder: str | Path) -> str:
    """The table of a folder that `compare` wrote, finished or not.

    Example:
        print(markdown("runs/compare"))
    """
    return difference_table(runs_in(Path(folder))).markdown()


def _differences(own: Mapping[int, Row], plain: Mapping[int, Row]) -> dict[str, metrics.Difference]:
    pairs = [(row, plain[seed]) for seed, row in own.items() if seed in plain]
    if not pairs:
        return {}
    labels = pairs[0][0].labels
    if not all(torch.equal(row.labels, labels) for pair in pairs for row in pair):
        return {}  # other test examples for each seed
    first, second = (torch.stack([pair[i].log_probs for pair in pairs]) for i in (0, 1))
    finite = all(math.isfinite(row.report.nll) for pair in pairs for row in pair)
    scores = [key for key in _COMPARED if finite or key != "nll"]
    return metrics.paired_bootstrap(first, second, labels, scores=scores)


def _interval(found: metrics.Difference | None) -> str:
    if found is None:
        return ""
    return bare(f"{found.value:+.3f} [{found.low:+.3f}, {found.high:+.3f}]")
