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
import functools
import json
import os
import re
import secrets
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ...batches import as_batches, inputs_of, labels_of, split
from ...laplace import FISHERS, METHODS, TOKENS, Laplace, Layer
from ...progress import progress_bar
from ..logits import (
    Prediction,
    forward_logits,
    gaussian_prediction,
    mean_prediction,
    need_classes,
)
from ..method import Conversion, Method, default_options
from ..model import BayesLoraModel
from ..swap import adapted_layers, make_plain, the_adapter
from ..undo import as_before_if_stopped
from ..variants import BayesVariant

LAPLACE_FILE = "laplace.safetensors"
FORMAT = 1

LAYERS = ("all", "adapters", "last")
PRIORS = ("mackay", "gradient", "validation", "fixed")
STRUCTURES = ("scalar", "layer")
JACOBIANS = ("vmap", "repeat")

_ATTRIBUTE = "laplace_posterior"
# Prior precisions that "validation" tries, in one pass; neighbours differ by a factor of 1.78.
_GRID = torch.logspace(-2, 4, 25, dtype=torch.float64)


@dataclass(frozen=True)
class LaplaceLoraReport:
    """What a Laplace approximation found.

    Attributes:
        layers: which layers have a posterior: "all", "adapters" or "last".
        matrices: number of weight matrices (and biases) with a posterior.
        parameters: their entries.
        examples: training examples of the curvature.
        fisher, tokens, rank, dense_below, prior, structure, prediction: as asked for.
        prior_precision: delta, one number or one for each matrix.
        log_likelihood: of the training examples at the mean, nats; None without labels.
        evidence_before, evidence_after: log evidence at the prior precision that was given, and at
            the one that was chosen, nats; None without labels.
        effective_parameters: gamma, number of directions that the data determines.
        posterior_bytes: of what is kept.
        seconds: wall-clock time.
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
            f"{self.examples} examples; prior precision {shown}, {evidence}"
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
        title = f"{self.matrices} matrices, {self.parameters:,} weights, {self.examples} examples"
        return title, ("nats", "given prior", "chosen prior"), rows


@dataclass
class LaplacePosterior:
    """The posterior of a PEFT model's adapter: what `bayesianize(model, "laplace")` leaves there.

    Attributes:
        laplace: curvature, prior, evidence, draws of the weights: `bayes_kernels.laplace.Laplace`.
        layers: "all", "adapters" or "last".
        prediction: how `predict` gets from Gaussian logits to probabilities.
        choices: ids of the answer tokens, for logits of causal language models.
        report: as `bayesianize` returned it, as plain values.
    """

    laplace: Laplace
    layers: str
    prediction: str
    choices: list[int] | None
    report: dict[str, Any]


def laplace_posterior(model: nn.Module) -> LaplacePosterior | None:
    """The Laplace posterior of a model, wrapped or not; None where it has none."""
    for module in model.modules():
        if isinstance(module, PeftModel):
            return module.__dict__.get(_ATTRIBUTE)
    return None


def _need_posterior(model: nn.Module, op: str) -> LaplacePosterior:
    found = laplace_posterior(model)
    if found is None:
        raise ValueError(
            f"{op}: the model must have a Laplace posterior, got none; call "
            "bayesianize(model, 'laplace', data)"
        )
    return found


def check_laplace_options(**options: Any) -> None:
    """Whether `laplace_` takes these options, which can be asked before an adapter is trained.

    Args:
        options: options of `laplace_`, where missing its defaults; data, `validation` and what else
            says how to go through them are not looked at.

    Raises:
        ValueError: an option is out of range; the message says which.
    """
    options = {**default_options(laplace_), **options}
    for option, allowed in (
        ("layers", LAYERS),
        ("fisher", FISHERS),
        ("tokens", TOKENS),
        ("prior", (None, *PRIORS)),
        ("structure", STRUCTURES),
        ("prediction", METHODS),
        ("jacobian", JACOBIANS),
    ):
        value = options[option]
        if value not in allowed:
            raise ValueError(f"laplace_: {option} must be one of {allowed}, got {value!r}")
    for option in ("rank", "dense_below", "mc_samples", "n_samples"):
        count = options[option]
        if option == "rank" and count is None:
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


def laplace_(
    model: nn.Module,
    data: Any,
    *,
    layers: str = "all",
    fisher: str = "ggn",
    tokens: str = "expand",
    rank: int | None = 10,
    dense_below: int = 512,
    mc_samples: int = 1,
    prior_precision: float = 1.0,
    prior: str | None = None,
    structure: str = "scalar",
    validation: Any = None,
    prediction: str = "mc",
    jacobian: str = "vmap",
    n_samples: int = 1000,
    seed: int = 0,
    choices: Sequence[int] | None = None,
    batch_size: int = 16,
    collate_fn: Any = None,
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
            needed for fisher "empirical" and for the evidence as a number, not for its optimum.
        layers: what gets a posterior. "all": the factors A and B of all adapted layers and the linear
            layers of a head that was trained with them (`modules_to_save`); "adapters": the factors
            only; "last" (LLLA): what acts on the logits directly: the factors of an adapted output
            head, else the last linear layer of a trained head, else the factors of the last adapted
            block.
        fisher, mc_samples: "ggn", exact with C - 1 backward passes for each batch; "mc", labels drawn
            from the model; "empirical".
        tokens: what a sequence contributes: "expand", "sum", "sum_padded" (both as the paper's code,
            without padding and with it), "reduce" or "last", see `Laplace`.
        rank, dense_below: columns of low-rank factors; sides with fewer entries have dense ones.
            rank=None: dense factors everywhere.
        prior_precision: delta at the start, and the one that is kept for prior "fixed".
        prior: how delta is chosen: "mackay" or "gradient" by the evidence, "validation" by the
            likelihood of held-out examples, "fixed" not at all. None: "validation" where there are
            such examples and structure is "scalar", else "mackay". The evidence takes the size of
            the weights for that of the prior, which without weight decay can be far too wide for all
            layers together: docs/laplace.md.
        structure: "scalar", one delta; "layer", one for each matrix.
        validation: held-out examples with labels, for prior "validation": one prediction of them.
        prediction: from Gaussian logits to probabilities: "mc", "mc_independent", "quadrature" (two
            classes), "probit", "bridge"; or "weights", draws of the weights without linearisation.
        jacobian: "vmap" or "repeat", see `Laplace`.
        n_samples, seed: draws, for prior "validation" and fisher "mc".
        choices: ids of the answer tokens, for causal language models; see `predict`.
        batch_size, collate_fn: for a data set.
        progress: write the memory estimate to stderr before anything runs, and show a bar where it
            takes longer than two seconds.

    Returns:
        `LaplaceLoraReport`. Cost: one pass over the data with C - 1 backward passes ("ggn") that compute
        no gradient of a weight; memory as the estimate says.

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
    begin = time.perf_counter()
    peft_model, name = the_adapter("laplace_", model)
    if choices is None:
        need_classes("laplace_", model)
    with as_before_if_stopped(peft_model):
        make_plain(peft_model, name)
        found = _build(
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
        before = float(found.log_marginal_likelihood()) if labelled else None
        if prior == "validation":
            held_out = list(as_batches(validation, batch_size, collate_fn))
            found.optimize_prior_precision(
                "validation",
                loader=held_out,
                grid=_GRID,
                refine=0,
                prediction="mc" if prediction == "weights" else prediction,
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
        )
        chosen = None if choices is None else [int(c) for c in choices]
        kept = LaplacePosterior(found, layers, prediction, chosen, report.to_dict())
        vars(peft_model)[_ATTRIBUTE] = kept
        return report


def check_laplace_model(model: nn.Module, layers: str = "all", **others: Any) -> None:
    """Whether the adapter of a PEFT model, trained or not, has layers for `laplace_`.

    Raises:
        ValueError: as `laplace_`.
    """
    peft_model, name = the_adapter("laplace_", model)
    _layers(peft_model, name, layers)


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

    def predict(
        self,
        batch: Mapping[str, Any],
        *,
        n_samples: int,
        seed: int,
        choices: Sequence[int] | None,
        return_samples: bool,
        **memory: Any,
    ) -> Prediction:
        """As `bayes_kernels.hf.predict`; memory does not depend on the number of draws.

        Raises:
            ValueError: the head has no classes, the choices are not those of the posterior, or draws
                are to be returned where there are none.
        """
        found, method = self.posterior.laplace, self.posterior.prediction
        if choices is None:
            need_classes("predict", self.model)
        elif [int(c) for c in choices] != self.posterior.choices:
            raise ValueError(
                "predict: choices must be those of the Laplace posterior, "
                f"{self.posterior.choices}, or None, got {list(choices)}"
            )
        labels, inputs = labels_of(batch), inputs_of(batch)
        labels = None if labels is None else labels.cpu()
        if return_samples and n_samples and method not in ("mc", "mc_independent"):
            raise ValueError(
                f"predict: return_samples must be False where prediction is {method!r}, which has no "
                "draws of logits; use prediction='mc'"
            )
        if n_samples == 0:
            return mean_prediction(found.mean_logits(inputs), labels, keep=return_samples)
        if method == "weights":
            drawn = found.predict(inputs, method="weights", n_samples=n_samples, seed=seed)
            return Prediction(
                log_probs=drawn.log_probs.double().cpu(),
                entropy=drawn.entropy.double().cpu(),
                expected_entropy=drawn.expected_entropy.double().cpu(),
                n_samples=n_samples,
                labels=labels,
            )
        mean, cov = found.logits(inputs)
        if method == "mc_independent":
            method, cov = "mc", cov.diagonal(dim1=1, dim2=2).contiguous()
        return gaussian_prediction(
            mean, cov, labels, n_samples=n_samples, seed=seed, method=method, keep=return_samples
        )


def laplace_predictor(model: nn.Module) -> LaplacePredictor | None:
    """The predictor of a model with a Laplace posterior; None for other models."""
    found = laplace_posterior(model)
    return None if found is None else LaplacePredictor(model, found)


@contextlib.contextmanager
def drawn_weights(model: nn.Module, seed: int = 0, index: int = 0) -> Iterator[None]:
    """The model with draw number `index` of the Laplace posterior in place of its weights.

    The trained weights come back at the end. Draws are known to fit worse than the linearised model
    that `predict` uses (Immer et al., arXiv 2008.08400); they are for looking at.

    Raises:
        ValueError: the model has no Laplace posterior, or its weights have changed since.
    """
    found = _need_posterior(model, "drawn_weights")
    with found.laplace.sampled(seed, index):
        yield


# --- folders -------------------------------------------------------------------------------------


def save_laplace(model: nn.Module, folder: str | Path) -> Path:
    """Write the Laplace posterior of a model beside its adapter, as `laplace.safetensors`.

    The adapter itself is what `model.save_pretrained(folder)` writes, which stock PEFT loads. The
    file holds eigenvectors and eigenvalues, a digest of the weights they belong to, and in its header
    how they were made. Readers see the old file or the whole new one.

    Returns:
        The file.

    Raises:
        ValueError: the model has no Laplace posterior, or its adapter has changed since.
    """
    found = _need_posterior(model, "save_laplace")
    state = {name: value.cpu() for name, value in found.laplace.state_dict().items()}
    header = {
        "format": FORMAT,
        "layers": found.layers,
        "prediction": found.prediction,
        "choices": found.choices,
        "jacobian": found.laplace.jacobian,
        "seed": found.laplace.seed,
        "report": found.report,
    }
    path = Path(folder) / LAPLACE_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        save_file(state, temporary, metadata={"format": "pt", "bayes_kernels": json.dumps(header)})
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def load_laplace(model: nn.Module, folder: str | Path) -> LaplacePosterior:
    """Read the posterior that `save_laplace` wrote, for the adapter of the same folder.

    Args:
        model: the adapter on its base model, as `PeftModel.from_pretrained(base, folder)` loads it.
        folder: the folder, or the file.

    Returns:
        The posterior, which the model has from now on.

    Raises:
        ValueError: there is no such file, it is damaged, or it belongs to other weights: the adapter
            was trained again since.
    """
    path = Path(folder)
    path = path / LAPLACE_FILE if path.is_dir() else path
    if not path.is_file():
        raise ValueError(
            f"load_laplace: expected {LAPLACE_FILE} in {str(folder)!r}, found none; make it with "
            "bayesianize(model, 'laplace', data) and save_laplace"
        )
    header, state = _read(path)
    report, layers = header["report"], header["layers"]
    prediction, choices = header["prediction"], header["choices"]
    options = {name: report[name] for name in ("fisher", "tokens", "rank", "dense_below")}
    options.update(jacobian=header["jacobian"], seed=header["seed"])
    peft_model, name = the_adapter("load_laplace", model)
    if isinstance(peft_model.base_model, BayesLoraModel):
        raise ValueError(
            "load_laplace: the adapter must be plain LoRA, got a Bayesian one; load the folder's own "
            "adapter with PeftModel.from_pretrained"
        )
    found = _build(peft_model, name, layers, choices, **options)
    try:
        found.load_state_dict(state)
    except ValueError as error:
        raise ValueError(
            f"load_laplace: {path} does not belong to this adapter: {error}; run bayesianize again"
        ) from None
    posterior = LaplacePosterior(found, layers, prediction, choices, report)
    peft_model.__dict__[_ATTRIBUTE] = posterior
    return posterior


def laplace_method(folder: str | Path) -> str | None:
    """The method of the posterior in an adapter folder, "laplace" or "laplace-last"; None without.

    Raises:
        ValueError: the file is damaged.
    """
    path = Path(folder) / LAPLACE_FILE
    if not path.is_file():
        return None
    return "laplace-last" if _read(path)[0]["layers"] == "last" else "laplace"


_HEADER = ("layers", "prediction", "choices", "jacobian", "seed", "report")


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors of a file of `save_laplace`."""
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})["bayes_kernels"])
            state = {key: file.get_tensor(key) for key in file.keys()}
        if header["format"] != FORMAT or any(name not in header for name in _HEADER):
            raise ValueError(f"a header of format {header['format']!r}, not {FORMAT}")
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"load_laplace: {path} must be what save_laplace wrote, got {error!r}"
        ) from None
    return header, state


