"""Laplace-LoRA: a Gaussian posterior for a trained adapter, from one pass over its training data.

The adapter stays plain LoRA of stock PEFT, and so do its mean predictions. Beside it the model gets a
`bayes_kernels.laplace.Laplace`: Kronecker-factored curvature of the adapter's weights, of which the
long sides have low rank, and a prior whose precision the evidence chooses. Predictions linearise the
model in its weights, so that the logits are Gaussian:

    z(x) ~ N(f(x), sum_l J_l Sigma_l J_l^T),  Sigma_l^-1 = A_l (x) G_l + delta I

Source: Yang et al., "Bayesian Low-rank Adaptation for Large Language Models", arXiv 2308.13111.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ...batches import as_batches, inputs_of, labels_of
from ...laplace import FISHERS, METHODS, TOKENS
from ...laplace.tokens import RULES
from ...progress import progress_bar
from ..draws import Sampling, Step, WeightDraws
from ..logits import (
    Prediction,
    gaussian_prediction,
    mean_prediction,
    need_classes,
)
from ..method import PAPERS, Conversion, Method, default_options
from ..swap import make_plain, the_adapter
from ..undo import as_before_if_stopped
from .laplace_posterior import (
    LAPLACE_FILE,
    DrawnAdapters,
    LaplacePosterior,
    build_laplace,
    drawn_weights,
    forget_laplace,
    has_token_labels,
    laplace_method,
    laplace_posterior,
    load_laplace,
    save_laplace,
    set_posterior,
    weights_of,
)

LAYERS = ("all", "adapters", "last")
PRIORS = ("mackay", "gradient", "validation", "fixed")
STRUCTURES = ("scalar", "layer")
JACOBIANS = ("vmap", "repeat")

# Prior precisions that "validation" tries, in one pass; neighbours differ by a factor of 1.78.
# Labels of tokens have every second, each in `_TOKEN_SAMPLES` passes.
_GRID = torch.logspace(-2, 4, 25, dtype=torch.float64)
_TOKEN_SAMPLES = 10


@dataclass(frozen=True)
class LaplaceLoraReport:
    """What a Laplace approximation found.

    Attributes:
        layers: which layers have a posterior: "all", "adapters" or "last".
        matrices: number of weight matrices (and biases) with a posterior.
        parameters: their entries.
        examples: training examples of the curvature, or labelled tokens, see `unit`.
        fisher, tokens, rank, dense_below, prior, structure, prediction: as asked for.
        prior_precision: delta, one number or one for each matrix.
        log_likelihood: of the training examples at the mean, nats; None without labels.
        evidence_before, evidence_after: log evidence at the prior precision that was given, and at
            the one that was chosen, nats; None without labels.
        effective_parameters: gamma, number of directions that the data determines.
        posterior_bytes: size of the posterior.
        seconds: wall-clock time.
        unit: "examples" or "labelled tokens", terms of the likelihood.
    """

    layers: str
    matrices: int
    parameters: int
    examples: int
    fisher: str
    tokens: str
    rank: int | None
    dense_below: int
    prior: str
    structure: str
    prediction: str
    prior_precision: float | list[float]
    log_likelihood: float | None
    evidence_before: float | None
    evidence_after: float | None
    effective_parameters: float
    posterior_bytes: int
    seconds: float
    unit: str = "examples"

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, words and lists; without the time, which differs by run."""
        content = dataclasses.asdict(self)
        del content["seconds"]
        return content

    def __str__(self) -> str:
        delta = self.prior_precision
        shown = (
            f"{delta:.4g}" if isinstance(delta, float) else f"{min(delta):.3g}..{max(delta):.3g}"
        )
        evidence = ""
        if self.evidence_before is not None and self.evidence_after is not None:
            evidence = f"log evidence {self.evidence_before:.1f} -> {self.evidence_after:.1f}, "
        return (
            f"Laplace: {self.parameters:,} weights in {self.matrices} matrices ({self.layers}), "
            f"{self.examples} {self.unit}; prior precision {shown}, {evidence}"
            f"{self.effective_parameters:.1f} effective parameters, "
            f"{self.posterior_bytes / 2**20:.1f} MiB ({self.seconds:.0f} s)"
        )

    def table(self) -> tuple[str, tuple[str, ...], list[tuple[str, ...]]]:
        """Title, headings and rows of what was found, for people."""

        def number(value: float | None) -> str:
            return "–" if value is None else f"{value:.1f}"

        rows: list[tuple[str, ...]] = [
            ("log likelihood", number(self.log_likelihood), number(self.log_likelihood)),
            ("log evidence", number(self.evidence_before), number(self.evidence_after)),
        ]
        title = (
            f"{self.matrices} matrices, {self.parameters:,} weights, {self.examples} {self.unit}"
        )
        return title, ("nats", "given prior", "chosen prior"), rows


