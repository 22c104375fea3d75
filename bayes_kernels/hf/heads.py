"""Class logits from stock models: a trimmed head for causal language models, masks for missing choices."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

# The logit of a choice that an example does not have: its probability is exactly 0 in every
# floating-point type, and unlike -inf it keeps sums and products with 0 finite.
MASKED_LOGIT = -1e4


class ClassLogits:
    """Base of the model classes: `forward` gives class logits (B, C) and their loss.

    The loss is the mean cross-entropy over the batch, or, where the trainer gives
    `num_items_in_batch`, the sum divided by it. (The stock classifiers accept that argument and
    ignore it, so that their loss is too large by the number of accumulation steps.)
    """

    accepts_loss_kwargs = True

    def _class_logits(self, inputs: dict[str, Any]) -> Any:
        return super().forward(**inputs)  # type: ignore[misc]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        choice_mask: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Class logits.

        Args:
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds: As in the stock
                class, (B, T) or (B, K, T).
            choice_mask: bool (B, C), False for choices that do not exist: logit -10,000.
            labels: int64 (B,); -100 is ignored.
            num_items_in_batch: Number of labels in the whole accumulation window.
            return_dict: False for a tuple (loss, logits).

        Returns:
            `SequenceClassifierOutput` with `logits` (B, C) and, with `labels`, `loss`.
        """
        from transformers.modeling_outputs import SequenceClassifierOutput

        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
        }
        inputs = {key: value for key, value in inputs.items() if value is not None}
        output = self._class_logits({**inputs, **kwargs})
        logits = output.logits
        if choice_mask is not None:
            # A batch may have fewer choices than the task.
            missing = choice_mask.shape[1] - logits.shape[1]
            logits = nn.functional.pad(logits, (0, missing))
            logits = logits.masked_fill(~choice_mask.to(torch.bool), MASKED_LOGIT)
        loss = None
        if labels is not None:
            labels = labels.to(logits.device)
            reduction = "mean" if num_items_in_batch is None else "sum"
            loss = nn.functional.cross_entropy(logits.float(), labels, reduction=reduction)
            if num_items_in_batch is not None:
                if isinstance(num_items_in_batch, Tensor):
                    num_items_in_batch = num_items_in_batch.to(loss.device)
                loss = loss / num_items_in_batch
        result = SequenceClassifierOutput(
            loss=loss,
            logits=logits,
            hidden_states=getattr(output, "hidden_states", None),
            attentions=getattr(output, "attentions", None),
        )
        return result.to_tuple() if return_dict is False else result


class AnswerHead(ClassLogits):
    """A causal language model reduced to the logits of its answer tokens at the last token."""

    # Set when the class is given to a model.
    answer_ids: tuple[int, ...]
    padding_side: str
    _optional_inputs: frozenset[str]

    def _class_logits(self, inputs: dict[str, Any]) -> Any:
        mask = inputs.get("attention_mask")
        if mask is not None and mask.dim() == 2 and "position_ids" in self._optional_inputs:
            # Positions count from the first real token, as they would without padding.
            inputs.setdefault("position_ids", (mask.long().cumsum(-1) - 1).clamp(min=0))
        if "use_cache" in self._optional_inputs:
            inputs.setdefault("use_cache", False)
        last_only = self.padding_side == "left"
        if last_only and "logits_to_keep" in self._optional_inputs:
            inputs["logits_to_keep"] = 1
        output = super()._class_logits(inputs)
        logits = output.logits
        if last_only or mask is None:
            logits = logits[:, -1]
        else:
            # The head has C rows: applying it to all tokens and taking one is cheap.
            logits = logits[torch.arange(len(logits), device=logits.device), mask.sum(-1) - 1]
        output.logits = logits
        return output

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Not possible with a trimmed head.

        Raises:
            TypeError: Always.
        """
        raise TypeError(
            "generate: expected a model with its whole head, got one trimmed to "
            f"{len(self.answer_ids)} answers; load it with AutoModelForCausalLM"
        )


@functools.cache
def _subclass(base: Any, mixin: Any) -> type:
    """The class of a base and a mixin, one for each pair.

    No module has its name, by which pickle would look for it: objects say what it is made of.
    """

    def reduce(self: Any, protocol: Any) -> Any:
        made, arguments, *state = super(found, self).__reduce_ex__(protocol)
        # A subclass of this class is left to those who wrote it.
        return (_new, (base, mixin), *state) if type(self) is found else (made, arguments, *state)

    name = f"{base.__name__}With{mixin.__name__}"
    found: Any = type(name, (mixin, base), {"__reduce_ex__": reduce})
    return found


def _new(base: Any, mixin: Any) -> Any:
    """An object of the class, without its attributes."""
    return object.__new__(_subclass(base, mixin))


def mix_in(model: Any, mixin: Any) -> None:
    stock: Any = type(model)
    model.__class__ = _subclass(stock, mixin)
    # From this name the trainer tells whether labels are shifted by one token.
    model.loss_type = "ForSequenceClassification"


def trim_head(model: Any, answer_ids: Sequence[int], *, padding_side: str = "left") -> Any:
    """Give a causal language model the trimmed head of `AnswerHead`, in place.

    The C rows are copied, and tied weights are untied: the input embedding stays as it is, and
    training or adapting the head does not change it.

    Args:
        model: A causal language model of transformers.
        answer_ids: Token ids of the C answers.
        padding_side: "left" (the last position is the last token of every row) or "right".

    Returns:
        The same model.

    Raises:
        ValueError: The model has no linear floating-point output head, or an id is out of range.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or not head.weight.is_floating_point():
        raise ValueError(
            f"trim_head: expected a model whose output head is a floating-point nn.Linear, got "
            f"{type(head).__name__}; leave lm_head out of quantisation and apply trim_head before "
            "any adapter"
        )
    if any(not 0 <= token < head.out_features for token in answer_ids):
        raise ValueError(
            f"trim_head: expected token ids below {head.out_features}, got {list(answer_ids)}"
        )
    rows = torch.tensor(list(answer_ids), device=head.weight.device)
    skip_init: Any = torch.nn.utils.skip_init
    with torch.no_grad():
        trimmed = skip_init(
            nn.Linear,
            head.in_features,
            len(rows),
            bias=head.bias is not None,
            device=head.weight.device,
            dtype=head.weight.dtype,
        )
        trimmed.weight.copy_(head.weight[rows])
        if head.bias is not None:
            trimmed.bias.copy_(head.bias[rows])
    model.set_output_embeddings(trimmed)
    model.config.tie_word_embeddings = False
    # What transformers would tie again when it saves or moves the model.
    model._tied_weights_keys = {}
    model.all_tied_weights_keys = {}
    parameters = inspect.signature(type(model).forward).parameters
    optional = frozenset({"logits_to_keep", "position_ids", "use_cache"}.intersection(parameters))
    mix_in(model, AnswerHead)
    model.answer_ids = tuple(answer_ids)
    model.padding_side = padding_side
    model._optional_inputs = optional
    return model
