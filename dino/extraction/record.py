"""``extract.json``: what made the features of a folder, so that nothing made otherwise is ever mixed in."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dino import files
from dino.environment import versions
from dino.errors import DataError
from dino.models.weights import LoadedBackbone

COMPARED = ("level", "fingerprint", "transform", "precision", "geometry", "grids")


def model_record(loaded: LoadedBackbone, precision: str) -> dict[str, Any]:
    """What is recorded of the model that makes features, and of how it is run."""
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
    """Refuse to write into ``folder`` when something else has written there.

    Args:
        path: The ``extract.json``.
        record: What is about to write: model, transform, precision, geometry and what else is worth knowing.
        folder: Where the features go.
        suffix: What they end in.

    Returns:
        What was recorded before, empty at the first time.

    Raises:
        DataError: If the folder holds features made with another model, transform, precision or geometry, or features
            of which nothing is known.
    """
    if not folder.is_dir() or not any(p.suffix == suffix and p.name[0] != "." for p in folder.iterdir()):
        return {}
    before = read_record(path)
    if not before:
        raise DataError(
            f"expected {path} to say what made the features in {folder}, found none; they may be another model's: "
            "move them away, or take another ROOT"
        )
    differences = [
        f"{key} {_text(key, before)}, now {_text(key, record)}"
        for key in COMPARED
        if _plain(before.get(key)) != _plain(record.get(key))
    ]
    if differences:
        raise DataError(
            f"expected to go on with {folder}, found features there that were made otherwise: "
            f"{'; '.join(differences)}; take another ROOT, or delete {folder} to make them anew"
        )
    return before


def make_tidy_folders(folders: Iterable[Path], record: Path) -> None:
    """Make the folders that features go to, and take away what a killed process left half-written.

    Args:
        folders: Where the features go.
        record: The ``extract.json``.
    """
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
        files.tidy(folder)
    files.tidy(record.parent, record.name)


def write_record(path: Path, record: Mapping[str, Any], before: Mapping[str, Any]) -> None:
    """Write ``extract.json``; where the pixels of slides done before came from is kept."""
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
        raise DataError(f"expected {path} as `dino extract` wrote it, found no table of keys; delete it and its folder")
    return content


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str, sort_keys=True))


def _text(key: str, record: Mapping[str, Any]) -> str:
    if key == "fingerprint":
        return f"{str(record.get(key))[:12]} ({record.get('model')})"
    text = json.dumps(record.get(key), default=str)
    return text if len(text) <= 160 else text[:157] + "..."
