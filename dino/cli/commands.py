"""The commands of ``dino``: each reads its words and settings, and calls :mod:`dino.api`."""

import dataclasses
import shlex
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from dino.cli.command import ConfigFile, end, flat_scalars, with_settings
from dino.cli.grammar import UsageError, expect, expect_many, named_or_positional, split
from dino.config.load import RECIPES, flatten, load_config, recipe_comment, to_commented_yaml, to_dict
from dino.config.load import settings as all_settings
from dino.config.schema import (
    LEVEL_CONFIGS,
    DemoConfig,
    ExportConfig,
    ExtractConfig,
    InfoConfig,
    KnnConfig,
    LaunchConfig,
    PatchConfig,
    RegionConfig,
    TileConfig,
)

# ----------------------------------------------------------------------------------------------------- tile

TileWords = Annotated[list[str] | None, typer.Argument(metavar="SLIDE... ROOT [KEY=VALUE]...", hidden=True)]


def tile(words: TileWords = None, config: ConfigFile = None) -> None:
    """Find tissue and cut slides into tiles and regions on one lattice per slide.

    SLIDE is a slide, a folder of slides, or one slides.csv. Tiles, tables and previews are written under ROOT. The same
    command again continues with the slides that are not done. A slide that fails does not stop the others:
    slides_status.csv gives the reason, and the exit code is 2.

    For example:

        dino tile slides/*.svs data spacing_um=0.5 num_workers=8
        dino tile slides.csv data dry_run=true
    """
    positional, overrides = split(words or [])
    inputs, root = expect_many(positional, "SLIDE", "ROOT")
    settings = load_config(TileConfig, file=config, overrides=overrides)
    from dino import api

    end(api.tile([Path(word) for word in inputs], Path(root), settings).exit_code)


tile_command = with_settings(TileConfig)

# ------------------------------------------------------------------------------------------------- pretrain

PretrainWords = Annotated[list[str] | None, typer.Argument(metavar="ROOT RUN [KEY=VALUE]...", hidden=True)]
PatchRecipe = Annotated[str, typer.Option("--recipe", metavar="NAME", help="Defaults: patch_pathology or patch.")]
RegionRecipe = Annotated[str, typer.Option("--recipe", metavar="NAME", help="Defaults.")]


def patch(words: PretrainWords = None, config: ConfigFile = None, recipe: PatchRecipe = "patch_pathology") -> None:
    """Level 1: pretrain a vision transformer on tiles with DINO.

    ROOT is a folder that `dino tile` wrote, or any folder of images; RUN is the folder of the run. The same command
    again resumes the run; a finished run is not changed.

    For example:

        dino pretrain patch data runs/patch training.nepochs=100 speed.num_workers=8
        dino pretrain patch data runs/patch model.init=timm:vit_small_patch16_224.dino
        torchrun --nproc_per_node=8 -m dino pretrain patch data runs/patch
    """
    pretrain_level("patch", words or [], config, recipe)


def region(words: PretrainWords = None, config: ConfigFile = None, recipe: RegionRecipe = "region") -> None:
    """Level 2: pretrain a small vision transformer on the feature grids of regions with DINO.

    ROOT is a folder that `dino extract` filled, or any folder of .pt grids; RUN is the folder of the run. The same
    command again resumes the run; a finished run is not changed.

    For example:

        dino pretrain region data runs/region training.nepochs=100
    """
    pretrain_level("region", words or [], config, recipe)


def pretrain_level(level: str, words: list[str], file: Path | None, recipe: str) -> None:
    """Train one level; the arguments are those of :func:`pretrain_settings`."""
    settings = pretrain_settings(level, words, file, recipe)
    from dino import api

    api.pretrain(settings)


def pretrain_settings(level: str, words: list[str], file: Path | None, recipe: str) -> PatchConfig | RegionConfig:
    """Resolve the settings of one level.

    Args:
        level: ``patch`` or ``region``.
        words: ROOT and RUN, positional or as ``data_dir=`` and ``output_dir=``, and settings.
        file: The user's YAML; it may contain the two folders, as the ``config.yaml`` of a run does.
        recipe: Name of the YAML whose values are the defaults.

    Raises:
        UsageError: If one of the two folders is not given.
    """
    folders, overrides = named_or_positional(words, {"data_dir": "ROOT", "output_dir": "RUN"})
    settings = load_config(LEVEL_CONFIGS[level], recipe=recipe, file=file, overrides=overrides)
    settings = dataclasses.replace(settings, **folders)
    needed = ("data_dir",) if settings.dry_run or settings.profile else ("data_dir", "output_dir")
    missing = [key for key in needed if not getattr(settings, key)]
    if missing:
        raise UsageError(f"expected ROOT and RUN (or data_dir= and output_dir=), found no {' and no '.join(missing)}")
    return settings


