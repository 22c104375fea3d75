"""Write docs/benchmarks.md from the rows of all machines.

    python cuda_benchmarks/report.py [--check | --gpu OUT]

`--gpu OUT` first takes what gpu.sh left in OUT: rows, the smoke program's lines, counters and the summary
go to results/<GPU>, and README's status table says for each family which GPU ran it, at which commit, and
how that went.

The page shows, for each machine, every bar with the newest run that has its providers, and then every
case, those where we are slower included, as a picture (charts.py) and as a table. Nothing in it is
written by hand but the text below.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import bars
import charts
import harness
from harness import ROOT, Row

PAGE = ROOT / "docs" / "benchmarks.md"
RESULTS = Path(__file__).resolve().parent / "results"

INTRODUCTION = """\
# Benchmarks

<!-- Written by `python cuda_benchmarks/report.py` from cuda_benchmarks/results: change those. -->

Every figure is a ratio of two providers, measured in turn in one process after both have been checked
against an fp64 reference. Times are medians over repetitions: of the CPU time of one thread, or of CUDA
events with the L2 cache flushed and kernels launched ahead, so that the host's launches count in whole
models only. Code of others that misses the reference is marked (!) and counts for no target; code of ours
that misses it is not timed. `core` is the share of wall-clock time for which the process had a core: if
it is well below 1, other processes took turns on the core and its caches. A commit that ends in -dirty
had uncommitted changes.

```bash
make bench                                             # all families on the CPU, a few minutes
bayes-kernels bench adapter --vs published,peft_lora   # one family, some of its providers
bayes-kernels bench --device cuda --save               # adds rows to cuda_benchmarks/results/<machine>
cuda_benchmarks/gpu.sh                                 # build, tests, sanitizers, benchmarks on a GPU machine
bayes-kernels bench --report                           # this page from all rows, and its pictures
```

Pictures show each provider's time over ours, on a logarithmic axis: providers left of one are faster than
ours. Black marks ("bar to reach") are the targets; a coloured bar that ends before its mark misses its
target.

