"""Low-rank adapters with a factor for each group of rows: draws of one posterior, or experts.

Draws are those of `bayes_kernels.random`: each of them depends on the key, the stream and its number
alone. A row that shares its draw with others costs what a row of plain LoRA costs.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _library, random, reference
from .._library import MAX_FUSED_RANK, fake
from ..random import check_key
from .activations import QuantizedActivations, check_kept, loaded_input, saved_input
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
from .noise import STDS, Noise, dense_noise, group_ids


class _Groups(NamedTuple):
    """The group of each row: ids (tokens,), or row // size; `number` groups."""

    ids: Tensor | None
    size: int
    number: int

    def numbers(self, x: Tensor) -> Tensor:
        """int64, one for each row of x (tokens, n)."""
        if self.ids is not None:
            return self.ids
        return torch.arange(x.shape[0], device=x.device) // self.size


class _Law(NamedTuple):
    """What the first factor of each group is.

    kind: "given"; "drawn" (the draws `draws` of mean and rho (r, n)); "flipped" (mean and rho (G, r, n),
    with signs for each row); "shared" (the same without signs).
    """

    kind: str
    draws: Tensor | None = None
    key: Tensor | None = None
    stream: int = 0
    std: str = ""
    antithetic: bool = False
    row0: int = 0
    ids: Tensor | None = None

    def signs(self) -> tuple[Tensor | None, int, int, Tensor | None]:
        """key, stream, first sign row and sign rows, as the ops take them."""
        if self.kind != "flipped":
            return None, 0, 0, None
        return self.key, self.stream, self.row0, self.ids


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
    kept: QuantizedActivations | None = None,
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
        kept: x in 8 bits (`quantize_activations`), which backward takes in place of x. Ranks above 64
            keep x.

    Returns:
        (..., m) in the dtype of base, or of x.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or groups do not fit.
    """
    op = "grouped_lora"
    found = _check_grouped(op, x, a, b, base, groups, rows_per_group, scaling)
    check_kept(op, kept, x)
    return _grouped(x, a, None, b, base, _Law("given"), found, scaling, kept)


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
    kept: QuantizedActivations | None = None,
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
        kept: x in 8 bits (`quantize_activations`), which backward takes in place of x. Ranks above 64
            keep x.

    Returns:
        (..., m) in the dtype of base, or of x.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices, groups, std or key do not fit.
    """
    op = "sampled_lora"
    check_tensor(op, "mean", mean)
    _check_law(op, mean, rho, draws, key, stream, std)
    factor = mean.expand(len(draws), *mean.shape)
    found = _check_grouped(op, x, factor, b, base, groups, rows_per_group, scaling)
    check_kept(op, kept, x)
    law = _Law("drawn", draws.to(torch.int64), key, stream, std, antithetic)
    return _grouped(x, mean, rho, b, base, law, found, scaling, kept)


