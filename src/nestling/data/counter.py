"""Random numbers as a pure function of (key, row): what one row gets does not depend on the batch that it is in.

SplitMix64 (Steele, Lea and Flood, *Fast Splittable Pseudorandom Number Generators*, 2014) as a counter-based generator
in int64 tensors, whose products wrap as unsigned ones do.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nestling.errors import UsageError


def _signed(value: int) -> int:
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MIX_1 = _signed(0xBF58476D1CE4E5B9)
_MIX_2 = _signed(0x94D049BB133111EB)


def _mix(state: Tensor) -> Tensor:
    """SplitMix64's output function. Shifts of int64 bring in the sign, which the masks take away."""
    state = ((state >> 30) & (1 << 34) - 1).bitwise_xor_(state).mul_(_MIX_1)
    state = ((state >> 27) & (1 << 37) - 1).bitwise_xor_(state).mul_(_MIX_2)
    return ((state >> 31) & (1 << 33) - 1).bitwise_xor_(state)


def _bits(key: int, rows: Tensor, num: int) -> Tensor:
    """(b, num) int64: each row's stream, started from the hash of key and row."""
    if rows.ndim != 1 or rows.dtype != torch.int64:
        raise UsageError(f"expected rows (b,) int64, got {tuple(rows.shape)} {rows.dtype}")
    start = _mix(_mix(rows * _GOLDEN) + _signed(key * 0x9E3779B97F4A7C15 + 1))
    return _mix(start[:, None] + torch.arange(1, num + 1, device=rows.device) * _GOLDEN)


def uniform(key: int, rows: Tensor, num: int) -> Tensor:
    """(b, num) float32 in [0, 1), multiples of 2^-24, for rows (b,) int64; the first are the same for every ``num``."""
    return ((_bits(key, rows, num) >> 40) & (1 << 24) - 1).to(torch.float32).mul_(2.0**-24)


def normal(key: int, rows: Tensor, num: int) -> Tensor:
    """(b, num) float32, standard normal (Box-Muller), for rows (b,) int64; the first are the same for every ``num``."""
    bits = _bits(key, rows, (num + 1) // 2)
    # From 2^-24 to 1, since the logarithm of 0 is not finite.
    radius = (((bits >> 40) & (1 << 24) - 1) + 1).to(torch.float32).mul_(2.0**-24).log_().mul_(-2).sqrt_()
    angle = ((bits >> 16) & (1 << 24) - 1).to(torch.float32).mul_(2 * torch.pi * 2.0**-24)
    return torch.stack([radius * angle.cos(), radius * angle.sin()], dim=2).flatten(1)[:, :num]
