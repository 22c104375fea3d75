"""Adapters of fused experts: training steps and forward passes of a mixture of random weights.

    python cuda_benchmarks experts --device cpu [--quick] [--vs PROVIDERS] [--save]

The model is transformers' Qwen3-MoE without its query, key and value adapted: `target_parameters` names
both projections of all experts, rank 8. Nothing is downloaded.

Providers
    blob           bayes_kernels.hf: rows sorted by expert, the adapter in one grouped op beside each product
    peft_lora      plain LoRA by stock PEFT, which adds B A of every expert to its weights in each pass
    base           the model without adapters, forward only
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from bench_end_to_end import missing, seeded
from harness import (
    Agreement,
    Family,
    Options,
    Row,
    count_launches,
    make_row,
    peak_bytes,
    time_interleaved,
    tolerance,
)
from torch import Tensor, nn

OURS = ("blob",)
PEERS = ("peft_lora", "base")
TARGETS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
RANK = 8


@dataclass(frozen=True)
class Case:
    """Tokens of one text through `layers` layers of `experts` experts, `chosen` of them for each token."""

    tokens: int
    layers: int
    experts: int
    chosen: int
    hidden: int
    inner: int  # of an expert
    dtype: torch.dtype

    @property
    def name(self) -> str:
        return (
            f"{self.layers} layers, {self.chosen} of {self.experts} experts {self.hidden} x "
            f"{self.inner}, {self.tokens} tokens {str(self.dtype).removeprefix('torch.')}"
        )


TINY = Case(12, 2, 4, 2, 32, 24, torch.float32)


def cases(device: str, quick: bool) -> list[Case]:
    bf16 = torch.bfloat16
    if device == "cuda":
        sizes = [4096] if quick else [256, 4096]
        return [Case(tokens, 2, 128, 8, 2048, 768, bf16) for tokens in sizes]
    if quick:
        return [Case(64, 1, 16, 4, 256, 128, bf16)]
    return [Case(tokens, 2, 64, 8, 1024, 384, bf16) for tokens in (32, 256)]


def build(case: Case, device: str, dtype: torch.dtype | None = None) -> nn.Module:
    """A frozen causal model of random weights."""
    import transformers

    config = transformers.Qwen3MoeConfig(
        hidden_size=case.hidden,
        num_hidden_layers=case.layers,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=case.hidden // 8,
        vocab_size=1000,
        num_experts=case.experts,
        num_experts_per_tok=case.chosen,
        moe_intermediate_size=case.inner,
        pad_token_id=0,
    )
    with torch.device(device), seeded():
        model = transformers.Qwen3MoeForCausalLM(config)
    model.config.use_cache = False
    return model.to(dtype or case.dtype).requires_grad_(False)


def attach(base: nn.Module, method: str) -> Any:
    """Adapters on the experts, with factors B that do something."""
    from peft import LoraConfig, get_peft_model

    import bayes_kernels.hf as hf

    kind = {"peft_lora": LoraConfig, "blob": hf.BlobConfig}[method]
    config = kind(
        r=RANK,
        lora_alpha=2 * RANK,
        target_modules=[],
        target_parameters=TARGETS,
        task_type="CAUSAL_LM",
    )
    with seeded():
        model: Any = get_peft_model(base, config)
    with torch.no_grad(), seeded():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.02)
    return model


def batch_of(case: Case, device: str) -> dict[str, Tensor]:
    ids = torch.randint(1, 1000, (1, case.tokens), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids.to(device), "labels": ids.to(device)}


def check(device: str) -> Agreement:
    """Logits of both in fp32 at the same factors, ours at the posterior mean, against PEFT's in fp64."""
    from bayes_kernels.hf import posterior

    case, agreement = TINY, Agreement("experts", OURS)
    batch = batch_of(case, device)
    models = {name: attach(build(case, device), name).eval() for name in ("blob", "peft_lora")}
    wide: Any = build(case, device, torch.float64)
    wide.set_experts_implementation("eager")  # grouped products know no fp64
    exact = attach(wide, "peft_lora").double().eval()
    own = dict(models["blob"].named_parameters())
    with torch.no_grad():
        for model in (models["peft_lora"], exact):
            for name, p in model.named_parameters():
                if "lora_" in name:
                    p.copy_(own[name])
        truth = exact(**batch).logits
        within = 2 * math.sqrt(case.layers) * tolerance(case.dtype, case.hidden)
        with posterior(models["blob"], "mean"):
            agreement.check("blob", [models["blob"](**batch).logits], [truth], within)
        agreement.check("peft_lora", [models["peft_lora"](**batch).logits], [truth], within)
    return agreement


def run_case(case: Case, options: Options, agreement: Agreement) -> list[Row]:
    """Forward and backward, then forward alone, of all providers."""
    device = options.device
    batch = batch_of(case, device)
    models: dict[str, Any] = {
        name: attach(build(case, device), name).train() for name in ("blob", "peft_lora")
    }
    models["base"] = build(case, device)

    def step(model: Any) -> Callable[[], object]:
        trained = [p for p in model.parameters() if p.requires_grad]
        return lambda: torch.autograd.grad(model(**batch).loss, trained)

    def forward(model: Any) -> Callable[[], object]:
        return torch.no_grad()(lambda: model(**batch).logits)

    rows = []
    for mode, names, make in (
        ("forward+backward", ("blob", "peft_lora"), step),
        ("forward", tuple(models), forward),
    ):
        steps = options.pick({name: make(models[name]) for name in names}, OURS)
        times = time_interleaved(steps, device, seconds=options.time_for(10.0, 1.0))
        for name, one in steps.items():
            row = make_row("experts", case.name, name, mode, times, device, agreement)
            row.peak_bytes = peak_bytes(one, device)
            row.launches = count_launches(one, device)
            row.figures["tokens_per_second"] = round(case.tokens / (row.p50_us * 1e-6), 1)
            rows.append(row)
    return rows


def run(options: Options) -> Iterator[Row]:
    """All cases."""
    wanted = [c for c in cases(options.device, options.quick) if options.wants(c.name)]
    agreement = check(options.device) if wanted else Agreement("experts", OURS)
    for case in wanted:
        yield from run_case(case, options, agreement)


FAMILY = Family("experts", "adapters of fused experts", OURS, PEERS, run, missing)
