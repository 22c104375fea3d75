"""Methods against the packages that others publish, by number of classes.

    python cuda_benchmarks peers --device cpu [--quick] [--vs PROVIDERS] [--case TEXT] [--save]

The packages are peers, not dependencies: `make peers` puts them into build/peers; by hand
`pip install --no-deps --target FOLDER` them, and put FOLDER on PYTHONPATH. Providers whose package is not
there are named and left out.

The model is a network of two linear layers with biases, 64 -> 128 -> C; the posterior, of all four weights
or of the last layer's two, has a dense Kronecker-factored GGN and one prior precision, in all providers.

Providers of `fit`, the exact GGN of 128 rows in two batches, of 32 at 1,000 classes
    backpack       laplace-torch's Laplace.fit with the BackPACK backend
    curvlinops     the same with the curvlinops backend
    published      a backward pass for each class, with hooks, in plain PyTorch
    bayes_kernels  bayes_kernels.laplace.Laplace.fit
of `evidence`, the log marginal likelihood at a prior precision, after the fit
    laplace_torch, bayes_kernels
of `logits`, mean and covariance of the linearised logits
    laplace_torch  its GLM predictive distribution, before the link
    published      the same formula with a materialised Jacobian (published_laplace.py); last layer only
    bayes_kernels  bayes_kernels.laplace.Laplace.logits
of `head`, probabilities of a variational last layer from 20 draws; its loss and backward are those of
bench_vbll.py, with the diagonal covariance
    vbll, bayes_kernels

Every covariance and evidence is compared with closed forms in fp64.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import bench_vbll
import torch
from harness import (
    Agreement,
    Family,
    Options,
    Row,
    make_row,
    peak_bytes,
    time_interleaved,
    tolerance,
)
from published_laplace import published_last_layer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from bayes_kernels import laplace, random
from bayes_kernels.vbll import VBLLClassification

INPUTS, FEATURES, TRAINING, BATCH, DELTA = 64, 128, 128, 64, 2.0
PACKAGES = {"backpack": ("laplace", "backpack"), "curvlinops": ("laplace", "curvlinops"),
            "vbll": ("vbll",)}  # fmt: skip
NAMES = {"laplace": "laplace-torch", "backpack": "backpack-for-pytorch",
         "curvlinops": "curvlinops-for-pytorch"}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """Classes, and whether the posterior is that of the last layer alone."""

    classes: int
    last: bool

    @property
    def name(self) -> str:
        return f"{'last layer' if self.last else 'all layers'} C={self.classes}"

    @property
    def rows(self) -> int:
        """Of a prediction: a Jacobian of 64 rows and 1,000 classes has 33 GB."""
        return 64 if self.classes <= 100 else 1

    @property
    def training(self) -> int:
        """Rows of the fit: at 1,000 classes each is 1,000 products of (C, C)."""
        return TRAINING if self.classes <= 100 else 32


def cases(quick: bool) -> list[Case]:
    return [Case(c, last) for c in ((5, 20) if quick else (2, 5, 20, 100, 1000))
            for last in (False, True)]  # fmt: skip


def installed(provider: str) -> bool:
    return all(importlib.util.find_spec(name) is not None for name in PACKAGES[provider])


def build(case: Case) -> tuple[nn.Sequential, Tensor, Tensor]:
    """The network, inputs and labels of its training data."""
    torch.manual_seed(case.classes)
    model = nn.Sequential(nn.Linear(INPUTS, FEATURES), nn.Tanh(), nn.Linear(FEATURES, case.classes))
    return (
        model.eval(),
        torch.randn(case.training, INPUTS),
        torch.randint(case.classes, (case.training,)),
    )


# --- truth: closed forms in fp64 -------------------------------------------------------------------


@dataclass(frozen=True)
class Truth:
    """Mean and covariance of the logits of some rows, and the evidence."""

    mean: Tensor
    cov: Tensor
    evidence: Tensor


def truth(case: Case, model: nn.Sequential, x: Tensor, y: Tensor, rows: Tensor) -> Truth:
    first, _, last = copy.deepcopy(model).double()
    x, rows = x.double(), rows.double()
    features = first(x).tanh()
    p = last(features).softmax(-1)
    hessians = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    # The output of the first layer reaches the logits through W diag(1 - features^2).
    reach = lambda f: last.weight * (1 - f.square())[:, None, :]  # noqa: E731
    seen = rows_features = first(rows).tanh()
    blocks = [(last, features, hessians.sum(0), rows_features, None)]
    if not case.last:
        through = reach(features)
        curvature = torch.einsum("nca,nce,neb->ab", through, hessians, through)
        blocks.append((first, x, curvature, rows, reach(seen)))
    mean = last(seen)
    cov = mean.new_zeros(len(rows), case.classes, case.classes)
    evidence = -nn.functional.cross_entropy(last(features), y, reduction="sum")
    for layer, a, g, inputs, jacobian in blocks:
        for weight, left, at in (
            (layer.weight, a, inputs),
            (layer.bias, torch.ones_like(a[:, :1]), torch.ones_like(inputs[:, :1])),
        ):
            mu, u = torch.linalg.eigh(left.T @ left / len(x))
            nu, q = torch.linalg.eigh(g)
            products = nu.clamp_min(0)[:, None] * mu.clamp_min(0)
            variance = (at @ u).square() @ (1 / (products + DELTA)).T
            root = q if jacobian is None else jacobian @ q
            cov += (root * variance[:, None, :]) @ root.mT
            evidence = evidence - 0.5 * (
                DELTA * weight.square().sum() + torch.log1p(products / DELTA).sum()
            )
    return Truth(mean.detach(), cov.detach(), evidence.detach())


# --- providers -------------------------------------------------------------------------------------


def laplace_torch(case: Case, model: nn.Module, backend: str) -> Any:
    """A posterior of laplace-torch on a copy of the model."""
    package: Any = importlib.import_module("laplace")
    curvature: Any = importlib.import_module(f"laplace.curvature.{backend}")
    kind = {"backpack": "BackPackGGN", "curvlinops": "CurvlinopsGGN"}[backend]
    return package.Laplace(
        copy.deepcopy(model), "classification", prior_precision=DELTA,
        subset_of_weights="last_layer" if case.last else "all", hessian_structure="kron",
        backend=getattr(curvature, kind),
    )  # fmt: skip


def own(case: Case, model: nn.Module) -> laplace.Laplace:
    """Our posterior, with dense factors as the others have."""
    layers = laplace.linear_layers(model, ["2"] if case.last else ["0", "2"])
    return laplace.Laplace(model, layers, rank=None, prior_precision=DELTA)


def published_fit(case: Case, model: nn.Sequential, loader: DataLoader) -> list[Any]:
    """Eigenpairs of the sums of a a^T and g g^T of each layer; a backward pass for each class."""
    chosen = [model[2]] if case.last else [model[0], model[2]]
    sums: list[list[Tensor]] = [[] for _ in chosen]
    for x, _ in loader:
        seen: list[tuple[Tensor, Tensor]] = []
        hooks = [
            m.register_forward_hook(lambda _, a, y, seen=seen: seen.append((a[0], y)))
            for m in chosen
        ]
        logits = model(x)
        for hook in hooks:
            hook.remove()
        p = logits.detach().softmax(-1)
        found = [[a.detach().T @ a.detach(), y.new_zeros(y.shape[1], y.shape[1])] for a, y in seen]
        for c in range(case.classes):
            unit = nn.functional.one_hot(torch.tensor(c), case.classes)
            root = p[:, c : c + 1].sqrt() * (unit - p)
            grads = torch.autograd.grad(logits, [y for _, y in seen], root, retain_graph=True)
            for parts, g in zip(found, grads, strict=True):
                parts[1].addmm_(g.T, g)
        for total, new in zip(sums, found, strict=True):
            total[:] = new if not total else [s + n for s, n in zip(total, new, strict=True)]
    return [torch.linalg.eigh(factor) for pair in sums for factor in pair]


@dataclass(frozen=True)
class _Output:
    logits: Tensor


class _Named(nn.Module):
    """The network as published_laplace.py calls models."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> _Output:
        return _Output(self.model(x))


