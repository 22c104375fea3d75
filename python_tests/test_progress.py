"""Bars are for people: on a terminal, in a notebook, nowhere else."""

from __future__ import annotations

import sys
import types

import pytest

from bayes_kernels.progress import progress_bar


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("notebook", [False, True])
@pytest.mark.parametrize("wanted", [False, True])
def test_bars_are_shown_to_people_only(
    terminal: bool, notebook: bool, wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    if notebook:
        monkeypatch.setitem(sys.modules, "ipykernel", types.ModuleType("ipykernel"))
    bar = progress_bar(wanted, [1, 2], desc="x")
    assert bar.disable == (not (wanted and (terminal or notebook)))
    assert list(bar) == [1, 2]
