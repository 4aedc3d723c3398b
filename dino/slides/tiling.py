"""Tiles many slides into one ROOT: skips finished slides, reports failures, and does not mix different settings."""

import json
import multiprocessing
import multiprocessing.connection
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from dino import distributed, files, progress
from dino.config.load import identity_of
from dino.config.schema import TileConfig
from dino.errors import DataError, ProcessesLost
from dino.lock import RunLock
from dino.slides import parts, storage, tables
from dino.slides.slide import (
    Measurement,
    columns_of,
    expect_root,
    failed,
    measure_slide,
    tile_slide,
)
from dino.slides.slide_list import SlideRecord, inputs_of, is_unchanged
from dino.slides.tables import SlideStatus

LOCK = "tiling.lock.json"
DIED = "its worker process died; the file is damaged, or memory ran out (lower num_workers)"

A = TypeVar("A")
R = TypeVar("R")


@dataclass(frozen=True)
class TilingSummary:
    """Result of a run, or (``dry_run``) what it would do.

    Attributes:
        root: Output folder.
        statuses: Status of each slide, in the order of the list.
        reused: Number of them that an earlier run had done.
        dry_run: Whether it was a dry run, which writes nothing.
        gigabytes: Dry run: size of the tiles to write, estimated from a sample of them.
        files: Dry run: number of files to write.
        hours: Dry run: estimated time.
    """

    root: Path
    statuses: list[SlideStatus]
    reused: int = 0
    dry_run: bool = False
    gigabytes: float = 0.0
    files: int = 0
    hours: float = 0.0

    @property
    def tiles(self) -> int:
        """Number of tiles of all slides."""
        return sum(status.tiles for status in self.statuses)

    @property
    def regions(self) -> int:
        """Number of regions of all slides."""
        return sum(status.regions for status in self.statuses)

    @property
    def failures(self) -> list[SlideStatus]:
        """Slides that could not be tiled."""
        return [status for status in self.statuses if status.status == tables.FAILED]

    @property
    def exit_code(self) -> int:
        """0, or 2 if any slide failed."""
        return 2 if self.failures else 0

    def lines(self) -> list[str]:
        """The summary as lines of text."""
        names = (tables.OK, tables.NO_TISSUE, tables.EXCLUDED, tables.FAILED)
        counts = {name: sum(status.status == name for status in self.statuses) for name in names}
        slides = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
        total = "1 slide" if len(self.statuses) == 1 else f"{len(self.statuses):,} slides"
        lines = [f"{total} ({slides}; {self.reused} done before)"]
        lines.append(f"{self.tiles:,} tiles, {self.regions:,} regions")
        if self.dry_run:
            lines.append(f"to write: {self.gigabytes:.2f} GB in {self.files:,} files, in about {self.hours:.2f} hours")
        else:
            lines.append(f"tables: {tables.tile_table(self.root)}, {tables.REGIONS_TABLE}, {tables.STATUS_TABLE}")
        return lines


def tile_slides(records: Sequence[SlideRecord], root: Path, config: TileConfig) -> TilingSummary:
    """Tile every slide that is not done yet, and update the tables under ``root``.

    The processes of a job share the slides out by the size of their files; the main one writes the tables at the end.

    Args:
        records: The slides.
        root: Output folder; may contain the results of earlier runs with the same settings.
        config: The settings; those that are part of the identity are recorded in tiling.json and compared with it.

    Raises:
        DataError: If ``root`` was tiled with other settings, or writing to its disk fails.
        ConfigError: If another run is tiling into it.
    """
    # Before a lock file is created in a folder of other settings.
    distributed.run_on_main(partial(check_same_settings, root, identity_of(config)))
    with files.oserror_to_data_error(root), RunLock(root, name=LOCK).held():
        finished = distributed.run_on_main(partial(_prepare, records, root, config))
        return _tile(records, root, config, finished)


def _prepare(records: Sequence[SlideRecord], root: Path, config: TileConfig) -> dict[str, SlideStatus]:
    """Prepare ROOT for all processes; returns the statuses of the slides that need no work."""
    settings = identity_of(config)
    check_same_settings(root, settings)  # again, because another run may have ended meanwhile
    storage.tidy(root)
    parts.tidy(root)
    if not (root / tables.TILING_FILE).exists() or _differing(root, settings):
        tables.write_tiling(root, config)
    finished = _finished(records, root, config)
    for record in records:
        if record.slide_id in finished:
            _update_record(root, record, finished[record.slide_id])
    parts.save_progress(root, [record.slide_id for record in records], distributed.world_size())
    return finished


