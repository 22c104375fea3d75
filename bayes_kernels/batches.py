"""Batches of inputs: which tensors have a row for each example, labels, masks, copies and parts.

A batch is a mapping of inputs by name, a tuple or list (inputs, labels), or one tensor. Examples are the
first dimension of its tensors, unless all examples share a tensor.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

LABELS = ("labels", "label")

IGNORED = -100  # the label of a token that does not count

# Inputs of transformers' models that all examples share, whatever their first size is, by their
# largest number of dimensions: (T,), (T,) where it is not (B, T), and (layers, heads).
_SHARED = {
    "cache_position": 1,
    "position_ids": 1,
    "head_mask": 2,
    "decoder_head_mask": 2,
    "cross_attn_head_mask": 2,
}


def is_shared(name: str, value: Tensor) -> bool:
    """Whether an input of this name is known to have no dimension of examples."""
    return value.dim() <= _SHARED.get(name, 0)


def has_rows(name: str, value: object, examples: int) -> bool:
    """Whether an input is a tensor with a row for each example."""
    return isinstance(value, Tensor) and not is_shared(name, value) and len(value) == examples


def need_whole(name: str, value: object, least: int) -> None:
    """A count that the caller has given: an integer, of numpy's too, and no bool.

    Raises:
        ValueError: it is none, or less than `least`; the message begins with `name`.
    """
    whole = hasattr(value, "__index__") and not isinstance(value, (bool, Tensor))
    if not whole or operator.index(value) < least:  # type: ignore[arg-type]
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")


def text_list(name: str, texts: object) -> list[Any]:
    """One text, or several, as a list.

    Raises:
        ValueError: it is none, as a tokenizer's batch, whose names would count as texts; the message begins
            with `name`.
    """
    if isinstance(texts, str):
        return [texts]
    if isinstance(texts, Mapping | bytes) or not isinstance(texts, Iterable):
        raise ValueError(f"{name} must be a text or a list of texts, got {type(texts).__name__}")
    return list(texts)


def need_mapping(batch: object) -> None:
    """Raises ValueError where a batch is no mapping of inputs by name."""
    if not isinstance(batch, Mapping):
        raise ValueError(
            f"batch must be a mapping with tensors of model inputs, got {type(batch).__name__}; "
            "tokenize with return_tensors='pt'"
        )


def _size(batch: Mapping[str, Any]) -> int | None:
    need_mapping(batch)
    for name in ("input_ids", "inputs_embeds", "attention_mask", *batch):
        value = batch.get(name)
        if isinstance(value, Tensor) and not is_shared(name, value):
            return len(value)
    return None


def batch_size(batch: Mapping[str, Any]) -> int:
    """Number of examples in a mapping of inputs.

    Raises:
        ValueError: it has no tensor with rows.
    """
    size = _size(batch)
    if size is None:
        raise ValueError(
            f"batch must be a mapping with tensors of model inputs, got {sorted(batch)}; tokenize "
            "with return_tensors='pt'"
        )
    return size


def is_empty(batch: Any) -> bool:
    """Whether the tensors of a batch that have a row for each example have no row."""
    if isinstance(batch, Mapping):
        named = [(str(name), value) for name, value in batch.items()]
    else:
        named = [("", v) for v in (batch if isinstance(batch, (tuple, list)) else [batch])]
    sizes = [len(v) for name, v in named if isinstance(v, Tensor) and not is_shared(name, v)]
    return bool(sizes) and not any(sizes)


def labels_of(batch: Any) -> Tensor | None:
    """The labels of a batch: "labels" or "label" of a mapping, else the second element.

    Raises:
        ValueError: the labels are no tensor.
    """
    found = None
    if isinstance(batch, Mapping):
        found = next((batch[name] for name in LABELS if batch.get(name) is not None), None)
    elif isinstance(batch, (tuple, list)) and len(batch) > 1:
        found = batch[1]
    if found is not None and not isinstance(found, Tensor):
        raise ValueError(
            f"labels of a batch must be a tensor, got {type(found).__name__}; use torch.tensor(labels)"
        )
    return found


def inputs_of(batch: Mapping[str, Any]) -> dict[str, Any]:
    """A mapping without its labels."""
    return {name: value for name, value in batch.items() if name not in LABELS}


def mask_of(batch: Any) -> Tensor | None:
    """The attention mask (B, T), or (B, K, T) of K sequences for each example; None without one."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask if isinstance(mask, Tensor) and mask.dim() in (2, 3) else None


