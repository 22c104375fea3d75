"""Whether runs side by side have room on the GPUs, as far as sizes say it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ..hf.method import METHODS
from ..hf.tasks.encoder import TaskEncoder
from ..memory import Shape, predict
from .machine import Gpu, gpus
from .processes import shares
from .recipe import Experiment, trained_method

# Models of the shape that `bayes_kernels.memory` knows.
_LLAMAS = ("llama", "mistral")
# Its words for methods; others train plain LoRA.
_WORDS = {
    "blob": "blob",
    "scalabl": "scalabl",
    "polar": "polar_vbll",
    "polar-vbll": "polar_vbll",
}


def step_bytes(model: nn.Module, encoder: TaskEncoder, experiment: Experiment) -> int | None:
    """Bytes of a training step, at the largest length; None for models whose formula is not known.

    Args:
        model: A model with an adapter, or its base.
        encoder: Its encoder, whose length counts where the recipe names none.
        experiment: What is run.
    """
    config: Any = getattr(model, "config", None)
    if getattr(config, "model_type", None) not in _LLAMAS:
        return None
    recipe = experiment.recipe
    weight = next(model.parameters())
    shape = Shape(
        experiment.model,
        "llama",
        config.hidden_size,
        config.num_hidden_layers,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.intermediate_size,
        config.vocab_size,
        weight.dtype,
    )
    return predict(
        shape,
        recipe.batch_size // recipe.accumulation,
        recipe.max_length or encoder.max_length,
        _WORDS.get(trained_method(experiment), "peft_lora"),
        encoder.task.n_classes,
        recipe.rank,
        base=experiment.quantization or "half",
        activation_bits=recipe.options.get("activation_bits"),
    ).total


def check_room(
    processes: int,
    device: str | None,
    model: nn.Module,
    encoder: TaskEncoder,
    experiments: Sequence[Experiment],
) -> str | None:
    """What runs side by side may take of the GPUs' memory, and what they need of it, in words.

    Args:
        processes: How many at a time.
        device: "cpu", "cuda" or "auto".
        model, encoder: Those of one of the experiments.
        experiments: One for each method and each value of a sweep, all on the same base.

    Returns:
        None where nothing is shared: on the CPU, or one after the other.

    Raises:
        ValueError: The weights need more than their share. What `bayes_kernels.memory` says of a training
            step is no reason: texts may be shorter than the largest length, and adapters on other layers.
    """
    found = gpus(device) if processes > 1 else []
    if not found:
        return None
    weights = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    found[0] = found[0]._replace(
        free=found[0].free + weights
    )  # where the model is until they begin
    least = _least(found, processes)
    each = (
        f"{processes} runs side by side on {len(found)} GPU(s): each may take {_gigabytes(least)}"
    )
    if weights > least:
        fitting = [n for n in range(1, processes) if _least(found, n) >= weights]
        advice = f"--processes {fitting[-1]}" if fitting else "--quantization or a smaller model"
        raise ValueError(
            f"processes: expected runs that fit beside each other, got {processes} on {len(found)} GPU(s), "
            f"{_gigabytes(least)} for each, and their weights alone {_gigabytes(weights)}; use {advice}"
        )
    needs = [(step_bytes(model, encoder, one) or 0, one.method) for one in experiments]
    need, method = max(needs)
    if not need:
        return f"{each}, their weights alone {_gigabytes(weights)}"
    said = f"{each}, a training step of {METHODS[method].title} at the largest length about "
    if need <= least:
        return said + _gigabytes(need)
    return (
        f"{said}{_gigabytes(need)}; should one run out of memory, use fewer --processes, a smaller "
        "--max-length or smaller batches"
    )


def _least(found: Sequence[Gpu], processes: int) -> int:
    """Bytes that each of the processes may take at least."""
    return min(size for _, size in shares(found, processes))


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB"
