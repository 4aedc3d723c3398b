"""Features of 256 px tiles from JPEG files and from a slide, against timm with a DataLoader and torchvision v2."""

import importlib.util
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image
from torch import Tensor, nn

from benchmarks.material import IMAGENET, TILE_PX, sample_slide, tile_files, tile_origins
from benchmarks.measure import Duel, Row, Setting, expect_close, flops, in_turn, relative_error, without_tf32
from benchmarks.reference.data import WholeTiles, loader, open_rgb
from dino.data.images import decode
from dino.extraction.embed import batches, embed, normaliser, read_ahead
from dino.models.backbone import Backbone, BackboneSpec, build_backbone

TITLE = "extraction"
# Our precision, the comparator's, and the target ratio on a CPU (on a GPU the target is a rate).
PAIRS = (("bf16", "fp32", 3.0), ("bf16", "bf16", 1.3), ("fp32", "fp32", None))
GPU_RATE = 12_000


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


def _measure(pixels: str, arch: str, ours: Ours, theirs: Theirs, setting: Setting) -> Iterator[Row]:
    setting.notice(f"{arch}, {len(ours.items)} tiles from {pixels}: ours in alternation with timm, bf16 and fp32")
    few = Ours(ours.backbone, ours.items[:4], ours.read, 4, 0, ours.device)
    with without_tf32():
        equality = expect_close("features (fp32)", relative_error(few("fp32"), theirs("fp32")[:4]), 1e-4)
    works = {
        f"{side} {p}": partial(who, p) for side, who in (("our", ours), ("their", theirs)) for p in ("bf16", "fp32")
    }
    seconds = dict(zip(works, in_turn(list(works.values()), setting.rounds(3), setting.device), strict=True))
    reading = _reading_rate(ours)
    per_tile = flops(
        lambda: embed(ours.backbone, [torch.zeros(1, 3, TILE_PX, TILE_PX)], ours.normalise, ours.device, "fp32")
    )
    for mine, yours, target in PAIRS:
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
