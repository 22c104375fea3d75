"""Every kernel on a device against fp64, in seconds: what a GPU is asked first, and sanitizers run on.

    python cuda_benchmarks/smoke.py [--device cuda | sim | cpu] [--small] [--family NAMES] [--json PATH]

Each case runs twice: outputs and workspaces are filled with NaN before (torch's deterministic mode), and
both runs must have the same bits. Results are compared with the definitions in bayes_kernels.reference,
in fp64 on the same device, within what dtype and length of the sums explain. A case that fails is a line
and a row; the others go on, and the exit code is 1. On a GPU all cases run once more under the profiler,
and the kernels that it sees are compared with the instances in results/registers: one that no case reaches
is named.

`--watched` is for sanitizers: each case runs once, unchecked, without anything of the definitions, whose
launches are a hundred times as many. Nothing is filled with NaN there, as initcheck would take that for
initialised.

Shapes lie around what kernels are cut by: tokens 1, 31, 32, 33, 129, 2048; n 130 and 4097; bf16 at an odd
offset; ranks 1, 8, 17, 64; lists of 1, 61 and 448; classes 2, 5, 33, 1000, 2049, 32000. `--small` leaves out
what takes the emulator, or a sanitizer, minutes.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

# Beside this file; sets one thread for CPU work before torch is imported.
import harness
import torch
from smoke_activations import activations
from smoke_adapter import ADAPTER_SHAPES, adapter
from smoke_grouped import grouped
from smoke_parts import BF16, FP16, FP32, FP64, Case, Inputs, Tensors, double
from torch import Tensor

from bayes_kernels import _library, random, reference
from bayes_kernels import functional as F

__all__ = [
    "ADAPTER_SHAPES",
    "Case",
    "Inputs",
    "activations",
    "adapter",
    "grouped",
]  # for tests, and families by name

LR = 0.1  # of the steps on the Stiefel manifold
FAMILIES = (
    "noise",
    "adapter",
    "activations",
    "grouped",
    "divergence",
    "tall",
    "predict",
    "curvature",
)


@dataclass
class Outcome:
    """A row: the largest error of any result over its largest magnitude, and what is wrong, if anything."""

    family: str
    name: str
    error: float
    allowed: float
    seconds: float
    problem: str | None = None


# --- families ------------------------------------------------------------------------------------


def noise(i: Inputs, small: bool) -> Iterator[Case]:
    key = i.key(7)
    for count in (1, 130, 4097):
        yield Case(
            "noise",
            f"normal {count}",
            lambda c=count: {"eps": random.normal(key, (c,), stream=3)},
            lambda c=count: {"eps": reference.normal(key, (c,), stream=3).double()},
            1e-6,
        )
    yield Case(
        "noise",
        "fold_in",
        lambda: {"key": random.fold_in(key, 5)},
        lambda: {"key": reference.fold_in(key, 5)},
        0.0,
    )
    for shape, of_row, dtype in itertools.product(
        ((3, 130), (8, 4097)), (False, True), (FP32, FP64)
    ):
        rho = i.uniform(shape[0], 1 if of_row else shape[1]).to(dtype)
        de = i.normal(*shape, dtype=dtype)

        def scaled(rho: Tensor = rho, de: Tensor = de, shape: tuple[int, int] = shape) -> Tensors:
            ops = _library.ops
            return {
                "e": ops.scaled_normal(rho, shape[1], key, 3, "square"),
                "drho": ops.scaled_normal_backward(de, rho, key, 3, "square"),
            }

        def defined(rho: Tensor = rho, de: Tensor = de, shape: tuple[int, int] = shape) -> Tensors:
            eps = reference.normal(key, shape, stream=3).double()
            slope = 2 * rho.double() * eps * de.double()
            return {"e": rho.double().square() * eps, "drho": slope.sum_to_size(rho.shape)}

        yield Case(
            "noise",
            f"scaled_normal {shape[0]}x{shape[1]}{', a rho for each row' if of_row else ''} "
            f"{str(dtype)[6:]}",
            scaled,
            defined,
            harness.tolerance(FP32, shape[1] if of_row else 1),
        )
    for rows, columns in ((1, 1), (33, 130), (129, 4097)):
        signs = {"rows": rows, "columns": columns}
        yield Case(
            "noise",
            f"sign_bits {rows}x{columns}",
            lambda s=signs: {"bits": random.sign_bits(key, s["rows"], s["columns"], stream=2)},
            lambda s=signs: {"bits": reference.sign_bits(key, s["rows"], s["columns"], stream=2)},
            0.0,
        )
        yield Case(
            "noise",
            f"dropout_mask {rows}x{columns}",
            lambda s=signs: {"keep": random.dropout_mask(key, s["rows"], s["columns"], 0.3)},
            lambda s=signs: {"keep": reference.dropout_mask(key, s["rows"], s["columns"], 0.3)},
            0.0,
        )


def divergence(i: Inputs, small: bool) -> Iterator[Case]:
    for number, size, by_row in itertools.product((1, 61, 448), (130, 4097), (False, True)):
        if small and number == 448 and size > 130:
            continue
        means = [i.normal(2, size).requires_grad_() for _ in range(number)]
        rhos = [i.uniform(2, 1 if by_row else size).requires_grad_() for _ in range(number)]

        def run(means: list[Tensor] = means, rhos: list[Tensor] = rhos) -> Tensors:
            kl = F.gaussian_kl(means, rhos, 0.2)
            gradients = torch.autograd.grad(kl, [*means, *rhos])
            return {"kl": kl.detach(), **{f"d{k}": g for k, g in enumerate(gradients)}}

        def truth(means: list[Tensor] = means, rhos: list[Tensor] = rhos) -> Tensors:
            m, p = [double(t) for t in means], [double(t) for t in rhos]
            kl = reference.gaussian_kl(m, p, 0.2)
            gradients = torch.autograd.grad(kl, [*m, *p])
            return {"kl": kl.detach(), **{f"d{k}": g for k, g in enumerate(gradients)}}

        def step(means: list[Tensor] = means, rhos: list[Tensor] = rhos) -> Tensors:
            m, p = [t.detach().clone() for t in means], [t.detach().clone() for t in rhos]
            weight = torch.full((), 0.01, device=m[0].device)
            _library.ops.gaussian_kl_step_(m, p, weight, [0.2] * len(m), "square", "elbo")
            return {f"s{k}": t for k, t in enumerate([*m, *p])}

        def stepped(means: list[Tensor] = means, rhos: list[Tensor] = rhos) -> Tensors:
            found = list(truth(means, rhos).values())[1:]
            return {
                f"s{k}": t.detach().double() - 0.01 * g
                for k, (t, g) in enumerate(zip([*means, *rhos], found, strict=True))
            }

        name = f"{number} x (2, {size}){' a rho for each row' if by_row else ''}"
        yield Case("divergence", f"gaussian_kl {name}", run, truth, harness.tolerance(FP32, size))
        yield Case(
            "divergence", f"gaussian_kl_step_ {name}", step, stepped, harness.tolerance(FP32, size)
        )
        if size > 130 or by_row:
            continue

        def raw(means: list[Tensor] = means, rhos: list[Tensor] = rhos) -> Tensors:
            """The ops themselves: functional.gaussian_kl takes fp64 to kernels on the CPU only."""
            ops, options = _library.ops, ([0.2] * len(means), "square", "elbo")
            m, p = [t.detach().double() for t in means], [t.detach().double() for t in rhos]
            weight = torch.ones((), dtype=FP64, device=m[0].device)
            found = {"kl": ops.gaussian_kl(m, p, *options)}
            dm, dp = ops.gaussian_kl_backward(weight, m, p, *options)
            found |= {f"d{k}": g for k, g in enumerate([*dm, *dp])}
            ops.gaussian_kl_step_(m, p, 0.01 * weight, *options)
            return found | {f"s{k}": t for k, t in enumerate([*m, *p])}

        yield Case(
            "divergence",
            f"gaussian_kl {name} float64",
            raw,
            lambda truth=truth, stepped=stepped: truth() | stepped(),
            1e-12,
        )


def tall(i: Inputs, small: bool) -> Iterator[Case]:
    for number, n, r in itertools.product((1, 61, 448), (130, 4097), (1, 8, 16, 17, 64)):
        if number > 1 and (n > 130 or (small and r != 8) or (number > 61 and r not in (1, 8))):
            continue
        xs = [i.orthonormal(n, r) for _ in range(number)]
        steps = [i.normal(n, r, scale=0.02) for _ in range(number)]
        wide = [x.double() for x in xs]
        deep = [d.double() for d in steps]

        def changed(
            op: Callable[..., object], *rest: object, xs: Sequence[Tensor] = xs, **given: object
        ) -> Tensors:
            new = [x.clone() for x in xs]
            op(new, *rest, **given)
            return {f"x{k}": x for k, x in enumerate(new)}

        def every(
            op: Callable[..., Tensor],
            *lists: Sequence[Tensor],
            rest: Sequence[object] = (),
            **given: object,
        ) -> Tensors:
            # On the CPU, where a small decomposition takes 0.1 ms; a GPU needs a hundred launches.
            found = (
                op(*(t.cpu() for t in one), *rest, **given) for one in zip(*lists, strict=True)
            )
            return {f"x{k}": x.to(lists[0][0].device) for k, x in enumerate(found)}

        size, allowed = f"{number} x ({n}, {r})", harness.tolerance(FP32, 4)
        yield Case(
            "tall",
            f"gram {size}",
            lambda xs=xs: {f"x{k}": g for k, g in enumerate(F.gram(xs))},
            lambda w=wide: every(reference.gram, w),
            allowed,
        )
        for name, op, definition in (
            ("polar", F.polar_retract_, reference.polar_retract),
            ("qr", F.qr_retract_, reference.qr_retract),
        ):
            yield Case(
                "tall",
                f"{name} {size}",
                lambda xs=xs, s=steps, op=op, c=changed: c(op, s, xs=xs),
                lambda w=wide, s=deep, f=definition, e=every: e(f, w, s),
                allowed,
            )
            yield Case(
                "tall",
                f"stiefel_step_ {name} {size}",
                lambda xs=xs, s=steps, name=name, c=changed: c(
                    F.stiefel_step_, s, LR, xs=xs, retraction=name
                ),
                lambda w=wide, s=deep, name=name, e=every: e(
                    reference.stiefel_step, w, s, rest=(LR,), retraction=name
                ),
                allowed,
            )
        yield Case(
            "tall",
            f"landing_field {size}",
            lambda xs=xs, s=steps: {f"x{k}": g for k, g in enumerate(F.landing_field(xs, s, 0.5))},
            lambda w=wide, s=deep, e=every: e(reference.landing_field, w, s, rest=(0.5,)),
            allowed,
        )
        yield Case(
            "tall",
            f"landing_step_ {size}",
            lambda xs=xs, s=steps, c=changed: c(F.landing_step_, s, LR, 0.5, xs=xs),
            lambda w=wide, s=deep, e=every: e(reference.landing_step, w, s, rest=(LR, 0.5)),
            allowed,
        )


def predict(i: Inputs, small: bool) -> Iterator[Case]:
    for classes, full, antithetic in itertools.product(
        (2, 5, 33, 1000, 2049, 32000), (False, True), (False, True)
    ):
        if (full and classes > 32) or (small and classes > 2049):
            continue
        for spread in (1.0, 60.0):  # both ways to add exponentials: bounded noise, and any
            rows, samples = (3, 64) if classes > 1000 else (9, 40)
            mean, cov = (
                i.normal(rows, classes, scale=2.0),
                spread * (i.uniform(rows, classes) + 0.2),
            )
            if full:
                cov = torch.diag_embed(cov) + 0.05
            key = i.key(5)

            def run(
                mean: Tensor = mean,
                cov: Tensor = cov,
                key: Tensor = key,
                antithetic: bool = antithetic,
                samples: int = samples,
            ) -> Tensors:
                p = F.mc_predict(
                    mean,
                    cov,
                    n_samples=samples,
                    key=key,
                    antithetic=antithetic,
                    return_standard_error=True,
                )
                return {
                    "log_probs": p.log_probs,
                    "entropy": p.entropy,
                    "expected": p.expected_entropy,
                    "error": p.standard_error,
                }

            def truth(
                mean: Tensor = mean,
                cov: Tensor = cov,
                key: Tensor = key,
                antithetic: bool = antithetic,
                samples: int = samples,
            ) -> Tensors:
                eps = reference.logit_noise(
                    key, *mean.shape[:1], samples, mean.shape[1], antithetic=antithetic
                )
                found = reference.mc_predict(
                    mean.double(), cov.double(), eps.double(), antithetic=antithetic
                )
                return dict(zip(("log_probs", "entropy", "expected", "error"), found, strict=True))

            kind = f"{'full ' if full else ''}{'antithetic ' if antithetic else ''}variance x {spread:g}"
            yield Case("predict", f"mc_predict C{classes} S{samples} {kind}", run, truth, 1e-4)


def curvature(i: Inputs, small: bool) -> Iterator[Case]:
    for number, d, k, b in (
        (1, 4097, 10, 4),
        (1, 130, 1, 33),
        (61, 130, 10, 4),
        (448, 40, 3, 2),
        (1, 260, 30, 32),
        (1, 260, 20, 8),
    ):
        if small and number == 448:
            continue
        factors, rows = (
            [i.normal(d, k) for _ in range(number)],
            [i.normal(b, d) for _ in range(number)],
        )

        def run(factors: list[Tensor] = factors, rows: list[Tensor] = rows) -> Tensors:
            new = [f.clone() for f in factors]
            F.low_rank_update_(new, rows)
            return {f"f{k}": f for k, f in enumerate(new)}

        def truth(factors: list[Tensor] = factors, rows: list[Tensor] = rows) -> Tensors:
            found = {}
            for k, (f, r) in enumerate(zip(factors, rows, strict=True)):
                new = f.double()
                for part in r.double().split(32):  # rows go in blocks of 32
                    new = reference.low_rank_update(new, part)
                found[f"gram{k}"] = new @ new.mT
            return found

        yield Case(
            "curvature",
            f"low_rank_update_ {number} x ({d}, {k}), {b} rows",
            run,
            truth,
            harness.tolerance(FP32, d),
            lambda found: {
                f"gram{name[1:]}": (w := f.double()) @ w.mT for name, f in found.items()
            },
        )
    for number, d, n, dtype in itertools.product(
        (1, 61, 448), (3, 130, 128), (300,), (FP32, BF16, FP16)
    ):
        if d > 128 or (number > 1 and (d > 3 or dtype != FP32)):
            continue
        factors, rows = (
            [torch.zeros(d, d, device=i.device) for _ in range(number)],
            [i.normal(n, d, dtype=dtype) for _ in range(number)],
        )

        def run(factors: list[Tensor] = factors, rows: list[Tensor] = rows) -> Tensors:
            new = [f.clone() for f in factors]
            F.kron_accumulate_(new, rows, alpha=0.5, beta=1.0)
            return {f"f{k}": f for k, f in enumerate(new)}

        def truth(factors: list[Tensor] = factors, rows: list[Tensor] = rows) -> Tensors:
            return {
                f"f{k}": reference.kron_accumulate(f.double(), r.double(), alpha=0.5, beta=1.0)
                for k, (f, r) in enumerate(zip(factors, rows, strict=True))
            }

        yield Case(
            "curvature",
            f"kron_accumulate_ {number} x {d}, {n} rows {str(dtype)[6:]}",
            run,
            truth,
            harness.tolerance(FP32, n),
        )


# --- running -------------------------------------------------------------------------------------


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """New tensors start as NaN, or the largest integer, in torch's ops and in ours."""
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    mode, warn = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(mode, warn_only=warn)
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]