def check_laplace_options(**options: Any) -> None:
    """Whether `laplace_` takes these options, which can be asked before an adapter is trained.

    Args:
        options: options of `laplace_`; missing ones have its defaults. Data, `validation` and options
            of batches are not checked.

    Raises:
        ValueError: an option is out of range; the message says which.
    """
    options = {**default_options(laplace_), **options}
    for option, allowed in (
        ("layers", LAYERS),
        ("fisher", (None, *FISHERS)),
        ("tokens", (None, *TOKENS)),
        ("prior", (None, *PRIORS)),
        ("structure", STRUCTURES),
        ("prediction", (None, *METHODS)),
        ("jacobian", JACOBIANS),
    ):
        value = options[option]
        if value not in allowed:
            raise ValueError(f"laplace_: {option} must be one of {allowed}, got {value!r}")
    for option in ("rank", "dense_below", "mc_samples", "n_samples"):
        count = options[option]
        if option in ("rank", "n_samples") and count is None:
            continue
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"laplace_: {option} must be an integer >= 1, got {count!r}")
    prior_precision, structure = options["prior_precision"], options["structure"]
    number = isinstance(prior_precision, (int, float)) and not isinstance(prior_precision, bool)
    if not number or not 0 < prior_precision < float("inf"):
        raise ValueError(
            f"laplace_: prior_precision must be a positive number, got {prior_precision!r}"
        )
    if options["prior"] == "validation" and structure != "scalar":
        raise ValueError(
            f"laplace_: structure must be 'scalar' for prior='validation', got {structure!r}"
        )


def _check_of_tokens(fisher: str | None, tokens: str | None, prediction: str | None) -> None:
    """Whether options fit labels of tokens (B, T).

    Raises:
        ValueError: one does not.
    """
    for option, value, allowed in (
        ("fisher", fisher, ("mc", "empirical")),
        ("tokens", tokens, RULES),
        ("prediction", prediction, ("weights",)),
    ):
        if value is not None and value not in allowed:
            raise ValueError(
                f"laplace_: {option} must be one of {allowed} for labels of tokens (a language model "
                f"without choices), got {value!r}; leave it out"
            )


