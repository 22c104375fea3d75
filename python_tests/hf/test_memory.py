"""What adapters keep from the forward to the backward pass: inputs in 8 bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

import tiny_models
from peft import PeftConfig
from torch import Tensor, nn

from bayes_kernels import functional
from bayes_kernels.hf import (
    BlobConfig,
    PolarConfig,
    PolarVbllConfig,
    ScalablConfig,
    fold_samples,
    posterior,
    variants,
)
from bayes_kernels.hf.config import BayesLoraConfig
from bayes_kernels.hf.variants import _QUANTIZED

CONFIGS = {"blob": BlobConfig, "scalabl": ScalablConfig, "polar": PolarConfig}
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
IDS = tiny_models.IDS


def model(config: Any = BlobConfig, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """A Llama in training, whose adapters do something."""
    layers = options.pop("layers", 2)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": layers}
    base = tiny_models.llama(**sizes).to(dtype)
    given = {"target_modules": ALL, **options}
    of = tiny_models.fill(tiny_models.adapted(base, config, **given)).train()
    for name, p in of.named_parameters():
        if "core" in name:  # PoLAR's starts as zeros
            nn.init.eye_(p)
    return of


def step(of: nn.Module, **inputs: Any) -> dict[str, Tensor]:
    """Gradients of the loss; every call draws the noise of the first step."""
    state = of.base_model.model.bayes_noise
    key = next(iter(state.keys.values())).clone()
    of(input_ids=IDS, labels=IDS, **inputs).loss.backward()
    state.set_key(key, set(state.keys))
    return tiny_models.gradients(of)


def kept(of: nn.Module) -> dict[torch.dtype, int]:
    """Bytes of different memory that a forward pass keeps, parameters left out, by dtype."""
    own = {p.untyped_storage().data_ptr() for p in of.parameters()}
    found: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        found[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = of(input_ids=IDS, labels=IDS).loss
    sums: dict[torch.dtype, int] = {}
    for where, t in found.items():
        if where not in own:
            sums[t.dtype] = sums.get(t.dtype, 0) + t.untyped_storage().nbytes()
    del loss
    return sums


@pytest.mark.parametrize(
    ("method", "dtype"), [*((m, torch.float32) for m in CONFIGS), ("blob", torch.bfloat16)], ids=str
)
def test_bytes_kept(method: str, dtype: torch.dtype) -> None:
    """q, k, v share one copy, gate and up another; attention keeps the input of o_proj anyway."""
    plain = kept(model(CONFIGS[method], dtype))
    eight = kept(model(CONFIGS[method], dtype, activation_bits=8))
    tokens, d, f, layers = IDS.numel(), 64, 96, 2
    numbers = layers * tokens * (d + d + d + f)  # attention, o_proj, MLP, down_proj
    assert eight[torch.int8] == numbers and eight[torch.uint8] == numbers // 32
    gone = plain[dtype] - eight[dtype]
    assert gone == layers * tokens * (d + d + f) * dtype.itemsize


@pytest.mark.parametrize(("method", "dropout"), [*((m, 0.0) for m in CONFIGS), ("blob", 0.25)])
def test_gradients(method: str, dropout: float) -> None:
    """Those of B and of the numbers in rank space are the same bits, those of A close."""
    of = CONFIGS[method]
    exact = step(model(of, lora_dropout=dropout))
    found = step(model(of, lora_dropout=dropout, activation_bits=8))
    assert found.keys() == exact.keys()
    for name, grad in found.items():
        if "lora_A" in name:
            error = (grad - exact[name]).norm() / exact[name].norm()
            assert 1e-4 < error < 0.05, name
        else:
            assert torch.equal(grad, exact[name]), name


@pytest.mark.parametrize("method", CONFIGS)
def test_checkpointing_and_compile_round_alike(method: str) -> None:
    of = CONFIGS[method]
    expected = step(model(of, activation_bits=8))
    for reentrant in (False, True) if method == "blob" else (False,):
        one = model(of, activation_bits=8)
        one.enable_input_require_grads()
        one.gradient_checkpointing_enable({"use_reentrant": reentrant})
        found = step(one)
        assert all(torch.equal(found[name], grad) for name, grad in expected.items()), reentrant


def test_compiled_without_a_break() -> None:
    options: Any = {"activation_bits": 8, "target_modules": ["q_proj", "v_proj"], "layers": 1}
    expected = step(model(**options))
    torch._dynamo.reset()
    found = step(torch.compile(model(**options), fullgraph=True, backend="aot_eager"))
    found = {name.replace("_orig_mod.", ""): grad for name, grad in found.items()}
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=2e-4, atol=2e-6)


def test_autocast() -> None:
    """One copy of x in 8 bits in place of a cast for each adapter."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain, eight = kept(model()), kept(model(activation_bits=8))
    assert eight[torch.int8] == 2 * IDS.numel() * (3 * 64 + 96)
    assert plain[torch.bfloat16] > eight[torch.bfloat16]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, exact = step(model(activation_bits=8)), step(model())
    assert all(torch.equal(g, exact[n]) for n, g in found.items() if "lora_B" in n)


