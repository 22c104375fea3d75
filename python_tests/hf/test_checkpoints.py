"""Plain LoRA folders in and out; checkpoints in the layout of the published BLoB code."""

from __future__ import annotations

import dataclasses
import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accuracy import assert_same_but_rounding
from cli.commands import call, refuse, results
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import (
    BASES,
    IDS,
    LABELS,
    adapted,
    answering_llama,
    bert,
    fill,
    llama,
    logits,
    trained,
)

from bayes_kernels.hf import (
    BayesLoraConfig,
    BlobConfig,
    PolarConfig,
    PolarVbllConfig,
    ScalablConfig,
    bayesianize,
    drawn_weights,
    export_draws,
    export_lora,
    import_lora,
    posterior,
    predict,
)
from bayes_kernels.hf.checkpoints import read_lora, stored_method
from bayes_kernels.hf.layers import bayes_layers

# Commands choose the GPU where there is one; what they find is compared with the CPU.
pytestmark = pytest.mark.cpu_only

TARGETS = ["q_proj", "v_proj"]


def blob(**options: Any) -> PeftModel:
    """An adapter whose deviations differ from each other."""
    model = fill(adapted(llama(), **options), rho=None)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for item in bayes_layers(model):
            item.rho.copy_(torch.rand(item.rho.shape, generator=generator) * 0.5)
    return model


def test_export_mean(tmp_path: Path) -> None:
    model = blob()
    folder = export_lora(model, tmp_path / "mean")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and "prior_std" not in config
    assert not any("rho" in key for key in load_file(folder / "adapter_model.safetensors"))
    plain = PeftModel.from_pretrained(llama(), folder)
    assert type(plain.peft_config["default"]) is LoraConfig
    torch.testing.assert_close(logits(plain), logits(model), rtol=1e-4, atol=1e-5)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mean"]


@pytest.mark.parametrize("std", ["square", "softplus", "direct"])
@pytest.mark.parametrize("sample", [0, 5])
def test_exported_draw_is_the_draw_of_the_posterior(tmp_path: Path, sample: int, std: str) -> None:
    model = blob(std=std)
    plain = PeftModel.from_pretrained(llama(), export_lora(model, tmp_path / "s", sample, seed=3))
    with posterior(model, "sample", seed=3, first_sample=sample):
        draw = logits(model)
    torch.testing.assert_close(logits(plain), draw, rtol=1e-4, atol=1e-5)
    assert (draw - logits(model)).abs().max() > 1e-2


def test_exported_draws_average_to_the_prediction(tmp_path: Path) -> None:
    model = blob()
    result = predict(model, {"input_ids": IDS}, n_samples=3, seed=8, choices=[1, 2, 3])
    probs = []
    for s in range(3):
        plain = PeftModel.from_pretrained(llama(), export_lora(model, tmp_path / "s", s, seed=8))
        probs.append(logits(plain)[:, -1, [1, 2, 3]].double().softmax(-1))
    torch.testing.assert_close(torch.stack(probs).mean(0), result.probs, rtol=1e-4, atol=1e-6)


def test_export_replaces_whole_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = blob()
    folder = export_lora(model, tmp_path / "out")
    (folder / "README.md").write_text("x")
    before = load_file(folder / "adapter_model.safetensors")

    def full(*_: Any, **__: Any) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("bayes_kernels.hf.checkpoints.save_file", full)
        with pytest.raises(OSError, match="no space"):
            export_lora(model, folder, 1)
    after = load_file(folder / "adapter_model.safetensors")
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    export_lora(model, folder, 1)
    changed = load_file(folder / "adapter_model.safetensors")
    assert not all(torch.equal(before[k], changed[k]) for k in before)
    assert not (folder / "README.md").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_export_keeps_what_is_not_an_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = blob()
    folder = tmp_path / "out"
    folder.mkdir()
    export_lora(model, folder)  # empty
    (folder / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match=r"must be empty or hold .* got \['thesis.tex'\]"):
        export_lora(model, folder, 1)
    assert (folder / "thesis.tex").read_text() == "x"
    (folder / "thesis.tex").unlink()
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="must be a folder"):
        export_lora(model, tmp_path / "file")
    (tmp_path / "file").unlink()
    before = load_file(folder / "adapter_model.safetensors")
    replace, calls = os.replace, []

    def second_fails(source: Any, target: Any) -> None:
        calls.append(target)
        if len(calls) == 2:
            raise OSError("device is gone")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr("bayes_kernels.hf.checkpoints.os.replace", second_fails)
        with pytest.raises(OSError, match="device is gone"):
            export_lora(model, folder, 1)
    after = load_file(folder / "adapter_model.safetensors")
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def with_draws(method: str) -> Any:
    """A causal model with an adapter of this method, whose weights have draws."""
    if method == "blob":
        return blob().eval()
    if method == "scalabl":
        return fill(adapted(llama(), ScalablConfig)).eval()
    model = trained("llama")
    batch = {"input_ids": IDS, "labels": LABELS}
    options = {"choices": [1, 2, 3], "progress": False}
    bayesianize(model, method, [batch], **options)
    return model


