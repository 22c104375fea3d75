"""Adapters of fused experts, by `target_parameters`, against PEFT's plain LoRA and explicit products."""

from __future__ import annotations

import copy
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from peft.tuners import lora
from tiny_models import IDS, ROWS, arguments, fill, gradients, logits
from torch import Tensor
from transformers import AutoModelForCausalLM

from bayes_kernels import random, reference
from bayes_kernels.hf import (
    BayesTrainer,
    BlobConfig,
    PolarConfig,
    ScalablConfig,
    bayesianize,
    export_draws,
    export_lora,
    kl_divergence,
    posterior,
    predict,
    refresh_noise,
)
from bayes_kernels.hf.experts import ParamWrapper, Routed, by_expert, wrap
from bayes_kernels.hf.layers import bayes_layers, noise_state
from bayes_kernels.hf.swap import make_plain
from bayes_kernels.hf.undo import as_before_if_stopped

pytestmark = [pytest.mark.cpu_only, pytest.mark.filterwarnings("ignore")]

TARGETS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 64,
    "num_experts_per_tok": 2,
    "initializer_range": 0.3,  # so that experts count beside the residual
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
# The layouts that there are: (E, out, in) and (E, in, out), with biases and without.
KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "mixtral": (
        transformers.MixtralForCausalLM,
        {"intermediate_size": 24, "num_local_experts": 4},
    ),
    "gpt_oss": (
        transformers.GptOssForCausalLM,
        {"intermediate_size": 24, "num_local_experts": 4, "head_dim": 8},
    ),
    "qwen3_moe": (
        transformers.Qwen3MoeForCausalLM,
        {"moe_intermediate_size": 24, "num_experts": 4, "head_dim": 8},
    ),
}


def moe(kind: str = "mixtral", dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """A model with routed experts, in eval mode."""
    torch.manual_seed(0)
    made, sizes = KINDS[kind]
    model = made(made.config_class(**{**SIZES, **sizes, **options})).to(dtype).eval()
    with torch.no_grad():  # which GPT-OSS leaves at zero
        for name, p in model.named_parameters():
            if name.endswith("_bias"):
                p.normal_(std=0.3)
    model.set_experts_implementation("eager")
    return model


def adapted(base: Any, config: Any = BlobConfig, **options: Any) -> Any:
    given = {"r": 2, "target_modules": ["q_proj"], "target_parameters": TARGETS}
    return get_peft_model(base, config(task_type="CAUSAL_LM", **{**given, **options}))


def blob(kind: str = "mixtral", dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """A BLoB adapter that does something."""
    return fill(adapted(moe(kind, dtype), **options), rho=0.4).eval()


def plain_of(model: Any, base: Any) -> Any:
    """PEFT's own plain LoRA with the factors of a Bayesian adapter."""
    made = adapted(base, LoraConfig).eval()
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, p in made.named_parameters():
            if "lora_" in name:
                p.copy_(own[name])
    return made


def experts_of(model: Any) -> list[Any]:
    return [item for item in bayes_layers(model) if isinstance(item.layer, ParamWrapper)]


@pytest.mark.parametrize("kind", KINDS)
def test_mean_and_base_are_those_of_plain_lora(kind: str) -> None:
    model = blob(kind, torch.float64)
    expected = logits(plain_of(model, moe(kind, torch.float64)))
    base = logits(moe(kind, torch.float64))
    torch.testing.assert_close(logits(model), expected, rtol=1e-10, atol=1e-10)
    assert (expected - base).abs().max() > 0.1
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), base, rtol=1e-10, atol=1e-10)
    names = [item.name for item in experts_of(model)][:2]
    assert names == [
        "model.layers.0.mlp.experts.down_proj",
        "model.layers.0.mlp.experts.gate_up_proj",
    ]


def dense(
    experts: Any, hidden: Tensor, index: Tensor, weights: Tensor, items: Any, noise: Any
) -> Tensor:
    """The experts token by token, with weights W_e + scaling B_e A of a token's own A."""

    def projected(name: str, x: Tensor, e: int, token: int) -> Tensor:
        weight, item = getattr(experts, name)[e], items[name]
        weight = weight.T if experts.is_transposed else weight
        mean, b = by_expert(item.layer, item.mean, item.layer.lora_B["default"].weight)
        a = mean[e] + noise(item, e, token)
        y = x @ (weight + item.layer.scaling["default"] * b[e] @ a).T
        return y + getattr(experts, f"{name}_bias")[e] if experts.has_bias else y

    rows = []
    for token in range(len(hidden)):
        total = torch.zeros_like(hidden[token])
        for e, weight in zip(index[token].tolist(), weights[token], strict=True):
            inner = experts._apply_gate(projected("gate_up_proj", hidden[token], e, token)[None])[0]
            total = total + weight * projected("down_proj", inner, e, token)
        rows.append(total)
    return torch.stack(rows)


