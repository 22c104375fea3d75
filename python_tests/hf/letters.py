"""Tokenizers of the small models: of letters, and of bytes."""

from __future__ import annotations

import string
from typing import Any

import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

TOKENS = ["<pad>", "<s>", "</s>", "▁", *string.ascii_letters, *".:012345"]
CHAT = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '.' }}{% endfor %}"


def letters(chat: bool = True) -> Any:
    """Of 64 tokens; like Llama's it begins texts with a space that decoding takes away."""
    vocabulary = {token: i for i, token in enumerate(TOKENS)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    if chat:
        wrapped.chat_template = CHAT
    return wrapped


def single_bytes(chat: bool = False) -> Any:
    """Of 258 tokens: <s>, </s> and the bytes, which make no longer tokens."""
    tokens = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>"
    )
    if chat:
        wrapped.chat_template = CHAT
    return wrapped
