"""Answers with uncertainty from a server of language models, which has draws of an adapter as models.

`bayes_kernels.hf.export_draws` writes draws of the weights as plain LoRA folders. A server that loads them
as models and speaks OpenAI's protocol, with log-probabilities, is asked here for each of them, and their
probabilities are averaged. This module needs the standard library only.

Example:
    client = Client("http://localhost:8000/v1", [f"draw-{s}" for s in range(10)])
    answer = client.score("Is 17 prime?\nAnswer:", [" yes", " no"])
    print(answer.choice, answer.probs, answer.mutual_information)
"""

from __future__ import annotations

import http.client
import json
import math
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

Message = Mapping[str, str]


class ServerError(RuntimeError):
    """The server cannot be reached, refuses a request, or answers with something else."""


@dataclass(frozen=True)
class Scores:
    """What the mean of S models says of some answers to a prompt. Logs and entropies are in nats.

    Attributes:
        choices: the answers.
        log_probs: of the mean, log 1/S sum_s p_s(c), where each p_s sums to 1 over the answers.
        entropy: of the mean: all uncertainty.
        expected_entropy: mean entropy of the p_s: what is left where the weights are known.
        draw_log_probs: log p_s(c) of each model, S lists.
        mass: mean probability that the answer is one of `choices` at all: small where the prompt does not
            ask for them.
    """

    choices: tuple[str, ...]
    log_probs: list[float]
    entropy: float
    expected_entropy: float
    draw_log_probs: list[list[float]]
    mass: float

    @property
    def probs(self) -> list[float]:
        """Mean probabilities, which sum to 1."""
        return [math.exp(value) for value in self.log_probs]

    @property
    def choice(self) -> str:
        """The most probable answer."""
        return self.choices[max(range(len(self.choices)), key=self.log_probs.__getitem__)]

    @property
    def mutual_information(self) -> float | None:
        """entropy - expected_entropy, at least 0: what is due to the weights; None for one model.

        Of few draws it is too low on average, by about 1 / S of itself for independent ones.
        """
        if len(self.draw_log_probs) < 2:
            return None
        return max(self.entropy - self.expected_entropy, 0.0)

    @property
    def n_samples(self) -> int:
        """S, the number of models."""
        return len(self.draw_log_probs)


def average(choices: Sequence[str], log_probs: Sequence[Sequence[float]]) -> Scores:
    """The mean over models of distributions over answers.

    Args:
        choices: the answers.
        log_probs: for each model, log-probabilities of all answers; they need not sum to 1.

    Raises:
        ValueError: there is no model, or the numbers do not belong to the answers.
    """
    if not log_probs or any(len(row) != len(choices) for row in log_probs):
        raise ValueError(
            f"average: log_probs must have {len(choices)} numbers for each of at least one model, got "
            f"{[len(row) for row in log_probs]}"
        )
    totals = [_log_sum_exp(row) for row in log_probs]
    if not all(math.isfinite(total) for total in totals):
        raise ValueError(
            "average: each model must give some answer a finite log-probability above -inf"
        )
    draws = [[value - total for value in row] for row, total in zip(log_probs, totals, strict=True)]
    count = math.log(len(draws))
    mean = [_log_sum_exp(values) - count for values in zip(*draws, strict=True)]
    return Scores(
        choices=tuple(choices),
        log_probs=mean,
        entropy=_entropy(mean),
        expected_entropy=math.fsum(map(_entropy, draws)) / len(draws),
        draw_log_probs=draws,
        mass=math.fsum(map(math.exp, totals)) / len(draws),
    )


