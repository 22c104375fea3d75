"""Loss and backward of a variational Bayesian last layer against the `vbll` package.

    python cuda_benchmarks vbll --device cpu [--quick] [--save]

The package is a peer, not a dependency: `pip install --no-deps --target somewhere vbll`, and put that
folder on PYTHONPATH. Both have the same parameters, and must agree with the package in fp64 first.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from harness import (
    Agreement,
    Family,
    Options,
    Row,
    count_launches,
    make_row,
    peak_bytes,
    saved_bytes,
    time_interleaved,
    tolerance,
)
from torch import Tensor

from bayes_kernels.vbll import VBLLClassification, unpack_tril

PACKAGE_NAMES = {"dense": "dense", "diagonal": "diagonal", "low_rank": "lowrank"}
N_TRAIN = 1000


@dataclass(frozen=True)
class Case:
    """Rows, classes, features and covariance of one head."""

    rows: int
    classes: int
    features: int
    covariance: str

    @property
    def name(self) -> str:
        return f"B={self.rows} C={self.classes} D={self.features} {self.covariance}"


def cases(quick: bool) -> list[Case]:
    few = [Case(8, 5, 4096, "diagonal"), Case(8, 5, 1024, "dense"), Case(8, 5, 4096, "low_rank")]
    more = [Case(256, 5, 4096, "diagonal"), Case(64, 5, 256, "dense")]
    return few if quick else few + more


def run_case(case: Case, options: Options) -> list[Row]:
    """Loss and backward of one head."""
    device = options.device
    vbll: Any = importlib.import_module("vbll")
    torch.manual_seed(0)
    arguments: dict[str, Any] = {"parameterization": PACKAGE_NAMES[case.covariance], "cov_rank": 3}
    peer = vbll.DiscClassification(case.features, case.classes, 1 / N_TRAIN, **arguments).to(device)
    ours = VBLLClassification(case.features, case.classes, covariance=case.covariance, rank=3)
    ours = ours.to(device)
    ours.load_vbll(peer.state_dict())
    x = torch.randn(case.rows, case.features, device=device, requires_grad=True)
    y = torch.randint(0, case.classes, (case.rows,), device=device)

    def package() -> Tensor:
        # The loss alone: the layer's forward also draws its Monte-Carlo prediction.
        return peer._get_train_loss_fn(x)(y)

    def own() -> Tensor:
        return ours.loss(x, y, N_TRAIN)

    forwards: dict[str, Callable[[], Tensor]] = {"vbll": package, "bayes_kernels": own}
    parameters = {
        "vbll": [p for p in peer.parameters() if p.requires_grad],
        "bayes_kernels": list(ours.parameters()),
    }
    agreement = check(case, peer, ours, x, y)
    forwards = options.pick(forwards, OURS)
    steps = {
        name: (lambda f=forward, p=parameters[name]: torch.autograd.grad(f(), [x, *p]))
        for name, forward in forwards.items()
    }
    times = time_interleaved(steps, device, seconds=options.time_for(5.0, 3.0))
    rows = []
    for name, forward in forwards.items():
        row = make_row("vbll", case.name, name, "loss+backward", times, device, agreement)
        row.saved_bytes = saved_bytes(forward, [x, *parameters[name]])
        row.peak_bytes = peak_bytes(steps[name], device)
        row.launches = count_launches(steps[name], device)
        rows.append(row)
    return rows


def check(case: Case, peer: Any, ours: VBLLClassification, x: Tensor, y: Tensor) -> Agreement:
    """Value and gradients of both in fp32 against the package in fp64, on three rows."""
    agreement = Agreement(case.name, OURS)
    if case.covariance == "dense" and case.features > 1024:
        return agreement
    x, y = x[:3].detach(), y[:3]
    # The package leaves a constant of the KL out.
    constant = case.classes * case.features / 2 / N_TRAIN
    wide = copy.deepcopy(peer).double()
    results = []
    for layer, features in ((wide, x.double()), (peer, x), (ours, x)):
        features = features.clone().requires_grad_()
        if layer is ours:
            value = ours.loss(features, y, N_TRAIN) + constant
            mean, noise = ours.weight_mean, ours.noise_log_scale
            scale = ours.scale_tril if ours.log_scale is None else ours.log_scale
        else:
            value = layer._get_train_loss_fn(features)(y)
            mean, noise, scale = layer.W_mean, layer.noise_logdiag, layer.W_logdiag
        assert noise is not None and scale is not None
        grads = list(torch.autograd.grad(value, [features, mean, noise, scale]))
        if layer is ours and ours.scale_tril is not None:
            grads[3] = unpack_tril(grads[3]).diagonal(dim1=1, dim2=2)
        if layer is ours and ours.factor is not None:
            grads[3] = grads[3] / 2
        results.append([value.detach(), *grads])
    for name, got in (("vbll", results[1]), ("bayes_kernels", results[2])):
        # Several sums over the features, one inside an exponential.
        agreement.check(name, got, results[0], 16 * tolerance(torch.float32, case.features))
    return agreement


def run(options: Options) -> Iterator[Row]:
    """All cases."""
    for case in cases(options.quick):
        if options.wants(case.name):
            yield from run_case(case, options)


def missing(options: Options) -> str | None:
    """The package is no dependency."""
    if importlib.util.find_spec("vbll") is not None:
        return None
    return (
        "the package vbll is not installed; pip install --no-deps --target FOLDER vbll, and put "
        "FOLDER on PYTHONPATH"
    )


OURS = ("bayes_kernels",)
PEERS = ("vbll",)
FAMILY = Family("vbll", "variational last layer against vbll", OURS, PEERS, run, missing)
