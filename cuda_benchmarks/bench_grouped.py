"""Forward passes of an adapter under S draws, rows of one draw after the other, without the base layer.

    python cuda_benchmarks grouped --device cpu [--quick] [--vs PROVIDERS] [--save]

Providers
    eager          plain PyTorch: draws by torch.randn, one batched product
    shared         bayes_kernels.functional.flipout_lora, rows_per_group: one eps, signs of each draw
    independent    bayes_kernels.functional.sampled_lora: an eps of its own for each draw
    antithetic     the same in pairs, one eps for two draws
    lora           bayes_kernels.functional.lora: no noise

All but `lora` make their noise within the measured time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from harness import (
    Agreement,
    Family,
    Options,
    Row,
    count_launches,
    make_row,
    time_interleaved,
    tolerance,
)
from torch import Tensor

from bayes_kernels import functional as ops
from bayes_kernels import random, reference

OURS = ("independent", "antithetic", "shared", "lora")


@dataclass(frozen=True)
class Case:
    draws: int
    rows: int  # of each draw
    n: int
    m: int
    r: int
    dtype: torch.dtype

    @property
    def name(self) -> str:
        shape = f"n{self.n} m{self.m} r{self.r} {str(self.dtype).removeprefix('torch.')}"
        return f"S{self.draws} x {self.rows} {shape}"


def cases(device: str, quick: bool) -> list[Case]:
    f32, bf16 = torch.float32, torch.bfloat16
    if device == "cuda":
        return [Case(10, rows, 4096, 4096, 8, bf16) for rows in (64, 512)]
    if quick:
        return [Case(10, 64, 4096, 4096, 8, f32)]
    sizes = [(64, 4096, 4096), (64, 768, 768), (8, 4096, 4096)]
    return [Case(10, *size, 8, dtype) for size in sizes for dtype in (f32, bf16)]


def steps_of(case: Case, device: str) -> tuple[dict[str, Callable[[], Tensor]], dict[str, Tensor]]:
    """Calls, and what each has to give: the definition in fp64; `eager`, on draws of its own, is left out."""
    generator = torch.Generator().manual_seed(1)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(device)

    tokens = case.draws * case.rows
    x, base = (normal(tokens, width).to(case.dtype) for width in (case.n, case.m))
    mean, b = normal(case.r, case.n) / case.n**0.5, normal(case.m, case.r)
    rho = 0.1 + 0.02 * normal(case.r, case.n)
    key, draws = random.key(1, device), torch.arange(case.draws, device=device)
    where = {"key": key, "rows_per_group": case.rows}

    def sampled(antithetic: bool) -> Tensor:
        return ops.sampled_lora(x, mean, rho, b, base, draws=draws, antithetic=antithetic, **where)

    def eager() -> Tensor:
        a = mean + rho.square() * torch.randn(case.draws, case.r, case.n, device=device)
        h = torch.bmm(x.view(case.draws, case.rows, case.n).float(), a.mT).flatten(0, 1)
        return (base + h @ b.T).to(case.dtype)

    steps: dict[str, Callable[[], Tensor]] = {
        "eager": eager,
        "shared": lambda: ops.flipout_lora(x, mean, rho, b, base, **where),
        "independent": lambda: sampled(False),
        "antithetic": lambda: sampled(True),
        "lora": lambda: ops.lora(x, mean, b, base),
    }
    wide = [t.double() for t in (x, mean, rho, b, base)]
    noise = reference.dense_noise(
        key, tokens, case.n, case.r, rows_per_id=case.rows, dtype=torch.float64
    )
    groups = torch.arange(tokens, device=device) // case.rows
    truth = {
        "shared": reference.flipout_lora(*wide, noise=noise),
        "lora": reference.lora(wide[0], wide[1], *wide[3:]),
    }
    for name in ("independent", "antithetic"):
        eps = reference.draw_normals(
            key, draws, (case.r, case.n), antithetic=name == "antithetic"
        ).double()
        a = reference.gaussian_draws(wide[1], wide[2], eps)
        truth[name] = reference.grouped_lora(wide[0], a, *wide[3:], groups=groups)
    return steps, truth


def run(options: Options) -> Iterator[Row]:
    """All cases."""
    for case in cases(options.device, options.quick):
        if not options.wants(case.name):
            continue
        steps, truth = steps_of(case, options.device)
        agreement = Agreement(case.name, OURS)
        for name, wanted in truth.items():
            agreement.check(name, [steps[name]()], [wanted], tolerance(case.dtype, case.n))
        steps = options.pick({k: torch.no_grad()(step) for k, step in steps.items()}, OURS)
        times = time_interleaved(steps, options.device, seconds=options.time_for(3.0, 1.0))
        for name, step in steps.items():
            row = make_row("sampled", case.name, name, "forward", times, options.device, agreement)
            row.launches = count_launches(step, options.device)
            yield row


FAMILY = Family("grouped", "an adapter under several draws", OURS, ("eager",), run)
