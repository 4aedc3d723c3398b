"""From a tile to ten crops on one core, against Pillow and torchvision v2; and on a GPU the crops alone."""

import io
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.material import IMAGENET, original_crops, tile_files
from benchmarks.measure import Duel, Row, Setting, drain, duel, expect_close, timed
from benchmarks.reference.crops import PillowCrops, TensorCrops
from dino import randomness
from dino.crops.images import ImageCrops
from dino.data.images import decode

TITLE = "tile to crops"
# Mean difference in grey levels: Pillow rounds to 8 bits after every step and blurs by boxes.
LEVELS = {"Pillow": 3.0, "torchvision v2": 1.5}
BATCH = 16

Views = Callable[[list[Path]], Iterator[list[Tensor]]]  # of tiles, one batch after another


class Ours:
    """Decode, draw and apply in batches, as a training run does."""

    def __init__(self, crops: ImageCrops, batch: int = BATCH) -> None:
        self.crops, self.batch = crops, batch

    def __call__(self, paths: list[Path]) -> Iterator[list[Tensor]]:
        """One (V_g, B, 3, s, s) tensor per size, for each batch."""
        for start in range(0, len(paths), self.batch):
            yield self.crops.apply(*drawn_batch(self.crops, paths[start : start + self.batch], start))


def drawn_batch(crops: ImageCrops, paths: list[Path], first: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Tiles of one size and their crop parameters."""
    pixels = torch.stack([decode(path) for path in paths])
    drawn = [draw(crops, (pixels.shape[2], pixels.shape[3]), first + row) for row in range(len(paths))]
    return pixels, {key: torch.from_numpy(np.stack([one[key] for one in drawn])) for key in drawn[0]}


def draw(crops: ImageCrops, shape: tuple[int, int], number: int) -> dict[str, np.ndarray]:
    """Crop parameters of one tile."""
    return crops.draw(shape, None, randomness.generator(0, number, "crops"))


def by_pillow(crops: ImageCrops) -> Views:
    """Decode and crop with Pillow, tile by tile."""
    theirs = PillowCrops(crops.view_sizes, IMAGENET.mean, IMAGENET.std)

    def make(paths: list[Path]) -> Iterator[list[Tensor]]:
        images = (Image.open(path).convert("RGB") for path in paths)
        return (theirs(image, draw(crops, (image.height, image.width), n)) for n, image in enumerate(images))

    return make


def by_torchvision(crops: ImageCrops) -> Views:
    """Decode and crop with torchvision v2, tile by tile."""
    theirs = TensorCrops(crops.view_sizes, IMAGENET.mean, IMAGENET.std)

    def make(paths: list[Path]) -> Iterator[list[Tensor]]:
        tiles = (_tensor(path) for path in paths)
        return (theirs(tile, draw(crops, (tile.shape[1], tile.shape[2]), n)) for n, tile in enumerate(tiles))

    return make


def _tensor(path: Path) -> Tensor:
    with Image.open(io.BytesIO(path.read_bytes())) as image:
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def run(setting: Setting) -> Iterator[Row]:
    """Against Pillow and torchvision v2; on a GPU also the rate of applying crops there."""
    crops = original_crops((32, 16), 3) if setting.quick else original_crops()
    paths = tile_files(setting.folder / "tiles", setting.size(64, 64, 4))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        decoding = _decode_rate(paths)
        for name, theirs, target in (
            ("Pillow", by_pillow(crops), 2.0),
            ("torchvision v2", by_torchvision(crops), None),
        ):
            setting.notice(f"decode, draw and crop {len(paths)} tiles on one core, in alternation with {name}")
            equality = check(crops, name, theirs, paths[:8])
            row = _one_core(crops, theirs, paths, setting).row(
                "crops of a tile, one core", len(paths), "tiles/s", name, equality=equality
            )
            row.target = None if setting.quick else target
            row.limit, row.limited_by = decoding, "decoding JPEG"
            yield row
    finally:
        torch.set_num_threads(threads)
    if setting.on_gpu or setting.quick:  # quick: so that this code runs without a GPU as well
        yield on_device(crops, setting)


def _one_core(crops: ImageCrops, theirs: Views, paths: list[Path], setting: Setting) -> Duel:
    ours = Ours(crops)
    return duel(lambda: drain(ours(paths)), lambda: drain(theirs(paths)), setting.rounds(5), torch.device("cpu"))


def _decode_rate(paths: list[Path]) -> float:
    return len(paths) / min(timed(lambda: [decode(path) for path in paths], torch.device("cpu")) for _ in range(3))


def check(crops: ImageCrops, name: str, theirs: Views, paths: list[Path]) -> str:
    """Check that the crops are equal up to the comparator's rounding.

    Raises:
        RuntimeError: If they differ.
    """
    (groups,) = Ours(crops, len(paths))(paths)
    ours = [view for group in groups for view in group]  # V tensors (B, 3, s, s)
    expected = list(theirs(paths))  # B lists of V tensors (3, s, s)
    levels = 255 * torch.tensor(IMAGENET.std)[:, None, None]
    differences = [
        float(((ours[v][b] - tile[v]) * levels).abs().mean())
        for b, tile in enumerate(expected)
        for v in range(len(ours))
    ]
    mean = sum(differences) / len(differences)
    return expect_close(f"crops, mean difference in grey levels from {name}", mean, LEVELS[name])


def on_device(crops: ImageCrops, setting: Setting) -> Row:
    """Rate of applying crops on the device of ``setting``, compared with those of the CPU."""
    setting.notice(f"apply crops on {setting.device}")
    batch = setting.size(16, 256, 4)
    paths = tile_files(setting.folder / "tiles", batch)
    pixels, drawn = drawn_batch(crops, paths, 0)
    on_device = pixels.to(setting.device)
    # A value next to a threshold (solarize, saturation at 0 and 1) may fall on its other side: count, take no maximum.
    views = zip(crops.apply(on_device, drawn), crops.apply(pixels, drawn), strict=True)
    differing = [float(((found.cpu() - expected).abs() > 0.01).float().mean()) for found, expected in views]
    equality = expect_close("crops on both devices, fraction of values that differ by 0.01", max(differing), 1e-3)
    seconds = [timed(lambda: crops.apply(on_device, drawn), setting.device) for _ in setting.rounds(9)]
    return Row(
        f"crops applied on {setting.device.type}",
        "tiles/s",
        batch / statistics.median(seconds),
        rounds=len(seconds),
        target=20_000 if setting.on_gpu and not setting.quick else None,
        equality=equality,
        details={"batch": batch},
    )
