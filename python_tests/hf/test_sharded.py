"""Two processes: adapters that FSDP2 has sharded, and the share of the divergence in each gradient."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accuracy import assert_same_but_rounding
from peft import LoraConfig, PeftModel
from programs import joined, together
from safetensors.torch import load_file
from tiny_models import BATCHES, CLASSES, IDS, LABELS, adapted, arguments, bert, fill, llama
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from bayes_kernels.hf import (
    BayesTrainer,
    BlobConfig,
    PolarConfig,
    PolarVbllConfig,
    ScalablConfig,
    TfbConfig,
    bayesianize,
    decoupled_kl,
    export_lora,
    kl_divergence,
    parameter_groups,
    posterior,
    predict,
    refresh_noise,
    save_sharded,
    stiefel_error,
)
from bayes_kernels.hf.trainer import _check_sharding
from bayes_kernels.stiefel import StiefelAdamW, shard_placement

CONFIGS = [BlobConfig, TfbConfig, ScalablConfig, PolarConfig, PolarVbllConfig]
_PARTS = (1, 2, 4, 8)  # micro-batches of an optimiser step
_ORTHONORMAL = (PolarConfig, PolarVbllConfig)
_STEP = {"n_train": 8, "batch_size": 4, "learning_rate": 0.01, "factor_sum": 4.0}


def _model(config: Any, layers: int = 2) -> PeftModel:
    model = adapted(bert(num_hidden_layers=layers), config)
    if config in _ORTHONORMAL:  # a core that is not zero, whose factors have gradients
        with torch.no_grad():
            for name, p in model.named_parameters():
                if ".lora_core" in name:
                    p.copy_(torch.eye(len(p)) * 0.3)
        return model
    return fill(model) if config is not TfbConfig else model


def _whole(value: Any) -> torch.Tensor:
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def _observe(model: Any, config: Any) -> dict[str, torch.Tensor]:
    """Gradients, draws and the parameters after a decoupled step."""
    found = {}
    refresh_noise(model, step=0, rank=0, seed=3)
    model.train()
    loss = model(input_ids=IDS, labels=LABELS).loss + 0.01 * kl_divergence(model)
    loss.backward()
    found["loss"] = loss.detach()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            found[f"grad {name}"] = _whole(parameter.grad)
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
            found[name] = _whole(parameter.detach())
    return found


def _gradients(model: Any) -> dict[str, torch.Tensor]:
    """Of the loss with the divergence, in one training step, under the names of the plain model."""
    model.train()
    (model(input_ids=IDS, labels=LABELS).loss + 0.01 * kl_divergence(model)).backward()
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            plain = name.removeprefix("module.").removeprefix("_orig_mod.")
            found[plain] = _whole(parameter.grad)
    return found


def _checkpointed(model: Any, reentrant: bool = False) -> Any:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    return model


def _in_parallel(folder: Path, rank: int) -> None:
    """Gradients under DDP, and under FSDP2 with gradient checkpointing."""
    for config in CONFIGS:
        found = {}
        for way in ("ddp", "fsdp2"):
            model = _model(config, 1)
            refresh_noise(model, step=0, rank=0, seed=3)
            if way == "ddp":
                parallel: Any = torch.nn.parallel.DistributedDataParallel(model)
            else:
                parallel = _sharded(_checkpointed(model))
            found[way] = _gradients(parallel)
        if rank == 0:
            torch.save(found, folder / f"{config.__name__}-gradients.pt")


def _sharded(model: Any, **options: Any) -> Any:
    for layer in model.base_model.model.bert.encoder.layer:
        fully_shard(layer, **options)
    return fully_shard(model, **options)


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
        _sharded(model, **options)
        found: dict[str, Any] = _observe(model, config)
        saved = folder / name
        found["save"] = _refused(lambda m=model, s=saved: m.save_pretrained(s))
        found["export"] = _refused(lambda m=model, s=saved: export_lora(m, s))
        assert not saved.exists()
        save_sharded(model, saved)
        assert (saved / "adapter_model.safetensors").exists()  # on either process
        if rank == 0:
            torch.save(found, folder / f"{name}.pt")


def _plain(folder: Path, rank: int) -> None:
    """Plain LoRA, which bayesianize converts where it is whole; and a folder that cannot be."""
    model = _sharded(_model(LoraConfig, 1))
    found = {m: _refused(lambda m=m: bayesianize(model, m, BATCHES)) for m in ("tfb", "laplace")}
    save_sharded(model, folder / "plain")
    (folder / "file").touch()
    with pytest.raises((AssertionError, OSError) if rank == 0 else RuntimeError) as caught:
        save_sharded(model, folder / "file" / "below")
    found[f"error {rank}"] = str(caught.value)
    (folder / f"plain-{rank}.json").write_text(json.dumps(found))


def _zero(folder: Path, rank: int) -> None:
    """Parameters after three steps under DeepSpeed ZeRO-2 and under plain data parallelism."""
    found: dict[str, Any] = {}
    for config, stage in product((BlobConfig, ScalablConfig), (0, 2)):
        name = f"{config.__name__} {stage}"
        model = _zero_trained(folder, config, stage)
        found[name] = {n: p.detach().clone() for n, p in model.named_parameters() if ".lora_" in n}
    for config, stage in ((PolarConfig, 2), (BlobConfig, 3)):
        found[f"{config.__name__} {stage}"] = _refused(
            lambda c=config, s=stage: _zero_trained(folder, c, s)
        )
    if rank == 0:
        torch.save(found, folder / "zero.pt")


def _zero_trained(folder: Path, config: Any, stage: int) -> Any:
    options: dict[str, Any] = {}
    if stage:
        options["deepspeed"] = {
            "zero_optimization": {"stage": stage},
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
    args = arguments(folder / "zero", max_steps=3, gradient_accumulation_steps=2, **options)
    model = fill(adapted(bert(), config))
    BayesTrainer(model=model, args=args, train_dataset=CLASSES).train()
    return model


def _four_bits(folder: Path, rank: int) -> None:
    """Loss and gradients of BLoB on nf4 weights, whole and sharded, by the dtype that keeps them."""
    from transformers import BitsAndBytesConfig

    def model(storage: torch.dtype) -> Any:
        options = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
        found = BitsAndBytesConfig(**options, bnb_4bit_quant_storage=storage)
        base = AutoModelForCausalLM.from_pretrained(
            folder / "base", quantization_config=found, device_map="cpu", dtype=torch.float32
        )
        torch.manual_seed(0)
        return fill(adapted(base, BlobConfig), rho=0.3)

    def observed(model: Any) -> dict[str, torch.Tensor]:
        refresh_noise(model, step=0, rank=0, seed=3)
        model.train()
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        grads = {n: _whole(p.grad) for n, p in model.named_parameters() if p.grad is not None}
        return {"loss": loss.detach(), **grads}

    for storage in (torch.float32, torch.uint8):
        expected, sharded = observed(model(storage)), model(storage)
        fully_shard(sharded.base_model.model.model.layers[0])
        found = observed(fully_shard(sharded))
        weight = sharded.base_model.model.model.layers[0].self_attn.k_proj.weight
        assert weight.element_size() == storage.itemsize and hasattr(weight, "placements")
        assert found.keys() == expected.keys() and len(found) > 6
        for name, value in expected.items():
            assert_same_but_rounding(found[name], value, name, units=64)


def _divergence(folder: Path, rank: int, processes: int) -> None:
    """Parameters after an epoch of SGD, of two steps, where the loss depends on the divergence alone."""
    for parts, mode in product(_PARTS, ("loss", "decoupled")):
        model = adapted(bert(), BlobConfig)
        head = model.base_model.model.classifier.modules_to_save["default"]
        for parameter in head.parameters():
            torch.nn.init.zeros_(parameter).requires_grad_(False)
        trainer = BayesTrainer(
            model=model,
            args=arguments(
                folder / "trainer",
                num_train_epochs=1,
                max_steps=-1,
                per_device_train_batch_size=16 // parts // processes,
                gradient_accumulation_steps=parts,
                optim="sgd",
                learning_rate=0.01,
                lr_scheduler_type="constant",
                max_grad_norm=0.0,
            ),
            train_dataset=CLASSES,
            kl_mode=mode,
        )
        trainer.train()
        assert trainer.state.global_step == 2
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
        assert "save_sharded(model, folder) on all processes" in found[key]
    loaded = PeftModel.from_pretrained(bert(), two / config.__name__)
    for name, value in loaded.named_parameters():
        if ".lora_" in name:
            assert torch.equal(value, found[name]), name


def test_sharded_plain_lora_is_saved_and_converted_on_one_process(two: Path) -> None:
    first, second = (json.loads((two / f"plain-{n}.json").read_text()) for n in (0, 1))
    for method in ("tfb", "laplace"):
        for said in (first[method], second[method]):
            assert said.startswith("bayesianize: tensors must be whole, got a shard of ")
    assert second["error 1"].startswith("save_sharded: the first process could not write: ")
    assert first["error 0"] in second["error 1"]
    whole = _model(LoraConfig, 1)
    for method in ("tfb", "laplace"):
        model = PeftModel.from_pretrained(bert(num_hidden_layers=1), two / "plain")
        expected = {n: p for n, p in whole.named_parameters() if "default" in n}
        found = dict(model.named_parameters())
        assert len(expected) == 6 and all(torch.equal(found[n], p) for n, p in expected.items())
        bayesianize(model, method, BATCHES, progress=False)
        assert predict(model, {"input_ids": IDS}, n_samples=4).mutual_information.max() > 0


def test_embeddings_are_saved_as_peft_saves_them(tmp_path: Path) -> None:
    model = adapted(llama(), BlobConfig, target_modules=["embed_tokens", "q_proj"])
    model.save_pretrained(tmp_path / "stock")
    save_sharded(model, tmp_path / "ours")
    found, expected = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "stock")
    )
    assert any("embed_tokens.base_layer" in name for name in expected)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_save_that_fails_leaves_the_adapter_of_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def files() -> dict[str, bytes]:
        return {str(p.relative_to(tmp_path)): p.read_bytes() for p in tmp_path.rglob("*.*")}

    def no_room(*_: Any, **__: Any) -> None:
        raise OSError("no space left on device")

    bert(num_hidden_layers=1).save_pretrained(tmp_path / "base")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    folder, model = tmp_path / "adapter", adapted(base, BlobConfig)
    save_sharded(model, folder)
    (folder / "notes.txt").write_text("mine")
    assert "`../base`" in (folder / "README.md").read_text()
    before = files()
    fill(model)
    for peft_writes in ("config.PeftConfigMixin.save_pretrained", "peft_model.safe_save_file"):
        with monkeypatch.context() as patch, pytest.raises(OSError, match="no space left"):
            patch.setattr(f"peft.{peft_writes}", no_room)
            save_sharded(model, folder)
        assert files() == before
    (folder / "README.md").write_text("mine")
    save_sharded(model, folder, safe_serialization=False)
    after, formats = files(), {f"adapter/adapter_model.{kind}" for kind in ("bin", "safetensors")}
    assert after.keys() == before.keys() ^ formats
    changed = {name for name in after.keys() & before.keys() if after[name] != before[name]}
    assert changed == {"adapter/README.md"}
    assert "mine" in (folder / "README.md").read_text()


def test_divergence_has_one_scale_for_all_ways_to_take_a_step(two: Path, tmp_path: Path) -> None:
    _divergence(tmp_path, 0, 1)
    start = adapted(bert(), BlobConfig)
    before = {n: p.detach().clone() for n, p in start.named_parameters()}
    for _ in range(2):  # the definition: in an epoch of K steps the divergence counts K / n times
        start.zero_grad()
        (kl_divergence(start) / len(CLASSES)).backward()
        with torch.no_grad():
            for parameter in start.parameters():
                if parameter.grad is not None:
                    parameter -= 0.01 * parameter.grad
    after = dict(start.named_parameters())
    defined = torch.load(tmp_path / "kl-loss-1-1.pt", weights_only=True)
    for name, value in defined.items():
        torch.testing.assert_close(value, after[name].detach(), rtol=1e-5, atol=1e-7)
    for mode in ("loss", "decoupled"):
        expected = torch.load(tmp_path / f"kl-{mode}-1-1.pt", weights_only=True)
        steps = {name: value - before[name] for name, value in expected.items()}
        assert all(steps[name].abs().max() > 0 for name in steps if "lora_A_rho" in name)
        for parts, (folder, count) in product(_PARTS, ((tmp_path, 1), (two, 2))):
            found = torch.load(folder / f"kl-{mode}-{parts}-{count}.pt", weights_only=True)
            for name, step in steps.items():
                # Differences of fp32 parameters below 1.
                torch.testing.assert_close(found[name] - before[name], step, rtol=1e-3, atol=2e-7)


@pytest.mark.parametrize("way", ["ddp", "fsdp2", "checkpoint", "reentrant", "compile"])
@pytest.mark.parametrize("config", CONFIGS)
def test_gradients_are_those_of_the_plain_model(config: Any, way: str, two: Path) -> None:
    model = _model(config, 1)
    refresh_noise(model, step=0, rank=0, seed=3)
    expected = _gradients(model)
    model = _model(config, 1)
    refresh_noise(model, step=0, rank=0, seed=3)
    if way in ("ddp", "fsdp2"):  # this one with gradient checkpointing
        path = two / f"{config.__name__}-gradients.pt"
        found = torch.load(path, weights_only=True)[way]
    elif way == "compile":
        found = _gradients(torch.compile(model, backend="aot_eager"))
    else:
        found = _gradients(_checkpointed(model, way == "reentrant"))
    assert found.keys() == expected.keys() and len(found) >= 6
    for name, value in expected.items():
        assert_same_but_rounding(found[name], value, name, units=1024)


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


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_four_bit_bases(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
    llama(initializer_range=0.1, **sizes).save_pretrained(tmp_path / "base")
    together("hf.test_sharded", tmp_path, "nf4", timeout=240)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed")
def test_deepspeed(tmp_path: Path) -> None:
    """It compiles its communication first, which takes minutes."""
    together("hf.test_sharded", tmp_path, "zero", timeout=600, DS_ACCELERATOR="cpu")
    found = torch.load(tmp_path / "zero.pt", weights_only=True)
    for config in (BlobConfig, ScalablConfig):
        whole = found[f"{config.__name__} 0"]
        assert len(whole) >= 8
        for name, value in found[f"{config.__name__} 2"].items():
            torch.testing.assert_close(value, whole[name], rtol=1e-4, atol=1e-5)
    assert "got DeepSpeed ZeRO-2, which hands it vectors" in found["PolarConfig 2"]
    assert "got DeepSpeed ZeRO-3, which flattens them" in found["BlobConfig 3"]


if __name__ == "__main__":
    place = Path(sys.argv[1])
    with joined() as number:
        if sys.argv[2:] == ["zero"]:
            _zero(place, number)
        elif sys.argv[2:] == ["nf4"]:
            _four_bits(place, number)
        else:
            _shard(place, number)
            _plain(place, number)
            _in_parallel(place, number)
            _divergence(place, number, 2)