def _tile(
    records: Sequence[SlideRecord], root: Path, config: TileConfig, finished: Mapping[str, SlideStatus]
) -> TilingSummary:
    own = _own_share([record for record in records if record.slide_id not in finished])

    def died(record: SlideRecord) -> SlideStatus:
        status = failed(record, DIED)
        expect_root(root)
        parts.save_status(root, status, inputs_of(record))
        return status

    tiled: list[SlideStatus] = []
    all_ended = distributed.world_size() == 1
    try:
        with progress.bar("tiling slides", len(finished) + len(own), len(finished)) as bar:
            for status in run_each(partial(tile_slide, root=root, config=config), own, config.num_workers, died):
                tiled.append(status)
                _report(status)
                bar.advance(note=status.slide_id)
                if distributed.is_orphan():  # a new job may be tiling into ROOT
                    raise ProcessesLost("expected torchrun to be running, found that it has ended; start the job again")
        statuses = _gathered(tiled)
        all_ended = True
    finally:
        if distributed.is_main():
            if all_ended:  # else other processes may be writing
                storage.tidy(root)
            expect_root(root)
            parts.merge(root)
    distributed.barrier()
    return _summary(root, records, finished, statuses)


def _own_share(records: Sequence[SlideRecord]) -> list[SlideRecord]:
    """The slides of this process, shared out by the size of their files."""
    sizes = [inputs_of(record)["image_bytes"] or 0 for record in records]
    return [records[index] for index in distributed.assign(sizes, distributed.world_size())[distributed.rank()]]


def _gathered(own: list[SlideStatus]) -> dict[str, SlideStatus]:
    """The statuses of the slides of all processes; the main one reports the failures of the others."""
    shares = distributed.gather(own)
    for status in (status for share in shares[1:] for status in share):
        _report(status)
    return {status.slide_id: status for share in shares for status in share}


def _summary(
    root: Path,
    records: Sequence[SlideRecord],
    finished: Mapping[str, SlideStatus],
    statuses: Mapping[str, SlideStatus],
    **fields: Any,
) -> TilingSummary:
    reused = sum(status.status != tables.EXCLUDED for status in finished.values())
    known = {**finished, **statuses}
    return TilingSummary(root, [known[record.slide_id] for record in records], reused, **fields)


def measure_slides(records: Sequence[SlideRecord], root: Path, config: TileConfig) -> TilingSummary:
    """Find tiles and regions of every slide that is not done yet, and estimate the cost of cutting them; write nothing.

    Args:
        records: The slides.
        root: Output folder that would be written to.
        config: The settings.

    Raises:
        DataError: If ``root`` was tiled with other settings.
    """
    check_same_settings(root, identity_of(config))
    finished = _finished(records, root, config)
    own = _own_share([record for record in records if record.slide_id not in finished])
    measured: list[Measurement] = []
    with progress.bar("measuring slides", len(own)) as bar:
        work = partial(measure_slide, config=config)
        for measurement in run_each(work, own, config.num_workers, lambda record: Measurement(failed(record, DIED))):
            measured.append(measurement)
            _report(measurement.status)
            bar.advance(note=measurement.status.slide_id)
    statuses = _gathered([measurement.status for measurement in measured])
    measurements = [measurement for share in distributed.gather(measured) for measurement in share]
    return _estimate(_summary(root, records, finished, statuses, dry_run=True), measurements, config)


def check_same_settings(root: Path, settings: Mapping[str, Any]) -> None:
    """Raise a DataError that lists the differing settings, if slides in ``root`` were tiled with different ones.

    A first ``spacing_at_level_0`` is accepted: only slides that failed without it use it.
    """
    if not (root / tables.TILING_FILE).exists() or not parts.has_tiled(root):
        return
    differing = [
        f"{key}={before} (now {now})"
        for key, (before, now) in _differing(root, settings).items()
        if key != "spacing_at_level_0" or before is not None
    ]
    if differing:
        raise DataError(
            f"{root} was tiled with {', '.join(differing)}; tiles made with different settings are not mixed: use "
            "the same settings, or another ROOT"
        )


