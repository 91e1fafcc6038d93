"""Seeds as a pure function of where they are used: ``derive(seed, "augment", stage, epoch)``.

Nothing in nestling advances a shared random state, so a run resumed in the middle of an epoch
draws what the unbroken run would have drawn.
"""

from __future__ import annotations

from hashlib import blake2b


def derive(seed: int, *parts: object) -> int:
    """A 63-bit seed for one use, from the run's seed and the names and numbers that identify the use."""
    text = "\x1f".join([str(int(seed)), *map(str, parts)])
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little") >> 1
