"""Configuration of Bayesian LoRA adapters: what all methods share.

A method's own configuration is a subclass in the method's file, which enters :data:`CONFIGS`.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import Field, dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar

from peft import LoraConfig, PeftConfig

from .._library import MAX_FUSED_RANK
from ..optim import KINDS
from ._compat import BAYES_LORA
from .lora_options import check_lora_options

if TYPE_CHECKING:
    from typing_extensions import Self

# LoRA options that change the forward formula or the kind of the adapted parameters.
_REJECTED = (
    "use_dora",
    "alora_invocation_tokens",
    "arrow_config",
    "monteclora_config",
    "kasa_config",
    "velora_config",
    "use_bdlora",
    "use_qalora",
    "lora_bias",
    "ensure_weight_tying",
    "megatron_config",
)

# The method of a configuration that names none.
DEFAULT_METHOD = "blob"

# By method; a class enters itself. `bayes_kernels.hf` imports the modules of all methods.
CONFIGS: dict[str, type[BayesLoraConfig]] = {}


def option(
    default: Any,
    help: str,
    *,
    choices: Sequence[Any] = (),
    above: float | None = None,
    least: float | None = None,
    needs: Mapping[str, Sequence[Any]] | None = None,
    set_by: str = "",
) -> Any:
    """A field of a configuration, with what is checked and listed about it.

    Args:
        default: its value where none is given.
        help: one or two sentences; commands list it.
        choices: the values that it may have, where they are words.
        above: a number must be larger.
        least: a number must not be smaller.
        needs: values of other options without which it does nothing, by their names.
        set_by: the function that sets it, for fields that are not for users to choose.
    """
    known = {"help": help, "choices": tuple(choices), "above": above, "least": least}
    return field(default=default, metadata={**known, "needs": needs or {}, "set_by": set_by})


@dataclass
class BayesLoraConfig(LoraConfig):
    """LoRA with a posterior: over the factor A, or what the method makes random instead.

    `BayesLoraConfig(method="blob", ...)` makes a `BlobConfig(...)`, the class of the method, which has
    the method's options. The metadata of each field says what it means; `bayes-kernels methods blob`
    lists them.

    Options of `peft.LoraConfig` work as they do there, if they keep the adapter a product of two
    factors. The other fields are numbers, words and lists, so that the configuration is JSON.

    Loading such an adapter needs `import bayes_kernels.hf` first; without it PEFT raises
    `KeyError: 'BAYES_LORA'`, and the README.md in the folder says so. `export_lora` writes a folder
    that stock PEFT loads.

    A method is a dataclass `class XConfig(BayesLoraConfig, method="x")`, whose fields `option` makes.

    Args:
        method: name of the method: "blob", "scalabl", ...
        sample_at_inference: what a plain forward pass in eval mode does. False: the mean. True: one
            draw of the weights for the batch, a new one for each call; calls that continue a
            key-value cache keep the draw. `posterior` and `predict` decide for themselves.
        seed: seed of the noise in training loops without `BayesTrainer`, which takes its noise from
            `TrainingArguments.seed`. A model has one noise state, with the seed of its first adapter;
            seeds of later adapters are not used.
        activation_bits: 8 keeps the inputs of adapted layers in 8 bits from the forward to the backward
            pass: see `bayes_kernels.functional.quantize_activations`. The forward pass and the gradients
            of inputs and B are the same; those of A and its deviation have rounding noise with mean zero.
            An option of training: it is saved with the adapter, and evaluation does not know it.

    Raises:
        ValueError: an option is out of range or one of another method, or a LoRA option does not go
            with a posterior.
    """

    method: str = option("", "Bayesian method of the adapter.", set_by="the class")
    sample_at_inference: bool = option(
        False, "Whether a plain forward pass in eval mode draws weights; else it uses the mean."
    )
    seed: int = option(0, "Seed of the training noise.")
    activation_bits: int | None = option(
        None,
        "8: the backward pass has the inputs of adapted layers in 8 bits, rounded without bias: about "
        "half of their memory in bf16, a quarter in fp32. None: as they are.",
        choices=(8,),
    )

    _method: ClassVar[str] = ""
    # Whether the method's posterior can be one of factors that `target_parameters` makes.
    _takes_parameters: ClassVar[bool] = False

    def __init_subclass__(cls, method: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if method is not None:
            cls._method = method
            CONFIGS[method] = cls

    def __new__(cls, *args: Any, **options: Any) -> Self:
        """An instance of the method's class."""
        made: Any = cls
        if cls is BayesLoraConfig:
            method = options.get("method", DEFAULT_METHOD)
            if method not in tuple(CONFIGS):
                raise ValueError(
                    f"BayesLoraConfig: method must be one of {tuple(CONFIGS)}, got {method!r}; "
                    "choose one"
                )
            made = CONFIGS[method]
            _show_all_options()
        known = made.__dataclass_fields__
        for name in sorted(options.keys() - known):
            methods = [m for m, config in CONFIGS.items() if name in config.__dataclass_fields__]
            if methods:
                raise ValueError(
                    f"{made.__name__}: {name} must be left out, as it is an option of "
                    f"{', '.join(methods)}, got {options[name]!r}"
                )
        return super().__new__(made)

    def __post_init__(self) -> None:
        kind = type(self).__name__
        check_lora_options(kind, vars(self))
        if isinstance(self.modules_to_save, (tuple, set)):  # PEFT adds heads to it
            self.modules_to_save = sorted(self.modules_to_save)
        super().__post_init__()
        self.peft_type = BAYES_LORA
        self.method = self.method or self._method
        if self.method != self._method:
            raise ValueError(f"{kind}: method must be {self._method!r}, got {self.method!r}")
        for one in own_fields(type(self)):
            _check_option(kind, one, getattr(self, one.name))
        for name in _REJECTED:
            if getattr(self, name, None):
                raise ValueError(
                    f"{kind}: {name} cannot be combined with a posterior over A, got "
                    f"{getattr(self, name)!r}; leave it out, or use peft.LoraConfig"
                )
        if self.init_lora_weights == "mica":
            raise ValueError(
                f"{kind}: init_lora_weights='mica' freezes a factor; use True or 'gaussian'"
            )
        ranks = [self.r, *(self.rank_pattern or {}).values()]
        if self.activation_bits is not None and max(ranks) > MAX_FUSED_RANK:
            raise ValueError(
                f"{kind}: activation_bits needs ranks of at most {MAX_FUSED_RANK}, whose kernels keep 8 "
                f"bits, got {max(ranks)}; leave it out, or lower the rank"
            )
        if self.target_parameters:
            self._check_parameters(kind)

    def _check_parameters(self, kind: str) -> None:
        if not self._takes_parameters:
            able = sorted(c.__name__ for c in CONFIGS.values() if c._takes_parameters)
            raise ValueError(
                f"{kind}: target_parameters must be left out, as the method has no posterior over factors of "
                f"experts, got {sorted(self.target_parameters or ())}; {' and '.join(able)} have one"
            )
        if self.lora_dropout:
            raise ValueError(
                f"{kind}: lora_dropout must be 0 with target_parameters, as in PEFT, got "
                f"{self.lora_dropout}"
            )

    def rescaled(self, factor: float) -> None:
        """Take note that all deviations of the adapter were multiplied by a factor."""


