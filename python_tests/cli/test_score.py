"""The command that scores given texts."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import peft
import pytest
import transformers
from hf.letters import letters
from test_html import check_self_contained
from tiny_models import gpt2

from bayes_kernels import progress
from bayes_kernels.hf import BlobConfig, score_answers, score_texts, tokens
from cli.commands import call, objects, refuse

pytestmark = pytest.mark.cpu_only

OPTIONS = {"n_samples": 4, "seed": 2}
WORDS = ["--n-samples", "4", "--seed", "2"]


def run(*words: object) -> Any:
    result = call("score", *words)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(scope="module")
def model(writer: Path) -> Any:
    base = transformers.AutoModelForCausalLM.from_pretrained(writer.parent / "base")
    return peft.PeftModel.from_pretrained(base, writer).eval()


def test_numbers_are_those_of_the_library(writer: Path, model: Any, tmp_path: Path) -> None:
    rows = [{"text": " way", "prompt": "no"}, {"text": "bed"}]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    got = objects(run(writer, "--text", "be", "--file", tmp_path / "t.jsonl", *WORDS, "--json"))
    cases = [("be", None), (" way", "no"), ("bed", None)]
    for line, (text, prompt) in zip(got, cases, strict=True):
        (expected,) = score_texts(model, letters(), text, prompts=prompt, **OPTIONS)
        assert line["prompt"] == prompt and line["token_ids"] == expected.token_ids
        assert line["token_log_prob"] == pytest.approx(expected.log_probs, abs=1e-5)
        doubts = line["token_mutual_information"]
        assert doubts == pytest.approx(expected.mutual_information, abs=1e-5) and max(doubts) > 1e-3
        assert line["perplexity"] == pytest.approx(expected.perplexity, rel=1e-5)
    again = objects(run(writer, "--text", " way", "--prompt", "no", *WORDS, "--json"))
    assert again == [got[1]]
    assert objects(run(writer, "--text", "be", "--json", "--n-samples", 0))[0]["n_samples"] == 0


def test_answers(writer: Path, model: Any) -> None:
    words = ["--text", "no", "--text", "be", "--answer", " way", "--answer", " bed", *WORDS]
    expected = score_answers(model, letters(), ["no", "be"], [" way", " bed"], **OPTIONS)
    for i, line in enumerate(objects(run(writer, *words, "--json"))):
        assert list(line["probabilities"]) == [" way", " bed"]
        assert list(line["probabilities"].values()) == pytest.approx(
            expected.probs[i].tolist(), abs=1e-5
        )
        assert line["mutual_information"] == pytest.approx(
            float(expected.mutual_information[i]), abs=1e-5
        )
        assert line["answer"] == [" way", " bed"][int(expected.classes[i])]
    shown = run(writer, *words).splitlines()
    assert shown[0] == "no" and f"' way' {expected.probs[0, 0]:.3f}" in shown[1]
    single = objects(run(writer, *words[:-4], "--json", "--n-samples", 0))
    assert {line["mutual_information"] for line in single} == {None}


def test_a_bar_for_all_texts(writer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bars: list[Any] = []

    def noted(enabled: bool, items: Any = None, **options: Any) -> Any:
        bars.append((enabled, options["desc"], len(items)))
        return progress.tqdm(items, disable=True)

    for module in (progress, tokens):
        monkeypatch.setattr(module, "progress_bar", noted)
    texts = ["--text", "be", "--text", "no", "--json", "--n-samples", 0]
    assert len(objects(run(writer, *texts))) == 2
    run(writer, *texts, "--answer", " way", "--answer", " bed")
    asked = [bar for bar in bars if bar[0]]
    assert asked == [(True, "score", 2), (True, "score answers", 2)]


def test_terminal_and_page(writer: Path, model: Any, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    shown = run(writer, "--text", "be", "--text", "no way", *WORDS, "--html", page)
    found = score_texts(model, letters(), ["be", "no way"], **OPTIONS)
    tokens = [value for text in found for value in text.log_probs]
    nll = -sum(tokens) / len(tokens)
    lines = shown.splitlines()
    assert f"NLL {-found[0].mean_log_prob:.3f}" in lines[1]
    assert lines[-1].startswith(
        f"all texts: {len(tokens)} tokens, NLL {nll:.3f}, perplexity {math.exp(nll):.4g}, mutual"
    )
    check_self_contained(page.read_text(encoding="utf-8"))
    assert "use --overwrite" in refuse("score", writer, "--text", "be", "--html", page)


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ([], "score: expected --text or --file, got neither"),
        (["--text", ""], "--text: expected text, got nothing"),
        (["--text", "be", "--answer", "a"], "answers must be at least two texts"),
        (
            ["--text", "be", "--answer", "a", "--html", "x.html"],
            "--answer: expected it without --ht",
        ),
        (["--text", "be", "--answer", "a", "--color-by", "entropy"], "without --color-by"),
        (["--text", "be", "--color-by", "doubt"], "--color-by: expected mutual_information or"),
        (
            ["--text", "be", "--color-by", "mutual_information", "--n-samples", "1"],
            "--color-by: expected entropy with 1 draws",
        ),
        (["--text", "be", "--draws", "pairs"], "got 'pairs'"),
        (["--text", "be", "--n-samples", "-1"], "--n-samples: expected an integer from 0"),
        (["--text", "be", "--seed", "x"], "--seed: expected an integer"),
        (["--text", "be", "--device", "tpu"], "device: expected 'auto', 'cpu' or 'cuda'"),
        (["--file", "none.txt"], "expected a file that exists"),
        (["--text", "\udcff"], "--text: expected Unicode text, got a lone surrogate in '\\udcff'"),
        (["--text", "be", "--prompt", "\ud800"], "--prompt: expected Unicode text, got a lone"),
        (["--text", "be", "--answer", "\ud800"], "--answer: expected Unicode text, got a lone"),
    ],
)
def test_what_is_refused(writer: Path, words: list[str], error: str) -> None:
    assert error in refuse("score", writer, *words)


def test_bad_files(writer: Path, tmp_path: Path) -> None:
    surrogate = '{"text": "a", "prompt": "\\ud800"}'
    for row in (
        surrogate,
        "3",
        '{"text": 3}',
        '{"text": "a", "prompt": 3}',
        '{"prompt": "a"}',
        "x",
    ):
        (tmp_path / "t.jsonl").write_text(row + "\n")
        error = refuse("score", writer, "--file", tmp_path / "t.jsonl")
        assert "t.jsonl:1: expected" in error


def test_numbers_beyond_any_range(writer: Path, tmp_path: Path) -> None:
    """Each line is JSON, and what is not known is null, not certain."""
    for name, factor in (("hot", 1e5), ("broken", math.nan)):
        base = transformers.AutoModelForCausalLM.from_pretrained(writer.parent / "base")
        base.lm_head.weight.data.mul_(factor)
        base.save_pretrained(tmp_path / name)
        letters().save_pretrained(tmp_path / name)

    def strict(text: str) -> dict[str, Any]:
        def refused(constant: str) -> float:
            raise AssertionError(f"{constant} is no JSON")

        return json.loads(text, parse_constant=refused)

    words = ["--text", "no way", "--n-samples", 2, "--json", "--model"]
    hot = strict(run(writer, *words, tmp_path / "hot"))
    assert hot["perplexity"] is None and hot["mean_log_prob"] < -1e4
    assert min(hot["token_entropy"]) >= 0 and "-0.0," not in json.dumps(hot["token_entropy"])
    broken = strict(run(writer, *words, tmp_path / "broken"))
    assert set(broken["token_log_prob"]) == set(broken["token_entropy"]) == {None}
    assert set(broken["token_mutual_information"]) == {None}
    answers = ["--answer", " way", "--answer", " bed"]
    chosen = strict(run(writer, *answers, *words, tmp_path / "broken"))
    assert chosen["entropy"] is None and set(chosen["probabilities"].values()) == {None}
    assert "perplexity inf" in run(writer, "--text", "no way", "--model", tmp_path / "hot")


def test_texts_that_are_too_long(tmp_path: Path) -> None:
    base = gpt2(transformers.GPT2LMHeadModel, n_positions=32)
    base.save_pretrained(tmp_path / "base")
    letters().save_pretrained(tmp_path / "base")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    config = BlobConfig(r=2, target_modules=["c_attn"], task_type="CAUSAL_LM")
    peft.get_peft_model(loaded, config).save_pretrained(tmp_path / "adapter")
    for words in (["--text", "no" * 40], ["--text", "no", "--answer", "a" * 80, "--answer", "b"]):
        error = refuse("score", tmp_path / "adapter", *words, "--n-samples", 0)
        assert "must fit the model's 32 positions, got" in error and "shorten it" in error
