"""Adapters of every method on base models of other types: trained, saved, loaded, with the same draws."""

from __future__ import annotations

import importlib.util
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accuracy import assert_same_but_rounding
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from tiny_models import ROWS, adapted, arguments, fill, llama, logits
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaForSequenceClassification,
    Trainer,
)

from bayes_kernels.hf import (
    BayesTrainer,
    BlobConfig,
    PolarConfig,
    PolarVbllConfig,
    ScalablConfig,
    bayesianize,
    class_logits,
    drawn_weights,
    load_laplace,
    posterior,
    predict,
    save_laplace,
)
from bayes_kernels.hf._compat import unsupported_layer

pytestmark = [pytest.mark.cpu_only, pytest.mark.filterwarnings("ignore")]

BATCHES = [{"input_ids": ROWS[i : i + 4], "labels": ROWS[i : i + 4]} for i in (0, 4)]
DATA = [{"input_ids": row, "labels": row} for row in ROWS[:8]]
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}  # torchao's groups


def bitsandbytes(**options: Any) -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(**options)


_OF_BITSANDBYTES = ("adamw_bnb_8bit", "paged_adamw_8bit", "paged_adamw_32bit")


def torchao() -> Any:
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def with_hqq(model: Any) -> Any:
    """Its projections quantised: transformers 5 does not load HQQ yet, PEFT adapts it."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    settings = BaseQuantizeConfig(nbits=8, group_size=64)
    for layer in model.model.layers:
        for name in ("q_proj", "v_proj"):
            old = getattr(layer.self_attn, name)
            new = HQQLinear(old, settings, compute_dtype=torch.float32, device="cpu")
            setattr(layer.self_attn, name, new)
    return model


# Package, quantisation, dtype, class of PEFT's layers.
BASES: dict[str, tuple[str, Callable[[], Any] | None, torch.dtype, str]] = {
    "fp32": ("torch", None, torch.float32, "Linear"),
    "bf16": ("torch", None, torch.bfloat16, "Linear"),
    "int8": (
        "bitsandbytes",
        lambda: bitsandbytes(load_in_8bit=True),
        torch.float32,
        "Linear8bitLt",
    ),
    "nf4": (
        "bitsandbytes",
        lambda: bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
        torch.float32,
        "Linear4bit",
    ),
    "torchao": ("torchao", torchao, torch.bfloat16, "TorchaoLoraLinear"),
    "hqq": ("hqq", None, torch.float32, "HqqLoraLinear"),
}
CONFIGS = {"blob": BlobConfig, "scalabl": ScalablConfig, "polar": PolarConfig}
METHODS = [*CONFIGS, "tfb", "laplace"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    llama(initializer_range=0.1, **SIZES).save_pretrained(folder)
    return folder


def options_of(kind: str) -> dict[str, Any]:
    package, quantised, dtype, _ = BASES[kind]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    options: dict[str, Any] = {"dtype": dtype}
    if quantised is not None:
        options |= {"quantization_config": quantised(), "device_map": "cpu"}
    return options


def trained(base: Any, method: str) -> Any:
    """An adapter after two steps."""
    config = CONFIGS.get(method, LoraConfig)
    model = fill(adapted(base, config), rho=0.3)
    kind: Any = BayesTrainer if method in CONFIGS else Trainer
    more: dict[str, Any] = {"n_train": 40} if method in CONFIGS else {}
    kind(model=model, args=arguments("run", max_steps=2), train_dataset=DATA, **more).train()
    model.eval()
    if method not in CONFIGS:
        batches = [{**batch, "labels": batch["labels"][:, 0] % 3} for batch in BATCHES]
        bayesianize(model, method, batches, choices=[5, 6, 7], progress=False)
    return model


def draw_of(model: nn.Module, method: str) -> torch.Tensor | None:
    if method == "polar":
        return None
    chosen: Any = drawn_weights if method == "laplace" else posterior
    with chosen(model, seed=4):
        return logits(model).float()


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("method", METHODS)
def test_round_trip(
    method: str, kind: str, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options = options_of(kind)

    def base() -> Any:
        model = AutoModelForCausalLM.from_pretrained(saved, **options)
        return with_hqq(model) if kind == "hqq" else model

    model = trained(base(), method)
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    assert type(layer).__name__ == BASES[kind][3]
    # Before it is saved: bitsandbytes damages a 4-bit base that has predicted on a CPU then.
    mean, draw = logits(model).float(), draw_of(model, method)
    assert (mean - logits(base()).float()).abs().max() > 1e-3
    model.save_pretrained(tmp_path)
    if method == "laplace":
        save_laplace(model, tmp_path)
    loaded: list[Any] = [PeftModel.from_pretrained(base(), tmp_path).eval()]
    if method != "laplace" and kind != "hqq":  # its posterior is read for a PeftModel
        loaded.append(AutoModelForCausalLM.from_pretrained(tmp_path, **options).eval())
    for other in loaded:
        if method == "laplace":
            load_laplace(other, tmp_path)
        same(factors(other), factors(model))
        assert_same_but_rounding(logits(other), mean)
        if draw is not None:
            found = draw_of(other, method)
            assert found is not None
            assert_same_but_rounding(found, draw)
            assert (draw - mean).abs().max() > 1e-3


@pytest.mark.parametrize("kind", [kind for kind in BASES if kind != "hqq"])
def test_round_trip_of_a_variational_last_layer(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PoLAR-VBLL, whose last layer takes the place of a classifier's head, which is not quantised."""
    monkeypatch.chdir(tmp_path)
    options = options_of(kind)
    sizes = {"num_labels": 3, "pad_token_id": 0, "initializer_range": 0.1, **SIZES}
    llama(LlamaForSequenceClassification, **sizes).save_pretrained(tmp_path / "base")

    def base() -> Any:
        return AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", **options)

    model = adapted(base(), PolarVbllConfig, task_type="SEQ_CLS")
    data = [{"input_ids": row, "labels": int(row[0]) % 3} for row in ROWS[:8]]
    args = arguments("run", max_steps=2, learning_rate=0.01)
    BayesTrainer(model=model, args=args, train_dataset=data, n_train=40).train()
    model.eval()
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    assert type(layer).__name__ == BASES[kind][3]
    batch = {"input_ids": ROWS[:4]}
    # Without gradients on both sides: bitsandbytes multiplies in bf16 where the input needs none.
    with torch.no_grad():
        found = class_logits(model, batch)
    drawn = predict(model, batch, n_samples=100, seed=4).log_probs
    model.save_pretrained(tmp_path / "adapter")
    other = PeftModel.from_pretrained(base(), tmp_path / "adapter").eval()
    same(factors(other), factors(model))
    with torch.no_grad():
        loaded = class_logits(other, batch)
    for mine, theirs in zip(found, loaded, strict=True):
        assert_same_but_rounding(theirs, mine)
    again = predict(other, batch, n_samples=100, seed=4).log_probs
    assert_same_but_rounding(again, drawn)
    assert (drawn - found[0].log_softmax(-1)).abs().max() > 1e-3


