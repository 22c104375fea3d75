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

from ._library import has_double

_MASK = 0xFFFFFFFF


def wide(t: Tensor) -> Tensor:
    """`t` in fp64; on the CPU where its device has none."""
    return t.double() if has_double(t.device) else t.cpu().double()


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
    w = philox(key, torch.full((), data, dtype=torch.int64, device=key.device))
    return torch.stack([w[0] | (w[1] << 32), w[2] | (w[3] << 32)])


def subkey(key: Tensor, stream: int, purpose: int) -> Tensor:
    """The key of one stream and purpose."""
    return fold_in(key, 8 * stream + purpose)


def normal(key: Tensor, size: Sequence[int], *, stream: int = 0) -> Tensor:
    """fp32 normals by Box-Muller, evaluated in fp64 and rounded once."""
    count = math.prod(size)
    blocks = torch.arange((count + 3) // 4, device=key.device)
    words = philox(subkey(key, stream, 0), blocks)
    return _box_muller(words).reshape(-1)[:count].reshape(tuple(size))


def _box_muller(words: Tensor) -> Tensor:
    """Four fp32 normals for each block of four words."""
    u = wide(words.float() * 2.0**-32 + 2.0**-33)
    radius = torch.sqrt(-2 * torch.log(u[..., 0::2]))
    angle = 2 * math.pi * u[..., 1::2]
    pairs = torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)], dim=-1)
    return pairs.flatten(-2).float().to(words.device)


