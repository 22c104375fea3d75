"""Bytes that the CUDA kernels move to and from global memory, counted by the emulator.

    python python_tests/csrc/traffic.py            # a table: counted, formula, what must move
    python python_tests/csrc/traffic.py --json     # the same for test_counters.py

A process of its own: it loads the emulator whose kernels are compiled to report every access
(csrc/simt/access_count.cpp), which registers the same ops as the one of all other tests.

Three levels are counted. `bytes`: what warps ask for, 32 lanes at a time. `l2`: sectors of 32 bytes that
the second-level cache is asked for if the first level keeps what a block has read, and all stores.
`memory`: sectors that memory reads and writes if the second level keeps what a launch has touched, less
what the launch discards. Each case has figures to compare with. `least`: every input read once and every
result written once, which is what must come from and go to memory; the figure of a roofline. `expected`:
what the design asks for, as terms of the shapes with their reasons; the rest of it are re-reads, mostly
of small operands that stay in the caches. Where the count is above `expected`, a kernel reads something
again.
"""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bayes_kernels import _library, random

LIBRARY = "libbayes_kernels_sim_traffic.so"
F32, F64, ITEM = 4, 8, 48

GRID = 256  # as in the kernels: blocks of 128 threads that a plan aims at


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


@dataclass(frozen=True)
class Case:
    """One call of an op.

    Attributes:
        step: the call.
        least: bytes of its inputs and results, each once.
        expected: bytes that the kernels ask for, by reason.
        l2: the same of the second-level cache.
        memory: bytes that memory reads and writes, where more than `least`.
    """

    step: Callable[[], object]
    least: int
    expected: Mapping[str, int]
    l2: Mapping[str, int] | None = None
    memory: int | None = None


@dataclass
class Count:
    """Bytes and sectors of 32 bytes, loads and stores together."""

    bytes: int
    sectors: int
    l2: int
    memory: int
    kernels: dict[str, tuple[int, ...]]


class Counter:
    """The emulator that counts."""

    def __init__(self) -> None:
        path = _library.find_library(LIBRARY)
        if path is None:
            raise ImportError(f"{LIBRARY} is not built; build with BAYES_KERNELS_TESTS=ON")
        _library.simulator_library = LIBRARY
        if _library.load_simulator() is None:
            raise ImportError(f"{path} could not be loaded")
        library = ctypes.CDLL(str(path))
        self._reset = library.bayes_kernels_sim_reset_traffic
        self._traffic = library.bayes_kernels_sim_traffic
        self._traffic.restype = ctypes.c_uint64
        self._traffic.argtypes = [
            ctypes.c_uint64, ctypes.POINTER(ctypes.c_char_p), ctypes.POINTER(ctypes.c_uint64),
        ]  # fmt: skip

    def of(self, step: Callable[[], object]) -> Count:
        """What the kernels of one call move."""
        self._reset()
        with _library.simulator():
            step()
        name, numbers = ctypes.c_char_p(), (ctypes.c_uint64 * 8)()
        found: dict[str, tuple[int, ...]] = {}
        index = 0
        while index < self._traffic(index, ctypes.byref(name), numbers):
            assert name.value is not None
            found[name.value.decode()] = tuple(numbers)
            index += 1
        totals = [sum(k[i] for k in found.values()) for i in range(8)]
        return Count(
            bytes=totals[1] + totals[2],
            sectors=totals[3] + totals[4],
            l2=32 * (totals[5] + totals[4]),
            memory=32 * (totals[6] + totals[7]),
            kernels=found,
        )


# --- inputs ----------------------------------------------------------------------------------------

_generator = torch.Generator().manual_seed(0)


def normal(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*size, generator=_generator).to(dtype)


def size_of(*tensors: Tensor | None) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


# --- noise -----------------------------------------------------------------------------------------


def noise_cases() -> dict[str, Case]:
    key, rho = random.key(1), normal(8, 1024)
    n = rho.numel()
    warps = ceil_div(n, 4 * 32)  # a lane makes four normals, and every warp reads the key
    return {
        "normal (8, 1024)": Case(
            lambda: _library.ops.normal(key, 0, [8, 1024]),
            n * F32,
            {"the result": n * F32, "the key, for each warp": 16 * warps},
        ),
        "scaled_normal (8, 1024)": Case(
            lambda: _library.ops.scaled_normal(rho, 1024, key, 0, "square"),
            2 * n * F32,
            {"rho and the result": 2 * n * F32, "the key, for each warp": 16 * warps},
        ),
        "scaled_normal_backward (8, 1024)": Case(
            lambda: _library.ops.scaled_normal_backward(rho, rho, key, 0, "square"),
            3 * n * F32,
            {"rho, de and drho": 3 * n * F32, "the key, for each warp": 16 * warps},
        ),
    }


