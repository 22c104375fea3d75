"""Kernels whose blocks add up each other's sums: the same bits in whatever order blocks come.

The last block of a group, found by a ticket, adds the parts of all. On a GPU any block may be last; the
emulator runs blocks and threads forward, backward and shuffled.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import Tensor

from bayes_kernels import _library, random
from bayes_kernels import functional as F

FORWARD, REVERSE, RANDOM = 0, 1, 2

# Tokens, n, m, rank: several blocks of columns and of tokens in every product; partial tiles.
SHAPES = [(33, 1100, 600, 8), (200, 530, 300, 20), (70, 1030, 530, 64), (5, 1100, 2100, 12)]


@pytest.fixture
def in_order() -> Iterator[Callable[[int, int], None]]:
    """Sets the order of blocks and threads, and its seed; put back afterwards."""
    path = _library.find_library("libbayes_kernels_sim.so")
    if path is None or _library.load_simulator() is None:
        pytest.skip("the emulator library is not built")
    library = ctypes.CDLL(str(path))
    library.bayes_kernels_sim_set_seed.argtypes = [ctypes.c_uint64]
    library.bayes_kernels_sim_get_seed.restype = ctypes.c_uint64
    order, seed = library.bayes_kernels_sim_get_order(), library.bayes_kernels_sim_get_seed()

    def choose(order: int, seed: int) -> None:
        assert library.bayes_kernels_sim_set_order(order) == 0
        library.bayes_kernels_sim_set_seed(seed)

    with _library.simulator():
        yield choose
    choose(order, seed)


def layer(shape: tuple[int, int, int, int], dtype: torch.dtype, noise: bool) -> list[Tensor]:
    """A layer's output and all its gradients."""
    tokens, n, m, r = shape
    generator = torch.Generator().manual_seed(0)

    def leaf(*size: int, of: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(size, generator=generator).to(of).requires_grad_()

    x, base = leaf(tokens, n, of=dtype), leaf(tokens, m, of=dtype)
    a, rho, b = leaf(r, n), leaf(r, n), leaf(m, r)
    if noise:
        leaves = [x, a, rho, b, base]
        y = F.flipout_lora(x, a, rho, b, base, key=random.key(3), dropout=0.1)
    else:
        leaves = [x, a, b, base]
        y = F.lora(x, a, b, base)
    return [y.detach(), *torch.autograd.grad(y, leaves, torch.ones_like(y))]


def many(shape: tuple[int, int], spread: float, samples: int) -> list[Tensor]:
    """Predictions whose ranges are several warps' or blocks'."""
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(shape, generator=generator)
    cov = spread * torch.randn(shape, generator=generator).square()
    return [
        *F.mc_predict(mean, cov, n_samples=samples, key=random.key(3), return_standard_error=True)
    ]


def full() -> list[Tensor]:
    cov = (torch.eye(9) + 0.2).expand(1, 9, 9).contiguous()
    p = F.mc_predict(torch.arange(9.0)[None], cov, n_samples=600, key=random.key(3))
    return [p.log_probs, p.entropy, p.expected_entropy]


def divergence() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    means = [torch.randn(size, generator=generator) for size in ((3, 2800), (5000,), (7,))]
    rhos = [torch.rand(m.shape, generator=generator) + 0.1 for m in means]
    return [_library.ops.gaussian_kl(means, rhos, [0.2], "square", "elbo")]


def curvature(d: int, k: int, rows: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    factors = [torch.randn(d, k, generator=generator) for _ in range(2)]
    F.low_rank_update_(factors, [torch.randn(rows, d, generator=generator) for _ in range(2)])
    return factors


def retraction(r: int) -> list[Tensor]:
    """Of a matrix that needs a second Gram matrix."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(600, r, generator=generator) * torch.logspace(0, -5, r)
    F.polar_retract_(xs := [(x @ torch.randn(r, r, generator=generator)).contiguous()])
    return xs


def grouped(dtype: torch.dtype) -> list[Tensor]:
    """Experts' rows in any order, over several blocks of columns and of rows."""
    generator = torch.Generator().manual_seed(0)
    sizes = {"x": (90, 1100), "a": (3, 9, 1100), "rho": (3, 9, 1100), "b": (3, 600, 9)}
    p = {k: 0.1 * torch.randn(size, generator=generator) for k, size in sizes.items()}
    p["x"] = p["x"].to(dtype)
    for t in p.values():
        t.requires_grad_()
    groups = torch.randint(0, 3, (90,), generator=generator)
    y = F.grouped_flipout_lora(*p.values(), groups=groups, key=random.key(3))
    draws = torch.tensor([3, 2, 7])
    drawn = F.gaussian_draws(p["a"][0], p["rho"][0, :, :1], draws, key=random.key(3))
    return [
        y.detach(),
        *torch.autograd.grad(y.float().square().sum(), list(p.values())),
        drawn.detach(),
        *torch.autograd.grad(drawn.square().sum(), [p["a"], p["rho"]]),
    ]


OTHERS: dict[str, Callable[[], list[Tensor]]] = {
    **{
        f"mc_predict {shape} {samples} {spread}": partial(many, shape, spread, samples)
        for shape, samples in (((3, 5), 1000), ((1, 32), 300), ((1, 2), 5000), ((1, 70), 120))
        for spread in (1.0, 100.0)
    },
    "mc_predict full": full,
    **{f"grouped {dtype}": partial(grouped, dtype) for dtype in (torch.float32, torch.bfloat16)},
    "gaussian_kl": divergence,
    **{
        f"low_rank_update_ {shape}": partial(curvature, *shape)
        for shape in ((130, 10, 4), (1100, 12, 4), (64, 20, 12), (60, 17, 20))
    },
    **{f"polar_retract_ {r}": partial(retraction, r) for r in (3, 17)},
}


@pytest.mark.parametrize("name", OTHERS)
def test_the_order_of_threads_changes_no_bit(
    name: str, in_order: Callable[[int, int], None]
) -> None:
    """A region of shared memory that two warps take, or a lost barrier, shows in another order, too."""
    in_order(FORWARD, 0)
    expected = OTHERS[name]()
    for order, seed in ((REVERSE, 0), (RANDOM, 1)):
        in_order(order, seed)
        for one, other in zip(OTHERS[name](), expected, strict=True):
            assert torch.equal(one, other), f"order {order}, seed {seed}"


@pytest.mark.parametrize("slot", [0, -1], ids=["own", "cleared"])
def test_tickets_of_few_tokens(slot: int, in_order: Callable[[int, int], None]) -> None:
    """Tickets of the library, which the last block sets back, or of the workspace, cleared before."""
    library = ctypes.CDLL(str(_library.find_library("libbayes_kernels_sim.so")))
    chosen = ctypes.c_int.in_dll(library, "bayes_kernels_sim_ticket_slot")
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 1100, generator=g)
    lists = [
        [torch.randn(size, generator=g) for size in sizes]
        for sizes in (((8, 1100), (3, 1100)), ((8, 1100), (3, 1)), ((2100, 8), (40, 3)))
    ]
    in_order(FORWARD, 0)
    expected = [
        F.flipout_lora(x, *one, key=random.key(1), stream=i)
        for i, one in enumerate(zip(*lists, strict=True))
    ]
    try:
        chosen.value = slot
        for order, seed in ((FORWARD, 0), (REVERSE, 0), (RANDOM, 1), (RANDOM, 2)):
            in_order(order, seed)
            ys = F.flipout_lora_group(x, *lists, key=random.key(1), streams=[0, 1])
            assert all(torch.equal(y, wanted) for y, wanted in zip(ys, expected, strict=True))
    finally:
        chosen.value = 0


@pytest.mark.parametrize("noise", [False, True], ids=["plain", "noise"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_order_of_blocks_changes_no_bit(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    noise: bool,
    in_order: Callable[[int, int], None],
) -> None:
    in_order(FORWARD, 0)
    expected = layer(shape, dtype, noise)
    assert all(torch.isfinite(t).all() for t in expected)
    for order, seed in ((REVERSE, 0), (RANDOM, 1)):
        in_order(order, seed)
        for one, other in zip(layer(shape, dtype, noise), expected, strict=True):
            assert torch.equal(one, other), f"order {order}, seed {seed}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sums_of_neighbouring_tokens_share_no_line(
    dtype: torch.dtype, in_order: Callable[[int, int], None]
) -> None:
    """Rows of 32 bytes: lines of 128 that one sum gives up must hold nothing that another still reads."""
    in_order(FORWARD, 0)
    expected = layer(SHAPES[0], dtype, noise=False)
    for seed in range(1, 9):
        in_order(RANDOM, seed)
        for one, other in zip(layer(SHAPES[0], dtype, noise=False), expected, strict=True):
            assert torch.equal(one, other), f"seed {seed}"
