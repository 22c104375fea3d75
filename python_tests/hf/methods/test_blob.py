"""BLoB: its parameters, and plain LoRA where there is no noise."""

from __future__ import annotations

import torch
from peft import LoraConfig
from tiny_models import adapted, blob, fill, llama, logits

from bayes_kernels.hf import BayesLoraConfig, BayesLoraModel, posterior
from bayes_kernels.hf.layers import bayes_layers


def test_type_and_parameters() -> None:
    model = blob(rho=None)
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
    plain = adapted(llama(), LoraConfig)
    bayes = blob(rho=0.0)
    fill(plain)
    means = {n: p for n, p in bayes.named_parameters() if "lora_A.d" in n}
    assert len(means) == 4
    for name, p in plain.named_parameters():
        if name in means:
            assert torch.equal(p, means[name])
    mean = logits(bayes)
    torch.testing.assert_close(mean, logits(plain), rtol=1e-5, atol=1e-6)
    bayes.train()
    assert torch.equal(logits(bayes), mean)
    with posterior(bayes, "flipout"):
        assert torch.equal(logits(bayes), mean)
    with posterior(bayes, "sample"):
        torch.testing.assert_close(logits(bayes), mean, rtol=1e-5, atol=1e-6)


def test_rank_and_alpha_patterns_and_rslora() -> None:
    model = blob(rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 32}, use_rslora=True)
    shapes = {item.name.rpartition(".")[2]: item.rho.shape[0] for item in bayes_layers(model)}
    assert shapes == {"q_proj": 2, "v_proj": 4}
    model.train()
    assert torch.isfinite(logits(model)).all()