def grouped_flipout_lora(
    x: Tensor,
    mean: Tensor,
    rho: Tensor,
    b: Tensor,
    base: Tensor | None = None,
    *,
    groups: Tensor | None = None,
    rows_per_group: int | None = None,
    scaling: float = 1.0,
    key: Tensor,
    stream: int = 0,
    scope: str = "token",
    sign_rows: Tensor | None = None,
    std: str = "square",
    row0: int = 0,
    kept: QuantizedActivations | None = None,
) -> Tensor:
    """`flipout_lora` with factors and noise for each group of rows: Bayesian adapters of experts.

    With E_g = std(rho_g) . eps_g, eps one tensor of shape (G, r, n) for all groups, and signs R_in, R_out
    as in `flipout_lora`:

        y = base + scaling * (x mean_g^T + ((x . R_in) E_g^T) . R_out) b_g^T

    Args:
        x: (..., n).
        mean: (G, r, n).
        rho: (G, r, n), or (G, r, 1) for a deviation that is constant along each row.
        b: (m, r), one for all groups, or (G, m, r).
        base: (..., m) or None.
        groups: int64 (...,), or any shape that broadcasts to it: the group (expert) of each row.
        rows_per_group: in place of groups: row t has group t // rows_per_group.
        scaling: multiplies mean path and noise.
        key: int64 tensor of two elements (`random.key`); refresh it before each micro-batch.
        stream: the layer's noise stream.
        scope: "token": signs of their own for every row; "none": one draw for the whole call.
        sign_rows: int64 (...,) or any shape that broadcasts to it: the sign row of each row, in place
            of its place in the batch. Give the token's number where rows were sorted by expert.
        std: "square" (rho^2), "softplus" or "direct".
        row0: sign row of the first row, for batches that are split.
        kept: x in 8 bits (`quantize_activations`), which backward takes in place of x. Ranks above 64
            keep x.

    Returns:
        (..., m) in the dtype of base, or of x.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices, groups, scope, std or key do not fit.

    Sources: Wang et al., "BLoB", arXiv 2406.11675; Wen et al., "Flipout", arXiv 1803.04386.
    """
    op = "grouped_flipout_lora"
    found = _check_grouped(op, x, mean, b, base, groups, rows_per_group, scaling)
    check_key(op, key)
    check_same_device(op, "key", key, x)
    check_integer(op, "stream", stream)
    check_integer(op, "row0", row0)
    check_choice(op, "scope", scope, ("token", "none"))
    check_choice(op, "std", std, STDS)
    check_factor(op, "rho", rho, x)
    if rho.shape not in (mean.shape, (*mean.shape[:2], 1)):
        raise ValueError(
            f"{op}: rho must have shape {tuple(mean.shape)} or {(*mean.shape[:2], 1)}, got "
            f"{tuple(rho.shape)}"
        )
    ids = group_ids(op, sign_rows, x)
    kind = "shared" if scope == "none" and ids is None else "flipped"
    check_kept(op, kept, x)
    law = _Law(kind, None, key, stream, std, row0=row0, ids=ids)
    return _grouped(x, mean, rho, b, base, law, found, scaling, kept)


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
) -> _Groups:
    """The groups of the rows; raises unless the arguments fit each other."""
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
        return _Groups(None, rows_per_group, most)
    ids = group_ids(op, groups, x)
    assert ids is not None
    if ids.is_cpu and tokens > 0 and not torch.compiler.is_compiling() and not transformed():
        least, largest = (v.item() for v in torch.aminmax(ids))
        if least < 0 or largest >= most:
            raise ValueError(
                f"{op}: groups must lie in [0, {most}), got numbers from {least} to {largest}"
            )
    return _Groups(ids, 1, most)


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
    x: Tensor,
    mean: Tensor,
    rho: Tensor | None,
    b: Tensor,
    base: Tensor | None,
    law: _Law,
    groups: _Groups,
    scaling: float,
    kept: QuantizedActivations | None,
) -> Tensor:
    """The output for checked arguments of any leading shape, on the path that takes them."""
    x = autocast_input(x)
    acc = accumulate_dtype(x)
    mean, b = mean.to(acc), b.to(acc)
    rho = rho if rho is None else rho.to(acc)
    m, shape = b.shape[-2], x.shape
    rows = x if x.dim() == 2 else x.reshape(math.prod(shape[:-1]), shape[-1])
    base_rows = base if base is None or base.dim() == 2 else base.reshape(len(rows), m)
    if b.shape[-1] > MAX_FUSED_RANK or not _library.has_kernels(x) or transformed():
        y = _update(rows, mean, rho, b, law, groups, scaling)
        y = y.to(x.dtype) if base_rows is None else (base_rows.to(acc) + y).to(base_rows.dtype)
    else:
        plan = None
        if groups.ids is not None:
            plan = _library.ops.group_rows(groups.ids, groups.number)
        inputs = (rows, mean, rho, b, base_rows)
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
            y = _Grouped.apply(*inputs, law, groups, plan, float(scaling), kept and kept.by_row())
        else:
            y, _ = _forward(*inputs, law, groups, plan, float(scaling))
    return y if x.dim() == 2 else y.reshape(*shape[:-1], m)


def _update(
    x: Tensor,
    mean: Tensor,
    rho: Tensor | None,
    b: Tensor,
    law: _Law,
    groups: _Groups,
    scaling: float,
) -> Tensor:
    """What is added to base, in PyTorch's own operations and on materialised noise.

    For ranks above 64, devices without kernels, second derivatives and torch.func.
    """
    with no_autocast(x):
        wide, ids = x.to(accumulate_dtype(x)), groups.numbers(x)
        if rho is None:
            return reference.grouped_lora(wide, mean, b, groups=ids, scaling=scaling)
        assert law.key is not None
        if law.kind == "drawn":
            assert law.draws is not None
            a = _defined_draws(mean, rho, law.draws, law.key, law.stream, law.std, law.antithetic)
            return reference.grouped_lora(wide, a, b, groups=ids, scaling=scaling)
        count, r, n = mean.shape
        where = Noise(law.key, law.stream, law.row0, 1, law.ids)
        drawn = dense_noise(x, r, where, signs=law.kind == "flipped")
        made = reference if transformed() else random
        drawn.eps = made.normal(law.key, (count, r, n), stream=law.stream).to(wide.dtype)
        return reference.grouped_flipout_lora(
            wide, mean, rho, b, groups=ids, scaling=scaling, noise=drawn, std=law.std
        )


def _factors(mean: Tensor, rho: Tensor | None, law: _Law) -> tuple[Tensor, Tensor | None]:
    """The factors (G, r, n) that the ops take, and the noise beside them."""
    if rho is None:
        return mean, None
    ops = _library.ops
    if law.kind == "drawn":
        a = ops.gaussian_draws(mean, rho, law.draws, law.key, law.stream, law.std, law.antithetic)
        return a, None
    e = ops.scaled_normal(rho.flatten(0, 1), mean.shape[2], law.key, law.stream, law.std)
    e = e.view(mean.shape)
    return (mean, e) if law.kind == "flipped" else (mean + e, None)


