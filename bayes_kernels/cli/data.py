"""The commands about data: data check, data sample."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import Debug, LabelNames, Ood, Test, source_options

data = typer.Typer(no_args_is_help=True, help="Look at data before training on it.")


@data.command()
def check(
    source: Annotated[
        str, typer.Argument(metavar="DATA", help="A file or folder, or another word of --data.")
    ],
    test: Test = None,
    ood: Ood = None,
    label_names: LabelNames = None,
    debug: Debug = False,
) -> None:
    """Say what was understood: rows, classes, lengths, duplicates, an example, what is missing."""
    from ..experiment.data.check import describe
    from ..experiment.data.source import Source

    options = source_options(test, ood, label_names, None, None, 0)
    print(describe(Source(data=source, **options).load()))


@data.command()
def sample(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Where to write it.")] = Path(
        "messages.csv"
    ),
    debug: Debug = False,
) -> None:
    """Write a small file to try things with: 84 messages to a help desk, in three classes."""
    from ..experiment.data.samples import sample_file
    from ..files import write_text

    if file.suffix != ".csv":
        raise ValueError(f"file {str(file)!r}: expected a name that ends in .csv")
    if file.exists():
        raise ValueError(f"file {str(file)!r}: expected a new file, got one that exists")
    write_text(file, sample_file().read_text(encoding="utf-8"))
    print(f"Wrote {file}. Try: bayes-kernels data check {file}")
