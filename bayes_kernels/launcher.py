"""Processes that ``torchrun`` or ``accelerate launch`` started: their numbers, from the environment."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Launched:
    """This process among those that a launcher started.

    Attributes:
        rank: Number of the process, from 0.
        count: How many there are; 1 without a launcher.
        local_rank: Number of the process on its machine: that of its GPU.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0

    @property
    def first(self) -> bool:
        """Whether this process writes the results."""
        return self.rank == 0


def launched() -> Launched:
    """What the launcher said; one process where there is none.

    Example:
        >>> launched().first
        True
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1 or "LOCAL_RANK" not in os.environ:  # by which accelerate knows, too
        return Launched()
    return Launched(int(os.environ["RANK"]), count, int(os.environ["LOCAL_RANK"]))


__all__ = ["Launched", "launched"]