def laplace_(
    model: nn.Module,
    data: Iterable[Any] | Dataset[Any],
    *,
    layers: str = "all",
    fisher: str | None = None,
    tokens: str | None = None,
    rank: int | None = 10,
    dense_below: int = 512,
    mc_samples: int = 1,
    prior_precision: float = 1.0,
    prior: str | None = None,
    structure: str = "scalar",
    validation: Iterable[Any] | Dataset[Any] | None = None,
    prediction: str | None = None,
    jacobian: str = "vmap",
    n_samples: int | None = None,
    seed: int = 0,
    choices: Sequence[int] | None = None,
    batch_size: int = 16,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    progress: bool = True,
) -> LaplaceLoraReport:
    """Give the adapter of a PEFT model a Laplace posterior, in place, without training it.

    The adapter becomes, or stays, plain LoRA: its weights are the posterior mean. `predict` and
    `predict_dataset` then use the posterior, with n_samples=0 the mean; `save_laplace` writes it
    beside the adapter, and `load_laplace` reads it. Changing the adapter afterwards makes the
    posterior invalid, which every use of it notices.

    Args:
        model: a PeftModel with one trained adapter: plain LoRA, or a Bayesian one, of which the mean
            stays.
        data: the examples that it was trained on, as `predict_dataset` takes them: a loader or
            another iterable of batches, or a data set. Labels are class indices (B,); they are
            needed for fisher "empirical" and for the evidence as a number, not for its optimum. For a
            language model without `choices` they are the labels (B, T) that it was trained with, -100
            where none counts: curvature, evidence and validation are then of the labelled tokens.
        layers: what gets a posterior. "all": the factors A and B of all adapted layers and the linear
            layers of a head that was trained with them (`modules_to_save`); "adapters": the factors
            only; "last" (LLLA): the layer that gives the logits: the factors of an adapted output
            head, else the last linear layer of a trained head, else the factors of the last adapted
            block.
        fisher: "ggn", exact with C - 1 backward passes for each batch; "mc", labels drawn from the
            model; "empirical". None: "ggn", and "mc" for labels of tokens, where one backward pass has
            the labels drawn at all tokens of a batch, and "ggn" has no such pass.
        mc_samples: labels drawn for each example, for fisher "mc": one backward pass each.
        tokens: what a sequence contributes: "expand", "sum", "sum_padded" (both as the paper's code,
            without padding and with it), "reduce" or "last", see `Laplace`. None: "sum" where the
            evidence chooses delta, which needs it, else "expand"; labels of tokens have these two and
            "reduce".
        rank: columns of low-rank factors; None for dense factors everywhere.
        dense_below: sides with fewer entries have dense factors.
        prior_precision: delta at the start, and the one that is kept for prior "fixed".
        prior: how delta is chosen: "mackay" or "gradient" by the evidence, "validation" by the
            likelihood of held-out examples, "fixed" not at all. None: "validation" where there are
            such examples and structure is "scalar", else "mackay". With tokens "expand" the evidence
            can choose far too wide a prior for all layers together; with "sum" it predicted about as
            well as "validation": docs/laplace.md.
        structure: "scalar", one delta; "layer", one for each matrix.
        validation: held-out examples with labels, for prior "validation": one prediction of them.
        prediction: from Gaussian logits to probabilities: "mc", "mc_independent", "quadrature" (two
            classes), "probit", "bridge"; or "weights", draws of the weights without linearisation, the
            only one for labels of tokens (`predict_tokens`, `generate`). None: "mc", or "weights" there.
        jacobian: "vmap" or "repeat", see `Laplace`.
        n_samples: draws of a prediction, for prior "validation". None: 1000 of logits, 10 of weights.
        seed: seed of the draws, for prior "validation" and fisher "mc".
        choices: ids of the answer tokens, for causal language models; see `predict`.
        batch_size, collate_fn: for a data set.
        progress: write the memory estimate to stderr before anything runs, and show a bar where it
            takes longer than two seconds.

    Returns:
        `LaplaceLoraReport`. Cost: one pass over the data with C - 1 backward passes ("ggn"), mc_samples
        ("mc") or one, that compute no gradient of a weight; memory as the estimate says. "validation" of
        labels of tokens: 13 * n_samples forward passes of the held-out examples.

    Raises:
        ValueError: an option is out of range, the adapter is not trained or cannot have this
            posterior, or the data does not fit. The model is then as it was.

    Sources: Yang et al., arXiv 2308.13111; see `bayes_kernels.laplace`.
    """
    check_laplace_options(
        layers=layers,
        fisher=fisher,
        tokens=tokens,
        rank=rank,
        dense_below=dense_below,
        mc_samples=mc_samples,
        prior_precision=prior_precision,
        prior=prior,
        structure=structure,
        prediction=prediction,
        jacobian=jacobian,
        n_samples=n_samples,
    )
    if prior == "validation" and validation is None:
        raise ValueError("laplace_: validation must be held-out examples for prior='validation'")
    if prior is None:
        prior = "validation" if validation is not None and structure == "scalar" else "mackay"
    if tokens is None:
        tokens = "sum" if prior in ("mackay", "gradient") else "expand"
    begin = time.perf_counter()
    peft_model, name = the_adapter("laplace_", model)
    of_tokens = has_token_labels(model, choices)
    if of_tokens:
        _check_of_tokens(fisher, tokens, prediction)
    elif choices is None:
        need_classes("laplace_", model)
    fisher = fisher or ("mc" if of_tokens else "ggn")
    prediction = prediction or ("weights" if of_tokens else "mc")
    if n_samples is None:
        n_samples = _TOKEN_SAMPLES if of_tokens else 1000
    with as_before_if_stopped(peft_model):
        make_plain(peft_model, name)
        found = build_laplace(
            peft_model,
            name,
            layers,
            choices,
            fisher=fisher,
            tokens=tokens,
            rank=rank,
            dense_below=dense_below,
            mc_samples=mc_samples,
            prior_precision=prior_precision,
            seed=seed,
            jacobian=jacobian,
        )
        if progress:
            print(f"Laplace: {found.estimate_memory()}", file=sys.stderr)
        batches = as_batches(data, batch_size, collate_fn)
        total = None
        with contextlib.suppress(TypeError):  # streams have no length
            total = len(batches)  # type: ignore[arg-type]
        bar = progress_bar(progress, batches, desc="Laplace", unit="batch", total=total)
        found.fit(bar, verbose=False)
        labelled = found.log_likelihood is not None
        linearised = "mc" if prediction == "weights" else prediction
        before = float(found.log_marginal_likelihood()) if labelled else None
        if prior == "validation":
            assert validation is not None
            held_out = list(as_batches(validation, batch_size, collate_fn))
            found.optimize_prior_precision(
                "validation",
                loader=progress_bar(progress, held_out, desc="Laplace: prior", unit="batch"),
                grid=_GRID[::2] if of_tokens else _GRID,
                refine=0,
                prediction="weights" if of_tokens else linearised,
                n_samples=n_samples,
            )
        elif prior != "fixed":
            found.optimize_prior_precision(prior, structure=structure)
        delta = found.prior_precision.tolist()
        report = LaplaceLoraReport(
            layers=layers,
            matrices=len(found.layers),
            parameters=sum(layer.weight.numel() for layer in found.layers),
            examples=found.n_examples,
            fisher=fisher,
            tokens=tokens,
            rank=rank,
            dense_below=dense_below,
            prior=prior,
            structure=structure,
            prediction=prediction,
            prior_precision=delta,
            log_likelihood=found.log_likelihood,
            evidence_before=before,
            evidence_after=float(found.log_marginal_likelihood()) if labelled else None,
            effective_parameters=float(found.effective_parameters().sum()),
            posterior_bytes=sum(t.nbytes for t in found.state_dict().values()),
            seconds=time.perf_counter() - begin,
            unit="labelled tokens" if of_tokens else "examples",
        )
        chosen = None if choices is None else [int(c) for c in choices]
        kept = LaplacePosterior(found, layers, prediction, chosen, report.to_dict())
        set_posterior(peft_model, kept)
        return report


