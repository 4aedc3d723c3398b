"""What an export contains of a model's training: nothing that names places, slides or patients, unless asked for.

Everything is left out that is not listed here, so that a new entry of a checkpoint is not published by accident.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

from dino.config.schema import LEVEL_CONFIGS
from dino.errors import ConfigError
from dino.models.checkpoint import TEACHER, Description
from dino.models.grid_source import KEY, GridSource, recorded
from dino.privacy import KINDS, count, hash_record

PUBLIC = ("total_steps", "segments", "versions", "selection", *TEACHER)  # the selection contains hashes of files only


def shareable(description: Description, salt: str, *, ids: bool, source: str) -> Description:
    """A description without folders, and with hashes in place of ids.

    Args:
        description: Of a checkpoint or an export.
        salt: For the hashes; another one for every model.
        ids: Keep the ids of slides and patients.
        source: The model, for messages.

    Raises:
        ConfigError: ``ids`` is true, but the source contains only hashes.
    """
    slides = dict(description.training.get("training_slides") or {})
    if ids and "salt" in slides:
        raise ConfigError(
            f"expected ids of slides in {source} for ids=true, found only hashes; export the run itself, or leave out "
            "ids=true"
        )
    kept = {key: description.training[key] for key in PUBLIC if key in description.training}
    if KEY in description.training:
        grids = GridSource.from_dict(description.training[KEY])
        kept[KEY] = recorded(replace(grids, model=base_name(grids.model)) if grids else None)
    if slides:
        kept["training_slides"] = slides if ids else hash_record(slides, salt)
    config = public_settings(description.spec.level, description.config) if description.config else None
    return replace(description, config=config, training=kept)


def public_settings(level: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a run that determine its result, and numbers; no runtime setting with text, such as a folder.

    Args:
        level: Level of the run.
        config: Its settings, nested.
    """
    schema = LEVEL_CONFIGS.get(level)
    return _public(schema, config) if schema else {}


def _public(schema: type, values: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for item in fields(schema):
        value = values.get(item.name)
        if isinstance(value, Mapping) and is_dataclass(item.type):
            found[item.name] = _public(item.type, value)  # type: ignore[arg-type]
        elif item.name in values and (item.metadata.get("identity") or not isinstance(value, str)):
            found[item.name] = base_name(value) if isinstance(value, str) else value
    return found


def base_name(text: str) -> str:
    """A path without its folders; names of timm's models and other text as they are."""
    return text if text.startswith(("timm:", "hf-hub:")) else re.split(r"[\\/]", text.rstrip("\\/"))[-1]


def identifying(training: Mapping[str, Any], config: Mapping[str, Any] | None) -> dict[str, str]:
    """What a file tells a reader about slides, patients and folders, in words.

    Args:
        training: As in :class:`~dino.models.checkpoint.Description`.
        config: Settings of the run, nested; None where unknown.
    """
    slides = training.get("training_slides") or {}
    what = "salted hashes" if "salt" in slides else "ids"
    found = {f"{kind}s": f"{count(slides, kind)} {what}" if count(slides, kind) else "none" for kind in KINDS}
    rows = sum(int(one.get("count", 0)) for one in training.get("selection") or [])
    if rows:
        found["labels"] = f"{rows} salted hashes of the files that chose the checkpoint"
    return {**found, "folders": ", ".join(_folders(config or {})) or "none"}


def _folders(config: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Keys of settings that name folders."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _folders(value, f"{prefix}{key}.")
        elif isinstance(value, str) and base_name(value) != value:
            yield f"{prefix}{key}"
