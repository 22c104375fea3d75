"""Adapter ops under autograd, autocast and torch.compile: gradients, checkpoints, bytes kept."""

from __future__ import annotations

import itertools

import pytest
import torch

from bayes_kernels import _library, random
from bayes_kernels import functional as F
from functional.adapter_parts import CPU, clone_as, gradients, make


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
    parts = make(CPU, (6, 40, 12, 4), torch.float32)
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


def forms(parts, key, kept=None):
    """Every adapter of these parts: functions of x and base, and the names of their factors."""
    mean, rho, b = (parts[k] for k in ("mean", "rho", "b"))
    r = mean.shape[0]
    core = torch.randn(r, r, generator=torch.Generator().manual_seed(4)).to(mean)
    noisy, kept = (mean, rho, b), {"kept": kept}
    return {
        "lora": lambda x, base: F.lora(x, mean, b, base, key=key, dropout=0.2, **kept),
        "token": lambda x, base: F.flipout_lora(x, *noisy, base, key=key, **kept),
        "none": lambda x, base: F.flipout_lora(x, *noisy, base, key=key, scope="none", **kept),
        "scaled": lambda x, base: F.scaled_lora(x, mean, core[0], b, base, **kept),
        "core": lambda x, base: F.core_lora(x, mean, core, b, base, **kept),
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
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    parts = make(CPU, (10, 33, 9, 4), torch.float32, batch=(2, 5))
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

    parts = make(CPU, (6, 20, 20, 4), torch.float32)
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

    parts = make(CPU, (256, 512, 512, 8), torch.float32)
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
