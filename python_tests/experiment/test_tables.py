"""Tables of results as text and as Markdown."""

from __future__ import annotations

import pytest

pytest.importorskip("peft")
pytest.importorskip("transformers")

from bayes_kernels.experiment import tables
from bayes_kernels.experiment.results import Summary


def summary(name: str, method: str, seeds: tuple[int, ...], **costs: float) -> Summary:
    scores = {"accuracy": 0.75, "nll": 1.25, "ece": 0.0625}
    std = {"accuracy": 0.0125, "nll": 0.5, "ece": 0.001} if len(seeds) > 1 else {}
    far = {"auroc": 0.5, "fpr95": 0.9}
    shifted = {"auroc": 0.625, "fpr95": 0.9, "accuracy": 0.5, "nll": 1.0, "ece": 0.125}
    ood_std = {"far": {"auroc": 0.25}, "shifted": {"nll": 0.125}} if std else {}
    sets = {"far": far, "shifted": shifted}
    return Summary(name, seeds, {**scores, **costs}, std, {}, sets, ood_std, method)


PLAIN = summary("LoRA (MLE)", "mle", (0, 1), train_seconds=12.0, parameters=10_000)
NOISY = summary("BLoB N=10", "blob", (0,), ms_per_example=1.25, parameters=12_500)


def test_scores_are_means_and_deviations() -> None:
    table = tables.score_table([PLAIN, NOISY], seeds=2)
    assert list(table.headings) == [
        *("method", "accuracy ↑", "NLL ↓", "ECE ↓", "AUROC far ↑", "AUROC shifted ↑")
    ]
    assert table.rows == [
        ["LoRA (MLE)", ".750±.013", "1.250±.500", ".062±.001", ".500±.250", ".625"],
        ["BLoB N=10 (1 of 2)", ".750", "1.250", ".062", ".500", ".625"],
    ]


def test_chance_and_the_side_of_the_error_stand_beside_the_ece() -> None:
    newer = {"ece": 0.0625, "ece_floor": 0.042, "signed_calibration_error": -0.0615}
    new = Summary("new", (0,), newer, {}, {}, {})
    table = tables.score_table([new])
    assert list(table.headings) == ["method", "ECE ↓", "by chance", "over-confidence"]
    assert table.rows == [["new", ".062", ".042", "−.061"]]
    # Results of before have neither.
    old = Summary("old", (0,), {"ece": 0.0625}, {}, {}, {})
    for rows in ([old, new], [new, old]):
        assert list(tables.score_table(rows).headings) == ["method", "ECE ↓"]


def test_only_sets_with_labels_have_scores_under_shift() -> None:
    table = tables.shift_table([PLAIN, NOISY])
    assert table is not None
    assert list(table.headings) == ["method", "set", "accuracy ↑", "NLL ↓", "ECE ↓"]
    assert table.rows[0] == ["LoRA (MLE)", "shifted", ".500", "1.000±.125", ".125"]
    assert len(table.rows) == 2
    bare = Summary("x", (0,), {"nll": 1.0}, {}, {}, {"far": {"auroc": 0.5}})
    assert tables.shift_table([bare]) is None


def test_costs_are_those_that_are_known_of_some_method() -> None:
    table = tables.cost_table([PLAIN, NOISY])
    assert list(table.headings) == ["method", "train s", "ms/text", "extra numbers"]
    assert table.rows == [["LoRA (MLE)", "12", "–", "0"], ["BLoB N=10", "–", "1.2", "+2,500"]]
    # Without plain LoRA nobody knows what is extra.
    assert list(tables.cost_table([NOISY]).headings) == ["method", "ms/text"]


def test_a_comparison_has_scores_costs_and_failures() -> None:
    failed = [tables.Failure("polar", 1, "no | room\n  left")]
    table = tables.comparison_table([PLAIN], failed, seeds=2)
    lines = table.markdown().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0][:2] == ["method", "accuracy ↑"]
    assert set(cells[1][0]) == {"-"} and all(set(cell[:-1]) == {"-"} for cell in cells[1][1:])
    assert all(cell[-1] == ":" and len(cell) >= 3 for cell in cells[1][1:])  # numbers to the right
    assert cells[2][-3:] == [".625", "12", "0"]
    assert cells[3][:2] == ["PoLAR, seed 1", "failed: no / room left"]
    # As wide in each line: a terminal shows what was written.
    assert len({tuple(map(len, line.split("|"))) for line in lines[:3]}) == 1
    # The message of a failure makes no column of the others wider.
    alone = tables.comparison_table([PLAIN], [], seeds=2).markdown().splitlines()
    assert [line.split("|")[2:] for line in lines[:3]] == [line.split("|")[2:] for line in alone]
    assert tables.comparison_table([], failed, seeds=2).rows == table.rows[1:]


def test_failures_of_a_sweep_have_the_names_of_its_rows() -> None:
    """Their word is a value, which no method has."""
    failed = [tables.Failure("lr=1e+30", 0, "no number"), tables.Failure("mle", 1, "no room")]
    table = tables.comparison_table([], failed, 2, {"lr=1e+30": "BLoB lr=1e+30"})
    assert table.rows == [
        ["BLoB lr=1e+30, seed 0", "failed: no number"],
        ["LoRA (MLE), seed 1", "failed: no room"],
    ]


def test_text_is_aligned() -> None:
    table = tables.Table("title", ["a", "long heading", "n"], [["xyz", "w", "1.5"], ["x", "y"]], 2)
    assert table.text() == ("title\na    long heading    n\nxyz  w             1.5\nx    y\n")
