"""Files as a task: splits, classes, and each bad row by its number."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from bayes_kernels.experiment.data import rows as readers
from bayes_kernels.experiment.data.files import load_files
from bayes_kernels.experiment.data.load import load_task
from bayes_kernels.experiment.data.splits import choose_subset, split_by_hash
from bayes_kernels.task import Example


def write_lines(path: Path, rows: list[Any]) -> Path:
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text, encoding="utf-8")
    return path


def rows(count: int, prefix: str = "row", **extra: Any) -> list[dict[str, Any]]:
    return [
        {"id": f"{prefix}-{i}", "question": f"question {i}", "label": i % 2, **extra}
        for i in range(count)
    ]


def test_hash_splits_are_the_same_on_every_machine() -> None:
    examples = [Example(str(i), "question", 0) for i in range(40)]
    rest, part = split_by_hash(examples, 0.2, "test")
    assert [e.id for e in part] == ["10", "14", "16", "23", "30", "31", "33", "35", "37"]
    assert rest + part != examples and set(rest) | set(part) == set(examples)
    chosen = [e.id for e in choose_subset(examples, 5, seed=1)]
    assert chosen == ["6", "8", "26", "33", "14"]
    # Neither the order of the examples nor their number matters.
    assert split_by_hash(examples[:29:-1], 0.2, "test")[1] == part[:3:-1]
    with pytest.raises(ValueError, match="integer from 1 to 40"):
        choose_subset(examples, 41)


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_load_files_classification(tmp_path: Path, suffix: str) -> None:
    train = write_lines(tmp_path / f"toy_train{suffix}", rows(200))
    test = write_lines(tmp_path / f"toy_test{suffix}", rows(50, "test"))
    ood = write_lines(tmp_path / f"far_test{suffix}", [{"id": 7, "question": "unlabelled"}])
    task = load_files(train, test, ood=[ood], train_size=20, seed=3)
    assert (task.name, task.kind, task.label_names) == ("toy", "classification", ("0", "1"))
    assert len(task.train) == 20 and len(task.test) == 50
    assert 8 <= len(task.validation) <= 35
    assert not {e.id for e in task.train} & {e.id for e in task.validation}
    assert task.ood == {"far": [Example("7", "unlabelled", None)]}
    named = load_files(train, test, label_names=["negative", "positive"], train_size=20, seed=3)
    assert named.label_names == ("negative", "positive") and named.train == task.train
    assert "largest class" in named.summary()


def test_load_files_folder_and_multiple_choice(tmp_path: Path) -> None:
    lines = [
        {"id": i, "question": f"q{i}", "choices": [f"x{i}", "y", "z"][: 2 + i % 2], "label": 1}
        for i in range(30)
    ]
    write_lines(tmp_path / "train.jsonl", lines[:20])
    write_lines(tmp_path / "dev.jsonl.gz", lines[20:])
    task = load_task(tmp_path)
    assert task.name == tmp_path.name and task.kind == "multiple_choice"
    assert task.label_names == ("A", "B", "C") and len(task.test) == 10
    assert task.test[0].choices == ("x20", "y")
    write_lines(tmp_path / "other_train.jsonl", lines[:20])
    with pytest.raises(ValueError, match="expected one train file"):
        load_files(tmp_path)


def test_load_files_same_choices_make_a_classification(tmp_path: Path) -> None:
    lines = rows(60, choices=["false", "true"], context="a passage")
    task = load_files(write_lines(tmp_path / "boolq_train.jsonl", lines))
    assert (task.kind, task.label_names, task.template) == (
        "classification",
        ("false", "true"),
        "boolq",
    )
    assert task.test[0].choices == () and task.test[0].context == "a passage"
    assert task.test[0].text.startswith("a passage\nquestion ")
    assert len(task.train) + len(task.validation) + len(task.test) == 60


def test_load_files_reports_every_bad_line_with_its_number(tmp_path: Path) -> None:
    good = {"id": "a", "question": "q", "label": 0}
    path = write_lines(
        tmp_path / "bad.jsonl",
        [
            good,
            "{not json",
            {**good, "id": ""},
            {**good, "id": "b", "question": 3},
            {**good, "id": "c", "label": True},
            "",
            good,
            {**good, "id": "d", "choices": ["one"]},
            {**good, "id": "e", "choices": ["one", "two"], "label": 2},
            [1],
        ],
    )
    with pytest.raises(ValueError) as caught:
        load_files(path)
    lines = str(caught.value).splitlines()
    assert len(lines) == 8
    expected = {
        2: "expected JSON, got",
        3: "'id' must be",
        4: "'question' must be",
        5: "'label' must be an integer from 0, or a name, got True",
        7: "'id' must be new, got 'a', which is also on line 1",
        8: "'choices' must be",
        9: "below the number of choices, 2, got 2",
        10: "expected a JSON object, got [1]",
    }
    for line, (number, message) in zip(lines, expected.items(), strict=True):
        assert line.startswith(f"{path}:{number}: ") and message in line


def test_load_files_shows_ten_problems_at_most(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "bad.jsonl", ["nothing"] * 25)
    with pytest.raises(ValueError) as caught:
        load_files(path)
    lines = str(caught.value).splitlines()
    assert len(lines) == 11 and lines[-1] == "... and 15 more"


def test_load_files_checks_files_against_each_other(tmp_path: Path) -> None:
    train = write_lines(tmp_path / "train.jsonl", rows(10))
    with pytest.raises(
        ValueError, match=r"test\.jsonl:3: 'id' must be new, got 'row-2', which is also in the tr"
    ):
        load_files(train, write_lines(tmp_path / "test.jsonl", [*rows(2, "t"), rows(3)[2]]))
    far = write_lines(tmp_path / "far.jsonl", [{"id": "x", "question": "q", "label": 2}])
    with pytest.raises(ValueError, match=r"far\.jsonl:1: 'label' must be below 2"):
        load_files(train, ood={"far": far})
    mixed = write_lines(tmp_path / "mixed.jsonl", [*rows(2, choices=["a", "b"]), *rows(2, "n")])
    with pytest.raises(ValueError, match=r"mixed\.jsonl:3: 'choices' is missing"):
        load_files(mixed)
    with pytest.raises(ValueError, match="expected a file that can be read"):
        load_files(tmp_path / "absent.jsonl")
    with pytest.raises(ValueError, match="empty file"):
        load_files(write_lines(tmp_path / "empty.jsonl", []))
    broken = tmp_path / "broken.jsonl.gz"
    broken.write_bytes(gzip.compress(b'{"id": "a"}\n' * 1000)[:40])
    with pytest.raises(ValueError, match=r"broken\.jsonl\.gz: expected a file that can be read"):
        load_files(broken)
    latin = tmp_path / "latin.jsonl"
    latin.write_bytes(b'{"id": "a", "question": "caf\xe9", "label": 0}\n')
    with pytest.raises(ValueError, match=r"latin\.jsonl:1: expected UTF-8, got"):
        load_files(latin)


DEEP = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            '{"id": "x", "question": "q", "label": 1000000}',
            "without gaps, got 1000000 where no row",
        ),
        (f'{{"id": "x", "question": "q", "label": {2**70}}}', f"without gaps, got {2**70} where"),
        (
            f'{{"id": "x", "question": "q", "label": {"9" * 5000}}}',
            "expected JSON that can be read",
        ),
        (
            '{"id": "x", "question": "q", "label": 1e400}',
            "must be an integer from 0, or a name, got inf",
        ),
        (
            '{"id": "x", "question": "q", "label": NaN}',
            "must be an integer from 0, or a name, got nan",
        ),
        (f'{{"id": "x", "question": {DEEP}, "label": 0}}', "nested too deep"),
        ('{"a": ' * 100_000, "nested too deep"),
        (
            f'{{"id": {"[" * 600 + "]" * 600}, "question": "q", "label": 0}}',
            "'id' must be|too deep",
        ),
        ('{"id": "x", "question": "a \\ud800 b", "label": 0}', "'question' must be Unicode text"),
        ('{"id": "\\udfff", "question": "q", "label": 0}', "'id' must be Unicode text"),
        ('{"id": "x", "question": "q", "context": "\\ud83d", "label": 0}', "'context' must be Uni"),
    ],
)
def test_lines_that_no_task_can_have(tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows(20)) + line + "\n")
    with pytest.raises(ValueError, match=f"^{re.escape(str(file))}:21: [^\n]*({message})[^\n]*$"):
        load_files(file)


def test_files_that_cannot_be_read_to_their_end(tmp_path: Path) -> None:
    loop = tmp_path / "loop.jsonl"
    loop.symlink_to(loop)
    pipe = tmp_path / "pipe.jsonl"
    os.mkfifo(pipe)
    damaged = bytearray(gzip.compress(b"".join(b'{"id": "%d"}' % i for i in range(5000))))
    damaged[40:60] = bytes(20)
    packed = tmp_path / "packed.jsonl.gz"
    packed.write_bytes(damaged)
    for file, message in (
        (loop, "expected a file that can be read, got: "),
        (pipe, "expected a file of JSON lines, got a pipe or device"),
        (packed, "expected a file that can be read, got: "),
        (tmp_path, "expected a file of JSON lines, got a folder"),
        (Path("/dev/zero"), "expected a file of JSON lines, got a pipe or device"),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(str(file))}: {re.escape(message)}"):
            readers.read_examples(file)
    with pytest.raises(ValueError, match="data: expected stdlib-docs"):
        load_task(loop)


def test_classes_without_examples(tmp_path: Path) -> None:
    one = write_lines(tmp_path / "one.jsonl", [{**row, "label": 0} for row in rows(40)])
    task = load_files(one, name="one")
    assert task.label_names == ("0", "1")
    assert task.warnings() == [
        "one: every training example has label 0; a model learns nothing else",
        "one: no training or test example is of class 1",
    ]
    two = write_lines(tmp_path / "two.jsonl", rows(40))
    test = write_lines(tmp_path / "test.jsonl", [{**row, "label": 2} for row in rows(5, "t")])
    task = load_files(two, test, name="two")
    (line,) = task.warnings()
    assert line == "two: test examples of 2 have no training example of their class"
    task = load_files(two, name="two", label_names=["a", "b", *"cdefghi"])
    (line,) = task.warnings()
    assert line == "two: no training or test example is of class c, d, e, f, g and 2 more"
    assert load_files(two).warnings() == []
    for names in ([], ["a"], ["a", "a"], ["a", " "], ["a", "\ud800"]):
        with pytest.raises(ValueError, match="expected two or more distinct names"):
            load_files(two, label_names=names)
    from_one = write_lines(tmp_path / "from_one.jsonl", [{**r, "label": 1} for r in rows(9)])
    with pytest.raises(ValueError, match=r"from_one.jsonl:1: .*got 1 where no row has 0"):
        load_files(from_one)


def test_out_of_distribution_rows_are_not_those_inside(tmp_path: Path) -> None:
    train = write_lines(tmp_path / "train.jsonl", rows(20))
    test = write_lines(tmp_path / "test.jsonl", rows(20, "test"))
    for file in (train, test):
        with pytest.raises(ValueError, match=rf"{file.name}:1: expected data of another kind"):
            load_files(train, test, ood={"far": file})
    # Other data that counts from 0 as well.
    far = write_lines(tmp_path / "far.jsonl", [{**r, "question": "other"} for r in rows(20)])
    assert len(load_files(train, test, ood={"far": far}).ood["far"]) == 20


def test_load_files_reads_the_public_sets(data_dir: Path) -> None:
    task = load_files(
        data_dir / "obqa_train.jsonl.gz",
        data_dir / "obqa_test.jsonl.gz",
        ood=[data_dir / "arc_easy_test.jsonl.gz", data_dir / "mmlu_chem_test.jsonl.gz"],
        train_size=500,
    )
    assert (task.name, task.template, task.kind) == ("obqa", "obqa", "multiple_choice")
    assert task.label_names == tuple("ABCDE")
    assert {key: len(value) for key, value in task.splits.items() if key != "validation"} == {
        "train": 500,
        "test": 500,
        "arc_easy": 2376,
        "mmlu_chem": 100,
    }


def test_load_task_names_what_it_knows() -> None:
    with pytest.raises(ValueError, match=r"stdlib-docs.*obqa.*got 'nothing'"):
        load_task("nothing")


# --- Texts and labels as people have them --------------------------------------------------------

WORDS = [("a bright day", "good"), ("a dull road", "bad"), ('kind, "warm"\nand calm', "good")] * 10


def write_as(path: Path, content: list[dict[str, Any]]) -> Path:
    """Rows in the format that the name's ending says."""
    name = path.name.removesuffix(".gz")
    if name.endswith(".jsonl"):
        return write_lines(path, content)
    text = io.StringIO(newline="")
    writer = csv.DictWriter(
        text, list(content[0]), delimiter="," if name.endswith("csv") else "\t", restval=""
    )
    writer.writeheader()
    writer.writerows(content)
    encoded = text.getvalue().encode("utf-8-sig")
    path.write_bytes(gzip.compress(encoded) if path.suffix == ".gz" else encoded)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".tsv", ".csv.gz"])
