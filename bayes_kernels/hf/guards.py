"""Helpers of PEFT that know plain LoRA only, kept from a Bayesian adapter.

They change `lora_A` and `lora_B` only, pair parameters by the order of their names, or do not notice a
missing tensor. A call with a Bayesian adapter is refused before it changes anything; calls with other
adapters work as before. Programs import some helpers by name: there the first function that the helper
calls is wrapped, so that the order of imports does not matter.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn

from .card import class_names, problem_type, write_card
from .checks import CONFIG_NAME, check_folder, is_bayesian_folder
from .config import BayesLoraConfig
from .layers import active_layers, bayes_variants, check_whole
from .variants import VARIANTS, extra_names


def _bayesian(model: nn.Module) -> bool:
    return any(True for _ in bayes_variants(model))


def _no_padding(model: nn.Module, **_: Any) -> None:
    if _bayesian(model):
        raise ValueError(
            "prepare_model_for_compiled_hotswap: adapters must be plain LoRA, got a Bayesian one, "
            "whose posterior has no rows of zeros; export_lora writes its mean or a draw as plain "
            "LoRA, which can be swapped"
        )


def _no_swap(model: nn.Module, adapter_name: str | None = None, **_: Any) -> None:
    if active_layers(model, adapter_name):
        raise ValueError(
            "hotswap_adapter_from_state_dict: adapters must be plain LoRA, got a Bayesian one; "
            "load_adapter under another name and set_adapter, or swap what export_lora writes"
        )


def _no_loftq(peft_model: nn.Module, **_: Any) -> None:
    if _bayesian(peft_model):
        raise ValueError(
            "replace_lora_weights_loftq: adapters must be plain LoRA, got a Bayesian one; initialise "
            "plain LoRA, save it, and read it with import_lora"
        )


def _no_lorafa(params: Any, **_: Any) -> None:
    groups = [group for group in params if "names" in group] if isinstance(params, list) else []
    named = {n: p for group in groups for n, p in zip(group["names"], group["params"], strict=True)}
    extra = extra_names()
    ours = [name for name in named if extra & set(name.split("."))]
    if not ours:
        return
    # PEFT has frozen whatever is called lora_A by now: back to what the adapter's lora_B is.
    constant = {name for variant in VARIANTS.values() for name in variant.constants}
    for name, parameter in named.items():
        layer, mark, rest = name.rpartition(".lora_A")
        kind, _, adapter = rest.removesuffix(".weight").partition(".")
        partner = named.get(f"{layer}.lora_B.{adapter}.weight")
        if mark and partner is not None and f"lora_A{kind}" not in constant:
            parameter.requires_grad_(partner.requires_grad)
    raise ValueError(
        f"LoRA-FA: adapters must be plain LoRA, got a Bayesian one ({ours[0]}): it freezes A, which "
        "has the posterior; use BayesTrainer or another optimiser"
    )


def _no_shards(self: Any, selected_adapters: Any = None, state_dict: Any = None, **_: Any) -> None:
    names = self.peft_config if selected_adapters is None else selected_adapters
    ours = any(isinstance(self.peft_config.get(name), BayesLoraConfig) for name in names)
    if ours and state_dict is None:
        check_whole("save_pretrained", self)


def _no_conversion(
    self: Any,
    selected_adapters: Any = None,
    path_initial_model_for_weight_conversion: Any = None,
    **_: Any,
) -> None:
    names = self.peft_config if selected_adapters is None else selected_adapters
    ours = any(isinstance(self.peft_config.get(name), BayesLoraConfig) for name in names)
    if path_initial_model_for_weight_conversion is not None and ours:
        raise ValueError(
            "save_pretrained: path_initial_model_for_weight_conversion must be left out for a Bayesian "
            f"adapter, got {str(path_initial_model_for_weight_conversion)!r}: the difference of two "
            "adapters has no posterior; train with init_lora_weights=True or 'gaussian'"
        )


def _before_saving(self: Any, **given: Any) -> None:
    _no_conversion(self, **given)
    _no_shards(self, **given)


def _write_cards(
    _: None,
    self: Any,
    save_directory: Any,
    selected_adapters: Any = None,
    is_main_process: bool = True,
    **_others: Any,
) -> None:
    if not is_main_process:
        return
    for name in self.peft_config if selected_adapters is None else selected_adapters:
        if isinstance(self.peft_config[name], BayesLoraConfig):
            folder = Path(save_directory) / ("" if name == "default" else name)
            write_card(folder, classes=class_names(self), problem=problem_type(self))


def _complete(result: Any, self: Any, adapter_name: str | None = None, **given: Any) -> None:
    """After `load_adapter`: every tensor of a Bayesian adapter came from the file."""
    name = adapter_name or "default"
    if not isinstance(getattr(self, "peft_config", {}).get(name), BayesLoraConfig):
        return
    source = given.get("model_id") or given.get("peft_model_id")
    # PEFT takes every key that contains the name, transformers the keys of all adapters.
    missing = sorted(
        key
        for key in getattr(result, "missing_keys", ())
        if key.rpartition(".lora_")[2].split(".")[1:2] == [name]
    )
    unexpected = sorted(key for key in getattr(result, "unexpected_keys", ()) if ".lora_" in key)
    if missing or unexpected:
        if isinstance(self, PeftModel) and len(self.peft_config) > 1:
            self.delete_adapter(name)
        raise ValueError(
            f"load_adapter: {source} must hold every tensor of the adapter and no other, got none for "
            f"{missing[:2]} ({len(missing)}) and no place for {unexpected[:2]} ({len(unexpected)}); "
            "use the whole folder and the base model that it was trained on"
        )


def _whole(peft_model_id: Any = None, **_: Any) -> None:
    """Before transformers' `load_adapter`: the folder of a Bayesian adapter is not damaged."""
    if isinstance(peft_model_id, (str, Path)) and is_bayesian_folder(peft_model_id):
        check_folder(peft_model_id)