def _changed(batch: Any, change: Callable[[str, Any], Any]) -> Any:
    """The batch with change(name, value) for each value; the name is "" outside of mappings."""
    if isinstance(batch, Mapping):
        return {name: change(name, value) for name, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return type(batch)(change("", value) for value in batch)
    return change("", batch)


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch with its tensors on a device; mappings become dictionaries."""
    return _changed(batch, lambda _, v: v.to(device) if isinstance(v, Tensor) else v)


def repeated(batch: Any, examples: int, copies: int) -> Any:
    """The batch with copies of its examples: each tensor with a row for each example, repeated.

    Args:
        batch: any batch; values that examples share, and others that are no tensors, stay.
        examples: number of examples in the batch.
        copies: copy c has the rows c * examples to (c + 1) * examples - 1.
    """

    def repeat(name: str, value: Any) -> Any:
        if not has_rows(name, value, examples):
            return value
        return value.repeat(copies, *[1] * (value.dim() - 1))

    return _changed(batch, repeat)


def fold_samples(batch: Mapping[str, Any], n_samples: int) -> dict[str, Any]:
    """Repeat the examples of a batch: the first dimension becomes n_samples copies of the batch.

    Copy s is row block s, which is what `posterior(mode="sample", n_samples=...)` expects. Tensors
    whose first dimension is not that of the batch, or that examples share whatever their size
    (`cache_position`, `head_mask`), and other values, stay as they are.

    Raises:
        ValueError: n_samples is no integer of at least 1.
    """
    need_whole("fold_samples: n_samples", n_samples, 1)
    return repeated(batch, batch_size(batch), n_samples)


def split(batch: Mapping[str, Any], count: int) -> list[Mapping[str, Any]]:
    """At most `count` batches of consecutive examples: slices of what has a row for each of them.

    Parts save memory and nothing else, so a batch stays whole unless all of it is understood. Cut is
    what has as many rows as there are examples; every part gets what examples share: what `is_shared`
    knows by its name, a first size of 1, plain values. A cache, lists, rows of image patches and
    position_ids (4, B, T) are none of these.
    """
    examples = _size(batch) or 0
    if examples < 2 or not _divisible(batch, examples):
        return [batch]
    size = -(-examples // count)

    def part(name: str, start: int) -> Any:
        rows = has_rows(name, batch[name], examples)
        return batch[name][start : start + size] if rows else batch[name]

    return [{name: part(name, start) for name in batch} for start in range(0, examples, size)]


def select(batch: Mapping[str, Any], rows: Tensor) -> Mapping[str, Any] | None:
    """Some examples of a batch, by number; None where not all of it is understood, as for `split`."""
    examples = _size(batch) or 0
    if not _divisible(batch, examples):
        return None
    return {
        name: value[rows.to(value.device)] if has_rows(name, value, examples) else value
        for name, value in batch.items()
    }


def _divisible(batch: Mapping[str, Any], examples: int) -> bool:
    """Whether each input has a row for each example, or is one that examples share."""

    def understood(name: str, value: Any) -> bool:
        if not isinstance(value, Tensor):
            return value is None or isinstance(value, (bool, int, float, str))
        if name == "position_ids" and value.dim() > 2:
            return False
        return is_shared(name, value) or len(value) in (1, examples)

    return all(understood(*item) for item in batch.items())


def as_batches(
    data: Iterable[Any] | Dataset[Any],
    batch_size: int = 16,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    num_workers: int = 0,
) -> Iterable[Mapping[str, Any]]:
    """Batches of a loader, an iterable of batches, or a data set, which is batched in order.

    Args:
        data: a `DataLoader`, another iterable of mappings of tensors, or a data set of examples.
        batch_size: examples of one batch, for a data set.
        collate_fn: makes a batch of a list of examples; None for the loader's default.
        num_workers: processes that make the batches of a data set.

    Raises:
        ValueError: data is one batch.
    """
    if isinstance(data, DataLoader):
        return data
    if isinstance(data, Mapping):
        raise ValueError("data must be batches or a data set, got one batch; pass [batch]")
    rows: Any = data
    if isinstance(data, IterableDataset):
        first = next(iter(data), None)
        if collate_fn is None and (first is None or are_batches([first])):
            return data
    elif not hasattr(rows, "__getitem__") or (collate_fn is None and are_batches(rows)):
        return rows
    return DataLoader(
        rows, batch_size=batch_size, shuffle=False, collate_fn=collate_fn, num_workers=num_workers
    )


def are_batches(data: Sequence[Any]) -> bool:
    """Whether a sequence holds batches (tensors of token ids with two dimensions), not examples."""
    if not len(data) or not isinstance(data[0], Mapping):
        return False
    tensors = [v for v in data[0].values() if isinstance(v, Tensor)]
    return bool(tensors) and max(t.dim() for t in tensors) >= 2


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards every module has its own mode again."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
