"""The README.md of saved adapters."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
from peft import get_peft_model
from tiny_models import gpt2

from bayes_kernels.hf import BlobConfig, PolarVbllConfig
from bayes_kernels.hf.card import write_card
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
