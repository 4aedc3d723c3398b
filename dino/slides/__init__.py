"""Tiling of slides, built on hs2p: slide list, lattice, tissue, reading, writing, tables."""

from importlib import resources
from pathlib import Path


def sample_slide() -> Path:
    """Path of CMU-1-Small-Region.svs (sample/PROVENANCE.md): skin, 2,220 x 2,967 px, one level, 0.499 µm/px.

    A small public-domain slide that is part of the package, for the demo and the tests.
    """
    return Path(str(resources.files(__name__) / "sample" / "CMU-1-Small-Region.svs"))
