"""PoLAR: adapters whose factors are orthonormal, with a free matrix between them.

    W = W0 + scaling X Theta Y^T,  X (out, r) and Y (in, r) with X^T X = Y^T Y = I

X is `lora_B.weight`, Y^T is `lora_A.weight`, Theta is `lora_core`: (r, r), or (r,) for a diagonal.
Theta starts at zero, so that the first prediction is the base model's. A product of two free factors
uses few of its r directions (its stable rank stays near 1.5 in the papers); with orthonormal factors
Theta alone says how much each pair of directions counts. `bayes_kernels.stiefel` keeps the factors
orthonormal. `BayesTrainer` takes that optimiser by itself; other training loops take
`parameter_groups`. Factors stay fp32: bf16 would leave X^T X - I at 4e-3 sqrt(r).

Sources: Lion et al., "PoLAR: Polar-Decomposed Low-Rank Adapter Representation", arXiv 2506.03133,
and its code; Xiang, Li and Lu, "PoLAR-VBLL", arXiv 2604.03388.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ... import functional
from ...stiefel import METHODS, StiefelAdamW, orthogonality
from ..config import BayesLoraConfig, option
from ..initial import private_generator
from ..layers import active_layers
from ..method import Method
from ..variants import BayesLayer, BayesVariant, TrainingHooks

CORE = "lora_core"


@dataclass
class PolarConfig(BayesLoraConfig, method="polar"):
    """Configuration of a PoLAR adapter: orthonormal factors and a free r x r core between them.

    A point estimate. Published for Llama-2-7B: lr 4e-3, stiefel_penalty=5e-3, lora_alpha=32, r of 4
    to 32; for GLUE stiefel_penalty=1, lr 4e-4 to 1e-3.

    Source: Lion et al., "PoLAR", arXiv 2506.03133.
    """

    core: str = option(
        "full",
        "The matrix between the factors: 'full' (r, r), or 'diagonal'.",
        choices=("full", "diagonal"),
    )
    stiefel: str = option(
        "landing",
        "How the factors stay orthonormal: 'landing', or by 'polar' or 'qr' retraction; "
        "bayes_kernels.stiefel has the formulas.",
        choices=METHODS,
    )
    stiefel_penalty: float = option(
        1.0,
        "Weight of landing's pull to orthonormal factors.",
        least=0,
        needs={"stiefel": ("landing",)},
    )


class PolarTraining(TrainingHooks):
    """Training keeps the factors orthonormal, with `StiefelAdamW`."""

    logs_divergence = False

    def __init__(self, trainer: Any, config: Any) -> None:
        super().__init__(trainer, config)
        deepspeed = getattr(trainer.args, "deepspeed_plugin", None)
        if deepspeed is not None and deepspeed.zero_stage > 0:
            raise ValueError(
                "BayesTrainer: PoLAR's optimiser needs matrices, got DeepSpeed ZeRO-"
                f"{deepspeed.zero_stage}, which hands it vectors; use plain data parallelism or FSDP2"
            )

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer | None:
        """`StiefelAdamW` with the options of the configuration.

        Raises:
            ValueError: the trainer asks for another optimiser.
        """
        arguments = self.trainer.args
        optim = getattr(arguments.optim, "value", arguments.optim)
        if optim not in ("adamw_torch", "adamw_torch_fused"):
            raise ValueError(
                f"BayesTrainer: PoLAR adapters need optim='adamw_torch', whose place "
                f"bayes_kernels.stiefel.StiefelAdamW takes, got {optim!r}; or pass an optimizer that "
                "keeps their factors orthonormal"
            )
        decayed = set(self.trainer.get_decay_parameter_names(model))
        others = {name for name, _ in model.named_parameters()} - decayed
        groups = parameter_groups(model, weight_decay=arguments.weight_decay, no_decay=others)
        for group in groups:  # a larger one that was asked for counts
            if "eps" in group:
                group["eps"] = max(group["eps"], arguments.adam_epsilon)
        return StiefelAdamW(
            groups,
            lr=arguments.learning_rate,
            betas=(arguments.adam_beta1, arguments.adam_beta2),
            eps=arguments.adam_epsilon,
        )

    def logs(self) -> dict[str, float]:
        """Distance of the factors from orthonormal ones."""
        return {"orthogonality": stiefel_error(self.trainer.model).item()}


class PolarVariant(BayesVariant, method="polar"):
    """PoLAR in one LoRA layer. It has no posterior: every mode is the same."""

    parameters = (CORE,)
    fp32 = ("lora_A", "lora_B", CORE)
    samples = False
    training = PolarTraining
    targets = ("linear",)

    def initial(self, module: Any, adapter: str) -> dict[str, Tensor]:
        """Orthonormal factors and a zero core; or the update of given factors.

        Given factors (B not zero, as `import_lora` reads them) have the singular value decomposition
        B A = X diag(s) Y^T, which becomes the adapter.
        """
        a, b = module.lora_A[adapter].weight, module.lora_B[adapter].weight
        rank, limit = a.shape[0], min(a.shape[1], b.shape[0])
        if rank > limit:
            raise ValueError(
                f"PolarConfig: r must be at most the layer's smaller side, got {rank} and {limit} in "
                f"{self.name}: more columns cannot be orthonormal; lower r, set rank_pattern, or "
                "leave the layer out"
            )
        shape = (rank,) if self.config.core == "diagonal" else (rank, rank)
        core = torch.zeros(shape, dtype=torch.float32, device=a.device)
        with torch.no_grad():
            a.data, b.data = a.data.float(), b.data.float()
            if a.is_meta:
                return {CORE: core}
            if bool((b != 0).any()):
                left, upper_b = torch.linalg.qr(b.double())
                right, upper_a = torch.linalg.qr(a.double().T)
                u, s, vh = torch.linalg.svd(upper_b @ upper_a.T)
                b.copy_(left @ u)
                a.copy_(vh @ right.T)
                core.copy_(s if core.dim() == 1 else torch.diag(s))
            else:
                generator = private_generator(self.stream)
                for factor in (a, b):
                    start = torch.empty(factor.shape, dtype=torch.float32)
                    factor.copy_(nn.init.orthogonal_(start, generator=generator))
        return {CORE: core}

    def adapted(
        self, module: Any, adapter: str, x: Tensor, result: Tensor, mode: str, dropout: float
    ) -> Tensor:
        """result + scaling * ((dropout(x) Y) Theta^T) X^T."""
        a, b = module.lora_A[adapter].weight, module.lora_B[adapter].weight
        core, scaling = getattr(module, CORE)[adapter], module.scaling[adapter]
        x = self.dropped(x, dropout)
        if core.dim() == 1:
            return functional.scaled_lora(x, a, core, b, result, scaling=scaling, kept=self.kept(x))
        return functional.core_lora(x, a, core, b, result, scaling=scaling, kept=self.kept(x))

    def mean_factors(self, module: Any, adapter: str) -> tuple[Tensor, Tensor]:
        """(Y^T, X Theta)."""
        a, b = module.lora_A[adapter].weight, module.lora_B[adapter].weight
        core = getattr(module, CORE)[adapter]
        return a, b * core if core.dim() == 1 else b @ core

    def own_decay(self, module: Any, adapter: str) -> list[nn.Parameter]:
        """The factors: their norm is fixed."""
        return [module.lora_A[adapter].weight, module.lora_B[adapter].weight]


def stiefel_factors(model: nn.Module) -> list[nn.Parameter]:
    """X and Y^T of all active PoLAR adapters; empty where there is none."""
    return [p for item in _polar_layers(model) for p in _factors(item)]


def parameter_groups(
    model: nn.Module, *, weight_decay: float = 0.0, no_decay: Collection[str] = ()
) -> list[dict[str, Any]]:
    """Groups of the trainable parameters for `bayes_kernels.stiefel.StiefelAdamW`.

    Options of the configuration (`stiefel`, `stiefel_penalty`, `head_lr`) are set in the groups.
    Weight decay leaves out the factors, whose norm is fixed, and a variational last layer, whose
    prior decays it. Factors that land have eps 1e-6.

    Args:
        model: a model with an active PoLAR adapter.
        weight_decay: of all other parameters.
        no_decay: names of parameters without it.

    Returns:
        Groups with at least one parameter each.

    Raises:
        ValueError: there is no active PoLAR adapter.

    Example:
        optimizer = StiefelAdamW(parameter_groups(model), lr=4e-3)
    """
    layers = _polar_layers(model)
    if not layers:
        raise ValueError(
            f"parameter_groups: the model must have an active PoLAR adapter, got "
            f"{type(model).__name__} without; make one with get_peft_model(model, PolarConfig(...))"
        )
    variant = layers[0].variant
    config = variant.config
    factors = {id(p) for item in layers for p in _factors(item)}
    head = {id(p) for module in variant.modules(model) for p in module.parameters()}
    groups: dict[str, list[nn.Parameter]] = {"stiefel": [], "head": [], "decay": [], "rest": []}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if id(parameter) in factors:
            kind = "stiefel"
        elif id(parameter) in head:
            kind = "head"
        else:
            kind = "decay" if weight_decay and name not in no_decay else "rest"
        groups[kind].append(parameter)
    options: dict[str, dict[str, Any]] = {
        "stiefel": {"stiefel": True, "method": config.stiefel, "penalty": config.stiefel_penalty},
        "head": {} if getattr(config, "head_lr", None) is None else {"lr": config.head_lr},
        "decay": {"weight_decay": weight_decay},
    }
    if config.stiefel == "landing":
        # At Theta = 0 the field is rounding, which eps 1e-8 magnifies: ||Z'Z-I|| after one step is
        # 0.08 against 0.002 at 384 x 8.
        options["stiefel"]["eps"] = 1e-6
    return [
        {"params": parameters, **options.get(kind, {})}
        for kind, parameters in groups.items()
        if parameters
    ]


def stiefel_error(model: nn.Module) -> Tensor:
    """Largest ||Z^T Z - I||_F over the factors of all active PoLAR adapters, 0-dim.

    Raises:
        ValueError: there is no active PoLAR adapter.
    """
    return orthogonality(stiefel_factors(model))


def _polar_layers(model: nn.Module) -> list[BayesLayer]:
    return [item for item in active_layers(model) if isinstance(item.variant, PolarVariant)]


def _factors(item: BayesLayer) -> tuple[nn.Parameter, nn.Parameter]:
    return item.layer.lora_B[item.adapter].weight, item.mean


# The code's setting for Llama-2-7B on 170,420 questions of common sense: five epochs, gradients clipped
# before they become the landing field. Its rate falls along a cosine, ours linearly.
PUBLISHED = {
    "rank": 8,
    "alpha": 32.0,
    "target_modules": ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj"),
    "dropout": 0.05,
    "lr": 4e-3,
    "steps": 6657,
    "batch_size": 128,
    "warmup": 0.03,
    "max_grad_norm": 1.0,
    "max_length": 512,
    "scale": "keep",
    "options": {"stiefel": "landing", "stiefel_penalty": 5e-3},
}

METHOD = Method("polar", "PoLAR", PolarConfig, bayesian=False, lr=2e-3, published=PUBLISHED)

__all__ = ["METHOD", "PolarConfig", "PolarVariant", "parameter_groups", "stiefel_error"]
