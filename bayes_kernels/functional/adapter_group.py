"""Several adapters of one input: the projections q, k and v of an attention, gate and up of an MLP.

The results are those of `lora` and `flipout_lora` for each of them, bit for bit. One op does all: on a GPU
one launch for up to 16 tokens and 8 adapters, on the CPU one pass over x where ranks are equal. Beyond 16
tokens a GPU runs the kernels of the adapters one after another, in one call; so it does where the sums of
a block outgrow its shared memory (at 16 tokens and rank 64 from 28,673 columns on).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _library
from .._library import MAX_FUSED_RANK, fake
from ..random import check_key
from .activations import QuantizedActivations, check_kept, fits, loaded_input, saved_input
from .adapter import _check, check_rho
from .adapter_passes import (
    adapter,
    is_plain,
    is_stored_float,
    needs_gradient,
    update_of,
)
from .arguments import (
    accumulate_dtype,
    autocast_input,
    check_choice,
    second_order,
    transformed,
)
from .noise import SCOPES, STDS, Noise, group_ids, group_size


def lora_group(
    x: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    base: Sequence[Tensor] | None = None,
    *,
    scaling: float | Sequence[float] = 1.0,
    dropout: float = 0.0,
    key: Tensor | None = None,
    streams: Sequence[int] | None = None,
    row0: int = 0,
    kept: QuantizedActivations | None = None,
) -> tuple[Tensor, ...]:
    """`lora` for several adapters that share x: base_i + scaling_i * (dropout(x) a_i^T) b_i^T.

    Args:
        x: (..., n).
        a: (r_i, n) for each adapter.
        b: (m_i, r_i) likewise.
        base: (..., m_i) likewise, or None for all.
        scaling: one constant, or one for each.
        dropout: probability in [0, 1) of dropping an element of x, drawn from the key.
        key: noise key; needed with dropout.
        streams: the adapters' noise streams: each has a mask of its own. None: one mask for all.
        row0: index of the first token of x, for batches that are split.
        kept: x in 8 bits (`quantize_activations`), which backward takes in place of x, for all adapters
            but those of ranks above 64, which keep x.

    Returns:
        (..., m_i) for each adapter.

    Raises:
        ValueError, TypeError: lists of different lengths; shapes, dtypes or devices do not fit.

    Cost: x is read once from memory; memory for the backward pass is x (or `kept`) once and (T, r_i) of
    each.

    Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685.
    """
    op = "lora_group"
    lists = _lists(op, scaling, a=a, b=b, base=base, streams=streams)
    noise = Noise(key if dropout != 0.0 else None, 0, row0, 1, None, dropout)
    arguments: tuple[Any, ...]
    arguments = (lists["a"], [], lists["b"], lists["base"], noise, lists["streams"], "")
    ys = _direct(x, *arguments, lists["scaling"], kept)
    if ys is not None:
        return ys
    for one in range(len(lists["a"])):
        a1, b1, base1, scale = _of(lists, one)
        _check(op, x, a1, b1, base1, scale, dropout, key, lists["streams"][one], row0)
    check_kept(op, kept, x)
    return _group(x, *arguments, lists["scaling"], "plain", kept)


def flipout_lora_group(
    x: Tensor,
    mean: Sequence[Tensor],
    rho: Sequence[Tensor],
    b: Sequence[Tensor],
    base: Sequence[Tensor] | None = None,
    *,
    scaling: float | Sequence[float] = 1.0,
    key: Tensor,
    streams: Sequence[int],
    scope: str = "token",
    groups: Tensor | None = None,
    std: str = "square",
    row0: int = 0,
    rows_per_group: int | None = None,
    dropout: float = 0.0,
    kept: QuantizedActivations | None = None,
) -> tuple[Tensor, ...]:
    """`flipout_lora` for several adapters that share x, each with noise of its own stream.

    Args:
        x: (..., n).
        mean: (r_i, n) for each adapter.
        rho: (r_i, n) or (r_i, 1) likewise.
        b: (m_i, r_i) likewise.
        base: (..., m_i) likewise, or None for all.
        scaling: one constant, or one for each.
        key: int64 tensor of two elements (`random.key`).
        streams: the adapters' noise streams; two with the same one share their normals.
        scope: rows that share their signs, as in `flipout_lora`.
        groups: sign row of each row, as in `flipout_lora`.
        std: "square" (rho^2), "softplus" or "direct".
        row0: number of the first group.
        rows_per_group: successive rows of a group.
        dropout: probability of dropping an element of x, with a mask for each adapter.
        kept: x in 8 bits (`quantize_activations`), which backward takes in place of x, for all adapters
            but those of ranks above 64, which keep x.

    Returns:
        (..., m_i) for each adapter.

    Raises:
        ValueError, TypeError: lists of different lengths; shapes, dtypes, devices, scope, std or key do
            not fit.

    Cost: as `lora_group`; with scope "none" and no groups the adapters run one by one.

    Sources: Wang et al., "BLoB", arXiv 2406.11675; Wen et al., "Flipout", arXiv 1803.04386.
    """
    op = "flipout_lora_group"
    lists = _lists(op, scaling, a=mean, b=b, base=base, streams=streams, rho=rho)
    if not isinstance(x, Tensor) or scope not in SCOPES:
        _check(op, x, *_of(lists, 0))
        check_choice(op, "scope", scope, SCOPES)
    ids = group_ids(op, groups, x)
    noise = Noise(key, 0, row0, group_size(op, x, scope, rows_per_group), ids, dropout)
    flipped = scope != "none" or ids is not None
    arguments = (lists["a"], lists["rho"], lists["b"], lists["base"], noise, lists["streams"], std)
    ys = _direct(x, *arguments, lists["scaling"], kept) if flipped else None
    if ys is not None:
        return ys
    check_key(op, key)
    check_choice(op, "std", std, STDS)
    for one in range(len(lists["a"])):
        a1, b1, base1, scale = _of(lists, one)
        _check(op, x, a1, b1, base1, scale, dropout, key, lists["streams"][one], row0)
        check_rho(op, lists["rho"][one], lists["a"][one], x)
    check_kept(op, kept, x)
    return _group(x, *arguments, lists["scaling"], "flipped" if flipped else "shared", kept)


def _lists(
    op: str, scaling: float | Sequence[float], **given: Sequence[Any] | None
) -> dict[str, list[Any]]:
    """The arguments that have an entry for each adapter, as lists of one length; no base is empty."""
    found: dict[str, list[Any]] = {}
    for name, values in given.items():
        if values is not None and (isinstance(values, Tensor) or not isinstance(values, Sequence)):
            raise TypeError(
                f"{op}: {name} must be a list with one entry for each adapter, got "
                f"{type(values).__name__}; put it into a list"
            )
        found[name] = [] if values is None else list(values)
    count = len(found["a"])
    found["streams"] = [0] * count if given["streams"] is None else found["streams"]
    found["scaling"] = list(scaling) if isinstance(scaling, Sequence) else [scaling] * count
    if count == 0:
        raise ValueError(f"{op}: there must be at least one adapter, got empty lists; pass factors")
    for name, values in found.items():
        if len(values) != count and not (name == "base" and given["base"] is None):
            raise ValueError(
                f"{op}: {name} must have one entry for each of the {count} adapters, got "
                f"{len(values)}; make the lists equally long"
            )
    return found


def _of(lists: dict[str, list[Any]], one: int) -> tuple[Any, ...]:
    """First factor, b, base and scaling of one adapter."""
    base = lists["base"][one] if lists["base"] else None
    return lists["a"][one], lists["b"][one], base, lists["scaling"][one]


def _direct(
    x: Tensor,
    a: list[Tensor],
    rho: list[Tensor],
    b: list[Tensor],
    base: list[Tensor],
    noise: Noise,
    streams: list[int],
    std: str,
    scaling: list[float],
    kept: QuantizedActivations | None,
) -> tuple[Tensor, ...] | None:
    """The outputs where the op takes the arguments as they are, as `adapter_passes.direct`; else None."""
    if (
        type(noise.dropout) is not float
        or type(noise.row0) is not int
        or type(std) is not str
        or torch.compiler.is_compiling()
        or not isinstance(x, Tensor)
        or not is_plain(x)
        or not (kept is None or fits(kept, x))
        or not (noise.key is None or is_plain(noise.key))
        or not all(isinstance(t, Tensor) and is_plain(t) for t in base)
        or not all(is_stored_float(t) for t in (*a, *rho, *b))
        or not all(type(s) is float for s in scaling)
        or not all(type(s) is int for s in streams)
        or not _library.has_kernels(x)
        or transformed()
    ):
        return None
    return _fused(autocast_input(x), a, rho, b, base, noise, streams, std, scaling, kept)


def _fused(
    x: Tensor,
    a: list[Tensor],
    rho: list[Tensor],
    b: list[Tensor],
    base: list[Tensor],
    noise: Noise,
    streams: list[int],
    std: str,
    scaling: list[float],
    kept: QuantizedActivations | None,
) -> tuple[Tensor, ...] | None:
    """One op; None where it does not take an argument."""
    tensors = (*a, *rho, *b, *base)
    if needs_gradient(x, *tensors):
        sizes = (len(a), len(rho) > 0, len(base) > 0)  # torch 2.11 compiles no bool of a list
        return _Group.apply(x, noise, sizes, tuple(streams), std, tuple(scaling), kept, *tensors)
    key, _, row0, rows_per_id, ids, dropout = noise
    ys, _ = _library.ops.adapter_group(
        x, a, rho, b, base, key, streams, row0, rows_per_id, ids, dropout, std, scaling, False
    )
    return tuple(ys) if ys else None


def _group(
    x: Tensor,
    a: list[Tensor],
    rho: list[Tensor],
    b: list[Tensor],
    base: list[Tensor],
    noise: Noise,
    streams: list[int],
    std: str,
    scaling: list[float],
    kind: str,
    kept: QuantizedActivations | None,
) -> tuple[Tensor, ...]:
    """The outputs for checked arguments, on the path that takes them; kinds of `adapter_passes`."""
    ranks = [factor.shape[0] for factor in a]
    fused = kind != "shared" and max(ranks) <= MAX_FUSED_RANK
    if not fused or not _library.has_kernels(x) or transformed():
        return tuple(
            adapter(
                x,
                a[one],
                b[one],
                base[one] if base else None,
                rho=rho[one] if rho else None,
                noise=noise._replace(stream=streams[one]),
                scaling=scaling[one],
                std=std,
                kind=kind,
                kept=kept,
            )
            for one in range(len(a))
        )
    x = autocast_input(x)
    acc = accumulate_dtype(x)
    a, rho, b = ([t if t.dtype == acc else t.to(acc) for t in factors] for factors in (a, rho, b))
    ys = _fused(x, a, rho, b, base, noise, streams, std, [float(s) for s in scaling], kept)
    assert ys is not None  # of checked arguments
    return ys


class _Group(torch.autograd.Function):
    """One op forward; backward that of each adapter in turn, and the sum of their dx."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Tensor,
        noise: Noise,
        sizes: tuple[int, bool, bool],
        streams: tuple[int, ...],
        std: str,
        scaling: tuple[float, ...],
        kept: QuantizedActivations | None,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...] | None:
        key, _, row0, rows_per_id, ids, dropout = noise
        a, rho, b, base = _parts(sizes, list(tensors))
        ys, hs = _library.ops.adapter_group(
            x, a, rho, b, base, key, list(streams), row0, rows_per_id, ids, dropout, std,
            list(scaling), True,
        )  # fmt: skip
        if not ys:
            return None
        ctx.save_for_backward(*saved_input(x, kept), key, ids, *a, *rho, *b, *hs)
        ctx.dtype = x.dtype
        ctx.sizes, ctx.streams, ctx.std, ctx.scaling = sizes, streams, std, scaling
        ctx.counted, ctx.dropout = (row0, rows_per_id), dropout
        return tuple(ys)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        *inputs, key, ids = ctx.saved_tensors[:5]
        saved = list(ctx.saved_tensors[5:])
        count, noisy, _ = ctx.sizes
        a, rho, b, hs = _parts((count, noisy, True), saved)
        need_x, wanted = ctx.needs_input_grad[0], list(ctx.needs_input_grad[7:])
        need_a, need_rho, need_b, need_base = _parts(ctx.sizes, wanted)
        again = torch.is_grad_enabled() or transformed()
        x = loaded_input("adapter", inputs, ctx.dtype, again)
        dx: Any = None
        own: Any
        found: list[list[Tensor | None]] = [[], [], []]
        for i, dy in enumerate(dys):
            of_rho = rho[i] if noisy else None
            row0, rows_per_id = ctx.counted
            noise = Noise(key, ctx.streams[i], row0, rows_per_id, ids, ctx.dropout)
            needs = (need_x, need_a[i], noisy and need_rho[i], need_b[i])
            if again:
                kind = "flipped" if noisy else "plain"
                own = second_order(
                    lambda x, a, rho, b, noise=noise, i=i, kind=kind: update_of(
                        x, a, rho, None, b, noise, ctx.scaling[i], ctx.std, kind
                    ),
                    (x, a[i], of_rho, b[i]),
                    dy.to(hs[i].dtype),
                )
            else:
                if x.dtype == hs[i].dtype != dy.dtype:
                    dy = dy.to(hs[i].dtype)  # kernels of a half-precision dy round their operands
                own = _library.ops.adapter_backward(
                    dy, x, a[i], of_rho, b[i], hs[i], *noise, ctx.std, ctx.scaling[i], *needs
                )
            if need_x:
                dx = own[0] if dx is None else dx + own[0] if again else dx.add_(own[0])
            for to, gradient, needed in zip(found, own[1:], needs[1:], strict=True):
                to.append(gradient if needed else None)
        if not noisy:
            found[1] = []
        dbase = [dy if needed else None for dy, needed in zip(dys, need_base, strict=False)]
        return (dx, *[None] * 6, *found[0], *found[1], *found[2], *dbase)


