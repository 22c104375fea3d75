"""Everything that depends on the version of PEFT or transformers, and nothing else."""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Iterator, Mapping
from typing import Any

import peft
import torch
import transformers
from packaging.version import Version
from peft.utils.peft_types import PeftType, register_peft_method
from torch import Tensor, nn
from transformers.integrations import moe

PEFT_RANGE = ("0.20", "0.23")
TRANSFORMERS_RANGE = ("5.17", "6")
PEFT_TYPE_NAME = "BAYES_LORA"

# PEFT layer classes that call a LoraVariant in `forward` with the arguments of `Linear`. Subclasses
# of `Linear` (torchao, Intel Neural Compressor) qualify too.
_LAYERS_WITH_VARIANTS = frozenset(
    {
        *("Linear", "Linear8bitLt", "Linear4bit", "GPTQLoraLinear", "HqqLoraLinear"),
        *("Embedding", "Conv1d", "Conv2d", "Conv3d"),
    }
)

# Those whose `forward` is that of PEFT's layer for GPTQ without this call: base_layer(x), and a product
# for each active adapter. `quantised.give_hook` gives them one.
LAYERS_WITHOUT_HOOK = frozenset({"AwqLoraLinear", "AqlmLoraLinear", "EetqLoraLinear"})


# PEFT 0.20 loads an adapter without the biases that were trained with it.
KEEPS_BIASES = Version(Version(peft.__version__).base_version) >= Version("0.21")


def check_versions() -> None:
    """Raise ImportError, in one line, where an installed version is outside the tested range."""
    for package, (low, high) in ((peft, PEFT_RANGE), (transformers, TRANSFORMERS_RANGE)):
        found = Version(Version(package.__version__).base_version)
        if not Version(low) <= found < Version(high):
            raise ImportError(
                f"bayes_kernels.hf: {package.__name__} must be >={low},<{high}, got "
                f"{package.__version__}; run `pip install '{package.__name__}>={low},<{high}'`"
            )


def _on_cpu(storage: Any, location: str) -> Any:
    return storage if re.fullmatch(r"cpu:\d+", location) else None


# Resuming on CPUs under a launcher: transformers 5.17 asks torch.load for the device "cpu:0", which torch
# does not know.
torch.serialization.register_package(30, lambda storage: None, _on_cpu)


def _add_peft_type(name: str) -> PeftType:
    """A true member of the PeftType enum: transformers calls `.value` on it."""
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_ = name
    member._value_ = name
    member.__objclass__ = PeftType  # type: ignore[attr-defined]
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    PeftType._member_names_.append(name)
    type.__setattr__(PeftType, name, member)
    return member


BAYES_LORA: PeftType = _add_peft_type(PEFT_TYPE_NAME)


