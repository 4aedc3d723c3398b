"""Features of 256 px tiles from JPEG files and from a slide, against timm with a DataLoader and torchvision v2."""

import importlib.util
import math
import statistics
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from torch import Tensor, nn

from benchmarks.material import IMAGENET, TILE_PX, sample_slide, tile_files, tile_origins
from benchmarks.measure import Duel, Row, Setting, clock_of, expect_close, flops, in_turn, relative_error, without_tf32
from benchmarks.reference.data import WholeTiles, loader, open_rgb
from dino.data.images import decode
from dino.extraction.embed import batches, embed, embed_batches, normaliser, read_ahead
from dino.extraction.regions import Reading, plan_cells, write_regions
from dino.extraction.tile_files import Layout, TileFile, create
from dino.models.backbone import Backbone, BackboneSpec, build_backbone
from dino.slides.lattice import cells_of_region
from dino.slides.tables import RegionRecord, region_path

TITLE = "extraction"
# Our precision, the comparator's, and the target ratio on a CPU (on a GPU the target is a rate).
PAIRS = (("bf16", "fp32", 3.0), ("bf16", "bf16", 1.3), ("fp32", "fp32", None))
GPU_RATE = 12_000
TILE_FILES = 0.97  # of the rate without them
GRID = (8, 8)  # cells of a region on the sample slide


class Ours:
    """This package's path from tiles to features.

    Args:
        backbone: The network.
        items: Tiles, in the form that ``read`` takes.
        read: Reads one tile as (3, S, S) uint8.
        batch: Tiles in a batch.
        workers: Reading threads.
        device: Device to compute on.
    """

    def __init__(
        self,
        backbone: Backbone,
        items: Sequence[Any],
        read: Callable[[Any], Tensor],
        batch: int,
        workers: int,
        device: torch.device,
    ) -> None:
        self.backbone, self.items, self.read = backbone, items, read
        self.batch, self.workers, self.device = batch, workers, device
        self.normalise = normaliser(IMAGENET.mean, IMAGENET.std, 16)

    def __call__(self, precision: str) -> Tensor:
        """(N, D)."""
        pixels = read_ahead(self.read, self.items, self.workers, 2 * self.batch)
        return embed(self.backbone, batches(pixels, self.batch), self.normalise, self.device, precision)


class Theirs:
    """timm's model under autocast with a DataLoader.

    Args:
        model: The network.
        data: Normalised tiles.
        batch: Tiles in a batch.
        workers: Worker processes.
        device: Device to compute on.
    """

    def __init__(self, model: nn.Module, data: WholeTiles, batch: int, workers: int, device: torch.device) -> None:
        self.model, self.device = model.to(device).eval(), device
        self.loader = loader(data, batch, workers)

    @torch.inference_mode()
    def __call__(self, precision: str) -> Tensor:
        """(N, D)."""
        found = []
        for pixels in self.loader:
            with torch.autocast(self.device.type, torch.bfloat16) if precision == "bf16" else nullcontext():
                found.append(self.model(pixels.to(self.device, non_blocking=True)).float().cpu())
        return torch.cat(found)


def network(arch: str) -> tuple[Backbone, nn.Module]:
    """Our backbone, and timm's model with the same weights."""
    backbone = build_backbone(BackboneSpec(arch, "patch", 3, (TILE_PX, TILE_PX), 16), seed=0)
    vit: Any = backbone.vit
    sizes = {"embed_dim": vit.embed_dim, "depth": len(vit.blocks), "num_heads": vit.blocks[0].attn.num_heads}
    model = timm.create_model("vit_small_patch16_224", img_size=TILE_PX, num_classes=0, **sizes)
    model.load_state_dict(vit.state_dict())
    return backbone, model


def run(setting: Setting) -> Iterator[Row]:
    """From JPEG files, then from the sample slide."""
    arch = "vit:dim=64,depth=2,heads=2" if setting.quick else "vit_small"
    batch, count = setting.size(64, 256, 2), setting.size(64, 4096, 4)
    workers = 1 if setting.quick else 2 if not setting.on_gpu else 15
    backbone, model = network(arch)
    paths = tile_files(setting.folder / "tiles", count)
    ours = Ours(backbone, paths, decode, batch, workers, setting.device)
    theirs = Theirs(model, WholeTiles(paths, open_rgb, IMAGENET.mean, IMAGENET.std), batch, workers, setting.device)
    yield from _measure("JPEG", arch, ours, theirs, setting)
    del theirs
    if any(importlib.util.find_spec(name) is None for name in ("hs2p", "openslide")):
        yield Row("extraction from a slide", skipped="hs2p and openslide are not installed here")
        return
    with _slide_cells() as read:
        places = tile_origins(count)
        ours = Ours(backbone, places, read, batch, workers, setting.device)
        data = WholeTiles(places, partial(_openslide_tile, sample_slide()), IMAGENET.mean, IMAGENET.std)
        yield from _measure("slide", arch, ours, Theirs(model, data, batch, workers, setting.device), setting)
        yield _cost_of_tile_files(arch, ours, setting)


