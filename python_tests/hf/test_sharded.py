"""Two processes: adapters that FSDP2 has sharded, and the share of the divergence in each gradient."""

from __future__ import annotations

import sys
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accuracy import assert_same_but_rounding
from peft import PeftModel
from programs import joined, together
from tiny_models import CLASSES, IDS, LABELS, adapted, arguments, bert, fill
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard

from bayes_kernels.hf import (
    BayesTrainer,
    BlobConfig,
    PolarConfig,
    PolarVbllConfig,
    ScalablConfig,
    TfbConfig,
    decoupled_kl,
    export_lora,
    kl_divergence,
    parameter_groups,
    posterior,
    refresh_noise,
    stiefel_error,
)
from bayes_kernels.hf.trainer import _check_sharding
from bayes_kernels.stiefel import StiefelAdamW, shard_placement

CONFIGS = [BlobConfig, TfbConfig, ScalablConfig, PolarConfig, PolarVbllConfig]
_ORTHONORMAL = (PolarConfig, PolarVbllConfig)
_STEP = {"n_train": 8, "batch_size": 4, "learning_rate": 0.01, "factor_sum": 4.0}


def _model(config: Any) -> PeftModel:
    model = adapted(bert(), config)
    if config in _ORTHONORMAL:  # a core that is not zero, whose factors have gradients
        with torch.no_grad():
            for name, p in model.named_parameters():
                if ".lora_core" in name:
                    p.copy_(torch.eye(len(p)) * 0.3)
        return model
    return fill(model) if config is not TfbConfig else model


def _observe(model: Any, config: Any) -> dict[str, torch.Tensor]:
    """Gradients, draws and the parameters after a decoupled step."""
    found = {}

    def whole(value: Any) -> torch.Tensor:
        return value.full_tensor() if hasattr(value, "full_tensor") else value

    refresh_noise(model, step=0, rank=0, seed=3)
    model.train()
    loss = model(input_ids=IDS, labels=LABELS).loss + 0.01 * kl_divergence(model)
    loss.backward()
    found["loss"] = loss.detach()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            found[f"grad {name}"] = whole(parameter.grad)
    model.eval()
    if config not in _ORTHONORMAL:
        with torch.no_grad(), posterior(model, seed=5):
            found["draw"] = model(input_ids=IDS).logits
    else:
        optimizer = StiefelAdamW(parameter_groups(model), lr=0.01)
        optimizer.step()
        found["orthogonality"] = stiefel_error(model)
    step = decoupled_kl(model, **_STEP)
    if step is not None:
        step.step(1.0)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            found[name] = whole(parameter.detach())
    return found


def _refused(call: Any) -> str:
    with pytest.raises((ValueError, TypeError)) as caught:
        call()
    return str(caught.value)


def _shard(folder: Path, rank: int) -> None:
    for config in CONFIGS:
        name = config.__name__
        model: Any = _model(config)
        options: dict[str, Any] = {}
        if config is PolarVbllConfig:
            options["shard_placement_fn"] = shard_placement
        for layer in model.base_model.model.bert.encoder.layer:
            fully_shard(layer, **options)
        fully_shard(model, **options)
        found: dict[str, Any] = _observe(model, config)
        saved = folder / name
        found["save"] = _refused(lambda m=model, s=saved: m.save_pretrained(s))
        found["export"] = _refused(lambda m=model, s=saved: export_lora(m, s))
        assert not saved.exists()
        state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
        if rank == 0:
            model.save_pretrained(saved, state_dict=state)
            torch.save(found, folder / f"{name}.pt")


def _divergence(folder: Path, rank: int, processes: int) -> None:
    """Parameters after a step of SGD, where the loss depends on the divergence alone."""
    for parts, mode in product((1, 2, 4), ("loss", "decoupled")):
        model = adapted(bert(), BlobConfig)
        head = model.base_model.model.classifier.modules_to_save["default"]
        for parameter in head.parameters():
            torch.nn.init.zeros_(parameter).requires_grad_(False)
        trainer = BayesTrainer(
            model=model,
            args=arguments(
                folder / "trainer",
                max_steps=1,
                per_device_train_batch_size=8 // parts // processes,
                gradient_accumulation_steps=parts,
                optim="sgd",
                learning_rate=1.0,
                lr_scheduler_type="constant",
                max_grad_norm=0.0,
            ),
            train_dataset=CLASSES,
            kl_mode=mode,
        )
        trainer.train()
        if rank == 0:
            state = {n: p.detach() for n, p in model.named_parameters() if ".lora_" in n}
            torch.save(state, folder / f"kl-{mode}-{parts}-{processes}.pt")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes wrote."""
    folder = tmp_path_factory.mktemp("sharded")
    together("hf.test_sharded", folder, timeout=240)
    return folder


@pytest.mark.parametrize("config", CONFIGS)
def test_shards_are_as_the_whole(config: Any, two: Path) -> None:
    found = torch.load(two / f"{config.__name__}.pt", weights_only=True)
    expected = _observe(_model(config), config)
    for key, value in expected.items():
        assert_same_but_rounding(found[key], value, key, units=1024)
    state = {key for key in found if not isinstance(found[key], str)}
    assert state == set(expected)
    for key, op in (("save", "save_pretrained"), ("export", "export_lora")):
        assert found[key].startswith(f"{op}: tensors must be whole, got a shard of ")
        assert "state_dict=" in found[key]
    loaded = PeftModel.from_pretrained(bert(), two / config.__name__)
    for name, value in loaded.named_parameters():
        if ".lora_" in name:
            assert torch.equal(value, found[name]), name


def test_divergence_has_one_scale_for_all_ways_to_take_a_step(two: Path, tmp_path: Path) -> None:
    _divergence(tmp_path, 0, 1)
    before = {n: p.detach() for n, p in adapted(bert(), BlobConfig).named_parameters()}
    for mode in ("loss", "decoupled"):
        expected = torch.load(tmp_path / f"kl-{mode}-1-1.pt", weights_only=True)
        steps = {name: value - before[name] for name, value in expected.items()}
        assert all(steps[name].abs().max() > 0 for name in steps if "lora_A_rho" in name)
        for parts, (folder, count) in product((1, 2, 4), ((tmp_path, 1), (two, 2))):
            found = torch.load(folder / f"kl-{mode}-{parts}-{count}.pt", weights_only=True)
            for name, step in steps.items():
                # Differences of fp32 parameters below 1.
                torch.testing.assert_close(found[name] - before[name], step, rtol=1e-3, atol=2e-7)


@pytest.mark.parametrize(
    ("deepspeed", "fsdp", "what"),
    [(3, None, "DeepSpeed ZeRO-3"), (None, 1, "FSDP version 1"), (2, None, ""), (None, 2, "")],
)
def test_parameters_that_are_flattened(deepspeed: Any, fsdp: Any, what: str) -> None:
    stage = None if deepspeed is None else SimpleNamespace(zero_stage=deepspeed)
    plugin = None if fsdp is None else SimpleNamespace(fsdp_version=fsdp)
    trainer = SimpleNamespace(
        args=SimpleNamespace(deepspeed_plugin=stage),
        accelerator=SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin)),
    )
    if not what:
        _check_sharding(trainer)
        return
    with pytest.raises(ValueError, match=f"sharded by FSDP2, got {what}, which flattens"):
        _check_sharding(trainer)


if __name__ == "__main__":
    place = Path(sys.argv[1])
    with joined() as number:
        _shard(place, number)
        _divergence(place, number, 2)
