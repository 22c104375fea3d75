"""Lists of Stiefel matrices: whole ones, and ones whose rows or columns lie on several processes.

The formulas are those of `bayes_kernels.stiefel`, of tall matrices Z (n, r); wide parameters (r, n) are
their transpose. Every formula is a sum of Z and a direction D times r x r coefficients, which follow from
Z^T Z, Z^T D and D^T D. Of matrices that FSDP2 has sharded (DTensor) each process adds up these products
over its own rows in fp64, an all-reduce of r x r numbers adds up the processes, and each process multiplies
its rows: no process ever has a whole factor.

FSDP2 cuts every parameter along its first dimension: a tall one into rows, a wide one, as `lora_A.weight`,
into columns of Z. Columns are exchanged for rows by one all-to-all for each shape, which moves 1/W of a
process's part to each of the W processes, and back. `stiefel.shard_placement` cuts wide ones along their
long side, which spares that.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import functional


class Place(NamedTuple):
    """Where a tensor lies: its device, and the mesh and its dimension over which FSDP2 has cut it."""

    device: torch.device
    mesh: Any = None
    dimension: int | None = None


def placed(tensor: Tensor) -> Place:
    """Where a tensor lies.

    Raises:
        TypeError: it is cut in another way.
    """
    if not hasattr(tensor, "placements"):
        return Place(tensor.device)
    given: Any = tensor
    cut = [i for i, where in enumerate(given.placements) if not where.is_replicate()]
    plain = [i for i in cut if type(given.placements[i]).__name__ == "Shard"]
    if plain != cut or len(cut) > 1:
        raise TypeError(
            "stiefel: parameters must be whole or cut along one dimension of a mesh by FSDP2, got a "
            f"DTensor of placements {tuple(given.placements)}; leave tensor parallelism out of the adapter"
        )
    return Place(tensor.device, given.device_mesh, cut[0] if cut else None)


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, in the same memory."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor  # type: ignore[operator]


def matrices_of(parameters: Sequence[Tensor]) -> Whole | Sharded:
    """How the matrices of a list lie, which have one value of `placed`."""
    dimension = placed(parameters[0]).dimension
    return Whole(parameters) if dimension is None else Sharded(parameters, dimension)


class Whole:
    """Matrices that are whole on this process: the ops of `functional`, in launches for lists."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.groups = [*same_shapes(parameters)]

    def rows(self, tensors: list[Tensor]) -> list[Tensor]:
        """What the methods below take: the tensors."""
        return tensors

    def write_back(self, tensors: list[Tensor], rows: list[Tensor]) -> None:
        """Nothing: they are the tensors."""

    def project(self, points: Tensor, directions: Tensor) -> Tensor:
        """P_Z(D) = D - Z sym(Z^T D) for stacks of matrices (L, ., .)."""
        wide = _is_wide(points)
        inner = directions @ points.mT if wide else points.mT @ directions
        inner = (inner + inner.mT) * 0.5
        left, right = (inner, points) if wide else (points, inner)
        return torch.baddbmm(directions, left, right, alpha=-1)

    def mean_squares(self, stack: Tensor, indices: list[int]) -> Tensor:
        """The mean of the squares of each matrix of a stack (L, ., .), (L,)."""
        return stack.square().mean((1, 2))

    def landing_field(
        self, points: list[Tensor], grads: list[Tensor], penalty: float
    ) -> list[Tensor]:
        """The field at parameters with these gradients."""
        return _like(points, functional.landing_field(_tall(points), _tall(grads), penalty))

    def landing_step_(
        self, points: list[Tensor], grads: list[Tensor], lr: float | Tensor, penalty: float
    ) -> None:
        """Parameters less lr times the field."""
        talls = _tall(points)
        functional.landing_step_(talls, _tall(grads), lr, penalty)
        _write_back(points, talls)

    def step_(
        self, rows: list[Tensor], directions: list[Tensor], lr: float | Tensor, retraction: str
    ) -> None:
        """Retraction of Z - lr P_Z(D)."""
        talls = _tall(rows)
        functional.stiefel_step_(talls, _tall(directions), lr, retraction=retraction)
        _write_back(rows, talls)

    def polar_(self, points: list[Tensor]) -> None:
        """Each parameter becomes its polar factor."""
        talls = _tall(points)
        functional.polar_retract_(talls)
        _write_back(points, talls)

    def grams(self, points: list[Tensor]) -> list[Tensor]:
        """Z^T Z of each."""
        return functional.gram(_tall(points))


