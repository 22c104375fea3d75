"""Optimisers for matrices with orthonormal columns: landing, and Riemannian steps with retraction.

The Stiefel manifold St(n, r) holds the tall matrices Z (n, r) with Z^T Z = I. A parameter group with
`stiefel=True` holds such matrices; wide parameters (r, n), as `lora_A.weight`, have orthonormal rows
instead, and Z is their transpose below. All other groups are stepped by plain AdamW or SGD.

* **Landing** (`method="landing"`, PoLAR's published choice) never retracts. The gradient G is
  replaced by the landing field

      L(Z) = (G Z^T - Z G^T) Z + penalty Z (Z^T Z - I)

  whose first part moves along the manifold and whose second part, the gradient of
  penalty/4 ||Z^T Z - I||^2, leads back to it. `StiefelSGD` follows -L. `StiefelAdamW` takes L as if
  it were a gradient, as published: what Adam makes of it is no longer tangent, so that matrices stay
  near the manifold, not on it. Watch `orthogonality()`.
* **Retraction** (`method="polar"` or `"qr"`) keeps matrices on the manifold to rounding. Gradient
  and momentum are projected on the tangent space,

      P_Z(D) = D - Z sym(Z^T D)

  which carries the momentum from the last point to this one, and Z becomes the polar factor, or the
  Q factor with positive diagonal of R, of Z minus the step.

Cost: the number of launches of a step grows with the number of different shapes, not of matrices. No
n x n matrix is formed: the field is computed from r x r Gram matrices. Wide parameters are transposed
into a temporary of their size.

Parameters that FSDP2 has sharded stay where they are: processes add up r x r Gram matrices, in an
all-reduce or a few for each shape, and never gather a factor. All state is cut as its parameter is. FSDP2
cuts wide parameters along their short side, which costs an exchange of each process's part by
all-to-all in each step; `fully_shard(..., shard_placement_fn=shard_placement)` cuts them along the long one.

A step with a NaN or an infinity in any gradient is skipped: no parameter and no state changes, as with a
gradient scaler, and the first skip gives a warning. Otherwise the momentum would keep the NaN, and every
later retraction would fail. On a GPU the decision is taken on the device; the host never waits for it.

Sources: Ablin and Peyre, "Fast and Accurate Optimization on the Orthogonal Manifold without
Retraction", arXiv 2102.07432; Lion et al., "PoLAR: Polar-Decomposed Low-Rank Adapter Representation", arXiv
2506.03133, and its code; Becigneul and Ganea, "Riemannian Adaptive Optimization Methods", arXiv
1810.00760; Absil, Mahony and Sepulchre, "Optimization Algorithms on Matrix Manifolds", 2008.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.adamw import adamw
from torch.optim.optimizer import Optimizer, ParamsT
from torch.optim.sgd import sgd

from .matrices import Sharded, Whole, by_shape, groups, local, matrices_of, placed, same_shapes

METHODS = ("landing", "polar", "qr")
SECOND_MOMENTS = ("matrix", "element")
_HALF = (torch.float16, torch.bfloat16)


class _Part(NamedTuple):
    """The parameters of one group on one device, for one step."""

    group: dict[str, Any]
    parameters: list[Tensor]
    points: list[
        Tensor
    ]  # what is stepped: the parameters, or fp32 copies; this process's parts of them
    grads: list[Tensor]
    bad: Tensor | None  # 0-dim on a GPU: 1 where nothing may change; gradients are zeros then
    matrices: Whole | Sharded | None = None  # how those of a group with stiefel=True lie


class _StiefelOptimizer(Optimizer):
    """What both optimisers share: groups, fp32 copies of half-precision matrices, monitoring."""

    # Of the class, as copies of an optimiser are made without __init__.
    _skipped = 0
    _left_out: Tensor | None = None  # on a GPU: how many steps
    _seen: tuple[Tensor, Any] | None = None  # a copy of it on its way to the host
    _warned = False

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        # From `fused` PyTorch sees on loading that step counts are tensors on the device.
        super().__init__(params, {**defaults, "fused": True})

    @property
    def skipped(self) -> int:
        """Number of steps that were skipped, as a gradient was not finite. Synchronises with the device."""
        return self._skipped + (0 if self._left_out is None else int(self._left_out))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As the stock method; checks the options and the shapes of Stiefel matrices."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._check_group(group)
        except (ValueError, TypeError):
            self.param_groups.pop()
            raise

    def _check_group(self, group: dict[str, Any]) -> None:
        name = type(self).__name__
        _check_number(name, "lr", group["lr"])
        for option in ("weight_decay", "penalty"):
            _check_number(name, option, group[option])
        if group["method"] not in METHODS:
            raise ValueError(
                f"{name}: method must be one of {METHODS}, got {group['method']!r}; choose one"
            )
        if not group["stiefel"]:
            return
        for parameter in group["params"]:
            if parameter.dim() != 2:
                raise ValueError(
                    f"{name}: parameters of a group with stiefel=True must be matrices, got shape "
                    f"{tuple(parameter.shape)}; put it into another group"
                )
            if not parameter.is_floating_point():
                raise TypeError(
                    f"{name}: parameters must be floating-point, got {parameter.dtype}; convert it"
                )
            placed(parameter)

    def _not_finite(self, parameters: list[Tensor]) -> Tensor | None:
        """0-dim: 1 where any gradient has a NaN or an infinity, else 0; None where the host knows it is 0."""
        flags: list[Tensor] = []
        given = [p for p in parameters if p.grad is not None]
        for alike in groups(given, placed):
            device, mesh, dimension = placed(given[alike[0]])
            parts = [local(given[i].grad) for i in alike]  # type: ignore[arg-type]
            parts = [part for part in parts if part.numel()]
            found = []
            for indices in groups(parts, lambda g: g.dtype):
                # The largest magnitude of each is NaN where one of its numbers is.
                largest = torch.stack(torch._foreach_norm([parts[i] for i in indices], math.inf))
                found.append((~torch.isfinite(largest)).any())
            if dimension is not None:  # each process has seen its parts
                flag = (
                    torch.stack([torch.zeros((), dtype=torch.bool, device=device), *found])
                    .any()
                    .float()
                )
                torch.distributed.all_reduce(
                    flag, torch.distributed.ReduceOp.MAX, group=mesh.get_group(dimension)
                )
                found = [flag.bool()]
            flags += found
        if not flags:
            return None
        home = next((f.device for f in flags if self._decided_there(f)), flags[0].device)
        flag = torch.stack([f.to(home) for f in flags]).any()
        if self._decided_there(flag):
            return flag.float()
        return flag.float() if bool(flag) else None

    @staticmethod
    def _decided_there(flag: Tensor) -> bool:
        return flag.is_cuda

    def _tell(self, bad: Tensor) -> None:
        """Count a skipped step; warn at the first one, on a GPU when its count has reached the host."""
        if not self._decided_there(bad):
            self._skipped += 1
            self._warn()
            return
        if self._left_out is None:
            self._left_out = torch.zeros_like(bad)
        self._left_out += bad
        if self._warned or not torch.cuda.is_available():
            return
        if torch.cuda.is_current_stream_capturing():
            return
        if self._seen is None:
            count = torch.zeros((), pin_memory=True)
            count.copy_(self._left_out, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            self._seen = (count, event)
        elif self._seen[1].query():
            if float(self._seen[0]) > 0:
                self._warn()
            self._seen = None

    def _warn(self) -> None:
        if self._warned:
            return
        self._warned = True
        warnings.warn(
            f"{type(self).__name__}: gradients must be finite, got a NaN or an infinity; such steps "
            "are skipped, parameters and state stay as they are (warned once, `skipped` counts them). "
            "Lower the learning rate, clip gradients, or look for the layer that overflows.",
            stacklevel=6,  # above torch's wrappers of step
        )

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Callable[[], float | Tensor] | None = None
    ) -> float | Tensor | None:
        """One step with the gradients in `.grad`, which do not change.

        Nothing changes at all where a gradient is not finite: see the module's docstring.

        Args:
            closure: computes the loss anew, as for every optimiser of torch.

        Returns:
            What the closure returned, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        given = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        if any(p.grad.is_sparse for p in given):  # type: ignore[union-attr]
            raise TypeError(
                f"{type(self).__name__}: gradients must be dense, got a sparse one; leave "
                "sparse=True out of the embedding"
            )
        bad = self._not_finite(given)
        if bad is not None:
            self._tell(bad)
            if not self._decided_there(bad):
                return loss
        for group in self.param_groups:
            given = [p for p in group["params"] if p.grad is not None]
            step = self._step_stiefel if group["stiefel"] else self._step_euclidean
            for indices in groups(given, placed):
                alike = [given[i] for i in indices]
                flag = None if bad is None else bad.to(alike[0].device)
                points, grads = [local(p) for p in alike], [local(p.grad) for p in alike]
                step(_Part(group, alike, points, grads, flag))
                sharded = [p for p in alike if hasattr(p, "placements")]
                if sharded:
                    torch.autograd.graph.increment_version(sharded)
        return loss

    def _step_stiefel(self, part: _Part) -> None:
        points = [local(self._point(p)) for p in part.parameters]
        grads = [g.to(x.dtype).contiguous() for g, x in zip(part.grads, points, strict=True)]
        if part.bad is not None:  # zeros, so that nothing below is NaN but what is meant to be
            grads = by_shape(lambda stack: _unless(part.bad, stack, 0.0), grads)
        matrices = matrices_of(part.parameters)
        self._update(part._replace(points=points, grads=grads, matrices=matrices))
        halves = [(p, x) for p, x in zip(part.points, points, strict=True) if p.dtype != x.dtype]
        if halves:
            torch._foreach_copy_([p for p, _ in halves], [x for _, x in halves])

    def _point(self, parameter: Tensor) -> Tensor:
        """The matrix that is stepped: the parameter, or its fp32 copy where it has half precision."""
        if parameter.dtype not in _HALF:
            return parameter
        state = self.state[parameter]
        if "master" not in state:
            state["master"] = parameter.detach().float().contiguous()
        return state["master"]

    def _update(self, part: _Part) -> None:
        raise NotImplementedError

    def _step_euclidean(self, part: _Part) -> None:
        raise NotImplementedError

    def _matrices(self) -> list[Tensor]:
        return [
            self.state[p].get("master", p) if p in self.state else p
            for group in self.param_groups
            if group["stiefel"]
            for p in group["params"]
        ]

    def orthogonality(self) -> Tensor:
        """Largest ||Z^T Z - I||_F over all Stiefel matrices: see `orthogonality`."""
        return orthogonality(self._matrices())

    @torch.no_grad()
    def retract_(self) -> None:
        """Put every Stiefel matrix on the manifold, at its nearest point: the polar factor.

        Landing leaves matrices near the manifold; after this they are on it to rounding. One that has
        lost its rank has no nearest point and keeps its value, which `orthogonality` shows.
        """
        parameters = [p for g in self.param_groups if g["stiefel"] for p in g["params"]]
        points = [self._point(p) for p in parameters]
        for indices in groups(points, placed):
            alike = [points[i] for i in indices]
            matrices_of(alike).polar_([local(point) for point in alike])
        for parameter, point in zip(parameters, points, strict=True):
            if parameter is not point:
                parameter.copy_(point)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As the stock method; fp32 state of half-precision parameters stays fp32."""
        super().load_state_dict(state_dict)
        saved = itertools.chain.from_iterable(g["params"] for g in state_dict["param_groups"])
        own = itertools.chain.from_iterable(g["params"] for g in self.param_groups)
        for index, parameter in zip(saved, own, strict=True):
            if parameter.dtype not in _HALF:
                continue
            for name, value in state_dict["state"].get(index, {}).items():
                if isinstance(value, Tensor) and value.dtype == torch.float32:
                    self.state[parameter][name] = value.to(parameter.device)


class StiefelAdamW(_StiefelOptimizer):
    """AdamW whose groups with `stiefel=True` keep their matrices orthonormal.

    * "landing": the landing field L takes the place of the gradient (after whatever clipping came
      before) and AdamW's own update follows, elementwise, as PoLAR's code does it.
    * "polar", "qr": Riemannian Adam with momentum transported by projection. With
      g = P_Z(G), m = P_Z(beta1 m + (1 - beta1) g) and v = beta2 v + (1 - beta2) mean(g^2),

          Z <- retract(Z - lr m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps))

      v is one number for each matrix, as Becigneul and Ganea have it for manifolds without product
      structure: the step stays tangent, and rotations of the matrix change nothing. They take the
      squared norm; the mean over its n r elements is used here, so that a step has the root mean
      square lr for every shape, and the learning rate means what it means in AdamW.
      `second_moment="element"` keeps v for each element as AdamW does and projects the quotient.

    Weight decay acts on the other groups only: an orthonormal matrix has a fixed norm. All state is
    fp32 beside half-precision Stiefel matrices, which get an fp32 copy that is stepped instead.

    Args:
        params: parameters or groups; a group may set every option below.
        lr: learning rate; a 0-dim tensor can be changed without recompilation or new CUDA graphs.
        betas, eps, weight_decay: as in `torch.optim.AdamW`.
        stiefel: whether the group's matrices are to be orthonormal.
        method: "landing", "polar" or "qr".
        penalty: weight of the pull to the manifold, for landing. Published: 5e-3 (Llama-2-7B,
            commonsense) to 1 (GLUE).
        second_moment: "matrix" or "element", for retractions.

    Raises:
        ValueError, TypeError: an option is out of range, or a Stiefel parameter is no matrix.

    Example:
        groups = [{"params": [b, a], "stiefel": True}, {"params": [core]}]
        optimizer = StiefelAdamW(groups, lr=4e-3)
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        stiefel: bool = False,
        method: str = "landing",
        penalty: float = 5e-3,
        second_moment: str = "matrix",
    ) -> None:
        options = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "stiefel": stiefel,
            "method": method,
            "penalty": penalty,
            "second_moment": second_moment,
        }
        super().__init__(params, options)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        _check_number("StiefelAdamW", "eps", group["eps"])
        if not all(0.0 <= float(beta) < 1.0 for beta in group["betas"]):
            raise ValueError(f"StiefelAdamW: betas must be in [0, 1), got {group['betas']}")
        if group["second_moment"] not in SECOND_MOMENTS:
            raise ValueError(
                f"StiefelAdamW: second_moment must be one of {SECOND_MOMENTS}, got "
                f"{group['second_moment']!r}; choose one"
            )

    def _step_euclidean(self, part: _Part) -> None:
        self._adamw(part, part.group["weight_decay"])

    def _update(self, part: _Part) -> None:
        if part.group["method"] == "landing":
            assert part.matrices is not None
            field = part.matrices.landing_field(part.points, part.grads, part.group["penalty"])
            self._adamw(part._replace(grads=field), 0.0)
        else:
            self._riemannian_adam(part)

    def _adamw(self, part: _Part, weight_decay: float) -> None:
        """PyTorch's fused AdamW: one launch for all tensors; `found_inf` skips the step on the device."""
        group, points, grads, bad = part.group, part.points, part.grads, part.bad
        states = [self._state(p, x, True) for p, x in zip(part.parameters, points, strict=True)]
        beta1, beta2 = group["betas"]
        for indices in groups(points, lambda x: x.dtype):
            adamw(
                [points[i] for i in indices],
                [grads[i] for i in indices],
                [local(states[i]["exp_avg"]) for i in indices],
                [local(states[i]["exp_avg_sq"]) for i in indices],
                [],
                [states[i]["step"] for i in indices],
                fused=True,
                found_inf=bad,
                amsgrad=False,
                beta1=beta1,
                beta2=beta2,
                lr=group["lr"],
                weight_decay=weight_decay,
                eps=group["eps"],
                maximize=False,
            )

    def _state(self, parameter: Tensor, point: Tensor, by_element: bool) -> dict[str, Any]:
        state = self.state[parameter]
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=point.device)
            state["exp_avg"] = torch.zeros_like(parameter, dtype=point.dtype)
            state["exp_avg_sq"] = (
                torch.zeros_like(parameter, dtype=point.dtype)
                if by_element
                else point.new_zeros(())
            )
        return state

    def _riemannian_adam(self, part: _Part) -> None:
        group, bad, matrices = part.group, part.bad, part.matrices
        assert matrices is not None
        per_matrix = group["second_moment"] == "matrix"
        states = [
            self._state(p, x, not per_matrix)
            for p, x in zip(part.parameters, part.points, strict=True)
        ]
        steps = [state["step"] for state in states]
        if bad is None:
            torch._foreach_add_(steps, 1)
        else:
            torch._foreach_add_(steps, [1 - bad] * len(steps))
        beta1, beta2 = group["betas"]
        first = [local(state["exp_avg"]) for state in states]
        second = [local(state["exp_avg_sq"]) for state in states]
        points, grads, moments = (matrices.rows(one) for one in (part.points, part.grads, first))
        squares = second if per_matrix else matrices.rows(second)
        directions: list[Tensor] = [points[0]] * len(points)
        for indices in matrices.groups:
            z, g, m, v, t = (
                torch.stack([tensors[i] for i in indices])
                for tensors in (points, grads, moments, squares, steps)
            )
            g = matrices.project(z, g)
            m = _unless(bad, matrices.project(z, m.lerp(g, 1 - beta1)), m)
            square = matrices.mean_squares(g, indices) if per_matrix else g.square()
            v = _unless(bad, v.lerp(square, 1 - beta2), v)
            # Bias corrections stay on the device: no read of the step count.
            correction1 = (1 - beta1**t).to(z.dtype).view(-1, 1, 1)
            correction2 = (1 - beta2**t).to(z.dtype).view(-1, 1, 1)
            scale = (v.view(-1, 1, 1) if per_matrix else v) / correction2
            d = m / (correction1 * (scale.sqrt() + group["eps"]))
            torch._foreach_copy_([moments[i] for i in indices], list(m.unbind()))
            torch._foreach_copy_([squares[i] for i in indices], list(v.unbind()))
            for i, direction in zip(indices, d.unbind(), strict=True):
                directions[i] = direction
        matrices.write_back(first, moments)
        if not per_matrix:
            matrices.write_back(second, squares)
        _retracted_step(part, points, directions, group["lr"])


