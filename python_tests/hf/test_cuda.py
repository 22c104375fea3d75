"""The whole way of every method on a device: training, predictions, folders; a GPU equals the CPU.

Noise is the same numbers on every device, so that losses and predictions of both agree to rounding.
On the CPU two methods go the way, so that the test itself is known to work where there is no GPU.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tiny_models
import torch
from torch import Tensor

from bayes_kernels.experiment import build, convert, folders, train
from bayes_kernels.experiment.recipe import METHODS, Experiment, Recipe, Source
from bayes_kernels.hf import generate
from bayes_kernels.hf.layers import noise_state
from bayes_kernels.hf.methods.laplace import laplace_posterior
from bayes_kernels.hf.tasks.answers import predict_examples
from bayes_kernels.task import Task
from hf.letters import letters

# Those with an adapter of their own; an ensemble is several of plain LoRA.
METHOD_NAMES = [name for name, method in METHODS.items() if method.made != "join"]
RECIPE = Recipe(steps=3, lr=2e-2, rank=4)
# Deviations and steps so large that wrong noise would show.
NOISY = {"init_rho": 0.7, "kl_schedule": "constant", "kl_lr": 0.01}
OPTIONS: dict[str, dict[str, Any]] = {
    "blob": NOISY,
    "scalabl": {**NOISY, "scope": "example", "covariance": "full"},
    "polar": {"stiefel": "polar"},
    "polar-vbll": {"head_covariance": "low_rank", "refine": True},
    "tfb": {"anchors": 16, "metric": "nll", "tolerance": 0.5, "max_trials": 3},
    # A prior of its own: what a few validation examples choose after three steps may be all but the mean.
    "laplace": {
        "anchors": 16,
        "rank": 4,
        "dense_below": 16,
        "prior": "fixed",
        "prior_precision": 5.0,
    },
    "laplace-last": {"anchors": 16, "prior": "mackay"},
}
ON_CPU = ("blob", "laplace")
cuda = pytest.mark.needs_cuda


@pytest.fixture(autouse=True)
def _full_precision() -> Iterator[None]:
    """Products on a GPU in fp32, not in TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture(scope="module")
def source(tiny_data: Path) -> Source:
    return Source(data=str(tiny_data))


@pytest.fixture(scope="module")
def task(source: Source) -> Task:
    return source.load(0)


@pytest.fixture(scope="module")
def model_folder(tiny_model: Path) -> str:
    return str(tiny_model)


class Outcome(NamedTuple):
    """Losses of the steps; probabilities by the mean and by draws."""

    losses: Tensor
    mean: Tensor
    drawn: Tensor


def go(experiment: Experiment, task: Task, device: str, folder: Path) -> Outcome:
    """Train, convert, predict, save, load and predict again on a device."""
    model, encoder = build.build(experiment, task, device=device)
    log = train.train_model(experiment, model, encoder, progress=False).log
    if METHODS[experiment.method].made == "convert":
        convert.convert_model(experiment, model, encoder, progress=False)
    places = {t.device.type for t in (*model.parameters(), *model.buffers())}
    assert places == {device}
    method = METHODS[experiment.method]
    draws = 4 if method.bayesian else 0

    def probabilities(of: Any, n_samples: int) -> Tensor:
        options = {"n_samples": n_samples, "seed": 3, "progress": False}
        return predict_examples(of, encoder, task.test, **options)[0].probs

    mean, drawn = probabilities(model, 0), probabilities(model, draws)
    apart = 5e-3 if experiment.method != "polar-vbll" else 5e-4  # refined covariances are small
    assert ((drawn - mean).abs().amax().item() > apart) == (draws > 0)
    folders.save_adapter(model, experiment, task, encoder, folder)
    if method.made == "train" and not method.plain:
        assert {key.type for key in noise_state(model).keys} == {device}
    loaded, _ = folders.load_adapter(folder, experiment, task, device=device)
    assert next(loaded.parameters()).device.type == device
    # The same weights in the same programme.
    torch.testing.assert_close(probabilities(loaded, 0), mean, rtol=0, atol=1e-6)
    torch.testing.assert_close(probabilities(loaded, draws), drawn, rtol=0, atol=1e-6)
    return Outcome(torch.tensor([entry["loss"] for entry in log]), mean, drawn)


