"""Networks, posteriors and explicit matrices that the tests of this room share."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from bayes_kernels import functional
from bayes_kernels.laplace import Laplace, Layer, lora_layers

D = torch.float64


class Adapted(nn.Module):
    """A frozen linear layer with a low-rank adapter, computed in one of two ways."""

    def __init__(self, n: int, m: int, r: int, *, fused: bool, scaling: float = 0.7) -> None:
        super().__init__()
        self.base = nn.Linear(n, m, bias=False).requires_grad_(False)
        self.lora_A = nn.Linear(n, r, bias=False)
        self.lora_B = nn.Linear(r, m, bias=False)
        self.fused, self.scaling = fused, scaling

    def forward(self, x):
        if not self.fused:
            return self.base(x) + self.lora_B(self.lora_A(x)) * self.scaling
        a, b = self.lora_A.weight, self.lora_B.weight
        return functional.lora(x, a, b, self.base(x), scaling=self.scaling)


class Sequences(nn.Module):
    """Two adapted layers with a dependence between tokens, then a head on the mean of valid ones."""

    def __init__(self, n=12, r=3, classes=4, *, fused=False, checkpointed=None) -> None:
        super().__init__()
        self.first = Adapted(n, n, r, fused=fused)
        self.second = Adapted(n, n + 2, r, fused=fused)
        self.head = nn.Linear(n + 2, classes)
        self.dropout = nn.Dropout(0.5)
        self.checkpointed = checkpointed

    def body(self, x):
        x = x + torch.tanh(self.first(self.dropout(x)))
        x = x + 0.3 * x.cumsum(1) / (1 + torch.arange(x.shape[1]))[:, None]
        return torch.tanh(self.second(x))

    def forward(self, x, mask=None):
        if self.checkpointed is not None:
            x = checkpoint(self.body, x, use_reentrant=self.checkpointed)
        else:
            x = self.body(x)
        if mask is None:
            return self.head(x.mean(1))
        return self.head((x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))


def sequences(*, seed=0, examples=9, tokens=5, dtype=D, **options):
    torch.manual_seed(seed)
    model = Sequences(**options).to(dtype)
    n = model.first.base.in_features
    x = torch.randn(examples, tokens, n, dtype=dtype)
    y = torch.randint(0, model.head.out_features, (examples,))
    return model, x, y


def adapters(model) -> list[Layer]:
    layers = []
    for name in ("first", "second"):
        module = getattr(model, name)
        layers += lora_layers(
            name, module, module.lora_A.weight, module.lora_B.weight, module.scaling
        )
    return layers


def mlp(*, bias=True, classes=3, dtype=D, seed=0, examples=20):
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(4, 6, bias=bias), nn.ReLU(inplace=True), nn.Linear(6, classes, bias=bias)
    ).to(dtype)
    return model, torch.randn(examples, 4, dtype=dtype), torch.randint(0, classes, (examples,))


def kronecker(la: Laplace) -> list[torch.Tensor]:
    """Each layer's curvature on vec(W), row-major, as a dense matrix."""
    return [
        torch.kron((b.q.double() * b.nu) @ b.q.double().T, (b.u.double() * b.mu) @ b.u.double().T)
        for b in la._fitted()
    ]


def jacobians(model, layers, *inputs) -> list[torch.Tensor]:
    """Explicit Jacobian (B, C, P) of each layer by torch.func."""
    names = {id(p): name for name, p in model.named_parameters()}
    wanted = {names[id(layer.weight)]: layer.weight.detach() for layer in layers}

    def f(weights):
        return torch.func.functional_call(model, weights, inputs)

    full = torch.func.jacrev(f)(wanted)
    return [full[names[id(layer.weight)]].detach().flatten(2) for layer in layers]


def low_rank_posterior(dtype=D):
    model, x, y = sequences(n=20, r=3, examples=9, dtype=dtype)
    la = Laplace(model, adapters(model), rank=4, dense_below=8).fit([(x, y)])
    return model, x, y, la
