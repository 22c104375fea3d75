"""Progress of loops that take longer than some seconds."""

from __future__ import annotations

import io
import sys
from typing import Any

from tqdm import tqdm as terminal_bar
from tqdm.auto import tqdm

LINE_SECONDS = 30.0


class _Lines(terminal_bar):  # type: ignore[type-arg]
    """A line on standard error now and then, for logs: what a bar shows, without its control characters."""

    def __init__(self, items: Any = None, **options: Any) -> None:
        wait = LINE_SECONDS
        super().__init__(
            items,
            file=io.StringIO(),  # for the characters that erase a bar
            bar_format="{desc}: {n_fmt} of {total_fmt}, {elapsed} so far, {remaining} left{postfix}",
            delay=wait,
            mininterval=wait,
            maxinterval=wait,
            miniters=0,  # also where nothing was done meanwhile
            leave=False,
            **options,
        )

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        if msg is None:  # tqdm clears a bar with an empty one
            at_end = self.total and self.n >= self.total  # of what is counted: more may follow
            text = str(self).replace(", 00:00 left", "") if at_end else str(self)
            print(text, file=sys.stderr, flush=True)
        return True


def progress_bar(enabled: bool, items: Any = None, **options: Any) -> Any:
    """A bar with the time left, after two seconds; where there is no terminal, a line every 30 seconds.

    Args:
        enabled: Whether anything is shown.
        items: What the loop goes through, or None where `update` counts.
        options: Those of ``tqdm``.
    """
    # A notebook's kernel has no terminal, and a bar of its own.
    if not enabled or "ipykernel" in sys.modules or sys.stderr.isatty():
        return tqdm(items, delay=2, leave=False, dynamic_ncols=True, disable=not enabled, **options)
    return _Lines(items, **options)
