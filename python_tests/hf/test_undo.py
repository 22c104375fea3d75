"""Ctrl-C in the middle of every conversion: model and folders are as they were before.

KeyboardInterrupt is raised at lines of our own code. Which lines run is counted first; each test takes the
first and the last time of some of them. By hand, `INTERRUPT_EVERY_LINE=1` takes all of them.
"""

from __future__ import annotations

import os
import random
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import tiny_models
import torch

import bayes_kernels
from bayes_kernels.hf import (
    BlobConfig,
    PolarConfig,
    ScalablConfig,
    TfbConfig,
    bayesianize,
    export_lora,
    import_lora,
)
from bayes_kernels.hf.methods.laplace import laplace_posterior

pytestmark = pytest.mark.cpu_only

OURS = str(Path(bayes_kernels.__file__).parent / "hf")
LINES = 12  # of each conversion that a test interrupts

Place = tuple[str, int]


class _Lines:
    """Counts lines of our code that run; raises KeyboardInterrupt before one of them."""

    def __init__(self, stop: tuple[Place, int] | None = None) -> None:
        self.stop, self.raised = stop, False
        self.count: dict[Place, int] = {}
        self.order: list[Place] = []

    def __enter__(self) -> _Lines:
        self.before, self.gradients = sys.gettrace(), torch.is_grad_enabled()
        sys.settrace(self._call)
        return self

    def __exit__(self, *_: Any) -> None:
        sys.settrace(self.before)
        # A line where a `with torch.no_grad()` ends is traced before its __exit__, which would not run;
        # the interpreter itself looks for Ctrl-C at calls and loops only.
        torch.set_grad_enabled(self.gradients)

    def _call(self, frame: Any, event: str, argument: Any) -> Any:
        return self._line if frame.f_code.co_filename.startswith(OURS) else None

    def _line(self, frame: Any, event: str, argument: Any) -> Any:
        if event == "line" and not self.raised:
            place = frame.f_code.co_filename, frame.f_lineno
            self.count[place] = self.count.get(place, 0) + 1
            if self.count[place] == 1:
                self.order.append(place)
            if self.stop is not None and self.stop == (place, self.count[place]):
                self.raised = True
                raise KeyboardInterrupt
        return self._line


def interruptions(work: Callable[[], Any], seed: int, whole: str = "") -> Iterator[_Lines]:
    """What interrupts some work at one line each: the first, and some; of one file all of them."""
    with _Lines() as lines, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        work()
    moments = [(place, number) for place in lines.order for number in {1, lines.count[place]}]
    if os.environ.get("INTERRUPT_EVERY_LINE") != "1":
        chosen = random.Random(seed).sample(moments, min(LINES, len(moments)))
        moments = [moments[0], *chosen, *(m for m in moments if whole and whole in m[0][0])]
    for moment in moments:
        yield _Lines(moment)