def largest_error(got: Tensors, truth: Tensors) -> tuple[float, str]:
    """The largest error over the largest magnitude of any result, and which one; NaN counts as inf."""
    worst, where = 0.0, ""
    for name, t in truth.items():
        if not t.numel():
            continue
        g, scale = got[name].double(), t.double().abs().max().clamp_min(1e-30)
        error = float(((g - t.double()).abs().max() / scale).nan_to_num(nan=float("inf")))
        if error >= worst:
            worst, where = error, name
    return worst, where


def run_case(case: Case, watched: bool = False) -> Outcome:
    """One case, checked, or `watched`: run once, with no other kernels than its own."""
    start, problem, error = time.perf_counter(), None, float("inf")
    try:
        if watched:
            case.run()
            error = 0.0
        else:
            with poisoned():
                first, second = case.run(), case.run()
            error, where = largest_error(case.seen(first), case.truth())
            unlike = [n for n in first if not torch.equal(first[n], second[n])]
            if not error <= case.allowed:
                problem = (
                    f"{where} errs by {error:.2e} of its magnitude, allowed {case.allowed:.1e}"
                )
            elif unlike:
                problem = f"{unlike[0]} has other bits in the second run"
    except Exception as failure:  # one line for each case; the others run
        traceback.print_exc()
        problem = (
            f"{type(failure).__name__}: {str(failure).splitlines()[0] if str(failure) else ''}"
        )
    return Outcome(
        case.family, case.name, error, case.allowed, round(time.perf_counter() - start, 3), problem
    )


