"""Documentation of the standard library as a task: sizes, areas, splits, texts."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from bayes_kernels.experiment.data import docstrings, files
from bayes_kernels.experiment.data.docstrings import stdlib_docs
from bayes_kernels.task import Task

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


def test_sources_that_nobody_can_read(tmp_path: Path) -> None:
    deep = tmp_path / "deep.py"
    deep.write_text("x = " + "-" * 200_000 + "1\n")
    assert list(docstrings._documented_sources(deep)) == []
    assert list(docstrings._documented_calls(deep)) == []
    half = tmp_path / "half.py"
    half.write_text('def f():\n    "Return four words \\ud800 of text."\n')
    ((name, doc),) = docstrings._documented_sources(half)
    assert name == "half.f" and not files.is_unicode(doc)
    assert docstrings.first_paragraph(doc) == "Return four words  of text."
