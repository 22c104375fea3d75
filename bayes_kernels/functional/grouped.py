"""Low-rank adapters with a factor for each group of rows: draws of one posterior, or experts.

Draws are those of `bayes_kernels.random`: each of them depends on the key, the stream and its number
alone. A row that shares its draw with others costs what a row of plain LoRA costs.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import _library, reference
from .._library import fake
from ..random import check_key
from .adapter import _check
from .arguments import (
    accumulate_dtype,
    autocast_input,
    check_choice,
    check_factor,
    check_integer,
    check_same_device,
    check_tensor,
    no_autocast,
    second_order,
    transformed,
)
from .noise import STDS, group_ids


def gaussian_draws(
    mean: Tensor,
    rho: Tensor,
    draws: Tensor,
    *,
    key: Tensor,
    stream: int = 0,
    std: str = "square",
    antithetic: bool = True,
) -> Tensor:
    """Numbered draws of a Gaussian factor: mean + s std(rho) . eps.

    Antithetic draws 2p and 2p + 1 are a pair: both have eps of pair p, with s = 1 and s = -1.
    Independent draws have eps of their own, and s = 1. Differentiable in mean and rho.

    Args:
        mean: (r, n).
        rho: (r, n), or (r, 1) for a deviation that is constant along each row.
        draws: int64 (D,), the number of each draw: any integers, in any order.
        key: int64 tensor of two elements (`random.key`).
        stream: the layer's noise stream.
        std: "square" (rho^2), "softplus" or "direct".
        antithetic: draws come in pairs.

    Returns:
        (D, r, n), fp32 (fp64 where mean is fp64).

    Raises:
        ValueError, TypeError: shapes, dtypes, devices, std or key do not fit.
    """
    op = "gaussian_draws"
    check_tensor(op, "mean", mean)
    _check_law(op, mean, rho, draws, key, stream, std)
    acc = accumulate_dtype(mean)
    return _drawn(mean.to(acc), rho.to(acc), draws, key, stream, std, antithetic)


def grouped_lora(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    base: Tensor | None = None,
    *,
    groups: Tensor | None = None,
    rows_per_group: int | None = None,
    scaling: float = 1.0,
) -> Tensor:
    """Low-rank adapter with factors for each group of rows: base + scaling * (x a[g]^T) b[g]^T.

    Give `groups` or, for successive groups of one size, `rows_per_group`: it needs no sorting. Rows in
    the order of their groups are the fastest.

    Args:
        x: (..., n).
        a: (G, r, n).
        b: (m, r), one for all groups, or (G, m, r).
        base: (..., m) or None.
        groups: int64 (...,), or any shape that broadcasts to it: the group of each row, in [0, G).
            Rows with another number raise an error on the CPU, and have NaN as their result on a GPU.
        rows_per_group: row t (in the flattened batch) has group t // rows_per_group.
        scaling: constant factor.

    Returns:
        (..., m) in the dtype of base, or of x.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or groups do not fit.
    """
    op = "grouped_lora"
    ids = _check_grouped(op, x, a, b, base, groups, rows_per_group, scaling)
    return _grouped(x, a, b, base, ids, scaling)


def sampled_lora(
    x: Tensor,
    mean: Tensor,
    rho: Tensor,
    b: Tensor,
    base: Tensor | None = None,
    *,
    draws: Tensor,
    groups: Tensor | None = None,
    rows_per_group: int | None = None,
    key: Tensor,
    stream: int = 0,
    std: str = "square",
    antithetic: bool = True,
    scaling: float = 1.0,
) -> Tensor:
    """Low-rank adapter under numbered draws of its first factor, one draw for each group of rows.

    `grouped_lora` of `gaussian_draws`: base + scaling * (x A_g^T) b^T with A_g draw draws[g]. One
    product for each row, where flipped signs need two. Differentiable in all tensors.

    Args:
        x: (..., n).
        mean: (r, n).
        rho: (r, n) or (r, 1).
        b: (m, r).
        base: (..., m) or None.
        draws: int64 (D,), the numbers of the draws.
        groups: int64 (...,), or any shape that broadcasts to it: the index in `draws` of each row.
        rows_per_group: in place of groups: row t has draw draws[t // rows_per_group].
        key: int64 tensor of two elements (`random.key`).
        stream: the layer's noise stream.
        std: "square" (rho^2), "softplus" or "direct".
        antithetic: draws come in pairs, see `gaussian_draws`.
        scaling: constant factor.

    Returns:
        (..., m) in the dtype of base, or of x.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices, groups, std or key do not fit.
    """
    op = "sampled_lora"
    check_tensor(op, "mean", mean)
    _check_law(op, mean, rho, draws, key, stream, std)
    factor = mean.expand(len(draws), *mean.shape)
    ids = _check_grouped(op, x, factor, b, base, groups, rows_per_group, scaling)
    check_same_device(op, "key", key, x)
    acc = accumulate_dtype(x)
    a = _drawn(mean.to(acc), rho.to(acc), draws, key, stream, std, antithetic)
    return _grouped(x, a, b, base, ids, scaling)


def _check_law(
    op: str, mean: Tensor, rho: Tensor, draws: Tensor, key: Tensor, stream: int, std: str
) -> None:
    check_key(op, key)
    check_factor(op, "mean", mean, key)
    check_factor(op, "rho", rho, mean)
    check_tensor(op, "draws", draws)
    check_same_device(op, "draws", draws, mean)
    check_integer(op, "stream", stream)
    check_choice(op, "std", std, STDS)
    if mean.dim() != 2 or mean.shape[0] < 1:
        raise ValueError(f"{op}: mean must have shape (r, n), got {tuple(mean.shape)}")
    r, n = mean.shape
    if rho.dim() != 2 or rho.shape[0] != r or rho.shape[1] not in (1, n):
        raise ValueError(
            f"{op}: rho must have shape (r, n) = ({r}, {n}) or ({r}, 1), got {tuple(rho.shape)}"
        )
    if draws.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{op}: draws must be int64, got {draws.dtype}; convert it")
    if draws.dim() != 1:
        raise ValueError(f"{op}: draws must have shape (D,), got {tuple(draws.shape)}")


def _check_grouped(
    op: str,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    base: Tensor | None,
    groups: Tensor | None,
    rows_per_group: int | None,
    scaling: float,
) -> Tensor:
    """Raise unless the arguments fit each other. The group of each row, int64 (tokens,)."""
    check_tensor(op, "x", x)
    check_factor(op, "the first factor", a, x)
    check_factor(op, "b", b, x)
    if a.dim() != 3 or a.shape[0] < 1 or b.dim() not in (2, 3):
        raise ValueError(
            f"{op}: the factors must have shape (G, r, n) with a group at least, and (m, r) or "
            f"(G, m, r), got {tuple(a.shape)} and {tuple(b.shape)}"
        )
    if b.dim() == 3 and b.shape[0] != a.shape[0]:
        raise ValueError(
            f"{op}: b must have {a.shape[0]} groups as the first factor, got {b.shape[0]}"
        )
    _check(op, x, a[0], b if b.dim() == 2 else b[0], base, scaling)
    if (groups is None) == (rows_per_group is None):
        raise ValueError(f"{op}: groups or rows_per_group must be given, and not both")
    tokens, most = math.prod(x.shape[:-1]), a.shape[0]
    if rows_per_group is not None:
        check_integer(op, "rows_per_group", rows_per_group)
        if rows_per_group < 1 or tokens > most * rows_per_group:
            raise ValueError(
                f"{op}: rows_per_group must be at least 1 and cover {tokens} rows with {most} groups, "
                f"got {rows_per_group}"
            )
        return torch.arange(tokens, device=x.device) // rows_per_group
    ids = group_ids(op, groups, x)
    assert ids is not None
    if ids.is_cpu and tokens > 0 and not torch.compiler.is_compiling():
        least, largest = (v.item() for v in torch.aminmax(ids))
        if least < 0 or largest >= most:
            raise ValueError(
                f"{op}: groups must lie in [0, {most}), got numbers from {least} to {largest}"
            )
    return ids


def _drawn(mean: Tensor, rho: Tensor, draws: Tensor, *law: Any) -> Tensor:
    """Draws of factors in the accumulate dtype; law: key, stream, std, antithetic."""
    if not _library.has_kernels(mean) or transformed():
        return _defined_draws(mean, rho, draws, *law)
    draws = draws.to(torch.int64)
    if torch.is_grad_enabled() and (mean.requires_grad or rho.requires_grad):
        return _Draws.apply(mean, rho, draws, *law)
    return _library.ops.gaussian_draws(mean, rho, draws, *law)


def _defined_draws(
    mean: Tensor, rho: Tensor, draws: Tensor, key: Tensor, stream: int, std: str, antithetic: bool
) -> Tensor:
    size = tuple(mean.shape)
    eps = reference.draw_normals(key, draws, size, stream=stream, antithetic=antithetic)
    return reference.gaussian_draws(mean, rho, eps.to(mean.dtype), std=std)


class _Draws(torch.autograd.Function):
    """Draws and their derivatives; the normals are made again in the backward pass."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, mean: Tensor, rho: Tensor, draws: Tensor, key: Tensor, *law: Any
    ) -> Tensor:
        ctx.save_for_backward(mean, rho, draws, key)
        ctx.law = law
        return _library.ops.gaussian_draws(mean, rho, draws, key, *law)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        mean, rho, draws, key = ctx.saved_tensors
        rest = (None,) * (2 + len(ctx.law))
        if torch.is_grad_enabled() or transformed():
            definition = lambda mean, rho: _defined_draws(mean, rho, draws, key, *ctx.law)  # noqa: E731
            return *second_order(definition, (mean, rho), grad), *rest
        need_mean, need_rho = ctx.needs_input_grad[:2]
        dmean, drho = _library.ops.gaussian_draws_backward(
            grad, rho, draws, key, *ctx.law, need_mean, need_rho
        )
        return dmean if need_mean else None, drho if need_rho else None, *rest


