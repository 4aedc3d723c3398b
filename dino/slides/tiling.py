"""Tiles many slides into one ROOT: what is done already is kept, what fails is reported, and nothing is mixed."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from dino import files, progress
from dino.errors import DataError
from dino.lock import RunLock
from dino.slides import coordinates, parts, storage, tables
from dino.slides.processes import run_each
from dino.slides.reader import BACKEND, RESAMPLER
from dino.slides.slide import Measure, TilingPlan, about, expect_root, failed, measure_slide, origin_of, tile_slide
from dino.slides.slide_list import SlideRecord
from dino.slides.tables import SlideStatus
from dino.slides.tissue import filter_config, segmentation_config
from dino.versions import versions

LOCK = "tiling.lock.json"
DEATH = "the process that worked on it died; the file is damaged, or memory ran out (lower num_workers)"


@dataclass(frozen=True)
class TilingSummary:
    """What a run did, or (``dry_run``) would do.

    Attributes:
        root: Output folder.
        statuses: What became of each slide, in the order of the list.
        reused: How many of them an earlier run had done.
        dry_run: Whether nothing was written.
        gigabytes: Dry run: size of the tiles yet to be written, from a few that were encoded.
        files: Dry run: number of files yet to be written.
        hours: Dry run: time that takes, from the time those few took.
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
        """Tiles of all slides."""
        return sum(status.tiles for status in self.statuses)

    @property
    def regions(self) -> int:
        """Regions of all slides."""
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
        """The summary in words, one line each."""
        words = (tables.OK, tables.NO_TISSUE, tables.EXCLUDED, tables.FAILED)
        counts = {word: sum(status.status == word for status in self.statuses) for word in words}
        slides = ", ".join(f"{count} {word}" for word, count in counts.items() if count)
        total = "1 slide" if len(self.statuses) == 1 else f"{len(self.statuses):,} slides"
        lines = [f"{total} ({slides}; {self.reused} done before)"]
        lines.append(f"{self.tiles:,} tiles, {self.regions:,} regions")
        if self.dry_run:
            lines.append(f"to write: {self.gigabytes:.2f} GB in {self.files:,} files, in about {self.hours:.2f} hours")
        else:
            lines.append(f"tables: {self.root / tables.TILES_TABLE}, {tables.REGIONS_TABLE}, {tables.STATUS_TABLE}")
        return lines


def tile_slides(
    records: Sequence[SlideRecord], root: Path, plan: TilingPlan, settings: Mapping[str, Any], workers: int
) -> TilingSummary:
    """Tile every slide that is not done yet, and bring the tables under ``root`` up to date.

    Args:
        records: The slides.
        root: Output folder; may hold the results of earlier runs with the same settings.
        plan: What is done with each.
        settings: What decides the result, by name; recorded in tiling.json, and compared with what stands there.
        workers: How many slides are worked on at once.

    Raises:
        DataError: If ``root`` was tiled with other settings, or its disk does not take what is written.
        ConfigError: If another run is tiling into it.
    """
    refuse_to_mix(root, settings)  # before a lock is left in a folder that is not for this run
    with files.oserror_to_data_error(root), RunLock(root, name=LOCK).held():
        refuse_to_mix(root, settings)  # once more: another run may have come and gone since
        storage.tidy(root)
        parts.tidy(root)
        if not (root / tables.TILING_FILE).exists():
            files.write_json(root / tables.TILING_FILE, _description(plan, settings))
        return _tile(records, root, plan, workers)


def _tile(records: Sequence[SlideRecord], root: Path, plan: TilingPlan, workers: int) -> TilingSummary:
    statuses = _settled(records, root, plan)
    for record in records:
        if record.slide_id in statuses:
            _bring_up_to_date(root, record, statuses[record.slide_id])
    to_do = [record for record in records if record.slide_id not in statuses]

    def died(record: SlideRecord) -> SlideStatus:
        status = failed(record, DEATH)
        expect_root(root)
        parts.save_status(root, status, origin_of(record))
        return status

    reused = sum(status.status != tables.EXCLUDED for status in statuses.values())
    try:
        with progress.bar("tiling slides", len(records), len(statuses)) as bar:
            for status in run_each(partial(tile_slide, root=root, plan=plan), to_do, workers, died):
                statuses[status.slide_id] = status
                _report(status)
                bar.advance(note=status.slide_id)
    finally:
        storage.tidy(root)
        expect_root(root)
        parts.merge(root)
    return TilingSummary(root, [statuses[record.slide_id] for record in records], reused)


