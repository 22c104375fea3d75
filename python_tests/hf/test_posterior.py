"""Which weights a pass uses: means, draws, flipped signs; contexts, generation."""

from __future__ import annotations

import asyncio
import copy
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import pytest
import tiny_models
import torch
from kept_draws import KeptDraws
from tiny_models import IDS, blob, logits
from torch import Tensor, nn

from bayes_kernels import functional, random
from bayes_kernels.hf import BlobConfig, fold_samples, posterior, predict, refresh_noise
from bayes_kernels.hf.layers import bayes_layers, noise_state
from hf.methods.test_scalabl import scalabl


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_train_samples_and_eval_does_not(kind: str) -> None:
    model = blob(kind)
    mean = logits(model)
    assert torch.equal(mean, logits(model))
    model.train()
    first, second = logits(model), logits(model)
    assert not torch.equal(first, second) and not torch.equal(first, mean)
    with posterior(model, "mean"):
        assert torch.equal(logits(model), mean)
    model.eval()
    assert torch.equal(logits(model), mean)
    with posterior(model, "sample", seed=3):
        draw = logits(model)
        assert torch.equal(draw, logits(model)) and not torch.equal(draw, mean)
        model.train()
        assert torch.equal(draw, logits(model))
        model.eval()
    with posterior(model, "flipout", seed=3):
        one, two = logits(model), logits(model)
    with posterior(model, "flipout", seed=3):
        assert torch.equal(one, logits(model))
    assert not torch.equal(one, two)


def test_contexts_nest_and_restore() -> None:
    model = blob()
    mean = logits(model)
    with posterior(model, "sample", seed=1):
        outer = logits(model)
        with pytest.raises(RuntimeError, match="inside"), posterior(model, "sample", seed=2):
            assert not torch.equal(outer, logits(model))
            raise RuntimeError("inside")
        assert torch.equal(outer, logits(model))
    assert torch.equal(mean, logits(model)) and noise_state(model).mode is None


def test_sample_at_inference() -> None:
    model = blob(sample_at_inference=True)
    first, second = logits(model), logits(model)
    assert not torch.equal(first, second)
    with posterior(model, "mean"):
        torch.testing.assert_close(logits(model), logits(blob()))
    # Deleting the only adapter that samples in eval mode lets the noise stand still again.
    other = blob()
    other.add_adapter("noisy", BlobConfig(target_modules=["q_proj"], sample_at_inference=True))
    assert noise_state(other).samples_in_eval
    other.delete_adapter("noisy")
    assert not noise_state(other).samples_in_eval
    # One coherent draw for the batch: equal examples get equal outputs.
    same = logits(model, IDS[:1].repeat(3, 1))
    torch.testing.assert_close(same[0], same[2])
    # A key-value cache keeps its draw while it grows.
    with torch.no_grad():
        out = model(input_ids=IDS[:, :3], use_cache=True)
        key = noise_state(model).keys[torch.device("cpu")]
        rest = model(input_ids=IDS[:, 3:], past_key_values=out.past_key_values)
        assert noise_state(model).keys[torch.device("cpu")] is key
        with posterior(model, "sample"):
            noise_state(model).set_key(key, set())
            whole = logits(model)
    torch.testing.assert_close(rest.logits, whole[:, 3:], rtol=1e-4, atol=1e-5)