patch_command = with_settings(PatchConfig, "patch_pathology")
original_patch_command = with_settings(PatchConfig, "patch")
region_command = with_settings(RegionConfig, "region")

# -------------------------------------------------------------------------------------------------- extract

ExtractWords = Annotated[list[str] | None, typer.Argument(metavar="RUN ROOT [KEY=VALUE]...", hidden=True)]


def extract(words: ExtractWords = None, config: ConfigFile = None) -> None:
    """Turn pixels into features with the teacher of a run.

    RUN is a run, a checkpoint file (external ones too) or timm:NAME; ROOT is the folder that `dino tile` wrote.

    A level-1 model writes one .pt grid per region into ROOT/region_4096_pretraining; a level-2 run writes one .h5 file
    per slide. What the same model has already done is skipped. Under torchrun the work is split over the processes.

    For example:

        dino extract runs/patch data
        dino extract hipt.pth data transform=hipt
    """
    model, root, settings = extract_arguments(words or [], config)
    from dino import api

    end(api.extract(model, root, settings).exit_code)


def extract_arguments(words: list[str], file: Path | None) -> tuple[str, Path, ExtractConfig]:
    """RUN, ROOT and the settings.

    Args:
        words: RUN and ROOT, positional or as ``model=`` and ``data_dir=``, and settings.
        file: The user's YAML.

    Raises:
        UsageError: If one of the two is not given.
    """
    given, overrides = named_or_positional(words, {"model": "RUN", "data_dir": "ROOT"})
    if len(given) < 2:
        raise UsageError(f"expected RUN ROOT (or model= and data_dir=), found {' '.join(given.values()) or 'nothing'}")
    return given["model"], Path(given["data_dir"]), load_config(ExtractConfig, file=file, overrides=overrides)


extract_command = with_settings(ExtractConfig)

# --------------------------------------------------------------------------------------------- evaluate knn

KnnWords = Annotated[list[str] | None, typer.Argument(metavar="RUN LABELS [KEY=VALUE]...", hidden=True)]


def knn(words: KnnWords = None, config: ConfigFile = None) -> None:
    """Evaluate frozen features by weighted k-nearest-neighbour classification.

    RUN is a run folder, a checkpoint file or timm:NAME. LABELS is a CSV (commas, semicolons or tabs) with the columns
    image_path, label and partition (train or test), and optionally slide_id and patient_id. Test slides and patients
    that the model was pretrained on are an error. Relative paths resolve from the CSV. The scores of a run are written
    to RUN/knn_LABELS.json, named after the CSV; output=FILE writes them elsewhere.

    For example:

        dino evaluate knn runs/patch labels.csv k=[10,20]
    """
    positional, overrides = split(words or [])
    model, labels = expect(positional, ["RUN", "LABELS"])
    settings = load_config(KnnConfig, file=config, overrides=overrides)
    from dino import api, progress

    result = api.evaluate_knn(model, Path(labels), settings)
    progress.table(*_score_table(result))


def _score_table(result: Mapping[str, Any]) -> tuple[list[list[str]], list[str]]:
    """Rows and header of the scores: one column per network or baseline, one row per metric and standard error."""
    errors = result["standard_errors"]
    columns = list(errors)
    rows = []
    for metric in result[columns[0]]:
        rows.append([metric, *(_format_score(result[name][metric]) for name in columns)])
        if metric in errors[columns[0]]:
            k = metric.removeprefix("knn_").removesuffix("_accuracy")
            rows.append(
                [f"{k}-NN accuracy, standard error", *(_format_score(errors[name].get(metric)) for name in columns)]
            )
    return rows, ["", *columns]


def _format_score(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.4f}"


knn_command = with_settings(KnnConfig)

# --------------------------------------------------------------------------------------------------- export

ExportWords = Annotated[list[str] | None, typer.Argument(metavar="RUN DIR [KEY=VALUE]...", hidden=True)]


def export(words: ExportWords = None, config: ConfigFile = None) -> None:
    """Write the teacher's backbone as a folder that timm reads.

    RUN is a run or a checkpoint file, external ones too. Afterwards, in Python:

        timm.create_model("local-dir:DIR", pretrained=True)

    For example:

        dino export runs/patch vit_small_ours
        dino export dino_deitsmall16_pretrain.pth vit_small_dino transform=imagenet
    """
    positional, overrides = split(words or [])
    source, folder = expect(positional, ["RUN", "DIR"])
    settings = load_config(ExportConfig, file=config, overrides=overrides)
    from dino import api

    api.export(source, Path(folder), settings)


