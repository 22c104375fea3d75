"""README.md of an adapter folder: what the adapter is and how to load it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ..files import write_text
from ._compat import PEFT_TYPE_NAME
from .checks import CONFIG_NAME, RECORD_NAME, read_json
from .config import DEFAULT_METHOD
from .method import METHODS, PLAIN, Method

CARD_NAME = "README.md"
_CLASSES = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}
# A file with one of these lines is PEFT's template or ours; any other is a text of somebody's.
_RENEWED = "<!-- Written anew with the adapter; without this line the file stays as it is. -->"
_TEMPLATE = "[More Information Needed]"
_SCORES = (("accuracy", "accuracy"), ("ece", "ECE"), ("nll", "NLL"), ("brier", "Brier score"))


def class_names(model: nn.Module) -> list[str]:
    """Names of a classifier's classes from its configuration, LABEL_0, ... where nobody gave any."""
    config: Any = getattr(model, "config", None)
    named = getattr(config, "id2label", None) or {}
    return [str(named[key]) for key in sorted(named)]


def problem_type(model: nn.Module) -> str | None:
    """ "regression" or "multi_label_classification", where a classifier's configuration says so."""
    found = getattr(getattr(model, "config", None), "problem_type", None)
    return found if found in ("regression", "multi_label_classification") else None


def write_card(
    folder: str | os.PathLike[str],
    *,
    classes: Sequence[str] = (),
    problem: str | None = None,
    scores: Mapping[str, float] | None = None,
    place: str | os.PathLike[str] | None = None,
) -> Path:
    """Write README.md into an adapter folder, in place of the one that PEFT writes.

    A README.md that somebody has written, or taken the last line from, stays as it is.

    Args:
        folder: with adapter_config.json, and experiment.json where a command wrote it.
        classes: names of the classes, where the record does not say.
        problem: from `problem_type`.
        scores: metrics of test examples by name (accuracy, ece, nll, brier), where they are known.
        place: where the folder will be, if it moves: paths are as seen from there.

    Returns:
        The file.
    """
    folder = Path(folder)
    config = read_json(folder / CONFIG_NAME)
    record = read_json(folder / RECORD_NAME) if (folder / RECORD_NAME).is_file() else {}
    path = folder / CARD_NAME
    if path.is_file():
        text = path.read_text(encoding="utf-8", errors="replace")
        if _RENEWED not in text and _TEMPLATE not in text:
            return path
    place = Path(place or folder)
    # Commands know the base by a word ("minilm") that transformers does not.
    source = _near(place, config.get("base_model_name_or_path"))
    base = _near(place, record.get("experiment", {}).get("model")) or source
    write_text(path, _text(folder, config, record, base, source, classes, problem, scores or {}))
    return path


def _text(
    folder: Path,
    config: Mapping[str, Any],
    record: Mapping[str, Any],
    base: str,
    source: str,
    classes: Sequence[str],
    problem: str | None,
    scores: Mapping[str, float],
) -> str:
    bayesian = config.get("peft_type") == PEFT_TYPE_NAME
    experiment = record.get("experiment", {})
    method = METHODS[
        config.get("method", DEFAULT_METHOD) if bayesian else experiment.get("method", PLAIN)
    ]
    names = list(record.get("task", {}).get("label_names", ())) or list(classes)
    facts = [
        ("Method", f"{method.title} (`{method.name}`)"),
        ("Base model", f"`{base}`" if base else "not recorded"),
        ("Task", record.get("task", {}).get("name") or config.get("task_type")),
        ("Classes", "" if all(name.startswith("LABEL_") for name in names) else ", ".join(names)),
        (
            "LoRA",
            f"r = {config.get('r')}, alpha = {config.get('lora_alpha')}, on {_layers(config)}",
        ),
        ("Prior", method.prior(config) if bayesian else ""),
        ("Scores", ", ".join(f"{t} {scores[k]:.4g}" for k, t in _SCORES if k in scores)),
    ]
    lines = [
        "---",
        *([f"base_model: {base}"] if base else []),
        "library_name: peft",
        f"tags: [bayes-kernels, lora, {method.name}]",
        "---",
        "",
        f"# {method.title} adapter",
        "",
        *(f"* {title}: {fact}" for title, fact in facts if fact),
        "",
        _advice(method),
        "",
        "## Loading",
        "",
    ]
    if record:
        lines += [
            "```python",
            "from bayes_kernels.hf import load",
            "",
            'p = load(".").predict(["..."])',
            "print(p)  # also p.labels, p.probs, p.entropy, p.mutual_information",
            "```",
            "",
            "With PEFT alone:",
            "",
        ]
    program = _loading(folder, config, method, source or base, names, problem, bool(record))
    lines += ["```python", *program, "```"]
    if bayesian:
        lines += [
            "",
            f"Without `import bayes_kernels.hf` PEFT raises `KeyError: '{PEFT_TYPE_NAME}'`.",
        ]
    if record:
        commands = ['bayes-kernels predict . --text "..."', "bayes-kernels evaluate ."]
    else:
        commands = [f"bayes-kernels evaluate . --data test.jsonl --model {base or 'BASE'}"]
    lines += ["", "```bash", *commands, "```", ""]
    if method.draw_scopes or method.text_samples is not None:  # draws of the weights
        count = method.n_samples if method.text_samples is None else method.text_samples
        lines += [
            "## Serving",
            "",
            "Servers that know plain LoRA only load draws of the weights as models beside each other;",
            "`bayes_kernels.serving` averages what they say. With the model from above:",
            "",
            "```python",
            "from bayes_kernels.hf import export_draws",
            "",
            f'export_draws(model, "draws", {count})',
            "```",
            "",
            "```bash",
            f"bayes-kernels export . --n-samples {count} --out ../draws",
            "```",
            "",
        ]
    lines += [_RENEWED, ""]
    return "\n".join(lines)