@pytest.mark.parametrize("keys", [("text", "label"), ("question", "labels")])
def test_every_format_says_the_same(tmp_path: Path, suffix: str, keys: tuple[str, str]) -> None:
    words = [(f"{text} {i}", label) for i, (text, label) in enumerate(WORDS)]
    named = [dict(zip(keys, pair, strict=True)) for pair in words]
    task = load_files(write_as(tmp_path / f"mine{suffix}", named))
    assert (task.name, task.kind, task.label_names) == ("mine", "classification", ("bad", "good"))
    inside = [*task.train, *task.validation, *task.test]
    found = {example.question: task.label_names[example.label or 0] for example in inside}
    assert found == dict(words) and len(task.test) in range(1, 15)
    # Numbers say the same, once names are given in their order; so does a column of ids.
    numbered = [
        {"id": str(i), keys[0]: text, keys[1]: int(label == "good")}
        for i, (text, label) in enumerate(words)
    ]
    other = load_files(
        write_as(tmp_path / f"numbers_train{suffix}", numbered), label_names=("bad", "good")
    )
    assert {(e.question, e.label) for e in [*other.train, *other.validation, *other.test]} == {
        (e.question, e.label) for e in inside
    }
    plain = load_files(tmp_path / f"numbers_train{suffix}")
    assert plain.label_names == ("0", "1") and plain.train == other.train
    assert plain.train[0].id.isdigit() and task.train[0].id.startswith("text-")


