"""Tiles per second of one core from each kind of storage, in random order, against a plain dataset.

Tile files and shards are compared with JPEG files that Pillow opens, slides with openslide. The files are in the page
cache: the rows compare what reading and decoding cost, not disks.
"""

import multiprocessing
import tarfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from benchmarks.endtoend import LARGEST_WAIT, OurTurn, plan_vit_small
from benchmarks.material import tile_files
from benchmarks.measure import Duel, Row, Setting, drain, duel, expect_close
from dino.api.roots import Root
from dino.api.sources import open_tiles
from dino.api.tiling import tile
from dino.config.load import load_config
from dino.config.schema import PatchConfig, PatchSpeedConfig, SamplingConfig, TileConfig
from dino.data import Dataset, EncodedTiles, FolderTiles, PermutationSampler, TileDataset, slide_tiles
from dino.data.shards import ParquetTiles, TarTiles, open_parquet, open_tars
from dino.data.slide_tiles import Placement, SlideTileDataset
from dino.slides import sample_slide
from dino.slides.places import read_places
from dino.slides.tables import read_tiles

TITLE = "sources of tiles"
SHARD = 512  # tiles
ROW_GROUP = 64
BATCH = 64
FEW_SLIDES, MANY_SLIDES, MANY_DRAWS = 60, 600, 512  # slides that stay open, and more than that
CACHE_MB = 8.0  # of both readers of one slide: all of the small slide of this benchmark fits into a larger one
COMPARATOR, SLIDE_COMPARATOR = "PIL dataset in a DataLoader", "openslide dataset in a DataLoader"


class PlainTiles(TorchDataset):
    """A dataset as it is usually written: one JPEG file per tile, opened by Pillow."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        with Image.open(self.paths[index]) as image:
            return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


class PlainSlideTiles(TorchDataset):
    """The same for a slide: tiles at places of level 0, read by openslide."""

    def __init__(self, path: Path, places: list[tuple[int, int]], size_px: int) -> None:
        import openslide

        self.path, self.slide, self.places, self.size_px = path, openslide.OpenSlide(path), places, size_px
        self.slide.set_cache(openslide.OpenSlideCache(round(CACHE_MB * 1e6)))

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Tensor:
        pixels = self.slide.read_region(self.places[index], 0, (self.size_px, self.size_px)).convert("RGB")
        return torch.from_numpy(np.array(pixels)).permute(2, 0, 1)

    def opened(self, index: int) -> Tensor:
        """The same through a handle of its own."""
        import openslide

        with openslide.OpenSlide(self.path) as slide:
            pixels = slide.read_region(self.places[index], 0, (self.size_px, self.size_px)).convert("RGB")
        return torch.from_numpy(np.array(pixels)).permute(2, 0, 1)


def from_files(paths: list[Path], folder: Path) -> EncodedTiles:
    """One JPEG file per tile."""
    return FolderTiles(paths[0].parent, [path.name for path in paths])


def from_tars(paths: list[Path], folder: Path) -> EncodedTiles:
    """Tar files of :data:`SHARD` tiles."""
    folder.mkdir(exist_ok=True)
    for start in range(0, len(paths), SHARD):
        with tarfile.open(folder / f"{start:06d}.tar", "w") as tar:
            for path in paths[start : start + SHARD]:
                tar.add(path, path.name)
    return TarTiles(*open_tars(folder, "auto", of_slides=False, may_write=True))


def from_parquet(paths: list[Path], folder: Path) -> EncodedTiles:
    """Parquet files of :data:`SHARD` tiles in row groups of :data:`ROW_GROUP`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir(exist_ok=True)
    for start in range(0, len(paths), SHARD):
        some = paths[start : start + SHARD]
        table = pa.table({"path": [path.name for path in some], "jpeg": [path.read_bytes() for path in some]})
        pq.write_table(table, folder / f"{start:06d}.parquet", compression="none", row_group_size=ROW_GROUP)
    return ParquetTiles(*open_parquet(folder, "auto", may_write=True))


