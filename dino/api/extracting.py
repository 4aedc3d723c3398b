"""``extract``: features of regions with a level-1 model, or of slides with a level-2 model."""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

from dino import distributed, progress
from dino.api.levels import level_named
from dino.config.schema import ExtractConfig
from dino.errors import DataError
from dino.extraction.embed import check_settings
from dino.extraction.extractor import ExtractSummary
from dino.files import oserror_to_data_error
from dino.lock import RunLock
from dino.models.weights import load_backbone_file

TIMEOUT_MINUTES = 7 * 24 * 60  # processes synchronise only at the end, and one may take hours longer than another


def extract(model: str, root: str | Path, config: ExtractConfig) -> ExtractSummary:
    """Compute feature grids of regions, or slide files from feature grids.

    A level-1 model writes ``ROOT/region_4096_pretraining/<slide>_<x>_<y>.pt``, one float32 ``[npatch x D]`` per region,
    row-major. A level-2 model writes ``ROOT/slide_features/<slide>.h5``. Files that the same model wrote before are
    skipped. Under ``torchrun`` the slides are distributed over the processes.

    Args:
        model: Run folder, checkpoint, export, external checkpoint, or ``timm:NAME``.
        root: ROOT that ``dino tile`` wrote; or a folder of region images (level 1) or ``.pt`` grids (level 2).
        config: Settings.

    Returns:
        The summary. A slide that cannot be read does not stop the others; it is listed in ``failures``.

    Raises:
        DataError: If ROOT does not contain what the model needs, or contains features made with different settings, or
            the disk cannot be written.
        CheckpointError: If the model cannot be loaded.
        ConfigError: If a setting is invalid, or another extraction of this level is running in ROOT.
    """
    check_settings(config.precision, config.batch_size, config.num_workers)
    root, device = Path(root), distributed.choose_device(config.device)
    distributed.check_precision(config.precision, device)
    if not root.is_dir():
        raise DataError(f"expected a folder at {root}, found {'a file' if root.exists() else 'nothing'}")
    with distributed.process_group(device, TIMEOUT_MINUTES):
        if device.type == "cuda":
            torch.cuda.set_device(device)
        loaded = load_backbone_file(model, config.arch, config.transform, pretrained=config.pretrained)
        with oserror_to_data_error(root), _lock(root, loaded.level, config.dry_run):
            summary = level_named(loaded.level).extractor(loaded, root, config, device).run()
    for line in summary.lines():
        progress.say(line)
    return summary


def _lock(root: Path, level: str, dry_run: bool) -> AbstractContextManager[None]:
    """Let one extraction of each level at a time write into ROOT; a dry run writes nothing."""
    return nullcontext() if dry_run else RunLock(root, name=f"extract_{level}.lock.json").held()
