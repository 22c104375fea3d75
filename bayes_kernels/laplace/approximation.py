"""Laplace: curvature, evidence and linearised predictions."""

from __future__ import annotations

import contextlib
import math
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import random, reference
from ..batches import eval_mode, is_empty
from .contraction import Contraction
from .draws import drawn_prediction, drawn_scores, linearised_scores
from .errors import Errors, SoftmaxRoot, label_errors, sampled_errors
from .evidence import Evidence, best_of_grid
from .factors import STATE, Accumulator, Block
from .layers import Layer, MemoryEstimate, Sites, estimate_memory, linear_layers
from .passes import Reader, watched, where_not_finite
from .prediction import Prediction, from_logits
from .tokens import TokenErrors, labelled_tokens
from .trained import digest as _digest
from .trained import processes as _processes
from .trained import versions as _versions

FISHERS = ("ggn", "mc", "empirical")
TOKENS = ("expand", "sum", "sum_padded", "reduce", "last")
METHODS = ("mc", "mc_independent", "quadrature", "probit", "bridge", "weights")


class Laplace:
    """Gaussian posterior over the weights of linear layers, around their trained values.

    Args:
        model: a trained classifier. Its parameters, their gradients, requires_grad flags and
            training mode are as before after every call.
        layers: the layers that get a posterior; None for `linear_layers(model)`.
        rank: k, columns of low-rank factors; None for dense factors everywhere.
        dense_below: sides with fewer entries have dense factors.
        fisher: "ggn", the exact generalised Gauss-Newton matrix of the softmax likelihood (C - 1
            backward passes for each batch); "mc", labels drawn from the model (`mc_samples` backward
            passes); "empirical", the labels of the data (one; a worse approximation). For labels of
            tokens "mc" or "empirical".
        tokens: what a sequence contributes. "expand": every token, a's factor divided by their number;
            "sum": every token, not divided, which is the law of the paper's code without padding;
            "sum_padded": that code's law to the letter, every position, padding and tokens that do
            not act on the logits included: it depends on how the data is padded; "reduce": outer
            products of the mean of a and the sum of g; "last": the last token only, which is exact
            for a head that sees nothing else. The same for one token. For labels of tokens "expand",
            "sum" or "reduce".
        prior_precision: delta, one number, or a tensor with one for each layer.
        forward: (model, batch) -> logits (B, C), or (B, T, C) for labels of tokens. None: model(x) for
            batches (x, y), and model(**batch without labels).logits for mappings.
        labels: batch -> class indices (B,), or None. None: batch[1], or batch["labels"] or
            batch["label"]. For labels of tokens (B, T), each at the logits that predict it, -100 where
            none counts: a causal model's are shifted by one.
        mask: batch -> (B, T) of valid tokens, or None; (B, K, T) where an example is K sequences, as
            in multiple choice. None: batch["attention_mask"] where there is one.
        buffer: number of uncompressed rows that a low-rank factor keeps.
        mc_samples, seed: draws of labels for fisher "mc".
        jacobian: "vmap": the C backward passes of a prediction as one vectorised pass, and several
            of `fit`; "repeat": as one ordinary pass over C copies of the batch, `fit`'s one by one,
            for models that cannot be vectorised, at C times the memory for activations.
        depends_on: further weights that were trained together with the layers'. The posterior belongs
            to these values and the layers'; where any of them has changed since `fit`, every use of
            the posterior raises.
        split: (batch, n) -> at most n smaller batches, its examples in order. With it `fit` runs each
            batch in two halves, as it keeps the graph for several backward passes, and "validation"
            in as many parts as there are classes: both then take less memory than an ordinary
            training step with the whole batch. None: batches are taken whole.

    Labels of tokens: the likelihood is sum_t log p(y_t | x), and its curvature one term for each labelled
    token, sum_t J_t^T (diag(p_t) - p_t p_t^T) J_t. With a label drawn at each of them one backward pass
    has their sum, whose square has that mean: products of different tokens have mean zero, as labels
    are drawn independently. Its Kronecker form is that of `tokens`, the KFAC-expand of language models
    being "expand" (Eschenhagen et al.), with n_b labelled tokens in sequence b and T_b tokens that act on
    their logits:

        N E_t[g g^T] (x) E_t[a a^T]  ->  sum_b sum_t g g^T (x) (1 / sum_b n_b) sum_b (n_b / T_b) sum_t a a^T

    The approximations: a and g of a token are taken as independent, and so are different positions of a
    sequence, whose a^T a' g g'^T are left out. Tokens without label and padding count only where they act
    on the logits of a labelled one, as a prompt does below the head. n_examples is the number of labelled
    tokens; with one in each sequence all is as for labels (B,).

    Gradient checkpointing is respected; transformers' models checkpoint in training mode only, and
    are run in eval mode here. Batches are moved to the device of the first parameter; `forward`,
    `labels` and `mask` get them, or their parts, after that.

    Raises:
        ValueError, TypeError: options or layers do not fit.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[Layer] | None = None,
        *,
        rank: int | None = 10,
        dense_below: int = 512,
        fisher: str = "ggn",
        tokens: str = "expand",
        prior_precision: float | Tensor = 1.0,
        forward: Callable[[nn.Module, Any], Tensor] | None = None,
        labels: Callable[[Any], Tensor | None] | None = None,
        mask: Callable[[Any], Tensor | None] | None = None,
        buffer: int = 32,
        mc_samples: int = 1,
        seed: int = 0,
        jacobian: str = "vmap",
        depends_on: Iterable[Tensor] = (),
        split: Callable[[Any, int], Sequence[Any]] | None = None,
    ) -> None:
        for name, value, choices in (
            ("fisher", fisher, FISHERS),
            ("tokens", tokens, TOKENS),
            ("jacobian", jacobian, ("vmap", "repeat")),
        ):
            if value not in choices:
                raise ValueError(
                    f"Laplace: {name} must be one of {choices}, got {value!r}; choose one"
                )
        for name, number in (("rank", 1 if rank is None else rank), ("mc_samples", mc_samples)):
            if number < 1:
                raise ValueError(f"Laplace: {name} must be at least 1, got {number}")
        if buffer < 1 or dense_below < 1:
            raise ValueError(
                f"Laplace: buffer and dense_below must be at least 1, got {buffer}, {dense_below}"
            )
        self.model = model
        self._sites = Sites(model, linear_layers(model) if layers is None else layers)
        self.layers = self._sites.layers
        self.rank, self.dense_below, self.buffer = rank, dense_below, buffer
        self.fisher, self.tokens, self.jacobian = fisher, tokens, jacobian
        self.mc_samples, self.seed = mc_samples, seed
        self._reader = Reader(model, forward, labels, mask, split)
        self._classes = 1  # as `fit` saw them
        self._trained = [*(layer.weight for layer in self.layers), *depends_on]
        self._digest = b""
        self._versions: list[tuple[int, int]] = []
        self._blocks: list[Block] | None = None
        self.n_examples = 0
        self.log_likelihood: float | None = None
        self.prior_precision = prior_precision  # type: ignore[assignment]

    # --- options -------------------------------------------------------------------------------

    @property
    def prior_precision(self) -> Tensor:
        """delta: 0-dim, or (layers,); fp64 on the CPU."""
        return self._prior_precision

    @prior_precision.setter
    def prior_precision(self, value: float | Tensor) -> None:
        delta = torch.as_tensor(value, dtype=torch.float64).detach().cpu().clone()
        if delta.shape not in ((), (len(self.layers),)) or not bool((delta > 0).all()):
            raise ValueError(
                f"Laplace: prior_precision must be one positive number, or one for each of the "
                f"{len(self.layers)} layers, got {value}"
            )
        self._prior_precision = delta

    def estimate_memory(self) -> MemoryEstimate:
        """What `fit` takes beyond a forward and backward pass of the model."""
        return estimate_memory(
            self.layers, rank=self.rank, dense_below=self.dense_below, buffer=self.buffer
        )

    # --- curvature -----------------------------------------------------------------------------

    def fit(
        self, loader: Iterable[Any], *, verbose: bool = True, distributed: bool | None = None
    ) -> Laplace:
        """One pass over the training data: curvature and log-likelihood.

        With several processes each passes its share of the data (every example once in all), and
        factors are combined at the end: dense ones are summed, low-rank ones gathered and compressed
        again. The result is that of one process, exactly for dense factors and where no factor has
        seen more than k rows, else up to the truncation of low-rank factors.

        Args:
            loader: batches, as `forward`, `labels` and `mask` take them.
            verbose: write the memory estimate to stderr first.
            distributed: None to combine processes where a process group exists.

        Returns:
            self.

        Raises:
            ValueError: a layer has no curvature (an untrained LoRA adapter has B = 0), is used twice,
                or batches do not fit.

        Cost: for each batch one forward pass and C - 1 ("ggn"), mc_samples ("mc") or one backward
        passes without gradients of parameters, several at once; memory as `estimate_memory` says.
        """
        for layer in self.layers:
            if layer.gate is not None and not bool(layer.gate.any()):
                raise ValueError(
                    f"Laplace.fit: layer {layer.name} must have gradients, got another factor that "
                    "is all zeros (LoRA's B before training); train the adapter first or leave the "
                    "layer out"
                )
        rank, world = _processes(distributed)
        if verbose and rank == 0:
            print(f"Laplace: {self.estimate_memory()}", file=sys.stderr)
        collect = Accumulator(
            self._sites,
            self.tokens,
            rank=self.rank,
            dense_below=self.dense_below,
            buffer=self.buffer,
            at_once=self.jacobian == "vmap",
        )
        reader, rows, examples = self._reader, 0, 0
        errors: SoftmaxRoot | Errors | TokenErrors
        key = reference.fold_in(random.key(self.seed), 0)
        log_likelihood, labelled = 0.0, True
        filled = (raw for raw in loader if not is_empty(raw))
        with watched(self.model, collect) as anchor:
            for batch, parts in (part for raw in filled for part in reader.parts(raw, 2)):
                logits = reader.logits(batch)
                collect.require_gradient(logits)
                b, self._classes = len(logits), logits.shape[-1]
                # The global index of the examples where processes take turns.
                index = (rows + torch.arange(b, device=logits.device)) * world + rank
                rows += b
                if logits.dim() == 3:
                    found = labelled_tokens(
                        reader, self._sites, batch, logits, rows - b, self.fisher, self.tokens
                    )
                    examples += found.total
                    log_likelihood += found.log_likelihood()
                    if found.total:
                        drawn = self.fisher == "mc"
                        errors = (
                            found.drawn(key.to(logits.device), index, self.mc_samples)
                            if drawn
                            else found.given()
                        )
                        collect.add(logits, anchor, errors, reader.mask(batch), parts)
                        del errors
                    del logits, found  # the graph goes before the next batch
                    continue
                wide = logits.detach().to(torch.promote_types(logits.dtype, torch.float32))
                if not bool(torch.isfinite(wide).all()):
                    where = where_not_finite(reader, self._sites, batch)
                    raise ValueError(
                        f"Laplace.fit: logits must be finite, got NaN or infinity, first in {where} "
                        f"(examples {examples} to {examples + b - 1} of the loader); look at these "
                        "inputs, or run the model in float32 or bfloat16"
                    )
                labels = reader.labels(batch, wide)
                if labels is None:
                    labelled = False
                    if self.fisher == "empirical":
                        raise ValueError(
                            "Laplace.fit: batches must have labels for fisher='empirical', got "
                            "none; pass labels=lambda batch: ..."
                        )
                else:
                    log_likelihood -= float(
                        nn.functional.cross_entropy(wide.double(), labels, reduction="sum")
                    )
                examples += b
                if self.fisher == "ggn":
                    errors = SoftmaxRoot(wide)
                elif self.fisher == "mc":
                    errors = sampled_errors(wide, key.to(wide.device), index, self.mc_samples)
                else:
                    errors = label_errors(wide, labels)  # type: ignore[arg-type]
                collect.add(logits, anchor, errors, reader.mask(batch), parts)
                del logits  # the graph goes before the next batch
        collect.finish()
        if world > 1:
            collect.merge()
            device = collect.sides[0][0].sum.device
            totals = torch.tensor(
                [examples, log_likelihood, float(labelled)], dtype=torch.float64, device=device
            )
            torch.distributed.all_reduce(totals)
            examples, log_likelihood = int(totals[0]), float(totals[1])
            labelled = float(totals[2]) == world
        if examples == 0:
            what = "labelled token" if rows else "example"
            raise ValueError(f"Laplace.fit: loader must give at least one {what}, got none")
        self._blocks = collect.blocks(examples)
        self._digest, self._versions = _digest(self._trained), _versions(self._trained)
        self.n_examples = examples
        self.log_likelihood = log_likelihood if labelled else None
        return self

    def _fitted(self) -> list[Block]:
        """The posterior of each layer, on its device.

        Raises:
            ValueError: not fitted, or the weights have changed since.
        """
        if self._blocks is None:
            raise ValueError("Laplace: fit must come first; call fit(loader) or load_state_dict")
        versions = _versions(self._trained)
        if versions != self._versions:  # moved or written to, perhaps with the same values
            if _digest(self._trained) != self._digest:
                raise ValueError(
                    "Laplace: weights must be those that the posterior was fitted to, got others (they "
                    "were trained or replaced since); call fit again"
                )
            self._versions = versions
            devices = [layer.weight.device for layer in self.layers]
            self._blocks = [b.to(d) for b, d in zip(self._blocks, devices, strict=True)]
        return self._blocks

    # --- evidence and prior --------------------------------------------------------------------

    # --- evidence and prior --------------------------------------------------------------------

    def log_marginal_likelihood(self, prior_precision: float | Tensor | None = None) -> Tensor:
        """Laplace's approximation of the log evidence, in nats.

            log p(y | theta) - 1/2 sum_l (delta_l |theta_l|^2 + sum_ij log(1 + mu_i nu_j / delta_l))

        Args:
            prior_precision: None for the present one; a tensor may require a gradient.

        Returns:
            0-dim fp64 tensor.

        Raises:
            ValueError: not fitted, or fitted without labels.
        """
        if self.log_likelihood is None and self._blocks is not None:
            raise ValueError(
                "Laplace.log_marginal_likelihood: fit must have seen labels, got none; pass "
                "labels=lambda batch: ..."
            )
        evidence = Evidence.of(self.layers, self._fitted())
        delta = self._prior_precision if prior_precision is None else prior_precision
        return (self.log_likelihood or 0.0) + evidence.relative(delta)

    def effective_parameters(self) -> Tensor:
        """gamma of each layer: sum_ij mu_i nu_j / (mu_i nu_j + delta), (layers,) fp64."""
        evidence = Evidence.of(self.layers, self._fitted())
        return evidence.effective_parameters(self._prior_precision)

    def optimize_prior_precision(
        self,
        method: str = "mackay",
        *,
        structure: str = "scalar",
        loader: Iterable[Any] | None = None,
        grid: Tensor | None = None,
        refine: int = 1,
        lr: float = 0.1,
        steps: int = 100,
        prediction: str = "probit",
        n_samples: int = 1000,
        verbose: bool = False,
    ) -> Tensor:
        """Choose delta.

        * "mackay": the stationary point of the evidence, delta |theta|^2 = gamma(delta), by Newton
          steps on log delta. It is the only one and a maximum: gamma falls in delta and the left side
          rises. No pass over data.
        * "gradient": Adam on log delta for the evidence, as the paper does. No pass over data.
        * "validation": the value of a grid with the highest log-likelihood on held-out data, then
          grids around the best. One pass over the data for each grid, whatever its length; n_samples
          for each value with prediction "weights", the only one for labels of tokens.

        Args:
            method: as above.
            structure: "scalar", one delta; "layer", one for each layer ("mackay" and "gradient").
            loader: labelled batches that the model has not seen, for "validation".
            grid: values for "validation"; None for 21 from 1e-4 to 1e4.
            refine: further grids.
            lr, steps: of Adam.
            prediction, n_samples: how "validation" predicts; see `predict`.
            verbose: write the result to stderr.

        Returns:
            delta, which is also set.

        Raises:
            ValueError: options do not fit, or weights are all zero.

        Source: MacKay, "Bayesian Interpolation", 1992, for the fixed point.
        """
        op = "Laplace.optimize_prior_precision"
        if method not in ("mackay", "gradient", "validation"):
            raise ValueError(
                f"{op}: method must be 'mackay', 'gradient' or 'validation', got {method!r}"
            )
        if structure not in ("scalar", "layer"):
            raise ValueError(f"{op}: structure must be 'scalar' or 'layer', got {structure!r}")
        if method == "validation":
            if loader is None or structure != "scalar":
                raise ValueError(
                    f"{op}: method 'validation' must have a loader and structure 'scalar', got "
                    f"{'a' if loader is not None else 'no'} loader and {structure!r}"
                )
            if grid is None:
                grid = torch.logspace(-4, 4, 21, dtype=torch.float64)
            score: Callable[[Tensor], tuple[Tensor, int]]
            if prediction == "weights":
                held_out = [raw for raw in loader if not is_empty(raw)]
                score = lambda grid: self._drawn_scores(held_out, grid, n_samples)  # noqa: E731
            else:
                self._fitted()
                score = lambda grid: linearised_scores(  # noqa: E731
                    self._reader,
                    self._linearised,
                    self._classes,
                    loader,
                    grid,
                    prediction,
                    n_samples,
                )
            delta = best_of_grid(score, grid, refine)
        else:
            evidence = Evidence.of(self.layers, self._fitted())
            if method == "mackay":
                delta = evidence.mackay(structure)
            else:
                delta = evidence.ascent(self._prior_precision, structure, lr, steps)
        self.prior_precision = delta  # type: ignore[assignment]
        if verbose:
            print(f"Laplace: prior precision {delta.tolist()}", file=sys.stderr)
        return self._prior_precision

    def _drawn_scores(
        self, batches: Sequence[Any], grid: Tensor, n_samples: int
    ) -> tuple[Tensor, int]:
        """Log-likelihood of held-out labels under draws of the weights, for each delta of a grid."""
        kept, seen, scores = self._prior_precision, 0, []
        try:
            for delta in grid:
                self.prior_precision = delta  # type: ignore[assignment]
                score, seen = drawn_scores(self._reader, self.sampled, batches, n_samples)
                scores.append(score)
        finally:
            self.prior_precision = kept  # type: ignore[assignment]
        return torch.tensor(scores, dtype=torch.float64), seen

    # --- prediction ----------------------------------------------------------------------------

    @torch.no_grad()
    def mean_logits(self, batch: Any) -> Tensor:
        """Logits (B, C) of the model as it was trained, in eval mode: a forward pass.

        Args:
            batch: as for `fit`; labels are not used.

        Raises:
            ValueError: not fitted, or the batch does not fit.
        """
        self._fitted()
        with eval_mode(self.model):
            logits = self._reader.logits(self._prepare(batch))
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def logits(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Mean (B, C) and covariance (B, C, C) of the logits of the linearised model.

            f(x) + J (theta - theta_MAP):  mean = f_MAP(x),  cov = sum_l J_l Sigma_l J_l^T

        With G_c (out, in) the gradient of logit c in a layer, P_c = Q^T G_c U and R_c = G_c - Q P_c U^T:

            cov[c, e] = sum_l sum_ij P_c P_e / (mu_i nu_j + delta) + <R_c, R_e> / delta

        a sum of Gram matrices, hence never negative, without a difference of large numbers. Layers
        are visited once, in the order of the backward pass; the full Jacobian never exists.

        Args:
            batch: as for `fit`; labels are not used.

        Raises:
            ValueError: not fitted, or the batch does not fit.
        """
        mean, covs = self._linearised(self._prepare(batch), [self._prior_precision])
        return mean, covs[0]

    def predict(
        self,
        batch: Any,
        *,
        method: str = "mc",
        n_samples: int = 1000,
        seed: int = 0,
        row0: int = 0,
    ) -> Prediction:
        """Predictive distribution over the classes.

        Args:
            batch: as for `fit`; labels are not used.
            method: from the linearised logits: "mc", Monte Carlo with their joint Gaussian;
                "mc_independent", with its variances only; "quadrature", two classes by Gauss-Hermite
                quadrature; "probit" and "bridge" (Laplace bridge), closed forms. "weights": draws of
                all weights and a forward pass for each, without linearisation, which is known to
                underfit (Immer et al.).
            n_samples: draws; of logits, an even number comes in pairs mean + e, mean - e.
            seed: of the draws.
            row0: number of the first example, for data in several batches: the draws of an example
                then do not depend on how the data is batched.

        Raises:
            ValueError: method unknown, not fitted, or the batch does not fit.
        """
        if method not in METHODS:
            raise ValueError(
                f"Laplace.predict: method must be one of {METHODS}, got {method!r}; choose one"
            )
        if n_samples < 1:
            raise ValueError(f"Laplace.predict: n_samples must be at least 1, got {n_samples}")
        if method == "weights":
            return drawn_prediction(
                self._reader, self.sampled, self._prepare(batch), n_samples, seed
            )
        mean, cov = self.logits(batch)
        return from_logits(mean, cov, method, n_samples, seed, row0)

    def _prepare(self, batch: Any) -> Any:
        """The batch on the model's device, where it has examples."""
        if is_empty(batch):
            raise ValueError("Laplace: a batch must have at least one example, got an empty one")
        return self._reader.prepare(batch)

    def _linearised(self, batch: Any, deltas: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Logits and their covariance for several prior precisions, in one pass."""
        collect = Contraction(self._sites, self._fitted(), deltas)
        found = collect.linearised(self._reader, batch, self.jacobian)
        if found is None:
            self.jacobian = "repeat"
            warnings.warn(
                "Laplace: the model checkpoints with use_reentrant=True, which cannot be vectorised: "
                "predictions take jacobian='repeat' from now on, C copies of each batch; use "
                "use_reentrant=False to have 'vmap'",
                stacklevel=4,
            )
            return self._linearised(batch, deltas)
        return found

    # --- samples of the weights ----------------------------------------------------------------

    def sample(self, seed: int = 0, index: int = 0) -> dict[str, Tensor]:
        """One draw of all weights from the posterior, by layer name, in the weights' shapes.

            W = W_MAP + (E - Q (D . (Q^T E U)) U^T) / sqrt(delta),  D = 1 - sqrt(delta / (mu nu + delta))

        with E standard normal: the symmetric square root of the posterior covariance. It depends on
        (seed, index), the layer's name and nothing else.

        Raises:
            ValueError: not fitted.
        """
        blocks = self._fitted()
        delta = self._prior_precision.expand(len(self.layers))
        draws = {}
        for layer, block, d in zip(self.layers, blocks, delta.tolist(), strict=True):
            key = random.fold_in(random.key(seed, layer.weight.device), index)
            e = random.normal(key, layer.shape, stream=random.layer_stream(layer.name))
            noise = block.deviation(e, d)
            mean = layer.weight.detach()
            draws[layer.name] = (mean + noise.reshape(mean.shape)).to(mean.dtype)
        return draws

    @contextlib.contextmanager
    def sampled(self, seed: int = 0, index: int = 0) -> Iterator[None]:
        """Context in which the model has a draw of the weights; afterwards the trained ones again.

        Raises:
            ValueError: not fitted.
        """
        draws = self.sample(seed, index)
        kept = [layer.weight.detach().clone() for layer in self.layers]
        try:
            with torch.no_grad():
                for layer in self.layers:
                    layer.weight.copy_(draws[layer.name])
            yield
        finally:
            with torch.no_grad():
                for layer, value in zip(self.layers, kept, strict=True):
                    layer.weight.copy_(value)
            self._versions = _versions(self._trained)

    # --- state ---------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        """The posterior as a flat dictionary of tensors, ready for safetensors.

        It has a digest of the weights that it was fitted to, not the weights.

        Raises:
            ValueError: not fitted, or the weights have changed since.
        """
        blocks = self._fitted()
        state: dict[str, Tensor] = {
            "prior_precision": self._prior_precision.clone(),
            "n_examples": torch.tensor(self.n_examples),
            "log_likelihood": torch.tensor(
                math.nan if self.log_likelihood is None else self.log_likelihood,
                dtype=torch.float64,
            ),
            "digest": torch.tensor(list(self._digest), dtype=torch.uint8),
        }
        for layer, block in zip(self.layers, blocks, strict=True):
            for kind, field in STATE.items():
                state[f"{layer.name}.{kind}"] = getattr(block, field).contiguous()
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take a posterior from `state_dict`, of the same layers of the same trained model.

        Raises:
            ValueError: layers or shapes do not fit, or the weights are not those of `fit`.
        """
        wanted = {f"{layer.name}.{kind}" for layer in self.layers for kind in STATE}
        wanted |= {"prior_precision", "n_examples", "log_likelihood", "digest"}
        if wanted != set(state):
            odd = sorted(wanted ^ set(state))
            raise ValueError(
                f"Laplace.load_state_dict: state must have the entries of these layers, got "
                f"{len(odd)} that are missing or unknown, such as {odd[0]!r}; make the same layers"
            )
        digest = bytes(state["digest"].tolist())
        if digest != _digest(self._trained):
            raise ValueError(
                "Laplace.load_state_dict: weights must be those that the posterior was fitted to, got "
                "others (the model was trained again, or is another one); call fit"
            )
        blocks = [
            Block.load(layer, *(state[f"{layer.name}.{kind}"] for kind in STATE))
            for layer in self.layers
        ]
        self.prior_precision = state["prior_precision"]  # type: ignore[assignment]
        self._blocks = blocks
        self._digest, self._versions = digest, _versions(self._trained)
        self.n_examples = int(state["n_examples"])
        value = float(state["log_likelihood"])
        self.log_likelihood = None if math.isnan(value) else value
