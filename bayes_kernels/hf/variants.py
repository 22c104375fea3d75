"""The maths of Bayesian adapters inside PEFT's LoRA layers.

A method has one subclass of :class:`BayesVariant`, which enters :data:`VARIANTS`, and one row in
`bayes_kernels.hf.method.METHODS`. All methods share what is here: names and noise streams, which
weights a pass uses, rows of a draw, tensors beside the factors, merging the posterior mean.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Container, Iterator, Mapping, MutableMapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

import torch
from peft.tuners.lora.layer import LoraVariant
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from .. import functional, random, reference
from ..functional.arguments import autocast_input, transformed
from ..optim import KLSchedule
from .experts import Routed
from .targets import View, as_linear, factor_parameters, with_factors

if TYPE_CHECKING:
    from .config import BayesLoraConfig
    from .noise import NoiseState


class BayesLayer(NamedTuple):
    """One adapted layer: module name, PEFT layer, adapter name and its variant."""

    name: str
    layer: Any
    adapter: str
    variant: BayesVariant

    @property
    def mean(self) -> nn.Parameter:
        """`lora_A.weight`, (r, in): for BLoB and TFB the posterior mean of A.

        Of a convolution (r, channels, *kernel).
        """
        return factor_parameters(self.layer, self.adapter)[0]

    @property
    def view(self) -> Any:
        """The layer for hooks that ask for parameters: an embedding's have the names of a linear layer's."""
        return with_factors(self.layer)

    @property
    def in_features(self) -> int:
        """n, columns of A; 1 for an embedding, whose inputs are one-hot."""
        return as_linear(self.layer).in_features

    @property
    def rho(self) -> nn.Parameter:
        """BLoB, TFB: parameter of the deviation of A, of its shape or (r, 1), fp32."""
        return self.tensor(self.variant.deviation)

    def tensor(self, name: str) -> nn.Parameter:
        """A tensor that the method has beside the factors, by its name."""
        return getattr(self.layer, name)[self.adapter]

    def factors(self, draw: int | None = None, seed: int = 0) -> tuple[Tensor, Tensor]:
        """(A, B) of the plain LoRA adapter that is the mean, or the draw of that number."""
        layer = as_linear(self.layer)
        if draw is None:
            return self.variant.mean_factors(layer, self.adapter)
        key = random.key(seed, self.mean.device)
        with torch.no_grad():
            return self.variant.draw_factors(layer, self.adapter, key, draw)


class Divergence(NamedTuple):
    """One layer's term of `gaussian_kl`: terms of all layers are summed in one launch."""

    mean: Tensor
    rho: Tensor
    prior_std: float
    std: str = "square"
    direction: str = "elbo"


class KLPlan(NamedTuple):
    """What a decoupled KL step knows about the run: see `bayes_kernels.hf.decoupled_kl`.

    Attributes:
        schedule: step sizes. Those of "auto" are shares of the run: each layer has its own total.
        weight: factor of the divergence; 1 where the schedule's rate has it already.
        lr_sum: sum of the main optimiser's learning rates over the run.
        n_train: terms that the loss averages.
        starts: `BayesVariant.kl_starts` at the beginning of the run.
        given: whether the caller gave the schedule: its own total then holds, also for "auto".
    """

    schedule: KLSchedule
    weight: float
    lr_sum: float
    n_train: int
    starts: Sequence[float]
    given: bool


class KLStep(Protocol):
    """A decoupled step on the divergence of all layers, taken after each optimiser step."""

    schedule: KLSchedule

    def step(self, lr_factor: float = 1.0, step: int | None = None) -> float:
        """Take the step of the schedule; returns its size."""
        ...


class VariationalLoss(NamedTuple):
    """Terms of the negative evidence lower bound.

    Attributes:
        loss: nll + kl_weight / n_train * kl, to be minimised.
        nll: mean over the batch of the negative Jensen bound of E log p(y): at least the expected
            negative log-likelihood.
        kl: divergence of the last layer from its prior, nats; with learned noise less the log
            density of its hyperprior.
    """

    loss: Tensor
    nll: Tensor
    kl: Tensor


