"""What `make test-floor` installs: the oldest releases that pyproject.toml admits for language models.

    python python_tests/tools/floor.py pyproject.toml    one requirement a line, for pip

Of the extras in `OLDEST` any patch release of each lower bound; what tests need beside them is as new as
pip finds it.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

OLDEST = ("hf",)
NEWEST = ("plots", "demo", "test")


def requirements(pyproject: Path) -> list[str]:
    """Requirements for pip; those of our own extras are in the others."""
    text = pyproject.read_text(encoding="utf-8")
    found = []
    for extra in (*OLDEST, *NEWEST):
        listed = re.findall(rf"^{extra} = \[(.*?)\]$", text, re.MULTILINE | re.DOTALL)[0]
        for requirement in re.findall(r'"([^"]+)"', listed):
            name, bound = re.match(r"([\w-]+)(?:>=([\d.]+))?", requirement).groups()  # type: ignore[union-attr]
            if extra in OLDEST:
                found.append(f"{name}=={bound}.*")
            elif name != "bayes-kernels":
                found.append(requirement)
    return found


if __name__ == "__main__":
    print(*requirements(Path(sys.argv[1])), sep="\n")
