"""Adapter ops against their definitions: accuracy rule, gradients, noise statistics, errors."""

from __future__ import annotations

import math

import pytest
import torch

from bayes_kernels import _library, random, reference
from bayes_kernels import functional as F
from functional.adapter_parts import CPU, clone_as, compare, dense_noise, gradients, make

# tokens, n, m, r: odd sizes, both sides of the 128-column sign block, every padded rank
SHAPES = [
    (1, 1, 1, 1),
    (7, 33, 5, 3),
    (16, 128, 64, 8),
    (5, 129, 130, 17),
    (33, 257, 31, 16),
    (150, 136, 72, 8),
    (3, 40, 24, 64),
    (70, 65, 72, 33),
]
SMALL = [(7, 33, 5, 3), (16, 128, 64, 8), (5, 129, 130, 17)]


def half_or_single(device):
    return [d for d in device.dtypes if d != torch.float64]


# --- against the definition ---------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_flipout_lora(device, shape, dtype):
    parts = make(device, shape, dtype)
    key = random.key(11, device.torch)
    tokens, n, _, r = shape
    names = ["x", "mean", "rho", "b", "base"]
    y = F.flipout_lora(*(parts[k] for k in names), scaling=0.7, key=key, stream=3)

    def run(p):
        noise = dense_noise(device, key, tokens, n, r, stream=3, dtype=p["x"].dtype)
        return reference.flipout_lora(*(p[k] for k in names), scaling=0.7, noise=noise)

    compare(device, dtype, y, run, parts, names, "flipout_lora")


