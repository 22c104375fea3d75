"""Adapters of parameters that `target_parameters` names: the 3-D weights of fused experts.

PEFT adapts a parameter by adding the product of its factors to it during each forward pass: as many
numbers as the experts have, and one draw of them for all rows. Modules that follow transformers' interface
for experts have a forward pass of their own here instead. It sorts the rows by expert, as transformers'
grouped products do, and adds the adapter's output with one grouped op, in which every token keeps the
draw of its row. The parameters of other modules are adapted as PEFT does it.

PEFT keeps the factors of E experts in two matrices, A (E r, n) with the rows of an expert next to each
other and B (m, r E) with its columns E apart. The deviation of A lies as A does.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Collection
from contextlib import AbstractContextManager
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from peft.tuners import lora
from torch import Tensor, nn
from transformers.integrations import moe

from .. import functional
from ._compat import follows_experts_interface

IMPLEMENTATION = "bayes_kernels"
_PROJECTIONS = ("gate_up_proj", "up_proj", "down_proj")


class Routed(NamedTuple):
    """Rows of an experts module, sorted by expert: one for each expert of each token.

    Attributes:
        experts: int64 (rows,), ascending.
        tokens: int64 (rows,), the token of each row.
        hidden: (tokens, n), the input of the module; its first dimension is that of the batch, flattened.
    """

    experts: Tensor
    tokens: Tensor
    hidden: Tensor


class ParamWrapper(lora.ParamWrapper):
    """PEFT's layer of one parameter, where an adapter is Bayesian; PEFT asks for the class by its name.

    Attributes:
        fused: whether the forward pass of the experts is `experts_forward`.
    """

    fused: bool

    def _activate_lora(  # type: ignore[override]
        self, active_adapters: list[str]
    ) -> AbstractContextManager[None]:
        """PEFT's, with the weights of this pass; nothing where the experts add the adapter's output."""
        if self.fused:
            return contextlib.nullcontext()
        seen = copy.copy(self)
        variants: dict[str, Any] = dict(self.lora_variant)
        weights = {
            name: variants[name].first_factor(self, name) if name in variants else part.weight
            for name, part in self.lora_A.items()
            if name in active_adapters
        }
        # Beside the modules: an attribute is found first.
        vars(seen)["lora_A"] = {name: SimpleNamespace(weight=w) for name, w in weights.items()}
        return lora.ParamWrapper._activate_lora(seen, active_adapters)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """As PEFT's, of the posterior mean."""
        variants: dict[str, Any] = dict(self.lora_variant)
        for name in self.active_adapters if adapter_names is None else adapter_names:
            if name in variants:
                variants[name].merged()
        super().merge(safe_merge, adapter_names)

    def add_output(self, x: Tensor, result: Tensor, rows: Routed) -> Tensor:
        """result + the output of the active adapters for x, one row for each expert of each token."""
        if self.disable_adapters or self.merged:
            return result
        for name in self.active_adapters:
            if name not in self.lora_A:
                continue
            variant: Any = self.lora_variant.get(name)
            if variant is not None:
                result = variant.routed_forward(self, name, x, result, rows)
                continue
            a, b = by_expert(self, self.lora_A[name].weight, self.lora_B[name].weight)
            result = functional.grouped_lora(
                x, a, b, result, groups=rows.experts, scaling=self.scaling[name]
            )
        return result


class _OwnConfig:
    """The configuration of an experts module that is to use `experts_forward`.

    The model's own would change the forward pass of all experts, and would be saved.
    """

    _experts_implementation = IMPLEMENTATION

    def __init__(self, config: Any) -> None:
        self.config = config

    def __getattr__(self, name: str) -> Any:
        if name == "config" or name.startswith("__"):  # of a copy that is being made
            raise AttributeError(name)
        return getattr(self.config, name)


def adapts_parameter(layer: nn.Module) -> bool:
    """Whether a LoRA layer of PEFT adapts a parameter, not a module."""
    return isinstance(layer, lora.ParamWrapper)


def layer_name(path: str, layer: nn.Module) -> str:
    """The name of an adapted layer at a path: of a parameter, that of the parameter in the base model.

    Wrappers of several parameters of one module lie in each other, in the order that they were named in.
    """
    if not adapts_parameter(layer):
        return path
    parts = [part for part in path.split(".") if part != "base_layer"]
    return ".".join([*parts, str(layer.parameter_name)])


