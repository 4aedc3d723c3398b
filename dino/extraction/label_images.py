"""Clusters or words of the tiles of a slide as a label image: integers in place, with names and a colour table."""

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from dino.errors import DataError
from dino.extraction.catalogue import Catalogue
from dino.extraction.encoder_features import EncoderFeatures
from dino.extraction.folders import tile_folder
from dino.extraction.map_record import made_by
from dino.extraction.pyramid import SUFFIX, write_pyramid
from dino.extraction.record import RECORD, check_folder, differences, read_record, write_record
from dino.slides.tables import STATUS_TABLE, SlideTiles

LABEL_RECORD = "labels.json"
COMPARED = ("encoder", "kind", "features")  # names and colours of words may change
WORDS, CLUSTERS = "words", "clusters"
NO_LABEL = {"label": 0, "name": "no tile", "colour": [0, 0, 0]}


class LabelImages:
    """The label images of a folder, ``SLIDE.ome.tif``, and ``labels.json``, which has the names.

    Args:
        catalogue: The ROOT.
        features: Whose clusters or words.
        folder: The folder.
    """

    def __init__(self, catalogue: Catalogue, features: EncoderFeatures, folder: Path) -> None:
        self._catalogue, self._features, self._folder = catalogue, features, folder
        labels = [
            {"label": number, "name": label.name, "colour": list(label.colour)}
            for number, label in enumerate(features.labels(), 1)
        ]
        self.record: dict[str, Any] = {
            "encoder": features.encoder,
            "kind": f"{len(labels)} {WORDS if features.words else CLUSTERS}",
            "features": made_by(read_record(tile_folder(catalogue.root, features.encoder) / RECORD)),
            "labels": [NO_LABEL, *labels],
        }

    def prepare(self) -> None:
        """Create the folder and write ``labels.json``.

        Raises:
            DataError: If the folder has images of other labels, or such as are none, for example slides.
            OSError: If it cannot be written.
        """
        path, another = self._folder / LABEL_RECORD, "name another folder as OUT"
        before = check_folder(
            path,
            self.record,
            self._folder,
            ".tif",
            content="labels",
            elsewhere=another,
            compare=lambda earlier, now: differences(earlier, now, COMPARED),
        )
        if before != self.record:
            write_record(path, self.record, {})

    def write(self, slide_id: str) -> Path:
        """Write the image of a slide.

        Raises:
            DataError: If its features cannot be read, or its spacing is not recorded.
            OSError: If it cannot be written.
        """
        tiles, status = self._catalogue.tiles[slide_id], self._catalogue.slides.status[slide_id]
        if not status.spacing_um:
            raise DataError(f"expected the spacing of slide '{slide_id}' in {STATUS_TABLE}, found none; tile it again")
        labels = self._features.cluster(slide_id) + 1
        per_side = self._catalogue.tiling.geometry.positions_per_step
        values = label_image(tiles, labels, (status.width, status.height), per_side)
        path = self._folder / f"{slide_id}{SUFFIX}"
        write_pyramid(
            path,
            lambda: iter([values]),
            [f"{self.record['kind']} of {self._features.encoder}"],
            (values.shape[0], values.shape[1]),
            status.spacing_um * tiles.step_lv0 / per_side,
            record={**self.record, "slide_id": slide_id},
            colours=np.array([one["colour"] for one in self.record["labels"]], np.uint8),
        )
        return path


def label_image(tiles: SlideTiles, labels: np.ndarray, slide_size: Sequence[int], per_side: int) -> np.ndarray:
    """Labels of tiles in place. Where tiles overlap, the label is that of the tile whose centre is nearest.

    Args:
        tiles: The tiles of a slide.
        labels: ``(N,)`` label of each; 0 for none.
        slide_size: ``(width, height)`` in level-0 px.
        per_side: Positions of tiles along the side of one, which is this number of px.

    Returns:
        uint8 ``(H, W)`` for the whole cells of the slide; 0 where there is no tile.
    """
    side = tiles.step_lv0 / per_side  # of a px in level-0 px
    columns, rows = np.round(tiles.coords / side).astype(np.int64).T
    width, height = (int(length // tiles.step_lv0) * per_side for length in slide_size)
    height, width = (max(size, int(at.max()) + per_side) for size, at in ((height, rows), (width, columns)))
    image = np.zeros((height, width), np.uint8)
    middle = (per_side - 1) / 2
    within = list(product(range(per_side), repeat=2))
    known = labels > 0
    for down, across in sorted(within, key=lambda at: -((at[0] - middle) ** 2) - (at[1] - middle) ** 2):
        image[rows[known] + down, columns[known] + across] = labels[known]  # the nearest one last
    return image