def measure_slides(
    records: Sequence[SlideRecord], root: Path, plan: TilingPlan, settings: Mapping[str, Any], workers: int
) -> TilingSummary:
    """Find tiles and regions of every slide that is not done yet, and estimate what cutting them takes; write nothing.

    Args:
        records: The slides.
        root: Output folder that would be written to.
        plan: What would be done with each.
        settings: As for :func:`tile_slides`.
        workers: How many slides would be worked on at once.

    Raises:
        DataError: If ``root`` was tiled with other settings.
    """
    refuse_to_mix(root, settings)
    statuses = _settled(records, root, plan)
    reused = sum(status.status != tables.EXCLUDED for status in statuses.values())
    to_do = [record for record in records if record.slide_id not in statuses]
    measures: list[Measure] = []
    with progress.bar("measuring slides", len(to_do)) as bar:
        work = partial(measure_slide, plan=plan)
        for measure in run_each(work, to_do, workers, lambda record: Measure(failed(record, DEATH))):
            measures.append(measure)
            statuses[measure.status.slide_id] = measure.status
            _report(measure.status)
            bar.advance(note=measure.status.slide_id)
    done = TilingSummary(root, [statuses[record.slide_id] for record in records], reused, dry_run=True)
    return _estimate(done, measures, plan, workers)


def refuse_to_mix(root: Path, settings: Mapping[str, Any]) -> None:
    """Raise a DataError that names what differs, if ``root`` was tiled with other settings."""
    if not (root / tables.TILING_FILE).exists():
        return
    before, now = tables.read_tiling(root).settings, json.loads(json.dumps(dict(settings)))
    differing = [f"{key}={before[key]} (now {now[key]})" for key in now if key in before and before[key] != now[key]]
    if differing:
        raise DataError(
            f"{root} was tiled with {', '.join(differing)}; tiles of two kinds are not mixed: use the same settings, "
            "or another ROOT"
        )


def _settled(records: Sequence[SlideRecord], root: Path, plan: TilingPlan) -> dict[str, SlideStatus]:
    """Statuses of the slides that need no work: excluded ones, and those an earlier run did completely."""
    settled: dict[str, SlideStatus] = {}
    for record in records:
        if record.exclude_reason:
            reason = record.exclude_reason
            settled[record.slide_id] = SlideStatus(record.slide_id, tables.EXCLUDED, reason, **about(record))
            continue
        part = parts.load_part(root, record.slide_id)
        if part and part.made_from == origin_of(record) and _stands(root, part.status, plan):
            settled[record.slide_id] = replace(part.status, **about(record))
    return settled


def _stands(root: Path, status: SlideStatus, plan: TilingPlan) -> bool:
    """True if the slide was done and nothing of it is lost."""
    if status.status not in (tables.OK, tables.NO_TISSUE) or not coordinates.has_result(root, status.slide_id):
        return False
    places = parts.tile_places(root, status.slide_id)
    if places is None or len(places) != status.tiles:
        return False
    return storage.has_tiles(root, status.slide_id, places, plan.storage)


def _bring_up_to_date(root: Path, record: SlideRecord, status: SlideStatus) -> None:
    """Record what changed in the list since a slide was tiled: its patient, partition, place, or exclusion."""
    part = parts.load_part(root, record.slide_id)
    if part is None or part.status != status:
        parts.save_status(root, status, part.made_from if part else origin_of(record))


def _report(status: SlideStatus) -> None:
    if status.status == tables.FAILED:
        progress.warn(f"{status.slide_id} failed: {status.reason}")
    elif status.reason:
        progress.warn(f"{status.slide_id}: {status.reason}")


def _estimate(summary: TilingSummary, measures: Sequence[Measure], plan: TilingPlan, workers: int) -> TilingSummary:
    sampled = max(1, sum(measure.sampled for measure in measures))
    bytes_per_tile = sum(measure.sampled_bytes for measure in measures) / sampled
    seconds_per_tile = sum(measure.sampled_seconds for measure in measures) / sampled
    slides = sum(measure.status.status != tables.FAILED for measure in measures)
    tiles = sum(measure.status.tiles for measure in measures)
    cut = tiles if plan.storage != "none" else 0
    image_files = {"jpeg": tiles, "tar": 2 * slides, "none": 0}[plan.storage]
    other_files = slides * (5 + 3 * plan.previews)  # hs2p's two, the part's three, the previews
    seconds = sum(measure.seconds for measure in measures) + cut * seconds_per_tile
    return replace(
        summary,
        gigabytes=cut * bytes_per_tile / 1e9,
        files=image_files + other_files,
        hours=seconds / 3600 / max(1, min(workers, len(measures))),
    )


def _description(plan: TilingPlan, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Content of tiling.json: the settings that must match, and for the reader how they were carried out."""
    import openslide

    return {
        "format": "histodino-tiling/1",
        "settings": dict(settings),
        "geometry": asdict(plan.geometry),
        "region_size_px": plan.geometry.region_size_px,
        "backend": BACKEND,
        "resampler": RESAMPLER,
        "jpeg": {"encoder": "PIL", "quality": plan.jpeg_quality},
        "segmentation": asdict(segmentation_config(plan.tissue)),
        "qc": asdict(filter_config(plan.tissue)) if plan.tissue.qc else None,
        "versions": {**versions(), "openslide": openslide.__library_version__},
    }
