"""The site's formulas are mathematics, and its navigation has every page."""

from __future__ import annotations

import importlib.util
import json
import re
import xml.etree.ElementTree as xml
from pathlib import Path
from typing import Any

import pytest

from bayes_kernels.hf.config import CONFIGS, own_fields

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


def test_a_notebook_becomes_a_page() -> None:
    def cell(text: str, *outputs: dict[str, Any], kind: str = "code") -> dict[str, Any]:
        return {"cell_type": kind, "source": [text], "outputs": outputs}

    def output(kind: str = "display_data", **data: str) -> dict[str, Any]:
        types = {
            "png": "image/png",
            "html": "text/html",
            "plain": "text/plain",
            "view": "x/view+json",
        }
        return {"output_type": kind, "data": {types[name]: [text] for name, text in data.items()}}

    def said(name: str, text: str) -> dict[str, Any]:
        return {"output_type": "stream", "name": name, "text": [text]}

    table = output("execute_result", html="<table>\n\n \n<tr>\n</table>", plain="Answers")
    notebook = {
        "cells": [
            cell("# A\ntext", kind="markdown"),
            cell("x = 1\nx", output("execute_result", plain="1")),
            cell(
                "train()",
                {"output_type": "stream", "name": "stderr", "text": ["a warning"]},
                output(view="{}"),
            ),
            {"cell_type": "raw", "source": ["---"]},
            cell("print(1)", said("stdout", "1")),
            cell("table", output("display_data", html="<b>bar</b>"), table),
            cell("draw()", output("execute_result", png="iVBOR\nw0K\n", plain="<Figure>")),
        ]
    }
    page = hook("_notebooks").markdown(notebook)
    assert page.split("\n\n") == [
        "# A\ntext",
        "```python\nx = 1\nx\n```",
        "```text {.output}\n1\n```",
        "```python\ntrain()\n```",
        "```python\nprint(1)\n```",
        "```text {.output}\n1\n```",
        "```python\ntable\n```",
        '<div class="output">\n<b>bar</b>\n</div>',
        '<div class="output">\n<table>\n<tr>\n</table>\n</div>',
        "```python\ndraw()\n```",
        '<div class="output"><img alt="" src="data:image/png;base64,iVBORw0K"></div>',
    ]


def test_a_run_of_a_notebook_is_kept_until_something_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    notebooks, ran = hook("_notebooks"), []
    monkeypatch.setattr(notebooks.subprocess, "run", lambda words, **_: ran.append(words[3:]))
    monkeypatch.setattr(nbclient.NotebookClient, "execute", lambda _: ran.append("cells"))
    path, code = tmp_path / "docs" / "a.ipynb", tmp_path / "bayes_kernels" / "x.py"
    path.parent.mkdir()
    code.parent.mkdir()
    for text, program in (("x", "1"), ("x", "1"), ("y", "1"), ("y", "2")):
        code.write_text(program)
        nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(text)]), path)
        made = json.loads(path.read_text())
        made["cells"][0]["id"] = "cell"
        path.write_text(json.dumps(made))
        assert notebooks.executed(path, tmp_path / "kept")["cells"][0]["source"] in (text, [text])
    assert len(ran) == 3 * 3 and len(list((tmp_path / "kept").iterdir())) == 1
    assert [" ".join(words) for words in ran[:2]] == list(notebooks.BESIDE)
    page = (ROOT / "docs" / "notebook.ipynb").read_text(encoding="utf-8")
    assert all(f"`bayes-kernels {words}`" in page for words in notebooks.BESIDE)


def test_the_reference_describes_options_of_configurations() -> None:
    griffe = pytest.importorskip("griffe")
    extensions = griffe.load_extensions(hook("_options").Options)
    package = griffe.load(
        "bayes_kernels.hf", search_paths=[ROOT], extensions=extensions, allow_inspection=False
    )
    for config in CONFIGS.values():
        found = package[config.__module__.partition("hf.")[2] + "." + config.__name__]
        defaults = {one.name: one.default for one in found.parameters}
        sections = [
            one for one in found.docstring.parse("google") if one.kind.value == "parameters"
        ]
        described = {one.name: one.description for part in sections for one in part.value}
        for field in own_fields(config):
            assert defaults[field.name] == repr(field.default)
            assert described[field.name].replace("\n", " ") == field.metadata["help"]


@pytest.mark.parametrize(("page", "formula"), FORMULAS)
def test_formulas_become_mathml(page: str, formula: str) -> None:
    pytest.importorskip("latex2mathml")
    text = hook("_math").on_page_markdown(f"before\n\n```math\n{formula}```\n\nand $`x^2`$ after\n")
    blocks = re.findall(r"<math .*?</math>", text, re.S)
    assert len(blocks) == 2 and "`" not in text
    for block in blocks:
        # A command that is not known would stand there as it is.
        assert "\\" not in "".join(xml.fromstring(block).itertext())
