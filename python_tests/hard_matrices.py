"""Tall matrices that small solvers find hard: of low rank, with equal or empty columns, of any size."""

from __future__ import annotations

import torch
from torch import Tensor

SIZES = {"tiny": 1e-30, "huge": 1e30}
RANK_DEFICIENT = ("zero", "one empty", "equal", "mostly equal", "rank two")
KINDS = ("random", *RANK_DEFICIENT, "graded", "mixed", *SIZES)


def hard_matrix(kind: str, n: int, r: int, seed: int = 0) -> Tensor:
    """fp64 (n, r), of a few units in size but for the kinds in SIZES, "graded" and "mixed"."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, r, generator=generator, dtype=torch.float64)
    if kind in SIZES:
        return x * SIZES[kind]
    if kind == "zero":
        return x * 0
    if kind == "one empty":
        x[:, r // 2] = 0
    elif kind == "equal":
        x[:] = x[:, :1].clone()
    elif kind == "mostly equal":
        x[:, max(1, r // 8) :] = x[:, :1].clone()
    elif kind == "rank two":
        # Small whole numbers: of rank two in fp32 as well.
        right = torch.randn(min(r, 2), r, generator=generator, dtype=torch.float64)
        x = (4 * x[:, :2]).round() @ (4 * right).round()
    elif kind == "graded":
        x *= torch.logspace(0, -12, r, dtype=torch.float64)
    elif kind == "mixed":
        x *= torch.tensor([1e-30, 1.0, 1e30], dtype=torch.float64)[torch.arange(r) % 3]
    return x
