"""Settings: frozen dataclasses, TOML and ``field=value`` assignments.

Fields are hyper-parameters, options and TOML keys at once.
"""

from __future__ import annotations

import ast
import inspect
import json
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields, is_dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

from nestling.errors import StorageError, UsageError, unknown

T = TypeVar("T")

MOST = 1e300
"""Larger integers are no floats any more."""


def parse_assignments(assignments: Iterable[str]) -> dict[str, Any]:
    """``["epochs=30", "optimizer.lr=0.05"]`` to nested settings; the last assignment to a field wins.

    A value is a TOML value, else a bare string. Raises UsageError for what is no assignment.
    """
    settings: dict[str, Any] = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals or not name.strip():
            raise UsageError(f"cannot read the setting {assignment!r}: expected FIELD=VALUE, such as epochs=30")
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except (ValueError, RecursionError):
            value = text.strip()
        *outer, last = name.strip().split(".")
        inner = settings
        for key in outer:
            inner = inner.setdefault(key, {})
            if not isinstance(inner, dict):
                raise UsageError(f"the setting {name!r} is given both as a value and as a group")
        inner[last] = value
    return settings


def read_config(path: Path | str) -> dict[str, Any]:
    """A TOML file's settings. A run's recipe.toml serves as well: then its ``[given]`` table is what counts."""
    try:
        settings = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read the configuration {path}: {error.strerror}; check the path") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"the configuration {path} is not TOML: {error}") from error
    return settings.get("given", settings)


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with the settings of ``over`` in their place, table by table."""
    merged = dict(base)
    for name, value in over.items():
        inner = merged.get(name)
        merged[name] = merge(inner, value) if isinstance(inner, Mapping) and isinstance(value, Mapping) else value
    return merged


def apply(settings: T, changes: Mapping[str, Any], prefix: str = "") -> T:
    """A copy of a settings dataclass with ``changes``, checked against the types of its fields. Raises UsageError."""
    types_of = typing.get_type_hints(type(settings))
    names = [f.name for f in fields(settings)]  # type: ignore[arg-type]
    new = {}
    for name, value in changes.items():
        if name not in names:
            raise unknown("field", prefix + name, [prefix + n for n in names])
        current = getattr(settings, name)
        if is_dataclass(current):
            if not isinstance(value, Mapping):
                raise UsageError(
                    f"{prefix + name} is a group of fields: set for example {prefix + name}.{fields(current)[0].name}=…"
                )
            new[name] = apply(current, value, f"{prefix}{name}.")
        elif value == [] and typing.get_origin(types_of[name]) is tuple:
            # A list that may be nothing else may be empty.
            new[name] = ()
        else:
            new[name] = convert(prefix + name, value, types_of[name])
    return replace(settings, **new)  # type: ignore[type-var]


def convert(name: str, value: Any, kind: Any) -> Any:
    """``value`` as the type ``kind``, or a UsageError that says what was expected. 'none' stands for None."""
    options = typing.get_args(kind) if typing.get_origin(kind) in (types.UnionType, typing.Union) else (kind,)
    if value in (None, "none") and type(None) in options:
        return None
    for option in options:
        if typing.get_origin(option) is tuple:
            inner = typing.get_args(option)[0]
            if isinstance(value, list | tuple) and value:
                return tuple(convert(name, item, inner) for item in value)
        elif (option is bool and isinstance(value, bool)) or (option is str and isinstance(value, str)):
            return value
        elif option in (int, float) and isinstance(value, int | float) and not isinstance(value, bool):
            if (option is float and abs(value) < MOST) or isinstance(value, option):
                return option(value)
    raise UsageError(f"{name} must be {describe(kind)}, got {value!r}")


def describe(kind: Any) -> str:
    """A type in words, as help and errors give it."""
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        return " or ".join(describe(option) for option in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        inner = describe(typing.get_args(kind)[0])
        return "a list of texts" if inner == "text" else f"a list of {inner.split(' ', 1)[-1]}s"
    return {int: "an integer", float: "a number", bool: "true or false", str: "text", type(None): "none"}.get(
        kind, str(kind)
    )


def to_dict(settings: Any) -> dict[str, Any]:
    """Nested settings as plain values, the inverse of ``apply``; None becomes 'none', since TOML has no word for it."""
    result = {}
    for f in fields(settings):
        value = getattr(settings, f.name)
        result[f.name] = to_dict(value) if is_dataclass(value) else "none" if value is None else value
    return result


def field_help(kind: type, of: Any = None) -> list[tuple[str, str, Any, str]]:
    """For every field of a settings class, groups opened: dotted name, type in words, default, and its docstring.

    ``of``: settings of that class whose values are the defaults, where a group's own are changed by who holds it.
    """
    docs: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if is_dataclass(base):
            docs.update(_field_docstrings(base))
    types_of, rows = typing.get_type_hints(kind), []
    for f in fields(kind):
        default = f.default_factory() if f.default_factory is not MISSING else f.default
        if of is not None:
            default = getattr(of, f.name)
        if is_dataclass(types_of[f.name]):
            rows += [(f"{f.name}.{name}", *rest) for name, *rest in field_help(types_of[f.name], default)]
        else:
            rows.append((f.name, describe(types_of[f.name]), default, docs.get(f.name, "")))
    return rows


def _field_docstrings(kind: type) -> dict[str, str]:
    body = ast.parse(inspect.cleandoc(inspect.getsource(kind))).body[0].body  # type: ignore[attr-defined]
    return {
        node.target.id: inspect.cleandoc(doc.value.value)
        for node, doc in pairwise(body)
        if isinstance(node, ast.AnnAssign)
        and isinstance(node.target, ast.Name)
        and isinstance(doc, ast.Expr)
        and isinstance(doc.value, ast.Constant)
        and isinstance(doc.value.value, str)
    }


def to_toml(tables: Mapping[str, Any]) -> str:
    """Settings as TOML: values first, then tables, any depth; None is left out."""
    return "\n".join(_toml_lines(tables, ())).strip() + "\n"


def _toml_lines(table: Mapping[str, Any], path: tuple[str, ...]) -> list[str]:
    values = {k: v for k, v in table.items() if not isinstance(v, Mapping) and v is not None}
    lines = ["", f"[{'.'.join(map(_toml_key, path))}]"] if path and (values or not table) else []
    lines += [f"{_toml_key(name)} = {_toml_value(value)}" for name, value in values.items()]
    for name, value in table.items():
        if isinstance(value, Mapping):
            lines += _toml_lines(value, (*path, name))
    return lines


def _toml_key(name: str) -> str:
    plain = name.isascii() and name.replace("-", "").replace("_", "").isalnum()
    return name if plain else _toml_text(name)


def _toml_value(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_toml_value, value)) + "]"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(int(value))
    return repr(float(value)) if isinstance(value, float) else _toml_text(str(value))


def _toml_text(text: str) -> str:
    # JSON would write a character past U+FFFF as a pair of surrogates, which TOML refuses, and leave DEL as it is.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def load_toml(path: Path) -> dict[str, Any]:
    """A TOML file that nestling wrote. Raises StorageError where it is damaged."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise StorageError(f"cannot read {path}: {error}; delete the run folder and train again") from error
