"""What PEFT has for plain LoRA only: refused for other methods, and nothing has changed."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
from peft.optimizers import create_lorafa_optimizer
from peft.utils.hotswap import hotswap_adapter_from_state_dict, prepare_model_for_compiled_hotswap

from bayes_kernels.hf import beside, guards
from hf.peft_adapters import X, adapted, every, same, snapshot


def pad(model: Any, folder: Path) -> None:
    prepare_model_for_compiled_hotswap(model, target_rank=13)


def swap(model: Any, folder: Path) -> None:
    state = {k: v + 1 for k, v in model.state_dict().items() if "lora_" in k}
    from peft.utils import hotswap  # as it is now, whoever imported it before

    hotswap.hotswap_adapter_from_state_dict(model, state, "default", model.peft_config["default"])


def lora_fa(model: Any, folder: Path) -> None:
    optimizer = create_lorafa_optimizer(model, r=4, lora_alpha=8, lr=1e-3)
    model(X).sum().backward()
    optimizer.step()


def to_lora_at_save(model: Any, folder: Path) -> None:
    config = model.peft_config["default"]
    config.init_lora_weights = "pissa"
    try:
        model.save_pretrained(
            folder / "out", path_initial_model_for_weight_conversion=folder / "init"
        )
    finally:
        config.init_lora_weights = True


GUARDS = [*guards._GUARDS, *beside.GUARDS]
HELPERS = {f.__name__: f for f in (pad, swap, lora_fa, to_lora_at_save)}


@every
@pytest.mark.parametrize("helper", HELPERS)
def test_helpers_for_plain_lora(tmp_path: Path, method: str, helper: str) -> None:
    model = adapted(method)
    model.save_pretrained(tmp_path / "init")
    files = {p.name: p.read_bytes() for p in (tmp_path / "init").iterdir()}
    before = snapshot(model)
    if method == "lora":
        HELPERS[helper](model, tmp_path)  # the guard lets plain LoRA through
        return
    with pytest.raises(ValueError, match=r"plain LoRA|must be left out"):
        HELPERS[helper](model, tmp_path)
    assert same(before, snapshot(model))
    assert files == {p.name: p.read_bytes() for p in (tmp_path / "init").iterdir()}
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("guard", GUARDS, ids=[f"{g[0]}.{g[1]}" for g in GUARDS])
def test_guarded_functions_exist(guard: Any) -> None:
    """A release of PEFT without one of these names has to be looked at."""
    place, name, before, _ = guard
    module, _, inside = place.partition(":")
    owner = __import__(module, fromlist=["x"])
    function = getattr(getattr(owner, inside) if inside else owner, name)
    assert function.bayes_kernels_guard
    needed = inspect.signature(before).parameters.values() if before else ()
    given = inspect.signature(function).parameters
    assert all(p.name in given for p in needed if p.kind is not p.VAR_KEYWORD), given
    assert hotswap_adapter_from_state_dict.__module__ == "peft.utils.hotswap"
