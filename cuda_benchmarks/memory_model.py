"""Peak memory of a training step of a Llama with adapters, from sizes alone.

docs/memory.md has the formula and what it leaves out; python_tests/tools/test_benchmarks.py compares it with
what torch's allocator counts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

RANK = 8
METHODS = ("peft_lora", "published_blob", "blob", "scalabl", "polar_vbll")


@dataclass(frozen=True)
class Shape:
    """Sizes of a transformer.

    Attributes:
        name: what rows of results call it.
        kind: "llama" or "bert".
        hidden, layers, heads, kv_heads, intermediate, vocab: as in its configuration.
        dtype: of its weights and activations.
    """

    name: str
    kind: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocab: int
    dtype: torch.dtype

    @property
    def kv_width(self) -> int:
        """Columns of the key and value projections."""
        return self.hidden // self.heads * self.kv_heads


@dataclass(frozen=True)
class Memory:
    """Bytes of a training step.

    Attributes:
        parameters: frozen weights, adapters and classifier.
        gradients: of what is trained.
        optimizer: AdamW's two moments of what is trained.
        saved: kept by the forward pass for backward.
        transient: what the backward pass adds until the peak, less what it has freed by then.
    """

    parameters: int
    gradients: int
    optimizer: int
    saved: int
    transient: int

    @property
    def step(self) -> int:
        """Peak above what is allocated before the step."""
        return max(self.saved + self.transient, self.gradients)

    @property
    def total(self) -> int:
        """Peak of everything."""
        return self.parameters + self.optimizer + self.step


def predict(
    shape: Shape, batch: int, length: int, method: str, classes: int, rank: int = RANK
) -> Memory:
    """Peak memory of forward, backward and optimiser for adapters on query and value projections.

    Args:
        shape: sizes of a Llama with a classifier; its attention is PyTorch's fused kernel.
        batch, length: examples and tokens of each.
        method: one of `METHODS`.
        classes: of the classifier, which is trained.
        rank: of the adapters.

    Raises:
        ValueError: the method or the kind of model is not known.
    """
    if method not in METHODS or shape.kind != "llama":
        raise ValueError(
            f"predict: method must be one of {METHODS} and the shape a llama, got {method!r} and "
            f"{shape.kind!r}"
        )
    d, kv, f, n_layers = shape.hidden, shape.kv_width, shape.intermediate, shape.layers
    tokens, size = batch * length, shape.dtype.itemsize

    frozen = shape.vocab * d + n_layers * (2 * d * d + 2 * d * kv + 3 * d * f + 2 * d) + d
    adapters = n_layers * rank * ((d + d) + (d + kv))  # A and B of query and value
    beside = {"published_blob": 2 * rank * d, "blob": 2 * rank * d, "scalabl": 4 * rank}
    adapters += n_layers * beside.get(method, 0)  # deviations, or singular values with theirs
    if method == "polar_vbll":
        adapters += n_layers * 2 * rank * rank
    # PEFT keeps the classifier that it trains beside the one that it replaces.
    head = d * classes
    trained = 4 * adapters + head * size
    replaced = head * size
    if method == "polar_vbll":
        trained = 4 * adapters + 2 * 4 * head  # mean and variance of every weight, fp32
        replaced = 2 * 4 * head

    # The first layer's input needs no gradient, so that its norm keeps nothing.
    norms = (2 * n_layers - 1) * tokens * d * 4 + (2 * n_layers) * tokens * 4
    # Plain LoRA and the published formula work in fp32: with other activations each adapter has its
    # own copy of x, which else is one for both.
    adapter_inputs = n_layers * tokens * d * size
    if method in ("peft_lora", "published_blob") and size < 4:
        adapter_inputs = 2 * n_layers * tokens * d * 4
    adapter_rank = n_layers * 2 * tokens * rank * 4
    if method == "published_blob":
        # Of each adapter: the signs of x (not where x needs no gradient), x with them; in rank space
        # the signs and the product with them; the noise of the factor and its deviation.
        adapter_inputs += (n_layers * 2 + (n_layers - 1) * 2) * tokens * d * 4
        adapter_rank += n_layers * 2 * 2 * (tokens + d) * rank * 4
    attention = n_layers * tokens * (2 * (d + kv) * size + shape.heads * 4)
    mlp = n_layers * 3 * tokens * f * size
    final_norm = tokens * d * 4
    classifier = 0 if method == "polar_vbll" else tokens * d * size
    saved = norms + adapter_inputs + adapter_rank + attention + mlp + final_norm + classifier

    # The peak is at one of two places in the backward pass, whichever is higher: in the last layer's
    # MLP, with three gradients of its width and one of the residual stream, when what the final norm
    # and the classifier kept is free; or in the final norm, with five fp32 arrays, when what the
    # classifier kept is.
    in_mlp = 3 * tokens * f * size + tokens * d * size - final_norm - classifier
    in_norm = 5 * tokens * d * 4 - classifier
    return Memory(
        parameters=frozen * size + replaced + trained,
        gradients=trained,
        optimizer=2 * trained,
        saved=saved,
        transient=max(in_mlp, in_norm),
    )
