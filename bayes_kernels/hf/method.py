"""What a method is to commands and checks, and the table of all methods."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from peft import LoraConfig


@dataclass(frozen=True)
class Method:
    """One way to fine-tune: a row of the table that every command and check reads.

    Attributes:
        name: word for it in configurations and on the command line.
        title: what tables of results call it.
        config: class of the PEFT configuration.
        bayesian: whether it has a posterior to draw from.
        made: "train": an adapter of its own type is trained; "convert": plain LoRA is trained, and
            `bayes_kernels.hf.bayesianize` makes the adapter Bayesian afterwards; "join": plain LoRA
            of several seeds, which predict together.
        n_samples: posterior draws of a prediction, where nothing else is asked for; of an ensemble
            its members.
        lr: peak learning rate, likewise.
        dropout: dropout before the adapter, likewise.
        options: fields of `BayesLoraConfig` that recipes and the command line set for it.
    """

    name: str
    title: str
    config: type[LoraConfig]
    bayesian: bool = True
    made: str = "train"
    n_samples: int = 10
    lr: float = 1e-3
    dropout: float = 0.0
    options: tuple[str, ...] = ()

    @property
    def plain(self) -> bool:
        """Whether what is trained is an adapter of stock PEFT."""
        return self.config is LoraConfig


def default_options(function: Callable[..., Any]) -> dict[str, Any]:
    """Keyword-only arguments of a function with their defaults."""
    found = inspect.signature(function).parameters.values()
    return {option.name: option.default for option in found if option.kind is option.KEYWORD_ONLY}


# By name, in the order of listings. `bayes_kernels.hf` fills it: `methods/table.py` has a row for each.
METHODS: dict[str, Method] = {}


def register(method: Method) -> Method:
    """Enter a method into the table.

    Raises:
        ValueError: the name is taken.
    """
    if method.name in METHODS:
        raise ValueError(f"register: the method {method.name!r} must be new, got it twice")
    METHODS[method.name] = method
    return method
