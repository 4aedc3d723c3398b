"""Which attention maps of a ROOT are shown: those of the models whose features are."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from dino import progress
from dino.errors import DataError
from dino.extraction.catalogue import Catalogue
from dino.extraction.folders import tile_folder
from dino.extraction.map_record import MAP_RECORD, UNKNOWN
from dino.extraction.record import RECORD, read_record
from dino.viewer.attention import AttentionFiles


def find_attention(catalogue: Catalogue, names: Sequence[str], folder: str | None) -> Mapping[str, Path]:
    """Folders of attention maps by encoder: ``ROOT/attention_<encoder>``, or the given one for the first encoder."""
    found = catalogue.attention_folders
    if folder is not None:
        found[names[0] if names else Path(folder).resolve().name] = Path(folder)
    return found


def open_attention(
    catalogue: Catalogue, folders: Mapping[str, Path], asked: Collection[str]
) -> dict[str, AttentionFiles]:
    """The maps in folders, without those of another model than the features of that name, which are warned of.

    Args:
        catalogue: The ROOT.
        folders: Folders by encoder.
        asked: Encoders that the user named, of which such maps are an error.

    Raises:
        ConfigError: If tifffile is not installed.
        DataError: If a folder has no maps of these slides, or those of an encoder in ``asked`` are of another model.
    """
    found = {}
    for name, folder in folders.items():
        files, features = AttentionFiles(catalogue, folder), tile_folder(catalogue.root, name)
        try:
            files.check_made_by(read_record(features / RECORD), str(features))
        except DataError as error:
            if name in asked:
                raise
            progress.warn(f"{error}; they are left out")
            continue
        if not files.record:
            progress.say(f"{folder}: maps of {UNKNOWN}: they have no record of it ({MAP_RECORD})")
        found[name] = files
    return found


def exported_attention(catalogue: Catalogue, encoder: str | None) -> dict[str, AttentionFiles]:
    """The maps in a ROOT by encoder: all that :func:`open_attention` gives, or those of one encoder that was named."""
    found = catalogue.attention_folders
    if encoder is None:
        return open_attention(catalogue, found, ())
    return open_attention(catalogue, {name: folder for name, folder in found.items() if name == encoder}, {encoder})
