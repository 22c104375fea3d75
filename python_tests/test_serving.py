"""Draws of an adapter on a server of stock PEFT, averaged by the client, against `predict`."""

from __future__ import annotations

import math
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("peft")

from hf.letters import letters, single_bytes
from llama_cpp_server import llama_cpp_server, write_adapter, write_base
from peft_server import peft_server
from programs import python
from tiny_models import adapted, fill, llama

from bayes_kernels.hf import export_draws, posterior, predict
from bayes_kernels.serving import Client, ServerError, average

pytestmark = pytest.mark.cpu_only

DRAWS, SEED = 4, 7
TOKENIZER = letters()
CHOICES = ["a", "b", "Q"]
IDS = TOKENIZER.convert_tokens_to_ids(CHOICES)


@pytest.fixture(scope="module")
def model() -> Any:
    return fill(adapted(llama(initializer_range=0.2)), rho=0.6, scale=1.0).eval()


@pytest.fixture(scope="module")
def url(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("served") / "draws"
    export_draws(model, folder, DRAWS, seed=SEED)
    with peft_server(llama(initializer_range=0.2), TOKENIZER, folder) as where:
        yield where


def client(url: str, **options: Any) -> Client:
    return Client(url, [f"draw-{s}" for s in range(DRAWS)], **options)


def check(found: Any, model: Any, text: str) -> None:
    batch = TOKENIZER(text, return_tensors="pt")
    expected = predict(model, batch, n_samples=DRAWS, seed=SEED, choices=IDS)
    assert found.probs == pytest.approx(expected.probs[0].tolist(), abs=1e-5)
    assert found.entropy == pytest.approx(float(expected.entropy), abs=1e-5)
    assert found.mutual_information == pytest.approx(float(expected.mutual_information), abs=1e-5)
    assert found.mutual_information > 1e-3
    assert found.choice == CHOICES[int(expected.classes)] and found.n_samples == DRAWS


def test_answers_are_those_of_predict(url: str, model: Any) -> None:
    asked = client(url)
    assert asked.served() == list(asked.models)
    for text in ("no way", "Why"):
        check(asked.score(text, CHOICES, top=64), model, text)


def test_conversations_go_to_the_chat_template(url: str, model: Any) -> None:
    messages = [{"role": "user", "content": "hi"}]
    check(client(url, at_once=1).score(messages, CHOICES, top=64), model, "user: hi.")


@torch.no_grad()
def test_whole_answers(url: str, model: Any) -> None:
    prompt, answers = "no", ["way", "bed", "QQ"]
    found = client(url).score(prompt, answers, by="sequence")
    before = len(TOKENIZER(prompt)["input_ids"])
    rows = []
    for draw in range(DRAWS):
        with posterior(model, "sample", seed=SEED, first_sample=draw):
            row = []
            for answer in answers:
                ids = TOKENIZER(prompt + answer, return_tensors="pt")["input_ids"]
                own = model(input_ids=ids).logits.double().log_softmax(-1)[0, before - 1 : -1]
                row.append(own.gather(1, ids[0, before:, None]).sum())
        rows.append(torch.stack(row))
    log_probs = torch.stack(rows)
    expected = log_probs.softmax(-1).mean(0)
    assert found.probs == pytest.approx(expected.tolist(), abs=1e-5)
    assert found.mass == pytest.approx(float(log_probs.exp().sum(-1).mean()), rel=1e-3)
    # One token each: the same as the first token's.
    first, whole = (
        client(url).score("no", CHOICES, by=by, top=64) for by in ("first_token", "sequence")
    )
    assert first.probs == pytest.approx(whole.probs, abs=1e-6)


@pytest.fixture(scope="module")
def llama_cpp(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, str]]:
    """A model with a tokenizer of bytes, and a server of llama.cpp that has its draws."""
    pytest.importorskip("gguf", reason="models must be written for llama.cpp: pip install gguf")
    home = tmp_path_factory.mktemp("llama_cpp")
    base = llama(vocab_size=258, initializer_range=0.2)
    write_base(base, single_bytes(chat=True), home / "base.gguf")
    config = base.config
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"]
    model = fill(adapted(base, target_modules=targets), rho=0.6, scale=1.0).eval()
    adapters = []
    for folder in export_draws(model, home / "draws", DRAWS, seed=SEED):
        adapters.append(home / f"{folder.name}.gguf")
        write_adapter(folder, config, adapters[-1])
    with llama_cpp_server(home / "base.gguf", adapters) as where:
        yield model, where


