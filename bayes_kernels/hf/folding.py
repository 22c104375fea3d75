"""How many posterior draws share a pass of the model, each on its copy of the batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

# Share of free device memory, and bytes on the CPU, that activations of one pass may take.
_FREE_SHARE = 0.5
_CPU_BUDGET = 1 << 30


def samples_that_fit(model: nn.Module, inputs: Mapping[str, Any], budget: int | None) -> int:
    """Draws whose activations fit the budget in one pass, at least 1."""
    parameter = next(model.parameters())
    if budget is None:
        budget = _CPU_BUDGET
        if parameter.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(parameter.device)
            cached = torch.cuda.memory_reserved(parameter.device)
            cached -= torch.cuda.memory_allocated(parameter.device)
            budget = int(_FREE_SHARE * (free + cached))
    config = getattr(model, "config", None)
    config = getattr(config, "text_config", None) or config

    def size(name: str, default: int) -> int:
        value = getattr(config, name, None)
        return value if isinstance(value, int) and value > 0 else default

    tokens = max((v.numel() for v in inputs.values() if isinstance(v, Tensor)), default=1)
    length = max((v.shape[-1] for v in inputs.values() if isinstance(v, Tensor)), default=1)
    hidden = size("hidden_size", 1024)
    # One layer is alive at a time: its residual, normalised, query, key, value and output rows, the
    # gate, up and product rows of the MLP, scores of attention twice; and logits of all tokens.
    per_token = 8 * hidden + 3 * size("intermediate_size", 4 * hidden)
    per_token += 2 * size("num_attention_heads", 16) * length
    if "logits_to_keep" not in inputs:
        per_token += 2 * size("vocab_size", 0) * (config is not None and _has_token_logits(model))
    per_sample = tokens * per_token * max(4, parameter.element_size())
    return max(1, budget // max(1, per_sample))


def _has_token_logits(model: nn.Module) -> bool:
    base = getattr(model, "get_base_model", lambda: model)()
    head = getattr(base, "get_output_embeddings", lambda: None)()
    return head is not None and getattr(head, "out_features", 0) > 1000
