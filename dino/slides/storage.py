"""Writes the tiles of one slide: all of them under their final names, or none.

A slide's JPEGs are written into a hidden folder of ROOT, synced, and become ``imgs/<slide>`` by one rename. That is as
safe as an atomic write of each file, at one rename and a few folder syncs per slide instead of two per tile; an
interrupted run leaves nothing behind under ``imgs`` that training could take for a tile. What hs2p writes by itself
goes through the same folder.
"""

import io
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dino import files
from dino.slides.tables import TILES_FOLDER, tile_name

STORAGES = ("jpeg", "tar", "none")
PARTIAL_FOLDER = ".partial"
CACHED_TILES = 8  # side of the blocks in which a slide is read, in tiles
SYNCS_AT_ONCE = 16


def encode(pixels: np.ndarray, quality: int) -> bytes:
    """JPEG of one tile, uint8 RGB ``(h, w, 3)``; the same bytes as in hs2p's tar."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="JPEG", quality=quality)
    return buffer.getvalue()


def write_jpegs(
    root: Path,
    slide_id: str,
    origins: Sequence[tuple[int, int]],
    read_cell: Callable[[int, int], np.ndarray],
    quality: int,
) -> None:
    """Cut the tiles at level-0 ``origins`` into ``patch_256_pretraining/imgs/<slide>/<slide>_<x>_<y>.jpg``.

    Args:
        root: Output folder.
        slide_id: Name of the slide.
        origins: ``(x, y)`` of each tile.
        read_cell: Gives the pixels at ``(x, y)``.
        quality: JPEG quality.
    """
    folder = jpeg_folder(root, slide_id)
    if not origins:
        shutil.rmtree(folder, ignore_errors=True)  # what an earlier slide of this name left
        return
    with _whole_folder(root, folder) as partial:
        for x, y in in_blocks(origins):
            (partial / tile_name(slide_id, x, y)).write_bytes(encode(read_cell(x, y), quality))


def write_tar(root: Path, result: Any, quality: int) -> None:
    """Cut the tiles of hs2p's ``result`` into ``patch_256_pretraining/tars/<slide>.tiles.tar`` (and its manifest).

    Every tile is read for itself (``supertile_sizes=()``): where a level's downsample is not whole, openslide
    interpolates between pixels by the fraction of the origin, so that tiles cropped out of one larger read would not
    be the pixels of a read of their own.
    """
    from hs2p.tiling.tar import extract_tiles_to_tar

    tar = tar_path(root, result.sample_id)
    manifest = tar.with_name(f"{result.sample_id}.tiles.manifest.csv")
    with aside(root) as partial:
        extract_tiles_to_tar(result, partial, tiles_dir=partial, jpeg_quality=quality, supertile_sizes=())
        put(partial / manifest.name, manifest)
        put(partial / tar.name, tar)


def has_tiles(root: Path, slide_id: str, origins: Iterable[tuple[int, int]], storage: str) -> bool:
    """True if every tile that was recorded is still there."""
    names = {tile_name(slide_id, x, y) for x, y in origins}
    if storage == "none" or not names:
        return True
    if storage == "tar":
        return tar_path(root, slide_id).is_file()
    try:
        return names <= {path.name for path in jpeg_folder(root, slide_id).iterdir()}
    except FileNotFoundError:
        return False


def in_blocks(origins: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The origins in square blocks of the slide, so that openslide still has the neighbours' pixels decoded.

    Row by row, a wide slide would have been decoded once more for every row of tiles.
    """
    places = [(int(x), int(y)) for x, y in origins]
    steps = np.diff(np.unique([x for x, _ in places]))
    side = CACHED_TILES * int(steps.min()) if len(steps) else 1
    return sorted(places, key=lambda place: (place[1] // side, place[0] // side, place[1], place[0]))


def jpeg_folder(root: Path, slide_id: str) -> Path:
    """Folder of a slide's JPEG tiles."""
    return root / TILES_FOLDER / "imgs" / slide_id


def tar_path(root: Path, slide_id: str) -> Path:
    """Tar of a slide's tiles, as hs2p names it."""
    return root / TILES_FOLDER / "tars" / f"{slide_id}.tiles.tar"


def tidy(root: Path) -> None:
    """Take away what is not finished; only while nobody tiles into ROOT."""
    shutil.rmtree(root / PARTIAL_FOLDER, ignore_errors=True)


@contextmanager
def aside(root: Path) -> Iterator[Path]:
    """Yield an empty folder, on ROOT's disk, for what is not finished; it goes when the block ends.

    Raises:
        OSError: If ROOT has vanished: it is not made anew.
    """
    (root / PARTIAL_FOLDER).mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root / PARTIAL_FOLDER, ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def put(partial: Path, path: Path) -> None:
    """Give a file that was finished aside its place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial.chmod(0o666 & path.parent.stat().st_mode)  # hs2p's temporary files are for nobody else to read
    files.sync(partial)
    partial.replace(path)
    files.sync(path.parent)


@contextmanager
def _whole_folder(root: Path, folder: Path) -> Iterator[Path]:
    """Yield an empty folder that becomes ``folder`` (replacing an older one) when the block ends well."""
    with aside(root) as place:
        partial = place / folder.name
        partial.mkdir()
        yield partial
        # After all are written, and many at once: a sync is a wait, and a journal takes many files in one go.
        with ThreadPoolExecutor(SYNCS_AT_ONCE) as pool:
            list(pool.map(files.sync, partial.iterdir()))
        files.sync(partial)
        folder.parent.mkdir(parents=True, exist_ok=True)
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)
        files.sync(folder.parent)
