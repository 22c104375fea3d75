"""An adapter that the command line has trained."""

from __future__ import annotations

from pathlib import Path

import pytest

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
