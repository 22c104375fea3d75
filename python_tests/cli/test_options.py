"""Options that several commands have."""

from __future__ import annotations

import ast
import itertools
from pathlib import Path

import pytest
import torch

from bayes_kernels.cli import app, options


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


def test_runs_go_one_on_each_gpu_unless_more_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = torch.get_num_threads()
    try:
        assert options.start_runs(1, "cpu") == 1 and torch.get_num_threads() == 1
        assert options.start_runs(None, "cpu") == options.all_cores() == torch.get_num_threads()
        monkeypatch.setattr(options, "start", lambda threads, device: torch.device("cuda"))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        assert options.start_runs(None, "cuda") == 2
        assert options.start_runs(1, "auto") == 1 and options.start_runs(5, "auto") == 5
    finally:
        torch.set_num_threads(threads)
