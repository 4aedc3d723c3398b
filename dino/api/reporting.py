"""``report``: one HTML page on tiles, training and features."""

import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, TypeVar

import torch

from dino import distributed, progress
from dino.api.levels import build_level
from dino.api.roots import check_grids
from dino.data.loader import DrawnBatches
from dino.environment import versions
from dino.errors import ConfigError, DataError
from dino.files import write_text
from dino.report import gather
from dino.report.page import render
from dino.report.sections import AttentionData, CropData, ReportData, make_page
from dino.report.slides import TiledSlide

SHOWN_CROPS = 4  # samples

Result = TypeVar("Result")


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

    Parts whose slides or tiles have been moved or deleted are omitted with a warning. The runs are not changed.

    Args:
        root: ROOT of `dino tile`, for maps, neighbours and attention.
        patch_run: Run folder of `dino pretrain patch`.
        region_run: Run folder of `dino pretrain region`.
        output: The HTML file.
        own_place: Self-retrieval accuracies: :func:`dino.report.self_retrieval.measure_self_retrieval` as a dict.
        notice: A paragraph at the top of the page.
        device: auto, cpu, cuda or cuda:N.

    Returns:
        ``output``.

    Raises:
        ConfigError: If neither ROOT nor a run is given.
        CheckpointError: If a run has no checkpoint.
    """
    if not (root or patch_run or region_run):
        raise ConfigError("expected a ROOT or a run to report on, found neither; pass at least one")
    patch = gather.load_run(patch_run, "patch") if patch_run else None
    region = gather.load_run(region_run, "region") if region_run else None
    chosen = distributed.choose_device(device)
    with ExitStack() as stack:
        slide = _if_readable("slide", lambda: stack.enter_context(closing(TiledSlide(root)))) if root else None
        spacing = slide.spacing_um if slide else (patch and patch.trained.spacing_um) or 0.5
        features = gather.feature_data(slide, patch, chosen) if slide and slide.tiles and patch else None
        data = ReportData(
            slide=slide.data() if slide else None,
            runs=[run.data() for run in (patch, region) if run],
            crops=_if_readable("crops", lambda: _first_crops(patch)) if patch else None,
            features=features,
            self_retrieval=own_place,
            tile_attention=gather.tile_attention(features, patch, spacing, chosen) if features and patch else None,
            region_attention=_region_attention(slide, region, chosen) if slide and region else None,
            um_per_px=spacing,
            notice=notice,
            device=_hardware(patch or region),
            versions=versions(),
        )
    write_text(output, render(make_page(data)))
    progress.say(f"report: {output}")
    return output


def _if_readable(part: str, read: Callable[[], Result]) -> Result | None:
    """The result of ``read``; None, with a warning, if the data of this part cannot be read."""
    try:
        return read()
    except DataError as error:
        progress.warn(f"report without {part}: {error}")
        return None


def _region_attention(slide: TiledSlide, run: gather.LoadedRun, device: torch.device) -> AttentionData | None:
    """Attention over the shown regions; None without their features, or with those of another level-1 model."""

    def read() -> AttentionData | None:
        paths = slide.grid_paths(run.trained.grids, slide.regions)
        check_grids(paths, run.trained.details, run.trained.source)
        return gather.region_attention(slide, run, device)

    return _if_readable("region attention", read)


def _first_crops(run: gather.LoadedRun) -> CropData:
    """Crops of the first training samples of a patch-level run, with the same random numbers as in training."""
    level = build_level(run.config)
    seed = run.config.seed
    batch = DrawnBatches(level.dataset, level.sampler(seed), level.crops.draw, None, SHOWN_CROPS, seed)[0]
    return gather.crop_data(batch, level.crops)  # type: ignore[arg-type]


def _hardware(run: gather.LoadedRun | None) -> str:
    requested = run.config.speed.device if run else "auto"
    if torch.cuda.is_available() and requested != "cpu":
        return f"an {torch.cuda.get_device_name()}"
    return f"{os.cpu_count()} CPU cores"
