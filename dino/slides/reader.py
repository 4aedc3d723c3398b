"""Reads cells from a slide, both for cutting tiles and for embedding regions."""

import functools
import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from PIL import Image

from dino import progress
from dino.environment import import_extra
from dino.errors import DataError
from dino.slides.lattice import Geometry, Lattice, Pyramid, plan_lattice
from dino.slides.remote import Location
from dino.slides.remote_cache import SlideCache

BACKEND = "openslide"
READERS = ("openslide", "fastslide")
RESAMPLER = "PIL bilinear"


class SlideReader:
    """One open slide and its lattice.

    Cells are read one by one through hs2p's openslide reader, and resampled (where the slide has no level of the
    requested spacing) by Pillow's antialiased bilinear filter, exactly as hs2p's own tile writer does. With
    ``reader="fastslide"`` their pixels are decoded by fastslide; metadata and whole levels are openslide's. Both can
    be read from several threads.

    Attributes:
        path: The slide's file, or where it is stored.
        local: The local file that is read, the same one unless it is stored elsewhere; it stays until this is closed.
        lattice: Positions of its cells.
        pyramid: Sizes of its levels.
        spacing_um: Spacing of level 0 in µm per px.
        spacing_source: Source of that value: ``metadata``, ``objective power`` or ``user``.
        slide: hs2p's reader, for operations on whole levels.
    """

    def __init__(
        self,
        path: Location,
        geometry: Geometry,
        spacing_at_level_0: float | None = None,
        spacing_if_missing: float | None = None,
        *,
        reader: str = BACKEND,
        cache_mb: float | None = None,
        cache: SlideCache | None = None,
        check: bool = False,
    ) -> None:
        """Open a slide.

        Args:
            path: The slide's file, or where it is stored.
            geometry: Requested lattice.
            spacing_at_level_0: Spacing in µm per px that overrides the slide's metadata.
            spacing_if_missing: Spacing for a slide whose metadata has none.
            reader: What decodes cells: ``openslide`` or ``fastslide``.
            cache_mb: Memory for decoded parts of the slide in MB; None for the library's default (openslide: 32).
            cache: Where slides of object stores are kept; None for the default.
            check: Ask the store whether such a slide has changed since it was downloaded.

        Raises:
            DataError: If the file is not a slide, has no spacing, is coarser than the requested spacing, or cannot be
                downloaded.
            ConfigError: If ``reader`` is not installed.
        """
        self.path = path
        self._lease = (cache or SlideCache()).local_path(path, check)
        self.local = self._lease.path
        self.slide: Any = None
        self._cells: Any = None  # fastslide's handle, where it reads the cells
        try:
            # Opening a slide takes as long as reading several tiles: where its spacing is known, it is opened once.
            properties = _properties(self.local, path) if spacing_at_level_0 is None else {}
            self.spacing_um, self.spacing_source = spacing_of(
                properties, path.name, given=spacing_at_level_0, fallback=spacing_if_missing
            )
            self.slide = _open(self.local, path, self.spacing_um)
            self.pyramid = Pyramid(
                spacing_um=self.spacing_um,
                dimensions=self.slide.level_dimensions,
                downsamples=[downsample for downsample, _ in self.slide.level_downsamples],
            )
            self.lattice = plan_lattice(self.pyramid, geometry, path.name)
            if cache_mb is not None:
                self.share_cache(openslide_cache(cache_mb))
            self._cells = None if reader == BACKEND else _open_fastslide(self.local, self.lattice, cache_mb)
        except BaseException:
            self.close()
            raise

    def read_cell(self, x: int, y: int) -> np.ndarray:
        """Pixels of the cell or tile at level-0 ``(x, y)``.

        Returns:
            uint8 RGB ``(tile_size_px, tile_size_px, 3)``.

        Raises:
            DataError: If the slide is damaged at this position.
        """
        read, size = self.lattice.read_size_px, self.lattice.geometry.tile_size_px
        try:
            pixels = self._pixels(int(x), int(y), read)
        except Exception as error:  # openslide and its decoders raise many types
            raise DataError(f"expected pixels at ({x}, {y}) of {self.path}, could not read them: {error}") from None
        if read == size:
            return pixels
        return np.asarray(Image.fromarray(pixels).resize((size, size), Image.Resampling.BILINEAR))

    def _pixels(self, x: int, y: int, side: int) -> np.ndarray:
        """``side`` px of the level that cells are read from, uint8 RGB."""
        level = self.lattice.read_level
        if self._cells is None:
            return self.slide.read_region((x, y), level, (side, side))
        place = round(x / self.lattice.read_downsample), round(y / self.lattice.read_downsample)
        pixels = np.array(self._cells.read_region(place, level, (side, side)).numpy())  # a copy: the view has no owner
        if pixels.shape != (side, side, 3) or pixels.dtype != np.uint8:
            raise ValueError(f"{pixels.dtype} pixels of shape {pixels.shape} instead of 8-bit RGB")
        return pixels

    def share_cache(self, cache: Any) -> None:
        """Keep decoded parts in an ``openslide.OpenSlideCache``, which may be that of other slides too."""
        handle: Any = getattr(self.slide, "_slide", None)  # hs2p has no public way to it
        if hasattr(handle, "set_cache"):
            handle.set_cache(cache)
        else:
            _warn_of_own_caches()

    def thumbnail(self, max_side_px: int) -> np.ndarray:
        """The whole slide, uint8 RGB ``(h, w, 3)``, its longer side at most ``max_side_px``."""
        return self.slide.get_thumbnail((max_side_px, max_side_px))

    def close(self) -> None:
        """Close the file."""
        for handle in (self.slide, self._cells):
            if handle is not None:
                handle.close()
        self._lease.close()

    def __enter__(self) -> "SlideReader":
        """The reader itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Close the file."""
        self.close()


