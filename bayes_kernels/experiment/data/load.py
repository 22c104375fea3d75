"""A task by its name or path."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ...task import Task
from .docstrings import stdlib_docs
from .files import load_files
from .hub import HUB_DATASETS, load_hub


def load_task(data: str | Path | Iterable[Mapping[str, Any]], **options: Any) -> Task:
    """A task by name, from a file or folder, or from a data set of the library ``datasets``.

    Names are ``stdlib-docs`` and those of :func:`load_hub`. Options go to :func:`stdlib_docs`,
    :func:`load_hub` or :func:`load_files`. A path that exists wins over a name.

    Raises:
        ValueError: Neither a known name nor an existing path.
    """
    if not isinstance(data, str | Path):
        return load_files(data, **options)
    text = str(data)
    if os.path.exists(text):
        return load_files(text, **options)
    if text.replace("_", "-") == "stdlib-docs":
        return stdlib_docs(**options)
    if text in HUB_DATASETS:
        return load_hub(text, **options)
    raise ValueError(
        f"data: expected stdlib-docs, one of {', '.join(HUB_DATASETS)}, or a file (JSONL, CSV, TSV) or "
        f"folder that exists, got {text!r}"
    )
