"""Noise of an adapter call: its arguments, its sign rows, and the same noise as plain tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import random, reference
from .._library import fake
from .arguments import (
    accumulate_dtype,
    check_integer,
    check_same_device,
    check_tensor,
    transformed,
)

SCOPES = ("token", "example", "none")
STDS = ("square", "softplus", "direct")


class Noise(NamedTuple):
    """Which numbers a call draws; in the order in which the ops take them. See `bayes_kernels.random`.

    Attributes:
        key: int64 tensor of two elements; None without signs and dropout.
        stream: the layer's stream.
        row0, rows_per_id: row t of the call has sign row row0 + t // rows_per_id.
        ids: int64 (tokens,), the sign row of each row, in place of counted ones.
        dropout: probability of dropping an element of x.
    """

    key: Tensor | None = None
    stream: int = 0
    row0: int = 0
    rows_per_id: int = 1
    ids: Tensor | None = None
    dropout: float = 0.0


def group_ids(op: str, groups: Tensor | None, x: Tensor) -> Tensor | None:
    """`groups` as int64 (tokens,), one for each row of x.

    Raises:
        TypeError, ValueError: groups are not integers, or do not broadcast to the rows of x.
    """
    if groups is None:
        return None
    check_tensor(op, "groups", groups)
    check_same_device(op, "groups", groups, x)
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


def group_size(op: str, x: Tensor, scope: str, rows_per_group: int | None) -> int:
    """Number of successive rows that share their signs.

    Raises:
        ValueError: rows_per_group is less than 1.
    """
    if rows_per_group is None:
        if scope != "example":
            return 1
        leading = x.shape[0] if x.dim() > 1 else 1
        rows = math.prod(x.shape[:-1])
        return rows // leading if leading > 0 and rows > 0 else 1
    check_integer(op, "rows_per_group", rows_per_group)
    if rows_per_group < 1:
        raise ValueError(f"{op}: rows_per_group must be at least 1, got {rows_per_group}")
    return rows_per_group


def keep_mask(x: Tensor, noise: Noise) -> Tensor | None:
    """The dropout mask (tokens, n) of a call; None without dropout."""
    if noise.dropout == 0.0:
        return None
    assert noise.key is not None
    first = noise.row0 * noise.rows_per_id
    rows, n = math.prod(x.shape[:-1]), x.shape[-1]
    made = reference if transformed() else random
    return made.dropout_mask(noise.key, rows, n, noise.dropout, stream=noise.stream, row0=first)


def dense_noise(x: Tensor, r: int, noise: Noise, *, signs: bool) -> reference.DenseNoise:
    """The noise of a call as tensors; without `signs` these are one."""
    made, acc = reference if transformed() else random, accumulate_dtype(x)
    rows, n = math.prod(x.shape[:-1]), x.shape[-1]
    key, stream, row0, rows_per_id, ids, _ = noise
    assert key is not None

    def drawn(output: bool, columns: int) -> Tensor:
        if not signs:
            return x.new_ones((), dtype=acc)
        return made.sign_bits(
            key,
            rows,
            columns,
            stream=stream,
            output=output,
            row0=row0,
            rows_per_id=rows_per_id,
            ids=ids,
        ).to(acc)

    return reference.DenseNoise(
        eps=made.normal(key, (r, n), stream=stream).to(acc),
        r_in=drawn(False, n),
        r_out=drawn(True, r),
        keep=keep_mask(x, noise),
    )


# --- fake kernels: shapes and dtypes of the ops' results ---------------------------------------------


@fake("fold_in")
def _(key: Tensor, data: int) -> Tensor:
    return key.new_empty((2,))


@fake("normal")
def _(key: Tensor, stream: int, size: Sequence[int]) -> Tensor:
    return key.new_empty(size, dtype=torch.float32)


@fake("sign_bits")
def _(
    key: Tensor,
    stream: int,
    output: bool,
    rows: int,
    columns: int,
    row0: int,
    rows_per_id: int,
    ids: Tensor | None,
) -> Tensor:
    return key.new_empty((rows, columns), dtype=torch.int8)


@fake("dropout_mask")
def _(key: Tensor, stream: int, rows: int, columns: int, row0: int, p: float) -> Tensor:
    return key.new_empty((rows, columns), dtype=torch.bool)


@fake("scaled_normal")
def _(rho: Tensor, n: int, key: Tensor, stream: int, std: str) -> Tensor:
    return rho.new_empty((rho.shape[0], n))


@fake("scaled_normal_backward")
def _(de: Tensor, rho: Tensor, key: Tensor, stream: int, std: str) -> Tensor:
    return rho.new_empty(rho.shape)
