"""Adapters of the smoke program: with gradients, and several of few tokens that share x."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import harness
import torch
from smoke_parts import (
    BF16,
    FP16,
    FP32,
    FP64,
    Case,
    Inputs,
    Tensors,
    double,
    odd,
    with_gradients,
)
from torch import Tensor

from bayes_kernels import functional as F
from bayes_kernels import reference

ADAPTER_SHAPES = [  # tokens, n, m, r
    (1, 130, 130, 8),
    (31, 4097, 130, 1),
    (32, 130, 4097, 17),
    (33, 130, 130, 64),
    (129, 130, 72, 8),
    (33, 4097, 72, 17),
    (129, 65, 130, 1),
    (32, 130, 64, 64),
    (70, 136, 72, 24),
    (33, 136, 72, 12),
    (70, 1100, 600, 8),
]
LARGE = [(2048, 4097, 4096, 8), (2048, 4096, 1024, 64)]


def adapter(i: Inputs, small: bool) -> Iterator[Case]:
    shapes = ADAPTER_SHAPES if small else [*ADAPTER_SHAPES, *LARGE]
    for shape, dtype, scope in itertools.product(
        shapes, (FP32, BF16, FP16), ("none", "token", "dropout")
    ):
        tokens, n, m, r = shape
        shift = odd if dtype == BF16 and n < 1000 and scope == "token" else (lambda t: t)
        x = shift(i.normal(tokens, n, dtype=dtype)).requires_grad_()
        base = shift(i.normal(tokens, m, dtype=dtype)).requires_grad_()
        parts = {
            "x": x,
            "mean": i.normal(r, n, scale=n**-0.5).requires_grad_(),
            "rho": i.uniform(r, n).requires_grad_(),
            "b": i.normal(m, r, scale=r**-0.5).requires_grad_(),
            "base": base,
        }
        dy, key = i.normal(tokens, m, dtype=dtype), i.key(11)
        if scope == "none":
            del parts["rho"]

        def run(
            parts: Tensors = parts, dy: Tensor = dy, scope: str = scope, key: Tensor = key
        ) -> Tensors:
            p = dict(parts)
            if scope == "none":
                y = F.lora(p["x"], p["mean"], p["b"], p["base"], scaling=0.7)
            else:
                y = F.flipout_lora(
                    *p.values(),
                    scaling=0.7,
                    key=key,
                    stream=2,
                    scope="token",
                    dropout=0.3 if scope == "dropout" else 0.0,
                )
            return with_gradients(y, dy, p)

        def truth(
            parts: Tensors = parts,
            dy: Tensor = dy,
            scope: str = scope,
            key: Tensor = key,
            shape: tuple[int, ...] = shape,
        ) -> Tensors:
            p = {name: double(t) for name, t in parts.items()}
            if scope == "none":
                y = reference.lora(p["x"], p["mean"], p["b"], p["base"], scaling=0.7)
            else:
                rate = 0.3 if scope == "dropout" else 0.0
                drawn = reference.dense_noise(
                    key, shape[0], shape[1], shape[3], stream=2, dropout=rate, dtype=torch.float64
                )
                y = reference.flipout_lora(*p.values(), scaling=0.7, noise=drawn, dropout=rate)
            return with_gradients(y, dy, p)

        name = {"none": "lora", "token": "flipout_lora", "dropout": "flipout_lora dropout"}[scope]
        at = " odd offset" if shift is odd else ""
        yield Case(
            "adapter",
            f"{name} T{tokens} n{n} m{m} r{r} {str(dtype)[6:]}{at}",
            run,
            truth,
            harness.tolerance(dtype, max(shape)),
        )
    yield from decode(i, small)


# Few tokens, n, and (m, r) of each adapter: one split and many, ranks of one warp and of more, every
# number of tokens that is compiled.
DECODE_SHAPES = [
    (1, 4096, ((4096, 8), (1024, 8), (1024, 8))),
    (3, 4097, ((130, 17), (600, 64), (31, 1))),
    (16, 5000, ((1030, 12), (64, 8))),
    (1, 130, ((72, 8), (40, 12))),
    (4, 130, ((72, 8), (40, 3))),
    (13, 1100, ((600, 8),) * 3),
    (2, 1100, ((600, 9),)),
]


def decode(i: Inputs, small: bool) -> Iterator[Case]:
    """Several adapters in one launch."""
    for (tokens, n, sizes), dtype, noisy in itertools.product(
        DECODE_SHAPES[3:] if small else DECODE_SHAPES, (FP32, BF16, FP16), (False, True)
    ):
        x = i.normal(tokens, n, dtype=dtype)
        mean = [i.normal(r, n, scale=n**-0.5) for _, r in sizes]
        rho = [i.uniform(r, n) for _, r in sizes]
        b = [i.normal(m, r, scale=r**-0.5) for m, r in sizes]
        base = [i.normal(tokens, m, dtype=dtype) for m, _ in sizes]
        key, streams = i.key(11), list(range(len(sizes)))

        def run(
            x: Tensor = x,
            lists: tuple[list[Tensor], ...] = (mean, rho, b, base),
            key: Tensor = key,
            streams: list[int] = streams,
            noisy: bool = noisy,
        ) -> Tensors:
            mean, rho, b, base = lists
            with torch.no_grad():
                if noisy:
                    ys = F.flipout_lora_group(
                        x, mean, rho, b, base, scaling=0.7, key=key, streams=streams, dropout=0.3
                    )
                else:
                    ys = F.lora_group(x, mean, b, base, scaling=0.7)
            return {f"y{k}": y for k, y in enumerate(ys)}

        def truth(
            x: Tensor = x,
            lists: tuple[list[Tensor], ...] = (mean, rho, b, base),
            key: Tensor = key,
            streams: list[int] = streams,
            noisy: bool = noisy,
        ) -> Tensors:
            mean, rho, b, base = ([t.double() for t in some] for some in lists)
            scaling = [0.7] * len(streams)
            if noisy:
                drawn = [
                    reference.dense_noise(key, *x.shape, len(m), stream=s, dropout=0.3, dtype=FP64)
                    for m, s in zip(mean, streams, strict=True)
                ]
                ys = reference.flipout_lora_group(
                    x.double(), mean, rho, b, base, scaling=scaling, noise=drawn, dropout=0.3
                )
            else:
                ys = reference.lora_group(x.double(), mean, b, base, scaling=scaling)
            return {f"y{k}": y for k, y in enumerate(ys)}

        name = "flipout_lora_group" if noisy else "lora_group"
        of = " ".join(f"m{m} r{r}" for m, r in sizes)
        yield Case(
            "adapter",
            f"{name} T{tokens} n{n} {of} {str(dtype)[6:]}",
            run,
            truth,
            harness.tolerance(dtype, n + 64),
        )
