"""Labels of tokens: the likelihood of language models, and gradients of labels drawn at each token."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .. import reference
from ..batches import IGNORED
from .layers import Sites
from .passes import Reader, where_not_finite

# Rules of `tokens` that a likelihood with a term for each token has.
RULES = ("expand", "sum", "reduce")

# Logits that are widened at a time, so that a vocabulary's distributions take little memory.
_AT_ONCE = 1 << 22

# Counters between labels of one example: label 0 has those of an example with one label.
_STRIDE = 1 << 40


class LabelledTokens:
    """The tokens of a batch that have a label, and how likely a model finds them.

    Args:
        logits: (B, T, C), without a graph; those at a token predict its label.
        labels: (B, T) int64, -100 where a token does not count.

    Attributes:
        counted: (B, T) bool, where there is a label.
        counts: (B,) labels of each example.
        total: N, labels of the batch.
    """

    def __init__(self, logits: Tensor, labels: Tensor) -> None:
        self.logits = logits
        self.counted = labels != IGNORED
        self.counts = self.counted.sum(1)
        self.where = self.counted.nonzero(as_tuple=True)
        self.labels = labels[self.where]
        self.total = len(self.labels)

    def parts(self) -> Iterator[tuple[slice, Tensor]]:
        """Labelled tokens in order, some at a time: which, and their logits (n, C), fp32 or wider."""
        wide = torch.promote_types(self.logits.dtype, torch.float32)
        size = max(1, _AT_ONCE // self.logits.shape[-1])
        for start in range(0, self.total, size):
            part = slice(start, start + size)
            example, position = (w[part] for w in self.where)
            yield part, self.logits[example, position].to(wide)

    def first_not_finite(self) -> int | None:
        """Number of the first example with a NaN or an infinity where a label is; None without one."""
        for part, logits in self.parts():
            bad = ~torch.isfinite(logits).all(-1)
            if bool(bad.any()):
                return int(self.where[0][part][bad][0])
        return None

    def log_likelihood(self) -> float:
        """sum_t log p(y_t), nats."""
        terms = [
            nn.functional.cross_entropy(logits, self.labels[part], reduction="none").double().sum()
            for part, logits in self.parts()
        ]
        return -float(torch.stack(terms).sum()) if terms else 0.0

    def log_probs(self) -> Tensor:
        """(N,) log p(y_t), fp64 on the CPU."""
        terms = [
            -nn.functional.cross_entropy(logits, self.labels[part], reduction="none").double().cpu()
            for part, logits in self.parts()
        ]
        return torch.cat(terms) if terms else torch.zeros(0, dtype=torch.float64)

    def drawn(self, key: Tensor, index: Tensor, draws: int) -> TokenErrors:
        """Errors of labels y_t ~ p_t, independent at each labelled token.

        They depend on the example's number and on how many labels come before, so neither on the batch
        nor on padding.

        Args:
            key: of the draws.
            index: (B,) numbers of the examples.
            draws: labels at each token.
        """
        order = (self.counted.cumsum(1) - 1)[self.where]
        counter = index[self.where[0]] + order * _STRIDE
        found: list[list[Tensor]] = [[] for _ in range(draws)]
        for part, logits in self.parts():
            cumulative = logits.softmax(-1).cumsum(-1)
            for draw, labels in enumerate(found):
                words = reference.philox(reference.fold_in(key, draw), counter[part])[:, 0]
                uniform = (words.double() + 0.5) * 2.0**-32
                label = (cumulative < uniform[:, None]).sum(-1)
                labels.append(label.clamp(max=logits.shape[-1] - 1))
        return TokenErrors(self, torch.stack([torch.cat(labels) for labels in found]))

    def given(self) -> TokenErrors:
        """Errors of the labels themselves."""
        return TokenErrors(self, self.labels[None])


class TokenErrors:
    """Gradients (p_t - onehot(y_t)) / sqrt(V) of the logits at labelled tokens, zero at others.

    One backward pass for each of the V rows of labels has the sum over all labelled tokens of a sequence.
    Its square has products of different tokens too. For labels drawn from the model their mean is zero:

        E[(sum_t J_t^T e_t) (sum_t J_t^T e_t)^T] = sum_t J_t^T (diag(p_t) - p_t p_t^T) J_t,

    as the e_t are independent with mean zero: the generalised Gauss-Newton matrix of all tokens. For
    the labels of the data it is not, and that curvature has them.

    Args:
        tokens: labelled tokens.
        labels: (V, N) labels.

    Attributes:
        count: V.
    """

    def __init__(self, tokens: LabelledTokens, labels: Tensor) -> None:
        self.tokens, self.labels = tokens, labels
        self.count = len(labels)

    def columns(self, start: int, stop: int) -> Tensor:
        """Gradients from `start` to before `stop`, (stop - start, B, T, C) in the dtype of the logits."""
        logits = self.tokens.logits
        found = logits.new_zeros(stop - start, *logits.shape)
        for part, wide in self.tokens.parts():
            p = wide.softmax(-1)
            example, position = (w[part] for w in self.tokens.where)
            for column in range(start, stop):
                error = p.clone()
                error.scatter_add_(
                    1, self.labels[column, part, None], error.new_full((len(p), 1), -1.0)
                )
                found[column - start, example, position] = error.div_(math.sqrt(self.count)).to(
                    found
                )
        return found

    def largest(self) -> Tensor:
        """A number that is 0 only where all gradients are: the largest 1 - p_t(y_t)."""
        found = self.tokens.logits.new_zeros((), dtype=torch.float32)
        for part, wide in self.tokens.parts():
            missing = 1 - wide.softmax(-1).gather(1, self.labels[:, part].T)
            found = found.maximum(missing.max().float())
        return found


def labelled_tokens(
    reader: Reader, sites: Sites, batch: Any, logits: Tensor, first: int, fisher: str, rule: str
) -> LabelledTokens:
    """The labels (B, T) of a batch of `fit`, whose logits are (B, T, C).

    Args:
        reader: reads the labels.
        sites: the layers, for a message.
        batch: a prepared batch.
        logits: its logits.
        first: number of its first example.
        fisher, rule: `fisher` and `tokens` of `Laplace`.

    Raises:
        ValueError: options do not fit labels of tokens, there are no labels, or logits are not finite.
    """
    if fisher == "ggn":
        raise ValueError(
            "Laplace.fit: fisher must be 'mc' (or 'empirical') for labels of tokens, got 'ggn': one "
            f"backward pass for all tokens has no exact columns, {logits.shape[-1]} classes each"
        )
    if rule not in RULES:
        raise ValueError(
            f"Laplace.fit: tokens must be one of {RULES} for labels of tokens, got {rule!r}"
        )
    labels = reader.labels(batch, logits)
    if labels is None:
        raise ValueError(
            "Laplace.fit: batches must have labels (B, T), -100 where a token does not count, for "
            f"logits of shape {tuple(logits.shape)}, got none; pass labels=lambda batch: ..."
        )
    found = LabelledTokens(logits.detach(), labels)
    if (row := found.first_not_finite()) is not None:
        where = where_not_finite(reader, sites, batch)
        raise ValueError(
            "Laplace.fit: logits of labelled tokens must be finite, got NaN or infinity, first in "
            f"{where} (example {first + row} of the loader); look at these inputs, or run the model "
            "in float32 or bfloat16"
        )
    return found
