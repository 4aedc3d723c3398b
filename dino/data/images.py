"""Image files to pixels, and folders to lists of image files."""

import hashlib
import io
import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import overload

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from dino.errors import DataError
from dino.files import printable

SUFFIXES = {".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp"}
SLIDE_SUFFIXES = {".svs", ".ndpi", ".mrxs", ".scn", ".vms", ".vmu", ".svslide", ".bif", ".czi"}  # never tiles
TIFFS_CHECKED = 4  # of a folder, whether they are slides
TILE_WIDTH_TAG = 322  # of TIFF 6.0
LARGEST_PX = 64_000_000  # a larger image is a slide or a decompression bomb
LARGEST_BYTES = 8 * LARGEST_PX  # uncompressed 16-bit RGBA: a larger file is not even read
SEPARATOR = "\0"  # of folders while names are sorted: sorts before every letter, as in sorted paths
JPEG_COLOURS = {"YCbCr", "RGB", "Gray"}  # those that simplejpeg converts; Pillow decodes CMYK and YCCK
END = "\0"  # of a name; no file name contains it

try:
    import simplejpeg
except ImportError:  # Pillow decodes the same pixels in 2.5 times the time
    simplejpeg = None


def decode(path: Path) -> Tensor:
    """Decode an image file to 8-bit RGB as it is stored (EXIF orientation is not applied).

    Grey becomes RGB, 16 bits are scaled to 8, transparent pixels are blended with white (glass), CMYK is converted, and
    of an animation the first frame is decoded. Floating-point images are not accepted.

    Args:
        path: JPEG, PNG, TIFF, BMP or WebP file.

    Returns:
        ``(3, H, W)`` uint8 tensor.

    Raises:
        DataError: If the file cannot be decoded, is not a regular file, or has more than 64 million pixels or 512 MB.
    """
    try:
        content = _read(path)
    except DataError as error:
        raise DataError(f"cannot use {printable(path)}: {error}") from None
    except OSError as error:
        raise DataError(f"cannot decode {printable(path)}: {type(error).__name__}: {printable(error)[:200]}") from None
    return decode_bytes(content, path)


def decode_bytes(content: bytes, name: Path | str) -> Tensor:
    """Decode the content of an image file, as :func:`decode`.

    Args:
        content: The bytes.
        name: What to call them in messages.

    Returns:
        ``(3, H, W)`` uint8 tensor.

    Raises:
        DataError: If they cannot be decoded, or have more than 64 million pixels.
    """
    try:
        if simplejpeg is not None and content[:2] == b"\xff\xd8":
            height, width, colours, _ = simplejpeg.decode_jpeg_header(content)
            if colours in JPEG_COLOURS and int(height) * int(width) <= LARGEST_PX:
                pixels = simplejpeg.decode_jpeg(content, "RGB")  # (H, W, 3)
                return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()
        return _decode_with_pillow(content)
    except DataError as error:
        raise DataError(f"cannot use {printable(name)}: {error}") from None
    except UnidentifiedImageError:  # its own message contains a memory address, which differs each time
        raise DataError(f"cannot decode {printable(name)}: found no image in it") from None
    except Exception as error:  # the decoders raise many types for what is not an image
        reason = f"{type(error).__name__}: {printable(error)[:200]}"
        raise DataError(f"cannot decode {printable(name)}: {reason}") from None


def _read(path: Path) -> bytes:
    facts = path.stat()
    if not stat.S_ISREG(facts.st_mode):  # reading a pipe or a device would block
        raise DataError("expected a file, found a folder, pipe or device; remove it from the folder")
    if facts.st_size > LARGEST_BYTES:
        raise DataError(f"expected a tile, found a file of {facts.st_size / 1e9:.1f} GB; cut slides with `dino tile`")
    return path.read_bytes()


def _decode_with_pillow(content: bytes) -> Tensor:
    with Image.open(io.BytesIO(content)) as image:
        if image.width * image.height > LARGEST_PX:
            raise DataError(f"expected a tile, found {image.width} x {image.height} px; cut slides with `dino tile`")
        if image.mode == "F":
            raise DataError(
                "expected 8 or 16 bits per value, found floating point, whose white is not known; convert it"
            )
        if image.mode.startswith("I;16") or image.mode == "I":
            grey = np.asarray(image).astype(np.float64) / 257  # 65535 -> 255
            image_rgb = Image.fromarray(grey.round().clip(0, 255).astype(np.uint8)).convert("RGB")
        elif image.mode in {"RGBA", "LA", "PA"} or "transparency" in image.info:
            layer = image.convert("RGBA")
            image_rgb = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
        else:
            image_rgb = image.convert("RGB")
    return torch.from_numpy(np.array(image_rgb)).permute(2, 0, 1).contiguous()  # (3, H, W)


def list_images(root: Path) -> list[Path]:
    """Path of every image file under ``root``, in the order of :func:`list_names`."""
    return [root / name for name in list_names(root)]


