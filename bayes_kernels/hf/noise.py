"""Which weights the forward passes of a model use: mode, noise key, draw of each row of the batch."""

from __future__ import annotations

import contextlib
import copy
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import random, reference

KINDS = ("antithetic", "independent", "shared")
DRAW_SCOPES = ("example", "token")


def process_rank() -> int:
    """Rank of this process: of the process group, else of the launcher's RANK, else 0."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank()
    return int(os.environ.get("RANK", "0"))


class Draws(NamedTuple):
    """The draws in a batch, on one device.

    Attributes:
        ids: (N,), number of the draw of each row of the inputs.
        numbers: (D,), the different ones among them.
        places: (N,), where each row's number is in `numbers`; None where all differ, in the order of `ids`.
    """

    ids: Tensor
    numbers: Tensor
    places: Tensor | None

    def to(self, device: torch.device) -> Draws:
        """The same on another device."""
        ids, numbers = (part.to(device, non_blocking=True) for part in (self.ids, self.numbers))
        places = self.places
        return Draws(
            ids, numbers, places if places is None else places.to(device, non_blocking=True)
        )

    @classmethod
    def successive(cls, first: int, count: int, device: torch.device) -> Draws:
        """Draws first, first + 1, ..., made on the device: a copy would wait for the work there."""
        ids = torch.arange(count, device=device) + first
        return cls(ids, ids, None)

    @classmethod
    def of(cls, numbers: Sequence[int]) -> Draws:
        """The draw of each row, on the CPU."""
        ids = torch.tensor(numbers, dtype=torch.int64)
        different, places = ids.unique(return_inverse=True)
        return cls(ids, ids, None) if len(different) == len(ids) else cls(ids, different, places)


class Pass:
    """What the forward passes inside one context use. Layers and hooks read it, and never share it.

    Attributes:
        mode: "sample", "mean" or "flipout", as `posterior` says; None: training mode samples, eval mode
            uses the mean unless the configuration says otherwise.
        keys: the noise key, on each device. A new key is a new tensor in a new dictionary, so that
            forward passes whose backward pass is still to come keep theirs.
        draws: the draw of each row in mode "sample", on each device.
        kind: how draws of a Gaussian factor hang together: "antithetic", "independent" or "shared".
        scope: "example": the weights of a draw are the same for all tokens; "token": they are not.
        keys_of_draws: the key of each row's draw with scope "token", on each device.
        held: True inside `generate`, all passes of which have one key.
        kept: what layers keep from pass to pass, for `remembered`.
    """

    def __init__(
        self,
        mode: str | None,
        keys: dict[torch.device, Tensor],
        draws: dict[torch.device, Draws],
        kind: str = "antithetic",
        scope: str = "example",
    ) -> None:
        self.mode, self.keys, self.draws = mode, keys, draws
        self.kind, self.scope = kind, scope
        self.keys_of_draws: dict[torch.device, list[Tensor]] = {}
        self.held = False
        self.kept: dict[object, tuple[tuple[Tensor, ...], tuple[int, ...], Tensor]] = {}

    def remembered(
        self, owner: object, made_of: tuple[Tensor, ...], make: Callable[[], Tensor]
    ) -> Tensor:
        """What `owner` has made of these tensors, as long as they are the same and unchanged.

        All owners keep at most 64 MiB, or the MiB that BAYES_KERNELS_KEPT_DRAWS says.
        """
        if any(t.is_inference() for t in made_of):
            return make()  # whether these change is not known
        versions = tuple(t._version for t in made_of)
        tensors, before, value = self.kept.get(owner, ((), (), None))
        same = before == versions and all(a is b for a, b in zip(tensors, made_of, strict=True))
        if value is not None and same:
            return value
        self.kept.pop(owner, None)
        value = make()
        others = list(self.kept.values())  # at once: threads may share a pass
        size = value.nbytes + sum(other.nbytes for _, _, other in others)
        if size <= _kept_bytes():
            self.kept[owner] = made_of, versions, value
        return value

    def of_rows(self, rows: Sequence[int], total: int) -> Pass:
        """The same for some rows of a batch: each keeps its draw.

        Args:
            rows: their places.
            total: rows of the whole batch.

        Raises:
            ValueError: the batch is no multiple of the draws, or draws have noise for each token, which goes
                by the place in the batch.
        """
        other = copy.copy(self)
        other.kept = {}
        if self.mode != "sample":
            return other
        ids = next(iter(self.draws.values())).ids.tolist()
        if total % len(ids) or self.scope == "token":
            raise ValueError(
                f"posterior: adapter_names needs scope='example' and a batch of {len(ids)} rows, a draw "
                f"each, or a multiple, got scope={self.scope!r} and {total} rows"
            )
        each = total // len(ids)
        other.draws = {torch.device("cpu"): Draws.of([ids[row // each] for row in rows])}
        return other

    def draws_on(self, device: torch.device) -> Draws:
        """The draws on a device."""
        found = self.draws.get(device)
        if found is None:
            found = next(iter(self.draws.values())).to(device)
            self.draws[device] = found
        return found


class _Entered:
    """A context that was entered: of which model, with what, and whether it has not ended yet."""

    def __init__(self, state: NoiseState, chosen: Pass) -> None:
        self.state, self.chosen, self.open = state, chosen, True


def _kept_bytes() -> int:
    """The limit that the CPU library has for the numbers that it keeps."""
    text = os.environ.get("BAYES_KERNELS_KEPT_DRAWS", "")
    return (int(text) if text.isdecimal() else 64) << 20


# Innermost last. Threads start with an empty one, and tasks of asyncio with a copy.
_ENTERED: ContextVar[tuple[_Entered, ...]] = ContextVar("bayes_kernels", default=())


class _Traced(threading.local):
    """The innermost `Pass` of this thread, where compiled code finds it: it reads no ContextVar."""

    def __init__(
        self,
    ) -> None:  # once in each thread; torch 2.11 does not see past a default of the class
        self.current: Pass | None = None


class NoiseState:
    """Noise of one model; every adapted layer refers to the same object.

    What `posterior` chooses lies in a context variable, so that threads and tasks of asyncio do not see
    each other's; the model itself has the key of training. Compiled code reads a copy that each thread
    has: where tasks of one thread take turns, call a model that is compiled as a whole without an
    `await` between entering `posterior` and the call.

    The key lies on each device where adapted layers run. Copies, pickles and device moves of the
    model carry the state along; it is no module, so that `half()` does not touch it.

    Attributes:
        own: what passes outside of every context use.
        latest: of the latest pass that a backward pass may follow. A backward pass that computes it again
            may run in a thread of autograd, which has no context.
        devices: where layers need the key, as far as is known; None before anyone has looked.
        samples_in_eval: whether an adapter has sample_at_inference.
        enabled: False while the adapters are disabled.
        packing_checked, calls_checked, eval_warned: what has been looked at, for warnings that come
            once.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.devices: set[torch.device] | None = None
        self.samples_in_eval = False
        self.enabled = True
        self.packing_checked = self.calls_checked = self.eval_warned = False
        cpu = torch.device("cpu")
        # The reference implementation: making a model must not need the compiled ops.
        keys = {cpu: reference.fold_in(random.key(seed), process_rank())}
        self.own = Pass(None, keys, {cpu: Draws.successive(0, 1, cpu)})
        self._in_this_process()

    def _in_this_process(self) -> None:
        self.latest: Pass | None = None
        self._traced = _Traced()

    def __getstate__(self) -> dict[str, Any]:
        kept = {k: v for k, v in self.__dict__.items() if k not in ("latest", "_traced")}
        own = copy.copy(self.own)
        own.kept = {}
        return {**kept, "own": own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._in_this_process()

    def current(self) -> Pass:
        """What a pass uses that is made here and now."""
        if torch.compiler.is_compiling():
            traced = self._traced.current
            return self.own if traced is None else traced
        found = self._innermost()
        if found is not None:
            return found
        if self.latest is not None and torch._C._current_graph_task_id() != -1:
            return self.latest
        return self.own

    def _innermost(self) -> Pass | None:
        for entered in reversed(_ENTERED.get()):
            if entered.state is self and entered.open:
                return entered.chosen
        return None

    def follow(self) -> None:
        """Let compiled code of this thread use what the context variable says here and now."""
        self._traced.current = self._innermost()

    def remember(self) -> Pass:
        """`current`, kept for a backward pass that computes the pass again."""
        chosen = self.current()
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self.latest = chosen
        return chosen

    @property
    def mode(self) -> str | None:
        """That of the present context."""
        return self.current().mode

    @property
    def held(self) -> bool:
        """Whether the present context is a `generate`."""
        return self.current().held

    @property
    def keys(self) -> dict[torch.device, Tensor]:
        """Those of the present context."""
        return self.current().keys

    @keys.setter
    def keys(self, keys: dict[torch.device, Tensor]) -> None:
        self.current().keys = keys

    def key_on(self, device: torch.device) -> Tensor:
        """The key on a device."""
        keys = self.keys
        key = keys.get(device)
        if key is None:
            key = next(iter(keys.values())).to(device)
            keys[device] = key
            self.devices = {*(self.devices or ()), device}
        return key

    def set_key(self, key: Tensor, devices: set[torch.device]) -> None:
        """Use another key, copied to other devices than its own."""
        self.keys = {device: key.to(device) for device in {key.device, *devices}}

    def snapshot(self) -> Pass:
        """What passes use here and now, for `using`: later keys do not change it."""
        found = copy.copy(self.current())
        found.kept = {}
        return found

    def advance(self) -> None:
        """Draw a new key from the present one."""
        with normal_tensors():
            self.keys = {device: random.fold_in(key, 0) for device, key in self.keys.items()}


def made_on(make: Callable[[torch.device], Any], devices: set[torch.device]) -> dict[Any, Any]:
    """make(device) for each device; for the CPU where there is none."""
    return {device: make(device) for device in devices or {torch.device("cpu")}}


def normal_tensors() -> contextlib.AbstractContextManager[Any]:
    """Inside, new tensors are normal: keys of inference mode cannot be saved for a backward pass."""
    if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():
        return torch.inference_mode(False)
    return contextlib.nullcontext()


@contextlib.contextmanager
def using(state: NoiseState, chosen: Pass) -> Iterator[None]:
    """Inside, passes of the state's model use `chosen`."""
    entered = _Entered(state, chosen)
    _ENTERED.set((*_ENTERED.get(), entered))
    state.follow()
    try:
        yield
    finally:
        # A generator may be taken up, and end, in another context than it began in.
        entered.open = False
        chosen.kept.clear()
        _ENTERED.set(tuple(other for other in _ENTERED.get() if other.open))
        state.follow()
