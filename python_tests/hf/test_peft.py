"""What PEFT promises for its own types, for every method, with plain LoRA as the control."""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    EvaConfig,
    convert_to_lora,
    get_peft_model,
    initialize_lora_eva_weights,
    set_peft_model_state_dict,
)
from tiny_models import IDS, gpt2
from torch import Tensor, nn

from bayes_kernels.hf import BlobConfig, PolarVbllConfig, kl_divergence
from bayes_kernels.hf.layers import bayes_layers
from bayes_kernels.hf.variants import VARIANTS
from hf.peft_adapters import (
    ALL,
    CONFIGS,
    IN,
    MIDDLE,
    OUT,
    X,
    adapted,
    bayesian,
    every,
    fill,
    net,
    same,
    snapshot,
)

# --- the update, wherever PEFT asks for it -------------------------------------------------------


@every
@torch.no_grad()
def test_converted_to_lora(method: str) -> None:
    model = adapted(method)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config, state = convert_to_lora(model, 4)
    plain = get_peft_model(net(), config).eval()
    set_peft_model_state_dict(plain, state)
    torch.testing.assert_close(plain(X), model(X), rtol=1e-4, atol=1e-5)
    assert (model(X) - net()(X)).abs().max() > 0.1


@every
@torch.no_grad()
def test_update_of_a_layer(method: str) -> None:
    model = adapted(method)
    layer: Any = model.base_model.model[0]
    delta = layer.get_delta_weight("default")
    assert delta.shape == (MIDDLE, IN)
    expected = layer.get_base_layer()(X) + X @ delta.T
    torch.testing.assert_close(layer(X), expected, rtol=1e-4, atol=1e-5)
    again = copy.deepcopy(model).base_model.model[0]
    again.lora_B["default"].weight.mul_(2)
    torch.testing.assert_close(again.get_delta_weight("default"), 2 * delta)
    torch.testing.assert_close(layer.get_delta_weight("default"), delta, rtol=0, atol=0)
    read = pickle.loads(pickle.dumps(model)).base_model.model[0]
    torch.testing.assert_close(read.get_delta_weight("default"), delta, rtol=0, atol=0)


@every
@torch.no_grad()
def test_double_precision_survives_merging(method: str) -> None:
    model = adapted(method).double()
    x = X.double()
    before = model(x)
    factors = model.base_model.model[0].lora_A["default"].weight.dtype
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.merge_adapter()
    # PoLAR keeps its factors, and so their product, in fp32.
    small = 1e-12 if factors == torch.float64 else 1e-5
    torch.testing.assert_close(model(x), before, rtol=small, atol=small)


@pytest.mark.parametrize("method", [*ALL, "polar-vbll"])
@pytest.mark.parametrize("safe", [False, True])
@torch.no_grad()
def test_merged_into_gpt2(method: str, safe: bool) -> None:
    """Conv1D keeps its weight as (in, out), and c_attn is 24 x 72."""
    config = {**ALL, "polar-vbll": PolarVbllConfig}[method]
    options = {"target_modules": ["c_attn", "mlp.c_proj"], "task_type": "SEQ_CLS", "r": 4}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = fill(get_peft_model(gpt2(pad_token_id=0), config(**options))).eval()
        before, base = model(input_ids=IDS).logits, gpt2(pad_token_id=0)(input_ids=IDS).logits
        layers = [m for m in model.modules() if hasattr(m, "get_delta_weight")]
        assert len(layers) == 2
        for layer in layers:
            assert layer.get_delta_weight("default").shape == layer.get_base_layer().weight.shape
        model.merge_adapter(safe_merge=safe)
        torch.testing.assert_close(model(input_ids=IDS).logits, before, rtol=1e-4, atol=1e-5)
        model.unmerge_adapter()
        torch.testing.assert_close(model(input_ids=IDS).logits, before, rtol=1e-4, atol=1e-5)
        merged = model.merge_and_unload(safe_merge=safe)
    assert not any("lora_" in name for name, _ in merged.named_modules())
    torch.testing.assert_close(merged(input_ids=IDS).logits, before, rtol=1e-4, atol=1e-5)
    assert (before - base).abs().max() > 0.01


# --- ranks that PEFT changes ---------------------------------------------------------------------


def calibration() -> list[Tensor]:
    """Inputs of low rank, so that EVA takes ranks away from the first layer."""
    generator = torch.Generator().manual_seed(5)
    basis = torch.randn(2, IN, generator=generator)
    noise = [torch.randn(16, IN, generator=generator) * 0.01 for _ in range(12)]
    return [torch.randn(16, 2, generator=generator) @ basis + n for n in noise]


@every
@pytest.mark.parametrize("empty", [False, True])
def test_eva_changes_the_ranks(method: str, empty: bool) -> None:
    config = ALL[method](
        target_modules=["0", "2"], r=6, init_lora_weights="eva", eva_config=EvaConfig(rho=2.0)
    )
    model = get_peft_model(net(), config, low_cpu_mem_usage=empty)
    initialize_lora_eva_weights(
        model,
        calibration(),
        forward_fn=lambda module, batch: module(batch),
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=None,
        show_progress_bar=False,
    )
    layers: Any = [model.base_model.model[i] for i in (0, 2)]
    ranks = [layer.lora_A["default"].weight.shape[0] for layer in layers]
    assert ranks[0] < 6 < ranks[1]
    variant = VARIANTS.get(method.partition("-")[0])
    for layer, rank in zip(layers, ranks, strict=True):
        for name in variant.tensors(config.to_dict()) if variant else ():
            tensor = getattr(layer, name)["default"]
            assert tensor.shape[0] == rank and tensor.dtype == torch.float32
    model.eval()
    torch.testing.assert_close(model(X), net()(X), rtol=1e-4, atol=1e-5)  # nothing was added yet
    model.train()
    model(X).square().sum().backward()
    missing = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing
    if method != "lora":
        assert kl_divergence(model).isfinite()
        # A is what EVA put there: orthonormal directions of the layer's input.
        a = bayes_layers(model)[0].variant.mean_factors(layers[0], "default")[0].float()
        torch.testing.assert_close(a @ a.T, torch.eye(ranks[0]), rtol=0, atol=1e-4)


