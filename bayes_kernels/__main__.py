"""`python -m bayes_kernels` prints a diagnosis; with arguments it is the command line."""

from __future__ import annotations

import sys


def main() -> None:
    """Diagnosis without arguments, the command line with some."""
    if len(sys.argv) == 1:
        from .diagnosis import print_diagnosis

        try:
            print_diagnosis()
        except ImportError as error:
            sys.exit(f"error: {error}")
    else:
        from .cli.app import main as command_line

        command_line()


if __name__ == "__main__":
    main()
