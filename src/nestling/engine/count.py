"""The bytes of tensors that a step allocates, and that it saves for its backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn


def allocated(step: Callable[[], object], device: torch.device) -> int:
    """The most bytes of tensors that ``step`` has had allocated at one moment, beside those that were there before."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    events = (e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]")
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()  # pyright: ignore[reportAttributeAccessIssue]
        most = max(most, now)
    return most


class Saved:
    """Counts the memory of what is saved for a backward pass, each storage once; the weights' own is not counted."""

    def __init__(self, own: Iterable[Tensor]) -> None:
        self.seen = {tensor.untyped_storage().data_ptr() for tensor in own}
        self.bytes = 0

    def pack(self, tensor: Tensor) -> Tensor:
        """Called for every tensor that is saved."""
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.seen:
            self.seen.add(storage.data_ptr())
            self.bytes += storage.nbytes()
        # A reference to the tensor itself would be a cycle.
        return tensor.detach()


def tensors_of(*modules: nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers."""
    for module in modules:
        yield from module.parameters()
        yield from module.buffers()
