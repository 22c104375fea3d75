"""Laplace-LoRA on PEFT adapters: fit, prediction, memory, the command line."""

from __future__ import annotations

import functools
import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accuracy import assert_same_but_rounding
from cli.commands import call, refuse, results
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import BASES, BATCHES, IDS, LABELS, adapted, bert, fill, llama, logits, trained
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from bayes_kernels import laplace
from bayes_kernels.hf import (
    BlobConfig,
    Sampling,
    bayesianize,
    laplace_posterior,
    load_laplace,
    posterior,
    predict,
    predict_dataset,
    predict_several,
    save_laplace,
)
from bayes_kernels.hf.logits import forward_logits
from hf.methods.laplace_models import BATCH, KINDS, class_logits, fit, same, state

# Commands choose the GPU where there is one; what they find is compared with the CPU.
pytestmark = pytest.mark.cpu_only


# --- fit and prediction --------------------------------------------------------------------------


@KINDS
def test_equals_the_general_laplace(kind: str) -> None:
    """The same numbers as `bayes_kernels.laplace` with layers and logits named by hand."""
    model = trained(kind)
    before = state(model)
    report = fit(model, kind, layers="adapters")
    assert same(before, state(model)) and type(model.peft_config["default"]) is LoraConfig

    def forward(m: nn.Module, batch: Any) -> Tensor:
        found = m(input_ids=batch["input_ids"]).logits
        return found if kind == "bert" else found[:, -1][:, [5, 6, 7]]

    # The head gives one token's logits here and all tokens' there: torch's products round differently.
    def near(value: Any) -> Any:
        return pytest.approx(float(value), rel=1e-4)

    plain = laplace.Laplace(
        model,
        laplace.linear_layers(model, r".*lora_[AB]\.default"),
        forward=forward,
        tokens=report.tokens,
    ).fit(BATCHES, verbose=False)
    assert report.evidence_before == near(plain.log_marginal_likelihood())
    plain.optimize_prior_precision()
    assert report.prior_precision == near(plain.prior_precision)
    assert report.evidence_after == near(plain.log_marginal_likelihood())
    assert report.evidence_after >= report.evidence_before
    assert (report.matrices, report.examples) == (8, 4)
    assert report.effective_parameters == near(plain.effective_parameters().sum())
    found = laplace_posterior(model)
    assert found is not None
    mean, cov = found.laplace.logits(BATCH)
    expected_mean, expected = plain.logits(BATCH)
    torch.testing.assert_close(mean, expected_mean)
    torch.testing.assert_close(cov, expected, rtol=1e-4, atol=1e-6)
    # Many draws agree with those of the general class, which are others.
    ours = predict(model, BATCH, n_samples=20000, seed=1)
    theirs = plain.predict(BATCH, n_samples=20000, seed=2)
    torch.testing.assert_close(ours.probs, theirs.probs.double(), rtol=0, atol=0.02)
    assert torch.equal(ours.labels, LABELS) and bool((ours.mutual_information > 0).all())


@KINDS
def test_train_and_eval_mode_with_draws_and_without(kind: str) -> None:
    model = trained(kind, lora_dropout=0.3)
    model.train()
    modes = {name: m.training for name, m in model.named_modules()}
    fit(model, kind)
    assert {name: m.training for name, m in model.named_modules()} == modes
    first = predict(model, BATCH, n_samples=50, seed=3)
    mean = predict(model, BATCH, n_samples=0)
    assert {name: m.training for name, m in model.named_modules()} == modes
    model.eval()
    assert torch.equal(predict(model, BATCH, n_samples=50, seed=3).log_probs, first.log_probs)
    plain = class_logits(model, kind).double().log_softmax(-1)
    torch.testing.assert_close(mean.log_probs, plain, rtol=0, atol=1e-6)
    assert not mean.mutual_information.any() and mean.n_samples == 0
    assert not torch.equal(predict(model, BATCH, n_samples=50, seed=4).log_probs, first.log_probs)
    # Neither how examples are batched nor their place changes their draws.
    parts = predict_dataset(model, BATCHES, n_samples=50, seed=3, progress=False)
    torch.testing.assert_close(parts.log_probs, first.log_probs, rtol=1e-4, atol=1e-4)
    with torch.inference_mode():
        again = predict(model, BATCH, n_samples=50, seed=3)
    torch.testing.assert_close(again.log_probs, first.log_probs)
    kept = predict(model, BATCH, n_samples=50, seed=3, return_samples=True)
    assert kept.sample_log_probs is not None and kept.sample_log_probs.shape == (50, 4, 3)
    torch.testing.assert_close(
        kept.sample_log_probs.exp().mean(0), first.probs, rtol=1e-5, atol=1e-6
    )


