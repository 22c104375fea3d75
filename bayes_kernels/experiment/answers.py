"""Answers that a causal model writes in words, and whether its doubts find those that are wrong."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor

from bayes_kernels import metrics

from ..hf.generate import generate
from ..hf.method import METHODS
from ..hf.tasks.adapters import on_device
from ..hf.tasks.encoder import TaskEncoder
from ..hf.tasks.prompts import make_prompt
from ..hf.texts import Generation
from ..hf.tokens import IGNORED, common_beginning
from ..table import Table
from ..task import Example, Task
from .build import adapter_config
from .convert import convert_model
from .held_out import Verdict, check_posterior
from .recipe import Experiment
from .train import train_model

# Scores of a text that say how uncertain it is, with their headings. A table has those that a row knows.
MEASURES = {
    "max_mutual_information": "mutual information, largest",
    "mean_mutual_information": "mutual information, mean",
    "max_entropy": "entropy, largest",
    "mean_entropy": "entropy, mean",
    "perplexity": "perplexity",
}
# The baseline, which methods that convert a trained adapter start from as well.
BASELINE = "map"


@dataclass(frozen=True)
class AnswerEncoder(TaskEncoder):
    """Prompts with their answers as texts to learn: labels (B, T), -100 for all but the answer.

    A prompt is the text and ``Answer:``. The answer is the name of the class, of multiple choice the
    letter, and the token that ends a text.
    """

    def __call__(self, example: Example) -> dict[str, Any]:
        item = self._causal(example)
        if example.label is None:
            return item
        prompt, answer = item["input_ids"], self.answer_tokens(example.label)
        return {
            "input_ids": [*prompt, *answer],
            "attention_mask": [1] * (len(prompt) + len(answer)),
            "labels": [IGNORED] * len(prompt) + answer,
        }

    def collate(self, items: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Items padded to the longest of them on the left, labels too."""
        rest = [{name: item[name] for name in item if name != "labels"} for item in items]
        batch = super().collate(rest)
        if all("labels" in item for item in items):
            width = batch["input_ids"].shape[1]
            rows = [[IGNORED] * (width - len(i["labels"])) + i["labels"] for i in items]
            batch["labels"] = torch.tensor(rows)
        return batch

    def answer_tokens(self, label: int) -> list[int]:
        """Tokens of the answer of a class, with the end."""
        before = self._tokens("Answer:")  # what a tokenizer makes of a word hangs on its space
        ids = self._tokens(f"Answer: {self.answer(label)}")
        return [*ids[common_beginning(ids, before) :], self.tokenizer.eos_token_id]

    def answer(self, label: int) -> str:
        """The answer of a class."""
        if self.task.kind == "classification":
            return self.task.label_names[label]
        assert self.prompt is not None
        return self.prompt.answers[label]

    def text(self, example: Example) -> str:
        """The prompt, cut to the largest length."""
        ids = self._causal(example)["input_ids"]
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))


def answer_encoder(tokenizer: Any, task: Task, max_length: int) -> AnswerEncoder:
    """The encoder of a task whose answers a model shall write.

    Raises:
        ValueError: The tokenizer has no token that ends a text.
    """
    tokenizer.padding_side = "left"
    if tokenizer.eos_token_id is None:
        raise ValueError("model: expected a tokenizer with a token that ends a text, got none")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    prompt = make_prompt(task, "plain")
    return AnswerEncoder(tokenizer, task, "causal", prompt, (), max_length)


def first_tokens(encoder: AnswerEncoder) -> list[int]:
    """The first token of each answer, by which a conversion tells classes apart.

    Raises:
        ValueError: Two answers begin with the same token.
    """
    found: list[int] = []
    for label, token in enumerate(_first_tokens(encoder)):
        if token in found:
            raise ValueError(
                f"answers {encoder.answer(found.index(token))!r} and {encoder.answer(label)!r}: expected "
                "different first tokens for methods that convert an adapter; choose other names of classes"
            )
        found.append(token)
    return found


def _first_tokens(encoder: AnswerEncoder) -> list[int]:
    return [encoder.answer_tokens(label)[0] for label in range(encoder.task.n_classes)]


