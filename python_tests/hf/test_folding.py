"""What a pass of a prediction holds: tokens in flight, the memory budget, parts of a batch."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_models
import torch
from tiny_models import adapted, fill

from bayes_kernels.hf import BlobConfig, ScalablConfig, TfbConfig, folding, predict
from bayes_kernels.hf.folding import TOKENS_IN_FLIGHT, plan
from hf.methods.plain_adapters import plain_lora
from hf.test_predict import CHOICES, IDS, bert, llama

BATCH = {"input_ids": IDS}  # 5 texts of 7 tokens


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)


def rows_of_passes(model: Any, head: str, batch: dict[str, Any], **options: Any) -> list[int]:
    rows: list[int] = []
    module = getattr(model.get_base_model(), head)
    handle = module.register_forward_hook(lambda _m, _i, out: rows.append(out.shape[0]))
    predict(model, batch, **options)
    handle.remove()
    return rows


def test_the_budget_of_a_gpu_is_half_of_what_this_process_may_still_take(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    limits = iter((1.0, 0.3, 0.05))
    numbers: dict[str, Any] = {
        "mem_get_info": lambda device: (60, 100),
        "memory_reserved": lambda device: 10,
        "memory_allocated": lambda device: 4,
        "get_per_process_memory_fraction": lambda device: next(limits),
    }
    for name, value in numbers.items():
        monkeypatch.setattr(torch.cuda, name, value)
    gpu = torch.device("cuda", 0)
    # Free, of which a limit leaves 20 or nothing, and 6 in the cache.
    assert [folding._budget(gpu) for _ in range(3)] == [33, 13, 3]


def test_draws_fill_a_pass_up_to_the_tokens_in_flight(monkeypatch: pytest.MonkeyPatch) -> None:
    model = bert()
    assert rows_of_passes(model, "classifier", BATCH, n_samples=4) == [20]
    monkeypatch.setitem(TOKENS_IN_FLIGHT, "cpu", 4 * 35)
    assert rows_of_passes(model, "classifier", BATCH, n_samples=4) == [20]
    assert rows_of_passes(model, "classifier", BATCH, n_samples=10) == [20, 20, 10]
    assert rows_of_passes(model, "classifier", BATCH, n_samples=6) == [20, 10]  # whole pairs
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert rows_of_passes(model, "classifier", BATCH, n_samples=10) == [50]
    monkeypatch.setitem(TOKENS_IN_FLIGHT, "cpu", 1)  # a text alone is more: the batch stays whole
    assert rows_of_passes(model, "classifier", BATCH, n_samples=3) == [5] * 3
    given = rows_of_passes(model, "classifier", BATCH, n_samples=3, samples_per_pass=3)
    assert given == [15]


def test_a_long_batch_has_one_draw_in_a_pass() -> None:
    """At 512 tokens folding saves little time, and takes ten times the memory for ten draws."""
    model = bert()
    assert plan(model, {"input_ids": torch.ones(4, 256, dtype=torch.long)}, 10) == (4, 1)
    assert plan(model, {"input_ids": torch.ones(4, 64, dtype=torch.long)}, 10) == (4, 2)
    assert plan(model, {"input_ids": torch.ones(1, 32, dtype=torch.long)}, 10) == (1, 10)
    embedded = {"inputs_embeds": torch.ones(4, 64, 4096), "attention_mask": torch.ones(4, 64)}
    assert plan(model, embedded, 10) == (4, 2)
    choices = {"input_ids": torch.ones(2, 4, 32, dtype=torch.long)}
    assert plan(model, choices, 10) == (2, 2)


@pytest.mark.parametrize("n_samples", range(1, 30))
@pytest.mark.parametrize("most", [1, 2, 3, 5, 8, 100])
def test_passes_have_nearly_one_size(n_samples: int, most: int) -> None:
    draws = folding._even_parts(n_samples, most)
    passes = -(-n_samples // draws)
    assert 1 <= draws <= min(n_samples, most)
    assert draws % 2 == 0 or draws == 1 or passes == 1
    assert passes <= -(-n_samples // max(1, most - most % 2))


def test_the_budget_is_an_upper_bound() -> None:
    model = bert()
    assert plan(model, BATCH, 4) == (5, 4)
    one = next(b for b in range(1, 10**7, 1000) if plan(model, BATCH, 4, memory_budget=b)[0] == 5)
    assert plan(model, BATCH, 4, memory_budget=one) == (5, 1)
    assert plan(model, BATCH, 4, memory_budget=2 * one + 1000) == (5, 2)
    assert plan(model, BATCH, 4, memory_budget=one // 2) == (2, 1)
    assert plan(model, BATCH, 4, memory_budget=1) == (1, 1)
    # Draws that the caller chooses stay; a budget that is given splits the batch.
    assert plan(model, BATCH, 4, samples_per_pass=3) == (5, 3)
    assert plan(model, BATCH, 4, samples_per_pass=2, memory_budget=one + 1000) == (2, 2)


@pytest.mark.parametrize(("attention", "rows"), [("sdpa", 1), ("eager", 2 * 16)])
def test_memory_goes_by_the_attention_of_the_model(attention: str, rows: int) -> None:
    """Scores of all heads take memory where the attention forms them; else there is a mask."""
    model = adapted(tiny_models.bert(hidden_size=64, num_attention_heads=16, vocab_size=128))
    model.config._attn_implementation = attention  # for the estimate alone
    lengths = (128, 1024)
    each = [
        folding._bytes_of_example(model, {"input_ids": torch.ones(3, n, dtype=torch.long)}) / n
        for n in lengths
    ]
    assert each[1] - each[0] == 4 * rows * (lengths[1] - lengths[0])


@pytest.mark.parametrize("name", ["blob", "tfb", "scalabl", "causal", "several lengths"])
@pytest.mark.parametrize("n_samples", [0, 4])
def test_parts_of_a_batch_have_the_same_draws(name: str, n_samples: int) -> None:
    batch: dict[str, Any] = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    batch["labels"] = torch.tensor([0, 2, 1, 0, 2])
    options: dict[str, Any] = {"n_samples": n_samples, "seed": 3, "return_samples": True}
    if name in ("causal", "several lengths"):
        model, head = llama(), "lm_head"
        options["choices"] = CHOICES
        if name == "several lengths":
            batch["attention_mask"][1:3, 4:] = 0
    else:
        config = {"blob": BlobConfig, "tfb": TfbConfig, "scalabl": ScalablConfig}[name]
        base = tiny_models.bert(num_labels=4, initializer_range=0.3, vocab_size=128)
        model, head = fill(adapted(base, config), 0.6, 0.5), "classifier"
    whole = predict(model, batch, **options)
    parts = predict(model, batch, **options, memory_budget=1)
    assert rows_of_passes(model, head, batch, **options, memory_budget=1) == [1] * 5 * max(
        n_samples, 1
    )
    for field in ("log_probs", "expected_entropy", "sample_log_probs"):
        torch.testing.assert_close(
            getattr(parts, field), getattr(whole, field), rtol=1e-4, atol=1e-5
        )
    assert torch.equal(parts.labels, whole.labels) and parts.n_samples == n_samples


def test_what_cannot_be_cut_stays_whole() -> None:
    model = bert()
    tagged = {**BATCH, "tags": ["a", "b", "c", "d", "e"]}
    assert rows_of_passes(model, "classifier", tagged, n_samples=2, memory_budget=1) == [5, 5]
    dropout = plain_lora(tiny_models.bert(num_labels=4, vocab_size=128), dropout=0.5)
    whole = predict(dropout, BATCH, n_samples=2, samples_per_pass=1)
    assert torch.equal(
        whole.log_probs, predict(dropout, BATCH, n_samples=2, memory_budget=1).log_probs
    )
