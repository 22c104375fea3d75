"""The table of methods: predictors, options, conversions."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import pytest
import tiny_models
import torch
from peft import LoraConfig
from torch import nn

from bayes_kernels.hf import Ensemble, bayesianize, predict
from bayes_kernels.hf.method import METHODS, PLAIN, Conversion, Method, register
from bayes_kernels.hf.predict import predictor_of

BATCH = {"input_ids": tiny_models.IDS}


def model_of(method: Method) -> nn.Module:
    """A small classifier with an adapter of a method that does something."""
    options: dict[str, Any] = {"lora_dropout": 0.3} if method.name == "dropout" else {}
    config = LoraConfig if method.conversion else method.config
    model = tiny_models.fill(tiny_models.adapted(tiny_models.BASES["bert"](), config, **options))
    if method.conversion is not None:
        options = {"labels": "pseudo"} if "labels" in method.options else {"prior": "fixed"}
        bayesianize(model, method.name, [BATCH], progress=False, **options)
    if method.join is not None:
        model.add_adapter("other", model.peft_config["default"])
        return Ensemble([model], ["default", "other"])
    return model


@pytest.mark.parametrize("name", METHODS)
def test_the_predictor_of_each_method(name: str) -> None:
    method = METHODS[name]
    model = model_of(method).train()
    own, asked = method.predictor(model), predictor_of(model)
    assert own is not None and type(own) is type(asked)
    assert own.draws == asked.draws == method.bayesian
    if method.bayesian:
        drawn = predict(model, BATCH, n_samples=2, return_samples=True)
        assert drawn.n_samples == 2
        first, second = drawn.sample_log_probs
        assert (first - second).abs().max() > 1e-6
    else:
        with pytest.raises(
            ValueError, match="n_samples must be 0 for adapters without a posterior"
        ):
            predict(model, BATCH, n_samples=2)
    assert model.training
    for other in METHODS.values():  # an adapter of stock PEFT is not one of the library's type
        if other.plain and not method.plain:
            plain = other.predictor is METHODS[PLAIN].predictor
            assert plain or other.predictor(model) is None


@pytest.mark.parametrize("name", METHODS)
def test_the_predictor_does_not_depend_on_rows_that_come_later(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(METHODS[name])
    kind = type(predictor_of(model))
    for later in ("other", *METHODS):  # the last row has a predictor for Bayesian adapters
        row = dataclasses.replace(METHODS.get(later, Method("other", "Other")), name="later")
        with monkeypatch.context() as patch:
            patch.setitem(METHODS, "later", row)
            if row.predictor is not METHODS[PLAIN].predictor:
                assert type(predictor_of(model)) is kind, later


def test_an_ensemble_predicts_with_its_members_whatever_they_have() -> None:
    member = model_of(METHODS["laplace"])
    other = tiny_models.fill(tiny_models.adapted(tiny_models.BASES["bert"](), LoraConfig))
    ensemble = Ensemble([member, other], ["a", "b"])
    assert type(predictor_of(ensemble)) is type(METHODS["ensemble"].predictor(ensemble))
    assert predict(ensemble, BATCH).n_samples == 2


@pytest.mark.parametrize("kind", ["bert", "llama"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_plain_lora_predicts_by_one_pass(kind: str, dropout: float) -> None:
    base = tiny_models.BASES[kind]()
    model = tiny_models.fill(tiny_models.adapted(base, LoraConfig, lora_dropout=dropout)).train()
    choices = tiny_models.choices(kind)
    found = predict(model, BATCH, n_samples=0, **choices)
    logits = tiny_models.logits(model.eval())
    if choices:
        logits = logits[:, -1, choices["choices"]]
    wanted = logits.double().log_softmax(-1)
    torch.testing.assert_close(found.log_probs, wanted, rtol=0, atol=1e-5)
    assert torch.equal(found.entropy, found.expected_entropy) and found.n_samples == 0
    torch.testing.assert_close(
        found.entropy, torch.distributions.Categorical(found.probs).entropy()
    )


def test_a_model_of_no_method() -> None:
    with pytest.raises(
        ValueError, match="predict: the model must have a Bayesian adapter or plain"
    ):
        predict(tiny_models.bert(), BATCH)


@pytest.mark.parametrize("name", METHODS)
def test_options_are_those_of_the_class_or_of_the_function(name: str) -> None:
    method = METHODS[name]
    own = {one.name: one for one in dataclasses.fields(method.config)}
    assert method.conversion is not None or "seed" not in method.options  # it is the run's
    for option in method.options.values():
        assert option.type and option.help, option
        if option.name in (one.name for one in method.training_options) or option.name == "anchors":
            continue
        if method.conversion is None:
            assert option.name not in LoraConfig.__dataclass_fields__
            assert option.default == own[option.name].default
            assert not own[option.name].metadata["set_by"]
        else:
            parameters = inspect.signature(method.conversion.convert).parameters
            assert option.default == parameters[option.name].default
            assert option.name not in method.conversion.fixed


def half_(
    model: nn.Module, data: Any, *, share: float = 0.5, names: list[str] | None = None
) -> Any:
    """A conversion.

    Args:
        model: any.
        data: any.
        share, names: how much of it; None
            for all.

    Returns:
        Nothing.
    """


def test_options_of_a_conversion_are_described_by_its_docstring() -> None:
    nothing = lambda *_, **__: None  # noqa: E731
    conversion = Conversion(half_, nothing, nothing, "any examples", 7, {"names": None})
    found = Method("half", "Half", conversion=conversion).options
    assert {k: (o.type, o.default, o.help) for k, o in found.items()} == {
        "anchors": ("integer or null", 7, "number of examples; null for all"),
        "share": ("number", 0.5, "how much of it; None for all."),
    }


def test_a_name_is_given_once() -> None:
    with pytest.raises(ValueError, match="register: the method 'blob' must be new"):
        register(METHODS["blob"])


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("blob", {}, r"method must be one of \('tfb', 'laplace', 'laplace-last'\), got 'blob'"),
        ("tfb", {}, "data must be the anchor examples, got none"),
        ("laplace-last", {"data": [BATCH], "layers": "all"}, "layers must not be given for method"),
        (
            "tfb",
            {"data": [BATCH], "anchors": 16},
            "anchors must not be given for method 'tfb', where data has the anchor examples, got 16; give",
        ),
        (
            "laplace",
            {"data": [BATCH], "anchors": 16},
            "options of method 'laplace' must be some of",
        ),
        (
            "tfb",
            {"data": [BATCH], "tol": 1},
            "must be some of batch_size, .*, validation, got tol; ",
        ),
    ],
)
def test_errors_of_bayesianize(method: str, options: dict[str, Any], message: str) -> None:
    model = tiny_models.adapted(tiny_models.bert(), LoraConfig)
    with pytest.raises(ValueError, match=message):
        bayesianize(model, method, **options)


class Wrapped(nn.Module):
    """A model within another module, as data parallelism and compilation put it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.module = model

    def forward(self, **inputs: Any) -> Any:
        return self.module(**inputs)


def test_dropout_of_a_bayesian_adapter_belongs_to_training_also_where_the_model_is_wrapped() -> (
    None
):
    model = tiny_models.fill(tiny_models.adapted(tiny_models.bert(), lora_dropout=0.3))
    found, wrapped = (predict(m, BATCH, n_samples=4) for m in (model, Wrapped(model)))
    torch.testing.assert_close(found.probs, wrapped.probs, rtol=0, atol=1e-6)
