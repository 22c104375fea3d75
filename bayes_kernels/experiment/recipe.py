"""What is run: data, model, method, recipe and seed.

An :class:`Experiment` says everything about one run and goes to and from JSON.

Methods share everything but the method: with the same seed plain LoRA and BLoB start from the same
head and the same factors, see the same examples in the same order, and use the same optimiser,
learning rate, batch size and number of steps. (PoLAR has other factors, and a rate of its own.)
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..hf.method import METHODS, PLAIN
from ..hf.noise import DRAW_SCOPES, KINDS
from ..hf.tasks.adapters import Base
from ..task import Task
from .data.source import Source


def trained_method(experiment: Experiment) -> str:
    """What training makes: the method, or plain LoRA where the method converts that."""
    return experiment.method if METHODS[experiment.method].made == "train" else PLAIN


@dataclass(frozen=True)
class Recipe:
    """How an adapter is trained: the defaults of every command, in this one place.

    Attributes:
        rank, alpha: r and alpha of LoRA; the update is alpha / r times B A.
        target_modules: Names of the adapted layers; None for those of `TARGETS`, or PEFT's choice for the
            model's type (query and value projections).
        dropout: Dropout before the adapter; None for the method's default.
        base_dropout: Dropout inside the base model; None leaves it as the checkpoint says.
        lr: Peak learning rate of AdamW, for adapter and head; None for the method's default.
        steps: Optimiser steps.
        batch_size: Examples of one step.
        accumulation: Micro-batches that a step is divided into.
        warmup: Share of the steps with rising learning rate; it then falls linearly to 0.
        weight_decay: Of AdamW; None for the method's default.
        adam_epsilon, max_grad_norm: Of AdamW; a norm of 0 does not clip.
        max_length: Largest number of tokens; None for what `load_model` chooses.
        train_on_validation: Whether the validation examples are trained on as well, so that a method
            that chooses nothing on them sees as many labels as one that does; no temperature then.
        scale: What is done about the width of a posterior, on at most 200 validation examples:
            "guard", choose a factor on its deviations where its draws raise the NLL of its mean by more
            than chance, on 30 or more that no conversion chose on; "fit", choose one in any case; "keep",
            nothing. None for "guard".
        n_samples: Posterior draws of a prediction; None for the method's default.
        draws, draw_scope: How draws of weights hang together, and what has a draw of its own: `draws` and
            `scope` of `bayes_kernels.hf.predict`.
        eval_batch_size: Examples of one batch in prediction.
        keep_lower_layers: Bytes that outputs of the frozen layers below the first trained one may take, which
            are then computed once for each text, see `bayes_kernels.hf.KeptLayers`; 0 keeps none.
        options: Options of the method, as `bayes_kernels.hf.method.Method.options` lists them.
        lora: More options of `peft.LoraConfig`.

    Raises:
        ValueError: A number is out of range.
    """

    rank: int = 8
    alpha: float = 16
    target_modules: tuple[str, ...] | None = None
    dropout: float | None = None
    base_dropout: float | None = 0.0
    lr: float | None = None
    steps: int = 600
    batch_size: int = 8
    accumulation: int = 1
    warmup: float = 0.06
    weight_decay: float | None = None
    adam_epsilon: float = 1e-6
    max_grad_norm: float = 0.0
    max_length: int | None = None
    train_on_validation: bool = False
    scale: str | None = None
    n_samples: int | None = None
    draws: str = "antithetic"
    draw_scope: str = "example"
    eval_batch_size: int = 16
    keep_lower_layers: int = 0
    options: dict[str, Any] = field(default_factory=dict)
    lora: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.target_modules, list):
            object.__setattr__(self, "target_modules", tuple(self.target_modules))
        for name, (least, most) in _WHOLE.items():
            value = getattr(self, name)
            if value is None and name in _MAY_BE_NONE:
                continue
            whole = isinstance(value, int) and not isinstance(value, bool)
            if not whole or not least <= value <= most:
                limit = f" and <= {most}" if whole and value > most else ""
                raise ValueError(
                    f"recipe: {name} must be an integer >= {least}{limit}, got {value!r}"
                )
        for name, (accepts, words) in _NUMBERS.items():
            value = getattr(self, name)
            if value is None and name in _MAY_BE_NONE:
                continue
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not accepts(value):
                raise ValueError(f"recipe: {name} must be {words}, got {value!r}")
            if value > _LARGEST:
                raise ValueError(f"recipe: {name} must be a number of fp32, got {value!r}")
        if self.scale is not None and self.scale not in SCALES:
            raise ValueError(f"recipe: scale must be one of {SCALES}, got {self.scale!r}")
        if not isinstance(self.train_on_validation, bool):
            raise ValueError(
                "recipe: train_on_validation must be true or false, got "
                f"{self.train_on_validation!r}"
            )
        for name, allowed in _WORDS.items():
            if (value := getattr(self, name)) not in allowed:
                raise ValueError(f"recipe: {name} must be one of {allowed}, got {value!r}")
        targets = self.target_modules
        if targets is not None and not (
            isinstance(targets, tuple)
            and targets
            and all(isinstance(t, str) and t for t in targets)
        ):
            raise ValueError(f"recipe: target_modules must be a list of names, got {targets!r}")
        for name in ("options", "lora"):
            value = getattr(self, name)
            if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
                raise ValueError(f"recipe: {name} must be a table of options, got {value!r}")
        if self.batch_size % self.accumulation:
            raise ValueError(
                f"recipe: batch_size must be a multiple of accumulation, got {self.batch_size} and "
                f"{self.accumulation}"
            )


# What is done about the width of a posterior, see `Recipe.scale`.
SCALES = ("guard", "fit", "keep")
_ANY = 2**31 - 1
# torch takes no larger factor for weights in fp32.
_LARGEST = 3.4e38
_WHOLE = {
    "rank": (1, 2**16),
    "steps": (1, _ANY),
    "batch_size": (1, _ANY),
    "accumulation": (1, _ANY),
    "eval_batch_size": (1, _ANY),
    "max_length": (1, _ANY),
    "n_samples": (0, 1_000_000),
    "keep_lower_layers": (0, 2**60),
}
_POSITIVE = (lambda x: x > 0, "a positive number")
_NOT_NEGATIVE = (lambda x: x >= 0, "a number >= 0")
_SHARE = (lambda x: 0 <= x < 1, "in [0, 1)")
_NUMBERS: dict[str, tuple[Callable[[float], bool], str]] = {
    "alpha": _POSITIVE,
    "lr": _POSITIVE,
    "adam_epsilon": _POSITIVE,
    "weight_decay": _NOT_NEGATIVE,
    "max_grad_norm": _NOT_NEGATIVE,
    "warmup": _SHARE,
    "dropout": _SHARE,
    "base_dropout": _SHARE,
}
_WORDS = {"draws": KINDS, "draw_scope": DRAW_SCOPES}
_MAY_BE_NONE = ("max_length", "n_samples", "lr", "weight_decay", "dropout", "base_dropout")
# Fields of `peft.LoraConfig` that recipes set, under other names.
_OWN_LORA_OPTIONS = {
    "r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "target_modules": "target_modules",
}

# Layers that a recipe adapts which names none, by kind of model, where the model has all of them; else
# PEFT's. Beside query and value projections a small language model needs the outputs of both blocks:
# docs/fidelity.md has the validation scores.
TARGETS = {"causal": ("q_proj", "v_proj", "o_proj", "down_proj")}


@dataclass(frozen=True)
class Experiment:
    """One run: data, model, method, recipe and seed.

    Attributes:
        source: The data.
        model: What `load_model` takes: "minilm", "smollm2", a folder, or a name on the hub.
        kind, style: Kind of model and style of prompt, see `load_model`.
        dtype: "float32", "bfloat16" or "float16": type of the base model's weights.
        quantization: A word of `QUANTIZATIONS`, such as "8bit", for a quantised base; else None.
        method: A name of `bayes_kernels.hf.method.METHODS`: "mle" (plain LoRA), "blob", ...
        recipe: How it is trained.
        seed: Seed of the training subset, head, factors, order of examples, and noise.
        compat: Whether prompts are those of the published code to the letter, see `load_model`.
    """

    source: Source = field(default_factory=Source)
    model: str = "minilm"
    kind: str = "auto"
    style: str = "blob"
    dtype: str = "float32"
    quantization: str | None = None
    method: str = "blob"
    recipe: Recipe = field(default_factory=Recipe)
    seed: int = 0
    compat: bool = False

    def __post_init__(self) -> None:
        _ = self.base  # which checks what it is made of
        if not isinstance(self.method, str) or self.method not in METHODS:
            raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {self.method!r}")
        row = METHODS[self.method]
        if row.dropout and not self.dropout:
            raise ValueError(f"dropout: expected a rate above 0 for {row.title}, got 0")
        for name in self.recipe.options:
            if name not in row.options:
                having = [one.name for one in METHODS.values() if name in one.options]
                raise ValueError(
                    f"options: expected those of {self.method} ({', '.join(row.options) or 'none'}), "
                    f"got {name}" + (f", an option of {', '.join(having)}" if having else "")
                )

    def seen(self, task: Task) -> Task:
        """The task as the method is to see it, with the validation examples where the recipe puts them."""
        if not self.recipe.train_on_validation:
            return task
        known = [example for example in task.validation if example.label is not None]
        return dataclasses.replace(task, train=[*task.train, *known], validation=[])

    def check_options(self) -> None:
        """Whether the settings of the recipe go together and do something.

        A recipe that several methods share may have some that do not, so that this is a question of
        its own.

        Raises:
            ValueError: One does nothing with this method, or contradicts another.
        """
        recipe, row = self.recipe, METHODS[self.method]
        if recipe.n_samples and not row.bayesian:
            raise ValueError(
                f"n-samples: expected 0 for {self.method!r}, which has no posterior to draw from, "
                f"got {recipe.n_samples}; leave it out"
            )
        row.check_draws(recipe.draws, recipe.draw_scope)
        if self.lr * self.weight_decay >= 1:
            raise ValueError(
                f"weight-decay: expected lr times weight decay below 1, which leaves something of a "
                f"weight, got {self.lr:g} times {self.weight_decay:g}"
            )
        for option in row.training_options:  # others are checked where they are used
            value = recipe.options.get(option.name, option.default)
            if type(value) is not type(option.default):
                raise ValueError(f"{option.name}: expected {option.type}, got {value!r}")
        for name in recipe.options:
            for other, values in row.options[name].needs.items():
                value = recipe.options.get(other, row.options[other].default)
                if value not in values:
                    words = " or ".join(str(word) for word in values)
                    raise ValueError(
                        f"{name}: expected {other} {words} with it, got {value!r}, which does not "
                        "use it"
                    )
        for name in recipe.lora:
            if name in _OWN_LORA_OPTIONS:
                raise ValueError(
                    f"lora: expected options that have no name of their own here, got {name}; use "
                    f"{_OWN_LORA_OPTIONS[name]}"
                )

    @property
    def base(self) -> Base:
        """The base model, with the head that the seed draws."""
        return Base(
            self.model,
            self.kind,
            self.style,
            self.dtype,
            self.quantization,
            self.seed,
            self.compat,
        )

    @property
    def training_options(self) -> dict[str, Any]:
        """Those options of the recipe that `Method.after_training` takes."""
        names = [option.name for option in METHODS[self.method].training_options]
        return {name: self.recipe.options[name] for name in names if name in self.recipe.options}

    @property
    def n_samples(self) -> int:
        """Posterior draws of a prediction: what the recipe says, or the method's default."""
        draws = self.recipe.n_samples
        return METHODS[self.method].n_samples if draws is None else draws

    @property
    def dropout(self) -> float:
        """Dropout before the adapter: what the recipe says, or the method's default."""
        rate = self.recipe.dropout
        return METHODS[self.method].dropout if rate is None else rate

    @property
    def scale(self) -> str:
        """What is done about the width of the posterior: what the recipe says, or "guard"."""
        return self.recipe.scale or SCALES[0]

    @property
    def weight_decay(self) -> float:
        """Weight decay of AdamW: what the recipe says, or the method's default."""
        decay = self.recipe.weight_decay
        return METHODS[self.method].weight_decay if decay is None else decay

    @property
    def lr(self) -> float:
        """Peak learning rate: what the recipe says, or the method's default."""
        return METHODS[self.method].lr if self.recipe.lr is None else self.recipe.lr

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, words, lists and dictionaries."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Experiment:
        """The inverse of `to_dict`.

        Raises:
            ValueError: A field is unknown or of the wrong kind.
        """
        try:
            if not isinstance(fields, Mapping):
                raise TypeError(f"expected a table, got {fields!r}")
            return cls(
                **{
                    **fields,
                    "source": Source(**fields.get("source", {})),
                    "recipe": Recipe(**fields.get("recipe", {})),
                }
            )
        except TypeError as error:
            raise ValueError(f"experiment: a field does not fit this version: {error}") from None
