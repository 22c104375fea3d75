"""Plain LoRA folders in and out, and checkpoints of the published BLoB code."""

from __future__ import annotations

import contextlib
import json
import os
import re
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..batches import need_whole
from ..files import replacing_folder
from ._compat import PEFT_TYPE_NAME
from .checks import CONFIG_NAME, PREFIX, check_folder, layer_of, read_json, tensor_names
from .config import CONFIGS, DEFAULT_METHOD, BayesLoraConfig, own_fields
from .draws import WeightDraws
from .layers import active_layers, bayes_layers, check_whole, find_peft_model, lora_layers
from .method import PLAIN
from .predict import predictor_of
from .swap import the_adapter
from .targets import factor_names, factor_parameters
from .undo import as_before_if_stopped
from .variants import VARIANTS, BayesLayer, extra_names


def import_lora(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    adapter_name: str = "default",
    is_trainable: bool = True,
    **options: Any,
) -> PeftModel:
    """Read a plain LoRA adapter, or one of the published BLoB code, as a Bayesian adapter.

    * A folder that PEFT wrote for `LoraConfig`: it becomes the posterior mean, and what the method
      has beside the factors starts as in a new adapter.
    * A folder of bayesian-peft: its keys carry the prefix base_model.model twice, which PEFT would
      silently ignore; rho is read from `lora_A_rho`.

    Args:
        model: the base model, or a PeftModel with Bayesian adapters that gets one more.
        path: folder with adapter_config.json and adapter_model.safetensors, or the latter file.
        adapter_name: name of the new adapter.
        is_trainable: whether it can be trained.
        options: fields of `BayesLoraConfig` that the file does not have (method, prior_std, ...).

    Returns:
        The PeftModel.

    Raises:
        FileNotFoundError: there is no configuration or no weight file.
        ValueError: weights are pickled (.bin), the adapter is not LoRA, or tensors do not fit.
    """
    folder = Path(path)
    if folder.suffix == ".safetensors":
        folder = folder.parent
    config = _read_config(folder, options)
    config.inference_mode = not is_trainable
    tensors = {_single_prefix(k): v for k, v in load_file(_weights(folder, Path(path))).items()}
    with as_before_if_stopped(model):
        if isinstance(model, PeftModel):
            model.add_adapter(adapter_name, config)
            wrapped = model
        else:
            wrapped = get_peft_model(model, config, adapter_name=adapter_name)
        _copy_tensors(wrapped, adapter_name, tensors)
        return wrapped


def stored_method(folder: str | os.PathLike[str]) -> str:
    """Method of the adapter in a folder: by its configuration, else by its tensors.

    A folder of bayesian-peft calls itself LoRA whatever it holds: with deviations (`lora_A_rho`), as
    its BLoB and TFB write them, it is read as BLoB, the same Gaussian; else (MLE, MAP, dropout,
    Laplace, which is refitted there and not stored) as plain LoRA.
    """
    config = read_json(Path(folder) / CONFIG_NAME)
    if config.get("peft_type") == PEFT_TYPE_NAME:
        return config.get("method", DEFAULT_METHOD)
    return _method_of(_keys(Path(folder))) or PLAIN


