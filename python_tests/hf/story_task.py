"""Tasks of a few examples, and a small causal model for them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from bayes_kernels.hf.tasks.encoder import TaskEncoder
from bayes_kernels.hf.tasks.models import load_model
from bayes_kernels.task import Example, Task


def tiny_task(template: Any = None, **fields: Any) -> Task:
    example = Example("x", "What barks?", 0, choices=("a dog", "the cat."))
    base = Task("tiny", "multiple_choice", ("A", "B"), [example], [], [example], {}, template)
    return replace(base, **fields)


def choice_task() -> Task:
    examples = [
        Example("a", "Once upon a time there was a", 0, choices=("dog", "cat", "big red ball")),
        Example("b", "Tom saw", 1, choices=("a bird", "it")),
        Example("c", "The sun is hot and the snow is", 2, choices=("hot", "red", "cold")),
        Example("d", "Lily likes to", 1, choices=("cry", "play", "fall")),
    ]
    return Task("stories", "multiple_choice", tuple("ABC"), examples, [], examples)


def load_story_model(models_dir: Path, **options: Any) -> tuple[Any, TaskEncoder]:
    return load_model(models_dir / "stories260K", choice_task(), style="plain", **options)
