"""Experiments: training, scores, reports, interruption, reload."""

from __future__ import annotations

import dataclasses
import json
import math
import signal
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch

from bayes_kernels.experiment import build, callbacks, folders

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

import tiny_task  # noqa: E402

from bayes_kernels import metrics  # noqa: E402
from bayes_kernels.experiment import machine, processes, results, scoring  # noqa: E402
from bayes_kernels.experiment import run as ex  # noqa: E402
from bayes_kernels.experiment.callbacks import Interrupted  # noqa: E402
from bayes_kernels.experiment.data.tasks import Task  # noqa: E402
from bayes_kernels.experiment.folders import CHECKPOINTS, EXPERIMENT_FILE  # noqa: E402
from bayes_kernels.experiment.models import load_model  # noqa: E402
from bayes_kernels.experiment.recipe import METHODS, Experiment, Recipe, Source  # noqa: E402
from bayes_kernels.experiment.scoring import Row  # noqa: E402
from bayes_kernels.experiment.train import Training  # noqa: E402
from bayes_kernels.files import write_json  # noqa: E402
from bayes_kernels.hf.methods.blob import BlobConfig  # noqa: E402

# Commands choose the GPU where there is one; what they find is compared with the CPU.
pytestmark = pytest.mark.cpu_only

SHORT = Recipe(steps=12, lr=5e-3, n_samples=3, rank=4)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    folder = tiny_task.write_data(tmp_path_factory.mktemp("data"))
    return Source(data=str(folder), ood=(str(folder / "ood.jsonl"),))


@pytest.fixture(scope="module")
def task(source: Source) -> Task:
    return source.load(0)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, source: Source) -> Experiment:
    folder = tiny_task.write_model(tmp_path_factory.mktemp("model"))
    return Experiment(source, model=str(folder), method="blob", recipe=SHORT)


def with_recipe(experiment: Experiment, **changes: Any) -> Experiment:
    recipe = dataclasses.replace(experiment.recipe, **changes)
    return dataclasses.replace(experiment, recipe=recipe)


def alike(a: ex.Run, b: ex.Run) -> bool:
    """Whether two runs found the same, up to how torch's products round, without what they cost."""

    def numbers(run: ex.Run) -> dict[str, Any]:
        found = {}
        for row in run.rows:
            values = {**row.report.to_dict(), "temperature": row.temperature or 0.0}
            for name, scores in row.ood.items():
                values.update({f"{name}.{score}": value for score, value in scores.items()})
            found.update({f"{row.name}.{name}": value for name, value in values.items()})
        return found

    return numbers(a) == pytest.approx(numbers(b), rel=1e-3, abs=1e-4)


@pytest.fixture(scope="module")
def finished(
    tiny: Experiment, task: Task, tmp_path_factory: pytest.TempPathFactory
) -> tuple[ex.Run, Path]:
    folder = tmp_path_factory.mktemp("finished")
    return ex.run(tiny, task, folder=folder, save_every=5), folder


# --- Descriptions --------------------------------------------------------------------------------


