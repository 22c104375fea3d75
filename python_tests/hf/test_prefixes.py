"""A shared beginning in a KV cache for each draw: the numbers of whole texts, from fewer tokens."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_models
import torch
import transformers
from peft import LoraConfig
from tiny_models import adapted, fill

from bayes_kernels.hf import predict

GENERATOR = torch.Generator().manual_seed(1)
HEADER = torch.randint(3, 64, (9,), generator=GENERATOR).tolist()
# The longest beginning of all: the header and one token more.
TEXTS = [
    [*HEADER, 5, *torch.randint(6, 64, (n,), generator=GENERATOR).tolist()] for n in (1, 4, 2, 6)
]
CHOICES = [3, 4, 5]


def batch(side: str, texts: list[list[int]] = TEXTS) -> dict[str, torch.Tensor]:
    longest = max(map(len, texts))
    ids, mask = torch.full((len(texts), longest), 2), torch.zeros(len(texts), longest).long()
    for row, text in enumerate(texts):
        where = slice(longest - len(text), longest) if side == "left" else slice(len(text))
        ids[row, where], mask[row, where] = torch.tensor(text), 1
    return {"input_ids": ids, "attention_mask": mask}


def llama(kind: Any = transformers.LlamaForCausalLM) -> Any:
    base = tiny_models.llama(kind, initializer_range=0.2, pad_token_id=2, num_labels=3)
    return fill(adapted(base, task_type=None), 0.6, 0.5)


def gpt2() -> Any:
    base = tiny_models.gpt2(n_layer=2, initializer_range=0.2, pad_token_id=2)
    return fill(adapted(base, fan_in_fan_out=True), 0.4, 0.3)


@pytest.mark.parametrize("n_samples", [0, 4])
def test_numbers_are_those_of_whole_texts(n_samples: int) -> None:
    answering = fill(adapted(tiny_models.answering_llama(), task_type=None), 0.6, 0.5)
    cases = [
        (llama(), "right", {"choices": CHOICES}),
        (llama(transformers.LlamaForSequenceClassification), "right", {}),
        (gpt2(), "right", {}),
        (answering, "left", {}),
    ]
    for model, side, options in cases:
        rows = batch(side)
        options = {"n_samples": n_samples, "seed": 3, **options}
        whole = predict(model, rows, **options)
        for per_pass in (None, 1, 3):
            shared = predict(model, rows, share_prefix=True, samples_per_pass=per_pass, **options)
            torch.testing.assert_close(shared.log_probs, whole.log_probs, rtol=1e-4, atol=1e-5)
        if n_samples:
            assert whole.mutual_information.min() > 1e-4


def test_the_beginning_is_computed_once_for_each_draw() -> None:
    model = llama()
    shapes: list[tuple[int, ...]] = []
    layer = model.base_model.model.model.layers[0]
    layer.register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape[:2])))
    options: Any = {"choices": CHOICES, "n_samples": 4, "samples_per_pass": 2}
    predict(model, batch("right"), share_prefix=True, **options)
    assert shapes == [(2, 10), (8, 6)] * 2
    shapes.clear()
    # Nothing is shared: the texts as they are. The last token of a text is never in the beginning.
    predict(model, batch("left", [[4, 5, 6], [5, 6, 7]]), share_prefix=True, **options)
    assert shapes == [(4, 3)] * 2
    shapes.clear()
    predict(model, batch("left", [HEADER, HEADER]), share_prefix=True, **options)
    assert shapes == [(2, 8), (4, 1)] * 2
    shapes.clear()
    predict(model, batch("left", [HEADER]), share_prefix=True, **options)
    assert shapes == [(2, 9)] * 2


def test_settled_texts_leave_the_batch() -> None:
    model = fill(llama(), 0.3, 0.2)
    options: Any = {"choices": CHOICES, "n_samples": 40, "stop": 0.05}
    whole = predict(model, batch("right"), **options)
    shared = predict(model, batch("right"), share_prefix=True, **options)
    assert torch.equal(shared.draws_used, whole.draws_used) and len(whole.draws_used.unique()) > 1
    torch.testing.assert_close(shared.log_probs, whole.log_probs, rtol=1e-4, atol=1e-5)


def test_what_has_no_cache_of_all_tokens_is_refused() -> None:
    rows = batch("right")
    encoder = fill(adapted(tiny_models.bert()), 0.6, 0.5)
    with pytest.raises(ValueError, match="a decoder that has a KV cache"):
        predict(encoder, rows, share_prefix=True)
    window = transformers.MistralForCausalLM
    config = transformers.MistralConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=64, sliding_window=4,
    )  # fmt: skip
    sliding = adapted(window(config), target_modules=["q_proj"], task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="a decoder that has a KV cache of all tokens"):
        predict(sliding, rows, share_prefix=True, choices=CHOICES)
    with pytest.raises(ValueError, match=r"input_ids .* and attention_mask alone, got .*position"):
        predict(llama(), {**rows, "position_ids": rows["input_ids"]}, share_prefix=True)
    dropout = adapted(tiny_models.llama(), LoraConfig, lora_dropout=0.2)
    with pytest.raises(ValueError, match="draws go by the place in the batch"):
        predict(dropout, rows, share_prefix=True, choices=CHOICES)
    with pytest.raises(ValueError, match="draws go by the place in the batch"):
        predict(llama(), rows, share_prefix=True, choices=CHOICES, scope="token")
