"""Folders of features under ROOT. Those of several encoders stand side by side, named after them.

==========================================  ===================================================================
``features_<encoder>/``                     level 1: every tile of a slide in one ``.h5``
``region_4096_pretraining[_<encoder>]/``    level 1: one grid (``.pt``) per region
``region_features_<encoder>/``              level 2: every region of a slide in one ``.h5``
``slide_features_<encoder>/``               level 2: one vector per slide
``attention_<encoder>/``                    a map of each slide (``dino attention``), and what made them
``slide_features/``                         level 2 without a name: regions and their mean in one ``.h5``
``words_<encoder>/``                        words of the tiles of all slides, see :mod:`dino.extraction.words`
==========================================  ===================================================================
"""

import re
from pathlib import Path

from dino.errors import ConfigError, DataError
from dino.extraction.record import RECORD, grid_source
from dino.models.grid_source import GridSource
from dino.models.prefixes import HUB, LOCAL, TIMM
from dino.slides.tables import REGIONS_FOLDER, RegionRecord

UNSAFE = re.compile(r"[^\w.+-]+")  # of a file name; \w are letters and digits of any language
CHECKPOINTS, EXPORT = "checkpoints", "backbone"  # folders of a run, which is what their models are named after


def encoder_name(model: str) -> str:
    """The name that a model's features get if none is given: that of the run, the folder, the file, or timm's.

    Args:
        model: Run folder, checkpoint, export, or ``timm:NAME``.

    Returns:
        A name that can be part of a file name.
    """
    if model.startswith((TIMM, HUB)):
        name = model.removeprefix(TIMM).removeprefix(HUB)
    else:
        path = Path(model.removeprefix(LOCAL)).absolute()
        name = path.name if path.is_dir() else path.stem
        if path.parent.name == CHECKPOINTS:
            name = path.parent.parent.name
        elif path.name == EXPORT:
            name = path.parent.name
    return UNSAFE.sub("_", name).strip("._") or "encoder"


def checked(encoder: str) -> str:
    """The name of an encoder that the user gave.

    Raises:
        ConfigError: If it cannot be part of a file name.
    """
    if not encoder or UNSAFE.search(encoder):
        raise ConfigError(f"expected a name of letters, digits and any of . _ + - for an encoder, found '{encoder}'")
    return encoder


def tile_folder(root: Path, encoder: str) -> Path:
    """Folder of the tiles' features."""
    return root / f"features_{encoder}"


def words_folder(root: Path, encoder: str) -> Path:
    """Folder of the words of the tiles' features."""
    return root / f"words_{encoder}"


def attention_folder(root: Path, encoder: str) -> Path:
    """Folder of the attention maps of slides."""
    return root / f"attention_{encoder}"


def grid_folder(root: Path, encoder: str | None) -> Path:
    """Folder of the regions' grids."""
    return root / (f"{REGIONS_FOLDER}_{encoder}" if encoder else REGIONS_FOLDER)


def grid_path(folder: Path, record: RegionRecord) -> Path:
    """The file of a region's grid in a folder of grids."""
    return folder.parent / record.path if folder.name == REGIONS_FOLDER else folder / record.path.name


def grid_record(root: Path, encoder: str | None) -> Path:
    """The ``extract.json`` of the regions' grids; without a name it is ROOT's, as in the first versions."""
    return (grid_folder(root, encoder) if encoder else root) / RECORD


def find_grids(root: Path, encoder: str | None = None, expected: GridSource | None = None) -> Path | None:
    """The folder of the grids to read.

    Args:
        root: ROOT.
        encoder: The name of their encoder. None: grids of ``expected`` if there are any, else those without a name,
            else the only ones.
        expected: The level-1 model that the grids should be of.

    Returns:
        None if ROOT has no such folder.

    Raises:
        DataError: If there are none of that name, or several and it is not known which to read.
    """
    folders = [path for path in sorted(root.glob(f"{REGIONS_FOLDER}*")) if path.is_dir()]
    named = {path.name.removeprefix(f"{REGIONS_FOLDER}_"): path for path in folders if path.name != REGIONS_FOLDER}
    found = ", ".join(named) or "none"
    if encoder is not None:
        if encoder not in named:
            raise DataError(
                f"expected grids of the encoder '{encoder}' in {grid_folder(root, checked(encoder))}, found no such "
                f"folder (encoders in {root}: {found}); run `dino extract MODEL {root} encoder={encoder}` first"
            )
        return named[encoder]
    if expected is not None:
        for folder in folders:
            source = grid_source(folder)
            if source and not expected.differences(source):
                return folder
    if (root / REGIONS_FOLDER).is_dir() or not named:
        return root / REGIONS_FOLDER if (root / REGIONS_FOLDER).is_dir() else None
    if len(named) > 1:
        raise DataError(f"expected to know which grids of {root} to read, found those of {found}; name one encoder")
    return next(iter(named.values()))
