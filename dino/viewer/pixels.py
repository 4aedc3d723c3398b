"""Pictures of slides for the viewer: deep-zoom tiles, single tiles and thumbnails, read on demand from several threads.

The memory is bounded: at most so many slides are open, which share one cache of decoded pixels, and encoded pictures
are kept up to a number of bytes.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from dino.errors import DataError
from dino.slides.remote_cache import Lease
from dino.slides.storage import encode
from dino.slides.tiled import TiledSlides

TILE_PX, OVERLAP_PX = 254, 1  # of deep zoom; with its overlap on both sides a tile has 256 px
JPEG_QUALITY = 85
MB = 2**20


@dataclass(frozen=True)
class OpenSlide:
    """An open slide; openslide reads from several threads, and closes it when nothing refers to it any more.

    Attributes:
        slide: openslide's object.
        zoom: openslide's ``DeepZoomGenerator`` of it.
        file: Its local file, which stays as long as this.
    """

    slide: Any
    zoom: Any
    file: Lease


class Kept:
    """Encoded pictures that were made last, up to a number of bytes; may be used from several threads.

    Args:
        max_mb: That number in MB.
    """

    def __init__(self, max_mb: float) -> None:
        self._max_bytes, self._lock = max_mb * MB, threading.Lock()
        self._pictures: OrderedDict[tuple[Any, ...], bytes] = OrderedDict()
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._pictures)

    def get(self, key: tuple[Any, ...], make: Callable[[], bytes]) -> bytes:
        """The picture of a key, made if it is not kept."""
        with self._lock:
            if key in self._pictures:
                self._pictures.move_to_end(key)
                return self._pictures[key]
        content = make()  # two threads may make the same picture, which is cheaper than to let others wait
        with self._lock:
            if key not in self._pictures:
                self._pictures[key] = content
                self.bytes += len(content)
            while self.bytes > self._max_bytes:
                _, dropped = self._pictures.popitem(last=False)
                self.bytes -= len(dropped)
        return content


class SlidePixels:
    """Encoded pictures of the slides of a ROOT.

    Args:
        slides: The slides.
        open_slides: Maximum number of open slides.
        cache_mb: Maximum size of the encoded pictures that are kept, and of the decoded pixels, in MB each.
    """

    def __init__(self, slides: TiledSlides, open_slides: int = 16, cache_mb: int = 128) -> None:
        import openslide

        self._slides, self._open_slides = slides, open_slides
        self._decoded = openslide.OpenSlideCache(cache_mb * MB)
        self._lock, self.pictures = threading.Lock(), Kept(cache_mb)
        self._open: OrderedDict[str, OpenSlide] = OrderedDict()

    def tile(self, slide_id: str, level: int, column: int, row: int) -> bytes:
        """A deep-zoom tile as JPEG.

        Args:
            slide_id: The slide, which must be one of the ROOT.
            level: Level of the Deep Zoom Image: 0 is one px, the last one is level 0 of the slide.
            column: Column of the tile.
            row: Row of the tile.

        Raises:
            DataError: If there is no such tile, or the slide cannot be read.
        """
        return self.pictures.get(
            ("tile", slide_id, level, column, row), lambda: self._tile(slide_id, level, column, row)
        )

    def cell(self, slide_id: str, x: int, y: int, side_lv0: int, size_px: int) -> bytes:
        """The square at level-0 ``(x, y)`` of ``side_lv0`` level-0 px, as a JPEG of ``size_px`` px.

        Raises:
            DataError: If the slide cannot be read.
        """
        return self.pictures.get(
            ("cell", slide_id, x, y, side_lv0, size_px), lambda: self._cell(slide_id, x, y, side_lv0, size_px)
        )

    def thumbnail(self, slide_id: str, max_side_px: int) -> bytes:
        """The whole slide as JPEG, its longer side at most ``max_side_px``.

        Raises:
            DataError: If the slide cannot be read.
        """
        return self.pictures.get(("thumbnail", slide_id, max_side_px), lambda: self._thumbnail(slide_id, max_side_px))

    def _tile(self, slide_id: str, level: int, column: int, row: int) -> bytes:
        zoom = self._opened(slide_id).zoom
        if not 0 <= level < zoom.level_count:
            raise DataError(f"expected a level from 0 to {zoom.level_count - 1}, found {level}")
        columns, rows = zoom.level_tiles[level]
        if not (0 <= column < columns and 0 <= row < rows):
            raise DataError(f"expected a tile of {columns} x {rows}, found column {column}, row {row}")
        return self._encode(slide_id, lambda: zoom.get_tile(level, (column, row)))

    def _cell(self, slide_id: str, x: int, y: int, side_lv0: int, size_px: int) -> bytes:
        slide = self._opened(slide_id).slide
        level = slide.get_best_level_for_downsample(side_lv0 / size_px)
        read = max(1, round(side_lv0 / slide.level_downsamples[level]))

        def picture() -> Image.Image:
            pixels = _on_white(slide.read_region((x, y), level, (read, read)))
            return pixels.resize((size_px, size_px), Image.Resampling.BILINEAR)

        return self._encode(slide_id, picture)

    def _thumbnail(self, slide_id: str, max_side_px: int) -> bytes:
        slide = self._opened(slide_id).slide
        return self._encode(slide_id, lambda: slide.get_thumbnail((max_side_px, max_side_px)))

    def _encode(self, slide_id: str, picture: Callable[[], Image.Image]) -> bytes:
        try:
            return encode(np.asarray(picture().convert("RGB")), JPEG_QUALITY)
        except Exception as error:  # openslide and its decoders raise many types
            with self._lock:  # openslide keeps no slide usable that had an error
                self._open.pop(slide_id, None)
            raise DataError(f"expected pixels of slide '{slide_id}', could not read them: {error}") from None

    def _opened(self, slide_id: str) -> OpenSlide:
        with self._lock:
            if slide_id in self._open:
                self._open.move_to_end(slide_id)
                return self._open[slide_id]
        opened = self._open_slide(slide_id)
        with self._lock:
            opened = self._open.setdefault(slide_id, opened)
            while len(self._open) > self._open_slides:
                self._open.popitem(last=False)  # not closed here: another thread may be reading
        return opened

    def _open_slide(self, slide_id: str) -> OpenSlide:
        import openslide
        from openslide.deepzoom import DeepZoomGenerator

        file = self._slides.local_path(slide_id)
        if file is None:
            raise DataError(f"expected the file of slide '{slide_id}', found none")
        try:
            slide = openslide.OpenSlide(str(file.path))
        except Exception as error:  # openslide has different types for unreadable, unsupported and damaged files
            raise DataError(f"expected a slide that openslide can read as '{slide_id}', found: {error}") from None
        status = self._slides.status[slide_id]
        if slide.dimensions != (status.width, status.height):
            raise DataError(
                f"expected slide '{slide_id}' as it was tiled, {status.width} x {status.height} px, found "
                f"{slide.dimensions[0]} x {slide.dimensions[1]} px; tile it again"
            )
        slide.set_cache(self._decoded)
        # Bounds are not limited to the scanned area: positions are level-0 px, as in the tables.
        return OpenSlide(slide, DeepZoomGenerator(slide, TILE_PX, OVERLAP_PX, limit_bounds=False), file)


def _on_white(pixels: Image.Image) -> Image.Image:
    """An RGBA picture on white, where openslide reads beyond the scanned area."""
    white = Image.new("RGB", pixels.size, (255, 255, 255))
    white.paste(pixels, mask=pixels.getchannel("A"))
    return white
