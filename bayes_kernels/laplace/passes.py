"""Passes over a model: how its batches are read, and taps that show inputs and gradients of layers."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from ..batches import IGNORED, eval_mode, inputs_of, labels_of, mask_of, to_device
from .layers import Sites


class Reader:
    """How a model and its batches are read: the functions that `Laplace` gets.

    Args:
        model: the model.
        forward: (model, batch) -> logits (B, C), or (B, T, C) for labels of tokens.
        labels: batch -> class indices (B,); (B, T), -100 where none counts, for labels of tokens.
        mask: batch -> (B, T) or (B, K, T).
        split: (batch, n) -> at most n batches.
    """

    def __init__(
        self,
        model: nn.Module,
        forward: Callable[[nn.Module, Any], Tensor] | None = None,
        labels: Callable[[Any], Tensor | None] | None = None,
        mask: Callable[[Any], Tensor | None] | None = None,
        split: Callable[[Any, int], Sequence[Any]] | None = None,
    ) -> None:
        self.model = model
        self._forward, self._split = forward, split
        self._labels, self._mask = labels or labels_of, mask or mask_of

    def prepare(self, batch: Any) -> Any:
        """The batch on the device of the model's first parameter."""
        return to_device(batch, next(self.model.parameters()).device)

    def parts(self, batch: Any, count: int) -> Iterator[tuple[Any, int | None]]:
        """The batch on the model's device, in at most `count` parts where it can be split.

        Yields:
            Each part, and how many there are; None where batches are taken whole.
        """
        if self._split is None:
            yield self.prepare(batch), None
            return
        parts = [batch] if count < 2 else self._split(batch, count)
        for part in parts:
            yield self.prepare(part), len(parts)

    def logits(self, batch: Any) -> Tensor:
        """Logits (B, C) or (B, T, C) of a prepared batch."""
        if self._forward is not None:
            logits = self._forward(self.model, batch)
        elif isinstance(batch, Mapping):
            logits = self.model(**inputs_of(batch))
            logits = getattr(logits, "logits", logits)
        else:
            logits = self.model(batch[0] if isinstance(batch, (tuple, list)) else batch)
        if not isinstance(logits, Tensor) or logits.dim() not in (2, 3) or logits.shape[-1] < 2:
            got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(
                "Laplace: the model must return logits (B, C), or (B, T, C) for labels of tokens, with C "
                f"of at least 2, got {got}; pass forward=lambda model, batch: ... that returns them"
            )
        return logits

    def labels(self, batch: Any, logits: Tensor) -> Tensor | None:
        """Class indices (B,) or (B, T) on the device of the logits, or None where there are none."""
        labels = self._labels(batch)
        if labels is None:
            return None
        if labels.shape != logits.shape[:-1] or labels.is_floating_point():
            raise ValueError(
                f"Laplace: labels must be class indices of shape {tuple(logits.shape[:-1])}, got "
                f"{labels.dtype} of shape {tuple(labels.shape)}; pass labels=lambda batch: ..."
            )
        labels = labels.to(logits.device, torch.int64)
        some = labels if labels.dim() == 1 else labels[labels != IGNORED]
        if some.numel() and not 0 <= int(some.min()) <= int(some.max()) < logits.shape[-1]:
            raise ValueError(
                f"Laplace: labels must be in [0, {logits.shape[-1]}), got {int(some.min())} to "
                f"{int(some.max())}"
            )
        return labels

    def mask(self, batch: Any) -> Tensor | None:
        """Valid tokens (B, T) or (B, K, T), bool; None where all are."""
        mask = self._mask(batch)
        return None if mask is None else mask.bool()