def test_llama_cpp(llama_cpp: tuple[Any, str]) -> None:
    """A server of others: its own tokenizer, forward pass and adapters."""
    model, url = llama_cpp
    fields = {f"draw-{s}": {"lora": [{"id": s, "scale": 1.0}]} for s in range(DRAWS)}
    tokenizer = single_bytes()
    ids = tokenizer.convert_tokens_to_ids(CHOICES)
    # Its numbers are those before any bias. There are none where the chosen token is a part of a character.
    asked = Client(url, fields, at_once=2, options={"logit_bias": {ids[0]: 100}})
    conversation = [{"role": "user", "content": "hi"}]
    for prompt, text in (("no way", "no way"), ("Why", "Why"), (conversation, "user: hi.")):
        found = asked.score(prompt, CHOICES, top=258)
        batch = tokenizer(text, return_tensors="pt")
        expected = predict(
            model, batch, n_samples=DRAWS, seed=SEED, choices=ids, return_samples=True
        )
        assert expected.sample_log_probs is not None
        drawn = expected.sample_log_probs[:, 0]
        assert (drawn[0] - drawn[1]).abs().max() > 0.1
        torch.testing.assert_close(
            torch.tensor(found.draw_log_probs, dtype=drawn.dtype), drawn, rtol=0, atol=1e-3
        )
        assert found.probs == pytest.approx(expected.probs[0].tolist(), abs=1e-4)
        expected_mi = float(expected.mutual_information)
        assert found.mutual_information == pytest.approx(expected_mi, abs=1e-4)
    with pytest.raises(ServerError, match=r"log-probabilities of a prompt \(echo, logprobs\)"):
        asked.score("no", CHOICES, by="sequence")
    with pytest.raises(ServerError, match="refused the request for model 'x' with 400"):
        Client(url, {"x": {"lora": "first"}}).score("no", CHOICES)


def test_average() -> None:
    rows = torch.tensor([[-1.0, -2.0, -math.inf], [-700.0, -701.0, -702.0], [-0.1, -5.0, -3.0]])
    found = average(["a", "b", "c"], rows.tolist())
    probs = rows.double().softmax(-1)
    mean = probs.mean(0)
    assert found.probs == pytest.approx(mean.tolist(), rel=1e-12)
    assert found.entropy == pytest.approx(float(torch.special.entr(mean).sum()), rel=1e-12)
    expected = float(torch.special.entr(probs).sum(-1).mean())
    assert found.expected_entropy == pytest.approx(expected, rel=1e-12)
    assert found.mass == pytest.approx(float(rows.double().exp().sum(-1).mean()), rel=1e-12)
    assert average(["a", "b"], [[0.0, -1.0]]).mutual_information is None
    for bad in ([], [[0.0]], [[-math.inf, -math.inf]], [[math.nan, 0.0]]):
        with pytest.raises(ValueError, match="average: "):
            average(["a", "b"], bad)


def test_errors(url: str) -> None:
    asked = client(url)
    with pytest.raises(ServerError, match=r"'a' must be among the 2 likeliest .* raise top"):
        asked.score("no way", CHOICES, top=2)
    with pytest.raises(ServerError, match=r"refused the request for model 'x' with 404: .*no such"):
        Client(url, ["x"]).score("no", CHOICES)
    with pytest.raises(ServerError, match="must answer with a list of models"):
        Client(url + "/v1", ["x"]).served()
    for choices in ("ab", ["a"], ["a", "a"], ["a", ""]):
        with pytest.raises(ValueError, match="score: choices must be"):
            asked.score("no", choices)
    with pytest.raises(ValueError, match="by must be 'first_token' or 'sequence', got 'x'"):
        asked.score("no", CHOICES, by="x")
    with pytest.raises(ValueError, match="prompt must be a text for by='sequence'"):
        asked.score([{"role": "user", "content": "x"}], CHOICES, by="sequence")
    with pytest.raises(ValueError, match="top must be at least 1"):
        asked.score("no", CHOICES, top=0)
    for options, word in (
        ({"url": "file:///etc/passwd"}, "url"),
        ({"models": "draw-0"}, "models"),
        ({"models": []}, "models"),
        ({"models": ["a", "a"]}, "models"),
        ({"timeout": 0}, "timeout"),
        ({"at_once": 0}, "at_once"),
    ):
        with pytest.raises(ValueError, match=f"Client: .*{word}.* must"):
            Client(**{"url": url, "models": ["a"], **options})


def test_a_token_stands_for_one_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    listed = {"choices": [{"logprobs": {"top_logprobs": [{"yes": -0.1, " no": -3.0}]}}]}
    asked = Client("http://localhost:1", ["x"])
    monkeypatch.setattr(asked, "_ask", lambda path, content: listed)
    assert asked.score("q", [" yes", "no"]).choice == " yes"
    for choices in (["yes", " yes"], [" yes", "yes"], [" yes", "yes "]):
        with pytest.raises(ServerError, match="must be among the 20 likeliest first tokens"):
            asked.score("q", choices)


@pytest.mark.parametrize(
    "reply", [b"", b"HTTP/1.0 200 OK\r\n\r\n<html>", b"HTTP/1.0 200 OK\r\n\r\n[]"]
)
def test_a_server_of_something_else(reply: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.recv(1 << 16)
                connection.sendall(reply)

        thread = threading.Thread(target=answer)
        thread.start()
        where = f"http://127.0.0.1:{listening.getsockname()[1]}"
        with pytest.raises(ServerError, match=r"must (be a server that runs|answer)"):
            Client(where, ["x"], timeout=10).score("no", CHOICES)
        thread.join()
    with pytest.raises(ServerError, match=r"must be a server that runs, got: .*; start it"):
        Client(where, ["x"], timeout=10).score("no", CHOICES)


def test_the_client_needs_the_standard_library_only() -> None:
    code = "import sys, bayes_kernels.serving; print({'torch', 'numpy'} & set(sys.modules))"
    assert python(code).stdout.strip() == "set()"
