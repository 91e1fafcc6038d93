"""Devices, ranks and precision: the one file that knows them."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from nestling import collective
from nestling.data.stream import choose_workers
from nestling.errors import LostError, UsageError, unknown

DEVICES = ("auto", "cpu", "cuda", "mps")
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def cpu_has_bf16() -> bool:
    """Whether the processor multiplies bfloat16 in hardware (AVX512-BF16 or AMX); else bf16 is about twice as slow."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return any(flag in flags for flag in ("avx512_bf16", "amx_bf16"))


@contextmanager
def processes(device: str) -> Iterator[None]:
    """Inside the block this process trains with the others that ``torchrun`` started, if it did.

    Raises LostError where another of them has ended; torchrun then ends the rest.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or collective.is_distributed():
        yield
        return
    on_gpu = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # The others wait for rank 0 while it decodes, clusters or writes.
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timedelta(hours=12))
    try:
        yield
    except RuntimeError as error:
        if "gloo" in str(error) or isinstance(error, dist.DistError):
            raise LostError(f"rank {dist.get_rank()} has lost another process of this run") from error
        raise
    finally:
        dist.destroy_process_group()


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside the block torch's global generator starts from ``seed``; the caller's state comes back afterwards."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.default_generator.manual_seed(seed)
        yield


@dataclass(frozen=True)
class Runtime:
    """Where and how precisely a run computes; ``reasons`` say why."""

    device: torch.device
    precision: str
    reasons: dict[str, str]
    workers: int = 0
    """Processes that decode pictures ahead, where these are not in memory."""
    compiled: bool = False
    """Networks are compiled for training."""

    @staticmethod
    def choose(
        device: str = "auto", precision: str = "auto", kept: str | None = None, workers: int | None = None
    ) -> Runtime:
        """Resolve ``auto``. ``kept`` is the precision that the run began with, which a resume keeps on any machine."""
        if device not in DEVICES:
            raise unknown("device", device, DEVICES)
        if precision not in PRECISIONS:
            raise unknown("precision", precision, PRECISIONS)
        reasons = {"device": "as given"}
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
            reasons["device"] = "a CUDA device is there" if device == "cuda" else "no CUDA device is there"
        elif device == "cuda" and not torch.cuda.is_available():
            raise UsageError("device 'cuda' is not available here: use --device cpu, or a build of torch with CUDA")
        elif device == "mps" and not torch.backends.mps.is_available():
            raise UsageError("device 'mps' is not available here: use --device cpu")
        if device == "cuda" and collective.is_distributed():
            device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        reasons["precision"] = "as given"
        if kept is not None and precision not in ("auto", kept):
            raise UsageError(
                f"this run was begun with precision {kept}, and {precision} is asked for now: choose another --out, "
                "or leave the precision as it was"
            )
        if kept is not None:
            slow = kept == "bf16" and device == "cpu" and not cpu_has_bf16()
            precision = kept
            reasons["precision"] = "as the run began" + (
                ", though this processor has no bf16 instructions and is slower for it" if slow else ""
            )
        elif precision == "auto":
            precision, reasons["precision"] = auto_precision(device)
        if precision == "fp16" and device == "cpu":
            raise UsageError("precision fp16 needs a GPU: use --precision bf16 or fp32")
        workers, reasons["workers"] = choose_workers(workers)
        return Runtime(torch.device(device), precision, reasons, workers)

    def autocast(self) -> AbstractContextManager[Any]:
        """The context that a forward pass runs in."""
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=DTYPES[self.precision])

    def seed(self, value: int) -> None:
        """Start the generator of this device anew: what dropout and random terms draw from."""
        # torch.manual_seed also queues a call, stack and all, for a CUDA not yet initialised: a third of a small step.
        torch.default_generator.manual_seed(value)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(value)

    def prepare(self, module: nn.Module) -> nn.Module:
        """Move to the device, convolutions in channels_last (the fast layout on CPU and GPU alike)."""
        return module.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def compile(self, model: nn.Module) -> Callable[..., Any]:
        """What calls the model in training: itself, or its compiled form, which shares its weights."""
        return torch.compile(model, dynamic=False) if self.compiled else model

    def wrap(self, module: nn.Module) -> nn.Module:
        """Average gradients over the processes, where there are several and something is trained."""
        if not collective.is_distributed() or not any(p.requires_grad for p in module.parameters()):
            return module
        # Buffers are broadcast by the engine, before every evaluation and checkpoint. torch 2.13 renamed the option.
        parallel = nn.parallel.DistributedDataParallel
        renamed = "forward_sync_buffers" in inspect.signature(parallel).parameters
        kept: dict[str, Any] = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}
        return parallel(module, **kept)


def auto_precision(device: str) -> tuple[str, str]:
    """What ``auto`` stands for on this device, and the reason."""
    if device.startswith("cuda"):
        return (
            ("bf16", "the GPU multiplies bf16 fastest")
            if torch.cuda.is_bf16_supported()
            else ("fp32", "this GPU has no bf16")
        )
    if device == "cpu" and cpu_has_bf16():
        return "bf16", "this processor has bf16 instructions"
    return (
        "fp32",
        "without bf16 instructions bf16 is about twice as slow"
        if device == "cpu"
        else "the safe choice on this device",
    )