class _Deliver(torch.autograd.Function):
    """Hands the gradients of all vectorised backward passes to a collector at once."""

    generate_vmap_rule = False

    @staticmethod
    def forward(x: Tensor, dy: Tensor, collect: Any, module: nn.Module) -> Tensor:  # type: ignore[override]
        collect(module, x, dy.unsqueeze(0))
        return dy.new_zeros(())

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def vmap(  # type: ignore[override]
        info: Any, in_dims: Any, x: Tensor, dy: Tensor, collect: Any, module: nn.Module
    ) -> tuple[Tensor, None]:
        if in_dims[0] is not None:  # recomputed under vmap: the same for each backward pass
            x = x.select(in_dims[0], 0)
        if in_dims[1] is None:
            dy = dy.expand(info.batch_size, *dy.shape)
        else:
            dy = dy.movedim(in_dims[1], 0)
        collect(module, x, dy)
        return dy.new_zeros(()), None


class _Tap(torch.autograd.Function):
    """The identity on a layer's output, which shows the layer's input and output gradient.

    The input is kept as a saved tensor, and so is subject to whatever autograd does with those:
    gradient checkpointing does not store it, it is freed with the graph.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        y: Tensor, x: Tensor, anchor: Tensor, collect: Any, module: nn.Module
    ) -> Tensor:
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        y, x, _, ctx.collect, ctx.module = inputs
        ctx.save_for_backward(x)
        # Not a view: the model may go on in place, as ReLU(inplace=True) does.
        ctx.mark_dirty(y)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> tuple[Tensor, None]:  # type: ignore[override]
        # Recomputation by gradient checkpointing: the same for each of the backward passes.
        return _Tap.apply(*args), None

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None, None]:  # type: ignore[override]
        if ctx.collect is not None:  # not taken already, as `take_last` does
            (x,) = ctx.saved_tensors
            _Deliver.apply(x, dy, ctx.collect, ctx.module)
        return dy, None, None, None, None


class Last(NamedTuple):
    """A watched module whose output is the logits, so that its output gradients are known.

    Attributes:
        module: the module.
        x: its input (B, ..., n).
        alone: whether no other watched module can be below it.
    """

    module: nn.Module
    x: Tensor
    alone: bool


def take_last(logits: Tensor) -> Last | None:
    """The watched module whose output is `logits`, which backward passes then leave out; or None."""
    node: Any = logits.grad_fn
    if getattr(type(node), "_forward_cls", None) is not _Tap:
        return None
    (x,) = node.saved_tensors
    node.collect = None
    return Last(node.module, x, node.next_functions[0][0] is None)


class Collector:
    """Takes the input and output gradients of watched modules, in the order of the backward pass.

    Attributes:
        sites: the layers.
        called: the modules that ran in a forward pass.
        seen: the modules that the present backward pass has reached.
        skipped: modules that the present backward pass leaves out.
    """

    def __init__(self, sites: Sites) -> None:
        self.sites = sites
        self.called: set[nn.Module] = set()
        self.seen: set[nn.Module] = set()
        self.skipped: set[nn.Module] = set()

    def __call__(self, module: nn.Module, x: Tensor, dy: Tensor) -> None:
        """Take one module: `collect` gets the numbers of its layers."""
        if module in self.skipped:
            return
        if module in self.seen:
            raise ValueError(
                f"Laplace: layer {self.sites.name(module)} must be used once in a forward pass, got "
                "a second use; leave it out of the layers"
            )
        self.seen.add(module)
        self.collect(self.sites.numbers[module], x, dy)

    def collect(self, numbers: list[int], x: Tensor, dy: Tensor) -> None:
        """What a subclass does with the input x (B, ..., n) and output gradients dy (V, B, ..., m)."""
        raise NotImplementedError

    def saw(self, x: Tensor, y: Tensor) -> None:
        """A watched module ran with input x and output y, and its graph is kept."""

    def require_gradient(self, logits: Tensor) -> None:
        """Raise where logits do not depend on any layer."""
        if logits.requires_grad:
            return
        idle = [m for m in self.sites.numbers if m not in self.called]
        if idle:
            raise ValueError(f"Laplace: {self.sites.idle(idle[0], self.called)}")
        raise ValueError(
            "Laplace: the layers must act on the logits, got logits without a graph; check the layers, "
            "and use gradient checkpointing with use_reentrant=False"
        )


def _first(args: Any, kwargs: Any) -> Any:
    """A module's first argument."""
    return args[0] if args else next(iter(kwargs.values()), None)


