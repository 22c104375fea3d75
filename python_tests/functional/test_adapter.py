"""Adapter ops against their definitions: accuracy rule, gradients, noise statistics, errors."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import math
import os
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from accuracy import assert_no_worse_than_torch

from bayes_kernels import _library, random, reference
from bayes_kernels import functional as F

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


def make(device, shape, dtype, *, seed=0, grad=True, batch=None):
    """x, mean, rho, b, base, dy on the device; factors fp32 (fp64 beside fp64)."""
    tokens, n, m, r = shape
    torch.manual_seed(seed)  # for what a test draws beside these
    g = torch.Generator().manual_seed(seed)
    acc = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(*size, scale=1.0):
        return torch.randn(*size, generator=g, dtype=torch.float64) * scale

    lead = batch or (tokens,)
    parts = {
        "x": (normal(*lead, n), dtype),
        "mean": (normal(r, n, scale=1 / math.sqrt(n)), acc),
        "rho": (torch.rand(r, n, generator=g, dtype=torch.float64) * 0.3 + 0.05, acc),
        "b": (normal(m, r, scale=1 / math.sqrt(r)), acc),
        "base": (normal(*lead, m), dtype),
        "dy": (normal(*lead, m), dtype),
    }
    out = {k: v.to(t).to(device.torch) for k, (v, t) in parts.items()}
    for name in ("x", "mean", "rho", "b", "base"):
        out[name].requires_grad_(grad)
    return out


def clone_as(parts, dtype):
    """The same numbers in another dtype, as new leaves."""
    return {k: v.detach().to(dtype).requires_grad_(v.requires_grad) for k, v in parts.items()}


def gradients(y, parts, names):
    return torch.autograd.grad(y, [parts[k] for k in names], parts["dy"].to(y.dtype))


def compare(device, dtype, ours, run_reference, parts, names, what, factor=2.0):
    """Value and gradients by the accuracy rule; run_reference(parts) in the dtype and in fp64."""
    same_parts, truth_parts = clone_as(parts, dtype), clone_as(parts, torch.float64)
    same, truth = run_reference(same_parts), run_reference(truth_parts)
    assert_no_worse_than_torch(ours, same, truth, factor=factor, what=f"{what} value")
    for name, a, b, t in zip(
        names,
        gradients(ours, parts, names),
        gradients(same, same_parts, names),
        gradients(truth, truth_parts, names),
        strict=True,
    ):
        assert a.dtype == parts[name].dtype
        assert_no_worse_than_torch(a, b, t, factor=factor, what=f"{what} d{name}")


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
        noise = reference.dense_noise(key.cpu(), tokens, n, r, stream=3, dtype=p["x"].dtype)
        for field in ("eps", "r_in", "r_out"):
            setattr(noise, field, getattr(noise, field).to(device.torch))
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
    noise = reference.dense_noise(key.cpu(), 40, 136, r, stream=2, dtype=torch.float64)
    for field in ("eps", "r_in", "r_out"):
        setattr(noise, field, getattr(noise, field).to(device.torch))
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
        noise = reference.dense_noise(key.cpu(), tokens, n, r, dtype=p["x"].dtype)
        for field in ("eps", "r_in", "r_out"):
            setattr(noise, field, getattr(noise, field).to(device.torch))
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
        noise = reference.dense_noise(key.cpu(), tokens, n, r, dtype=p["x"].dtype, **where)
        if scope == "none":
            noise.r_in, noise.r_out = torch.ones_like(noise.r_in), torch.ones_like(noise.r_out)
        if dropout:
            first = where.get("row0", 0) * where.get("rows_per_id", 1)
            noise.keep = reference.dropout_mask(key.cpu(), tokens, n, dropout, row0=first)
            noise.keep = noise.keep.to(device.torch)
        for field in ("eps", "r_in", "r_out"):
            setattr(noise, field, getattr(noise, field).to(device.torch))
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
        noise = reference.dense_noise(key.cpu(), tokens, n, r, row0=2, dtype=p["x"].dtype)
        noise.keep = reference.dropout_mask(key.cpu(), tokens, n, 0.4, row0=2)
        for field in ("eps", "r_in", "r_out", "keep"):
            setattr(noise, field, getattr(noise, field).to(device.torch))
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
    class Cpu:
        torch = torch.device("cpu")

    parts = make(Cpu, (6, 140, 30, rank), torch.float32)
    key = random.key(2)
    names = ["x", "mean", "rho", "b", "base"]
    y = F.flipout_lora(*(parts[k] for k in names), key=key, scope="example")

    def run(p):
        noise = reference.dense_noise(key, 6, 140, rank, dtype=p["x"].dtype)
        return reference.flipout_lora(*(p[k] for k in names), noise=noise)

    compare(Cpu, torch.float32, y, run, parts, names, "rank > 64", factor=3.0)
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

    class Cpu:
        torch = torch.device("cpu")

    made = make(Cpu, (4, 8, 3, 2), torch.float32, grad=False) | {"key": random.key(0)}
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
    class Cpu:
        torch = torch.device("cpu")

    before = torch.get_num_threads()
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        results = []
        try:
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                parts = make(Cpu, (300, 520, 390, 8), dtype)
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


# --- few tokens: noise that is drawn inside the kernels, and kept from call to call ---------------


FEW = {"n": 96, "m": 24, "r": 4}


def few_tokens(*, tokens=3, n=96, m=24, r=4, seed=0, dtype=torch.float32):
    """x, A, rho, b, base of a small adapter, without gradients."""

    class Cpu:
        torch = torch.device("cpu")

    parts = make(Cpu, (tokens, n, m, r), dtype, grad=False, seed=seed)
    return tuple(parts[k] for k in ("x", "mean", "rho", "b", "base"))


def one_by_one(x, a, rho, b, base, key, stream=0, where=(0, 1, None, 0.0), std="square"):
    """The output by the separate ops, which draw the noise matrix anew, and its rank-space half."""
    ops = _library.ops
    e = ops.scaled_normal(rho, a.shape[1], key, stream, std)
    h = ops.adapter_shrink(x, a, e, key, stream, *where)
    return ops.adapter_expand(h, b, base, 1.0, x.dtype), h


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(
    "shape",
    # on both sides of the numbers of tokens up to which kernels draw, and of a block of columns,
    # which is smaller above rank 16; one and two tokens take known normals without a tile
    [(1, 530, 9, 8), (1, 1056, 9, 24), (2, 544, 9, 64), (3, 700, 9, 33),
     (33, 257, 5, 3), (64, 40, 8, 8), (65, 40, 8, 8), (8, 70, 9, 64), (9, 70, 9, 64),
     (128, 45, 9, 5), (129, 45, 9, 5)],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("std", ["square", "softplus", "direct"])
def test_whole_ops_are_the_separate_ops_bit_for_bit(shape, dtype, std):
    ops = _library.ops
    tokens, n, m, r = shape
    x, a, rho, b, base = few_tokens(tokens=tokens, n=n, m=m, r=r, dtype=dtype)
    key, where = random.key(7), (2, 3, None, 0.25)
    dy = torch.randn_like(base)
    for deviation in (rho, rho[:, :1]):
        y, h = one_by_one(x, a, deviation, b, base, key, 5, where, std)
        whole = (x, a, deviation, b, base, key, 5, *where, std, 1.0)
        got = ops.adapter_forward(*whole)
        assert torch.equal(got[0], y) and torch.equal(got[1], h)
        for _ in range(3):  # normals are kept from the second call on
            assert torch.equal(ops.adapter_infer(*whole), y)
        dh, db = ops.adapter_expand_backward(dy, h, b, 1.0, True, True)
        e = ops.scaled_normal(deviation, x.shape[1], key, 5, std)
        dx, da, de = ops.adapter_shrink_backward(dh, x, a, e, key, 5, *where, True, True, True)
        drho = ops.scaled_normal_backward(de, deviation, key, 5, std)
        for needs in ((True,) * 4, (False, False, True, False), (True, False, False, True)):
            found = ops.adapter_backward(
                dy, x, a, deviation, b, h, key, 5, *where, std, 1.0, *needs
            )
            for needed, got, expected in zip(needs, found, (dx, da, drho, db), strict=True):
                assert torch.equal(got, expected) if needed else got.numel() == 0


def test_inference_returns_nothing_for_arguments_that_it_does_not_take(device):
    x, a, rho, b, base = (t.to(device.torch) for t in few_tokens())
    arguments = {
        "x": x, "a": a, "rho": rho, "b": b, "base": base, "key": random.key(7, device.torch),
        "stream": 0, "row0": 0, "rows_per_id": 1, "ids": None, "dropout": 0.0, "std": "square",
        "scaling": 1.0,
    }  # fmt: skip
    infer = _library.ops.adapter_infer
    assert torch.equal(infer(**arguments), _library.ops.adapter_forward(**arguments)[0])
    for change in [
        {"x": x[:, 1:]}, {"x": x.long()}, {"x": x.to_sparse()}, {"x": x[0, 0]},
        {"a": a.half()}, {"a": a[:1]},
        {"a": a.to_sparse()}, {"b": b[:, 1:]}, {"b": b.double()},
        {"rho": rho[1:]}, {"rho": rho[:, 1:]}, {"rho": rho.half()},
        {"base": base[1:]}, {"base": base.double()},
        {"key": None}, {"key": arguments["key"][:1]}, {"key": arguments["key"].float()},
        {"rows_per_id": 0}, {"ids": torch.zeros(1, dtype=torch.int64)},
        {"dropout": 1.0}, {"std": "cube"},
    ]:  # fmt: skip
        assert infer(**(arguments | change)) is None, change
    too_wide = {"a": torch.ones(65, 96), "b": torch.ones(24, 65), "rho": torch.ones(65, 1)}
    assert infer(**(arguments | {k: t.to(device.torch) for k, t in too_wide.items()})) is None
    endless = torch.ones(1, 1, device=device.torch).expand(1 << 50, 96)
    with pytest.raises(RuntimeError, match="use fewer rows at a time"):
        infer(**(arguments | {"x": endless, "base": None}))


@pytest.mark.parametrize("stream", [3, np.int64(3)], ids=type)
@pytest.mark.parametrize("scaling", [2.0, 2, np.float32(2.0)], ids=type)
def test_numbers_of_any_type(scaling, stream):
    x, a, rho, b, base = few_tokens()
    key = random.key(7)
    expected = F.flipout_lora(x, a, rho, b, base, scaling=2.0, key=key, stream=3)
    got = F.flipout_lora(x, a, rho, b, base, scaling=scaling, key=key, stream=stream)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_small_stacks(dtype):
    """Tiles lie on the stack of the thread: half of a megabyte has to do, Python's part included."""
    script = """
import sys, threading
import torch
from bayes_kernels import functional as F, random
done = []
def run(tokens):
    x, a, rho = (torch.randn(*shape, dtype=dtype) for shape in ((tokens, 1100), (64, 1100), (64, 1100)))
    b, base = torch.randn(30, 64, dtype=dtype), torch.randn(tokens, 30, dtype=dtype)
    leaves = [t.requires_grad_() for t in (x, a, rho, b)]
    y = F.flipout_lora(*leaves, base, key=key, dropout=0.25)
    done.append(torch.autograd.grad(y.sum(), leaves))
dtype, key = getattr(torch, sys.argv[1]), random.key(1)
threading.stack_size(512 << 10)
for tokens in (1, 8, 100, 300):
    thread = threading.Thread(target=run, args=(tokens,))
    thread.start()
    thread.join()
print(len(done))
"""
    run = subprocess.run([sys.executable, "-c", script, dtype], capture_output=True, text=True)
    assert (run.returncode, run.stdout.strip()) == (0, "4"), run.stderr


