"""The posterior as a whole: predictions, draws of the weights, stored states, errors."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from bayes_kernels import random
from bayes_kernels.laplace import Laplace, linear_layers
from test_laplace.networks import D, adapters, kronecker, low_rank_posterior, mlp, sequences


def test_predictions_of_all_methods():
    _model, x, _y, la = low_rank_posterior()
    la.optimize_prior_precision()
    mean, cov = la.logits((x,))
    joint = la.predict((x,), n_samples=4000, seed=3)
    torch.testing.assert_close(joint.probs.sum(1), torch.ones(9, dtype=D))
    assert bool((joint.mutual_information > 0).all())
    torch.testing.assert_close(joint.logit_cov, cov)
    # 4 standard errors of 4000 draws, for independent normals of another generator.
    factor = torch.linalg.cholesky(cov + 1e-9 * torch.eye(4, dtype=D))
    draws = mean + torch.einsum("bce,sbe->sbc", factor, torch.randn(20000, 9, 4, dtype=D))
    error = (joint.probs - draws.softmax(-1).mean(0)).abs().max()
    assert float(error) < 4 * 0.5 / math.sqrt(4000)
    for method in ("mc_independent", "probit", "bridge"):
        other = la.predict((x,), method=method, n_samples=500)
        torch.testing.assert_close(other.probs.sum(1), torch.ones(9, dtype=D))
        if method == "probit":
            with pytest.raises(ValueError, match="mutual_information: method 'probit' gives no"):
                _ = other.mutual_information
    # Draws belong to examples, not to batches.
    parts = [la.predict((x[i:j],), seed=3, row0=i).probs for i, j in ((0, 4), (4, 9))]
    whole = la.predict((x,), seed=3).probs
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-9, atol=1e-12)


def test_two_classes_need_no_draws():
    model, x, y = mlp(classes=2)
    la = Laplace(model).fit([(x, y)])
    exact = la.predict((x,), method="quadrature").probs
    drawn = la.predict((x,), n_samples=20000).probs
    assert float((exact - drawn).abs().max()) < 4 * 0.5 / math.sqrt(20000)


def test_weight_samples_have_the_posterior_covariance(monkeypatch: pytest.MonkeyPatch):
    """The draw is linear in its normals: unit vectors give the covariance's root exactly."""
    _, _, _, la = low_rank_posterior()
    la.prior_precision = 0.8
    columns: list[list[torch.Tensor]] = [[] for _ in la.layers]
    sizes = [layer.weight.numel() for layer in la.layers]
    for i in range(max(sizes)):

        def unit(key, size, *, stream=0, i=i):
            e = torch.zeros(math.prod(size))
            e[min(i, len(e) - 1)] = 1.0
            return e.reshape(size)

        monkeypatch.setattr(random, "normal", unit)
        draw = la.sample()
        for j, layer in enumerate(la.layers):
            if i < sizes[j]:
                columns[j].append((draw[layer.name] - layer.weight.detach()).flatten())
    for h, root in zip(kronecker(la), columns, strict=True):
        root = torch.stack(root, 1)
        expected = torch.linalg.inv(h + 0.8 * torch.eye(len(h), dtype=D))
        torch.testing.assert_close(root @ root.T, expected, rtol=1e-9, atol=1e-11)


def test_weight_samples_are_functions_of_seed_and_index():
    _model, x, _, la = low_rank_posterior()
    a, b, c = la.sample(1, 0), la.sample(1, 1), la.sample(1, 0)
    assert all(torch.equal(a[k], c[k]) and not torch.equal(a[k], b[k]) for k in a)
    with la.sampled(1, 0):
        for layer in la.layers:
            torch.testing.assert_close(layer.weight.detach(), a[layer.name])
    small = la.predict((x,), method="weights", n_samples=3, seed=5)
    assert torch.equal(small.probs, la.predict((x,), method="weights", n_samples=3, seed=5).probs)
    assert bool((small.mutual_information > 0).all())


