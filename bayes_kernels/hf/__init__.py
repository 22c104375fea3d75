"""Bayesian adapters for stock transformers and PEFT.

Importing this module registers the PEFT type BAYES_LORA, which `PeftModel.from_pretrained` and
`AutoModel.from_pretrained` need to load a Bayesian adapter.
"""

from __future__ import annotations

from ._compat import check_versions

check_versions()

from ..batches import fold_samples  # noqa: E402
from . import beside  # noqa: E402, F401
from .bayesianize import ConversionReport, bayesianize  # noqa: E402
from .checkpoints import export_draws, export_lora, import_lora  # noqa: E402
from .config import BayesLoraConfig  # noqa: E402
from .draws import Sampling  # noqa: E402
from .generate import generate, score_texts  # noqa: E402
from .kept_layers import KeptLayers  # noqa: E402
from .kl import (  # noqa: E402
    decoupled_kl,
    kl_divergence,
)
from .last_layer import class_features, class_logits, variational_loss  # noqa: E402
from .logits import LabelPrediction, NumberPrediction, Prediction  # noqa: E402
from .methods import table  # noqa: E402, F401
from .methods.blob import BlobConfig  # noqa: E402
from .methods.dropout import dropout_draws  # noqa: E402
from .methods.ensemble import Ensemble, join_adapters  # noqa: E402
from .methods.laplace import (  # noqa: E402
    LaplaceLoraReport,
    LaplacePosterior,
    drawn_weights,
    forget_laplace,
    laplace_posterior,
    load_laplace,
    save_laplace,
)
from .methods.polar import PolarConfig, parameter_groups, stiefel_error  # noqa: E402
from .methods.polar_vbll import (  # noqa: E402
    PolarVbllConfig,
    calibrate_head,
    discard_laplace,
    laplace_refine,
)
from .methods.scalabl import ScalablConfig  # noqa: E402
from .methods.tfb import TfbConfig  # noqa: E402
from .methods.tfb_report import TfbReport  # noqa: E402
from .model import BayesLoraModel  # noqa: E402
from .posterior import checkpoint_noise, posterior, refresh_noise  # noqa: E402
from .predict import (  # noqa: E402
    predict,
    predict_batches,
    predict_dataset,
    predict_several,
)
from .scale import DrawsReport, ScaleReport, compare_draws, fit_scale_, rescale_  # noqa: E402
from .sharding import save_sharded  # noqa: E402
from .tasks.answers import Answer, Answers  # noqa: E402
from .tasks.load import SavedAdapter, load  # noqa: E402
from .tasks.writer import SavedWriter, load_writer  # noqa: E402
from .texts import Generation, ScoredText, Token  # noqa: E402
from .tokens import TokenPrediction, predict_tokens, score_answers  # noqa: E402
from .trainer import BayesTrainer, BayesTrainerMixin  # noqa: E402
from .variants import VariationalLoss  # noqa: E402

__all__ = [
    "Answer",
    "Answers",
    "BayesLoraConfig",
    "BayesLoraModel",
    "BayesTrainer",
    "BayesTrainerMixin",
    "BlobConfig",
    "ConversionReport",
    "DrawsReport",
    "Ensemble",
    "Generation",
    "KeptLayers",
    "LabelPrediction",
    "LaplaceLoraReport",
    "LaplacePosterior",
    "NumberPrediction",
    "PolarConfig",
    "PolarVbllConfig",
    "Prediction",
    "Sampling",
    "SavedAdapter",
    "SavedWriter",
    "ScalablConfig",
    "ScaleReport",
    "ScoredText",
    "TfbConfig",
    "TfbReport",
    "Token",
    "TokenPrediction",
    "VariationalLoss",
    "bayesianize",
    "calibrate_head",
    "checkpoint_noise",
    "class_features",
    "class_logits",
    "compare_draws",
    "decoupled_kl",
    "discard_laplace",
    "drawn_weights",
    "dropout_draws",
    "export_draws",
    "export_lora",
    "fit_scale_",
    "fold_samples",
    "forget_laplace",
    "generate",
    "import_lora",
    "join_adapters",
    "kl_divergence",
    "laplace_posterior",
    "laplace_refine",
    "load",
    "load_laplace",
    "load_writer",
    "parameter_groups",
    "posterior",
    "predict",
    "predict_batches",
    "predict_dataset",
    "predict_several",
    "predict_tokens",
    "refresh_noise",
    "rescale_",
    "save_laplace",
    "save_sharded",
    "score_answers",
    "score_texts",
    "stiefel_error",
    "variational_loss",
]