def block(model: Any) -> tuple[Any, dict[str, Any]]:
    """The experts of the first layer with their adapters, and the adapters by parameter."""
    items = {item.layer.parameter_name: item for item in experts_of(model) if ".0." in item.name}
    return model.get_base_model().model.layers[0].mlp.experts, items


def routed(n: int = 16, tokens: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, experts (one of which nobody wants) and weights, fp64."""
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(tokens, n, generator=generator, dtype=torch.float64)
    index = torch.stack([torch.randperm(3, generator=generator)[:2] for _ in range(tokens)])
    return hidden, index, torch.rand(tokens, 2, generator=generator, dtype=torch.float64)


def compared(model: Any, noise: Any) -> None:
    """Values and all gradients of the experts against the dense reference."""
    outer, items = block(model)
    hidden, index, weights = routed()
    found = {}
    for way in ("ours", "dense"):
        leaves = [hidden.clone().requires_grad_(), weights.clone().requires_grad_()]
        if way == "ours":
            y = outer(leaves[0], index, leaves[1])
        else:
            y = dense(outer.get_base_layer(), leaves[0], index, leaves[1], items, noise)
        y.square().sum().backward()
        found[way] = {"y": y.detach(), "x": leaves[0].grad, "w": leaves[1].grad} | gradients(outer)
    assert found["ours"].keys() == found["dense"].keys() and len(found["ours"]) >= 7
    for name, value in found["dense"].items():
        assert value is not None and value.abs().max() > 0, name
        error = (found["ours"][name].double() - value.double()).abs().max()
        # The normals are fp32 numbers that libraries round differently.
        assert error < 1e-6 * value.abs().max(), (name, error)


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("std", ["square", "softplus"])
def test_training_passes_against_dense_weights(kind: str, std: str) -> None:
    """Every expert has eps of its own, every token signs of its own, whichever expert it goes to."""
    model = blob(kind, torch.float64, std=std).train()
    refresh_noise(model, step=3)

    def noise(item: Any, e: int, token: int) -> Tensor:
        (r, n), stream = (
            by_expert(item.layer, item.mean, item.mean)[0].shape[1:],
            item.variant.stream,
        )
        key = noise_state(model).key_on(item.mean.device)
        made = reference.dense_noise(key, 5, n, 4 * r, stream=stream, dtype=torch.float64)
        signs = reference.dense_noise(key, 5, n, r, stream=stream, dtype=torch.float64)
        own = slice(e * r, e * r + r)
        e_own = reference.std_of(item.rho.double(), std)[own] * made.eps[own]
        return signs.r_out[token][:, None] * e_own * signs.r_in[token]

    compared(model, noise)


@pytest.mark.parametrize("law", ["antithetic", "independent"])
def test_draws_against_dense_weights(law: str) -> None:
    model = blob("mixtral", torch.float64)
    numbers = [4, 1, 1, 4, 7]  # of the tokens

    def noise(item: Any, e: int, token: int) -> Tensor:
        draw = torch.tensor([numbers[token]])
        options = {"stream": item.variant.stream, "antithetic": law == "antithetic"}
        eps = reference.draw_normals(random.key(6), draw, item.mean.shape, **options)
        r = item.mean.shape[0] // 4
        return (item.rho.double() ** 2 * eps[0].double())[e * r : e * r + r]

    with posterior(model, "sample", draws=numbers, seed=6, kind=law):
        compared(model, noise)


def test_noise_of_all_tokens_is_one_draw_with_scope_none() -> None:
    model = blob("mixtral", torch.float64, scope="none").train()

    def noise(item: Any, e: int, token: int) -> Tensor:
        key = noise_state(model).key_on(item.mean.device)
        eps = reference.normal(key, item.mean.shape, stream=item.variant.stream).double()
        r = item.mean.shape[0] // 4
        return (item.rho.double() ** 2 * eps)[e * r : e * r + r]

    compared(model, noise)


def test_statistics_of_flipped_signs() -> None:
    """The mean of many tokens' noise is zero, its variance that of A; pairs of tokens are independent."""
    model = blob("mixtral", torch.float64).train()
    item = block(model)[1]["gate_up_proj"]
    tokens = 4096
    hidden = torch.ones(tokens, 16, dtype=torch.float64)
    index = torch.tensor([[0, 2]]).expand(tokens, 2)
    with torch.no_grad():
        ids, order = index.reshape(-1).sort(stable=True)
        rows = Routed(ids, order // 2, hidden)
        zeros = torch.zeros(2 * tokens, 48, dtype=torch.float64)
        y = item.layer.add_output(hidden[rows.tokens], zeros, rows)
        with posterior(model, "mean"):
            mean = item.layer.add_output(hidden[rows.tokens], zeros, rows)
        key = noise_state(model).key_on(item.mean.device)
        eps = reference.normal(key, item.mean.shape, stream=item.variant.stream).double()
        e = (item.rho.double() ** 2 * eps).unflatten(0, (4, 2))
        _, b = by_expert(item.layer, item.mean, item.layer.lora_B["default"].weight)
    for place, expert in enumerate((0, 2)):
        noise = (y - mean)[place * tokens : (place + 1) * tokens]
        # Signs only: E[(sum_j s_j e_ij)^2] = sum_j e_ij^2.
        variance = (b[expert] ** 2) @ e[expert].square().sum(1)
        variance = variance * item.layer.scaling["default"] ** 2
        error = noise.mean(0) / (variance / tokens).sqrt()
        assert error.abs().max() < 5
        assert torch.allclose(noise.var(0), variance, rtol=0.2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("law", ["antithetic", "independent", "shared"])
def test_each_row_has_its_draw(kind: str, law: str) -> None:
    """A row under draw d is what it is alone under draw d, whatever experts its tokens share."""
    model = blob(kind)
    numbers = [3, 0, 3, 1]
    with posterior(model, "sample", draws=numbers, seed=1, kind=law):
        together = logits(model)
    mean = logits(model)
    for row, number in enumerate(numbers):
        with posterior(model, "sample", draws=[number], seed=1, kind=law):
            alone = logits(model, IDS[row : row + 1])[0]
        torch.testing.assert_close(together[row], alone, rtol=1e-3, atol=1e-4)
        assert (alone - mean[row]).abs().max() > 1e-2
    first, second = together[0], together[3]
    assert (first - second).abs().max() > 1e-2


def test_noise_for_each_token_in_prediction() -> None:
    model = blob()
    folded = IDS.repeat(3, 1)
    with posterior(model, "sample", n_samples=3, seed=1, scope="token"):
        together = logits(model, folded).unflatten(0, (3, 4))
    for number in range(3):
        with posterior(model, "sample", first_sample=number, seed=1, scope="token"):
            alone = logits(model)
        torch.testing.assert_close(together[number], alone, rtol=1e-3, atol=1e-4)
    assert (together[0] - together[1]).abs().max() > 1e-2


def test_few_tokens_of_many_draws() -> None:
    """A step of a text takes the factors of its rows alone: the same numbers as of all."""
    model = blob()
    numbers = list(range(6))
    ids = IDS[:1, :1].repeat(6, 1)
    with posterior(model, "sample", draws=numbers, seed=2):
        few = logits(model, ids)
        with torch.enable_grad():
            all_of_them = model(input_ids=ids).logits.detach()
    torch.testing.assert_close(few, all_of_them, rtol=1e-5, atol=1e-6)


def test_predictions_in_parts_and_in_threads() -> None:
    model = blob()
    batch = {"input_ids": IDS}
    whole = predict(model, batch, choices=[5, 6, 7], n_samples=4, seed=3)
    parts = predict(model, batch, choices=[5, 6, 7], n_samples=4, seed=3, samples_per_pass=1)
    torch.testing.assert_close(whole.log_probs, parts.log_probs, rtol=1e-3, atol=1e-4)
    assert whole.mutual_information.max() > 1e-3

    def of(seed: int) -> Tensor:
        return predict(model, batch, choices=[5, 6, 7], n_samples=2, seed=seed).log_probs

    alone = [of(seed) for seed in range(6)]
    with ThreadPoolExecutor(6) as pool:
        for expected, found in zip(alone, pool.map(of, range(6)), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("mode", ["mean", "flipout", "sample", "shared", "token"])
def test_a_pass_without_tokens(mode: str) -> None:
    """As transformers' grouped products: an empty output, and gradients that are zero."""
    model = blob()
    outer, _ = block(model)
    nothing = torch.zeros(0, 16, requires_grad=True)
    given: dict[str, Any] = {"mode": mode if mode in ("mean", "flipout") else "sample"}
    if mode == "token":
        given.update(n_samples=2, scope="token")
    elif given["mode"] == "sample":
        given.update(draws=[0, 1], kind="shared" if mode == "shared" else "antithetic")
    with posterior(model, **given):
        y = outer(nothing, torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2))
    assert y.shape == (0, 16)
    y.sum().backward()
    found = gradients(outer)
    assert found and all(value is not None and not value.any() for value in found.values())


def test_text_with_a_cache_has_the_draws_of_passes_without() -> None:
    model = blob()
    ids = IDS[:2]
    with posterior(model, "sample", draws=[2, 5], seed=4):
        text = model.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
        slow = ids
        for _ in range(4):
            slow = torch.cat([slow, logits(model, slow)[:, -1].argmax(-1, keepdim=True)], 1)
    assert text.tolist() == slow.tolist()


def test_divergence_has_all_experts() -> None:
    model = blob()
    expected = 0.0
    for item in bayes_layers(model):
        q = torch.distributions.Normal(item.mean.double(), item.rho.double() ** 2)
        p = torch.distributions.Normal(torch.zeros(()).double(), torch.tensor(0.2).double())
        expected += torch.distributions.kl_divergence(q, p).sum()
    assert float(kl_divergence(model)) == pytest.approx(float(expected), rel=1e-5)
    assert [item.mean.shape[0] for item in experts_of(model)] == [8] * 4  # r E


def test_gradient_checkpointing_makes_the_same_noise_again() -> None:
    found = []
    for checkpointed in (False, True):
        model = blob().train()
        if checkpointed:
            model.enable_input_require_grads()
            options = {"use_reentrant": False}
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        refresh_noise(model, step=1)
        model(input_ids=IDS, labels=IDS).loss.backward()
        found.append(gradients(model))
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_trained_saved_and_loaded(kind: str, tmp_path: Path) -> None:
    moe(kind).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = fill(adapted(base), rho=0.3)
    before = {n: p.clone() for n, p in model.named_parameters()}
    data = [{"input_ids": row, "labels": row} for row in ROWS[:8]]
    kinds = {"model": model, "train_dataset": data, "n_train": 40}
    BayesTrainer(args=arguments(tmp_path / "run", max_steps=2), **kinds).train()
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert changed == trained and sum("experts" in n for n in trained) == 12
    model.eval().save_pretrained(tmp_path / "adapter")

    def seen(model: Any) -> Tensor:
        with posterior(model, "sample", draws=[0, 1, 2, 3], seed=2):
            drawn = logits(model)
        return torch.stack([drawn, logits(model)])

    expected = seen(model)
    folder = str(tmp_path / "adapter")
    ways = {
        "PeftModel": lambda: PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(tmp_path / "base"), folder
        ),
        "AutoPeft": lambda: AutoPeftModelForCausalLM.from_pretrained(folder),
        "AutoModel": lambda: AutoModelForCausalLM.from_pretrained(folder),
    }
    for way, load in ways.items():
        again = load().eval()
        torch.testing.assert_close(seen(again), expected, rtol=1e-3, atol=1e-4, msg=way)


def test_exports_are_plain_lora(tmp_path: Path) -> None:
    model = blob()
    export_lora(model, tmp_path / "mean")
    plain = PeftModel.from_pretrained(moe(), str(tmp_path / "mean"))
    assert type(plain.base_model) is lora.LoraModel
    torch.testing.assert_close(logits(plain), logits(model), rtol=1e-3, atol=1e-4)
    for number, folder in enumerate(export_draws(model, tmp_path / "draws", 3, seed=5)):
        with posterior(model, "sample", first_sample=number, seed=5):
            expected = logits(model)
        drawn = PeftModel.from_pretrained(moe(), str(folder))
        torch.testing.assert_close(logits(drawn), expected, rtol=1e-3, atol=1e-4)


def test_merged_and_unloaded() -> None:
    model = blob()
    expected = logits(model)
    with pytest.warns(UserWarning, match="merging keeps the posterior mean only"):
        model.merge_adapter()
    for copied in (copy.deepcopy(model), copy.deepcopy(model).half().float()):
        torch.testing.assert_close(logits(copied), expected, rtol=0.05, atol=0.05)
    torch.testing.assert_close(logits(model), expected, rtol=1e-3, atol=1e-4)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), expected, rtol=1e-3, atol=1e-4)
    merged = copy.deepcopy(model).merge_and_unload()
    experts = merged.model.layers[0].mlp.experts
    assert type(experts).__name__ == "MixtralExperts" and experts.config is merged.config
    assert not hasattr(experts, "bayes_wrappers")
    torch.testing.assert_close(logits(merged), expected, rtol=1e-3, atol=1e-4)
    bare = model.unload()
    assert bare.model.layers[0].mlp.experts.config is bare.config
    torch.testing.assert_close(logits(bare), logits(moe()), rtol=1e-3, atol=1e-4)


