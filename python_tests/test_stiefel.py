"""Stiefel optimisers against published formulas, fp64 definitions, known optima and torch's own."""

from __future__ import annotations

import copy
import io
import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from bayes_kernels.stiefel import METHODS, StiefelAdamW, StiefelSGD, orthogonality


def stiefel(rows: int, columns: int, seed: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    """A matrix with orthonormal columns, or rows where it is wide."""
    matrix = torch.empty(rows, columns)
    nn.init.orthogonal_(matrix, generator=torch.Generator().manual_seed(seed))
    return nn.Parameter(matrix.to(dtype))


class Adapters(nn.Module):
    """Three PoLAR updates of layers with different sizes, fitted to low-rank targets."""

    def __init__(self, dtype: torch.dtype = torch.float32, count: int = 3, seed: int = 0) -> None:
        super().__init__()
        shapes = [(24, 20), (24, 20), (12, 28)]
        sizes = [shapes[i % 3] for i in range(count)]
        self.b = nn.ParameterList(
            stiefel(m, 4, seed + 10 * i, dtype) for i, (m, _) in enumerate(sizes)
        )
        self.a = nn.ParameterList(
            stiefel(4, n, seed + 10 * i + 1, dtype) for i, (_, n) in enumerate(sizes)
        )
        self.core = nn.ParameterList(nn.Parameter(torch.zeros(4, 4)) for _ in sizes)
        draw = torch.Generator().manual_seed(seed + 5)
        self.targets = [
            torch.randn(m, 6, generator=draw) @ torch.randn(6, n, generator=draw) / 5
            for m, n in sizes
        ]

    def forward(self) -> Tensor:
        """Squared error of all updates."""
        total = torch.zeros(())
        for b, a, core, target in zip(self.b, self.a, self.core, self.targets, strict=True):
            total = total + (b.float() @ core @ a.float() - target).square().sum()
        return total

    def groups(self) -> list[dict[str, Any]]:
        """Stiefel factors, and the free cores."""
        return [{"params": [*self.b, *self.a], "stiefel": True}, {"params": list(self.core)}]

    def factors(self) -> list[Tensor]:
        """All Stiefel factors."""
        return [*self.b, *self.a]


def train(model: Adapters, optimizer: Any, steps: int, scheduler: Any = None) -> list[float]:
    """Losses before each of the steps."""
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model()
        loss.backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        losses.append(float(loss.detach()))
    return losses


def published_landing(weight: Tensor, grad: Tensor, penalty: float) -> Tensor:
    """PoLAR's published formula, with the n x n matrix."""
    wide = weight.shape[0] < weight.shape[1]
    z, g = (weight.T, grad.T) if wide else (weight, grad)
    product = g @ z.T
    field = (product - product.T) @ z + penalty * (z @ (z.T @ z - torch.eye(z.shape[1]).to(z)))
    return field.T if wide else field


def polar(x: Tensor) -> Tensor:
    """Polar factor by SVD."""
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    return u @ vh


def q_factor(x: Tensor) -> Tensor:
    """Q of QR with a positive diagonal of R."""
    q, r = torch.linalg.qr(x)
    return q * torch.diagonal(r).sign()


# --- Formulas ------------------------------------------------------------------------------------


@pytest.mark.parametrize("penalty", [5e-3, 1.0])
def test_landing_is_the_published_step(penalty: float) -> None:
    ours, theirs = Adapters(), Adapters()
    for model in (ours, theirs):
        for core in model.core:  # from 0 the first field would be rounding, which Adam magnifies
            nn.init.eye_(core.data).mul_(0.1)
    optimizer = StiefelAdamW(ours.groups(), lr=4e-3, weight_decay=0.1, penalty=penalty)
    plain = torch.optim.AdamW(
        [
            {"params": theirs.factors(), "weight_decay": 0.0},
            {"params": list(theirs.core), "weight_decay": 0.1},
        ],
        lr=4e-3,
    )
    for _ in range(20):
        optimizer.zero_grad()
        plain.zero_grad()
        losses = (ours(), theirs())
        assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)
        for loss in losses:
            loss.backward()
        with torch.no_grad():
            for p in theirs.factors():
                p.grad = published_landing(p, p.grad, penalty)  # type: ignore[arg-type]
        optimizer.step()
        plain.step()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)
    assert losses[0].item() < 0.98 * Adapters()().item()