class TrainingHooks:
    """What a method changes in training. This class changes nothing.

    `BayesTrainer` makes one for its adapter, of the class `BayesVariant.training`.

    Class attributes:
        logs_divergence: whether the training logs have the divergence and the evidence lower bound.

    Args:
        trainer: a `BayesTrainer`.
        config: configuration of its active adapter.

    Raises:
        ValueError: options of the trainer do not go with the method.
    """

    logs_divergence: ClassVar[bool] = True

    def __init__(self, trainer: Any, config: Any) -> None:
        self.trainer, self.config = trainer, config

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer | None:
        """The method's optimiser, used unless the trainer is given one; None for the stock one."""
        return None

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], step: Callable[[dict[str, Any]], Tensor]
    ) -> Tensor:
        """Take one micro-batch and return its loss. `step(inputs)` is the stock step."""
        return step(inputs)

    def loss(
        self, model: nn.Module, inputs: dict[str, Any]
    ) -> tuple[VariationalLoss, Tensor] | None:
        """The loss of a micro-batch and its logits; None to use the model's loss."""
        return None

    def logs(self) -> dict[str, float]:
        """Further entries for the training logs."""
        return {}


# By method; a class enters itself. `bayes_kernels.hf` imports the modules of all methods.
VARIANTS: dict[str, type[BayesVariant]] = {}


