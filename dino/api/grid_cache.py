"""Where level 2 takes its grids from: one packed file where that can be had, held on the GPU where they fit."""

import hashlib
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from dino import distributed, progress
from dino.config.schema import RegionConfig
from dino.data.grid_files import GridEntry, survey
from dino.data.grid_folder import GridFolder
from dino.data.packed import GridFiles, PackedGrids, find_packed, pack
from dino.errors import ConfigError
from dino.files import printable

AUTO, NONE = "auto", "none"
BESIDE = ".histodino"  # hidden: listings of images and grids pass it by
AUTO_SHARE = 0.25  # of the free GPU memory that grids may take when nobody said how much


def grid_source(folder: Path, entries: Sequence[GridEntry], config: RegionConfig) -> tuple[GridFolder, Tensor | None]:
    """The grids of a run.

    Args:
        folder: Where the files are.
        entries: The files.
        config: The run's settings.

    Returns:
        The source, and the ``(n, h * w, D)`` cells that the crops are to hold; None where batches bring their own.

    Raises:
        DataError: If the grids cannot be trained on.
        ConfigError: If ``speed.gpu_cache`` cannot be had.
    """
    # Autocast rounds what enters the first layer, so that the network sees the same numbers in half the bytes.
    dtype = torch.bfloat16 if config.speed.precision == "bf16" else torch.float32
    files = GridFiles(folder, entries, config.grid_order, dtype)
    packed = _packed(files, config)
    if packed is None:
        with progress.bar("check grids", len(entries)) as bar:
            found = survey(folder, entries, bar.advance, config.training.max_bad_fraction)
        budget_on(distributed.choose_device(config.speed.device), config.speed.gpu_cache)
        return GridFolder(files, found), None
    cells = _held(packed.cells, distributed.choose_device(config.speed.device), config.speed.gpu_cache)
    return GridFolder(files, packed.survey, packed, by_row=cells is not None), cells


def _packed(files: GridFiles, config: RegionConfig) -> PackedGrids | None:
    """The packed grids from the first place that has them, else from the first that takes them."""
    places, fraction = _places(files.root, config.speed.cache_dir), config.training.max_bad_fraction
    for place in places:
        found = find_packed(place, files, fraction)
        if found is not None:
            return found
    for place in places if not config.dry_run else ():
        try:
            return pack(place, files, fraction)
        except OSError as error:
            progress.say(f"feature grids cannot be packed into {printable(place)}: {printable(error)}")
    if places and not config.dry_run:
        progress.warn("every feature grid is read from its own file, which is slow; speed.cache_dir=FOLDER packs them")
    return None


def _places(folder: Path, wanted: str) -> list[Path]:
    """Cache folders for the grids of ``folder``, best first."""
    if wanted == NONE:
        return []
    own = f"{folder.resolve().name}-{hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:12]}"
    if wanted != AUTO:
        return [Path(wanted) / own]
    home = Path(os.environ.get("HOME") or tempfile.gettempdir())
    user = Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache")
    return [folder / BESIDE, user / "histodino" / own]


def _held(cells: Tensor, device: torch.device, wanted_gb: float | None) -> Tensor | None:
    """The cells where crops can take them on ``device``, None where they do not fit there."""
    budget, needed = budget_on(device, wanted_gb), cells.numel() * cells.element_size()
    if device.type == "cpu":
        return cells  # mapped: the operating system keeps in memory what fits
    if needed > budget:
        progress.say(
            f"the feature grids take {needed / 1e9:.1f} GB, more than the {budget / 1e9:.1f} GB of the GPU for them "
            "(speed.gpu_cache): they are copied batch by batch"
        )
        return None
    return cells.to(device)


def budget_on(device: torch.device, wanted_gb: float | None) -> float:
    """Bytes of a device's memory that grids may take.

    Args:
        device: Where the run computes.
        wanted_gb: What was asked for in GB, or None for a share of what is free.

    Raises:
        ConfigError: If that is more than is free, or the device is no GPU.
    """
    if device.type == "cpu":
        if wanted_gb:
            raise ConfigError(
                f"expected a GPU for speed.gpu_cache={wanted_gb:g}, found the CPU, where grids are mapped into memory "
                "without it; leave it out"
            )
        return 0.0
    free = torch.cuda.mem_get_info(device)[0]
    if wanted_gb is None:
        return AUTO_SHARE * free
    if wanted_gb < 0 or wanted_gb * 1e9 > free:
        raise ConfigError(
            f"expected speed.gpu_cache of at most the {free / 1e9:.1f} GB that are free on {device}, "
            f"found {wanted_gb:g}; lower it, or leave it out"
        )
    return wanted_gb * 1e9
