"""The adapter that a conversion replaces, and the way back where it is stopped."""

from __future__ import annotations

from typing import Any

from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraModel
from torch import nn

from .model import BayesLoraModel


def the_adapter(op: str, model: nn.Module) -> tuple[PeftModel, str]:
    """The PEFT model in `model` and the name of its adapter, as what converts an adapter needs it.

    Raises:
        ValueError: there is none or more than one, it is no LoRA adapter, it is merged, or its last
            layer is variational; the message begins with `op`.
    """
    peft_model = next((m for m in model.modules() if isinstance(m, PeftModel)), None)
    if peft_model is None:
        raise ValueError(
            f"{op}: model must be a PeftModel, got {type(model).__name__}; load the adapter with "
            "PeftModel.from_pretrained"
        )
    names = list(peft_model.peft_config)
    if len(names) != 1:
        raise ValueError(
            f"{op}: model must have one adapter, got {names}; delete the others or load the one "
            "into a model of its own"
        )
    tuner: Any = peft_model.base_model
    config: Any = peft_model.peft_config[names[0]]
    if not isinstance(config, LoraConfig) or type(tuner) not in (LoraModel, BayesLoraModel):
        raise ValueError(
            f"{op}: the adapter must be a LoRA adapter, got {type(config).__name__} in "
            f"{type(tuner).__name__}"
        )
    if any(getattr(m, "merged_adapters", None) for m in tuner.model.modules()):
        raise ValueError(
            f"{op}: the adapter must not be merged, got a merged one; unmerge_adapter()"
        )
    if getattr(config, "method", None) == "polar-vbll":
        raise ValueError(
            f"{op}: the adapter must not have a variational last layer, got method 'polar-vbll'"
        )
    return peft_model, names[0]