@pytest.mark.parametrize("r", [8, 33])
@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"x": 1e3, "rho": 3e-3 / 0.2}, "E = rho^2 eps is subnormal in fp16"),
        ({"mean": 1e4, "b": 1e-5}, "h is above 65504"),
        ({"mean": 1e-6, "rho": 1e-3, "b": 1e6}, "h is below 6e-8"),
        ({"b": 1e-3, "dy": 1e-3}, "dh is subnormal"),
        ({"mean": 1e-3, "rho": 0.0}, "E is zero"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_operands_outside_the_range_of_fp16(device, change, why, r):
    """Factors, h and dh are fp32, and may lie outside what fp16 holds: only x, base and y may not."""
    parts = make(device, (40, 136, 72, r), torch.float16)
    with torch.no_grad():
        for name, by in change.items():
            parts[name] *= by
    key = random.key(5, device.torch)
    names, factors = ["x", "mean", "rho", "b"], ["x", "mean", "rho", "b", "base"]
    ours = F.flipout_lora(*(parts[k] for k in factors), key=key, stream=2)
    truth_parts = clone_as(parts, torch.float64)
    noise = dense_noise(device, key, 40, 136, r, stream=2, dtype=torch.float64)
    truth = reference.flipout_lora(*(truth_parts[k] for k in factors), noise=noise)
    eps = torch.finfo(torch.float16).eps
    got = [ours - parts["base"], *gradients(ours, parts, names)]
    wanted = [truth - truth_parts["base"], *gradients(truth, truth_parts, names)]
    for name, a, t in zip(["y - base", *names], got, wanted, strict=True):
        # What y's and dx's own rounding costs, beside that of the operands.
        rounding = (
            eps * parts["base"].double().norm() if name == "y - base" else 2e-8 * t.numel() ** 0.5
        )
        error = (a.double() - t).norm()
        assert error <= 2 * eps * t.norm() + rounding, (
            f"{why}: {name} errs by {error / t.norm():.2g}"
        )


@pytest.mark.parametrize("shape", SMALL, ids=str)
@pytest.mark.parametrize("std", ["square", "softplus", "direct"])
@pytest.mark.parametrize("row_constant", [False, True])
def test_flipout_parameterisations(device, shape, std, row_constant):
    parts = make(device, shape, torch.float32)
    if row_constant:
        parts["rho"] = parts["rho"][:, :1].detach().contiguous().requires_grad_()
    key = random.key(1, device.torch)
    tokens, n, _, r = shape
    names = ["x", "mean", "rho", "b"]
    y = F.flipout_lora(*(parts[k] for k in names), key=key, std=std)

    def run(p):
        noise = dense_noise(device, key, tokens, n, r, dtype=p["x"].dtype)
        return reference.flipout_lora(*(p[k] for k in names), noise=noise, std=std)

    compare(device, torch.float32, y, run, parts, names, std, factor=3.0)


@pytest.mark.parametrize("scope", ["token", "example", "none", "groups", "rows_per_group"])
@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_scopes_and_dropout(device, scope, dropout):
    batch, n, m, r = (4, 6), 150, 20, 5
    tokens = 24
    parts = make(device, (tokens, n, m, r), torch.float32, batch=batch)
    key = random.key(5, device.torch)
    options: dict = {"scope": scope if scope in F.SCOPES else "token"}
    where: dict = {"rows_per_id": 1}
    if scope == "example":
        where = {"rows_per_id": 6}
    elif scope == "groups":
        options["groups"] = torch.tensor([[9], [2], [9], [0]], device=device.torch)
        where = {"ids": options["groups"].expand(batch).reshape(-1).cpu()}
    elif scope == "rows_per_group":
        options |= {"rows_per_group": 12, "row0": 3}
        where = {"rows_per_id": 12, "row0": 3}
    names = ["x", "mean", "rho", "b", "base"]
    y = F.flipout_lora(*(parts[k] for k in names), key=key, dropout=dropout, **options)

    def run(p):
        noise = dense_noise(device, key, tokens, n, r, dtype=p["x"].dtype, **where)
        if scope == "none":
            noise.r_in, noise.r_out = torch.ones_like(noise.r_in), torch.ones_like(noise.r_out)
        if dropout:
            first = where.get("row0", 0) * where.get("rows_per_id", 1)
            noise.keep = reference.dropout_mask(key.cpu(), tokens, n, dropout, row0=first)
            noise.keep = noise.keep.to(device.torch)
        return reference.flipout_lora(*(p[k] for k in names), noise=noise, dropout=dropout)

    compare(device, torch.float32, y, run, parts, names, scope, factor=3.0)


@pytest.mark.parametrize(
    "shape", [(40, 304, 24, 8), (33, 136, 40, 16), (35, 264, 16, 33), (64, 72, 8, 64)]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_dropout_in_low_precision(device, shape, dtype):
    """Kernels for 16 bits draw and apply dropout in ways of their own, by the rank."""
    parts = make(device, shape, dtype)
    key = random.key(8, device.torch)
    tokens, n, _, r = shape
    names = ["x", "mean", "rho", "b", "base"]
    y = F.flipout_lora(*(parts[k] for k in names), key=key, dropout=0.4, row0=2)

    def run(p):
        noise = dense_noise(device, key, tokens, n, r, row0=2, dtype=p["x"].dtype)
        keep = reference.dropout_mask(key.cpu(), tokens, n, 0.4, row0=2)
        noise.keep = keep.to(device.torch)
        return reference.flipout_lora(*(p[k] for k in names), noise=noise, dropout=0.4)

    compare(device, dtype, y, run, parts, names, "dropout")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("with_base", [False, True])
def test_lora(device, shape, dtype, with_base):
    parts = make(device, shape, dtype)
    names = ["x", "mean", "b", "base"] if with_base else ["x", "mean", "b"]
    y = F.lora(*(parts[k] for k in names), scaling=2.0)
    compare(
        device,
        dtype,
        y,
        lambda p: reference.lora(*(p[k] for k in names), scaling=2.0),
        parts,
        names,
        "lora",
    )


@pytest.mark.parametrize("shape", SMALL, ids=str)
@pytest.mark.parametrize("grouped", [False, True])
def test_scaled_lora(device, shape, grouped):
    parts = make(device, shape, torch.float32)
    tokens, r = shape[0], shape[3]
    groups = torch.arange(tokens, device=device.torch) % 3 if grouped else None
    parts["d"] = torch.randn((3, r) if grouped else (r,), device=device.torch).requires_grad_()
    names = ["x", "mean", "d", "b", "base"]
    y = F.scaled_lora(*(parts[k] for k in names), scaling=0.5, groups=groups)

    def run(p):
        return reference.scaled_lora(*(p[k] for k in names), scaling=0.5, groups=groups)

    compare(device, torch.float32, y, run, parts, names, "scaled_lora")


@pytest.mark.parametrize("shape", SMALL, ids=str)
def test_core_lora(device, shape):
    parts = make(device, shape, torch.float32)
    parts["core"] = torch.randn(shape[3], shape[3], device=device.torch).requires_grad_()
    names = ["x", "mean", "core", "b", "base"]
    y = F.core_lora(*(parts[k] for k in names), scaling=0.5)
    compare(
        device,
        torch.float32,
        y,
        lambda p: reference.core_lora(*(p[k] for k in names), scaling=0.5),
        parts,
        names,
        "core_lora",
    )


@pytest.mark.parametrize("rank", [65, 100])
def test_large_ranks_take_the_documented_path(rank):
    parts = make(CPU, (6, 140, 30, rank), torch.float32)
    key = random.key(2)
    names = ["x", "mean", "rho", "b", "base"]
    y = F.flipout_lora(*(parts[k] for k in names), key=key, scope="example")

    def run(p):
        noise = dense_noise(CPU, key, 6, 140, rank, dtype=p["x"].dtype)
        return reference.flipout_lora(*(p[k] for k in names), noise=noise)

    compare(CPU, torch.float32, y, run, parts, names, "rank > 64", factor=3.0)
    plain = F.lora(parts["x"], parts["mean"], parts["b"], dropout=0.5, key=key)
    assert plain.shape == (6, 30)
    core = torch.eye(rank)
    torch.testing.assert_close(
        F.core_lora(parts["x"], parts["mean"], core, parts["b"]),
        F.scaled_lora(parts["x"], parts["mean"], torch.ones(rank), parts["b"]),
    )


# --- layouts and sizes --------------------------------------------------------------------------


def test_strides_and_offsets(device):
    tokens, n, m, r = 9, 70, 40, 8
    parts = make(device, (tokens, n, m, r), torch.float32, grad=False)
    key = random.key(0, device.torch)
    expected = F.flipout_lora(*(parts[k] for k in ("x", "mean", "rho", "b", "base")), key=key)
    wide = torch.zeros(tokens, 2 * n + 3, device=device.torch)
    wide[:, 3 : n + 3] = parts["x"]
    transposed = parts["x"].T.contiguous().T
    base = torch.zeros(tokens, m + 5, device=device.torch)
    base[:, 5:] = parts["base"]
    for x in (wide[:, 3 : n + 3], transposed):
        y = F.flipout_lora(x, parts["mean"], parts["rho"], parts["b"], base[:, 5:], key=key)
        torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)
    y = F.flipout_lora(
        parts["x"],
        parts["mean"].T.contiguous().T,
        parts["rho"],
        parts["b"].T.contiguous().T,
        parts["base"],
        key=key,
    )
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(0, 5, 3, 2), (4, 5, 0, 2), (2, 0, 3, 2)])
@pytest.mark.parametrize("lead", [(), (1,)])
def test_zero_sizes(device, shape, lead):
    tokens, n, m, r = shape
    x = torch.ones(*lead, tokens, n, device=device.torch, requires_grad=True)
    mean = torch.ones(r, n, device=device.torch, requires_grad=True)
    rho = torch.ones(r, n, device=device.torch, requires_grad=True)
    b = torch.ones(m, r, device=device.torch, requires_grad=True)
    y = F.flipout_lora(x, mean, rho, b, key=random.key(0, device.torch))
    assert y.shape == (*lead, tokens, m)
    y.sum().backward()
    for t in (x, mean, rho, b):
        assert t.grad is not None and t.grad.shape == t.shape and not t.grad.any()


