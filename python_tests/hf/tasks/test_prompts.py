"""Prompts of each style, and the tokens of their answers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import transformers

from bayes_kernels.hf.tasks.prompts import answer_token_ids, make_prompt
from bayes_kernels.task import Example
from hf.story_task import tiny_task


def test_blob_prompts() -> None:
    task = tiny_task("obqa")
    assert make_prompt(task)(task.train[0]) == (
        "Return the label of the correct answer for the question below.\n\n"
        "Question: What barks?\nChoices:\nA) a dog\nB) the cat.\nAnswer:"
    )
    assert make_prompt(task, compat=True)(task.train[0]) == (
        "Return the label of the correct answer for the question below.\n\n"
        "Question: What barks?\nChioces:\na dog) A\nthe cat.) B\nAnswer:"
    )
    assert "Choices:\na dog) A" in make_prompt(tiny_task("arc"), compat=True)(task.train[0])
    assert "Choices:\nA) a dog" in make_prompt(tiny_task("winogrande"), compat=True)(task.train[0])
    texts = tiny_task(kind="classification", label_names=("bad", "good"))
    assert make_prompt(texts)(Example("x", "Nice.", 1)) == (
        "Return the label of the correct class for the text below.\n\n"
        "Text: Nice.\nChoices:\nA) bad\nB) good\nAnswer:"
    )


def test_laplace_and_plain_prompts() -> None:
    task = tiny_task("arc")
    assert make_prompt(task, "laplace")(task.train[0]) == (
        "Select one of the choices that answers the following question: What barks? "
        "Choices: A. A dog. B. The cat. Answer:"
    )
    winogrande = tiny_task("winogrande")
    assert "Choices: A. a dog. B. the cat. Answer:" in make_prompt(winogrande, "laplace")(
        task.train[0]
    )
    assert "Choices: A. a dog. B the cat. Answer:" in make_prompt(
        winogrande, "laplace", compat=True
    )(task.train[0])
    assert make_prompt(task, "plain")(task.train[0]) == (
        "What barks?\nA) a dog\nB) the cat.\nAnswer:"
    )
    texts = tiny_task(kind="classification", label_names=("bad", "good"))
    assert make_prompt(texts, "plain")(Example("x", "Nice.", 1)) == "Nice.\nAnswer:"


def test_boolean_prompts_and_the_crossed_classes_of_compat() -> None:
    example = Example("x", "is it so", 1, context="p" * 2000)
    task = tiny_task("boolq", kind="classification", label_names=("false", "true"))
    fixed, compat = make_prompt(task), make_prompt(task, compat=True)
    assert fixed.answers == ("False", "True") and compat.answers == ("True", "False")
    assert fixed(example).endswith("\nQuestion: is it so\nAnswer (true or false):")
    assert fixed(example).count("p") - compat(example).count("p") == 2000 - 1024
    laplace = make_prompt(task, "laplace")
    assert laplace.answers == ("False", "True")
    assert laplace(replace(example, context="P")) == (
        "Answer the question with only True or False: is it so Context: P"
    )


def test_prompt_errors() -> None:
    with pytest.raises(ValueError, match="style: expected"):
        make_prompt(tiny_task(), "chat")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no published prompt"):
        make_prompt(tiny_task(), compat=True)


def test_answer_tokens(models_dir: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(models_dir / "stories260K")
    ids = answer_token_ids(tokenizer, "ABCDE")
    assert [tokenizer.convert_ids_to_tokens(i).strip("▁") for i in ids] == list("ABCDE")
    assert len(answer_token_ids(tokenizer, ["False", "True"])) == 2
    # Longer words end in common pieces in a small vocabulary.
    with pytest.raises(ValueError, match="'blue' and 'true': expected distinct last tokens"):
        answer_token_ids(tokenizer, ["blue", "true"])
    with pytest.raises(ValueError, match="expected a token"):
        answer_token_ids(tokenizer, ["A", ""])
