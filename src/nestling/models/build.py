"""``build_model``: a model from names and numbers alone, so that a bundle can be built again without code in it."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from nestling.data.text import is_text
from nestling.errors import UsageError, unknown
from nestling.models.backbones import auto_backbone, build_backbone
from nestling.models.convnet import conv_trunk, doubling_widths, named_trunk
from nestling.models.layerwise import LayerwiseModel
from nestling.models.model import Model
from nestling.models.nested import NestedModel
from nestling.models.search import SearchModel
from nestling.taxonomy import Taxonomy


@dataclass(frozen=True, kw_only=True)
class NetworkOptions:
    """What a recipe may ask of its network."""

    skips: bool = True
    """Finer levels see earlier maps of the backbone."""
    norm: str = "batch"
    """'batch' or 'none'."""
    plain: bool = False
    """The head of a single softmax reads the backbone's last map, pooled: there is nothing between."""
    hidden: tuple[int, ...] = ()
    """Units of a hidden layer before each level's linear layer, coarse to fine; 0 is none."""
    dropout: float = 0.0
    """Share of a map that is dropped after each pooling of a 'conv:…' backbone."""


@dataclass(frozen=True, kw_only=True)
class LayerOptions:
    """What layerwise training asks of its network."""

    norm: str = "batch"
    """'batch' or 'none'."""
    k: int = 3
    """Hidden layers of the problem that trains a layer: the layer itself and k - 1 auxiliary convolutions."""
    width: int = 32
    """M: channels of the first layer, doubled at each downsampling."""
    aux_width: int | None = None
    """M~: channels of the first auxiliary classifier, doubled with the trunk; the first layer's by default."""
    num_blocks: int = 4
    """J, where the backbone is auto."""
    downsample_at: tuple[int, ...] = (2,)
    """Layers, from 0, that halve the map before they convolve it."""
    downsampling: str = "space-to-depth"
    """space-to-depth (invertible), strided, average or max."""
    halve_input: bool = False
    """An invertible downsampling of the image comes first: a quarter of the work per layer."""
    levels_at: tuple[str, ...] = ()
    """The level that each layer's classifier predicts; the finest by default."""
    ensemble: bool = True
    """A level's classifiers answer together, weighted 2^j; else the last one does."""


@dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """What search from coarse labels asks of its network."""

    norm: str = "batch"
    """'batch' or 'none'."""
    level: str | None = None
    """The level that is classified; the coarsest by default."""
    finest: bool = False
    """The finest level is classified, whatever its name."""
    cosine: bool = False
    """Features and weights are compared by direction, divided by the temperature."""
    temperature: float = 0.1
    """T of the cosine softmax."""
    learn_temperature: bool = False
    """T is a weight too, and starts there."""
    mlp: int | None = None
    """Features of the two-layer head that training sees in place of the pooled ones; none by default."""
    probe: bool = False
    """The classifier learns from the features without shaping them."""


AnyOptions = NetworkOptions | LayerOptions | SearchOptions
FLAT = ("end-to-end", "flat-marginal", "robust")
METHODS = ("nested", *FLAT, "layerwise", "coins")
OPTIONS: dict[str, type[AnyOptions]] = {"layerwise": LayerOptions, "coins": SearchOptions}


def build_model(
    taxonomy: Taxonomy,
    input_shape: tuple[int, int, int],
    backbone: str = "auto",
    method: str = "nested",
    options: AnyOptions | dict[str, Any] | None = None,
) -> Model:
    """The network of ``method`` for images of ``input_shape`` (channels, height, width), with fresh weights.

    ``options`` are the fields of ``NetworkOptions``, of ``LayerOptions`` for layerwise training, or of
    ``SearchOptions`` for coins. The weights come from torch's global generator: seed it before.
    Raises UsageError for an unknown method, backbone or option.
    """
    if method not in METHODS:
        raise unknown("method", method, METHODS)
    kind = OPTIONS.get(method, NetworkOptions)
    if isinstance(options, dict):
        for name in options:
            if name not in kind.__dataclass_fields__:
                raise unknown("network option", name, kind.__dataclass_fields__)
        plain: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in options.items()}
        options = kind(**plain)
    options = options or (NetworkOptions(plain=True) if method == "robust" else kind())
    if options.norm not in ("batch", "none"):
        raise unknown("norm", options.norm, ("batch", "none"))
    if len(input_shape) != 3 or min(input_shape) < 1:
        raise UsageError(f"input_shape must be (channels, height, width), got {input_shape!r}")
    config = {
        "method": method,
        "backbone": backbone,
        "input_shape": list(input_shape),
        "options": {f.name: value for f in fields(kind) if (value := getattr(options, f.name)) is not None},
        "rejection": False,
    }
    if is_text(input_shape) and method in ("layerwise", "robust"):
        raise UsageError(f"{method} takes pictures, and the inputs are texts: use nested, a flat baseline or coins")
    if isinstance(options, LayerOptions):
        return build_layers(taxonomy, input_shape, backbone, options, config)
    config["backbone"] = name = auto_backbone(input_shape) if backbone == "auto" else backbone
    network = build_backbone(
        name, input_shape, options.norm, 0.0 if isinstance(options, SearchOptions) else options.dropout
    )
    if isinstance(options, SearchOptions):
        return SearchModel(
            network,
            taxonomy,
            config,
            level=taxonomy.levels[-1] if options.finest else options.level or taxonomy.levels[0],
            cosine=options.cosine,
            temperature=options.temperature,
            learn_temperature=options.learn_temperature,
            mlp=options.mlp,
            probe=options.probe,
        )
    heads = taxonomy.levels[-1:] if method in FLAT else None
    return NestedModel(network, taxonomy, config, heads, options.skips, options.norm, options.plain, options.hidden)


def build_layers(
    taxonomy: Taxonomy, input_shape: tuple[int, int, int], backbone: str, options: LayerOptions, config: dict[str, Any]
) -> LayerwiseModel:
    """The network of layerwise training, whose classifiers are added as its layers are trained."""
    if options.k < 1:
        raise UsageError(f"k must be at least 1, got {options.k}: 1 trains each layer under a linear classifier")
    for name in ("width", "num_blocks"):
        if getattr(options, name) < 1:
            raise UsageError(f"{name} must be at least 1, got {getattr(options, name)}")
    if backbone == "auto":
        widths = doubling_widths(options.width, options.num_blocks, options.downsample_at)
        trunk = conv_trunk(
            input_shape, widths, options.downsample_at, options.downsampling, options.norm, options.halve_input
        )
    else:
        trunk = named_trunk(backbone, input_shape, options.norm)
    count = len(trunk.blocks)
    levels_at = options.levels_at or taxonomy.levels[-1:] * count
    if len(levels_at) != count:
        raise UsageError(f"levels_at names {len(levels_at)} levels for {count} layers: name one for each")
    for level in levels_at:
        taxonomy.level_index(level)
    aux_width = options.aux_width or trunk.channels[0]
    return LayerwiseModel(trunk, taxonomy, config, levels_at, options.k - 1, aux_width, options.norm, options.ensemble)


def rebuild(taxonomy: Taxonomy, config: dict[str, Any]) -> Model:
    """The model that ``config`` (the ``Model.config`` of a bundle) describes, with fresh weights."""
    model = build_model(taxonomy, tuple(config["input_shape"]), config["backbone"], config["method"], config["options"])
    if isinstance(model, LayerwiseModel):
        model.become(config["blocks"], config["heads"], config.get("matching", ()))
    if config["rejection"]:
        model.calibration.add_rejection()
        model.config["rejection"] = True
    return model
