"""Configurations: one PEFT type, and a class with its own options for each method."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")

from peft import LoraConfig, PeftConfig

from bayes_kernels.hf import BayesLoraConfig, BlobConfig, PolarConfig, ScalablConfig
from bayes_kernels.hf.config import CONFIGS, own_fields

METHODS = sorted(CONFIGS)


@pytest.mark.parametrize("method", METHODS)
def test_the_general_class_makes_that_of_the_method(method: str) -> None:
    config = BayesLoraConfig(method=method, r=3, target_modules=["q"], seed=5)
    assert type(config) is CONFIGS[method] and config == CONFIGS[method](
        r=3, target_modules=["q"], seed=5
    )
    assert config.method == method and config.seed == 5
    for again in (copy.copy(config), copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert type(again) is type(config) and again == config


def test_the_general_class_is_blob_by_default() -> None:
    assert BayesLoraConfig() == BlobConfig()


@pytest.mark.parametrize("method", METHODS)
def test_files_hold_the_options_of_the_method_only(method: str, tmp_path: Path) -> None:
    config = CONFIGS[method](r=3, target_modules=["q"])
    config.save_pretrained(str(tmp_path))
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    lora = set(LoraConfig.__dataclass_fields__)
    assert stored.keys() - lora == {one.name for one in own_fields(type(config))}
    for reader in (PeftConfig, BayesLoraConfig, type(config)):
        again = reader.from_pretrained(str(tmp_path))
        assert type(again) is type(config) and again == config


def test_a_name_of_a_later_version_is_dropped_and_the_options_stay(tmp_path: Path) -> None:
    ScalablConfig(prior_std=0.7, kl_direction="code", target_modules=["q"]).save_pretrained(
        str(tmp_path)
    )
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "of_a_later_version": 1}))
    with pytest.warns(UserWarning, match="of_a_later_version"):
        config = PeftConfig.from_pretrained(str(tmp_path))
    assert isinstance(config, ScalablConfig)
    assert (config.prior_std, config.kl_direction) == (0.7, "code")


@pytest.mark.parametrize("general", [False, True])
def test_options_of_other_methods_are_refused_with_their_names(general: bool) -> None:
    def make(**options: object) -> object:
        return BayesLoraConfig(method="polar", **options) if general else PolarConfig(**options)

    with pytest.raises(
        ValueError, match=r"PolarConfig: prior_std must be left out.* blob, scalabl"
    ):
        make(prior_std=1.0)
    with pytest.raises(TypeError, match="unexpected keyword argument 'no_such_option'"):
        make(no_such_option=1)


def test_unknown_methods_and_those_of_another_class_are_refused() -> None:
    with pytest.raises(ValueError, match=r"BayesLoraConfig: method must be one of .* got 'vi'"):
        BayesLoraConfig(method="vi")
    for wrong in (None, "", ["blob"]):
        with pytest.raises(ValueError, match="BayesLoraConfig: method must be one of"):
            BayesLoraConfig(method=wrong)
    with pytest.raises(ValueError, match="BlobConfig: method must be 'blob', got 'polar'"):
        BlobConfig(method="polar")


FIELDS = [
    (method, one)
    for method in METHODS
    for one in own_fields(CONFIGS[method])
    if one.name not in ("method", "noise_layers")
]


@pytest.mark.parametrize(
    ("method", "field"), FIELDS, ids=[f"{method}-{one.name}" for method, one in FIELDS]
)
def test_each_option_says_what_it_is_and_refuses_another_type(method: str, field) -> None:
    assert field.metadata["help"].strip()
    wrong = object()
    with pytest.raises(ValueError, match=f"{CONFIGS[method].__name__}: {field.name} must be "):
        CONFIGS[method](**{field.name: wrong})
    if "bool" not in str(field.type) and not field.metadata["choices"]:
        with pytest.raises(ValueError, match=f"{field.name} must be "):
            CONFIGS[method](**{field.name: float("nan")})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "use_dora cannot be combined"),
        ({"alora_invocation_tokens": [1], "task_type": "CAUSAL_LM"}, "alora_invocation_tokens"),
        ({"arrow_config": {}}, "arrow_config|ArrowConfig"),
        ({"monteclora_config": {}}, "monteclora_config"),
        ({"lora_bias": True}, "lora_bias"),
        ({"use_qalora": True}, "use_qalora cannot be combined"),
        ({"lora_alpha": float("inf")}, "lora_alpha must be a finite number"),
        ({"alpha_pattern": {"q": float("nan")}}, r"alpha_pattern\['q'\] must be a finite number"),
        ({"alpha_pattern": 3}, "alpha_pattern must be a mapping of names of layers to scales"),
        ({"rank_pattern": 3}, "rank_pattern must be a mapping of names of layers to ranks, got 3"),
        ({"rank_pattern": {1: 3}}, "rank_pattern must be a mapping of names"),
        ({"rank_pattern": {"(": 3}}, "rank_pattern must have names of layers or regular"),
        ({"rank_pattern": {"q": True}}, r"rank_pattern\['q'\] must be a rank of at least 1"),
        ({"r": 0}, "r must be a rank of at least 1"),
        ({"init_lora_weights": "mica"}, "mica"),
        ({"std": "exp"}, "std must be one of"),
        ({"scope": "row"}, "scope must be one of"),
        ({"prior_std": 0.0}, "prior_std must be a positive number"),
        ({"init_rho": float("nan")}, "init_rho must be a positive number"),
        ({"seed": 1.5}, "seed must be an int"),
        ({"kl_schedule": "cosine"}, "kl_schedule must be one of"),
        ({"lora_dropout": 1.0}, "lora_dropout must be a number in"),
    ],
)
def test_rejected_options(options: dict[str, Any], message: str) -> None:
    if options == {"arrow_config": {}} or options == {"monteclora_config": {}}:
        from peft import ArrowConfig, MontecloraConfig

        made = ArrowConfig() if "arrow_config" in options else MontecloraConfig()
        options = {next(iter(options)): made}
    with pytest.raises(ValueError, match=message):
        BlobConfig(target_modules=["q_proj"], **options)
