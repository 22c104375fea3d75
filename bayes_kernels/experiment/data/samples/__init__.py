"""Data that comes with the package, to try things with."""

from __future__ import annotations

from pathlib import Path


def sample_file() -> Path:
    """A table of 84 messages to a help desk, with columns ``text`` and ``label``, in three classes."""
    return Path(__file__).parent / "messages.csv"
