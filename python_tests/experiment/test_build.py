"""Models that are built for an experiment: weights, options, dtypes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from bayes_kernels.experiment import build
from bayes_kernels.experiment import run as ex
from bayes_kernels.experiment.recipe import Experiment, Recipe
from bayes_kernels.hf.methods.blob import BlobConfig
from bayes_kernels.task import Task
from experiment.tiny_runs import with_recipe

# Commands choose the GPU where there is one; what they find is compared with the CPU.
pytestmark = pytest.mark.cpu_only


def test_methods_start_from_the_same_weights(tiny: Experiment, task: Task) -> None:
    plain, _ = build.build(dataclasses.replace(tiny, method="mle"), task)
    bayes, _ = build.build(tiny, task)
    other, _ = build.build(dataclasses.replace(tiny, seed=1), task)
    left = {n: p for n, p in plain.named_parameters() if p.requires_grad}
    right = {n: p for n, p in bayes.named_parameters() if p.requires_grad}
    assert {n for n in right if n not in left} == {n for n in right if "lora_A_rho" in n}
    assert set(left) <= set(right) and any("classifier" in n for n in left)
    for name, value in left.items():
        assert torch.equal(value, right[name]), name
    changed = [n for n, p in other.named_parameters() if n in left and not torch.equal(p, left[n])]
    assert any("lora_A" in n for n in changed) and any("classifier" in n for n in changed)


def test_options_reach_the_adapter(tiny: Experiment, task: Task) -> None:
    one = with_recipe(
        tiny, options={"prior_std": 0.1, "kl_time": 0.5}, alpha=32, lora={"use_rslora": True}
    )
    model, encoder = build.build(one, task)
    config = model.peft_config["default"]
    assert (config.prior_std, config.kl_time, config.lora_alpha) == (0.1, 0.5, 32)
    assert config.use_rslora and config.seed == one.seed
    default = BlobConfig()
    assert config.init_rho == default.init_rho and config.kl_schedule == default.kl_schedule
    assert all(m.p == 0 for m in model.modules() if isinstance(m, torch.nn.Dropout))
    with pytest.raises(ValueError, match=r"expected options of peft\.LoraConfig .*, got speed"):
        build.adapter_config(with_recipe(tiny, lora={"speed": 1}), model, encoder.kind)
    with pytest.raises(ValueError, match="use_dora"):
        build.build(with_recipe(tiny, lora={"use_dora": True}), task)


def test_half_precision_on_the_cpu(tiny: Experiment, task: Task) -> None:
    longer = with_recipe(tiny, steps=40)
    half = dataclasses.replace(longer, dtype="bfloat16")
    model, _ = build.build(half, task, device="cpu")
    # The backward pass of the fused attention is several times slower there.
    assert model.config._attn_implementation == "eager"
    assert build.build(longer, task, device="cpu")[0].config._attn_implementation == "sdpa"
    for name, weight in model.named_parameters():
        wide = "lora_" in name  # the new head keeps the dtype of its base, as PEFT has it
        assert weight.dtype == (torch.float32 if wide else torch.bfloat16), name
    assert ex.run(half, task, device="cpu").rows[0].report.accuracy > 0.8


def test_layers_that_are_adapted_where_none_is_named(
    models_dir: Path, tiny: Experiment, task: Task
) -> None:
    """Of a causal model the outputs of its blocks too; of others, and where names are given, not."""
    model = str(models_dir / "stories260K")
    one = dataclasses.replace(tiny, model=model, style="plain", recipe=Recipe(rank=2))
    named = dataclasses.replace(one, recipe=Recipe(rank=2, target_modules=("k_proj",)))
    for experiment, expected in (
        (one, {"q_proj", "v_proj", "o_proj", "down_proj"}),
        (named, {"k_proj"}),
        (dataclasses.replace(one, model=tiny.model, style="blob"), {"query", "value"}),
    ):
        built, _ = build.build(experiment, task)
        assert set(built.peft_config["default"].target_modules) == expected


@pytest.mark.parametrize("method", ["blob", "mle"])
def test_parameters_of_experts(
    method: str, models_dir: Path, tiny: Experiment, task: Task, tmp_path: Path
) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    tokenizer = transformers.AutoTokenizer.from_pretrained(models_dir / "stories260K")
    config = transformers.MixtralConfig(
        vocab_size=len(tokenizer), num_attention_heads=2, num_key_value_heads=1, **sizes, **experts
    )
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)

    def with_targets(*names: str) -> Experiment:
        lora = {"target_parameters": list(names)}
        recipe = Recipe(rank=2, target_modules=("q_proj",), lora=lora)
        return dataclasses.replace(
            tiny, model=str(tmp_path), style="plain", method=method, recipe=recipe
        )

    built, _ = build.build(with_targets("experts.gate_up_proj"), task)
    trained = [name for name, p in built.named_parameters() if p.requires_grad]
    assert sum(".experts." in name for name in trained) == (3 if method == "blob" else 2)
    with pytest.raises(ValueError, match=r"experts have down_proj, gate_up_proj; got experts\.w1"):
        build.build(with_targets("experts.gate_up_proj", "experts.w1"), task)


def test_prompts_of_the_published_code(models_dir: Path, tiny: Experiment, task: Task) -> None:
    literal = dataclasses.replace(tiny, compat=True)
    with pytest.raises(ValueError, match="compat: expected a causal language model with it"):
        build.build(literal, task)
    causal = dataclasses.replace(literal, model=str(models_dir / "stories260K"))
    with pytest.raises(ValueError, match=r"compat=True: expected WinoGrande, ARC, .* got task"):
        build.build(causal, task)
    boolean = dataclasses.replace(task, label_names=("false", "true"), template="boolq")
    _, encoder = build.build(causal, boolean)
    assert encoder.prompt is not None and encoder.prompt.answers == ("True", "False")
    assert Experiment.from_dict(causal.to_dict()) == causal


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"init_lora_weights": "eva"}, "must be one that needs no examples, got 'eva'"),
        ({"init_lora_weights": "lora_ga"}, "must be one that needs no examples, got 'lora_ga'"),
        (
            {"eva_config": {"rho": 2.0}},
            "eva_config must be left out as no command initialises from examples, got",
        ),
        ({"loftq_config": {"loftq_bits": 4}}, "must be left out without init_lora_weights='loftq'"),
        ({"qalora_group_size": 4}, "qalora_group_size must be left out without use_qalora"),
        ({"exclude_modules": "("}, "exclude_modules must be a regular expression"),
        ({"trainable_token_indices": [-1]}, "trainable_token_indices must be a list of token"),
    ],
    ids=str,
)
@pytest.mark.parametrize("method", ["mle", "blob", "laplace"])
def test_commands_refuse_before_they_read(method: str, given: dict[str, Any], said: str) -> None:
    experiment = Experiment(method=method, recipe=Recipe(lora=given))
    with pytest.raises(ValueError, match=f"lora: .*{said}"):
        build.check_experiment(experiment)
