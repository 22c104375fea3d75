"""The maths of Bayesian adapters inside PEFT's LoRA layers."""

from __future__ import annotations

import hashlib
import math
import warnings
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.lora.layer import LoraVariant
from torch import Tensor, nn

from .. import functional
from ._compat import unsupported_layer

if TYPE_CHECKING:
    from .config import BayesLoraConfig
    from .posterior import NoiseState

RHO = "lora_A_rho"


def layer_stream(name: str) -> int:
    """Noise stream of a layer: 40 bits of a hash of its module name in the base model.

    It depends on the name alone, so that adding an adapter with other target modules changes no
    draw. 448 layers share a stream by chance with probability 1e-7.
    """
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=5).digest(), "big")


class BlobVariant(LoraVariant):
    """BLoB in one LoRA layer: mean `lora_A.weight`, deviation parameter `lora_A_rho`.

    An instance belongs to one layer and one adapter. `state` is shared by the whole model.
    """

    def __init__(self, config: BayesLoraConfig, name: str, in_features: int, state: NoiseState):
        self.config = config
        self.std = config.std
        self.scope = config.scope
        self.sample_at_inference = config.sample_at_inference
        self.prior_std = config.prior_std_of(in_features)
        self.name = name
        self.stream = layer_stream(name)
        # Mixture-of-experts layers see a routed selection of rows, which hides whose row is whose.
        self.routed = ".experts." in f".{name}."
        self.state = state

    def forward(  # type: ignore[override]
        self, module: Any, active_adapter: str, x: Tensor, result: Tensor, **_: Any
    ) -> Tensor:
        """result + scaling * (dropout(x) A^T) B^T, with A its mean or drawn as the state says."""
        state = self.state
        a, b = module.lora_A[active_adapter].weight, module.lora_B[active_adapter].weight
        scaling = module.scaling[active_adapter]
        dropout = 0.0
        if module.training:
            dropout = float(getattr(module.lora_dropout[active_adapter], "p", 0.0))
        mode = state.mode
        if mode is None:
            mode = "flipout" if module.training else "mean"
            if mode == "mean" and self.sample_at_inference:
                mode = "sample"
        if mode == "mean":
            key = state.key_on(x.device) if dropout > 0.0 else None
            return functional.lora(
                x, a, b, result, scaling=scaling, dropout=dropout, key=key, stream=self.stream
            )
        draw: dict[str, Any] = {"scope": self.scope}
        if mode == "sample":
            draw = {"row0": state.first_sample, "rows_per_group": self._rows_per_draw(x)}
        return functional.flipout_lora(
            x,
            a,
            module.lora_A_rho[active_adapter],
            b,
            result,
            scaling=scaling,
            key=state.key_on(x.device),
            stream=self.stream,
            std=self.std,
            dropout=dropout,
            **draw,
        )

    def _rows_per_draw(self, x: Tensor) -> int:
        draws = self.state.n_samples
        rows = math.prod(x.shape[:-1])
        if draws == 1:
            return max(rows, 1)
        if self.routed:
            raise ValueError(
                f"posterior: layer {self.name} sees routed rows, so that {draws} draws cannot be "
                "folded into one batch; use n_samples=1 and first_sample=0, 1, ..."
            )
        if x.dim() < 2 or x.shape[0] % draws:
            raise ValueError(
                f"posterior: with n_samples={draws} the first dimension of the batch must be "
                f"{draws} copies of the examples, layer {self.name} got {tuple(x.shape)}; repeat "
                "the inputs with bayes_kernels.hf.fold_samples"
            )
        return max(rows // draws, 1)

    @staticmethod
    def init(module: Any, adapter_name: str, **_: Any) -> None:
        """Nothing: `attach` has done it."""

    @staticmethod
    def merge_safe(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """A new weight with the posterior mean added."""
        _warn_merge()
        return orig_weight + module.get_delta_weight(active_adapter).to(orig_weight.dtype)

    @staticmethod
    def merge_unsafe(module: Any, active_adapter: str, orig_weight: Tensor) -> None:
        """Add the posterior mean in place."""
        _warn_merge()
        orig_weight.data += module.get_delta_weight(active_adapter).to(orig_weight.dtype)

    @staticmethod
    def unmerge(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """Take the posterior mean out again."""
        return orig_weight - module.get_delta_weight(active_adapter).to(orig_weight.dtype)


def _warn_merge() -> None:
    warnings.warn(
        "merging keeps the posterior mean only: the merged model has no uncertainty; "
        "keep the adapter to sample, or use export_lora(which=...) for single draws",
        stacklevel=4,
    )


VARIANTS: dict[str, type[BlobVariant]] = {"blob": BlobVariant}


def attach(
    layer: Any, adapter: str, config: BayesLoraConfig, name: str, state: NoiseState
) -> BlobVariant:
    """Turn the adapter `adapter` of a PEFT LoRA layer into a Bayesian one, in place.

    Adds the trainable `lora_A_rho` (r, in), always fp32, beside the mean `lora_A.weight`.

    Args:
        layer: a LoRA layer of PEFT that has the adapter.
        adapter: its name.
        config: method and options.
        name: the layer's module name in the base model, which fixes its noise stream.
        state: the model's noise state.

    Raises:
        ValueError: the layer's kind or quantisation cannot carry the adapter.
    """
    reason = unsupported_layer(layer)
    if reason is not None:
        base = type(layer.get_base_layer()).__name__ if hasattr(layer, "get_base_layer") else "?"
        raise ValueError(
            f"BayesLoraConfig: target {name} ({base}) cannot carry a Bayesian adapter: {reason}; "
            "target linear layers that are unquantised or quantised by bitsandbytes, GPTQ, HQQ or "
            "torchao"
        )
    variant = VARIANTS[config.method](config, name, layer.in_features, state)
    mean = layer.lora_A[adapter].weight
    if not hasattr(layer, RHO):
        layer.lora_A_rho = nn.ParameterDict()
        layer.adapter_layer_names = (*layer.adapter_layer_names, RHO)
    rho = nn.Parameter(_initial_rho(mean, config, variant.stream), requires_grad=mean.requires_grad)
    layer.lora_A_rho[adapter] = rho
    layer.lora_variant[adapter] = variant
    # The ops take activations as they are and keep the factors in fp32 themselves.
    layer.cast_input_dtype_enabled = False
    return variant


def _initial_rho(mean: Tensor, config: BayesLoraConfig, stream: int) -> Tensor:
    """rho as the paper draws it, from a generator of its own.

    The global generator stays where plain LoRA leaves it, so that the means are those that plain
    LoRA would draw with the same seed.
    """
    eps = config.init_rho
    low, high = eps / math.sqrt(2), eps
    if config.std == "softplus":
        low, high = eps - 1, eps
    elif config.std == "direct":
        low, high = low * low, high * high
    if mean.is_meta:
        return torch.empty_like(mean, dtype=torch.float32)
    seed = (torch.initial_seed() * 0x9E3779B97F4A7C15 + stream) & 0x7FFFFFFFFFFFFFFF
    generator = torch.Generator().manual_seed(seed)
    rho = torch.empty(mean.shape, dtype=torch.float32).uniform_(low, high, generator=generator)
    return rho.to(mean.device)
