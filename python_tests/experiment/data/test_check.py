"""What `data check` says of data."""

from __future__ import annotations

import json
from pathlib import Path

from bayes_kernels.experiment.data.check import describe
from bayes_kernels.experiment.data.files import load_files
from bayes_kernels.experiment.data.samples import sample_file


def test_the_sample_is_a_task() -> None:
    task = load_files(sample_file())
    assert task.label_names == ("bug", "praise", "question") and not task.warnings()
    text = describe(task)
    size = len(task.train) + len(task.validation) + len(task.test)
    assert size == 84 and "messages: classification, 3 classes" in text
    (line,) = (line for line in text.splitlines() if line.startswith("train "))
    longest = max(len(example.question.split()) for example in task.train)
    assert line.split() == ["train", str(len(task.train)), line.split()[2], str(longest)]
    counts = task.class_counts()
    (line,) = (line for line in text.splitlines() if line.startswith("praise "))
    assert line.split()[1:] == [str(counts[split][1]) for split in ("train", "validation", "test")]
    assert "note: no id" in text and "note: no test data" in text and "repeat" not in text
    assert f"warning: {len(task.test)} test rows" in text
    first = task.train[0]
    assert f"  text: {first.question}" in text and f"({task.label_names[first.label or 0]})" in text
    assert "note: validation: about 10%" in text and "no validation row" not in text


def test_repeated_texts_are_counted(tmp_path: Path) -> None:
    rows = [{"id": i, "text": f"text {i // 2}", "label": int(i % 4 == 1)} for i in range(40)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tests = [{"id": f"t{i}", "text": f"text {i}", "label": 0} for i in range(18, 22)]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tests))
    text = describe(load_files(tmp_path))
    # Two of twenty test texts are among the training rows' ten pairs.
    assert (
        "warning: 22 rows repeat the text of another row; 10 of these texts have different" in text
    )
    assert "warning: 2 test rows have the text of a training row" in text
    assert "no id" not in text and "no test data" not in text


def test_notes_say_where_splits_come_from(tmp_path: Path) -> None:
    rows = [{"text": f"text {i}", "label": i % 2} for i in range(60)]
    parts = {"train": rows[:20], "validation": rows[20:40], "test": rows[40:]}
    for names, said in (
        ("train", ("no test data: about 20%", "validation: about 10%")),
        (
            "train validation",
            ("data: the validation data are tested on", "validation: about"),
        ),
        ("train test", ("validation: about 10%",)),
        ("train validation test", ()),
    ):
        folder = tmp_path / names.replace(" ", "-")
        folder.mkdir()
        for name in names.split():
            lines = "".join(json.dumps(row) + "\n" for row in parts[name])
            (folder / f"{name}.jsonl").write_text(lines)
        notes = [line for line in describe(load_files(folder)).splitlines() if line[:5] == "note:"]
        found = [line for line in notes if "test data" in line or "validation" in line]
        assert len(found) == len(said) and all(
            part in line for part, line in zip(said, found, strict=True)
        )
    task = load_files(tmp_path / "train-test", validation=0.0)
    assert "warning: no validation row: temperatures" in describe(task)
