"""Files that are written as a whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from bayes_kernels.files import replacing_folder, write_json


def test_json_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    write_json(path, {"a": float("inf"), "b": [float("nan"), 1.5]})
    assert json.loads(path.read_text()) == {"a": None, "b": [None, 1.5]}
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text())["b"] == [None, 1.5]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.json"]


def test_a_folder_takes_the_place_of_another(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "adapter"
    for name in ("a", "b"):
        with replacing_folder(folder) as new:
            (new / name).write_text(name)
        assert [p.name for p in folder.iterdir()] == [name]
        assert [p.name for p in folder.parent.iterdir()] == ["adapter"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
@pytest.mark.parametrize("stopped", [0, 1, 2])  # while it is filled, or at a renaming
@pytest.mark.parametrize("exists", [True, False])
def test_a_folder_is_as_before_where_its_successor_fails(
    error: type[BaseException],
    stopped: int,
    exists: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, renamed, replace = tmp_path / "adapter", 0, os.replace
    if exists:
        folder.mkdir()
        (folder / "old").write_text("old")
    last = stopped if exists else min(stopped, 1)

    def failing(source: Any, target: Any) -> None:
        nonlocal renamed
        renamed += 1
        if renamed == last:
            raise error
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(error), replacing_folder(folder) as new:
        (new / "new").write_text("new")
        if not stopped:
            raise error
    assert sorted(p.name for p in tmp_path.rglob("*")) == (["adapter", "old"] if exists else [])
