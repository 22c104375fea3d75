"""Comparisons of methods over seeds, and the baselines that need no posterior."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from bayes_kernels.experiment import build, folders, tables

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytest.importorskip("typer")

import tiny_task  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

from bayes_kernels import metrics  # noqa: E402
from bayes_kernels.cli import app  # noqa: E402
from bayes_kernels.experiment import compare as co  # noqa: E402
from bayes_kernels.experiment import machine, scoring, train  # noqa: E402
from bayes_kernels.experiment import run as ex  # noqa: E402
from bayes_kernels.experiment.data.tasks import Example, Task  # noqa: E402
from bayes_kernels.experiment.recipe import Experiment, Recipe, Source  # noqa: E402
from bayes_kernels.hf import predict  # noqa: E402
from bayes_kernels.hf.methods.dropout import dropout_draws  # noqa: E402
from bayes_kernels.hf.methods.ensemble import Ensemble, join_adapters  # noqa: E402

# Commands choose the GPU where there is one; what they find is compared with the CPU.
pytestmark = pytest.mark.cpu_only

FAST = Recipe(steps=2, lr=5e-3, rank=2, n_samples=2)


@pytest.fixture(autouse=True)
def _no_collections(monkeypatch: pytest.MonkeyPatch) -> None:
    """Peak memory is not looked at here, and collecting garbage before each measurement takes 40 %."""
    monkeypatch.setattr(machine.gc, "collect", lambda: 0)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    folder = tiny_task.write_data(tmp_path_factory.mktemp("data"))
    return Source(data=str(folder), ood=(str(folder / "ood.jsonl"),))


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_task.write_model(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def tasks(source: Source) -> dict[int, Task]:
    return {seed: source.load(seed) for seed in range(4)}


def batch_of(encoder: Any, examples: list[Example]) -> dict[str, torch.Tensor]:
    return encoder.collate(encoder.dataset(examples).items)


def llama(seed: int = 0) -> Any:
    """A Llama for sequence classification with random weights and a head of its own."""
    config = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        num_labels=3,
        pad_token_id=0,
    )
    torch.manual_seed(seed)
    return transformers.LlamaForSequenceClassification(config).eval()


def plain_lora(base: Any, seed: int = 0, dropout: float = 0.0) -> Any:
    """Plain LoRA whose factors and head are all random, as if trained."""
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], lora_dropout=dropout, task_type="SEQ_CLS"
    )
    model = peft.get_peft_model(base, config)
    torch.manual_seed(100 + seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter) / math.sqrt(parameter.shape[-1]))
    return model.eval()


IDS = torch.tensor([[5, 6, 7, 8, 9], [9, 3, 4, 0, 0], [7, 7, 21, 30, 2]])
BATCH = {"input_ids": IDS, "attention_mask": IDS.ne(0).long()}


# --- MC dropout ----------------------------------------------------------------------------------


def test_mc_dropout_draws_are_decided_by_seed_and_number() -> None:
    model = plain_lora(llama(), dropout=0.3)
    torch.manual_seed(7)
    state = torch.random.get_rng_state()
    one = predict(model, BATCH, n_samples=6, seed=3, return_samples=True)
    assert torch.equal(torch.random.get_rng_state(), state)  # torch's generator is left alone
    torch.manual_seed(8)
    again = predict(model, BATCH, n_samples=6, seed=3, samples_per_pass=1, return_samples=True)
    torch.testing.assert_close(one.sample_log_probs, again.sample_log_probs, rtol=0, atol=2e-6)
    other = predict(model, BATCH, n_samples=6, seed=4)
    assert (one.log_probs - other.log_probs).abs().max() > 1e-3
    assert one.sample_log_probs is not None
    mean = one.sample_log_probs.exp().mean(0)
    torch.testing.assert_close(one.probs, mean, rtol=0, atol=1e-12)
    assert (one.mutual_information > 0).all() and one.n_samples == 6
    # Hooks are gone: a plain pass and no draws are deterministic and agree.
    assert not any(m._forward_hooks for m in model.modules() if isinstance(m, torch.nn.Dropout))
    with torch.no_grad():
        plain = model(**BATCH).logits.double().log_softmax(-1)
    torch.testing.assert_close(predict(model, BATCH, n_samples=0).log_probs, plain)


def test_mc_dropout_has_the_law_of_dropout_in_training() -> None:
    """One linear layer: mean and variance of x A^T under dropout, against their closed forms."""
    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(16, 3, bias=False))
    p = 0.25
    config = peft.LoraConfig(r=3, lora_alpha=3, target_modules=["0"], lora_dropout=p)
    model = peft.get_peft_model(base, config).eval()
    layer = model.base_model.model[0]
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    x = torch.randn(2, 16)
    count = 4000
    with torch.no_grad(), dropout_draws(model, n_samples=count, seed=1):
        draws = model(x.repeat(count, 1)).unflatten(0, (count, 2)).double()
        weight = (layer.lora_B["default"].weight @ layer.lora_A["default"].weight).double()
    expected = model(x).double().detach()
    parts = x.double()[:, None, :] * weight.detach()
    variance = (parts**2).sum(-1) * p / (1 - p)
    error = (draws.mean(0) - expected).abs() / (variance / count).sqrt()
    assert error.max() < 4.5  # standard errors
    torch.testing.assert_close(draws.var(0), variance, rtol=0.15, atol=0)


# --- Ensembles -----------------------------------------------------------------------------------


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
    from bayes_kernels.hf import BlobConfig

    config = BlobConfig(target_modules=["q_proj"], task_type="SEQ_CLS")
    blob = peft.get_peft_model(llama(), config)
    with pytest.raises(ValueError, match="expected plain LoRA in"):
        join_adapters([plain_lora(llama()), blob], [tmp_path, tmp_path])


@pytest.mark.parametrize("kind", ["classification", "multiple_choice"])
def test_ensembles_of_berts_in_one_pass(kind: str, model_folder: str, tmp_path: Path) -> None:
    def example(i: int) -> Example:
        choices = ("bright day", "dull road", "warm song") if kind == "multiple_choice" else ()
        return Example(f"e{i}", f"the {tiny_task.OTHER[i]} was kind", i % 2, choices=choices)

    examples = [example(i) for i in range(5)]
    letters = ("A", "B", "C") if kind == "multiple_choice" else ("0", "1")
    task = Task("t", kind, letters, examples, examples, examples)  # type: ignore[arg-type]
    models, places = [], []
    for seed in range(2):
        one = Experiment(model=model_folder, method="map", recipe=FAST, seed=seed)
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
    found, _ = scoring.predict_examples(ensemble, encoder, examples, n_samples=2, batch_size=2)
    torch.testing.assert_close(found.probs, torch.stack(alone).mean(0), rtol=0, atol=1e-6)


# --- Comparisons ---------------------------------------------------------------------------------

METHODS = ("map", "temperature", "dropout", "ensemble", "tfb")


@pytest.fixture
def make(source: Source, model_folder: str) -> Any:
    def experiment(method: str, seed: int) -> Experiment:
        recipe = FAST
        if method == "tfb":
            recipe = dataclasses.replace(FAST, options={"anchors": 16})
        return Experiment(source, model_folder, method=method, recipe=recipe, seed=seed)

    return experiment


def test_a_comparison_goes_on_after_a_failure(
    make: Any, tasks: dict[int, Task], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[tuple[str, int]] = []
    train_model = train.train_model
    broken = True

    def noted(experiment: Experiment, *args: Any, **options: Any) -> Any:
        trained.append((experiment.method, experiment.seed))
        if experiment.method == "dropout" and broken:
            raise RuntimeError("no\n room")
        return train_model(experiment, *args, **options)

    monkeypatch.setattr(ex, "train_model", noted)
    pieces = co.plan(METHODS, make, tasks, tmp_path, seeds=1)
    order = [(piece.experiment.method, piece.experiment.seed) for piece in pieces]
    assert order == [("map", 0), ("dropout", 0), ("tfb", 0), ("map", 1000), ("ensemble", 0)]
    runs, failures = co.compare(pieces, progress=False)
    assert failures == [tables.Failure("dropout", 0, "RuntimeError: no room")]
    # Plain LoRA once for all that needs it; the ensemble's second member sees the same examples.
    assert trained == [("map", 0), ("dropout", 0), ("map", 1000)]
    assert pieces[3].task is pieces[0].task and not pieces[3].score
    assert not (tmp_path / "dropout" / "seed-0" / co.RESULT_FILE).exists()
    plain, converted, joined = runs
    member = co.load_run(tmp_path / "ensemble" / "seed-0-member-1" / co.RESULT_FILE)
    assert not member.rows
    spent = [one.training.seconds for one in (plain, member) if one.training is not None]
    assert joined.training is not None and len(spent) == 2
    assert joined.training.seconds == pytest.approx(sum(spent))
    assert joined.training.steps == 2 * FAST.steps
    assert plain.parameters is not None and joined.parameters == 2 * plain.parameters
    assert [row.name for row in plain.rows] == ["LoRA (MAP)", "LoRA + temperature"]
    assert [row.name for row in joined.rows] == ["Ensemble N=2"]
    assert [row.name for row in converted.rows] == ["TFB N=2"]
    assert converted.conversion is not None and converted.conversion_seconds is not None
    assert converted.training == plain.training  # of the adapter that was converted

    # Only what is missing runs, and everything else stays as it was.
    before = {path: path.read_bytes() for path in sorted(tmp_path.rglob(co.RESULT_FILE))}
    trained.clear()
    broken = False
    again, failures = co.compare(pieces, progress=False)
    assert trained == [("dropout", 0)] and not failures and len(again) == 4
    assert [row.name for row in again[1].rows] == ["MC dropout mean", "MC dropout N=2"]
    assert all(path.read_bytes() == content for path, content in before.items())
    # The ensemble averages the probabilities of its members.
    alone, encoder = folders.load_adapter(
        tmp_path / "ensemble" / "seed-0-member-1", member.experiment, tasks[0]
    )
    second, _ = scoring.predict_examples(alone, encoder, tasks[0].test)
    mean = (plain.rows[0].log_probs.exp() + second.probs) / 2
    torch.testing.assert_close(joined.rows[0].log_probs.exp(), mean, rtol=0, atol=1e-6)

    def other(method: str, seed: int) -> Experiment:
        one = make(method, seed)
        return dataclasses.replace(one, recipe=dataclasses.replace(one.recipe, rank=4))

    with pytest.raises(ValueError, match=r"recipe\.rank 2 -> 4; give the same options"):
        co.compare(co.plan(("map",), other, tasks, tmp_path, seeds=1), progress=False)
    # A plain adapter that was trained for a conversion only is scored later, not trained again.
    trained.clear()
    only = tmp_path / "only"
    co.compare(co.plan(("tfb",), make, tasks, only, seeds=1), progress=False)
    assert trained == [("map", 0)] and not co.load_run(only / "map/seed-0" / co.RESULT_FILE).rows
    (scored,), _ = co.compare(co.plan(("map",), make, tasks, only, seeds=1), progress=False)
    assert trained == [("map", 0)] and scored.training is not None and scored.parameters
    numbers = [row.report.to_dict() for row in plain.rows]
    assert [row.report.to_dict() for row in scored.rows] == numbers
    damaged = tmp_path / "map" / "seed-0" / co.RESULT_FILE
    damaged.write_text("{")
    with pytest.raises(ValueError, match="remove the file to run it again"):
        co.compare(pieces, progress=False)


def test_what_needs_a_plain_adapter_that_failed_says_so(
    make: Any, tasks: dict[int, Task], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(*args: Any, **options: Any) -> Any:
        raise ValueError("bad luck")

    monkeypatch.setattr(ex, "train_model", train)
    runs, failures = co.compare(
        co.plan(("temperature", "tfb"), make, tasks, tmp_path, seeds=1), progress=False
    )
    assert not runs and [failure.method for failure in failures] == ["map", "tfb"]
    assert failures[0].error == "bad luck" and "whose training failed" in failures[1].error


def test_results_survive_json(tmp_path: Path) -> None:
    log_probs = torch.tensor([[0.0, -math.inf], [math.log(0.25), math.log(0.75)]]).double()
    labels = torch.tensor([0, 1])
    row = scoring.Row(
        "BLoB N=2",
        "blob",
        2,
        None,
        metrics.evaluate(log_probs, labels),
        {"far": {"auroc": 0.5}},
        1.5,
        2.5,
        log_probs,
        labels,
        torch.tensor([0.1, 0.2]).double(),
    )
    spent = train.Training(1.0, 2, 3.0, [{"loss": 0.1}], {"r": 2})
    one = ex.Run(Experiment(seed=1), spent, [row], None, 0.5, 7)
    co.save_run(one, tmp_path / "result.json")
    found = co.load_run(tmp_path / "result.json")
    assert torch.equal(found.rows[0].log_probs, log_probs)
    assert found.rows[0].report == row.report and found.rows[0].ood == row.ood
    assert (found.experiment, found.training, found.parameters) == (one.experiment, spent, 7)


def test_methods_and_plans_are_checked(make: Any, tasks: dict[int, Task], tmp_path: Path) -> None:
    assert co.check_methods(["blob", "map", "blob"]) == ("map", "blob")
    assert co.check_methods(["all"])[:4] == ("map", "temperature", "dropout", "ensemble")
    with pytest.raises(ValueError, match="got magic"):
        co.check_methods(["map", "magic"])
    with pytest.raises(ValueError, match="got none"):
        co.check_methods([])
    # Without anything that needs it plain LoRA is not trained.
    pieces = co.plan(("blob",), make, tasks, tmp_path, seeds=2)
    assert [piece.experiment.method for piece in pieces] == ["blob", "blob"]
    pieces = co.plan(("tfb",), make, tasks, tmp_path, seeds=1)
    assert [(p.experiment.method, p.score) for p in pieces] == [("map", False), ("tfb", True)]
    with pytest.raises(ValueError, match="made of adapters of several seeds"):
        ex.run(make("ensemble", 0), tasks[0])
    with pytest.raises(ValueError, match="at least 2 for Ensemble, got 1"):
        few = lambda method, seed: dataclasses.replace(  # noqa: E731
            make(method, seed), recipe=dataclasses.replace(FAST, n_samples=1)
        )
        co.plan(("ensemble",), few, tasks, tmp_path, seeds=1)


# --- The command ---------------------------------------------------------------------------------


def test_the_command(
    source: Source, model_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    options: list[Any] = ["--data", source.data, "--model", model_folder, "--seeds", 2]
    options += ["--ood", source.ood[0] if source.ood else "", "--steps", 2, "--out", out]
    options += ["--methods", "map,temperature,blob,polar", "--set", "blob.n_samples=2"]
    options += ["--set", "rank=2", "--threads", 1]

    def call(*arguments: Any) -> Any:
        return CliRunner().invoke(app.app, ["compare", *map(str, arguments)])

    # A setting of one method that nobody can train is a line of the table.
    result = call(*options, "--set", 'polar.target_modules=["nothing"]')
    assert result.exit_code == 1, result.output
    table = (out / "table.md").read_text()
    assert table in result.stdout
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    width = len(lines[0])
    assert all(len(line) == width for line in lines)
    assert [line[0] for line in lines[2:]] == [
        *("LoRA (MAP)", "LoRA + temperature", "BLoB mean", "BLoB N=2"),
        *("PoLAR (MAP), seed 0", "PoLAR (MAP), seed 1"),
    ]
    assert lines[-1][1].startswith("failed: target-modules: expected names of linear layers")
    content = json.loads((out / "results.json").read_text())
    assert [one["method"] for one in content["failures"]] == ["polar", "polar"]
    assert content["experiments"]["blob"]["recipe"]["n_samples"] == 2
    assert content["experiments"]["map"]["recipe"]["rank"] == 2
    headings = dict(zip(lines[0], range(width), strict=True))
    by_name = {one["name"]: one for one in content["methods"]}
    for line in lines[2:6]:
        found = by_name[line[0]]
        mean, spread = line[headings["NLL ↓"]].split("±")
        assert float(mean) == pytest.approx(found["mean"]["nll"], abs=5.1e-4)
        assert float(spread) == pytest.approx(found["std"]["nll"], abs=5.1e-4)
        auroc = [one["ood"]["ood"]["auroc"] for one in found["per_seed"]]
        text = line[headings["AUROC ood ↑"]].split("±")[0]
        assert float(text) == pytest.approx(sum(auroc) / 2, abs=5.1e-4)
    extra = headings["extra numbers"]
    # rho of two layers' query and value projections: 2 x 32 numbers each.
    assert [line[extra] for line in lines[2:6]] == ["0", "0", "+256", "+256"]
    for name in ("reliability.png", "risk_coverage.png"):
        assert (out / name).is_file()

    refused = call(*options)
    assert refused.exit_code == 2 and "use --overwrite, --resume" in refused.output
    changed = call(*options, "--resume", "--steps", 3)
    assert changed.exit_code == 2 and "recipe.steps 2 -> 3" in changed.output

    def interrupt(*arguments: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(ex, "train_model", interrupt)
    finished = call(*options, "--resume", "--methods", "map,temperature,blob")  # nothing is left
    assert finished.exit_code == 0, finished.output
    assert "failed" not in finished.stdout and "+256" in finished.stdout
    stopped = call(*options, "--resume", "--seeds", 3)
    assert stopped.exit_code == 130 and "--resume" in stopped.output
    assert len(list(out.rglob("result.json"))) == 4