def experiment_of(method: str, source: Source, model_folder: str) -> Experiment:
    dropout = 0.1 if method == "blob" else None
    recipe = dataclasses.replace(RECIPE, dropout=dropout, options=OPTIONS.get(method, {}))
    return Experiment(source, model=model_folder, method=method, recipe=recipe)


@pytest.mark.parametrize("method", ON_CPU)
def test_cpu(method: str, source: Source, task: Task, model_folder: str, tmp_path: Path) -> None:
    found = go(experiment_of(method, source, model_folder), task, "cpu", tmp_path)
    assert len(found.losses) == 3 and bool(found.losses.isfinite().all())


@cuda
@pytest.mark.parametrize("method", METHOD_NAMES)
def test_cuda_equals_cpu(
    method: str, source: Source, task: Task, model_folder: str, tmp_path: Path
) -> None:
    experiment = experiment_of(method, source, model_folder)
    expected = go(experiment, task, "cpu", tmp_path / "cpu")
    found = go(experiment, task, "cuda", tmp_path / "cuda")
    names: tuple[str, ...] = ("losses", "mean", "drawn")
    if method == "dropout":  # masks of plain LoRA are drawn by torch, differently on each device
        names = ()
    elif method == "tfb":  # the signs of its singular vectors, and so its draws, are the device's
        names = ("losses", "mean")
    for name in names:
        torch.testing.assert_close(
            getattr(found, name), getattr(expected, name), rtol=2e-3, atol=2e-3, msg=name
        )
    # What the GPU has saved draws the same on the CPU.
    loaded, encoder = folders.load_adapter(tmp_path / "cuda", experiment, task, device="cpu")
    options = {"n_samples": 4 if METHODS[method].bayesian else 0, "seed": 3, "progress": False}
    drawn = predict_examples(loaded, encoder, task.test, **options)[0].probs
    torch.testing.assert_close(drawn, found.drawn, rtol=2e-3, atol=2e-3)


@cuda
def test_blob_in_bfloat16(source: Source, task: Task, model_folder: str, tmp_path: Path) -> None:
    experiment = experiment_of("blob", source, model_folder)
    full = go(experiment, task, "cuda", tmp_path / "float32")
    half = go(dataclasses.replace(experiment, dtype="bfloat16"), task, "cuda", tmp_path / "bf16")
    torch.testing.assert_close(half.losses, full.losses, rtol=0.05, atol=0.05)
    torch.testing.assert_close(half.drawn, full.drawn, rtol=0, atol=0.1)


@cuda
@pytest.mark.parametrize("options", [{}, {"do_sample": True}, {"num_beams": 3}], ids=str)
def test_texts_are_those_of_the_cpu(options: dict[str, Any]) -> None:
    model = tiny_models.fill(
        tiny_models.adapted(tiny_models.llama(initializer_range=0.2)), 0.6, 1.0
    )
    options = {"n_samples": 4, "max_new_tokens": 6, "eos_token_id": None, **options}
    expected = generate(model, letters(), ["be", "no way"], **options)
    found = generate(model.cuda(), letters(), ["be", "no way"], **options)
    for a, b in zip(found, expected, strict=True):
        assert a.token_ids == b.token_ids
        assert a.log_probs == pytest.approx(b.log_probs, abs=1e-4)
        assert a.mutual_information == pytest.approx(b.mutual_information, abs=1e-4)


@cuda
def test_posterior_follows_the_model(
    source: Source, task: Task, model_folder: str, tmp_path: Path
) -> None:
    """A fitted Laplace posterior predicts where its model is moved to."""
    experiment = experiment_of("laplace", source, model_folder)
    go(experiment, task, "cpu", tmp_path)
    model, encoder = folders.load_adapter(tmp_path, experiment, task, device="cpu")
    options = {"n_samples": 4, "seed": 3, "progress": False}
    expected = predict_examples(model, encoder, task.test, **options)[0].probs
    model.cuda()
    found = predict_examples(model, encoder, task.test, **options)[0].probs
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3)
    assert laplace_posterior(model) is not None