def test_leading_dimensions(device):
    parts = make(device, (12, 33, 9, 4), torch.float32, grad=False)
    key = random.key(0, device.torch)
    flat = F.flipout_lora(*(parts[k] for k in ("x", "mean", "rho", "b", "base")), key=key)
    for lead in ((3, 4), (2, 3, 2), (12, 1)):
        y = F.flipout_lora(
            parts["x"].reshape(*lead, 33),
            parts["mean"],
            parts["rho"],
            parts["b"],
            parts["base"].reshape(*lead, 9),
            key=key,
        )
        assert torch.equal(y.reshape(12, 9), flat)
    single = F.flipout_lora(
        parts["x"][0], parts["mean"], parts["rho"], parts["b"], parts["base"][0], key=key
    )
    torch.testing.assert_close(single, flat[0], rtol=1e-5, atol=1e-6)


def test_gradients_only_where_needed(device):
    parts = make(device, (6, 20, 7, 3), torch.float32, grad=False)
    key = random.key(0, device.torch)
    names = ["x", "mean", "rho", "b", "base"]
    every = {k: parts[k].clone().requires_grad_() for k in names}
    full = torch.autograd.grad(
        F.flipout_lora(*every.values(), key=key), list(every.values()), parts["dy"]
    )
    for i, name in enumerate(names):
        some = {k: parts[k].clone().requires_grad_(k == name) for k in names}
        (grad,) = torch.autograd.grad(
            F.flipout_lora(*some.values(), key=key), [some[name]], parts["dy"]
        )
        assert torch.equal(grad, full[i]), name


