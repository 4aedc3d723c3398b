"""Versions of everything that a result depends on; written into every record."""

import platform
from importlib import metadata

VERSION = "0.1.0"
PACKAGES = (
    "torch",
    "torchvision",
    "timm",
    "numpy",
    "pillow",
    "simplejpeg",
    "hs2p",
    "openslide-python",
    "openslide-bin",
)


def versions() -> dict[str, str]:
    """Version of this package, of Python, and of those packages that are installed."""
    found = {"histodino": VERSION, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue  # training needs neither hs2p nor openslide
    return found
