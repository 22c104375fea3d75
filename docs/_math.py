"""Renders formulas of the pages while the site is built: browsers show MathML without any script.

A block ```` ```math ```` holds a formula of its own in LaTeX, ``$`...`$`` one within a line, as on GitHub.
"""

from __future__ import annotations

import re
from typing import Any

import latex2mathml.converter

_BLOCK = re.compile(r"^```math\n(.*?)^```$", re.M | re.S)
_INLINE = re.compile(r"\$`([^`\n]+)`\$")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace the formulas of a page."""
    markdown = _BLOCK.sub(
        lambda found: f'<div class="formula">{_render(found[1], "block")}</div>', markdown
    )
    return _INLINE.sub(lambda found: _render(found[1], "inline"), markdown)


def _render(formula: str, display: str) -> str:
    return latex2mathml.converter.convert(" ".join(formula.split()), display=display)
