"""The page of a run: whole, self-contained, and with the run's numbers and texts."""

from __future__ import annotations

import dataclasses
import html
import math
import re
from pathlib import Path

import pytest
import torch
from page_parser import check_self_contained

from bayes_kernels.experiment import run as ex
from bayes_kernels.experiment.page import REPORT_FILE, score_figures, write_page
from bayes_kernels.experiment.results import summarise
from bayes_kernels.experiment.tables import score_table
from bayes_kernels.table import Table
from bayes_kernels.task import Task

# Where a run takes place depends on the machine; what it finds is compared with the CPU.
pytestmark = pytest.mark.cpu_only


def test_the_page_has_scores_pictures_and_texts(
    finished: tuple[ex.Run, Path], task: Task, tmp_path: Path
) -> None:
    run, _ = finished
    summaries = summarise([run])
    path = write_page(
        tmp_path,
        summaries,
        run.rows,
        task,
        title="A <b>",
        verdict="Better & better.",
        more=[Table("apart", ["method", "less"], [["BLoB", "−.1 < 0"]])],
        command=["x"],
    )
    assert path == tmp_path / REPORT_FILE
    page = path.read_text(encoding="utf-8")
    parsed = check_self_contained(page)
    words = [text.strip() for text in parsed.text]
    for row in score_table(summaries).rows:
        assert set(row) <= set(words), row
    assert (
        any(text.startswith("by chance: ") for text in words) and "✓ is the right answer." in words
    )
    assert "Better & better." in words and "A <b>" in words and "−.1 < 0" in words
    # Reliability, risk and coverage, right and wrong answers, foreign texts.
    assert parsed.tags.count("figure") == 4
    # The most certain text is first, with its probabilities.
    row = run.rows[-1]
    best = int(row.log_probs.max(-1).values.argmax())
    first = page.partition("<h3>Most certain</h3>")[2].partition("</li>")[0]
    assert html.escape(task.test[best].question) in first
    shares = [float(number) for number in re.findall(r"<span>(\d\.\d+)</span>", first)]
    expected = row.log_probs[best].exp().sort(descending=True).values.tolist()
    assert shares == pytest.approx(expected[: len(shares)], abs=6e-4)
    assert first.count("✓") == 1
    # Wrong answers only, the most confident first.
    wrong = page.partition("<h3>Wrong with most confidence</h3>")[2].partition("</ul>")[0]
    assert wrong.count("<li>") == min(5, int((row.log_probs.argmax(-1) != row.labels).sum()))


def test_a_page_without_wrong_answers_or_foreign_texts(
    finished: tuple[ex.Run, Path], task: Task, tmp_path: Path
) -> None:
    run, _ = finished
    row = run.rows[-1]
    sure = torch.full_like(row.log_probs, -50.0)
    sure[torch.arange(len(row.labels)), row.labels] = 0.0
    perfect = dataclasses.replace(row, log_probs=sure, entropy_ood=torch.empty(0))
    alone = dataclasses.replace(task, ood={})
    write_page(tmp_path, summarise([run]), [perfect], alone, title="x")
    page = (tmp_path / REPORT_FILE).read_text(encoding="utf-8")
    assert check_self_contained(page).tags.count("figure") == 2
    assert "Wrong with most confidence" not in page and "nan" not in page


def test_a_picture_without_names_has_no_legend() -> None:
    curves = (
        {"": [(0.5, 0.1), (0.6, math.nan)]},
        {"mean": [(0.5, 0.0)] * 2, "N=2": [(0.4, 0.0)] * 2},
    )
    alone, several = (score_figures(["1", "2"], {"NLL": one}, xlabel="lr")[0] for one in curves)
    assert 'class="legend"' not in alone and "bars: standard deviation over seeds." in alone
    assert 'class="legend"' in several and "bars" not in several
