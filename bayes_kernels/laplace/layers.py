"""The layers that get a posterior, what their curvature takes, and which module shows each of them."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Layer:
    """One linear map inside a model whose weight gets a posterior: the protocol of this module.

    The map need not be a module. It is described by a module that the forward pass calls, and by how
    the map's input and output gradient follow from the module's. Examples are the leading dimension; a
    layer is used once in a forward pass.

    Attributes:
        name: unique name.
        module: the module to watch: its first argument is x (B, ..., n), its output y (B, ..., m).
        weight: the parameter (out, in), or a bias (out,): the posterior mean.
        input_rows: x -> inputs a (B, ..., in) of the map; None where they are x.
        grad_rows: gradient dy of y, with any leading dimensions -> gradient g (..., out) of the
            map's output; None where it is dy. Must be linear.
        gate: a tensor with which all gradients vanish when it is all zeros (LoRA's other factor).
    """

    name: str
    module: nn.Module
    weight: Tensor
    input_rows: Callable[[Tensor], Tensor] | None = None
    grad_rows: Callable[[Tensor], Tensor] | None = None
    gate: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in); a bias is a map of the constant 1."""
        return self.weight.shape[0], self.weight.shape[1] if self.weight.dim() == 2 else 1


def linear_layers(
    model: nn.Module, names: str | Iterable[str] | None = None, *, bias: bool = True
) -> list[Layer]:
    """The linear layers of a model, by name.

    Args:
        model: any module.
        names: module names, or one regular expression that has to match the whole name. None for all
            `nn.Linear` modules whose weight requires a gradient: with PEFT these are the lora_A and
            lora_B modules of a plain LoRA adapter.
        bias: whether biases that require a gradient (with names: all biases) are layers too.

    Raises:
        ValueError: no layer, a name that is no linear layer, or a weight that is computed from other
            parameters (parametrisations, `weight_norm`, pruning), which no draw could change.
    """
    modules = dict(model.named_modules())
    if isinstance(names, str):
        pattern = re.compile(names)
        chosen = [
            n for n, m in modules.items() if isinstance(m, nn.Linear) and pattern.fullmatch(n)
        ]
    elif names is not None:
        chosen = list(names)
        for name in chosen:
            if not isinstance(modules.get(name), nn.Linear):
                raise ValueError(
                    f"linear_layers: names must be nn.Linear modules of the model, got {name!r} "
                    f"({type(modules[name]).__name__ if name in modules else 'no such module'})"
                )
    else:
        chosen = [n for n, m in modules.items() if isinstance(m, nn.Linear) and _trains(m)]
    if not chosen:
        raise ValueError(
            f"linear_layers: the model must have nn.Linear modules that match, got names={names!r}; "
            "name modules of model.named_modules()"
        )
    layers = []
    for name in chosen:
        module: Any = modules[name]
        _refuse_computed(name, module, "weight")
        layers.append(Layer(f"{name}.weight", module, module.weight))
        if bias and module.bias is not None and (names is not None or module.bias.requires_grad):
            _refuse_computed(name, module, "bias")
            layers.append(
                Layer(f"{name}.bias", module, module.bias, lambda x: x.new_ones(*x.shape[:-1], 1))
            )
    return layers


def _trains(module: nn.Linear) -> bool:
    """Whether the weight requires a gradient, or what it is computed from."""
    if "weight" in module._parameters:
        return module.weight.requires_grad
    return any(p.requires_grad for p in module.parameters())


def _refuse_computed(name: str, module: nn.Module, kind: str) -> None:
    """Raises where a module's weight or bias is made anew for each pass, from other parameters."""
    if kind in module._parameters:
        return
    raise ValueError(
        f"linear_layers: {kind} of {name} must be a parameter, got one that is computed for each pass "
        "(weight_norm, spectral_norm, orthogonal, pruning or the like): draws of it would have no "
        "effect; make it one (parametrize.remove_parametrizations, remove_weight_norm, prune.remove), "
        "or leave the layer out with names=..."
    )


def lora_layers(
    name: str, module: nn.Module, a: Tensor, b: Tensor, scaling: float = 1.0
) -> list[Layer]:
    """The two linear maps of one adapted layer y = base(x) + scaling * (x a^T) b^T.

    They follow from the adapted layer's own input x and output gradient dy, so that it does not
    matter how the adapter is computed, fused kernels included:

        a: input x,        output gradient scaling * dy b
        b: input x a^T,    output gradient scaling * dy

    Args:
        name: name of the adapted layer; the maps are called name.lora_A and name.lora_B.
        module: the adapted layer, whose output y includes the base.
        a: (r, n) parameter.
        b: (m, r) parameter.
        scaling: lora_alpha / r in PEFT's terms.

    Raises:
        ValueError: the factors do not fit each other.
    """
    if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1]:
        raise ValueError(
            f"lora_layers: a and b must have shapes (r, n) and (m, r), got {tuple(a.shape)} and "
            f"{tuple(b.shape)}"
        )

    def wide(t: Tensor) -> Tensor:
        return t.detach() if t.dtype == torch.float64 else t.detach().float()

    return [
        Layer(f"{name}.lora_A", module, a, None, lambda dy: wide(dy) @ wide(b) * scaling, b),
        Layer(
            f"{name}.lora_B", module, b, lambda x: wide(x) @ wide(a).T, lambda dy: dy * scaling, a
        ),
    ]


