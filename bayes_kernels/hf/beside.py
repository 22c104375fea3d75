"""Plain LoRA beside Bayesian adapters in one model.

PEFT admits adapters of one type to a `PeftModel`. Here plain LoRA is admitted beside Bayesian adapters, in
any order: its configuration, its layers and its file stay PEFT's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraModel
from peft.utils.peft_types import PeftType

from ._compat import BAYES_LORA
from .config import BayesLoraConfig
from .guards import Guard, install
from .layers import bayes_variants, cast_where_plain, lora_layers
from .model import BayesLoraModel


@contextlib.contextmanager
def admitted(self: PeftModel, peft_config: Any, **_: Any) -> Iterator[None]:
    """Around `PeftModel.add_adapter`: plain LoRA and Bayesian adapters may meet.

    A model of plain LoRA becomes one of Bayesian adapters too, unless the new one is refused.

    Raises:
        ValueError: both adapt parameters, and plain LoRA came first.
    """
    tuner: Any = self.base_model
    own, kind = self.peft_type, type(tuner)
    plain = type(peft_config) is LoraConfig
    bayesian = isinstance(peft_config, BayesLoraConfig)
    if not ((kind is BayesLoraModel and plain) or (kind is LoraModel and bayesian)):
        yield
        return
    # PEFT has wrapped the parameters in layers of its own, which it goes through while ours would be made.
    wrapped = any(
        getattr(config, "target_parameters", None) for config in self.peft_config.values()
    )
    if bayesian and wrapped and peft_config.target_parameters:
        raise ValueError(
            "add_adapter: a Bayesian adapter of target_parameters must come before plain LoRA of "
            "target_parameters, got the reverse; make it first, and load_adapter or add_adapter the plain one"
        )
    tuner.__class__ = BayesLoraModel
    self.peft_type = PeftType.LORA if plain else BAYES_LORA
    try:
        yield
    except BaseException:
        tuner.__class__, self.peft_type = kind, own
        raise
    self.peft_type = BAYES_LORA


def _cast(_: None, model: Any, **_given: Any) -> None:
    """After any way of adding an adapter to a model that has Bayesian ones."""
    if next(bayes_variants(model), None) is not None:
        for _name, layer in lora_layers(model):
            cast_where_plain(layer)


GUARDS: list[Guard] = [
    ("peft.peft_model:PeftModel", "add_adapter", admitted, None),
    ("peft.tuners.lora:LoraModel", "inject_adapter", None, _cast),
]
install(GUARDS)
