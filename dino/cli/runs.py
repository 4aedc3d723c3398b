"""Commands for a run that exists: ``dino resume``, ``dino status`` and ``dino replay``."""

from pathlib import Path
from typing import Annotated

import typer

from dino.cli.command import with_settings
from dino.cli.grammar import FURTHER, expect, split
from dino.config.load import load_config
from dino.config.schema import ResumeConfig

# --------------------------------------------------------------------------------------------------- resume

ResumeArguments = Annotated[list[str] | None, typer.Argument(metavar="RUN [KEY=VALUE]...", hidden=True)]
SHORT = {"nepochs": "extend.epochs", "max_steps": "extend.steps"}


def resume(arguments: ResumeArguments = None) -> None:
    """Resume a run with the settings in its folder, or extend a finished one.

    Runtime settings, such as speed.num_workers, may be given as KEY=VALUE. training.nepochs=+20 trains a finished run
    20 epochs further, from its weights, optimizer and heads: a segment with its own warm-up and cosine (extend.* below)
    that log, identity.json and checkpoints record. It is not the run that more epochs would have given from the start.
    Epochs are counted from the end of the first schedule: the same command again resumes the segment or says that it is
    finished, and +40 after +20 adds 20.

    For example:

        dino resume runs/patch
        dino resume runs/patch training.nepochs=+20 extend.lr=0.0002
    """
    positional, words = split(arguments or [])
    (run,) = expect(positional, ["RUN"])
    words = [FURTHER.sub(lambda match: f"{SHORT[match[1]]}={match[2]}", word) for word in words]
    further = [word for word in words if word.startswith("extend.")]
    extend = load_config(ResumeConfig, overrides=further).extend if further else None
    from dino import api

    api.resume(run, [word for word in words if word not in further], extend)


resume_command = with_settings(ResumeConfig)

# --------------------------------------------------------------------------------------------------- status

StatusArguments = Annotated[list[str] | None, typer.Argument(metavar="ROOT", hidden=True)]


def status(arguments: StatusArguments = None) -> None:
    """Print in one line how far `dino tile` is in ROOT, over all its processes, running or not.

    For example:

        dino status data
    """
    positional, _ = split(arguments or [])
    (root,) = expect(positional, ["ROOT"])
    from dino import api

    typer.echo(api.tiling_status(Path(root)))


# --------------------------------------------------------------------------------------------------- replay

ReplayArguments = Annotated[list[str] | None, typer.Argument(metavar="RUN/failure [KEY=VALUE]...", hidden=True)]
REPLAY_HEADER = ("sample", "draw", "loss", "largest input", "non-finite teacher views", "non-finite student views")


def replay(arguments: ReplayArguments = None) -> None:
    """Repeat a training step with a non-finite loss or gradient, and find the samples that cause it.

    RUN/failure is the folder that the run wrote. Settings can be changed for the replay. Nothing is written.

    For example:

        dino replay runs/patch/failure
        dino replay runs/patch/failure speed.precision=fp32
    """
    positional, changes = split(arguments or [])
    (folder,) = expect(positional, ["RUN/failure"])
    from dino import api, progress

    found = api.replay(Path(folder), changes)
    names = list(found.samples[0].losses) if found.samples else []
    names = names if len(names) > 1 else []  # a single loss is the loss
    rows = [
        (
            s.name,
            str(s.draw),
            f"{s.loss:.4g}",
            f"{s.largest_input:.4g}",
            _format_views(s.teacher_views),
            _format_views(s.student_views),
            *(f"{s.losses[name]:.4g}" for name in names),
        )
        for s in found.samples
    ]
    progress.table(rows, (*REPLAY_HEADER, *(f"loss/{name}" for name in names)))
    typer.echo(_conclusion(found.step, found.again, [sample.name for sample in found.suspects]))


def _format_views(views: list[int]) -> str:
    return " ".join(str(view) for view in views) or "-"


def _conclusion(step: int, again: bool, suspects: list[str]) -> str:
    if not again:
        return f"step {step} is finite this time: run the command again; if it fails again, the hardware may be faulty"
    if suspects:
        return f"step {step} is not finite again, because of {', '.join(suspects)}: check these samples"
    return (
        f"step {step} is not finite again, but each sample alone is finite: in a new run, lower optim.lr or set "
        "speed.precision=fp32"
    )
