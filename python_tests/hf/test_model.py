"""Bayesian adapters in PEFT models: noise, persistence, merging, checkpointing, compilation."""

from __future__ import annotations

import copy
import pickle
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from accuracy import assert_same_but_rounding
from kept_draws import KeptDraws
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from bayes_kernels import random, reference
from bayes_kernels.hf import (
    BayesLoraConfig,
    BayesLoraModel,
    BlobConfig,
    checkpoint_noise,
    fold_samples,
    kl_divergence,
    posterior,
    refresh_noise,
)
from bayes_kernels.hf._compat import unsupported_layer
from bayes_kernels.hf.checkpoints import coherent_draw
from bayes_kernels.hf.layers import bayes_layers, noise_state

LLAMA = LlamaConfig(
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=128,
)
IDS = torch.randint(0, 128, (3, 5), generator=torch.Generator().manual_seed(1))


def llama_base(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LLAMA).to(dtype).eval()


def fill_b(model: nn.Module, rho: float | None = None) -> nn.Module:
    """Adapters that do something: random lora_B, and optionally one deviation parameter."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
            elif "lora_A_rho" in name and rho is not None:
                p.fill_(rho)
    return model


def llama(rho: float | None = 0.4, dtype: torch.dtype = torch.float32, **options: Any) -> PeftModel:
    options = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **options}
    model = get_peft_model(llama_base(dtype), BlobConfig(**options))
    return fill_b(model, rho)  # type: ignore[return-value]


def bert(**options: Any) -> PeftModel:
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=128,
        num_labels=3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    options = {"r": 4, "target_modules": ["query", "value"], "task_type": "SEQ_CLS", **options}
    model = get_peft_model(BertForSequenceClassification(config).eval(), BlobConfig(**options))
    return fill_b(model, 0.4)  # type: ignore[return-value]


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor = IDS, **inputs: Any) -> Tensor:
    return model(input_ids=ids, **inputs).logits


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


# --- what a forward pass computes ----------------------------------------------------------------


def test_type_and_parameters() -> None:
    model = llama(rho=None)
    assert isinstance(model.base_model, BayesLoraModel)
    config = model.peft_config["default"]
    assert isinstance(config, BayesLoraConfig) and config.peft_type.value == "BAYES_LORA"
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert len(trainable) == 4 * 3
    for item in bayes_layers(model):
        assert item.rho.shape == item.mean.shape and item.rho.dtype == torch.float32
        assert 0.05 / 2**0.5 <= item.rho.min().item() and item.rho.max().item() <= 0.05
        assert abs(item.rho.mean().item() - 0.0427) < 0.001
    assert len({item.variant.stream for item in bayes_layers(model)}) == 4


def test_means_are_those_of_plain_lora_and_zero_noise_is_plain_lora() -> None:
    plain = get_peft_model(
        llama_base(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    )
    bayes = llama(rho=0.0)
    fill_b(plain)
    means = {n: p for n, p in bayes.named_parameters() if "lora_A.d" in n}
    assert len(means) == 4
    for name, p in plain.named_parameters():
        if name in means:
            assert torch.equal(p, means[name])
    mean = logits(bayes)
    torch.testing.assert_close(mean, logits(plain), rtol=1e-5, atol=1e-6)
    bayes.train()
    assert torch.equal(logits(bayes), mean)
    for mode in ("sample", "flipout"):
        with posterior(bayes, mode):
            assert torch.equal(logits(bayes), mean)


@pytest.mark.parametrize("make", [llama, bert])
def test_train_samples_and_eval_does_not(make: Any) -> None:
    model = make()
    mean = logits(model)
    assert torch.equal(mean, logits(model))
    model.train()
    first, second = logits(model), logits(model)
    assert not torch.equal(first, second) and not torch.equal(first, mean)
    with posterior(model, "mean"):
        assert torch.equal(logits(model), mean)
    model.eval()
    assert torch.equal(logits(model), mean)
    with posterior(model, "sample", seed=3):
        draw = logits(model)
        assert torch.equal(draw, logits(model)) and not torch.equal(draw, mean)
        model.train()
        assert torch.equal(draw, logits(model))
        model.eval()
    with posterior(model, "flipout", seed=3):
        one, two = logits(model), logits(model)
    with posterior(model, "flipout", seed=3):
        assert torch.equal(one, logits(model))
    assert not torch.equal(one, two)


def test_contexts_nest_and_restore() -> None:
    model = llama()
    mean = logits(model)
    with posterior(model, "sample", seed=1):
        outer = logits(model)
        with pytest.raises(RuntimeError, match="inside"), posterior(model, "sample", seed=2):
            assert not torch.equal(outer, logits(model))
            raise RuntimeError("inside")
        assert torch.equal(outer, logits(model))
    assert torch.equal(mean, logits(model)) and noise_state(model).mode is None


def test_sample_at_inference() -> None:
    model = llama(sample_at_inference=True)
    first, second = logits(model), logits(model)
    assert not torch.equal(first, second)
    with posterior(model, "mean"):
        torch.testing.assert_close(logits(model), logits(llama()))
    # Deleting the only adapter that samples in eval mode lets the noise stand still again.
    other = llama()
    other.add_adapter("noisy", BlobConfig(target_modules=["q_proj"], sample_at_inference=True))
    assert noise_state(other).samples_in_eval
    other.delete_adapter("noisy")
    assert not noise_state(other).samples_in_eval
    # One coherent draw for the batch: equal examples get equal outputs.
    same = logits(model, IDS[:1].repeat(3, 1))
    torch.testing.assert_close(same[0], same[2])
    # A key-value cache keeps its draw while it grows.
    with torch.no_grad():
        out = model(input_ids=IDS[:, :3], use_cache=True)
        key = noise_state(model).keys[torch.device("cpu")]
        rest = model(input_ids=IDS[:, 3:], past_key_values=out.past_key_values)
        assert noise_state(model).keys[torch.device("cpu")] is key
        with posterior(model, "sample"):
            noise_state(model).set_key(key, set())
            whole = logits(model)
    torch.testing.assert_close(rest.logits, whole[:, 3:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scope", ["token", "example", "none"])
def test_layer_noise_is_the_documented_one(scope: str) -> None:
    model = llama(scope=scope)
    item = bayes_layers(model)[0]
    x = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(5))
    model.train()
    refresh_noise(model, step=7, rank=2, seed=11)
    key = noise_state(model).keys[torch.device("cpu")]
    expected = random.fold_in(random.fold_in(random.key(11), 2), 7)
    assert torch.equal(key, expected)
    with torch.no_grad():
        y = item.layer(x)
        base = item.layer.base_layer(x)
    noise = reference.dense_noise(
        key,
        15,
        64,
        4,
        stream=item.variant.stream,
        rows_per_id={"token": 1, "example": 5}.get(scope, 1),
    )
    if scope == "none":
        noise.r_in, noise.r_out = torch.ones(()), torch.ones(())
    b = item.layer.lora_B["default"].weight
    want = reference.flipout_lora(x, item.mean, item.rho, b, base, scaling=2.0, noise=noise)
    torch.testing.assert_close(y, want.detach(), rtol=1e-4, atol=1e-4)


def test_draws_are_coherent_and_depend_on_seed_and_number_only() -> None:
    model = llama()
    batch = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    with posterior(model, "sample", n_samples=4, seed=9):
        folded = logits(model, **_split(fold_samples(batch, 4))).unflatten(0, (4, 3))
    for s in range(4):
        with posterior(model, "sample", seed=9, first_sample=s):
            torch.testing.assert_close(logits(model), folded[s], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(
                logits(model, IDS[1:2])[0], folded[s, 1], rtol=1e-4, atol=1e-5
            )
    # Draw 2 is the mean path of an adapter whose A is that draw.
    other = copy.deepcopy(model)
    with torch.no_grad():
        for item in bayes_layers(other):
            item.mean.copy_(coherent_draw(item, 2, 9))
    torch.testing.assert_close(logits(other), folded[2], rtol=1e-4, atol=1e-5)
    assert (folded[0] - folded[1]).abs().max() > 0.05
    with posterior(model, "sample", n_samples=4), pytest.raises(ValueError, match="fold_samples"):
        logits(model)


def _split(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}


def test_statistics_of_draws() -> None:
    """Mean and deviation of draws of one layer's A over numbers and seeds."""
    item = bayes_layers(llama())[0]
    draws = torch.stack([coherent_draw(item, s, seed) for s in range(8) for seed in range(150)])
    omega = 0.4**2
    error = (draws.mean(0) - item.mean).abs().max()
    assert error < 4.5 * omega / 1200**0.5
    assert abs((draws - item.mean).std().item() / omega - 1) < 0.01


