"""Pages are whole, need nothing from elsewhere, and show text as text."""

from __future__ import annotations

import html.parser
import re

from bayes_kernels.html import escape, page, table

VOID = {"meta", "br", "img", "hr", "link", "input"}


class Parsed(html.parser.HTMLParser):
    """The tags, text and attributes of a page, whose tags are closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.text: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def check_self_contained(text: str) -> Parsed:
    """Parse a page that asks for nothing beside itself."""
    parsed = Parsed(text)
    assert not {"script", "link", "img", "iframe"} & set(parsed.tags)
    assert not [value for _, name, value in parsed.attributes if name in ("src", "href")]
    assert "url(" not in text and "@import" not in text
    return parsed


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
