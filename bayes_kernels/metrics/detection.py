"""Detection of out-of-distribution inputs by an uncertainty score."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .inputs import ArrayLike, as_scores


def ood_auroc(score_in: ArrayLike, score_out: ArrayLike) -> float:
    """Area under the ROC curve of telling inputs apart by an uncertainty score.

    Out-of-distribution is the positive class and scores are uncertainties (predictive entropy,
    mutual information): `P(out > in) + P(out = in) / 2` over all pairs, 1 for perfect
    separation, 0.5 for none. Exchanging the classes and the sign of the score changes nothing.

    Args:
        score_in: (n,) scores of in-distribution inputs, higher is more uncertain.
        score_out: (m,) scores of out-of-distribution inputs.
    """
    inside, outside = score_pair("ood_auroc", score_in, score_out)
    inside = inside.sort().values
    below = torch.searchsorted(inside, outside, right=False)
    not_above = torch.searchsorted(inside, outside, right=True)
    # Ranks are summed as integers: exact whatever the number of pairs.
    return int((below + not_above).sum()) / (2 * len(inside) * len(outside))


def fpr_at_tpr(score_in: ArrayLike, score_out: ArrayLike, *, tpr: float = 0.95) -> float:
    """Share of in-distribution inputs flagged when at least `tpr` of the others are found.

    Out-of-distribution is the positive class, as in `ood_auroc`: an input is flagged when its
    score reaches the largest threshold that flags a share `>= tpr` of `score_out`. (ODIN
    calls in-distribution positive; for that convention pass
    `fpr_at_tpr(-score_out, -score_in)`.)

    Args:
        score_in, score_out: as in `ood_auroc`.
        tpr: true positive rate in (0, 1].
    """
    if not 0.0 < tpr <= 1.0:
        raise ValueError(f"fpr_at_tpr: tpr must lie in (0, 1], got {tpr!r}")
    inside, outside = score_pair("fpr_at_tpr", score_in, score_out)
    # The margin keeps a product such as 0.95 * 20, should it round up, from asking for one more.
    needed = max(1, math.ceil(tpr * len(outside) - 1e-9))
    threshold = outside.sort(descending=True).values[needed - 1]
    return float((inside >= threshold).double().mean())


def fpr95(score_in: ArrayLike, score_out: ArrayLike) -> float:
    """`fpr_at_tpr` at a true positive rate of 95 %; out-of-distribution is positive.

    Args:
        score_in, score_out: as in `ood_auroc`.
    """
    return fpr_at_tpr(score_in, score_out, tpr=0.95)


def score_pair(where: str, score_in: ArrayLike, score_out: ArrayLike) -> tuple[Tensor, Tensor]:
    """Scores of two groups on one device, without NaN and not empty."""
    inside = as_scores(where, "score_in", score_in)
    return inside, as_scores(where, "score_out", score_out).to(inside.device)
