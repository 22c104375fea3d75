"""BayesTrainer: scale of the divergence, noise, resuming, logs, evaluation, two processes."""

from __future__ import annotations

import json
import math
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from accuracy import assert_same_but_rounding
from programs import joined, together
from tiny_models import CLASSES, ROWS, adapted, arguments
from torch import Tensor
from transformers import BertForSequenceClassification, Trainer, TrainerCallback

from bayes_kernels import random
from bayes_kernels.hf import (
    BayesTrainer,
    BlobConfig,
    PolarConfig,
    PolarVbllConfig,
    ScalablConfig,
    decoupled_kl,
    kl_divergence,
    predict_dataset,
)
from bayes_kernels.hf.checkpoint_folders import last_checkpoint
from bayes_kernels.hf.layers import bayes_layers, noise_state
from bayes_kernels.optim import KLSchedule, flow_time, kl_cycle_length, kl_step_

N_TRAIN = len(CLASSES)
# Rows of a causal model differ in how many tokens count, so that token and row means differ.
TOKENS = [
    {"input_ids": ids, "labels": torch.where(torch.arange(6) < 2 + i % 5, ids, -100)}
    for i, ids in enumerate(ROWS)
]


def bert(**options: Any) -> Any:
    return adapted(tiny_models.bert(), **options)


def llama(**options: Any) -> Any:
    return adapted(tiny_models.llama(), **options)


