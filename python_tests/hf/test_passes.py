"""Which key a forward pass has: generation, caches, ranks; and what is said where draws do nothing."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_models
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import adapted, arguments, fill
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    EncoderDecoderCache,
    StaticCache,
    TrainingArguments,
)

from bayes_kernels import random
from bayes_kernels.hf import (
    BayesTrainer,
    BlobConfig,
    PolarConfig,
    PolarVbllConfig,
    ScalablConfig,
    bayesianize,
    drawn_weights,
    posterior,
    predict,
    predict_dataset,
)
from bayes_kernels.hf._compat import CACHE_NAMES
from bayes_kernels.hf.layers import bayes_layers, noise_state
from bayes_kernels.hf.noise import NoiseState, process_rank
from bayes_kernels.hf.posterior import advance_before_forward

pytestmark = pytest.mark.cpu_only

IDS = tiny_models.IDS[:2, :5]
CPU = torch.device("cpu")
DRAWING = {"blob": BlobConfig, "scalabl": ScalablConfig}


def tuned(base: Any, config: Any, **options: Any) -> Any:
    return fill(adapted(base, config, **options)).eval()


def llama_base() -> Any:
    return tiny_models.llama(initializer_range=0.2, eos_token_id=None, pad_token_id=0)


def llama(config: Any = BlobConfig, targets: tuple[str, ...] = ("q_proj",), **options: Any) -> Any:
    return tuned(llama_base(), config, target_modules=list(targets), **options)


def t5(config: Any = BlobConfig, **options: Any) -> Any:
    return tuned(tiny_models.t5(), config, **options)


def bert(config: Any = BlobConfig, **options: Any) -> Any:
    return tuned(tiny_models.bert(initializer_range=0.2, num_hidden_layers=1), config, **options)


class Keys:
    """The keys that adapted layers meet."""

    def __init__(self, model: nn.Module) -> None:
        self.found: list[tuple[int, ...]] = []
        state = noise_state(model)
        for item in bayes_layers(model):
            item.layer.register_forward_hook(
                lambda *_: self.found.append(tuple(state.keys[CPU].tolist()))
            )

    def __call__(self) -> set[tuple[int, ...]]:
        """Those since the last call."""
        found, self.found = set(self.found), []
        return found


# --- generation ----------------------------------------------------------------------------------


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("how", ["in evaluation", "flipout", "training"])
@pytest.mark.parametrize("method", DRAWING)
@pytest.mark.parametrize("make", [llama, t5])
def test_a_generated_text_has_one_key(
    make: Any, method: str, how: str, use_cache: bool, beams: int
) -> None:
    """With a cache or without, the encoder included; the next text has another one."""
    model = make(DRAWING[method], sample_at_inference=how == "in evaluation")
    model.train(how == "training")
    keys = Keys(model)
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "use_cache": use_cache}

    def generated() -> set[tuple[int, ...]]:
        out = model.generate(input_ids=IDS, num_beams=beams, pad_token_id=0, **options)
        assert out.shape[1] >= 4
        return keys()

    if how == "flipout":
        with posterior(model, "flipout"):
            first, second = generated(), generated()
    else:
        first, second = generated(), generated()
    assert len(first) == len(second) == 1 and first != second
    assert not noise_state(model).held


@pytest.mark.parametrize("use_cache", [True, False])
def test_without_the_peft_wrapper(use_cache: bool, tmp_path: Path) -> None:
    """The base model, and what AutoModel loads, whose layers have the adapter inside."""
    model = llama(sample_at_inference=True)
    model.get_base_model().save_pretrained(tmp_path / "base")
    config = model.peft_config["default"]
    config.base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    options: dict[str, Any] = {"max_new_tokens": 4, "use_cache": use_cache, "pad_token_id": 0}
    for other in (model.get_base_model(), loaded):
        keys = Keys(other)
        other.generate(input_ids=IDS, **options)
        first = keys()
        other.generate(input_ids=IDS, **options)
        assert len(first) == 1 and len(keys()) == 1


def test_generation_ends_well() -> None:
    """Copies generate with their own keys; errors and unloading leave nothing behind."""
    model = llama(sample_at_inference=True)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        mine, theirs = Keys(model), Keys(other)
        other.generate(input_ids=IDS, max_new_tokens=2, use_cache=False)
        assert len(theirs()) == 1 and not mine()
    with pytest.raises(ValueError):
        model.generate(input_ids=IDS, max_new_tokens=0)
    assert not noise_state(model).held
    base = model.unload()
    assert "generate" not in base.__dict__ and not base._forward_hooks
    assert not base._forward_pre_hooks
    assert base.generate(input_ids=IDS, max_new_tokens=2).shape == (2, 7)


@pytest.mark.parametrize(
    "make",
    [
        DynamicCache,
        lambda: DynamicCache(config=llama_base().config),
        lambda: EncoderDecoderCache(
            DynamicCache(config=llama_base().config), DynamicCache(config=llama_base().config)
        ),
        lambda: StaticCache(config=llama_base().config, max_cache_len=8),
    ],
    ids=["bare", "layers", "encoder-decoder", "static"],
)
@pytest.mark.parametrize("name", CACHE_NAMES)
def test_a_full_cache_keeps_the_key_and_an_empty_one_does_not(name: str, make: Any) -> None:
    """In loops of one's own, whichever name the installed transformers has for it."""
    model = llama(sample_at_inference=True)

    base = model.get_base_model()
    cache = make()
    before = noise_state(model).keys[CPU]
    advance_before_forward(base, (), {name: cache, "use_cache": True})
    first = noise_state(model).keys[CPU]
    assert not torch.equal(before, first)  # nothing is in it: a new text
    advance_before_forward(base, (), {name: None})
    assert not torch.equal(first, noise_state(model).keys[CPU])
    first = noise_state(model).keys[CPU]
    states = torch.zeros(1, 2, 3, 8)
    getattr(cache, "self_attention_cache", cache).update(states, states, 0)
    advance_before_forward(base, (), {name: cache})
    assert noise_state(model).keys[CPU] is first


