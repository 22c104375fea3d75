"""The command `bayes-kernels`.

Everything that trains or scores is in `bayes_kernels.experiment`, imported when first needed; here
options become an experiment, and results become tables and files.
"""

from __future__ import annotations

import sys

try:
    import rich  # noqa: F401
    import typer  # noqa: F401
except ImportError as _error:
    print(
        f"error: the command line needs typer and rich ({_error}); "
        "run: pip install 'bayes-kernels[hf]'",
        file=sys.stderr,
    )
    raise SystemExit(2) from None