@dataclass(frozen=True)
class _Posterior:
    laplace: laplace.Laplace


# --- runs ------------------------------------------------------------------------------------------


def within(case: Case) -> float:
    """Eigenvectors and several sums, over rows, features or classes."""
    return 16 * tolerance(torch.float32, TRAINING + FEATURES + case.classes)


def run_laplace(case: Case, options: Options) -> Iterator[Row]:
    """Fit, evidence, and Gaussian of the logits."""
    from published_laplace import factors_of

    model, x, y = build(case)
    loader = DataLoader(TensorDataset(x, y), batch_size=BATCH)
    rows = torch.randn(case.rows, INPUTS)
    want = truth(case, model, x, y, rows)
    agreement = Agreement(case.name, OURS)
    fitted: dict[str, Any] = {"bayes_kernels": own(case, model)}
    for backend in ("backpack", "curvlinops"):
        if installed(backend):
            fitted[backend] = laplace_torch(case, model, backend)
    fitted = options.pick(fitted, OURS)
    for name, posterior in fitted.items():
        if name == "bayes_kernels":
            got = posterior.fit(loader, verbose=False).logits((rows, None))
        else:
            posterior.fit(loader)
            got = [t.detach() for t in posterior._glm_predictive_distribution(rows)]
        agreement.check(name, got, [want.mean, want.cov], within(case))

    steps: dict[str, Callable[[], object]] = {
        name: (lambda p=p: p.fit(loader, verbose=False)) if name == "bayes_kernels"
        else (lambda p=p: p.fit(loader))
        for name, p in fitted.items()
    }  # fmt: skip
    if case.classes <= 100:  # curvlinops does the same
        steps["published"] = lambda: published_fit(case, model, loader)
    yield from _rows("fit", case.name, "fit", options.pick(steps, OURS), options, agreement)

    ours = fitted["bayes_kernels"]
    # With BackPACK a second fit adds to the first one's factors: the same work, another result.
    backend = next((name for name in ("curvlinops", "backpack") if name in fitted), None)
    theirs = None
    if backend is not None:
        theirs = laplace_torch(case, model, backend)
        theirs.fit(loader)
    steps = {"bayes_kernels": ours.log_marginal_likelihood}
    if theirs is not None:
        delta = torch.tensor(DELTA)
        steps["laplace_torch"] = lambda: theirs.log_marginal_likelihood(prior_precision=delta)
    agreement = Agreement(case.name, OURS)
    for name, step in steps.items():
        value: Any = step()
        agreement.check(name, [value.detach().reshape(1)], [want.evidence[None]], within(case))
    yield from _rows("evidence", case.name, "evidence", steps, options, agreement)

    inputs = (rows, None)
    steps = {"bayes_kernels": lambda: ours.logits(inputs)}
    if theirs is not None:
        steps["laplace_torch"] = lambda: theirs._glm_predictive_distribution(rows)
    if case.last:
        named, blocks = _Named(model), factors_of(_Posterior(ours))
        steps["published"] = lambda: published_last_layer(
            named, _Posterior(ours), {"x": rows}, blocks
        )
    steps = options.pick(steps, (*OURS, "laplace_torch"))
    agreement = Agreement(case.name, OURS)
    for name, step in steps.items():
        found: Any = step()
        agreement.check(name, [t.detach() for t in found], [want.mean, want.cov], within(case))
    yield from _rows("logits", case.name, f"{case.rows} rows", steps, options, agreement)


