"""Noise keys. The whole noise contract of the package is in this docstring.

Nothing random is stored: every number is a pure function of (key, stream, purpose, index), computed
where it is used and again in the backward pass.

* **Key**: an int64 tensor of two elements (seed, offset), on the device of the op, made by `key(seed)`.
* **Block**: Philox4x32-10 (Salmon et al., SC 2011) with the seed's low and high word as key and the
  counter (offset + index, low and high word; 0; 0) gives four 32-bit words.
* **fold_in(key, i)**: words (0, 1) of block i become the new seed, words (2, 3) the new offset.
* **Stream and purpose**: an op uses `fold_in(key, 8 * stream + purpose)`; a layer has a stream of its
  own. Purposes: 0 normals, 1 signs of the input side, 2 signs of the rank side, 3 dropout, 4 logits, 5 draws,
  6 rounding.
* **Normals**: element e of a tensor (row-major) uses block e // 4; its words (0, 1) and (2, 3) give
  (r cos t, r sin t) with r = sqrt(-2 log u(w)), t = 2 pi u(w'), u(w) = w * 2^-32 + 2^-33 in fp32.
* **Signs**: 128 to a block. Column j of sign row i among n columns uses block
  i * ceil(n / 128) + j // 128, bit j % 32 of word (j // 32) % 4; a set bit is a negative sign.
* **Dropout**: 8 elements to a block. Column j of token t among n columns uses block
  t * ceil(n / 8) + j // 8 and 16 bits of word (j % 8) // 2 (the low half for even j); the element is
  kept where these are >= round(65536 p), and divided by 1 - p.
* **Rounding** of activations to 8 bits: blocks and bits as for dropout; a number between two codes
  takes the upper one where its bits + 1/2 are below 65536 times the remainder.
* **Logits**: row (example) i, which is `ids[i]` or `row0 + i`, has the key fold_in(k, row) with k the
  subkey of purpose 4; sample s of class c among C is element (s // 4, c, s % 4) of `normal` with that
  key and shape (ceil(S / 4), C, 4). More samples extend fewer; other rows change nothing.
* **Draws** of a Gaussian factor (r, n): with k the subkey of purpose 5, draw pair p has the key
  fold_in(k, p), and element e of its eps is made of block e // 4 of that key as in "Normals".
  Antithetic: draw d is mean + s . std . eps of pair d // 2, with s = +1 for even d and -1 for odd d;
  independent: draw d is mean + std . eps of pair d. A draw depends on the key, the stream and its
  number alone: not on other draws, their order, the batch or the device.
* **Sign row of token t** (counted from 0 in the flattened batch): `ids[t]` where ids are given, else
  `row0 + t // rows_per_id`. Results therefore depend neither on tiling, batch split, thread count,
  device nor the number of processes.

Same key: the same integers on every device, normals within a few ulp. A key that has been folded or
split is not used for numbers as well: the folded keys are made of its blocks. Keys are refreshed once per
micro-batch before the forward pass, never inside it (see `bayes_kernels.hf`), which keeps gradient
checkpointing, accumulation, `torch.compile` and CUDA graphs right. The layout of blocks, `fold_in` and
normals is that of `torch.func._random`.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from . import _library, reference


def key(seed: int, device: torch.device | str | None = None) -> Tensor:
    """A noise key (seed, 0): int64 tensor of two elements.

    Args:
        seed: any integer; it is taken modulo 2^64.
        device: where the ops that use the key run. No host synchronisation.

    Raises:
        TypeError: seed is not an integer.
    """
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"key: seed must be an int, got {type(seed).__name__}; pass a whole number")
    wrapped = _signed(seed & 0xFFFFFFFFFFFFFFFF)
    if device is None or torch.device(device).type == "cpu":
        return torch.tensor([wrapped, 0], dtype=torch.int64, device=device)
    made = torch.zeros(2, dtype=torch.int64, device=device)
    made[:1].fill_(wrapped)  # a copy from the host would wait for all work before it
    return made


def fold_in(key: Tensor, data: int) -> Tensor:
    """A new, statistically independent key derived from `key` and an integer.

    Args:
        key: int64 tensor of two elements.
        data: any integer, taken modulo 2^64: a step, a rank, a layer.

    Returns:
        int64 tensor of two elements on the key's device. No host synchronisation.

    Raises:
        ValueError: key is not an int64 tensor of two elements.
    """
    check_key("fold_in", key)
    if not _library.has_kernels(key):
        return reference.fold_in(key, data)
    return _library.ops.fold_in(key, _signed(data & 0xFFFFFFFFFFFFFFFF))


def layer_stream(name: str) -> int:
    """Noise stream of a layer: 40 bits of a hash of its name.

    It depends on the name alone, so that adding an adapter with other target modules changes no
    draw. 448 layers share a stream by chance with probability 1e-7.

    Args:
        name: for an adapter the module name in the base model.
    """
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=5).digest(), "big")


def split(key: Tensor, count: int) -> list[Tensor]:
    """`count` independent keys: fold_in(key, 0), ..., fold_in(key, count - 1)."""
    return [fold_in(key, i) for i in range(count)]


def normal(key: Tensor, size: tuple[int, ...], *, stream: int = 0) -> Tensor:
    """The standard normals that the fused ops use for this key and stream.

    Args:
        key: int64 tensor of two elements.
        size: shape of the result; element e in row-major order has index e.
        stream: the layer's stream.

    Returns:
        fp32 tensor on the key's device.

    Raises:
        ValueError: key is not an int64 tensor of two elements.
    """
    check_key("normal", key)
    if not _library.has_kernels(key):
        return reference.normal(key, size, stream=stream)
    return _library.ops.normal(key, stream, list(size))


def sign_bits(
    key: Tensor,
    rows: int,
    columns: int,
    *,
    stream: int = 0,
    output: bool = False,
    row0: int = 0,
    rows_per_id: int = 1,
    ids: Tensor | None = None,
) -> Tensor:
    """The signs that the fused ops use: int8 of +1 and -1, shape (rows, columns).

    Args:
        key: int64 tensor of two elements.
        rows, columns: tokens, and input features (or the rank for the rank side).
        stream: the layer's stream.
        output: False for R_in (input side), True for R_out (rank side).
        row0, rows_per_id, ids: which sign row a token uses; see the module docstring.

    Raises:
        ValueError: key is not an int64 tensor of two elements.
    """
    check_key("sign_bits", key)
    if not _library.has_kernels(key):
        return reference.sign_bits(
            key,
            rows,
            columns,
            stream=stream,
            output=output,
            row0=row0,
            rows_per_id=rows_per_id,
            ids=ids,
        )
    return _library.ops.sign_bits(key, stream, output, rows, columns, row0, rows_per_id, ids)


def dropout_mask(
    key: Tensor, rows: int, columns: int, p: float, *, stream: int = 0, row0: int = 0
) -> Tensor:
    """The dropout mask that the fused ops use: bool, True where an element is kept.

    Args:
        key: int64 tensor of two elements.
        rows, columns: tokens and input features.
        p: probability of being dropped, in [0, 1); resolved to 1 / 65536.
        stream: the layer's stream.
        row0: index of the first token.

    Raises:
        ValueError: key is not an int64 tensor of two elements, or p is out of range.
    """
    check_key("dropout_mask", key)
    if not 0.0 <= p < 1.0:
        raise ValueError(f"dropout_mask: p must be in [0, 1), got {p}; pass a probability")
    if not _library.has_kernels(key):
        return reference.dropout_mask(key, rows, columns, p, stream=stream, row0=row0)
    return _library.ops.dropout_mask(key, stream, rows, columns, row0, p)


def check_key(op: str, key: Tensor) -> None:
    """Raise unless `key` is an int64 tensor of two elements."""
    if not isinstance(key, Tensor):
        raise TypeError(
            f"{op}: key must be a tensor, got {type(key).__name__}; use random.key(seed)"
        )
    if key.is_nested or key.layout is not torch.strided:
        raise TypeError(
            f"{op}: key must be a dense tensor, got a {'nested' if key.is_nested else 'sparse'} one; "
            "use random.key(seed)"
        )
    if key.dtype != torch.int64 or key.shape != (2,):
        raise ValueError(
            f"{op}: key must be an int64 tensor of two elements, got {key.dtype} of shape "
            f"{tuple(key.shape)}; use random.key(seed)"
        )
    if key.is_meta or not key.is_contiguous():
        raise ValueError(
            f"{op}: key must be contiguous and hold data, got device {key.device} and strides "
            f"{key.stride()}; use random.key(seed)"
        )


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value
