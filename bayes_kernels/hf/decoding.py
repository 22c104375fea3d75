"""Decoding with several draws in lockstep: their mean distribution chooses one token for all of them.

The batch holds S copies of its prompts, draw by draw. `Mean` gives all copies of a row the mean of their
distributions, so that transformers' loops choose the same for each: the copies of a beam have equal scores,
and their bookkeeping is the same.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StoppingCriteriaList,
)
from transformers.generation import BaseStreamer, GenerationMode

from .. import random
from .logits import ClassSums

_LOOPS = {
    GenerationMode.GREEDY_SEARCH: "_sample",
    GenerationMode.SAMPLE: "_sample",
    GenerationMode.BEAM_SEARCH: "_beam_search",
}


class Step(NamedTuple):
    """A token of a text, and the one before it: texts that begin alike share their steps."""

    before: Step | None
    token_id: int
    log_prob: float
    entropy: float
    expected_entropy: float
    entropy_bias: float


def exact_dtype(t: Tensor) -> torch.dtype:
    """fp64 where the device has it."""
    return torch.float32 if t.device.type == "mps" else torch.float64


class Means(NamedTuple):
    """Of S distributions at each of N places.

    Attributes:
        log_probs: (N, V) log of the mean probabilities.
        entropy, expected_entropy: (N,) entropy of the mean, and mean entropy.
        entropy_bias: (N,) as in `Prediction`; None for fewer than two independent groups.
    """

    log_probs: Tensor
    entropy: Tensor
    expected_entropy: Tensor
    entropy_bias: Tensor | None

    def at(self, row: Tensor, token: Tensor) -> list[list[float]]:
        """For tokens at rows: the numbers of a `Step`, NaN where one is not known."""
        chosen = self.log_probs[row, token]
        bias = torch.full_like(chosen, math.nan)
        if self.entropy_bias is not None:
            bias = self.entropy_bias[row]
        found = [chosen, self.entropy[row], self.expected_entropy[row], bias]
        return torch.stack(found, -1).tolist()


def means(logits: Tensor, dependent: int) -> Means:
    """The mean of distributions with logits (S, N, V).

    Args:
        logits: of each draw.
        dependent: number of successive draws that depend on each other.
    """
    sums = ClassSums(keep=False, dependent=dependent)
    sums.add(logits.to(exact_dtype(logits)))
    return Means(*sums.mean())


class Mean(LogitsProcessor):
    """Gives all copies of a row the log of their mean probabilities.

    Attributes:
        rows: the texts of the last step, one copy.
        found: their mean distributions.
    """

    def __init__(self, copies: int, dependent: int) -> None:
        self.copies, self.dependent = copies, dependent
        self._exact: Tensor | None = None
        self._thread = threading.get_ident()

    def look(self, module: nn.Module, args: Any, output: Any) -> None:
        """Forward hook: keeps the logits of fp64 models, which transformers rounds to fp32."""
        mine = threading.get_ident() == self._thread  # others may write with the same model
        if mine and output.logits.dtype == torch.float64:
            self._exact = output.logits[:, -1]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """scores (copies * rows, V): logits, or their log softmax."""
        logits, self._exact = scores if self._exact is None else self._exact, None
        self.rows = input_ids[: len(input_ids) // self.copies]
        self.found = means(logits.unflatten(0, (self.copies, -1)), self.dependent)
        return self.found.log_probs.to(logits.dtype).repeat(self.copies, 1)


class Choice(LogitsProcessor):
    """Leaves one token, drawn from the scores, which is the same for all copies of a row.

    Row i draws with (seed, first + i) alone: what else is in the batch changes nothing.
    """

    def __init__(self, copies: int, rows: int, seed: int, first: int) -> None:
        self.copies = copies
        root = random.key(seed)
        keys = [random.fold_in(root, -1 - first - row) for row in range(rows)]
        self.generators = [torch.Generator().manual_seed(int(key[0])) for key in keys]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The inverse of the cumulative distribution at a uniform number."""
        rows = scores[: len(self.generators)]
        numbers = [torch.rand(1, generator=one, dtype=torch.float64) for one in self.generators]
        cumulative = rows.to(exact_dtype(rows)).softmax(-1).cumsum(-1)
        places = torch.stack(numbers).to(cumulative) * cumulative[:, -1:]
        chosen = torch.searchsorted(cumulative, places, right=True).clamp(max=rows.shape[1] - 1)
        only = torch.full_like(scores, -math.inf)
        return only.scatter_(1, chosen.repeat(self.copies, 1), 0.0)