@dataclass(frozen=True)
class Answers:
    """What an adapter wrote.

    Attributes:
        method: Name of the method.
        n_samples: Draws of the weights; 0 for one set.
        right: (n,) bool, whether the answer to each test prompt is the one of its class.
        texts: By set, "test" and those out of distribution: what was written, with its scores.
        conversion: Line of the conversion's report; None for methods that train.
        verdict: What validation examples said of draws and mean before it wrote; None where nothing was
            compared.
        seconds: Of the training; None where another row's adapter was taken.
    """

    method: str
    n_samples: int
    right: Tensor
    texts: Mapping[str, Sequence[Generation]]
    conversion: str | None = None
    verdict: Verdict | None = None
    seconds: float | None = None

    @property
    def title(self) -> str:
        """What tables call it."""
        return METHODS[self.method].title

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return float(self.right.double().mean())

    @property
    def measures(self) -> list[str]:
        """Names of the scores that its texts have."""
        return [name for name in MEASURES if getattr(self.texts["test"][0], name) is not None]

    def scores(self, measure: str, name: str = "test") -> Tensor:
        """(n,) a score of the texts of a set; higher is more uncertain."""
        return torch.tensor([getattr(text, measure) for text in self.texts[name]])

    def found(self, measure: str) -> metrics.Interval | None:
        """AUROC of telling wrong answers from right ones; None where all are one or the other."""
        values = self.scores(measure)
        inside, outside = values[self.right], values[~self.right]
        return metrics.auroc_interval(inside, outside) if len(inside) and len(outside) else None

    def detected(self, measure: str, name: str) -> metrics.Interval:
        """AUROC of telling the prompts of a set from those of the test set."""
        return metrics.auroc_interval(self.scores(measure), self.scores(measure, name))

    def curve(self, measure: str) -> metrics.RiskCoverageCurve:
        """Share of wrong answers among the least uncertain."""
        return metrics.risk_coverage_curve(-self.scores(measure), self.right)

    def to_dict(self) -> dict[str, Any]:
        """Numbers and texts, for JSON."""
        sets = {name: [one.to_dict() for one in texts] for name, texts in self.texts.items()}
        for text, right in zip(sets["test"], self.right.tolist(), strict=True):
            text["right"] = right
        return {
            "method": self.method,
            "n_samples": self.n_samples,
            "accuracy": self.accuracy,
            "conversion": self.conversion,
            "scale": None if self.verdict is None else self.verdict.report,
            "training_seconds": self.seconds,
            "texts": sets,
        }


