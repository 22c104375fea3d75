"""PoLAR adapters that do something, a batch, and a few steps of training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiny_models
import torch
from tiny_models import CLASSES, ROWS, answering_llama, bert
from torch import nn
from transformers import TrainingArguments

from bayes_kernels.hf import BayesTrainer, PolarConfig, PolarVbllConfig

BATCH = {"input_ids": ROWS[:8], "labels": ROWS[:8, 0] % 3}


def fill(model: nn.Module, seed: int = 2) -> Any:
    """Adapters that do something."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_core" in name:
                p.copy_(torch.randn(p.shape, generator=draw))
            elif "log_scale" in name:
                p.add_(torch.rand(p.shape, generator=draw))
    return model


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    defaults = {"per_device_train_batch_size": 8, "lr_scheduler_type": "constant"}
    return tiny_models.arguments(folder, **{**defaults, **options})


def fit(model: Any, folder: Path, trainer: Any = BayesTrainer, **options: Any) -> Any:
    ours = {k: options.pop(k) for k in ("kl_mode", "optimizer_cls_and_kwargs") if k in options}
    trainer = trainer(model=model, args=arguments(folder, **options), train_dataset=CLASSES, **ours)
    trainer.train()
    return trainer


BASES: list[Any] = [bert, answering_llama]
CONFIGS = [PolarConfig, PolarVbllConfig]
