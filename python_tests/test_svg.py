"""Charts show their points where the axes say."""

from __future__ import annotations

import itertools
import math
import re

import pytest
from page_parser import Parsed

from bayes_kernels.svg import Series, chart, legend


def paths(svg: str) -> list[list[tuple[float, float]]]:
    found = re.findall(r'<path d="M([^"]*)" fill="none"', svg)
    return [[tuple(map(float, p.split(","))) for p in d.split("L")] for d in found]  # type: ignore[misc]


def ticks(svg: str, anchor: str) -> dict[float, float]:
    """Number and place of the labels on one axis."""
    pattern = rf'<text x="([\d.]+)" y="([\d.]+)" text-anchor="{anchor}">([-\de.]+)</text>'
    place = 0 if anchor == "middle" else 1
    return {float(m[2]): float(m[place]) for m in re.findall(pattern, svg)}


@pytest.mark.parametrize("ends", [(0, 1), (0.3, 0.52), (-3, 40), (0, 9.9), (0, 1e-5), (1000, 1e6)])
def test_points_are_where_the_axes_say(ends: tuple[float, float]) -> None:
    low, high = ends
    x = [low, low + 0.25 * (high - low), high]
    svg = chart([Series("a", x, x)], title="t", xlabel="x", ylabel="y", x=ends, y=ends)
    Parsed(svg)
    (line,) = paths(svg)
    across, down = ticks(svg, "middle"), ticks(svg, "end")
    assert 3 <= len(across) <= 9 and across.keys() == down.keys()
    # Two labels define an axis; the points lie on it.
    (a, at), *_, (b, bt) = across.items()
    (c, ct), *_, (d, dt) = down.items()
    for value, (px, py) in zip(x, line, strict=True):
        assert px == pytest.approx(at + (value - a) / (b - a) * (bt - at), abs=0.3)
        assert py == pytest.approx(ct - 4 + (value - c) / (d - c) * (dt - ct), abs=0.3)


def test_curves_can_be_told_apart() -> None:
    names = [f"<curve {i}>" for i in range(12)]
    curves = [Series(name, [0, 1], [i, i], marked=True) for i, name in enumerate(names)]
    svg = chart(curves, title="t & u", xlabel="x", ylabel="y")
    looks = re.findall(r'fill="none" stroke="(.*?)" stroke-width="2"(.*?)/>', svg)
    assert len(set(looks)) == 12 and svg.count("<circle") == 24
    parsed = Parsed(legend(names))
    assert [text for text in parsed.text if text.strip()] == names
    assert [v for t, n, v in Parsed(svg).attributes if n == "aria-label"] == ["t & u"]


def test_points_that_are_not_finite_are_left_out() -> None:
    curve = Series("a", [0, 0.5, 1], [0, math.nan, 1], filled=True)
    svg = chart([curve, Series("none", [], [])], title="t", xlabel="x", ylabel="y", diagonal=True)
    assert [len(line) for line in paths(svg)] == [2] and "nan" not in svg
    assert svg.count("fill-opacity") == 1


def test_numbers_of_an_axis_have_room_and_the_same_decimals() -> None:
    curve = Series("a", [0, 1], [1.0925, 1.0935])
    svg = chart([curve], title="t", xlabel="x", ylabel="y", y=(1.092, 1.094))
    found = re.findall(r'<text x="([\d.]+)" y="[\d.]+" text-anchor="end">([\d.]+)<', svg)
    assert {len(word) for _, word in found} == {6} and len(found) >= 4
    # Right of the axis' name, whose letters end at 18.
    assert all(float(x) - 6.7 * len(word) > 18 for x, word in found)


def test_many_words_below_an_axis_do_not_overlap() -> None:
    words = [str(50 * i) for i in range(40)]
    curve = Series("a", range(40), range(40))
    svg = chart([curve], title="t", xlabel="x", ylabel="y", x=(0, 39), xticks=words)
    places = [float(x) for x in re.findall(r'<text x="([\d.]+)" y="272.0" text-anchor="mid', svg)]
    assert len(places) > 5
    assert all(b - a > 4 * 6.7 for a, b in itertools.pairwise(places))
    few = chart([curve], title="t", xlabel="x", ylabel="y", x=(0, 39), xticks=words[:5])
    assert all(f">{word}<" in few for word in words[:5])


def test_bars_through_points_have_their_length() -> None:
    curve = Series("a", [0, 1, 2], [1, 2, 3], spread=[0.5, math.nan, 0.0])
    svg = chart([curve], title="t", xlabel="x", ylabel="y", y=(0, 5))
    ((top, bottom),) = [
        (float(high), float(low))
        for low, high in re.findall(r'd="M[\d.]+,([\d.]+)L[\d.]+,([\d.]+)" stroke="var\(--s', svg)
    ]
    (a, at), *_, (b, bt) = ticks(svg, "end").items()
    assert bottom - top == pytest.approx((at - bt) / (b - a), abs=0.3)