@pytest.mark.parametrize("method", ["blob", "scalabl", "tfb", "laplace", "laplace-last"])
def test_draws_are_plain_lora(tmp_path: Path, method: str) -> None:
    model = with_draws(method)
    before = logits(model)
    folders = export_draws(model, tmp_path / "draws", 3, seed=5)
    assert folders == [tmp_path / "draws" / f"draw-{s}" for s in range(3)]
    assert sorted(tmp_path.rglob("*.*")) == sorted(
        folder / name
        for folder in folders
        for name in ("adapter_config.json", "adapter_model.safetensors")
    )
    assert torch.equal(logits(model), before)
    for s, folder in enumerate(folders):
        keys = load_file(folder / "adapter_model.safetensors")
        assert all(k.endswith(("lora_A.weight", "lora_B.weight")) for k in keys)
        config = json.loads((folder / "adapter_config.json").read_text())
        assert config["peft_type"] == "LORA"
        assert config.keys() <= {one.name for one in dataclasses.fields(LoraConfig)}
        plain = PeftModel.from_pretrained(llama(), folder)
        assert type(plain.peft_config["default"]) is LoraConfig
        if method.startswith("laplace"):
            chosen: Any = drawn_weights(model, seed=5, index=s)
        else:
            chosen = posterior(model, "sample", seed=5, first_sample=s)
        with chosen:
            draw = logits(model)
        torch.testing.assert_close(logits(plain), draw, rtol=1e-4, atol=1e-5)
        assert (draw - before).abs().max() > 1e-4
        again = export_lora(model, tmp_path / "one", s, seed=5)
        one = load_file(again / "adapter_model.safetensors")
        assert all(torch.equal(one[k], keys[k]) for k in keys)
    if method != "laplace":
        return
    mean = PeftModel.from_pretrained(llama(), export_lora(model, tmp_path / "one"))
    torch.testing.assert_close(logits(mean), before, rtol=1e-5, atol=1e-6)


def test_draws_of_a_laplace_posterior_have_a_head(tmp_path: Path) -> None:
    model = trained("bert")
    bayesianize(model, "laplace", [{"input_ids": IDS, "labels": LABELS}], progress=False)
    (folder,) = export_draws(model, tmp_path / "draws", 1)
    plain = PeftModel.from_pretrained(BASES["bert"](), folder).eval()
    with drawn_weights(model):
        draw = logits(model)
    torch.testing.assert_close(logits(plain), draw, rtol=1e-4, atol=1e-5)


