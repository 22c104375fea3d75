"""Arguments of the adapter ops, their noise, and the comparison with the definition."""

from __future__ import annotations

import math
from types import SimpleNamespace

import torch
from accuracy import assert_no_worse_than_torch

from bayes_kernels import reference

CPU = SimpleNamespace(torch=torch.device("cpu"))  # what stands for the fixture `device`


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


def compare(device, dtype, ours, run_reference, parts, names, what, factor=2.0, floor=2.0):
    """Value and gradients by the accuracy rule; run_reference(parts) in the dtype and in fp64."""
    same_parts, truth_parts = clone_as(parts, dtype), clone_as(parts, torch.float64)
    same, truth = run_reference(same_parts), run_reference(truth_parts)
    bounds = {"factor": factor, "floor": floor}
    assert_no_worse_than_torch(ours, same, truth, **bounds, what=f"{what} value")
    for name, a, b, t in zip(
        names,
        gradients(ours, parts, names),
        gradients(same, same_parts, names),
        gradients(truth, truth_parts, names),
        strict=True,
    ):
        assert a.dtype == parts[name].dtype
        assert_no_worse_than_torch(a, b, t, **bounds, what=f"{what} d{name}")


def dense_noise(device, key, *sizes, **options):
    """reference.dense_noise, on the device."""
    noise = reference.dense_noise(key.cpu(), *sizes, **options)
    for field in ("eps", "r_in", "r_out"):
        setattr(noise, field, getattr(noise, field).to(device.torch))
    return noise
