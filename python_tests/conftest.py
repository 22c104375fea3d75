"""Devices, data folders and the accuracy rule, shared by all tests.

`device` runs a test on the CPU kernels, on the emulated CUDA kernels ("sim", where the emulator
library is built) and on a real GPU ("cuda", where there is one). FAIL_WITHOUT_CUDA=1 turns a skip for
lack of a GPU into a failure; `--device cpu` leaves the others out. BAYES_KERNELS_DATA and
BAYES_KERNELS_MODELS name folders with real data sets and small real models; tests that need them skip
where they are absent.
"""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import tiny_task
import torch
from kept_draws import KeptDraws

import bayes_kernels as bk
from bayes_kernels import _library

ROOT = Path(__file__).resolve().parent.parent


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device", choices=("cpu", "sim", "cuda"), help="the only device of tests that take one"
    )


def pytest_configure() -> None:
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell does in the background
        signal.signal(signal.SIGINT, signal.default_int_handler)
    wanted = os.environ.get("BAYES_KERNELS_CPU")
    if wanted and _library.problem is None and bk.build_info()["cpu_path"] != wanted:
        raise pytest.UsageError(
            f"BAYES_KERNELS_CPU={wanted}: the kernels are those of {bk.build_info()['cpu_path']}; "
            "name a path that the processor has"
        )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    only = config.getoption("--device")
    if only is None:
        return
    others = [
        item
        for item in items
        if isinstance(item, pytest.Function)
        and hasattr(item, "callspec")
        and item.callspec.params.get("device", only) != only
    ]
    config.hook.pytest_deselected(items=others)
    left = set(map(id, others))
    items[:] = [item for item in items if id(item) not in left]


def pytest_report_header() -> list[str]:
    info = bk.build_info() if _library.problem is None else _library.problem
    return [
        f"bayes_kernels: {info}",
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, "
        f"cuda {torch.cuda.is_available()}, emulator {_library.load_simulator() is not None}",
    ]


def pytest_collection_finish() -> None:
    """All modules are loaded: the collector need not visit their objects again.

    Each Trainer collects when it starts, which takes a second otherwise.
    """
    gc.collect()
    gc.freeze()


def _no_cuda(reason: str) -> None:
    if os.environ.get("FAIL_WITHOUT_CUDA") == "1":
        pytest.fail(f"{reason}, and FAIL_WITHOUT_CUDA=1")
    pytest.skip(reason)


@pytest.fixture(scope="module", autouse=True)
def _cpu_only(request: pytest.FixtureRequest) -> Iterator[None]:
    """No GPU for a module marked cpu_only, nor for the processes that it starts."""
    if not request.node.get_closest_marker("cpu_only") or not torch.cuda.is_available():
        yield
        return
    from bayes_kernels.experiment import machine

    machine.memory_measure.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        patch.setattr(torch.cuda, "is_available", lambda: False)
        yield
    machine.memory_measure.cache_clear()


@pytest.fixture(autouse=True)
def _needs_cuda(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("needs_cuda") and not torch.cuda.is_available():
        _no_cuda("no GPU")


def _settings() -> dict[str, object]:
    """What a test may change of its process, and has to leave as it was."""
    return {
        "gradients": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "default dtype": torch.get_default_dtype(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "folder": os.getcwd(),
        "signals": [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)],
    }


@pytest.fixture(autouse=True)
def _leaves_settings_as_they_were() -> Iterator[None]:
    """A test that leaves gradients off, say, fails itself, and not the hundred after it."""
    before = _settings()
    yield
    after = _settings()
    changed = {name: (before[name], after[name]) for name in before if before[name] != after[name]}
    torch.set_grad_enabled(bool(before["gradients"]))
    assert not changed, f"left otherwise than found: {changed}"


@dataclass(frozen=True)
class Device:
    """A place to run kernels: `name` is cpu, sim or cuda; `torch` is the tensors' device."""

    name: str
    torch: torch.device

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """Activation types supported there."""
        half = (torch.float32, torch.bfloat16, torch.float16)
        return (*half, torch.float64) if self.name == "cpu" else half


def _device(name: str) -> Iterator[Device]:
    if name == "cuda":
        if not torch.cuda.is_available():
            _no_cuda("no GPU")
        if not bk.build_info()["cuda"]:
            _no_cuda("built without CUDA kernels")
        yield Device("cuda", torch.device("cuda"))
    elif name == "sim":
        if _library.load_simulator() is None:
            pytest.skip("the emulator library is not built")
        with _library.simulator():
            yield Device("sim", torch.device("cpu"))
    else:
        yield Device("cpu", torch.device("cpu"))


@pytest.fixture(params=["cpu", "sim", "cuda"])
def device(request: pytest.FixtureRequest) -> Iterator[Device]:
    yield from _device(request.param)


def _folder(variable: str, default: str) -> Path:
    path = Path(os.environ.get(variable) or ROOT.parent / "shared" / default)
    if not path.is_dir():
        pytest.skip(f"{path} is not there; name the folder in {variable}")
    return path


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Folder of real data sets in JSONL form."""
    return _folder("BAYES_KERNELS_DATA", "data")


@pytest.fixture(scope="session")
def models_dir() -> Path:
    """Folder of small real causal language models."""
    return _folder("BAYES_KERNELS_MODELS", "models")


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the two-class task: train.jsonl, test.jsonl and ood.jsonl. Tests only read it."""
    return tiny_task.write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the small BERT that learns that task. Tests only read it."""
    return tiny_task.write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def kept_draws() -> Iterator[KeptDraws]:
    """The draws that the CPU library keeps: none at the start."""
    draws = KeptDraws()
    limit = draws.limit
    draws.forget()
    yield draws
    draws.forget(limit)
