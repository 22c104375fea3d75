"""The stock Trainer with the divergence from the prior, scaled right."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from ..batches import need_whole
from ..optim import KLSchedule
from ._compat import loss_is_scaled
from .checkpoint_folders import last_checkpoint
from .evaluation import PosteriorEvaluation, inactive_variants
from .kept_layers import KeptLayers, keeping
from .kl import decoupled_kl, kl_divergence, kl_starts
from .layers import bayes_layers, warn_uncalled, without_effect
from .logits import token_choices
from .noise import DRAW_SCOPES, KINDS
from .posterior import refresh_noise
from .variants import KLStep, VariationalLoss

_START = "BayesTrainer"  # entry of the Trainer's state file

# Passes after which a layer that no gradient has reached is one that the model does not call: layer
# drop and batches of one modality leave layers out now and then.
_WATCHED_PASSES = 8

KL_MODES = ("decoupled", "loss", "none")


class BayesTrainerMixin(PosteriorEvaluation):
    """Adds the divergence and the noise of Bayesian adapters to a `transformers.Trainer`.

    Put it before the trainer class: `class BayesSFTTrainer(BayesTrainerMixin, SFTTrainer): ...`.

    * **Noise.** Each micro-batch has the key fold_in(fold_in(key(noise_seed), rank), counter) with
      counter = optimiser step * accumulation steps + index in the window: ranks differ, and a run
      that resumes from a checkpoint goes on with the noise that it would have had.
    * **Divergence, kl_mode="decoupled"** (BLoB): after each optimiser step one step of gradient
      descent on the divergence, in place, in closed form (`bayes_kernels.optim.DecoupledKL`) with
      the schedule of the adapter's configuration; its learning rate follows the main
      optimiser's. Gradient accumulation, data parallelism and gradient clipping do not touch it.
    * **kl_mode="loss"**: kl_weight * KL / n_train is added to the loss of each optimiser step,
      once, whatever the number of accumulated micro-batches or processes. With kl_weight 1 and
      n_train the number of terms that the likelihood loss averages over the data set, the sum is
      the negative evidence lower bound divided by n_train. Gradient clipping then acts on the sum,
      which the divergence can dominate: raise `max_grad_norm` or set it to 0.
    * **The method** may have an optimiser (PoLAR: `bayes_kernels.stiefel.StiefelAdamW`, unless one is
      given), a loss (PoLAR-VBLL: the evidence lower bound of its last layer), turns of its parts, and
      logs. The page of each method says so.
    * **Weight decay** leaves out means and deviations, whose decay is the divergence.
    * **Accumulation.** Many stock heads (sequence and token classification, masked language models,
      T5, BART, ...) return the mean over the targets of a micro-batch and ignore the item count that
      the Trainer passes, whose loss and gradients then are too large. Whether a loss uses the count
      is seen from its graph in the first micro-batch; where it does not, the mean is weighted by
      the micro-batch's share of all targets, so that the loss of an optimiser step is the mean over
      its targets, however it is split.
    * **Logs**: besides the loss, nll (per term of the loss), kl (nats, whole data set), elbo =
      -(nll + kl / n_train), the bound per term, and kl_weight (the step size, for "auto" the share
      of each layer's flow time; or kl_weight / n_train).
    * **Evaluation** uses the posterior mean, or with eval_samples > 0 the mean prediction of that
      many draws: logits (fp32) are then log-probabilities, for multi-label models log-odds, for
      regression the mean numbers, and the loss is theirs. Labels of tokens (B, T), -100 where none counts,
      are scored by the mean of the draws at each token (`predict_tokens`): eval_nll (the exact mean over
      all tokens, eval_loss too), eval_perplexity, eval_ece and eval_accuracy; predictions for
      compute_metrics are then the log-probability of each label, the largest probability, and
      whether the label has it, (B, T) each. With `choices` a causal model predicts one of these tokens at
      the first label that counts: eval_nll, eval_ece and eval_accuracy are those of classes, predictions
      log-probabilities (B, C), and labels their numbers. Trainers with a loss of their own on batches without
      labels (DPO) are asked under each draw: eval_loss and what they log are means over the draws.
    * **References.** Bayesian adapters that are not active when the trainer is made, such as the copy that
      DPO's trainer compares with, are their means in its passes, without dropout.

    Args:
        kl_mode: "decoupled", "loss" or "none".
        kl_weight: weight of the divergence in the loss for "loss"; factor of the step sizes for
            "decoupled".
        eval_samples: draws in evaluation; 0 for the mean.
        eval_seed: their seed.
        eval_draws, eval_scope: `draws` and `scope` of `predict`.
        choices: ids of the answer tokens, for evaluation, with draws or without; None for no choices.
        n_train: number of terms that the loss averages over the training data: examples, or target
            tokens for a per-token loss. None for the length of the data set, with a warning where
            the labels have several targets per example.
        noise_seed: seed of the training noise; None for `TrainingArguments.seed`.
        kl_schedule: replaces the schedule that the configuration asks for; kl_weight still counts.
        keep_lower_layers: bytes that outputs of the frozen layers below the first trained one may take; they
            are then computed once for each text, and kept over epochs and evaluations in `kept_layers`
            (`KeptLayers`). 0 keeps nothing.

    Raises:
        ValueError: an option is out of range or does not go with the method, or the model has no
            Bayesian adapter. From `train`: the adapters are disabled or merged, or the method has no
            decoupled step on its divergence and kl_mode is "decoupled".
    """

    def __init__(
        self,
        *args: Any,
        kl_mode: str = "decoupled",
        kl_weight: float = 1.0,
        eval_samples: int = 0,
        eval_seed: int = 0,
        eval_draws: str = "antithetic",
        eval_scope: str = "example",
        choices: Sequence[int] | None = None,
        n_train: int | None = None,
        noise_seed: int | None = None,
        kl_schedule: KLSchedule | None = None,
        keep_lower_layers: int = 0,
        **kwargs: Any,
    ) -> None:
        if kl_mode not in KL_MODES:
            raise ValueError(f"BayesTrainer: kl_mode must be one of {KL_MODES}, got {kl_mode!r}")
        if kl_weight < 0 or not math.isfinite(kl_weight):
            raise ValueError(f"BayesTrainer: kl_weight must not be negative, got {kl_weight}")
        need_whole("BayesTrainer: eval_samples", eval_samples, 0)
        need_whole("BayesTrainer: keep_lower_layers", keep_lower_layers, 0)
        words = (("eval_draws", eval_draws, KINDS), ("eval_scope", eval_scope, DRAW_SCOPES))
        for name, word, allowed in words:
            if word not in allowed:
                raise ValueError(f"BayesTrainer: {name} must be one of {allowed}, got {word!r}")
        self.choices = None if choices is None else token_choices("BayesTrainer", choices)
        super().__init__(*args, **kwargs)
        self.kl_mode, self.kl_weight = kl_mode, kl_weight
        self.eval_samples, self.eval_seed = eval_samples, eval_seed
        self.eval_draws, self.eval_scope = eval_draws, eval_scope
        self.noise_seed = noise_seed
        self.decoupled_kl: KLStep | None = None
        self._n_train = n_train
        self._targets_checked = n_train is not None
        self._given_schedule = kl_schedule
        self.kept_layers: KeptLayers | None = None
        if keep_lower_layers:
            self.kept_layers = KeptLayers(self.model, keep_lower_layers)  # type: ignore[attr-defined]
        self._window = (-1, 0)  # optimiser step and index of the next micro-batch in it
        self._nll = torch.zeros(())
        self._logged_step = 0
        self._last_size = 0.0
        variants = [item.variant for item in bayes_layers(self.model)]  # type: ignore[attr-defined]
        for variant in variants:
            if not variant.trained:
                raise ValueError(
                    f"BayesTrainer: the adapter must be of a method that is trained, got "
                    f"{variant.config.method!r}; train plain LoRA and convert it with "
                    "bayes_kernels.hf.bayesianize"
                )
        if len({variant.training for variant in variants}) != 1:
            methods = sorted({variant.config.method for variant in variants})
            raise ValueError(
                f"BayesTrainer: active adapters must be trained in one way, got {methods}; train one "
                "adapter at a time"
            )
        if self.args.n_gpu > 1:  # type: ignore[attr-defined]
            raise ValueError(
                f"BayesTrainer: each process must use one GPU, got {self.args.n_gpu}; launch with "
                "torchrun or accelerate, or name one in CUDA_VISIBLE_DEVICES"
            )
        _check_sharding(self)
        self._references = inactive_variants(self.model)  # type: ignore[attr-defined]
        self._hooks = variants[0].training(self, variants[0].config)
        self._counts_items: bool | None = None  # whether the loss uses num_items_in_batch
        # Passes that were looked at, and layers without a gradient in all of them.
        self._passes, self._idle = 0, set[str]()
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
        why = without_effect(self.model)
        if why is not None:
            raise ValueError(
                f"BayesTrainer: adapters must take part in training, got adapters that are {why} first"
            )
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
        layers = bayes_layers(model)
        modules = [
            m for kind in {type(item.variant) for item in layers} for m in kind.modules(model)
        ]
        posterior = {id(p) for module in modules for p in module.parameters()}
        for item in layers:
            posterior.update(id(p) for p in item.variant.own_decay(item.view, item.adapter))
        own = {name for name, p in model.named_parameters() if id(p) in posterior}
        return [name for name in super().get_decay_parameter_names(model) if name not in own]

    def training_step(
        self: Any,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """One micro-batch, with new noise."""
        step = self.state.global_step
        index = self._window[1] if self._window[0] == step else 0
        self._window = (step, index + 1)
        refresh_noise(
            self.model,
            step=step * self.args.gradient_accumulation_steps + index,
            rank=self.args.process_index,
            seed=self.args.seed if self.noise_seed is None else self.noise_seed,
        )
        stock = super().training_step
        with self._references_still(), keeping(self.kept_layers):
            loss = self._hooks.training_step(
                model, inputs, lambda inputs: stock(model, inputs, num_items_in_batch)
            )
        self._check_calls()
        return loss

    def create_optimizer(self: Any, *args: Any) -> torch.optim.Optimizer:
        """The method's optimiser, unless one is given or it has none: then as the stock method."""
        if self.optimizer is None and self.optimizer_cls_and_kwargs is None:
            model = args[0] if args and args[0] is not None else self.model
            self.optimizer = self._hooks.optimizer(model)
        return super().create_optimizer(*args)

    def compute_loss(
        self: Any,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> Any:
        """The stock loss; in training, with kl_mode "loss", plus this micro-batch's share of KL."""
        if model.training and not self._targets_checked:
            self._check_targets(inputs.get("labels"))
        found = self._hooks.loss(model, inputs) if model.training else None
        if found is not None:
            loss = self._share_of(found[0], inputs, num_items_in_batch)
            return (loss, {"loss": loss, "logits": found[1]}) if return_outputs else loss
        items, counts = num_items_in_batch, self._targets_of(inputs.get("labels"))
        if items is not None and self.compute_loss_func is None:
            items = self._probe(model, items)
        loss, outputs = super().compute_loss(
            model, inputs, return_outputs=True, num_items_in_batch=items, **kwargs
        )
        if isinstance(items, Tensor) and items.requires_grad:
            self._counts_items = _depends_on(loss, items)
        if items is not None and self._counts_items is False and counts is not None:
            share = (counts / num_items_in_batch).to(loss.device)
            # The mean over no targets is NaN, and their share is nothing.
            loss = torch.where(share > 0, loss * share, torch.zeros_like(loss))
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

    def _probe(self: Any, model: nn.Module, items: Tensor | int) -> Any:
        """The item count, in the first micro-batch of several as a leaf of the loss's graph.

        None in evaluation until it is known whether the loss uses it: the loss is then a mean.
        """
        args = self.args
        if (
            self._counts_items is not None
            or args.gradient_accumulation_steps * args.world_size == 1
        ):
            return items
        if not model.training:
            return None
        return torch.as_tensor(items).detach().float().requires_grad_()

    def _targets_of(self: Any, labels: Any) -> Tensor | None:
        """Number of targets in a batch, as the Trainer counts them."""
        if not isinstance(labels, Tensor):
            return None
        shifted = getattr(self, "_loss_shifts_labels", False)
        return (labels[..., 1:] if shifted else labels).ne(-100).sum()

    def _check_calls(self: Any) -> None:
        """In the first backward passes: layers that never had a gradient have not been called."""
        last = min(_WATCHED_PASSES, self.state.max_steps)
        if self._passes >= last:
            return
        self._passes += 1
        layers = [item for item in bayes_layers(self.model) if not item.variant.routed]
        trained = [
            (item.name, weight.grad is None)
            for item in layers
            if (weight := item.view.lora_B[item.adapter].weight).requires_grad
        ]
        missing = {name for name, none in trained if none}
        self._idle = missing if self._passes == 1 else self._idle & missing
        # With sharded gradients there is none to be seen anywhere.
        if self._passes == last and self._idle and len(self._idle) < len(trained):
            warn_uncalled("BayesTrainer", sorted(self._idle), len(trained))

    def _share_of(
        self: Any, terms: VariationalLoss, inputs: dict[str, Any], num_items: Tensor | int | None
    ) -> Tensor:
        """This micro-batch's share of the negative evidence lower bound of an optimiser step."""
        parts = self.current_gradient_accumulation_steps
        scaled, share = loss_is_scaled(self, num_items), 1 / parts
        if num_items is not None:
            share = self._targets_of(inputs["labels"]).to(terms.nll.device) / num_items
            if self.args.average_tokens_across_devices:  # num_items counts all processes
                share = share * self.args.world_size
        nll = terms.nll * share
        self._nll = self._nll.to(nll.device) + nll.detach()
        loss = nll + (terms.loss - terms.nll) / parts
        return loss if scaled else loss * parts

    def log(self: Any, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds nll, kl, elbo and kl_weight to the training logs, and what the method logs."""
        steps = self.state.global_step - self._logged_step
        if "loss" in logs and steps > 0:
            nll = self.accelerator.gather(self._nll.reshape(1)).mean().item() / steps
            logs["nll"] = nll
            if self._hooks.logs_divergence:
                with torch.no_grad():
                    kl = kl_divergence(self.model).item()
                logs["kl"] = kl
                logs["elbo"] = -(nll + kl / self.n_train)
                logs["kl_weight"] = self._last_size
                if self.kl_mode == "loss":
                    logs["kl_weight"] = self.kl_weight / self.n_train
            logs.update(self._hooks.logs())
            self._nll = torch.zeros_like(self._nll)
            self._logged_step = self.state.global_step
        super().log(logs, *args, **kwargs)

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
            starts = saved["attributes"]["kl_starts"] if saved else kl_starts(self.model)
            attributes = {"kl_starts": starts}
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
            if self.decoupled_kl is None:
                self._check_divergence_is_stepped()

    def _check_divergence_is_stepped(self: Any) -> None:
        """Without a step on it, a divergence would be left out of the training in silence."""
        for item in bayes_layers(self.model):
            if item.variant.divergence(item.view, item.adapter) is not None:
                raise ValueError(
                    "BayesTrainer: kl_mode must be 'loss' or 'none' for method "
                    f"{item.variant.config.method!r}, which has a divergence and no decoupled step on it, "
                    "got 'decoupled'; pass kl_mode='loss'"
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


def _depends_on(loss: Tensor, leaf: Tensor) -> bool:
    """Whether a leaf is in the graph of a loss; nothing is computed and no hook runs."""
    nodes, seen = [loss.grad_fn], set()
    while nodes:
        node: Any = nodes.pop()
        if node is None or node in seen:
            continue
        if getattr(node, "variable", None) is leaf:
            return True
        seen.add(node)
        nodes.extend(following for following, _ in node.next_functions)
    return False


def _check_sharding(trainer: Any) -> None:
    """Whether the divergence can be computed from the parameters as they are kept.

    Raises:
        ValueError: DeepSpeed or the first FSDP cut them up, so that no process sees their shapes.
    """
    deepspeed = getattr(trainer.args, "deepspeed_plugin", None)
    fsdp = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    found = ""
    if deepspeed is not None and deepspeed.zero_stage == 3:
        found = "DeepSpeed ZeRO-3"
    elif fsdp is not None and getattr(fsdp, "fsdp_version", 2) == 1:
        found = "FSDP version 1"
    if found:
        raise ValueError(
            f"BayesTrainer: parameters must be whole or sharded by FSDP2, got {found}, which flattens "
            "them; use FSDP with fsdp_version=2, DeepSpeed ZeRO-2, or plain data parallelism"
        )


class _AfterOptimizerStep(TrainerCallback):
    """Calls the trainer where the stock loop has no method to override."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.trainer._begin()

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        self.trainer._after_optimizer_step()


class BayesTrainer(BayesTrainerMixin, Trainer):
    """`transformers.Trainer` for models with Bayesian adapters; see `BayesTrainerMixin`.

    Example:
        model = get_peft_model(base, BlobConfig(r=8, target_modules=["q_proj", "v_proj"]))
        BayesTrainer(model=model, args=args, train_dataset=data).train()
    """