def test_draws_in_the_batch() -> None:
    """Gradients under `posterior`, with a draw for each row."""
    grads = []
    for bits in (None, 8):
        of = model(activation_bits=bits)
        with posterior(of, draws=[0, 1, 2, 3], seed=3):
            of(input_ids=IDS, labels=IDS).loss.backward()
        grads.append(tiny_models.gradients(of))
    exact, found = grads
    assert all(torch.equal(g, exact[n]) for n, g in found.items() if "lora_B" in n)
    assert all((g - exact[n]).norm() < 0.05 * exact[n].norm() for n, g in found.items())


def test_steps_round_anew_and_evaluation_does_not_round() -> None:
    of = model(activation_bits=8)
    first = step(of)
    assert all(torch.equal(grad, first[name]) for name, grad in step(of).items())
    of(input_ids=IDS, labels=IDS).loss.backward()
    tiny_models.gradients(of)
    other = step(of)
    assert any(not torch.equal(grad, first[name]) for name, grad in other.items())
    seen = len(_QUANTIZED)
    with torch.no_grad():
        of.eval()(input_ids=IDS)
    assert len(_QUANTIZED) == seen == 0  # nothing outlives its tensor


def test_an_input_that_was_changed_is_rounded_again() -> None:
    of = model(activation_bits=8)
    variant = next(m.lora_variant["default"] for m in of.modules() if hasattr(m, "lora_variant"))
    x = torch.randn(2, 3, 64)
    first = variant.kept(x)
    assert variant.kept(x) is first
    x.add_(1.0)
    second = variant.kept(x)
    assert second is not first and not torch.equal(first.codes, second.codes)
    of.base_model.model.bayes_noise.advance()
    assert variant.kept(x) is not second


def test_draws_with_noise_for_each_token_round_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same rows under two draws: their rounding is as independent as their weights."""
    of, made = model(activation_bits=8, target_modules=["q_proj"]), []
    plain = functional.quantize_activations

    def recorded(x: Tensor, **options: Any) -> functional.QuantizedActivations:
        made.append(plain(x, **options))
        return made[-1]

    monkeypatch.setattr(functional, "quantize_activations", recorded)
    with posterior(of, n_samples=2, seed=3, scope="token"):
        of(input_ids=fold_samples({"input_ids": IDS}, 2)["input_ids"])
    first, second = made[:2]  # of the first layer, which sees the same numbers under both
    assert torch.equal(first.scales, second.scales)
    assert not torch.equal(first.codes, second.codes)


def test_copies_are_not_shared_across_streams_and_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Work on another CUDA stream, or captured in a graph, makes its own copy."""
    of = model(activation_bits=8)
    variant = next(m.lora_variant["default"] for m in of.modules() if hasattr(m, "lora_variant"))
    x, seen = torch.randn(2, 3, 64), []
    for queue in ((0, False), (1, False), (1, True), (1, False)):
        monkeypatch.setattr(variants, "_work_queue", lambda x, queue=queue: queue)
        seen.append(variant.kept(x))
        assert variant.kept(x) is seen[-1]
    assert len({id(kept) for kept in seen}) == 4


def test_input_of_inference_mode() -> None:
    """Such a tensor has no count of its changes, so that it is rounded each time."""
    of = model(activation_bits=8)
    variant = next(m.lora_variant["default"] for m in of.modules() if hasattr(m, "lora_variant"))
    with torch.inference_mode():
        x = torch.randn(2, 3, 64)
    first = variant.kept(x)
    with torch.inference_mode():
        x += 1.0
    assert not torch.equal(first.codes, variant.kept(x).codes)


def test_options(tmp_path: Any) -> None:
    with pytest.raises(ValueError, match=r"activation_bits must be one of \(8,\), got 4"):
        BlobConfig(activation_bits=4)
    with pytest.raises(ValueError, match=r"activation_bits needs ranks of at most 64, .* got 65"):
        BlobConfig(activation_bits=8, rank_pattern={"q_proj": 65})
    config = BayesLoraConfig(method="polar-vbll", activation_bits=8, target_modules=["q"])
    assert isinstance(config, PolarVbllConfig)
    config.save_pretrained(str(tmp_path))
    assert PeftConfig.from_pretrained(str(tmp_path)).activation_bits == 8