def test_kept_draws_change_no_bits(kept_draws):
    parts, key = few_tokens(), random.key(1)
    y = one_by_one(*parts, key)[0]
    size = FEW["r"] * FEW["n"] * 4
    seen = []
    for _ in range(4):  # noted, drawn and kept, found, found
        assert torch.equal(F.flipout_lora(*parts, key=key), y)
        seen.append((kept_draws.known, kept_draws.bytes, kept_draws.hits))
    assert seen == [(1, 0, 0), (1, size, 0), (1, size, 1), (1, size, 2)]
    # What the draw is scaled by, and how many rows it serves, may change under it.
    x, a, rho, b, base = few_tokens(tokens=5, seed=2)
    for std in ("square", "direct"):
        expected = one_by_one(x, a, rho, b, base, key, std=std)[0]
        assert torch.equal(F.flipout_lora(x, a, rho, b, base, key=key, std=std), expected)
    assert kept_draws.hits == 4 and kept_draws.bytes == size


@pytest.mark.parametrize(
    "where",
    [{}, {"row0": 1}, {"row0": 7}, {"rows_per_group": 2}, {"rows_per_group": 3, "row0": 4},
     {"scope": "example"}, {"dropout": 0.5}],
    ids=str,
)  # fmt: skip
def test_kept_draws_serve_every_row_group(kept_draws, where):
    """The normals are those of the draw, whatever the group; each row gets the signs of its own."""
    parts, key = few_tokens(), random.key(3)
    groups = where.get("rows_per_group", 1), where.get("row0", 0)
    noise = (groups[1], groups[0], None, where.get("dropout", 0.0))
    expected = one_by_one(*parts, key, 0, noise)[0]
    for _ in range(3):
        F.flipout_lora(*parts, key=key)  # the first group's
        assert torch.equal(F.flipout_lora(*parts, key=key, **where), expected)
    assert kept_draws.known == 1 and kept_draws.hits == 4


