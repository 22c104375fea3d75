"""The site's formulas are mathematics, and its navigation has every page."""

from __future__ import annotations

import importlib.util
import json
import re
import xml.etree.ElementTree as xml
from pathlib import Path
from typing import Any

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
    notebooks = [path.with_suffix(".md").name for path in (ROOT / "docs").glob("*.ipynb")]
    assert sorted(re.findall(r": (\w+\.md)$", nav, re.M)) == sorted([*PAGES, *notebooks])


@pytest.mark.parametrize("method", ["blob", "tfb", "scalabl", "polar_vbll", "laplace"])
def test_pages_of_methods_open_with_a_formula_and_a_short_program(method: str) -> None:
    opening = PAGES[f"{method}.md"].partition("\n## ")[0]
    (program,) = re.findall(r"^```python\n(.*?)^```$", opening, re.M | re.S)
    assert "```math" in opening
    lines = [line for line in program.splitlines() if line and "import" not in line]
    assert len(lines) <= 10 and "predict(" in program


def hook(name: str) -> Any:
    """A hook of the site, which is no module of the package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def test_a_notebook_becomes_a_page(tmp_path: Path) -> None:
    cells = [("markdown", ["# A\n", "text"]), ("code", ["x = 1\n", "x"])]
    listed = [{"cell_type": kind, "source": source} for kind, source in cells]
    (tmp_path / "a.ipynb").write_text(json.dumps({"cells": listed}))
    page = hook("_notebooks").markdown(tmp_path / "a.ipynb")
    assert page == "# A\ntext\n\n```python\nx = 1\nx\n```\n\n[The notebook](a.ipynb)\n"


@pytest.mark.parametrize(("page", "formula"), FORMULAS)
def test_formulas_become_mathml(page: str, formula: str) -> None:
    pytest.importorskip("latex2mathml")
    text = hook("_math").on_page_markdown(f"before\n\n```math\n{formula}```\n\nand $`x^2`$ after\n")
    blocks = re.findall(r"<math .*?</math>", text, re.S)
    assert len(blocks) == 2 and "`" not in text
    for block in blocks:
        # A command that is not known would stand there as it is.
        assert "\\" not in "".join(xml.fromstring(block).itertext())
