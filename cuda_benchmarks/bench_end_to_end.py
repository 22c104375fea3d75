"""Whole training steps and predictions of methods, on models of random weights.

    python cuda_benchmarks end_to_end --device cpu [--quick] [--vs PROVIDERS] [--save]

Nothing is downloaded: a model is a configuration of transformers and random numbers, which cost what
trained weights cost. Adapters of rank 8 sit on the query and value projections. One training step is
forward, backward, optimiser (AdamW; for PoLAR its own) and the step on the divergence.

Providers of `training_step`
    peft_lora       plain LoRA by stock PEFT
    published_blob  BLoB with the formula of bayesian-peft in PEFT's layers (as in bench_adapter.py), and
                    its divergence in fp64 with a second optimiser
    blob, scalabl, polar_vbll  the methods of bayes_kernels.hf
of `samples`, a prediction with 10 posterior draws
    sequential      a pass of the model for each draw, our kernels
    published       the same with bayesian-peft's formula
    folded          bayes_kernels.hf.predict, draws folded into the batch;  tfb, scalabl: that method's
    mean            one pass with the posterior mean
of `last_layer`, a prediction of a classifier
    peft_lora       one pass of plain LoRA
    polar_vbll_0, polar_vbll_1000  PoLAR-VBLL with no and with 1,000 draws
of `laplace`, a linearised prediction of Laplace-LoRA with 1,000 draws of the logits, from a posterior over
the factors of all adapters or over the last layer
    laplace         bayes_kernels.hf.predict: J Sigma J' is added up layer by layer during the backward pass
    published       all adapters: as bayesian_lora computes it, the Jacobian (B, C, P) of the batch by jacrev,
                    then J Sigma J'; last layer: as laplace-torch does, the Jacobian (B, C, C D) of features;
                    both draw a (draws, B, C) tensor with a factor of the covariance for each draw
    mean            one pass with the posterior mean

All providers of a case share the tensors of one frozen base model.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib.util
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import bench_adapter
import bench_predict
import harness
import torch
from harness import (
    Agreement,
    Family,
    Options,
    Row,
    assert_agrees,
    count_launches,
    make_row,
    peak_bytes,
    saved_bytes,
    time_interleaved,
    tolerance,
)
from published_laplace import (
    exact_covariance,
    factors_of,
    published_jacobian,
    published_last_layer,
)
from torch import Tensor, nn

from bayes_kernels import memory
from bayes_kernels.memory import RANK, Shape

LR = 1e-4
N_TRAIN = 5000
CLASSES = 5
PRIOR_STD, KL_LR = 0.2, 0.01

_f32, _bf16 = torch.float32, torch.bfloat16
SHAPES = {
    shape.name: shape
    for shape in (
        Shape("tiny", "llama", 64, 2, 4, 4, 176, 1000, _f32),
        Shape("tiny BERT", "bert", 64, 2, 4, 4, 256, 1000, _f32),
        Shape("10M", "llama", 320, 6, 8, 8, 864, 8000, _f32),
        Shape("10M bf16", "llama", 320, 6, 8, 8, 864, 8000, _bf16),
        Shape("60M", "llama", 640, 10, 10, 5, 1728, 16000, _f32),
        Shape("22M BERT", "bert", 384, 6, 12, 12, 1536, 30522, _f32),  # all-MiniLM-L6
        Shape("1B", "llama", 2048, 16, 32, 8, 8192, 128256, _bf16),
        Shape("7B", "llama", 4096, 32, 32, 32, 11008, 32000, _bf16),
        Shape("335M BERT", "bert", 1024, 24, 16, 16, 4096, 30522, _bf16),
    )
}


@dataclass(frozen=True)
class Case:
    """A batch of one shape; `layers` in place of the shape's own, if not 0."""

    shape: str
    batch: int
    length: int
    layers: int = 0
    rank: int = RANK

    @property
    def name(self) -> str:
        name = f"{self.shape}, {self.batch} x {self.length} tokens"
        return f"{name}, {self.layers} layers, r {self.rank}" if self.layers else name

    @property
    def sizes(self) -> Shape:
        shape = SHAPES[self.shape]
        return dataclasses.replace(shape, layers=self.layers) if self.layers else shape

    @property
    def tokens(self) -> int:
        return self.batch * self.length


