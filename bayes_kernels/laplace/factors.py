"""Kronecker factors of layers: their sums over data, and the posterior that they become."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn

from .. import functional
from .errors import Errors, SoftmaxRoot
from .layers import Layer, Sites, rank_of, working_dtype
from .passes import (
    Collector,
    Last,
    backward_at_once,
    by_example,
    checkpointed_reentrantly,
    take_last,
)
from .tokens import TokenErrors

# Bytes of a layer's inputs and gradients that several columns may take: where one column has more, a
# pass is arithmetic rather than calls or launches, and several at once gain nothing.
_COLUMN_BYTES = {"cpu": 2**20, "cuda": 2**24}


class Factor:
    """The sum of outer products of one side of a layer.

    It is dense (d, d), or low-rank: (d, k) and a buffer of uncompressed rows.

    Args:
        size: d.
        rank: k; None for a dense factor.
        buffer: number of rows in the buffer.
        dtype: of the sum, fp32 or fp64.
        device: of the sum.
    """

    def __init__(
        self, size: int, rank: int | None, buffer: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.rank = rank
        shape = (size, size if rank is None else rank)
        self.sum = torch.zeros(shape, dtype=dtype, device=device)
        self.buffer = None
        self.filled = 0
        if rank is not None:
            self.buffer = torch.empty((buffer, size), dtype=dtype, device=device)

    def add(self, rows: Tensor, weights: Tensor | None) -> None:
        """Add the outer products of rows (N, d), in the working dtype or narrower, with weights (N,)."""
        if self.buffer is None:
            functional.kron_accumulate_([self.sum], [rows], masks=[weights])
            return
        if weights is not None:
            kept = weights.nonzero()[:, 0]
            rows = rows.index_select(0, kept).to(self.sum.dtype)  # a copy
            rows.mul_(weights.index_select(0, kept).to(rows.dtype).sqrt()[:, None])
        count = rows.shape[0]
        if self.filled + count <= self.buffer.shape[0]:
            self.buffer[self.filled : self.filled + count] = rows
            self.filled += count
            return
        # Too many for the buffer.
        rows = rows.to(self.sum.dtype)
        if self.filled:
            rows = torch.cat([self.buffer[: self.filled], rows])
            self.filled = 0
        functional.low_rank_update_([self.sum], [rows])

    def merge(self) -> None:
        """The sum over processes. Low-rank factors are gathered and compressed again."""
        if self.rank is None:
            torch.distributed.all_reduce(self.sum)
            return
        parts = [torch.empty_like(self.sum) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(parts, self.sum)
        self.sum.zero_()
        functional.low_rank_update_([self.sum], [torch.cat([p.T for p in parts])])

    def decompose(self) -> tuple[Tensor, Tensor]:
        """Eigenvectors (d, k) with eigenvalues (k,) fp64, falling, not negative; the sum is freed.

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


def flush(factors: Iterable[Factor]) -> None:
    """Compress the rows in the buffers, all layers in one call."""
    ready = [f for f in factors if f.filled]
    rows = [f.buffer[: f.filled] for f in ready if f.buffer is not None]
    functional.low_rank_update_([f.sum for f in ready], rows)
    for factor in ready:
        factor.filled = 0


