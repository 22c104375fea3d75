"""TFB: make a trained adapter Bayesian without training it.

The thin SVD B = U diag(d) V^T regroups an adapter as B' = U, A' = diag(d) V^T A, with B' A' = B A.
Gaussian noise of deviation sigma_q on every element of A' is then isotropic noise on the column
space of B:

    W = W0 + scaling U (A' + sigma_q eps),  eps ~ N(0, 1)

The paper writes B' = U diag(d), A' = V^T A and the deviation sigma_q / d_i, which is the same and
divides by singular values. sigma_q, one number for all layers, is the largest one that changes the
predictions on anchor examples by no more than a tolerance. Source: Shi et al., "Training-Free
Bayesianization for Low-Rank Adapters of Large Language Models", arXiv 2412.05723.
"""

from __future__ import annotations

import math
import numbers
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import Dataset

from ...batches import as_batches, need_mapping
from ...progress import progress_bar
from .._compat import unsupported_layer
from ..config import BayesLoraConfig, option
from ..experts import adapts_parameter, as_kept, by_expert, layer_name
from ..layers import lora_layers
from ..logits import Prediction, need_classes
from ..method import PAPERS, Conversion, Method, default_options
from ..noise import DRAW_SCOPES, KINDS, NoiseState
from ..predict import predict
from ..swap import adapted_layers, lora_options, make_bayesian, mean_factors, the_adapter
from ..targets import unsupported_target
from ..tokens import TokenPrediction, label_shift, predict_tokens
from ..undo import as_before_if_stopped
from ..variants import BayesLayer
from .blob import GaussianFactor
from .tfb_report import TfbReport, Trial
from .tfb_search import Score, bisect, count_bisections, grid, least_nll, loss_of, truth_of

SIGMA = "lora_A_sigma"

METRICS = ("flips", "accuracy", "nll")
TOLERANCES = {"flips": 0.01, "accuracy": 0.01, "nll": 0.003}
RULES = ("feasible", "code")
SEARCHES = ("auto", "validation", "bisection", "grid")
LABELS = ("auto", "true", "pseudo")

# Added to a singular value where it divides, in the published code: directions that B does not have
# (d = 0) get no noise.
_SMALL = 1e-6


@dataclass
class TfbConfig(BayesLoraConfig, method="tfb"):
    """Configuration of a TFB adapter.

    Adapters of this type are made from trained ones by `bayes_kernels.hf.bayesianize`, which writes
    the configuration; a new one has no noise.

    Source: Shi et al., "Training-Free Bayesianization", arXiv 2412.05723.
    """

    noise_layers: list[str] | None = option(
        None,
        "Names, or last parts of names, of the layers with noise; None for all.",
        set_by="tfb_",
    )
    sigma_q: float | None = option(
        None, "The deviation that was found; None before.", least=0, set_by="tfb_"
    )

    _takes_parameters = True

    def rescaled(self, factor: float) -> None:
        """sigma_q is what the adapter has now."""
        if self.sigma_q is not None:
            self.sigma_q *= factor


class TfbVariant(GaussianFactor, method="tfb"):
    """TFB in one LoRA layer: one deviation for each row of A, B orthonormal; no prior."""

    constants = (SIGMA,)
    fp32 = (SIGMA,)
    trained = False
    deviation = SIGMA

    def __init__(self, config: TfbConfig, name: str, in_features: int, state: NoiseState):
        super().__init__(config, name, in_features, state)
        chosen = config.noise_layers
        self.noisy = chosen is None or any(f".{name}".endswith(f".{part}") for part in chosen)

    def initial(self, module: Any, adapter: str) -> dict[str, Tensor]:
        """No noise; `tfb_` finds out how much there may be."""
        mean = module.lora_A[adapter].weight
        shape = (mean.shape[0], 1)
        return {SIGMA: torch.zeros(shape, dtype=torch.float32, device=mean.device)}

    def mode_of(self, module: Any) -> str:
        """As everywhere; the mean in layers without noise."""
        mode = super().mode_of(module)
        return mode if self.noisy else "mean"


