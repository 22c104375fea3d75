"""Saved adapters that write text."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import transformers
from tiny_models import adapted, fill, llama

from bayes_kernels.hf import Ensemble, generate, load_writer
from bayes_kernels.hf.tasks.record import write_members
from hf.letters import letters

pytestmark = pytest.mark.cpu_only


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model, and plain adapters `a` and `b` on it, as PEFT saves them."""
    home = tmp_path_factory.mktemp("writers")
    base = llama(initializer_range=0.2)
    base.generation_config.eos_token_id = None
    base.save_pretrained(home / "base")
    letters().save_pretrained(home / "base")
    for scale, name in ((1.0, "a"), (2.0, "b")):
        loaded = transformers.AutoModelForCausalLM.from_pretrained(home / "base")
        fill(adapted(loaded, peft.LoraConfig), None, scale).save_pretrained(home / name)
    return home


def test_what_peft_saved(home: Path) -> None:
    writer = load_writer(home / "a", device="cpu")
    assert (writer.n_samples, writer.seed, writer.method.name) == (0, 0, "mle")
    (text,) = writer.generate("be", max_new_tokens=3)
    (same,) = generate(writer.model, letters(), "be", n_samples=0, max_new_tokens=3)
    assert text == same and text.n_samples == 0


def test_an_ensemble_writes_together(home: Path, tmp_path: Path) -> None:
    members = [home / "a", home / "b"]
    write_members(tmp_path, members, method="ensemble", place=tmp_path)
    writer = load_writer(tmp_path, device="cpu")
    assert isinstance(writer.model, Ensemble) and writer.n_samples == 2
    (text,) = writer.generate("be", max_new_tokens=3)
    assert text.n_samples == 2 and text.max_mutual_information > 0.01


def change(folder: Path, **fields: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_the_base_model_may_have_moved(home: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(home / "a", moved)
    change(moved, base_model_name_or_path=None)
    with pytest.raises(ValueError, match="the name of a base model in it, found none; give model"):
        load_writer(moved)
    writer = load_writer(moved, model=str(home / "base"), device="cpu")
    assert writer.generate("be", max_new_tokens=2)[0].token_ids
    with pytest.raises(ValueError, match="expected a folder that exists"):
        load_writer(tmp_path / "none")


def test_an_adapter_of_another_model(home: Path, tmp_path: Path) -> None:
    llama(hidden_size=16, num_attention_heads=2).save_pretrained(tmp_path)
    letters().save_pretrained(tmp_path)
    words = "expected tensors that fit .* with the head of a language model"
    with pytest.raises(ValueError, match=words):
        load_writer(home / "a", model=str(tmp_path))
