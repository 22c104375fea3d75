"""Data sets of TRL's trainers."""

from __future__ import annotations

import secrets

import pytest


def without_fingerprints(monkeypatch: pytest.MonkeyPatch) -> None:
    """datasets 5.2 cannot pickle pyarrow's tables under Python 3.11; what it hashes is for its cache."""
    import datasets.arrow_dataset

    monkeypatch.setattr(
        datasets.arrow_dataset, "generate_fingerprint", lambda _: secrets.token_hex()
    )
