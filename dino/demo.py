"""All steps on the sample slide of the package, in a few minutes and without a GPU.

The demo runs the same code as the other commands, with small models, tiles, regions and crops. Because the slide is
small, tiles and regions overlap by half. It shows that the steps work together, not how good the models are.
"""

import shlex
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from rich.table import Table

from dino import api, progress
from dino.api.reporting import report
from dino.config.load import load_config, to_dict
from dino.config.schema import DemoConfig, ExtractConfig, PatchConfig, RegionConfig, ReportConfig, TileConfig
from dino.environment import versions
from dino.extraction.folders import words_folder
from dino.extraction.words import TABLE
from dino.files import read_json, write_json
from dino.report.gather import load_run
from dino.report.self_retrieval import measure_self_retrieval
from dino.slides import sample_slide
from dino.train.run_folder import RunReader

Result = TypeVar("Result")

NOTICE = (
    "This is the report of the demo: one small slide, a tiny network, a few minutes of training. It shows that every "
    "step works, and how to read the results. It does not evaluate the method: a few hundred tiles and steps are far "
    "too few, the trained network may be no better than the untrained one, and none of these numbers predicts the "
    "results of a real run."
)


@dataclass
class DemoSummary:
    """Results of the demo; written as ``summary.json``.

    Attributes:
        directory: Output folder.
        report: The HTML report.
        tiles: Number of tiles.
        regions: Number of regions.
        losses: Last loss of each level, relative to ln K.
        entropies: Last teacher entropy of each level, relative to ln K.
        own_place: Self-retrieval accuracies: teacher, untrained, pixels, and the number of tiles.
        verdicts: Verdict on each level, as in ``status.json``.
        results: One line per stage.
        seconds: Seconds of each stage, measured when it was first done.
        settings: Settings of the demo.
        versions: Versions that the numbers depend on.
    """

    directory: Path
    report: Path
    tiles: int = 0
    regions: int = 0
    losses: dict[str, float] = field(default_factory=dict)
    entropies: dict[str, float] = field(default_factory=dict)
    own_place: dict[str, Any] = field(default_factory=dict)
    verdicts: dict[str, Mapping[str, str]] = field(default_factory=dict)
    results: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)


def run_demo(directory: Path, config: DemoConfig) -> DemoSummary:
    """Tile, pretrain both levels, extract, evaluate and report, all under ``directory``.

    If the folder contains a demo already, it is continued: every step skips work that is done.

    Args:
        directory: Output folder; created when absent.
        config: Seed, steps and device.

    Returns:
        The contents of ``summary.json``.

    Raises:
        ConfigError: If ``directory`` contains a demo with other settings.
        Stopped: If a signal requested it; run again to continue.
    """
    directory = directory.absolute()
    summary = DemoSummary(directory, directory / "report.html", settings=to_dict(config), versions=versions())
    summary.seconds.update(_earlier_seconds(directory / "summary.json"))
    root, patch, region = directory / "slides", directory / "patch", directory / "region"
    extraction = ExtractConfig(device=config.device, num_workers=max(1, config.num_workers))

    tiling = _stage(summary, "tile", lambda: api.tile([sample_slide()], root, tile_config()))
    summary.tiles, summary.regions = tiling.tiles, tiling.regions
    summary.results["tile"] = f"{tiling.tiles} tiles, {tiling.regions} regions"

    _stage(summary, "pretrain patch", lambda: api.pretrain(patch_config(root, patch, config)))
    _add_run(summary, "patch", patch)

    _stage(summary, "extract tiles", lambda: api.extract(str(patch), root, extraction))
    summary.results["extract tiles"] = f"{tiling.tiles} tiles, {tiling.regions} feature grids"

    words = _stage(summary, "words", lambda: api.find_words(str(patch), root))
    summary.results["words"] = f"{len(words.counts)} groups of similar tiles, to be named in {words.words.table.name}"

    _stage(summary, "pretrain region", lambda: api.pretrain(region_config(root, region, config)))
    _add_run(summary, "region", region)

    _stage(summary, "extract regions", lambda: api.extract(str(region), root, extraction))
    summary.results["extract regions"] = "one .h5 file"

    summary.own_place = _stage(summary, "evaluate", lambda: _self_retrieval(root, patch, config))
    template = "self-retrieval accuracy: trained {teacher:.0%}, untrained {untrained:.0%}, pixels {pixels:.0%}"
    summary.results["evaluate"] = template.format(**summary.own_place)

    options = {"own_place": summary.own_place, "notice": NOTICE}
    shown = ReportConfig(device=config.device)
    _stage(summary, "report", lambda: report([patch, region], root, summary.report, shown, **options))
    summary.results["report"] = f"{summary.report.stat().st_size / 1e6:.1f} MB"
    write_json(directory / "summary.json", asdict(summary))
    _print(summary)
    return summary


