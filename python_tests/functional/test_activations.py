"""Activations in 8 bits: the definition, unbiasedness and variance at fixed keys, gradients, bytes kept."""

from __future__ import annotations

import math

import pytest
import torch

from bayes_kernels import functional as F
from bayes_kernels import random, reference
from functional.adapter_parts import CPU, make
from functional.test_adapter_gradients import forms

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KEYS = 500


def values(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Numbers whose blocks differ in size, a few of them zero or much larger than their neighbours."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    x = x * torch.exp2(torch.randint(-9, 9, shape[:-1], generator=generator)[..., None])
    x[torch.rand(shape, generator=generator) < 0.05] *= 50
    x[torch.rand(shape, generator=generator) < 0.05] = 0
    return x.to(dtype)


def rounding(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Step of each element, and the variance of its rounding, fp64, from the formula of the docstring."""
    n = x.shape[-1]
    blocks = torch.nn.functional.pad(x.detach().cpu().double(), (0, -n % 32)).unflatten(
        -1, (-1, 32)
    )
    largest = blocks.abs().amax(-1, keepdim=True)
    step = torch.exp2(torch.ceil(torch.log2(largest / 127)).clamp(min=-126.0))
    remainder = blocks / step - torch.floor(blocks / step)
    variance = step**2 * remainder * (1 - remainder)
    whole = step.expand(blocks.shape)
    return whole.flatten(-2)[..., :n], variance.flatten(-2)[..., :n]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize(
    "shape", [(3, 1), (5, 31), (4, 32), (2, 3, 33), (3, 264), (70, 7), (2, 515)]
)
def test_bits_are_those_of_the_definition(device, dtype, shape):
    if dtype == torch.float64 and device.name != "cpu":
        pytest.skip("float64 is for the CPU")
    x, key = values(shape, dtype).to(device.torch), random.key(11, device.torch)
    kept = F.quantize_activations(x, key=key, stream=3, row0=5)
    codes, scales = reference.quantize_activations(x.cpu(), key.cpu(), stream=3, row0=5)
    assert torch.equal(kept.codes.cpu(), codes) and torch.equal(kept.scales.cpu(), scales)
    back = kept.dequantized(dtype)
    assert back.dtype == dtype and back.shape == x.shape
    assert torch.equal(back.cpu(), reference.dequantize_activations(codes, scales, dtype))
    # Values between the codes' neighbours, of the documented step, exact in the dtype.
    step, _ = rounding(x)
    assert ((back.cpu().double() - x.cpu().double()).abs() < step).all()
    assert torch.equal(back.cpu().double(), codes.double() * step)


def test_extremes(device):
    """Zeros, the smallest and the largest numbers, and those that are not finite."""
    key = random.key(0, device.torch)
    for dtype in DTYPES:
        least = 2.0**-24 if dtype == torch.float16 else 2.0**-126
        x = torch.zeros(6, 40, dtype=dtype)
        x[1] = least
        x[2, 0] = torch.finfo(dtype).max if dtype == torch.float16 else 3.3e38
        x[3, 1], x[4, 33], x[5, 39] = math.nan, math.inf, -math.inf
        kept = F.quantize_activations(x.to(device.torch), key=key)
        back = kept.dequantized(dtype).cpu()
        assert torch.equal(back[:2], x[:2])
        assert abs(float(back[2, 0]) / float(x[2, 0]) - 1) < 1 / 63 and not back[2, 1:].any()
        assert back[3:, :].isnan().sum() == 32 + 8 + 8
        assert back[3, :32].isnan().all() and back[4:, 32:].isnan().all()
        assert kept.codes.abs().max() <= 127


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_the_largest_number_that_has_a_code(device, dtype):
    """127 2^121 comes back as it is, and the next number of its type makes its block NaN."""
    if dtype == torch.float64 and device.name != "cpu":
        pytest.skip("float64 is for the CPU")
    most = torch.tensor(127 * 2.0**121, dtype=dtype)
    x = torch.zeros(2, 33, dtype=dtype)
    x[0, 3], x[1, 3] = -most, torch.nextafter(most, torch.tensor(math.inf, dtype=dtype))
    x[:, 32] = 5.0
    back = F.quantize_activations(x.to(device.torch), key=random.key(0, device.torch))
    back = back.dequantized(dtype).cpu()
    assert torch.equal(back[0], x[0]) and back[1, :32].isnan().all() and back[1, 32] == 5.0


@pytest.mark.parametrize(
    "largest, scale", [(127.0, 133), (127.001, 134), (64.0, 133), (63.5, 132), (63.6, 133)]
)
def test_the_largest_number_of_a_block_has_a_code(device, largest, scale):
    x = torch.zeros(1, 32, device=device.torch)
    x[0, 7] = -largest
    for seed in range(5):
        kept = F.quantize_activations(x, key=random.key(seed, device.torch))
        assert kept.scales.item() == scale
        assert abs(kept.dequantized(torch.float32)[0, 7].item() + largest) < 2.0 ** (scale - 133)


def test_split_batches_round_alike(device):
    x, key = values((7, 50), torch.bfloat16).to(device.torch), random.key(4, device.torch)
    whole = F.quantize_activations(x, key=key)
    parts = [F.quantize_activations(x[:3], key=key), F.quantize_activations(x[3:], key=key, row0=3)]
    assert torch.equal(whole.codes, torch.cat([p.codes for p in parts]))
    other = F.quantize_activations(x, key=key, stream=1)
    assert not torch.equal(whole.codes, other.codes) and torch.equal(whole.scales, other.scales)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mean_and_variance_over_keys(device, dtype):
    x = values((3, 45), dtype).to(device.torch)
    drawn = torch.stack(
        [
            F.quantize_activations(x, key=random.key(seed, device.torch)).dequantized(torch.float32)
            for seed in range(KEYS)
        ]
    )
    drawn, exact = drawn.cpu().double(), x.cpu().double()
    step, variance = rounding(x)
    random_ones = variance > 1e-3 * step**2  # those below are seldom rounded up in so few draws
    z = ((drawn.mean(0) - exact) / (variance / KEYS).sqrt())[random_ones]
    assert z.abs().max() < 4.5 and 0.7 < z.square().mean() < 1.35, (
        z.abs().max(),
        z.square().mean(),
    )
    assert torch.equal(drawn[:, variance == 0], exact[variance == 0].expand(KEYS, -1))
    ratio = (drawn.var(0).sum() / variance.sum()).item()
    assert 0.93 < ratio < 1.07 and (variance <= step**2 / 4).all()


def test_neighbours_round_independently(device):
    """Errors of all pairs of columns and rows: a word used twice would correlate them."""
    x = torch.full((3, 24), 0.5, device=device.torch)
    x[:, 0] = 100.0  # step 1: all others are halfway between two codes
    up = torch.stack(
        [
            F.quantize_activations(x, key=random.key(seed, device.torch)).codes[:, 1:].flatten()
            for seed in range(KEYS)
        ]
    )
    correlation = torch.corrcoef(up.cpu().double().T)
    off = correlation - torch.eye(len(correlation), dtype=torch.float64)
    assert off.abs().max() < 4.9 / math.sqrt(KEYS)


@pytest.mark.parametrize("form", ["lora", "token", "none", "scaled", "core"])
def test_gradients_are_unbiased(device, form):
    """Over rounding keys, with one noise key: z-scores of A's and rho's gradient, exact ones of the rest."""
    parts = make(device, (5, 37, 9, 3), torch.float32)
    key = random.key(0, device.torch)
    inputs = ("x", "mean", "rho", "b", "base")
    named = [parts[k] for k in inputs if not (k == "rho" and form not in ("token", "none"))]

    def run(kept):
        y = forms(parts, key, kept)[form](parts["x"], parts["base"])
        return torch.autograd.grad(y.square().sum(), named)

    plain = run(None)
    count = 300
    drawn = [
        run(F.quantize_activations(parts["x"], key=random.key(seed + 9, device.torch)))
        for seed in range(count)
    ]
    for i, exact in enumerate(plain):
        found = torch.stack([grads[i] for grads in drawn]).cpu().double()
        if named[i] is parts["mean"] or named[i] is parts["rho"]:
            std = found.std(0)
            assert (std > 0).float().mean() > 0.9
            z = (found.mean(0) - exact.cpu().double()) / (std / math.sqrt(count)).clamp_min(1e-12)
            z = z[std > 1e-6]
            assert z.abs().max() < 4.7 and 0.6 < z.square().mean() < 1.5
        else:
            assert (found == exact.cpu().double()).all()


def test_gradient_variance_is_that_of_the_formula(device):
    """dA = dh^T x: its variance is sum_t dh_t^2 Var(x_t), at most sum_t dh_t^2 step_t^2 / 4."""
    parts = make(device, (8, 40, 6, 2), torch.float32)
    x, a, b = (parts[k] for k in ("x", "mean", "b"))
    dy = torch.randn(8, 6, generator=torch.Generator().manual_seed(1)).to(device.torch)
    grads = []
    for seed in range(KEYS):
        kept = F.quantize_activations(x, key=random.key(seed, device.torch))
        grads += torch.autograd.grad(F.lora(x, a, b, scaling=1.5, kept=kept), [a], dy)
    dh = (1.5 * dy @ b).detach().cpu().double()
    step, variance = rounding(x)
    expected = (dh.T**2) @ variance
    found = torch.stack(grads).cpu().double().var(0)
    assert 0.95 < (found.sum() / expected.sum()).item() < 1.05
    assert (found / expected).sub(1).abs().max() < 4.9 * math.sqrt(2 / KEYS)
    assert (expected <= (dh.T**2) @ (step**2 / 4)).all()


def saved_bytes(run) -> dict[torch.dtype, int]:
    """Bytes of different memory that autograd keeps, by dtype."""
    found: dict[int, tuple[torch.dtype, int]] = {}

    def pack(t):
        found[t.untyped_storage().data_ptr()] = (t.dtype, t.untyped_storage().nbytes())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run()
    sums: dict[torch.dtype, int] = {}
    for dtype, size in found.values():
        sums[dtype] = sums.get(dtype, 0) + size
    return sums


@pytest.mark.parametrize("form", ["lora", "token", "none", "scaled", "core"])
def test_bytes_kept(form):
    t, n = 64, 512
    parts = make(CPU, (t, n, 48, 4), torch.bfloat16)
    key = random.key(0)
    kept = F.quantize_activations(parts["x"], key=key)
    plain, eight = (
        saved_bytes(lambda kept=kept: forms(parts, key, kept)[form](parts["x"], parts["base"]))
        for kept in (None, kept)
    )
    assert plain.pop(torch.bfloat16) == 2 * t * n
    assert eight.pop(torch.int8) == t * n and eight.pop(torch.uint8) == t * n // 32
    assert plain == eight


@pytest.mark.parametrize("rank", [64, 65])
def test_where_nothing_is_kept_in_8_bits(device, rank):
    """Ranks above 64 and torch.func: gradients are the exact ones, as the docstrings say."""
    parts = make(device, (6, 40, 7, rank), torch.float32)
    x, mean, rho, b, base = (parts[k] for k in ("x", "mean", "rho", "b", "base"))
    key = random.key(0, device.torch)
    kept = F.quantize_activations(x, key=key)
    draws = torch.zeros(1, dtype=torch.int64, device=device.torch)
    rows = {"rows_per_group": 6}

    def outputs(kept):
        found = {name: call(x, base) for name, call in forms(parts, key, kept).items()}
        found["group"] = F.lora_group(x, [mean, mean[:2]], [b, b[:, :2]], kept=kept)[0]
        found["grouped"] = F.grouped_lora(x, mean[None], b, **rows, kept=kept)
        found["sampled"] = F.sampled_lora(x, mean, rho, b, draws=draws, key=key, **rows, kept=kept)
        return found

    plain = outputs(None)
    for name, y in outputs(kept).items():
        exact, found = (torch.autograd.grad(one.sum(), mean)[0] for one in (plain[name], y))
        assert torch.equal(found, exact) == (rank > 64), name
    exact, found = (
        torch.func.grad(lambda a, k=k: F.lora(x.detach(), a, b.detach(), kept=k).sum())(mean)
        for k in (None, kept)
    )
    assert torch.equal(found, exact)


def test_grouped_adapters(device):
    """Draws and experts: exact gradients but for the first factor's, which are those of the rounded x."""
    parts = make(device, (12, 40, 7, 3), torch.float32)
    x, mean, rho, b, base = (parts[k] for k in ("x", "mean", "rho", "b", "base"))
    key, draws = random.key(2, device.torch), torch.tensor([4, 1, 0], device=device.torch)
    kept = F.quantize_activations(x, key=key)
    rounded = kept.dequantized(torch.float32)
    experts = torch.stack([mean, 2 * mean, -mean]).detach().requires_grad_()
    noisy = torch.stack([rho, rho, rho]).detach().requires_grad_()
    calls = {
        "sampled": lambda x, kept: F.sampled_lora(
            x, mean, rho, b, base, draws=draws, rows_per_group=4, key=key, kept=kept
        ),
        "grouped": lambda x, kept: F.grouped_lora(x, experts, b, base, rows_per_group=4, kept=kept),
        "flipout": lambda x, kept: F.grouped_flipout_lora(
            x, experts, noisy, b, base, rows_per_group=4, key=key, kept=kept
        ),
    }
    for name, call in calls.items():
        own = [mean, rho] if name == "sampled" else [experts, noisy][: 1 + (name == "flipout")]
        dy = torch.ones_like(base)
        exact = torch.autograd.grad(call(x, None), [x, b], dy)
        found = torch.autograd.grad(call(x, kept), [x, b, *own], dy)
        expected = torch.autograd.grad(call(rounded, None), own, dy)
        assert all(map(torch.equal, exact, found[:2])), name
        assert all(map(torch.equal, expected, found[2:])), name


@pytest.mark.parametrize("rank", [3, 70])
@pytest.mark.parametrize("form", ["lora", "token", "none"])
def test_adapters_that_share_x(device, form, rank):
    """One rounding for all: gradients of x and b are exact, those of first factors as one by one."""
    both = [make(device, (6, 40, m, rank), torch.float32) for m in (7, 5)]
    x, key = both[0]["x"], random.key(2, device.torch)
    lists = {name: [p[name] for p in both] for name in ("mean", "rho", "b", "base")}
    kept = F.quantize_activations(x, key=key)
    own = {"key": key, "scope": form}

    def together(kept):
        if form == "lora":
            return F.lora_group(x, lists["mean"], lists["b"], lists["base"], kept=kept)
        return F.flipout_lora_group(x, *lists.values(), streams=[1, 4], kept=kept, **own)

    def apart(kept):
        if form == "lora":
            each = zip(lists["mean"], lists["b"], lists["base"], strict=True)
            return [F.lora(x, *one, kept=kept) for one in each]
        each = zip(*lists.values(), (1, 4), strict=True)
        return [F.flipout_lora(x, *one, stream=s, kept=kept, **own) for *one, s in each]

    rest = [x, *lists["b"], *lists["base"]]
    factors = lists["mean"] + (lists["rho"] if form != "lora" else [])
    dys = [torch.ones_like(y) for y in lists["base"]]
    found = torch.autograd.grad(together(kept), [*rest, *factors], dys)
    exact = torch.autograd.grad(together(None), [*rest, *factors], dys)
    single = torch.autograd.grad(apart(kept), factors, dys)
    assert all(map(torch.equal, found[: len(rest)], exact))
    assert all(map(torch.equal, found[len(rest) :], single))
    # Beyond the ranks of the kernels plain PyTorch runs, whose backward pass has x.
    assert torch.equal(found[len(rest)], exact[len(rest)]) == (rank > 64)


def test_autocast_keeps_x_in_its_dtype():
    parts = make(CPU, (6, 40, 12, 4), torch.float32)
    x, key = parts["x"], random.key(0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        kept = F.quantize_activations(x, key=key)
        y = F.flipout_lora(x, parts["mean"], parts["rho"], parts["b"], key=key, kept=kept)
    assert torch.equal(kept.codes, F.quantize_activations(x.bfloat16(), key=key).codes)
    y.float().sum().backward()
    assert parts["mean"].grad.dtype == torch.float32


def test_compiled_calls_share_one_rounding():
    """Two adapters that round the same x with the same noise: the compiled graph does it once."""
    parts = make(CPU, (6, 40, 12, 4), torch.float32)
    key, counted = random.key(0), []

    def both(x):
        found = 0.0
        for stream in (1, 2):
            kept = F.quantize_activations(x, key=key, stream=9)
            y = F.flipout_lora(
                x, parts["mean"], parts["rho"], parts["b"], key=key, stream=stream, kept=kept
            )
            found = found + y.square().sum()
        return found

    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.partitioners import min_cut_rematerialization_partition

    def count(graph, inputs):
        counted.append(
            sum(
                "dequantize" not in str(n.target) and "quantize" in str(n.target)
                for n in graph.graph.nodes
            )
        )
        return graph

    backend = aot_autograd(fw_compiler=count, partition_fn=min_cut_rematerialization_partition)
    compiled = torch.compile(both, fullgraph=True, backend=backend)
    names = [parts[k] for k in ("x", "mean", "rho", "b")]
    expected = torch.autograd.grad(both(parts["x"]), names)
    found = torch.autograd.grad(compiled(parts["x"]), names)
    assert all(torch.allclose(*pair) for pair in zip(found, expected, strict=True))
    assert counted[0] == 1


def test_second_derivatives_say_what_they_need():
    parts = make(CPU, (4, 40, 5, 2), torch.float32)
    kept = F.quantize_activations(parts["x"], key=random.key(0))
    for call in (
        F.lora(parts["x"], parts["mean"], parts["b"], kept=kept),
        F.scaled_lora(parts["x"], parts["mean"], parts["mean"][:, 0], parts["b"], kept=kept),
        F.grouped_lora(parts["x"], parts["mean"][None], parts["b"], rows_per_group=4, kept=kept),
        F.lora_group(parts["x"], [parts["mean"]], [parts["b"]], kept=kept)[0],
    ):
        with pytest.raises(RuntimeError, match="second derivatives need x itself"):
            torch.autograd.grad(call.square().sum(), parts["mean"], create_graph=True)


def test_arguments():
    x, key = torch.randn(3, 40), random.key(0)
    a, b = torch.randn(2, 40, requires_grad=True), torch.randn(5, 2)
    kept = F.quantize_activations(x, key=key)
    with pytest.raises(TypeError, match="x must be float32"):
        F.quantize_activations(torch.ones(3, dtype=torch.int8), key=key)
    with pytest.raises(ValueError, match=r"x must have shape \(..., n\)"):
        F.quantize_activations(torch.ones(()), key=key)
    with pytest.raises(ValueError, match="key must be an int64 tensor"):
        F.quantize_activations(x, key=torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"kept must be of x, \(2, 40\)"):
        F.lora(x[:2], a, b, kept=kept)
    with pytest.raises(ValueError, match=r"lora_group: kept must be of x, \(2, 40\)"):
        F.lora_group(x[:2], [a], [b], kept=kept)
    with pytest.raises(TypeError, match="kept must be made by quantize_activations"):
        F.lora(x, a, b, kept=x)
    empty = F.quantize_activations(x[:0], key=key)
    assert empty.codes.shape == (0, 40) and empty.scales.shape == (0, 2)
    assert empty.dequantized(torch.float32).shape == (0, 40)
    assert F.quantize_activations(x[:, :0], key=key).scales.shape == (3, 0)
