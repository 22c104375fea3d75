"""Variational Bayesian last layers for any torch model: classification and regression heads.

A head on features phi (D,) has one Gaussian over the weights of each output, independent between
outputs c = 1..C, and Gaussian noise on the output:

    w_c ~ N(mu_c, S_c),  prior N(0, q I),  z_c = mu_c' phi [+ b_c] + N(0, v_c),
    v_c = phi' S_c phi [+ sigma_c^2]                              (at least 1e-12 before and after +)

Training needs no samples. The expected log-likelihood of regression has a closed form; for
classification Jensen's inequality gives a lower bound,

    E log softmax(z)_y >= mu_y' phi - logsumexp_c(mu_c' phi + v_c / 2).

Its gap grows with the variance (four classes: 0.004 at v = 0.01, 0.035 at 0.1, 0.34 at 1, 1.4 at 4),
so that training makes variances too small: watch v (`logit_distribution`), or use `bound="mc"`.

Parameters, the same meaning for every covariance: **exp of a log scale is a standard deviation**.

| covariance | parameters | S_c |
|---|---|---|
| "diagonal" | log_scale (C, D) | diag(exp(log_scale_c)^2) |
| "low_rank" | log_scale (C, D), factor (C, k, D) | V_c' V_c + diag(exp(log_scale_c)^2), V = factor |
| "dense" | scale_tril (C, D(D+1)/2) | T_c T_c' |

T_c is lower triangular and stored packed by rows: element (i, j <= i) at i(i+1)/2 + j, the diagonal as
its logarithm. A full square is never stored; computations unpack a block of columns of one class at a
time. (In the `vbll` package exp(W_logdiag) is a variance where the covariance is low rank, and a
standard deviation elsewhere; `load_vbll` converts.)

Cost with B rows: one product (B, D) x (D, C) for the means; variances by one such product of squares
(diagonal), one of (B, D) x (D, C k) besides (low rank), or B C D^2 / 2 multiply-adds (dense). The
backward pass costs twice as much, three times for dense, whose triangles are unpacked again. Gradients
are written by hand: they keep the features, (B, C) tensors and the (B, C, k) projections, and no
(B, C, D) tensor exists at any time.

Features of any float dtype are converted to fp32 (fp64 where features or parameters are fp64), with
autocast too; results have the same dtype. Parameters and buffers stay fp32 under `.half()`,
`.bfloat16()` and `.to(dtype)`: half precision is too coarse for a log scale. Train heads without
weight decay: the KL regularises them, and decay would pull deviations to 1. Second derivatives and
torch.func take the same formulas in PyTorch's own operations; the Monte-Carlo bound has no second
derivatives under `create_graph=True`.

Sources: Harrison, Willes, Snoek, "Variational Bayesian Last Layers", arXiv 2404.11599; Xiang, Li, Lu,
"PoLAR-VBLL", arXiv 2604.03388, for heads of language models and the Laplace refinement.
"""

from .bounds import BOUNDS, jensen_bound
from .classification import LaplaceReport, VBLLClassification
from .covariances import COVARIANCES, pack_tril, unpack_tril
from .last_layer import INITS
from .regression import VBLLRegression

__all__ = [
    "BOUNDS",
    "COVARIANCES",
    "INITS",
    "LaplaceReport",
    "VBLLClassification",
    "VBLLRegression",
    "jensen_bound",
    "pack_tril",
    "unpack_tril",
]
