"""Pictures of calibration, selective prediction and out-of-distribution detection.

Each function takes results of `bayes_kernels.metrics` and returns a new `matplotlib.figure.Figure`, which
a notebook shows where it is the last line of a cell. There is no pyplot, no display and no global state,
so the functions are safe in servers, threads and notebooks. `save` writes a PNG atomically.

Needs matplotlib: `pip install bayes-kernels[plots]`.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from bayes_kernels import metrics
from bayes_kernels.files import replacing_file
from bayes_kernels.metrics import ReliabilityBins, RiskCoverageCurve
from bayes_kernels.metrics.inputs import ArrayLike, as_scores, check_int

try:
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, MaxNLocator, PercentFormatter
except ImportError as error:
    raise ImportError(
        f"plots need matplotlib ({error}): pip install bayes-kernels[plots]"
    ) from None

__all__ = [
    "auroc_intervals",
    "entropy_histogram",
    "errors_by_draws",
    "reliability_diagram",
    "risk_coverage",
    "save",
    "score_curves",
]

# Okabe and Ito's palette, told apart under every common colour blindness; markers and line styles
# keep the methods apart in grey print.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_Dash = str | tuple[int, tuple[int, ...]]
_DASHES: tuple[_Dash, ...] = ("-", "--", "-.", (0, (1, 1)), (0, (5, 1)), (0, (3, 1, 1, 1)), ":")
_INSIDE = 5  # entries of a legend that fit into the axes
_OVER, _UNDER = "#F2C3A0", "#9CC9E8"  # lighter than the bars they lie on


_Curve = TypeVar("_Curve", ReliabilityBins, RiskCoverageCurve)


class _Picture(Figure):
    """A figure that shows itself in a notebook; without pyplot, matplotlib's own are words there."""

    def _repr_png_(self) -> bytes:
        written = io.BytesIO()
        self.savefig(written, format="png", dpi=100)
        return written.getvalue()


def _figure(width: float, height: float) -> Figure:
    figure = _Picture(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _styles(count: int) -> list[tuple[str, str, _Dash]]:
    """(colour, marker, dash) of every line; the second seven have the first's colours, new dashes."""
    found = []
    for i in range(count):
        again = i // len(_COLORS)
        place = i % len(_COLORS)
        other = (place + again) % len(_DASHES)
        found.append((_COLORS[place], _MARKERS[(place + again) % len(_MARKERS)], _DASHES[other]))
    return found


def _legend(figure: Figure, axes: Axes, count: int) -> None:
    """Inside where there is room, else to the right of a wider picture."""
    if count <= _INSIDE:
        axes.legend(loc="best", fontsize=8, frameon=False, handlelength=2.6)
        return
    figure.set_figwidth(figure.get_figwidth() + 2.6)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False, handlelength=2.6)


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8)
    axes.xaxis.label.set_fontsize(9)
    axes.yaxis.label.set_fontsize(9)


def _by_name(
    where: str, methods: _Curve | Mapping[str, _Curve], wanted: type[_Curve], maker: str
) -> dict[str, _Curve]:
    if isinstance(methods, wanted):
        return {"": methods}
    if not isinstance(methods, Mapping) or not methods:
        raise ValueError(
            f"{where}: methods must be a {wanted.__name__} or a non-empty mapping from name to "
            f"{wanted.__name__}, got {type(methods).__name__}; make them with metrics.{maker}"
        )
    for name, value in methods.items():
        if not isinstance(value, wanted):
            raise ValueError(
                f"{where}: methods[{name!r}] must be a {wanted.__name__}, "
                f"got {type(value).__name__}; make it with metrics.{maker}"
            )
    return {str(name): value for name, value in methods.items()}


