"""Reads pages as a browser would, and sees that they are whole."""

from __future__ import annotations

import html.parser

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
