"""What commands share that run one task many times (compare, sweep): options, source, experiments."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

from .options import (
    Alpha,
    Base,
    Compat,
    Data,
    Debug,
    Device,
    Draws,
    DrawScope,
    Dtype,
    Kind,
    LabelNames,
    MaxLength,
    Ood,
    OodSize,
    Overwrite,
    Preset,
    Quantization,
    Rank,
    ResumeRuns,
    Samples,
    Settings,
    Split,
    StepExamples,
    Steps,
    Style,
    TargetModules,
    Test,
    TestSize,
    TrainSize,
    number,
    source_options,
    words,
)

if TYPE_CHECKING:
    from ..experiment.recipe import Experiment, Recipe, Source


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """The options, with their defaults."""

    data: Data = "stdlib-docs"
    test: Test = None
    ood: Ood = None
    label_names: LabelNames = None
    train_size: TrainSize = None
    test_size: TestSize = None
    ood_size: OodSize = None
    split: Split = "test"
    model: Base = "minilm"
    kind: Kind = "auto"
    style: Style = "blob"
    compat: Compat = False
    dtype: Dtype = "float32"
    quantization: Quantization = None
    rank: Rank = None
    alpha: Alpha = None
    target_modules: TargetModules = None
    lr: Annotated[float | None, number("Peak learning rate of all methods.")] = None
    steps: Steps = None
    batch_size: StepExamples = None
    max_length: MaxLength = None
    n_samples: Samples = None
    preset: Preset = "default"
    draws: Draws = None
    draw_scope: DrawScope = None
    settings: Settings = None
    resume: ResumeRuns = False
    overwrite: Overwrite = False
    device: Device = "auto"
    debug: Debug = False

    def check(self) -> None:
        """Whether they go together.

        Raises:
            ValueError: They do not.
        """
        if self.resume and self.overwrite:
            raise ValueError("--resume and --overwrite exclude each other; give one")

    def source(self) -> Source:
        """Where the task comes from."""
        from ..experiment.recipe import Source

        chosen = (self.test, self.ood, self.label_names, self.test_size, self.ood_size)
        return Source(data=self.data or "", **source_options(*chosen, self.train_size, self.split))

    def fields(self) -> dict[str, Any]:
        """Fields of a recipe that have an option of their own."""
        names = ["rank", "alpha", "lr", "steps", "batch_size", "max_length"]
        names += ["n_samples", "draws", "draw_scope"]
        found = {name: getattr(self, name) for name in names}
        return {**found, "target_modules": words(self.target_modules)}

    def experiment(self, source: Source, method: str, recipe: Recipe, seed: int) -> Experiment:
        """One run."""
        from ..experiment.recipe import Experiment

        base = (self.model, self.kind, self.style, self.dtype, self.quantization)
        return Experiment(source, *base, method, recipe, seed, self.compat)


def with_run_options(command: Callable[..., None]) -> Callable[..., None]:
    """A command whose parameter `given`, a `RunOptions`, is all of its options on the command line."""
    hints = typing.get_type_hints(command, include_extras=True)
    shared = typing.get_type_hints(RunOptions, include_extras=True)
    own = inspect.signature(command).parameters.values()
    fields = dataclasses.fields(RunOptions)
    parameters = [
        *(one.replace(annotation=hints[one.name]) for one in own if one.name != "given"),
        *(
            inspect.Parameter(
                one.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=one.default,
                annotation=shared[one.name],
            )
            for one in fields
        ),
    ]

    @functools.wraps(command)
    def called(**options: Any) -> None:
        given = RunOptions(**{one.name: options.pop(one.name) for one in fields})
        command(given=given, **options)

    called.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in parameters]
    )
    called.__annotations__ = {one.name: one.annotation for one in parameters}
    return called
