"""MC dropout: draws, and the law of dropout in training."""

from __future__ import annotations

import peft
import torch

from bayes_kernels.hf import predict
from bayes_kernels.hf.methods.dropout import dropout_draws
from hf.methods.plain_adapters import BATCH, llama, plain_lora


def test_mc_dropout_draws_are_decided_by_seed_and_number() -> None:
    model = plain_lora(llama(), dropout=0.3)
    torch.manual_seed(7)
    state = torch.random.get_rng_state()
    one = predict(model, BATCH, n_samples=6, seed=3, return_samples=True)
    assert torch.equal(torch.random.get_rng_state(), state)  # torch's generator is left alone
    torch.manual_seed(8)
    again = predict(model, BATCH, n_samples=6, seed=3, samples_per_pass=1, return_samples=True)
    torch.testing.assert_close(one.sample_log_probs, again.sample_log_probs, rtol=0, atol=2e-6)
    other = predict(model, BATCH, n_samples=6, seed=4)
    assert (one.log_probs - other.log_probs).abs().max() > 1e-3
    assert one.sample_log_probs is not None
    mean = one.sample_log_probs.exp().mean(0)
    torch.testing.assert_close(one.probs, mean, rtol=0, atol=1e-12)
    assert (one.mutual_information > 0).all() and one.n_samples == 6
    # Hooks are gone: a plain pass and no draws are deterministic and agree.
    assert not any(m._forward_hooks for m in model.modules() if isinstance(m, torch.nn.Dropout))
    with torch.no_grad():
        plain = model(**BATCH).logits.double().log_softmax(-1)
    torch.testing.assert_close(predict(model, BATCH, n_samples=0).log_probs, plain)


def test_mc_dropout_has_the_law_of_dropout_in_training() -> None:
    """One linear layer: mean and variance of x A^T under dropout, against their closed forms."""
    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(16, 3, bias=False))
    p = 0.25
    config = peft.LoraConfig(r=3, lora_alpha=3, target_modules=["0"], lora_dropout=p)
    model = peft.get_peft_model(base, config).eval()
    layer = model.base_model.model[0]
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    x = torch.randn(2, 16)
    count = 4000
    with torch.no_grad(), dropout_draws(model, n_samples=count, seed=1):
        draws = model(x.repeat(count, 1)).unflatten(0, (count, 2)).double()
        weight = (layer.lora_B["default"].weight @ layer.lora_A["default"].weight).double()
    expected = model(x).double().detach()
    parts = x.double()[:, None, :] * weight.detach()
    variance = (parts**2).sum(-1) * p / (1 - p)
    error = (draws.mean(0) - expected).abs() / (variance / count).sqrt()
    assert error.max() < 4.5  # standard errors
    torch.testing.assert_close(draws.var(0), variance, rtol=0.15, atol=0)