def read_lora(model: nn.Module, folder: str | os.PathLike[str]) -> PeftModel:
    """An adapter folder on its base model, for prediction: in evaluation mode.

    What PEFT or `save_pretrained` of this package wrote is read by PEFT. Folders of bayesian-peft
    carry the prefix base_model.model twice, which PEFT would silently ignore, leaving the adapter
    without effect: those become plain LoRA, or with deviations a BLoB adapter (`import_lora`). It
    does not save the head of a classifier, for which there is a warning.

    Args:
        model: the base model.
        folder: folder with adapter_config.json and adapter_model.safetensors.

    Raises:
        FileNotFoundError: as `import_lora`.
        ValueError: as `import_lora`, the folder is damaged (see `bayes_kernels.hf.checks`), or the
            base model has other layers.
        RuntimeError: shapes do not fit, as PEFT says it.
    """
    folder = Path(folder)
    keys = _keys(folder)
    check_folder(folder)
    _check_architecture(model, folder, keys)
    config = read_json(folder / CONFIG_NAME)
    method = None if config.get("peft_type") == PEFT_TYPE_NAME else _method_of(keys)
    if method is None and not any(key.startswith(PREFIX * 2) for key in keys):
        wrapped = PeftModel.from_pretrained(model, str(folder), is_trainable=False)
        # Embeddings are no part of the question, and PEFT would ask the hub about them.
        own = _adapter_state(wrapped, "default", save_embedding_layers=False)
        missing = sorted(set(own) - set(keys))
        missing = [key for key in missing if ".lora_" in key]
        if missing:
            raise ValueError(
                f"{_weights(folder, folder)}: expected {missing[0]}, found none ({len(missing)} tensors "
                "are missing); the file is not whole, or the base model is another one"
            )
        # PEFT passes over what the model has no place for, such as a trained head.
        named = model.named_parameters(remove_duplicate=False)  # a tied head has its own name
        places = {*own, *(PREFIX + name for name, _ in named)}
        if unread := sorted(set(keys) - places):
            raise ValueError(
                f"{_weights(folder, folder)}: expected tensors of {type(model).__name__}, got {unread[0]} "
                f"({len(unread)} have no place in it); use the kind of model that it was trained on"
            )
        return wrapped
    classifies = type(model).__name__.endswith("ForSequenceClassification")
    head = re.compile(r"\b(classifier|score)\.(?!.*lora_)")
    if classifies and not any(head.search(key) for key in keys):
        warnings.warn(
            f"{folder} has no classification head, which bayesian-peft does not save: the base model's "
            "head is used, which must be the one that the adapter was trained with",
            stacklevel=2,
        )
    if method is not None:
        return import_lora(model, folder, is_trainable=False, method=method).eval()
    plain = LoraConfig.from_pretrained(str(folder))
    plain.inference_mode = True
    wrapped = get_peft_model(model, plain)
    tensors = load_file(_weights(folder, folder))
    _copy_tensors(wrapped, "default", {_single_prefix(k): v for k, v in tensors.items()})
    return wrapped.eval()


def _check_architecture(model: nn.Module, folder: Path, keys: Iterable[str]) -> None:
    """Some layer of the adapter must be one of the model."""
    layers = sorted({layer_of(key) for key in keys} - {""})
    modules = {name for name, _ in model.named_modules()}
    if layers and not modules & set(layers):
        base = read_json(folder / CONFIG_NAME).get("base_model_name_or_path")
        raise ValueError(
            f"adapter {str(folder)!r}: expected a base model with the layer {layers[0]}, got "
            f"{type(model).__name__} without; use the one that it was trained on ({base})"
        )


def _keys(folder: Path) -> list[str]:
    return tensor_names(_weights(folder, folder))


def _method_of(keys: Iterable[str]) -> str | None:
    """The method whose trained tensors a folder has; None for plain LoRA."""
    names = {key.rpartition(".")[2] for key in keys}
    for method, variant in VARIANTS.items():
        if variant.parameters and names.issuperset(variant.parameters):
            return method
    return None


