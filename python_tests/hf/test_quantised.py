"""Layers of PEFT for AWQ, GPTQ and AQLM, which PEFT puts on stand-ins for the layers of those packages."""

from __future__ import annotations

import ast
import copy
import importlib.machinery
import importlib.util
import pickle
import sys
import types
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import IDS, ROWS, arguments, fill, llama, logits
from torch import Tensor, nn

from bayes_kernels.hf import (
    BayesTrainer,
    BlobConfig,
    PolarConfig,
    ScalablConfig,
    bayesianize,
    export_lora,
    posterior,
)
from bayes_kernels.hf._compat import LAYERS_WITHOUT_HOOK
from bayes_kernels.hf.layers import bayes_layers

pytestmark = pytest.mark.filterwarnings("ignore")

CONFIGS = {"blob": BlobConfig, "scalabl": ScalablConfig, "polar": PolarConfig}
OPTIONS: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
LAYERS = {"awq": "AwqLoraLinear", "gptq": "GPTQLoraLinear", "aqlm": "AqlmLoraLinear"}


class BaseQuantLinear(nn.Module):
    """Stand-in for the class that PEFT asks for: rows of integers with a scale, no `weight`."""

    method = ""
    scale: Tensor
    qweight: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach()
        scale = weight.abs().amax(1, keepdim=True) / 127
        self.register_buffer("scale", scale)
        self.register_buffer("qweight", (weight / scale).round().to(torch.int8))
        self.register_buffer("codes", self.qweight)

    @property
    def SUPPORTS_METHODS(self) -> list[Any]:
        return [types.SimpleNamespace(value=self.method)]

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.qweight.to(x.dtype) * self.scale.to(x.dtype)).T


@pytest.fixture(params=list(LAYERS))
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """PEFT finds a package with our stand-in for its layers."""
    lora = "peft.tuners.lora"
    if request.param == "aqlm":
        monkeypatch.setattr(f"{lora}.aqlm.is_aqlm_available", lambda: True)
        monkeypatch.setattr(f"{lora}.aqlm.QuantizedLinear", BaseQuantLinear, raising=False)
    else:
        for name in ("gptqmodel", "gptqmodel.nn_modules", "gptqmodel.nn_modules.qlinear"):
            module: Any = types.ModuleType(name)
            module.__spec__ = importlib.machinery.ModuleSpec(name, None)
            module.BaseQuantLinear = BaseQuantLinear
            monkeypatch.setitem(sys.modules, name, module)
        for place in (f"{lora}.awq", f"{lora}.gptq", "peft.utils.other"):
            monkeypatch.setattr(f"{place}.is_gptqmodel_available", lambda: True)
    monkeypatch.setattr(BaseQuantLinear, "method", request.param)
    return request.param


def base(dtype: torch.dtype = torch.float32) -> Any:
    model = llama(initializer_range=0.1).to(dtype)
    for layer in model.model.layers:
        for name in ("q_proj", "v_proj"):
            old = getattr(layer.self_attn, name)
            setattr(layer.self_attn, name, BaseQuantLinear(old))
    return model


def filled(model: Any) -> Any:
    generator = torch.Generator().manual_seed(2)
    fill(model, rho=0.4)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_core" in name:
                p.copy_(torch.randn(p.shape, generator=generator))
    return model.eval()


