"""The PEFT tuner of Bayesian LoRA adapters."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Collection
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraModel
from torch import nn

from ._compat import register
from .attaching import attach
from .config import BayesLoraConfig
from .experts import restore, unmatched_parameters
from .guards import install as install_guards
from .layers import cast_where_plain, key_devices, lora_layers
from .lora_options import check_on_model
from .noise import NoiseState
from .posterior import advance_before_forward, generate_with_one_draw, watch_training_in_eval
from .undo import as_before_if_stopped
from .variants import VARIANTS, fp32_parameters

# As transformers' `should_convert_module` reads them: regular expressions from the start of a name.
_FACTOR_PATTERNS = (r".*\.lora_[AB]",)


class BayesLoraModel(LoraModel):
    """`peft.LoraModel` whose adapters have a posterior.

    Made by `get_peft_model(model, BlobConfig(...))` and the like. The layers are PEFT's own, for
    every backend; only the formula of their adapter path differs.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base model, called with its hooks: one of them draws the noise."""
        return self.model(*args, **kwargs)

    def _check_new_adapter_config(self, config: Any) -> None:
        if not (isinstance(config, BayesLoraConfig) or type(config) is LoraConfig):
            raise ValueError(
                f"BayesLoraModel: adapters must have a BayesLoraConfig or be plain LoRA, got "
                f"{type(config).__name__}; use BlobConfig(...), or import_lora for a plain LoRA "
                "checkpoint"
            )
        own = _replaces(config)
        for other in map(_replaces, self.peft_config.values()):
            if other != own:
                raise ValueError(
                    f"BayesLoraModel: adapters with and without {own or other} cannot share a model, "
                    f"got {type(config).__name__} beside the others; load the base model again"
                )
        super()._check_new_adapter_config(config)

    def inject_adapter(self, model: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """As PEFT's; a refusal leaves the model without the adapter, as it was before.

        Only weights that `init_lora_weights` changes in place (PiSSA, OLoRA, ...) do not come back.
        """
        config: Any = self.peft_config[adapter_name]
        if not config.inference_mode:
            check_on_model(type(config).__name__, vars(config), model)
        _keep_factors(model)
        named = config.target_modules  # PEFT makes a list of words of it, or a shorter one
        with as_before_if_stopped(model):
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            # PeftModel does it later; AutoModel does not, and would round the factors of a file to half.
            self._cast_adapter_dtype(adapter_name)
        if config.inference_mode:
            return
        if isinstance(named, (list, set, tuple)):
            _warn_unmatched(model, named)
        _warn_unmatched_parameters(model, config.target_parameters or ())

    def _prepare_model(self, peft_config: Any, model: Any) -> None:
        try:
            super()._prepare_model(peft_config, model)
        except IndexError as error:
            raise ValueError(
                f"{type(peft_config).__name__}: layer_replication must have layers of the model, got "
                f"{peft_config.layer_replication} ({error})"
            ) from error
        if isinstance(peft_config, BayesLoraConfig):
            VARIANTS[peft_config.method].install(model, peft_config)

    def _create_and_replace(  # type: ignore[override]
        self,
        lora_config: BayesLoraConfig,
        adapter_name: str,
        target: Any,
        target_name: str,
        parent: Any,
        current_key: str,
        **kwargs: Any,
    ) -> None:
        super()._create_and_replace(
            lora_config, adapter_name, target, target_name, parent, current_key, **kwargs
        )
        # Of a parameter that an earlier adapter has too, PEFT hands over the layer itself.
        named = kwargs.get("parameter_name")
        known = named is not None and getattr(target, "parameter_name", None) == named
        layer = target if known else getattr(parent, target_name)
        if isinstance(lora_config, BayesLoraConfig):
            state = self._noise(lora_config)
            attach(layer, adapter_name, lora_config, current_key, state)
            state.devices = None
        # PEFT leaves new modules in training mode, which would make an eval() model random.
        layer.train(target.training)

    def _noise(self, config: BayesLoraConfig) -> NoiseState:
        """The model's noise state, made with the first adapter, whose seed it keeps."""
        state = getattr(self.model, "bayes_noise", None)
        if state is None:
            state = NoiseState(config.seed)
            self.model.bayes_noise = state
            self.model.register_forward_pre_hook(advance_before_forward, with_kwargs=True)
            self.model.register_forward_hook(watch_training_in_eval)
            if hasattr(self.model, "generate"):
                self.model.generate = functools.partial(generate_with_one_draw, self.model)
        state.samples_in_eval |= config.sample_at_inference
        return state

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter; its `sample_at_inference` no longer counts."""
        super().delete_adapter(adapter_name)
        for _, layer in lora_layers(self.model):
            cast_where_plain(layer)
        state = getattr(self.model, "bayes_noise", None)
        if state is not None:
            samples = (getattr(c, "sample_at_inference", False) for c in self.peft_config.values())
            state.samples_in_eval = any(samples)

    def enable_adapter_layers(self) -> None:
        """Use the adapters again."""
        super().enable_adapter_layers()
        self.model.bayes_noise.enabled = True

    def disable_adapter_layers(self) -> None:
        """Use the base model only; the noise stands still meanwhile."""
        super().disable_adapter_layers()
        self.model.bayes_noise.enabled = False

    def add_weighted_adapter(self, adapters: list[str], *args: Any, **kwargs: Any) -> None:
        """As PEFT's, for plain LoRA; not defined for posteriors.

        Raises:
            ValueError: one of the adapters is Bayesian.
        """
        configs = [self.peft_config.get(name) for name in adapters]
        if not any(isinstance(config, BayesLoraConfig) for config in configs):
            super().add_weighted_adapter(adapters, *args, **kwargs)
            return
        raise ValueError(
            "add_weighted_adapter: posteriors cannot be combined; export_lora the adapters and "
            "combine the plain LoRA folders"
        )

    def merge_adapter(self, *args: Any, **kwargs: Any) -> None:
        """As PEFT's; where it is stopped, what was merged is taken out again, up to rounding."""
        with as_before_if_stopped(self.model, merges=True):
            super().merge_adapter(*args, **kwargs)

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:
        with as_before_if_stopped(self.model, merges=True):
            model: Any = super()._unload_and_optionally_merge(*args, **kwargs)
            remove_noise(model)
            restore(model)
            for variant in VARIANTS.values():
                variant.restore(model)
            return model

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        """`to`, `half`, `cuda`, ...: what must stay fp32 does, keys follow the device."""
        kept = {
            place: parameter.detach()
            for place, parameter in fp32_parameters(self)
            if parameter.dtype == torch.float32
        }
        super()._apply(fn, recurse)
        for place, parameter in fp32_parameters(self):
            if place in kept and parameter.dtype != torch.float32 and not parameter.is_meta:
                parameter.data = kept[place].to(parameter.device)
        state = getattr(self.model, "bayes_noise", None)
        if state is not None:
            state.devices = None
            devices = key_devices(self, state)
            if devices - set(state.keys):
                state.set_key(next(iter(state.keys.values())), devices)
        return self


