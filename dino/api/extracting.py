"""``extract``: features of tiles and regions with a level-1 model, or of slides with a level-2 model."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from dino import distributed, progress
from dino.api.levels import level_named
from dino.config.schema import ExtractConfig
from dino.errors import DataError
from dino.extraction.embed import at_input_size, check_settings
from dino.extraction.extractor import ExtractSummary
from dino.extraction.folders import checked, encoder_name
from dino.files import oserror_to_data_error
from dino.lock import RunLock
from dino.models.weights import LoadedBackbone, load_backbone_file

TIMEOUT_MINUTES = 7 * 24 * 60  # processes synchronise only at the end, and one may take hours longer than another


def extract(model: str, root: str | Path, config: ExtractConfig) -> ExtractSummary:
    """Compute features of tiles and feature grids of regions, or slide files from feature grids.

    A level-1 model writes ``ROOT/features_<encoder>/<slide>.h5``, all tiles of a slide, and
    ``ROOT/region_4096_pretraining/<slide>_<x>_<y>.pt``, one float32 ``[npatch x D]`` per region, row-major. A level-2
    model writes ``ROOT/slide_features/<slide>.h5``. With ``config.encoder`` all folders bear its name, see
    :mod:`dino.extraction.folders`. Files that the same model wrote before are skipped. Under ``torchrun`` the slides
    are distributed over the processes.

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
        ConfigError: If a setting is invalid, or another extraction into the same folders is running in ROOT.
    """
    device = distributed.choose_device(config.device)
    check_settings(config.precision, config.batch_size, config.num_workers, device)
    if config.encoder is not None:
        checked(config.encoder)
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"expected a folder at {root}, found {'a file' if root.exists() else 'nothing'}")
    with distributed.process_group(device, TIMEOUT_MINUTES):
        if device.type == "cuda":
            torch.cuda.set_device(device)
        loaded = load_backbone_file(model, config.arch, config.transform, pretrained=config.pretrained)
        loaded = at_input_size(loaded, config.input_size)
        with oserror_to_data_error(root), _locks(root, loaded, config):
            summary = level_named(loaded.level).extractor(loaded, root, config, device).run()
    for line in summary.lines():
        progress.say(line)
    return summary


@contextmanager
def _locks(root: Path, loaded: LoadedBackbone, config: ExtractConfig) -> Iterator[None]:
    """Let one extraction at a time write into each folder of ROOT; a dry run writes nothing."""
    names = [config.encoder or encoder_name(loaded.source)]
    if config.encoder is None:  # also folders without a name
        names.insert(0, "")
    with ExitStack() as stack:
        for name in names if not config.dry_run else ():
            lock = f"extract_{loaded.level}{'_' * bool(name)}{name}.lock.json"
            stack.enter_context(RunLock(root, name=lock).held())
        yield
