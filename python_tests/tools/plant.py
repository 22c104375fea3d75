"""Plants faults in the CUDA kernels, one at a time, and sees whether the tests on the emulator notice them.

    python python_tests/tools/plant.py [NAME...]

Each fault replaces one piece of a source by another, builds the emulator, and runs tests until one fails.
The sources and the emulator are put back afterwards. Minutes a fault, so it is no part of the suite, which
only checks that every piece is still in its source. The exit code is the number of faults unnoticed.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FUNCTIONAL = "python_tests/functional"
SIM, TRAFFIC = "bayes_kernels_sim", "bayes_kernels_sim_traffic"


@dataclass(frozen=True)
class Fault:
    """`old` in csrc/`file` becomes `new`; `library` is what `tests` load of the emulator."""

    file: str
    old: str
    new: str
    library: str
    tests: tuple[str, ...]


def seen_by_ops(file: str, old: str, new: str) -> Fault:
    names = ("test_adapter", "test_adapter_gradients", "test_block_orders", "test_tiles")
    tests = (*(f"{FUNCTIONAL}/{name}.py" for name in names), "--device", "sim")
    return Fault(file, old, new, SIM, tests)


def seen_by_decode(file: str, old: str, new: str) -> Fault:
    names = ("test_adapter_group", "test_adapter", "test_block_orders")
    tests = (*(f"{FUNCTIONAL}/{name}.py" for name in names), "--device", "sim")
    return Fault(file, old, new, SIM, tests)


DIVERGENCE, PREDICT, CURVATURE, TALL = "divergence", "predict", "curvature", "tall"
GROUPED, ACTIVATIONS = "grouped", "activations"


def seen_by(family: str, file: str, old: str, new: str) -> Fault:
    names = (f"test_{family}", "test_block_orders", "test_tiles")
    return Fault(
        file, old, new, SIM, (*(f"{FUNCTIONAL}/{name}.py" for name in names), "--device", "sim")
    )


def seen_by_counts(file: str, old: str, new: str) -> Fault:
    """Faults that change no result on the emulator: it runs blocks one after another."""
    return Fault(
        file, old, new, TRAFFIC, ("python_tests/csrc/test_counters.py", "-k", "bytes or launches")
    )


FAULTS = {
    "a ticket too early": seen_by_ops("ticket.cuh", "count - 1 ? 1", "count - 2 ? 1"),
    "a ticket not reset": seen_by_ops("ticket.cuh", "if (last != 0) *ticket = 0;", ""),
    "no fence before a ticket": seen_by_counts(
        "ticket.cuh",
        "  __threadfence();\n  __syncthreads();\n  if (thread",
        "  __syncthreads();\n  if (thread",
    ),
    "no fence after a ticket": seen_by_counts("ticket.cuh", "    __threadfence();\n  }", "  }"),
    "columns at an edge": seen_by_ops(
        "adapter_sums.cuh",
        "if (column >= columns || k >= r) continue;",
        "if (column + 4 > columns || k >= r) continue;",
    ),
    "the last token": seen_by_ops(
        "adapter_mma.cuh",
        "if (row0 + 8 * i + g < p.tokens) v[c][i]",
        "if (row0 + 8 * i + g + 1 < p.tokens) v[c][i]",
    ),
    "a lost split": seen_by_ops(
        "adapter_sums.cuh",
        "if (first + i < step.count) add_to(sum, v[i]);",
        "if (first + i + 1 < step.count) add_to(sum, v[i]);",
    ),
    "the scale of dh in fp16": seen_by_ops(
        "adapter_mma.cuh", "p.gradients.scale / low_scale", "p.gradients.scale"
    ),
    "a rank's sign": seen_by_ops(
        "adapter_mma.cuh", ">> (8 * (q % 4) + 2 * t);", ">> (8 * (q % 4) + 2 * t + 1);"
    ),
    "signs not transposed": seen_by_ops(
        "adapter_mma.cuh", "flip_low(rank0, low, 0, low);\n            turn();", "turn();"
    ),
    "normals of odd rows": seen_by_ops(
        "adapter_prepare.cuh", "if ((skip & 2) != 0) {", "if (skip == 3) {"
    ),
    "rho of a neighbour": seen_by_ops(
        "adapter_sums.cuh", "__ldg(p.rho + index + c)", "__ldg(p.rho + index)"
    ),
    "the last group of parts": seen_by_ops(
        "adapter_sums.cuh",
        "const int count = parts - first < group ? parts - first : group;",
        "const int count = group;",
    ),
    "parts of the first step": seen_by_ops(
        "adapter_sums.cuh", "if (count > 1) add(Step{first, count, 1, false});", ""
    ),
    "a result discarded": seen_by_ops(
        "adapter_sums.cuh",
        "for (int i = step.last ? 0 : 1; i < step.count; ++i)",
        "for (int i = 0; i < step.count; ++i)",
    ),
    "lines of a neighbour discarded": seen_by_ops(
        "adapter_sums.cuh", ") / kLine * kLine;\n  for", " + kLine - 1) / kLine * kLine;\n  for"
    ),
    "the fourth of a ragged row": seen_by_ops(
        "adapter_sums.cuh", "if (count >= 4 &&", "if (count >= 3 &&"
    ),
    "lanes of sixteen ranks": seen_by_ops(
        "adapter_fma.cuh", "lane & kShare * half", "lane & 4 * half"
    ),
    "runs of ranks": seen_by_ops(
        "adapter_fma.cuh",
        "const int rank0 = static_cast<int>(blockIdx.z) * kRanks;",
        "const int rank0 = static_cast<int>(blockIdx.z) * 8;",
    ),
    "partial sums that go to memory": seen_by_counts(
        "adapter_sums.cuh", "bk_discard_128(reinterpret_cast<void*>(at));", "static_cast<void>(at);"
    ),
    "a kernel that does not wait": seen_by_counts(
        "adapter_mma.cuh",
        "  bk_wait_for_previous();\n  // The token whose signs this lane draws.",
        "  // The token whose signs this lane draws.",
    ),
    "few tokens in a block": seen_by_counts(
        "adapter_cuda.cu", "warps <= kDownWarps; warps *= 2", "warps <= 1; warps *= 2"
    ),
    "passes not added": seen_by_ops(
        "adapter_fma.cuh", "to = pass == first_pass ? sum[0] : to + sum[0];", "to = sum[0];"
    ),
    "a buffer of dh": seen_by_ops(
        "adapter_mma.cuh", "((row0 / 32 % 2) * kTileWarps + warp)", "(0 * kTileWarps + warp)"
    ),
    "half of the warps": seen_by_ops(
        "adapter_mma.cuh", "half = column_warps / 2; half > 0", "half = column_warps / 2; half > 1"
    ),
    "another group's partial sums": seen_by(
        GROUPED,
        "adapter_fma.cuh",
        "gradients.partial += slice.block0 * kMatrices * padded * R;",
        "gradients.partial += slice.group * kMatrices * padded * R;",
    ),
    "the sign rows of sorted rows": seen_by(
        GROUPED,
        "adapter_fma.cuh",
        "sign_block(keys.out, sign_row_of(noise.rows, row_of(row0 + i)), r, 0)",
        "sign_block(keys.out, sign_row_of(noise.rows, row0 + i), r, 0)",
    ),
    "a place in a group": seen_by(
        GROUPED,
        "grouped_cuda.cu",
        "if (lane >= step) sum += other;",
        "if (lane > step) sum += other;",
    ),
    "the eps of a pair for the next draw": seen_by(
        GROUPED,
        "noise_cuda.cu",
        "if (d == 0 || pair != draw_pair(p.draws[i0], p.antithetic))",
        "if (d == 0)",
    ),
    "the code below a negative number": seen_by(
        ACTIVATIONS, "core/microscale.h", "  code -= static_cast<A>(code) > q ? 1 : 0;\n", ""
    ),
    "a scale of 16 columns": seen_by(
        ACTIVATIONS,
        "activations_cuda.cu",
        "lane < kThreadsPerScale;",
        "lane < kThreadsPerScale / 2;",
    ),
    "16 bits for two numbers": seen_by(
        ACTIVATIONS, "activations_cuda.cu", ">> (16 * (k % 2)) & 0xFFFFu", "& 0xFFFFu"
    ),
    "the sign of a rank, few tokens": seen_by_decode(
        "adapter_decode.cuh",
        "(rank_signs[t][k / 32] >> (k % 32) & 1u) != 0",
        "(rank_signs[t][0] >> (k % 32) & 1u) != 0",
    ),
    "a chunk of a group": seen_by_decode(
        "adapter_decode.cuh",
        "if (first + c < all) sum += v[c];",
        "if (first + c + 1 < all) sum += v[c];",
    ),
    "the next adapter's stream": seen_by_decode(
        "adapter_decode.cuh", "noise.stream = job.stream;", "noise.stream = p.job[0].stream;"
    ),
    "tokens of the second stage": seen_by_decode(
        "adapter_decode.cuh",
        "constexpr int kStages = TB == 16 ? 2 : 1;",
        "constexpr int kStages = 1;",
    ),
    "tickets of the workspace not cleared": seen_by_decode(
        "adapter_cuda.cu",
        "if (args.ticket_slot < 0) bk_zero(",
        "if (args.ticket_slot < -1) bk_zero(",
    ),
    "a sum over two launches": seen_by(
        DIVERGENCE,
        "divergence_cuda.cu",
        "list.partial[list.before + static_cast<int>(blockIdx.x)]",
        "list.partial[static_cast<int>(blockIdx.x)]",
    ),
    "the tail of four deviations": seen_by(
        DIVERGENCE,
        "divergence_cuda.cu",
        "count * log_prior - log(product)",
        "V * log_prior - log(product)",
    ),
    "a power of the deviation": seen_by(
        DIVERGENCE,
        "divergence_cuda.cu",
        "inverse - fma(m, m, square) * of_mean * inverse",
        "inverse - fma(m, m, square) * of_mean",
    ),
    "the next row's range": seen_by(
        PREDICT,
        "predict_row.cuh",
        "const bool there = first + u < ranges;",
        "const bool there = first + u <= ranges && first + u < kPartsAhead;",
    ),
    "a class's exponent": seen_by(
        PREDICT, "predict_large.cuh", "if (of.mode == kFree) mine.shift = shift[c];", ""
    ),
    "the last warp's sums": seen_by(
        PREDICT,
        "predict_row.cuh",
        "for (int w = lane / count; w < warps; w += kShare)",
        "for (int w = lane / count; w < warps - 1; w += kShare)",
    ),
    "warps in one region": seen_by(
        PREDICT,
        "predict_small.cuh",
        "shared + warp * small_warp_bytes(p) / static_cast<int>(sizeof(float))",
        "shared + 0 * warp * small_warp_bytes(p) / static_cast<int>(sizeof(float))",
    ),
    "columns behind the factor": seen_by(
        CURVATURE,
        "curvature_cuda.cu",
        "if (j + t < k) out[at * k + j + t] = sum[t];",
        "out[at * k + j + t] = sum[t];",
    ),
    "a group's lanes": seen_by(
        CURVATURE,
        "curvature_cuda.cu",
        "const uint32_t mask = ((1u << kLanes) - 1) << (group() * kLanes);",
        "const uint32_t mask = kAllLanes;",
    ),
    "the side of a rotation": seen_by(
        CURVATURE, "core/small_linalg.h", "*s = (d < 0 ? -0.5 : 0.5) * pq", "*s = 0.5 * pq"
    ),
    "rows of a small tile": seen_by(TALL, "tall_cuda.cu", "row0 += rows)", "row0 += kRefineRows)"),
    "sums of another Gram matrix": seen_by(
        TALL,
        "tall_cuda.cu",
        "e < matrix; e += kThreads) gram[e] = 0;",
        "e < matrix; e += kThreads) gram[e] = again == 0 ? gram[e] : 0;",
    ),
    "no refinement": seen_by(
        TALL, "tall_cuda.cu", "if (state.more != 0) refine(s, item, g, buffers, &state);", ""
    ),
}


def build(library: str) -> None:
    """Builds the emulator where the last build was, and puts it where the package is."""
    from bayes_kernels import _library

    installed = _library.find_library(f"lib{library}.so")
    folders = sorted(ROOT.glob("build/*/build.ninja"), key=lambda p: p.stat().st_mtime)
    if installed is None or not folders:
        sys.exit("the emulator is not built; build with BAYES_KERNELS_TESTS=ON")
    folder = folders[-1].parent
    subprocess.run(["ninja", "-C", folder, library], check=True, stdout=subprocess.DEVNULL)
    shutil.copy(folder / f"lib{library}.so", installed)


@contextmanager
def planted(fault: Fault) -> Iterator[None]:
    path = ROOT / "csrc" / fault.file
    text = path.read_text()
    if text.count(fault.old) != 1:
        sys.exit(f"{fault.file} must have {fault.old!r} once, has it {text.count(fault.old)} times")
    path.write_text(text.replace(fault.old, fault.new))
    try:
        yield
    finally:
        path.write_text(text)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="default: all; " + ", ".join(FAULTS)
    )
    names = parser.parse_args(arguments).names or list(FAULTS)
    unnoticed = 0
    try:
        for name in names:
            fault = FAULTS[name]
            with planted(fault):
                build(fault.library)
                command = [sys.executable, "-m", "pytest", "-q", "-x", *fault.tests]
                run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            found = [
                line for line in run.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))
            ]
            if run.returncode < 0:  # a store outside an allocation, which the allocator finds
                found = [f"ENDED by signal {-run.returncode}"]
            noticed = run.returncode < 2 and bool(found)
            unnoticed += not noticed
            print(f"{name}: {found[0] if noticed else 'NOT NOTICED'}", flush=True)
    finally:
        for library in (SIM, TRAFFIC):
            build(library)
    return unnoticed


if __name__ == "__main__":
    sys.exit(main())
