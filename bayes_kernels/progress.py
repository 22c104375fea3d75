"""Progress bars of loops that take longer than two seconds."""

from __future__ import annotations

import sys
from typing import Any

from tqdm.auto import tqdm


def progress_bar(enabled: bool, items: Any = None, **options: Any) -> Any:
    """A tqdm bar that appears after two seconds, and only on a terminal."""
    return tqdm(
        items,
        delay=2,
        leave=False,
        dynamic_ncols=True,
        disable=not (enabled and sys.stderr.isatty()),
        **options,
    )
