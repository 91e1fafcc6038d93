"""Weights into a module, and new shapes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from nestling.errors import StorageError


def weights_hash(module: nn.Module) -> str:
    """By which weights, and what was computed from them, are known again."""
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in module.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


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


@torch.no_grad()
def reshape(module: nn.Module, shapes: Mapping[str, Sequence[int]]) -> None:
    """Give weights and buffers these shapes, and layers the widths that go with them: how a pruned network comes back.

    Where a shape changes, the numbers are undefined until they are restored. Names that the module lacks are skipped.
    """
    own = module.state_dict()
    for name, shape in shapes.items():
        if name not in own or own[name].shape == tuple(shape):
            continue
        path, _, leaf = name.rpartition(".")
        owner = module.get_submodule(path)
        tensor = own[name].new_empty(tuple(shape))
        if leaf in owner._parameters:
            owner.register_parameter(leaf, nn.Parameter(tensor, getattr(owner, leaf).requires_grad))
        else:
            owner.register_buffer(leaf, tensor)
        match owner:
            case nn.Conv2d() if leaf == "weight":
                owner.out_channels, owner.in_channels = shape[0], shape[1] * owner.groups
            case nn.Linear() if leaf == "weight":
                owner.out_features, owner.in_features = shape
            case nn.BatchNorm2d() | nn.BatchNorm1d() if leaf == "weight":
                owner.num_features = shape[0]
