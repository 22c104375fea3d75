"""Adapted layers that are no linear layers, as the linear layers that they are on other inputs.

* A convolution is a linear layer on the patches of its input: A = `lora_A` with its filters flattened,
  (r, channels x kernel), and B = `lora_B`, a 1 x 1 convolution, (m, r).
* An embedding is a linear layer on one-hot vectors: A = `lora_embedding_A` (r, vocabulary), of which a
  token sees one column, and B = `lora_embedding_B` (m, r).

Methods see such a layer through its view, which has the factors as matrices and all else of the layer.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any, ClassVar

import torch
from peft.tuners.lora import layer as lora_layers
from torch import Tensor, nn

from .. import random, reference
from .initial import uniform_like

LAYER_KINDS = ("linear", "convolution", "embedding")


class _Factor:
    """One factor of a view, `weight` like that of `nn.Linear`."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight


class _Factors:
    """The factors of all adapters of a layer, by name; those of more dimensions flattened to matrices."""

    def __init__(self, entries: Any) -> None:
        self.entries = entries

    def __contains__(self, adapter: str) -> bool:
        return adapter in self.entries

    def __getitem__(self, adapter: str) -> _Factor:
        entry = self.entries[adapter]
        weight = getattr(entry, "weight", entry)
        return _Factor(weight.flatten(1) if weight.dim() > 2 else weight)


class View:
    """A layer as a linear one; what it does not have is the layer's.

    Class attributes:
        kind: what the layer is: one of `LAYER_KINDS`.

    Args:
        layer: PEFT's layer.
    """

    kind: ClassVar[str]

    def __init__(self, layer: Any) -> None:
        self.layer = layer

    def __getattr__(self, name: str) -> Any:
        if name == "layer":  # of an instance without it: copies and pickles ask
            raise AttributeError(name)
        return getattr(self.layer, name)

    @property
    def lora_A(self) -> _Factors:
        """A of each adapter."""
        return _Factors(self.layer.lora_A)

    @property
    def lora_B(self) -> _Factors:
        """B of each adapter."""
        return _Factors(self.layer.lora_B)

    @property
    def in_features(self) -> int:
        """Squared norm of an input whose features have variance 1: what scales noise and its prior."""
        raise NotImplementedError

    def laid_out(self, delta: Tensor) -> Tensor:
        """An update (m, n), laid out as the layer's weight."""
        raise NotImplementedError

    def start(self, adapter: str, stream: int) -> None:
        """Change the first factors of a new adapter where PEFT's suit no posterior."""

    def forward(
        self, variant: Any, adapter: str, x: Tensor, result: Tensor, mode: str, p: float
    ) -> Tensor:
        """result + the adapter's output, by a variant's `adapted` or `looked_up`, with dropout p."""
        raise NotImplementedError


class Patches(View):
    """A convolution, as a linear layer on patches; it copies the patches, kernel / stride times the input."""

    kind = "convolution"

    def __getattr__(self, name: str) -> Any:
        found = super().__getattr__(name)
        # The deviations of A are kept in the shape of A.
        is_ours = name.startswith("lora_") and isinstance(found, nn.ParameterDict)
        return _Matrices(found) if is_ours else found

    @property
    def in_features(self) -> int:
        """Channels times the size of the kernel."""
        return self.layer.get_base_layer().weight[0].numel()

    def laid_out(self, delta: Tensor) -> Tensor:
        """(m, channels, *kernel)."""
        return delta.reshape(self.layer.get_base_layer().weight.shape)

    def forward(
        self, variant: Any, adapter: str, x: Tensor, result: Tensor, mode: str, p: float
    ) -> Tensor:
        """As `View.forward`. Dropout comes before the patches, as in PEFT: one mask for all of them."""
        down = self.layer.lora_A[adapter]
        alone = x.dim() == down.weight.dim() - 1  # an example without a batch
        x, y = (x[None], result[None]) if alone else (x, result)
        rows = y.flatten(2).transpose(1, 2)  # (B, places, m)
        rows = variant.adapted(self, adapter, patches(down, variant.dropped(x, p)), rows, mode, 0.0)
        found = rows.transpose(1, 2).reshape(y.shape)
        return found[0] if alone else found


class _Matrices:
    """Tensors of a method by adapter; those of the shape of a convolution as matrices."""

    def __init__(self, entries: nn.ParameterDict) -> None:
        self.entries = entries

    def __contains__(self, adapter: str) -> bool:
        return adapter in self.entries

    def __getitem__(self, adapter: str) -> Tensor:
        entry = self.entries[adapter]
        return entry.flatten(1) if entry.dim() > 2 else entry


