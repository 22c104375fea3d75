"""The command that writes plain LoRA folders of a trained adapter."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .generate import folder_of, open_writer
from .options import (
    Debug,
    Device,
    DrawSeed,
    OtherBase,
    Overwrite,
    Samples,
    Threads,
    WrittenAdapter,
    start,
)
from .output import status

if TYPE_CHECKING:
    from torch import nn


def export(
    adapter: WrittenAdapter,
    out: Annotated[
        Path | None, typer.Option(help="Folder to write; ADAPTER-draws or ADAPTER-mean by default.")
    ] = None,
    n_samples: Samples = None,
    seed: DrawSeed = None,
    model: OtherBase = None,
    overwrite: Overwrite = False,
    threads: Threads = None,
    device: Device = "cpu",
    debug: Debug = False,
) -> None:
    """Write draws of an adapter's weights, or their mean, as plain LoRA that servers load.

    Folders draw-0, draw-1, ... have the draws that predict and generate use; with --n-samples 0 the folder
    has the mean.
    """
    from ..hf.checkpoints import export_draws, export_lora
    from ..hf.checks import CONFIG_NAME, read_json
    from ..hf.tasks.record import read_members

    folder = folder_of(adapter)
    if read_members(folder):
        raise ValueError(
            f"adapter {adapter!r}: expected one with draws of its weights, got an ensemble, whose members "
            "are plain LoRA already"
        )
    plain = read_json(folder / CONFIG_NAME).get("peft_type") == "LORA"
    if out is not None:
        _check_out(out, folder, overwrite)
    start(threads, device)
    loaded, count, own_seed = _opened(adapter, folder, model, device)
    count = count if n_samples is None else n_samples
    seed = own_seed if seed is None else seed
    if not count and plain:
        raise ValueError(
            f"adapter {adapter!r}: expected a Bayesian one, got plain LoRA already; use the folder as it is"
        )
    if out is None:
        name = f"{folder.resolve().name}-{'draws' if count else 'mean'}"
        out = folder.parent / name if folder.name else folder.resolve().with_name(name)
        _check_out(out, folder, overwrite)
    with status(f"writing {out}"):
        if count:
            export_draws(loaded, out, count, seed=seed)
        else:
            export_lora(loaded, out)
    what = f"{count} draws (draw-0, ...)" if count else "the mean"
    print(f"Wrote {what} as plain LoRA to {out}/. How to serve it: docs/serving.md")


def _check_out(out: Path, folder: Path, overwrite: bool) -> None:
    """Whether a folder may be written."""
    # Not `Path.resolve`, which raises where links lead round.
    place, source = (Path(os.path.realpath(path)) for path in (out, folder))
    if place == source or place in source.parents or source in place.parents:
        raise ValueError(f"--out: expected a folder apart from the adapter's, got {str(out)!r}")
    if os.path.lexists(out) and not overwrite:
        raise ValueError(f"--out: {str(out)!r} exists; use --overwrite, or another name")


def _opened(
    adapter: str, folder: Path, model: str | None, device: str
) -> tuple[nn.Module, int, int]:
    """The model, its default number of draws, and its seed."""
    from ..hf.checks import CONFIG_NAME, read_json
    from ..hf.tasks.load import load

    if read_json(folder / CONFIG_NAME).get("task_type") == "CAUSAL_LM":
        writer = open_writer(adapter, model, device)
        return writer.model, writer.n_samples, writer.seed
    with status(f"reading {adapter}"):
        saved = load(folder, model=model, device=device)
    most = saved.method.text_samples  # of Laplace, whose predictions have many more
    return saved.model, saved.n_samples if most is None else min(saved.n_samples, most), saved.seed
