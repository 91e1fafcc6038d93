"""``build_model``: a model from names and numbers alone, so that a bundle can be built again without code in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nestling.errors import UsageError, unknown
from nestling.models.backbones import auto_backbone, build_backbone
from nestling.models.model import Model
from nestling.models.nested import NestedModel
from nestling.taxonomy import Taxonomy


@dataclass(frozen=True, kw_only=True)
class NetworkOptions:
    """What a recipe may ask of its network."""

    skips: bool = True
    """Finer levels see earlier maps of the backbone."""
    norm: str = "batch"
    """'batch' or 'none'."""


FLAT = ("end-to-end", "flat-marginal")
METHODS = ("nested", *FLAT)


def build_model(
    taxonomy: Taxonomy,
    input_shape: tuple[int, int, int],
    backbone: str = "auto",
    method: str = "nested",
    options: NetworkOptions | dict[str, Any] | None = None,
) -> Model:
    """The network of ``method`` for images of ``input_shape`` (channels, height, width), with fresh weights.

    ``options`` are the fields of ``NetworkOptions``. The weights come from torch's global generator: seed it before.
    Raises UsageError for an unknown method, backbone or option.
    """
    if method not in METHODS:
        raise unknown("method", method, METHODS)
    if isinstance(options, dict):
        for name in options:
            if name not in NetworkOptions.__dataclass_fields__:
                raise unknown("network option", name, NetworkOptions.__dataclass_fields__)
        options = NetworkOptions(**options)
    options = options or NetworkOptions()
    if options.norm not in ("batch", "none"):
        raise unknown("norm", options.norm, ("batch", "none"))
    if len(input_shape) != 3 or min(input_shape) < 1:
        raise UsageError(f"input_shape must be (channels, height, width), got {input_shape!r}")
    name = auto_backbone(input_shape) if backbone == "auto" else backbone
    config = {
        "method": method,
        "backbone": name,
        "input_shape": list(input_shape),
        "options": {"skips": options.skips, "norm": options.norm},
        "rejection": False,
    }
    network = build_backbone(name, input_shape, options.norm)
    heads = taxonomy.levels[-1:] if method in FLAT else None
    return NestedModel(network, taxonomy, config, heads, options.skips, options.norm)


def rebuild(taxonomy: Taxonomy, config: dict[str, Any]) -> Model:
    """The model that ``config`` (the ``Model.config`` of a bundle) describes, with fresh weights."""
    model = build_model(taxonomy, tuple(config["input_shape"]), config["backbone"], config["method"], config["options"])
    if config["rejection"]:
        model.calibration.add_rejection()
        model.config["rejection"] = True
    return model
