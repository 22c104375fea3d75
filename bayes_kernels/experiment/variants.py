"""Rows of a comparison that are a method with other settings, or made of another adapter than plain LoRA."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from ..hf.method import METHODS, PLAIN
from .recipe import Experiment


class Variant(NamedTuple):
    """A row of a comparison.

    Attributes:
        title: Its name in tables.
        method: A name of `bayes_kernels.hf.method.METHODS`.
        options: Options of the method, over those of the recipe.
        recipe: Other fields of the recipe.
        source: The method whose adapter is converted, or scored in another way where it is the row's own.
    """

    title: str
    method: str
    options: Mapping[str, Any] = {}
    recipe: Mapping[str, Any] = {}
    source: str = PLAIN


# The word of an ensemble of the adapters that plain LoRA had on its way. Source: Chen, Lundberg and Lee,
# "Checkpoint Ensembles: Ensemble Methods from a Single Training Process", arXiv 1710.03282.
CHECKPOINTS = "checkpoints"

# By the word that `compare --methods` takes.
VARIANTS: dict[str, Variant] = {
    CHECKPOINTS: Variant("Checkpoint ensemble", "ensemble"),
    "tfb-on-map": Variant("TFB on MAP", "tfb", source="map"),
    "tfb-on-blob": Variant("TFB on BLoB's mean", "tfb", source="blob"),
    "blob-token": Variant("BLoB, token scope", "blob", {}, {"draw_scope": "token"}, "blob"),
    "blob-independent": Variant(
        "BLoB, independent draws", "blob", {}, {"draws": "independent"}, "blob"
    ),
    "blob-all-labels": Variant(
        "BLoB, validation rows too", "blob", {}, {"train_on_validation": True}
    ),
    "laplace-sum": Variant(
        "Laplace-LoRA, evidence, sum", "laplace", {"prior": "mackay", "tokens": "sum"}
    ),
    "laplace-expand": Variant(
        "Laplace-LoRA, evidence, 1/T", "laplace", {"prior": "mackay", "tokens": "expand"}
    ),
    "scalabl-code": Variant(
        "ScalaBL, code", "scalabl", {"kl_direction": "code", "kl_schedule": "published"}
    ),
    "polar-vbll-refined": Variant("PoLAR-VBLL, refined", "polar-vbll", {"refine": True}),
}


def snapshot_steps(steps: int) -> tuple[int, ...]:
    """Steps after which a checkpoint ensemble takes members, beside the last: half and three quarters."""
    return tuple(sorted({max(1, steps // 2), max(1, 3 * steps // 4)} - {steps}))


def method_of(word: str) -> str:
    """The method of a row: the word itself where it is one."""
    return VARIANTS[word].method if word in VARIANTS else word


def source_of(word: str) -> str | None:
    """The method whose adapter a row is made of; None for one that is trained for the row."""
    method, source = method_of(word), VARIANTS[word].source if word in VARIANTS else PLAIN
    return source if METHODS[method].made != "train" or source == method != PLAIN else None


def title_of(word: str) -> str:
    """What tables call a row."""
    return VARIANTS[word].title if word in VARIANTS else METHODS[word].title


def varied(experiment: Experiment, word: str) -> Experiment:
    """The experiment of a row's method with the options of the row."""
    if word not in VARIANTS:
        return experiment
    recipe = experiment.recipe
    changes = {"options": {**recipe.options, **VARIANTS[word].options}, **VARIANTS[word].recipe}
    return dataclasses.replace(experiment, recipe=dataclasses.replace(recipe, **changes))