def test_lora_dropout_in_training_only() -> None:
    model = llama(rho=0.0, lora_dropout=0.5)
    mean = logits(model)
    torch.testing.assert_close(mean, logits(llama(rho=0.0)))
    item = bayes_layers(model)[0]
    x = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(5))
    model.train()
    refresh_noise(model, step=1)
    key = noise_state(model).keys[torch.device("cpu")]
    keep = random.dropout_mask(key, 6, 64, 0.5, stream=item.variant.stream).reshape(x.shape)
    assert 0.3 < keep.float().mean() < 0.7
    with torch.no_grad():
        delta = item.layer(x) - item.layer.base_layer(x)
        want = (x * keep * 2) @ item.mean.T @ item.layer.lora_B["default"].weight.T * 2.0
        with posterior(model, "mean"):
            noise_state(model).set_key(key, set())
            mean_delta = item.layer(x) - item.layer.base_layer(x)
    torch.testing.assert_close(delta, want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mean_delta, want, rtol=1e-4, atol=1e-5)


def test_adapters_in_an_eval_model_stay_in_eval() -> None:
    base = llama_base()
    model = fill_b(get_peft_model(base, BlobConfig(r=4, target_modules=["q_proj"])), 0.4)
    assert not any(isinstance(m, LoraLayer) and m.training for m in model.modules())
    assert torch.equal(logits(model), logits(model))


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
def test_noise_is_new_in_each_forward_pass(task_type: str | None) -> None:
    model = llama(task_type=task_type).train()
    assert not torch.equal(logits(model), logits(model))
    inner = model.get_base_model()
    assert not torch.equal(logits(inner), logits(inner))
    with model.disable_adapter():
        key = noise_state(model).keys[torch.device("cpu")]
        logits(model)
        assert noise_state(model).keys[torch.device("cpu")] is key
    refresh_noise(model)
    assert noise_state(model).keys[torch.device("cpu")] is not key