# --- activations in 8 bits --------------------------------------------------------------------------


def activation_cases(dtype: torch.dtype, tokens: int, n: int) -> dict[str, Case]:
    """Both ops are one pass; n is a multiple of 32, so that no thread is without columns."""
    key, x = random.key(1), normal(tokens, n, dtype=dtype)
    codes, scales = _library.ops.quantize_activations(x, key, 0, 0)
    warps = ceil_div(codes.numel(), 8 * 32 * 4)  # 4 groups of 8 columns for each thread
    kept, name = size_of(codes, scales), f"T{tokens} n{n} {str(dtype).removeprefix('torch.')}"
    return {
        f"quantize_activations {name}": Case(
            lambda: _library.ops.quantize_activations(x, key, 0, 0),
            size_of(x) + kept,
            {"x, codes and scales": size_of(x) + kept, "the key, for each warp": 16 * warps},
        ),
        f"dequantize_activations {name}": Case(
            lambda: _library.ops.dequantize_activations(codes, scales, dtype),
            size_of(x) + kept,
            # The four threads of a scale block ask for its scale in one request of their warp.
            {"x, codes and scales": size_of(x) + kept},
        ),
    }


# --- adapter ---------------------------------------------------------------------------------------
#
# x (T, n) or y (T, m) are read or written once whatever the rank up to 16 (fp32 shrink and
# expand_backward; each sixteen ranks read x again) or 32. Beside that: factors once for each block of
# tokens, h once for each warp or block of columns, partial sums of split reductions. Tickets are a few
# bytes.


@dataclass(frozen=True)
class Layer:
    """T tokens of n features, rank r."""

    tokens: int
    n: int
    r: int
    dtype: torch.dtype
    noise: bool
    drawn: bool = False  # its matrix is made by the op

    @property
    def item(self) -> int:
        return self.dtype.itemsize

    @property
    def wide(self) -> bool:
        return self.dtype == torch.float32

    @property
    def rows(self) -> int:
        """Bytes of activations."""
        return self.tokens * self.n * self.item

    @property
    def matrices(self) -> int:
        """Factors: with noise its matrix too."""
        return 2 if self.noise else 1

    @property
    def factors(self) -> int:
        return self.matrices * self.r * self.n * F32

    @property
    def h(self) -> int:
        return self.tokens * self.r * F32

    @property
    def fragments(self) -> int:
        """A packed factor: 16 bits, whole runs of 128 columns."""
        return self.padded * 128 * ceil_div(self.n, 128) * 2

    @property
    def run(self) -> int:
        """Ranks for which fp32 shrink and expand_backward read x once."""
        return 8 if self.r <= 8 else 16

    @property
    def padded(self) -> int:
        """The rank of the kernels: 8, 16, 32 or 64."""
        return next(r for r in (8, 16, 32, 64) if self.r <= r)


def root_of(parts: int) -> int:
    return next(g for g in range(3, parts + 3) if g * g >= parts)


def first_step(parts: int) -> int:
    """Sums of the first of two steps, which add more than eight parts, in groups of about their root."""
    group = root_of(parts)
    return 0 if parts <= 8 else ceil_div(parts, group) - (parts % group == 1)


def partial_sums(splits: int, padded: int, result: int) -> int:
    """Partial sums written and read, in two steps where there are many; the result is written once."""
    return (2 * (splits + first_step(splits)) * padded if splits > 1 else 0) + result


