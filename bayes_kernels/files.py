"""Writing files as a whole or not at all."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Iterator
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
