"""ScalaBL: parameters, draws, divergence, KL steps, training, persistence."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from accuracy import assert_same_but_rounding
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import BASES, IDS, adapted, arguments, logits
from torch import Tensor, nn

from bayes_kernels import random, reference
from bayes_kernels.hf import (
    BayesTrainer,
    ScalablConfig,
    decoupled_kl,
    export_lora,
    fold_samples,
    import_lora,
    kl_divergence,
    posterior,
    predict,
    refresh_noise,
)
from bayes_kernels.hf.layers import bayes_layers, noise_state
from bayes_kernels.hf.methods.scalabl import AUTO_RATIO, ScaleKL, ratio_time, thin_svd
from bayes_kernels.hf.variants import BayesLayer
from bayes_kernels.optim import KLSchedule, kl_cycle_length, linear_lr_factor

CLASSES = [{"input_ids": ids, "labels": int(ids[0]) % 3} for ids in IDS.repeat(4, 1)]
DIAGONAL_AND_FULL = pytest.mark.parametrize("covariance", ["diagonal", "full"])


def new(kind: str = "bert", config: Any = ScalablConfig, **options: Any) -> PeftModel:
    """An adapter as it starts."""
    return adapted(BASES[kind](), config, **options)


def scalabl(kind: str = "bert", **options: Any) -> PeftModel:
    """An adapter that does something: random B, wide posterior, no symmetry."""
    model = new(kind, **options)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.copy_(torch.randn(p.shape, generator=generator))
            elif "log_s_sigma" in name or "eigenvalues" in name:
                p.copy_(torch.rand(p.shape, generator=generator) - 1.0)
            elif "eigenvectors" in name:
                p.copy_(torch.randn(p.shape, generator=generator))
    return model


def spread(item: BayesLayer) -> Tensor:
    """L (r, r) with covariance L L^T."""
    if item.variant.config.covariance == "diagonal":
        return item.tensor("lora_log_s_sigma").exp().diag()
    values = nn.functional.softplus(item.tensor("lora_s_eigenvalues")) + 1e-8
    vectors = reference.qr_retract(item.tensor("lora_s_eigenvectors"))
    return vectors * values.sqrt()


# --- parameters ----------------------------------------------------------------------------------


@DIAGONAL_AND_FULL
def test_parameters_and_their_first_values(covariance: str) -> None:
    plain, model = new(config=LoraConfig), new(covariance=covariance)
    layers = bayes_layers(model)
    extra = 8 if covariance == "diagonal" else 8 + 16  # 2 r, and r^2 more
    count = {m: sum(p.numel() for p in m.parameters() if p.requires_grad) for m in (plain, model)}
    assert count[model] - count[plain] == len(layers) * extra == 4 * extra
    factors = dict(plain.named_parameters())
    for item in layers:
        a = factors[f"base_model.model.{item.name}.lora_A.default.weight"]
        singular = torch.linalg.svdvals(a.detach())
        torch.testing.assert_close(item.tensor("lora_log_s").exp(), singular, rtol=1e-5, atol=0)
        torch.testing.assert_close(item.mean @ item.mean.T, torch.eye(4), rtol=0, atol=1e-6)
        # The same row space as that of plain LoRA's A.
        projected = a @ item.mean.T @ item.mean
        torch.testing.assert_close(projected, a, rtol=1e-5, atol=1e-6)
        assert not item.layer.lora_B["default"].weight.any()
        sigma = (spread(item) @ spread(item).T).diag().sqrt()
        assert 0.05 / 2**0.5 <= float(sigma.min()) <= float(sigma.max()) <= 0.05
        assert all(item.tensor(n).dtype == torch.float32 for n in ("lora_log_s",))
    assert_same_but_rounding(logits(model), logits(BASES["bert"]()))
    model.half()
    assert layers[0].tensor("lora_log_s").dtype == torch.float32


def test_rows_are_orthonormal_on_a_half_precision_base() -> None:
    base = BASES["bert"]().to(torch.bfloat16)
    model = get_peft_model(base, ScalablConfig(r=4, target_modules=["query", "value"]))
    for item in bayes_layers(model):
        assert item.mean.dtype == item.layer.lora_B["default"].weight.dtype == torch.float32
        torch.testing.assert_close(item.mean @ item.mean.T, torch.eye(4), rtol=0, atol=1e-6)
    assert logits(model).isfinite().all()


def test_plain_lora_becomes_the_mean(tmp_path: Path) -> None:
    plain = new(config=LoraConfig)
    with torch.no_grad():
        for name, p in plain.named_parameters():
            if "lora_B" in name:
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(3)))
    plain.save_pretrained(tmp_path)
    model = import_lora(BASES["bert"](), tmp_path, method="scalabl", init_rho=0.1).eval()
    config = model.peft_config["default"]
    assert (config.method, config.prior_std, config.init_rho) == ("scalabl", 1.0, 0.1)
    torch.testing.assert_close(logits(model), logits(plain.eval()), rtol=1e-4, atol=1e-5)
    item = bayes_layers(model)[0]
    torch.testing.assert_close(item.mean @ item.mean.T, torch.eye(4), rtol=0, atol=1e-6)


def test_thin_svd() -> None:
    a = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    left, s, right = thin_svd(a)
    torch.testing.assert_close((left * s) @ right, a.double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(left.T @ left, torch.eye(5).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(s, torch.linalg.svdvals(a.double()), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scope": "token"}, r"scope must be one of \('none', 'example'\)"),
        ({"prior_rule": "fan_in"}, "prior_rule must be left out, as it is an option of blob"),
        ({"covariance": "banded"}, "covariance must be one of"),
        ({"kl_direction": "both"}, "kl_direction must be one of"),
    ],
)
def test_rejected_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ScalablConfig(target_modules=["query"], **options)


def test_draws_of_the_full_covariance_do_not_depend_on_signs_of_a_factorisation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Another device's QR may turn columns of Q and rows of R around."""
    model = scalabl(covariance="full").eval()
    found = predict(model, {"input_ids": IDS}, n_samples=3)
    factorise = torch.linalg.qr

    def turned(matrix: Tensor) -> tuple[Tensor, Tensor]:
        q, r = factorise(matrix)
        signs = torch.tensor([1.0, -1.0, -1.0, 1.0])
        return q * signs, r * signs[:, None]

    monkeypatch.setattr(torch.linalg, "qr", turned)
    other = predict(model, {"input_ids": IDS}, n_samples=3)
    assert torch.equal(other.log_probs, found.log_probs)


