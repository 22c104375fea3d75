"""Files that are written as a whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from bayes_kernels.files import replacing_folder, updating_folder, write_json


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


def _content(folder: Path) -> dict[str, str]:
    found = (file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): file.read_text() for file in found}


def _write(folder: Path, text: str, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


_NEW = ("weights", "config", "two/config", "two/weights")


@pytest.fixture
def old(tmp_path: Path) -> Path:
    folder = tmp_path / "adapter"
    _write(folder, "old", *_NEW, "other", "two/other", "posterior")
    return folder


def test_files_of_a_folder_take_the_place_of_others(old: Path, tmp_path: Path) -> None:
    for folder in (old, tmp_path / "deep" / "new"):
        with updating_folder(folder, "config", ["posterior"]) as new:
            _write(new, "new", *_NEW)
        kept = {"other": "old", "two/other": "old"} if folder == old else {}
        assert _content(folder) == dict.fromkeys(_NEW, "new") | kept


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
@pytest.mark.parametrize("exists", [True, False])
def test_a_folder_is_as_before_where_its_update_fails(
    error: type[BaseException],
    exists: bool,
    old: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At every step; and whoever is killed there leaves no `config` beside files of another call."""
    folder, replace = old if exists else tmp_path / "deep" / "new", os.replace
    before, steps = _content(tmp_path), 9 if exists else 4
    for stopped in range(steps + 1):  # 0: before files are renamed
        renamed = 0

        def failing(source: Any, target: Any, stopped: int = stopped) -> None:
            nonlocal renamed
            renamed += 1
            found = _content(folder)
            for part in ("", "two/"):
                assert found.get(part + "config") in (None, found.get(part + "weights"))
            if renamed == stopped:
                monkeypatch.setattr(os, "replace", replace)
                raise error
            replace(source, target)

        monkeypatch.setattr(os, "replace", failing)
        with pytest.raises(error), updating_folder(folder, "config", ["posterior"]) as new:
            _write(new, "new", *_NEW)
            if not stopped:
                raise error
        assert _content(tmp_path) == before and folder.exists() == exists
        assert renamed == stopped  # as many steps as there are


def test_old_files_outlive_a_second_interrupt(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that comes while they are put back."""
    replace, renamed = os.replace, 0

    def stopped(source: Any, target: Any) -> None:
        nonlocal renamed
        renamed += 1
        if renamed in (6, 8):  # a new file; the second of those that go back
            raise KeyboardInterrupt
        replace(source, target)

    before = _content(old)
    monkeypatch.setattr(os, "replace", stopped)
    with pytest.raises(KeyboardInterrupt), updating_folder(old, "config", ["posterior"]) as new:
        _write(new, "new", *_NEW)
    (aside,) = old.glob(".config.*.tmp/old")
    kept = _content(aside)
    assert kept and set(kept.values()) == {"old"}
    assert before.keys() == kept.keys() | {name for name in before if (old / name).exists()}
