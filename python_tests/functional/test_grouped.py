"""Draws and grouped adapters against their definitions: accuracy rule, gradients, law, errors."""

from __future__ import annotations

import math

import pytest
import torch
from accuracy import assert_no_worse_than_torch

from bayes_kernels import _library, random, reference
from bayes_kernels import functional as F
from functional.adapter_parts import CPU, clone_as, compare, dense_noise, make

ZERO_ONE = {"std": "direct", "key": random.key(7), "stream": 3}


def normals(draws, size, antithetic=True, **options):
    """The normals of draws: those of a factor with mean 0 and deviation 1."""
    options = {**ZERO_ONE, **options}
    mean, rho = torch.zeros(size), torch.ones(size)
    return F.gaussian_draws(mean, rho, torch.tensor(draws), antithetic=antithetic, **options)


# --- the law of draws ------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(1, 1), (3, 37), (8, 4096)], ids=str)
@pytest.mark.parametrize("antithetic", [True, False])
def test_normals_are_those_of_the_contract(device, size, antithetic):
    """Pair p: the blocks of fold_in(subkey of purpose 5, p), written out here once more."""
    draws = [0, 1, 5, 4, 2**40, -3]
    found = normals(draws, size, antithetic)
    count = math.prod(size)
    for d, eps in zip(draws, found, strict=True):
        pair = d // 2 if antithetic else d
        key = reference.fold_in(reference.fold_in(random.key(7), 8 * 3 + 5), pair)
        words = reference.philox(key, torch.arange((count + 3) // 4)).double()
        u = (words.float() * 2.0**-32 + 2.0**-33).double()
        radius, angle = (-2 * u[:, 0::2].log()).sqrt(), 2 * math.pi * u[:, 1::2]
        wanted = torch.stack([radius * angle.cos(), radius * angle.sin()], -1).reshape(-1)[:count]
        sign = -1 if antithetic and d % 2 else 1
        torch.testing.assert_close(
            eps.double(), sign * wanted.reshape(size), rtol=4e-6, atol=1e-6, msg=f"draw {d}"
        )


def test_a_draw_depends_on_its_number_alone(device):
    size, draws = (3, 50), [4, 0, 9, 1, 4, 17]
    together = normals(draws, size)
    for d, eps in zip(draws, together, strict=True):
        assert torch.equal(eps, normals([d], size)[0]), d
    assert torch.equal(together[1], -together[3])  # 0 and 1 are a pair
    assert not torch.equal(together[0], normals([4], size, stream=4)[0])
    assert not torch.equal(together[0], normals([4], size, key=random.key(8))[0])


def test_draws_are_standard_normal_and_uncorrelated(device):
    eps = normals(list(range(24)), (4, 1000), antithetic=False).double()
    rows = eps.reshape(24, -1)
    assert rows.mean(1).abs().max() < 5 / math.sqrt(4000)
    assert (rows.var(1) - 1).abs().max() < 5 * math.sqrt(2 / 4000)
    correlation = rows @ rows.T / 4000
    assert (correlation - torch.diag(correlation.diag())).abs().max() < 5 / math.sqrt(4000)


@pytest.mark.parametrize("std", ["square", "softplus", "direct"])
@pytest.mark.parametrize("columns", ["rho (r, n)", "rho (r, 1)"])
def test_gaussian_draws(device, std, columns):
    g = torch.Generator().manual_seed(1)
    mean = torch.randn(5, 33, generator=g).to(device.torch).requires_grad_()
    rho = torch.rand(5, 1 if "1" in columns else 33, generator=g) + 0.1
    rho = rho.to(device.torch).requires_grad_()
    draws = torch.tensor([3, 2, 2, 11], device=device.torch)
    key = random.key(7, device.torch)
    out = F.gaussian_draws(mean, rho, draws, key=key, stream=3, std=std)
    assert out.dtype == torch.float32
    weight = torch.randn(out.shape, generator=g).to(device.torch)
    eps = reference.draw_normals(key, draws, (5, 33), stream=3)
    parts = {"mean": mean, "rho": rho}
    found = {}
    for dtype in (torch.float32, torch.float64):
        p = clone_as(parts, dtype)
        y = reference.gaussian_draws(p["mean"], p["rho"], eps.to(dtype), std=std)
        found[dtype] = [y, *torch.autograd.grad(y, list(p.values()), weight.to(dtype))]
    ours = [out, *torch.autograd.grad(out, [mean, rho], weight)]
    for name, a, b, t in zip(("value", "dmean", "drho"), ours, *found.values(), strict=True):
        assert_no_worse_than_torch(a, b, t, what=name, floor=4)


# --- grouped adapters ------------------------------------------------------------------------------

SHAPES = [  # tokens, n, m, r, groups
    (1, 1, 1, 1, 1),
    (13, 33, 5, 3, 4),
    (70, 129, 130, 17, 3),
    (64, 256, 72, 8, 10),
    (5, 40, 24, 64, 9),
]
NAMES = ["x", "a", "b", "base"]


def parts_of(device, shape, dtype, *, order="sorted", experts=False, **options):
    """x, a (G, r, n), b, base, dy, and the group of each row."""
    *sizes, count = shape
    tokens, n, m, r = sizes
    parts = make(device, (tokens, n, m, r), dtype, **options)
    g = torch.Generator().manual_seed(2)
    like = parts["mean"]
    a = torch.randn(count, r, n, generator=g, dtype=torch.float64) / math.sqrt(n)
    parts["a"] = a.to(like).requires_grad_(like.requires_grad)
    if experts:
        b = torch.randn(count, m, r, generator=g, dtype=torch.float64) / math.sqrt(r)
        parts["b"] = b.to(like).requires_grad_(like.requires_grad)
    groups = torch.randint(0, count, (tokens,), generator=g)  # some groups have no rows
    groups = groups.sort().values if order == "sorted" else groups
    return parts, groups.to(device.torch)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("order", ["sorted", "any"])
@pytest.mark.parametrize("experts", [False, True], ids=["draws", "experts"])
def test_grouped_lora(device, shape, dtype, order, experts):
    parts, groups = parts_of(device, shape, dtype, order=order, experts=experts)
    y = F.grouped_lora(*(parts[k] for k in NAMES), groups=groups, scaling=0.7)

    def run(p):
        return reference.grouped_lora(*(p[k] for k in NAMES), groups=groups, scaling=0.7)

    compare(device, dtype, y, run, parts, NAMES, "grouped_lora")


@pytest.mark.parametrize("rows_per_group", [1, 3, 7])
def test_rows_per_group_counts_the_groups(device, rows_per_group):
    parts, _ = parts_of(device, (21, 40, 24, 4, 21), torch.float32)
    given = [parts[k] for k in NAMES]
    groups = torch.arange(21, device=device.torch) // rows_per_group
    counted = F.grouped_lora(*given, rows_per_group=rows_per_group)
    assert torch.equal(counted, F.grouped_lora(*given, groups=groups))


def test_leading_shapes_and_groups_that_broadcast(device):
    parts, _ = parts_of(device, (12, 40, 24, 4, 3), torch.float32, batch=(3, 4))
    given = [parts[k] for k in NAMES]
    groups = torch.tensor([[2], [0], [2]], device=device.torch)
    y = F.grouped_lora(*given, groups=groups)
    assert y.shape == (3, 4, 24)
    for i, g in enumerate([2, 0, 2]):
        wanted = F.lora(parts["x"][i], parts["a"][g], parts["b"], parts["base"][i])
        torch.testing.assert_close(y[i], wanted)


@pytest.mark.parametrize("antithetic", [True, False])
def test_sampled_lora_is_grouped_lora_of_the_draws(device, antithetic):
    parts = make(device, (12, 40, 24, 4), torch.float32)
    names = ["x", "mean", "rho", "b", "base"]
    draws = torch.tensor([5, 4, 0], device=device.torch)
    groups = torch.arange(12, device=device.torch) % 3
    law = {"key": random.key(7, device.torch), "stream": 3, "antithetic": antithetic}
    y = F.sampled_lora(*(parts[k] for k in names), draws=draws, groups=groups, scaling=0.7, **law)
    eps = reference.draw_normals(law["key"], draws, (4, 40), stream=3, antithetic=antithetic)

    def run(p):
        a = reference.gaussian_draws(p["mean"], p["rho"], eps.to(p["mean"].dtype))
        return reference.grouped_lora(p["x"], a, p["b"], p["base"], groups=groups, scaling=0.7)

    compare(device, torch.float32, y, run, parts, names, "sampled_lora")


@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("order", ["sorted", "any"])
@pytest.mark.parametrize("scope", ["token", "none", "sign_rows"])
def test_grouped_flipout_lora(device, shape, dtype, order, scope):
    parts, groups = parts_of(device, shape, dtype, order=order, experts=True)
    tokens, n, _, r, count = shape
    g = torch.Generator().manual_seed(3)
    wide = scope != "none"
    rho = torch.rand(count, r, n if wide else 1, generator=g).to(parts["a"]) * 0.3 + 0.1
    parts["rho"] = rho.requires_grad_()
    key = random.key(5, device.torch)
    names = ["x", "a", "rho", "b", "base"]
    options = {"scope": scope if scope in ("token", "none") else "token"}
    where = {"stream": 2, "row0": 0 if scope == "sign_rows" else 4}
    options |= where
    if scope == "sign_rows":
        options["sign_rows"] = where["ids"] = torch.randperm(tokens, generator=g).to(device.torch)
    y = F.grouped_flipout_lora(
        *(parts[k] for k in names), groups=groups, key=key, scaling=0.7, **options
    )
    eps = random.normal(key, (count, r, n), stream=2)

    def run(p):
        ids = {k: v.cpu() if k == "ids" else v for k, v in where.items()}
        noise = dense_noise(device, key, tokens, n, r, dtype=p["x"].dtype, **ids)
        noise.eps = eps.to(p["x"].dtype)
        if scope == "none":
            noise.r_in, noise.r_out = torch.ones_like(noise.r_in), torch.ones_like(noise.r_out)
        return reference.grouped_flipout_lora(
            *(p[k] for k in names), groups=groups, scaling=0.7, noise=noise
        )

    compare(device, dtype, y, run, parts, names, "grouped_flipout_lora")


def dealt(groups):
    """A permutation that mixes the groups and keeps the order of the rows of each."""
    place = torch.zeros(len(groups))
    for g in groups.unique():
        own = (groups == g).nonzero()[:, 0].cpu()
        place[own] = torch.arange(len(own)) + 0.1 * float(g)
    return torch.argsort(place).to(groups.device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("experts", [False, True], ids=["draws", "experts"])
def test_rows_and_groups_in_another_order_give_the_same_bits(device, dtype, experts):
    """A row's result and a group's gradient depend on neither the place of rows nor on other groups."""
    shape = (70, 130, 40, 8, 5)
    parts, groups = parts_of(device, shape, dtype, experts=experts, grad=False)
    for name in NAMES:
        parts[name].requires_grad_()
    sorted_y = F.grouped_lora(*(parts[k] for k in NAMES), groups=groups)
    wanted = torch.autograd.grad(sorted_y, [parts["x"], parts["a"]], parts["dy"])
    again = F.grouped_lora(*(parts[k] for k in NAMES), groups=groups)
    assert torch.equal(sorted_y, again)
    moved = dealt(groups)
    mixed = {k: parts[k].detach()[moved].requires_grad_() for k in ("x", "base")}
    y = F.grouped_lora(mixed["x"], parts["a"], parts["b"], mixed["base"], groups=groups[moved])
    dx, da = torch.autograd.grad(y, [mixed["x"], parts["a"]], parts["dy"][moved])
    assert torch.equal(da, wanted[1])
    if experts:  # with one b for all, expand takes all rows in the order in which they come
        assert torch.equal(y, sorted_y[moved]) and torch.equal(dx, wanted[0][moved])


def test_rows_without_a_group_are_not_a_number_on_a_gpu(device):
    if device.name == "cpu":
        pytest.skip("an error there")
    parts, _ = parts_of(device, (9, 40, 24, 4, 3), torch.float32, experts=True)
    groups = torch.tensor([0, 3, 1, -1, 2, 2, 0, 1, 7], device=device.torch)
    known = (groups >= 0) & (groups < 3)
    plan = _library.ops.group_rows(groups, 3)
    rest = (plan, 1, None, 0, 0, None, 1.0)
    x, a, b, base = (parts[k].detach() for k in NAMES)
    y, h = _library.ops.grouped_forward(x, a, None, b, base, *rest)
    assert torch.isnan(y[~known]).all() and torch.isfinite(y[known]).all()
    wanted = F.grouped_lora(x[known], a, b, base[known], groups=groups[known])
    torch.testing.assert_close(y[known], wanted)
    dx, da, _, db = _library.ops.grouped_backward(
        parts["dy"], x, a, None, b, h, *rest, True, True, False, True
    )
    assert torch.isnan(dx[~known]).all()
    for found in (dx[known], da, db):
        assert torch.isfinite(found).all()


@pytest.mark.parametrize(("n", "m"), [(0, 4), (5, 0)], ids=["no inputs", "no outputs"])
def test_layers_without_inputs_or_outputs(device, n, m):
    at = device.torch
    x = torch.ones(6, n, device=at, requires_grad=True)
    a, mean = (x.new_ones(size, requires_grad=True) for size in ((3, 2, n), (2, n)))
    experts, b = (x.new_ones(size, requires_grad=True) for size in ((3, m, 2), (m, 2)))
    rho = x.new_ones(2, 1, requires_grad=True)
    draws, key = torch.arange(3, device=at), random.key(1, at)
    for rows_per_group in (2, 2**63 - 1):
        y = F.grouped_lora(x, a, experts, rows_per_group=rows_per_group)
        drawn = F.sampled_lora(x, mean, rho, b, draws=draws, key=key, rows_per_group=rows_per_group)
        assert y.shape == drawn.shape == (6, m) and not y.any() and not drawn.any()
        parts = [x, a, mean, experts, b, rho]
        for gradient in torch.autograd.grad(y.sum() + drawn.sum(), parts):
            assert not gradient.any()


def test_sampled_forward_of_float64_is_refused_before_it_draws_on_a_gpu(device):
    if device.name == "cpu":
        pytest.skip("the CPU takes it")
    parts = make(device, (3, 40, 24, 4), torch.float64, grad=False)
    given = [parts[k] for k in ("x", "mean", "rho", "b", "base")]
    draws, key = torch.arange(3, device=device.torch), random.key(1, device.torch)
    with pytest.raises(RuntimeError, match="float64 is supported on the CPU only"):
        _library.ops.sampled_forward(*given, draws, None, 1, key, 0, "square", True, 1.0)


@pytest.mark.parametrize("counted", [False, True], ids=["sorted", "counted"])
def test_more_groups_than_a_grid_has_blocks_are_refused_on_a_gpu(device, counted):
    if device.name == "cpu":
        pytest.skip("the CPU takes them")
    count = 33000 if not counted else 60000
    x = torch.ones(count if not counted else 64, 1, device=device.torch)
    a, b = x.new_ones(count, 1, 1), x.new_ones(1, 1)
    x = x.repeat(32, 1) if not counted else x
    plan = None
    if not counted:  # written down, as the emulator would take long to sort so many
        start = torch.arange(count + 1) * 32
        plan = torch.cat([start, torch.arange(len(x))]).to(torch.int32).to(device.torch)
    with pytest.raises(RuntimeError, match="too many groups for a GPU"):
        _library.ops.grouped_forward(x, a, None, b, None, plan, 64, None, 0, 0, None, 1.0)


@pytest.mark.parametrize("groups", [[2, 0, 0, 1, 2, 2, 0], [0, 0, 1, 2], [3, 3], []], ids=str)
def test_group_rows_sorts_the_rows(device, groups):
    ids = torch.tensor(groups, dtype=torch.int64, device=device.torch)
    plan = _library.ops.group_rows(ids, 4).long()
    start, order = plan[:5], plan[5:]
    assert torch.equal(order, torch.argsort(ids, stable=True))
    assert torch.equal(start, torch.searchsorted(ids.sort().values, torch.arange(5).to(ids)))


def test_second_derivatives():
    parts, groups = parts_of(CPU, (5, 6, 4, 2, 3), torch.float64, order="any", experts=True)
    given = [parts[k] for k in ("x", "a", "b")]
    run = lambda *p: F.grouped_lora(*p, groups=groups)  # noqa: E731
    assert torch.autograd.gradgradcheck(run, given)
    draws, key = torch.tensor([1, 6, 0]), random.key(3)
    run = lambda *p: F.gaussian_draws(*p, draws, key=key)  # noqa: E731
    assert torch.autograd.gradgradcheck(run, [parts["mean"], parts["rho"]])


def test_gradcheck():
    parts, groups = parts_of(CPU, (5, 9, 4, 2, 3), torch.float64, order="any")
    given = [parts[k] for k in NAMES]
    assert torch.autograd.gradcheck(lambda *p: F.grouped_lora(*p, groups=groups), given)
    draws, key = torch.tensor([1, 6, 0]), random.key(3)
    factors = [parts[k] for k in ("x", "mean", "rho", "b", "base")]
    sampled = lambda *p: F.sampled_lora(*p, draws=draws, groups=groups, key=key)  # noqa: E731
    assert torch.autograd.gradcheck(sampled, factors)
    rho = torch.rand(3, 2, 9, dtype=torch.float64).requires_grad_()
    noisy = lambda *p: F.grouped_flipout_lora(*p, groups=groups, key=key)  # noqa: E731
    assert torch.autograd.gradcheck(noisy, [parts["x"], parts["a"], rho, parts["b"]])
    drawn = lambda *p: F.gaussian_draws(*p, draws, key=key, std="softplus")  # noqa: E731
    assert torch.autograd.gradcheck(drawn, factors[1:3])


def test_compiles_into_one_graph():
    parts = make(CPU, (12, 40, 24, 4), torch.float32)
    given = [parts[k] for k in ("x", "mean", "rho", "b", "base")]

    def run(draws, groups, key):
        return F.sampled_lora(*given, draws=draws, groups=groups, key=key)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for seed, ids in ((1, [0, 1]), (2, [7, 3])):
        arguments = torch.tensor(ids), torch.arange(12) // 6, random.key(seed)
        torch.testing.assert_close(compiled(*arguments), run(*arguments))


# --- errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"a": torch.zeros(4, 33)}, ValueError, "factors must have shape"),
        ({"a": torch.zeros(0, 3, 33)}, ValueError, "a group at least"),
        ({"a": torch.zeros(4, 3, 32)}, ValueError, "the first factor must have shape"),
        ({"b": torch.zeros(3, 5, 3)}, ValueError, "b must have 4 groups"),
        ({"b": torch.zeros(5, 2)}, ValueError, "b must have shape"),
        ({"base": torch.zeros(13, 4)}, ValueError, "base must have shape"),
        ({"groups": None}, ValueError, "groups or rows_per_group"),
        ({"rows_per_group": 4}, ValueError, "and not both"),
        ({"groups": None, "rows_per_group": 3}, ValueError, "cover 13 rows with 4 groups"),
        ({"groups": None, "rows_per_group": 0}, ValueError, "at least 1"),
        ({"groups": torch.zeros(12, dtype=torch.int64)}, ValueError, "broadcast"),
        ({"groups": torch.zeros(13)}, TypeError, "groups must be int64"),
        ({"groups": torch.full((13,), 4)}, ValueError, r"groups must lie in \[0, 4\)"),
        ({"groups": torch.full((13,), -1)}, ValueError, r"groups must lie in \[0, 4\)"),
        ({"x": torch.zeros(13, 33, dtype=torch.int64)}, TypeError, "x must be float32"),
    ],
)
def test_errors_of_grouped_lora(change, error, text):
    given = {
        "x": torch.zeros(13, 33),
        "a": torch.zeros(4, 3, 33),
        "b": torch.zeros(5, 3),
        "groups": torch.zeros(13, dtype=torch.int64),
    }
    F.grouped_lora(**given)
    with pytest.raises(error, match=text):
        F.grouped_lora(**{**given, **change})


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"mean": torch.zeros(33)}, ValueError, "mean must have shape"),
        ({"rho": torch.zeros(3, 2)}, ValueError, "rho must have shape"),
        ({"draws": torch.zeros(2)}, TypeError, "draws must be int64"),
        ({"draws": torch.tensor(1)}, ValueError, "draws must have shape"),
        ({"draws": [1, 2]}, TypeError, "draws must be a tensor"),
        ({"key": torch.zeros(2)}, ValueError, "key must be an int64 tensor"),
        ({"std": "log"}, ValueError, "std must be one of"),
        ({"stream": 1.5}, TypeError, "stream must be an integer"),
    ],
)
def test_errors_of_draws(change, error, text):
    law = {
        "mean": torch.zeros(3, 33),
        "rho": torch.ones(3, 33),
        "draws": torch.tensor([0, 1]),
        "key": random.key(1),
        "stream": 0,
        "std": "square",
    }
    F.gaussian_draws(**law)
    with pytest.raises(error, match=text):
        F.gaussian_draws(**{**law, **change})
    x, b, groups = torch.zeros(5, 33), torch.zeros(4, 3), torch.zeros(5, dtype=torch.int64)
    F.sampled_lora(x, b=b, groups=groups, **law)
    with pytest.raises(error, match=text):
        F.sampled_lora(x, b=b, groups=groups, **{**law, **change})
