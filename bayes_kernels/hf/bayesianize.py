"""Make an adapter that exists Bayesian: one entry for all methods that need no training."""

from __future__ import annotations

from typing import Any

from torch import nn

from .tfb import TfbReport, tfb_


def bayesianize(model: nn.Module, method: str, data: Any = None, **options: Any) -> TfbReport:
    """Make the adapter of a PEFT model Bayesian, in place, without training it.

    Args:
        model: a PeftModel with one adapter: plain LoRA, or a Bayesian one, of which the mean stays.
        method: "tfb".
        data: examples to look at, as `predict_dataset` takes them ("tfb": the anchors).
        options: those of the method: "tfb" as `bayes_kernels.hf.tfb.tfb_`.

    Returns:
        The method's report, whose `str` is one line.

    Raises:
        ValueError: the method is unknown, there is no data, or as the method's function.

    Example:
        model = PeftModel.from_pretrained(base, "my-lora")
        print(bayesianize(model, "tfb", data=loader))
        model.save_pretrained("my-lora-tfb")
    """
    if method != "tfb":
        raise ValueError(f"bayesianize: method must be one of ('tfb',), got {method!r}; choose one")
    if data is None:
        raise ValueError("bayesianize: data must be the anchor examples, got none; pass a loader")
    return tfb_(model, data, **options)
