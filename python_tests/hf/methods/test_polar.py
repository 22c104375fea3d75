"""PoLAR adapters in stock models: formulas, persistence, training, the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from tiny_models import CLASSES, ROWS, adapted, answering_llama, bert, llama, logits
from torch import nn
from transformers import Trainer

from bayes_kernels.hf import (
    BayesTrainer,
    BlobConfig,
    PolarConfig,
    PolarVbllConfig,
    class_features,
    export_lora,
    import_lora,
    parameter_groups,
    posterior,
    predict,
    stiefel_error,
    variational_loss,
)
from bayes_kernels.hf.methods.polar import stiefel_factors
from bayes_kernels.stiefel import StiefelAdamW
from hf.methods.polar_models import BASES, BATCH, CONFIGS, arguments, fill, fit

# Commands choose the GPU where there is one; what they find is compared with the CPU.
pytestmark = pytest.mark.cpu_only

# --- Adapters ------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", BASES)
@pytest.mark.parametrize("config", CONFIGS)
def test_starts_as_the_base_model(make: Any, config: Any) -> None:
    base = make()
    before = logits(base)
    model = adapted(base, config)
    torch.testing.assert_close(logits(model), before, rtol=1e-6, atol=1e-6)
    assert float(stiefel_error(model)) < 2e-6
    factors = stiefel_factors(model)
    assert len(factors) == 8 and all(p.requires_grad for p in factors)
    assert not torch.equal(factors[0], factors[4])


def test_leaves_the_generator_where_plain_lora_does() -> None:
    states = []
    for config in (LoraConfig, PolarConfig, PolarVbllConfig):
        adapted(bert(), config)
        states.append(torch.random.get_rng_state())
    assert torch.equal(states[0], states[1]) and torch.equal(states[0], states[2])


@pytest.mark.parametrize("core", ["full", "diagonal"])
def test_formula_and_gradients(core: str) -> None:
    model = fill(adapted(bert(), PolarConfig, core=core, lora_alpha=6))
    layer = model.base_model.model.bert.encoder.layer[0].attention.self.query
    x = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(3))
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    theta = layer.lora_core["default"]
    square = torch.diag(theta) if core == "diagonal" else theta
    weight = layer.base_layer.weight + 6 / 4 * b @ square @ a
    want = nn.functional.linear(x, weight, layer.base_layer.bias)
    torch.testing.assert_close(layer(x), want, rtol=1e-5, atol=1e-5)
    parameters = [a, b, theta]
    seed = torch.randn(want.shape, generator=torch.Generator().manual_seed(4))
    ours = torch.autograd.grad((layer(x) * seed).sum(), parameters)
    theirs = torch.autograd.grad((want * seed).sum(), parameters)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_half_precision_bases_keep_fp32_adapters() -> None:
    model = adapted(answering_llama(torch.bfloat16), PolarVbllConfig)
    fp32 = [p for n, p in model.named_parameters() if p.requires_grad]
    assert fp32 and all(p.dtype == torch.float32 for p in fp32)
    assert float(stiefel_error(model)) < 2e-6
    model.half()
    assert all(p.dtype == torch.float32 for p in fp32)
    assert float(stiefel_error(model)) < 2e-6
    model.to(torch.bfloat16)
    loss = variational_loss(fill(model), BATCH, n_train=32)
    loss.loss.backward()
    assert torch.isfinite(loss.loss) and all(torch.isfinite(p.grad).all() for p in fp32)


@pytest.mark.parametrize("make", BASES)
@pytest.mark.parametrize("config", CONFIGS)
def test_merging(make: Any, config: Any) -> None:
    model = fill(adapted(make(), config))
    mean = logits(model)
    with pytest.warns(UserWarning, match="posterior mean only"):
        model.merge_adapter()
    torch.testing.assert_close(logits(model), mean, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), mean, rtol=1e-4, atol=1e-5)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), logits(make()), rtol=1e-6, atol=1e-6)
    with pytest.warns(UserWarning, match="posterior mean only"):
        merged = model.merge_and_unload()
    assert not any("lora" in name or "log_scale" in name for name in merged.state_dict())
    torch.testing.assert_close(logits(merged), mean, rtol=1e-4, atol=1e-5)


def test_merging_keeps_the_dtype_of_the_base() -> None:
    model = fill(adapted(answering_llama(torch.bfloat16), PolarVbllConfig))
    mean = logits(model)
    with pytest.warns(UserWarning, match="posterior mean only"):
        merged = model.merge_and_unload()
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(logits(merged).float(), mean.float(), rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("make", "config", "core"),
    [
        (bert, PolarVbllConfig, "full"),
        (answering_llama, PolarVbllConfig, "full"),
        (bert, PolarConfig, "diagonal"),
    ],
)
def test_export_to_plain_lora(make: Any, config: Any, core: str, tmp_path: Path) -> None:
    model = fill(adapted(make(), config, core=core))
    export_lora(model, tmp_path / "plain")
    assert json.loads((tmp_path / "plain/adapter_config.json").read_text())["peft_type"] == "LORA"
    plain = PeftModel.from_pretrained(make(), str(tmp_path / "plain")).eval()
    assert not any("core" in name or "log_scale" in name for name in plain.state_dict())
    torch.testing.assert_close(logits(plain), logits(model), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="draws must be of weights, got method 'polar"):
        export_lora(model, tmp_path / "draw", which=0)


@pytest.mark.parametrize("core", ["full", "diagonal"])
def test_import_from_plain_lora(core: str, tmp_path: Path) -> None:
    plain = adapted(bert(), LoraConfig)
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in plain.named_parameters():
            if "lora_B" in name or "classifier.modules_to_save" in name:
                p.copy_(torch.randn(p.shape, generator=draw))
    plain.save_pretrained(str(tmp_path))
    for method in ("polar", "polar-vbll"):
        model = import_lora(bert(), tmp_path, method=method, core=core).eval()
        torch.testing.assert_close(logits(model), logits(plain), rtol=1e-4, atol=1e-4)
        assert float(stiefel_error(model)) < 5e-6


# --- Training ------------------------------------------------------------------------------------


@pytest.mark.parametrize("stiefel", ["landing", "polar", "qr"])
@pytest.mark.parametrize("config", CONFIGS)
def test_training(stiefel: str, config: Any, tmp_path: Path) -> None:
    model = adapted(bert(), config, stiefel=stiefel)
    trainer = fit(model, tmp_path, max_steps=12, learning_rate=3e-3)
    assert isinstance(trainer.optimizer.optimizer, StiefelAdamW)
    bound = 0.2 if stiefel == "landing" else 1e-5
    assert float(stiefel_error(model)) < bound
    log = [entry for entry in trainer.state.log_history if "nll" in entry]
    assert log[-1]["loss"] < log[0]["loss"]
    assert all(entry["orthogonality"] < bound for entry in log)
    assert log[-1]["orthogonality"] == pytest.approx(float(stiefel_error(model)), abs=1e-6)
    if config is PolarVbllConfig:
        for entry in log:
            loss = entry["nll"] + entry["kl"] / 32
            assert entry["kl_weight"] == pytest.approx(0.3 / 32)
            assert entry["elbo"] == pytest.approx(-loss)
    else:
        assert "kl" not in log[0]


@pytest.mark.parametrize("core", ["full", "diagonal"])
@pytest.mark.parametrize("config", CONFIGS)
def test_trains_under_autocast(core: str, config: Any, tmp_path: Path) -> None:
    model = adapted(bert(), config, core=core)
    fit(model, tmp_path, max_steps=2, bf16=True)
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_stock_trainer_with_the_optimiser(tmp_path: Path) -> None:
    model = adapted(bert(), PolarConfig, stiefel="polar")
    options = {"params": parameter_groups(model), "lr": 3e-3}
    trainer = fit(
        model,
        tmp_path,
        Trainer,
        max_steps=8,
        lr_scheduler_type="cosine",
        optimizer_cls_and_kwargs=(StiefelAdamW, options),
    )
    assert float(stiefel_error(model)) < 1e-5
    log = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert log[-1] < log[0]


def test_parameter_groups() -> None:
    model = adapted(bert(), PolarVbllConfig, head_lr=0.5, stiefel_penalty=0.25)
    groups = parameter_groups(model, weight_decay=0.1)
    flags = [
        (g.get("stiefel"), g.get("lr"), g.get("weight_decay"), len(g["params"])) for g in groups
    ]
    assert flags == [(True, None, None, 8), (None, 0.5, None, 3), (None, None, 0.1, 4)]
    assert groups[0]["penalty"] == 0.25 and groups[0]["eps"] == 1e-6
    assert "eps" not in parameter_groups(adapted(bert(), PolarConfig, stiefel="qr"))[0]
    every = sum(len(g["params"]) for g in groups)
    assert every == sum(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match="must have an active PoLAR adapter"):
        parameter_groups(adapted(bert(), BlobConfig))


# --- Mistakes ------------------------------------------------------------------------------------


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"r must be at most .* got 40 and 32"):
        adapted(bert(), PolarConfig, r=40)
    with pytest.raises(ValueError, match="must be a sequence classifier, or a causal model with a"):
        adapted(llama(), PolarVbllConfig)
    with pytest.raises(ValueError, match="at least two classes"):
        adapted(bert(num_labels=1), PolarVbllConfig)
    for name, value in (("stiefel", "cayley"), ("head_lr", -1), ("alternation_period", 0)):
        with pytest.raises(ValueError, match=f"PolarVbllConfig: {name} must be"):
            PolarVbllConfig(**{name: value})
    model = adapted(bert(), PolarVbllConfig, alternation="gauss-seidel")
    with pytest.raises(ValueError, match="needs one process"):
        BayesTrainer(
            model=model,
            args=arguments(tmp_path, gradient_accumulation_steps=2),
            train_dataset=CLASSES,
        )
    for optim in ("sgd", "adamw_torch_8bit"):
        with pytest.raises(ValueError, match="PoLAR adapters need optim='adamw_torch'"):
            fit(adapted(bert(), PolarConfig), tmp_path, optim=optim)
    headed = adapted(bert(), PolarVbllConfig, head_prior_scale=1.0)
    with pytest.raises(ValueError, match="label_smoothing_factor must not be given"):
        BayesTrainer(model=headed, args=arguments(tmp_path, label_smoothing_factor=0.1))
    with pytest.raises(ValueError, match="compute_loss_func must not be given"):
        BayesTrainer(model=headed, args=arguments(tmp_path), compute_loss_func=lambda *_: 0)
    with pytest.warns(UserWarning, match="call calibrate_head"):
        BayesTrainer(model=adapted(bert(), PolarVbllConfig), args=arguments(tmp_path))
    plain = adapted(bert(), PolarConfig)
    for pointwise in (plain, headed):
        with pytest.raises(ValueError, match="weights have no draws"), posterior(pointwise):
            pass
    with pytest.raises(ValueError, match="n_samples must be 0 for adapters without a posterior"):
        predict(plain, BATCH)
    assert predict(plain, BATCH, n_samples=0).probs.shape == (8, 3)
    with pytest.raises(ValueError, match="must have an active variational last layer"):
        variational_loss(plain, BATCH, n_train=3)
    with pytest.raises(ValueError, match="batch must have labels"):
        variational_loss(model, {"input_ids": ROWS[:2]}, n_train=3)
    with model.disable_adapter(), pytest.raises(ValueError, match="enable the adapter"):
        class_features(model, {"input_ids": ROWS[:2]})


# --- The command line ----------------------------------------------------------------------------


@pytest.mark.filterwarnings("error:BayesTrainer. head_prior_scale")  # calibrated before
@pytest.mark.parametrize("method", ["polar", "polar-vbll"])
def test_command_line(method: str, tiny_data: Path, tiny_model: Path, tmp_path: Path) -> None:
    pytest.importorskip("typer")
    from typer.testing import CliRunner

    from bayes_kernels.cli import app

    def call(*words: object) -> Any:
        result = CliRunner().invoke(app.app, [str(word) for word in words])
        assert result.exit_code == 0, result.output
        return result

    data, model = tiny_data, tiny_model
    out = tmp_path / "out"
    options = ["--method", method, "--model", model, "--rank", 4, "--steps", 8, "--lr", 0.005]
    if method == "polar-vbll":
        for item in ("refine=true", "head_lr=0.01", "kl_weight=0.1", "stiefel=polar"):
            options += ["--set", item]
    shown = call("train", data, "--ood", data / "ood.jsonl", *options, "--out", out)
    rows = json.loads((out / "metrics.json").read_text())
    assert ("PoLAR-VBLL N=1000" if method == "polar-vbll" else "PoLAR") in shown.stdout
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["method"] == method
    assert config.get("refine") == (None if method == "polar" else "cholesky")
    if method == "polar":
        return
    call("evaluate", out)
    again = json.loads((out / "evaluation/metrics.json").read_text())
    before, after = ({row["name"]: row["mean"] for row in r["methods"]} for r in (rows, again))
    assert len(after) >= 2 and set(after) <= set(before)
    for name, scores in after.items():  # the loaded adapter is the one that was trained
        assert scores == pytest.approx({key: before[name][key] for key in scores}, rel=1e-5)
    found = call("predict", out, "--text", "the bright warm road", "--json").stdout
    prediction = json.loads(found.splitlines()[-1])
    assert prediction["label"] and prediction["mutual_information"] is not None