def test_numbers_of_draws_share_the_covariance_of_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained("bert")
    fit(model, "bert")
    numbers = (50, 0, 7)
    expected = [predict(model, BATCH, n_samples=n, seed=3) for n in numbers]
    posterior = laplace_posterior(model)
    assert posterior is not None
    calls = []
    logits = posterior.laplace.logits

    def counted(*given: Any) -> Any:
        calls.append(1)
        return logits(*given)

    monkeypatch.setattr(posterior.laplace, "logits", counted)
    found = predict_several(model, BATCH, [Sampling(n) for n in numbers], seed=3)
    assert len(calls) == 1
    for one, two in zip(expected, found, strict=True):
        assert torch.equal(one.log_probs, two.log_probs) and one.n_samples == two.n_samples
    with pytest.raises(ValueError, match="choices must be those of the Laplace posterior"):
        predict_several(model, BATCH, [Sampling(0), Sampling(7)], choices=[1, 2])


def test_pairs_of_draws_keep_the_likelier_of_two_classes() -> None:
    model = trained("llama")
    two = [{**batch, "labels": batch["labels"] % 2} for batch in BATCHES]
    wide = {"choices": [5, 6], "prior": "fixed", "prior_precision": 1e-4}
    fit(model, "llama", two, **wide)
    likelier = predict(model, BATCH, n_samples=0).log_probs.argmax(1)
    answers = {
        count: [
            predict(model, BATCH, n_samples=count, seed=s).log_probs.argmax(1) for s in range(8)
        ]
        for count in (3, 4)
    }
    assert all(torch.equal(found, likelier) for found in answers[4])
    assert not all(torch.equal(found, likelier) for found in answers[3])


