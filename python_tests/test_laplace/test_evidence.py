"""The prior precision: the optimum of the evidence, and the best of a grid."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from bayes_kernels.laplace import Laplace, linear_layers
from bayes_kernels.laplace.evidence import Evidence, best_of_grid
from test_laplace.networks import D, low_rank_posterior, mlp


@pytest.mark.parametrize("structure", ["scalar", "layer"])
def test_mackay_is_the_optimum_of_the_evidence(structure: str):
    _, _, _, la = low_rank_posterior()
    best = la.optimize_prior_precision(structure=structure)
    assert best.shape == (() if structure == "scalar" else (4,))
    log_delta = best.log().clone().requires_grad_()
    value = la.log_marginal_likelihood(log_delta.exp())
    (slope,) = torch.autograd.grad(value, log_delta)
    assert float(slope.abs().max()) < 1e-10
    for factor in (0.5, 0.9, 1.1, 2.0):
        assert la.log_marginal_likelihood(best * factor) < value
    # gamma = delta |theta|^2, MacKay's condition.
    norms = torch.stack([layer.weight.detach().square().sum() for layer in la.layers])
    gamma = la.effective_parameters()
    if structure == "scalar":
        gamma, norms = gamma.sum(), norms.sum()
    torch.testing.assert_close(best * norms, gamma, rtol=1e-10, atol=0)
    la.prior_precision = 1.0
    adam = la.optimize_prior_precision("gradient", structure=structure, lr=0.1, steps=400)
    torch.testing.assert_close(adam, best, rtol=1e-3, atol=0)


def test_validation_takes_the_best_of_the_grid():
    _model, _x, _y, la = low_rank_posterior()
    held_out = torch.randn(12, 5, 20, dtype=D), torch.randint(0, 4, (12,))
    grid = torch.logspace(-2, 2, 9, dtype=D)
    scores = []
    for delta in grid:
        la.prior_precision = delta
        log_probs = la.predict((held_out[0],), method="probit").log_probs
        scores.append(float(log_probs.gather(1, held_out[1][:, None]).sum()))
    best = la.optimize_prior_precision("validation", loader=[held_out], grid=grid, refine=0)
    assert float(best) == float(grid[max(range(9), key=scores.__getitem__)])
    fine = la.optimize_prior_precision("validation", loader=[held_out], grid=grid, refine=2)
    la.prior_precision = fine
    log_probs = la.predict((held_out[0],), method="probit").log_probs
    assert float(log_probs.gather(1, held_out[1][:, None]).sum()) >= max(scores) - 1e-9


def test_a_prior_is_not_chosen_without_held_out_examples():
    model, x, y = mlp()
    la = Laplace(model, linear_layers(model))
    la.fit([(x, y)], verbose=False)
    before = la.prior_precision.clone()
    with pytest.raises(ValueError, match="must give held-out examples"):
        la.optimize_prior_precision("validation", loader=[])
    assert torch.equal(la.prior_precision, before)


@pytest.mark.parametrize("top", [0.0, 1.3, -2.0, 5.0])
def test_further_grids_close_in_on_the_best_value(top: float):
    """Each grid has the neighbours of the best value at its ends; a NaN is never the best."""
    seen = []

    def score(grid):
        scores = -(grid.log10() - top).square()
        scores[3] = math.nan
        seen.append((grid, int(scores.nan_to_num(nan=-math.inf).argmax())))
        return scores, 7

    found = best_of_grid(score, torch.logspace(-2, 2, 9, dtype=D), 3)
    assert len(seen) == 4 and abs(math.log10(found) - min(max(top, -2.0), 2.0)) < 0.05
    for (grid, best), (finer, _) in pairwise(seen):
        torch.testing.assert_close(finer[0], grid[max(best - 1, 0)])
        torch.testing.assert_close(finer[-1], grid[min(best + 1, 8)])


@pytest.mark.parametrize("answer", [(torch.zeros(3), 0), (torch.full((3,), math.nan), 5)])
def test_a_grid_needs_examples_of_finite_likelihood(answer):
    with pytest.raises(ValueError, match="must give held-out examples of finite"):
        best_of_grid(lambda grid: answer, torch.ones(3), 1)


def test_one_precision_is_that_of_each_layer():
    """The same bits, whether delta is a number, one for each layer, or needs a gradient."""
    products = torch.rand(50, dtype=torch.float64) * 100
    norms = torch.rand(3, dtype=torch.float64)
    evidence = Evidence(products, torch.tensor([10, 25, 15]), norms)
    want = evidence.relative(torch.full((3,), 0.7, dtype=torch.float64))
    assert torch.equal(evidence.relative(0.7), want)
    delta = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    assert torch.equal(evidence.relative(delta).detach(), want)
    assert torch.equal(evidence.products, products)