def training_cases(device: str, quick: bool) -> list[Case]:
    if device == "cuda":
        return [Case("1B", 4, 300)] if quick else [Case("1B", 4, 300), Case("7B", 4, 300)]
    if quick:
        return [Case("10M", 8, 64)]
    return [Case("10M", 8, 64), Case("10M bf16", 8, 64), Case("60M", 4, 128)]


def sample_cases(device: str, quick: bool) -> list[Case]:
    if device == "cuda":
        return [Case("1B", 1, 300)] if quick else [Case("1B", 1, 300), Case("7B", 4, 300)]
    return [Case("10M", 1, 32)] if quick else [Case("10M", 1, 32), Case("10M", 8, 64)]


def last_layer_cases(device: str, quick: bool) -> list[Case]:
    shape = "335M BERT" if device == "cuda" else "22M BERT"
    cases = [Case(shape, 16, 32), Case(shape, 64, 32)]
    return cases[:1] if quick else cases


def scaling_cases(device: str, quick: bool) -> list[Case]:
    """One size at a time changes: tokens, rank, layers."""
    if quick:
        return []
    shape = "1B" if device == "cuda" else "10M"
    sizes = [(1, 16, 2, 8), (4, 32, 2, 8), (4, 128, 2, 8), (16, 128, 2, 8)]
    sizes += [(4, 32, 2, 2), (4, 32, 2, 32), (4, 32, 1, 8), (4, 32, 6, 8)]
    return [Case(shape, *size) for size in sizes]


def laplace_cases(device: str, quick: bool) -> list[Case]:
    if device == "cuda":
        return [Case("335M BERT", 4, 32)]
    if quick:
        return [Case("tiny", 8, 32), Case("tiny BERT", 8, 32)]
    return [*laplace_cases(device, True), Case("10M", 4, 32)]


# --- models --------------------------------------------------------------------------------------


def build_base(shape: Shape, device: str) -> nn.Module:
    """A frozen classifier of random weights."""
    import transformers

    common: dict[str, Any] = {
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "intermediate_size": shape.intermediate,
        "vocab_size": shape.vocab,
        "num_labels": CLASSES,
        "pad_token_id": 0,
    }
    before = torch.get_default_dtype()
    torch.set_default_dtype(shape.dtype)
    try:
        with torch.device(device), seeded():
            if shape.kind == "bert":
                config = transformers.BertConfig(
                    **common, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
                )
                model = transformers.BertForSequenceClassification(config)
            else:
                config = transformers.LlamaConfig(**common, num_key_value_heads=shape.kv_heads)
                model = transformers.LlamaForSequenceClassification(config)
    finally:
        torch.set_default_dtype(before)
    model.config.use_cache = False
    return model.requires_grad_(False)


@contextlib.contextmanager
def seeded() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def _sharing(base: nn.Module) -> nn.Module:
    """A copy of a model with the same tensors."""
    tensors = [*base.parameters(), *base.buffers()]
    return copy.deepcopy(base, {id(t): t for t in tensors})


def make_batch(case: Case, device: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    vocab = SHAPES[case.shape].vocab
    ids = torch.randint(1, vocab, (case.batch, case.length), generator=generator)
    labels = torch.randint(0, CLASSES, (case.batch,), generator=generator)
    mask = torch.ones_like(ids)
    return {
        "input_ids": ids.to(device),
        "attention_mask": mask.to(device),
        "labels": labels.to(device),
    }


def _targets(shape: Shape) -> list[str]:
    return ["query", "value"] if shape.kind == "bert" else ["q_proj", "v_proj"]


@dataclass
class Run:
    """A model with an adapter, and what a training step of it does."""

    model: Any
    optimizer: torch.optim.Optimizer
    loss: Callable[[], Tensor]
    after: Callable[[], object]

    def step(self) -> None:
        """Forward, backward, optimiser, divergence."""
        self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.after()

    @property
    def trained(self) -> list[nn.Parameter]:
        """Parameters with gradients."""
        return [p for p in self.model.parameters() if p.requires_grad]


def attach(base: nn.Module, shape: Shape, method: str, rank: int = RANK) -> Any:
    """A model with adapters of a method; `published_blob` is plain LoRA with other layers."""
    from peft import LoraConfig, TaskType, get_peft_model

    import bayes_kernels.hf as hf

    common: dict[str, Any] = {
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": _targets(shape),
        "task_type": TaskType.SEQ_CLS,
    }
    configs = {
        "peft_lora": lambda: LoraConfig(**common),
        "published_blob": lambda: LoraConfig(**common),
        "blob": lambda: hf.BlobConfig(**common, kl_schedule="published"),
        "scalabl": lambda: hf.ScalablConfig(**common, kl_schedule="published"),
        "tfb": lambda: hf.TfbConfig(**common),
        "polar_vbll": lambda: hf.PolarVbllConfig(**common, head_prior_scale=1.0),
    }
    with seeded():
        model: Any = get_peft_model(_sharing(base), configs[method]())
    if method == "published_blob":
        _publish(model)
    return model


def _publish(model: Any) -> None:
    """Put bayesian-peft's forward pass into PEFT's layers."""
    for layer in _lora_layers(model):
        mean = layer.lora_A["default"].weight
        rho = torch.empty_like(mean).uniform_(0.05 / math.sqrt(2), 0.05)
        layer.register_parameter("bayes_rho", nn.Parameter(rho))
        layer.forward = _published_forward(layer)


def _lora_layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "lora_A")]