def check_laplace_model(model: nn.Module, layers: str = "all", **others: Any) -> None:
    """Whether the adapter of a PEFT model, trained or not, has layers for `laplace_`.

    Raises:
        ValueError: as `laplace_`.
    """
    peft_model, name = the_adapter("laplace_", model)
    weights_of(peft_model, name, layers)


# --- prediction ----------------------------------------------------------------------------------


class LaplacePredictor:
    """Predicts with the linearised model: Gaussian logits, then draws of them or a closed form.

    Args:
        model: the model.
        posterior: its posterior.
    """

    draws = True

    def __init__(self, model: nn.Module, posterior: LaplacePosterior) -> None:
        self.model, self.posterior = model, posterior

    @property
    def texts(self) -> WeightDraws:
        """Draws of the weights."""
        return DrawnAdapters(self.model, self.posterior)

    def predict(
        self,
        batch: Mapping[str, Any],
        *,
        n_samples: int,
        seed: int,
        choices: Sequence[int] | None,
        return_samples: bool,
        **others: Any,
    ) -> Prediction:
        """As `bayes_kernels.hf.predict`; memory does not depend on the number of draws.

        Raises:
            ValueError: the head has no classes, the choices are not the posterior's, or draws
                are to be returned where there are none.
        """
        self._check(n_samples, choices, return_samples)
        found = self.posterior.laplace
        labels, inputs = labels_of(batch), inputs_of(batch)
        labels = None if labels is None else labels.cpu()
        if n_samples == 0:
            return mean_prediction(found.mean_logits(inputs), labels, keep=return_samples)
        if self.posterior.prediction == "weights":
            drawn: Any = found.predict(inputs, method="weights", n_samples=n_samples, seed=seed)
            return Prediction(
                log_probs=drawn.log_probs.double().cpu(),
                entropy=drawn.entropy.double().cpu(),
                expected_entropy=drawn.expected_entropy.double().cpu(),
                n_samples=n_samples,
                labels=labels,
            )
        return self._drawn(found.logits(inputs), labels, n_samples, seed, return_samples)

    def several(
        self,
        batch: Mapping[str, Any],
        samplings: Sequence[Sampling],
        *,
        seed: int,
        choices: Sequence[int] | None,
        return_samples: bool,
        **others: Any,
    ) -> Iterator[Step]:
        """As `Predictor.several`: covariances of logits once for all numbers of draws.

        Raises:
            ValueError: as `predict`.
        """
        options: dict[str, Any] = {"seed": seed, "choices": choices}
        options["return_samples"] = return_samples
        for one in samplings:
            self._check(one.n_samples, choices, return_samples)
        numbers = list(enumerate(one.n_samples for one in samplings))
        of_logits = [item for item in numbers if item[1]]
        if self.posterior.prediction == "weights" or len(of_logits) < 2:
            of_logits = []
        for i, number in numbers:
            if (i, number) not in of_logits:
                yield Step(i, self.predict(batch, n_samples=number, **options))
        if not of_logits:
            return
        labels = labels_of(batch)
        labels = None if labels is None else labels.cpu()
        logits = self.posterior.laplace.logits(inputs_of(batch))
        yield Step(None)
        for i, number in of_logits:
            yield Step(i, self._drawn(logits, labels, number, seed, return_samples))

    def _check(self, n_samples: int, choices: Sequence[int] | None, return_samples: bool) -> None:
        """Raises ValueError as `predict` says."""
        method = self.posterior.prediction
        if self.posterior.of_tokens:
            raise ValueError(
                "predict: a Laplace posterior must be of classes, got one of labels of tokens; use "
                "predict_tokens, score_texts, score_answers or generate"
            )
        if choices is None:
            need_classes("predict", self.model)
        elif [int(c) for c in choices] != self.posterior.choices:
            raise ValueError(
                "predict: choices must be those of the Laplace posterior, "
                f"{self.posterior.choices}, or None, got {list(choices)}"
            )
        if return_samples and n_samples and method not in ("mc", "mc_independent"):
            raise ValueError(
                f"predict: return_samples must be False where prediction is {method!r}, which has no "
                "draws of logits; use prediction='mc'"
            )

    def _drawn(
        self,
        logits: tuple[Tensor, Tensor],
        labels: Tensor | None,
        n_samples: int,
        seed: int,
        return_samples: bool,
    ) -> Prediction:
        """The prediction of Gaussian logits: mean (B, C) and covariance (B, C, C)."""
        (mean, cov), method = logits, self.posterior.prediction
        if method == "mc_independent":
            method, cov = "mc", cov.diagonal(dim1=1, dim2=2).contiguous()
        return gaussian_prediction(
            mean, cov, labels, n_samples=n_samples, seed=seed, method=method, keep=return_samples
        )


