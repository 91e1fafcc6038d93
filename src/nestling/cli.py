"""The command line: options as dataclasses, read by tyro, and one line for whatever the user got wrong.

Imports no torch: ``nestling --help`` answers at once, and a run folder is locked before torch is loaded.
"""

from __future__ import annotations

import io
import os
import re
import sys
from contextlib import redirect_stderr
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro
from tyro.conf import FlagCreatePairsOff, Positional, arg, subcommand

from nestling import __version__
from nestling.errors import NestlingError, UsageError

RunArgument = Positional[Annotated[str, arg(metavar="RUN")]]


@dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """Where a SOURCE stands."""

    data_dir: str | None = None
    """Folder that holds <name>/<split>.parquet; else the environment variable NESTLING_DATA."""
    levels: str | None = None
    """Columns or depths that are the levels, coarse to fine: a,b,c."""
    taxonomy: str | None = None
    """A taxonomy file: JSON as in a bundle, or CSV edges parent,child."""
    qualify_names: bool = False
    """Tell classes of one name under two parents apart by path: a/x and b/x."""
    on_bad_image: Literal["error", "skip"] = "error"
    """An image that cannot be read: stop with its name, or leave it out and list it."""

    @property
    def level_names(self) -> tuple[str, ...] | None:
        """``levels`` as names."""
        return tuple(name.strip() for name in self.levels.split(",")) if self.levels else None


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Train a classifier of real handwritten digits in about a minute, compare it with what it has to beat, and report."""

    out: str = "runs/demo"
    """The run folder."""
    seeds: int = 3
    """How many seeds; three or more for any claim."""


@dataclass(frozen=True, kw_only=True)
class Train(SourceOptions):
    """Train on SOURCE: a catalogue name, a folder tree, a CSV, TSV or Parquet file, or hf:owner/name."""

    source: Positional[Annotated[str | None, arg(metavar="SOURCE")]] = None
    """What to learn from."""
    method: str | None = None
    """nested (the default), end-to-end or flat-marginal; with --help it lists that method's fields."""
    config: str | None = None
    """A TOML file of fields; a run's recipe.toml serves as well."""
    set: Annotated[tuple[str, ...], arg(metavar="FIELD=VALUE")] = ()
    """Fields of the method's recipe, such as epochs=30 optimizer.lr=0.05."""
    backbone: str | None = None
    """auto (the default), resnet10, resnet18, resnet34, resnet18-16 (first width), or widths such as conv:8-16/32/64."""
    image_size: int | None = None
    """Pixels a side; by default from the data."""
    known: str | None = None
    """Pretend that only these fractions are labelled: coarse=1.0,middle=0.4,fine=0.1."""
    baselines: bool = False
    """Train end-to-end and flat + marginal too, choose every learning rate on validation rows, and compare."""
    seed: int | None = None
    """Of weights, order and augmentation; 0 by default."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto is bf16 where the processor is fast at it, else fp32."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    out: str | None = None
    """The run folder; by default runs/<source>-<method>-<hash of the settings>."""


@dataclass(frozen=True, kw_only=True)
class Evaluate(SourceOptions):
    """Score a trained model on labelled rows, clean and distorted."""

    run: RunArgument
    """A run folder or a bundle folder."""
    source: str | None = None
    """Labelled rows; by default those that the run was trained for."""
    split: str = "test"
    """Which of its rows."""
    distort: tuple[str, ...] = ()
    """Distortions such as turbulence:1,0.5, half:top, blur:1, noise:0.1."""
    json: str | None = None
    """Write the figures there; - for stdout."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""


@dataclass(frozen=True, kw_only=True)
class Predict:
    """Answer for pictures: the path down the tree, its confidences, and the deepest level that can be vouched for."""

    run: RunArgument
    """A run folder or a bundle folder."""
    files: Positional[Annotated[tuple[str, ...], arg(metavar="FILE_OR_FOLDER")]]
    """Pictures, or folders of them."""
    json: str | None = None
    """Write the answers there; - for stdout."""
    csv: str | None = None
    """Write a table there."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""


@dataclass(frozen=True, kw_only=True)
class Show:
    """Print what a run was given, what was chosen automatically and why, and what it scored."""

    run: RunArgument
    """A run folder."""


Command = (
    Annotated[Demo, subcommand("demo")] | Annotated[Train, subcommand("train")] | Annotated[Evaluate, subcommand("evaluate")]
    | Annotated[Predict, subcommand("predict")] | Annotated[Show, subcommand("show")]
)  # fmt: skip


def run(arguments: list[str]) -> int:
    """Run a command and return its exit code."""
    if arguments == ["--version"]:
        print(f"nestling {__version__}")
        return 0
    try:
        return execute(parse(arguments))
    except NestlingError as error:
        print(f"nestling: {' '.join(str(error).split())}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        # The reader of our output has seen enough.
        os._exit(0)
    except OSError as error:
        print(f"nestling: {error.strerror or error}: {error.filename or ''}", file=sys.stderr)
        return 5


def parse(arguments: list[str]):
    """The command with its options. Raises UsageError in one line; ``--help`` prints and exits 0."""
    errors = io.StringIO()
    try:
        with redirect_stderr(errors):
            return tyro.cli(Command, prog="nestling", args=join_sets(arguments), config=(FlagCreatePairsOff,))  # type: ignore[call-overload]
    except SystemExit as stop:
        if stop.code in (0, None):
            if arguments[:1] == ["train"]:
                print_fields(method_of(arguments))
            raise
        raise UsageError(one_line(errors.getvalue(), arguments)) from None


def execute(command: object) -> int:
    """Hand a command to the module that does it."""
    match command:
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
        case Show():
            from nestling.commands.show import show

            return show(command)
    raise AssertionError(command)


def join_sets(arguments: list[str]) -> list[str]:
    """All that follows any ``--set``, behind one: the option may be repeated, and its assignments accumulate."""
    rest, assignments, inside = [], [], False
    for argument in arguments:
        if argument.startswith("--set="):
            assignments.append(argument.removeprefix("--set="))
        elif argument == "--set":
            inside = True
        elif inside and "=" in argument and not argument.startswith("-"):
            assignments.append(argument)
        else:
            inside = False
            rest.append(argument)
    return [*rest, "--set", *assignments] if assignments else rest


def method_of(arguments: list[str]) -> str:
    """The value of ``--method``, read before the options are."""
    for number, argument in enumerate(arguments):
        if argument.startswith("--method="):
            return argument.removeprefix("--method=")
        if argument == "--method" and number + 1 < len(arguments):
            return arguments[number + 1]
    return "nested"


def print_fields(method: str) -> None:
    """The fields of a method's recipe, with their docstrings."""
    from nestling.config import field_help
    from nestling.methods import recipe_class

    print(f"\nfields of {method}, for --set and --config:\n")
    for name, kind, default, text in field_help(recipe_class(method)):
        print(f"  {name}  ({kind}; default {default})\n      {text}")


def one_line(boxed: str, arguments: list[str]) -> str:
    """tyro's boxed error, reduced to what it says."""
    lines = [re.sub(r"[╭╮╰╯│─]+", " ", line).strip() for line in boxed.splitlines()]
    text = " ".join(line for line in lines[1:] if line)
    text = re.sub(r"\s+", " ", text.split("For full helptext")[0]).strip()
    known = arguments[:1] if arguments and not arguments[0].startswith("-") else []
    return f"{text or 'cannot read the options'}; see {' '.join(['nestling', *known])} --help"
