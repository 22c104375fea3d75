"""Low-rank adapters: plain, with flipped-sign noise, with a diagonal or a matrix in rank space.

shrink (x to rank space) -> middle -> expand (rank space to the output, added to base); `adapter_passes`
runs them and has their derivatives.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..random import check_key
from .activations import QuantizedActivations, check_kept
from .adapter_passes import adapter, direct
from .arguments import (
    ACTIVATIONS,
    accumulate_dtype,
    check_choice,
    check_factor,
    check_integer,
    check_number,
    check_same_device,
    check_tensor,
)
from .noise import SCOPES, STDS, Noise, group_ids, group_size

_COUNTED = ("token", "example")  # scopes whose sign rows are counted


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
    kept: QuantizedActivations | None = None,
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
        kept: x in 8 bits (`quantize_activations`), which backward takes in place of x: less memory, and
            the same gradients up to rounding without bias. Ranks above 64 keep x.

    Returns:
        (..., m) in the dtype of base, or of x.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not fit.

    Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685.
    """
    op = "lora"
    if type(dropout) is not float:
        check_number(op, "dropout", dropout)
    if key is None or dropout > 0.0:
        y = direct(
            x, a, None, b, base, Noise(key, stream, row0, 1, None, dropout), "", scaling, kept
        )
        if y is not None:
            return y
    _check(op, x, a, b, base, scaling, dropout, key, stream, row0)
    check_kept(op, kept, x)
    noise = Noise(key, stream, row0, dropout=dropout)
    return adapter(x, a, b, base, noise=noise, scaling=scaling, kept=kept)


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
    kept: QuantizedActivations | None = None,
) -> Tensor:
    """Low-rank adapter whose first factor is Gaussian, sampled with flipped signs.

    A ~ N(mean, Omega^2) elementwise, Omega = std(rho). With E = Omega . eps, eps ~ N(0, 1) of shape
    (r, n) drawn once per call, and signs R_in (tokens, n), R_out (tokens, r) in {-1, +1}:

        y = base + scaling * (x mean^T + ((x . R_in) E^T) . R_out) b^T

    Every group of rows that shares its signs sees one coherent draw of A with the right marginal law;
    draws of different groups are uncorrelated (they share |eps|).

    Without gradients and for at most 64 rows (512 / r above rank 8) on the CPU, eps is kept from the
    second call with the same key, stream and r n on: at most 64 MiB, or the MiB that the environment
    variable BAYES_KERNELS_KEPT_DRAWS says when the library is loaded. The results are the same bits.

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
        kept: x in 8 bits (`quantize_activations`), which backward takes in place of x: less memory, and
            the same gradients up to rounding without bias. Ranks above 64 keep x.

    Returns:
        (..., m) in the dtype of base, or of x.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices, scope, std or key do not fit.

    Sources: Wang et al., "BLoB", arXiv 2406.11675; Wen et al., "Flipout", arXiv 1803.04386.
    """
    op = "flipout_lora"
    counted = _COUNTED if groups is None else SCOPES
    if isinstance(x, Tensor) and isinstance(rho, Tensor) and scope in counted:
        rows_per_id = group_size(op, x, scope, rows_per_group)
        noise = Noise(key, stream, row0, rows_per_id, group_ids(op, groups, x), dropout)
        y = direct(x, mean, rho, b, base, noise, std, scaling, kept)
        if y is not None:
            return y
    check_key(op, key)
    _check(op, x, mean, b, base, scaling, dropout, key, stream, row0)
    check_choice(op, "scope", scope, SCOPES)
    check_choice(op, "std", std, STDS)
    check_rho(op, rho, mean, x)
    check_kept(op, kept, x)
    ids = group_ids(op, groups, x)
    rows_per_id = group_size(op, x, scope, rows_per_group)
    noise = Noise(key, stream, row0, rows_per_id, ids, dropout)
    flipped = scope != "none" or ids is not None
    kind = "flipped" if flipped else "shared"
    return adapter(
        x, mean, b, base, rho=rho, noise=noise, scaling=scaling, std=std, kind=kind, kept=kept
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
    kept: QuantizedActivations | None = None,
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
        kept: x in 8 bits (`quantize_activations`), which backward takes in place of x: less memory, and
            the same gradients up to rounding without bias. Ranks above 64 keep x.

    Returns:
        (..., m) in the dtype of base, or of x.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not fit.

    Source: "ScalaBL", arXiv 2506.21408.
    """
    op = "scaled_lora"
    _check(op, x, a, b, base, scaling)
    check_kept(op, kept, x)
    check_factor(op, "d", d, x)
    r = a.shape[0]
    if d.dim() not in (1, 2) or d.shape[-1] != r:
        raise ValueError(f"{op}: d must have shape ({r},) or (G, {r}), got {tuple(d.shape)}")
    if (d.dim() == 2) != (groups is not None):
        raise ValueError(
            f"{op}: groups must be given exactly when d is (G, r), got d of shape {tuple(d.shape)}"
        )
    middle = d.to(accumulate_dtype(x))
    if groups is not None:
        ids = group_ids(op, groups, x)
        middle = middle.index_select(0, ids)  # type: ignore[arg-type]
    return adapter(x, a, b, base, middle=middle, scaling=scaling, kind="scaled", kept=kept)


def core_lora(
    x: Tensor,
    a: Tensor,
    core: Tensor,
    b: Tensor,
    base: Tensor | None = None,
    *,
    scaling: float = 1.0,
    kept: QuantizedActivations | None = None,
) -> Tensor:
    """Low-rank adapter with a full matrix in rank space: base + scaling * ((x a^T) core^T) b^T.

    Args:
        x: (..., n).
        a: (r, n); Y^T in PoLAR's terms.
        core: (r, r); Theta.
        b: (m, r); X.
        base: (..., m) or None.
        scaling: constant factor.
        kept: x in 8 bits (`quantize_activations`), which backward takes in place of x: less memory, and
            the same gradients up to rounding without bias. Ranks above 64 keep x.

    Returns:
        (..., m) in the dtype of base, or of x.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not fit.

    Source: "PoLAR: Polar-Decomposed Low-Rank Adapter Representation", arXiv 2506.03133.
    """
    op = "core_lora"
    _check(op, x, a, b, base, scaling)
    check_kept(op, kept, x)
    check_factor(op, "core", core, x)
    r = a.shape[0]
    if tuple(core.shape) != (r, r):
        raise ValueError(f"{op}: core must have shape ({r}, {r}), got {tuple(core.shape)}")
    core = core.to(accumulate_dtype(x))
    return adapter(x, a, b, base, middle=core, scaling=scaling, kind="core", kept=kept)


def _check(
    op: str,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    base: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    key: Tensor | None = None,
    stream: int = 0,
    row0: int = 0,
) -> None:
    """Raise where the arguments of an adapter do not fit together."""
    check_tensor(op, "x", x)
    if x.dtype not in ACTIVATIONS:
        raise TypeError(
            f"{op}: x must be float32, bfloat16, float16 or float64, got {x.dtype}; convert it"
        )
    check_factor(op, "the first factor", a, x)
    check_factor(op, "b", b, x)
    if type(scaling) is not float or type(dropout) is not float:
        check_number(op, "scaling", scaling)
        check_number(op, "dropout", dropout)
    if type(stream) is not int or type(row0) is not int:
        check_integer(op, "stream", stream)
        check_integer(op, "row0", row0)
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
    if base is not None:
        check_tensor(op, "base", base)
        if base.shape[:-1] != x.shape[:-1] or base.shape[-1] != b.shape[0]:
            raise ValueError(
                f"{op}: base must have shape {(*x.shape[:-1], b.shape[0])}, got {tuple(base.shape)}"
            )
        check_same_device(op, "base", base, x)
        if base.dtype not in ACTIVATIONS or (base.dtype == torch.float64) != (
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
    if key is not None:
        check_same_device(op, "key", key, x)


def check_rho(op: str, rho: Tensor, mean: Tensor, x: Tensor) -> None:
    """Raise where `rho` is no deviation parameter of a factor with that mean."""
    check_factor(op, "rho", rho, x)
    r, n = mean.shape
    if rho.dim() != 2 or rho.shape[0] != r or rho.shape[1] not in (1, n):
        raise ValueError(
            f"{op}: rho must have shape (r, n) = ({r}, {n}) or ({r}, 1), got {tuple(rho.shape)}"
        )
