"""``dino replay``."""

from pathlib import Path
from typing import Annotated

import typer

from dino.cli.command import Command
from dino.cli.grammar import expect, split

Words = Annotated[list[str] | None, typer.Argument(metavar="RUN/failure [KEY=VALUE]...", hidden=True)]
HEADER = ("sample", "draw", "loss", "largest input", "broken teacher views", "broken student views")


def replay(words: Words = None) -> None:
    """Do a step that was not finite once more, and say which of its samples breaks it.

    RUN/failure is what the run left behind. Nothing is written; settings may be changed for the replay.

    For example:

        dino replay runs/patch/failure
        dino replay runs/patch/failure speed.precision=fp32
    """
    positional, changes = split(words or [])
    (folder,) = expect(positional, ["RUN/failure"])
    from dino import api, progress

    found = api.replay(Path(folder), changes)
    rows = [
        (
            s.name,
            str(s.draw),
            f"{s.loss:.4g}",
            f"{s.largest_input:.4g}",
            _views(s.teacher_views),
            _views(s.student_views),
        )
        for s in found.samples
    ]
    progress.table(rows, HEADER)
    typer.echo(_conclusion(found.step, found.again, [sample.name for sample in found.suspects]))


def _views(views: list[int]) -> str:
    return " ".join(str(view) for view in views) or "-"


def _conclusion(step: int, again: bool, suspects: list[str]) -> str:
    if not again:
        return f"step {step} is finite this time: run the command again; if it fails once more, suspect the hardware"
    if suspects:
        return f"step {step} is not finite again, because of {', '.join(suspects)}: look at these samples"
    return (
        f"step {step} is not finite again, but every sample is by itself: lower optim.lr, or set speed.precision=fp32"
    )


command = Command
