"""The command that writes text, and what it shows of its tokens."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import transformers
from hf.letters import letters
from test_html import check_self_contained

from bayes_kernels.cli.generate import _console, _Live, read_prompts
from bayes_kernels.hf import ScoredText, generate, load_writer
from bayes_kernels.hf.highlight import terminal_text
from bayes_kernels.hf.texts import Token
from cli.commands import SETTINGS, call, objects, refuse

pytestmark = pytest.mark.cpu_only


WORDS = ["--n-samples", "3", "--max-new-tokens", "5", "--prompt", "be", "--prompt", "no way"]


def test_numbers_are_those_of_the_library(writer: Path) -> None:
    result = call("generate", writer, *WORDS, "--json", "--seed", 4)
    assert result.exit_code == 0, result.output
    base = transformers.AutoModelForCausalLM.from_pretrained(writer.parent / "base")
    model = peft.PeftModel.from_pretrained(base, writer)
    expected = generate(model, letters(), ["be", "no way"], n_samples=3, max_new_tokens=5, seed=4)
    for got, text in zip(objects(result.stdout), expected, strict=True):
        assert got["prompt"] == text.prompt and got["token_ids"] == text.token_ids
        assert "".join(got["tokens"]) == got["text"] == text.text
        assert got["token_entropy"] == pytest.approx(text.entropy, abs=1e-5)
        assert got["token_mutual_information"] == pytest.approx(text.mutual_information, abs=1e-5)
        assert got["max_mutual_information"] == pytest.approx(text.max_mutual_information, abs=1e-5)


def test_options_reach_the_library(writer: Path) -> None:
    def run(*options: object) -> list[dict[str, Any]]:
        result = call("generate", writer, *WORDS, "--json", *options)
        assert result.exit_code == 0, result.output
        return objects(result.stdout)

    plain = run()
    assert run("--seed", 1) != plain and run("--draws", "independent") != plain
    assert {text["token_mutual_information"] for text in run("--n-samples", 0)} == {None}
    assert run("--beams", 3)[0]["log_prob"] >= plain[0]["log_prob"] - 1e-6
    drawn = run("--sample", "--temperature", 3, "--top-k", 0, "--top-p", 1)
    assert drawn != plain and run("--sample", "--top-k", 1)[0]["token_ids"] == plain[0]["token_ids"]
    letter = plain[0]["text"].strip()[1]
    stopped = run("--stop", letter)[0]
    assert stopped["stopped"] and stopped["text"].endswith(letter)
    assert all(text["abstained"] for text in run("--abstain-above", 0))
    assert run("--chat")[0]["prompt"] == "user: be."


def test_prompts_of_files(writer: Path, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("be\n\nno way\n")
    rows = [{"prompt": "be"}, {"messages": [{"role": "user", "content": "no"}]}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name, prompts in (("p.txt", ["be", "no way"]), ("p.jsonl", ["be", "user: no."])):
        result = call("generate", writer, "--file", tmp_path / name, "--json", *WORDS[:4])
        assert result.exit_code == 0, result.output
        assert [text["prompt"] for text in objects(result.stdout)] == prompts
    # JSON may have the separators of Unicode as they are; they end no line.
    (tmp_path / "u.jsonl").write_bytes('{"prompt": "be\u2028no"}\r\n{"prompt": "no"}'.encode())
    assert read_prompts(tmp_path / "u.jsonl") == ["be\u2028no", "no"]
    (tmp_path / "u.txt").write_bytes("\ufeffbe\x85no\rway\r\n".encode())
    assert read_prompts(tmp_path / "u.txt") == ["be\x85no", "way"]
    (tmp_path / "bad.jsonl").write_text('{"prompt": 3}\nx\n{"messages": []}\n')
    error = refuse("generate", writer, "--file", tmp_path / "bad.jsonl")
    assert re.search(r"bad.jsonl:1: expected an object with 'prompt'", error)
    (tmp_path / "half.jsonl").write_text('{"prompt": "be"}\n{"prompt": "\\ud800"}\n')
    error = refuse("generate", writer, "--file", tmp_path / "half.jsonl")
    assert re.search(r"half.jsonl:2: expected Unicode text, got a lone surrogate in", error)
    (tmp_path / "empty.txt").write_text("\n")
    assert "at least one prompt" in refuse("generate", writer, "--file", tmp_path / "empty.txt")
    (tmp_path / "latin.txt").write_bytes(b"\xe9")
    assert "UTF-8" in refuse("generate", writer, "--file", tmp_path / "latin.txt")
    assert "that exists" in refuse("generate", writer, "--file", tmp_path / "none.txt")


def test_terminal(writer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = call("generate", writer, *WORDS)
    assert plain.exit_code == 0, plain.output
    texts = objects(call("generate", writer, *WORDS, "--json").stdout)
    for text in texts:
        assert text["prompt"] + text["text"] in plain.stdout
        assert f"max mutual information {text['max_mutual_information']:.3f}" in plain.stdout
    assert "mutual information, nats:" in plain.stdout and "\x1b" not in plain.stdout
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLORTERM", "truecolor")
    monkeypatch.setenv("TERM", "xterm-256color")
    colored = call("generate", writer, *WORDS)
    assert "\x1b[30;48;2;" in colored.stdout
    by_entropy = call("generate", writer, *WORDS, "--color-by", "entropy", "--abstain-above", "0")
    assert "entropy, nats:" in by_entropy.stdout and "abstained: max_mutual" in by_entropy.stdout


def test_streamed(writer: Path) -> None:
    """The same texts, one after the other, then their scores."""
    whole = call("generate", writer, *WORDS, "--json", "--sample", "--seed", 3)
    streamed = call("generate", writer, *WORDS, "--stream", "--sample", "--seed", 3)
    assert streamed.exit_code == 0, streamed.output
    lines = streamed.stdout.splitlines()
    texts = objects(whole.stdout)
    assert [line.rstrip() for line in lines[:2]] == [text["text"].rstrip() for text in texts]
    for line, text in zip(lines[2:4], texts, strict=True):
        assert f"max mutual information {text['max_mutual_information']:.3f}" in line
    assert lines[4].startswith("mutual information, nats:") and len(lines) == 5
    for words, got in ((["--json"], "--json"), (["--beams", "2"], "--beams 2")):
        error = refuse("generate", writer, *WORDS, "--stream", *words)
        assert error == f"--stream: expected it without --json and --beams, got {got}"


def test_a_stream_shows_what_the_whole_text_does(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Tokens without text too, at the beginning, in between and at the end; a text without any is a line."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLORTERM", "truecolor")
    monkeypatch.setenv("TERM", "xterm-256color")
    texts = [["", "a", "", "", "🙂", "b", ""], ["c", "d"], [""], ["e", "", ""]]
    doubts = [[0.4, 0.0, 0.05, 2.0, 0.0, 0.0, 0.2], [0.0, 2.0], [2.0], [0.0, 0.02, 0.2]]
    live, console = _Live("mutual_information"), _console()
    for number, (pieces, values) in enumerate(zip(texts, doubts, strict=True)):
        for piece, value in zip(pieces, values, strict=True):
            live.add(Token(number, 5, piece, -1.0, value + 1.0, 1.0))
    live.end()
    streamed = capsys.readouterr().out
    for pieces, values in zip(texts, doubts, strict=True):
        many = [1.0] * len(pieces)
        entropy = [value + 1.0 for value in values]
        whole = ScoredText("".join(pieces), [5] * len(pieces), pieces, many, entropy, many, None, 2)
        console.print(terminal_text(whole))
    assert streamed == capsys.readouterr().out
    assert streamed.count("190;50;20") == 2 and streamed.count("245;138;66") == 1


def test_page(writer: Path, tmp_path: Path) -> None:
    page = tmp_path / "new" / "page.html"
    result = call("generate", writer, *WORDS, "--html", page, "--json")
    assert result.exit_code == 0, result.output
    parsed = check_self_contained(page.read_text(encoding="utf-8"))
    shown = "".join(parsed.text)
    for text in objects(result.stdout):
        assert text["prompt"] + text["text"] in shown
        for value in text["token_mutual_information"]:
            assert f"mutual information {value:.3g} nats" in page.read_text(encoding="utf-8")
    before = page.read_bytes()
    assert "use --overwrite" in refuse("generate", writer, *WORDS, "--html", page)
    assert page.read_bytes() == before
    result = call("generate", writer, *WORDS, "--html", page, "--overwrite", "--n-samples", "0")
    assert result.exit_code == 0, result.output
    assert (
        "mutual information"
        not in page.read_text(encoding="utf-8").split("</style>")[1].split("<table")[0]
    )
    assert "expected a file, got the folder" in refuse(
        "generate", writer, *WORDS, "--html", tmp_path
    )
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("be\n")
    words = ["--file", prompts, "--html", prompts, "--overwrite"]
    assert "apart from file" in refuse("generate", writer, *words)


def test_adapters_of_commands(writer: Path, data: Path, tmp_path: Path) -> None:
    """An adapter that was trained on answers writes text with the whole head of its base."""
    train = ["train", data / "train.jsonl", "--test", data / "test.jsonl"]
    train += ["--model", writer.parent / "base", "--style", "plain", *SETTINGS[:6]]
    result = call(*train, "--n-samples", 3, "--out", tmp_path / "run" / "blob")
    assert result.exit_code == 0, result.output
    result = call("generate", tmp_path / "run", "--json", "--max-new-tokens", 2, "--prompt", "be")
    assert result.exit_code == 0, result.output
    assert objects(result.stdout)[0]["n_samples"] == 3  # as it was trained
    result = call(*train, "--method", "mle", "--out", tmp_path / "run" / "mle")
    assert result.exit_code == 0, result.output
    error = refuse("generate", tmp_path / "run", "--prompt", "be")
    assert "name one of" in error and str(tmp_path / "run" / "mle") in error
    result = call("generate", tmp_path / "run/mle", "--json", "--prompt", "be", *WORDS[2:4])
    assert objects(result.stdout)[0]["n_samples"] == 0
    error = refuse("generate", tmp_path / "run/mle", "--prompt", "be", "--draws", "shared")
    assert "draws: expected a method with draws of weights" in error
    result = call("bayesianize", tmp_path / "run/mle", "--method", "laplace")
    assert result.exit_code == 0, result.output
    laplace = ["generate", tmp_path / "run/mle-laplace", "--json", "--prompt", "be", *WORDS[:4]]
    result = call(*laplace)
    assert result.exit_code == 0, result.output
    assert objects(result.stdout)[0]["max_mutual_information"] > 0
    assert load_writer(tmp_path / "run/mle-laplace").n_samples == 10  # an adapter each, not 1000
    vbll = tmp_path / "vbll"
    result = call(*train, "--method", "polar-vbll", "--n-samples", 3, "--out", vbll)
    assert result.exit_code == 0, result.output
    assert "a causal model with a trimmed head" in refuse("generate", vbll, "--prompt", "be")


@pytest.mark.parametrize(
    ("method", "setting"),
    [
        ("mle", 'lora.modules_to_save=["lm_head"]'),
        ("blob", 'target_modules=["q_proj","lm_head"]'),
    ],
)
def test_a_head_that_was_trained_for_answers_writes_no_text(
    writer: Path, data: Path, tmp_path: Path, method: str, setting: str
) -> None:
    train = [
        "train",
        data / "train.jsonl",
        "--test",
        data / "test.jsonl",
        "--out",
        tmp_path / "run",
    ]
    train += ["--model", writer.parent / "base", "--style", "plain", *SETTINGS[:6]]
    result = call(*train, "--method", method, "--set", setting)
    assert result.exit_code == 0, result.output
    for words in (["generate", "--prompt", "be"], ["export", "--out", tmp_path / "draws"]):
        error = refuse(words[0], tmp_path / "run", *words[1:])
        assert "got one that was trained for 2 answers: it writes no text; use predict" in error
        assert "size mismatch" not in error


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ([], "expected --prompt or --file"),
        (["--prompt", "be", "--temperature", "2"], "expected --sample with --temperature"),
        (["--prompt", "be", "--sample", "--top-p", "0"], "--top-p: expected a number above 0"),
        (["--prompt", "be", "--sample", "--temperature", "nan"], "--temperature: expected"),
        (["--prompt", "be", "--color-by", "doubt"], "--color-by: expected mutual_information or"),
        (["--prompt", "be", "--draws", "pairs"], "got 'pairs'"),
        (
            ["--prompt", "be", "--color-by", "mutual_information", "--n-samples", "1"],
            "--color-by: expected entropy with 1 draws",
        ),
        (["--prompt", "be", "--beams", "0"], "expected an integer >= 1"),
        (["--prompt", "be", "--sample", "--beams", "2"], "do_sample must be False"),
        (
            ["--prompt", "\udcff"],
            "--prompt: expected Unicode text, got a lone surrogate in '\\udcff'",
        ),
        (["--prompt", "be", "--stop", "\ud800"], "--stop: expected Unicode text, got a lone"),
        (["--prompt", "be", "--model", "minilm"], "expected a causal language model"),
    ],
)
def test_what_is_refused(writer: Path, words: list[str], error: str) -> None:
    assert error in refuse("generate", writer, *words)


def test_adapters_of_encoders_write_no_text(trained: Path) -> None:
    assert "expected a causal language model" in refuse("generate", trained, "--prompt", "a")
