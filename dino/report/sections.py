"""Contents of a report: the page that shows its data."""

from collections.abc import Mapping, Sequence
from typing import Any

from dino.evaluate.verdict import Verdict
from dino.report import curves, figures, methods
from dino.report.compared import comparison_sections, series
from dino.report.data import ReportData, RootData, RunData, SlideData
from dino.report.features import crops_figure, features_section, region_attention_figure, tile_attention_figure
from dino.report.page import Figure, Page, Section, Table
from dino.report.sampling import sampling_sections
from dino.report.scores import scores_section
from dino.report.study import quarantine_table, study_section
from dino.report.words import words_section


def make_page(data: ReportData) -> Page:
    """The page of a report."""
    slide, versions = data.slide, data.versions
    subtitle = [f"Slide {slide.slide_id}"] if slide else []
    subtitle += [f"{run.level}-level run {run.folder}" for run in data.runs]
    settings = {"Tiling": data.root.settings} if data.root else {}
    settings |= {run.name: run.settings for run in data.runs}
    sections, damaged = make_sections(data)
    return Page(
        title="Pretraining" if data.runs else "Tiling",
        subtitle=" · ".join(subtitle),
        notice=data.notice,
        verdicts=[(run.name, run_verdict(run.status)) for run in data.runs if run.status],
        facts=_facts(data),
        sections=sections,
        left_out=[*data.left_out, *damaged],
        methods=methods.methods(_method_facts(data)),
        settings={**settings, "Versions": versions},
        footer=f"Written by histodino {versions.get('histodino', '')}. This file loads nothing from the network.",
    )


def run_verdict(status: Mapping[str, Any]) -> Verdict:
    """The verdict in a ``status.json``; the state of the run if it has not been evaluated yet."""
    if status.get("verdict"):
        return Verdict.from_dict(status["verdict"])
    state = str(status.get("state", "unknown")).replace("_", " ")
    left = status.get("eta_seconds")
    time = f" About {_duration(left)} are left." if state == "running" and left else ""
    reason = f" {status['error']}" if status.get("error") else ""
    steps = f"Step {status.get('step', 0):,} of {status.get('total_steps', 0):,}; not evaluated yet."
    return Verdict(state, f"{steps}{time}{reason}")


def _duration(seconds: float) -> str:
    return f"{seconds / 3600:.2g} hours" if seconds > 5400 else f"{seconds / 60:.0f} minutes"


def make_sections(data: ReportData) -> tuple[list[Section], list[str]]:
    """The sections for which there are data, in reading order, and sentences on results that could not be read."""
    found = []
    if data.root:
        figure = [tiling_figure(data.slide)] if data.slide else []
        found.append(Section("Slide and tiles" if figure else "Slides", _counts(data.root, data.slide), figure))
    if data.crops:
        introduction = "The first training samples, cropped with the same random numbers as in training."
        found.append(Section("Training crops", introduction, [crops_figure(data.crops, data.um_per_px)]))
    if data.runs:
        found.append(training_section(data.runs))
    found += sampling_sections(data.runs)
    found += comparison_sections(data.runs)
    scores, damaged = scores_section(data.runs)
    found += [scores] if scores else []
    if data.features or data.self_retrieval:
        found.append(features_section(data))
    found += [words_section(data.words)] if data.words else []
    attention = [
        *(tile_attention_figure(one.name, one.attention) for one in data.features if one.attention),
        *(region_attention_figure(name, one) for name, one in data.region_attention.items()),
    ]
    if attention:
        introduction = "Attention weights of the cls token in the last block."
        found.append(Section("Attention", introduction, attention))
    study = study_section(data.root, data.runs)
    return [*found, *([study] if study else [])], damaged


