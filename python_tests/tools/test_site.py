"""The site's formulas are mathematics, and its navigation has every page."""

from __future__ import annotations

import importlib.util
import re
import xml.etree.ElementTree as xml
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md")}
FORMULAS = [
    (name, found[1])
    for name, text in PAGES.items()
    for found in re.finditer(r"^```math\n(.*?)^```$", text, re.M | re.S)
]


def test_every_page_is_in_the_navigation_once() -> None:
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2]
    assert sorted(re.findall(r": (\w+\.md)$", nav, re.M)) == sorted(PAGES)


@pytest.mark.parametrize("method", ["blob", "tfb", "scalabl", "polar_vbll", "laplace"])
def test_pages_of_methods_open_with_a_formula_and_a_short_program(method: str) -> None:
    opening = PAGES[f"{method}.md"].partition("\n## ")[0]
    (program,) = re.findall(r"^```python\n(.*?)^```$", opening, re.M | re.S)
    assert "```math" in opening
    lines = [line for line in program.splitlines() if line and "import" not in line]
    assert len(lines) <= 10 and "predict(" in program


@pytest.mark.parametrize(("page", "formula"), FORMULAS)
def test_formulas_become_mathml(page: str, formula: str) -> None:
    pytest.importorskip("latex2mathml")
    spec = importlib.util.spec_from_file_location("site_math", ROOT / "docs" / "_math.py")
    assert spec is not None and spec.loader is not None
    math = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(math)
    text = math.on_page_markdown(f"before\n\n```math\n{formula}```\n\nand $`x^2`$ after\n")
    blocks = re.findall(r"<math .*?</math>", text, re.S)
    assert len(blocks) == 2 and "`" not in text
    for block in blocks:
        # A command that is not known would stand there as it is.
        assert "\\" not in "".join(xml.fromstring(block).itertext())
