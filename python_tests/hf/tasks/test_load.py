"""Saved adapters of every method, loaded in one line and asked in the next."""

from __future__ import annotations

import dataclasses
import itertools
import json
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from experiment.tiny_runs import TRAINED

from bayes_kernels.experiment import run as ex
from bayes_kernels.experiment.recipe import METHODS, Experiment, Recipe, Source
from bayes_kernels.hf import load
from bayes_kernels.task import Example

# Where a run takes place depends on the machine; what it finds is compared with the CPU.
pytestmark = pytest.mark.cpu_only

FAST = Recipe(steps=2, lr=5e-3, rank=2, n_samples=None)
FEW = {"tfb": {"anchors": 8, "max_trials": 2}}


def trained(method: str, model: Path, data: Path, folder: Path) -> ex.Run:
    recipe = dataclasses.replace(FAST, options=FEW.get(method, {}))
    source = Source(data=str(data), test_size=6)
    one = Experiment(source, str(model), method=method, recipe=recipe, seed=3)
    return ex.run(one, source.load(3), folder=folder, checkpoints=False, progress=False)


def test_answers_come_as_they_are_made(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    trained("blob", tiny_model, tiny_data, tmp_path / "run")
    asked, read = load(tmp_path / "run"), []

    def endless() -> Iterator[Example]:
        for number in itertools.count():
            read.append(number)
            yield Example(f"text-{number}", "bright " * (1 + number % 5) + "day", None)

    stream = asked.stream_examples(endless(), window=2, batch_size=3, n_samples=4)
    first = next(stream)
    assert len(first) == 6 and read == [*range(6)]
    assert len(next(stream)) == 6 and read == [*range(12)]
    whole = asked.predict_examples([*itertools.islice(endless(), 6)], n_samples=4)
    torch.testing.assert_close(first.probs, whole.probs, rtol=0, atol=1e-6)
    bad = [Example("a", "day", None), Example("b", " ", None)]
    with pytest.raises(ValueError, match="b: expected text"):
        next(asked.stream_examples(bad, window=1, batch_size=1))


@pytest.mark.parametrize("method", TRAINED)
def test_a_folder_answers_as_its_run_did(
    method: str, tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    run = trained(method, tiny_model, tiny_data, tmp_path / "run")
    texts = [example.question for example in run.experiment.source.load(3).test]
    asked = load(tmp_path / "run")
    found = asked.predict(texts)
    expected = [row for row in run.rows if row.temperature is None][-1]
    torch.testing.assert_close(found.probs, expected.log_probs.exp(), rtol=0, atol=1e-5)
    assert found.n_samples == asked.n_samples == expected.n_samples
    assert asked.classes == found.classes == ("0", "1")
    assert found.labels == tuple(asked.classes[i] for i in found.probs.argmax(-1))
    torch.testing.assert_close(
        found.entropy, -(found.probs * found.probs.log()).sum(-1), rtol=0, atol=1e-6
    )
    # One set of weights has no mutual information, and every posterior has some.
    if asked.n_samples:
        assert found.mutual_information is not None
        assert bool((found.mutual_information <= found.entropy).all())
    else:
        assert found.mutual_information is None
    assert asked.n_samples == (METHODS[method].n_samples if METHODS[method].bayesian else 0)


def test_answers_read_as_a_table(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    trained("blob", tiny_model, tiny_data, tmp_path)
    asked = load(tmp_path)
    answers = asked.predict(["a bright <b> day", "sour"], n_samples=4)
    assert len(answers) == 2 and answers.n_samples == 4
    first = answers[0]
    assert first.text == "a bright <b> day" and first.label in ("0", "1")
    assert first.probs[first.label] == first.probability == max(first.probs.values())
    assert [one.text for one in answers[:1]] == [one.text for one in list(answers)[:1]]
    lines = repr(answers).splitlines()
    assert lines[0].split() == ["label", "text", "prob", "entropy", "MI"] and len(lines) == 3
    assert f"{first.entropy:.3f}" in lines[1] and "a bright <b> day" in lines[1]
    page = answers._repr_html_()
    assert "&lt;b&gt;" in page and "<b>" not in page
    some = asked.predict(["a bright <b> day", "sour"], n_samples=40, stop=0.4, min_samples=2)
    assert some.draws_used is not None and 2 <= int(some.draws_used.min()) < 40
    assert some[1].draws_used == some.draws_used[1] and first.draws_used is None
    assert repr(some).splitlines()[0].split()[-1] == "draws"
    assert repr(some).splitlines()[2].split()[-1] == str(some[1].draws_used)
    with pytest.raises(ValueError, match="fewer than two draws to end"):
        asked.predict("sour", n_samples=0, stop=0.1)
    mean = asked.predict("sour", n_samples=0)
    assert mean.mutual_information is None and mean[0].mutual_information is None
    assert "–" in repr(mean)
    again, other = (asked.predict("sour", seed=seed) for seed in (3, 4))
    assert torch.equal(again.probs, asked.predict("sour").probs)
    assert not torch.equal(again.probs, other.probs)


def test_choices_are_asked_with_their_question(tiny_model: Path, tmp_path: Path) -> None:
    words = [["bright", "dull"], ["sour", "warm", "kind"]]
    rows = [
        {"id": str(i), "question": "the day was", "choices": words[i % 2], "label": i % 2}
        for i in range(20)
    ]
    file = tmp_path / "train.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    trained("blob", tiny_model, file, tmp_path / "run")
    asked = load(tmp_path / "run")
    found = asked.predict(["the day was", "a road is"], choices=words)
    assert found.classes == ("A", "B", "C") and float(found.probs[0, 2]) < 1e-6
    letters = "ABC"
    for one, choices in zip(found, words, strict=True):
        letter, _, text = one.label.partition(") ")
        assert text == choices[letters.index(letter)]
    with pytest.raises(ValueError, match=r"text-1: expected 2 to 3 choices, .* got 0"):
        asked.predict("the day was")
    with pytest.raises(ValueError, match="choices must be one for each of 1 texts, got 2"):
        asked.predict("the day was", choices=words)
    alone = asked.predict("the day was", choices=words[0], context="a road")
    listed = asked.predict(["the day was"], choices=words[:1], context=["a road"])
    assert torch.equal(alone.probs, listed.probs)
    two = ["the day was", "a road is"]
    for wrong in ({"choices": ["ab", "cd"]}, {"choices": words, "context": "ab"}):
        with pytest.raises(ValueError, match="must be one for each of 2 texts, got those of one"):
            asked.predict(two, **wrong)


def damage(folder: Path, **changes: Any) -> None:
    file = folder / "experiment.json"
    record = json.loads(file.read_text())
    record["experiment"].update(changes)
    file.write_text(json.dumps(record))


def test_other_folders_are_one_clear_line(
    tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    trained("map", tiny_model, tiny_data, tmp_path / "out" / "map")
    asked = load(tmp_path / "out" / "map")
    with pytest.raises(ValueError, match="expected text, got ' '"):
        asked.predict(["fine", " "])
    with pytest.raises(ValueError, match="n_samples must be 0"):
        asked.predict("fine", n_samples=3)
    with pytest.raises(ValueError, match="at least one"):
        asked.predict([])
    for texts, kind in (({"text": "fine"}, "dict"), (None, "NoneType"), (b"fine", "bytes")):
        with pytest.raises(ValueError, match=f"a text or a list of texts, got {kind}"):
            asked.predict(texts)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="choices must be None, as the task has the classes"):
        asked.predict("fine", choices=["good", "bad"])
    for size in (0, -1):
        with pytest.raises(ValueError, match="batch_size must be an integer of at least 1"):
            asked.predict("fine", batch_size=size)
    with pytest.raises(ValueError, match=r"found none; name one of .*out/map"):
        load(tmp_path / "out")
    with pytest.raises(ValueError, match="expected a folder that exists, found none"):
        load(tmp_path / "nothing")
    with pytest.raises(ValueError, match="device: expected 'auto', 'cpu' or 'cuda', got 'tpu'"):
        load(tmp_path / "out" / "map", device="tpu")
    other = shutil.copytree(tmp_path / "out" / "map", tmp_path / "other")
    for changes in ({"method": "magic"}, {"recipe": {}}, {"seed": None, "recipe": None}):
        damage(other, **changes)
        with pytest.raises(ValueError, match=r"experiment\.json: expected what `train` wrote"):
            load(other)
    (other / "experiment.json").unlink()
    with pytest.raises(
        ValueError, match=r"names the classes and the prompt, found none: .*use PeftM"
    ):
        load(other)


@pytest.mark.parametrize("method", ["blob", "polar-vbll", "laplace-last"])
def test_a_loaded_adapter_goes_to_other_processes(
    method: str, tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    trained(method, tiny_model, tiny_data, tmp_path / "out" / method)
    asked = load(tmp_path / "out" / method)
    copied = pickle.loads(pickle.dumps(asked))
    assert copied.method is asked.method and type(copied.model) is type(asked.model)
    texts = ["a warm day", "harsh and dull"]
    assert torch.equal(copied.predict(texts).probs, asked.predict(texts).probs)