class Record(StoppingCriteriaList):
    """Stopping criteria that note what the mean distribution says of each token that is chosen.

    They are asked about every chosen token: of `sequences` texts, or of all candidates of so many
    beam searches.

    Args:
        criteria: what ends a text.
        mean: the distribution that tokens are chosen from.
        sequences: number of texts, or of beam searches.
        begin: where the texts begin, behind their prompts.
        notice: (sequence, step, whether its text ends with it), for each new token.
    """

    def __init__(
        self,
        criteria: StoppingCriteriaList,
        mean: Mean,
        sequences: int,
        begin: int,
        notice: Callable[[int, Step, bool], None] | None,
    ) -> None:
        super().__init__(criteria)
        self.mean, self.sequences, self.begin, self.notice = mean, sequences, begin, notice
        self.open: dict[tuple[int, tuple[int, ...]], Step | None]
        self.open = {(number, ()): None for number in range(sequences)}
        self.ended: dict[tuple[int, tuple[int, ...]], tuple[Step, bool]] = {}

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Which texts (copies * candidates, T) have ended."""
        done = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        stopped = done.clone()
        for criteria in self:
            met = criteria(input_ids, scores, **kwargs)
            done |= met
            if not isinstance(criteria, (MaxLengthCriteria, MaxTimeCriteria)):
                stopped |= met
        count = len(input_ids) // self.mean.copies
        self._note(input_ids[:count], done[:count].tolist(), stopped[:count].tolist())
        return done

    def _note(self, candidates: Tensor, done: Sequence[bool], stopped: Sequence[bool]) -> None:
        rows = {key: row for row, key in enumerate(self._keys(self.mean.rows))}
        keys = self._keys(candidates)
        # Texts that have ended are padded while others go on.
        new = [i for i, (number, ids) in enumerate(keys) if (number, ids[:-1]) in self.open]
        parents = [(keys[i][0], keys[i][1][:-1]) for i in new]
        device = candidates.device
        row = torch.tensor([rows[key] for key in parents], dtype=torch.int64, device=device)
        token = torch.tensor([keys[i][1][-1] for i in new], dtype=torch.int64, device=device)
        numbers = self.mean.found.at(row, token)
        following: dict[tuple[int, tuple[int, ...]], Step | None] = {}
        for i, parent, values in zip(new, parents, numbers, strict=True):
            step = Step(self.open[parent], keys[i][1][-1], *values)
            if done[i]:
                self.ended[keys[i]] = (step, stopped[i])
            else:
                following[keys[i]] = step
            if self.notice is not None:
                self.notice(keys[i][0], step, done[i])
        self.open = following

    def _keys(self, texts: Tensor) -> list[tuple[int, tuple[int, ...]]]:
        """(sequence, its tokens so far) of each row."""
        each = len(texts) // self.sequences
        found = texts[:, self.begin :].tolist()
        return [(i // each, tuple(ids)) for i, ids in enumerate(found)]

    def text(self, sequence: int, token_ids: Sequence[int]) -> tuple[list[Step], bool]:
        """The steps of an ended text, which may be padded, and whether it stopped by itself."""
        for length in range(1, len(token_ids) + 1):
            found = self.ended.get((sequence, tuple(token_ids[:length])))
            if found is not None:
                steps: list[Step] = []
                step: Step | None = found[0]
                while step is not None:
                    steps.append(step)
                    step = step.before
                return steps[::-1], found[1]
        raise RuntimeError("generate: the returned text must be one that was recorded, got another")


class _OneCopy(BaseStreamer):
    """Hands the tokens of the first copy of all rows to a streamer."""

    def __init__(self, streamer: BaseStreamer, copies: int) -> None:
        self.streamer, self.copies = streamer, copies

    def put(self, value: Tensor) -> None:
        """Prompts (copies * rows, T), then tokens (copies * rows,)."""
        self.streamer.put(value[: len(value) // self.copies])

    def end(self) -> None:
        """The end of all texts."""
        self.streamer.end()


class Lockstep:
    """One call of transformers' `generate` on S copies of its prompts, draw by draw.

    Args:
        copies: S.
        dependent: number of successive draws that depend on each other.
        prompts: how many prompts there are.
        seed: seed of random choices.
        first: number of the first text, which counts for them.
        notice: (number of the text, step, whether its text ends with it), for each new token.
        streamer: a streamer of transformers.
    """

    def __init__(
        self,
        copies: int,
        prompts: int,
        *,
        dependent: int,
        seed: int,
        first: int,
        notice: Callable[[int, Step, bool], None] | None,
        streamer: BaseStreamer | None,
    ) -> None:
        self.copies, self.prompts, self.dependent = copies, prompts, dependent
        self.seed, self.first = seed, first
        self.notice = None if notice is None else lambda i, *new: notice(first + i, *new)
        self.streamer = None if streamer is None else _OneCopy(streamer, copies)
        self.results: list[tuple[list[Step], bool]] = []

    def decode(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **kwargs: Any,
    ) -> Tensor:
        """The decoding loop, for `generate(..., custom_generate=...)`.

        Raises:
            ValueError: the mode of generation has no lockstep.
            RuntimeError: the copies have not stayed together.
        """
        mode = generation_config.get_generation_mode()
        if mode not in _LOOPS:
            raise ValueError(
                f"generate: the mode must be greedy search, sampling or beam search without sampling, "
                f"got {str(mode.value).replace('_', ' ')}; leave the option for it out"
            )
        mean = Mean(self.copies, self.dependent)
        logits_processor.insert(0, mean)
        returned = self.prompts * generation_config.num_return_sequences
        beams = mode == GenerationMode.BEAM_SEARCH
        if generation_config.do_sample:
            logits_processor.append(Choice(self.copies, returned, self.seed, self.first))
            generation_config.do_sample = False  # one token is left, and the choice is made
        begin = input_ids.shape[1]
        sequences = self.prompts if beams else returned
        record = Record(stopping_criteria, mean, sequences, begin, self.notice)
        if self.streamer is not None:
            kwargs["streamer"] = self.streamer
            self.streamer.put(input_ids.cpu())
        hook = model.register_forward_hook(mean.look)
        try:
            texts = getattr(type(model), _LOOPS[mode])(
                model,
                input_ids,
                logits_processor=logits_processor,
                stopping_criteria=record,
                generation_config=generation_config,
                **kwargs,
            )
        finally:
            hook.remove()
        drawn = texts.unflatten(0, (self.copies, -1))
        if not bool((drawn == drawn[:1]).all()):
            raise RuntimeError(
                "generate: all draws must choose the same tokens, got different ones from equal "
                "scores; try without beams"
            )
        each = returned // sequences
        for i, ids in enumerate(drawn[0, :, begin:].tolist()):
            self.results.append(record.text(i // each, ids))
        return texts
