"""Small transformers with random weights, adapters on them, and inputs.

Each builder seeds torch with 0: the same options give the same weights in every test.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import TrainingArguments

from bayes_kernels.hf import BlobConfig
from bayes_kernels.hf.heads import trim_head

ROWS = torch.randint(3, 64, (32, 6), generator=torch.Generator().manual_seed(1))
# Examples of three classes, to train on.
CLASSES = [
    {"input_ids": row, "attention_mask": torch.ones(6, dtype=torch.long), "labels": int(row[0]) % 3}
    for row in ROWS
]
IDS = ROWS[:4]
LABELS = torch.tensor([0, 2, 1, 0])
BATCHES = [
    {"input_ids": IDS[:2], "labels": LABELS[:2]},
    {"input_ids": IDS[2:], "labels": LABELS[2:]},
]
# What an adapter changes, and its task, by the type of the model.
TARGETS = {
    "bert": ["query", "value"],
    "roberta": ["query", "value"],
    "llama": ["q_proj", "v_proj"],
    "gpt2": ["c_attn"],
    "t5": ["q", "v"],
}
TASKS = {"llama": "CAUSAL_LM", "t5": "SEQ_2_SEQ_LM"}


def bert(kind: Any = transformers.BertForSequenceClassification, **options: Any) -> Any:
    """A BERT without dropout, in eval mode."""
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 64,
        "num_labels": 3,
        "max_position_embeddings": 32,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    return kind(kind.config_class(**{**sizes, **options})).eval()


def llama(kind: Any = transformers.LlamaForCausalLM, seed: int = 0, **options: Any) -> Any:
    """A Llama in eval mode."""
    torch.manual_seed(seed)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 64,
    }
    return kind(transformers.LlamaConfig(**{**sizes, **options})).eval()


def answering_llama(dtype: torch.dtype = torch.float32) -> Any:
    """A causal model with the head of three answers."""
    return trim_head(llama().to(dtype), [7, 11, 13])


def gpt2(kind: Any = transformers.GPT2ForSequenceClassification, **options: Any) -> Any:
    """A GPT-2 without dropout, in eval mode; its layers keep their weights transposed."""
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 4, "vocab_size": 64, "num_labels": 3}
    sizes |= dict.fromkeys(["embd_pdrop", "attn_pdrop", "resid_pdrop", "classifier_dropout"], 0.0)
    return kind(transformers.GPT2Config(**{**sizes, **options})).eval()


def t5(**options: Any) -> Any:
    """An encoder and a decoder without dropout, in eval mode."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 64,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 48,
        "num_layers": 1,
        "num_heads": 4,
        "decoder_start_token_id": 0,
        "eos_token_id": None,
        "dropout_rate": 0.0,
    }
    config = transformers.T5Config(**{**sizes, **options})
    return transformers.T5ForConditionalGeneration(config).eval()


# The same two kinds of model by a name, for parameters of tests.
BASES: dict[str, Callable[[], Any]] = {
    "bert": lambda: bert(initializer_range=0.2),
    "llama": llama,
}


def adapted(base: Any, config: Any = BlobConfig, **options: Any) -> PeftModel:
    """An adapter as it starts: of rank 4, on queries and values."""
    kind = base.config.model_type
    given = {"r": 4, "target_modules": TARGETS.get(kind), "task_type": TASKS.get(kind, "SEQ_CLS")}
    return get_peft_model(base, config(**{**given, **options}))


@torch.no_grad()
def fill(model: nn.Module, rho: float | None = 0.5, scale: float = 0.3) -> Any:
    """An adapter that does something: random B, and deviations that show where `rho` is not None."""
    generator = torch.Generator().manual_seed(2)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.copy_(torch.randn(p.shape, generator=generator) * scale)
        elif "rho" in name and rho is not None:
            p.fill_(rho)
        elif "log_s_sigma" in name and rho is not None:
            p.fill_(0.0)
    return model


def blob(
    kind: str = "llama",
    *,
    rho: float | None = 0.4,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Any:
    """A BLoB adapter that does something, on a base of that dtype."""
    return fill(adapted(BASES[kind]().to(dtype), **options), rho)


def trained(kind: str = "bert", config: Any = LoraConfig, **options: Any) -> Any:
    """An adapter that does something, in eval mode; the first B has rank 3."""
    model = fill(adapted(BASES[kind](), config, **options), rho=None)
    first = next(p for name, p in model.named_parameters() if "lora_B" in name)
    with torch.no_grad():
        first[:, 3] = first[:, 0] - 2 * first[:, 1]
    return model.eval()


def choices(kind: str) -> dict[str, Any]:
    """What `predict` and `bayesianize` need besides, for a model of BASES: its answers' tokens."""
    return {} if kind == "bert" else {"choices": [5, 6, 7]}


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor = IDS, **inputs: Any) -> Tensor:
    return model(input_ids=ids, **inputs).logits


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """The gradients by name; the model has none after it."""
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def arguments(folder: Path | str, **options: Any) -> TrainingArguments:
    """A few steps on the CPU that leave nothing behind but their log."""
    defaults: dict[str, Any] = {
        "per_device_train_batch_size": 4,
        "max_steps": 4,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "max_grad_norm": 0.0,
        "learning_rate": 1e-2,
        "seed": 5,
    }
    return TrainingArguments(str(folder), **{**defaults, **options})


def fingerprint(model: nn.Module) -> dict[str, tuple[Any, ...]]:
    """Modules of a model, as objects and by their attributes, and its tensors, by their digests too."""
    found: dict[str, tuple[Any, ...]] = {}
    for name, module in model.named_modules():
        found[name] = id(module), module.training, sorted(vars(module))
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        content = tensor.detach().reshape(-1).view(torch.uint8).numpy().tobytes()
        digest = hashlib.sha256(content).hexdigest()
        found[f"{name} "] = id(tensor), tensor.dtype, tensor.shape, tensor.requires_grad, digest
    return found
