"""Plain LoRA that is as if trained, and a batch for it."""

from __future__ import annotations

import math
from typing import Any

import peft
import tiny_models
import torch
import transformers


def llama(seed: int = 0) -> Any:
    """A classifier with a head of its own."""
    options = {"num_labels": 3, "pad_token_id": 0}
    return tiny_models.llama(transformers.LlamaForSequenceClassification, seed, **options)


def plain_lora(base: Any, seed: int = 0, dropout: float = 0.0) -> Any:
    """Plain LoRA whose factors and head are all random, as if trained."""
    model = tiny_models.adapted(base, peft.LoraConfig, lora_dropout=dropout, task_type="SEQ_CLS")
    torch.manual_seed(100 + seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter) / math.sqrt(parameter.shape[-1]))
    return model.eval()


IDS = torch.tensor([[5, 6, 7, 8, 9], [9, 3, 4, 0, 0], [7, 7, 21, 30, 2]])


BATCH = {"input_ids": IDS, "attention_mask": IDS.ne(0).long()}
