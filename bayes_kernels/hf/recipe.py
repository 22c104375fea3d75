"""What is run: data, model, method, recipe and seed.

An :class:`Experiment` says everything about one run and goes to and from JSON.

Methods share everything but the method: with the same seed plain LoRA and BLoB start from the same
head and the same factors, see the same examples in the same order, and use the same optimiser,
learning rate, batch size and number of steps. (PoLAR has other factors, and a rate of its own.)
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .config import METHODS
from .tasks import HUB_DATASETS, Example, Task, choose_subset, load_task

# Version of experiment.json and metrics.json.
FORMAT = 1


@dataclass(frozen=True)
class Recipe:
    """How an adapter is trained: the defaults of every command, in this one place.

    Attributes:
        rank, alpha: r and alpha of LoRA; the update is alpha / r times B A.
        target_modules: Names of the adapted layers; None for PEFT's choice for the model's type
            (query and value projections).
        dropout: Dropout before the adapter; None for the method's default: 0.1 for MC dropout, which
            also predicts with it, else 0.
        base_dropout: Dropout inside the base model; None leaves it as the checkpoint says.
        lr: Peak learning rate of AdamW, for adapter and head; None for the method's default.
        steps: Optimiser steps.
        batch_size: Examples of one step.
        accumulation: Micro-batches that a step is divided into.
        warmup: Share of the steps with rising learning rate; it then falls linearly to 0.
        weight_decay, adam_epsilon, max_grad_norm: Of AdamW; a norm of 0 does not clip.
        max_length: Largest number of tokens; None for what `load_model` chooses.
        n_samples: Posterior draws of a prediction; None for the method's default.
        eval_batch_size: Examples of one batch in prediction.
        prior_std, init_rho, scope, kl_schedule, kl_lr, kl_time, kl_gamma, kl_direction, covariance:
            Of `BayesLoraConfig`; None for the method's defaults.
        stiefel, stiefel_penalty, head_covariance, head_prior_scale, head_lr, kl_weight, alternation:
            Of `BayesLoraConfig`, for PoLAR and PoLAR-VBLL; None for its defaults.
        laplace: Whether the covariances of PoLAR-VBLL are refined after training.
        convert: Options of `bayesianize`, for methods that convert plain LoRA; `anchors` is the
            number of training examples that it looks at.
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
    weight_decay: float = 0.0
    adam_epsilon: float = 1e-6
    max_grad_norm: float = 0.0
    max_length: int | None = None
    n_samples: int | None = None
    eval_batch_size: int = 16
    prior_std: float | None = None
    init_rho: float | None = None
    scope: str | None = None
    kl_schedule: str | None = None
    kl_lr: float | None = None
    kl_time: float | None = None
    kl_gamma: float | None = None
    kl_direction: str | None = None
    covariance: str | None = None
    stiefel: str | None = None
    stiefel_penalty: float | None = None
    head_covariance: str | None = None
    head_prior_scale: float | None = None
    head_lr: float | None = None
    kl_weight: float | None = None
    alternation: str | None = None
    laplace: bool = False
    convert: dict[str, Any] = field(default_factory=dict)
    lora: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.target_modules, list):
            object.__setattr__(self, "target_modules", tuple(self.target_modules))
        for name in ("rank", "steps", "batch_size", "accumulation", "eval_batch_size"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"recipe: {name} must be an integer >= 1, got {value!r}")
        draws = self.n_samples
        if draws is not None and (isinstance(draws, bool) or draws < 0):
            raise ValueError(f"recipe: n_samples must be an integer >= 0, got {draws!r}")
        if self.lr is not None and not (self.lr > 0 and math.isfinite(self.lr)):
            raise ValueError(f"recipe: lr must be a positive number, got {self.lr!r}")
        for name in ("warmup", "dropout", "base_dropout"):
            share = getattr(self, name)
            if share is not None and not 0 <= share < 1:
                raise ValueError(f"recipe: {name} must be in [0, 1), got {share!r}")
        if self.batch_size % self.accumulation:
            raise ValueError(
                f"recipe: batch_size must be a multiple of accumulation, got {self.batch_size} and "
                f"{self.accumulation}"
            )


# What `demo` trains: docstrings are short.
DEMO = Recipe(max_length=32)


