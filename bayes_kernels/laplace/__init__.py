"""Laplace approximation of a trained network with Kronecker-factored, low-rank curvature.

For any classifier in PyTorch with linear layers, LoRA adapters above all; needs nothing but torch.
After ordinary (MAP) training, the weights of each chosen layer get a Gaussian posterior:

    la = laplace.Laplace(model, laplace.linear_layers(model))
    la.fit(train_loader)
    la.optimize_prior_precision()
    prediction = la.predict(batch)

With a_bt the input of a layer y = W a at token t of example b and g_bt the gradient of the loss with
respect to its output, the precision of vec(W) for N examples is

    N E_b[(1 / T_b) sum_t a a^T] (x) E_b[sum_t g g^T] + delta I

one block for each layer, with the prior N(0, 1 / delta); `tokens` has other rules for sequences. A
factor of a side with at least `dense_below` entries is kept as a (d, k) matrix, which makes the factors of
a LoRA adapter as small as the adapter.
With eigenpairs (mu_i, u_i) of the input factor and (nu_j, q_j) of the output factor everything else is
diagonal: precisions mu_i nu_j + delta on q_j u_i^T, and delta on the rest. Nothing is ever inverted, and
the prior can change without another pass.

Sources: Yang et al., "Bayesian Low-rank Adaptation for Large Language Models" (Laplace-LoRA), arXiv
2308.13111; Ritter et al., "A Scalable Laplace Approximation for Neural Networks", ICLR 2018; Immer et al.,
"Improving predictions of Bayesian neural nets via local linearization", arXiv 2008.08400; Eschenhagen et
al., "Kronecker-Factored Approximate Curvature for Modern Neural Network Architectures", arXiv 2311.00636
(expand and reduce); MacKay, "Bayesian Interpolation", Neural Computation 4, 1992.
"""

from .approximation import FISHERS, METHODS, TOKENS, Laplace
from .layers import Layer, MemoryEstimate, estimate_memory, linear_layers, lora_layers
from .prediction import Prediction

__all__ = [
    "FISHERS",
    "METHODS",
    "TOKENS",
    "Laplace",
    "Layer",
    "MemoryEstimate",
    "Prediction",
    "estimate_memory",
    "linear_layers",
    "lora_layers",
]
