"""Predictions from draws of the weights, each on its copy of the batch."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from ..batches import (
    batch_size,
    eval_mode,
    fold_samples,
    inputs_of,
    labels_of,
    select,
    split,
    to_device,
)
from ._compat import without_padding
from .folding import plan
from .layers import (
    active_layers,
    bayes_layers,
    bayes_variants,
    draws_weights,
    noise_state,
    warn_uncalled,
    without_effect,
)
from .logits import GATHERED, AnyPrediction, LogitRows, target_kind
from .lower_layers import Shared, find_lower_layers
from .posterior import posterior
from .prefixes import SharedPrefix, split_prefix
from .stopping import Settling


class Sampling(NamedTuple):
    """What a prediction averages over.

    Attributes:
        n_samples: number of draws; 0 for the posterior mean.
        draws, scope: as in `bayes_kernels.hf.predict`.
    """

    n_samples: int = 10
    draws: str = "antithetic"
    scope: str = "example"


class Step(NamedTuple):
    """A part of the work of several predictions of a batch.

    Attributes:
        number: place of the sampling whose prediction is ready; None for work that those after it share.
        prediction: its prediction.
        after: place of the sampling whose draws it goes on from; None where it begins with its own.
    """

    number: int | None
    prediction: AnyPrediction | None = None
    after: int | None = None


class Predictor(Protocol):
    """How a model predicts: what `bayes_kernels.hf.predict` asks the method of its adapter for."""

    @property
    def draws(self) -> bool:
        """Whether there are posterior draws: n_samples may be above 0."""

    @property
    def texts(self) -> WeightDraws | None:
        """How whole texts are drawn; None where draws are of class logits, not of weights."""

    def predict(
        self,
        batch: Mapping[str, Any],
        *,
        n_samples: int,
        seed: int,
        choices: Sequence[int] | None,
        samples_per_pass: int | None,
        memory_budget: int | None,
        return_samples: bool,
        draws: str,
        scope: str,
        share_layers: bool,
        stop: float | None = None,
        stop_rule: str = "normal",
        min_samples: int = 4,
        share_prefix: bool = False,
    ) -> AnyPrediction:
        """The prediction of a batch; arguments as in `bayes_kernels.hf.predict`."""

    def several(
        self,
        batch: Mapping[str, Any],
        samplings: Sequence[Sampling],
        *,
        seed: int,
        choices: Sequence[int] | None,
        samples_per_pass: int | None,
        memory_budget: int | None,
        return_samples: bool,
        share_layers: bool,
    ) -> Iterator[Step]:
        """The predictions of a batch by `samplings`, as they are ready, with what they share computed once.

        Arguments as in `bayes_kernels.hf.predict_several`.
        """


class WeightDraws:
    """Predicts with S draws of the weights, folded into the batch.

    This class has one set of weights, as plain LoRA has, and no draws; subclasses choose the weights of
    a pass.

    Args:
        model: the model.
    """

    draws = False
    # Whether a draw of an example is the same in any part of the batch.
    divisible = True

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @property
    def one_per_pass(self) -> bool:
        """Whether a pass has room for one draw only, whatever the memory."""
        return False

    def weights(
        self, draw: bool, *, n_samples: int, seed: int, first_sample: int, **law: str
    ) -> AbstractContextManager[Any]:
        """Inside, a pass uses these draws of the weights, or where `draw` is false their mean.

        Args:
            law: `kind` and `scope` of `posterior`, which draws of other kinds do not have.
        """
        return contextlib.nullcontext()

    def dependent(self, kind: str, scope: str) -> int:
        """Number of successive draws that depend on each other: 1, or 2 in antithetic pairs."""
        return 1

    def drawn_modules(self) -> Sequence[nn.Module]:
        """The modules in which draws differ; none where draws share no layers."""
        return ()

    def outputs(self, folded: dict[str, Any], first: int, count: int) -> Any:
        """Outputs of the model on `count` copies of the batch, for draws from number `first`."""
        return self.model(**folded)

    @property
    def texts(self) -> WeightDraws:
        """How whole texts are drawn."""
        return self

    @property
    def generator(self) -> Any:
        """The model whose `generate` writes texts."""
        return self.model

    def obstacle(self) -> str | None:
        """What keeps whole texts from having draws, for a message; None where nothing does."""
        return None

    def copies(self, n_samples: int) -> int:
        """Draws that a text of `n_samples` draws has; 0 for the mean."""
        return n_samples

    @contextlib.contextmanager
    def throughout(
        self, n_samples: int, seed: int, examples: int, draws: str
    ) -> Iterator[dict[str, Any]]:
        """Inside, draw s has its weights in all passes, on its part of the rows, whatever their number.

        Args:
            n_samples: draws in the batch, which lie one after the other; 0 for the mean.
            seed: seed of the draws.
            examples: rows of each draw at the beginning, before beams multiply them.
            draws: `kind` of `posterior`, which draws of other kinds do not have.

        Yields:
            Further arguments of `generate` and of the passes.
        """
        which: dict[str, Any] = {"n_samples": max(n_samples, 1), "seed": seed, "first_sample": 0}
        with self.weights(n_samples > 0, **which, kind=draws):
            yield {}

    def in_place(self, number: int, seed: int) -> AbstractContextManager[None] | None:
        """Inside, the model's plain adapter has the weights of a draw; None where that is no draw."""
        return None

    def predict(
        self,
        batch: Mapping[str, Any],
        *,
        n_samples: int,
        seed: int,
        choices: Sequence[int] | None,
        samples_per_pass: int | None,
        memory_budget: int | None,
        return_samples: bool,
        draws: str,
        scope: str,
        share_layers: bool,
        stop: float | None = None,
        stop_rule: str = "normal",
        min_samples: int = 4,
        share_prefix: bool = False,
    ) -> AnyPrediction:
        """As `Predictor.predict`.

        Raises:
            ValueError: as `bayes_kernels.hf.predict`.
        """
        self._check(n_samples)
        model = self.model
        labels, inputs, rows = self._prepared(batch, choices)
        size = batch_size(inputs)
        total = max(n_samples, 1)
        at_once, per_pass = plan(
            model,
            inputs,
            1 if self.one_per_pass else total,
            samples_per_pass=samples_per_pass,
            memory_budget=memory_budget,
        )
        # Noise for each token goes by its place in the batch.
        if at_once < size and self.divisible and scope == "example":
            parts = split(batch, -(-size // at_once))
            if len(parts) > 1:
                found = [
                    WeightDraws.predict(
                        self,
                        part,
                        n_samples=n_samples,
                        seed=seed,
                        choices=choices,
                        samples_per_pass=samples_per_pass,
                        memory_budget=memory_budget,
                        return_samples=return_samples,
                        draws=draws,
                        scope=scope,
                        share_layers=share_layers,
                        stop=stop,
                        stop_rule=stop_rule,
                        min_samples=min_samples,
                        share_prefix=share_prefix,
                    )
                    for part in parts
                ]
                return found[0].concatenate(found)  # type: ignore[arg-type]
        prefix = None
        if share_prefix:
            if not self.divisible or scope != "example" or self.generator is not model:
                raise ValueError(
                    "predict: share_prefix must be False where draws go by the place in the batch (MC "
                    "dropout, scope='token') or are members of an ensemble; leave it out"
                )
            prefix = split_prefix(model, self._on_device(batch))
        if prefix is not None:
            rows = LogitRows(model, prefix.rest, choices)
            inputs, share_layers = {**prefix.rest, **rows.options}, False
        dependent = self.dependent(draws, scope)
        gathered: Any = None
        settling: Settling | None = None
        if stop is not None and total > 1:
            settling = Settling(
                size,
                total,
                dependent=dependent,
                stop=stop,
                minimum=min(min_samples, total),
                rule=stop_rule,
            )
        law: dict[str, Any] = {"kind": draws, "scope": scope}
        with eval_mode(model), without_padding(model, inputs):
            shared = self._shared(inputs, choices) if share_layers and total > 1 else None
            below = 0 if shared is None else len(shared.found.names)
            first, kept = 0, torch.arange(size)
            while first < total and (settling is None or len(settling.open)):
                count = min(per_pass, total - first)
                if settling is not None:
                    count = settling.next_pass(per_pass)
                which: dict[str, Any] = {"n_samples": count, "seed": seed, "first_sample": first}
                weights = self.weights(n_samples > 0, **which, **law)
                logits = self._logits(
                    inputs, rows, weights, first, count, shared=shared, prefix=prefix
                )
                first += count
                kind = self._kind(logits, choices, labels)
                if settling is None:
                    gathered = gathered or GATHERED[kind](return_samples, dependent)
                    gathered.add(logits)
                    continue
                if kind != "classes":
                    raise ValueError(
                        f"predict: stop must be None for a model of {kind}, got {stop}; it is for the "
                        "most probable class"
                    )
                before = settling.open
                settling.add(logits[:, torch.isin(kept, before)])
                if not (self.divisible and scope == "example") or first >= total:
                    continue
                going = torch.isin(before, settling.open).nonzero()[:, 0]
                part = select(inputs, going) if 0 < len(going) < len(before) else None
                if part is not None:
                    shared = shared and shared.select(going, len(before))
                    rows, inputs, kept = rows.select(going), dict(part), settling.open
        result: AnyPrediction
        if settling is None:
            result = gathered.result(n_samples, labels)
        else:
            result = settling.result(labels)
        return dataclasses.replace(result, shared_layers=below)

    def several(
        self,
        batch: Mapping[str, Any],
        samplings: Sequence[Sampling],
        *,
        seed: int,
        choices: Sequence[int] | None,
        samples_per_pass: int | None,
        memory_budget: int | None,
        return_samples: bool,
        share_layers: bool,
    ) -> Iterator[Step]:
        """As `Predictor.several`: numbers of the same draws are prefixes of one run of them.

        Raises:
            ValueError: as `bayes_kernels.hf.predict`.
        """
        model, most = self.model, max(one.n_samples for one in samplings)
        self._check(most)
        labels, inputs, rows = self._prepared(batch, choices)
        at_once, per_pass = plan(
            model,
            inputs,
            1 if self.one_per_pass else max(most, 1),
            samples_per_pass=samples_per_pass,
            memory_budget=memory_budget,
        )
        if at_once < batch_size(inputs) and self.divisible:  # parts of it, each by itself
            for i, one in enumerate(samplings):
                found = self.predict(
                    batch,
                    n_samples=one.n_samples,
                    seed=seed,
                    choices=choices,
                    samples_per_pass=samples_per_pass,
                    memory_budget=memory_budget,
                    return_samples=return_samples,
                    draws=one.draws,
                    scope=one.scope,
                    share_layers=share_layers,
                )
                yield Step(i, found)
            return
        groups: dict[Any, list[int]] = {}
        for i, one in enumerate(samplings):
            groups.setdefault(one[1:] if one.n_samples else None, []).append(i)
        with eval_mode(model), without_padding(model, inputs):
            shared, below = None, 0
            if share_layers and (most > 1 or len(groups) > 1):
                shared = self._shared(inputs, choices)
                below = 0 if shared is None else len(shared.found.names)
                yield Step(None)
            for chosen, members in groups.items():
                kind, scope = chosen or Sampling()[1:]
                gathered: Any = None
                first, before = 0, None
                for i in sorted(members, key=lambda i: samplings[i].n_samples):
                    number = samplings[i].n_samples
                    while first < max(number, 1):
                        count = min(per_pass, max(number, 1) - first)
                        which: dict[str, Any] = {"n_samples": count, "seed": seed}
                        which.update(first_sample=first, kind=kind, scope=scope)
                        weights = self.weights(number > 0, **which)
                        logits = self._logits(inputs, rows, weights, first, count, shared=shared)
                        first += count
                        if gathered is None:
                            sums = GATHERED[self._kind(logits, choices, labels)]
                            gathered = sums(return_samples, self.dependent(kind, scope))
                        gathered.add(logits)
                    result = gathered.result(number, labels)
                    yield Step(i, dataclasses.replace(result, shared_layers=below), before)
                    before = i

    def _check(self, n_samples: int) -> None:
        """Whether there are so many draws.

        Raises:
            ValueError: there are none.
        """
        if n_samples and not self.draws:
            raise ValueError(
                "predict: n_samples must be 0 for adapters without a posterior, got "
                f"{n_samples}; pass n_samples=0, or make the adapter Bayesian with bayesianize"
            )
        if n_samples and (why := without_effect(self.model)) is not None:
            raise ValueError(
                f"predict: draws need adapters that take part in the pass, got adapters that are {why}, "
                "or pass n_samples=0"
            )

    def _on_device(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The inputs of a batch where the model is."""
        return to_device(inputs_of(batch), next(self.model.parameters()).device)

    def _prepared(
        self, batch: Mapping[str, Any], choices: Sequence[int] | None
    ) -> tuple[torch.Tensor | None, dict[str, Any], LogitRows]:
        """Labels of a batch, on the CPU; its inputs, on the model's device; what takes its logits."""
        labels, inputs = labels_of(batch), self._on_device(batch)
        # From the mask on the host: no wait for the GPU.
        rows = LogitRows(self.model, batch, choices)
        inputs.update(rows.options)
        return None if labels is None else labels.cpu(), inputs, rows

    def _logits(
        self,
        inputs: Mapping[str, Any],
        rows: LogitRows,
        weights: AbstractContextManager[Any],
        first: int,
        count: int,
        *,
        shared: Shared | None,
        prefix: SharedPrefix | None = None,
    ) -> torch.Tensor:
        """Logits (count, B, C) of a pass with these weights: those of draws from number `first`."""
        examples = batch_size(inputs)
        folded = fold_samples(inputs, count)
        again = contextlib.nullcontext() if shared is None else shared.replayed(count)
        with weights, again:
            if prefix is not None:
                run = functools.partial(self.outputs, first=first, count=count)
                folded.update(prefix.filled(run, count, examples))
            logits = rows.of(self.outputs(folded, first, count), count)
        accumulate = torch.float64 if logits.device.type != "mps" else torch.float32
        return logits.to(accumulate).unflatten(0, (count, -1))

    def _kind(
        self, logits: torch.Tensor, choices: Sequence[int] | None, labels: torch.Tensor | None
    ) -> str:
        """What the logits stand for, see `target_kind`."""
        if choices is not None:
            return "classes"
        return target_kind(self.model, logits.shape[-1], labels)

    def _shared(self, inputs: Mapping[str, Any], choices: Sequence[int] | None) -> Shared | None:
        """What the layers below the first drawn one give for a batch; None where there are none."""
        drawn = self.drawn_modules()
        if not drawn:
            return None

        def mean() -> AbstractContextManager[Any]:
            return self.weights(False, n_samples=1, seed=0, first_sample=0)

        def logits(batch: Mapping[str, Any]) -> torch.Tensor:
            rows = LogitRows(self.model, batch, choices)
            with mean():
                return rows.of(self.outputs({**batch, **rows.options}, 0, 1), 1)

        few = split(inputs, -(-batch_size(inputs) // 2))[0]
        found = find_lower_layers(self.model, drawn, inputs, few, logits)
        if not found.names:
            return None
        shared = Shared(self.model, found)
        with mean():
            shared.capture(lambda: self.outputs(dict(inputs), 0, 1))
        return shared


class NoiseDraws(WeightDraws):
    """Draws from the noise of Bayesian adapters, which `posterior` chooses."""

    @property
    def draws(self) -> bool:  # type: ignore[override]
        """Whether the weights of some adapter have draws."""
        return draws_weights(self.model)

    @property
    def one_per_pass(self) -> bool:
        """With routed experts, which lose track of the copies."""
        return any(variant.routed for variant in bayes_variants(self.model))

    def weights(self, draw: bool, **which: Any) -> AbstractContextManager[Any]:
        """Draws of `posterior`, or the posterior mean."""
        return posterior(self.model, "sample" if draw else "mean", **which)

    def dependent(self, kind: str, scope: str) -> int:
        """Antithetic pairs of weights; draws with noise for each token are independent."""
        return 2 if (kind, scope) == ("antithetic", "example") else 1

    def drawn_modules(self) -> Sequence[nn.Module]:
        """The layers of active adapters whose weights have draws."""
        return [item.layer for item in active_layers(self.model) if item.variant.samples]

    def predict(self, batch: Mapping[str, Any], **options: Any) -> AnyPrediction:
        """As `WeightDraws.predict`; the first time with a warning about layers that no pass calls."""
        with _unused_noticed(self.model):
            return super().predict(batch, **options)

    def several(
        self, batch: Mapping[str, Any], samplings: Sequence[Sampling], **options: Any
    ) -> Iterator[Step]:
        """As `WeightDraws.several`, with the same warning."""
        with _unused_noticed(self.model):
            yield from super().several(batch, samplings, **options)


def noise_predictor(model: nn.Module) -> NoiseDraws | None:
    """The predictor of a model with Bayesian adapters, active or not; None where it has none."""
    return None if next(bayes_variants(model), None) is None else NoiseDraws(model)


@contextlib.contextmanager
def _unused_noticed(model: nn.Module) -> Iterator[None]:
    """Around a model's first prediction: one warning about adapted layers that it does not call."""
    # Compiled code need not look at hooks.
    compiled = any(m._compiled_call_impl or "_orig_mod" in m._modules for m in model.modules())
    state = noise_state(model)
    if compiled or state.calls_checked or without_effect(model) is not None:
        yield
        return
    # Routers of experts leave layers out as the text has it.
    layers = {item.name: item.layer for item in bayes_layers(model) if not item.variant.routed}
    missing = dict.fromkeys(layers)
    with contextlib.ExitStack() as stack:
        for name, layer in layers.items():
            hook = layer.register_forward_pre_hook(lambda *_, name=name: missing.pop(name, None))
            stack.callback(hook.remove)
        yield
    state.calls_checked = True
    if missing:
        warn_uncalled("predict", list(missing), len(layers))