@contextlib.contextmanager
def watched(model: nn.Module, collect: Collector) -> Iterator[Tensor]:
    """Eval mode, all parameters frozen, taps on the modules; everything restored at the end.

    Gradients flow from the taps' anchor instead of from parameters: no parameter's gradient is
    computed, and nothing below the first layer is kept. Yields the anchor.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    with torch.inference_mode(False):
        anchor = torch.zeros((), requires_grad=True)

    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        collect.called.add(module)
        if not torch.is_grad_enabled():  # the forward pass of reentrant checkpointing
            return None
        x = _first(args, kwargs)
        if not isinstance(x, Tensor) or not isinstance(output, Tensor):
            raise ValueError(
                f"Laplace: watched modules must take and return one tensor, got "
                f"{type(module).__name__} with {type(x).__name__} and {type(output).__name__}"
            )
        collect.saw(x, output)
        return _Tap.apply(output, x.detach(), anchor, collect, module)

    handles = [m.register_forward_hook(hook, with_kwargs=True) for m in collect.sites.numbers]
    try:
        for p in trainable:
            p.requires_grad_(False)
        with eval_mode(model), torch.inference_mode(False), torch.enable_grad():
            yield anchor
    finally:
        for handle in handles:
            handle.remove()
        for p in trainable:
            p.requires_grad_(True)


def backward_at_once(
    logits: Tensor, anchor: Tensor, cotangents: Tensor, *, retain_graph: bool
) -> None:
    """Backward passes of several gradients (V, B, C) of the logits as one vectorised pass.

    Raises:
        RuntimeError: an operation cannot be vectorised; modules before it have been delivered.
    """

    def pull(cotangent: Tensor) -> Tensor:
        torch.autograd.grad(logits, anchor, cotangent, retain_graph=retain_graph, allow_unused=True)
        return cotangent.new_zeros(())

    with warnings.catch_warnings():
        # Attention kernels whose backward runs once for each gradient instead.
        warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
        torch.func.vmap(pull)(cotangents)


def by_example(rows: Tensor, batch: int, tokens: int | None, name: str) -> Tensor:
    """Rows of a layer as (B, T, d)."""
    d = rows.shape[-1]
    if rows.dim() >= 2 and rows.shape[0] == batch:
        return rows.reshape(batch, -1, d)
    if rows.dim() == 2 and tokens is not None and rows.shape[0] == batch * tokens:
        return rows.reshape(batch, tokens, d)
    raise ValueError(
        f"Laplace: layer {name} must see the {batch} examples in its first dimension, got "
        f"{tuple(rows.shape)}; leave it out of the layers"
    )


def checkpointed_reentrantly(output: Tensor) -> bool:
    """Whether the graph of a tensor has a node of `checkpoint(..., use_reentrant=True)`."""
    kind = torch.utils.checkpoint.CheckpointFunction
    waiting, seen = [output.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if getattr(type(node), "_forward_cls", None) is kind:
            return True
        waiting += [following for following, _ in node.next_functions]
    return False


def where_not_finite(reader: Reader, sites: Sites, batch: Any) -> str:
    """Which layer is the first to see or to give a NaN or an infinity for a batch."""
    found: list[str] = []

    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        for what, value in (("inputs", _first(args, kwargs)), ("outputs", output)):
            if isinstance(value, Tensor) and not bool(torch.isfinite(value).all()):
                found.append(f"{what} of {sites.name(module)}")

    handles = [m.register_forward_hook(hook, with_kwargs=True) for m in sites.numbers]
    try:
        with torch.no_grad():
            reader.logits(batch)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else "the logits, behind the last layer"
