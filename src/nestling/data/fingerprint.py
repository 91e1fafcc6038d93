"""A hash by which a run that goes on knows its data again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable

import torch

from nestling.data.dataset import LabelledData
from nestling.data.images import LazyImages


def fingerprint(parts: Iterable[LabelledData]) -> str:
    """Of taxonomy, labels and images; of images that are decoded on access only how many bytes each one has."""
    digest = hashlib.blake2b(digest_size=8)
    for data in parts:
        shape = None if isinstance(data.inputs, list) else data.image_shape
        digest.update(json.dumps([data.taxonomy.to_dict(), shape, len(data)]).encode())
        digest.update(data.labels.tobytes())
        if data.concepts is not None:
            digest.update(json.dumps([data.concepts.name, data.concepts.names]).encode())
            digest.update(data.concepts.codes.tobytes())
        if isinstance(data.inputs, torch.Tensor):
            digest.update(data.inputs.contiguous().numpy().data)
        elif isinstance(data.inputs, list):
            for text in data.inputs:
                digest.update(hashlib.blake2b(text.encode("utf-8", "backslashreplace")).digest())
        elif isinstance(data.inputs, LazyImages):
            digest.update(json.dumps(data.inputs.sizes()).encode())
    return digest.hexdigest()
