"""Every option of `peft.LoraConfig`: it works from training to loading, or is refused before a change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import (
    CLASSES,
    IDS,
    LABELS,
    ROWS,
    arguments,
    bert,
    choices,
    fill,
    fingerprint,
    llama,
)

from bayes_kernels.hf import (
    BayesTrainer,
    BlobConfig,
    bayesianize,
    load_laplace,
    predict,
    save_laplace,
)
from bayes_kernels.hf._compat import KEEPS_BIASES
from bayes_kernels.hf.lora_options import check_lora_options, check_on_model
from bayes_kernels.hf.method import METHODS

MODELS = {"bert": bert, "llama": llama}
TASKS = {"bert": "SEQ_CLS", "llama": "CAUSAL_LM"}
# What differs: the two layers, the list of layers, an embedding, and a module to save.
NAMES = {
    "bert": ("query", "value", "layer", "word_embeddings", "classifier"),
    "llama": ("q_proj", "v_proj", "layers", "embed_tokens", "lm_head"),
}

# Values that work, by option; NAMES[kind] by number where there is one in braces.
WORKS: list[dict[str, Any]] = [
    {"exclude_modules": ["{0}"]},
    {"exclude_modules": r".*\.0\..*"},
    {"target_modules": "all-linear"},
    {"target_modules": ".*{1}"},
    {"layers_to_transform": [1]},
    {"layers_to_transform": 1, "layers_pattern": "{2}"},
    {"layers_to_transform": [0], "layers_pattern": ["{2}"]},
    {"rank_pattern": {"{0}": 2}, "alpha_pattern": {"{1}": 3}, "use_rslora": True},
    *({"bias": v} for v in ("all", "lora_only") if KEEPS_BIASES),
    {"modules_to_save": ["{4}"]},
    {"fan_in_fan_out": True},  # PEFT sets it right for layers that are linear
    {"lora_dropout": 0.1},
    *({"init_lora_weights": v} for v in (False, "gaussian", "olora", "orthogonal", "pissa")),
    {"init_lora_weights": "pissa_niter_2"},
    {"layer_replication": [(0, 2), (1, 2)]},
    {"trainable_token_indices": [3, 5]},
    {"trainable_token_indices": {"{3}": [3, 5]}},
]

# Values that are refused by the configuration, and what is said.
NO_OPTION: list[tuple[dict[str, Any], str]] = [
    ({"target_modules": 3}, "target_modules must be a text or a list of names, got 3"),
    ({"target_modules": "q("}, r"target_modules must be a regular expression, got 'q\('"),
    ({"exclude_modules": 3}, "exclude_modules must be a text or a list of names, got 3"),
    ({"exclude_modules": [3]}, "exclude_modules must be a text or a list of names"),
    ({"exclude_modules": "q("}, "exclude_modules must be a regular expression"),
    ({"layers_pattern": 3, "layers_to_transform": 0}, "layers_pattern must be a text or a list"),
    *(
        ({"layers_to_transform": value}, "layers_to_transform must be the number of a layer")
        for value in ("0", ["0"], [True], 1.5, [], [-1])
    ),
    ({"bias": "some"}, "bias must be one of .'none', 'all', 'lora_only'."),
    ({"bias": 3}, "bias must be one of"),
    *(
        ({"bias": v}, "bias must be .* PEFT below")
        for v in ("all", "lora_only")
        if not KEEPS_BIASES
    ),
    ({"fan_in_fan_out": 1}, "fan_in_fan_out must be true or false, got 1"),
    ({"use_rslora": "yes"}, "use_rslora must be true or false, got 'yes'"),
    ({"modules_to_save": "lm_head"}, "modules_to_save must be a list of names, got 'lm_head'"),
    ({"modules_to_save": 3}, "modules_to_save must be a list of names"),
    *(
        ({"lora_dropout": value}, r"lora_dropout must be a number in \[0, 1\), got")
        for value in ("0.1", 1.0, float("nan"))
    ),
    ({"target_parameters": "experts"}, "target_parameters must be a list of names"),
    ({"init_lora_weights": 3}, "init_lora_weights must be true, false or a word"),
    ({"init_lora_weights": "pissa_niter_x"}, "init_lora_weights must be true, false or a word"),
    ({"loftq_config": 3}, "loftq_config must be a mapping or a peft.LoftQConfig, got 3"),
    *(
        ({"layer_replication": value}, "layer_replication must be a list of pairs of layers")
        for value in (3, [3], [(1, 0)], [(0, 1, 2)], [("0", "1")], [(-1, 1)])
    ),
    *(
        ({"trainable_token_indices": value}, "trainable_token_indices must be a list of token ids")
        for value in ("foo", [-1], [], [1.5], {"x": 3}, {"x": []}, {3: [1]})
    ),
    ({"runtime_config": {"ephemeral_gpu_offload": True}}, "runtime_config must be a LoraRuntimeC"),
    ({"runtime_config": 3}, "runtime_config must be a LoraRuntimeConfig of peft, got 3"),
]

# Values that the model decides about.
NOT_OF_THE_MODEL: list[tuple[dict[str, Any], str]] = [
    ({"modules_to_save": ["{4}", "foo"]}, "modules_to_save must have names of modules .* got foo"),
    ({"layers_to_transform": [0, 7]}, r"layers_to_transform must .* got \[7\]; it has 0 to 1"),
    ({"trainable_token_indices": [9999]}, "trainable_token_indices must be below 64, .* got 9999"),
    ({"trainable_token_indices": {"{3}": [64]}}, "trainable_token_indices must be below 64"),
    ({"init_lora_weights": "lora_ga"}, "init_lora_weights='lora_ga' needs gradients of the model"),
]

# Other tests have these: other adapters (`test_config.py`), fused experts, ranks and scales.
ELSEWHERE = {
    *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path"),
    *("revision", "inference_mode", "r", "lora_alpha", "megatron_core", "qalora_group_size"),
    *("use_dora", "alora_invocation_tokens", "arrow_config", "monteclora_config", "kasa_config"),
    *("velora_config", "use_bdlora", "use_qalora", "lora_bias", "ensure_weight_tying"),
    *("megatron_config", "eva_config", "corda_config", "lora_ga_config"),
}

# Options that the oldest PEFT does not have.
LATER = {"kasa_config"}


def options(kind: str, given: dict[str, Any]) -> dict[str, Any]:
    """With the names of a model in place of their numbers, and what all have."""

    def named(value: Any) -> Any:
        if isinstance(value, str) and "{" in value:
            return value.format(*NAMES[kind])
        if isinstance(value, dict):
            return {named(k): named(v) for k, v in value.items()}
        return [named(one) for one in value] if isinstance(value, list) else value

    usual = {"r": 4, "target_modules": list(NAMES[kind][:2]), "task_type": TASKS[kind]}
    found = usual | {name: named(value) for name, value in given.items()}
    if isinstance(found["target_modules"], str):
        assert "layers_to_transform" not in found
    return found


def base(kind: str) -> Any:
    return MODELS[kind](num_hidden_layers=2)


def test_every_option_is_here() -> None:
    cases = [*WORKS, *(given for given, _ in (*NO_OPTION, *NOT_OF_THE_MODEL))]
    named = {name for given in cases for name in given} | ELSEWHERE
    fields = {*LoraConfig.__dataclass_fields__}
    assert fields <= named and named - fields <= LATER


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("given", WORKS, ids=str)
def test_options_that_work(kind: str, given: dict[str, Any], tmp_path: Path) -> None:
    """BLoB: two steps, saved, loaded and asked, draws and all; plain LoRA with a Laplace posterior."""
    batch = {"input_ids": IDS}
    law = {"n_samples": 4, "seed": 1, **choices(kind)}
    data = CLASSES[:8] if kind == "bert" else [{"input_ids": r, "labels": r} for r in ROWS[:8]]
    model = fill(get_peft_model(base(kind), BlobConfig(**options(kind, given))))
    trained = BayesTrainer(
        model=model, args=arguments(tmp_path / "run", max_steps=2), train_dataset=data
    ).train()
    assert trained.global_step == 2
    plain = fill(get_peft_model(base(kind), LoraConfig(**options(kind, given)))).eval()
    bayesianize(plain, "laplace", [{**batch, "labels": LABELS}], progress=False, **choices(kind))
    for name, one in (("blob", model.eval()), ("laplace", plain)):
        expected = predict(one, batch, **law)
        assert expected.mutual_information.max() > 1e-9
        one.save_pretrained(str(tmp_path / name))
        if name == "laplace":
            save_laplace(one, tmp_path / name)
        again = PeftModel.from_pretrained(base(kind), str(tmp_path / name)).eval()
        if name == "laplace":
            load_laplace(again, tmp_path / name)
        found = predict(again, batch, **law)
        torch.testing.assert_close(found.probs, expected.probs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("given", "said"), NO_OPTION, ids=str)
def test_options_that_are_none(given: dict[str, Any], said: str) -> None:
    usual = {"target_modules": ["q_proj"], **given}
    with pytest.raises(ValueError, match=f"BlobConfig: {said}") as caught:
        BlobConfig(**usual)
    assert "\n" not in str(caught.value)
    with pytest.raises(
        ValueError, match=f"lora: {said}"
    ):  # as commands ask, for plain LoRA as well
        check_lora_options("lora", usual)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(("given", "said"), NOT_OF_THE_MODEL, ids=str)
def test_what_the_model_does_not_have(kind: str, given: dict[str, Any], said: str) -> None:
    model = base(kind)
    before, found = fingerprint(model), options(kind, given)
    with pytest.raises(ValueError, match=f"BlobConfig: {said}") as caught:
        get_peft_model(model, BlobConfig(**found))
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=f"lora: {said}"):
        check_on_model("lora", found, model)
    assert fingerprint(model) == before


@pytest.mark.parametrize("names", [("pooler",), {"pooler"}], ids=str)
def test_names_of_modules_may_be_a_tuple_or_a_set(names: Any) -> None:
    """PEFT itself adds to a list only."""
    model = get_peft_model(bert(), BlobConfig(**options("bert", {"modules_to_save": names})))
    found = model.peft_config["default"].modules_to_save
    assert found == ["pooler", "classifier", "score"]


@pytest.mark.parametrize("kind", MODELS)
def test_layers_that_are_not_there_cannot_be_copied(kind: str) -> None:
    model = base(kind)
    before = fingerprint(model)
    with pytest.raises(ValueError, match="BlobConfig: layer_replication must have layers of the m"):
        get_peft_model(model, BlobConfig(**options(kind, {"layer_replication": [(0, 9)]})))
    assert fingerprint(model) == before


# What commands refuse before they train plain LoRA for TFB or Laplace.
CONVERSIONS = [
    (given, method)
    for given in (
        {"use_dora": True},
        {"lora_bias": True},
        {"use_qalora": True, "qalora_group_size": 16},
        {"init_lora_weights": "mica"},
        {"velora_config": {}},
        {"kasa_config": {}},
        {"monteclora_config": {}},
        {"alora_invocation_tokens": [1, 2]},
    )
    for method in ("tfb", "laplace")
    if (method == "tfb" or not given.keys() & {"lora_bias", "use_qalora"})
    and given.keys() <= LoraConfig.__dataclass_fields__.keys()
]


@pytest.mark.parametrize(("given", "method"), CONVERSIONS, ids=str)
def test_what_cannot_be_converted_is_known_before_training(
    given: dict[str, Any], method: str
) -> None:
    """Of an adapter that is as it was made: the message is that of the conversion."""
    conversion = METHODS[method].conversion
    assert conversion is not None
    model = get_peft_model(base("bert"), LoraConfig(**options("bert", given)))
    with pytest.raises(ValueError, match=r"cannot be combined|freezes a factor|no product of two"):
        conversion.check_model(model)
    usual = get_peft_model(base("bert"), LoraConfig(**options("bert", {"use_rslora": True})))
    conversion.check_model(usual)
