"""``overlays``: clusters and words of the tiles of slides as label images."""

from pathlib import Path

from dino import progress
from dino.config.schema import OverlaysConfig
from dino.environment import import_extra
from dino.errors import DataError
from dino.extraction.catalogue import read_catalogue
from dino.extraction.encoder_features import check_clusters, only_encoder
from dino.extraction.label_images import LabelImages
from dino.files import oserror_to_data_error


def export_overlays(root: Path, output: Path, config: OverlaysConfig) -> list[Path]:
    """Write clusters or words of the tiles of each slide as pyramidal OME-TIFF, see `extraction/label_images.py`.

    Args:
        root: ROOT of ``dino tile``, with the features of tiles that ``dino extract`` wrote.
        output: Folder of ``<slide>.ome.tif`` and ``labels.json``.
        config: Settings.

    Returns:
        The files, of the slides with features.

    Raises:
        DataError: If ROOT or its features cannot be read, or OUT has other images, or cannot be written.
        ConfigError: If a setting is out of range, it is not known which encoder, or tifffile is not installed.
    """
    check_clusters(config.clusters)
    import_extra("tifffile", "label images", "maps")
    catalogue = read_catalogue(root)
    features = only_encoder(catalogue, config.encoder, config.clusters)
    if features is None:
        raise DataError(f"expected features of tiles in {root}, found none; run `dino extract MODEL {root} what=tiles`")
    written = []
    with oserror_to_data_error(output), progress.bar("export slides", len(features.slide_ids)) as bar:
        images = LabelImages(catalogue, features, output)
        images.prepare()
        for slide_id in features.slide_ids:
            written.append(images.write(slide_id))
            bar.advance(note=slide_id)
    without = len(catalogue.tiles) - len(written)
    notes = [f"{without} slides have no features"] if without else []
    progress.say(", ".join([f"{len(written)} label images written to {output}: {images.record['kind']}", *notes]))
    return written
