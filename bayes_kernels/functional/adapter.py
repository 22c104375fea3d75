"""Low-rank adapters: plain, with flipped-sign noise, with a diagonal or a matrix in rank space.

shrink (x to rank space) -> middle -> expand (rank space to the output, added to base), with the
derivatives of all three in one autograd function.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import _library, reference
from .._library import MAX_FUSED_RANK, fake
from ..random import check_key
from .arguments import (
    ACTIVATIONS,
    accumulate_dtype,
    autocast_input,
    check_choice,
    check_factor,
    check_integer,
    check_number,
    check_same_device,
    check_tensor,
    no_autocast,
    second_order,
    transformed,
)
from .noise import SCOPES, STDS, Noise, dense_noise, group_ids, group_size, keep_mask

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
    op = "lora"
    if type(dropout) is not float:
        check_number(op, "dropout", dropout)
    if key is None or dropout > 0.0:
        y = _infer(x, a, None, b, base, Noise(key, stream, row0, 1, None, dropout), "", scaling)
        if y is not None:
            return y
    _check(op, x, a, b, base, scaling, dropout, key, stream, row0)
    noise = Noise(key, stream, row0, dropout=dropout)
    return _adapter(x, a, b, base, noise=noise, scaling=scaling)


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

    Returns:
        (..., m) in the dtype of base, or of x.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices, scope, std or key do not fit.

    Sources: Wang et al., "BLoB", arXiv 2406.11675; Wen et al., "Flipout", arXiv 1803.04386.
    """
    op = "flipout_lora"
    if isinstance(x, Tensor) and isinstance(rho, Tensor) and groups is None and scope in _COUNTED:
        noise = Noise(key, stream, row0, group_size(op, x, scope, rows_per_group), None, dropout)
        y = _infer(x, mean, rho, b, base, noise, std, scaling)
        if y is not None:
            return y
    check_key(op, key)
    _check(op, x, mean, b, base, scaling, dropout, key, stream, row0)
    check_choice(op, "scope", scope, SCOPES)
    check_choice(op, "std", std, STDS)
    check_factor(op, "rho", rho, x)
    r, n = mean.shape
    if rho.dim() != 2 or rho.shape[0] != r or rho.shape[1] not in (1, n):
        raise ValueError(
            f"{op}: rho must have shape (r, n) = ({r}, {n}) or ({r}, 1), got {tuple(rho.shape)}"
        )
    ids = group_ids(op, groups, x)
    rows_per_id = group_size(op, x, scope, rows_per_group)
    noise = Noise(key, stream, row0, rows_per_id, ids, dropout)
    flipped = scope != "none" or ids is not None
    kind = "flipped" if flipped else "shared"
    return _adapter(x, mean, b, base, rho=rho, noise=noise, scaling=scaling, std=std, kind=kind)


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
    op = "scaled_lora"
    _check(op, x, a, b, base, scaling)
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
    return _adapter(x, a, b, base, middle=middle, scaling=scaling, kind="scaled")


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
    op = "core_lora"
    _check(op, x, a, b, base, scaling)
    check_factor(op, "core", core, x)
    r = a.shape[0]
    if tuple(core.shape) != (r, r):
        raise ValueError(f"{op}: core must have shape ({r}, {r}), got {tuple(core.shape)}")
    core = core.to(accumulate_dtype(x))
    return _adapter(x, a, b, base, middle=core, scaling=scaling, kind="core")


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


def _infer(
    x: Tensor,
    a: Tensor,
    rho: Tensor | None,
    b: Tensor,
    base: Tensor | None,
    noise: Noise,
    std: str,
    scaling: float,
) -> Tensor | None:
    """The output where nothing needs a gradient and the op takes the arguments as they are; else None.

    The checks of this module take longer than the kernels of one token. So the op checks first, and
    returns None where the caller has to convert an argument or to raise an error.
    """
    key = noise.key
    if (  # first what torch would refuse before the op sees it
        type(scaling) is not float
        or type(noise.dropout) is not float
        or type(noise.stream) is not int
        or type(noise.row0) is not int
        or type(std) is not str
        or torch.compiler.is_compiling()
        or torch._C._is_any_autocast_enabled()
        or not _is_plain(x)
        or not (base is None or _is_plain(base))
        or not (key is None or _is_plain(key))
        or not _is_stored_float(a)
        or not _is_stored_float(b)
        or not (rho is None or _is_stored_float(rho))
        or not _library.has_kernels(x)
        or _needs_gradient(x, a, rho, b, base)
        or transformed()
    ):
        return None
    return _library.ops.adapter_infer(x, a, rho, b, base, *noise, std, scaling)


def _is_plain(t: Tensor) -> bool:
    return type(t) is Tensor and not t.is_meta and not t.is_nested


def _is_stored_float(factor: Tensor) -> bool:
    return (
        isinstance(factor, Tensor)
        and factor.dtype == torch.float32
        and not factor.is_meta
        and not factor.is_nested
    )