def _whole_of_config(
    pretrained_model_name_or_path: Any, subfolder: str | None = None, **_: Any
) -> None:
    """Before a configuration is read, as PEFT does first: a folder on this machine is not damaged."""
    folder = Path(pretrained_model_name_or_path, subfolder or "")
    if (folder / CONFIG_NAME).is_file():
        check_folder(folder)


# Module and class, function, what is called before it (or returns a context to call it in) and after it.
Guard = tuple[str, str, Callable[..., Any] | None, Callable[..., None] | None]

_GUARDS: list[Guard] = [
    ("bayes_kernels.hf.config:BayesLoraConfig", "from_pretrained", _whole_of_config, None),
    ("peft.peft_model:PeftModel", "save_pretrained", _before_saving, _write_cards),
    ("peft.peft_model:PeftModel", "load_adapter", None, _complete),
    ("transformers.integrations.peft:PeftAdapterMixin", "load_adapter", _whole, _complete),
    ("peft.utils.hotswap", "_convert_scalings_to_tensor", _no_padding, None),
    ("peft.utils.hotswap", "hotswap_adapter_from_state_dict", _no_swap, None),
    ("peft.utils.loftq_utils:_SafetensorLoader", "__init__", _no_loftq, None),
    ("peft.optimizers.lorafa:LoraFAOptimizer", "__init__", _no_lorafa, None),
]


def install(guards: Sequence[Guard] = _GUARDS) -> None:
    """Put guards into PEFT and transformers, once."""
    for place, name, before, after in guards:
        module, _, inside = place.partition(":")
        owner: Any = importlib.import_module(module)
        owner = getattr(owner, inside) if inside else owner
        found: Any = inspect.getattr_static(owner, name)
        original = getattr(found, "__func__", found)  # of a class method
        if not hasattr(original, "bayes_kernels_guard"):
            guarded = _guarded(original, before, after)
            setattr(owner, name, guarded if found is original else classmethod(guarded))


def _guarded(
    original: Callable[..., Any],
    before: Callable[..., Any] | None,
    after: Callable[..., None] | None,
) -> Callable[..., Any]:
    """A function that has others called before and after, with its arguments by name."""
    signature = inspect.signature(original)
    (rest,) = [p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD] or [""]

    @functools.wraps(original)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        given = dict(signature.bind(*args, **kwargs).arguments)
        given.update(given.pop(rest, {}))
        context = None if before is None else before(**given)
        with context or contextlib.nullcontext():
            result = original(*args, **kwargs)
        if after is not None:
            after(result, **given)
        return result

    guarded.bayes_kernels_guard = True  # type: ignore[attr-defined]
    return guarded


__all__ = ["install"]
