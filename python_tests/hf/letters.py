"""A tokenizer whose tokens are letters, for the vocabulary of the small models."""

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
