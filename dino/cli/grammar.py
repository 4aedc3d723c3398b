"""The grammar of all commands: inputs and outputs are positional, settings are ``key=value``, in any order."""

import re
import shlex
from collections.abc import Collection, Sequence
from itertools import pairwise
from pathlib import Path

from dino.errors import ConfigError

SETTING = re.compile(r"[A-Za-z_][\w.]*=")
FURTHER = re.compile(r"training\.(nepochs|max_steps)=\+(.*)")  # extends a run, see `dino resume`
OPTION = re.compile(r"--?([A-Za-z_][\w.-]*)(?:=(.*))?", re.DOTALL)


class UsageError(ConfigError):
    """The arguments of a command do not match its grammar; the usage is printed before the message."""


def split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Separate positional arguments from settings.

    The name of an existing file or folder is always a positional argument, also if it contains ``=``.

    Args:
        arguments: The arguments after the command, without options.

    Returns:
        The positional arguments and the ``key=value`` arguments, each in the given order.
    """
    positional, overrides = [], []
    for argument in arguments:
        (overrides if SETTING.match(argument) and not _exists(argument) else positional).append(argument)
    return positional, overrides


def _exists(path: str) -> bool:
    try:
        return Path(path).exists()
    except OSError:  # longer than the name of a file can be
        return False


def expect(positional: Sequence[str], names: Sequence[str]) -> list[str]:
    """Check the number of positional arguments, and return them.

    Raises:
        UsageError: If there are more or fewer than ``names``.
    """
    if len(positional) != len(names):
        raise UsageError(f"expected {' '.join(names)}, found {_listed(positional)}")
    return list(positional)


def expect_many(positional: Sequence[str], many: str, last: str) -> tuple[list[str], str]:
    """Split positional arguments into one or more named ``many`` and a ``last`` one.

    Raises:
        UsageError: If there are fewer than two.
    """
    if len(positional) < 2:
        raise UsageError(f"expected at least one {many} followed by {last}, found {_listed(positional)}")
    return list(positional[:-1]), positional[-1]


def named_or_positional(arguments: Sequence[str], names: dict[str, str]) -> tuple[dict[str, str], list[str]]:
    """Read arguments that may be positional or, as in the original's commands, ``key=value``.

    Args:
        arguments: Positional arguments and settings, mixed.
        names: Name in the help of each key, in positional order, e.g. ``{"data_dir": "ROOT"}``.

    Returns:
        The given values by key (without positional arguments some may be missing), and the remaining ``key=value``
        arguments.

    Raises:
        UsageError: If the number of positional arguments is wrong, or a value is given in both forms.
    """
    positional, overrides = split(arguments)
    given = {argument.partition("=")[0]: argument.partition("=")[2] for argument in overrides}
    rest = [argument for argument in overrides if argument.partition("=")[0] not in names]
    found = {key: given[key] for key in names if key in given}
    if not positional:
        return found, rest
    if found:
        key = next(iter(found))
        raise UsageError(
            f"expected {names[key]} once, found {_listed(positional)} and '{key}={found[key]}'; omit one of them"
        )
    return dict(zip(names, expect(positional, list(names.values())), strict=True)), rest


def refuse_settings_as_options(args: Sequence[str], keys: Collection[str], options: Collection[str]) -> None:
    """Reject settings that are written as options (``--training.nepochs 1``), and show the correct form.

    Args:
        args: All arguments after the command.
        keys: The command's settings.
        options: The command's options, with their dashes.

    Raises:
        UsageError: If an argument is a setting with leading dashes.
    """
    for arg, following in pairwise([*args, "-"]):
        if arg == "--":
            return
        match = OPTION.fullmatch(arg)
        if match is None or arg.partition("=")[0] in options:
            continue
        key = match[1].replace("-", "_")
        if key in keys:
            value = match[2] if match[2] is not None else "VALUE" if following.startswith("-") else following
            setting = f"{key}={value}" if value == "VALUE" else shlex.quote(f"{key}={value}")
            raise UsageError(f"unknown option {arg.partition('=')[0]}; settings are passed as KEY=VALUE: {setting}")


def _listed(arguments: Sequence[str]) -> str:
    if not arguments:
        return "no arguments"
    noun = "argument" if len(arguments) == 1 else "arguments"
    spaced = any(argument.startswith("=") for argument in arguments)
    hint = "; write settings without spaces around =" if spaced else ""
    return f"{len(arguments)} {noun} ({shlex.join(arguments)}){hint}"