def test_a_loop_over_tokens_keeps_its_draw() -> None:
    """With the names that this transformers takes and gives."""
    model = llama(sample_at_inference=True)
    keys = Keys(model)
    with torch.no_grad():
        out = model(input_ids=IDS, use_cache=True)
        given = next(name for name in CACHE_NAMES if out.get(name) is not None)
        for _ in range(3):
            token = out.logits[:, -1:].argmax(-1)
            out = model(input_ids=token, use_cache=True, **{given: out[given]})
        assert len(keys()) == 1
        model(input_ids=IDS, use_cache=True)
    assert len(keys()) == 1


# --- ranks ---------------------------------------------------------------------------------------


def test_the_rank_is_that_among_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two machines have the same local ranks, and must not have the same noise."""
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert process_rank() == 5
    expected = random.fold_in(random.key(7), 5)
    assert torch.equal(NoiseState(7).keys[CPU], expected)
    monkeypatch.delenv("RANK")
    assert process_rank() == 0  # LOCAL_RANK alone says nothing
    assert not torch.equal(NoiseState(7).keys[CPU], expected)


def test_the_first_key_of_a_model_has_the_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in a loop that never calls refresh_noise: the first passes of two processes differ."""
    outputs = []
    for rank in ("0", "1", "1"):
        monkeypatch.setenv("RANK", rank)
        model = llama().train()
        with torch.no_grad():
            outputs.append(model(input_ids=IDS).logits)
    assert not torch.equal(outputs[0], outputs[1])
    torch.testing.assert_close(outputs[1], outputs[2], rtol=1e-5, atol=1e-6)


def test_the_trainer_takes_the_global_rank(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(TrainingArguments, "process_index", 3)
    monkeypatch.setattr(TrainingArguments, "local_process_index", 1)
    args = arguments(tmp_path)
    data = [{"input_ids": IDS[0], "labels": torch.tensor(1)}]
    model = bert()
    trainer = BayesTrainer(model=model, args=args, train_dataset=data)
    model.train()
    seen = []
    bayes_layers(model)[0].layer.register_forward_hook(
        lambda *_: seen.append(noise_state(model).keys[CPU])
    )
    trainer.current_gradient_accumulation_steps = 1
    trainer.training_step(model, {"input_ids": IDS, "labels": torch.tensor([0, 1])})
    expected = random.fold_in(random.fold_in(random.key(5), 3), 0)
    assert torch.equal(seen[0], random.fold_in(expected, 0))


def test_a_process_group_knows_better_than_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 2)
    assert process_rank() == 2


# --- draws without an adapter --------------------------------------------------------------------


def _plain_with_dropout() -> Any:
    return bert(LoraConfig, lora_dropout=0.5)


def _tfb() -> Any:
    model = bert(LoraConfig)
    bayesianize(model, "tfb", data=[{"input_ids": IDS}], low=0.05, progress=False)
    return model


WITH_DRAWS = {
    "blob": bert,
    "scalabl": lambda: bert(ScalablConfig),
    "tfb": _tfb,
    "dropout": _plain_with_dropout,
}


