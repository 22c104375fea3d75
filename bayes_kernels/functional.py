"""Drop-in ops: low-rank adapters with flipped-sign noise, and the Gaussian divergence.

Shapes: x (..., n) activations; a, mean (r, n) and b (m, r) low-rank factors; base (..., m) the output
of the frozen layer. Dtypes: activations fp32, bf16, fp16 (fp64 on the CPU); factors and variances are
fp32 (fp64 beside fp64 activations) and are converted to that where they are not. The result has the
dtype of `base`, or of x without one. Under autocast x is taken in the autocast dtype, factors stay
fp32. First derivatives only.

Cost of a call with T tokens: x is read once, base read once and y written once; forward keeps x, h
(T, r) in fp32 and the key for the backward pass, and never a sign, a mask or a noise tensor. Ranks
above 64 run the formulas of `bayes_kernels.reference` on materialised noise: slower and with memory
for the signs, with the same numbers.

Errors are ValueError or TypeError in one line, raised before any kernel runs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _library, reference
from ._library import MAX_FUSED_RANK
from .random import check_key

SCOPES = ("token", "example", "none")
STDS = ("square", "softplus", "direct")
_ACTIVATIONS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def lora(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    base: Tensor | None = None,
    *,
    scaling: float = 1.0,
    dropout: float = 0.0,
    key: Tensor | None = None,
    stream: int = 0,
    row0: int = 0,
) -> Tensor:
    """Low-rank adapter: base + scaling * (dropout(x) a^T) b^T.

    Args:
        x: (..., n).
        a: (r, n).
        b: (m, r).
        base: (..., m) or None.
        scaling: lora_alpha / r in PEFT's terms; a constant.
        dropout: probability in [0, 1) of dropping an element of x, drawn from the key.
        key: noise key; needed with dropout.
        stream: the layer's noise stream.
        row0: index of the first token of x, for batches that are split.

    Returns:
        (..., m) in the dtype of base, or of x.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not fit.

    Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685.
    """
    x = _autocast(x)
    _check(_OP_LORA, x, a, b, base, dropout, key)
    if a.shape[0] > MAX_FUSED_RANK:
        noise_free = _reference_dropout(x, dropout, key, stream, row0)
        return _cast_base(reference.lora(noise_free, *_factors(x, a, b), scaling=scaling), base, x)
    return _adapter(
        x, a, None, None, b, base, key, None, scaling, stream, row0, 1, dropout, "", "plain"
    )


def flipout_lora(
    x: Tensor,
    mean: Tensor,
    rho: Tensor,
    b: Tensor,
    base: Tensor | None = None,
    *,
    scaling: float = 1.0,
    key: Tensor,
    stream: int = 0,
    scope: str = "token",
    groups: Tensor | None = None,
    std: str = "square",
    row0: int = 0,
    rows_per_group: int | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Low-rank adapter whose first factor is Gaussian, sampled with flipped signs.

    A ~ N(mean, Omega^2) elementwise, Omega = std(rho). With E = Omega . eps, eps ~ N(0, 1) of shape
    (r, n) drawn once per call, and signs R_in (tokens, n), R_out (tokens, r) in {-1, +1}:

        y = base + scaling * (x mean^T + ((x . R_in) E^T) . R_out) b^T

    Every group of rows that shares its signs sees one coherent draw of A with the right marginal law;
    draws of different groups are uncorrelated (they share |eps|).

    Args:
        x: (..., n).
        mean: (r, n).
        rho: (r, n), or (r, 1) for a deviation that is constant along each row.
        b: (m, r).
        base: (..., m) or None.
        scaling: multiplies mean path and noise.
        key: int64 tensor of two elements (`random.key`); refresh it before each micro-batch.
        stream: the layer's noise stream.
        scope: "token": signs of their own for every row (BLoB's published code); "example": one draw
            for each index of x's first dimension (the paper); "none": one draw for the whole call.
        groups: int64 (...,) or any shape that broadcasts to it: the sign row of each row, in place of
            counted ones.
        std: "square" (rho^2), "softplus" or "direct".
        row0: number of the first group, for batches that are split.
        rows_per_group: that many successive rows share a group; overrides the scope's count. S
            coherent posterior samples folded into the batch: rows of one sample.
        dropout: probability of dropping an element of x (one mask for both paths).

    Returns:
        (..., m) in the dtype of base, or of x.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices, scope, std or key do not fit.

    Sources: Wang et al., "BLoB", arXiv 2406.11675; Wen et al., "Flipout", arXiv 1803.04386.
    """
    op = _OP_FLIPOUT
    x = _autocast(x)
    check_key(op, key)
    _check(op, x, mean, b, base, dropout, key)
    if scope not in SCOPES:
        raise ValueError(f"{op}: scope must be one of {SCOPES}, got {scope!r}; choose one")
    if std not in STDS:
        raise ValueError(f"{op}: std must be one of {STDS}, got {std!r}; choose one")
    r, n = mean.shape
    if rho.dim() != 2 or rho.shape[0] != r or rho.shape[1] not in (1, n):
        raise ValueError(
            f"{op}: rho must have shape (r, n) = ({r}, {n}) or ({r}, 1), got {tuple(rho.shape)}"
        )
    _check_factor(op, "rho", rho, x)
    ids = _group_ids(op, groups, x)
    if rows_per_group is None:
        leading = x.shape[0] if x.dim() > 1 else 1
        rows = math.prod(x.shape[:-1])
        rows_per_group = rows // leading if scope == "example" and leading > 0 and rows > 0 else 1
    elif rows_per_group < 1:
        raise ValueError(f"{op}: rows_per_group must be at least 1, got {rows_per_group}")
    if r > MAX_FUSED_RANK:
        return _reference_flipout(
            x,
            mean,
            rho,
            b,
            base,
            scaling,
            key,
            stream,
            scope,
            ids,
            std,
            row0,
            rows_per_group,
            dropout,
        )
    kind = "shared" if scope == "none" and ids is None else "flipped"
    return _adapter(
        x,
        mean,
        rho,
        None,
        b,
        base,
        key,
        ids,
        scaling,
        stream,
        row0,
        rows_per_group,
        dropout,
        std,
        kind,
    )