def test_a_second_adapter_and_deleting_one() -> None:
    model = blob()
    first = logits(model)
    config = BlobConfig(r=3, target_modules=["q_proj"], target_parameters=TARGETS)
    model.add_adapter("other", config)
    torch.testing.assert_close(logits(model), first)
    model.set_adapter("other")
    names = {item.name for item in experts_of(model)}
    assert len(names) == 4 and {item.mean.shape[0] for item in experts_of(model)} == {12}
    torch.testing.assert_close(logits(model), logits(moe()), rtol=1e-3, atol=1e-4)  # B = 0
    model.delete_adapter("other")
    model.set_adapter("default")
    torch.testing.assert_close(logits(model), first)


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_tfb_of_a_trained_plain_adapter(kind: str, tmp_path: Path) -> None:
    model = fill(adapted(moe(kind), LoraConfig), scale=0.3).eval()
    before = logits(model)
    data = [{"input_ids": IDS, "labels": torch.tensor([0, 2, 1, 0])}]
    options = {"choices": [5, 6, 7], "progress": False, "high": 2.0, "tolerance": 0.5}
    report = bayesianize(model, "tfb", data, n_samples=4, **options)
    assert report.sigma > 0 and report.layers == 6
    torch.testing.assert_close(logits(model), before, rtol=1e-3, atol=1e-4)
    for item in experts_of(model):
        _, b = by_expert(item.layer, item.mean, item.layer.lora_B["default"].weight)
        eye = torch.eye(2).expand(4, 2, 2)
        torch.testing.assert_close(b.mT @ b, eye, rtol=1e-4, atol=1e-4)  # each expert's own
        sigma = item.tensor("lora_A_sigma")
        assert sigma.shape == (8, 1)
        torch.testing.assert_close(sigma, torch.full((8, 1), report.sigma), rtol=1e-3, atol=1e-6)
    with posterior(model, "sample", draws=[0, 1, 2, 3], seed=2):
        drawn = logits(model)
    assert (drawn - before).abs().max() > 1e-2
    model.save_pretrained(tmp_path / "tfb")
    again = PeftModel.from_pretrained(moe(kind), str(tmp_path / "tfb")).eval()
    with posterior(again, "sample", draws=[0, 1, 2, 3], seed=2):
        torch.testing.assert_close(logits(again), drawn, rtol=1e-3, atol=1e-4)