def write_answers(
    experiments: Sequence[Experiment],
    task: Task,
    others: Mapping[str, Sequence[str]],
    *,
    device: str | None = None,
    progress: bool = True,
    done: Callable[[Answers], None] = lambda answers: None,
) -> list[Answers]:
    """Train adapters on a task's answers in words, let them answer, and keep how uncertain they were.

    Each adapter learns the names of the classes (of multiple choice the letters) after the text and
    ``Answer:``, with the loss of the answer's tokens alone. It then answers the test prompts, the task's
    out-of-distribution examples and other prompts, by the likeliest token of its draws' mean. A method
    that converts a trained adapter takes the first experiment's; it looks at the first token of the
    answer, among the first tokens of all answers. So does `check_posterior`, which compares draws with
    the mean on validation examples before an adapter writes, and may rescale its posterior; answers that
    begin with the same token are not compared.

    Args:
        experiments: The first is the baseline, without draws; of causal models, with one task and seed.
        task: The task.
        others: More prompts outside the training area, by the name of their set.
        device: "cpu", "cuda" or "auto".
        progress: Whether to show bars.
        done: Called with each method's answers.

    Returns:
        For each experiment its answers. Cost: a training for each method that trains, and texts of
        `n_samples` draws for each prompt; 1 + n_samples passes over at most 200 validation examples.

    Raises:
        ValueError: Model, data and options do not fit.
    """
    unlabelled = [example for example in task.test if example.label is None]
    if unlabelled or not task.test:
        raise ValueError(f"task {task.name!r}: expected labelled test examples, got none")
    found: list[Answers] = []
    state: dict[str, Tensor] = {}
    for one in experiments:
        row, title = METHODS[one.method], f"{METHODS[one.method].title}, seed {one.seed}"
        base, tokenizer = one.base.load_language_model(device)
        encoder = answer_encoder(tokenizer, task, one.recipe.max_length or 64)
        if any(METHODS[other.method].conversion is not None for other in experiments):
            first_tokens(encoder)
        config = adapter_config(one, base, "causal")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(one.seed)
            model = on_device(get_peft_model(base, config), device)
        line, seconds = None, None
        if row.conversion is None:
            training = train_model(one, model, encoder, progress=progress, label=f"{title}: train")
            seconds = training.seconds
            state = state or get_peft_model_state_dict(model)
        else:
            set_peft_model_state_dict(model, state)
            tokens = first_tokens(encoder)
            classes = _of_classes(encoder, tokens)
            line = str(convert_model(one, model, classes, choices=tokens, progress=progress))
        verdict, choices = None, _first_tokens(encoder)
        if len({*choices}) == len(choices):
            classes = _of_classes(encoder, choices)
            verdict = check_posterior(one, model, classes, choices=choices, progress=progress)
        count = one.n_samples if row.bayesian else 0
        if row.text_samples is not None:
            count = min(count, row.text_samples)
        texts = {}
        longest = max(len(encoder.answer_tokens(label)) for label in range(task.n_classes))
        prompts: dict[str, list[str]] = {"test": [encoder.text(example) for example in task.test]}
        prompts |= {name: [encoder.text(e) for e in some] for name, some in task.ood.items()}
        for name, some in others.items():
            own = [Example(str(i), text, None) for i, text in enumerate(some)]
            prompts[name] = [encoder.text(example) for example in own]
        for name, some in prompts.items():
            texts[name] = generate(
                model,
                tokenizer,
                some,
                n_samples=count,
                seed=one.seed,
                draws=one.recipe.draws if row.draw_scopes else "antithetic",
                max_new_tokens=longest,
                batch_size=one.recipe.eval_batch_size,
                progress=progress,
            )
        right = torch.tensor(
            [
                text.text.strip() == encoder.answer(example.label)
                for text, example in zip(texts["test"], task.test, strict=True)
                if example.label is not None
            ]
        )
        found.append(Answers(one.method, count, right, texts, line, verdict, seconds))
        done(found[-1])
    return found


def _of_classes(encoder: AnswerEncoder, choices: Sequence[int]) -> TaskEncoder:
    """The encoder whose labels are classes, told apart by a token."""
    task, prompt, longest = encoder.task, encoder.prompt, encoder.max_length
    return TaskEncoder(encoder.tokenizer, task, "causal", prompt, tuple(choices), longest)


def answers_table(found: Iterable[Answers]) -> Table:
    """AUROCs and areas under risk and coverage, a row for each method and score."""
    found = list(found)
    sets = [name for name in found[0].texts if name != "test"]
    headings = ["method", "score", "accuracy", "wrong: AUROC", "AURC"]
    headings += [f"{name}: AUROC" for name in sets]
    rows = []
    for one in found:
        for i, measure in enumerate(one.measures):
            cells = ["" if i else one.title, MEASURES[measure], "" if i else f"{one.accuracy:.3f}"]
            wrong = one.found(measure)
            cells += ["" if wrong is None else str(wrong), f"{one.curve(measure).aurc:.3f}"]
            cells += [str(one.detected(measure, name)) for name in sets]
            rows.append(cells)
    return Table("", headings, rows, left=2)


def answers_report(found: Iterable[Answers]) -> list[dict[str, Any]]:
    """What `answers_table` shows, with all texts, for JSON; numbers that are not finite as None."""

    def finite(value: float) -> float | None:
        return value if math.isfinite(value) else None

    content = []
    for one in found:
        scores = {}
        for measure in one.measures:
            wrong = one.found(measure)
            scores[measure] = {
                "wrong_auroc": None if wrong is None else wrong._asdict(),
                "aurc": finite(one.curve(measure).aurc),
                "ood_auroc": {
                    name: one.detected(measure, name)._asdict()
                    for name in one.texts
                    if name != "test"
                },
            }
        content.append({**one.to_dict(), "scores": scores})
    return content