# --- layers --------------------------------------------------------------------------------------


def _adapted(peft_model: PeftModel, name: str) -> list[tuple[str, Any]]:
    """Adapted layers, by name in the base model, whose factors are linear layers."""
    found = adapted_layers(peft_model, name)
    for key, layer in found:
        if name in getattr(layer, "lora_embedding_A", ()):
            raise ValueError(f"laplace_: layer {key} cannot have a posterior: it is an embedding")
        variant = layer.lora_variant.get(name)
        parts = (layer.lora_A[name], layer.lora_B[name])
        plain = variant is None or isinstance(variant, BayesVariant)
        if not plain or not all(isinstance(part, nn.Linear) for part in parts):
            kind = type(variant if not plain else parts[0]).__name__
            raise ValueError(
                f"laplace_: layer {key} cannot have a posterior: it is no product of two linear "
                f"layers ({kind})"
            )
    return found


def _factors(key: str, layer: Any, name: str) -> list[Layer]:
    a, b = layer.lora_A[name], layer.lora_B[name]
    return [
        Layer(f"{key}.lora_A", a, a.weight, gate=b.weight),
        Layer(f"{key}.lora_B", b, b.weight, gate=a.weight),
    ]


def _ones(x: Tensor) -> Tensor:
    return x.new_ones(*x.shape[:-1], 1)


