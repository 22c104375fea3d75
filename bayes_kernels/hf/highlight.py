"""Texts whose uncertain tokens are marked, on a terminal and as HTML.

A token has a level from 0 to 5 by its mutual information, or by its entropy. The limits are fixed, so that
colours of different texts can be compared. Tokens without text, such as the first bytes of a character, are
shown with the next token that has some, at the highest of their levels.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..html import escape, page, table
from .texts import Generation, ScoredText, shown_together

if TYPE_CHECKING:
    from rich.text import Text

# Where levels 1 to 5 begin, nats.
LIMITS = {
    "mutual_information": (0.01, 0.03, 0.1, 0.3, 1.0),
    "entropy": (0.1, 0.5, 1.0, 2.0, 4.0),
}
WORDS = {"mutual_information": "mutual information", "entropy": "entropy"}

# Of levels 0 to 5, readable on light and dark terminals.
_TERMINAL = (
    "",
    "black on rgb(255,243,205)",
    "black on rgb(255,221,145)",
    "black on rgb(255,184,92)",
    "black on rgb(245,138,66)",
    "bold white on rgb(190,50,20)",
)
_LIGHT = ("transparent", "#fff3cd", "#ffdd91", "#ffb85c", "#f58a42", "#be3214")
_DARK = ("transparent", "#3b3116", "#5e4712", "#8a5a12", "#b8651a", "#f2763d")


def _style() -> str:
    def colours(values: Sequence[str], ink: str) -> str:
        return "".join(f"--level-{i}:{v};" for i, v in enumerate(values)) + f"--level-ink:{ink}"

    rules = [
        f":root{{{colours(_LIGHT, '#fff')}}}",
        f"@media (prefers-color-scheme:dark){{:root{{{colours(_DARK, '#14171b')}}}}}",
        ".text{white-space:pre-wrap;overflow-wrap:anywhere;font-size:1.1rem;line-height:1.9;"
        "background:var(--panel);border:1px solid var(--line);border-radius:.5rem;padding:.75rem 1rem}",
        ".prompt{color:var(--quiet)}",
        ".t{border-radius:.2rem;padding:.15rem 0}",
        ".t:hover{outline:2px solid var(--strong)}",
        # In a corner of the window, where it is whole for tokens at the edges too.
        ".t:hover::after{content:attr(data-n);position:fixed;left:1rem;bottom:1rem;z-index:1;white-space:pre;"
        "font-size:.85rem;line-height:1.4;font-weight:400;"
        "text-decoration:none;padding:.4rem .6rem;border-radius:.4rem;background:var(--ink);"
        "color:var(--paper)}",
        ".end{color:var(--quiet);font-size:.8em}",
        ".legend{display:flex;flex-wrap:wrap;gap:.25rem .75rem;align-items:center;margin:.75rem 0}",
        ".legend .t{padding:.1rem .5rem}",
        ".by{position:absolute;opacity:0}.by+label{cursor:pointer;padding:.2rem .7rem;margin-right:.4rem;"
        "border:1px solid var(--line);border-radius:1rem;color:var(--quiet)}",
        ".by:checked+label{border-color:var(--strong);color:var(--ink);font-weight:600}",
        ".by:focus-visible+label{outline:2px solid var(--strong)}",
        ".badge{border:1px solid var(--strong);border-radius:.3rem;padding:0 .4rem;font-size:.8rem;"
        "color:var(--strong)}",
        ".legend.entropy{display:none}#by-entropy:checked~.legend.entropy{display:flex}"
        "#by-entropy:checked~.legend.mutual_information{display:none}",
    ]
    for level in range(1, 6):
        line = "text-decoration:underline;text-underline-offset:.2em;" if level > 3 else ""
        ink = "color:var(--level-ink);" if level == 5 else ""
        where = f"#by-mutual_information:checked~div .m{level},#by-entropy:checked~div .e{level}"
        rules.append(f"{where}{{background:var(--level-{level});{line}{ink}}}")
    return "".join(rules)


def level_of(value: float, by: str) -> int:
    """The level from 0 to 5 of an uncertainty in nats.

    Args:
        value: mutual information or entropy.
        by: which it is, a key of `LIMITS`.
    """
    return bisect_right(LIMITS[by], value)


def highest_level(values: Sequence[float], by: str) -> int:
    """The level of tokens that are shown as one; NaN is the highest."""
    return max(level_of(value, by) for value in values)


def measure_of(text: ScoredText, by: str | None = None) -> str:
    """What tokens of a text are coloured by: `by`, or mutual information where there are draws.

    Raises:
        ValueError: there is no such measure of this text.
    """
    if by is None:
        return "entropy" if text.mutual_information is None else "mutual_information"
    if by not in LIMITS or (by == "mutual_information" and text.mutual_information is None):
        raise ValueError(
            f"by: must be 'entropy', or 'mutual_information' for at least two draws, got {by!r} with "
            f"{text.n_samples} draws"
        )
    return by


def _measured(text: ScoredText, by: str) -> list[float]:
    return list(getattr(text, by))


def terminal_text(text: ScoredText, by: str | None = None) -> Text:
    """A text for rich's console, with a background for uncertain tokens.

    Control characters, which a terminal would obey, are replaced.

    Args:
        text: the text.
        by: "mutual_information" or "entropy"; None for the first where there are draws.
    """
    from rich.text import Text

    by = measure_of(text, by)
    shown, values = Text(), _measured(text, by)
    groups = shown_together(text.tokens)
    if len(groups) > 1 and not text.tokens[-1]:  # an end has no place of its own here
        groups[-2:] = [groups[-2] + groups[-1]]
    for group in groups:
        piece = "".join(text.tokens[i] for i in group)
        shown.append_text(terminal_token(piece, [values[i] for i in group], by))
    return shown


def terminal_token(piece: str, values: Sequence[float], by: str) -> Text:
    """What `terminal_text` shows as one.

    Args:
        piece: what it adds to the text.
        values: uncertainty of its token, and of those without text that are shown with it, nats.
        by: which it is, a key of `LIMITS`.
    """
    from rich.text import Text

    return Text(printable(piece), style=_TERMINAL[highest_level(values, by)])


def terminal_legend(by: str) -> Text:
    """What the colours of `terminal_text` stand for, on one line."""
    from rich.text import Text

    shown = Text(f"{WORDS[by]}, nats: ")
    for level, limit in enumerate(LIMITS[by], start=1):
        shown.append(f" ≥ {limit:g} ", style=_TERMINAL[level])
        shown.append(" ")
    return shown


def printable(text: str) -> str:
    """A text without characters that a terminal obeys, line breaks and tabs apart."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


