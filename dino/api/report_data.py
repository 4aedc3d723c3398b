"""The data of a report: what can be read of runs and of their data."""

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from dino import distributed, progress
from dino.api.feature_data import stored_words
from dino.api.levels import Level, build_level
from dino.api.roots import check_grids
from dino.config.schema import PretrainConfig, ReportConfig
from dino.errors import DataError, DinoError
from dino.report import gather
from dino.report.data import AttentionData, CropData, FeatureData, ReportData
from dino.report.slides import TiledRoot, TiledSlide
from dino.report.tiles import TileSet, read_some
from dino.train.run_folder import RunReader

FEWEST, MOST = 100, 2000  # tiles that are embedded
CPU_BUDGET = 6e11  # multiply-adds per network and set of tiles

Result = TypeVar("Result")


class Gathering:
    """Reads the data of a report; what cannot be read is left out, and said.

    Args:
        runs: Run folders.
        root: The data folder; None for that of the runs.
        config: Settings of the report.
        stack: Closes what is opened.
    """

    def __init__(self, runs: Sequence[Path], root: Path | None, config: ReportConfig, stack: ExitStack) -> None:
        self.config, self.stack, self.left_out = config, stack, list[str]()
        self.device = distributed.choose_device(config.device)
        readers = sorted((RunReader(path) for path in runs), key=lambda reader: reader.level())  # patch, then region
        self.runs = dict(zip(_names(readers), readers, strict=True))
        self.configs = {name: reader.config() for name, reader in self.runs.items()}
        self.networks = {
            name: loaded
            for name, reader in self.runs.items()
            if (
                loaded := self._part(
                    f"features and attention of {name}", lambda path=reader.path: gather.load_run(path)
                )
            )
        }
        self.root = root or self._root_of_runs()
        self.tables = self._part("slides", self._tables)
        if self.tables and config.slide:
            self.tables.choose(config.slide)  # an error where there is none, not a part that is left out
        self.slide = self._part("the slide", self._slide) if self.tables else None

    def data(self, **words: Any) -> ReportData:
        """Everything that the page shows.

        Args:
            words: Further fields of the data.
        """
        slide, features, tables, moved = self.slide, self._features(), self.tables, self.config.slides
        shown = slide.slide_id if slide else None
        first = next(iter(self.networks.values()), None)
        spacings = [slide.spacing_um] if slide else [one.tiles.um_per_px for one in features]
        spacings += [(first and first.trained.spacing_um) or 0.0]
        return ReportData(
            root=self.tables.data() if self.tables else None,
            slide=slide.data() if slide else None,
            runs=[gather.run_data(reader, name, self.networks.get(name)) for name, reader in self.runs.items()],
            crops=self._crops(),
            features=features,
            region_attention=self._region_attention(),
            words=self._of_patch_runs("words", lambda run: stored_words(run.trained, tables.path, moved, shown))
            if tables
            else [],
            um_per_px=next(filter(None, spacings), 0.0),
            left_out=self.left_out,
            device=_hardware(next(iter(self.configs.values()), None)),
            **words,
        )

    def _part(self, name: str, read: Callable[[], Result]) -> Result | None:
        """The result of ``read``; None, which is said, where a file or a package for it is missing or damaged."""
        try:
            return read()
        except (DinoError, ImportError) as error:  # openslide need not be installed where runs are trained
            progress.warn(f"report without {name}: {error}")
            self.left_out.append(f"{name[0].upper()}{name[1:]}: {error}")
            return None

    def _root_of_runs(self) -> Path | None:
        """The data folder of the first run that has one."""
        folders = [Path(config.data_dir) for config in self.configs.values() if config.data_dir]
        found = next((folder for folder in folders if folder.is_dir()), None)
        if found is None and folders:
            self._part("the data", lambda: _raise_absent(folders[0]))
        return found

    def _tables(self) -> TiledRoot | None:
        """Tables of ROOT; None for a folder that `dino tile` did not write."""
        if self.root is None or not (self.root / "tiling.json").exists():
            return None
        return TiledRoot(self.root, self.config.slides)

    def _slide(self) -> TiledSlide:
        assert self.tables is not None
        return self.stack.enter_context(closing(TiledSlide(self.tables, self.config.slide)))

    def _of_kind(self, images: bool) -> dict[str, gather.LoadedRun]:
        """The networks that read images, or those that read feature grids."""
        return {name: run for name, run in self.networks.items() if (run.trained.transform is not None) == images}

    def _level(self, config: PretrainConfig) -> Level:
        """The data of a run. Networks that it started from or distilled are not loaded."""
        changes = {"model": replace(config.model, init=None), "data_dir": str(self.root), "teacher": None}
        if self.config.slides:
            changes["slides"] = self.config.slides
        return build_level(replace(config, **changes))

    def _crops(self) -> CropData | None:
        """Crops of the first training samples of a patch-level run, with the same random numbers as in training."""
        run = next(iter(self._of_kind(images=True).values()), None)
        return (
            self._part("training crops", lambda: gather.first_crops(self._level(run.config), run.config.seed))
            if run and self.root
            else None
        )

    def _features(self) -> list[FeatureData]:
        """Maps, neighbours and attention of the patch-level runs."""
        runs, slide = self._of_kind(images=True), self.slide
        if not runs or self.root is None:
            return []
        limit = self.config.tiles or _most_tiles(next(iter(runs.values())), self.device)
        tiles = self._part("tiles", lambda: self._tiles(next(iter(runs.values())).config, limit))
        mapped = self._part("the map of features", lambda: slide.read_map(limit)) if slide else None
        if mapped is None and tiles is None:
            return []
        found = []
        for name, run in runs.items():
            one = self._part(
                f"features of {name}",
                lambda run=run, name=name: gather.feature_data(name, run, tiles, mapped, self.device),
            )
            if one is not None:
                found.append(replace(one, attention=gather.tile_attention(one, run, self.device)))
        return found

    def _tiles(self, config: PretrainConfig, limit: int) -> TileSet | None:
        """Tiles among which neighbours are searched; None where those of the shown slide are all that there are."""
        dataset = self._level(config).dataset
        if self.slide is not None and len(dataset.slide_ids) < 2:
            return None
        tiles = read_some(dataset, limit)
        if not tiles.names:
            raise DataError(f"expected tiles in {self.root} that can be read, found none")
        return tiles

    def _of_patch_runs(self, what: str, read: Callable[[gather.LoadedRun], Result | None]) -> list[Result]:
        """What is read of each patch-level run, where there is any."""
        runs = self._of_kind(images=True)
        found = [self._part(f"{what} of {name}", lambda run=run: read(run)) for name, run in runs.items()]
        return [one for one in found if one is not None]

    def _region_attention(self) -> dict[str, AttentionData]:
        slide, found = self.slide, {}
        if slide is None:
            return {}
        for name, run in self._of_kind(images=False).items():
            one = self._part(f"region attention of {name}", lambda run=run: self._attention(slide, run))
            found |= {name: one} if one else {}
        return found

    def _attention(self, slide: TiledSlide, run: gather.LoadedRun) -> AttentionData | None:
        """Attention over the shown regions; None without their features."""
        paths = slide.grid_paths(run.trained.grids, slide.regions)
        check_grids(paths, run.trained.details, run.trained.source)
        return gather.region_attention(slide, run, self.device)


