"""Heads of answers: a causal model cut down to the tokens that answer."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from tiny_models import arguments

from bayes_kernels.hf import heads
from bayes_kernels.hf.heads import MASKED_LOGIT
from hf.story_task import load_story_model


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
    batches = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    data = encoder.dataset(encoder.task.train)
    trainer = transformers.Trainer(
        model=model,
        args=arguments(tmp_path / "run", max_steps=2, **batches),
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


def told_of(model: Any, batch: dict[str, Any]) -> tuple[str, list[float]]:
    """What a process finds in a model that was sent to it; lists, as it may end before they are read."""
    with torch.no_grad():
        return type(model).__name__, model(**batch).logits.flatten().tolist()


def test_models_go_through_pickle(models_dir: Path) -> None:
    """Within a program a copy has the same class; a new process, which knows no such class, makes it."""
    model, encoder = load_story_model(models_dir)
    model.eval()
    batch = encoder.collate([encoder(example) for example in encoder.task.train[:2]])
    name, logits = told_of(model, batch)
    assert name == "LlamaForCausalLMWithAnswerHead"
    copies = [pickle.loads(pickle.dumps(model, protocol)) for protocol in (0, 2, 5)]
    for one in (*copies, copy.deepcopy(model)):
        assert type(one) is type(model) and one.answer_ids == model.answer_ids
        assert told_of(one, batch) == (name, pytest.approx(logits, rel=1e-5))
        assert one.get_output_embeddings().weight is not model.get_output_embeddings().weight
    adapted = peft.get_peft_model(copies[0], peft.LoraConfig(target_modules=["q_proj"]))
    again = pickle.loads(pickle.dumps(adapted.eval()))
    assert type(again.get_base_model()) is type(model)
    assert told_of(again, batch)[1] == pytest.approx(logits, rel=1e-5)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(told_of, (model, batch)) == (name, pytest.approx(logits, rel=1e-5))


def test_a_class_on_top_is_left_to_its_author(models_dir: Path) -> None:
    model, _ = load_story_model(models_dir)

    class Own(type(model)):  # type: ignore[misc]
        pass

    model.__class__ = Own
    assert type(copy.deepcopy(model)) is Own
