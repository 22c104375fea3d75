"""What a model computes around a variational last layer: its features, logits and loss.

The features phi, (B, D), enter the last layer. They come from one forward pass of the model, whatever
the model does around that layer (pooling, choosing the last token). From them follow the loss, in
closed form, and predictions, for which any number of posterior draws costs one pass.

Sources: Harrison, Willes and Snoek, "Variational Bayesian Last Layers", arXiv 2404.11599; Xiang, Li
and Lu, "PoLAR-VBLL", arXiv 2604.03388.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from ..vbll import VBLLClassification
from ..vbll.bounds import counted_labels, jensen_bound
from .heads import MASKED_LOGIT
from .variants import VariationalLoss

_NOT_INPUTS = ("labels", "label", "choice_mask", "num_items_in_batch", "return_dict")


def find_head(model: nn.Module, adapter: str | None = None) -> VBLLClassification | None:
    """The VBLL head of an adapter, by default of the active one; None where there is none."""
    for module in model.modules():
        if not isinstance(module, ModulesToSaveWrapper):
            continue
        names = module.active_adapters if adapter is None else [adapter]
        for name in names:
            if name in module.modules_to_save:
                for part in module.modules_to_save[name].modules():
                    if isinstance(part, VBLLClassification):
                        return part
    return None


def class_features(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """Features phi (B, D) that enter the head for each example: one forward pass, with its graph.

    The head stands aside meanwhile and hands its input on, so that whatever the model does with
    logits (the last token, the pooled position) it does with features.

    Args:
        model: a model with an active VBLL head, wrapped by DDP or not.
        batch: inputs as tensors; labels and `choice_mask` are left out.

    Raises:
        ValueError: the model has no VBLL head, or it is disabled.
    """
    head = need_head(model, "class_features")
    return _instead_of_logits(model, head, batch, lambda features: features, head.in_features)


def _instead_of_logits(
    model: nn.Module,
    head: VBLLClassification,
    batch: Mapping[str, Any],
    forward: Callable[[Tensor], Tensor],
    columns: int,
) -> Tensor:
    """What the model gives where its head computes something else: (B, columns)."""
    inputs = {key: value for key, value in batch.items() if key not in _NOT_INPUTS}
    head.forward = forward  # type: ignore[method-assign, assignment]
    try:
        outputs = model(**inputs)
    finally:
        del head.__dict__["forward"]
    result = outputs["logits"] if isinstance(outputs, Mapping) else outputs[0]
    if result.dim() != 2 or result.shape[1] != columns:
        raise ValueError(
            f"class_features: the model must give one row of {columns} numbers for each example, "
            f"got {tuple(result.shape)}; enable the adapter"
        )
    return result


def class_logits(
    model: nn.Module, batch: Mapping[str, Any], features: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Mean and variance of the class logits (B, C), which are independent Gaussians.

    Classes that `choice_mask` leaves out have mean -10,000 and variance 0.

    Args:
        model, batch: as in `class_features`.
        features: of the batch, where they are known; else one forward pass.

    Raises:
        ValueError: as `class_features`.
    """
    head = need_head(model, "class_logits")
    if features is None and not isinstance(model, nn.parallel.DistributedDataParallel):
        features = class_features(model, batch)
    if features is None:
        # Within the model's own pass, where data parallelism sees that the head is used.
        both = _instead_of_logits(
            model,
            head,
            batch,
            lambda phi: torch.cat(head.logit_distribution(phi), -1),
            2 * head.n_classes,
        )
        mean, variance = both.chunk(2, -1)
    else:
        mean, variance = head.logit_distribution(features)
    mask = batch.get("choice_mask")
    if mask is not None:
        missing = ~mask.to(device=mean.device, dtype=torch.bool)
        mean, variance = mean.masked_fill(missing, MASKED_LOGIT), variance.masked_fill(missing, 0)
    return mean, variance


def need_head(model: nn.Module, op: str) -> VBLLClassification:
    """The active VBLL head.

    Raises:
        ValueError: there is none; the message begins with `op`.
    """
    head = find_head(model)
    if head is None:
        raise ValueError(
            f"{op}: the model must have an active variational last layer, got "
            f"{type(model).__name__} without; make one with "
            "get_peft_model(model, PolarVbllConfig(...))"
        )
    return head


def variational_loss(
    model: nn.Module,
    batch: Mapping[str, Any],
    *,
    n_train: float,
    kl_weight: float = 1.0,
    features: Tensor | None = None,
) -> VariationalLoss:
    """Negative evidence lower bound per training example, in closed form: no sampling.

        loss = mean_i [ logsumexp_c(m_ic + v_ic / 2) - m_iy ] + kl_weight / n_train KL

    with mean m and variance v of the logits. `BayesTrainer` uses it by itself; for a loop of one's
    own, with `parameter_groups` for the optimiser. `.loss.backward()` reaches adapters and head in
    one pass ("jacobi"). With `features` of an earlier call it costs no forward pass of the model.

    Args:
        model: a model with an active VBLL head.
        batch: inputs and int64 `labels` (B,), -100 for rows that do not count.
        n_train: number of training examples.
        kl_weight: factor of the divergence; below 1 the posterior is tempered.
        features: of the batch, where they are known.

    Raises:
        ValueError, TypeError: as `class_features`, or labels are missing or out of range.
        RuntimeError: the covariances have been refined: see `laplace_refine`.

    Sources: Harrison et al., arXiv 2404.11599; Xiang et al., arXiv 2604.03388.
    """
    return loss_and_logits(model, batch, n_train, kl_weight, features)[0]


def loss_and_logits(
    model: nn.Module,
    batch: Mapping[str, Any],
    n_train: float,
    kl_weight: float,
    features: Tensor | None,
) -> tuple[VariationalLoss, Tensor]:
    """As `variational_loss`, with the mean logits (B, C)."""
    head = need_head(model, "variational_loss")
    labels = batch.get("labels")
    if labels is None:
        raise ValueError("variational_loss: batch must have labels, got none; add int64 (B,)")
    mean, variance = class_logits(model, batch, features)
    targets, counted = counted_labels(
        "variational_loss", labels.to(mean.device), head.n_classes, head.ignore_index
    )
    nll = -jensen_bound(mean, variance, targets, counted).sum() / counted.sum().clamp_min(1)
    kl = head.kl() - head.wishart()
    return VariationalLoss(nll + kl_weight / n_train * kl, nll, kl), mean


__all__ = ["class_features", "class_logits", "find_head", "variational_loss"]
