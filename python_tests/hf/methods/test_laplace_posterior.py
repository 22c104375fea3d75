"""Laplace posteriors in use: draws of the weights, folders, and when they are no longer valid."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from accuracy import assert_same_but_rounding
from peft import PeftModel
from safetensors import safe_open
from tiny_models import BASES, choices, logits, trained

from bayes_kernels.hf import drawn_weights, laplace_posterior, load_laplace, predict, save_laplace
from hf.methods.laplace_models import BATCH, KINDS, fit, same, state


def test_draws_of_the_weights() -> None:
    model = trained()
    with pytest.raises(ValueError, match="must have a Laplace posterior, got none"):
        drawn_weights(model).__enter__()
    fit(model)
    before, mean = state(model), logits(model)
    with drawn_weights(model, seed=1):
        one = logits(model)
    with drawn_weights(model, seed=1, index=1):
        two = logits(model)
    assert not torch.equal(one, two) and not torch.equal(one, mean)
    assert same(before, state(model))
    predict(model, BATCH, n_samples=3)  # the posterior is still valid


@KINDS
def test_saved_and_loaded(kind: str, tmp_path: Path) -> None:
    model = trained(kind)
    options = {"structure": "layer", "layers": "adapters", "prediction": "mc_independent"}
    fit(model, kind, **options)
    expected = predict(model, BATCH, n_samples=30, seed=2)
    model.save_pretrained(tmp_path)
    path = save_laplace(model, tmp_path)
    assert {p.name for p in tmp_path.iterdir()} >= {"laplace.safetensors", "adapter_config.json"}
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LORA"
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["bayes_kernels"])
    assert header["report"]["structure"] == "layer" and header["layers"] == "adapters"
    loaded = PeftModel.from_pretrained(BASES[kind](), tmp_path)  # stock PEFT
    assert_same_but_rounding(logits(loaded), logits(model))
    assert laplace_posterior(loaded) is None
    found = load_laplace(loaded, tmp_path)
    assert found.choices == choices(kind).get("choices") and found.prediction == "mc_independent"
    again = predict(loaded, BATCH, n_samples=30, seed=2)
    assert_same_but_rounding(again.log_probs, expected.log_probs, units=4096)
    assert_same_but_rounding(again.entropy, expected.entropy, units=4096)
    copied = copy.deepcopy(loaded)
    again = predict(copied, BATCH, n_samples=30, seed=2)
    assert_same_but_rounding(again.log_probs, expected.log_probs, units=4096)
    with torch.no_grad():
        next(p for n, p in copied.named_parameters() if "lora_B" in n).add_(1)
    with pytest.raises(ValueError, match="weights must be those"):
        predict(copied, BATCH)
    predict(loaded, BATCH, n_samples=1)  # the copy has a posterior of its own


@pytest.mark.parametrize("part", ["lora_A", "classifier"])
@pytest.mark.parametrize("layers", ["adapters", "last"])
def test_training_on_makes_the_posterior_invalid(part: str, layers: str, tmp_path: Path) -> None:
    """Whatever was trained with the adapter counts, whether or not it has a posterior."""
    model = trained()
    fit(model, layers=layers)
    model.save_pretrained(tmp_path / "old")
    save_laplace(model, tmp_path / "old")
    weight = next(p for n, p in model.named_parameters() if part in n and "default" in n)
    weight.requires_grad_(True)
    optimiser = torch.optim.SGD([weight], lr=1.0)
    model(**BATCH).loss.backward()
    optimiser.step()
    for use in (
        lambda: predict(model, BATCH, n_samples=5),
        lambda: predict(model, BATCH, n_samples=0),
        lambda: save_laplace(model, tmp_path / "new"),
        lambda: drawn_weights(model).__enter__(),
    ):
        with pytest.raises(ValueError, match=r"weights must be those .* call fit again"):
            use()
    assert not (tmp_path / "new" / "laplace.safetensors").exists()
    model.save_pretrained(tmp_path / "old")  # the file beside it now belongs to other weights
    loaded = PeftModel.from_pretrained(BASES["bert"](), tmp_path / "old")
    with pytest.raises(ValueError, match=r"does not belong to this adapter: .* bayesianize again"):
        load_laplace(loaded, tmp_path / "old")
    assert laplace_posterior(loaded) is None
    fit(model, layers=layers)
    predict(model, BATCH, n_samples=5)


def test_damaged_and_missing_files(tmp_path: Path) -> None:
    model = trained()
    with pytest.raises(ValueError, match="must have a Laplace posterior, got none"):
        save_laplace(model, tmp_path)
    with pytest.raises(ValueError, match=r"expected laplace\.safetensors in"):
        load_laplace(model, tmp_path)
    fit(model)
    path = save_laplace(model, tmp_path)
    whole = path.read_bytes()
    for damaged in (b"", whole[:100], whole.replace(b"bayes_kernels", b"bayes_kettles")):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="must be what save_laplace wrote"):
            load_laplace(model, tmp_path)
    path.write_bytes(whole)
    other = trained(target_modules=["query"])
    with pytest.raises(ValueError, match="does not belong to this adapter"):
        load_laplace(other, tmp_path)
    with pytest.raises(ValueError, match=r"^load_laplace: model must be a PeftModel"):
        load_laplace(BASES["bert"](), tmp_path)
