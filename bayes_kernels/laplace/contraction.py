"""Covariance of the logits of a linearised model, layer by layer in one backward pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..batches import repeated
from .factors import Block
from .layers import Sites
from .passes import (
    Collector,
    Reader,
    backward_at_once,
    by_example,
    checkpointed_reentrantly,
    take_last,
    watched,
)


class Contraction(Collector):
    """Collector of predictions: adds each layer's J Sigma J^T (B, C, C) for several priors.

    Args:
        sites: the layers.
        blocks: their posteriors.
        deltas: prior precisions, 0-dim or (layers,).
    """

    def __init__(self, sites: Sites, blocks: Sequence[Block], deltas: Sequence[Tensor]) -> None:
        super().__init__(sites)
        self.blocks = blocks
        count = len(sites.layers)
        self.deltas = [[float(v) for v in d.double().expand(count)] for d in deltas]
        self.batch = self.classes = 0
        self.sums: list[Tensor | None] = [None] * len(deltas)

    def linearised(
        self, reader: Reader, batch: Any, jacobian: str
    ) -> tuple[Tensor, list[Tensor]] | None:
        """Logits (B, C) and their covariance (B, C, C) for each prior, fp32 or wider, in one pass.

        Args:
            reader: reads the logits from the model.
            batch: a prepared batch.
            jacobian: "vmap" or "repeat", as for `Laplace`.

        Returns:
            None where "vmap" meets a reentrant checkpoint.

        Raises:
            ValueError: the backward pass does not reach every module.
        """
        with watched(reader.model, self) as anchor:
            logits = reader.logits(batch)
            self.require_gradient(logits)
            mean = logits.detach()
            if mean.dim() == 3:
                raise ValueError(
                    "Laplace: linearised predictions must be of logits (B, C), got (B, T, C) of "
                    f"{tuple(mean.shape)}, whose covariance has no room; use method='weights'"
                )
            self.batch, self.classes = mean.shape
            last = take_last(logits)
            if last is not None:  # the gradient of its output y_c is 1 for class c
                self(last.module, last.x, torch.eye(self.classes).to(mean)[:, None])
            if last is None or not last.alone:
                if jacobian == "repeat":
                    del logits
                    self._with_copies(reader, batch)
                elif not self._vectorised(logits, anchor):
                    return None
        missing = [m for m in self.sites.numbers if m not in self.seen]
        if missing:
            raise ValueError(f"Laplace: {self.sites.idle(missing[0], self.called)}")
        wide = torch.promote_types(mean.dtype, torch.float32)
        covs = [cov.to(mean.device, wide) for cov in self.sums if cov is not None]
        return mean.to(wide), covs

    def collect(self, numbers: list[int], x: Tensor, dy: Tensor) -> None:
        """Add one module's layers.

        dy is (C, B, ..., m); (C, 1, m) where it is the same for all examples; or (1, C B, ..., m) for
        C copies of x.
        """
        b, c = self.batch, self.classes
        if dy.shape[0] == 1:  # copies of the batch, not of the gradient
            x, dy = x[: x.shape[0] // c], dy[0].reshape(c, -1, *dy.shape[2:])
        for i in numbers:
            layer, block = self.sites.layers[i], self.blocks[i]
            wide = block.u.dtype
            a = x if layer.input_rows is None else layer.input_rows(x)
            g = dy if layer.grad_rows is None else layer.grad_rows(dy)
            tokens = max(1, a.numel() // (a.shape[-1] * b))
            if a.shape[0] % b == 0:  # examples come first, be they several sequences each
                a = a.reshape(b, tokens, -1)
            a = by_example(a, b, tokens, layer.name).to(wide)  # (B, T, in)
            g = (
                g.reshape(c, -1, tokens, g.shape[-1]).transpose(0, 1).to(wide)
            )  # (B or 1, C, T, out)
            if tokens > 1:
                a, g = acting_tokens(a, g)
            parts = one_token if a.shape[1] == 1 else several_tokens
            for number, part in enumerate(parts(a, g, block, [d[i] for d in self.deltas])):
                self._add(number, *part)
                del part  # as large as the sum

    def _add(self, number: int, root: Tensor, rest: Tensor | None, weight: Tensor) -> None:
        """Add root root^T + weight rest to a sum, in place where it is of one kind."""
        total = self.sums[number]
        kind = (root.device, root.dtype)
        if total is not None and (total.device, total.dtype) == kind:
            part = total.baddbmm_(root, root.mT)
        else:
            part = root @ root.mT
        if rest is not None:
            part.addcmul_(rest, weight)
        if total is not None and part is not total:
            part = total + part.to(total.device)
        self.sums[number] = part

    def _vectorised(self, logits: Tensor, anchor: Tensor) -> bool:
        """C backward passes as one; False where they meet a reentrant checkpoint."""
        b, c = logits.shape
        basis = torch.eye(c, dtype=logits.dtype, device=logits.device)
        try:
            backward_at_once(logits, anchor, basis[:, None].expand(c, b, c), retain_graph=False)
        except RuntimeError:
            if not checkpointed_reentrantly(logits):
                raise
            return False
        # A reentrant checkpoint with no gradient of a leaf behind it is left out without an error.
        return len(self.seen) == len(self.sites.numbers) or not checkpointed_reentrantly(logits)

    def _with_copies(self, reader: Reader, batch: Any) -> None:
        """One backward pass over C copies of the batch."""
        b, c = self.batch, self.classes
        logits = reader.logits(repeated(batch, b, c))
        self.require_gradient(logits)
        if logits.shape[0] != b * c:
            raise ValueError(
                f"Laplace: jacobian='repeat' must be able to repeat the batch, got "
                f"{logits.shape[0]} rows of logits instead of {b * c}; use 'vmap'"
            )
        take_last(logits)  # it has been added
        # Copy c of the batch gets the gradient of logit c.
        basis = torch.eye(c, dtype=logits.dtype, device=logits.device)
        logits.backward(basis.repeat_interleave(b, 0))


def acting_tokens(a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """a (B, T, in) and g (B, C, T, out) without tokens whose gradients are zero, as below a pooled head.

    As many are left as act on the logits in the example with the most.
    """
    some = g.ne(0).any(-1).any(1)  # (B, T)
    most = max(1, int(some.sum(1).max()))
    if most == some.shape[1]:
        return a, g
    index = some.byte().argsort(dim=1, descending=True, stable=True)[:, :most]
    return a.take_along_dim(index[..., None], 1), g.take_along_dim(index[:, None, :, None], 2)


# root (B, C, K), rest (B or 1, C, C) or None, and weight: a layer's J Sigma J^T is root root^T + weight rest.
Part = tuple[Tensor, Tensor | None, Tensor]


def one_token(a: Tensor, g: Tensor, block: Block, deltas: Sequence[float]) -> Iterator[Part]:
    """J Sigma J^T of a layer that sees one token of each example, for each delta.

    With G_c = g_c a^T the sum over ij of P_c P_e / (mu_i nu_j + delta) is one over j alone:

        M diag(s) M^T,  M = (Q^T g_c)_cj,  s_j = sum_i (U^T a)_i^2 / (mu_i nu_j + delta)

    Args:
        a: (B, 1, in) inputs.
        g: (B or 1, C, 1, out) gradients.
        block: the posterior.
        deltas: prior precisions.
    """
    a, g = a[:, 0], g[:, :, 0]
    au, m = a @ block.u, g @ block.q
    squares = au.square()
    # R_c = g_rest a^T + g_span a_rest^T, two orthogonal parts; None where they are zero.
    beside = None if block.complete("in") else (a - au @ block.u.T).square().sum(-1)
    outside, norms = None, a.square().sum(-1)
    if not block.complete("out"):
        left = g - m @ block.q.T
        outside = left @ left.mT
    for delta in deltas:
        s = squares @ (block.products + delta).reciprocal().to(a.dtype).T
        if beside is not None:
            s = s + beside[:, None] / delta
        yield m * s.sqrt()[:, None], outside, norms[:, None, None] / delta


def several_tokens(a: Tensor, g: Tensor, block: Block, deltas: Sequence[float]) -> Iterator[Part]:
    """J Sigma J^T of a layer for each delta; a (B, T, in), g (B, C, T, out)."""
    inner, rest = project(a, g, block)
    for delta in deltas:
        scale = (block.products + delta).rsqrt().to(a.dtype).reshape(-1)
        yield inner * scale, rest, a.new_tensor(1 / delta)


def project(a: Tensor, g: Tensor, block: Block) -> tuple[Tensor, Tensor | None]:
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