def unmatched_parameters(model: nn.Module, named: Collection[str]) -> tuple[list[str], list[str]]:
    """Entries of `target_parameters` that no parameter has, and the parameters that experts have."""
    names = [
        ".".join(part for part in name.split(".") if part != "base_layer")
        for name, _ in model.named_parameters()
        if ".lora_" not in name
    ]
    missing = sorted(t for t in named if not any(f".{name}".endswith(f".{t}") for name in names))
    return missing, sorted({n.rpartition(".")[2] for n in names if ".experts." in n})


def by_expert(layer: Any, a: Any, b: Any) -> tuple[Tensor, Tensor]:
    """A (E r, n) and B (m, r E) as PEFT keeps them, for each expert: (E, r, n) and (E, m, r)."""
    count = layer.num_experts
    return a.unflatten(0, (count, -1)), b.unflatten(1, (-1, count)).permute(2, 0, 1)


def as_kept(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of `by_expert`."""
    return a.flatten(0, 1), b.permute(1, 2, 0).flatten(1)


def wrap(layer: Any) -> None:
    """Let a layer of a parameter carry Bayesian adapters, in place; again is no change."""
    layer.__class__ = ParamWrapper
    experts = layer.get_base_layer()
    layer.fused = layer.parameter_name in _PROJECTIONS and follows_experts_interface(experts)
    if not layer.fused:
        return
    if not isinstance(experts.config, _OwnConfig):
        experts.config = _OwnConfig(experts.config)
        experts.bayes_wrappers = []  # in a list, since they hold this module
    if not any(other is layer for other in experts.bayes_wrappers):
        experts.bayes_wrappers.append(layer)


def unwrap(layer: Any) -> None:
    """Make a layer of a parameter PEFT's again, with the experts' own forward pass."""
    if type(layer) is ParamWrapper:
        restore(layer.get_base_layer())
        vars(layer).pop("fused", None)
        own: Any = lora.ParamWrapper
        layer.__class__ = own


def restore(model: nn.Module) -> None:
    """Give the experts in a model their own forward pass."""
    for module in model.modules():
        config = vars(module).get("config")
        if isinstance(config, _OwnConfig):
            module.config = config.config
            del module.bayes_wrappers


def experts_forward(
    experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """The forward pass of transformers' experts with adapters, as its interface for experts calls it.

    The same sums as transformers' grouped products, and the adapters' output beside each product.

    Args:
        experts: a module that follows the interface.
        hidden_states: (tokens, n).
        top_k_index: int64 (tokens, k), the experts of each token.
        top_k_weights: (tokens, k), their weights.

    Returns:
        (tokens, n) in the dtype of `hidden_states`.
    """
    tokens, k = top_k_index.shape
    ids, order = top_k_index.reshape(-1).sort(stable=True)
    rows = Routed(ids, order // k, hidden_states)
    ends = torch.searchsorted(
        ids, torch.arange(experts.num_experts, device=ids.device), right=True
    ).to(torch.int32)

    def projected(name: str, x: Tensor) -> Tensor:
        bias = getattr(experts, f"{name}_bias")[ids] if experts.has_bias else None
        weight = getattr(experts, name)
        y = _products(x, weight if experts.is_transposed else weight.mT, ends)
        y = y if bias is None else y + bias
        for layer in experts.bayes_wrappers:
            if layer.parameter_name == name:
                y = layer.add_output(x, y, rows)
        return y

    x = hidden_states[rows.tokens]
    x = projected("gate_up_proj" if experts.has_gate else "up_proj", x)
    x = experts._apply_gate(x) if experts.has_gate else experts.act_fn(x)
    x = projected("down_proj", x)
    if getattr(experts, "has_post_expert_norm", False):
        x = experts.post_expert_norm(x)
    x = x * top_k_weights.reshape(-1)[order].unsqueeze(-1)
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    return x[back].view(tokens, k, x.shape[-1]).sum(1).to(hidden_states.dtype)


def _products(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """x (rows, n) times the matrix (E, n, m) of each row's expert; `ends` (E,) are those of its rows."""
    if weight.dtype == torch.float64:  # which torch has no grouped product of
        return torch.ops.transformers.grouped_mm_fallback(x.to(weight.dtype), weight, offs=ends)
    return moe._grouped_mm(x, weight, offs=ends)


moe.ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)