SOURCES: Mapping[str, Callable[[list[Path], Path], EncodedTiles]] = {
    "JPEG files": from_files,
    "tar": from_tars,
    "parquet": from_parquet,
}


def run(setting: Setting) -> Iterator[Row]:
    """A row for each source, for few and many slides, and for a step from slides."""
    yield from _stored(setting)
    root = setting.folder / "sources" / "slides"
    tile([sample_slide()], root, TileConfig(overlap=0.75, region_size_px=1024, storage="none", previews=False))
    yield _slides(root, setting)
    for count in (3,) if setting.quick else (FEW_SLIDES, MANY_SLIDES):
        yield _many_slides(root, count, setting)
    yield _step(root, setting)


def _stored(setting: Setting) -> Iterator[Row]:
    folder = setting.folder / "sources"
    paths = sorted(tile_files(folder / "jpeg", setting.size(2048, 8192, 16)))
    order = [PermutationSampler(len(paths), 0)(draw) for draw in range(len(paths))]
    plain = DataLoader(PlainTiles(paths), batch_size=BATCH, sampler=order)
    for name, source in SOURCES.items():
        setting.notice(f"{len(paths)} tiles from {name}")
        tiles = TileDataset(source(paths, folder / name.replace(" ", "_")))
        result = duel(
            lambda t=tiles: drain(t[index].pixels for index in order),
            lambda: drain(plain),
            setting.rounds(5),
            setting.device,
        )
        row = result.row(f"tiles from {name}", len(paths), "tiles/s per core", COMPARATOR)
        row.equality = _check(tiles, paths)
        row.details = {"tiles": len(paths), "worker_mb": _worker_mb(tiles, order)}
        row.note = f"{row.details['worker_mb']} MB per worker"
        yield row


def _tiles_of(root: Path) -> Dataset:
    return open_tiles(load_config(PatchConfig, overrides={"data_dir": str(root)})).dataset


def _slides(root: Path, setting: Setting) -> Row:
    """Tiles of the sample slide, with overlap so that there are some hundreds.

    Ours are read as in training: the tiles of a batch in the order of their places.
    """
    slide_tiles.CACHE_MB = CACHE_MB
    tiles = _tiles_of(root)
    places = [(one.x, one.y) for one in read_tiles(root)]
    count = setting.size(len(places), len(places), 16)
    order = [PermutationSampler(len(places), 0)(draw) for draw in range(count)]
    in_batches = [index for start in range(0, count, BATCH) for index in sorted(order[start : start + BATCH])]
    plain = PlainSlideTiles(sample_slide(), places, 256)
    loader = DataLoader(plain, batch_size=BATCH, sampler=order)
    setting.notice(f"{count} tiles from a slide")
    result = duel(
        lambda: drain(tiles[index].pixels for index in in_batches),
        lambda: drain(loader),
        setting.rounds(5),
        setting.device,
    )
    row = result.row("tiles from a slide", count, "tiles/s per core", SLIDE_COMPARATOR)
    equal = all(torch.equal(tiles[index].pixels, plain[index]) for index in order[:32])
    row.equality = "equal pixels" if equal else "DIFFERENT PIXELS"
    row.details = {"tiles": count, "worker_mb": _worker_mb(tiles, order)}
    row.note = f"{row.details['worker_mb']} MB per worker"
    return row