def test_experiments_survive_json(tiny: Experiment) -> None:
    recipe = Recipe(target_modules=("query",), lora={"use_rslora": True}, options={"kl_time": 0.01})
    one = dataclasses.replace(tiny, recipe=recipe, seed=3)
    text = json.dumps(one.to_dict())
    assert Experiment.from_dict(json.loads(text)) == one
    with pytest.raises(ValueError, match="does not fit this version"):
        Experiment.from_dict({"recipe": {"speed": 1}})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank": 0}, "rank must be an integer >= 1, got 0"),
        ({"steps": 2.5}, "steps must be an integer"),
        ({"lr": float("nan")}, "lr must be a positive number"),
        ({"warmup": 1.0}, "warmup must be in"),
        ({"batch_size": 8, "accumulation": 3}, "multiple of accumulation, got 8 and 3"),
        ({"n_samples": -1}, "n_samples must be an integer >= 0"),
    ],
)
def test_recipes_out_of_range(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Recipe(**fields)


def test_sources_reject_what_does_not_go_together(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="data of your own"):
        Source(data="stdlib-docs", test="x.jsonl").load()
    with pytest.raises(ValueError, match="brings its own"):
        Source(data="stdlib-docs", ood=("x.jsonl",)).load()
    folder = tiny_task.write_data(tmp_path)
    limited = Source(data=str(folder), test_size=7, ood=(str(folder / "ood.jsonl"),), ood_size=5)
    task = limited.load(0)
    assert len(task.test) == 7 and [len(part) for part in task.ood.values()] == [5]
    assert task.test == limited.load(1).test  # the seed chooses training examples only


# --- Models --------------------------------------------------------------------------------------


def test_methods_start_from_the_same_weights(tiny: Experiment, task: Task) -> None:
    plain, _ = build.build(dataclasses.replace(tiny, method="map"), task)
    bayes, _ = build.build(tiny, task)
    other, _ = build.build(dataclasses.replace(tiny, seed=1), task)
    left = {n: p for n, p in plain.named_parameters() if p.requires_grad}
    right = {n: p for n, p in bayes.named_parameters() if p.requires_grad}
    assert {n for n in right if n not in left} == {n for n in right if "lora_A_rho" in n}
    assert set(left) <= set(right) and any("classifier" in n for n in left)
    for name, value in left.items():
        assert torch.equal(value, right[name]), name
    changed = [n for n, p in other.named_parameters() if n in left and not torch.equal(p, left[n])]
    assert any("lora_A" in n for n in changed) and any("classifier" in n for n in changed)


def test_options_reach_the_adapter(tiny: Experiment, task: Task) -> None:
    one = with_recipe(
        tiny, options={"prior_std": 0.1, "kl_time": 0.5}, alpha=32, lora={"use_rslora": True}
    )
    model, encoder = build.build(one, task)
    config = model.peft_config["default"]
    assert (config.prior_std, config.kl_time, config.lora_alpha) == (0.1, 0.5, 32)
    assert config.use_rslora and config.seed == one.seed
    default = BlobConfig()
    assert config.init_rho == default.init_rho and config.kl_schedule == default.kl_schedule
    assert all(m.p == 0 for m in model.modules() if isinstance(m, torch.nn.Dropout))
    with pytest.raises(ValueError, match=r"expected options of peft\.LoraConfig, got speed"):
        build.adapter_config(with_recipe(tiny, lora={"speed": 1}), model, encoder.kind)
    with pytest.raises(ValueError, match="use_dora"):
        build.build(with_recipe(tiny, lora={"use_dora": True}), task)


def test_half_precision_on_the_cpu(tiny: Experiment, task: Task) -> None:
    longer = with_recipe(tiny, steps=40)
    half = dataclasses.replace(longer, dtype="bfloat16")
    model, _ = build.build(half, task, device="cpu")
    # The backward pass of the fused attention is several times slower there.
    assert model.config._attn_implementation == "eager"
    assert build.build(longer, task, device="cpu")[0].config._attn_implementation == "sdpa"
    for name, weight in model.named_parameters():
        wide = "lora_" in name  # the new head keeps the dtype of its base, as PEFT has it
        assert weight.dtype == (torch.float32 if wide else torch.bfloat16), name
    assert ex.run(half, task, device="cpu").rows[0].report.accuracy > 0.8


# An ensemble is made of several runs: test_compare.
TRAINED = [name for name, row in METHODS.items() if row.made != "join"]


def test_training_learns_the_task(tiny: Experiment, task: Task) -> None:
    longer = with_recipe(tiny, steps=40)
    for method in TRAINED:
        rows = ex.run(dataclasses.replace(longer, method=method), task).rows
        # A tenth of the labels is wrong; guessing gives one half.
        assert rows[0].report.accuracy > 0.8, method


# --- Prediction ----------------------------------------------------------------------------------


def test_predictions_keep_the_order_of_the_examples(
    finished: tuple[ex.Run, Path], tiny: Experiment, task: Task
) -> None:
    model, encoder = folders.load_adapter(finished[1], tiny, task)
    together, cost = scoring.predict_examples(model, encoder, task.test, n_samples=2, batch_size=7)
    assert cost > 0
    for index in (0, 11, len(task.test) - 1):
        alone, _ = scoring.predict_examples(model, encoder, [task.test[index]], n_samples=2)
        torch.testing.assert_close(together.log_probs[index], alone.log_probs[0], rtol=0, atol=1e-5)
    assert together.mutual_information.max() > 0


def test_temperature_is_the_minimum_of_the_nll() -> None:
    from scipy.optimize import minimize_scalar

    torch.manual_seed(0)
    logits = torch.randn(500, 4, dtype=torch.float64)
    labels = torch.distributions.Categorical(logits=logits).sample()
    for factor in (0.3, 1.0, 5.0):
        sharp = (logits * factor).log_softmax(-1)
        found = scoring.fit_temperature(sharp, labels)

        def loss(log_t: float, sharp: torch.Tensor = sharp) -> float:
            return metrics.nll((sharp / math.exp(log_t)).log_softmax(-1), labels)

        best = minimize_scalar(loss, bounds=(-4, 4), method="bounded", options={"xatol": 1e-9})
        assert found == pytest.approx(math.exp(best.x), rel=1e-4)
        assert found == pytest.approx(factor, rel=0.25)
    certain = torch.eye(4).double()[labels].mul(30).log_softmax(-1)
    assert scoring.fit_temperature(certain, labels) == pytest.approx(1 / 20, rel=1e-6) or (
        0.05 <= scoring.fit_temperature(certain, labels) <= 20
    )


# --- Whole runs ----------------------------------------------------------------------------------


def test_rows_of_a_run(finished: tuple[ex.Run, Path], tiny: Experiment, task: Task) -> None:
    run, _ = finished
    assert [row.name for row in run.rows] == ["BLoB mean", "BLoB mean + temperature", "BLoB N=3"]
    mean, tempered, sampled = run.rows
    assert mean.report.accuracy == tempered.report.accuracy  # a temperature changes no decision
    assert tempered.temperature is not None and mean.temperature is None
    assert sampled.n_samples == 3 and (sampled.report.mutual_information or 0) > 0
    for row in run.rows:
        assert row.report.n == len(task.test)
        assert set(row.ood["ood"]) == {"auroc", "fpr95"}  # that set has no labels
        assert row.report.ood_auroc == pytest.approx(row.ood["ood"]["auroc"])
        assert row.ms_per_example > 0 and row.peak_memory_mib > 50
    assert run.training is not None and run.training.steps == SHORT.steps
    assert {"loss", "nll", "kl", "elbo"} <= set(run.training.log[0])


def test_the_same_seed_gives_the_same_numbers(
    finished: tuple[ex.Run, Path], tiny: Experiment, task: Task
) -> None:
    torch.manual_seed(99)  # whatever the process did before
    again = ex.run(tiny, task)
    assert alike(again, finished[0])
    other = ex.run(dataclasses.replace(tiny, seed=1), task)
    assert not alike(other, again)


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
    model = peft.PeftModel.from_pretrained(base, finished[1]).eval()
    with torch.no_grad():
        logits = model(**encoder.collate(list(encoder.dataset(task.test)))).logits
    expected = finished[0].rows[0].log_probs
    torch.testing.assert_close(logits.double().log_softmax(-1), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", TRAINED)
def test_an_interrupted_run_goes_on_as_if_it_had_not_been(
    tiny: Experiment, task: Task, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = dataclasses.replace(tiny, method=method)
    whole = ex.run(one, task)

    def interrupt(self: Any, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 7:
            signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(callbacks.TrainingBar, "on_step_begin", interrupt, raising=False)
        with pytest.raises(Interrupted) as stop:
            ex.run(one, task, folder=tmp_path, save_every=5)
    assert signal.getsignal(signal.SIGINT) == before
    assert (stop.value.step, stop.value.signal) == (8, signal.SIGINT)
    checkpoint = tmp_path / CHECKPOINTS / "checkpoint-8"
    assert stop.value.checkpoint == str(checkpoint)
    assert not (tmp_path / "adapter_config.json").exists()
    with pytest.raises(ValueError, match="checkpoint-8"):
        folders.read_record(tmp_path)
    saved = folders.read_record(checkpoint)
    assert saved is not None and saved.experiment == one
    folders.load_adapter(checkpoint, one, task)

    folders.check_resumable(tmp_path, one)
    with pytest.raises(ValueError, match=r"recipe.lr 0.005 -> 0.1"):
        folders.check_resumable(tmp_path, with_recipe(one, lr=0.1))
    resumed = ex.run(one, task, folder=tmp_path, resume=True)
    assert resumed.training is not None and resumed.training.steps == SHORT.steps - 8
    assert alike(resumed, whole)


def test_runs_side_by_side_give_the_same_numbers(
    finished: tuple[ex.Run, Path],
    tiny: Experiment,
    task: Task,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Bar:
        def __init__(self, enabled: bool, total: int, desc: str) -> None:
            self.n, self.total = 0, total
            bars.append(self)

        def update(self, steps: int) -> None:
            self.n += steps

        def close(self) -> None:
            pass

    bars: list[Bar] = []
    monkeypatch.setattr(processes, "progress_bar", Bar)
    plain = dataclasses.replace(tiny, method="map")
    jobs = [ex.Job(plain, task, temperature=False), ex.Job(tiny, task, tmp_path / "blob")]
    seen: list[str] = []
    threads = torch.get_num_threads()
    runs = ex.run_many(jobs, processes=2, done=lambda run: seen.append(run.experiment.method))
    assert seen == ["map", "blob"]
    assert [(bar.n, bar.total) for bar in bars] == [(2 * SHORT.steps, 2 * SHORT.steps)]
    assert [row.name for row in runs[0].rows] == ["LoRA (MAP)"]
    if threads == 1:  # each process has half of the threads, which changes roundings
        assert alike(runs[1], finished[0])
    assert (tmp_path / "blob" / "adapter_model.safetensors").is_file()
    broken = dataclasses.replace(tiny, model=str(tmp_path))
    with pytest.raises(ValueError, match=r"config\.json"):
        ex.run_many([ex.Job(broken, task), ex.Job(broken, task)], processes=1)


# --- Folders -------------------------------------------------------------------------------------


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
    (tmp_path / EXPERIMENT_FILE).write_text('{"format": 99}')
    with pytest.raises(ValueError, match=r"experiment\.json"):
        folders.read_record(tmp_path)


def test_an_adapter_of_another_model_is_one_clear_error(
    finished: tuple[ex.Run, Path], tiny: Experiment, task: Task
) -> None:
    three = dataclasses.replace(task, label_names=("a", "b", "c"))
    with pytest.raises(ValueError, match=r"expected tensors that fit .* with 3 classes") as error:
        folders.load_adapter(finished[1], tiny, three)
    assert "\n" not in str(error.value)


def test_json_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    write_json(path, {"a": float("inf"), "b": [float("nan"), 1.5]})
    assert json.loads(path.read_text()) == {"a": None, "b": [None, 1.5]}
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text())["b"] == [None, 1.5]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.json"]


# --- Reports -------------------------------------------------------------------------------------


def fake_run(method: str, seed: int, ece: float, nll: float, accuracy: float = 0.8) -> ex.Run:
    report = metrics.Report(10, 2, accuracy, nll, ece, ece, 0.3, 0.1, 0.1, 0.2, None, 0.7, 0.9)
    empty = torch.empty(0)
    names = {"map": ["LoRA (MAP)", "LoRA + temperature"], "blob": ["BLoB mean", "BLoB N=10"]}
    rows = [
        Row(name, method, 0, None, report, {}, 2.0, 100.0, empty, empty, empty)
        for name in names[method]
    ]
    cost = Training(10.0 + seed, 5, 200.0, [], {})
    return ex.Run(Experiment(method=method, seed=seed), cost, rows)


def test_summaries_are_means_and_standard_deviations(task: Task) -> None:
    eces = [0.1, 0.15, 0.3]
    runs = [fake_run("map", seed, ece, 1.0) for seed, ece in enumerate(eces)]
    (first, _) = results.summarise(runs)
    assert first.seeds == (0, 1, 2) and first.per_seed["ece"] == eces
    assert first.mean["ece"] == pytest.approx(statistics.mean(eces))
    assert first.std["ece"] == pytest.approx(statistics.stdev(eces))
    assert first.mean["train_seconds"] == pytest.approx(11.0)
    assert results.summarise(runs[:1])[0].std == {}
    content = results.report(runs, task, command=["bayes-kernels", "demo"])
    assert content["seeds"] == [0, 1, 2] and content["command"] == ["bayes-kernels", "demo"]
    method = content["methods"][0]
    assert [entry["metrics"]["ece"] for entry in method["per_seed"]] == eces
    assert "train_seconds" not in method["mean"] and method["cost"]["train_seconds"] == 11.0
    assert json.loads(json.dumps(content, allow_nan=False)) == content


def test_the_verdict_is_what_the_numbers_say() -> None:
    def words(map_scores: tuple[float, float], blob_scores: tuple[float, float]) -> str:
        runs = [fake_run("map", 0, *map_scores), fake_run("blob", 0, *blob_scores)]
        return results.verdict(results.summarise(runs), "LoRA (MAP)", "BLoB N=10")

    better = words((0.2, 1.0), (0.1, 0.8))
    assert better.startswith("BLoB N=10 was better calibrated than LoRA (MAP)")
    assert "lower on 1 of 1 seed)" in better and "single seed" in better
    assert "was NOT better" in words((0.1, 0.8), (0.2, 1.0))
    assert "was NOT better" in words((0.1, 0.8), (0.1, 0.8))
    assert "ECE and NLL disagree" in words((0.1, 1.0), (0.2, 0.9))
    assert "0.200 (no lower than BLoB N=10)" in better


def test_peak_memory_is_that_of_the_phase() -> None:
    if machine.memory_measure() != "resident, reset":
        pytest.skip("the high-water mark cannot be reset here")
    with machine.peak_memory() as before:
        pass
    with machine.peak_memory() as during:
        torch.ones(64, 2**20)  # 256 MiB
    with machine.peak_memory() as after:
        pass
    assert during.mib > before.mib + 240
    assert after.mib < during.mib - 200