def test_rows_of_one_text_stay_together(tmp_path: Path) -> None:
    repeated = [{"text": f"text {i % 15}", "label": i % 2} for i in range(60)]
    task = load_files(write_as(tmp_path / "twice.csv", repeated))
    parts = [task.train, task.validation, task.test]
    assert sum(map(len, parts)) == 60
    texts = [{example.question for example in part} for part in parts]
    assert texts[0] and texts[2] and sum(map(len, texts)) == 15
    ids = [example.id for part in parts for example in part]
    assert len(set(ids)) == 60
    file = write_as(tmp_path / "again.csv", repeated[:1])
    with pytest.raises(ValueError, match=r"again\.csv:2: text must be new, got 'text 0', which is"):
        load_files(tmp_path / "twice.csv", file)


def test_names_of_classes_are_given_or_found(tmp_path: Path) -> None:
    content = [{"text": text, "label": label} for text, label in WORDS]
    file = write_as(tmp_path / "mine.csv", content)
    assert load_files(file, label_names=("good", "bad", "so so")).label_names[0] == "good"
    with pytest.raises(
        ValueError, match=r"mine\.csv:2: 'label' must be one of 'bad, worse', got 'go"
    ):
        load_files(file, label_names=("bad", "worse"))
    far = write_as(tmp_path / "far.csv", [{"text": "x", "label": "ugly"}])
    with pytest.raises(ValueError, match=r"far\.csv:2: 'label' must be one of .*, got 'ugly'"):
        load_files(file, ood=[far])
    mixed = write_lines(tmp_path / "mixed.jsonl", [*content, {"text": "x", "label": 1}])
    with pytest.raises(
        ValueError, match=r"mixed\.jsonl:1: 'label' must be an integer from 0 as in"
    ):
        load_files(mixed)