class Client:
    """Asks a server for each of several models, and averages.

    Args:
        url: of the server's interface, such as "http://localhost:8000/v1".
        models: names of the draws on the server; or for each of them further fields of its requests, where
            a server chooses adapters by another field than "model": llama.cpp's has
            {"draw-0": {"lora": [{"id": 0, "scale": 1.0}]}, ...}.
        api_key: sent as a bearer token; None for none.
        timeout: seconds that one request may take.
        at_once: requests that are under way at the same time; servers such as vLLM put them in one batch.
        options: further fields of every request.

    Raises:
        ValueError: the address is none of http, there is no model, or a number is out of range.
    """

    def __init__(
        self,
        url: str,
        models: Sequence[str] | Mapping[str, Mapping[str, Any]],
        *,
        api_key: str | None = None,
        timeout: float = 60.0,
        at_once: int = 8,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"Client: url must begin with http:// or https://, got {url!r}")
        if isinstance(models, str) or not models or len(set(models)) < len(models):
            raise ValueError(
                f"Client: models must be names of draws on the server, all different, got {models!r}"
            )
        if timeout <= 0 or at_once < 1:
            raise ValueError(
                f"Client: timeout and at_once must be positive, got {timeout} and {at_once}"
            )
        self.url, self.models = url.rstrip("/"), tuple(models)
        self.fields = {
            name: dict(models[name]) if isinstance(models, Mapping) else {} for name in models
        }
        self.api_key, self.timeout, self.at_once = api_key, timeout, at_once
        self.options = dict(options or {})

    def served(self) -> list[str]:
        """Names of all models that the server has.

        Raises:
            ServerError: the server does not say.
        """
        try:
            return [str(one["id"]) for one in self._ask("models", None)["data"]]
        except (KeyError, TypeError):
            raise self._odd("models", "a list of models in data") from None

    def score(
        self,
        prompt: str | Sequence[Message],
        choices: Sequence[str],
        *,
        by: str = "first_token",
        top: int = 20,
    ) -> Scores:
        """The distribution over answers, averaged over the models.

            p(c | x) = 1/S sum_s p_s(c | x) / sum_c' p_s(c' | x)

        * by="first_token": one request for each model, for one token and the `top` likeliest. Every
          answer must be one token, written as the server writes it (" yes" with its space where
          it follows a word). Conversations go to the server's chat template.
        * by="sequence": the probability of the whole answer behind the prompt, for answers of any
          length, from the log-probabilities of the prompt's own tokens (`echo`): C + 1 requests for
          each model. Longer answers are less probable for their length alone: it is for answers that
          end alike, or add an end to them.

        Args:
            prompt: a text, or a conversation (messages with "role" and "content").
            choices: at least two answers, all different.
            by: as above.
            top: number of likeliest tokens to ask for; servers have a limit (vLLM: max_logprobs).

        Returns:
            `Scores`.

        Raises:
            ValueError: an argument is out of range.
            ServerError: the server does not answer, or not with log-probabilities of these answers.
        """
        if isinstance(choices, str) or len(choices) < 2 or len(set(choices)) < len(choices):
            raise ValueError(
                f"score: choices must be at least two texts, all different, got {choices!r}"
            )
        if not all(isinstance(one, str) and one for one in choices):
            raise ValueError(f"score: choices must be texts that are not empty, got {choices!r}")
        if by not in ("first_token", "sequence"):
            raise ValueError(f"score: by must be 'first_token' or 'sequence', got {by!r}")
        if not isinstance(prompt, str) and by == "sequence":
            raise ValueError(
                "score: prompt must be a text for by='sequence', got a conversation; use 'first_token', or "
                "apply the chat template yourself"
            )
        if top < 1:
            raise ValueError(f"score: top must be at least 1, got {top}")

        def of(model: str) -> list[float]:
            if isinstance(prompt, str) and by == "sequence":
                return self._sequences(model, prompt, choices)
            return self._first_tokens(model, prompt, choices, top)

        with ThreadPoolExecutor(min(self.at_once, len(self.models))) as pool:
            return average(choices, list(pool.map(of, self.models)))

    # --- One model -------------------------------------------------------------------------------

    def _first_tokens(
        self, model: str, prompt: str | Sequence[Message], choices: Sequence[str], top: int
    ) -> list[float]:
        """log p(choice) of the token that follows the prompt."""
        one = {**self._fields(model), "max_tokens": 1, "temperature": 0}
        if isinstance(prompt, str):
            reply = self._ask("completions", {**one, "prompt": prompt, "logprobs": top})
        else:
            messages = [dict(message) for message in prompt]
            chat = {**one, "messages": messages, "logprobs": True, "top_logprobs": top}
            reply = self._ask("chat/completions", chat)
        found = _likeliest(reply)
        if found is None:
            raise self._odd(model, "log-probabilities of the likeliest tokens (top_logprobs)")
        values = []
        taken = set(choices)  # a token stands for one answer
        for choice in choices:
            value = found.get(choice)
            if value is None:
                same = [t for t in found if t.strip() == choice.strip() and t not in taken]
                if len(same) == 1:
                    value = found[same[0]]
                    taken.add(same[0])
            if value is None:
                shown = ", ".join(repr(token) for token in list(found)[:5])
                raise ServerError(
                    f"score: {choice!r} must be among the {top} likeliest first tokens of {model!r}, got "
                    f"{shown}, ...; raise top, write it as the server does, or use by='sequence'"
                )
            values.append(value)
        return values

    def _sequences(self, model: str, prompt: str, choices: Sequence[str]) -> list[float]:
        """log p(choice) of all tokens behind the prompt."""
        before, _ = self._echo(model, prompt)
        values = []
        for choice in choices:
            tokens, log_probs = self._echo(model, prompt + choice)
            # A prompt's last token may be another one with the answer behind it.
            start = next(
                (i for i, (a, b) in enumerate(zip(tokens, before, strict=False)) if a != b),
                min(len(tokens), len(before)),
            )
            own = log_probs[start:]
            if not own or any(value is None for value in own):
                raise self._odd(
                    model, f"log-probabilities of the tokens of {choice!r} behind a prompt"
                )
            values.append(math.fsum(value for value in own if value is not None))
        return values

    def _echo(self, model: str, text: str) -> tuple[list[str], list[float | None]]:
        """The tokens of a text, and their log-probabilities."""
        # Of no token some servers make the longest text that fits; the one that is made is cut off.
        one = {"prompt": text, "max_tokens": 1, "temperature": 0, "echo": True, "logprobs": 1}
        reply = self._ask("completions", {**self._fields(model), **one})
        try:
            found = reply["choices"][0]["logprobs"]
            tokens, values = list(found["tokens"]), list(found["token_logprobs"])
            made = int(reply["usage"]["completion_tokens"])
        except (KeyError, IndexError, TypeError, ValueError):
            raise self._odd(
                model, "the log-probabilities of a prompt (echo, logprobs) and a usage"
            ) from None
        whole = len(tokens) - made
        return tokens[:whole], values[:whole]

    def _fields(self, model: str) -> dict[str, Any]:
        """What every request to a model has."""
        return {**self.options, "model": model, **self.fields[model]}

    def _odd(self, what: str, expected: str) -> ServerError:
        return ServerError(
            f"serving: {self.url} must answer with {expected} for {what!r}, got a reply without; ask a "
            "server whose completions have log-probabilities"
        )

    def _ask(self, path: str, content: Mapping[str, Any] | None) -> Any:
        """One request, and its reply as JSON."""
        headers = {"Content-Type": "application/json"}
        if self.api_key is not None:
            headers["Authorization"] = f"Bearer {self.api_key}"
        data = None if content is None else json.dumps(content).encode()
        address = f"{self.url}/{path}"
        request = urllib.request.Request(address, data, headers)
        who = "" if content is None else f" for model {content['model']!r}"
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as reply:
                return json.load(reply)
        except urllib.error.HTTPError as error:
            with error:
                said = error.read(500).decode("utf-8", "replace").strip()
            raise ServerError(
                f"serving: {address} refused the request{who} with {error.code}: {said or error.reason}"
            ) from None
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            raise ServerError(
                f"serving: {address} must be a server that runs, got: {reason}; start it, or raise timeout"
            ) from None
        except ValueError:
            raise ServerError(
                f"serving: {address} must answer in JSON, got something else{who}; check url"
            ) from None


def _likeliest(reply: Any) -> dict[str, float] | None:
    """Log-probabilities of the likeliest first tokens, in either of the protocol's two forms."""
    try:
        found = reply["choices"][0]["logprobs"]
        if "content" in found:
            listed = found["content"][0]["top_logprobs"]
            return {one["token"]: float(one["logprob"]) for one in reversed(listed)}
        return {token: float(value) for token, value in found["top_logprobs"][0].items()}
    except (KeyError, IndexError, TypeError, ValueError, AttributeError):
        return None


def _log_sum_exp(values: Sequence[float]) -> float:
    top = max(values)
    if not math.isfinite(top):
        return top
    return top + math.log(math.fsum(math.exp(value - top) for value in values))


def _entropy(log_probs: Sequence[float]) -> float:
    return -math.fsum(math.exp(value) * value for value in log_probs if value > -math.inf)


__all__ = ["Client", "Scores", "ServerError", "average"]