def test_rejected_ranks() -> None:
    with pytest.raises(ValueError, match="r must be at most the layer's input features, got 33"):
        new(r=33)


# --- draws ---------------------------------------------------------------------------------------


@DIAGONAL_AND_FULL
@pytest.mark.parametrize("scope", ["none", "example"])
def test_one_pass_equals_the_published_two(scope: str, covariance: str) -> None:
    item = bayes_layers(scalabl("llama", scope=scope, covariance=covariance))[0]
    x = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(5))
    item.layer.train()
    noise_state(item.layer).set_key(random.key(11), set())
    with torch.no_grad():
        delta = item.layer(x) - item.layer.base_layer(x)
    draws = 3 if scope == "example" else 1
    eps = random.normal(random.key(11), (draws, 4), stream=item.variant.stream)
    a, b = item.mean.detach(), item.layer.lora_B["default"].weight.detach()
    s = item.tensor("lora_log_s").detach().exp()
    noise = eps @ spread(item).detach().T
    for example in range(3):
        one = noise[example % draws]
        mean_path = x[example] @ (s.diag() @ a).T @ b.T
        noise_path = x[example] @ (one.diag() @ a).T @ b.T
        expected = 2.0 * (mean_path + noise_path)  # alpha 8 / r 4
        torch.testing.assert_close(delta[example], expected, rtol=1e-4, atol=1e-5)


@DIAGONAL_AND_FULL
def test_draws_depend_on_seed_and_number_only(covariance: str, tmp_path: Path) -> None:
    model = scalabl(covariance=covariance)
    with posterior(model, "sample", n_samples=4, seed=9):
        folded = logits(model, fold_samples({"input_ids": IDS}, 4)["input_ids"])
    folded = folded.unflatten(0, (4, 4))
    for s in (0, 3):
        with posterior(model, "sample", seed=9, first_sample=s):
            torch.testing.assert_close(logits(model), folded[s], rtol=1e-4, atol=1e-5)
            alone = logits(model, IDS[1:2])[0]
            torch.testing.assert_close(alone, folded[s, 1], rtol=1e-4, atol=1e-5)
    assert (folded[0] - folded[1]).abs().max() > 1e-2
    folder = export_lora(model, tmp_path / "draw", 3, seed=9)
    plain = PeftModel.from_pretrained(BASES["bert"](), folder)
    torch.testing.assert_close(logits(plain), folded[3], rtol=1e-4, atol=1e-5)
    plain = PeftModel.from_pretrained(BASES["bert"](), export_lora(model, tmp_path / "mean"))
    assert type(plain.peft_config["default"]) is LoraConfig
    torch.testing.assert_close(logits(plain), logits(model), rtol=1e-4, atol=1e-5)


