"""Settings of the viewer, of tissue words, and of the exports for QuPath and others."""

from dataclasses import dataclass

from dino.config.declare import runtime


@dataclass
class ViewConfig:
    """`dino view`."""

    host: str = runtime("127.0.0.1", "address to serve on; any other than this computer's own lets others connect")
    port: int = runtime(8765, "port; 0 for any free one")
    token: str | None = runtime(None, "secret in the address that opens the viewer (null: a random one)")
    slides: str | None = runtime(None, "folder or slides.csv of the slides, if they were moved after tiling")
    attention: str | None = runtime(None, "folder of files of `dino attention` (null: ROOT/attention_ENCODER)")
    clusters: int | None = runtime(
        None, "number of clusters of the tiles' features, over all slides (null: the words of `dino words`, else 10)"
    )
    open_slides: int = runtime(16, "maximum number of slides that are open at once")
    cache_mb: int = runtime(128, "maximum size of decoded and of encoded pictures in memory, in MB each")
    num_workers: int = runtime(8, "threads that read slides and features")
    annotate: bool = runtime(
        False,
        "let the page save selected tiles to ROOT/annotations, and names of words to words.csv (false: nothing is "
        "written)",
    )


@dataclass
class GeojsonConfig:
    """`dino geojson`."""

    encoder: str | None = runtime(
        None, "encoder whose clusters and attention are exported (null: the only one's clusters, the attention of all)"
    )
    contents: list[str] = runtime(["clusters", "tiles", "regions"], "what is exported: tiles, clusters, regions")
    clusters: int | None = runtime(
        None, "number of clusters of the tiles' features, over all slides (null: the words of `dino words`, else 10)"
    )


@dataclass
class OverlaysConfig:
    """`dino overlays`."""

    encoder: str | None = runtime(None, "encoder whose clusters are exported (null: the only one)")
    clusters: int | None = runtime(
        None, "number of clusters of the tiles' features, over all slides (null: the words of `dino words`, else 10)"
    )


@dataclass
class WordsConfig:
    """`dino words`."""

    count: int | None = runtime(None, "number of words, 2 to 64 (null: 16, or as many as there are)")
    method: str | None = runtime(
        None,
        "kmeans (clusters of the tiles' features), or prototypes (the most used ones of MODEL's DINO head); null: "
        "kmeans, or as those that are there",
    )
