"""Providers of the benchmarks that stand for other people's code do what that code does."""

from __future__ import annotations

import pytest
import torch

from tools.test_benchmarks import load, on_path  # noqa: F401


@pytest.mark.parametrize(("dtype", "units"), [(torch.float32, 4), (torch.bfloat16, 7)])
def test_the_published_adapter_adds_in_place(dtype: torch.dtype, units: int) -> None:
    """y is the frozen layer's output, and the peak is so many fp32 tensors of (T, n).

    In fp32: y's share, signs, their product with x, and two products with b, but y itself. In bf16 also x
    in fp32, and gradients and sums that are converted.
    """
    bench, harness = load("bench_adapter"), load("harness")
    case = bench.Case(256, 256, 256, 4, dtype)
    i = bench.make_inputs(case, "cpu")
    i.base = i.base.detach()
    before = i.base.clone()
    noise = bench.dense(case, torch.tensor([1, 2]))
    y = bench.published(bench.replace(i, base=i.base.detach()), noise)
    assert y.data_ptr() == i.base.data_ptr() and y.dtype is dtype
    truth = bench.truth(bench.replace(i, base=before), noise)[0]
    harness.assert_agrees("published", [y.detach()], [truth], bench.allowed(case))

    def step() -> object:
        again = bench.replace(i, base=i.base.detach())
        return torch.autograd.grad(bench.published(again, None), i.leaves, i.dy)

    assert harness.peak_bytes(step, "cpu") / (256 * 256 * 4) == pytest.approx(units, abs=0.2)


def test_the_published_update_keeps_its_factors_in_fp64() -> None:
    bench = load("bench_curvature")
    factors = [torch.randn(40, 3, dtype=torch.float64)]
    x = torch.randn(5, 40)
    whole = factors[0] @ factors[0].T + x.double().T @ x.double()
    bench.svd_fp64(factors, [x])
    values, vectors = torch.linalg.eigh(whole)
    best = vectors[:, -3:] * values[-3:] @ vectors[:, -3:].T
    assert factors[0].dtype is torch.float64 and factors[0].shape == (40, 3)
    assert (factors[0] @ factors[0].T - best).abs().max() < 1e-10 * best.abs().max()


def test_the_landing_field_is_compared_with_a_compiled_callback(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    harness, bench = load("harness"), load("bench_tall")
    seen = []
    monkeypatch.setattr(torch, "compile", lambda f, **options: seen.append(f) or f)
    monkeypatch.setattr(bench, "peak_bytes", lambda step, device: 0)
    for quick in (False, True):
        rows = bench.run_landing(64, 4, harness.Options("cpu", quick, 1e-3))
        assert {"published", "eager", "bayes_kernels"} < {row.provider for row in rows} | {"-"}
        assert any(row.provider == "compiled" for row in rows) is not quick
        assert [row.provider for row in rows if row.miss] == []
    assert set(seen) == {bench.published_field}


def test_the_published_divergence_is_that_of_two_gaussians() -> None:
    """Up to its 1e-6 in the logarithms."""
    pytest.importorskip("peft")
    bench = load("bench_end_to_end")
    layer = torch.nn.Module()
    layer.lora_A = torch.nn.ModuleDict({"default": torch.nn.Linear(16, 4)})
    layer.bayes_rho = torch.nn.Parameter(torch.rand(4, 16) * 0.2 + 0.2)
    normal = torch.distributions.Normal
    mean, std = layer.lora_A["default"].weight.double(), layer.bayes_rho.double() ** 2
    prior = normal(torch.zeros_like(mean), bench.PRIOR_STD)
    want = torch.distributions.kl_divergence(normal(mean, std), prior).sum()
    got = bench._published_divergence(torch.nn.Sequential(layer))
    assert got.dtype is torch.float64
    assert abs((got / want).item() - 1) < 1e-4


@pytest.mark.parametrize("last", [False, True])
def test_peers_are_compared_with_closed_forms(last: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours meets the closed form (else the run stops), published formulas too; packages may be missing."""
    harness, bench = load("harness"), load("bench_peers")
    monkeypatch.setattr(bench, "peak_bytes", lambda step, device, warm: 0)
    monkeypatch.setattr(bench, "installed", lambda provider: False)
    case = bench.Case(3, last)
    rows = list(bench.run_laplace(case, harness.Options("cpu", True, 1e-3)))
    assert [row.provider for row in rows if row.miss] == []
    by_op = {op: {row.provider for row in rows if row.op == op} for op in ("fit", "logits")}
    assert by_op["fit"] == {"bayes_kernels", "published"}
    assert by_op["logits"] == {"bayes_kernels"} | ({"published"} if last else set())
    model, x, y = bench.build(case)
    loader = bench.DataLoader(bench.TensorDataset(x, y), batch_size=bench.BATCH)
    state = bench.own(case, model).fit(loader, verbose=False).state_dict()
    pairs = bench.published_fit(case, model, loader)
    for kind, (values, _) in zip(("input", "output"), pairs[-2:], strict=True):
        want = state[f"2.weight.{kind}_values"].double() * (len(x) if kind == "input" else 1)
        got = values.double().flip(0)[: len(want)]
        assert (got - want.sort(descending=True).values).abs().max() < 1e-5 * want.max()
    other = bench.own(case, model)
    other.prior_precision = 1.01 * bench.DELTA
    monkeypatch.setattr(bench, "own", lambda case, model: other)
    with pytest.raises(harness.Disagreement, match="timing would be meaningless"):
        list(bench.run_laplace(case, harness.Options("cpu", True, 1e-3)))
