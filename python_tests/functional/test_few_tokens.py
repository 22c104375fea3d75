"""Adapters of few tokens: noise that is drawn inside the kernels, and kept from call to call."""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from bayes_kernels import _library, random
from bayes_kernels import functional as F
from functional.adapter_parts import CPU, make

FEW = {"n": 96, "m": 24, "r": 4}


def few_tokens(*, tokens=3, n=96, m=24, r=4, seed=0, dtype=torch.float32):
    """x, A, rho, b, base of a small adapter, without gradients."""

    parts = make(CPU, (tokens, n, m, r), dtype, grad=False, seed=seed)
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


@pytest.mark.parametrize("op", ["adapter_infer", "adapter_train"])
def test_nothing_comes_back_for_arguments_that_the_op_does_not_take(device, op):
    x, a, rho, b, base = (t.to(device.torch) for t in few_tokens())
    arguments = {
        "x": x, "a": a, "rho": rho, "b": b, "base": base, "key": random.key(7, device.torch),
        "stream": 0, "row0": 0, "rows_per_id": 1, "ids": None, "dropout": 0.0, "std": "square",
        "scaling": 1.0,
    }  # fmt: skip

    def found(**arguments):
        made = getattr(_library.ops, op)(**arguments)
        return made if op == "adapter_infer" else made[0]

    y, h = _library.ops.adapter_forward(**arguments)
    assert torch.equal(found(**arguments), y)
    if op == "adapter_train":
        assert torch.equal(_library.ops.adapter_train(**arguments)[1], h)
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
        assert found(**(arguments | change)) is None, change
    too_wide = {"a": torch.ones(65, 96), "b": torch.ones(24, 65), "rho": torch.ones(65, 1)}
    assert found(**(arguments | {k: t.to(device.torch) for k, t in too_wide.items()})) is None
    endless = torch.ones(1, 1, device=device.torch).expand(1 << 50, 96)
    with pytest.raises(RuntimeError, match="use fewer rows at a time"):
        found(**(arguments | {"x": endless, "base": None}))


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
