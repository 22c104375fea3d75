"""``report.html``: what runs found, as a page to look at."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from bayes_kernels import metrics

from .. import html, svg
from ..files import write_text
from ..hf.tasks.answers import answer
from ..svg import Series
from ..table import Table
from ..task import Example, Task
from .results import Summary
from .scoring import Row
from .tables import cost_table, legend, score_table, shift_table

REPORT_FILE = "report.html"
# Texts of each kind; points of a curve; bins of a histogram.
_TEXTS, _POINTS, _BINS = 5, 200, 24
_CLASSES = 3  # with a bar each
_STYLE = """
.verdict{border-left:.25rem solid var(--strong);padding:.2rem .8rem;background:var(--panel)}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:.2rem 1rem;padding:0;margin:.5rem 0 0;
font-size:.88rem}
.legend li{display:flex;align-items:center;gap:.4rem}.legend svg{width:28px;height:12px}
.texts{display:grid;gap:.6rem;padding:0;margin:.5rem 0;list-style:none}
.texts li{border:1px solid var(--line);border-radius:.5rem;padding:.6rem .8rem}
.texts p{margin:0 0 .4rem;overflow-wrap:anywhere}
.bar{display:grid;grid-template-columns:minmax(6rem,14rem) 1fr 3.5rem;gap:.6rem;
align-items:center;font-size:.88rem}
.bar i{display:block;height:.6rem;border-radius:.3rem;background:var(--series-0)}
.bar b{font-weight:600}.bar span:last-child{text-align:right}
.bar.other i{background:var(--quiet);opacity:.45}
"""


_COLUMNS = (
    "by chance: the ECE that a perfectly calibrated model would have on as many texts; over-confidence: mean "
    "confidence less accuracy"
)


def write_page(
    folder: Path,
    summaries: Sequence[Summary],
    rows: Sequence[Row],
    task: Task,
    *,
    title: str,
    verdict: str = "",
    note: str = "",
    figures: Sequence[str] = (),
    more: Sequence[Table] = (),
    command: Sequence[str] = (),
) -> Path:
    """Write `report.html`: scores, reliability, risk and coverage, entropies, telling texts.

    Readers see the old page or the whole new one. It needs nothing from elsewhere.

    Args:
        folder: Where to write.
        summaries: Scores over seeds.
        rows: Predictors on the task's test examples, of one seed. Texts and entropies are those of
            the last.
        task: The task.
        title: The heading.
        verdict: What was found, in a sentence.
        note: What else there is to say about the runs.
        figures: Pictures that come first, such as `score_figures`.
        more: Tables after those of the scores.
        command: The command line.

    Returns:
        The file.
    """
    shown = rows[-1]
    tables = [score_table(summaries), shift_table(summaries), *more, cost_table(summaries)]
    body = [f"<p>{html.escape(_about(task))}</p>"]
    body += [f'<p class="verdict">{html.escape(verdict)}</p>'] if verdict else []
    body += ["<h2>Scores</h2>", *(one.html() for one in tables if one is not None)]
    quiet = (legend(summaries), _COLUMNS, note)
    body += [f'<p class="quiet">{html.escape(text)}</p>' for text in quiet if text]
    body += ["<h2>Pictures</h2>", '<div class="grid">', *figures, *_pictures(rows, shown)]
    body.append("</div>")
    body += _texts(shown, task)
    if command:
        body += ["<h2>Command</h2>", f"<pre>{html.escape(' '.join(command))}</pre>"]
    path = folder / REPORT_FILE
    write_text(path, html.page(title, "\n".join(body), style=_STYLE.replace("\n", "")))
    return path


def _about(task: Task) -> str:
    sizes = ", ".join(f"{len(part):,} {name}" for name, part in task.splits.items() if part)
    return f"{task.name}: {task.kind.replace('_', ' ')} with {task.n_classes} classes; {sizes}."


# --- Pictures ------------------------------------------------------------------------------------


def _figure(chart: str, names: Sequence[str], caption: str) -> str:
    """A picture with its caption, and with a legend where there are names."""
    parts = [chart, *([svg.legend(names)] if names else ())]
    parts.append(f"<figcaption>{html.escape(caption)}</figcaption>")
    return "<figure>\n" + "\n".join(parts) + "</figure>"


def _pictures(rows: Sequence[Row], shown: Row) -> list[str]:
    names = [row.name for row in rows]
    reliable, risky = [], []
    for row in rows:
        bins = metrics.reliability_bins(row.log_probs, row.labels)
        full = bins.count > 0
        confidence, accuracy = bins.confidence[full].tolist(), bins.accuracy[full].tolist()
        reliable.append(Series(row.name, confidence, accuracy, marked=True))
        curve = metrics.risk_coverage_curve(
            *metrics.confidence_and_correct(row.log_probs, row.labels)
        )
        # The first points are rates over a handful of texts.
        kept = torch.arange(len(curve.coverage))[curve.coverage >= 0.05]
        kept = kept[:: max(1, len(kept) // _POINTS)]
        risky.append(Series(row.name, curve.coverage[kept].tolist(), curve.risk[kept].tolist()))
    found = [
        _figure(
            svg.chart(
                reliable,
                title="Reliability diagram",
                xlabel="confidence",
                ylabel="accuracy",
                x=(0, 1),
                y=(0, 1),
                diagonal=True,
            ),
            names,
            "Reliability: on the dotted line a confidence of 70 % is right 70 % of the time; below it a "
            "model is overconfident.",
        ),
        _figure(
            svg.chart(
                risky,
                title="Risk and coverage",
                xlabel="share of texts answered, most confident first",
                ylabel="error rate",
                x=(0, 1),
            ),
            names,
            "Risk and coverage: the error rate if only the most confident texts are answered; lower "
            "is better.",
        ),
    ]
    inside = metrics.predictive_entropy(shown.log_probs)
    right = shown.log_probs.argmax(-1) == shown.labels
    pairs = [("right answers", inside[right], "wrong answers", inside[~right])]
    pairs += [("test texts", inside, "foreign texts", shown.entropy_ood)]
    captions = (
        f"Entropy of {shown.name} for right and wrong answers: the further apart, the better "
        "uncertainty tells which to check.",
        f"Entropy of {shown.name} for test texts and for texts of another kind.",
    )
    for (name, a, other, b), caption in zip(pairs, captions, strict=True):
        if len(a) and len(b):
            found.append(_entropies(name, a, other, b, caption))
    return found


def score_figures(
    values: Sequence[str],
    scores: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]],
    *,
    xlabel: str,
) -> list[str]:
    """A picture of each score against the values of a setting, with the arguments of `plots.score_curves`."""
    found = []
    for heading, curves in scores.items():
        lines = []
        for name, points in curves.items():
            y, spread = ([point[i] for point in points] for i in (0, 1))
            lines.append(Series(name, range(len(values)), y, marked=True, spread=spread))
        ends = [
            y + bar
            for one in lines
            for y, spread in zip(one.y, one.spread, strict=True)
            for bar in (0.0, -spread, spread)
        ]
        known = [y for y in ends if math.isfinite(y)] or [0.0]
        room = max(0.1 * (max(known) - min(known)), 1e-3)
        chart = svg.chart(
            lines,
            title=f"{heading} against {xlabel}",
            xlabel=xlabel,
            ylabel=heading,
            x=(0, max(len(values) - 1, 1)),
            y=(min(known) - room, max(known) + room),
            xticks=values,
        )
        bars = any(spread > 0 for one in lines for spread in one.spread)  # NaN for a single seed
        end = "; bars: standard deviation over seeds." if bars else "."
        names = [one.name for one in lines if one.name]
        found.append(_figure(chart, names, f"{heading} against {xlabel}{end}"))
    return found


def _entropies(name: str, a: Tensor, other: str, b: Tensor, caption: str) -> str:
    lowest = min(float(a.min()), float(b.min()))
    highest = max(float(a.max()), float(b.max()), lowest + 1e-6)
    edges = torch.linspace(lowest, highest, _BINS + 1, dtype=torch.float64)
    curves = []
    for label, values in ((name, a), (other, b)):
        counts = torch.histc(values.double(), _BINS, lowest, highest)
        density = (counts * _BINS / counts.sum() / (highest - lowest)).tolist()
        x = [
            edge
            for pair in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)
            for edge in pair
        ]
        y = [value for value in density for _ in range(2)]
        curves.append(Series(f"{label} (n = {len(values):,})", x, y, filled=True))
    chart = svg.chart(
        curves,
        title=caption,
        xlabel="predictive entropy (nats)",
        ylabel="density",
        x=(lowest, highest),
    )
    return _figure(chart, [curve.name for curve in curves], caption)


# --- Texts ---------------------------------------------------------------------------------------


def _texts(row: Row, task: Task) -> list[str]:
    """The most and the least certain texts, and the wrong answers that were given with most confidence."""
    confidence, correct = metrics.confidence_and_correct(row.log_probs, row.labels)
    rising = confidence.argsort(stable=True).tolist()
    right = correct.bool().tolist()
    groups: list[tuple[str, Callable[[int], bool], bool]] = [
        ("Most certain", lambda i: True, True),
        ("Least certain", lambda i: True, False),
        ("Wrong with most confidence", lambda i: not right[i], True),
    ]
    parts = [
        f"<h2>Texts, as {html.escape(row.name)} sees them</h2>",
        '<p class="quiet">✓ is the right answer.</p>',
    ]
    for heading, wanted, falling in groups:
        order = rising[::-1] if falling else rising
        chosen = [i for i in order if wanted(i)][:_TEXTS]
        if not chosen:
            continue
        parts += [f"<h3>{heading}</h3>", '<ul class="texts">']
        parts += [_text(task, task.test[i], row.log_probs[i].exp()) for i in chosen]
        parts.append("</ul>")
    return parts


def _text(task: Task, example: Example, probs: Tensor) -> str:
    best = probs.argsort(descending=True, stable=True).tolist()
    classes = best[:_CLASSES]
    if example.label is not None and example.label not in classes:
        classes.append(example.label)
    bars = []
    for label in classes:
        name = html.escape(answer(task, example, label))
        true = label == example.label
        name = f"<b>{name} ✓</b>" if true else name
        share = float(probs[label])
        bars.append(
            f'<div class="bar{"" if true else " other"}"><span>{name}</span>'
            f'<i style="width:{100 * share:.1f}%"></i><span>{share:.3f}</span></div>'
        )
    return f"<li><p>{html.escape(example.text)}</p>{''.join(bars)}</li>"
