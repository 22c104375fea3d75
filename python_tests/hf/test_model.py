"""Bayesian adapters in PEFT models: persistence, merging, dtypes, several adapters."""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from accuracy import assert_same_but_rounding
from peft import PeftModel, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from tiny_models import IDS, adapted, blob, fill, gpt2, llama, logits
from torch import nn
from transformers import AutoModelForCausalLM, GPT2LMHeadModel, LlamaForCausalLM

from bayes_kernels.hf import (
    BayesLoraConfig,
    BlobConfig,
    PolarConfig,
    kl_divergence,
    posterior,
    refresh_noise,
)
from bayes_kernels.hf._compat import unsupported_layer
from bayes_kernels.hf.layers import bayes_layers, lora_layers, noise_state


def test_adapters_in_an_eval_model_stay_in_eval() -> None:
    model = blob(target_modules=["q_proj"], task_type=None)
    assert not any(isinstance(m, LoraLayer) and m.training for m in model.modules())
    assert torch.equal(logits(model), logits(model))


@pytest.mark.parametrize(
    ("config", "tensor"), [(BlobConfig, "lora_A_rho"), (PolarConfig, "lora_A.")]
)
def test_first_values_follow_the_global_seed(config: Any, tensor: str) -> None:
    found = []
    for seed in (1, 1, 2):
        base = llama()
        torch.manual_seed(seed)
        model = adapted(base, config, target_modules=["q_proj"])
        found.append([p.detach() for name, p in model.named_parameters() if tensor in name])
    (first, other), again, changed = found
    assert not torch.equal(first, other)  # the same layer of two blocks
    assert torch.equal(first, again[0]) and not torch.equal(first, changed[0])


def test_lora_layers_are_those_of_named_modules() -> None:
    model = blob()
    model.shared = model.get_base_model().model.layers[
        0
    ]  # a module in two places has its first name
    expected = [(name, m) for name, m in model.named_modules() if isinstance(m, LoraLayer)]
    assert expected and list(lora_layers(model)) == expected


# --- copies, devices, dtypes ---------------------------------------------------------------------


def test_copy_and_pickle() -> None:
    model = blob().train()
    model(input_ids=IDS)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert noise_state(other) is not noise_state(model)
        assert len({id(item.variant.state) for item in bayes_layers(other)}) == 1
        assert other.get_base_model().bayes_noise is noise_state(other)
        assert_same_but_rounding(logits(other), logits(copy.deepcopy(model)))
        assert not torch.equal(logits(other), logits(other))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_base(dtype: torch.dtype) -> None:
    model = blob(dtype=dtype)
    item = bayes_layers(model)[0]
    assert item.rho.dtype == torch.float32 and item.mean.dtype == torch.float32
    model.train()
    out = model(input_ids=IDS, labels=IDS)
    assert out.logits.dtype == dtype
    out.loss.backward()
    assert item.rho.grad is not None and item.rho.grad.dtype == torch.float32
    assert torch.isfinite(item.rho.grad).all() and item.rho.grad.abs().sum() > 0


def test_casting_the_model_keeps_key_and_deviations() -> None:
    model = blob(rho=0.1234567)
    exact = bayes_layers(model)[0].rho.detach().clone()
    model.half()
    item = bayes_layers(model)[0]
    assert item.mean.dtype == torch.float16
    assert item.rho.dtype == torch.float32 and torch.equal(item.rho, exact)
    assert all(key.dtype == torch.int64 for key in noise_state(model).keys.values())
    model.train()
    assert torch.isfinite(logits(model)).all()
    assert kl_divergence(model).dtype == torch.float32


def test_autocast() -> None:
    model = blob().train()
    refresh_noise(model, step=0)
    full = logits(model)
    refresh_noise(model, step=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(input_ids=IDS, labels=IDS)
    torch.testing.assert_close(out.logits.float(), full, rtol=0.1, atol=0.1)
    out.loss.backward()


@pytest.mark.needs_cuda
def test_moves_to_a_gpu_and_back() -> None:
    model = blob()
    with posterior(model, "sample", seed=1):
        cpu = logits(model)
    model.cuda()
    assert torch.device("cuda", 0) in noise_state(model).keys
    with posterior(model, "sample", seed=1):
        torch.testing.assert_close(logits(model, IDS.cuda()).cpu(), cpu, rtol=1e-3, atol=1e-3)
    model.cpu()
    model.train()
    logits(model)


# --- PEFT surface --------------------------------------------------------------------------------


def test_save_and_load(tmp_path: Path) -> None:
    model = blob(rho=None, prior_std=0.15, scope="example")
    model.save_pretrained(tmp_path / "a")
    from safetensors.torch import load_file

    keys = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert len(keys) == 12 and sum(k.endswith("lora_A_rho") for k in keys) == 4
    for low in (False, True):
        loaded = PeftModel.from_pretrained(llama(), tmp_path / "a", low_cpu_mem_usage=low)
        config = loaded.peft_config["default"]
        assert isinstance(config, BayesLoraConfig)
        assert (config.prior_std, config.scope) == (0.15, "example")
        assert_same_but_rounding(logits(loaded), logits(model))
        for a, b in zip(bayes_layers(model), bayes_layers(loaded), strict=True):
            assert torch.equal(a.rho, b.rho) and b.rho.dtype == torch.float32
            assert torch.equal(a.mean, b.mean)
        with posterior(loaded, "sample", seed=4), posterior(model, "sample", seed=4):
            assert_same_but_rounding(logits(loaded), logits(model))
    llama().save_pretrained(tmp_path / "base")
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "b")
    auto = AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    assert_same_but_rounding(logits(auto), logits(model))
    assert torch.equal(bayes_layers(auto)[0].rho, bayes_layers(model)[0].rho)
    with posterior(auto, "sample", seed=4), posterior(model, "sample", seed=4):
        assert_same_but_rounding(logits(auto), logits(model))
    auto.train()
    assert not torch.equal(logits(auto), logits(auto))