def test_draws_replace_draws_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, out = blob(), tmp_path / "draws"
    export_draws(model, out, 3)
    write, calls = save_file, []

    def third_fails(*args: Any, **options: Any) -> None:
        calls.append(args)
        if len(calls) == 3:
            raise OSError("no space left on device")
        write(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr("bayes_kernels.hf.checkpoints.save_file", third_fails)
        with pytest.raises(OSError, match="no space"):
            export_draws(model, out, 4, seed=9)
    assert [p.name for p in tmp_path.iterdir()] == ["draws"]
    assert sorted(p.name for p in out.iterdir()) == ["draw-0", "draw-1", "draw-2"]
    export_draws(model, out, 1)
    assert [p.name for p in out.iterdir()] == ["draw-0"]
    for place in (out / "thesis.tex", out / "draw-0" / "thesis.tex"):
        place.write_text("x")
        with pytest.raises(ValueError, match=r"export_draws: directory must .* \['thesis.tex'\]"):
            export_draws(model, out, 1)
        place.unlink()


def test_what_has_no_draws_of_weights_is_refused(tmp_path: Path) -> None:
    head = fill(adapted(answering_llama(), PolarVbllConfig))
    cases = [
        (head, "draws of class logits, by .* export_lora"),
        (fill(adapted(llama(), PolarConfig)), "'polar', whose adapters have no posterior"),
        (trained("llama"), "got one without a posterior; make it Bayesian with bayesianize"),
        (llama(), "model must be a PeftModel"),
    ]
    for model, message in cases:
        with pytest.raises(ValueError, match=f"export_draws: .*{message}"):
            export_draws(model, tmp_path / "draws", 2)
    for n in (0, -1, True, 1.5):
        with pytest.raises(ValueError, match="n must be an integer of at least 1"):
            export_draws(blob(), tmp_path / "draws", n)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_export_one_of_several_adapters(tmp_path: Path) -> None:
    model = blob()
    model.add_adapter("other", BlobConfig(r=2, target_modules=["k_proj"], task_type="CAUSAL_LM"))
    export_lora(model, tmp_path / "other", adapter="other")
    keys = load_file(tmp_path / "other" / "adapter_model.safetensors")
    assert len(keys) == 4 and all("k_proj" in k for k in keys)
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="adapter must name one"):
        export_lora(model, tmp_path / "x")
    for which in ("median", -1, True):
        with pytest.raises(ValueError, match="which must be"):
            export_lora(model, tmp_path / "x", which, adapter="other")  # type: ignore[arg-type]


def test_import_plain_lora(tmp_path: Path) -> None:
    options = {"r": 4, "lora_alpha": 12, "target_modules": TARGETS, "task_type": "CAUSAL_LM"}
    plain = fill(get_peft_model(llama(), LoraConfig(**options)))
    plain.save_pretrained(tmp_path)
    model = import_lora(llama(), tmp_path, prior_std=0.1)
    config = model.peft_config["default"]
    assert isinstance(config, BayesLoraConfig) and (config.prior_std, config.lora_alpha) == (
        0.1,
        12,
    )
    torch.testing.assert_close(logits(model.eval()), logits(plain), rtol=1e-4, atol=1e-5)
    for item in bayes_layers(model):
        assert item.rho.requires_grad and 0.035 < float(item.rho.detach().mean()) < 0.05
    more = import_lora(model, tmp_path / "adapter_model.safetensors", adapter_name="again")
    assert more is model and set(model.peft_config) == {"default", "again"}
    frozen = import_lora(llama(), tmp_path, is_trainable=False)
    assert not any(p.requires_grad for p in frozen.parameters())


def test_round_trip_through_plain_lora(tmp_path: Path) -> None:
    model = blob()
    again = import_lora(llama(), export_lora(model, tmp_path / "mean")).eval()
    assert_same_but_rounding(logits(again), logits(model))


def test_import_classifier_head(tmp_path: Path) -> None:
    make = partial(bert, num_hidden_layers=1)
    plain = fill(adapted(make(), LoraConfig, r=2))
    with torch.no_grad():
        for name, p in plain.named_parameters():
            if "classifier" in name and "modules_to_save" in name:
                p.add_(0.5)
    plain.eval().save_pretrained(tmp_path / "plain")
    model = import_lora(make(), tmp_path / "plain").eval()
    torch.testing.assert_close(logits(model), logits(plain), rtol=1e-5, atol=1e-6)
    back = PeftModel.from_pretrained(make(), export_lora(model, tmp_path / "back"))
    torch.testing.assert_close(logits(back), logits(plain), rtol=1e-5, atol=1e-6)


