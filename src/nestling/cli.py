"""The command line: options as dataclasses, read by tyro, and one line for whatever the user got wrong.

Imports no torch: ``nestling --help`` answers at once, and a run folder is locked before torch is loaded.
"""

from __future__ import annotations

import io
import os
import sys
from contextlib import redirect_stderr
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro
from tyro.conf import FlagCreatePairsOff, Positional, arg, subcommand

from nestling import __version__
from nestling.arguments import join_sets, method_of, one_line
from nestling.errors import NestlingError, UsageError, listed, unknown

RunArgument = Positional[Annotated[str, arg(metavar="RUN")]]
SourceArgument = Positional[Annotated[str | None, arg(metavar="SOURCE")]]
NameArgument = Positional[Annotated[str, arg(metavar="NAME")]]
FilesArgument = Positional[Annotated[tuple[str, ...], arg(metavar="FILE_OR_FOLDER")]]


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
    on_bad_image: Literal["error", "skip"] | None = None
    """An image that cannot be read: stop with its name, or leave it out and list it."""

    @property
    def level_names(self) -> tuple[str, ...] | None:
        """``levels`` as names."""
        return None if self.levels is None else tuple(name.strip() for name in self.levels.split(","))


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Train on real handwritten digits in about a minute, compare with what there is to beat, and report."""

    out: str = "runs/demo"
    """The run folder."""
    seeds: int = 3
    """How many seeds; three or more for any claim."""


@dataclass(frozen=True, kw_only=True)
class Train(SourceOptions):
    """Train on SOURCE: a catalogue name, a folder tree, a CSV, TSV or Parquet file, or hf:owner/name."""

    source: SourceArgument = None
    """What to learn from."""
    method: str | None = None
    """nested (the default), layerwise, robust, coins, end-to-end or flat-marginal; with --help it lists that method's
    fields."""
    config: str | None = None
    """A TOML file of fields; a run's recipe.toml serves as well."""
    set: Annotated[tuple[str, ...], arg(metavar="FIELD=VALUE")] = ()
    """Fields of the method's recipe, such as epochs=30 optimizer.lr=0.05."""
    backbone: str | None = None
    """auto (the default), resnet10, resnet18, resnet34, resnet18-16 (first width), or widths as conv:8-16/32/64."""
    image_size: int | None = None
    """Pixels a side; by default from the data."""
    init: str | None = None
    """A trained run or bundle, whose backbone the training starts from: fine-tuning."""
    concepts: str | None = None
    """A CSV class,concept: the concepts become the coarsest level, named concept."""
    target_mix: str | None = None
    """A CSV class,share of the mix that a target has at one level: the prior of the concepts' weights (robust)."""
    known: str | None = None
    """Pretend that only these fractions are labelled: coarse=1.0,middle=0.4,fine=0.1."""
    baselines: bool = False
    """Train end-to-end and flat + marginal too, choose every learning rate on validation rows, and compare."""
    seed: int | None = None
    """Of weights, order and augmentation; 0 by default."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] | None = None
    """auto (the default) is bf16 where the processor is fast at it, else fp32."""
    memory: str | None = None
    """Bytes of tensors that training may take, such as 2GB: chooses how many layers train together (layerwise)."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    workers: int | None = None
    """Processes that decode pictures ahead, where these do not fit into memory; by default all cores but one, at most
    8. What comes out does not depend on it."""
    out: str | None = None
    """The run folder; by default runs/<source>-<method>-<hash of the settings>."""
    dry_run: bool = False
    """Print the stages, and the memory and time that they are estimated to take; train and write nothing."""


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
    files: FilesArgument
    """Pictures, or folders of them."""
    json: str | None = None
    """Write the answers there; - for stdout."""
    csv: str | None = None
    """Write a table there."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""


@dataclass(frozen=True, kw_only=True)
class Index(SourceOptions):
    """Make every picture of SOURCE ready to be searched: a folder of features, names and labels."""

    run: RunArgument
    """A run folder or a bundle folder."""
    source: Positional[Annotated[str, arg(metavar="SOURCE")]]
    """What will be searched: as for train, or a folder of pictures without class folders."""
    out: str | None = None
    """The folder to write; by default runs/index-<source>-<fingerprint of the model>."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""


@dataclass(frozen=True, kw_only=True)
class Search(SourceOptions):
    """Find the pictures of a gallery that are most like each query."""

    run: RunArgument
    """A run folder or a bundle folder."""
    queries: Positional[Annotated[tuple[str, ...], arg(metavar="QUERY")]]
    """Pictures, folders of them, or rows of the gallery by name."""
    gallery: Annotated[str, arg(metavar="SOURCE_OR_INDEX")]
    """What is searched: a source, or the folder that nestling index wrote."""
    k: Annotated[int, arg(aliases=["-k"])] = 10
    """How many are found for each query."""
    json: str | None = None
    """Write the answers there; - for stdout."""
    html: str | None = None
    """Write a page of thumbnails there, right and wrong marked where labels are known."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""


@dataclass(frozen=True, kw_only=True)
class Reproduce:
    """Measure a table of a paper, beside the paper's own numbers and with a verdict on each of its claims."""

    name: NameArgument
    """Of the table, such as layerwise-cifar10."""
    scale: str = "small"
    """smoke (a moment, which proves nothing), small (an hour on two cores) or paper (its own settings)."""
    seeds: int | None = None
    """How many seeds; three or more for any verdict. By default as the table says."""
    budget_minutes: float = 60.0
    """No training is begun after so long; the same command goes on from there."""
    json: str | None = None
    """Write the result there; - for stdout. By default into the folder of the runs."""
    data_dir: str | None = None
    """Folder that holds <name>/<split>.parquet; else the environment variable NESTLING_DATA."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    out: str | None = None
    """The folder that holds the runs of every table, as <name>-<scale>; by default runs/reproduce."""


@dataclass(frozen=True, kw_only=True)
class Show:
    """Print what a run was given, what was chosen automatically and why, and what it scored."""

    run: RunArgument
    """A run folder."""


Command = (
    Annotated[Demo, subcommand("demo")]
    | Annotated[Train, subcommand("train")]
    | Annotated[Evaluate, subcommand("evaluate")]
    | Annotated[Predict, subcommand("predict")]
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
        os._exit(5 if code is None and isinstance(command, Train | Demo) else code or 0)
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


def out_of_memory(error: Exception) -> bool:
    """Whether memory ran out: NumPy says so by MemoryError, torch by a RuntimeError."""
    return isinstance(error, MemoryError) or "can't allocate memory" in str(error) or "out of memory" in str(error)


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
            if arguments[:1] == ["train"]:
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