def export_lora(
    model: nn.Module,
    directory: str | os.PathLike[str],
    which: str | int = "mean",
    *,
    seed: int = 0,
    adapter: str | None = None,
) -> Path:
    """Write a plain LoRA folder, which stock PEFT and servers load: the mean or one draw.

    Draw s is the one that `posterior(model, "sample", seed=seed)` and `predict` use as number s:

        A_2p = M + Omega . eps_p,  A_2p+1 = M - Omega . eps_p

    for BLoB and TFB. What other methods have in rank space is multiplied into the factors. Draws 2 p and
    2 p + 1 are an antithetic pair, and pairs are independent: export whole pairs to average over. Of
    plain LoRA with a Laplace posterior they are the draws of `generate` and of `drawn_weights`, a head
    included; these are independent.

    The folder appears whole or not at all. One that exists is replaced if it holds nothing but an
    adapter: adapter_config.json, adapter_model.safetensors, README.md.

    Args:
        model: a PeftModel with a Bayesian adapter, or with plain LoRA and a Laplace posterior.
        directory: the folder to write.
        which: "mean", or the number of a draw.
        seed: seed of the draw.
        adapter: name of the adapter; None for the active one.

    Returns:
        The folder.

    Raises:
        ValueError: which is neither, several adapters are active, the model has none, its weights have
            no draws, or the folder holds other files.
    """
    directory = Path(directory)
    _check_replaceable("export_lora", directory)
    sample = which if isinstance(which, int) and not isinstance(which, bool) else None
    if (sample is None and which != "mean") or (sample is not None and sample < 0):
        raise ValueError(
            f"export_lora: which must be 'mean' or the number of a draw, got {which!r}"
        )
    plain = _Plain("export_lora", model, sample is not None, adapter)
    with replacing_folder(directory) as folder:
        plain.write(folder, sample, seed)
    return directory


def export_draws(
    model: nn.Module,
    directory: str | os.PathLike[str],
    n: int,
    *,
    seed: int = 0,
    adapter: str | None = None,
) -> list[Path]:
    """Write draws 0, ..., n - 1 as plain LoRA folders, to average over on a server.

    Folder `draw-s` holds what `export_lora(model, ..., which=s, seed=seed)` writes: nothing but plain
    LoRA, which stock PEFT and servers load. `bayes_kernels.serving` asks a server that has them all,
    and the mean of their probabilities is `predict(model, ..., n_samples=n, seed=seed)`. Draws come in
    antithetic pairs (Laplace's are independent): ask for an even number.

    All folders appear together or not at all. A directory that exists is replaced if it holds nothing
    but such folders.

    Args:
        model: a PeftModel with an adapter whose weights have draws: BLoB, TFB, ScalaBL, or plain LoRA with
            a Laplace posterior.
        directory: the folder of the folders.
        n: number of draws, at least 1.
        seed: seed of the draws.
        adapter: name of the adapter; None for the active one.

    Returns:
        The folders, in order. Cost: n times the adapter on disk; one draw at a time in memory.

    Raises:
        ValueError: n is out of range, the weights have no draws (plain LoRA, PoLAR, a variational last
            layer), several adapters are active, the model has none, or the directory holds other files.

    Example:
        export_draws(model, "draws", 10)  # draws/draw-0, ..., draws/draw-9
    """
    directory = Path(directory)
    need_whole("export_draws: n", n, 1)
    _check_replaceable("export_draws", directory, folders=True)
    plain = _Plain("export_draws", model, True, adapter)
    names = [f"draw-{number}" for number in range(n)]
    with replacing_folder(directory) as folder:
        for number, name in enumerate(names):
            (folder / name).mkdir()
            plain.write(folder / name, number, seed)
    return [directory / name for name in names]


