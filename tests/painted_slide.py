"""Writes synthetic slides for tests: tiled, uncompressed Aperio TIFFs with given pixels, levels and metadata."""

import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np

TILE = 64  # tile size of the TIFF, unrelated to the tiles that are cut
ENTRY = {"short": (3, "H"), "long": (4, "I"), "ascii": (2, "s")}


def coordinates(width: int, height: int, unit: int = 32) -> np.ndarray:
    """Pixels that encode their position: red is x // unit, green y // unit; with blue 255, hs2p finds tissue."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x // unit, y // unit, np.full_like(x, 255)], axis=-1).astype(np.uint8)


def noise(width: int, height: int, seed: int = 0) -> np.ndarray:
    """Smooth random pixels in which hs2p finds tissue."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 200, (height // 8 + 2, width // 8 + 2, 2))
    fine = np.kron(coarse, np.ones((8, 8, 1), dtype=int))[:height, :width] + rng.integers(0, 40, (height, width, 2))
    return np.concatenate([fine, np.full((height, width, 1), 255)], axis=-1).astype(np.uint8)


def halved(pixels: np.ndarray) -> np.ndarray:
    """The next level of a pyramid: means of 2 x 2 px."""
    height, width = pixels.shape[0] // 2, pixels.shape[1] // 2
    blocks = pixels[: 2 * height, : 2 * width].reshape(height, 2, width, 2, -1)
    return blocks.mean(axis=(1, 3)).astype(np.uint8)


def write_slide(
    path: Path, levels: Sequence[np.ndarray], mpp: float | str | None = 0.5, power: float | None = None
) -> Path:
    """Write uint8 RGB ``levels`` as a slide that openslide opens.

    Args:
        path: Path of the slide.
        levels: Pixels of each level, the finest first.
        mpp: Spacing in the metadata, if any.
        power: Objective power in the metadata, if any.
    """
    about = "Aperio Image Library v0\r\npainted"
    about += f"|MPP = {mpp}" * (mpp is not None) + f"|AppMag = {power}" * (power is not None)
    data = bytearray(b"II*\0\0\0\0\0")
    link = 4  # position of the offset of the next directory
    for pixels in levels:
        height, width = pixels.shape[:2]
        padded = np.pad(pixels, ((0, -height % TILE), (0, -width % TILE), (0, 0)))
        offsets = []
        for top in range(0, padded.shape[0], TILE):
            for left in range(0, padded.shape[1], TILE):
                offsets.append(len(data))
                data += padded[top : top + TILE, left : left + TILE].tobytes()
        link = _append_directory(data, link, _tags(width, height, about, offsets))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(data))
    return path


def _tags(width: int, height: int, about: str, offsets: list[int]) -> list[tuple[int, str, list[int] | bytes]]:
    return [
        (256, "long", [width]),
        (257, "long", [height]),
        (258, "short", [8, 8, 8]),
        (259, "short", [1]),
        (262, "short", [2]),
        (270, "ascii", about.encode() + b"\0"),
        (277, "short", [3]),
        (284, "short", [1]),
        (322, "long", [TILE]),
        (323, "long", [TILE]),
        (324, "long", offsets),
        (325, "long", [TILE * TILE * 3] * len(offsets)),
    ]


def _append_directory(data: bytearray, link: int, tags: list[tuple[int, str, list[int] | bytes]]) -> int:
    """Append one TIFF directory and link it; returns the position of the link to the next one."""
    entries = bytearray(struct.pack("<H", len(tags)))
    for tag, kind, values in tags:
        number, letter = ENTRY[kind]
        body = values if isinstance(values, bytes) else struct.pack(f"<{len(values)}{letter}", *values)
        if len(body) > 4:
            field = struct.pack("<I", len(data))
            data += body + b"\0" * (len(body) % 2)
        else:
            field = body.ljust(4, b"\0")
        entries += struct.pack("<HHI", tag, number, len(values)) + field
    data[link : link + 4] = struct.pack("<I", len(data))
    data += entries + b"\0\0\0\0"
    return len(data) - 4
