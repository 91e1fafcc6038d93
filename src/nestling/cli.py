"""The command line: options as dataclasses, read by tyro, and one line for whatever the user got wrong.

Imports no torch: ``nestling --help`` answers at once, and a run folder is locked before torch is loaded.
"""

from __future__ import annotations

import io
import os
import sys
from contextlib import redirect_stderr
from typing import Annotated

import tyro
from tyro.conf import FlagCreatePairsOff, subcommand

from nestling import __version__
from nestling.arguments import join_sets, method_of, one_line
from nestling.errors import NestlingError, UsageError, listed, out_of_memory, unknown
from nestling.options import Demo, Evaluate, Index, Lint, Predict, Reproduce, Search, Show, Sweep, Train

Command = (
    Annotated[Demo, subcommand("demo")]
    | Annotated[Train, subcommand("train")]
    | Annotated[Evaluate, subcommand("evaluate")]
    | Annotated[Predict, subcommand("predict")]
    | Annotated[Lint, subcommand("lint")]
    | Annotated[Sweep, subcommand("sweep")]
    | Annotated[Index, subcommand("index")]
    | Annotated[Search, subcommand("search")]
    | Annotated[Reproduce, subcommand("reproduce")]
    | Annotated[Show, subcommand("show")]
)


OPTIONS_OF = {
    "demo": Demo,
    "train": Train,
    "evaluate": Evaluate,
    "predict": Predict,
    "lint": Lint,
    "sweep": Sweep,
    "index": Index,
    "search": Search,
    "reproduce": Reproduce,
    "show": Show,
}


def run(arguments: list[str]) -> int:
    """Run a command and return its exit code."""
    command, code = None, None
    try:
        command = parse(arguments)
        code = execute(command)
        sys.stdout.flush()
        return code
    except NestlingError as error:
        from nestling.commands.train import speaks

        return complain(str(error), error.exit_code) if speaks() or not error.of_all else error.exit_code
    except BrokenPipeError:
        # Whoever read our output has seen enough; but a training that could not say how far it is has not finished.
        os._exit(5 if code is None and isinstance(command, Train | Demo | Sweep) else code or 0)
    except OSError as error:
        return complain(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}", 5)
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        return complain("not enough memory: lower batch_size, or take a smaller --backbone or --image-size", 1)


def complain(text: str, code: int) -> int:
    """One line on stderr, whatever it is made of; returns ``code``."""
    print(f"nestling: {' '.join(text.split())}", file=sys.stderr)
    return code


def parse(arguments: list[str]) -> object:
    """The command with its options, None where ``--help`` or ``--version`` was answered. Raises UsageError."""
    if not arguments:
        raise UsageError(f"expected a command, one of {listed(OPTIONS_OF)}: see nestling --help")
    if arguments == ["--version"]:
        print(f"nestling {__version__}")
        return None
    if not arguments[0].startswith("-") and arguments[0] not in OPTIONS_OF:
        raise unknown("command", arguments[0], OPTIONS_OF)
    errors = io.StringIO()
    try:
        with redirect_stderr(errors):
            return tyro.cli(Command, prog="nestling", args=join_sets(arguments), config=(FlagCreatePairsOff,))  # type: ignore[call-overload]
    except SystemExit as stop:
        if stop.code in (0, None):
            if arguments[:1] in (["train"], ["sweep"]):
                print_fields(method_of(arguments))
            return None
        raise UsageError(one_line(errors.getvalue(), arguments, OPTIONS_OF)) from None


def execute(command: object) -> int:
    """Hand a command to the module that does it."""
    match command:
        case None:
            return 0
        case Demo():
            from nestling.commands.demo import demo

            return demo(command)
        case Train():
            from nestling.commands.train import train

            return train(command)
        case Evaluate():
            from nestling.commands.evaluate import evaluate

            return evaluate(command)
        case Predict():
            from nestling.commands.predict import predict

            return predict(command)
        case Lint():
            from nestling.commands.lint import lint_command

            return lint_command(command)
        case Sweep():
            from nestling.commands.sweep import sweep

            return sweep(command)
        case Index():
            from nestling.commands.index import index

            return index(command)
        case Search():
            from nestling.commands.search import search

            return search(command)
        case Reproduce():
            from nestling.commands.reproduce import reproduce

            return reproduce(command)
        case Show():
            from nestling.commands.show import show

            return show(command)
    raise AssertionError(command)


def print_fields(method: str) -> None:
    """The fields of a method's recipe, with their docstrings."""
    from nestling.config import field_help
    from nestling.methods import recipe_class

    print(f"\nfields of {method}, for --set and --config:\n")
    for name, kind, default, text in field_help(recipe_class(method)):
        print(f"  {name}  ({kind}; default {default})\n      {text}")