export_command = with_settings(ExportConfig)

# ----------------------------------------------------------------------------------------------------- info

InfoWords = Annotated[list[str] | None, typer.Argument(metavar="CHECKPOINT [KEY=VALUE]...", hidden=True)]


InfoAll = Annotated[bool, typer.Option("--all", help="Print everything, with the settings of the run.")]
INFO_KEYS = (
    *("source", "kind", "level", "arch", "embed_dim", "patch_size"),
    *("transform.name", "spacing_um", "tile_size_px", "step"),
)


def info(words: InfoWords = None, config: ConfigFile = None, everything: InfoAll = False) -> None:
    """Describe a checkpoint: architecture, training, transform, spacing and tile size.

    CHECKPOINT is a run, a checkpoint file (external ones too) or an export.

    For example:

        dino info runs/patch
    """
    positional, overrides = split(words or [])
    (source,) = expect(positional, ["CHECKPOINT"])
    settings = load_config(InfoConfig, file=config, overrides=overrides)
    from dino import api, progress

    rows = dict(flat_scalars(api.info(source, settings.arch)))
    shown = rows if everything else {key: rows[key] for key in INFO_KEYS if key in rows}
    progress.table(list(shown.items()))
    if not everything:
        progress.say(f"--all prints {len(rows) - len(shown)} more values")


info_command = with_settings(InfoConfig)

# --------------------------------------------------------------------------------------------------- replay

ReplayWords = Annotated[list[str] | None, typer.Argument(metavar="RUN/failure [KEY=VALUE]...", hidden=True)]
REPLAY_HEADER = ("sample", "draw", "loss", "largest input", "broken teacher views", "broken student views")


def replay(words: ReplayWords = None) -> None:
    """Repeat a training step that was not finite, and find the samples that cause it.

    RUN/failure is the folder that the run wrote. Nothing is written; settings may be changed for the replay.

    For example:

        dino replay runs/patch/failure
        dino replay runs/patch/failure speed.precision=fp32
    """
    positional, changes = split(words or [])
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
        return f"step {step} is finite this time: run the command again; if it fails once more, suspect the hardware"
    if suspects:
        return f"step {step} is not finite again, because of {', '.join(suspects)}: look at these samples"
    return (
        f"step {step} is not finite again, but every sample is by itself: lower optim.lr, or set speed.precision=fp32"
    )


# ---------------------------------------------------------------------------------------------- launch slurm

SlurmWords = Annotated[list[str] | None, typer.Argument(metavar="COMMAND... [KEY=VALUE]...", hidden=True)]
AnyRecipe = Annotated[str | None, typer.Option("--recipe", metavar="NAME", help="Defaults of a pretraining.")]
SlurmFile = Annotated[Path | None, typer.Option("--slurm", metavar="FILE", help="YAML with slurm: settings.")]
LAUNCHED = {("pretrain", "patch"): "patch_pathology", ("pretrain", "region"): "region", ("extract",): None}


def slurm(
    words: SlurmWords = None, config: ConfigFile = None, recipe: AnyRecipe = None, slurm: SlurmFile = None
) -> None:
    """Submit a pretraining or an extraction to SLURM, one task per GPU, restarted until it is done.

    COMMAND is `pretrain patch ROOT RUN`, `pretrain region ROOT RUN` or `extract RUN ROOT` with its own settings;
    the settings of the job are below. Before the time limit and at a preemption, the run is saved and the job requeued.
    `dry_run=true` prints what would be submitted. Needs `pip install 'histodino[slurm]'`.

    For example:

        dino launch slurm pretrain patch data runs/patch slurm.nodes=2 slurm.gpus_per_node=8 training.nepochs=100
        dino launch slurm extract runs/patch data slurm.gpus_per_node=4 slurm.partition=gpu
    """
    positional, overrides = split(words or [])
    job_settings = [word for word in overrides if word.startswith("slurm.")]
    rest = [word for word in words or [] if word not in job_settings]
    name = next((name for name in LAUNCHED if tuple(positional[: len(name)]) == name), None)
    if name is None:
        raise UsageError(
            f"expected pretrain patch, pretrain region or extract, found {' '.join(positional[:2]) or '-'}"
        )
    for word in name:
        rest.remove(word)
    settings = load_config(LaunchConfig, file=slurm, overrides=job_settings).slurm
    from dino import api, progress

    if name == ("extract",):
        model, root, work_config = extract_arguments(rest, config)
        work, output = partial(api.extract, model, root, work_config), root.resolve()
    else:
        work_config = pretrain_settings(name[1], rest, config, recipe or LAUNCHED[name])
        if not work_config.output_dir:
            raise UsageError("expected ROOT and RUN, found no RUN")
        work, output = partial(api.pretrain, work_config), Path(work_config.output_dir).resolve()
    folder = settings.folder or output.parent / f"{output.name}_slurm"
    submission = api.launch_slurm(work, settings, folder, dry_run=work_config.dry_run)
    rows = [(key, str(value)) for key, value in submission.parameters.items() if value is not None]
    progress.table([("command", shlex.join(["dino", *name, *rest])), ("output", str(submission.folder)), *rows])
    typer.echo(f"submitted as job {submission.job}" if submission.job else "dry run: nothing was submitted")