@pytest.mark.parametrize("method", CONFIGS)
def test_round_trip(method: str, kind: str, tmp_path: Path) -> None:
    """The mean, draws and files are those of the same adapter on the unpacked weights."""
    model = filled(get_peft_model(base(), CONFIGS[method](**OPTIONS)))
    item = bayes_layers(model)[0]
    assert type(item.layer).__name__ == LAYERS[kind]
    args = arguments(tmp_path / "run", max_steps=2)
    data = [{"input_ids": row, "labels": row} for row in ROWS[:8]]
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    BayesTrainer(model=model, args=args, train_dataset=data, n_train=40).train()
    assert before and all(
        not torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before
    )
    mean = logits(model.eval())
    assert (mean - logits(base())).abs().max() > 1e-2
    model.save_pretrained(str(tmp_path / "adapter"))
    again = PeftModel.from_pretrained(base(), str(tmp_path / "adapter")).eval()
    assert torch.equal(logits(again), mean)
    export_lora(model, tmp_path / "mean")
    plain = PeftModel.from_pretrained(base(), str(tmp_path / "mean")).eval()
    torch.testing.assert_close(logits(plain), mean, rtol=1e-4, atol=1e-5)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(base()))
    if method == "polar":
        return
    with posterior(model, draws=[0, 1, 2, 3], seed=4):
        drawn = logits(model)
    with posterior(again, draws=[0, 1, 2, 3], seed=4):
        assert torch.equal(logits(again), drawn)
    for number in range(4):
        export_lora(model, tmp_path / "draw", number, seed=4)
        plain = PeftModel.from_pretrained(base(), str(tmp_path / "draw")).eval()
        torch.testing.assert_close(logits(plain)[number], drawn[number], rtol=1e-4, atol=1e-5)
    assert (drawn - mean).abs().max() > 1e-3


def test_beside_plain_lora_and_converted(kind: str) -> None:
    plain = filled(get_peft_model(base(), LoraConfig(**OPTIONS)))
    mean = logits(plain)
    data = [{"input_ids": IDS, "labels": torch.tensor([0, 1, 2, 0])}]
    bayesianize(plain, "tfb", data, choices=[5, 6, 7], progress=False)
    torch.testing.assert_close(logits(plain), mean, rtol=1e-4, atol=1e-5)
    assert type(bayes_layers(plain)[0].layer).__name__ == LAYERS[kind]
    for dtype, small in ((torch.float32, 1e-5), (torch.bfloat16, 0.1)):
        model = get_peft_model(base(dtype), BlobConfig(**OPTIONS))
        model.add_adapter("plain", LoraConfig(**OPTIONS))
        filled(model)
        tuner: Any = model.base_model
        tuner.set_adapter(["default", "plain"])
        layer: Any = bayes_layers(model)[0].layer
        x = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(1)).to(dtype)
        with torch.no_grad():
            expected = layer.base_layer(x).double()
            for name in ("default", "plain"):
                a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
                expected = expected + 2.0 * x.double() @ a.double().T @ b.double().T
            found = layer(x)
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), expected, rtol=small, atol=small)


@pytest.mark.parametrize("name", ["awq", "aqlm", "eetq"])
def test_the_forward_that_is_replaced_is_the_one_we_know(name: str) -> None:
    """A release of PEFT whose layer does more, or has the hook, has to be looked at."""
    spec = importlib.util.find_spec(f"peft.tuners.lora.{name}")
    assert spec is not None and spec.origin is not None
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    (found,) = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and node.name in LAYERS_WITHOUT_HOOK
    ]
    (forward,) = [f for f in found.body if isinstance(f, ast.FunctionDef) and f.name == "forward"]
    assert [a.arg for a in forward.args.args] == ["self", "x"] and forward.args.kwarg is None
    calls = {ast.unparse(n.func) for n in ast.walk(forward) if isinstance(n, ast.Call)}
    known = {
        *("lora_A", "lora_B", "dropout", "self.lora_A.keys", "torch.is_autocast_enabled"),
        *("self._cast_input_dtype", "output.to"),
    }
    more = calls - known - {"self.quant_linear_module", "self.base_layer"}
    if more:
        pytest.fail(
            f"peft {peft.__version__}: {found.name}.forward calls {more}; quantised.py replaces it"
        )


def test_copies_use_their_own_factors(kind: str) -> None:
    model = filled(get_peft_model(base(), BlobConfig(**OPTIONS)))
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            for item in bayes_layers(again):
                item.view.lora_B["default"].weight.zero_()
        assert torch.equal(logits(again), logits(base()))
    assert not torch.equal(logits(model), logits(base()))