def run_head(classes: int, options: Options) -> Iterator[Row]:
    """A variational last layer with the diagonal covariance: loss, and probabilities from draws."""
    if not installed("vbll"):
        return
    case = bench_vbll.Case(BATCH, classes, FEATURES, "diagonal")
    yield from bench_vbll.run_case(case, options)
    package: Any = importlib.import_module("vbll")
    torch.manual_seed(0)
    peer = package.DiscClassification(FEATURES, classes, 1 / 1000, parameterization="diagonal")
    ours = VBLLClassification(FEATURES, classes, covariance="diagonal")
    ours.load_vbll(peer.state_dict())
    x, key = torch.randn(BATCH, FEATURES), random.key(1)
    with torch.no_grad():
        steps: dict[str, Callable[[], object]] = {
            "vbll": lambda: peer(x).predictive.probs,
            "bayes_kernels": lambda: ours.predict(x, n_samples=20, key=key).log_probs,
        }
        yield from _rows("head", case.name, "20 draws", options.pick(steps, OURS), options, {})


def _rows(
    op: str, case: str, mode: str, steps: dict[str, Any], options: Options, misses: Any
) -> list[Row]:
    times = time_interleaved(
        steps, options.device, seconds=options.time_for(3.0, 1.0), min_repeats=1, max_repeats=40
    )
    found = []
    for name, step in steps.items():
        row = make_row(op, case, name, mode, times, options.device, misses)
        row.peak_bytes = peak_bytes(step, options.device, warm=False)
        found.append(row)
    return found


def run(options: Options) -> Iterator[Row]:
    """All cases."""
    for line in absent():
        print(line)
    # BackPACK's hooks on modules whose inputs need no gradient.
    warnings.filterwarnings("ignore", "Full backward hook is firing", UserWarning)
    for case in cases(options.quick):
        if options.wants(case.name):
            yield from run_laplace(case, options)
        if case.last and options.wants(f"head C={case.classes}"):
            yield from run_head(case.classes, options)


def absent() -> list[str]:
    """What to say of packages that are not there."""
    modules = dict.fromkeys(name for names in PACKAGES.values() for name in names)
    return [
        f"{NAMES.get(name, name)}: not installed"
        for name in modules
        if importlib.util.find_spec(name) is None
    ]


def missing(options: Options) -> str | None:
    """Where a comparison with others can run."""
    return "runs on the CPU only; use --device cpu" if options.device != "cpu" else None


OURS = ("bayes_kernels",)
PEERS = ("backpack", "curvlinops", "published", "laplace_torch", "vbll")
FAMILY = Family("peers", "methods against peers' packages", OURS, PEERS, run, missing)