@DIAGONAL_AND_FULL
def test_moments_of_draws(covariance: str) -> None:
    item = bayes_layers(scalabl(covariance=covariance))[0]
    with torch.no_grad():
        numbers = torch.arange(7, 20007)
        draws = item.variant._draws(item.layer, "default", random.key(3), numbers, False).double()
        expected = (spread(item) @ spread(item).T).double()
    assert draws.mean(0).abs().max() < 5 * float(expected.diag().max()) ** 0.5 / 20000**0.5
    torch.testing.assert_close(draws.T.cov(), expected, rtol=0.06, atol=0.02)


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_train_and_eval_mode_with_sampling_on_and_off(kind: str) -> None:
    model = scalabl(kind)
    mean = logits(model)
    assert torch.equal(mean, logits(model))
    model.train()
    assert not torch.equal(logits(model), logits(model))
    with posterior(model, "mean"):
        assert torch.equal(logits(model), mean)
    same = logits(model, IDS[:1].repeat(3, 1))  # one draw for the whole call
    torch.testing.assert_close(same[0], same[2], rtol=1e-5, atol=1e-6)
    model.eval()
    with posterior(model, "sample", seed=3):
        assert not torch.equal(logits(model), mean)
    choices = None if kind == "bert" else [1, 2, 3]
    found = predict(model, {"input_ids": IDS}, n_samples=6, choices=choices, samples_per_pass=4)
    whole = predict(model, {"input_ids": IDS}, n_samples=6, choices=choices)
    torch.testing.assert_close(found.log_probs, whole.log_probs, rtol=0, atol=1e-6)
    assert found.mutual_information.max() > 1e-5
    sampling = scalabl(kind, sample_at_inference=True)
    assert not torch.equal(logits(sampling), logits(sampling))
    examples = scalabl(kind, scope="example").train()
    different = logits(examples, IDS[:1].repeat(3, 1))
    assert not torch.allclose(different[0], different[2], atol=1e-4)


@DIAGONAL_AND_FULL
def test_gradient_checkpointing_replays_the_noise(covariance: str) -> None:
    model = scalabl("llama", covariance=covariance, scope="example", lora_dropout=0.1).train()

    def run(checkpoint: bool) -> dict[str, Tensor]:
        model.zero_grad()
        if checkpoint:
            model.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False}
            )
            model.enable_input_require_grads()
        refresh_noise(model, step=0)
        for _ in range(2):
            model(input_ids=IDS, labels=IDS).loss.backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    plain, checkpointed = run(False), run(True)
    assert any("lora_log_s." in n for n in plain) and len(plain) == len(checkpointed)
    for name, grad in plain.items():
        assert torch.equal(grad, checkpointed[name]) and grad.abs().sum() > 0, name


# --- divergence ----------------------------------------------------------------------------------


@DIAGONAL_AND_FULL
@pytest.mark.parametrize("direction", ["elbo", "code"])
def test_divergence_matches_distributions(direction: str, covariance: str) -> None:
    model = scalabl(kl_direction=direction, covariance=covariance, prior_std=0.7)
    expected = torch.zeros((), dtype=torch.float64)
    for item in bayes_layers(model):
        scale = spread(item).double()
        q = torch.distributions.MultivariateNormal(
            item.tensor("lora_log_s").double().exp(), covariance_matrix=scale @ scale.T
        )
        p = torch.distributions.MultivariateNormal(
            torch.full((4,), 1e-8).double(), covariance_matrix=0.49 * torch.eye(4).double()
        )
        # Of the published classes only that of the diagonal covariance has the reverse.
        pair = (p, q) if (direction, covariance) == ("code", "diagonal") else (q, p)
        expected = expected + torch.distributions.kl_divergence(*pair)
    kl = kl_divergence(model)
    torch.testing.assert_close(kl.double(), expected, rtol=1e-5, atol=0)
    parameters = [p for n, p in model.named_parameters() if "lora_log" in n or "eigen" in n]
    ours = torch.autograd.grad(kl, parameters, allow_unused=True)
    theirs = torch.autograd.grad(expected, parameters)
    for mine, other in zip(ours, theirs, strict=True):
        mine = torch.zeros_like(other) if mine is None else mine
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-3)