def tile_config() -> TileConfig:
    """Tiles of 128 px, and regions of 4 x 4 of them; both overlap by half."""
    return TileConfig(tile_size_px=128, overlap=0.5, region_size_px=512, region_overlap_cells=2, num_workers=1)


def patch_config(root: Path, run: Path, config: DemoConfig) -> PatchConfig:
    """The pathology recipe, for 683 overlapping tiles and two cores: a ViT of four blocks with patches of 8 px.

    Crops contain more of the tile than in the recipe, keep more of their colour, and are resized to 48 and 24 px. There
    are fewer prototypes than tiles. What was tried is in benchmarks/results/*-cpu-demo*.json.
    """
    return load_config(
        PatchConfig,
        recipe="patch_pathology",
        overrides={
            **_common(root, run, config, config.patch_steps),
            "model.arch": "vit:dim=192,depth=4,heads=3",
            "model.patch_size": 8,
            "model.out_dim": 64,
            "aug.global_crops_size": 48,
            "aug.global_crops_scale": [0.5, 1.0],
            "aug.local_crops_size": 24,
            "aug.local_crops_scale": [0.2, 0.5],
            "aug.local_crops_number": 2,
            "aug.hue": 0.02,
            "aug.grayscale": 0.0,
        },
    )


def region_config(root: Path, run: Path, config: DemoConfig) -> RegionConfig:
    """The region recipe with fewer crops."""
    return load_config(
        RegionConfig,
        recipe="region",
        overrides={
            **_common(root, run, config, config.region_steps),
            "aug.local_crops_number": 2,
        },
    )


def _common(root: Path, run: Path, config: DemoConfig, steps: int) -> dict[str, Any]:
    """Settings of both levels.

    They were chosen for the sample slide alone, among those in benchmarks/results/*-cpu-demo*.json: targets of
    Sinkhorn-Knopp, a teacher that averages over ten steps, a narrow bottleneck, and KDE.
    """
    return {
        "data_dir": str(root),
        "output_dir": str(run),
        "seed": config.seed,
        "model.out_dim": 256,
        "model.hidden_dim": 512,
        "model.bottleneck_dim": 32,
        "model.momentum_teacher": 0.9,
        "model.drop_path_rate": 0.0,
        "objective.targets": "sinkhorn",
        "objective.kde": 0.05,
        "training.batch_size_per_gpu": 32,
        "training.max_steps": steps,
        "training.warmup_epochs": 3,
        "optim.lr": 0.004,
        "optim.lr_scheduler.weight_decay_end": 0.1,
        "speed.device": config.device,
        "speed.num_workers": config.num_workers,
        "logging.every_steps": 20,
        "logging.report": False,  # the demo ends with one of both runs
    }


def _stage(summary: DemoSummary, name: str, work: Callable[[], Result]) -> Result:
    progress.say(f"\n{name}")
    start = time.monotonic()
    result = work()
    # A stage that was done before is skipped; keep its first duration.
    summary.seconds[name] = round(max(time.monotonic() - start, summary.seconds.get(name, 0.0)), 1)
    write_json(summary.directory / "summary.json", asdict(summary))
    return result


def _add_run(summary: DemoSummary, level: str, run: Path) -> None:
    reader = RunReader(run)
    last, verdict = reader.last_metrics(), reader.status()["verdict"]
    summary.losses[level] = last["loss_relative"]
    summary.entropies[level] = last["teacher_entropy_relative"]
    summary.verdicts[level] = verdict
    summary.results[f"pretrain {level}"] = (
        f"{verdict['word']}; {last['step']} steps, loss {last['loss_relative']:.3f} of ln K"
    )


def _self_retrieval(root: Path, run: Path, config: DemoConfig) -> dict[str, Any]:
    networks = load_run(run)
    return measure_self_retrieval(
        root, networks.trained, networks.untrained, device=config.device, seed=config.seed
    ).to_dict()


def _earlier_seconds(path: Path) -> dict[str, float]:
    try:
        return dict(read_json(path)["seconds"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _print(summary: DemoSummary) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("stage")
    table.add_column("result")
    table.add_column("seconds", justify="right")
    for name, seconds in summary.seconds.items():
        table.add_row(name, summary.results.get(name, ""), f"{seconds:.0f}")
    table.add_row("total", "", f"{sum(summary.seconds.values()):.0f}")
    progress.say("")
    progress.console.print(table)
    progress.say(f"\n{summary.report}\n{summary.directory / 'summary.json'}")
    patch, region, root, page = (
        shlex.quote(str(summary.directory / name)) for name in ("patch", "region", "slides", "report.html")
    )
    progress.say(f'\nto look at it: dino view {root} {patch}  (overlay "clusters": click a word to see its tiles)')
    table = shlex.quote(str(words_folder(summary.directory / "slides", "patch") / TABLE))
    progress.say(f"to name the words, for example one of them keratin: {table}")
    progress.say(f"the report again: dino report {patch} {region} {root} {page}")
