"""Which level-1 model made feature grids, and how: a level-2 model is trained and used on grids of one source only."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from dino.errors import DataError

KEY = "grids"  # in identity.json, checkpoints and exports
UNKNOWN = "unknown"  # its value for grids without a record
SHOWN = 12  # characters of a fingerprint in messages


@dataclass(frozen=True)
class GridSource:
    """The level-1 model and the settings that determine the values of feature grids.

    Attributes:
        model: Path or name of the model, for messages; a model may be moved, so it is not compared.
        fingerprint: SHA-256 of its weights, see ``LoadedBackbone.fingerprint``.
        transform: How pixels became its input; None where it is not recorded.
        precision: Precision of the extraction.
        spacing_um: Requested spacing of the tiles in µm per px, None where unknown.
        tile_size_px: Size of the tiles in px, None where unknown.
    """

    model: str
    fingerprint: str
    transform: Mapping[str, Any] | None
    precision: str | None
    spacing_um: float | None
    tile_size_px: int | None

    @classmethod
    def from_extraction(cls, record: Mapping[str, Any]) -> "GridSource | None":
        """The source of the grids that an ``extract.json`` describes; None if it does not contain a fingerprint."""
        geometry = record.get("geometry")
        geometry = geometry if isinstance(geometry, Mapping) else {}
        return cls.from_dict({**record, **{key: geometry.get(key) for key in ("spacing_um", "tile_size_px")}})

    @classmethod
    def from_dict(cls, values: Any) -> "GridSource | None":
        """The inverse of :func:`recorded`; None for an unknown source."""
        if not isinstance(values, Mapping) or not isinstance(values.get("fingerprint"), str):
            return None
        transform = values.get("transform")
        return cls(
            str(values.get("model")),
            values["fingerprint"],
            dict(transform) if isinstance(transform, Mapping) else None,
            values.get("precision"),
            values.get("spacing_um"),
            values.get("tile_size_px"),
        )

    @property
    def name(self) -> str:
        """The model and the beginning of its fingerprint."""
        return f"{self.model} ({self.fingerprint[:SHOWN]})"

    @property
    def key(self) -> str:
        """Text that is equal for equal features."""
        return json.dumps(_compared(self), sort_keys=True)

    def differences(self, other: "GridSource") -> list[str]:
        """What makes features of ``other`` different, in words; empty for the same features."""
        pairs = zip(_compared(self).items(), _compared(other).values(), strict=True)
        return [f"{name} {_text(mine)}, now {_text(theirs)}" for (name, mine), theirs in pairs if mine != theirs]


def recorded(source: GridSource | None) -> dict[str, Any] | str:
    """Plain values of a source, for JSON and checkpoints."""
    return asdict(source) if source else UNKNOWN


def check_same_source(expected: GridSource | None, found: GridSource | None, user: str, where: str) -> None:
    """Check that feature grids are of the source that a level-2 model was trained on. An unknown source is accepted.

    Args:
        expected: Source of the grids that the model was trained on.
        found: Source of the grids at hand.
        user: The model, for the message.
        where: Where the grids at hand are, for the message.

    Raises:
        DataError: If both sources are known and differ.
    """
    differences = expected.differences(found) if expected and found else []
    if expected is None or found is None or not differences:
        return
    raise DataError(
        f"expected feature grids of {expected.name}, which {user} was trained on, found grids of {found.name} in "
        f"{where} ({'; '.join(differences)}); read grids of the first model (of `dino extract MODEL ROOT "
        "encoder=NAME`), or train a region model on these grids in another RUN"
    )


def _compared(source: GridSource) -> dict[str, Any]:
    """The values that must be equal, by name; of a transform those that change pixels, in the types of JSON."""
    transform = source.transform
    if transform is not None:
        transform = json.loads(json.dumps({key: transform.get(key) for key in ("mean", "std", "input_size_px")}))
    return {
        "fingerprint": source.fingerprint,
        "transform": transform,
        "precision": source.precision,
        "spacing_um": source.spacing_um,
        "tile_size_px": source.tile_size_px,
    }


def _text(value: Any) -> str:
    return value[:SHOWN] if isinstance(value, str) else json.dumps(value)
