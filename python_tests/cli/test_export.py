"""The command that writes plain LoRA folders."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from hf.letters import letters
from safetensors.torch import load_file

from bayes_kernels.hf import load, posterior
from cli.commands import SETTINGS, call, refuse

pytestmark = pytest.mark.cpu_only


def run(*words: object) -> Any:
    result = call("export", *words)
    assert result.exit_code == 0, result.output
    return result.stdout


@torch.no_grad()
def test_draws_are_those_of_the_posterior(writer: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "draws"
    assert f"Wrote 3 draws (draw-0, ...) as plain LoRA to {out}/" in run(
        writer, "--out", out, "--n-samples", 3, "--seed", 4
    )
    assert sorted(path.name for path in out.iterdir()) == ["draw-0", "draw-1", "draw-2"]
    batch = letters()("no way", return_tensors="pt")

    def on_base(folder: Path) -> Any:
        base = transformers.AutoModelForCausalLM.from_pretrained(writer.parent / "base")
        return peft.PeftModel.from_pretrained(base, folder).eval()

    model = on_base(writer)
    for draw in range(3):
        plain = on_base(out / f"draw-{draw}")
        assert type(plain.peft_config["default"]) is peft.LoraConfig
        with posterior(model, "sample", seed=4, first_sample=draw):
            expected = model(**batch).logits
        torch.testing.assert_close(plain(**batch).logits, expected, rtol=1e-4, atol=1e-4)
    run(writer, "--out", tmp_path / "mean", "--n-samples", 0)
    expected = model(**batch).logits
    torch.testing.assert_close(on_base(tmp_path / "mean")(**batch).logits, expected)


def test_folders_that_are_there(
    writer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "own"
    shutil.copytree(writer, own)
    for out in (own, own / "draws", tmp_path):
        assert "--out: expected a folder apart from the adapter's" in refuse(
            "export", own, "--out", out
        )
    model = ["--model", writer.parent / "base", "--n-samples", 2]
    run(own, *model)  # beside the adapter
    assert (tmp_path / "own-draws" / "draw-1").is_dir()
    assert "exists; use --overwrite" in refuse("export", own, *model)
    (tmp_path / "loop").symlink_to("loop")
    loop = ["export", own, *model, "--out", tmp_path / "loop"]
    assert "exists; use --overwrite" in refuse(*loop)
    assert "got the file or link" in refuse(*loop, "--overwrite")
    first = load_file(tmp_path / "own-draws" / "draw-0" / "adapter_model.safetensors")
    run(own, *model, "--overwrite", "--seed", 9)
    second = load_file(tmp_path / "own-draws" / "draw-0" / "adapter_model.safetensors")
    assert any(not torch.equal(first[key], second[key]) for key in first)
    monkeypatch.chdir(own)
    run(".", *model, "--overwrite", "--seed", 4)
    assert not (own / "own-draws").exists()
    (tmp_path / "own-draws" / "notes.txt").write_text("mine")
    assert "got ['notes.txt']" in refuse("export", own, *model, "--overwrite")
    assert (tmp_path / "own-draws" / "notes.txt").read_text() == "mine"


def test_classifiers(trained: Path, tmp_path: Path) -> None:
    run(trained, "--out", tmp_path / "draws")
    assert len(list((tmp_path / "draws").iterdir())) == int(SETTINGS[-1])
    keys = load_file(tmp_path / "draws" / "draw-0" / "adapter_model.safetensors")
    assert any("classifier" in key for key in keys) and not any("rho" in key for key in keys)
    assert load(trained).n_samples == int(SETTINGS[-1])


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--n-samples", "-1"], "--n-samples: expected an integer from 0"),
        (["--n-samples", "many"], "--n-samples: expected an integer"),
        (["--seed", "-1"], "--seed: expected an integer from 0"),
        (["--device", "tpu"], "device: expected 'auto', 'cpu' or 'cuda'"),
        (["--model", "./nowhere"], "model './nowhere': expected a folder that exists"),
    ],
)
def test_what_is_refused(writer: Path, tmp_path: Path, words: list[str], error: str) -> None:
    assert error in refuse("export", writer, "--out", tmp_path / "x", *words)
    assert not (tmp_path / "x").exists()


def test_adapters_without_draws(data: Path, model: Path, tmp_path: Path) -> None:
    for method, error in (("mle", "without a posterior"), ("polar-vbll", "none of weights")):
        out = tmp_path / method
        words = ["--method", method, *SETTINGS[:-2], "--out", out]
        result = call("train", data, "--model", model, *words)
        assert result.exit_code == 0, result.output
        assert error in refuse("export", out, "--n-samples", 2)
    assert "plain LoRA already" in refuse("export", tmp_path / "mle")
    run(tmp_path / "polar-vbll", "--n-samples", 0)
    assert (tmp_path / "polar-vbll-mean" / "adapter_model.safetensors").is_file()