def scaled_lora(
    x: Tensor,
    a: Tensor,
    d: Tensor,
    b: Tensor,
    base: Tensor | None = None,
    *,
    scaling: float = 1.0,
    groups: Tensor | None = None,
) -> Tensor:
    """Low-rank adapter with a diagonal in rank space: base + scaling * ((x a^T) . d) b^T.

    Args:
        x: (..., n).
        a: (r, n).
        d: (r,), or (G, r) with groups: a sampled diagonal for each group of rows.
        b: (m, r).
        base: (..., m) or None.
        scaling: constant factor.
        groups: int64 (...,) in [0, G), needed when d has two dimensions.

    Returns:
        (..., m) in the dtype of base, or of x.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not fit.

    Source: "ScalaBL", arXiv 2506.21408.
    """
    op = _OP_SCALED
    x = _autocast(x)
    _check(op, x, a, b, base, 0.0, None)
    r = a.shape[0]
    if d.dim() not in (1, 2) or d.shape[-1] != r:
        raise ValueError(f"{op}: d must have shape ({r},) or (G, {r}), got {tuple(d.shape)}")
    if (d.dim() == 2) != (groups is not None):
        raise ValueError(
            f"{op}: groups must be given exactly when d is (G, r), got d of shape {tuple(d.shape)}"
        )
    _check_factor(op, "d", d, x)
    acc = _acc(x)
    middle = d.to(acc)
    if groups is not None:
        ids = _group_ids(op, groups, x)
        middle = middle.index_select(0, ids)  # type: ignore[arg-type]
    if r > MAX_FUSED_RANK:
        rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
        a, b = _factors(x, a, b)
        y = (((rows.to(acc) @ a.T) * middle) @ b.T * scaling).reshape(*x.shape[:-1], b.shape[0])
        return _cast_base(y, base, x)
    return _adapter(x, a, None, middle, b, base, None, None, scaling, 0, 0, 1, 0.0, "", "scaled")


def core_lora(
    x: Tensor,
    a: Tensor,
    core: Tensor,
    b: Tensor,
    base: Tensor | None = None,
    *,
    scaling: float = 1.0,
) -> Tensor:
    """Low-rank adapter with a full matrix in rank space: base + scaling * ((x a^T) core^T) b^T.

    Args:
        x: (..., n).
        a: (r, n); Y^T in PoLAR's terms.
        core: (r, r); Theta.
        b: (m, r); X.
        base: (..., m) or None.
        scaling: constant factor.

    Returns:
        (..., m) in the dtype of base, or of x.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not fit.

    Source: "PoLAR: Polar-Decomposed Low-Rank Adapter Representation", arXiv 2506.03133.
    """
    op = _OP_CORE
    x = _autocast(x)
    _check(op, x, a, b, base, 0.0, None)
    r = a.shape[0]
    if tuple(core.shape) != (r, r):
        raise ValueError(f"{op}: core must have shape ({r}, {r}), got {tuple(core.shape)}")
    _check_factor(op, "core", core, x)
    core = core.to(_acc(x))
    if r > MAX_FUSED_RANK:
        a, b = _factors(x, a, b)
        return _cast_base(reference.core_lora(x.to(_acc(x)), a, core, b, scaling=scaling), base, x)
    return _adapter(x, a, None, core, b, base, None, None, scaling, 0, 0, 1, 0.0, "", "core")


