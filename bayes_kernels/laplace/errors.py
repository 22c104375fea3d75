"""Gradients of the logits whose outer products sum to the curvature of the loss."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .. import reference


class SoftmaxRoot:
    """C - 1 columns (B, C) of a matrix R with R R^T = diag(p) - p p^T for each example.

    F = diag(sqrt p) - p sqrt(p)^T has that product and F sqrt(p) = 0: a reflection that takes
    sqrt(p) to the first axis makes its first column zero, which saves one backward pass. Column c of
    the others is sqrt(p_c) (e_c - h), with h_0 = sqrt(p_0) and h_i = p_i / (1 + sqrt(p_0)).

    Args:
        logits: (B, C).

    Attributes:
        count: number of columns.
    """

    def __init__(self, logits: Tensor) -> None:
        self.p = logits.softmax(-1)
        self.count = logits.shape[1] - 1

    def columns(self, start: int, stop: int) -> Tensor:
        """Columns from `start` to before `stop`, (V, B, C)."""
        p, root = self.p, self.p[:, :1].sqrt()
        h = torch.cat([root, p[:, 1:] / (1 + root)], 1)
        scale = p.T[start + 1 : stop + 1].sqrt()  # (V, B)
        found = -h * scale[:, :, None]
        found[:, :, start + 1 : stop + 1].diagonal(dim1=0, dim2=2).add_(scale.T)
        return found

    def total(self) -> Tensor:
        """Sum of the outer products over examples and columns, (C, C) fp64.

        Rows of diag(p) - p p^T sum to zero, so that its diagonal is a sum of positive numbers as well:
        nothing cancels where p is close to 1.
        """
        wide = self.p.double()
        pairs = (wide.T @ wide).fill_diagonal_(0)
        return pairs.sum(1).diag() - pairs

    def largest(self) -> Tensor:
        """A number that is 0 only where all columns are: the second largest probability."""
        return self.p.topk(2).values[:, 1].max()


class Errors:
    """Gradients p - onehot(y) of the log-likelihood for given labels.

    Args:
        values: (V, B, C).

    Attributes:
        count: V.
    """

    def __init__(self, values: Tensor) -> None:
        self.values = values
        self.count = len(values)

    def columns(self, start: int, stop: int) -> Tensor:
        """Gradients from `start` to before `stop`, (V, B, C)."""
        return self.values[start:stop]

    def total(self) -> Tensor:
        """Sum of the outer products, (C, C) fp64."""
        rows = self.values.flatten(0, 1).double()
        return rows.T @ rows

    def largest(self) -> Tensor:
        """Largest entry."""
        return self.values.abs().max()


def label_errors(logits: Tensor, labels: Tensor) -> Errors:
    """p - onehot(y) of labels (B,)."""
    return Errors((logits.softmax(-1) - nn.functional.one_hot(labels, logits.shape[1]))[None])


def sampled_errors(logits: Tensor, key: Tensor, index: Tensor, draws: int) -> Errors:
    """(p - onehot(y)) / sqrt(draws) for labels y ~ p, drawn by example index."""
    p = logits.softmax(-1)
    cumulative = p.cumsum(-1)
    errors = []
    for draw in range(draws):
        words = reference.philox(reference.fold_in(key, draw), index)[:, 0]
        uniform = (words.double() + 0.5) * 2.0**-32
        label = (cumulative < uniform[:, None]).sum(-1).clamp(max=p.shape[1] - 1)
        hot = nn.functional.one_hot(label, p.shape[1])
        errors.append((p - hot) / math.sqrt(draws))
    return Errors(torch.stack(errors))