def test_choices_are_answered_by_letter_text_or_number(tmp_path: Path) -> None:
    lines = [
        {"text": f"q{i}", "choices": [f"x{i}", "y", "z"], "label": label}
        for i, label in enumerate(["B", "y", 1, "x3", 0, "C"] * 4)
    ]
    for i, line in enumerate(lines):
        line["choices"][0] = "x3" if line["label"] == "x3" else f"x{i}"
    task = load_files(write_lines(tmp_path / "quiz.jsonl", lines))
    inside = sorted([*task.train, *task.validation, *task.test], key=lambda e: int(e.question[1:]))
    assert [example.label for example in inside] == [1, 1, 1, 0, 0, 2] * 4
    lines[3]["label"] = "D"
    with pytest.raises(
        ValueError, match=r":4: 'label' must be one of 'A, B, C, x3, y, z', got 'D'"
    ):
        load_files(write_lines(tmp_path / "quiz.jsonl", lines))


TABLES = {
    "name,mark\na,0\n": "1: expected columns text and label in the first line, got ['name', 'mark']",
    "text,mark\na,0\n": "1: expected columns text and label in the first line, got ['text', 'mark']",
    "text;label\na;0\n": "first line, divided by commas, got ['text;label']",
    'text,label\n"a,0\nb,1\n': "3: expected 2 columns, got 1; a quotation mark above may lack its end",
    "text,text,label\na,b,0\n": "1: expected a name for each column, got 'text' twice",
    "text,label\na,0\nb\n": "3: expected 2 columns, got 1",
    "text,label\na,0\nb,1,2\n": "3: expected 2 columns, got 3",
    "text,label\na,\n": "2: 'label' must be an integer from 0, or a name, got None",
    "text,label\n,1\n": "2: 'text' must be a non-empty string, got None",
    "text,question,label\na,b,1\n": "2: expected one of 'question' and 'text', got both",
    "text,label\n": " expected a row for each text, got an empty file",
    "": " expected a row for each text, got an empty file",
    'text,label\n"a,0\n': "2: expected 2 columns, got 1",
    "text,label\na\0b,0\ncaf\xe9,1\n": "3: expected UTF-8, got invalid continuation byte; save the",
}