def state(model: Any) -> dict[str, Any]:
    """Everything about a model that a conversion changes, tensors as they are."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        hooks = len(module._forward_pre_hooks), len(module._forward_hooks)
        found[name] = type(module).__name__, module.training, hooks, sorted(vars(module))
        for key in ("lora_variant", "scaling", "r", "merged_adapters", "active_adapters"):
            value = getattr(module, key, None)
            found[f"{name}.{key}"] = dict(value) if hasattr(value, "items") else value
        cast = getattr(module, "cast_input_dtype_enabled", None)
        found[f"{name}.cast"] = cast
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        found[f"{name} "] = tensor.detach().clone(), tensor.requires_grad
    if isinstance(model, peft.PeftModel):
        found["config"] = {k: v.to_dict() for k, v in model.peft_config.items()}
        found["type"] = model.peft_type, type(model.base_model), model.active_adapters
        found["posterior"] = laplace_posterior(model)
    return found


def differences(before: dict[str, Any], after: dict[str, Any], tolerance: float) -> list[str]:
    found = sorted(before.keys() ^ after.keys())
    for key in before.keys() & after.keys():
        a, b = before[key], after[key]
        if key.endswith(" "):
            same = a[0].shape == b[0].shape and a[0].dtype == b[0].dtype and a[1] == b[1]
            same = same and bool((a[0] - b[0]).abs().max() <= tolerance * (1 + a[0].abs().max()))
        else:
            same = a == b
        if not same:
            found.append(key)
    return found


# --- Models --------------------------------------------------------------------------------------


def base() -> Any:
    sizes = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    return tiny_models.bert(num_attention_heads=2, max_position_embeddings=8, **sizes)


CONFIGS = {
    "mle": lambda **options: peft.LoraConfig(**options),
    "blob": BlobConfig,
    "scalabl": ScalablConfig,
    "tfb": TfbConfig,
    "polar": PolarConfig,
}


def adapted(method: str) -> Any:
    options = {"r": 2, "target_modules": ["query", "dense"], "task_type": "SEQ_CLS"}
    if method == "tfb":
        model = adapted("mle")
        bayesianize(model, "tfb", BATCHES, max_trials=1, tolerance=1.0, progress=False)
        return model
    model = peft.get_peft_model(base(), CONFIGS[method](**options))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ("lora_core" if method == "polar" else "lora_B") in name:
                parameter.copy_(torch.randn_like(parameter) / 4)
    return model.eval()


IDS = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 0], [8, 9, 10, 11]])
BATCHES = [
    {"input_ids": IDS, "attention_mask": IDS.ne(0).long(), "labels": torch.tensor([0, 1, 2])}
]


def interrupted(
    make: Callable[[], Any], work: Callable[[Any], Any], seed: int, tolerance: float = 0.0
) -> int:
    """Interrupt work on a model at several lines; how many interruptions arrived."""
    arrived = 0
    model, first = make(), make()
    for lines in interruptions(lambda: work(first), seed):
        before = state(model)
        try:
            with warnings.catch_warnings(), lines:
                warnings.simplefilter("ignore")
                work(model)
        except KeyboardInterrupt:
            arrived += 1
            place, number = lines.stop  # type: ignore[misc]
            wrong = differences(before, state(model), tolerance)
            assert not wrong, f"{place[0]}:{place[1]}, time {number}: {wrong}"
        else:
            model = make()
    return arrived


# --- Conversions ---------------------------------------------------------------------------------

CONVERSIONS = {
    "tfb": {"max_trials": 2, "tolerance": 1.0, "n_samples": 2},
    "laplace": {"n_samples": 2},
    "laplace-last": {"n_samples": 2, "prior": "fixed"},
}


@pytest.mark.parametrize(
    ("method", "start"),
    [(method, start) for method in CONVERSIONS for start in ("mle", "blob", "scalabl", "polar")]
    + [("tfb", "tfb"), ("laplace", "tfb")],
)
def test_bayesianize(method: str, start: str) -> None:
    def work(model: Any) -> None:
        bayesianize(model, method, BATCHES, progress=False, **CONVERSIONS[method])

    assert interrupted(lambda: adapted(start), work, seed=1) > 5


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("start", ["blob", "scalabl", "tfb", "polar"])
def test_merging(start: str, safe: bool) -> None:
    for name in ("merge_adapter", "merge_and_unload"):

        def work(model: Any, name: str = name) -> None:
            getattr(model, name)(safe_merge=safe)

        assert interrupted(lambda: adapted(start), work, seed=2, tolerance=1e-6) > 3


@pytest.mark.parametrize("method", ["blob", "scalabl", "tfb", "polar"])
def test_import_lora(method: str, tmp_path: Path) -> None:
    adapted("mle").save_pretrained(tmp_path)

    def work(model: Any) -> None:
        import_lora(model, tmp_path, method=method)

    files = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert interrupted(base, work, seed=3) > 5
    if method != "mle":
        second = lambda model: import_lora(model, tmp_path, adapter_name="second", method=method)  # noqa: E731
        assert interrupted(lambda: adapted(method), second, seed=4) > 5
    assert files == {path: path.read_bytes() for path in tmp_path.iterdir()}


@pytest.mark.parametrize("which", ["mean", 0])
@pytest.mark.parametrize("start", ["new", "replace"])
def test_export_lora(start: str, which: Any, tmp_path: Path) -> None:
    model, folder = adapted("blob"), tmp_path / "lora"

    def work() -> None:
        export_lora(model, folder, which)

    export_lora(model, folder, which)
    exported = {path: path.read_bytes() for path in folder.iterdir()}
    before, arrived = state(model), 0
    for lines in interruptions(work, seed=5, whole="checkpoints.py"):
        for path in tmp_path.iterdir():
            shutil.rmtree(path)
        if start == "replace":
            export_lora(model, folder, which, seed=1)
        old = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        try:
            with lines:
                work()
        except KeyboardInterrupt:
            arrived += 1
            now = {path: path.read_bytes() for path in tmp_path.rglob("lora/*")}
            assert now in (old, exported), lines.stop
            # The last line throws the old folder away.
            assert len(list(tmp_path.iterdir())) == bool(now) or now == exported, lines.stop
            assert not differences(before, state(model), 0.0), lines.stop
    assert arrived > 5
