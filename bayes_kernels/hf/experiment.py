"""Train a method on a task and score it: what the command line and comparisons are made of.

An :class:`Experiment` says everything about one run (data, model, method, :class:`Recipe`, seed)
and goes to and from JSON. :func:`run` trains it, :func:`evaluate_model` scores a trained model,
and :func:`report` puts several runs into the dictionary that becomes ``metrics.json``.

Methods share everything but the method: with the same seed plain LoRA and BLoB start from the same
head and the same factors, see the same examples in the same order, and use the same optimiser,
learning rate, batch size and number of steps.

Costs are measured as follows. Training is the wall-clock time of the training loop. Prediction is
milliseconds per example, each batch timed by itself (after synchronising the GPU), batches visited
in an order independent of their length, the first five (at most half) discarded. Peak memory is
``torch.cuda.max_memory_allocated`` on a GPU; on Linux it is the high-water mark of the resident
memory of the whole process (libraries and model included), reset before each measurement through
``/proc/self/clear_refs``; elsewhere the high-water mark since the process began, which only rises.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import gc
import importlib.metadata
import json
import math
import multiprocessing
import os
import pickle
import platform
import re
import secrets
import shutil
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback
from transformers import TrainingArguments as Arguments

from bayes_kernels import metrics

from .config import BAYES_FIELDS, BayesLoraConfig, BlobConfig
from .models import TaskEncoder, load_model
from .predict import Prediction, predict
from .tasks import HUB_DATASETS, Example, Task, choose_subset, load_task
from .trainer import BayesTrainer, last_checkpoint

METHODS = ("map", "blob")
METHOD_NAMES = {"map": "LoRA (MAP)", "blob": "BLoB"}
EXPERIMENT_FILE = "experiment.json"
METRICS_FILE = "metrics.json"
CHECKPOINTS = "checkpoints"
_FORMAT = 1

# What a table shows of a Report, and what is better.
METRICS = ("accuracy", "nll", "ece", "brier", "ood_auroc")


# --- What is run ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """How an adapter is trained: the defaults of every command, in this one place.

    Attributes:
        rank, alpha: r and alpha of LoRA; the update is alpha / r times B A.
        target_modules: Names of the adapted layers; None for PEFT's choice for the model's type
            (query and value projections).
        dropout: Dropout before the adapter.
        base_dropout: Dropout inside the base model; None leaves it as the checkpoint says.
        lr: Peak learning rate of AdamW, for adapter and head.
        steps: Optimiser steps.
        batch_size: Examples of one step.
        accumulation: Micro-batches that a step is divided into.
        warmup: Share of the steps with rising learning rate; it then falls linearly to 0.
        weight_decay, adam_epsilon, max_grad_norm: Of AdamW; a norm of 0 does not clip.
        max_length: Largest number of tokens; None for what `load_model` chooses.
        n_samples: Posterior draws of a prediction.
        eval_batch_size: Examples of one batch in prediction.
        prior_std, init_rho, scope, kl_schedule, kl_lr, kl_time, kl_gamma: Of `BayesLoraConfig`;
            None for its defaults.
        lora: More options of `peft.LoraConfig`.

    Raises:
        ValueError: A number is out of range.
    """

    rank: int = 8
    alpha: float = 16
    target_modules: tuple[str, ...] | None = None
    dropout: float = 0.0
    base_dropout: float | None = 0.0
    lr: float = 2e-3
    steps: int = 400
    batch_size: int = 8
    accumulation: int = 1
    warmup: float = 0.06
    weight_decay: float = 0.0
    adam_epsilon: float = 1e-6
    max_grad_norm: float = 0.0
    max_length: int | None = None
    n_samples: int = 10
    eval_batch_size: int = 16
    prior_std: float | None = None
    init_rho: float | None = None
    scope: str | None = None
    kl_schedule: str | None = None
    kl_lr: float | None = None
    kl_time: float | None = None
    kl_gamma: float | None = None
    lora: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.target_modules, list):
            object.__setattr__(self, "target_modules", tuple(self.target_modules))
        for name in ("rank", "steps", "batch_size", "accumulation", "eval_batch_size"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"recipe: {name} must be an integer >= 1, got {value!r}")
        if isinstance(self.n_samples, bool) or self.n_samples < 0:
            raise ValueError(f"recipe: n_samples must be an integer >= 0, got {self.n_samples!r}")
        if not (self.lr > 0 and math.isfinite(self.lr)):
            raise ValueError(f"recipe: lr must be a positive number, got {self.lr!r}")
        for name in ("warmup", "dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"recipe: {name} must be in [0, 1), got {getattr(self, name)!r}")
        if self.base_dropout is not None and not 0 <= self.base_dropout < 1:
            raise ValueError(f"recipe: base_dropout must be in [0, 1), got {self.base_dropout!r}")
        if self.batch_size % self.accumulation:
            raise ValueError(
                f"recipe: batch_size must be a multiple of accumulation, got {self.batch_size} and "
                f"{self.accumulation}"
            )


# What `demo` trains: long enough for plain LoRA to become overconfident on 400 texts, and over in
# five minutes on two cores.
DEMO = Recipe(max_length=32)

_POSTERIOR_FIELDS = (
    "prior_std",
    "init_rho",
    "scope",
    "kl_schedule",
    "kl_lr",
    "kl_time",
    "kl_gamma",
)


@dataclass(frozen=True)
class Source:
    """Where a task comes from: the arguments of `load_task`.

    Attributes:
        data: "stdlib-docs", a name of the hub, or a JSONL file or folder.
        test: A JSONL file of test examples, for files only.
        ood: Out-of-distribution sets: JSONL files, or names for data of the hub; None for the sets
            that the task itself brings.
        train_size: Number of training examples; None for the task's default, 0 for all.
        test_size, ood_size: Largest number of test examples, and of examples of each
            out-of-distribution set, chosen by hash; None for all.
        label_names: Names of the classes, for files only.
    """

    data: str = "stdlib-docs"
    test: str | None = None
    ood: tuple[str, ...] | None = None
    train_size: int | None = None
    test_size: int | None = None
    ood_size: int | None = None
    label_names: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("ood", "label_names"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))

    def load(self, seed: int = 0) -> Task:
        """The task, with the training examples that the seed chooses.

        Raises:
            ValueError: The data is missing or malformed, or an option does not go with it.
            ImportError, ConnectionError: As `load_task`.
        """
        options: dict[str, Any] = {"seed": seed}
        if self.train_size is not None:
            options["train_size"] = self.train_size or None
        is_file = Path(self.data).exists()
        for name in ("test", "label_names"):
            if getattr(self, name) is not None:
                if not is_file:
                    raise ValueError(
                        f"{name.replace('_', '-')}: expected data of your own beside it, got "
                        f"{self.data!r}, which is not an existing file or folder; leave it out"
                    )
                options[name] = getattr(self, name)
        if self.ood is not None:
            if not is_file and self.data not in HUB_DATASETS:
                raise ValueError(
                    f"ood: expected data of your own or of the hub beside it, got {self.data!r}, "
                    "which brings its own; leave it out"
                )
            options["ood"] = self.ood
        task = load_task(self.data, **options)
        return dataclasses.replace(
            task,
            test=_at_most(task.test, self.test_size),
            ood={name: _at_most(examples, self.ood_size) for name, examples in task.ood.items()},
        )


def _at_most(examples: list[Example], size: int | None) -> list[Example]:
    return examples if size is None or size >= len(examples) else choose_subset(examples, size)


@dataclass(frozen=True)
class Experiment:
    """One run: data, model, method, recipe and seed.

    Attributes:
        source: The data.
        model: What `load_model` takes: "minilm", a folder, or a name on the hub.
        kind, style: Kind of model and style of prompt, see `load_model`.
        dtype: "float32", "bfloat16" or "float16": type of the base model's weights.
        quantization: "8bit" or "4bit" for a base quantised by bitsandbytes, else None.
        method: "map" (plain LoRA) or "blob".
        recipe: How it is trained.
        seed: Seed of the training subset, head, factors, order of examples, and noise.
    """

    source: Source = field(default_factory=Source)
    model: str = "minilm"
    kind: str = "auto"
    style: str = "blob"
    dtype: str = "float32"
    quantization: str | None = None
    method: str = "blob"
    recipe: Recipe = field(default_factory=Recipe)
    seed: int = 0

    def __post_init__(self) -> None:
        for name, allowed in (
            ("method", METHODS),
            ("dtype", ("float32", "bfloat16", "float16")),
            ("quantization", (None, "8bit", "4bit")),
        ):
            if getattr(self, name) not in allowed:
                words = ", ".join(str(word) for word in allowed if word)
                raise ValueError(f"{name}: expected one of {words}, got {getattr(self, name)!r}")

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, words, lists and dictionaries."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Experiment:
        """The inverse of `to_dict`.

        Raises:
            ValueError: A field is unknown or of the wrong kind.
        """
        try:
            return cls(
                **{
                    **fields,
                    "source": Source(**fields.get("source", {})),
                    "recipe": Recipe(**fields.get("recipe", {})),
                }
            )
        except TypeError as error:
            raise ValueError(f"experiment: a field does not fit this version: {error}") from None


# --- Models and adapters -------------------------------------------------------------------------


def _load_base(
    experiment: Experiment, task: Task, max_length: int | None
) -> tuple[Any, TaskEncoder]:
    options: dict[str, Any] = {"dtype": getattr(torch, experiment.dtype)}
    if experiment.quantization is not None:
        try:
            import bitsandbytes  # noqa: F401
        except ImportError:
            raise ImportError(
                f"quantization {experiment.quantization!r} needs bitsandbytes; "
                "run: pip install 'bayes-kernels[quant]'"
            ) from None
        from transformers import BitsAndBytesConfig

        options["quantization_config"] = BitsAndBytesConfig(
            load_in_8bit=experiment.quantization == "8bit",
            load_in_4bit=experiment.quantization == "4bit",
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=getattr(torch, experiment.dtype),
        )
    return load_model(
        experiment.model,
        task,
        kind=experiment.kind,  # type: ignore[arg-type]
        style=experiment.style,  # type: ignore[arg-type]
        max_length=max_length,
        head_seed=experiment.seed,
        **options,
    )


def adapter_config(experiment: Experiment, model: Any, kind: str) -> LoraConfig:
    """The PEFT configuration of an experiment's method for a model of some kind.

    Raises:
        ValueError: An option is unknown, out of range, or does not go with the method.
    """
    recipe = experiment.recipe
    config_class = LoraConfig if experiment.method == "map" else BayesLoraConfig
    unknown = sorted(set(recipe.lora) - set(config_class.__dataclass_fields__))
    if unknown:
        raise ValueError(
            f"lora: expected options of peft.{config_class.__name__}, got {', '.join(unknown)}"
        )
    targets = recipe.target_modules
    options: dict[str, Any] = {
        "r": recipe.rank,
        "lora_alpha": recipe.alpha,
        "lora_dropout": recipe.dropout,
        "target_modules": None if targets is None else list(targets),
        "task_type": {"causal": "CAUSAL_LM", "classifier": "SEQ_CLS"}.get(kind),
    }
    if kind == "multiple_choice":
        names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
        options["modules_to_save"] = sorted(names & {"classifier", "logits_proj", "score"})
    options.update(recipe.lora)
    if experiment.method == "map":
        return LoraConfig(**options)
    for name in _POSTERIOR_FIELDS:
        if getattr(recipe, name) is not None:
            options.setdefault(name, getattr(recipe, name))
    options.setdefault("seed", experiment.seed)
    return BlobConfig(**options)


def build(
    experiment: Experiment, task: Task, *, device: str | None = None
) -> tuple[PeftModel, TaskEncoder]:
    """A new adapter on the base model, ready for training, and the encoder of its input.

    Raises:
        ValueError, ImportError, OSError: As `load_model`, or adapter and model do not go together.
    """
    recipe = experiment.recipe
    base, encoder = _load_base(experiment, task, recipe.max_length)
    if recipe.base_dropout is not None:
        for module in base.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = recipe.base_dropout
    config = adapter_config(experiment, base, encoder.kind)
    # Plain LoRA and Bayesian adapters draw the same factors from the same seed.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(experiment.seed)
        try:
            model = get_peft_model(base, config)
        except ValueError as error:
            if not re.search(r"target_modules|[Tt]arget modules|were targeted", str(error)):
                raise
            names = {
                name.rpartition(".")[2]
                for name, module in base.named_modules()
                if isinstance(module, torch.nn.Linear)
            }
            given = ", ".join(recipe.target_modules or ()) or "none, and PEFT has no default"
            raise ValueError(
                f"target-modules: expected names of linear layers of {experiment.model!r}, which "
                f"has {', '.join(sorted(names))}; got {given}"
            ) from None
    return _placed(model, device), encoder


def _placed(model: PeftModel, device: str | None) -> PeftModel:
    """The model on a device; quantised bases stay where they were loaded and refuse to move."""
    target = pick_device(device)
    quantised = getattr(model.get_base_model(), "hf_quantizer", None) is not None
    return model if quantised else model.to(target)


def pick_device(device: str | None = None) -> torch.device:
    """The device of a name; by default the GPU where there is one.

    Raises:
        ValueError: There is no such device.
    """
    if device in (None, "auto"):
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device: expected 'auto', 'cpu' or 'cuda', got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: 'cuda' needs a GPU that torch can use, got none; use 'cpu'")
    return torch.device(device)


def save_adapter(
    model: PeftModel, experiment: Experiment, task: Task, encoder: TaskEncoder, folder: Path
) -> None:
    """Write the adapter and its `experiment.json` into a folder, each file whole or not at all.

    `PeftModel.from_pretrained` and `load_adapter` read it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".adapter.", dir=folder))
    try:
        model.save_pretrained(str(temporary), save_embedding_layers=False)
        _write_record(temporary, experiment, task, encoder)
        files = sorted(temporary.iterdir(), key=lambda path: path.name == "adapter_config.json")
        for path in files:  # the configuration last: without it there is no adapter
            os.replace(path, folder / path.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_record(folder: Path, experiment: Experiment, task: Task, encoder: TaskEncoder) -> None:
    record = {
        "format": _FORMAT,
        "experiment": experiment.to_dict(),
        "task": {
            "name": task.name,
            "kind": task.kind,
            "label_names": list(task.label_names),
            "template": task.template,
        },
        "max_length": encoder.max_length,
        "versions": versions(),
    }
    write_json(folder / EXPERIMENT_FILE, record)


class Saved(NamedTuple):
    """What `read_record` finds in a folder: the experiment, its task without examples, a length."""

    experiment: Experiment
    task: Task
    max_length: int | None


def read_record(folder: str | Path) -> Saved | None:
    """`experiment.json` of an adapter folder; None where there is none.

    Raises:
        ValueError: The folder has no adapter that can be read, or the file is damaged.
    """
    path = Path(folder)
    if not path.is_dir():
        raise ValueError(f"adapter {str(folder)!r}: expected a folder that exists, found none")
    if not (path / "adapter_config.json").is_file():
        last = last_checkpoint(path / CHECKPOINTS)
        advice = f"; name its last checkpoint instead: {last}" if last else ""
        raise ValueError(
            f"adapter {str(folder)!r}: expected adapter_config.json in it, found none{advice}"
        )
    if not (path / "adapter_model.safetensors").is_file():
        raise ValueError(
            f"adapter {str(folder)!r}: expected adapter_model.safetensors in it, found none; "
            "pickled weights (.bin) are not read"
        )
    if not (path / EXPERIMENT_FILE).is_file():
        return None
    try:
        record = json.loads((path / EXPERIMENT_FILE).read_text(encoding="utf-8"))
        if record["format"] != _FORMAT:
            raise ValueError(f"format {record['format']!r} is not {_FORMAT}")
        shell = record["task"]
        task = Task(
            shell["name"],
            shell["kind"],
            tuple(shell["label_names"]),
            [],
            [],
            [],
            template=shell["template"],
        )
        return Saved(Experiment.from_dict(record["experiment"]), task, record["max_length"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path / EXPERIMENT_FILE}: expected what `train` wrote, got {error!r}"
        ) from None


def load_adapter(
    folder: str | Path,
    experiment: Experiment,
    task: Task,
    *,
    max_length: int | None = None,
    device: str | None = None,
) -> tuple[PeftModel, TaskEncoder]:
    """A trained adapter on its base model, in eval mode, and the encoder of its input.

    Args:
        folder: What `save_adapter` or PEFT wrote, or a checkpoint.
        experiment: What was run: base model, kind, style, seed of the head.
        task: Classes of the model, and examples that show how many choices there are.
        max_length: That of training.
        device: "cpu", "cuda" or "auto".

    Raises:
        ValueError, ImportError, OSError: As `load_model`, or the adapter does not fit the model.
    """
    base, encoder = _load_base(experiment, task, max_length or experiment.recipe.max_length)
    try:
        model = PeftModel.from_pretrained(base, str(folder), is_trainable=False)
    except RuntimeError as error:  # torch's message lists every tensor that differs
        first = next((line for line in str(error).splitlines() if "mismatch" in line), str(error))
        raise ValueError(
            f"adapter {str(folder)!r}: expected tensors that fit {experiment.model!r} with "
            f"{task.n_classes} classes, got {first.strip()}"
        ) from None
    return _placed(model, device).eval(), encoder


# --- Training ------------------------------------------------------------------------------------


class Interrupted(Exception):
    """Training was stopped by a signal after it had written a checkpoint.

    Attributes:
        checkpoint: Folder of the checkpoint; None where checkpoints were off.
        step: Number of steps done.
        signal: Number of the signal.
    """

    def __init__(self, checkpoint: str | None, step: int, signal_number: int) -> None:
        super().__init__(f"stopped by signal {signal_number} after step {step}")
        self.checkpoint, self.step, self.signal = checkpoint, step, signal_number


@dataclass(frozen=True)
class Training:
    """What training cost and logged.

    Attributes:
        seconds: Wall-clock time of the training loop, of this process (a resumed run counts from
            where it resumed).
        steps: Optimiser steps of this process.
        peak_memory_mib: Peak memory, see the module's description.
        log: What the trainer logged: step, loss, and for BLoB nll, kl and elbo.
        adapter: The adapter's options with all defaults filled in.
    """

    seconds: float
    steps: int
    peak_memory_mib: float
    log: list[dict[str, float]]
    adapter: dict[str, Any]


def train_model(
    experiment: Experiment,
    model: PeftModel,
    encoder: TaskEncoder,
    *,
    checkpoints: Path | None = None,
    save_every: int | None = None,
    resume: bool = False,
    progress: bool = True,
    label: str = "train",
) -> Training:
    """Train an adapter, in place, with the stock Trainer ("map") or `BayesTrainer` ("blob").

    SIGINT and SIGTERM finish the running step, write a checkpoint and raise `Interrupted`; a second
    SIGINT stops at once, and the last complete checkpoint is the one before.

    Args:
        experiment: Method, recipe and seed.
        model, encoder: From `build`.
        checkpoints: Folder of checkpoints; None writes none.
        save_every: Steps between checkpoints; None for a fifth of the steps.
        resume: Go on from the last complete checkpoint where there is one.
        progress: Whether to show a bar when it takes longer than two seconds.
        label: Name of the bar.

    Raises:
        Interrupted: A signal came, and the checkpoint is written.
        ValueError: No training examples.
    """
    recipe = experiment.recipe
    data = encoder.dataset(encoder.task.train)
    if not len(data):
        raise ValueError(f"task {encoder.task.name!r}: expected training examples, got none")
    with contextlib.ExitStack() as stack:
        if checkpoints is None:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="bayes_kernels."))
        else:
            folder = str(checkpoints)
        arguments = Arguments(
            output_dir=folder,
            max_steps=recipe.steps,
            per_device_train_batch_size=recipe.batch_size // recipe.accumulation,
            gradient_accumulation_steps=recipe.accumulation,
            learning_rate=recipe.lr,
            lr_scheduler_type="linear",
            warmup_steps=math.ceil(recipe.warmup * recipe.steps),
            weight_decay=recipe.weight_decay,
            adam_epsilon=recipe.adam_epsilon,
            max_grad_norm=recipe.max_grad_norm,
            optim="adamw_torch",
            seed=experiment.seed,
            data_seed=experiment.seed,
            logging_steps=max(1, recipe.steps // 10),
            save_strategy="no" if checkpoints is None else "steps",
            save_steps=save_every or max(1, recipe.steps // 5),
            save_total_limit=2,
            remove_unused_columns=False,
            label_names=["labels"],
            report_to="none",
            disable_tqdm=True,
            use_cpu=next(model.parameters()).device.type == "cpu",
        )
        options: dict[str, Any] = {
            "model": model,
            "args": arguments,
            "train_dataset": data,
            "data_collator": encoder.collate,
        }
        trainer: Any = (Trainer if experiment.method == "map" else BayesTrainer)(**options)
        for callback in (ProgressCallback, PrinterCallback):
            trainer.remove_callback(callback)
        trainer.add_callback(_Bar(label, progress))
        stop = _StopOnSignal()
        if checkpoints is not None:
            trainer.add_callback(stop)
            trainer.add_callback(_RecordBesideCheckpoint(experiment, encoder))
        last = last_checkpoint(folder) if resume else None
        start = _step_of(last)
        with _peak_memory() as peak, stop.installed(checkpoints is not None):
            _synchronise(model)
            begin = time.perf_counter()
            trainer.train(resume_from_checkpoint=last)
            _synchronise(model)
            seconds = time.perf_counter() - begin
        done = trainer.state.global_step
        if stop.received is not None and done < recipe.steps:
            raise Interrupted(last_checkpoint(folder), done, stop.received)
        log = [entry for entry in trainer.state.log_history if "loss" in entry]
    model.eval()
    return Training(seconds, done - start, peak.mib, log, _resolved(model))


def _resolved(model: PeftModel) -> dict[str, Any]:
    """Rank, scaling, targets, and for a Bayesian adapter everything about its posterior."""
    config = model.peft_config["default"].to_dict()
    names = {"r", "lora_alpha", "target_modules", *(BAYES_FIELDS & set(config))}
    found = {name: config[name] for name in sorted(names)}
    targets = found["target_modules"]
    return {**found, "target_modules": sorted(targets) if isinstance(targets, set) else targets}


def _step_of(checkpoint: str | None) -> int:
    return 0 if checkpoint is None else int(checkpoint.rpartition("-")[2])


class _Bar(TrainerCallback):
    """One bar over the steps, with the last loss."""

    def __init__(self, label: str, enabled: bool) -> None:
        self.label, self.enabled = label, enabled
        self.bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar = progress_bar(self.enabled, total=state.max_steps, desc=self.label, unit="step")
        self.bar.update(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.update(state.global_step - self.bar.n)
        if _finished_steps is not None:
            with _finished_steps.get_lock():
                _finished_steps.value += 1

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if self.bar is not None and logs and "loss" in logs:
            self.bar.set_postfix_str(f"loss {float(logs['loss']):.3f}", refresh=False)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.close()


class _StopOnSignal(TrainerCallback):
    """Turns SIGINT and SIGTERM into a checkpoint at the end of the running step."""

    def __init__(self) -> None:
        self.received: int | None = None

    @contextlib.contextmanager
    def installed(self, enabled: bool) -> Iterator[None]:
        """Handles the signals inside the context; only the main thread can."""
        if not enabled or threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {
            number: signal.signal(number, self._receive)
            for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _receive(self, number: int, frame: Any) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.received is not None:
            control.should_save = True
            control.should_training_stop = True


class _RecordBesideCheckpoint(TrainerCallback):
    """Puts `experiment.json` into every checkpoint, so that it can be evaluated by itself."""

    def __init__(self, experiment: Experiment, encoder: TaskEncoder) -> None:
        self.experiment, self.encoder = experiment, encoder

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        _write_record(folder, self.experiment, self.encoder.task, self.encoder)


# --- Prediction and scores -----------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One predictor's scores on the test set: a line of the table.

    Attributes:
        name: What the table calls it.
        method: "map" or "blob".
        n_samples: Posterior draws; 0 for one set of weights.
        temperature: Temperature fitted on the validation split; None for none.
        report: Every metric on the test examples, with out-of-distribution detection over all sets
            together.
        ood: By set: auroc, fpr95, and scores where its examples have labels.
        ms_per_example: Cost of a prediction.
        peak_memory_mib: Peak memory of predicting.
        log_probs: (n, C) test predictions.
        labels: (n,) test labels.
        entropy_ood: Predictive entropies of all out-of-distribution examples.
    """

    name: str
    method: str
    n_samples: int
    temperature: float | None
    report: metrics.Report
    ood: dict[str, dict[str, float]]
    ms_per_example: float
    peak_memory_mib: float
    log_probs: Tensor = field(repr=False)
    labels: Tensor = field(repr=False)
    entropy_ood: Tensor = field(repr=False)


def predict_examples(
    model: PeftModel,
    encoder: TaskEncoder,
    examples: Sequence[Example],
    *,
    n_samples: int = 0,
    seed: int = 0,
    batch_size: int = 16,
    progress: bool = True,
    label: str = "predict",
) -> tuple[Prediction, float]:
    """Predictions for examples, in their order, and milliseconds per example.

    Batches hold texts of similar length, so that little padding is computed.

    Args:
        model: Plain or Bayesian adapter.
        encoder: Its encoder.
        examples: At least one.
        n_samples: Posterior draws; 0 for the mean, and for plain adapters.
        seed: Seed of the draws.
        batch_size: Examples of a batch.
        progress: Whether to show a bar when it takes longer than two seconds.
        label: Name of the bar.

    Raises:
        ValueError: No examples, or draws from an adapter that has no posterior.
    """
    if not examples:
        raise ValueError(f"{label}: expected at least one example, got none")
    bayesian = any(isinstance(c, BayesLoraConfig) for c in model.peft_config.values())
    if n_samples and not bayesian:
        raise ValueError(
            "n-samples: expected 0 for a plain LoRA adapter, which has no posterior, got "
            f"{n_samples}"
        )
    items = encoder.dataset(examples).items
    order = sorted(range(len(items)), key=lambda i: _length(items[i]))
    chunks = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    shuffle = torch.Generator().manual_seed(0)
    chunks = [chunks[i] for i in torch.randperm(len(chunks), generator=shuffle).tolist()]
    parts, times = [], []
    for chunk in progress_bar(progress, chunks, desc=label, unit="batch"):
        batch = encoder.collate([items[i] for i in chunk])
        _synchronise(model)
        begin = time.perf_counter()
        if bayesian:
            part = predict(model, batch, n_samples=n_samples, seed=seed)
        else:
            part = _predict_plain(model, batch)
        _synchronise(model)
        times.append(time.perf_counter() - begin)
        parts.append(dataclasses.replace(part, labels=None))
    discarded = min(5, len(chunks) // 2)
    kept = sum(len(chunk) for chunk in chunks[discarded:])
    milliseconds = 1000 * sum(times[discarded:]) / kept
    joined = Prediction.concatenate(parts)
    back = torch.tensor([i for chunk in chunks for i in chunk]).argsort()
    prediction = dataclasses.replace(
        joined,
        log_probs=joined.log_probs[back],
        entropy=joined.entropy[back],
        expected_entropy=joined.expected_entropy[back],
    )
    return prediction, milliseconds


def _length(item: dict[str, Any]) -> int:
    ids = item["input_ids"]
    return max(map(len, ids)) if isinstance(ids[0], list) else len(ids)


@torch.no_grad()
def _predict_plain(model: PeftModel, batch: Mapping[str, Tensor]) -> Prediction:
    device = next(model.parameters()).device
    inputs = {key: value.to(device) for key, value in batch.items() if key != "labels"}
    model.eval()
    log_probs = model(**inputs).logits.double().log_softmax(-1).cpu()
    entropy = metrics.predictive_entropy(log_probs)
    return Prediction(log_probs, entropy, entropy, n_samples=0)


def fit_temperature(log_probs: Tensor, labels: Tensor) -> float:
    """The temperature T that minimises the NLL of softmax(log_probs / T).

    Args:
        log_probs: (n, C) log-probabilities or logits of held-out examples.
        labels: (n,) their labels.

    Returns:
        T, within [0.05, 20]: where every prediction is right, or none, the minimum is at infinity.

    Source: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017.
    """
    logits = log_probs.double().clamp(min=-1e4)
    log_t = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [log_t], max_iter=100, tolerance_grad=1e-10, line_search_fn="strong_wolfe"
    )
    bound = math.log(20)

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = torch.nn.functional.cross_entropy(logits * (-log_t).exp(), labels)
        value.backward()
        return value

    optimizer.step(loss)  # type: ignore[arg-type]
    found = float(log_t.detach())
    return math.exp(min(max(found, -bound), bound)) if math.isfinite(found) else 1.0


def _labels(examples: Sequence[Example]) -> Tensor | None:
    labels = [example.label for example in examples]
    return None if None in labels or not labels else torch.tensor(labels)


def evaluate_model(
    model: PeftModel,
    encoder: TaskEncoder,
    task: Task,
    *,
    method: str,
    n_samples: int = 10,
    seed: int = 0,
    batch_size: int = 16,
    temperature: bool = True,
    progress: bool = True,
    label: str = "",
) -> list[Row]:
    """Scores of a trained adapter on the task's test and out-of-distribution examples.

    Rows: the single set of weights (plain LoRA, or the posterior mean); with ``temperature`` the
    same with a temperature fitted on the validation split, where there is one; for Bayesian methods
    with n_samples > 0 the mean prediction of that many draws. The same seed gives the same draws
    for every set of examples.

    Raises:
        ValueError: There are no labelled test examples.
    """
    labels = _labels(task.test)
    if labels is None:
        raise ValueError(f"task {task.name!r}: expected labelled test examples, got none")
    name = METHOD_NAMES[method]
    rows = []
    draws = [0] if method == "map" or n_samples == 0 else [0, n_samples]
    for count in draws:
        options: dict[str, Any] = {
            "n_samples": count,
            "seed": seed,
            "batch_size": batch_size,
            "progress": progress,
        }
        with _peak_memory() as peak:
            what = f"{label or name} N={count}" if method != "map" else label or name
            test, cost = predict_examples(
                model, encoder, task.test, label=f"{what}: test", **options
            )
            ood = {
                key: predict_examples(model, encoder, part, label=f"{what}: {key}", **options)[0]
                for key, part in task.ood.items()
                if part
            }
        row_name = name if method == "map" else f"{name} mean" if not count else f"{name} N={count}"
        rows.append(_score(row_name, method, None, test, ood, task, cost, peak.mib))
        held_out = _labels(task.validation)
        if count == 0 and temperature and held_out is not None:
            validation, _ = predict_examples(
                model, encoder, task.validation, label=f"{what}: validation", **options
            )
            t = fit_temperature(validation.log_probs, held_out)
            short = "LoRA" if method == "map" else f"{name} mean"
            rows.append(
                _score(
                    f"{short} + temperature",
                    method,
                    t,
                    _tempered(test, t),
                    {key: _tempered(part, t) for key, part in ood.items()},
                    task,
                    cost,
                    peak.mib,
                )
            )
    return rows


def _tempered(prediction: Prediction, temperature: float) -> Prediction:
    log_probs = (prediction.log_probs / temperature).log_softmax(-1)
    entropy = metrics.predictive_entropy(log_probs)
    return Prediction(log_probs, entropy, entropy, n_samples=0)


def _score(
    name: str,
    method: str,
    temperature: float | None,
    test: Prediction,
    ood: dict[str, Prediction],
    task: Task,
    cost: float,
    memory: float,
) -> Row:
    labels = _labels(task.test)
    assert labels is not None
    everything = torch.cat([part.log_probs for part in ood.values()]) if ood else None
    found = metrics.evaluate(test.log_probs, labels, ood_log_probs=everything)
    if test.n_samples:
        found = dataclasses.replace(found, mutual_information=float(test.mutual_information.mean()))
    by_set: dict[str, dict[str, float]] = {}
    entropy = metrics.predictive_entropy(test.log_probs)
    for key, part in ood.items():
        outside = metrics.predictive_entropy(part.log_probs)
        scores = {
            "auroc": metrics.ood_auroc(entropy, outside),
            "fpr95": metrics.fpr95(entropy, outside),
        }
        truth = _labels(task.ood[key])
        if truth is not None:
            shifted = metrics.evaluate(part.log_probs, truth)
            scores.update({k: getattr(shifted, k) for k in ("accuracy", "nll", "ece", "brier")})
        by_set[key] = scores
    entropies = [metrics.predictive_entropy(part.log_probs) for part in ood.values()]
    return Row(
        name,
        method,
        test.n_samples,
        temperature,
        found,
        by_set,
        cost,
        memory,
        test.log_probs,
        labels,
        torch.cat(entropies) if entropies else torch.empty(0, dtype=torch.float64),
    )


# --- A whole run ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """One experiment, trained and scored. ``training`` is None for a model that was loaded."""

    experiment: Experiment
    training: Training | None
    rows: list[Row]


def run(
    experiment: Experiment,
    task: Task,
    *,
    folder: Path | None = None,
    resume: bool = False,
    save_every: int | None = None,
    checkpoints: bool = True,
    temperature: bool = True,
    device: str | None = None,
    progress: bool = True,
    before_writing: Callable[[], None] = lambda: None,
) -> Run:
    """Train an experiment on its task, save the adapter, and score it.

    Args:
        experiment, task: What to run; the task comes from ``experiment.source.load(seed)``.
        folder: Where adapter and checkpoints go; None writes nothing.
        resume: Go on from the last complete checkpoint in the folder.
        save_every: Steps between checkpoints.
        checkpoints: Whether to write any.
        temperature: Whether to add the row with temperature scaling.
        device: "cpu", "cuda" or "auto".
        progress: Whether to show bars.
        before_writing: Called when data, model and adapter have been found to fit, before the first
            file is written.

    Raises:
        Interrupted: As `train_model`.
        ValueError, ImportError, OSError: Data, model and options do not fit.
    """
    if _labels(task.test) is None:
        raise ValueError(f"task {task.name!r}: expected labelled test examples, got none")
    model, encoder = build(experiment, task, device=device)
    # Encoded here only to find what cannot be encoded before anything is written.
    encoder.dataset([examples[0] for examples in task.splits.values() if examples])
    before_writing()
    name = f"{METHOD_NAMES[experiment.method]}, seed {experiment.seed}"
    training = train_model(
        experiment,
        model,
        encoder,
        checkpoints=folder / CHECKPOINTS if folder is not None and checkpoints else None,
        save_every=save_every,
        resume=resume,
        progress=progress,
        label=f"{name}: train",
    )
    if folder is not None:
        save_adapter(model, experiment, task, encoder, folder)
    rows = evaluate_model(
        model,
        encoder,
        task,
        method=experiment.method,
        n_samples=experiment.recipe.n_samples,
        seed=experiment.seed,
        batch_size=experiment.recipe.eval_batch_size,
        temperature=temperature,
        progress=progress,
        label=name,
    )
    return Run(experiment, training, rows)


class Job(NamedTuple):
    """An experiment to `run`: its task, where the adapter goes, whether to fit a temperature."""

    experiment: Experiment
    task: Task
    folder: Path | None = None
    temperature: bool = True


def run_many(
    jobs: Sequence[Job],
    *,
    processes: int = 1,
    device: str | None = None,
    progress: bool = True,
    done: Callable[[Run], None] = lambda run: None,
) -> list[Run]:
    """Run independent experiments, without checkpoints, several at a time.

    Small models use two cores far better as two processes than as two threads. Each process has its
    share of this process' threads; scores do not depend on what runs beside, only times do.

    Args:
        jobs: What to run.
        processes: How many at a time; 1 runs them one after the other in this process.
        device: "cpu", "cuda" or "auto".
        progress: Whether to show a bar.
        done: Called with every result, in the order of the jobs.

    Returns:
        The results in the order of the jobs.

    Raises:
        RuntimeError: A process was killed from outside, as by lack of memory.
        ValueError, ImportError, OSError: As `run`.
    """
    results = []
    processes = min(processes, len(jobs))
    if processes <= 1:
        for job in jobs:
            results.append(_run_job(job, device, progress))
            done(results[-1])
        return results
    context = multiprocessing.get_context("spawn")
    counter = context.Value("q", 0)
    total = sum(job.experiment.recipe.steps for job in jobs)
    share = max(1, torch.get_num_threads() // processes)
    pool = ProcessPoolExecutor(
        processes, mp_context=context, initializer=_start_worker, initargs=(share, counter)
    )
    bar = progress_bar(progress, total=total, desc=f"{len(jobs)} runs, {processes} at a time")
    try:
        waiting = [pool.submit(_run_pickled, job, device) for job in jobs]
        for future in waiting:
            while not future.done():
                wait([future], timeout=0.5)
                bar.update(counter.value - bar.n)
            # Pickled by hand: torch would pass tensors in shared memory, which containers limit.
            results.append(pickle.loads(future.result()))
            done(results[-1])
    except BrokenProcessPool:
        raise RuntimeError(
            "a run was killed from outside, perhaps for lack of memory; use fewer threads, so that "
            "fewer processes run side by side"
        ) from None
    except BaseException:
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    finally:
        bar.close()
        pool.shutdown(cancel_futures=True)
    return results


_finished_steps: Any = None  # in a worker process: the counter that it shares with its parent


def _start_worker(threads: int, counter: Any) -> None:
    global _finished_steps
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    _finished_steps = counter
    torch.set_num_threads(threads)
    quiet_libraries()


def _run_job(job: Job, device: str | None, progress: bool) -> Run:
    return run(
        job.experiment,
        job.task,
        folder=job.folder,
        checkpoints=False,
        temperature=job.temperature,
        device=device,
        progress=progress,
    )


def _run_pickled(job: Job, device: str | None) -> bytes:
    return pickle.dumps(_run_job(job, device, progress=False))


def quiet_libraries() -> None:
    """No messages of transformers that mean nothing to users of the command line."""
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\.")
    if not sys.stderr.isatty():
        transformers.logging.disable_progress_bar()


def check_resumable(folder: Path, experiment: Experiment) -> None:
    """Whether the last checkpoint of a folder belongs to the same experiment.

    Raises:
        ValueError: There is no checkpoint, or its experiment differs; the message says where.
    """
    last = last_checkpoint(folder / CHECKPOINTS)
    if last is None:
        raise ValueError(
            f"resume: expected a complete checkpoint in {folder / CHECKPOINTS}, found none; start "
            "again without --resume"
        )
    saved = read_record(last)
    if saved is None:
        return
    before, now = _flat(saved.experiment.to_dict()), _flat(experiment.to_dict())
    changed = [
        f"{key} {before.get(key)!r} -> {now.get(key)!r}"
        for key in sorted(before | now)
        if before.get(key) != now.get(key)
    ]
    if changed:
        raise ValueError(
            f"resume: expected the settings of {last}, got others: {', '.join(changed)}; give the "
            "same options as before"
        )


def _flat(fields: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in fields.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


# --- Reports -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Summary:
    """A predictor over seeds: mean and standard deviation (n - 1) of each number.

    Attributes:
        name: What the table calls it.
        seeds: The seeds.
        mean, std: By metric, and train_seconds, ms_per_example, train_memory_mib,
            predict_memory_mib; std is empty for a single seed.
        per_seed: Values by metric, in the order of the seeds.
        ood: By set, the mean of its scores.
    """

    name: str
    seeds: tuple[int, ...]
    mean: dict[str, float]
    std: dict[str, float]
    per_seed: dict[str, list[float]]
    ood: dict[str, dict[str, float]]


COSTS = ("train_seconds", "ms_per_example", "train_memory_mib", "predict_memory_mib")


def _costs(run: Run, row: Row) -> dict[str, float]:
    costs = {"ms_per_example": row.ms_per_example, "predict_memory_mib": row.peak_memory_mib}
    if run.training is not None:
        costs["train_seconds"] = run.training.seconds
        costs["train_memory_mib"] = run.training.peak_memory_mib
    return costs


def summarise(runs: Sequence[Run]) -> list[Summary]:
    """Runs that differ in the seed only, put together by name of the row, in their order."""
    found: dict[str, list[tuple[Run, Row]]] = {}
    for one in runs:
        for row in one.rows:
            found.setdefault(row.name, []).append((one, row))
    summaries = []
    for name, pairs in found.items():
        values = [{**row.report.to_dict(), **_costs(one, row)} for one, row in pairs]
        keys = [key for key in values[0] if key not in ("n", "n_classes")]
        table = {key: [float(v[key]) for v in values] for key in keys}
        stacked = {key: torch.tensor(v, dtype=torch.float64) for key, v in table.items()}
        sets = pairs[0][1].ood
        summaries.append(
            Summary(
                name=name,
                seeds=tuple(one.experiment.seed for one, _ in pairs),
                mean={key: float(v.mean()) for key, v in stacked.items()},
                std={key: float(v.std()) for key, v in stacked.items()} if len(pairs) > 1 else {},
                per_seed=table,
                ood={
                    key: {
                        score: sum(row.ood[key][score] for _, row in pairs) / len(pairs)
                        for score in scores
                    }
                    for key, scores in sets.items()
                },
            )
        )
    return summaries


def report(runs: Sequence[Run], task: Task, *, command: Sequence[str] = ()) -> dict[str, Any]:
    """The contents of ``metrics.json``.

    Keys: ``format``; ``command``; ``created`` (UTC); ``task`` (name, kind, label names, examples of
    each split); ``experiments`` (settings by method); ``methods``: for each predictor ``name``,
    ``method``, ``n_samples``, ``mean``, ``std`` (empty for one seed) and ``per_seed``, a list of
    ``seed``, ``metrics``, ``ood``, ``temperature`` and ``cost``; ``training``: by run the steps,
    the adapter's options with defaults filled in, and the log; ``versions``; ``machine``.
    Everything but ``created`` and ``cost`` is the same in every run with the same settings on the
    same machine with the same number of threads. Numbers that are not finite are
    null.
    """
    methods = []
    for summary in summarise(runs):
        per_seed = []
        for one in runs:
            for row in one.rows:
                if row.name != summary.name:
                    continue
                per_seed.append(
                    {
                        "seed": one.experiment.seed,
                        "metrics": row.report.to_dict(),
                        "ood": row.ood,
                        "temperature": row.temperature,
                        "cost": _costs(one, row),
                    }
                )
                method, n_samples = row.method, row.n_samples
        methods.append(
            {
                "name": summary.name,
                "method": method,
                "n_samples": n_samples,
                "mean": {k: v for k, v in summary.mean.items() if k not in COSTS},
                "std": {k: v for k, v in summary.std.items() if k not in COSTS},
                "cost": {k: v for k, v in summary.mean.items() if k in COSTS},
                "per_seed": per_seed,
            }
        )
    return {
        "format": _FORMAT,
        "command": list(command),
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "task": {
            "name": task.name,
            "kind": task.kind,
            "label_names": list(task.label_names),
            "examples": {split: len(examples) for split, examples in task.splits.items()},
        },
        "experiments": {one.experiment.method: one.experiment.to_dict() for one in reversed(runs)},
        "seeds": sorted({one.experiment.seed for one in runs}),
        "methods": methods,
        "training": [
            {
                "method": one.experiment.method,
                "seed": one.experiment.seed,
                "steps": one.training.steps,
                "adapter": one.training.adapter,
                "log": one.training.log,
            }
            for one in runs
            if one.training is not None
        ],
        "versions": versions(),
        "machine": machine(),
    }


def verdict(summaries: Sequence[Summary], plain: str, bayesian: str) -> str:
    """One paragraph on whether the Bayesian predictor was better calibrated than the plain one.

    Better means a lower ECE and a lower NLL, as means over seeds.
    """
    by_name = {summary.name: summary for summary in summaries}
    a, b = by_name[plain], by_name[bayesian]
    lower = {key: b.mean[key] < a.mean[key] for key in ("ece", "nll")}
    wins = sum(x < y for x, y in zip(b.per_seed["ece"], a.per_seed["ece"], strict=True))
    figures = (
        f"ECE {b.mean['ece']:.3f} against {a.mean['ece']:.3f} (lower on {wins} of {len(a.seeds)} "
        f"seed{'s' if len(a.seeds) > 1 else ''}), NLL {b.mean['nll']:.3f} against "
        f"{a.mean['nll']:.3f}, accuracy {b.mean['accuracy']:.3f} against {a.mean['accuracy']:.3f}"
    )
    if all(lower.values()):
        text = f"{bayesian} was better calibrated than {plain}: {figures}."
    elif not any(lower.values()):
        text = f"{bayesian} was NOT better calibrated than {plain}: {figures}."
    else:
        text = f"{bayesian} and {plain} are undecided, ECE and NLL disagree: {figures}."
    scaled = next((s for s in summaries if s.name.endswith("+ temperature")), None)
    if scaled is not None:
        relation = "lower" if scaled.mean["ece"] < b.mean["ece"] else "no lower"
        relation_nll = "lower" if scaled.mean["nll"] < b.mean["nll"] else "no lower"
        text += (
            f" Plain LoRA with a temperature fitted on the validation split: ECE "
            f"{scaled.mean['ece']:.3f} ({relation} than {bayesian}), NLL {scaled.mean['nll']:.3f} "
            f"({relation_nll})."
        )
    if len(a.seeds) == 1:
        text += " A single seed: differences may be chance."
    return text


def save_plots(rows: Sequence[Row], folder: Path, *, uncertain: Row | None = None) -> list[Path]:
    """`reliability.png` and `risk_coverage.png` of all rows; `entropy.png` of one of them.

    Args:
        rows: Predictors on the same test examples, from one seed.
        folder: Where to write.
        uncertain: Whose entropies in and out of distribution to show; the last row by default.
            There is no such picture without out-of-distribution examples.

    Raises:
        ImportError: matplotlib is not installed (extra ``plots``).
    """
    from bayes_kernels import plots

    bins = {row.name: metrics.reliability_bins(row.log_probs, row.labels) for row in rows}
    curves = {
        row.name: metrics.risk_coverage_curve(
            *metrics.confidence_and_correct(row.log_probs, row.labels)
        )
        for row in rows
    }
    written = [
        plots.save(plots.reliability_diagram(bins), folder / "reliability.png"),
        plots.save(plots.risk_coverage(curves), folder / "risk_coverage.png"),
    ]
    shown = uncertain or rows[-1]
    if len(shown.entropy_ood):
        inside = metrics.predictive_entropy(shown.log_probs)
        figure = plots.entropy_histogram(
            inside, shown.entropy_ood, xlabel=f"predictive entropy of {shown.name} (nats)"
        )
        written.append(plots.save(figure, folder / "entropy.png"))
    return written


# --- Machine -------------------------------------------------------------------------------------


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that figures depend on."""
    found = {"python": platform.python_version()}
    from bayes_kernels import __version__

    found["bayes_kernels"] = __version__
    for name in ("torch", "transformers", "peft", "accelerate", "numpy"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def machine() -> dict[str, Any]:
    """Platform, cores, threads and GPU, and how peak memory is measured."""
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    return {
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "peak_memory": memory_measure(),
    }


def write_json(path: Path, content: Any) -> None:
    """Write JSON; readers see the old file or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        text = json.dumps(_finite(content), indent=2, allow_nan=False) + "\n"
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def progress_bar(enabled: bool, items: Any = None, **options: Any) -> Any:
    """A tqdm bar that appears after two seconds, and only on a terminal."""
    return tqdm(
        items,
        delay=2,
        leave=False,
        dynamic_ncols=True,
        disable=not (enabled and sys.stderr.isatty()),
        **options,
    )


def _synchronise(model: PeftModel) -> None:
    if next(model.parameters()).device.type == "cuda":
        torch.cuda.synchronize()


@functools.cache
def memory_measure() -> str:
    """How peak memory is measured here, see the module's description."""
    if torch.cuda.is_available():
        return "cuda allocated"
    return "resident, reset" if _reset_high_water() else "resident, since start"


class _PeakMemory:
    """Peak memory since the object was made, in MiB, after `stop`."""

    mib = math.nan

    def __init__(self) -> None:
        gc.collect()
        if memory_measure() == "cuda allocated":
            torch.cuda.reset_peak_memory_stats()
        elif memory_measure() == "resident, reset":
            # Freed memory that the allocator still holds would count as used.
            with contextlib.suppress(OSError, AttributeError):
                ctypes.CDLL(None).malloc_trim(0)
            _reset_high_water()

    def stop(self) -> None:
        if memory_measure() == "cuda allocated":
            self.mib = torch.cuda.max_memory_allocated() / 2**20
        elif memory_measure() == "resident, reset":
            self.mib = _status_kib("VmHWM") / 2**10
        else:
            with contextlib.suppress(ImportError):
                import resource

                peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
                self.mib = peak / (2**20 if sys.platform == "darwin" else 2**10)


@contextlib.contextmanager
def _peak_memory() -> Iterator[_PeakMemory]:
    peak = _PeakMemory()
    try:
        yield peak
    finally:
        peak.stop()


def _reset_high_water() -> bool:
    """Reset VmHWM of this process to its present size (Linux only)."""
    try:
        with open("/proc/self/clear_refs", "w") as stream:
            stream.write("5")
        return _status_kib("VmHWM") > 0
    except OSError:
        return False


def _status_kib(name: str) -> int:
    with contextlib.suppress(OSError), open("/proc/self/status") as stream:
        for line in stream:
            if line.startswith(f"{name}:"):
                return int(line.split()[1])
    return 0
