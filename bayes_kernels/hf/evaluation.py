"""Evaluation with a posterior: what a Trainer's evaluation loop computes of draws, tokens and choices."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from ..batches import labels_of
from .kept_layers import keeping
from .layers import bayes_layers, bayes_variants
from .logits import LabelPrediction, NumberPrediction
from .noise import DRAW_SCOPES
from .posterior import posterior
from .predict import predict
from .tokens import IGNORED, at_the_answer, label_shift, predict_tokens, token_scores

# The mixin calls the methods of the trainer class that follows it.
_Base: Any = Trainer if TYPE_CHECKING else object


class PosteriorEvaluation(_Base):
    """The part of `BayesTrainerMixin` that evaluates, which says what it does.

    It reads `eval_samples`, `eval_seed`, `eval_draws`, `eval_scope`, `choices` and `kept_layers`.
    """

    def prediction_step(
        self: Any,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor | None, Any, Any]:
        """Evaluation of one batch: the mean, or the mean prediction of eval_samples draws."""
        with keeping(self.kept_layers):
            return self._prediction_step(model, inputs, prediction_loss_only, *args, **kwargs)

    def _prediction_step(
        self: Any,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor | None, Any, Any]:
        if self.eval_samples == 0 and self.choices is None:
            return super().prediction_step(model, inputs, prediction_loss_only, *args, **kwargs)
        inputs = self._prepare_inputs(inputs)
        if self._scores() != "choices" and self._compares(inputs):
            stock = super().prediction_step
            return self._mean_of_draws(lambda: stock(model, inputs, True, *args)), None, None
        if self._scores() == "tokens":
            loss, scores, labels = self._score_tokens(model, inputs)
            return (loss, None, None) if prediction_loss_only else (loss, scores, labels)
        if self.choices is not None:
            inputs = at_the_answer(inputs, self.choices)
        labels = inputs.get("labels")
        with self.compute_loss_context_manager():
            result = predict(
                model,
                inputs,
                n_samples=self.eval_samples,
                seed=self.eval_seed,
                draws=self.eval_draws,
                scope=self.eval_scope,
                choices=self.choices,
            )
        # Processes gather on their own device; fp64 is not defined on all of them.
        logits = result.logits.float().to(self.args.device)
        loss = None
        if labels is not None:
            labels = labels.to(logits.device)
            if isinstance(result, NumberPrediction):
                loss = nn.functional.mse_loss(logits.squeeze(), labels.squeeze().float())
            elif isinstance(result, LabelPrediction):
                loss = nn.functional.binary_cross_entropy_with_logits(logits, labels.float())
            else:
                loss = nn.functional.nll_loss(logits, labels)
        if prediction_loss_only:
            return loss, None, None
        return loss, logits, labels

    def compute_ref_log_probs(self: Any, *args: Any, **kwargs: Any) -> Any:
        """As DPO's trainer has it, which asks before training too (`precompute_ref_log_probs`)."""
        with self._references_still():
            return super().compute_ref_log_probs(*args, **kwargs)

    @contextlib.contextmanager
    def _references_still(self: Any) -> Iterator[None]:
        # The stock __init__ may ask for them, with the trained adapter active.
        found = self.__dict__.get("_references")
        references = inactive_variants(self.model) if found is None else found
        for variant in references:
            variant.still = True
        try:
            yield
        finally:
            for variant in references:
                variant.still = False

    def _compares(self: Any, inputs: dict[str, Any]) -> bool:
        """Whether the trainer has a loss of its own for batches without labels, as DPO's."""
        stock = getattr(super().prediction_step, "__func__", None)
        return labels_of(inputs) is None and stock is not Trainer.prediction_step

    def _mean_of_draws(self: Any, step: Callable[[], Any]) -> Tensor:
        """The mean over the draws of the loss of a step of evaluation."""
        losses = []
        options = {"seed": self.eval_seed, "kind": self.eval_draws, "scope": self.eval_scope}
        for number in range(self.eval_samples):
            which = posterior(self.model, "sample", first_sample=number, **options)
            with self._references_still(), which:
                losses.append(step()[0])
        return torch.stack(losses).mean(0)

    def _scores(self: Any) -> str | None:
        """What evaluation scores by itself: "choices", "tokens", or None: what compute_metrics does."""
        if self.choices is not None:
            return "choices"
        return "tokens" if self.eval_samples > 0 and label_shift(self.model) is not None else None

    def _score_tokens(
        self: Any, model: nn.Module, inputs: dict[str, Any]
    ) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
        """Loss of a batch; numbers of its labels, (B, T) each; the labels that count."""
        if self.eval_scope != DRAW_SCOPES[0]:
            raise ValueError(
                f"BayesTrainer: eval_scope must be {DRAW_SCOPES[0]!r} for labels of tokens, got "
                f"{self.eval_scope!r}"
            )
        with self.compute_loss_context_manager():
            found = predict_tokens(
                model,
                inputs,
                n_samples=self.eval_samples,
                seed=self.eval_seed,
                draws=self.eval_draws,
            )
        labels = torch.full_like(inputs["labels"], IGNORED, device="cpu")
        where = found.example, found.position
        labels[where] = inputs["labels"].cpu()[where]

        def placed(values: Tensor) -> Tensor:
            # Processes gather on their own device; fp64 is not defined on all of them.
            return torch.zeros(labels.shape).index_put(where, values.float()).to(self.args.device)

        loss = placed(found.log_probs).sum() / -max(len(found), 1)
        numbers = (found.log_probs, found.confidence, found.correct)
        return loss, tuple(map(placed, numbers)), labels.to(self.args.device)

    def evaluation_loop(
        self: Any,
        *args: Any,
        prediction_loss_only: bool | None = None,
        metric_key_prefix: str = "eval",
        **kwargs: Any,
    ) -> Any:
        """As the stock method, with scores of labels of tokens or of choices."""
        what = self._scores()
        output = super().evaluation_loop(
            *args,
            prediction_loss_only=prediction_loss_only if what is None else False,
            metric_key_prefix=metric_key_prefix,
            **kwargs,
        )
        if what is None or output.predictions is None or output.label_ids is None:
            return output
        batches = [(output.predictions, output.label_ids)]
        if isinstance(output.label_ids, list):  # eval_do_concat_batches=False
            batches = list(zip(output.predictions, output.label_ids, strict=True))
        parts = []
        for found, given in batches:
            labels = torch.as_tensor(given)
            counted = labels != IGNORED
            if what == "tokens":
                numbers = [torch.as_tensor(value)[counted] for value in found]
            else:
                rows, of = torch.as_tensor(found)[counted], labels[counted]
                top, best = rows.max(-1)
                numbers = [rows.gather(1, of[:, None])[:, 0], top.exp(), best == of]
            parts.append(numbers)
        scores = token_scores(*(torch.cat(columns) for columns in zip(*parts, strict=True)))
        if what == "tokens":
            scores["loss"] = scores["nll"]
        else:
            del scores["perplexity"]
        output.metrics.update({f"{metric_key_prefix}_{k}": v for k, v in scores.items()})
        return output


def inactive_variants(model: nn.Module) -> list[Any]:
    """Variants of adapters that are not active: DPO's trainer calls one "ref", a copy of the first values."""
    active = {id(item.variant) for item in bayes_layers(model)}
    return [variant for variant in bayes_variants(model) if id(variant) not in active]


__all__ = ["PosteriorEvaluation", "inactive_variants"]