def tfb_(
    model: nn.Module,
    anchors: Iterable[Any] | Dataset[Any],
    *,
    metric: str = "flips",
    tolerance: float | None = None,
    labels: str = "auto",
    low: float = 0.001,
    high: float = 0.2,
    max_trials: int = 10,
    resolution: float = 5e-4,
    rule: str = "feasible",
    search: str = "auto",
    validation: Iterable[Any] | Dataset[Any] | None = None,
    per_anchor: bool = False,
    n_samples: int = 10,
    seed: int = 0,
    draws: str = "antithetic",
    scope: str = "example",
    choices: Sequence[int] | None = None,
    layers: Sequence[str] | None = None,
    batch_size: int = 16,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    samples_per_pass: int | None = None,
    progress: bool = True,
) -> TfbReport:
    """Make the active adapter of a PEFT model Bayesian, in place, by training-free Bayesianization.

    Plain LoRA (MLE) adapters, and the mean of Bayesian ones, become adapters of type BAYES_LORA,
    method "tfb": same mean, and noise of the largest deviation sigma_q in [low, high] for which

    * "flips": share of anchors whose class changes <= tolerance (0.01),
    * "accuracy": |accuracy(sigma_q) - accuracy(mean)| <= tolerance (0.01),
    * "nll": |NLL(sigma_q) - NLL(mean)| / NLL(mean) <= tolerance (0.003): little noise for an adapter
      that fits its anchors,

    or, where there are labelled examples that were not trained on (`validation`), of the sigma_q with the
    least NLL on them: anchors from the training set do not say how sure an adapter should be.

    NLL and accuracy are those of the mean prediction of n_samples draws, as `predict` makes it. For a
    language model with labels of tokens (B, T), -100 where none counts, and no choices, all are over the
    labelled tokens, as `predict_tokens` has them.
    All evaluations use the same draws of eps (common random numbers), so that the changes are a smooth
    function of sigma_q. The noise of the update is scaling * sigma_q, as published.

    Where an exception stops the search the adapter is left as it was.

    Args:
        model: a PeftModel whose only adapter is to be converted.
        anchors: examples to measure the change on, as `predict_dataset` takes them: a loader or
            list of batches, or a data set. The paper uses 500 training examples. Not looked at with
            search "validation".
        metric: "flips", "accuracy" or "nll".
        tolerance: None for 0.003 ("nll") or 0.01.
        labels: "true"; "pseudo": the classes that the mean predicts, which needs no labels and makes
            "accuracy" the same as "flips"; "auto": true ones where all batches have them.
        low: least sigma_q of the search; published: 0.001.
        high: largest sigma_q of the search; published: 0.015.
        max_trials: evaluations of the search (grid: number of points).
        resolution: the bisection stops where high - low is below it; 0 takes all trials.
        rule: what a bisection returns: "feasible", the largest evaluated sigma_q within tolerance
            (low is tried where no midpoint is; 0 where low is not feasible either); "code", as the
            published code, the last midpoint that was not, or high where all were.
        search: "bisection"; "grid": max_trials points in geometric progression from low to high, and the
            first crossing of the tolerance by piecewise-linear interpolation; "validation": the least
            NLL of held-out examples, of at most max_trials - 2 points in geometric progression and the two
            between the best and its neighbours; a point ends early where it must be worse than another
            whatever the rest of the examples say; "auto": "validation" where there are such examples, else
            "bisection".
        validation: held-out examples with class labels.
        per_anchor: divide the change by the number of anchors, as the published "nll" code does;
            its tolerance of 0.003 then is one of 150 % with 500 anchors.
        n_samples: draws of an evaluation.
        seed: their seed.
        draws: how they hang together: "antithetic", "independent" or "shared"; see `predict`.
        scope: "example": the weights of a draw are one set for all tokens; "token": the authors'
            prediction noise; see `predict`.
        choices: ids of the answer tokens, for causal language models; see `predict`.
        layers: names, or last parts of names, of the adapted layers that get noise; None for all.
        batch_size, collate_fn: for a data set.
        samples_per_pass: as in `predict`.
        progress: show a bar where it takes longer than two seconds.

    Returns:
        `TfbReport`. Cost: passes * n_samples forward passes of the anchors, or at most of `validation`.

    Raises:
        ValueError: an option is out of range, the adapter is not trained or cannot carry noise,
            an entry of `layers` matches no layer, there are no anchors, true labels are asked for
            and missing, or labels are not class indices.
    """
    check_options(
        metric=metric,
        tolerance=tolerance,
        labels=labels,
        low=low,
        high=high,
        max_trials=max_trials,
        resolution=resolution,
        rule=rule,
        search=search,
        n_samples=n_samples,
        draws=draws,
        scope=scope,
        layers=layers,
    )
    if search == "auto":
        search = "bisection" if validation is None else "validation"
    of_tokens = choices is None and label_shift(model) is not None
    if choices is None and not of_tokens:
        need_classes("tfb_", model)
    begin = time.perf_counter()
    bound = TOLERANCES[metric] if tolerance is None else tolerance
    given = anchors
    held_out = search == "validation"
    if held_out:
        if validation is None:
            raise ValueError("tfb_: validation must be held-out examples for search='validation'")
        given, metric, labels, bound, per_anchor = validation, "nll", "true", 0.0, False
    batches = _batches(given, batch_size, collate_fn)
    if not of_tokens:
        batches = _with_labels(batches, labels)
    elif labels == "pseudo" or scope != DRAW_SCOPES[0]:
        raise ValueError(
            f"tfb_: labels of tokens must be true ones, with scope={DRAW_SCOPES[0]!r}, got labels={labels!r} "
            f"and scope={scope!r}; give choices for a model that answers"
        )
    options: dict[str, Any] = {
        "seed": seed,
        "draws": draws,
        "scope": scope,
        "choices": choices,
        "samples_per_pass": samples_per_pass,
    }
    with as_before_if_stopped(model):
        noisy, weights = _convert(model, layers)
        halvings = count_bisections(low, high, max_trials, resolution)
        evaluations = 1 + (halvings if search == "bisection" else max_trials)
        bar = progress_bar(progress, total=evaluations * len(batches), desc="TFB", unit="batch")

        def evaluate(sigma: float, limit: float = math.inf) -> Prediction | TokenPrediction:
            """Of all batches, or of those with which the sum of the losses is above a limit."""
            _set_sigma(noisy, weights, sigma)
            bar.set_postfix_str(f"sigma_q {sigma:.4g}", refresh=False)
            count = n_samples if sigma else 0
            found: list[Any] = []
            loss = 0.0
            for left, batch in enumerate(batches, start=1 - len(batches)):
                if of_tokens:
                    part: Any = predict_tokens(
                        model, batch, n_samples=count, seed=seed, draws=draws
                    )
                else:
                    part = predict(model, batch, n_samples=count, **options)
                    assert isinstance(part, Prediction), type(part)  # by `need_classes`, or choices
                found.append(part)
                bar.update()
                loss += loss_of(part) if limit < math.inf else 0.0
                if loss > limit:
                    bar.update(-left)
                    break
            return type(found[0]).concatenate(found)

        with bar:
            mean = evaluate(0.0)
            kind, truth = truth_of(mean, labels, "validation" if held_out else "anchors")
            score = Score("held_out" if held_out else metric, bound, truth, mean, per_anchor)

            def trial(sigma: float, limit: float = math.inf) -> Trial:
                """`limit` of the NLL, with room for rounding; losses are not negative."""
                return score.trial(sigma, evaluate(sigma, limit * len(mean) * (1 + 1e-9)))

            if held_out:
                nll = score.trial(0.0, mean).nll
                sigma, trace = least_nll(trial, low, high, max_trials, nll)
            elif search == "grid":
                sigma, trace = grid(trial, low, high, max_trials, bound)
            else:
                sigma, trace = bisect(trial, low, high, max_trials, resolution, rule)
        _set_sigma(noisy, weights, sigma)
        for config in {id(item.variant.config): item.variant.config for item in noisy}.values():
            config.sigma_q = sigma
        if sigma == 0.0:
            warnings.warn(
                f"tfb_: no sigma_q in [{low}, {high}] keeps the change within {bound}: the adapter has "
                "no noise; lower `low` or raise the tolerance",
                stacklevel=2,
            )
        last = trace[-1] if trace else None
        return TfbReport(
            sigma=sigma,
            layers=len(noisy),
            metric=metric,
            tolerance=bound,
            rule=rule,
            search=search,
            labels=kind,
            anchors=len(mean),
            n_samples=n_samples,
            passes=1 + len(trace),
            before=score.trial(0.0, mean),
            after=next((t for t in trace if t.sigma == sigma), None),
            trace=tuple(trace),
            at_range_end=sigma == high
            if held_out
            else bool(last and all(t.feasible for t in trace)),
            seconds=time.perf_counter() - begin,
        )


