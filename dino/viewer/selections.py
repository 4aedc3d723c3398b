"""Tiles that someone selected in the viewer and named, saved as GeoJSON under ROOT (``annotate=true``)."""

import json
import re
from pathlib import Path
from typing import Any

from dino import files
from dino.errors import DataError
from dino.extraction.catalogue import Catalogue
from dino.viewer.geojson import outline_feature

FOLDER = "annotations"
MAX_NAME = 100  # characters
SELECTION_COLOUR = (255, 200, 0)


def save_selection(catalogue: Catalogue, slide_id: str, body: bytes) -> str:
    """Save tiles of a slide with a name; a selection of the same name is replaced.

    Args:
        catalogue: The ROOT.
        slide_id: The slide, which must be one of the ROOT.
        body: JSON with ``name`` and ``tiles``, indices of tiles of the slide.

    Returns:
        The name of the file, ``ROOT/annotations/<slide>.geojson``, which has all selections of the slide.

    Raises:
        DataError: If the body is not as described, or cannot be saved.
    """
    name, tiles = _parsed(body, len(catalogue.tiles[slide_id].coords) if slide_id in catalogue.tiles else 0)
    path = catalogue.root / FOLDER / f"{slide_id}.geojson"
    selection = outline_feature(catalogue.tiles[slide_id], tiles, name, SELECTION_COLOUR, key=f"selection/{name}")
    kept = _existing(path, name) if path.exists() else []
    content = {"type": "FeatureCollection", "features": [*kept, selection]}
    with files.oserror_to_data_error(path.parent):
        files.write_text(path, json.dumps(content) + "\n")
    return path.name


def _parsed(body: bytes, count: int) -> tuple[str, list[int]]:
    try:
        content = files.parse_json(body.decode())
        name, tiles = content["name"].strip(), content["tiles"]
        good = bool(re.fullmatch(rf"[^\x00-\x1f\x7f]{{1,{MAX_NAME}}}", name)) and bool(tiles)
        good = good and all(type(tile) is int and 0 <= tile < count for tile in tiles)
    except (ValueError, KeyError, TypeError, AttributeError):
        good = False
    if not good:
        raise DataError(f"expected a name of 1 to {MAX_NAME} characters and indices of tiles, found something else")
    return name, sorted(set(tiles))


def _existing(path: Path, name: str) -> list[dict[str, Any]]:
    try:
        features = files.read_json(path)["features"]
        return [one for one in features if one["properties"].get("name") != name]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise DataError(f"expected the selections of a slide in {path.name}, could not read it; move it away") from None