def _replaces(config: Any) -> str:
    """What the method of an adapter puts in place of a module of the base model; "" for plain LoRA."""
    return VARIANTS[config.method].replaces if isinstance(config, BayesLoraConfig) else ""


def _warn_unmatched(model: nn.Module, named: Collection[str]) -> None:
    """One warning about targets that no module is called by: of several PEFT only notices all."""
    modules = [name for name, _ in model.named_modules()]
    missing = sorted(t for t in named if not any(f".{name}".endswith(f".{t}") for name in modules))
    if missing:
        there = sorted({name.rpartition(".")[2] for name, _ in lora_layers(model)})
        warnings.warn(
            f"target_modules: {', '.join(missing)} must each be a module of the model or the end of "
            f"its name, got none in {type(model).__name__}; adapted are {', '.join(there)}: correct the "
            "name, or leave it out",
            stacklevel=2,
        )


def _warn_unmatched_parameters(model: nn.Module, named: Collection[str]) -> None:
    """`_warn_unmatched` of `target_parameters`."""
    missing, there = unmatched_parameters(model, named)
    if missing:
        warnings.warn(
            f"target_parameters: {', '.join(missing)} must each be a parameter of the model or the end of "
            f"its name, got none in {type(model).__name__}, whose experts have "
            f"{', '.join(there) or 'no parameters'}: correct the name, or leave it out",
            stacklevel=2,
        )


def remove_noise(model: Any) -> None:
    """Take the noise state and its hooks off a base model."""
    for handle, hook in list(model._forward_pre_hooks.items()):
        if hook is advance_before_forward:
            del model._forward_pre_hooks[handle]
            model._forward_pre_hooks_with_kwargs.pop(handle, None)
    for handle, hook in list(model._forward_hooks.items()):
        if hook is watch_training_in_eval:
            del model._forward_hooks[handle]
    model.__dict__.pop("generate", None)
    if hasattr(model, "bayes_noise"):
        del model.bayes_noise


register(BayesLoraConfig, BayesLoraModel)
install_guards()


def _keep_factors(model: nn.Module) -> None:
    """Have the model's quantiser leave the factors alone.

    transformers loads an adapter's tensors like the base model's, and torchao would quantise those of
    every `nn.Linear`: the factors to 8 bits, which the ops cannot read.
    """
    quantizer: Any = getattr(model, "hf_quantizer", None)
    if quantizer is not None and hasattr(quantizer, "modules_to_not_convert"):
        kept = list(quantizer.modules_to_not_convert or [])
        quantizer.modules_to_not_convert = [*dict.fromkeys([*kept, *_FACTOR_PATTERNS])]
