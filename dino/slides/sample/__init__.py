"""A small public-domain slide that ships with the package, for the demo and the tests (see PROVENANCE.md)."""

from importlib import resources
from pathlib import Path


def sample_slide() -> Path:
    """Path of CMU-1-Small-Region.svs: skin, 2,220 x 2,967 px, one level, 0.499 µm/px."""
    return Path(str(resources.files(__name__) / "CMU-1-Small-Region.svs"))
