"""The commands that use an adapter: evaluate, predict, bayesianize."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import tiny_task
import torch
import transformers

from bayes_kernels import progress
from bayes_kernels.cli import use
from bayes_kernels.experiment import held_out
from bayes_kernels.experiment.folders import read_record
from bayes_kernels.hf import SavedAdapter
from cli.commands import SETTINGS, call, refuse, results

# Commands choose the GPU where there is one; what they find is compared with the CPU.
pytestmark = pytest.mark.cpu_only


def test_relative_paths_hold_from_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder is read from itself, as its README.md has it, and after all has moved together."""
    home, moved = tmp_path / "home", tmp_path / "moved"
    tiny_task.write_data(home / "data")
    tiny_task.write_model(home / "model")
    monkeypatch.chdir(home)
    words = ["--model", "model", "--test", "data/test.jsonl", "--ood", "data/ood.jsonl"]
    result = call("train", "data/train.jsonl", *words, *SETTINGS, "--out", "runs/blob")
    assert result.exit_code == 0, result.output
    text = Path("runs/blob/README.md").read_text()
    base = text.partition('from_pretrained("')[2].partition('"')[0]
    # Reading an adapter asks nobody on the network about its base.
    monkeypatch.setattr("peft.utils.save_and_load.check_file_exists_on_hf_hub", pytest.fail)
    monkeypatch.chdir("runs/blob")
    assert os.path.samefile(base, home / "model")
    first = call("predict", ".", "--json", "--text", "a bright day")
    assert first.exit_code == 0, first.output
    monkeypatch.chdir(tmp_path)
    shutil.move(home, moved)
    again = call("predict", moved / "runs/blob", "--json", "--text", "a bright day")
    assert again.exit_code == 0, again.output
    assert json.loads(again.stdout)["class"] == json.loads(first.stdout)["class"]
    scores = call("evaluate", moved / "runs/blob", "--n-samples", 2)
    assert scores.exit_code == 0, scores.output


def test_evaluation_gives_the_numbers_of_training(trained: Path) -> None:
    result = call("evaluate", trained)
    assert result.exit_code == 0, result.output
    before, after = results(trained), results(trained / "evaluation")
    assert len(after["methods"]) == 3
    for old, new in zip(before["methods"], after["methods"], strict=True):
        for key in ("metrics", "ood", "temperature"):
            assert old["per_seed"][0][key] == new["per_seed"][0][key]
    assert "use --overwrite" in refuse("evaluate", trained)
    result = call("evaluate", trained, "--overwrite", "--n-samples", "0", "--test-size", "10")
    assert result.exit_code == 0, result.output
    again = results(trained / "evaluation")
    assert [m["name"] for m in again["methods"]] == ["BLoB mean", "BLoB mean + temperature"]
    assert again["methods"][0]["per_seed"][0]["metrics"]["n"] == 10


