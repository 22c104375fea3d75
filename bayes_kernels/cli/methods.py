"""The command methods."""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from ..files import write_json
from ..table import Table
from .options import Debug

_MADE = {
    "train": "trained",
    "convert": "converted from trained plain LoRA",
    "join": "several of plain LoRA",
}
# What the table of methods says that is shown here, so that nobody waits for torch and PEFT, which the table
# needs: seconds. `python -m bayes_kernels.cli.methods` writes it anew; a test compares it with the table.
LISTING = Path(__file__).with_name("methods.json")


def listing() -> dict[str, dict[str, Any]]:
    """What is shown of the table of methods, by name, in the order of listing. Imports torch and PEFT."""
    from .. import hf  # noqa: F401  # fills the table
    from ..experiment.settings import FIELDS
    from ..hf.method import METHODS

    return {
        row.name: {
            "title": row.title,
            "made": row.made,
            "draws": row.n_samples if row.bayesian else None,
            "options": {
                one.name: {"type": one.type, "default": one.default, "help": one.help}
                for one in row.options.values()
            },
            "also_fields": [name for name in row.options if name in FIELDS],
        }
        for row in METHODS.values()
    }


def _known() -> dict[str, dict[str, Any]]:
    """The stored listing; or the table where it is loaded, which may have methods of the caller's own."""
    if "bayes_kernels.hf" in sys.modules:
        return listing()
    return json.loads(LISTING.read_text(encoding="utf-8"))


def print_options(made: Sequence[str], form: str) -> None:
    """A panel for each method that has options, with their names and defaults: a part of a command's help.

    Args:
        made: How the methods come about that the command takes, see `Method.made`.
        form: How the command takes an option of `{method}`.
    """
    from rich.console import Console
    from rich.panel import Panel
    from rich.text import Text

    console = Console()
    for name, row in _known().items():
        if row["made"] in made and row["options"]:
            listed = [
                f"{option}={json.dumps(one['default'])}" for option, one in row["options"].items()
            ]
            title = f"{row['title']}, {form.format(method=name)}"
            text = Text("  ".join(word.replace(" ", "\N{NO-BREAK SPACE}") for word in listed))
            console.print(Panel(text, title=title, title_align="left", border_style="dim"))
    where = " What they mean: bayes-kernels methods METHOD. Which method: docs/choosing.md."
    console.print(where, highlight=False)


def _draws(row: dict[str, Any], none: str) -> str:
    return none if row["draws"] is None else str(row["draws"])


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
    known = _known()
    if method is None:
        listed = [
            [name, row["title"], _MADE[row["made"]], _draws(row, "none")]
            for name, row in known.items()
        ]
        headings = ["method", "title", "adapter", "draws"]
        print(Table("", headings, listed, left=3).text(), end="")
        return
    if method not in known:
        raise ValueError(f"method: expected one of {', '.join(known)}, got {method!r}")
    row = known[method]
    print(f"{row['title']}: {_MADE[row['made']]}, {_draws(row, 'no')} draws")
    if not row["options"]:
        print("It has no options beside the recipe's.")
    for name, one in row["options"].items():
        print(f"\n{name}: {one['type']}, by default {json.dumps(one['default'])}")
        print(textwrap.fill(one["help"], 96, initial_indent="    ", subsequent_indent="    "))
    if row["also_fields"]:
        note = (
            f"In train and compare {', '.join(row['also_fields'])} also name fields of the recipe: there "
            "--set options.NAME=VALUE sets the option, --set NAME=VALUE the field."
        )
        print("\n" + textwrap.fill(note, 96))


if __name__ == "__main__":
    write_json(LISTING, listing())
