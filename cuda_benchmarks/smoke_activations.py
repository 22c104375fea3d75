"""Cases of the smoke program: activations in 8 bits, and adapters whose backward pass reads them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import harness
from smoke_parts import BF16, FP16, FP32, FP64, Case, Inputs, Tensors, double, odd, with_gradients
from torch import Tensor

from bayes_kernels import functional as F
from bayes_kernels import reference

SHAPES = [(1, 1), (67, 31), (33, 512), (129, 4097)]  # tokens, n
LARGE = (2048, 4096)


def activations(i: Inputs, small: bool) -> Iterator[Case]:
    key = i.key(7)
    shapes = SHAPES if small else [*SHAPES, LARGE]
    for shape, dtype in itertools.product(shapes, (FP32, BF16, FP16)):
        x = i.normal(*shape, dtype=dtype)
        places = {"": x, " odd offset": odd(x)} if shape == (33, 512) else {"": x}
        for place, given in places.items():

            def bits(x: Tensor = given) -> Tensors:
                kept = F.quantize_activations(x, key=key, stream=5, row0=1)
                back = kept.dequantized(x.dtype)
                return {"codes": kept.codes, "scales": kept.scales, "back": back}

            def defined(x: Tensor = given) -> Tensors:
                codes, scales = reference.quantize_activations(x, key, stream=5, row0=1)
                back = reference.dequantize_activations(codes, scales, x.dtype)
                return {"codes": codes, "scales": scales, "back": back}

            name = f"quantize_activations T{shape[0]} n{shape[1]} {str(dtype)[6:]}{place}"
            yield Case("activations", name, bits, defined, 0.0)
    for (tokens, n, m, r), dtype in itertools.product(
        [(5, 130, 72, 8), (129, 1100, 72, 17)], (FP32, BF16, FP16)
    ):
        parts = {
            "x": i.normal(tokens, n, dtype=dtype).requires_grad_(),
            "a": i.normal(r, n, scale=n**-0.5).requires_grad_(),
            "b": i.normal(m, r, scale=r**-0.5).requires_grad_(),
            "base": i.normal(tokens, m, dtype=dtype).requires_grad_(),
        }
        dy = i.normal(tokens, m, dtype=dtype)

        def run(parts: Tensors = parts, dy: Tensor = dy) -> Tensors:
            kept = F.quantize_activations(parts["x"], key=key)
            return with_gradients(F.lora(*parts.values(), scaling=0.7, kept=kept), dy, parts)

        def truth(parts: Tensors = parts, dy: Tensor = dy) -> Tensors:
            """The gradient of a is that of what was kept, all else that of x."""
            p = {name: double(t) for name, t in parts.items()}
            found = with_gradients(reference.lora(*p.values(), scaling=0.7), dy, p)
            bits = reference.quantize_activations(parts["x"].detach(), key)
            p["x"] = reference.dequantize_activations(*bits, FP64).requires_grad_()
            near = with_gradients(reference.lora(*p.values(), scaling=0.7), dy, p)
            return {**found, "da": near["da"]}

        yield Case(
            "activations",
            f"lora, kept in 8 bits, T{tokens} n{n} m{m} r{r} {str(dtype)[6:]}",
            run,
            truth,
            harness.tolerance(dtype, tokens + n + m),
        )
