"""What a contract table must hold a row for: the classes that nestling defines."""

from __future__ import annotations

import importlib
import inspect
import pkgutil

import nestling


def classes_of(package: str) -> list[type]:
    """Every class defined in ``nestling.<package>`` and below it, abstract ones included."""
    root = importlib.import_module(f"{nestling.__name__}.{package}")
    names = [root.__name__]
    if hasattr(root, "__path__"):
        names += [module.name for module in pkgutil.walk_packages(root.__path__, root.__name__ + ".")]
    return [
        value
        for name in names
        for value in vars(importlib.import_module(name)).values()
        if inspect.isclass(value) and value.__module__ == name
    ]


def final_subclasses(package: str, base: type) -> set[type]:
    """The subclasses of ``base`` that objects can be made of: those that no other class of the package refines."""
    found = [kind for kind in classes_of(package) if issubclass(kind, base) and not inspect.isabstract(kind)]
    return {kind for kind in found if kind is not base and not any(kind in other.__bases__ for other in found)}
