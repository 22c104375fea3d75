"""Lower layers kept for each text: the same training, fewer calls, bounded memory."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from tiny_models import adapted, arguments, fill
from torch import Tensor, nn

from bayes_kernels.hf import BayesTrainer, KeptLayers, predict, refresh_noise

GENERATOR = torch.Generator().manual_seed(0)
TEXTS = [torch.randint(3, 60, (n,), generator=GENERATOR) for n in (3, 7, 5, 9, 4, 6)]
UPPER = {"layers_to_transform": [2, 3]}
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
# Each text twice, in other batches and beside other texts.
EPOCHS = ([0, 1, 2], [3, 4, 5], [2, 3, 0], [1, 4, 5])


def bert(**options: Any) -> Any:
    options = {
        "num_labels": 3,
        "num_hidden_layers": 4,
        "initializer_range": 0.2,
        **STILL,
        **options,
    }
    return fill(adapted(tiny_models.bert(**options), **UPPER), 0.6, 0.5)


def llama(**options: Any) -> Any:
    base = tiny_models.llama(num_hidden_layers=4, initializer_range=0.2, **options)
    return fill(adapted(base, **UPPER), 0.6, 0.5)


def batch(rows: list[int], side: str, causal: bool) -> dict[str, Tensor]:
    width = max(len(TEXTS[row]) for row in rows)
    ids, mask = (torch.zeros(len(rows), width, dtype=torch.long) for _ in range(2))
    for i, row in enumerate(rows):
        count = len(TEXTS[row])
        where = slice(count) if side == "right" else slice(width - count, width)
        ids[i, where], mask[i, where] = TEXTS[row], 1
    labels = torch.where(mask.bool(), ids, -100) if causal else torch.tensor(rows) % 3
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def calls_of(model: nn.Module, layer: int) -> list[int]:
    """Rows of each call of a layer, which a list gets as they come."""
    (module,) = (
        m
        for name, m in model.named_modules()
        if name.endswith((f"layer.{layer}", f"layers.{layer}"))
    )
    rows: list[int] = []
    inner = next(m for m in module.modules() if isinstance(m, nn.Linear))
    inner.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    return rows


def epochs(model: Any, kept: KeptLayers | None, side: str, causal: bool) -> tuple[Any, Any]:
    """Losses and gradients of two epochs."""
    model.train()
    losses = []
    with contextlib.nullcontext() if kept is None else kept:
        for step, rows in enumerate(EPOCHS):
            refresh_noise(model, step=step, seed=0)
            loss = model(**batch(rows, side, causal)).loss
            loss.backward()
            losses.append(loss.detach())
    return torch.stack(losses), [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("make", [bert, llama])
def test_losses_and_gradients_are_those_of_all_layers(make: Any, side: str) -> None:
    causal = make is llama
    expected = epochs(make(), None, side, causal)
    model = make()
    kept = KeptLayers(model, 2**20)
    kept.check(batch([0, 1, 2], side, causal))
    calls = calls_of(model, 1)
    found = epochs(model, kept, side, causal)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-6)
    assert len(found[1]) == len(expected[1]) > 4
    for one, two in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
    # A text is computed once; with padding before it once for each offset.
    different = (
        6
        if side == "right"
        else len({(row, max(len(TEXTS[r]) for r in rows)) for rows in EPOCHS for row in rows})
    )
    assert kept.layers == 2 and kept.texts == kept.computed == sum(calls) == different
    assert kept.found == 12 - different and "forward" not in vars(model)
    lengths = sum(map(len, TEXTS))
    if side == "right":  # width 32 in fp32, and two or more int64 of each token as its name
        assert kept.bytes >= lengths * (32 * 4 + 2 * 8)


def test_predictions_find_what_training_kept() -> None:
    model = bert()
    inputs = batch([0, 1, 2], "right", False)
    expected = [predict(model, inputs, n_samples=4, share_layers=share) for share in (True, False)]
    calls = calls_of(model, 1)
    kept = KeptLayers(model, 2**20)
    epochs(model, kept, "right", False)
    calls.clear()
    with kept:
        for share, one in zip((True, False), expected, strict=True):
            got = predict(model, inputs, n_samples=4, share_layers=share)
            torch.testing.assert_close(got.logits, one.logits, rtol=1e-5, atol=1e-6)
            assert got.shared_layers == one.shared_layers
        got = predict(model, inputs, n_samples=0)
    assert calls == []


def test_nothing_is_kept_above_the_cap() -> None:
    expected = epochs(bert(), None, "right", False)
    whole = KeptLayers(bert(), 2**20)
    epochs(whole.model, whole, "right", False)
    model = bert()
    kept = KeptLayers(model, whole.bytes // 2)
    found = epochs(model, kept, "right", False)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-6)
    assert 0 < kept.bytes <= whole.bytes // 2 and 0 < kept.texts < 6
    assert 6 < kept.computed < 12 and kept.computed + kept.found == 12
    held = sum(t.numel() * t.element_size() for parts in kept._texts.values() for t in parts)
    assert held < kept.bytes
    assert all(
        t.untyped_storage().nbytes() == t.numel() * t.element_size()
        for parts in kept._texts.values()
        for t in parts
    )


def test_weights_that_change_are_noticed() -> None:
    model = bert()
    inputs = batch([0, 1, 2], "right", False)
    kept = KeptLayers(model, 2**20)
    layer = next(m for name, m in model.named_modules() if name.endswith("layer.0"))
    with kept, torch.no_grad():
        model.eval()
        model(**inputs)
        layer.output.dense.weight.mul_(3)
        found = model(**inputs).logits
    torch.testing.assert_close(found, model(**inputs).logits, rtol=1e-5, atol=1e-6)
    assert kept.computed == 6 and kept.texts == 3


class _Mean(nn.Module):
    """Pools over all positions, padding too."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.inner(hidden.mean(1, keepdim=True).expand_as(hidden))


