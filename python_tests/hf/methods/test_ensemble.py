"""Ensembles of plain LoRA: the mean of their members, in one pass where one base serves all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_models
import tiny_task
import torch

from bayes_kernels.experiment import build, folders
from bayes_kernels.experiment.recipe import Experiment, Recipe
from bayes_kernels.hf import predict
from bayes_kernels.hf.methods.ensemble import Ensemble, join_adapters
from bayes_kernels.hf.tasks import answers
from bayes_kernels.task import Example, Task
from hf.methods.plain_adapters import BATCH, llama, plain_lora


def batch_of(encoder: Any, examples: list[Example]) -> dict[str, torch.Tensor]:
    return encoder.collate(encoder.dataset(examples).items)


def test_an_ensemble_is_the_mean_of_its_members(tmp_path: Path) -> None:
    models = [plain_lora(llama(), seed) for seed in range(3)]
    folders = [tmp_path / str(seed) for seed in range(3)]
    with torch.no_grad():
        members = torch.stack([m(**BATCH).logits.double().softmax(-1) for m in models])
    for model, folder in zip(models, folders, strict=True):
        model.save_pretrained(folder)
    folded = join_adapters(models, folders)
    assert folded.folded and len(folded) == 3 and len(folded.models) == 1
    fresh = [plain_lora(llama(), seed) for seed in range(3)]
    apart = Ensemble(fresh, ["a", "b", "c"])
    assert not apart.folded
    for ensemble in (folded, apart):
        found = predict(ensemble, BATCH, return_samples=True)
        torch.testing.assert_close(found.probs, members.mean(0), rtol=0, atol=1e-6)
        assert found.sample_log_probs is not None and found.n_samples == 3
        torch.testing.assert_close(found.sample_log_probs.exp(), members, rtol=0, atol=1e-6)
        assert (found.mutual_information > 0).all()


def test_members_with_other_bases_keep_them(tmp_path: Path) -> None:
    models = [plain_lora(llama(seed), seed) for seed in range(2)]
    for seed, model in enumerate(models):
        model.save_pretrained(tmp_path / str(seed))
    with torch.no_grad():
        members = torch.stack([m(**BATCH).logits.double().softmax(-1) for m in models])
    ensemble = join_adapters(models, [tmp_path / "0", tmp_path / "1"])
    assert not ensemble.folded and len(ensemble.models) == 2
    found = predict(ensemble, BATCH)
    torch.testing.assert_close(found.probs, members.mean(0), rtol=0, atol=1e-6)


def test_ensembles_refuse_what_is_no_plain_lora(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least two"):
        join_adapters([plain_lora(llama())], [tmp_path])
    blob = tiny_models.adapted(llama(), task_type="SEQ_CLS")
    with pytest.raises(ValueError, match="expected plain LoRA in"):
        join_adapters([plain_lora(llama()), blob], [tmp_path, tmp_path])


@pytest.mark.parametrize("kind", ["classification", "multiple_choice"])
def test_ensembles_of_berts_in_one_pass(kind: str, tiny_model: Path, tmp_path: Path) -> None:
    def example(i: int) -> Example:
        choices = ("bright day", "dull road", "warm song") if kind == "multiple_choice" else ()
        return Example(f"e{i}", f"the {tiny_task.OTHER[i]} was kind", i % 2, choices=choices)

    examples = [example(i) for i in range(5)]
    letters = ("A", "B", "C") if kind == "multiple_choice" else ("0", "1")
    task = Task("t", kind, letters, examples, examples, examples)  # type: ignore[arg-type]
    models, places = [], []
    for seed in range(2):
        one = Experiment(model=str(tiny_model), method="mle", recipe=Recipe(rank=2), seed=seed)
        model, encoder = build.build(one, task)
        torch.nn.init.normal_(next(p for n, p in model.named_parameters() if "lora_B" in n))
        folders.save_adapter(model, one, task, encoder, tmp_path / str(seed))
        models.append(model.eval())
        places.append(tmp_path / str(seed))
    batch = batch_of(encoder, examples)
    alone = [predict(model, batch, n_samples=0).probs for model in models]
    assert (alone[0] - alone[1]).abs().max() > 1e-3
    ensemble = join_adapters(models, places)
    assert ensemble.folded
    found, _ = answers.predict_examples(ensemble, encoder, examples, n_samples=2, batch_size=2)
    torch.testing.assert_close(found.probs, torch.stack(alone).mean(0), rtol=0, atol=1e-6)
