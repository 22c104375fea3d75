"""The noise of a training pass: its key, its formula, checkpoints, compilation."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from tiny_models import IDS, LABELS, blob, gradients, logits
from torch import Tensor, nn

from bayes_kernels import random, reference
from bayes_kernels.hf import checkpoint_noise, layers, posterior, refresh_noise
from bayes_kernels.hf.layers import bayes_layers, noise_state
from hf.methods.test_scalabl import scalabl


def test_a_micro_batch_does_not_walk_over_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model, walks = blob(), []
    state = noise_state(model)
    found = layers.adapter_devices
    monkeypatch.setattr(
        layers, "adapter_devices", lambda model: walks.append(model) or found(model)
    )
    for step in range(3):
        refresh_noise(model, step=step)
    assert len(walks) == 1
    model.double()  # as moves to another device
    refresh_noise(model, step=3)
    assert len(walks) == 2 and set(state.keys) == {torch.device("cpu")}
    state.key_on(torch.device("meta"))  # a layer that was moved alone asks for the key
    assert state.devices == {torch.device("cpu"), torch.device("meta")}
    model.add_adapter("other", model.peft_config["default"])
    refresh_noise(model, step=4)
    assert set(state.keys) == {torch.device("cpu")}


@pytest.mark.parametrize("scope", ["token", "example", "none"])
def test_layer_noise_is_the_documented_one(scope: str) -> None:
    model = blob(scope=scope)
    item = bayes_layers(model)[0]
    x = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(5))
    model.train()
    refresh_noise(model, step=7, rank=2, seed=11)
    key = noise_state(model).keys[torch.device("cpu")]
    expected = random.fold_in(random.fold_in(random.key(11), 2), 7)
    assert torch.equal(key, expected)
    with torch.no_grad():
        y = item.layer(x)
        base = item.layer.base_layer(x)
    noise = reference.dense_noise(
        key,
        15,
        32,
        4,
        stream=item.variant.stream,
        rows_per_id={"token": 1, "example": 5}.get(scope, 1),
    )
    if scope == "none":
        noise.r_in, noise.r_out = torch.ones(()), torch.ones(())
    b = item.layer.lora_B["default"].weight
    want = reference.flipout_lora(x, item.mean, item.rho, b, base, scaling=2.0, noise=noise)
    torch.testing.assert_close(y, want.detach(), rtol=1e-4, atol=1e-4)


def test_lora_dropout_in_training_only() -> None:
    model = blob(rho=0.0, lora_dropout=0.5)
    mean = logits(model)
    torch.testing.assert_close(mean, logits(blob(rho=0.0)))
    item = bayes_layers(model)[0]
    x = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(5))
    model.train()
    refresh_noise(model, step=1)
    key = noise_state(model).keys[torch.device("cpu")]
    keep = random.dropout_mask(key, 6, 32, 0.5, stream=item.variant.stream).reshape(x.shape)
    assert 0.3 < keep.float().mean() < 0.7
    with torch.no_grad():
        delta = item.layer(x) - item.layer.base_layer(x)
        want = (x * keep * 2) @ item.mean.T @ item.layer.lora_B["default"].weight.T * 2.0
        with posterior(model, "mean"):
            noise_state(model).set_key(key, set())
            mean_delta = item.layer(x) - item.layer.base_layer(x)
    torch.testing.assert_close(delta, want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mean_delta, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
def test_noise_is_new_in_each_forward_pass(task_type: str | None) -> None:
    model = blob(task_type=task_type).train()
    assert not torch.equal(logits(model), logits(model))
    inner = model.get_base_model()
    assert not torch.equal(logits(inner), logits(inner))
    with model.disable_adapter():
        key = noise_state(model).keys[torch.device("cpu")]
        logits(model)
        assert noise_state(model).keys[torch.device("cpu")] is key
    refresh_noise(model)
    assert noise_state(model).keys[torch.device("cpu")] is not key


def test_refresh_noise_is_a_function_of_seed_rank_and_step() -> None:
    model = blob().train()
    outputs = {}
    for args in ((0, 0), (1, 0), (0, 1), (0, 0)):
        refresh_noise(model, step=args[0], rank=args[1])
        out = logits(model)
        assert torch.equal(outputs.setdefault(args, out), out)
    assert not torch.equal(outputs[0, 0], outputs[1, 0])
    assert not torch.equal(outputs[0, 0], outputs[0, 1])


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_gradient_checkpointing_changes_nothing(kind: str, reentrant: bool) -> None:
    labels = IDS if kind == "llama" else LABELS

    def run(model: nn.Module) -> tuple[list[float], dict[str, Tensor]]:
        model.train()
        refresh_noise(model, step=0)
        losses = []
        for _ in range(2):
            loss = model(input_ids=IDS, labels=labels).loss
            loss.backward()
            losses.append(loss.item())
        return losses, gradients(model)

    model = blob(kind, lora_dropout=0.1)
    plain = run(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    checkpointed = run(model)
    assert plain[0] == checkpointed[0] and plain[0][0] != plain[0][1]
    assert plain[1].keys() == checkpointed[1].keys()
    for name, grad in plain[1].items():
        assert torch.equal(grad, checkpointed[1][name]), name


def test_two_forward_passes_before_a_backward_pass() -> None:
    """A refresh replaces the key: what is saved for an earlier backward pass stays."""
    model = blob().train()
    refresh_noise(model, step=0)
    first = model(input_ids=IDS, labels=IDS).loss
    second = model(input_ids=IDS, labels=IDS).loss
    (first + second).backward()
    together = gradients(model)
    refresh_noise(model, step=0)
    model(input_ids=IDS, labels=IDS).loss.backward()
    model(input_ids=IDS, labels=IDS).loss.backward()
    for name, grad in gradients(model).items():
        torch.testing.assert_close(grad, together[name], rtol=1e-4, atol=1e-6)


def test_two_checkpointed_forward_passes_before_a_backward_pass() -> None:
    model = blob()

    def run(checkpoint: bool) -> dict[str, Tensor]:
        model.train()
        if checkpoint:
            model.gradient_checkpointing_enable(
                {"use_reentrant": False, "context_fn": checkpoint_noise(model)}
            )
            model.enable_input_require_grads()
        refresh_noise(model, step=0)
        loss = model(input_ids=IDS, labels=IDS).loss
        with posterior(model, "sample", n_samples=2, seed=1):
            loss = loss + model(input_ids=IDS, labels=IDS).loss
        (loss + model(input_ids=IDS, labels=IDS).loss).backward()
        return gradients(model)

    plain, checkpointed = run(False), run(True)
    for name, grad in plain.items():
        assert torch.equal(grad, checkpointed[name]), name


@pytest.mark.slow
def test_compile_is_one_graph_for_all_steps() -> None:
    import torch._dynamo as dynamo

    model = blob(lora_dropout=0.1).train()
    model.config.use_cache = False

    def run(function: Any) -> list[float]:
        refresh_noise(model, step=0)
        losses = []
        for _ in range(3):
            loss = function(input_ids=IDS, labels=IDS).loss
            loss.backward()
            losses.append(loss.item())
        return losses

    eager = run(model)
    eager_gradients = gradients(model)
    dynamo.reset()
    dynamo.utils.counters.clear()
    compiled = run(torch.compile(model, fullgraph=True, backend="aot_eager"))
    assert compiled == pytest.approx(eager, rel=1e-5) and len(set(compiled)) == 3
    assert dynamo.utils.counters["stats"]["unique_graphs"] == 1
    for name, grad in gradients(model).items():
        torch.testing.assert_close(grad, eager_gradients[name], rtol=1e-3, atol=1e-5)
    dynamo.reset()


@pytest.mark.parametrize("where", ["inside", "after", "thread"])
def test_a_checkpointed_draw_is_computed_again_as_it_was(where: str) -> None:
    """Inside the context, after it, and in a thread that has none, as autograd's on a GPU."""
    model = blob()

    def run() -> dict[str, Tensor]:
        model.train()
        with posterior(model, draws=[1, 0, 3, 3], seed=1):
            loss = model(input_ids=IDS, labels=IDS).loss
            if where == "inside":
                loss.backward()
            elif where == "thread":
                with ThreadPoolExecutor(1) as pool:
                    pool.submit(loss.backward).result()
        if where == "after":
            loss.backward()
        return gradients(model)

    plain = run()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    checkpointed = run()
    for name, grad in plain.items():
        assert torch.equal(grad, checkpointed[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("how", ["whole", "layers"])
@pytest.mark.parametrize("make", [blob, scalabl])
def test_new_draws_do_not_compile_again(make: Any, how: str) -> None:
    """Ids, seeds, chunks and threads are data of the compiled code."""
    import torch._dynamo as dynamo
    from torch._dynamo.testing import CompileCounter

    model = make("llama").eval()
    model.config.use_cache = False

    def passes() -> list[dict[str, Any]]:
        chosen: list[dict[str, Any]] = [{"n_samples": 2, "seed": seed} for seed in (0, 1)]
        chosen += [{"n_samples": 2, "first_sample": first} for first in (2, 4, 3)]
        chosen += [{"draws": ids} for ids in ([0, 1], [7, 5], [2, 3])]
        return chosen

    eager = []
    for options in passes():
        with posterior(model, **options):
            eager.append(logits(model))
    counter = CompileCounter()
    dynamo.reset()
    if how == "whole":
        compiled = torch.compile(model, fullgraph=True, backend=counter)
    else:
        compiled = model
        for layer in model.get_base_model().model.layers:
            layer.compile(fullgraph=True, backend=counter)

    def found(options: dict[str, Any]) -> Tensor:
        with posterior(model, **options):
            return logits(compiled)

    for options, expected in zip(passes(), eager, strict=True):
        torch.testing.assert_close(found(options), expected, rtol=1e-4, atol=1e-5)
    with ThreadPoolExecutor(1) as pool:
        for out, expected in zip(pool.map(found, passes()), eager, strict=True):
            torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    assert counter.frame_count == (1 if how == "whole" else 2)
    # Side by side, only the values: torch moves the code that it found to the front of its list, and a
    # thread that walks the list at that moment may miss its own and compile again.
    with ThreadPoolExecutor(2) as pool:
        for out, expected in zip(pool.map(found, passes()), eager, strict=True):
            torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    dynamo.reset()