def _grouped(
    x: Tensor, a: Tensor, b: Tensor, base: Tensor | None, ids: Tensor, scaling: float
) -> Tensor:
    """Checked arguments of any leading shape."""
    x = autocast_input(x)
    acc = accumulate_dtype(x)
    rows = x.reshape(-1, x.shape[-1]).to(acc)
    with no_autocast(x):
        y = reference.grouped_lora(rows, a.to(acc), b.to(acc), groups=ids, scaling=scaling)
    y = y.reshape(*x.shape[:-1], b.shape[-2])
    return y.to(x.dtype) if base is None else (base.to(acc) + y).to(base.dtype)


# --- fake kernels: shapes and dtypes of the ops' results ---------------------------------------------


@fake("gaussian_draws")
def _(mean: Tensor, rho: Tensor, draws: Tensor, *law: object) -> Tensor:
    return mean.new_empty((draws.shape[0], *mean.shape))


@fake("gaussian_draws_backward")
def _(
    grad: Tensor,
    rho: Tensor,
    draws: Tensor,
    key: Tensor,
    stream: int,
    std: str,
    antithetic: bool,
    need_mean: bool,
    need_rho: bool,
) -> tuple[Tensor, Tensor]:
    return (
        grad.new_empty(tuple(grad.shape[1:]) if need_mean else (0, 0)),
        grad.new_empty(tuple(rho.shape) if need_rho else (0, 0)),
    )
