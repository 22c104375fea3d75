"""Splits and subsets that never change.

They are decided by a hash of the example, never by its position, so they do not depend on the order of the
files, on the platform or on a random number generator. A small training subset (``train_size``) is chosen
by a hash of the example and the seed: what makes plain LoRA overconfident, and hence what uncertainty
methods are compared on, is a few hundred rows.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence

from ...task import Example


def test_note(fraction: float) -> str:
    """What to say where test rows were split off."""
    return f"no test data: about {fraction:.0%} of the rows are kept for testing, whatever the seed"


def validation_note(fraction: float) -> str:
    """What to say where validation rows were split off."""
    rows = f"about {fraction:.0%} of the training rows"
    return f"validation: {rows}, for temperatures, priors and early choices"


def hash_of(text: str) -> int:
    """A 64-bit integer that depends on the text alone (Python's own ``hash`` is salted)."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big")


def fraction_of(text: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    return hash_of(text) / 2.0**64


def choose_subset(examples: Sequence[Example], size: int | None, seed: int = 0) -> list[Example]:
    """The ``size`` examples that come first in the order of a hash of the seed and the id.

    Nested: with the same seed a smaller subset is part of a larger one. ``None`` keeps all, in
    the same shuffled order.

    Raises:
        ValueError: ``size`` is not positive or there are fewer examples.
    """
    if size is not None and not 0 < size <= len(examples):
        raise ValueError(
            f"train_size: expected an integer from 1 to {len(examples)} (the training examples "
            f"there are) or None for all, got {size!r}"
        )
    return sorted(examples, key=lambda example: hash_of(f"{seed}\n{example.id}"))[:size]


def split_by_hash(
    examples: Iterable[Example], fraction: float, purpose: str
) -> tuple[list[Example], list[Example]]:
    """(rest, part): the examples whose hash of ``purpose`` and id is below ``fraction``.

    Whether an example is in the part depends on its id alone, not on the other examples. Ids that
    were made of one text go together.
    """
    rest: list[Example] = []
    part: list[Example] = []
    for example in examples:
        made = _MADE.match(example.id)
        key = example.id if made is None else made[0]
        (part if fraction_of(f"{purpose}\n{key}") < fraction else rest).append(example)
    return rest, part


# The second of two rows of one text has a number behind that.
_MADE = re.compile(r"text-[0-9a-f]{16}")


def content_id(question: str, context: str | None) -> str:
    """An id for a row that has none."""
    text = question if context is None else f"{context}\n{question}"
    return f"text-{hash_of(text):016x}"


def has_made_id(example: Example) -> bool:
    """Whether the example's id was made of its text."""
    return _MADE.match(example.id) is not None
