"""What each token adds to a text, and what is shown of it."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
from test_html import check_self_contained

from bayes_kernels.hf import Generation, ScoredText
from bayes_kernels.hf.highlight import LIMITS, html_page, level_of, measure_of, terminal_text
from bayes_kernels.hf.texts import pieces_of, shown_together
from hf.letters import letters, single_bytes


def test_the_first_word_keeps_its_space() -> None:
    tokenizer = letters()
    before, after = tokenizer("no")["input_ids"], tokenizer("way")["input_ids"]
    assert pieces_of(tokenizer, before, after) == [" ", "w", "a", "y"]
    assert pieces_of(tokenizer, [], [*before, *after]) == ["", "n", "o", " ", "w", "a", "y"]
    assert pieces_of(tokenizer, before, [*after[:2], 2]) == [" ", "w", ""]  # an end adds nothing


@pytest.mark.parametrize("text", ["né", "日本", "a🙂b", "e\u0301", "tab\t\n"])
def test_characters_come_whole(text: str) -> None:
    tokenizer = single_bytes()
    ids = tokenizer(text)["input_ids"]
    pieces = pieces_of(tokenizer, tokenizer("x y")["input_ids"], ids)
    assert len(pieces) == len(ids) == len(text.encode())
    assert "".join(pieces) == text and all(piece in (*text, "") for piece in pieces)
    cut = pieces_of(tokenizer, [], tokenizer("n日")["input_ids"][:-1])
    assert cut[0] == "n" and cut[-1].startswith("\ufffd")


def scored(
    tokens: list[str], doubts: list[float], *, log_prob: float = -1.0, **options: Any
) -> ScoredText:
    options = {"n_samples": 4, **options}
    kind = Generation if "prompt" in options else ScoredText
    return kind(
        text="".join(tokens),
        token_ids=list(range(len(tokens))),
        tokens=tokens,
        log_probs=[log_prob] * len(tokens),
        entropy=[doubt + 0.25 for doubt in doubts],
        expected_entropy=[0.25] * len(tokens),
        entropy_bias=None,
        **options,
    )


def test_what_is_not_known_is_no_certainty() -> None:
    options: dict[str, Any] = {"prompt": "", "stopped": True, "abstain_above": 0.2}
    options["abstain_on"] = "max_mutual_information"
    sure = scored(["a"], [0.1], log_prob=-800.0, **options)
    assert isinstance(sure, Generation) and sure.perplexity == math.inf and not sure.abstained
    broken = scored(["a"], [math.nan], log_prob=math.nan, **options)
    assert isinstance(broken, Generation) and math.isnan(broken.perplexity) and broken.abstained


def test_levels() -> None:
    for by, limits in LIMITS.items():
        assert [level_of(limit, by) for limit in limits] == [1, 2, 3, 4, 5]
        assert [level_of(limit * 0.999, by) for limit in limits] == [0, 1, 2, 3, 4]
    text = scored(["a", "b"], [0.0, 2.0])
    assert measure_of(text) == "mutual_information"
    assert measure_of(scored(["a"], [0.0], n_samples=1)) == "entropy"
    with pytest.raises(ValueError, match="'mutual_information' with 0 draws"):
        measure_of(scored(["a"], [0.0], n_samples=0), "mutual_information")


def test_terminal_marks_uncertain_tokens_and_obeys_none() -> None:
    shown = terminal_text(scored(["sure", "\x1b[2J\r", " un\n"], [0.0, 0.0, 2.0]))
    assert shown.plain == "sure\ufffd[2J\ufffd un\n"
    spans = {shown.plain[span.start : span.end]: str(span.style) for span in shown.spans}
    assert "white" in spans[" un\n"] and "sure" not in spans


def test_page_shows_text_as_text() -> None:
    ending = {"prompt": "a <i>", "stopped": True, "abstain_on": "max_entropy"}
    text = scored(['<b "x">', "", "\n", ""], [0.0, 0.05, 2.0, 0.4], abstain_above=0.1, **ending)
    page = html_page([text], "A & B")
    parsed = check_self_contained(page)
    assert "b" not in parsed.tags and "i" not in parsed.tags
    assert 'a <i><b "x">\n [end]' in "".join(parsed.text)
    assert "abstained" in page and 'class="t e4 m5"' in page and 'class="t e1 m0"' in page
    notes = [value for _, name, value in parsed.attributes if name == "data-n"]
    assert len(notes) == 3 and "mutual information 2 nats" in str(notes[1])


def notes_of(page: str) -> list[tuple[str, str]]:
    """Classes and note of each token of a page."""
    attributes = [(name, str(value)) for _, name, value in check_self_contained(page).attributes]
    return [
        (before, note)
        for (_, before), (name, note) in itertools.pairwise(attributes)
        if name == "data-n"
    ]


def test_tokens_without_text_are_seen() -> None:
    """They are shown with the next one that has text, or as the end: at the highest of their levels."""
    text = scored(["a", "", "", "🙂", "b", "", ""], [0.0, 0.05, 2.0, 0.2, 0.0, 0.0, 0.4])
    assert shown_together(text.tokens) == [[0], [1, 2, 3], [4], [5, 6]]
    assert shown_together(["", "a"]) == [[0, 1]] and shown_together([""]) == [[0]]
    seen = notes_of(html_page([text]))
    assert [levels for levels, _ in seen] == ["t e1 m0", "t e4 m5", "t e1 m0", "t e2 m4 end"]
    assert seen[0][1].count("\n") == 3 and "token" not in seen[0][1]
    lines = seen[1][1].splitlines()
    for place, (line, doubt) in enumerate(zip(lines, ["0.05", "2", "0.2"], strict=True), start=1):
        assert line.startswith(f"token {place} of 3: probability 0.368, entropy ")
        assert line.endswith(f", mutual information {doubt} nats")
    assert len(text.to_dict()["token_mutual_information"]) == 7  # files have each token
    shown = terminal_text(text)
    assert shown.plain == "a🙂b"
    styles = {shown.plain[span.start : span.end]: str(span.style) for span in shown.spans}
    assert list(styles) == ["🙂", "b"] and "190,50,20" in styles["🙂"]
    assert "245,138,66" in styles["b"]  # the end, which is nowhere else
    broken = terminal_text(scored(["", "a"], [math.nan, 0.0]))
    assert "190,50,20" in str(broken.spans[0].style)
    assert terminal_text(scored([""], [2.0])).plain == ""


@pytest.mark.parametrize("word", ["a🙂b", "нет", "日本"])
def test_bytes_of_a_character_are_seen(word: str) -> None:
    tokenizer = single_bytes()
    pieces = pieces_of(tokenizer, [], tokenizer(word)["input_ids"])
    groups = shown_together(pieces)
    assert [pieces[group[-1]] for group in groups] == list(word)
    assert [len(group) for group in groups] == [len(letter.encode()) for letter in word]
    for place in range(len(pieces)):  # whichever token it is
        text = scored(pieces, [2.0 * (i == place) for i in range(len(pieces))])
        assert terminal_text(text).plain == word
        assert [str(span.style) for span in terminal_text(text).spans] == [
            "bold white on rgb(190,50,20)"
        ]
        assert sum("m5" in levels for levels, _ in notes_of(html_page([text]))) == 1
