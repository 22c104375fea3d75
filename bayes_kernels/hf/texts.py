"""Texts with the uncertainty of their tokens: what `generate` and `score_texts` return."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

# Token scores that `abstain_on` may name: properties of `ScoredText`.
SCORES = (
    "max_mutual_information",
    "mean_mutual_information",
    "max_entropy",
    "mean_entropy",
    "perplexity",
)


@dataclass(frozen=True)
class Token:
    """A token that has just been generated, for `generate(..., streamer=function)`.

    Attributes:
        sequence: number of its text in the result of `generate`.
        token_id: its id.
        text: what it adds to the text; "" where it adds nothing (see `ScoredText.tokens`). The last token
            of a text has its last bytes too, where these are no whole character.
        log_prob: log of its mean probability over the draws, nats.
        entropy: of the mean distribution at its place, nats.
        expected_entropy: mean entropy of the draws there, nats.
    """

    sequence: int
    token_id: int
    text: str
    log_prob: float
    entropy: float
    expected_entropy: float

    @property
    def mutual_information(self) -> float:
        """entropy - expected_entropy, nats, at least 0; with fewer than two draws it is 0."""
        return max(self.entropy - self.expected_entropy, 0.0)


@dataclass(frozen=True)
class ScoredText:
    """A text, and what the mean of the draws' distributions says of each of its tokens.

    With S draws token y_t has p(y_t) = 1/S sum_s p_s(y_t | what is before it). All draws see the same
    text before it. Logs and entropies are in nats. Only the text counts, not its prompt.

    Attributes:
        text: the text: its tokens, joined.
        token_ids: ids of its tokens, a token that ends it included.
        tokens: what each token adds to the text; "" where it adds nothing, such as a token that ends
            the text, or the first bytes of a character.
        log_probs: log p(y_t).
        entropy: entropy of p at each place: all uncertainty.
        expected_entropy: mean entropy of the p_s: what is left where the weights are known.
        entropy_bias: how much too low `entropy` is on average with so few draws, see `Prediction`; None
            where it is not known: fewer than two independent draws or pairs.
        n_samples: S; 0 for the posterior mean.
    """

    text: str
    token_ids: list[int]
    tokens: list[str]
    log_probs: list[float]
    entropy: list[float]
    expected_entropy: list[float]
    entropy_bias: list[float] | None
    n_samples: int

    @property
    def mutual_information(self) -> list[float] | None:
        """entropy - expected_entropy of each token, at least 0; None for fewer than two draws.

        It is the part of the uncertainty that is due to the weights. Few draws make it too small,
        by a share of about 1/S; `corrected_mutual_information` is not.
        """
        if self.n_samples < 2:
            return None
        pairs = zip(self.entropy, self.expected_entropy, strict=True)
        return [max(total - expected, 0.0) for total, expected in pairs]

    @property
    def corrected_mutual_information(self) -> list[float] | None:
        """`mutual_information` without the bias of few draws; None where that is not known.

        As `Prediction.corrected_mutual_information`; for comparing different numbers of draws.
        """
        if self.entropy_bias is None:
            return None
        parts = zip(self.entropy, self.expected_entropy, self.entropy_bias, strict=True)
        return [max(total - expected + bias, 0.0) for total, expected, bias in parts]

    @property
    def log_prob(self) -> float:
        """Sum of `log_probs`."""
        return math.fsum(self.log_probs)

    @property
    def mean_log_prob(self) -> float:
        """`log_prob` divided by the number of tokens: the length-normalised score."""
        return _mean(self.log_probs)

    @property
    def perplexity(self) -> float:
        """exp(-mean_log_prob): perplexity of the text under the mean distribution."""
        return perplexity(-self.mean_log_prob)

    @property
    def mean_entropy(self) -> float:
        """Mean of `entropy` over the tokens."""
        return _mean(self.entropy)

    @property
    def max_entropy(self) -> float:
        """Largest `entropy` of a token."""
        return max(self.entropy)

    @property
    def mean_mutual_information(self) -> float | None:
        """Mean of `mutual_information` over the tokens; None for fewer than two draws."""
        found = self.mutual_information
        return None if found is None else _mean(found)

    @property
    def max_mutual_information(self) -> float | None:
        """Largest `mutual_information` of a token; None for fewer than two draws."""
        found = self.mutual_information
        return None if found is None else max(found)

    def to_dict(self) -> dict[str, Any]:
        """Text, tokens and scores as plain values, for JSON."""
        return {
            "text": self.text,
            "n_samples": self.n_samples,
            "log_prob": self.log_prob,
            "mean_log_prob": self.mean_log_prob,
            **{name: getattr(self, name) for name in SCORES},
            "token_ids": self.token_ids,
            "tokens": self.tokens,
            "token_log_prob": self.log_probs,
            "token_entropy": self.entropy,
            "token_expected_entropy": self.expected_entropy,
            "token_mutual_information": self.mutual_information,
            "token_corrected_mutual_information": self.corrected_mutual_information,
        }


@dataclass(frozen=True)
class Generation(ScoredText):
    """A generated text with the uncertainty of its tokens; see `ScoredText` for the numbers.

    Attributes:
        prompt: what it continues, as text; of messages what the chat template makes of them.
        stopped: whether an end token or a stop string ended it; False where `max_new_tokens` did.
        abstain_on: name of the score that was compared with the threshold.
        abstain_above: the threshold; None where none was given.
    """

    prompt: str
    stopped: bool
    abstain_on: str
    abstain_above: float | None

    @property
    def abstained(self) -> bool:
        """Whether the score is above the threshold: too uncertain to be given as an answer."""
        if self.abstain_above is None:
            return False
        return not getattr(self, self.abstain_on) <= self.abstain_above  # NaN too

    def to_dict(self) -> dict[str, Any]:
        """As `ScoredText.to_dict`, with the prompt and whether to abstain."""
        ending = {"stopped": self.stopped, "abstained": self.abstained}
        return {"prompt": self.prompt, **super().to_dict(), **ending}


class Pieces:
    """What each token adds to a text, one token after the other.

    The tokens before the text count for what follows them: its first word keeps its space.

    Args:
        tokenizer: a tokenizer of transformers.
        before: ids of the tokens before the text.
    """

    _CONTEXT = 6  # tokens that tell a tokenizer that a text is going on

    def __init__(self, tokenizer: Any, before: Sequence[int] = ()) -> None:
        self.tokenizer = tokenizer
        self.ids = list(before[-self._CONTEXT :])
        self.start, self.read = 0, len(self.ids)

    def add(self, token_id: int) -> str:
        """What this token adds; the bytes of a character come with its last token."""
        self.ids.append(token_id)
        before = self._decode(self.ids[self.start : self.read])
        after = self._decode(self.ids[self.start :])
        if len(after) <= len(before) or after.endswith("\ufffd"):
            return ""
        self.start, self.read = self.read, len(self.ids)
        return after[len(before) :]

    def rest(self) -> str:
        """What is left at the end: bytes that are no character."""
        before = self._decode(self.ids[self.start : self.read])
        return self._decode(self.ids[self.start :])[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )


def perplexity(nll: float) -> float:
    """exp(nll), infinite where that is above the largest number."""
    return math.exp(nll) if not nll > 700 else math.inf


def pieces_of(tokenizer: Any, before: Sequence[int], token_ids: Sequence[int]) -> list[str]:
    """What each token adds to the text; joined they are the text."""
    pieces = Pieces(tokenizer, before)
    found = [pieces.add(token_id) for token_id in token_ids]
    if found:
        found[-1] += pieces.rest()
    return found


def shown_together(tokens: Sequence[str]) -> list[list[int]]:
    """Numbers of the tokens that are shown as one: those without text, and the next one with text.

    Where the last tokens have no text, such as an end, they are the last group.

    Args:
        tokens: what each token adds to a text.
    """
    groups: list[list[int]] = []
    group: list[int] = []
    for i, piece in enumerate(tokens):
        group.append(i)
        if piece:
            groups.append(group)
            group = []
    return [*groups, group] if group else groups


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
