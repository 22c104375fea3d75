"""Prompts of causal language models, and the answer tokens that stand for the classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ...task import LETTERS, Example, Task

Style = Literal["blob", "laplace", "plain"]


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
