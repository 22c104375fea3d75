"""Pictures of the rows: what every provider takes of our own time, with the bars that have to be reached.

One SVG for each machine and family, docs/images/<machine>-<family>.svg, written by report.py. What is
drawn is made without matplotlib (`panels`); its digest is in the picture's metadata, by which the tests
see that pictures and rows belong together.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import secrets
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import bars
import harness
from harness import ROOT, Row

IMAGES = ROOT / "docs" / "images"


@dataclass(frozen=True)
class Mark:
    """One provider of one case.

    Attributes:
        case, provider: the row.
        ratio: its median time over that of our first provider.
        goal: the ratio from which on a bar is met, where there is one.
    """

    case: str
    provider: str
    ratio: float
    goal: float | None


@dataclass(frozen=True)
class Panel:
    """The cases of one op and mode; ratios are to the time of `own`."""

    op: str
    mode: str
    own: str
    marks: tuple[Mark, ...]


def panels(family: str, rows: Sequence[Row], device: str) -> list[Panel]:
    """What is drawn of a family's rows, in their order; three significant digits."""
    description = harness.load_family(family)
    found = []
    for op, mode in dict.fromkeys((row.op, row.mode) for row in rows):
        part = [row for row in rows if (row.op, row.mode) == (op, mode)]
        names = list(dict.fromkeys(row.provider for row in part))
        own = next((name for name in description.ours if name in names), names[0])
        marks = []
        for case in dict.fromkeys(row.case for row in part):
            group = {row.provider: row for row in part if row.case == case}
            if own not in group:
                continue
            for name in names:
                if name == own or name not in group:
                    continue
                ratio = group[name].p50_us / group[own].p50_us
                marks.append(
                    Mark(case, name, _rounded(ratio), _goal(family, group, name, own, device))
                )
        if marks:
            found.append(Panel(op, mode, own, tuple(marks)))
    return found


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")


def _goal(family: str, group: dict[str, Row], peer: str, own: str, device: str) -> float | None:
    """The strictest bar on a peer's time: that of its subject, in units of our own time."""
    row, goals = group[peer], []
    for bar in bars.BARS:
        limit = bar.limit(device)
        if (bar.family, bar.op, bar.peer, bar.quantity) != (family, row.op, peer, "time"):
            continue
        if limit is None or bar.subject not in group:
            continue
        if re.fullmatch(bar.cases, row.case) and re.fullmatch(bar.mode, row.mode):
            goals.append(group[bar.subject].p50_us / limit / group[own].p50_us)
    return _rounded(max(goals)) if goals else None


def digest(drawn: Sequence[Panel]) -> str:
    """What stands for the content of a picture."""
    text = json.dumps([asdict(panel) for panel in drawn], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def file_name(machine: str, family: str) -> str:
    """Name of a picture, safe in paths."""
    return re.sub(r"[^A-Za-z0-9]+", "-", machine).strip("-") + f"-{family}.svg"


def draw(drawn: Sequence[Panel]) -> Any:
    """A matplotlib figure: a panel below another, a bar for each provider, times on a logarithmic axis.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.ticker import LogLocator, NullLocator

    from bayes_kernels.plots import _COLORS, _figure, _tidy

    providers = list(dict.fromkeys(mark.provider for panel in drawn for mark in panel.marks))
    colors = {name: _COLORS[i % len(_COLORS)] for i, name in enumerate(providers)}
    lines = [len(panel.marks) + len({mark.case for mark in panel.marks}) for panel in drawn]
    figure = _figure(8.0, 0.7 + sum(0.6 + 0.13 * n for n in lines))
    axes = figure.subplots(len(drawn), 1, squeeze=False, height_ratios=lines)[:, 0]
    handles: dict[str, Any] = {}
    for panel, ax in zip(drawn, axes, strict=True):
        ticks, y = [], 0.0
        for case in dict.fromkeys(mark.case for mark in panel.marks):
            group = [mark for mark in panel.marks if mark.case == case]
            ticks.append((y + (len(group) - 1) / 2, case))
            for mark in group:
                color = colors[mark.provider]
                # From one, so that a provider that is faster than ours goes to the left.
                handles[mark.provider] = ax.barh(
                    y, mark.ratio - 1, left=1, height=0.85, color=color
                )
                if mark.goal is not None:
                    handles["bar to reach"] = ax.vlines(
                        mark.goal, y - 0.5, y + 0.5, color="black", linewidth=1.6, zorder=3
                    )
                y += 1
            y += 1
        ax.set_xscale("log")
        ax.axvline(1, color="0.3", linewidth=0.8)
        ax.set_yticks([at for at, _ in ticks], [case for _, case in ticks])
        ax.set_ylim(y - 1.2, -0.8)
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        ax.set_title(
            f"{panel.op}, {panel.mode}: time / time of {panel.own}", fontsize=9, loc="left"
        )
        _tidy(ax)
        ax.grid(False, axis="y")
    order = [name for name in (*providers, "bar to reach") if name in handles]
    figure.legend(
        [handles[name] for name in order], order, loc="outside upper center",
        ncols=min(4, len(order)), fontsize=8, frameon=False,
    )  # fmt: skip
    return figure


def write(drawn: Sequence[Panel], path: Path) -> None:
    """An SVG with text as text and without a date: the same rows give the same bytes.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure = draw(drawn)
    import matplotlib

    stream = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "bayes_kernels", "svg.fonttype": "none"}):
        metadata = {"Date": None, "Creator": None, "Description": digest(drawn)}
        figure.savefig(stream, format="svg", metadata=metadata)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.write_bytes(stream.getvalue())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
