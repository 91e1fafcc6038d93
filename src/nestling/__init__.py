"""Nestling: train from labels of any granularity, and answer at the granularity that the model can vouch for.

Taxonomies and data:   Taxonomy, LabelledData, load_data
Models and training:   build_model, fit, methods, functional
Trained models:        from_pretrained
Errors:                errors

Nothing heavy is imported before it is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from nestling import errors as errors
    from nestling import functional as functional
    from nestling import methods as methods
    from nestling.bundle import from_pretrained as from_pretrained
    from nestling.data.dataset import LabelledData as LabelledData
    from nestling.data.sources import load_data as load_data
    from nestling.engine.fit import fit as fit
    from nestling.models.build import build_model as build_model
    from nestling.taxonomy import Taxonomy as Taxonomy

_HOME = {
    "Taxonomy": "nestling.taxonomy", "LabelledData": "nestling.data.dataset", "load_data": "nestling.data.sources",
    "build_model": "nestling.models.build", "fit": "nestling.engine.fit", "from_pretrained": "nestling.bundle",
}  # fmt: skip
_MODULES = ("errors", "functional", "methods")
__all__ = [
    "LabelledData", "Taxonomy", "__version__", "build_model", "errors", "fit", "from_pretrained", "functional",
    "load_data", "methods",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"nestling.{name}")
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'nestling' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