# --- refusals leave the model as it was ------------------------------------------------------------


class Embedded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(IN, OUT)
        self.table = nn.Embedding(9, OUT, max_norm=1.0)  # no method adapts one that rescales itself
        self.last = nn.Linear(OUT, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x) + self.table.weight[0])


@bayesian
@pytest.mark.parametrize("start", ["base", "adapter"])
def test_a_refused_layer_leaves_the_model_as_it_was(method: str, start: str) -> None:
    base = Embedded()
    modules, parameters = dict(base.named_modules()), dict(base.named_parameters())
    hooks = len(base._forward_pre_hooks), len(base._forward_hooks)
    if start == "base":
        with pytest.raises(ValueError, match="target table"):
            get_peft_model(base, CONFIGS[method](target_modules=["first", "table", "last"], r=2))
        assert dict(base.named_modules()) == modules and not hasattr(base, "bayes_noise")
        assert all(a is b for a, b in zip(base.parameters(), parameters.values(), strict=True))
        assert (len(base._forward_pre_hooks), len(base._forward_hooks)) == hooks
        assert all(p.requires_grad for p in base.parameters())
    model = fill(get_peft_model(base, CONFIGS[method](target_modules=["first"], r=2)))
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained and all(".first.lora_" in n for n in trained)
    if start == "adapter":
        before, out = snapshot(model), model.eval()(X)
        with pytest.raises(ValueError, match="target table"):
            model.add_adapter("b", CONFIGS[method](target_modules=["first", "table"], r=2))
        assert same(before, snapshot(model)) and list(model.peft_config) == ["default"]
        torch.testing.assert_close(model(X), out, rtol=0, atol=0)
        model.add_adapter("b", CONFIGS[method](target_modules=["first", "last"], r=2))
        assert {item.name for item in bayes_layers(model, "b")} == {"first", "last"}


def test_a_refused_head_leaves_the_model_as_it_was() -> None:
    base = gpt2(pad_token_id=0)
    head = base.score
    with pytest.raises(ValueError, match=r"target transformer\.wte"):
        get_peft_model(
            base,
            PolarVbllConfig(
                target_modules=["wte", "c_attn"], task_type="SEQ_CLS", r=2, head_init="vbll"
            ),
        )
    assert base.score is head and not hasattr(base, "bayes_noise")


# --- adapters beside each other -------------------------------------------------------------------


@bayesian
def test_names_that_are_part_of_other_names(method: str, tmp_path: Path) -> None:
    """A tensor that another adapter's name or a layer's has in common is not a missing one."""
    model = get_peft_model(gpt2(pad_token_id=0), CONFIGS[method](target_modules=["c_attn"], r=2))
    model.save_pretrained(tmp_path)
    for name in ("a", "lora_A", "c_attn", "default2"):
        model.load_adapter(str(tmp_path), name)
    base = gpt2(pad_token_id=0)
    for name in ("default", "a", "second"):
        base.load_adapter(str(tmp_path), adapter_name=name)
    assert list(base.peft_config) == ["default", "a", "second"]


def test_a_refused_adapter_is_not_left_beside_the_others(tmp_path: Path) -> None:
    config = BlobConfig(target_modules=["c_attn"], r=2)
    get_peft_model(gpt2(pad_token_id=0), config).save_pretrained(tmp_path)
    base = gpt2(n_layer=2)
    model = get_peft_model(base, BlobConfig(target_modules=["c_attn"], r=2))
    with pytest.raises(ValueError, match="must hold every tensor"):
        model.load_adapter(str(tmp_path), adapter_name="second")
    assert list(model.peft_config) == ["default"]
    assert not any(".second" in name for name, _ in model.named_parameters())


# --- quantised bases ---------------------------------------------------------------------------------


class Quantizer:
    """What transformers asks a quantiser for; torchao's says yes to every `nn.Linear`."""

    def __init__(self, left_out: list[str] | None) -> None:
        self.modules_to_not_convert = left_out


@bayesian
@pytest.mark.parametrize("left_out", [None, ["lm_head"]])
def test_a_quantiser_leaves_the_factors_alone(method: str, left_out: list[str] | None) -> None:
    from transformers.quantizers.quantizers_utils import should_convert_module

    base = net()
    base.hf_quantizer = Quantizer(left_out)
    model = get_peft_model(base, CONFIGS[method](target_modules=["0"]))
    patterns = base.hf_quantizer.modules_to_not_convert
    names = [name for name, _ in model.get_base_model().named_parameters()]
    factors = [name for name in names if ".lora_A." in name or ".lora_B." in name]
    assert len(factors) == 2 and not any(should_convert_module(n, patterns) for n in factors)
    assert all(should_convert_module(n, patterns) for n in names if ".lora_" not in n)
    assert not left_out or not should_convert_module("lm_head.weight", patterns)
    assert should_convert_module("model.layers.0.q_proj.weight", patterns)
