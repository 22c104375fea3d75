"""The divergence of adapters from their prior."""

from __future__ import annotations

import pytest
import torch
from tiny_models import blob, gradients
from torch import nn

from bayes_kernels.hf import BlobConfig, kl_divergence
from bayes_kernels.hf.layers import bayes_layers


@pytest.mark.parametrize("rule", ["constant", "fan_in"])
def test_kl_divergence_matches_distributions(rule: str) -> None:
    model = blob(rho=None, prior_rule=rule, prior_std=0.3)
    expected = torch.zeros((), dtype=torch.float64)
    for item in bayes_layers(model):
        prior = 0.3 if rule == "constant" else 0.3 / 32**0.5
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
    model = blob()
    model.add_adapter("wide", BlobConfig(r=8, target_modules=["k_proj"], std="softplus"))
    both = float(kl_divergence(model, "default")), float(kl_divergence(model, "wide"))
    assert float(kl_divergence(model)) == both[0] != both[1]
    model.base_model.set_adapter(["default", "wide"])
    assert float(kl_divergence(model)) == pytest.approx(sum(both), rel=1e-6)
    with pytest.raises(ValueError, match="adapter 'none'"):
        kl_divergence(model, "none")
    with pytest.raises(ValueError, match="active Bayesian adapter"):
        kl_divergence(nn.Linear(2, 2))
