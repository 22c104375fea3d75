"""From examples to tensors."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ...progress import progress_bar
from ...task import Example, Task
from .prompts import Prompt

ModelKind = Literal["causal", "classifier", "multiple_choice"]


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

    def dataset(self, examples: Sequence[Example], *, progress: bool = False) -> EncodedDataset:
        """All examples, tokenised at once.

        Args:
            examples: The examples.
            progress: Whether to show a bar when it takes longer than two seconds.
        """
        # One by one: batches of a fast tokenizer take as long, one thread at a time.
        bar = progress_bar(progress, examples, desc="tokenise", unit="text")
        return EncodedDataset([self(example) for example in bar])

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


def batches_of(
    data: EncodedDataset, encoder: TaskEncoder, size: int
) -> Iterator[dict[str, torch.Tensor]]:
    for first in range(0, len(data), size):
        yield encoder.collate(data.items[first : first + size])
