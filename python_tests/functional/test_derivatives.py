"""Derivatives beyond first-order reverse mode: second derivatives, torch.func, forward mode.

The fused ops have no rules for them; their definitions in PyTorch's operations take over there. The
oracles here are the kernels' own values and gradients, finite differences, and loops.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, vmap

from bayes_kernels import functional as F
from bayes_kernels import random
from bayes_kernels.vbll import VBLLClassification, VBLLRegression

KEY = random.key(5)
GROUPS = torch.tensor([2, 0, 2])


def flipout(**options: object) -> Callable[..., Tensor]:
    return lambda x, a, b, base, rho: F.flipout_lora(
        x, a, rho, b, base, scaling=0.7, key=KEY, **options
    )


# Functions of x (3, 5), a (r, 5), b (4, r), base (3, 4) and one tensor more.
ADAPTERS: dict[str, tuple[Callable[..., Tensor], int, tuple[int, ...]]] = {
    "lora": (lambda x, a, b, base, _: F.lora(x, a, b, base, scaling=0.7), 2, (1,)),
    "lora, dropout": (lambda x, a, b, base, _: F.lora(x, a, b, base, dropout=0.3, key=KEY), 2, (1,)),
    "lora, rank 65": (lambda x, a, b, base, _: F.lora(x, a, b, base), 65, (1,)),
    "token": (flipout(), 2, (2, 5)),
    "example, softplus": (flipout(scope="example", std="softplus", dropout=0.2), 2, (2, 5)),
    "none, direct": (flipout(scope="none", std="direct"), 2, (2, 5)),
    "none, dropout": (flipout(scope="none", dropout=0.3), 2, (2, 5)),
    "groups, rho (r, 1)": (flipout(groups=GROUPS), 2, (2, 1)),
    "noise, rank 65": (flipout(dropout=0.2), 65, (65, 5)),
    "scaled": (lambda x, a, b, base, d: F.scaled_lora(x, a, d, b, base), 2, (2,)),
    "scaled, groups": (lambda x, a, b, base, d: F.scaled_lora(x, a, d, b, base, groups=GROUPS), 2, (4, 2)),
    "core": (lambda x, a, b, base, core: F.core_lora(x, a, core, b, base, scaling=0.7), 2, (2, 2)),
}  # fmt: skip


def arguments(name: str, dtype: torch.dtype = torch.float64) -> tuple[Callable[..., Tensor], list]:
    call, r, extra = ADAPTERS[name]
    g = torch.Generator().manual_seed(1)
    shapes = ((3, 5), (r, 5), (4, r), (3, 4), extra)
    made = [torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in shapes]
    return call, [t.requires_grad_() for t in made]


def kl(mean: Tensor, rho: Tensor, other: Tensor, shared: Tensor) -> Tensor:
    return F.gaussian_kl([mean, other], [rho, shared], [0.5, 2.0], direction="code")


def dense(phi: Tensor, weight: Tensor, lower: Tensor) -> Tensor:
    return torch.cat(F.linear_logits(phi, weight, lower, covariance="dense"))


def head(kind: type, covariance: str, bound: str = "jensen") -> Callable[..., Tensor]:
    options = {} if kind is VBLLRegression else {"bound": bound, "n_samples": 4, "key": KEY}
    made = kind(5, 3, covariance=covariance, rank=2, prior_variance=2.0).double()
    labels = torch.randn(4, 3).double() if kind is VBLLRegression else torch.tensor([0, 2, 1, 1])

    def loss(phi: Tensor, *values: Tensor) -> Tensor:
        names = [n for n, _ in made.named_parameters()]
        given = {f"head.{n}": v for n, v in zip(names, values, strict=True)}
        return functional_call(_Bound(made, labels, options), given, (phi,))

    loss.start = [torch.randn(4, 5).double(), *made.parameters()]  # type: ignore[attr-defined]
    return loss


class _Bound(nn.Module):
    def __init__(self, made: nn.Module, labels: Tensor, options: dict) -> None:
        super().__init__()
        self.head, self.labels, self.options = made, labels, options

    def forward(self, phi: Tensor) -> Tensor:
        return self.head.loss(phi, self.labels, n_train=10, **self.options)


def others(name: str) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """Differentiable functions that are no adapters."""
    torch.manual_seed(0)
    if name == "kl":
        shapes = ((2, 3), (2, 3), (3, 2), (3, 1))
        return kl, [(torch.rand(s).double() + 0.5).requires_grad_() for s in shapes]
    if name == "dense":
        return dense, [
            torch.randn(s).double().requires_grad_() for s in ((3, 4), (2, 4), (2, 4, 4))
        ]
    if name == "packed":
        return dense, [torch.randn(s).double().requires_grad_() for s in ((3, 4), (2, 4), (2, 10))]
    kind = VBLLRegression if name.startswith("regression") else VBLLClassification
    call = head(kind, name.split()[1], "mc" if name.endswith("mc") else "jensen")
    return call, [t.detach().clone().requires_grad_() for t in call.start]  # type: ignore[attr-defined]


OTHERS = [
    "kl",
    "dense",
    "packed",
    "classes dense",
    "classes diagonal",
    "classes low_rank",
    "regression dense",
]


def scalar(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *tensors: (0.3 * call(*tensors)).sin().sum()


# --- second derivatives -------------------------------------------------------------------------


FUSED = [name for name in ADAPTERS if "65" not in name]


@pytest.mark.parametrize("name", [*FUSED, *OTHERS])
def test_second_derivatives_are_those_of_finite_differences(name):
    call, tensors = arguments(name) if name in ADAPTERS else others(name)
    torch.manual_seed(2)
    assert torch.autograd.gradgradcheck(scalar(call), tensors, fast_mode=True, atol=1e-4)


@pytest.mark.parametrize("name", FUSED)
def test_gradient_penalty_in_single_precision(device, name):
    """create_graph=True, then backward: by the definition, of fp32 and half-precision inputs."""
    for dtype in (torch.float32, torch.bfloat16):
        call, tensors = arguments(name, torch.float32)
        call64, tensors64 = arguments(name)
        found = []
        for f, t in ((call, tensors), (call64, tensors64)):
            x = t[0].to(dtype) if f is call else t[0].detach().to(dtype).double()
            base = t[3].to(dtype) if f is call else t[3].detach().to(dtype).double()
            y = f(x, t[1], t[2], base, t[4]).double()
            used = [t[1], t[2], *(() if name.startswith("lora") else (t[4],))]
            first = torch.autograd.grad(y.square().sum(), used, create_graph=True)
            penalty = sum(p.double().square().sum() for p in first)
            found.append(torch.autograd.grad(penalty, used))
        for ours, truth in zip(*found, strict=True):
            bound = 3e-2 if dtype == torch.bfloat16 else 1e-4
            assert (ours - truth).norm() <= bound * truth.norm()


def test_second_derivatives_are_partial_where_inputs_depend_on_each_other():
    """rho made from the mean: its path must count once."""
    _, (x, a, b, base, _) = arguments("token")

    def run(a):
        return F.flipout_lora(x, a, 0.5 * a, b, base, key=KEY)

    assert torch.autograd.gradgradcheck(run, (a,), fast_mode=True)
    y = run(a).square().sum()
    (plain,) = torch.autograd.grad(y, a, retain_graph=True)
    (again,) = torch.autograd.grad(y, a, create_graph=True)
    torch.testing.assert_close(again, plain)


def test_a_bound_without_second_derivatives_says_so():
    call, tensors = others("classes dense mc")
    with pytest.raises(RuntimeError, match="use 'jensen'"):
        torch.autograd.grad(call(*tensors), tensors, create_graph=True)


def tolerance(name: str) -> float:
    """Normals of the definition and of the kernels agree to a few ulp of fp32."""
    return 1e-7 if name not in ADAPTERS or "lora" in name.split(",")[0] else 1e-4


# --- torch.func and forward mode ----------------------------------------------------------------


@pytest.mark.parametrize("name", [*ADAPTERS, *OTHERS, "classes low_rank mc"])
def test_transforms_agree_with_autograd_and_with_finite_differences(name):
    call, tensors = arguments(name) if name in ADAPTERS else others(name)
    f = scalar(call)
    numbers = tuple(range(len(tensors)))
    plain = [t.detach() for t in tensors]
    expected = torch.autograd.grad(f(*tensors), tensors, allow_unused=True)
    expected = [
        torch.zeros_like(t) if e is None else e for e, t in zip(expected, plain, strict=True)
    ]
    close = functools.partial(torch.testing.assert_close, rtol=tolerance(name), atol=1e-6)
    for found in (grad(f, numbers)(*plain), jacrev(f, numbers)(*plain), jacfwd(f, numbers)(*plain)):
        close(list(found), expected)
    steps = [torch.randn_like(t) for t in plain]
    value, slope = jvp(f, tuple(plain), tuple(steps))
    close(value, f(*plain))
    close(slope, sum((s * e).sum() for s, e in zip(steps, expected, strict=True)))
    with torch.autograd.forward_ad.dual_level():
        duals = [
            torch.autograd.forward_ad.make_dual(*pair) for pair in zip(plain, steps, strict=True)
        ]
        again = torch.autograd.forward_ad.unpack_dual(f(*duals)).tangent
    close(again, slope)


@pytest.mark.parametrize("name", [n for n in ADAPTERS if "groups" not in n])
def test_vmap_is_the_loop(name):
    """Over examples, each a call of its own, and over factors, as for ensembles."""
    call, tensors = arguments(name)
    close = functools.partial(torch.testing.assert_close, rtol=tolerance(name), atol=1e-5)
    x, a, b, base, extra = (t.detach() for t in tensors)
    rows = vmap(lambda v, w: call(v, a, b, w, extra))(x, base)
    loop = torch.stack([call(x[i], a, b, base[i], extra) for i in range(3)])
    close(rows, loop)
    several = torch.stack([a, 2 * a, a - 1])
    rows = vmap(lambda q: call(x, q, b, base, extra))(several)
    close(rows, torch.stack([call(x, q, b, base, extra) for q in several]))
    per_example = vmap(grad(lambda q, v, w: call(v, q, b, w, extra).square().sum()), (None, 0, 0))
    for i, found in enumerate(per_example(a, x, base)):
        leaf = a.clone().requires_grad_()
        call(x[i], leaf, b, base[i], extra).square().sum().backward()
        close(found, leaf.grad)


def test_vmap_over_keys_draws_what_each_key_draws():
    _, (x, a, b, base, rho) = arguments("token")
    keys = torch.stack([random.key(i) for i in range(3)])

    def run(key):
        return F.flipout_lora(x, a, rho, b, base, key=key, dropout=0.2)

    loop = torch.stack([run(k) for k in keys])
    torch.testing.assert_close(vmap(run)(keys), loop, rtol=tolerance("token"), atol=1e-5)


@pytest.mark.parametrize("name", ["lora, dropout", "token", "none, direct", "scaled", "core"])
def test_batched_vector_jacobian_products(name):
    """torch.autograd.grad(..., is_grads_batched=True) of a graph that the kernels made."""
    call, tensors = arguments(name)
    y = call(*tensors)
    eye = torch.eye(y.numel(), dtype=y.dtype).reshape(-1, *y.shape)
    used = tensors if "lora" not in name else tensors[:4]
    found = torch.autograd.grad(y, used, eye, is_grads_batched=True, retain_graph=True)
    rows = [torch.autograd.grad(y, used, row, retain_graph=True) for row in eye]
    for ours, expected in zip(found, zip(*rows, strict=True), strict=True):
        torch.testing.assert_close(ours, torch.stack(expected))
        assert not ours.requires_grad


@pytest.mark.parametrize("transform", ["grad", "vmap", "jvp"])
def test_compiled_transforms_have_no_graph_break(transform):
    call, tensors = arguments("example, softplus", torch.float32)
    x, *rest = (t.detach() for t in tensors)

    def run(v):
        if transform == "grad":
            return grad(lambda u: call(u, *rest).square().sum())(v)
        if transform == "jvp":
            return jvp(lambda u: call(u, *rest), (v,), (v,))[1]
        return vmap(lambda u, w: call(u, *rest[:2], w, rest[3]))(v, rest[2])

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), run(x))


# --- models -------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["blob", "tfb", "scalabl", "polar"])
@pytest.mark.parametrize("training", [False, True])
def test_gradients_of_each_example_of_a_model(method, training):
    """As for influence functions: vmap(grad(functional_call)) is a loop of backward passes."""
    pytest.importorskip("peft")
    from peft import get_peft_model

    from bayes_kernels import hf

    kinds = {"blob": hf.BlobConfig, "tfb": hf.TfbConfig, "scalabl": hf.ScalablConfig}
    kinds |= {"polar": hf.PolarConfig}
    torch.manual_seed(0)
    model = get_peft_model(
        nn.Sequential(nn.Linear(8, 6)), kinds[method](r=2, target_modules=["0"])
    ).train(training)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p)
    values = {k: p.detach() for k, p in model.named_parameters()}
    x = torch.randn(4, 8)

    def loss(v: dict[str, Tensor], row: Tensor) -> Tensor:
        return functional_call(model, v, (row[None],)).square().sum()

    found = vmap(grad(loss), (None, 0))(values, x)
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trained and all(torch.isfinite(found[name]).all() for name in trained)
    for i, row in enumerate(() if training else x):  # a training pass draws noise of its own
        model.zero_grad()
        model(row[None]).square().sum().backward()
        for name in trained:
            p = model.get_parameter(name)
            expected = torch.zeros_like(p) if p.grad is None else p.grad
            torch.testing.assert_close(found[name][i], expected, rtol=1e-4, atol=1e-5)
