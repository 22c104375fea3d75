"""Generation with several draws in lockstep, against explicit averaging without a cache."""

from __future__ import annotations

import concurrent.futures
import math
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from tiny_models import adapted, answering_llama, fill, llama, t5, trained
from tokenizers import processors
from torch import Tensor, nn
from transformers.generation import TextStreamer

from bayes_kernels import random
from bayes_kernels.hf import (
    BlobConfig,
    Ensemble,
    PolarConfig,
    PolarVbllConfig,
    ScalablConfig,
    bayesianize,
    drawn_weights,
    generate,
    posterior,
    predict,
    predict_tokens,
    score_answers,
    score_texts,
)
from bayes_kernels.hf.decoding import Mean
from bayes_kernels.hf.methods.dropout import dropout_draws
from hf.letters import letters, single_bytes

pytestmark = pytest.mark.cpu_only

TOKENIZER = letters()
PROMPTS = ["be", "A", "no way"]
SEED = 3


def sharp() -> Any:
    """A base in fp64 whose distributions are not flat."""
    return llama(initializer_range=0.2).double()


def model_of() -> Any:
    """A BLoB adapter in fp64 whose draws differ, without an end token."""
    model = fill(adapted(sharp()), rho=0.6, scale=1.0).eval()
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture(scope="module")
def model() -> Any:
    return model_of()


Weights = Callable[[nn.Module, int], Any]


def one_draw(model: nn.Module, draw: int) -> Any:
    return posterior(model, "sample", seed=SEED, first_sample=draw)


@torch.no_grad()
def distributions(model: Any, ids: list[int], draws: int, weights: Weights = one_draw) -> Tensor:
    """(S, V) log-probabilities of the next token, each draw alone, without a cache."""
    found = []
    for draw in range(draws):
        with weights(model, draw):
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits
        found.append(logits[0, -1].double().log_softmax(-1))
    return torch.stack(found)


def numbers(log_probs: Tensor, token: int) -> tuple[float, float, float]:
    """log-probability of the mean, its entropy and the mean entropy, in plain formulas."""
    probs = log_probs.exp()
    mean = probs.mean(0)
    entropy = -(mean * mean.log()).sum()
    return float(mean[token].log()), float(entropy), float(-(probs * log_probs).sum(-1).mean())


def check_numbers(
    model: Any, found: Any, prompt: list[int], draws: int, weights: Weights = one_draw
) -> None:
    """All numbers of a text are those of explicit averaging."""
    ids = list(prompt)
    rows = []
    for token in found.token_ids:
        rows.append(numbers(distributions(model, ids, draws, weights), token))
        ids.append(token)
    expected = torch.tensor(rows, dtype=torch.float64)
    got = [found.log_probs, found.entropy, found.expected_entropy]
    torch.testing.assert_close(
        torch.tensor(got, dtype=torch.float64).T, expected, rtol=0, atol=1e-10
    )


def explicit(
    model: Any, prompt: list[int], draws: int, steps: int, choose: Callable[[Tensor], int]
) -> list[int]:
    """Tokens chosen one by one from the mean of the draws' probabilities."""
    ids = list(prompt)
    for _ in range(steps):
        ids.append(choose(distributions(model, ids, draws).exp().mean(0)))
    return ids[len(prompt) :]


def encoded(prompt: str) -> list[int]:
    return TOKENIZER(prompt)["input_ids"]


@pytest.mark.parametrize("draws", [1, 4])
def test_greedy_search_is_explicit_averaging(model: Any, draws: int) -> None:
    found = generate(model, TOKENIZER, PROMPTS, n_samples=draws, seed=SEED, max_new_tokens=6)
    for text, prompt in zip(found, PROMPTS, strict=True):
        ids = encoded(prompt)
        assert text.token_ids == explicit(model, ids, draws, 6, lambda p: int(p.argmax()))
        check_numbers(model, text, ids, draws)
        assert prompt + text.text == TOKENIZER.decode(ids + text.token_ids)
        assert "".join(text.tokens) == text.text and not text.stopped
    if draws > 1:  # the draws matter
        assert max(text.max_mutual_information for text in found) > 0.05


