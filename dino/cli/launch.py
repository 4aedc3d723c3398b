"""``dino launch slurm``."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from dino.cli import extract, pretrain
from dino.cli.command import ConfigFile, with_settings
from dino.cli.grammar import UsageError, split
from dino.config.load import load_config
from dino.config.schema import LaunchConfig

Words = Annotated[list[str] | None, typer.Argument(metavar="COMMAND... [KEY=VALUE]...", hidden=True)]
Recipe = Annotated[str | None, typer.Option("--recipe", metavar="NAME", help="Start values of a pretraining.")]
SlurmFile = Annotated[Path | None, typer.Option("--slurm", metavar="FILE", help="YAML with slurm: settings.")]
COMMANDS = {("pretrain", "patch"): "patch_pathology", ("pretrain", "region"): "region", ("extract",): None}


def slurm(words: Words = None, config: ConfigFile = None, recipe: Recipe = None, slurm: SlurmFile = None) -> None:
    """Submit a pretraining or an extraction to SLURM, one task per GPU, and have it started again until it is done.

    COMMAND is `pretrain patch ROOT RUN`, `pretrain region ROOT RUN` or `extract RUN ROOT` with its own settings;
    those of the job are below. Before the time limit, and when it is preempted, a run is saved and the job requeued.
    `dry_run=true` prints what would be submitted. Needs `pip install 'histodino[slurm]'`.

    For example:

        dino launch slurm pretrain patch data runs/patch slurm.nodes=2 slurm.gpus_per_node=8 training.nepochs=100
        dino launch slurm extract runs/patch data slurm.gpus_per_node=4 slurm.partition=gpu
    """
    positional, overrides = split(words or [])
    own = [word for word in overrides if word.startswith("slurm.")]
    rest = [word for word in words or [] if word not in own]
    name = next((name for name in COMMANDS if tuple(positional[: len(name)]) == name), None)
    if name is None:
        raise UsageError(
            f"expected pretrain patch, pretrain region or extract, found {' '.join(positional[:2]) or '-'}"
        )
    for word in name:
        rest.remove(word)
    settings = load_config(LaunchConfig, file=slurm, overrides=own).slurm
    from dino import api, progress

    if name == ("extract",):
        model, root, of_work = extract.arguments(rest, config)
        work, place = partial(api.extract, model, root, of_work), root.resolve()
    else:
        of_work = pretrain.resolve(name[1], rest, config, recipe or COMMANDS[name])
        if not of_work.output_dir:
            raise UsageError("expected ROOT and RUN, found no RUN")
        work, place = partial(api.pretrain, of_work), Path(of_work.output_dir).resolve()
    folder = settings.folder or place.parent / f"{place.name}_slurm"
    submission = api.launch_slurm(work, settings, folder, dry_run=of_work.dry_run)
    rows = [(key, str(value)) for key, value in submission.parameters.items() if value is not None]
    progress.table([("command", " ".join(["dino", *name, *rest])), ("output", str(submission.folder)), *rows])
    typer.echo(f"submitted as job {submission.job}" if submission.job else "dry run: nothing was submitted")


command = with_settings(LaunchConfig)
