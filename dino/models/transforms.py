"""How pixels become a model's input: part of a checkpoint, because features mean nothing without it."""

import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from dino.errors import ConfigError
from dino.progress import warn


@dataclass(frozen=True)
class Transform:
    """How pixels become a model's input: (pixels / 255 - mean) / std.

    Attributes:
        name: ``imagenet``, ``hipt`` or ``timm``.
        mean: Per channel, of values in [0, 1].
        std: Per channel.
        input_size_px: Size that the whole tile is resized to first; None for none.
    """

    name: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    input_size_px: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {**asdict(self), "mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Transform":
        """The transform that ``to_dict`` wrote."""
        return cls(values["name"], tuple(values["mean"]), tuple(values["std"]), values.get("input_size_px"))


TRANSFORMS = {
    "imagenet": Transform("imagenet", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "hipt": Transform("hipt", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}


def timm_transform(config: Mapping[str, Any]) -> Transform:
    """The transform in a timm ``pretrained_cfg``: the whole tile, resized to the model's input size."""
    imagenet = TRANSFORMS["imagenet"]
    size = config.get("input_size")
    mean, std = config.get("mean") or imagenet.mean, config.get("std") or imagenet.std
    return Transform("timm", tuple(mean), tuple(std), int(size[-1]) if size else None)


def choose_transform(wanted: str, stored: Transform | None, source: str, verbose: bool = True) -> Transform:
    """The transform of a level-1 model.

    Args:
        wanted: ``auto`` (the stored one, else imagenet with a warning), ``imagenet``, ``hipt`` or ``timm``.
        stored: The one in the checkpoint, if any.
        source: Name of the checkpoint in messages.
        verbose: Whether to print the warning.

    Raises:
        ConfigError: ``wanted`` is unknown, or ``timm`` for a checkpoint that is not timm's.
    """
    if wanted not in ("auto", "timm", *TRANSFORMS):
        raise ConfigError(f"transform: expected auto, {', '.join(TRANSFORMS)} or timm, found {wanted!r}")
    if wanted == "timm" and (stored is None or stored.name != "timm"):
        raise ConfigError(f"transform=timm: {source} is no timm model: choose auto, imagenet or hipt")
    if wanted in TRANSFORMS:
        return replace(TRANSFORMS[wanted], input_size_px=stored.input_size_px if stored else None)
    if stored is not None:
        return stored
    if verbose:
        warn(
            f"{source} has no recorded normalization, assuming imagenet (HIPT itself used mean = std = 0.5: "
            f"transform=hipt; for model.init first `dino export {shlex.quote(source)} DIR transform=hipt`, then "
            "model.init=DIR)"
        )
    return TRANSFORMS["imagenet"]
