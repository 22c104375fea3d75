"""What the benchmarks have to reach, as one table, and whether a run reaches it.

A bar compares two providers of the same case in one run. A figure that misses its bar is reported as
missed, with the reason and the next idea from `NOTES`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from harness import Row, print_table


@dataclass(frozen=True)
class Bar:
    """One line of the table of bars.

    Attributes:
        key: a short name, unique.
        work, against: what is measured and what with, in words.
        family, op, cases, mode: rows it is about; `cases` and `mode` are regular expressions for
            the whole name.
        subject, peer: providers; no peer for a figure that stands for itself.
        quantity: "time", "saved", "peak" (above what is there before a step) or "total" (all bytes at
            the peak), subject over peer, at most the limit; or "bandwidth", share of copy
            bandwidth, at least the limit.
        cpu, cuda: the limit on each device; None where there is no bar.
    """

    key: str
    work: str
    against: str
    family: str
    op: str
    subject: str
    peer: str | None
    cpu: float | None
    cuda: float | None
    cases: str = ".*"
    mode: str = ".*"
    quantity: str = "time"

    def limit(self, device: str) -> float | None:
        """The bar of a device."""
        return self.cuda if device == "cuda" else self.cpu

    def value(self, group: dict[str, Row]) -> float | None:
        """The figure of one case; None where a provider or its figure is missing."""
        subject = group.get(self.subject)
        if subject is None:
            return None
        if self.quantity == "bandwidth":
            return subject.roofline
        peer = group.get(self.peer or "")
        if peer is None:
            return None
        if self.quantity == "total":
            ours, theirs = (row.figures.get("total_bytes") for row in (subject, peer))
            return None if ours is None or not theirs else ours / theirs
        name = {"time": "p50_us", "saved": "saved_bytes", "peak": "peak_bytes"}[self.quantity]
        ours, theirs = getattr(subject, name), getattr(peer, name)
        return None if ours is None or not theirs else ours / theirs


_ADAPTER = "BLoB's adapter path, forward and backward, without the base layer"
_RETRACT = r"\d+ x \(4096, 16\)"
_PREDICT = r"S1000 B64 C5 diagonal|S100 B16 C32000 diagonal"

BARS = (
    Bar(
        "adapter-published", _ADAPTER, "bayesian-peft's formula, eager", "adapter", "adapter",
        "bayes_kernels", "published", 1 / 4, 1 / 8, mode=r"forward\+backward",
    ),
    Bar(
        "adapter-peft", _ADAPTER, "plain LoRA as PEFT computes it", "adapter", "adapter",
        "bayes_kernels", "peft_lora", 1.0, 1.0, mode=r"forward\+backward",
    ),
    Bar(
        "adapter-compiled", _ADAPTER, "`torch.compile` of the best plain PyTorch", "adapter",
        "adapter", "bayes_kernels", "compiled", 1 / 1.5, 1 / 2, mode=r"forward\+backward",
    ),
    Bar(
        "adapter-bandwidth", _ADAPTER, "copy bandwidth", "adapter", "adapter", "bayes_kernels",
        None, None, 0.6, mode=r"forward\+backward", quantity="bandwidth",
    ),
    Bar(
        "adapter-saved", "bytes kept for backward by an adapted layer",
        "bayesian-peft's formula", "adapter", "adapter", "bayes_kernels", "published", 1 / 4, 1 / 4,
        mode=r"forward\+backward", quantity="saved",
    ),
    Bar(
        "adapter-token", "one token of plain LoRA, forward", "plain LoRA as PEFT computes it",
        "adapter", "adapter", "lora", "peft_lora", 1.0, 1.0, mode="forward",
    ),
    Bar(
        "flipout-token", "one token through an adapter with noise, one draw, n = 4096",
        "plain LoRA as PEFT computes it", "adapter", "adapter", "bayes_kernels", "peft_lora", 1.0,
        1.0, mode="forward", cases=r"T1 n4096 .*",
    ),
    Bar(
        "draws-shared", "ten draws with an eps of their own, 64 rows each, n = 4096",
        "one eps and signs of each draw", "grouped", "sampled", "independent", "shared", 1.15, 1.15,
        cases=r"S10 x 64 n4096 .*",
    ),
    Bar(
        "flipout-new-draw", "one token through an adapter with noise, a new draw each, n = 4096",
        "plain LoRA as PEFT computes it", "adapter", "adapter", "bayes_kernels", "peft_lora", 1.2,
        None, mode="forward, new draw", cases=r"T1 n4096 .*",
    ),
    Bar(
        "polar-svd", "polar retraction of 16 to 448 matrices (4096, 16)", "`torch.linalg.svd`",
        "tall", "retract", "polar", "svd", 1 / 6, 1 / 50, cases=_RETRACT,
    ),
    Bar(
        "qr-qr", "QR retraction of 16 to 448 matrices (4096, 16)", "`torch.linalg.qr`",
        "tall", "retract", "qr_retract", "qr", 1 / 3, 1 / 50, cases=_RETRACT,
    ),
    Bar(
        "polar-newton-schulz", "polar retraction of 16 to 448 matrices (4096, 16)",
        "batched Newton–Schulz", "tall", "retract", "polar", "newton_schulz", 1 / 2, 1 / 3,
        cases=_RETRACT,
    ),
    Bar(
        "landing-published", "landing field", "PoLAR's published formula, an (n, n) product",
        "tall", "landing_field", "bayes_kernels", "published", 1 / 500, 1 / 50,
        cases=r".*\(4096, \d+\)",
    ),
    Bar(
        "curvature-svd", "low-rank curvature update, d = 4096, k = 10, 4 rows",
        "an fp64 SVD for each layer, as bayesian_lora does", "curvature", "low_rank",
        "bayes_kernels", "svd_fp64", 1 / 8, 1 / 50, cases=r"(1|128) x \(4096, 10\), 4 rows",
    ),
    Bar(
        "predict-time", "mean softmax of Gaussian logits", "a materialised (S, B, C) tensor",
        "predict", "predict", "bayes_kernels", "materialised", 1 / 4, 1 / 5, cases=_PREDICT,
    ),
    Bar(
        "predict-memory", "memory of the same", "a materialised (S, B, C) tensor", "predict",
        "predict", "bayes_kernels", "materialised", 1 / 20, 1 / 20, cases=_PREDICT,
        quantity="peak",
    ),
    Bar(
        "step-time", "a whole BLoB training step", "a step of PEFT's LoRA", "end_to_end",
        "training_step", "blob", "peft_lora", 1.05, 1.00,
    ),
    Bar(
        "step-memory", "peak memory of the same", "a step of PEFT's LoRA", "end_to_end",
        "training_step", "blob", "peft_lora", 1.02, 1.02, quantity="total",
    ),
    Bar(
        "samples-folded", "10 posterior samples of a prediction", "10 sequential passes",
        "end_to_end", "samples", "folded", "sequential", 0.8, 0.5,
    ),
    Bar(
        "last-layer-draws", "PoLAR-VBLL prediction with 1,000 draws", "one pass of plain LoRA",
        "end_to_end", "last_layer", "polar_vbll_1000", "peft_lora", 1.1, 1.1,
    ),
    *(
        Bar(
            f"peers-{op}-{peer}-{quantity}", f"{what}, {words}", against, "peers", op,
            "bayes_kernels", peer, 1.1, None, quantity=quantity,
        )
        for op, what, peer, against in (
            ("fit", "exact Kronecker GGN", "backpack", "laplace-torch with BackPACK"),
            ("fit", "exact Kronecker GGN", "curvlinops", "laplace-torch with curvlinops"),
            ("evidence", "its evidence", "laplace_torch", "laplace-torch"),
            ("logits", "its Gaussian of the logits", "laplace_torch", "laplace-torch"),
            ("vbll", "variational last layer, loss and backward", "vbll", "vbll"),
            ("head", "variational last layer, 20 draws", "vbll", "vbll"),
        )
        for quantity, words in (("time", "time"), ("peak", "memory"))
    ),
)  # fmt: skip

# Why a bar is missed and what would be tried next, by bar and device; shown only where it is missed.
NOTES = {
    ("adapter-saved", "cpu"): (
        "In fp32 x alone is a third of what the published formula keeps, and x and h (tokens, r) are "
        "all that is kept here. In bf16, the case of large models, the published formula keeps x and "
        "its signs in fp32, and the bar is met. Next: nothing; x is the base layer's input, which "
        "it keeps alive anyway."
    ),
    ("adapter-published", "cpu"): (
        "At 64 tokens the noise matrix is drawn for few rows of x: once in the forward pass and once in "
        "the backward pass, 46 µs each. Next: keep the draw from the forward to the backward pass, r n "
        "floats for each layer."
    ),
    ("flipout-token", "cpu"): (
        "Beyond plain LoRA it reads rho and the kept normals, as much memory as both factors, and multiplies "
        "twice. Next: keep E in place of the normals while rho is unchanged."
    ),
    ("peers-fit-backpack-time", "cpu"): (
        "What a batch costs whatever the model is: hooks, a vectorised pass through autograd, fp64 "
        "eigendecompositions of all factors. Of many columns 1 MiB at a time go through a pass. "
        "BackPACK propagates the C columns of the softmax's root inside one backward pass, which works for "
        "networks of its own list of layers only. The hidden layer is 128 wide here; in language models "
        "the passes weigh more. Next: one vectorised pass without functorch's dispatch."
    ),
    ("peers-fit-backpack-peak", "cpu"): (
        "A vectorised pass takes as many columns as fit into 1 MiB; the largest difference is about that. "
        "Next: nothing."
    ),
    ("peers-fit-curvlinops-time", "cpu"): (
        "The fixed cost of a batch, as for BackPACK; from 5 classes on ours is not slower. Next: the same."
    ),
    ("peers-fit-curvlinops-peak", "cpu"): (
        "The columns of a vectorised pass, at most 1 MiB, and eigendecompositions in fp64. Next: nothing."
    ),
    ("peers-evidence-laplace_torch-time", "cpu"): (
        "Sums in fp64 where the peer's are in fp32, and a check that the weights are those of the fit. It is "
        "at most a millisecond, and of few repetitions on a busy core. Next: nothing."
    ),
    ("peers-evidence-laplace_torch-peak", "cpu"): (
        "Products of eigenvalues in fp64 where the peer's are in fp32. Next: nothing; where evidences are "
        "compared, their difference is small against both."
    ),
    ("peers-logits-laplace_torch-time", "cpu"): (
        "The last layer at 2 classes, whose Jacobian is small: hooks, and the check that the weights are "
        "those of the fit, are most of a millisecond. Next: nothing."
    ),
    ("draws-shared", "cpu"): (
        "Ten draws are 327,680 normals, a shared one 32,768: the difference is that of their time, and the "
        "products are the same. In antithetic pairs, the default, half as many are drawn. Next: fewer "
        "instructions for each normal."
    ),
    ("flipout-new-draw", "cpu"): (
        "r n normals take as many instructions as plain LoRA's two products with one token: see "
        "[Kernels](kernels.md) for their count. Next: fewer rounds of the generator."
    ),
    ("polar-svd", "cpu"): (
        "In a loop of its own a matrix takes 104 to 112 µs, 0.15 of the SVD on the same idle core; "
        "between other providers x and the step come from memory, and the 50 µs that 786 KB take there "
        "do not grow with the SVD. Reading the next matrix ahead during the second pass was tried, and "
        "was slower. Next: larger pages; the bar as it is may be out of reach from cold caches."
    ),
    ("qr-qr", "cpu"): "The same as for the polar retraction.",
    ("landing-published", "cpu"): (
        "Met at r = 16. The n x n product takes n / r times the arithmetic: 64 at r = 64, where nothing "
        "can be 500 times faster. Next: nothing."
    ),
    ("curvature-svd", "cpu"): (
        "A single layer in a call: its kernel takes about 90 µs, the rest is Python and dispatch, "
        "which a list shares. Next: fewer checks for a list of one."
    ),
    ("step-time", "cpu"): (
        "The step is one of matrix products of the frozen layers, which are the same; what is added "
        "is noise and the optimiser's step of the deviations. Next: see where the difference is with "
        "a larger batch."
    ),
    ("samples-folded", "cpu"): (
        "One thread is bound by arithmetic, which folding does not save: what it saves is reading "
        "the weights and Python, a small part at this batch. Next: the rows up to the first adapted "
        "layer are the same for all samples and could be computed once."
    ),
    ("last-layer-draws", "cpu"): (
        "Within the spread of a shared machine: no draws cost the same as 1,000. Without other processes "
        "it was 1.05 at 16 x 32 tokens and 1.00 at 64 x 32 (all-MiniLM-L6-v2). What is more than plain "
        "LoRA is the r x r core. Next: fold it into a factor in eval mode."
    ),
}


@dataclass(frozen=True)
class Verdict:
    """One bar on one case."""

    bar: Bar
    case: str
    value: float
    limit: float

    @property
    def met(self) -> bool:
        """Whether the figure reaches its bar."""
        if self.bar.quantity == "bandwidth":
            return self.value >= self.limit
        return self.value <= self.limit


def verdicts(family: str, rows: Iterable[Row], device: str) -> list[Verdict]:
    """All bars of a family on the rows of one run."""
    found = []
    groups: dict[tuple[str, str, str], dict[str, Row]] = {}
    for row in rows:
        if row.miss is None:  # the time of a wrong result says nothing
            groups.setdefault((row.op, row.case, row.mode), {})[row.provider] = row
    for bar in BARS:
        limit = bar.limit(device)
        if bar.family != family or limit is None:
            continue
        for (op, case, mode), group in groups.items():
            if op != bar.op or not re.fullmatch(bar.cases, case):
                continue
            if not re.fullmatch(bar.mode, mode):
                continue
            value = bar.value(group)
            if value is not None:
                found.append(Verdict(bar, case, value, limit))
    return found


def print_verdicts(found: Sequence[Verdict]) -> None:
    """Each ratio with its bar."""
    table = []
    for v in found:
        what = f"{v.bar.subject} / {v.bar.peer} {v.bar.quantity}"
        if v.bar.peer is None:
            what = f"{v.bar.subject}, share of copy bandwidth"
        sign = "at least" if v.bar.quantity == "bandwidth" else "at most"
        verdict = "met" if v.met else "missed"
        table.append((v.case, what, f"{v.value:.4f}", f"{sign} {v.limit:.4f}", verdict))
    print_table(("case", "bar", "ratio", "limit", "verdict"), table)