class BayesVariant(LoraVariant):
    """A Bayesian adapter in one LoRA layer of PEFT.

    An instance belongs to one layer and one adapter. All layers of a model share `state`. A method
    is a subclass, `class XVariant(BayesVariant, method="x")`. It overrides `adapted` (the formula)
    and the other hooks that it needs.

    Class attributes:
        parameters: names of trainable tensors beside the factors; they begin with "lora_". Each is a
            `ParameterDict` of the layer; PEFT trains, saves, moves and deletes it with the adapter.
            `initial` may leave out tensors that a configuration does not need.
        constants: the same for tensors that are saved but not trained.
        fp32: names of tensors that stay fp32 when the model is cast; may include "lora_A", "lora_B".
        trained: whether `BayesTrainer` trains such an adapter. False: a trained one is converted.
        samples: whether the adapter's weights have draws. False: every mode is the mean.
        deviation: name of the parameter of the deviation of A, where A is random.
        scope: which rows share noise in training: "token", "example" or "none".
        draw_scopes: scopes that `posterior` has for the adapter's draws.
        replaces: what the method puts in place of a module of the base model, in words. Adapters with
            and without it cannot share a model.
        module_tensors: tensors of these modules that a plain module lacks: last parts of their names.
        training: what the method changes in training.
        targets: kinds of layers that the adapter can sit on, of `targets.LAYER_KINDS`; for embeddings a
            method has `looked_up`.

    Attributes:
        config: configuration of the adapter, of the method's class.
        prior_std: standard deviation of the prior on the layer's weights, where there is one.
    """

    parameters: ClassVar[tuple[str, ...]] = ()
    constants: ClassVar[tuple[str, ...]] = ()
    fp32: ClassVar[tuple[str, ...]] = ()
    trained: ClassVar[bool] = True
    samples: ClassVar[bool] = True
    deviation: ClassVar[str] = ""
    scope: str = "none"
    draw_scopes: tuple[str, ...] = ("example",)
    replaces: ClassVar[str] = ""
    module_tensors: ClassVar[tuple[str, ...]] = ()
    training: ClassVar[type[TrainingHooks]] = TrainingHooks
    targets: ClassVar[tuple[str, ...]] = ("linear", "convolution")
    config: Any
    prior_std: float

    def __init_subclass__(cls, method: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if method is not None:
            VARIANTS[method] = cls

    def __init__(self, config: BayesLoraConfig, name: str, in_features: int, state: NoiseState):
        self.config = config
        self.sample_at_inference = config.sample_at_inference
        # Whether passes use the mean, whatever the mode: while the adapter is a reference.
        self.still = False
        self.name = name
        self.stream = random.layer_stream(name)
        self.rounding = random.layer_stream(name.rpartition(".")[0])
        # Rows of such layers are not the batch's: a routed selection of them, or, of T5 and its kin, the
        # pairs of positions that all of them share.
        self.routed = ".experts." in f".{name}." or name.endswith("relative_attention_bias")
        self.state = state

    @classmethod
    def tensors(cls, config: Mapping[str, Any]) -> tuple[str, ...]:
        """Names of the tensors that `initial` makes, for a configuration read from JSON."""
        return (*cls.parameters, *cls.constants)

    # --- hooks: what a method is -----------------------------------------------------------------

    def initial(self, module: Any, adapter: str) -> dict[str, Tensor]:
        """First values of `parameters` and `constants`, fp32, on the device of `lora_A`.

        Called when the factors exist: new ones, or the factors of a plain LoRA adapter that becomes
        the posterior mean. May change the factors in place. Only shapes count for meta tensors.
        Must not use the global random generator: plain LoRA and Bayesian adapters draw the same
        factors from the same seed.
        """
        return {}

    def adapted(
        self, module: Any, adapter: str, x: Tensor, result: Tensor, mode: str, dropout: float
    ) -> Tensor:
        """result + the adapter's output for x (..., in).

        Args:
            mode: "mean"; "sample": the draw of each row (`draws_of`), with the same weights for all
                tokens of a row; "flipout": the noise of training.
            dropout: probability, 0 outside training; `dropped` applies it.
        """
        raise NotImplementedError

    def looked_up(self, module: Any, adapter: str, ids: Tensor, mode: str) -> Tensor:
        """The columns of A (..., r) for the tokens (...) of an embedding, with A as `mode` says."""
        raise NotImplementedError

    def on_experts(
        self, module: Any, adapter: str, x: Tensor, result: Tensor, rows: Routed, mode: str
    ) -> Tensor:
        """`adapted` for the parameters of experts, with factors for each of them.

        Args:
            x: (rows, in), the rows of all experts, sorted by expert.
            rows: whose they are.
            mode: as in `adapted`.
        """
        raise NotImplementedError

    def first_factor(self, module: Any, adapter: str) -> Tensor:
        """A for a pass that adds B A to a parameter: the mean, or one draw for all rows.

        Raises:
            ValueError: the batch has several draws.
        """
        raise NotImplementedError

    def mean_factors(self, module: Any, adapter: str) -> tuple[Tensor, Tensor]:
        """(A, B) of the plain LoRA adapter that is the posterior mean."""
        return module.lora_A[adapter].weight, module.lora_B[adapter].weight

    def draw_factors(
        self, module: Any, adapter: str, key: Tensor, number: int
    ) -> tuple[Tensor, Tensor]:
        """(A, B) of the plain LoRA adapter that is draw `number` under `key`, as "sample" uses it.

        Of the default kind: antithetic pairs.
        """
        return self.mean_factors(module, adapter)

    def divergence(self, module: Any, adapter: str) -> Divergence | Tensor | None:
        """Divergence from the prior: a term of `gaussian_kl`, a 0-dim tensor, or None for 0."""
        return None

    def deviations(self, module: Any, adapter: str) -> list[Tensor]:
        """The tensors that say how wide the posterior is in this layer; none where it has no width there."""
        return []

    def rescale_(self, module: Any, adapter: str, factor: float) -> None:
        """Multiply the posterior's deviations by a factor, in `deviations`."""

    def own_decay(self, module: Any, adapter: str) -> list[nn.Parameter]:
        """Parameters that no weight decay may touch: the prior decays them."""
        return [
            getattr(module, name)[adapter]
            for name in self.parameters
            if adapter in getattr(module, name, ())
        ]

    # --- hooks: modules that a method puts into the base model ------------------------------------

    @classmethod
    def install(cls, model: nn.Module, config: Any) -> None:
        """Put the method's modules into a base model, before the layers of an adapter are made.

        Raises:
            ValueError: model and configuration do not go together.
        """

    @classmethod
    def restore(cls, model: nn.Module) -> None:
        """Put plain modules back into a base model whose adapters have been taken off."""

    @classmethod
    def modules(cls, model: nn.Module, adapter: str | None = None) -> list[Any]:
        """The modules of an adapter, None for the active one; their divergence is `module.kl()`."""
        return []

    @classmethod
    def to_plain(cls, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The saved tensors of an adapter, as they are with plain modules."""
        return dict(tensors)

    @classmethod
    def from_plain(cls, tensors: Mapping[str, Tensor], slots: Container[str]) -> dict[str, Tensor]:
        """The inverse of `to_plain`, for a model whose tensors have the names `slots`."""
        return dict(tensors)

    # --- hooks: training --------------------------------------------------------------------------

    @classmethod
    def kl_starts(cls, layers: Sequence[BayesLayer]) -> list[float]:
        """One number for each layer that the schedule "auto" needs from the beginning of a run."""
        return [0.0] * len(layers)

    @classmethod
    def kl_step(cls, layers: Sequence[BayesLayer], plan: KLPlan) -> KLStep | None:
        """The decoupled step on the divergence of these layers; None for a method without one.

        It is asked for where the configuration is a `VariationalConfig`, which has its options.

        A method without one is trained with kl_mode="loss", or has its divergence in `TrainingHooks.loss`.

        Raises:
            ValueError: the options of the configuration have no step.
        """
        return None

    # --- common ----------------------------------------------------------------------------------

    def forward(  # type: ignore[override]
        self, module: Any, active_adapter: str, x: Tensor, result: Tensor, **_: Any
    ) -> Tensor:
        """result + the adapter's output, with weights that are the mean or drawn, as `mode` says."""
        mode, dropout = self.mode_of(module), 0.0
        if module.training and not self.still:
            # Past the search of a module for a name that identities lack.
            dropout = float(vars(module.lora_dropout[active_adapter]).get("p", 0.0))
        view = as_linear(module)
        if view is module:
            return self.adapted(module, active_adapter, x, result, mode, dropout)
        return view.forward(self, active_adapter, x, result, mode, dropout)

    def routed_forward(
        self, module: Any, adapter: str, x: Tensor, result: Tensor, rows: Routed
    ) -> Tensor:
        """`forward` for the parameters of experts."""
        return self.on_experts(module, adapter, x, result, rows, self.mode_of(module))

    def mode_of(self, module: Any) -> str:
        """Which weights a pass uses that is made here and now: "mean", "sample" or "flipout"."""
        # That of an enclosing `posterior`; else training draws and evaluation does not.
        mode = self.state.remember().mode
        if self.still:
            return "mean"
        if mode is None and module.training:
            return "flipout"
        return mode or ("sample" if self.sample_at_inference else "mean")

    def copies(self, x: Tensor, draws: int) -> int:
        """Successive rows, along the first dimension of x, that belong to each of the batch's draws.

        Raises:
            ValueError: the batch is no multiple of the draws, or the layer's rows are not the batch's.
        """
        if self.routed and draws > 1:
            raise ValueError(
                f"posterior: layer {self.name} sees routed or shared rows, so that {draws} draws cannot "
                "be folded into one batch; use n_samples=1 and first_sample=0, 1, ..."
            )
        rows = x.shape[0] if x.dim() > 1 else 1
        if rows % draws:
            raise ValueError(
                f"posterior: with {draws} draws the first dimension of the batch must be {draws} copies "
                f"of the examples, or a row for each of draws=..., layer {self.name} got "
                f"{tuple(x.shape)}; repeat the inputs with bayes_kernels.hf.fold_samples"
            )
        return rows // draws

    def by_row(self, values: Tensor, x: Tensor) -> Tensor:
        """Values (N, ...) of the batch's N draws, for each row of x: (rows, ...).

        Raises:
            ValueError: as `copies`.
        """
        count = self.copies(x, len(values))
        return values[:, None].expand(-1, count, *values.shape[1:]).flatten(0, 1)

    def ids_of(self, x: Tensor) -> Tensor:
        """Number of the draw of each row of x, of a shape that broadcasts to its leading dimensions.

        Raises:
            ValueError: as `copies`.
        """
        return _leading(self.by_row(self.state.current().draws_on(x.device).ids, x), x)

    def draws_of(self, x: Tensor) -> dict[str, Any]:
        """The draws in the batch and which of them each row has, as `functional.sampled_lora` takes them.

        Returns:
            `draws`: int64 (D,), the different numbers. `rows_per_group` where successive rows, D equal
            parts of them, have one each; else `groups`, the index in `draws` of each row.

        Raises:
            ValueError: as `copies`.
        """
        draws = self.state.current().draws_on(x.device)
        if draws.places is not None:
            return {"draws": draws.numbers, "groups": _leading(self.by_row(draws.places, x), x)}
        self.copies(x, len(draws.numbers))
        rows = math.prod(x.shape[:-1]) // len(draws.numbers)
        return {"draws": draws.numbers, "rows_per_group": max(rows, 1)}

    def dropped(self, x: Tensor, dropout: float) -> Tensor:
        """Dropout from the noise key, for ops that do not fuse it: memory for the mask."""
        if dropout == 0.0:
            return x
        keep = random.dropout_mask(
            self.state.key_on(x.device),
            math.prod(x.shape[:-1]),
            x.shape[-1],
            dropout,
            stream=self.stream,
        )
        return reference.dropped(x, keep.reshape(x.shape), dropout)

    def kept(self, x: Tensor, key: Tensor | None = None) -> functional.QuantizedActivations | None:
        """What backward has of x, for the ops' argument `kept`: None where it has x itself.

        Layers beside each other that see the same tensor (q, k and v) share one copy: the noise is that
        of the module which they are in.

        Args:
            x: (..., in).
            key: of the rounding, where x is a part of the batch with a draw of its own; else the pass's.
        """
        if self.config.activation_bits is None or not torch.is_grad_enabled() or transformed():
            return None
        key = self.state.key_on(x.device) if key is None else key
        if torch.compiler.is_compiling() or x.is_inference():
            # The compiler finds equal calls; whether a tensor of inference mode has changed is not known.
            return functional.quantize_activations(x, key=key, stream=self.rounding)
        # Where the tensor goes, its copy goes.
        made = _QUANTIZED.get(x)
        of = (self.rounding, x._version, autocast_input(x[:0]).dtype, _work_queue(x))
        if made is not None and made.key is key and made.of == of:
            return made.kept
        kept = functional.quantize_activations(x, key=key, stream=self.rounding)
        _QUANTIZED[x] = _Quantized(kept, key, of)
        return kept

    def delta_weight(self, module: Any, adapter: str) -> Tensor:
        """scaling * B A of the posterior mean, laid out as the base weight is."""
        view = as_linear(module)
        a, b = self.mean_factors(view, adapter)
        wide = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
        delta = (b.to(wide) @ a.to(wide)) * module.scaling[adapter]
        if isinstance(view, View):
            return view.laid_out(delta)
        return delta.T if getattr(module, "fan_in_fan_out", False) else delta

    def init(self, module: Any, adapter_name: str, **_: Any) -> None:  # type: ignore[override]
        """Make the method's tensors anew, for factors that have just been made.

        PEFT calls it whenever it gives an adapter new factors (EVA sets ranks after the adapter was
        made); `attach` calls it for the first ones. So the tensors always have the rank and the device
        of the factors.
        """
        view = as_linear(module)
        if isinstance(view, View):
            # Methods may change the factors, of which they see matrices.
            for factor in factor_parameters(module, adapter_name):
                if factor.dtype in (torch.bfloat16, torch.float16):
                    factor.data = factor.data.float()
            if self.trained:
                view.start(adapter_name, self.stream)
        set_tensors(module, adapter_name, self, self.initial(view, adapter_name))

    def merged(self) -> None:
        """Take note that PEFT merges a parameter by itself: the posterior mean."""
        _warn_merge()

    def merge_safe(  # type: ignore[override]
        self, module: Any, active_adapter: str, orig_weight: Tensor
    ) -> Tensor:
        """A new weight with the posterior mean added."""
        _warn_merge()
        return orig_weight + self.delta_weight(module, active_adapter).to(orig_weight.dtype)

    def merge_unsafe(  # type: ignore[override]
        self, module: Any, active_adapter: str, orig_weight: Tensor
    ) -> None:
        """Add the posterior mean in place."""
        _warn_merge()
        orig_weight.data += self.delta_weight(module, active_adapter).to(orig_weight.dtype)

    def unmerge(  # type: ignore[override]
        self, module: Any, active_adapter: str, orig_weight: Tensor
    ) -> Tensor:
        """Take the posterior mean out again."""
        return orig_weight - self.delta_weight(module, active_adapter).to(orig_weight.dtype)


class _Quantized(NamedTuple):
    """A tensor in 8 bits, and what it was made of: the key; noise stream, version, dtype, work queue."""

    kept: functional.QuantizedActivations
    key: Tensor
    of: tuple[int, int, torch.dtype, tuple[int, bool]]


def _work_queue(x: Tensor) -> tuple[int, bool]:
    """The CUDA stream that works on x, and whether a CUDA graph captures it.

    On another stream a copy may not be there yet; a graph that was captured with a copy from before it
    would not make it again.
    """
    if not x.is_cuda:
        return 0, False
    stream = torch.cuda.current_stream(x.device).cuda_stream
    return stream, torch.cuda.is_current_stream_capturing()


# By the tensor, for as long as it lives.
_QUANTIZED: MutableMapping[Tensor, _Quantized] = WeakTensorKeyDictionary()


def _leading(rows: Tensor, x: Tensor) -> Tensor:
    """Values (rows,), shaped to broadcast to the leading dimensions of x."""
    return rows.reshape(x.shape[0], *[1] * (x.dim() - 2)) if x.dim() > 1 else rows[0]


def _warn_merge() -> None:
    warnings.warn(
        "merging keeps the posterior mean only: the merged model has no uncertainty; "
        "keep the adapter to sample, or use export_lora(which=...) for single draws",
        stacklevel=4,
    )


def extra_names() -> frozenset[str]:
    """Names of all tensors that only Bayesian adapters have, for every method."""
    return frozenset(n for v in VARIANTS.values() for n in (*v.parameters, *v.constants))


def fp32_parameters(model: nn.Module) -> Iterator[tuple[tuple[str, str, str], nn.Parameter]]:
    """Tensors of Bayesian adapters that stay fp32, with (module name, tensor name, adapter)."""
    layer: Any
    for where, layer in model.named_modules():
        for adapter, variant in vars(layer).get("lora_variant", {}).items():
            if isinstance(variant, BayesVariant):
                for name in variant.fp32:
                    entries = getattr(layer, name, ())
                    if adapter in entries:
                        entry = entries[adapter]
                        yield (where, name, adapter), getattr(entry, "weight", entry)


def set_tensors(
    layer: Any, adapter: str, variant: BayesVariant, values: Mapping[str, Tensor]
) -> None:
    """Make the tensors of a variant parameters of the layer, where PEFT finds them."""
    first, _ = factor_parameters(layer, adapter)
    trains = first.requires_grad
    for name, value in values.items():
        trained = name in variant.parameters
        if trained and value.shape == first.flatten(1).shape:
            value = value.reshape(first.shape)  # of a convolution, so that KL steps see one shape
        if not hasattr(layer, name):
            setattr(layer, name, nn.ParameterDict())
            # PEFT trains the former when the adapter is active; it moves and deletes both.
            kind = "adapter_layer_names" if trained else "other_param_names"
            setattr(layer, kind, (*getattr(layer, kind), name))
        getattr(layer, name)[adapter] = nn.Parameter(value, requires_grad=trained and trains)
