"""Names of transformers, PEFT and accelerate that are looked up as text or overridden.

An import that fails says so by itself. What is here fails in silence or far away when a release renames
it: attributes read with a default, methods that a base class calls, keyword arguments, classes known
by name. Each failure is one line that names the library, what is missing and who needs it.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import accelerate
import peft
import pytest
import torch
import transformers
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraModel
from peft.tuners.lora.layer import Linear, LoraLayer, LoraVariant, ParamWrapper
from peft.utils import ModulesToSaveWrapper
from peft.utils.peft_types import PeftType, register_peft_method
from tools.floor import requirements
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.cache_utils import DynamicCache
from transformers.integrations import moe

from bayes_kernels.hf import (
    BayesLoraModel,
    BayesTrainerMixin,
    PolarVbllConfig,
    _compat,
    decoding,
    experts,
)
from bayes_kernels.hf.evaluation import PosteriorEvaluation
from bayes_kernels.hf.variants import BayesVariant

pytestmark = pytest.mark.cpu_only

ROOT = Path(__file__).resolve().parents[2]
IDS = torch.randint(3, 64, (2, 5), generator=torch.Generator().manual_seed(1))


def need(library: Any, owner: str, thing: Any, names: str, by: str) -> None:
    """Fail in one line where `thing` lacks one of the names."""
    missing = [name for name in names.split() if not hasattr(thing, name)]
    if missing:
        pytest.fail(
            f"{library.__name__} {library.__version__}: {owner} has no {', '.join(missing)}; "
            f"{by} needs it",
            pytrace=False,
        )


def need_arguments(library: Any, function: Callable[..., Any], names: str, by: str) -> None:
    """Fail in one line where a function takes no argument of one of the names."""
    taken = inspect.signature(function).parameters
    missing = [name for name in names.split() if name not in taken]
    if missing:
        pytest.fail(
            f"{library.__name__} {library.__version__}: {function.__qualname__} takes no "
            f"{', '.join(missing)} (but {', '.join(taken)}); {by} needs it",
            pytrace=False,
        )


def test_what_a_missing_name_says() -> None:
    with pytest.raises(pytest.fail.Exception, match=r"peft .*: Linear has no gone; hf/x\.py needs"):
        need(peft, "Linear", nn.Linear(1, 1), "weight gone", "hf/x.py")
    with pytest.raises(pytest.fail.Exception, match=r"takes no gone \(but config, default\)"):
        need_arguments(peft, _configured, "config gone", "hf/x.py")


def _configured(config: Any, default: int = 0) -> None: ...


# --- PEFT ----------------------------------------------------------------------------------------


def plain(net: nn.Module, targets: list[str], **options: Any) -> Any:
    return get_peft_model(net, LoraConfig(r=2, target_modules=targets, **options))


def bert(cls: str = "BertForSequenceClassification", **options: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    config = transformers.BertConfig(vocab_size=64, num_attention_heads=2, **sizes, **options)
    return getattr(transformers, cls)(config)


def llama(cls: str = "LlamaForCausalLM", **options: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(vocab_size=64, num_attention_heads=2, **sizes, **options)
    return getattr(transformers, cls)(config)


def test_adapter_type() -> None:
    names = "_member_map_ _value2member_map_ _member_names_ __members__"
    need(peft, "PeftType", PeftType, names, "_compat._add_peft_type")
    need_arguments(
        peft, register_peft_method, "name config_cls model_cls prefix", "_compat.register"
    )
    need(peft, "peft.mapping", peft.mapping, "PEFT_TYPE_TO_CONFIG_MAPPING", "_compat.register")
    assert PeftType("BAYES_LORA") is _compat.BAYES_LORA


def test_adapted_layers() -> None:
    model = plain(bert(), ["query"], lora_dropout=0.1)
    layer = next(m for m in model.modules() if isinstance(m, LoraLayer))
    names = (
        "lora_A lora_B lora_dropout scaling lora_variant active_adapters merged_adapters merged "
        "disable_adapters adapter_layer_names other_param_names get_base_layer get_delta_weight "
        "in_features cast_input_dtype_enabled fan_in_fan_out"
    )
    need(peft, "lora.Linear", layer, names, "hf/variants.py and hf/posterior.py")
    need(peft, "lora_dropout", layer.lora_dropout["default"], "p", "hf/variants.py")


def test_formulas_of_adapters() -> None:
    hooks = {
        "init": "module adapter_name",
        "forward": "module active_adapter x result",
        "merge_safe": "module active_adapter orig_weight",
        "merge_unsafe": "module active_adapter orig_weight",
        "unmerge": "module active_adapter orig_weight",
    }
    for hook, arguments in hooks.items():
        need(peft, "LoraVariant", LoraVariant, hook, "hf/variants.py")
        need_arguments(peft, getattr(LoraVariant, hook), arguments, f"BayesVariant.{hook}")
        assert hook in vars(BayesVariant)


# Where PEFT has each of the layer classes that `unsupported_layer` lets through by name.
_FILES = {
    "Linear": "layer",
    "Linear8bitLt": "bnb",
    "Linear4bit": "bnb",
    "GPTQLoraLinear": "gptq",
    "HqqLoraLinear": "hqq",
    "Embedding": "layer",
    "Conv1d": "layer",
    "Conv2d": "layer",
    "Conv3d": "layer",
}


@pytest.mark.parametrize("name", sorted(_compat._LAYERS_WITH_VARIANTS))
def test_classes_of_layers_known_by_name(name: str) -> None:
    """They are there, and their forward hands over to the formula; their libraries need not be."""
    spec = importlib.util.find_spec(f"peft.tuners.lora.{_FILES[name]}")
    assert spec is not None and spec.origin is not None
    tree = ast.walk(ast.parse(Path(spec.origin).read_text(encoding="utf-8")))
    classes = {node.name: node for node in tree if isinstance(node, ast.ClassDef)}
    own = [classes[name]] if name in classes else []
    bases = [ast.unparse(base) for node in own for base in node.bases]
    family = own + [classes[base] for base in bases if base in classes and base != "LoraLayer"]
    if not any("self.lora_variant[active_adapter].forward" in ast.unparse(c) for c in family):
        pytest.fail(
            f"peft {peft.__version__}: peft.tuners.lora.{_FILES[name]} has no class {name} that "
            "uses lora_variant; _compat.unsupported_layer names it",
            pytrace=False,
        )


def test_layers_that_are_not_linear() -> None:
    """What `hf/targets.py` reads of embeddings and convolutions."""
    layers, by = peft.tuners.lora.layer, "hf/targets.py"
    net = plain(nn.Sequential(nn.Embedding(5, 4), nn.Conv1d(4, 4, 3, padding="same")), ["0", "1"])
    table, conv = net.base_model.model
    assert (type(table), type(conv)) == (layers.Embedding, layers.Conv1d)
    need(peft, "Embedding", table, "tp_layer _get_embed_scale lora_embedding_A", by)
    assert table.lora_embedding_A["default"].shape == (2, 5)
    assert table.lora_embedding_B["default"].shape == (4, 2)
    first = conv.lora_A["default"]
    need(torch, "Conv1d", first, "_reversed_padding_repeated_twice kernel_size stride", by)
    assert first.weight.shape == (2, 4, 3) and first._reversed_padding_repeated_twice == [1, 1]
    assert conv.lora_B["default"].weight.shape == (4, 2, 1)


def test_adapted_parameters() -> None:
    net = nn.Module()
    net.experts = nn.Module()
    net.experts.down = nn.Parameter(torch.zeros(2, 4, 3))
    options = {"target_modules": [], "target_parameters": ["experts.down"]}
    model = get_peft_model(net, LoraConfig(r=2, **options))
    layer = model.base_model.model.experts
    assert type(layer) is ParamWrapper and ParamWrapper.__name__ == "ParamWrapper"
    assert ParamWrapper.__name__ == experts.ParamWrapper.__name__  # PEFT asks for it by name
    names = "parameter_name num_experts get_param base_layer _activate_lora merge"
    need(peft, "lora.ParamWrapper", layer, names, "hf/experts.py")
    need_arguments(peft, ParamWrapper._activate_lora, "active_adapters", "hf/experts.py")
    need_arguments(peft, ParamWrapper.merge, "safe_merge adapter_names", "hf/experts.py")
    weights = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    with torch.no_grad():
        weights[1].normal_()
        a, b = experts.by_expert(layer, *weights)
        expected = layer.scaling["default"] * (b @ a)
    torch.testing.assert_close(layer.get_delta_weight("default"), expected)


def test_steps_of_adding_an_adapter() -> None:
    """PEFT calls the methods that `BayesLoraModel` overrides, with those arguments."""
    by = "BayesLoraModel"
    names = (
        "_check_new_adapter_config _prepare_model _create_and_replace delete_adapter "
        "enable_adapter_layers disable_adapter_layers add_weighted_adapter "
        "_unload_and_optionally_merge forward inject_adapter"
    )
    need(peft, "LoraModel", LoraModel, f"{names} _cast_adapter_dtype", by)
    for name in names.split():
        assert name in vars(BayesLoraModel), f"{by}.{name} is gone: take it off this list"
    need_arguments(
        peft,
        LoraModel._create_and_replace,
        "lora_config adapter_name target target_name parent current_key",
        by,
    )
    called: list[str] = []

    def noted(name: str) -> Callable[..., Any]:
        stock = getattr(LoraModel, name)

        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            called.append(name)
            return stock(self, *args, **kwargs)

        return method

    steps = "_check_new_adapter_config _prepare_model _create_and_replace delete_adapter"
    steps += " _unload_and_optionally_merge enable_adapter_layers disable_adapter_layers"
    cls = type("Noted", (LoraModel,), {name: noted(name) for name in steps.split()})
    model = plain(bert(), ["query"])
    tuner = cls(bert(), LoraConfig(target_modules=["query"]), "default")
    model.base_model = tuner
    with model.disable_adapter():
        pass
    tuner.unload()
    tuner.delete_adapter("default")
    missing = set(steps.split()) - set(called)
    if missing:
        pytest.fail(
            f"peft {peft.__version__}: adding, disabling and removing an adapter no longer calls "
            f"{', '.join(sorted(missing))}; BayesLoraModel overrides it",
            pytrace=False,
        )


def test_parts_trained_with_an_adapter() -> None:
    model = plain(bert(), ["query"], task_type="SEQ_CLS")
    wrapper = next(m for m in model.modules() if isinstance(m, ModulesToSaveWrapper))
    names = "modules_to_save original_module active_adapters"
    need(peft, "ModulesToSaveWrapper", wrapper, names, "hf/methods/polar_vbll.py")
    need(peft, "PeftModel", model, "peft_config active_adapter base_model peft_type", "hf/model.py")
    need(peft, "LoraModel", model.base_model, "model peft_config", "hf/model.py")


@pytest.mark.parametrize("names", [("tp",), ("dp", "tp"), ("dp",), None])
def test_weights_split_by_tensor_parallelism(names: tuple[str, ...] | None) -> None:
    """transformers splits weights as DTensors; a mesh of data parallelism alone splits none."""
    import torch.testing._internal.distributed.fake_pg
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, distribute_tensor

    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("fake", store=store, rank=0, world_size=1)
    try:
        shape = (1,) * (1 if names is None else len(names))
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
        base = nn.Linear(4, 4)
        split = distribute_tensor(base.weight.detach(), mesh, [Replicate()] * mesh.ndim)
        base.weight = nn.Parameter(split)
        layer = Linear(nn.Linear(4, 4), "default", LoraConfig(r=2), r=2, lora_alpha=2)
        layer.base_layer = base
        reason = _compat.unsupported_layer(layer)
        if names == ("dp",):
            assert reason is None
        else:
            assert reason == "its weight is split by tensor parallelism"
    finally:
        torch.distributed.destroy_process_group()


# --- transformers --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Mixtral", "GptOss"])
def test_interface_of_experts(name: str) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 64}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 2}
    config = getattr(transformers, f"{name}Config")(head_dim=8, **sizes, **heads)
    module = getattr(transformers, f"{name}ForCausalLM")(config).model.layers[0].mlp.experts
    assert _compat.follows_experts_interface(module)
    assert not _compat.follows_experts_interface(nn.Linear(1, 1))
    names = "num_experts has_gate has_bias is_transposed config _apply_gate gate_up_proj down_proj"
    names += " gate_up_proj_bias down_proj_bias" if module.has_bias else ""
    need(transformers, type(module).__name__, module, names, "hf/experts.py")
    need(
        transformers, "integrations.moe", moe, "ALL_EXPERTS_FUNCTIONS _grouped_mm", "hf/experts.py"
    )
    need_arguments(transformers, moe._grouped_mm, "input weight offs", "hf/experts.py")
    assert hasattr(torch.ops.transformers, "grouped_mm_fallback")
    default = moe.ALL_EXPERTS_FUNCTIONS.get_interface(experts.IMPLEMENTATION, None)
    assert default is experts.experts_forward
    taken = list(inspect.signature(moe.grouped_mm_experts_forward).parameters)[1:]
    assert taken == list(inspect.signature(experts.experts_forward).parameters)[1:]


def t5() -> Any:
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=64, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2,
        decoder_start_token_id=0,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config)


def gpt2(cls: str = "GPT2LMHeadModel", **options: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2, **options)
    return getattr(transformers, cls)(config)


def mamba() -> Any:
    torch.manual_seed(0)
    config = transformers.MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1)
    return transformers.MambaForCausalLM(config)


@pytest.mark.parametrize("make", [llama, gpt2, t5, bert])
def test_sizes_in_configurations(make: Callable[[], Any]) -> None:
    names = "hidden_size num_attention_heads vocab_size get_text_config pad_token_id"
    names += " is_encoder_decoder num_labels problem_type tie_word_embeddings"
    need(
        transformers,
        "the configuration",
        make().config,
        names,
        "hf/predict.py and experiment/models.py",
    )


def test_a_cache_of_a_shared_beginning() -> None:
    model = transformers.LlamaForCausalLM
    need(
        transformers,
        "DynamicCache",
        DynamicCache(),
        "layers batch_repeat_interleave",
        "prefixes.py",
    )
    names = inspect.signature(model.forward).parameters
    if not {*_compat.CACHE_NAMES[:2]} & {*names} or "position_ids" not in names:
        pytest.fail(
            f"transformers {transformers.__version__}: LlamaForCausalLM.forward has none of "
            f"{_compat.CACHE_NAMES[:2]}, or no position_ids; prefixes.py needs them",
            pytrace=False,
        )


@pytest.mark.parametrize("make", [llama, gpt2, t5, mamba])
def test_names_of_caches(make: Callable[[], Any]) -> None:
    """In generation the first pass has an empty cache or none, and the further ones a full one."""
    model = make().eval()
    passes: list[tuple[bool, list[str]]] = []
    model.register_forward_pre_hook(
        lambda _m, _a, kwargs: passes.append((_compat.continues_a_text(kwargs), sorted(kwargs))),
        with_kwargs=True,
    )
    model.generate(input_ids=IDS, max_new_tokens=3, min_new_tokens=3, pad_token_id=0)
    found = [continues for continues, _ in passes]
    if found != [False, True, True]:
        pytest.fail(
            f"transformers {transformers.__version__}: {type(model).__name__}.generate hands its "
            f"cache over under none of _compat.CACHE_NAMES {_compat.CACHE_NAMES}, or without "
            f"get_seq_length: {found} with {passes[-1][1]}",
            pytrace=False,
        )


def test_loops_of_generation() -> None:
    """`generate` hands over its loop, with what it has prepared, and the loops have their names."""
    by = "hf/decoding.py"
    mixin = transformers.GenerationMixin
    names = "inputs logits_processor stopping_criteria custom_generate kwargs"
    need_arguments(transformers, mixin.generate, names, by)
    names = "input_ids logits_processor stopping_criteria generation_config model_kwargs"
    for loop in {*decoding._LOOPS.values()}:
        need(transformers, "GenerationMixin", mixin, loop, by)
        need_arguments(transformers, getattr(mixin, loop), names, by)
    need_arguments(transformers, mixin._sample, "streamer", by)
    need_arguments(
        transformers, transformers.StopStringCriteria, "tokenizer stop_strings", "hf/generate.py"
    )


@pytest.mark.parametrize("make", [llama, gpt2])
def test_arguments_of_language_models(make: Callable[[], Any]) -> None:
    model = make()
    names = "input_ids attention_mask position_ids inputs_embeds labels use_cache logits_to_keep"
    need_arguments(
        transformers, type(model).forward, names, "hf/predict.py and experiment/models.py"
    )
    need(
        transformers,
        type(model).__name__,
        model,
        "get_output_embeddings set_output_embeddings _tied_weights_keys all_tied_weights_keys "
        "loss_type generate config",
        "experiment/models.py",
    )


def test_arguments_of_encoder_decoders() -> None:
    names = "decoder_input_ids decoder_attention_mask decoder_inputs_embeds"
    by = "hf/predict.py"
    need_arguments(transformers, type(t5()).forward, names, by)
    need_arguments(transformers, transformers.BartForConditionalGeneration.forward, names, by)


@pytest.mark.parametrize(
    ("make", "target"),
    [
        (lambda: bert(num_labels=3), "query"),
        (lambda: llama("LlamaForSequenceClassification", num_labels=3), "q_proj"),
        (lambda: gpt2("GPT2ForSequenceClassification", num_labels=3), "c_attn"),
    ],
    ids=["bert", "llama", "gpt2"],
)
def test_names_of_class_heads(make: Callable[[], Any], target: str) -> None:
    """A variational last layer is put where the head is; "classifier" and "score" are its names."""
    net = make()
    if not (hasattr(net, "classifier") or hasattr(net, "score")):
        pytest.fail(
            f"transformers {transformers.__version__}: {type(net).__name__} has its head neither "
            "in classifier nor in score; hf/methods/polar_vbll.py needs it",
            pytrace=False,
        )
    get_peft_model(net, PolarVbllConfig(r=2, target_modules=[target], task_type="SEQ_CLS"))


@pytest.mark.parametrize(
    "make",
    [
        lambda: llama("LlamaForSequenceClassification"),
        lambda: gpt2("GPT2ForSequenceClassification"),
    ],
    ids=["llama", "gpt2"],
)
def test_where_a_missing_pad_token_is_looked_up(make: Callable[[], Any]) -> None:
    model = make().eval()
    model.config.pad_token_id = None
    ids = IDS[:1].expand(3, -1)
    with pytest.raises(ValueError, match="padding token"):
        model(input_ids=ids)
    with torch.no_grad():
        one = model(input_ids=IDS[:1]).logits
        with _compat.without_padding(model, {"input_ids": ids}):
            several = model(input_ids=ids).logits
    torch.testing.assert_close(several, one.expand(3, -1), rtol=1e-4, atol=1e-6)
    assert model.config.pad_token_id is None


# --- Trainer and accelerate ----------------------------------------------------------------------


def test_methods_of_the_trainer() -> None:
    by = "hf/trainer.py"
    ours = vars(BayesTrainerMixin) | vars(PosteriorEvaluation)
    own = [name for name, value in ours.items() if inspect.isfunction(value)]
    overridden = (
        "train get_decay_parameter_names training_step create_optimizer compute_loss log "
        "prediction_step evaluation_loop"
    )
    assert set(overridden.split()) <= set(own)
    need(transformers, "Trainer", Trainer, overridden, by)
    need(transformers, "Trainer", Trainer, "compute_loss_context_manager _prepare_inputs", by)
    need(transformers, "Trainer", Trainer, "add_callback", by)
    need_arguments(
        transformers,
        Trainer.compute_loss,
        "model inputs return_outputs num_items_in_batch",
        by,
    )
    need_arguments(transformers, Trainer.training_step, "model inputs num_items_in_batch", by)
    need_arguments(transformers, Trainer.prediction_step, "model inputs prediction_loss_only", by)
    need_arguments(transformers, Trainer.log, "logs", by)
    callback = "on_train_begin on_optimizer_step on_pre_optimizer_step"
    need(transformers, "TrainerCallback", TrainerCallback, callback, by)


class _Calls(TrainerCallback):
    """The order in which the trainer tells of an optimiser step, and the weights then."""

    def __init__(self) -> None:
        self.events: list[tuple[str, float]] = []

    def _note(self, event: str, model: nn.Module) -> None:
        weight = next(p for n, p in model.named_parameters() if "lora_B" in n)
        self.events.append((event, float(weight.detach().abs().sum())))

    def on_pre_optimizer_step(self, *_: Any, **kw: Any) -> None:
        self._note("before", kw["model"])

    def on_optimizer_step(self, *_: Any, **kw: Any) -> None:
        self._note("after", kw["model"])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Trainer, _Calls]]:
    """A stock trainer after two steps of two micro-batches, with what it is asked in between."""
    args = TrainingArguments(
        str(tmp_path_factory.mktemp("trainer")),
        max_steps=2,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=1,
        lr_scheduler_type="linear",
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    data = [{"input_ids": IDS[0], "labels": torch.tensor(1)}] * 4
    model = plain(bert(), ["query"], task_type="SEQ_CLS")
    calls = _Calls()
    trainer = Trainer(model=model, args=args, train_dataset=data, callbacks=[calls])
    trainer.train()
    yield trainer, calls


def test_attributes_of_a_trainer(trained: tuple[Trainer, _Calls]) -> None:
    trainer, _ = trained
    by = "hf/trainer.py"
    names = (
        "model_accepts_loss_kwargs compute_loss_func label_smoother optimizer_cls_and_kwargs "
        "accelerator optimizer lr_scheduler state args train_dataset "
        "current_gradient_accumulation_steps"
    )
    need(transformers, "Trainer", trainer, names, by)
    names = (
        "n_gpu process_index world_size train_batch_size gradient_accumulation_steps optim "
        "weight_decay adam_epsilon adam_beta1 adam_beta2 learning_rate max_grad_norm seed device"
    )
    need(transformers, "TrainingArguments", trainer.args, names, by)
    names = "global_step max_steps stateful_callbacks log_history"
    need(transformers, "TrainerState", trainer.state, names, by)
    need(accelerate, "Accelerator", trainer.accelerator, "gather optimizer_step_was_skipped", by)
    # Read with a default: without them the divergence would follow no schedule.
    need(transformers, "the linear schedule", trainer.lr_scheduler, "lr_lambdas last_epoch", by)
    need(accelerate, "AcceleratedOptimizer", trainer.optimizer, "optimizer param_groups", by)


def test_when_the_trainer_calls_back(trained: tuple[Trainer, _Calls]) -> None:
    """`on_optimizer_step` comes after the step and once for each: the divergence follows it."""
    _, calls = trained
    assert [event for event, _ in calls.events] == ["before", "after"] * 2
    sums = [value for _, value in calls.events]
    assert sums[0] == 0.0 and sums[1] > 0 and sums[1] == sums[2] != sums[3]


def test_the_state_file_of_a_checkpoint(trained: tuple[Trainer, _Calls], tmp_path: Path) -> None:
    """It is written last, so that a folder without it was not finished."""
    from transformers.trainer import TRAINER_STATE_NAME
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

    trainer, _ = trained
    trainer.args.output_dir = str(tmp_path)
    trainer._save_checkpoint(trainer.model, trial=None)
    (folder,) = tmp_path.glob(f"{PREFIX_CHECKPOINT_DIR}-*")
    newest = max(folder.iterdir(), key=lambda path: path.stat().st_mtime_ns)
    assert newest.name == TRAINER_STATE_NAME


# --- versions ------------------------------------------------------------------------------------


def test_ranges_are_those_of_the_package() -> None:
    """`check_versions` and pyproject.toml admit the same releases, and the installed ones."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for name, (low, high), module in (
        ("transformers", _compat.TRANSFORMERS_RANGE, transformers),
        ("peft", _compat.PEFT_RANGE, peft),
    ):
        (bounds,) = re.findall(rf'"{name}>=([\d.]+),<([\d.]+)"', text)
        assert bounds == (low, high)
        assert Version(low) <= Version(module.__version__) < Version(high)


def test_oldest_versions() -> None:
    """`make test-floor` installs the oldest releases that pyproject.toml admits."""
    found = requirements(ROOT / "pyproject.toml")
    assert {"transformers==5.17.*", "peft==0.20.*", "accelerate==1.10.*"} < set(found)
    assert any(line.startswith("pytest>=") for line in found)
    assert not any(line.startswith("bayes-kernels") for line in found)
