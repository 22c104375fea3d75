"""What a method is to commands and checks, and the table of all methods."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from peft import LoraConfig, PeftModel
from torch import nn

from .config import own_fields
from .draws import Predictor, noise_predictor
from .noise import DRAW_SCOPES, KINDS
from .variants import VARIANTS

# The method that trains stock LoRA, which the others are compared with and which conversions start from.
PLAIN = "mle"

# What the papers on these methods share, as fields of a recipe: 20,000 examples, four at a time. Source:
# scripts of BLoB (arXiv 2406.11675), whose setting TFB, ScalaBL and PoLAR-VBLL took over. A method's own file
# has the rest.
PAPERS: Mapping[str, Any] = {
    "rank": 8,
    "alpha": 16.0,
    "target_modules": ("q_proj", "v_proj", "lm_head"),
    "lr": 1e-4,
    "steps": 5000,
    "batch_size": 4,
    "warmup": 0.06,
    "adam_epsilon": 1e-6,
    "max_length": 300,
    "scale": "keep",
}


@dataclass(frozen=True)
class Option:
    """One option of a method, as `bayes-kernels methods` lists it and `--set NAME=VALUE` sets it.

    Attributes:
        name: its name.
        type: its type, in words.
        default: what it is where nothing is set.
        help: what it does.
        needs: values of other options without which it does nothing, by their names.
    """

    name: str
    type: str
    default: Any
    help: str
    needs: Mapping[str, Sequence[Any]] = field(default_factory=dict)


class ConversionReport(Protocol):
    """What a conversion found; its `str` is one line."""

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, words, lists and dictionaries; without times, which differ by run."""

    def table(self) -> tuple[str, tuple[str, ...], list[tuple[str, ...]]]:
        """Title, headings and rows, for people."""


@dataclass(frozen=True)
class Conversion:
    """Makes a trained adapter Bayesian, without training it.

    Attributes:
        convert: (model, data, **options) -> report. Its keyword-only arguments are the options; its
            docstring describes them under `Args`. Commands always give `n_samples`, `seed` and
            `progress`; `draws`, `scope` and validation examples where it has arguments for them.
        check: (**options): raises ValueError where an option is out of range.
        check_model: (model, **options): raises ValueError where a model, trained or not, cannot be
            converted with these options.
        data: what the examples are called in messages.
        examples: training examples that commands give it; None for all.
        fixed: options that the method's name decides.
        needs: by option the values of others without which it does nothing, as in `Option`.
        chooses: (options that were given) -> whether it chooses the width of the posterior on validation
            examples, where there are some.
    """

    convert: Callable[..., ConversionReport]
    check: Callable[..., None]
    check_model: Callable[..., None]
    data: str
    examples: int | None = None
    fixed: Mapping[str, Any] = field(default_factory=dict)
    needs: Mapping[str, Mapping[str, Sequence[Any]]] = field(default_factory=dict)
    chooses: Callable[[Mapping[str, Any]], bool] = lambda options: False

    def takes(self, name: str) -> bool:
        """Whether `convert` has an option of this name that is not fixed."""
        return name in default_options(self.convert) and name not in self.fixed


def _nothing(*_: Any, **__: Any) -> None:
    """A hook that does nothing."""


