"""Laplace: curvature, evidence and linearised predictions."""

from __future__ import annotations

import contextlib
import hashlib
import math
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from .. import functional, random, reference
from ..batches import eval_mode, inputs_of, is_empty, labels_of, mask_of, repeated, to_device

FISHERS = ("ggn", "mc", "empirical")
TOKENS = ("expand", "reduce", "last")
METHODS = ("mc", "mc_independent", "quadrature", "probit", "bridge", "weights")


# --- layers ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """One linear map inside a model whose weight gets a posterior: the protocol of this module.

    The map need not be a module of its own. It is described by a module that is called in the forward
    pass, and by how the map's input and the gradient of its output follow from those of the module.
    Examples are the leading dimension; a layer is used once in a forward pass.

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
        bias: whether biases that require a gradient (or, with names, all) get a block of their own.

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
        buffers: rows that wait for compression.
        workspace: most that compressing, or taking the factors' eigenvectors when the model's passes
            are over, adds to `total` for a moment.
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
    """What the curvature of these layers takes, before anything runs.

    Args:
        layers: layers, or their shapes (out, in), which stand for layers on a GPU.
        rank, dense_below, buffer: as in `Laplace`.
        dtype: of layers given as shapes: that of their factors, fp32 or fp64.

    Example:
        shapes = [(8, 4096), (4096, 8)] * 64  # LoRA of rank 8 on 64 projections
        print(estimate_memory(shapes))
    """
    factors = buffers = posterior = together = alone = decomposition = 0
    for layer in layers:
        sides, kind, device = layer, dtype, "cuda"
        if isinstance(layer, Layer):
            sides, kind, device = layer.shape, _working_dtype(layer), layer.weight.device.type
        size = kind.itemsize
        for side in sides:  # type: ignore[union-attr]
            k = _rank_of(side, rank, dense_below)
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


def _working_dtype(layer: Layer) -> torch.dtype:
    """Of a layer's factors and eigenvectors."""
    return torch.float64 if layer.weight.dtype == torch.float64 else torch.float32


def _rank_of(size: int, rank: int | None, dense_below: int) -> int | None:
    """Rank at which a side is kept, or None for a dense factor."""
    return None if rank is None or size < dense_below or size <= rank else rank


# --- watching a forward and backward pass ------------------------------------------------------


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
        (x,) = ctx.saved_tensors
        _Deliver.apply(x, dy, ctx.collect, ctx.module)
        return dy, None, None, None, None


class _Collector:
    """What `_watched` calls for each backward pass of a module; `called`: those that ran forward."""

    def __init__(self) -> None:
        self.called: set[nn.Module] = set()

    def __call__(self, module: nn.Module, x: Tensor, dy: Tensor) -> None:
        raise NotImplementedError


def _first(args: Any, kwargs: Any) -> Any:
    """A module's first argument."""
    return args[0] if args else next(iter(kwargs.values()), None)


@contextlib.contextmanager
def _watched(
    model: nn.Module, modules: Iterable[nn.Module], collect: _Collector
) -> Iterator[Tensor]:
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
        return _Tap.apply(output, x.detach(), anchor, collect, module)

    handles = [m.register_forward_hook(hook, with_kwargs=True) for m in modules]
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


# --- Kronecker factors -------------------------------------------------------------------------


