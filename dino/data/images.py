"""Image files to pixels, and folders to lists of image files."""

import io
import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dino.errors import DataError

SUFFIXES = {".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp"}
LARGEST_PX = 64_000_000  # beyond this a file is no tile but a slide or a decompression bomb

try:
    import simplejpeg
except ImportError:  # Pillow decodes the same pixels, at 2.5 times the cost
    simplejpeg = None


def list_images(root: Path) -> list[Path]:
    """Every image file under ``root``, sorted by path; hidden files and folders are left out.

    Args:
        root: Folder, flat or nested. Linked folders are followed once, so that circles end.

    Raises:
        DataError: If the folder is missing or holds no image.
    """
    if not root.is_dir():
        raise DataError(f"expected a folder of images at {root}, found {'a file' if root.exists() else 'nothing'}")
    found, seen = [], set()
    for folder, folders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        folders[:] = [] if real in seen else sorted(name for name in folders if not name.startswith("."))
        found += [] if real in seen else [Path(folder, f) for f in files if not f.startswith(".")]
        seen.add(real)
    images = sorted(path for path in found if path.suffix.lower() in SUFFIXES)
    if not images:
        kinds = " ".join(sorted(SUFFIXES))
        raise DataError(f"expected images ({kinds}) under {root}, found {len(found)} other files; check the folder")
    return images


def decode(path: Path) -> Tensor:
    """Decode an image file to 8-bit RGB as it is stored (EXIF orientation is not applied).

    Grey becomes RGB, 16-bit is scaled to 8, transparency is laid over white (glass), CMYK is converted, and of an
    animation the first frame is taken.

    Args:
        path: JPEG, PNG, TIFF, BMP or WebP file.

    Returns:
        ``(3, H, W)`` uint8 tensor.

    Raises:
        DataError: If the file cannot be decoded, or has more than 64 million pixels.
    """
    try:
        content = path.read_bytes()
        if simplejpeg is not None and content[:2] == b"\xff\xd8":
            height, width, colours, _ = simplejpeg.decode_jpeg_header(content)
            if colours != "CMYK" and height * width <= LARGEST_PX:
                pixels = simplejpeg.decode_jpeg(content, "RGB")  # (H, W, 3)
                return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()
        return _decode_with_pillow(content)
    except DataError as error:
        raise DataError(f"cannot use {path}: {error}") from None
    except Exception as error:  # the decoders raise many types; all of them mean a file that is not an image
        raise DataError(f"cannot decode {path}: {type(error).__name__}: {str(error)[:200]}") from None


def _decode_with_pillow(content: bytes) -> Tensor:
    with Image.open(io.BytesIO(content)) as image:
        if image.width * image.height > LARGEST_PX:
            raise DataError(f"expected a tile, found {image.width} x {image.height} px; cut slides with `dino tile`")
        if image.mode.startswith("I;16") or image.mode == "I":
            grey = np.asarray(image).astype(np.float64) / 257  # 65535 -> 255
            image_rgb = Image.fromarray(grey.round().clip(0, 255).astype(np.uint8)).convert("RGB")
        elif image.mode in {"RGBA", "LA", "PA"} or "transparency" in image.info:
            layer = image.convert("RGBA")
            image_rgb = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
        else:
            image_rgb = image.convert("RGB")
    return torch.from_numpy(np.array(image_rgb)).permute(2, 0, 1).contiguous()  # (3, H, W)
