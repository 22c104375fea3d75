"""Batches: rows, labels, masks, copies, parts, and eval mode."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from bayes_kernels.batches import (
    as_batches,
    eval_mode,
    fold_samples,
    inputs_of,
    is_empty,
    labels_of,
    mask_of,
    split,
    to_device,
)

IDS = torch.arange(35).reshape(5, 7)


def test_fold_samples() -> None:
    batch = {
        "input_ids": IDS,
        "attention_mask": torch.ones(5, 7),
        "positions": torch.ones(1, 7),
        "k": 3,
    }
    folded = fold_samples(batch, 3)
    assert folded["input_ids"].shape == (15, 7) and folded["k"] == 3
    assert torch.equal(folded["input_ids"].unflatten(0, (3, 5)), IDS.expand(3, 5, 7))
    assert folded["attention_mask"].shape == (15, 7) and folded["positions"].shape == (1, 7)
    # As many tokens, or layers, as examples.
    shared = {"cache_position": torch.arange(5), "head_mask": torch.ones(5, 2)}
    folded = fold_samples({"input_ids": IDS[:, :5], **shared}, 3)
    assert folded["input_ids"].shape == (15, 5)
    assert all(folded[name] is value for name, value in shared.items())


def test_parts_of_a_batch() -> None:
    ids = torch.arange(16).reshape(4, 4)  # as many tokens, and layers, as examples
    rows = {
        "input_ids": ids,
        "attention_mask": torch.ones(4, 1, 4, 4),
        "position_ids": ids.clone(),
        "labels": torch.arange(4),
        "task_ids": torch.arange(4),
        "adapter_scores": torch.rand(4),
    }
    shared = {
        "cache_position": torch.arange(4),
        "head_mask": torch.ones(4, 2),
        "cross_attn_head_mask": torch.ones(4, 2),
        "bias": torch.zeros(1, 1, 4, 4),
        "scale": torch.tensor(2.0),
        "use_cache": False,
        "token_type_ids": None,
    }
    for batch in ({**rows, **shared}, {**shared, **rows}):
        parts = split(batch, 2)
        assert len(parts) == 2 and all(part.keys() == batch.keys() for part in parts)
        for name, value in rows.items():
            assert torch.equal(torch.cat([part[name] for part in parts]), value)
            assert len(parts[0][name]) == 2
        for name, value in shared.items():
            assert all(part[name] is value for part in parts)
    (one, other) = split({"input_ids": ids, "position_ids": torch.arange(4)}, 2)
    assert len(one["position_ids"]) == len(other["position_ids"]) == 4
    # Whole, where sizes do not say which rows are whose.
    for name, value in (
        ("past_key_values", object()),
        ("past_key_values", ((torch.ones(4, 1, 2, 2),) * 2,)),
        ("adapter_names", ["a", "b", "a", "b"]),
        ("pixel_values", torch.ones(9, 8)),
        ("position_ids", torch.ones(4, 4, 4, dtype=torch.int64)),
    ):
        batch = {**rows, name: value}
        assert split(batch, 2) == [batch]


@pytest.mark.parametrize("name", ["labels", "label"])
def test_labels_and_inputs(name: str) -> None:
    y = torch.arange(5)
    for kind in (dict, UserDict):
        batch = kind({"input_ids": IDS, name: y})
        assert labels_of(batch) is y and inputs_of(batch) == {"input_ids": IDS}
        assert labels_of(kind({"input_ids": IDS, name: None})) is None
    assert labels_of((IDS, y)) is y and labels_of([IDS, y]) is y
    assert labels_of((IDS,)) is None and labels_of(IDS) is None
    for wrong in ({name: [0, 1]}, (IDS, [0, 1])):
        with pytest.raises(ValueError, match="labels of a batch must be a tensor, got list"):
            labels_of(wrong)


def test_masks_are_those_of_tokens() -> None:
    for shape in ((5, 7), (5, 2, 7)):
        mask = torch.ones(shape)
        assert mask_of({"attention_mask": mask}) is mask
    for other in (torch.ones(5, 1, 7, 7), {"full": IDS}, None):
        assert mask_of({"attention_mask": other}) is None
    assert mask_of((IDS, IDS)) is None


@pytest.mark.parametrize("rows", [0, 2])
def test_empty_batches(rows: int) -> None:
    x, shared = torch.ones(rows, 3), torch.arange(4)
    for batch in (
        x,
        (x, x[:, 0]),
        [x, "text"],
        {"x": x, "cache_position": shared, "scale": torch.tensor(1.0)},
    ):
        assert is_empty(batch) == (rows == 0)
    assert not is_empty({"cache_position": shared[:0]}) and not is_empty("text")


def test_batches_go_to_a_device_in_their_own_type() -> None:
    meta = torch.device("meta")
    for batch in ((IDS, "text"), [IDS, "text"]):
        moved = to_device(batch, meta)
        assert type(moved) is type(batch) and moved[0].device == meta and moved[1] == "text"
    moved = to_device(UserDict(x=IDS, n=3), meta)
    assert type(moved) is dict and moved["x"].device == meta and moved["n"] == 3
    assert to_device(IDS, meta).device == meta


class Stream(IterableDataset[Any]):
    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[Any]:
        return iter(self.rows)


def test_batches_of_loaders_batches_and_data_sets() -> None:
    batches = [{"input_ids": IDS}, {"input_ids": IDS[:2]}]
    loader = DataLoader(IDS, batch_size=2)
    for data in (batches, loader, iter(batches)):
        assert as_batches(data) is data
    made: Any = as_batches([{"input_ids": row} for row in IDS], 2)
    assert torch.equal(torch.cat([b["input_ids"] for b in made]), IDS)
    assert [len(b["input_ids"]) for b in made] == [2, 2, 1]
    # Streams of batches, and of examples.
    assert as_batches(stream := Stream(batches)) is stream
    streamed = as_batches(Stream([{"input_ids": row} for row in IDS]), 2)
    assert [len(b["input_ids"]) for b in streamed] == [2, 2, 1]
    with pytest.raises(ValueError, match=r"got one batch; pass \[batch\]"):
        as_batches(batches[0])


def test_eval_mode_gives_every_module_its_own_mode_back() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout(), nn.Linear(2, 2)))
    model[1].eval()
    model[1][1].train()
    before = [m.training for m in model.modules()]
    with pytest.raises(ZeroDivisionError), eval_mode(model):
        assert not any(m.training for m in model.modules())
        1 / 0  # noqa: B018
    assert [m.training for m in model.modules()] == before
    assert True in before and False in before
