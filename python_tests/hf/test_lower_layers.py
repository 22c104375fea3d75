"""Layers below the first drawn one: computed once, the same numbers, and left alone where that fails."""

from __future__ import annotations

import logging
import threading
from typing import Any

import pytest
import tiny_models
import torch
import transformers
from peft import LoraConfig
from tiny_models import adapted, fill
from torch import nn

from bayes_kernels.hf import predict
from bayes_kernels.hf.lower_layers import _WATCHED

IDS = torch.randint(3, 64, (5, 7), generator=torch.Generator().manual_seed(1))
DECODER = {"input_ids": IDS, "decoder_input_ids": IDS[:, :3]}
UPPER = {"layers_to_transform": [2, 3]}


def bert(**options: Any) -> Any:
    base = tiny_models.bert(num_hidden_layers=4, initializer_range=0.2)
    return fill(adapted(base, **{**UPPER, **options}), 0.6, 0.5)


def llama(**options: Any) -> Any:
    base = tiny_models.llama(num_hidden_layers=4, initializer_range=0.2)
    return fill(adapted(base, **{**UPPER, **options}), 0.6, 0.5)


def gpt2(**options: Any) -> Any:
    given = {"layers_to_transform": [3], "fan_in_fan_out": True, **options}
    return fill(adapted(tiny_models.gpt2(n_layer=4, initializer_range=0.2), **given), 0.6, 0.5)


def t5(targets: str) -> Any:
    return fill(adapted(tiny_models.t5(num_layers=3), target_modules=targets), 0.6, 0.5)


