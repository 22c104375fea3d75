"""Which weights a forward pass uses: noise state, posterior context, divergence from the prior."""

from __future__ import annotations

import contextlib
import operator
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import random
from ..batches import need_whole
from ._compat import continues_a_text
from .layers import (
    active_layers,
    adapter_devices,
    bayes_variants,
    draws_weights,
    key_devices,
    noise_state,
)
from .noise import (
    DRAW_SCOPES,
    KINDS,
    Draws,
    NoiseState,
    Pass,
    made_on,
    normal_tensors,
    process_rank,
    using,
)

MODES = ("sample", "mean", "flipout")


def _draws_anew(module: Any, state: NoiseState) -> bool:
    """Whether a forward pass of the base model takes new noise."""
    if not state.enabled or state.held:
        return False
    samples = module.training or state.samples_in_eval if state.mode is None else False
    return samples or state.mode == "flipout"


def advance_before_forward(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of the base model: new noise for each forward pass that samples.

    Layers never change the key, so that recomputation under gradient checkpointing finds the one of
    the forward pass.
    """
    state: NoiseState = module.bayes_noise
    if not torch.compiler.is_compiling():
        state.follow()  # for layers that are compiled one by one
    if not _draws_anew(module, state):
        return
    if not torch.compiler.is_compiling():
        if torch._C._current_graph_task_id() != -1:
            return  # the whole model is being recomputed in a backward pass
        if continues_a_text(kwargs):
            return  # further tokens of a sequence keep its draw
        _check_packing(module, state, kwargs.get("position_ids"))
    state.advance()


def generate_with_one_draw(model: Any, *args: Any, **kwargs: Any) -> Any:
    """`model.generate` with one key for all passes, an encoder's too, with a cache or without.

    Base models with Bayesian adapters have it in place of the method of their class.
    """
    state: NoiseState = model.bayes_noise
    generate = type(model).generate
    _check_rows(model, state.current(), args, kwargs)
    if not _draws_anew(model, state):
        return generate(model, *args, **kwargs)
    state.advance()
    held = state.snapshot()
    held.held = True
    with using(state, held):
        return generate(model, *args, **kwargs)


def _check_rows(model: Any, chosen: Pass, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse prompts that draws would be spread over: return sequences of a prompt have its draw.

    Raises:
        ValueError: neither have the prompts a draw each, or copies of them, nor have the return
            sequences of one prompt.
    """
    draws = len(next(iter(chosen.draws.values())).ids) if chosen.mode == "sample" else 1
    given = {"inputs": args[0] if args else kwargs.get("inputs"), **kwargs}
    rows = [
        len(given[name])
        for name in ("inputs", "input_ids", "inputs_embeds", "input_features", "input_values")
        if isinstance(given.get(name), Tensor)
    ]
    if draws == 1 or not rows or rows[0] % draws == 0:
        return
    config = kwargs.get("generation_config") or model.generation_config
    beams, copies = (
        kwargs.get(name) or getattr(config, name, None) or 1
        for name in ("num_beams", "num_return_sequences")
    )
    if rows[0] == 1 and beams == 1 and copies == draws and not model.config.is_encoder_decoder:
        return
    raise ValueError(
        f"generate: under posterior with {draws} draws the prompts must be {draws} copies of a batch "
        f"(bayes_kernels.hf.fold_samples), or a prompt for each of draws=..., got {rows[0]} prompts; "
        "return sequences and beams of a prompt have its draw"
    )


def _check_packing(module: nn.Module, state: NoiseState, positions: Any) -> None:
    """Warn once where rows hold several sequences and adapters have one draw for each row.

    On a GPU only the first pass is looked at, since it has to be waited for.
    """
    if state.packing_checked or not isinstance(positions, Tensor) or positions.dim() != 2:
        return
    # A padded row has one beginning, whatever number its padding has.
    begins = (positions[:, :-1] == 0) & (positions[:, 1:] == 1)
    packed = bool((begins.sum(-1) > 1).any())
    state.packing_checked = packed or not positions.is_cpu
    if packed and any(variant.scope == "example" for variant in bayes_variants(module)):
        warnings.warn(
            "scope='example' must have one sequence in each row of the batch, got rows that pack "
            "several (position_ids start again), which then share a draw; use scope='none' (BLoB: "
            "or 'token'), or do not pack",
            stacklevel=2,
        )


def watch_training_in_eval(module: Any, args: Any, output: Any) -> None:
    """Forward hook of the base model: one warning where a pass without noise is trained on."""
    state: NoiseState = module.bayes_noise
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or module.training:
        return
    if state.eval_warned or state.mode is not None or not state.enabled or state.samples_in_eval:
        return
    if torch._C._are_functorch_transforms_active():
        return

    def warn(_: Tensor) -> None:
        layers = active_layers(module)  # none while a conversion has taken the posterior off
        trained = any(
            item.variant.samples and item.view.lora_B[item.adapter].weight.requires_grad
            for item in layers
        )
        if trained and not state.eval_warned:
            state.eval_warned = True
            warnings.warn(
                "a backward pass reached Bayesian adapters of a model in eval mode, which trains "
                "the posterior mean only, without noise; call model.train() before training "
                "(PeftModel.from_pretrained leaves a model in eval mode)",
                stacklevel=2,
            )

    values = output.values() if isinstance(output, Mapping) else output
    for value in values if isinstance(output, (Mapping, tuple, list)) else [output]:
        if isinstance(value, Tensor) and value.requires_grad:
            value.register_hook(warn)


def refresh_noise(
    model: nn.Module, *, step: int | None = None, rank: int | None = None, seed: int | None = None
) -> None:
    """New training noise, before a forward pass.

    Plain loops need no call: every forward pass of the base model in training mode derives a new
    key from the present one. With `step` the key becomes a pure function of (seed, rank, step):

        key = fold_in(fold_in(key(seed), rank), step)

    and each forward pass after it derives the next key from it. That makes a run repeatable from any
    step. Call it where a part of the base model is called directly, which goes past the hook.

    Args:
        model: the model.
        step: number of the micro-batch; None for the next key of the present chain.
        rank: number of the process; None for the process group's.
        seed: None for the seed of the configuration.

    Raises:
        ValueError: the model has no Bayesian adapter.
    """
    state = noise_state(model)
    if step is None:
        state.advance()
        return
    number, process = step, process_rank() if rank is None else rank

    def made(device: torch.device) -> Tensor:
        key = random.key(state.seed if seed is None else seed, device)
        return random.fold_in(random.fold_in(key, process), number)

    with normal_tensors():
        state.keys = made_on(made, key_devices(model, state))


def checkpoint_noise(model: nn.Module) -> Callable[[], tuple[Any, Any]]:
    """Gradient checkpointing that recomputes each forward pass with its own noise and mode.

    Plain gradient checkpointing is right as long as each backward pass comes before the next
    forward pass that draws noise, as in every usual loop, and inside the `posterior` of its forward
    pass. Where several forward passes come before one backward pass, hand this to the checkpoint
    function, which has to be the non-reentrant one:

        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={
            "use_reentrant": False, "context_fn": checkpoint_noise(model)})

    Args:
        model: a model with Bayesian adapters.

    Returns:
        A `context_fn` of `torch.utils.checkpoint.checkpoint`.

    Raises:
        ValueError: the model has no Bayesian adapter.
    """
    state = noise_state(model)

    def contexts() -> tuple[Any, Any]:
        return contextlib.nullcontext(), using(state, state.snapshot())

    return contexts


@contextlib.contextmanager
def posterior(
    model: nn.Module,
    mode: str = "sample",
    *,
    n_samples: int = 1,
    seed: int = 0,
    first_sample: int = 0,
    draws: Tensor | Sequence[int] | None = None,
    kind: str = "antithetic",
    scope: str = "example",
) -> Iterator[NoiseState]:
    """Choose the weights of the forward passes inside the context, in train or eval mode.

    * "sample": draws of the weights, by number. Row i of the batch has draw draws[i]. With S = n_samples
      in place of `draws` the batch is S copies of the examples (`fold_samples`), and copy s uses draw
      first_sample + s. A draw depends on (seed, its number, layer) and nothing else: not on the
      batch, the process or the other draws.
    * "flipout": the noise of training, new in each forward pass.
    * "mean": the posterior mean.

    A batch of k times as many rows as there are draws gives each of them k successive rows. So the
    copies that `generate` makes of a prompt, for beams or return sequences, have the draw of the prompt.

    Threads and tasks of asyncio do not see each other's contexts: each may use its own seed and draws on
    the same model at the same time. A thread that is started inside a context does not see it either;
    enter `posterior` in the thread. The previous state comes back at the end, also after an exception;
    contexts nest. New draws, seeds and first_sample do not compile a compiled model again.

    Args:
        model: a model with Bayesian adapters.
        mode: as above.
        n_samples: draws in the batch; 1 unless the mode is "sample".
        seed: seed of the draws.
        first_sample: number of the first draw.
        draws: number of the draw of each row of the batch, integers of at least 0; in place of
            n_samples and first_sample.
        kind: how draws of one seed hang together. "antithetic": draws 2 p and 2 p + 1 are the mean
            plus and minus the same deviation, and pairs are independent; probabilities have a smaller error
            than from as many independent draws, mutual information one up to sqrt(2) times as large.
            "independent": all are. "shared": all have
            the same |eps| and differ in its signs (BLoB and TFB; ScalaBL's are independent then).
        scope: "example": a draw is one set of weights for all its tokens. "token" (BLoB and TFB): the
            noise of a training pass, in which each token has signs of its own, by its place among the
            rows of the draw; draws are independent, and `kind` does not matter.

    Raises:
        ValueError: mode, kind, scope, counts or numbers are out of range, the model has no Bayesian
            adapter, or the mode is "sample" and no adapter's weights have such draws.

    Example:
        with posterior(model, "sample", n_samples=8, seed=0):
            logits = model(**fold_samples(batch, 8)).logits.unflatten(0, (8, -1))

    Sources: antithetic pairs: Hammersley and Morton, "A new Monte Carlo technique: antithetic variates",
    1956; noise for each token: Wang et al., "BLoB", arXiv 2406.11675.
    """
    for name, value, choices in (
        ("mode", mode, MODES),
        ("kind", kind, KINDS),
        ("scope", scope, DRAW_SCOPES),
    ):
        if value not in choices:
            raise ValueError(
                f"posterior: {name} must be one of {choices}, got {value!r}; choose one"
            )
    need_whole("posterior: n_samples", n_samples, 1)
    need_whole("posterior: first_sample", first_sample, 0)
    if n_samples > 1 and mode != "sample":
        raise ValueError(f"posterior: n_samples must be 1 unless mode is 'sample', got {n_samples}")
    ids = None if draws is None else _numbers(draws)
    if ids is not None and (mode != "sample" or n_samples > 1 or first_sample > 0):
        raise ValueError(
            "posterior: draws must come with mode 'sample' and without n_samples and first_sample, got "
            f"{mode!r}, {n_samples} and {first_sample}; number every row's draw in draws"
        )
    if isinstance(model, nn.DataParallel) and len(model.device_ids) > 1:
        raise ValueError(
            "posterior: the model must not be DataParallel, whose threads begin without the context; use "
            "model.module, or a process for each GPU"
        )
    state = noise_state(model)
    if mode == "sample":
        _check_draws(model, scope)
    state.devices = devices = adapter_devices(model)
    with normal_tensors():
        keys = made_on(lambda device: random.key(seed, device), devices)
        if ids is None:
            made = made_on(lambda d: Draws.successive(first_sample, n_samples, d), devices)
        else:
            found = Draws.of(ids)
            made = made_on(found.to, devices)
        chosen = Pass(mode, keys, made, kind, scope)
        if scope == "token":
            counted = range(first_sample, first_sample + n_samples) if ids is None else ids
            chosen.keys_of_draws = {
                device: [random.fold_in(key, number) for number in counted]
                for device, key in keys.items()
            }
    with using(state, chosen):
        yield state


def _numbers(draws: Tensor | Sequence[int]) -> list[int]:
    """The number of each row's draw.

    Raises:
        ValueError: they are not integers of at least 0, or there are none.
    """
    if isinstance(draws, Tensor):
        whole = draws.dim() == 1 and not (draws.is_floating_point() or draws.dtype == torch.bool)
        ids = draws.tolist() if whole else []
    else:
        given = draws if isinstance(draws, Iterable) else ()
        ids = [operator.index(i) if hasattr(i, "__index__") else -1 for i in given]
    if not ids or min(ids) < 0:
        raise ValueError(
            "posterior: draws must be the number of the draw of each row, integers of at least 0 in one "
            f"dimension, got {draws!r}; for S copies of a batch use n_samples=S"
        )
    return ids


def _check_draws(model: nn.Module, scope: str) -> None:
    """Whether weights of the model's adapters can be drawn with this scope.

    Raises:
        ValueError: they cannot.
    """
    if not draws_weights(model):
        raise ValueError(
            "posterior: mode must be 'mean' for adapters whose weights have no draws, got "
            "'sample'; draws of a variational last layer come from predict"
        )
    for variant in bayes_variants(model):
        if variant.samples and scope not in variant.draw_scopes:
            raise ValueError(
                f"posterior: scope must be one of {variant.draw_scopes} for method "
                f"{variant.config.method!r}, got {scope!r}; choose one"
            )
