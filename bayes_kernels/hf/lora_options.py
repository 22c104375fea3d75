"""Options of `peft.LoraConfig`: what PEFT does not check, or only after it has changed the model."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from typing import Any

from peft import LoftQConfig
from peft.tuners.lora.config import LoraRuntimeConfig
from torch import nn

from ._compat import KEEPS_BIASES

# Heads that PEFT adds to `modules_to_save` of classifiers by itself, of which a model has one.
_HEADS = ("classifier", "score")
_BIASES = ("none", "all", "lora_only")
_FLAGS = ("fan_in_fan_out", "use_rslora")


def check_lora_options(where: str, options: Mapping[str, Any]) -> None:
    """Whether options of LoRA are of the right kind, as far as that can be said without a model.

    Args:
        where: what a message starts with.
        options: those of `peft.LoraConfig`, by name; what is left out has PEFT's default.

    Raises:
        ValueError: one is not; the message has its name, what is expected, and what was given.
    """
    for name, (fits, expected) in _KINDS.items():
        value = options.get(name)
        if value is not None and not fits(value):
            raise ValueError(f"{where}: {name} must be {expected}, got {value!r}")
    for name in ("target_modules", "exclude_modules"):
        value = options.get(name)
        if isinstance(value, str) and not _is_expression(value):
            raise ValueError(f"{where}: {name} must be a regular expression, got {value!r}")
    check_ranks_and_scales(where, options)


def check_on_model(where: str, options: Mapping[str, Any], model: nn.Module) -> None:
    """Whether a model has what options of LoRA name, where PEFT is silent or fails halfway.

    Args:
        where: what a message starts with.
        options: as for `check_lora_options`, which they have passed.
        model: the base model.

    Raises:
        ValueError: it has not.
    """
    modules = dict(model.named_modules())
    saved = options.get("modules_to_save") or ()
    missing = [
        name for name in saved if name not in _HEADS and not any(m.endswith(name) for m in modules)
    ]
    if missing:
        raise ValueError(
            f"{where}: modules_to_save must have names of modules of the model, got {', '.join(missing)}"
        )
    layers = options.get("layers_to_transform")
    wanted = {layers} if isinstance(layers, int) else {*(layers or ())}
    there = {int(part) for name in modules for part in name.split(".") if part.isdigit()}
    if wanted - there and not options.get("layer_replication"):
        raise ValueError(
            f"{where}: layers_to_transform must have numbers of layers of the model, got "
            f"{sorted(wanted - there)}; {_numbers(there)}"
        )
    tokens = options.get("trainable_token_indices")
    if isinstance(tokens, Mapping):
        tables = {name: [m for n, m in modules.items() if n.endswith(name)] for name in tokens}
    else:
        get = getattr(model, "get_input_embeddings", None)
        tables = {"": [get()] if tokens and get is not None else []}
        tokens = {"": tokens or ()}
    for name, found in tables.items():
        rows = [len(table.weight) for table in found if isinstance(table, nn.Embedding)]
        if rows and max(tokens[name]) >= min(rows):
            raise ValueError(
                f"{where}: trainable_token_indices must be below {min(rows)}, the rows of the "
                f"embedding, got {max(tokens[name])}"
            )
    if options.get("init_lora_weights") == "lora_ga" and not any(
        hasattr(module, "_peft_loraga_grad") for module in modules.values()
    ):
        raise ValueError(
            f"{where}: init_lora_weights='lora_ga' needs gradients of the model, got none: PEFT would take "
            "its usual values; call preprocess_loraga before"
        )


def check_ranks_and_scales(where: str, options: Mapping[str, Any]) -> None:
    """Whether ranks and scales of LoRA, for all layers and for some, are ones; PEFT does not check.

    Args:
        where: what a message starts with.
        options: those of `peft.LoraConfig`, by name; what is left out has PEFT's default.

    Raises:
        ValueError: a pattern is no mapping of names or expressions, a rank is no integer of at least 1,
            or a scale no finite number.
    """
    scales = {
        "lora_alpha": options.get("lora_alpha", 8),
        **_pattern(where, options, "alpha_pattern"),
    }
    for name, value in scales.items():
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not math.isfinite(value):
            raise ValueError(f"{where}: {name} must be a finite number, got {value!r}")
    ranks = {"r": options.get("r", 8), **_pattern(where, options, "rank_pattern")}
    for name, value in ranks.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{where}: {name} must be a rank of at least 1, got {value!r}")


def _pattern(where: str, options: Mapping[str, Any], name: str) -> dict[str, Any]:
    """What some layers have instead, by what a message calls it."""
    found = options.get(name)
    found = {} if found is None else found
    if not isinstance(found, Mapping) or not all(isinstance(key, str) for key in found):
        what = "ranks" if name == "rank_pattern" else "scales"
        raise ValueError(
            f"{where}: {name} must be a mapping of names of layers to {what}, got {found!r}"
        )
    for key in found:
        try:
            re.compile(key)
        except re.error as error:
            raise ValueError(
                f"{where}: {name} must have names of layers or regular expressions, got {key!r} ({error})"
            ) from None
    return {f"{name}[{key!r}]": value for key, value in found.items()}


def _is_expression(text: str) -> bool:
    try:
        re.compile(text)
    except re.error:
        return False
    return True


def _numbers(there: Collection[int]) -> str:
    return f"it has {min(there)} to {max(there)}" if there else "it has none"


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _are_numbers(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and all(map(_is_number, value))


def _are_names(value: Any) -> bool:
    return isinstance(value, (list, tuple, set)) and all(isinstance(one, str) for one in value)


def _are_tokens(value: Any) -> bool:
    if not isinstance(value, Mapping):
        return _are_numbers(value)
    return _are_names(list(value)) and all(map(_are_numbers, value.values()))


def _are_ranges(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(
        _are_numbers(one) and len(one) == 2 and one[0] < one[1] for one in value
    )


def _is_first_value(value: Any) -> bool:
    if isinstance(value, str) and value.startswith("pissa_niter_"):
        return value.removeprefix("pissa_niter_").isdecimal()
    return isinstance(value, (bool, str))


_TEXT_OR_NAMES = (
    lambda value: isinstance(value, str) or _are_names(value),
    "a text or a list of names",
)

# By option: whether a value is of its kind, and what a message says of it.
_KINDS: dict[str, tuple[Any, str]] = {
    **dict.fromkeys(("modules_to_save", "target_parameters"), (_are_names, "a list of names")),
    **dict.fromkeys(("target_modules", "exclude_modules", "layers_pattern"), _TEXT_OR_NAMES),
    **{name: (lambda value: isinstance(value, bool), "true or false") for name in _FLAGS},
    "lora_dropout": (
        lambda value: isinstance(value, (int, float)) and 0 <= value < 1,
        "a number in [0, 1)",
    ),
    "layers_to_transform": (
        lambda value: _is_number(value) or _are_numbers(value),
        "the number of a layer, from 0, or a list of some",
    ),
    "bias": (lambda value: value in _BIASES, f"one of {_BIASES}")
    if KEEPS_BIASES
    else (
        lambda value: value == "none",
        f"one of {_BIASES}, and 'none' with PEFT below 0.21, which does not load trained biases",
    ),
    "init_lora_weights": (
        _is_first_value,
        "true, false or a word that peft.LoraConfig names, such as 'gaussian' or 'pissa_niter_4'",
    ),
    "trainable_token_indices": (
        _are_tokens,
        "a list of token ids, or a mapping of names of embeddings to such lists",
    ),
    "layer_replication": (_are_ranges, "a list of pairs of layers [first, end], first < end"),
    "loftq_config": (
        lambda value: isinstance(value, (dict, LoftQConfig)),
        "a mapping or a peft.LoftQConfig",
    ),
    "runtime_config": (
        lambda value: isinstance(value, LoraRuntimeConfig),
        "a LoraRuntimeConfig of peft",
    ),
}

__all__ = ["check_lora_options", "check_on_model", "check_ranks_and_scales"]