def _most_tiles(run: gather.LoadedRun, device: torch.device) -> int:
    """Number of tiles that a network embeds in an acceptable time."""
    if device.type == "cuda":
        return MOST
    spec, weights = run.trained.backbone.spec, sum(weight.numel() for weight in run.trained.backbone.parameters())
    tokens = ((run.trained.tile_size_px or 256) / spec.patch_size) ** 2
    return max(FEWEST, min(MOST, int(CPU_BUDGET / (weights * tokens))))


def _names(readers: Sequence[RunReader]) -> list[str]:
    """What runs are called: by their level if there is one of each, else by their folders."""
    levels = [reader.level() for reader in readers]
    if len({*levels}) == len(levels):
        return [f"{level.capitalize()} level" for level in levels]
    for depth in range(1, 6):
        names = ["/".join(reader.path.absolute().parts[-depth:]) for reader in readers]
        if len({*names}) == len(names):
            break
    return names


def _raise_absent(folder: Path) -> None:
    raise DataError(f"expected the data of the run at {folder}, found no such folder; name ROOT if it was moved")


def _hardware(config: PretrainConfig | None) -> str:
    requested = config.speed.device if config else "auto"
    if torch.cuda.is_available() and requested != "cpu":
        return f"an {torch.cuda.get_device_name()}"
    return f"{os.cpu_count()} CPU cores"