def test_draws_are_coherent_and_depend_on_seed_and_number_only() -> None:
    model = blob()
    batch = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    with posterior(model, "sample", n_samples=4, seed=9):
        folded = logits(model, **_split(fold_samples(batch, 4))).unflatten(0, (4, 4))
    for s in range(4):
        with posterior(model, "sample", seed=9, first_sample=s):
            torch.testing.assert_close(logits(model), folded[s], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(
                logits(model, IDS[1:2])[0], folded[s, 1], rtol=1e-4, atol=1e-5
            )
    # Draw 2 is the mean path of an adapter whose A is that draw.
    other = copy.deepcopy(model)
    with torch.no_grad():
        for item in bayes_layers(other):
            item.mean.copy_(item.factors(2, seed=9)[0])
    torch.testing.assert_close(logits(other), folded[2], rtol=1e-4, atol=1e-5)
    assert (folded[0] - folded[1]).abs().max() > 0.05
    with posterior(model, "sample", n_samples=3), pytest.raises(ValueError, match="fold_samples"):
        logits(model)


def _split(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}


def test_statistics_of_draws() -> None:
    """Mean and deviation of draws of one layer's A over numbers and seeds."""
    item = bayes_layers(blob())[0]
    draws = torch.stack([item.factors(s, seed)[0] for s in range(8) for seed in range(150)])
    omega = 0.4**2
    error = (draws.mean(0) - item.mean).abs().max()
    assert error < 4.5 * omega / 1200**0.5
    assert abs((draws - item.mean).std().item() / omega - 1) < 0.01


def test_inference_mode_leaves_training_possible() -> None:
    model = blob(sample_at_inference=True)
    with torch.inference_mode():
        model(input_ids=IDS)
        with posterior(model, "sample"):
            model(input_ids=IDS)
        refresh_noise(model, step=1)
    assert not any(key.is_inference() for key in noise_state(model).keys.values())
    bayes_layers(model)[0].layer.train()(torch.randn(2, 32, requires_grad=True)).sum().backward()


GREEDY: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def test_generate_keeps_one_draw() -> None:
    model = blob()
    with posterior(model, "sample", seed=1):
        one, two = (model.generate(input_ids=IDS, max_new_tokens=4, **GREEDY) for _ in range(2))
        ids = IDS
        for _ in range(4):
            ids = torch.cat([ids, logits(model, ids)[:, -1:].argmax(-1)], 1)
    assert torch.equal(one, two) and torch.equal(one, ids)


def test_generate_keeps_the_numbers_of_its_noise(kept_draws: KeptDraws) -> None:
    """Within one generated text each layer draws twice, and finds its numbers for all other tokens."""
    model = blob()
    layers = len(bayes_layers(model))

    def generated() -> Tensor:
        with posterior(model, "flipout", seed=1):
            return model.generate(input_ids=IDS, max_new_tokens=6, **GREEDY)

    kept_draws.forget(0)
    expected = generated()
    assert kept_draws.known == 0
    kept_draws.forget(64 << 20)
    assert torch.equal(generated(), expected)
    assert kept_draws.known == layers and kept_draws.hits == 4 * layers  # 6 passes
    generated()  # the same key again
    assert kept_draws.hits == 10 * layers


@pytest.mark.parametrize("how", ["one draw", "a draw for each row", "sample_at_inference"])
def test_generate_keeps_the_factors_of_its_draws(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each layer draws for the prompt and for the first token; another text, or weights, draw anew."""
    ids = IDS.repeat(1, 6)  # more than a few tokens
    model = blob(sample_at_inference=how == "sample_at_inference")
    layers, drawn = len(bayes_layers(model)), []
    for name in ("gaussian_draws", "sampled_lora"):
        function = getattr(functional, name)
        monkeypatch.setattr(
            functional, name, lambda *a, f=function, **k: (drawn.append(1), f(*a, **k))[1]
        )
    options = {"draws": [0, 1, 2, 1]} if how == "a draw for each row" else {"first_sample": 3}

    def generated(tokens: int = 6) -> Tensor:
        context = nullcontext() if how == "sample_at_inference" else posterior(model, **options)
        drawn.clear()
        with context:
            return model.generate(input_ids=ids, max_new_tokens=tokens, **GREEDY)

    first = generated()
    assert len(drawn) == 2 * layers
    second = generated()
    assert len(drawn) == 2 * layers
    monkeypatch.setenv("BAYES_KERNELS_KEPT_DRAWS", "0")
    third = generated()
    assert len(drawn) == 6 * layers
    assert noise_state(model).current().kept == {}
    if how != "sample_at_inference":
        assert torch.equal(first, second) and torch.equal(first, third)


def test_kept_factors_follow_the_weights() -> None:
    model = blob()
    item = bayes_layers(model)[0]
    x = torch.randn(1, 2, 32, generator=torch.Generator().manual_seed(5))

    def fresh() -> Tensor:
        with posterior(model, seed=1):
            return item.layer(x)

    with torch.no_grad(), posterior(model, seed=1):
        for change in (lambda: item.mean.add_(1), lambda: item.rho.mul_(2)):
            before = item.layer(x)
            assert torch.equal(item.layer(x), before)
            change()
            assert torch.equal(item.layer(x), fresh()) and not torch.equal(item.layer(x), before)
        before = item.layer(x)
        with torch.inference_mode():
            torch.testing.assert_close(item.layer(x), before)
        noise_state(model).set_key(random.key(2), set())
        assert not torch.equal(item.layer(x), before)


def test_posterior_errors() -> None:
    model = blob()
    for options in (
        {"mode": "draw"},
        {"n_samples": 0},
        {"mode": "mean", "n_samples": 2},
        {"first_sample": -1},
        {"kind": "pairs"},
        {"scope": "none"},
        {"draws": []},
        {"draws": 5},
        {"draws": [0.5]},
        {"draws": [True, -1]},
        {"draws": torch.tensor([1.0])},
        {"draws": torch.tensor([[1]])},
        {"draws": [0, 1], "n_samples": 2},
        {"draws": [0, 1], "first_sample": 2},
        {"draws": [0, 1], "mode": "mean"},
    ):
        with pytest.raises(ValueError, match="posterior: "), posterior(model, **options):
            pass
    with (
        pytest.raises(ValueError, match="must have a Bayesian adapter"),
        posterior(nn.Linear(1, 1)),
    ):
        pass


# --- draws addressed by row ----------------------------------------------------------------------

KINDS = ("antithetic", "independent", "shared")


def single(model: Any, draw: int, ids: Tensor = IDS, **options: Any) -> Tensor:
    """Logits of one draw."""
    with posterior(model, "sample", first_sample=draw, **options):
        return logits(model, ids)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", [blob, scalabl])
def test_each_row_has_the_draw_of_its_number(make: Any, kind: str) -> None:
    model, numbers = make("llama"), [5, 0, 2, 5]
    alone = {d: single(model, d, seed=3, kind=kind) for d in set(numbers)}
    for given in (numbers, tuple(numbers), torch.tensor(numbers), torch.tensor(numbers).int()):
        with posterior(model, draws=given, seed=3, kind=kind):
            found = logits(model)
            twice = logits(model, IDS.repeat_interleave(3, 0))  # copies of a row have its draw
        for row, d in enumerate(numbers):
            torch.testing.assert_close(found[row], alone[d][row], rtol=1e-4, atol=1e-5)
            for copied in twice.unflatten(0, (4, 3))[row]:
                torch.testing.assert_close(copied, found[row], rtol=1e-4, atol=1e-5)
    assert (alone[5] - alone[0]).abs().max() > 1e-3
    with (
        posterior(model, draws=[0, 1, 2]),
        pytest.raises(ValueError, match="copies of the examples"),
    ):
        logits(model)


@pytest.mark.parametrize("make", [blob, scalabl])
def test_pairs_of_draws_are_opposite(make: Any) -> None:
    """The mean factor lies between the two draws of a pair; other kinds have no pairs."""
    model = make("llama")
    for item in bayes_layers(model):
        first, second, third = (item.factors(d, seed=4)[0] for d in (6, 7, 8))
        mean = item.factors()[0]
        torch.testing.assert_close((first + second) / 2, mean, rtol=1e-4, atol=1e-6)
        assert ((first + third) / 2 - mean).abs().max() > 1e-3
    x = torch.randn(1, 3, 32, generator=torch.Generator().manual_seed(5))
    layer = bayes_layers(model)[0].layer

    def output(draw: int, kind: str) -> Tensor:
        with torch.no_grad(), posterior(model, first_sample=draw, kind=kind):
            return layer(x)

    for kind in KINDS:
        middle = (output(0, kind) + output(1, kind)) / 2
        with torch.no_grad():
            opposite = torch.allclose(middle, layer(x), atol=1e-5)
        assert opposite == (kind == "antithetic")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", [blob, scalabl])
def test_variance_of_draws_is_that_of_the_posterior(make: Any, kind: str) -> None:
    """Over 2,000 draws of one layer's output, which is linear in the random factor."""
    model = make("llama")
    item = bayes_layers(model)[0]
    x = torch.randn(1, 1, 32, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        mean = item.layer(x)
        with posterior(model, n_samples=2000, kind=kind):
            draws = (item.layer(x.expand(2000, -1, -1)) - mean)[:, 0].double()
        factors = torch.stack([item.factors(d)[0] for d in range(0, 2000, 2)])
        deviation = (factors.double() - item.factors()[0].double()).square().mean(0).sqrt()
        if make is blob:
            omega = item.rho.double().square()
            torch.testing.assert_close(deviation, omega, rtol=0.2, atol=0)
            assert abs(deviation.mean() / omega.mean() - 1) < 0.01
            b = item.layer.lora_B["default"].weight.double()
            rank_variance = (omega.square() * x[0, 0].double().square()).sum(-1)
            expected = (item.layer.scaling["default"] * b).square() @ rank_variance
            # |eps| of shared draws is one for all: a sample variance about the conditional one.
            tolerance = 0.75 if kind == "shared" else 0.15
            torch.testing.assert_close(draws.var(0), expected, rtol=tolerance, atol=0)
    assert draws.mean(0).abs().max() < 5 * draws.std(0).max() / 2000**0.5


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("make", [blob, scalabl])
def test_copies_that_generate_makes_keep_the_draw_of_their_prompt(make: Any, beams: int) -> None:
    """Return sequences and beams of each prompt equal those of its draw alone."""
    model = make("llama")
    prompts, numbers = IDS[:2], [1, 2]
    options = {"max_new_tokens": 5, "num_beams": 2 * beams, "num_return_sequences": 2, **GREEDY}
    options.update(output_scores=True, return_dict_in_generate=True)
    with posterior(model, draws=numbers, seed=1):
        together = model.generate(input_ids=prompts, **options)
    for row, d in enumerate(numbers):
        with posterior(model, first_sample=d, seed=1):
            alone = model.generate(input_ids=prompts[row : row + 1], **options)
        assert torch.equal(together.sequences.unflatten(0, (2, 2))[row], alone.sequences)
    with posterior(model, n_samples=2, first_sample=1, seed=1):
        folded = model.generate(input_ids=prompts, **options)  # two copies of "one prompt"
    assert torch.equal(folded.sequences, together.sequences)
    with (
        posterior(model, n_samples=4),
        pytest.raises(ValueError, match="generate: under posterior"),
    ):
        model.generate(input_ids=prompts, **options)


def test_return_sequences_of_one_prompt_may_have_a_draw_each() -> None:
    model = blob()
    with posterior(model, n_samples=3, seed=1):
        options = {**GREEDY, "do_sample": True, "top_k": 1}  # greedy, in three copies
        found = model.generate(
            input_ids=IDS[:1], max_new_tokens=4, num_return_sequences=3, **options
        )
    for d in range(3):
        with posterior(model, first_sample=d, seed=1):
            alone = model.generate(input_ids=IDS[:1], max_new_tokens=4, **GREEDY)
        assert torch.equal(found[d], alone[0])


@pytest.mark.parametrize("draw", [0, 3])
@pytest.mark.parametrize("way", ["static cache", "assistant", "adapted assistant", "lookup"])
def test_ways_to_generate_keep_the_draw(way: str, draw: int) -> None:
    """An assistant proposes tokens, with a seed of its own if it has draws; the draw decides."""
    model, other = blob(), blob()
    assistant = tiny_models.llama(eos_token_id=None, pad_token_id=0)
    options: dict[str, Any] = {
        "static cache": {"cache_implementation": "static"},
        "assistant": {"assistant_model": assistant},
        "adapted assistant": {"assistant_model": other},
        "lookup": {"prompt_lookup_num_tokens": 3},
    }[way]
    with posterior(model, draws=[draw], seed=1), posterior(other, seed=9):
        plain = model.generate(input_ids=IDS[:1], max_new_tokens=6, **GREEDY)
        found = model.generate(input_ids=IDS[:1], max_new_tokens=6, **GREEDY, **options)
    assert torch.equal(found, plain)


# --- threads and tasks ---------------------------------------------------------------------------


@pytest.mark.parametrize("make", [blob, scalabl])
def test_threads_have_their_own_draws(make: Any) -> None:
    """Eight threads with eight seeds, many times each, on one model at the same time."""
    model = make("llama")
    expected = [single(model, seed, seed=seed) for seed in range(8)]
    barrier = threading.Barrier(8)

    def run(seed: int) -> bool:
        barrier.wait()
        right = True
        for _ in range(5):
            found = single(model, seed, seed=seed)
            right &= torch.allclose(found, expected[seed], rtol=1e-4, atol=1e-5)
        return right

    with ThreadPoolExecutor(8) as pool, posterior(model, "mean"):
        assert all(pool.map(run, range(8)))


def test_tasks_have_their_own_draws() -> None:
    """Tasks of one thread that take turns inside their contexts."""
    model = blob()
    expected = [single(model, 0, seed=seed) for seed in range(3)]

    async def run(seed: int) -> None:
        with posterior(model, seed=seed):
            for _ in range(3):
                await asyncio.sleep(0)
                torch.testing.assert_close(logits(model), expected[seed], rtol=1e-4, atol=1e-5)

    async def together() -> None:
        await asyncio.gather(*(run(seed) for seed in range(3)))

    asyncio.run(together())
    assert noise_state(model).mode is None


def test_a_generator_that_ends_elsewhere_leaves_nothing_behind() -> None:
    """Web servers take the parts of an answer in threads of a pool."""
    model = blob()

    def parts() -> Iterator[int]:
        with posterior(model, seed=1):
            yield 1
            yield 2

    running = parts()
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(next, running).result() == 1
        assert pool.submit(lambda: noise_state(model).mode).result() == "sample"
        assert noise_state(model).mode is None
        running.close()
        assert pool.submit(lambda: noise_state(model).mode).result() is None


def test_replicas_in_threads_are_refused() -> None:
    model = blob()
    wrapped = nn.DataParallel(model)
    wrapped.device_ids = [0, 1]
    with pytest.raises(ValueError, match="must not be DataParallel"), posterior(wrapped):
        pass
    expected = predict(model, {"input_ids": IDS}, n_samples=2, choices=[1, 2])
    found = predict(wrapped, {"input_ids": IDS}, n_samples=2, choices=[1, 2])
    assert torch.equal(found.log_probs, expected.log_probs)


def test_models_do_not_see_each_others_contexts() -> None:
    one, two = blob(), blob()
    with posterior(one, seed=1), posterior(two, "mean"):
        assert (noise_state(one).mode, noise_state(two).mode) == ("sample", "mean")
        copied = copy.deepcopy(one)
        assert noise_state(copied).mode is None