def test_a_conversion_that_stops_leaves_plain_lora() -> None:
    model = fill(adapted(moe(), LoraConfig), scale=0.3).eval()
    before = logits(model)
    experts = model.get_base_model().model.layers[0].mlp.experts.get_base_layer()
    data = [{"input_ids": IDS, "labels": torch.tensor([0, 2, 1, 9])}]
    with pytest.raises(ValueError, match="labels must be in"):
        bayesianize(model, "tfb", data, choices=[5, 6, 7], labels="true", progress=False)
    wrapped = [m for m in model.modules() if isinstance(m, lora.ParamWrapper)]
    assert {type(m) for m in wrapped} == {lora.ParamWrapper}
    assert experts.config is model.get_base_model().config
    assert torch.equal(logits(model), before)


def test_directions_that_an_expert_lacks_have_no_noise() -> None:
    model = fill(adapted(moe(), LoraConfig), scale=0.3).eval()
    wrapped = [m for m in model.modules() if isinstance(m, lora.ParamWrapper)]
    with torch.no_grad():
        for layer in wrapped:  # B of expert 2 has rank 1
            by_expert(layer, layer.lora_A["default"].weight, layer.lora_B["default"].weight)[1][
                2, :, 1
            ] = 0
    data = [{"input_ids": IDS, "labels": torch.tensor([0, 2, 1, 0])}]
    options = {"choices": [5, 6, 7], "progress": False, "n_samples": 2, "tolerance": 1.0}
    report = bayesianize(model, "tfb", data, **options)
    expected = torch.full((8,), report.sigma)
    expected[5] = 0
    for item in experts_of(model):
        torch.testing.assert_close(
            item.tensor("lora_A_sigma")[:, 0], expected, rtol=1e-3, atol=1e-3 * report.sigma
        )


