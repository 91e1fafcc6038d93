"""The words of a command line: made ready for tyro, and tyro's error in one line. Knows no command."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields

from nestling.errors import UsageError, unknown


def join_sets(arguments: list[str]) -> list[str]:
    """All that follows any ``--set``, behind one: the option may be repeated, and its assignments accumulate.

    Raises UsageError where no assignment follows. What stands behind ``--`` is left as it is.
    """
    if arguments[:1] not in (["train"], ["sweep"]):
        return arguments
    end = arguments.index("--") if "--" in arguments else len(arguments)
    rest, assignments, inside = [], [], False
    for argument, following in zip(arguments[:end], [*arguments[1:end], ""], strict=True):
        if argument == "--set" and not is_assignment(following):
            raise UsageError(f"--set needs FIELD=VALUE, such as epochs=30; got {following!r}")
        if argument.startswith("--set="):
            assignments.append(argument.removeprefix("--set="))
        elif argument == "--set":
            inside = True
        elif inside and is_assignment(argument):
            assignments.append(argument)
        else:
            inside = False
            rest.append(argument)
    return [*rest, *(["--set", *assignments] if assignments else []), *arguments[end:]]


def is_assignment(argument: str) -> bool:
    """Whether it reads as FIELD=VALUE."""
    return "=" in argument and not argument.startswith("-")


def method_of(arguments: list[str]) -> str:
    """The value of ``--method``, read before the options are."""
    for number, argument in enumerate(arguments):
        if argument.startswith("--method="):
            return argument.removeprefix("--method=")
        if argument == "--method" and number + 1 < len(arguments):
            return arguments[number + 1]
    return "nested"


def one_line(boxed: str, arguments: list[str], commands: Mapping[str, type]) -> str:
    """tyro's boxed error, reduced to what it says; ``commands`` are the dataclasses of options by name."""
    known = [argument for argument in arguments[:1] if argument in commands]
    see = f"see {' '.join(['nestling', *known])} --help"
    lines = [re.sub(r"[╭╮╰╯│─]+|-{5,}", " ", line).strip() for line in boxed.splitlines()]
    text = re.sub(r"\s+", " ", " ".join(lines[1:])).split(" For full helptext")[0].strip()
    text, _, argument = text.partition(" Argument helptext: ")
    text = re.split(" (?:Perhaps you meant|Available subcommands):", text)[0]
    if match := re.match(r"Unrecognized options: ([^\s,]+)", text):
        name = match[1].split("=")[0]
        if not name.startswith("-"):
            return f"unexpected argument {name!r}: {see}"
        named = [f.name for f in fields(commands[known[0]]) if "Argument" not in str(f.type)] if known else ["version"]
        options = [f"--{name.replace('_', '-')}" for name in named]
        hint = " A field of the recipe is given by --set FIELD=VALUE;" if known in (["train"], ["sweep"]) else ""
        return f"{unknown('option', name, [*options, '--help'])}{hint} {see}"
    if match := re.match(r"Error parsing (\S+): .*?(?:\[|base 10: )'(.*?)'", text):
        wanted = "an integer" if "INT" in argument else "a number" if "FLOAT" in argument else "of another kind"
        return f"{match[1]} must be {wanted}, got {match[2]!r:.80}: {see}"
    return f"{text.rstrip('. ') or 'cannot read the options'}: {see}"
