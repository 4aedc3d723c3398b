"""Settings of a run that follow from its initial weights."""

from collections.abc import Collection

from dino import progress
from dino.api.levels import level_of
from dino.config.load import flatten, load_config, to_dict
from dino.config.schema import PatchConfig, RegionConfig
from dino.models.weights import load_backbone_file


def follow_init(config: PatchConfig | RegionConfig, given: Collection[str] = ()) -> PatchConfig | RegionConfig:
    """Take the architecture, patch size and crop sizes of a run from its initial weights, where it has any.

    Args:
        config: Settings of the run.
        given: Keys of settings that are kept, and so have to fit, such as ``model.arch``.

    Returns:
        The settings.

    Raises:
        CheckpointError: If the weights cannot be loaded.
    """
    model = config.model
    if not model.init:
        return config
    start = load_backbone_file(model.init, model.init_arch, verbose=False)
    words = level_of(config).settings_that_fit(config, start)
    changes = dict(word.split("=", 1) for word in words if word.partition("=")[0] not in given)
    if not changes:
        return config
    progress.say(f"{model.init} sets {' '.join(f'{key}={value}' for key, value in changes.items())}")
    return load_config(type(config), overrides={**flatten(to_dict(config)), **changes})
