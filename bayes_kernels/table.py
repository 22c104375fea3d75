"""Tables for terminals, Markdown and pages."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import NamedTuple

from . import html


class Table(NamedTuple):
    """Headings and rows of cells.

    Attributes:
        title: The line above the table.
        headings: Of all columns.
        rows: Cells; a row may be short.
        left: How many columns are words, from the left; the others are numbers.
    """

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: int = 1

    def text(self) -> str:
        """Aligned columns below the title."""
        columns: list[list[str]] = []
        for column in zip_longest(self.headings, *self.rows, fillvalue=""):
            width, words = max(map(len, column)), len(columns) < self.left
            columns.append([cell.ljust(width) if words else cell.rjust(width) for cell in column])
        lines = ["  ".join(row).rstrip() for row in zip(*columns, strict=True)]
        return "\n".join([*([self.title] if self.title else ()), *lines]) + "\n"

    def markdown(self) -> str:
        """The table in Markdown, without its title."""
        width = len(self.headings)
        rows = [[*row, *[""] * (width - len(row))] for row in self.rows]
        return "".join(
            f"| {' | '.join(cell.replace('|', '/') for cell in row)} |\n"
            for row in (self.headings, ["---"] * width, *rows)
        )

    def html(self) -> str:
        """The table in HTML, its title above it."""
        return html.table(self.headings, self.rows, left=self.left, caption=self.title)


def shorten(text: str, length: int = 60) -> str:
    """The text on one line, cut where it is longer."""
    text = " ".join(text.split())
    return text if len(text) <= length else f"{text[: length - 1]}…"