def laplace_predictor(model: nn.Module) -> LaplacePredictor | None:
    """The predictor of a model with a Laplace posterior; None for other models."""
    found = laplace_posterior(model)
    return None if found is None else LaplacePredictor(model, found)


# The authors' training, and their curvature and prior by the evidence after it. Their code has dense factors,
# the paper ten columns.
PUBLISHED = {
    **PAPERS,
    "dropout": 0.1,
    "lr": 5e-5,
    "steps": 10_000,
    "options": {"tokens": "sum_padded", "prior": "mackay", "structure": "scalar", "rank": 10},
}


def _chooses(options: Mapping[str, Any]) -> bool:
    """Whether validation examples choose the prior."""
    one = options.get("structure", "scalar") == "scalar"
    return one and options.get("prior") in (None, "validation")


def _method(name: str, title: str, **fixed: Any) -> Method:
    return Method(
        name,
        title,
        n_samples=1000,
        text_samples=10,  # each is an adapter
        predictor=laplace_predictor,
        conversion=Conversion(
            laplace_,
            check_laplace_options,
            check_laplace_model,
            "the training examples",
            fixed=fixed,
            needs={"mc_samples": {"fisher": ("mc",)}},
            chooses=_chooses,
        ),
        files=(LAPLACE_FILE,),
        save=save_laplace,
        load=load_laplace,
        stored=lambda folder: laplace_method(folder) == name,
        published=PUBLISHED,
    )


METHOD = _method("laplace", "Laplace-LoRA")
LAST_LAYER = _method("laplace-last", "Laplace-LoRA, last layer", layers="last")

__all__ = [
    "LAST_LAYER",
    "METHOD",
    "LaplaceLoraReport",
    "LaplacePosterior",
    "drawn_weights",
    "forget_laplace",
    "laplace_",
    "laplace_posterior",
    "load_laplace",
    "save_laplace",
]
