"""Noise of an adapter call: its arguments, its sign rows, and the same noise as plain tensors."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _library, reference
from .arguments import accumulate_dtype

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
    if rows_per_group < 1:
        raise ValueError(f"{op}: rows_per_group must be at least 1, got {rows_per_group}")
    return rows_per_group


def keep_mask(x: Tensor, noise: Noise) -> Tensor | None:
    """The dropout mask (tokens, n) of a call; None without dropout."""
    if noise.dropout == 0.0:
        return None
    first = noise.row0 * noise.rows_per_id
    rows, n = math.prod(x.shape[:-1]), x.shape[-1]
    return _library.ops.dropout_mask(noise.key, noise.stream, rows, n, first, noise.dropout)


def dense_noise(x: Tensor, r: int, noise: Noise, *, signs: bool) -> reference.DenseNoise:
    """The noise of a call as tensors, from the dump ops; without `signs` these are one."""
    ops, acc = _library.ops, accumulate_dtype(x)
    rows, n = math.prod(x.shape[:-1]), x.shape[-1]

    def drawn(output: bool, columns: int) -> Tensor:
        if not signs:
            return x.new_ones((), dtype=acc)
        key, stream, row0, rows_per_id, ids, _ = noise
        return ops.sign_bits(key, stream, output, rows, columns, row0, rows_per_id, ids).to(acc)

    return reference.DenseNoise(
        eps=ops.normal(noise.key, noise.stream, [r, n]).to(acc),
        r_in=drawn(False, n),
        r_out=drawn(True, r),
        keep=keep_mask(x, noise),
    )