def test_kept_draws_do_not_collide(kept_draws):
    """Keys, streams, shapes and the rounding mode: each gets its own numbers, three times."""
    keys = [random.key(0), random.key(1), random.fold_in(random.key(0), 1), torch.tensor([0, 1])]
    cases = [
        (parts, key, stream)
        for parts in (few_tokens(), few_tokens(r=5), few_tokens(n=97), few_tokens(n=48, r=8))
        for key in keys
        for stream in (0, 1, 2**31 + 5)
    ]
    expected = [one_by_one(*parts, key, stream)[0] for parts, key, stream in cases]
    for _ in range(3):
        for (parts, key, stream), y in zip(cases, expected, strict=True):
            assert torch.equal(F.flipout_lora(*parts, key=key, stream=stream), y)
    # (4, 96) and (8, 48) are as many numbers of a draw: they share them.
    assert kept_draws.known == 3 * len(keys) * 3
    libm = ctypes.CDLL(None)
    for mode in (0x400, 0x800, 0xC00) if os.uname().machine == "x86_64" else ():
        try:
            assert libm.fesetround(mode) == 0
            y = one_by_one(*cases[0][0], keys[0])[0]
            for _ in range(3):
                assert torch.equal(F.flipout_lora(*cases[0][0], key=keys[0]), y)
        finally:
            libm.fesetround(0)


