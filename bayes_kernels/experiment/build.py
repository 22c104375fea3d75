"""A new adapter on its base model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from transformers.pytorch_utils import Conv1D

from ..hf.experts import unmatched_parameters
from ..hf.lora_options import check_lora_options, check_on_model
from ..hf.method import METHODS
from ..hf.tasks.adapters import on_device
from ..hf.tasks.encoder import TaskEncoder
from ..task import Task
from .convert import conversion_options
from .recipe import TARGETS, Experiment, trained_method


def adapter_config(experiment: Experiment, model: Any, kind: str) -> LoraConfig:
    """The PEFT configuration of an experiment's method for a model of some kind.

    Raises:
        ValueError: An option is unknown, out of range, or does not go with the method.
    """
    options = _config_options(experiment)
    options.setdefault("task_type", {"causal": "CAUSAL_LM", "classifier": "SEQ_CLS"}.get(kind))
    options["target_modules"] = options["target_modules"] or _default_targets(model, kind)
    if kind == "multiple_choice":
        ends = {name.rpartition(".")[2] for name, _ in model.named_modules()}
        heads = sorted(ends & {"classifier", "logits_proj", "score"})
        options["modules_to_save"] = options.get("modules_to_save") or heads
    return METHODS[trained_method(experiment)].config(**options)


def _default_targets(model: Any, kind: str) -> list[str] | None:
    """Layers to adapt where the recipe names none; None for PEFT's choice."""
    ends = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    chosen = TARGETS.get(kind, ())
    return list(chosen) if chosen and ends.issuperset(chosen) else None


# Fields of a configuration that are no options of training: PEFT fills them in, or loading does.
_SET_BY_PEFT = {
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "peft_type",
    "peft_version",
    "revision",
    "task_type",
}


# First values that PEFT makes of examples, in calls beside `get_peft_model` that commands do not have. It
# takes its usual ones for two of them without a word.
_OF_DATA = ("corda", "eva", "lora_ga")

# Options of LoRA that do nothing without a value of another one.
_NEEDS = {
    "corda_config": ("init_lora_weights", "corda"),
    "eva_config": ("init_lora_weights", "eva"),
    "lora_ga_config": ("init_lora_weights", "lora_ga"),
    "loftq_config": ("init_lora_weights", "loftq"),
    "qalora_group_size": ("use_qalora", True),
}


def _config_options(experiment: Experiment) -> dict[str, Any]:
    """Arguments of the method's configuration that do not depend on the model.

    Raises:
        ValueError: An option is unknown.
    """
    recipe = experiment.recipe
    method = METHODS[trained_method(experiment)]
    fields = LoraConfig.__dataclass_fields__
    unknown = sorted(set(recipe.lora) - (set(fields) - _SET_BY_PEFT))
    if unknown:
        raise ValueError(
            f"lora: expected options of peft.LoraConfig that the model leaves open, got {', '.join(unknown)}"
        )
    for name, value in recipe.lora.items():
        if fields[name].type in (bool, "bool") and not isinstance(value, bool):
            raise ValueError(f"lora: {name} must be true or false, got {value!r}")
        other, needed = _NEEDS.get(name, ("", None))
        if other and recipe.lora.get(other, False) != needed:
            alone = f"without {other}={needed!r}, where it does nothing"
            why = "as no command initialises from examples" if needed in _OF_DATA else alone
            raise ValueError(f"lora: {name} must be left out {why}, got {value!r}")
    first = recipe.lora.get("init_lora_weights")
    if first in _OF_DATA:
        raise ValueError(
            f"lora: init_lora_weights must be one that needs no examples, got {first!r}, which PEFT computes "
            "in calls of their own; use true, 'gaussian', 'orthogonal', 'olora' or 'pissa'"
        )
    targets = recipe.target_modules
    options: dict[str, Any] = {
        "r": recipe.rank,
        "lora_alpha": recipe.alpha,
        "lora_dropout": experiment.dropout,
        "target_modules": None if targets is None else list(targets),
        **recipe.lora,
    }
    check_lora_options("lora", options)
    if METHODS[experiment.method].made == "train":
        later = experiment.training_options
        options.update({key: value for key, value in recipe.options.items() if key not in later})
    if "seed" in method.config.__dataclass_fields__:
        options["seed"] = experiment.seed
    return options


