"""DINO pretraining for pathology: from whole slides to a hierarchical model."""

from typing import Any

from dino.environment import VERSION
from dino.models.registration import register_with_timm

__version__ = VERSION
__all__ = ["__version__", "load_backbone"]  # pyright: ignore[reportUnsupportedDunderAll]

register_with_timm()  # so that timm can build exported region backbones


def __getattr__(name: str) -> Any:
    """``dino.load_backbone``, imported when it is first asked for: it brings torch along."""
    if name == "load_backbone":
        from dino.api.exporting import load_backbone

        return load_backbone
    raise AttributeError(f"module 'dino' has no attribute '{name}'")
