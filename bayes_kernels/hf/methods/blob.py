"""BLoB: a Gaussian posterior over the factor A, learned by backpropagation.

Source: Wang et al., "BLoB: Bayesian Low-Rank Adaptation by Backpropagation", arXiv 2406.11675.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ... import functional, random, reference
from ...functional import SCOPES, STDS
from ...optim import DecoupledKL, auto_target_std, flow_time
from ..config import VariationalConfig, option
from ..experts import Routed, by_expert
from ..initial import inverse_softplus, uniform_like
from ..method import PAPERS, Method
from ..noise import DRAW_SCOPES
from ..targets import LAYER_KINDS
from ..variants import BayesVariant, Divergence, KLPlan, KLStep

if TYPE_CHECKING:
    from ..noise import NoiseState
    from ..variants import BayesLayer

RHO = "lora_A_rho"

# Tokens of a draw up to which its factors are kept from pass to pass: drawing them costs as much as all
# else that a token takes.
_FEW = 16


@dataclass
class BlobConfig(VariationalConfig, method="blob"):
    """Configuration of a BLoB adapter: A ~ N(lora_A.weight, Omega^2) for each element.

    The published setting is r=8, lora_alpha=16, target_modules q_proj, v_proj and lm_head,
    prior_std=0.2, kl_schedule="published", kl_lr=0.01. "auto" step sizes are a scaling argument with
    one constant: `bayes_kernels.optim.auto_target_std`.

    Source: Wang et al., "BLoB: Bayesian Low-Rank Adaptation by Backpropagation", arXiv 2406.11675.
    """

    prior_std: float = option(
        0.2, "Deviation sigma_p of the prior N(0, sigma_p^2) on each element of A.", above=0
    )
    prior_rule: str = option(
        "constant",
        "'constant': sigma_p = prior_std; 'fan_in': sigma_p = prior_std / sqrt(input features).",
        choices=("constant", "fan_in"),
    )
    std: str = option(
        "square",
        "The deviation: 'square' (rho^2, starting in [init_rho^2 / 2, init_rho^2]), 'softplus' (of rho "
        "from U(init_rho - 1, init_rho)), or 'direct' (rho, starting as the deviations of 'square').",
        choices=STDS,
    )
    scope: str = option(
        "token",
        "Which rows share noise in training: 'token' (no two, as in the published code), "
        "'example' (the rows of an example share, as in the paper) or 'none' (all rows share).",
        choices=SCOPES,
    )
    _takes_parameters = True

    def _check_parameters(self, kind: str) -> None:
        super()._check_parameters(kind)
        if self.scope == "example":
            raise ValueError(
                f"{kind}: scope must be 'token' or 'none' with target_parameters, got 'example': experts "
                "see tokens, not examples"
            )

    def prior_std_of(self, in_features: int) -> float:
        """Deviation of the prior for a layer with that many input features."""
        if self.prior_rule == "fan_in":
            return self.prior_std / math.sqrt(in_features)
        return self.prior_std


class GaussianFactor(BayesVariant):
    """A Gaussian over the factor A, with mean `lora_A.weight`.

    A subclass has the parameter of the deviation, whose name is `deviation`: (r, in), or (r, 1) for
    one number for each row. `std` says what the deviation is of it: see `functional.flipout_lora`.
    """

    std = "direct"
    scope = "token"
    draw_scopes = DRAW_SCOPES
    targets = LAYER_KINDS

    def adapted(
        self, module: Any, adapter: str, x: Tensor, result: Tensor, mode: str, dropout: float
    ) -> Tensor:
        """result + scaling * (dropout(x) A^T) B^T, with A its mean or drawn."""
        state = self.state
        a, b = module.lora_A[adapter].weight, module.lora_B[adapter].weight
        scaling = module.scaling[adapter]
        if mode == "mean":
            key = state.key_on(x.device) if dropout > 0.0 else None
            return functional.lora(
                x,
                a,
                b,
                result,
                scaling=scaling,
                dropout=dropout,
                key=key,
                stream=self.stream,
                kept=self.kept(x),
            )
        rho = getattr(module, self.deviation)[adapter]
        options: dict[str, Any] = {"scaling": scaling, "stream": self.stream, "std": self.std}
        if mode == "flipout":
            options.update(key=state.key_on(x.device), scope=self.scope, dropout=dropout)
            return functional.flipout_lora(x, a, rho, b, result, kept=self.kept(x), **options)
        chosen = state.current()
        if chosen.scope == "token":
            x = self.dropped(x, dropout)
            keys = chosen.keys_of_draws[x.device]
            sizes = [self.copies(x, len(keys))] * len(keys)
            parts = zip(keys, x.split(sizes), result.split(sizes), strict=True)
            return torch.cat(
                [
                    functional.flipout_lora(
                        x, a, rho, b, y, key=key, kept=self.kept(x, key), **options
                    )
                    for key, x, y in parts
                ]
            )
        key = state.key_on(x.device)
        if chosen.kind != "shared":
            where, x = self.draws_of(x), self.dropped(x, dropout)
            options.update(key=key, antithetic=chosen.kind == "antithetic")
            if not _writes_text(x, len(where["draws"])):
                return functional.sampled_lora(
                    x, a, rho, b, result, kept=self.kept(x), **where, **options
                )
            draws = where.pop("draws")
            del options["scaling"]
            factors = chosen.remembered(
                self, (a, rho, key), lambda: functional.gaussian_draws(a, rho, draws, **options)
            )
            if len(draws) == 1:
                return functional.lora(x, factors[0], b, result, scaling=scaling)
            return functional.grouped_lora(x, factors, b, result, **where, scaling=scaling)
        options.update(groups=self.ids_of(x), dropout=dropout)
        return functional.flipout_lora(x, a, rho, b, result, key=key, kept=self.kept(x), **options)

    def looked_up(self, module: Any, adapter: str, ids: Tensor, mode: str) -> Tensor:
        """What `adapted` has in rank space for one-hot inputs: the same numbers for the same key.

        Noise is drawn for the whole vocabulary: r n numbers a pass, for S draws S r n.
        """
        mean = module.lora_A[adapter].weight
        mean = mean if mean.dtype == torch.float64 else mean.float()
        middle = module.columns(mean, ids)
        if mode == "mean":
            return middle
        state, chosen = self.state, self.state.current()
        rho = getattr(module, self.deviation)[adapter].to(mean.dtype)
        key = state.key_on(ids.device)
        if mode == "sample" and len(ids) == 1 and len(chosen.draws_on(ids.device).ids) > 1:
            raise ValueError(
                f"posterior: layer {self.name} looks up {tuple(ids.shape)} for all rows at once, as "
                "embeddings of positions do, so that rows cannot have draws of their own; leave it out "
                "of target_modules, or use n_samples=1 and first_sample=0, 1, ..."
            )

        def noise(key: Tensor, tokens: Tensor, rows: Tensor) -> Tensor:
            eps = random.normal(key, mean.shape, stream=self.stream).to(mean.dtype)
            return module.flipped(
                reference.std_of(rho, self.std) * eps, tokens, key, self.stream, rows
            )

        def counted(tokens: Tensor) -> Tensor:
            return torch.arange(tokens.numel(), device=ids.device).reshape(tokens.shape)

        if mode == "flipout":
            rows = counted(ids)
            if self.scope == "none":
                eps = random.normal(key, mean.shape, stream=self.stream).to(mean.dtype)
                return middle + module.columns(reference.std_of(rho, self.std) * eps, ids)
            if self.scope == "example" and ids.dim() > 0:
                each = ids.numel() // max(len(ids), 1) if ids.dim() > 1 else ids.numel()
                rows = rows // max(each, 1)
            return middle + noise(key, ids, rows)
        if chosen.scope == "token":
            keys = chosen.keys_of_draws[ids.device]
            sizes = [self.copies(middle, len(keys))] * len(keys)
            parts = zip(keys, ids.split(sizes), strict=True)
            return middle + torch.cat([noise(key, part, counted(part)) for key, part in parts])
        if chosen.kind == "shared":
            return middle + noise(key, ids, self.ids_of(middle).expand(ids.shape))
        where = self.draws_of(middle)
        places = where.get("groups")
        if places is None:
            places = counted(ids) // where["rows_per_group"]

        def drawn() -> Tensor:
            return functional.gaussian_draws(
                mean,
                rho,
                where["draws"],
                key=key,
                stream=self.stream,
                std=self.std,
                antithetic=chosen.kind == "antithetic",
            )

        few = _writes_text(middle, len(where["draws"]))
        factors = chosen.remembered(self, (mean, rho, key), drawn) if few else drawn()
        return module.columns(factors, ids, places)

    def on_experts(
        self, module: Any, adapter: str, x: Tensor, result: Tensor, rows: Routed, mode: str
    ) -> Tensor:
        """`adapted` with the factors of each row's expert; the signs of a token are those of its experts."""
        state = self.state
        kept = module.lora_A[adapter].weight
        a, b = by_expert(module, kept, module.lora_B[adapter].weight)
        scaling = module.scaling[adapter]
        if mode == "mean":
            groups = rows.experts
            return functional.grouped_lora(
                x, a, b, result, groups=groups, scaling=scaling, kept=self.kept(x)
            )
        rho = getattr(module, self.deviation)[adapter]
        law: dict[str, Any] = {"stream": self.stream, "std": self.std}

        def flipped(
            x: Tensor, result: Tensor, experts: Tensor, key: Tensor, **signs: Any
        ) -> Tensor:
            by = rho.unflatten(0, (len(a), -1))
            options = {**law, **signs, "groups": experts, "kept": self.kept(x, key), "key": key}
            return functional.grouped_flipout_lora(x, a, by, b, result, scaling=scaling, **options)

        if mode == "flipout":
            signs = {} if self.scope == "none" else {"sign_rows": rows.tokens}
            key = state.key_on(x.device)
            return flipped(x, result, rows.experts, key, scope=self.scope, **signs)
        chosen = state.current()
        if chosen.scope == "token":
            keys = chosen.keys_of_draws[x.device]
            tokens = self.copies(rows.hidden, len(keys))
            # Every draw has as many rows as any other.
            order = (rows.tokens // tokens).sort(stable=True).indices
            parts = [
                flipped(x[i], result[i], rows.experts[i], key, sign_rows=rows.tokens[i] % tokens)
                for key, i in zip(keys, order.chunk(len(keys)), strict=True)
            ]
            back = torch.empty_like(order)
            back[order] = torch.arange(len(order), device=order.device)
            return torch.cat(parts)[back]
        key = state.key_on(x.device)
        if chosen.kind == "shared":
            ids = self.ids_of(rows.hidden)[rows.tokens]
            return flipped(x, result, rows.experts, key, sign_rows=ids)
        where = self.draws_of(rows.hidden)
        draws = where["draws"]
        number = len(draws)
        if number == 1:
            groups = rows.experts
        else:
            size = where.get("rows_per_group")
            drawn = rows.tokens // size if size else where["groups"][rows.tokens]
            groups = drawn * len(a) + rows.experts

        def factors() -> Tensor:
            pairs = chosen.kind == "antithetic"
            return functional.gaussian_draws(kept, rho, draws, key=key, antithetic=pairs, **law)

        few = _writes_text(rows.hidden, number)
        made = chosen.remembered(self, (kept, rho, key), factors) if few else factors()
        made = made.unflatten(1, (len(a), -1)).flatten(0, 1)
        if number > 1 and few and len(x) < len(made):
            # Factors of the rows alone: B of all experts would be copied for each draw.
            return functional.grouped_lora(
                x, made[groups], b[rows.experts], result, rows_per_group=1, scaling=scaling
            )
        b = b if number == 1 else b.repeat(number, 1, 1)
        return functional.grouped_lora(
            x, made, b, result, groups=groups, scaling=scaling, kept=self.kept(x)
        )

    def first_factor(self, module: Any, adapter: str) -> Tensor:
        """The mean of A; or M + s Omega . eps, in training with an eps of the pass."""
        mean, mode = module.lora_A[adapter].weight, self.mode_of(module)
        if mode == "mean":
            return mean
        state = self.state
        chosen, key = state.current(), state.key_on(mean.device)
        numbers, pairs = torch.zeros(1, dtype=torch.int64, device=mean.device), False
        if mode == "sample":
            numbers, pairs = chosen.draws_on(mean.device).ids, chosen.kind == "antithetic"
            self.copies(mean, len(numbers))
        rho = getattr(module, self.deviation)[adapter]
        law: dict[str, Any] = {"stream": self.stream, "std": self.std, "antithetic": pairs}
        return functional.gaussian_draws(mean, rho, numbers, key=key, **law)[0].to(mean.dtype)

    def deviations(self, module: Any, adapter: str) -> list[Tensor]:
        """rho, or what the method has in its place."""
        return [getattr(module, self.deviation)[adapter]]

    def rescale_(self, module: Any, adapter: str, factor: float) -> None:
        """Omega times the factor."""
        (rho,) = self.deviations(module, adapter)
        if self.std == "softplus":
            rho.copy_(inverse_softplus(factor * nn.functional.softplus(rho.double())))
        else:
            rho.mul_(math.sqrt(factor) if self.std == "square" else factor)

    def draw_factors(
        self, module: Any, adapter: str, key: Tensor, number: int
    ) -> tuple[Tensor, Tensor]:
        """A = M + Omega . eps or M - Omega . eps, with the eps of the pair of draw `number`."""
        mean, b = self.mean_factors(module, adapter)
        rho = getattr(module, self.deviation)[adapter]
        numbers = torch.tensor([number], device=key.device)
        drawn = functional.gaussian_draws(
            mean, rho, numbers, key=key, stream=self.stream, std=self.std
        )
        return drawn[0], b


def _writes_text(x: Tensor, draws: int) -> bool:
    """Whether there are a few tokens for each draw, as when a text is written: others may follow."""
    return not (
        torch.compiler.is_compiling()
        or torch.is_grad_enabled()
        or math.prod(x.shape[:-1]) > _FEW * draws
        or (x.is_cuda and torch.cuda.is_current_stream_capturing())
    )


class BlobVariant(GaussianFactor, method="blob"):
    """BLoB: deviation parameter `lora_A_rho` (r, in)."""

    parameters = (RHO,)
    fp32 = (RHO,)
    deviation = RHO

    def __init__(self, config: BlobConfig, name: str, in_features: int, state: NoiseState):
        super().__init__(config, name, in_features, state)
        self.std, self.scope = config.std, config.scope
        self.prior_std = config.prior_std_of(in_features)

    def initial(self, module: Any, adapter: str) -> dict[str, Tensor]:
        """rho as the paper draws it."""
        mean = module.lora_A[adapter].weight
        eps = self.config.init_rho
        low, high = eps / math.sqrt(2), eps
        if self.std == "softplus":
            low, high = eps - 1, eps
        elif self.std == "direct":
            low, high = low * low, high * high
        return {RHO: uniform_like(mean, mean.shape, low, high, self.stream)}

    def divergence(self, module: Any, adapter: str) -> Divergence | Tensor | None:
        """That of N(M, Omega^2) from N(0, sigma_p^2)."""
        mean, rho = module.lora_A[adapter].weight, module.lora_A_rho[adapter]
        return Divergence(_fp32(mean), _fp32(rho), self.prior_std, self.std)

    def own_decay(self, module: Any, adapter: str) -> list[nn.Parameter]:
        """Means and deviations."""
        return [module.lora_A[adapter].weight, module.lora_A_rho[adapter]]

    @classmethod
    def kl_starts(cls, layers: Sequence[BayesLayer]) -> list[float]:
        """Mean deviation Omega of each layer: one read of rho and one synchronisation."""
        found: list[Tensor] = []
        with torch.no_grad():
            for item in layers:
                value: Any = reference.std_of(item.rho.detach(), item.variant.config.std).mean()
                value = value.full_tensor() if hasattr(value, "full_tensor") else value
                found.append(value.to(found[0].device) if found else value)
        return torch.stack(found).tolist()

    @classmethod
    def kl_step(cls, layers: Sequence[BayesLayer], plan: KLPlan) -> KLStep | None:
        """Gradient step or exact gradient flow on all means and deviations."""
        stds = sorted({item.variant.config.std for item in layers})
        if len(stds) != 1:
            raise ValueError(
                f"decoupled_kl: active adapters must share one std parameterisation, got {stds}; "
                "train one adapter at a time"
            )
        scales = [plan.weight] * len(layers)
        if plan.schedule.kind == "auto" and not plan.given:
            scales = [
                plan.weight * cls._flow_time(item, plan, start)
                for item, start in zip(layers, plan.starts, strict=True)
            ]
        return DecoupledKL(
            [item.mean for item in layers],
            [item.rho for item in layers],
            [item.variant.prior_std for item in layers],
            plan.schedule,
            std=stds[0],
            scales=scales,
        )

    @staticmethod
    def _flow_time(item: BayesLayer, plan: KLPlan, start_std: float) -> float:
        config, prior = item.variant.config, item.variant.prior_std
        if config.kl_time is not None:
            return config.kl_time
        if config.std != "square":
            raise ValueError(
                f"decoupled_kl: the rule of kl_schedule='auto' is for std='square', got "
                f"{config.std!r}; set kl_time, or kl_schedule='published'"
            )
        target = auto_target_std(item.in_features, plan.lr_sum, plan.n_train, prior)
        return flow_time(target, prior, start_std) if start_std < target else 0.0


def _fp32(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float32 else tensor.float()


def _prior(config: Mapping[str, Any]) -> str:
    """The prior in words."""
    rule = " / sqrt(in)" if config.get("prior_rule") == "fan_in" else ""
    return f"N(0, ({config.get('prior_std')}{rule})^2) on each element of A"


# The paper's setting for Llama-2; its Llama-3.1-8B has prior_std 0.15 and kl_lr 0.0075.
PUBLISHED = {
    **PAPERS,
    "draw_scope": "token",
    "options": {"kl_schedule": "published", "kl_lr": 0.01, "prior_std": 0.2, "scope": "token"},
}

METHOD = Method("blob", "BLoB", BlobConfig, prior=_prior, published=PUBLISHED)
