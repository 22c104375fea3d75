"""Plain LoRA beside Bayesian adapters in one model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AdaLoraConfig,
    LoraConfig,
    PeftMixedModel,
    PeftModel,
    get_peft_model,
    inject_adapter_in_model,
)
from peft.tuners.lora import LoraLayer, LoraModel
from peft.utils import hotswap
from tiny_models import IDS, ROWS, adapted, arguments, bert, fill, llama, logits
from torch import nn
from transformers import Trainer

from bayes_kernels.hf import (
    BayesTrainer,
    BlobConfig,
    PolarVbllConfig,
    ScalablConfig,
    export_lora,
    posterior,
    predict,
)
from bayes_kernels.hf.layers import bayes_layers
from bayes_kernels.hf.swap import make_plain
from hf.test_experts import moe

pytestmark = pytest.mark.filterwarnings("ignore")

METHODS = {"blob": BlobConfig, "scalabl": ScalablConfig}
OPTIONS: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
DATA = [{"input_ids": row, "labels": row} for row in ROWS[:8]]
PLAIN: dict[str, Any] = {**OPTIONS, "target_modules": ["q_proj", "up_proj"], "r": 2}


def both(first: str = "blob", method: Any = BlobConfig, dtype: torch.dtype = torch.float32) -> Any:
    """Adapters "blob", active, and "plain", of which `first` came first, with the same factors always."""
    base = llama(initializer_range=0.1).to(dtype)
    configs = {"blob": method(**OPTIONS), "plain": LoraConfig(**PLAIN)}
    order = [first, *(name for name in configs if name != first)]
    model = get_peft_model(base, configs[order[0]], adapter_name=order[0])
    model.add_adapter(order[1], configs[order[1]])
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            if "lora_" in name and "log" not in name:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
            elif "log_s_sigma" in name:
                p.fill_(-1.0)
    model.set_adapter("blob")
    return model.eval()


def _tuner(model: PeftModel) -> Any:
    return model.base_model


def alone(model: Any, name: str, folder: Path) -> Any:
    """One of the adapters in a model of its own, through its file."""
    model.save_pretrained(str(folder))
    return PeftModel.from_pretrained(llama(initializer_range=0.1), str(folder / name)).eval()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("first", ["blob", "plain"])
def test_switching(first: str, method: str, tmp_path: Path) -> None:
    model = both(first, METHODS[method])
    bayes, plain = alone(model, "blob", tmp_path), alone(model, "plain", tmp_path)
    assert type(plain.base_model).__name__ == "LoraModel"
    for _ in range(2):
        model.set_adapter("blob")
        assert torch.equal(logits(model), logits(bayes))
        with posterior(model, n_samples=2, seed=3):
            drawn = logits(model)
        with posterior(bayes, n_samples=2, seed=3):
            assert torch.equal(drawn, logits(bayes))
        model.set_adapter("plain")
        assert torch.equal(logits(model), logits(plain))
        with posterior(model, n_samples=2, seed=3):
            assert torch.equal(logits(model), logits(plain))
        with model.disable_adapter():
            assert torch.equal(logits(model), logits(llama(initializer_range=0.1)))
    found: Any = predict(model, {"input_ids": IDS}, n_samples=0, choices=[5, 6])
    expected: Any = predict(plain, {"input_ids": IDS}, n_samples=0, choices=[5, 6])
    assert torch.equal(found.log_probs, expected.log_probs)
    with pytest.raises(ValueError, match="are not active; call set_adapter with the name of a Bay"):
        predict(model, {"input_ids": IDS}, n_samples=2, choices=[5, 6])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_active(dtype: torch.dtype) -> None:
    """Each layer adds up its adapters, on a half-precision base too."""
    model = both(dtype=dtype)
    _tuner(model).set_adapter(["blob", "plain"])
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    x = torch.randn(4, 6, 32, generator=torch.Generator().manual_seed(1)).to(dtype)
    with torch.no_grad():
        found = layer(x)
        expected = layer.get_base_layer()(x).double()
        for name in ("blob", "plain"):
            expected = expected + x.double() @ layer.get_delta_weight(name).double().T
        small = 1e-5 if dtype == torch.float32 else 3e-2
        torch.testing.assert_close(found.double(), expected, rtol=small, atol=small)
        assert found.dtype == dtype
        item = next(i for i in bayes_layers(model) if i.name.endswith("0.self_attn.q_proj"))
        with posterior(model, n_samples=2, seed=5):
            drawn = layer(x)
        for draw in (0, 1):
            a, b = item.factors(draw, 5)
            change = 2.0 * (b.double() @ a.double()) - layer.get_delta_weight("blob").double()
            rows = slice(2 * draw, 2 * draw + 2)
            part = expected[rows] + x[rows].double() @ change.T
            torch.testing.assert_close(drawn[rows].double(), part, rtol=small, atol=small)


@pytest.mark.parametrize("kind", ["antithetic", "shared"])
def test_an_adapter_for_each_row(kind: str, tmp_path: Path) -> None:
    model = both()
    bayes, plain = alone(model, "blob", tmp_path), alone(model, "plain", tmp_path)
    base = llama(initializer_range=0.1)
    names = ["blob", "plain", "__base__", "blob"]
    found = logits(model, adapter_names=names)
    parts = [bayes, plain, base, bayes]
    for row, other in enumerate(parts):
        torch.testing.assert_close(found[row], logits(other)[row], rtol=1e-5, atol=1e-5)
    draws = [4, 0, 0, 1]
    with posterior(model, draws=draws, seed=3, kind=kind):
        found = logits(model, adapter_names=names)
    with posterior(bayes, draws=draws, seed=3, kind=kind):
        drawn = logits(bayes)
    for row, expected in enumerate((drawn, logits(plain), logits(base), drawn)):
        torch.testing.assert_close(found[row], expected[row], rtol=1e-5, atol=1e-5)
    with posterior(model, n_samples=2, seed=3, kind=kind):  # two copies of two examples
        found = logits(model, adapter_names=names)
    with posterior(bayes, n_samples=2, seed=3, kind=kind):
        torch.testing.assert_close(found[3], logits(bayes)[3], rtol=1e-5, atol=1e-5)
    for wrong in ({"draws": [0, 1, 2]}, {"n_samples": 2, "scope": "token"}):
        with pytest.raises(ValueError, match="adapter_names needs scope='example' and a batch of"):
            with posterior(model, **wrong):  # type: ignore[arg-type]
                logits(model, adapter_names=names)


def test_rows_of_embeddings() -> None:
    """PEFT's embeddings have no variants there, so that draws would be the mean in silence."""
    model = get_peft_model(nn.Sequential(nn.Embedding(64, 8)), BlobConfig(target_modules=["0"]))
    model.add_adapter("plain", LoraConfig(target_modules=["0"]))
    fill(model, rho=0.5)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "embedding_B" in name or "embedding_A" in name:
                p.normal_()
    model.eval()
    layer: Any = model.get_base_model()[0]  # type: ignore[index]
    with torch.no_grad(), posterior(model, draws=[5, 6, 7, 8], seed=1):
        found = layer(IDS, adapter_names=["default", "plain", "default", "__base__"])
        expected = layer(IDS)
        model.set_adapter("plain")
        torch.testing.assert_close(found[1], layer(IDS)[1])
    torch.testing.assert_close(found[[0, 2]], expected[[0, 2]])
    assert torch.equal(found[3], layer.get_base_layer()(IDS)[3])


