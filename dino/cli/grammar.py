"""The grammar of every command: inputs and outputs are positional, settings are ``key=value``, in any order."""

import re
import shlex
from collections.abc import Collection, Sequence
from itertools import pairwise
from pathlib import Path

from dino.errors import ConfigError

SETTING = re.compile(r"[A-Za-z_][\w.]*=")
OPTION = re.compile(r"--?([A-Za-z_][\w.-]*)(?:=(.*))?", re.DOTALL)


class UsageError(ConfigError):
    """The words of a command do not match its grammar; the command line prints the usage before the message."""


def split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Separate positional words from settings.

    A word that exists as a file or folder is never read as ``key=value``, whatever its name.

    Args:
        words: The words after the command, without options.

    Returns:
        The positional words and the ``key=value`` words, each in their order.
    """
    positional, overrides = [], []
    for word in words:
        (overrides if SETTING.match(word) and not Path(word).exists() else positional).append(word)
    return positional, overrides


def expect(positional: Sequence[str], names: Sequence[str]) -> list[str]:
    """The positional words, if there are as many as ``names``.

    Raises:
        UsageError: If there are more or fewer.
    """
    if len(positional) != len(names):
        raise UsageError(f"expected {' '.join(names)}, found {_listed(positional)}")
    return list(positional)


def expect_many(positional: Sequence[str], many: str, last: str) -> tuple[list[str], str]:
    """Split positional words into one or more of ``many`` and the ``last`` one.

    Raises:
        UsageError: If there are fewer than two.
    """
    if len(positional) < 2:
        raise UsageError(f"expected one or more {many} and then {last}, found {_listed(positional)}")
    return list(positional[:-1]), positional[-1]


def named_or_positional(words: Sequence[str], names: dict[str, str]) -> tuple[dict[str, str], list[str]]:
    """Read words that may be positional or, as in the original's commands, ``key=value``.

    Args:
        words: Positional words and settings, mixed.
        names: Key -> its name on the help page, in positional order, e.g. ``{"data_dir": "ROOT"}``.

    Returns:
        The given values by key (all of them or, if there is no positional word, perhaps fewer), and the remaining
        ``key=value`` words.

    Raises:
        UsageError: If the number of positional words is wrong, or a value is given in both ways.
    """
    positional, overrides = split(words)
    given = {word.partition("=")[0]: word.partition("=")[2] for word in overrides}
    rest = [word for word in overrides if word.partition("=")[0] not in names]
    found = {key: given[key] for key in names if key in given}
    if not positional:
        return found, rest
    if found:
        key = next(iter(found))
        raise UsageError(
            f"expected {names[key]} once, found it as a positional argument ({_listed(positional)}) and as '{key}='"
        )
    return dict(zip(names, expect(positional, list(names.values())), strict=True)), rest


def refuse_settings_as_options(args: Sequence[str], keys: Collection[str], options: Collection[str]) -> None:
    """Explain the grammar to who writes a setting as an option, ``--training.nepochs 1``.

    Args:
        args: All words after the command.
        keys: The command's settings.
        options: The options that the command has, with their dashes.

    Raises:
        UsageError: If a word is a setting with dashes before it.
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
            word = f"{key}={value}" if value == "VALUE" else shlex.quote(f"{key}={value}")
            raise UsageError(f"there is no option {arg.partition('=')[0]}; settings are KEY=VALUE words: {word}")


def _listed(words: Sequence[str]) -> str:
    return f"{len(words)}: {' '.join(words)}" if words else "nothing"
