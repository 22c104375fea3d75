"""Answers in words: what is learnt, which are right, and what scores of them find."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import transformers
from cli.commands import call, fail_to_draw, refuse
from tiny_models import llama
from tiny_task import BAD, GOOD, OTHER, write_rows

from bayes_kernels.experiment import answers as study
from bayes_kernels.hf.texts import Generation
from bayes_kernels.task import Example, Task

pytestmark = pytest.mark.cpu_only
SMALL = "--steps 30 --lr 0.02 --n-samples 4 --test-size 12 --ood-size 6 --max-length 16 --threads 1"


@pytest.fixture(scope="module")
def model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose tokens are words, those of the two classes among them."""
    folder = tmp_path_factory.mktemp("answers") / "words"
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.add_tokens(["Answer", ":", "fine", "bad", "mood"])
    tokenizer.eos_token = "[SEP]"
    tokenizer.save_pretrained(folder)
    assert len(tokenizer) <= 64
    llama(initializer_range=0.2).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def out(model: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("study")
    (home / "elsewhere.txt").write_text("stone stone stone\n\nzzz zzz\nroad\n")
    words = ["answers", "--data", tiny_data, "--model", model, "--ood", tiny_data / "ood.jsonl"]
    words += ["--label-names", "bad mood,fine", "--prompts", home / "elsewhere.txt"]
    result = call(*words, *settings(), "--out", home / "out")
    assert result.exit_code == 0, result.output
    assert "% right, trained in" in result.stderr
    return home / "out"


def settings() -> list[str]:
    """`SMALL` in the options of the command."""
    words = SMALL.split()
    place = words.index("--lr")
    words[place : place + 2] = ["--set", f"lr={words[place + 1]}"]
    return words


def encoder_of(model: Path, task: Task) -> study.AnswerEncoder:
    return study.answer_encoder(transformers.AutoTokenizer.from_pretrained(model), task, 16)


def task(names: tuple[str, ...] = ("bad mood", "fine")) -> Task:
    rows = [Example(str(i), f"a {word} day", i % 2) for i, word in enumerate((*BAD[:2], *GOOD[:2]))]
    return Task("tiny", "classification", names, rows, [], rows)


def test_only_the_answer_is_learnt(model: Path) -> None:
    encoder = encoder_of(model, task())
    long, short = (encoder(example) for example in encoder.task.train[:2])
    tokens = encoder.tokenizer.convert_ids_to_tokens(long["input_ids"])
    assert tokens[1:] == [*f"a {BAD[0]} day Answer : bad mood".split(), "[SEP]"]
    learnt = [t for t, label in zip(tokens, long["labels"], strict=True) if label != -100]
    assert learnt == ["bad", "mood", "[SEP]"] and len(short["labels"]) == len(long["labels"]) - 1
    batch = encoder.collate([long, short])
    assert batch["labels"][1].tolist() == [-100, *short["labels"]]
    assert batch["attention_mask"][1].tolist() == [0] + [1] * len(short["labels"])
    assert (
        batch["input_ids"][batch["labels"] != -100] == batch["labels"][batch["labels"] != -100]
    ).all()
    unlabelled = encoder(Example("x", "stone", None))
    assert "labels" not in unlabelled and "labels" not in encoder.collate([unlabelled, long])
    assert encoder.text(encoder.task.train[0]).endswith("Answer :")


def test_answers_of_one_beginning_are_refused_for_conversions(model: Path) -> None:
    encoder = encoder_of(model, task(("bad mood", "bad day")))
    with pytest.raises(ValueError, match="'bad mood' and 'bad day': expected different first"):
        study.first_tokens(encoder)
    assert len(set(study.first_tokens(encoder_of(model, task())))) == 2


def text(entropy: float, information: float | None = None) -> Generation:
    copies = 0 if information is None else 4
    return Generation(
        text="fine",
        token_ids=[1],
        tokens=["fine"],
        log_probs=[-entropy],
        entropy=[entropy],
        expected_entropy=[entropy - (information or 0.0)],
        entropy_bias=None,
        n_samples=copies,
        prompt="",
        stopped=True,
        abstain_on="max_entropy",
        abstain_above=None,
    )


def test_scores_are_asked_for_wrong_answers_and_foreign_prompts() -> None:
    test = [text(0.1, 0.05), text(0.2, 0.01), text(0.3, 0.2), text(0.4, 0.1)]
    right = torch.tensor([True, False, True, False])
    one = study.Answers("blob", 4, right, {"test": test, "far": [text(0.9, 0.3), text(0.05, 0.0)]})
    # Pairs of a wrong and a right answer: .2 > .1, .4 > .1, .4 > .3.
    assert one.found("max_entropy") is not None and one.found("max_entropy").value == 0.75  # type: ignore[union-attr]
    assert one.found("max_mutual_information").value == 0.25  # type: ignore[union-attr]
    assert one.detected("max_entropy", "far").value == 0.5
    assert one.curve("max_entropy").risk.tolist() == [0.0, 0.5, pytest.approx(1 / 3), 0.5]
    plain = study.Answers("map", 0, right, {"test": [text(0.1), text(0.2), text(0.3), text(0.4)]})
    assert plain.measures == ["max_entropy", "mean_entropy", "perplexity"]
    sure = study.Answers("map", 0, torch.ones(4, dtype=torch.bool), plain.texts)
    assert sure.found("max_entropy") is None and sure.accuracy == 1.0
    assert study.answers_table([sure]).rows[0][3] == ""
    report = study.answers_report([one, sure])
    json.dumps(report, allow_nan=False)
    assert report[0]["scores"]["max_entropy"]["wrong_auroc"]["value"] == 0.75
    assert [row["right"] for row in report[0]["texts"]["test"]] == right.tolist()


def test_command_asks_all_methods(out: Path, tiny_data: Path) -> None:
    rows = map(json.loads, (tiny_data / "test.jsonl").read_text().splitlines())
    answers = {f"{row['question']} Answer :": ("bad mood", "fine")[row["label"]] for row in rows}
    found = json.loads((out / "answers.json").read_text())["answers"]
    assert [row["method"] for row in found] == ["map", "blob", "tfb", "laplace"]
    assert [row["n_samples"] for row in found] == [0, 4, 4, 4]
    assert [row["training_seconds"] is None for row in found] == [False, False, True, True]
    plain, _, tfb, laplace = found
    for row in found:
        assert {name: len(texts) for name, texts in row["texts"].items()} == {
            "test": 12,
            "ood": 6,
            "elsewhere": 3,
        }
        given = [text["right"] for text in row["texts"]["test"]]
        assert given == [t["text"].strip() == answers[t["prompt"]] for t in row["texts"]["test"]]
        assert row["accuracy"] == sum(given) / 12
    # Widths are chosen on validation rows, as by other commands, and the curvature is of all training rows.
    assert "of 6 validation examples" in tfb["conversion"]
    assert "69 examples; prior precision" in laplace["conversion"]
    draws = [text["max_mutual_information"] for text in tfb["texts"]["test"]]
    assert max(draws) > 0 and plain["texts"]["test"][0]["max_mutual_information"] is None
    table = (out / "answers.md").read_text()
    assert table.count("mutual information, largest") == 3 and "elsewhere: AUROC" in table
    assert (out / "risk_coverage.png").is_file() and (out / "outside.png").is_file()


def test_results_stay_where_a_picture_fails(
    model: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["answers", "--data", tiny_data, "--model", model, "--methods", "blob", *settings()]
    words[words.index("30")] = "1"
    words += ["--label-names", "bad mood,fine", "--out", tmp_path / "out"]
    with monkeypatch.context() as patch:
        patch.setattr("bayes_kernels.plots.save", fail_to_draw)
        result = call(*words)
    assert result.exit_code == 2 and "error: no picture today" in result.stderr
    assert "out are kept; what failed comes after them" in result.stderr
    assert "LoRA (MAP)" in result.stdout
    assert {"answers.md", "answers.json"} <= {path.name for path in (tmp_path / "out").iterdir()}
    assert "use --overwrite" in refuse(*words)


def test_draws_that_do_harm_are_said_and_mended(model: Path, tmp_path: Path) -> None:
    """Noise that anchors allow in any amount, of an adapter that is right on validation examples."""
    texts = [(f"{word} {other}", int(word in GOOD)) for word in GOOD + BAD for other in OTHER]
    rows = [{"id": str(i), "question": q, "label": label} for i, (q, label) in enumerate(texts)]
    (tmp_path / "data").mkdir()
    write_rows(tmp_path / "data" / "test.jsonl", rows[::5])
    write_rows(tmp_path / "data" / "train.jsonl", [row for row in rows if row not in rows[::5]])
    words = ["answers", "--data", tmp_path / "data", "--model", model, "--methods", "tfb"]
    words += ["--label-names", "bad mood,fine", *settings(), "--set", "tfb.anchors=8"]
    words[words.index("30")] = "100"
    words += ["--set", "tfb.tolerance=1.0", "--set", "tfb.low=0.5", "--set", "tfb.high=1"]
    # Fitted, as asked for: the validation examples are too few for it to be done unasked.
    result = call(*words, "--set", "scale=fit", "--out", tmp_path / "fit")
    assert result.exit_code == 0, result.output
    assert re.search(r"TFB, seed 0: 4 draws raise the NLL of \d+ examples from", result.stderr)
    plain, tfb = json.loads((tmp_path / "fit" / "answers.json").read_text())["answers"]
    assert plain["scale"] is None and tfb["scale"]["factor"] < 0.5
    result = call(*words, "--set", "scale=keep", "--out", tmp_path / "keep")
    assert result.exit_code == 0 and "draws raise the NLL" not in result.stderr
    kept = json.loads((tmp_path / "keep" / "answers.json").read_text())["answers"][1]
    assert kept["scale"] is None and kept["accuracy"] < tfb["accuracy"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--methods ensemble", "methods: expected some of "),
        ("--methods mle", "methods: expected some of "),
        ("--methods blob,blob", "methods: expected each method once, got 'blob,blob'"),
        ("--prompts nothing.txt", "expected a file that exists, found none"),
        ("--set speed=3", "speed"),
        ("--set tfb.search=bisect", "search must be one of"),
        ("--set laplace.prior=wide", "prior must be one of"),
        ("--set blob.kl_lr=0.1", "kl_lr: expected kl_schedule"),
        ("--model minilm --methods blob --dtype float8", "dtype: expected one of"),
        ("--device tpu", "device: expected 'auto', 'cpu' or 'cuda', got 'tpu'"),
        ("--seed -1", "--seed: expected an integer from 0"),
        ("--test-size 0", "--test-size: expected an integer >= 1"),
    ],
)
def test_bad_options_are_one_line(words: str, message: str, model: Path, tmp_path: Path) -> None:
    given = ["answers", "--model", model, "--out", tmp_path / "out", *words.split()]
    assert message in refuse(*given)
    assert not (tmp_path / "out").exists()


def test_conversations_and_names_of_sets_are_refused(
    model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    row = {"messages": [{"role": "user", "content": "no"}]}
    (tmp_path / "talk.jsonl").write_text(json.dumps(row) + "\n")
    words = ["answers", "--data", tiny_data, "--model", model, "--out", tmp_path / "out"]
    assert "expected texts, got a conversation" in refuse(
        *words, "--prompts", tmp_path / "talk.jsonl"
    )
    (tmp_path / "test.txt").write_text("road\n")
    result = call(*words, "--prompts", tmp_path / "test.txt")
    assert result.exit_code == 2
    assert re.search("expected a file of another name than test", result.stderr)


def test_words_of_the_model_are_enough() -> None:
    assert len({*GOOD, *BAD, *OTHER}) + 9 <= 64