def factors(model: nn.Module) -> dict[str, torch.Tensor]:
    """The adapter's tensors, by names that do not depend on the wrapper."""
    own = {n.removeprefix("base_model.model."): p for n, p in model.named_parameters()}
    return {n: p.detach() for n, p in own.items() if ".lora_" in n}


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype == torch.float32, name
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("optim", [*_OF_BITSANDBYTES, "adamw_torch_8bit", "adamw_torch_4bit"])
def test_small_optimisers(optim: str, tmp_path: Path) -> None:
    args = arguments(tmp_path, optim=optim, max_steps=2)
    polar = fill(adapted(llama(), PolarConfig))
    with pytest.raises(
        ValueError, match=f"PoLAR adapters need optim='adamw_torch'.* got '{optim}'"
    ):
        BayesTrainer(model=polar, args=args, train_dataset=DATA, n_train=40).train()

    if optim not in _OF_BITSANDBYTES:
        return  # torchao compiles its step, which takes over a minute
    pytest.importorskip("bitsandbytes")
    if "paged" in optim and not torch.cuda.is_available():
        pytest.skip("pages of an optimiser need a GPU")
    model = fill(adapted(llama(), BlobConfig))
    before = factors(model)
    before = {name: value.clone() for name, value in before.items()}
    args.optim = optim
    BayesTrainer(model=model, args=args, train_dataset=DATA, n_train=40).train()
    assert all(not torch.equal(value, before[name]) for name, value in factors(model).items())


@pytest.mark.parametrize("name", ["te"])
def test_layers_without_the_hook_are_named(name: str) -> None:
    """PEFT's class for this base does not hand over to the formula, and is not let through."""
    spec = importlib.util.find_spec(f"peft.tuners.lora.{name}")
    if spec is None or spec.origin is None:
        pytest.skip("not in this release of PEFT")
    text = Path(spec.origin).read_text(encoding="utf-8")
    classes = re.findall(r"class (\w+)\((?:torch\.)?nn\.Module, LoraLayer\)", text)
    assert classes and "lora_variant[" not in text
    for one in classes:
        found = type(one, (LoraLayer, nn.Linear), {"__init__": lambda *_: None})
        reason = unsupported_layer(object.__new__(found))
        assert reason == f"PEFT handles it with {one}"


# --- Targets -------------------------------------------------------------------------------------


def test_targets_that_match_nothing() -> None:
    targets = ["q_proj", "value", "mlp.up"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        adapted(llama(), BlobConfig, target_modules=targets)
    said = [str(w.message) for w in caught if "target_modules" in str(w.message)]
    assert len(said) == 1 and said[0].startswith("target_modules: mlp.up, value must each be")
    assert "adapted are q_proj" in said[0]


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "mlp.up_proj", "model.layers.1.self_attn.v_proj"]},
        {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [0]},
        {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["v_proj"]},
        {"target_modules": "all-linear"},
        {"target_modules": r".*\.q_proj"},
        {
            "target_modules": [
                f"model.layers.{i}.self_attn.{p}_proj" for i in (0, 1) for p in "qkvo"
            ]
        },
    ],
)
def test_targets_that_match_are_quiet(options: dict[str, Any]) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = adapted(llama(), BlobConfig, **options)
        model.add_adapter("more", BlobConfig(**{**options, "r": 2}))
    assert not [w for w in caught if "target_modules" in str(w.message)]