def test_training_one_beside_the_other(tmp_path: Path) -> None:
    model = get_peft_model(llama(), LoraConfig(**PLAIN))
    model.add_adapter("blob", BlobConfig(**OPTIONS))
    args = arguments(tmp_path, max_steps=2)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}

    def changed() -> set[str]:
        now = dict(model.named_parameters())
        found = {n for n, old in before.items() if not torch.equal(old, now[n])}
        before.update({n: p.detach().clone() for n, p in now.items()})
        assert all(".lora_" in n for n in found)
        return {n.split(".lora_")[1].split(".")[1] for n in found}

    Trainer(model=model, args=args, train_dataset=DATA).train()
    assert changed() == {"default"}
    with pytest.raises(ValueError, match="active Bayesian adapter"):
        BayesTrainer(model=model, args=args, train_dataset=DATA, n_train=40).train()
    model.set_adapter("blob")
    BayesTrainer(model=model, args=args, train_dataset=DATA, n_train=40).train()
    assert changed() == {"blob"}
    _tuner(model).set_adapter(["default", "blob"])
    trainer = BayesTrainer(model=model, args=args, train_dataset=DATA, n_train=40)
    trainer.train()
    assert changed() == {"default", "blob"}
    assert any("kl" in row for row in trainer.state.log_history)