def draw_normals(
    key: Tensor, draws: Tensor, size: Sequence[int], *, stream: int = 0, antithetic: bool = True
) -> Tensor:
    """The fp32 normals (D, *size) of draws (D,) of a Gaussian tensor, with the signs of antithetic pairs."""
    count = math.prod(size)
    blocks = torch.arange((count + 3) // 4, device=key.device)
    pair = torch.div(draws, 2, rounding_mode="floor") if antithetic else draws
    w = philox(subkey(key, stream, 5), pair)  # draw by draw: fold_in(subkey, pair)
    folded = torch.stack([w[..., 0] | (w[..., 1] << 32), w[..., 2] | (w[..., 3] << 32)])
    eps = _box_muller(philox(folded[..., None], blocks)).flatten(1)[:, :count]
    if antithetic:
        eps = eps * (1 - 2 * (draws & 1))[:, None].to(eps.dtype)
    return eps.reshape(len(draws), *size)


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
    return (1 - 2 * bits).to(torch.int8).flatten(1)[:, :columns]


def signs_at(key: Tensor, rows: Tensor, columns: Tensor, n: int, *, stream: int = 0) -> Tensor:
    """int64 signs (...) of R_in (rows, n) at some places only: one block of Philox for each."""
    blocks = rows * ((n + 127) // 128) + columns // 128
    words = philox(subkey(key, stream, 1), blocks)
    bit = columns % 128
    word = words.gather(-1, (bit // 32)[..., None])[..., 0]
    return 1 - 2 * ((word >> (bit % 32)) & 1)


def dropout_mask(
    key: Tensor, rows: int, columns: int, p: float, *, stream: int = 0, row0: int = 0
) -> Tensor:
    """bool mask (rows, columns), True where kept."""
    per_row = (columns + 7) // 8
    row = row0 + torch.arange(rows, device=key.device)
    words = philox(
        subkey(key, stream, 3), row[:, None] * per_row + torch.arange(per_row, device=key.device)
    )
    halves = torch.stack([words & 0xFFFF, words >> 16], dim=-1).flatten(1)[:, :columns]
    return halves >= int(p * 65536 + 0.5)


# --- activations in 8 bits -----------------------------------------------------------------------


def quantize_activations(
    x: Tensor, key: Tensor, *, stream: int = 0, row0: int = 0
) -> tuple[Tensor, Tensor]:
    """int8 codes of the shape of x (..., n) and uint8 scales (tokens, ceil(n / 32))."""
    n = x.shape[-1]
    rows = math.prod(x.shape[:-1])
    value = wide(x.detach()).reshape(rows, n)
    blocks = F.pad(value, (0, -n % 32)).reshape(rows, -1, 32)
    largest = blocks.abs().amax(-1) if n else blocks.new_zeros(rows, 0)
    mantissa, exponent = torch.frexp(largest)  # largest = mantissa 2^exponent, mantissa in [1/2, 1)
    # The step is 2^(scale - 133), and the largest code 127.
    scale = exponent + 126 + (mantissa > 127 / 128).to(exponent.dtype)
    scale = torch.where(largest > 0, scale, 0).clamp(min=109 if x.dtype == torch.float16 else 7)
    finite = torch.isfinite(largest) & (scale < 255)
    scale = torch.where(finite, scale, 255)
    q = torch.where(
        finite[..., None], torch.ldexp(blocks, (133 - scale)[..., None].to(blocks.dtype)), 0
    )
    low = q.floor()
    per_row = (n + 7) // 8
    row = row0 + torch.arange(rows, device=key.device)
    index = row[:, None] * per_row + torch.arange(per_row, device=key.device)
    words = philox(subkey(key, stream, 6), index)
    bits = torch.stack([words & 0xFFFF, words >> 16], dim=-1).flatten(1)
    bits = F.pad(bits, (0, low[0].numel() - bits.shape[1] if rows else 0)).reshape(low.shape)
    up = bits.to(low.device) + 0.5 < (q - low) * 65536
    codes = (low + up).flatten(1)[:, :n].to(torch.int8).reshape(x.shape)
    return codes.to(x.device), scale.to(torch.uint8).to(x.device)


def dequantize_activations(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """code * 2^(scale - 133) in `dtype`; NaN where the scale is 255."""
    n = codes.shape[-1]
    rows = math.prod(codes.shape[:-1])
    step = torch.exp2(wide(scales) - 133)
    step = torch.where(wide(scales) == 255, math.nan, step).repeat_interleave(32, dim=1)[:, :n]
    value = wide(codes).reshape(rows, n) * step
    if dtype == torch.float16:
        value = value.clamp(-65504, 65504)
    return value.to(dtype).reshape(codes.shape).to(codes.device)


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


def lora_group(
    x: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    base: Sequence[Tensor] | None = None,
    *,
    scaling: Sequence[float],
) -> tuple[Tensor, ...]:
    """`lora` for each of several adapters that share x."""
    bases: Sequence[Tensor | None] = [None] * len(a) if base is None else base
    return tuple(
        lora(x, a1, b1, base1, scaling=s)
        for a1, b1, base1, s in zip(a, b, bases, scaling, strict=True)
    )


def flipout_lora_group(
    x: Tensor,
    mean: Sequence[Tensor],
    rho: Sequence[Tensor],
    b: Sequence[Tensor],
    base: Sequence[Tensor] | None = None,
    *,
    scaling: Sequence[float],
    noise: Sequence[DenseNoise],
    std: str = "square",
    dropout: float = 0.0,
) -> tuple[Tensor, ...]:
    """`flipout_lora` for each of several adapters that share x, each with noise of its own."""
    bases: Sequence[Tensor | None] = [None] * len(mean) if base is None else base
    return tuple(
        flipout_lora(x, m, q, b1, base1, scaling=s, noise=drawn, std=std, dropout=dropout)
        for m, q, b1, base1, s, drawn in zip(mean, rho, b, bases, scaling, noise, strict=True)
    )


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


# --- grouped -----------------------------------------------------------------------------------


def gaussian_draws(mean: Tensor, rho: Tensor, eps: Tensor, *, std: str = "square") -> Tensor:
    """mean + std(rho) . eps for the eps (D, r, n) of `draw_normals`."""
    return mean + std_of(rho, std) * eps


def grouped_lora(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    base: Tensor | None = None,
    *,
    groups: Tensor,
    scaling: float = 1.0,
) -> Tensor:
    """base + scaling * (x a[g]^T) b[g]^T for the group g of each row; b (m, r) or (G, m, r)."""
    h = x.new_zeros(*x.shape[:-1], a.shape[1])
    for g, factor in enumerate(a):
        h = torch.where((groups == g)[..., None], x @ factor.T, h)
    if b.dim() == 2:
        y = h @ b.T * scaling
    else:
        y = x.new_zeros(*x.shape[:-1], b.shape[1])
        for g, factor in enumerate(b):
            y = torch.where((groups == g)[..., None], h @ factor.T * scaling, y)
    return y if base is None else base + y


def grouped_flipout_lora(
    x: Tensor,
    mean: Tensor,
    rho: Tensor,
    b: Tensor,
    base: Tensor | None = None,
    *,
    groups: Tensor,
    scaling: float = 1.0,
    noise: DenseNoise,
    std: str = "square",
) -> Tensor:
    """`flipout_lora` with the factors and the eps (G, r, n) of each row's group; x (tokens, n)."""
    y = x.new_zeros(x.shape[0], b.shape[-2])
    for g in range(len(mean)):
        own = DenseNoise(noise.eps[g], noise.r_in, noise.r_out)
        h = flipout_rank(x, mean[g], rho[g], own, std)
        found = h @ (b if b.dim() == 2 else b[g]).T * scaling
        y = torch.where((groups == g)[:, None], found, y)
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


# --- tall --------------------------------------------------------------------------------------


def gram(x: Tensor) -> Tensor:
    """x^T x, (r, r) for x (n, r)."""
    return x.mT @ x


def polar_retract(x: Tensor, step: Tensor | None = None) -> Tensor:
    """Polar factor of x + step: the orthonormal matrix nearest to it, U V^T of its SVD U S V^T."""
    u, _, vh = torch.linalg.svd(x if step is None else x + step, full_matrices=False)
    return u @ vh


def qr_retract(x: Tensor, step: Tensor | None = None) -> Tensor:
    """Q of the QR decomposition of x + step whose R has a positive diagonal."""
    q, r = torch.linalg.qr(x if step is None else x + step)
    return q * torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(q.dtype)


def tangent_projection(x: Tensor, d: Tensor) -> Tensor:
    """d - x sym(x^T d): d projected on the tangent space of the Stiefel manifold at x."""
    product = x.mT @ d
    return d - x @ ((product + product.mT) / 2)


def stiefel_step(
    x: Tensor, direction: Tensor, lr: float | Tensor, *, retraction: str = "polar"
) -> Tensor:
    """Retraction of x - lr * tangent_projection(x, direction)."""
    if retraction not in ("polar", "qr"):
        raise ValueError(f"retraction must be 'polar' or 'qr', got {retraction!r}")
    retract = polar_retract if retraction == "polar" else qr_retract
    return retract(x - lr * tangent_projection(x, direction))


def landing_field(x: Tensor, grad: Tensor, lam: float | Tensor) -> Tensor:
    """(g x^T - x g^T) x + lam x (x^T x - I), without the (n, n) product."""
    s = gram(x)
    eye = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    return grad @ s - x @ (grad.mT @ x) + lam * (x @ (s - eye))


def landing_step(x: Tensor, grad: Tensor, lr: float | Tensor, lam: float | Tensor) -> Tensor:
    """x - lr * landing_field(x, grad, lam)."""
    return x - lr * landing_field(x, grad, lam)


# --- curvature ---------------------------------------------------------------------------------


def valid_rows(rows: Tensor, mask: Tensor | None) -> Tensor:
    """Rows (..., d) as (N, d): zero where a bool mask is False, times sqrt(w) for weights w."""
    flat = rows.reshape(-1, rows.shape[-1])
    if mask is None:
        return flat
    weight = mask.reshape(-1, 1)
    # A masked row may hold anything, also what is not finite.
    flat = flat.masked_fill(weight == 0, 0)
    return flat if mask.dtype == torch.bool else flat * weight.to(flat.dtype).sqrt()


def kron_accumulate(
    factor: Tensor,
    rows: Tensor,
    *,
    alpha: float | Tensor = 1.0,
    beta: float | Tensor = 1.0,
    mask: Tensor | None = None,
) -> Tensor:
    """beta factor + alpha sum_i w_i x_i x_i^T over rows x_i of (..., d); w from the mask."""
    x = valid_rows(rows.to(factor.dtype), mask)
    return beta * factor + alpha * (x.T @ x)


def low_rank_update(factor: Tensor, rows: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """U_k S_k of the thin SVD of H = [factor, rows^T]: the best rank-k L for L L^T ~ H H^T."""
    h = torch.cat([factor, valid_rows(rows.to(factor.dtype), mask).T], dim=1)
    u, s, _ = torch.linalg.svd(h, full_matrices=False)
    k = factor.shape[1]
    return F.pad(u[:, :k] * s[:k], (0, max(0, k - s.numel())))


# --- predict -----------------------------------------------------------------------------------


def logit_noise(
    key: Tensor,
    rows: int,
    n_samples: int,
    classes: int,
    *,
    stream: int = 0,
    row0: int = 0,
    ids: Tensor | None = None,
    antithetic: bool = False,
) -> Tensor:
    """The normals (rows, n_samples, classes) that `mc_predict` uses, fp32, materialised."""
    draws = (n_samples + 1) // 2 if antithetic else n_samples
    groups = (draws + 3) // 4
    base = subkey(key, stream, 4)
    row = row_ids(rows, row0, 1, ids, key.device)
    words = philox(base, row)  # row by row: fold_in(base, row)
    noise = []
    for w in words:
        folded = torch.stack([w[0] | (w[1] << 32), w[2] | (w[3] << 32)])
        blocks = normal(folded, (groups, classes, 4))
        noise.append(blocks.transpose(1, 2).reshape(4 * groups, classes)[:draws])
    if not noise:
        return torch.empty(0, n_samples, classes, device=key.device)
    eps = torch.stack(noise)
    return torch.stack([eps, -eps], dim=2).flatten(1, 2)[:, :n_samples] if antithetic else eps


def semidefinite_cholesky(cov: Tensor) -> Tensor:
    """Lower L with L L^T = cov for positive semi-definite matrices (..., n, n); reads the lower part.

    No jitter is added. With eps the rounding unit of cov's dtype and d = cov[j, j], column j of L is
    zero where its pivot is at most 4 n eps d: a singular matrix is factorised exactly, without the
    directions that have no variance. A pivot below -sqrt(eps) d, or one that is not finite, means
    that cov is no covariance: L is NaN.
    """
    n, eps = cov.shape[-1], torch.finfo(cov.dtype).eps
    a = wide(cov)
    lower = torch.zeros_like(a)
    bad = torch.zeros(cov.shape[:-2], dtype=torch.bool, device=a.device)
    for j in range(n):
        row = lower[..., j, :j]
        column = a[..., j:, j] - (lower[..., j:, :j] @ row[..., None]).squeeze(-1)
        pivot, diagonal = column[..., 0], a[..., j, j]
        bad = bad | ~(pivot >= -math.sqrt(eps) * diagonal) | ~(diagonal < math.inf)
        kept = pivot > 4 * n * eps * diagonal
        scale = torch.where(kept, pivot, 1.0).rsqrt()
        lower[..., j:, j] = torch.where(kept[..., None], column * scale[..., None], 0.0)
    return torch.where(bad[..., None, None], math.nan, lower).to(cov)


def sampled_logits(mean: Tensor, cov: Tensor, eps: Tensor) -> Tensor:
    """z (B, S, C) ~ N(mean, cov) from normals eps; cov (B, C) variances or (B, C, C)."""
    if cov.dim() == 2:
        return mean[:, None] + cov.sqrt()[:, None] * eps
    return mean[:, None] + eps @ semidefinite_cholesky(cov).mT


def mc_predict(
    mean: Tensor, cov: Tensor, eps: Tensor, *, antithetic: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """log of the mean softmax (B, C), its entropy (B,), the mean entropy (B,), standard error (B, C).

    eps (B, S, C) normals; with antithetic, samples 2k and 2k + 1 are a pair.
    """
    logp = torch.log_softmax(sampled_logits(mean, cov, eps), dim=-1)
    samples = eps.shape[1]
    log_probs = torch.logsumexp(logp, dim=1) - math.log(samples)
    p = logp.exp()
    entropy = -torch.special.xlogy(log_probs.exp(), log_probs.exp()).sum(-1)
    expected = -torch.special.xlogy(p, p).sum(-1).mean(1)
    draws = (p[:, 0::2] + p[:, 1::2]) / 2 if antithetic else p
    count = draws.new_full((), draws.shape[1])
    squares = (draws - draws.mean(1, keepdim=True)).square().sum(1)
    error = (squares / (count - 1) / count).sqrt()  # NaN for a single draw
    return log_probs, entropy, expected, error


def linear_logits(
    features: Tensor,
    weight_mean: Tensor,
    weight_scale: Tensor | tuple[Tensor, Tensor],
    noise_var: Tensor | float | None = None,
    *,
    covariance: str = "diagonal",
) -> tuple[Tensor, Tensor]:
    """Mean and variance (B, C) of logits of features (B, D) under N(weight_mean_c, S_c) weights."""
    mean = features @ weight_mean.T
    if covariance == "diagonal":
        assert isinstance(weight_scale, Tensor)
        var = features.square() @ weight_scale.square().T
    elif covariance == "low_rank":
        factor, variances = weight_scale
        projected = torch.einsum("bd,cdk->bck", features, factor)
        var = projected.square().sum(-1) + features.square() @ variances.T
    elif covariance == "dense":
        assert isinstance(weight_scale, Tensor)
        d = features.shape[1]
        lower = weight_scale
        if weight_scale.dim() == 2:
            i, j = torch.tril_indices(d, d, device=features.device)
            lower = weight_scale.new_zeros(len(weight_scale), d, d)
            lower[:, i, j] = weight_scale
        var = torch.einsum("bi,cij->bcj", features, lower.tril()).square().sum(-1)
    else:
        raise ValueError(
            f"covariance must be 'diagonal', 'low_rank' or 'dense', got {covariance!r}"
        )
    return mean, var if noise_var is None else var + noise_var