def test_import_doubled_prefix(tmp_path: Path) -> None:
    """The layout of bayesian-peft: a PeftModel inside a PeftModel, with lora_A_rho."""
    model = blob()
    model.save_pretrained(tmp_path / "ours")
    tensors = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    doubled = {f"base_model.model.{key}": value for key, value in tensors.items()}
    folder = tmp_path / "theirs"
    folder.mkdir()
    save_file(doubled, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "target_modules": TARGETS, "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps({**config, "revision": None}))
    loaded = import_lora(llama(), folder).eval()
    assert_same_but_rounding(logits(loaded), logits(model))
    for a, b in zip(bayes_layers(model), bayes_layers(loaded), strict=True):
        assert torch.equal(a.rho, b.rho)
    with posterior(model, "sample"), posterior(loaded, "sample"):
        assert_same_but_rounding(logits(loaded), logits(model))


def nested(folder: Path, config: LoraConfig) -> PeftModel:
    """A folder as bayesian-peft writes those of MLE, MAP and Laplace: a PeftModel in a PeftModel."""
    model = fill(PeftModel(get_peft_model(llama(), config), config, "default"))  # type: ignore[arg-type]
    model.eval().save_pretrained(folder)
    return model


def test_plain_folders_of_bayesian_peft(tmp_path: Path) -> None:
    options = {"r": 4, "lora_alpha": 12, "target_modules": TARGETS, "task_type": "CAUSAL_LM"}
    written = nested(tmp_path, LoraConfig(**options))
    keys = load_file(tmp_path / "adapter_model.safetensors")
    assert len(keys) == 8 and all(k.startswith("base_model.model.base_model.model.") for k in keys)
    expected = logits(written)
    assert stored_method(tmp_path) == "mle"
    loaded = read_lora(llama(), tmp_path).eval()
    assert type(loaded.peft_config["default"]) is LoraConfig
    assert_same_but_rounding(logits(loaded), expected)
    assert not any(p.requires_grad for p in loaded.parameters())
    assert (logits(llama()) - expected).abs().max() > 1e-3  # what PEFT by itself would give
    # As a Bayesian adapter that goes on training, and as plain LoRA that a method converts.
    torch.testing.assert_close(
        logits(import_lora(llama(), tmp_path).eval()), expected, rtol=1e-4, atol=1e-5
    )
    batch = {"input_ids": IDS, "labels": LABELS}
    bayesianize(loaded, "laplace", [batch], choices=[1, 2, 3], progress=False)
    found = predict(loaded, batch, n_samples=0).log_probs
    torch.testing.assert_close(found, expected[:, -1, [1, 2, 3]].double().log_softmax(-1))
    save_file(
        {k: v for k, v in keys.items() if "layers.1" not in k},
        tmp_path / "adapter_model.safetensors",
    )
    with pytest.raises(ValueError, match="the checkpoint must fit the model, got 0 unexpected"):
        read_lora(llama(), tmp_path)


def test_folders_of_bayesian_peft_with_deviations(tmp_path: Path) -> None:
    """Its TFB: B = U diag(d), A = V^T A, rho[i, :] = sqrt(sigma / (d_i + 1e-6)), named as BLoB's."""
    config = LoraConfig(r=4, target_modules=TARGETS, task_type="CAUSAL_LM")
    written = nested(tmp_path, config)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    for key in [k for k in tensors if k.endswith("lora_A.weight")]:
        other = key.replace("lora_A", "lora_B")
        u, d, vt = torch.linalg.svd(tensors[other], full_matrices=False)
        tensors[key], tensors[other] = (vt @ tensors[key]).contiguous(), (u * d).contiguous()
        rho = (0.02 / (d + 1e-6)).sqrt()[:, None].expand_as(tensors[key])
        tensors[key.replace("lora_A.weight", "lora_A_rho")] = rho.contiguous()
    save_file(tensors, file, metadata={"format": "pt"})
    assert stored_method(tmp_path) == "blob"
    loaded = read_lora(llama(), tmp_path).eval()
    torch.testing.assert_close(logits(loaded), logits(written), rtol=1e-4, atol=1e-5)
    for item in bayes_layers(loaded):
        b = item.layer.lora_B["default"].weight.detach()
        deviation = 0.02 / b.norm(dim=0)[:, None].expand_as(item.rho)
        torch.testing.assert_close(item.rho.detach().square(), deviation, rtol=1e-3, atol=0)
    found = predict(loaded, {"input_ids": IDS}, n_samples=4, choices=[1, 2, 3])
    assert found.mutual_information.max() > 0


def test_classifiers_of_bayesian_peft_come_without_their_head(tmp_path: Path) -> None:
    lora = LoraConfig(r=2, target_modules=["query"])  # no task, hence no modules_to_save
    PeftModel(get_peft_model(bert(), lora), lora, "default").save_pretrained(tmp_path)  # type: ignore[arg-type]
    with pytest.warns(
        UserWarning, match="has no classification head, which bayesian-peft does not"
    ):
        read_lora(bert(), tmp_path)


@pytest.mark.parametrize("tied", [False, True])
def test_tensors_need_a_place(tied: bool, tmp_path: Path) -> None:
    """A tied head has one; that of a classifier has none in a language model, and PEFT would drop it."""
    base = llama(tie_word_embeddings=tied)
    lora = LoraConfig(r=2, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
    written = get_peft_model(base, lora)
    fill(written)
    written.save_pretrained(tmp_path / "writer", save_embedding_layers=True)
    loaded = read_lora(llama(tie_word_embeddings=tied), tmp_path / "writer").eval()
    torch.testing.assert_close(logits(loaded), logits(written))
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="SEQ_CLS")
    judge = get_peft_model(llama(transformers.LlamaForSequenceClassification), lora)
    judge.save_pretrained(tmp_path / "judge")
    with pytest.raises(
        ValueError, match=r"got base_model\.model\.score\.weight \(1 have no place in it"
    ):
        read_lora(llama(tie_word_embeddings=tied), tmp_path / "judge")


def test_commands_take_a_folder_of_bayesian_peft(
    tiny_data: Path, tiny_model: Path, tmp_path: Path
) -> None:
    data, model = tiny_data, tiny_model
    common = ["--model", model, "--steps", 4, "--rank", 2, "--test-size", 12]
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    result = call("train", data, *common, "--method", "mle", "--out", ours)
    assert result.exit_code == 0, result.output
    theirs.mkdir()
    tensors = load_file(ours / "adapter_model.safetensors")
    doubled = {f"base_model.model.{key}": value for key, value in tensors.items()}
    save_file(doubled, theirs / "adapter_model.safetensors", metadata={"format": "pt"})
    (theirs / "adapter_config.json").write_text((ours / "adapter_config.json").read_text())
    scores = []
    for folder in (ours, theirs):
        result = call("evaluate", folder, "--data", data, "--model", model, "--test-size", 12)
        assert result.exit_code == 0, result.output
        scores.append(results(folder / "evaluation")["methods"][0]["per_seed"][0]["metrics"])
    assert scores[0] == pytest.approx(scores[1], rel=1e-4)
    options = ["--data", data, "--model", model, "--method", "laplace-last", "--test-size", 12]
    result = call("bayesianize", theirs, *options, "--out", tmp_path / "la")
    assert result.exit_code == 0, result.output
    assert "Laplace: " in result.stdout
    assert "which names the classes" in refuse("predict", theirs, "--text", "warm day")
    (theirs / "adapter_model.safetensors").rename(theirs / "adapter_model.bin")
    assert "pickled weights (.bin) are not read" in refuse(
        "evaluate", theirs, "--data", data, "--model", model
    )


def test_import_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json must exist"):
        import_lora(llama(), tmp_path)
    config = {"peft_type": "LORA", "r": 4, "target_modules": TARGETS, "task_type": "CAUSAL_LM"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(FileNotFoundError, match=r"adapter_model\.safetensors must exist"):
        import_lora(llama(), tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(ValueError, match="weights must be safetensors, got a pickled file"):
        import_lora(llama(), tmp_path)
    odd = {f"base_model.model.x.q_proj.lora_{f}.weight": torch.ones(1) for f in "AB"}
    save_file(odd, tmp_path / "adapter_model.safetensors")
    model = llama()
    with pytest.raises(ValueError, match=r"2 unexpected tensors .* 8 missing"):
        import_lora(model, tmp_path)
    assert not any("lora_" in name for name, _ in model.named_modules())
    with pytest.raises(ValueError, match=r"options must be among .* got \['r'\]"):
        import_lora(llama(), tmp_path, r=2)
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "IA3"}))
    with pytest.raises(ValueError, match="must describe a LoRA adapter, got peft_type 'IA3'"):
        import_lora(llama(), tmp_path)
    with pytest.raises(ValueError, match=r"must be a PeftModel|must have an active"):
        export_lora(llama(), tmp_path / "x")