def test_the_published_full_covariance_starts_wide_and_turned() -> None:
    wide, narrow = (
        bayes_layers(new(covariance="full", kl_direction=direction))
        for direction in ("code", "elbo")
    )
    covariances = [(spread(item) @ spread(item).T).detach() for item in wide]
    # Variances are softplus(N(0, 1)): mean .81.
    assert torch.stack([c.diag() for c in covariances]).mean() == pytest.approx(0.81, abs=0.15)
    assert all((c - c.diag().diag()).abs().max() > 0.01 for c in covariances)
    assert len({round(float(c[0, 1]), 6) for c in covariances}) == len(covariances)
    for one, other in zip(wide, narrow, strict=True):
        assert (spread(other) @ spread(other).T).diag().max() < 0.051**2
        # The mean is the same.
        assert torch.equal(one.tensor("lora_log_s"), other.tensor("lora_log_s"))


@DIAGONAL_AND_FULL
@pytest.mark.parametrize("direction", ["elbo", "code"])
def test_a_step_follows_the_gradient(direction: str, covariance: str) -> None:
    model = scalabl(kl_direction=direction, covariance=covariance, kl_schedule="constant")
    names = [n for n, _ in model.named_parameters() if "lora_log" in n or "eigen" in n]
    parameters = dict(model.named_parameters())
    tensors = [parameters[n] for n in names]
    gradients = torch.autograd.grad(kl_divergence(model), tensors, allow_unused=True)
    before = [t.detach().clone() for t in tensors]
    step = decoupled_kl(
        model, n_train=100, batch_size=4, learning_rate=1.0, factor_sum=1.0, weight=0.5
    )
    assert isinstance(step, ScaleKL)
    size = step.step(0.5)
    assert size == pytest.approx(0.2 * 0.5 * 0.5 / kl_cycle_length(100, 4))
    for name, tensor, old, gradient in zip(names, tensors, before, gradients, strict=True):
        gradient = torch.zeros_like(old) if gradient is None else gradient
        torch.testing.assert_close(
            tensor.detach(), old - size * gradient, rtol=1e-5, atol=1e-6, msg=name
        )


class Fixed:
    """A layer with given numbers, for trajectories."""

    def __init__(self, direction: str, covariance: str = "diagonal") -> None:
        self.item = bayes_layers(
            new(kl_direction=direction, covariance=covariance, target_modules=["query"])
        )[0]
        with torch.no_grad():
            self.item.tensor("lora_log_s").fill_(math.log(0.577))
            if covariance == "diagonal":
                self.item.tensor("lora_log_s_sigma").fill_(math.log(0.0425))
            else:
                value = math.log(math.expm1(0.0425**2))
                self.item.tensor("lora_s_eigenvalues").fill_(value)

    def numbers(self) -> tuple[float, float]:
        deviation = (spread(self.item) @ spread(self.item).T).diag().sqrt()
        return float(deviation.detach()[0]), float(self.item.tensor("lora_log_s").detach()[0].exp())


@pytest.mark.parametrize(
    ("direction", "cycles", "end"),
    [
        ("code", [(0.721, 0.347), (0.851, 0.335), (0.920, 0.326)], (1.031, 0.295)),
        ("elbo", [(0.052, 0.541), (0.062, 0.514), (0.074, 0.492)], (0.202, 0.402)),
    ],
)
def test_published_trajectory(
    direction: str, cycles: list[tuple[float, float]], end: tuple[float, float]
) -> None:
    """sigma and s without a likelihood, WG-S: 640 examples, 5,000 steps of 4, rate 0.2."""
    fixed = Fixed(direction)
    cycle = kl_cycle_length(640, 4)
    assert cycle == 316
    step = ScaleKL([fixed.item], KLSchedule("published", cycle=cycle, lr=0.2), [1.0])
    seen = {}
    for t in range(5000):
        step.step(linear_lr_factor(t, 5000))
        if t + 1 in (316, 632, 948, 5000):
            seen[t + 1] = fixed.numbers()
    for number, expected in zip((316, 632, 948, 5000), [*cycles, end], strict=True):
        assert seen[number] == pytest.approx(expected, rel=0.05), number
    assert step.skipped > 3500