class _Plain:
    """An adapter as plain LoRA: its mean, or its draws.

    Args:
        op: beginning of messages.
        model: the model.
        draws: whether draws are wanted.
        adapter: name of the adapter; None for the active one.

    Raises:
        ValueError: the model has no such adapter, several are active, or it has no draws.
    """

    def __init__(self, op: str, model: nn.Module, draws: bool, adapter: str | None) -> None:
        self.model = find_peft_model(op, model)
        check_whole(op, model)
        self.layers: list[BayesLayer] = []
        self.posterior: WeightDraws | None = None  # of plain LoRA
        if not active_layers(model, adapter):
            texts = predictor_of(model).texts
            if texts is not None and texts.in_place(0, 0) is not None:
                _, self.name = the_adapter(op, model)
                self.posterior = texts
                return
            if draws:
                raise ValueError(
                    f"{op}: the adapter must have draws of its weights, got one without a posterior; make "
                    "it Bayesian with bayesianize (MC dropout draws masks, and members of an ensemble "
                    "are plain folders already)"
                )
        self.layers = bayes_layers(model, adapter)
        names = sorted({item.adapter for item in self.layers})
        if len(names) != 1:
            raise ValueError(f"{op}: adapter must name one of the active adapters, got {names}")
        self.name = names[0]
        variant = VARIANTS[self.config.method]
        if draws and not variant.samples:
            why = "have no posterior"
            if variant.replaces:
                why = f"have draws of class logits, by {variant.replaces}, and none of weights"
            raise ValueError(
                f"{op}: draws must be of weights, got method {self.config.method!r}, whose adapters {why}; "
                "write the mean with export_lora(which='mean')"
            )

    @property
    def config(self) -> Any:
        """The adapter's configuration."""
        return self.model.peft_config[self.name]

    def write(self, folder: Path, sample: int | None, seed: int) -> None:
        """Write the mean (None) or a draw into an empty folder."""
        if self.posterior is None:
            tensors = self._factors(sample, seed)
        else:
            drawn = None if sample is None else self.posterior.in_place(sample, seed)
            with drawn or contextlib.nullcontext():
                state = _adapter_state(self.model, self.name)
                tensors = {k: v.detach().cpu().clone().contiguous() for k, v in state.items()}
        text = json.dumps(_plain_config(self.config), indent=2, sort_keys=True)
        (folder / CONFIG_NAME).write_text(text + "\n")
        save_file(tensors, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})

    def _factors(self, sample: int | None, seed: int) -> dict[str, Tensor]:
        """Those of a Bayesian adapter, and what was trained beside it."""
        replaced = {}
        tuner: Any = self.model.base_model
        paths = {layer: path for path, layer in lora_layers(tuner.model)}
        for item in self.layers:
            own = factor_parameters(item.layer, item.adapter)
            plain = item.factors(sample, seed)
            for name, old, new in zip(factor_names(item.layer), own, plain, strict=True):
                if new is not old:
                    replaced[f"{PREFIX}{paths[item.layer]}.{name}"] = new.reshape(old.shape).to(
                        old.dtype
                    )
        extra = extra_names()
        tensors = {
            key: replaced.get(key, value).detach().cpu().contiguous()
            for key, value in _adapter_state(self.model, self.name).items()
            if key.rpartition(".")[2] not in extra
        }
        missing = sorted(set(replaced) - set(tensors))
        assert not missing, missing
        return VARIANTS[self.config.method].to_plain(tensors)


def _adapter_state(model: PeftModel, adapter: str, **options: Any) -> dict[str, Tensor]:
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(model, adapter_name=adapter, **options)


def _plain_config(config: LoraConfig) -> dict[str, Any]:
    """The fields of a LoraConfig with the same options, as PEFT writes them."""
    own = {one.name for one in own_fields(type(config))}
    fields = {k: v for k, v in config.to_dict().items() if k not in own}
    fields["peft_type"] = "LORA"
    fields["inference_mode"] = True
    for name, value in fields.items():
        if isinstance(value, set):
            fields[name] = sorted(value)
    return fields


def _check_replaceable(op: str, directory: Path, folders: bool = False) -> None:
    """Only what an adapter folder holds may be deleted; with `folders`, folders of draws with that."""
    if not (directory.exists() or directory.is_symlink()):
        return
    if directory.is_symlink() or not directory.is_dir():
        raise ValueError(
            f"{op}: directory must be a folder or not exist, got the file or link "
            f"{directory}; name another one"
        )
    known = {CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, "README.md"}
    if folders:
        foreign = []
        for path in directory.iterdir():
            if not re.fullmatch(r"draw-\d+", path.name) or path.is_symlink() or not path.is_dir():
                foreign.append(path.name)
            else:
                _check_replaceable(op, path)
    else:
        foreign = [p.name for p in directory.iterdir() if p.name not in known or not p.is_file()]
    if foreign:
        expected = "folders draw-0, draw-1, ..." if folders else sorted(known)
        raise ValueError(
            f"{op}: directory must be empty or hold {expected} only, got "
            f"{sorted(foreign)[:3]} in {directory}; name another one or move these away"
        )


