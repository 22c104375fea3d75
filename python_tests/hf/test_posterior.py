"""Which weights a pass uses: means, draws, flipped signs; contexts, generation."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from kept_draws import KeptDraws
from tiny_models import IDS, blob, logits
from torch import Tensor, nn

from bayes_kernels.hf import BlobConfig, fold_samples, posterior, refresh_noise
from bayes_kernels.hf.layers import bayes_layers, noise_state


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_train_samples_and_eval_does_not(kind: str) -> None:
    model = blob(kind)
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
    model = blob()
    mean = logits(model)
    with posterior(model, "sample", seed=1):
        outer = logits(model)
        with pytest.raises(RuntimeError, match="inside"), posterior(model, "sample", seed=2):
            assert not torch.equal(outer, logits(model))
            raise RuntimeError("inside")
        assert torch.equal(outer, logits(model))
    assert torch.equal(mean, logits(model)) and noise_state(model).mode is None


def test_sample_at_inference() -> None:
    model = blob(sample_at_inference=True)
    first, second = logits(model), logits(model)
    assert not torch.equal(first, second)
    with posterior(model, "mean"):
        torch.testing.assert_close(logits(model), logits(blob()))
    # Deleting the only adapter that samples in eval mode lets the noise stand still again.
    other = blob()
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


def test_draws_are_coherent_and_depend_on_seed_and_number_only() -> None:
    model = blob()
    batch = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    with posterior(model, "sample", n_samples=4, seed=9):
        folded = logits(model, **_split(fold_samples(batch, 4))).unflatten(0, (4, 4))
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
            item.mean.copy_(item.factors(2, seed=9)[0])
    torch.testing.assert_close(logits(other), folded[2], rtol=1e-4, atol=1e-5)
    assert (folded[0] - folded[1]).abs().max() > 0.05
    with posterior(model, "sample", n_samples=3), pytest.raises(ValueError, match="fold_samples"):
        logits(model)


def _split(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}


def test_statistics_of_draws() -> None:
    """Mean and deviation of draws of one layer's A over numbers and seeds."""
    item = bayes_layers(blob())[0]
    draws = torch.stack([item.factors(s, seed)[0] for s in range(8) for seed in range(150)])
    omega = 0.4**2
    error = (draws.mean(0) - item.mean).abs().max()
    assert error < 4.5 * omega / 1200**0.5
    assert abs((draws - item.mean).std().item() / omega - 1) < 0.01


def test_inference_mode_leaves_training_possible() -> None:
    model = blob(sample_at_inference=True)
    with torch.inference_mode():
        model(input_ids=IDS)
        with posterior(model, "sample"):
            model(input_ids=IDS)
        refresh_noise(model, step=1)
    assert not any(key.is_inference() for key in noise_state(model).keys.values())
    bayes_layers(model)[0].layer.train()(torch.randn(2, 32, requires_grad=True)).sum().backward()


GREEDY: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def test_generate_keeps_one_draw() -> None:
    model = blob()
    with posterior(model, "sample", seed=1):
        one, two = (model.generate(input_ids=IDS, max_new_tokens=4, **GREEDY) for _ in range(2))
        ids = IDS
        for _ in range(4):
            ids = torch.cat([ids, logits(model, ids)[:, -1:].argmax(-1)], 1)
    assert torch.equal(one, two) and torch.equal(one, ids)


@pytest.mark.parametrize("how", ["posterior", "sample_at_inference"])
def test_generate_keeps_the_numbers_of_its_draw(how: str, kept_draws: KeptDraws) -> None:
    """Within one generated text each layer draws twice, and finds its numbers for all other tokens."""
    model = blob(sample_at_inference=how == "sample_at_inference")
    layers = len(bayes_layers(model))

    def generated() -> Tensor:
        context = posterior(model, "sample", seed=1) if how == "posterior" else nullcontext()
        with context:
            return model.generate(input_ids=IDS, max_new_tokens=6, **GREEDY)

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


def test_posterior_errors() -> None:
    model = blob()
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