def _forward(
    x: Tensor,
    mean: Tensor,
    rho: Tensor | None,
    b: Tensor,
    base: Tensor | None,
    law: _Law,
    groups: _Groups,
    plan: Tensor | None,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    """The output and the rank-space activations."""
    if law.kind == "drawn":
        return _library.ops.sampled_forward(
            x, mean, rho, b, base, law.draws, plan, groups.size, law.key, law.stream, law.std,
            law.antithetic, scaling,
        )  # fmt: skip
    a, e = _factors(mean, rho, law)
    return _library.ops.grouped_forward(x, a, e, b, base, plan, groups.size, *law.signs(), scaling)


class _Grouped(torch.autograd.Function):
    """One op forward and one backward, on factors that are made again in the backward pass."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Tensor,
        mean: Tensor,
        rho: Tensor | None,
        b: Tensor,
        base: Tensor | None,
        law: _Law,
        groups: _Groups,
        plan: Tensor | None,
        scaling: float,
        kept: QuantizedActivations | None,
    ) -> Tensor:
        y, h = _forward(x, mean, rho, b, base, law, groups, plan, scaling)
        tensors = (mean, rho, b, h, plan, groups.ids, law.draws, law.key, law.ids)
        ctx.save_for_backward(*saved_input(x, kept), *tensors)
        ctx.dtype = x.dtype
        ctx.law = law._replace(draws=None, key=None, ids=None)
        ctx.groups, ctx.scaling = groups._replace(ids=None), scaling
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        *saved, mean, rho, b, h, plan, numbers, draws, key, ids = ctx.saved_tensors
        again = torch.is_grad_enabled() or transformed()
        x = loaded_input("adapter", saved, ctx.dtype, again)
        law = ctx.law._replace(draws=draws, key=key, ids=ids)
        groups = ctx.groups._replace(ids=numbers)
        need_x, need_mean, need_rho, need_b, need_base = ctx.needs_input_grad[:5]
        rest = (dy if need_base else None, *[None] * 5)
        if again:
            found = second_order(
                lambda x, mean, rho, b: _update(x, mean, rho, b, law, groups, ctx.scaling),
                (x, mean, rho, b),
                dy.to(h.dtype),
            )
            return *found, *rest
        if x.dtype == h.dtype != dy.dtype:
            dy = dy.to(h.dtype)  # kernels of a half-precision dy round their operands
        ops = _library.ops
        a, e = _factors(mean, rho, law)
        flipped = law.kind == "flipped"
        need_a = need_mean or (need_rho and not flipped)
        dx, da, de, db = ops.grouped_backward(
            dy, x, a, e, b, h, plan, groups.size, *law.signs(), ctx.scaling,
            need_x, need_a, need_rho and flipped, need_b,
        )  # fmt: skip
        dmean, drho = da, None
        if law.kind == "drawn" and need_a:
            dmean, drho = ops.gaussian_draws_backward(
                da, rho, draws, key, law.stream, law.std, law.antithetic, need_mean, need_rho
            )
        elif rho is not None and need_rho:
            drho = ops.scaled_normal_backward(
                (de if flipped else da).flatten(0, 1), rho.flatten(0, 1), key, law.stream, law.std
            ).view(rho.shape)
        return (
            dx if need_x else None,
            dmean if need_mean else None,
            drho if need_rho else None,
            db if need_b else None,
            *rest,
        )


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


@fake("group_rows")
def _(ids: Tensor, groups: int) -> Tensor:
    return ids.new_empty((groups + 1 + ids.shape[0],), dtype=torch.int32)


@fake("grouped_forward")
def _(
    x: Tensor, a: Tensor, e: Tensor | None, b: Tensor, base: Tensor | None, *options: object
) -> tuple[Tensor, Tensor]:
    tokens = x.shape[0]
    return (
        x.new_empty((tokens, b.shape[-2]), dtype=x.dtype if base is None else base.dtype),
        x.new_empty((tokens, a.shape[1]), dtype=accumulate_dtype(x)),
    )


@fake("sampled_forward")
def _(
    x: Tensor, mean: Tensor, rho: Tensor, b: Tensor, base: Tensor | None, *options: object
) -> tuple[Tensor, Tensor]:
    tokens = x.shape[0]
    return (
        x.new_empty((tokens, b.shape[0]), dtype=x.dtype if base is None else base.dtype),
        x.new_empty((tokens, mean.shape[0]), dtype=accumulate_dtype(x)),
    )


@fake("grouped_backward")
def _(
    dy: Tensor,
    x: Tensor,
    a: Tensor,
    e: Tensor | None,
    b: Tensor,
    h: Tensor,
    plan: Tensor | None,
    rows_per_group: int,
    key: Tensor | None,
    stream: int,
    row0: int,
    ids: Tensor | None,
    scaling: float,
    need_dx: bool,
    need_da: bool,
    need_de: bool,
    need_db: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def made(needed: bool, like: Tensor) -> Tensor:
        shape = tuple(like.shape) if needed else (0,) * like.dim()
        return like.new_empty(shape)

    need_de = need_de and e is not None
    return made(need_dx, x), made(need_da, a), made(need_de, a), made(need_db, b)
