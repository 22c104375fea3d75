"""Pages are whole, need nothing from elsewhere, and show text as text."""

from __future__ import annotations

import re

from page_parser import Parsed, check_self_contained

from bayes_kernels.html import escape, page, table


def test_page_is_whole_and_self_contained() -> None:
    parsed = check_self_contained(page('A <b> & "c"', "<p>x</p>", style="p{margin:0}"))
    assert parsed.tags.count("h1") == parsed.tags.count("title") == 1
    assert "".join(parsed.text).count('A <b> & "c"') == 2
    assert "b" not in parsed.tags


def test_both_settings_define_the_same_colours() -> None:
    text = page("x", "")
    light, dark = re.findall(r":root\{(.*?)\}", text)
    names = [set(re.findall(r"(--[\w-]+):", part)) for part in (light, dark)]
    assert names[0] == names[1] >= {"--paper", "--ink", "--series-0", "--series-6"}
    assert set(re.findall(r"var\((--[\w-]+)\)", text)) <= names[0]


def test_table_escapes_and_fills_short_rows() -> None:
    parsed = Parsed(table(["name", "n"], [["<i>", 1], ["x"]], caption="a & b"))
    assert parsed.tags.count("td") == 4 and "i" not in parsed.tags
    assert {"<i>", "1", "x", "a & b"} <= set(parsed.text)
    assert escape(1.5) == "1.5"
