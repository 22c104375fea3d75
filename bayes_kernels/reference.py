"""The definition of every op in plain PyTorch: any dtype, any device, differentiable, slow.

Noise is passed in as dense tensors here (`eps`, `r_in`, `r_out`, `keep`); `dense_noise` makes the ones
that the fused ops use for a key. The Philox functions repeat the noise contract of
`bayes_kernels.random` in integer tensor arithmetic and do not need the compiled library.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

_MASK = 0xFFFFFFFF


# --- noise -------------------------------------------------------------------------------------


def _multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low words of the 64-bit product of two 32-bit words held in int64."""
    product = b * a  # wraps modulo 2^64, whose bits are those of the unsigned product
    return (product >> 32) & _MASK, product & _MASK


def philox(key: Tensor, index: Tensor) -> Tensor:
    """Philox4x32-10 blocks: int64 tensor (..., 4) of 32-bit words for int64 block indices (...)."""
    counter = key[1] + index
    c0, c1 = counter & _MASK, (counter >> 32) & _MASK
    c2, c3 = torch.zeros_like(c0), torch.zeros_like(c0)
    k0, k1 = key[0] & _MASK, (key[0] >> 32) & _MASK
    for _ in range(10):
        hi0, lo0 = _multiply(0xD2511F53, c0)
        hi1, lo1 = _multiply(0xCD9E8D57, c2)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return torch.stack([c0, c1, c2, c3], dim=-1)


def fold_in(key: Tensor, data: int) -> Tensor:
    """New key: words (0, 1) and (2, 3) of block `data`."""
    data = data & 0xFFFFFFFFFFFFFFFF
    data = data - (1 << 64) if data >= 1 << 63 else data
    w = philox(key, torch.tensor(data, device=key.device))
    return torch.stack([w[0] | (w[1] << 32), w[2] | (w[3] << 32)])


def subkey(key: Tensor, stream: int, purpose: int) -> Tensor:
    """The key of one stream and purpose."""
    return fold_in(key, 8 * stream + purpose)


def normal(key: Tensor, size: Sequence[int], *, stream: int = 0) -> Tensor:
    """fp32 normals by Box-Muller, evaluated in fp64 and rounded once."""
    count = math.prod(size)
    blocks = torch.arange((count + 3) // 4, device=key.device)
    words = philox(subkey(key, stream, 0), blocks)
    u = (words.float() * 2.0**-32 + 2.0**-33).double()
    radius = torch.sqrt(-2 * torch.log(u[:, 0::2]))
    angle = 2 * math.pi * u[:, 1::2]
    pairs = torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)], dim=-1)
    return pairs.reshape(-1)[:count].float().reshape(tuple(size))


def row_ids(
    rows: int, row0: int, rows_per_id: int, ids: Tensor | None, device: torch.device
) -> Tensor:
    """The sign row of each token."""
    return ids if ids is not None else row0 + torch.arange(rows, device=device) // rows_per_id


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
    """int8 signs (rows, columns)."""
    per_row = (columns + 127) // 128
    row = row_ids(rows, row0, rows_per_id, ids, key.device)
    blocks = row[:, None] * per_row + torch.arange(per_row, device=key.device)
    words = philox(subkey(key, stream, 2 if output else 1), blocks)  # (rows, per_row, 4)
    bits = (words[..., None] >> torch.arange(32, device=key.device)) & 1
    return (1 - 2 * bits).to(torch.int8).reshape(rows, -1)[:, :columns]


def dropout_mask(
    key: Tensor, rows: int, columns: int, p: float, *, stream: int = 0, row0: int = 0
) -> Tensor:
    """bool mask (rows, columns), True where kept."""
    per_row = (columns + 7) // 8
    row = row0 + torch.arange(rows, device=key.device)
    words = philox(
        subkey(key, stream, 3), row[:, None] * per_row + torch.arange(per_row, device=key.device)
    )
    halves = torch.stack([words & 0xFFFF, words >> 16], dim=-1).reshape(rows, -1)[:, :columns]
    return halves >= int(p * 65536 + 0.5)


@dataclass
class DenseNoise:
    """The noise of one call as tensors: eps (r, n); r_in (tokens, n); r_out (tokens, r); keep."""

    eps: Tensor
    r_in: Tensor
    r_out: Tensor
    keep: Tensor | None = None


