"""The layers below the first one in which draws differ, computed once for all draws.

Draws of the weights differ from the first layer on whose adapter is drawn. Whatever a model computes
before it is the same for every draw: with adapters in the upper half of L layers, S draws cost
L / 2 + S L / 2 layers in place of S L.

No table of architectures says where that layer is. Stacks are the outermost `nn.ModuleList`s, and what
is below follows from the order in which a pass calls their layers, which is looked at once for a model. The
first time, a few rows go through the model both ways, and their logits are compared: a model that hands
on more than the outputs of layers, such as keys and values for later layers, is then left as it is.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..batches import fold_samples

_LOG = logging.getLogger(__name__)

Pass = Callable[[Mapping[str, Any]], Tensor]


class LowerLayers(NamedTuple):
    """What of a model all draws share.

    Attributes:
        names: layers below the first one in which draws differ, in the order of a pass; empty where there
            is none, or the model cannot share them.
        first: that first layer; "" where it is not known.
        reason: why `names` is empty; "" where it is not.
        rows: by name of the last lower layer of each stack, which tensors of its output have rows of the
            batch.
    """

    names: tuple[str, ...]
    first: str
    reason: str
    rows: Mapping[str, tuple[bool, ...]]


def _none(reason: str) -> LowerLayers:
    return LowerLayers((), "", reason, {})


class _Reached(Exception):
    """A pass has come to the first layer in which draws differ."""


class _Watch:
    """What calls of layers do in the passes of this thread: by layer, a function of its forward."""

    def __init__(self, calls: Mapping[nn.Module, Callable[..., Any]], replays: bool) -> None:
        self.calls, self.replays = calls, replays


_WATCH: ContextVar[_Watch | None] = ContextVar("bayes_kernels_lower_layers", default=None)
_LOCK = threading.Lock()
# Watched layers: how many contexts watch them, and the forward that the instance had, if it had one.
_WATCHED: dict[nn.Module, tuple[int, Any]] = {}


@contextlib.contextmanager
def _watching(
    calls: Mapping[nn.Module, Callable[..., Any]], replays: bool = False
) -> Iterator[None]:
    """Inside, calls of these layers by this thread go to `calls[layer](forward, *args, **kwargs)`.

    Within another of these, the outer call has the inner one as its forward. Other threads, which may use the
    same model, go on as ever.
    """
    outer = _WATCH.get()
    merged = {} if outer is None else dict(outer.calls)
    for module, call in calls.items():
        merged[module] = (
            functools.partial(_nested, merged[module], call) if module in merged else call
        )
    with _LOCK:
        for module in calls:
            count, own = _WATCHED.get(module, (0, vars(module).get("forward")))
            _WATCHED[module] = count + 1, own
            if count == 0:
                vars(module)["forward"] = _watched(module, module.forward)
    token = _WATCH.set(_Watch(merged, replays))
    try:
        yield
    finally:
        _WATCH.reset(token)
        with _LOCK:
            for module in calls:
                count, own = _WATCHED.pop(module)
                if count > 1:
                    _WATCHED[module] = count - 1, own
                elif own is None:
                    vars(module).pop("forward", None)
                else:
                    vars(module)["forward"] = own


def _nested(
    outer: Callable[..., Any],
    inner: Callable[..., Any],
    forward: Callable[..., Any],
    *args: Any,
    **kwargs: Any,
) -> Any:
    return outer(functools.partial(inner, forward), *args, **kwargs)


def replaying() -> bool:
    """Whether this thread's lower layers give what was kept."""
    watch = _WATCH.get()
    return watch is not None and watch.replays


@contextlib.contextmanager
def unwatched() -> Iterator[None]:
    """Inside, layers run as ever in this thread, whatever watches them."""
    token = _WATCH.set(None)
    try:
        yield
    finally:
        _WATCH.reset(token)


