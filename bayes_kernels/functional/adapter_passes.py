"""The passes of an adapter: one op forward and one backward where that is possible, their derivatives.

Arguments are those of `functional.adapter`, which has the public functions.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import _library, reference
from .._library import MAX_FUSED_RANK, fake
from .activations import QuantizedActivations, fits, loaded_input, saved_input
from .arguments import (
    accumulate_dtype,
    autocast_input,
    no_autocast,
    second_order,
    transformed,
)
from .noise import Noise, dense_noise, keep_mask


def direct(
    x: Tensor,
    a: Tensor,
    rho: Tensor | None,
    b: Tensor,
    base: Tensor | None,
    noise: Noise,
    std: str,
    scaling: float,
    kept: QuantizedActivations | None = None,
) -> Tensor | None:
    """The output where the ops take the arguments as they are; else None.

    The full checks take longer than the kernels of a few tokens. So the ops check first, and this returns
    None where the caller has to convert an argument or to raise an error.
    """
    key = noise.key
    if (  # first what torch would refuse before the op sees it
        type(scaling) is not float
        or type(noise.dropout) is not float
        or type(noise.stream) is not int
        or type(noise.row0) is not int
        or type(std) is not str
        or torch.compiler.is_compiling()
        or not is_plain(x)
        or not (base is None or is_plain(base))
        or not (key is None or is_plain(key))
        or not is_stored_float(a)
        or not is_stored_float(b)
        or not (rho is None or is_stored_float(rho))
        or not (kept is None or fits(kept, x))
        or not _library.has_kernels(x)
        or transformed()
    ):
        return None
    x = autocast_input(x)
    if needs_gradient(x, a, rho, b, base):
        return _Whole.apply(x, a, rho, b, base, "adapter_train", noise, std, scaling, kept)
    return _library.ops.adapter_infer(x, a, rho, b, base, *noise, std, scaling)


def is_plain(t: Tensor) -> bool:
    return type(t) is Tensor and not t.is_meta and not t.is_nested


def is_stored_float(factor: Tensor) -> bool:
    return (
        isinstance(factor, Tensor)
        and factor.dtype == torch.float32
        and not factor.is_meta
        and not factor.is_nested
    )


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd's function has to be called; inference is faster without it."""
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                return True
    return False


def adapter(
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
    kept: QuantizedActivations | None = None,
) -> Tensor:
    """The output for checked arguments, on the path that takes them.

    Args:
        kind: "plain"; "flipped" (noise with signs); "shared" (one draw for all rows: a + E is an
            ordinary factor); "scaled" (middle (r,) or (tokens, r)); "core" (middle (r, r)).
        kept: what backward has of x, in place of x.
    """
    x = autocast_input(x)
    acc = accumulate_dtype(x)
    if a.dtype != acc:
        a = a.to(acc)
    if b.dtype != acc:
        b = b.to(acc)
    if rho is not None and rho.dtype != acc:
        rho = rho.to(acc)
    if a.shape[0] > MAX_FUSED_RANK or not _library.has_kernels(x) or transformed():
        update = update_of(x, a, rho, middle, b, noise, scaling, std, kind)
        return update.to(x.dtype) if base is None else (base.to(acc) + update).to(base.dtype)
    graph = needs_gradient(x, a, rho, middle, b, base)
    if kind in _WHOLE:
        if graph:
            return _Whole.apply(x, a, rho, b, base, "adapter_forward", noise, std, scaling, kept)
        return _library.ops.adapter_forward(x, a, rho, b, base, *noise, std, scaling)[0]
    m, shape = b.shape[0], x.shape
    tokens = math.prod(shape[:-1])
    rows = x if x.dim() == 2 else x.reshape(tokens, shape[-1])
    base_rows = base if base is None or base.dim() == 2 else base.reshape(tokens, m)
    arguments = (rows, a, rho, middle, b, base_rows, noise, scaling, std, kind)
    kept = kept and kept.by_row()
    y = _Parts.apply(*arguments, kept) if graph else _shrink_expand(*arguments)[0]
    return y if x.dim() == 2 else y.reshape(*shape[:-1], m)


