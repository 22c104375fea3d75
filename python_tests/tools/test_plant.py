"""Faults to be planted are in the sources still (plant.py plants them; the suite does not)."""

from __future__ import annotations

import pytest

from tools.plant import FAULTS, ROOT


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_of_one_place(name: str) -> None:
    fault = FAULTS[name]
    text = (ROOT / "csrc" / fault.file).read_text()
    assert text.count(fault.old) == 1 and fault.old != fault.new
    tests = [t for t in fault.tests if t.endswith(".py")]
    assert tests and all((ROOT / t).exists() for t in tests)
