"""Self-contained HTML pages: one file without scripts, fonts or links to elsewhere, light and dark.

Pages follow the reader's setting of light or dark. Colours are variables of the style sheet
(``--paper``, ``--ink``, ``--quiet``, ``--line``, ``--panel``, ``--strong``, and ``--series-0`` to
``--series-6`` for curves), so that pictures in SVG that name them change with the page.
"""

from __future__ import annotations

import html
from collections.abc import Sequence

__all__ = ["escape", "page", "table"]

# Okabe and Ito's palette, told apart under every common colour blindness; lighter on dark paper.
_LIGHT = ("#0072b2", "#c04a00", "#00805d", "#b0467f", "#a66f00", "#2f8fc4", "#1b1f24")
_DARK = ("#5ab4ee", "#ff9a57", "#3fcf9f", "#ea9cc8", "#f0b840", "#9bd3f7", "#e6e9ed")


def _series(colors: Sequence[str]) -> str:
    return "".join(f"--series-{i}:{color};" for i, color in enumerate(colors))


_PAPER = (
    "--paper:#fff;--ink:#1b1f24;--quiet:#59636e;--line:#d8dee4;--panel:#f5f7f9;--strong:#0063a0;"
)
_NIGHT = (
    "--paper:#14171b;--ink:#e6e9ed;--quiet:#9aa4af;--line:#333a42;--panel:#1d2227;--strong:#7cc0f5;"
)
_STYLE = f"""
:root{{color-scheme:light dark;{_PAPER}{_series(_LIGHT)}}}
@media (prefers-color-scheme:dark){{:root{{{_NIGHT}{_series(_DARK)}}}}}
*{{box-sizing:border-box}}
body{{margin:0 auto;max-width:70rem;padding:1.5rem 1rem 4rem;background:var(--paper);color:var(--ink);
font:1rem/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Liberation Sans",sans-serif}}
h1{{font-size:1.7rem;line-height:1.25;margin:.5rem 0}}h2{{font-size:1.2rem;margin:2.5rem 0 .5rem}}
p{{margin:.5rem 0;max-width:48rem}}a{{color:var(--strong)}}
.quiet,figcaption,caption{{color:var(--quiet);font-size:.9rem}}
.wide{{overflow-x:auto}}
table{{border-collapse:collapse;font-size:.92rem;font-variant-numeric:tabular-nums}}
caption{{text-align:left;padding:1rem 0 .3rem;max-width:calc(100vw - 2rem)}}
th,td{{padding:.3rem .6rem;border-bottom:1px solid var(--line);text-align:right;vertical-align:top}}
th{{border-bottom-width:2px;white-space:nowrap}}
.left{{text-align:left}}
td.left:first-child{{white-space:nowrap}}
figure{{margin:0;padding:.75rem;background:var(--panel);border:1px solid var(--line);border-radius:.5rem}}
svg{{display:block;width:100%;height:auto}}
.grid{{display:grid;gap:1rem;grid-template-columns:repeat(auto-fit,minmax(min(24rem,100%),1fr))}}
pre{{background:var(--panel);border:1px solid var(--line);border-radius:.5rem;padding:.75rem;overflow-x:auto}}
""".replace("\n", "")


def escape(text: object) -> str:
    """Text as it stands between tags and in quoted attributes."""
    return html.escape(str(text), quote=True)


def page(title: str, body: str, *, style: str = "") -> str:
    """A whole page.

    Args:
        title: Plain text, the page's heading too.
        body: HTML below the heading.
        style: More rules for the style sheet.

    Returns:
        The file's content, for `bayes_kernels.files.write_text`.
    """
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}{style}</style>\n</head>\n"
        f"<body>\n<h1>{escape(title)}</h1>\n{body}\n</body>\n</html>\n"
    )


def table(
    headings: Sequence[object],
    rows: Sequence[Sequence[object]],
    *,
    left: int = 1,
    caption: str = "",
) -> str:
    """A table that scrolls on narrow screens; cells are plain text.

    Args:
        headings: Of all columns.
        rows: Cells; a row may be short.
        left: How many columns are words, from the left; the others are numbers.
        caption: Plain text above it.
    """

    def line(tag: str, cells: Sequence[object]) -> str:
        parts = []
        for i, cell in enumerate(cells):
            side = ' class="left"' if i < left else ""
            parts.append(f"<{tag}{side}>{escape(cell)}</{tag}>")
        return f"<tr>{''.join(parts)}</tr>"

    above = f"<caption>{escape(caption)}</caption>" if caption else ""
    body = "\n".join(line("td", [*row, *[""] * (len(headings) - len(row))]) for row in rows)
    return (
        f'<div class="wide"><table>{above}\n<thead>{line("th", headings)}</thead>\n'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )
