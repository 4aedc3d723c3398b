"""Tissue of a slide from a given mask or by hs2p's segmentation, and hs2p's pixel QC of tiles."""

from pathlib import Path
from typing import Any

import numpy as np

from dino.config.schema import TileConfig
from dino.errors import ConfigError, DataError
from dino.slides.reader import SlideReader

METHODS = ("hsv", "otsu", "threshold")
MAX_LEVEL_PX = 400_000_000  # an RGB level of this size takes 1.2 GB, its segmentation several times that


def check_tissue_settings(config: TileConfig) -> None:
    """Raise a ConfigError if a tissue setting is out of range."""
    for name, good, rule in (
        ("tissue_method", config.tissue_method in METHODS, f"one of {', '.join(METHODS)}"),
        ("tissue_downsample", config.tissue_downsample >= 1, "at least 1"),
        ("min_tissue", 0 <= config.min_tissue <= 1, "a fraction from 0 to 1"),
        ("min_tissue_region", 0 <= config.min_tissue_region <= 1, "a fraction from 0 to 1"),
    ):
        if not good:
            raise ConfigError(f"expected {name} to be {rule}, found {getattr(config, name)}")


def segmentation_config(config: TileConfig) -> Any:
    """hs2p's segmentation settings."""
    from hs2p.configs import SegmentationConfig

    return SegmentationConfig(method=config.tissue_method, downsample=config.tissue_downsample)


def filter_config(config: TileConfig) -> Any:
    """hs2p's QC settings: all four pixel checks or none, at hs2p's thresholds."""
    from hs2p.configs import FilterConfig

    qc = config.qc
    return FilterConfig(filter_white=qc, filter_black=qc, filter_grayspace=qc, filter_blur=qc)


def find_tissue(reader: SlideReader, mask_path: Path | None, config: TileConfig) -> Any:
    """Tissue mask of a slide.

    Args:
        reader: The open slide.
        mask_path: Binary mask of the whole slide at any scale, with tissue 1 or 255; None to segment the slide.
        config: The settings.

    Returns:
        hs2p's ``ResolvedTissueMask``; its ``tissue_mask`` is uint8 ``(h, w)``, non-zero where there is tissue.

    Raises:
        DataError: If the slide has no level small enough, or the mask does not fit the slide.
    """
    from hs2p.tiling.mask import resolve_tissue_mask
    from hs2p.wsi.geometry import select_level_for_downsample

    level = select_level_for_downsample(float(config.tissue_downsample), reader.slide.level_downsamples)
    width, height = reader.slide.level_dimensions[level]
    if width * height > MAX_LEVEL_PX:
        raise DataError(
            f"expected a level of at most {MAX_LEVEL_PX / 1e6:.0f} megapixels near downsample "
            f"{config.tissue_downsample} in {reader.path}, found {width} x {height} px; raise tissue_downsample, or "
            "save the slide as a pyramid"
        )
    if mask_path is not None:
        return _read_mask(reader, mask_path, config)
    return resolve_tissue_mask(slide=reader.slide, segmentation=segmentation_config(config))


def tissue_fractions(mask: np.ndarray, origins: np.ndarray, reader: SlideReader) -> np.ndarray:
    """Tissue fraction of each tile, computed from the whole mask.

    Args:
        mask: uint8 ``(h, w)``, non-zero where there is tissue.
        origins: ``(N, 2)`` int64 level-0 ``(x, y)``.
        reader: The open slide.

    Returns:
        ``(N,)`` float32 in [0, 1].
    """
    from hs2p.tiling.coverage import compute_tile_coverage

    return compute_tile_coverage(
        candidates=origins,
        binary_mask=mask,
        tile_size_lv0=reader.lattice.step_lv0,
        slide_dimensions=reader.lattice.slide_size,
    )


def passes_qc(reader: SlideReader, origins: np.ndarray, config: TileConfig) -> np.ndarray:
    """Whether each tile passes hs2p's pixel QC (white, black, grey, blurred).

    Args:
        reader: The open slide.
        origins: ``(N, 2)`` int64 level-0 ``(x, y)``.
        config: The settings.

    Returns:
        ``(N,)`` bool.
    """
    from hs2p.tile_qc import filter_coordinate_tiles

    geometry = reader.lattice.geometry
    kept = filter_coordinate_tiles(
        coord_candidates=origins,
        keep_flags=np.ones(len(origins), dtype=np.uint8),
        level_dimensions=reader.slide.level_dimensions,
        level_downsamples=reader.slide.level_downsamples,
        requested_tile_size_px=geometry.tile_size_px,
        requested_spacing_um=geometry.spacing_um,
        base_spacing_um=reader.spacing_um,
        tolerance=geometry.tolerance,
        filter_params=filter_config(config),
        read_window=lambda x, y, width, height, level: reader.slide.read_region((x, y), level, (width, height)),
        source_label=str(reader.path),
    )
    return kept.astype(bool)


def _read_mask(reader: SlideReader, mask_path: Path, config: TileConfig) -> Any:
    from hs2p.tiling.mask import open_tissue_mask, resolve_tissue_mask

    first_error: Exception | None = None
    for tissue in (1, 255):  # hs2p rejects values that are not declared, so at most one of the two succeeds
        try:
            with open_tissue_mask(mask_path, pixel_mapping={"background": 0, "tissue": tissue}) as mask:
                return resolve_tissue_mask(slide=reader.slide, segmentation=segmentation_config(config), mask=mask)
        except Exception as error:  # hs2p raises ValueError and RuntimeError, the image libraries their own
            first_error = first_error or error
    raise DataError(
        f"expected a binary mask (0 and 1, or 0 and 255) of the whole slide {reader.path.name} at {mask_path}, found: "
        f"{first_error}"
    )
