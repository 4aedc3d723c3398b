"""The runs that the viewer was given: which are of level 1, which of level 2, and whose features these read.

What runs and exports record as JSON is enough for most, so that the viewer starts without torch.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dino import files
from dino.errors import DataError
from dino.extraction.catalogue import Catalogue
from dino.extraction.folders import CHECKPOINTS, encoder_name, find_grids, grid_folder, tile_folder
from dino.extraction.record import RECORD, grid_source, read_record
from dino.models.grid_source import KEY, GridSource, check_same_source
from dino.models.prefixes import HUB, TIMM

RUN_RECORD, EXPORT_RECORD = "identity.json", "config.json"  # of a run folder, and of an export
EXPORTED = "histodino"  # the section of this package in the latter


@dataclass(frozen=True)
class Runs:
    """Runs by level.

    Attributes:
        names: Encoders of level 1 that were named, by run or by name, in the order in which they are offered.
        tiles: Level-1 run by its encoder, without those that were only named.
        regions: Level-2 run and the folder of the grids that it reads, by their encoder.
    """

    names: Sequence[str]
    tiles: Mapping[str, str]
    regions: Mapping[str, tuple[str, Path]] = field(default_factory=dict)


def sort_runs(catalogue: Catalogue, runs: Sequence[str]) -> Runs:
    """Sort runs by level, and find the features of ROOT that each is of.

    Args:
        catalogue: The ROOT.
        runs: Run folders, checkpoints, exports, or names of encoders.

    Raises:
        CheckpointError: If a file that has to be read for that is not a checkpoint.
        DataError: If ROOT has no features of a level-1 run, or not those that a level-2 run was trained on.
    """
    found = [(run, *_grids_of(catalogue, run)) for run in runs]
    wanted = {_encoder(catalogue, run): run for run, level_2, _ in found if not level_2}
    names = list(wanted)
    regions: dict[str, tuple[str, Path]] = {}
    for run, source in ((run, source) for run, level_2, source in found if level_2):
        encoder = _encoder_of_grids(catalogue, run, source, list(wanted))
        if encoder in regions:
            raise DataError(
                f"expected at most one level-2 run of the features of '{encoder}', found {regions[encoder][0]} and "
                f"{run}; pass one of them"
            )
        regions[encoder] = (run, _grid_folder(catalogue, run, encoder, source))
        names = [*dict.fromkeys([*names, encoder])]
    tiles = {name: run for name, run in wanted.items() if name != run or _is_run(Path(run))}
    return Runs(names, tiles, regions)


def _encoder(catalogue: Catalogue, run: str) -> str:
    """The encoder that is meant: one of that name, or that of a run."""
    return run if run in catalogue.encoders else encoder_name(run)


def _grids_of(catalogue: Catalogue, run: str) -> tuple[bool, GridSource | None]:
    """Whether a run is of level 2, and the level-1 model of its grids, None where that is not recorded."""
    record = _recorded(Path(run))
    if KEY in record:
        return True, GridSource.from_dict(record[KEY])
    known = _encoder(catalogue, run) in catalogue.encoders or run.startswith((TIMM, HUB))
    if known or not Path(run).exists():
        return False, None
    from dino.models.weights import load_backbone_file  # imports torch

    loaded = load_backbone_file(run)
    return loaded.transform is None, loaded.grids


def _is_run(folder: Path) -> bool:
    """Whether a folder whose name is also that of an encoder is a run or an export."""
    return (folder / CHECKPOINTS).is_dir() or bool(_recorded(folder))


def _recorded(folder: Path) -> Mapping[str, Any]:
    """What a run folder or an export records of its training; empty for anything else."""
    for name in (RUN_RECORD, EXPORT_RECORD):
        with suppress(OSError, ValueError):
            content = files.read_json(folder / name)
            content = content.get(EXPORTED) if isinstance(content, dict) and name == EXPORT_RECORD else content
            if isinstance(content, dict):
                return content
    return {}


def _encoder_of_grids(catalogue: Catalogue, run: str, source: GridSource | None, wanted: Sequence[str]) -> str:
    """The encoder of ROOT whose grids a level-2 run reads.

    Raises:
        DataError: If it has no features there, or is not known.
    """
    if source is None:
        if not wanted:
            raise DataError(
                f"expected the level-1 run whose features {run} reads, which is of level 2 and has no record of it, "
                f"found none; pass it first: dino view {catalogue.root} LEVEL1 {run}"
            )
        return wanted[0]
    made_by = {name: read_record(tile_folder(catalogue.root, name) / RECORD) for name in catalogue.encoders}
    same = [name for name, record in made_by.items() if record.get("fingerprint") == source.fingerprint]
    if not same:
        raise DataError(
            f"expected features of {source.name}, the level-1 model of the level-2 run {run}, in {catalogue.root}, "
            f"found those of {', '.join(made_by) or 'none'}; run `dino extract {source.model} {catalogue.root}`, then "
            f"`dino view {catalogue.root} {source.model} {run}`"
        )
    return next((name for name in wanted if name in same), same[0])


def _grid_folder(catalogue: Catalogue, run: str, encoder: str, source: GridSource | None) -> Path:
    """The folder of the grids of an encoder.

    Raises:
        DataError: If there is none, or its grids are of another model.
    """
    named = grid_folder(catalogue.root, encoder)
    folder = find_grids(catalogue.root, encoder if source is None and named.is_dir() else None, source)
    if folder is None:
        raise DataError(
            f"expected the features of regions in {catalogue.root} for the level-2 run {run}, found none; extract them "
            f"with the level-1 run: dino extract LEVEL1 {catalogue.root}"
        )
    check_same_source(source, grid_source(folder), run, str(folder))
    return folder