def check_options(**options: Any) -> None:
    """Whether `tfb_` takes these options, which can be asked before an adapter is trained.

    Args:
        options: options of `tfb_`; missing ones have its defaults. Options of batches are not
            checked.

    Raises:
        ValueError: an option is out of range or of the wrong kind.
    """
    options = {**default_options(tfb_), **options}
    words = {"metric": METRICS, "labels": LABELS, "rule": RULES, "search": SEARCHES}
    words.update(draws=KINDS, scope=DRAW_SCOPES)
    for name, allowed in words.items():
        word = options[name]
        if word not in allowed:
            raise ValueError(f"tfb_: {name} must be one of {allowed}, got {word!r}; choose one")
    tolerance, low, high = options["tolerance"] or 0, options["low"], options["high"]
    for name in ("low", "high", "resolution", "max_trials", "n_samples", "tolerance"):
        value = tolerance if name == "tolerance" else options[name]
        whole = name in ("max_trials", "n_samples")
        wanted = numbers.Integral if whole else numbers.Real
        if isinstance(value, bool) or not isinstance(value, wanted):
            kind = "an integer" if whole else "a number"
            raise ValueError(f"tfb_: {name} must be {kind}, got {value!r}")
    if not 0 < low < high < math.inf:
        raise ValueError(f"tfb_: range must be 0 < low < high, got low={low} and high={high}")
    for name, number in (("tolerance", tolerance), ("resolution", options["resolution"])):
        if not 0 <= number < math.inf:
            raise ValueError(f"tfb_: {name} must not be negative, got {number}")
    for name in ("max_trials", "n_samples"):
        if options[name] < 1:
            raise ValueError(f"tfb_: {name} must be at least 1, got {options[name]}")
    if isinstance(options["layers"], str):
        raise ValueError(f"tfb_: layers must be a list of names, got {options['layers']!r}")