@pytest.mark.parametrize("kind", ["independent", "shared"])
def test_other_draws(model: Any, kind: str) -> None:
    def weights(model: nn.Module, draw: int) -> Any:
        return posterior(model, "sample", seed=SEED, first_sample=draw, kind=kind)

    options = {"n_samples": 3, "seed": SEED, "draws": kind}
    found = generate(model, TOKENIZER, PROMPTS[:1], max_new_tokens=3, **options)[0]
    check_numbers(model, found, encoded(PROMPTS[0]), 3, weights)
    again = score_texts(model, TOKENIZER, found.text, prompts=PROMPTS[0], **options)[0]
    assert again.entropy == pytest.approx(found.entropy, abs=1e-10)
    other = generate(model, TOKENIZER, PROMPTS[:1], n_samples=3, seed=SEED, max_new_tokens=3)[0]
    assert other.entropy != pytest.approx(found.entropy, abs=1e-4)


@pytest.mark.parametrize(("kind", "group"), [("antithetic", 2), ("independent", 1)])
def test_mutual_information_is_corrected_for_few_draws(model: Any, kind: str, group: int) -> None:
    """As it is for predictions of answers: the variance of the mean of independent draws or pairs."""

    def weights(model: nn.Module, draw: int) -> Any:
        return posterior(model, "sample", seed=SEED, first_sample=draw, kind=kind)

    options = {"seed": SEED, "draws": kind, "max_new_tokens": 2}
    found = generate(model, TOKENIZER, PROMPTS[:1], n_samples=6, **options)[0]
    ids = encoded(PROMPTS[0])
    for i, token in enumerate(found.token_ids):
        probs = distributions(model, ids, 6, weights).exp()
        independent = probs.unflatten(0, (-1, group)).mean(1)
        variance = independent.var(0) / len(independent)
        bias = float((variance / (2 * probs.mean(0))).sum())
        assert found.entropy_bias[i] == pytest.approx(bias, abs=1e-10) and bias > 1e-4
        corrected = found.corrected_mutual_information[i]
        assert corrected == pytest.approx(found.mutual_information[i] + bias, abs=1e-10)
        ids.append(token)
    single = generate(model, TOKENIZER, PROMPTS[:1], n_samples=group, **options)[0]
    assert single.corrected_mutual_information is None


