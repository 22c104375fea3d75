"""A whole method in one file, as an example and for test_new_method.py: a Gaussian core.

W = W0 + scaling B diag(c) A,  c ~ N(mean, diag(rho)^4),  one number for each rank
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bayes_kernels import functional
from bayes_kernels.hf.config import VariationalConfig, option
from bayes_kernels.hf.method import Method
from bayes_kernels.hf.variants import BayesVariant, Divergence
from bayes_kernels.optim import DecoupledKL

MEAN, RHO = "lora_core_mean", "lora_core_rho"


@dataclass
class CoreConfig(VariationalConfig, method="core"):
    """LoRA with a diagonal Gaussian between its factors."""

    prior_std: float = option(1.0, "Deviation of the prior N(0, prior_std^2) of the core.", above=0)


class CoreVariant(BayesVariant, method="core"):
    """2 r numbers beside the factors of a layer."""

    parameters = fp32 = (MEAN, RHO)

    def initial(self, module, adapter):
        ones = torch.ones_like(module.lora_A[adapter].weight[:, 0], dtype=torch.float32)
        return {MEAN: ones, RHO: ones * self.config.init_rho}

    def cores(self, module, adapter, key, numbers):
        """(D, r): the draws of these numbers."""
        mean, rho = getattr(module, MEAN)[adapter][None], getattr(module, RHO)[adapter][None]
        return functional.gaussian_draws(mean, rho, numbers, key=key, stream=self.stream)[:, 0]

    def adapted(self, module, adapter, x, result, mode, dropout):
        core, groups = getattr(module, MEAN)[adapter], None
        if mode != "mean":
            numbers = self.state.current().draws_on(x.device).ids
            core = self.cores(module, adapter, self.state.key_on(x.device), numbers)
            groups = self.by_row(torch.arange(len(numbers), device=x.device), x)
            groups = groups.reshape(-1, *[1] * (x.dim() - 2))
        a, b, scaling = module.lora_A[adapter], module.lora_B[adapter], module.scaling[adapter]
        x = self.dropped(x, dropout)
        return functional.scaled_lora(
            x, a.weight, core, b.weight, result, scaling=scaling, groups=groups
        )

    def mean_factors(self, module, adapter):
        mean = getattr(module, MEAN)[adapter]
        return mean[:, None] * module.lora_A[adapter].weight, module.lora_B[adapter].weight

    def draw_factors(self, module, adapter, key, number):
        core = self.cores(module, adapter, key, torch.tensor([number]))[0]
        return core[:, None] * module.lora_A[adapter].weight, module.lora_B[adapter].weight

    def divergence(self, module, adapter):
        mean, rho = getattr(module, MEAN)[adapter], getattr(module, RHO)[adapter]
        return Divergence(mean, rho, self.config.prior_std)

    @classmethod
    def kl_step(cls, layers, plan):
        means, rhos = ([item.tensor(name) for item in layers] for name in (MEAN, RHO))
        scales = [plan.weight * (item.variant.config.kl_time or 1.0) for item in layers]
        prior_std = layers[0].variant.config.prior_std
        return DecoupledKL(means, rhos, prior_std, plan.schedule, scales=scales)


METHOD = Method(
    "core", "Gaussian core", CoreConfig, prior=lambda c: f"N(0, {c['prior_std']}^2) on the core"
)
