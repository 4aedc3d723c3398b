"""``attention.json``: the models and settings of the maps in a folder, in the words of ``extract.json``.

Every file of a map has the same record in the description of its image, so that it says what made it wherever it is.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dino.config.schema import AttentionConfig
from dino.extraction.folders import encoder_name
from dino.extraction.pyramid import SUFFIX, read_description, write_pyramid
from dino.extraction.record import COMPARED, check_folder, differences, model_record, write_record
from dino.files import oserror_to_data_error
from dino.models.grid_source import SHOWN, GridSource
from dino.slides.lattice import Geometry
from dino.slides.reader import BACKEND, RESAMPLER

if TYPE_CHECKING:  # imports torch, which the viewer does not need at its start
    from dino.models.weights import LoadedBackbone

MAP_RECORD = "attention.json"
REGION = "region"  # the record of the level-2 model
SETTINGS = ("method", "offsets", "stride")
UNKNOWN = "an unknown model"
SLIDE = "slide"  # what is recorded of one file only


def map_record(
    tile: "LoadedBackbone",
    region: "LoadedBackbone | None",
    grids: GridSource | None,
    geometry: Geometry,
    config: AttentionConfig,
) -> dict[str, Any]:
    """What makes maps of attention, of all slides.

    Args:
        tile: The level-1 model.
        region: The level-2 model, if any.
        grids: The source of the grids that it reads; None if that is not recorded.
        geometry: How the slides were tiled.
        config: Settings.
    """
    of_grids = {key: getattr(grids, key) for key in ("fingerprint", "transform", "precision")} if grids else None
    return {
        **model_record(tile, config.precision, tile.backbone.embed_dim),
        "geometry": asdict(geometry),
        "backend": BACKEND,
        "resampler": RESAMPLER,
        REGION: model_record(region, config.precision, region.backbone.embed_dim) if region else None,
        "grids": of_grids if region else None,
        "method": config.method,
        "offsets": config.offsets,
        "stride": config.stride if region else None,
    }


def map_differences(before: Mapping[str, Any], record: Mapping[str, Any]) -> list[str]:
    """What makes the maps of two records different, in words; empty for maps that may be in one folder."""
    return differences(before, record, (*COMPARED, *SETTINGS)) + _other_level_2(before, record)


def other_models(before: Mapping[str, Any], record: Mapping[str, Any]) -> list[str]:
    """Whether the maps of two records are of other models, in words; empty if not, or if it is not recorded."""
    found = other_model(record, before)
    return found + _other_level_2(before, record) if before and record else found


def other_model(maps: Mapping[str, Any], features: Mapping[str, Any]) -> list[str]:
    """Whether maps are of another level-1 model than features, in words; empty if not, or if it is not recorded."""
    known = "fingerprint" in maps and "fingerprint" in features
    return differences(features, maps, ("fingerprint",)) if known else []


def _other_level_2(before: Mapping[str, Any], record: Mapping[str, Any]) -> list[str]:
    first, second = (one.get(REGION) or {} for one in (before, record))
    if first and second:
        return [f"level 2: {text}" for text in differences(first, second, ("fingerprint",))]
    if first or second:
        return [f"level 2: {first.get('model', 'no model')}, now {second.get('model', 'no model')}"]
    return []


def made_by(record: Mapping[str, Any]) -> str:
    """The models of a record by name and fingerprint, without the paths of this computer."""
    if "fingerprint" not in record:
        return UNKNOWN
    models = [record, record[REGION]] if record.get(REGION) else [record]
    return " and ".join(f"{encoder_name(str(one['model']))} ({str(one['fingerprint'])[:SHOWN]})" for one in models)


@dataclass(frozen=True)
class MapOutput:
    """A file of maps that is to be written.

    Attributes:
        path: The file.
        record: What it is of.
    """

    path: Path
    record: Mapping[str, Any]

    def is_written(self) -> bool:
        """Whether it was written before, of the same."""
        before = read_description(self.path)
        return before.get(SLIDE) == self.record[SLIDE] and not map_differences(before, self.record)

    def write(
        self, channels: Callable[[], Iterator[np.ndarray]], names: Sequence[str], size: tuple[int, int], um: float
    ) -> None:
        """Write it; the arguments are those of :func:`dino.extraction.pyramid.write_pyramid`."""
        write_pyramid(self.path, channels, names, size, um, record=self.record)


@dataclass(frozen=True)
class MapFiles:
    """The files of maps in a folder.

    Attributes:
        folder: The folder.
        record: What they are of.
    """

    folder: Path
    record: Mapping[str, Any]

    def prepare(self) -> None:
        """Create the folder, and record what the maps are of.

        Raises:
            DataError: If there are maps of other models or settings, or images that may be anything, such as slides;
                or if the disk cannot be written.
        """
        path, another = self.folder / MAP_RECORD, "name another folder as OUT"
        with oserror_to_data_error(self.folder):
            before = check_folder(
                path, self.record, self.folder, ".tif", content="maps", elsewhere=another, compare=map_differences
            )
            if not before:
                write_record(path, self.record, before)

    def of(self, slide_id: str, coords: np.ndarray, corners: Sequence[tuple[int, int]]) -> MapOutput:
        """The file of a slide; its record has the slide's name, and a hash of the tiles and regions that are mapped.

        Args:
            slide_id: The slide.
            coords: ``(N, 2)`` level-0 x and y of its tiles.
            corners: Level-0 ``(x, y)`` of its regions.
        """
        places = json.dumps([sorted(coords.tolist()), sorted(corners)])
        of_slide = {"slide_id": slide_id, "places": hashlib.sha256(places.encode()).hexdigest()}
        return MapOutput(self.folder / f"{slide_id}{SUFFIX}", {**self.record, SLIDE: of_slide})