def test_padding_and_its_side_do_not_matter() -> None:
    found = []
    for side in ("none", "left", "right"):
        model = trained("llama")
        ids, mask = IDS, torch.ones_like(IDS)
        if side != "none":
            pad = torch.zeros(4, 3, dtype=torch.int64)
            order = 1 if side == "right" else -1
            ids = torch.cat([ids, pad + 9][::order], 1)
            mask = torch.cat([mask, pad][::order], 1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        batch = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        report = fit(model, "llama", [{**batch, "labels": LABELS}])
        found.append((report, predict(model, batch, n_samples=100).log_probs))
    for report, log_probs in found[1:]:
        assert report.evidence_after == pytest.approx(found[0][0].evidence_after, rel=1e-4)
        torch.testing.assert_close(log_probs, found[0][1], rtol=1e-3, atol=1e-4)


def test_which_layers_have_a_posterior() -> None:
    names = lambda m: [layer.name for layer in laplace_posterior(m).laplace.layers]  # type: ignore[union-attr]  # noqa: E731
    bert, llama = trained(), trained("llama")
    everything = fit(bert)
    assert (everything.matrices, everything.layers) == (10, "all")
    assert names(bert)[-2:] == ["classifier.weight", "classifier.bias"]
    assert fit(bert, layers="adapters").matrices == 8
    # The head acts on the logits; without one that was trained, the last adapted block.
    last = fit(bert, method="laplace-last")
    assert names(bert) == ["classifier.weight", "classifier.bias"] and last.parameters == 99
    fit(llama, "llama", method="laplace-last")
    assert {name.split(".self_attn")[0] for name in names(llama)} == {"model.layers.1"}
    # An adapter on the output layer is what the paper's last-layer variant means.
    head = trained("llama", target_modules=["q_proj", "lm_head"])
    fit(head, "llama", method="laplace-last")
    assert names(head) == ["lm_head.lora_A", "lm_head.lora_B"]
    with pytest.raises(ValueError, match="layers must not be given for method 'laplace-last'"):
        fit(bert, method="laplace-last", layers="all")


def test_multiple_choice_sees_several_sequences_an_example() -> None:
    from transformers import BertForMultipleChoice

    base = BASES["bert"]()
    torch.manual_seed(0)
    model: Any = BertForMultipleChoice(base.config)
    config = LoraConfig(r=2, target_modules=["query"], modules_to_save=["classifier"])
    model = get_peft_model(model, config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(generator=torch.Generator().manual_seed(3))
    ids = IDS.repeat(1, 3).view(4, 3, 6).flip(-1)
    ids[:, 1] += 1
    mask = torch.ones_like(ids)
    mask[:, 2, 4:] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "labels": LABELS}
    report = fit(model, data=[batch])
    parts = fit(model, data=[{k: v[:2] for k, v in batch.items()}] * 2, rank=None)
    assert report.examples == parts.examples == 4
    both = predict(model, batch, n_samples=200)
    half = predict(model, {k: v[:2] for k, v in batch.items()}, n_samples=200)
    torch.testing.assert_close(both.log_probs[:2], half.log_probs, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="tokens must be 'expand', 'sum' or 'reduce'"):
        fit(model, data=[batch], tokens="last")
    assert fit(model, data=[batch], tokens="sum_padded").tokens == "sum_padded"


@pytest.mark.parametrize(
    ("options", "tokens"),
    [
        ({}, "sum"),
        ({"prior": "gradient"}, "sum"),
        ({"structure": "layer", "validation": BATCHES}, "sum"),
        ({"prior": "fixed"}, "expand"),
        ({"validation": BATCHES, "n_samples": 20}, "expand"),
        ({"tokens": "expand"}, "expand"),
    ],
)
def test_tokens_are_summed_where_the_evidence_chooses(options: dict[str, Any], tokens: str) -> None:
    found = fit(trained(), layers="adapters", **options)
    assert found.tokens == tokens
    again = fit(trained(), layers="adapters", **{**options, "tokens": tokens})
    assert again.prior_precision == found.prior_precision


@pytest.mark.parametrize("prediction", laplace.METHODS)
def test_every_way_to_probabilities(prediction: str) -> None:
    model = trained()
    if prediction == "quadrature":
        fit(model, prediction=prediction)
        with pytest.raises(ValueError, match="quadrature"):
            predict(model, BATCH, n_samples=10)
        return
    fit(model, prediction=prediction)
    found = predict(model, BATCH, n_samples=40)
    torch.testing.assert_close(found.probs.sum(1), torch.ones(4).double())
    assert bool(found.expected_entropy.isnan().all()) == (prediction == "probit")
    if prediction in ("probit", "bridge", "weights"):
        with pytest.raises(ValueError, match="return_samples must be False"):
            predict(model, BATCH, n_samples=4, return_samples=True)


def test_priors() -> None:
    deltas = {}
    for prior in ("mackay", "gradient", "fixed"):
        options = {"prior": prior, "prior_precision": 2.0}
        deltas[prior] = fit(trained(), **options).prior_precision
    assert deltas["fixed"] == 2.0 != deltas["mackay"]
    assert deltas["gradient"] == pytest.approx(deltas["mackay"], rel=0.05)
    layered = fit(trained(), structure="layer", layers="adapters")
    assert len(layered.prior_precision) == 8
    assert layered.evidence_after > fit(trained(), layers="adapters").evidence_after
    with pytest.raises(ValueError, match="use structure='scalar'"):  # a bias that was not trained
        fit(trained(), structure="layer")
    assert ".." in str(layered)
    model = trained()
    report = fit(model, validation=BATCHES, n_samples=100, prediction="probit")
    assert report.prior == "validation" and fit(trained()).prior == "mackay"
    found = laplace_posterior(model)
    assert found is not None
    scores = []
    for delta in (report.prior_precision, 0.1, 1.0, 1e3):  # of the grid
        found.laplace.prior_precision = delta
        log_probs = predict(model, BATCH, n_samples=1).log_probs
        scores.append(float(log_probs.gather(1, LABELS[:, None]).sum()))
    assert scores[0] == max(scores)


def test_data_in_all_its_forms() -> None:
    class Stream(IterableDataset):
        def __init__(self, items: list[Any]) -> None:
            self.items = items

        def __iter__(self) -> Any:
            return iter(self.items)

    examples = [{"input_ids": i, "labels": int(y)} for i, y in zip(IDS, LABELS, strict=True)]
    expected = fit(trained()).evidence_after
    for data in (iter(BATCHES), Stream(BATCHES), Stream(examples), examples):
        report = fit(trained(), data=data, batch_size=3)
        assert report.examples == 4
        assert report.evidence_after == pytest.approx(expected, rel=1e-4)
    unlabelled = [{"input_ids": IDS}]
    report = fit(trained(), data=unlabelled)
    assert report.evidence_after is None and report.prior_precision > 0
    assert "log evidence" not in str(report)


def test_a_cache_keeps_the_batch_whole() -> None:
    model = trained("llama").eval()
    past, rest = IDS[:, :3], IDS[:, 3:]

    def batches(cached: bool) -> list[dict[str, Any]]:
        if not cached:
            return [BATCH]
        with torch.no_grad():
            cache = model(input_ids=past, use_cache=True).past_key_values
        return [{"input_ids": rest, "past_key_values": cache, "labels": LABELS}]

    plain = fit(model, "llama", batches(False), prior="fixed")
    found = fit(model, "llama", batches(True), prior="fixed")
    assert found.examples == len(IDS)
    assert found.log_likelihood == pytest.approx(plain.log_likelihood, rel=1e-5)


def test_the_report_renders_itself(capsys: pytest.CaptureFixture[str]) -> None:
    report = fit(trained(), progress=True)
    assert "MiB through the pass" in capsys.readouterr().err
    assert "\n" not in str(report) and "prior precision" in str(report)
    content = json.loads(json.dumps(report.to_dict()))
    assert content["evidence_after"] == report.evidence_after and "seconds" not in content
    title, headings, rows = report.table()
    assert "10 matrices" in title and all(len(row) == len(headings) for row in rows)


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_the_mean_of_a_bayesian_adapter(kind: str, tmp_path: Path) -> None:
    model = trained(kind, BlobConfig)
    mean = logits(model)
    fit(model, kind)
    assert type(model.peft_config["default"]) is LoraConfig
    torch.testing.assert_close(logits(model), mean, rtol=1e-5, atol=1e-5)
    assert not any("rho" in name for name in model.state_dict())
    assert not hasattr(model.get_base_model(), "bayes_noise")
    # PEFT casts the input of plain adapters again, whose factors may have another dtype.
    layers = [m for m in model.modules() if hasattr(m, "cast_input_dtype_enabled")]
    assert layers and all(layer.cast_input_dtype_enabled for layer in layers)
    with (
        pytest.raises(ValueError, match=r"beside a plain adapter, .* has no noise"),
        posterior(model),
    ):
        pass
    model.train()
    torch.testing.assert_close(logits(model), mean, rtol=1e-5, atol=1e-5)  # no noise is left
    model.save_pretrained(tmp_path)
    save_laplace(model, tmp_path)
    loaded = PeftModel.from_pretrained(BASES[kind](), tmp_path)
    load_laplace(loaded, tmp_path)
    expected = predict(model, BATCH, n_samples=20).log_probs
    found = predict(loaded, BATCH, n_samples=20).log_probs
    assert_same_but_rounding(found, expected, units=4096)


def test_an_error_leaves_a_bayesian_adapter_as_it_was() -> None:
    model = trained(config=BlobConfig)
    before, config = state(model), model.peft_config["default"]
    with pytest.raises(ValueError, match=r"labels must be in \[0, 3\)"):
        fit(model, data=[{"input_ids": IDS, "labels": LABELS + 7}])
    assert same(before, state(model)) and model.peft_config["default"] is config
    assert laplace_posterior(model) is None
    assert predict(model, BATCH, n_samples=4).mutual_information.max() > 0


# --- bad input -----------------------------------------------------------------------------------


def test_bad_input() -> None:
    model = trained()
    for options, message in (
        ({"layers": "top"}, "layers must be one of"),
        ({"fisher": "exact"}, "fisher must be one of"),
        ({"prior": "flat"}, "prior must be one of"),
        ({"prediction": "map"}, "prediction must be one of"),
        ({"rank": 0}, "rank must be an integer >= 1"),
        ({"prior_precision": -1.0}, "prior_precision must be a positive number"),
        ({"prior": "validation"}, "validation must be held-out examples"),
        ({"prior": "validation", "structure": "layer"}, "structure must be 'scalar'"),
    ):
        with pytest.raises(ValueError, match=message):
            fit(model, **options)
    with pytest.raises(ValueError, match="data must be the training examples"):
        bayesianize(model, "laplace")
    with pytest.raises(ValueError, match="at least one example"):
        fit(model, data=[])
    with pytest.raises(ValueError, match="must be a PeftModel"):
        fit(BASES["bert"]())
    untrained = get_peft_model(BASES["bert"](), LoraConfig(target_modules=["query"]))
    with pytest.raises(ValueError, match="train the adapter first"):
        fit(untrained)
    dora = LoraConfig(target_modules=["query"], use_dora=True, task_type="SEQ_CLS")
    with pytest.raises(ValueError, match="cannot have a posterior"):
        fit(get_peft_model(BASES["bert"](), dora))
    with pytest.raises(ValueError, match=r"labels must be token ids \(B, T\), .* give choices"):
        bayesianize(trained("llama"), "laplace", BATCHES, progress=False)
    llama = trained("llama")
    fit(llama, "llama")
    with pytest.raises(ValueError, match=r"choices must be those of the Laplace posterior"):
        predict(llama, BATCH, choices=[1, 2])
    soft = [{"input_ids": IDS, "labels": LABELS.float()}]
    with pytest.raises(ValueError, match="labels must be class indices of shape"):
        fit(model, data=soft)
    assert laplace_posterior(model) is None


# --- memory --------------------------------------------------------------------------------------


class Saved:
    """Most bytes of distinct tensors that autograd keeps for backward passes at one time."""

    def __init__(self) -> None:
        self.storages: dict[int, int] = {}
        self.kept, self.peak = 0, 0

    def __enter__(self) -> Saved:
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda x: x.tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *_: Any) -> None:
        self.hooks.__exit__()

    def pack(self, tensor: Tensor) -> Any:
        owner = self

        class Packed:
            def __init__(self) -> None:
                self.tensor = tensor
                self.where = tensor.untyped_storage().data_ptr()
                count = owner.storages.get(self.where, 0)
                owner.storages[self.where] = count + 1
                if not count:
                    owner.kept += tensor.untyped_storage().nbytes()
                    owner.peak = max(owner.peak, owner.kept)

            def __del__(self) -> None:
                owner.storages[self.where] -= 1
                if not owner.storages[self.where]:
                    owner.kept -= self.tensor.untyped_storage().nbytes()

        return Packed()