class MemoryEstimate(NamedTuple):
    """Bytes of a curvature pass, beyond the model's own passes and the rows of one layer.

    Attributes:
        factors: the Kronecker factors.
        buffers: uncompressed rows.
        workspace: the most that compressing rows, or computing eigenvectors after the pass, adds to
            `total` for a moment.
        posterior: what is kept after `fit`; it replaces factors and buffers.
    """

    factors: int
    buffers: int
    workspace: int
    posterior: int

    @property
    def total(self) -> int:
        """Bytes held through the pass: factors and buffers."""
        return self.factors + self.buffers

    def __str__(self) -> str:
        mib = [f"{v / 2**20:.1f}" for v in (self.total, self.factors, self.buffers, self.workspace)]
        return (
            f"{mib[0]} MiB through the pass (factors {mib[1]}, row buffers {mib[2]}), "
            f"{mib[3]} MiB of workspace, {self.posterior / 2**20:.1f} MiB kept afterwards"
        )


def estimate_memory(
    layers: Iterable[Layer | tuple[int, int]],
    *,
    rank: int | None = 10,
    dense_below: int = 512,
    buffer: int = 32,
    dtype: torch.dtype = torch.float32,
) -> MemoryEstimate:
    """Memory that the curvature of these layers takes, before anything runs.

    Args:
        layers: layers, or the shapes (out, in) of layers on a GPU.
        rank, dense_below, buffer: as in `Laplace`.
        dtype: fp32 or fp64, of the factors of layers that are given as shapes.

    Example:
        shapes = [(8, 4096), (4096, 8)] * 64  # LoRA of rank 8 on 64 projections
        print(estimate_memory(shapes))
    """
    factors = buffers = posterior = together = alone = decomposition = 0
    for layer in layers:
        sides, kind, device = layer, dtype, "cuda"
        if isinstance(layer, Layer):
            sides, kind, device = layer.shape, working_dtype(layer), layer.weight.device.type
        size = kind.itemsize
        for side in sides:  # type: ignore[union-attr]
            k = rank_of(side, rank, dense_below)
            entries = side * (side if k is None else k)
            factors += entries * size
            posterior += entries * size + (side if k is None else k) * 8
            if k is None:
                # Matrix and eigenvectors in fp64, and the solver's 2 d^2 + 9 d or so numbers.
                double = 4 * entries + 10 * side
            else:
                double = 2 * (entries + k * k)
                buffers += side * buffer * size
                columns = k + min(buffer, 32)
                if k > 96 or (device != "cpu" and kind == torch.float64):
                    alone = max(alone, (columns + k) * side * size)
                elif device != "cpu":  # partial Gram matrices of 1024 rows, and their eigenproblem
                    partial = -(-side // 1024) + 2
                    together += (partial * columns + k) * columns * 8
            decomposition = max(decomposition, double * 8 - entries * size)
    workspace = max(together + alone, decomposition - buffers, 0)
    return MemoryEstimate(factors, buffers, workspace, posterior)


def working_dtype(layer: Layer) -> torch.dtype:
    """The dtype of a layer's factors and eigenvectors."""
    return torch.float64 if layer.weight.dtype == torch.float64 else torch.float32


def rank_of(size: int, rank: int | None, dense_below: int) -> int | None:
    """Rank at which a side is kept, or None for a dense factor."""
    return None if rank is None or size < dense_below or size <= rank else rank


class Sites:
    """The layers of a posterior by the module that is watched for them.

    Args:
        model: the model.
        layers: its layers.

    Attributes:
        layers: the layers.
        numbers: for each watched module the numbers of its layers.

    Raises:
        ValueError: no layers, two of one name or one parameter, or weights that are no parameters of
            the model.
        TypeError: a weight has the wrong dtype or shape.
    """

    def __init__(self, model: nn.Module, layers: Sequence[Layer]) -> None:
        self.layers = list(layers)
        names = [layer.name for layer in self.layers]
        if not names or len(set(names)) != len(names):
            raise ValueError(
                f"Laplace: layers must be a list of layers with distinct names, got {names}"
            )
        for layer in self.layers:
            if not layer.weight.is_floating_point() or layer.weight.dim() not in (1, 2):
                raise TypeError(
                    f"Laplace: layer {layer.name} must have a floating-point weight (out, in) or "
                    f"bias (out,), got {layer.weight.dtype} of shape {tuple(layer.weight.shape)}"
                )
        self._check_places(model)
        self.numbers: dict[nn.Module, list[int]] = {}
        for i, layer in enumerate(self.layers):
            self.numbers.setdefault(layer.module, []).append(i)

    def name(self, module: nn.Module) -> str:
        """Name of the first layer that a module is watched for."""
        return self.layers[self.numbers[module][0]].name

    def _check_places(self, model: nn.Module) -> None:
        """Refuses weights that are no parameters of the model, and one parameter in two layers."""
        places: dict[int, list[str]] = {}
        for name, module in model.named_modules():
            for kind, value in (*module._parameters.items(), *module._buffers.items()):
                if value is not None:
                    places.setdefault(id(value), []).append(f"{name}.{kind}".lstrip("."))
        first: dict[int, str] = {}
        for layer in self.layers:
            where = places.get(id(layer.weight))
            if where is None:
                raise ValueError(
                    f"Laplace: the weight of layer {layer.name} must be a parameter of the model, got "
                    "a tensor that is computed or belongs to another model: draws of it would have "
                    "no effect; leave the layer out"
                )
            other = first.setdefault(id(layer.weight), layer.name)
            if other != layer.name:
                raise ValueError(
                    f"Laplace: layers must have weights of their own, got one parameter for {other} "
                    f"and {layer.name}: it would need one posterior with both uses; leave them out, "
                    "or give one of them a copy"
                )
        for layer in self.layers:
            if len(where := places[id(layer.weight)]) > 1:
                warnings.warn(
                    f"Laplace: the weight of layer {layer.name} is also used as "
                    f"{', '.join(w for w in where if w != layer.name)}: the posterior has the "
                    "curvature of this layer alone, and draws of weights change both",
                    stacklevel=4,
                )

    def idle(self, module: nn.Module, called: Collection[nn.Module]) -> str:
        """What to say of a watched module that got no gradient.

        Args:
            module: the module.
            called: the watched modules that ran in a forward pass.
        """
        name = self.name(module)
        if module in called:
            return f"layer {name} must act on the logits, got no gradient for it; leave it out"
        why = ""
        if type(module) is nn.modules.linear.NonDynamicallyQuantizableLinear:
            why = " (nn.MultiheadAttention takes the weight of its out_proj without calling it)"
        return (
            f"layer {name} must be called in the forward pass, got a module that never was{why}; leave "
            "it out of the layers"
        )
