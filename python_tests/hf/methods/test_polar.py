"""PoLAR adapters and PoLAR-VBLL in stock models: formulas, persistence, training, prediction."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accuracy import assert_same_but_rounding
from torch import Tensor, nn

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

import tiny_task  # noqa: E402
from peft import LoraConfig, PeftModel, get_peft_model  # noqa: E402
from transformers import Trainer, TrainerCallback, TrainingArguments  # noqa: E402

from bayes_kernels.hf import (  # noqa: E402
    BayesTrainer,
    BlobConfig,
    PolarConfig,
    PolarVbllConfig,
    calibrate_head,
    class_features,
    class_logits,
    discard_laplace,
    export_lora,
    import_lora,
    kl_divergence,
    laplace_refine,
    parameter_groups,
    posterior,
    predict,
    predict_dataset,
    stiefel_error,
    variational_loss,
)
from bayes_kernels.hf.heads import trim_head  # noqa: E402
from bayes_kernels.hf.methods.polar import stiefel_factors  # noqa: E402
from bayes_kernels.hf.methods.polar_vbll import find_head  # noqa: E402
from bayes_kernels.stiefel import StiefelAdamW  # noqa: E402

# Commands choose the GPU where there is one; what they find is compared with the CPU.
pytestmark = pytest.mark.cpu_only

_DRAW = torch.Generator().manual_seed(1)
IDS = torch.randint(3, 64, (32, 6), generator=_DRAW)
DATA = [
    {"input_ids": row, "attention_mask": torch.ones(6, dtype=torch.long), "labels": int(row[0]) % 3}
    for row in IDS
]
BATCH = {"input_ids": IDS[:8], "labels": IDS[:8, 0] % 3}


def bert_base(**options: Any) -> Any:
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 64,
        "num_labels": 3,
        "max_position_embeddings": 32,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    config = transformers.BertConfig(**{**sizes, **options})
    return transformers.BertForSequenceClassification(config).eval()


def llama_base(dtype: torch.dtype = torch.float32) -> Any:
    """A causal model with the head of three answers."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
    )
    model = transformers.LlamaForCausalLM(config).to(dtype).eval()
    return trim_head(model, [7, 11, 13])


def wrap(base: Any, config: Any = PolarConfig, **options: Any) -> Any:
    causal = hasattr(base, "answer_ids")
    names = ["q_proj", "v_proj"] if causal else ["query", "value"]
    kind = "CAUSAL_LM" if causal else "SEQ_CLS"
    return get_peft_model(base, config(r=4, target_modules=names, task_type=kind, **options))