def _without_extra_bin(bins: ReliabilityBins) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Count, mean confidence, accuracy of B bins: the extra bin of confidence one has no width."""
    count = bins.count.numpy().astype(float)
    sums = np.stack([bins.confidence.numpy(), bins.accuracy.numpy()])
    sums = np.where(count > 0, sums, 0.0) * count
    for column in (count, *sums):
        column[-2] += column[-1]
    count, sums = count[:-1], sums[:, :-1]
    means = np.divide(sums, count, out=np.full_like(sums, np.nan), where=count > 0)
    return count, means[0], means[1]


def reliability_diagram(methods: ReliabilityBins | Mapping[str, ReliabilityBins]) -> Figure:
    """Accuracy against confidence, with the number of examples in each bin below.

    One method is drawn as bars, the gap between accuracy and mean confidence shaded, the ECE in the
    title and the count over each bin; several methods as lines through (mean confidence,
    accuracy), each ECE in the legend. The title also has the ECE that chance alone would give a
    perfectly calibrated predictor (`metrics.ece_floor`). The dotted diagonal is perfect calibration.
    Predictions of confidence exactly one, which the ECE puts into an extra bin, are drawn with the
    last bin.

    Args:
        methods: the result of `metrics.reliability_bins`, or several by name.

    Raises:
        ValueError: no method, or something else than `ReliabilityBins`.
    """
    named = _by_name("reliability_diagram", methods, ReliabilityBins, "reliability_bins")
    figure = _figure(4.2, 5.0)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    top.plot([0, 1], [0, 1], color="0.45", linewidth=1, linestyle=":", zorder=3)
    if len(named) == 1:
        ((name, bins),) = named.items()
        _reliability_bars(top, bottom, bins)
        lines = [name, f"ECE {bins.ece:.1%} ({_setting([bins])})"]
        top.set_title("\n".join(lines).strip(), fontsize=10)
    else:
        styles = _styles(len(named))
        for (name, bins), (color, marker, dash) in zip(named.items(), styles, strict=True):
            count, confidence, accuracy = _without_extra_bin(bins)
            full = count > 0
            top.plot(
                confidence[full],
                accuracy[full],
                color=color,
                marker=marker,
                markersize=4,
                linewidth=1.4,
                linestyle=dash,
                label=f"{name} (ECE {bins.ece:.1%})",
            )
            bottom.stairs(count, bins.edges.numpy(), color=color, linewidth=1.4, linestyle=dash)
        top.set_title(f"Reliability ({_setting(list(named.values()))})", fontsize=10)
    if len(named) <= _INSIDE:
        top.legend(loc="upper left", fontsize=8, frameon=False, handlelength=2.6)
    else:
        _legend(figure, top, len(named))
    top.set(xlim=(0, 1), ylim=(0, 1), ylabel="accuracy")
    bottom.set(xlabel="confidence", ylabel="examples")
    fullest = max(_without_extra_bin(bins)[0].max() for bins in named.values())
    bottom.set_ylim(0, 1.25 * fullest)
    bottom.yaxis.set_major_locator(MaxNLocator(nbins=3, integer=True))
    for axes in (top, bottom):
        _tidy(axes)
    return figure


def _setting(methods: list[ReliabilityBins]) -> str:
    """Numbers of examples, and the ECE of chance where it is known: "n = 300, chance 4.1%–4.4%"."""
    parts = ["n = " + _range(f"{n:,}" for n in sorted(bins.n for bins in methods))]
    floors = sorted(bins.floor.mean for bins in methods if bins.floor is not None)
    if floors:
        parts.append("chance " + _range(f"{floor:.1%}" for floor in floors))
    return ", ".join(parts)


def _range(rising: Iterable[str]) -> str:
    """The first and the last of rising numbers, one where they look the same."""
    shown = list(rising)
    return "–".join(dict.fromkeys((shown[0], shown[-1])))


def _reliability_bars(top: Axes, bottom: Axes, bins: ReliabilityBins) -> None:
    count, confidence, accuracy = _without_extra_bin(bins)
    full = count > 0
    edges = bins.edges.numpy()
    left, width = edges[:-1][full], np.diff(edges)[full]
    accuracy, confidence = accuracy[full], confidence[full]
    top.bar(
        left,
        accuracy,
        width,
        align="edge",
        color=_COLORS[0],
        edgecolor="white",
        linewidth=0.6,
        label="accuracy",
    )
    for color, label, side in (
        (_OVER, "over-confident by", confidence > accuracy),
        (_UNDER, "under-confident by", confidence < accuracy),
    ):
        if side.any():
            top.bar(
                left[side],
                (confidence - accuracy)[side],
                width[side],
                bottom=accuracy[side],
                align="edge",
                color=color,
                edgecolor="white",
                linewidth=0.6,
                label=label,
            )
    bars = bottom.bar(
        left, count[full], width, align="edge", color="0.6", edgecolor="white", linewidth=0.6
    )
    bottom.bar_label(bars, labels=[f"{int(c):,}" for c in count[full]], fontsize=6, padding=1)


def risk_coverage(methods: RiskCoverageCurve | Mapping[str, RiskCoverageCurve]) -> Figure:
    """Error rate among the kept predictions against the share kept, lower is better.

    Args:
        methods: the result of `metrics.risk_coverage_curve`, or several by name.

    Raises:
        ValueError: no method, or something else than `RiskCoverageCurve`.
    """
    named = _by_name("risk_coverage", methods, RiskCoverageCurve, "risk_coverage_curve")
    figure = _figure(4.6, 3.4)
    axes = figure.subplots()
    highest = 0.0
    for (name, curve), (color, _, dash) in zip(named.items(), _styles(len(named)), strict=True):
        coverage, risk = curve.coverage.numpy(), curve.risk.numpy()
        label = f"{name + ' ' if name else ''}(AURC {curve.aurc:.3f})"
        axes.plot(coverage, risk, color=color, linestyle=dash, linewidth=1.5, label=label)
        # The end of each curve is the error rate without rejection.
        axes.plot(
            coverage[-1:], risk[-1:], color=color, marker="o", markersize=4, clip_on=False, zorder=3
        )
        # The first few points are rates over a handful of examples: one early error there must not
        # flatten the rest of the picture.
        settled = risk[coverage >= min(0.05, coverage[-1])]
        highest = max(highest, float(settled.max()))
    axes.set(xlim=(0, 1), ylim=(0, min(1.0, highest * 1.15) or 0.05))
    axes.set(xlabel="coverage", ylabel="risk (error rate)", title="Selective prediction")
    axes.title.set_fontsize(10)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1.0))
    _legend(figure, axes, len(named))
    _tidy(axes)
    return figure


def entropy_histogram(
    score_in: ArrayLike,
    score_out: ArrayLike,
    *,
    names: tuple[str, str] = ("in-distribution", "out-of-distribution"),
    xlabel: str = "predictive entropy (nats)",
    n_bins: int = 30,
) -> Figure:
    """Uncertainty of in- and out-of-distribution inputs in common bins, each with unit area.

    The title gives `metrics.ood_auroc` and `metrics.fpr95`, out-of-distribution positive.

    Args:
        score_in: (n,) finite scores of in-distribution inputs, higher is more uncertain.
        score_out: (m,) finite scores of out-of-distribution inputs.
        names: legend entries.
        xlabel: what the score is.
        n_bins: number of bins over the common range.

    Raises:
        ValueError: empty, NaN or infinite scores, or a bad number of bins.
    """
    auroc = metrics.ood_auroc(score_in, score_out)
    fpr = metrics.fpr95(score_in, score_out)
    check_int("entropy_histogram", "n_bins", n_bins)
    groups = [
        as_scores("entropy_histogram", side, scores).cpu().numpy()
        for side, scores in (("score_in", score_in), ("score_out", score_out))
    ]
    everything = np.concatenate(groups)
    if not np.isfinite(everything).all():
        raise ValueError("entropy_histogram: scores must be finite, got infinity; drop those rows")
    edges = np.histogram_bin_edges(everything, bins=n_bins)
    figure = _figure(4.6, 3.2)
    axes = figure.subplots()
    for scores, name, color, dash in zip(groups, names, _COLORS[:2], _DASHES[:2], strict=True):
        density, _ = np.histogram(scores, bins=edges, density=True)
        axes.stairs(density, edges, fill=True, color=color, alpha=0.25)
        label = f"{name} (n = {len(scores):,})"
        axes.stairs(density, edges, color=color, linewidth=1.5, linestyle=dash, label=label)
    axes.set(xlabel=xlabel, ylabel="density", title=f"AUROC {auroc:.3f}, FPR95 {fpr:.1%}")
    axes.title.set_fontsize(10)
    axes.set_xlim(edges[0], edges[-1])
    axes.set_ylim(bottom=0)
    axes.legend(loc="best", fontsize=8, frameon=False, handlelength=2.6)
    _tidy(axes)
    return figure


def errors_by_draws(panels: Mapping[str, Mapping[str, Mapping[int, float]]]) -> Figure:
    """Monte-Carlo errors against the number of draws, both on logarithmic axes.

    Args:
        panels: for each title the curves by name; a curve has an error for each number of draws. A dotted
            line falls like one over the root of that number, from the first point of the first curve.

    Raises:
        ValueError: there are no curves, or a number of draws or an error is not positive and finite.
    """
    values = [
        value
        for curves in panels.values()
        for curve in curves.values()
        for point in curve.items()
        for value in point
    ]
    if not values or not all(0 < value < np.inf for value in values):
        raise ValueError(
            "errors_by_draws: draws and errors must be positive and finite, and there must be some, got "
            f"{panels}"
        )
    figure = _figure(3.6 * len(panels), 3.2)
    for axes, (title, curves) in zip(
        np.atleast_1d(figure.subplots(1, len(panels))), panels.items(), strict=True
    ):
        guide = next(iter(curves.values()))
        first = min(guide)
        draws = np.array(sorted({n for curve in curves.values() for n in curve}))
        axes.plot(draws, guide[first] * np.sqrt(first / draws), ":", color="0.6", linewidth=1)
        for (name, curve), (color, marker, dash) in zip(
            curves.items(), _styles(len(curves)), strict=True
        ):
            points = sorted(curve.items())
            axes.plot(*zip(*points, strict=True), color=color, marker=marker, ls=dash, label=name)
        axes.set(xscale="log", yscale="log", xlabel="draws", title=title)
        axes.set_xticks(draws, [str(n) for n in draws])
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
        axes.title.set_fontsize(10)
        axes.legend(fontsize=8, frameon=False, handlelength=2.6)
        _tidy(axes)
    return figure


def auroc_intervals(panels: Mapping[str, Mapping[str, metrics.Interval]]) -> Figure:
    """AUROCs with their intervals, a line for each row and a panel for each question.

    Args:
        panels: for each title the results of `metrics.auroc_interval` by row. A row has one line in all
            panels, in the order of the panel with most rows, and none where a panel lacks it. The dotted
            line is chance.

    Raises:
        ValueError: there are no rows.
    """
    by_size = sorted(panels.values(), key=len, reverse=True)
    names = list(dict.fromkeys(name for rows in by_size for name in rows))
    if not names:
        raise ValueError(f"auroc_intervals: panels must have rows, got {dict(panels)}")
    figure = _figure(2.2 + 2.6 * len(panels), 0.8 + 0.3 * len(names))
    axes_of = figure.subplots(1, len(panels), sharex=True, sharey=True, squeeze=False)[0]
    places = {name: -i for i, name in enumerate(names)}
    for axes, (title, rows) in zip(axes_of, panels.items(), strict=True):
        axes.axvline(0.5, color="0.45", linewidth=1, linestyle=":")
        for name, (value, low, high) in rows.items():
            axes.plot([low, high], [places[name]] * 2, color=_COLORS[0], linewidth=1.5)
            axes.plot([value], [places[name]], "o", color=_COLORS[0], markersize=5)
        axes.set(title=title, xlabel="AUROC", yticks=list(places.values()), yticklabels=names)
        axes.title.set_fontsize(10)
        _tidy(axes)
    return figure


def score_curves(
    values: Sequence[str],
    scores: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]],
    *,
    xlabel: str = "",
) -> Figure:
    """Scores against the values of a setting, a panel for each score.

    Args:
        values: at least two, in their order; they stand at equal distances.
        scores: for each score, by its heading, the curves by name: mean and standard deviation at each
            value; NaN for none.
        xlabel: the setting.

    Raises:
        ValueError: fewer than two values, no score, or another number of scores than of values.
    """
    lengths = {len(points) for curves in scores.values() for points in curves.values()}
    if len(values) < 2 or lengths != {len(values)}:
        raise ValueError(
            f"score_curves: scores must have a mean and deviation for each of two values or more, got "
            f"{len(values)} values and {sorted(lengths) or 'no scores'}"
        )
    figure = _figure(2.6 * len(scores), 2.6)
    panels = figure.subplots(1, len(scores), squeeze=False)[0]
    places = np.arange(len(values))
    for axes, (title, curves) in zip(panels, scores.items(), strict=True):
        styles = _styles(len(curves))
        for (name, points), (color, marker, dash) in zip(curves.items(), styles, strict=True):
            means, deviations = np.array(points, dtype=float).T
            axes.errorbar(
                places,
                means,
                yerr=np.nan_to_num(deviations),
                color=color,
                marker=marker,
                linestyle=dash,
                markersize=4,
                linewidth=1.5,
                capsize=2,
                label=name,
            )
        if axes is panels[0] and len(curves) > 1:
            axes.legend(loc="best", fontsize=8, frameon=False, handlelength=2.6)
        axes.set(title=title, xlabel=xlabel, xticks=places, xticklabels=list(values))
        axes.title.set_fontsize(10)
        axes.tick_params(axis="x", labelsize=7)
        _tidy(axes)
    return figure


def save(figure: Figure, path: str | os.PathLike[str], *, dpi: int = 200) -> Path:
    """Write a figure as PNG; readers see the old file or the whole new one, never a part.

    Missing folders are made. The same figure gives the same bytes.

    Args:
        figure: the result of a function above.
        path: ends in `.png`.
        dpi: dots per inch.

    Returns:
        The path written.

    Raises:
        ValueError: the name does not end in `.png`.
    """
    target = Path(path)
    if target.suffix.lower() != ".png":
        raise ValueError(f"save: path must end in .png, got {str(target)!r}")
    with replacing_file(target) as temporary, open(temporary, "xb") as stream:
        figure.savefig(stream, format="png", dpi=dpi)
    return target