def test_loading_without_registration_names_the_type(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    blob().save_pretrained(tmp_path)
    monkeypatch.delitem(PEFT_TYPE_TO_CONFIG_MAPPING, "BAYES_LORA")
    with pytest.raises(KeyError, match="BAYES_LORA"):
        PeftModel.from_pretrained(llama(), tmp_path)


def test_several_adapters(tmp_path: Path) -> None:
    model = blob()
    base = logits(llama())
    first = logits(model)
    with posterior(model, "sample"):
        first_draw = logits(model)
    model.save_pretrained(tmp_path)
    model.load_adapter(str(tmp_path), adapter_name="second")
    model.add_adapter("third", BlobConfig(r=2, target_modules=["q_proj", "o_proj"]))
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "third" in name and "lora_B" in name:
                p.copy_(torch.randn(p.shape, generator=generator))
    assert torch.equal(logits(model), first)
    with posterior(model, "sample"):  # more layers with adapters change no draw of these
        assert torch.equal(logits(model), first_draw)
    model.set_adapter("third")
    third = logits(model)
    assert not torch.equal(third, first)
    trainable = [n for n, p in model.named_parameters() if p.requires_grad]
    assert len(trainable) == 12 and all("third" in n for n in trainable)
    with model.disable_adapter():
        assert_same_but_rounding(logits(model), base)
    mixed = logits(model, IDS[:3], adapter_names=["default", "third", "__base__"])
    torch.testing.assert_close(
        mixed, torch.stack([first[0], third[1], base[2]]), rtol=1e-4, atol=1e-5
    )
    with posterior(model, "sample", n_samples=2):
        folded = logits(
            model, IDS[:3].repeat(2, 1), adapter_names=["default", "third", "__base__"] * 2
        )
    torch.testing.assert_close(folded[0], first_draw[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(folded[5], base[2], rtol=1e-4, atol=1e-5)
    model.set_adapter("default")
    model.delete_adapter("second")
    assert not any("second" in n for n, _ in model.named_parameters())
    assert torch.equal(logits(model), first)
    with pytest.raises(ValueError, match="posteriors cannot be combined"):
        model.add_weighted_adapter(["default", "third"], [0.5, 0.5], "sum")


def test_merging_keeps_the_mean() -> None:
    model = blob()
    mean = logits(model)
    with pytest.warns(UserWarning, match="posterior mean only"):
        model.merge_adapter()
    torch.testing.assert_close(logits(model), mean, rtol=1e-4, atol=1e-5)
    model.train()
    torch.testing.assert_close(logits(model), mean, rtol=1e-4, atol=1e-5)
    model.eval()
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), mean, rtol=1e-4, atol=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = model.merge_and_unload(safe_merge=True)
    torch.testing.assert_close(logits(merged), mean, rtol=1e-4, atol=1e-5)
    assert not merged._forward_pre_hooks and not any("lora" in n for n in merged.state_dict())
    unloaded = blob().unload()
    torch.testing.assert_close(logits(unloaded), logits(llama()))


def test_transposed_base_weights() -> None:
    base = gpt2(GPT2LMHeadModel)
    model = fill(adapted(base, r=2, fan_in_fan_out=True, task_type=None), 0.4)
    mean = logits(model)
    with posterior(model, "sample"):
        assert not torch.equal(logits(model), mean)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(logits(model.merge_and_unload()), mean, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_base(bits: int, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    options: dict[str, Any] = {"load_in_8bit": True}
    if bits == 4:
        options = {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float32}
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 128,
    }  # of 4 bits whole blocks, as packing needs
    llama(**sizes).save_pretrained(tmp_path / "base")

    def base() -> Any:
        quantised = BitsAndBytesConfig(**options)
        return LlamaForCausalLM.from_pretrained(
            tmp_path / "base", quantization_config=quantised, device_map="cpu"
        )

    model = fill(adapted(base()), 0.4)
    assert type(bayes_layers(model)[0].layer).__name__ in ("Linear4bit", "Linear8bitLt")
    model.train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(item.rho.grad.abs().sum() > 0 for item in bayes_layers(model))
    model.eval()
    mean = logits(model)
    with posterior(model, "sample"):
        assert (logits(model) - mean).abs().max() > 1e-2
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(base(), tmp_path / "adapter")
    assert torch.equal(logits(loaded), mean)


def test_rejected_layers() -> None:
    attention = nn.Sequential(nn.MultiheadAttention(4, 2))
    with pytest.raises(
        ValueError, match=r"cannot carry .*: PEFT handles it with MultiheadAttention"
    ):
        get_peft_model(attention, BlobConfig(target_modules=["0"]))

    class TeLinear(nn.Module, LoraLayer):  # the class PEFT makes for Transformer Engine
        def __init__(self) -> None:
            super().__init__()
            LoraLayer.__init__(self, nn.Linear(2, 2))

    assert unsupported_layer(TeLinear()) == "PEFT handles it with TeLinear"


def test_checkpoints_are_restored_to_an_indexed_cpu(tmp_path: Path) -> None:
    """As transformers 5.17 asks for where processes on CPUs go on."""
    torch.save({"step": torch.arange(3)}, tmp_path / "optimizer.pt")
    place = torch.device("cpu:0")
    found = torch.load(tmp_path / "optimizer.pt", map_location=place, weights_only=True)
    assert torch.equal(found["step"], torch.arange(3))
