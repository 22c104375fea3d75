"""Writing files as a whole or not at all."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def replacing_file(path: Path) -> Iterator[Path]:
    """Inside, write the file that is given; at the end it takes the place of `path`.

    Readers see the old file or the whole new one; after an exception the old one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Inside, fill the folder that is given; at the end it takes the place of `path`.

    After an exception, Ctrl-C included, the old folder is there again, if there was one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    token = secrets.token_hex(4)
    new, old = (path.with_name(f".{path.name}.{word}.{token}") for word in ("new", "old"))
    try:
        new.mkdir()
        yield new
        if path.exists():
            os.replace(path, old)
        os.replace(new, path)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        if old.exists():
            shutil.rmtree(path, ignore_errors=True)
            os.replace(old, path)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def updating_folder(path: Path, last: str, replaced: Collection[str] = ()) -> Iterator[Path]:
    """Inside, write files into the folder that is given; at the end they go into `path`.

    Other files of `path` stay, and nothing in it changes before all new ones are written. Then files
    called `last`, without which a folder counts as empty, are taken away first and come last: a process
    that is killed while files are renamed leaves none of them. After an exception, Ctrl-C included, the
    old files are there again; should that fail, too, they are in ``.LAST.*.tmp/old``.

    Args:
        path: the folder, made if there is none.
        last: name of the file, in `path` and in folders below.
        replaced: names of files in `path` that go even if no new one takes their place.
    """
    existed = path.is_dir()
    path.mkdir(parents=True, exist_ok=True)
    temporary = path / f".{last}.{secrets.token_hex(4)}.tmp"
    new, old = temporary / "new", temporary / "old"
    moved: list[Path] = []
    placed: list[Path] = []
    try:
        new.mkdir(parents=True)
        yield new
        files = sorted(
            (file.relative_to(new) for file in new.rglob("*") if file.is_file()),
            key=lambda file: (file.name == last, file),
        )
        gone = {*files, *map(Path, replaced)}
        for file in sorted(gone, key=lambda file: (file.name != last, file)):
            if (path / file).is_file():
                (old / file).parent.mkdir(parents=True, exist_ok=True)
                moved.append(file)
                os.replace(path / file, old / file)
        for file in files:
            (path / file).parent.mkdir(parents=True, exist_ok=True)
            placed.append(file)
            os.replace(new / file, path / file)
    except BaseException:
        for file in placed:
            if (path / file).is_file():
                (path / file).unlink()
        for file in reversed(moved):
            if (old / file).exists():
                os.replace(old / file, path / file)
        shutil.rmtree(temporary, ignore_errors=True)
        if not existed:
            _remove_empty(path)
        raise
    shutil.rmtree(temporary, ignore_errors=True)


def _remove_empty(folder: Path) -> None:
    """Remove a folder with nothing but empty folders in it."""
    with contextlib.suppress(OSError):
        for inside in folder.iterdir():
            _remove_empty(inside)
        folder.rmdir()


def write_json(path: Path, content: Any) -> None:
    """Write JSON; readers see the old file or the whole new one."""
    write_text(path, json.dumps(finite(content), indent=2, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file; readers see the old one or the whole new one."""
    with replacing_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def lines_of(text: bytes) -> list[str]:
    """The lines of a UTF-8 text, with or without a mark at its beginning.

    Only line feeds and carriage returns end them: JSON may have the other separators of Unicode in its
    strings.

    Raises:
        UnicodeDecodeError: it is not UTF-8.
    """
    return re.split(r"\r\n?|\n", text.decode("utf-8-sig"))


def finite(value: Any) -> Any:
    """Plain values with None for numbers that JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value
