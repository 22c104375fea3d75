"""An adapter that the command line has trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers
from hf.letters import letters
from tiny_models import adapted, fill, llama

from bayes_kernels.hf import BlobConfig
from cli.commands import SETTINGS, call


@pytest.fixture(scope="session")
def data(tiny_data: Path) -> Path:
    return tiny_data


@pytest.fixture(scope="session")
def model(tiny_model: Path) -> Path:
    return tiny_model


@pytest.fixture(scope="module")
def trained(data: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "blob"
    ood = ["--ood", data / "ood.jsonl"]
    result = call("train", data, "--model", model, *ood, *SETTINGS, "--out", out, "--plots")
    assert result.exit_code == 0, result.output
    assert "BLoB N=3" in result.stdout and "AUROC ood" in result.stdout
    return out


@pytest.fixture(scope="session")
def writer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a model, `base`, and of an adapter that PEFT has saved."""
    home = tmp_path_factory.mktemp("writer")
    base = llama(initializer_range=0.2)
    base.generation_config.eos_token_id = None
    base.save_pretrained(home / "base")
    letters().save_pretrained(home / "base")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(home / "base")
    fill(adapted(loaded, BlobConfig), rho=0.6, scale=1.0).save_pretrained(home / "adapter")
    return home / "adapter"