def _read_config(folder: Path, options: dict[str, Any]) -> BayesLoraConfig:
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise FileNotFoundError(
            f"import_lora: {path} must exist, got nothing; name a folder that PEFT has saved"
        )
    fields = read_json(path)
    kind = fields.pop("peft_type", "LORA")
    if kind not in ("LORA", PEFT_TYPE_NAME):
        raise ValueError(
            f"import_lora: {path} must describe a LoRA adapter, got peft_type {kind!r}"
        )
    check_folder(folder)
    method = options.get("method", fields.get("method", DEFAULT_METHOD))
    if method not in CONFIGS:
        raise ValueError(f"import_lora: method must be one of {tuple(CONFIGS)}, got {method!r}")
    kind = CONFIGS[method]
    known = {one.name for config in CONFIGS.values() for one in own_fields(config)}
    unknown = sorted(set(options) - known)
    if unknown:
        raise ValueError(
            f"import_lora: options must be among {sorted(known)}, got {unknown}; the rest comes from "
            "the checkpoint"
        )
    # What the file says for another method does not count.
    kept = kind.__dataclass_fields__.keys() - {"method", "auto_mapping"}
    found = {k: v for k, v in fields.items() if k in kept}
    return kind(**{**found, **options, "method": method})


def _weights(folder: Path, path: Path) -> Path:
    file = path if path.suffix == ".safetensors" else folder / SAFETENSORS_WEIGHTS_NAME
    if file.is_file():
        return file
    if (folder / WEIGHTS_NAME).is_file() or path.suffix in (".bin", ".pt", ".pth"):
        raise ValueError(
            f"import_lora: weights must be safetensors, got a pickled file in {folder}, which can "
            "run code when it is read; convert it where you trust it: "
            "safetensors.torch.save_file(torch.load(file, weights_only=True), "
            f"'{SAFETENSORS_WEIGHTS_NAME}')"
        )
    raise FileNotFoundError(f"import_lora: {file} must exist, got nothing; check the folder")


def _single_prefix(key: str) -> str:
    while key.startswith(PREFIX * 2):
        key = key[len(PREFIX) :]
    return key


def _copy_tensors(model: PeftModel, adapter: str, tensors: dict[str, Tensor]) -> None:
    """Copy a checkpoint into an adapter: no tensor without a place, no factor without a tensor."""
    parameters = dict(_named_slots(model, adapter))
    extra = extra_names()
    config = model.peft_config[adapter]
    bayesian = isinstance(config, BayesLoraConfig)
    if isinstance(config, BayesLoraConfig):
        variant = VARIANTS[config.method]
        tensors = variant.from_plain(tensors, parameters)
        extra = extra | set(variant.module_tensors)
    unexpected = sorted(set(tensors) - set(parameters))
    needed = {k for k in parameters if k.rpartition(".")[2] not in extra}
    missing = sorted(needed - set(tensors))
    if unexpected or missing:
        raise ValueError(
            f"import_lora: the checkpoint must fit the model, got {len(unexpected)} unexpected "
            f"tensors {unexpected[:3]} and {len(missing)} missing ones {missing[:3]}; use the base "
            "model that the adapter was trained on"
        )
    with torch.no_grad():
        for name, tensor in tensors.items():
            parameter = parameters[name]
            if parameter.shape != tensor.shape:
                raise ValueError(
                    f"import_lora: {name} must have shape {tuple(parameter.shape)}, got "
                    f"{tuple(tensor.shape)}; use the base model that the adapter was trained on"
                )
            parameter.copy_(tensor)
        if bayesian and not any(k.rpartition(".")[2] in extra for k in tensors):
            # Beside a method's tensors the factors may mean something else than in plain LoRA.
            for item in bayes_layers(model, adapter):
                item.variant.init(item.layer, adapter)


def _named_slots(model: PeftModel, adapter: str) -> Any:
    """(checkpoint key, tensor that it fills) of an adapter, saved head included."""
    state = _adapter_state(model, adapter)
    by_pointer = {p.data_ptr(): p for p in model.parameters()}
    for key, value in state.items():
        yield key, by_pointer.get(value.data_ptr(), value)


__all__ = ["export_draws", "export_lora", "import_lora", "read_lora", "stored_method"]