@pytest.mark.parametrize("content", TABLES)
def test_tables_that_no_task_can_have(tmp_path: Path, content: str) -> None:
    file = tmp_path / "rows.csv"
    file.write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError) as caught:
        load_files(file)
    message = str(caught.value).splitlines()[-1]
    assert message.startswith(f"{file}:") and TABLES[content] in message


def test_files_whose_names_say_nothing_are_json_lines(tmp_path: Path) -> None:
    file = tmp_path / "rows.xlsx"
    file.write_text("text,label\na,0\n")
    with pytest.raises(ValueError) as caught:
        load_files(file)
    first, second = str(caught.value).splitlines()
    assert first.endswith("; a file is read as JSON lines unless its name ends in .csv or .tsv")
    assert ":2: expected JSON, got" in second and "unless" not in second


class FakeDataset(list[dict[str, Any]]):
    """What the library datasets shows of a data set: rows, and the names of its classes."""

    def __init__(self, content: list[dict[str, Any]], names: list[str] | None = None) -> None:
        super().__init__(content)
        label = type("ClassLabel", (), {"names": names})() if names else object()
        self.features = {"label": label}


def test_data_sets_of_the_library() -> None:
    content = [{"text": f"{text} {i}", "label": i % 2} for i, (text, _) in enumerate(WORDS)]
    task = load_task(FakeDataset(content, ["neg", "pos"]), name="mine")
    assert (task.name, task.label_names) == ("mine", ("neg", "pos"))
    assert {e.question: e.label for e in task.train}.items() <= {
        row["text"]: row["label"] for row in content
    }.items()
    both = {"train": FakeDataset(content[:20]), "validation": FakeDataset(content[20:])}
    split = load_task(both, label_names=("a", "b"))
    assert len(split.test) == 10 and split.label_names == ("a", "b")
    with pytest.raises(ValueError, match="expected a split train, got test"):
        load_task({"test": FakeDataset(content)})
    with pytest.raises(ValueError, match=r"train:0: .* got -1, which stands for no label; leave"):
        load_task([{"text": "a", "label": -1}])


