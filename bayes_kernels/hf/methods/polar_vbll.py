"""A variational Bayesian last layer in place of a classifier's: the "VBLL" of PoLAR-VBLL.

The last linear layer of a sequence classifier, or the answer-token head of a causal language model
(`bayes_kernels.hf.heads.trim_head`), becomes a `bayes_kernels.vbll.VBLLClassification` whose mean
rows start at the rows of that layer. A plain forward pass gives the mean logits, so that stock code
goes on working; PEFT trains, saves and loads the head as one of its `modules_to_save`.

`bayes_kernels.hf.last_layer` has the loss and the logits.

Sources: Harrison, Willes and Snoek, "Variational Bayesian Last Layers", arXiv 2404.11599; Xiang, Li
and Lu, "PoLAR-VBLL", arXiv 2604.03388.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from ...batches import eval_mode, inputs_of, labels_of, to_device
from ...vbll import COVARIANCES, LaplaceReport, VBLLClassification
from ..config import option
from ..draws import Sampling, Step
from ..last_layer import (
    class_features,
    class_logits,
    find_head,
    loss_and_logits,
    need_head,
)
from ..logits import Prediction, gaussian_prediction, mean_prediction, need_classes
from ..method import PAPERS, Method, Option
from ..variants import VariationalLoss
from .polar import PolarConfig, PolarTraining, PolarVariant


@dataclass
class PolarVbllConfig(PolarConfig, method="polar-vbll"):
    """Configuration of PoLAR-VBLL: PoLAR adapters below a variational Bayesian last layer.

    The published setting is r=8 on query and value projections of LLaMA-3.1-8B, 5,000 steps of batch
    4, a dense covariance for each class; learning rates, penalty and prior are not published.
    kl_weight=0.3 and head_lr=5e-3 were chosen on validation rows: docs/polar_vbll.md.

    Source: Xiang, Li and Lu, "PoLAR-VBLL", arXiv 2604.03388.
    """

    head_covariance: str = option(
        "diagonal",
        "Covariance of each class in the last layer: 'diagonal', 'dense' (C D^2 / 2 numbers) or "
        "'low_rank'.",
        choices=COVARIANCES,
    )
    head_rank: int = option(
        3,
        "Rank beside the diagonal for 'low_rank'.",
        least=1,
        needs={"head_covariance": ("low_rank",)},
    )
    head_init: str = option(
        "rows",
        "Mean rows at the start: 'rows' of the layer that is replaced (the first predictions are the "
        "base model's), or 'vbll', random as published.",
        choices=("rows", "vbll"),
    )
    head_init_variance: float | None = option(
        None,
        "Variance of a weight at the start, for 'rows'; None: a tenth of the prior's.",
        above=0,
        needs={"head_init": ("rows",)},
    )
    head_prior_scale: float | None = option(
        None,
        "The prior of a weight is N(0, 2 head_prior_scale / D); None: 1 until calibrate_head has set "
        "it, as the command line does.",
        above=0,
    )
    head_noise: bool = option(False, "Learn Gaussian noise on the logits.")
    head_lr: float | None = option(
        5e-3, "Learning rate of the last layer; None: as for the adapters.", above=0
    )
    kl_weight: float = option(
        0.3, "Factor of the divergence, which the loss divides by n_train.", least=0
    )
    alternation: str = option(
        "jacobi",
        "'jacobi' (one backward pass for adapters and last layer), 'gauss-seidel' (adapters see the "
        "last layer of the same step) or 'periodic' (one of the two at a time, in turns).",
        choices=("jacobi", "gauss-seidel", "periodic"),
    )
    alternation_period: int = option(
        1, "Steps of a turn for 'periodic'.", least=1, needs={"alternation": ("periodic",)}
    )
    refine: str | None = option(
        None,
        "How the covariances were refined after training.",
        choices=("cholesky", "subspace"),
        set_by="laplace_refine",
    )
    refine_rank: int = option(
        0, "Dimension in which they are stored.", least=0, set_by="laplace_refine"
    )


class PolarVbllTraining(PolarTraining):
    """The loss is the evidence lower bound; adapters and last layer may take turns.

    Raises:
        ValueError: the trainer has another loss, or options with which turns do not work.
    """

    logs_divergence = True

    def __init__(self, trainer: Any, config: PolarVbllConfig) -> None:
        super().__init__(trainer, config)
        self._features: Tensor | None = None  # of the micro-batch, where they are known
        if trainer.label_smoother is not None or trainer.compute_loss_func is not None:
            smooths = trainer.label_smoother is not None
            raise ValueError(
                f"BayesTrainer: {'label_smoothing_factor' if smooths else 'compute_loss_func'} must "
                "not be given with a variational last layer, whose loss is its evidence lower bound; "
                "leave it out"
            )
        if config.head_prior_scale is None:
            warnings.warn(
                "BayesTrainer: head_prior_scale is not set, and no scale of the last layer's prior "
                "serves all models; call calibrate_head(model, batch), or set head_prior_scale",
                stacklevel=3,
            )
        arguments = trainer.args
        accumulates = arguments.gradient_accumulation_steps != 1
        turns = config.alternation != "jacobi"
        if turns and (arguments.world_size > 1 or arguments.fp16 or accumulates):
            raise ValueError(
                f"BayesTrainer: alternation={config.alternation!r} needs one process, "
                "gradient_accumulation_steps=1 and no fp16 loss scaling; use 'jacobi'"
            )

    @property
    def _weight(self) -> float:
        trainer = self.trainer
        return 0.0 if trainer.kl_mode == "none" else trainer.kl_weight * self.config.kl_weight

    def loss(
        self, model: nn.Module, inputs: dict[str, Any]
    ) -> tuple[VariationalLoss, Tensor] | None:
        """The negative evidence lower bound, and the mean logits."""
        return loss_and_logits(
            model, inputs, self.trainer.n_train, self._weight, features=self._features
        )

    def logs(self) -> dict[str, float]:
        """The weight of the divergence in the loss."""
        return {"kl_weight": self._weight / self.trainer.n_train, **super().logs()}

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], step: Callable[[dict[str, Any]], Tensor]
    ) -> Tensor:
        """A step of adapters and last layer as `alternation` says."""
        if self.config.alternation == "jacobi":
            return step(inputs)
        trainer = self.trainer
        inputs = trainer._prepare_inputs(inputs)
        head = [p for module in PolarVbllVariant.modules(model) for p in module.parameters()]
        if self.config.alternation == "gauss-seidel":
            self._step_head(model, inputs, head)
            others = True
        else:
            others = trainer.state.global_step // self.config.alternation_period % 2 == 0
        if not others:  # nothing below the head needs gradients
            with torch.no_grad(), trainer.compute_loss_context_manager():
                model.train()
                self._features = class_features(model, inputs)
        try:
            loss = step(inputs)
        finally:
            self._features = None
        own = {id(p) for p in head}
        for parameter in model.parameters():
            if (id(parameter) in own) == others:
                parameter.grad = None
        return loss

    def _step_head(
        self, model: nn.Module, inputs: dict[str, Any], head: list[nn.Parameter]
    ) -> None:
        """Gauss-Seidel: step the last layer before the adapters see it; keeps the features."""
        model.train()
        trainer = self.trainer
        with trainer.compute_loss_context_manager():
            self._features = class_features(model, inputs)
            known = self._features.detach()
            terms, _ = loss_and_logits(model, inputs, trainer.n_train, self._weight, features=known)
        grads = torch.autograd.grad(terms.loss, head)
        for parameter, grad in zip(head, grads, strict=True):
            parameter.grad = grad
        # Only the head has gradients now, and an optimiser leaves the others alone.
        getattr(trainer.optimizer, "optimizer", trainer.optimizer).step()
        for parameter in head:
            parameter.grad = None


class PolarVbllVariant(PolarVariant, method="polar-vbll"):
    """PoLAR below a variational Bayesian last layer, which has the posterior."""

    replaces = "a variational last layer"
    module_tensors = (
        "log_scale",
        "factor",
        "scale_tril",
        "noise_log_scale",
        "laplace_tril",
        "laplace_basis",
        "laplace_variance",
    )
    training = PolarVbllTraining

    @classmethod
    def install(cls, model: nn.Module, config: PolarVbllConfig) -> None:
        """The last layer in place of the classifier's: `install_head`."""
        install_head(model, config)

    @classmethod
    def restore(cls, model: nn.Module) -> None:
        """Every VBLL head becomes the linear layer of its mean.

        The layer has the dtype of the model's first floating-point parameter, an embedding, which is
        the dtype of the features.
        """
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, VBLLClassification):
                    setattr(parent, name, plain_head(child, dtype))

    @classmethod
    def modules(cls, model: nn.Module, adapter: str | None = None) -> list[VBLLClassification]:
        """The last layer."""
        head = find_head(model, adapter)
        return [] if head is None else [head]

    @classmethod
    def to_plain(cls, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`weight_mean` becomes `weight`."""
        found = dict(tensors)
        for key in tensors:
            prefix, _, leaf = key.rpartition(".")
            if leaf == "weight_mean":
                found[f"{prefix}.weight"] = found.pop(key)
                for other in cls.module_tensors:
                    found.pop(f"{prefix}.{other}", None)
        return found

    @classmethod
    def from_plain(cls, tensors: Mapping[str, Tensor], slots: Container[str]) -> dict[str, Tensor]:
        """A linear layer's `weight` becomes the mean."""
        found = {}
        for key, value in tensors.items():
            mean = f"{key}_mean"
            found[mean if key not in slots and mean in slots else key] = value
        return found


# --- Placing the head ----------------------------------------------------------------------------


def install_head(model: Any, config: PolarVbllConfig) -> None:
    """Put a VBLL head where the model's last linear layer is, in place, and have PEFT train it.

    A head that is there serves further adapters too: each gets a copy.

    Args:
        model: a sequence classifier of transformers, or a causal model with a trimmed head.
        config: options of the head; its `modules_to_save` gets the head's module.

    Raises:
        ValueError: the model has no such layer, its head gives numbers or independent labels, or a
            head with other options is there.
    """
    need_classes("PolarVbllConfig", model)
    top, owner, name, layer = _locate(model)
    config.modules_to_save = [*dict.fromkeys([*(config.modules_to_save or []), top])]
    if isinstance(layer, VBLLClassification):
        wanted = _options(config)
        given = {key: getattr(layer, key) for key in ("covariance", "rank")}
        given["noise"] = layer.noise_log_scale is not None
        wanted["init"], given["init"] = config.head_init, getattr(layer, "start", config.head_init)
        if any(given[key] != wanted[key] for key in given):
            raise ValueError(
                f"PolarVbllConfig: adapters of one model must share the last layer's options, got "
                f"{ {key: wanted[key] for key in given} } beside {given}; use the same"
            )
        _prepare_template(layer, config)
        return
    # Drawn on the CPU from a private generator: the global one stays where it is.
    generator = torch.Generator().manual_seed(config.seed)
    d, classes = layer.in_features, layer.out_features
    options = _options(config)
    options["rank"] = options["rank"] or 1
    head = VBLLClassification(
        d,
        classes,
        bias=layer.bias is not None,
        prior_scale=1.0 if config.head_prior_scale is None else config.head_prior_scale,
        generator=generator,
        **options,
    )
    if head.weight_mean.is_meta:  # PEFT loads an adapter with empty weights
        head.to_empty(device="cpu").reset_parameters(generator)
    if config.head_init == "rows":
        variance = config.head_init_variance or 0.1 * head.prior_variance
        weight, bias = layer.weight.detach().cpu(), layer.bias
        bias = None if bias is None else bias.detach().cpu()
        head.init_from(weight, bias, variance=variance, generator=generator)
    marked: Any = head
    marked.start = config.head_init  # which further adapters must share
    _make_room(head, config)
    setattr(owner, name, head.to(layer.weight.device))


def _prepare_template(head: VBLLClassification, config: PolarVbllConfig) -> None:
    """Bring the head that a further adapter copies to that adapter's prior and start."""
    scale = 1.0 if config.head_prior_scale is None else config.head_prior_scale
    head.prior_variance = 2.0 * scale / head.in_features
    if config.head_init == "rows":
        _start_again(head, config)
    _make_room(head, config)


def _start_again(head: VBLLClassification, config: PolarVbllConfig) -> None:
    """Give the covariances their first values, for the head's means and its prior."""
    variance = config.head_init_variance or 0.1 * head.prior_variance
    generator = torch.Generator().manual_seed(config.seed)
    bias = None if head.bias is None else head.bias.clone()
    head.init_from(head.weight_mean.clone(), bias, variance=variance, generator=generator)


def _make_room(head: VBLLClassification, config: PolarVbllConfig) -> None:
    """Buffers for the Laplace covariances that are loaded next; none for a head without."""
    head.laplace_tril = head.laplace_basis = head.laplace_variance = None
    if config.refine is None:
        return
    rank, like = config.refine_rank, head.weight_mean.detach()
    head.laplace_tril = like.new_zeros(head.n_classes, rank * (rank + 1) // 2)
    if config.refine == "subspace":
        head.laplace_basis = like.new_zeros(rank, head.in_features)
        head.laplace_variance = like.new_ones(())


def _options(config: PolarVbllConfig) -> dict[str, Any]:
    low_rank = config.head_covariance == "low_rank"
    return {
        "covariance": config.head_covariance,
        "rank": config.head_rank if low_rank else 0,
        "noise": config.head_noise,
    }


def _locate(model: Any) -> tuple[str, Any, str, Any]:
    """Name of the module that PEFT saves, and where the layer with the classes is in it."""
    kind = type(model).__name__
    top = None
    if hasattr(model, "answer_ids"):
        output = model.get_output_embeddings()
        top = next(name for name, module in model.named_modules() if module is output)
    elif not kind.endswith("ForMultipleChoice") and "MultipleChoice" not in kind:
        top = next((name for name in ("classifier", "score") if hasattr(model, name)), None)
    if top is None:
        raise ValueError(
            f"PolarVbllConfig: the model must be a sequence classifier, or a causal model with a "
            f"trimmed head, got {kind}; load it with AutoModelForSequenceClassification or with "
            "bayes_kernels.hf.tasks.models.load_model, or use PolarConfig"
        )
    parent, _, leaf = top.rpartition(".")
    owner, name = model.get_submodule(parent), leaf
    if isinstance(getattr(owner, name), ModulesToSaveWrapper):
        owner, name = getattr(owner, name), "original_module"
    inner = getattr(owner, name)
    if not isinstance(inner, (nn.Linear, VBLLClassification)):
        layers = [
            path
            for path, module in inner.named_modules()
            if isinstance(module, (nn.Linear, VBLLClassification))
        ]
        if layers:
            parent, _, name = layers[-1].rpartition(".")
            owner = inner.get_submodule(parent)
    layer = getattr(owner, name)
    fits = isinstance(layer, VBLLClassification) or (
        isinstance(layer, nn.Linear)
        and layer.weight.is_floating_point()
        and layer.out_features >= 2
    )
    if not fits:
        raise ValueError(
            f"PolarVbllConfig: the last layer must be a floating-point nn.Linear with at least two "
            f"classes, got {layer} in {top!r}; leave it out of quantisation"
        )
    return top, owner, name, layer


def plain_head(head: VBLLClassification, dtype: torch.dtype = torch.float32) -> nn.Linear:
    """The linear layer that gives the head's mean logits."""
    bias = head.bias is not None
    layer = nn.Linear(head.in_features, head.n_classes, bias=bias, device="meta")
    layer.weight = nn.Parameter(head.weight_mean.detach().to(dtype, copy=True))
    if head.bias is not None:
        layer.bias = nn.Parameter(head.bias.detach().to(dtype, copy=True))
    return layer


# --- Calibration ------------------------------------------------------------------------------------


@torch.no_grad()
def calibrate_head(
    model: nn.Module, batch: Mapping[str, Any], *, logit_variance: float = 0.25
) -> float:
    """Set the prior of a new head from the size of the model's features, before training.

    Norms of features differ by orders of magnitude between models (1.6 for the pooled output of
    MiniLM with D = 384, 7,400 for the final norm of a small Llama with D = 192), so that no scale of
    the prior serves all. This one gives a logit the same variance a priori:

        q = logit_variance / mean ||phi||^2,  head_prior_scale = q D / 2

    which goes into the configuration. Covariances start again at a tenth of the prior's, unless the
    configuration says otherwise.

    Args:
        model: a PeftModel with an active, untrained VBLL head.
        batch: some training examples as tensors, the same in every process.
        logit_variance: chosen on validation rows.

    Returns:
        head_prior_scale.

    Raises:
        ValueError: there is no VBLL head, it is not new (refined, or head_prior_scale is set), or
            logit_variance is not positive.
    """
    head = need_head(model, "calibrate_head")
    if not logit_variance > 0:
        raise ValueError(f"calibrate_head: logit_variance must be positive, got {logit_variance}")
    config = _config(model)
    if head.refined or config.head_prior_scale is not None:
        raise ValueError(
            f"calibrate_head: the head must be new, got "
            f"{'one with Laplace covariances' if head.refined else ''}"
            f"{'' if head.refined else f'head_prior_scale={config.head_prior_scale:.4g}'}; call it "
            "once, before training, and leave head_prior_scale out"
        )
    with eval_mode(model):
        features = class_features(model, to_device(batch, head.weight_mean.device)).float()
    head.prior_variance = logit_variance / max(float(features.square().sum(1).mean()), 1e-12)
    config.head_prior_scale = head.prior_variance * head.in_features / 2
    if config.head_init == "rows" and config.head_init_variance is None:
        _start_again(head, config)
    return config.head_prior_scale


# --- Laplace refinement --------------------------------------------------------------------------


@torch.no_grad()
def laplace_refine(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    prior_variance: float | None = None,
    method: str = "auto",
) -> LaplaceReport:
    """Replace the last layer's covariances by its exact Laplace ones, class by class, after training.

        Sigma_c = (sum_i p_ic (1 - p_ic) phi_i phi_i^T + I / q)^-1

    One pass over the training data in eval mode. The mean stays, so that the plain prediction does;
    no evidence lower bound describes the result, and training on is refused (`discard_laplace`).

    Args:
        model: a PeftModel with an active VBLL head.
        batches: training data: mappings of tensors.
        prior_variance: q; None for the head's.
        method: "auto", "cholesky" or "subspace", see `VBLLClassification.laplace_refine`.

    Returns:
        What was done.

    Raises:
        ValueError: there is no VBLL head, or no data.

    Source: Xiang, Li and Lu, "PoLAR-VBLL", arXiv 2604.03388.
    """
    head = need_head(model, "laplace_refine")

    def pairs() -> Iterator[tuple[Tensor, Tensor]]:
        for batch in batches:
            moved = to_device(batch, head.weight_mean.device)
            features = class_features(model, moved)
            mean, _ = class_logits(model, moved, features)
            yield features, mean.double().softmax(1)

    head.discard_refinement()
    with eval_mode(model):
        report = head.laplace_refine(pairs(), prior_variance=prior_variance, method=method)
    _record(model, report.method, report.rank)
    return report


def discard_laplace(model: nn.Module) -> None:
    """Go back to the covariances that were trained.

    Raises:
        ValueError: there is no VBLL head.
    """
    need_head(model, "discard_laplace").discard_refinement()
    _record(model, None, 0)


def _record(model: Any, method: str | None, rank: int) -> None:
    """Into the configuration, from which a loaded adapter knows the shapes."""
    config = _config(model)
    config.refine, config.refine_rank = method, rank


def _config(model: Any) -> PolarVbllConfig:
    return model.peft_config[model.active_adapter]


# --- Prediction ----------------------------------------------------------------------------------


class LastLayerDraws:
    """Predicts with draws of the logits: one pass of the model, whatever their number.

    Args:
        model: a model with an active VBLL head.
    """

    draws = True
    texts = None

    def __init__(self, model: nn.Module) -> None:
        self.model = model

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
            ValueError: there are choices, which the last layer already has, or as `class_features`.
        """
        (step,) = self._steps(
            batch, [Sampling(n_samples)], seed=seed, choices=choices, return_samples=return_samples
        )
        assert isinstance(step.prediction, Prediction)
        return step.prediction

    def several(
        self, batch: Mapping[str, Any], samplings: Sequence[Sampling], **options: Any
    ) -> Iterator[Step]:
        """As `Predictor.several`: one pass for all of them."""
        return self._steps(batch, samplings, **options)

    def _steps(
        self,
        batch: Mapping[str, Any],
        samplings: Sequence[Sampling],
        *,
        seed: int,
        choices: Sequence[int] | None,
        return_samples: bool,
        **others: Any,
    ) -> Iterator[Step]:
        labels = labels_of(batch)
        if choices is not None:
            raise ValueError(
                f"predict: choices must be None for a model whose last layer has the classes, got "
                f"{list(choices)}"
            )
        inputs = to_device(inputs_of(batch), next(self.model.parameters()).device)
        with eval_mode(self.model):
            mean, variance = class_logits(self.model, inputs)
        labels = None if labels is None else labels.cpu()
        if len(samplings) > 1:
            yield Step(None)
        for i, one in enumerate(samplings):
            if one.n_samples == 0:
                yield Step(i, mean_prediction(mean, labels, keep=return_samples))
                continue
            found = gaussian_prediction(
                mean,
                variance,
                labels,
                n_samples=one.n_samples,
                seed=seed,
                keep=return_samples,
            )
            yield Step(i, found)


def last_layer_predictor(model: nn.Module) -> LastLayerDraws | None:
    """The predictor of a model with an active VBLL head; None for other models."""
    return None if find_head(model) is None else LastLayerDraws(model)


def _prior(config: Mapping[str, Any]) -> str:
    """The prior in words."""
    return f"on the last layer, head_prior_scale = {config.get('head_prior_scale') or 1.0}"


def _before_training(model: nn.Module, batch: Mapping[str, Any]) -> None:
    """Set the prior of a new head, unless the configuration has it."""
    if _config(model).head_prior_scale is None:
        calibrate_head(model, batch)


def _after_training(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], *, refine: bool = False
) -> None:
    """Refine the covariances where that is asked for."""
    if refine:
        laplace_refine(model, batches)


# Steps, batch, rank, layers and the dense covariance are the paper's; its output layer is the Bayesian
# one here. It gives no rates: that of the adapters is the default, penalty and clipping are of PoLAR's code.
PUBLISHED = {
    **PAPERS,
    "target_modules": ("q_proj", "v_proj"),
    "lr": 2e-3,
    "max_grad_norm": 1.0,
    "options": {"head_covariance": "dense", "stiefel": "landing", "stiefel_penalty": 5e-3},
}

METHOD = Method(
    "polar-vbll",
    "PoLAR-VBLL",
    PolarVbllConfig,
    published=PUBLISHED,
    n_samples=1000,
    lr=2e-3,
    predictor=last_layer_predictor,
    prior=_prior,
    before_training=_before_training,
    after_training=_after_training,
    training_options=(
        Option(
            "refine",
            "true or false",
            False,
            "Replace the last layer's covariances by its exact Laplace ones after training.",
        ),
    ),
)

__all__ = ["METHOD", "PolarVbllConfig", "calibrate_head", "discard_laplace", "laplace_refine"]
