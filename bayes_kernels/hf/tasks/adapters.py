"""Saved adapters on their base models."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from ...quantization import QUANTIZATIONS, quantization_config
from ...task import Task
from ..checkpoints import read_lora
from ..method import METHODS
from .encoder import TaskEncoder
from .models import load_language_model, load_model

_ALLOWED: dict[str, tuple[str | None, ...]] = {
    "kind": ("auto", "causal", "classifier", "multiple_choice"),
    "style": ("blob", "laplace", "plain"),
    "dtype": ("float32", "bfloat16", "float16"),
    "quantization": (None, *QUANTIZATIONS),
}
# numpy, which the trainer seeds as well, takes no others.
_SEEDS = 2**32


@dataclass(frozen=True)
class Base:
    """A base model, as commands name it.

    Attributes:
        model: What `load_model` takes: a word, a folder, or a name on the hub.
        kind, style: Kind of model and style of prompt, see `load_model`.
        dtype: "float32", "bfloat16" or "float16": type of its weights.
        quantization: A word of `bayes_kernels.quantization.QUANTIZATIONS`; None for none.
        seed: Seed of a new head.
        compat: Whether prompts are those of the published code to the letter, see `load_model`.

    Raises:
        ValueError: One of them is something else.
    """

    model: str
    kind: str = "auto"
    style: str = "blob"
    dtype: str = "float32"
    quantization: str | None = None
    seed: int = 0
    compat: bool = False

    def __post_init__(self) -> None:
        for name, allowed in _ALLOWED.items():
            value = getattr(self, name)
            if not isinstance(value, str | None) or value not in allowed:
                words = ", ".join(str(word) for word in allowed if word)
                raise ValueError(f"{name}: expected one of {words}, got {value!r}")
        if not isinstance(self.model, str) or not self.model:
            raise ValueError(f"model: expected a folder or a name, got {self.model!r}")
        seed = self.seed
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < _SEEDS:
            raise ValueError(f"seed: expected an integer from 0 to {_SEEDS - 1}, got {seed!r}")
        if not isinstance(self.compat, bool):
            raise ValueError(f"compat: expected true or false, got {self.compat!r}")

    def _options(self, device: str | None) -> dict[str, Any]:
        """Options of `from_pretrained`."""
        options: dict[str, Any] = {"dtype": getattr(torch, self.dtype)}
        if self.dtype != "float32" and pick_device(device).type == "cpu":
            # The backward pass of torch's fused attention is slow there: 17 ms for (8, 12, 32, 32) in
            # bfloat16 on one core with AMX, the formula written out 2.3 ms (level at 512 tokens).
            options["attn_implementation"] = "eager"
        if self.quantization is not None:
            options["quantization_config"] = quantization_config(
                self.quantization, options["dtype"]
            )
        return options

    def load(
        self, task: Task, max_length: int | None = None, device: str | None = None
    ) -> tuple[Any, TaskEncoder]:
        """The model, and the encoder of its input.

        Raises:
            ValueError, ImportError, OSError: As `load_model`.
        """
        return load_model(
            self.model,
            task,
            kind=self.kind,  # type: ignore[arg-type]
            style=self.style,  # type: ignore[arg-type]
            compat=self.compat,
            max_length=max_length,
            head_seed=self.seed,
            **self._options(device),
        )

    def load_language_model(self, device: str | None = None) -> tuple[Any, Any]:
        """The model with its whole head, which writes text, and its tokenizer.

        Raises:
            ValueError, ImportError, OSError: As `load_language_model`.
        """
        return load_language_model(self.model, **self._options(device))


def load_adapter(
    folder: str | Path,
    base: Base,
    task: Task,
    *,
    max_length: int | None = None,
    device: str | None = None,
) -> tuple[PeftModel, TaskEncoder]:
    """A trained adapter on its base model, in eval mode, and the encoder of its input.

    Args:
        folder: What `bayes-kernels train` or PEFT wrote, or a checkpoint.
        base: The base model.
        task: Classes of the model, and examples that show how many choices there are.
        max_length: That of training.
        device: "cpu", "cuda" or "auto".

    Raises:
        ValueError, ImportError, OSError: As `load_model`, or the adapter does not fit the model.
    """
    found, encoder = base.load(task, max_length, device)
    return with_adapter(found, folder, base, f"{task.n_classes} classes", device), encoder


def with_adapter(
    model: Any, folder: str | Path, base: Base, head: str, device: str | None
) -> PeftModel:
    """An adapter of a folder on its base model that is there, with the files of its method.

    Args:
        model: the base model.
        folder: As for `load_adapter`.
        base: What the model was loaded from.
        head: What its head is, in words, for the message about an adapter that does not fit.
        device: "cpu", "cuda" or "auto".

    Raises:
        ValueError: As `load_adapter`.
    """
    try:
        wrapped = read_lora(model, folder)
    except RuntimeError as error:  # torch's message lists every tensor that differs
        first = next((line for line in str(error).splitlines() if "mismatch" in line), str(error))
        raise ValueError(
            f"adapter {str(folder)!r}: expected tensors that fit {base.model!r} with {head}, got "
            f"{first.strip()}"
        ) from None
    wrapped = on_device(wrapped, device).eval()
    for method in METHODS.values():
        if method.stored(Path(folder)):
            method.load(wrapped, Path(folder))
    return wrapped


def on_device(model: PeftModel, device: str | None) -> PeftModel:
    """The model on a device; quantised bases stay where they were loaded and refuse to move."""
    target = pick_device(device)
    quantised = getattr(model.get_base_model(), "hf_quantizer", None) is not None
    return model if quantised else model.to(target)


def pick_device(device: str | None = None) -> torch.device:
    """The device of a name; by default the GPU where there is one.

    Raises:
        ValueError: There is no such device.
    """
    if device in (None, "auto"):
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device: expected 'auto', 'cpu' or 'cuda', got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: 'cuda' needs a GPU that torch can use, got none; use 'cpu'")
    return torch.device(device)
