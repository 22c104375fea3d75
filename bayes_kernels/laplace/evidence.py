"""The evidence as a function of the prior precision delta, and how delta is chosen."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .factors import Block
from .layers import Layer


class Evidence(NamedTuple):
    """What the log evidence needs of a posterior. All tensors are fp64 on the CPU.

    Attributes:
        products: (P,) nu_j mu_i of all layers.
        sizes: (layers,) int64, number of products of each layer.
        norms: (layers,) |theta|^2 of each layer.
    """

    products: Tensor
    sizes: Tensor
    norms: Tensor

    @property
    def segment(self) -> Tensor:
        """(P,) number of the layer of each product."""
        return torch.repeat_interleave(torch.arange(len(self.sizes)), self.sizes)

    @classmethod
    def of(cls, layers: Sequence[Layer], blocks: Sequence[Block]) -> Evidence:
        """The evidence of layers with these posteriors."""
        products = [block.products.reshape(-1).cpu() for block in blocks]
        sizes = torch.tensor([p.numel() for p in products])
        norms = [layer.weight.detach().double().square().sum().cpu() for layer in layers]
        return cls(torch.cat(products), sizes, torch.stack(norms))

    def relative(self, delta: float | Tensor) -> Tensor:
        """The log evidence less the log-likelihood at the mode, 0-dim.

        Args:
            delta: one number, or a tensor with one for each layer; it may require a gradient.
        """
        delta = torch.as_tensor(delta, dtype=torch.float64)
        if delta.dim() == 0 and not delta.requires_grad:
            determinant = (self.products / delta).log1p_().sum()
        else:
            delta = delta.expand(len(self.norms))
            determinant = torch.log1p(self.products / delta[self.segment]).sum()
        return -0.5 * ((delta * self.norms).sum() + determinant)

    def effective_parameters(self, delta: Tensor) -> Tensor:
        """gamma of each layer: sum_ij mu_i nu_j / (mu_i nu_j + delta), (layers,)."""
        delta = delta.expand(len(self.norms))
        w = self.products / (self.products + delta[self.segment])
        return torch.zeros_like(self.norms).index_add_(0, self.segment, w)

    def mackay(self, structure: str) -> Tensor:
        """The stationary point of the evidence by Newton steps on log delta.

        Args:
            structure: "scalar", one delta; "layer", one for each layer.

        Raises:
            ValueError: weights are all zero.
        """
        products, segment, norms = self.products, self.segment, self.norms
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

    def ascent(self, delta: Tensor, structure: str, lr: float, steps: int) -> Tensor:
        """Adam on log delta.

        Args:
            delta: where it starts.
            structure: "scalar", one delta; "layer", one for each layer.
            lr: learning rate.
            steps: number of steps.
        """
        start = delta.log()
        if structure == "layer":
            start = start.expand(len(self.norms))
        elif start.dim() == 1:
            start = start.mean()
        log_delta = start.clone().requires_grad_()
        optimiser = torch.optim.Adam([log_delta], lr=lr)
        for _ in range(steps):
            optimiser.zero_grad()
            with torch.enable_grad():
                loss = -self.relative(log_delta.exp())
            loss.backward()
            optimiser.step()
        return log_delta.detach().exp()


def best_of_grid(
    score: Callable[[Tensor], tuple[Tensor, int]], grid: Tensor, refine: int
) -> Tensor:
    """The delta of a grid with the highest log-likelihood of held-out examples.

    Args:
        score: a grid (G,) -> the log-likelihood (G,) of held-out examples, and their number.
        grid: (G,) rising values.
        refine: number of further grids around the best.

    Raises:
        ValueError: there are no examples, or no finite likelihood.
    """
    for last in [False] * refine + [True]:
        scores, seen = score(grid)
        if not seen or not bool(torch.isfinite(scores).any()):
            raise ValueError(
                "Laplace.optimize_prior_precision: loader must give held-out examples of finite "
                f"likelihood in each of {refine + 1} passes, got {seen} examples; pass a list or a "
                "DataLoader, not a generator"
            )
        top = int(scores.nan_to_num(nan=-math.inf).argmax())
        if last:
            break
        low, high = grid[max(top - 1, 0)], grid[min(top + 1, len(grid) - 1)]
        grid = torch.logspace(
            math.log10(float(low)), math.log10(float(high)), len(grid), dtype=torch.float64
        )
    return grid[top]
