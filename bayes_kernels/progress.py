"""Progress bars of loops that take longer than two seconds."""

from __future__ import annotations

import sys
from typing import Any

from tqdm.auto import tqdm


def progress_bar(enabled: bool, items: Any = None, **options: Any) -> Any:
    """A tqdm bar with the time left, which appears after two seconds, on a terminal or in a notebook."""
    # A notebook's kernel has no terminal, and a bar of its own.
    shown = enabled and ("ipykernel" in sys.modules or sys.stderr.isatty())
    return tqdm(
        items,
        delay=2,
        leave=False,
        dynamic_ncols=True,
        disable=not shown,
        **options,
    )
