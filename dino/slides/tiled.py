"""The slides of a ROOT that was tiled: where their files are, opened as they were when they were tiled."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from dino import progress
from dino.errors import DataError
from dino.slides.lattice import Geometry, plan_lattice
from dino.slides.reader import BACKEND, SlideReader
from dino.slides.remote import Location, RemoteFile, sizes_of
from dino.slides.remote_cache import Lease, SlideCache, largest_sum
from dino.slides.slide_list import read_slide_list
from dino.slides.tables import SlideStatus


@dataclass(frozen=True)
class TiledSlides:
    """The slides of a ROOT.

    Attributes:
        geometry: How they were tiled.
        status: Status of each in ``slides_status.csv``.
        moved: Current paths of slides that were moved.
        reader: What decoded their tiles, and decodes them again.
        cache_mb: Memory of each open slide for decoded parts of it; None for the library's default.
        cache: Where slides of object stores are kept.
    """

    geometry: Geometry
    status: Mapping[str, SlideStatus] = field(default_factory=dict)
    moved: Mapping[str, Location] = field(default_factory=dict)
    reader: str = BACKEND
    cache_mb: float | None = None
    cache: SlideCache = field(default_factory=SlideCache)

    def path(self, slide_id: str) -> Location | None:
        """A slide's file, or where it is stored; None if a local one does not exist."""
        status = self.status.get(slide_id)
        path = self.moved.get(slide_id, status.image_path if status else None)
        return path if isinstance(path, RemoteFile) or (path is not None and path.is_file()) else None

    def local_path(self, slide_id: str) -> Lease | None:
        """The local file of a slide, downloaded if it is stored elsewhere; None if it does not exist.

        Raises:
            DataError: If it cannot be downloaded.
        """
        path = self.path(slide_id)
        return None if path is None else self.cache.local_path(path)

    def check_cache(
        self, slide_ids: Iterable[str], kept_open: int, workers: int, setting: str, fewer: str
    ) -> tuple[int, list[str], list[str]]:
        """How many slides workers may keep open, as open slides of object stores are not removed from the cache.

        Args:
            slide_ids: Slides that will be read.
            kept_open: Number of slides that a worker should keep open.
            workers: Workers of a process of a job.
            setting: Name of the setting of the cache's size.
            fewer: Name of that of the number of workers.

        Returns:
            ``kept_open``, or less where so many do not fit into the cache; what to say of the slides of object stores
            (how much is downloaded); and what to warn of (a small cache).

        Raises:
            ConfigError: If not even the slides fit that are open at once where each worker keeps one.
        """
        found = [path for path in map(self.path, slide_ids) if isinstance(path, RemoteFile)]
        if not found:
            return kept_open, [], []
        from dino import distributed  # imports torch, without which the viewer starts

        workers *= distributed.local_world_size()
        sizes, kept = sizes_of(found), kept_open

        def at_once() -> int:
            return (kept + 1) * workers  # one is opened before another is closed

        while kept > 1 and largest_sum(sizes, at_once()) > self.cache.limit:
            kept //= 2
        notes, warnings = self.cache.check_room(self.cache.need(sizes, found, at_once()), setting, fewer)
        if kept < kept_open:
            notes.append(f"each worker keeps {kept} of these slides open instead of {kept_open}, which may not fit")
        return kept, notes, warnings

    def check_present(self, slide_ids: Iterable[str]) -> None:
        """Raise DataError if the file of a slide does not exist."""
        ids = list(slide_ids)
        absent = [slide_id for slide_id in ids if self.path(slide_id) is None]
        if absent:
            status = self.status.get(absent[0])
            where = f" (recorded at {status.image_path})" if status else ""
            raise DataError(
                f"expected the files of {len(ids)} slides to read tiles from, found none of {len(absent)}, the first "
                f"'{absent[0]}'{where}; if they were moved, name their folder or slides.csv with slides="
            )

    def open(self, slide_id: str, step_lv0: int, spacing_um: float | None = None) -> SlideReader:
        """Open a slide, and check that it is the one that was tiled.

        Args:
            slide_id: The slide.
            step_lv0: Footprint of its tiles in the tables, in level-0 px.
            spacing_um: Spacing to read at; None for that of tiling.

        Raises:
            DataError: If the slide cannot be read, differs from the one that was tiled, or is coarser.
        """
        path, status = self.path(slide_id), self.status.get(slide_id)
        if path is None or status is None:
            recorded = f" at {status.image_path}" if status else ""
            raise DataError(
                f"expected the slide's file{recorded}, found none; pass the current folder of the slides: slides=FOLDER"
            )
        geometry = self.geometry if spacing_um is None else replace(self.geometry, spacing_um=spacing_um)
        reader = SlideReader(
            path, geometry, status.spacing_um, reader=self.reader, cache_mb=self.cache_mb, cache=self.cache
        )
        try:
            step = plan_lattice(reader.pyramid, self.geometry, slide_id).step_lv0
        except DataError:
            reader.close()
            raise
        size = tuple(reader.lattice.slide_size)
        if size != (status.width, status.height) or step != step_lv0:
            reader.close()
            raise DataError(
                f"expected the slide that was tiled, {status.width} x {status.height} px with cells of {step_lv0} px, "
                f"found {size[0]} x {size[1]} px and {step} px in {path}; tile it again"
            )
        return reader


def slide_paths(moved: str | None) -> dict[str, Location]:
    """Paths of slides by id, for :attr:`TiledSlides.moved`.

    Args:
        moved: Folder or slides.csv of slides that were moved; None if they were not.

    Raises:
        DataError: If there are no slides.
    """
    found = read_slide_list([moved], progress.warn) if moved else []
    return {record.slide_id: record.image_path for record in found}