def riemannian_adam(
    z: Tensor, grads: list[Tensor], lr: float, method: str, per_matrix: bool
) -> Tensor:
    """The docstring in fp64, for one tall matrix."""

    def project(z: Tensor, d: Tensor) -> Tensor:
        inner = z.T @ d
        return d - z @ (inner + inner.T) / 2

    z, m, v = z.double(), torch.zeros_like(z).double(), torch.zeros(()).double()
    for t, grad in enumerate(grads, start=1):
        g = project(z, grad.double())
        m = project(z, 0.9 * m + 0.1 * g)
        v = 0.99 * v + 0.01 * (g.square().mean() if per_matrix else g.square())
        d = m / (1 - 0.9**t) / ((v / (1 - 0.99**t)).sqrt() + 1e-6)
        if not per_matrix:
            d = project(z, d)
        z = (polar if method == "polar" else q_factor)(z - lr * d)
    return z


@pytest.mark.parametrize("second_moment", ["matrix", "element"])
@pytest.mark.parametrize("method", ["polar", "qr"])
def test_riemannian_adam_is_its_definition(method: str, second_moment: str) -> None:
    tall, wide, other = stiefel(30, 5, 1), stiefel(5, 30, 2), stiefel(17, 3, 3)
    parameters = [tall, wide, other]
    starts = [p.detach().clone() for p in parameters]
    optimizer = StiefelAdamW(
        parameters,
        lr=0.02,
        betas=(0.9, 0.99),
        eps=1e-6,
        stiefel=True,
        method=method,
        second_moment=second_moment,
    )
    draw = torch.Generator().manual_seed(0)
    history: list[list[Tensor]] = []
    for _ in range(6):
        history.append([torch.randn(p.shape, generator=draw) for p in parameters])
        for p, grad in zip(parameters, history[-1], strict=True):
            p.grad = grad
        optimizer.step()
    for i, (p, start) in enumerate(zip(parameters, starts, strict=True)):
        grads = [grads[i] for grads in history]
        turned = start.shape[0] < start.shape[1]
        if turned:
            start, grads = start.T, [g.T for g in grads]
        want = riemannian_adam(start, grads, 0.02, method, second_moment == "matrix")
        got = p.detach().T if turned else p.detach()
        torch.testing.assert_close(got.double(), want, rtol=0, atol=2e-6)
    if second_moment == "matrix":
        assert all(optimizer.state[p]["exp_avg_sq"].dim() == 0 for p in parameters)


@pytest.mark.parametrize("method", METHODS)
def test_sgd_is_its_definition(method: str) -> None:
    z, penalty, lr, momentum = stiefel(25, 4, 1), 0.7, 0.05, 0.8
    wide = nn.Parameter(z.detach().T.clone())
    fixed = torch.randn(25, 4, generator=torch.Generator().manual_seed(2)) / 5
    for mu in (0.0, momentum):
        want, b = z.detach().double(), torch.zeros(25, 4).double()
        pair = [nn.Parameter(z.detach().clone()), nn.Parameter(wide.detach().clone())]
        optimizer = StiefelSGD(
            pair, lr=lr, momentum=mu, stiefel=True, method=method, penalty=penalty
        )
        for step in range(4):
            grad = fixed * (step + 1)
            pair[0].grad, pair[1].grad = grad, grad.T.contiguous()
            optimizer.step()
            g = grad.double()
            if method == "landing":
                b = mu * b + published_landing(want, g, penalty)
                want = want - lr * b
            else:
                inner = want.T @ (mu * b + g)
                b = mu * b + g - want @ (inner + inner.T) / 2
                want = (polar if method == "polar" else q_factor)(want - lr * b)
        torch.testing.assert_close(pair[0].detach().double(), want, rtol=0, atol=1e-6)
        torch.testing.assert_close(pair[1].detach().T.double(), want, rtol=0, atol=1e-6)