def _many_slides(root: Path, count: int, setting: Setting) -> Row:
    """Tiles of many slides, which are the same file, in random order: most draws are of another slide than the last.

    Ours keeps some slides open. The other one opens the slide of each tile.
    """
    plain = PlainSlideTiles(sample_slide(), [(one.x, one.y) for one in read_tiles(root)], 256)
    listed, source = next(iter(read_places(root).values())), Root(root).tiled_slides(None)
    names = [f"slide_{number:04}" for number in range(count)]
    slides = replace(source, status=dict.fromkeys(names, source.status[listed.slide_id]))
    placement = Placement.of(SamplingConfig(), source.geometry.spacing_um, source.geometry.tile_size_px, 0)
    tiles = SlideTileDataset([replace(listed, slide_id=name) for name in names], slides, {}, placement)
    draws = setting.size(MANY_DRAWS, MANY_DRAWS, 8)
    order = [PermutationSampler(len(tiles), 0)(draw) for draw in range(draws)]
    in_batches = [index for start in range(0, draws, BATCH) for index in sorted(order[start : start + BATCH])]
    setting.notice(f"{draws} tiles from {count} slides")
    for index in range(0, len(tiles), len(plain)):  # a run has opened them before
        tiles[index]
    result = duel(
        lambda: drain(tiles[index].pixels for index in in_batches),
        lambda: drain(plain.opened(index % len(plain)) for index in order),
        setting.rounds(3),
        setting.device,
    )
    row = result.row(f"tiles from {count} slides", draws, "tiles/s per core", "opening the slide of each tile")
    equal = all(torch.equal(tiles[index].pixels, plain[index % len(plain)]) for index in order[:16])
    row.equality = "equal pixels" if equal else "DIFFERENT PIXELS"
    row.details = {"slides": count, "open_slides": PatchSpeedConfig.open_slides, "worker_mb": _worker_mb(tiles, order)}
    row.note = f"{row.details['worker_mb']} MB per worker"
    return row


def _step(root: Path, setting: Setting) -> Row:
    """A training step of ViT-S/16 from slides beside the same step from JPEG files."""
    paths = sorted(tile_files(setting.folder / "sources" / "jpeg", setting.size(256, 2048, 4)))
    files = TileDataset(FolderTiles(paths[0].parent, [path.name for path in paths]))
    plans = [plan_vit_small(tiles, setting) for tiles in (_tiles_of(root), files)]
    plan = plans[0]
    setting.notice(f"{plan.task.arch} from slides, batch {plan.task.batch}, {plan.workers} worker processes")
    turns = [OurTurn(one) for one in plans]
    results = [[turn() for turn in turns] for _ in setting.rounds(3)]  # (rounds, 2) of seconds, and those of waiting
    row = Duel([ours[0] for ours, _ in results], [theirs[0] for _, theirs in results]).row(
        f"step from slides {plan.task.arch}", plan.task.batch * plan.steps, "img/s", "the same step from JPEG files"
    )
    waits = [sum(one[i][1] for one in results) / sum(one[i][0] for one in results) for i in (0, 1)]
    row.note = (
        f"waiting for data {waits[0]:.2%} of a step (target < {LARGEST_WAIT:.0%}), {waits[1]:.2%} from JPEG files"
    )
    row.equality = "equal pixels, see above"
    row.details = {"batch": plan.task.batch, "workers": plan.workers, "waiting_shares": [round(w, 5) for w in waits]}
    return row


def _check(tiles: TileDataset, paths: list[Path]) -> str:
    """Pixels beside Pillow's; decoders differ by rounding only."""
    own = {tiles[index].name: tiles[index].pixels for index in range(0, len(tiles), max(1, len(tiles) // 16))}
    theirs = PlainTiles(paths)
    error = max(
        (own[path.name].float() - theirs[i].float()).abs().mean().item()
        for i, path in enumerate(paths)
        if path.name in own
    )
    return expect_close("pixels", error, 1.0)


def _worker_mb(tiles: Dataset, order: list[int]) -> float:
    """MB that a forked worker has for itself after it has read every tile."""
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    worker = context.Process(target=_read_all, args=(tiles, order, queue))
    worker.start()
    found = queue.get(timeout=600)
    worker.join()
    return found


def _read_all(tiles: Dataset, order: list[int], queue: multiprocessing.Queue) -> None:
    torch.set_num_threads(1)  # as workers of a DataLoader do: the threads of the parent do not survive a fork
    drain(tiles[index].pixels for index in order)
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    queue.put(round(sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024, 1))