def gaussian_kl(
    means: Tensor | Sequence[Tensor],
    rhos: Tensor | Sequence[Tensor],
    prior_std: float | Sequence[float],
    *,
    std: str = "square",
    direction: str = "elbo",
) -> Tensor:
    """Closed-form divergence of diagonal Gaussians from N(0, prior_std^2), summed over a list.

        elbo: sum log(p / s) + (s^2 + mean^2) / (2 p^2) - 1/2   = KL(q || prior)
        code: sum log(s / p) + (p^2 + mean^2) / (2 s^2) - 1/2   = KL(prior || q)

    with s = std(rho) and p the prior's standard deviation. One launch for the whole list, partial sums
    in fp64 in a fixed order, gradients in closed form.

    Args:
        means: tensors of any shape, fp32 (or all fp64).
        rhos: tensors of the same shapes, or (r, 1) beside means (r, n).
        prior_std: one positive number, or one for each tensor.
        std: "square" (rho^2), "softplus" or "direct".
        direction: "elbo", or "code" for the reverse divergence of ScalaBL's published code.

    Returns:
        0-dim tensor in the dtype of the means.

    Raises:
        ValueError, TypeError: lists, shapes, dtypes or options do not fit.

    Sources: Wang et al., "BLoB", arXiv 2406.11675, section 3; "ScalaBL", arXiv 2506.21408.
    """
    op = "gaussian_kl"
    mean_list, rho_list, priors = check_divergence(op, means, rhos, prior_std, std, direction)
    return _GaussianKL.apply(priors, std, direction, len(mean_list), *mean_list, *rho_list)


def check_divergence(
    op: str,
    means: Tensor | Sequence[Tensor],
    rhos: Tensor | Sequence[Tensor],
    prior_std: float | Sequence[float],
    std: str,
    direction: str,
) -> tuple[list[Tensor], list[Tensor], list[float]]:
    """Argument checks shared by the divergence ops; returns lists."""
    mean_list = [means] if isinstance(means, Tensor) else list(means)
    rho_list = [rhos] if isinstance(rhos, Tensor) else list(rhos)
    if not mean_list or len(mean_list) != len(rho_list):
        raise ValueError(
            f"{op}: means and rhos must be lists of the same length, at least 1, got "
            f"{len(mean_list)} and {len(rho_list)}"
        )
    priors = (
        [float(prior_std)] if isinstance(prior_std, (int, float)) else [float(p) for p in prior_std]
    )
    if len(priors) not in (1, len(mean_list)):
        raise ValueError(
            f"{op}: prior_std must be one number or one for each of the {len(mean_list)} tensors, got "
            f"{len(priors)}"
        )
    if min(priors) <= 0:
        raise ValueError(f"{op}: prior_std must be positive, got {min(priors)}")
    if std not in STDS:
        raise ValueError(f"{op}: std must be one of {STDS}, got {std!r}; choose one")
    if direction not in ("elbo", "code"):
        raise ValueError(f"{op}: direction must be 'elbo' or 'code', got {direction!r}; choose one")
    first = mean_list[0]
    _library.require_device(op, first)
    for i, (mean, rho) in enumerate(zip(mean_list, rho_list, strict=True)):
        if mean.dtype not in (torch.float32, torch.float64) or mean.dtype != first.dtype:
            raise TypeError(
                f"{op}: means must be float32 or all float64, got {mean.dtype} for tensor {i}; convert it"
            )
        if rho.dtype != mean.dtype or rho.device != mean.device or mean.device != first.device:
            raise TypeError(
                f"{op}: tensor {i}: rho must have the dtype and device of the means "
                f"({first.dtype}, {first.device}), got {rho.dtype}, {rho.device}"
            )
        shared = mean.dim() == 2 and tuple(rho.shape) == (mean.shape[0], 1)
        if rho.shape != mean.shape and not shared:
            raise ValueError(
                f"{op}: tensor {i}: rho must have shape {tuple(mean.shape)}"
                + (f" or ({mean.shape[0]}, 1)" if mean.dim() == 2 else "")
                + f", got {tuple(rho.shape)}"
            )
    return mean_list, rho_list, priors


