"""The PEFT tuner of Bayesian LoRA adapters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.lora import LoraModel

from ._compat import register
from .config import BayesLoraConfig
from .posterior import NoiseState, advance_before_forward
from .variants import RHO, attach


class BayesLoraModel(LoraModel):
    """`peft.LoraModel` whose adapters have a Gaussian posterior over their first factor.

    Made by `get_peft_model(model, BlobConfig(...))`. The layers are PEFT's own, for every backend;
    only the formula of their adapter path differs.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base model, called with its hooks: one of them draws the noise."""
        return self.model(*args, **kwargs)

    def _check_new_adapter_config(self, config: Any) -> None:
        if not isinstance(config, BayesLoraConfig):
            raise ValueError(
                f"BayesLoraModel: adapters must have a BayesLoraConfig, got "
                f"{type(config).__name__}; use BlobConfig(...), or import_lora for a plain LoRA "
                "checkpoint"
            )
        super()._check_new_adapter_config(config)

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
        layer = getattr(parent, target_name)
        attach(layer, adapter_name, lora_config, current_key, self._noise(lora_config))
        # PEFT leaves new modules in training mode, which would make an eval() model random.
        layer.train(target.training)

    def _noise(self, config: BayesLoraConfig) -> NoiseState:
        """The model's noise state, made with the first adapter, whose seed it keeps."""
        state = getattr(self.model, "bayes_noise", None)
        if state is None:
            state = NoiseState(config.seed)
            self.model.bayes_noise = state
            self.model.register_forward_pre_hook(advance_before_forward, with_kwargs=True)
        state.samples_in_eval |= config.sample_at_inference
        return state

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter; its `sample_at_inference` no longer counts."""
        super().delete_adapter(adapter_name)
        configs: list[Any] = list(self.peft_config.values())
        self.model.bayes_noise.samples_in_eval = any(c.sample_at_inference for c in configs)

    def enable_adapter_layers(self) -> None:
        """Use the adapters again."""
        super().enable_adapter_layers()
        self.model.bayes_noise.enabled = True

    def disable_adapter_layers(self) -> None:
        """Use the base model only; the noise stands still meanwhile."""
        super().disable_adapter_layers()
        self.model.bayes_noise.enabled = False

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Not defined for posteriors.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "add_weighted_adapter: posteriors cannot be combined; export_lora the adapters and "
            "combine the plain LoRA folders"
        )

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:
        model: Any = super()._unload_and_optionally_merge(*args, **kwargs)
        for handle, hook in list(model._forward_pre_hooks.items()):
            if hook is advance_before_forward:
                del model._forward_pre_hooks[handle]
                model._forward_pre_hooks_with_kwargs.pop(handle, None)
        del model.bayes_noise
        return model

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        """`to`, `half`, `cuda`, ...: deviations stay fp32, keys follow the device."""
        kept = {
            name: parameter.detach()
            for name, parameter in self.named_parameters()
            if f".{RHO}." in name and parameter.dtype == torch.float32
        }
        super()._apply(fn, recurse)
        devices = set()
        for name, parameter in self.named_parameters():
            if f".{RHO}." not in name or parameter.is_meta:
                continue
            devices.add(parameter.device)
            if name in kept and parameter.dtype != torch.float32:
                parameter.data = kept[name].to(parameter.device)
        state = getattr(self.model, "bayes_noise", None)
        if state is not None and devices - set(state.keys):
            state.set_key(next(iter(state.keys.values())), devices)
        return self


register(BayesLoraConfig, BayesLoraModel)