# Model, batch, options, how many layers lie below.
CASES: dict[str, Any] = {
    "encoder": (bert, {"input_ids": IDS, "attention_mask": IDS.ne(5).long()}, {}, 2),
    "noise for each token": (bert, {"input_ids": IDS}, {"scope": "token"}, 2),
    "causal": (llama, {"input_ids": IDS}, {"choices": [3, 4, 5]}, 2),
    "one row": (llama, {"input_ids": IDS[:1]}, {"choices": [3, 4, 5]}, 2),
    "tuples": (gpt2, {"input_ids": IDS[:1]}, {}, 3),
    "head only": (
        lambda: llama(layers_to_transform=None, target_modules=["lm_head"]),
        {"input_ids": IDS},
        {"choices": [3, 4]},
        4,
    ),
    # The first block of each stack gives the others its position biases.
    "decoder": (lambda: t5(r".*decoder.*block\.[12].*\.(q|v)"), DECODER, {"choices": [3, 4]}, 4),
    "encoder of two": (
        lambda: t5(r".*encoder.*block\.2.*\.(q|v)"),
        DECODER,
        {"choices": [3, 4]},
        2,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_numbers_are_those_of_all_layers_for_each_draw(case: str) -> None:
    make, batch, options, below = CASES[case]
    model = make()
    options = {"n_samples": 6, "seed": 3, "return_samples": True, **options}
    plain = predict(model, batch, share_layers=False, **options)
    assert plain.shared_layers == 0 and plain.mutual_information.min() > 1e-5
    for per_pass in (None, 1, 4):
        shared = predict(model, batch, samples_per_pass=per_pass, **options)
        assert shared.shared_layers == below
        torch.testing.assert_close(
            shared.sample_log_probs, plain.sample_log_probs, rtol=1e-4, atol=2e-6
        )


def calls(module: nn.Module, run: Any) -> list[int]:
    """Rows of each call of a linear layer in `run`."""
    seen: list[int] = []
    hook = module.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    run()
    hook.remove()
    return seen


def test_lower_layers_run_once_for_a_batch() -> None:
    model = bert()
    layers = model.base_model.model.bert.encoder.layer

    def run() -> None:
        predict(model, {"input_ids": IDS}, n_samples=6, samples_per_pass=2)

    tried = calls(layers[1].intermediate.dense, run)
    assert sorted(tried) == [2, 2, 4, 5]  # the first time also a few rows, both ways
    assert calls(layers[1].intermediate.dense, run) == [5]
    assert calls(layers[0].intermediate.dense, run) == [5]
    assert calls(layers[2].intermediate.dense, run) == [10] * 3
    split = calls(  # each part of a batch by itself
        layers[1].intermediate.dense,
        lambda: predict(model, {"input_ids": IDS}, n_samples=4, memory_budget=1),
    )
    assert split == [1] * 5


def test_what_happens_to_outputs_between_layers_stays_there() -> None:
    model = bert()
    layers = model.base_model.model.bert.encoder.layer

    def scale(_: nn.Module, args: Any, output: Any) -> None:
        (output if isinstance(output, torch.Tensor) else output[0]).mul_(1.5)  # in place

    layers[0].register_forward_hook(scale)
    plain = predict(model, {"input_ids": IDS}, n_samples=4, share_layers=False)
    shared = predict(model, {"input_ids": IDS}, n_samples=4)
    assert shared.shared_layers == 2
    torch.testing.assert_close(shared.log_probs, plain.log_probs, rtol=1e-4, atol=1e-6)


def test_one_set_of_weights_shares_nothing() -> None:
    model = bert()
    assert predict(model, {"input_ids": IDS}, n_samples=0).shared_layers == 0
    assert predict(model, {"input_ids": IDS}, n_samples=1).shared_layers == 0


def test_masks_of_dropout_keep_their_layers() -> None:
    base = tiny_models.bert(num_hidden_layers=4, initializer_range=0.2)
    model = fill(adapted(base, LoraConfig, lora_dropout=0.4, **UPPER), 0.6)
    plain = predict(model, {"input_ids": IDS}, n_samples=4, share_layers=False)
    shared = predict(model, {"input_ids": IDS}, n_samples=4)
    assert shared.shared_layers == 2 and shared.mutual_information.min() > 1e-5
    torch.testing.assert_close(shared.log_probs, plain.log_probs, rtol=1e-5, atol=1e-6)


class Leaking(nn.Module):
    """A layer that changes what it gets by something that an earlier layer left behind."""

    def __init__(self, layer: nn.Module, left: dict[str, Any], writes: bool) -> None:
        super().__init__()
        self.layer, self.left, self.writes = layer, left, writes

    def forward(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.writes:
            self.left["rows"] = hidden.square().mean((1, 2))[:, None, None]
        else:
            hidden = hidden * (1 + self.left["rows"])
        return self.layer(hidden, *args, **kwargs)


def test_models_that_hand_on_more_than_outputs_run_all_layers(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = bert()
    layers, left = model.base_model.model.bert.encoder.layer, {}
    layers[0], layers[3] = Leaking(layers[0], left, True), Leaking(layers[3], left, False)
    plain = predict(model, {"input_ids": IDS}, n_samples=4, share_layers=False)
    with caplog.at_level(logging.INFO, logger="bayes_kernels.hf.lower_layers"):
        found = predict(model, {"input_ids": IDS}, n_samples=4)
    assert found.shared_layers == 0 and torch.equal(found.log_probs, plain.log_probs)
    assert "need more than each other's outputs" in caplog.text


def test_models_that_leave_values_behind_are_told_by_their_logits(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A number of the batch that a lower layer leaves behind: no shape is wrong."""
    model = bert()
    layers, left = model.base_model.model.bert.encoder.layer, {"calls": 0.0}

    def count(*args: Any) -> None:
        left["calls"] = left["calls"] + 1.0

    layers[0].intermediate.dense.register_forward_pre_hook(count)
    layers[3].register_forward_pre_hook(
        lambda _, args: (args[0] * (1.0 if left.pop("calls", 0.0) else 2.0), *args[1:])
    )
    layers[0].register_forward_pre_hook(lambda *_: left.update(calls=0.0))
    with caplog.at_level(logging.INFO, logger="bayes_kernels.hf.lower_layers"):
        found = predict(model, {"input_ids": IDS}, n_samples=4)
    plain = predict(model, {"input_ids": IDS}, n_samples=4, share_layers=False)
    assert found.shared_layers == 0 and torch.equal(found.log_probs, plain.log_probs)
    assert "logits are others" in caplog.text


def test_repeated_layers_run_for_each_draw(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "embedding_size": 16, "intermediate_size": 64, "vocab_size": 64}
    config = transformers.AlbertConfig(
        **sizes, num_attention_heads=4, num_hidden_layers=3, num_labels=3
    )
    base = transformers.AlbertForSequenceClassification(config).eval()
    model = fill(adapted(base, target_modules=["pooler"]), 0.6, 0.5)
    with caplog.at_level(logging.INFO, logger="bayes_kernels.hf.lower_layers"):
        found = predict(model, {"input_ids": IDS}, n_samples=4)
    plain = predict(model, {"input_ids": IDS}, n_samples=4, share_layers=False)
    assert found.shared_layers == 0 and torch.equal(found.log_probs, plain.log_probs)
    assert "more than once" in caplog.text


def test_models_that_must_stay_whole(caplog: pytest.LogCaptureFixture) -> None:
    asked, compiled = bert(), bert()
    asked.config.output_hidden_states = True
    compiled.base_model.model.bert.encoder.layer[2].compile(backend="eager")
    with caplog.at_level(logging.INFO, logger="bayes_kernels.hf.lower_layers"):
        for model in (asked, compiled):
            assert predict(model, {"input_ids": IDS}, n_samples=2).shared_layers == 0
    assert "output_hidden_states" in caplog.text and "compiled" in caplog.text


def test_another_adapter_is_looked_at_anew() -> None:
    model = bert()
    assert predict(model, {"input_ids": IDS}, n_samples=2).shared_layers == 2
    config = type(model.peft_config["default"])(
        r=4, target_modules=["query"], layers_to_transform=[1], task_type="SEQ_CLS"
    )
    model.add_adapter("lower", config)
    model.set_adapter("lower")
    fill(model, 0.6, 0.5)
    assert predict(model, {"input_ids": IDS}, n_samples=2).shared_layers == 1


def test_threads_share_a_model() -> None:
    model = bert()
    batches = [{"input_ids": IDS.roll(i, 1)} for i in range(6)]
    expected = [predict(model, b, n_samples=4, seed=i).log_probs for i, b in enumerate(batches)]
    found: dict[int, Any] = {}

    def work(i: int) -> None:
        for _ in range(4):
            found[i] = predict(model, batches[i], n_samples=4, seed=i, samples_per_pass=2).log_probs

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, log_probs in enumerate(expected):
        torch.testing.assert_close(found[i], log_probs, rtol=1e-5, atol=1e-6)


def test_nothing_stays_on_the_model() -> None:
    model = bert()
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    predict(model, {"input_ids": IDS}, n_samples=2)
    broken = model.base_model.model.classifier

    def fail(*args: Any) -> None:
        raise RuntimeError("broken")

    hook = broken.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="broken"):
        predict(model, {"input_ids": IDS}, n_samples=2)
    hook.remove()
    assert not _WATCHED
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
    # A forward that someone else has put there is there again.
    layer = model.base_model.model.bert.encoder.layer[0]
    forward = layer.forward
    layer.forward = lambda *args, **kwargs: forward(*args, **kwargs)
    theirs = layer.forward
    assert predict(model, {"input_ids": IDS}, n_samples=2).shared_layers == 2
    assert layer.forward is theirs
