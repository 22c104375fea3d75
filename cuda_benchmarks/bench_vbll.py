"""Loss and backward of a variational Bayesian last layer against the `vbll` package.

    python cuda_benchmarks/bench_vbll.py --device cpu

The package is a peer, not a dependency: `pip install --no-deps --target somewhere vbll`, and put that
folder on PYTHONPATH. Both have the same parameters, and must agree with the package in fp64 first.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from harness import (
    Row,
    assert_agrees,
    make_row,
    peak_bytes,
    print_table,
    results_folder,
    save_rows,
    saved_bytes,
    time_interleaved,
)
from torch import Tensor

from bayes_kernels.vbll import VBLLClassification, unpack_tril

try:
    import vbll
except ImportError:
    sys.exit("bench_vbll: the vbll package is needed; see the first lines of this script")

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


def measure(case: Case, device: str, seconds: float) -> list[Row]:
    torch.manual_seed(0)
    options: dict[str, Any] = {"parameterization": PACKAGE_NAMES[case.covariance], "cov_rank": 3}
    peer = vbll.DiscClassification(case.features, case.classes, 1 / N_TRAIN, **options).to(device)
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
    check(case, peer, ours, x, y)
    steps = {
        name: (lambda f=forward, p=parameters[name]: torch.autograd.grad(f(), [x, *p]))
        for name, forward in forwards.items()
    }
    times = time_interleaved(steps, device, seconds=seconds)
    rows = []
    for name, forward in forwards.items():
        row = make_row("vbll", case.name, name, "loss+backward", times[name], device)
        row.saved_bytes = saved_bytes(forward, [x, *parameters[name]])
        row.peak_bytes = peak_bytes(steps[name], device)
        rows.append(row)
    return rows


def check(case: Case, peer: Any, ours: VBLLClassification, x: Tensor, y: Tensor) -> None:
    """Value and gradients of both in fp32 against the package in fp64, on three rows."""
    if case.covariance == "dense" and case.features > 1024:
        return
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
        assert_agrees(f"{case.name} {name}", got, results[0], 1e-3)


def report(rows: list[Row]) -> None:
    table = []
    for case in dict.fromkeys(r.case for r in rows):
        group = {r.provider: r for r in rows if r.case == case}
        own = group["bayes_kernels"]
        for name, row in group.items():
            kept, peak = row.saved_bytes or 0, row.peak_bytes or 0
            table.append((
                case, name, f"{row.p20_us:.0f}", f"{row.p50_us:.0f}", f"{row.p80_us:.0f}",
                f"{row.p50_us / own.p50_us:.2f}", f"{kept / 1e6:.2f}",
                f"{kept / max(own.saved_bytes or 0, 1):.1f}", f"{peak / 1e6:.1f}",
                f"{peak / max(own.peak_bytes or 0, 1):.1f}",
            ))  # fmt: skip
    header = ("case", "provider", "p20 us", "p50 us", "p80 us", "x ours", "kept MB", "x ours")
    print_table((*header, "peak MB", "x ours"), table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="three heads")
    parser.add_argument("--seconds", type=float, default=5.0, help="time for one case")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument(
        "--save", action="store_true", help="add the rows to results/<machine>/vbll.jsonl"
    )
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU; use --device cpu")
    if arguments.device == "cpu":
        torch.set_num_threads(1)
    rows: list[Row] = []
    for case in cases(arguments.quick):
        rows += measure(case, arguments.device, arguments.seconds)
        print(f"measured {case.name}", file=sys.stderr)
    report(rows)
    if arguments.json is not None:
        save_rows(arguments.json, rows)
    if arguments.save:
        save_rows(results_folder(arguments.device) / "vbll.jsonl", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
