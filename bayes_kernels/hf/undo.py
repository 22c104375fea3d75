"""The way back where a change of a model is stopped."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from peft.tuners.lora import LoraLayer
from torch import nn


@contextlib.contextmanager
def as_before_if_stopped(model: nn.Module, *, merges: bool = False) -> Iterator[None]:
    """Bring a model back if the context ends with an exception, Ctrl-C included.

    Modules and their places, classes, attributes, hooks, which tensors a parameter has and whether it is
    trained. Tensors that are changed in place keep their change: where ``merges`` is true merged adapters
    are taken out again, up to rounding, and no second copy of the weights is held meanwhile.
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
