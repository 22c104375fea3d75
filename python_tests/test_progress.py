"""Bars are for terminals and notebooks; logs get a line now and then."""

from __future__ import annotations

import sys
import types

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
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    if notebook:
        monkeypatch.setitem(sys.modules, "ipykernel", types.ModuleType("ipykernel"))
    bar = progress_bar(wanted, [1, 2], desc="x")
    assert bar.disable == (not wanted)
    assert isinstance(bar, progress._Lines) == (wanted and not (terminal or notebook))
    assert list(bar) == [1, 2]


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
    unknown = progress_bar(True, iter([1]), desc="predict")
    unknown.refresh()
    assert capsys.readouterr().err == "predict: 0 of ?, 00:00 so far, ? left\n"