def test_a_trained_adapter_is_made_bayesian(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "tfb"
    options = ["--set", "anchors=16", "--set", "metric=flips", "--set", "max_trials=3"]
    result = call("bayesianize", trained, *options, "--set", "low=0.01", "--out", out)
    assert result.exit_code == 0, result.output
    assert "TFB: 4 layers, sigma_q=" in result.stdout and "change (flips)" in result.stdout
    assert "BLoB mean" in result.stdout and "TFB N=3" in result.stdout
    content = results(out)
    assert [m["name"] for m in content["methods"]] == ["BLoB mean", "TFB N=3"]
    conversion = content["conversion"]
    assert (conversion["anchors"], conversion["metric"]) == (16, "flips")
    assert len(conversion["trace"]) in (3, 4) and conversion["sigma"] >= 0
    config = json.loads((out / "adapter_config.json").read_text())
    factor = content["scale"]["factor"]  # which validation labels chose after the conversion
    assert config["method"] == "tfb"
    assert config["sigma_q"] == pytest.approx(conversion["sigma"] * factor)
    assert (f"deviations times {factor:.3g}" in result.stderr) == (factor != 1)
    result = call("evaluate", out)
    assert result.exit_code == 0, result.output
    again = results(out / "evaluation")["methods"]
    assert [m["name"] for m in again] == ["TFB mean", "TFB mean + temperature", "TFB N=3"]
    before, after = (m["per_seed"][0]["metrics"] for m in (content["methods"][1], again[2]))
    assert before == after
    assert "use --overwrite" in refuse("bayesianize", trained, "--out", out)
    error = refuse("bayesianize", trained, "--out", tmp_path / "x", "--set", "speed=2")
    assert "expected those of tfb (anchors, metric" in error and "got speed" in error
    error = refuse("bayesianize", trained, "--out", tmp_path / "x", "--set", "structure=layer")
    assert "got structure, an option of laplace, laplace-last" in error
    assert not (tmp_path / "x").exists()
    assert "expected one of tfb" in refuse("bayesianize", trained, "--method", "blob")
    error = refuse("bayesianize", trained, "--out", tmp_path / "x", "--set", "scale=wide")
    assert "scale must be one of" in error and not (tmp_path / "x").exists()
    kept = tmp_path / "kept"
    result = call("bayesianize", trained, *options, "--set", "scale=keep", "--out", kept)
    assert result.exit_code == 0, result.output
    assert results(kept)["scale"] is None
    result = call("bayesianize", trained, *options, "--n-samples", 0, "--out", tmp_path / "mean")
    assert result.exit_code == 0, result.output
    found = results(tmp_path / "mean")["methods"]
    assert [m["name"] for m in found] == ["BLoB mean", "TFB mean"]


def test_deviations_that_are_not_those_of_the_report_are_said(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for factor, said in ((2.0, True), (1.0, False)):
        verdict = held_out.Verdict("deviations times 2", False, factor, {})
        monkeypatch.setattr(held_out, "check_posterior", lambda *_, found=verdict: found)
        options = ["--set", "anchors=8", "--set", "max_trials=2", "--test-size", "4"]
        result = call("bayesianize", trained, *options, "--out", tmp_path / f"tfb-{said}")
        assert result.exit_code == 0, result.output
        assert ("deviations times 2" in result.stderr) == said


def test_predictions_as_json_lines(trained: Path, data: Path, tmp_path: Path) -> None:
    file = data / "test.jsonl"
    result = call("predict", trained, "--data", file, "--text", "bright warm day", "--json")
    assert result.exit_code == 0, result.output
    found = [json.loads(line) for line in result.stdout.splitlines()]
    assert [entry["id"] for entry in found[:2]] == ["text-1", "test-0"] and len(found) == 41
    truth = [json.loads(line)["label"] for line in file.read_text().splitlines()]
    right = [entry["class"] == label for entry, label in zip(found[1:], truth, strict=True)]
    expected = results(trained)["methods"][2]["per_seed"][0]["metrics"]
    assert sum(right) / len(right) == expected["accuracy"]
    entropy = sum(entry["entropy"] for entry in found[1:]) / 40
    assert entropy == pytest.approx(expected["entropy"], abs=1e-5)
    for entry in found:
        assert entry["label"] in ("0", "1")
        assert sum(entry["probabilities"]) == pytest.approx(1)
        assert entry["probability"] == max(entry["probabilities"])
        assert 0 <= entry["mutual_information"] <= entry["entropy"]
    lines = tmp_path / "texts.txt"
    lines.write_text("the road was sour\n\nthe song is kind\n")
    table = call("predict", trained, "--data", lines, "--n-samples", "0")
    assert table.exit_code == 0, table.output
    assert "the song is kind" in table.stdout and "entropy" in table.stdout


def test_draws_end_where_a_class_is_settled(trained: Path) -> None:
    ask = ("predict", trained, "--text", "a bright day", "--text", "sour", "--n-samples", "40")
    result = call(*ask, "--json", "--stop", "0.4", "--min-samples", "6")
    assert result.exit_code == 0, result.output
    found = [json.loads(line) for line in result.stdout.splitlines()]
    assert all(6 <= one["draws"] <= 40 and one["draws"] % 2 == 0 for one in found)
    assert min(one["draws"] for one in found) < 40
    table = call(*ask, "--stop", "0.4", "--stop-rule", "betting", "--json")
    more = [json.loads(line)["draws"] for line in table.stdout.splitlines()]
    assert all(a >= b["draws"] for a, b in zip(more, found, strict=True))
    lines = call(*ask, "--stop", "0.4", "--min-samples", "6").stdout.splitlines()
    assert lines[0].split()[-1] == "draws"
    assert [int(line.split()[-1]) for line in lines[1:]] == [one["draws"] for one in found]
    assert "draws" not in call(*ask).stdout.splitlines()[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--stop", "0.5"), "stop must be None or an error rate from 0 .* to below 0.5, got 0.5"),
        (("--stop", "-1"), "stop must be None or an error rate .* got -1.0"),
        (("--stop", "nan"), "stop must be None or an error rate .* got nan"),
        (("--stop", "often"), "expected a number, got 'often'"),
        (("--stop", "0.1", "--stop-rule", "t"), "stop_rule must be one of .* got 't'"),
        (("--stop", "0.1", "--min-samples", "0"), "expected an integer from 1 to .* got '0'"),
        (
            ("--stop-rule", "betting"),
            "stop_rule must be None without stop, got 'betting'; set stop",
        ),
        (("--min-samples", "2"), "min_samples must be None without stop, got 2; set stop"),
        (
            ("--stop", "0.1", "--n-samples", "1"),
            "fewer than two draws to end, got 0.1 and n_samples=1",
        ),
    ],
)
def test_options_that_end_nothing(options: tuple[str, ...], message: str, tmp_path: Path) -> None:
    """Said before a folder is looked at."""
    found = refuse("predict", tmp_path / "none", "--text", "a day", *options)
    assert re.search(message, " ".join(found.replace("│", " ").split())), found


def test_json_lines_come_as_they_are_made(
    trained: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    predict, asked = SavedAdapter.predict_examples, []

    def once(*args: Any, **options: Any) -> Any:
        asked.append(len(args[1]))
        if len(asked) > 1:
            raise ValueError("the second window")
        return predict(*args, **options)

    monkeypatch.setattr(SavedAdapter, "predict_examples", once)
    result = call("predict", trained, "--data", data / "test.jsonl", "--json", "--batch-size", "2")
    assert result.exit_code != 0 and "the second window" in result.stderr
    found = [json.loads(line)["id"] for line in result.stdout.splitlines()]
    assert asked == [16, 16] and found == [f"test-{i}" for i in range(16)]


@pytest.mark.parametrize("out", [False, True])
@pytest.mark.parametrize("err", [False, True])
def test_a_bar_beside_json_lines(
    out: bool,
    err: bool,
    trained: Path,
    data: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One of all texts, unless it would tear lines that come on the same terminal."""
    bars: list[Any] = []
    made = progress.progress_bar

    def noted(enabled: bool, items: Any = None, **options: Any) -> Any:
        bar = made(enabled, items, **options)
        bars.append((enabled, options["total"], bar))
        return bar

    monkeypatch.setattr(progress, "progress_bar", noted)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: out, raising=False)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: err, raising=False)
    use.predict(str(trained), data=data / "test.jsonl", batch_size=2, json_lines=True)
    ((enabled, total, bar),) = bars
    assert (enabled, total) == (not (out and err), 40)
    assert len(capsys.readouterr().out.splitlines()) == 40
    assert bar.disable or bar.n == 40


@contextlib.contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Files cannot grow beyond that: what a full disk looks like to Python, Rust and C++."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_no_room_for_results(data: Path, model: Path, trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    common = ["train", data, "--model", model, "--method", "mle", "--steps", "2", "--out", out]
    with files_of_at_most(9_000):
        error = refuse(*common)
    assert "expected room to write a checkpoint to, got" in error and "checkpoints" in error
    new = tmp_path / "new"
    common = ["bayesianize", trained, "--n-samples", "1", "--set", "anchors=8", "--test-size", "4"]
    with files_of_at_most(3_000):
        error = refuse(*common, "--set", "max_trials=2", "--out", new)
    assert f"{new}: expected room to write the adapter to, got" in error
    assert not (new / "adapter_config.json").exists()
    with files_of_at_most(900):
        error = refuse("evaluate", trained, "--n-samples", "0", "--out", tmp_path / "scores")
    assert "expected room to write to, got: File too large; make room" in error
    assert not (tmp_path / "scores" / "metrics.json").exists()


def test_weights_that_are_not_finite_predict_nothing(
    data: Path, model: Path, trained: Path, tmp_path: Path
) -> None:
    damaged = tmp_path / "model"
    shutil.copytree(model, damaged)
    tensors = safetensors.torch.load_file(damaged / "model.safetensors")
    tensors["embeddings.LayerNorm.weight"].fill_(math.nan)
    safetensors.torch.save_file(tensors, damaged / "model.safetensors", {"format": "pt"})
    for words in (
        ["evaluate", trained, "--out", tmp_path / "new"],
        ["predict", trained, "--text", "a"],
    ):
        error = refuse(*words, "--model", damaged, "--n-samples", "0")
        assert "expected finite logits, got nan for" in error
        assert "nan" in refuse(*words, "--model", damaged, "--n-samples", "2")
    error = refuse("train", data, "--model", damaged, "--out", tmp_path / "new", "--steps", "2")
    assert "expected a finite loss at step 1 of 2" in error


def test_another_file_is_scored_whole(trained: Path, data: Path, tmp_path: Path) -> None:
    rows = tiny_task.rows(40, "new", 5)
    file = tiny_task.write_rows(tmp_path / "held.jsonl", rows)
    options = ["--n-samples", "2", "--overwrite", "--out", tmp_path / "scores"]
    result = call("evaluate", trained, "--data", file, *options)
    assert result.exit_code == 0 and "train: 0 examples" in result.output, result.output
    assert "note: all rows are for testing\n" in result.output
    assert "0 of these rows are training or validation rows of the adapter\n" in result.output
    assert "no row with a temperature: it is fitted on labelled validation rows" in result.output
    metrics = json.loads((tmp_path / "scores" / "metrics.json").read_text())
    (experiment,) = metrics["experiments"].values()
    assert experiment["source"]["test_fraction"] == 1.0
    assert "test: 40 examples" in result.output
    # Those that it was trained on are counted, not all that there were.
    words = ["--method", "mle", "--train-size", "20", "--steps", "2", "--out", tmp_path / "few"]
    model = read_record(trained).experiment.model
    assert call("train", data, "--model", model, *words).exit_code == 0
    seen = [json.loads(line) for line in (data / "train.jsonl").read_text().splitlines()]
    few = read_record(tmp_path / "few").experiment
    own = few.source.load(few.seed)
    assert len(own.train) == 20 and len(own.train) + len(own.validation) < len(seen)
    tiny_task.write_rows(file, rows + seen)
    result = call("evaluate", tmp_path / "few", "--data", file, *options[2:])
    count = len(own.train) + len(own.validation)
    assert f"{count} of these rows are training or validation rows of the adapter; its scores" in (
        result.output
    )
    # Where others were tested on, none of the training file were kept.
    words = [*words[:-1], tmp_path / "other", "--test", data / "test.jsonl"]
    assert call("train", data / "train.jsonl", "--model", model, *words).exit_code == 0
    given = ["--data", data / "train.jsonl", *options[2:]]
    result = call("evaluate", tmp_path / "other", *given)
    assert f"test: {len(seen)} examples" in result.output and f"{count} of these" in result.output
    # Of the data that it was trained on, those that were kept.
    result = call("evaluate", trained, "--data", data, *options)
    assert result.exit_code == 0 and "all rows" not in result.output


NAMES = ("question", "praise", "bug")  # not in the order of the alphabet


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier that PEFT trained on a causal model: `base`, `adapter`, `rows.jsonl`, and its scores."""
    home = tmp_path_factory.mktemp("stock")
    tiny_task.write_model(home / "words")
    tokenizer = transformers.AutoTokenizer.from_pretrained(home / "words")
    tokenizer.add_tokens(["A", "B", "C"])  # what a language model would answer
    tokenizer.save_pretrained(home / "base")
    shape = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.2,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.LlamaForCausalLM(shape).save_pretrained(home / "base")
        base = transformers.AutoModelForSequenceClassification.from_pretrained(
            home / "base", num_labels=3
        )
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="SEQ_CLS")
        model = peft.get_peft_model(base, config).eval()
        for name, weight in model.named_parameters():
            if "lora_B" in name or "score" in name:
                torch.nn.init.normal_(weight, std=0.5)
    model.save_pretrained(home / "adapter")
    rows = [row | {"label": NAMES[i % 3]} for i, row in enumerate(tiny_task.rows(30, "row", 0))]
    tiny_task.write_rows(home / "rows.jsonl", rows)
    found = [
        model(**tokenizer(row["question"], return_tensors="pt")).logits[0].detach().double()
        for row in rows
    ]
    probs = torch.stack(found).softmax(-1)
    labels = torch.tensor([NAMES.index(row["label"]) for row in rows])
    right = (probs.argmax(-1) == labels).double().mean().item()
    nll = -probs[range(30), labels].log().mean().item()
    (home / "scores.json").write_text(json.dumps({"accuracy": right, "nll": nll}))
    return home


def scores_of(folder: Path) -> dict[str, float]:
    found = results(folder)["methods"][0]["per_seed"][0]["metrics"]
    return {name: found[name] for name in ("accuracy", "nll")}


def test_a_stock_classifier_on_a_causal_model_is_scored_as_one(stock: Path, tmp_path: Path) -> None:
    """Not as a language model that answers with letters, whose head it does not have."""
    expected = pytest.approx(json.loads((stock / "scores.json").read_text()), rel=1e-4)
    out = tmp_path / "scores"
    given = ["--data", stock / "rows.jsonl", "--out", out, "--overwrite"]
    named = ["--label-names", ",".join(NAMES)]
    result = call("evaluate", stock / "adapter", *given, *named)
    assert result.exit_code == 0 and "outputs are taken" not in result.stderr, result.output
    assert scores_of(out) == expected
    # Nothing says the order: that of the alphabet is another.
    result = call("evaluate", stock / "adapter", *given)
    assert "outputs are taken as bug, praise, question; --label-names" in result.stderr
    assert scores_of(out) != expected
    # The base model says it.
    base = shutil.copytree(stock / "base", tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    config["id2label"] = {str(i): name for i, name in enumerate(NAMES)}
    (base / "config.json").write_text(json.dumps(config))
    result = call("evaluate", stock / "adapter", *given, "--model", base)
    assert result.exit_code == 0, result.output
    assert "outputs are taken as question, praise, bug; --label-names" in result.stderr
    assert scores_of(out) == expected


def test_a_stock_classifier_becomes_bayesian_with_its_head(stock: Path, tmp_path: Path) -> None:
    out = tmp_path / "tfb"
    given = ["--data", stock / "rows.jsonl", "--label-names", ",".join(NAMES), "--out", out]
    options = ["--set", "anchors=8", "--n-samples", "2"]
    result = call("bayesianize", stock / "adapter", *given, *options)
    assert result.exit_code == 0, result.output
    heads = []
    for folder in (stock / "adapter", out):
        tensors = safetensors.torch.load_file(folder / "adapter_model.safetensors")
        heads.append(tensors["base_model.model.score.weight"])
    assert torch.equal(*heads)
    asked = json.loads(call("predict", out, "--text", "a warm day", "--json").stdout)
    assert asked["label"] in NAMES and len(asked["probabilities"]) == 3


def test_adapters_of_other_kinds_are_one_clear_line(stock: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(stock / "adapter", tmp_path / "adapter")
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text())
    given = ["--data", stock / "rows.jsonl", "--out", tmp_path / "scores"]
    for kind, message in (
        ("TOKEN_CLS", "expected the task type SEQ_CLS, CAUSAL_LM or none, got TOKEN_CLS"),
        ("CAUSAL_LM", "got base_model.model.score.weight (1 have no place in it); use the kind"),
        (None, "got base_model.model.score.weight (1 have no place in it); use the kind"),
    ):
        file.write_text(json.dumps({**config, "task_type": kind, "modules_to_save": None}))
        for words in (["evaluate", folder], ["bayesianize", folder, "--method", "tfb"]):
            assert message in refuse(*words, *given)
    assert not (tmp_path / "scores").exists()


def test_adapters_and_data_that_do_not_fit(trained: Path, data: Path, tmp_path: Path) -> None:
    assert "folder that exists" in refuse("predict", tmp_path / "nothing", "--text", "a")
    assert "adapter_config.json" in refuse("evaluate", tmp_path)
    assert "got neither" in refuse("predict", trained)
    three = [{**row, "label": i % 3} for i, row in enumerate(tiny_task.rows(30, "row", 0))]
    file = tiny_task.write_rows(tmp_path / "three.jsonl", three)
    assert "'label' must be below 2" in refuse(
        "evaluate", trained, "--data", file, "--out", tmp_path / "evaluation"
    )
    file.write_text("")
    assert "empty file" in refuse("predict", trained, "--data", file)


def test_laws_of_draws(trained: Path) -> None:
    ask = ("predict", trained, "--json", "--text", "a bright day")
    laws = ((), ("--draws", "independent"), ("--draws", "shared"), ("--draw-scope", "token"))
    found = []
    for law in laws:
        result = call(*ask, *law)
        assert result.exit_code == 0, result.output
        found.append(json.loads(result.stdout)["probability"])
    assert len(set(found)) == len(laws)
    assert "predict: draws must be one of" in refuse(*ask, "--draws", "pairs")
    assert "recipe: draw_scope must be one of" in refuse(
        "evaluate", trained, "--overwrite", "--draw-scope", "all"
    )
