"""Make an adapter that exists Bayesian: one entry for all methods that need no training."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import nn

from .methods.laplace import check_laplace_model, check_laplace_options, laplace_
from .methods.tfb import check_layers, check_options, tfb_


class ConversionReport(Protocol):
    """What every conversion says about itself; its `str` is one line."""

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, words, lists and dictionaries; without times, which differ by run."""

    def table(self) -> tuple[str, tuple[str, ...], list[tuple[str, ...]]]:
        """Title, headings and rows, for people."""


@dataclass(frozen=True)
class Conversion:
    """A method that converts a trained adapter.

    Attributes:
        convert: (model, data, **options) -> report.
        check: (**options): raises where an option is unknown or out of range.
        check_model: (model, **options): raises where a model, trained or not, cannot be converted so.
        examples: training examples that commands give it; None for all.
        n_samples: draws where commands are told no number.
        data: what the examples are called in messages.
        fixed: options that the method's name stands for.
    """

    convert: Callable[..., ConversionReport]
    check: Callable[..., None]
    check_model: Callable[..., None]
    examples: int | None
    n_samples: int
    data: str
    fixed: Mapping[str, Any] = field(default_factory=dict)

    def options(self) -> list[str]:
        """Names of its options."""
        found = inspect.signature(self.convert).parameters.values()
        return [p.name for p in found if p.kind is p.KEYWORD_ONLY and p.name not in self.fixed]


def _check_tfb_model(model: Any, layers: Sequence[str] | None = None, **others: Any) -> None:
    check_layers(model, layers)


CONVERSIONS = {
    "tfb": Conversion(tfb_, check_options, _check_tfb_model, 500, 10, "the anchor examples"),
    "laplace": Conversion(
        laplace_, check_laplace_options, check_laplace_model, None, 1000, "the training examples"
    ),
    "laplace-last": Conversion(
        laplace_,
        check_laplace_options,
        check_laplace_model,
        None,
        1000,
        "the training examples",
        {"layers": "last"},
    ),
}


def bayesianize(
    model: nn.Module, method: str, data: Any = None, **options: Any
) -> ConversionReport:
    """Make the adapter of a PEFT model Bayesian, in place, without training it.

    Args:
        model: a PeftModel with one adapter: plain LoRA, or a Bayesian one, of which the mean stays.
        method: "tfb"; "laplace", Laplace-LoRA with all weights that were trained; "laplace-last",
            with those of the last layer only.
        data: examples to look at, as `predict_dataset` takes them: the anchors ("tfb"), or all
            training examples ("laplace").
        options: those of the method, as `bayes_kernels.hf.methods.tfb.tfb_` and
            `bayes_kernels.hf.methods.laplace.laplace_` take them.

    Returns:
        The method's report, whose `str` is one line: `TfbReport` or `LaplaceLoraReport`.

    Raises:
        ValueError: the method is unknown, there is no data, or as the method's function.

    Example:
        model = PeftModel.from_pretrained(base, "my-lora")
        print(bayesianize(model, "tfb", data=loader))
        model.save_pretrained("my-lora-tfb")

        print(bayesianize(model, "laplace", data=train_loader))
        predict(model, batch, n_samples=1000).mutual_information
        model.save_pretrained("my-lora")  # stock PEFT
        save_laplace(model, "my-lora")
    """
    if method not in CONVERSIONS:
        raise ValueError(
            f"bayesianize: method must be one of {tuple(CONVERSIONS)}, got {method!r}; choose one"
        )
    found = CONVERSIONS[method]
    if data is None:
        raise ValueError(f"bayesianize: data must be {found.data}, got none; pass a loader")
    for name in found.fixed:
        if name in options:
            raise ValueError(
                f"bayesianize: {name} must not be given for method {method!r}, got {options[name]!r}; "
                "use method 'laplace'"
            )
    return found.convert(model, data, **found.fixed, **options)
