"""Writes the files of one slide: its tiles, hs2p's coordinates, and previews.

A slide's JPEGs are written to a hidden folder of ROOT, synced, and renamed to ``imgs/<slide>`` at once. That is as safe
as an atomic write of each file, but needs one rename and a few folder syncs per slide instead of two per tile; an
interrupted run leaves no incomplete slide under ``imgs`` that training could read. Files that are written by hs2p are
written to the same hidden folder and then moved.
"""

import io
import itertools
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dino import files
from dino.config.schema import TileConfig
from dino.environment import import_extra
from dino.slides.annotation_files import Outline
from dino.slides.reader import BACKEND, SlideReader
from dino.slides.remote import Location, RemoteFile
from dino.slides.tables import COORDINATES_FOLDER, TILES_FOLDER, tile_name
from dino.slides.tissue import MAX_LEVEL_PX, filter_config, segmentation_config

STORAGES = ("jpeg", "tar", "parquet", "none")
PARTIAL_FOLDER = ".partial"
BLOCK_TILES = 8  # side of the blocks in which a slide is read, in tiles
SYNC_THREADS = 16
ROW_GROUP = 64  # tiles of a parquet file that are read together
PREVIEW_DOWNSAMPLE = 32
TISSUE_COLOUR = [157, 219, 129]
OUTLINE_COLOURS = ("#d62728", "#1f77b4", "#2ca02c", "#ff7f0e", "#9467bd", "#17becf", "#8c564b", "#e377c2")


def check_extras(storage: str) -> None:
    """Raise ConfigError if a kind of storage needs a package that is not installed."""
    if storage == "parquet":
        import_extra("pyarrow", "storage=parquet", "parquet")