def test_kept_draws_are_bounded_and_the_least_used_goes_first(kept_draws):
    parts, size = few_tokens(), FEW["r"] * FEW["n"] * 4
    kept_draws.forget(3 * size)
    expected = [one_by_one(*parts, random.key(s))[0] for s in range(8)]

    def call(seed):
        before = kept_draws.hits
        assert torch.equal(F.flipout_lora(*parts, key=random.key(seed)), expected[seed])
        assert kept_draws.bytes <= 3 * size
        return kept_draws.hits - before

    call(0), call(0)
    for seed in range(1, 8):
        assert [call(seed) for _ in range(3)] == [0, 0, 1]
        assert call(0) == 1  # used all the time: stays
    assert kept_draws.bytes == 3 * size
    assert call(6) == 1 and call(7) == 1
    assert call(1) == 0  # gone, and drawn again
    kept_draws.forget(size - 1)
    assert [call(0) for _ in range(3)] == [0, 0, 0] and kept_draws.known == 0
    kept_draws.forget(0)
    assert [call(0) for _ in range(3)] == [0, 0, 0] and kept_draws.bytes == 0


def test_notes_of_draws_are_bounded(kept_draws):
    """Keys that are new in each call keep no numbers, and at most 4096 notes."""
    x, a, rho, b, base = few_tokens(tokens=1, n=8, m=2, r=1)
    for offset in range(4200):
        F.flipout_lora(x, a, rho, b, base, key=torch.tensor([0, offset]))
    assert kept_draws.known == 4096 and kept_draws.bytes == 0 and kept_draws.hits == 0