def _published_forward(layer: Any) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        base = layer.base_layer(x)
        mean, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        inputs = bench_adapter.Inputs(x, mean, layer.bayes_rho, b, base, base)
        # The formula adds to the output of the base layer in place.
        return bench_adapter.published(inputs, None)

    return forward


def _published_divergence(model: Any) -> Tensor:
    """KL from N(0, prior^2) of all layers, in fp64 as published, with its 1e-6 in both logarithms."""
    total: Any = 0.0
    for layer in _lora_layers(model):
        mean, std = layer.lora_A["default"].weight, layer.bayes_rho**2
        kl = (
            math.log(PRIOR_STD + 1e-6)
            - torch.log(std.double() + 1e-6)
            + (std.double() ** 2 + mean.double() ** 2) / (2 * PRIOR_STD**2 + 1e-6)
            - 0.5
        )
        total = total + kl.sum()
    return total


def prepare(
    base: nn.Module, shape: Shape, method: str, batch: dict[str, Tensor], rank: int = RANK
) -> Run:
    """A model in training mode with its optimiser."""
    import bayes_kernels.hf as hf
    from bayes_kernels.stiefel import StiefelAdamW

    model = attach(base, shape, method, rank).train()
    after: Callable[[], object] = lambda: None  # noqa: E731
    if method == "polar_vbll":
        optimizer: torch.optim.Optimizer = StiefelAdamW(hf.parameter_groups(model), lr=LR)
        return Run(
            model,
            optimizer,
            lambda: hf.variational_loss(model, batch, n_train=N_TRAIN).loss,
            after,
        )
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LR)
    if method == "published_blob":
        # Every parameter of the model, frozen ones too, and a schedule, as there.
        second = torch.optim.SGD(model.parameters(), lr=KL_LR)
        schedule = torch.optim.lr_scheduler.LambdaLR(second, lambda step: 1 - 1e-6 * step)

        def after() -> None:
            (0.5 * _published_divergence(model)).backward()
            second.step()
            second.zero_grad(set_to_none=True)
            schedule.step()

    elif method in ("blob", "scalabl"):
        step = hf.decoupled_kl(
            model,
            n_train=N_TRAIN,
            batch_size=len(batch["labels"]),
            learning_rate=LR,
            factor_sum=1000.0,
        )
        assert step is not None
        # The schedule leaves steps out whose weight cannot be represented; this one always counts.
        counted = step.schedule.cycle - 1
        after = lambda: step.step(1.0, step=counted)  # noqa: E731
    return Run(model, optimizer, lambda: model(**batch).loss, after)


# --- checks --------------------------------------------------------------------------------------


def model_tolerance(shape: Shape) -> float:
    """Of the results of a whole model, whose layers' roundings are as good as independent."""
    return 2 * math.sqrt(shape.layers) * tolerance(shape.dtype, shape.intermediate)


