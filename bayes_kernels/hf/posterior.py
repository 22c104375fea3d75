"""Which weights a forward pass uses: noise state, posterior context, divergence from the prior."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from .. import functional, random, reference
from ._compat import continues_a_text
from .last_layer import find_head
from .variants import RHO, BayesVariant, Divergence

MODES = ("sample", "mean", "flipout")


def process_rank() -> int:
    """Rank of this process: of the process group, else of the launcher's RANK, else 0."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank()
    return int(os.environ.get("RANK", "0"))


class NoiseState:
    """Noise key and sampling mode of one model; every adapted layer refers to the same object.

    The key lies on each device where adapted layers run. A new key is a new tensor, so that forward
    passes whose backward pass is still to come keep theirs. Copies, pickles and device moves of the
    model carry the state along; it is no module, so that `half()` does not touch it.

    Attributes:
        mode: None (training mode samples, eval mode uses the mean unless the configuration says
            otherwise), or what an enclosing `posterior` says: "sample", "mean", "flipout".
        n_samples: draws folded into the batch in mode "sample".
        first_sample: number of the first of them.
        samples_in_eval: whether an adapter has sample_at_inference.
        enabled: False while the adapters are disabled.
        held: True inside `generate`, all passes of which have one key.
        packing_checked, calls_checked, eval_warned: what has been looked at, for warnings that come
            once.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.mode: str | None = None
        self.n_samples = 1
        self.first_sample = 0
        self.samples_in_eval = False
        self.enabled = True
        self.held = False
        self.packing_checked = self.calls_checked = self.eval_warned = False
        # The reference implementation: making a model must not need the compiled ops.
        self.keys = {torch.device("cpu"): reference.fold_in(random.key(seed), process_rank())}

    def key_on(self, device: torch.device) -> Tensor:
        """The key on a device."""
        key = self.keys.get(device)
        if key is None:
            key = next(iter(self.keys.values())).to(device)
            self.keys[device] = key
        return key

    def set_key(self, key: Tensor, devices: set[torch.device]) -> None:
        """Use another key, copied to other devices than its own."""
        self.keys = {device: key.to(device) for device in {key.device, *devices}}

    def make_key(self, make: Callable[[torch.device], Tensor], devices: set[torch.device]) -> None:
        """Use another key, made on each device: a copy would wait for the work there."""
        self.keys = {device: make(device) for device in devices or {torch.device("cpu")}}

    def snapshot(self) -> tuple[Any, ...]:
        """Keys and mode, for `restore`. Keys are replaced, never changed: no copy is needed."""
        return self.keys, self.mode, self.n_samples, self.first_sample

    def restore(self, snapshot: tuple[Any, ...]) -> None:
        """Go back to a snapshot."""
        self.keys, self.mode, self.n_samples, self.first_sample = snapshot

    def advance(self) -> None:
        """Draw a new key from the present one."""
        with _normal_tensors():
            self.keys = {device: random.fold_in(key, 0) for device, key in self.keys.items()}


def _normal_tensors() -> contextlib.AbstractContextManager[Any]:
    """Keys made in inference mode could not be saved for a later backward pass."""
    if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():
        return torch.inference_mode(False)
    return contextlib.nullcontext()


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
    """`model.generate` whose passes, those of an encoder included, have one key, with a cache or not.

    Base models with Bayesian adapters have it in place of the method of their class.
    """
    state: NoiseState = model.bayes_noise
    generate = type(model).generate
    if not _draws_anew(model, state):
        return generate(model, *args, **kwargs)
    state.advance()
    state.held = True
    try:
        return generate(model, *args, **kwargs)
    finally:
        state.held = False


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
    if packed and any(variant.scope == "example" for variant in _variants(module)):
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
        layers = _active_layers(module)  # none while a conversion has taken the posterior off
        trained = any(
            item.variant.samples and item.layer.lora_B[item.adapter].weight.requires_grad
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


class BayesLayer(NamedTuple):
    """One adapted layer: module name, PEFT layer, adapter name and its variant."""

    name: str
    layer: Any
    adapter: str
    variant: BayesVariant

    @property
    def mean(self) -> nn.Parameter:
        """`lora_A.weight`, (r, in): for BLoB and TFB the posterior mean of A."""
        return self.layer.lora_A[self.adapter].weight

    @property
    def rho(self) -> nn.Parameter:
        """BLoB, TFB: parameter of the deviation of A, (r, in) or (r, 1), fp32."""
        return self.tensor(getattr(self.variant, "deviation", RHO))

    def tensor(self, name: str) -> nn.Parameter:
        """A tensor that the method has beside the factors, by its name."""
        return getattr(self.layer, name)[self.adapter]


def _active_layers(model: nn.Module, adapter: str | None = None) -> list[BayesLayer]:
    """As `bayes_layers`, unsorted; empty where there is none."""
    found = []
    module: Any
    for module in model.modules():
        variants = getattr(module, "lora_variant", None)
        if not variants:
            continue
        names = module.active_adapters if adapter is None else [adapter]
        for name in names:
            variant = variants.get(name)
            if isinstance(variant, BayesVariant):
                found.append(BayesLayer(variant.name, module, name, variant))
    return found


def bayes_layers(model: nn.Module, adapter: str | None = None) -> list[BayesLayer]:
    """The Bayesian layers of a model, sorted by name.

    Args:
        model: any module that holds them, wrapped by PEFT, DDP or `torch.compile` or not.
        adapter: name of the adapter, or None for the active ones.

    Raises:
        ValueError: there is none.
    """
    found = _active_layers(model, adapter)
    if not found:
        which = "an active Bayesian adapter" if adapter is None else f"the adapter {adapter!r}"
        raise ValueError(
            f"bayes_layers: the model must have {which}, got {type(model).__name__} without; make "
            "one with get_peft_model(model, BlobConfig(...)) or name the right adapter"
        )
    return sorted(found, key=lambda item: (item.name, item.adapter))


def _variants(model: nn.Module) -> Iterator[BayesVariant]:
    """Those of all Bayesian adapters, active or not."""
    for module in model.modules():
        for variant in getattr(module, "lora_variant", {}).values():
            if isinstance(variant, BayesVariant):
                yield variant


def noise_state(model: nn.Module) -> NoiseState:
    """The noise state of a model with Bayesian adapters, active or not.

    Raises:
        ValueError: the model has none.
    """
    for variant in _variants(model):
        return variant.state
    if any("laplace_posterior" in module.__dict__ for module in model.modules()):
        raise ValueError(
            "noise_state: the adapter must have noise, got a Laplace posterior, whose logits are "
            "Gaussian; use predict, or drawn_weights for a draw of the weights"
        )
    raise ValueError(
        f"noise_state: the model must have a Bayesian adapter, got {type(model).__name__} without; "
        "make one with get_peft_model(model, BlobConfig(...))"
    )


def draws_weights(model: nn.Module) -> bool:
    """Whether weights of a Bayesian adapter, active or not, have draws."""
    return any(variant.samples for variant in _variants(model))


def without_effect(model: nn.Module) -> str | None:
    """Why no LoRA adapter of a model takes part in its passes, and what to do; None where one does."""
    layers: list[Any] = [m for m in model.modules() if isinstance(m, LoraLayer)]
    if not layers or any(not (layer.disable_adapters or layer.merged) for layer in layers):
        return None
    if any(layer.disable_adapters for layer in layers):
        return "disabled; leave disable_adapter()"
    return "merged; call unmerge_adapter()"


def warn_uncalled(op: str, names: Sequence[str], layers: int) -> None:
    """One line about adapted layers that a pass has gone round."""
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    warnings.warn(
        f"{op}: {len(names)} of {layers} adapted layers were not called, so that their adapters do "
        f"nothing: {shown}; leave them out of target_modules (a module such as MultiheadAttention "
        "uses the weights of its out_proj without calling it)",
        stacklevel=3,
    )


def adapter_devices(model: nn.Module) -> set[torch.device]:
    """Devices of the layers that have Bayesian adapters, active or not."""
    devices = set()
    module: Any
    for module in model.modules():
        for name, variant in getattr(module, "lora_variant", {}).items():
            if isinstance(variant, BayesVariant):
                weight = module.lora_A[name].weight
                devices.update([] if weight.is_meta else [weight.device])
    return devices


def refresh_noise(
    model: nn.Module, *, step: int | None = None, rank: int | None = None, seed: int | None = None
) -> None:
    """New training noise, before a forward pass.

    Plain loops need no call: every forward pass of the base model in training mode derives a key of
    its own from the present one. With `step` the key becomes a pure function of (seed, rank, step):

        key = fold_in(fold_in(key(seed), rank), step)

    from which each forward pass after it derives one of its own. That makes a run repeatable from
    any step. Call it where a part of the base model is called
    directly, which goes past the hook.

    Args:
        model: the model.
        step: number of the micro-batch; None for the next key of the present chain.
        rank: number of the process; None for that of the process group.
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

    with _normal_tensors():
        state.make_key(made, adapter_devices(model))


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
        return contextlib.nullcontext(), _using(state, state.snapshot())

    return contexts


