"""How many posterior draws and examples share a pass of the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..batches import batch_size

# Share of free device memory, and bytes on the CPU, that activations of one pass may take.
_FREE_SHARE = 0.5
_CPU_BUDGET = 1 << 30

# Tokens in a pass from which on more of them save no time: what they share, reading the weights and
# Python, is then a small part. docs/memory.md has the measurements; on a CPU it is for each thread.
TOKENS_IN_FLIGHT = {"cpu": 512, "gpu": 8192}

_TOKENS = ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds")


class Plan(NamedTuple):
    """What a pass holds.

    Attributes:
        examples: rows of the batch at a time.
        draws: copies of them.
    """

    examples: int
    draws: int


def plan(
    model: nn.Module,
    inputs: Mapping[str, Any],
    n_samples: int,
    *,
    samples_per_pass: int | None = None,
    memory_budget: int | None = None,
    split: bool = False,
) -> Plan:
    """The passes that S draws of a batch are made in.

    As many draws share a pass as bring it to `TOKENS_IN_FLIGHT`, in passes of nearly one size and, since
    two draws of an antithetic pair share their normals, an even number of them where that fits; fewer
    where the memory budget has no room. Where it has no room for one draw, the batch is split.

    Args:
        model: the model.
        inputs: its inputs, on its device.
        n_samples: S, at least 1.
        samples_per_pass: draws of a pass, chosen by the caller; then only a budget that is given counts,
            unless `split`.
        memory_budget: bytes of the activations of a pass; None for half of the free memory of the GPU, or
            1 GiB on the CPU.
        split: whether the batch may be split for the sake of draws that the caller has chosen.
    """
    examples = batch_size(inputs)
    if samples_per_pass is not None and memory_budget is None and not split:
        return Plan(examples, samples_per_pass)
    device = next(model.parameters()).device
    budget = _budget(device) if memory_budget is None else memory_budget
    each = max(1, _bytes_of_example(model, inputs))
    draws = samples_per_pass
    if draws is None:
        tokens = TOKENS_IN_FLIGHT["gpu"]
        if device.type == "cpu":
            tokens = TOKENS_IN_FLIGHT["cpu"] * torch.get_num_threads()
        most = min(tokens // max(1, _tokens(inputs)[0]), budget // (each * max(1, examples)))
        draws = _even_parts(n_samples, max(1, most))
    return Plan(max(1, min(examples, budget // (each * draws))), draws)


def _even_parts(n_samples: int, most: int) -> int:
    """Draws of a pass, at most `most`, for passes of nearly one size."""
    passes = -(-n_samples // most)
    draws = -(-n_samples // passes)
    whole_pairs = draws + draws % 2
    if draws == 1 or passes == 1 or whole_pairs == draws:
        return draws
    return whole_pairs if whole_pairs <= most else draws - 1


def _budget(device: torch.device) -> int:
    if device.type != "cuda":
        return _CPU_BUDGET
    free, total = torch.cuda.mem_get_info(device)
    reserved = torch.cuda.memory_reserved(device)
    # Where several processes share the GPU, each may have a part of it.
    own = int(torch.cuda.get_per_process_memory_fraction(device) * total) - reserved
    cached = reserved - torch.cuda.memory_allocated(device)
    return int(_FREE_SHARE * (max(0, min(free, own)) + cached))


def _tokens(inputs: Mapping[str, Any]) -> tuple[int, int]:
    """Tokens of the batch, and of its longest text."""
    tensors = {name: v for name, v in inputs.items() if isinstance(v, Tensor)}
    texts = {name: v for name, v in tensors.items() if name in _TOKENS} or tensors
    shapes = [v.shape[:-1] if name.endswith("embeds") else v.shape for name, v in texts.items()]
    return max((s.numel() for s in shapes), default=1), max((s[-1] for s in shapes if s), default=1)


def _bytes_of_example(model: nn.Module, inputs: Mapping[str, Any]) -> int:
    """Bytes of the activations of one example, estimated for a transformer without gradients."""
    parameter = next(model.parameters())
    config = getattr(model, "config", None)
    config = getattr(config, "text_config", None) or config

    def size(name: str, default: int) -> int:
        value = getattr(config, name, None)
        return value if isinstance(value, int) and value > 0 else default

    tokens, length = _tokens(inputs)
    hidden = size("hidden_size", 1024)
    # One layer is alive at a time: its residual, normalised, query, key, value and output rows, the
    # gate, up and product rows of the MLP; and logits of all tokens.
    per_token = 8 * hidden + 3 * size("intermediate_size", 4 * hidden)
    attention = getattr(config, "_attn_implementation", None) or "eager"
    if "eager" in attention:  # scores of all heads, before and after the softmax
        per_token += 2 * size("num_attention_heads", 16) * length
    elif "sdpa" in attention:  # forms no scores; the mask is one row for all heads
        per_token += length
    if "logits_to_keep" not in inputs:
        per_token += 2 * size("vocab_size", 0) * (config is not None and _has_token_logits(model))
    each = -(-tokens // max(1, batch_size(inputs)))
    return each * per_token * max(4, parameter.element_size())


def _has_token_logits(model: nn.Module) -> bool:
    base = getattr(model, "get_base_model", lambda: model)()
    head = getattr(base, "get_output_embeddings", lambda: None)()
    return head is not None and getattr(head, "out_features", 0) > 1000