@dataclass(frozen=True)
class Method:
    """One way to fine-tune: a row of the table that every command and check reads.

    Attributes:
        name: word for it in configurations and on the command line.
        title: name in tables of results.
        config: class of the PEFT configuration of the adapter that is trained or loaded.
        bayesian: whether it has a posterior to draw from.
        n_samples: default number of posterior draws of a prediction; of an ensemble, its members.
        text_samples: most draws that a text has by default, where those of predictions cost less.
        lr: default peak learning rate.
        weight_decay: default weight decay of AdamW.
        dropout: default dropout before the adapter.
        predictor: (model) -> how the model predicts; None where its adapter is not of this method.
        conversion: makes a trained plain adapter Bayesian; None for methods that train their own.
        join: (models, folders) -> one model of several trained plain adapters, each on its base model.
        prior: (fields of the stored configuration) -> the prior in words, for the model card.
        before_training: (model, batch), before the first step, with some training examples on the
            model's device.
        after_training: (model, batches, **options), after the last step, with all training examples.
        training_options: options of `after_training`.
        files: names of the files that it adds to PEFT's folder.
        save: (model, folder): writes these files.
        load: (model, folder): reads them.
        stored: (folder) -> whether the folder holds the files of this method.
        published: fields of a recipe as in the paper or its code, for causal language models.
    """

    name: str
    title: str
    config: type[LoraConfig] = LoraConfig
    bayesian: bool = True
    n_samples: int = 10
    text_samples: int | None = None
    lr: float = 1e-3
    weight_decay: float = 0.0
    dropout: float = 0.0
    predictor: Callable[[nn.Module], Predictor | None] = noise_predictor
    conversion: Conversion | None = None
    join: Callable[[Sequence[PeftModel], Sequence[str | Path]], nn.Module] | None = None
    prior: Callable[[Mapping[str, Any]], str] = lambda config: ""
    before_training: Callable[[nn.Module, Mapping[str, Any]], None] | None = None
    after_training: Callable[..., None] = _nothing
    training_options: tuple[Option, ...] = ()
    files: tuple[str, ...] = ()
    save: Callable[[nn.Module, Path], object] = _nothing
    load: Callable[[nn.Module, Path], object] = _nothing
    stored: Callable[[Path], bool] = lambda folder: False
    published: Mapping[str, Any] = field(default_factory=lambda: PAPERS)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Pickle finds no lambdas; the table of the other process has the row by its name.
        if METHODS.get(self.name) is self:
            return _row, (self.name,)
        return super().__reduce_ex__(protocol)

    @property
    def made(self) -> Literal["train", "convert", "join"]:
        """How its adapter is made.

        "train": trained as an adapter of its type; "convert": plain LoRA is trained, then converted;
        "join": several plain adapters that predict together.
        """
        if self.conversion is not None:
            return "convert"
        return "train" if self.join is None else "join"

    @property
    def plain(self) -> bool:
        """Whether the adapter is one of stock PEFT."""
        return self.config is LoraConfig

    @property
    def draw_scopes(self) -> tuple[str, ...]:
        """Scopes that `posterior` has for its draws of weights; none where it has no such draws."""
        variant = VARIANTS.get(self.name)
        return variant.draw_scopes if variant is not None and variant.samples else ()

    def check_draws(self, draws: str, scope: str) -> None:
        """Whether its predictions have such draws: `draws` and `scope` of `bayes_kernels.hf.predict`.

        Raises:
            ValueError: they have not, and their own rule would be followed in silence.
        """
        if draws != KINDS[0] and not self.draw_scopes:
            raise ValueError(
                f"draws: expected a method with draws of weights, which can be {draws}, got {self.name}; "
                "leave it out"
            )
        if scope != DRAW_SCOPES[0] and scope not in self.draw_scopes:
            raise ValueError(
                f"draw-scope: expected a method whose draws can have the scope {scope!r}, got "
                f"{self.name}; leave it out"
            )

    @property
    def options(self) -> dict[str, Option]:
        """Its options by name, in the order of listing."""
        own = _config_options(self.config)
        if self.conversion is not None:
            own = _conversion_options(self.conversion)
        return {option.name: option for option in (*own, *self.training_options)}


# By name, in the order of listing. `bayes_kernels.hf` fills it from `methods/table.py`.
METHODS: dict[str, Method] = {}


def _row(name: str) -> Method:
    """The method of a name."""
    return METHODS[name]


def register(method: Method) -> Method:
    """Enter a method into the table.

    Raises:
        ValueError: the name is taken.
    """
    if method.name in METHODS:
        raise ValueError(f"register: the method {method.name!r} must be new, got it twice")
    METHODS[method.name] = method
    return method


# --- Options -------------------------------------------------------------------------------------

# Arguments of conversions that commands fill in: how to go through the data, and what a run decides.
_OF_THE_RUN = ("choices", "collate_fn", "progress", "validation")


def default_options(function: Callable[..., Any]) -> dict[str, Any]:
    """Keyword-only arguments of a function with their defaults."""
    found = inspect.signature(function).parameters.values()
    return {option.name: option.default for option in found if option.kind is option.KEYWORD_ONLY}


def _config_options(config: type[LoraConfig]) -> Iterator[Option]:
    """Fields that LoraConfig does not have, unless the library sets them itself."""
    for item in own_fields(config):
        if item.name != "seed" and not item.metadata.get("set_by"):  # the seed is that of the run
            words = " or ".join(repr(word) for word in item.metadata.get("choices", ()))
            text, needs = item.metadata.get("help", ""), item.metadata.get("needs", {})
            yield Option(item.name, words or _words(item.type), item.default, text, needs)


def _conversion_options(conversion: Conversion) -> Iterator[Option]:
    """Keyword-only arguments of a conversion, and how many examples it looks at."""
    yield Option(
        "anchors", "integer or null", conversion.examples, "number of examples; null for all"
    )
    parameters = inspect.signature(conversion.convert).parameters
    described = _described_arguments(conversion.convert)
    for name, default in default_options(conversion.convert).items():
        if name not in _OF_THE_RUN and conversion.takes(name):
            words, needs = _words(parameters[name].annotation), conversion.needs.get(name, {})
            yield Option(name, words, default, described[name], needs)


_WORDS = {
    "bool": "true or false",
    "float": "number",
    "int": "integer",
    "str": "text",
    "list[str]": "list of names",
    "Sequence[str]": "list of names",
    "None": "null",
}


def _words(annotation: Any) -> str:
    """A type in words, from its annotation."""
    name = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", "")
    return " or ".join(_WORDS.get(part, part) for part in name.split(" | "))


def _described_arguments(function: Callable[..., Any]) -> dict[str, str]:
    """What the section `Args` of a docstring says of each argument, on one line."""
    _, _, rest = (inspect.getdoc(function) or "").partition("\nArgs:\n")
    found: dict[str, str] = {}
    for entry in re.split(r"\n {4}(?=\w)", "\n" + rest.partition("\n\n")[0]):
        names, _, text = entry.partition(": ")
        found.update(dict.fromkeys(names.split(", "), " ".join(text.split())))
    return found
