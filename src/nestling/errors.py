"""Every error that nestling raises on purpose, and the exit code that each one becomes.

A message gives the value, what was expected, and the remedy, in one line:
``unknown level 'mid': expected one of 'coarse', 'middle', 'fine'. Did you mean 'middle'?``
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches


class NestlingError(Exception):
    """Base of all errors raised on purpose; ``exit_code`` is what the command line exits with."""

    exit_code = 1
    of_all = True
    """Whether all processes of a run meet it, so that the first alone says it; else whoever meets it says it."""


class UsageError(NestlingError, ValueError):
    """A setting that cannot be: unknown name, impossible value, missing extra or device."""

    exit_code = 2


class MissingExtraError(UsageError):
    """An optional package that is not installed, or cannot be imported."""


class DataError(NestlingError, ValueError):
    """Data or a taxonomy that cannot be used as it is."""

    exit_code = 3


class DivergedError(NestlingError, ArithmeticError):
    """Training met a loss, gradient or metric that is not finite."""

    exit_code = 4


class StorageError(NestlingError, OSError):
    """Files, disk or hub: missing, unreadable, damaged, full."""

    exit_code = 5


class BusyError(NestlingError):
    """Another process holds the run folder."""

    exit_code = 6


class LostError(NestlingError):
    """Another process that this one trains with, or a worker that decodes for it, has ended."""

    of_all = False


class Interrupted(NestlingError):
    """A signal asked the run to stop; what was trained so far is saved."""

    def __init__(self, signal_number: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number


def listed(names: Iterable[object], limit: int = 12) -> str:
    """``'a', 'b', 'c'``; past ``limit`` names the rest is counted."""
    names = [repr(str(name)) for name in names]
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")


def unknown(
    what: str, value: object, options: Iterable[object], error: type[NestlingError] = UsageError
) -> NestlingError:
    """The error for a name that is none of ``options``, with the nearest one suggested."""
    options = [str(option) for option in options]
    near = get_close_matches(str(value), options, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return error(f"unknown {what} {value!s:.200}: expected one of {listed(options)}.{hint}")


def missing_extra(package: str, extra: str, need: str) -> MissingExtraError:
    """The error for an optional package that is not installed."""
    return MissingExtraError(f"{need} needs the package {package!r}: install it with pip install 'nestling[{extra}]'")


def out_of_memory(error: Exception) -> bool:
    """Whether memory ran out: NumPy says so by MemoryError, torch by a RuntimeError."""
    return isinstance(error, MemoryError) or "can't allocate memory" in str(error) or "out of memory" in str(error)


@contextmanager
def read_as_data(what: str) -> Iterator[None]:
    """Whatever a decoder raises of the bytes that it is given, as a DataError ``what: the reason``; our own passes."""
    try:
        yield
    except NestlingError:
        raise
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{what}: {reason:.200}") from error
