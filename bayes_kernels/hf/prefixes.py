"""A beginning that all texts of a batch share, computed once for each draw.

Questions after one header (examples, instructions) differ in their last tokens only. The keys and values of
what they share go into a KV cache, of one row for each draw; the rest of each text goes on from a copy of it:
S (P + B L) tokens in place of S B (P + L), for S draws of B texts of P shared and L other tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer

from ._compat import cache_argument


class SharedPrefix(NamedTuple):
    """A batch in two parts.

    Attributes:
        token_ids: (P,) what all texts begin with.
        rest: inputs with the other tokens (B, L), padded on the left: between the two parts.
        argument: name under which a pass is handed a cache.
        config: that of the model, which its cache follows.
    """

    token_ids: Tensor
    rest: dict[str, Any]
    argument: str
    config: Any

    def filled(
        self, run: Callable[[dict[str, Any]], object], copies: int, rows: int
    ) -> dict[str, Any]:
        """Further inputs for `copies` of `rows` texts: a cache, filled by one pass of `copies` rows.

        Args:
            run: passes inputs to the model, with a draw for each row.
            copies: draws in the pass.
            rows: texts in it.
        """
        cache = DynamicCache(config=self.config)
        ids = self.token_ids.expand(copies, -1)
        mask = torch.ones_like(ids)
        run({"input_ids": ids, "attention_mask": mask, "use_cache": True, self.argument: cache})
        cache.batch_repeat_interleave(rows)
        return {self.argument: cache, "use_cache": True}


def split_prefix(model: nn.Module, inputs: Mapping[str, Any]) -> SharedPrefix | None:
    """The shared beginning of a batch, and the rest; None where fewer than two texts share any token.

    The last token of each text is always in the rest.

    Args:
        model: a decoder.
        inputs: `input_ids` (B, T) and, where texts are padded, `attention_mask`.

    Raises:
        ValueError: the model or the batch is of another kind.
    """
    base: Any = getattr(model, "get_base_model", lambda: model)()
    config = base.config.get_text_config()
    names = sorted(name for name, value in inputs.items() if value is not None)
    ids = inputs.get("input_ids")
    if (
        set(names) - {"input_ids", "attention_mask"}
        or not isinstance(ids, Tensor)
        or ids.dim() != 2
    ):
        raise ValueError(
            "predict: share_prefix must come with input_ids (B, T) and attention_mask alone, got "
            f"{', '.join(names)}; leave it out"
        )
    argument = cache_argument(base)
    plain = argument is not None and not getattr(config, "is_encoder_decoder", False)
    if plain and getattr(base, "padding_side", "left") == "left":
        layers = DynamicCache(config=config).layers
        plain = all(type(layer) is DynamicLayer for layer in layers)
    else:
        plain = False
    if not plain or argument is None:
        raise ValueError(
            "predict: share_prefix must come with a decoder that has a KV cache of all tokens and takes "
            f"position_ids, got {type(base).__name__}; leave it out"
        )
    given = inputs.get("attention_mask")
    mask = torch.ones_like(ids) if given is None else given.ne(0).to(ids.dtype)
    lengths = mask.sum(-1)
    order = mask.argsort(dim=-1, descending=True, stable=True)  # real tokens first
    texts = ids.gather(1, order)
    same = (texts == texts[:1]).all(0)
    shared = min(int(same.cumprod(0).sum()), int(lengths.min()) - 1)
    if len(ids) < 2 or shared < 1:
        return None
    longest = int(lengths.max()) - shared
    places = torch.arange(longest, device=ids.device) - longest + lengths[:, None]  # in the text
    real = places >= shared
    pad = config.pad_token_id if config.pad_token_id is not None else 0
    rest = {
        "input_ids": texts.gather(1, places.clamp(min=0)).where(real, pad),
        "attention_mask": torch.cat([mask.new_ones(len(ids), shared), real.to(mask.dtype)], 1),
        "position_ids": places.clamp(min=0),
    }
    return SharedPrefix(texts[0, :shared], rest, argument, config)
