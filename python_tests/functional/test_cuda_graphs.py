"""CUDA graphs, side streams and several GPUs: what only a GPU can show, and as much of it as others can.

A captured step runs again without the host: its ops may not wait for the GPU, read a tensor's value,
allocate outside torch's pool or launch on another stream, and a key that is changed in place must give new
noise. Without a GPU a "replay" is the same call again with the same tensors, so that the steps themselves are
known to be right.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bayes_kernels import functional as F
from bayes_kernels import random
from bayes_kernels.optim import kl_step_

cuda = pytest.mark.needs_cuda


class Captured:
    """A step whose results are written to the same tensors by every replay."""

    def __init__(self, step: Callable[[], list[Tensor]], device: torch.device, warm: bool) -> None:
        self.step, self.graph = step, None
        if device.type == "cuda":
            if warm:
                side = torch.cuda.Stream()
                side.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(side):
                    for _ in range(3):
                        step()
                torch.cuda.current_stream().wait_stream(side)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.results = step()

    def replay(self) -> list[Tensor]:
        if self.graph is None:
            return [t.clone() for t in self.step()]
        self.graph.replay()
        return [t.clone() for t in self.results]


class Net(nn.Module):
    """Two layers with Bayesian adapters under one key, which is a buffer."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(1)

        def leaf(*size: int, scale: float) -> nn.Parameter:
            return nn.Parameter((scale * torch.randn(size, generator=g)).to(device))

        self.base = nn.ModuleList(nn.Linear(32, 32) for _ in range(2)).to(device)
        for layer in self.base:
            with torch.no_grad():
                layer.weight.copy_(torch.randn(32, 32, generator=g) / 6)
                layer.bias.zero_()
            layer.requires_grad_(False)
        self.means = nn.ParameterList(leaf(4, 32, scale=0.2) for _ in range(2))
        self.rhos = nn.ParameterList(leaf(4, 32, scale=0.3) for _ in range(2))
        self.bs = nn.ParameterList(leaf(32, 4, scale=0.2) for _ in range(2))
        self.register_buffer("key", random.key(0, device))

    def forward(self, x: Tensor) -> Tensor:
        for stream, (layer, mean, rho, b) in enumerate(
            zip(self.base, self.means, self.rhos, self.bs, strict=True)
        ):
            x = F.flipout_lora(
                x, mean, rho, b, layer(x), key=self.key, stream=stream, scope="example"
            ).tanh()
        return x


def loss_of(net: nn.Module, means: Any, rhos: Any, x: Tensor) -> Tensor:
    return net(x).square().mean() + 1e-4 * F.gaussian_kl(list(means), list(rhos), 0.2)


@cuda
def test_reduce_overhead_replays_with_new_noise():
    """First of all: its compilers take longest, and tests run side by side on a GPU machine."""
    device = torch.device("cuda")
    net = Net(device)
    compiled = torch.compile(net, mode="reduce-overhead", fullgraph=True)
    x = torch.randn(64, 32, device=device)
    seen = []
    for seed in (0, 1, 2, 1):
        net.key.copy_(random.key(seed, device))
        torch.compiler.cudagraph_mark_step_begin()
        y = compiled(x)
        gradients = torch.autograd.grad(y.square().mean(), list(net.means))
        torch.testing.assert_close(y, net(x), rtol=1e-4, atol=1e-5)
        seen.append([y.detach().clone(), *(t.clone() for t in gradients)])
    for again, first in zip(seen[3], seen[1], strict=True):
        assert torch.equal(again, first)
    assert not torch.equal(seen[0][0], seen[1][0])