# --- properties ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lead", [(), (1,), (1, 1), (7,), (3, 5), (2, 0)], ids=str)
def test_inference_is_the_forward_pass_bit_for_bit(device, lead, dtype):
    """Without gradients one op does all: the same numbers, for any leading shape, stride and option."""
    p = make(device, (1, 40, 9, 5), dtype, batch=lead)
    x, base = p["x"].detach(), p["base"].detach()
    key = random.key(3, device.torch)
    mean, rho, b = (p[k] for k in ("mean", "rho", "b"))
    groups = torch.arange(math.prod(lead), device=device.torch).reshape(lead) // 2
    calls = {
        "plain": lambda x, base: F.lora(x, mean, b, base, scaling=0.5),
        "dropped": lambda x, base: F.lora(x, mean, b, base, dropout=0.25, key=key, row0=3),
        "token": lambda x, base: F.flipout_lora(x, mean, rho, b, base, key=key, stream=2, row0=1),
        "sample": lambda x, base: F.flipout_lora(
            x, mean, rho[:, :1], b, base, key=key, row0=5, rows_per_group=2, std="softplus"
        ),
        "direct": lambda x, base: F.flipout_lora(
            x, mean, rho, b, base, key=key, std="direct", dropout=0.25, scaling=3.0
        ),
        "example": lambda x, base: F.flipout_lora(x, mean, rho, b, base, key=key, scope="example"),
        "none": lambda x, base: F.flipout_lora(x, mean, rho, b, base, key=key, scope="none"),
        "groups": lambda x, base: F.flipout_lora(
            x, mean, rho[:, :1], b, base, key=key, groups=groups, std="softplus", dropout=0.25
        ),
    }
    strided = torch.stack([x, x], -1)[..., 0]
    for name, call in calls.items():
        for added in (None, base):
            y = call(x, added)
            assert y.requires_grad
            with torch.no_grad():
                for same in (x, strided):
                    got = call(same, added)
                    assert got.shape == y.shape and got.dtype == y.dtype, name
                    assert torch.equal(got, y), name


@pytest.mark.parametrize("name", ["x", "mean", "rho", "b", "base", "key"])
def test_tensors_without_data_are_refused(name):
    """A fake kernel must not answer for one tensor on the meta device among others with data."""

    made = make(CPU, (4, 8, 3, 2), torch.float32, grad=False) | {"key": random.key(0)}
    p = {k: v.to("meta") if k == name else v for k, v in made.items()}
    with torch.no_grad(), pytest.raises(ValueError, match="hold data"):
        F.flipout_lora(p["x"], p["mean"], p["rho"], p["b"], p["base"], key=p["key"])


@pytest.mark.parametrize("scope", ["token", "example", "none"])
def test_zero_deviation_is_plain_lora_bit_for_bit(device, scope):
    for dtype in half_or_single(device):
        parts = make(device, (8, 130, 20, 8), dtype, grad=False, batch=(2, 4))
        rho = torch.zeros_like(parts["rho"])
        y = F.flipout_lora(
            parts["x"],
            parts["mean"],
            rho,
            parts["b"],
            parts["base"],
            scaling=2.0,
            key=random.key(0, device.torch),
            scope=scope,
        )
        assert torch.equal(
            y, F.lora(parts["x"], parts["mean"], parts["b"], parts["base"], scaling=2.0)
        )


def test_batch_split_does_not_change_the_noise(device):
    parts = make(device, (20, 140, 30, 8), torch.float32, grad=False)
    key = random.key(0, device.torch)
    args = [parts[k] for k in ("mean", "rho", "b")]
    whole = F.flipout_lora(parts["x"], *args, key=key, dropout=0.2)
    halves = [
        F.flipout_lora(parts["x"][:13], *args, key=key, dropout=0.2),
        F.flipout_lora(parts["x"][13:], *args, key=key, row0=13, dropout=0.2),
    ]
    assert torch.equal(torch.cat(halves), whole)
    grouped = F.flipout_lora(parts["x"], *args, key=key, rows_per_group=5)
    tail = F.flipout_lora(parts["x"][10:], *args, key=key, rows_per_group=5, row0=2)
    assert torch.equal(grouped[10:], tail)