def _watched(module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def watched(*args: Any, **kwargs: Any) -> Any:
        watch = _WATCH.get()
        call = None if watch is None else watch.calls.get(module)
        return forward(*args, **kwargs) if call is None else call(forward, *args, **kwargs)

    return watched


def _layers(model: nn.Module, drawn: set[nn.Module]) -> dict[str, tuple[nn.Module, bool]]:
    """Layers of the outermost stacks, and drawn modules outside of them: (module, whether drawn)."""
    found: dict[str, tuple[nn.Module, bool]] = {}
    seen: set[nn.Module] = set()

    def walk(name: str, module: nn.Module, in_stack: bool) -> None:
        if module in seen:
            return
        seen.add(module)
        if in_stack:
            found[name] = module, any(part in drawn for part in module.modules())
        elif module in drawn:
            found[name] = module, True
        else:
            for part, child in module._modules.items():
                if child is not None:
                    prefix = f"{name}." if name else ""
                    walk(prefix + part, child, isinstance(module, nn.ModuleList))

    walk("", model, False)
    return found


def _refusal(model: nn.Module, inputs: Mapping[str, Any]) -> str:
    """Why a pass of this model must not be cut; "" where it may be."""
    config = getattr(model, "config", None)
    for name in ("output_hidden_states", "output_attentions"):
        if inputs.get(name) or getattr(config, name, False):
            return f"the model is asked for {name}"
    if inputs.get("adapter_names") is not None:
        return "rows have adapters of their own"
    for module in model.modules():
        if module._compiled_call_impl is not None or "_orig_mod" in module._modules:
            return "the model is compiled"
        if any(kind.__name__ in _SHARDED for kind in type(module).__mro__):
            return "the model is sharded"
    return ""


_NOT_SHARED = "predict: every draw computes all layers: %s"
_SHARDED = {"FSDPModule", "FullyShardedDataParallel", "DataParallel"}

# What was found, by what draws differ in and which inputs there were.
_FOUND: weakref.WeakKeyDictionary[nn.Module, dict[Any, LowerLayers]] = weakref.WeakKeyDictionary()


def find_lower_layers(
    model: nn.Module,
    drawn: Sequence[nn.Module],
    inputs: Mapping[str, Any],
    rows: Mapping[str, Any],
    run: Pass,
) -> LowerLayers:
    """The layers of a model that all draws share; found once for a model, its adapters and its inputs' names.

    Args:
        model: the model, in eval mode.
        drawn: the modules in which draws differ.
        inputs: the batch.
        rows: a few rows of it, to try on.
        run: batch -> logits under the mean of the weights.

    Cost: the first time three passes of `rows`, where a layer is below.
    """
    layers = _layers(model, set(drawn))
    if all(differs for _, differs in layers.values()):
        return _none("no layer is without an adapter that draws differ in")
    if reason := _refusal(model, inputs):
        _LOG.info(_NOT_SHARED, reason)
        return _none(reason)
    key = (
        tuple(name for name, (_, differs) in layers.items() if differs),
        tuple(sorted(inputs)),
        getattr(getattr(model, "config", None), "_attn_implementation", None),
    )
    known = _FOUND.setdefault(model, {})
    if key not in known:
        found = _tried(model, layers, rows, run)
        if found.reason:
            _LOG.info(_NOT_SHARED, found.reason)
        known[key] = found
    return known[key]


def _tried(
    model: nn.Module,
    layers: Mapping[str, tuple[nn.Module, bool]],
    rows: Mapping[str, Any],
    run: Pass,
) -> LowerLayers:
    called: list[str] = []

    def note(name: str) -> Callable[..., Any]:
        def call(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            called.append(name)
            return forward(*args, **kwargs)

        return call

    with _watching({module: note(name) for name, (module, _) in layers.items()}):
        expected = run(rows)
    first = next((i for i, name in enumerate(called) if layers[name][1]), 0)
    below = called[:first]
    if not below:
        return _none("the first layer that a pass calls has a drawn adapter")
    if len(set(below)) < len(below) or set(below) & set(called[first:]):
        return _none("a pass calls a layer more than once")
    twice = fold_samples(rows, 2)
    try:  # whatever the model's own code raises where a layer is left out
        one, two = (Shared(model, LowerLayers(tuple(below), called[first], "", {})) for _ in "12")
        two.capture(lambda: run(twice))
        one.capture(lambda: run(rows))  # last: what a layer leaves behind then has too few rows
        found = one.found._replace(rows=_rows_of(one.outputs, two.outputs))
        one.found = found
        with one.replayed(2):
            got = run(twice)
    except Exception as error:
        return _none(f"its layers need more than each other's outputs ({error})")
    got = got.unflatten(0, (2, -1)).double()
    scale = expected.double().abs().nan_to_num().max().clamp_min(1)
    near = torch.finfo(expected.dtype).eps ** 0.5 * scale
    if bool(((got - expected.double()).abs().nan_to_num() > near).any()):
        return _none("its logits are others where layers are left out")
    return found


def _rows_of(one: Mapping[str, Any], two: Mapping[str, Any]) -> Mapping[str, tuple[bool, ...]]:
    """Which tensors of the outputs for one and for two copies of a batch have its rows.

    Raises:
        ValueError: a tensor has neither the same size nor twice the rows.
    """
    found = {}
    for name, output in one.items():
        pairs = list(zip(_tensors(output), _tensors(two[name]), strict=True))
        for a, b in pairs:
            if a.shape != b.shape and (a.dim() == 0 or (2 * len(a), *a.shape[1:]) != b.shape):
                raise ValueError(f"{name} gives {tuple(a.shape)}, of two copies {tuple(b.shape)}")
        found[name] = tuple(a.shape != b.shape for a, b in pairs)
    return found


def _tensors(output: Any) -> list[Tensor]:
    """The tensors in a layer's output, in order.

    Raises:
        TypeError: it has something else than tensors, None and plain values in tuples.
    """
    if isinstance(output, Tensor):
        return [output]
    if type(output) in (tuple, list):
        return [t for part in output for t in _tensors(part)]
    if output is None or isinstance(output, (bool, int, float, str)):
        return []
    raise TypeError(f"a layer gives {type(output).__name__}")


def _repeated(output: Any, rows: Iterator[bool], copies: int) -> Any:
    """New copies of a layer's output, which later layers may change in place."""
    if isinstance(output, Tensor):
        more = copies if next(rows) else 1
        return output.repeat(more, *[1] * (output.dim() - 1)) if output.dim() else output.clone()
    if type(output) in (tuple, list):
        return type(output)([_repeated(part, rows, copies) for part in output])
    return output


def _selected(output: Any, flags: Iterator[bool], rows: Tensor, examples: int) -> Any:
    """Rows of some examples; an example may have several, as in multiple choice."""
    if isinstance(output, Tensor):
        if not next(flags):
            return output
        return output.unflatten(0, (examples, -1))[rows.to(output.device)].flatten(0, 1)
    if type(output) in (tuple, list):
        return type(output)([_selected(part, flags, rows, examples) for part in output])
    return output


class Shared:
    """The outputs of a model's lower layers for one batch.

    Args:
        model: the model.
        found: which layers.
    """

    def __init__(self, model: nn.Module, found: LowerLayers) -> None:
        self.found = found
        self.modules = {name: model.get_submodule(name) for name in found.names}
        self.first = model.get_submodule(found.first)
        # Nothing but the last layer of a stack enters what comes after it.
        self.last = {name.rpartition(".")[0]: name for name in found.names}
        self.outputs: dict[str, Any] = {}

    def capture(self, run: Callable[[], object]) -> None:
        """Keep what the lower layers give in a pass, which ends where draws begin to differ."""

        def keep(name: str) -> Callable[..., Any]:
            def call(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
                self.outputs[name] = output = forward(*args, **kwargs)
                return output

            return call

        def stop(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            raise _Reached

        calls = {self.modules[name]: keep(name) for name in self.last.values()}
        with contextlib.suppress(_Reached), _watching({**calls, self.first: stop}):
            run()

    def select(self, rows: Tensor, examples: int) -> Shared:
        """Of some of the `examples` of the batch, by number."""
        other = copy.copy(self)
        other.outputs = {
            name: _selected(output, iter(self.found.rows[name]), rows, examples)
            for name, output in self.outputs.items()
        }
        return other

    @contextlib.contextmanager
    def replayed(self, copies: int) -> Iterator[None]:
        """Inside, lower layers give what was kept, on copies of the batch, and compute nothing."""

        def copied(name: str) -> Any:
            return _repeated(self.outputs[name], iter(self.found.rows[name]), copies)

        # What other layers than the last give is overwritten: any value of that form does.
        others = {name: copied(name) for name in self.last.values()}

        def give(name: str) -> Callable[..., Any]:
            last = self.last[name.rpartition(".")[0]]
            return lambda forward, *args, **kwargs: copied(name) if name == last else others[last]

        calls = {module: give(name) for name, module in self.modules.items()}
        with _watching(calls, replays=True):
            yield
