"""Data sets of the hub: rows, splits, and a hub that is out of reach."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bayes_kernels.experiment.data import hub
from bayes_kernels.experiment.data.load import load_task
from bayes_kernels.task import Example

LETTERED = {"text": ["a dog", "a cat", "a cow"], "label": ["A", "B", "C"]}
HUB_ROWS: dict[str, tuple[dict[str, Any], Example]] = {
    "wg_s": (
        {
            "sentence": "Ann met Bea because _ was in town.",
            "option1": "Ann",
            "option2": "Bea",
            "answer": "2",
        },
        Example("", "Ann met Bea because _ was in town.", 1, choices=("Ann", "Bea")),
    ),
    "arc_c": (
        {"id": "Mercury_1", "question": "What barks?", "choices": LETTERED, "answerKey": "A"},
        Example("Mercury_1", "What barks?", 0, choices=("a dog", "a cat", "a cow")),
    ),
    "arc_e": (
        {
            "id": "NYSEDREGENTS_2",
            "question": "What purrs?",
            "choices": {"text": ["a dog", "a cat"], "label": ["1", "2"]},
            "answerKey": "2",
        },
        Example("NYSEDREGENTS_2", "What purrs?", 1, choices=("a dog", "a cat")),
    ),
    "obqa": (
        {"id": "7-980", "question_stem": "Milk is from", "choices": LETTERED, "answerKey": "C"},
        Example("7-980", "Milk is from", 2, choices=("a dog", "a cat", "a cow")),
    ),
    "boolq": (
        {"question": "is milk white", "answer": True, "passage": "Milk is white."},
        Example("", "is milk white", 1, context="Milk is white."),
    ),
    "mmlu_chem": (
        {
            "question": "What is H2O?",
            "subject": "college_chemistry",
            "choices": ["salt", "water", "gold", "air"],
            "answer": 1,
        },
        Example("college_chemistry-0", "What is H2O?", 1, choices=("salt", "water", "gold", "air")),
    ),
}


@pytest.mark.parametrize("name", sorted(HUB_ROWS))
def test_hub_rows_become_examples(name: str) -> None:
    row, expected = HUB_ROWS[name]
    example = hub.HUB_DATASETS[name].convert(row, 0)
    assert replace(example, id="") == replace(expected, id="")
    assert example.id == expected.id or not expected.id
    assert example.id


def test_hub_rows_without_public_label_or_with_a_wrong_one() -> None:
    row = {**HUB_ROWS["wg_s"][0], "answer": ""}
    assert hub.convert_winogrande(row, 0).label is None
    row = {**HUB_ROWS["obqa"][0], "answerKey": "E"}
    with pytest.raises(ValueError, match="answerKey: expected one of"):
        hub.convert_obqa(row, 0)


def test_load_hub_assembles_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def fake(name: str, split: str) -> list[dict[str, Any]]:
        asked.append((name, split))
        key = "arc_c" if name.startswith("arc") else "mmlu_chem" if "mmlu" in name else name
        row = HUB_ROWS[key][0]
        return [{**row, "id": f"{name}-{split}-{i}"} for i in range(50 if split == "train" else 5)]

    monkeypatch.setattr(hub, "_hub_rows", fake)
    task = hub.load_hub("obqa", train_size=10)
    assert asked == [
        ("obqa", "train"),
        ("obqa", "test"),
        ("arc_c", "test"),
        ("arc_e", "test"),
        ("mmlu_chem", "test"),
        ("mmlu_phys", "test"),
    ]
    assert (
        len(task.train) == 10
        and len(task.test) == 5
        and list(task.ood)
        == [
            "arc_c",
            "arc_e",
            "mmlu_chem",
            "mmlu_phys",
        ]
    )
    assert task.label_names == tuple("ABCD") and task.template == "obqa"
    asked.clear()
    hub.load_hub("obqa", split="published")
    assert [split for _, split in asked] == ["train", *["validation"] * 3, *["test"] * 2]
    with pytest.raises(ValueError, match="split: expected test or published, got 'dev'"):
        hub.load_hub("obqa", split="dev")
    boolq = hub.load_hub("boolq")
    assert boolq.kind == "classification" and asked[-1] == ("boolq", "validation")
    with pytest.raises(ValueError, match="must be of the kind"):
        hub.load_hub("obqa", ood=["boolq"])


def test_unreachable_hub_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    hub = pytest.importorskip("huggingface_hub")

    def unreachable(*args: Any, **kwargs: Any) -> None:
        raise OSError("no route to host\nand a long story")

    monkeypatch.setattr(hub.HfApi, "dataset_info", unreachable)
    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    offline = datasets.config.HF_HUB_OFFLINE
    with pytest.raises(ConnectionError) as caught:
        load_task("arc_e")
    message = str(caught.value)
    assert "\n" not in message and "no route to host" in message and "stdlib-docs" in message
    assert caught.value.__suppress_context__
    assert datasets.config.HF_HUB_OFFLINE == offline