def test_the_mean_is_plain_generation(model: Any) -> None:
    found = generate(model, TOKENIZER, PROMPTS[0], n_samples=0, max_new_tokens=5)[0]
    ids = torch.tensor([encoded(PROMPTS[0])])
    with posterior(model, "mean"):
        plain = model.generate(input_ids=ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert found.token_ids == plain[0, len(ids[0]) :].tolist()
    check_numbers(model, found, ids[0].tolist(), 1, lambda m, _: posterior(m, "mean"))
    assert found.mutual_information is None and found.max_mutual_information is None
    assert found.abstain_on == "max_entropy" and found.expected_entropy == found.entropy


def uniforms(text: int, steps: int) -> list[float]:
    """The random numbers of a text."""
    key = random.fold_in(random.key(SEED), -1 - text)
    generator = torch.Generator().manual_seed(int(key[0]))
    return [torch.rand(1, generator=generator, dtype=torch.float64).item() for _ in range(steps)]


def test_sampling_is_explicit_averaging(model: Any) -> None:
    options = {"n_samples": 4, "seed": SEED, "max_new_tokens": 5, "do_sample": True}
    warped = {"temperature": 1.7, "top_p": 0.9, "top_k": 0}
    found = generate(model, TOKENIZER, PROMPTS, num_return_sequences=2, **options, **warped)

    def choose_with(numbers: list[float]) -> Callable[[Tensor], int]:
        left = iter(numbers)

        def choose(probs: Tensor) -> int:
            warm = (probs.log() / 1.7).softmax(-1)
            order = warm.argsort(descending=True)
            before = warm[order].cumsum(0) - warm[order]
            warm[order[before >= 0.9]] = 0.0
            return int((warm.cumsum(0) <= next(left) * warm.sum()).sum())

        return choose

    for i, text in enumerate(found):
        ids = encoded(PROMPTS[i // 2])
        assert text.token_ids == explicit(model, ids, 4, 5, choose_with(uniforms(i, 5)))
        check_numbers(model, text, ids, 4)
    assert len({tuple(text.token_ids) for text in found}) == 6
    state = torch.random.get_rng_state()
    again = generate(
        model, TOKENIZER, PROMPTS, num_return_sequences=2, batch_size=1, **options, **warped
    )
    assert [text.token_ids for text in again] == [text.token_ids for text in found]
    assert torch.equal(torch.random.get_rng_state(), state)


def test_sampling_follows_the_mean_distribution(model: Any) -> None:
    found = generate(
        model, TOKENIZER, "be", n_samples=2, seed=SEED, max_new_tokens=1, do_sample=True,
        top_k=0, num_return_sequences=2000,
    )  # fmt: skip
    counts = torch.bincount(torch.tensor([text.token_ids[0] for text in found]), minlength=64)
    probs = distributions(model, encoded("be"), 2).exp().mean(0)
    deviations = (counts - 2000 * probs) / (2000 * probs * (1 - probs)).sqrt()
    assert deviations.abs().max() < 4.5


def explicit_beams(model: Any, prompt: list[int], draws: int, beams: int, steps: int) -> Any:
    """The best texts of a beam search over the mean distribution, without end tokens."""
    running = [(0.0, prompt)]
    for _ in range(steps):
        longer = []
        for score, ids in running:
            mean = distributions(model, ids, draws).exp().mean(0).log()
            longer += [(score + float(lp), [*ids, token]) for token, lp in enumerate(mean)]
        running = sorted(longer, key=lambda one: -one[0])[:beams]
    return running


def test_beam_search_is_explicit_averaging(model: Any) -> None:
    found = generate(
        model, TOKENIZER, PROMPTS, n_samples=4, seed=SEED, max_new_tokens=4, num_beams=3,
        num_return_sequences=2,
    )  # fmt: skip
    for i, prompt in enumerate(PROMPTS):
        ids = encoded(prompt)
        best = explicit_beams(model, ids, 4, 3, 4)
        for text, (score, expected) in zip(found[2 * i : 2 * i + 2], best, strict=False):
            assert text.token_ids == expected[len(ids) :]
            assert text.log_prob == pytest.approx(score, abs=1e-9)
            check_numbers(model, text, ids, 4)


@pytest.mark.parametrize("beams", [1, 4])
def test_texts_end_at_their_own_end(beams: int) -> None:
    """Rows that have ended are padded while others go on; what is noted ends with them."""
    model = model_of()
    options = {"n_samples": 3, "seed": SEED, "max_new_tokens": 12, "num_beams": beams}
    free = generate(model, TOKENIZER, PROMPTS, **options)
    ends = {text.token_ids[2 + i] for i, text in enumerate(free)}
    found = generate(model, TOKENIZER, PROMPTS, eos_token_id=sorted(ends), **options)
    assert len({len(text.token_ids) for text in found}) > 1
    for text, prompt in zip(found, PROMPTS, strict=True):
        assert text.stopped == (text.token_ids[-1] in ends)
        assert not ends & set(text.token_ids[:-1])
        assert text.stopped or len(text.token_ids) == 12
        check_numbers(model, text, encoded(prompt), 3)


def test_stop_strings(model: Any) -> None:
    options = {"n_samples": 3, "seed": SEED, "max_new_tokens": 8}
    free = generate(model, TOKENIZER, PROMPTS, **options)
    word = free[0].text[1:4]
    found = generate(model, TOKENIZER, PROMPTS, stop_strings=word, **options)
    assert found[0].text.endswith(word) and found[0].stopped
    assert found[0].token_ids == free[0].token_ids[: len(found[0].token_ids)]
    assert len(found[0].token_ids) < 8


def test_threads_write_with_one_model(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has its own seed; all write at the same time, with waits where one could take another's."""
    wait = Mean.__call__

    def slow(self: Mean, *args: Any) -> Tensor:
        time.sleep(0.002)
        return wait(self, *args)

    monkeypatch.setattr(Mean, "__call__", slow)
    begin = threading.Barrier(4)

    def write(seed: int) -> Any:
        begin.wait()
        return generate(model, TOKENIZER, PROMPTS, n_samples=3, seed=seed, max_new_tokens=6)

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        together = list(pool.map(write, range(4)))
    for seed, texts in enumerate(together):
        alone = generate(model, TOKENIZER, PROMPTS, n_samples=3, seed=seed, max_new_tokens=6)
        for a, b in zip(texts, alone, strict=True):
            assert a.token_ids == b.token_ids
            assert a.entropy == pytest.approx(b.entropy, abs=1e-10)


def test_results_do_not_depend_on_the_batch(model: Any) -> None:
    options = {"n_samples": 3, "seed": SEED, "max_new_tokens": 4}
    together = generate(model, TOKENIZER, PROMPTS, **options)
    one_by_one = generate(model, TOKENIZER, PROMPTS, batch_size=1, **options)
    for a, b in zip(together, one_by_one, strict=True):
        assert a.token_ids == b.token_ids
        assert a.entropy == pytest.approx(b.entropy, abs=1e-12)


def test_penalties_act_on_the_mean(model: Any) -> None:
    """Forbidden tokens leave the numbers of the mean distribution as they are."""
    options = {"n_samples": 3, "seed": SEED, "max_new_tokens": 4}
    first = generate(model, TOKENIZER, PROMPTS[0], **options)[0].token_ids[0]
    found = generate(model, TOKENIZER, PROMPTS[0], suppress_tokens=[first], **options)[0]

    def choose(probs: Tensor) -> int:
        allowed = probs.clone()
        allowed[first] = 0
        return int(allowed.argmax())

    assert found.token_ids == explicit(model, encoded(PROMPTS[0]), 3, 4, choose)
    check_numbers(model, found, encoded(PROMPTS[0]), 3)


def test_static_cache(model: Any) -> None:
    options = {"n_samples": 3, "seed": SEED, "max_new_tokens": 4}
    a = generate(model, TOKENIZER, PROMPTS, **options)
    b = generate(model, TOKENIZER, PROMPTS, cache_implementation="static", **options)
    assert [text.token_ids for text in a] == [text.token_ids for text in b]


def test_streaming(model: Any, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"n_samples": 3, "seed": SEED, "max_new_tokens": 5}
    seen: list[Any] = []
    found = generate(model, TOKENIZER, PROMPTS, streamer=seen.append, batch_size=2, **options)
    for number, text in enumerate(found):
        tokens = [token for token in seen if token.sequence == number]
        assert [token.token_id for token in tokens] == text.token_ids
        assert [token.text for token in tokens] == text.tokens
        assert [token.log_prob for token in tokens] == text.log_probs
        assert [token.mutual_information for token in tokens] == text.mutual_information
    seen.clear()
    drawn = {"do_sample": True, "num_return_sequences": 2, **options}
    found = generate(model, TOKENIZER, PROMPTS, streamer=seen.append, **drawn)
    for number, text in enumerate(found):
        ids = [token.token_id for token in seen if token.sequence == number]
        assert ids == text.token_ids
    found = generate(model, TOKENIZER, PROMPTS[0], **options)
    stock = TextStreamer(TOKENIZER, skip_prompt=True)
    generate(model, TOKENIZER, PROMPTS[0], streamer=stock, **options)
    assert capsys.readouterr().out.strip() == found[0].text.strip()


def test_streams_have_the_last_bytes() -> None:
    """Tokens of single bytes: a text may end within a character."""
    base = llama(vocab_size=258, initializer_range=0.2)
    model = fill(adapted(base), rho=0.6, scale=1.0).eval()
    seen: list[Any] = []
    found = generate(
        model, single_bytes(), ["a", "b"], n_samples=2, do_sample=True, num_return_sequences=4,
        max_new_tokens=3, eos_token_id=None, streamer=seen.append,
    )  # fmt: skip
    for number, text in enumerate(found):
        assert [token.text for token in seen if token.sequence == number] == text.tokens
    assert any(text.text.endswith("\ufffd") for text in found)


def test_conversations(model: Any) -> None:
    options = {"n_samples": 2, "seed": SEED, "max_new_tokens": 3}
    text = generate(model, TOKENIZER, "user: be.", **options)[0]
    messages = [{"role": "user", "content": "be"}]
    for prompts, chat in ((messages, None), ([messages], True), ("be", True)):
        found = generate(model, TOKENIZER, prompts, chat=chat, **options)
        assert len(found) == 1 and found[0].token_ids == text.token_ids
        assert found[0].prompt == "user: be."
    begins = letters()  # with a token that begins every text, as the template does
    begins.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    begins.chat_template = "<s>" + begins.chat_template
    text = generate(model, begins, "user: be.", **options)[0]
    assert generate(model, begins, messages, **options)[0].token_ids == text.token_ids
    with pytest.raises(ValueError, match="chat must be True or None for messages, got False"):
        generate(model, TOKENIZER, messages, chat=False)
    with pytest.raises(ValueError, match="must have a chat template"):
        generate(model, letters(chat=False), messages)


def test_abstaining(model: Any) -> None:
    options = {"n_samples": 3, "seed": SEED, "max_new_tokens": 3}
    free = generate(model, TOKENIZER, PROMPTS, **options)
    assert not any(text.abstained for text in free)
    order = sorted(text.max_mutual_information for text in free)
    found = generate(model, TOKENIZER, PROMPTS, abstain_above=order[1], **options)
    assert [text.abstained for text in found] == [
        text.max_mutual_information > order[1] for text in free
    ]
    found = generate(
        model, TOKENIZER, PROMPTS, abstain_above=0.0, abstain_on="mean_entropy", **options
    )
    assert all(text.abstained for text in found)
    content = found[0].to_dict()
    assert content["abstained"] is True and content["mean_entropy"] == found[0].mean_entropy


def test_scores_of_a_text(model: Any) -> None:
    found = generate(model, TOKENIZER, PROMPTS[0], n_samples=3, seed=SEED, max_new_tokens=4)[0]
    mean = sum(found.log_probs) / 4
    assert found.log_prob == pytest.approx(4 * mean) and found.mean_log_prob == pytest.approx(mean)
    assert found.perplexity == pytest.approx(math.exp(-mean))
    assert found.max_entropy == max(found.entropy)
    doubt = [a - b for a, b in zip(found.entropy, found.expected_entropy, strict=True)]
    assert found.mutual_information == pytest.approx(doubt, abs=1e-12)
    assert found.max_mutual_information == pytest.approx(max(doubt))
    assert found.mean_mutual_information == pytest.approx(sum(doubt) / 4)


def test_texts_that_are_given(model: Any) -> None:
    """score_texts has the numbers that generation had for the same tokens."""
    options = {"n_samples": 3, "seed": SEED}
    made = generate(model, TOKENIZER, PROMPTS, max_new_tokens=20, **options)
    found = score_texts(model, TOKENIZER, [text.text for text in made], prompts=PROMPTS, **options)
    for a, b in zip(found, made, strict=True):
        assert a.token_ids == b.token_ids and a.text == b.text
        assert a.log_probs == pytest.approx(b.log_probs, abs=1e-10)
        assert a.expected_entropy == pytest.approx(b.expected_entropy, abs=1e-10)
    alone = score_texts(model, TOKENIZER, PROMPTS[2], **options)[0]
    assert alone.token_ids == encoded(PROMPTS[2])[1:]
    check_numbers(model, alone, encoded(PROMPTS[2])[:1], 3)
    with pytest.raises(ValueError, match=r"that another comes before, got ''"):
        score_texts(model, TOKENIZER, "")
    with pytest.raises(ValueError, match="one for each of 1 texts, got 2"):
        score_texts(model, TOKENIZER, "A", prompts=["a", "b"])


# --- Other adapters ------------------------------------------------------------------------------


def check_method(
    model: Any, draws: int, weights: Weights, n_samples: int | None = None, **options: Any
) -> None:
    found = generate(
        model, TOKENIZER, PROMPTS[:2], n_samples=n_samples or draws, seed=SEED, max_new_tokens=4,
        eos_token_id=None, **options,
    )  # fmt: skip
    assert max(text.max_mutual_information for text in found) > 1e-3
    for text, prompt in zip(found, PROMPTS, strict=False):
        check_numbers(model, text, encoded(prompt), draws, weights)


@pytest.mark.parametrize("beams", [1, 2])
def test_scalabl(beams: int) -> None:
    model = fill(adapted(sharp(), ScalablConfig)).eval()
    check_method(model, 3, one_draw, num_beams=beams)


@pytest.mark.parametrize("beams", [1, 2])
def test_dropout_has_one_mask_for_each_draw(beams: int) -> None:
    model = fill(adapted(sharp(), peft.LoraConfig, lora_dropout=0.3), rho=None, scale=1.0).eval()

    def weights(model: nn.Module, draw: int) -> Any:
        return dropout_draws(model, n_samples=1, seed=SEED, first_sample=draw, scope="none")

    check_method(model, 3, weights, num_beams=beams)


@pytest.mark.parametrize("beams", [1, 2])
def test_ensemble(beams: int) -> None:
    model = fill(adapted(sharp(), peft.LoraConfig), rho=None, scale=1.0)
    names = ["default", "other"]
    model.add_adapter(names[1], model.peft_config[names[0]])
    fill(model, rho=None, scale=1.0)  # other numbers for both
    ensemble = Ensemble([model.eval()], names)

    class Member:
        def __init__(self, name: str) -> None:
            self.name = name

        def __enter__(self) -> None:
            model.set_adapter(self.name)

        def __exit__(self, *_: object) -> None:
            model.set_adapter("default")

    found = generate(
        ensemble, TOKENIZER, PROMPTS[:2], seed=SEED, max_new_tokens=4, num_beams=beams,
        eos_token_id=None,
    )  # fmt: skip
    assert found[0].n_samples == 2 and found[0].max_mutual_information > 1e-3
    for text, prompt in zip(found, PROMPTS, strict=False):
        check_numbers(model, text, encoded(prompt), 2, lambda _, draw: Member(names[draw]))


def test_encoder_decoder() -> None:
    model = fill(adapted(t5(initializer_factor=0.5), BlobConfig), 0.6).double().eval()
    found = generate(
        model, TOKENIZER, PROMPTS, n_samples=3, seed=SEED, max_new_tokens=4, num_beams=2
    )
    assert max(text.max_mutual_information for text in found) > 1e-3
    for text, prompt in zip(found, PROMPTS, strict=True):
        ids = torch.tensor([encoded(prompt)])
        decoded = torch.tensor([[0, *text.token_ids[:-1]]])
        parts = []
        for draw in range(3):
            with torch.no_grad(), one_draw(model, draw):
                logits = model(input_ids=ids, decoder_input_ids=decoded).logits
            parts.append(logits[0].log_softmax(-1))
        for i, token in enumerate(text.token_ids):
            expected = numbers(torch.stack(parts)[:, i], token)
            got = (text.log_probs[i], text.entropy[i], text.expected_entropy[i])
            assert got == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("name", ["stories260K", "stories3M"])
@pytest.mark.parametrize("beams", [1, 3])
def test_real_models(models_dir: Path, name: str, beams: int) -> None:
    base = transformers.AutoModelForCausalLM.from_pretrained(models_dir / name).double()
    tokenizer = transformers.AutoTokenizer.from_pretrained(models_dir / name)
    model = fill(adapted(base, BlobConfig), rho=0.15, scale=0.1).eval()
    prompts = ["Once upon a time", "The dog was very"]
    found = generate(
        model, tokenizer, prompts, n_samples=2, seed=SEED, max_new_tokens=4, num_beams=beams
    )
    for text, prompt in zip(found, prompts, strict=True):
        ids = tokenizer(prompt)["input_ids"]
        check_numbers(model, text, ids, 2)
        assert tokenizer.decode([*ids, *text.token_ids], skip_special_tokens=True) == (
            prompt + text.text
        )
        if beams == 1:
            expected = explicit(model, ids, 2, 4, lambda p: int(p.argmax()))
            assert text.token_ids == expected
        else:
            best = explicit_beams(model, ids, 2, beams, 4)
            assert text.token_ids == best[0][1][len(ids) :]


# --- Refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"n_samples": -1}, r"n_samples must be an integer of at least 0, got -1"),
        ({"draws": "pairs"}, r"draws must be one of .*'antithetic'.*, got 'pairs'"),
        ({"max_new_tokens": 0}, r"max_new_tokens must be an integer of at least 1"),
        ({"num_beams": True}, r"num_beams must be an integer"),
        ({"do_sample": True, "num_beams": 2}, r"do_sample must be False with num_beams=2"),
        ({"num_return_sequences": 2}, r"at most num_beams=1 without sampling, got 2"),
        ({"return_dict_in_generate": True}, r"must not have return_dict_in_generate"),
        ({"output_scores": True}, r"must not have output_scores"),
        ({"abstain_on": "doubt"}, r"abstain_on must be one of max_mutual_information, .*'doubt'"),
        ({"n_samples": 0, "abstain_on": "max_mutual_information"}, r"with 0 draws"),
        ({"stop_strings": [""]}, r"stop_strings must be texts"),
        ({"max_new_tokens": 4000}, r"2048 positions, got 2 \+ 4000 tokens"),
        ({"streamer": print, "num_beams": 2}, r"streamer must be None with beams"),
        ({"penalty_alpha": 0.6, "top_k": 4}, r"must be greedy search, .* got contrastive search"),
    ],
)  # fmt: skip
def test_what_is_refused(model: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        generate(model, TOKENIZER, "A", **options)


@pytest.mark.parametrize("prompts", ["", [], [""], [[]], [3], [["A"]]])
def test_prompts_that_are_none(model: Any, prompts: Any) -> None:
    tokenizer = letters()
    tokenizer.bos_token = None
    with pytest.raises(ValueError, match=r"generate: (each )?prompts? must"):
        generate(model, tokenizer, prompts)


def test_adapters_without_draws() -> None:
    plain = trained("llama")
    with pytest.raises(ValueError, match="n_samples must be 0 for adapters without a posterior"):
        generate(plain, TOKENIZER, "A")
    assert generate(plain, TOKENIZER, "A", n_samples=0, max_new_tokens=2)[0].n_samples == 0
    polar = adapted(llama(), PolarConfig).eval()
    with pytest.raises(ValueError, match="n_samples must be 0 for adapters without a posterior"):
        generate(polar, TOKENIZER, "A")
    model = model_of()
    with model.disable_adapter(), pytest.raises(ValueError, match="adapters that are disabled"):
        generate(model, TOKENIZER, "A")


@pytest.mark.parametrize("name", ["laplace", "laplace-last"])
@pytest.mark.parametrize("beams", [1, 2])
def test_laplace_draws_weights(name: str, beams: int) -> None:
    """Each draw is an adapter while the text is written; the model is as before then."""
    model = fill(adapted(sharp(), peft.LoraConfig), rho=None).eval()
    ids = torch.randint(3, 64, (8, 5), generator=torch.Generator().manual_seed(1))
    data = [{"input_ids": ids, "labels": ids[:, 0] % 3}]
    bayesianize(model, name, data, choices=[5, 6, 7], progress=False)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = torch.random.get_rng_state()

    def weights(model: nn.Module, draw: int) -> Any:
        return drawn_weights(model, SEED, draw)

    check_method(model, 3, weights, num_beams=beams)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in after.items())
    assert model.active_adapters == ["default"]
    assert torch.equal(torch.random.get_rng_state(), state)
    assert generate(model, TOKENIZER, "A", n_samples=0, max_new_tokens=2)[0].n_samples == 0
    assert predict(model, {"input_ids": ids}, choices=[5, 6, 7]).n_samples == 10


def test_draws_of_class_logits_write_no_text() -> None:
    base = answering_llama()
    config = PolarVbllConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, config).eval()
    write: Any
    for write in (generate, score_texts):
        with pytest.raises(ValueError, match="draws are class logits, not weights, got 10"):
            write(model, TOKENIZER, "A")
        with pytest.raises(
            ValueError, match=r"must have its whole head, got .* load_writer, or use"
        ):
            write(model, TOKENIZER, "be", n_samples=0)


def test_draws_of_a_head_write_no_text() -> None:
    """Rows of a batch cannot be sent to heads of their own: one line, and never the mean."""
    config = {"modules_to_save": ["lm_head"]}
    model = fill(adapted(sharp(), peft.LoraConfig, **config), rho=None).eval()
    ids = torch.randint(3, 64, (8, 5), generator=torch.Generator().manual_seed(1))
    data = [{"input_ids": ids, "labels": ids[:, 0] % 3}]
    bayesianize(model, "laplace", data, choices=[5, 6, 7], progress=False)
    batch = {"input_ids": ids, "labels": ids}
    calls = {
        "generate": lambda: generate(model, TOKENIZER, "A", n_samples=2),
        "score_texts": lambda: score_texts(model, TOKENIZER, "no", n_samples=2),
        "score_answers": lambda: score_answers(model, TOKENIZER, "no", ["a", "b"], n_samples=2),
        "predict_tokens": lambda: predict_tokens(model, batch, n_samples=2),
    }
    for name, call in calls.items():
        words = f"{name}: a Laplace posterior must be of the factors .* got lm_head.weight; pass n"
        with pytest.raises(ValueError, match=words):
            call()
    assert len(model.peft_config) == 1