def _measure(pixels: str, arch: str, ours: Ours, theirs: Theirs, setting: Setting) -> Iterator[Row]:
    setting.notice(f"{arch}, {len(ours.items)} tiles from {pixels}: ours in alternation with timm, bf16 and fp32")
    few = Ours(ours.backbone, ours.items[:4], ours.read, 4, 0, ours.device)
    with without_tf32():
        equality = expect_close("features (fp32)", relative_error(few("fp32"), theirs("fp32")[:4]), 1e-4)
    precisions = ("bf16", "fp32") if setting.has_bf16 or setting.quick else ("fp32",)
    works = {f"{side} {p}": partial(who, p) for side, who in (("our", ours), ("their", theirs)) for p in precisions}
    seconds = dict(zip(works, in_turn(list(works.values()), setting.rounds(3), setting.device), strict=True))
    reading = _reading_rate(ours)
    per_tile = flops(
        lambda: embed(ours.backbone, [torch.zeros(1, 3, TILE_PX, TILE_PX)], ours.normalise, ours.device, "fp32")
    )
    for mine, yours, target in PAIRS if setting.has_bf16 or setting.quick else PAIRS[-1:]:
        result = Duel(seconds[f"our {mine}"], seconds[f"their {yours}"])
        row = result.row(f"extraction {pixels} {mine}", len(ours.items), "tiles/s", f"timm, DataLoader, v2, {yours}")
        row.equality = equality
        row.target = None if setting.quick or setting.on_gpu else target
        row.note = f"reading alone {reading:,.0f} tiles/s a thread"
        row.details = {"arch": arch, "batch": ours.batch, "workers": ours.workers, "precision": mine}
        row.details |= {"gflop_per_item": round(per_tile / 1e9, 2), "reading_per_thread": round(reading, 1)}
        if setting.on_gpu and mine == "bf16":
            row.details["rate_wanted"] = GPU_RATE
        yield row


def _cost_of_tile_files(arch: str, ours: Ours, setting: Setting) -> Row:
    """One region of the sample slide, as often as the other rows have tiles, with a tile file of its cells and without.

    The cells that are read and embedded are the same.
    """
    grid = (2, 2) if setting.quick else GRID
    record = RegionRecord("s", 0, 0, TILE_PX, grid, 0.5, region_path("s", 0, 0), np.ones(grid, np.float32))
    coords = cells_of_region(0, 0, TILE_PX, grid)
    repeats = max(1, len(ours.items) // len(coords))
    reading = Reading(ours.batch, ours.workers, 2 * ours.batch)
    layout, slide = Layout(ours.backbone.embed_dim), setting.size(10_000, 10_000, 100)

    def embedder(inputs: Iterable[Tensor]) -> Generator[Tensor, None, None]:
        return embed_batches(ours.backbone, inputs, ours.normalise, ours.device, "bf16")

    def file_of(places: np.ndarray) -> AbstractContextManager[TileFile]:
        return create(setting.folder / "s.h5", places, layout, {"name": "s"}, {"model": "m"})

    def extract(with_tiles: bool) -> None:
        plan = plan_cells([record], coords if with_tiles else None)
        for _ in range(repeats):
            with file_of(coords) if with_tiles else nullcontext() as file:
                path = setting.folder / "s.pt"
                write_regions(plan, [path], lambda cell: ours.read(cell)[None], embedder, reading, tile_file=file)

    def write() -> None:
        many = np.arange(2 * slide).reshape(-1, 2)
        with file_of(many) as file:
            for rows in np.array_split(np.arange(len(many)), math.ceil(len(many) / ours.batch)):
                file.write(rows, torch.zeros(len(rows), layout.dim))

    setting.notice(f"{arch}, {repeats} regions of {len(coords)} tiles: with tile files and without")
    works, clock = [partial(extract, True), partial(extract, False)], clock_of(setting.device)
    with_files, without = in_turn(works, setting.rounds(5), setting.device, clock=clock)
    (alone,) = in_turn([write], setting.rounds(5), setting.device)
    count = repeats * len(coords)
    row = Duel(with_files, without).row("extraction with tile files", count, "tiles/s", "regions only")
    row.target = None if setting.quick else TILE_FILES
    row.note = f"writing {slide:,} tiles of a slide alone {1e6 * statistics.median(alone) / slide:,.1f} µs a tile"
    row.details = {"arch": arch, "batch": ours.batch, "workers": ours.workers, "tiles_per_file": len(coords)}
    return row


def _reading_rate(ours: Ours) -> float:
    items = ours.items[:32]
    spent = in_turn([lambda: [ours.read(item) for item in items]], range(3), torch.device("cpu"))[0]
    return len(items) / statistics.median(spent)


class _slide_cells:  # noqa: N801 - used like a function
    """Context manager: the sample slide, opened by this package's reader."""

    def __enter__(self) -> Callable[[tuple[int, int]], Tensor]:
        from dino.slides.lattice import Geometry
        from dino.slides.reader import SlideReader

        self.reader = SlideReader(sample_slide(), Geometry(tile_size_px=TILE_PX))
        return lambda place: torch.from_numpy(self.reader.read_cell(*place).transpose(2, 0, 1).copy())

    def __exit__(self, *error: object) -> None:
        self.reader.close()


_open_slides: dict[Path, Any] = {}


def _openslide_tile(slide: Path, place: tuple[int, int]) -> Image.Image:
    """One tile read with openslide; a slide is opened once per process."""
    import openslide

    if slide not in _open_slides:
        _open_slides[slide] = openslide.OpenSlide(slide)
    return _open_slides[slide].read_region(place, 0, (TILE_PX, TILE_PX)).convert("RGB")
