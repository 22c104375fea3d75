"""Progress of loops that take longer than some seconds."""

from __future__ import annotations

import io
import math
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
            delay=wait,
            mininterval=wait,
            maxinterval=wait,
            miniters=0,  # also where nothing was done meanwhile
            leave=False,
            **options,
        )

    def __str__(self) -> str:
        facts = self.format_dict
        done, total, seconds = facts["n"], facts["total"], facts["elapsed"]
        parts = [f"{done} of {total}"] if total else [f"{done}"] * bool(done)
        parts.append(f"{self.format_interval(seconds)} so far")
        now = done - facts["initial"]
        if total and now > 0 and done < total:
            # By the mean since the beginning, which counts the time in which nothing was done.
            parts.append(f"{self.format_interval(seconds * (total - done) / now)} left")
        return f"{self.desc or 'progress'}: {', '.join([*parts, *filter(None, [self.postfix])])}"

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        if msg is None:  # tqdm clears a bar with an empty one
            try:
                print(self, file=sys.stderr, flush=True)
            except (OSError, ValueError):  # nobody reads them: no reason to end what is computed
                self.miniters = math.inf
        return True


def _in_notebook() -> bool:
    """Whether this process is the kernel of a notebook, not merely one that has imported ipykernel."""
    get_shell = getattr(sys.modules.get("IPython"), "get_ipython", None)
    return getattr(get_shell and get_shell(), "kernel", None) is not None


def progress_bar(enabled: bool, items: Any = None, **options: Any) -> Any:
    """A bar with the time left, after two seconds; where there is no terminal, a line every 30 seconds.

    Args:
        enabled: Whether anything is shown.
        items: What the loop goes through, or None where `update` counts.
        options: Those of ``tqdm``.
    """
    enabled = enabled and sys.stderr is not None
    notebook = _in_notebook()  # which has no terminal, and a bar of its own
    if enabled and not notebook and not sys.stderr.isatty():
        return _Lines(items, **options)
    bar = tqdm if notebook else terminal_bar
    return bar(items, delay=2, leave=False, dynamic_ncols=True, disable=not enabled, **options)
