"""``dino info``."""

from typing import Annotated

import typer

from dino.cli.command import Command, flat_scalars, print_rows
from dino.cli.grammar import expect

Words = Annotated[list[str] | None, typer.Argument(metavar="CHECKPOINT", hidden=True)]


def info(words: Words = None) -> None:
    """Say what a checkpoint is: architecture, training, transform, spacing and tile size.

    CHECKPOINT is a run, a checkpoint file (foreign ones too) or an export.

    For example:

        dino info runs/patch
    """
    (source,) = expect(words or [], ["CHECKPOINT"])
    from dino import api

    print_rows(flat_scalars(api.info(source)))


command = Command