def test_made_plain_again() -> None:
    model = blob()
    expected = logits(model)
    make_plain(model, "default")
    wrapped = [m for m in model.modules() if isinstance(m, lora.ParamWrapper)]
    assert {type(m) for m in wrapped} == {lora.ParamWrapper}
    assert not any(hasattr(m, "bayes_wrappers") for m in model.modules())
    torch.testing.assert_close(logits(model), expected, rtol=1e-3, atol=1e-4)


def test_tfb_of_chosen_layers() -> None:
    model = fill(adapted(moe(), LoraConfig), scale=0.3).eval()
    data = [{"input_ids": IDS, "labels": torch.tensor([0, 2, 1, 0])}]
    options = {"choices": [5, 6, 7], "progress": False, "n_samples": 2}
    with pytest.raises(ValueError, match=r"must name adapted layers, got \['experts'\]"):
        bayesianize(model, "tfb", data, layers=["experts"], **options)
    report = bayesianize(model, "tfb", data, layers=["experts.down_proj"], tolerance=1.0, **options)
    assert report.layers == 2
    for item in bayes_layers(model):
        wide = bool(item.tensor("lora_A_sigma").abs().max() > 0)
        assert wide == item.name.endswith("down_proj")


def test_plain_lora_beside_it() -> None:
    model = blob()
    alone = logits(model)
    config = LoraConfig(r=3, target_modules=["q_proj"], target_parameters=TARGETS)
    model.add_adapter("plain", config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B.plain" in name:
                p.fill_(0.2)
    torch.testing.assert_close(logits(model), alone)
    model.set_adapter("plain")
    plain = adapted(moe(), LoraConfig, r=3).eval()
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, p in plain.named_parameters():
            if "lora_" in name:
                p.copy_(own[name.replace(".default.", ".plain.")])
    torch.testing.assert_close(logits(model), logits(plain), rtol=1e-3, atol=1e-4)
    model.base_model.set_adapter(["default", "plain"])
    both = logits(model)
    with pytest.warns(UserWarning, match="merging keeps"):
        merged = model.merge_and_unload()
    torch.testing.assert_close(both, logits(merged), rtol=1e-3, atol=1e-4)


def test_one_graph_without_breaks() -> None:
    """Compiled as a whole, and not again for other draws and seeds."""
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counted = CompileCounter()
    model = blob(dtype=torch.float64)
    outer, _ = block(model)
    compiled = torch.compile(outer, backend=counted, fullgraph=True)
    inputs = routed(tokens=4)
    for seed, numbers in ((0, [0, 1, 2, 3]), (1, [7, 1, 4, 9])):
        with torch.no_grad(), posterior(model, "sample", draws=numbers, seed=seed):
            torch.testing.assert_close(compiled(*inputs), outer(*inputs))
    assert counted.frame_count == 1


def test_half_precision() -> None:
    """Factors stay fp32, and the mean errs as much as plain LoRA in the same type."""
    model = fill(adapted(moe(dtype=torch.bfloat16)), rho=0.4).eval()
    assert {p.dtype for n, p in model.named_parameters() if "lora_" in n} == {torch.float32}
    truth = logits(blob())
    plain = logits(plain_of(model, moe(dtype=torch.bfloat16)))
    error = [(found.float() - truth).norm() for found in (logits(model), plain)]
    assert logits(model).dtype == torch.bfloat16 and 0 < error[0] < 1.5 * error[1]


# --- modules that do not follow transformers' interface -------------------------------------------


def llama4() -> Any:
    torch.manual_seed(0)
    sizes = {k: v for k, v in SIZES.items() if k != "initializer_range"}
    config = transformers.Llama4TextConfig(
        **sizes, intermediate_size=24, intermediate_size_mlp=24, num_local_experts=4, head_dim=8
    )
    config.num_experts_per_tok = 1
    model = transformers.Llama4ForCausalLM(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.3)
    return model


LLAMA4 = {
    "target_parameters": ["feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"]
}


def test_unknown_experts_are_adapted_as_peft_does_it() -> None:
    with pytest.warns(UserWarning, match=r"Llama4TextExperts\.down_proj is no projection"):
        model = fill(adapted(llama4(), **LLAMA4), rho=0.4).eval()
    plain = adapted(llama4(), LoraConfig, **LLAMA4).eval()
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, p in plain.named_parameters():
            if "lora_" in name:
                p.copy_(own[name])
    mean = logits(model)
    torch.testing.assert_close(mean, logits(plain), rtol=1e-3, atol=1e-4)
    with posterior(model, "sample", draws=[3], seed=1):
        drawn = logits(model)
    assert (drawn - mean).abs().max() > 1e-2
    with torch.no_grad():  # the same draw as plain LoRA
        for item in bayes_layers(model):
            a, b = item.factors(3, seed=1)
            for layer in plain.modules():
                if isinstance(layer, lora.LoraLayer) and layer.lora_B["default"].weight.equal(b):
                    layer.lora_A["default"].weight.copy_(a)
    torch.testing.assert_close(drawn, logits(plain), rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match="3 draws cannot be"), posterior(model, n_samples=3):
        logits(model, IDS.repeat(3, 1))
    with pytest.raises(ValueError, match="scope must be one of"), posterior(model, scope="token"):
        pass
    several = predict(model, {"input_ids": IDS}, choices=[5, 6, 7], n_samples=4)  # pass by pass
    assert several.mutual_information.max() > 1e-3


def test_unknown_experts_are_trained() -> None:
    model = fill(adapted(llama4(), **LLAMA4), rho=0.4).train()
    losses = []
    for step in (1, 1, 2):
        refresh_noise(model, step=step)
        losses.append(model(input_ids=IDS, labels=IDS).loss)
    assert losses[0] == losses[1] != losses[2]
    losses[0].backward()
    found = gradients(model)
    rhos = [value for name, value in found.items() if "experts" in name and "rho" in name]
    assert len(rhos) == 4 and all(value.abs().max() > 0 for value in rhos)


# --- what is refused or warned about --------------------------------------------------------------


@pytest.mark.parametrize("config", [ScalablConfig, PolarConfig])
def test_methods_without_it_say_so(config: Any) -> None:
    with pytest.raises(ValueError, match="target_parameters must be left out"):
        config(target_parameters=TARGETS)


def test_options_that_do_not_go_together() -> None:
    with pytest.raises(ValueError, match="scope must be 'token' or 'none'"):
        BlobConfig(target_parameters=TARGETS, scope="example")
    with pytest.raises(ValueError, match="lora_dropout must be 0"):
        BlobConfig(target_parameters=TARGETS, lora_dropout=0.1)


def test_laplace_says_so_and_changes_nothing() -> None:
    model = fill(adapted(moe(), LoraConfig), scale=0.3).eval()
    before = logits(model)
    data = [{"input_ids": IDS, "labels": torch.tensor([0, 2, 1, 0])}]
    with pytest.raises(
        ValueError, match=r"experts\.down_proj cannot have a posterior: its factors are"
    ):
        bayesianize(model, "laplace", data, choices=[5, 6, 7], progress=False)
    assert torch.equal(logits(model), before)


def test_a_parameter_that_is_not_there() -> None:
    targets = [TARGETS[0], "mlp.experts.w1"]
    with pytest.warns(
        UserWarning, match=r"target_parameters: mlp\.experts\.w1 must each be"
    ) as seen:
        adapted(moe(), target_parameters=targets)
    assert any("whose experts have down_proj, gate_up_proj" in str(w.message) for w in seen)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        adapted(moe())


def test_undo_restores_the_forward_pass() -> None:
    model = adapted(moe(), LoraConfig)
    layers = [m for m in model.modules() if isinstance(m, lora.ParamWrapper)]
    with pytest.raises(KeyboardInterrupt), as_before_if_stopped(model):
        for layer in layers:
            wrap(layer)
        assert any(hasattr(m, "bayes_wrappers") for m in model.modules())
        raise KeyboardInterrupt
    assert not any(hasattr(m, "bayes_wrappers") for m in model.modules())
    assert {type(layer) for layer in layers} == {lora.ParamWrapper}