def check_experiment(experiment: Experiment) -> None:
    """Whether a run's options are in range, go together and do something; reads no data.

    For commands, whose every option is there for its one method; recipes that several methods share
    may have more.

    Raises:
        ValueError, TypeError: One does not.
    """
    experiment.check_options()
    METHODS[trained_method(experiment)].config(**_config_options(experiment))
    if METHODS[experiment.method].made == "convert":
        conversion_options(experiment)


def build(
    experiment: Experiment, task: Task, *, device: str | None = None
) -> tuple[PeftModel, TaskEncoder]:
    """A new adapter on the base model, ready for training, and the encoder of its input.

    Raises:
        ValueError, ImportError, OSError: As `load_model`, or adapter and model do not go together.
    """
    recipe = experiment.recipe
    base, encoder = experiment.base.load(task, recipe.max_length, device)
    if (experiment.style != "blob" or experiment.compat) and encoder.kind != "causal":
        raise ValueError(
            f"{'compat' if experiment.compat else 'style'}: expected a causal language model with it, got "
            f"{experiment.model!r}, which is loaded as {encoder.kind}; leave it out"
        )
    if recipe.base_dropout is not None:
        for module in base.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = recipe.base_dropout
    _check_targets(experiment, base, encoder.kind)
    config = adapter_config(experiment, base, encoder.kind)
    check_on_model("lora", vars(config), base)
    # Plain LoRA and Bayesian adapters draw the same factors from the same seed.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(experiment.seed)
        try:
            model = get_peft_model(base, config)
        except (
            AttributeError,
            AssertionError,
            LookupError,
            NotImplementedError,
            TypeError,
        ) as error:
            if not recipe.lora:
                raise
            # PEFT does not check the types of its options.
            given = ", ".join(f"{key}={value!r}" for key, value in recipe.lora.items())
            raise ValueError(
                f"lora: expected options that PEFT can use, got {given}: {error!r}"
            ) from error
    return on_device(model, device), encoder


def _check_targets(experiment: Experiment, base: Any, kind: str) -> None:
    """Whether every name that is to be adapted is a layer: PEFT is content with one of them."""
    targets = experiment.recipe.target_modules
    modules = dict(base.named_modules())
    if targets is None and _default_targets(base, kind):
        missing = []
    elif targets is None:
        known = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
        missing = [] if base.config.model_type in known else ["none, and PEFT has no default"]
    else:
        ends = {name for path in modules for name in _endings(path)}
        missing = [name for name in targets if name not in ends]
    if missing:
        names = {
            path.rpartition(".")[2]
            for path, module in modules.items()
            if isinstance(module, torch.nn.Linear | Conv1D)
        }
        raise ValueError(
            f"target-modules: expected names of linear layers of {experiment.model!r}, which "
            f"has {', '.join(sorted(names))}; got {', '.join(missing)}"
        )
    parameters = experiment.recipe.lora.get("target_parameters") or ()
    if isinstance(parameters, (list, tuple)) and all(isinstance(p, str) for p in parameters):
        missing, there = unmatched_parameters(base, parameters)
        if missing:
            raise ValueError(
                f"lora.target_parameters: expected names of parameters of {experiment.model!r}, whose "
                f"experts have {', '.join(there) or 'none'}; got {', '.join(missing)}"
            )


def _endings(path: str) -> Iterator[str]:
    """``a.b.c``, ``b.c`` and ``c``: names that PEFT takes for a module."""
    parts = path.split(".")
    return (".".join(parts[first:]) for first in range(len(parts)))