class Sharded:
    """Matrices that FSDP2 has cut over the processes of one dimension of a mesh.

    `tensors`, `points` and `grads` are this process's parts of the parameters, as they are cut; `rows`
    are its rows of the tall matrices, contiguous. All processes have to make the same calls. A matrix
    that has lost its rank (condition number above about 1e7), or that is not finite, keeps its value.
    """

    def __init__(self, parameters: Sequence[Any], dimension: int) -> None:
        mesh = parameters[0].device_mesh
        self._group = mesh.get_group(dimension)
        self._count, self._number = mesh.size(dimension), mesh.get_local_rank(dimension)
        self._shapes = [tuple(p.shape) for p in parameters]
        self._dims = [p.placements[dimension].dim for p in parameters]
        # Of whole shapes, so that all processes have the same groups and meet in the same collectives.
        keys = [
            (*one, p.dtype) for *one, p in zip(self._shapes, self._dims, parameters, strict=True)
        ]
        self.groups = [*groups(range(len(keys)), lambda i: keys[i])]

    def rows(self, tensors: list[Tensor]) -> list[Tensor]:
        """This process's rows of the tall matrices."""
        found = list(tensors)
        for indices in self.groups:
            wide, by_columns = self._cut(indices[0])
            if not by_columns:
                for i in indices:
                    found[i] = (tensors[i].mT if wide else tensors[i]).contiguous()
                continue
            n, r = self._tall_shape(indices[0])
            stack = torch.stack([tensors[i].mT if wide else tensors[i] for i in indices])
            mine = self._sizes(n)[self._number]
            shapes = [(len(indices), mine, columns) for columns in self._sizes(r)]
            stack = torch.cat(self._exchange(stack.split(self._sizes(n), 1), shapes), 2)
            for i, matrix in zip(indices, stack.unbind(), strict=True):
                found[i] = matrix
        return found

    def write_back(self, tensors: list[Tensor], rows: list[Tensor]) -> None:
        """Copy rows into the parts that they came from."""
        for indices in self.groups:
            wide, by_columns = self._cut(indices[0])
            parts = [rows[i] for i in indices]
            if by_columns:
                n, r = self._tall_shape(indices[0])
                mine = self._sizes(r)[self._number]
                shapes = [(len(indices), length, mine) for length in self._sizes(n)]
                stack = torch.stack(parts).split(self._sizes(r), 2)
                parts = [*torch.cat(self._exchange(stack, shapes), 1).unbind()]
            for i, part in zip(indices, parts, strict=True):
                if part.data_ptr() != tensors[i].data_ptr() or wide:
                    tensors[i].copy_(part.mT if wide else part)

    def project(self, points: Tensor, directions: Tensor) -> Tensor:
        """P_Z(D) = D - Z sym(Z^T D) for stacks of rows (L, n, r)."""
        z, d = points.double(), directions.double()
        (inner,) = self._sums(z.mT @ d)
        return (d - z @ _symmetric(inner)).to(directions.dtype)

    def mean_squares(self, stack: Tensor, indices: list[int]) -> Tensor:
        """The mean of the squares of each matrix of a stack of rows (L, n, r), (L,)."""
        n, r = self._tall_shape(indices[0])
        (sums,) = self._sums(stack.double().square().sum((1, 2)))
        return (sums / (n * r)).to(stack.dtype)

    def landing_field(
        self, points: list[Tensor], grads: list[Tensor], penalty: float
    ) -> list[Tensor]:
        """The field at parameters with these gradients."""
        rows, slopes = self.rows(points), self.rows(grads)
        fields = list(rows)
        for indices in self.groups:
            z, g = _stack64(rows, indices), _stack64(slopes, indices)
            gram, inner = self._sums(z.mT @ z, g.mT @ z)
            field = g @ gram - z @ inner + penalty * (z @ (gram - _eye(gram)))
            for i, one in zip(indices, field.to(rows[indices[0]].dtype).unbind(), strict=True):
                fields[i] = one
        found = [torch.empty_like(point) for point in points]
        self.write_back(found, fields)
        return found

    def landing_step_(
        self, points: list[Tensor], grads: list[Tensor], lr: float | Tensor, penalty: float
    ) -> None:
        """Parameters less lr times the field."""
        fields = self.landing_field(points, grads, penalty)
        torch._foreach_sub_(points, torch._foreach_mul(fields, lr))

    def step_(
        self, rows: list[Tensor], directions: list[Tensor], lr: float | Tensor, retraction: str
    ) -> None:
        """Retraction of Z - lr P_Z(D)."""
        for indices in self.groups:
            z, d = _stack64(rows, indices), _stack64(directions, indices)
            zz, zd, dd = self._sums(z.mT @ z, z.mT @ d, d.mT @ d)
            # Z - lr P_Z(D) = Z a - lr D, and its Gram matrix without another pass over the rows.
            a = _eye(zz) + lr * _symmetric(zd)
            cross = a.mT @ zd * lr
            gram = a.mT @ zz @ a - (cross + cross.mT) + lr * lr * dd
            self._retract_(rows, indices, retraction, gram, (z, a), (d, -lr * _eye(zz)))

    def polar_(self, points: list[Tensor]) -> None:
        """Each parameter becomes its polar factor."""
        rows = self.rows(points)
        for indices in self.groups:
            z = _stack64(rows, indices)
            (gram,) = self._sums(z.mT @ z)
            self._retract_(rows, indices, "polar", gram, (z, _eye(gram)))
        self.write_back(points, rows)

    def grams(self, points: list[Tensor]) -> list[Tensor]:
        """Z^T Z of each, on all processes."""
        rows = self.rows(points)
        found = list(rows)
        for indices in self.groups:
            z = _stack64(rows, indices)
            (gram,) = self._sums(z.mT @ z)
            for i, one in zip(indices, gram.to(rows[indices[0]].dtype).unbind(), strict=True):
                found[i] = one
        return found

    def _retract_(
        self,
        rows: list[Tensor],
        indices: list[int],
        retraction: str,
        gram: Tensor,
        *terms: tuple[Tensor, Tensor],
    ) -> None:
        """Rows become those of the factor of W, the sum of x c over terms (x, c), with Gram matrix `gram`.

        Twice, as in CholeskyQR2: the second Gram matrix, of what the first pass made, takes the errors
        of the first away, and no process has to decide by what it sees whether to meet the others again.
        """
        p, full = _orthonormaliser(gram, retraction)
        (z, a), *others = terms
        new = z @ torch.where(full, a @ p, _eye(gram))
        for x, c in others:
            new += x @ torch.where(full, c @ p, 0.0)
        p, again = _orthonormaliser(self._sums(new.mT @ new)[0], retraction)
        new = new @ torch.where(full & again, p, _eye(gram))
        for i, one in zip(indices, new.unbind(), strict=True):
            rows[i].copy_(one)

    def _sums(self, *parts: Tensor) -> list[Tensor]:
        """Sums over the processes, of all tensors in one all-reduce."""
        flat = torch.cat([part.reshape(-1) for part in parts])
        torch.distributed.all_reduce(flat, group=self._group)
        split = flat.split([part.numel() for part in parts])
        return [s.view(part.shape) for s, part in zip(split, parts, strict=True)]

    def _exchange(self, parts: Sequence[Tensor], shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
        """parts[j] goes to process j; of each process comes a tensor of its shape."""
        sizes = [torch.Size(shape).numel() for shape in shapes]
        sent = torch.cat([part.reshape(-1) for part in parts])
        found = sent.new_empty(sum(sizes))
        given = [part.numel() for part in parts]
        torch.distributed.all_to_all_single(found, sent, sizes, given, group=self._group)
        return [one.view(shape) for one, shape in zip(found.split(sizes), shapes, strict=True)]

    def _cut(self, i: int) -> tuple[bool, bool]:
        """Whether a parameter is the transpose of its tall matrix, and whether that is cut into columns."""
        wide = self._shapes[i][0] < self._shapes[i][1]
        return wide, self._dims[i] != int(wide)

    def _tall_shape(self, i: int) -> tuple[int, int]:
        return max(self._shapes[i]), min(self._shapes[i])

    def _sizes(self, length: int) -> list[int]:
        """How many of `length` rows each process has, as DTensor cuts them."""
        most = -(-length // self._count)
        return [max(0, min(most, length - i * most)) for i in range(self._count)]


def _orthonormaliser(gram: Tensor, retraction: str) -> tuple[Tensor, Tensor]:
    """p (L, r, r) for which W p is the Q or the polar factor of W, and (L, 1, 1): whether W has full rank.

    R^-1 for W^T W = R^T R, times the polar factor of R for that of W = Q R. The host waits for nothing.
    """
    finite = torch.isfinite(gram).all(-1, keepdim=True).all(-2, keepdim=True)
    eye = _eye(gram)
    gram = torch.where(finite, _symmetric(gram), eye)
    lower, info = torch.linalg.cholesky_ex(gram)
    pivots = lower.diagonal(dim1=-2, dim2=-1).square()
    sizes = gram.diagonal(dim1=-2, dim2=-1)
    # Pivots of columns of unit length: below that they are rounding errors of the Gram matrix.
    full = (info == 0) & (pivots > 1e-14 * sizes).all(-1)
    full = finite & full[:, None, None]
    upper = torch.where(full, lower.mT, eye)
    p = torch.linalg.solve_triangular(upper, eye.expand_as(upper), upper=True)
    if retraction == "polar":
        # The ops take fp64 on the CPU only; an error of fp32 here is one of the result's own rounding.
        turned = upper.to(
            torch.float64 if upper.device.type == "cpu" else torch.float32
        ).contiguous()
        matrices = [*turned.unbind()]
        functional.polar_retract_(matrices)
        p = p @ torch.stack(matrices).to(p.dtype)
    return p, full


def _eye(like: Tensor) -> Tensor:
    return torch.eye(like.shape[-1], dtype=like.dtype, device=like.device)


def _symmetric(matrix: Tensor) -> Tensor:
    return (matrix + matrix.mT) / 2


def _stack64(tensors: Sequence[Tensor], indices: list[int]) -> Tensor:
    """One shape's matrices in fp64: products of fp32 may be rounded to TF32 where a user allows it."""
    return torch.stack([tensors[i] for i in indices]).double()


# --- Shapes --------------------------------------------------------------------------------------
# The ops take contiguous tall matrices. Work on whole stacks of one shape makes the number of
# launches independent of the number of matrices.


def groups(items: Sequence[Any], key: Callable[[Any], Hashable]) -> Iterable[list[int]]:
    """Indices of the items with equal keys."""
    found: dict[Hashable, list[int]] = {}
    for i, item in enumerate(items):
        found.setdefault(key(item), []).append(i)
    return found.values()


def same_shapes(tensors: Sequence[Tensor]) -> Iterable[list[int]]:
    """Indices of the tensors of each shape and dtype."""
    return groups(tensors, lambda t: (t.shape, t.dtype))


def by_shape(
    function: Callable[[Tensor], Tensor],
    tensors: Sequence[Tensor],
    among: Iterable[list[int]] | None = None,
) -> list[Tensor]:
    """The tensors after a function of stacks, one for each shape or group; others as they are."""
    found = list(tensors)
    for indices in same_shapes(tensors) if among is None else among:
        results = function(torch.stack([tensors[i] for i in indices])).unbind()
        for i, result in zip(indices, results, strict=True):
            found[i] = result
    return found


def _is_wide(matrix: Tensor) -> bool:
    return matrix.shape[-2] < matrix.shape[-1]


def _tall(matrices: Sequence[Tensor]) -> list[Tensor]:
    """Contiguous matrices as they are, wide ones as transposed copies: two launches a shape."""
    return [m.contiguous() for m in _like(matrices, matrices)]


def _like(matrices: Sequence[Tensor], values: Sequence[Tensor]) -> list[Tensor]:
    """`values` with those that belong to wide matrices transposed: from tall to wide, and back."""
    wide = [indices for indices in same_shapes(matrices) if _is_wide(matrices[indices[0]])]
    return by_shape(lambda stack: stack.mT.contiguous(), values, wide)


def _write_back(matrices: Sequence[Tensor], talls: Sequence[Tensor]) -> None:
    """Copy changed tall matrices into those that are not themselves the tall ones."""
    changed = [
        (matrix, new)
        for matrix, tall, new in zip(matrices, talls, _like(matrices, talls), strict=True)
        if tall.data_ptr() != matrix.data_ptr()
    ]
    if changed:
        torch._foreach_copy_([m for m, _ in changed], [n for _, n in changed])
