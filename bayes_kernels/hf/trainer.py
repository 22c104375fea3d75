"""The stock Trainer with the divergence from the prior, scaled right."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .. import reference
from ..optim import DecoupledKL, KLSchedule, auto_target_std, flow_time, kl_cycle_length
from ._compat import ignores_item_count, loss_is_scaled
from .posterior import BayesLayer, bayes_layers, kl_divergence, refresh_noise
from .predict import predict

# The mixin calls the methods of the trainer class that follows it.
_Base: Any = Trainer if TYPE_CHECKING else object

_START = "BayesTrainer"  # entry of the Trainer's state file

KL_MODES = ("decoupled", "loss", "none")


class BayesTrainerMixin(_Base):
    """Adds the divergence and the noise of Bayesian adapters to a `transformers.Trainer`.

    Put it before the trainer class: `class BayesSFTTrainer(BayesTrainerMixin, SFTTrainer): ...`.

    * **Noise.** Each micro-batch has the key fold_in(fold_in(key(noise_seed), rank), counter) with
      counter = optimiser step * accumulation steps + index in the window: ranks differ, and a run
      that resumes from a checkpoint goes on with the noise that it would have had.
    * **Divergence, kl_mode="decoupled"** (BLoB): after each optimiser step one step of gradient
      descent on the divergence, in place, in closed form (`bayes_kernels.optim.DecoupledKL`) with
      the schedule of the adapter's configuration; its learning rate follows that of the main
      optimiser. Gradient accumulation, data parallelism and gradient clipping do not touch it.
    * **kl_mode="loss"**: kl_weight * KL / n_train is added to the loss of each optimiser step,
      once, whatever the number of accumulated micro-batches or processes. With kl_weight 1 and
      n_train the number of terms that the likelihood loss averages over the data set, the sum is
      the negative evidence lower bound divided by n_train. Gradient clipping then acts on the sum,
      which the divergence can dominate: raise `max_grad_norm` or set it to 0.
    * **Weight decay** leaves out means and deviations, whose decay is the divergence.
    * **Stock classification heads** return the mean loss of a micro-batch and ignore the item count
      that the Trainer passes; their loss is divided by the accumulation steps here, as it should
      be.
    * **Logs**: besides the loss, nll (per term of the loss), kl (nats, whole data set), elbo =
      -(nll + kl / n_train), the bound per term, and kl_weight (the step size, for "auto" the share
      of each layer's flow time; or kl_weight / n_train).
    * **Evaluation** uses the posterior mean, or with eval_samples > 0 the mean prediction of that
      many draws: logits are then log-probabilities (fp32), and the loss is theirs. Classification
      only.

    Args:
        kl_mode: "decoupled", "loss" or "none".
        kl_weight: weight of the divergence in the loss for "loss"; factor of the step sizes for
            "decoupled".
        eval_samples: draws in evaluation; 0 for the mean.
        eval_seed: their seed.
        n_train: number of terms that the loss averages over the training data: examples, or target
            tokens for a per-token loss. None for the length of the data set, with a warning where
            the labels have several targets per example.
        noise_seed: seed of the training noise; None for `TrainingArguments.seed`.
        kl_schedule: replaces the schedule that the configuration asks for; kl_weight still counts.

    Raises:
        ValueError: an option is out of range, or the model has no Bayesian adapter.
    """

    def __init__(
        self,
        *args: Any,
        kl_mode: str = "decoupled",
        kl_weight: float = 1.0,
        eval_samples: int = 0,
        eval_seed: int = 0,
        n_train: int | None = None,
        noise_seed: int | None = None,
        kl_schedule: KLSchedule | None = None,
        **kwargs: Any,
    ) -> None:
        if kl_mode not in KL_MODES:
            raise ValueError(f"BayesTrainer: kl_mode must be one of {KL_MODES}, got {kl_mode!r}")
        if kl_weight < 0 or not math.isfinite(kl_weight):
            raise ValueError(f"BayesTrainer: kl_weight must not be negative, got {kl_weight}")
        if eval_samples < 0:
            raise ValueError(f"BayesTrainer: eval_samples must not be negative, got {eval_samples}")
        super().__init__(*args, **kwargs)
        self.kl_mode, self.kl_weight = kl_mode, kl_weight
        self.eval_samples, self.eval_seed = eval_samples, eval_seed
        self.noise_seed = noise_seed
        self.decoupled_kl: DecoupledKL | None = None
        self._n_train = n_train
        self._targets_checked = n_train is not None
        self._given_schedule = kl_schedule
        self._window = (-1, 0)  # optimiser step and index of the next micro-batch in it
        self._nll = torch.zeros(())
        self._logged_step = 0
        self._last_size = 0.0
        bayes_layers(self.model)  # type: ignore[attr-defined]
        if self.args.n_gpu > 1:  # type: ignore[attr-defined]
            raise ValueError(
                f"BayesTrainer: each process must use one GPU, got {self.args.n_gpu}; launch with "
                "torchrun or accelerate, or name one in CUDA_VISIBLE_DEVICES"
            )
        if ignores_item_count(self.model):  # type: ignore[attr-defined]
            self.model_accepts_loss_kwargs = False
        self.add_callback(_AfterOptimizerStep(self))  # type: ignore[attr-defined]

    @property
    def n_train(self) -> int:
        """Number of terms that the loss averages: as given, or the number of training examples.

        Raises:
            ValueError: the data set has no length and no number was given.
        """
        if self._n_train is None:
            try:
                self._n_train = len(self.train_dataset)  # type: ignore[attr-defined]
            except TypeError:
                raise ValueError(
                    "BayesTrainer: n_train must be given where the training data has no length; "
                    "pass the number of training examples (target tokens for a per-token loss)"
                ) from None
        return self._n_train

    def train(
        self: Any,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        """As the stock method; `resume_from_checkpoint=True` finds the newest complete one."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise ValueError(
                    f"BayesTrainer: {self.args.output_dir} must hold a complete checkpoint to "
                    "resume from, got none; call train() without resume_from_checkpoint"
                )
        return super().train(
            resume_from_checkpoint=resume_from_checkpoint,
            trial=trial,
            ignore_keys_for_eval=ignore_keys_for_eval,
        )

    def get_decay_parameter_names(self: Any, model: nn.Module) -> list[str]:
        """Weight decay is for the other parameters: the prior does it for the posterior's."""
        posterior = {id(p) for item in bayes_layers(model) for p in (item.mean, item.rho)}
        own = {name for name, p in model.named_parameters() if id(p) in posterior}
        return [name for name in super().get_decay_parameter_names(model) if name not in own]

    def training_step(
        self: Any, model: nn.Module, inputs: Any, num_items_in_batch: Any = None
    ) -> Tensor:
        """One micro-batch, with noise of its own."""
        step = self.state.global_step
        index = self._window[1] if self._window[0] == step else 0
        self._window = (step, index + 1)
        refresh_noise(
            self.model,
            step=step * self.args.gradient_accumulation_steps + index,
            rank=self.args.process_index,
            seed=self.args.seed if self.noise_seed is None else self.noise_seed,
        )
        return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(
        self: Any,
        model: nn.Module,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
        **kwargs: Any,
    ) -> Any:
        """The stock loss; in training, with kl_mode "loss", plus this micro-batch's share of KL."""
        if model.training and not self._targets_checked:
            self._check_targets(inputs.get("labels"))
        loss, outputs = super().compute_loss(
            model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch, **kwargs
        )
        if model.training:
            parts = self.current_gradient_accumulation_steps
            scaled = loss_is_scaled(self, num_items_in_batch)
            share = loss.detach() if scaled else loss.detach() / parts
            self._nll = self._nll.to(share.device) + share.mean()
            if self.kl_mode == "loss":
                weight = self.kl_weight / self.n_train
                kl = weight * kl_divergence(self.model)
                # Processes average their gradients of the same divergence: no factor for them.
                loss = loss + (kl / parts if scaled else kl).to(loss.device)
        return (loss, outputs) if return_outputs else loss

    def log(self: Any, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds nll, kl, elbo and kl_weight to the training logs."""
        steps = self.state.global_step - self._logged_step
        if "loss" in logs and steps > 0:
            nll = self.accelerator.gather(self._nll.reshape(1)).mean().item() / steps
            with torch.no_grad():
                kl = kl_divergence(self.model).item()
            logs["nll"] = nll
            logs["kl"] = kl
            logs["elbo"] = -(nll + kl / self.n_train)
            in_loss = self.kl_mode == "loss"
            logs["kl_weight"] = self.kl_weight / self.n_train if in_loss else self._last_size
            self._nll = torch.zeros_like(self._nll)
            self._logged_step = self.state.global_step
        super().log(logs, *args, **kwargs)

    def prediction_step(
        self: Any,
        model: nn.Module,
        inputs: Any,
        prediction_loss_only: bool,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor | None, Any, Any]:
        """Evaluation of one batch: the mean, or the mean prediction of eval_samples draws."""
        if self.eval_samples == 0:
            return super().prediction_step(model, inputs, prediction_loss_only, *args, **kwargs)
        inputs = self._prepare_inputs(inputs)
        labels = inputs.get("labels")
        with self.compute_loss_context_manager():
            result = predict(model, inputs, n_samples=self.eval_samples, seed=self.eval_seed)
        # Processes gather on their own device; fp64 is not defined on all of them.
        logits = result.log_probs.float().to(self.args.device)
        loss = None
        if labels is not None:
            labels = labels.to(logits.device)
            loss = nn.functional.nll_loss(logits, labels)
        if prediction_loss_only:
            return loss, None, None
        return loss, logits, labels

    def _check_targets(self: Any, labels: Any) -> None:
        """Warn once where the loss averages tokens and n_train counts examples."""
        self._targets_checked = True
        if not isinstance(labels, Tensor) or labels.dim() != 2 or labels.is_floating_point():
            return
        targets = int((labels != -100).sum())
        if targets > len(labels):
            warnings.warn(
                f"BayesTrainer: the loss averages {targets / len(labels):.3g} target tokens per "
                f"example in the first batch, but the divergence is scaled by n_train="
                f"{self.n_train} examples; pass n_train=number of target tokens in the training "
                "data",
                stacklevel=2,
            )

    # --- decoupled step ------------------------------------------------------------------------

    def _begin(self: Any) -> None:
        self._window = (-1, 0)
        self._nll = torch.zeros(())
        self._logged_step = self.state.global_step
        if self.kl_mode == "decoupled":
            args = self.args
            # A resumed run goes on with the schedule of its beginning.
            saved = (self.state.stateful_callbacks or {}).get(_START)
            starts = saved["attributes"]["start_stds"] if saved else start_stds(self.model)
            attributes = {"start_stds": starts}
            self.state.stateful_callbacks[_START] = {"args": {}, "attributes": attributes}
            self.decoupled_kl = decoupled_kl(
                self.model,
                n_train=self.n_train,
                batch_size=args.train_batch_size * args.gradient_accumulation_steps,
                processes=args.world_size,
                learning_rate=args.learning_rate,
                factor_sum=self._factor_sum(),
                weight=self.kl_weight,
                schedule=self._given_schedule,
                starts=starts,
            )

    def _factor_sum(self: Any) -> float:
        """Sum of the learning-rate factors of the whole run."""
        lambdas = getattr(self.lr_scheduler, "lr_lambdas", None)
        if not lambdas:
            return float(self.state.max_steps)
        return max(sum(lambdas[0](t) for t in range(self.state.max_steps)), 1e-9)

    def _lr_factor(self: Any) -> float:
        """Learning rate of the step that the optimiser has just taken, over its peak."""
        lambdas = getattr(self.lr_scheduler, "lr_lambdas", None)
        if lambdas:
            return float(lambdas[0](self.lr_scheduler.last_epoch))
        if self.decoupled_kl.schedule.kind == "auto":
            return 1.0
        group = self.optimizer.param_groups[0]
        peak = group.get("initial_lr") or self.args.learning_rate or 1.0
        return float(group["lr"]) / float(peak)

    def _after_optimizer_step(self: Any) -> None:
        if self.decoupled_kl is None or self.accelerator.optimizer_step_was_skipped:
            return
        size = self.decoupled_kl.step(self._lr_factor(), step=self.state.global_step)
        self._last_size = size if self._given_schedule is None else size * self.kl_weight


class _AfterOptimizerStep(TrainerCallback):
    """Calls the trainer where the stock loop has no method to override."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.trainer._begin()

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        self.trainer._after_optimizer_step()


def decoupled_kl(
    model: nn.Module,
    *,
    n_train: int,
    batch_size: int,
    learning_rate: float,
    factor_sum: float,
    processes: int = 1,
    weight: float = 1.0,
    schedule: KLSchedule | None = None,
    starts: Sequence[float] | None = None,
) -> DecoupledKL:
    """The KL step that the active adapter's configuration asks for; for training loops of one's
    own.

    Call `step(lr_factor)` of the result after each optimiser step.

    Args:
        model: a model with Bayesian adapters.
        n_train: number of terms that the loss averages over the training data: examples, or target
            tokens for a per-token loss.
        batch_size: examples of one process in an optimiser step.
        learning_rate: peak rate of the main optimiser.
        factor_sum: sum over the run of its rate, over the peak.
        processes: number of data-parallel processes.
        weight: factor of the step sizes, of a given schedule too.
        schedule: replaces that of the configuration.
        starts: `start_stds` of the model at the beginning of the run, for a run that is resumed;
            None measures them now. Used by "auto": a layer at or above its target gets no flow.

    Raises:
        ValueError: active adapters differ in how the deviation is parameterised, there is none, or
            "auto" has no rule for the parameterisation.
    """
    layers = bayes_layers(model)
    stds = sorted({item.variant.std for item in layers})
    if len(stds) != 1:
        raise ValueError(
            f"decoupled_kl: active adapters must share one std parameterisation, got {stds}; train "
            "one adapter at a time"
        )
    config = layers[0].variant.config
    priors = [item.variant.prior_std for item in layers]
    scales = [weight] * len(layers)
    if schedule is None:
        schedule = KLSchedule(
            kind=config.kl_schedule,
            cycle=kl_cycle_length(n_train, batch_size, processes=processes, gamma=config.kl_gamma),
            lr=config.kl_lr * weight,  # shown in the logs
            factor_sum=factor_sum,
        )
        scales = [1.0] * len(layers)
        if schedule.kind == "auto":
            starts = start_stds(model) if starts is None else starts
            scales = [
                weight * _flow_time(item, learning_rate * factor_sum, n_train, start)
                for item, start in zip(layers, starts, strict=True)
            ]
    return DecoupledKL(
        [item.mean for item in layers],
        [item.rho for item in layers],
        priors,
        schedule,
        std=stds[0],
        scales=scales,
    )


def start_stds(model: nn.Module) -> list[float]:
    """Mean deviation Omega of each active Bayesian layer, in the order of `bayes_layers`.

    One read of the deviation parameters and one synchronisation.

    Raises:
        ValueError: there is no Bayesian layer.
    """
    found: list[Tensor] = []
    with torch.no_grad():
        for item in bayes_layers(model):
            value: Any = reference.std_of(item.rho.detach(), item.variant.std).mean()
            value = value.full_tensor() if hasattr(value, "full_tensor") else value
            found.append(value.to(found[0].device) if found else value)
    return torch.stack(found).tolist()


def _flow_time(item: BayesLayer, lr_sum: float, n_train: int, start_std: float) -> float:
    config, prior = item.variant.config, item.variant.prior_std
    if config.kl_time is not None:
        return config.kl_time
    if config.std != "square":
        raise ValueError(
            f"decoupled_kl: the rule of kl_schedule='auto' is for std='square', got "
            f"{config.std!r}; set kl_time, or kl_schedule='published'"
        )
    target = auto_target_std(item.layer.in_features, lr_sum, n_train, prior)
    return flow_time(target, prior, start_std) if start_std < target else 0.0


def last_checkpoint(output_dir: str | os.PathLike[str]) -> str | None:
    """The newest checkpoint folder that was written to its end, or None.

    The Trainer writes its state file last; a folder without it belongs to a run that was stopped
    while it was saving.
    """
    found = []
    for folder in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        number = folder.name.rpartition("-")[2]
        if number.isdigit() and (folder / TRAINER_STATE_NAME).is_file():
            found.append((int(number), folder))
    return str(max(found)[1]) if found else None


class BayesTrainer(BayesTrainerMixin, Trainer):
    """`transformers.Trainer` for models with Bayesian adapters; see `BayesTrainerMixin`.

    Example:
        model = get_peft_model(base, BlobConfig(r=8, target_modules=["q_proj", "v_proj"]))
        BayesTrainer(model=model, args=args, train_dataset=data).train()
    """