# --- implementation ----------------------------------------------------------------------------

_OP_LORA, _OP_FLIPOUT, _OP_SCALED, _OP_CORE = "lora", "flipout_lora", "scaled_lora", "core_lora"


def _acc(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _autocast(x: Tensor) -> Tensor:
    device = x.device.type
    if device not in ("cpu", "cuda"):
        return x  # refused below, with a clear line
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(device))
    return x


def _factors(x: Tensor, *factors: Tensor) -> tuple[Tensor, ...]:
    acc = _acc(x)
    return tuple(f if f.dtype == acc else f.to(acc) for f in factors)


def _check(
    op: str,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    base: Tensor | None,
    dropout: float,
    key: Tensor | None,
) -> None:
    if x.dtype not in _ACTIVATIONS:
        raise TypeError(
            f"{op}: x must be float32, bfloat16, float16 or float64, got {x.dtype}; convert it"
        )
    _library.require_device(op, x)
    if x.dtype == torch.float64 and x.device.type != "cpu":
        raise TypeError(f"{op}: float64 is supported on the CPU only, got {x.device}; use float32")
    if x.dim() < 1 or a.dim() != 2 or b.dim() != 2:
        raise ValueError(
            f"{op}: x must have shape (..., n), the factors (r, n) and (m, r), got {tuple(x.shape)}, "
            f"{tuple(a.shape)} and {tuple(b.shape)}"
        )
    n, r = x.shape[-1], a.shape[0]
    if a.shape[1] != n:
        hint = "; pass the transposed tensor" if a.shape[0] == n else ""
        raise ValueError(
            f"{op}: the first factor must have shape (r, n = {n}), got {tuple(a.shape)}{hint}"
        )
    if b.shape[1] != r:
        hint = "; pass the transposed tensor" if b.shape[0] == r else ""
        raise ValueError(f"{op}: b must have shape (m, r = {r}), got {tuple(b.shape)}{hint}")
    if r < 1:
        raise ValueError(
            f"{op}: the rank must be at least 1, got factors of shape {tuple(a.shape)}"
        )
    _check_factor(op, "the first factor", a, x)
    _check_factor(op, "b", b, x)
    if base is not None:
        if base.shape[:-1] != x.shape[:-1] or base.shape[-1] != b.shape[0]:
            raise ValueError(
                f"{op}: base must have shape {(*x.shape[:-1], b.shape[0])}, got {tuple(base.shape)}"
            )
        if base.device != x.device:
            raise ValueError(f"{op}: base must be on {x.device}, got {base.device}; move it")
        if base.dtype not in _ACTIVATIONS or (base.dtype == torch.float64) != (
            x.dtype == torch.float64
        ):
            raise TypeError(
                f"{op}: base must have a dtype that fits x ({x.dtype}), got {base.dtype}"
            )
    if dropout != 0.0:
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"{op}: dropout must be in [0, 1), got {dropout}; pass a probability")
        if key is None:
            raise ValueError(f"{op}: key is needed with dropout; make it with random.key(seed)")
        check_key(op, key)
    if key is not None and key.device != x.device:
        raise ValueError(f"{op}: key must be on {x.device}, got {key.device}; move it")


def _check_factor(op: str, name: str, factor: Tensor, x: Tensor) -> None:
    if not factor.is_floating_point():
        raise TypeError(
            f"{op}: {name} must be a real floating-point tensor, got {factor.dtype}; convert it"
        )
    if factor.device != x.device:
        raise ValueError(f"{op}: {name} must be on {x.device}, got {factor.device}; move it")


def _group_ids(op: str, groups: Tensor | None, x: Tensor) -> Tensor | None:
    if groups is None:
        return None
    if groups.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{op}: groups must be int64, got {groups.dtype}; convert it")
    shape = tuple(x.shape[:-1])
    try:
        expanded = groups.expand(shape)
    except RuntimeError:
        raise ValueError(
            f"{op}: groups must have shape {shape} or broadcast to it, got {tuple(groups.shape)}"
        ) from None
    return expanded.to(torch.int64).reshape(-1).contiguous()