def labelled(*names: str, first: int = 0, count: int = 30) -> FakeDataset:
    """Rows of classes in turn, as the library stores them."""
    indices = range(first, first + count)
    return FakeDataset([{"text": f"t {i}", "label": i % 2} for i in indices], list(names))


def test_a_class_label_keeps_its_order_and_its_unused_names() -> None:
    task = load_task(labelled("world", "business", "sport"))
    assert task.label_names == ("world", "business", "sport")
    inside = [*task.train, *task.validation, *task.test]
    assert len(inside) == 30
    assert all(example.label == int(example.question[2:]) % 2 for example in inside)
    # A test split may number them otherwise; names that are given come first.
    both = {"train": labelled("b", "a"), "test": labelled("a", "b", first=30)}
    found = load_task(both)
    assert found.label_names == ("b", "a") and {e.label for e in found.test} == {0, 1}
    assert all(example.label != int(example.question[2:]) % 2 for example in found.test)
    assert load_task(both, label_names=("a", "b")).label_names == ("a", "b")
    with pytest.raises(ValueError, match=r"test:0: 'label' must be one of 'b, a', got 'c'"):
        load_task({"train": labelled("b", "a"), "test": labelled("c", "a", first=30)})


def test_a_test_split_whose_labels_are_held_back_is_left_out() -> None:
    """As those of GLUE."""
    held_back = labelled("bad", "good", first=90, count=20)
    for row in held_back:
        row["label"] = -1
    splits = {
        "train": labelled("bad", "good"),
        "validation": labelled("bad", "good", first=60),
        "test": held_back,
    }
    task = load_task(splits)
    assert [e.question for e in task.test] == [f"t {i}" for i in range(60, 90)]
    assert task.notes[:2] == (
        "the split test has no labels: it is left out",
        "no test data: the validation data are tested on",
    )
    with pytest.raises(ValueError, match="test: expected a data set with rows, got an empty one"):
        load_task({**splits, "test": FakeDataset([])})
    with pytest.raises(ValueError, match="train:0: expected a JSON object, got 'text'"):
        load_task(["text"])  # type: ignore[list-item]
    del splits["validation"]
    task = load_task(splits)
    assert len(task.train) + len(task.validation) + len(task.test) == 30 and len(task.test) > 1
    held_back[7]["label"] = 1  # some are there: the others are mistakes
    with pytest.raises(ValueError, match=r"test:0: 'label' must be an integer .*got -1, which"):
        load_task(splits)


def test_validation_data_of_ones_own(tmp_path: Path) -> None:
    train, held_out, test = (
        [{"text": f"{part} {i}", "label": "ab"[i % 2]} for i in range(20)] for part in "xyz"
    )
    held_out[0]["label"] = "c"  # a class that is nowhere else
    for name, part in (("train", train), ("dev", held_out), ("test", test)):
        write_as(tmp_path / f"{name}.csv", part)
    for source in (tmp_path, {"train": train, "dev": held_out, "test": test}):
        task = load_task(source, name="mine")
        assert task.label_names == ("a", "b", "c") and not task.notes
        for found, part in ((task.validation, held_out), (task.test, test)):
            assert [e.question for e in found] == [row["text"] for row in part]
        assert len(task.train) == 20
        assert len(load_task(source, name="mine", train_size=5).validation) == 20
    # With a test file of its own name: the validation file stays what it is.
    other = write_as(tmp_path / "other.csv", [{"text": "w", "label": "a"}])
    task = load_files(tmp_path, other)
    assert len(task.test) == 1 and len(task.validation) == 20
    write_as(tmp_path / "dev.csv", [*held_out, train[3]])
    with pytest.raises(ValueError, match=r"dev\.csv:22: text must be new, .* in the training data"):
        load_files(tmp_path)
    write_as(tmp_path / "dev.csv", held_out)
    write_as(tmp_path / "test.csv", [*test, held_out[2]])
    with pytest.raises(ValueError, match=r"test\.csv:22: text must be new, .* the validation data"):
        load_files(tmp_path)


