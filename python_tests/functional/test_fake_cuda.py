"""Every method and op on fake CUDA tensors: one device throughout, and no waiting in training steps.

What fake tensors cannot show (numbers, streams, alignment) is for a real GPU: test_hf_cuda.py and the
`device` fixture of the op tests.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from fake_cuda import CUDA, Wait, fake_cuda
from torch import Tensor, nn

from bayes_kernels import functional, laplace, optim, random, stiefel, vbll


@pytest.fixture
def waits() -> Iterator[list[Wait]]:
    with fake_cuda() as found:
        yield found


def own(waits: list[Wait]) -> list[Wait]:
    """What the package waited for, since the last call."""
    found = [wait for wait in waits if wait.where]
    waits.clear()
    return found


def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, device=CUDA, dtype=dtype, requires_grad=True)


def check_gradients(tensors: Any) -> None:
    for t in tensors:
        assert t.grad is not None and t.grad.device == t.device == CUDA
        assert t.grad.shape == t.shape and t.grad.dtype == t.dtype


# --- the means of this test ----------------------------------------------------------------------


def test_mixed_devices_and_waits_are_seen(waits: list[Wait]) -> None:
    x = leaf(3, 4)
    with pytest.raises(RuntimeError, match="device"):
        x + torch.randn(3, 4)
    with pytest.raises(RuntimeError, match="device"):
        torch.nn.functional.linear(x, torch.randn(5, 4))
    assert bool((x > 0).all()) and float(x.sum()) == 1.0
    x.detach().to("cpu")
    torch.randn(3).to(CUDA)
    torch.randn(3).to(CUDA, non_blocking=True)
    found = [wait.what for wait in waits]
    assert found == ["bool", "float", "cuda to cpu", "cpu to cuda"]
    waits.clear()
    # Lines of the package have a place: this option is checked where it lies.
    optim.DecoupledKL([leaf(2, 3)], [leaf(2, 3)], 0.2, optim.KLSchedule("constant", 1))._rho_bound()
    assert [wait.where.rpartition(":")[0] for wait in waits] == ["optim.py"]


# --- ops -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("r", [4, 70])  # fused, and the path of large ranks
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters(waits: list[Wait], r: int, dtype: torch.dtype) -> None:
    x, base = leaf(2, 3, 80, dtype=dtype), leaf(2, 3, 72, dtype=dtype)
    a, b, core = leaf(r, 80), leaf(72, r), leaf(r, r)
    key = random.key(3, CUDA)
    groups = torch.zeros(2, 1, dtype=torch.int64, device=CUDA)
    for y, others in (
        (functional.lora(x, a, b, base), ()),
        (functional.lora(x, a, b, base, dropout=0.1, key=key), ()),
        *(
            (functional.flipout_lora(x, a, rho, b, base, key=key, **options), (rho,))
            for rho in (leaf(r, 80), leaf(r, 1))
            for options in (
                {"scope": "token", "dropout": 0.1},
                {"scope": "example", "std": "softplus"},
                {"scope": "none", "std": "direct"},
                {"groups": groups},
            )
        ),
        (functional.core_lora(x, a, core, b, base), (core,)),
        *((functional.scaled_lora(x, a, d, b, base), (d,)) for d in (leaf(r),)),
    ):
        assert (y.device, y.dtype, y.shape) == (CUDA, dtype, (2, 3, 72))
        y.sum().backward()
        leaves = (x, base, a, b, *others)
        check_gradients(leaves)
        for t in leaves:
            t.grad = None
    lists = ([a, leaf(3, 80)], [leaf(r, 80), leaf(3, 1)], [b, leaf(40, 3)])
    ys = functional.flipout_lora_group(x, *lists, key=key, streams=[1, 2])
    assert [(y.device, y.dtype, y.shape) for y in ys] == [
        (CUDA, dtype, (2, 3, m)) for m in (72, 40)
    ]
    sum(y.sum() for y in ys).backward()
    leaves = (x, *lists[0], *lists[1], *lists[2])
    check_gradients(leaves)
    for t in leaves:
        t.grad = None
    d = leaf(2, r)
    functional.scaled_lora(x, a, d, b, groups=groups.expand(2, 3)).sum().backward()
    check_gradients([x, a, d, b])
    assert own(waits) == []
    with torch.no_grad():
        assert functional.flipout_lora(x, a, leaf(r, 80), b, base, key=key).device == CUDA


@pytest.mark.parametrize("r", [4, 70])  # fused, and the path of large ranks
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_adapters(waits: list[Wait], r: int, dtype: torch.dtype) -> None:
    x, base = leaf(2, 3, 80, dtype=dtype), leaf(2, 3, 72, dtype=dtype)
    a, b, rho = leaf(4, r, 80), leaf(4, 72, r), leaf(4, r, 1)
    mean, shared, spread = leaf(r, 80), leaf(72, r), leaf(r, 80)
    key, draws = random.key(3, CUDA), torch.arange(4, device=CUDA)
    for where in (
        {"rows_per_group": 2},
        {"groups": torch.zeros(2, 1, dtype=torch.int64, device=CUDA)},
    ):
        noisy = {"key": key, **where}
        for y, leaves in (
            (functional.grouped_lora(x, a, b, base, **where), (x, a, b, base)),
            (functional.grouped_lora(x, a, shared, **where), (x, a, shared)),
            *(
                (functional.grouped_flipout_lora(x, a, rho, b, base, **options), (x, a, rho, b))
                for options in (noisy, {"scope": "none", **noisy})
            ),
            (
                functional.sampled_lora(x, mean, spread, shared, base, draws=draws, **noisy),
                (x, mean, spread, shared, base),
            ),
        ):
            assert (y.device, y.dtype, y.shape) == (CUDA, dtype, (2, 3, 72))
            y.sum().backward()
            check_gradients(leaves)
            for t in (x, base, a, b, rho, mean, shared, spread):
                t.grad = None
    out = functional.gaussian_draws(mean, leaf(r, 1), draws, key=key)
    assert (out.device, out.shape) == (CUDA, (4, r, 80))
    out.sum().backward()
    assert own(waits) == []


def test_arguments_on_other_devices_are_refused(waits: list[Wait]) -> None:
    x, a, b = leaf(3, 8), leaf(2, 8), leaf(5, 2)
    with pytest.raises(ValueError, match="key must be on cuda:0, got cpu; move it"):
        functional.flipout_lora(x, a, leaf(2, 8), b, key=random.key(0))
    with pytest.raises(ValueError, match="b must be on cuda:0, got cpu"):
        functional.lora(x, a, torch.randn(5, 2))
    with pytest.raises(ValueError, match="base must be on cuda:0, got cpu"):
        functional.lora(x, a, b, torch.randn(3, 5))
    with pytest.raises(ValueError, match="key must be on cuda:0, got cpu"):
        functional.mc_predict(leaf(3, 4), leaf(3, 4), n_samples=4, key=random.key(0))
    with pytest.raises(TypeError, match="rho must have the dtype and device"):
        functional.gaussian_kl([a], [torch.randn(2, 8)], 0.2)
    with pytest.raises(ValueError, match="must be on cuda:0"):
        functional.kron_accumulate_(torch.zeros(4, 4, device=CUDA), torch.randn(3, 4))
    with pytest.raises(ValueError, match="must be on the device of the first"):
        functional.gram([leaf(5, 2), torch.randn(5, 2)])


def test_noise_and_divergence(waits: list[Wait]) -> None:
    key = random.fold_in(random.key(-1, CUDA), 5)
    assert key.device == CUDA and key.dtype == torch.int64
    for made in (
        random.normal(key, (3, 4)),
        random.sign_bits(key, 3, 4),
        random.dropout_mask(key, 3, 4, 0.1),
        *random.split(key, 2),
    ):
        assert made.device == CUDA
    means, rhos = [leaf(2, 3), leaf(4, 5)], [leaf(2, 3), leaf(4, 1)]
    functional.gaussian_kl(means, rhos, 0.2).backward()
    check_gradients([*means, *rhos])
    plain = [t.detach() for t in (*means, *rhos)]
    optim.kl_step_(plain[:2], plain[2:], 0.1, 0.2)
    optim.kl_flow_(plain[:2], plain[2:], 0.1, 0.2)
    assert own(waits) == []


@pytest.mark.parametrize("r", [4, 70])
def test_tall_and_curvature(waits: list[Wait], r: int) -> None:
    xs, others = ([torch.randn(n, r, device=CUDA) for n in (90, 80)] for _ in range(2))
    assert all(t.device == CUDA for t in functional.gram(xs))
    assert functional.polar_retract_(xs).device == CUDA
    assert functional.qr_retract_(xs, others).device == CUDA
    assert functional.stiefel_step_(xs, others, 0.1).device == CUDA
    assert functional.landing_field(xs, others, 1.0)[0].device == CUDA
    functional.landing_step_(xs, others, 0.1, torch.ones((), device=CUDA))
    for size in (40, 300):
        square, low = torch.zeros(size, size, device=CUDA), torch.zeros(size, r, device=CUDA)
        rows, mask = torch.randn(2, 3, size, device=CUDA), torch.ones(2, 3, device=CUDA).bool()
        functional.kron_accumulate_(square, rows, masks=[mask], alpha=0.5)
        functional.kron_accumulate_(square, rows.bfloat16(), beta=torch.ones((), device=CUDA))
        functional.low_rank_update_(low, rows, masks=[mask])
    assert own(waits) == []


def test_predict_ops(waits: list[Wait]) -> None:
    mean, key = torch.randn(3, 2, device=CUDA), random.key(1, CUDA)
    ids = torch.zeros(3, dtype=torch.int64, device=CUDA)
    for cov in (torch.rand(3, 2, device=CUDA), torch.rand(3, 2, 2, device=CUDA)):
        for method in functional.PREDICT_METHODS:
            found = functional.mc_predict(mean, cov, method=method, n_samples=4, key=key, ids=ids)
            assert found.log_probs.device == CUDA and found.entropy.device == CUDA
    wide = functional.mc_predict(
        torch.randn(1, 33, device=CUDA), torch.rand(1, 33, 33, device=CUDA), n_samples=4, key=key
    )
    assert wide.log_probs.device == CUDA
    assert own(waits) == []


# --- last layers, optimisers, Laplace ------------------------------------------------------------


@pytest.mark.parametrize("covariance", vbll.COVARIANCES)
def test_last_layers(waits: list[Wait], covariance: str) -> None:
    generator = torch.Generator().manual_seed(0)
    head = vbll.VBLLClassification(
        6, 3, covariance=covariance, bias=True, noise=True, generator=generator, device=CUDA
    )
    other = vbll.VBLLRegression(6, 2, covariance=covariance).to(CUDA)
    features = leaf(5, 6)
    labels = torch.zeros(5, dtype=torch.int64, device=CUDA)
    waits.clear()
    key = random.key(0, CUDA)
    for bound in vbll.BOUNDS:
        head.loss(features, labels, 100, bound=bound, key=key).backward()
        check_gradients([features, *head.parameters()])
    other.loss(features, torch.randn(5, 2, device=CUDA), 100).backward()
    check_gradients(other.parameters())
    assert head.predict(features, n_samples=4, key=key).log_probs.device == CUDA
    assert own(waits) == []
    head.laplace_refine(features.detach())
    assert head.predict(features, n_samples=4, key=key).log_probs.device == CUDA


@pytest.mark.parametrize("method", stiefel.METHODS)
def test_stiefel_optimisers(waits: list[Wait], method: str) -> None:
    for make in (
        lambda groups: stiefel.StiefelAdamW(groups, lr=0.1),
        lambda groups: stiefel.StiefelAdamW(groups, lr=0.1, second_moment="element"),
        lambda groups: stiefel.StiefelSGD(groups, lr=0.1, momentum=0.9),
        lambda groups: stiefel.StiefelSGD(groups, lr=torch.tensor(0.1, device=CUDA)),
    ):
        points = [leaf(9, 3), leaf(3, 9), leaf(9, 3, dtype=torch.bfloat16)]
        optimizer = make([{"params": points, "stiefel": True, "method": method}])
        rest = [leaf(4, 4)] if isinstance(optimizer, stiefel.StiefelAdamW) else []
        if rest:  # torch's fused SGD has no fake kernel
            optimizer.add_param_group({"params": rest})
        for p in (*points, *rest):
            p.grad = torch.randn_like(p)
        waits.clear()
        for _ in range(2):
            optimizer.step()
        assert optimizer.orthogonality().device == CUDA
        assert own(waits) == []
        states = [t for s in optimizer.state.values() for t in s.values() if isinstance(t, Tensor)]
        assert all(t.device == CUDA for t in states)


@pytest.mark.parametrize(("fisher", "rank"), [("ggn", None), ("ggn", 2), ("mc", 2)])
def test_laplace(
    waits: list[Wait], monkeypatch: pytest.MonkeyPatch, fisher: str, rank: int | None
) -> None:
    """Batches from the host; curvature, predictions and draws where the model is."""
    monkeypatch.setattr(
        laplace.approximation, "_digest", lambda tensors: b""
    )  # of values that are not there
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).to(CUDA)
    batches = [(torch.randn(4, 6), torch.zeros(4, dtype=torch.int64))]
    found = laplace.Laplace(model, rank=rank, dense_below=4, fisher=fisher, jacobian="repeat")
    found.fit(batches, verbose=False)
    mean, cov = found.logits(batches[0])
    assert mean.device == cov.device == CUDA and cov.shape == (4, 3, 3)
    for method in ("mc", "mc_independent", "probit", "bridge", "weights"):
        assert found.predict(batches[0], method=method, n_samples=2).log_probs.device == CUDA
    assert all(t.device == CUDA for t in found.sample().values())
    state = {name: value.cpu() for name, value in found.state_dict().items()}
    other = laplace.Laplace(model, rank=rank, dense_below=4, fisher=fisher, jacobian="repeat")
    other.load_state_dict(state)
    assert other.logits(batches[0])[1].device == CUDA


# --- models --------------------------------------------------------------------------------------

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

from tiny_models import adapted, answering_llama, bert  # noqa: E402

from bayes_kernels import hf  # noqa: E402
from bayes_kernels.hf.last_layer import find_head  # noqa: E402
from bayes_kernels.hf.layers import bayes_layers, noise_state  # noqa: E402
from bayes_kernels.hf.methods.tfb import TfbConfig, regroup  # noqa: E402

ADAPTERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "lora": (peft.LoraConfig, {"lora_dropout": 0.1}),
    "blob": (hf.BlobConfig, {}),
    "blob-example": (hf.BlobConfig, {"scope": "example", "lora_dropout": 0.1}),
    "blob-none": (hf.BlobConfig, {"scope": "none", "std": "softplus"}),
    "tfb": (TfbConfig, {}),
    "scalabl": (hf.ScalablConfig, {"lora_dropout": 0.1}),
    "scalabl-full": (hf.ScalablConfig, {"covariance": "full", "scope": "example"}),
    "polar": (hf.PolarConfig, {"stiefel": "qr"}),
    "polar-diagonal": (hf.PolarConfig, {"core": "diagonal", "lora_dropout": 0.1}),
    "polar-vbll": (hf.PolarVbllConfig, {"head_prior_scale": 1.0}),
    "polar-vbll-dense": (hf.PolarVbllConfig, {"head_covariance": "dense"}),
    "polar-vbll-noise": (
        hf.PolarVbllConfig,
        {"head_covariance": "low_rank", "head_noise": True},
    ),
}


def batch(device: torch.device | str = "cpu") -> dict[str, Tensor]:
    return {
        "input_ids": torch.ones(3, 6, dtype=torch.int64, device=device),
        "labels": torch.zeros(3, dtype=torch.int64, device=device),
    }


def train_step(model: Any) -> Tensor:
    """Loss with the divergence and its gradients, as BayesTrainer does it."""
    inputs = batch(CUDA)
    model.train()
    if hasattr(model.get_base_model(), "bayes_noise"):
        hf.refresh_noise(model, step=3, rank=0)
    if find_head(model) is not None:
        loss = hf.variational_loss(model, inputs, n_train=100).loss
    else:
        loss = model(**inputs).loss
        if hasattr(model.get_base_model(), "bayes_noise"):
            loss = loss + hf.kl_divergence(model) / 100
    loss.backward()
    return loss


@pytest.mark.parametrize("name", ADAPTERS)
def test_training_step_and_predictions(waits: list[Wait], name: str) -> None:
    config, options = ADAPTERS[name]
    model = adapted(bert(num_hidden_layers=1), config, **options)
    model.to(CUDA)
    if name == "polar-vbll-dense":
        hf.calibrate_head(model, batch())  # on the host, as data comes
    bayesian = hasattr(model.get_base_model(), "bayes_noise")
    waits.clear()
    assert train_step(model).device == CUDA
    check_gradients(p for p in model.parameters() if p.requires_grad)
    if bayesian:
        assert own(waits) == []
        assert set(noise_state(model).keys) == {CUDA}
    if config is TfbConfig:
        item = bayes_layers(model)[0]
        a, b, d = regroup(item.mean, item.layer.lora_B["default"].weight)
        assert a.device == b.device == d.device == CUDA
    elif bayesian and config is not hf.PolarConfig and config is not hf.PolarVbllConfig:
        schedule = optim.KLSchedule("constant", 4, lr=0.1)
        step = hf.decoupled_kl(
            model, n_train=100, batch_size=4, learning_rate=0.1, factor_sum=4, schedule=schedule
        )
        assert step is not None
        own(waits)
        step.step()
        assert own(waits) == []
    if "polar" in name:
        optimizer = stiefel.StiefelAdamW(hf.parameter_groups(model), lr=0.1)
        own(waits)
        optimizer.step()
        assert own(waits) == [] and hf.stiefel_error(model).device == CUDA

    model.eval()
    draws = 0 if config is hf.PolarConfig else 3
    if name == "polar-vbll-dense":
        hf.laplace_refine(model, [batch()])
    waits.clear()
    found = hf.predict(model, batch(), n_samples=draws, samples_per_pass=2)
    assert found.log_probs.device.type == "cpu" and found.log_probs.shape == (3, 3)
    # The batch goes to the GPU and the result comes back; nothing else is waited for.
    kinds = {wait.what for wait in own(waits)}
    assert kinds <= {"cpu to cuda", "cuda to cpu"}
    if bayesian and draws and "polar" not in name:
        folded = hf.fold_samples({"input_ids": batch(CUDA)["input_ids"]}, 2)
        for mode, count in (("sample", 2), ("flipout", 1), ("mean", 1)):
            with torch.no_grad(), hf.posterior(model, mode, n_samples=count):
                assert model(**folded).logits.device == CUDA
        assert own(waits) == []
        item = bayes_layers(model)[0]
        factors = item.variant.draw_factors(item.layer, "default", random.key(0, CUDA), 2)
        assert all(factor.device == CUDA for factor in factors)


@pytest.mark.parametrize("name", ["blob", "polar-vbll"])
def test_causal_models(waits: list[Wait], name: str) -> None:
    config, options = ADAPTERS[name]
    model = adapted(answering_llama(), config, **options).to(CUDA)
    waits.clear()
    train_step(model)
    check_gradients(p for p in model.parameters() if p.requires_grad)
    assert own(waits) == []
    inputs = {**batch(), "attention_mask": torch.ones(3, 6, dtype=torch.int64)}
    found = hf.predict(model.eval(), inputs, n_samples=4, samples_per_pass=2)
    assert found.log_probs.shape == (3, 3)


def test_answer_tokens_are_taken_without_waiting(waits: list[Wait]) -> None:
    from bayes_kernels.hf.logits import LogitRows

    mask = torch.ones(3, 6, dtype=torch.int64)
    rows = LogitRows(nn.Identity(), {"attention_mask": mask}, [5, 7])
    rows.last = torch.zeros(3, dtype=torch.int64)  # padded on the right
    logits = rows.of({"logits": torch.randn(6, 6, 9, device=CUDA)}, 2)
    assert logits.shape == (6, 2) and logits.device == CUDA
    assert own(waits) == []