def test_same_bits_for_any_number_of_threads():
    before = torch.get_num_threads()
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        results = []
        try:
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                parts = make(CPU, (300, 520, 390, 8), dtype)
                names = ["x", "mean", "rho", "b", "base"]
                y = F.flipout_lora(*(parts[k] for k in names), key=random.key(1), dropout=0.1)
                results.append([y, *gradients(y, parts, names)])
        finally:
            torch.set_num_threads(before)
        for other in results[1:]:
            for a, b in zip(results[0], other, strict=True):
                assert torch.equal(a, b)


@pytest.mark.parametrize("scope", ["token", "example", "none"])
def test_mean_and_covariance_of_samples(scope):
    """E[h] is the mean path; cov(h_t, h_t') is sum_j x_tj x_t'j Omega_j^2 where signs are shared."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 2, 12, generator=generator, dtype=torch.float64)  # two examples, two tokens
    mean = torch.randn(1, 12, generator=generator, dtype=torch.float64)
    rho = torch.rand(1, 12, generator=generator, dtype=torch.float64) * 0.5 + 0.5
    one = torch.ones(1, 1, dtype=torch.float64)
    draws = torch.stack(
        [
            F.flipout_lora(x, mean, rho, one, key=random.key(s), scope=scope).reshape(4)
            for s in range(6000)
        ]
    )
    rows = x.reshape(4, 12)
    covariance = (rows * rho**4) @ rows.T
    same_example = torch.tensor([[1.0, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]])
    covariance = (
        covariance
        * {"token": torch.eye(4), "example": same_example, "none": torch.ones(4, 4)}[scope]
    )
    scale = covariance.diagonal().max().item()
    bound = 4.5 * scale / math.sqrt(len(draws))
    assert (draws.mean(0) - (rows @ mean.T).reshape(4)).abs().max() < 4.5 * math.sqrt(
        scale / len(draws)
    )
    assert (torch.cov(draws.T) - covariance).abs().max() < 2 * bound


def test_streams_keys_and_draws_differ(device):
    parts = make(device, (4, 40, 9, 4), torch.float32, grad=False)
    args = [parts[k] for k in ("x", "mean", "rho", "b")]
    key = random.key(0, device.torch)
    base = F.flipout_lora(*args, key=key, stream=0)
    assert torch.equal(base, F.flipout_lora(*args, key=key.clone(), stream=0))
    assert not torch.allclose(base, F.flipout_lora(*args, key=key, stream=1))
    assert not torch.allclose(base, F.flipout_lora(*args, key=random.key(1, device.torch)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "n", "r", "m"), [(1, 33, 8, 17), (40, 130, 8, 65)])
def test_bits_do_not_depend_on_where_tensors_lie(
    rows: int, n: int, r: int, m: int, dtype: torch.dtype
) -> None:
    """torch's products round by the address of their operands modulo 64; ours do not."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(rows, n), (r, n), (m, r), (r, n), (r, r), (r,), (rows, m)]
    values = [torch.randn(shape, generator=generator) for shape in shapes]
    values = [v.to(dtype) if i in (0, 6) else v for i, v in enumerate(values)]
    key = random.key(1)

    def run(offset: int) -> list[torch.Tensor]:
        moved = []
        for i, value in enumerate(values):
            start = (offset + i) % 16 if offset else 0
            place = torch.empty(value.numel() + 16, dtype=value.dtype)[start:][: value.numel()]
            moved.append(place.view(value.shape).copy_(value).requires_grad_())
        x, a, b, rho, core, d, base = moved
        found = []
        for y in (
            F.lora(x, a, b, base),
            F.flipout_lora(x, a, rho, b, base, key=key),
            F.scaled_lora(x, a, d, b, base),
            F.core_lora(x, a, core, b, base),
        ):
            grads = torch.autograd.grad(y.float().square().sum(), moved, allow_unused=True)
            found += [y, *(g for g in grads if g is not None)]
        return found

    expected = run(0)
    for offset in (1, 6, 15):
        assert all(torch.equal(a, b) for a, b in zip(run(offset), expected, strict=True))


# --- errors -------------------------------------------------------------------------------------


