"""Configuration of Bayesian LoRA adapters."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import LoraConfig

from ..functional import SCOPES, STDS
from ..optim import KINDS
from ..stiefel import METHODS as STIEFEL_METHODS
from ..vbll import COVARIANCES as HEAD_COVARIANCES
from ._compat import BAYES_LORA, PEFT_TYPE_NAME

BAYESIAN_METHODS = ("blob", "tfb", "scalabl", "polar", "polar-vbll")
PRIOR_RULES = ("constant", "fan_in")
COVARIANCES = ("diagonal", "full")
DIRECTIONS = ("elbo", "code")

CORES = ("full", "diagonal")
HEAD_INITS = ("rows", "vbll")
ALTERNATIONS = ("jacobi", "gauss-seidel", "periodic")

_NUMBERS = (
    "init_rho",
    "prior_std",
    "kl_lr",
    "kl_time",
    "kl_gamma",
    "stiefel_penalty",
    "head_init_variance",
    "head_prior_scale",
    "head_lr",
    "kl_weight",
)
_MAY_BE_NONE = ("kl_time", "head_init_variance", "head_prior_scale", "head_lr")
_MAY_BE_ZERO = ("kl_lr", "kl_time", "stiefel_penalty", "kl_weight")

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
    """LoRA with a posterior: over the factor A, or what the method makes random instead.

    For BLoB A ~ N(lora_A.weight, Omega^2) for each element, Omega = std(rho).

    All options of `peft.LoraConfig` that keep the adapter a plain product of two factors work as
    there. The additional fields are plain numbers and words, so that the configuration is JSON.

    Loading such an adapter needs `import bayes_kernels.hf` first; without it PEFT raises
    `KeyError: 'BAYES_LORA'`, and the README.md in the folder says so. `export_lora` writes a folder
    that stock PEFT loads.

    Args:
        method: "blob", "scalabl", ...: the method. Defaults below are BLoB's; the other methods'
            factories (`ScalablConfig`, ...) know theirs.
        std: how the deviation is parameterised: "square" (rho^2), "softplus" or "direct".
        init_rho: eps of the paper; rho ~ U(eps / sqrt 2, eps), so that Omega starts in
            [eps^2 / 2, eps^2] with "square". (softplus: rho ~ U(eps - 1, eps); direct: the
            deviations of "square".) ScalaBL: deviations of s start in U(eps / sqrt 2, eps).
        prior_std: standard deviation sigma_p of the prior N(0, sigma_p^2) on each element of A, for
            ScalaBL on each singular value.
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
            "constant"; see `bayes_kernels.optim.KLSchedule`. "auto"
            is a scaling argument with one constant: see `bayes_kernels.optim.auto_target_std`.
        kl_lr: learning rate of the KL step for "published" and "constant".
        kl_time: for "auto", how long the gradient flow of the divergence acts on each weight: the
            sum of its step sizes over the run. None for the time in which each layer gets from its
            deviation at the start to `bayes_kernels.optim.auto_target_std`; none if it is above.
        kl_gamma: gamma of the cycle length 100 N^(pi / gamma) / batch for "published", "constant".
        kl_direction: ScalaBL: "elbo", the divergence of the posterior from the prior, or "code",
            the reverse, which its published code computes.
        covariance: ScalaBL: "diagonal", or "full" between the singular values of a layer.
        noise_layers: TFB: names, or last parts of names, of the adapted layers that have noise; None
            for all.
        sigma_q: TFB: the deviation that was found; None before.
        core: PoLAR: r x r matrix between its factors: "full", or "diagonal".
        stiefel: PoLAR: how `BayesTrainer` keeps its factors orthonormal: "landing", or by "polar" or
            "qr" retraction; see `bayes_kernels.stiefel`.
        stiefel_penalty: PoLAR: weight of landing's pull to orthonormal factors.
        head_covariance: PoLAR-VBLL: of each class in the last layer: "diagonal", "dense" (C D^2 / 2
            numbers) or "low_rank".
        head_rank: PoLAR-VBLL: rank beside the diagonal for "low_rank".
        head_init: PoLAR-VBLL: mean rows at the start: "rows" of the layer that is replaced (the first
            predictions are the base model's), or "vbll", random as published.
        head_init_variance: PoLAR-VBLL: variance of a weight at the start, for "rows"; None: a
            tenth of the prior's.
        head_prior_scale: PoLAR-VBLL: the prior of a weight is N(0, 2 head_prior_scale / D); None: 1
            until `bayes_kernels.hf.calibrate_head` has set it, as the command line does.
        head_noise: PoLAR-VBLL: learn Gaussian noise on the logits.
        head_lr: PoLAR-VBLL: learning rate of the last layer; None: that of the adapters.
        kl_weight: PoLAR-VBLL: factor of the divergence, which the loss divides by n_train.
        alternation: PoLAR-VBLL: "jacobi" (one backward pass for adapters and last layer),
            "gauss-seidel" (adapters see the last layer of the same step) or "periodic" (one of the
            two at a time, in turns of `alternation_period` steps).
        alternation_period: PoLAR-VBLL: length of a turn.
        laplace: PoLAR-VBLL: set by `bayes_kernels.hf.laplace_refine`: how the covariances were
            refined, "cholesky" or "subspace"; None where they are the trained ones.
        laplace_rank: PoLAR-VBLL: set with `laplace`: dimension in which they are stored.

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
    kl_direction: str = field(default="elbo", metadata={"help": "'elbo' or 'code'"})
    covariance: str = field(default="diagonal", metadata={"help": "'diagonal' or 'full'"})
    noise_layers: list[str] | None = field(
        default=None, metadata={"help": "TFB: layers with noise; None for all"}
    )
    sigma_q: float | None = field(default=None, metadata={"help": "TFB: the deviation found"})
    core: str = field(default="full", metadata={"help": "PoLAR: 'full' or 'diagonal'"})
    stiefel: str = field(default="landing", metadata={"help": "PoLAR: 'landing', 'polar', 'qr'"})
    stiefel_penalty: float = field(
        default=1.0, metadata={"help": "PoLAR: weight of landing's pull to the manifold"}
    )
    head_covariance: str = field(
        default="diagonal", metadata={"help": "VBLL: 'diagonal', 'dense' or 'low_rank'"}
    )
    head_rank: int = field(default=3, metadata={"help": "VBLL: rank for 'low_rank'"})
    head_init: str = field(default="rows", metadata={"help": "VBLL: 'rows' or 'vbll'"})
    head_init_variance: float | None = field(
        default=None, metadata={"help": "VBLL: variance of a weight at the start"}
    )
    head_prior_scale: float | None = field(
        default=None, metadata={"help": "VBLL: prior variance times D / 2; None: calibrate_head"}
    )
    head_noise: bool = field(default=False, metadata={"help": "VBLL: noise on the logits"})
    head_lr: float | None = field(default=None, metadata={"help": "VBLL: its learning rate"})
    kl_weight: float = field(default=1.0, metadata={"help": "VBLL: factor of the divergence"})
    alternation: str = field(
        default="jacobi", metadata={"help": "VBLL: 'jacobi', 'gauss-seidel' or 'periodic'"}
    )
    alternation_period: int = field(default=1, metadata={"help": "VBLL: steps of a turn"})
    laplace: str | None = field(default=None, metadata={"help": "VBLL: set by laplace_refine"})
    laplace_rank: int = field(default=0, metadata={"help": "VBLL: set by laplace_refine"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = BAYES_LORA
        for name, allowed in (
            ("method", BAYESIAN_METHODS),
            ("std", STDS),
            ("prior_rule", PRIOR_RULES),
            ("scope", SCOPES),
            ("kl_schedule", KINDS),
            ("kl_direction", DIRECTIONS),
            ("covariance", COVARIANCES),
            ("core", CORES),
            ("stiefel", STIEFEL_METHODS),
            ("head_covariance", HEAD_COVARIANCES),
            ("head_init", HEAD_INITS),
            ("alternation", ALTERNATIONS),
            ("laplace", (None, "cholesky", "subspace")),
        ):
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(
                    f"BayesLoraConfig: {name} must be one of {allowed}, got {value!r}; choose one"
                )
        for name in _NUMBERS:
            value = getattr(self, name)
            if name in _MAY_BE_NONE and value is None:
                continue
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            lowest_ok = number and (value >= 0 if name in _MAY_BE_ZERO else value > 0)
            if not lowest_ok or not math.isfinite(value):
                raise ValueError(
                    f"BayesLoraConfig: {name} must be a positive number, got {value!r}"
                )
        self._check_method()
        for name, least in (("head_rank", 1), ("alternation_period", 1), ("laplace_rank", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(
                    f"BayesLoraConfig: {name} must be an integer >= {least}, got {value!r}"
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
        scales = {"lora_alpha": self.lora_alpha, **(self.alpha_pattern or {})}
        for name, value in scales.items():
            if not isinstance(value, (int, float)) or not math.isfinite(value):
                raise ValueError(f"BayesLoraConfig: {name} must be a finite number, got {value!r}")
        if not 0.0 <= self.lora_dropout < 1.0:
            raise ValueError(
                f"BayesLoraConfig: lora_dropout must be in [0, 1), got {self.lora_dropout}"
            )

    def _check_method(self) -> None:
        """Options that the method does not have."""
        allowed: dict[str, tuple[str, ...]] = {
            "kl_direction": ("elbo",),
            "covariance": ("diagonal",),
        }
        if self.method == "scalabl":
            allowed = {"scope": ("none", "example"), "prior_rule": ("constant",)}
        if self.method == "tfb":
            allowed["std"] = ("direct",)
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise ValueError(
                    f"BayesLoraConfig: {name} must be one of {values} for method {self.method!r}, "
                    f"got {getattr(self, name)!r}; choose one"
                )

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> Any:
        """As PEFT's; a folder on this machine is looked through first.

        Raises:
            ValueError: the folder is damaged; the message names the file and the key.
        """
        from .checks import CONFIG_NAME, check_folder

        folder = Path(pretrained_model_name_or_path, subfolder or "")
        if (folder / CONFIG_NAME).is_file():
            check_folder(folder)
        return super().from_pretrained(pretrained_model_name_or_path, subfolder, **kwargs)

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


def TfbConfig(**options: Any) -> BayesLoraConfig:
    """Configuration of a TFB adapter: `BayesLoraConfig(method="tfb", ...)`.

    Adapters of this type are made from trained ones by `bayes_kernels.hf.bayesianize`, which writes
    the configuration; a new one has no noise.

    Source: Shi et al., "Training-Free Bayesianization", arXiv 2412.05723.
    """
    return BayesLoraConfig(method="tfb", **{"std": "direct", **options})


def ScalablConfig(**options: Any) -> BayesLoraConfig:
    """Configuration of a ScalaBL adapter: `BayesLoraConfig(method="scalabl", ...)`.

    Defaults that differ from BLoB's: prior_std=1, scope="none" (one draw for each forward pass, as
    published; "example" draws for each example), kl_lr=0.2. The published setting is r=8,
    lora_alpha=16, target_modules q_proj, v_proj and lm_head, kl_schedule="published",
    kl_direction="code" with the code's reverse divergence. kl_schedule="auto" ("elbo" only) follows
    the gradient flow of the divergence until the deviation of the singular values is a fixed share
    of their mean; see `bayes_kernels.hf.methods.scalabl.AUTO_RATIO`.

    Source: "ScalaBL", arXiv 2506.21408.
    """
    defaults: dict[str, Any] = {"prior_std": 1.0, "scope": "none", "kl_lr": 0.2}
    return BayesLoraConfig(method="scalabl", **{**defaults, **options})


def PolarConfig(**options: Any) -> BayesLoraConfig:
    """Configuration of a PoLAR adapter: `BayesLoraConfig(method="polar", ...)`.

    A point estimate: orthonormal factors and a free r x r core. Published for Llama-2-7B: lr 4e-3,
    stiefel_penalty=5e-3, lora_alpha=32, r of 4 to 32; for GLUE stiefel_penalty=1, lr 4e-4 to 1e-3.

    Source: Lion et al., "PoLAR", arXiv 2506.03133.
    """
    return BayesLoraConfig(method="polar", **options)


def PolarVbllConfig(**options: Any) -> BayesLoraConfig:
    """Configuration of PoLAR-VBLL: `BayesLoraConfig(method="polar-vbll", ...)`.

    PoLAR adapters below a variational Bayesian last layer. The published setting is r=8 on query and
    value projections of LLaMA-3.1-8B, 5,000 steps of batch 4, a dense covariance for each class;
    learning rates, penalty and prior are not published. Defaults that differ: kl_weight=0.3 and
    head_lr=5e-3, chosen on validation rows: docs/polar_vbll.md.

    Source: Xiang, Li and Lu, "PoLAR-VBLL", arXiv 2604.03388.
    """
    defaults: dict[str, Any] = {"kl_weight": 0.3, "head_lr": 5e-3}
    return BayesLoraConfig(method="polar-vbll", **{**defaults, **options})


__all__ = [
    "BAYESIAN_METHODS",
    "BAYES_FIELDS",
    "PEFT_TYPE_NAME",
    "BayesLoraConfig",
    "BlobConfig",
    "PolarConfig",
    "PolarVbllConfig",
    "ScalablConfig",
    "TfbConfig",
]
