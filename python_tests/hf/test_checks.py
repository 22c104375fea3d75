"""Damaged adapter folders are refused by every reader, by file and key, before a model is touched."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import bert, fingerprint, gpt2
from torch import nn

from bayes_kernels.hf import (
    BlobConfig,
    PolarConfig,
    PolarVbllConfig,
    ScalablConfig,
    TfbConfig,
    import_lora,
)
from bayes_kernels.hf.checkpoints import read_lora
from bayes_kernels.hf.checks import check_folder

CONFIGS: dict[str, Callable[..., Any]] = {
    "lora": LoraConfig,
    "blob": BlobConfig,
    "scalabl": ScalablConfig,
    "polar": PolarConfig,
    "polar-vbll": PolarVbllConfig,
    "tfb": TfbConfig,
}
EXTRA = {
    "blob": "lora_A_rho",
    "scalabl": "lora_log_s_sigma",
    "polar": "lora_core",
    "polar-vbll": "lora_core",
    "tfb": "lora_A_sigma",
}
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def base() -> Any:
    return gpt2(n_embd=16, n_layer=2, n_head=2, vocab_size=32, pad_token_id=0)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for method, config in CONFIGS.items():
        folder = tmp_path_factory.mktemp(method)
        options = {"target_modules": ["c_attn", "mlp.c_proj"], "task_type": "SEQ_CLS", "r": 2}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            get_peft_model(base(), config(**options)).save_pretrained(folder)
        found[method] = folder
    return found


# --- damages ---------------------------------------------------------------------------------------

Tensors = dict[str, Any]


def first(tensors: Tensors, part: str) -> str:
    return next(key for key in sorted(tensors) if part in key)


def without(part: str) -> Callable[..., str]:
    def damage(tensors: Tensors, config: Any, method: str) -> str:
        key = first(tensors, EXTRA.get(method, "lora_B") if part == "extra" else part)
        del tensors[key]
        return key.rpartition(".lora_")[0].removeprefix("base_model.model.")

    return damage


def value(part: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., str]:
    def damage(tensors: Tensors, config: Any, method: str) -> str:
        key = first(tensors, EXTRA.get(method, "lora_B") if part == "extra" else part)
        tensors[key] = make(tensors[key].clone())
        return key

    return damage


def one(number: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def make(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[-1] = number
        return tensor

    return make


def field(name: str, new: Any) -> Callable[..., str]:
    def damage(tensors: Tensors, config: dict[str, Any], method: str) -> str:
        config[name] = new
        return name

    return damage


def no_classifier(tensors: Tensors, config: Any, method: str) -> str:
    for key in [key for key in tensors if ".score." in key]:
        del tensors[key]
    return "classifier is missing"


def only_the_classifier(tensors: Tensors, config: Any, method: str) -> str:
    for key in [key for key in tensors if ".lora_" in key]:
        del tensors[key]
    return "lora_A"


DAMAGES: dict[str, Callable[..., str]] = {
    "no lora_A": without("lora_A.weight"),
    "no lora_B": without("lora_B.weight"),
    "no posterior": without("extra"),
    "NaN in a factor": value("lora_A.weight", one(float("nan"))),
    "inf in the posterior": value("extra", one(float("inf"))),
    "NaN in the classifier": value("score", one(float("nan"))),
    "an integer factor": value("lora_B.weight", lambda t: (t * 100).to(torch.int32)),
    "an integer posterior": value("extra", lambda t: t.to(torch.int64)),
    "boolean": value("lora_A.weight", lambda t: t > 0),
    "NaN alpha": field("lora_alpha", float("nan")),
    "infinite alpha of a layer": field("alpha_pattern", {"c_attn": float("inf")}),
    "alpha of words": field("lora_alpha", "16"),
    "rank 0": field("r", 0),
    "ranks that are one": field("rank_pattern", 3),
    "scales that are a list": field("alpha_pattern", [3]),
    "rank 1.5": field("rank_pattern", {"c_attn": 1.5}),
    "cut target_modules": field("target_modules", ["c_attn"]),
    "cut target expression": field("target_modules", r".*c_attn"),
    "classifier": no_classifier,
    "factors": only_the_classifier,
}
READERS: dict[str, Callable[[nn.Module, Path], Any]] = {
    "read_lora": read_lora,
    "peft": lambda model, folder: PeftModel.from_pretrained(model, str(folder)),
    "transformers": lambda model, folder: model.load_adapter(str(folder)),
}


def damaged(source: Path, target: Path, damage: Callable[..., str], method: str) -> str:
    shutil.copytree(source, target)
    tensors = load_file(target / WEIGHTS)
    config = json.loads((target / CONFIG).read_text())
    said = damage(tensors, config, method)
    save_file(tensors, target / WEIGHTS)
    (target / CONFIG).write_text(json.dumps(config))
    return said


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_folders(saved: dict[str, Path], tmp_path: Path, method: str, damage: str) -> None:
    said = damaged(saved[method], tmp_path / "a", DAMAGES[damage], method)
    with pytest.raises(ValueError) as caught:
        check_folder(tmp_path / "a")
    text = str(caught.value)
    assert str(tmp_path / "a") in text and said.split(".lora_")[0] in text and "\n" not in text


# PEFT and transformers themselves read plain LoRA, and transformers no saved modules.
PAIRS = [
    (reader, method)
    for reader in READERS
    for method in CONFIGS
    if reader == "read_lora" or (method != "lora" and (reader == "peft" or method != "polar-vbll"))
]


@pytest.mark.parametrize(("reader", "method"), PAIRS)
def test_readers_refuse(saved: dict[str, Path], tmp_path: Path, method: str, reader: str) -> None:
    model = base()
    before = fingerprint(model)
    for i, (damage, key) in enumerate(
        (("no lora_A", "lora_A"), ("inf in the posterior", "infinity"), ("NaN alpha", "lora_alpha"))
    ):
        damaged(saved[method], tmp_path / str(i), DAMAGES[damage], method)
        with pytest.raises(ValueError, match=key) as caught:
            READERS[reader](model, tmp_path / str(i))
        assert str(tmp_path / str(i)) in str(caught.value)
        assert fingerprint(model) == before


@pytest.mark.parametrize("change", ["tensor", "gradient", "module", "attribute"])
def test_a_fingerprint_sees_changes(change: str) -> None:
    model = base()
    before, head = fingerprint(model), model.score
    assert fingerprint(model) == before
    if change == "tensor":
        with torch.no_grad():
            head.weight[0, 0] += 1e-6
    elif change == "gradient":
        head.weight.requires_grad_(False)
    elif change == "module":
        model.score = nn.Linear(16, head.out_features, bias=False)
        model.score.weight = head.weight
    else:
        head.scaling = {}
    assert fingerprint(model) != before


@pytest.mark.parametrize(("reader", "method"), PAIRS)
def test_readers_refuse_a_layer_that_is_gone(
    saved: dict[str, Path], tmp_path: Path, method: str, reader: str
) -> None:
    """All tensors of one layer: the rest is consistent, and only the model shows the gap."""

    def gone(tensors: Tensors, config: Any, method: str) -> str:
        for key in [key for key in tensors if ".h.1.attn.c_attn." in key]:
            del tensors[key]
        return ""

    damaged(saved[method], tmp_path / "a", gone, method)
    check_folder(tmp_path / "a")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match=r"h\.1\.attn\.c_attn\.lora_"):
            READERS[reader](base(), tmp_path / "a")


@pytest.mark.parametrize("method", ["lora", "blob"])
@pytest.mark.parametrize("content", [b"", b"garbage", b"\x10" + b"\0" * 7 + b"{", None])
def test_files_that_are_none(
    saved: dict[str, Path], tmp_path: Path, method: str, content: bytes | None
) -> None:
    shutil.copytree(saved[method], tmp_path / "a")
    file = tmp_path / "a" / WEIGHTS
    file.write_bytes(file.read_bytes()[:-40] if content is None else content)
    for read in (
        lambda: read_lora(base(), tmp_path / "a"),
        lambda: import_lora(base(), tmp_path / "a"),
    ):
        with pytest.raises(ValueError, match="expected a whole safetensors file") as caught:
            read()
        assert str(file) in str(caught.value) and "\n" not in str(caught.value)
    for text in ("", "[1]", "{", "[" * 100000):
        (tmp_path / "a" / CONFIG).write_text(text)
        with pytest.raises(ValueError, match="expected a JSON object") as caught:
            check_folder(tmp_path / "a")
        assert len(str(caught.value)) < 400


@pytest.mark.parametrize("method", ["lora", "blob", "tfb", "polar"])
def test_another_architecture(saved: dict[str, Path], method: str) -> None:
    model = bert()
    before = fingerprint(model)
    with pytest.raises(ValueError, match=r"base model with the layer .*c_attn, got BertForSeq"):
        read_lora(model, saved[method])
    assert fingerprint(model) == before


@pytest.mark.parametrize(
    ("stored", "recorded", "fits"),
    [
        ("blob", "blob", True),
        ("tfb", "tfb", True),
        ("lora", "mle", True),
        ("lora", "dropout", True),
        ("lora", "ensemble", True),
        ("polar-vbll", "polar-vbll", True),
        ("blob", "scalabl", False),
        ("blob", "mle", False),
        ("lora", "blob", False),
        ("lora", "tfb", False),
        ("lora", "laplace", False),  # without its posterior
        ("polar", "polar-vbll", False),
    ],
)
def test_the_record_must_agree(
    saved: dict[str, Path], tmp_path: Path, stored: str, recorded: str, fits: bool
) -> None:
    shutil.copytree(saved[stored], tmp_path / "a")
    record = {"experiment": {"method": recorded}}
    (tmp_path / "a" / "experiment.json").write_text(json.dumps(record))
    if fits:
        check_folder(tmp_path / "a")
        return
    with pytest.raises(ValueError, match=rf"experiment\.json says method '{recorded}'"):
        check_folder(tmp_path / "a")
    if recorded in ("tfb", "laplace"):  # a checkpoint: the conversion comes after training
        (tmp_path / "a" / "trainer_state.json").write_text("{}")
        check_folder(tmp_path / "a")


@pytest.mark.parametrize("method", [m for m in CONFIGS if m != "lora"])
def test_tensors_of_another_method(saved: dict[str, Path], tmp_path: Path, method: str) -> None:
    other = "scalabl" if method in ("blob", "tfb") else "blob"
    shutil.copytree(saved[method], tmp_path / "a")
    shutil.copy(saved[other] / WEIGHTS, tmp_path / "a" / WEIGHTS)
    with pytest.raises(
        ValueError, match=rf"{EXTRA[method].split('_s_')[0]}.* of method '{method}'"
    ):
        check_folder(tmp_path / "a")


@pytest.mark.parametrize("method", CONFIGS)
def test_whole_folders_are_read(saved: dict[str, Path], method: str) -> None:
    check_folder(saved[method])
    ids = torch.randint(1, 32, (2, 5), generator=torch.Generator().manual_seed(1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        a = read_lora(base(), saved[method])
        b = PeftModel.from_pretrained(base(), str(saved[method])).eval()
    assert a(input_ids=ids).logits.isfinite().all()
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
