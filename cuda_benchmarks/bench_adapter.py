"""Low-rank adapter with flipped-sign noise (BLoB): forward and backward, without the base layer.

    python cuda_benchmarks adapter --device cpu [--quick] [--vs PROVIDERS] [--save]

Providers
    published      bayesian-peft's formula: two paths through b, dense sign tensors, fp32 adapters; both are
                   added in place to the frozen layer's output, in its dtype
    peft_lora      plain LoRA as PEFT computes it, fp32 adapters: no noise, the price to match
    peft_lora_low  the same with adapters in the activations' dtype (bf16 cases only)
    eager          the best plain PyTorch for the noisy adapter
    compiled       torch.compile of `eager`
    lora           bayes_kernels.functional.lora: no noise
    bayes_kernels  bayes_kernels.functional.flipout_lora
    one_by_one     the same for each of the adapters that share x

`base` is an input of every provider: the output of the frozen layer, which all add to. Output
tensors are allocated within the measured time, as in training; `published` writes over `base`.

One token ("forward") is called with one key again and again, as in the generation of a text under one
draw of the weights: on the CPU the normals of the draw are kept from call to call. "forward, new draw"
is the same call with a key of its own each time, so that every call draws. "forward, q k v" is one token
through three adapters that share x: in one call of `flipout_lora_group` and `lora_group`, `one_by_one` in
three of `flipout_lora`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import count, cycle

import torch
import torch.nn.functional as F
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
    tolerance,
)
from torch import Tensor

import bayes_kernels
from bayes_kernels import reference

SCALING = 2.0


@dataclass(frozen=True)
class Case:
    tokens: int
    n: int
    m: int
    r: int
    dtype: torch.dtype
    compiled: bool = False

    @property
    def name(self) -> str:
        return (
            f"T{self.tokens} n{self.n} m{self.m} r{self.r} {str(self.dtype).removeprefix('torch.')}"
        )


def cases(device: str, quick: bool) -> list[Case]:
    f32, bf16 = torch.float32, torch.bfloat16
    if device == "cuda":
        shapes = [
            (1200, 768, 768, 8),
            (1200, 4096, 4096, 8),
            (1200, 4096, 1024, 8),
            (1200, 4096, 14336, 16),
            (2048, 4096, 4096, 8),
            (8192, 4096, 4096, 16),
            (16384, 4096, 4096, 8),
        ]
        # `quick` leaves out what takes long on a GPU: compilers.
        return [Case(*s, bf16, compiled=True) for s in shapes] + [Case(2048, 4096, 4096, 8, f32)]
    if quick:
        return [
            Case(1200, 768, 768, 8, f32),
            Case(1200, 4096, 4096, 8, f32),
            Case(1200, 768, 768, 8, bf16),
        ]
    return [
        Case(1024, 384, 384, 8, f32),
        Case(1200, 768, 768, 8, f32, compiled=True),
        Case(1200, 4096, 4096, 8, f32, compiled=True),
        Case(1200, 4096, 1024, 8, f32),
        Case(1200, 4096, 4096, 16, f32),
        Case(64, 4096, 4096, 8, f32),
        Case(1200, 384, 384, 8, bf16),
        Case(1200, 768, 768, 8, bf16, compiled=True),
        Case(1200, 4096, 4096, 8, bf16),
        Case(1200, 4096, 1024, 8, bf16),
        Case(1200, 4096, 4096, 16, bf16),
    ]


@dataclass
class Noise:
    eps: Tensor
    r_in: Tensor
    r_out: Tensor


@dataclass
class Inputs:
    x: Tensor
    mean: Tensor
    rho: Tensor
    b: Tensor
    base: Tensor
    dy: Tensor

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return (self.x, self.mean, self.rho, self.b)


def make_inputs(case: Case, device: str) -> Inputs:
    generator = torch.Generator().manual_seed(1)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(device)

    x = normal(case.tokens, case.n).to(case.dtype).requires_grad_()
    base, dy = (normal(case.tokens, case.m).to(case.dtype) for _ in range(2))
    mean = (normal(case.r, case.n) / case.n**0.5).requires_grad_()
    rho = (0.1 + 0.02 * normal(case.r, case.n)).requires_grad_()
    b = normal(case.m, case.r).requires_grad_()
    return Inputs(x, mean, rho, b, base, dy)


# --- providers: f(inputs, noise) -> y; noise None means drawn inside, as in training -------------


def published(i: Inputs, noise: Noise | None) -> Tensor:
    """Writes over i.base, which must not be a leaf that needs a gradient."""
    x = i.x.to(i.mean.dtype)
    result = i.base
    result += F.linear(F.linear(x, i.mean), i.b) * SCALING
    std = i.rho**2
    if noise is None:
        r_in = torch.ones_like(x).uniform_(-1, 1).sign()
        r_out = x.new_ones(*x.shape[:-1], std.shape[0]).uniform_(-1, 1).sign()
    else:
        r_in, r_out = noise.r_in, noise.r_out
    e = std * (torch.randn_like(i.mean) if noise is None else noise.eps)
    # Kept until the end, as there: in bf16 the sum makes another tensor of this size.
    noisy = (((x * r_in) @ e.transpose(0, 1)) * r_out) @ i.b.transpose(0, 1)
    result += noisy * SCALING
    return result


def peft_lora(i: Inputs, noise: Noise | None) -> Tensor:
    result = i.base
    x = i.x.to(i.mean.dtype)
    result = result + F.linear(F.linear(x, i.mean), i.b) * SCALING
    return result.to(i.base.dtype)


def peft_lora_low(i: Inputs, noise: Noise | None) -> Tensor:
    mean, b = i.mean.to(i.x.dtype), i.b.to(i.x.dtype)
    return i.base + F.linear(F.linear(i.x, mean), b) * SCALING


def _random_signs(rows: int, columns: int, like: Tensor) -> Tensor:
    return torch.randint(0, 2, (rows, columns), dtype=torch.int8, device=like.device) * 2 - 1


def eager(i: Inputs, noise: Noise | None) -> Tensor:
    dtype = i.x.dtype
    eps = torch.randn_like(i.rho) if noise is None else noise.eps
    e = i.rho * i.rho * eps
    if noise is None:
        r_in = _random_signs(*i.x.shape[-2:], i.x)
        r_out = _random_signs(i.x.shape[-2], i.rho.shape[0], i.x)
    else:
        r_in, r_out = noise.r_in.to(torch.int8), noise.r_out.to(torch.int8)
    h = F.linear(i.x, i.mean.to(dtype)) + F.linear(i.x * r_in, e.to(dtype)) * r_out
    base = i.base.flatten(0, -2)
    y = torch.addmm(base, h.flatten(0, -2), i.b.to(dtype).t(), alpha=SCALING)
    return y.view_as(i.base)


def flipout_lora(i: Inputs, key: Tensor) -> Tensor:
    return bayes_kernels.functional.flipout_lora(
        i.x, i.mean, i.rho, i.b, i.base, scaling=SCALING, key=key
    )


def plain_lora(i: Inputs) -> Tensor:
    return bayes_kernels.functional.lora(i.x, i.mean, i.b, i.base, scaling=SCALING)


# --- checks ------------------------------------------------------------------------------------


def gradients(forward: Callable[[], Tensor], i: Inputs) -> list[Tensor]:
    """y and the gradients of x, mean, rho, b (zeros where there is none)."""
    y = forward()
    grads = torch.autograd.grad(y, i.leaves, i.dy, allow_unused=True)
    return [
        y.detach(),
        *(torch.zeros_like(t) if g is None else g for g, t in zip(grads, i.leaves, strict=True)),
    ]


def truth(i: Inputs, noise: Noise | None) -> list[Tensor]:
    """The definition in fp64; without noise plain LoRA."""
    d = Inputs(*(t.detach().double() for t in (i.x, i.mean, i.rho, i.b, i.base, i.dy)))
    for leaf in d.leaves:
        leaf.requires_grad_()
    if noise is None:
        return gradients(lambda: reference.lora(d.x, d.mean, d.b, d.base, scaling=SCALING), d)
    dense = reference.DenseNoise(noise.eps.double(), noise.r_in.double(), noise.r_out.double())
    return gradients(
        lambda: reference.flipout_lora(
            d.x, d.mean, d.rho, d.b, d.base, scaling=SCALING, noise=dense
        ),
        d,
    )


def allowed(case: Case) -> float:
    """For results of two products, the longer over all tokens or all columns."""
    return tolerance(case.dtype, case.tokens + case.n + case.m)


def check(case: Case, i: Inputs, key: Tensor, compiled: Callable | None) -> Agreement:
    """All providers with gradients, against the definition; those of others that miss it."""
    within = allowed(case)
    agreement = Agreement(case.name, OURS)
    dense = reference.dense_noise(key, case.tokens, case.n, case.r)
    noise = Noise(dense.eps, dense.r_in, dense.r_out)
    noisy, plain = truth(i, noise), truth(i, None)
    for f in (published, eager):
        own = replace(i, base=i.base.clone())
        agreement.check(
            f.__name__, gradients(lambda f=f, own=own: f(own, noise), own), noisy, within
        )
    agreement.check("bayes_kernels", gradients(lambda: flipout_lora(i, key), i), noisy, within)
    for name, f in {"peft_lora": lambda: peft_lora(i, None), "lora": lambda: plain_lora(i)}.items():
        agreement.check(name, gradients(f, i), plain, within)
    if compiled is not None:
        # Its noise is drawn inside the graph; without noise it has to be plain LoRA.
        silent = Inputs(i.x, i.mean, torch.zeros_like(i.rho).requires_grad_(), i.b, i.base, i.dy)
        agreement.check(
            "compiled", gradients(lambda: compiled(silent, None), silent), plain, within
        )
    return agreement


def dense(case: Case, key: Tensor) -> Noise:
    """The noise of a key as tensors."""
    found = reference.dense_noise(key, case.tokens, case.n, case.r)
    return Noise(found.eps, found.r_in, found.r_out)


def check_forward(
    case: Case,
    i: Inputs,
    steps: dict[str, Callable[[], Tensor]],
    keys: list[Tensor],
    agreement: Agreement,
) -> None:
    """The very calls that are timed: without gradients they take another path than `check` sees.

    `keys`: those of the first calls of our step with noise, in turn.
    """
    flat = Inputs(i.x.flatten(0, -2), i.mean, i.rho, i.b, i.base.flatten(0, -2), i.dy)
    flat.x.requires_grad_()
    plain = truth(flat, None)[0]
    for name, step in steps.items():
        if name == "eager":  # draws within the call; checked with noise that is given
            noise = dense(case, keys[0])
            got, wanted = [eager(i, noise).detach()], [truth(flat, noise)[0]]
        elif name == "bayes_kernels":
            got = [step().detach() for _ in keys]
            wanted = [truth(flat, dense(case, key))[0] for key in keys]
        else:
            got, wanted = [step().detach()], [plain]
        agreement.check(name, [y.flatten(0, -2) for y in got], wanted, allowed(case))


# --- runs --------------------------------------------------------------------------------------

OURS = ("bayes_kernels", "lora")
PEERS = ("published", "peft_lora", "peft_lora_low", "eager", "compiled", "one_by_one")


def run_training(case: Case, options: Options) -> list[Row]:
    """One training step of an adapted layer, without its base layer."""
    device = options.device
    i = make_inputs(case, device)
    key = bayes_kernels.random.key(1, device)
    with_compiled = case.compiled and not options.quick
    compiled = torch.compile(eager, fullgraph=True, dynamic=False) if with_compiled else None
    agreement = check(case, i, key, compiled)
    forwards: dict[str, Callable[[], Tensor]] = {
        # As each step's frozen layer would have it: the same memory, without the steps before.
        "published": lambda: published(replace(i, base=i.base.detach()), None),
        "peft_lora": lambda: peft_lora(i, None),
        "eager": lambda: eager(i, None),
        "lora": lambda: plain_lora(i),
        "bayes_kernels": lambda: flipout_lora(i, key),
    }
    if case.dtype != torch.float32:
        forwards["peft_lora_low"] = lambda: peft_lora_low(i, None)
    if compiled is not None:
        forwards["compiled"] = lambda: compiled(i, None)
    forwards = options.pick(forwards, OURS)

    def step(forward: Callable[[], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(forward(), i.leaves, i.dy, allow_unused=True)

    steps = {name: step(f) for name, f in forwards.items()}
    times = time_interleaved(steps, device, seconds=options.time_for(3.0, 2.0))
    # Forward reads x and base and writes y; backward reads dy and x and writes dx.
    moved = (3 * case.tokens * case.n + 3 * case.tokens * case.m) * i.x.element_size()
    rows = []
    for name, forward in forwards.items():
        row = make_row("adapter", case.name, name, "forward+backward", times, device, agreement)
        row.saved_bytes = saved_bytes(forward, (i.mean, i.rho, i.b))
        row.peak_bytes = peak_bytes(steps[name], device)
        row.launches = count_launches(steps[name], device)
        row.roofline = bandwidth_share(moved, row, device)
        rows.append(row)
    return rows


# One token: what generation pays for an adapted layer, and what a call costs beside its kernels.
NEW_DRAW = "forward, new draw"
KEYS = 8192  # more than the library knows by name, so that none is met again before it is forgotten
DECODE = [Case(1, 4096, 4096, r, t) for r in (8, 16) for t in (torch.float32, torch.bfloat16)]
OVERHEAD = Case(1, 64, 64, 8, torch.float32)
_runs = count()


def run_forward(case: Case, options: Options, mode: str) -> list[Row]:
    """Forward pass only, of x (1, 1, n): without gradients but in mode "forward with gradients"."""
    device = options.device
    i = make_inputs(case, device)
    key = bayes_kernels.random.key(1, device)
    agreement = check(case, i, key, None)
    i.x, i.base = i.x.detach()[None], i.base[None]  # a token of a batch of sequences
    forwards: dict[str, Callable[[], Tensor]] = {
        "peft_lora": lambda: peft_lora(i, None),
        "eager": lambda: eager(i, None),
        "lora": lambda: plain_lora(i),
        "bayes_kernels": lambda: flipout_lora(i, key),
    }
    first = 2 * KEYS * next(_runs)  # no case meets keys of another, which would be kept then
    numbers = torch.arange(first, first + 2 * KEYS, device=device).view(KEYS, 2)
    if mode == NEW_DRAW:
        keys = cycle(numbers.unbind())
        forwards = {
            "peft_lora": forwards["peft_lora"],
            "bayes_kernels": lambda: flipout_lora(i, next(keys)),
        }
    forwards = options.pick(forwards, OURS)
    steps = {
        name: forward if mode == "forward with gradients" else torch.no_grad()(forward)
        for name, forward in forwards.items()
    }
    first_keys = list(numbers[:3]) if mode == NEW_DRAW else [key]
    check_forward(case, i, steps, first_keys, agreement)
    times = time_interleaved(steps, device, seconds=options.time_for(1.5, 1.0))
    rows = []
    for name, step in steps.items():
        row = make_row("adapter", case.name, name, mode, times, device, agreement)
        row.launches = count_launches(step, device)
        rows.append(row)
    return rows


QKV = "forward, q k v"
WIDTHS = (4096, 1024, 1024)  # of query, key and value with grouped heads
SHARED = [Case(1, 4096, sum(WIDTHS), 8, t) for t in (torch.float32, torch.bfloat16)]


def run_group(case: Case, options: Options) -> list[Row]:
    """One token through adapters that share x, without gradients, under one key."""
    device = options.device
    each = [make_inputs(Case(1, case.n, m, case.r, case.dtype), device) for m in WIDTHS]
    x = each[0].x.detach()[None]
    lists = [[getattr(i, name) for i in each] for name in ("mean", "rho", "b")]
    base = [i.base[None] for i in each]
    key, streams = bayes_kernels.random.key(1, device), list(range(len(each)))
    ops = bayes_kernels.functional

    def peft() -> tuple[Tensor, ...]:
        mean, _, b = lists
        wide = x.to(torch.float32)
        return tuple(
            (y + F.linear(F.linear(wide, m), w) * SCALING).to(y.dtype)
            for m, w, y in zip(mean, b, base, strict=True)
        )

    def singles() -> tuple[Tensor, ...]:
        return tuple(
            ops.flipout_lora(x, *one, scaling=SCALING, key=key, stream=s)
            for *one, s in zip(*lists, base, streams, strict=True)
        )

    steps: dict[str, Callable[[], tuple[Tensor, ...]]] = {
        "peft_lora": peft,
        "one_by_one": singles,
        "lora": lambda: ops.lora_group(x, lists[0], lists[2], base, scaling=SCALING),
        "bayes_kernels": lambda: ops.flipout_lora_group(
            x, *lists, base, scaling=SCALING, key=key, streams=streams
        ),
    }
    agreement = Agreement(case.name, OURS)
    drawn = [
        reference.dense_noise(key, 1, case.n, case.r, stream=s, dtype=torch.float64)
        for s in streams
    ]
    wide = [
        [t.detach().double() for t in some] for some in (*lists, [y.flatten(0, -2) for y in base])
    ]
    token, scaling = x.double().flatten(0, -2), [SCALING] * len(each)
    noisy = reference.flipout_lora_group(token, *wide, scaling=scaling, noise=drawn)
    plain = reference.lora_group(token, wide[0], wide[2], wide[3], scaling=scaling)
    for name, step in steps.items():
        wanted = plain if name in ("peft_lora", "lora") else noisy
        got = [y.detach().flatten(0, -2) for y in step()]
        agreement.check(name, got, list(wanted), allowed(case))
    steps = options.pick({name: torch.no_grad()(step) for name, step in steps.items()}, OURS)
    times = time_interleaved(steps, device, seconds=options.time_for(1.5, 1.0))
    rows = []
    for name, step in steps.items():
        row = make_row("adapter", case.name, name, QKV, times, device, agreement)
        row.launches = count_launches(step, device)
        rows.append(row)
    return rows


def run(options: Options) -> Iterator[Row]:
    """All cases."""
    if options.shape is not None:
        s = options.shape
        case = Case(s["T"], s["n"], s["m"], s["r"], DTYPES[options.dtype or "fp32"], compiled=True)
        yield from run_training(case, options)
        if case.tokens == 1:
            yield from run_forward(case, options, "forward")
            yield from run_forward(case, options, NEW_DRAW)
        return
    for case in cases(options.device, options.quick):
        if options.wants(case.name):
            yield from run_training(case, options)
    decode = DECODE[:1] if options.quick and options.device == "cpu" else DECODE
    for case in [*decode, OVERHEAD]:
        if options.wants(f"decode {case.name}"):
            yield from run_forward(case, options, "forward")
    for case in decode:
        if options.wants(f"new draw {case.name}"):
            yield from run_forward(case, options, NEW_DRAW)
    for case in SHARED[:1] if options.quick and options.device == "cpu" else SHARED:
        if options.wants(f"q k v {case.name}"):
            yield from run_group(case, options)
    if options.wants(f"overhead {OVERHEAD.name}"):
        yield from run_forward(OVERHEAD, options, "forward with gradients")


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FAMILY = Family(
    "adapter",
    "one adapted layer of BLoB without its base layer",
    OURS,
    PEERS,
    run,
    letters=("T", "n", "m", "r"),
    dtypes=tuple(DTYPES),
)
