"""A task by its name or path."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ...hf.tasks.task import Task
from .docstrings import stdlib_docs
from .hub import HUB_DATASETS, load_hub
from .files import load_files


def load_task(name_or_path: str | Path, **options: Any) -> Task:
    """A task by name or from a JSONL file or folder.

    Names are ``stdlib-docs`` and those of :func:`load_hub`. Options go to :func:`stdlib_docs`,
    :func:`load_hub` or :func:`load_files`. A path that exists wins over a name.

    Raises:
        ValueError: Neither a known name nor an existing path.
    """
    text = str(name_or_path)
    if os.path.exists(text):
        return load_files(text, **options)
    if text.replace("_", "-") == "stdlib-docs":
        return stdlib_docs(**options)
    if text in HUB_DATASETS:
        return load_hub(text, **options)
    raise ValueError(
        f"data: expected stdlib-docs, one of {', '.join(HUB_DATASETS)}, or a JSONL file or folder "
        f"that exists, got {text!r}"
    )
