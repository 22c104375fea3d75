"""Seeded random calls of every functional op against its definition in fp64, by the accuracy rule.

Shapes lie just below, at and above the constants by which kernels cut their work, which are read from
the sources; tensors are views of larger ones with any strides and offsets, and what lies between and
around their elements is NaN: a kernel that reads it gives NaN, and one that writes it is noticed. Inputs
must come out as they went in.

The suite runs the first seeds. Any others by hand, and each CPU path by BAYES_KERNELS_CPU:

    cd python_tests && python -m functional.test_fuzz 3000 [first seed] [cpu | sim]
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
import torch
from accuracy import assert_no_worse_than_torch
from torch import Tensor

from bayes_kernels import _library, random, reference
from bayes_kernels import functional as F
from bayes_kernels.optim import kl_step_

SOURCES = Path(__file__).resolve().parents[2] / "csrc"
CASES = {"cpu": int(os.environ.get("BAYES_KERNELS_FUZZ", "100")), "sim": 16}
HALVES = (torch.bfloat16, torch.float16)


@functools.cache
def edges() -> tuple[int, ...]:
    """Sizes next to the whole numbers that kernels are cut by, and next to their multiples by two."""
    found = set()
    for path in [*SOURCES.glob("*.h"), *SOURCES.glob("*.cpp"), *SOURCES.glob("*.cu*")]:
        for number in re.findall(r"\bk[A-Z]\w+ = (\d+)\b", path.read_text()):
            found |= {int(number), 2 * int(number)}
    return tuple(sorted({e + d for e in found for d in (-1, 0, 1) if 0 < e + d <= 8200}))


class Case:
    """The random choices of one call, and the memory around its tensors."""

    def __init__(self, seed: int, device: str) -> None:
        self.random = Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.device = device
        self.key = random.key(self.random.getrandbits(64))
        self.placed: list[tuple[Tensor, Tensor, Tensor, bool]] = []
        self.what: list[object] = []

    def pick(self, *choices: object) -> object:
        choice = self.random.choice(choices)
        self.what.append(choice)
        return choice

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability

    def size(self, most: int, least: int = 1) -> int:
        """At the edge of a tile, or small, or, seldom, any."""
        kind = self.random.random()
        near = [e for e in edges() if least <= e <= most]
        if kind < 0.6 and near:
            found = self.random.choice(near)
        elif kind < 0.9:
            found = self.random.randint(least, max(least, min(most, 20)))
        else:
            found = self.random.randint(least, max(least, most))
        self.what.append(found)
        return found

    def normal(self, *size: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(size, generator=self.generator, dtype=torch.float64)

    def real(self, dtypes: tuple[torch.dtype, ...]) -> torch.dtype:
        return self.pick(*(d for d in dtypes if self.device == "cpu" or d != torch.float64))  # type: ignore[return-value]

    def place(self, values: Tensor, *, changes: bool = False, dense: bool = False) -> Tensor:
        """The values as a view of a larger tensor, with other strides unless dense."""
        order = list(range(values.dim()))
        if values.dim() >= 2 and self.chance(0.2) and not dense:
            order[-2:] = order[:-3:-1]
        steps, before, after = [], [], []
        for _ in order:
            loose = not dense and self.chance(0.3)
            steps.append(self.random.choice((1, 1, 2)) if loose else 1)
            before.append(self.random.randint(0, 3) if loose else 0)
            after.append(self.random.randint(0, 3) if loose else 0)
        sizes = [
            b + s * step + a
            for s, step, b, a in zip(values.shape, steps, before, after, strict=True)
        ]
        front = self.random.choice((0, 0, 1, 3, 8))
        count = math.prod(sizes)
        memory = torch.full((front + count + 17,), torch.nan, dtype=values.dtype)
        whole = memory[front : front + count].view([sizes[i] for i in order])
        view = whole.permute([order.index(i) for i in range(values.dim())])
        for i, (s, step, b) in enumerate(zip(values.shape, steps, before, strict=True)):
            view = view.narrow(i, b, s * step)[(slice(None),) * i + (slice(None, None, step),)]
        view.copy_(values)
        self.placed.append((memory, memory.clone(), view, changes))
        return view

    def check_memory(self) -> None:
        for memory, before, view, changes in self.placed:
            if changes:  # by the same way to the copy: what was written within is no matter
                inside = torch.zeros_like(memory, dtype=torch.bool)
                inside.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(True)
                before = torch.where(inside, memory, before)
            assert torch.equal(memory.nan_to_num(7.5), before.nan_to_num(7.5)), (
                "memory around a tensor, or an input, was changed"
            )


def agree(ours: Tensor, same: Tensor, truth: Tensor, what: str) -> None:
    if ours.dtype == torch.float64:  # the definition in fp64 is no truth: as exact as either can be
        scale = float(truth.detach().abs().max()) if truth.numel() else 0.0
        torch.testing.assert_close(
            ours, truth, rtol=0, atol=1e-11 * scale + 1e-300, msg=lambda m: f"{what}: {m}"
        )
        return
    assert_no_worse_than_torch(ours, same, truth, factor=4.0, floor=8.0, what=what)


# --- families ----------------------------------------------------------------------------------


def check_adapter(
    case: Case,
    op: str,
    call: Callable[[dict[str, Tensor]], Tensor],
    define: Callable[[dict[str, Tensor]], Tensor],
    values: dict[str, Tensor],
    out: torch.dtype,
) -> None:
    """The value (in `out`) and some of the gradients of a call that takes x, against its definition."""
    leaves = [name for name in values if case.chance(0.8)] if case.chance(0.8) else []
    dtype = values["x"].dtype

    def run(
        call: Callable[[dict[str, Tensor]], Tensor], p: dict[str, Tensor], own: bool = False
    ) -> list[Tensor]:
        y = call(p)
        dy = case.place(cotangent) if own else cotangent.to(y.dtype)
        taken = [p[name] for name in leaves]
        return [y, *(torch.autograd.grad(y, taken, dy) if leaves else ())]

    def parts(kind: torch.dtype) -> dict[str, Tensor]:
        return {k: v.to(kind).requires_grad_(k in leaves) for k, v in values.items()}

    cotangent = case.normal(*values["x"].shape[:-1], values["b"].shape[-2]).to(out)
    given = {k: case.place(v).requires_grad_(k in leaves) for k, v in values.items()}
    ours = run(call, given, own=True)
    truth = run(define, parts(torch.float64))
    # Half-precision x is multiplied in fp32 on a CPU, and rounded once; on a GPU factors are half, too.
    exact = case.device == "cpu" and dtype in HALVES
    same = run(define, parts(torch.float32 if exact else dtype))
    for name, a, s, t in zip(["y", *leaves], ours, same, truth, strict=True):
        agree(a, s.to(a.dtype), t, f"{op} {name}")


def adapter(case: Case) -> None:
    op = case.pick("lora", "flipout_lora", "flipout_lora", "scaled_lora", "core_lora")
    dtype = case.real((torch.float32, torch.float32, *HALVES, torch.float64))
    budget = 4_000_000 if case.device == "cpu" else 150_000
    r = case.size(80 if case.chance(0.1) and case.device == "cpu" else 64)
    n = case.size(min(4200, budget // r))
    m = case.size(min(4200, budget // r))
    tokens = 0 if case.chance(0.03) else case.size(max(1, min(600, budget // (r * max(n, m)))))
    lead = [tokens]
    if tokens > 1 and case.chance(0.4):
        first = next(d for d in (4, 3, 2, 5, 7, tokens) if tokens % d == 0)
        lead = [first, tokens // first]
    scaling, stream = case.random.choice((1.0, 0.5, -2.0)), case.random.randrange(5)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    values = {
        "x": case.normal(*lead, n).to(dtype),
        "a": case.normal(r, n, scale=n**-0.5).to(acc),
        "b": case.normal(m, r, scale=r**-0.5).to(acc),
    }
    out = dtype
    if case.chance(0.7):
        if dtype != torch.float64 and case.chance(0.3):
            out = case.pick(torch.float32, *HALVES)  # type: ignore[assignment]
        values["base"] = case.normal(*lead, m).to(out)
    options: dict = {"scaling": scaling}
    define: Callable[..., Tensor]
    dropout = case.random.choice((0.0, 0.0, 0.1, 0.5)) if op in ("lora", "flipout_lora") else 0.0
    case.what.append(dropout)
    where: dict = {"stream": stream}
    if op == "lora":
        row0 = case.random.choice((0, 3))
        if dropout:
            options |= {"dropout": dropout, "key": case.key, "stream": stream, "row0": row0}

        def define(p: dict[str, Tensor]) -> Tensor:
            x = p["x"]
            if dropout:
                keep = reference.dropout_mask(
                    case.key, tokens, n, dropout, stream=stream, row0=row0
                )
                x = reference.dropped(x, keep.reshape(x.shape), dropout)
            return reference.lora(x, p["a"], p["b"], p.get("base"), scaling=scaling)

    elif op == "flipout_lora":
        scope = case.pick("token", "example", "none", "groups", "rows_per_group")
        std = case.pick("square", "softplus", "direct")
        shared = case.chance(0.2)
        rho = case.normal(r, 1 if shared else n, scale=0.3) + (0.5 if std == "square" else 0.0)
        values["rho"] = rho.to(acc)
        options |= {"std": std, "key": case.key, "stream": stream, "dropout": dropout}
        options["scope"] = scope if scope in F.SCOPES else "token"
        if scope == "example":
            where["rows_per_id"] = max(1, math.prod(lead[1:]))
        elif scope == "groups":
            ids = torch.randint(0, 1 << 40, lead, generator=case.generator)
            options["groups"], where["ids"] = ids, ids.reshape(-1)
        elif scope == "rows_per_group":
            row0, rows_per_id = case.random.choice((0, 5)), case.size(40)
            options |= {"rows_per_group": rows_per_id, "row0": row0}
            where |= {"rows_per_id": rows_per_id, "row0": row0}

        def define(p: dict[str, Tensor]) -> Tensor:
            noise = reference.dense_noise(case.key, tokens, n, r, dtype=p["x"].dtype, **where)
            noise.eps = random.normal(case.key, (r, n), stream=stream).to(p["x"].dtype)
            if scope == "none":
                noise.r_in, noise.r_out = (torch.ones_like(t) for t in (noise.r_in, noise.r_out))
            if dropout:
                first = where.get("row0", 0) * where.get("rows_per_id", 1)
                noise.keep = reference.dropout_mask(
                    case.key, tokens, n, dropout, stream=stream, row0=first
                )
            return reference.flipout_lora(
                p["x"], p["a"], p["rho"], p["b"], p.get("base"),
                scaling=scaling, noise=noise, std=std, dropout=dropout,
            )  # fmt: skip

    elif op == "scaled_lora":
        groups = torch.randint(0, 3, lead, generator=case.generator) if case.chance(0.5) else None
        values["d"] = case.normal(*(() if groups is None else (3,)), r).to(acc)
        options["groups"] = groups

        def define(p: dict[str, Tensor]) -> Tensor:
            return reference.scaled_lora(
                p["x"], p["a"], p["d"], p["b"], p.get("base"), scaling=scaling, groups=groups
            )

    else:
        values["core"] = case.normal(r, r, scale=r**-0.5).to(acc)

        def define(p: dict[str, Tensor]) -> Tensor:
            return reference.core_lora(
                p["x"], p["a"], p["core"], p["b"], p.get("base"), scaling=scaling
            )

    order = {"lora": ("x", "a", "b", "base"), "flipout_lora": ("x", "a", "rho", "b", "base")}
    names = order.get(str(op), ("x", "a", "d" if op == "scaled_lora" else "core", "b", "base"))
    together = case.pick(1, 2, 9) if op in order and case.chance(0.3) else 0
    fused = getattr(F, f"{op}_group" if together else str(op))

    def call(p: dict[str, Tensor]) -> Tensor:
        if not together:
            return fused(*(p.get(k) for k in names), **options)
        lists = ([p[k]] * together if k in p else None for k in names[1:])
        listed = {k: v for k, v in options.items() if k != "stream"}
        streams = None if "stream" not in options else [stream] * together
        y, *others = fused(p["x"], *lists, streams=streams, **listed)
        assert all(torch.equal(y, other) for other in others)
        return y

    check_adapter(case, str(op), call, define, values, out)


def grouped(case: Case) -> None:
    op = case.pick("gaussian_draws", "grouped_lora", "sampled_lora", "grouped_flipout_lora")
    dtype = case.real((torch.float32, torch.float32, *HALVES, torch.float64))
    budget = 2_000_000 if case.device == "cpu" else 100_000
    count = int(case.pick(1, 2, 3, 10, 33))  # type: ignore[call-overload]
    r = case.size(80 if case.chance(0.1) and case.device == "cpu" else 64)
    n, m = (case.size(max(1, min(4200, budget // (r * count)))) for _ in range(2))
    tokens = 0 if case.chance(0.03) else case.size(max(1, min(600, budget // (r * max(n, m)))))
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    lead = [tokens] if case.chance(0.7) else [1, tokens]
    values = {"x": case.normal(*lead, n).to(dtype)}
    law: dict = {"stream": case.random.randrange(5)}
    numbers = torch.randint(-9, 9, (count,), generator=case.generator)
    std = case.random.choice(F.STDS)
    drawn = op in ("gaussian_draws", "sampled_lora")
    if not drawn:
        values["mean"] = case.normal(count, r, n, scale=n**-0.5).to(acc)
    if op == "grouped_flipout_lora":
        rho = case.normal(count, r, 1 if case.chance(0.2) else n, scale=0.3)
        values["rho"] = (rho + (0.5 if std == "square" else 0.0)).to(acc)
    elif drawn:
        law["antithetic"] = bool(case.pick(True, False))
        zero, one = torch.zeros(r, n), torch.ones(r, n)
        eps = F.gaussian_draws(zero, one, numbers, key=case.key, std="direct", **law)
        values["mean"] = case.normal(r, n, scale=n**-0.5).to(acc)
        rho = case.normal(r, 1 if case.chance(0.2) else n, scale=0.3)
        values["rho"] = (rho + (0.5 if std == "square" else 0.0)).to(acc)

    def factor(p: dict[str, Tensor]) -> Tensor:
        return reference.gaussian_draws(p["mean"], p["rho"], eps.to(p["mean"].dtype), std=std)

    if op == "gaussian_draws":
        del values["x"]
        given = {k: case.place(v).requires_grad_() for k, v in values.items()}
        ours = [F.gaussian_draws(**given, draws=numbers, key=case.key, std=std, **law)]
        dy = case.normal(*ours[0].shape).to(acc)
        ours += torch.autograd.grad(ours[0], list(given.values()), case.place(dy))
        found = []
        for kind in (acc, torch.float64):
            p = {k: v.to(kind).requires_grad_() for k, v in values.items()}
            y = factor(p)
            found.append([y, *torch.autograd.grad(y, list(p.values()), dy.to(kind))])
        for name, a, s, t in zip(("draws", "dmean", "drho"), ours, *found, strict=True):
            agree(a, s, t, f"{op} {name}")
        return
    experts = () if drawn or case.chance(0.5) else (count,)
    values["b"] = case.normal(*experts, m, r, scale=r**-0.5).to(acc)
    out = dtype
    if case.chance(0.7):
        if dtype != torch.float64 and case.chance(0.3):
            out = case.pick(torch.float32, *HALVES)  # type: ignore[assignment]
        values["base"] = case.normal(*lead, m).to(out)
    options: dict = {"scaling": case.random.choice((1.0, 0.5, -2.0))}
    kind = case.pick("any", "sorted", "counted")
    ids = torch.randint(0, count, (tokens,), generator=case.generator)
    if kind == "sorted":
        ids = ids.sort().values
    elif kind == "counted":
        options["rows_per_group"] = max(1, -(-tokens // count)) + case.random.choice((0, 0, 3))
        ids = torch.arange(tokens) // options["rows_per_group"]
    if kind != "counted":
        options["groups"] = ids.reshape(lead)

    if op != "grouped_lora":
        options |= {"key": case.key, "std": std, **law}
    if drawn:
        options["draws"] = numbers
    where: dict = {"stream": law["stream"]}
    if op == "grouped_flipout_lora":
        options["row0"] = where["row0"] = case.random.choice((0, 7))
        options["scope"] = case.pick("token", "none")
        if options["scope"] == "token" and case.chance(0.4):
            where["ids"] = torch.randint(0, 1 << 40, (tokens,), generator=case.generator)
            options["sign_rows"] = where["ids"].reshape(lead)

    def define(p: dict[str, Tensor]) -> Tensor:
        if op != "grouped_flipout_lora":
            a = factor(p) if drawn else p["mean"]
            return reference.grouped_lora(
                p["x"], a, p["b"], p.get("base"), groups=ids.reshape(lead),
                scaling=options["scaling"],
            )  # fmt: skip
        noise = reference.dense_noise(case.key, tokens, n, r, dtype=p["x"].dtype, **where)
        noise.eps = random.normal(case.key, (count, r, n), stream=law["stream"]).to(p["x"].dtype)
        if options["scope"] == "none":
            noise.r_in, noise.r_out = (torch.ones_like(t) for t in (noise.r_in, noise.r_out))
        y = reference.grouped_flipout_lora(
            p["x"].reshape(-1, n), p["mean"], p["rho"], p["b"],
            groups=ids, scaling=options["scaling"], noise=noise, std=std,
        ).reshape(*lead, m)  # fmt: skip
        return y + p["base"] if "base" in p else y

    names = (
        ("x", "mean", "b", "base") if op == "grouped_lora" else ("x", "mean", "rho", "b", "base")
    )

    def call(p: dict[str, Tensor]) -> Tensor:
        return getattr(F, str(op))(*(p.get(k) for k in names), **options)

    check_adapter(case, str(op), call, define, values, out)


def tall(case: Case) -> None:
    dtype = case.real((torch.float32, torch.float64))
    op = case.pick("gram", "polar", "qr", "stiefel_step", "landing_field", "landing_step")
    count = case.pick(1, 1, 2, 3, 9)
    budget = (3_000_000 if case.device == "cpu" else 60_000) // int(count)  # type: ignore[call-overload]
    xs, ds = [], []
    for _ in range(int(count)):  # type: ignore[call-overload]
        r = case.size(70 if case.chance(0.1) and case.device == "cpu" else 64)
        n = case.size(max(r + r // 2 + 1, min(8200, budget // (r * r))), r + r // 2 + 1)
        xs.append(case.normal(n, r, scale=n**-0.5).to(dtype))
        ds.append(case.normal(n, r, scale=n**-0.5).to(dtype))
    step = op in ("polar", "qr") and case.chance(0.5)
    lr, lam, kind = 0.1, 0.7, case.random.choice(F.RETRACTIONS)
    in_place = op not in ("gram", "landing_field")
    given = [case.place(x, changes=in_place) for x in xs]
    others = [case.place(d) for d in ds]
    rate: float | Tensor = torch.tensor(lr, dtype=torch.float64) if case.chance(0.5) else lr
    info = None
    if op == "gram":
        results = F.gram(given)
        assert all(torch.equal(g, g.mT) for g in results)
    elif op == "landing_field":
        results = F.landing_field(given, others, lam)
    else:
        results = given
        if op == "stiefel_step":
            info = F.stiefel_step_(given, others, rate, retraction=kind)
        elif op == "landing_step":
            F.landing_step_(given, others, rate, lam)
        else:
            retract = F.polar_retract_ if op == "polar" else F.qr_retract_
            info = retract(given, others if step else None)
    if info is not None:
        assert info.max() <= F.REFINED, info

    def define(x: Tensor, d: Tensor) -> Tensor:
        if op == "gram":
            return reference.gram(x)
        if op == "landing_field":
            return reference.landing_field(x, d, lam)
        if op == "stiefel_step":
            return reference.stiefel_step(x, d, lr, retraction=kind)
        if op == "landing_step":
            return reference.landing_step(x, d, lr, lam)
        retract = reference.polar_retract if op == "polar" else reference.qr_retract
        return retract(x, d if step else None)

    for i, (x, d, found) in enumerate(zip(xs, ds, results, strict=True)):
        agree(found, define(x, d), define(x.double(), d.double()), f"{op} {i} {tuple(x.shape)}")


def mask_of(case: Case, rows: int, dtype: torch.dtype) -> Tensor | None:
    kind = case.pick("none", "bool", "weights")
    if kind == "none":
        return None
    kept = torch.rand(rows, generator=case.generator) < 0.7
    return kept if kind == "bool" else (kept * torch.rand(rows, generator=case.generator)).to(dtype)


def kron(case: Case) -> None:
    dtype = case.real((torch.float32, torch.float64))
    rows_dtype = dtype if dtype == torch.float64 else case.real((torch.float32, *HALVES))
    budget = 6_000_000 if case.device == "cpu" else 300_000
    d = case.size(300 if case.chance(0.2) and case.device == "cpu" else 128)
    rows = 0 if case.chance(0.05) else case.size(max(1, min(8200, budget // (d * d))))
    start, x = case.normal(d, d), case.normal(rows, d).to(rows_dtype)
    start = (start + start.T).to(dtype)
    mask = mask_of(case, rows, dtype)
    alpha, beta = case.random.choice((1.0, 0.3)), case.random.choice((1.0, 0.9, 0.0))
    scalars: list = [alpha, beta]
    if case.chance(0.5):
        scalars = [torch.tensor(v, dtype=torch.float64) for v in scalars]
    factor = case.place(start, changes=True)
    given = x.clone()
    if mask is not None:
        given[mask == 0] = torch.nan
    F.kron_accumulate_(factor, case.place(given), alpha=scalars[0], beta=scalars[1], masks=mask)
    assert torch.equal(factor, factor.T)
    options = {"alpha": alpha, "beta": beta, "mask": mask}
    same = reference.kron_accumulate(start, x.to(dtype), **options)
    agree(factor, same, reference.kron_accumulate(start.double(), x.double(), **options), "kron")


def low_rank(case: Case) -> None:
    dtype = case.real((torch.float32, torch.float64))
    k = case.size(100 if case.chance(0.1) and case.device == "cpu" else 40)
    d = case.size(3000 if case.device == "cpu" else 1100)
    rows = case.size(70)
    factor = case.place(torch.zeros(d, k, dtype=dtype), changes=True)
    truth = torch.zeros(d, k, dtype=torch.float64)
    for _ in range(2):
        # A spectrum with gaps, as the best rank is not well defined without.
        x = (case.normal(rows, d) * 0.7 ** torch.arange(rows)[:, None]).to(dtype)
        mask = mask_of(case, rows, dtype)
        F.low_rank_update_(factor, case.place(x), masks=mask)
        for part in reference.valid_rows(x.double(), mask).split(32):
            truth = reference.low_rank_update(truth, part)
    error = factor.double() @ factor.double().T - truth @ truth.T
    tolerance = 2e-5 if dtype == torch.float32 else 1e-11
    size = float((truth.T @ truth).norm())
    assert float(error.norm()) <= tolerance * size, f"{float(error.norm())} of {size}"


def divergence(case: Case) -> None:
    dtype = case.real((torch.float32, torch.float64))
    std, direction = case.pick("square", "softplus", "direct"), case.pick("elbo", "code")
    means, rhos, priors = [], [], []
    for _ in range(case.random.choice((1, 2, 7))):
        r, n = case.size(40), 0 if case.chance(0.03) else case.size(4200)
        means.append(case.normal(r, n).to(dtype))
        rho = case.normal(r, 1 if n and case.chance(0.3) else n).abs() + 0.3
        rhos.append((rho if std != "softplus" else rho - 1).to(dtype))
        priors.append(case.random.choice((0.1, 1.0, 3.0)))
    leaves = [t.clone().requires_grad_() for t in (*means, *rhos)]
    count = len(means)

    def define(kind: torch.dtype) -> list[Tensor]:
        parts = [t.to(kind).requires_grad_() for t in (*means, *rhos)]
        kl = reference.gaussian_kl(
            parts[:count], parts[count:], priors, std=str(std), direction=str(direction)
        )
        return [kl, *torch.autograd.grad(kl, parts)]

    given = [case.place(t).requires_grad_() for t in leaves]
    kl = F.gaussian_kl(given[:count], given[count:], priors, std=str(std), direction=str(direction))
    ours = [kl, *torch.autograd.grad(kl, given)]
    same, truth = define(dtype), define(torch.float64)
    for i, (a, s, t) in enumerate(zip(ours, same, truth, strict=True)):
        agree(a, s, t, f"gaussian_kl {i}")
    stepped = [case.place(t.detach(), changes=True, dense=True) for t in leaves]
    kl_step_(stepped[:count], stepped[count:], 1e-3, priors, std=str(std), direction=str(direction))
    for t, a, s, g in zip(leaves, stepped, same[1:], truth[1:], strict=True):
        agree(a, t - 1e-3 * s, t.detach().double() - 1e-3 * g, "kl_step_")


def prediction(case: Case) -> None:
    dtype = case.real((torch.float32, torch.float32, torch.float64))
    full, antithetic = case.chance(0.4), case.chance(0.5)
    cpu = case.device == "cpu"
    classes = case.size((70 if cpu else 32) if full else (1100 if cpu else 130))
    budget = (300_000 if cpu else 20_000) // (classes * (classes if full else 1))
    samples = case.size(max(2, min(8200, budget // 2)), 2)
    samples -= samples % 2
    rows = 0 if case.chance(0.03) else case.size(max(1, min(5, budget // (2 * samples))))
    spread = 10 ** case.random.uniform(-2, 1.5)
    mean = case.normal(rows, classes, scale=2.0).to(dtype)
    if full:
        a = case.normal(rows, classes, classes, scale=spread * classes**-0.5)
        cov = (a @ a.mT).to(dtype)
    else:
        cov = (spread * case.normal(rows, classes)).square().to(dtype)
    options: dict = {"stream": case.random.randrange(4), "row0": case.random.choice((0, 9))}
    if case.chance(0.3):
        options["ids"] = torch.randint(0, 1 << 40, (rows,), generator=case.generator)
    ours = F.mc_predict(
        case.place(mean),
        case.place(cov),
        n_samples=samples,
        key=case.key,
        antithetic=antithetic,
        return_standard_error=True,
        **options,
    )
    eps = reference.logit_noise(
        case.key, rows, samples, classes, antithetic=antithetic, **options
    ).double()
    if rows == 0:
        assert ours.log_probs.shape == (0, classes)
        return
    exact = reference.semidefinite_cholesky(cov).double() if full else None
    truth = reference.mc_predict(
        mean.double(), exact @ exact.mT if full else cov.double(), eps, antithetic=antithetic
    )
    # A normal is right to a few ulp, which is what a large logit is multiplied by.
    atol = 2e-5 + 1e-5 * spread
    for name, a, b in zip(ours._fields, ours, truth, strict=True):
        if name == "standard_error" and samples == (2 if antithetic else 1):
            assert a.isnan().all()  # type: ignore[union-attr]
            continue
        torch.testing.assert_close(
            a.double(), b, rtol=1e-5, atol=atol, msg=lambda m, name=name: f"{name}: {m}"
        )


def linear(case: Case) -> None:
    dtype = case.real((torch.float32, torch.float64))
    covariance = str(case.pick(*F.COVARIANCES))
    b, c, d = case.size(40), case.size(20), case.size(70)
    features, weight = case.normal(b, d).to(dtype), case.normal(c, d).to(dtype)
    scale: list[Tensor]
    if covariance == "diagonal":
        scale = [case.normal(c, d).to(dtype)]
    elif covariance == "low_rank":
        scale = [case.normal(c, d, case.size(5)).to(dtype), case.normal(c, d).abs().to(dtype)]
    else:
        size = (d, d) if case.chance(0.5) else (d * (d + 1) // 2,)
        scale = [case.normal(c, *size).to(dtype)]
    noise = case.random.choice((None, 0.3))

    def arguments(tensors: list[Tensor]) -> tuple:
        pair = tuple(tensors[2:])
        return *tensors[:2], pair if len(pair) == 2 else pair[0]

    values = [features, weight, *scale]
    results = []
    for tensors, op in (
        ([case.place(v) for v in values], F.linear_logits),
        ([v.clone() for v in values], reference.linear_logits),
        ([v.double() for v in values], reference.linear_logits),
    ):
        leaves = [t.requires_grad_() for t in tensors]
        mean, var = op(*arguments(leaves), noise, covariance=covariance)
        loss = mean.sum() + (var * torch.linspace(-1, 1, c).to(var)).sum()
        results.append([mean, var, *torch.autograd.grad(loss, leaves)])
    for i, (a, s, t) in enumerate(zip(*results, strict=True)):
        agree(a, s, t, f"linear_logits {i}")
    ours = F.mc_predict_linear(*arguments(values), noise_var=noise, covariance=covariance,
                               n_samples=8, key=case.key)  # fmt: skip
    parts = F.linear_logits(*arguments(values), noise, covariance=covariance)
    same = F.mc_predict(*parts, n_samples=8, key=case.key)
    assert torch.equal(ours.log_probs, same.log_probs)


def noise(case: Case) -> None:
    rows = 0 if case.chance(0.1) else case.size(600)
    columns = 0 if case.chance(0.1) else case.size(min(8200, 200_000 // max(rows, 1)))
    stream, row0 = case.random.randrange(9), case.random.randrange(1 << 40)
    where: dict = {"stream": stream, "row0": row0}
    ours = random.dropout_mask(case.key, rows, columns, 0.37, **where)
    assert torch.equal(ours, reference.dropout_mask(case.key, rows, columns, 0.37, **where))
    where["rows_per_id"] = case.size(40)
    if case.chance(0.4):
        where["ids"] = torch.randint(0, 1 << 50, (rows,), generator=case.generator)
    where["output"] = case.chance(0.3)
    ours = random.sign_bits(case.key, rows, columns, **where)
    assert torch.equal(ours, reference.sign_bits(case.key, rows, columns, **where))
    exact = reference.normal(case.key, (rows, columns), stream=stream)
    found = random.normal(case.key, (rows, columns), stream=stream)
    torch.testing.assert_close(found, exact, rtol=2e-6, atol=1e-6)
    assert torch.equal(random.fold_in(case.key, row0), reference.fold_in(case.key, row0))


def activations(case: Case) -> None:
    """Activations in 8 bits: the same bits as the definition, and values within a step."""
    dtype = case.real((torch.float32, torch.bfloat16, torch.float16, torch.float64))
    shape = (case.size(40), case.size(300))
    x = (case.normal(*shape) * 2.0 ** case.random.randint(-20, 8)).to(dtype)
    key, stream = random.key(case.size(9)), case.random.randint(0, 2**40)
    given = case.place(x)
    kept = F.quantize_activations(given, key=key, stream=stream, row0=shape[0])
    codes, scales = reference.quantize_activations(x, key, stream=stream, row0=shape[0])
    assert torch.equal(kept.codes, codes) and torch.equal(kept.scales, scales)
    back = kept.dequantized(dtype)
    assert torch.equal(back, reference.dequantize_activations(codes, scales, dtype))
    step = torch.exp2(scales.double() - 133).repeat_interleave(32, dim=1)[:, : shape[1]]
    assert ((back.double() - x.double()).abs() < step).all()


FAMILIES: dict[Callable[[Case], None], tuple[int, set[str]]] = {
    adapter: (8, {"lora", "flipout_lora", "lora_group", "flipout_lora_group", "scaled_lora", "core_lora"}),
    grouped: (4, {"gaussian_draws", "grouped_lora", "sampled_lora", "grouped_flipout_lora"}),
    tall: (4, {"gram", "polar_retract_", "qr_retract_", "stiefel_step_", "landing_field", "landing_step_"}),
    kron: (2, {"kron_accumulate_"}),
    low_rank: (2, {"low_rank_update_"}),
    divergence: (2, {"gaussian_kl"}),
    prediction: (3, {"mc_predict"}),
    linear: (1, {"linear_logits", "mc_predict_linear"}),
    noise: (1, set()),
    activations: (1, {"quantize_activations"}),
}  # fmt: skip


def run_case(seed: int, device: str) -> None:
    """One call; an AssertionError says what was called."""
    case = Case(seed, device)
    families = list(FAMILIES)
    family = case.random.choices(families, [FAMILIES[f][0] for f in families])[0]
    context = _library.simulator() if device == "sim" else contextlib.nullcontext()
    try:
        with context:
            family(case)
        case.check_memory()
    except Exception as error:
        raise AssertionError(
            f"seed {seed} on {device}: {family.__name__}, {case.what}: {error}"
        ) from error


@pytest.mark.parametrize("device", ["cpu", "sim"])
@pytest.mark.parametrize("part", range(4))
def test_random_calls(device: str, part: int):
    if device == "sim" and _library.load_simulator() is None:
        pytest.skip("the emulator library is not built")
    for seed in range(part, CASES[device], 4):
        run_case(seed, device)


def test_every_functional_op_is_called():
    ops = {name for name in F.__all__ if name.islower() and name != "check_divergence"}
    assert ops == set().union(*(names for _, names in FAMILIES.values()))
    assert {31, 32, 33, 2047, 2048, 2049} <= set(edges())  # of kTileTokens and kSegment


if __name__ == "__main__":
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    start = int(sys.argv[2]) if len(sys.argv) > 2 else 0
    place = sys.argv[3] if len(sys.argv) > 3 else "cpu"
    failed = 0
    for number in range(start, start + count):
        try:
            run_case(number, place)
        except AssertionError as problem:
            failed += 1
            print(str(problem)[:600], flush=True)
    print(f"{failed} of {count} calls were wrong")
    sys.exit(failed > 0)
