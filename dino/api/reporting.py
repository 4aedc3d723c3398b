"""``report``: one page on what was tiled, trained and learned."""

import os
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from dino import progress
from dino.api.report_evidence import (
    FinishedRun,
    TiledSlide,
    crop_evidence,
    feature_evidence,
    open_run,
    region_attention,
    tile_attention,
)
from dino.config.load import to_dict
from dino.config.schema import PatchConfig, RegionConfig
from dino.environment import versions
from dino.errors import ConfigError, DataError
from dino.files import write_text
from dino.report import methods
from dino.report.evidence import CropEvidence, Evidence
from dino.report.page import Page, render
from dino.report.sections import sections

PATCH, REGION = "Patch level", "Region level"


def report(
    root: Path | None,
    patch_run: Path | None,
    region_run: Path | None,
    output: Path,
    *,
    own_place: Mapping[str, Any] | None = None,
    notice: str = "",
    device: str = "auto",
) -> Path:
    """Write a self-contained HTML page on a slide, a patch-level run and a region-level run.

    What is not given, or has moved since (slides, tiles), is left out with a warning; nothing is trained or changed.

    Args:
        root: ROOT of `dino tile`, for maps, neighbours and attention.
        patch_run: Run folder of `dino pretrain patch`.
        region_run: Run folder of `dino pretrain region`.
        output: The HTML file.
        own_place: Shares of :func:`dino.api.own_place.measure_own_place`, as a dict.
        notice: A paragraph at the top that puts the numbers into proportion.
        device: auto, cpu, cuda or cuda:N.

    Returns:
        ``output``.

    Raises:
        ConfigError: If there is nothing to report on.
        CheckpointError: If a run holds no checkpoint.
        DataError: If ROOT's tables are damaged.
    """
    if not (root or patch_run or region_run):
        raise ConfigError("expected a ROOT or a run to report on, found neither; name at least one")
    patch = open_run(patch_run, PatchConfig) if patch_run else None
    region = open_run(region_run, RegionConfig) if region_run else None
    slide = _slide(root) if root else None
    if slide is None:
        evidence = _gather(None, patch, region, own_place, device)
    else:
        with closing(slide):
            evidence = _gather(slide, patch, region, own_place, device)
    write_text(output, render(_page(evidence, slide, patch, region, notice)))
    progress.say(f"report: {output}")
    return output


def _slide(root: Path) -> TiledSlide | None:
    try:
        return TiledSlide(root)
    except DataError as error:
        progress.warn(f"the report goes without pictures of the slide: {error}")
        return None


def _gather(
    slide: TiledSlide | None,
    patch: FinishedRun | None,
    region: FinishedRun | None,
    own_place: Mapping[str, Any] | None,
    device: str,
) -> Evidence:
    features = feature_evidence(slide, patch, device) if slide and slide.tiles and patch else None
    spacing = slide.spacing_um if slide else (patch and patch.trained.spacing_um) or 0.5
    runs = [(patch, PATCH), (region, REGION)]
    return Evidence(
        slide=slide.evidence() if slide else None,
        crops=_crops(patch) if patch else None,
        runs=[run.evidence(name) for run, name in runs if run],
        features=features,
        own_place=own_place,
        tile_attention=tile_attention(features, patch, spacing, device) if features and patch else None,
        region_attention=region_attention(slide, region, device) if slide and region else None,
        tile_um_per_px=spacing,
    )


def _crops(patch: FinishedRun) -> CropEvidence | None:
    try:
        return crop_evidence(patch)
    except DataError as error:
        progress.warn(f"the report goes without a sheet of crops: {error}")
        return None


def _page(
    evidence: Evidence, slide: TiledSlide | None, patch: FinishedRun | None, region: FinishedRun | None, notice: str
) -> Page:
    named = [("patch-level run", patch), ("region-level run", region)]
    parts = [f"Slide {slide.slide_id}"] if slide else []
    parts += [f"{name} {run.folder.absolute().parent.name}/{run.folder.name}" for name, run in named if run]
    settings = {f"{run.name}: settings": run.settings for run in evidence.runs}
    if slide:
        settings = {"Tiling: settings": slide.tiling.settings, **settings}
    return Page(
        title=f"What {'the runs' if patch and region else 'the run'} learned" if patch or region else "What was tiled",
        subtitle=" · ".join(parts),
        notice=notice,
        verdicts=[run.verdict for run in evidence.runs if run.verdict],
        facts=_facts(evidence, patch, region),
        sections=sections(evidence),
        methods=methods.methods(_methods(slide, patch, region)),
        settings={**settings, "Versions": versions()},
        footer=f"Written by histodino {versions().get('histodino', '')}; nothing in this file comes from the network.",
    )


def _facts(evidence: Evidence, patch: FinishedRun | None, region: FinishedRun | None) -> Sequence[tuple[str, str]]:
    facts = []
    if evidence.slide:
        facts += [(f"{evidence.slide.all_tiles:,}", "tiles"), (f"{evidence.slide.all_regions:,}", "regions")]
    for run, name in ((patch, "patch"), (region, "region")):
        last = last_metrics(run.lines) if run else {}
        if "loss_relative" in last:
            facts.append((f"{last['loss_relative']:.2f}", f"{name} loss / ln K"))
    if evidence.own_place:
        facts.append((f"{evidence.own_place['teacher']:.0%}", "own place found, trained"))
        facts.append((f"{evidence.own_place['untrained']:.0%}", "own place found, untrained"))
    return facts


def last_metrics(lines: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The newest line of a log that has a loss; empty without one."""
    return next((line for line in reversed(lines) if "loss" in line), {})


def _methods(slide: TiledSlide | None, patch: FinishedRun | None, region: FinishedRun | None) -> methods.Facts:
    tiling = None
    if slide:
        cut = sum(row.tiles > 0 for row in slide.status.values())
        settings = {**slide.tiling.settings, "region_size_px": slide.tiling.geometry.region_size_px}
        tiling = methods.Tiling(cut, len(slide.every_tile), len(slide.every_region), settings)
    return methods.Facts(
        tiling, _run(patch) if patch else None, _run(region) if region else None, versions(), _device(patch or region)
    )


def _run(run: FinishedRun) -> methods.Run:
    training, backbone = run.config.training, run.trained.backbone
    batch = training.batch_size_per_gpu * training.gradient_accumulation
    return methods.Run(
        to_dict(run.config),
        run.trained.step or 0,
        run.status.get("global_batch", batch),
        backbone.embed_dim,
        backbone.depth,
        backbone.num_heads,
    )


def _device(run: FinishedRun | None) -> str:
    wanted = run.config.speed.device if run else "auto"
    if torch.cuda.is_available() and wanted != "cpu":
        return f"an {torch.cuda.get_device_name()}"
    return f"{os.cpu_count()} CPU cores"