@pytest.mark.parametrize("method", WITH_DRAWS)
def test_draws_of_adapters_that_take_no_part(method: str) -> None:
    model, batch = WITH_DRAWS[method](), {"input_ids": IDS}
    before = predict(model, batch, n_samples=3)
    with model.disable_adapter():
        with pytest.raises(ValueError, match=r"disabled; leave disable_adapter"):
            predict(model, batch, n_samples=3)
        with pytest.raises(ValueError, match="disabled"):
            predict_dataset(model, [batch], n_samples=1, progress=False)
        base = predict(model, batch, n_samples=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.merge_adapter()
    with pytest.raises(ValueError, match=r"merged; call unmerge_adapter"):
        predict(model, batch, n_samples=3)
    merged = predict(model, batch, n_samples=0)
    assert (merged.probs - base.probs).abs().max() > 1e-4
    model.unmerge_adapter()
    after = predict(model, batch, n_samples=3)
    torch.testing.assert_close(after.probs, before.probs, rtol=1e-3, atol=1e-4)


def test_draws_of_a_last_layer_outlive_merging() -> None:
    model, batch = bert(PolarVbllConfig), {"input_ids": IDS}
    before = predict(model, batch, n_samples=4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.merge_adapter()
    torch.testing.assert_close(predict(model, batch, n_samples=4).probs, before.probs)
    with model.disable_adapter(), pytest.raises(ValueError, match="enable the adapter"):
        predict(model, batch, n_samples=4)


@pytest.mark.parametrize("config", [BlobConfig, ScalablConfig, PolarConfig, PolarVbllConfig])
def test_training_of_adapters_that_take_no_part(config: Any, tmp_path: Path) -> None:
    model = bert(config)
    args = arguments(tmp_path, max_steps=1)
    data = [{"input_ids": IDS[0], "labels": torch.tensor(1)}] * 2
    trainer = BayesTrainer(model=model, args=args, train_dataset=data, eval_dataset=data)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with model.disable_adapter(), pytest.raises(ValueError, match=r"BayesTrainer: .* disabled"):
        trainer.train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.merge_adapter()
    with pytest.raises(ValueError, match=r"BayesTrainer: .* merged"):
        trainer.train()
    model.unmerge_adapter()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p, before[name], rtol=1e-5, atol=1e-5)
    if config in (BlobConfig, ScalablConfig):
        trainer.eval_samples = 2
        with model.disable_adapter(), pytest.raises(ValueError, match=r"predict: .* disabled"):
            trainer.evaluate()


# --- warnings that come once ---------------------------------------------------------------------


@pytest.fixture
def said() -> Iterator[Any]:
    """Messages of the warnings so far that have a word."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield lambda word: [str(w.message) for w in caught if word in str(w.message)]


class Attention(nn.Module):
    """Uses the weights of `out_proj` without calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 16)
        self.mha = nn.MultiheadAttention(16, 2, batch_first=True)
        self.classifier = nn.Linear(16, 3)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        x = self.embed(input_ids)
        x = x + self.mha(x, x, x, need_weights=False)[0]
        logits = self.classifier(x.mean(1))
        if labels is None:
            return {"logits": logits}
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


@pytest.mark.parametrize("method", DRAWING)
def test_adapters_that_are_never_called(method: str, said: Any, tmp_path: Path) -> None:
    targets = ["out_proj", "classifier"]
    model = fill(get_peft_model(Attention(), DRAWING[method](r=2, target_modules=targets))).eval()
    for _ in range(2):
        predict(model, {"input_ids": IDS}, n_samples=2)
    (message,) = said("were not called")
    assert "predict: 1 of 2" in message and "mha.out_proj" in message
    model = fill(get_peft_model(Attention(), DRAWING[method](r=2, target_modules=targets))).eval()
    args = arguments(tmp_path, max_steps=2)
    data = [{"input_ids": IDS[0], "labels": torch.tensor(1)}] * 2
    BayesTrainer(model=model, args=args, train_dataset=data).train()
    assert len(said("BayesTrainer: 1 of 2 adapted layers")) == 1
    whole = bert()
    predict(whole, {"input_ids": IDS}, n_samples=2)
    BayesTrainer(model=whole, args=args, train_dataset=data).train()
    assert len(said("were not called")) == 2
    assert not bayes_layers(whole)[0].layer._forward_pre_hooks


def test_layers_that_are_left_out_now_and_then(said: Any, tmp_path: Path) -> None:
    """As with layer drop: each step goes round a layer, and none goes round the same."""
    model = bert()
    layers = [item.layer for item in bayes_layers(model)]
    passes = 0

    def skip(layer: Any, *_: Any) -> None:
        layer._disable_adapters = layer is layers[passes % len(layers)]

    def count(*_: Any) -> None:
        nonlocal passes
        passes += 1

    for layer in layers:
        layer.register_forward_pre_hook(skip)
    model.register_forward_hook(count)
    args = arguments(tmp_path, max_steps=3)
    data = [{"input_ids": IDS[0], "labels": torch.tensor(1)}] * 2
    BayesTrainer(model=model, args=args, train_dataset=data).train()
    assert len(layers) > 1 and passes == 3 and not said("were not called")