def check_layers(model: PeftModel, layers: Sequence[str] | None) -> None:
    """Whether every entry of `layers` names an adapted layer of a PEFT model; None always does.

    Raises:
        ValueError: there is no entry, or one matches no layer; the message names those.
    """
    if layers is None:
        return
    tuner: Any = model.base_model
    keys = [layer_name(key, layer) for key, layer in lora_layers(tuner.model)]
    unmatched = [part for part in layers if not any(f".{key}".endswith(f".{part}") for key in keys)]
    if unmatched or not layers:
        raise ValueError(
            f"tfb_: layers must name adapted layers, got {unmatched}, and there are "
            f"{sorted({key.rpartition('.')[2] for key in keys})}"
        )


def check_model(model: PeftModel, layers: Sequence[str] | None = None, **others: Any) -> None:
    """Whether `tfb_` can convert the adapter of a PEFT model, trained or not.

    Raises:
        ValueError: as `check_layers`, a layer cannot carry noise, or LoRA has an option that does not go
            with a posterior.
    """
    _new_config(*the_adapter("tfb_", model), layers)


def regroup(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(A', B', d) with B' = U, A' = diag(d) V^T A for the thin SVD B = U diag(d) V^T.

    B' A' = B A, and nothing is divided by a singular value. QR of B, then the SVD of an r x r
    matrix, in fp64; leading dimensions are a batch.

    Args:
        a: (..., r, n).
        b: (..., m, r). Where r is above m, as for a head of few classes, r - m columns of B' are zero, and
            so is their d: there is no noise that B could let through.

    Returns:
        A' (..., r, n) and B' (..., m, r) in fp64, d (..., r) descending.
    """
    m, r = b.shape[-2:]
    wide = nn.functional.pad(b.double(), (0, 0, 0, max(r - m, 0)))
    q, upper = torch.linalg.qr(wide)
    left, d, right = torch.linalg.svd(upper)
    return d[..., None] * (right @ a.double()), (q @ left)[..., :m, :], d


def _batches(
    anchors: Iterable[Any] | Dataset[Any],
    batch_size: int,
    collate_fn: Callable[[list[Any]], Any] | None,
) -> list[Mapping[str, Any]]:
    found = list(as_batches(anchors, batch_size, collate_fn))
    if not found:
        raise ValueError("tfb_: anchors must have at least one example, got none")
    return found


def _with_labels(batches: list[Mapping[str, Any]], labels: str) -> list[Mapping[str, Any]]:
    """The batches, of which the labels are class indices or, for pseudo-labels, left out."""
    names = ("labels", "label")
    for batch in batches:
        need_mapping(batch)
    if labels == "pseudo":
        return [{k: v for k, v in batch.items() if k not in names} for batch in batches]
    for batch in batches:
        found = next((batch[k] for k in names if batch.get(k) is not None), None)
        if found is None:
            continue
        whole = isinstance(found, Tensor) and not (found.is_floating_point() or found.is_complex())
        if not whole or found.dim() != 1 or found.dtype == torch.bool:
            got = type(found).__name__
            if isinstance(found, Tensor):
                got = f"shape {tuple(found.shape)} of {found.dtype}"
            raise ValueError(
                f"tfb_: labels must be class indices (B,), got {got}; pass labels='pseudo'"
            )
    return batches


def _set_sigma(layers: Sequence[BayesLayer], weights: Sequence[Tensor], sigma: float) -> None:
    with torch.no_grad():
        for item, weight in zip(layers, weights, strict=True):
            item.tensor(SIGMA).copy_((sigma * weight)[:, None])


# --- conversion ----------------------------------------------------------------------------------


def _new_config(peft_model: PeftModel, name: str, chosen: Sequence[str] | None) -> TfbConfig:
    """The configuration of the converted adapter; raises ValueError where it cannot be converted."""
    old: Any = peft_model.peft_config[name]
    fields = {f: getattr(old, f) for f in ("seed", "sample_at_inference") if hasattr(old, f)}
    config = TfbConfig(
        noise_layers=None if chosen is None else sorted(chosen), **lora_options(old), **fields
    )
    check_layers(peft_model, chosen)
    for key, layer in adapted_layers(peft_model, name):
        reason = unsupported_layer(layer) or unsupported_target(layer, TfbVariant.targets)
        if reason is not None:
            raise ValueError(f"tfb_: layer {key} cannot carry noise: {reason}")
    return config


def _convert(
    model: nn.Module, chosen: Sequence[str] | None
) -> tuple[list[BayesLayer], list[Tensor]]:
    """Regroup the adapter and make it a TFB adapter without noise.

    Returns:
        Layers that get noise, and for each of them the share (r,) of sigma_q of each direction.
    """
    peft_model, name = the_adapter("tfb_", model)
    old: Any = peft_model.peft_config[name]
    again = isinstance(old, TfbConfig)
    config = _new_config(peft_model, name, chosen)
    found = adapted_layers(peft_model, name)
    plain = [
        by_expert(layer, *pair) if adapts_parameter(layer) else pair
        for _, layer in found
        for pair in (mean_factors(layer, name),)
    ]
    weights = _old_weights(found, name, old) if again else []
    new = plain if again else _regroup_all(plain, weights)
    new = [pair if pair[0].dim() == 2 else as_kept(*pair) for pair in new]
    if not again and not any(bool((w > 0.5).any()) for w in weights):
        raise ValueError(
            "tfb_: the adapter must be trained, got B = 0 in all layers; train it first"
        )
    made = zip(make_bayesian(peft_model, name, config, found, new), weights, strict=True)
    noisy = [(item, weight) for item, weight in made if _noisy(item)]
    return [item for item, _ in noisy], [weight for _, weight in noisy]


def _noisy(item: BayesLayer) -> bool:
    return isinstance(item.variant, TfbVariant) and item.variant.noisy


def _old_weights(found: Sequence[tuple[str, Any]], name: str, config: Any) -> list[Tensor]:
    """Shares of sigma_q of an adapter that is TFB's already, whose B has forgotten d."""
    if not config.sigma_q:
        raise ValueError(
            "tfb_: the adapter must have noise to be searched again, got a TFB adapter with "
            "sigma_q = 0; convert the plain adapter instead"
        )
    weights = []
    for key, layer in found:
        if not layer.lora_variant[name].noisy:
            raise ValueError(
                f"tfb_: the adapter must have noise in all layers to be searched again, got none in "
                f"{key}; convert the plain adapter instead"
            )
        weights.append(layer.lora_A_sigma[name].detach()[:, 0] / config.sigma_q)
    return weights


def _regroup_all(
    plain: Sequence[tuple[Tensor, Tensor]], weights: list[Tensor]
) -> list[tuple[Tensor, Tensor]]:
    """Regroup layers of equal shapes together; appends the shares of sigma_q to `weights`."""
    groups: dict[Any, list[int]] = {}
    for i, (a, b) in enumerate(plain):
        groups.setdefault((a.shape, b.shape, b.device), []).append(i)
    new: dict[int, tuple[Tensor, Tensor]] = {}
    share: dict[int, Tensor] = {}
    for indices in groups.values():
        stacked = [torch.stack([plain[i][k] for i in indices]) for k in (0, 1)]
        if not all(bool(t.isfinite().all()) for t in stacked):
            raise ValueError("tfb_: the adapter must be finite, got nan or inf in a factor")
        first, second, d = regroup(*stacked)
        kept = torch.promote_types(torch.promote_types(*(t.dtype for t in stacked)), torch.float32)
        shares = (d / (d + _SMALL)).float().flatten(1).unbind()  # as the rows of A lie
        new.update(zip(indices, zip(first.to(kept), second.to(kept), strict=True), strict=True))
        share.update(zip(indices, shares, strict=True))
    weights.extend(share[i] for i in range(len(plain)))
    return [new[i] for i in range(len(plain))]


def _prior(config: Mapping[str, Any]) -> str:
    """The prior in words."""
    sigma = config.get("sigma_q")
    return f"none; noise of deviation sigma_q = {sigma} found without training"


# The code's search by predictions that change; classes of the mean are the labels.
PUBLISHED = {
    **PAPERS,
    "draw_scope": "token",
    "options": {
        "anchors": 500,
        "metric": "flips",
        "tolerance": 0.01,
        "labels": "pseudo",
        "low": 0.001,
        "high": 0.015,
        "max_trials": 5,
        "rule": "code",
    },
}

# Options of the search on anchors, which "auto" therefore is where one is given.
OF_ANCHORS = ("metric", "tolerance", "labels", "per_anchor")
_ONLY_OF_ANCHORS = ("anchors", "resolution", "rule", *OF_ANCHORS)


def _chooses(options: Mapping[str, Any]) -> bool:
    """Whether validation examples choose sigma_q."""
    search = options.get("search", "auto")
    anchors = any(name in options for name in _ONLY_OF_ANCHORS)
    return search == "validation" or (search == "auto" and not anchors)


METHOD = Method(
    "tfb",
    "TFB",
    TfbConfig,
    prior=_prior,
    published=PUBLISHED,
    conversion=Conversion(
        tfb_,
        check_options,
        check_model,
        "the anchor examples",
        examples=500,
        needs={
            **{name: {"search": ("auto", "bisection")} for name in ("resolution", "rule")},
            **{name: {"search": ("auto", "bisection", "grid")} for name in OF_ANCHORS},
        },
        chooses=_chooses,
    ),
)
