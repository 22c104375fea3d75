"""Cases of the smoke program: numbered draws, and adapters with factors for each group of rows."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import harness
import torch
from smoke_parts import BF16, FP16, FP32, FP64, Case, Inputs, Tensors, double, with_gradients
from torch import Tensor

from bayes_kernels import _library, reference
from bayes_kernels import functional as F

SHAPES = [  # groups, tokens, n, m, r
    (3, 1, 130, 72, 8),
    (10, 33, 130, 130, 17),
    (40, 129, 1100, 72, 8),
    (3, 70, 130, 600, 33),
    (2, 33, 4097, 130, 64),
]
LARGE = [(10, 640, 4096, 4096, 8), (8, 2048, 4096, 1024, 16)]


def draws(i: Inputs, small: bool) -> Iterator[Case]:
    key = i.key(7)
    shapes = [(1, 3, 130), (7, 5, 33), (10, 8, 4096)]
    for (number, r, n), by_row, dtype in itertools.product(shapes, (False, True), (FP32, FP64)):
        mean, rho = i.normal(r, n, dtype=dtype), i.uniform(r, 1 if by_row else n).to(dtype)
        ids = torch.arange(number, device=mean.device) - 1
        grad = i.normal(number, r, n, dtype=dtype)

        def run(
            mean: Tensor = mean, rho: Tensor = rho, ids: Tensor = ids, grad: Tensor = grad
        ) -> Tensors:
            law = (key, 3, "square", True)
            value = _library.ops.gaussian_draws(mean, rho, ids, *law)
            found = _library.ops.gaussian_draws_backward(grad, rho, ids, *law, True, True)
            return {"value": value, "dmean": found[0], "drho": found[1]}

        def truth(
            mean: Tensor = mean, rho: Tensor = rho, ids: Tensor = ids, grad: Tensor = grad
        ) -> Tensors:
            p = {"mean": double(mean).requires_grad_(), "rho": double(rho).requires_grad_()}
            eps = reference.draw_normals(key, ids, tuple(mean.shape), stream=3).double()
            return with_gradients(reference.gaussian_draws(p["mean"], p["rho"], eps), grad, p)

        yield Case(
            "grouped",
            f"gaussian_draws {number} x ({r}, {n}){' a rho for each row' if by_row else ''} "
            f"{str(dtype)[6:]}",
            run,
            truth,
            harness.tolerance(FP32, n if by_row else 1),
        )


def grouped(i: Inputs, small: bool) -> Iterator[Case]:
    yield from draws(i, small)
    shapes = SHAPES if small else [*SHAPES, *LARGE]
    ops = ("grouped_lora", "sampled_lora", "grouped_flipout_lora")
    for shape, dtype, op in itertools.product(shapes, (FP32, BF16, FP16), ops):
        count, tokens, n, m, r = shape
        lead = () if op == "sampled_lora" else (count,)
        parts = {
            "x": i.normal(tokens, n, dtype=dtype).requires_grad_(),
            "mean": i.normal(*lead, r, n, scale=n**-0.5).requires_grad_(),
            "rho": i.uniform(*lead, r, n).requires_grad_(),
            "b": i.normal(*lead, m, r, scale=r**-0.5).requires_grad_(),
            "base": i.normal(tokens, m, dtype=dtype).requires_grad_(),
        }
        if op == "grouped_lora":
            del parts["rho"]
        dy, key = i.normal(tokens, m, dtype=dtype), i.key(11)
        size = -(-tokens // count)
        ids = torch.arange(tokens, device=dy.device) // size
        order = "counted" if op == "sampled_lora" else "any"
        if order == "any":
            ids = (ids * 7 + torch.arange(tokens, device=dy.device)) % count
        where: dict = {"rows_per_group": size} if order == "counted" else {"groups": ids}
        numbers = torch.arange(count, device=dy.device)

        def run(
            op: str = op,
            parts: Tensors = parts,
            dy: Tensor = dy,
            key: Tensor = key,
            where: dict = where,
            numbers: Tensor = numbers,
        ) -> Tensors:
            options = dict(where)
            if op != "grouped_lora":
                options |= {"key": key, "stream": 2}
            if op == "sampled_lora":
                options["draws"] = numbers
            y = getattr(F, op)(*parts.values(), scaling=0.7, **options)
            return with_gradients(y, dy, parts)

        def truth(
            op: str = op,
            parts: Tensors = parts,
            dy: Tensor = dy,
            key: Tensor = key,
            ids: Tensor = ids,
            numbers: Tensor = numbers,
            shape: tuple[int, ...] = shape,
        ) -> Tensors:
            p = {name: double(t) for name, t in parts.items()}
            count, tokens, n, _, r = shape
            given: dict = {"groups": ids, "scaling": 0.7}
            if op == "grouped_flipout_lora":
                noise = reference.dense_noise(key, tokens, n, r, stream=2, dtype=FP64)
                noise.eps = reference.normal(key, (count, r, n), stream=2).double()
                y = reference.grouped_flipout_lora(*p.values(), noise=noise, **given)
                return with_gradients(y, dy, p)
            a = p["mean"]
            if op == "sampled_lora":
                eps = reference.draw_normals(key, numbers, (r, n), stream=2).double()
                a = reference.gaussian_draws(a, p["rho"], eps)
            y = reference.grouped_lora(p["x"], a, p["b"], p["base"], **given)
            return with_gradients(y, dy, p)

        yield Case(
            "grouped",
            f"{op} {count} groups T{tokens} n{n} m{m} r{r} {str(dtype)[6:]} {order}",
            run,
            truth,
            harness.tolerance(dtype, max(shape)),
        )