def test_euclidean_groups_are_those_of_torch() -> None:
    weights = [torch.randn(3, 4, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    pairs: list[tuple[Any, Any, dict[str, Any]]] = [
        (StiefelAdamW, torch.optim.AdamW, {"weight_decay": 0.1, "eps": 1e-6}),
        (StiefelSGD, torch.optim.SGD, {"weight_decay": 0.1, "momentum": 0.9}),
        (StiefelSGD, torch.optim.SGD, {}),
    ]
    for ours, theirs, options in pairs:
        results = []
        for kind in (ours, theirs):
            parameters = [nn.Parameter(w.clone()) for w in weights]
            optimizer = kind(parameters, lr=0.03, **options)
            for _ in range(5):
                optimizer.zero_grad()
                torch.stack(
                    [(i + 1) * p.square().sum() for i, p in enumerate(parameters)]
                ).sum().backward()
                optimizer.step()
            results.append(parameters)
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


# --- The constraint ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [StiefelAdamW, StiefelSGD])
@pytest.mark.parametrize("method", ["polar", "qr"])
def test_retraction_stays_on_the_manifold(kind: Any, method: str) -> None:
    model = Adapters()
    optimizer = kind(model.groups(), lr=5e-3, method=method)
    losses = train(model, optimizer, 200)
    assert float(optimizer.orthogonality()) < 1e-5
    assert losses[-1] < 0.7 * losses[0]


def test_landing_stays_near_the_manifold() -> None:
    factors = [stiefel(40, 4, 1), stiefel(4, 60, 2)]
    optimizer = StiefelSGD(factors, lr=0.1, stiefel=True, penalty=1.0)
    draw = torch.Generator().manual_seed(0)
    worst = 0.0
    for _ in range(200):
        for p in factors:  # gradients of norm 0.3: lr ||G|| = 0.03
            grad = torch.randn(p.shape, generator=draw)
            p.grad = 0.3 * grad / grad.norm()
        optimizer.step()
        worst = max(worst, float(optimizer.orthogonality()))
    assert 1e-5 < worst < 1e-2
    optimizer.retract_()
    assert float(optimizer.orthogonality()) < 1e-6


def test_landing_pulls_back() -> None:
    far = nn.Parameter(stiefel(40, 4, 1).detach() * 1.3)
    optimizer = StiefelSGD([far], lr=0.1, stiefel=True, penalty=1.0)
    for _ in range(100):
        far.grad = torch.zeros_like(far)
        optimizer.step()
    assert float(optimizer.orthogonality()) < 1e-5


def test_orthogonality() -> None:
    tall, wide = stiefel(20, 3, 1).detach(), stiefel(2, 30, 2).detach()
    assert float(orthogonality([tall, wide])) < 2e-6
    # ||(1 + e)^2 I - I||_F = (2 e + e^2) sqrt(r)
    want = (0.2 + 0.01) * 3**0.5
    assert float(orthogonality([wide, tall * 1.1])) == pytest.approx(want, rel=1e-5)
    assert float(orthogonality([tall.T * 1.1, wide])) == pytest.approx(want, rel=1e-5)
    with pytest.raises(ValueError, match=r"orthogonality: matrices must have at least one"):
        orthogonality([])


@pytest.mark.parametrize("kind", [StiefelAdamW, StiefelSGD])
@pytest.mark.parametrize("method", METHODS)
def test_finds_leading_eigenspaces(kind: Any, method: str) -> None:
    draw = torch.Generator().manual_seed(0)
    root = torch.randn(30, 30, generator=draw)
    matrix = root @ root.T / 30
    best = torch.linalg.eigvalsh(matrix)[-3:].sum().item()
    tall, wide = stiefel(30, 3, 3), stiefel(3, 30, 4)
    lr = torch.tensor(0.05)
    optimizer = kind([tall, wide], lr=lr, stiefel=True, method=method, penalty=1.0)
    for step in range(300):
        if kind is StiefelAdamW:
            lr.fill_(0.02 * (1 - step / 300))
        optimizer.zero_grad()
        loss = -((tall.T @ matrix @ tall).trace() + (wide @ matrix @ wide.T).trace())
        loss.backward()
        optimizer.step()
    optimizer.retract_()
    with torch.no_grad():
        assert (tall.T @ matrix @ tall).trace().item() == pytest.approx(best, rel=3e-3)
        assert (wide @ matrix @ wide.T).trace().item() == pytest.approx(best, rel=3e-3)


# --- As an optimiser of torch --------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (StiefelAdamW, {}),
        (StiefelAdamW, {"second_moment": "element"}),
        (StiefelSGD, {"momentum": 0.9}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resumed_run_is_the_uninterrupted_one(
    method: str, kind: Any, options: dict[str, Any], dtype: torch.dtype
) -> None:
    def start() -> tuple[Adapters, Any, Any]:
        model = Adapters(dtype)
        optimizer = kind(model.groups(), lr=4e-3, method=method, **options)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 / (1 + t))
        return model, optimizer, schedule

    whole, optimizer, schedule = start()
    train(whole, optimizer, 6, schedule)
    first, optimizer, schedule = start()
    train(first, optimizer, 3, schedule)
    file = io.BytesIO()
    parts = {"m": first.state_dict(), "o": optimizer.state_dict(), "s": schedule.state_dict()}
    torch.save(parts, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    second, optimizer, schedule = start()
    second.load_state_dict(saved["m"])
    optimizer.load_state_dict(saved["o"])
    schedule.load_state_dict(saved["s"])
    train(second, optimizer, 3, schedule)
    for a, b in zip(whole.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_half_precision_factors_have_fp32_copies() -> None:
    model, reference = Adapters(torch.bfloat16), Adapters()
    optimizer = StiefelAdamW(model.groups(), lr=1e-4, method="polar")
    losses = train(model, optimizer, 30)
    assert losses[-1] < losses[0]
    assert float(optimizer.orthogonality()) < 1e-5
    for p in model.factors():
        master = optimizer.state[p]["master"]
        assert p.dtype == torch.bfloat16 and master.dtype == torch.float32
        assert torch.equal(p, master.bfloat16())
        assert optimizer.state[p]["exp_avg"].dtype == torch.float32
    # Steps far below a spacing of bf16 add up.
    moved = [
        (optimizer.state[p]["master"] - q.detach()).abs().max()
        for p, q in zip(model.factors(), reference.factors(), strict=True)
    ]
    assert min(moved) > 1e-3


@pytest.mark.parametrize("method", METHODS)
def test_learning_rate_may_be_a_tensor(method: str) -> None:
    models = [Adapters(), Adapters()]
    rates: list[Any] = [3e-3, torch.tensor(3e-3)]
    for model, lr in zip(models, rates, strict=True):
        train(model, StiefelAdamW(model.groups(), lr=lr, method=method), 4)
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_gradient_scaler(method: str) -> None:
    results = []
    for scaled in (False, True):
        model = Adapters()
        optimizer = StiefelAdamW(model.groups(), lr=3e-3, method=method)
        scaler = torch.amp.GradScaler("cpu", enabled=scaled, init_scale=1024.0)
        for step in range(4):
            optimizer.zero_grad()
            scaler.scale(model()).backward()
            before = [p.detach().clone() for p in model.parameters()]
            if scaled and step == 2:
                model.b[0].grad[0, 0] = float("inf")  # type: ignore[index]
            elif step == 2:
                continue
            scaler.step(optimizer)
            scaler.update()
            if scaled and step == 2:
                pairs = zip(before, model.parameters(), strict=True)
                assert all(torch.equal(a, b) for a, b in pairs)
        results.append(model)
    for a, b in zip(results[0].parameters(), results[1].parameters(), strict=True):
        assert torch.equal(a, b)  # powers of two scale without rounding


def values(optimizer: Any) -> list[Tensor]:
    """Parameters and state, to the bit."""
    found = [p.detach().clone() for g in optimizer.param_groups for p in g["params"]]
    for g in optimizer.param_groups:
        for p in g["params"]:
            found += [v.clone() for _, v in sorted(optimizer.state[p].items())]
    return found


FINITE_STEPS = {
    "adam": lambda g, **k: StiefelAdamW(g, lr=1e-2, weight_decay=0.1, **k),
    "adam element": lambda g, **k: StiefelAdamW(g, lr=1e-2, second_moment="element", **k),
    "sgd": lambda g, **k: StiefelSGD(g, lr=1e-2, penalty=0.5, **k),
    "sgd momentum": lambda g, **k: StiefelSGD(g, lr=torch.tensor(1e-2), momentum=0.9, **k),
}


@pytest.mark.parametrize("there", [False, True], ids=["host", "device"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", FINITE_STEPS)
def test_a_gradient_that_is_not_finite_changes_nothing(
    name: str, method: str, there: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor anything after it: the run goes on as if the step had not been. Also as a GPU decides it."""
    kinds = {type(make([nn.Parameter(torch.zeros(1))])) for make in FINITE_STEPS.values()}
    for kind in kinds:
        monkeypatch.setattr(kind, "_decided_there", staticmethod(lambda flag: there))
    found = []
    for bad in (None, "b", "a", "half", "core"):
        model = Adapters()
        half = stiefel(12, 3, 5, torch.bfloat16)
        optimizer = FINITE_STEPS[name](
            [{"params": [*model.factors(), half], "stiefel": True}, {"params": list(model.core)}],
            method=method,
        )
        for step in range(4):
            optimizer.zero_grad()
            (model() + (half.float().sum(0) - 0.3).square().sum()).backward()
            if step in (0, 2):  # before there is any state, too
                if bad is None:
                    continue
                parameter = half if bad == "half" else getattr(model, bad)[1]
                parameter.grad.view(-1)[-1] = (math.nan, math.inf, -math.inf)[step - (bad == "a")]
                if step == 2:
                    before = values(optimizer)
                with warnings.catch_warnings(record=True) as told:
                    warnings.simplefilter("always")
                    optimizer.step()
                assert len(told) == (step == 0 and not there), [str(w.message) for w in told]
                if step == 2:
                    assert all(map(torch.equal, before, values(optimizer)))
            else:
                optimizer.step()
        assert optimizer.skipped == (0 if bad is None else 2)
        found.append(values(optimizer))
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))
    assert all(bool(t.isfinite().all()) for t in found[0])


def test_the_warning_names_the_optimiser_and_copies_count_anew() -> None:
    z = stiefel(6, 2, 0)
    optimizer = StiefelSGD([{"params": [z], "stiefel": True}], lr=0.1)
    z.grad = torch.full_like(z, math.inf)
    with pytest.warns(UserWarning, match="StiefelSGD: gradients must be finite") as told:
        optimizer.step()
    assert told[0].filename == __file__
    again = copy.deepcopy(optimizer)
    assert (optimizer.skipped, again.skipped) == (1, 0)
    with pytest.warns(UserWarning, match="must be finite"):
        again.param_groups[0]["params"][0].grad = z.grad
        again.step()


def test_a_gpu_tells_without_being_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The count is copied to the host behind the step, and read when it has arrived."""

    class Event:
        arrived = False

        def record(self) -> None:
            pass

        def query(self) -> bool:
            return Event.arrived

    zeros = torch.zeros
    monkeypatch.setattr(StiefelSGD, "_decided_there", staticmethod(lambda flag: True))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch, "zeros", lambda *a, pin_memory=False, **k: zeros(*a, **k))
    z = stiefel(6, 2, 0)
    optimizer = StiefelSGD([{"params": [z], "stiefel": True}], lr=0.1)
    told = []
    for number in (1.0, math.nan, 1.0, 1.0, 1.0, math.nan):
        Event.arrived = len(told) >= 3
        z.grad = torch.full_like(z, number)
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            optimizer.step()
        told.append(len(found))
    # The fourth step reads what was copied before the bad one, the fifth copies, the sixth reads.
    assert told == [0, 0, 0, 0, 0, 1]
    assert optimizer.skipped == 2


class Calls(TorchDispatchMode):
    """Counts the ops that do something: neither views nor allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view and "empty" not in str(func):
            self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", [StiefelAdamW, StiefelSGD])
def test_calls_do_not_grow_with_the_number_of_matrices(kind: Any, method: str) -> None:
    counts = []
    for layers in (3, 12):
        model = Adapters(count=layers)
        optimizer = kind(model.groups(), lr=1e-3, method=method)
        train(model, optimizer, 1)
        model().backward()
        with Calls() as calls:
            optimizer.step()
        counts.append(calls.count)
    assert counts[0] == counts[1] > 0


def test_gradients_are_left_alone_and_missing_ones_skipped() -> None:
    model = Adapters()
    optimizer = StiefelAdamW(model.groups(), lr=1e-2)
    model().backward()
    model.b[1].grad = None
    kept = model.b[0].grad.clone()  # type: ignore[union-attr]
    before = model.b[1].detach().clone()
    optimizer.step()
    assert torch.equal(model.b[0].grad, kept)  # type: ignore[arg-type]
    assert torch.equal(model.b[1], before) and not optimizer.state[model.b[1]]
    assert optimizer.step(lambda: torch.tensor(3.0)) == 3.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr must not be negative"),
        ({"lr": torch.ones(2)}, "lr must be a number or a 0-dim tensor"),
        ({"penalty": -1.0}, "penalty must not be negative"),
        ({"method": "cayley"}, "method must be one of"),
        ({"betas": (0.9, 1.0)}, "betas must be in"),
        ({"second_moment": "row"}, "second_moment must be one of"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"StiefelAdamW: {message}"):
        StiefelAdamW([stiefel(5, 2, 0)], stiefel=True, **options)


def test_bad_parameters() -> None:
    with pytest.raises(ValueError, match="must be matrices, got shape"):
        StiefelSGD([nn.Parameter(torch.zeros(3))], stiefel=True)
    optimizer = StiefelSGD([nn.Parameter(torch.zeros(3))])
    with pytest.raises(ValueError, match="must be matrices"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3, 2, 2))], "stiefel": True})
    assert len(optimizer.param_groups) == 1
    embedding = nn.Embedding(4, 3, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(TypeError, match="gradients must be dense"):
        StiefelSGD(embedding.parameters()).step()