def _near(folder: Path, base: str | None) -> str:
    """A base model as it was named; a folder as seen from the adapter's, if it is near or was named
    as seen from the current one."""
    if base and os.path.exists(base):
        folder, path = folder.resolve(), Path(base).resolve()
        shared = Path(os.path.commonpath([folder, path]))
        near = len(folder.relative_to(shared).parts) <= 3 and shared != Path(shared.anchor)
        if near or not os.path.isabs(base):
            return Path(os.path.relpath(path, folder)).as_posix()
    return base or ""


def _layers(config: Mapping[str, Any]) -> str:
    targets = config.get("target_modules")
    return str(targets) if isinstance(targets, str) else ", ".join(sorted(targets or ()))


def _advice(method: Method) -> str:
    if not method.bayesian:
        return "A point estimate: predictions have no posterior draws."
    return (
        f"Predictions average posterior draws: {method.n_samples} is the default, more lower the "
        "Monte-Carlo error, 0 is the posterior mean (fast, and less well calibrated). A plain forward "
        "pass in evaluation mode is the mean."
    )


def _loading(
    folder: Path,
    config: Mapping[str, Any],
    method: Method,
    base: str,
    classes: Sequence[str],
    problem: str | None,
    recorded: bool,
) -> list[str]:
    """A program that loads the adapter in its folder, and asks it where the kind of model says how."""
    task, name = config.get("task_type"), base or "BASE MODEL"
    auto = _CLASSES.get(str(task), "AutoModel")
    head = ""
    if task in ("SEQ_CLS", "TOKEN_CLS") and classes:
        # The base may have no head, or one of another size: PEFT's file has the adapter's.
        head += f", num_labels={len(classes)}, ignore_mismatched_sizes=True"
        head += f', problem_type="{problem}"' if problem else ""
    unsure = "" if task in _CLASSES else "  # of the class that was adapted, which is not recorded"
    draws = f", n_samples={method.n_samples}" if method.bayesian else ""
    asked: list[str] = []
    names: list[str] = []
    if task == "SEQ_CLS":
        names = ["predict"]
        asked = [
            'batch = tokenizer(["..."], return_tensors="pt")',
            f"print(predict(model, batch{draws}))",
        ]
    elif task == "CAUSAL_LM" and not recorded:  # a recorded one answers in the words of its task
        names = ["generate"]
        asked = [f'print(generate(model, tokenizer, ["..."]{draws or ", n_samples=0"}))']
    more = []
    if any((folder / name).is_file() for name in method.files):
        load = method.load.__name__
        names, more = sorted([load, *names]), [f'{load}(model, ".")']
    tokenizer = [f'tokenizer = AutoTokenizer.from_pretrained("{name}")'] if asked else []
    return [
        "import bayes_kernels.hf  # first: it registers the adapter's type",
        *([f"from bayes_kernels.hf import {', '.join(names)}"] if names else []),
        "from peft import PeftModel",
        f"from transformers import {', '.join([auto, *(['AutoTokenizer'] if asked else [])])}",
        "",
        *tokenizer,
        f'base = {auto}.from_pretrained("{name}"{head}){unsure}',
        'model = PeftModel.from_pretrained(base, ".").eval()',
        *more,
        *asked,
    ]


__all__ = ["CARD_NAME", "class_names", "problem_type", "write_card"]
