"""Image files to pixels, and folders to lists of image files."""

import io
import os
import stat
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from dino.errors import DataError
from dino.files import printable

SUFFIXES = {".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp"}
LARGEST_PX = 64_000_000  # beyond this a file is no tile but a slide or a decompression bomb
LARGEST_BYTES = 8 * LARGEST_PX  # 16-bit RGBA without compression: what is larger is not even read
LEVEL = "\0"  # between folder and file while names are sorted: before every letter, as when paths are sorted
JPEG_COLOURS = {"YCbCr", "RGB", "Gray"}  # those that the fast decoder converts; CMYK and YCCK are Pillow's

try:
    import simplejpeg
except ImportError:  # Pillow decodes the same pixels, at 2.5 times the cost
    simplejpeg = None


def list_images(root: Path) -> list[Path]:
    """Every image file under ``root``, as :func:`list_names` finds and orders them."""
    return [root / name for name in list_names(root)]


def list_names(root: Path) -> list[str]:
    """Path within ``root`` of every image file under it, sorted; hidden files and folders are left out.

    Args:
        root: Folder, flat or nested. Linked folders are followed once, so that circles end.

    Raises:
        DataError: If the folder is missing or holds no image.
    """
    if not root.is_dir():
        raise DataError(f"expected a folder of images at {root}, found {'a file' if root.exists() else 'nothing'}")
    found, others, seen = [], 0, set()  # strings: a million paths take minutes and a gigabyte
    for folder, folders, files in os.walk(root, followlinks=True, onerror=_refuse_folder):
        real = os.path.realpath(folder)
        folders[:] = [] if real in seen else sorted(name for name in folders if not name.startswith("."))
        shown = [] if real in seen else [name for name in files if not name.startswith(".")]
        inner = folder[len(os.fspath(root)) :].strip(os.sep)
        prefix = inner.replace(os.sep, LEVEL) + LEVEL if inner else ""
        images = [prefix + name for name in shown if name[name.rfind(".") :].lower() in SUFFIXES]
        found += images
        others += len(shown) - len(images)
        seen.add(real)
    if not found:
        kinds = " ".join(sorted(SUFFIXES))
        raise DataError(
            f"expected images ({kinds}) under {printable(root)}, found {others} other files; check the folder"
        )
    found.sort()
    for index, name in enumerate(found):  # in place: a second list would be as large
        found[index] = name.replace(LEVEL, os.sep)
    return found


def _refuse_folder(error: OSError) -> None:
    raise DataError(f"expected a readable folder at {printable(error.filename)}, found none: {error.strerror}")


def decode(path: Path) -> Tensor:
    """Decode an image file to 8-bit RGB as it is stored (EXIF orientation is not applied).

    Grey becomes RGB, 16-bit is scaled to 8, transparency is laid over white (glass), CMYK is converted, and of an
    animation the first frame is taken. Floating-point images are refused.

    Args:
        path: JPEG, PNG, TIFF, BMP or WebP file.

    Returns:
        ``(3, H, W)`` uint8 tensor.

    Raises:
        DataError: If the file cannot be decoded, is no regular file, or has more than 64 million pixels or 512 MB.
    """
    try:
        content = _read(path)
        if simplejpeg is not None and content[:2] == b"\xff\xd8":
            height, width, colours, _ = simplejpeg.decode_jpeg_header(content)
            if colours in JPEG_COLOURS and int(height) * int(width) <= LARGEST_PX:
                pixels = simplejpeg.decode_jpeg(content, "RGB")  # (H, W, 3)
                return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()
        return _decode_with_pillow(content)
    except DataError as error:
        raise DataError(f"cannot use {printable(path)}: {error}") from None
    except UnidentifiedImageError:  # its own message holds an address in memory, another one each time
        raise DataError(f"cannot decode {printable(path)}: found no image in it") from None
    except Exception as error:  # the decoders raise many types; all of them mean a file that is not an image
        reason = f"{type(error).__name__}: {printable(error)[:200]}"
        raise DataError(f"cannot decode {printable(path)}: {reason}") from None


def _read(path: Path) -> bytes:
    facts = path.stat()
    if not stat.S_ISREG(facts.st_mode):  # reading a pipe or a device would wait for ever
        raise DataError("expected a file, found a folder, pipe or device; take it out of the folder")
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