def list_names(root: Path, only: Mapping[str, str] | None = None) -> list[str]:
    """Path within ``root`` of every image file under it, sorted; hidden files and folders are left out.

    Args:
        root: Folder, flat or nested. Each linked folder is followed once, so that cycles end.
        only: For folders that contain a file of a given name, the one subfolder of them that is searched.

    Raises:
        DataError: If the folder is missing, contains no image, or contains slides.
    """
    if not root.is_dir():
        raise DataError(f"expected a folder of images at {root}, found {'a file' if root.exists() else 'nothing'}")
    found, others, slides = [], 0, []  # strings: a million Paths would take minutes and a gigabyte
    for prefix, shown in walk(root, only):
        images = [prefix + name for name in shown if name[name.rfind(".") :].lower() in SUFFIXES]
        found += images
        others += len(shown) - len(images)
        slides += [prefix + name for name in shown if name[name.rfind(".") :].lower() in SLIDE_SUFFIXES]
    check_no_slides(root, slides, found)
    if not found:
        kinds = " ".join(sorted(SUFFIXES))
        raise DataError(
            f"expected images ({kinds}) under {printable(root)}, found {others} other files; check the folder"
        )
    found.sort()
    for index, name in enumerate(found):  # in place: a second list would double the memory
        found[index] = name.replace(SEPARATOR, os.sep)
    return found


def walk(root: Path, only: Mapping[str, str] | None = None) -> Iterator[tuple[str, list[str]]]:
    """The files of a folder and of each folder below it that is not hidden, without hidden files.

    Args:
        root: The folder. Each linked folder is followed once, so that cycles end.
        only: For folders that contain a file of a given name, the one subfolder of them that is visited.

    Yields:
        Path of a folder within ``root``, each part followed by :data:`SEPARATOR`, and the names of the files in it.

    Raises:
        DataError: If a folder cannot be read.
    """
    seen: set[str] = set()
    for folder, folders, files in os.walk(root, followlinks=True, onerror=_raise_unreadable):
        real = os.path.realpath(folder)
        folders[:] = [] if real in seen else sorted(name for name in folders if not name.startswith("."))
        shown = [] if real in seen else [name for name in files if not name.startswith(".")]
        for inner in (inner for marker, inner in (only or {}).items() if marker in shown):
            folders[:], shown = [name for name in folders if name == inner], []
        inner = folder[len(os.fspath(root)) :].strip(os.sep)
        yield inner.replace(os.sep, SEPARATOR) + SEPARATOR if inner else "", shown
        seen.add(real)


def check_no_slides(root: Path, slides: list[str], images: list[str]) -> None:
    """Raise DataError if a folder contains slides: files of their formats, or TIFF pyramids among its images."""
    tiffs = [name for name in images if name.lower().endswith((".tif", ".tiff"))]
    checked = (name.replace(SEPARATOR, os.sep) for name in tiffs[:: max(1, len(tiffs) // TIFFS_CHECKED)])
    found = [name.replace(SEPARATOR, os.sep) for name in slides] or [n for n in checked if is_pyramid(root / n)]
    if found:
        raise DataError(
            f"expected tiles under {printable(root)}, found slides, such as {printable(min(found))}; cut them with "
            f"`dino tile {printable(root)} ROOT` and give ROOT, or move them elsewhere"
        )


def is_pyramid(path: Path) -> bool:
    """Whether a TIFF file is a slide: stored in tiles, with further pages (levels, label). Only its header is read."""
    try:
        with Image.open(path) as image:
            return TILE_WIDTH_TAG in getattr(image, "tag_v2", ()) and getattr(image, "n_frames", 1) > 1
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return False  # a file that cannot be decoded is dealt with when it is


def _raise_unreadable(error: OSError) -> None:
    raise DataError(f"expected a readable folder at {printable(error.filename)}, found none: {error.strerror}")


class Names(Sequence[str]):
    """A list of file names as one block of bytes, which takes half the memory of a list of strings.

    Forked workers share the block with their parent. A list of strings would be copied page by page, because reading a
    string changes its reference count.

    Args:
        names: The names, in order.
    """

    def __init__(self, names: Iterable[str]) -> None:
        joined = END.join(names)
        self._block: bytes | np.ndarray = os.fsencode(joined + END) if joined else b""
        self._ends = np.flatnonzero(np.frombuffer(self._block, np.uint8) == 0) + 1

    @classmethod
    def of_block(cls, block: np.ndarray, ends: np.ndarray) -> "Names":
        """Names that are in memory, or mapped into it, already.

        Args:
            block: uint8; each name followed by :data:`END`.
            ends: ``(N,)`` int64, where each ends in it.
        """
        names = cls(())
        names._block, names._ends = block, ends
        return names

    @property
    def block(self) -> tuple[np.ndarray, np.ndarray]:
        """The arguments of :meth:`of_block`."""
        return np.frombuffer(self._block, np.uint8), self._ends

    def __len__(self) -> int:
        """Number of names."""
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        """The name at an index, or those of a slice."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        end = int(self._ends[index])
        start = int(self._ends[index - 1]) if index % len(self) else 0
        return os.fsdecode(bytes(self._block[start : end - 1]))

    @property
    def fingerprint(self) -> str:
        """Hash of the names in order."""
        return hashlib.sha256(self.block[0].data).hexdigest()
