"""Encoded examples: what is cut where a text is too long, and batches."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_task as tiny_files
import transformers

from bayes_kernels.hf.tasks import encoder
from bayes_kernels.hf.tasks.encoder import TaskEncoder
from bayes_kernels.hf.tasks.models import load_model
from bayes_kernels.hf.tasks.prompts import make_prompt
from bayes_kernels.task import Example, Task
from hf.story_task import load_story_model, tiny_task


def test_long_prompts_lose_context_but_not_the_answer(models_dir: Path) -> None:
    task = tiny_task("boolq", kind="classification", label_names=("false", "true"))
    example = Example("x", "is it so", 1, context="The dog ran to the big tree. " * 200)
    task = replace(task, train=[example], test=[])
    _, encoder = load_model(models_dir / "stories260K", task, max_length=200)
    ids = encoder(example)["input_ids"]
    assert 190 <= len(ids) <= 200
    text = encoder.tokenizer.decode(ids, skip_special_tokens=True)
    assert text.endswith("Question: is it so\nAnswer (true or false):")
    assert "Passage: The dog ran to the big tree. The dog" in text
    short = encoder(replace(example, context="The dog ran."))
    assert len(short["input_ids"]) < 190


def test_batches_without_all_labels_have_none(models_dir: Path) -> None:
    _, encoder = load_story_model(models_dir)
    first, second = encoder.task.train[:2]
    items = [encoder(first), encoder(replace(second, label=None))]
    assert "labels" in encoder.collate(items[:1]) and "labels" not in encoder.collate(items)


def test_a_bar_for_tokenising(models_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, coder = load_story_model(models_dir)
    bars: list[Any] = []

    def noted(enabled: bool, items: Any, **options: Any) -> Any:
        bars.append((enabled, len(items), options["desc"]))
        return items

    monkeypatch.setattr(encoder, "progress_bar", noted)
    few = coder.task.train[:2]
    items = coder.dataset(few).items
    assert coder.dataset(few, progress=True).items == items
    assert bars == [(False, 2, "tokenise"), (True, 2, "tokenise")]


WORDS = [*tiny_files.GOOD, *tiny_files.OTHER]


@pytest.mark.parametrize("kind", ["classifier", "multiple_choice"])
@pytest.mark.parametrize(("first", "second"), [(3, 60), (60, 3), (60, 60), (30, 12), (0, 60)])
def test_pairs_are_cut_where_they_are_longest(
    tiny_model: Path, kind: str, first: int, second: int
) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model)
    one, other = (" ".join(WORDS[i % 18] for i in range(count)) for count in (first, second))
    if kind == "classifier":
        example = Example("x", one, 0, context=other)
    else:
        example = Example("x", one, 0, choices=(other, "the"))
    task = Task("t", kind, ("a", "b"), [example], [], [])  # type: ignore[arg-type]
    encoder = TaskEncoder(tokenizer, task, kind, None, (), 16)  # type: ignore[arg-type]
    ids = encoder(example)["input_ids"]
    ids = ids if kind == "classifier" else ids[0]
    left, right, rest = tokenizer.decode(ids).removeprefix("[CLS]").split("[SEP]")
    kept = len(left.split()), len(right.split())
    assert len(ids) <= 16 and rest == ""
    assert one.startswith(left.strip()) and other.startswith(right.strip())
    room = 16 - 3
    expected = first, second
    if first + second > room:
        expected = (min(first, max(room - second, room // 2)), min(second, room))
        expected = (expected[0], min(second, room - expected[0]))
    assert sum(kept) == sum(expected)
    if min(first, second) > room // 2:  # which of the two has the odd token is the library's choice
        assert abs(kept[0] - kept[1]) <= 1
    else:
        assert kept == expected


@pytest.mark.parametrize("context", [None, "river " * 5, "river " * 50])
def test_prompts_keep_their_choices_while_there_is_something_else_to_cut(
    tiny_model: Path, context: str | None
) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model)
    example = Example("x", "song " * 60, 0, context=context)
    task = Task("t", "classification", ("stone", "road"), [example], [], [])
    prompt = make_prompt(task, "blob")
    encoder = TaskEncoder(tokenizer, task, "causal", prompt, (0, 1), 40)
    shortest = len(encoder._tokens(prompt(replace(example, question="", context=None))))
    assert shortest < 40
    kept = tokenizer.decode(encoder(example)["input_ids"])
    assert len(encoder(example)["input_ids"]) == 40
    assert "river" not in kept and "song" in kept and kept.index("stone") < kept.index("road")
