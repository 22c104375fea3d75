"""Predictions and labels to score."""

from __future__ import annotations

import torch


def make_case(n: int = 400, n_classes: int = 5, seed: int = 0, sharpness: float = 2.0):
    """Overconfident log-probabilities in float64, and labels drawn from softer ones."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, n_classes, generator=generator, dtype=torch.float64)
    labels = torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(1)
    return (sharpness * logits).log_softmax(-1), labels
