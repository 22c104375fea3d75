"""Configuration of Bayesian LoRA adapters."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from peft import LoraConfig

from ..functional import SCOPES, STDS
from ..optim import KINDS
from ._compat import BAYES_LORA, PEFT_TYPE_NAME

METHODS = ("blob",)
PRIOR_RULES = ("constant", "fan_in")

# LoRA options that change the forward formula or the kind of the adapted parameters.
_REJECTED = (
    "use_dora",
    "alora_invocation_tokens",
    "arrow_config",
    "monteclora_config",
    "kasa_config",
    "velora_config",
    "use_bdlora",
    "use_qalora",
    "lora_bias",
    "target_parameters",
    "megatron_config",
)


@dataclass
class BayesLoraConfig(LoraConfig):
    """LoRA with a Gaussian posterior over the factor A.

    A ~ N(lora_A.weight, Omega^2) for each element, Omega = std(rho).

    All options of `peft.LoraConfig` that keep the adapter a plain product of two factors work as
    there. The additional fields are plain numbers and words, so that the configuration is JSON.

    Loading such an adapter needs `import bayes_kernels.hf` first; without it PEFT raises
    `KeyError: 'BAYES_LORA'`. `export_lora` writes a folder that stock PEFT loads.

    Args:
        method: "blob".
        std: how the deviation is parameterised: "square" (rho^2), "softplus" or "direct".
        init_rho: eps of the paper; rho ~ U(eps / sqrt 2, eps), so that Omega starts in
            [eps^2 / 2, eps^2] with "square". (softplus: rho ~ U(eps - 1, eps); direct: the
            deviations of "square".)
        prior_std: standard deviation sigma_p of the prior N(0, sigma_p^2) on each element of A.
        prior_rule: "constant" (sigma_p = prior_std), or "fan_in" (sigma_p = prior_std / sqrt(in)).
        scope: which rows share noise in training: "token" (BLoB's published code), "example" (its
            paper) or "none" (one draw for the whole batch).
        sample_at_inference: what a plain forward pass in eval mode does. False: the mean. True: one
            draw of the weights for the batch, a new one for each call; calls that continue a
            key-value cache keep the draw. `posterior` and `predict` decide for themselves.
        seed: seed of the noise in training loops of one's own; `BayesTrainer` takes its noise from
            `TrainingArguments.seed`. A model has one noise state: the seed of its first adapter
            counts, and those of adapters added later are not used.
        kl_schedule: step sizes of the decoupled KL step of `BayesTrainer`: "auto", "published" or
            "constant"; see `bayes_kernels.optim.KLSchedule`. The constant of "auto" is provisional:
            see `bayes_kernels.optim.auto_target_std` before relying on its calibration.
        kl_lr: learning rate of the KL step for "published" and "constant".
        kl_time: for "auto", how long the gradient flow of the divergence acts on each weight: the
            sum of its step sizes over the run. None for the time in which each layer gets from its
            deviation at the start to `bayes_kernels.optim.auto_target_std`; none if it is above.
        kl_gamma: gamma of the cycle length 100 N^(pi / gamma) / batch for "published", "constant".

    Raises:
        ValueError: an option is out of range, or a LoRA option does not go with a posterior.

    Source: Wang et al., "BLoB: Bayesian Low-Rank Adaptation by Backpropagation", arXiv 2406.11675.
    """

    method: str = field(default="blob", metadata={"help": "Bayesian method of the adapter"})
    std: str = field(default="square", metadata={"help": "'square', 'softplus' or 'direct'"})
    init_rho: float = field(default=0.05, metadata={"help": "upper end of rho at the start"})
    prior_std: float = field(default=0.2, metadata={"help": "standard deviation of the prior"})
    prior_rule: str = field(default="constant", metadata={"help": "'constant' or 'fan_in'"})
    scope: str = field(default="token", metadata={"help": "'token', 'example' or 'none'"})
    sample_at_inference: bool = field(
        default=False, metadata={"help": "whether a plain forward pass in eval mode samples"}
    )
    seed: int = field(default=0, metadata={"help": "seed of the training noise"})
    kl_schedule: str = field(default="auto", metadata={"help": "'auto', 'published', 'constant'"})
    kl_lr: float = field(default=0.01, metadata={"help": "learning rate of the KL step"})
    kl_time: float | None = field(
        default=None, metadata={"help": "total step size with 'auto'; None for the rule"}
    )
    kl_gamma: float = field(default=8.0, metadata={"help": "gamma of the KL cycle length"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = BAYES_LORA
        for name, allowed in (
            ("method", METHODS),
            ("std", STDS),
            ("prior_rule", PRIOR_RULES),
            ("scope", SCOPES),
            ("kl_schedule", KINDS),
        ):
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(
                    f"BayesLoraConfig: {name} must be one of {allowed}, got {value!r}; choose one"
                )
        for name in ("init_rho", "prior_std", "kl_lr", "kl_time", "kl_gamma"):
            value = getattr(self, name)
            if name == "kl_time" and value is None:
                continue
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            lowest_ok = number and (value >= 0 if name in ("kl_lr", "kl_time") else value > 0)
            if not lowest_ok or not math.isfinite(value):
                raise ValueError(
                    f"BayesLoraConfig: {name} must be a positive number, got {value!r}"
                )
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ValueError(f"BayesLoraConfig: seed must be an int, got {self.seed!r}")
        for name in _REJECTED:
            if getattr(self, name, None):
                raise ValueError(
                    f"BayesLoraConfig: {name} cannot be combined with a posterior over A, got "
                    f"{getattr(self, name)!r}; leave it out, or use peft.LoraConfig"
                )
        if self.init_lora_weights == "mica":
            raise ValueError(
                "BayesLoraConfig: init_lora_weights='mica' freezes a factor; use True or 'gaussian'"
            )
        if not 0.0 <= self.lora_dropout < 1.0:
            raise ValueError(
                f"BayesLoraConfig: lora_dropout must be in [0, 1), got {self.lora_dropout}"
            )

    def prior_std_of(self, in_features: int) -> float:
        """Standard deviation of the prior for a layer with that many input features."""
        if self.prior_rule == "fan_in":
            return self.prior_std / math.sqrt(in_features)
        return self.prior_std


# Options that only a BayesLoraConfig has; what is left is a LoraConfig.
BAYES_FIELDS = frozenset(BayesLoraConfig.__dataclass_fields__) - frozenset(
    LoraConfig.__dataclass_fields__
)


def BlobConfig(**options: Any) -> BayesLoraConfig:
    """Configuration of a BLoB adapter: `BayesLoraConfig(method="blob", ...)`.

    The published setting is r=8, lora_alpha=16, target_modules q_proj, v_proj and lm_head,
    prior_std=0.2, kl_schedule="published", kl_lr=0.01.

    Source: Wang et al., arXiv 2406.11675.
    """
    return BayesLoraConfig(method="blob", **options)


__all__ = ["BAYES_FIELDS", "PEFT_TYPE_NAME", "BayesLoraConfig", "BlobConfig"]
