"""Calls of the command line, and what they write."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from bayes_kernels.cli import app

SETTINGS = ["--steps", "8", "--lr", "0.005", "--rank", "4", "--n-samples", "3"]


def call(*arguments: object) -> Any:
    return CliRunner().invoke(app.app, [str(argument) for argument in arguments])


def refuse(*arguments: object) -> str:
    """The error of a call that must fail with exit code 2: one line, or a list of bad lines."""
    result = call(*arguments)
    assert result.exit_code == 2, result.output
    notes, error, rest = result.stderr.partition("error: ")
    assert error and (not notes or notes.endswith("\n")), result.stderr
    assert "Traceback" not in result.output and result.stdout == ""
    lines = rest.strip().splitlines()
    assert len(lines) == 1 or all(re.search(r":\d+: ", line) for line in lines), result.stderr
    return lines[0]


def objects(text: str) -> list[dict[str, Any]]:
    """Lines of JSON."""
    return [json.loads(line) for line in text.splitlines()]


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "metrics.json").read_text())


def fail_to_draw(*args: object, **options: object) -> None:
    """In place of `bayes_kernels.plots.save`."""
    raise ValueError("no picture today")
