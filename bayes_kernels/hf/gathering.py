"""Tensors and messages of all processes, exchanged as tensors: nothing goes through pickle."""

from __future__ import annotations

from collections.abc import Mapping

import safetensors.torch
import torch
from torch import Tensor, nn


def gather_tensors(tensors: Mapping[str, Tensor], model: nn.Module) -> list[dict[str, Tensor]]:
    """The named tensors of each process of the default group, on the CPU, by rank.

    Names, dtypes and shapes may differ from process to process. Each process's tensors travel as bytes in the
    format of safetensors: first the numbers of bytes, then the bytes, padded to the largest number.

    Args:
        tensors: those of this process, on any device.
        model: whose device is used where the group does not work on the CPU, as with NCCL alone.

    Cost: two collectives; processes times the largest number of bytes, on the device of the group.
    """
    # Copies: safetensors refuses tensors that share memory, as entropies of one set of weights do.
    plain = {name: t.detach().cpu().clone().contiguous() for name, t in tensors.items()}
    device = _device(torch.distributed.get_backend_config(), model)
    own = torch.frombuffer(bytearray(safetensors.torch.save(plain)), dtype=torch.uint8)
    sizes = _all(torch.tensor([len(own)]), device)
    lengths = [int(size) for size in sizes]
    padded = torch.zeros(max(lengths), dtype=torch.uint8)
    padded[: len(own)] = own
    found = []
    for length, part in zip(lengths, _all(padded, device), strict=True):
        found.append(safetensors.torch.load(part[:length].cpu().numpy().tobytes()))
    return found


def gather_texts(text: str | None, model: nn.Module) -> list[str | None]:
    """A message of each process, or None, by rank; arguments as of `gather_tensors`."""
    return [text_of(found) for found in gather_tensors(text_tensors(text), model)]


def text_tensors(text: str | None) -> dict[str, Tensor]:
    """A message as tensors to gather; none for None."""
    if text is None:
        return {}
    data = text.encode("utf-8", "backslashreplace")
    return {_TEXT: torch.tensor(list(data), dtype=torch.uint8)}


def text_of(tensors: Mapping[str, Tensor]) -> str | None:
    """The message that `text_tensors` has put into these; None where there is none."""
    if _TEXT not in tensors:
        return None
    return bytes(tensors[_TEXT].tolist()).decode("utf-8")


_TEXT = "text"


def _all(own: Tensor, device: torch.device) -> list[Tensor]:
    own = own.to(device)
    found = [torch.empty_like(own) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(found, own)
    return found


def _device(backends: str, model: nn.Module) -> torch.device:
    """Where collectives of a group take tensors.

    Args:
        backends: such as "cpu:gloo,cuda:nccl".
        model: its device is taken where it is one of these.
    """
    types = [pair.partition(":")[0] for pair in backends.split(",")]
    if "cpu" in types:
        return torch.device("cpu")
    parameter = next(model.parameters(), None)
    if parameter is not None and parameter.device.type in types:
        return parameter.device
    return torch.device(types[0], torch.accelerator.current_device_index())