@DIAGONAL_AND_FULL
def test_auto_flow_does_not_depend_on_the_number_of_steps(covariance: str) -> None:
    time, ends = 0.3, []
    for steps in (1, 7):
        fixed = Fixed("elbo", covariance)
        schedule = KLSchedule("auto", factor_sum=float(steps))
        step = ScaleKL([fixed.item], schedule, [time])
        for _ in range(steps):
            step.step()
        ends.append(fixed.numbers())
    assert ends[0] == pytest.approx(ends[1], rel=1e-5)
    # Against small gradient steps.
    log_s, log_sigma = math.log(0.577), math.log(0.0425)
    for _ in range(20000):
        s2, v = math.exp(2 * log_s), math.exp(2 * log_sigma)
        log_s, log_sigma = log_s - time / 20000 * s2, log_sigma + time / 20000 * (1 - v)
    assert ends[0] == pytest.approx((math.exp(log_sigma), math.exp(log_s)), rel=1e-3)


def test_auto_reaches_its_ratio() -> None:
    assert ratio_time(0.01, 0.5, 0.05) == 0.0
    model = new()
    step = decoupled_kl(model, n_train=100, batch_size=4, learning_rate=1e-3, factor_sum=10.0)
    assert step is not None
    for _ in range(10):
        step.step(1.0)
    for item in bayes_layers(model):
        s, sigma = (item.tensor(n).detach().exp() for n in ("lora_log_s", "lora_log_s_sigma"))
        ratio = float(sigma.square().mean().sqrt() / s.square().mean().sqrt())
        assert ratio == pytest.approx(AUTO_RATIO, rel=0.1)
    code = new(kl_direction="code")
    with pytest.raises(ValueError, match="kl_schedule='auto' is for kl_direction='elbo'"):
        decoupled_kl(code, n_train=9, batch_size=4, learning_rate=1.0, factor_sum=1.0)


# --- training and files --------------------------------------------------------------------------


@DIAGONAL_AND_FULL
def test_a_resumed_run_equals_the_whole_one(covariance: str, tmp_path: Path) -> None:
    def run(folder: Path, steps: int, resume: bool = False) -> dict[str, Tensor]:
        model = new(covariance=covariance)
        args = arguments(
            folder,
            weight_decay=0.1,
            max_steps=6,
            save_strategy="steps",
            save_steps=3,
            lr_scheduler_type="constant",
        )
        trainer = BayesTrainer(model=model, args=args, train_dataset=CLASSES)
        if steps < 6:
            trainer.args.max_steps = steps
        trainer.train(resume_from_checkpoint=resume or None)
        own = [n for g in trainer.optimizer.param_groups if g["weight_decay"] for n in names(g)]
        assert not any("log_s" in n or "eigen" in n for n in own)
        assert trainer.state.log_history[0]["kl"] > 0
        return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}

    def names(group: dict[str, Any]) -> list[str]:
        return list(group.get("param_names", ()))

    whole = run(tmp_path / "whole", 6)
    (tmp_path / "parts").mkdir()
    (tmp_path / "whole" / "checkpoint-3").rename(tmp_path / "parts" / "checkpoint-3")
    resumed = run(tmp_path / "parts", 6, resume=True)
    start = dict(new(covariance=covariance).named_parameters())
    for name, value in whole.items():
        assert_same_but_rounding(value, resumed[name], name, units=4096)
        if "log_s" in name or "lora_B" in name or "eigenvalues" in name:
            assert not torch.equal(value, start[name]), name


@DIAGONAL_AND_FULL
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_save_load_and_merge(kind: str, covariance: str, tmp_path: Path) -> None:
    model = scalabl(kind, covariance=covariance, init_rho=0.07)
    model.save_pretrained(tmp_path)
    for low in (False, True):
        loaded = PeftModel.from_pretrained(BASES[kind](), tmp_path, low_cpu_mem_usage=low)
        assert loaded.peft_config["default"].covariance == covariance
        assert_same_but_rounding(logits(loaded), logits(model))
        with posterior(loaded, "sample", seed=4), posterior(model, "sample", seed=4):
            assert_same_but_rounding(logits(loaded), logits(model))
    mean = logits(model)
    with pytest.warns(UserWarning, match="posterior mean only"):
        model.merge_adapter()
    torch.testing.assert_close(logits(model), mean, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), mean, rtol=1e-4, atol=1e-5)
    with pytest.warns(UserWarning, match="posterior mean only"):
        merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), mean, rtol=1e-4, atol=1e-5)
    assert not merged._forward_pre_hooks and not any("lora" in n for n in merged.state_dict())