def test_classifiers_have_one_head_each() -> None:
    """PEFT's rule: heads cannot be active together, in one line."""
    model = adapted(bert(), LoraConfig)
    model.add_adapter("blob", BlobConfig(r=4, target_modules=["query"], task_type="SEQ_CLS"))
    with pytest.raises(ValueError, match="Only one adapter can be set at a time"):
        _tuner(model).set_adapter(["default", "blob"])
    model.set_adapter("blob")
    found: Any = predict(model.eval(), {"input_ids": IDS}, n_samples=2)
    assert found.classes.shape == (4,)


def test_exported_and_merged(tmp_path: Path) -> None:
    model = both()
    _tuner(model).set_adapter(["blob", "plain"])
    together = logits(model)
    export_lora(model, tmp_path / "mean")
    mean = PeftModel.from_pretrained(llama(initializer_range=0.1), str(tmp_path / "mean")).eval()
    model.set_adapter("blob")
    torch.testing.assert_close(logits(mean), logits(model), rtol=1e-5, atol=1e-5)
    _tuner(model).set_adapter(["blob", "plain"])
    merged = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(logits(merged), together, rtol=1e-4, atol=1e-4)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), together, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), together, rtol=1e-4, atol=1e-4)


def test_read_together(tmp_path: Path) -> None:
    model = both()
    model.save_pretrained(str(tmp_path))
    again = PeftModel.from_pretrained(
        llama(initializer_range=0.1), str(tmp_path / "plain"), adapter_name="plain"
    )
    again.load_adapter(str(tmp_path / "blob"), "blob")
    for name in ("blob", "plain"):
        model.set_adapter(name)
        again.set_adapter(name)
        assert torch.equal(logits(again.eval()), logits(model))
    again.delete_adapter("blob")
    with pytest.raises(ValueError, match="Bayesian adapter"), posterior(again):
        pass
    assert torch.equal(logits(again), logits(both("plain")) * 0 + logits(_plain(model)))


def _plain(model: Any) -> Any:
    model.set_adapter("plain")
    return model


def activate(model: nn.Module, name: str) -> None:
    """As `set_adapter` of transformers, which some releases refuse beside the PEFT that they admit."""
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.set_adapter([name])


def test_transformers_own_adapters(tmp_path: Path) -> None:
    """AutoModel's load_adapter and what its add_adapter calls, on a half-precision base."""
    both().save_pretrained(str(tmp_path))
    base = llama(initializer_range=0.1).to(torch.bfloat16)
    base.load_adapter(str(tmp_path / "blob"), "blob")
    base.load_adapter(str(tmp_path / "plain"), "plain")
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["v_proj"]), base, "new")
    model = both(dtype=torch.bfloat16)
    for name in ("blob", "plain"):
        activate(base, name)
        model.set_adapter(name)
        small = 0.0 if name == "blob" else 0.1  # transformers keeps plain factors in half precision
        torch.testing.assert_close(logits(base), logits(model), rtol=0, atol=small)
    activate(base, "new")
    assert torch.equal(logits(base), logits(llama(initializer_range=0.1).to(torch.bfloat16)))


def test_plain_ones_are_combined_and_swapped(tmp_path: Path) -> None:
    """What PEFT has for plain LoRA works for it beside a posterior, and says no to the posterior."""
    model = both()
    model.add_adapter("more", LoraConfig(**PLAIN))
    model.add_weighted_adapter(["plain", "more"], [1.0, 0.0], "sum", combination_type="linear")
    model.set_adapter("plain")
    plain = logits(model)
    model.set_adapter("sum")
    torch.testing.assert_close(logits(model), plain, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="posteriors cannot be combined"):
        model.add_weighted_adapter(["plain", "blob"], [1.0, 1.0], "no")
    assert "no" not in model.peft_config
    other = adapted(llama(), LoraConfig, **PLAIN)
    fill(other).save_pretrained(str(tmp_path / "other"))
    model.set_adapter("plain")
    with pytest.raises(ValueError, match="must be plain LoRA, got a Bayesian one"):
        state = {k: v for k, v in model.state_dict().items() if ".blob." in k}
        hotswap.hotswap_adapter_from_state_dict(model, state, "blob", model.peft_config["blob"])
    hotswap.hotswap_adapter(model, str(tmp_path / "other"), "plain", torch_device="cpu")
    fresh = PeftModel.from_pretrained(llama(initializer_range=0.1), str(tmp_path / "other")).eval()
    assert torch.equal(logits(model), logits(fresh))


