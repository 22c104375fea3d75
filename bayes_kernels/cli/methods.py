"""The command methods."""

from __future__ import annotations

import json
import textwrap
from typing import Annotated

import typer

from .options import Debug

_MADE = {
    "train": "trained",
    "convert": "converted from trained plain LoRA",
    "join": "several of plain LoRA",
}


def methods(
    method: Annotated[
        str | None, typer.Argument(metavar="METHOD", help="Show the options of this method.")
    ] = None,
    debug: Debug = False,
) -> None:
    """List all methods, or the options of one: type, default and meaning.

    Options are set with --set NAME=VALUE in train and bayesianize, and with --set METHOD.NAME=VALUE in
    compare.
    """
    from ..experiment.settings import FIELDS
    from ..hf.method import METHODS
    from ..table import Table

    if method is None:
        listed = [
            [row.name, row.title, _MADE[row.made], str(row.n_samples) if row.bayesian else "none"]
            for row in METHODS.values()
        ]
        headings = ["method", "title", "adapter", "draws"]
        print(Table("", headings, listed, left=3).text(), end="")
        return
    if method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
    row = METHODS[method]
    print(f"{row.title}: {_MADE[row.made]}, {row.n_samples if row.bayesian else 'no'} draws")
    if not row.options:
        print("It has no options beside the recipe's.")
    for one in row.options.values():
        print(f"\n{one.name}: {one.type}, by default {json.dumps(one.default)}")
        print(textwrap.fill(one.help, 96, initial_indent="    ", subsequent_indent="    "))
    shared = [name for name in row.options if name in FIELDS]
    if shared:
        note = (
            f"In train and compare {', '.join(shared)} also name fields of the recipe: there "
            "--set options.NAME=VALUE sets the option, --set NAME=VALUE the field."
        )
        print("\n" + textwrap.fill(note, 96))