def test_validation_data_that_cannot_be_used_are_left_out(tmp_path: Path) -> None:
    train, held_out, test = (
        [{"text": f"{part} {i}", "label": "ab"[i % 2]} for i in range(30)] for part in "xyz"
    )
    dev = write_as(tmp_path / "dev.csv", held_out)
    for name, part in (("train", train), ("test", test)):
        write_as(tmp_path / f"{name}.csv", part)
    # Named as something else, they are that.
    task = load_files(tmp_path, dev)
    assert [e.question for e in task.test] == [row["text"] for row in held_out]
    task = load_files(tmp_path, ood=[dev])
    assert len(task.ood["dev" if "dev" in task.ood else tmp_path.name]) == 30
    assert len(task.test) == 30 and len(task.train) + len(task.validation) == 30
    # Two files: which is meant is not known. Without test data it has to be.
    write_as(tmp_path / "val.csv", held_out[:5])
    task = load_files(tmp_path)
    assert "expected one validation file, got dev.csv, val.csv: they are left out" in task.notes
    assert len(task.train) + len(task.validation) == 30
    (tmp_path / "test.csv").unlink()
    with pytest.raises(ValueError, match=r"expected one dev file in .*, got dev\.csv, val\.csv"):
        load_files(tmp_path)
    # Splits of a data set.
    bare = [{**row, "label": -1} for row in held_out]
    for unused in ([], bare):
        task = load_task({"train": train, "validation": unused, "test": test})
        assert "the validation split has no labels: it is left out" in task.notes
        assert len(task.train) + len(task.validation) == 30


def test_data_sets_out_of_distribution(tmp_path: Path) -> None:
    train = [{"text": f"x {i}", "label": "ab"[i % 2]} for i in range(30)]
    far = [{"text": f"far {i}"} for i in range(7)]
    file = write_as(tmp_path / "far.csv", far)
    task = load_task(train, ood={"rows": far, "file": file, "path": str(file)})
    assert {name: len(rows) for name, rows in task.ood.items()} == {"rows": 7, "file": 7, "path": 7}


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_numbers_among_the_names_are_names(tmp_path: Path, suffix: str) -> None:
    content = [{"text": f"text {i}", "label": 1 + i % 5} for i in range(60)]
    file = write_as(tmp_path / f"stars{suffix}", content)
    scale = ("1", "2", "3", "4", "5")
    task = load_files(file, label_names=scale)
    inside = [*task.train, *task.validation, *task.test]
    assert task.label_names == scale and len(inside) == 60
    assert all(example.label == int(example.question[5:]) % 5 for example in inside)
    # Also those of a file that has some of them only, and of a file of the other kind beside it.
    some = write_as(tmp_path / f"some{suffix}", content[1::5])
    assert {e.label for e in load_files(some, label_names=scale).train} == {1}
    twin = {".jsonl": ".csv", ".csv": ".jsonl"}[suffix]
    new = [{**row, "text": f"new {row['text']}"} for row in content]
    tested = load_files(file, write_as(tmp_path / f"new{twin}", new), label_names=scale)
    assert [e.label for e in tested.test] == [i % 5 for i in range(60)]
    # Names that are no such numbers leave them numbers from 0.
    counted = [{**row, "label": row["label"] - 1} for row in content]
    file = write_as(tmp_path / f"counted{suffix}", counted)
    task = load_files(file, label_names=tuple("abcde"))
    assert all(example.label == int(example.question[5:]) % 5 for example in task.test)
    mixed = load_files(file, write_as(tmp_path / f"again{twin}", [{"text": "x", "label": 4}]))
    assert mixed.label_names == ("0", "1", "2", "3", "4") and mixed.test[0].label == 4