@contextlib.contextmanager
def _using(state: NoiseState, snapshot: tuple[Any, ...]) -> Iterator[None]:
    before = state.snapshot()
    state.restore(snapshot)
    try:
        yield
    finally:
        state.restore(before)


@contextlib.contextmanager
def posterior(
    model: nn.Module,
    mode: str = "sample",
    *,
    n_samples: int = 1,
    seed: int = 0,
    first_sample: int = 0,
) -> Iterator[NoiseState]:
    """Choose the weights of the forward passes inside the context, in train or eval mode.

    * "sample": coherent draws of the weights, folded into the batch: with S = n_samples the first
      dimension of every input is S copies of the examples (`fold_samples`), and copy s uses draw
      first_sample + s. A draw depends on (seed, its number) and nothing else: not on the batch, the
      process or the other draws. Draws of one seed are, with BLoB and TFB, uncorrelated but not
      independent: they share |eps| and differ in its signs, so that the Monte-Carlo error of their
      mean has a floor, which more draws of the same seed do not lower. Average over several seeds
      for independent draws.
    * "flipout": the noise of training, new in each forward pass.
    * "mean": the posterior mean.

    The previous state comes back at the end, also after an exception; contexts nest.

    Args:
        model: a model with Bayesian adapters.
        mode: as above.
        n_samples: draws in the batch; 1 unless the mode is "sample".
        seed: seed of the draws.
        first_sample: number of the first draw.

    Raises:
        ValueError: mode or counts are out of range, the model has no Bayesian adapter, or the mode is
            "sample" and no adapter's weights have draws (PoLAR).

    Example:
        with posterior(model, "sample", n_samples=8, seed=0):
            logits = model(**fold_samples(batch, 8)).logits.unflatten(0, (8, -1))
    """
    if mode not in MODES:
        raise ValueError(f"posterior: mode must be one of {MODES}, got {mode!r}; choose one")
    if n_samples < 1 or (n_samples > 1 and mode != "sample"):
        raise ValueError(
            f"posterior: n_samples must be at least 1, and 1 unless mode is 'sample', got "
            f"{n_samples}"
        )
    if first_sample < 0:
        raise ValueError(f"posterior: first_sample must not be negative, got {first_sample}")
    state = noise_state(model)
    if mode == "sample" and not draws_weights(model):
        raise ValueError(
            "posterior: mode must be 'mean' for adapters whose weights have no draws (PoLAR), got "
            "'sample'; draws of a variational last layer come from predict"
        )
    before = state.snapshot()
    with _normal_tensors():
        state.make_key(lambda device: random.key(seed, device), adapter_devices(model))
    state.mode, state.n_samples, state.first_sample = mode, n_samples, first_sample
    try:
        yield state
    finally:
        state.restore(before)


