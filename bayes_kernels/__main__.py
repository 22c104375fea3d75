"""`python -m bayes_kernels` prints a diagnosis; with arguments it is the command line."""

from __future__ import annotations

import sys

from .diagnosis import diagnosis


def main() -> None:
    """Diagnosis without arguments, the command line with some."""
    if len(sys.argv) == 1:
        print(diagnosis())
        return
    from .cli.app import main as cli

    cli()


if __name__ == "__main__":
    main()