class Gradients(TrainerCallback):
    """Keeps the gradients that the optimiser gets, and keys of the micro-batches."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kw: Any) -> None:
        named = kw["model"].named_parameters()
        self.steps.append({n: p.grad.clone() for n, p in named if p.grad is not None})


def parameters(model: Any) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def expected_kl_gradients(model: Any, weight: float) -> dict[str, Tensor]:
    (weight * kl_divergence(model)).backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return {n: g for n, g in found.items() if "lora_A" in n}


def kl_gradient_error(make: Any, data: Any, folder: Path | str, **options: Any) -> float:
    """Largest deviation of the gradients of means and deviations from those of KL / N.

    With lora_B = 0, as it starts, the likelihood has no gradient there.
    """
    model = make()
    expected = expected_kl_gradients(model, 0.5 / N_TRAIN)
    seen = Gradients()
    trainer = BayesTrainer(
        model=model,
        args=arguments(folder, max_steps=1, **options),
        train_dataset=data,
        kl_mode="loss",
        kl_weight=0.5,
        callbacks=[seen],
    )
    trainer.train()
    (got,) = seen.steps
    assert len(expected) == 8
    return max(float((got[n] - g).abs().max() / g.abs().max()) for n, g in expected.items())


# --- scale of the divergence ---------------------------------------------------------------------


@pytest.mark.parametrize("accumulation", [1, 2, 4, 8])
@pytest.mark.parametrize(("make", "data"), [(bert, CLASSES), (llama, TOKENS)])
def test_kl_in_the_loss_counts_once(
    make: Any, data: Any, accumulation: int, tmp_path: Path
) -> None:
    error = kl_gradient_error(make, data, tmp_path, gradient_accumulation_steps=accumulation)
    assert error < 1e-5


@pytest.mark.parametrize(("make", "data"), [(bert, CLASSES), (llama, TOKENS)])
def test_likelihood_does_not_depend_on_accumulation(make: Any, data: Any, tmp_path: Path) -> None:
    gradients = []
    for accumulation, batch in ((1, 8), (2, 4), (8, 1)):
        model = make()
        with torch.no_grad():
            for item in bayes_layers(model):
                item.rho.zero_()
        seen = Gradients()
        args = arguments(
            tmp_path,
            max_steps=1,
            gradient_accumulation_steps=accumulation,
            per_device_train_batch_size=batch,
        )
        BayesTrainer(
            model=model, args=args, train_dataset=data, kl_mode="none", callbacks=[seen]
        ).train()
        gradients.append({n: g for n, g in seen.steps[0].items() if "lora_B" in n})
    for other in gradients[1:]:
        for name, grad in gradients[0].items():
            torch.testing.assert_close(other[name], grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("accumulation", [1, 4])
def test_decoupled_step_is_taken_once(accumulation: int, tmp_path: Path) -> None:
    model = bert(kl_schedule="constant", kl_lr=0.02)
    layers = bayes_layers(model)
    means = [item.mean.detach().clone() for item in layers]
    rhos = [item.rho.detach().clone() for item in layers]
    args = arguments(
        tmp_path,
        max_steps=1,
        gradient_accumulation_steps=accumulation,
        lr_scheduler_type="constant",
    )
    trainer = BayesTrainer(model=model, args=args, train_dataset=CLASSES)
    trainer.train()
    cycle = kl_cycle_length(N_TRAIN, 4 * accumulation)
    assert trainer.decoupled_kl is not None
    assert trainer.decoupled_kl.schedule == KLSchedule(
        "constant", cycle=cycle, lr=0.02, factor_sum=1.0
    )
    kl_step_(means, rhos, 0.02 / cycle, 0.2)
    for item, mean, rho in zip(layers, means, rhos, strict=True):
        assert torch.equal(item.mean, mean) and torch.equal(item.rho, rho)
    assert trainer.state.log_history[0]["kl_weight"] == pytest.approx(0.02 / cycle)


def test_kl_rate_follows_the_schedules(tmp_path: Path) -> None:
    model = bert(kl_schedule="published", kl_lr=0.1, kl_gamma=40.0)
    args = arguments(tmp_path, max_steps=10, warmup_steps=3, lr_scheduler_type="linear")
    trainer = BayesTrainer(model=model, args=args, train_dataset=CLASSES)
    trainer.train()
    cycle = kl_cycle_length(N_TRAIN, 4, gamma=40.0)
    logged = [log["kl_weight"] for log in trainer.state.log_history if "kl_weight" in log]
    factors = [min(t / 3, (10 - t) / 7) for t in range(10)]
    expected = [0.1 * f * 2.0 ** (t % cycle - cycle) for t, f in enumerate(factors)]
    assert logged == pytest.approx(expected, rel=1e-9)


def test_weight_decay_leaves_the_posterior_alone(tmp_path: Path) -> None:
    model = bert()
    before = parameters(model)
    args = arguments(tmp_path, max_steps=1, weight_decay=0.5, lr_scheduler_type="constant")
    trainer = BayesTrainer(model=model, args=args, train_dataset=CLASSES, kl_mode="none")
    trainer.train()
    decayed = {
        n for g in trainer.optimizer.param_groups if g["weight_decay"] for n in _names(g, model)
    }
    assert any("lora_B" in n for n in decayed) and not any("lora_A" in n for n in decayed)
    for name, p in parameters(model).items():
        if "lora_A" in name:  # lora_B was 0: no gradient reached these
            assert torch.equal(p, before[name])


@pytest.mark.parametrize(
    ("config", "decayed"),
    [
        (BlobConfig, {"lora_B", "classifier"}),
        (ScalablConfig, {"lora_A", "lora_B", "classifier"}),
        (PolarConfig, {"lora_core", "classifier"}),
        (PolarVbllConfig, {"lora_core"}),
    ],
)
def test_weight_decay_by_method(config: Any, decayed: set[str], tmp_path: Path) -> None:
    model = adapted(tiny_models.bert(), config)
    args = arguments(tmp_path, weight_decay=0.5)
    trainer = BayesTrainer(model=model, args=args, train_dataset=CLASSES)
    trained = parameters(model).keys() & set(trainer.get_decay_parameter_names(model))
    kinds = {part for name in trained for part in name.split(".")}
    assert {k for k in kinds if k.startswith("lora_") or k == "classifier"} == decayed


def _names(group: dict[str, Any], model: Any) -> set[str]:
    ids = {id(p) for p in group["params"]}
    return {n for n, p in model.named_parameters() if id(p) in ids}


def test_auto_reaches_its_target_in_any_number_of_steps(tmp_path: Path) -> None:
    """Where the likelihood has no say (learning rate 0 for it), Omega follows the flow."""
    ends = []
    for steps in (5, 20):
        model = bert(kl_schedule="auto", kl_time=0.01)
        args = arguments(tmp_path, max_steps=steps, learning_rate=1e-12)
        BayesTrainer(model=model, args=args, train_dataset=CLASSES).train()
        ends.append(torch.cat([item.rho.detach().flatten() ** 2 for item in bayes_layers(model)]))
    torch.testing.assert_close(ends[0], ends[1], rtol=0.01, atol=0)
    start = torch.cat([i.rho.detach().flatten() ** 2 for i in bayes_layers(bert())])
    flow = 0.2 * torch.tanh(torch.atanh(start / 0.2) + 4 * 0.01 / 0.2)
    torch.testing.assert_close(ends[1], flow, rtol=1e-3, atol=0)


def test_auto_from_tiny_deviations_and_above_the_target(tmp_path: Path) -> None:
    args = arguments(tmp_path, max_steps=3, learning_rate=1e-12)
    model = bert(init_rho=1e-5, kl_time=0.02)
    BayesTrainer(model=model, args=args, train_dataset=CLASSES).train()
    for item in bayes_layers(model):
        reached = item.rho.detach() ** 2
        torch.testing.assert_close(
            reached, torch.full_like(reached, 0.2 * math.tanh(0.4)), rtol=1e-3, atol=0
        )
    # The rule's target for a learning rate of 0 is below every start: nothing moves.
    model = bert()
    with torch.no_grad():
        bayes_layers(model)[0].rho.fill_(0.6)  # above the prior too
    before = [(i.mean.detach().clone(), i.rho.detach().clone()) for i in bayes_layers(model)]
    BayesTrainer(model=model, args=args, train_dataset=CLASSES).train()
    for item, (mean, rho) in zip(bayes_layers(model), before, strict=True):
        torch.testing.assert_close(item.mean, mean, rtol=0, atol=1e-10)
        torch.testing.assert_close(item.rho, rho, rtol=0, atol=1e-10)


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("kind", ["constant", "auto"])
def test_kl_weight_scales_every_step(kind: str, given: bool) -> None:
    sizes: dict[str, Any] = {
        "n_train": N_TRAIN,
        "batch_size": 4,
        "learning_rate": 0.01,
        "factor_sum": 10.0,
    }
    schedule = KLSchedule(kind, 7, 1e-5, 0.02, factor_sum=10.0) if given else None
    moved = []
    for weight in (1.0, 5.0):
        model = bert(kl_schedule=kind, kl_time=0.02, kl_lr=1e-5)
        before = bayes_layers(model)[0].mean.detach().clone()
        decoupled_kl(model, weight=weight, schedule=schedule, **sizes).step()
        after = bayes_layers(model)[0].mean.detach()
        shrink = (after * before).sum() / before.square().sum()
        moved.append(-math.log(float(shrink)))
    assert moved[1] == pytest.approx(5 * moved[0], rel=0.05)


def test_auto_time_follows_the_rule(tmp_path: Path) -> None:
    model = bert()
    args = arguments(tmp_path, max_steps=10, learning_rate=0.05, lr_scheduler_type="constant")
    trainer = BayesTrainer(model=model, args=args, train_dataset=CLASSES, kl_weight=0.5)
    trainer.train()
    target = 0.01 * 32**0.5 * (10 * 0.05) * (640 / N_TRAIN) ** 0.25
    starts = [float((item.rho.detach() ** 2).mean()) for item in bayes_layers(bert())]
    assert 0.0012 < min(starts) < max(starts) < 0.0025
    times = [flow_time(target, 0.2, start) for start in starts]
    assert trainer.decoupled_kl.scales == pytest.approx([0.5 * time for time in times])
    assert trainer.state.log_history[-2]["kl_weight"] == pytest.approx(0.1)
    own = decoupled_kl(
        bert(), n_train=N_TRAIN, batch_size=4, learning_rate=0.05, factor_sum=10, weight=0.5
    )
    assert own.scales == trainer.decoupled_kl.scales
    given = decoupled_kl(
        bert(), n_train=9, batch_size=4, learning_rate=1.0, factor_sum=9, schedule=own.schedule
    )
    assert given.schedule is own.schedule and given.scales == [1.0] * 4
    sizes = {"n_train": 9, "batch_size": 4, "learning_rate": 1.0, "factor_sum": 9}
    with pytest.raises(ValueError, match="is for std='square', got 'softplus'"):
        decoupled_kl(bert(std="softplus"), **sizes)
    assert decoupled_kl(bert(std="softplus", kl_time=0.1), **sizes).scales == [0.1] * 4


# --- noise and resuming --------------------------------------------------------------------------


def test_noise_keys(tmp_path: Path) -> None:
    keys = []

    class Keys(BayesTrainer):
        def compute_loss(self, model: Any, *args: Any, **kwargs: Any) -> Any:
            if model.training:
                keys.append(noise_state(model).keys[torch.device("cpu")])
            return super().compute_loss(model, *args, **kwargs)

    args = arguments(tmp_path, max_steps=3, gradient_accumulation_steps=2)
    Keys(model=bert(), args=args, train_dataset=CLASSES).train()
    assert len(keys) == 6
    for counter, key in enumerate(keys):
        expected = random.fold_in(random.fold_in(random.key(5), 0), counter)
        assert torch.equal(key, expected)


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kw: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("mode", ["decoupled", "loss"])
@pytest.mark.parametrize("make", [bert, llama])
def test_resumed_run_equals_the_whole_one(make: Any, mode: str, tmp_path: Path) -> None:
    data = CLASSES if make is bert else TOKENS
    options = {"r": 4, "lora_dropout": 0.1}

    def trainer(folder: str, **extra: Any) -> BayesTrainer:
        args = arguments(
            tmp_path / folder,
            max_steps=7,
            gradient_accumulation_steps=2,
            save_strategy="steps",
            save_steps=2,
            warmup_steps=2,
        )
        return BayesTrainer(
            model=make(**options), args=args, train_dataset=data, kl_mode=mode, **extra
        )

    whole = trainer("whole")
    whole.train()
    stopped = trainer("stopped", callbacks=[StopAt(5)])
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    # A folder that saving did not finish is passed over.
    broken = tmp_path / "stopped" / "checkpoint-5"
    broken.mkdir()
    (broken / "adapter_config.json").write_text("{")
    assert last_checkpoint(tmp_path / "stopped") == str(tmp_path / "stopped" / "checkpoint-4")
    resumed = trainer("stopped")
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 7
    theirs = parameters(resumed.model)
    for name, value in parameters(whole.model).items():
        assert_same_but_rounding(theirs[name], value, name, units=4096)
    tail = [log for log in whole.state.log_history if "nll" in log][-3:]
    again = [log for log in resumed.state.log_history if "nll" in log][-3:]
    for a, b in zip(tail, again, strict=True):
        assert [a[k] for k in ("loss", "nll", "kl", "elbo", "kl_weight")] == [
            b[k] for k in ("loss", "nll", "kl", "elbo", "kl_weight")
        ]
    with pytest.raises(ValueError, match="must hold a complete checkpoint"):
        trainer("empty").train(resume_from_checkpoint=True)


# --- logs and evaluation -------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["decoupled", "loss", "none"])
def test_logs(mode: str, tmp_path: Path) -> None:
    args = arguments(tmp_path, learning_rate=0.0, gradient_accumulation_steps=2, logging_steps=2)
    model = bert(kl_schedule="constant", kl_lr=0.0)
    trainer = BayesTrainer(model=model, args=args, train_dataset=CLASSES, kl_mode=mode)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "nll" in log]
    assert len(logs) == 2
    kl = kl_divergence(model).item()
    for log in logs:
        assert log["kl"] == pytest.approx(kl, rel=1e-6)
        assert log["elbo"] == pytest.approx(-(log["nll"] + kl / N_TRAIN), rel=1e-6)
        assert 0.8 < log["nll"] < 1.5  # per example, near log 3: not times the accumulation
        expected = log["nll"] + (kl / N_TRAIN if mode == "loss" else 0.0)
        assert log["loss"] == pytest.approx(expected, rel=1e-5)
        assert log["kl_weight"] == (1 / N_TRAIN if mode == "loss" else 0.0)


def test_evaluation(tmp_path: Path) -> None:
    model = bert()
    with torch.no_grad():
        for item in bayes_layers(model):
            item.layer.lora_B["default"].weight.normal_(generator=torch.Generator().manual_seed(1))
            item.rho.fill_(0.5)
    common = {"model": model, "eval_dataset": CLASSES, "train_dataset": CLASSES}
    args = arguments(tmp_path, per_device_eval_batch_size=5)
    plain = Trainer(args=args, **common).evaluate()["eval_loss"]
    mean = BayesTrainer(args=args, **common).evaluate()["eval_loss"]
    assert mean == pytest.approx(plain, rel=1e-6)
    found = {}
    trainer = BayesTrainer(
        args=args,
        eval_samples=6,
        eval_seed=2,
        **common,
        compute_metrics=lambda p: found.update(logits=p.predictions, labels=p.label_ids) or {},
    )
    sampled = trainer.evaluate()["eval_loss"]
    batch = {k: torch.stack([torch.as_tensor(row[k]) for row in CLASSES[:3]]) for k in CLASSES[0]}
    for part in trainer.prediction_step(model, batch, prediction_loss_only=False):
        assert part.device == args.device
    result = predict_dataset(model, CLASSES, n_samples=6, seed=2, progress=False)
    labels = torch.tensor([row["labels"] for row in CLASSES])
    torch.testing.assert_close(
        torch.tensor(found["logits"]), result.log_probs.float(), rtol=1e-4, atol=1e-5
    )
    assert found["labels"].tolist() == labels.tolist()
    expected = torch.nn.functional.nll_loss(result.log_probs, labels)
    assert sampled == pytest.approx(float(expected), rel=1e-4)
    assert abs(sampled - mean) > 1e-4


def test_training_learns_and_saves(tmp_path: Path) -> None:
    from peft import PeftModel

    model = bert(kl_time=0.0005)
    args = arguments(
        tmp_path,
        max_steps=40,
        per_device_train_batch_size=16,
        learning_rate=2e-2,
        lr_scheduler_type="linear",
        eval_strategy="steps",
        eval_steps=20,
        save_strategy="steps",
        save_steps=20,
        load_best_model_at_end=True,
        gradient_checkpointing=True,
    )
    trainer = BayesTrainer(
        model=model, args=args, train_dataset=CLASSES, eval_dataset=CLASSES, eval_samples=4
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    assert after < 0.85 * before
    torch.manual_seed(0)
    base = BertForSequenceClassification(model.get_base_model().config)
    loaded = PeftModel.from_pretrained(base, last_checkpoint(tmp_path))
    assert predict_dataset(loaded, CLASSES[:4], n_samples=2, progress=False).probs.shape == (4, 3)


def test_token_losses_need_the_number_of_tokens(tmp_path: Path) -> None:
    args = arguments(tmp_path, max_steps=2)
    with pytest.warns(UserWarning, match="target tokens per example") as caught:
        BayesTrainer(model=llama(), args=args, train_dataset=TOKENS).train()
    assert len([w for w in caught if "n_train" in str(w.message)]) == 1
    one = [
        {**row, "labels": torch.where(torch.arange(6) == 5, row["labels"], -100)} for row in TOKENS
    ]
    for model, data, options in (
        (llama(), TOKENS, {"n_train": 128}),
        (llama(), one, {}),
        (bert(), CLASSES, {}),
    ):
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            BayesTrainer(model=model, args=args, train_dataset=data, **options).train()
        assert not [w for w in seen if "n_train" in str(w.message)]


# --- errors --------------------------------------------------------------------------------------


def test_errors(tmp_path: Path) -> None:
    args = arguments(tmp_path)
    for options, message in (
        ({"kl_mode": "both"}, "kl_mode must be one of"),
        ({"kl_weight": -1.0}, "kl_weight must not be negative"),
        ({"eval_samples": -2}, "eval_samples must be an integer of at least 0"),
        ({"eval_samples": 1.5}, "eval_samples must be an integer of at least 0"),
        ({"eval_draws": "pairs"}, "eval_draws must be one of"),
        ({"eval_scope": "none"}, "eval_scope must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            BayesTrainer(model=bert(), args=args, train_dataset=CLASSES, **options)
    plain = tiny_models.bert()
    with pytest.raises(ValueError, match="must have an active Bayesian adapter"):
        BayesTrainer(model=plain, args=args, train_dataset=CLASSES)

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self) -> Any:
            return iter(CLASSES)

    trainer = BayesTrainer(model=bert(), args=args, train_dataset=Stream())
    with pytest.raises(ValueError, match="n_train must be given"):
        trainer.train()
    BayesTrainer(model=bert(), args=args, train_dataset=Stream(), n_train=N_TRAIN).train()


def two_active(other: Any) -> Any:
    """A model with two active adapters, of BLoB and of another method."""
    model = llama()
    model.add_adapter("second", other(r=2, target_modules=["k_proj"]))
    model.base_model.set_adapter(["default", "second"])
    return model


def test_active_adapters_of_two_methods(tmp_path: Path) -> None:
    args = arguments(tmp_path, max_steps=2)
    options = {"args": args, "train_dataset": TOKENS, "n_train": N_TRAIN}
    model = two_active(ScalablConfig)
    before = parameters(model)
    BayesTrainer(model=model, kl_mode="loss", **options).train()
    changed = [name for name, p in parameters(model).items() if not torch.equal(p, before[name])]
    for name in ("q_proj.lora_A_rho.default", "k_proj.lora_log_s_sigma.second"):
        assert any(name in one for one in changed), (name, changed)
    with pytest.raises(ValueError, match="decoupled_kl: active adapters must share one method"):
        BayesTrainer(model=two_active(ScalablConfig), **options).train()
    with pytest.raises(
        ValueError, match="BayesTrainer: active adapters must be trained in one way"
    ):
        BayesTrainer(model=two_active(PolarConfig), **options)


# --- two processes -------------------------------------------------------------------------------


def _worker(folder: str, rank: int) -> None:
    """One of two processes: scale of the divergence, noise, parameters after training."""
    report: dict[str, Any] = {}
    report["bert"] = kl_gradient_error(bert, CLASSES, folder, gradient_accumulation_steps=2)
    report["llama"] = kl_gradient_error(llama, TOKENS, folder, gradient_accumulation_steps=2)
    model = bert()
    trainer = BayesTrainer(
        model=model, args=arguments(folder, max_steps=3), train_dataset=CLASSES, kl_mode="decoupled"
    )
    trainer.train()
    report["key"] = noise_state(model).keys[torch.device("cpu")].tolist()
    report["sum"] = [float(p.double().sum()) for p in parameters(model).values()]
    report["kl"] = [log["kl"] for log in trainer.state.log_history if "kl" in log]
    report["cycle"] = trainer.decoupled_kl.schedule.cycle if trainer.decoupled_kl else None
    (Path(folder) / f"rank{rank}.json").write_text(json.dumps(report))


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    together("hf.test_trainer", tmp_path, timeout=300)
    zero, one = (json.loads((tmp_path / f"rank{r}.json").read_text()) for r in range(2))
    for report in (zero, one):
        assert report["bert"] < 1e-5 and report["llama"] < 1e-5
        assert report["cycle"] == kl_cycle_length(N_TRAIN, 4, processes=2)
    assert zero["key"] != one["key"]
    assert zero["sum"] == one["sum"]


if __name__ == "__main__":
    with joined() as number:
        _worker(sys.argv[1], number)