def test_refresh_noise_is_a_function_of_seed_rank_and_step() -> None:
    model = llama().train()
    outputs = {}
    for args in ((0, 0), (1, 0), (0, 1), (0, 0)):
        refresh_noise(model, step=args[0], rank=args[1])
        out = logits(model)
        assert torch.equal(outputs.setdefault(args, out), out)
    assert not torch.equal(outputs[0, 0], outputs[1, 0])
    assert not torch.equal(outputs[0, 0], outputs[0, 1])


# --- gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("make", [llama, bert])
def test_gradient_checkpointing_changes_nothing(make: Any, reentrant: bool) -> None:
    labels = IDS if make is llama else torch.tensor([0, 1, 2])

    def run(model: PeftModel) -> tuple[list[float], dict[str, Tensor]]:
        model.train()
        refresh_noise(model, step=0)
        losses = []
        for _ in range(2):
            loss = model(input_ids=IDS, labels=labels).loss
            loss.backward()
            losses.append(loss.item())
        return losses, gradients(model)

    model = make(lora_dropout=0.1)
    plain = run(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    checkpointed = run(model)
    assert plain[0] == checkpointed[0] and plain[0][0] != plain[0][1]
    assert plain[1].keys() == checkpointed[1].keys()
    for name, grad in plain[1].items():
        assert torch.equal(grad, checkpointed[1][name]), name


def test_two_forward_passes_before_a_backward_pass() -> None:
    """A refresh replaces the key: what is saved for an earlier backward pass stays."""
    model = llama().train()
    refresh_noise(model, step=0)
    first = model(input_ids=IDS, labels=IDS).loss
    second = model(input_ids=IDS, labels=IDS).loss
    (first + second).backward()
    together = gradients(model)
    refresh_noise(model, step=0)
    model(input_ids=IDS, labels=IDS).loss.backward()
    model(input_ids=IDS, labels=IDS).loss.backward()
    for name, grad in gradients(model).items():
        torch.testing.assert_close(grad, together[name], rtol=1e-4, atol=1e-6)


def test_two_checkpointed_forward_passes_before_a_backward_pass() -> None:
    model = llama()

    def run(checkpoint: bool) -> dict[str, Tensor]:
        model.train()
        if checkpoint:
            model.gradient_checkpointing_enable(
                {"use_reentrant": False, "context_fn": checkpoint_noise(model)}
            )
            model.enable_input_require_grads()
        refresh_noise(model, step=0)
        loss = model(input_ids=IDS, labels=IDS).loss
        with posterior(model, "sample", n_samples=3, seed=1):
            loss = loss + model(input_ids=IDS, labels=IDS).loss
        (loss + model(input_ids=IDS, labels=IDS).loss).backward()
        return gradients(model)

    plain, checkpointed = run(False), run(True)
    for name, grad in plain.items():
        assert torch.equal(grad, checkpointed[name]), name


def test_inference_mode_leaves_training_possible() -> None:
    model = llama(sample_at_inference=True)
    with torch.inference_mode():
        model(input_ids=IDS)
        with posterior(model, "sample"):
            model(input_ids=IDS)
        refresh_noise(model, step=1)
    assert not any(key.is_inference() for key in noise_state(model).keys.values())
    bayes_layers(model)[0].layer.train()(torch.randn(2, 64, requires_grad=True)).sum().backward()


@pytest.mark.slow
def test_compile_is_one_graph_for_all_steps() -> None:
    import torch._dynamo as dynamo

    model = llama(lora_dropout=0.1).train()
    model.config.use_cache = False

    def run(function: Any) -> list[float]:
        refresh_noise(model, step=0)
        losses = []
        for _ in range(3):
            loss = function(input_ids=IDS, labels=IDS).loss
            loss.backward()
            losses.append(loss.item())
        return losses

    eager = run(model)
    eager_gradients = gradients(model)
    dynamo.reset()
    dynamo.utils.counters.clear()
    compiled = run(torch.compile(model, fullgraph=True, backend="aot_eager"))
    assert compiled == pytest.approx(eager, rel=1e-5) and len(set(compiled)) == 3
    assert dynamo.utils.counters["stats"]["unique_graphs"] == 1
    for name, grad in gradients(model).items():
        torch.testing.assert_close(grad, eager_gradients[name], rtol=1e-3, atol=1e-5)
    dynamo.reset()


# --- divergence ----------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["constant", "fan_in"])
def test_kl_divergence_matches_distributions(rule: str) -> None:
    model = llama(rho=None, prior_rule=rule, prior_std=0.3)
    expected = torch.zeros((), dtype=torch.float64)
    for item in bayes_layers(model):
        prior = 0.3 if rule == "constant" else 0.3 / 64**0.5
        q = torch.distributions.Normal(item.mean.double(), item.rho.double() ** 2)
        p = torch.distributions.Normal(0.0, torch.tensor(prior, dtype=torch.float64))
        expected = expected + torch.distributions.kl_divergence(q, p).sum()
    kl = kl_divergence(model)
    assert kl.shape == () and kl.dtype == torch.float32
    torch.testing.assert_close(kl.double(), expected, rtol=1e-6, atol=0)
    kl.backward()
    ours = gradients(model)
    assert len(ours) == 8
    expected.backward()
    for name, grad in gradients(model).items():
        torch.testing.assert_close(ours[name], grad, rtol=1e-5, atol=1e-6)


def test_kl_divergence_of_one_adapter() -> None:
    model = llama()
    model.add_adapter("wide", BlobConfig(r=8, target_modules=["k_proj"], std="softplus"))
    both = float(kl_divergence(model, "default")), float(kl_divergence(model, "wide"))
    assert float(kl_divergence(model)) == both[0] != both[1]
    model.base_model.set_adapter(["default", "wide"])
    assert float(kl_divergence(model)) == pytest.approx(sum(both), rel=1e-6)
    with pytest.raises(ValueError, match="adapter 'none'"):
        kl_divergence(model, "none")
    with pytest.raises(ValueError, match="active Bayesian adapter"):
        kl_divergence(nn.Linear(2, 2))


# --- copies, devices, dtypes ---------------------------------------------------------------------


def test_copy_and_pickle() -> None:
    model = llama().train()
    model(input_ids=IDS)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert noise_state(other) is not noise_state(model)
        assert len({id(item.variant.state) for item in bayes_layers(other)}) == 1
        assert other.get_base_model().bayes_noise is noise_state(other)
        assert_same_but_rounding(logits(other), logits(copy.deepcopy(model)))
        assert not torch.equal(logits(other), logits(other))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_base(dtype: torch.dtype) -> None:
    model = llama(dtype=dtype)
    item = bayes_layers(model)[0]
    assert item.rho.dtype == torch.float32 and item.mean.dtype == torch.float32
    model.train()
    out = model(input_ids=IDS, labels=IDS)
    assert out.logits.dtype == dtype
    out.loss.backward()
    assert item.rho.grad is not None and item.rho.grad.dtype == torch.float32
    assert torch.isfinite(item.rho.grad).all() and item.rho.grad.abs().sum() > 0


def test_casting_the_model_keeps_key_and_deviations() -> None:
    model = llama(rho=0.1234567)
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
    model = llama().train()
    refresh_noise(model, step=0)
    full = logits(model)
    refresh_noise(model, step=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(input_ids=IDS, labels=IDS)
    torch.testing.assert_close(out.logits.float(), full, rtol=0.1, atol=0.1)
    out.loss.backward()


@pytest.mark.needs_cuda
def test_moves_to_a_gpu_and_back() -> None:
    model = llama()
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
    model = llama(rho=None, prior_std=0.15, scope="example")
    model.save_pretrained(tmp_path / "a")
    from safetensors.torch import load_file

    keys = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert len(keys) == 12 and sum(k.endswith("lora_A_rho") for k in keys) == 4
    for low in (False, True):
        loaded = PeftModel.from_pretrained(llama_base(), tmp_path / "a", low_cpu_mem_usage=low)
        config = loaded.peft_config["default"]
        assert isinstance(config, BayesLoraConfig)
        assert (config.prior_std, config.scope) == (0.15, "example")
        assert_same_but_rounding(logits(loaded), logits(model))
        for a, b in zip(bayes_layers(model), bayes_layers(loaded), strict=True):
            assert torch.equal(a.rho, b.rho) and b.rho.dtype == torch.float32
            assert torch.equal(a.mean, b.mean)
        with posterior(loaded, "sample", seed=4), posterior(model, "sample", seed=4):
            assert_same_but_rounding(logits(loaded), logits(model))
    llama_base().save_pretrained(tmp_path / "base")
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

    llama().save_pretrained(tmp_path)
    monkeypatch.delitem(PEFT_TYPE_TO_CONFIG_MAPPING, "BAYES_LORA")
    with pytest.raises(KeyError, match="BAYES_LORA"):
        PeftModel.from_pretrained(llama_base(), tmp_path)


def test_several_adapters(tmp_path: Path) -> None:
    model = llama()
    base = logits(llama_base())
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
    mixed = logits(model, adapter_names=["default", "third", "__base__"])
    torch.testing.assert_close(
        mixed, torch.stack([first[0], third[1], base[2]]), rtol=1e-4, atol=1e-5
    )
    with posterior(model, "sample", n_samples=2):
        folded = logits(model, IDS.repeat(2, 1), adapter_names=["default", "third", "__base__"] * 2)
    torch.testing.assert_close(folded[0], first_draw[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(folded[5], base[2], rtol=1e-4, atol=1e-5)
    model.set_adapter("default")
    model.delete_adapter("second")
    assert not any("second" in n for n, _ in model.named_parameters())
    assert torch.equal(logits(model), first)
    with pytest.raises(ValueError, match="posteriors cannot be combined"):
        model.add_weighted_adapter(["default", "third"], [0.5, 0.5], "sum")
    with pytest.raises(ValueError, match="different peft types"):
        model.add_adapter("plain", LoraConfig(r=2, target_modules=["q_proj"]))


def test_merging_keeps_the_mean() -> None:
    model = llama()
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
    unloaded = llama().unload()
    torch.testing.assert_close(logits(unloaded), logits(llama_base()))


def test_transposed_base_weights() -> None:
    torch.manual_seed(0)
    config = GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=128, n_positions=16)
    base = GPT2LMHeadModel(config).eval()
    model = get_peft_model(base, BlobConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))
    fill_b(model, 0.4)
    mean = logits(model)
    with posterior(model, "sample"):
        assert not torch.equal(logits(model), mean)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(logits(model.merge_and_unload()), mean, rtol=1e-4, atol=1e-5)


def test_rank_and_alpha_patterns_and_rslora() -> None:
    model = llama(rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 32}, use_rslora=True)
    shapes = {item.name.rpartition(".")[2]: item.rho.shape[0] for item in bayes_layers(model)}
    assert shapes == {"q_proj": 2, "v_proj": 4}
    model.train()
    assert torch.isfinite(logits(model)).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_base(bits: int, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    options: dict[str, Any] = {"load_in_8bit": True}
    if bits == 4:
        options = {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float32}
    llama_base().save_pretrained(tmp_path / "base")

    def base() -> Any:
        quantised = BitsAndBytesConfig(**options)
        return LlamaForCausalLM.from_pretrained(
            tmp_path / "base", quantization_config=quantised, device_map="cpu"
        )

    config = BlobConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = fill_b(get_peft_model(base(), config), 0.4)
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


def test_generate_keeps_one_draw() -> None:
    model = llama()
    with posterior(model, "sample", seed=1):
        one = model.generate(input_ids=IDS, max_new_tokens=4, do_sample=False, pad_token_id=0)
        two = model.generate(input_ids=IDS, max_new_tokens=4, do_sample=False, pad_token_id=0)
        ids = IDS
        for _ in range(4):
            ids = torch.cat([ids, logits(model, ids)[:, -1:].argmax(-1)], 1)
    assert torch.equal(one, two) and torch.equal(one, ids)


@pytest.mark.parametrize("how", ["posterior", "sample_at_inference"])
def test_generate_keeps_the_numbers_of_its_draw(how: str, kept_draws: KeptDraws) -> None:
    """Within one generated text each layer draws twice, and finds its numbers for all other tokens."""
    model = llama(sample_at_inference=how == "sample_at_inference")
    layers = len(bayes_layers(model))
    # Other tests turn the cache off in the configuration that all models here share.
    options: Any = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "use_cache": True}

    def generated() -> Tensor:
        context = posterior(model, "sample", seed=1) if how == "posterior" else nullcontext()
        with context:
            return model.generate(input_ids=IDS, max_new_tokens=6, **options)

    kept_draws.forget(0)
    state = noise_state(model).snapshot()
    expected = generated()
    assert kept_draws.known == 0
    kept_draws.forget(64 << 20)
    noise_state(model).restore(state)
    assert torch.equal(generated(), expected)
    assert kept_draws.known == layers and kept_draws.hits == 4 * layers  # 6 passes
    generated()  # the same draw again, or with sample_at_inference a new one
    more = 6 if how == "posterior" else 4
    assert kept_draws.hits == (4 + more) * layers


# --- rejected combinations -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "use_dora cannot be combined"),
        ({"alora_invocation_tokens": [1], "task_type": "CAUSAL_LM"}, "alora_invocation_tokens"),
        ({"arrow_config": {}}, "arrow_config|ArrowConfig"),
        ({"monteclora_config": {}}, "monteclora_config"),
        ({"target_parameters": ["a.weight"]}, "target_parameters"),
        ({"lora_bias": True}, "lora_bias"),
        ({"init_lora_weights": "mica"}, "mica"),
        ({"std": "exp"}, "std must be one of"),
        ({"scope": "row"}, "scope must be one of"),
        ({"prior_std": 0.0}, "prior_std must be a positive number"),
        ({"init_rho": float("nan")}, "init_rho must be a positive number"),
        ({"seed": 1.5}, "seed must be an int"),
        ({"kl_schedule": "cosine"}, "kl_schedule must be one of"),
        ({"lora_dropout": 1.0}, "lora_dropout must be in"),
    ],
)
def test_rejected_options(options: dict[str, Any], message: str) -> None:
    if options == {"arrow_config": {}} or options == {"monteclora_config": {}}:
        from peft import ArrowConfig, MontecloraConfig

        made = ArrowConfig() if "arrow_config" in options else MontecloraConfig()
        options = {next(iter(options)): made}
    with pytest.raises(ValueError, match=message):
        BlobConfig(target_modules=["q_proj"], **options)


