"""hs2p's own files of a slide, under ROOT/coordinates: the tiles as it saves them, and its previews."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from dino.slides import storage
from dino.slides.parts import COORDINATES_FOLDER
from dino.slides.reader import BACKEND, SlideReader
from dino.slides.tissue import LARGEST_LEVEL_PX, TissueRule, filter_config, segmentation_config

PREVIEW_DOWNSAMPLE = 32
TISSUE_COLOUR = [157, 219, 129]


def tiling_result(
    reader: SlideReader, slide_id: str, rule: TissueRule, tissue: Any, tiles: np.ndarray, fractions: np.ndarray
) -> Any:
    """The tiles of a slide as hs2p's ``TilingResult``, in hs2p's order (x, then y).

    Args:
        reader: The open slide.
        slide_id: Its name.
        rule: What counted as tissue.
        tissue: hs2p's ``ResolvedTissueMask``.
        tiles: ``(N, 2)`` int64 level-0 ``(x, y)``.
        fractions: ``(N,)`` float32 tissue fractions.
    """
    from hs2p.tiling.result import TileGeometry, TilingResult

    order = np.lexsort((tiles[:, 1], tiles[:, 0]))
    segmented = None if tissue.mask_path else segmentation_config(rule)
    thresholds = {f"seg_{n}": getattr(segmented, n, None) for n in ("sthresh", "sthresh_up", "mthresh", "close")}
    quality = filter_config(rule)
    return TilingResult(
        tiles=TileGeometry(
            x=tiles[order, 0],
            y=tiles[order, 1],
            tissue_fractions=fractions[order],
            min_tissue_fraction=rule.min_tissue,
            **_reading(reader),
        ),
        sample_id=slide_id,
        image_path=reader.path,
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
    """How the tiles of a slide are read, in hs2p's words."""
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


def save_result(root: Path, result: Any) -> None:
    """Write hs2p's ``<slide>.coordinates.npz`` and ``.coordinates.meta.json`` into ROOT/coordinates."""
    from hs2p.artifacts import save_tiling_result

    meta = _meta_path(root, result.sample_id)
    points = meta.with_name(f"{result.sample_id}.coordinates.npz")
    with storage.aside(root) as partial:
        save_tiling_result(result, partial, tiles_dir=partial)
        if (partial / points.name).is_file():
            storage.put(partial / points.name, points)
        else:  # hs2p writes none for no tiles
            points.unlink(missing_ok=True)
        storage.put(partial / meta.name, meta)


def has_result(root: Path, slide_id: str) -> bool:
    """True if hs2p's files of a slide are there."""
    return _meta_path(root, slide_id).is_file()


def _meta_path(root: Path, slide_id: str) -> Path:
    return root / COORDINATES_FOLDER / f"{slide_id}.coordinates.meta.json"


def save_previews(
    root: Path, slide_id: str, reader: SlideReader, mask: np.ndarray, tiles: np.ndarray, regions: np.ndarray
) -> None:
    """Write hs2p's pictures of the tissue, the tiles and the regions into ROOT/coordinates/previews.

    Args:
        root: Output folder.
        slide_id: Name of the slide.
        reader: The open slide.
        mask: uint8 ``(h, w)`` tissue mask.
        tiles: ``(N, 2)`` level-0 origins.
        regions: ``(M, 2)`` level-0 origins.
    """
    level = _preview_level(reader)
    thin = max(1, round(max(reader.slide.level_dimensions[level]) / 1500))  # lines that show at screen size
    slide = {
        "wsi_path": reader.path,
        "backend": BACKEND,
        "spacing_at_level_0": reader.spacing_um,
        "downsample": reader.slide.level_downsamples[level][0],
    }
    side = reader.lattice.step_lv0
    regions_side = side * reader.lattice.geometry.region_cells
    draw = {
        "tissue": _tissue_picture(slide, slide_id, mask),
        "tiles": _grid_picture(slide, slide_id, tiles, side, thin),
        "regions": _grid_picture(slide, slide_id, regions, regions_side, 3 * thin),
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Slide spacing override conflict", category=UserWarning)
        for kind, render in draw.items():
            _save_picture(root, preview_path(root, slide_id, kind), render)


def _tissue_picture(slide: dict[str, Any], slide_id: str, mask: np.ndarray) -> Callable[[Path], object]:
    """What draws the tissue of a slide into a folder."""
    from hs2p.wsi.visualization import save_overlay_preview

    return lambda folder: save_overlay_preview(
        **slide,
        mask_arr=(mask > 0).astype(np.uint8),
        mask_preview_path=folder / f"{slide_id}.jpg",
        pixel_mapping={"background": 0, "tissue": 1},
        color_mapping={"background": None, "tissue": TISSUE_COLOUR},
    )


def _grid_picture(
    slide: dict[str, Any], slide_id: str, origins: np.ndarray, side: int, thickness: int
) -> Callable[[Path], object]:
    """What draws squares of ``side`` level-0 px at ``origins`` into a folder."""
    from hs2p.wsi.visualization import write_coordinate_preview

    return lambda folder: write_coordinate_preview(
        **slide,
        coordinates=[(int(x), int(y)) for x, y in origins],
        tile_size_lv0=side,
        save_dir=folder,
        sample_id=slide_id,
        grid_thickness=thickness,
    )


def preview_path(root: Path, slide_id: str, kind: str) -> Path:
    """Path of a preview; ``kind`` is ``tissue``, ``tiles`` or ``regions``."""
    return root / COORDINATES_FOLDER / "previews" / kind / f"{slide_id}.jpg"


def _preview_level(reader: SlideReader) -> int:
    """The level that hs2p draws on: the one nearest to the wanted downsample, unless it is too large to hold."""
    from hs2p.wsi.geometry import select_level_for_downsample

    level = select_level_for_downsample(PREVIEW_DOWNSAMPLE, reader.slide.level_downsamples)
    width, height = reader.slide.level_dimensions[level]
    return level if width * height <= LARGEST_LEVEL_PX else len(reader.slide.level_dimensions) - 1


def _save_picture(root: Path, path: Path, render: Callable[[Path], object]) -> None:
    """Let hs2p draw into a folder of its own, then put the picture in its place whole (it draws none of no tiles)."""
    with storage.aside(root) as folder:
        render(folder)
        drawn = folder / path.name
        if drawn.is_file():
            storage.put(drawn, path)
        else:
            path.unlink(missing_ok=True)
