"""Several adapters of one x in one call: the bits of the single calls, and their gradients."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from accuracy import assert_no_worse_than_torch
from torch import Tensor

from bayes_kernels import _library, random, reference
from bayes_kernels import functional as F

Lists = dict[str, list[Tensor]]


def make(
    device: Any,
    tokens: tuple[int, ...],
    n: int,
    sizes: list[tuple[int, int]],
    dtype: torch.dtype,
    grad: bool = False,
) -> tuple[Tensor, Lists]:
    """x, and for each adapter (m, r) its mean, rho, b and base."""
    g = torch.Generator().manual_seed(0)
    acc = torch.float64 if dtype == torch.float64 else torch.float32

    def leaf(*size: int, scale: float = 1.0, to: torch.dtype = acc) -> Tensor:
        made = (scale * torch.randn(size, generator=g, dtype=torch.float64)).to(to)
        return made.to(device.torch).requires_grad_(grad)

    x = leaf(*tokens, n, to=dtype)
    lists: Lists = {
        "mean": [leaf(r, n, scale=n**-0.5) for _, r in sizes],
        "rho": [leaf(r, n, scale=0.3) for _, r in sizes],
        "b": [leaf(m, r, scale=r**-0.5) for m, r in sizes],
        "base": [leaf(*tokens, m, to=dtype) for m, _ in sizes],
    }
    return x, lists


# Query, key and value of an attention with fewer heads of the latter; ranks that differ; more than one
# launch has; columns that end in the middle of a chunk.
SIZES = [
    [(40, 8), (24, 8), (24, 8)],
    [(33, 3), (7, 12), (20, 1)],
    [(9, 4)] * 9,
]
STREAMS = [5, 2**31 + 1, 0, 7, 8, 9, 10, 11, 12]


@pytest.mark.parametrize("sizes", SIZES, ids=["equal", "ranks", "nine"])
@pytest.mark.parametrize("tokens", [(1,), (2, 1, 3), (16,), (17,), (70,)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("grad", [False, True], ids=["infer", "train"])
def test_the_bits_are_those_of_single_calls(device, sizes, tokens, dtype, grad):
    n = 150 if len(sizes) > 3 or tokens == (70,) else 1100
    x, p = make(device, tokens, n, sizes, dtype, grad)
    streams, scaling = STREAMS[: len(sizes)], [0.5 + i for i in range(len(sizes))]
    key = random.key(3, device.torch)
    parts = list(zip(p["mean"], p["rho"], p["b"], p["base"], strict=True))
    wholes = [{}, {"dropout": 0.25, "rows_per_group": 2, "std": "direct", "row0": 3}]
    for options in wholes if len(sizes) == 3 else wholes[1:]:
        ys = F.flipout_lora_group(
            x, p["mean"], p["rho"], p["b"], p["base"], scaling=scaling, key=key, streams=streams,
            **options,
        )  # fmt: skip
        for y, one, s, stream in zip(ys, parts, scaling, streams, strict=True):
            assert torch.equal(
                y, F.flipout_lora(x, *one, scaling=s, key=key, stream=stream, **options)
            )
    for base in (None, p["base"]):
        ys = F.lora_group(x, p["mean"], p["b"], base, scaling=2.0)
        for i, y in enumerate(ys):
            one = (p["mean"][i], p["b"][i], None if base is None else base[i])
            assert torch.equal(y, F.lora(x, *one, scaling=2.0))
    ys = F.lora_group(x, p["mean"], p["b"], dropout=0.5, key=key, streams=streams)
    for a, b, y, stream in zip(p["mean"], p["b"], ys, streams, strict=True):
        assert torch.equal(y, F.lora(x, a, b, dropout=0.5, key=key, stream=stream))


@pytest.mark.parametrize("tokens", [5, 40])
def test_gradients_are_those_of_single_calls(device, tokens):
    x, p = make(device, (tokens,), 150, [(20, 8), (9, 3)], torch.float32, grad=True)
    key, streams = random.key(1, device.torch), [2, 1]
    leaves = [x, *p["mean"], *p["rho"], *p["b"], *p["base"]]
    ys = F.flipout_lora_group(
        *[x, p["mean"], p["rho"], p["b"], p["base"]], key=key, streams=streams
    )
    dys = [torch.randn_like(y) for y in ys]
    found = torch.autograd.grad(ys, leaves, dys)
    singles = [
        F.flipout_lora(x, *one, key=key, stream=s)
        for *one, s in zip(p["mean"], p["rho"], p["b"], p["base"], streams, strict=True)
    ]
    for i, (got, wanted) in enumerate(
        zip(found, torch.autograd.grad(singles, leaves, dys), strict=True)
    ):
        assert torch.equal(got, wanted), i  # two terms of dx: their sum has one order


def test_a_part_of_the_gradients(device):
    """Of one output alone, of some leaves alone, of none."""
    x, p = make(device, (5,), 40, [(6, 2), (4, 2)], torch.float32, grad=True)
    key = random.key(1, device.torch)
    args = (x, p["mean"], p["rho"], p["b"])
    ys = F.flipout_lora_group(*args, key=key, streams=[0, 1])
    (dx, da) = torch.autograd.grad(ys[1].sum(), [x, p["mean"][1]], retain_graph=True)
    single = F.flipout_lora(x, p["mean"][1], p["rho"][1], p["b"][1], key=key, stream=1)
    for got, wanted in zip(
        (dx, da), torch.autograd.grad(single.sum(), [x, p["mean"][1]]), strict=True
    ):
        assert torch.equal(got, wanted)
    frozen = [t.detach() for t in p["mean"]]
    ys = F.flipout_lora_group(x.detach(), frozen, p["rho"], p["b"], key=key, streams=[0, 1])
    sum(y.sum() for y in ys).backward()
    assert x.grad is None and all(t.grad is not None for t in (*p["rho"], *p["b"]))
    with torch.no_grad():
        assert not any(y.requires_grad for y in F.lora_group(x, p["mean"], p["b"]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("tokens", "n", "sizes"),
    # several splits; one, and more tokens than threads load at once; splits of several chunks
    [(3, 1100, [(40, 8), (30, 12)]), (16, 500, [(70, 16)]), (2, 12500, [(33, 3), (300, 33)])],
    ids=["splits", "one split", "chunks"],
)
def test_accuracy(device, dtype, tokens, n, sizes):
    """Against the definition in fp64: at most twice the error of torch in the same dtype."""
    x, p = make(device, (tokens,), n, sizes, dtype)
    key, streams = random.key(7, device.torch), [3, 4][: len(sizes)]
    scaled, unscaled = [2.0] * len(sizes), [1.0] * len(sizes)
    ys = F.flipout_lora_group(
        x, p["mean"], p["rho"], p["b"], p["base"], scaling=2.0, key=key, streams=streams
    )

    def defined(to: torch.dtype) -> tuple[Tensor, ...]:
        noise = [
            reference.dense_noise(key.cpu(), tokens, n, r, stream=s, dtype=to)
            for (_, r), s in zip(sizes, streams, strict=True)
        ]
        lists = [[t.cpu().to(to) for t in p[name]] for name in ("mean", "rho", "b", "base")]
        return reference.flipout_lora_group(x.cpu().to(to), *lists, scaling=scaled, noise=noise)

    for y, same, truth in zip(ys, defined(dtype), defined(torch.float64), strict=True):
        assert_no_worse_than_torch(y.cpu(), same, truth, what="group")
    plain = F.lora_group(x, p["mean"], p["b"], p["base"])
    same, truth = (
        reference.lora_group(
            x.cpu().to(to),
            *([t.cpu().to(to) for t in p[name]] for name in ("mean", "b", "base")),
            scaling=unscaled,
        )
        for to in (dtype, torch.float64)
    )
    for y, s, t in zip(plain, same, truth, strict=True):
        assert_no_worse_than_torch(y.cpu(), s, t, what="group without noise")


class Cpu:
    torch = torch.device("cpu")


def test_gradcheck():
    x, p = make(Cpu, (3,), 5, [(4, 2), (3, 1)], torch.float64, grad=True)
    key = random.key(2)

    def call(x: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        lists = [list(tensors[i : i + 2]) for i in (0, 2, 4, 6)]
        return F.flipout_lora_group(x, *lists, key=key, streams=[0, 1], scaling=[2.0, 0.5])

    leaves = (x, *p["mean"], *p["rho"], *p["b"], *p["base"])
    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves)


@pytest.mark.parametrize("scope", ["none", "example"])
def test_scopes_and_large_ranks(device, scope):
    for sizes in ([(6, 2), (4, 3)], [(6, 70), (4, 3)]):
        x, p = make(device, (2, 3), 40, sizes, torch.float32)
        key = random.key(1, device.torch)
        lists = [p[name] for name in ("mean", "rho", "b", "base")]
        ys = F.flipout_lora_group(x, *lists, key=key, streams=[1, 2], scope=scope)
        for y, *one, s in zip(ys, *lists, (1, 2), strict=True):
            assert torch.equal(y, F.flipout_lora(x, *one, key=key, stream=s, scope=scope))


@pytest.mark.parametrize("grad", [False, True])
def test_factors_in_other_dtypes_and_autocast(grad):
    x, p = make(Cpu, (4,), 40, [(6, 2), (4, 3)], torch.float32, grad)
    half = [t.detach().bfloat16().requires_grad_(grad) for t in p["mean"]]
    with torch.autocast("cpu", torch.bfloat16):
        ys = F.lora_group(x, half, p["b"])
        singles = [F.lora(x, a, b) for a, b in zip(half, p["b"], strict=True)]
    for y, single in zip(ys, singles, strict=True):
        assert y.dtype == torch.bfloat16 and torch.equal(y, single)


def test_compile():
    x, p = make(Cpu, (2,), 40, [(6, 2), (4, 3)], torch.float32, grad=True)
    key = random.key(1)

    def step(x: Tensor, key: Tensor) -> Tensor:
        ys = F.flipout_lora_group(x, p["mean"], p["rho"], p["b"], key=key, streams=[1, 2])
        return ys[0].square().sum() + ys[1].sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for call in (step, compiled):
        x.grad = None
        call(x, key).backward()
        if call is step:
            wanted = x.grad
    assert torch.equal(x.grad, wanted)


@pytest.mark.parametrize("lead", [(0,), (2, 0), ()], ids=str)
def test_no_tokens_and_one_without_a_dimension(device, lead):
    x, p = make(device, lead, 40, [(6, 2), (0, 3)], torch.float32, grad=True)
    ys = F.lora_group(x, p["mean"], p["b"], p["base"])
    assert [tuple(y.shape) for y in ys] == [(*lead, 6), (*lead, 0)]
    sum(y.sum() for y in ys).backward()
    assert x.grad is not None and x.grad.shape == x.shape


@pytest.fixture
def small_shared_memory(device: Any) -> Iterator[None]:
    """The emulator refuses what GPUs with 99 KiB for a block would."""
    if device.name != "sim":
        yield
        return
    library = ctypes.CDLL(str(_library.find_library("libbayes_kernels_sim.so")))
    try:
        assert library.bayes_kernels_sim_set_max_shared_bytes(101376) == 0
        yield
    finally:
        library.bayes_kernels_sim_set_max_shared_bytes(232448)


@pytest.mark.usefixtures("small_shared_memory")
def test_sums_of_wide_inputs_fit_the_shared_memory_of_small_gpus(device):
    """99 KiB a block; with more columns than fit, the kernels of more tokens give the same."""
    x, p = make(device, (16,), 33000, [(3, 64), (2, 1)], torch.float32)
    key = random.key(2, device.torch)
    ys = F.flipout_lora_group(
        x, p["mean"], p["rho"], p["b"], p["base"], key=key, streams=[0, 1], scaling=0.5
    )
    for i, y in enumerate(ys):
        more = F.flipout_lora(
            x.repeat(2, 1)[:17], p["mean"][i], p["rho"][i], p["b"][i],
            p["base"][i].repeat(2, 1)[:17], key=key, stream=i, scaling=0.5,
        )  # fmt: skip
        if device.name == "cpu":
            # Sums of 33,000 products in another order.
            torch.testing.assert_close(y, more[:16], rtol=1e-4, atol=1e-4)
        else:
            assert torch.equal(y, more[:16])


def ones(*size: int) -> Tensor:
    return torch.ones(*size)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"a": []}, ValueError, "at least one adapter"),
        ({"a": ones(2, 8)}, TypeError, "a must be a list .* got Tensor"),
        ({"b": [ones(3, 2)]}, ValueError, "b must have one entry for each of the 2 adapters, got 1"),
        ({"scaling": [1.0]}, ValueError, "scaling must have one entry"),
        ({"streams": [1, 2, 3]}, ValueError, "streams must have one entry"),
        ({"base": [ones(4, 3)]}, ValueError, "base must have one entry"),
        ({"base": []}, ValueError, "base must have one entry"),
        ({"a": [ones(2, 8), ones(2, 9)]}, ValueError, r"must have shape \(r, n = 8\)"),
        ({"b": [ones(3, 2), ones(3, 4)]}, ValueError, "b must have shape"),
        ({"x": None}, TypeError, "x must be a tensor"),
        ({"dropout": 0.5}, ValueError, "key is needed with dropout"),
        ({"streams": [1, "2"]}, TypeError, "stream must be an integer"),
    ],
    ids=str,
)  # fmt: skip
def test_errors_are_one_clear_line(change, error, text):
    arguments = {"x": ones(4, 8), "a": [ones(2, 8)] * 2, "b": [ones(3, 2)] * 2} | change
    for grad in (False, True):
        if isinstance(arguments["x"], Tensor):
            arguments["x"].requires_grad_(grad)
        with pytest.raises(error, match=text) as caught:
            F.lora_group(**arguments)
        assert str(caught.value).startswith("lora_group: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"rho": [ones(2, 8), ones(2, 7)]}, "rho must have shape"),
        ({"std": "cube"}, "std must be one of"),
        ({"scope": "row"}, "scope must be one of"),
        ({"rows_per_group": 0}, "rows_per_group must be at least 1"),
    ],
    ids=str,
)
def test_errors_of_noise(change, text):
    arguments: dict[str, Any] = {
        "x": ones(4, 8), "mean": [ones(2, 8)] * 2, "rho": [ones(2, 8)] * 2, "b": [ones(3, 2)] * 2,
        "key": random.key(0), "streams": [0, 1],
    }  # fmt: skip
    with pytest.raises(ValueError, match=text):
        F.flipout_lora_group(**(arguments | change))


def test_the_op_returns_nothing_for_arguments_that_it_does_not_take(device):
    x, p = make(device, (3,), 40, [(6, 2), (4, 3)], torch.float32)
    key = random.key(1, device.torch)
    good: dict[str, Any] = {
        "x": x, "a": p["mean"], "rho": p["rho"], "b": p["b"], "base": p["base"], "key": key,
        "streams": [0, 1], "row0": 0, "rows_per_id": 1, "ids": None, "dropout": 0.0,
        "std": "square", "scaling": [1.0, 2.0], "train": True,
    }  # fmt: skip
    op = _library.ops.adapter_group
    assert [len(found) for found in op(**good)] == [2, 2]
    assert [len(found) for found in op(**(good | {"train": False}))] == [2, 0]
    for change in [
        {"a": p["mean"][:1]}, {"rho": p["rho"][:1]}, {"base": p["base"][1:]}, {"streams": [0]},
        {"scaling": [1.0]}, {"key": None}, {"std": "cube"}, {"dropout": 1.0}, {"x": x.long()},
        {"b": [t.double() for t in p["b"]]}, {"base": p["base"][::-1]},
    ]:  # fmt: skip
        for train in (False, True):
            assert op(**(good | {"train": train} | change)) == ([], []), change
