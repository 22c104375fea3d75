"""Peak memory of a training step of a Llama with adapters, from sizes alone; errors that say there is none.

docs/memory.md has the formula and what it leaves out; python_tests/tools/test_benchmarks.py compares it with
what torch's allocator counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

RANK = 8
METHODS = ("peft_lora", "published_blob", "blob", "scalabl", "polar_vbll")
# Bytes of a weight of a linear layer; None: those of the model's dtype. nf4 has an fp32 scale for each 64.
BASES: dict[str, float | None] = {"half": None, "8bit": 1.0, "4bit": 0.5 + 4 / 64}


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
    shape: Shape,
    batch: int,
    length: int,
    method: str,
    classes: int,
    rank: int = RANK,
    *,
    base: str = "half",
    checkpointing: bool = False,
    activation_bits: int | None = None,
) -> Memory:
    """Peak memory of forward, backward and optimiser for adapters on query and value projections.

    Args:
        shape: sizes of a Llama with a classifier; its attention is PyTorch's fused kernel.
        batch, length: examples and tokens of each.
        method: one of `METHODS`.
        classes: of the classifier, which is trained.
        rank: of the adapters.
        base: one of `BASES`: "half" is the dtype of the shape, "8bit" and "4bit" are bitsandbytes' layers.
        checkpointing: gradient checkpointing of every layer, as transformers does it.
        activation_bits: 8 or None, as of the configurations of `bayes_kernels.hf`.

    Raises:
        ValueError: the method, the base or the kind of model is not known, or the method has no
            activation_bits.
    """
    if method not in METHODS or shape.kind != "llama":
        raise ValueError(
            f"predict: method must be one of {METHODS} and the shape a llama, got {method!r} and "
            f"{shape.kind!r}"
        )
    if base not in BASES:
        raise ValueError(f"predict: base must be one of {tuple(BASES)}, got {base!r}")
    own = method not in ("peft_lora", "published_blob")
    if activation_bits not in (None, 8) or (activation_bits is not None and not own):
        raise ValueError(
            f"predict: activation_bits must be None, or 8 for a method of bayes_kernels.hf, got "
            f"{activation_bits!r} for {method!r}"
        )
    d, kv, f, n_layers = shape.hidden, shape.kv_width, shape.intermediate, shape.layers
    tokens, size = batch * length, shape.dtype.itemsize

    linear = n_layers * (2 * d * d + 2 * d * kv + 3 * d * f)
    frozen = (shape.vocab * d + n_layers * 2 * d + d) * size + int(linear * (BASES[base] or size))
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

    norm = tokens * d * 4 + tokens * 4  # the input of one in fp32, and a number for each token
    # Plain LoRA and the published formula work in fp32: with other activations each adapter has its
    # own copy of x, which else is one for both.
    inputs = tokens * d * size
    if not own and size < 4:
        inputs = 2 * tokens * d * 4
    elif activation_bits == 8:
        inputs = tokens * (d + -(-d // 32))
    in_rank = 2 * tokens * rank * 4
    signed = 0
    if method == "published_blob":
        # Of each adapter: the signs of x (not where x needs no gradient), x with them; in rank space
        # the signs and the product with them; the noise of the factor and its deviation.
        inputs += 2 * tokens * d * 4
        signed = 2 * tokens * d * 4
        in_rank += 2 * 2 * (tokens + d) * rank * 4
    attention = tokens * (2 * (d + kv) * size + shape.heads * 4)
    mlp = 3 * tokens * f * size
    final_norm = tokens * d * 4
    classifier = 0 if method == "polar_vbll" else tokens * d * size
    layer = 2 * norm + inputs + signed + in_rank + attention + mlp
    # The first layer's input needs no gradient, so that its norm keeps nothing but numbers of tokens.
    first = tokens * d * 4 + signed
    kept = n_layers * layer - first
    again = 0  # what a layer keeps while it is computed again
    if checkpointing:  # the input of every layer; transformers lets the first one have a gradient
        kept, again = n_layers * tokens * d * size, layer
    saved = kept + final_norm + classifier

    # The peak is at one of two places in the backward pass, whichever is higher: in the last layer's
    # MLP, with three gradients of its width and one of the residual stream, when what the final norm
    # and the classifier kept is free; or in the final norm, with five fp32 arrays, when what the
    # classifier kept is. A quantised weight is made again for its product, the largest in the MLP.
    in_mlp = 3 * tokens * f * size + tokens * d * size - final_norm - classifier + again
    if BASES[base] is not None:
        in_mlp += d * f * size
    in_norm = 5 * tokens * d * 4 - classifier
    return Memory(
        parameters=frozen + replaced + trained,
        gradients=trained,
        optimizer=2 * trained,
        saved=saved,
        transient=max(in_mlp, in_norm),
    )


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that there is no memory left, of a GPU or of the machine."""
    # torch has a type of its own for GPUs; for the CPU its RuntimeError has nothing but words.
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or (isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error))
