"""Every kernel just below, at and above each constant by which it cuts its work.

Where the numbers allow it the inputs are small whole numbers, of which every sum is exact in fp32: then the
result has one right value, in any order of summation, and a single term too many or too few shows.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from bayes_kernels import _library, random, reference
from bayes_kernels import functional as F
from functional.adapter_parts import compare, make
from functional.predict_parts import definition, problem


def whole(*size: int, seed: int, largest: int = 3) -> Tensor:
    """fp64 numbers from -largest to largest without zero."""
    g = torch.Generator().manual_seed(seed)
    magnitude = torch.randint(1, largest + 1, size, generator=g, dtype=torch.int64)
    return (magnitude * (2 * torch.randint(0, 2, size, generator=g) - 1)).double()


def same(ours: Tensor, truth: Tensor, what: str) -> None:
    expected = truth.to(ours.dtype)
    wrong = (ours.cpu() != expected).nonzero()
    assert len(wrong) == 0, f"{what}: {len(wrong)} wrong numbers, the first at {wrong[0].tolist()}"


# --- adapter: the four products -----------------------------------------------------------------

# Tokens, columns (n, or m), rank. CPU: 512 columns (256 in fp64) are a block, from 2048 on there are
# segments of 1024 and more; 32 tokens are a tile, and 1024 / r, or half with noise, where that is less; 128
# tokens, 256 from 2048 columns on, are a chunk of a sum over tokens. GPU: 32 tokens decide for tensor
# cores, 128 columns are a sign block, 512, 256, 128 and 64 columns are those of a thread block; 32 and 128
# tokens are loops.
EDGES = [
    (1, 127, 1), (2, 128, 2), (3, 129, 4), (1, 2049, 16), (2, 4097, 64), (1, 37, 32), (2, 70, 16),
    (7, 511, 64), (8, 512, 64), (9, 513, 64), (15, 255, 33), (16, 256, 32), (17, 257, 31),
    (16, 4096, 16), (31, 2047, 8), (32, 2048, 9), (33, 2049, 17), (63, 1023, 3), (64, 1024, 5),
    (65, 1025, 24), (127, 63, 8), (128, 64, 16), (129, 65, 15), (300, 330, 48), (385, 320, 33),
]  # fmt: skip
CPU_EDGES = [(129, 2050, 64), (255, 2047, 7), (256, 2048, 1), (257, 2049, 2), (530, 1024, 5)]

# From 257 thread blocks side by side on (193 for sums over tokens in 16 bits), one of them goes over more
# tokens than its loop takes at once, or over two blocks of columns.
WIDE = [
    (33, 131585, 3, torch.float32), (33, 65664, 5, torch.bfloat16), (129, 12352, 9, torch.float16)
]  # fmt: skip


def check_products(device, tokens: int, n: int, r: int, dtype: torch.dtype, variants) -> None:
    ops, key = _library.ops, random.key(3)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    x, a, e = whole(tokens, n, seed=1), whole(r, n, seed=2), whole(r, n, seed=3)
    dh, b, base = whole(tokens, r, seed=4), whole(n, r, seed=5), whole(tokens, n, seed=6)

    def on(t: Tensor, kind: torch.dtype) -> Tensor:
        return t.to(device.torch, kind)

    same(ops.adapter_expand(on(dh, acc), on(b, acc), None, 0.5, dtype), 0.5 * dh @ b.T, "expand")
    same(
        ops.adapter_expand(on(dh, acc), on(b, acc), on(base, dtype), 0.5, dtype),
        base + 0.5 * dh @ b.T,
        "expand with base",
    )
    found = ops.adapter_expand_backward(on(base, dtype), on(dh, acc), on(b, acc), 0.5, True, True)
    same(found[0], 0.5 * base @ b, "dh")
    same(found[1], 0.5 * base.T @ dh, "db")
    for flips, dropout in variants:
        what = f"{'with' if flips else 'without'} noise, dropout {dropout}: "
        where = (5, 3, None, dropout)  # row0, rows_per_id, ids
        signs = {"stream": 2, "row0": 5, "rows_per_id": 3}
        kept = reference.dropout_mask(key, tokens, n, dropout, stream=2, row0=15)
        keep = kept.double() / (1 - dropout)
        rows, columns = torch.ones(()).double(), torch.ones(()).double()
        if flips:
            columns = reference.sign_bits(key, tokens, n, **signs).double()
            rows = reference.sign_bits(key, tokens, r, output=True, **signs).double()
        noise = (on(e, acc) if flips else None, key.to(device.torch), 2, *where)
        seen = x * keep
        h = seen @ a.T + (((seen * columns) @ e.T) * rows if flips else 0)
        same(ops.adapter_shrink(on(x, dtype), on(a, acc), *noise), h, what + "h")
        found = ops.adapter_shrink_backward(
            on(dh, acc), on(x, dtype), on(a, acc), *noise, True, True, flips
        )
        dx = dh @ a + (((dh * rows) @ e) * columns if flips else 0)
        same(found[0], dx * keep, what + "dx")
        same(found[1], dh.T @ seen, what + "da")
        if flips:
            same(found[2], (dh * rows).T @ (seen * columns), what + "de")


@pytest.mark.parametrize("shape", EDGES + CPU_EDGES, ids=str)
def test_products_of_the_adapter_are_exact(device, shape):
    if device.name == "sim" and shape in CPU_EDGES:
        pytest.skip("the GPU kernels have no such edge")
    variants = list(itertools.product((False, True), (0.0, 0.5)))
    dtypes = device.dtypes
    if (
        device.name == "sim" and shape[0] * shape[1] * shape[2] > 1 << 19
    ):  # half of them in each dtype
        dtypes = (torch.float32, (torch.bfloat16, torch.float16)[shape[2] % 2])
        variants = variants[shape[1] % 2 :: 3]
    for dtype in dtypes:
        check_products(device, *shape, dtype, variants)


@pytest.mark.parametrize("shape", WIDE, ids=str)
def test_products_of_very_wide_matrices_are_exact(device, shape):
    if device.name == "cpu":
        pytest.skip("the CPU kernels have no such edge")
    check_products(device, *shape, [(True, 0.5)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(
    "shape",
    [(1, 4096, 2051, 8), (3, 2049, 9, 24), (2, 2080, 2049, 64), (64, 2050, 9, 8), (8, 2050, 9, 64),
     (128, 2100, 9, 3), (16, 4096, 4100, 16), (129, 2100, 2050, 3)],
    ids=str,
)  # fmt: skip
def test_whole_ops_are_the_separate_ops_in_every_segment(shape, dtype):
    """The draw that is made inside the CPU kernels, where the columns are cut into segments."""
    ops = _library.ops
    n = shape[1]
    p = make(type("CPU", (), {"torch": torch.device("cpu")}), shape, dtype, grad=False)
    x, a, rho, b, base, dy = (p[k] for k in ("x", "mean", "rho", "b", "base", "dy"))
    key, where = random.key(7), (2, 3, None, 0.25)
    e = ops.scaled_normal(rho, n, key, 5, "square")
    h = ops.adapter_shrink(x, a, e, key, 5, *where)
    y = ops.adapter_expand(h, b, base, 1.0, x.dtype)
    whole = (x, a, rho, b, base, key, 5, *where, "square", 1.0)
    got = ops.adapter_forward(*whole)
    assert torch.equal(got[0], y) and torch.equal(got[1], h)
    for _ in range(2):
        assert torch.equal(ops.adapter_infer(*whole), y)
    dh, db = ops.adapter_expand_backward(dy, h, b, 1.0, True, True)
    dx, da, de = ops.adapter_shrink_backward(dh, x, a, e, key, 5, *where, True, True, True)
    drho = ops.scaled_normal_backward(de, rho, key, 5, "square")
    found = ops.adapter_backward(
        dy, x, a, rho, b, h, key, 5, *where, "square", 1.0, True, True, True, True
    )
    for ours, expected in zip(found, (dx, da, drho, db), strict=True):
        assert torch.equal(ours, expected)


# --- adapter: every public op -------------------------------------------------------------------

# tokens, n, m, r, dropout of those that have it
CALLS = [
    (16, 4096, 2051, 8, 0.0), (300, 530, 137, 8, 0.25), (300, 2080, 2053, 3, 0.25),
    (1, 70, 37, 16, 0.0), (2, 137, 42, 32, 0.25), (1, 150, 61, 64, 0.25), (2, 140, 2049, 16, 0.0),
]  # fmt: skip
KINDS = [
    "lora", "token square", "token softplus", "example direct", "example square rows", "none square",
    "none softplus rows", "groups direct rows", "scaled", "scaled groups", "core",
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", CALLS, ids=str)
def test_gradients_of_every_adapter_op(device, shape, kind: str):
    if device.name == "sim" and shape[0] * shape[1] > 1 << 19:
        pytest.skip("takes the emulator too long; there is no edge of its own")
    for dtype in (torch.float32, torch.bfloat16):
        check_gradients(device, dtype, shape, kind.split())


def check_gradients(device, dtype: torch.dtype, shape, kind: list[str]) -> None:
    tokens, n, m, r, dropout = shape
    lead = (tokens // 2, 2) if tokens % 2 == 0 else (tokens,)
    key = random.key(11)
    p = make(device, (tokens, n, m, r), dtype, batch=lead)
    names = ["x", "mean", "b", "base"]
    g = torch.Generator().manual_seed(1)
    groups = torch.randint(0, 3, lead, generator=g)
    draw = {"key": key.to(device.torch), "dropout": dropout}
    keep = reference.dropout_mask(key, tokens, n, dropout) if dropout else None
    if kind[0] == "lora":
        y = F.lora(*(p[k] for k in names), scaling=2.0, **draw)

        def run(q):
            x = reference.dropped(
                q["x"], None if keep is None else keep.reshape(q["x"].shape), dropout
            )
            return reference.lora(x, *(q[k] for k in names[1:]), scaling=2.0)

    elif kind[0] == "core":
        p["core"] = torch.randn(r, r, generator=g).to(device.torch).requires_grad_()
        names.insert(2, "core")
        y = F.core_lora(*(p[k] for k in names), scaling=2.0)

        def run(q):
            return reference.core_lora(*(q[k] for k in names), scaling=2.0)

    elif kind[0] == "scaled":
        grouped = groups if "groups" in kind else None
        size = (r,) if grouped is None else (3, r)
        p["d"] = torch.randn(size, generator=g).to(device.torch).requires_grad_()
        names.insert(2, "d")
        there = None if grouped is None else grouped.to(device.torch)
        y = F.scaled_lora(*(p[k] for k in names), scaling=2.0, groups=there)

        def run(q):
            return reference.scaled_lora(*(q[k] for k in names), scaling=2.0, groups=grouped)

    else:
        scope, std = kind[:2]
        names.insert(2, "rho")
        if kind[-1] == "rows":
            p["rho"] = p["rho"][:, :1].detach().contiguous().requires_grad_()
        where: dict = {"rows_per_id": tokens // lead[0]} if scope == "example" else {}
        options: dict = {} if scope == "groups" else {"scope": scope}
        if scope == "groups":
            options["groups"] = groups.to(device.torch)
            where = {"ids": groups.reshape(-1)}
        y = F.flipout_lora(*(p[k] for k in names), scaling=2.0, std=std, **draw, **options)
        noise = reference.dense_noise(key, tokens, n, r, dtype=torch.float64, **where)
        if scope == "none":
            noise.r_in, noise.r_out = torch.ones_like(noise.r_in), torch.ones_like(noise.r_out)

        def run(q):
            for name in ("eps", "r_in", "r_out"):
                setattr(noise, name, getattr(noise, name).to(q["x"].dtype))
            noise.keep = keep
            return reference.flipout_lora(
                *(q[k] for k in names), scaling=2.0, noise=noise, std=std, dropout=dropout
            )

    # Two products in a row, over up to 150 terms: some BLAS hit the truth by luck, MKL's to a unit here.
    bounds = {"factor": 3.0, "floor": 4.0}
    compare(device, dtype, y, on_cpu(run), p, names, f"{' '.join(kind)} {dtype}", **bounds)


def on_cpu(run):
    """The definition on the CPU, for tensors of any device."""

    def call(q):
        return run({k: v.cpu() for k, v in q.items()}).to(q["x"].device)

    return call


@pytest.mark.parametrize("rank", [65, 70])
@pytest.mark.parametrize("op", ["lora", "flipout_lora"])
def test_a_split_batch_keeps_its_dropout_above_rank_64(op: str, rank: int):
    cpu = type("CPU", (), {"torch": torch.device("cpu")})
    p = make(cpu, (20, 140, 30, rank), torch.float32)
    names = ["x", "mean", "b", "base"] if op == "lora" else ["x", "mean", "rho", "b", "base"]
    key = random.key(5)

    def run(rows: slice, row0: int) -> Tensor:
        tensors = [p[k][rows] if k in ("x", "base") else p[k] for k in names]
        return getattr(F, op)(*tensors, key=key, stream=3, dropout=0.3, row0=row0)

    parts = torch.cat([run(slice(0, 13), 2), run(slice(13, 20), 15)])

    def definition_of(q):
        keep = reference.dropout_mask(key, 20, 140, 0.3, stream=3, row0=2)
        if op == "lora":
            return reference.lora(reference.dropped(q["x"], keep, 0.3), *(q[k] for k in names[1:]))
        noise = reference.dense_noise(
            key, 20, 140, rank, stream=3, row0=2, dropout=0.3, dtype=q["x"].dtype
        )
        return reference.flipout_lora(*(q[k] for k in names), noise=noise, dropout=0.3)

    compare(cpu, torch.float32, parts, definition_of, p, names, op, factor=3.0)


# --- tall ---------------------------------------------------------------------------------------

# Rows: 48 are a panel and 3072 a chunk on the CPU. On the GPU 512 are a block's, which goes 128 or 256 at a
# time; 64 blocks take 32768, and above that each takes more. Ranks: 8, 16, 32 and 64 are the widths there.
TALL = [
    (47, 7), (48, 8), (49, 9), (95, 15), (97, 17), (127, 16), (128, 1), (129, 33), (255, 31), (256, 32),
    (257, 64), (511, 5), (512, 6), (513, 24), (1025, 40), (96, 63), (3071, 8), (3072, 16), (3073, 33),
    (6145, 3), (6191, 17),
]  # fmt: skip
VERY_TALL = [(32768, 1), (32769, 5), (32805, 8), (32805, 16), (32805, 33), (32805, 64)]


def tall_shapes(device, name: str) -> list[tuple[int, int]]:
    """Those with an edge there, and on the emulator few of the large ones."""
    if device.name != "sim":
        return TALL if name == "tall" else VERY_TALL
    return [s for s in TALL if s[0] < 3000] if name == "tall" else VERY_TALL[1:4:2]


def tall(shapes, seed: int = 0) -> list[Tensor]:
    """Well-conditioned fp32 matrices with columns of about unit length."""
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(n, r, generator=g) / n**0.5 for n, r in shapes]


def retracted(x: Tensor, kind: str) -> Tensor:
    """The retraction in fp64, from the Gram matrix."""
    gram = x.mT @ x
    if kind == "qr":
        return torch.linalg.solve_triangular(
            torch.linalg.cholesky(gram).mT, x, upper=True, left=False
        )
    values, vectors = torch.linalg.eigh(gram)
    return x @ ((vectors * values.rsqrt()) @ vectors.mT)


def close(ours: Tensor, truth: Tensor, what: str, units: float = 6.0) -> None:
    """Every number within some rounding units of the largest."""
    error = (ours.double().cpu() - truth).abs().max().item()
    allowed = units * torch.finfo(ours.dtype).eps * truth.abs().max().item()
    assert error <= allowed, f"{what}: error {error:.3g} > {allowed:.3g}"


@pytest.mark.parametrize("name", ["tall", "very tall"])
def test_gram_matrices_and_landing_fields_are_exact(device, name: str):
    shapes = tall_shapes(device, name)
    xs = [whole(n, r, seed=i) for i, (n, r) in enumerate(shapes)]
    gs = [whole(n, r, seed=100 + i) for i, (n, r) in enumerate(shapes)]
    dtypes = device.dtypes[:1] + ((torch.float64,) if torch.float64 in device.dtypes else ())
    for dtype in dtypes:
        given = [x.to(device.torch, dtype) for x in xs]
        beside = [x.to(device.torch, dtype) for x in gs]
        for shape, ours, x in zip(shapes, F.gram(given), xs, strict=True):
            same(ours, x.mT @ x, f"gram of {shape}")
        fields = F.landing_field(given, beside, 2.0)  # from x^T x and g^T x
        for shape, ours, x, g in zip(shapes, fields, xs, gs, strict=True):
            same(ours, reference.landing_field(x, g, 2.0), f"landing field of {shape}")


@pytest.mark.parametrize("kind", ["polar", "qr"])
@pytest.mark.parametrize("name", ["tall", "very tall"])
def test_retractions_and_steps_of_tall_matrices(device, name: str, kind: str):
    shapes = tall_shapes(device, name)
    retract = {"polar": F.polar_retract_, "qr": F.qr_retract_}[kind]
    xs, ds = tall(shapes), tall(shapes, seed=1)
    ours = [x.to(device.torch, copy=True) for x in xs]
    assert set(retract(ours).tolist()) == {F.RETRACTED}
    stepped = [x.to(device.torch, copy=True) for x in xs]
    steps = [0.1 * d.to(device.torch) for d in ds]
    assert set(retract(stepped, steps).tolist()) == {F.RETRACTED}
    moved = [x.clone() for x in ours]
    directions = [d.to(device.torch) for d in ds]
    assert set(F.stiefel_step_(moved, directions, 0.1, retraction=kind).tolist()) == {F.RETRACTED}
    for i, shape in enumerate(shapes):
        x, d = xs[i].double(), ds[i].double()
        q = ours[i].double().cpu()
        close(ours[i], retracted(x, kind), f"{shape}")
        step = steps[i].double().cpu()
        close(stepped[i], retracted((xs[i] + step.float()).double(), kind), f"{shape} with a step")
        target = q - 0.1 * reference.tangent_projection(q, d)
        close(moved[i], retracted(target, kind), f"{shape} after a Stiefel step")


@pytest.mark.parametrize("name", ["tall", "very tall"])
def test_landing_fields_of_tall_matrices(device, name: str):
    shapes = tall_shapes(device, name)
    xs, gs = tall(shapes), tall(shapes, seed=1)
    there = [g.to(device.torch) for g in gs]
    stepped = [x.to(device.torch, copy=True) for x in xs]
    fields = F.landing_field([x.clone() for x in stepped], there, 0.7)
    F.landing_step_(stepped, there, 0.01, 0.7)
    for i, shape in enumerate(shapes):
        truth = reference.landing_field(xs[i].double(), gs[i].double(), 0.7)
        close(fields[i], truth, f"field of {shape}")
        close(stepped[i], xs[i].double() - 0.01 * truth, f"step of {shape}")


@pytest.mark.parametrize("kind", ["polar", "qr"])
@pytest.mark.parametrize(("n", "r"), [(3121, 9), (3073, 17), (545, 33)])
def test_second_gram_matrices_of_tall_matrices(device, n: int, r: int, kind: str):
    """Condition numbers that ask for the Gram matrix of what the first factor gave."""
    g = torch.Generator().manual_seed(n)
    x = torch.randn(n, r, generator=g, dtype=torch.float64)
    x = (x @ torch.diag(torch.logspace(0, -6, r, dtype=torch.float64))).float()
    mixed = x @ torch.linalg.qr(torch.randn(r, r, generator=g))[0]
    y = mixed.to(device.torch, copy=True)
    info = {"polar": F.polar_retract_, "qr": F.qr_retract_}[kind](y)
    assert info.item() == F.REFINED
    y = y.double().cpu()
    assert (y.mT @ y - torch.eye(r)).abs().max() < 2e-7
    definition_of = {"polar": reference.polar_retract, "qr": reference.qr_retract}[kind]
    close(y.float(), definition_of(mixed.double()), f"{n, r}", units=200)


# --- predict ------------------------------------------------------------------------------------

# Rows, classes, samples. CPU: 64 classes change the layout, 16 vectors of draws are an fp32 sum of few
# classes, 1024 draws a range; 1024 classes are an fp32 sum of many, 64 draws a range; 16 ranges at most;
# 256 classes are finished at once. GPU: 32 and 2048 classes change the layout; 128 draws of few classes are
# a range, 128 ranges at most, 8 of them a block's; 16 draws of up to 2048 classes, 256 of more, 16 ranges at
# most; 256 draws are an fp32 sum; 32 to 256 threads take two classes each, or more.
PREDICT = [
    (1, 31, 128), (1, 32, 129), (2, 33, 257), (2, 63, 255), (1, 64, 256), (2, 65, 65), (1, 127, 9),
    (1, 129, 3), (1, 255, 64), (1, 257, 66), (1, 2, 1028), (1, 3, 8197), (1, 1023, 5), (1, 1040, 5),
    (1, 1041, 4), (1, 2048, 17), (1, 2049, 3), (1, 2049, 256), (1, 8, 4101),
    (1, 2, 16390), (1, 33, 4105), (2, 70, 1100),
]  # fmt: skip


@pytest.mark.parametrize("shape", PREDICT, ids=str)
@pytest.mark.parametrize("scale", [0.5, 300.0], ids=["bounded", "free"])
def test_predictions_on_both_sides_of_every_range(device, shape, scale: float):
    rows, classes, samples = shape
    large = rows * classes * samples > 30000
    if large and scale > 1 and device.name == "sim" and classes > 32:
        pytest.skip("takes the emulator too long")
    for antithetic in (False,) if large else (False, True):
        mean, cov = (t.float() for t in problem(rows, classes, scale=scale))
        key = random.key(5)
        count = samples + samples % 2 if antithetic else samples
        options = {"row0": 3, "antithetic": antithetic}
        ours = F.mc_predict(
            mean.to(device.torch),
            cov.to(device.torch),
            n_samples=count,
            key=key.to(device.torch),
            return_standard_error=True,
            **options,
        )
        atol = 1e-5 if scale < 1 else 4e-4
        for name, a, b in zip(
            ours._fields, ours, definition(mean, cov, key, count, **options), strict=True
        ):
            # A sample more or less changes a mean over them by about one in their number.
            limit = min(atol, 0.02 / count) if name != "log_probs" else atol
            torch.testing.assert_close(
                a.cpu(), b.float(), rtol=2e-5, atol=limit, msg=lambda m, name=name: f"{name}: {m}"
            )


def test_predictions_in_more_than_one_wave():
    """The CPU kernels work on as many rows at once as 16 MiB of workspace take: 20 of these."""
    mean, cov = (t.float() for t in problem(23, 20000))
    key = random.key(2)
    ours = F.mc_predict(mean, cov, n_samples=8, key=key, return_standard_error=True)
    for row in (0, 18, 19, 20, 21, 22):
        one = F.mc_predict(
            mean[row : row + 1], cov[row : row + 1], n_samples=8, key=key, row0=row,
            return_standard_error=True,
        )  # fmt: skip
        assert all(torch.equal(a[row : row + 1], b) for a, b in zip(ours, one, strict=True))
    truth = definition(mean[22:], cov[22:], key, 8, row0=22)
    torch.testing.assert_close(ours.probs[22:], truth[0].exp().float(), rtol=1e-4, atol=1e-8)


# --- curvature ----------------------------------------------------------------------------------

# d, k, rows. CPU: 256 rows of the factor are a partial sum, 8 are written at once; a vector of columns, 8 or
# 16 columns and 32 new rows are taken at a time. GPU: 32 to 256 rows of 1024; 16, 32 and 64 columns decide
# how many, and how many lanes a pair of rows has; 4 columns.
LOW_RANK = [
    (255, 7, 31), (256, 8, 32), (257, 9, 33), (263, 4, 17), (264, 15, 5), (1023, 16, 9), (1024, 17, 4),
    (1025, 5, 3), (2049, 3, 33), (513, 31, 3), (31, 2, 65), (33, 24, 8), (65, 33, 20), (300, 12, 4),
    (301, 12, 5), (129, 24, 9),
]  # fmt: skip


@pytest.mark.parametrize("shape", LOW_RANK, ids=str)
def test_low_rank_updates_on_both_sides_of_every_tile(device, shape):
    """Singular values that fall by 3/4 each: the best factor is well defined, and all rows weigh alike."""
    d, k, rows = shape
    g = torch.Generator().manual_seed(d)
    for dtype in (torch.float32, torch.float64)[: 2 if device.name == "cpu" else 1]:
        factor = torch.zeros(d, k, dtype=dtype, device=device.torch)
        truth = torch.zeros(d, k, dtype=torch.float64)
        for _ in range(2):
            fall = 0.75 ** torch.arange(rows, dtype=torch.float64)
            order = torch.randperm(rows, generator=g)
            x = (torch.randn(rows, d, generator=g, dtype=torch.float64) * fall[order, None]).to(
                dtype
            )
            F.low_rank_update_(factor, x.to(device.torch))
            for part in x.double().split(32):
                truth = reference.low_rank_update(truth, part)
        left, right = factor.cpu().double() @ factor.cpu().double().T, truth @ truth.T
        limit = 3e-6 if dtype == torch.float32 else 1e-13
        assert float((left - right).norm() / right.norm()) < limit


# Rows, d. CPU: 2048 rows are a segment, 64, or 6144 / d, a panel; 8 columns and two vectors a tile. GPU: 64
# rows are a tile, 128 or, up to 32 columns or from 16385 rows on, 256 a partial sum; 4 columns.
KRON = [
    (47, 128), (48, 127), (49, 128), (63, 96), (65, 97), (64, 7), (127, 33), (128, 9), (129, 40), (255, 32),
    (256, 31), (257, 33), (513, 65), (2047, 3), (2048, 17), (2049, 4), (4097, 16), (16384, 5), (16385, 34),
]  # fmt: skip


@pytest.mark.parametrize("weighted", [False, True])
def test_kronecker_sums_are_exact(device, weighted: bool):
    for dtype in device.dtypes:
        acc = torch.float64 if dtype == torch.float64 else torch.float32
        xs = [whole(n, d, seed=i, largest=2) for i, (n, d) in enumerate(KRON)]
        starts = [whole(d, d, seed=i) for i, (_, d) in enumerate(KRON)]
        starts = [s + s.mT for s in starts]
        g = torch.Generator().manual_seed(0)
        weights = [
            torch.tensor([0.0, 1.0, 4.0])[torch.randint(0, 3, (n,), generator=g)] for n, _ in KRON
        ]
        factors = [s.to(device.torch, acc, copy=True) for s in starts]
        masks = [w.to(device.torch, acc) for w in weights] if weighted else None
        F.kron_accumulate_(
            factors, [x.to(device.torch, dtype) for x in xs], alpha=0.5, beta=0.25, masks=masks
        )
        for shape, ours, start, x, w in zip(KRON, factors, starts, xs, weights, strict=True):
            scaled = x * w[:, None] if weighted else x
            same(ours, 0.25 * start + 0.5 * scaled.mT @ x, f"{dtype} {shape}")


# --- divergence and noise -----------------------------------------------------------------------

# 4096 weights are a partial sum; the CPU takes one logarithm of four; rows that share a rho are chunked on
# a GPU.
DIVERGENCE = [
    ((4095,), 1), ((4096,), 1), ((4097,), 1), ((8193,), 1), ((3, 1366), 1), ((4097, 1), 1),
    ((2, 4095), 4095), ((2, 4096), 4096), ((3, 4097), 4097), ((1, 8200), 8200), ((5, 257), 257), ((2, 3), 3),
]  # fmt: skip


@pytest.mark.parametrize("direction", ["elbo", "code"])
def test_divergences_on_both_sides_of_every_chunk(device, direction: str):
    """One tensor at a time: a mistake in one is not to drown in the sum over all."""
    g = torch.Generator().manual_seed(0)
    for shape, shared in DIVERGENCE:
        size = shape if shared == 1 else (shape[0], 1)
        for dtype in (torch.float32, torch.float64)[: 2 if device.name == "cpu" else 1]:
            mean = (1 + torch.rand(shape, generator=g)).to(dtype)
            rho = (0.6 + 0.2 * torch.rand(size, generator=g)).to(dtype)
            ours_in = [t.to(device.torch, copy=True).requires_grad_() for t in (mean, rho)]
            truth_in = [t.double().requires_grad_() for t in (mean, rho)]
            ours = F.gaussian_kl(*ours_in, 0.5, direction=direction)
            truth = reference.gaussian_kl([truth_in[0]], [truth_in[1]], 0.5, direction=direction)
            # A term is at least a ten-thousandth of the sum; fp32 rounds the sum once.
            torch.testing.assert_close(
                ours.double().cpu(),
                truth.detach(),
                rtol=2e-7 if dtype == torch.float32 else 1e-12,
                atol=0,
            )
            for a, b in zip(
                torch.autograd.grad(ours, ours_in),
                torch.autograd.grad(truth, truth_in),
                strict=True,
            ):
                torch.testing.assert_close(
                    a.double().cpu(), b, rtol=1e-6, atol=1e-6, msg=lambda m, s=shape: f"{s}: {m}"
                )
            with torch.no_grad():
                _library.ops.gaussian_kl_step_(
                    [ours_in[0]], [ours_in[1]], torch.tensor(1e-3, dtype=dtype, device=device.torch), [0.5],
                    "square", direction,
                )  # fmt: skip
            stepped = [
                t.detach() - 1e-3 * b
                for t, b in zip(truth_in, torch.autograd.grad(
                    reference.gaussian_kl([truth_in[0]], [truth_in[1]], 0.5, direction=direction), truth_in
                ), strict=True)
            ]  # fmt: skip
            for a, b in zip(ours_in, stepped, strict=True):
                torch.testing.assert_close(a.detach().double().cpu(), b, rtol=1e-6, atol=1e-6)


# Normals come 256, 128 or 64 at a time on the CPU, 1024 to a thread block of a GPU; signs 128 to a block.
@pytest.mark.parametrize("count", [63, 64, 65, 127, 129, 255, 256, 257, 1023, 1024, 1025, 8193])
def test_noise_on_both_sides_of_every_batch(device, count: int):
    key = random.key(3)
    there = key.to(device.torch)
    normals = reference.normal(key, (count,), stream=4)
    torch.testing.assert_close(
        random.normal(there, (count,), stream=4).cpu(), normals, rtol=2e-6, atol=1e-6
    )
    rows = 3 if count > 300 else 65
    signs = reference.sign_bits(key, rows, count, stream=1, row0=2)
    assert torch.equal(random.sign_bits(there, rows, count, stream=1, row0=2).cpu(), signs)
    kept = reference.dropout_mask(key, rows, count, 0.3, stream=1, row0=2)
    assert torch.equal(random.dropout_mask(there, rows, count, 0.3, stream=1, row0=2).cpu(), kept)
    eps = reference.normal(key, (3, count), stream=4).double()
    g = torch.Generator().manual_seed(count)
    de, rho = torch.randn(3, count, generator=g), torch.rand(3, count, generator=g) + 0.1
    for std, shared in (("square", False), ("softplus", False), ("square", True), ("direct", True)):
        given = rho[:, :1].contiguous() if shared else rho
        leaf = given.double().requires_grad_()
        truth = reference.std_of(leaf, std) * eps
        (gradient,) = torch.autograd.grad(truth, leaf, de.double())
        ops, options = _library.ops, (there, 4, std)
        ours = ops.scaled_normal(given.to(device.torch), count, *options)
        torch.testing.assert_close(ours.double().cpu(), truth.detach(), rtol=4e-6, atol=2e-6)
        drho = ops.scaled_normal_backward(de.to(device.torch), given.to(device.torch), *options)
        torch.testing.assert_close(
            drho.double().cpu(), gradient, rtol=4e-6, atol=1e-5 * count**0.5 if shared else 4e-6
        )
