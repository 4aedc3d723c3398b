"""DINO pretraining for pathology: from whole slides to a hierarchical model."""

import sys
from pathlib import Path
from typing import Any

from dino.environment import VERSION

__version__ = VERSION
__all__ = ["__version__", "load_backbone"]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    """``dino.load_backbone``, imported on first use."""
    if name == "load_backbone":
        from dino.api.exporting import load_backbone

        return load_backbone
    raise AttributeError(f"module 'dino' has no attribute '{name}'")


def __dir__() -> list[str]:
    """The public names and packages, for completion: they may not be imported yet."""
    return [*__all__, "api", "config"]


def _is_command(argv: list[str], orig_argv: list[str]) -> bool:
    """Whether this process runs ``dino …`` or ``python -m dino …``, or is a worker process of multiprocessing."""
    if any("multiprocessing" in word for word in orig_argv):  # spawn and forkserver name it in their command line
        return True
    if argv[:1] == ["-m"]:  # what Python sets while it looks for the module
        return orig_argv[orig_argv.index("-m") + 1 :][:1] == ["dino"]
    return bool(argv) and Path(argv[0]).stem == "dino"


# `import dino` registers the region architectures with timm, so that timm can build level-2 exports. This imports
# torch, which takes seconds; commands and worker processes skip it and import what they need.
if not _is_command(sys.argv, sys.orig_argv):
    import dino.models.inputs  # noqa: F401