@pytest.mark.parametrize("dtype", [D, torch.float32])
def test_state_through_safetensors(dtype: torch.dtype, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    model, x, _y, la = low_rank_posterior(dtype)
    la.optimize_prior_precision(structure="layer")
    safetensors.save_file(la.state_dict(), tmp_path / "posterior.safetensors")
    other = Laplace(model, adapters(model), rank=4, dense_below=8)
    other.load_state_dict(safetensors.load_file(tmp_path / "posterior.safetensors"))
    for name, value in other.state_dict().items():
        assert value.dtype == la.state_dict()[name].dtype, name
    assert torch.equal(other.logits((x,))[1], la.logits((x,))[1])
    assert torch.equal(other.log_marginal_likelihood(), la.log_marginal_likelihood())
    state = la.state_dict()
    wrong = {**state, "first.lora_A.input_vectors": state["first.lora_A.input_vectors"][:-1]}
    with pytest.raises(
        ValueError, match=r"first\.lora_A must have vectors \(20, k\) and \(3, k'\)"
    ):
        other.load_state_dict(wrong)
    del state["first.lora_A.input_values"]
    with pytest.raises(
        ValueError, match=r"missing or unknown, such as 'first\.lora_A\.input_values'"
    ):
        other.load_state_dict(state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_models(dtype: torch.dtype):
    """Factors are summed in fp32: what is left is the rounding of the model's own passes."""
    model, x, y = sequences(n=16)
    expected = Laplace(model, adapters(model), rank=4, dense_below=8).fit([(x, y)])
    narrow, _, _ = sequences(n=16, dtype=dtype)
    narrow.load_state_dict(model.state_dict())
    ours = Laplace(narrow, adapters(narrow), rank=4, dense_below=8).fit([(x.to(dtype), y)])
    bound = 1e-5 if dtype == torch.float32 else 0.05
    for a, b in zip(kronecker(expected), kronecker(ours), strict=True):
        assert float((a - b).norm() / a.norm()) < bound
    cov, other = expected.logits((x,))[1], ours.logits((x.to(dtype),))[1]
    assert other.dtype == torch.float32
    assert float((cov - other).norm() / cov.norm()) < bound


def test_untrained_adapters_are_found():
    model, x, y = sequences()
    nn.init.zeros_(model.second.lora_B.weight)
    with pytest.raises(ValueError, match=r"second\.lora_A must have gradients.*B before training"):
        Laplace(model, adapters(model)).fit([(x, y)])
    with pytest.raises(ValueError, match=r"second\.lora_A\.weight must have curvature.*B = 0"):
        Laplace(model, linear_layers(model, "second.lora_A"), rank=None).fit([(x, y)])


def test_errors():
    model, x, y = mlp()
    for options, text in (
        ({"fisher": "exact"}, "fisher must be one of"),
        ({"tokens": "all"}, "tokens must be one of"),
        ({"rank": 0}, "rank must be at least 1"),
        ({"prior_precision": -1.0}, "prior_precision must be one positive"),
        ({"prior_precision": torch.ones(3)}, "one for each of the 4 layers"),
        ({"layers": []}, "distinct names"),
    ):
        with pytest.raises(ValueError, match=text):
            Laplace(model, **options)
    la = Laplace(model)
    with pytest.raises(ValueError, match="fit must come first"):
        la.predict((x,))
    with pytest.raises(ValueError, match="at least one example"):
        la.fit([])
    with pytest.raises(ValueError, match="logits"):
        Laplace(model, forward=lambda m, b: m(b[0])[:, :1]).fit([(x, y)])
    with pytest.raises(ValueError, match="labels must be class indices"):
        la.fit([(x, y.double())])
    la.fit([(x,)])
    with pytest.raises(ValueError, match="fit must have seen labels"):
        la.log_marginal_likelihood()
    la.optimize_prior_precision()  # needs none
    with pytest.raises(ValueError, match="method must be"):
        la.predict((x,), method="magic")
    with pytest.raises(ValueError, match="must have a loader"):
        la.optimize_prior_precision("validation")
    with pytest.raises(ValueError, match="must have labels"):
        Laplace(model, fisher="empirical").fit([(x,)])
    with pytest.raises(ValueError, match=r"names must be nn\.Linear"):
        linear_layers(model, ["1"])
    twice = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    again = nn.Sequential(twice[0], twice[1], twice[0], twice[1], twice[2])
    with pytest.raises(ValueError, match="used once in a forward pass"):
        Laplace(again, linear_layers(again, "0")).fit([(x, y)])
    unused = nn.ModuleDict({"used": nn.Linear(4, 3), "idle": nn.Linear(4, 3)}).double()
    with pytest.raises(ValueError, match=r"idle\.weight must be called in the forward pass"):
        Laplace(unused, forward=lambda m, b: m["used"](b[0])).fit([(x, y)])
