"""Commands that map what models see on slides: ``dino attention``."""

from pathlib import Path
from typing import Annotated

import typer

from dino.cli.command import ConfigFile, end, with_settings
from dino.cli.grammar import UsageError, split
from dino.config.load import load_config
from dino.config.schema import AttentionConfig

AttentionArguments = Annotated[
    list[str] | None, typer.Argument(metavar="MODEL [REGION_MODEL] ROOT [OUT] [KEY=VALUE]...", hidden=True)
]


def attention(arguments: AttentionArguments = None, config: ConfigFile = None) -> None:
    """Map the attention of models over whole slides, as numbers in place.

    MODEL is a level-1 model (a run folder, a checkpoint, an export or timm:NAME), REGION_MODEL a level-2 model that was
    trained on its features. ROOT is a folder that `dino tile` wrote and, for level 2, `dino extract` filled. A file
    OUT/SLIDE.ome.tif is written for each slide: a pyramidal OME-TIFF with its spacing in µm, which QuPath and napari
    open. Without OUT it is ROOT/attention_MODEL, where `dino view ROOT` finds it. Its channels are the attention of the
    cls token of level 1 over the tokens of the tiles, that of level 2 over the tiles of the regions, each as the mean
    over heads and by head, and their product as in HIPT. All are relative to uniform attention, which is 1; where
    tiles or regions overlap, they are averaged in place. What made them is recorded in OUT/attention.json and in each
    file: slides that are there are skipped, and maps of other models or settings are refused in the same OUT.

    For example:

        dino attention runs/patch data
        dino attention runs/patch runs/region data maps slide=a1 offsets=4
    """
    positional, overrides = split(arguments or [])
    if len(positional) not in (2, 3, 4):
        raise UsageError(f"expected MODEL [REGION_MODEL] ROOT [OUT], found {' '.join(positional) or 'no arguments'}")
    from dino import api
    from dino.slides.tables import TILING_FILE

    # Of three words, the last one is ROOT if it was tiled.
    with_output = len(positional) == 4 or (len(positional) == 3 and not _has(Path(positional[-1]), TILING_FILE))
    *models, root = positional[:-1] if with_output else positional
    output = Path(positional[-1]) if with_output else None
    settings = load_config(AttentionConfig, file=config, overrides=overrides)
    end(api.attention(models, Path(root), output, settings).exit_code)


def _has(folder: Path, name: str) -> bool:
    """Whether a folder has a file of that name; False for one that cannot be read."""
    try:
        return (folder / name).exists()
    except OSError:
        return False


attention_command = with_settings(AttentionConfig)