def test_rejected_layers() -> None:
    with pytest.raises(ValueError, match=r"embed_tokens \(Embedding\) cannot carry"):
        get_peft_model(llama_base(), BlobConfig(target_modules=["embed_tokens"]))
    conv = nn.Sequential(nn.Conv1d(3, 3, 1))
    with pytest.raises(
        ValueError, match="cannot carry a Bayesian adapter: PEFT handles it with Conv1d"
    ):
        get_peft_model(conv, BlobConfig(target_modules=["0"]))

    class AwqLoraLinear(nn.Module, LoraLayer):  # the class PEFT makes for AWQ weights
        def __init__(self) -> None:
            super().__init__()
            LoraLayer.__init__(self, nn.Linear(2, 2))

    assert unsupported_layer(AwqLoraLinear()) == "PEFT handles it with AwqLoraLinear"


def test_posterior_errors() -> None:
    model = llama()
    for options in (
        {"mode": "draw"},
        {"n_samples": 0},
        {"mode": "mean", "n_samples": 2},
        {"first_sample": -1},
    ):
        with pytest.raises(ValueError, match="posterior: "), posterior(model, **options):
            pass
    with (
        pytest.raises(ValueError, match="must have a Bayesian adapter"),
        posterior(nn.Linear(1, 1)),
    ):
        pass