def test_rows_of_pandas_numpy_and_torch() -> None:
    class Frame:
        """What pandas shows of a table: `to_dict` of its cells, NaN where there is none."""

        def __init__(self, content: list[dict[str, Any]]) -> None:
            self.content = content

        def itertuples(self) -> None: ...

        def notna(self) -> Frame:
            return self

        def astype(self, kind: type) -> Frame:
            assert kind is object
            return self

        def where(self, cells: Frame, other: None) -> Frame:
            found = [{k: v if v == v else other for k, v in row.items()} for row in cells.content]
            return Frame(found)

        def to_dict(self, kind: str) -> list[dict[str, Any]]:
            assert kind == "records"
            return self.content

    content = [
        {"text": f"t {i}", "label": numpy.int64(i % 2), "context": float("nan")} for i in range(30)
    ]
    expected = load_task([{"text": f"t {i}", "label": i % 2} for i in range(30)])
    for source in (
        Frame(content),
        [{"text": row["text"], "label": row["label"]} for row in content],
        [{"text": row["text"], "label": torch.tensor(int(row["label"]))} for row in content],
        FakeDataset([{"text": row["text"], "label": row["label"]} for row in content], ["0", "1"]),
    ):
        assert load_task(source) == expected
    for bad in (numpy.arange(2), True, 1.0, torch.ones(2)):
        with pytest.raises(ValueError, match="'label' must be an integer from 0, or a name, got"):
            load_task([{"text": "a", "label": bad}])


def test_data_frames() -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"text": [f"t {i}" for i in range(30)], "label": [0, 1] * 15})
    frame["context"] = [None, *["c"] * 29]
    task = load_task(frame)
    inside = [*task.train, *task.validation, *task.test]
    assert {e.question: e.label for e in inside} == {f"t {i}": i % 2 for i in range(30)}
    assert sum(e.context is None for e in inside) == 1
    assert load_task(frame.convert_dtypes()) == task


def test_all_rows_may_be_tested_on(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "held.jsonl", rows(40))
    task = load_files(file, test_fraction=1.0)
    assert (len(task.train), len(task.validation), len(task.test)) == (0, 0, 40)
    assert task.notes == ("all rows are for testing",)
    task = load_files(file, test_fraction=0.5, validation=0.25)
    assert task.notes == (
        "no test data: about 50% of the rows are kept for testing, whatever the seed",
        "validation: about 25% of the training rows, for temperatures, priors and early choices",
    )
    assert len(load_files(file, validation=0.0).notes) == 1
    for fraction in (-0.1, 1.1, float("nan")):
        with pytest.raises(
            ValueError, match=r"test_fraction: expected a fraction in \[0, 1\], got"
        ):
            load_files(file, test_fraction=fraction)


def test_data_sets_that_the_library_saved(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    import pyarrow

    label = datasets.ClassLabel(names=["bad", "good"])
    features = datasets.Features({"text": datasets.Value("string"), "label": label})

    def part(first: int, last: int) -> Any:
        texts = [f"{text} {i}" for i, (text, _) in enumerate(WORDS)]
        numbers = [int(name == "good") for _, name in WORDS]
        columns = {"text": texts[first:last], "label": numbers[first:last]}
        table = pyarrow.table(columns).cast(features.arrow_schema)
        info = datasets.DatasetInfo(features=features)
        return datasets.Dataset(table, info=info, fingerprint=f"rows{first}to{last}")

    both = datasets.DatasetDict({"train": part(0, 20), "test": part(20, 30)})
    for name, saved in (("one", part(0, 30)), ("two", both)):
        saved.save_to_disk(tmp_path / name)
        task = load_task(tmp_path / name)
        assert (task.name, task.label_names) == (name, ("bad", "good"))
        assert len(task.train) + len(task.validation) + len(task.test) == 30
        inside = {example.question: example.label for example in task.train}
        assert (
            inside.items()
            <= {f"{t} {i}": int(n == "good") for i, (t, n) in enumerate(WORDS)}.items()
        )
    assert len(task.test) == 10