@dataclass
class VariationalConfig(BayesLoraConfig):
    """Options of methods whose posterior is trained, with a decoupled step on its divergence."""

    init_rho: float = option(
        0.05, "The deviation's parameter starts in U(init_rho / sqrt 2, init_rho).", above=0
    )
    kl_schedule: str = option(
        "auto",
        "Step sizes of the decoupled KL step; bayes_kernels.optim.KLSchedule has the formulas.",
        choices=KINDS,
    )
    kl_lr: float = option(
        0.01,
        "Learning rate of the KL step for 'published' and 'constant'.",
        least=0,
        needs={"kl_schedule": ("published", "constant")},
    )
    kl_time: float | None = option(
        None,
        "For 'auto': how long the gradient flow of the divergence acts on each weight, as the sum of "
        "its step sizes over the run. None for the method's rule.",
        least=0,
        needs={"kl_schedule": ("auto",)},
    )
    kl_gamma: float = option(
        8.0,
        "gamma of the cycle length 100 N^(pi / gamma) / batch for 'published' and 'constant'.",
        above=0,
        needs={"kl_schedule": ("published", "constant")},
    )


def own_fields(config: type[PeftConfig]) -> list[Field[Any]]:
    """Fields of a configuration that `peft.LoraConfig` does not have."""
    return [one for one in fields(config) if one.name not in LoraConfig.__dataclass_fields__]


def _check_option(kind: str, one: Field[Any], value: Any) -> None:
    """Whether the value of a field is of its type and in its range."""
    words = str(one.type)
    if value is None and "None" in words:
        return
    what = one.metadata
    if what.get("choices"):
        if value not in what["choices"]:
            raise ValueError(
                f"{kind}: {one.name} must be one of {what['choices']}, got {value!r}; choose one"
            )
        return
    above, least = what.get("above"), what.get("least")
    expected = ""
    if words.startswith("bool"):
        expected = "" if isinstance(value, bool) else "true or false"
    elif words.startswith(("int", "float")):
        whole = words.startswith("int")
        fits = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
        fits = fits and math.isfinite(value)
        if (
            not fits
            or (above is not None and value <= above)
            or (least is not None and value < least)
        ):
            expected = "an integer" if whole else "a number"
            if above == 0:
                expected = f"a positive {expected.split()[-1]}"
            elif above is not None or least is not None:
                expected += f" > {above}" if above is not None else f" >= {least}"
    if expected:
        raise ValueError(f"{kind}: {one.name} must be {expected}, got {value!r}")


def _show_all_options() -> None:
    """Give `BayesLoraConfig` the options of all methods for a signature.

    PEFT reads it where a file has a name that no class knows, written by a newer version, and then
    drops what is not in the signature.
    """
    shown: dict[str, inspect.Parameter] = {}
    for config in CONFIGS.values():
        shown.update(inspect.signature(config.__init__).parameters)
    init: Any = BayesLoraConfig.__init__
    init.__signature__ = inspect.Signature(list(shown.values()))


__all__ = [
    "CONFIGS",
    "DEFAULT_METHOD",
    "BayesLoraConfig",
    "VariationalConfig",
    "option",
    "own_fields",
]
