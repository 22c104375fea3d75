"""The command that writes text with a trained adapter."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..table import shorten
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
    given,
    number,
    start,
    whole,
)
from .output import note, print_json, status

if TYPE_CHECKING:
    from rich.console import Console

    from ..hf.tasks.writer import SavedWriter
    from ..hf.texts import Generation, Token


def generate(
    adapter: WrittenAdapter,
    prompt: Annotated[
        list[str] | None, typer.Option(help="Text to continue; may be repeated.")
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            help="Prompts: text, one a line; or JSONL, each with 'prompt', or 'messages' of a conversation."
        ),
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Prompts are messages to the model's chat template.")
    ] = False,
    n_samples: Samples = None,
    draws: Draws = None,
    max_new_tokens: Annotated[int, whole("Largest number of new tokens.", least=1)] = 64,
    sample: Annotated[
        bool, typer.Option("--sample", help="Draw tokens; by default the likeliest is taken.")
    ] = False,
    temperature: Annotated[float | None, number("Temperature of --sample.")] = None,
    top_p: Annotated[float | None, number("Nucleus of --sample.")] = None,
    top_k: Annotated[int | None, whole("Likeliest tokens that --sample has.", least=0)] = None,
    beams: Annotated[int, whole("Beams of a beam search.", least=1)] = 1,
    stop: Annotated[
        list[str] | None, typer.Option(help="Text that ends a text; may be repeated.")
    ] = None,
    abstain_above: Annotated[
        float | None,
        number(
            "Mark texts with a token of more mutual information (without draws: entropy), nats."
        ),
    ] = None,
    color_by: ColorBy = None,
    model: OtherBase = None,
    batch_size: Annotated[int, whole("Prompts of a batch.", least=1)] = 8,
    seed: DrawSeed = None,
    stream: Annotated[
        bool, typer.Option("--stream", help="Write tokens as they are chosen, one behind.")
    ] = False,
    json_lines: TokenLines = False,
    html: TokenPage = None,
    overwrite: Overwrite = False,
    threads: Threads = None,
    device: Device = "auto",
    debug: Debug = False,
) -> None:
    """Continue prompts with several draws of the weights, and mark the tokens they disagree about.

    All draws choose each token together, by their mean probabilities. Mutual information (nats) is the part
    of a token's uncertainty that stems from the adapter's posterior; entropy is all of it.
    """
    from ..files import write_text
    from ..hf.highlight import html_page

    prompts = [*(prompt or ()), *([] if file is None else read_prompts(file))]
    if not prompts:
        raise ValueError("generate: expected --prompt or --file, got neither")
    warped = given(temperature=temperature, top_p=top_p, top_k=top_k)
    if warped and not sample:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in warped)
        raise ValueError(f"generate: expected --sample with {names}, got none")
    if temperature is not None and not temperature > 0:
        raise ValueError(f"--temperature: expected a number above 0, got {temperature}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"--top-p: expected a number above 0 and at most 1, got {top_p}")
    if stream and (json_lines or beams > 1):
        got = "--json" if json_lines else f"--beams {beams}"
        raise ValueError(f"--stream: expected it without --json and --beams, got {got}")
    check_unicode("--prompt: ", *(prompt or ()))
    check_unicode("--stop: ", *(stop or ()))
    check_color(color_by)
    if html is not None:
        check_page(html, overwrite, {"adapter": Path(adapter), "file": file})
    start(threads, device)
    writer = open_writer(adapter, model, device)
    count = writer.n_samples if n_samples is None else n_samples
    check_color(color_by, count)
    live = _Live(color_by or ("mutual_information" if count > 1 else "entropy"))
    found = writer.generate(
        prompts,
        n_samples=n_samples,
        seed=seed,
        draws=draws,
        max_new_tokens=max_new_tokens,
        do_sample=sample,
        num_beams=beams,
        stop_strings=stop or None,
        chat=True if chat else None,
        abstain_above=abstain_above,
        batch_size=1 if stream else batch_size,
        progress=not stream,
        streamer=live.add if stream else None,
        **warped,
    )
    if html is not None:
        write_text(html, html_page(found, f"{writer.method.title}, {Path(writer.base.model).name}"))
    if json_lines:
        for text in found:
            print_json(text.to_dict())
    else:
        if stream:
            live.end()
        _show(found, color_by, live if stream else None)
    if html is not None:
        note(f"Wrote {html}")


def folder_of(adapter: str) -> Path:
    """The folder of an adapter or of an ensemble: as given, or the only one in it.

    Raises:
        ValueError: there is none, or a stopped run, which goes on elsewhere.
    """
    from ..experiment import folders
    from ..hf.checks import CONFIG_NAME
    from ..hf.tasks.record import read_members

    folder = Path(adapter)
    inside = [] if (folder / CONFIG_NAME).exists() else list(folder.glob(f"*/{CONFIG_NAME}"))
    if not read_members(folder):
        folder = inside[0].parent if len(inside) == 1 else folder
        folders.read_record(folder)  # which also says where a stopped run goes on
    return folder


def open_writer(adapter: str, model: str | None, device: str) -> SavedWriter:
    """An adapter on its base model with the whole head.

    Raises:
        ValueError, ImportError, OSError: As `load_writer`.
    """
    from ..hf.tasks.writer import load_writer

    folder = folder_of(adapter)
    with status(f"reading {adapter}"):
        return load_writer(folder, model=model, device=device)


def check_color(color_by: str | None, count: int | None = None) -> None:
    """Whether tokens can be coloured by this, with so many draws where they are known.

    Raises:
        ValueError: They cannot.
    """
    from ..hf.highlight import LIMITS

    if color_by is not None and color_by not in LIMITS:
        raise ValueError(f"--color-by: expected {' or '.join(LIMITS)}, got {color_by!r}")
    if color_by == "mutual_information" and count is not None and count < 2:
        raise ValueError(f"--color-by: expected entropy with {count} draws, got {color_by}")


def read_prompts(path: Path, of: Callable[[object], Any] | None = None) -> list[Any]:
    """Prompts of a file: lines of text, or what `of` makes of JSON objects.

    Args:
        path: the file.
        of: one object, to what it stands for; by default prompts and conversations.

    Raises:
        ValueError: it is no file of prompts; all bad lines are named.
    """
    of = of or _prompt_of
    from ..files import lines_of

    if not path.is_file():
        raise ValueError(f"file {str(path)!r}: expected a file that exists, found none")
    try:
        lines = lines_of(path.read_bytes())
    except UnicodeDecodeError as error:
        raise ValueError(
            f"file {str(path)!r}: expected UTF-8 text, got {error.reason} at byte {error.start}"
        ) from None
    rows = [(place, line) for place, line in enumerate(lines, start=1) if line.strip()]
    if not rows:
        raise ValueError(f"file {str(path)!r}: expected at least one prompt, got none")
    if path.suffix not in (".jsonl", ".json"):
        return [line for _, line in rows]
    found, wrong = [], []
    for place, line in rows:
        try:
            row = json.loads(line)
            check_unicode("", json.dumps(row, ensure_ascii=False))
            found.append(of(row))
        except json.JSONDecodeError as error:
            wrong.append(f"{path}:{place}: expected JSON, got {error.msg} at column {error.colno}")
        except (ValueError, RecursionError) as error:
            wrong.append(f"{path}:{place}: {error}")
    if wrong:
        raise ValueError("\n".join(wrong[:10]))
    return found


def check_unicode(what: str, *texts: str) -> None:
    """Whether a tokenizer takes texts: words of a command can be bytes, and JSON escapes half a character.

    Raises:
        ValueError: one has a lone surrogate.
    """
    from ..experiment.data.rows import is_unicode

    for text in texts:
        if not is_unicode(text):
            raise ValueError(
                f"{what}expected Unicode text, got a lone surrogate in {shorten(ascii(text))}"
            )


def _prompt_of(row: object) -> Any:
    """The prompt of one object.

    Raises:
        ValueError: it has none.
    """
    if isinstance(row, dict):
        text, messages = row.get("prompt"), row.get("messages")
        if isinstance(text, str) and text:
            return text
        keys = ("role", "content")
        if isinstance(messages, list) and messages:
            if all(
                isinstance(m, dict) and all(isinstance(m.get(k), str) for k in keys)
                for m in messages
            ):
                return messages
    raise ValueError(
        "expected an object with 'prompt', a text, or 'messages', a list of objects with 'role' and "
        f"'content', got {shorten(json.dumps(row))}"
    )


def check_page(page: Path, overwrite: bool, inputs: dict[str, Path | None]) -> None:
    """Whether a page may be written."""
    if page.is_dir() or not page.name:
        raise ValueError(f"--html: expected a file, got the folder {str(page)!r}")
    for what, path in inputs.items():
        if path is not None and path.exists() and page.exists() and page.samefile(path):
            raise ValueError(f"--html: expected a file apart from {what}, got {str(page)!r}")
    if page.exists() and not overwrite:
        raise ValueError(f"--html: {str(page)!r} exists; use --overwrite, or another name")


class _Live:
    """Writes tokens of one text after the other as they are chosen.

    What `terminal_text` shows as one is written as one: when the next token with text is there, or the end.

    Args:
        by: what colours them.
    """

    def __init__(self, by: str) -> None:
        self.by, self.sequence = by, -1
        self.piece = ""  # not written yet
        self.values: list[float] = []  # of its tokens
        self.after: list[float] = []  # of those without text since then

    def add(self, token: Token) -> None:
        """The next token."""
        if token.sequence != self.sequence:
            self.end()
            self.sequence = token.sequence
        self.after.append(getattr(token, self.by))
        if token.text:
            self._write()
            self.piece, self.values, self.after = token.text, self.after, []

    def end(self) -> None:
        """The end of a text."""
        if self.sequence >= 0:
            self.values += self.after
            self._write()
            self.piece, self.values, self.after = "", [], []
            print(flush=True)

    def _write(self) -> None:
        from ..hf.highlight import terminal_token

        if self.piece:
            _console().print(terminal_token(self.piece, self.values, self.by), end="")
            sys.stdout.flush()


def _console() -> Console:
    from rich.console import Console

    return Console(highlight=False, soft_wrap=True)


def _show(texts: list[Generation], by: str | None, live: _Live | None) -> None:
    """Texts on the terminal, with their scores; without the texts where these were written live."""
    from rich.text import Text

    from ..hf.highlight import measure_of, printable, terminal_legend, terminal_text

    console = _console()
    for text in texts:
        if live is None:
            console.print(Text(printable(text.prompt), style="dim") + terminal_text(text, by))
        scores = (
            f"mean log-probability {text.mean_log_prob:.3f}, max entropy {text.max_entropy:.3f}"
        )
        if text.max_mutual_information is not None:
            scores += f", max mutual information {text.max_mutual_information:.3f}"
        if text.abstained:
            scores += f"; abstained: {text.abstain_on} above {text.abstain_above:g}"
        console.print(Text(f"[{scores}]", style="italic"))
    console.print(terminal_legend(measure_of(texts[0], by)))