def spacing_of(
    properties: Mapping[str, str], slide: str, *, given: float | None = None, fallback: float | None = None
) -> tuple[float, str]:
    """Spacing of a slide's level 0 and the source of the value.

    Args:
        properties: openslide's properties of the slide.
        slide: Its name, for the error.
        given: The user's value, which overrides the metadata.
        fallback: The user's value for slides whose metadata has none.

    Returns:
        µm per px, and ``metadata``, ``objective power`` (10 / power, the usual convention) or ``user``.

    Raises:
        DataError: If there is no spacing, or the metadata gives pixels that are not square.
    """
    if given is not None:
        return given, "user"
    across, down = (_positive(properties.get(f"openslide.mpp-{axis}")) for axis in "xy")
    if across is not None:
        if down is not None and abs(across - down) > 0.05 * across:
            raise DataError(
                f"expected square pixels in slide '{slide}', found {across:g} x {down:g} µm in its metadata; "
                "if that is wrong, set spacing_at_level_0 in the column of that name of the slide list"
            )
        return across, "metadata"
    power = _positive(properties.get("openslide.objective-power"))
    if power is not None:
        return 10 / power, "objective power"
    if fallback is not None:
        return fallback, "user"
    raise DataError(
        f"expected a spacing (µm/px) in the metadata of slide '{slide}', found none; set spacing_at_level_0 in the "
        "column of that name of the slide list, or as spacing_at_level_0=0.25 on the command line"
    )


def _positive(text: str | None) -> float | None:
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if math.isfinite(value) and value > 0 else None


def _properties(path: Path, source: Location) -> dict[str, str]:
    import openslide

    with _readable(path, source), openslide.OpenSlide(str(path)) as slide:
        return dict(slide.properties)


def _open(path: Path, source: Location, spacing_um: float) -> Any:
    from hs2p.wsi.reader import open_slide

    with _readable(path, source), warnings.catch_warnings():
        # hs2p warns where the given spacing differs from the metadata, which is intended here.
        warnings.filterwarnings("ignore", message="Slide spacing override conflict", category=UserWarning)
        return open_slide(path, BACKEND, spacing_override=spacing_um)


@contextmanager
def _readable(path: Path, source: Location) -> Iterator[None]:
    """Turn errors of opening a slide into a DataError."""
    if not path.is_file():
        found = "a broken link" if path.is_symlink() else "no file"
        raise DataError(f"expected a slide at {path}, found {found}")
    try:
        yield
    except Exception as error:  # openslide has different types for unreadable, unsupported and damaged files
        reason = str(error).strip() or type(error).__name__
        raise DataError(f"expected a slide that openslide can read, found {source}: {reason}") from None


def openslide_cache(megabytes: float) -> Any:
    """An ``openslide.OpenSlideCache``, for :meth:`SlideReader.share_cache`."""
    import openslide

    return openslide.OpenSlideCache(round(megabytes * 1e6))


@functools.cache
def _warn_of_own_caches() -> None:
    """Warn once."""
    progress.warn(
        "expected openslide's handle in hs2p's reader, as in hs2p 6.1, found none in this version: the pixels are the "
        "same, but each open slide has a cache of up to 32 MB of its own"
    )


def _open_fastslide(path: Path, lattice: Lattice, cache_mb: float | None) -> Any:
    fastslide = import_extra("fastslide", "reader=fastslide", "fastslide")
    try:
        slide = fastslide.FastSlide.from_file_path(path, cache=None if cache_mb is None else round(cache_mb * 1e6))
        found = [tuple(size) for size in slide.level_dimensions]
    except Exception as error:  # fastslide has no types of its own
        raise DataError(
            f"expected a slide that fastslide can read, found {path}: {error}; use reader=openslide"
        ) from None
    if lattice.read_level >= len(found) or found[lattice.read_level] != lattice.level_size:
        slide.close()
        raise DataError(
            f"expected level {lattice.read_level} with {lattice.level_size[0]} x {lattice.level_size[1]} px in {path}, "
            f"as openslide has it, found levels of {found} px in fastslide; use reader=openslide"
        )
    return slide
