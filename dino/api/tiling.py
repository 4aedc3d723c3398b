"""``tile``: cut slides into tiles and regions."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from dino import distributed, progress
from dino.config.schema import TileConfig
from dino.errors import ConfigError, DataError
from dino.slides.annotations import has_roi, unmatched
from dino.slides.parts import progress_line
from dino.slides.remote import Location, RemoteFile, StoreError, sizes_of
from dino.slides.slide import check_settings, slide_cache
from dino.slides.slide_list import SlideRecord, read_slide_list
from dino.slides.tiling import TilingSummary, measure_slides, tile_slides

TIMEOUT_MINUTES = 7 * 24 * 60  # processes synchronise only at the end, and one may take hours longer than another


def tile(inputs: Sequence[str | Path], root: Path, config: TileConfig | None = None) -> TilingSummary:
    """Find tissue on every slide, cut its tiles, list its regions, and write tables and previews under ``root``.

    Slides that an earlier call with the same settings finished are skipped. A slide that cannot be tiled does not stop
    the others: it is listed as ``failed`` in ``slides_status.csv`` and in the summary. With more than one worker and
    more than one slide, processes are spawned: a script must call this under ``if __name__ == "__main__"``. Under
    ``torchrun`` the slides are shared out over its processes, which may be on several machines with one ROOT.

    Args:
        inputs: Slide files, folders of slides, patterns, or ``slides.csv`` lists.
        root: Output folder.
        config: Settings; the defaults if None. With ``dry_run``, the cost is estimated and nothing is written.

    Returns:
        The status of each slide; its ``exit_code`` is 2 if any failed.

    Raises:
        ConfigError: If a setting is out of range.
        DataError: If the list is malformed or names a missing file, or ``root`` was tiled with other settings.
    """
    config = config or TileConfig()
    check_settings(config)
    root = Path(root).expanduser().absolute()
    if root.exists() and not root.is_dir():
        raise DataError(f"expected a folder to write to, found the file {root}")
    with distributed.process_group(distributed.choose_device("cpu"), TIMEOUT_MINUTES):
        records = distributed.run_on_main(partial(read_slide_list, inputs, note=progress.warn))
        distributed.run_on_main(partial(_check_roi, records, config))
        distributed.run_on_main(partial(_check_cache, records, config))
        summary = (measure_slides if config.dry_run else tile_slides)(records, root, config)
    for line in summary.lines():
        progress.say(line)
    return summary


def tiling_status(root: Path) -> str:
    """How far `tile` is in ``root``, over all its processes, in one line.

    Raises:
        DataError: If nothing was tiled into it.
    """
    return progress_line(Path(root).expanduser().absolute())


def _check_roi(records: Sequence[SlideRecord], config: TileConfig) -> None:
    """Check that the slides have the annotations that the settings name.

    Raises:
        ConfigError: If no slide has annotations.
    """
    if not has_roi(config):
        return
    paths = [record.annotation_path for record in records if record.annotation_path and not record.exclude_reason]
    if not paths:
        raise ConfigError(
            "expected slides with annotations for roi_include and roi_exclude, found none; name their files in the "
            "column annotation_path of a slides.csv"
        )
    warning = unmatched(_local(paths, config), config)
    if warning:
        progress.warn(warning)


def _check_cache(records: Sequence[SlideRecord], config: TileConfig) -> None:
    """Say how much will be downloaded from object stores; slides that were tiled before are not.

    Raises:
        ConfigError: If the slides that are tiled at the same time do not fit into the cache.
    """
    found = [record.image_path for record in records if not record.exclude_reason]
    stored = [path for path in found if isinstance(path, RemoteFile)]
    if stored:
        cache, at_once = slide_cache(config), config.num_workers * distributed.local_world_size()
        notes, _ = cache.check_room(cache.need(sizes_of(stored), stored, at_once), "slide_cache_gb", "num_workers")
        for line in notes:  # each slide is read once, so that they need not all fit
            progress.say(line)


def _local(paths: Sequence[Location], config: TileConfig) -> Iterator[Path]:
    """The local files of those that can be read; the others are reported when their slides are tiled."""
    for path in paths:
        with suppress(StoreError), slide_cache(config).local_path(path, check=True) as file:
            yield file
