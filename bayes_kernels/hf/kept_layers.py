"""Frozen layers below the first trained one, computed once for each text and kept between passes.

Where adapters sit in the upper layers, what a text gives below them is the same in every epoch, in every
evaluation and under every draw. Its real tokens alone are kept, and padded anew for each batch.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..batches import LABELS, batch_size, eval_mode, need_whole, split
from .layers import bayes_variants
from .lower_layers import Shared, find_lower_layers, replaying, unwatched
from .posterior import posterior

_OP = "keep_lower_layers"
# Arguments of a pass that concern what comes after its layers.
_AFTER = (*LABELS, "num_items_in_batch", "logits_to_keep", "return_dict", "use_cache")
_SLOT = object()
# Columns of padding that the first pass is tried with.
_MORE = 3


class _Text(NamedTuple):
    """A row of a batch: what says which text it is, and where padding behind it begins."""

    key: tuple[Any, ...]
    stop: int


class KeptLayers:
    """What the frozen lower layers of a model give for each text, kept for the passes inside of `with`.

        kept = KeptLayers(model, max_bytes=2**30)
        with kept:
            trainer.train()
            predict(model, batch, n_samples=10)
        print(kept.layers, kept.found, kept.computed, kept.bytes)

    Kept is the output (L, D) of the last layer below the first one with an adapter or a trained weight, up
    to the last of the L tokens that the attention mask shows. Positions of padding behind get zeros in its
    place, which neither attention nor losses look at. A text is known by its tokens and its other inputs,
    padding before it included, which moves positions. Numbers are those of a pass of all layers up to
    rounding, since batches are padded to other sizes when a text is first seen. Noise and dropout of the
    upper layers stay the same.

    The first pass tries it: the lower layers must draw no random number in training, and some rows must
    give the same logits when their lower layers were computed without padding. Weights of the lower layers
    that change in place empty the memory.

    Args:
        model: a PeftModel of an encoder or a decoder, whole on one device.
        max_bytes: the most that is kept, at L D numbers a text in the dtype of the layers, beside its
            tokens, on the device of the model. What comes after that is computed in each pass; nothing is
            given up, since of texts that come in turn the oldest is the one that comes next.

    Attributes:
        layers: number of layers below; 0 before the first pass.
        found, computed: rows of passes that were found, and that were computed.
        bytes: what is kept.

    Raises:
        ValueError: max_bytes is no integer of at least 1. From `check`, which the first pass inside calls:
            the lower layers have dropout or trained weights, gradient checkpointing is on, the model hands
            on more than hidden states or looks at padding, or inputs are not rows of tokens. Passes in eval
            mode with other inputs, such as a KV cache, compute all layers.

    Cost: the first time seven passes of half a batch; looking up reads the tokens on the host.
    """

    def __init__(self, model: nn.Module, max_bytes: int) -> None:
        need_whole(f"{_OP}: max_bytes", max_bytes, 1)
        self.model, self.max_bytes = model, int(max_bytes)
        self.layers = self.found = self.computed = self.bytes = 0
        self._texts: dict[tuple[Any, ...], list[Tensor]] = {}
        self._shared: Shared | None = None
        self._form: Any = None  # of the last layer's output, with slots for tensors
        self._weights: list[tuple[int, int]] = []
        self._lock = threading.RLock()
        self._inside = 0
        self._own: Any = None

    @property
    def texts(self) -> int:
        """Number of texts that are kept."""
        return len(self._texts)

    def __enter__(self) -> KeptLayers:
        with self._lock:
            self._inside += 1
            if self._inside == 1:
                self._own = vars(self.model).get("forward")
                vars(self.model)["forward"] = self._watched(self.model.forward)
        return self

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                if self._own is None:
                    vars(self.model).pop("forward", None)
                else:
                    vars(self.model)["forward"] = self._own

    def check(self, inputs: Mapping[str, Any]) -> None:
        """What the first pass does: whether the model's lower layers can be kept, on a batch.

        Raises:
            ValueError: as the class.
        """
        problem = _problem(inputs)
        if problem:
            raise ValueError(f"{_OP}: {problem}; leave it out")
        with self._lock:
            self._try(self.model.forward, inputs)

    def _watched(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)  # trainers look at its arguments
        def call(*args: Any, **kwargs: Any) -> Any:
            if replaying():  # all draws of `predict` have what their first pass found
                return forward(*args, **kwargs)
            problem = "inputs are given by place" if args else _problem(kwargs)
            if problem:
                if self.model.training:
                    raise ValueError(f"{_OP}: {problem}; leave it out")
                return forward(*args, **kwargs)
            with self._lock:
                with unwatched():  # `predict` may be looking at the same layers
                    if self._shared is None:
                        self._try(forward, kwargs)
                    replay = self._filled(forward, kwargs)
            with replay.replayed(1):
                return forward(**kwargs)

        return call

    def _filled(self, forward: Callable[..., Any], kwargs: Mapping[str, Any]) -> Shared:
        """The lower layers' outputs for a batch, from what is kept and what is computed now."""
        assert self._shared is not None
        weights = self._versions()
        if weights != self._weights:
            self._weights, self.bytes = weights, 0
            self._texts.clear()
        texts = _texts_of(kwargs)
        new: dict[tuple[Any, ...], tuple[int, _Text]] = {}
        for row, text in enumerate(texts):
            if text.key not in self._texts:
                new.setdefault(text.key, (row, text))
        self.found += len(texts) - len(new)
        self.computed += len(new)
        fresh = {}
        if new:
            rows = torch.tensor([row for row, _ in new.values()])
            width = max(text.stop for _, text in new.values())
            parts = self._compute(forward, _cut(kwargs, rows, width))
            for row, (key, (_, text)) in enumerate(new.items()):
                fresh[key] = [t[row, : text.stop] for t in parts]
        tensors = []
        width = kwargs["input_ids"].shape[1]
        for i in range(_slots(self._form)):
            whole: Tensor | None = None
            for row, text in enumerate(texts):
                part = (self._texts.get(text.key) or fresh[text.key])[i]
                if whole is None:
                    whole = part.new_zeros(len(texts), width, *part.shape[1:])
                whole[row, : text.stop] = part
            assert whole is not None
            tensors.append(whole)
        for key, parts in fresh.items():
            size = sum(t.numel() * t.element_size() for t in parts) + _size_of(key)
            if self.bytes + size <= self.max_bytes:
                self._texts[key] = [t.clone() for t in parts]
                self.bytes += size
        replay = Shared(self.model, self._shared.found)
        (name,) = replay.last.values()
        replay.outputs = {name: _rebuilt(self._form, iter(tensors))}
        return replay

    @torch.no_grad()
    def _compute(self, forward: Callable[..., Any], inputs: Mapping[str, Any]) -> list[Tensor]:
        """The last lower layer's tensors (B, T, ...) for a batch."""
        assert self._shared is not None
        work = Shared(self.model, self._shared.found)
        device = inputs["input_ids"].device
        before = _random_state(device)
        with self._mean():  # a pass of training would draw the next key
            work.capture(lambda: forward(**inputs))
        if self.model.training and not _same(before, _random_state(device)):
            raise ValueError(
                f"{_OP}: the lower layers must draw no random numbers in training, got dropout in them or in "
                "the embeddings; set the base's dropout to 0 (base_dropout of a recipe), or leave it out"
            )
        output = work.outputs[next(iter(work.last.values()))]
        tensors: list[Tensor] = []
        self._form = _form_of(output, tensors)
        shape = inputs["input_ids"].shape
        if not tensors or any(t.dim() < 3 or t.shape[:2] != shape for t in tensors):
            got = [tuple(t.shape) for t in tensors]
            raise ValueError(
                f"{_OP}: lower layers must give hidden states (B, T, D) alone, got {got}; leave it out"
            )
        return tensors

    def _try(self, forward: Callable[..., Any], kwargs: Mapping[str, Any]) -> None:
        """Find the lower layers, and see whether a pass with what was kept is the same.

        Raises:
            ValueError: as the class.
        """
        model = self.model
        drawn = _trained(model)
        for module in model.modules():
            if getattr(module, "gradient_checkpointing", False) and model.training:
                raise ValueError(
                    f"{_OP}: gradient checkpointing must be off, which computes layers again; leave one out"
                )
        few = dict(split(_before(kwargs), -(-batch_size(kwargs) // 2))[0])
        width = kwargs["input_ids"].shape[1]
        if width > 2 * _MORE:  # the model may have no positions for more
            few = _cut(few, torch.arange(batch_size(few)), width - _MORE)

        def run(batch: Mapping[str, Any]) -> Tensor:
            with self._mean():
                outputs = forward(**batch)
            logits = outputs["logits"] if isinstance(outputs, Mapping) else outputs[0]
            mask = batch.get("attention_mask")
            if mask is not None and logits.shape[:2] == mask.shape:
                logits = logits * mask.ne(0)[..., None].to(logits)
            return logits

        with torch.no_grad(), eval_mode(model):
            found = find_lower_layers(model, drawn, few, few, run)
            if not found.names:
                raise ValueError(
                    f"{_OP}: there must be whole layers below the first one with an adapter or a trained "
                    f"weight, got none ({found.reason}); use layers_to_transform, or leave it out"
                )
            shared = Shared(model, found)
            if len(shared.last) != 1 or getattr(model.config, "is_encoder_decoder", False):
                raise ValueError(
                    f"{_OP}: the model must be one stack of layers, an encoder or a decoder, got "
                    f"{len(shared.last)} below; leave it out"
                )
        training = {module: module.training for module in model.modules()}
        self._shared = shared
        try:
            model.train()  # here the first pass may be one of an evaluation
            self._weights = self._versions()
            counts = self.found, self.computed
            self._filled(forward, few)
            more = _padded(few, _MORE)
            with torch.no_grad(), eval_mode(model):
                expected = run(more)
                with self._filled(forward, more).replayed(1):
                    got = run(more)
            self.found, self.computed = counts
            scale = expected.double().abs().max().clamp_min(1)
            near = torch.finfo(expected.dtype).eps ** 0.5 * scale
            if bool(((got - expected).double().abs() > near).any()):
                raise ValueError(
                    f"{_OP}: logits must not depend on how a batch is padded, got others where lower layers "
                    "were computed with less padding; leave it out"
                )
        except BaseException:
            self._shared = None
            raise
        finally:
            for module, mode in training.items():
                module.training = mode
            self._texts.clear()
            self.bytes = 0
        self.layers = len(found.names)

    def _mean(self) -> contextlib.AbstractContextManager[Any]:
        if next(bayes_variants(self.model), None) is None:
            return contextlib.nullcontext()
        return posterior(self.model, "mean")

    def _versions(self) -> list[tuple[int, int]]:
        """What changes when weights that the lower layers use do."""
        assert self._shared is not None
        modules: list[nn.Module] = [*self._shared.modules.values()]
        embeddings = getattr(self.model, "get_input_embeddings", lambda: None)()
        modules += [] if embeddings is None else [embeddings]
        return [(p.data_ptr(), p._version) for module in modules for p in module.parameters()]


def _trained(model: nn.Module) -> list[nn.Module]:
    """Modules with adapters or trained weights of their own."""
    return [
        module
        for module in model.modules()
        if isinstance(module, BaseTunerLayer)
        or any(p is not None and p.requires_grad for p in module._parameters.values())
    ]


def _problem(kwargs: Mapping[str, Any]) -> str:
    """Why a pass cannot have its lower layers from texts; "" where it can."""
    ids = kwargs.get("input_ids")
    if not isinstance(ids, Tensor) or ids.dim() != 2 or not len(ids):
        return "a pass must have input_ids (B, T)"
    for name, value in kwargs.items():
        if name in _AFTER or value is None or isinstance(value, (bool, str)):
            if name in ("output_hidden_states", "output_attentions") and value:
                return f"a pass must not ask for {name}"
            continue
        if not isinstance(value, Tensor) or value.shape != ids.shape:
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            return f"inputs must be rows of tokens (B, T) as input_ids, got {name} {got}"
    return ""


def _before(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that the lower layers see."""
    return {name: value for name, value in kwargs.items() if name not in _AFTER}


def _cut(kwargs: Mapping[str, Any], rows: Tensor, width: int) -> dict[str, Any]:
    """Some rows of the inputs, and their first columns."""
    return {
        name: value[rows.to(value.device), :width] if isinstance(value, Tensor) else value
        for name, value in _before(kwargs).items()
    }


def _padded(inputs: Mapping[str, Any], more: int) -> dict[str, Any]:
    """The inputs with more columns of padding behind; as they are without a mask."""
    if inputs.get("attention_mask") is None:
        return dict(inputs)
    found = dict(inputs)
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            last = value[:, -1:].repeat(1, more)
            found[name] = torch.cat([value, last * 0 if name == "attention_mask" else last], 1)
    return found


def _texts_of(kwargs: Mapping[str, Any]) -> list[_Text]:
    """The text of each row, with its type of arithmetic."""
    ids, mask = kwargs["input_ids"], kwargs.get("attention_mask")
    device = ids.device.type
    cast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    named = sorted(
        (name, value.cpu()) for name, value in _before(kwargs).items() if isinstance(value, Tensor)
    )
    shown = torch.ones_like(ids, device="cpu") if mask is None else mask.ne(0).long().cpu()
    width = ids.shape[1]
    stops = (width - shown.flip(1).argmax(1)).tolist()
    found = []
    for row, stop in enumerate(stops):
        parts = [(name, value[row, :stop].numpy().tobytes()) for name, value in named]
        found.append(_Text((cast, *parts), stop))
    return found


def _size_of(key: tuple[Any, ...]) -> int:
    return sum(len(part[1]) for part in key if isinstance(part, tuple))


def _form_of(output: Any, tensors: list[Tensor]) -> Any:
    """A layer's output with slots for its tensors, which are collected."""
    if isinstance(output, Tensor):
        tensors.append(output)
        return _SLOT
    if type(output) in (tuple, list):
        return type(output)([_form_of(part, tensors) for part in output])
    return output


def _slots(form: Any) -> int:
    if isinstance(form, (tuple, list)):
        return sum(_slots(part) for part in form)
    return int(form is _SLOT)


def _rebuilt(form: Any, tensors: Iterator[Tensor]) -> Any:
    if isinstance(form, (tuple, list)):
        return type(form)([_rebuilt(part, tensors) for part in form])
    return next(tensors) if form is _SLOT else form


def _random_state(device: torch.device) -> Sequence[Tensor]:
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return states


def _same(one: Sequence[Tensor], two: Sequence[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@contextlib.contextmanager
def keeping(kept: KeptLayers | None) -> Iterator[None]:
    """`with kept`, or nothing where there is none."""
    with contextlib.nullcontext() if kept is None else kept:
        yield


__all__ = ["KeptLayers"]