def _parts(sizes: tuple[int, bool, bool], tensors: list[Any]) -> tuple[list[Any], ...]:
    """What follows for each adapter: first factors, rhos if any, second factors, the rest if any."""
    count, noisy, more = sizes
    rest = count * (1 + noisy)
    return (
        tensors[:count],
        tensors[count:rest],
        tensors[rest : rest + count],
        tensors[rest + count :] if more else [],
    )


@fake("adapter_group")
def _(
    x: Tensor,
    a: Sequence[Tensor],
    rho: Sequence[Tensor],
    b: Sequence[Tensor],
    base: Sequence[Tensor],
    key: Tensor | None,
    streams: Sequence[int],
    row0: int,
    rows_per_id: int,
    ids: Tensor | None,
    dropout: float,
    std: str,
    scaling: Sequence[float],
    train: bool,
) -> tuple[list[Tensor], list[Tensor]]:
    tokens = math.prod(x.shape[:-1])
    dtypes = [t.dtype for t in base] or [x.dtype] * len(a)
    ys = [
        x.new_empty((*x.shape[:-1], t.shape[0]), dtype=dtype)
        for t, dtype in zip(b, dtypes, strict=True)
    ]
    hs = [x.new_empty((tokens, t.shape[0]), dtype=accumulate_dtype(x)) for t in a]
    return ys, hs if train else []