def check(device: str) -> Agreement:
    """On a tiny model: class logits at the posterior mean are those of plain LoRA in fp64 with the same
    factors, and the published layers without noise give plain LoRA's."""
    import bayes_kernels.hf as hf
    from bayes_kernels.hf.layers import bayes_layers

    case = Case("tiny", 2, 12)
    shape = SHAPES["tiny"]
    base = build_base(shape, device)
    batch = make_batch(case, device)
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    agreement = Agreement(case.shape, ("blob", "scalabl", "tfb", "polar_vbll"))
    for method in ("peft_lora", "published_blob", "blob", "scalabl", "tfb", "polar_vbll"):
        model = attach(base, shape, method).eval()
        with torch.no_grad(), seeded():
            for name, p in model.named_parameters():
                if ".lora_B" in name or ".lora_core" in name:
                    p.add_(torch.randn_like(p) * 0.02)
                if "bayes_rho" in name:
                    p.zero_()
        exact = attach(copy.deepcopy(base).double(), shape, "peft_lora").eval()
        exact.double()
        if method in ("peft_lora", "published_blob"):
            factors = [
                (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
                for layer in _lora_layers(model)
            ]
        else:
            factors = [
                item.variant.mean_factors(item.layer, item.adapter)
                for item in sorted(bayes_layers(model), key=lambda item: _order(model, item.layer))
            ]
        with torch.no_grad():
            for layer, (a, b) in zip(_lora_layers(exact), factors, strict=True):
                layer.lora_A["default"].weight.copy_(a)
                layer.lora_B["default"].weight.copy_(b)
            truth = exact(**inputs).logits.log_softmax(-1)
            if method in ("peft_lora", "published_blob"):
                got = model(**inputs).logits.log_softmax(-1)
            else:
                got = hf.predict(model, inputs, n_samples=0).log_probs.to(device)
        agreement.check(method, [got], [truth], model_tolerance(shape))
    return agreement


def _order(model: nn.Module, layer: Any) -> int:
    return next(i for i, found in enumerate(_lora_layers(model)) if found is layer)


# --- runs ----------------------------------------------------------------------------------------

OURS = (
    "blob",
    "folded",
    "polar_vbll_1000",
    "laplace",
    "scalabl",
    "polar_vbll",
    "tfb",
    "polar_vbll_0",
    "mean",
)
PEERS = ("peft_lora", "published_blob", "sequential", "published")


def _storages(tensors: Any) -> int:
    """Bytes of unique storages."""
    found = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(found.values())


def memory_figures(run: Run) -> dict[str, float]:
    """Bytes of parameters, gradients and the optimiser's state, which is there after one step."""
    state = [
        t
        for values in run.optimizer.state.values()
        for t in values.values()
        if isinstance(t, Tensor)
    ]
    return {
        "parameter_bytes": _storages(run.model.parameters()),
        "gradient_bytes": sum(p.numel() * p.element_size() for p in run.trained),
        "optimizer_bytes": _storages(state),
    }


def run_training(case: Case, options: Options, agreement: Agreement) -> list[Row]:
    """A whole step of every method."""
    device, shape = options.device, SHAPES[case.shape]
    base = build_base(shape, device)
    batch = make_batch(case, device)
    methods = ("peft_lora", "published_blob", "blob", "scalabl", "polar_vbll")
    runs = {
        method: prepare(base, shape, method, batch)
        for method in options.pick({m: m for m in methods}, OURS)
    }
    steps: dict[str, Callable[[], object]] = {name: run.step for name, run in runs.items()}
    times = time_interleaved(steps, device, seconds=options.time_for(20.0, 8.0), max_repeats=40)
    rows = []
    for name, run in runs.items():
        row = make_row("training_step", case.name, name, "step", times, device, agreement)
        parameters = [*run.model.parameters(), *run.model.buffers()]
        row.saved_bytes = saved_bytes(run.loss, parameters)
        row.peak_bytes = peak_bytes(run.step, device)
        row.launches = count_launches(run.step, device)
        row.figures = {
            "tokens_per_second": round(case.tokens / (row.p50_us * 1e-6), 1),
            **memory_figures(run),
        }
        if row.peak_bytes is not None:
            fixed = row.figures["parameter_bytes"] + row.figures["optimizer_bytes"]
            row.figures["total_bytes"] = fixed + row.peak_bytes
        if name in memory.METHODS and shape.kind == "llama":
            predicted = memory.predict(shape, case.batch, case.length, name, CLASSES)
            row.figures["predicted_bytes"] = predicted.total
        rows.append(row)
    return rows


def run_scaling(case: Case, options: Options, agreement: Agreement) -> list[Row]:
    """A whole step, and numbers of draws of a prediction, at one of the sizes."""
    import bayes_kernels.hf as hf

    device = options.device
    base = build_base(case.sizes, device)
    batch = make_batch(case, device)
    runs = {
        method: prepare(base, case.sizes, method, batch, case.rank)
        for method in options.pick({m: m for m in ("peft_lora", "published_blob", "blob")}, OURS)
    }
    steps: dict[str, Callable[[], object]] = {name: run.step for name, run in runs.items()}
    times = time_interleaved(steps, device, seconds=options.time_for(3.0, 1.0), max_repeats=40)
    rows = [
        make_row("scaling", case.name, name, "step", times, device, agreement) for name in steps
    ]
    if case != scaling_cases(device, False)[1]:
        return rows
    model = attach(base, case.sizes, "blob", case.rank).eval()
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    for draws in (2, 5, 10, 20, 50):
        predictions: dict[str, Callable[[], object]] = {
            "sequential": lambda n=draws: hf.predict(
                model, inputs, n_samples=n, samples_per_pass=1
            ),
            "folded": lambda n=draws: hf.predict(model, inputs, n_samples=n),
        }
        predictions = options.pick(predictions, OURS)
        times = time_interleaved(
            predictions, device, seconds=options.time_for(3.0, 1.0), max_repeats=40
        )
        mode = f"{draws} draws"
        rows += [
            make_row("scaling", case.name, name, mode, times, device, agreement)
            for name in predictions
        ]
    return rows


def run_samples(case: Case, options: Options, agreement: Agreement) -> list[Row]:
    """Ten posterior draws of a prediction."""
    import bayes_kernels.hf as hf

    device, shape, draws = options.device, SHAPES[case.shape], 10
    base = build_base(shape, device)
    batch = make_batch(case, device)
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    models = {
        name: attach(base, shape, name).eval()
        for name in ("blob", "scalabl", "published_blob", "tfb")
    }
    with torch.no_grad():
        for name, parameter in models["tfb"].named_parameters():
            if "sigma" in name:
                parameter.fill_(0.01)

    def published() -> Tensor:
        model = models["published_blob"]
        with torch.no_grad():
            passes = [model(**inputs).logits.double().softmax(-1) for _ in range(draws)]
        return torch.stack(passes).mean(0)

    def folded(method: str, **arguments: Any) -> Callable[[], object]:
        return lambda: hf.predict(models[method], inputs, **{"n_samples": draws, **arguments})

    # What draws give does not depend on how they are folded.
    apart = hf.predict(models["blob"], inputs, n_samples=draws, samples_per_pass=1).log_probs
    together = hf.predict(models["blob"], inputs, n_samples=draws).log_probs
    # Another batch size means other kernels, and other roundings in every layer.
    assert_agrees("folded draws", [together], [apart.double()], model_tolerance(shape))
    steps: dict[str, Callable[[], object]] = {
        "sequential": folded("blob", samples_per_pass=1),
        "published": published,
        "folded": folded("blob"),
        "tfb": folded("tfb"),
        "scalabl": folded("scalabl"),
        "mean": folded("blob", n_samples=0),
    }
    steps = options.pick(steps, OURS)
    times = time_interleaved(steps, device, seconds=options.time_for(10.0, 5.0), max_repeats=40)
    named = {"published": agreement["published_blob"]} if "published_blob" in agreement else {}
    return _prediction_rows("samples", case, f"{draws} draws", steps, times, options, named)


def run_last_layer(case: Case, options: Options, agreement: Agreement) -> list[Row]:
    """PoLAR-VBLL: draws of the logits after one pass of the model."""
    import bayes_kernels.hf as hf

    device, shape = options.device, SHAPES[case.shape]
    base = build_base(shape, device)
    batch = make_batch(case, device)
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    plain, bayes = (attach(base, shape, name).eval() for name in ("peft_lora", "polar_vbll"))

    @torch.no_grad()
    def peft_lora() -> Tensor:
        return plain(**inputs).logits.double().log_softmax(-1)

    steps: dict[str, Callable[[], object]] = {
        "peft_lora": peft_lora,
        "polar_vbll_0": lambda: hf.predict(bayes, inputs, n_samples=0),
        "polar_vbll_1000": lambda: hf.predict(bayes, inputs, n_samples=1000),
    }
    steps = options.pick(steps, OURS)
    times = time_interleaved(steps, device, seconds=options.time_for(10.0, 5.0), max_repeats=60)
    return _prediction_rows("last_layer", case, "predict", steps, times, options, agreement)


def fit_laplace(case: Case, base: nn.Module, device: str, layers: str) -> Any:
    """A model with trained-looking adapters and a Laplace posterior of them."""
    import bayes_kernels.hf as hf

    model = attach(base, SHAPES[case.shape], "peft_lora").eval()
    with torch.no_grad(), seeded():
        for layer in _lora_layers(model):
            layer.lora_B["default"].weight.normal_(std=0.02)
    options = {"layers": layers, "prior": "fixed", "prior_precision": 10.0, "dense_below": 32}
    hf.bayesianize(model, "laplace", data=[make_batch(case, device)], progress=False, **options)
    return model


def run_laplace(case: Case, options: Options, _: Agreement) -> list[Row]:
    """Laplace-LoRA: the Gaussian of the logits, and the mean of softmax over 1,000 draws of it."""
    import bayes_kernels.hf as hf
    from bayes_kernels.hf.methods.laplace import laplace_posterior

    device, draws = options.device, 1000
    base = build_base(SHAPES[case.shape], device)
    inputs = {k: v for k, v in make_batch(case, device).items() if k != "labels"}
    rows = []
    for layers, mode, formula in (
        ("adapters", "all adapters", published_jacobian),
        ("last", "last layer", published_last_layer),
    ):
        model = fit_laplace(case, base, device, layers)
        posterior = laplace_posterior(model)
        assert posterior is not None
        blocks = factors_of(posterior)
        # Covariances multiply gradients, whose roundings have come through the model twice.
        within = 16 * model_tolerance(SHAPES[case.shape])
        agreement = Agreement(f"laplace, {mode}", OURS)
        if case.shape.startswith("tiny"):
            few = {name: value[:2] for name, value in inputs.items()}
            truth = exact_covariance(model, posterior, few)
            agreement.check("laplace", posterior.laplace.logits(few), truth, within)
            agreement.check("published", formula(model, posterior, few, blocks), truth, within)
        else:
            got, want = posterior.laplace.logits(inputs), formula(model, posterior, inputs, blocks)
            agreement.check("laplace", got, [t.double() for t in want], 2 * within)

        @torch.no_grad()
        def published(
            model: Any = model,
            posterior: Any = posterior,
            formula: Any = formula,
            blocks: Any = blocks,
        ) -> object:
            mean, cov = formula(model, posterior, inputs, blocks)
            cov.diagonal(dim1=1, dim2=2).add_(1e-6)
            return bench_predict.peer(mean, cov, draws)

        steps: dict[str, Callable[[], object]] = {
            "laplace": lambda model=model: hf.predict(model, inputs, n_samples=draws),
            "published": published,
            "mean": lambda model=model: hf.predict(model, inputs, n_samples=0),
        }
        steps = options.pick(steps, OURS)
        times = time_interleaved(steps, device, seconds=options.time_for(10.0, 1.0), max_repeats=40)
        rows += _prediction_rows("laplace", case, mode, steps, times, options, agreement)
    return rows


def _prediction_rows(
    op: str,
    case: Case,
    mode: str,
    steps: dict[str, Callable[[], object]],
    times: harness.Times,
    options: Options,
    misses: Mapping[str, str],
) -> list[Row]:
    rows = []
    for name, step in steps.items():
        row = make_row(op, case.name, name, mode, times, options.device, misses)
        row.peak_bytes = peak_bytes(step, options.device)
        row.launches = count_launches(step, options.device)
        row.figures["tokens_per_second"] = round(case.tokens / (row.p50_us * 1e-6), 1)
        rows.append(row)
    return rows


def run(options: Options) -> Iterator[Row]:
    """All cases."""
    agreement = check(options.device)
    for cases, measure in (
        (training_cases, run_training),
        (sample_cases, run_samples),
        (last_layer_cases, run_last_layer),
        (scaling_cases, run_scaling),
        (laplace_cases, run_laplace),
    ):
        for case in cases(options.device, options.quick):
            if options.wants(case.name):
                yield from measure(case, options, agreement)


def missing(options: Options) -> str | None:
    """transformers and PEFT, in versions that bayes_kernels.hf takes."""
    for name in ("transformers", "peft"):
        if importlib.util.find_spec(name) is None:
            return f"{name} is not installed; pip install 'bayes-kernels[hf]'"
    try:
        import bayes_kernels.hf  # noqa: F401
    except ImportError as error:
        return str(error)
    return None


FAMILY = Family(
    "end_to_end", "training steps and predictions of whole models", OURS, PEERS, run, missing
)