def encode(pixels: np.ndarray, quality: int) -> bytes:
    """JPEG bytes of one tile, uint8 RGB ``(h, w, 3)``; the same as in hs2p's tar."""
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
        read_cell: Returns the pixels at ``(x, y)``.
        quality: JPEG quality.
    """
    folder = jpeg_folder(root, slide_id)
    if not origins:
        shutil.rmtree(folder, ignore_errors=True)  # tiles of an earlier slide with this name
        return
    with _atomic_folder(root, folder) as partial:
        for x, y in in_blocks(origins):
            (partial / tile_name(slide_id, x, y)).write_bytes(encode(read_cell(x, y), quality))


def write_tar(root: Path, result: Any, quality: int) -> None:
    """Cut the tiles of hs2p's ``result`` into ``patch_256_pretraining/tars/<slide>.tiles.tar`` (and its manifest).

    Every tile is read separately (``supertile_sizes=()``): where a level's downsample is not an integer, openslide
    interpolates between pixels by the fraction of the origin, so that tiles cropped out of one larger read would
    differ from tiles read one by one.
    """
    from hs2p.tiling.tar import extract_tiles_to_tar

    tar = tar_path(root, result.sample_id)
    manifest = tar.with_name(f"{result.sample_id}.tiles.manifest.csv")
    if not len(result.x):
        tar.unlink(missing_ok=True)  # tiles of an earlier slide with this name
        return
    with temporary_folder(root) as partial:
        extract_tiles_to_tar(result, partial, tiles_dir=partial, jpeg_quality=quality, supertile_sizes=())
        move(partial / manifest.name, manifest)
        move(partial / tar.name, tar)


def write_parquet(
    root: Path,
    slide_id: str,
    origins: Sequence[tuple[int, int]],
    read_cell: Callable[[int, int], np.ndarray],
    quality: int,
) -> None:
    """Cut the tiles at level-0 ``origins`` into ``patch_256_pretraining/parquet/<slide>.parquet``.

    The columns are ``slide_id``, ``x``, ``y`` and ``jpeg``, the bytes of the file that :func:`write_jpegs` writes. The
    arguments are those of that function.
    """
    path = parquet_path(root, slide_id)
    if not origins:
        path.unlink(missing_ok=True)  # tiles of an earlier slide with this name
        return
    pa, pq = (import_extra(name, "storage=parquet", "parquet") for name in ("pyarrow", "pyarrow.parquet"))
    types = {"slide_id": pa.string(), "x": pa.int64(), "y": pa.int64(), "jpeg": pa.binary()}
    schema, places = pa.schema(list(types.items())), in_blocks(origins)
    with temporary_folder(root) as partial:
        # JPEG bytes are compressed already; statistics of them would repeat the largest ones in the footer.
        with pq.ParquetWriter(partial / path.name, schema, compression="none", write_statistics=False) as writer:
            for start in range(0, len(places), ROW_GROUP):
                group = places[start : start + ROW_GROUP]
                rows = [(slide_id, x, y, encode(read_cell(x, y), quality)) for x, y in group]
                writer.write_table(pa.table([list(column) for column in zip(*rows, strict=True)], schema=schema))
        move(partial / path.name, path)


def has_tiles(root: Path, slide_id: str, origins: Iterable[tuple[int, int]], storage: str) -> bool:
    """True if every recorded tile exists."""
    names = {tile_name(slide_id, x, y) for x, y in origins}
    if storage == "none" or not names:
        return True
    if storage == "tar":
        return tar_path(root, slide_id).is_file()
    if storage == "parquet":
        return parquet_path(root, slide_id).is_file()
    try:
        return names <= {path.name for path in jpeg_folder(root, slide_id).iterdir()}
    except FileNotFoundError:
        return False


def in_blocks(origins: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Sort origins by square blocks of the slide, so that the pixels of neighbours are still in openslide's cache.

    In row-major order, a wide slide would be decoded again for every row of tiles.
    """
    positions = [(int(x), int(y)) for x, y in origins]
    steps = np.diff(np.unique([x for x, _ in positions]))
    side = BLOCK_TILES * int(steps.min()) if len(steps) else 1
    return sorted(positions, key=lambda xy: (xy[1] // side, xy[0] // side, xy[1], xy[0]))


def jpeg_folder(root: Path, slide_id: str) -> Path:
    """Folder of a slide's JPEG tiles."""
    return root / TILES_FOLDER / "imgs" / slide_id


def tar_path(root: Path, slide_id: str) -> Path:
    """Tar of a slide's tiles, as hs2p names it."""
    return root / TILES_FOLDER / "tars" / f"{slide_id}.tiles.tar"


def parquet_path(root: Path, slide_id: str) -> Path:
    """Parquet file of a slide's tiles."""
    return root / TILES_FOLDER / "parquet" / f"{slide_id}.parquet"


def tidy(root: Path) -> None:
    """Remove unfinished files. Call it only while no other run is tiling into ROOT."""
    shutil.rmtree(root / PARTIAL_FOLDER, ignore_errors=True)


@contextmanager
def temporary_folder(root: Path) -> Iterator[Path]:
    """Yield an empty folder on ROOT's disk for unfinished files; it is removed when the block ends.

    Raises:
        OSError: If ROOT has disappeared: it is not created again.
    """
    (root / PARTIAL_FOLDER).mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root / PARTIAL_FOLDER, ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def move(partial: Path, path: Path) -> None:
    """Move a finished file from the temporary folder to its final path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial.chmod(0o666 & path.parent.stat().st_mode)  # hs2p creates files that only their owner can read
    files.sync(partial)
    partial.replace(path)
    files.sync(path.parent)


@contextmanager
def _atomic_folder(root: Path, folder: Path) -> Iterator[Path]:
    """Yield an empty folder, and rename it to ``folder`` (replacing an older one) if the block raises no error."""
    with temporary_folder(root) as parent:
        partial = parent / folder.name
        partial.mkdir()
        yield partial
        # After all files are written, and in parallel: a sync mostly waits, and a journal commits many files at once.
        with ThreadPoolExecutor(SYNC_THREADS) as pool:
            list(pool.map(files.sync, partial.iterdir()))
        files.sync(partial)
        folder.parent.mkdir(parents=True, exist_ok=True)
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)
        files.sync(folder.parent)


# ------------------------------------------------------------------------- hs2p's coordinates and previews


def tiling_result(
    reader: SlideReader, slide_id: str, config: TileConfig, tissue: Any, tiles: np.ndarray, fractions: np.ndarray
) -> Any:
    """The tiles of a slide as hs2p's ``TilingResult``, in hs2p's order (x, then y).

    Args:
        reader: The open slide.
        slide_id: Its name.
        config: The settings.
        tissue: hs2p's ``ResolvedTissueMask``.
        tiles: ``(N, 2)`` int64 level-0 ``(x, y)``.
        fractions: ``(N,)`` float32 tissue fractions.
    """
    from hs2p.tiling.result import TileGeometry, TilingResult

    order = np.lexsort((tiles[:, 1], tiles[:, 0]))
    segmented = None if tissue.mask_path else segmentation_config(config)
    thresholds = {f"seg_{n}": getattr(segmented, n, None) for n in ("sthresh", "sthresh_up", "mthresh", "close")}
    quality = filter_config(config)
    return TilingResult(
        tiles=TileGeometry(
            x=tiles[order, 0],
            y=tiles[order, 1],
            tissue_fractions=fractions[order],
            min_tissue_fraction=config.min_tissue,
            **_reading(reader),
        ),
        sample_id=slide_id,
        image_path=reader.local,
        backend=BACKEND,
        requested_backend=BACKEND,
        tolerance=reader.lattice.geometry.tolerance,
        step_px_lv0=round(reader.lattice.step_lv0 / reader.lattice.geometry.positions_per_step),
        ref_tile_size_px=quality.ref_tile_size,
        spacing_at_level_0=reader.spacing_um,
        **{name: getattr(tissue, name) for name in _FROM_TISSUE},
        **thresholds,
        **{name: getattr(quality, name) for name in _FROM_FILTERS},
    )


def _reading(reader: SlideReader) -> dict[str, Any]:
    """Arguments of hs2p's ``TileGeometry`` that describe how the tiles of a slide are read."""
    lattice, geometry = reader.lattice, reader.lattice.geometry
    return {
        "requested_tile_size_px": geometry.tile_size_px,
        "requested_spacing_um": geometry.spacing_um,
        "read_level": lattice.read_level,
        "read_tile_size_px": lattice.read_size_px,
        "read_spacing_um": reader.spacing_um * lattice.read_downsample,
        "tile_size_lv0": lattice.step_lv0,
        "is_within_tolerance": lattice.read_size_px == geometry.tile_size_px,
        "base_spacing_um": reader.spacing_um,
        "slide_dimensions": list(lattice.slide_size),
        "level_downsamples": [downsample for downsample, _ in reader.slide.level_downsamples],
        "overlap": geometry.overlap,
    }


_FROM_TISSUE = ("tissue_method", "requested_seg_downsample", "seg_downsample", "seg_level", "seg_spacing_um")
_FROM_TISSUE += ("mask_path", "tissue_mask_tissue_value", "mask_level", "mask_spacing_um")
_FROM_TISSUE += ("mask_backend", "requested_mask_backend")
_FROM_FILTERS = ("filter_white", "filter_black", "white_threshold", "black_threshold", "fraction_threshold")
_FROM_FILTERS += ("filter_grayspace", "grayspace_saturation_threshold", "grayspace_fraction_threshold")
_FROM_FILTERS += ("filter_blur", "blur_threshold", "qc_spacing_um", "a_t", "a_h")


def save_result(root: Path, result: Any, image_path: Location, mask_path: Location | None) -> None:
    """Write hs2p's ``<slide>.coordinates.npz`` and ``.coordinates.meta.json`` to ROOT/coordinates.

    Args:
        root: ROOT.
        result: hs2p's ``TilingResult``.
        image_path: Where the slide is; ``result`` has the local files that were read.
        mask_path: Where its mask is, if it has one.
    """
    from hs2p.artifacts import save_tiling_result

    meta = _meta_path(root, result.sample_id)
    points = meta.with_name(f"{result.sample_id}.coordinates.npz")
    with temporary_folder(root) as partial:
        save_tiling_result(result, partial, tiles_dir=partial)
        places = {"image_path": image_path, "mask_path": mask_path}
        if remote := {name: str(place) for name, place in places.items() if isinstance(place, RemoteFile)}:
            content = files.read_json(partial / meta.name)
            content["provenance"] |= remote
            files.write_json(partial / meta.name, content)
        if (partial / points.name).is_file():
            move(partial / points.name, points)
        else:  # hs2p writes none if there are no tiles
            points.unlink(missing_ok=True)
        move(partial / meta.name, meta)


def has_result(root: Path, slide_id: str) -> bool:
    """True if hs2p's files of a slide exist."""
    return _meta_path(root, slide_id).is_file()


def _meta_path(root: Path, slide_id: str) -> Path:
    return root / COORDINATES_FOLDER / f"{slide_id}.coordinates.meta.json"


def save_previews(
    root: Path, slide_id: str, reader: SlideReader, mask: np.ndarray, tiles: np.ndarray, regions: np.ndarray
) -> None:
    """Write hs2p's previews of the tissue, the tiles and the regions to ROOT/coordinates/previews.

    Args:
        root: Output folder.
        slide_id: Name of the slide.
        reader: The open slide.
        mask: uint8 ``(h, w)`` tissue mask.
        tiles: ``(N, 2)`` level-0 origins.
        regions: ``(M, 2)`` level-0 origins.
    """
    level = _preview_level(reader)
    thickness = max(1, round(max(reader.slide.level_dimensions[level]) / 1500))  # lines are visible at screen size
    slide = {
        "wsi_path": reader.local,
        "backend": BACKEND,
        "spacing_at_level_0": reader.spacing_um,
        "downsample": reader.slide.level_downsamples[level][0],
    }
    side = reader.lattice.step_lv0
    regions_side = side * reader.lattice.geometry.region_cells
    draw = {
        "tissue": _tissue_preview(slide, slide_id, mask),
        "tiles": _grid_preview(slide, slide_id, tiles, side, thickness),
        "regions": _grid_preview(slide, slide_id, regions, regions_side, 3 * thickness),
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Slide spacing override conflict", category=UserWarning)
        for kind, render in draw.items():
            _save_preview(root, preview_path(root, slide_id, kind), render)


def _tissue_preview(slide: dict[str, Any], slide_id: str, mask: np.ndarray) -> Callable[[Path], object]:
    """A function that writes a preview of the tissue of a slide to a folder."""
    from hs2p.wsi.visualization import save_overlay_preview

    return lambda folder: save_overlay_preview(
        **slide,
        mask_arr=(mask > 0).astype(np.uint8),
        mask_preview_path=folder / f"{slide_id}.jpg",
        pixel_mapping={"background": 0, "tissue": 1},
        color_mapping={"background": None, "tissue": TISSUE_COLOUR},
    )


def _grid_preview(
    slide: dict[str, Any], slide_id: str, origins: np.ndarray, side: int, thickness: int
) -> Callable[[Path], object]:
    """A function that writes a preview with squares of ``side`` level-0 px at ``origins`` to a folder."""
    from hs2p.wsi.visualization import write_coordinate_preview

    return lambda folder: write_coordinate_preview(
        **slide,
        coordinates=[(int(x), int(y)) for x, y in origins],
        tile_size_lv0=side,
        save_dir=folder,
        sample_id=slide_id,
        grid_thickness=thickness,
    )


def save_annotation_preview(root: Path, slide_id: str, reader: SlideReader, outlines: Sequence[Outline]) -> None:
    """Write a preview with the outlines of annotations, or remove an earlier one if there are none.

    Args:
        root: Output folder.
        slide_id: Name of the slide.
        reader: The open slide.
        outlines: The polygons, with a colour for each class.
    """

    def render(folder: Path) -> None:
        if not outlines:
            return
        level = _preview_level(reader)
        image = Image.fromarray(reader.slide.read_level(level))
        draw, scale = ImageDraw.Draw(image), np.array(image.size) / reader.lattice.slide_size
        thickness = max(2, round(max(image.size) / 600))
        font = ImageFont.load_default(max(10, 8 * thickness))
        names = sorted({outline.name for outline in outlines})
        colours = dict(zip(names, itertools.cycle(OUTLINE_COLOURS), strict=False))
        for outline in outlines:
            for ring in outline.rings:
                points = [(float(x), float(y)) for x, y in np.vstack([ring, ring[:1]]) * scale]
                draw.line(points, fill=colours[outline.name], width=thickness, joint="curve")
        for line, name in enumerate(names):
            place = (2 * thickness, 2 * thickness + line * 10 * thickness)
            draw.text(place, name, fill=colours[name], font=font, stroke_width=1, stroke_fill="white")
        image.save(folder / f"{slide_id}.jpg", quality=90)

    _save_preview(root, preview_path(root, slide_id, "annotations"), render)


def preview_path(root: Path, slide_id: str, kind: str) -> Path:
    """Path of a preview; ``kind`` is ``tissue``, ``tiles``, ``regions`` or ``annotations``."""
    return root / COORDINATES_FOLDER / "previews" / kind / f"{slide_id}.jpg"


def _preview_level(reader: SlideReader) -> int:
    """The level that hs2p draws on: the one nearest to the preview downsample, unless it is too large for memory."""
    from hs2p.wsi.geometry import select_level_for_downsample

    level = select_level_for_downsample(PREVIEW_DOWNSAMPLE, reader.slide.level_downsamples)
    width, height = reader.slide.level_dimensions[level]
    return level if width * height <= MAX_LEVEL_PX else len(reader.slide.level_dimensions) - 1


def _save_preview(root: Path, path: Path, render: Callable[[Path], object]) -> None:
    """Let hs2p draw into a temporary folder, then move the image (hs2p draws none if there are no tiles)."""
    with temporary_folder(root) as folder:
        render(folder)
        drawn = folder / path.name
        if drawn.is_file():
            move(drawn, path)
        else:
            path.unlink(missing_ok=True)