def html_text(text: ScoredText) -> str:
    """A text as an element of `html_page`: tokens with their numbers, which the style sheet colours."""
    doubts = text.mutual_information
    parts = []
    if isinstance(text, Generation):
        parts.append(f'<span class="prompt">{escape(text.prompt)}</span>')
    for group in shown_together(text.tokens):
        levels = f"t e{highest_level([text.entropy[i] for i in group], 'entropy')}"
        if doubts is not None:
            level = highest_level([doubts[i] for i in group], "mutual_information")
            levels += f" m{level}"
        lines = _numbers(text, doubts, group[0])
        if len(group) > 1:
            lines = [
                f"token {place} of {len(group)}: {', '.join(_numbers(text, doubts, i))}"
                for place, i in enumerate(group, start=1)
            ]
        piece, note = text.tokens[group[-1]], escape("\n".join(lines))
        if piece:
            parts.append(f'<span class="{levels}" data-n="{note}">{escape(piece)}</span>')
        else:
            parts.append(f'<span class="{levels} end" data-n="{note}"> [end]</span>')
    return f'<div class="text">{"".join(parts)}</div>'


def _numbers(text: ScoredText, doubts: Sequence[float] | None, i: int) -> list[str]:
    """What the note of a token says, with the mutual information of all tokens where there are draws."""
    found = [
        f"probability {math.exp(text.log_probs[i]):.3g}",
        f"entropy {text.entropy[i]:.3g} nats",
    ]
    if doubts is not None:
        found += [f"expected entropy {text.expected_entropy[i]:.3g} nats"]
        found += [f"mutual information {doubts[i]:.3g} nats"]
    return found


def _legend(by: str) -> str:
    limits = LIMITS[by]
    letter = by[0]
    swatches = [f'<span class="t {letter}0">&lt; {limits[0]:g}</span>']
    for level, limit in enumerate(limits, start=1):
        swatches.append(f'<span class="t {letter}{level}">≥ {limit:g}</span>')
    return f'<div class="legend {by}">{WORDS[by]}, nats: {"".join(swatches)}</div>'


_COLUMNS = (
    ("tokens", lambda text: str(len(text.token_ids))),
    ("mean log p", lambda text: f"{text.mean_log_prob:.3f}"),
    ("perplexity", lambda text: f"{text.perplexity:.2f}"),
    ("max entropy", lambda text: f"{text.max_entropy:.3f}"),
    ("max MI", lambda text: _number(text.max_mutual_information)),
    ("mean MI", lambda text: _number(text.mean_mutual_information)),
)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def html_body(texts: Sequence[ScoredText]) -> tuple[str, str]:
    """(HTML of texts with coloured tokens, its rules for the style sheet), for a page of `html.page`."""
    drawn = all(text.mutual_information is not None for text in texts)
    measures = ["mutual_information", "entropy"] if drawn else ["entropy"]
    parts = []
    for by in measures:
        checked = " checked" if by == measures[0] else ""
        parts.append(f'<input class="by" type="radio" name="by" id="by-{by}"{checked}>')
        parts.append(f'<label for="by-{by}">{WORDS[by]}</label>')
    parts += [_legend(by) for by in measures]
    rows = [
        [f"{i}", *(column(text) for _, column in _COLUMNS)] for i, text in enumerate(texts, start=1)
    ]
    headings = ["text", *(name for name, _ in _COLUMNS)]
    caption = (
        "Means and maxima over the tokens of a text, nats. p: probability, MI: mutual information."
    )
    parts.append("<div>" + table(headings, rows, caption=caption))
    for i, text in enumerate(texts, start=1):
        abstained = isinstance(text, Generation) and text.abstained
        badge = ' <span class="badge">abstained</span>' if abstained else ""
        parts.append(f"<h2>{i}{badge}</h2>{html_text(text)}")
    parts.append("</div>")
    return "\n".join(parts), _style()


def html_page(texts: Sequence[ScoredText], title: str = "Generated text") -> str:
    """A self-contained page of texts whose tokens are coloured by mutual information or entropy.

    Numbers of a token show where the pointer is. Light and dark follow the reader's setting.

    Args:
        texts: what `generate` or `score_texts` returned.
        title: heading of the page.

    Returns:
        The file's content, for `bayes_kernels.files.write_text`.
    """
    how = f"{texts[0].n_samples} draws of the weights" if texts[0].n_samples else "posterior mean"
    body, style = html_body(texts)
    head = f'<p class="quiet">{escape(how)}. Point at a token for its numbers.</p>\n'
    return page(title, head + body, style=style)
