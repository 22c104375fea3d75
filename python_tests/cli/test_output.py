"""What commands print: texts as they are, terminals of few characters."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cli.commands import call, fail_to_draw

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


@pytest.mark.parametrize(
    "command", ["demo", "train", "compare", "sweep", "evaluate", "bayesianize"]
)
def test_scores_stay_where_a_picture_fails(
    command: str, data: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, page = tmp_path / "out", "report.html"
    kept = {"metrics.json", page}
    words = [command, "--data", data, "--model", model, "--steps", 1, "--threads", 1]
    if command == "train":
        words = ["train", data, "--model", model, "--steps", 1, "--method", "mle", "--plots"]
    if command in ("compare", "sweep"):
        kept = {"results.json", "table.md", page}
    if command == "sweep":
        words += ["--vary", "n_samples=2,4"]
    if command == "compare":
        words += ["--methods", "mle"]
    if command in ("evaluate", "bayesianize"):
        adapter = tmp_path / "adapter"
        settings = ["--model", model, "--method", "mle", "--steps", 4, "--out", adapter]
        assert call("train", data, *settings).exit_code == 0
        words = [command, adapter, "--plots"]
    if command == "bayesianize":
        words += ["--method", "tfb", "--set", "anchors=8"]
        kept |= {"adapter_model.safetensors"}
    with monkeypatch.context() as patch:
        patch.setattr("bayes_kernels.plots.save", fail_to_draw)
        result = call(*words, "--out", out)
    assert result.exit_code == 2, result.output
    assert "error: no picture today" in result.stderr
    assert f"the results in {out} are kept; what failed comes after them" in result.stderr
    assert kept <= {path.name for path in out.iterdir()}
    assert "accuracy" in result.stdout
    assert [path.name for path in (out / ".bayes_kernels").iterdir()] == ["run.json"]
    result = call(*words, "--out", out, "--overwrite")
    assert result.exit_code == 0, result.output
    assert kept < {path.name for path in out.iterdir()}
    if command in ("compare", "sweep"):  # no picture of before stays beside a new table
        with monkeypatch.context() as patch:
            patch.setattr("bayes_kernels.plots.save", fail_to_draw)
            assert call(*words, "--out", out, "--resume").exit_code == 2
        assert not list(out.glob("*.png")) and kept <= {path.name for path in out.iterdir()}

    # Nor is anything lost where the table cannot be printed.
    def closed(*args: object, **options: object) -> None:
        raise BrokenPipeError(32, "Broken pipe")

    with monkeypatch.context() as patch:
        patch.setattr("builtins.print", lambda *a, file=None, **o: None if file else closed())
        call(*words, "--out", out, "--overwrite")
    assert kept <= {path.name for path in out.iterdir()}
