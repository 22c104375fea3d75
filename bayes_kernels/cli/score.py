"""The command that scores given texts with a trained adapter."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from ..table import shorten
from .generate import check_color, check_page, check_unicode, open_writer, read_prompts
from .options import (
    ColorBy,
    Debug,
    Device,
    Draws,
    DrawSeed,
    OtherBase,
    Overwrite,
    Samples,
    Threads,
    TokenLines,
    TokenPage,
    WrittenAdapter,
    start,
)
from .output import note, print_json

if TYPE_CHECKING:
    from ..hf.tasks.writer import SavedWriter
    from ..hf.texts import ScoredText


class _Given(NamedTuple):
    """A text, and what comes before it."""

    text: str
    prompt: str | None


def score(
    adapter: WrittenAdapter,
    text: Annotated[list[str] | None, typer.Option(help="Text; may be repeated.")] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            help="Texts: text, one a line; or JSONL, each with 'text', and 'prompt' if there is one."
        ),
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="What comes before every text.")] = None,
    answer: Annotated[
        list[str] | None,
        typer.Option(
            help="An answer, with its space: texts are then questions, and their answers' probabilities "
            "are wanted; at least two."
        ),
    ] = None,
    n_samples: Samples = None,
    draws: Draws = None,
    color_by: ColorBy = None,
    model: OtherBase = None,
    seed: DrawSeed = None,
    json_lines: TokenLines = False,
    html: TokenPage = None,
    overwrite: Overwrite = False,
    threads: Threads = None,
    device: Device = "auto",
    debug: Debug = False,
) -> None:
    """NLL, perplexity and mutual information of given texts, token by token; or of answers.

    NLL (nats a token) is of the mean over the draws. Mutual information (nats) is the part of a token's
    uncertainty that stems from the adapter's posterior; entropy is all of it.
    """
    given = [_Given(one, prompt) for one in text or ()]
    if file is not None:
        for row in read_prompts(file, _given_of):
            one = row if isinstance(row, _Given) else _Given(row, None)
            given.append(one._replace(prompt=prompt if one.prompt is None else one.prompt))
    if not given:
        raise ValueError("score: expected --text or --file, got neither")
    if any(not one.text for one in given):
        raise ValueError("--text: expected text, got nothing")
    if answer is not None and (html is not None or color_by is not None):
        got = "--html" if html is not None else "--color-by"
        raise ValueError(f"--answer: expected it without {got}, which is for tokens, got both")
    for name, words in (("text", text), ("prompt", prompt and [prompt]), ("answer", answer)):
        check_unicode(f"--{name}: ", *(words or ()))
    check_color(color_by)
    if html is not None:
        check_page(html, overwrite, {"adapter": Path(adapter), "file": file})
    from ..progress import progress_bar

    start(threads, device)
    writer = open_writer(adapter, model, device)
    count = writer.n_samples if n_samples is None else n_samples
    check_color(color_by, count)
    chosen: dict[str, Any] = {"n_samples": n_samples, "seed": seed, "draws": draws}
    if answer is not None:
        _answers(writer, given, answer, json_lines, **chosen)
        return
    found = []
    for one in progress_bar(True, given, desc="score", unit="text"):
        found += writer.score(one.text, prompts=one.prompt, **chosen)
    if html is not None:
        from ..files import write_text
        from ..hf.highlight import html_page

        title = f"{writer.method.title}, {Path(writer.base.model).name}"
        write_text(html, html_page(found, title))
    if json_lines:
        for one, scored in zip(given, found, strict=True):
            print_json({"prompt": one.prompt, **scored.to_dict()})
    else:
        _show(given, found, color_by)
    if html is not None:
        note(f"Wrote {html}")


def _answers(
    writer: SavedWriter,
    given: list[_Given],
    answers: list[str],
    json_lines: bool,
    **chosen: Any,
) -> None:
    """Probabilities of answers behind each text."""
    questions = [(one.prompt or "") + one.text for one in given]
    found = writer.choose(questions, answers, progress=True, **chosen)
    doubts = found.mutual_information.tolist() if found.n_samples > 1 else [None] * len(questions)
    rows = zip(questions, found.probs.tolist(), found.entropy.tolist(), doubts, strict=True)
    for question, probs, entropy, doubt in rows:
        best = max(range(len(answers)), key=probs.__getitem__)
        if json_lines:
            print_json(
                {
                    "prompt": question,
                    "answer": answers[best],
                    "probabilities": dict(zip(answers, probs, strict=True)),
                    "entropy": entropy,
                    "mutual_information": doubt,
                    "n_samples": found.n_samples,
                }
            )
            continue
        listed = ", ".join(f"{a!r} {p:.3f}" for a, p in zip(answers, probs, strict=True))
        more = "" if doubt is None else f", mutual information {doubt:.3f}"
        print(f"{shorten(question)}\n  {listed}; entropy {entropy:.3f}{more}")


def _given_of(row: object) -> _Given:
    """The text of one object of a file.

    Raises:
        ValueError: it has none.
    """
    if isinstance(row, dict):
        text, prompt = row.get("text"), row.get("prompt")
        if isinstance(text, str) and text and isinstance(prompt, str | None):
            return _Given(text, prompt)
    raise ValueError(
        "expected an object with 'text', a text, and a text as 'prompt' if there is one, got "
        f"{shorten(json.dumps(row))}"
    )


def _show(given: list[_Given], found: list[ScoredText], by: str | None) -> None:
    """Texts on the terminal, with their scores, and those of all tokens."""
    from rich.console import Console
    from rich.text import Text

    from ..hf.highlight import measure_of, printable, terminal_legend, terminal_text

    console = Console(highlight=False, soft_wrap=True)
    for one, scored in zip(given, found, strict=True):
        console.print(Text(printable(one.prompt or ""), style="dim") + terminal_text(scored, by))
        console.print(Text(f"[{_scores([scored])}]", style="italic"))
    console.print(terminal_legend(measure_of(found[0], by)))
    if len(found) > 1:
        console.print(f"all texts: {_scores(found)}")


def _scores(texts: list[ScoredText]) -> str:
    """Scores of all tokens of some texts."""
    from ..hf.texts import perplexity

    log_probs = [value for text in texts for value in text.log_probs]
    nll = -math.fsum(log_probs) / len(log_probs)
    shown = f"{len(log_probs)} tokens, NLL {nll:.3f}, perplexity {perplexity(nll):.4g}"
    doubts = [value for text in texts for value in text.mutual_information or ()]
    if doubts:
        mean = math.fsum(doubts) / len(doubts)
        shown += f", mutual information {mean:.3f} (largest {max(doubts):.3f})"
    return shown
