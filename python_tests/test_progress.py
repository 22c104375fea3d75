"""Bars are for terminals and notebooks; logs get a line now and then."""

from __future__ import annotations

import io
import sys
import threading
import types
from typing import Any

import pytest

from bayes_kernels import progress
from bayes_kernels.progress import progress_bar


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("notebook", [False, True])
@pytest.mark.parametrize("wanted", [False, True])
def test_where_bars_are_shown(
    terminal: bool, notebook: bool, wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    # Only the shell of a kernel has one. A test may have imported either package, as any script may.
    shell = types.SimpleNamespace(**({"kernel": object()} if notebook else {}))
    ipython = types.SimpleNamespace(get_ipython=lambda: shell)
    monkeypatch.setitem(sys.modules, "IPython", ipython)  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "ipykernel", types.ModuleType("ipykernel"))
    bar = progress_bar(wanted, [1, 2], desc="x")
    assert bar.disable == (not wanted)
    assert isinstance(bar, progress._Lines) == (wanted and not (terminal or notebook))
    assert list(bar) == [1, 2]


def test_a_kernel_has_its_own_bar() -> None:
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    cell = nbformat.v4.new_code_cell(
        "from bayes_kernels import progress\n"
        "type(progress.progress_bar(True, [1])) is progress.tqdm"
    )
    notebook = nbformat.v4.new_notebook(cells=[cell])
    nbclient.NotebookClient(notebook, timeout=300).execute()
    shown = [one.data["text/plain"] for one in cell.outputs if one.output_type == "execute_result"]
    assert shown == ["True"]


@pytest.mark.parametrize("module", [None, types.ModuleType("IPython")])
def test_lines_without_a_shell(
    module: types.ModuleType | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where IPython is not imported, is half imported, or has no shell."""
    monkeypatch.setitem(sys.modules, "IPython", module)  # type: ignore[arg-type]
    assert isinstance(progress_bar(True, [1]), progress._Lines)
    if module is not None:
        monkeypatch.setattr(module, "get_ipython", lambda: None, raising=False)
        assert isinstance(progress_bar(True, [1]), progress._Lines)


def test_lines_for_logs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """None of a short loop; of a long one what is done and left, where it went on from earlier steps too."""
    assert list(progress_bar(True, range(9), desc="short")) == list(range(9))
    assert capsys.readouterr().err == ""
    now = [0.0]
    bar = progress_bar(True, total=100, initial=40, desc="blob", unit="step")
    bar._time, bar.start_t, bar.last_print_t = (lambda: now[0]), 0.0, 0.0
    bar.set_postfix_str("loss 0.123", refresh=False)
    for step in range(60):
        now[0] += 2
        bar.update()
        if step == 30:
            bar.refresh()
    now[0] += 100
    bar.update(0)
    bar.close()
    lines = capsys.readouterr().err.splitlines()
    assert "blob: 71 of 100, 01:02 so far, 00:58 left, loss 0.123" in lines
    assert lines[-1] == "blob: 100 of 100, 03:40 so far, loss 0.123"
    assert 4 <= len(lines) <= 6 and not any("\r" in line for line in lines)


def test_lines_say_only_what_is_known(capsys: pytest.CaptureFixture[str]) -> None:
    def line(count: int, **options: Any) -> str:
        bar = progress_bar(True, desc="x", **options)
        bar.n += count
        bar._time, bar.start_t = (lambda: 60.0), 0.0
        bar.refresh()
        return capsys.readouterr().err

    assert line(0, total=4) == "x: 0 of 4, 01:00 so far\n"
    assert line(3, total=4) == "x: 3 of 4, 01:00 so far, 00:20 left\n"
    assert line(4, total=4) == "x: 4 of 4, 01:00 so far\n"
    assert line(0, total=4, initial=4) == "x: 4 of 4, 01:00 so far\n"
    assert line(1, total=4, initial=2) == "x: 3 of 4, 01:00 so far, 01:00 left\n"
    assert line(6) == "x: 6, 01:00 so far\n"
    assert line(0, total=0) == "x: 01:00 so far\n"


@pytest.mark.parametrize(
    "error", [BrokenPipeError(), OSError(28, "No space left"), ValueError("closed")]
)
def test_a_reader_that_is_gone_ends_nothing(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise error

    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    monkeypatch.setattr(sys, "stderr", Gone())
    assert list(progress_bar(True, range(3))) == [0, 1, 2]
    bar = progress_bar(True, total=3)
    bar.update(3)
    bar.close()
    monkeypatch.setattr(sys, "stderr", None)
    assert list(progress_bar(True, range(3))) == [0, 1, 2]
    # tqdm's lock is free: another thread has its bars.
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.extend(progress_bar(False, [1])), daemon=True)
    thread.start()
    thread.join(20)
    assert found == [1]