def _adapter(
    x: Tensor,
    a: Tensor,
    rho: Tensor | None,
    middle: Tensor | None,
    b: Tensor,
    base: Tensor | None,
    key: Tensor | None,
    ids: Tensor | None,
    scaling: float,
    stream: int,
    row0: int,
    rows_per_id: int,
    dropout: float,
    std: str,
    kind: str,
) -> Tensor:
    acc = _acc(x)
    if a.dtype != acc:
        a = a.to(acc)
    if b.dtype != acc:
        b = b.to(acc)
    if rho is not None and rho.dtype != acc:
        rho = rho.to(acc)
    m = b.shape[0]
    shape = x.shape
    tokens = math.prod(shape[:-1])
    rows = x if x.dim() == 2 else x.reshape(tokens, shape[-1])
    base_rows = base if base is None or base.dim() == 2 else base.reshape(tokens, m)
    run = _Adapter.apply if _needs_gradient(x, a, rho, middle, b, base) else _without_gradient
    y = run(
        rows,
        a,
        rho,
        middle,
        b,
        base_rows,
        key,
        ids,
        scaling,
        stream,
        row0,
        rows_per_id,
        dropout,
        std,
        kind,
    )
    return y if x.dim() == 2 else y.reshape(*shape[:-1], m)


def _needs_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd's function has to be called.

    Also under forward-mode differentiation and torch.func transforms, which it refuses with a clear
    error; the raw ops would silently drop the tangents.
    """
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return True
    if torch.compiler.is_compiling():
        return False
    return (
        torch.autograd.forward_ad._current_level >= 0
        or torch._C._functorch.maybe_current_level() is not None
    )


def _shrink_expand(
    x: Tensor,
    a: Tensor,
    rho: Tensor | None,
    middle: Tensor | None,
    b: Tensor,
    base: Tensor | None,
    key: Tensor | None,
    ids: Tensor | None,
    scaling: float,
    stream: int,
    row0: int,
    rows_per_id: int,
    dropout: float,
    std: str,
    kind: str,
) -> tuple[Tensor, Tensor]:
    """The output and the rank-space activations before the middle."""
    ops = _library.ops
    factor, e = _noisy_factor(ops, a, rho, key, stream, std, kind)
    h = ops.adapter_shrink(x, factor, e, key, stream, row0, rows_per_id, ids, dropout)
    y = ops.adapter_expand(
        _apply_middle(h, middle, kind), b, base, scaling, x.dtype if base is None else base.dtype
    )
    return y, h


def _without_gradient(*args: Any) -> Tensor:
    """Inference: without autograd's function, which costs more than the kernels of a single token."""
    return _shrink_expand(*args)[0]


