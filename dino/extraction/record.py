"""``extract.json``: the model and settings of the features in a folder, so that different features are not mixed."""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dino import files
from dino.environment import versions
from dino.errors import DataError
from dino.models.grid_source import SHOWN, GridSource
from dino.slides.tables import REGIONS_FOLDER

if TYPE_CHECKING:  # imports torch, which readers of records do not need
    from dino.models.weights import LoadedBackbone

RECORD = "extract.json"
ANOTHER_NAME = "for a second model give a name to its folders: encoder=NAME"
COMPARED = ("level", "fingerprint", "transform", "precision", "geometry", "grids", "features", "storage")
EARLIER = {"features": "cls"}  # what records of earlier versions do not contain


def model_record(loaded: "LoadedBackbone", precision: str, embed_dim: int) -> dict[str, Any]:
    """The entries of a record that describe the model, its precision, and the dimension of the features."""
    return {
        "level": loaded.level,
        "model": loaded.source,
        "fingerprint": loaded.fingerprint,
        "arch": loaded.backbone.spec.arch,
        "embed_dim": embed_dim,
        "step": loaded.step,
        "transform": asdict(loaded.transform) if loaded.transform else None,
        "precision": precision,
        "versions": versions(),
    }


def differences(before: Mapping[str, Any], record: Mapping[str, Any], keys: Iterable[str] = COMPARED) -> list[str]:
    """What makes the features of two records different, in words; empty for features that may be mixed."""
    before, record = EARLIER | dict(before), EARLIER | dict(record)
    return [
        f"{key} {_format(key, before)}, now {_format(key, record)}"
        for key in keys
        if _as_json(before.get(key)) != _as_json(record.get(key))
    ]


Compare = Callable[[Mapping[str, Any], Mapping[str, Any]], list[str]]


def check_folder(
    path: Path,
    record: Mapping[str, Any],
    folder: Path,
    suffix: str,
    *,
    content: str = "features",
    elsewhere: str = ANOTHER_NAME,
    compare: Compare = differences,
) -> dict[str, Any]:
    """Check that ``folder`` does not contain features made with different settings.

    Args:
        path: The ``extract.json``.
        record: The record of this extraction: model, transform, precision, geometry and others.
        folder: Folder of the features.
        suffix: Suffix of their files.
        content: What the files are, for messages.
        elsewhere: How to write others beside them, for messages.
        compare: What makes two records different.

    Returns:
        The earlier record; empty if there is none.

    Raises:
        DataError: If the folder contains features made with another model, transform, precision or geometry, or
            features without a record.
    """
    if not folder.is_dir() or not any(p.suffix == suffix and p.name[0] != "." for p in folder.iterdir()):
        return {}
    before = read_record(path)
    if not before:
        raise DataError(
            f"expected a record of the {content} in {folder} at {path}, found none; they may be from another model: "
            f"move them, or {elsewhere}"
        )
    found = compare(before, record)
    if found:
        raise DataError(
            f"expected {content} of the same model and settings in {folder}, found {content} made with different "
            f"settings: {'; '.join(found)}; {elsewhere}, or delete {folder} to compute them again"
        )
    return before


def check_made_by(folder: Path, loaded: "LoadedBackbone", otherwise: str) -> None:
    """Check that the features in a folder are of a model, where that is recorded.

    Args:
        folder: The folder.
        loaded: The model.
        otherwise: What to do if they are not.

    Raises:
        DataError: If they are of another model.
    """
    made_by = read_record(folder / RECORD).get("fingerprint")
    if made_by is not None and made_by != loaded.fingerprint:
        raise DataError(
            f"expected features of {loaded.source} in {folder}, found those of another model "
            f"({made_by[:SHOWN]}, not {loaded.fingerprint[:SHOWN]}); extract with encoder=NAME, or {otherwise}"
        )


def prepare_folders(folders: Iterable[Path], record: Path) -> None:
    """Create the folders of the features, and remove temporary files that killed processes left.

    Args:
        folders: Folders of the features.
        record: The ``extract.json``.
    """
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
        files.tidy(folder)
    files.tidy(record.parent, record.name)


def write_record(path: Path, record: Mapping[str, Any], before: Mapping[str, Any]) -> None:
    """Write ``extract.json``; the pixel sources of earlier slides are kept."""
    pixels = {**before.get("pixels", {}), **record.get("pixels", {})}
    files.write_json(path, {**record, "pixels": pixels} if pixels else dict(record))


def read_record(path: Path) -> dict[str, Any]:
    """The content of an ``extract.json``, or of the ``attention.json`` of maps; empty if there is none.

    Raises:
        DataError: If it is damaged.
    """
    try:
        content = files.read_json(path)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise DataError(f"expected {path} as written by `dino {path.stem}`, could not read it: {error}") from None
    if not isinstance(content, dict):
        raise DataError(
            f"expected {path} as written by `dino {path.stem}`, found no JSON object; delete it and its folder"
        )
    return content


def grid_source(folder: Path) -> GridSource | None:
    """Source of the feature grids in a folder, from the record in it or in its ROOT; None if there is none.

    Args:
        folder: The folder with the ``.pt`` files.

    Raises:
        DataError: If the record is damaged.
    """
    folder = folder.absolute()
    roots = (folder, folder.parent) if folder.name == REGIONS_FOLDER else (folder,)
    sources = (GridSource.from_extraction(read_record(root / RECORD)) for root in roots)
    return next((source for source in sources if source), None)


def _as_json(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str, sort_keys=True))


def _format(key: str, record: Mapping[str, Any]) -> str:
    if key == "fingerprint":
        return f"{str(record.get(key))[:12]} ({record.get('model')})"
    text = json.dumps(record.get(key), default=str)
    return text if len(text) <= 160 else text[:157] + "..."
