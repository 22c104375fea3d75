"""The Bayesian layers of a model: finding them, their noise, their devices."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from .noise import NoiseState
from .targets import factor_parameters
from .variants import BayesLayer, BayesVariant


def lora_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The LoRA layers in a model, adapted or not, by name, in the order of `named_modules`.

    A quarter of the time of that: conversions and passes ask for them.
    """
    seen: set[nn.Module] = set()
    left: list[tuple[str, nn.Module]] = [("", model)]
    while left:
        name, module = left.pop()
        if module in seen:
            continue
        seen.add(module)
        if "lora_variant" in vars(module):
            yield name, module
        prefix = f"{name}." if name else ""
        children = reversed(module._modules.items())
        left += [(prefix + part, child) for part, child in children if child is not None]


def active_layers(model: nn.Module, adapter: str | None = None) -> list[BayesLayer]:
    """As `bayes_layers`, unsorted; empty where there is none."""
    found = []
    for _, layer in lora_layers(model):
        names = layer.active_adapters if adapter is None else [adapter]
        for name in names:
            variant = layer.lora_variant.get(name)
            if isinstance(variant, BayesVariant):
                found.append(BayesLayer(variant.name, layer, name, variant))
    return found


def bayes_layers(model: nn.Module, adapter: str | None = None) -> list[BayesLayer]:
    """The Bayesian layers of a model, sorted by name.

    Args:
        model: any module that holds them, wrapped by PEFT, DDP or `torch.compile` or not.
        adapter: name of the adapter, or None for the active ones.

    Raises:
        ValueError: there is none.
    """
    found = active_layers(model, adapter)
    if not found:
        which = "an active Bayesian adapter" if adapter is None else f"the adapter {adapter!r}"
        raise ValueError(
            f"bayes_layers: the model must have {which}, got {type(model).__name__} without; make "
            "one with get_peft_model(model, BlobConfig(...)) or name the right adapter"
        )
    return sorted(found, key=lambda item: (item.name, item.adapter))


def bayes_variants(model: nn.Module) -> Iterator[BayesVariant]:
    """Those of all Bayesian adapters, active or not."""
    for _, layer in lora_layers(model):
        for variant in layer.lora_variant.values():
            if isinstance(variant, BayesVariant):
                yield variant


def find_peft_model(op: str, model: nn.Module) -> PeftModel:
    """The PEFT model that a model is or contains.

    Raises:
        ValueError: there is none; the message begins with `op`.
    """
    for module in model.modules():
        if isinstance(module, PeftModel):
            return module
    raise ValueError(
        f"{op}: model must be a PeftModel, got {type(model).__name__}; load the adapter with "
        "PeftModel.from_pretrained"
    )


def cast_where_plain(layer: Any) -> None:
    """Whether PEFT converts the input of a layer to the type of the factors: for plain LoRA.

    The ops of Bayesian adapters take activations as they are and keep the factors in fp32 themselves.
    """
    names = (*layer.lora_A, *layer.lora_embedding_A)
    plain = any(not isinstance(layer.lora_variant.get(name), BayesVariant) for name in names)
    layer.cast_input_dtype_enabled = plain


def check_whole(op: str, model: nn.Module) -> None:
    """Whether the tensors of all adapters are whole on this process.

    Raises:
        ValueError: FSDP2 has sharded some (DTensor); the message begins with `op`.
    """
    for name, parameter in model.named_parameters():
        if ".lora_" in name and hasattr(parameter, "placements"):
            raise ValueError(
                f"{op}: tensors must be whole, got a shard of {name}; call "
                "bayes_kernels.hf.save_sharded(model, folder) on all processes, and go on with the saved "
                "adapter on one"
            )


def noise_state(model: nn.Module) -> NoiseState:
    """The noise state of a model with Bayesian adapters, active or not.

    Raises:
        ValueError: the model has none.
    """
    for variant in bayes_variants(model):
        return variant.state
    raise ValueError(
        f"noise_state: the model must have a Bayesian adapter, got {type(model).__name__} without; "
        "make one with get_peft_model(model, BlobConfig(...)). A posterior beside a plain adapter, "
        "such as Laplace's, has no noise: use predict"
    )


def draws_weights(model: nn.Module) -> bool:
    """Whether weights of a Bayesian adapter, active or not, have draws."""
    return any(variant.samples for variant in bayes_variants(model))


def without_effect(model: nn.Module) -> str | None:
    """Why no adapter takes part in a model's passes, and what to do; None where one does.

    Of a model with Bayesian adapters these count, and not plain LoRA beside them.
    """
    layers = [layer for _, layer in lora_layers(model)]
    if not layers or any(not (layer.disable_adapters or layer.merged) for layer in layers):
        if any(True for _ in bayes_variants(model)) and not active_layers(model):
            return "not active; call set_adapter with the name of a Bayesian one"
        return None
    if any(layer.disable_adapters for layer in layers):
        return "disabled; leave disable_adapter()"
    return "merged; call unmerge_adapter()"


def warn_uncalled(op: str, names: Sequence[str], layers: int) -> None:
    """One line about adapted layers that a pass has gone round."""
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    warnings.warn(
        f"{op}: {len(names)} of {layers} adapted layers were not called, so that their adapters do "
        f"nothing: {shown}; leave them out of target_modules (a module such as MultiheadAttention "
        "uses the weights of its out_proj without calling it)",
        stacklevel=3,
    )


def key_devices(model: nn.Module, state: NoiseState) -> set[torch.device]:
    """Devices that need the noise key: found once, until layers ask for it on another one or move."""
    if state.devices is None:
        state.devices = adapter_devices(model)
    return state.devices


def adapter_devices(model: nn.Module) -> set[torch.device]:
    """Devices of the layers that have Bayesian adapters, active or not."""
    devices = set()
    for _, layer in lora_layers(model):
        for name, variant in layer.lora_variant.items():
            if isinstance(variant, BayesVariant):
                weight, _ = factor_parameters(layer, name)
                devices.update([] if weight.is_meta else [weight.device])
    return devices
