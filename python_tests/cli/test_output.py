"""What commands print: texts as they are, terminals of few characters."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cli.commands import call

# Commands choose the GPU where there is one; what they find is compared with the CPU.
pytestmark = pytest.mark.cpu_only


def test_texts_are_shown_as_they_are(
    data: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    out = Path("[red]run")
    classes = ["--label-names", "[bold]no,:smile:"]
    options = ["--model", model, "--method", "mle", "--steps", "1", "--out", out]
    result = call("train", data, *classes, *options)
    assert result.exit_code == 0, result.output
    assert f"Wrote {out}/" in result.stdout
    text = "[/x] see [1] and [bold]this[/bold] :smile:"
    result = call("predict", out, "--text", text)
    assert result.exit_code == 0, result.output
    assert text in result.stdout
    assert "[bold]no" in result.stdout or result.stdout.count(":smile:") == 2
    result = call("evaluate", out)
    assert result.exit_code == 0, result.output
    assert f"{data.name}" in result.stdout and "[red]run" in result.stdout


def test_output_where_the_terminal_has_few_characters(data: Path) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    code = "from bayes_kernels.cli import output; output.note('ACC ↑'); print('[a] ↑')"
    code = f"import sys; sys.argv[1:] = ['info']; {code}"
    wrapped = (
        f"from bayes_kernels.cli import app\napp.app = lambda prog_name: exec({code!r})\napp.main()"
    )
    ended = subprocess.run(
        [sys.executable, "-c", wrapped], capture_output=True, text=True, env=environment
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.strip() == "[a] \\u2191" and "ACC \\u2191" in ended.stderr
