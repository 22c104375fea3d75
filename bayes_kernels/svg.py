"""Charts for HTML pages, as inline SVG in the colours of `bayes_kernels.html`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .html import escape

__all__ = ["Series", "chart", "legend"]

_COLORS = 7
_DASHES = ("", "7 3", "2 3", "8 3 2 3", "12 3", "4 2 1 2", "1 2")
_WIDTH, _HEIGHT = 460.0, 300.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 54.0, 12.0, 10.0, 44.0
_LETTER = 6.8  # width of a digit of 12 pixels, in the widest of the fonts that pages name
_AXIS_NAME = 26.0  # left of the numbers


@dataclass(frozen=True)
class Series:
    """One curve.

    Attributes:
        name: For the legend.
        x, y: The points.
        filled: Whether the area below it is shaded.
        marked: Whether its points have dots.
        spread: Half the length of a bar through each point, such as a standard deviation; none by default.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    filled: bool = False
    marked: bool = False
    spread: Sequence[float] = ()


def _color(index: int) -> str:
    return f"var(--series-{index % _COLORS})"


def _dash(index: int) -> str:
    # The second seven curves have the colours of the first, and other dashes.
    return _DASHES[(index + index // _COLORS) % len(_DASHES)]


def chart(
    series: Sequence[Series],
    *,
    title: str,
    xlabel: str,
    ylabel: str,
    x: tuple[float, float] | None = None,
    y: tuple[float, float] | None = None,
    diagonal: bool = False,
    xticks: Sequence[str] = (),
) -> str:
    """Curves over common axes.

    Args:
        series: At least one; points that are not finite are left out.
        title: What screen readers say.
        xlabel, ylabel: Names of the axes.
        x, y: Their ends; by default those of the points, with 0.
        diagonal: Whether to draw x = y.
        xticks: Words at x = 0, 1, ..., in place of numbers; of many, as many as have room.

    Returns:
        An ``svg`` element, as wide as its place.
    """
    points = [_finite(one) for one in series]
    everything = [point for one in points for point in one]
    left, right = x or _ends([a for a, _ in everything])
    low, high = y or _ends([b for _, b in everything])

    down_ticks = _numbered(_ticks(low, high))
    margin = max(_LEFT, _AXIS_NAME + _LETTER * max(len(word) for _, word in down_ticks))

    def place(a: float, b: float) -> str:
        across = margin + (a - left) / (right - left) * (_WIDTH - margin - _RIGHT)
        down = _HEIGHT - _BOTTOM - (b - low) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)
        return f"{across:.1f},{min(max(down, _TOP), _HEIGHT - _BOTTOM):.1f}"

    parts = [
        f'<svg viewBox="0 0 {_WIDTH:.0f} {_HEIGHT:.0f}" role="img" aria-label="{escape(title)}" '
        'font-size="12" fill="var(--quiet)">'
    ]
    numbered = _numbered(_ticks(left, right))
    across_ticks: Sequence[tuple[float, str]] = list(enumerate(xticks)) if xticks else numbered
    widest = max(len(word) for _, word in across_ticks) * _LETTER + 6
    every = math.ceil(widest * (len(across_ticks) - 1) / (_WIDTH - margin - _RIGHT))
    for tick, word in across_ticks[:: max(every, 1)]:
        across, down = place(tick, low).split(",")
        parts.append(f'<path d="M{across},{_TOP:.0f}V{down}" stroke="var(--line)"/>')
        parts.append(
            f'<text x="{across}" y="{float(down) + 16:.1f}" text-anchor="middle">{escape(word)}</text>'
        )
    for tick, word in down_ticks:
        across, down = place(left, tick).split(",")
        parts.append(f'<path d="M{across},{down}H{_WIDTH - _RIGHT:.0f}" stroke="var(--line)"/>')
        parts.append(
            f'<text x="{float(across) - 6:.1f}" y="{float(down) + 4:.1f}" text-anchor="end">'
            f"{word}</text>"
        )
    middle = (margin + _WIDTH - _RIGHT) / 2
    parts.append(
        f'<text x="{middle:.0f}" y="{_HEIGHT - 8:.0f}" text-anchor="middle">{escape(xlabel)}</text>'
    )
    middle = (_TOP + _HEIGHT - _BOTTOM) / 2
    parts.append(
        f'<text transform="translate(14 {middle:.0f}) rotate(-90)" text-anchor="middle">'
        f"{escape(ylabel)}</text>"
    )
    if diagonal:
        begin, end = max(left, low), min(right, high)
        line = f"M{place(begin, begin)}L{place(end, end)}"
        parts.append(f'<path d="{line}" stroke="var(--quiet)" stroke-dasharray="2 4"/>')
    for i, (one, found) in enumerate(zip(series, points, strict=True)):
        if not found:
            continue
        line = "M" + "L".join(place(a, b) for a, b in found)
        if one.filled:
            area = f"{line}L{place(found[-1][0], low)}L{place(found[0][0], low)}Z"
            parts.append(f'<path d="{area}" fill="{_color(i)}" fill-opacity="0.18"/>')
        dash = f' stroke-dasharray="{_dash(i)}"' if _dash(i) else ""
        parts.append(f'<path d="{line}" fill="none" stroke="{_color(i)}" stroke-width="2"{dash}/>')
        for a, b, spread in zip(one.x, one.y, one.spread, strict=False):
            if math.isfinite(b) and math.isfinite(spread) and spread > 0:
                bar = f"M{place(a, b - spread)}L{place(a, b + spread)}"
                parts.append(f'<path d="{bar}" stroke="{_color(i)}" stroke-width="1.2"/>')
        if one.marked:
            for a, b in found:
                across, down = place(a, b).split(",")
                parts.append(f'<circle cx="{across}" cy="{down}" r="3.2" fill="{_color(i)}"/>')
    return "\n".join([*parts, "</svg>"])


def legend(names: Sequence[str]) -> str:
    """Names beside the strokes of their curves, in the order of the series of a chart."""
    parts = []
    for i, name in enumerate(names):
        dash = f' stroke-dasharray="{_dash(i)}"' if _dash(i) else ""
        stroke = f'<path d="M0,6H28" stroke="{_color(i)}" stroke-width="3"{dash}/>'
        svg = f'<svg viewBox="0 0 28 12" aria-hidden="true">{stroke}</svg>'
        parts.append(f"<li>{svg}<span>{escape(name)}</span></li>")
    return f'<ul class="legend">{"".join(parts)}</ul>'


def _finite(one: Series) -> list[tuple[float, float]]:
    pairs = zip(map(float, one.x), map(float, one.y), strict=True)
    return [pair for pair in pairs if all(map(math.isfinite, pair))]


def _ends(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(0.0, *values, 0.0), max(0.0, *values, 0.0)
    return (low, high) if high > low else (low, low + 1.0)


def _numbered(ticks: Sequence[float]) -> list[tuple[float, str]]:
    """Ticks with their labels, all of the same number of decimals."""
    words = [f"{tick:g}" for tick in ticks]
    if not any("e" in word for word in words):
        decimals = max(len(word.partition(".")[2]) for word in words)
        words = [f"{tick:.{decimals}f}" for tick in ticks]
    return list(zip(ticks, words, strict=True))


def _ticks(low: float, high: float) -> list[float]:
    """Four to eight round numbers in a range."""
    size = 10.0 ** math.floor(math.log10(high - low))
    steps = (size * part for part in (0.1, 0.2, 0.25, 0.5, 1.0, 2.0))
    step = next(step for step in steps if (high - low) / step <= 8)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(i * step, 10) for i in range(first, last + 1)]