@cuda
def test_a_whole_training_step_is_captured():
    """Forward, backward, KL and optimiser in one graph; three replays equal three eager steps."""
    device = torch.device("cuda")
    found = []
    for graph in (False, True):
        net, x = (
            Net(device),
            torch.randn(64, 32, generator=torch.Generator().manual_seed(2)).to(device),
        )
        trained = [p for p in net.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-2, capturable=True)

        def step(net: Net = net, x: Tensor = x, optimizer: Any = optimizer) -> list[Tensor]:
            optimizer.zero_grad(set_to_none=False)
            loss = loss_of(net, net.means, net.rhos, x)
            loss.backward()
            optimizer.step()
            return [loss.detach()]

        start = [p.detach().clone() for p in trained]
        captured = Captured(step, device, warm=True) if graph else None
        with torch.no_grad():
            for p, first in zip(trained, start, strict=True):
                p.copy_(first)
        for state in optimizer.state.values():
            for value in state.values():
                value.zero_()
        losses = []
        for seed in range(3):
            net.key.copy_(random.key(seed, device))
            losses.append((captured.replay() if captured else step())[0].clone())
        found.append([*losses, *(p.detach().clone() for p in trained)])
    for a, b in zip(*found, strict=True):
        # torch's products may differ in bits, which Adam divides by their size; another key changes 1e-2.
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def ops(device: torch.device) -> dict[str, tuple[Callable[[], list[Tensor]], list[Tensor]]]:
    """Steps of all families over fixed tensors, and what they change in place; all read one key."""
    g = torch.Generator().manual_seed(0)
    key = random.key(1, device)

    def normal(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(size, generator=g).to(device, dtype)

    def adapter(
        dtype: torch.dtype, tokens: int, n: int = 72, m: int = 40
    ) -> Callable[[], list[Tensor]]:
        x, base = normal(tokens, n, dtype=dtype).requires_grad_(), normal(tokens, m, dtype=dtype)
        mean, b = normal(8, n).requires_grad_(), normal(m, 8).requires_grad_()
        rho = normal(8, n).abs().add(0.1).requires_grad_()

        def step() -> list[Tensor]:
            y = F.flipout_lora(x, mean, rho, b, base, key=key, stream=1, dropout=0.2)
            return [y, *torch.autograd.grad(y, [x, mean, rho, b], torch.ones_like(y))]

        return step

    def decode(grad: bool) -> Callable[[], list[Tensor]]:
        """Three adapters of three tokens in one launch, whose blocks count with the stream's tickets."""
        x = normal(3, 1100, dtype=torch.bfloat16)
        lists = [[normal(r, 1100) for r in (8, 8, 3)] for _ in range(2)]
        lists.append([normal(m, r) for m, r in ((1100, 8), (300, 8), (40, 3))])

        def step() -> list[Tensor]:
            with torch.set_grad_enabled(grad):
                given = [[t.detach().requires_grad_(grad) for t in some] for some in lists]
                ys = F.flipout_lora_group(x, *given, key=key, streams=[1, 2, 3])
                return [y.detach() for y in ys]

        return step

    means = [normal(4, 30) for _ in range(3)]
    rhos = [normal(4, 30).abs() + 0.1 for _ in range(3)]
    weight = torch.full((), 0.01, device=device)
    tall = [torch.linalg.qr(normal(50, 5))[0].contiguous() for _ in range(3)]
    steps = [0.01 * normal(50, 5) for _ in range(3)]
    logits, variance = normal(6, 5), normal(6, 5).abs()
    wide, spread = normal(6, 70), normal(6, 70).abs()
    widest = normal(1, 2100)  # without tickets
    factors, rows = [normal(60, 3)], [normal(4, 60)]
    square, inputs = [torch.zeros(8, 8, device=device)], [normal(40, 8)]
    half = torch.full((), 0.5, device=device, dtype=torch.float64)

    def kl() -> list[Tensor]:
        leaves = [t.detach().requires_grad_() for t in (*means, *rhos)]
        value = F.gaussian_kl(leaves[:3], leaves[3:], 0.2)
        return [value, *torch.autograd.grad(value, leaves)]

    def step_kl() -> list[Tensor]:
        kl_step_(means, rhos, weight, prior_std=0.2)
        return [*means, *rhos]

    def retract(op: Callable[..., Any]) -> Callable[[], list[Tensor]]:
        def step() -> list[Tensor]:
            op(tall, steps)
            return tall

        return step

    def predict(mean: Tensor, cov: Tensor) -> Callable[[], list[Tensor]]:
        def step() -> list[Tensor]:
            p = F.mc_predict(mean, cov, n_samples=40, key=key)  # several blocks of many classes
            return [p.log_probs, p.entropy, p.expected_entropy]

        return step

    def low_rank() -> list[Tensor]:
        F.low_rank_update_(factors, rows)
        return factors

    def kron() -> list[Tensor]:
        F.kron_accumulate_(square, inputs, alpha=half, beta=half)
        return square

    return {
        "normal": (lambda: [random.normal(key, (130,), stream=2)], [key]),
        "signs": (lambda: [random.sign_bits(key, 7, 130, stream=2)], [key]),
        "adapter fp32": (adapter(torch.float32, 40), [key]),
        "adapter bf16": (adapter(torch.bfloat16, 40), [key]),
        "adapter fp16": (adapter(torch.float16, 40), [key]),
        "one token": (adapter(torch.bfloat16, 1), [key]),
        "decode": (decode(False), [key]),
        "decode, with h": (decode(True), [key]),
        # Sums over several blocks, whose last one is found by a ticket.
        "adapter fp32 in splits": (adapter(torch.float32, 70, 1100, 600), [key]),
        "adapter bf16 in splits": (adapter(torch.bfloat16, 70, 1100, 600), [key]),
        "gaussian_kl": (kl, [key, *means, *rhos]),
        "kl_step_": (step_kl, [key, *means, *rhos]),
        "polar": (retract(F.polar_retract_), [key, *tall]),
        "qr": (retract(F.qr_retract_), [key, *tall]),
        "predict few": (predict(logits, variance), [key]),
        "predict many": (predict(wide, spread), [key]),
        "predict most": (predict(widest, widest.abs()), [key]),
        "low rank": (low_rank, [key, *factors]),
        "kron": (kron, [key, *square]),
    }


NAMES = list(ops(torch.device("cpu")))


def check_replays(name: str, device: torch.device, warm: bool) -> None:
    """Two replays under two keys equal two eager calls under the same keys, bit for bit."""
    step, changed = ops(device)[name]
    start = [t.clone() for t in changed]
    keys = [random.key(seed, device) for seed in (21, 22)]
    captured = Captured(step, device, warm)

    def run(call: Callable[[], list[Tensor]]) -> list[list[Tensor]]:
        for tensor, first in zip(changed, start, strict=True):
            tensor.copy_(first)
        found = []
        for new in keys:
            changed[0].copy_(new)
            found.append([t.detach().clone() for t in call()])
        return found

    for mine, eager in zip(run(captured.replay), run(step), strict=True):
        for a, b in zip(mine, eager, strict=True):
            assert torch.equal(a, b), f"{name}: a replay differs from the eager call"


@pytest.mark.parametrize("name", NAMES)
def test_a_captured_op_replays_with_a_key_changed_in_place(device, name):
    check_replays(name, device.torch, warm=True)


@cuda
@pytest.mark.parametrize("name", NAMES)
def test_an_op_is_captured_at_its_first_launch(name):
    """Cold: in a new process nothing of the op was loaded, or its attributes set, before the capture."""
    code = (
        "import torch, functional.test_cuda_graphs as tests\n"
        f"tests.check_replays({name!r}, torch.device('cuda'), warm=False)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1]
    )
    assert done.returncode == 0, done.stderr[-2000:]


@cuda
@pytest.mark.parametrize("name", NAMES)
def test_ops_run_on_the_current_stream(name):
    """On a side stream behind a long sleep: an op on another stream would read what is not there yet."""
    device = torch.device("cuda")
    step, changed = ops(device)[name]
    start = [t.clone() for t in changed]
    expected = [t.detach().clone() for t in step()]
    for tensor, first in zip(changed, start, strict=True):
        tensor.copy_(first)
    wrong = [torch.zeros_like(t) if t.is_floating_point() else t + 1 for t in start]
    for tensor, bad in zip(changed, wrong, strict=True):
        tensor.copy_(bad)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        for tensor, first in zip(changed, start, strict=True):
            tensor.copy_(first)
        found = [t.detach().clone() for t in step()]
    side.synchronize()
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@cuda
def test_tickets_of_streams_and_graphs_are_their_own():
    """Decoding on two streams and in two graphs at the same time: no kernel counts another's blocks."""
    device = torch.device("cuda")
    steps = [ops(device)[name][0] for name in ("decode", "decode, with h")]
    expected = [[t.clone() for t in step()] for step in steps]
    captured = [
        Captured(step, device, warm) for step, warm in zip(steps, (True, False), strict=True)
    ]
    streams = [torch.cuda.Stream() for _ in range(4)]
    for _ in range(50):
        for stream, of in zip(streams, (0, 1, 0, 1), strict=True):
            with torch.cuda.stream(stream):
                graph = captured[of].graph
                if stream in streams[2:] and graph is not None:
                    graph.replay()
                else:
                    for a, b in zip(steps[of](), expected[of], strict=True):
                        torch._assert_async((a == b).all())
    torch.cuda.synchronize()
    for one, wanted in zip(captured, expected, strict=True):
        for a, b in zip(one.results, wanted, strict=True):
            assert torch.equal(a, b)


@cuda
@pytest.mark.parametrize("name", NAMES)
def test_ops_run_on_the_device_of_their_tensors(name):
    """The second GPU while the first is current: kernels, streams and limits are the tensors' own."""
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    with torch.cuda.device(0):
        found = ops(torch.device("cuda", 1))[name][0]()
        expected = ops(torch.device("cuda", 0))[name][0]()
    for a, b in zip(found, expected, strict=True):
        assert a.device.index == 1
        torch.testing.assert_close(a.cpu(), b.cpu())
