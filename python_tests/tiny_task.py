"""A two-class task in files, and a BERT of 30,000 parameters that can learn it in seconds."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

GOOD = ("bright", "clear", "kind", "swift", "warm", "calm")
BAD = ("broken", "cruel", "dull", "harsh", "sour", "weak")
OTHER = ("the", "a", "day", "road", "song", "was", "is", "very", "and", "of", "river", "stone")


def write_model(folder: Path) -> Path:
    """A BERT with random weights, as a folder that transformers loads."""
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    words = [*special, *GOOD, *BAD, *OTHER]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B [SEP]",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=32,
    ).save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
        initializer_range=0.2,
        architectures=["BertModel"],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.BertModel(config)
        with torch.no_grad():  # what pre-training would have found: good and bad are opposites
            direction = torch.randn(32)
            table = model.embeddings.word_embeddings.weight
            for sign, group in ((1, GOOD), (-1, BAD)):
                for word in group:
                    table[words.index(word)] += sign * direction
        model.save_pretrained(folder)
    return folder


def rows(count: int, prefix: str, seed: int, noise: float = 0.1) -> list[dict[str, Any]]:
    """Texts with good or bad words; a share `noise` of the labels is wrong."""
    draw = random.Random(seed)
    found = []
    for index in range(count):
        label = draw.randrange(2)
        words = draw.choices(OTHER, k=draw.randint(3, 8)) + draw.choices((BAD, GOOD)[label], k=2)
        draw.shuffle(words)
        if draw.random() < noise:
            label = 1 - label
        found.append({"id": f"{prefix}-{index}", "question": " ".join(words), "label": label})
    return found


def write_rows(path: Path, content: list[dict[str, Any]]) -> Path:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
    return path


def write_data(folder: Path) -> Path:
    """train.jsonl, test.jsonl, and ood.jsonl, whose examples have no labels."""
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(folder / "train.jsonl", rows(80, "train", 1))
    write_rows(folder / "test.jsonl", rows(40, "test", 2))
    strange = [{"id": f"o{i}", "question": " ".join(["zzz"] * (3 + i % 5))} for i in range(20)]
    write_rows(folder / "ood.jsonl", strange)
    return folder