def ones(*shape, **options):
    return torch.ones(*shape, **options)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda k: F.lora(ones(2, 3), ones(3, 2), ones(4, 2)), ValueError, "transposed"),
        (
            lambda k: F.lora(ones(2, 3), ones(2, 3), ones(2, 4)),
            ValueError,
            r"b must have shape \(m, r = 2\)",
        ),
        (
            lambda k: F.lora(ones(2, 3).int(), ones(2, 3), ones(4, 2)),
            TypeError,
            "x must be float32",
        ),
        (
            lambda k: F.lora(ones(2, 3), ones(2, 3), ones(4, 2), ones(2, 5)),
            ValueError,
            r"base must have shape \(2, 4\)",
        ),
        (
            lambda k: F.lora(ones(2, 3), ones(0, 3), ones(4, 0)),
            ValueError,
            "rank must be at least 1",
        ),
        (
            lambda k: F.lora(ones(2, 3), ones(2, 3), ones(4, 2), dropout=0.1),
            ValueError,
            "key is needed",
        ),
        (
            lambda k: F.lora(ones(2, 3), ones(2, 3), ones(4, 2), dropout=1.5, key=k),
            ValueError,
            r"in \[0, 1\)",
        ),
        (
            lambda k: F.lora(ones(2, 3, dtype=torch.float64), ones(2, 3), ones(4, 2), ones(2, 4)),
            TypeError,
            "base must have a dtype",
        ),
        (
            lambda k: F.lora(ones(2, 3, device="meta"), ones(2, 3), ones(4, 2)),
            ValueError,
            "x must hold data, got a tensor on the meta device",
        ),
        (
            lambda k: F.flipout_lora(ones(2, 3), ones(2, 3), ones(2, 2), ones(4, 2), key=k),
            ValueError,
            "rho must have shape",
        ),
        (
            lambda k: F.flipout_lora(ones(2, 3), ones(2, 3), ones(2, 3), ones(4, 2), key=ones(2)),
            ValueError,
            "key must be an int64",
        ),
        (
            lambda k: F.flipout_lora(
                ones(2, 3), ones(2, 3), ones(2, 3), ones(4, 2), key=k, scope="batch"
            ),
            ValueError,
            "scope must be one of",
        ),
        (
            lambda k: F.flipout_lora(
                ones(2, 3), ones(2, 3), ones(2, 3), ones(4, 2), key=k, std="exp"
            ),
            ValueError,
            "std must be one of",
        ),
        (
            lambda k: F.flipout_lora(
                ones(2, 3), ones(2, 3), ones(2, 3), ones(4, 2), key=k, groups=torch.zeros(5).long()
            ),
            ValueError,
            "groups must have shape",
        ),
        (
            lambda k: F.flipout_lora(
                ones(2, 3), ones(2, 3), ones(2, 3), ones(4, 2), key=k, groups=torch.zeros(2)
            ),
            TypeError,
            "groups must be int64",
        ),
        (
            lambda k: F.flipout_lora(
                ones(2, 3), ones(2, 3), ones(2, 3), ones(4, 2), key=k, rows_per_group=0
            ),
            ValueError,
            "rows_per_group must be",
        ),
        (
            lambda k: F.lora(ones(2, 3), ones(2, 3).to(torch.complex64), ones(4, 2)),
            TypeError,
            "real floating-point",
        ),
        (
            lambda k: F.scaled_lora(ones(2, 3), ones(2, 3), ones(3), ones(4, 2)),
            ValueError,
            "d must have shape",
        ),
        (
            lambda k: F.scaled_lora(ones(2, 3), ones(2, 3), ones(5, 2), ones(4, 2)),
            ValueError,
            "groups must be given",
        ),
        (
            lambda k: F.core_lora(ones(2, 3), ones(2, 3), ones(3, 3), ones(4, 2)),
            ValueError,
            r"core must have shape \(2, 2\)",
        ),
    ],
)
def test_errors_are_one_clear_line(call, error, text):
    with pytest.raises(error, match=text) as caught:
        call(random.key(0))
    assert "\n" not in str(caught.value)


def test_raw_ops_check_what_python_would():
    ops = _library.ops
    x, a = torch.ones(2, 3), torch.ones(2, 3)
    with pytest.raises(RuntimeError, match="a must have 3 columns"):
        ops.adapter_shrink(x, torch.ones(2, 4), None, None, 0, 0, 1, None, 0.0)
    with pytest.raises(RuntimeError, match="key is needed"):
        ops.adapter_shrink(x, a, a, None, 0, 0, 1, None, 0.0)
    with pytest.raises(RuntimeError, match="rank must be 1 to 64"):
        ops.adapter_shrink(x, torch.ones(65, 3), None, None, 0, 0, 1, None, 0.0)