def register(config_class: type, model_class: type) -> None:
    """Make `get_peft_model` and `from_pretrained` know BAYES_LORA. May be called again."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    if BAYES_LORA not in PEFT_TYPE_TO_CONFIG_MAPPING:
        register_peft_method(
            name=PEFT_TYPE_NAME.lower(),
            config_cls=config_class,
            model_cls=model_class,
            prefix="lora_",
        )


def unsupported_layer(layer: nn.Module) -> str | None:
    """Why a layer cannot carry a Bayesian adapter, or None where it can."""
    from peft.tuners.lora import layer as lora_layers

    name = type(layer).__name__
    if not isinstance(layer, lora_layers.LoraLayer):
        return f"it became {name}, not a LoRA layer"
    if isinstance(layer, lora_layers.ParamWrapper):
        return _unsupported_parameter(layer)
    if not (type(layer) is lora_layers.Linear or isinstance(layer, lora_layers.Linear)):
        if name not in _LAYERS_WITH_VARIANTS | LAYERS_WITHOUT_HOOK:
            return f"PEFT handles it with {name}"
    mesh = getattr(getattr(layer.get_base_layer(), "weight", None), "device_mesh", None)
    if mesh is not None and (mesh.mesh_dim_names is None or "tp" in mesh.mesh_dim_names):
        return "its weight is split by tensor parallelism"
    return None


def _unsupported_parameter(layer: Any) -> str | None:
    """`unsupported_layer` of a layer that adapts a parameter."""
    parameter = layer.get_param()
    if parameter.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        return f"its values are {parameter.dtype}"
    split = getattr(layer.get_base_layer(), "_is_expert_parallel", False)
    if split or hasattr(parameter, "device_mesh"):
        return "it is split over processes"
    return None


def follows_experts_interface(module: nn.Module) -> bool:
    """Whether `config._experts_implementation` of a module chooses its forward pass, by transformers'
    table of them."""
    forward: Any = type(module).forward
    names = getattr(getattr(forward, "__code__", None), "co_freevars", ())
    found = dict(zip(names, getattr(forward, "__closure__", None) or (), strict=False))
    cell = found.get("experts_interface")
    return cell is not None and cell.cell_contents is moe.ALL_EXPERTS_FUNCTIONS


def loss_is_scaled(trainer: Any, num_items_in_batch: Any) -> bool:
    """Whether `compute_loss` is already normalised over the whole accumulation window."""
    scaled = getattr(trainer, "loss_is_scaled_for_ga", None)
    if scaled is not None:
        return bool(scaled)
    accepts = trainer.model_accepts_loss_kwargs and num_items_in_batch is not None
    return bool(accepts or trainer.compute_loss_func is not None)


# Names under which a forward pass is handed what earlier passes have kept: "cache" from transformers
# 5.24 on, "past_key_values" before and for callers who have not changed, "cache_params" for
# state-space models before.
CACHE_NAMES = ("cache", "past_key_values", "cache_params")


def cache_argument(model: nn.Module) -> str | None:
    """Under which name a decoder takes a KV cache; None where it takes none, or no position_ids."""
    for cls in type(model).__mro__:
        forward = cls.__dict__.get("forward")
        names = inspect.signature(forward).parameters if forward is not None else {}
        found = next((name for name in CACHE_NAMES[:2] if name in names), None)
        if found is not None:
            return found if "position_ids" in names else None
    return None


def continues_a_text(kwargs: Mapping[str, Any]) -> bool:
    """Whether a forward pass is handed a cache that earlier tokens have filled."""
    caches = [kwargs[name] for name in CACHE_NAMES if kwargs.get(name) is not None]
    return any(_is_filled(part) for cache in caches for part in getattr(cache, "layers", [cache]))


def _is_filled(part: Any) -> bool:
    """Of a layer's cache: keys and values of tokens, or a recurrent state (one, or a dict of them)."""
    states = getattr(part, "has_previous_state", None)
    if isinstance(states, dict):
        states = any(states.values())
    if states is True:
        return True
    length = getattr(part, "get_seq_length", None)
    return length is not None and bool(length() > 0)


@contextlib.contextmanager
def without_padding(model: nn.Module, inputs: Mapping[str, Any]) -> Iterator[None]:
    """Inside, a decoder classifier without a pad token takes copies of one example.

    Such classifiers refuse batches of several rows, whose ends they cannot see. Rows that are all the
    same end where one of them ends, at the last token: a pad token that no text has says so.

    Args:
        model: any model.
        inputs: its inputs, before or after copying. Without `input_ids` or `inputs_embeds` nothing
            changes.
    """
    config: Any = getattr(getattr(model, "get_base_model", lambda: model)(), "config", None)
    config = getattr(config, "get_text_config", lambda: config)()
    ids: Any = inputs.get("input_ids")
    ids = inputs.get("inputs_embeds") if ids is None else ids
    refuses = getattr(config, "pad_token_id", 0) is None and isinstance(ids, Tensor)
    if not refuses or not bool((ids == ids[:1]).all()):
        yield
        return
    config.pad_token_id = -1
    try:
        yield
    finally:
        config.pad_token_id = None
