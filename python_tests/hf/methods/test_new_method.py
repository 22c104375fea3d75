"""A method is one file and one row of the table: with these two everything else knows it."""

from __future__ import annotations

import ast
import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_task
import torch
from cli.commands import call, refuse
from peft import PeftModel
from tiny_models import BASES, CLASSES, IDS, adapted, arguments, fill, logits, trained

from bayes_kernels.hf import BayesTrainer, export_lora, import_lora, kl_divergence, predict
from bayes_kernels.hf.config import CONFIGS
from bayes_kernels.hf.method import METHODS, register
from bayes_kernels.hf.variants import VARIANTS

MODULE = "hf.methods.gaussian_core"
LARGEST = 60


@pytest.fixture(scope="module", autouse=True)
def core() -> Iterator[Any]:
    """The new method, known while this module's tests run."""
    module = importlib.import_module(MODULE)
    register(module.METHOD)
    yield module
    for table in (METHODS, CONFIGS, VARIANTS):
        del table["core"]
    del sys.modules[MODULE]


@pytest.fixture
def model(core: Any) -> PeftModel:
    return fill(adapted(BASES["bert"](), core.CoreConfig))


def test_it_is_small(core: Any) -> None:
    tree = ast.parse(Path(core.__file__).read_text("utf-8"))
    body = [node for node in tree.body if not isinstance(node, (ast.Import, ast.ImportFrom))][1:]
    lines = {line for node in body for line in range(node.lineno, node.end_lineno + 1)}
    text = Path(core.__file__).read_text("utf-8").splitlines()
    assert sum(bool(text[line - 1].strip()) for line in lines) <= LARGEST


def test_it_trains(core: Any, tmp_path: Path) -> None:
    model = adapted(BASES["bert"](), core.CoreConfig, kl_time=0.5)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if "core" in name}
    divergence = kl_divergence(model).item()
    options = arguments(tmp_path, max_steps=24, learning_rate=5e-3, logging_steps=4)
    trainer = BayesTrainer(model=model, args=options, train_dataset=CLASSES)
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert log[-1]["loss"] < log[0]["loss"] and {"nll", "kl", "elbo"} <= log[-1].keys()
    assert kl_divergence(model).item() < divergence
    for name, old in before.items():
        assert not torch.equal(old, model.get_parameter(name)), name


def test_a_divergence_without_a_step_is_not_left_out_in_silence(
    model: PeftModel, core: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(core.CoreVariant, "kl_step", classmethod(lambda *_: None))
    options = arguments(tmp_path, max_steps=1)
    with pytest.raises(ValueError, match="pass kl_mode='loss'"):
        BayesTrainer(model=model, args=options, train_dataset=CLASSES).train()
    logged = BayesTrainer(model=model, args=options, train_dataset=CLASSES, kl_mode="loss").train()
    assert logged.global_step == 1


def test_it_predicts_from_the_draws_that_it_exports(model: PeftModel, tmp_path: Path) -> None:
    inputs = {"input_ids": IDS}
    mean, drawn = predict(model, inputs, n_samples=0), predict(model, inputs, n_samples=3, seed=5)
    torch.testing.assert_close(mean.log_probs.float(), logits(model).log_softmax(-1))
    assert float(drawn.mutual_information.min()) > 0
    draws = []
    for which in range(3):
        folder = export_lora(model, tmp_path / str(which), which, seed=5)
        draws.append(logits(PeftModel.from_pretrained(BASES["bert"](), folder).eval()).softmax(-1))
    assert not torch.equal(draws[0], draws[1])
    torch.testing.assert_close(torch.stack(draws).mean(0).log(), drawn.log_probs.float())


def test_it_is_saved_and_loaded(model: PeftModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(BASES["bert"](), tmp_path).eval()
    inputs = {"input_ids": IDS}
    found = [predict(m, inputs, n_samples=4).log_probs for m in (model.eval(), again)]
    torch.testing.assert_close(*found)
    assert type(again.peft_config["default"]) is type(model.peft_config["default"])
    card = (tmp_path / "README.md").read_text("utf-8")
    assert "Gaussian core (`core`)" in card and "N(0, 1.0^2) on the core" in card


def test_it_converts_plain_lora(tmp_path: Path) -> None:
    plain = trained("bert")
    plain.save_pretrained(tmp_path / "plain")
    made = import_lora(
        BASES["bert"](), tmp_path / "plain", method="core", init_rho=0.5, prior_std=2.0
    )
    config = made.peft_config["default"]
    assert (config.method, config.init_rho, config.prior_std) == ("core", 0.5, 2.0)
    torch.testing.assert_close(logits(made.eval()), logits(plain.eval()))
    assert predict(made, {"input_ids": IDS}, n_samples=4).mutual_information.min() > 0


def test_merging_keeps_the_mean(model: PeftModel) -> None:
    before = logits(model.eval())
    with pytest.warns(UserWarning, match="keeps the posterior mean only"):
        merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), before)


def test_commands_list_train_and_use_it(tmp_path: Path) -> None:
    assert (
        "core" in call("methods").stdout and "prior_std: number" in call("methods", "core").stdout
    )
    data, base = tiny_task.write_data(tmp_path / "data"), tiny_task.write_model(tmp_path / "model")
    options = ["--method", "core", "--model", base, "--rank", 4, "--steps", 4]
    assert "no_such" in refuse("train", data, *options, "--set", "no_such=1")
    out = tmp_path / "out"
    shown = call("train", data, *options, "--set", "core.prior_std=0.5", "--out", out).stdout
    assert "Gaussian core" in shown
    stored = json.loads((out / "adapter_config.json").read_text("utf-8"))
    assert (stored["method"], stored["prior_std"]) == ("core", 0.5)
    assert "Gaussian core" in call("evaluate", out).stdout
    shown = call("predict", out, "--text", "the bright warm road", "--json").stdout
    assert json.loads(shown.splitlines()[-1])["mutual_information"] > 0
