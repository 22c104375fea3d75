"""TRL's trainers with Bayesian adapters: noise, divergence, evaluation by draws, DPO's reference."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

pytest.importorskip("trl", reason="TRL must be installed: pip install trl")

from datasets import Dataset
from tiny_models import adapted, fill, gradients, llama
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
from trl.trainer.utils import use_adapter

from bayes_kernels.hf import BayesTrainerMixin, BlobConfig, kl_divergence, predict, predict_tokens
from hf.letters import letters
from hf.trl_data import without_fingerprints

pytestmark = pytest.mark.cpu_only

ROWS = 8
TEXTS = {"text": ["no way", "be", "why not", "abc"] * 2}
PAIRS = {
    "prompt": ["no", "be", "why", "ab"] * 2,
    "chosen": ["way", "a", "not", "c"] * 2,
    "rejected": ["x", "y", "z", "k"] * 2,
}
REFERENCE = ["ref_chosen_logps", "ref_rejected_logps"]
OPTIONS: dict[str, Any] = {
    "max_length": 16,
    "max_steps": 2,
    "report_to": [],
    "disable_tqdm": True,
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "save_strategy": "no",
    "logging_steps": 1,
    "learning_rate": 1e-2,
    "max_grad_norm": 0.0,
    "seed": 5,
}


class BayesSFTTrainer(BayesTrainerMixin, SFTTrainer):
    pass


class BayesDPOTrainer(BayesTrainerMixin, DPOTrainer):
    pass


@pytest.fixture(autouse=True)
def fingerprints(monkeypatch: pytest.MonkeyPatch) -> None:
    without_fingerprints(monkeypatch)


def model_of() -> Any:
    return fill(adapted(llama(initializer_range=0.2), BlobConfig))


def trainer_of(kind: Any, folder: Path, model: Any = None, **options: Any) -> Any:
    sft = kind is BayesSFTTrainer
    ours = ("kl_mode", "eval_samples", "n_train", "peft_config", "kl_weight")
    given = {name: options.pop(name) for name in ours if name in options}
    args = (SFTConfig if sft else DPOConfig)(str(folder), **{**OPTIONS, **options})
    data = Dataset.from_dict(TEXTS if sft else PAIRS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return kind(
            model=model_of() if model is None else model,
            args=args,
            train_dataset=data,
            eval_dataset=data,
            processing_class=letters(),
            **{"n_train": 100, **given},
        )


KINDS = pytest.mark.parametrize("kind", [BayesSFTTrainer, BayesDPOTrainer])


@KINDS
@pytest.mark.parametrize("accumulation", [1, 4])
def test_the_divergence_is_added_once(kind: Any, accumulation: int, tmp_path: Path) -> None:
    """A step's gradients with it and without differ by its own, however many parts the step has."""
    found = []
    for mode in ("none", "loss"):
        parts = {"gradient_accumulation_steps": accumulation, "max_steps": 1}
        size = {"per_device_train_batch_size": ROWS // accumulation}
        trainer = trainer_of(kind, tmp_path, kl_mode=mode, n_train=50, **parts, **size)
        grads: dict[str, torch.Tensor] = {}

        def keep(optimizer: Any, *_: Any, model: Any = trainer.model, grads: Any = grads) -> None:
            named = model.named_parameters()
            grads.update({n: p.grad.clone() for n, p in named if p.grad is not None})

        trainer.create_optimizer_and_scheduler(1)
        trainer.optimizer.register_step_pre_hook(keep)
        trainer.train()
        found.append(grads)
        logs = trainer.state.log_history[0]
        assert logs["elbo"] == pytest.approx(-(logs["nll"] + logs["kl"] / 50), rel=1e-5)
    model = model_of()
    (kl_divergence(model) / 50).backward()
    expected = gradients(model)
    assert any("rho" in name for name in expected)
    for name, own in found[1].items():
        difference = own - found[0][name]
        torch.testing.assert_close(
            difference, expected.get(name, torch.zeros_like(own)), rtol=1e-3, atol=1e-6
        )


@KINDS
def test_parts_of_a_step_add_up(kind: Any, tmp_path: Path) -> None:
    """The loss of a step is the mean over its tokens, or its pairs. Without noise it can be compared."""
    losses = []
    for parts in (1, 2, 4):
        model = fill(adapted(llama(initializer_range=0.2), BlobConfig), rho=1e-8)
        size = {"per_device_train_batch_size": ROWS // parts, "max_steps": 1}
        trainer = trainer_of(kind, tmp_path, model, gradient_accumulation_steps=parts, **size)
        trainer.train()
        losses.append(
            (trainer.state.log_history[0]["nll"], trainer.state.log_history[0]["grad_norm"])
        )
    for loss in losses[1:]:
        assert loss == pytest.approx(losses[0], rel=1e-4)


def test_sft_is_evaluated_by_draws(tmp_path: Path) -> None:
    trainer = trainer_of(BayesSFTTrainer, tmp_path, eval_samples=4, per_device_eval_batch_size=3)
    scores = trainer.evaluate()
    rows = [{key: row[key] for key in ("input_ids", "labels")} for row in trainer.eval_dataset]
    expected = predict_tokens(
        trainer.model, rows, n_samples=4, collate_fn=trainer.data_collator, batch_size=2
    )
    assert scores["eval_nll"] == pytest.approx(expected.nll, rel=1e-5)
    assert scores["eval_loss"] == pytest.approx(expected.nll, rel=1e-5)
    assert scores["eval_perplexity"] == pytest.approx(math.exp(expected.nll), rel=1e-5)
    assert scores["eval_ece"] == pytest.approx(expected.ece, abs=1e-5)
    assert expected.nll != pytest.approx(
        trainer_of(BayesSFTTrainer, tmp_path).evaluate()["eval_loss"]
    )


@torch.no_grad()
def margins(trainer: Any, draw: int | None) -> torch.Tensor:
    """beta times the difference of log-ratios of all pairs, by hand; the reference is the mean at first."""
    from bayes_kernels.hf import posterior

    reference, model = model_of().eval(), trainer.model.eval()
    found = []
    for prompt, chosen, rejected in zip(*PAIRS.values(), strict=True):
        sums = []
        for answer in (chosen, rejected):
            before = letters()(prompt)["input_ids"]
            ids = torch.tensor([[*letters()(prompt + answer)["input_ids"], 2]])

            def log_prob(which: Any, ids: Any = ids, begin: int = len(before)) -> torch.Tensor:
                own = which(input_ids=ids).logits.double().log_softmax(-1)[0, begin - 1 : -1]
                return own.gather(1, ids[0, begin:, None]).sum()

            before_training = log_prob(reference)
            if draw is None:
                sums.append(log_prob(model) - before_training)
            else:
                with posterior(model, "sample", seed=0, first_sample=draw):
                    sums.append(log_prob(model) - before_training)
        found.append(trainer.beta * (sums[0] - sums[1]))
    return torch.stack(found)


def test_dpo_is_evaluated_by_draws(tmp_path: Path) -> None:
    """Means over the draws of loss and margin, against a reference that is no draw."""
    trainer = trainer_of(BayesDPOTrainer, tmp_path, eval_samples=4, per_device_eval_batch_size=4)
    scores = trainer.evaluate()
    drawn = torch.stack([margins(trainer, draw) for draw in range(4)])
    assert drawn.std() > 1e-3
    assert scores["eval_rewards/margins"] == pytest.approx(float(drawn.mean()), abs=1e-4)
    expected = -torch.nn.functional.logsigmoid(drawn).mean()
    assert scores["eval_loss"] == pytest.approx(float(expected), abs=1e-4)
    trainer.eval_samples = 0
    assert trainer.evaluate()["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_a_reference_before_training_is_no_draw(tmp_path: Path) -> None:
    """Log-probabilities that are computed once are those of the mean, which the model still has."""
    model = fill(adapted(llama(initializer_range=0.2), BlobConfig, lora_dropout=0.5)).train()
    trainer = trainer_of(BayesDPOTrainer, tmp_path, model, precompute_ref_log_probs=True)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)
    later = trainer.evaluate(trainer.eval_dataset.remove_columns(REFERENCE))
    assert later["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize("given", ["adapter", "config"])
def test_the_reference_of_dpo_is_no_draw(given: str, tmp_path: Path) -> None:
    """In training it is the first mean, or the model without adapters, in each pass the same."""
    options: dict[str, Any] = {"lora_dropout": 0.3}
    base = llama(initializer_range=0.2)
    if given == "adapter":
        model: Any = fill(adapted(base, BlobConfig, **options))
        trainer = trainer_of(BayesDPOTrainer, tmp_path, model)
    else:
        config = BlobConfig(
            r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **options
        )
        trainer = trainer_of(BayesDPOTrainer, tmp_path, base, peft_config=config)
        fill(trainer.model)
    name = "ref" if "ref" in trainer.model.peft_config else None
    assert (name is not None) == (given == "adapter")
    ids = torch.tensor([[5, 6, 7, 8]])
    seen: list[torch.Tensor] = []

    def watch(module: Any, args: Any, output: Any) -> None:
        if not torch.is_grad_enabled():  # the reference's pass
            with torch.no_grad(), use_adapter(trainer.model, name):
                seen.append(base_logits(trainer.model, ids))

    def base_logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
        handle.remove()
        return model(input_ids=ids).logits.clone()

    expected = reference_of(given, options)(input_ids=ids).logits.detach()
    handle = trainer.model.base_model.model.model.register_forward_hook(watch)
    trainer.train()
    assert seen and trainer.model.training
    torch.testing.assert_close(seen[0], expected, rtol=0, atol=1e-6)
    # Outside of the trainer the copy is an adapter as others.
    if name is not None:
        with torch.no_grad(), use_adapter(trainer.model, name):
            one, two = (trainer.model(input_ids=ids).logits for _ in range(2))
        assert not torch.equal(one, two)


def reference_of(given: str, options: dict[str, Any]) -> Any:
    base = llama(initializer_range=0.2)
    return base if given == "config" else fill(adapted(base, BlobConfig, **options)).eval()


@KINDS
def test_saved_and_loaded(kind: Any, tmp_path: Path) -> None:
    trainer = trainer_of(kind, tmp_path / "run")
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if ".default" in n}
    trainer.train()
    after = dict(trainer.model.named_parameters())
    assert all(not torch.equal(after[name], value) for name, value in before.items())
    trainer.save_model(str(tmp_path / "saved"))
    base = llama(initializer_range=0.2)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "saved").eval()
    assert list(loaded.peft_config) == ["default"]
    batch = {"input_ids": torch.tensor([[5, 6, 7, 8]])}
    for draws in (0, 4):
        a, b = (
            predict(m, batch, n_samples=draws, choices=[5, 6, 9]) for m in (trainer.model, loaded)
        )
        torch.testing.assert_close(a.log_probs, b.log_probs, rtol=0, atol=1e-6)
        assert draws == 0 or float(a.mutual_information) > 0