class Lookup(View):
    """An embedding, as a linear layer on one-hot vectors."""

    kind = "embedding"

    @property
    def lora_A(self) -> _Factors:
        """A of each adapter: a column for each token of the vocabulary."""
        return _Factors(self.layer.lora_embedding_A)

    @property
    def lora_B(self) -> _Factors:
        """B of each adapter."""
        return _Factors(self.layer.lora_embedding_B)

    @property
    def in_features(self) -> int:
        """1: the norm of a one-hot vector, whatever the vocabulary."""
        return 1

    def laid_out(self, delta: Tensor) -> Tensor:
        """(vocabulary, m)."""
        return delta.T

    def start(self, adapter: str, stream: int) -> None:
        """B = 0 and A from U(-1, 1), the law of `nn.Linear` for inputs of norm 1.

        PEFT starts embeddings at A = 0 with B from N(0, 1), which would let the first draws of A through.
        Factors that are trained stay as they are.
        """
        a, b = self.lora_A[adapter].weight, self.lora_B[adapter].weight
        if a.is_meta or bool(a.any()):
            return
        with torch.no_grad():
            a.copy_(
                uniform_like(a, a.shape, -1, 1, stream + 1)
            )  # `stream` is that of the deviation
            b.zero_()

    def forward(
        self, variant: Any, adapter: str, x: Tensor, result: Tensor, mode: str, p: float
    ) -> Tensor:
        """As `View.forward`. PEFT drops nothing out of embeddings."""
        h = variant.looked_up(self, adapter, x, mode)
        y = (h @ self.lora_B[adapter].weight.T) * self.layer.scaling[adapter]
        scale = self.layer._get_embed_scale()
        return result + (y if scale is None else y * scale.to(y.dtype))

    def columns(self, factor: Tensor, ids: Tensor, draws: Tensor | None = None) -> Tensor:
        """The columns (..., r) of a factor (r, n), or of factors (D, r, n) by draw, for tokens (...).

        The padding token's have no gradient, as in the base layer.
        """
        found = factor.T[ids] if draws is None else factor[draws.expand(ids.shape), :, ids]
        pad = self.layer.get_base_layer().padding_idx
        return found if pad is None else torch.where((ids == pad)[..., None], found.detach(), found)

    def flipped(
        self,
        e: Tensor,
        ids: Tensor,
        key: Tensor,
        stream: int,
        rows: Tensor,
    ) -> Tensor:
        """The noise of `functional.flipout_lora` for one-hot vectors: (R_in E^T) . R_out, (..., r).

        Of R_in a token needs the sign of its own column alone.

        Args:
            e: (r, n), the deviations times the normals.
            ids: (...), tokens.
            key, stream: the noise.
            rows: (...), the sign row of each token.
        """
        rank, n = e.shape
        inside = reference.signs_at(key, rows, ids, n, stream=stream)
        flat = rows.reshape(-1)
        outside = random.sign_bits(key, len(flat), rank, stream=stream, output=True, ids=flat)
        signs = inside[..., None] * outside.reshape(*ids.shape, rank)
        return self.columns(e, ids) * signs.to(e.dtype)


_VIEWS: dict[type, type[View]] = {
    lora_layers.Embedding: Lookup,
    lora_layers.Conv1d: Patches,
    lora_layers.Conv2d: Patches,
    lora_layers.Conv3d: Patches,
}


def as_linear(layer: Any) -> Any:
    """A layer as methods see it: itself where it is linear, else its view."""
    kind = _VIEWS.get(type(layer))
    return layer if kind is None else kind(layer)


def with_factors(layer: Any) -> Any:
    """What has a layer's factors as parameters, under the names of a linear layer."""
    return Lookup(layer) if type(layer) is lora_layers.Embedding else layer


def factor_parameters(layer: Any, adapter: str) -> tuple[nn.Parameter, nn.Parameter]:
    """A and B of an adapter, in PEFT's shapes."""
    found = with_factors(layer)
    return found.lora_A[adapter].weight, found.lora_B[adapter].weight


def factor_names(layer: Any) -> tuple[str, str]:
    """What A and B of an adapter are called in its file."""
    if type(layer) is lora_layers.Embedding:
        return "lora_embedding_A", "lora_embedding_B"
    return "lora_A.weight", "lora_B.weight"


def unsupported_target(layer: Any, kinds: Collection[str]) -> str | None:
    """Why no adapter of a method can sit on a layer, or None where it can.

    Args:
        layer: PEFT's layer.
        kinds: what the method's adapters can sit on.
    """
    view = _VIEWS.get(type(layer))
    if view is None:
        return None
    base = layer.get_base_layer()
    if view.kind not in kinds:
        return f"the method has no form for {view.kind}s, whose factors it cannot keep normalised"
    if view is Lookup:
        if base.max_norm is not None:
            return "max_norm rescales its weights in place, and would rescale A"
        if getattr(layer, "tp_layer", None) is not None:
            return "its weight is split by tensor parallelism"
        return None
    if base.groups > 1:
        return f"a convolution in {base.groups} groups is no product of two matrices"
    if base.padding_mode != "zeros":
        return (
            f"PEFT's factor pads with zeros, and the layer has padding_mode={base.padding_mode!r}"
        )
    if any(d != 1 for d in base.dilation):
        return f"PEFT's factor has no dilation, and the layer has {tuple(base.dilation)}"
    return None


def patches(down: Any, x: Tensor) -> Tensor:
    """The patches (B, places, channels x kernel) that a convolution multiplies, places in row-major order."""
    x = nn.functional.pad(x, down._reversed_padding_repeated_twice)
    dims = len(down.kernel_size)
    for d, (size, step) in enumerate(zip(down.kernel_size, down.stride, strict=True)):
        x = x.unfold(2 + d, size, step)
    # (B, C, *places, *kernel) to (B, *places, C, *kernel)
    x = x.movedim(1, 1 + dims)
    count = math.prod(x.shape[1 : 1 + dims])
    return x.reshape(x.shape[0], count, math.prod(x.shape[1 + dims :]))


__all__ = [
    "LAYER_KINDS",
    "Lookup",
    "Patches",
    "View",
    "as_linear",
    "factor_names",
    "factor_parameters",
    "patches",
    "unsupported_target",
    "with_factors",
]