def token_rows(
    rows: Tensor,
    kind: str,
    valid: Tensor | None,
    *,
    gradient: bool,
    counts: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """What enters a factor from rows (B, T, d): rows (N, d) and weights (N,) or None.

    Args:
        rows: inputs or gradients.
        kind: the rule.
        valid: (B, T) of tokens that enter; None for all.
        gradient: whether rows are gradients.
        counts: (B,) labels of each example: its inputs count that often; None for one each.
    """
    batch, tokens, d = rows.shape
    wide = torch.float64 if rows.dtype == torch.float64 else torch.float32
    often = None if gradient or counts is None else counts.to(rows.device, wide)
    if tokens == 1:
        return rows[:, 0], often
    if kind == "last":
        if valid is None:
            return rows[:, -1], often
        position = torch.arange(tokens, device=rows.device)
        last = torch.where(valid, position, -1).amax(1).clamp(min=0)
        return rows.gather(1, last[:, None, None].expand(-1, 1, d))[:, 0], often
    if valid is None:
        count = torch.full((batch,), tokens, dtype=wide, device=rows.device)
    else:
        count = valid.sum(1).clamp(min=1).to(wide)
    if kind == "reduce":
        if valid is not None:
            rows = rows.masked_fill(~valid[:, :, None], 0)
        total = rows.sum(1, dtype=wide)
        return (total if gradient else total / count[:, None]), often
    flat = rows.reshape(-1, d)
    if often is None and (gradient or kind in ("sum", "sum_padded")):
        return flat, None if valid is None else valid.reshape(-1).to(wide)
    each = torch.ones_like(count) if often is None else often
    if kind == "expand":
        each = each / count
    weights = each[:, None].expand(batch, tokens)
    if valid is not None:
        weights = weights * valid
    return flat, weights.reshape(-1)


# Names of the tensors of a block in a state.
STATE = {"input_vectors": "u", "input_values": "mu", "output_vectors": "q", "output_values": "nu"}


@dataclass
class Block:
    """Posterior of one layer: eigenpairs of both factors, scaled so that products are precisions.

    Attributes:
        u: (in, k_in) eigenvectors of the input factor.
        mu: (k_in,) their eigenvalues, fp64.
        q: (out, k_out) eigenvectors of the output factor.
        nu: (k_out,) their eigenvalues, fp64.
    """

    u: Tensor
    mu: Tensor
    q: Tensor
    nu: Tensor

    @property
    def products(self) -> Tensor:
        """nu_j mu_i, (k_out, k_in) fp64."""
        return self.nu[:, None] * self.mu[None, :]

    def to(self, device: torch.device) -> Block:
        """This block on a device."""
        return Block(*(t.to(device) for t in (self.u, self.mu, self.q, self.nu)))

    def complete(self, side: str) -> bool:
        """Whether the eigenvectors of a side span all of it."""
        vectors = self.u if side == "in" else self.q
        return vectors.shape[0] == vectors.shape[1]

    @classmethod
    def load(cls, layer: Layer, u: Tensor, mu: Tensor, q: Tensor, nu: Tensor) -> Block:
        """Copies of stored tensors on a layer's device.

        Raises:
            ValueError: shapes do not fit the layer.
        """
        out, n = layer.shape
        if (u.dim(), q.dim(), u.shape[0], q.shape[0]) != (2, 2, n, out) or (
            (u.shape[1], q.shape[1]) != (mu.numel(), nu.numel())
        ):
            raise ValueError(
                f"Laplace.load_state_dict: layer {layer.name} must have vectors ({n}, k) and "
                f"({out}, k'), got {tuple(u.shape)} and {tuple(q.shape)}"
            )
        device, dtype = layer.weight.device, working_dtype(layer)
        kinds = (dtype, torch.float64, dtype, torch.float64)
        tensors = zip((u, mu, q, nu), kinds, strict=True)
        return cls(*(t.to(device, kind, copy=True) for t, kind in tensors))

    def deviation(self, e: Tensor, delta: float) -> Tensor:
        """A draw (out, in) of the weight, less its mean, from standard normals e (out, in)."""
        e = e.to(self.u.dtype)
        shrink = 1 - torch.rsqrt(self.products / delta + 1)
        inner = (self.q.T @ e @ self.u) * shrink.to(e)
        return (e - self.q @ inner @ self.u.T) / math.sqrt(delta)


class Accumulator(Collector):
    """Collector of `Laplace.fit`: the factors of all layers.

    Args:
        sites: the layers.
        tokens: what a sequence contributes, as for `Laplace`.
        rank, dense_below, buffer: of low-rank factors, as for `Laplace`.
        at_once: take the backward passes of several columns as one, where the model allows it.

    Attributes:
        sides: input and output factor of each layer.
        largest_error: 0 where every softmax so far is saturated.
    """

    def __init__(
        self,
        sites: Sites,
        tokens: str,
        *,
        rank: int | None,
        dense_below: int,
        buffer: int,
        at_once: bool = True,
    ) -> None:
        super().__init__(sites)
        self.tokens, self.at_once = tokens, at_once
        self.sides = [_sides(layer, rank, dense_below, buffer) for layer in sites.layers]
        self.largest_error = torch.zeros(())
        self._first_column = True
        self._batch = 0
        self._valid: Tensor | None = None
        self._counts: Tensor | None = None
        self._inputs: dict[int, int] = {}  # bytes of the inputs that the graph keeps, by address
        self._widest = 0

    def saw(self, x: Tensor, y: Tensor) -> None:
        """Note the bytes of one module."""
        storage = x.untyped_storage()
        self._inputs[storage.data_ptr()] = storage.nbytes()
        self._widest = max(self._widest, x.nbytes + y.nbytes)

    def add(
        self,
        logits: Tensor,
        anchor: Tensor,
        errors: SoftmaxRoot | Errors | TokenErrors,
        valid: Tensor | None,
        parts: int | None,
    ) -> None:
        """Add a batch: one backward pass for each column, several of them at once.

        Args:
            logits: (B, C), or (B, T, C) for labels of tokens, with their graph, which may be freed.
            anchor: the leaf from which gradients flow.
            errors: gradients of the logits.
            valid: (B, T) or (B, K, T) of valid tokens; None for all.
            parts: in how many parts like this one a batch was split, to stay within the memory of a
                training step; None without that bound.
        """
        self._batch, self._valid = len(logits), valid
        self._counts = errors.tokens.counts if isinstance(errors, TokenErrors) else None
        self.largest_error = self.largest_error.to(logits.device).maximum(errors.largest())
        room = _COLUMN_BYTES.get(logits.device.type, 2**20)
        if parts is not None:  # and what the inputs in the graphs of the other parts would take
            room = min(room // 4, sum(self._inputs.values()) * (parts - 1))
        width = max(1, room // max(self._widest, 2 * logits.nbytes))
        self._inputs.clear()
        last = take_last(logits)
        if last is not None:
            self._add_last(last, logits.dtype, errors, width)
        if last is None or not last.alone:
            taken = set() if last is None else {last.module}
            self._add_passes(logits, anchor, errors, width, taken)
        # Compress the factors that another batch like this one would overfill, all at once.
        full = []
        for activation, gradient in self.sides:
            for side, more in ((activation, len(logits)), (gradient, len(logits) * errors.count)):
                if side.buffer is not None and side.filled + more > side.buffer.shape[0]:
                    full.append(side)
        flush(full)

    def _add_passes(
        self,
        logits: Tensor,
        anchor: Tensor,
        errors: SoftmaxRoot | Errors | TokenErrors,
        width: int,
        taken: set[nn.Module],
    ) -> None:
        """Backward passes, `width` columns at a time, for all modules but those `taken`."""
        for start in range(0, errors.count, width):
            columns = errors.columns(start, min(start + width, errors.count)).to(logits.dtype)
            self.skipped = set()
            if len(columns) > 1 and self.at_once:
                self._first_column, self.seen = start == 0, set(taken)
                self.at_once = self._vectorised(logits, anchor, columns)
                if self.at_once:
                    continue
                self.skipped = self.seen - taken  # these have got the columns
            for i, column in enumerate(columns, start):
                self._first_column, self.seen = i == 0, set(taken)
                logits.backward(column, retain_graph=i + 1 < errors.count)

    def _vectorised(self, logits: Tensor, anchor: Tensor, columns: Tensor) -> bool:
        """One pass for all columns; False where it did not reach every module it should."""
        try:
            # The graph stays for the passes one by one.
            backward_at_once(logits, anchor, columns, retain_graph=True)
        except RuntimeError:
            return False
        # A reentrant checkpoint with no gradient of a leaf behind it is left out without an error.
        return len(self.seen) == len(self.sites.numbers) or not checkpointed_reentrantly(logits)

    def _add_last(
        self,
        last: Last,
        dtype: torch.dtype,
        errors: SoftmaxRoot | Errors | TokenErrors,
        width: int,
    ) -> None:
        """The module whose output is the logits, without a backward pass."""
        labelled = errors.tokens.counted if isinstance(errors, TokenErrors) else None
        for i in self.sites.numbers[last.module]:
            self._add_inputs(i, last.x, self._valid if labelled is None else labelled)
            layer, factor = self.sites.layers[i], self.sides[i][1]
            if factor.buffer is None and not isinstance(errors, TokenErrors):
                total = errors.total()
                if layer.grad_rows is not None:
                    basis = torch.eye(len(total), dtype=dtype, device=total.device)
                    basis = layer.grad_rows(basis).to(total)
                    total = basis.T @ total @ basis
                factor.sum.add_(total.to(factor.sum))
                continue
            for start in range(0, errors.count, width):
                columns = errors.columns(start, min(start + width, errors.count))
                masks = None
                if labelled is not None:
                    masks = labelled.expand(len(columns), *labelled.shape)
                self._add_gradients(i, columns.to(dtype), masks)

    def finish(self) -> None:
        """Compress what the buffers hold, and free them."""
        sides = list(chain.from_iterable(self.sides))
        flush(sides)
        for side in sides:
            side.buffer = None

    def merge(self) -> None:
        """Sum over the processes of the default group."""
        for side in chain.from_iterable(self.sides):
            side.merge()

    def collect(self, numbers: list[int], x: Tensor, dy: Tensor) -> None:
        """Rows of one module's layers into their factors; dy (V, B, ..., m) of V columns."""
        valid = self._acting(dy)
        for i in numbers:
            if self._first_column:
                self._add_inputs(i, x, None if valid is None else valid[0])
            self._add_gradients(i, dy, valid)

    def _add_inputs(self, i: int, x: Tensor, valid: Tensor | None) -> None:
        """The inputs of layer i, with the mask of a batch."""
        layer = self.sites.layers[i]
        a = x if layer.input_rows is None else layer.input_rows(x)
        self.sides[i][0].add(*self._rows(layer, a, self._batch, valid, gradient=False))

    def _add_gradients(self, i: int, dy: Tensor, valid: Tensor | None) -> None:
        """The gradients of layer i for V columns, with V masks of a batch."""
        layer, factor = self.sites.layers[i], self.sides[i][1]
        g = dy if layer.grad_rows is None else layer.grad_rows(dy)
        count = len(g)
        # Columns are further examples. A low-rank factor takes them one by one, so that what it cuts
        # off does not depend on their number.
        step = count if factor.buffer is None else 1
        for j in range(0, count, step):
            mask = None if valid is None else valid[j : j + step].flatten(0, 1)
            part = g[j : j + step].flatten(0, 1)
            factor.add(*self._rows(layer, part, step * self._batch, mask, gradient=True))

    def _acting(self, dy: Tensor) -> Tensor | None:
        """For each column the mask without tokens that do not act on the logits.

        These are all but one below a pooled head. Their inputs would enter the mean of a a^T, and make
        it depend on the padding; "sum_padded" takes them nevertheless.
        """
        valid = self._valid
        if self.tokens == "sum_padded":
            valid = None if valid is None else torch.ones_like(valid)
        elif dy.dim() == 4 and dy.shape[1] == self._batch and dy.shape[2] > 1:
            acting = dy.ne(0).any(-1)
            if valid is None:
                return acting
            if valid.shape == acting.shape[1:]:
                return valid.to(acting.device) & acting
        return None if valid is None else valid.expand(len(dy), *valid.shape)

    def _rows(
        self, layer: Layer, rows: Tensor, batch: int, valid: Tensor | None, *, gradient: bool
    ) -> tuple[Tensor, Tensor | None]:
        """What enters a factor from rows of `batch` examples: rows (N, d), weights (N,) or None."""
        valid = None if valid is None else valid.to(rows.device)
        if valid is not None and valid.dim() == 3:  # K sequences for each example
            if self.tokens == "last":
                raise ValueError(
                    "Laplace: tokens must be 'expand', 'sum' or 'reduce' for several sequences an "
                    "example, got 'last'"
                )
            parts, length = valid.shape[1:]
            if rows.shape[:-1] == (batch * parts, length):
                rows = rows.reshape(batch, parts * length, -1)
                valid = valid.flatten(1)
            elif rows.shape[:-1] == (batch * parts,):
                rows, valid = rows.reshape(batch, parts, -1), valid.any(2)
        tokens = None if valid is None else valid.shape[1]
        rows = by_example(rows, batch, tokens, layer.name)
        if valid is not None and rows.shape[1] not in (1, tokens):
            raise ValueError(
                f"Laplace: layer {layer.name} must see as many tokens as the mask has, {tokens}, got "
                f"{rows.shape[1]}; pass mask=lambda batch: ... that fits, or None"
            )
        return token_rows(rows, self.tokens, valid, gradient=gradient, counts=self._counts)

    def blocks(self, examples: int) -> list[Block]:
        """The posterior of each layer, whose factors are freed.

        Raises:
            ValueError: a layer has no curvature, or one that is not finite.
        """
        blocks: list[Block] = []
        while self.sides:  # factors are freed as the posterior is made
            layer = self.sites.layers[len(blocks)]
            activation, gradient = self.sides.pop(0)
            for what, side in (("inputs", activation), ("gradients", gradient)):
                if not bool(torch.isfinite(side.sum).all()):
                    raise ValueError(
                        f"Laplace.fit: {what} of layer {layer.name} must be finite, got NaN or "
                        "infinity; run the model in float32 or bfloat16"
                    )
            (u, mu), (q, nu) = activation.decompose(), gradient.decompose()
            if float(mu.max()) * float(nu.max()) == 0.0:
                if layer.module not in self.called:
                    raise ValueError(f"Laplace.fit: {self.sites.idle(layer.module, self.called)}")
                if float(self.largest_error) == 0.0:
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
            blocks.append(Block(u, mu / examples, q, nu))
        return blocks


def _sides(layer: Layer, rank: int | None, dense_below: int, buffer: int) -> tuple[Factor, Factor]:
    out, n = layer.shape
    dtype, device = working_dtype(layer), layer.weight.device
    i, o = (Factor(s, rank_of(s, rank, dense_below), buffer, dtype, device) for s in (n, out))
    return i, o
