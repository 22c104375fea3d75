"""Folders of a Trainer's checkpoints: which are whole, and which is the newest."""

from __future__ import annotations

import json
import os
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR


def last_checkpoint(output_dir: str | os.PathLike[str]) -> str | None:
    """The newest checkpoint folder that was written to its end, or None.

    A folder without a whole state file belongs to a run that was stopped while it was saving.
    """
    found = []
    for folder in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        if is_checkpoint(folder) and is_whole_checkpoint(folder):
            found.append((int(folder.name.rpartition("-")[2]), folder))
    return str(max(found)[1]) if found else None


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder has the name of a Trainer's checkpoint."""
    name, _, number = folder.name.rpartition("-")
    return name == PREFIX_CHECKPOINT_DIR and number.isdigit()


def is_whole_checkpoint(folder: Path) -> bool:
    """Whether a checkpoint was written to its end: the Trainer writes its state last."""
    try:
        return "global_step" in json.loads((folder / TRAINER_STATE_NAME).read_text("utf-8"))
    except (OSError, ValueError):
        return False


__all__ = ["is_checkpoint", "is_whole_checkpoint", "last_checkpoint"]
