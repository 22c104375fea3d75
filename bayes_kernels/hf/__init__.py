"""Bayesian adapters for stock transformers and PEFT.

Importing this module registers the PEFT type BAYES_LORA, which `PeftModel.from_pretrained` and
`AutoModel.from_pretrained` need to load a Bayesian adapter.
"""

from __future__ import annotations

from ._compat import check_versions

check_versions()

from .checkpoints import export_lora, import_lora  # noqa: E402
from .config import BayesLoraConfig, BlobConfig  # noqa: E402
from .model import BayesLoraModel  # noqa: E402
from .posterior import checkpoint_noise, kl_divergence, posterior, refresh_noise  # noqa: E402
from .predict import Prediction, fold_samples, predict, predict_dataset  # noqa: E402
from .trainer import BayesTrainer, BayesTrainerMixin, decoupled_kl  # noqa: E402

__all__ = [
    "BayesLoraConfig",
    "BayesLoraModel",
    "BayesTrainer",
    "BayesTrainerMixin",
    "BlobConfig",
    "Prediction",
    "checkpoint_noise",
    "decoupled_kl",
    "export_lora",
    "fold_samples",
    "import_lora",
    "kl_divergence",
    "posterior",
    "predict",
    "predict_dataset",
    "refresh_noise",
]
