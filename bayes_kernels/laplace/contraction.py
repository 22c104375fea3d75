"""Covariance of the logits of a linearised model, layer by layer in one backward pass."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..batches import repeated
from .factors import Block
from .layers import Sites
from .passes import Collector, Reader, by_example, checkpointed_reentrantly, watched


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
            if jacobian == "vmap":
                mean = self._vectorised(reader, batch, anchor)
                if mean is None:
                    return None
            else:
                mean = self._with_copies(reader, batch)
        missing = [m for m in self.sites.numbers if m not in self.seen]
        if missing:
            raise ValueError(f"Laplace: {self.sites.idle(missing[0], self.called)}")
        wide = torch.promote_types(mean.dtype, torch.float32)
        covs = [cov.to(mean.device, wide) for cov in self.sums if cov is not None]
        return mean.to(wide), covs

    def collect(self, numbers: list[int], x: Tensor, dy: Tensor) -> None:
        """Add one module's layers; dy is (C, B, ..., m), or (1, C B, ..., m) for C copies of x."""
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
            g = g.reshape(c, b, tokens, -1).transpose(0, 1).to(wide)  # (B, C, T, out)
            inner, rest = project(a, g, block)
            for number, delta in enumerate(self.deltas):
                scale = (block.products + delta[i]).rsqrt().to(wide).reshape(-1)
                scaled = inner * scale
                part = scaled @ scaled.mT
                if rest is not None:
                    part = part + rest / delta[i]
                before = self.sums[number]
                self.sums[number] = part if before is None else before + part.to(before.device)

    def _vectorised(self, reader: Reader, batch: Any, anchor: Tensor) -> Tensor | None:
        """Logits, after C backward passes as one; None where they meet a reentrant checkpoint."""
        logits = reader.logits(batch)
        self.require_gradient(logits)
        b, c = self.batch, self.classes = logits.shape
        basis = torch.eye(c, dtype=logits.dtype, device=logits.device)

        def pull(cotangent: Tensor) -> Tensor:
            torch.autograd.grad(logits, anchor, cotangent.expand(b, c), allow_unused=True)
            return cotangent.sum()

        with warnings.catch_warnings():
            # Attention kernels whose backward runs once for each class instead.
            warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
            try:
                torch.func.vmap(pull)(basis)
            except RuntimeError:
                if not checkpointed_reentrantly(logits):
                    raise
                return None
        # A reentrant checkpoint with no gradient of a leaf behind it is left out without an error.
        if len(self.seen) < len(self.sites.numbers) and checkpointed_reentrantly(logits):
            return None
        return logits.detach()

    def _with_copies(self, reader: Reader, batch: Any) -> Tensor:
        """Logits, after one backward pass over C copies of the batch."""
        with torch.no_grad():
            mean = reader.logits(batch)
        b, c = self.batch, self.classes = mean.shape
        logits = reader.logits(repeated(batch, b, c))
        self.require_gradient(logits)
        if logits.shape[0] != b * c:
            raise ValueError(
                f"Laplace: jacobian='repeat' must be able to repeat the batch, got "
                f"{logits.shape[0]} rows of logits instead of {b * c}; use 'vmap'"
            )
        # Copy c of the batch gets the gradient of logit c.
        basis = torch.eye(c, dtype=logits.dtype, device=logits.device)
        logits.backward(basis.repeat_interleave(b, 0))
        return mean


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