def _adapter(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    base: Tensor | None,
    *,
    rho: Tensor | None = None,
    middle: Tensor | None = None,
    noise: Noise = Noise(),  # noqa: B008 - immutable
    scaling: float,
    std: str = "",
    kind: str = "plain",
) -> Tensor:
    """Checked arguments of any leading shape, on the path that takes them. `kind` as in `_Adapter`."""
    x = autocast_input(x)
    acc = accumulate_dtype(x)
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
    arguments = (rows, a, rho, middle, b, base_rows, noise, scaling, std, kind)
    if a.shape[0] > MAX_FUSED_RANK or not _library.has_kernels(x) or transformed():
        update = _update(rows, a, rho, middle, b, noise, scaling, std, kind)
        if base_rows is None:
            y = update.to(x.dtype)
        else:
            y = (base_rows.to(acc) + update).to(base_rows.dtype)
    elif _needs_gradient(x, a, rho, middle, b, base):
        y = _Adapter.apply(*arguments)
    else:
        y, _ = _shrink_expand(*arguments)
    return y if x.dim() == 2 else y.reshape(*shape[:-1], m)


def _update(
    x: Tensor,
    a: Tensor,
    rho: Tensor | None,
    middle: Tensor | None,
    b: Tensor,
    noise: Noise,
    scaling: float,
    std: str,
    kind: str,
) -> Tensor:
    """What is added to base, in PyTorch's own operations and on materialised noise.

    For ranks above 64, devices without kernels, second derivatives and torch.func.
    """
    with no_autocast(x):
        wide = x.to(accumulate_dtype(x))
        if rho is None:
            h = reference.dropped(wide, keep_mask(x, noise), noise.dropout) @ a.T
        else:
            drawn = dense_noise(x, a.shape[0], noise, signs=kind == "flipped")
            h = reference.flipout_rank(wide, a, rho, drawn, std, noise.dropout)
        if middle is not None:
            h = h @ middle.T if kind == "core" else h * middle
        return (h @ b.T) * scaling


def _needs_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd's function has to be called; inference is faster without it."""
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                return True
    return False


def _shrink_expand(
    x: Tensor,
    a: Tensor,
    rho: Tensor | None,
    middle: Tensor | None,
    b: Tensor,
    base: Tensor | None,
    noise: Noise,
    scaling: float,
    std: str,
    kind: str,
) -> tuple[Tensor, Tensor]:
    """The output and the rank-space activations before the middle."""
    ops = _library.ops
    if kind in _WHOLE:
        return ops.adapter_forward(x, a, rho, b, base, *noise, std, scaling)
    h = ops.adapter_shrink(x, _drawn_factor(a, rho, noise, std, kind), None, *noise)
    dtype = x.dtype if base is None else base.dtype
    return ops.adapter_expand(_apply_middle(h, middle, kind), b, base, scaling, dtype), h


# Kinds whose forward and backward passes are one op each.
_WHOLE = ("plain", "flipped")


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
        noise: Noise,
        *options: Any,
    ) -> Tensor:
        y, h = _shrink_expand(x, a, rho, middle, b, base, noise, *options)
        ctx.save_for_backward(x, a, rho, middle, b, h, noise.key, noise.ids)
        ctx.noise, ctx.options = noise._replace(key=None, ids=None), options
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        ops = _library.ops
        x, a, rho, middle, b, h, key, ids = ctx.saved_tensors
        noise = ctx.noise._replace(key=key, ids=ids)
        scaling, std, kind = ctx.options
        need_x, need_a, need_rho, need_middle, need_b, need_base = ctx.needs_input_grad[:6]
        dbase = dy if need_base else None
        if torch.is_grad_enabled() or transformed():
            found = second_order(
                lambda x, a, rho, middle, b: _update(
                    x, a, rho, middle, b, noise, scaling, std, kind
                ),
                (x, a, rho, middle, b),
                dy.to(h.dtype),
            )
            return *found, dbase, None, None, None, None
        if x.dtype == h.dtype:
            dy = dy.to(h.dtype)  # kernels of a half-precision dy round their operands
        if kind in _WHOLE:
            found = ops.adapter_backward(
                dy, x, a, rho, b, h, *noise, std, scaling, need_x, need_a, need_rho, need_b
            )
            needed = (need_x, need_a, need_rho, need_b)
            dx, da, drho, db = (g if n else None for g, n in zip(found, needed, strict=True))
            return dx, da, drho, None, db, dbase, None, None, None, None
        need_h = need_x or need_a or need_rho or need_middle
        dx = da = drho = dmiddle = db = None
        if need_h or need_b:
            dh, db = ops.adapter_expand_backward(
                dy, _apply_middle(h, middle, kind), b, scaling, need_h, need_b
            )
            if not need_b:
                db = None
        if kind == "core" and need_h:  # the middle is a factor of its own
            dh, found, _ = ops.adapter_shrink_backward(
                dh, h, middle, None, *Noise(), need_x or need_a, need_middle, False
            )
            dmiddle = found if need_middle else None
        elif need_middle:
            terms = dh * h
            dmiddle = terms.sum(0) if middle.dim() == 1 else terms
        if need_x or need_a or need_rho:
            if kind == "scaled":
                dh = dh * middle
            factor = _drawn_factor(a, rho, noise, std, kind)
            need_da = need_a or need_rho
            dx, da, _ = ops.adapter_shrink_backward(
                dh, x, factor, None, *noise, need_x, need_da, False
            )
            if need_rho:  # the gradient of A's mean is that of E as well
                drho = ops.scaled_normal_backward(da, rho, key, noise.stream, std)
            dx = dx if need_x else None
            da = da if need_a else None
        return dx, da, drho, dmiddle, db, dbase, None, None, None, None


