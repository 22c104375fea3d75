"""Text from several draws of the weights at once, with the uncertainty of each token."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import StoppingCriteriaList, StopStringCriteria
from transformers.generation import BaseStreamer

from ..batches import eval_mode, fold_samples, need_whole, text_list
from ..progress import progress_bar
from .decoding import Lockstep, Step
from .draws import WeightDraws
from .heads import ClassLogits
from .predict import text_draws
from .texts import SCORES, Generation, Pieces, ScoredText, Token, pieces_of
from .tokens import check_length, common_beginning, labelled, positions

Message = Mapping[str, Any]
Prompt = str | Sequence[Message]

# Arguments of transformers' `generate` that are made here, or whose results would be of all draws.
_OWN = {
    "assistant_model",
    "attention_mask",
    "cache",
    "custom_generate",
    "encoder_outputs",
    "input_ids",
    "inputs",
    "inputs_embeds",
    "past_key_values",
    "prompt_lookup_num_tokens",
    "return_dict_in_generate",
    "tokenizer",
}


@torch.no_grad()
def generate(
    model: nn.Module,
    tokenizer: Any,
    prompts: Prompt | Sequence[Prompt],
    *,
    n_samples: int = 10,
    seed: int = 0,
    draws: str = "antithetic",
    max_new_tokens: int = 64,
    do_sample: bool = False,
    num_beams: int = 1,
    num_return_sequences: int = 1,
    stop_strings: str | Sequence[str] | None = None,
    chat: bool | None = None,
    streamer: Callable[[Token], object] | BaseStreamer | None = None,
    abstain_above: float | None = None,
    abstain_on: str | None = None,
    batch_size: int = 8,
    progress: bool = False,
    **options: Any,
) -> list[Generation]:
    """Continue prompts with S draws of the weights in lockstep, and say how sure each token is.

    Every next token is chosen from the mean of the draws' distributions,

        p(y_t | x, y_<t) = 1/S sum_s p_s(y_t | x, y_<t),

    where each draw s keeps its weights for the whole text. The S copies of a prompt are rows of one
    batch, with a KV cache, in stock `generate`; a logits processor averages them, so that all choose the
    same token. The result is that of S models that are averaged for every token from the beginning,
    without their time. Penalties, temperature, top-p and so on act on the mean.

    Args:
        model: a causal model, or an encoder with a decoder, with an adapter whose weights have draws:
            BLoB, TFB, ScalaBL, plain LoRA trained with dropout (one mask for each draw), an `Ensemble`.
            Others need n_samples=0.
        tokenizer: its tokenizer.
        prompts: texts, conversations (sequences of messages with "role" and "content"), or one of
            them. Prompts of unequal length are padded on the left.
        n_samples: S; 0 for the posterior mean, whose entropy is all there is.
        seed: seed of the draws, and of random choices.
        draws: how draws of weights hang together: "antithetic" (ask for an even number), "independent" or
            "shared"; `kind` of `posterior`. For BLoB, TFB and ScalaBL; the others keep their own rule.
        max_new_tokens: largest number of new tokens.
        do_sample: draw tokens from the mean distribution. Text i has the choices of (seed, i), whatever
            else is in the batch. False takes the likeliest token.
        num_beams: beams of a beam search over the mean distribution.
        num_return_sequences: texts for each prompt; they follow each other in the result.
        stop_strings: a text ends behind the first of them.
        chat: whether prompts go through the tokenizer's chat template, a text as a message of the
            user; None: conversations do, texts do not.
        streamer: a function that is given each `Token` as soon as it is chosen; or a streamer of
            transformers, for one prompt.
        abstain_above: threshold of `Generation.abstained`.
        abstain_on: the score that it is for, one of `bayes_kernels.hf.texts.SCORES`; None for
            "max_mutual_information", with fewer than two draws "max_entropy".
        batch_size: prompts of one batch, which has batch_size * S * num_beams rows.
        progress: show a bar over the batches.
        options: further options of transformers' `generate`, such as temperature, top_p,
            repetition_penalty or cache_implementation.

    Returns:
        A `Generation` for each prompt (times `num_return_sequences`), in order. Cost: that of
        generating S texts for each prompt in one batch.

    Raises:
        ValueError: an argument is out of range, the adapter has no draws of its weights, or the model
            cannot generate.

    Example:
        text = generate(model, tokenizer, "Once upon a time", n_samples=10, max_new_tokens=40)[0]
        for token, doubt in zip(text.tokens, text.mutual_information):
            print(f"{token!r:12} {doubt:.3f}")
    """
    for name, value, least in (
        ("n_samples", n_samples, 0),
        ("max_new_tokens", max_new_tokens, 1),
        ("num_beams", num_beams, 1),
        ("num_return_sequences", num_return_sequences, 1),
        ("batch_size", batch_size, 1),
    ):
        need_whole(f"generate: {name}", value, least)
    own = sorted(_OWN & set(options)) + sorted(key for key in options if key.startswith("output_"))
    if own:
        raise ValueError(
            f"generate: options must not have {', '.join(own)}, which generate makes itself; leave it out"
        )
    if do_sample and num_beams > 1:
        raise ValueError(
            f"generate: do_sample must be False with num_beams={num_beams}; sample, or search with beams"
        )
    if num_return_sequences > 1 and not do_sample and num_return_sequences > num_beams:
        raise ValueError(
            f"generate: num_return_sequences must be at most num_beams={num_beams} without sampling, "
            f"got {num_return_sequences}; pass do_sample=True"
        )
    drawing = _draws_of("generate", model, n_samples, draws)
    copies = drawing.copies(n_samples)
    if abstain_on is None:
        abstain_on = "max_mutual_information" if copies > 1 else "max_entropy"
    if abstain_on not in SCORES or (copies < 2 and "mutual" in abstain_on):
        raise ValueError(
            f"generate: abstain_on must be one of {', '.join(SCORES)} (mutual information from two draws "
            f"on), got {abstain_on!r} with {copies} draws"
        )
    generator = drawing.generator
    encoded = _encode("generate", tokenizer, _as_list(prompts), chat)
    _check_lengths(generator, encoded, max_new_tokens)
    pad = _pad_token(generator, tokenizer)
    notice, stock = None, None
    if streamer is not None:
        if num_beams > 1:
            raise ValueError("generate: streamer must be None with beams; use num_beams=1")
        if isinstance(streamer, BaseStreamer):
            if (count := len(encoded) * num_return_sequences) > 1:
                raise ValueError(
                    f"generate: a streamer of transformers must have one text, got {count}; pass a "
                    "function, which is told the number of the text"
                )
            stock = streamer
        else:
            notice = _Notice(streamer, tokenizer, encoded, num_return_sequences)
    settings = {
        "max_new_tokens": max_new_tokens,
        "do_sample": do_sample,
        "num_beams": num_beams,
        "num_return_sequences": num_return_sequences,
        "pad_token_id": pad,
        **options,
    }
    if stop_strings is not None:
        words = [stop_strings] if isinstance(stop_strings, str) else list(stop_strings)
        if not words or not all(isinstance(word, str) and word for word in words):
            raise ValueError(f"generate: stop_strings must be texts, got {stop_strings!r}")
        stop = StopStringCriteria(tokenizer=tokenizer, stop_strings=words)
        settings["stopping_criteria"] = StoppingCriteriaList(
            [*settings.get("stopping_criteria", ()), stop]
        )
    right = bool(getattr(generator.config, "is_encoder_decoder", False))
    found: list[Generation] = []
    starts = range(0, len(encoded), batch_size)
    bar = progress_bar(progress, starts, desc="generate", unit="batch")
    with eval_mode(model):
        for start in bar:
            part = encoded[start : start + batch_size]
            first = start * num_return_sequences
            lockstep = Lockstep(
                max(copies, 1),
                len(part),
                dependent=drawing.dependent(draws, "example"),
                seed=seed,
                first=first,
                notice=notice,
                streamer=stock,
            )
            batch = _padded([one.token_ids for one in part], pad, right, _device(model))
            with drawing.throughout(n_samples, seed, len(part), draws) as more:
                generator.generate(
                    **fold_samples(batch, max(copies, 1)),
                    **settings,
                    **more,
                    custom_generate=lockstep.decode,
                )
            for i, (steps, stopped) in enumerate(lockstep.results):
                prompt = part[i // num_return_sequences]
                before = [] if right else prompt.token_ids
                scored = _scored(tokenizer, before, steps, copies)
                found.append(
                    Generation(
                        **vars(scored),
                        prompt=prompt.text,
                        stopped=stopped,
                        abstain_on=abstain_on,
                        abstain_above=abstain_above,
                    )
                )
    return found


@torch.no_grad()
def score_texts(
    model: nn.Module,
    tokenizer: Any,
    texts: str | Sequence[str],
    *,
    prompts: str | Sequence[str] | None = None,
    n_samples: int = 10,
    seed: int = 0,
    draws: str = "antithetic",
    progress: bool = False,
) -> list[ScoredText]:
    """What S draws of the weights think of given texts: `generate`'s numbers, for tokens that are there.

    Args:
        model: a causal model with an adapter, as for `generate`.
        tokenizer: its tokenizer.
        texts: the texts. Their first token is scored too where a prompt, or a token that begins every
            text, comes before it.
        prompts: what comes before each text, or one for all.
        n_samples: S; 0 for the posterior mean.
        seed: seed of the draws.
        draws: as for `generate`.
        progress: show a bar over the texts.

    Returns:
        A `ScoredText` for each text. Cost: a forward pass of S copies of each text; memory for their
        logits, S * T * vocabulary.

    Raises:
        ValueError: as `generate`, a text has no token that another comes before, or is too long for the
            model.
    """
    need_whole("score_texts: n_samples", n_samples, 0)
    given = text_list("score_texts: texts", texts)
    before = (
        [prompts] * len(given)
        if prompts is None or isinstance(prompts, str)
        else text_list("score_texts: prompts", prompts)
    )
    if len(before) != len(given):
        raise ValueError(
            f"score_texts: prompts must be one for all or one for each of {len(given)} texts, got "
            f"{len(before)}"
        )
    drawing = _draws_of("score_texts", model, n_samples, draws)
    copies = drawing.copies(n_samples)
    if getattr(drawing.generator.config, "is_encoder_decoder", False):
        raise ValueError(
            "score_texts: model must be a causal model, got an encoder-decoder; use predict with choices"
        )
    found = []
    with eval_mode(model):
        pairs = list(zip(given, before, strict=True))
        for text, prompt in progress_bar(progress, pairs, desc="score", unit="text"):
            whole = tokenizer(text if prompt is None else prompt + text)["input_ids"]
            start = 1
            if prompt is not None:
                start = max(1, common_beginning(whole, tokenizer(prompt)["input_ids"]))
            if start >= len(whole):
                raise ValueError(
                    f"score_texts: a text must have a token that another comes before, got {text!r}; "
                    "give it a prompt"
                )
            check_length("score_texts", model, len(whole))
            ids = torch.tensor([whole], device=_device(model))
            batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            with drawing.throughout(n_samples, seed, 1, draws) as more:
                folded = fold_samples(batch, max(copies, 1))
                logits = drawing.generator(**folded, **more, use_cache=False).logits
            scored = labelled(
                logits[:, None, start - 1 : -1],
                ids[:, start:],
                drawing.dependent(draws, "example"),
                copies,
            )
            bias = scored.entropy_bias
            columns = [
                scored.log_probs,
                scored.entropy,
                scored.expected_entropy,
                torch.full_like(scored.log_probs, math.nan) if bias is None else bias,
            ]
            numbers = torch.stack(columns, -1).tolist()
            pairs_of = zip(whole[start:], numbers, strict=True)
            steps = [Step(None, token, *values) for token, values in pairs_of]
            found.append(_scored(tokenizer, whole[:start], steps, copies))
    return found


# --- Draws ---------------------------------------------------------------------------------------


def _draws_of(op: str, model: nn.Module, n_samples: int, draws: str) -> WeightDraws:
    """`text_draws` of a model that generates."""
    predictor = text_draws(op, model, n_samples, draws)
    base: Any = getattr(model, "get_base_model", lambda: model)()
    if isinstance(base, ClassLogits):
        raise ValueError(
            f"{op}: model must have its whole head, got {type(base).__name__}, whose logits are of "
            "classes; load the adapter with load_writer, or use predict"
        )
    if not hasattr(predictor.generator, "generate"):
        raise ValueError(
            f"{op}: model must be one that generates text, got {type(model).__name__}; load it with "
            "AutoModelForCausalLM"
        )
    return predictor


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


# --- Prompts -------------------------------------------------------------------------------------


class _Encoded(NamedTuple):
    """A prompt as text and as tokens."""

    text: str
    token_ids: list[int]


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """Several prompts; one is a text or a conversation."""
    found = text_list("generate: prompts", prompts)
    if found and isinstance(found[0], Mapping):
        found = [found]
    if not found:
        raise ValueError("generate: prompts must have at least one text, got none")
    return found


def _encode(
    op: str, tokenizer: Any, prompts: Sequence[Prompt], chat: bool | None
) -> list[_Encoded]:
    found = []
    for prompt in prompts:
        text = isinstance(prompt, str)
        messages = isinstance(prompt, Sequence) and all(isinstance(m, Mapping) for m in prompt)
        if not (text or (messages and prompt)):
            raise ValueError(
                f"{op}: each prompt must be a text or a sequence of messages with 'role' and 'content', "
                f"got {prompt!r}"
            )
        if not text and chat is False:
            raise ValueError(f"{op}: chat must be True or None for messages, got False")
        if text and not chat:
            ids = tokenizer(prompt)["input_ids"]
            shown = prompt
        else:
            if not getattr(tokenizer, "chat_template", None):
                raise ValueError(
                    f"{op}: the tokenizer must have a chat template for messages, got none; pass texts"
                )
            conversation = [{"role": "user", "content": prompt}] if text else list(prompt)
            shown = tokenizer.apply_chat_template(
                conversation, add_generation_prompt=True, tokenize=False
            )
            ids = tokenizer(shown, add_special_tokens=False)["input_ids"]
        if not ids and tokenizer.bos_token_id is not None:
            ids = [tokenizer.bos_token_id]
        if not ids:
            raise ValueError(f"{op}: each prompt must have at least one token, got {prompt!r}")
        found.append(_Encoded(str(shown), list(ids)))
    return found


def _padded(
    rows: Sequence[Sequence[int]], pad: int, right: bool, device: torch.device
) -> dict[str, Tensor]:
    """Rows of tokens as a batch: decoders continue the end of a row, so that padding comes first."""
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        where = slice(0, len(row)) if right else slice(width - len(row), width)
        ids[i, where] = torch.tensor(row, dtype=torch.int64)
        mask[i, where] = 1
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def _pad_token(model: Any, tokenizer: Any) -> int:
    """A token for places that the mask hides, and behind ends."""
    config = getattr(model, "generation_config", None)
    ends: Any = getattr(config, "eos_token_id", None)
    first = ends[0] if isinstance(ends, (list, tuple)) and ends else ends
    known = (tokenizer.pad_token_id, getattr(config, "pad_token_id", None), first, 0)
    return next(int(token) for token in known if token is not None)


def _check_lengths(model: Any, encoded: Sequence[_Encoded], max_new_tokens: int) -> None:
    room = positions(model)
    longest = max(len(one.token_ids) for one in encoded)
    if getattr(model.config, "is_encoder_decoder", False):
        longest = 1
    if room is not None and longest + max_new_tokens > room:
        raise ValueError(
            f"generate: prompt and max_new_tokens must fit the model's {room} positions, got {longest} "
            f"+ {max_new_tokens} tokens; shorten one of them"
        )


# --- Results -------------------------------------------------------------------------------------


def _scored(
    tokenizer: Any, before: Sequence[int], steps: Sequence[Step], copies: int
) -> ScoredText:
    ids = [step.token_id for step in steps]
    pieces = pieces_of(tokenizer, before, ids)
    bias = [step.entropy_bias for step in steps]
    return ScoredText(
        text="".join(pieces),
        token_ids=ids,
        tokens=pieces,
        log_probs=[step.log_prob for step in steps],
        entropy=[step.entropy for step in steps],
        expected_entropy=[step.expected_entropy for step in steps],
        entropy_bias=None if any(map(math.isnan, bias)) else bias,
        n_samples=copies,
    )


class _Notice:
    """Tells a function of each new token, with the number of its text among all prompts."""

    def __init__(
        self,
        function: Callable[[Token], object],
        tokenizer: Any,
        encoded: Sequence[_Encoded],
        each: int,
    ) -> None:
        self.function = function
        self.pieces = [Pieces(tokenizer, one.token_ids) for one in encoded for _ in range(each)]

    def __call__(self, sequence: int, step: Step, last: bool) -> None:
        text = self.pieces[sequence].add(step.token_id)
        if last:
            text += self.pieces[sequence].rest()
        self.function(Token(sequence, step.token_id, text, *step[2:5]))
