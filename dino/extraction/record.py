"""``extract.json``: which model and settings made the features of a folder, so that different ones are never mixed."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dino import files
from dino.environment import versions
from dino.errors import DataError
from dino.models.weights import LoadedBackbone

RECORD = "extract.json"
COMPARED = ("level", "fingerprint", "transform", "precision", "geometry", "grids")


def model_record(loaded: LoadedBackbone, precision: str) -> dict[str, Any]:
    """What is recorded about the model and its precision."""
    return {
        "level": loaded.level,
        "model": loaded.source,
        "fingerprint": loaded.fingerprint,
        "arch": loaded.backbone.spec.arch,
        "embed_dim": loaded.backbone.embed_dim,
        "step": loaded.step,
        "transform": asdict(loaded.transform) if loaded.transform else None,
        "precision": precision,
        "versions": versions(),
    }


def check_folder(path: Path, record: Mapping[str, Any], folder: Path, suffix: str) -> dict[str, Any]:
    """Refuse to write into ``folder`` if it contains features made with different settings.

    Args:
        path: The ``extract.json``.
        record: The present model, transform, precision, geometry and other facts.
        folder: Folder of the features.
        suffix: Suffix of their files.

    Returns:
        What was recorded before; empty the first time.

    Raises:
        DataError: If the folder contains features made with another model, transform, precision or geometry, or
            features without a record.
    """
    if not folder.is_dir() or not any(p.suffix == suffix and p.name[0] != "." for p in folder.iterdir()):
        return {}
    before = read_record(path)
    if not before:
        raise DataError(
            f"expected a record of the features in {folder} at {path}, found none; they may be of another model: "
            "move them, or use another ROOT"
        )
    differences = [
        f"{key} {_text(key, before)}, now {_text(key, record)}"
        for key in COMPARED
        if _plain(before.get(key)) != _plain(record.get(key))
    ]
    if differences:
        raise DataError(
            f"expected features of the same model and settings in {folder}, found features made with different "
            "settings: "
            f"{'; '.join(differences)}; use another ROOT, or delete {folder} to compute them again"
        )
    return before


def make_tidy_folders(folders: Iterable[Path], record: Path) -> None:
    """Create the folders of the features, and remove partial files of a killed process.

    Args:
        folders: Folders of the features.
        record: The ``extract.json``.
    """
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
        files.tidy(folder)
    files.tidy(record.parent, record.name)


def write_record(path: Path, record: Mapping[str, Any], before: Mapping[str, Any]) -> None:
    """Write ``extract.json``; the sources of pixels of earlier slides are kept."""
    pixels = {**before.get("pixels", {}), **record.get("pixels", {})}
    files.write_json(path, {**record, "pixels": pixels} if pixels else dict(record))


def read_record(path: Path) -> dict[str, Any]:
    """The content of an ``extract.json``; empty when there is none.

    Raises:
        DataError: If it is damaged.
    """
    try:
        content = files.read_json(path)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise DataError(f"expected {path} as `dino extract` wrote it, could not read it: {error}") from None
    if not isinstance(content, dict):
        raise DataError(f"expected {path} as `dino extract` wrote it, found no JSON object; delete it and its folder")
    return content


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str, sort_keys=True))


def _text(key: str, record: Mapping[str, Any]) -> str:
    if key == "fingerprint":
        return f"{str(record.get(key))[:12]} ({record.get('model')})"
    text = json.dumps(record.get(key), default=str)
    return text if len(text) <= 160 else text[:157] + "..."