def dense_noise(
    key: Tensor,
    rows: int,
    n: int,
    r: int,
    *,
    stream: int = 0,
    row0: int = 0,
    rows_per_id: int = 1,
    ids: Tensor | None = None,
    dropout: float = 0.0,
    dtype: torch.dtype = torch.float32,
) -> DenseNoise:
    """The noise that the fused ops use for this key, materialised."""
    where = {"stream": stream, "row0": row0, "rows_per_id": rows_per_id, "ids": ids}
    return DenseNoise(
        eps=normal(key, (r, n), stream=stream).to(dtype),
        r_in=sign_bits(key, rows, n, **where).to(dtype),  # type: ignore[arg-type]
        r_out=sign_bits(key, rows, r, output=True, **where).to(dtype),  # type: ignore[arg-type]
        keep=dropout_mask(key, rows, n, dropout, stream=stream, row0=row0) if dropout > 0 else None,
    )


# --- adapter -----------------------------------------------------------------------------------


def std_of(rho: Tensor, std: str) -> Tensor:
    """Standard deviation from its parameter: "square" rho^2, "softplus" log(1 + e^rho), "direct"."""
    if std == "square":
        return rho * rho
    if std == "softplus":
        return F.softplus(rho)
    if std == "direct":
        return rho
    raise ValueError(f"std must be 'square', 'softplus' or 'direct', got {std!r}")


def dropped(x: Tensor, keep: Tensor | None, p: float) -> Tensor:
    """x where kept, over 1 - p; zero elsewhere."""
    return x if keep is None else x * keep.to(x.dtype) / (1 - p)


def flipout_rank(
    x: Tensor, mean: Tensor, rho: Tensor, noise: DenseNoise, std: str, dropout: float = 0.0
) -> Tensor:
    """h = x' M^T + ((x' . R_in) (Omega . eps)^T) . R_out for x (tokens, n): the shrink stage."""
    x = dropped(x, noise.keep, dropout)
    e = std_of(rho, std) * noise.eps
    return x @ mean.T + ((x * noise.r_in) @ e.T) * noise.r_out


def lora(
    x: Tensor, a: Tensor, b: Tensor, base: Tensor | None = None, *, scaling: float = 1.0
) -> Tensor:
    """base + scaling * (x a^T) b^T."""
    y = (x @ a.T) @ b.T * scaling
    return y if base is None else base + y


def flipout_lora(
    x: Tensor,
    mean: Tensor,
    rho: Tensor,
    b: Tensor,
    base: Tensor | None = None,
    *,
    scaling: float = 1.0,
    noise: DenseNoise,
    std: str = "square",
    dropout: float = 0.0,
) -> Tensor:
    """base + scaling * h b^T with h of `flipout_rank`; leading dimensions of x are flattened for it."""
    h = flipout_rank(x.reshape(-1, x.shape[-1]), mean, rho, noise, std, dropout)
    y = (h @ b.T * scaling).reshape(*x.shape[:-1], b.shape[0])
    return y if base is None else base + y


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
    """base + scaling * ((x a^T) . d) b^T; d (r,), or (G, r) indexed by groups (...,)."""
    h = (x @ a.T) * (d if groups is None else d[groups])
    y = h @ b.T * scaling
    return y if base is None else base + y


def core_lora(
    x: Tensor,
    a: Tensor,
    core: Tensor,
    b: Tensor,
    base: Tensor | None = None,
    *,
    scaling: float = 1.0,
) -> Tensor:
    """base + scaling * ((x a^T) core^T) b^T: Delta W = scaling * b core a."""
    y = ((x @ a.T) @ core.T) @ b.T * scaling
    return y if base is None else base + y


# --- divergence --------------------------------------------------------------------------------


def gaussian_kl(
    means: Sequence[Tensor],
    rhos: Sequence[Tensor],
    prior_std: float | Sequence[float],
    *,
    std: str = "square",
    direction: str = "elbo",
) -> Tensor:
    """Sum over tensors and elements of KL(N(mean, std(rho)^2) || N(0, prior_std^2)), or its reverse."""
    priors = [prior_std] * len(means) if isinstance(prior_std, (int, float)) else list(prior_std)
    total = means[0].new_zeros(())
    for mean, rho, p in zip(means, rhos, priors, strict=True):
        s = std_of(rho, std).expand_as(mean)
        if direction == "elbo":
            terms = torch.log(p / s) + (s**2 + mean**2) / (2 * p**2) - 0.5
        elif direction == "code":
            terms = torch.log(s / p) + (p**2 + mean**2) / (2 * s**2) - 0.5
        else:
            raise ValueError(f"direction must be 'elbo' or 'code', got {direction!r}")
        total = total + terms.sum()
    return total
