"""The README.md of saved adapters."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import transformers
from peft import get_peft_model
from tiny_models import gpt2, llama
from tiny_task import write_model
from transformers import AutoModelForSequenceClassification

from bayes_kernels.hf import BlobConfig, PolarVbllConfig
from bayes_kernels.hf.card import _CLASSES, write_card
from hf.peft_adapters import CONFIGS


@pytest.mark.parametrize("method", [*CONFIGS, "polar-vbll"])
def test_saved_folders_explain_themselves(tmp_path: Path, method: str) -> None:
    base = gpt2(pad_token_id=0)
    base.config.id2label = {0: "red", 1: "green", 2: "blue"}
    config = {**CONFIGS, "polar-vbll": PolarVbllConfig}[method]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(base, config(target_modules=["c_attn"], task_type="SEQ_CLS", r=2))
        model.peft_config["default"].base_model_name_or_path = "some/gpt2"
        model.save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    for part in ("import bayes_kernels.hf", "some/gpt2", "red, green, blue", "r = 2", "c_attn"):
        assert part in text, part
    assert "AutoModelForSequenceClassification" in text and "bayes-kernels evaluate" in text
    assert "[More Information Needed]" not in text and str(tmp_path) not in text
    code = text.partition("```python\n")[2].partition("```")[0]
    compile(code, "README.md", "exec")
    assert code.index("import bayes_kernels.hf") < code.index("PeftModel")
    drawn = method in ("blob", "tfb", "scalabl", "scalabl-full")
    assert ('export_draws(model, "draws", 10)' in text) == drawn
    assert ("0 is the posterior mean" in text) == (method not in ("polar", "polar-diagonal"))
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "BAYES_LORA"


LABELS = ["LABEL_0", "LABEL_1", "LABEL_2"]


@pytest.mark.parametrize(
    ("names", "problem", "own_head", "answer"),
    [
        (["red", "green", "blue"], None, False, "Prediction("),
        (LABELS, None, True, "Prediction("),
        (LABELS, "multi_label_classification", False, "LabelPrediction("),
        (LABELS, "regression", False, "NumberPrediction("),
        (LABELS[:1], None, True, "NumberPrediction("),
    ],
)
def test_the_program_of_a_classifiers_card_runs_in_its_folder(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    names: list[str],
    problem: str | None,
    own_head: bool,
    answer: str,
) -> None:
    place, auto = tmp_path / "base", AutoModelForSequenceClassification
    write_model(place)
    if own_head:
        auto.from_pretrained(place, num_labels=7).save_pretrained(place)
    base = auto.from_pretrained(
        place, num_labels=len(names), problem_type=problem, ignore_mismatched_sizes=True
    )
    base.config.id2label = dict(enumerate(names))
    config = BlobConfig(target_modules=["query"], task_type="SEQ_CLS", r=2)
    get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    text = (tmp_path / "adapter" / "README.md").read_text()
    assert ("Classes: red, green, blue" in text) == (names[0] == "red") and "Classes: L" not in text
    assert run_program(text, tmp_path / "adapter", monkeypatch, capsys).startswith(answer)


@pytest.mark.parametrize(
    ("task", "answer"), [("CAUSAL_LM", "[Generation("), ("TOKEN_CLS", ""), ("QUESTION_ANS", "")]
)
def test_the_program_of_a_card_ends_where_the_task_does_not_say_how_to_ask(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    task: str,
    answer: str,
) -> None:
    write_model(tmp_path / "base")
    if task == "CAUSAL_LM":
        llama(max_position_embeddings=128).save_pretrained(tmp_path / "base")
    more = {"num_labels": 5} if task == "TOKEN_CLS" else {}
    base = getattr(transformers, _CLASSES[task]).from_pretrained(tmp_path / "base", **more)
    layer = "q_proj" if task == "CAUSAL_LM" else "query"
    config = BlobConfig(target_modules=[layer], task_type=task, r=2)
    get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    text = (tmp_path / "adapter" / "README.md").read_text()
    said = run_program(text, tmp_path / "adapter", monkeypatch, capsys)
    assert said.startswith(answer) and bool(said) == bool(answer)


def run_program(
    card: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> str:
    """What the first program of a card prints in its folder."""
    monkeypatch.chdir(folder)
    capsys.readouterr()
    exec(card.partition("```python\n")[2].partition("```")[0], {})
    return capsys.readouterr().out


def test_a_card_of_ones_own_stays(tmp_path: Path) -> None:
    model = get_peft_model(gpt2(pad_token_id=0), BlobConfig(target_modules=["c_attn"], r=2))
    model.save_pretrained(tmp_path)
    card = tmp_path / "README.md"
    card.write_text(card.read_text().replace("BLoB adapter", "Old title"))
    model.save_pretrained(tmp_path)
    assert "# BLoB adapter" in card.read_text()  # ours is renewed
    card.write_text("---\nlicense: mit\n---\nWritten by hand.\n")
    model.save_pretrained(tmp_path)
    text = card.read_text()
    assert "Written by hand." in text and "BLoB adapter" not in text


@pytest.mark.parametrize(
    ("method", "served"), [("laplace", True), ("mle", False), ("dropout", False)]
)
def test_draws_beside_a_plain_adapter(tmp_path: Path, method: str, served: bool) -> None:
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "target_modules": ["c_attn"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    record = {"experiment": {"method": method, "model": "some/gpt2"}}
    (tmp_path / "experiment.json").write_text(json.dumps(record))
    text = write_card(tmp_path).read_text()
    assert ('export_draws(model, "draws", 10)' in text) == served