def fill(model: nn.Module, seed: int = 2) -> Any:
    """Adapters that do something."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_core" in name:
                p.copy_(torch.randn(p.shape, generator=draw))
            elif "log_scale" in name:
                p.add_(torch.rand(p.shape, generator=draw))
    return model


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor = IDS[:8], **inputs: Any) -> Tensor:
    return model(input_ids=ids, **inputs).logits


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    defaults: dict[str, Any] = {
        "per_device_train_batch_size": 8,
        "max_steps": 4,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "max_grad_norm": 0.0,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "seed": 5,
    }
    return TrainingArguments(str(folder), **{**defaults, **options})


def fit(model: Any, folder: Path, trainer: Any = BayesTrainer, **options: Any) -> Any:
    ours = {k: options.pop(k) for k in ("kl_mode", "optimizer_cls_and_kwargs") if k in options}
    trainer = trainer(model=model, args=arguments(folder, **options), train_dataset=DATA, **ours)
    trainer.train()
    return trainer


BASES: list[Any] = [bert_base, llama_base]
CONFIGS = [PolarConfig, PolarVbllConfig]


# --- Adapters ------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", BASES)
@pytest.mark.parametrize("config", CONFIGS)
def test_starts_as_the_base_model(make: Any, config: Any) -> None:
    base = make()
    before = logits(base)
    model = wrap(base, config)
    torch.testing.assert_close(logits(model), before, rtol=1e-6, atol=1e-6)
    assert float(stiefel_error(model)) < 2e-6
    factors = stiefel_factors(model)
    assert len(factors) == 8 and all(p.requires_grad for p in factors)
    assert not torch.equal(factors[0], factors[4])


def test_leaves_the_generator_where_plain_lora_does() -> None:
    states = []
    for config in (LoraConfig, PolarConfig, PolarVbllConfig):
        wrap(bert_base(), config)
        states.append(torch.random.get_rng_state())
    assert torch.equal(states[0], states[1]) and torch.equal(states[0], states[2])


@pytest.mark.parametrize("core", ["full", "diagonal"])
def test_formula_and_gradients(core: str) -> None:
    model = fill(wrap(bert_base(), core=core, lora_alpha=6))
    layer = model.base_model.model.bert.encoder.layer[0].attention.self.query
    x = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(3))
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    theta = layer.lora_core["default"]
    square = torch.diag(theta) if core == "diagonal" else theta
    weight = layer.base_layer.weight + 6 / 4 * b @ square @ a
    want = nn.functional.linear(x, weight, layer.base_layer.bias)
    torch.testing.assert_close(layer(x), want, rtol=1e-5, atol=1e-5)
    parameters = [a, b, theta]
    seed = torch.randn(want.shape, generator=torch.Generator().manual_seed(4))
    ours = torch.autograd.grad((layer(x) * seed).sum(), parameters)
    theirs = torch.autograd.grad((want * seed).sum(), parameters)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_half_precision_bases_keep_fp32_adapters() -> None:
    model = wrap(llama_base(torch.bfloat16), PolarVbllConfig)
    fp32 = [p for n, p in model.named_parameters() if p.requires_grad]
    assert fp32 and all(p.dtype == torch.float32 for p in fp32)
    assert float(stiefel_error(model)) < 2e-6
    model.half()
    assert all(p.dtype == torch.float32 for p in fp32)
    assert float(stiefel_error(model)) < 2e-6
    model.to(torch.bfloat16)
    loss = variational_loss(fill(model), BATCH, n_train=32)
    loss.loss.backward()
    assert torch.isfinite(loss.loss) and all(torch.isfinite(p.grad).all() for p in fp32)


@pytest.mark.parametrize("make", BASES)
@pytest.mark.parametrize("config", CONFIGS)
def test_merging(make: Any, config: Any) -> None:
    model = fill(wrap(make(), config))
    mean = logits(model)
    with pytest.warns(UserWarning, match="posterior mean only"):
        model.merge_adapter()
    torch.testing.assert_close(logits(model), mean, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), mean, rtol=1e-4, atol=1e-5)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), logits(make()), rtol=1e-6, atol=1e-6)
    with pytest.warns(UserWarning, match="posterior mean only"):
        merged = model.merge_and_unload()
    assert not any("lora" in name or "log_scale" in name for name in merged.state_dict())
    torch.testing.assert_close(logits(merged), mean, rtol=1e-4, atol=1e-5)


def test_merging_keeps_the_dtype_of_the_base() -> None:
    model = fill(wrap(llama_base(torch.bfloat16), PolarVbllConfig))
    mean = logits(model)
    with pytest.warns(UserWarning, match="posterior mean only"):
        merged = model.merge_and_unload()
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(logits(merged).float(), mean.float(), rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("make", "config", "core"),
    [
        (bert_base, PolarVbllConfig, "full"),
        (llama_base, PolarVbllConfig, "full"),
        (bert_base, PolarConfig, "diagonal"),
    ],
)
def test_export_to_plain_lora(make: Any, config: Any, core: str, tmp_path: Path) -> None:
    model = fill(wrap(make(), config, core=core))
    export_lora(model, tmp_path / "plain")
    assert json.loads((tmp_path / "plain/adapter_config.json").read_text())["peft_type"] == "LORA"
    plain = PeftModel.from_pretrained(make(), str(tmp_path / "plain")).eval()
    assert not any("core" in name or "log_scale" in name for name in plain.state_dict())
    torch.testing.assert_close(logits(plain), logits(model), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="which must be 'mean' for method 'polar"):
        export_lora(model, tmp_path / "draw", which=0)


@pytest.mark.parametrize("core", ["full", "diagonal"])
def test_import_from_plain_lora(core: str, tmp_path: Path) -> None:
    plain = wrap(bert_base(), LoraConfig)
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in plain.named_parameters():
            if "lora_B" in name or "classifier.modules_to_save" in name:
                p.copy_(torch.randn(p.shape, generator=draw))
    plain.save_pretrained(str(tmp_path))
    for method in ("polar", "polar-vbll"):
        model = import_lora(bert_base(), tmp_path, method=method, core=core).eval()
        torch.testing.assert_close(logits(model), logits(plain), rtol=1e-4, atol=1e-4)
        assert float(stiefel_error(model)) < 5e-6


@pytest.mark.parametrize(
    ("make", "covariance"),
    [(bert_base, "diagonal"), (llama_base, "dense"), (bert_base, "low_rank")],
)
def test_saving_and_loading(make: Any, covariance: str, tmp_path: Path) -> None:
    model = fill(wrap(make(), PolarVbllConfig, head_covariance=covariance, head_noise=True))
    model.save_pretrained(str(tmp_path), save_embedding_layers=False)
    assert (tmp_path / "adapter_model.safetensors").is_file()
    for empty in (False, True):
        loaded = PeftModel.from_pretrained(make(), str(tmp_path), low_cpu_mem_usage=empty).eval()
        pairs = zip(class_logits(model, BATCH), class_logits(loaded, BATCH), strict=True)
        for mine, other in pairs:
            assert_same_but_rounding(other, mine)
        assert_same_but_rounding(kl_divergence(loaded), kl_divergence(model))


def test_second_adapter(tmp_path: Path) -> None:
    model = fill(wrap(bert_base(), PolarVbllConfig))
    model.save_pretrained(str(tmp_path))
    first = logits(model)
    second = PolarVbllConfig(r=2, target_modules=["key"], task_type="SEQ_CLS")
    model.add_adapter("other", second)
    model.set_adapter("other")
    torch.testing.assert_close(logits(model), logits(bert_base()), rtol=1e-6, atol=1e-6)
    assert find_head(model) is not find_head(model, "default")
    model.load_adapter(str(tmp_path), "again")
    model.set_adapter("again")
    assert torch.equal(logits(model), first)
    model.delete_adapter("again")
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    with pytest.raises(ValueError, match="must share the last layer's options"):
        options = {"head_covariance": "dense", "task_type": "SEQ_CLS"}
        model.add_adapter("dense", PolarVbllConfig(r=2, target_modules=["key"], **options))
    with pytest.raises(ValueError, match="with and without a variational last layer"):
        model.add_adapter("blob", BlobConfig(r=2, target_modules=["key"], task_type="SEQ_CLS"))


# --- The last layer ------------------------------------------------------------------------------


def padded(side: str) -> dict[str, Tensor]:
    mask = torch.ones(8, 6, dtype=torch.long)
    mask[::2, -2:] = 0
    if side == "left":
        mask = mask.flip(1)
    return {"input_ids": IDS[:8].where(mask.bool(), 0), "attention_mask": mask}


def roberta_base() -> Any:
    torch.manual_seed(0)
    config = transformers.RobertaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        vocab_size=64,
        num_labels=3,
        max_position_embeddings=32,
        pad_token_id=0,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return transformers.RobertaForSequenceClassification(config).eval()


def llama_classifier() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        vocab_size=64,
        num_labels=3,
        pad_token_id=0,
    )
    return transformers.LlamaForSequenceClassification(config).eval()


@pytest.mark.parametrize("make", [bert_base, llama_base, roberta_base, llama_classifier])
def test_features_give_the_logits(make: Any) -> None:
    base = make()
    names = ["query", "value"] if "Llama" not in type(base).__name__ else ["q_proj", "v_proj"]
    kind = "CAUSAL_LM" if make is llama_base else "SEQ_CLS"
    batch = padded("left" if make is llama_base else "right")
    want = logits(base, batch["input_ids"], attention_mask=batch["attention_mask"])
    model = get_peft_model(base, PolarVbllConfig(r=4, target_modules=names, task_type=kind))
    fill(model).eval()
    plain = logits(model, batch["input_ids"], attention_mask=batch["attention_mask"])
    assert not torch.allclose(plain, want, atol=1e-4)
    features = class_features(model, {**batch, "labels": torch.zeros(8)})
    head = find_head(model)
    assert head is not None and features.shape == (8, 32) and "forward" not in head.__dict__
    mean, variance = class_logits(model, batch)
    torch.testing.assert_close(mean, plain, rtol=1e-5, atol=1e-6)
    scale = head.log_scale
    assert scale is not None
    want = features.square() @ (2 * scale).exp().T
    torch.testing.assert_close(variance, want, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("make", BASES)
def test_loss_is_the_negative_evidence_lower_bound(make: Any) -> None:
    model = fill(wrap(make(), PolarVbllConfig, head_prior_scale=0.5))
    terms = variational_loss(model, BATCH, n_train=32, kl_weight=0.3)
    mean, variance = class_logits(model, BATCH)
    bound = mean.gather(1, BATCH["labels"][:, None])[:, 0] - (mean + variance / 2).logsumexp(1)
    torch.testing.assert_close(terms.nll, -bound.mean(), rtol=1e-5, atol=1e-6)
    head = find_head(model)
    assert head is not None and head.log_scale is not None
    posterior = torch.distributions.Normal(head.weight_mean, head.log_scale.exp())
    prior = torch.distributions.Normal(0.0, (2 * 0.5 / 32) ** 0.5)
    kl = torch.distributions.kl_divergence(posterior, prior).sum()
    torch.testing.assert_close(terms.kl, kl, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(kl_divergence(model), terms.kl)
    torch.testing.assert_close(terms.loss, terms.nll + 0.3 / 32 * terms.kl)
    # Below the expected log-likelihood, which lies below that of the mean prediction.
    eps = torch.randn(4000, *mean.shape, generator=torch.Generator().manual_seed(0))
    draws = (mean + variance.sqrt() * eps).log_softmax(-1)
    expected = draws.gather(2, BATCH["labels"].expand(4000, -1)[..., None]).mean()
    assert float(bound.mean()) < float(expected)
    terms.loss.backward()
    with_gradients = {n for n, p in model.named_parameters() if p.grad is not None}
    assert with_gradients == {n for n, p in model.named_parameters() if p.requires_grad}


def test_missing_choices_do_not_count() -> None:
    model = fill(wrap(llama_base(), PolarVbllConfig))
    mask = torch.ones(8, 3, dtype=torch.bool)
    mask[::2, 2] = False
    labels = torch.tensor([0, 2, 1, 1, 0, 2, 1, -100])
    batch = {"input_ids": IDS[:8], "labels": labels, "choice_mask": mask}
    mean, variance = class_logits(model, batch)
    two = slice(0, 7, 2)
    small = mean[two, :2] + variance[two, :2] / 2
    nll = small.logsumexp(1) - mean[two].gather(1, labels[two][:, None])[:, 0]
    rest = torch.tensor([1, 3, 5])
    tilted = (mean + variance / 2)[rest]
    nll = torch.cat([nll, tilted.logsumexp(1) - mean[rest].gather(1, labels[rest][:, None])[:, 0]])
    loss = variational_loss(model, batch, n_train=32)
    torch.testing.assert_close(loss.nll, nll.mean(), rtol=1e-5, atol=1e-6)
    result = predict(model, batch, n_samples=50)
    assert float(result.probs[two, 2].abs().max()) < 1e-30
    assert torch.isfinite(result.entropy).all()


def test_one_pass_serves_any_number_of_draws() -> None:
    model = fill(wrap(bert_base(), PolarVbllConfig, head_init_variance=0.05))
    calls = []
    model.base_model.model.bert.register_forward_hook(lambda *_: calls.append(1))
    result = predict(model, BATCH, n_samples=1000, seed=3)
    assert len(calls) == 1 and result.n_samples == 1000
    assert torch.equal(result.labels, BATCH["labels"])  # type: ignore[arg-type]
    assert (result.mutual_information > 1e-4).all()
    torch.testing.assert_close(result.probs.sum(1), torch.ones(8).double(), rtol=0, atol=1e-5)
    # Independent of how examples are batched, and of the batch they are in.
    items = [{k: v for k, v in row.items() if k != "labels"} for row in DATA[:8]]
    parts = predict_dataset(model, items, batch_size=3, n_samples=1000, seed=3, progress=False)
    torch.testing.assert_close(parts.log_probs, result.log_probs, rtol=1e-5, atol=1e-5)
    again = predict(model, BATCH, n_samples=1000, seed=3)
    assert torch.equal(again.log_probs, result.log_probs)
    other = predict(model, BATCH, n_samples=1000, seed=4)
    assert not torch.equal(other.log_probs, result.log_probs)
    # The draws that are written out are those that were averaged.
    for count in (37, 38):  # an even number is drawn in pairs
        few = predict(model, BATCH, n_samples=count, seed=3)
        same = predict(model, BATCH, n_samples=count, seed=3, return_samples=True)
        draws = same.sample_log_probs
        assert draws is not None and torch.equal(same.log_probs, few.log_probs)
        assert torch.equal(same.expected_entropy, few.expected_entropy)
        mean_of_draws = draws.logsumexp(0) - torch.tensor(float(count)).double().log()
        torch.testing.assert_close(mean_of_draws, few.log_probs, rtol=0, atol=1e-5)
        entropy = -(draws.exp() * draws).sum(-1).mean(0)
        torch.testing.assert_close(entropy, few.expected_entropy, rtol=0, atol=1e-5)
    # And they agree with those of another seed.
    kept = predict(model, BATCH, n_samples=4000, seed=0, return_samples=True)
    assert kept.sample_log_probs is not None and kept.sample_log_probs.shape == (4000, 8, 3)
    torch.testing.assert_close(kept.probs, result.probs, rtol=0, atol=0.03)
    torch.testing.assert_close(kept.expected_entropy, result.expected_entropy, rtol=0, atol=0.03)
    mean = predict(model, BATCH, n_samples=0)
    torch.testing.assert_close(mean.probs.float(), logits(model).softmax(1), rtol=1e-5, atol=1e-6)
    assert torch.equal(mean.entropy, mean.expected_entropy)
    with pytest.raises(ValueError, match="choices must be None"):
        predict(model, BATCH, choices=[1, 2])


def test_calibration(tmp_path: Path) -> None:
    model = wrap(bert_base(), PolarVbllConfig)
    before = logits(model)
    scale = calibrate_head(model, BATCH, logit_variance=0.5)
    assert torch.equal(logits(model), before)
    head = find_head(model)
    assert head is not None and head.log_scale is not None
    with torch.no_grad():
        squares = class_features(model, BATCH).square().sum(1).mean().item()
    assert head.prior_variance == pytest.approx(0.5 / squares)
    assert scale == pytest.approx(head.prior_variance * 16)
    assert (2 * head.log_scale).exp().mean().item() == pytest.approx(0.05 / squares, rel=1e-4)
    kl = kl_divergence(model)
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(bert_base(), str(tmp_path))
    torch.testing.assert_close(kl_divergence(loaded), kl)  # the prior is saved too
    with pytest.raises(ValueError, match="logit_variance must be positive"):
        calibrate_head(model, BATCH, logit_variance=0.0)
    for known in (model, loaded, wrap(bert_base(), PolarVbllConfig, head_prior_scale=2.0)):
        with pytest.raises(ValueError, match="the head must be new, got head_prior_scale="):
            calibrate_head(known, BATCH)


@pytest.mark.parametrize("method", ["cholesky", "subspace"])
def test_laplace_refinement(method: str, tmp_path: Path) -> None:
    model = fill(wrap(bert_base(), PolarVbllConfig, head_prior_scale=0.4))
    before = class_logits(model, BATCH)
    batches = [BATCH, {"input_ids": IDS[8:16]}]
    report = laplace_refine(model, batches, method=method)
    assert report.n_examples == 16
    mean, variance = class_logits(model, BATCH)
    assert torch.equal(mean, before[0])
    with torch.no_grad():
        phi = class_features(model, {"input_ids": IDS[:16]}).double()
    p = logits(model, IDS[:16]).double().softmax(1)
    for c in range(3):
        weighted = phi * (p * (1 - p))[:, c, None]
        hessian = phi.T @ weighted + torch.eye(32).double() * 32 / 0.8
        want = (phi[:8] @ torch.linalg.inv(hessian) * phi[:8]).sum(1)
        torch.testing.assert_close(variance[:, c].double(), want, rtol=1e-4, atol=1e-8)
    with pytest.raises(RuntimeError, match="covariances are the Laplace ones"):
        variational_loss(model, BATCH, n_train=32)
    with pytest.raises(ValueError, match="the head must be new, got one with Laplace"):
        calibrate_head(model, BATCH)
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(bert_base(), str(tmp_path)).eval()
    assert_same_but_rounding(class_logits(loaded, BATCH)[1], variance)
    # Beside another adapter, whose prior is another and whose head is not refined.
    beside = wrap(bert_base(), PolarVbllConfig)
    beside.load_adapter(str(tmp_path), "second")
    beside.set_adapter("second")
    for mine, other in zip(class_logits(beside, BATCH), (mean, variance), strict=True):
        assert_same_but_rounding(mine, other)
    alone, second = find_head(loaded), find_head(beside)
    assert alone is not None and second is not None and second.refined
    assert second.prior_variance == alone.prior_variance == pytest.approx(0.8 / 32)
    beside.set_adapter("default")
    first = find_head(beside)
    assert first is not None and not first.refined and first.prior_variance == 2 / 32
    discard_laplace(loaded)
    assert_same_but_rounding(class_logits(loaded, BATCH)[1], before[1])
    loaded.save_pretrained(str(tmp_path / "again"))
    PeftModel.from_pretrained(bert_base(), str(tmp_path / "again"))


# --- Training ------------------------------------------------------------------------------------


@pytest.mark.parametrize("stiefel", ["landing", "polar", "qr"])
@pytest.mark.parametrize("config", CONFIGS)
def test_training(stiefel: str, config: Any, tmp_path: Path) -> None:
    model = wrap(bert_base(), config, stiefel=stiefel)
    trainer = fit(model, tmp_path, max_steps=12, learning_rate=3e-3)
    assert isinstance(trainer.optimizer.optimizer, StiefelAdamW)
    bound = 0.2 if stiefel == "landing" else 1e-5
    assert float(stiefel_error(model)) < bound
    log = [entry for entry in trainer.state.log_history if "nll" in entry]
    assert log[-1]["loss"] < log[0]["loss"]
    assert all(entry["orthogonality"] < bound for entry in log)
    assert log[-1]["orthogonality"] == pytest.approx(float(stiefel_error(model)), abs=1e-6)
    if config is PolarVbllConfig:
        for entry in log:
            loss = entry["nll"] + entry["kl"] / 32
            assert entry["kl_weight"] == pytest.approx(0.3 / 32)
            assert entry["elbo"] == pytest.approx(-loss)
    else:
        assert "kl" not in log[0]


@pytest.mark.parametrize("core", ["full", "diagonal"])
@pytest.mark.parametrize("config", CONFIGS)
def test_trains_under_autocast(core: str, config: Any, tmp_path: Path) -> None:
    model = wrap(bert_base(), config, core=core)
    fit(model, tmp_path, max_steps=2, bf16=True)
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_trains_causal_models_and_evaluates(tmp_path: Path) -> None:
    model = wrap(llama_base(), PolarVbllConfig, kl_weight=0.1)
    trainer = BayesTrainer(
        model=model,
        args=arguments(tmp_path, max_steps=12),
        train_dataset=DATA,
        eval_dataset=DATA,
        eval_samples=200,
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before
    trainer.eval_samples = 0
    assert trainer.evaluate()["eval_loss"] > 0


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_step_of_the_trainer_is_the_loop_of_the_docs(accumulation: int, tmp_path: Path) -> None:
    data = [{k: v for k, v in row.items() if k != "attention_mask"} for row in DATA[:8]]
    batch = {"input_ids": IDS[:8], "labels": IDS[:8, 0] % 3}
    models = [fill(wrap(bert_base(), PolarVbllConfig, head_lr=2e-3)) for _ in range(2)]
    options = {"max_steps": 1, "per_device_train_batch_size": 8 // accumulation}
    trainer = BayesTrainer(
        model=models[0],
        args=arguments(tmp_path, gradient_accumulation_steps=accumulation, **options),
        train_dataset=data,
    )
    trainer.train()
    optimizer = StiefelAdamW(parameter_groups(models[1]), lr=1e-2)
    models[1].train()
    variational_loss(models[1], batch, n_train=8, kl_weight=0.3).loss.backward()
    optimizer.step()
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=2e-5)


def test_gauss_seidel(tmp_path: Path) -> None:
    data = [{k: v for k, v in row.items() if k != "attention_mask"} for row in DATA[:8]]
    batch = {"input_ids": IDS[:8], "labels": IDS[:8, 0] % 3}
    model = fill(wrap(bert_base(), PolarVbllConfig, alternation="gauss-seidel"))
    plain = copy.deepcopy(model)
    trainer = BayesTrainer(model=model, args=arguments(tmp_path, max_steps=1), train_dataset=data)
    calls: list[int] = []
    hook = model.base_model.model.bert.register_forward_hook(lambda *_: calls.append(1))
    trainer.train()
    hook.remove()
    assert len(calls) == 1  # one pass of the model serves both blocks
    head = find_head(plain)
    assert head is not None
    plain.train()
    own = {id(p) for p in head.parameters()}
    blocks = [
        [p for p in plain.parameters() if p.requires_grad and (id(p) in own) == first]
        for first in (True, False)
    ]
    optimizer = StiefelAdamW(parameter_groups(plain), lr=1e-2)
    for block in blocks:
        loss = variational_loss(plain, batch, n_train=8, kl_weight=0.3).loss
        for p, grad in zip(block, torch.autograd.grad(loss, block), strict=True):
            p.grad = grad
        optimizer.step()
        optimizer.zero_grad()
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=2e-5)


def test_periodic_alternation(tmp_path: Path) -> None:
    options = {"alternation": "periodic", "alternation_period": 2}
    model = fill(wrap(bert_base(), PolarVbllConfig, **options))
    seen: list[tuple[bool, bool]] = []

    class Record(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kw: Any) -> None:
            names = {n for n, p in kw["model"].named_parameters() if p.grad is not None}
            seen.append((any("lora" in n for n in names), any("log_scale" in n for n in names)))

    trainer = BayesTrainer(
        model=model,
        args=arguments(tmp_path, max_steps=5),
        train_dataset=DATA,
        callbacks=[Record()],
    )
    trainer.train()
    assert seen == [(True, False)] * 2 + [(False, True)] * 2 + [(True, False)]


@pytest.mark.parametrize("options", [{}, {"alternation": "gauss-seidel", "stiefel": "qr"}])
def test_resumed_training_is_the_uninterrupted_one(options: Any, tmp_path: Path) -> None:
    whole = wrap(bert_base(), PolarVbllConfig, **options)
    save = {"save_strategy": "steps", "save_steps": 3}
    fit(whole, tmp_path / "a", max_steps=6, lr_scheduler_type="linear")
    first = wrap(bert_base(), PolarVbllConfig, **options)
    stop = arguments(tmp_path / "b", max_steps=6, lr_scheduler_type="linear", **save)

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kw: Any) -> None:
            control.should_training_stop = state.global_step == 3

    trainer = BayesTrainer(model=first, args=stop, train_dataset=DATA, callbacks=[Stop()])
    trainer.train()
    second = wrap(bert_base(), PolarVbllConfig, **options)
    BayesTrainer(model=second, args=stop, train_dataset=DATA).train(resume_from_checkpoint=True)
    for a, b in zip(whole.parameters(), second.parameters(), strict=True):
        assert_same_but_rounding(b, a, units=4096)


@pytest.mark.parametrize("find_unused", [False, True])
def test_data_parallel_sees_that_the_head_is_used(find_unused: bool, tmp_path: Path) -> None:
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model, alone = (fill(wrap(bert_base(), PolarVbllConfig)) for _ in range(2))
        parallel = nn.parallel.DistributedDataParallel(model, find_unused_parameters=find_unused)
        for _ in range(2):
            for each in (parallel, alone):
                each.zero_grad()
                variational_loss(each, BATCH, n_train=32).loss.backward()
        for one, other in zip(model.parameters(), alone.parameters(), strict=True):
            assert (one.grad is None) == (other.grad is None)
            if one.grad is not None:
                torch.testing.assert_close(one.grad, other.grad, rtol=1e-5, atol=1e-7)
    finally:
        torch.distributed.destroy_process_group()


def test_gradient_checkpointing() -> None:
    found = []
    for checkpointing in (False, True):
        model = fill(wrap(llama_base(), PolarVbllConfig))
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        model.train()
        variational_loss(model, BATCH, n_train=32).loss.backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(found[0]) == len(found[1])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_stock_trainer_with_the_optimiser(tmp_path: Path) -> None:
    model = wrap(bert_base(), stiefel="polar")
    options = {"params": parameter_groups(model), "lr": 3e-3}
    trainer = fit(
        model,
        tmp_path,
        Trainer,
        max_steps=8,
        lr_scheduler_type="cosine",
        optimizer_cls_and_kwargs=(StiefelAdamW, options),
    )
    assert float(stiefel_error(model)) < 1e-5
    log = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert log[-1] < log[0]


def test_parameter_groups() -> None:
    model = wrap(bert_base(), PolarVbllConfig, head_lr=0.5, stiefel_penalty=0.25)
    groups = parameter_groups(model, weight_decay=0.1)
    flags = [
        (g.get("stiefel"), g.get("lr"), g.get("weight_decay"), len(g["params"])) for g in groups
    ]
    assert flags == [(True, None, None, 8), (None, 0.5, None, 3), (None, None, 0.1, 4)]
    assert groups[0]["penalty"] == 0.25 and groups[0]["eps"] == 1e-6
    assert "eps" not in parameter_groups(wrap(bert_base(), stiefel="qr"))[0]
    every = sum(len(g["params"]) for g in groups)
    assert every == sum(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match="must have an active PoLAR adapter"):
        parameter_groups(wrap(bert_base(), BlobConfig))


# --- Mistakes ------------------------------------------------------------------------------------


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"r must be at most .* got 40 and 32"):
        options: dict[str, Any] = {"target_modules": ["query"], "task_type": "SEQ_CLS"}
        get_peft_model(bert_base(), PolarConfig(r=40, **options))
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4
    )
    config.vocab_size = 64
    whole = transformers.LlamaForCausalLM(config)
    with pytest.raises(ValueError, match="must be a sequence classifier, or a causal model with a"):
        get_peft_model(whole, PolarVbllConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="at least two classes"):
        wrap(bert_base(num_labels=1), PolarVbllConfig)
    for name, value in (("stiefel", "cayley"), ("head_lr", -1), ("alternation_period", 0)):
        with pytest.raises(ValueError, match=f"BayesLoraConfig: {name} must be"):
            PolarVbllConfig(**{name: value})
    model = wrap(bert_base(), PolarVbllConfig, alternation="gauss-seidel")
    with pytest.raises(ValueError, match="needs one process"):
        BayesTrainer(
            model=model,
            args=arguments(tmp_path, gradient_accumulation_steps=2),
            train_dataset=DATA,
        )
    for optim in ("sgd", "adamw_torch_8bit"):
        with pytest.raises(ValueError, match="PoLAR adapters need optim='adamw_torch'"):
            fit(wrap(bert_base()), tmp_path, optim=optim)
    headed = wrap(bert_base(), PolarVbllConfig, head_prior_scale=1.0)
    with pytest.raises(ValueError, match="label_smoothing_factor must not be given"):
        BayesTrainer(model=headed, args=arguments(tmp_path, label_smoothing_factor=0.1))
    with pytest.raises(ValueError, match="compute_loss_func must not be given"):
        BayesTrainer(model=headed, args=arguments(tmp_path), compute_loss_func=lambda *_: 0)
    with pytest.warns(UserWarning, match="call calibrate_head"):
        BayesTrainer(model=wrap(bert_base(), PolarVbllConfig), args=arguments(tmp_path))
    plain = wrap(bert_base())
    for pointwise in (plain, headed):
        with pytest.raises(ValueError, match="weights have no draws"), posterior(pointwise):
            pass
    with pytest.raises(ValueError, match="n_samples must be 0 for adapters without a posterior"):
        predict(plain, BATCH)
    assert predict(plain, BATCH, n_samples=0).probs.shape == (8, 3)
    with pytest.raises(ValueError, match="must have an active variational last layer"):
        variational_loss(plain, BATCH, n_train=3)
    with pytest.raises(ValueError, match="batch must have labels"):
        variational_loss(model, {"input_ids": IDS[:2]}, n_train=3)
    with model.disable_adapter(), pytest.raises(ValueError, match="enable the adapter"):
        class_features(model, {"input_ids": IDS[:2]})


# --- The command line ----------------------------------------------------------------------------


@pytest.mark.filterwarnings("error:BayesTrainer. head_prior_scale")  # calibrated before
@pytest.mark.parametrize("method", ["polar", "polar-vbll"])
def test_command_line(method: str, tmp_path: Path) -> None:
    pytest.importorskip("typer")
    from typer.testing import CliRunner

    from bayes_kernels.cli import app

    def call(*words: object) -> Any:
        result = CliRunner().invoke(app.app, [str(word) for word in words])
        assert result.exit_code == 0, result.output
        return result

    data = tiny_task.write_data(tmp_path / "data")
    model = tiny_task.write_model(tmp_path / "model")
    out = tmp_path / "out"
    options = ["--method", method, "--model", model, "--rank", 4, "--steps", 8, "--lr", 0.005]
    if method == "polar-vbll":
        options += ["--laplace", "--head-lr", 0.01, "--kl-weight", 0.1, "--stiefel", "polar"]
    shown = call("train", data, "--ood", data / "ood.jsonl", *options, "--out", out)
    rows = json.loads((out / "metrics.json").read_text())
    assert ("PoLAR-VBLL N=1000" if method == "polar-vbll" else "PoLAR (MAP)") in shown.stdout
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["method"] == method
    assert config["laplace"] == (None if method == "polar" else "cholesky")
    if method == "polar":
        return
    call("evaluate", out)
    again = json.loads((out / "evaluation/metrics.json").read_text())
    before, after = ({row["name"]: row["mean"] for row in r["methods"]} for r in (rows, again))
    assert len(after) >= 2 and set(after) <= set(before)
    for name, scores in after.items():  # the loaded adapter is the one that was trained
        assert scores == pytest.approx({key: before[name][key] for key in scores}, rel=1e-5)
    found = call("predict", out, "--text", "the bright warm road", "--json").stdout
    prediction = json.loads(found.splitlines()[-1])
    assert prediction["label"] and prediction["mutual_information"] is not None
