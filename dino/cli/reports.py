"""Commands to look at runs: ``dino report`` and ``dino figure``."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Annotated

import typer

from dino.cli.command import ConfigFile, with_settings
from dino.cli.grammar import UsageError, expect, split
from dino.config.load import load_config
from dino.config.schema import FigureConfig, ReportConfig

ReportArguments = Annotated[list[str] | None, typer.Argument(metavar="RUN... [ROOT] [OUT] [KEY=VALUE]...", hidden=True)]
FigureArguments = Annotated[list[str] | None, typer.Argument(metavar="KIND MODEL ROOT OUT [KEY=VALUE]...", hidden=True)]
HTML = (".html", ".htm")
DATA = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".webp", ".bmp", ".pt", ".h5", ".tar", ".parquet")
LOOKED_AT = 10_000  # files of a folder


def report(arguments: ReportArguments = None, config: ConfigFile = None) -> None:
    """Write a report on runs as one HTML page, which needs no network.

    RUN is the folder of a run of either level, finished or running; runs of one level are compared. ROOT is the folder
    that they were trained on, needed only if it was moved. OUT is an HTML file or a folder (default: RUN/report.html).
    The arguments are told apart by what they are, and may be in any order. Every run writes its report at its end
    (logging.report).

    The page has the tiles of a slide, training crops, curves, scores, maps of features, nearest neighbours from other
    patients, attention, what the study used and took, a methods paragraph and all settings. What is not there any more
    is left out, which the page says.

    For example:

        dino report runs/patch
        dino report runs/patch runs/region data level1and2.html
        dino report runs/a runs/b runs/c comparison.html tiles=500
    """
    positional, overrides = split(arguments or [])
    settings = load_config(ReportConfig, file=config, overrides=overrides)
    found = recognise(positional)
    from dino import api, progress

    progress.say(f"report: {api.report(found.runs, found.root, found.output, settings)}")


report_command = with_settings(ReportConfig)


@dataclass
class Recognised:
    """Arguments by what they are."""

    runs: list[Path] = field(default_factory=list)
    root: Path | None = None
    output: Path | None = None


def recognise(words: Sequence[str]) -> Recognised:
    """Tell runs, ROOT and OUT of ``dino report`` apart.

    Args:
        words: Positional arguments.

    Raises:
        UsageError: If there is neither a run nor a ROOT, or more than one ROOT or OUT; or if a path is none of them.
    """
    found = Recognised()
    for word in words:
        path = Path(word)
        if path.suffix.lower() in HTML:
            _set(found, "output", path, "OUT")
        elif (path / "config.yaml").is_file() and (path / "identity.json").is_file():
            found.runs.append(path)
        elif path.is_dir() and _has_data(path):
            _set(found, "root", path, "ROOT")
        elif path.is_dir() or word.endswith("/"):
            _set(found, "output", path / "report.html", "OUT")
        else:
            raise UsageError(
                f"expected a run folder (with config.yaml and identity.json), ROOT, or OUT (*.html, or a folder), "
                f"found {word}, which is {'a file' if path.exists() else 'not there'}; check the path"
            )
    if not found.runs and found.root is None:
        raise UsageError(f"expected at least one RUN, found {' '.join(words) or 'no arguments'}")
    return found


def _set(found: Recognised, name: str, path: Path, shown: str) -> None:
    earlier = getattr(found, name)
    if earlier is not None:
        raise UsageError(f"expected one {shown}, found {earlier} and {path}; omit one of them")
    setattr(found, name, path)


def _has_data(folder: Path) -> bool:
    """Whether a folder holds what `dino tile` or `dino extract` wrote, or other images or grids."""
    if (folder / "tiling.json").exists():
        return True
    files = (name for _, _, names in os.walk(folder) for name in names)
    return any(name.lower().endswith(DATA) for name in islice(files, LOOKED_AT))


def figure(arguments: FigureArguments = None, config: ConfigFile = None) -> None:
    """Write one figure of the report for a publication, with scale bars in µm.

    KIND is attention (of the cls token over tiles or, by a level-2 model, over regions), heatmap (the same in place on
    a whole slide), neighbours (nearest tiles from other patients), pca (tiles of a slide coloured by their features),
    umap (tiles as points, needs umap-learn) or words (typical tiles of each word of `dino words`; with word=N one word
    over its slides, with slide=ID all words over one slide). MODEL is a run folder, a checkpoint, an export or
    timm:NAME. ROOT is a folder that `dino tile` wrote, or for attention, neighbours and umap any folder of images. OUT
    is a .png, .pdf or .svg file; in the last two, text and lines are vectors.

    For example:

        dino figure attention runs/patch data attention.pdf slide=a1 tile=8192,4096 heads=[1,4]
        dino figure heatmap runs/region data heatmap.png slide=a1 level_1=runs/patch
        dino figure neighbours runs/patch data neighbours.svg rows=3 k=6 untrained=true
        dino figure words runs/patch data words.pdf
        dino figure umap runs/patch data umap.pdf by=centre tiles=5000
    """
    positional, overrides = split(arguments or [])
    kind, model, root, output = expect(positional, ["KIND", "MODEL", "ROOT", "OUT"])
    settings = load_config(FigureConfig, file=config, overrides=overrides)
    from dino import api, progress

    progress.say(f"figure: {api.figure(kind, model, Path(root), Path(output), settings)}")


figure_command = with_settings(FigureConfig)
