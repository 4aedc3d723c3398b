"""Sources of the pixels of a region's cells: slides, tiles, or images of whole regions."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from dino.data.datasets import TILE_NAME
from dino.data.images import decode, list_images
from dino.data.slide_tiles import cell_tensor
from dino.errors import DataError
from dino.slides.tables import REGIONS_FOLDER, TILES_FOLDER, RegionRecord, region_path, tile_path
from dino.slides.tiled import TiledSlides

SLIDES, TILES, REGIONS = "slides", "tiles", "regions"
NOT_REGIONS = {TILES_FOLDER, "coordinates", "slide_features"}

ReadCell = Callable[[tuple[int, int]], Tensor]


@contextmanager
def cells_of_slide(slides: TiledSlides, slide_id: str, step_lv0: int) -> Iterator[ReadCell]:
    """Read cells from the slide itself.

    Args:
        slides: The slides of ROOT.
        slide_id: The slide.
        step_lv0: Footprint of its cells in the tables.

    Yields:
        A function of a cell's level-0 ``(x, y)`` to ``(1, 3, S, S)`` uint8; several threads may call it at once.

    Raises:
        DataError: If the slide cannot be read, or differs from the one that was tiled.
    """
    with slides.open(slide_id, step_lv0) as reader:
        yield lambda cell: cell_tensor(reader, *cell)[None]


@contextmanager
def cells_of_tiles(root: Path, slide_id: str, cells: Sequence[tuple[int, int]], size_px: int) -> Iterator[ReadCell]:
    """Read cells from the tiles that ``dino tile`` cut.

    Args:
        root: ROOT.
        slide_id: The slide.
        cells: All cells that will be read.
        size_px: Side of a tile.

    Yields:
        The same as :func:`cells_of_slide`.

    Raises:
        DataError: If a cell has no tile (tiles without tissue are not cut), or a tile has another size.
    """
    folders = (root, root / TILES_FOLDER / "imgs", root / TILES_FOLDER)

    def find(cell: tuple[int, int]) -> Path | None:
        path = tile_path(slide_id, *cell)
        candidates = (root / path, *(folder / path.name for folder in folders[1:]))
        return next((candidate for candidate in candidates if candidate.is_file()), None)

    found = {cell: path for cell in cells if (path := find(cell)) is not None}
    absent = [cell for cell in cells if cell not in found]
    if absent:
        raise DataError(
            f"expected a tile for every cell of slide '{slide_id}', found none for {len(absent)} of "
            f"{len(cells)}, the first at {absent[0]}; regions contain cells without tissue, for which no tile is cut: "
            "use source=slides, or what=tiles for the tiles alone"
        )

    def read(cell: tuple[int, int]) -> Tensor:
        path = found[cell]
        pixels = decode(path)
        if tuple(pixels.shape[1:]) != (size_px, size_px):
            raise DataError(f"expected a tile of {size_px} px, found {pixels.shape[2]} x {pixels.shape[1]} in {path}")
        return pixels[None]

    yield read


@dataclass(frozen=True, eq=False)
class RegionImage:
    """One image of a whole region.

    Attributes:
        path: The image.
        record: The region.
    """

    path: Path
    record: RegionRecord


def read_region_image(image: RegionImage, size_px: int) -> Tensor:
    """All cells of one region image.

    Args:
        image: The image and its region.
        size_px: Side of a cell.

    Returns:
        ``(h * w, 3, S, S)`` uint8, row-major.

    Raises:
        DataError: If the image cannot be decoded, or is not h x w cells.
    """
    height, width = image.record.grid
    pixels = decode(image.path)
    if tuple(pixels.shape[1:]) != (height * size_px, width * size_px):
        raise DataError(
            f"expected {width * size_px} x {height * size_px} px ({width} x {height} cells of {size_px} px) in "
            f"{image.path}, found {pixels.shape[2]} x {pixels.shape[1]}"
        )
    cells = pixels.unflatten(2, (width, size_px)).unflatten(1, (height, size_px))  # (3, h, S, w, S)
    return cells.permute(1, 3, 0, 2, 4).flatten(0, 1)  # (h * w, 3, S, S)


def match_region_images(root: Path, records: Sequence[RegionRecord]) -> list[RegionImage]:
    """The images under ROOT with the names of its regions, ``<slide>_<x>_<y>``; tiles and previews are ignored.

    Raises:
        DataError: If a region has no image.
    """
    folders = [p for p in sorted(root.iterdir()) if p.is_dir() and p.name not in NOT_REGIONS and p.name[0] != "."]
    images: dict[str, Path] = {}
    for folder in folders:
        if folder.name != REGIONS_FOLDER or any(p.suffix != ".pt" for p in folder.iterdir()):
            images |= {path.stem: path for path in _images_or_none(folder)}
    absent = [r.path.stem for r in records if r.path.stem not in images]
    if absent:
        raise DataError(
            f"expected an image of every region in a folder under {root}, found none for {len(absent)} of "
            f"{len(records)} (the first is {absent[0]}); use source=slides to read regions from the slides"
        )
    return [RegionImage(images[r.path.stem], r) for r in records]


def list_region_images(root: Path, size_px: int, spacing_um: float | None) -> list[RegionImage]:
    """The images of a folder of region images; slide and position are parsed from names ``<slide>_<x>_<y>``.

    Args:
        root: The folder, flat or nested.
        size_px: Side of a cell.
        spacing_um: Spacing of the images, if known.

    Returns:
        The images with placeholder records: the tissue fraction of every cell is 1, and the footprint of a cell at
        level 0 is assumed to be ``size_px``.

    Raises:
        DataError: If there are no images, two have the same name, or the size of one is not a multiple of ``size_px``.
    """
    from PIL import Image

    found: dict[str, RegionImage] = {}
    for path in list_images(root):
        if path.stem in found:
            raise DataError(f"expected unique file names, found {found[path.stem].path} and {path}; rename one")
        try:
            with Image.open(path) as image:
                width, height = image.size
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            raise DataError(f"cannot read {path}: {error}") from None
        if width % size_px or height % size_px:
            raise DataError(
                f"expected an image size that is a multiple of the cell size of {size_px} px, found {width} x "
                f"{height} px in {path}"
            )
        grid = (height // size_px, width // size_px)
        match = TILE_NAME.fullmatch(path.stem)
        slide, x, y = (match["slide"], int(match["x"]), int(match["y"])) if match else (path.stem, 0, 0)
        features = region_path(slide, x, y).with_name(f"{path.stem}.pt")
        spacing = float("nan") if spacing_um is None else spacing_um
        record = RegionRecord(slide, x, y, size_px, grid, spacing, features, np.ones(grid, np.float32))
        found[path.stem] = RegionImage(path, record)
    return list(found.values())


def _images_or_none(folder: Path) -> list[Path]:
    try:
        return list_images(folder)
    except DataError:
        return []
