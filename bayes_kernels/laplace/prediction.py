"""What a posterior predicts, and from Gaussian logits to probabilities."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .. import functional, random
from ..functional.predict import entropy_apart


@dataclass(frozen=True)
class Prediction:
    """Predictive distribution of one batch.

    Attributes:
        log_probs: (B, C) logarithm of the mean distribution; (B, T, C) for a model of tokens.
        entropy: (B,) or (B, T), its entropy in nats: total uncertainty.
        expected_entropy: (B,) mean entropy of the draws, the part that is not due to the weights;
            None for method "probit".
        logit_mean: (B, C) logits of the linearised model; None for method "weights".
        logit_cov: (B, C, C) their covariance; None for method "weights".
    """

    log_probs: Tensor
    entropy: Tensor
    expected_entropy: Tensor | None
    logit_mean: Tensor | None = None
    logit_cov: Tensor | None = None

    @property
    def probs(self) -> Tensor:
        """(B, C) mean distribution."""
        return self.log_probs.exp()

    @property
    def mutual_information(self) -> Tensor:
        """(B,) entropy - expected_entropy in nats: what is due to uncertainty about the weights."""
        return entropy_apart(self.entropy, self.expected_entropy)


def from_logits(
    mean: Tensor, cov: Tensor, method: str, n_samples: int, seed: int, row0: int = 0
) -> Prediction:
    """The prediction of Gaussian logits.

    Args:
        mean: (B, C).
        cov: (B, C, C).
        method: as for `Laplace.predict`, but for "weights".
        n_samples: draws of "mc" and "mc_independent".
        seed: of the draws.
        row0: number of the first example.
    """
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