# What a profiler looks at: every kernel once, at sizes that fill a GPU.
COUNTED = (
    "quantize_activations T2048 n4096 bfloat16",
    "gaussian_draws 10 x (8, 4096) float32",
    "sampled_lora 10 groups T640 n4096 m4096 r8 float32 counted",
    "grouped_flipout_lora 8 groups T2048 n4096 m1024 r16 bfloat16 any",
    "flipout_lora T2048 n4097 m4096 r8 bfloat16",
    "flipout_lora T2048 n4097 m4096 r8 float32",
    "flipout_lora T2048 n4096 m1024 r64 float16",
    "gaussian_kl 448 x (2, 4097)",
    "polar 448 x (130, 8)",
    "stiefel_step_ polar 1 x (4097, 17)",
    "mc_predict C5 S40 variance x 1",
    "mc_predict C1000 S40 variance x 1",
    "mc_predict C32000 S64 antithetic variance x 1",
    "low_rank_update_ 61 x (130, 10), 4 rows",
    "kron_accumulate_ 1 x 128, 300 rows float32",
)


def kernels_of(cases: Sequence[Case]) -> set[str]:
    """Names of the kernels that cases launch. Not of their definitions: the profiler would sort a million."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for case in cases:
            case.run()
        torch.cuda.synchronize()
    return {event.name for event in profile.events() or ()}


def unreached(ran: set[str]) -> list[str]:
    """Instances in results/registers of this GPU that no kernel name of the profiler matches."""
    import registers

    major, minor = torch.cuda.get_device_capability()
    plain = {re.sub(r"\(\w+\)|c10::|\s", "", name) for name in ran}
    missing = []
    for row in registers.read_rows():
        if row.arch != f"sm_{major}{minor}":
            continue
        label = f"{row.name}<{row.arguments}>" if row.arguments else f"{row.name}("
        if not any(label.replace(" ", "") in name for name in plain):
            missing.append(f"{row.family} {label.rstrip('(')}")
    return missing


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "sim", "cuda"), default="cuda")
    parser.add_argument(
        "--small", action="store_true", help="leave out what takes long when watched"
    )
    parser.add_argument("--family", default=",".join(FAMILIES), help="some, divided by commas")
    parser.add_argument(
        "--watched", action="store_true", help="one unchecked run of each case, for sanitizers"
    )
    parser.add_argument(
        "--counters", action="store_true", help="only what a profiler looks at, unchecked"
    )
    parser.add_argument("--json", type=Path, help="a line for each case, as soon as it is done")
    given = parser.parse_args(arguments)
    chosen = given.family.split(",")
    if not set(chosen) <= set(FAMILIES):
        parser.error(f"--family must be some of {', '.join(FAMILIES)}, got {given.family}")
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU; use --device sim or cpu")
    if given.device == "sim" and _library.load_simulator() is None:
        parser.error("--device sim: the emulator is not built; build with BAYES_KERNELS_TESTS=ON")
    where = _library.simulator() if given.device == "sim" else contextlib.nullcontext()
    everything = given.device == "cuda" and chosen == list(FAMILIES) and not given.small
    start, outcomes, seen = time.perf_counter(), [], set()
    good: list[Case] = []  # for the profiler
    with where, open(given.json or "/dev/null", "w") as rows:
        for family in chosen:
            for case in globals()[family](Inputs(given.device), given.small):
                if given.counters:
                    if case.name in COUNTED:
                        case.run()
                        seen.add(case.name)
                    continue
                outcome = run_case(case, given.watched)
                outcomes.append(outcome)
                if everything and not given.watched and outcome.problem is None:
                    good.append(case)
                rows.write(json.dumps(asdict(outcome)) + "\n")
                rows.flush()
                if outcome.problem is not None:
                    print(f"FAILED {family} {case.name}: {outcome.problem}", flush=True)
    if given.counters:
        unknown = sorted(set(COUNTED) - seen)
        print(f"ran {len(seen)} cases" + (f"; no case is named {unknown[0]}" if unknown else ""))
        return 1 if unknown else 0
    failed = sum(o.problem is not None for o in outcomes)
    print(
        f"smoke on {given.device}: {len(outcomes) - failed} passed, {failed} failed "
        f"in {time.perf_counter() - start:.1f} s",
        flush=True,
    )
    if good:
        for missing in unreached(kernels_of(good)):
            print(f"not reached: {missing}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