class _Adapter(torch.autograd.Function):
    """shrink -> middle -> expand, and the derivatives of all three.

    kind: "plain"; "flipped" (noise with signs); "shared" (one draw for all rows: a + E is an ordinary
    factor); "scaled" (middle (r,) or (tokens, r)); "core" (middle (r, r)).
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Tensor,
        a: Tensor,
        rho: Tensor | None,
        middle: Tensor | None,
        b: Tensor,
        base: Tensor | None,
        key: Tensor | None,
        ids: Tensor | None,
        scaling: float,
        stream: int,
        row0: int,
        rows_per_id: int,
        dropout: float,
        std: str,
        kind: str,
    ) -> Tensor:
        y, h = _shrink_expand(
            x,
            a,
            rho,
            middle,
            b,
            base,
            key,
            ids,
            scaling,
            stream,
            row0,
            rows_per_id,
            dropout,
            std,
            kind,
        )
        ctx.save_for_backward(x, a, rho, middle, b, key, ids, h)
        ctx.options = (scaling, stream, row0, rows_per_id, dropout, std, kind)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        ops = _library.ops
        x, a, rho, middle, b, key, ids, h = ctx.saved_tensors
        scaling, stream, row0, rows_per_id, dropout, std, kind = ctx.options
        need_x, need_a, need_rho, need_middle, need_b, need_base = ctx.needs_input_grad[:6]
        need_h = need_x or need_a or need_rho or need_middle
        dx = da = drho = dmiddle = db = None
        if need_h or need_b:
            dh, db = ops.adapter_expand_backward(
                dy, _apply_middle(h, middle, kind), b, scaling, need_h, need_b
            )
            if not need_b:
                db = None
        if need_middle:
            dmiddle = _middle_gradient(dh, h, middle, kind)
        if need_x or need_a or need_rho:
            if kind == "scaled":
                dh = dh * middle
            elif kind == "core":
                dh = dh @ middle
            factor, e = _noisy_factor(ops, a, rho, key, stream, std, kind)
            need_da = need_a or (need_rho and kind == "shared")
            dx, da, de = ops.adapter_shrink_backward(
                dh,
                x,
                factor,
                e,
                key,
                stream,
                row0,
                rows_per_id,
                ids,
                dropout,
                need_x,
                need_da,
                need_rho and kind == "flipped",
            )
            if need_rho:
                drho = ops.scaled_normal_backward(
                    da if kind == "shared" else de, rho, key, stream, std
                )
            dx = dx if need_x else None
            da = da if need_a else None
        dbase = dy if need_base else None
        return (dx, da, drho, dmiddle, db, dbase, *(None,) * 9)


def _noisy_factor(
    ops: Any, a: Tensor, rho: Tensor | None, key: Tensor | None, stream: int, std: str, kind: str
) -> tuple[Tensor, Tensor | None]:
    """The factor and noise matrix that shrink takes."""
    if kind not in ("flipped", "shared"):
        return a, None
    e = ops.scaled_normal(rho, a.shape[1], key, stream, std)
    return (a, e) if kind == "flipped" else (a + e, None)


def _apply_middle(h: Tensor, middle: Tensor | None, kind: str) -> Tensor:
    if kind == "scaled":
        return h * middle  # type: ignore[operator]
    if kind == "core":
        return h @ middle.T  # type: ignore[union-attr]
    return h


def _middle_gradient(dh: Tensor, h: Tensor, middle: Tensor, kind: str) -> Tensor:
    if kind == "core":
        return dh.T @ h
    product = dh * h
    return product.sum(0) if middle.dim() == 1 else product


class _GaussianKL(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, priors: list[float], std: str, direction: str, count: int, *tensors: Tensor
    ) -> Tensor:
        tensors = tuple(t.contiguous() for t in tensors)
        means, rhos = list(tensors[:count]), list(tensors[count:])
        ctx.save_for_backward(*tensors)
        ctx.options = (priors, std, direction, count)
        return _library.ops.gaussian_kl(means, rhos, priors, std, direction).to(means[0].dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, weight: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        priors, std, direction, count = ctx.options
        tensors = ctx.saved_tensors
        dmeans, drhos = _library.ops.gaussian_kl_backward(
            weight, list(tensors[:count]), list(tensors[count:]), priors, std, direction
        )
        return (None, None, None, None, *dmeans, *drhos)


def _cast_base(y: Tensor, base: Tensor | None, x: Tensor) -> Tensor:
    return y.to(x.dtype) if base is None else base + y.to(base.dtype)


def _reference_dropout(
    x: Tensor, dropout: float, key: Tensor | None, stream: int, row0: int
) -> Tensor:
    rows = x.to(_acc(x))
    if dropout == 0.0:
        return rows
    n = x.shape[-1]
    keep = _library.ops.dropout_mask(key, stream, math.prod(x.shape[:-1]), n, row0, dropout)
    return reference.dropped(rows, keep.reshape(x.shape), dropout)


def _reference_flipout(
    x: Tensor,
    mean: Tensor,
    rho: Tensor,
    b: Tensor,
    base: Tensor | None,
    scaling: float,
    key: Tensor,
    stream: int,
    scope: str,
    ids: Tensor | None,
    std: str,
    row0: int,
    rows_per_group: int,
    dropout: float,
) -> Tensor:
    """Ranks above the fused limit: the definition, on materialised noise from the dump ops."""
    ops, acc = _library.ops, _acc(x)
    n, r = x.shape[-1], mean.shape[0]
    rows = math.prod(x.shape[:-1])
    mean, rho, b = _factors(x, mean, rho, b)
    ones = scope == "none" and ids is None
    where = (row0, rows_per_group, ids)
    keep = None
    if dropout > 0.0:
        keep = ops.dropout_mask(key, stream, rows, n, row0 * rows_per_group, dropout)
    noise = reference.DenseNoise(
        eps=ops.normal(key, stream, [r, n]).to(acc),
        r_in=x.new_ones((), dtype=acc)
        if ones
        else ops.sign_bits(key, stream, False, rows, n, *where).to(acc),
        r_out=x.new_ones((), dtype=acc)
        if ones
        else ops.sign_bits(key, stream, True, rows, r, *where).to(acc),
        keep=keep,
    )
    y = reference.flipout_lora(
        x.to(acc), mean, rho, b, scaling=scaling, noise=noise, std=std, dropout=dropout
    )
    return _cast_base(y, base, x)