def _head_layers(peft_model: PeftModel, name: str) -> list[list[Layer]]:
    """Weight and bias of each linear layer of heads that were trained with the adapter."""
    tuner: Any = peft_model.base_model
    found = []
    for key, wrapper in tuner.model.named_modules():
        if not isinstance(wrapper, ModulesToSaveWrapper) or name not in wrapper.modules_to_save:
            continue
        for part, module in wrapper.modules_to_save[name].named_modules():
            if not isinstance(module, nn.Linear):
                continue
            full = f"{key}.{part}" if part else key
            pair = [Layer(f"{full}.weight", module, module.weight)]
            if module.bias is not None:
                pair.append(Layer(f"{full}.bias", module, module.bias, _ones))
            found.append(pair)
    return found


def _layers(peft_model: PeftModel, name: str, which: str) -> list[Layer]:
    adapted, heads = _adapted(peft_model, name), _head_layers(peft_model, name)
    if which == "last":
        adapted, heads = _last(peft_model, adapted, heads)
    layers = [factor for key, layer in adapted for factor in _factors(key, layer, name)]
    if which != "adapters":
        layers += [layer for pair in heads for layer in pair]
    if not layers:
        raise ValueError("laplace_: the adapter must have linear layers, got none")
    return layers


def _last(
    peft_model: PeftModel, adapted: list[tuple[str, Any]], heads: list[list[Layer]]
) -> tuple[list[tuple[str, Any]], list[list[Layer]]]:
    """What acts on the logits directly, or is next to that."""
    base: Any = peft_model.get_base_model()
    try:
        output = base.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        output = None
    at_output = [(key, layer) for key, layer in adapted if layer is output]
    if at_output:
        return at_output, []
    if heads:
        return [], heads[-1:]
    numbers = {key: [int(n) for n in re.findall(r"\.(\d+)(?=\.)", key)][:1] for key, _ in adapted}
    top = max(numbers.values(), default=[])
    return [(key, layer) for key, layer in adapted if numbers[key] == top], []


def _build(
    peft_model: PeftModel, name: str, which: str, choices: Sequence[int] | None, **options: Any
) -> Laplace:
    trained = [t for key, layer in _adapted(peft_model, name) for t in _factors(key, layer, name)]
    trained += [layer for pair in _head_layers(peft_model, name) for layer in pair]
    return Laplace(
        peft_model,
        _layers(peft_model, name, which),
        forward=functools.partial(forward_logits, choices=choices),
        split=split,
        depends_on=[layer.weight for layer in trained],
        **options,
    )


def forget_laplace(model: nn.Module) -> None:
    """Take the Laplace posterior off a model; nothing where it has none."""
    for module in model.modules():
        if isinstance(module, PeftModel):
            module.__dict__.pop(_ATTRIBUTE, None)


def _method(name: str, title: str, **fixed: Any) -> Method:
    return Method(
        name,
        title,
        n_samples=1000,
        predictor=laplace_predictor,
        conversion=Conversion(
            laplace_,
            check_laplace_options,
            check_laplace_model,
            "the training examples",
            fixed=fixed,
        ),
        files=(LAPLACE_FILE,),
        save=save_laplace,
        load=load_laplace,
        stored=lambda folder: laplace_method(folder) == name,
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