class _Factor:
    """The sum of outer products of one side: dense (d, d), or (d, k) and a few rows that wait."""

    def __init__(
        self, size: int, rank: int | None, buffer: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.rank = rank
        shape = (size, size if rank is None else rank)
        self.sum = torch.zeros(shape, dtype=dtype, device=device)
        self.buffer = None
        self.waiting = 0
        if rank is not None:
            self.buffer = torch.empty((buffer, size), dtype=dtype, device=device)

    def add(self, rows: Tensor, weights: Tensor | None) -> None:
        """Add rows (N, d), in the working dtype or narrower, with weights (N,)."""
        if self.buffer is None:
            functional.kron_accumulate_([self.sum], [rows], masks=[weights])
            return
        if weights is not None:
            kept = weights.nonzero()[:, 0]
            rows = rows.index_select(0, kept).to(self.sum.dtype)  # a copy
            rows.mul_(weights.index_select(0, kept).to(rows.dtype).sqrt()[:, None])
        count = rows.shape[0]
        if self.waiting + count <= self.buffer.shape[0]:
            self.buffer[self.waiting : self.waiting + count] = rows
            self.waiting += count
            return
        # Too many to wait for other layers.
        rows = rows.to(self.sum.dtype)
        if self.waiting:
            rows = torch.cat([self.buffer[: self.waiting], rows])
            self.waiting = 0
        functional.low_rank_update_([self.sum], [rows])

    def merge(self, group: Any) -> None:
        """The sum over processes. Low-rank factors are gathered and compressed again."""
        if self.rank is None:
            torch.distributed.all_reduce(self.sum, group=group)
            return
        parts = [torch.empty_like(self.sum) for _ in range(torch.distributed.get_world_size(group))]
        torch.distributed.all_gather(parts, self.sum, group=group)
        self.sum.zero_()
        functional.low_rank_update_([self.sum], [torch.cat([p.T for p in parts])])

    def decompose(self) -> tuple[Tensor, Tensor]:
        """Eigenvectors (d, k) with values (k,) fp64, falling, not negative. The sum is gone then.

        Columns without weight are zero, so that a low-rank factor of few rows stays exact.
        """
        dtype, wide = self.sum.dtype, self.sum.double()
        self.sum = self.sum.new_empty(0)
        if self.rank is None:
            values, vectors = torch.linalg.eigh(wide)
            values, vectors = values.flip(0), vectors.flip(1)
        else:
            values, rotation = torch.linalg.eigh(wide.T @ wide)
            values, rotation = values.flip(0), rotation.flip(1)
            kept = values > values[0].clamp(min=0) * torch.finfo(dtype).eps ** 2
            scale = torch.where(kept, values.clamp(min=torch.finfo(torch.float64).tiny), 1).rsqrt()
            vectors = wide @ (rotation * torch.where(kept, scale, 0))
            values = torch.where(kept, values, 0)
        del wide
        # Eigenvalues that are zero come out slightly negative.
        return vectors.to(dtype), values.clamp(min=0)


def _flush(factors: Iterable[_Factor]) -> None:
    """Compress waiting rows, all layers in one call."""
    ready = [f for f in factors if f.waiting]
    rows = [f.buffer[: f.waiting] for f in ready if f.buffer is not None]
    functional.low_rank_update_([f.sum for f in ready], rows)
    for factor in ready:
        factor.waiting = 0


def _by_example(rows: Tensor, batch: int, tokens: int | None, name: str) -> Tensor:
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


def _token_rows(
    rows: Tensor, kind: str, valid: Tensor | None, *, gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """What enters a factor from rows (B, T, d): rows (N, d) and weights (N,) or None."""
    batch, tokens, d = rows.shape
    if tokens == 1:
        return rows[:, 0], None
    if kind == "last":
        if valid is None:
            return rows[:, -1], None
        position = torch.arange(tokens, device=rows.device)
        last = torch.where(valid, position, -1).amax(1).clamp(min=0)
        return rows.gather(1, last[:, None, None].expand(-1, 1, d))[:, 0], None
    wide = torch.float64 if rows.dtype == torch.float64 else torch.float32
    if valid is None:
        count = torch.full((batch,), tokens, dtype=wide, device=rows.device)
    else:
        count = valid.sum(1).clamp(min=1).to(wide)
    if kind == "reduce":
        if valid is not None:
            rows = rows.masked_fill(~valid[:, :, None], 0)
        total = rows.sum(1, dtype=wide)
        return (total if gradient else total / count[:, None]), None
    flat = rows.reshape(-1, d)
    if gradient:
        return flat, None if valid is None else valid.reshape(-1).to(wide)
    weights = (1 / count)[:, None].expand(batch, tokens)
    if valid is not None:
        weights = weights * valid
    return flat, weights.reshape(-1)


def _softmax_root(logits: Tensor) -> list[Tensor]:
    """C - 1 columns (B, C) of a matrix R with R R^T = diag(p) - p p^T for each example.

    F = diag(sqrt p) - p sqrt(p)^T has that product and F sqrt(p) = 0: a reflection that takes
    sqrt(p) to the first axis makes its first column zero, which saves one backward pass.
    """
    p = logits.softmax(-1)
    root = p.sqrt()
    f = torch.diag_embed(root) - p[:, :, None] * root[:, None, :]
    reflected = f - f[:, :, :1] * (root / (1 + root[:, :1]))[:, None, :]
    return [reflected[:, :, c] for c in range(1, logits.shape[1])]


def _sampled_errors(logits: Tensor, key: Tensor, index: Tensor, draws: int) -> list[Tensor]:
    """(p - onehot(y)) / sqrt(draws) (B, C) for labels y ~ p, drawn by example index."""
    p = logits.softmax(-1)
    cumulative = p.cumsum(-1)
    errors = []
    for draw in range(draws):
        words = reference.philox(reference.fold_in(key, draw), index)[:, 0]
        uniform = (words.double() + 0.5) * 2.0**-32
        label = (cumulative < uniform[:, None]).sum(-1).clamp(max=p.shape[1] - 1)
        hot = nn.functional.one_hot(label, p.shape[1])
        errors.append((p - hot) / math.sqrt(draws))
    return errors


# --- posterior ---------------------------------------------------------------------------------


@dataclass
class _Block:
    """Posterior of one layer: eigenpairs of both factors, scaled so that products are precisions."""

    u: Tensor  # (in, k_in)
    mu: Tensor  # (k_in,) fp64
    q: Tensor  # (out, k_out)
    nu: Tensor  # (k_out,) fp64

    @property
    def products(self) -> Tensor:
        """nu_j mu_i, (k_out, k_in) fp64."""
        return self.nu[:, None] * self.mu[None, :]

    def to(self, device: torch.device) -> _Block:
        """The same on a device."""
        return _Block(*(t.to(device) for t in (self.u, self.mu, self.q, self.nu)))

    def complete(self, side: str) -> bool:
        """Whether the eigenvectors of a side span all of it."""
        vectors = self.u if side == "in" else self.q
        return vectors.shape[0] == vectors.shape[1]


@dataclass(frozen=True)
class Prediction:
    """Predictive distribution of one batch.

    Attributes:
        log_probs: (B, C) logarithm of the mean distribution.
        entropy: (B,) its entropy in nats: total uncertainty.
        expected_entropy: (B,) mean entropy of the draws, the part that is not due to the weights;
            None for method "probit".
        logit_mean, logit_cov: (B, C) and (B, C, C) of the linearised model; None for "weights".
    """

    log_probs: Tensor
    entropy: Tensor
    expected_entropy: Tensor | None
    logit_mean: Tensor | None = None
    logit_cov: Tensor | None = None

    @property
    def probs(self) -> Tensor:
        """(B, C)."""
        return self.log_probs.exp()

    @property
    def mutual_information(self) -> Tensor:
        """(B,) entropy - expected_entropy in nats: what is due to uncertainty about the weights."""
        if self.expected_entropy is None:
            raise ValueError(
                "mutual_information: method 'probit' gives no expected entropy; use 'mc' or 'bridge'"
            )
        return self.entropy - self.expected_entropy


class Laplace:
    """Gaussian posterior over the weights of linear layers, around their trained values.

    Args:
        model: a trained classifier. Its parameters, their gradients, requires_grad flags and
            training mode are as before after every call.
        layers: the layers that get a posterior; None for `linear_layers(model)`.
        rank: k, columns of low-rank factors; None for dense factors everywhere.
        dense_below: sides with fewer entries have dense factors.
        fisher: "ggn", the exact generalised Gauss-Newton matrix of the softmax likelihood (C - 1
            backward passes for each batch); "mc", labels drawn from the model (`mc_samples` backward
            passes); "empirical", the labels of the data (one; a worse approximation).
        tokens: what a sequence contributes. "expand": every token, a's factor divided by their number;
            "reduce": outer products of the mean of a and the sum of g; "last": the last token only,
            which is exact for a head that sees nothing else. The same for one token.
        prior_precision: delta, one number, or a tensor with one for each layer.
        forward: (model, batch) -> logits (B, C). None: model(x) for batches (x, y), and
            model(**batch without labels).logits for mappings.
        labels: batch -> class indices (B,), or None. None: batch[1], or batch["labels"].
        mask: batch -> (B, T) of valid tokens, or None. None: batch["attention_mask"] where there is
            one. (B, K, T) where an example is K sequences, as in multiple choice.
        buffer: rows that wait before a low-rank factor is compressed.
        mc_samples, seed: draws of labels for fisher "mc".
        jacobian: "vmap": the C backward passes of a prediction as one vectorised pass; "repeat": as
            one ordinary pass over C copies of the batch, for models with operations that cannot be
            vectorised, at C times the memory for activations.
        depends_on: further weights that were trained together with the layers'. The posterior belongs
            to these values and those of the layers; where any of them has changed since `fit`, every
            use of the posterior raises, instead of describing another model.
        split: (batch, n) -> at most n smaller batches, its examples in order. With it `fit` takes the
            halves of a batch, as it keeps a graph for several backward passes, and "validation" as
            many parts as there are classes, each of which costs as many gradients: both then stay
            below an ordinary training step with the whole batch. None: batches are taken whole.

    Gradient checkpointing is respected; transformers' models checkpoint in training mode only, and
    are run in eval mode here. Batches are moved to the device of the first parameter; `forward`,
    `labels` and `mask` get them, or their parts, after that.

    Raises:
        ValueError, TypeError: options or layers do not fit.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[Layer] | None = None,
        *,
        rank: int | None = 10,
        dense_below: int = 512,
        fisher: str = "ggn",
        tokens: str = "expand",
        prior_precision: float | Tensor = 1.0,
        forward: Callable[[nn.Module, Any], Tensor] | None = None,
        labels: Callable[[Any], Tensor | None] | None = None,
        mask: Callable[[Any], Tensor | None] | None = None,
        buffer: int = 32,
        mc_samples: int = 1,
        seed: int = 0,
        jacobian: str = "vmap",
        depends_on: Iterable[Tensor] = (),
        split: Callable[[Any, int], Sequence[Any]] | None = None,
    ) -> None:
        for name, value, choices in (
            ("fisher", fisher, FISHERS),
            ("tokens", tokens, TOKENS),
            ("jacobian", jacobian, ("vmap", "repeat")),
        ):
            if value not in choices:
                raise ValueError(
                    f"Laplace: {name} must be one of {choices}, got {value!r}; choose one"
                )
        for name, number in (("rank", 1 if rank is None else rank), ("mc_samples", mc_samples)):
            if number < 1:
                raise ValueError(f"Laplace: {name} must be at least 1, got {number}")
        if buffer < 1 or dense_below < 1:
            raise ValueError(
                f"Laplace: buffer and dense_below must be at least 1, got {buffer}, {dense_below}"
            )
        self.model = model
        self.layers = list(linear_layers(model) if layers is None else layers)
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
        self._check_places()
        self.rank, self.dense_below, self.buffer = rank, dense_below, buffer
        self.fisher, self.tokens, self.jacobian = fisher, tokens, jacobian
        self.mc_samples, self.seed = mc_samples, seed
        self._forward, self._labels, self._mask = forward, labels, mask
        self._split = split
        self._classes = 1  # as `fit` saw them
        self._trained = [*(layer.weight for layer in self.layers), *depends_on]
        self._digest = b""
        self._versions: list[tuple[int, int]] = []
        self._sites: dict[nn.Module, list[int]] = {}
        for i, layer in enumerate(self.layers):
            self._sites.setdefault(layer.module, []).append(i)
        self._blocks: list[_Block] | None = None
        self.n_examples = 0
        self.log_likelihood: float | None = None
        self.prior_precision = prior_precision  # type: ignore[assignment]

    def _check_places(self) -> None:
        """Refuses weights that are no parameters of the model, and one parameter in two layers."""
        places: dict[int, list[str]] = {}
        for name, module in self.model.named_modules():
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
                    stacklevel=3,
                )

    def _idle(self, module: nn.Module, called: Iterable[nn.Module]) -> str:
        """What to say of a watched module that got no gradient."""
        name = self.layers[self._sites[module][0]].name
        if module in called:
            return f"layer {name} must act on the logits, got no gradient for it; leave it out"
        why = ""
        if type(module) is nn.modules.linear.NonDynamicallyQuantizableLinear:
            why = " (nn.MultiheadAttention takes the weight of its out_proj without calling it)"
        return (
            f"layer {name} must be called in the forward pass, got a module that never was{why}; leave "
            "it out of the layers"
        )

    # --- options and batches -------------------------------------------------------------------

    @property
    def prior_precision(self) -> Tensor:
        """delta: 0-dim, or (layers,); fp64 on the CPU."""
        return self._prior_precision

    @prior_precision.setter
    def prior_precision(self, value: float | Tensor) -> None:
        delta = torch.as_tensor(value, dtype=torch.float64).detach().cpu().clone()
        if delta.shape not in ((), (len(self.layers),)) or not bool((delta > 0).all()):
            raise ValueError(
                f"Laplace: prior_precision must be one positive number, or one for each of the "
                f"{len(self.layers)} layers, got {value}"
            )
        self._prior_precision = delta

    def estimate_memory(self) -> MemoryEstimate:
        """What `fit` takes beyond a forward and backward pass of the model."""
        return estimate_memory(
            self.layers, rank=self.rank, dense_below=self.dense_below, buffer=self.buffer
        )

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _parts(self, batch: Any, count: int) -> Iterator[Any]:
        """The batch on the model's device, in at most `count` parts where it can be split."""
        parts = [batch] if self._split is None or count < 2 else self._split(batch, count)
        return (to_device(part, self._device) for part in parts)

    def _where_not_finite(self, batch: Any) -> str:
        """Which layer is the first to see or to give a NaN or an infinity."""
        found: list[str] = []

        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            for what, value in (("inputs", _first(args, kwargs)), ("outputs", output)):
                if isinstance(value, Tensor) and not bool(torch.isfinite(value).all()):
                    found.append(f"{what} of {self.layers[self._sites[module][0]].name}")

        handles = [m.register_forward_hook(hook, with_kwargs=True) for m in self._sites]
        try:
            with torch.no_grad():
                self._logits(batch)
        finally:
            for handle in handles:
                handle.remove()
        return found[0] if found else "the logits, behind the last layer"

    def _logits(self, batch: Any) -> Tensor:
        if self._forward is not None:
            logits = self._forward(self.model, batch)
        elif isinstance(batch, Mapping):
            logits = self.model(**inputs_of(batch))
            logits = getattr(logits, "logits", logits)
        else:
            logits = self.model(batch[0] if isinstance(batch, (tuple, list)) else batch)
        if not isinstance(logits, Tensor) or logits.dim() != 2 or logits.shape[1] < 2:
            got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(
                f"Laplace: the model must return logits (B, C) with C of at least 2, got {got}; pass "
                "forward=lambda model, batch: ... that returns them"
            )
        return logits

    def _labels_of(self, batch: Any) -> Tensor | None:
        return (self._labels or labels_of)(batch)

    def _valid(self, batch: Any) -> Tensor | None:
        mask = (self._mask or mask_of)(batch)
        return None if mask is None else mask.bool()

    # --- curvature -----------------------------------------------------------------------------

    def fit(
        self, loader: Iterable[Any], *, verbose: bool = True, distributed: bool | None = None
    ) -> Laplace:
        """One pass over the training data: curvature and log-likelihood.

        With several processes each passes its share of the data (every example once in all), and
        factors are combined at the end: dense ones are summed, low-rank ones gathered and compressed
        again. The result is that of one process, exactly for dense factors and where no factor has
        seen more than k rows, else up to the truncation of low-rank factors.

        Args:
            loader: batches, as `forward`, `labels` and `mask` take them.
            verbose: write the memory estimate to stderr first.
            distributed: None to combine processes where a process group exists.

        Returns:
            self.

        Raises:
            ValueError: a layer has no curvature (an untrained LoRA adapter has B = 0), is used twice,
                or batches do not fit.

        Cost: for each batch one forward pass and C - 1 ("ggn"), mc_samples ("mc") or one backward
        passes without gradients of parameters; memory as `estimate_memory` says.
        """
        for layer in self.layers:
            if layer.gate is not None and not bool(layer.gate.any()):
                raise ValueError(
                    f"Laplace.fit: layer {layer.name} must have gradients, got another factor that "
                    "is all zeros (LoRA's B before training); train the adapter first or leave the "
                    "layer out"
                )
        world = _processes(distributed)
        if verbose and world.rank == 0:
            print(f"Laplace: {self.estimate_memory()}", file=sys.stderr)
        sides = [self._empty(layer) for layer in self.layers]
        key = reference.fold_in(random.key(self.seed), 0)
        log_likelihood, labelled = 0.0, True
        examples = 0
        collect = _Accumulator(self, sides)
        errors = torch.zeros(())  # largest entry of any column
        filled = (raw for raw in loader if not is_empty(raw))
        with _watched(self.model, self._sites, collect):
            for batch in (part for raw in filled for part in self._parts(raw, 2)):
                logits = self._logits(batch)
                self._require_gradient(logits, collect)
                b, self._classes = logits.shape
                wide = logits.detach().to(torch.promote_types(logits.dtype, torch.float32))
                if not bool(torch.isfinite(wide).all()):
                    raise ValueError(
                        f"Laplace.fit: logits must be finite, got NaN or infinity, first in "
                        f"{self._where_not_finite(batch)} (examples {examples} to {examples + b - 1} "
                        "of the loader); look at these inputs, or run the model in float32 or bfloat16"
                    )
                labels = self._labels_of(batch)
                if labels is None:
                    labelled = False
                    if self.fisher == "empirical":
                        raise ValueError(
                            "Laplace.fit: batches must have labels for fisher='empirical', got "
                            "none; pass labels=lambda batch: ..."
                        )
                else:
                    labels = _check_labels(labels, wide)
                    log_likelihood -= float(
                        nn.functional.cross_entropy(wide.double(), labels, reduction="sum")
                    )
                # The global index of the examples where processes take turns.
                index = (examples + torch.arange(b, device=wide.device)) * world.size + world.rank
                examples += b
                if self.fisher == "ggn":
                    columns = _softmax_root(wide)
                elif self.fisher == "mc":
                    columns = _sampled_errors(wide, key.to(wide.device), index, self.mc_samples)
                else:
                    hot = nn.functional.one_hot(labels, wide.shape[1])  # type: ignore[arg-type]
                    columns = [wide.softmax(-1) - hot]
                errors = errors.to(wide).maximum(torch.stack(columns).abs().max())
                collect.start(b, self._valid(batch))
                for i, column in enumerate(columns):
                    collect.first_column = i == 0
                    collect.seen.clear()
                    logits.backward(column.to(logits.dtype), retain_graph=i + 1 < len(columns))
                collect.finish(len(columns))
        _flush(side for pair in sides for side in pair)
        for pair in sides:
            for side in pair:
                side.buffer = None
        if world.size > 1:
            for pair in sides:
                for side in pair:
                    side.merge(None)
            device = sides[0][0].sum.device
            totals = torch.tensor(
                [examples, log_likelihood, float(labelled)], dtype=torch.float64, device=device
            )
            torch.distributed.all_reduce(totals)
            examples, log_likelihood = int(totals[0]), float(totals[1])
            labelled = float(totals[2]) == world.size
        if examples == 0:
            raise ValueError("Laplace.fit: loader must give at least one example, got none")
        self._blocks = self._decompose(sides, examples, collect.called, float(errors))
        self._digest, self._versions = _digest(self._trained), _versions(self._trained)
        self.n_examples = examples
        self.log_likelihood = log_likelihood if labelled else None
        return self

    def _empty(self, layer: Layer) -> tuple[_Factor, _Factor]:
        out, n = layer.shape
        dtype, device = _working_dtype(layer), layer.weight.device
        i, o = (
            _Factor(s, _rank_of(s, self.rank, self.dense_below), self.buffer, dtype, device)
            for s in (n, out)
        )
        return i, o

    def _decompose(
        self,
        sides: list[tuple[_Factor, _Factor]],
        examples: int,
        called: Iterable[nn.Module],
        errors: float,
    ) -> list[_Block]:
        blocks: list[_Block] = []
        while sides:  # factors are freed as the posterior is made
            layer = self.layers[len(blocks)]
            activation, gradient = sides.pop(0)
            for what, side in (("inputs", activation), ("gradients", gradient)):
                if not bool(torch.isfinite(side.sum).all()):
                    raise ValueError(
                        f"Laplace.fit: {what} of layer {layer.name} must be finite, got NaN or "
                        "infinity; run the model in float32 or bfloat16"
                    )
            (u, mu), (q, nu) = activation.decompose(), gradient.decompose()
            if float(mu.max()) * float(nu.max()) == 0.0:
                if layer.module not in called:
                    raise ValueError(f"Laplace.fit: {self._idle(layer.module, called)}")
                if errors == 0.0:
                    raise ValueError(
                        "Laplace.fit: probabilities must lie between 0 and 1, got a softmax that is "
                        "saturated for every example (one class has all of it, to the last bit): the "
                        "curvature is zero; scale the logits down, as a temperature does, or train "
                        "with weight decay"
                    )
                raise ValueError(
                    f"Laplace.fit: layer {layer.name} must have curvature, got "
                    f"{'inputs' if float(mu.max()) == 0.0 else 'gradients'} that are zero for every "
                    "example (LoRA before training has B = 0, a saturated softmax has none): train it "
                    "first or leave it out"
                )
            blocks.append(_Block(u, mu / examples, q, nu))
        return blocks

    def _fitted(self) -> list[_Block]:
        if self._blocks is None:
            raise ValueError("Laplace: fit must come first; call fit(loader) or load_state_dict")
        versions = _versions(self._trained)
        if versions != self._versions:  # moved or written to, perhaps with the same values
            if _digest(self._trained) != self._digest:
                raise ValueError(
                    "Laplace: weights must be those that the posterior was fitted to, got others (they "
                    "were trained or replaced since); call fit again"
                )
            self._versions = versions
            devices = [layer.weight.device for layer in self.layers]
            self._blocks = [b.to(d) for b, d in zip(self._blocks, devices, strict=True)]
        return self._blocks

    # --- evidence and prior --------------------------------------------------------------------

    def _precisions(self) -> tuple[Tensor, Tensor, Tensor]:
        """All nu_j mu_i in one tensor, the layer of each, and |theta|^2 of each layer; CPU, fp64."""
        blocks = self._fitted()
        products = [block.products.reshape(-1).cpu() for block in blocks]
        segment = torch.repeat_interleave(
            torch.arange(len(products)), torch.tensor([p.numel() for p in products])
        )
        norms = torch.stack(
            [layer.weight.detach().double().square().sum().cpu() for layer in self.layers]
        )
        return torch.cat(products), segment, norms

    def log_marginal_likelihood(self, prior_precision: float | Tensor | None = None) -> Tensor:
        """Laplace's approximation of the log evidence, in nats.

            log p(y | theta) - 1/2 sum_l (delta_l |theta_l|^2 + sum_ij log(1 + mu_i nu_j / delta_l))

        Args:
            prior_precision: None for the present one; a tensor may require a gradient.

        Returns:
            0-dim fp64 tensor.

        Raises:
            ValueError: not fitted, or fitted without labels.
        """
        if self.log_likelihood is None and self._blocks is not None:
            raise ValueError(
                "Laplace.log_marginal_likelihood: fit must have seen labels, got none; pass "
                "labels=lambda batch: ..."
            )
        return (self.log_likelihood or 0.0) + self._relative_evidence(prior_precision)

    def _relative_evidence(self, prior_precision: float | Tensor | None) -> Tensor:
        """The log evidence without the log-likelihood at the mode."""
        products, segment, norms = self._precisions()
        delta = self._prior_precision if prior_precision is None else prior_precision
        delta = torch.as_tensor(delta, dtype=torch.float64).expand(len(self.layers))
        determinant = torch.log1p(products / delta[segment]).sum()
        return -0.5 * ((delta * norms).sum() + determinant)

    def effective_parameters(self) -> Tensor:
        """gamma of each layer: sum_ij mu_i nu_j / (mu_i nu_j + delta), (layers,) fp64."""
        products, segment, norms = self._precisions()
        delta = self._prior_precision.expand(len(self.layers))
        w = products / (products + delta[segment])
        return torch.zeros_like(norms).index_add_(0, segment, w)

    def optimize_prior_precision(
        self,
        method: str = "mackay",
        *,
        structure: str = "scalar",
        loader: Iterable[Any] | None = None,
        grid: Tensor | None = None,
        refine: int = 1,
        lr: float = 0.1,
        steps: int = 100,
        prediction: str = "probit",
        n_samples: int = 1000,
        verbose: bool = False,
    ) -> Tensor:
        """Choose delta.

        * "mackay": the stationary point of the evidence, delta |theta|^2 = gamma(delta), by Newton
          steps on log delta. It is the only one and a maximum: gamma falls in delta and the left side
          rises. No pass over data.
        * "gradient": Adam on log delta for the evidence, as the paper does. No pass over data.
        * "validation": the value of a grid with the highest log-likelihood on held-out data, then
          grids around the best. One pass over the data for each grid, whatever its length.

        Args:
            method: as above.
            structure: "scalar", one delta; "layer", one for each layer ("mackay" and "gradient").
            loader: labelled batches that the model has not seen, for "validation".
            grid: values for "validation"; None for 21 from 1e-4 to 1e4.
            refine: further grids.
            lr, steps: of Adam.
            prediction, n_samples: how "validation" predicts; see `predict`.
            verbose: write the result to stderr.

        Returns:
            delta, which is also set.

        Raises:
            ValueError: options do not fit, or weights are all zero.

        Source: MacKay, "Bayesian Interpolation", 1992, for the fixed point.
        """
        op = "Laplace.optimize_prior_precision"
        if method not in ("mackay", "gradient", "validation"):
            raise ValueError(
                f"{op}: method must be 'mackay', 'gradient' or 'validation', got {method!r}"
            )
        if structure not in ("scalar", "layer"):
            raise ValueError(f"{op}: structure must be 'scalar' or 'layer', got {structure!r}")
        if method == "validation":
            if loader is None or structure != "scalar":
                raise ValueError(
                    f"{op}: method 'validation' must have a loader and structure 'scalar', got "
                    f"{'a' if loader is not None else 'no'} loader and {structure!r}"
                )
            if grid is None:
                grid = torch.logspace(-4, 4, 21, dtype=torch.float64)
            delta = self._validate(loader, grid, refine, prediction, n_samples)
        elif method == "mackay":
            delta = self._mackay(structure)
        else:
            start = self._prior_precision.log()
            if structure == "layer":
                start = start.expand(len(self.layers))
            elif start.dim() == 1:
                start = start.mean()
            log_delta = start.clone().requires_grad_()
            optimiser = torch.optim.Adam([log_delta], lr=lr)
            for _ in range(steps):
                optimiser.zero_grad()
                with torch.enable_grad():
                    loss = -self._relative_evidence(log_delta.exp())
                loss.backward()
                optimiser.step()
            delta = log_delta.detach().exp()
        self.prior_precision = delta  # type: ignore[assignment]
        if verbose:
            print(f"Laplace: prior precision {delta.tolist()}", file=sys.stderr)
        return self._prior_precision

    def _mackay(self, structure: str) -> Tensor:
        products, segment, norms = self._precisions()
        if structure == "scalar":
            segment, norms = torch.zeros_like(segment), norms.sum(0, keepdim=True)
        if not bool((norms > 0).all()):
            raise ValueError(
                "Laplace.optimize_prior_precision: weights must not be all zero, got a layer with "
                "|theta| = 0, whose best precision is infinite; use structure='scalar' or leave it out"
            )

        def total(values: Tensor) -> Tensor:
            return torch.zeros_like(norms).index_add_(0, segment, values)

        # log gamma - log |theta|^2 - t falls in t = log delta, with a slope between -2 and -1.
        t = torch.zeros_like(norms)
        for _ in range(200):
            w = products / (products + t.exp()[segment])
            gamma = total(w).clamp(min=1e-300)
            gap = gamma.log() - norms.log() - t
            t = t + gap / (1 + total(w * (1 - w)) / gamma)
            if float(gap.abs().max()) < 1e-13:
                break
        return t.exp()[0] if structure == "scalar" else t.exp()

    def _validate(
        self, loader: Iterable[Any], grid: Tensor, refine: int, prediction: str, n_samples: int
    ) -> Tensor:
        best = grid[0]
        for round_ in range(refine + 1):
            scores = torch.zeros(len(grid), dtype=torch.float64)
            seen = 0
            for raw in loader:
                if is_empty(raw):
                    continue
                found = []
                for part in self._parts(raw, self._classes):
                    labels = self._labels_of(part)
                    if labels is None:
                        raise ValueError(
                            "Laplace.optimize_prior_precision: batches of the loader must have "
                            "labels, got none; pass labels=lambda batch: ..."
                        )
                    mean, covs = self._linearised(part, list(grid))
                    found.append((_check_labels(labels, mean), mean, *covs))
                labels, mean, *covs = map(torch.cat, zip(*found, strict=True))
                self._classes = mean.shape[1]  # a loaded posterior has not seen them
                seen += len(labels)
                for i, cov in enumerate(covs):
                    log_probs = self._from_logits(mean, cov, prediction, n_samples, 0).log_probs
                    scores[i] += float(log_probs.gather(1, labels[:, None]).double().sum())
            if not seen or not bool(torch.isfinite(scores).any()):
                raise ValueError(
                    "Laplace.optimize_prior_precision: loader must give held-out examples of finite "
                    f"likelihood in each of {refine + 1} passes, got {seen} examples; pass a list or a "
                    "DataLoader, not a generator"
                )
            top = int(scores.nan_to_num(nan=-math.inf).argmax())
            best = grid[top]
            low, high = grid[max(top - 1, 0)], grid[min(top + 1, len(grid) - 1)]
            if round_ < refine:
                grid = torch.logspace(
                    math.log10(float(low)), math.log10(float(high)), len(grid), dtype=torch.float64
                )
        return best

    # --- prediction ----------------------------------------------------------------------------

    @torch.no_grad()
    def mean_logits(self, batch: Any) -> Tensor:
        """Logits (B, C) of the model as it was trained, in eval mode: a forward pass.

        Args:
            batch: as for `fit`; labels are not used.

        Raises:
            ValueError: not fitted, or the batch does not fit.
        """
        self._fitted()
        self._require_examples(batch)
        with eval_mode(self.model):
            logits = self._logits(to_device(batch, self._device))
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def logits(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Mean (B, C) and covariance (B, C, C) of the logits of the linearised model.

            f(x) + J (theta - theta_MAP):  mean = f_MAP(x),  cov = sum_l J_l Sigma_l J_l^T

        With G_c (out, in) the gradient of logit c in a layer, P_c = Q^T G_c U and R_c = G_c - Q P_c U^T:

            cov[c, e] = sum_l sum_ij P_c P_e / (mu_i nu_j + delta) + <R_c, R_e> / delta

        a sum of Gram matrices, hence never negative, without a difference of large numbers. Layers
        are visited once, in the order of the backward pass; the full Jacobian never exists.

        Args:
            batch: as for `fit`; labels are not used.

        Raises:
            ValueError: not fitted, or the batch does not fit.
        """
        self._require_examples(batch)
        mean, covs = self._linearised(to_device(batch, self._device), [self._prior_precision])
        return mean, covs[0]

    def predict(
        self,
        batch: Any,
        *,
        method: str = "mc",
        n_samples: int = 1000,
        seed: int = 0,
        row0: int = 0,
    ) -> Prediction:
        """Predictive distribution over the classes.

        Args:
            batch: as for `fit`; labels are not used.
            method: from the linearised logits: "mc", Monte Carlo with their joint Gaussian;
                "mc_independent", with its variances only; "quadrature", two classes by Gauss-Hermite
                quadrature; "probit" and "bridge" (Laplace bridge), closed forms. "weights": draws of
                all weights and a forward pass for each, without linearisation, which is known to
                underfit (Immer et al.).
            n_samples: draws; of logits, an even number comes in pairs mean + e, mean - e.
            seed: of the draws.
            row0: number of the first example, for data in several batches: every example then has
                draws of its own, which do not depend on the split.

        Raises:
            ValueError: method unknown, not fitted, or the batch does not fit.
        """
        if method not in METHODS:
            raise ValueError(
                f"Laplace.predict: method must be one of {METHODS}, got {method!r}; choose one"
            )
        if n_samples < 1:
            raise ValueError(f"Laplace.predict: n_samples must be at least 1, got {n_samples}")
        if method == "weights":
            self._require_examples(batch)
            return self._predict_weights(to_device(batch, self._device), n_samples, seed)
        mean, cov = self.logits(batch)
        return self._from_logits(mean, cov, method, n_samples, seed, row0)

    @staticmethod
    def _from_logits(
        mean: Tensor, cov: Tensor, method: str, n_samples: int, seed: int, row0: int = 0
    ) -> Prediction:
        independent = method == "mc_independent"
        drawn = independent or method == "mc"
        result = functional.mc_predict(
            mean,
            cov.diagonal(dim1=1, dim2=2).contiguous() if independent else cov,
            n_samples=n_samples,
            key=random.key(seed, mean.device),
            method="mc" if independent else method,
            # Pairs leave no common tilt towards a class.
            antithetic=drawn and n_samples % 2 == 0,
            row0=row0,
        )
        return Prediction(result.log_probs, result.entropy, result.expected_entropy, mean, cov)

    def _require_examples(self, batch: Any) -> None:
        if is_empty(batch):
            raise ValueError("Laplace: a batch must have at least one example, got an empty one")

    def _require_gradient(self, logits: Tensor, collect: _Collector) -> None:
        if logits.requires_grad:
            return
        idle = [m for m in self._sites if m not in collect.called]
        if idle:
            raise ValueError(f"Laplace: {self._idle(idle[0], collect.called)}")
        raise ValueError(
            "Laplace: the layers must act on the logits, got logits without a graph; check the layers, "
            "and use gradient checkpointing with use_reentrant=False"
        )

    def _linearised(self, batch: Any, deltas: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Logits and their covariance for several prior precisions, in one pass."""
        blocks = self._fitted()
        collect = _Contraction(self, blocks, deltas)
        vectorised = self.jacobian == "vmap"
        with _watched(self.model, self._sites, collect) as anchor:
            if vectorised:
                logits = self._logits(batch)
                self._require_gradient(logits, collect)
                b, c = logits.shape
                collect.start(b, c)
                basis = torch.eye(c, dtype=logits.dtype, device=logits.device)

                def pull(cotangent: Tensor) -> Tensor:
                    torch.autograd.grad(logits, anchor, cotangent.expand(b, c), allow_unused=True)
                    return cotangent.sum()

                with warnings.catch_warnings():
                    # Attention kernels whose backward runs once for each class instead.
                    warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
                    try:
                        torch.func.vmap(pull)(basis)
                        reached = len(collect.seen) == len(self._sites)
                    except RuntimeError:
                        if not _checkpointed_reentrantly(logits):
                            raise
                        reached = False
                    # Such a checkpoint raises, or is left out where no gradient of a leaf is behind it.
                    if not reached and _checkpointed_reentrantly(logits):
                        self.jacobian = "repeat"
                mean = logits.detach()
            else:
                with torch.no_grad():
                    mean = self._logits(batch)
                b, c = mean.shape
                collect.start(b, c)
                logits = self._logits(repeated(batch, b, c))
                self._require_gradient(logits, collect)
                if logits.shape[0] != b * c:
                    raise ValueError(
                        f"Laplace: jacobian='repeat' must be able to repeat the batch, got "
                        f"{logits.shape[0]} rows of logits instead of {b * c}; use 'vmap'"
                    )
                # Copy c of the batch gets the gradient of logit c.
                basis = torch.eye(c, dtype=logits.dtype, device=logits.device)
                logits.backward(basis.repeat_interleave(b, 0))
        if vectorised and self.jacobian == "repeat":
            warnings.warn(
                "Laplace: the model checkpoints with use_reentrant=True, which cannot be vectorised: "
                "predictions take jacobian='repeat' from now on, C copies of each batch; use "
                "use_reentrant=False to have 'vmap'",
                stacklevel=4,
            )
            return self._linearised(batch, deltas)
        wide = torch.promote_types(mean.dtype, torch.float32)
        covs = [cov.to(device=mean.device, dtype=wide) for cov in collect.covariances()]
        return mean.to(wide), covs

    def _predict_weights(self, batch: Any, n_samples: int, seed: int) -> Prediction:
        mean_p: Tensor | float = 0.0
        entropy: Tensor | float = 0.0
        with eval_mode(self.model), torch.no_grad():
            for s in range(n_samples):
                with self.sampled(seed, s):
                    log_p = self._logits(batch).double().log_softmax(-1)
                mean_p = mean_p + log_p.exp() / n_samples
                entropy = entropy + torch.special.entr(log_p.exp()).sum(-1) / n_samples
        assert isinstance(mean_p, Tensor) and isinstance(entropy, Tensor)
        total = torch.special.entr(mean_p).sum(-1)
        return Prediction(mean_p.log().float(), total.float(), entropy.float())

    # --- samples of the weights ----------------------------------------------------------------

    def sample(self, seed: int = 0, index: int = 0) -> dict[str, Tensor]:
        """One draw of all weights from the posterior, by layer name, in the weights' shapes.

            W = W_MAP + (E - Q (D . (Q^T E U)) U^T) / sqrt(delta),  D = 1 - sqrt(delta / (mu nu + delta))

        with E standard normal: the symmetric square root of the posterior covariance. It depends on
        (seed, index), the layer's name and nothing else.

        Raises:
            ValueError: not fitted.
        """
        blocks = self._fitted()
        delta = self._prior_precision.expand(len(self.layers))
        draws = {}
        for layer, block, d in zip(self.layers, blocks, delta.tolist(), strict=True):
            key = random.fold_in(random.key(seed, layer.weight.device), index)
            e = random.normal(key, layer.shape, stream=_stream(layer.name)).to(block.u.dtype)
            shrink = 1 - torch.rsqrt(block.products / d + 1)
            inner = (block.q.T @ e @ block.u) * shrink.to(e)
            noise = (e - block.q @ inner @ block.u.T) / math.sqrt(d)
            mean = layer.weight.detach()
            draws[layer.name] = (mean + noise.reshape(mean.shape)).to(mean.dtype)
        return draws

    @contextlib.contextmanager
    def sampled(self, seed: int = 0, index: int = 0) -> Iterator[None]:
        """The model with a draw of the weights in place; the trained ones come back at the end.

        Raises:
            ValueError: not fitted.
        """
        draws = self.sample(seed, index)
        kept = [layer.weight.detach().clone() for layer in self.layers]
        try:
            with torch.no_grad():
                for layer in self.layers:
                    layer.weight.copy_(draws[layer.name])
            yield
        finally:
            with torch.no_grad():
                for layer, value in zip(self.layers, kept, strict=True):
                    layer.weight.copy_(value)
            self._versions = _versions(self._trained)

    # --- state ---------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        """The posterior as a flat dictionary of tensors, ready for safetensors.

        It has a digest of the weights that it was fitted to, not the weights.

        Raises:
            ValueError: not fitted, or the weights have changed since.
        """
        blocks = self._fitted()
        state: dict[str, Tensor] = {
            "prior_precision": self._prior_precision.clone(),
            "n_examples": torch.tensor(self.n_examples),
            "log_likelihood": torch.tensor(
                math.nan if self.log_likelihood is None else self.log_likelihood,
                dtype=torch.float64,
            ),
            "digest": torch.tensor(list(self._digest), dtype=torch.uint8),
        }
        for layer, block in zip(self.layers, blocks, strict=True):
            state[f"{layer.name}.input_vectors"] = block.u.contiguous()
            state[f"{layer.name}.input_values"] = block.mu.contiguous()
            state[f"{layer.name}.output_vectors"] = block.q.contiguous()
            state[f"{layer.name}.output_values"] = block.nu.contiguous()
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take a posterior from `state_dict`, of the same layers of the same trained model.

        Raises:
            ValueError: layers or shapes do not fit, or the weights are not those of `fit`.
        """
        kinds = ("input_vectors", "input_values", "output_vectors", "output_values")
        wanted = {f"{layer.name}.{kind}" for layer in self.layers for kind in kinds}
        wanted |= {"prior_precision", "n_examples", "log_likelihood", "digest"}
        if wanted != set(state):
            odd = sorted(wanted ^ set(state))
            raise ValueError(
                f"Laplace.load_state_dict: state must have the entries of these layers, got "
                f"{len(odd)} that are missing or unknown, such as {odd[0]!r}; make the same layers"
            )
        digest = bytes(state["digest"].tolist())
        if digest != _digest(self._trained):
            raise ValueError(
                "Laplace.load_state_dict: weights must be those that the posterior was fitted to, got "
                "others (the model was trained again, or is another one); call fit"
            )
        blocks = []
        for layer in self.layers:
            u, mu, q, nu = (state[f"{layer.name}.{kind}"] for kind in kinds)
            out, n = layer.shape
            if (u.dim(), q.dim(), u.shape[0], q.shape[0]) != (2, 2, n, out) or (
                (u.shape[1], q.shape[1]) != (mu.numel(), nu.numel())
            ):
                raise ValueError(
                    f"Laplace.load_state_dict: layer {layer.name} must have vectors ({n}, k) and "
                    f"({out}, k'), got {tuple(u.shape)} and {tuple(q.shape)}"
                )
            device = layer.weight.device
            dtype = _working_dtype(layer)
            blocks.append(
                _Block(
                    u.to(device, dtype, copy=True),
                    mu.to(device, torch.float64, copy=True),
                    q.to(device, dtype, copy=True),
                    nu.to(device, torch.float64, copy=True),
                )
            )
        self.prior_precision = state["prior_precision"]  # type: ignore[assignment]
        self._blocks = blocks
        self._digest, self._versions = digest, _versions(self._trained)
        self.n_examples = int(state["n_examples"])
        value = float(state["log_likelihood"])
        self.log_likelihood = None if math.isnan(value) else value


class _Accumulator(_Collector):
    """Collector of `fit`: rows of one module's layers into their factors."""

    def __init__(self, owner: Laplace, sides: list[tuple[_Factor, _Factor]]) -> None:
        super().__init__()
        self.owner, self.sides = owner, sides
        self.first_column = True
        self.seen: set[nn.Module] = set()
        self.batch = 0
        self.valid: Tensor | None = None

    def start(self, batch: int, valid: Tensor | None) -> None:
        self.batch, self.valid = batch, valid

    def finish(self, columns: int) -> None:
        """Compress the factors that another batch like this one would overfill, all at once."""
        full = []
        for activation, gradient in self.sides:
            for side, more in ((activation, self.batch), (gradient, self.batch * columns)):
                if side.buffer is not None and side.waiting + more > side.buffer.shape[0]:
                    full.append(side)
        _flush(full)

    def __call__(self, module: nn.Module, x: Tensor, dy: Tensor) -> None:
        owner = self.owner
        if module in self.seen:
            raise ValueError(
                f"Laplace: layer {owner.layers[owner._sites[module][0]].name} must be used once in a "
                "forward pass, got a second use; leave it out of the layers"
            )
        self.seen.add(module)
        whole, self.valid = self.valid, self._acting(dy[0])
        for i in owner._sites[module]:
            layer = owner.layers[i]
            activation, gradient = self.sides[i]
            if self.first_column:
                a = x if layer.input_rows is None else layer.input_rows(x)
                activation.add(*self._rows(layer, a, gradient=False))
            g = dy[0] if layer.grad_rows is None else layer.grad_rows(dy[0])
            gradient.add(*self._rows(layer, g, gradient=True))
        self.valid = whole

    def _acting(self, dy: Tensor) -> Tensor | None:
        """The mask without tokens that do not act on the logits, as all but one below a pooled head.

        Their inputs would enter the mean of a a^T, and make it depend on the padding.
        """
        if dy.dim() != 3 or dy.shape[0] != self.batch or dy.shape[1] == 1:
            return self.valid
        acting = dy.ne(0).any(-1)
        if self.valid is None:
            return acting
        if self.valid.shape != acting.shape:
            return self.valid
        return self.valid.to(acting.device) & acting

    def _rows(self, layer: Layer, rows: Tensor, *, gradient: bool) -> tuple[Tensor, Tensor | None]:
        valid = None if self.valid is None else self.valid.to(rows.device)
        if valid is not None and valid.dim() == 3:  # K sequences for each example
            if self.owner.tokens == "last":
                raise ValueError(
                    "Laplace: tokens must be 'expand' or 'reduce' for several sequences an example, "
                    "got 'last'"
                )
            parts, length = valid.shape[1:]
            if rows.shape[:-1] == (self.batch * parts, length):
                rows = rows.reshape(self.batch, parts * length, -1)
                valid = valid.flatten(1)
            elif rows.shape[:-1] == (self.batch * parts,):
                rows, valid = rows.reshape(self.batch, parts, -1), valid.any(2)
        tokens = None if valid is None else valid.shape[1]
        rows = _by_example(rows, self.batch, tokens, layer.name)
        if valid is not None and rows.shape[1] not in (1, tokens):
            raise ValueError(
                f"Laplace: layer {layer.name} must see as many tokens as the mask has, {tokens}, got "
                f"{rows.shape[1]}; pass mask=lambda batch: ... that fits, or None"
            )
        return _token_rows(rows, self.owner.tokens, valid, gradient=gradient)


class _Contraction(_Collector):
    """Collector of predictions: adds each layer's J Sigma J^T (B, C, C) for several priors."""

    def __init__(self, owner: Laplace, blocks: list[_Block], deltas: Sequence[Tensor]) -> None:
        super().__init__()
        self.owner, self.blocks = owner, blocks
        count = len(owner.layers)
        self.deltas = [[float(v) for v in d.double().expand(count)] for d in deltas]
        self.seen: set[nn.Module] = set()
        self.batch = self.classes = 0
        self.sums: list[Tensor | None] = [None] * len(deltas)

    def start(self, batch: int, classes: int) -> None:
        self.batch, self.classes = batch, classes

    def covariances(self) -> list[Tensor]:
        missing = [m for m in self.owner._sites if m not in self.seen]
        if missing or any(s is None for s in self.sums):
            first = missing[0] if missing else next(iter(self.owner._sites))
            raise ValueError(f"Laplace: {self.owner._idle(first, self.called)}")
        return [s for s in self.sums if s is not None]

    def __call__(self, module: nn.Module, x: Tensor, dy: Tensor) -> None:
        owner = self.owner
        if module in self.seen:
            raise ValueError(
                f"Laplace: layer {owner.layers[owner._sites[module][0]].name} must be used once in a "
                "forward pass, got a second use; leave it out of the layers"
            )
        self.seen.add(module)
        b, c = self.batch, self.classes
        if dy.shape[0] == 1:  # copies of the batch, not of the gradient
            x, dy = x[: x.shape[0] // c], dy[0].reshape(c, -1, *dy.shape[2:])
        for i in owner._sites[module]:
            layer, block = owner.layers[i], self.blocks[i]
            wide = block.u.dtype
            a = x if layer.input_rows is None else layer.input_rows(x)
            g = dy if layer.grad_rows is None else layer.grad_rows(dy)
            tokens = max(1, a.numel() // (a.shape[-1] * b))
            if a.shape[0] % b == 0:  # examples come first, be they several sequences each
                a = a.reshape(b, tokens, -1)
            a = _by_example(a, b, tokens, layer.name).to(wide)  # (B, T, in)
            g = g.reshape(c, b, tokens, -1).transpose(0, 1).to(wide)  # (B, C, T, out)
            inner, rest = _project(a, g, block)
            for number, delta in enumerate(self.deltas):
                scale = (block.products + delta[i]).rsqrt().to(wide).reshape(-1)
                scaled = inner * scale
                part = scaled @ scaled.mT
                if rest is not None:
                    part = part + rest / delta[i]
                before = self.sums[number]
                self.sums[number] = part if before is None else before + part.to(before.device)


def _project(a: Tensor, g: Tensor, block: _Block) -> tuple[Tensor, Tensor | None]:
    """P_c (B, C, k_out k_in) and the Gram matrix of R_c (B, C, C), None where that is zero.

    a (B, T, in), g (B, C, T, out). Where the tokens are few, G_c = sum_t g a^T is never formed.
    """
    b, tokens, n = a.shape
    classes, out = g.shape[1], g.shape[3]
    whole_in, whole_out = block.complete("in"), block.complete("out")
    formed = classes * tokens * out * n + classes * classes * out * n
    factored = tokens * tokens * (n + classes * classes * out)
    if factored < formed:
        au, gq = a @ block.u, g @ block.q  # (B, T, k_in), (B, C, T, k_out)
        inner = gq.mT @ au[:, None]
        rest = None
        # R = g_rest a^T + g_span a_rest^T, two orthogonal parts.
        for left, right in (
            (None if whole_out else g - gq @ block.q.T, a),
            (None if whole_in else gq, None if whole_in else a - au @ block.u.T),
        ):
            if left is None or right is None:
                continue
            pairs = (right @ right.mT)[:, None, None]  # (B, 1, 1, T, T)
            flat = left.reshape(b, classes * tokens, -1)
            products = (flat @ flat.mT).reshape(b, classes, tokens, classes, tokens)
            part = (products.transpose(2, 3) * pairs).sum((-1, -2))
            rest = part if rest is None else rest + part
        return inner.flatten(2), rest
    gradient = g.mT @ a[:, None]  # (B, C, out, in)
    inner = block.q.T @ gradient @ block.u
    if whole_in and whole_out:
        return inner.flatten(2), None
    gradient = gradient.sub_(block.q @ inner @ block.u.T).flatten(2)
    return inner.flatten(2), gradient @ gradient.mT


# --- small parts -------------------------------------------------------------------------------


class _World(NamedTuple):
    rank: int
    size: int


def _processes(distributed: bool | None) -> _World:
    there = torch.distributed.is_available() and torch.distributed.is_initialized()
    if distributed and not there:
        raise ValueError(
            "Laplace.fit: distributed=True must have a process group, got none; call "
            "torch.distributed.init_process_group first"
        )
    if not there or distributed is False:
        return _World(0, 1)
    return _World(torch.distributed.get_rank(), torch.distributed.get_world_size())


def _checkpointed_reentrantly(output: Tensor) -> bool:
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


def _check_labels(labels: Tensor, logits: Tensor) -> Tensor:
    """Class indices (B,) on the logits' device."""
    if labels.shape != logits.shape[:1] or labels.is_floating_point():
        raise ValueError(
            f"Laplace: labels must be class indices of shape ({logits.shape[0]},), got {labels.dtype} of "
            f"shape {tuple(labels.shape)}; pass labels=lambda batch: ..."
        )
    labels = labels.to(logits.device, torch.int64)
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < logits.shape[1]:
        raise ValueError(
            f"Laplace: labels must be in [0, {logits.shape[1]}), got {int(labels.min())} to "
            f"{int(labels.max())}"
        )
    return labels


def _versions(tensors: Iterable[Tensor]) -> list[tuple[int, int]]:
    """Differs after the tensors were written to or moved, whether or not values changed; costs nothing."""
    return [(t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors]


def _digest(tensors: Iterable[Tensor]) -> bytes:
    """16 bytes that stand for the values of tensors, the same for bf16 values kept in fp32."""
    found = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        wide = torch.promote_types(tensor.dtype, torch.float32)
        values = tensor.detach().to("cpu", wide).contiguous()
        found.update(f"{wide} {tuple(values.shape)}".encode())
        found.update(values.reshape(-1).view(torch.uint8).numpy().data)
    return found.digest()


def _stream(name: str) -> int:
    """Noise stream of a layer: 40 bits of a hash of its name."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=5).digest(), "big")