def training_section(runs: Sequence[RunData]) -> Section:
    """Curves of each run, how the hardware was used, warnings, and samples that could not be read."""
    introduction = (
        "Loss and entropy are divided by ln K, so that runs with different numbers of prototypes K can be compared."
    )
    introduction += "".join(
        f" {run.name}: trained on {run.method.split}." for run in runs if run.method and run.method.split
    )
    items: list[Figure | Table] = [curves_figure(run) for run in runs]
    resources = resources_figure(runs)
    items += [resources] if resources else []
    if rows := [[run.name, str(text)] for run in runs for text in run.status.get("warnings", ())]:
        items.append(Table(["Run", "Warning"], rows, "Warnings of the runs.", text=True))
    items += [quarantine_table(run) for run in runs if run.quarantine]
    return Section("Training", introduction, items)


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


def curves_figure(run: RunData) -> Figure:
    """Training curves of one run."""
    return Figure(
        curves.training_curves(series([run])),
        f"Training curves of {run.name}: loss, teacher entropy, learning rate, and a fourth panel.{_ends(run)}",
        f"{run.name}. The loss is 1 for a uniform prediction. The teacher entropy should fall below 1 and stay well "
        "above 0: at 1 the targets are uniform over all prototypes, at 0 every image has the same prototype; both are "
        "collapse. The targets change during training, so the loss may rise while the features improve.",
        narrow=curves.training_curves(series([run]), curves.NARROW),
    )


def _ends(run: RunData) -> str:
    """First and last values of the curves in words, for screen readers."""
    names = {"loss_relative": "The relative loss", "teacher_entropy_relative": "The relative entropy"}
    found = {name: points for key, name in names.items() if len(points := curves.points(run.lines, key))}
    return "".join(f" {name} goes from {points[0, 1]:.3g} to {points[-1, 1]:.3g}." for name, points in found.items())


def resources_figure(runs: Sequence[RunData]) -> Figure | None:
    """How the hardware was used over the steps; None if it was not logged."""
    wide, narrow = (curves.resource_curves(series(runs), columns) for columns in (curves.WIDE, curves.NARROW))
    if wide is None:
        return None
    return Figure(
        wide,
        "Time waiting for data and speed over the steps, and use and power of the GPU where they were logged.",
        "A run that often waits for data needs more workers (speed.num_workers) or faster disks. The GPU is that of "
        "the first process.",
        narrow=narrow,
    )


def _counts(root: RootData, shown: SlideData | None) -> str:
    tiles, regions = sum(root.tiles.values()), sum(root.regions.values())
    scope = "One slide" if len(root.tiled) == 1 else f"{len(root.tiled):,} slides"
    name = f" Slide {shown.slide_id} is shown." if shown and len(root.tiled) != 1 else ""
    slides, *held = root.held_out
    held_out = (
        f" Held out from pretraining: slides {slides:,}, tiles {held[0]:,}, regions {held[1]:,}." if slides else ""
    )
    return f"{scope}, {tiles:,} tiles, {regions:,} regions.{held_out}{name}"


def _facts(data: ReportData) -> list[tuple[str, str]]:
    facts = []
    if data.root:
        facts += [
            (f"{sum(numbers.values()):,}", name)
            for name, numbers in (("tiles", data.root.tiles), ("regions", data.root.regions))
        ]
    for run in data.runs:
        if "loss_relative" in run.last:
            facts.append((f"{run.last['loss_relative']:.2f}", f"{run.name}: loss / ln K"))
    if data.self_retrieval:
        facts.append((f"{data.self_retrieval['teacher']:.0%}", "self-retrieval, trained"))
        facts.append((f"{data.self_retrieval['untrained']:.0%}", "self-retrieval, untrained"))
    return facts


def _method_facts(data: ReportData) -> methods.Facts:
    tiling = None
    if data.root:
        slides, tiles, regions = data.root.held_out
        tiling = methods.Tiling(
            len(data.root.tiled) - slides,
            sum(data.root.tiles.values()) - tiles,
            sum(data.root.regions.values()) - regions,
            data.root.settings,
            slides,
        )
    first = {run.level: run.method for run in reversed(data.runs)}
    return methods.Facts(tiling, first.get("patch"), first.get("region"), data.versions, data.device)
