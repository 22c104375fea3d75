"""Make an adapter that exists Bayesian: one entry for all methods that need no training."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..batches import as_batches, batch_size, is_empty, labels_of, select
from ..table import shorten
from .layers import check_whole
from .method import METHODS, ConversionReport, default_options
from .scale import compare_draws

# Examples that are kept back to compare mean and draws on, at most; and of how many some are.
_CHECKING = 200
_FEW = 40


def bayesianize(
    model: nn.Module,
    method: str,
    data: Iterable[Any] | Dataset[Any] | None = None,
    **options: Any,
) -> ConversionReport:
    """Make the adapter of a PEFT model Bayesian, in place, without training it.

    Args:
        model: a PeftModel with one adapter: plain LoRA, or a Bayesian one, of which the mean stays.
        method: "tfb"; "laplace", Laplace-LoRA of all weights that were trained; "laplace-last", of the
            last layer only.
        data: examples to look at, as `predict_dataset` takes them: the anchors ("tfb"), or all
            training examples ("laplace").
        options: options of the method, as `bayes_kernels.hf.methods.tfb.tfb_` and
            `bayes_kernels.hf.methods.laplace.laplace_` take them. With `validation`, held-out examples
            with class labels, mean and draws are compared in the end (`compare_draws`: 1 + n_samples
            passes, of a Laplace posterior one), and a warning says where the draws raise the NLL by
            more than chance. Where the method chooses the width of the posterior on these examples,
            as both do unless told otherwise, at most 200 of them, every second or k-th one, are kept
            back for the comparison: what has chosen cannot check. Of fewer than 40 all choose and all
            check, which is too kind, and the warning says so.

    Returns:
        The method's report, whose `str` is one line: `TfbReport` or `LaplaceLoraReport`.

    Raises:
        ValueError: the method or an option is unknown, there is no data, FSDP2 has sharded the adapter (see
            `save_sharded`), or as the method's function.

    Example:
        model = PeftModel.from_pretrained(base, "my-lora")
        print(bayesianize(model, "tfb", data=loader))
        model.save_pretrained("my-lora-tfb")

        print(bayesianize(model, "laplace", data=train_loader))
        predict(model, batch, n_samples=1000).mutual_information
        model.save_pretrained("my-lora")  # stock PEFT
        save_laplace(model, "my-lora")
    """
    conversions = {name: row.conversion for name, row in METHODS.items() if row.conversion}
    found = conversions.get(method)
    if found is None:
        raise ValueError(
            f"bayesianize: method must be one of {tuple(conversions)}, got {method!r}; choose one"
        )
    check_whole("bayesianize", model)
    if data is None:
        raise ValueError(f"bayesianize: data must be {found.data}, got none; pass a loader")
    for name, value in found.fixed.items():
        if name in options:
            raise ValueError(
                f"bayesianize: {name} must not be given for method {method!r}, where it is {value!r}, "
                f"got {options[name]!r}; leave it out"
            )
    known = sorted(default_options(found.convert).keys() - found.fixed.keys())
    for name, value in options.items():
        if name in inspect.signature(found.convert).parameters and name not in known:
            raise ValueError(
                f"bayesianize: {name} must not be given for method {method!r}, where data has "
                f"{found.data}, got {shorten(repr(value))}; give so many examples as data"
            )
        if name not in known:
            raise ValueError(
                f"bayesianize: options of method {method!r} must be some of {', '.join(known)}, got {name}; "
                "leave it out"
            )
    validation = options.get("validation")
    if validation is None:
        return found.convert(model, data, **found.fixed, **options)
    batches = list(as_batches(validation, options.get("batch_size", 16), options.get("collate_fn")))
    of_classes = all(isinstance(one, Tensor) and one.dim() == 1 for one in map(labels_of, batches))
    choosing, checking = batches, batches
    if of_classes and found.chooses(options):
        choosing, checking = _parts(batches)
    report = found.convert(model, data, **found.fixed, **{**options, "validation": choosing})
    if not of_classes:
        return report  # tokens, which `compare_draws` does not take
    names = ("n_samples", "seed", "draws", "scope", "choices", "progress")
    law = {name: options[name] for name in names if name in options}
    said = compare_draws(model, checking, **{"n_samples": METHODS[method].n_samples, **law})
    if said.harmful:
        same = found.chooses(options) and checking is choosing
        kind = ", and these chose the posterior's width" if same else ""
        warnings.warn(
            f"bayesianize: {said}{kind}; predict with n_samples=0, which is the mean, or see fit_scale_",
            stacklevel=2,
        )
    return report


def _parts(batches: list[Any]) -> tuple[list[Any], list[Any]]:
    """Examples that choose, and others that check; all of them twice where there are few.

    They take turns, as files may be sorted by class.
    """
    sizes = [0 if is_empty(batch) else batch_size(batch) for batch in batches]
    apart = max(2, -(-sum(sizes) // _CHECKING))
    choosing: list[Any] = []
    checking: list[Any] = []
    start = 0
    for batch, size in zip(batches, sizes, strict=True):
        checks = torch.arange(start, start + size) % apart == apart - 1
        start += size
        for part, rows in ((choosing, ~checks), (checking, checks)):
            if rows.any():
                part.append(select(batch, rows.nonzero()[:, 0]))
    if sum(sizes) < _FEW or any(batch is None for batch in (*choosing, *checking)):
        return batches, batches
    return choosing, checking
