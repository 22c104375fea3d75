"""Saving adapters that FSDP2 has sharded."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from torch import Tensor, nn

from ..files import updating_folder
from .card import CARD_NAME, class_names, problem_type, write_card
from .checks import CONFIG_NAME
from .config import BayesLoraConfig
from .gathering import gather_texts
from .layers import find_peft_model


@torch.no_grad()
def save_sharded(model: nn.Module, directory: str | os.PathLike[str], **options: Any) -> Path:
    """`save_pretrained` of a sharded PeftModel: call it on all processes, and the first one writes.

    The folder is that of one process. Load it there with `PeftModel.from_pretrained` to convert it
    (`bayesianize`) or to write plain LoRA (`export_lora`, `export_draws`). Whole models are saved as well,
    without processes too. Files that are not the adapter's stay. All new ones are written before the
    first takes its place; `adapter_config.json`, without which there is no adapter, comes last. So a
    call that fails or is killed leaves the old adapter or none.

    Args:
        model: a PeftModel with adapters of any kind, or a module that has one.
        directory: the folder to write, made if there is none.
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
            _save(peft_model, Path(directory), state, options)
    except BaseException as error:
        problem = f"{type(error).__name__}: {error}"
        raise
    finally:  # the others must not wait for a folder that does not come
        if together:
            problem = gather_texts(problem, model)[0]
    if problem is not None:
        raise RuntimeError(f"save_sharded: the first process could not write: {problem}")
    return Path(directory)


def _save(
    model: Any, directory: Path, state: Mapping[str, Tensor], options: Mapping[str, Any]
) -> None:
    names = options.get("selected_adapters") or list(model.peft_config)
    places = {name: "" if name == "default" else name for name in names}
    # Of the two formats of weights PEFT loads the first, which may be there from before.
    formats = (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)
    replaced = [os.path.join(place, weights) for place in places.values() for weights in formats]
    with updating_folder(directory, CONFIG_NAME, replaced) as folder:
        for place in {"", *places.values()}:  # PEFT changes a card that it finds
            card = Path(place, CARD_NAME)
            if (directory / card).is_file():
                (folder / place).mkdir(exist_ok=True)
                shutil.copyfile(directory / card, folder / card)
        model.save_pretrained(str(folder), state_dict=state, **options)
        for name, place in places.items():
            if isinstance(model.peft_config[name], BayesLoraConfig):  # paths as seen from there
                write_card(
                    folder / place,
                    classes=class_names(model),
                    problem=problem_type(model),
                    place=directory / place,
                )


__all__ = ["save_sharded"]
