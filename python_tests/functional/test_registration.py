"""Every registered op: schema, fake kernel and tracing by opcheck. An op without a row here fails."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import bayes_kernels.functional  # noqa: F401, registers the ops and their fakes
from bayes_kernels import _library, random

OPS = torch.ops.bayes_kernels


def samples(dtype: torch.dtype = torch.float32) -> dict[str, list[tuple]]:
    """Argument lists for every op, odd sizes and empty batches among them."""
    torch.manual_seed(0)
    key = random.key(3)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    x, a, e = torch.randn(7, 33).to(dtype), torch.randn(5, 33).to(acc), torch.randn(5, 33).to(acc)
    h, b = torch.randn(7, 5).to(acc), torch.randn(9, 5).to(acc)
    base, dy = torch.randn(7, 9).to(dtype), torch.randn(7, 9).to(dtype)
    ids = torch.tensor([3, 1, 1, 0, 9, 2, 2])
    counted = (0, 0, 1, None)  # stream, row0, rows_per_id, ids
    means, rhos = (
        [torch.randn(3, 4).to(acc), torch.randn(6).to(acc)],
        [
            torch.rand(3, 1).to(acc) + 0.1,
            torch.rand(6).to(acc) + 0.1,
        ],
    )
    weight = torch.tensor(0.1, dtype=acc)
    talls = [torch.randn(17, 3).to(acc), torch.randn(5, 5).to(acc), torch.randn(40, 1).to(acc)]
    beside = [0.1 * torch.randn_like(t) for t in talls]
    rows = [torch.randn(b, t.shape[0]).to(acc) for b, t in enumerate(talls)]
    grams = [t.T @ t for t in talls[:2]]
    samples_of = [torch.randn(7, 3).to(dtype), torch.randn(2, 5).to(acc)]
    weights = [torch.rand(7).to(acc), torch.empty(0, dtype=acc)]
    scalar = torch.tensor(0.1, dtype=torch.float64)
    factors, experts = torch.randn(3, 5, 33).to(acc), torch.randn(3, 9, 5).to(acc)
    plan = OPS.group_rows(torch.tensor([2, 0, 0, 1, 2, 2, 0]), 3)
    return {
        "fold_in": [(key, 5)],
        "normal": [(key, 2, [3, 5]), (key, 0, [0])],
        "sign_bits": [(key, 1, False, 4, 130, 2, 3, None), (key, 1, True, 7, 5, 0, 1, ids)],
        "dropout_mask": [(key, 1, 4, 13, 2, 0.5)],
        "scaled_normal": [
            (torch.rand(5, 33).to(acc), 33, key, 1, "square"),
            (torch.rand(5, 1).to(acc), 33, key, 1, "softplus"),
        ],
        "scaled_normal_backward": [
            (e, torch.rand(5, 33).to(acc), key, 1, "square"),
            (e, torch.rand(5, 1).to(acc), key, 1, "direct"),
        ],
        "gaussian_draws": [
            (a, e, ids, key, 1, "square", True),
            (a, e[:, :1], ids[:0], key, 1, "softplus", False),
        ],
        "gaussian_draws_backward": [
            (torch.stack([a, e]), e, ids[:2], key, 1, "square", True, True, True),
            (torch.stack([a, e]), e[:, :1], ids[:2], key, 1, "direct", False, False, True),
            (torch.stack([a, e]), e, ids[:2], key, 1, "direct", False, True, False),
        ],
        "quantize_activations": [
            (x, key, 3, 2),
            (x[:0], key, 0, 0),
            (x.reshape(7, 3, 11), key, 1, 0),
        ],
        "dequantize_activations": [
            (*OPS.quantize_activations(x, key, 3, 2), dtype),
            (*OPS.quantize_activations(x.reshape(7, 3, 11), key, 3, 2), torch.bfloat16),
        ],
        "adapter_shrink": [
            (x, a, None, None, 0, 0, 1, None, 0.0),
            (x, a, e, key, 4, 2, 3, None, 0.25),
            (x[:0], a, e, key, 4, 0, 1, None, 0.0),
            (x, a, e, key, 4, 0, 1, ids, 0.0),
        ],
        "adapter_shrink_backward": [
            (h, x, a, e, key, 4, 2, 3, None, 0.25, True, True, True),
            (h, x, a, None, None, 0, 0, 1, None, 0.0, False, True, True),
            (h[:0], x[:0], a, e, key, 0, 0, 1, None, 0.0, True, True, False),
        ],
        "adapter_expand": [
            (h, b, base, 2.0, dtype),
            (h, b, None, 1.0, dtype),
            (h[:0], b, None, 1.0, dtype),
        ],
        "adapter_forward": [
            (x, a, None, b, base, None, 0, 0, 1, None, 0.0, "", 2.0),
            (x, a, e, b, None, key, 4, 2, 3, None, 0.25, "square", 1.0),
            (x[None, :0], a, e[:, :1], b, base[None, :0], key, *counted, 0.0, "direct", 1.0),
            (x.reshape(7, 1, 33), a, e, b, None, key, 4, 0, 1, ids, 0.0, "softplus", 1.0),
        ],
        "adapter_train": [
            (x, a, None, b, base, None, 0, 0, 1, None, 0.0, "", 2.0),
            (x[None, :0], a, e[:, :1], b, base[None, :0], key, *counted, 0.0, "direct", 1.0),
            (x.reshape(7, 1, 33), a, e, b, None, key, 4, 0, 1, ids, 0.25, "softplus", 1.0),
        ],
        "adapter_infer": [
            (x, a, None, b, base, None, 0, 0, 1, None, 0.0, "", 2.0),
            (x[None], a, e, b, base[None], key, 4, 0, 1, ids, 0.25, "square", 1.0),
        ],
        "adapter_group": [
            (
                x,
                [a, a],
                [],
                [b, b],
                [base, base],
                None,
                [0, 0],
                *counted[1:],
                0.0,
                "",
                [2.0, 1.0],
                True,
            ),
            (
                x[None],
                [a, a[:2]],
                [e, e[:2, :1]],
                [b, b[:4, :2]],
                [],
                key,
                [4, 2],
                2,
                3,
                None,
                0.25,
                "square",
                [1.0, 0.5],
                True,
            ),
            (x, [a], [e], [b], [base], key, [1], 0, 1, ids, 0.0, "direct", [1.0], False),
        ],
        "adapter_backward": [
            (dy, x, a, None, b, h, None, 0, 0, 1, None, 0.0, "", 2.0, True, True, False, True),
            (dy, x, a, e, b, h, key, 4, 2, 3, None, 0.25, "square", 1.0, True, True, True, True),
            (dy, x, a, e[:, :1], b, h, key, 4, 0, 1, ids, 0.0, "softplus", 1.0, *[False, True] * 2),
            (dy[None], x[None], a, e, b, h, key, 4, 0, 1, ids, 0.0, "direct", 1.0, *[True] * 4),
            (dy[:0], x[:0], a, e, b, h[:0], key, 0, 0, 1, None, 0.0, "", 1.0, *[False] * 3, True),
        ],
        "adapter_expand_backward": [(dy, h, b, 2.0, True, True), (dy, h, b, 1.0, False, True)],
        "group_rows": [(torch.tensor([2, 0, 0, 1, 2, 2, 0]), 4), (ids[:0], 2)],
        "grouped_forward": [
            (x, factors, None, b, base, plan, 1, None, 0, 0, None, 2.0),
            (x, factors, None, experts, None, None, 3, None, 0, 0, None, 1.0),
            (x, factors, factors, experts, base, plan, 1, key, 4, 2, None, 1.0),
            (x[:0], factors, None, b, None, None, 3, None, 0, 0, None, 1.0),
        ],
        "sampled_forward": [
            (x, a, e, b, base, ids[:3], plan, 1, key, 1, "square", True, 2.0),
            (x, a, e[:, :1], b, None, ids, None, 1, key, 1, "softplus", False, 1.0),
            (x[:0], a, e, b, None, ids, None, 1, key, 0, "direct", True, 1.0),
        ],
        "grouped_backward": [
            (
                dy,
                x,
                factors,
                None,
                b,
                h,
                plan,
                1,
                *[None, 0, 0, None],
                2.0,
                *[True, True, False, True],
            ),
            (dy, x, factors, factors, experts, h, None, 3, key, 4, 0, ids, 1.0, *[True] * 4),
            (
                dy,
                x,
                factors,
                None,
                experts,
                h,
                plan,
                1,
                *[None, 0, 0, None],
                1.0,
                *[False, True] * 2,
            ),
            (
                dy[:0],
                x[:0],
                factors,
                None,
                b,
                h[:0],
                None,
                3,
                *[None, 0, 0, None],
                1.0,
                *[True] * 4,
            ),
        ],
        "gaussian_kl": [(means, rhos, [0.2, 0.3], "square", "elbo")],
        "gaussian_kl_backward": [(weight, means, rhos, [0.2], "softplus", "code")],
        "gaussian_kl_step_": [(means, rhos, weight, [0.2], "square", "elbo")],
        "low_rank_update_": [(talls, rows)],
        "kron_accumulate_": [
            (grams, samples_of, weights, scalar, scalar),
            (grams[:1], [samples_of[0][:0]], [], scalar, scalar),
        ],
        "tall_gram": [(talls,)],
        "tall_retract_": [(talls, [], "polar"), (talls, beside, "qr")],
        "tall_stiefel_step_": [(talls, beside, scalar, "polar")],
        "tall_landing_field": [(talls, beside, scalar)],
        "tall_landing_step_": [(talls, beside, scalar, scalar)],
        "mc_predict": [
            (h.abs(), h.square(), key, 1, 0, None, 6, True, True),
            (h, (h[:, :, None] * h[:, None]), key, 0, 4, ids, 5, False, False),
            (h[:0], h[:0], key, 0, 0, None, 5, False, True),
        ],
        "build_info": [()],
    }


def registered() -> set[str]:
    names = torch._C._dispatch_get_all_op_names()
    return {n.split("::")[1] for n in names if n.startswith("bayes_kernels::")}


def has_fake(name: str) -> bool:
    return torch._library.simple_registry.singleton.find(name).fake_impl.kernel is not None


def test_every_op_has_a_row():
    assert registered() == set(samples())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", sorted(set(samples()) - {"build_info"}))
def test_opcheck(name: str, dtype: torch.dtype):
    for args in samples(dtype)[name]:
        torch.library.opcheck(getattr(OPS, name).default, args)


def test_every_op_has_cpu_and_fake_kernels_and_the_emulator_the_same_schemas():
    simulated = _library.load_simulator()
    for name in registered() - {"build_info"}:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"bayes_kernels::{name}", "CPU"), name
        assert has_fake(f"bayes_kernels::{name}"), name
        if simulated is not None:
            assert has_fake(f"bayes_kernels_sim::{name}"), name
            ours = str(getattr(OPS, name).default._schema).split("::")[1]
            assert ours == str(getattr(simulated, name).default._schema).split("::")[1]


def test_fakes_of_ops_that_are_imported_after_the_emulator():
    code = (
        "import torch; from bayes_kernels import _library\n"
        "found = _library.load_simulator()\n"
        "import bayes_kernels.functional\n"
        "with torch._subclasses.FakeTensorMode():\n"
        "    key = torch.empty(2, dtype=torch.int64)\n"
        "    print(found is None or tuple(found.normal(key, 0, [3, 4]).shape) == (3, 4))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "True", done.stderr[-2000:]


@pytest.mark.needs_cuda
def test_cuda_kernels_are_registered():
    for name in registered() - {"build_info"}:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"bayes_kernels::{name}", "CUDA"), (
            name
        )


def test_every_cpu_path_gives_the_same_results():
    """The instruction set is chosen once per process: each path runs in a process of its own."""
    code = (
        "import torch\n"
        "from bayes_kernels import functional as F, random, build_info\n"
        "g = torch.Generator().manual_seed(0)\n"
        "x = torch.randn(9, 150, generator=g)\n"
        "a, r = torch.randn(8, 150, generator=g), torch.rand(8, 150, generator=g)\n"
        "b = torch.randn(33, 8, generator=g, requires_grad=True)\n"
        "y = F.flipout_lora(x, a, r, b, key=random.key(3), dropout=0.1)\n"
        "y.square().sum().backward()\n"
        "print(build_info()['cpu_path'], y.double().sum().item(), b.grad.double().sum().item())\n"
        "for m, v in ((x[:, :5], 1.0), (x, 1.0), (x, 99.0)):\n"
        "    p = F.mc_predict(m, v * m.abs(), n_samples=70, key=random.key(4))\n"
        "    print(p.log_probs.double().sum().item(), p.expected_entropy.double().sum().item())\n"
    )
    results = {}
    for wanted in ("baseline", "avx2", "avx512"):
        run = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "BAYES_KERNELS_CPU": wanted},
            capture_output=True,
            text=True,
            check=True,
        )
        path, *values = (
            run.stdout.split()
        )  # a processor without `wanted` falls back to a narrower one
        results[path] = torch.tensor([float(v) for v in values], dtype=torch.float64)
    for path, values in results.items():
        torch.testing.assert_close(values, results["baseline"], rtol=1e-5, atol=1e-3, msg=path)