def kl_divergence(model: nn.Module, adapter: str | None = None) -> Tensor:
    """Divergence of the posterior from the prior, summed over all adapted layers.

        KL = sum log(sigma_p / Omega) + (Omega^2 + M^2) / (2 sigma_p^2) - 1/2

    for BLoB; the page of each method has its own. 0 for adapters without a prior.

    Args:
        model: a model with Bayesian adapters.
        adapter: name of the adapter, or None for the active ones.

    Returns:
        0-dim fp32 tensor, differentiable in the parameters of the posterior. One launch for each
        device and parameterisation.

    Raises:
        ValueError: there is no such adapter.

    Source: Wang et al., "BLoB", arXiv 2406.11675, section 3.
    """
    layers = bayes_layers(model, adapter)
    groups: dict[tuple[torch.device, str, str, bool], list[Divergence]] = {}
    parts: list[Tensor] = []
    for item in layers:
        term = item.variant.divergence(item.layer, item.adapter)
        if isinstance(term, Divergence):
            sharded = hasattr(term.mean, "full_tensor")
            kind = (term.mean.device, term.std, term.direction, sharded)
            groups.setdefault(kind, []).append(term)
        elif term is not None:
            parts.append(term)
    for (_, std, direction, sharded), terms in groups.items():
        means = [term.mean for term in terms]
        rhos = [term.rho for term in terms]
        priors = [term.prior_std for term in terms]
        if sharded:  # FSDP2: the definition, whose sums PyTorch reduces over the shards
            partial: Any = reference.gaussian_kl(means, rhos, priors, std=std, direction=direction)
            parts.append(partial.full_tensor())
        else:
            kl = functional.gaussian_kl(means, rhos, priors, std=std, direction=direction)
            parts.append(kl)
    head = find_head(model, adapter)
    if head is not None:
        parts.append(head.kl())
    if not parts:
        return layers[0].mean.new_zeros((), dtype=torch.float32)
    total = parts[0]
    for part in parts[1:]:
        total = total + part.to(total.device)
    return total