def _checkpointed() -> Any:
    model = llama()
    model.gradient_checkpointing_enable()
    return model


def _trained_below() -> Any:
    model = bert()
    next(p for name, p in model.named_parameters() if "layer.0" in name).requires_grad_()
    return model


def _looks_at_padding() -> Any:
    model = bert()
    base = model.get_base_model()
    base.bert.pooler = _Mean(base.bert.pooler)
    return model


def _lowest() -> Any:
    return fill(adapted(tiny_models.bert(num_labels=3, **STILL), layers_to_transform=[0]), 0.6, 0.5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: bert(hidden_dropout_prob=0.1), "must draw no random numbers in training"),
        (lambda: bert(attention_probs_dropout_prob=0.1), "must draw no random numbers in training"),
        (_checkpointed, "gradient checkpointing must be off"),
        (_trained_below, "there must be whole layers below"),
        (_lowest, "there must be whole layers below"),
        (_looks_at_padding, "must not depend on how a batch is padded"),
    ],
)
def test_models_that_cannot_are_refused(make: Any, message: str) -> None:
    model = make()
    model.train()
    inputs = batch([0, 1, 2], "right", False)
    modes = [module.training for module in model.modules()]
    kept = KeptLayers(model, 2**20)
    with pytest.raises(ValueError, match=f"keep_lower_layers: .*{message}"), kept:
        model(**inputs)
    with pytest.raises(ValueError, match=message):
        kept.check(inputs)
    assert [module.training for module in model.modules()] == modes
    assert kept.layers == kept.texts == 0 and "forward" not in vars(model)


def test_other_inputs() -> None:
    model = bert()
    inputs = batch([0, 1, 2], "right", False)
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    kept = KeptLayers(model, 2**20)
    model.train()
    with kept, pytest.raises(ValueError, match=r"a pass must have input_ids \(B, T\)"):
        model(inputs_embeds=embeds)
    with kept, pytest.raises(ValueError, match="a pass must not ask for output_hidden_states"):
        model(**inputs, output_hidden_states=True)
    model.eval()
    with kept:
        assert len(model(**inputs, output_hidden_states=True).hidden_states) == 5
    for size in (0, 1.5, True):
        with pytest.raises(ValueError, match="max_bytes must be an integer of at least 1"):
            KeptLayers(model, size)  # type: ignore[arg-type]


def test_trainer_keeps_over_epochs_and_evaluations(tmp_path: Path) -> None:
    def trainer(folder: Path, size: int) -> Any:
        model = bert()
        data = [{"input_ids": TEXTS[i % 6][:3], "labels": torch.tensor(i % 3)} for i in range(6)]
        options: dict[str, Any] = {"num_train_epochs": 2, "max_steps": -1}
        options.update(per_device_train_batch_size=3, logging_steps=1, gradient_checkpointing=False)
        return BayesTrainer(
            model=model,
            args=arguments(folder, **options),
            train_dataset=data,
            eval_dataset=data,
            eval_samples=4,
            keep_lower_layers=size,
        )

    plain, keeping = trainer(tmp_path / "a", 0), trainer(tmp_path / "b", 2**20)
    calls = calls_of(keeping.model, 0)
    for one in (plain, keeping):
        one.train()
        one.evaluate()
    logs = [[e["loss"] for e in one.state.log_history if "loss" in e] for one in (plain, keeping)]
    assert len(logs[0]) == 4 and logs[0] == pytest.approx(logs[1], rel=1e-5)
    for one, two in zip(plain.model.parameters(), keeping.model.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)
    assert plain.kept_layers is None and keeping.kept_layers.computed == 6
    assert keeping.kept_layers.found >= 12
    before = len(calls)
    keeping.evaluate()
    assert len(calls) == before
    with pytest.raises(ValueError, match="keep_lower_layers must be an integer of at least 0"):
        trainer(tmp_path / "c", -1)