@pytest.mark.parametrize("method", DRAWING)
def test_a_loop_in_eval_mode(method: str, said: Any, tmp_path: Path) -> None:
    llama(DRAWING[method]).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(llama_base(), tmp_path, is_trainable=True)
    model.eval()
    model(input_ids=IDS).logits.sum().item()  # a look at the loss is no training
    with posterior(model, "sample"):
        model(input_ids=IDS, labels=IDS).loss.backward()
    with torch.no_grad():
        model(input_ids=IDS, labels=IDS)
    assert not said("eval mode")
    for _ in range(2):
        model(input_ids=IDS, labels=IDS).loss.backward()
    (message,) = said("eval mode")
    assert "model.train()" in message
    other = PeftModel.from_pretrained(llama_base(), tmp_path)
    hidden = other(inputs_embeds=torch.zeros(1, 3, 32, requires_grad=True)).logits
    hidden.sum().backward()  # of the inputs: the adapter is not trained
    model.train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    own = other.train()
    assert own.training and len(said("eval mode")) == 1


def test_a_loop_with_a_loss_of_its_own_in_eval_mode(said: Any) -> None:
    model = llama()
    model(input_ids=IDS).logits.square().mean().backward()
    assert len(said("eval mode")) == 1


@pytest.mark.parametrize("kind", ["tensor", "tuple", "object"])
def test_outputs_of_any_kind_in_eval_mode(kind: str, said: Any) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Any:
            y = self.query(x)
            return {"tensor": y, "tuple": (None, y), "object": SimpleNamespace(y=y)}[kind]

    model = fill(get_peft_model(Net(), BlobConfig(r=2, target_modules=["query"]))).eval()
    out = model(torch.ones(2, 4))
    y = {"tensor": out, "tuple": out[1:] if kind == "tuple" else None, "object": out}[kind]
    y = y[0] if kind == "tuple" else getattr(y, "y", y)
    y.sum().backward()
    assert len(said("eval mode")) == (kind != "object")  # whose parts are not known


def test_methods_without_noise_may_train_in_eval_mode(said: Any) -> None:
    bert(PolarConfig)(input_ids=IDS, labels=torch.tensor([0, 1])).loss.backward()
    model = bert(LoraConfig)
    batch = {"input_ids": IDS, "labels": torch.tensor([0, 1])}
    bayesianize(model, "laplace", data=[batch], progress=False)
    with drawn_weights(model):
        model(input_ids=IDS)
    assert not said("eval mode")


PACKED = torch.tensor([[0, 1, 2, 0, 1], [0, 1, 0, 1, 2]])


@pytest.mark.parametrize("method", DRAWING)
def test_packed_rows_with_a_draw_for_each_example(method: str, said: Any) -> None:
    model = llama(DRAWING[method], scope="example").train()
    padded = torch.tensor([[0, 0, 0, 1, 2], [0, 1, 2, 0, 0]])
    ones = torch.tensor([[1, 1, 0, 1, 2], [0, 1, 2, 1, 1]])  # as `generate` numbers padding
    for positions in (torch.arange(5).expand(2, 5), padded, ones):
        model(input_ids=IDS, position_ids=positions)
    assert not said("scope='example'")
    for _ in range(2):
        model(input_ids=IDS, position_ids=PACKED)
    assert len(said("scope='example'")) == 1
    one = llama(DRAWING[method], scope="none").train()
    one(input_ids=IDS, position_ids=PACKED)
    calm = llama(DRAWING[method], scope="example")
    calm(input_ids=IDS, position_ids=PACKED)  # the mean has no draws
    assert len(said("scope='example'")) == 1


# --- what is no batch ----------------------------------------------------------------------------


@pytest.mark.parametrize("make", [bert, lambda: bert(PolarVbllConfig), _plain_with_dropout])
@pytest.mark.parametrize("batch", ["text", ["text", "more"], IDS, None, 3])
def test_what_is_no_batch(make: Any, batch: Any) -> None:
    with pytest.raises(ValueError, match=r"predict: batch must be a mapping .* pass tokenizer\("):
        predict(make(), batch)


def test_a_data_set_of_texts() -> None:
    with pytest.raises(ValueError, match=r"got list; for texts pass tokenizer\("):
        predict_dataset(bert(), ["one text", "another"], progress=False)
