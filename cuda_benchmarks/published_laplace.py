"""The Gaussian of the logits under a Laplace posterior, as others compute it and exactly.

`published_jacobian` is what bayesian_lora does for all adapters, `published_last_layer` what laplace-torch
does for the last layer, both with factors (`factors_of`) that they keep from the fit;
`exact_covariance` is the truth in fp64 that both and ours are compared with.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Factors = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def factors_of(posterior: Any) -> list[Factors]:
    """Weight, eigenvectors U (in, k), Q (out, k'), their products (k', k), delta, of each layer."""
    laplace = posterior.laplace
    state = laplace.state_dict()
    found = []
    for layer in laplace.layers:
        u, mu, q, nu = (
            state[f"{layer.name}.{kind}"]
            for kind in ("input_vectors", "input_values", "output_vectors", "output_values")
        )
        found.append((layer.weight, u, q, nu[:, None] * mu, laplace.prior_precision))
    return found


def _variance(g: Tensor, u: Tensor, q: Tensor, products: Tensor, delta: Tensor) -> Tensor:
    """J Sigma J' (B, C, C) of one layer from its Jacobian (B, C, out, in), by Woodbury's identity."""
    shrunk = (products / (products + delta)).to(g.dtype).to(g.device)
    inner = (q.T.to(g.dtype) @ g @ u.to(g.dtype)).flatten(2)
    flat = g.flatten(2)
    return (flat @ flat.mT - (inner * shrunk.flatten()) @ inner.mT) / float(delta)


def published_jacobian(
    model: Any, posterior: Any, inputs: dict[str, Tensor], blocks: Sequence[Factors]
) -> tuple[Tensor, Tensor]:
    """Mean and covariance of the logits; the Jacobian of the whole batch, all at once."""
    names = {id(p): name for name, p in model.named_parameters()}
    parameters = {names[id(block[0])]: block[0].detach() for block in blocks}

    def logits(values: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        found = torch.func.functional_call(model, values, (), inputs).logits
        return found, found

    with warnings.catch_warnings():
        # Attention kernels whose backward runs once for each row instead.
        warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
        jacobian, mean = torch.func.jacrev(logits, has_aux=True)(parameters)
    cov: Any = 0.0
    for g, (_, *factors) in zip(jacobian.values(), blocks, strict=True):
        cov = cov + _variance(g, *factors)
    return mean.detach(), cov


def published_last_layer(
    model: Any, posterior: Any, inputs: dict[str, Tensor], blocks: Sequence[Factors]
) -> tuple[Tensor, Tensor]:
    """The same for the weight of the last layer, from its inputs."""
    laplace = posterior.laplace
    seen: list[Tensor] = []
    hook = laplace.layers[0].module.register_forward_hook(lambda _, args, y: seen.append(args[0]))
    with torch.no_grad():
        mean = model(**inputs).logits
    hook.remove()
    x = seen[0]
    if x.dim() == 3:  # a causal model's head sees all tokens, and counts the last one
        x = x[:, -1]
    cov: Any = 0.0
    identity = torch.eye(mean.shape[1], dtype=x.dtype, device=x.device)
    for layer, (_, *factors) in zip(laplace.layers, blocks, strict=True):
        a = x if layer.weight.dim() == 2 else torch.ones_like(x[:, :1])
        cov = cov + _variance(torch.einsum("bd,ce->bced", a, identity), *factors)
    return mean, cov


def exact_covariance(
    model: Any, posterior: Any, inputs: dict[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """In fp64: a backward pass for each example and class, and the dense inverse of each precision."""
    exact = copy.deepcopy(model).double()
    places = {id(p): i for i, p in enumerate(model.parameters())}
    parameters = list(exact.parameters())
    blocks = factors_of(posterior)
    weights = [parameters[places[id(block[0])]].requires_grad_() for block in blocks]
    logits = exact(**inputs).logits
    rows, classes = logits.shape
    grads = [
        [torch.autograd.grad(logits[b, c], weights, retain_graph=True) for c in range(classes)]
        for b in range(rows)
    ]
    cov = logits.new_zeros(rows, classes, classes)
    for i, (_, u, q, products, delta) in enumerate(blocks):
        vectors = torch.kron(q.double(), u.double())  # of weights (out, in), flattened
        precision = vectors * products.flatten() @ vectors.T
        precision.diagonal().add_(float(delta))
        g = torch.stack([torch.stack([row[i].flatten() for row in example]) for example in grads])
        cov += g @ torch.linalg.solve(precision, g.mT)
    return logits.detach(), cov