def update_of(
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
        rows = x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
        wide = rows.to(accumulate_dtype(x))
        if rho is None:
            h = reference.dropped(wide, keep_mask(x, noise), noise.dropout) @ a.T
        else:
            drawn = dense_noise(x, a.shape[0], noise, signs=kind == "flipped")
            h = reference.flipout_rank(wide, a, rho, drawn, std, noise.dropout)
        if middle is not None:
            h = h @ middle.T if kind == "core" else h * middle
        return ((h @ b.T) * scaling).reshape(*x.shape[:-1], b.shape[0])


# Kinds whose forward and backward passes are one op each.
_WHOLE = ("plain", "flipped")


class _Whole(torch.autograd.Function):
    """Kinds "plain" and "flipped": one op forward and one backward, for any leading shape.

    `op` is "adapter_forward", or "adapter_train": then the result is None for arguments that the op
    does not take.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Tensor,
        a: Tensor,
        rho: Tensor | None,
        b: Tensor,
        base: Tensor | None,
        op: str,
        noise: Noise,
        std: str,
        scaling: float,
        kept: QuantizedActivations | None,
    ) -> Tensor | None:
        y, h = getattr(_library.ops, op)(x, a, rho, b, base, *noise, std, scaling)
        if y is not None:
            key, stream, row0, rows_per_id, ids, dropout = noise
            ctx.save_for_backward(*saved_input(x, kept), a, rho, b, h, key, ids)
            ctx.counted, ctx.rest = (stream, row0, rows_per_id), (dropout, std, scaling)
            ctx.dtype = x.dtype
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        *saved, a, rho, b, h, key, ids = ctx.saved_tensors
        dropout, std, scaling = ctx.rest
        again = torch.is_grad_enabled() or transformed()
        x = loaded_input("adapter", saved, ctx.dtype, again)
        need_x, need_a, need_rho, need_b, need_base = ctx.needs_input_grad[:5]
        dbase = dy if need_base else None
        dx: Tensor | None
        if again:
            stream, row0, rows_per_id = ctx.counted
            noise = Noise(key, stream, row0, rows_per_id, ids, dropout)
            kind = "plain" if rho is None else "flipped"
            dx, da, drho, db = second_order(
                lambda x, a, rho, b: update_of(x, a, rho, None, b, noise, scaling, std, kind),
                (x, a, rho, b),
                dy.to(h.dtype),
            )
        else:
            if x.dtype == h.dtype != dy.dtype:
                dy = dy.to(h.dtype)  # kernels of a half-precision dy round their operands
            dx, da, drho, db = _library.ops.adapter_backward(
                dy, x, a, rho, b, h, key, *ctx.counted, ids, dropout, std, scaling,
                need_x, need_a, need_rho, need_b,
            )  # fmt: skip
        return (
            dx if need_x else None,
            da if need_a else None,
            drho if need_rho else None,
            db if need_b else None,
            dbase,
            *[None] * 5,
        )


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
    factor = _drawn_factor(a, rho, noise, std, kind)
    if middle is None:
        return ops.adapter_forward(x, factor, None, b, base, *noise, std, scaling)
    h = ops.adapter_shrink(x, factor, None, *noise)
    dtype = x.dtype if base is None else base.dtype
    return ops.adapter_expand(_apply_middle(h, middle, kind), b, base, scaling, dtype), h


class _Parts(torch.autograd.Function):
    """Other kinds, of rows (tokens, n): shrink -> middle -> expand, and the derivatives of all three."""

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
        scaling: float,
        std: str,
        kind: str,
        kept: QuantizedActivations | None,
    ) -> Tensor:
        options = (scaling, std, kind)
        y, h = _shrink_expand(x, a, rho, middle, b, base, noise, *options)
        ctx.save_for_backward(*saved_input(x, kept), a, rho, middle, b, h, noise.key, noise.ids)
        ctx.noise, ctx.options = noise._replace(key=None, ids=None), options
        ctx.dtype = x.dtype
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        ops = _library.ops
        *saved, a, rho, middle, b, h, key, ids = ctx.saved_tensors
        noise = ctx.noise._replace(key=key, ids=ids)
        scaling, std, kind = ctx.options
        need_x, need_a, need_rho, need_middle, need_b, need_base = ctx.needs_input_grad[:6]
        dbase = dy if need_base else None
        again = torch.is_grad_enabled() or transformed()
        x = loaded_input("adapter", saved, ctx.dtype, again)
        if again:
            found = second_order(
                lambda x, a, rho, middle, b: update_of(
                    x, a, rho, middle, b, noise, scaling, std, kind
                ),
                (x, a, rho, middle, b),
                dy.to(h.dtype),
            )
            return *found, dbase, *[None] * 5
        if x.dtype == h.dtype:
            dy = dy.to(h.dtype)  # kernels of a half-precision dy round their operands
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
        return dx, da, drho, dmiddle, db, dbase, *[None] * 5


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
@fake("adapter_train")
def _(
    x: Tensor,
    a: Tensor,
    rho: Tensor | None,
    b: Tensor,
    base: Tensor | None,
    *options: object,
) -> tuple[Tensor, Tensor]:
    return (
        x.new_empty((*x.shape[:-1], b.shape[0]), dtype=x.dtype if base is None else base.dtype),
        x.new_empty((math.prod(x.shape[:-1]), a.shape[0]), dtype=accumulate_dtype(x)),
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