slurm_command = with_settings(LaunchConfig)

# --------------------------------------------------------------------------------------------------- config

ConfigWords = Annotated[list[str] | None, typer.Argument(metavar="COMMAND [KEY=VALUE]...", hidden=True)]
StartRecipe = Annotated[str | None, typer.Option("--recipe", metavar="NAME", help="Recipe to start from.")]

SCHEMAS: dict[str, type] = {
    "tile": TileConfig,
    "pretrain patch": PatchConfig,
    "pretrain region": RegionConfig,
    "extract": ExtractConfig,
    "evaluate knn": KnnConfig,
    "export": ExportConfig,
    "info": InfoConfig,
    "launch slurm": LaunchConfig,
    "demo": DemoConfig,
}


def config(words: ConfigWords = None, config: ConfigFile = None, recipe: StartRecipe = None) -> None:
    """Print all settings of a command as YAML, resolved and with comments.

    COMMAND is tile, patch, region, extract, knn, export, info, slurm or demo. Values that differ from the default are
    marked. The output can be saved, edited and passed to the command with --config.

    For example:

        dino config patch > my.yaml
        dino config patch --recipe patch model.arch=vit_base
    """
    positional, overrides = split(words or [])
    typer.echo(resolved_yaml(" ".join(positional), overrides, config, recipe), nl=False)


def resolved_yaml(name: str, overrides: list[str], file: Path | None = None, recipe: str | None = None) -> str:
    """The settings of a command as YAML text.

    Args:
        name: The command, such as ``pretrain patch``; one of its words is enough.
        overrides: ``key=value`` strings.
        file: The user's YAML.
        recipe: Name of a recipe; None for the one that the command starts from.

    Raises:
        UsageError: If there is no such command.
        ConfigError: If the settings or the recipe are wrong.
    """
    command = next((known for known in SCHEMAS if name and name in (known, *known.split())), None)
    if name == "pretrain" or command is None:
        names = ", ".join(known.split()[-1] for known in SCHEMAS)
        raise UsageError(f"expected one of {names}, found {name or 'nothing'}")
    kind = SCHEMAS[command]
    recipe = recipe or next(iter(RECIPES.get(kind, ())), None)
    resolved = load_config(kind, recipe=recipe, file=file, overrides=overrides)
    values = flatten(to_dict(resolved))
    changed = sum(values[item.key] != item.default for item in all_settings(kind))
    origin = f", recipe {recipe}" if recipe else ""
    verb = "differs" if changed == 1 else "differ"
    head = [
        f"# Settings of `dino {command}`{origin}. Pass a copy with --config, or single settings as key=value.",
        f"# {changed or 'None'} of {len(values)} {verb} from the defaults{', marked [default: …]' if changed else ''}.",
        *(["#", recipe_comment(kind, recipe)] if recipe else []),
    ]
    return "\n".join(head) + "\n\n" + to_commented_yaml(resolved)


# ----------------------------------------------------------------------------------------------------- demo

DemoWords = Annotated[list[str] | None, typer.Argument(metavar="[DIR] [KEY=VALUE]...", hidden=True)]


def demo(words: DemoWords = None, config: ConfigFile = None) -> None:
    """Run the whole chain on the sample slide that ships with the package.

    Tiles, pretrains both levels, extracts and evaluates; writes report.html and summary.json into DIR (./demo if not
    given). It takes some minutes on two cores and needs neither a GPU nor a network. It shows that the parts work
    together, not how good a model can be.

    For example:

        dino demo demo
    """
    positional, overrides = split(words or [])
    if len(positional) > 1:
        raise UsageError(f"expected one DIR at most, found {len(positional)}: {' '.join(positional)}")
    settings = load_config(DemoConfig, file=config, overrides=overrides)
    from dino.demo import run_demo

    run_demo(Path(positional[0] if positional else "demo"), settings)


demo_command = with_settings(DemoConfig)
