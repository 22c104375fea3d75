"""Options that several commands have."""

from __future__ import annotations

import ast
import itertools
from pathlib import Path

from bayes_kernels.cli import app


def test_options_that_commands_share_are_written_once() -> None:
    places: dict[str, list[str]] = {}
    files = Path(app.__file__).parent.glob("*.py")
    bodies = [ast.parse(file.read_text(encoding="utf-8")).body for file in files]
    for command in itertools.chain(*bodies):
        for argument in command.args.args if isinstance(command, ast.FunctionDef) else ():
            annotation = ast.unparse(argument.annotation) if argument.annotation else ""
            if annotation.startswith("Annotated"):
                places.setdefault(annotation, []).append(f"{command.name} {argument.arg}")
    assert len(places) > 20  # what only one command has
    assert not [found for found in places.values() if len(found) > 1]
