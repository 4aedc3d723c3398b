"""Several data folders that one run is trained on: whether they fit each other, and what is recorded of them."""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dino import progress
from dino.api.roots import HeldOut, Root
from dino.data import Dataset
from dino.errors import DataError
from dino.evaluate.contents import find_copies
from dino.files import printable
from dino.slides.remote import Location
from dino.slides.tables import SlideStatus

NAMED = 3  # examples in messages


def check_slide_ids(roots: Sequence[Root], datasets: Sequence[Dataset]) -> list[str]:
    """Check that a slide id means one slide.

    Args:
        roots: The data folders.
        datasets: Their tiles.

    Returns:
        A warning if that is not known.

    Raises:
        DataError: If two folders have different slides under one id.
    """
    ids = [dataset.slide_ids for dataset in datasets]
    counts = Counter(slide for one in ids for slide in one)
    shared = sorted(slide for slide, count in counts.items() if count > 1)
    files = {
        slide: [
            root.status[slide].image_path if slide in root.status else None
            for root, own in zip(roots, ids, strict=True)
            if slide in own
        ]
        for slide in shared
    }
    differing = [slide for slide, paths in files.items() if not _one_file([path for path in paths if path])]
    if differing:
        raise DataError(
            f"expected slide ids that mean one slide in all data folders, found {len(differing)} of different files, "
            f"such as {_some(differing)}; rename them in slides.csv and tile them again"
        )
    unknown = [slide for slide, paths in files.items() if None in paths]
    if not unknown:
        return []
    return [f"{len(unknown)} slide ids are in several data folders, such as {_some(unknown)}: taken as one slide each"]


def _one_file(paths: Sequence[Location]) -> bool:
    """Whether files are one, or copies of one; of files that are not there, the names are compared."""
    different = list({Path(os.path.realpath(path)) if isinstance(path, Path) else path for path in paths})
    if len(different) < 2:
        return True
    local = [path for path in different if isinstance(path, Path) and path.is_file()]
    if len(local) == len(different):
        return len(find_copies(local)) == len(local) - 1
    return len({path.name for path in different}) == 1


def _some(slides: Sequence[str]) -> str:
    return ", ".join(printable(slide) for slide in slides[:NAMED])


def joined_status(roots: Sequence[Root]) -> dict[str, SlideStatus]:
    """What is recorded of the slides of all folders; of a slide in several, what the first one records."""
    return {slide: row for root in reversed(roots) for slide, row in root.status.items()}


def joined_held_out(parts: Sequence[HeldOut]) -> HeldOut:
    """Number of held-out slides and tiles of all folders by partition."""
    words = sorted({word for part in parts for word in part})
    pairs = {word: [part[word] for part in parts if word in part] for word in words}
    return {word: (sum(slides for slides, _ in found), sum(n for _, n in found)) for word, found in pairs.items()}


def joined_filter(roots: Sequence[Root]) -> dict[str, Any] | None:
    """What a filter left out of all folders, for ``status.json``; None without one."""
    chosen = [root.selection for root in roots if root.selection]
    if not chosen:
        return None
    left_out: Counter[str] = Counter()
    for one in chosen:
        left_out.update(one.left_out)
    return {**chosen[0].to_dict(), "tiles": sum(one.tiles for one in chosen), "left_out": dict(left_out)}


def joined_geometry(roots: Sequence[Root], parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Spacing and size of the tiles of all folders: those of the first, and all spacings where there are several.

    Folders that differ are said in one line.

    Args:
        roots: The data folders.
        parts: The geometry of each, see ``Level.geometry``.
    """
    geometry = dict(parts[0])
    each = [list(part.get("spacings_um") or [part["spacing_um"]]) for part in parts]
    spacings = sorted({spacing for part in each for spacing in part if spacing is not None})
    if len(spacings) > 1:
        geometry["spacings_um"] = spacings
    if len({(tuple(spacing), part["tile_size_px"]) for spacing, part in zip(each, parts, strict=True)}) > 1:
        words = [
            f"{printable(root.path)}: {_px(part['tile_size_px'])} at {' and '.join(map(_um, spacing))}"
            for root, spacing, part in zip(roots, each, parts, strict=True)
        ]
        progress.say(f"tiles of several kinds are trained on together: {'; '.join(words)}")
    return geometry


def _px(size: int | None) -> str:
    return f"{size} px" if size else "unknown size"


def _um(spacing: float | None) -> str:
    return f"{spacing:g} µm/px" if spacing else "unknown spacing"
