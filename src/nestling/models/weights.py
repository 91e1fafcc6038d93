"""Weights into a module."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nestling.errors import StorageError


@torch.no_grad()
def restore(module: nn.Module, tensors: dict[str, Tensor], what: str) -> None:
    """Copy ``tensors`` into the module's own, whose layout stays. Raises StorageError where names or shapes differ."""
    own = module.state_dict()
    if own.keys() != tensors.keys():
        raise StorageError(
            f"{what} does not fit this model: {sorted(own.keys() ^ tensors.keys())[:3]} is in only one of them; "
            "was it made by another backbone, taxonomy or recipe?"
        )
    for name, tensor in tensors.items():
        if own[name].shape != tensor.shape:
            raise StorageError(
                f"{what} does not fit this model: {name} has shape {tuple(tensor.shape)}, "
                f"expected {tuple(own[name].shape)}"
            )
        own[name].copy_(tensor)
