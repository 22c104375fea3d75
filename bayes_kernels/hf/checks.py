"""Whether an adapter folder is whole, before anything is made of it.

PEFT takes a tensor that is missing for one that keeps its first value, and a layer that the
configuration does not name for one that is not there: a damaged file then predicts, with other numbers.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from transformers.trainer import TRAINER_STATE_NAME

from ._compat import PEFT_TYPE_NAME
from .config import DEFAULT_METHOD
from .lora_options import check_ranks_and_scales
from .method import METHODS
from .variants import VARIANTS, extra_names

CONFIG_NAME = "adapter_config.json"
RECORD_NAME = "experiment.json"
PREFIX = "base_model.model."
_FACTORS = (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B"))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ValueError: the file holds something else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected a JSON object, got {error}; copy it again") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(found).__name__}")
    return found


def is_bayesian_folder(folder: str | os.PathLike[str]) -> bool:
    """Whether a local folder holds an adapter of type BAYES_LORA."""
    path = Path(folder) / CONFIG_NAME
    return path.is_file() and read_json(path).get("peft_type") == PEFT_TYPE_NAME


def tensor_names(file: Path) -> list[str]:
    """Names of the tensors in a safetensors file.

    Raises:
        ValueError: it is none, or cut off.
    """
    with _opened(file) as tensors:
        return list(tensors.keys())


def _opened(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        size = file.stat().st_size if file.is_file() else 0
        raise ValueError(
            f"{file}: expected a whole safetensors file, got {size} bytes that are none ({error}); "
            "copy it again"
        ) from None


def check_folder(folder: str | os.PathLike[str]) -> None:
    """Raise where a local adapter folder is damaged; costs one pass over its tensors.

    Every layer must have both factors and all tensors of the method, every tensor must be
    floating-point and finite, every layer must be one that the configuration names, scales must be
    finite, and the record of training, where there is one, must name the same method.

    Raises:
        ValueError: it is damaged; the message names the file and the key.
    """
    folder = Path(folder)
    config = read_json(folder / CONFIG_NAME)
    check_ranks_and_scales(str(folder / CONFIG_NAME), config)
    _check_record(folder, config)
    file = folder / SAFETENSORS_WEIGHTS_NAME
    if not file.is_file():
        return  # another format, or none yet: what reads it says so
    with _opened(file) as tensors:
        keys = list(tensors.keys())
        for key in keys:
            _check_tensor(file, key, tensors.get_tensor(key))
    _check_layers(folder, config, keys)


def layer_of(key: str) -> str:
    """Module name in the base model of a tensor of an adapter; "" for other tensors."""
    layer, mark, _ = key.rpartition(".lora_")
    while layer.startswith(PREFIX):
        layer = layer[len(PREFIX) :]
    return layer if mark else ""


def _check_record(folder: Path, config: Mapping[str, Any]) -> None:
    path = folder / RECORD_NAME
    if not path.is_file():
        return
    experiment = read_json(path).get("experiment")
    method = METHODS.get(experiment.get("method", "")) if isinstance(experiment, dict) else None
    if method is None:
        return  # its own reader judges it
    bayesian = config.get("peft_type") == PEFT_TYPE_NAME
    kind = config.get("method", DEFAULT_METHOD) if bayesian else "plain LoRA"
    # In a checkpoint the conversion is still to come.
    training = (folder / TRAINER_STATE_NAME).is_file()
    plain = method.plain or (method.made == "convert" and training)
    expected = "plain LoRA" if plain else method.name
    if kind != expected:
        raise ValueError(
            f"{folder / CONFIG_NAME}: expected {expected}, as {RECORD_NAME} says method "
            f"{method.name!r}, got {kind}; the two files must be from one folder"
        )
    for name in () if training else method.files:
        if not (folder / name).is_file():
            raise ValueError(
                f"{folder / name}: expected the posterior, as {RECORD_NAME} says method "
                f"{method.name!r}, found no file; copy it too, or bayesianize again"
            )


def _check_tensor(file: Path, key: str, tensor: torch.Tensor) -> None:
    if not tensor.is_floating_point():
        if ".lora_" in key:
            raise ValueError(
                f"{file}: {key} must be floating-point, got {tensor.dtype}; save the adapter again"
            )
    elif not bool(torch.isfinite(tensor).all()):
        what = "NaN" if bool(torch.isnan(tensor).any()) else "infinity"
        raise ValueError(
            f"{file}: {key} must be finite, got {what}; use a checkpoint from before it diverged"
        )


def _check_layers(folder: Path, config: Mapping[str, Any], keys: Sequence[str]) -> None:
    file = folder / SAFETENSORS_WEIGHTS_NAME
    layers: dict[str, set[str]] = {}
    rest = []
    for key in keys:
        layer = layer_of(key)
        if layer:
            names = layers.setdefault(layer, set())
            names.add("lora_" + key.rpartition(".lora_")[2].removesuffix(".weight"))
        else:
            rest.append(key)
    if not layers:
        raise ValueError(f"{file}: expected tensors lora_A and lora_B, got {len(rest)} others only")
    bayesian = config.get("peft_type") == PEFT_TYPE_NAME
    method = config.get("method", DEFAULT_METHOD)
    if bayesian and method not in VARIANTS:
        raise ValueError(
            f"{folder / CONFIG_NAME}: method must be one of {tuple(VARIANTS)}, got {method!r}"
        )
    # bayesian-peft calls its adapters LORA: what one layer has beside the factors, all must have.
    shared = set().union(*layers.values()) & extra_names()
    extra = set(VARIANTS[method].tensors(config)) if bayesian else shared
    for layer, found in layers.items():
        pairs = [pair for pair in _FACTORS if found & set(pair)] or [_FACTORS[0]]
        missing = sorted(({name for pair in pairs for name in pair} | extra) - found)
        if missing:
            what = f" of method {method!r}" if bayesian else ""
            raise ValueError(
                f"{file}: expected {missing[0]}{what} for layer {layer}, found none; the file is not "
                "whole, or adapter_config.json belongs to another adapter"
            )
        foreign = sorted(found & extra_names() - extra)
        if foreign:
            raise ValueError(
                f"{file}: expected no {foreign[0]} for layer {layer}, as adapter_config.json says "
                f"method {method!r}; the two files must be from one folder"
            )
        if not _targeted(config, layer):
            raise ValueError(
                f"{folder / CONFIG_NAME}: target_modules must name every layer of "
                f"{SAFETENSORS_WEIGHTS_NAME}, got {config.get('target_modules')!r} without {layer}"
            )
    saved = config.get("modules_to_save") or []
    published = any(key.startswith(PREFIX * 2) for key in keys)  # which leaves them out
    if (
        saved
        and not published
        and not any(f".{name}." in f".{key}" for key in rest for name in saved)
    ):
        raise ValueError(
            f"{file}: expected the tensors of modules_to_save {sorted(saved)}, found none: the "
            "classifier is missing; save the adapter again with it"
        )


def _targeted(config: Mapping[str, Any], layer: str) -> bool:
    targets = config.get("target_modules")
    if targets is None or targets == "all-linear" or config.get("target_parameters"):
        return True
    if isinstance(targets, str):
        return re.fullmatch(targets, layer) is not None
    return any(f".{layer}".endswith(f".{name}") for name in targets)


__all__ = [
    "CONFIG_NAME",
    "PREFIX",
    "check_folder",
    "is_bayesian_folder",
    "layer_of",
    "read_json",
    "tensor_names",
]
