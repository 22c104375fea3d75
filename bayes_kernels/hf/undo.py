"""Restoring a model when a change of it is stopped."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from peft.tuners.lora import LoraLayer
from torch import nn


@contextlib.contextmanager
def as_before_if_stopped(model: nn.Module, *, merges: bool = False) -> Iterator[None]:
    """Restore a model if the context ends with an exception, Ctrl-C included.

    Restored are the modules and their places, classes, attributes and hooks, which tensors the
    parameters have, and which of them are trained. A tensor that is changed in place keeps the change.

    Args:
        model: the model; it must not be moved to another device inside.
        merges: adapters are merged inside. Instead of holding a second copy of the weights, those that
            were merged are then unmerged again, which restores the weights up to rounding.
    """
    modules = [(module, type(module), dict(vars(module))) for module in model.modules()]
    values = [value for _, _, own in modules for value in own.values()]
    filled = [(value, value.copy()) for value in values if isinstance(value, (dict, list, set))]
    trained = [(p, p.requires_grad, None if merges else p.data) for p in model.parameters()]
    layers: list[Any] = [module for module, _, _ in modules if isinstance(module, LoraLayer)]
    merged = [(layer, list(layer.merged_adapters)) for layer in layers if merges]
    try:
        yield
    except BaseException:
        for layer, names in merged:
            if layer.merged_adapters != names:
                layer.unmerge()
                if names:
                    layer.merge(adapter_names=names)
        for module, kind, own in modules:
            module.__class__ = kind
            for name in vars(module).keys() - own.keys():
                del vars(module)[name]
            vars(module).update(own)
        for value, content in filled:
            value.clear()
            value.extend(content) if isinstance(value, list) else value.update(content)
        for parameter, needs_grad, data in trained:
            parameter.requires_grad_(needs_grad)
            if data is not None:
                parameter.data = data
        raise
