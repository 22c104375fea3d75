"""What a call of an adapter runs: one op forward, one backward, little Python, for rows of any layout."""

from __future__ import annotations

import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bayes_kernels import _library, random
from bayes_kernels import functional as F
from functional.adapter_parts import CPU, make

NAMES = ["x", "mean", "rho", "b", "base"]
CALLS = {
    "lora": lambda key, x, mean, rho, b, base: F.lora(x, mean, b, base, scaling=0.5),
    "dropout": lambda key, x, mean, rho, b, base: F.lora(x, mean, b, base, dropout=0.25, key=key),
    "token": lambda key, *parts: F.flipout_lora(*parts, key=key, stream=3, dropout=0.25),
    "example": lambda key, *parts: F.flipout_lora(*parts, key=key, scope="example", std="softplus"),
    "sample": lambda key, *parts: F.flipout_lora(*parts, key=key, row0=2, rows_per_group=4),
    "groups": lambda key, x, *parts: F.flipout_lora(x, *parts, key=key, groups=groups_of(x)),
}


def groups_of(x):
    lead = x.shape[:-1]
    return torch.arange(lead.numel(), device=x.device).reshape(lead) // 2


class Ops(TorchDispatchMode):
    """Names of the ops that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("lead", [(), (5,), (2, 3), (2, 0)], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", [name for name in CALLS if name != "groups"])
def test_one_op_each_way(name, autocast, lead):
    parts = make(CPU, (1, 33, 9, 4), torch.bfloat16 if autocast else torch.float32, batch=lead)
    inputs, key = [parts[k] for k in NAMES], random.key(5)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), Ops() as forward:
        y = CALLS[name](key, *inputs)
    assert forward.names == ["adapter_train"]
    with Ops() as backward:
        grads = torch.autograd.grad(y, inputs, parts["dy"], allow_unused=True)
    assert backward.names.count("adapter_backward") == 1
    # The gradient of base is dy itself; an input that is not used has none.
    assert not set(backward.names) - {"adapter_backward", "detach"}
    assert [g is None for g in grads] == [k == "rho" and name in ("lora", "dropout") for k in NAMES]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast), Ops() as alone:
        again = CALLS[name](key, *inputs)
    assert torch.equal(again, y)
    assert alone.names == ["adapter_infer"]


def called(run) -> int:
    """Functions that are called, those of C included."""
    count = 0

    def see(_frame, event, _argument):
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(see)
    try:
        run()
    finally:
        sys.setprofile(None)
    return count


def test_arguments_are_looked_at_once():
    """The checks of the op are the only ones: Python's would double the calls."""
    parts = make(CPU, (1, 33, 9, 4), torch.float32, batch=(2, 3))
    inputs, key = [parts[k] for k in NAMES], random.key(5)
    for name in ("lora", "token", "sample"):
        CALLS[name](key, *inputs)
        assert called(lambda name=name: CALLS[name](key, *inputs)) < 80, name
        with torch.no_grad():
            assert called(lambda name=name: CALLS[name](key, *inputs)) < 40, name


def layouts(x):
    """The numbers of x (2, 3, n), with other strides."""
    wide = torch.cat([x, x, x], -1)
    yield wide[..., x.shape[-1] : 2 * x.shape[-1]]
    yield x.transpose(0, 1).contiguous().transpose(0, 1)
    yield torch.cat([x, x], 1)[:, : x.shape[1]]
    yield torch.stack([x, x], -1)[..., 0]
    yield torch.stack([x, x], 1)[:, 0]


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("n", [1, 33])
def test_rows_of_any_layout(device, name, n):
    parts = make(device, (1, n, 9, 4), torch.float32, grad=False, batch=(2, 3))
    x, mean, rho, b, base = (parts[k] for k in NAMES)
    key = random.key(5, device.torch)

    def run(x, base, dy):
        leaves = [t.requires_grad_() for t in (x.detach(), mean, rho, b, base.detach())]
        y = CALLS[name](key, *leaves)
        found = torch.autograd.grad(y, leaves, dy, allow_unused=True)
        return [y.detach(), *(g for g in found if g is not None)]

    expected = run(x, base, parts["dy"])
    for laid in zip(layouts(x), layouts(base), layouts(parts["dy"]), strict=True):
        for got, wanted in zip(run(*laid), expected, strict=True):
            assert got.shape == wanted.shape and torch.equal(got, wanted)
    one = x[:1, :1].expand_as(x)
    for got, wanted in zip(
        run(one, base, parts["dy"]), run(one.contiguous(), base, parts["dy"]), strict=True
    ):
        assert torch.equal(got, wanted)


def test_rows_with_one_stride_are_not_copied():
    """Halves of one projection's output: their rows are as they are, in both passes."""
    parts = make(CPU, (1, 512, 8, 4), torch.float32, grad=False, batch=(4, 256))
    wide, key = torch.cat([parts["x"], parts["x"]], -1), random.key(5)
    half = wide[..., :512].requires_grad_()
    mean, rho, b, dy = (parts[k] for k in ("mean", "rho", "b", "dy"))

    def most(run):
        with torch.profiler.profile(profile_memory=True) as seen:
            run()
        found = seen.profiler.kineto_results.events()
        return max(e.nbytes() for e in found if e.name() == "[memory]")

    call = (half, mean, rho, b, None, key, 3, 0, 1, None, 0.0, "square", 1.0)
    ops = _library.ops
    y, h = ops.adapter_forward(*call)
    assert y.shape == dy.shape
    bytes_of_x = parts["x"].nbytes
    with torch.no_grad():
        assert most(lambda: ops.adapter_forward(*call)) < bytes_of_x
        backward = (dy, half, mean, rho, b, h, key, 3, 0, 1, None, 0.0, "square", 1.0)
        assert most(lambda: ops.adapter_backward(*backward, False, True, True, True)) < bytes_of_x
