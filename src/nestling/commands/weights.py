"""``--weights FILE.safetensors``: a backbone that starts from weights made elsewhere, such as those of ImageNet."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from nestling.errors import StorageError, UsageError, listed
from nestling.models.model import Model
from nestling.models.nested import NestedModel
from nestling.models.search import SearchModel

MAX_BYTES = 8 << 30


def load_weights(path: str, model: Model) -> tuple[str, ...]:
    """Copy the file's tensors into the backbone of ``model``; what the file has beside them, by name.

    Nothing is copied on the meta device, where a plan is made, but everything is checked. The tensors go by the names
    of the backbone, or of timm's model in it. Raises UsageError where a weight is missing or has another shape.
    """
    if not isinstance(model, NestedModel | SearchModel):
        raise UsageError(f"--weights fills a backbone of stages, which {model.config['method']} has not")
    given = read_weights(path)
    own = model.backbone.state_dict()
    name = model.config["backbone"]
    missing = [key for key in own if source_of(key, given) is None and not key.endswith("num_batches_tracked")]
    if missing:
        raise UsageError(
            f"{path} lacks {len(missing)} of the {len(own)} weights of the backbone {name!r}, such as {missing[0]!r}; "
            f"it has {listed(sorted(given), 3)}: were they made by another --backbone?"
        )
    used = set()
    for key, tensor in own.items():
        source = source_of(key, given)
        if source is None:
            continue
        used.add(source)
        if given[source].shape != tensor.shape:
            raise UsageError(
                f"{path}: {source} has the shape {list(given[source].shape)}, and the backbone {name!r} for images of "
                f"{'x'.join(map(str, model.config['input_shape']))} needs {list(tensor.shape)}"
            )
        if not tensor.is_meta:
            tensor.copy_(given[source])
    return tuple(sorted(given.keys() - used))


def source_of(key: str, given: dict[str, Tensor]) -> str | None:
    """The file's name of a weight: the backbone's own, or timm's, whose model the backbone holds."""
    return next((name for name in (key, key.removeprefix("model."), f"backbone.{key}") if name in given), None)


def read_weights(path: str) -> dict[str, Tensor]:
    """The tensors of a file. Raises UsageError where there is none, StorageError where it is damaged."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not Path(path).is_file():
        raise UsageError(f"--weights {path}: there is no such file; give the safetensors file of a backbone")
    if Path(path).stat().st_size > MAX_BYTES:
        raise StorageError(f"--weights {path}: larger than {MAX_BYTES >> 30} GiB: no backbone is")
    try:
        # On the CPU also where a plan is made on the meta device.
        with torch.device("cpu"):
            tensors = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise StorageError(f"--weights {path}: damaged, or no safetensors file: {reason:.200}") from error
    broken = next((name for name, t in tensors.items() if t.is_floating_point() and not t.isfinite().all()), None)
    if broken is not None:
        raise StorageError(f"--weights {path}: {broken} is not finite")
    return tensors
