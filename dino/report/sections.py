"""Contents of a report: its data, and the page that shows them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dino.evaluate.results import Result
from dino.evaluate.scores import leakage_marks, marks, score_table
from dino.evaluate.verdict import Verdict
from dino.report import figures, methods
from dino.report.figures import MontageImage, Thumbnail
from dino.report.page import Figure, Page, Section, Table
from dino.report.projection import farthest_points, nearest_neighbours, pca_rgb
from dino.report.sampling import sampling_sections

QUERIES = 4
NEIGHBOURS = 5


@dataclass(frozen=True)
class SlideData:
    """The shown slide, and counts over all slides.

    Attributes:
        slide_id: Its name.
        thumbnail: Its thumbnail.
        tiles: Level-0 px, (N, 2): x, y of every tile.
        side: Side of a tile in level-0 px.
        regions: Level-0 px, (M, 4): x, y, width, height.
        shown_regions: Indices of the regions whose attention is shown.
        um_per_px: µm per px of the tiles.
        slides: Number of slides.
        all_tiles: Number of tiles of all slides.
        all_regions: Number of regions of all slides.
        held_out: Numbers of slides, tiles and regions among these that are held out from pretraining.
        settings: Settings of the tiling.
    """

    slide_id: str
    thumbnail: Thumbnail
    tiles: np.ndarray
    side: float
    regions: np.ndarray
    shown_regions: Sequence[int]
    um_per_px: float
    slides: int
    all_tiles: int
    all_regions: int
    settings: Mapping[str, Any]
    held_out: tuple[int, int, int] = (0, 0, 0)


@dataclass(frozen=True)
class RunData:
    """One run.

    Attributes:
        level: ``patch`` or ``region``.
        folder: Name of its folder.
        lines: Its ``metrics.jsonl``.
        last: Its last metrics.
        status: Its ``status.json``.
        settings: Its settings by dotted key.
        scores: What ``dino evaluate`` wrote into its folder, by name of the file.
        method: Its part of the methods paragraph.
    """

    level: str
    folder: str
    lines: Sequence[Mapping[str, Any]]
    last: Mapping[str, float]
    status: Mapping[str, Any]
    settings: Mapping[str, Any]
    scores: Mapping[str, Mapping[str, Any]]
    method: methods.Run

    @property
    def is_pretrained(self) -> bool:
        """Whether it started from ``model.init``."""
        return bool(self.settings.get("model.init"))

    @property
    def name(self) -> str:
        """Name of the run on the page."""
        return f"{self.level.capitalize()} level"


@dataclass(frozen=True)
class CropData:
    """Training samples and their crops: uint8, (H, W, 3) tiles and (s, s, 3) crops of each."""

    tiles: Sequence[np.ndarray]
    crops: Sequence[Sequence[np.ndarray]]


@dataclass(frozen=True)
class FeatureData:
    """Tile features of one slide.

    Attributes:
        corners: Level-0 px, (N, 2): upper left corner of the square that each tile fills on the map.
        square: Side of that square in level-0 px.
        untrained: Float, (N, D), of the untrained network.
        trained: Float, (N, D), of the trained one.
        disjoint: Indices of tiles that do not overlap; nearest neighbours are searched among them.
        pixels: uint8 (H, W, 3) of each of them.
    """

    corners: np.ndarray
    square: float
    untrained: np.ndarray
    trained: np.ndarray
    disjoint: Sequence[int]
    pixels: Sequence[np.ndarray]


@dataclass(frozen=True)
class AttentionData:
    """Attention of the cls token in the last block.

    Attributes:
        images: uint8 (H, W, 3) each.
        trained: (n, heads, h, w).
        untrained: (n, heads, h, w).
        um_per_px: µm per px of the images.
    """

    images: Sequence[np.ndarray]
    trained: np.ndarray
    untrained: np.ndarray
    um_per_px: float


@dataclass(frozen=True)
class ReportData:
    """Data of a report; a part that is None or empty is omitted.

    Attributes:
        slide: Tiles and regions.
        runs: Runs, patch level first.
        crops: Crops of the patch-level run.
        features: Tile features by the patch-level run.
        self_retrieval: Accuracies ``teacher``, ``untrained`` and ``pixels``, and the number of ``tiles``.
        tile_attention: Attention of the patch-level run.
        region_attention: Attention of the region-level run.
        um_per_px: µm per px of the tiles.
        notice: A paragraph at the top of the page.
        device: Hardware that was used.
        versions: Version of each package by name.
    """

    slide: SlideData | None = None
    runs: Sequence[RunData] = ()
    crops: CropData | None = None
    features: FeatureData | None = None
    self_retrieval: Mapping[str, Any] | None = None
    tile_attention: AttentionData | None = None
    region_attention: AttentionData | None = None
    um_per_px: float = 0.5
    notice: str = ""
    device: str = ""
    versions: Mapping[str, str] | None = None


def make_page(data: ReportData) -> Page:
    """The page of a report."""
    slide, versions = data.slide, data.versions or {}
    subtitle = [f"Slide {slide.slide_id}"] if slide else []
    subtitle += [f"{run.level}-level run {run.folder}" for run in data.runs]
    settings = {"Tiling": slide.settings} if slide else {}
    settings |= {run.name: run.settings for run in data.runs}
    return Page(
        title="Pretraining" if data.runs else "Tiling",
        subtitle=" · ".join(subtitle),
        notice=data.notice,
        verdicts=[(run.name, run_verdict(run.status)) for run in data.runs if run.status],
        facts=_facts(data),
        sections=make_sections(data),
        methods=methods.methods(_method_facts(data)),
        settings={**settings, "Versions": versions},
        footer=f"Written by histodino {versions.get('histodino', '')}. This file loads nothing from the network.",
    )


def run_verdict(status: Mapping[str, Any]) -> Verdict:
    """The verdict in a ``status.json``; the state of the run if it has not been evaluated yet."""
    if status.get("verdict"):
        return Verdict.from_dict(status["verdict"])
    state = str(status.get("state", "unknown")).replace("_", " ")
    return Verdict(state, f"Step {status.get('step', 0):,} of {status.get('total_steps', 0):,}; not evaluated yet.")


def make_sections(data: ReportData) -> list[Section]:
    """The sections for which there are data, in reading order."""
    found = []
    if data.slide:
        found.append(Section("Slide and tiles", _counts(data.slide), [tiling_figure(data.slide)]))
    if data.crops:
        introduction = "The first training samples, cropped with the same random numbers as in training."
        found.append(Section("Training crops", introduction, [crops_figure(data.crops, data.um_per_px)]))
    if data.runs:
        introduction = (
            "Loss and entropy are divided by ln K, so that runs with different numbers of prototypes K can be compared."
        )
        trained = [f" {run.name}: trained on {run.method.split}." for run in data.runs if run.method.split]
        introduction += "".join(trained)
        found.append(Section("Training", introduction, [curves_figure(run) for run in data.runs]))
    found += sampling_sections(data.runs)
    tables = [scores_table(run, name, result) for run in data.runs for name, result in run.scores.items()]
    if tables:
        found.append(Section("Scores", "Frozen features on labelled data, beside their baselines.", tables))
    if data.features and data.slide:
        found.append(features_section(data.features, data.slide, data.self_retrieval))
    attention = []
    if data.tile_attention:
        attention.append(tile_attention_figure(data.tile_attention))
    if data.region_attention:
        attention.append(region_attention_figure(data.region_attention))
    if attention:
        introduction = "Attention weights of the cls token in the last block."
        found.append(Section("Attention", introduction, attention))
    return found


def tiling_figure(slide: SlideData) -> Figure:
    """Tiles and regions on the slide."""
    bold = " The attention in the regions with a bold outline is shown below." if len(slide.shown_regions) else ""
    return Figure(
        figures.tiling_map(slide.thumbnail, slide.tiles, slide.side, slide.regions, slide.shown_regions),
        f"Thumbnail of slide {slide.slide_id}, with its {len(slide.tiles)} tiles outlined, and with its "
        f"{len(slide.regions)} regions outlined.",
        "Middle: everything outside the tiles is faded. Faded tissue was missed by the tissue detection; glass that is "
        f"not faded was mistaken for tissue. Right: regions consist of tiles of the same lattice.{bold}",
    )


def crops_figure(crops: CropData, um_per_px: float) -> Figure:
    """Crops of a few tiles."""
    return Figure(
        figures.crop_montage(crops.tiles, crops.crops, um_per_px),
        f"{len(crops.tiles)} tiles, each followed by its {len(crops.crops[0])} augmented crops.",
        "Each row is one tile and its crops after all augmentations (normalization undone). The teacher sees the two "
        "global crops, the student all of them. The crops should still look like tissue: weaken the augmentations if "
        "colours are unlike any stain, or if local crops show no structure.",
    )


def curves_figure(run: RunData) -> Figure:
    """Training curves of one run."""
    return Figure(
        figures.training_curves(run.lines, run.is_pretrained),
        f"Training curves of the {run.level}-level run: loss, teacher entropy, learning rate, and a fourth panel.",
        f"{run.name}. The loss is 1 for a uniform prediction. The teacher entropy should fall below 1 and stay well "
        "above 0: at 1 the targets are uniform over all prototypes, at 0 every image has the same prototype; both are "
        "collapse. The targets change during training, so the loss may rise while the features improve.",
    )


def scores_table(run: RunData, name: str, result: Mapping[str, Any]) -> Table:
    """The scores that ``dino evaluate`` wrote, with a mark if the test data chose the checkpoint or was trained on.

    Args:
        run: The run.
        name: Name of the file.
        result: Its content.
    """
    about = result.get("about", {})
    counts = f"{about.get('queries', '?')} test and {about.get('references', '?')} reference rows"
    step = f", checkpoint of step {about['step']:,}" if isinstance(about.get("step"), int) else ""
    if "evaluation" in result:
        whole = Result.from_dict(result, name)
        rows, header = whole.table()
        counts = f"{about.get('queries', about.get('cases', '?'))} scored rows of {whole.labels}"
        resampled = f", with 95 % intervals from {about.get('resamples', 0):,} bootstrap samples"
        units = f" of {about.get('resampled', '?')} {about.get('grouped_by', 'groups')}"
        warning = "".join(f" {line}." for line in marks(whole))
        return Table(header, rows, f"{run.name}, {name}: {counts}{step}{resampled}{units}.{warning}")
    rows, header = score_table(result)
    found = "; ".join(f"{text}: {count}" for text, count in leakage_marks(result))
    warning = f" These scores are optimistic: {found}." if found else ""
    return Table(header, rows, f"{run.name}, {name}: {counts} of {about.get('labels', '?')}{step}.{warning}")


def features_section(features: FeatureData, slide: SlideData, self_retrieval: Mapping[str, Any] | None) -> Section:
    """Feature maps, nearest neighbours and the self-retrieval table."""
    panels = [("Untrained", pca_rgb(features.untrained)), ("Trained", pca_rgb(features.trained))]
    maps = Figure(
        figures.feature_maps(slide.thumbnail, panels, features.corners, features.square),
        f"Slide {slide.slide_id}, and its tiles coloured by the principal components of their features, untrained and "
        "trained.",
        "Each square is one tile; red, green and blue are the first three principal components of the features. "
        "Similar colours mean similar features. The colours themselves have no meaning and cannot be compared between "
        "panels. Good features give each kind of tissue one colour, with clear borders.",
    )
    items: list[Figure | Table] = [maps, neighbours_figure(features)]
    if self_retrieval:
        items.append(self_retrieval_table(self_retrieval))
    return Section("Tile features", "The untrained network is the baseline.", items)


def neighbours_figure(features: FeatureData) -> Figure:
    """A few tiles and their nearest neighbours, for both networks."""
    trained = features.trained[features.disjoint]
    untrained = features.untrained[features.disjoint]
    queries = farthest_points(trained, QUERIES)

    def row(rows: np.ndarray, query: int) -> list[MontageImage]:
        neighbours = zip(*nearest_neighbours(rows, query, NEIGHBOURS), strict=True)
        return [MontageImage(features.pixels[i], f"{cosine:.2f}") for i, cosine in neighbours]

    return Figure(
        figures.neighbour_montage(
            [features.pixels[query] for query in queries],
            [row(trained, query) for query in queries],
            [row(untrained, query) for query in queries],
        ),
        f"{len(queries)} tiles, each with its nearest neighbours by the trained and by the untrained network.",
        f"Dissimilar tiles, each with its {NEIGHBOURS} nearest neighbours among {len(trained)} tiles that do not "
        "overlap, and their cosine similarity. An untrained network compares colour and brightness; a trained one "
        "should find the same kind of tissue.",
    )


def self_retrieval_table(accuracies: Mapping[str, Any]) -> Table:
    """Self-retrieval accuracy of the teacher and of the baselines.

    Args:
        accuracies: ``teacher``, ``untrained`` and ``pixels``, and the number of ``tiles``.
    """
    count = accuracies["tiles"]
    names = {
        "teacher": "Trained teacher",
        "untrained": "Baseline: untrained network",
        "pixels": "Baseline: 8 x 8 pixels, mean-centred",
    }
    rows = [[name, f"{accuracies[key]:.1%}"] for key, name in names.items()]
    return Table(
        ["Features", "Self-retrieval accuracy"],
        [*rows, ["Chance", f"{1 / count:.1%}"]],
        f"Each of {count} tiles is read a second time, shifted by a quarter of its side along both axes, rotated by "
        "90° and with jittered stain. The accuracy is the fraction of these views whose nearest neighbour among the "
        "original tiles, by cosine similarity, is the same tile. It needs no labels, and measures only how invariant "
        "the features are to these changes.",
    )


def tile_attention_figure(attention: AttentionData) -> Figure:
    """Attention over tiles."""
    return Figure(
        figures.attention_montage(attention.images, attention.trained, attention.untrained, attention.um_per_px),
        f"{len(attention.images)} tiles overlaid with the attention of the patch-level network.",
        "Tiles. Red is attention above the mean of the panel; the deepest red is at least twice the mean. A grey panel "
        "has nearly uniform attention, as an untrained network has. Heads that attend to different structures (nuclei, "
        "fibres, edges) are a good sign.",
    )


def region_attention_figure(attention: AttentionData) -> Figure:
    """Attention over regions."""
    height, width = attention.trained.shape[-2:]
    return Figure(
        figures.attention_montage(
            attention.images, attention.trained, attention.untrained, attention.um_per_px, smooth=False
        ),
        f"{len(attention.images)} regions overlaid with the attention of the region-level network.",
        f"Regions of {height} x {width} tiles, one square per tile: the tokens of this level are tiles. Colours as "
        "above.",
    )


def _counts(slide: SlideData) -> str:
    scope = "One slide" if slide.slides == 1 else f"{slide.slides:,} slides"
    shown = "" if slide.slides == 1 else f" Slide {slide.slide_id} is shown."
    slides, tiles, regions = slide.held_out
    held_out = f" Held out from pretraining: slides {slides:,}, tiles {tiles:,}, regions {regions:,}." if slides else ""
    return f"{scope}, {slide.all_tiles:,} tiles, {slide.all_regions:,} regions.{held_out}{shown}"


def _facts(data: ReportData) -> list[tuple[str, str]]:
    facts = []
    if data.slide:
        facts += [(f"{data.slide.all_tiles:,}", "tiles"), (f"{data.slide.all_regions:,}", "regions")]
    for run in data.runs:
        if "loss_relative" in run.last:
            facts.append((f"{run.last['loss_relative']:.2f}", f"{run.level} loss / ln K"))
    if data.self_retrieval:
        facts.append((f"{data.self_retrieval['teacher']:.0%}", "self-retrieval, trained"))
        facts.append((f"{data.self_retrieval['untrained']:.0%}", "self-retrieval, untrained"))
    return facts


def _method_facts(data: ReportData) -> methods.Facts:
    tiling = None
    if data.slide:
        slides, tiles, regions = data.slide.held_out
        tiling = methods.Tiling(
            data.slide.slides - slides,
            data.slide.all_tiles - tiles,
            data.slide.all_regions - regions,
            data.slide.settings,
            slides,
        )
    runs = {run.level: run.method for run in data.runs}
    return methods.Facts(tiling, runs.get("patch"), runs.get("region"), data.versions or {}, data.device)
