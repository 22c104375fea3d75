"""Plots: what is drawn, what the titles say, and that files are whole PNGs."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from bayes_kernels import metrics

pytest.importorskip("matplotlib")

from bayes_kernels import plots

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def make_case(seed: int, sharpness: float = 1.5):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(300, 4, generator=generator)
    labels = torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(1)
    return (sharpness * logits).log_softmax(-1), labels


def make_bins(seed: int = 0) -> metrics.ReliabilityBins:
    return metrics.reliability_bins(*make_case(seed))


def make_curve(seed: int = 0) -> metrics.RiskCoverageCurve:
    return metrics.risk_coverage_curve(*metrics.confidence_and_correct(*make_case(seed)))


def legend_texts(axes) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_reliability_of_one_method():
    bins = make_bins()
    top, bottom = plots.reliability_diagram(bins).axes
    assert top.get_title() == f"ECE {bins.ece:.1%} (n = 300, chance {bins.floor.mean:.1%})"
    full = int((bins.count > 0).sum())
    assert len(bottom.patches) == full
    assert sum(bar.get_height() for bar in bottom.patches) == 300
    assert sum(int(text.get_text()) for text in bottom.texts) == 300
    # Each filled bin has an accuracy bar and a gap that ends at the mean confidence.
    assert len(top.patches) == 2 * full
    heights = [bar.get_height() for bar in top.patches[:full]]
    np.testing.assert_allclose(heights, bins.accuracy[bins.count > 0], atol=1e-12)
    ends = sorted(bar.get_y() + bar.get_height() for bar in top.patches[full:])
    np.testing.assert_allclose(ends, bins.confidence[bins.count > 0], atol=1e-12)
    named = plots.reliability_diagram({"BLoB": bins}).axes[0]
    assert named.get_title().startswith("BLoB\nECE ")


def test_reliability_draws_confidence_one_with_the_last_bin():
    probs = [[0.95, 0.05], [1.0, 0.0], [1.0, 0.0]]
    bins = metrics.reliability_bins(probs, [0, 1, 0], kind="probs")
    top, bottom = plots.reliability_diagram(bins).axes
    assert [bar.get_height() for bar in bottom.patches] == [3.0]
    assert top.patches[0].get_height() == pytest.approx(2 / 3)
    assert f"{bins.ece:.1%}" in top.get_title()


def test_reliability_of_several_methods():
    methods = {"MAP": make_bins(0), "BLoB": make_bins(1), "Laplace": make_bins(2)}
    top, bottom = plots.reliability_diagram(methods).axes
    assert len(top.lines) == 1 + 3 and len(top.patches) == 0
    assert len(bottom.patches) == 3
    assert legend_texts(top) == [f"{name} (ECE {b.ece:.1%})" for name, b in methods.items()]
    chance = f"{methods['MAP'].floor.mean:.1%}"
    assert top.get_title() == f"Reliability (n = 300, chance {chance})"
    higher = dataclasses.replace(methods["BLoB"], floor=metrics.EceFloor(0.081, 0.1))
    other = {**methods, "BLoB": higher}
    title = plots.reliability_diagram(other).axes[0].get_title()
    assert title == f"Reliability (n = 300, chance {chance}–8.1%)"
    old = {name: dataclasses.replace(b, floor=None) for name, b in methods.items()}
    assert plots.reliability_diagram(old).axes[0].get_title() == "Reliability (n = 300)"
    x, y = top.lines[1].get_data()
    full = methods["MAP"].count[:-1] > 0
    np.testing.assert_allclose(x, methods["MAP"].confidence[:-1][full])
    np.testing.assert_allclose(y, methods["MAP"].accuracy[:-1][full])


def test_more_methods_than_colours_are_all_drawn():
    methods = {f"method {i}": make_bins(i) for i in range(9)}
    top, bottom = plots.reliability_diagram(methods).axes
    assert len(top.lines) == 1 + 9 and len(bottom.patches) == 9


def test_risk_coverage():
    methods = {"MAP": make_curve(0), "BLoB": make_curve(1)}
    (axes,) = plots.risk_coverage(methods).axes
    assert len(axes.lines) == 2 * 2  # a curve and its end point each
    assert legend_texts(axes) == [f"{name} (AURC {c.aurc:.3f})" for name, c in methods.items()]
    np.testing.assert_array_equal(axes.lines[0].get_ydata(), methods["MAP"].risk)
    assert axes.get_ylim()[1] >= float(methods["MAP"].risk[-1])
    (single,) = plots.risk_coverage(methods["MAP"]).axes
    assert legend_texts(single) == [f"(AURC {methods['MAP'].aurc:.3f})"]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("correct", [[1], [0], [1, 1, 1]])
def test_risk_coverage_of_degenerate_curves(correct, tmp_path):
    curve = metrics.risk_coverage_curve([0.5] * len(correct), correct)
    figure = plots.risk_coverage(curve)
    bottom, top = figure.axes[0].get_ylim()
    assert bottom == 0 and top > 0
    plots.save(figure, tmp_path / "curve.png")


def test_score_curves(tmp_path):
    nan = float("nan")
    scores = {
        "NLL": {"mean": [(0.5, 0.1), (0.4, nan), (nan, 0.0)], "draws": [(0.3, 0)] * 3},
        "ECE": {"": [(0.1, 0)] * 3},
    }
    figure = plots.score_curves(["0", "1", "auto"], scores, xlabel="n_samples")
    first, second = figure.axes
    assert (first.get_title(), second.get_title()) == ("NLL", "ECE")
    assert [label.get_text() for label in first.get_xticklabels()] == ["0", "1", "auto"]
    np.testing.assert_array_equal(first.lines[0].get_ydata(), [0.5, 0.4, np.nan])
    assert first.get_xlabel() == "n_samples"
    assert legend_texts(first) == ["mean", "draws"] and second.get_legend() is None
    plots.save(figure, tmp_path / "sweep.png")
    for values, bad in (
        (["0"], {"NLL": {"": [(1, 0)]}}),
        (["0", "1"], {"NLL": {"": [(1, 0)]}}),
        (["0", "1"], {"NLL": {"a": [(1, 0)] * 2, "b": [(1, 0)]}}),
        (["0", "1"], {}),
    ):
        with pytest.raises(ValueError, match="score_curves: scores must have"):
            plots.score_curves(values, bad)


def test_auroc_intervals(tmp_path):
    rows = {"a": metrics.Interval(0.7, 0.6, 0.8), "b": metrics.Interval(0.5, 0.4, 0.55)}
    figure = plots.auroc_intervals({"wrong": rows, "far": {"b": rows["b"]}})
    first, second = figure.axes
    assert [label.get_text() for label in first.get_yticklabels()] == ["a", "b"]
    assert (first.get_title(), second.get_title()) == ("wrong", "far")
    # Chance, and for each row its interval and its value.
    drawn = [line.get_xdata() for line in first.lines[1:]]
    assert [list(x) for x in drawn] == [[0.6, 0.8], [0.7], [0.4, 0.55], [0.5]]
    assert second.lines[1].get_ydata()[0] == first.lines[3].get_ydata()[0]
    plots.save(figure, tmp_path / "auroc.png")
    # A method that had no wrong answers has no line in the first panel.
    figure = plots.auroc_intervals({"wrong": {"b": rows["b"]}, "far": rows})
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["a", "b"]
    assert [len(axes.lines) for axes in figure.axes] == [3, 5]
    assert figure.axes[0].lines[1].get_ydata()[0] == figure.axes[1].lines[3].get_ydata()[0]
    for bad in ({}, {"wrong": {}}):
        with pytest.raises(ValueError, match="auroc_intervals: panels must have rows"):
            plots.auroc_intervals(bad)


def test_entropy_histogram():
    inside = torch.rand(200, generator=torch.Generator().manual_seed(0))
    outside = 0.5 + torch.rand(100, generator=torch.Generator().manual_seed(1))
    (axes,) = plots.entropy_histogram(inside, outside, names=("OBQA", "MMLU"), n_bins=20).axes
    auroc, fpr = metrics.ood_auroc(inside, outside), metrics.fpr95(inside, outside)
    assert axes.get_title() == f"AUROC {auroc:.3f}, FPR95 {fpr:.1%}"
    assert legend_texts(axes) == ["OBQA (n = 200)", "MMLU (n = 100)"]
    assert len(axes.patches) == 4  # a fill and an outline each
    for patch in axes.patches:
        values, edges, _ = patch.get_data()
        assert len(values) == 20
        assert float((values * np.diff(edges)).sum()) == pytest.approx(1.0)


@pytest.mark.filterwarnings("error")
def test_entropy_histogram_of_one_value(tmp_path):
    plots.save(plots.entropy_histogram([0.0, 0.0], [0.0]), tmp_path / "constant.png")


def test_errors_by_draws(tmp_path):
    curves = {"independent": {2: 0.2, 8: 0.1}, "antithetic": {8: 0.02, 2: 0.08}}
    figure = plots.errors_by_draws({"probabilities": curves, "information": curves})
    left, right = figure.axes
    assert (left.get_title(), right.get_title()) == ("probabilities", "information")
    assert legend_texts(left) == list(curves)
    guide, *drawn = left.get_lines()
    np.testing.assert_allclose(guide.get_ydata(), [0.2, 0.1])
    assert [line.get_xdata().tolist() for line in drawn] == [[2, 8], [2, 8]]
    assert drawn[1].get_ydata().tolist() == [0.08, 0.02]
    plots.save(figure, tmp_path / "errors.png")
    for bad in ({}, {"a": {}}, {"a": {"b": {2: 0.0}}}, {"a": {"b": {2: math.nan}}}):
        with pytest.raises(ValueError, match="errors_by_draws: draws and errors"):
            plots.errors_by_draws(bad)


def test_save_is_a_whole_png_and_leaves_nothing_else(tmp_path):
    figure = plots.reliability_diagram(make_bins())
    path = plots.save(figure, tmp_path / "new" / "reliability.png", dpi=100)
    assert path == tmp_path / "new" / "reliability.png"
    data = path.read_bytes()
    assert data.startswith(PNG_SIGNATURE) and data[-8:-4] == b"IEND"
    width, height = (int.from_bytes(data[i : i + 4], "big") for i in (16, 20))
    assert (width, height) == tuple((figure.get_size_inches() * 100).round().astype(int))
    assert [p.name for p in path.parent.iterdir()] == ["reliability.png"]
    plots.save(figure, path, dpi=100)
    assert path.read_bytes() == data


def test_notebooks_show_pictures():
    """As IPython asks for them: without pyplot nobody has told it how matplotlib's figures look."""
    picture = plots.reliability_diagram(make_bins())
    assert picture._repr_png_().startswith(PNG_SIGNATURE)


