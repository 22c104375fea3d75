"""A saved adapter that writes text."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open
from torch import nn

from ..checkpoints import stored_method
from ..checks import CONFIG_NAME, PREFIX, read_json, tensor_names
from ..generate import Prompt, generate, score_texts
from ..logits import Prediction
from ..method import METHODS, Method
from ..noise import DRAW_SCOPES, KINDS
from ..texts import Generation, ScoredText
from ..tokens import score_answers
from .adapters import Base, pick_device, with_adapter
from .load import base_of, method_of
from .record import read_members, read_record, readable


@dataclasses.dataclass(frozen=True)
class SavedWriter:
    """A trained adapter on its base model with the whole head, and its tokenizer.

    Attributes:
        model: A model that `bayes_kernels.hf.generate` takes: a PeftModel, or an `Ensemble`.
        tokenizer: Its tokenizer.
        base: The base model.
        method: The row of the table of methods.
        n_samples: Default number of posterior draws; 0 for one set of weights. At most 10 for a Laplace
            posterior, each of whose draws is an adapter.
        seed: Default seed of the draws.
        draws: Default of how draws hang together, see `bayes_kernels.hf.generate`.
    """

    model: nn.Module = dataclasses.field(repr=False)
    tokenizer: Any = dataclasses.field(repr=False)
    base: Base
    method: Method = dataclasses.field(repr=False)
    n_samples: int
    seed: int
    draws: str = KINDS[0]

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        n_samples: int | None = None,
        seed: int | None = None,
        draws: str | None = None,
        **options: Any,
    ) -> list[Generation]:
        """As `bayes_kernels.hf.generate`, with the draws and the seed of the run by default.

        Raises:
            ValueError: As there, or `draws` is for methods with draws of another kind.
        """
        chosen = self._chosen(n_samples, seed, draws)
        return generate(self.model, self.tokenizer, prompts, **chosen, **options)

    def score(
        self,
        texts: str | Sequence[str],
        *,
        prompts: str | Sequence[str] | None = None,
        n_samples: int | None = None,
        seed: int | None = None,
        draws: str | None = None,
        progress: bool = False,
    ) -> list[ScoredText]:
        """As `bayes_kernels.hf.score_texts`, with the draws and the seed of the run by default.

        Raises:
            ValueError: As there, or `draws` is for methods with draws of another kind.
        """
        chosen = self._chosen(n_samples, seed, draws)
        return score_texts(
            self.model, self.tokenizer, texts, prompts=prompts, progress=progress, **chosen
        )

    def choose(
        self,
        prompts: str | Sequence[str],
        answers: Sequence[str],
        *,
        n_samples: int | None = None,
        seed: int | None = None,
        draws: str | None = None,
        progress: bool = False,
    ) -> Prediction:
        """As `bayes_kernels.hf.score_answers`, with the draws and the seed of the run by default.

        Raises:
            ValueError: As there, or `draws` is for methods with draws of another kind.
        """
        chosen = self._chosen(n_samples, seed, draws)
        return score_answers(
            self.model, self.tokenizer, prompts, answers, progress=progress, **chosen
        )

    def _chosen(self, n_samples: int | None, seed: int | None, draws: str | None) -> dict[str, Any]:
        self.method.check_draws(KINDS[0] if draws is None else draws, DRAW_SCOPES[0])
        return {
            "n_samples": self.n_samples if n_samples is None else n_samples,
            "seed": self.seed if seed is None else seed,
            "draws": self.draws if draws is None else draws,
        }


def load_writer(
    folder: str | os.PathLike[str], *, model: str | None = None, device: str | None = None
) -> SavedWriter:
    """A trained adapter on its base model with the whole head, ready to continue prompts.

    An adapter that was trained on answers to questions keeps only their rows of the head; here it is on the
    whole model again. Not so where it has changed the head: that writes no text.

        text = load_writer("runs/demo/blob").generate("The answer is")[0]
        text.text, text.mutual_information

    Args:
        folder: What `bayes-kernels train`, or PEFT, wrote for a causal language model, or an ensemble of
            `compare`.
        model: Another base model than the recorded one, such as its new place.
        device: "cpu", "cuda" or "auto", which takes the GPU where there is one.

    Raises:
        ValueError: The folder has no adapter, or its base model does not write text, or the adapter's head is
            one of answers; files are damaged.
        ImportError, OSError: The base model is not installed or cannot be reached.
    """
    pick_device(device)
    folders = read_members(folder) or [Path(folder)]
    settings = [_settings(one, model) for one in folders]
    base, method, count, seed, kind = settings[0]
    loaded, tokenizers = [], []
    for one, (place, *_) in zip(folders, settings, strict=True):
        found, tokenizer = place.load_language_model(device)
        _check_head(found, one, place)
        words = "the head of a language model"
        loaded.append(with_adapter(found, one, place, words, device))
        tokenizers.append(tokenizer)
    whole: nn.Module = loaded[0]
    if len(folders) > 1:
        (method,) = (one for one in METHODS.values() if one.join is not None)
        assert method.join is not None
        whole, count = method.join(loaded, folders), len(folders)
    if not method.bayesian:
        count = 0
    return SavedWriter(whole, tokenizers[0], base, method, count, seed, kind)


def _check_head(model: Any, folder: Path, base: Base) -> None:
    """Whether the head of an adapter, if it has changed it, is that of a language model.

    Raises:
        ValueError: It is one of the answers that it was trained for.
    """
    record, head = read_record(folder), model.get_output_embeddings()
    if record is None or head is None:
        return
    name = next(name for name, module in model.named_modules() if module is head)
    file = folder / SAFETENSORS_WEIGHTS_NAME
    ours = {f"{PREFIX}{name}.{part}" for part in ("weight", "lora_B.weight")}
    for key in ours.intersection(tensor_names(file)):
        with safe_open(file, framework="pt") as tensors:
            rows = tensors.get_slice(key).get_shape()[0]
        if rows == record.task.n_classes != head.weight.shape[0]:
            raise ValueError(
                f"adapter {str(folder)!r}: expected the whole head of {base.model!r}, got one that was "
                f"trained for {rows} answers: it writes no text; use predict, or train without {name} in "
                "target_modules and lora.modules_to_save"
            )


def _settings(folder: Path, model: str | None) -> tuple[Base, Method, int, int, str]:
    """Base model, method, number of draws, seed and kind of draws; what PEFT wrote says less."""
    record = read_record(folder)
    if record is None:
        name = model or read_json(folder / CONFIG_NAME).get("base_model_name_or_path")
        if not name:
            raise ValueError(
                f"adapter {str(folder)!r}: expected the name of a base model in it, found none; give model"
            )
        rows = (row for row in METHODS.values() if row.stored(folder))
        method = next(rows, None) or METHODS[stored_method(folder)]
        return Base(name), method, _draws(method, None), 0, KINDS[0]
    with readable(folder):
        base, method = base_of(record), method_of(record)
        experiment = record.fields["experiment"]
        recipe, seed = experiment["recipe"], experiment["seed"]
        count, kind = recipe["n_samples"], recipe.get("draws") or KINDS[0]
    if model is not None:
        base = dataclasses.replace(base, model=model)
    return base, method, _draws(method, count), seed, kind


def _draws(method: Method, count: int | None) -> int:
    """Default draws of a text, where predictions have so many."""
    count = method.n_samples if count is None else count
    return count if method.text_samples is None else min(count, method.text_samples)
