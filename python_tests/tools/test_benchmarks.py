"""The benchmark suite: options, rows, bars, the committed page, and the model of a step's memory."""

from __future__ import annotations

import functools
import importlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from bayes_kernels import memory

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "cuda_benchmarks"


@pytest.fixture(scope="module", autouse=True)
def on_path() -> Iterator[None]:
    threads = torch.get_num_threads()
    sys.path.insert(0, str(FOLDER))
    yield
    sys.path.remove(str(FOLDER))
    torch.set_num_threads(threads)


def load(name: str) -> Any:
    return importlib.import_module(name)


# --- harness -------------------------------------------------------------------------------------


def test_one_family_from_its_options_to_its_rows(tmp_path: Path) -> None:
    """A measured case has every provider that was asked for, with time, memory and environment."""
    harness = load("harness")
    path = tmp_path / "rows.jsonl"
    code = load("command").main(
        ["curvature", "--quick", "--seconds", "0.01", "--vs", "gram_torch", "--case", "1 X (4096",
         "--json", str(path)],
    )  # fmt: skip
    rows = harness.read_rows(path)
    assert code == 0
    assert {row.provider for row in rows} == {"gram_torch", "bayes_kernels"}
    assert {row.case for row in rows} == {"1 x (4096, 10), 4 rows"}
    for row in rows:
        assert 0 < row.p20_us <= row.p50_us <= row.p80_us
        assert row.repeats >= 3
        assert 0 < row.cpu_share <= 1.1
        assert {"machine", "torch", "commit", "dirty", "date", "threads"} <= set(row.environment)
        assert row.environment["dirty"] == row.environment["commit"].endswith("-dirty")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nothing"], "FAMILY must be one of adapter"),
        (["curvature", "--vs", "nobody"], "--vs must name providers"),
        (["curvature", "--seconds", "0"], "--seconds must be positive"),
        (["curvature", "--case", "no such case"], "no case of curvature"),
        (
            ["curvature", "--shape", "T=1,n=2"],
            "--shape must have the sizes of another family, got T,n",
        ),
        (
            ["--shape", "T=1,n=2"],
            "--shape must have the sizes of adapter: T,n,m,r; predict: S,B,C; ",
        ),
        (["--shape", "T=x"], "must be sizes such as T=2048,n=4096, got 'T=x'"),
        (["--shape", "S=1,B=1,C=2", "--dtype", "bf16"], "--dtype must be one of fp32 for predict"),
        (["--dtype", "bf16"], "--dtype goes with --shape"),
        (
            ["tall", "--compare", "a", "b", "--save", "--json", "c"],
            "--compare runs nothing: expected it alone, got FAMILY, --json, --save too",
        ),
        pytest.param(
            ["curvature", "--device", "cuda"],
            "torch sees no GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        load("command").main(arguments)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and says in line


SHAPES = {
    "adapter": ("T=40,n=64,m=48,r=4", "T40 n64 m48 r4 bfloat16", "bf16"),
    "predict": ("S=20,B=8,C=5", "S20 B8 C5 diagonal", None),
    "tall": ("count=3,n=96,r=4", "3 x (96, 4)", None),
}


@pytest.mark.parametrize("family", SHAPES)
def test_a_shape_of_ones_own(family: str, tmp_path: Path) -> None:
    shape, name, dtype = SHAPES[family]
    path = tmp_path / "rows.jsonl"
    words = ["--shape", shape, "--vs", "none", "--seconds", "0.01", "--json", str(path)]
    words += [] if dtype is None else ["--dtype", dtype]
    assert load("command").main(words) == 0
    rows = load("harness").read_rows(path)
    assert {row.case for row in rows} == {name} and len(rows) >= 1
    assert {row.provider for row in rows} <= set(load("harness").load_family(family).ours)


def test_two_files_of_rows_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    harness, main = load("harness"), load("command").main
    make = partial(harness.Row, "tall", mode="step", p20_us=1.0, p80_us=9.0, repeats=3)
    keys = dict.fromkeys(("machine", "torch", "bayes_kernels", "commit", "threads"), "x")
    for name, times in {"a": (200.0, 50.0), "b": (100.0, 55.0)}.items():
        rows = [
            make("c", "bayes_kernels", p50_us=times[0], peak_bytes=int(times[0]), environment=keys),
            make("c", "qr", p50_us=times[1], environment=keys),
            make(name, "qr", p50_us=times[1], environment=keys),
        ]
        harness.save_rows(tmp_path / name, rows)
    assert main(["--compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["tall", "c", "bayes_kernels", "step", "200", "100", "0.50", "0.50"] in lines
    assert ["tall", "c", "qr", "step", "50", "55", "1.10"] in lines
    assert "2 rows are in one file only".split() in lines
    (tmp_path / "a").write_text("no rows")
    with pytest.raises(SystemExit):
        main(["--compare", str(tmp_path / "a"), str(tmp_path / "b")])
    assert "expected rows that --json wrote, got: " in capsys.readouterr().err


def test_every_family_loads_and_has_its_bars() -> None:
    harness, bars = load("harness"), load("bars")
    assert len({bar.key for bar in bars.BARS}) == len(bars.BARS)
    for name in harness.FAMILIES:
        family = harness.load_family(name)
        assert family.name == name
        known = {*family.ours, *family.providers}
        for bar in bars.BARS:
            if bar.family == name:
                assert {bar.subject, bar.peer} - {None} <= known, bar.key
    assert {bar.family for bar in bars.BARS} <= set(harness.FAMILIES)
    assert {key for key, _ in bars.NOTES} <= {bar.key for bar in bars.BARS}


def test_a_provider_of_ours_that_is_wrong_is_not_timed() -> None:
    harness = load("harness")
    truth = torch.linspace(-1, 1, 8, dtype=torch.float64)
    harness.assert_agrees("right", [truth.float()], [truth], 1e-6)
    with pytest.raises(harness.Disagreement, match="differs from the fp64 reference"):
        harness.assert_agrees("wrong", [truth.float() * 1.001], [truth], 1e-4)
    with pytest.raises(harness.Disagreement, match="nan"):
        harness.assert_agrees("nan", [truth * float("nan")], [truth], 1e-4)


@pytest.mark.parametrize("terms", [1, 64, 2048, 32768])
def test_the_tolerance_is_that_of_a_sum_of_so_many_terms(terms: int) -> None:
    """One term after another in fp32 is within it; a sum without one of its terms is not."""
    tolerance = load("harness").tolerance
    x = torch.randn(terms, 4, generator=torch.Generator().manual_seed(terms))
    products = x.square()
    total = torch.zeros(4)
    for row in products:
        total += row
    truth = x.double().square().sum(0)
    scale = truth.max()
    allowed = tolerance(torch.float32, terms)
    assert (total - truth).abs().max() / scale < allowed / 2
    without = truth - products[products[:, 0].argmax()].double()
    assert (without - truth).abs().max() / scale > allowed
    for dtype in (torch.bfloat16, torch.float16):
        rounded = (truth.to(dtype) - truth).abs().max() / scale
        assert rounded < tolerance(dtype, terms)
        assert 2 * torch.finfo(dtype).eps < tolerance(dtype, terms) < 5 * torch.finfo(dtype).eps


def change(monkeypatch: pytest.MonkeyPatch, place: Any, name: str) -> None:
    """Results of a provider become 3 % larger, those that it writes included."""
    original = getattr(place, name)

    @functools.wraps(original)
    def changed(*args: Any, **options: Any) -> Any:
        found = original(*args, **options)
        if isinstance(found, torch.Tensor) and found.is_floating_point():
            return found * 1.03
        if isinstance(found, (list, tuple)):
            return [t * 1.03 for t in found]
        for tensor in args[0]:
            tensor.mul_(1.03)
        return found

    monkeypatch.setattr(place, name, changed)
    for key, provider in getattr(place, "DENSE_PROVIDERS", {}).items():
        if provider is original:
            monkeypatch.setitem(place.DENSE_PROVIDERS, key, changed)


def small_run(family: str, options: Any) -> list[Any]:
    bench = load(f"bench_{family}")
    if family == "adapter":
        return bench.run_training(bench.Case(8, 32, 48, 4, torch.float32), options)
    if family == "curvature":
        return bench.run_dense_case(
            bench.DenseCase(1, 64, 8, torch.bfloat16, False), options
        ) + bench.run_case(bench.Case(1, 64, 4, 4), options)
    if family == "tall":
        return bench.run_retraction(bench.Case(2, 64, 4), options)
    return bench.run_case(bench.Case(20, 2, 5), options)


@pytest.mark.parametrize(
    ("family", "peer", "ours"),
    [
        ("adapter", "published", "flipout_lora"),
        ("curvature", "addmm", "kron_accumulate"),
        ("tall", "svd", "functional.qr_retract_"),
        ("predict", "summary", "ours"),
    ],
)
def test_a_wrong_peer_is_a_marked_row_and_ours_stops(
    family: str, peer: str, ours: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness, bench = load("harness"), load(f"bench_{family}")
    options = harness.Options("cpu", True, 1e-3)
    monkeypatch.setattr(harness, "copy_bandwidth", lambda device: 1e10)
    if hasattr(bench, "peak_bytes"):  # the profiler takes seconds to start
        monkeypatch.setattr(bench, "peak_bytes", lambda step, device: 0)
    rows = small_run(family, options)
    assert [row.provider for row in rows if row.miss is not None] == []
    with monkeypatch.context() as patch:
        change(patch, bench, peer)
        for table in ("DENSE_PROVIDERS",):
            if peer in getattr(bench, table, {}):
                patch.setitem(getattr(bench, table), peer, getattr(bench, peer))
        marked = small_run(family, options)
    wanted = {"summary": "materialised"}.get(peer, peer)
    assert [row.provider for row in marked if row.miss is not None] == [wanted]
    assert {row.provider for row in marked} == {row.provider for row in rows}
    with monkeypatch.context() as patch:
        place, _, name = ours.rpartition(".")
        change(patch, getattr(bench, place) if place else bench, name)
        with pytest.raises(harness.Disagreement, match="timing would be meaningless"):
            small_run(family, options)


def test_a_miss_never_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ours that misses ends its family, an error too; the others are measured; the code is 1."""
    harness = load("harness")

    def wrong(options: Any) -> Iterator[Any]:
        yield made_row(op="first", provider="bayes_kernels")
        harness.assert_agrees("ours", [torch.zeros(1)], [torch.ones(1).double()], 0.1)

    def broken(options: Any) -> Iterator[Any]:
        raise RuntimeError("no compiler")
        yield

    def fine(options: Any) -> Iterator[Any]:
        common = {"op": "low_rank", "case": "1 x (4096, 10), 4 rows", "mode": "update"}
        yield made_row(provider="bayes_kernels", p50_us=1.0, **common)
        yield made_row(provider="svd_fp64", p50_us=1.5, miss="is wrong", **common)

    runs = {"adapter": wrong, "predict": broken, "curvature": fine}
    monkeypatch.setattr(
        load("command"),
        "load_family",
        lambda name: harness.Family(name, name, ("bayes_kernels",), ("svd_fp64",), runs[name]),
    )
    path = tmp_path / "rows.jsonl"
    assert load("command").main([*runs, "--json", str(path)]) == 1
    found = capsys.readouterr()
    assert [row.op for row in harness.read_rows(path)] == ["first", "low_rank", "low_rank"]
    assert [row.miss for row in harness.read_rows(path)] == [None, None, "is wrong"]
    assert f"svd_fp64 {harness.MARK}" in found.out
    assert "svd_fp64: is wrong" in found.out
    assert "verdict" not in found.out  # no bar is met or missed by a wrong result
    last = found.err.splitlines()[-2:]
    assert last[0].startswith("stopped: adapter: ours: result 0 differs")
    assert last[1] == "stopped: predict: RuntimeError, see above"
    assert load("command").main(["curvature"]) == 0


def made_row(**changes: Any) -> Any:
    environment = {"machine": "m", "torch": "1", "bayes_kernels": "2", "commit": "c", "threads": 1}
    values = {"op": "o", "case": "k", "provider": "p", "mode": "", "p20_us": 1.0, "p50_us": 2.0,
              "p80_us": 3.0, "repeats": 3, "environment": environment}  # fmt: skip
    return load("harness").Row(**{**values, **changes})


def test_rows_replace_those_of_the_same_commit_only(tmp_path: Path) -> None:
    harness, path = load("harness"), tmp_path / "results" / "rows.jsonl"
    harness.save_rows(path, [made_row(), made_row(provider="q")])
    later = dict(made_row().environment, commit="d")
    harness.save_rows(path, [made_row(p50_us=5.0), made_row(environment=later)])
    rows = harness.read_rows(path)
    assert [(r.provider, r.environment["commit"], r.p50_us) for r in rows] == [
        ("p", "c", 5.0), ("q", "c", 2.0), ("p", "d", 2.0),
    ]  # fmt: skip
    assert not list(path.parent.glob("*.tmp"))
    assert json.loads(path.read_text().splitlines()[0])["op"] == "o"


def test_a_run_that_is_stopped_keeps_the_cases_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of a case are in the file when the next case begins: no signal can take them."""
    harness, path, seen = load("harness"), tmp_path / "rows.jsonl", []

    class Killed(BaseException):
        pass

    def run(options: Any) -> Any:
        for case in ("first", "second"):
            for provider in ("ours", "other"):
                yield made_row(case=case, provider=provider)
            seen.append([r.case for r in harness.read_rows(path)] if path.exists() else [])
        yield made_row(case="third")
        raise Killed

    made = harness.Family("adapter", "made", ("ours",), ("other",), run)
    monkeypatch.setattr(load("command"), "load_family", lambda name: made)
    with pytest.raises(Killed):
        load("command").main(["adapter", "--json", str(path)])
    assert seen == [[], ["first"] * 2]
    assert [r.case for r in harness.read_rows(path)] == ["first"] * 2 + ["second"] * 2


def test_the_cache_is_flushed_with_clean_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Written lines would be written back while the next kernel is timed: the read comes last."""
    harness, order = load("harness"), []

    class Buffer:
        def __init__(self, name: str) -> None:
            self.name = name

        def zero_(self) -> None:
            order.append(f"write {self.name}")

        def sum(self) -> None:
            order.append(f"read {self.name}")

    buffers = (Buffer("a"), Buffer("b"))
    monkeypatch.setattr(harness, "_flush_buffers", lambda: buffers)
    harness.flush_cache()
    assert order == ["write a", "read b"]


def test_verdicts() -> None:
    """A ratio at its bar is met; one above is missed; a share of bandwidth is a lower bound."""
    bars = load("bars")

    def rows(ours: float, **changes: Any) -> list[Any]:
        common = {"op": "low_rank", "case": "1 x (4096, 10), 4 rows", "mode": "update"}
        return [
            made_row(provider="bayes_kernels", p50_us=ours, **common, **changes),
            made_row(provider="svd_fp64", p50_us=8.0, **common),
        ]

    (at,) = bars.verdicts("curvature", rows(1.0), "cpu")
    (above,) = bars.verdicts("curvature", rows(1.01), "cpu")
    assert (at.met, above.met) == (True, False)
    assert bars.verdicts("curvature", rows(1.0)[:1], "cpu") == []
    shared = {"op": "adapter", "case": "k", "mode": "forward+backward", "provider": "bayes_kernels"}
    low, high = (
        bars.verdicts("adapter", [made_row(roofline=share, **shared)], "cuda")[0]
        for share in (0.59, 0.6)
    )
    assert (low.met, high.met) == (False, True)


def test_bytes_are_those_of_the_allocator() -> None:
    """Peak and saved bytes of an expression whose arrays can be counted by hand."""
    harness = load("harness")
    x = torch.randn(1000, 100, requires_grad=True)
    n = x.numel() * 4

    def forward() -> torch.Tensor:
        return (x.exp() * x.sin()).sum()  # kept: exp, sin (x is a parameter)

    assert harness.saved_bytes(forward, [x]) == 2 * n
    peak = harness.peak_bytes(lambda: (x.detach() + 1).neg().sum(), "cpu")
    assert peak is not None
    assert 2 * n <= peak <= 2 * n + 1000


# --- the committed page ----------------------------------------------------------------------------


def test_the_page_is_what_the_rows_give() -> None:
    report = load("report")
    assert report.page() == report.PAGE.read_text(), (
        "docs/benchmarks.md is not what the rows give; run python cuda_benchmarks/report.py"
    )


def test_the_page_says_what_is_missed(tmp_path: Path) -> None:
    """A machine whose only row misses its bar is shown with the figure and the note."""
    report, harness = load("report"), load("harness")
    environment = {"machine": "A CPU", "torch": "9.9", "bayes_kernels": "0", "commit": "abc-dirty",
                   "dirty": True, "date": "2026-01-02T03:04:05+00:00", "threads": 1,
                   "cpu_path": "avx2", "cuda": ""}  # fmt: skip
    common = {"op": "low_rank", "case": "1 x (4096, 10), 4 rows", "mode": "update"}
    rows = [
        made_row(provider="bayes_kernels", p50_us=2.0, environment=environment, **common),
        made_row(provider="svd_fp64", p50_us=8.0, environment=environment, **common),
    ]
    harness.save_rows(tmp_path / "A-CPU" / "curvature.jsonl", rows)
    page = report.page(tmp_path)
    assert "abc-dirty" in page
    assert "**missed**" in page
    assert load("bars").NOTES["curvature-svd", "cpu"] in page


def test_the_pictures_are_of_the_rows() -> None:
    """Each picture of the page is there, and carries the digest of what the rows give."""
    report, charts = load("report"), load("charts")
    wanted = report.pictures()
    assert {path.name for path in charts.IMAGES.glob("*.svg")} == set(wanted)
    for name, drawn in wanted.items():
        text = (charts.IMAGES / name).read_text()
        assert charts.digest(drawn) in text, (
            f"docs/images/{name} is not of the rows; run python cuda_benchmarks/report.py"
        )
        assert f"({charts.IMAGES.name}/{name})" in report.PAGE.read_text()


def test_panels_of_a_picture() -> None:
    """Ratios to our first provider; a bar on another of ours is put in units of the first."""
    charts = load("charts")
    common = {"op": "retract", "case": "16 x (4096, 16)", "mode": "step"}
    times = {"svd": 30.0, "qr": 15.0, "polar": 5.0, "qr_retract": 4.0}
    rows = [made_row(provider=name, p50_us=time, **common) for name, time in times.items()]
    (panel,) = charts.panels("tall", rows, "cpu")
    assert (panel.op, panel.mode, panel.own) == ("retract", "step", "polar")
    found = {mark.provider: (mark.ratio, mark.goal) for mark in panel.marks}
    # svd at least 6 times polar; qr at least 3 times qr_retract.
    assert found == {"svd": (6.0, 6.0), "qr": (3.0, 2.4), "qr_retract": (0.8, None)}
    assert charts.panels("tall", rows[:2], "cuda")[0].own == "svd"
    slower = [made_row(provider="polar", p50_us=6.0, **common), rows[0]]
    assert charts.digest(charts.panels("tall", slower, "cpu")) != charts.digest([panel])


def test_a_picture_is_written_once_and_the_same(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    charts, report = load("charts"), load("report")
    size = lambda item: sum(len(panel.marks) for panel in item[1])  # noqa: E731
    name, drawn = min(report.pictures().items(), key=size)
    first, second = tmp_path / "images" / name, tmp_path / name
    charts.write(drawn, first)
    charts.write(drawn, second)
    assert first.read_bytes() == second.read_bytes()
    assert [path.name for path in first.parent.iterdir()] == [name]
    text = first.read_text()
    for mark in drawn[0].marks:
        assert mark.case in text
        assert mark.provider in text


def test_the_page_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tables are written all the same."""
    report = load("report")
    monkeypatch.setitem(sys.modules, "bayes_kernels.plots", None)
    assert not report.write_pictures(tmp_path)
    page = report.page(with_pictures=False)
    assert "![" not in page
    assert page.count("| case |") == report.page().count("| case |")


# --- linearised predictions ------------------------------------------------------------------------


@pytest.mark.parametrize("layers", ["adapters", "last"])
def test_linearised_predictions_agree(layers: str) -> None:
    """Ours, the published route and dense inverses in fp64; within 0.1 %."""
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    from bayes_kernels.hf.methods.laplace import laplace_posterior

    bench, harness, peer = load("bench_end_to_end"), load("harness"), load("published_laplace")
    formula = {"adapters": peer.published_jacobian, "last": peer.published_last_layer}[layers]
    case = bench.Case("tiny", 3, 6)
    model = bench.fit_laplace(case, bench.build_base(bench.SHAPES["tiny"], "cpu"), "cpu", layers)
    posterior = laplace_posterior(model)
    assert posterior is not None
    inputs = {k: v for k, v in bench.make_batch(case, "cpu").items() if k != "labels"}
    truth = peer.exact_covariance(model, posterior, inputs)
    ours = posterior.laplace.logits(inputs)
    harness.assert_agrees("ours", ours, truth, 1e-3)
    harness.assert_agrees(
        "published", formula(model, posterior, inputs, peer.factors_of(posterior)), truth, 1e-3
    )
    with pytest.raises(harness.Disagreement, match="differs"):
        harness.assert_agrees("another prior", [ours[1] * 1.01], [truth[1]], 1e-3)


# --- memory model ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hidden", "layers", "heads", "kv_heads", "intermediate", "dtype", "batch", "length"),
    [
        (64, 2, 4, 4, 176, torch.float32, 4, 32),
        (96, 3, 6, 2, 256, torch.float32, 2, 64),
        (128, 2, 4, 2, 352, torch.bfloat16, 4, 48),
    ],
)
def test_memory_model(
    hidden: int, layers: int, heads: int, kv_heads: int, intermediate: int,
    dtype: torch.dtype, batch: int, length: int, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Within 5 % of what torch's allocator counts, in sum and for what is kept for backward."""
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    bench, harness = load("bench_end_to_end"), load("harness")
    shape = memory.Shape("s", "llama", hidden, layers, heads, kv_heads, intermediate, 500, dtype)
    monkeypatch.setitem(bench.SHAPES, "s", shape)
    base = bench.build_base(shape, "cpu")
    data = bench.make_batch(bench.Case("s", batch, length), "cpu")
    for method in ("peft_lora", "published_blob", "blob"):
        run = bench.prepare(base, shape, method, data)
        run.step()
        found = bench.memory_figures(run)
        peak = harness.peak_bytes(run.step, "cpu", warm=False)
        if peak is None:
            pytest.skip("this torch does not report allocations")
        saved = harness.saved_bytes(run.loss, [*run.model.parameters(), *run.model.buffers()])
        predicted = memory.predict(shape, batch, length, method, bench.CLASSES)
        total = found["parameter_bytes"] + found["optimizer_bytes"] + peak
        assert predicted.parameters == pytest.approx(found["parameter_bytes"], rel=0.01)
        assert predicted.gradients == pytest.approx(found["gradient_bytes"], rel=0.01)
        assert predicted.optimizer == pytest.approx(found["optimizer_bytes"], rel=0.01)
        assert predicted.saved == pytest.approx(saved, rel=0.05)
        assert predicted.step == pytest.approx(peak, rel=0.05)
        assert predicted.total == pytest.approx(total, rel=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_memory_model_of_options(
    dtype: torch.dtype, bits: int | None, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checkpointing and inputs in 8 bits, of all methods that have them: within 5 % as well.

    The step's peak beside checkpoints is one layer's, which on a layer of this size has 10 % of masks and
    rotary tables.
    """
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    bench, harness = load("bench_end_to_end"), load("harness")
    shape = memory.Shape("s", "llama", 128, 4, 4, 2, 352, 500, dtype)
    monkeypatch.setitem(bench.SHAPES, "s", shape)
    base = bench.build_base(shape, "cpu")
    data = bench.make_batch(bench.Case("s", 4, 64), "cpu")
    for method in ("blob", "scalabl", "polar_vbll") if bits else ("peft_lora", "blob"):
        run = bench.prepare(base, shape, method, data)
        run.model.peft_config["default"].activation_bits = bits
        if checkpointing:
            run.model.enable_input_require_grads()
            run.model.gradient_checkpointing_enable({"use_reentrant": False})
        run.step()
        peak = harness.peak_bytes(run.step, "cpu", warm=False)
        if peak is None:
            pytest.skip("this torch does not report allocations")
        saved = harness.saved_bytes(run.loss, [*run.model.parameters(), *run.model.buffers()])
        predicted = memory.predict(
            shape, 4, 64, method, bench.CLASSES, checkpointing=checkpointing, activation_bits=bits
        )
        assert predicted.saved == pytest.approx(saved, rel=0.05), method
        assert predicted.step == pytest.approx(peak, rel=0.1 if checkpointing else 0.05), method


def test_memory_model_refuses_what_it_does_not_know() -> None:
    bench = load("bench_end_to_end")
    with pytest.raises(ValueError, match="method must be one of"):
        memory.predict(bench.SHAPES["10M"], 1, 1, "nothing", 2)
    with pytest.raises(ValueError, match="the shape a llama"):
        memory.predict(bench.SHAPES["22M BERT"], 1, 1, "blob", 2)
    with pytest.raises(ValueError, match="base must be one of"):
        memory.predict(bench.SHAPES["10M"], 1, 1, "blob", 2, base="2bit")
    with pytest.raises(ValueError, match="activation_bits must be None"):
        memory.predict(bench.SHAPES["10M"], 1, 1, "peft_lora", 2, activation_bits=8)


# --- command line ----------------------------------------------------------------------------------


def test_bench_command_hands_its_options_on(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("typer")
    from typer.testing import CliRunner

    from bayes_kernels.cli import app

    calls = []

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        calls.append((command, options))
        return subprocess.CompletedProcess(command, 3)

    monkeypatch.setattr(subprocess, "run", run)
    found = CliRunner().invoke(
        app.app,
        ["bench", "tall", "--device", "cpu", "--quick", "--vs", "svd,qr", "--case", "16 x"],
    )
    assert found.exit_code == 3
    ((command, options),) = calls
    assert command[:2] == [sys.executable, str(FOLDER)]
    assert command[2:] == ["tall", "--device", "cpu", "--quick", "--vs", "svd,qr", "--case", "16 x"]
    assert options["env"]["OMP_NUM_THREADS"] == "1"


def test_bench_command_names_all_families() -> None:
    typer = pytest.importorskip("typer")

    from bayes_kernels.cli import app

    families, *_ = typer.main.get_command(app.app).commands["bench"].params
    named = families.help.partition(";")[0].split(", ")
    assert named == list(load("harness").FAMILIES)
    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    listed = page.partition("\nFamilies are ")[2].partition(";")[0]
    assert re.findall("`([^`]+)`", listed) == named


@pytest.mark.parametrize(
    ("options", "got"),
    [
        ({"save": True}, "--save"),
        ({"families": ["tall"], "json_file": Path("rows")}, "FAMILY, --json"),
        ({"quick": True, "seconds": 0.0}, "--quick, --seconds"),
    ],
)
def test_bench_report_is_alone(
    options: dict[str, Any], got: str, capsys: pytest.CaptureFixture[str]
) -> None:
    typer = pytest.importorskip("typer")

    from bayes_kernels.cli import bench

    with pytest.raises(typer.Exit) as end:
        bench.bench(report=True, **options)
    (line,) = capsys.readouterr().err.splitlines()
    assert end.value.exit_code == 2 and line.startswith("error: --report: expected it alone")
    assert f"got {got} too; " in line


def test_bench_command_without_a_source_tree(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("typer")
    import typer

    from bayes_kernels.cli import bench

    wheel = tmp_path / "bayes_kernels" / "cuda_benchmarks"
    monkeypatch.setattr(bench, "_FOLDERS", (tmp_path / "cuda_benchmarks", wheel))
    with pytest.raises(typer.Exit):
        bench.bench()
    (line,) = capsys.readouterr().err.splitlines()
    assert f"expected the benchmarks in {tmp_path}" in line
    shutil.copytree(FOLDER, wheel, ignore=shutil.ignore_patterns("results", "__pycache__"))
    with pytest.raises(typer.Exit):
        bench.bench(save=True)
    (line,) = capsys.readouterr().err.splitlines()
    assert "--save and --report write to the source tree" in line
    rows = tmp_path / "rows.jsonl"
    with pytest.raises(typer.Exit) as end:
        bench.bench(["tall"], shape="count=2,n=64,r=4", vs="none", seconds=0.01, json_file=rows)
    assert end.value.exit_code == 0
    row, *others = load("harness").read_rows(rows)
    assert {one.case for one in (row, *others)} == {"2 x (64, 4)"}
    assert row.environment["commit"].startswith("wheel ")
