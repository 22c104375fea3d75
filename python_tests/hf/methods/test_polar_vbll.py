"""PoLAR-VBLL in stock models: the variational last layer, its loss, predictions, training."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from accuracy import assert_same_but_rounding
from peft import PeftModel
from tiny_models import CLASSES, ROWS, adapted, answering_llama, bert, llama, logits
from torch import Tensor, nn
from transformers import (
    LlamaForSequenceClassification,
    RobertaForSequenceClassification,
    TrainerCallback,
)

from bayes_kernels.hf import (
    BayesTrainer,
    BlobConfig,
    PolarVbllConfig,
    Sampling,
    calibrate_head,
    class_features,
    class_logits,
    discard_laplace,
    kl_divergence,
    laplace_refine,
    parameter_groups,
    predict,
    predict_dataset,
    predict_several,
    variational_loss,
)
from bayes_kernels.hf.last_layer import find_head
from bayes_kernels.stiefel import StiefelAdamW
from hf.methods.polar_models import BASES, BATCH, arguments, fill, fit


@pytest.mark.parametrize(
    ("make", "covariance"),
    [(bert, "diagonal"), (answering_llama, "dense"), (bert, "low_rank")],
)
def test_saving_and_loading(make: Any, covariance: str, tmp_path: Path) -> None:
    model = fill(adapted(make(), PolarVbllConfig, head_covariance=covariance, head_noise=True))
    model.save_pretrained(str(tmp_path), save_embedding_layers=False)
    assert (tmp_path / "adapter_model.safetensors").is_file()
    for empty in (False, True):
        loaded = PeftModel.from_pretrained(make(), str(tmp_path), low_cpu_mem_usage=empty).eval()
        pairs = zip(class_logits(model, BATCH), class_logits(loaded, BATCH), strict=True)
        for mine, other in pairs:
            assert_same_but_rounding(other, mine)
        assert_same_but_rounding(kl_divergence(loaded), kl_divergence(model))


def test_second_adapter(tmp_path: Path) -> None:
    model = fill(adapted(bert(), PolarVbllConfig))
    model.save_pretrained(str(tmp_path))
    first = logits(model)
    second = PolarVbllConfig(r=2, target_modules=["key"], task_type="SEQ_CLS")
    model.add_adapter("other", second)
    model.set_adapter("other")
    torch.testing.assert_close(logits(model), logits(bert()), rtol=1e-6, atol=1e-6)
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
    return {"input_ids": ROWS[:8].where(mask.bool(), 0), "attention_mask": mask}


def roberta() -> Any:
    options = {"num_hidden_layers": 1, "pad_token_id": 0}
    return bert(RobertaForSequenceClassification, **options)


def llama_classifier() -> Any:
    options = {"num_hidden_layers": 1, "num_labels": 3, "pad_token_id": 0}
    return llama(LlamaForSequenceClassification, num_key_value_heads=4, **options)


@pytest.mark.parametrize("make", [bert, answering_llama, roberta, llama_classifier])
def test_features_give_the_logits(make: Any) -> None:
    base = make()
    kind = "CAUSAL_LM" if make is answering_llama else "SEQ_CLS"
    batch = padded("left" if make is answering_llama else "right")
    want = logits(base, batch["input_ids"], attention_mask=batch["attention_mask"])
    model = adapted(base, PolarVbllConfig, task_type=kind)
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
    model = fill(adapted(make(), PolarVbllConfig, head_prior_scale=0.5))
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
    model = fill(adapted(answering_llama(), PolarVbllConfig))
    mask = torch.ones(8, 3, dtype=torch.bool)
    mask[::2, 2] = False
    labels = torch.tensor([0, 2, 1, 1, 0, 2, 1, -100])
    batch = {"input_ids": ROWS[:8], "labels": labels, "choice_mask": mask}
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
    model = fill(adapted(bert(), PolarVbllConfig, head_init_variance=0.05))
    calls = []
    model.base_model.model.bert.register_forward_hook(lambda *_: calls.append(1))
    result = predict(model, BATCH, n_samples=1000, seed=3)
    assert len(calls) == 1 and result.n_samples == 1000
    assert torch.equal(result.labels, BATCH["labels"])  # type: ignore[arg-type]
    assert (result.mutual_information > 1e-4).all()
    torch.testing.assert_close(result.probs.sum(1), torch.ones(8).double(), rtol=0, atol=1e-5)
    # Independent of how examples are batched, and of the batch they are in.
    items = [{k: v for k, v in row.items() if k != "labels"} for row in CLASSES[:8]]
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
    torch.testing.assert_close(
        mean.probs.float(), logits(model, ROWS[:8]).softmax(1), rtol=1e-5, atol=1e-6
    )
    assert torch.equal(mean.entropy, mean.expected_entropy)
    with pytest.raises(ValueError, match="choices must be None"):
        predict(model, BATCH, choices=[1, 2])


def test_one_pass_serves_the_mean_and_several_numbers_of_draws() -> None:
    model = fill(adapted(bert(), PolarVbllConfig, head_init_variance=0.05))
    numbers = (1000, 0, 37)
    expected = [predict(model, BATCH, n_samples=n, seed=3) for n in numbers]
    calls = []
    model.base_model.model.bert.register_forward_hook(lambda *_: calls.append(1))
    found = predict_several(model, BATCH, [Sampling(n) for n in numbers], seed=3)
    assert len(calls) == 1
    for one, two in zip(expected, found, strict=True):
        assert torch.equal(one.log_probs, two.log_probs) and one.n_samples == two.n_samples
        assert torch.equal(one.labels, two.labels)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="choices must be None"):
        predict_several(model, BATCH, [Sampling(0)], choices=[1, 2])


def test_calibration(tmp_path: Path) -> None:
    model = adapted(bert(), PolarVbllConfig)
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
    loaded = PeftModel.from_pretrained(bert(), str(tmp_path))
    torch.testing.assert_close(kl_divergence(loaded), kl)  # the prior is saved too
    with pytest.raises(ValueError, match="logit_variance must be positive"):
        calibrate_head(model, BATCH, logit_variance=0.0)
    for known in (model, loaded, adapted(bert(), PolarVbllConfig, head_prior_scale=2.0)):
        with pytest.raises(ValueError, match="the head must be new, got head_prior_scale="):
            calibrate_head(known, BATCH)


@pytest.mark.parametrize("method", ["cholesky", "subspace"])
def test_laplace_refinement(method: str, tmp_path: Path) -> None:
    model = fill(adapted(bert(), PolarVbllConfig, head_prior_scale=0.4))
    before = class_logits(model, BATCH)
    batches = [BATCH, {"input_ids": ROWS[8:16]}]
    report = laplace_refine(model, batches, method=method)
    assert report.n_examples == 16
    mean, variance = class_logits(model, BATCH)
    assert torch.equal(mean, before[0])
    with torch.no_grad():
        phi = class_features(model, {"input_ids": ROWS[:16]}).double()
    p = logits(model, ROWS[:16]).double().softmax(1)
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
    loaded = PeftModel.from_pretrained(bert(), str(tmp_path)).eval()
    assert_same_but_rounding(class_logits(loaded, BATCH)[1], variance)
    # Beside another adapter, whose prior is another and whose head is not refined.
    beside = adapted(bert(), PolarVbllConfig)
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
    PeftModel.from_pretrained(bert(), str(tmp_path / "again"))


def test_trains_causal_models_and_evaluates(tmp_path: Path) -> None:
    model = adapted(answering_llama(), PolarVbllConfig, kl_weight=0.1)
    trainer = BayesTrainer(
        model=model,
        args=arguments(tmp_path, max_steps=12),
        train_dataset=CLASSES,
        eval_dataset=CLASSES,
        eval_samples=200,
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before
    trainer.eval_samples = 0
    assert trainer.evaluate()["eval_loss"] > 0


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_step_of_the_trainer_is_the_loop_of_the_docs(accumulation: int, tmp_path: Path) -> None:
    data = [{k: v for k, v in row.items() if k != "attention_mask"} for row in CLASSES[:8]]
    batch = {"input_ids": ROWS[:8], "labels": ROWS[:8, 0] % 3}
    models = [fill(adapted(bert(), PolarVbllConfig, head_lr=2e-3)) for _ in range(2)]
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
    data = [{k: v for k, v in row.items() if k != "attention_mask"} for row in CLASSES[:8]]
    batch = {"input_ids": ROWS[:8], "labels": ROWS[:8, 0] % 3}
    model = fill(adapted(bert(), PolarVbllConfig, alternation="gauss-seidel"))
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
    model = fill(adapted(bert(), PolarVbllConfig, **options))
    seen: list[tuple[bool, bool]] = []

    class Record(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kw: Any) -> None:
            names = {n for n, p in kw["model"].named_parameters() if p.grad is not None}
            seen.append((any("lora" in n for n in names), any("log_scale" in n for n in names)))

    trainer = BayesTrainer(
        model=model,
        args=arguments(tmp_path, max_steps=5),
        train_dataset=CLASSES,
        callbacks=[Record()],
    )
    trainer.train()
    assert seen == [(True, False)] * 2 + [(False, True)] * 2 + [(True, False)]


@pytest.mark.parametrize("options", [{}, {"alternation": "gauss-seidel", "stiefel": "qr"}])
def test_resumed_training_is_the_uninterrupted_one(options: Any, tmp_path: Path) -> None:
    whole = adapted(bert(), PolarVbllConfig, **options)
    save = {"save_strategy": "steps", "save_steps": 3}
    fit(whole, tmp_path / "a", max_steps=6, lr_scheduler_type="linear")
    first = adapted(bert(), PolarVbllConfig, **options)
    stop = arguments(tmp_path / "b", max_steps=6, lr_scheduler_type="linear", **save)

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kw: Any) -> None:
            control.should_training_stop = state.global_step == 3

    trainer = BayesTrainer(model=first, args=stop, train_dataset=CLASSES, callbacks=[Stop()])
    trainer.train()
    second = adapted(bert(), PolarVbllConfig, **options)
    BayesTrainer(model=second, args=stop, train_dataset=CLASSES).train(resume_from_checkpoint=True)
    for a, b in zip(whole.parameters(), second.parameters(), strict=True):
        assert_same_but_rounding(b, a, units=4096)


@pytest.mark.parametrize("find_unused", [False, True])
def test_data_parallel_sees_that_the_head_is_used(find_unused: bool, tmp_path: Path) -> None:
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model, alone = (fill(adapted(bert(), PolarVbllConfig)) for _ in range(2))
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
        model = fill(adapted(answering_llama(), PolarVbllConfig))
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        model.train()
        variational_loss(model, BATCH, n_train=32).loss.backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(found[0]) == len(found[1])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