def test_the_pass_keeps_no_more_than_a_training_step() -> None:
    model = trained()
    for p in model.parameters():
        p.requires_grad_(False)
    for name, p in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            p.requires_grad_(True)
    model.train()
    with Saved() as training:
        model(**BATCH).loss.backward()
    with Saved() as fitting:
        fit(model, data=[BATCH])
    assert 0 < fitting.peak <= training.peak


def model_with_padding(kind: str) -> tuple[Any, list[dict[str, Tensor]], dict[str, Any]]:
    """A trained adapter on three layers, batches of examples of different lengths, fit's options."""
    common: dict[str, Any] = {
        "hidden_size": 96,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "vocab_size": 200,
    }
    if kind == "bert":
        model = adapted(bert(**common, num_labels=6), LoraConfig, lora_alpha=8)
    else:
        targets = ["q_proj", "v_proj", "lm_head"]
        base = llama(**common, use_cache=False)
        model = adapted(base, LoraConfig, lora_alpha=8, target_modules=targets)
    fill(model, scale=0.1)
    batches = []
    for _ in range(2):
        lengths = torch.randint(10, 21, (6, 1)).clamp(max=20)
        lengths[0] = 20
        places = torch.arange(20) if kind == "bert" else torch.arange(19, -1, -1)
        batches.append(
            {
                "input_ids": torch.randint(1, 200, (6, 20)),
                "attention_mask": (places < lengths).long(),
                "labels": torch.randint(0, 6, (6,)),
            }
        )
    chosen = {} if kind == "bert" else {"choices": [5, 6, 7, 8, 9, 10]}
    return model, batches, chosen


