"""Whether runs side by side have room on the GPUs."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_models
import torch

from bayes_kernels import memory
from bayes_kernels.experiment import room
from bayes_kernels.experiment.machine import Gpu, gpus
from bayes_kernels.experiment.recipe import Experiment, Recipe

ENCODER: Any = SimpleNamespace(max_length=48, task=SimpleNamespace(n_classes=3))
RECIPE = Recipe(rank=4, batch_size=8, accumulation=2)
RUNS = [Experiment(method=method, recipe=RECIPE) for method in ("mle", "blob")]


def fake(monkeypatch: pytest.MonkeyPatch, *free: int) -> None:
    found = [Gpu(str(i), size, 10**12) for i, size in enumerate(free)]
    monkeypatch.setattr(room, "gpus", lambda device: list(found))


def test_the_step_of_a_llama_is_that_of_the_memory_model() -> None:
    model = tiny_models.llama()
    config = model.config
    sizes = (config.hidden_size, config.num_hidden_layers, config.num_attention_heads)
    sizes += (config.num_key_value_heads, config.intermediate_size, config.vocab_size)
    shape = memory.Shape("x", "llama", *sizes, torch.float32)
    for one, word in zip(RUNS, ("peft_lora", "blob"), strict=True):
        expected = memory.predict(shape, 4, 48, word, 3, 4).total
        assert room.step_bytes(model, ENCODER, one) == expected
    laplace = dataclasses.replace(RUNS[0], method="laplace")  # made of plain LoRA
    assert room.step_bytes(model, ENCODER, laplace) == room.step_bytes(model, ENCODER, RUNS[0])
    assert room.step_bytes(tiny_models.bert(), ENCODER, RUNS[0]) is None
    # What a recipe says of lengths and of activations in 8 bits.
    own = dataclasses.replace(RECIPE, max_length=16, options={"activation_bits": 8})
    found = room.step_bytes(model, ENCODER, dataclasses.replace(RUNS[1], recipe=own))
    assert found == memory.predict(shape, 4, 16, "blob", 3, 4, activation_bits=8).total


def test_the_largest_of_several_values_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values of a sweep are of one method."""
    model = tiny_models.llama()
    weights = sum(p.nbytes for p in [*model.parameters(), *model.buffers()])
    sizes = [dataclasses.replace(RECIPE, batch_size=size) for size in (64, 8)]
    runs = [dataclasses.replace(RUNS[1], recipe=recipe) for recipe in sizes]
    small = room.step_bytes(model, ENCODER, runs[1]) or 0
    fake(monkeypatch, int(2.1 * small / 0.9) - weights)
    said = room.check_room(2, "cuda", model, ENCODER, runs[1:])
    assert said is not None and "should one run out of memory" not in said
    for order in (runs, runs[::-1]):
        said = room.check_room(2, "cuda", model, ENCODER, order)
        assert said is not None and "should one run out of memory, use fewer --processes" in said


def test_what_runs_need_is_said_and_weights_without_room_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_models.llama()
    weights = sum(p.nbytes for p in [*model.parameters(), *model.buffers()])
    need = max(room.step_bytes(model, ENCODER, one) or 0 for one in RUNS)
    # Four processes on two GPUs, which have room for two steps and for three.
    fake(monkeypatch, int(2.1 * need / 0.9) - weights, int(3.1 * need / 0.9))
    said = room.check_room(4, "cuda", model, ENCODER, RUNS)
    assert said is not None and said.startswith("4 runs side by side on 2 GPU(s): each may take ")
    assert "a training step of " in said
    said = room.check_room(6, "cuda", model, ENCODER, RUNS)
    assert said is not None and "should one run out of memory" in said
    assert room.check_room(1, "cuda", model, ENCODER, RUNS) is None
    bert = tiny_models.bert()
    said = room.check_room(2, "cuda", bert, ENCODER, RUNS)
    assert said is not None and "their weights alone" in said
    # Weights that do not fit are no estimate.
    fake(monkeypatch, int(2.1 * weights / 0.9) - weights)
    with pytest.raises(
        ValueError,
        match=r"^processes: expected runs that fit .* got 3 on 1 GPU.* use --processes 2$",
    ):
        room.check_room(3, "cuda", model, ENCODER, RUNS)
    fake(monkeypatch, int(0.1 * weights), int(0.9 * weights))
    with pytest.raises(ValueError, match=r"use --quantization or a smaller model$"):
        room.check_room(2, "cuda", model, ENCODER, RUNS)
    fake(monkeypatch)
    assert room.check_room(2, "cpu", model, ENCODER, RUNS) is None


def test_gpus_have_the_names_that_processes_see_them_by(monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpus("cpu") == []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda i: (10 + i, 20))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, GPU-ab")
    assert gpus("auto") == [Gpu("3", 10, 20), Gpu("GPU-ab", 11, 20)]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert [one.name for one in gpus("cuda")] == ["0", "1"]
