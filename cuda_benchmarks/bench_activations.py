"""Activations in 8 bits: both ops, and an adapter that keeps its input in 8 bits for backward.

    python cuda_benchmarks activations --device cpu [--quick] [--vs PROVIDERS] [--save]

Providers of `quantize` and `dequantize`
    bayes_kernels  functional.quantize_activations, QuantizedActivations.dequantized
    eager          the same in plain PyTorch, its random numbers by torch.rand
of `adapter`, one layer of BLoB forward and backward without its base layer
    bayes_kernels  functional.flipout_lora with `kept`: x is quantised, and read back in backward
    whole          the same without `kept`: backward reads x
    peft_lora      plain LoRA as PEFT computes it, fp32 adapters
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from bench_adapter import SCALING, allowed, dense, gradients, make_inputs, peft_lora, truth
from bench_adapter import Case as Layer
from harness import (
    Agreement,
    Family,
    Options,
    Row,
    bandwidth_share,
    count_launches,
    make_row,
    peak_bytes,
    saved_bytes,
    time_interleaved,
)
from torch import Tensor

from bayes_kernels import functional as ops
from bayes_kernels import random, reference
from bayes_kernels.functional.activations import SCALE_BLOCK

OURS = ("bayes_kernels", "whole")
PEERS = ("eager", "peft_lora")


@dataclass(frozen=True)
class Case:
    tokens: int
    n: int
    dtype: torch.dtype

    @property
    def name(self) -> str:
        return f"T{self.tokens} n{self.n} {str(self.dtype).removeprefix('torch.')}"


def cases(device: str, quick: bool) -> list[Case]:
    f32, bf16 = torch.float32, torch.bfloat16
    if device == "cuda":
        return [Case(4096, 4096, bf16), Case(16384, 4096, bf16), Case(4096, 4096, f32)]
    return [Case(1200, 4096, bf16)] if quick else [Case(1200, 4096, t) for t in (bf16, f32)]


def layers(device: str, quick: bool) -> list[Layer]:
    f32, bf16 = torch.float32, torch.bfloat16
    if device == "cuda":
        return [Layer(tokens, 4096, 4096, 8, bf16) for tokens in (2048, 16384)]
    if quick:
        return [Layer(1200, 4096, 4096, 8, bf16)]
    return [Layer(1200, n, n, 8, t) for n in (768, 4096) for t in (bf16, f32)]


def eager_quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Of rows with whole blocks: codes and scales, as functional.quantize_activations has them."""
    blocks = x.float().unflatten(-1, (-1, SCALE_BLOCK))
    mantissa, exponent = torch.frexp(blocks.abs().amax(-1, keepdim=True))
    scale = (exponent + 126 + (mantissa > 127 / 128)).clamp(7, 254)
    q = torch.ldexp(blocks, 133 - scale)
    codes = (q + torch.rand_like(q)).floor_().to(torch.int8).flatten(-2)
    return codes, scale.squeeze(-1).to(torch.uint8)


def eager_dequantize(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    blocks = codes.unflatten(-1, (-1, SCALE_BLOCK)).to(dtype)
    step = torch.ldexp(torch.ones_like(scales, dtype=torch.float32), scales.int() - 133)[
        ..., None
    ].to(dtype)
    return (blocks * step).flatten(-2)


def run_ops(case: Case, options: Options) -> list[Row]:
    """Both ops by themselves."""
    device = options.device
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(case.tokens, case.n, generator=generator).to(device, case.dtype)
    key = random.key(1, device)
    kept = ops.quantize_activations(x, key=key)
    rows = []
    both: dict[str, dict[str, Callable[[], object]]] = {
        "quantize": {
            "bayes_kernels": lambda: ops.quantize_activations(x, key=key),
            "eager": lambda: eager_quantize(x),
        },
        "dequantize": {
            "bayes_kernels": lambda: kept.dequantized(case.dtype),
            "eager": lambda: eager_dequantize(kept.codes, kept.scales, case.dtype),
        },
    }
    agreement = Agreement(case.name, OURS)
    wanted = [t.double() for t in reference.quantize_activations(x, key)]
    back = [reference.dequantize_activations(kept.codes, kept.scales, torch.float64)]
    agreement.check("bayes_kernels", kept, wanted, 0.0)
    agreement.check("bayes_kernels", [kept.dequantized(case.dtype)], back, 0.0)
    # Rounded by other numbers: within a step of x, and with the same scales.
    codes, scales = eager_quantize(x)
    near = eager_dequantize(codes, scales, case.dtype)
    agreement.check("eager", [near], [x.double()], 1 / 63)
    agreement.check("eager", [scales, eager_dequantize(*kept, case.dtype)], [wanted[1], *back], 0.0)
    moved = x.numel() * x.element_size() + kept.codes.numel() + kept.scales.numel()
    for op, steps in both.items():
        steps = options.pick(steps, OURS)
        times = time_interleaved(steps, device, seconds=options.time_for(2.0, 1.0))
        for name, step in steps.items():
            row = make_row(op, case.name, name, "step", times, device, agreement)
            row.launches = count_launches(step, device)
            row.roofline = bandwidth_share(moved, row, device)
            rows.append(row)
    return rows


def run_layer(case: Layer, options: Options) -> list[Row]:
    """A training step of an adapted layer with x in 8 bits, and with x itself."""
    device = options.device
    i = make_inputs(case, device)
    key = random.key(1, device)

    def flipout(eight: bool) -> Tensor:
        kept = ops.quantize_activations(i.x, key=key) if eight else None
        return ops.flipout_lora(
            i.x, i.mean, i.rho, i.b, i.base, scaling=SCALING, key=key, kept=kept
        )

    forwards: dict[str, Callable[[], Tensor]] = {
        "bayes_kernels": lambda: flipout(True),
        "whole": lambda: flipout(False),
        "peft_lora": lambda: peft_lora(i, None),
    }
    noise = dense(case, key)
    exact = truth(i, noise)
    # Of 8 bits the gradients of both factors are those of what was kept; the other results see x.
    read = ops.quantize_activations(i.x, key=key).dequantized(torch.float64)
    near = truth(replace(i, x=read), noise)
    agreement = Agreement(case.name, OURS)
    agreement.check(
        "bayes_kernels",
        gradients(forwards["bayes_kernels"], i),
        [*exact[:2], *near[2:4], exact[4]],
        allowed(case),
    )
    agreement.check("whole", gradients(forwards["whole"], i), exact, allowed(case))
    agreement.check("peft_lora", gradients(forwards["peft_lora"], i), truth(i, None), allowed(case))
    forwards = options.pick(forwards, OURS)

    def step(forward: Callable[[], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(forward(), i.leaves, i.dy, allow_unused=True)

    steps = {name: step(f) for name, f in forwards.items()}
    times = time_interleaved(steps, device, seconds=options.time_for(3.0, 2.0))
    rows = []
    for name, forward in forwards.items():
        row = make_row("adapter", case.name, name, "forward+backward", times, device, agreement)
        row.saved_bytes = saved_bytes(forward, (i.mean, i.rho, i.b))
        row.peak_bytes = peak_bytes(steps[name], device)
        row.launches = count_launches(steps[name], device)
        rows.append(row)
    return rows


def run(options: Options) -> Iterator[Row]:
    """All cases."""
    for case in cases(options.device, options.quick):
        if options.wants(case.name):
            yield from run_ops(case, options)
    for layer in layers(options.device, options.quick):
        if options.wants(layer.name):
            yield from run_layer(layer, options)


FAMILY = Family("activations", "inputs of adapted layers kept in 8 bits", OURS, PEERS, run)
