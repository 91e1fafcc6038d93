"""Sums, gathers and broadcasts over the processes of ``torchrun``; on one process each is the identity."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def is_distributed() -> bool:
    """Whether this process is one of several."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """The number of this process, 0 for the first."""
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if is_distributed() else 1


@torch.no_grad()
def all_sum(value: Tensor) -> Tensor:
    """The sum of ``value`` over all processes, without gradient."""
    if not is_distributed():
        return value.detach()
    total = value.detach().clone()
    dist.all_reduce(total)
    return total


def all_max(values: list[int], device: torch.device) -> list[int]:
    """The largest of each value over all processes, which exchange them on ``device``."""
    if not is_distributed():
        return values
    largest = torch.tensor(values, device=device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest.tolist()


class _Gather(torch.autograd.Function):
    """The rows of all processes; a row's gradient is the sum of what they all make of it."""

    @staticmethod
    def forward(context: Any, rows: Tensor) -> Tensor:
        sizes = [torch.zeros(1, dtype=torch.int64, device=rows.device) for _ in range(world_size())]
        dist.all_gather(sizes, torch.tensor([len(rows)], device=rows.device))
        counts = [int(size) for size in sizes]
        padded = rows.new_zeros((max(counts), *rows.shape[1:]))
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        context.begin, context.count = sum(counts[: rank()]), len(rows)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(context: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return all_sum(gradient.contiguous())[context.begin : context.begin + context.count]


def gather(rows: Tensor) -> Tensor:
    """The rows (b, …) of all processes, in the order of their ranks, with gradient; terms on pairs of rows begin so."""
    return _Gather.apply(rows) if is_distributed() else rows  # type: ignore[no-any-return]


@torch.no_grad()
def broadcast_tensors(tensors: Iterable[Tensor]) -> None:
    """Overwrite every tensor, in place, with that of rank 0."""
    if is_distributed():
        for tensor in tensors:
            contiguous = tensor.contiguous()
            dist.broadcast(contiguous, src=0)
            tensor.copy_(contiguous)


def broadcast_object(value: T) -> T:
    """What rank 0 holds, on every process: how decisions are taken."""
    if not is_distributed():
        return value
    holder = [value]
    dist.broadcast_object_list(holder, src=0)
    return holder[0]


def of_first(read: Callable[[], T]) -> T:
    """What ``read`` gives on rank 0, on every process: files are read by one."""
    return broadcast_object(read()) if rank() == 0 else broadcast_object(None)  # type: ignore[return-value]