def test_pictures_are_not_blank(tmp_path):
    image = pytest.importorskip("matplotlib.image")
    for name, figure in {
        "reliability": plots.reliability_diagram({"a": make_bins(0), "b": make_bins(1)}),
        "risk": plots.risk_coverage(make_curve()),
        "entropy": plots.entropy_histogram([0.1, 0.2], [0.3, 0.4]),
    }.items():
        pixels = image.imread(plots.save(figure, tmp_path / f"{name}.png", dpi=80))
        coloured = np.ptp(pixels[..., :3], axis=-1) > 0.3
        assert 0.001 < coloured.mean() < 0.5, name


def test_failed_save_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "figure.png"
    path.write_bytes(b"old")
    figure = plots.risk_coverage(make_curve())

    def fail(stream, **_):
        stream.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(figure, "savefig", fail)
    with pytest.raises(OSError, match="disk full"):
        plots.save(figure, path)
    assert [p.name for p in tmp_path.iterdir()] == ["figure.png"] and path.read_bytes() == b"old"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plots.reliability_diagram({}), "non-empty mapping"),
        (lambda: plots.reliability_diagram([1, 2]), "got list; make them with metrics.reliability"),
        (lambda: plots.reliability_diagram({"a": make_curve()}), r"methods\['a'\] must be a Relia"),
        (lambda: plots.risk_coverage(make_bins()), "must be a RiskCoverageCurve"),
        (lambda: plots.entropy_histogram([], [1.0]), r"score_in must have shape \(n,\)"),
        (lambda: plots.entropy_histogram([math.inf], [1.0]), "must be finite"),
        (lambda: plots.entropy_histogram([1.0], [1.0], n_bins=0), "n_bins must be an integer >= 1"),
        (lambda: plots.save(plots.risk_coverage(make_curve()), "figure.pdf"), "must end in .png"),
    ],
)
def test_bad_input_is_one_clear_line(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_no_pyplot_and_a_clear_line_without_matplotlib():
    code = """
import sys
from bayes_kernels import plots
plots.entropy_histogram([0.1, 0.2], [0.3])
assert "matplotlib.pyplot" not in sys.modules
for name in [n for n in sys.modules if n.startswith(("matplotlib", "bayes_kernels.plots"))]:
    del sys.modules[name]
del sys.modules["bayes_kernels"].plots
sys.modules["matplotlib"] = None
try:
    from bayes_kernels import plots
except ImportError as error:
    assert "pip install bayes-kernels[plots]" in str(error) and "\\n" not in str(error), error
else:
    raise AssertionError("matplotlib was not missed")
"""
    run = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
