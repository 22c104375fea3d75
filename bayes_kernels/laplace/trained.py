"""Which weights a posterior belongs to, and which processes share its data."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor


def processes(distributed: bool | None) -> tuple[int, int]:
    """Rank and number of the processes that share the data."""
    there = torch.distributed.is_available() and torch.distributed.is_initialized()
    if distributed and not there:
        raise ValueError(
            "Laplace.fit: distributed=True must have a process group, got none; call "
            "torch.distributed.init_process_group first"
        )
    if not there or distributed is False:
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def versions(tensors: Iterable[Tensor]) -> list[tuple[int, int]]:
    """Addresses and write counts of tensors: without cost, they show that values may have changed."""
    return [(t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors]


def digest(tensors: Iterable[Tensor]) -> bytes:
    """A hash of 16 bytes of the values of tensors, the same for bf16 values kept in fp32."""
    found = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        wide = torch.promote_types(tensor.dtype, torch.float32)
        values = tensor.detach().to("cpu", wide).contiguous()
        found.update(f"{wide} {tuple(values.shape)}".encode())
        found.update(values.reshape(-1).view(torch.uint8).numpy().data)
    return found.digest()
