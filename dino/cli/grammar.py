"""The one grammar of every command: inputs and outputs are positional, settings are ``key=value``, in any order."""

import re
from collections.abc import Sequence
from pathlib import Path

from dino.errors import ConfigError

SETTING = re.compile(r"[A-Za-z_][\w.]*=")


class UsageError(ConfigError):
    """The words of a command do not fit its grammar; the command line prints the usage before the message."""


def split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Tell positional words from settings.

    A word that exists as a file or folder is never read as ``key=value``, whatever its name.

    Args:
        words: What stands behind the command, options taken out.

    Returns:
        The positional words and the ``key=value`` words, each in their order.
    """
    positional, overrides = [], []
    for word in words:
        (overrides if SETTING.match(word) and not Path(word).exists() else positional).append(word)
    return positional, overrides


def expect(positional: Sequence[str], names: Sequence[str]) -> list[str]:
    """The positional words, when there are as many as ``names``.

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
    """Read words that may be given by place or, as in the original's commands, by ``key=value``.

    Args:
        words: Positional words and settings, mixed.
        names: Key -> how the help page calls it, in positional order, e.g. ``{"data_dir": "ROOT"}``.

    Returns:
        The values that were given, by key (all of them or, when there is no positional word, perhaps fewer), and the
        remaining ``key=value`` words.

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
        raise UsageError(f"expected {names[key]} once, found it by place ({_listed(positional)}) and as '{key}='")
    return dict(zip(names, expect(positional, list(names.values())), strict=True)), rest


def _listed(words: Sequence[str]) -> str:
    return f"{len(words)}: {' '.join(words)}" if words else "nothing"