def tokens_of_block(tokens: int, column_blocks: int) -> int:
    return 32 * ceil_div(ceil_div(tokens, max(1, GRID // column_blocks)), 32)


def down_shape(at: Layer) -> tuple[int, int]:
    """Blocks of tokens and splits of the columns of `down` on tensor cores."""
    tiles = ceil_div(at.n, 128)
    if not at.noise:
        warps = 2 if at.padded <= 16 else 4
        while warps > 1 and ceil_div(at.tokens, 32 * warps) < GRID // 4:
            warps //= 2
        return ceil_div(at.tokens, 32 * warps), 1

    def shape(warps: int) -> tuple[int, int, int]:
        blocks, quantum = ceil_div(at.tokens, 32 * warps), 8 // warps
        wanted = max(1, GRID // 2 // blocks)
        splits = ceil_div(tiles, quantum * ceil_div(ceil_div(tiles, wanted), quantum))
        group = root_of(splits)
        serial = 0 if splits == 1 else splits if splits <= 8 else group + ceil_div(splits, group)
        sums = 2 * splits * at.tokens if splits > 1 else 0
        return blocks * tiles * 128 + sums + 128 * serial * 32 * warps, blocks, splits

    return min((shape(warps) for warps in (1, 2, 4, 8)), key=lambda found: found[0])[1:]


def shrink(at: Layer, *, l2: bool = False) -> dict[str, int]:
    """h (T, r) = x F^T."""
    if at.wide:
        groups = ceil_div(at.r, at.run)
        passes = ceil_div(at.n, 128 * (8 if at.noise and at.run == 16 else 16))
        splits = min(passes, max(1, GRID // 2 // groups)) if at.drawn else 1
        tokens = ceil_div(at.tokens * groups * splits, GRID // 2)
        quantum = 8 if tokens < 32 else 32
        tokens = quantum * ceil_div(tokens, quantum)
        if splits < passes:
            tokens = min(32, tokens)
        return {
            "x, for each sixteen ranks": groups * at.rows,
            "factors, for each block of tokens": ceil_div(at.tokens, tokens) * at.factors,
            "h, once": partial_sums(splits, at.tokens * at.run * groups * F32, at.h),
        }
    blocks, splits = down_shape(at)
    again = blocks if l2 else ceil_div(at.tokens, 32)
    factors = (
        {
            "factors, to be packed": at.factors,
            "packed factors, and for each 32 tokens, or block of tokens": (1 + again)
            * 2
            * at.fragments,
        }
        if at.noise
        else {"factors, for each 32 tokens, or block of tokens": again * at.factors}
    )
    return {
        **factors,
        "x, once": at.rows,
        "h, in partial sums": partial_sums(splits, at.tokens * at.padded * F32, at.h),
    }


def tile(
    at: Layer, *, up: bool, base: bool, down: bool, outer: bool, l2: bool = False
) -> dict[str, int]:
    """expand (up), shrink_backward (up and outer), expand_backward (down and outer)."""
    walks_ranks = at.wide and down
    if at.wide:
        most = 32 if up and outer else 64
        width = 512 if walks_ranks else 128 * max(1, min(4, most // at.padded))
    else:
        width = 256
    blocks, groups = ceil_div(at.n, width), ceil_div(at.r, at.run) if walks_ranks else 1
    tokens = tokens_of_block(at.tokens, blocks * groups)
    splits = ceil_div(at.tokens, tokens)
    part = at.run * groups if walks_ranks else at.padded
    passes = groups if walks_ranks else 1
    terms = {
        "x, dx, base, y or dy, once": passes * (1 + (base or (up and outer))) * at.rows,
        "factors, for each block of tokens": splits * at.factors,
        "h, for each block, or warp, of columns": (blocks if at.wide or l2 else ceil_div(at.n, 64))
        * at.h,
    }
    if at.drawn:  # the noise matrix in fragments
        terms["rho, and E written"] = at.factors // 2 + at.fragments
        terms["factors, for each block of tokens"] = splits * (
            at.factors // 2 + at.padded * 2 * 64 * ceil_div(at.n, 64)
        )
    if down:
        terms["dh, in partial sums"] = partial_sums(blocks, at.tokens * part * F32, at.h)
    if outer:
        # Written and read even where there is one split.
        columns = blocks * width if at.wide else 64 * ceil_div(at.n, 64)
        written = at.matrices * splits * columns * part * F32
        read = at.matrices * 4 * ceil_div(at.n, 4) * 4 * ceil_div(at.r, 4) * F32
        again = (splits + 2 * first_step(splits)) * read
        terms["gradients, in partial sums"] = written + again + at.factors
    return terms


def merged(*parts: Mapping[str, int]) -> dict[str, int]:
    """Terms of several kernels; equal reasons are added up."""
    found: dict[str, int] = {}
    for part in parts:
        for reason, number in part.items():
            found[reason] = found.get(reason, 0) + number
    return found


def adapter_cases(dtype: torch.dtype, tokens: int, n: int, r: int) -> dict[str, Case]:
    """The four products of a layer with noise (of its expansion without: it has none)."""
    noisy, plain = (Layer(tokens, n, r, dtype, noise) for noise in (True, False))
    key = random.key(1)
    noise = (key, 0, 0, 1, None, 0.0)
    x, base = normal(tokens, n, dtype=dtype), normal(tokens, n, dtype=dtype)
    a, e, b, h = normal(r, n), normal(r, n), normal(n, r), normal(tokens, r)
    name = f"T{tokens} n{n} r{r} {str(dtype).removeprefix('torch.')}"
    steps = {
        "adapter_shrink": lambda: _library.ops.adapter_shrink(x, a, e, *noise),
        "adapter_shrink_backward": lambda: _library.ops.adapter_shrink_backward(
            h, x, a, e, *noise, True, True, True
        ),
        "adapter_expand": lambda: _library.ops.adapter_expand(h, b, base, 2.0, dtype),
        "adapter_expand_backward": lambda: _library.ops.adapter_expand_backward(
            base, h, b, 2.0, True, True
        ),
    }
    least, memory = least_of(noisy, plain), memory_of(noisy, plain)
    asked = (products(noisy, plain, l2=False), products(noisy, plain, l2=True))
    return {
        f"{op} {name}": Case(step, least[op], asked[0][op], asked[1][op], memory[op])
        for op, step in steps.items()
    }


def products(noisy: Layer, plain: Layer, *, l2: bool) -> dict[str, dict[str, int]]:
    """Of the four ops what they ask for."""
    return {
        "adapter_shrink": shrink(noisy, l2=l2),
        "adapter_shrink_backward": tile(noisy, up=True, base=False, down=False, outer=True, l2=l2),
        "adapter_expand": tile(plain, up=True, base=True, down=False, outer=False, l2=l2),
        "adapter_expand_backward": tile(plain, up=False, base=False, down=True, outer=True, l2=l2),
    }


def least_of(noisy: Layer, plain: Layer) -> dict[str, int]:
    """Of the four ops what must move."""
    return {
        "adapter_shrink": noisy.rows + noisy.factors + noisy.h,
        "adapter_shrink_backward": 2 * noisy.rows + 2 * noisy.factors + noisy.h,
        "adapter_expand": 2 * plain.rows + plain.factors + plain.h,
        "adapter_expand_backward": plain.rows + 2 * plain.factors + 2 * plain.h,
    }


def memory_of(noisy: Layer, plain: Layer) -> dict[str, int]:
    """Of the four ops what memory reads and writes: fragments more, which a launch writes for the next one.
    Partial sums are discarded once they have been read."""
    found = least_of(noisy, plain)
    if not noisy.wide:
        found["adapter_shrink"] += 4 * noisy.fragments
    if noisy.drawn:
        found["adapter_shrink_backward"] += 2 * noisy.fragments + noisy.factors // 2
    return found


def over_least(tokens: int, n: int, r: int) -> dict[str, tuple[float, float, float]]:
    """Of the four ops in bf16, their noise drawn: requests of warps, what the second-level cache is asked
    for, and what memory moves, each over what must move."""
    noisy, plain = (Layer(tokens, n, r, torch.bfloat16, noise, noise) for noise in (True, False))
    warps, l2 = (products(noisy, plain, l2=level) for level in (False, True))
    least, memory = least_of(noisy, plain), memory_of(noisy, plain)
    return {
        op: (
            sum(warps[op].values()) / least[op],
            sum(l2[op].values()) / least[op],
            memory[op] / least[op],
        )
        for op in least
    }


def layer_cases(tokens: int, n: int, m: int, r: int) -> dict[str, Case]:
    """A BLoB layer of bf16 activations forward and backward: 3 + 4 launches."""
    dtype = torch.bfloat16
    noisy, expanding = Layer(tokens, n, r, dtype, True, True), Layer(tokens, m, r, dtype, False)
    x, base = normal(tokens, n, dtype=dtype), normal(tokens, m, dtype=dtype)
    a, rho, b, h = normal(r, n), normal(r, n), normal(m, r), normal(tokens, r)
    noise = (random.key(1), 0, 0, 1, None, 0.0, "square", 2.0)
    name = f"T{tokens} n{n} m{m} r{r} bfloat16"
    return {
        f"adapter_forward {name}": Case(
            lambda: _library.ops.adapter_forward(x, a, rho, b, base, *noise),
            size_of(x, a, rho, b, h) + 2 * size_of(base),
            merged(shrink(noisy), tile(expanding, up=True, base=True, down=False, outer=False)),
        ),
        f"adapter_backward {name}": Case(
            lambda: _library.ops.adapter_backward(
                base, x, a, rho, b, h, *noise, True, True, True, True
            ),
            2 * size_of(x, a, rho, b) + size_of(base, h),
            merged(
                tile(expanding, up=False, base=False, down=True, outer=True),
                tile(noisy, up=True, base=False, down=False, outer=True),
                {"rho, for its gradient": size_of(rho)},
            ),
        ),
    }


def decode(tokens: int, n: int, sizes: list[tuple[int, int]], dtype: torch.dtype) -> dict[str, int]:
    """Several adapters (m, r) with noise in one launch, each of splits x slices blocks."""
    padded = next(t for t in (1, 4, 16) if tokens <= t)
    chunks = ceil_div(n, 128)
    terms = {
        "x, factors and rho, for each slice": 0,
        "h, in partial sums": 0,
        "b, base and y, once": 0,
    }
    for m, r in sizes:
        alone = chunks <= 4 and r * n <= 8192
        splits = 1 if alone else ceil_div(chunks, min(4, ceil_div(chunks, 32)))
        slices = min(ceil_div(m * r, 8192), max(1, 256 // splits), 16)
        slices = ceil_div(m, 32 * ceil_div(ceil_div(m, slices), 32))
        terms["x, factors and rho, for each slice"] += slices * (
            tokens * n * dtype.itemsize + 2 * r * n * F32
        )
        if not alone:
            terms["h, in partial sums"] += 2 * slices * chunks * r * padded * F32
        terms["b, base and y, once"] += m * r * F32 + 2 * tokens * m * dtype.itemsize
    return terms


def group_cases(
    tokens: int, n: int, sizes: list[tuple[int, int]], dtype: torch.dtype
) -> dict[str, Case]:
    """A few tokens through adapters that share x."""
    x = normal(tokens, n, dtype=dtype)
    a, rho = ([normal(r, n) for _, r in sizes] for _ in range(2))
    b = [normal(m, r) for m, r in sizes]
    base = [normal(tokens, m, dtype=dtype) for m, _ in sizes]
    name = f"T{tokens} n{n} {' '.join(f'm{m} r{r}' for m, r in sizes)} {str(dtype)[6:]}"
    streams, scaling = list(range(len(sizes))), [1.0] * len(sizes)
    return {
        f"adapter_group {name}": Case(
            lambda: _library.ops.adapter_group(
                x,
                a,
                rho,
                b,
                base,
                random.key(1),
                streams,
                0,
                1,
                None,
                0.0,
                "square",
                scaling,
                False,
            ),
            size_of(x, *a, *rho, *b, *base, *base),
            decode(tokens, n, sizes, dtype),
        )
    }


# --- divergence ------------------------------------------------------------------------------------


def divergence_cases() -> dict[str, Case]:
    layers, r, n = 4, 8, 1280
    means, rhos = ([normal(r, n) for _ in range(layers)] for _ in range(2))
    weight = torch.tensor(0.5)
    numbers = layers * r * n
    warps = layers * ceil_div(r * n, 4096) * 8
    priors = [0.2] * layers
    name = f"{layers} x ({r}, {n})"
    return {
        f"gaussian_kl {name}": Case(
            lambda: _library.ops.gaussian_kl(means, rhos, priors, "square", "elbo"),
            2 * numbers * F32 + F64,
            {"means and rhos, once": 2 * numbers * F32, "partial sums": 2 * warps // 8 * F64 + F64},
        ),
        f"gaussian_kl_backward {name}": Case(
            lambda: _library.ops.gaussian_kl_backward(
                weight, means, rhos, priors, "square", "elbo"
            ),
            4 * numbers * F32,
            {
                "both, and their gradients": 4 * numbers * F32,
                "the weight, for each warp": warps * F32,
            },
        ),
        f"gaussian_kl_step_ {name}": Case(
            lambda: _library.ops.gaussian_kl_step_(
                [m.clone() for m in means],
                [q.clone() for q in rhos],
                weight,
                priors,
                "square",
                "elbo",
            ),
            4 * numbers * F32,
            {"both, read and written": 4 * numbers * F32, "the weight, for each warp": warps * F32},
        ),
    }


# --- tall ------------------------------------------------------------------------------------------


def tall_cases() -> dict[str, Case]:
    """Two passes: Gram matrices, then products with what the small solve gives."""
    layers, n, r = 3, 1536, 16
    xs = [torch.linalg.qr(normal(n, r))[0].contiguous() for _ in range(layers)]
    ds = [0.01 * normal(n, r) for _ in range(layers)]
    lr, lam = torch.tensor(0.1, dtype=torch.float64), torch.tensor(0.5, dtype=torch.float64)
    matrix, square, splits = layers * n * r * F32, layers * r * r * F64, ceil_div(n, 512)
    name = f"{layers} x ({n}, {r})"

    def small(kinds: int, coefficients: int) -> dict[str, int]:
        # A block has 8 warps; each reads its item of the list.
        return {
            "Gram matrices of 512 rows, written and read": 2 * splits * kinds * square,
            "coefficients, written, and read for each 512 rows": (1 + splits)
            * coefficients
            * square,
            "the list of matrices, for each warp": (1 + 8 * (1 + splits)) * layers * ITEM,
        }

    def copies() -> list[Tensor]:
        return [x.clone() for x in xs]

    return {
        f"tall_gram {name}": Case(
            lambda: _library.ops.tall_gram(xs), matrix, {"x": matrix, **small(1, 0)}
        ),
        f"tall_retract_ {name}": Case(
            lambda: _library.ops.tall_retract_(copies(), ds, "polar"),
            3 * matrix,
            {
                "x and d for the Gram matrix": 2 * matrix,
                "x and d again for the product, x written": 3 * matrix,
                "p, written and read": 2 * square,
                **small(1, 1),
            },
        ),
        f"tall_stiefel_step_ {name}": Case(
            lambda: _library.ops.tall_stiefel_step_(copies(), ds, lr, "polar"),
            3 * matrix,
            {
                "x, d for x'x, x'd, d'd": 4 * matrix,
                "x and d again for the product, x written": 3 * matrix,
                "p and a, written and read, and their product": (r + 6) * square,
                **small(3, 2),
            },
        ),
        f"tall_landing_field {name}": Case(
            lambda: _library.ops.tall_landing_field(xs, ds, lam),
            3 * matrix,
            {
                "x, d for x'x, x'd": 3 * matrix,
                "x and d again for the product, the field": 3 * matrix,
                **small(2, 2),
            },
        ),
    }


# --- predict ---------------------------------------------------------------------------------------


def predict_terms(rows: int, classes: int, samples: int) -> dict[str, int]:
    """A softmax of Gaussian logits with variances; nothing of the size samples x classes is stored."""
    row, key = rows * classes * F32, 16
    groups = ceil_div(samples, 4)
    small, held = classes <= 32, classes <= 2048
    least, most = (32, 128) if small else (4, 16) if held else (64, 16)
    each = ceil_div(groups, min(ceil_div(groups, least), most))
    ranges = ceil_div(groups, 32 * ceil_div(each, 32) if small else each)
    sums = {
        "sums of each range, written and read": 4 * ranges * row,
        "the mean and the result at the end": 2 * row,
        "entropies": rows * (2 * (ranges if held else groups) * F64 + 2 * F32),
    }
    if held:  # one launch; a warp of few classes, else a block of two classes a thread, has a range
        warps = ranges if small else ranges * min(8, ceil_div(classes, 64))
        blocks = (
            ceil_div(ranges, min(8, (40 << 10) // (classes * 6 * 32 * F32))) if small else ranges
        )
        return {
            "mean three times and variances, for each block": 4 * blocks * row,
            "the key, for each warp": rows * warps * key,
            **sums,
        }
    warps = ceil_div(classes, 32)
    return {
        "mean three times and variances": 4 * row,
        "scale and log-weight, written": 2 * row,
        "scale and log-weight, for each 4 samples": 2 * groups * row,
        "normalisers of 4 samples, written": groups * rows * 4 * F32,
        "scale and log-weight, for each range": 2 * ranges * row,
        "normalisers, for each 32 classes": groups * rows * warps * 4 * F32,
        "key and mode, for each warp": rows * (groups * 8 + ranges * warps) * (key + 4),
        "what was prepared of a row": rows * (1 + 8) * 12,
        **sums,
    }


def predict_cases() -> dict[str, Case]:
    cases = {}
    key = random.key(1)
    for rows, classes, samples in ((16, 5, 1000), (4, 640, 64), (1, 2100, 24)):
        mean, cov = normal(rows, classes), normal(rows, classes).square()
        cases[f"mc_predict S{samples} B{rows} C{classes}"] = Case(
            lambda mean=mean, cov=cov, samples=samples: _library.ops.mc_predict(  # type: ignore[misc]
                mean, cov, key, 0, 0, None, samples, False, False
            ),
            3 * rows * classes * F32 + 2 * rows * F32,
            predict_terms(rows, classes, samples),
        )
    return cases


# --- curvature -------------------------------------------------------------------------------------


def curvature_cases() -> dict[str, Case]:
    """H = [factor, rows'] is read for its Gram matrix and for the product with its eigenvectors."""
    layers, d, k, b = 2, 2048, 10, 4
    factors, rows = [normal(d, k) for _ in range(layers)], [normal(b, d) for _ in range(layers)]
    c, splits = k + b, ceil_div(d, 1024)
    return {
        f"low_rank_update_ {layers} x ({d}, {k}), {b} rows": Case(
            lambda: _library.ops.low_rank_update_([f.clone() for f in factors], rows),
            layers * d * (2 * k + b) * F32,
            {
                "factor and rows for the Gram matrix": layers * d * c * F32,
                "factor and rows again, factor written": layers * d * (c + k) * F32,
                "Gram matrices of 1,024 rows, written and read": 2 * layers * splits * c * c * F64,
                "eigenvectors, written, and read for each 256 rows": layers
                * (1 + ceil_div(d, 256))
                * c
                * k
                * F64,
            },
        )
    }


# --- the table -------------------------------------------------------------------------------------


def all_cases() -> dict[str, Case]:
    """Small versions of the shapes of cuda_benchmarks."""
    return {
        **noise_cases(),
        **adapter_cases(torch.float32, 96, 1024, 8),
        **adapter_cases(torch.bfloat16, 160, 1024, 8),
        **adapter_cases(torch.bfloat16, 512, 1024, 16),
        **adapter_cases(torch.bfloat16, 512, 1024, 32),
        **adapter_cases(torch.float32, 40, 200, 20),
        **adapter_cases(torch.bfloat16, 40, 200, 20),
        **activation_cases(torch.bfloat16, 64, 1024),
        **activation_cases(torch.float32, 64, 1024),
        **layer_cases(160, 1024, 512, 8),
        **group_cases(1, 4096, [(1024, 8), (256, 8), (256, 8)], torch.bfloat16),
        **group_cases(3, 1024, [(1024, 16), (4096, 4)], torch.float32),
        **divergence_cases(),
        **tall_cases(),
        **predict_cases(),
        **curvature_cases(),
    }


def measure() -> dict[str, dict[str, object]]:
    """All cases: counted bytes and sectors, and what they are compared with."""
    counter = Counter()
    found: dict[str, dict[str, object]] = {}
    for name, case in all_cases().items():
        count = counter.of(case.step)
        found[name] = {
            "bytes": count.bytes,
            "sectors": count.sectors,
            "l2": count.l2,
            "memory": count.memory,
            "expected": dict(case.expected),
            "expected_l2": dict(case.l2) if case.l2 is not None else None,
            "expected_memory": case.memory,
            "least": case.least,
            "kernels": count.kernels,
        }
    return found


def main() -> None:
    found = measure()
    if "--json" in sys.argv[1:]:
        json.dump(found, sys.stdout)
        return
    print(
        "| case | requested bytes | over the formula | must move, bytes | requested / must "
        "| of L2 / must | of memory / must | sectors x 32 / requested |"
    )
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name, row in found.items():
        asked, least = int(str(row["bytes"])), int(str(row["least"]))
        design = sum(row["expected"].values())  # type: ignore[attr-defined]
        sectors = 32 * int(str(row["sectors"])) / asked
        print(
            f"| {name} | {asked:,} | {asked / design:.3f} x {design:,} | {least:,} "
            f"| {asked / least:.2f} | {int(str(row['l2'])) / least:.2f} "
            f"| {int(str(row['memory'])) / least:.2f} | {sectors:.2f} |"
        )


if __name__ == "__main__":
    main()