class StiefelSGD(_StiefelOptimizer):
    """SGD whose groups with `stiefel=True` keep their matrices orthonormal.

    * "landing": Z <- Z - lr b, b = momentum b + L(Z); without momentum one fused update in place.
      ||Z^T Z - I||_F stays below 1e-2 where lr penalty is about 0.1 and lr ||G||_F below 0.04.
    * "polar", "qr": Z <- retract(Z - lr b), b = P_Z(momentum b + P_Z(G)).

    Weight decay acts on the other groups only. Half-precision Stiefel matrices get an fp32 copy that
    is stepped instead.

    Args:
        params: parameters or groups; a group may set every option below.
        lr: learning rate, a number or a 0-dim tensor.
        momentum, weight_decay: as in `torch.optim.SGD`.
        stiefel: whether the group's matrices are to be orthonormal.
        method: "landing", "polar" or "qr".
        penalty: weight of the pull to the manifold, for landing.

    Raises:
        ValueError, TypeError: an option is out of range, or a Stiefel parameter is no matrix.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        *,
        stiefel: bool = False,
        method: str = "landing",
        penalty: float = 1.0,
    ) -> None:
        options = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "stiefel": stiefel,
            "method": method,
            "penalty": penalty,
        }
        super().__init__(params, options)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        _check_number("StiefelSGD", "momentum", group["momentum"])

    def _step_euclidean(self, part: _Part) -> None:
        group, points = part.group, part.points
        momentum = group["momentum"]
        buffers: list[Tensor | None] = [None] * len(points)
        if momentum:
            buffers = [*self._momenta(part)]
        sgd(
            points,
            part.grads,
            buffers,
            fused=True,
            found_inf=part.bad,
            weight_decay=group["weight_decay"],
            momentum=momentum,
            lr=group["lr"],
            dampening=0.0,
            nesterov=False,
            maximize=False,
        )

    def _update(self, part: _Part) -> None:
        group, points, grads, bad = part.group, part.points, part.grads, part.bad
        matrices = part.matrices
        assert matrices is not None
        momentum, lr, method = group["momentum"], group["lr"], group["method"]
        kept: Any = momentum  # of the buffers
        if bad is not None:
            kept = _unless(bad, torch.full_like(bad, momentum), 1.0)
            lr = lr if method != "landing" else lr * (1 - bad)
        if method == "landing" and not momentum:
            matrices.landing_step_(points, grads, lr, group["penalty"])
            return
        if method == "landing":
            buffers = self._momenta(part)
            torch._foreach_mul_(buffers, kept)
            fields = matrices.landing_field(points, grads, group["penalty"])
            if bad is not None:
                torch._foreach_mul_(fields, 1 - bad)
            torch._foreach_add_(buffers, fields)
            torch._foreach_sub_(points, torch._foreach_mul(buffers, lr))
            return
        rows = matrices.rows(points)
        if momentum:
            buffers = self._momenta(part)
            torch._foreach_mul_(buffers, kept)
            torch._foreach_add_(buffers, grads)
            directions = matrices.rows(buffers)
            for indices in matrices.groups:
                z, b = (torch.stack([t[i] for i in indices]) for t in (rows, directions))
                b = _unless(bad, matrices.project(z, b), b)
                torch._foreach_copy_([directions[i] for i in indices], list(b.unbind()))
            matrices.write_back(buffers, directions)
        else:
            directions = matrices.rows(grads)
        _retracted_step(part, rows, directions, lr)

    def _momenta(self, part: _Part) -> list[Tensor]:
        for parameter, point in zip(part.parameters, part.points, strict=True):
            state = self.state[parameter]
            if state.get("momentum_buffer") is None:
                state["momentum_buffer"] = torch.zeros_like(parameter, dtype=point.dtype)
        return [local(self.state[p]["momentum_buffer"]) for p in part.parameters]


def orthogonality(matrices: Iterable[Tensor]) -> Tensor:
    """Largest deviation from orthonormal columns (rows, for wide matrices): max ||Z^T Z - I||_F.

    Args:
        matrices: at least one matrix. Of shards of FSDP2 all processes have to give theirs.

    Returns:
        0-dim fp32 (fp64 for fp64 matrices) tensor on the device of the first; no synchronisation.

    Raises:
        ValueError: there is no matrix.
    """
    found: list[Tensor] = []
    with torch.no_grad():
        everything = [m.detach() for m in matrices]
        everything = [m.float() if m.dtype in _HALF else m for m in everything]
        for members in groups(everything, placed):
            alike = [everything[i] for i in members]
            grams = matrices_of(alike).grams([local(m) for m in alike])
            for indices in same_shapes(grams):
                gram = torch.stack([grams[i] for i in indices])
                gram.diagonal(dim1=1, dim2=2).sub_(1)
                found.append(torch.linalg.matrix_norm(gram).max())
    if not found:
        raise ValueError("orthogonality: matrices must have at least one matrix, got none")
    return torch.stack([value.to(found[0].device) for value in found]).max()


def shard_placement(parameter: Tensor) -> Any:
    """`shard_placement_fn` of `fully_shard` that cuts wide trainable matrices along their long side.

    `StiefelAdamW` and `StiefelSGD` then need no exchange of factors between processes. FSDP2 wants a
    long side that is a multiple of the number of processes; for other tensors its own choice holds.

    Example:
        fully_shard(layer, shard_placement_fn=shard_placement)
    """
    from torch.distributed.tensor import Shard

    if parameter.dim() != 2 or not parameter.requires_grad:
        return None
    rows, columns = parameter.shape
    fits = columns % torch.distributed.get_world_size() == 0
    return Shard(1) if rows < columns and fits else None


def _retracted_step(
    part: _Part, rows: list[Tensor], directions: list[Tensor], lr: float | Tensor
) -> None:
    """Retraction of rows - lr * directions, into the points."""
    matrices = part.matrices
    assert matrices is not None
    if part.bad is not None:  # matrices keep their values under a step that is not finite
        rate = lr if isinstance(lr, Tensor) else torch.full_like(part.bad, lr)
        lr = _unless(part.bad, rate, math.nan)
    matrices.step_(rows, directions, lr, part.group["method"])
    matrices.write_back(part.points, rows)


def _unless(bad: Tensor | None, new: Tensor, old: Tensor | float) -> Tensor:
    """`new`, or `old` where the flag is up."""
    return new if bad is None else torch.where(bad.bool(), old, new)


def _check_number(op: str, name: str, value: float | Tensor) -> None:
    if isinstance(value, Tensor):
        if value.dim() != 0:
            raise ValueError(
                f"{op}: {name} must be a number or a 0-dim tensor, got shape {tuple(value.shape)}"
            )
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise ValueError(f"{op}: {name} must not be negative, got {value!r}")