def _drawn_factor(a: Tensor, rho: Tensor | None, noise: Noise, std: str, kind: str) -> Tensor:
    """The factor that shrink takes: of kind "shared" A with its noise."""
    if kind != "shared":
        return a
    return a + _library.ops.scaled_normal(rho, a.shape[1], noise.key, noise.stream, std)


def _apply_middle(h: Tensor, middle: Tensor | None, kind: str) -> Tensor:
    if kind == "scaled":
        return h * middle  # type: ignore[operator]
    if kind == "core":  # PyTorch's product differs in bits between thread counts
        return _library.ops.adapter_shrink(h, middle, None, *Noise())
    return h


# --- fake kernels: shapes and dtypes of the ops' results ---------------------------------------------


@fake("adapter_shrink")
def _(x: Tensor, a: Tensor, e: Tensor | None, *noise: object) -> Tensor:
    torch._check(x.dim() == 2 and a.dim() == 2, lambda: "adapter_shrink: x and a must be 2-D")
    return x.new_empty((x.shape[0], a.shape[0]), dtype=accumulate_dtype(x))


@fake("adapter_shrink_backward")
def _(
    dh: Tensor,
    x: Tensor,
    a: Tensor,
    e: Tensor | None,
    key: Tensor | None,
    stream: int,
    row0: int,
    rows_per_id: int,
    ids: Tensor | None,
    dropout: float,
    need_dx: bool,
    need_da: bool,
    need_de: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    need_de = need_de and e is not None
    return (
        x.new_empty(tuple(x.shape) if need_dx else (0, 0)),
        x.new_empty(tuple(a.shape) if need_da else (0, 0), dtype=accumulate_dtype(x)),
        x.new_empty(tuple(a.shape) if need_de else (0, 0), dtype=accumulate_dtype(x)),
    )


@fake("adapter_expand")
def _(h: Tensor, b: Tensor, base: Tensor | None, scaling: float, dtype: torch.dtype) -> Tensor:
    return h.new_empty((h.shape[0], b.shape[0]), dtype=dtype)


@fake("adapter_forward")
def _(
    x: Tensor,
    a: Tensor,
    rho: Tensor | None,
    b: Tensor,
    base: Tensor | None,
    key: Tensor | None,
    stream: int,
    row0: int,
    rows_per_id: int,
    ids: Tensor | None,
    dropout: float,
    std: str,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    dtype = x.dtype if base is None else base.dtype
    tokens = math.prod(x.shape[:-1])
    return (
        x.new_empty((*x.shape[:-1], b.shape[0]), dtype=dtype),
        x.new_empty((tokens, a.shape[0]), dtype=accumulate_dtype(x)),
    )


@fake("adapter_infer")
def _(
    x: Tensor,
    a: Tensor,
    rho: Tensor | None,
    b: Tensor,
    base: Tensor | None,
    *options: object,
) -> Tensor | None:
    dtype = x.dtype if base is None else base.dtype
    return x.new_empty((*x.shape[:-1], b.shape[0]), dtype=dtype)


@fake("adapter_backward")
def _(
    dy: Tensor,
    x: Tensor,
    a: Tensor,
    rho: Tensor | None,
    b: Tensor,
    h: Tensor,
    key: Tensor | None,
    stream: int,
    row0: int,
    rows_per_id: int,
    ids: Tensor | None,
    dropout: float,
    std: str,
    scaling: float,
    need_dx: bool,
    need_da: bool,
    need_drho: bool,
    need_db: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    nothing = (0, 0)
    drho = nothing if rho is None or not need_drho else tuple(rho.shape)
    return (
        x.new_empty(tuple(x.shape) if need_dx else nothing),
        x.new_empty(tuple(a.shape) if need_da else nothing, dtype=accumulate_dtype(x)),
        x.new_empty(drho, dtype=accumulate_dtype(x)),
        x.new_empty(tuple(b.shape) if need_db else nothing, dtype=accumulate_dtype(x)),
    )


@fake("adapter_expand_backward")
def _(
    dy: Tensor, h: Tensor, b: Tensor, scaling: float, need_dh: bool, need_db: bool
) -> tuple[Tensor, Tensor]:
    return (
        h.new_empty(tuple(h.shape) if need_dh else (0, 0)),
        h.new_empty(tuple(b.shape) if need_db else (0, 0)),
    )