def test_training_and_many_rows_keep_nothing(kept_draws):
    x, a, rho, b, base = few_tokens()
    rho.requires_grad_()
    for _ in range(3):
        F.flipout_lora(x, a, rho, b, base, key=random.key(0)).sum().backward()
    many = few_tokens(tokens=200)
    for _ in range(3):
        F.flipout_lora(*many, key=random.key(0))
    assert kept_draws.known == 0 and kept_draws.bytes == 0


def test_kept_draws_of_several_threads(kept_draws):
    """Threads that keep and evict the same draws get the bits of one that has all to itself."""
    parts, size = few_tokens(), FEW["r"] * FEW["n"] * 4
    kept_draws.forget(2 * size)
    expected = [one_by_one(*parts, random.key(s))[0] for s in range(5)]

    def work(start):
        for i in range(200):
            seed = (start + i // 3) % 5
            if not torch.equal(F.flipout_lora(*parts, key=random.key(seed)), expected[seed]):
                return False
        return True

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))
    assert 0 < kept_draws.bytes <= 2 * size


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_kept_draws_after_a_fork(kept_draws):
    parts, keys = few_tokens(), [random.key(0), random.key(1)]
    expected = [one_by_one(*parts, key)[0] for key in keys]
    for _ in range(3):
        F.flipout_lora(*parts, key=keys[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of a process with threads
        child = os.fork()
    if child == 0:
        status = 1
        with contextlib.suppress(BaseException):
            same = [
                torch.equal(F.flipout_lora(*parts, key=key), y)
                for key, y in zip(keys, expected, strict=True)
                for _ in range(3)
            ]
            status = 0 if all(same) and kept_draws.hits == 5 else 2
        os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert kept_draws.hits == 1


def test_the_limit_of_kept_draws_in_the_environment():
    script = (
        "import ctypes, sys\n"
        "ctypes.CDLL(sys.argv[1], ctypes.RTLD_GLOBAL)\n"
        "figures = (ctypes.c_int64 * 4)()\n"
        "ctypes.CDLL(sys.argv[2]).bayes_kernels_kept_draws(figures)\n"
        "print(figures[0])"
    )
    paths = [
        str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"),
        str(_library.find_library("libbayes_kernels.so")),
    ]
    for value, megabytes in ((None, 64), ("3", 3), ("3 MB", 64)):
        environment = {k: v for k, v in os.environ.items() if k != "BAYES_KERNELS_KEPT_DRAWS"}
        environment |= {} if value is None else {"BAYES_KERNELS_KEPT_DRAWS": value}
        run = subprocess.run(
            [sys.executable, "-c", script, *paths], capture_output=True, text=True, env=environment
        )
        assert run.stdout.strip() == str(megabytes << 20), run.stderr


# --- autograd, autocast, compile ----------------------------------------------------------------


@pytest.mark.parametrize("scope", ["token", "example", "none"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradcheck_flipout(scope, dropout):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    mean = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    rho = torch.rand(2, 5, dtype=torch.float64, requires_grad=True)
    b = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    base = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    for std in ("square", "softplus", "direct"):
        assert torch.autograd.gradcheck(
            lambda *t, std=std: F.flipout_lora(
                *t, scaling=1.5, key=random.key(3), scope=scope, dropout=dropout, std=std
            ),
            (x, mean, rho, b, base),
        )
    row = torch.rand(2, 1, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda *t: F.flipout_lora(*t, key=random.key(3), scope=scope), (x, mean, row, b, base)
    )


def test_gradcheck_scaled_and_core():
    torch.manual_seed(0)
    x = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    a = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    b = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    base = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    d = torch.randn(2, dtype=torch.float64, requires_grad=True)
    grouped = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    core = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
    groups = torch.tensor([0, 1, 2, 0, 1, 2])
    assert torch.autograd.gradcheck(F.lora, (x, a, b, base))
    assert torch.autograd.gradcheck(F.scaled_lora, (x, a, d, b, base))
    assert torch.autograd.gradcheck(
        lambda *t: F.scaled_lora(*t, groups=groups), (x, a, grouped, b, base)
    )
    assert torch.autograd.gradcheck(F.core_lora, (x, a, core, b, base))


def test_changed_key_is_refused_in_backward(device):
    parts = make(device, (4, 8, 3, 2), torch.float32)
    key = random.key(0, device.torch)
    y = F.flipout_lora(*(parts[k] for k in ("x", "mean", "rho", "b")), key=key)
    key.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_autocast_takes_x_in_the_autocast_dtype():
    class Cpu:
        torch = torch.device("cpu")

    parts = make(Cpu, (6, 40, 12, 4), torch.float32)
    key = random.key(0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = F.flipout_lora(parts["x"], parts["mean"], parts["rho"], parts["b"], key=key)
        with_base = F.lora(parts["x"], parts["mean"], parts["b"], parts["base"])
    assert y.dtype == torch.bfloat16 and with_base.dtype == torch.float32
    expected = F.flipout_lora(
        parts["x"].bfloat16(), parts["mean"], parts["rho"], parts["b"], key=key
    )
    assert torch.equal(y, expected)
    y.float().sum().backward()
    assert parts["mean"].grad.dtype == torch.float32 and parts["x"].grad.dtype == torch.float32


def forms(parts, key):
    """Every adapter of these parts: functions of x and base, and the names of their factors."""
    mean, rho, b = (parts[k] for k in ("mean", "rho", "b"))
    r = mean.shape[0]
    core = torch.randn(r, r, generator=torch.Generator().manual_seed(4)).to(mean)
    return {
        "lora": lambda x, base: F.lora(x, mean, b, base, key=key, dropout=0.2),
        "token": lambda x, base: F.flipout_lora(x, mean, rho, b, base, key=key),
        "none": lambda x, base: F.flipout_lora(x, mean, rho, b, base, key=key, scope="none"),
        "scaled": lambda x, base: F.scaled_lora(x, mean, core[0], b, base),
        "core": lambda x, base: F.core_lora(x, mean, core, b, base),
    }


HALVES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("form", ["lora", "token", "none", "scaled", "core"])
@pytest.mark.parametrize("rank", [4, 65])
@pytest.mark.parametrize("autocast", HALVES, ids=str)
def test_autocast_is_the_call_with_x_in_its_dtype(device, form, rank, autocast):
    """Of fp32, bf16 and fp16 inputs, with and without base; backward within autocast or outside."""
    parts = make(device, (6, 40, 12, rank), torch.float32)
    key, factors = random.key(0, device.torch), ("mean", "b")
    run = forms(parts, key)[form]
    for given, base_dtype in itertools.product(
        [torch.float32, *HALVES], [None, torch.float32, *HALVES]
    ):
        x = parts["x"].detach().to(given)
        base = None if base_dtype is None else parts["base"].detach().to(base_dtype)
        with torch.autocast(device.torch.type, dtype=autocast):
            y = run(x, base)
            inside = torch.autograd.grad(
                y.float().square().sum(), [parts[k] for k in factors], retain_graph=True
            )
        assert y.dtype == (base_dtype or autocast)
        expected = run(x.to(autocast), base)
        assert torch.equal(y, expected)
        outside = gradients_of_squares(expected, parts, factors)
        if rank <= 64:  # the products of larger ranks are PyTorch's, in backward as well
            assert all(torch.equal(*pair) for pair in zip(inside, outside, strict=True))


def gradients_of_squares(y, parts, names):
    return torch.autograd.grad(y.float().square().sum(), [parts[k] for k in names])


@pytest.mark.parametrize("form", ["lora", "token", "none", "scaled", "core"])
@pytest.mark.parametrize("base_dtype", HALVES, ids=str)
@pytest.mark.parametrize("tokens", [5, 70])
def test_single_precision_x_beside_a_half_precision_base(
    device, monkeypatch, form, base_dtype, tokens
):
    """Gradients are those of fp32: half is what base and y are rounded to, nothing else."""
    shape = (tokens, 136, 40, 8)
    names = ["x", "mean", "b"]
    found = {}
    for dtype in (torch.float32, torch.float64):
        parts = make(device, shape, torch.float32)
        if dtype == torch.float64:
            parts = clone_as({k: v.cpu() for k, v in parts.items()}, dtype)
            monkeypatch.setattr(_library, "ops", torch.ops.bayes_kernels)
        base, dy = (parts[k].detach().to(base_dtype) for k in ("base", "dy"))
        base, dy = (base, dy) if dtype == torch.float32 else (base.double(), dy.double())
        y = forms(parts, random.key(0, base.device))[form](parts["x"], base)
        found[dtype] = [y, *torch.autograd.grad(y, [parts[k] for k in names], dy)]
    value, *grads = found[torch.float32]
    truth, *true_grads = found[torch.float64]
    assert value.dtype == base_dtype
    eps = torch.finfo(base_dtype).eps
    assert (value.double().cpu() - truth).abs().max() <= eps * truth.abs().max()
    for name, ours, exact in zip(names, grads, true_grads, strict=True):
        assert ours.dtype == torch.float32
        assert (ours.double().cpu() - exact).norm() <= 2e-6 * exact.norm(), name


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_gives_the_same_gradients_without_recompiling(dynamic):
    class Cpu:
        torch = torch.device("cpu")

    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    parts = make(Cpu, (10, 33, 9, 4), torch.float32, batch=(2, 5))
    names = ["x", "mean", "rho", "b", "base"]

    def run(x, mean, rho, b, base, key):
        y = F.flipout_lora(x, mean, rho, b, base, key=key, stream=2, scope="example", dropout=0.1)
        return torch.tanh(y)

    compiled = torch.compile(run, fullgraph=True, backend=counter, dynamic=dynamic)
    for seed in range(6):
        key = random.key(seed)
        eager, fast = (
            run(*(parts[k] for k in names), key),
            compiled(*(parts[k] for k in names), key),
        )
        torch.testing.assert_close(fast, eager)
        for a, b in zip(gradients(fast, parts, names), gradients(eager, parts, names), strict=True):
            torch.testing.assert_close(a, b)
        if seed == 0:
            first = counter.frame_count
    assert counter.frame_count == first


def test_checkpoint_replays_the_noise():
    from torch.utils.checkpoint import checkpoint

    class Cpu:
        torch = torch.device("cpu")

    parts = make(Cpu, (6, 20, 20, 4), torch.float32)
    names = ["x", "mean", "rho", "b", "base"]
    key = random.key(9)

    def run(*tensors):
        return torch.tanh(F.flipout_lora(*tensors, key=key, stream=1, dropout=0.2))

    plain = run(*(parts[k] for k in names))
    for reentrant in (False, True):
        again = checkpoint(run, *(parts[k] for k in names), use_reentrant=reentrant)
        assert torch.equal(again, plain)
        if reentrant:  # reentrant checkpoints refuse torch.autograd.grad
            fresh = {k: parts[k].detach().clone().requires_grad_() for k in names}
            checkpoint(run, *fresh.values(), use_reentrant=True).backward(parts["dy"])
            grads = [fresh[k].grad for k in names]
        else:
            grads = list(gradients(again, parts, names))
        expected = gradients(run(*(parts[k] for k in names)), parts, names)
        for a, b in zip(grads, expected, strict=True):
            assert torch.equal(a, b)


def test_bytes_kept_for_backward():
    """x is shared with the base layer; beyond it only h (tokens, r) and the key are kept."""

    class Cpu:
        torch = torch.device("cpu")

    parts = make(Cpu, (256, 512, 512, 8), torch.float32)
    kept: dict[int, int] = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    names = ["x", "mean", "rho", "b", "base"]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        F.flipout_lora(*(parts[k] for k in names), key=random.key(0))
    for name in ("x", "mean", "rho", "b"):
        kept.pop(parts[name].untyped_storage().data_ptr(), None)
    assert sum(kept.values()) == 256 * 8 * 4 + 16


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
