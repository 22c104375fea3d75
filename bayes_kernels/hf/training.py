"""Adapters: building, training, saving and loading them.

Training cost is the wall-clock time of the training loop, and peak memory as
`bayes_kernels.hf.machine` measures it.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback
from transformers import TrainingArguments as Arguments
from transformers.pytorch_utils import Conv1D

from .bayesianize import CONVERSIONS, ConversionReport, bayesianize
from .card import write_card
from .checkpoints import read_lora
from .checks import read_json
from .config import BAYES_FIELDS, METHODS, BayesLoraConfig
from .laplace_lora import LAPLACE_FILE, laplace_posterior, load_laplace, save_laplace
from .last_layer import calibrate_head, find_head, laplace_refine
from .machine import peak_memory, progress_bar, synchronise, versions
from .models import EncodedDataset, TaskEncoder, load_model
from .output import stopped_run
from .recipe import FORMAT, Experiment, write_json
from .tasks import Task, choose_subset
from .trainer import BayesTrainer, last_checkpoint

# Training examples from which the prior of a variational last layer is set.
_CALIBRATION = 32
EXPERIMENT_FILE = "experiment.json"
CHECKPOINTS = "checkpoints"

_POSTERIOR_FIELDS = (
    "prior_std",
    "init_rho",
    "scope",
    "kl_schedule",
    "kl_lr",
    "kl_time",
    "kl_gamma",
    "kl_direction",
    "covariance",
    "stiefel",
    "stiefel_penalty",
    "head_covariance",
    "head_prior_scale",
    "head_lr",
    "kl_weight",
    "alternation",
)


# --- Models and adapters -------------------------------------------------------------------------


def _load_base(
    experiment: Experiment, task: Task, max_length: int | None, device: str | None
) -> tuple[Any, TaskEncoder]:
    options: dict[str, Any] = {"dtype": getattr(torch, experiment.dtype)}
    if experiment.dtype != "float32" and pick_device(device).type == "cpu":
        # The backward pass of torch's fused attention is slow there: 17 ms for (8, 12, 32, 32) in
        # bfloat16 on one core with AMX, the formula written out 2.3 ms (level at 512 tokens).
        options["attn_implementation"] = "eager"
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
    options = _config_options(experiment)
    options.setdefault("task_type", {"causal": "CAUSAL_LM", "classifier": "SEQ_CLS"}.get(kind))
    if kind == "multiple_choice":
        names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
        heads = sorted(names & {"classifier", "logits_proj", "score"})
        options["modules_to_save"] = options.get("modules_to_save") or heads
    return METHODS[trained_method(experiment)].config(**options)


# Fields of a configuration that are no options of training: PEFT fills them in, or loading does.
_SET_BY_PEFT = {
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "peft_type",
    "peft_version",
    "revision",
}


def _config_options(experiment: Experiment) -> dict[str, Any]:
    """Arguments of the method's configuration that do not depend on the model.

    Raises:
        ValueError: An option is unknown.
    """
    recipe = experiment.recipe
    method = METHODS[trained_method(experiment)]
    config_class = LoraConfig if method.plain else BayesLoraConfig
    fields = config_class.__dataclass_fields__
    unknown = sorted(set(recipe.lora) - (set(fields) - _SET_BY_PEFT))
    if unknown:
        raise ValueError(
            f"lora: expected options of peft.{config_class.__name__}, got {', '.join(unknown)}"
        )
    for name, value in recipe.lora.items():
        if fields[name].type in (bool, "bool") and not isinstance(value, bool):
            raise ValueError(f"lora: {name} must be true or false, got {value!r}")
    targets = recipe.target_modules
    options: dict[str, Any] = {
        "r": recipe.rank,
        "lora_alpha": recipe.alpha,
        "lora_dropout": experiment.dropout,
        "target_modules": None if targets is None else list(targets),
        **recipe.lora,
    }
    if method.plain:
        return options
    for name in _POSTERIOR_FIELDS:
        if getattr(recipe, name) is not None:
            options.setdefault(name, getattr(recipe, name))
    options.setdefault("seed", experiment.seed)
    return options


def check_experiment(experiment: Experiment) -> None:
    """Whether a run's options are in range, go together and do something; reads no data.

    For commands, whose every option is there for its one method; recipes that several methods share
    may have more.

    Raises:
        ValueError, TypeError: One does not.
    """
    experiment.check_options()
    METHODS[trained_method(experiment)].config(**_config_options(experiment))
    if METHODS[experiment.method].made == "convert":
        conversion_options(experiment)


def trained_method(experiment: Experiment) -> str:
    """What training makes: the method, or plain LoRA where the method converts that."""
    return experiment.method if METHODS[experiment.method].made == "train" else "map"


def build(
    experiment: Experiment, task: Task, *, device: str | None = None
) -> tuple[PeftModel, TaskEncoder]:
    """A new adapter on the base model, ready for training, and the encoder of its input.

    Raises:
        ValueError, ImportError, OSError: As `load_model`, or adapter and model do not go together.
    """
    recipe = experiment.recipe
    base, encoder = _load_base(experiment, task, recipe.max_length, device)
    if experiment.style != "blob" and encoder.kind != "causal":
        raise ValueError(
            f"style: expected a causal language model with a style of prompt, got "
            f"{experiment.model!r}, which is loaded as {encoder.kind}; leave it out"
        )
    if recipe.base_dropout is not None:
        for module in base.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = recipe.base_dropout
    _check_targets(experiment, base)
    config = adapter_config(experiment, base, encoder.kind)
    # Plain LoRA and Bayesian adapters draw the same factors from the same seed.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(experiment.seed)
        try:
            model = get_peft_model(base, config)
        except (
            AttributeError,
            AssertionError,
            LookupError,
            NotImplementedError,
            TypeError,
        ) as error:
            if not recipe.lora:
                raise
            # PEFT does not check the types of its options.
            given = ", ".join(f"{key}={value!r}" for key, value in recipe.lora.items())
            raise ValueError(
                f"lora: expected options that PEFT can use, got {given}: {error!r}"
            ) from error
    return _placed(model, device), encoder


def _check_targets(experiment: Experiment, base: Any) -> None:
    """Whether every name that is to be adapted is a layer: PEFT is content with one of them."""
    targets = experiment.recipe.target_modules
    modules = dict(base.named_modules())
    if targets is None:
        known = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
        missing = [] if base.config.model_type in known else ["none, and PEFT has no default"]
    else:
        ends = {name for path in modules for name in _endings(path)}
        missing = [name for name in targets if name not in ends]
    if missing:
        names = {
            path.rpartition(".")[2]
            for path, module in modules.items()
            if isinstance(module, torch.nn.Linear | Conv1D)
        }
        raise ValueError(
            f"target-modules: expected names of linear layers of {experiment.model!r}, which "
            f"has {', '.join(sorted(names))}; got {', '.join(missing)}"
        )


def _endings(path: str) -> Iterator[str]:
    """``a.b.c``, ``b.c`` and ``c``: names that PEFT takes for a module."""
    parts = path.split(".")
    return (".".join(parts[first:]) for first in range(len(parts)))


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


# --- Folders -------------------------------------------------------------------------------------


def save_adapter(
    model: PeftModel, experiment: Experiment, task: Task, encoder: TaskEncoder, folder: Path
) -> None:
    """Write the adapter and its `experiment.json` into a folder, each file whole or not at all.

    `PeftModel.from_pretrained` and `load_adapter` read it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".adapter.", dir=folder))
    try:
        with _writing(folder, "the adapter"):
            model.save_pretrained(str(temporary), save_embedding_layers=False)
        if laplace_posterior(model) is None:
            (folder / LAPLACE_FILE).unlink(missing_ok=True)
        else:
            save_laplace(model, temporary)
        _write_record(temporary, experiment, task, encoder, place=folder)
        write_card(temporary, place=folder)
        files = sorted(temporary.iterdir(), key=lambda path: path.name == "adapter_config.json")
        for path in files:  # the configuration last: without it there is no adapter
            os.replace(path, folder / path.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def _writing(folder: Path, what: str) -> Iterator[None]:
    """Errors of libraries that write in native code, as an OSError that says what is missing."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise OSError(
            f"{folder}: expected room to write {what} to, got: {reason}; make room, or choose "
            "another folder"
        ) from error


def stored_numbers(folder: Path) -> int:
    """How many numbers the files of an adapter hold, those of its posterior included."""
    count = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            names = file.keys()
            count += sum(math.prod(file.get_slice(name).get_shape()) for name in names)
    return count


def _write_record(
    folder: Path, experiment: Experiment, task: Task, encoder: TaskEncoder, place: Path
) -> None:
    """Write experiment.json into a folder that will be at a place."""
    record = {
        "format": FORMAT,
        "experiment": experiment.to_dict(),
        "task": {
            "name": task.name,
            "kind": task.kind,
            "label_names": list(task.label_names),
            "template": task.template,
        },
        "max_length": encoder.max_length,
        # Where relative paths begin, as seen from the adapter.
        "cwd": os.path.relpath(os.getcwd(), os.path.realpath(place)),
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
        advice = [stopped_run(path), f"name its last checkpoint instead: {last}" if last else ""]
        text = "".join(f"; {words}" for words in advice if words)
        raise ValueError(
            f"adapter {str(folder)!r}: expected adapter_config.json in it, found none{text}"
        )
    if not (path / "adapter_model.safetensors").is_file():
        raise ValueError(
            f"adapter {str(folder)!r}: expected adapter_model.safetensors in it, found none; "
            "pickled weights (.bin) are not read"
        )
    if not (path / EXPERIMENT_FILE).is_file():
        return None
    record = read_json(path / EXPERIMENT_FILE)
    try:
        if record["format"] != FORMAT:
            raise ValueError(f"format {record['format']!r} is not {FORMAT}")
        length = record["max_length"]
        if not (length is None or (isinstance(length, int) and length > 0)):
            raise ValueError(f"max_length {length!r} is no length")
        experiment = Experiment.from_dict(record["experiment"])
        begin = os.path.join(os.path.realpath(path), record.get("cwd", "."))
        return Saved(
            _with_paths_from(experiment, begin), _task_without_rows(record["task"]), length
        )
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path / EXPERIMENT_FILE}: expected what `train` wrote, got {error!r}"
        ) from None


def _with_paths_from(experiment: Experiment, folder: str) -> Experiment:
    """Relative paths that lead nowhere from the current folder, as seen from another, if they do there."""

    def found(name: str) -> str:
        there = os.path.normpath(os.path.join(folder, name))
        return there if not os.path.lexists(name) and os.path.lexists(there) else name

    source = experiment.source
    source = replace(
        source,
        data=found(source.data),
        test=source.test and found(source.test),
        ood=source.ood and tuple(map(found, source.ood)),
    )
    return replace(experiment, model=found(experiment.model), source=source)


def _task_without_rows(record: Mapping[str, Any]) -> Task:
    names, kind = record["label_names"], record["kind"]
    if kind not in ("classification", "multiple_choice"):
        raise ValueError(f"kind {kind!r} of task")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"label_names {names!r}")
    if len(names) < 2 or len(set(names)) != len(names):
        raise ValueError(f"label_names {names!r}, which are not two or more")
    template = record["template"]
    return Task(str(record["name"]), kind, tuple(names), [], [], [], template=template)


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
    length = max_length or experiment.recipe.max_length
    base, encoder = _load_base(experiment, task, length, device)
    try:
        model = read_lora(base, folder)
    except RuntimeError as error:  # torch's message lists every tensor that differs
        first = next((line for line in str(error).splitlines() if "mismatch" in line), str(error))
        raise ValueError(
            f"adapter {str(folder)!r}: expected tensors that fit {experiment.model!r} with "
            f"{task.n_classes} classes, got {first.strip()}"
        ) from None
    model = _placed(model, device).eval()
    if (Path(folder) / LAPLACE_FILE).is_file():
        load_laplace(model, folder)
    return model, encoder


def check_resumable(folder: Path, experiment: Experiment) -> None:
    """Whether the last checkpoint of a folder, if it has one, belongs to the same experiment.

    Raises:
        ValueError: Its experiment differs; the message says where.
    """
    last = last_checkpoint(folder / CHECKPOINTS)
    saved = None if last is None else read_record(last)
    if saved is None:
        return
    changed = changed_settings(saved.experiment, experiment)
    if changed:
        raise ValueError(
            f"resume: expected the settings of {last}, got others: {', '.join(changed)}; give the "
            "same options as before"
        )


def changed_settings(before: Experiment, now: Experiment) -> list[str]:
    """What differs between two experiments, as ``recipe.lr 0.001 -> 0.002``."""
    a, b = _flat(before.to_dict()), _flat(now.to_dict())
    return [
        f"{key} {a.get(key)!r} -> {b.get(key)!r}"
        for key in sorted(a | b)
        if a.get(key) != b.get(key)
    ]


def _flat(fields: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in fields.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


# --- Conversion ----------------------------------------------------------------------------------


# Most validation examples that a conversion looks at.
_HELD_OUT = 500


def conversion_options(experiment: Experiment) -> dict[str, Any]:
    """Options of an experiment's conversion: its own draws and seed, and the recipe's ``convert``.

    Raises:
        ValueError: An option is unknown or out of range, or ``anchors`` or ``batch_size`` is no
            positive integer.
    """
    recipe, conversion = experiment.recipe, CONVERSIONS[experiment.method]
    draws = recipe.n_samples or conversion.n_samples
    options: dict[str, Any] = {"n_samples": draws, "seed": experiment.seed}
    options.update(recipe.convert)
    known = ["anchors", *conversion.options()]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(
            f"convert: expected options among {', '.join(known)}, got {', '.join(unknown)}"
        )
    for name in ("anchors", "batch_size"):
        value = options.get(name, 1)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"convert: {name} must be an integer >= 1, got {value!r}")
    conversion.check(**{name: value for name, value in options.items() if name != "anchors"})
    return options


def convert_model(
    experiment: Experiment, model: PeftModel, encoder: TaskEncoder, *, progress: bool = True
) -> ConversionReport:
    """Make a trained plain adapter Bayesian, in place, with the experiment's method.

    Options are those of the recipe's ``convert``; draws, seed and batch size are the experiment's
    unless they are among them. ``anchors`` is the number of training examples that it looks at, the
    same ones for every seed: TFB 500, or all where there are fewer; Laplace all. Laplace chooses its
    prior on the validation split (at most 500 examples) where there is one and ``prior`` names no
    other way.

    Raises:
        ValueError: An option is unknown or out of range, or there are no training examples.
    """
    recipe = experiment.recipe
    options = conversion_options(experiment)
    examples = encoder.task.train
    if not examples:
        raise ValueError(f"task {encoder.task.name!r}: expected training examples, got none")
    size = options.pop("anchors", None) or CONVERSIONS[experiment.method].examples or len(examples)
    batch_size = options.pop("batch_size", recipe.eval_batch_size)
    data = encoder.dataset(choose_subset(examples, min(size, len(examples))))
    options.setdefault("progress", progress)
    batches = list(_batches(data, encoder, batch_size))
    held_out = [example for example in encoder.task.validation if example.label is not None]
    chosen = options.get("prior"), options.get("structure", "scalar")
    wanted = chosen in ((None, "scalar"), ("validation", "scalar"))
    if held_out and wanted and "validation" in CONVERSIONS[experiment.method].options():
        held_out = choose_subset(held_out, min(_HELD_OUT, len(held_out)))
        options["validation"] = list(_batches(encoder.dataset(held_out), encoder, batch_size))
    return bayesianize(model, experiment.method, batches, **options)


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
        peak_memory_mib: Peak memory, as `bayes_kernels.hf.machine` measures it.
        log: What the trainer logged: step, loss, and for `BayesTrainer` nll, kl and elbo.
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
    """Train an adapter, in place, with the stock Trainer (plain LoRA) or `BayesTrainer`.

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
        ValueError: No training examples, or a loss that is not finite.
        OSError: A checkpoint cannot be written.
    """
    recipe = experiment.recipe
    data = encoder.dataset(encoder.task.train)
    if not len(data):
        raise ValueError(f"task {encoder.task.name!r}: expected training examples, got none")
    configured: Any = model.peft_config["default"]
    if find_head(model) is not None and configured.head_prior_scale is None:
        # Before a checkpoint is read: a resumed run finds the same prior.
        batch = encoder.collate(data.items[:_CALIBRATION])
        device = next(model.parameters()).device
        calibrate_head(model, {name: value.to(device) for name, value in batch.items()})
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
            learning_rate=experiment.lr,
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
        plain = METHODS[trained_method(experiment)].plain
        trainer: Any = (_PlainTrainer if plain else _Trainer)(**options)
        for callback in (ProgressCallback, PrinterCallback):
            trainer.remove_callback(callback)
        trainer.add_callback(_Bar(label, progress))
        stop = _StopOnSignal()
        if checkpoints is not None:
            trainer.add_callback(stop)
            trainer.add_callback(_RecordBesideCheckpoint(experiment, encoder))
        last = last_checkpoint(folder) if resume else None
        start = _step_of(last)
        with peak_memory() as peak, stop.installed(checkpoints is not None):
            synchronise(model)
            begin = time.perf_counter()
            _train(trainer, last, folder)
            finished = trainer.state.global_step >= recipe.steps
            if recipe.laplace and finished:
                laplace_refine(model, _batches(data, encoder, recipe.eval_batch_size))
            synchronise(model)
            seconds = time.perf_counter() - begin
        done = trainer.state.global_step
        if stop.received is not None and done < recipe.steps:
            raise Interrupted(last_checkpoint(folder), done, stop.received)
        log = [entry for entry in trainer.state.log_history if "loss" in entry]
    model.eval()
    return Training(seconds, done - start, peak.mib, log, _resolved(model))


def _batches(
    data: EncodedDataset, encoder: TaskEncoder, size: int
) -> Iterator[dict[str, torch.Tensor]]:
    for first in range(0, len(data), size):
        yield encoder.collate(data.items[first : first + size])


def _resolved(model: PeftModel) -> dict[str, Any]:
    """Rank, scaling, targets, and for a Bayesian adapter everything about its posterior."""
    config = model.peft_config["default"].to_dict()
    names = {"r", "lora_alpha", "target_modules", *(BAYES_FIELDS & set(config))}
    found = {name: config[name] for name in sorted(names)}
    targets = found["target_modules"]
    return {**found, "target_modules": sorted(targets) if isinstance(targets, set) else targets}


def _step_of(checkpoint: str | None) -> int:
    return 0 if checkpoint is None else int(checkpoint.rpartition("-")[2])


class _WatchedMixin:
    """Stops a trainer at the first loss that is not finite.

    The host looks at the loss of every step on a CPU. On a GPU it would wait for each: there it
    looks whenever the trainer logs, which copies the loss anyway, and still names the first step.
    """

    _first_bad: Tensor | None = None  # step of the first loss that is not finite, -1 for none

    def training_step(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """As the trainer's."""
        loss: Tensor = super().training_step(model, inputs, *args, **kwargs)  # type: ignore[misc]
        if self._first_bad is None:
            self._first_bad = torch.full((), -1, dtype=torch.int64, device=loss.device)
            self._rates: list[float] = []
            self._first_step = self.state.global_step
        step = self.state.global_step
        if step - self._first_step == len(self._rates):
            self._rates.append(self.lr_scheduler.get_last_lr()[0])
        bad = ~loss.detach().isfinite().all() & (self._first_bad < 0)
        self._first_bad.masked_fill_(bad, step)
        if loss.device.type == "cpu":
            self.check_finite()
        return loss

    def log(self: Any, *args: Any, **kwargs: Any) -> None:
        """As the trainer's."""
        self.check_finite()
        super().log(*args, **kwargs)  # type: ignore[misc]

    def check_finite(self: Any) -> None:
        """Raise where a loss was not finite.

        Raises:
            ValueError: With step and learning rate.
        """
        if self._first_bad is None or (step := int(self._first_bad)) < 0:
            return
        rate = self._rates[step - self._first_step]
        raise ValueError(_diverged(f"loss at step {step + 1} of {self.state.max_steps}", rate))


class _PlainTrainer(_WatchedMixin, Trainer):
    """The stock Trainer, which would go on with a loss that is not finite."""


class _Trainer(_WatchedMixin, BayesTrainer):
    """`BayesTrainer`, likewise."""


def _diverged(what: str, rate: float) -> str:
    return (
        f"training: expected a finite {what}, got nan or inf, at learning rate {rate:.3g}; use a "
        "lower lr or a longer warmup"
    )


def _train(trainer: Any, checkpoint: str | None, folder: str) -> None:
    """Train, and see to it that what was trained is finite.

    Raises:
        ValueError: It is not.
        OSError: A checkpoint cannot be written.
    """
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except (SafetensorError, RuntimeError, OSError):
        if not trainer.control.should_save:
            raise
        with _writing(Path(folder), "a checkpoint"):
            raise
    trainer.check_finite()
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    if not all(bool(p.isfinite().all()) for p in trained):
        raise ValueError(_diverged("adapter after the last step", trainer.args.learning_rate))


# --- Callbacks -----------------------------------------------------------------------------------


_finished_steps: Any = None  # in a worker process: the counter that it shares with its parent


def count_steps_in(counter: Any) -> None:
    """From now on, add every optimiser step of this process to a shared counter; None to stop.

    Args:
        counter: A `multiprocessing.Value` of an integer, which another process reads.
    """
    global _finished_steps
    _finished_steps = counter


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
        _write_record(folder, self.experiment, self.encoder.task, self.encoder, place=folder)