def _differing(root: Path, settings: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Values in ``tiling.json`` and now, by key, of the settings that differ.

    A setting that an earlier version did not have had its default.
    """
    before = {**identity_of(TileConfig()), **tables.read_tiling(root).settings}
    now = json.loads(json.dumps(dict(settings)))
    return {key: (before[key], now[key]) for key in now if before[key] != now[key]}


def _finished(records: Sequence[SlideRecord], root: Path, config: TileConfig) -> dict[str, SlideStatus]:
    """Statuses of the slides that need no work: excluded slides, and those that an earlier run completed."""
    finished: dict[str, SlideStatus] = {}
    for record in records:
        if record.exclude_reason:
            reason = record.exclude_reason
            finished[record.slide_id] = SlideStatus(record.slide_id, tables.EXCLUDED, reason, **columns_of(record))
            continue
        part = parts.load_part(root, record.slide_id)
        if part and is_unchanged(part.made_from, record) and _is_complete(root, part.status, config):
            finished[record.slide_id] = replace(part.status, **columns_of(record))
    return finished


def _is_complete(root: Path, status: SlideStatus, config: TileConfig) -> bool:
    """True if the slide was tiled and all its files exist."""
    if status.status not in (tables.OK, tables.NO_TISSUE) or not storage.has_result(root, status.slide_id):
        return False
    positions = parts.tile_positions(root, status.slide_id)
    if positions is None or len(positions) != status.tiles:
        return False
    return storage.has_tiles(root, status.slide_id, positions, config.storage)


def _update_record(root: Path, record: SlideRecord, status: SlideStatus) -> None:
    """Record changes in the slide list since a slide was tiled: patient, partition, path or exclusion."""
    part = parts.load_part(root, record.slide_id)
    if part is None or part.status != status:
        parts.save_status(root, status, part.made_from if part else inputs_of(record))


def _report(status: SlideStatus) -> None:
    if status.status == tables.FAILED:
        progress.warn(f"{status.slide_id} failed: {status.reason}")
    elif status.reason:
        progress.warn(f"{status.slide_id}: {status.reason}")


def _estimate(summary: TilingSummary, measurements: Sequence[Measurement], config: TileConfig) -> TilingSummary:
    sampled = max(1, sum(m.sampled for m in measurements))
    bytes_per_tile = sum(m.sampled_bytes for m in measurements) / sampled
    seconds_per_tile = sum(m.sampled_seconds for m in measurements) / sampled
    slides = sum(m.status.status != tables.FAILED for m in measurements)
    tiles = sum(m.status.tiles for m in measurements)
    cut = tiles if config.storage != "none" else 0
    image_files = {"jpeg": tiles, "tar": 2 * slides, "parquet": slides, "none": 0}[config.storage]
    other_files = slides * (5 + 3 * config.previews)  # hs2p's two, the part's three, the previews
    seconds = sum(m.seconds for m in measurements) + cut * seconds_per_tile
    return replace(
        summary,
        gigabytes=cut * bytes_per_tile / 1e9,
        files=image_files + other_files,
        hours=seconds / 3600 / max(1, min(config.num_workers * distributed.world_size(), len(measurements))),
    )


def run_each(work: Callable[[A], R], items: Sequence[A], workers: int, on_death: Callable[[A], R]) -> Iterator[R]:
    """Results of ``work`` for every item, in order of completion.

    Each worker process is controlled by its own thread. When a damaged file crashes the process, the thread reports the
    item and starts another process, so that the other items are processed.

    Args:
        work: Picklable function. Processes are spawned, since neither openslide nor OpenCV is safe to fork.
        items: Its arguments.
        workers: Number of processes; with one (or one item), ``work`` runs in this process.
        on_death: Result for an item whose process died.

    Yields:
        One result per item, in order of completion.
    """
    if min(workers, len(items)) <= 1:
        yield from map(work, items)
        return
    local = threading.local()
    pools: list[ProcessPoolExecutor] = []

    def in_worker(item: A) -> R:
        if getattr(local, "pool", None) is None:
            context = multiprocessing.get_context("spawn")
            local.pool = ProcessPoolExecutor(1, mp_context=context, initializer=_exit_with_parent)
            pools.append(local.pool)
        try:
            return local.pool.submit(work, item).result()
        except BrokenProcessPool:
            local.pool = None
            return on_death(item)

    with ThreadPoolExecutor(min(workers, len(items))) as threads:
        futures = [threads.submit(in_worker, item) for item in items]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            for future in futures:
                future.cancel()
            for pool in pools:
                pool.shutdown(wait=False)


def _exit_with_parent() -> None:
    """End this process as soon as its parent has ended, also when the parent was killed.

    Otherwise the worker would keep writing to files that a new run writes too.
    """
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_exit_when_ready, args=(parent.sentinel,), daemon=True).start()


def _exit_when_ready(sentinel: int) -> None:
    multiprocessing.connection.wait([sentinel])
    os._exit(1)