Peak memory is counted by torch's allocator, above the memory in use before a step; [Memory](memory.md)
derives it from the sizes of a model. The test suite bounds the instructions of the CPU kernels, and the
launches and [bytes](kernels.md#bytes) of the CUDA kernels (`python_tests/csrc/test_counters.py`), on any
machine under any load.
"""

FAMILY_TEXT = {
    "adapter": "One adapted layer, forward and backward, without the base layer's product. `published` is "
    "bayesian-peft's formula with its sign tensors, `peft_lora` plain LoRA as PEFT computes it (fp32 "
    "adapters), `peft_lora_low` the same in the activations' dtype, `eager` and `compiled` the best plain "
    "PyTorch for BLoB without and with `torch.compile`; `lora` and `bayes_kernels` are ours, without and "
    "with noise. `forward` is one token, what generation under one draw of the weights pays; in "
    "`forward, new draw` the noise is drawn for each token.",
    "activations": "`quantize` and `dequantize` are the ops by themselves, against the same in plain "
    "PyTorch. `adapter` is one layer of BLoB, forward and backward, without the base layer's product: "
    "`bayes_kernels` keeps its input in 8 bits for backward, `whole` keeps the input itself, `peft_lora` is "
    "plain LoRA as PEFT computes it (fp32 adapters). Layers that share their input share the 8 bits, too.",
    "grouped": "One adapted layer under ten draws of its weights, rows of one draw after the other: "
    "`shared` is one eps with signs of each draw, `independent` an eps of its own for each, `antithetic` "
    "one for each pair; `eager` is plain PyTorch with a batched product. Noise is drawn within the "
    "measured time.",
    "predict": "`mc_predict` against softmax over a materialised (samples, B, C) tensor, the same 10 samples "
    "at a time, and (full covariance) the published Laplace-LoRA code's expansion. Noise is drawn within "
    "the measured time, entropies are part of the result.",
    "tall": "Lists of matrices (n, r): polar and QR retraction of x + step, a Stiefel descent step, PoLAR's "
    "landing field.",
    "curvature": "One update of rank-k factors (d, k) with new rows for each of a list of layers. "
    "`svd_fp64` is bayesian_lora's update, `gram_torch` the same Gram route in batched PyTorch calls. "
    "`kron` adds N rows to a dense factor (d, d); `addmm` is PyTorch's product of converted, masked rows.",
    "vbll": "Loss and backward of a variational last layer against the `vbll` package.",
    "peers": "A network of two linear layers, 64 to 128 to C: `fit` of the exact Kronecker GGN of 128 rows "
    "(32 at C = 1,000), "
    "evidence, mean and covariance of the linearised logits of 64 rows (1 row at C = 1,000, where the peer's "
    "Jacobian of 64 has 33 GB), against laplace-torch with the BackPACK and curvlinops backends and a plain "
    "backward pass for each class (`published`); and a variational last layer with 128 features against "
    "the `vbll` package (`make peers`).",
    "experts": "Adapters of rank 8 on both projections of all experts of a Qwen3-MoE with random weights "
    "(`target_parameters`), one text, no optimiser: `blob` adds the adapter's output beside each product, "
    "`peft_lora` is plain LoRA by stock PEFT, which makes the changed weights of all experts in each pass, "
    "`base` the model without adapters.",
    "end_to_end": "Whole training steps and predictions of models with random weights, adapters of rank 8 on "
    "query and value projections (`cuda_benchmarks/bench_end_to_end.py`). `laplace` is a prediction of "
    "Laplace-LoRA, 1,000 draws of linearised logits, against the whole Jacobian of the batch.",
}


def read(results: Path = RESULTS) -> dict[str, dict[str, list[Row]]]:
    """Rows by machine and family."""
    found: dict[str, dict[str, list[Row]]] = {}
    for path in sorted(results.glob("*/*.jsonl")):
        if path.stem not in harness.FAMILIES:  # those of registers.py
            continue
        for row in harness.read_rows(path):
            machine = str(row.environment["machine"])
            found.setdefault(machine, {}).setdefault(path.stem, []).append(row)
    return found


def newest(rows: Iterable[Row], family: str) -> list[Row]:
    """Of each case the rows of the newest run that has one of ours and a peer, else the newest."""
    ours = set(harness.load_family(family).ours)
    groups: dict[tuple[str, str, str], dict[str, list[Row]]] = {}
    for row in rows:
        runs = groups.setdefault((row.op, row.case, row.mode), {})
        runs.setdefault(str(row.environment["date"]), []).append(row)
    found: list[Row] = []
    for runs in groups.values():

        def complete(date: str, runs: dict[str, list[Row]] = runs) -> bool:
            names = {row.provider for row in runs[date]}
            return bool(names & ours) and bool(names - ours)

        found += runs[max(runs, key=lambda date: (complete(date), date))]
    return found


def device_of(rows: Sequence[Row]) -> str:
    """cpu or cuda."""
    environment = rows[0].environment
    guess = "cuda" if "NVIDIA" in str(environment["machine"]) else "cpu"
    return str(environment.get("device", guess))


def number(value: float, significant: int = 3) -> str:
    """Three significant digits, more where they decide a verdict; no decimals from 100 on."""
    if value >= 100:
        return f"{value:,.0f}"
    before = math.floor(math.log10(value)) + 1 if value > 0 else 1
    return f"{value:.{max(0, significant - before)}f}"


def table(header: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> list[str]:
    """Lines of a Markdown table without its empty columns."""
    cells = [list(row) for row in rows]
    used = [i for i in range(len(header)) if i < left or any(row[i] for row in cells)]
    marks = ["---" if i < left else "---:" for i in used]
    lines = [[header[i] for i in used], marks, *([row[i] for i in used] for row in cells)]
    return ["| " + " | ".join(line) + " |" for line in lines] + [""]


def bar_lines(families: dict[str, list[Row]], device: str) -> list[str]:
    """The table of bars on one machine, and what to say about those that are missed."""
    rows, notes = [], []
    for bar in bars.BARS:
        limit = bar.limit(device)
        if limit is None or (families and bar.family not in families):
            continue
        least = bar.quantity == "bandwidth"
        name = {"time": "time", "saved": "bytes", "peak": "peak bytes", "total": "all bytes"}
        what = "share of copy bandwidth, at least" if least else f"{name[bar.quantity]}, at most"
        found = [v for v in bars.verdicts(bar.family, families.get(bar.family, []), device)
                 if v.bar == bar]  # fmt: skip
        if not found:
            rows.append((bar.work, bar.against, f"{what} {number(limit)}", "", "not measured"))
            continue
        values = sorted(v.value for v in found)
        spread = number(values[0], 4)
        if len(values) > 1:
            spread += f" to {number(values[-1], 4)} ({len(values)} cases)"
        missed = [v for v in found if not v.met]
        verdict = "met"
        if missed:
            verdict = "**missed**" if len(missed) == len(found) else (
                f"**missed** in {len(missed)} of {len(found)}"
            )  # fmt: skip
            cases = "; ".join(f"{v.case}: {number(v.value, 4)}" for v in missed)
            why = bars.NOTES.get((bar.key, device), "No reason is known yet.")
            notes.append(f"* **{bar.work}, against {bar.against}** ({cases}). {why}")
        rows.append((bar.work, bar.against, f"{what} {number(limit)}", spread, verdict))
    header = ("work", "against", "target (ours / theirs)", "measured", "verdict")
    lines = table(header, rows, left=3)
    if notes:
        lines += ["Missed, why, and what would be tried next:", "", *notes, ""]
    return lines


def case_lines(family: str, rows: Sequence[Row]) -> list[str]:
    """Every case of a family: our time, and what the others take of it."""
    description = harness.load_family(family)
    lines = [
        f"### {description.title[0].upper()}{description.title[1:]}",
        "",
        FAMILY_TEXT[family],
        "",
    ]
    for op, mode in dict.fromkeys((row.op, row.mode) for row in rows):
        part = [row for row in rows if (row.op, row.mode) == (op, mode)]
        providers = list(dict.fromkeys(row.provider for row in part))
        own = next((name for name in description.ours if name in providers), providers[0])
        others = [name for name in providers if name != own]
        body = []
        for case in dict.fromkeys(row.case for row in part):
            group = {row.provider: row for row in part if row.case == case}
            mine = group.get(own)
            if mine is None:
                continue
            line = [case, number(mine.p50_us), f"{number(mine.p20_us)} to {number(mine.p80_us)}"]
            for name in others:
                ratio = group[name].p50_us / mine.p50_us if name in group else None
                slower = ratio is not None and ratio < 1
                text = "" if ratio is None else number(ratio)
                text = f"**{text}**" if slower else text
                wrong = name in group and group[name].miss is not None
                line.append(f"{text} {harness.MARK}" if wrong else text)
            share = mine.cpu_share
            line += [
                "" if mine.roofline is None else f"{mine.roofline:.0%}",
                "" if mine.launches is None else str(mine.launches),
                "" if share is None else f"{share:.2f}",
            ]
            body.append(line)
        heads = [f"{name} / {own}" for name in others]
        header = ("case", f"`{own}`, µs", "20th to 80th percentile", *heads, "of copy bandwidth",
                  "launches", "core")  # fmt: skip
        lines += [f"`{op}`, {mode}: median time; bold: faster than `{own}`.", ""]
        lines += table(header, body)
    lines += [
        f"{harness.MARK} {row.op} {row.case}, {row.provider}: {row.miss}.\n"
        for row in rows
        if row.miss is not None
    ]
    lines += memory_lines(rows, description.ours)
    return [*lines, environment_line(rows), ""]


def memory_lines(rows: Sequence[Row], ours: Sequence[str]) -> list[str]:
    """Bytes of every provider, where they were counted, and the peak over that of ours."""
    known = [r for r in rows if r.peak_bytes is not None or r.saved_bytes is not None]
    if not known:
        return []

    def megabytes(value: float | None) -> str:
        return (
            "" if value is None else number(value / 1e6) if value >= 1e5 else f"{value / 1e6:.4f}"
        )

    groups: dict[tuple[str, str, str], dict[str, Row]] = {}
    for row in known:
        groups.setdefault((row.op, row.case, row.mode), {})[row.provider] = row
    cases = [case for _, case, _ in groups]
    body = []
    for row in known:
        f, group = row.figures, groups[row.op, row.case, row.mode]
        own = next((group[name] for name in ours if name in group), None)
        ratio = None
        if own is not None and own is not row and own.peak_bytes and row.peak_bytes is not None:
            ratio = row.peak_bytes / own.peak_bytes
        several = cases.count(row.case) > 1
        predicted, total = f.get("predicted_bytes"), f.get("total_bytes")
        body.append((
            f"{row.op}, {row.case}, {row.mode}" if several else row.case, row.provider,
            megabytes(row.saved_bytes), megabytes(row.peak_bytes),
            "" if ratio is None else number(ratio) if ratio >= 1 else f"**{number(ratio)}**",
            megabytes(f.get("parameter_bytes")), megabytes(f.get("gradient_bytes")),
            megabytes(f.get("optimizer_bytes")), megabytes(total),
            f"{predicted / total - 1:+.1%}" if predicted and total else "",
            f"{f['tokens_per_second']:,.0f}" if "tokens_per_second" in f else "",
        ))  # fmt: skip
    header = ("case", "provider", "kept for backward, MB", "peak of a step, MB",
              "peak / ours", "parameters, MB",
              "gradients, MB", "optimiser, MB", "all, MB", "model's error", "tokens/s")  # fmt: skip
    return table(header, body, left=2)


def environment_line(rows: Sequence[Row]) -> str:
    """Machine, versions, commits and days of some rows."""

    def of(name: str) -> str:
        return ", ".join(sorted({str(row.environment.get(name, "")) for row in rows} - {""}))

    days = ", ".join(sorted({str(row.environment["date"])[:10] for row in rows}))
    device = device_of(rows)
    where = f"CUDA {of('cuda')}, driver {of('driver')}" if device == "cuda" else of("cpu_path")
    threads = "" if device == "cuda" else f", {of('threads')} thread"
    return f"{of('machine')}, torch {of('torch')}, {where}{threads}; commit {of('commit')}; {days}."


def picture_line(machine: str, family: str) -> list[str]:
    """The picture of a family."""
    title = harness.load_family(family).title
    name = charts.file_name(machine, family)
    return [f"![Time of each provider over ours: {title}]({charts.IMAGES.name}/{name})", ""]


def pictures(results: Path = RESULTS) -> dict[str, list[charts.Panel]]:
    """What the page's pictures show, by file name."""
    found = {}
    for machine, by_family in read(results).items():
        for family, all_rows in by_family.items():
            rows = newest(all_rows, family)
            drawn = charts.panels(family, rows, device_of(rows))
            if drawn:
                found[charts.file_name(machine, family)] = drawn
    return found


def write_pictures(folder: Path, results: Path = RESULTS) -> bool:
    """Write all pictures, and remove those of rows that are gone; False where matplotlib is missing."""
    wanted = pictures(results)
    try:
        for name, drawn in wanted.items():
            charts.write(drawn, folder / name)
    except ImportError:
        return False
    for path in folder.glob("*.svg"):
        if path.name not in wanted:
            path.unlink()
    return True


def page(results: Path = RESULTS, *, with_pictures: bool = True) -> str:
    """The text of docs/benchmarks.md."""
    drawn = pictures(results) if with_pictures else {}
    lines = [INTRODUCTION]
    machines = read(results)
    seen = set()
    for machine, by_family in machines.items():
        families = {
            name: newest(by_family[name], name) for name in harness.FAMILIES if name in by_family
        }
        device = device_of(next(iter(families.values())))
        seen.add(device)
        lines += [f"## {machine}", "", *bar_lines(families, device)]
        for name, rows in families.items():
            own = case_lines(name, rows)
            if charts.file_name(machine, name) in drawn:
                own[4:4] = picture_line(machine, name)  # below the family's text
            lines += own
    if "cuda" not in seen:
        lines += [
            "## GPU",
            "",
            "Open: no GPU has run any of these kernels yet. The bars are set:",
            "",
            *bar_lines({}, "cuda"),
        ]
    return "\n".join(lines).rstrip() + "\n"


# --- what a GPU has run --------------------------------------------------------------------------

NOT_RUN = "compiled and emulated"
CHECKS = ("memcheck", "racecheck", "initcheck", "synccheck")


def take(out: Path, results: Path = RESULTS) -> Path:
    """Copy what gpu.sh left in a folder to results/<GPU>, and return that folder.

    A run without the smoke program goes on with an earlier one: its summary is added to that one's.

    Raises:
        SystemExit: the folder has no summary, or the summary names no GPU.
    """
    summary = out / "summary.txt"
    lines = summary.read_text().splitlines() if summary.exists() else []
    gpu = next((line.split(",")[0] for line in lines[1:2] if "," in line), None)
    if gpu is None:
        raise SystemExit(
            f"--gpu must be a folder of gpu.sh with a GPU in its summary.txt, got {out}"
        )
    with tempfile.TemporaryDirectory() as unpacked:
        if (out / "evidence.tar.gz").exists():
            with tarfile.open(out / "evidence.tar.gz") as archive:
                archive.extractall(unpacked, filter="data")
        for path in sorted(Path(unpacked, "results").glob("*/*.jsonl")):
            if path.stem in harness.FAMILIES:
                harness.save_rows(results / path.parent.name / path.name, harness.read_rows(path))
    folder = results / "-".join("".join(c if c.isalnum() else " " for c in gpu).split())
    folder.mkdir(parents=True, exist_ok=True)
    earlier = folder / "summary.txt"
    if earlier.exists() and not (out / "smoke.jsonl").exists():
        said = earlier.read_text()
        if summary.read_text() not in said:
            earlier.write_text(said + summary.read_text())
    else:
        shutil.copyfile(summary, earlier)
    for name in ("smoke.jsonl", "counters.csv"):
        if (out / name).exists():
            shutil.copyfile(out / name, folder / name)
    return folder


def status(family: str, results: Path = RESULTS) -> str:
    """What README says of a kernel family on GPUs: machine, commit, cases passed, checks, copy rate."""
    found = []
    for smoke in sorted(results.glob("*/smoke.jsonl")):
        cases = [json.loads(line) for line in smoke.read_text().splitlines()]
        ours = [c for c in cases if c["family"] == family]
        if not ours:
            continue
        text = (smoke.parent / "summary.txt").read_text()
        commit = " and ".join(dict.fromkeys(re.findall(r"^== \S+ (.+)$", text, re.MULTILINE)))
        passed = sum(c["problem"] is None for c in ours)
        codes = dict(re.findall(r"^  (\w+): (\d+)$", text, re.MULTILINE))  # of the last run of each
        clean = [c for c in CHECKS if codes.get(c) == "0"]
        rows = smoke.parent / f"{family}.jsonl"
        shares = (
            [r.roofline for r in harness.read_rows(rows) if r.roofline] if rows.exists() else []
        )
        found.append(
            f"{smoke.parent.name.replace('-', ' ')} at {commit}: {passed} of {len(ours)} cases"
            + (f"; {', '.join(clean)} clean" if clean else "; not sanitised")
            + (f"; {min(shares):.0%} to {max(shares):.0%} of the copy rate" if shares else "")
        )
    return "<br>".join(found) or NOT_RUN


def with_status(readme: str, results: Path = RESULTS) -> str:
    """README with the last column of its status table as the results have it."""
    names = {
        "prediction": "predict",
        "tall matrices": "tall",
        "adapter ops": "adapter",
        "grouped adapter ops": "grouped",
        "activations in 8 bits": "activations",
    }

    def line(match: re.Match[str]) -> str:
        family = names.get(match[2].strip(), match[2].strip())
        return f"{match[1]} {status(family, results)} |"

    parts = "|".join(("noise", *names, "divergence", "curvature"))
    return re.sub(rf"^(\| ({parts}) \(.*\) \|[^|]*\|)[^|]*\|$", line, readme, flags=re.MULTILINE)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--check", action="store_true", help="only say whether the page is up to date"
    )
    parser.add_argument("--gpu", type=Path, metavar="OUT", help="take what gpu.sh left there first")
    arguments = parser.parse_args()
    if arguments.gpu is not None:
        print(f"took {take(arguments.gpu)}")
    readme = ROOT / "README.md"
    if not arguments.check and with_status(readme.read_text()) != readme.read_text():
        readme.write_text(with_status(readme.read_text()))
        print(f"wrote {readme}")
    text = page()
    if arguments.check:
        same = PAGE.exists() and PAGE.read_text() == text
        print(
            "up to date" if same else f"{PAGE} is not what the rows give; run {Path(__file__).name}"
        )
        return 0 if same else 1
    if not write_pictures(charts.IMAGES):
        text = page(with_pictures=False)
        print("no pictures: matplotlib is not installed; pip install 'bayes-kernels[plots]'")
    temporary = PAGE.with_suffix(".tmp")
    temporary.write_text(text)
    os.replace(temporary, PAGE)
    print(f"wrote {PAGE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
