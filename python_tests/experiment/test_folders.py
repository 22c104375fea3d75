"""Folders of adapters: written, read again, explained, damaged."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from bayes_kernels.experiment import folders, scoring
from bayes_kernels.experiment import run as ex
from bayes_kernels.experiment.folders import EXPERIMENT_FILE
from bayes_kernels.experiment.recipe import METHODS, Experiment
from bayes_kernels.files import write_json
from bayes_kernels.hf.tasks.models import load_model
from bayes_kernels.task import Task
from experiment.tiny_runs import alike

# Commands choose the GPU where there is one; what they find is compared with the CPU.
pytestmark = pytest.mark.cpu_only


def test_a_reloaded_adapter_gives_the_same_numbers(
    finished: tuple[ex.Run, Path], tiny: Experiment, task: Task
) -> None:
    run, folder = finished
    saved = folders.read_record(folder)
    assert saved is not None and saved.experiment == tiny
    assert saved.task.label_names == task.label_names
    model, encoder = folders.load_adapter(
        folder, saved.experiment, task, max_length=saved.max_length
    )
    rows = scoring.evaluate_model(model, encoder, task, method="blob", n_samples=3)
    assert alike(ex.Run(tiny, None, rows), run)


def test_the_folder_explains_itself(
    finished: tuple[ex.Run, Path], tiny: Experiment, task: Task
) -> None:
    run, folder = finished
    text = (folder / "README.md").read_text()
    own = run.rows[-1].report.to_dict()
    for part in (
        METHODS[tiny.method].title,
        f"accuracy {own['accuracy']:.4g}",
        f"{own['nll']:.4g}",
    ):
        assert part in text, part
    assert all(name in text for name in task.label_names) and "bayes-kernels predict" in text
    base = Path("..", Path(tiny.model).name).as_posix()  # the model's folder lies beside it
    assert f'from_pretrained("{base}")' in text and tiny.model not in text


def test_peft_itself_loads_the_adapter(
    finished: tuple[ex.Run, Path], tiny: Experiment, task: Task
) -> None:
    base, encoder = load_model(tiny.model, task, head_seed=tiny.seed)
    model = PeftModel.from_pretrained(base, finished[1]).eval()
    with torch.no_grad():
        logits = model(**encoder.collate(list(encoder.dataset(task.test)))).logits
    expected = finished[0].rows[0].log_probs
    torch.testing.assert_close(logits.double().log_softmax(-1), expected, rtol=0, atol=1e-5)


def test_damaged_adapter_folders(finished: tuple[ex.Run, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="folder that exists"):
        folders.read_record(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"adapter_config\.json"):
        folders.read_record(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.bin").write_bytes(b"pickle")
    with pytest.raises(ValueError, match=r"pickled weights \(.bin\) are not read"):
        folders.read_record(tmp_path)
    weights = (finished[1] / "adapter_model.safetensors").read_bytes()
    (tmp_path / "adapter_model.safetensors").write_bytes(weights)
    assert folders.read_record(tmp_path) is None
    record = json.loads((finished[1] / EXPERIMENT_FILE).read_text())
    for other in (1, 99):
        write_json(tmp_path / EXPERIMENT_FILE, {**record, "format": other})
        with pytest.raises(
            ValueError, match=rf"experiment\.json: expected format 2, got {other}; "
        ):
            folders.read_record(tmp_path)
    write_json(tmp_path / EXPERIMENT_FILE, {"format": 2})
    with pytest.raises(ValueError, match=r"experiment\.json: expected what `train` wrote"):
        folders.read_record(tmp_path)


def test_an_adapter_of_another_model_is_one_clear_error(
    finished: tuple[ex.Run, Path], tiny: Experiment, task: Task
) -> None:
    three = dataclasses.replace(task, label_names=("a", "b", "c"))
    with pytest.raises(ValueError, match=r"expected tensors that fit .* with 3 classes") as error:
        folders.load_adapter(finished[1], tiny, three)
    assert "\n" not in str(error.value)
