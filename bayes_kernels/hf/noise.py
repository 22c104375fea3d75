"""Noise key and sampling mode of a model."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .. import random, reference


def process_rank() -> int:
    """Rank of this process: of the process group, else of the launcher's RANK, else 0."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank()
    return int(os.environ.get("RANK", "0"))


class NoiseState:
    """Noise key and sampling mode of one model; every adapted layer refers to the same object.

    The key lies on each device where adapted layers run. A new key is a new tensor, so that forward
    passes whose backward pass is still to come keep theirs. Copies, pickles and device moves of the
    model carry the state along; it is no module, so that `half()` does not touch it.

    Attributes:
        mode: None (training mode samples, eval mode uses the mean unless the configuration says
            otherwise), or what an enclosing `posterior` says: "sample", "mean", "flipout".
        n_samples: draws folded into the batch in mode "sample".
        first_sample: number of the first of them.
        samples_in_eval: whether an adapter has sample_at_inference.
        enabled: False while the adapters are disabled.
        held: True inside `generate`, all passes of which have one key.
        packing_checked, calls_checked, eval_warned: what has been looked at, for warnings that come
            once.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.mode: str | None = None
        self.n_samples = 1
        self.first_sample = 0
        self.samples_in_eval = False
        self.enabled = True
        self.held = False
        self.packing_checked = self.calls_checked = self.eval_warned = False
        # The reference implementation: making a model must not need the compiled ops.
        self.keys = {torch.device("cpu"): reference.fold_in(random.key(seed), process_rank())}

    def key_on(self, device: torch.device) -> Tensor:
        """The key on a device."""
        key = self.keys.get(device)
        if key is None:
            key = next(iter(self.keys.values())).to(device)
            self.keys[device] = key
        return key

    def set_key(self, key: Tensor, devices: set[torch.device]) -> None:
        """Use another key, copied to other devices than its own."""
        self.keys = {device: key.to(device) for device in {key.device, *devices}}

    def make_key(self, make: Callable[[torch.device], Tensor], devices: set[torch.device]) -> None:
        """Use another key, made on each device: a copy would wait for the work there."""
        self.keys = {device: make(device) for device in devices or {torch.device("cpu")}}

    def snapshot(self) -> tuple[Any, ...]:
        """Keys and mode, for `restore`. Keys are replaced, never changed: no copy is needed."""
        return self.keys, self.mode, self.n_samples, self.first_sample

    def restore(self, snapshot: tuple[Any, ...]) -> None:
        """Go back to a snapshot."""
        self.keys, self.mode, self.n_samples, self.first_sample = snapshot

    def advance(self) -> None:
        """Draw a new key from the present one."""
        with normal_tensors():
            self.keys = {device: random.fold_in(key, 0) for device, key in self.keys.items()}


def normal_tensors() -> contextlib.AbstractContextManager[Any]:
    """Inside, new tensors are normal: keys of inference mode cannot be saved for a backward pass."""
    if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():
        return torch.inference_mode(False)
    return contextlib.nullcontext()


@contextlib.contextmanager
def using(state: NoiseState, snapshot: tuple[Any, ...]) -> Iterator[None]:
    """Inside, the state is the one of a snapshot."""
    before = state.snapshot()
    state.restore(snapshot)
    try:
        yield
    finally:
        state.restore(before)
