"""Saving adapters that FSDP2 has sharded."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .gathering import gather_texts
from .layers import find_peft_model


@torch.no_grad()
def save_sharded(model: nn.Module, directory: str | os.PathLike[str], **options: Any) -> Path:
    """`save_pretrained` of a sharded PeftModel: call it on all processes, and the first one writes.

    The folder is that of one process. Load it there with `PeftModel.from_pretrained` to convert it
    (`bayesianize`) or to write plain LoRA (`export_lora`, `export_draws`). Whole models are saved as well,
    without processes too.

    Args:
        model: a PeftModel with adapters of any kind, or a module that has one.
        directory: the folder to write.
        options: of `save_pretrained`.

    Returns:
        The folder, which is there when the call ends on any process.

    Raises:
        ValueError: the model is no PeftModel.
        RuntimeError: on the other processes, if the first could not write; it raises what stopped it.

    Cost: gathers the adapter's tensors, and others that were trained, one at a time; the first process
    keeps them in host memory. Of frozen weights of the base only embeddings with an
    adapter are gathered.
    """
    peft_model = find_peft_model("save_sharded", model)
    together = torch.distributed.is_available() and torch.distributed.is_initialized()
    first = not together or torch.distributed.get_rank() == 0
    trained = {name for name, parameter in peft_model.named_parameters() if parameter.requires_grad}
    # Of embeddings that an adapter is on, PEFT saves the base's weights too.
    base: Any = peft_model.get_base_model()
    ends = [base.get_input_embeddings(), base.get_output_embeddings()]
    adapted = [
        f"{name}.base_layer."
        for name, module in peft_model.named_modules()
        if hasattr(module, "base_layer") and any(module is end for end in ends)
    ]
    state = {}
    for name, value in peft_model.state_dict().items():
        own = name in trained or ".lora_" in name or ".modules_to_save." in name
        if not (own or name.startswith(tuple(adapted))):
            continue
        whole = value.full_tensor() if hasattr(value, "full_tensor") else value
        if first:
            state[name] = whole.detach().cpu()
        del whole
    problem: str | None = None
    try:
        if first:
            peft_model.save_pretrained(str(directory), state_dict=state, **options)
    except BaseException as error:
        problem = f"{type(error).__name__}: {error}"
        raise
    finally:  # the others must not wait for a folder that does not come
        if together:
            problem = gather_texts(problem, model)[0]
    if problem is not None:
        raise RuntimeError(f"save_sharded: the first process could not write: {problem}")
    return Path(directory)


__all__ = ["save_sharded"]