@pytest.mark.parametrize(("kind", "examples"), [("bert", 6), ("llama", 6), ("llama", 1)])
def test_peak_memory_is_that_of_a_training_step_and_the_factors(
    kind: str, examples: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every allocation counted: forward, backward, optimiser; curvature, prior, posterior."""
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[3] / "cuda_benchmarks"))
    peak_bytes = importlib.import_module("harness").peak_bytes
    # The profiler's own table of events, which takes longer than all that is profiled.
    monkeypatch.setattr(
        torch.autograd.profiler.profile, "_parse_kineto_results", lambda *_, **__: []
    )
    model, whole, options = model_with_padding(kind)
    batches = [{name: t[:examples] for name, t in batch.items()} for batch in whole]
    logits_of = functools.partial(forward_logits, choices=options.get("choices"))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-6)

    def step() -> None:
        batch = batches[0]
        nn.functional.cross_entropy(logits_of(model, batch), batch["labels"]).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    model.train()
    training = peak_bytes(step, "cpu")  # the second step: with the optimiser's state in place
    moments = sum(t.nbytes for s in optimizer.state.values() for t in s.values())
    # Half of the sides are long: these have factors of rank 10.
    options.update(dense_below=64, n_samples=20)
    if examples > 1:
        monkeypatch.setattr(
            "bayes_kernels.hf.methods.laplace._GRID", torch.tensor([1.0, 30.0]).double()
        )
        options.update(validation=batches[1:])
    fitting = peak_bytes(lambda: fit(model, kind, batches[:1], **options), "cpu")
    found = laplace_posterior(model)
    assert training is not None and fitting is not None and found is not None
    estimate = found.laplace.estimate_memory()
    assert estimate.buffers > 0
    assert found.report["prior"] == ("validation" if examples > 1 else "mackay")
    if examples > 1:
        assert fitting <= training + estimate.factors
    else:  # one example cannot be split: rows that wait, and what the head keeps for another pass
        assert fitting <= 1.01 * (training + moments) + estimate.total


def test_memory_for_the_7b_shape() -> None:
    """Llama-2-7B with rank 8 on query, value and head: 65 modules, factors of rank 10."""
    shapes = [(8, 4096), (4096, 8)] * 64 + [(8, 4096), (5, 8)]
    found = laplace.estimate_memory(shapes, rank=10)
    assert found.total < 100e6 and found.workspace < 20e6 and found.posterior < 30e6


# --- command line --------------------------------------------------------------------------------


def test_commands(tiny_data: Path, tiny_model: Path, tmp_path: Path) -> None:
    data, model = tiny_data, tiny_model
    common = ["--model", model, "--steps", 4, "--rank", 2, "--test-size", 12]
    out = tmp_path / "laplace"
    options = ["--method", "laplace", "--set", "anchors=20", "--set", "structure=layer"]
    result = call("train", data, *common, *options, "--out", out)
    assert result.exit_code == 0, result.output
    assert "Laplace-LoRA N=1000" in result.stdout and (out / "laplace.safetensors").is_file()
    found = results(out)
    assert found["training"][0]["conversion"]["examples"] == 20
    result = call("evaluate", out)
    assert result.exit_code == 0, result.output
    again = results(out / "evaluation")
    for old, new in zip(found["methods"], again["methods"], strict=True):
        assert old["per_seed"][0]["metrics"] == pytest.approx(
            new["per_seed"][0]["metrics"], rel=1e-3
        )
    result = call("predict", out, "--text", "bright warm day", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["mutual_information"] > 0
    # A plain adapter, converted by itself; another method over it.
    last = tmp_path / "last"
    result = call("bayesianize", out, "--method", "laplace-last", "--out", last)
    assert result.exit_code == 0, result.output
    assert "Laplace: " in result.stdout and "log evidence" in result.stdout
    assert "MiB through the pass" in result.stderr
    assert results(last)["conversion"]["layers"] == "last"
    error = refuse("train", data, *common, "--method", "laplace", "--set", "prior=flat")
    assert "prior must be one of" in error
    error = refuse("bayesianize", out, "--method", "laplace", "--set", "metric=nll")
    assert "expected those of laplace (anchors" in error
    assert "laplace" in refuse("bayesianize", out, "--method", "blob")


# --- what cannot be ------------------------------------------------------------------------------


@KINDS
@pytest.mark.parametrize("layers", ["all", "adapters"])
def test_factors_that_are_computed_and_numbers_that_are_none_are_named(
    kind: str, layers: str
) -> None:
    model = trained(kind)
    factor = next(m for n, m in model.named_modules() if n.endswith("lora_A.default"))
    nn.utils.parametrizations.weight_norm(factor)
    with pytest.raises(ValueError, match=r"lora_A must be a parameter of the model"):
        fit(model, kind, layers=layers)
    nn.utils.parametrize.remove_parametrizations(factor, "weight")
    model.get_input_embeddings().weight.data[IDS[0, 0], 0] = float("nan")
    with pytest.raises(ValueError, match=r"logits must be finite.*first in inputs of"):
        fit(model, kind, layers=layers)
    assert laplace_posterior(model) is None


@KINDS
def test_empty_batches_change_nothing(kind: str) -> None:
    empty = {name: value[:0] for name, value in BATCH.items()}
    found = []
    for data in (BATCHES, [empty, *BATCHES, empty]):
        model = trained(kind)
        fit(model, kind, data=data, prior="validation", validation=data)
        la = laplace_posterior(model).laplace
        found.append((la.n_examples, la.log_likelihood, la.prior_precision, *la.logits(BATCH)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
