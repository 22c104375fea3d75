"""Options that cannot be."""

from __future__ import annotations

from typing import Any

import pytest

from bayes_kernels.hf import (
    BlobConfig,
)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "use_dora cannot be combined"),
        ({"alora_invocation_tokens": [1], "task_type": "CAUSAL_LM"}, "alora_invocation_tokens"),
        ({"arrow_config": {}}, "arrow_config|ArrowConfig"),
        ({"monteclora_config": {}}, "monteclora_config"),
        ({"target_parameters": ["a.weight"]}, "target_parameters"),
        ({"lora_bias": True}, "lora_bias"),
        ({"init_lora_weights": "mica"}, "mica"),
        ({"std": "exp"}, "std must be one of"),
        ({"scope": "row"}, "scope must be one of"),
        ({"prior_std": 0.0}, "prior_std must be a positive number"),
        ({"init_rho": float("nan")}, "init_rho must be a positive number"),
        ({"seed": 1.5}, "seed must be an int"),
        ({"kl_schedule": "cosine"}, "kl_schedule must be one of"),
        ({"lora_dropout": 1.0}, "lora_dropout must be in"),
    ],
)
def test_rejected_options(options: dict[str, Any], message: str) -> None:
    if options == {"arrow_config": {}} or options == {"monteclora_config": {}}:
        from peft import ArrowConfig, MontecloraConfig

        made = ArrowConfig() if "arrow_config" in options else MontecloraConfig()
        options = {next(iter(options)): made}
    with pytest.raises(ValueError, match=message):
        BlobConfig(target_modules=["q_proj"], **options)