@dataclass(frozen=True)
class Source:
    """Where a task comes from: the arguments of `load_task`.

    Attributes:
        data: "stdlib-docs", a name of the hub, or a JSONL file or folder.
        test: A JSONL file of test examples, for files only.
        ood: Out-of-distribution sets: JSONL files, or names for data of the hub; None for the sets
            that the task itself brings.
        train_size: Number of training examples; None for the task's default, 0 for all.
        test_size, ood_size: Largest number of test examples, and of examples of each
            out-of-distribution set, chosen by hash; None for all.
        label_names: Names of the classes, for files only.
    """

    data: str = "stdlib-docs"
    test: str | None = None
    ood: tuple[str, ...] | None = None
    train_size: int | None = None
    test_size: int | None = None
    ood_size: int | None = None
    label_names: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("ood", "label_names"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))

    def load(self, seed: int = 0) -> Task:
        """The task, with the training examples that the seed chooses.

        Raises:
            ValueError: The data is missing or malformed, or an option does not go with it.
            ImportError, ConnectionError: As `load_task`.
        """
        options: dict[str, Any] = {"seed": seed}
        if self.train_size is not None:
            options["train_size"] = self.train_size or None
        is_file = os.path.exists(self.data)
        for name in ("test", "label_names"):
            if getattr(self, name) is not None:
                if not is_file:
                    raise ValueError(
                        f"{name.replace('_', '-')}: expected data of your own beside it, got "
                        f"{self.data!r}, which is not an existing file or folder; leave it out"
                    )
                options[name] = getattr(self, name)
        if self.ood is not None:
            if not is_file and self.data not in HUB_DATASETS:
                raise ValueError(
                    f"ood: expected data of your own or of the hub beside it, got {self.data!r}, "
                    "which brings its own; leave it out"
                )
            options["ood"] = self.ood
        task = load_task(self.data, **options)
        return dataclasses.replace(
            task,
            test=_at_most(task.test, self.test_size),
            ood={name: _at_most(examples, self.ood_size) for name, examples in task.ood.items()},
        )


def _at_most(examples: list[Example], size: int | None) -> list[Example]:
    return examples if size is None or size >= len(examples) else choose_subset(examples, size)


@dataclass(frozen=True)
class Experiment:
    """One run: data, model, method, recipe and seed.

    Attributes:
        source: The data.
        model: What `load_model` takes: "minilm", a folder, or a name on the hub.
        kind, style: Kind of model and style of prompt, see `load_model`.
        dtype: "float32", "bfloat16" or "float16": type of the base model's weights.
        quantization: "8bit" or "4bit" for a base quantised by bitsandbytes, else None.
        method: A name of `bayes_kernels.hf.config.METHODS`: "map" (plain LoRA), "blob", ...
        recipe: How it is trained.
        seed: Seed of the training subset, head, factors, order of examples, and noise.
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

    def __post_init__(self) -> None:
        for name, allowed in (
            ("method", METHODS),
            ("dtype", ("float32", "bfloat16", "float16")),
            ("quantization", (None, "8bit", "4bit")),
        ):
            if getattr(self, name) not in allowed:
                words = ", ".join(str(word) for word in allowed if word)
                raise ValueError(f"{name}: expected one of {words}, got {getattr(self, name)!r}")
        if self.method == "dropout" and self.dropout == 0:
            raise ValueError("dropout: expected a rate above 0 for MC dropout, got 0")
        if self.recipe.laplace and self.method != "polar-vbll":
            raise ValueError(f"laplace: expected method polar-vbll with it, got {self.method!r}")
        if self.recipe.convert and METHODS[self.method].made != "convert":
            words = ", ".join(name for name, row in METHODS.items() if row.made == "convert")
            raise ValueError(f"convert: expected method {words} with it, got {self.method!r}")

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
            return cls(
                **{
                    **fields,
                    "source": Source(**fields.get("source", {})),
                    "recipe": Recipe(**fields.get("recipe", {})),
                }
            )
        except TypeError as error:
            raise ValueError(f"experiment: a field does not fit this version: {error}") from None


# --- Files ---------------------------------------------------------------------------------------


def write_json(path: Path, content: Any) -> None:
    """Write JSON; readers see the old file or the whole new one."""
    write_text(path, json.dumps(_finite(content), indent=2, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file; readers see the old one or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