def test_a_file_of_a_posterior_is_not_swapped_in(tmp_path: Path) -> None:
    model = both()
    model.save_pretrained(str(tmp_path))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with pytest.raises(ValueError, match=r"Hotswapping only supports .*BAYES_LORA"):
        hotswap.hotswap_adapter(model, str(tmp_path / "blob"), "blob", torch_device="cpu")
    model.set_adapter("plain")
    with pytest.raises(ValueError, match="Incompatible PEFT types found: LORA and BAYES_LORA"):
        hotswap.hotswap_adapter(model, str(tmp_path / "blob"), "plain", torch_device="cpu")
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("start", ["blob", "plain"])
def test_a_refusal_leaves_the_model_as_it_was(start: str) -> None:
    configs = {"blob": BlobConfig(**OPTIONS), "plain": LoraConfig(**OPTIONS)}
    model = get_peft_model(llama(), configs[start])
    kind, tuner = model.peft_type, type(model.base_model)
    other: Any = {"blob": LoraConfig, "plain": BlobConfig}[start]
    modules = dict(model.named_modules())
    with pytest.raises(ValueError):
        model.add_adapter("no", other(**{**OPTIONS, "target_modules": ["norm"]}))
    assert (model.peft_type, type(model.base_model)) == (kind, tuner)
    assert list(model.peft_config) == ["default"] and dict(model.named_modules()) == modules


def test_parameters_of_experts(tmp_path: Path) -> None:
    """The Bayesian adapter comes first; one line where it does not."""
    given: dict[str, Any] = {**OPTIONS, "target_parameters": ["mlp.experts.down_proj"]}
    model = get_peft_model(moe(), BlobConfig(**given), adapter_name="blob")
    model.add_adapter("plain", LoraConfig(**given))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            if "lora_" in name:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    model.eval().save_pretrained(str(tmp_path))
    for name in ("blob", "plain"):
        one = PeftModel.from_pretrained(moe(), str(tmp_path / name)).eval()
        model.set_adapter(name)
        torch.testing.assert_close(logits(model), logits(one), rtol=1e-4, atol=1e-5)
        with posterior(model, seed=1):
            drawn = logits(model)
        if name == "blob":
            with posterior(one, seed=1):
                torch.testing.assert_close(drawn, logits(one), rtol=1e-4, atol=1e-5)
    plain = get_peft_model(moe(), LoraConfig(**given))
    with pytest.raises(ValueError, match="must come before plain LoRA of target_parameters"):
        plain.add_adapter("blob", BlobConfig(**given))
    assert type(plain.base_model).__name__ == "LoraModel" and list(plain.peft_config) == ["default"]


def test_plain_again_when_the_bayesian_one_is_gone() -> None:
    """Plain LoRA is left alone by what makes an adapter plain, and can get a posterior."""
    model = both()
    model.delete_adapter("blob")
    model.set_adapter("plain")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    make_plain(model, "plain")
    assert type(_tuner(model)) is LoraModel and model.peft_type == "LORA"
    assert type(model.peft_config["plain"]) is LoraConfig
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert not hasattr(_tuner(model).model, "bayes_noise")


def test_other_types_stay_refused(tmp_path: Path) -> None:
    """One line each, from PEFT or from here, before anything changes."""
    model = adapted(llama())
    with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
        model.add_adapter("a", AdaLoraConfig(target_modules=["q_proj"], total_step=9))
    head = get_peft_model(
        bert(), PolarVbllConfig(r=4, target_modules=["query"], task_type="SEQ_CLS")
    )
    with pytest.raises(ValueError, match=r"adapters with and without .* cannot share a model"):
        head.add_adapter("plain", LoraConfig(r=4, target_modules=["query"], task_type="SEQ_CLS"))
    with pytest.raises(ValueError, match="BAYES_LORA' is not compatible with the `PeftMixedModel`"):
        get_peft_model(llama(), BlobConfig(**OPTIONS), mixed=True)
    mixed = get_peft_model(llama(), LoraConfig(**OPTIONS), mixed=True)
    with pytest.raises(ValueError, match="BAYES_LORA' is not compatible with the `PeftMixedModel`"):
        mixed.add_adapter("blob", BlobConfig(**OPTIONS))
    both().save_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match=r"BAYES_LORA.* is not supported for mixed models"):
        PeftMixedModel.from_pretrained(llama(), str(tmp_path / "blob"))
