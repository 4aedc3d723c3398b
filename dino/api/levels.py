"""The levels: everything that differs between training on tiles and training on feature grids.

Code outside of this module does not compare level names or config types; it calls a level. A further level is one more
class in :data:`LEVELS`. There are three ways to get one:

- ``build_level(config)``: an instance with data, crops and backbone spec, for training.
- ``level_named(name)``: the class, for a loaded backbone (``loaded.level``) or a run folder. Evaluators call its class
  methods: ``labelled_reader`` and ``normaliser`` turn labelled files into inputs, ``baseline_features`` are the scores
  to beat without a network, under the name ``baseline``.
- ``level_of(config)``: the class, for settings.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from dino.api.roots import (
    Root,
    Split,
    check_grids,
    check_held_out,
    data_folders,
    origin_of_grids,
    shapes_of_grids,
    slides_of,
    source_of_grids,
)
from dino.api.sources import open_tiles, stored_tars
from dino.config.schema import EvaluationConfig, PatchConfig, PretrainConfig, RegionConfig
from dino.crops.grids import GridCrops
from dino.crops.images import ImageCrops
from dino.data import (
    Dataset,
    GridDataset,
    GridFiles,
    Groups,
    GroupSampler,
    PermutationSampler,
    Sampler,
    decode,
    grid_dtype,
    keep_decoded,
    open_grids,
    prepare_grids,
    read_grid,
    slide_of,
)
from dino.errors import ConfigError, DataError
from dino.evaluate import Pretraining, pixel_features
from dino.extraction.embed import Normalise, identity, normaliser
from dino.extraction.slides import SlideExtractor
from dino.extraction.tiles import TileExtractor
from dino.models.backbone import BackboneSpec
from dino.models.weights import TRANSFORMS, LoadedBackbone, Transform, load_backbone_file, settings_that_fit
from dino.objectives.features import FrozenBackbone

DEFAULT_TILE_SIZE_PX = 256
CROP_SIZES = ("aug.global_crops_size", "aug.local_crops_size")

Read = Callable[[Path], Tensor]

MANY_TILES = 1_000_000  # from which the recipe patch_dinov2 is named, as in its own table


class Level(ABC):
    """What a run of one level is made of.

    Attributes:
        name: Name of the level in commands, checkpoints and records.
        schema: Settings of its runs.
        baseline: Name of the features that need no network, see :meth:`baseline_features`.
        extractor: What ``dino extract`` does with its models.
        dataset: The samples.
        crops: Draws and applies the views.
        spec: The backbone.
        transform: Normalization of images; None for feature grids.
        geometry: What a checkpoint records of the samples: spacing and tile size where known, and the shape of grids.
        slides: ``slide_ids`` and ``patient_ids`` of the samples, as far as they are known.
        teacher: The frozen network that the run distils, if any.
        origin: What a run's identity and checkpoints record of other models: ``grids``, the level-1 model of feature
            grids; ``teacher_weights`` and ``teacher_transform`` of the teacher.
        split: How many samples are trained on, and how many are held out.
        groups: Groups that share the draws; None where every sample is drawn equally often.
        filtered: What a filter left out, for ``status.json``; None without one.
        warnings: Likely mistakes in the data.
        notes: What else to say of it.
    """

    name: ClassVar[str]
    schema: ClassVar[type[PretrainConfig]]
    baseline: ClassVar[str]
    extractor: ClassVar[type[TileExtractor] | type[SlideExtractor]]

    dataset: Dataset
    crops: ImageCrops | GridCrops
    spec: BackboneSpec
    transform: Transform | None
    geometry: dict[str, Any]
    slides: dict[str, list[str]]
    teacher: FrozenBackbone | None = None
    origin: Mapping[str, Any]
    split: Split
    groups: Groups | None = None
    filtered: Mapping[str, Any] | None = None
    warnings: list[str]
    notes: Sequence[str] = ()

    @abstractmethod
    def __init__(self, config: Any) -> None: ...

    @staticmethod
    @abstractmethod
    def training_files(root: Root) -> tuple[Path, list[str]]:
        """The folder of the files of a data folder that may be trained on, and their names in it.

        Raises:
            DataError: If there are none.
        """

    @classmethod
    def pretraining(cls, slides: Mapping[str, Any] | None, config: Mapping[str, Any] | None) -> Pretraining:
        """What a model was pretrained on, as far as its checkpoint and its data folders tell.

        Args:
            slides: ``training_slides`` of the checkpoint.
            config: Settings of its run, which name its data folders; None to look into none.
        """
        config = config or {}
        slides = slides or {}
        ids = {*(slides.get("slide_ids") or []), None}
        patients: dict[str, str] = {}
        files, stored = [], []
        for root in (Root(folder, config.get("encoder")) for folder in data_folders(config)):
            patients |= root.patients
            with suppress(DataError):  # the files are not there any more
                folder, names = cls.training_files(root)
                if len(ids) > 1:  # slides may have been added since
                    names = [name for name in names if slide_of(name) in ids]
                files.append((folder, names))
            with suppress(DataError):
                stored += cls.stored_files(root, config, ids)
        return Pretraining(slides, patients, files, stored)

    @classmethod
    def stored_files(
        cls, root: Root, config: Mapping[str, Any], slides: Collection[str | None]
    ) -> list[tuple[np.ndarray, Callable[[int], bytes]]]:
        """Sizes and bytes of the files in shards of a data folder that may be trained on.

        Args:
            root: The data folder.
            config: Settings of the run.
            slides: Those that were trained on, and None for files of unknown slides; None alone if they are not known.

        Raises:
            DataError: If they cannot be used.
        """
        return []

    @staticmethod
    def recommended_recipe(config: Any, samples: int) -> str | None:
        """One line that names the recipe for these settings and this number of samples; None if it is in use."""
        return None

    @classmethod
    def settings_that_fit(cls, config: Any, start: LoadedBackbone) -> list[str]:
        """The settings that have to change for a run to start from some weights, as ``key=value``."""
        return []

    def sampler(self, seed: int) -> Sampler:
        """The order in which samples are drawn."""
        return (
            GroupSampler(self.groups, seed) if self.groups is not None else PermutationSampler(len(self.dataset), seed)
        )

    @property
    def samples(self) -> int:
        """Number of samples that may be drawn, which are as many as an epoch has draws."""
        return self.groups.samples if self.groups is not None else len(self.dataset)

    @property
    def export_size_px(self) -> int:
        """Input size that an export is made for: the tile size, rounded down to a multiple of the patch size."""
        size, patch_size = self.geometry["tile_size_px"] or DEFAULT_TILE_SIZE_PX, self.spec.patch_size
        return max(patch_size, size - size % patch_size)

    @classmethod
    @abstractmethod
    def labelled_reader(
        cls,
        paths: Sequence[Path],
        spec: BackboneSpec,
        config: PretrainConfig | EvaluationConfig,
        model: str,
        origin: Mapping[str, Any],
    ) -> Read:
        """How labelled items are read.

        Args:
            paths: All of them.
            spec: The backbone that they are for.
            config: Settings of the run or of the evaluation.
            model: What to call the model in messages.
            origin: What is recorded of the origin of the samples that the model was trained on, see ``Level.origin``.

        Returns:
            A function of a path to ``(3, H, W)`` uint8 or ``(D, h, w)`` float32. It raises DataError if the file cannot
            be used.

        Raises:
            DataError: If a path is an item of another level, or a feature grid of another level-1 model.
        """

    @classmethod
    @abstractmethod
    def normaliser(cls, transform: Transform | None, patch_size: int) -> Normalise:
        """The step from a batch of labelled items to a backbone's input."""

    @classmethod
    @abstractmethod
    def baseline_features(cls, batch: Tensor) -> Tensor:
        """Features ``(B, d)`` of a batch of labelled items that need no network."""


KEPT_BYTES = 10**9  # of decoded labelled tiles of a run, in memory that is used as they are read


class PatchLevel(Level):
    """Level 1: tiles of a folder of images, or those that ``dino tile`` cut under a ROOT."""

    name = "patch"
    schema = PatchConfig
    baseline = "pixels_8x8"
    extractor = TileExtractor

    def __init__(self, config: PatchConfig) -> None:
        aug, model = config.aug, config.model
        tiles = open_tiles(config)
        self.dataset = tiles.dataset
        start = load_backbone_file(model.init, model.init_arch) if model.init else None
        check_crops(config, start)
        self.transform = (start.transform if start else None) or TRANSFORMS["imagenet"]
        self.crops = ImageCrops(aug, self.transform.mean, self.transform.std)
        size = (aug.global_crops_size, aug.global_crops_size)
        self.spec = BackboneSpec(model.arch, self.name, 3, size, model.patch_size, model.pos_resample)
        self.geometry, self.slides = tiles.geometry, tiles.slides
        if config.teacher:
            self.teacher = FrozenBackbone.load(config.teacher, config.distill, self.transform, model)
        self.origin = self.teacher.origin if self.teacher else {}
        self.split, self.groups = tiles.split, tiles.groups
        self.warnings, self.notes, self.filtered = tiles.warnings, tiles.notes, tiles.filtered

    @staticmethod
    def training_files(root: Root) -> tuple[Path, list[str]]:
        """Tiles."""
        folder, names, _ = root.tiles()
        return folder, names

    @classmethod
    def stored_files(
        cls, root: Root, config: Mapping[str, Any], slides: Collection[str | None]
    ) -> list[tuple[np.ndarray, Callable[[int], bytes]]]:
        """Tiles in tar files; sizes of those in parquet files are not known without reading all of them."""
        speed = config.get("speed") or {}
        cache_dir = speed.get("cache_dir", "auto") if isinstance(speed, Mapping) else speed.cache_dir
        tars = stored_tars(root, cache_dir, slides)
        return [(tars.sizes, tars.content)] if tars else []

    @staticmethod
    def recommended_recipe(config: PatchConfig, samples: int) -> str | None:
        """A recipe for the start weights, the teacher, or the number of tiles."""
        if config.teacher:
            unread = config.objective.dino == config.distill.dino == 0 and config.aug.local_crops_number > 0
            return "nothing reads the local crops: --recipe patch_distill has none" if unread else None
        if config.optim.layer_decay < 1:  # both recipes named below set it
            return None
        if config.model.init:
            return "model.init is set: --recipe patch_continue has the settings to continue from pretrained weights"
        if samples < MANY_TILES:
            return (
                f"fewer than {MANY_TILES:,} tiles: consider pretrained weights, model.init and --recipe patch_continue"
            )
        return f"at least {MANY_TILES:,} tiles: --recipe patch_dinov2 has the settings of DINOv2"

    @classmethod
    def settings_that_fit(cls, config: PatchConfig, start: LoadedBackbone) -> list[str]:
        """Architecture, patch size, rule for positions, and sizes of crops."""
        if start.level != cls.name:
            return []
        model, aug = config.model, config.aug
        sizes = {name: getattr(aug, name.removeprefix("aug.")) for name in CROP_SIZES}
        return settings_that_fit(start, model.arch, model.patch_size, model.pos_resample, sizes)

    @classmethod
    def labelled_reader(
        cls,
        paths: Sequence[Path],
        spec: BackboneSpec,
        config: PretrainConfig | EvaluationConfig,
        model: str,
        origin: Mapping[str, Any],
    ) -> Read:
        """Decode images; while training, decoded ones are kept for the next evaluations."""
        grid = next((path for path in paths if path.suffix == ".pt"), None)
        if grid is not None:
            raise DataError(f"expected images for the level-1 model {model}, found the feature grid {grid}")
        return keep_decoded(paths, KEPT_BYTES) if isinstance(config, PretrainConfig) else decode

    @classmethod
    def normaliser(cls, transform: Transform | None, patch_size: int) -> Normalise:
        """Scale 8-bit images and resize them to a size that the backbone takes."""
        transform = transform or TRANSFORMS["imagenet"]
        size = transform.input_size_px
        return normaliser(transform.mean, transform.std, patch_size, (size, size) if size else None)

    @classmethod
    def baseline_features(cls, batch: Tensor) -> Tensor:
        """8 x 8 pixels less their mean."""
        return pixel_features(batch)


def check_crops(config: PatchConfig, start: LoadedBackbone | None) -> None:
    """Raise ConfigError, which names all that has to change, if crops or initial weights do not fit the backbone."""
    model = config.model
    if start and (words := PatchLevel.settings_that_fit(config, start)):
        spec = start.backbone.spec
        raise ConfigError(
            f"expected settings that fit model.init={model.init} ({spec.arch}, patches of {spec.patch_size} px), "
            f"found others; add {' '.join(words)}"
        )
    for name in CROP_SIZES:
        size = getattr(config.aug, name.removeprefix("aug."))
        below = size // model.patch_size * model.patch_size
        if below != size:
            raise ConfigError(
                f"expected {name} to be a multiple of model.patch_size={model.patch_size}, found {size}; the nearest "
                f"are {below or model.patch_size} and {below + model.patch_size}"
            )


class RegionLevel(Level):
    """Level 2: feature grids of a folder, or those that ``dino extract`` wrote under a ROOT."""

    name = "region"
    schema = RegionConfig
    baseline = "mean_of_cells"
    extractor = SlideExtractor

    def __init__(self, config: RegionConfig) -> None:
        root, model = Root(Path(config.data_dir), config.encoder), config.model
        check_held_out([root])
        folder, entries, held_out = root.grids(config.region_cells)
        start = load_backbone_file(model.init, model.init_arch) if model.init else None
        source = source_of_grids(folder, start.grids if start else None, str(model.init))
        files = GridFiles(folder, entries, config.grid_order, grid_dtype(config.speed), source.key if source else "")
        survey, packed, cells = prepare_grids(
            files, config.speed, config.training.max_bad_fraction, may_write=not config.dry_run
        )
        slides = root.slide_infos({region.slide_id: region.spacing_um for region in root.regions()})
        self.dataset = GridDataset(files, survey, packed, by_row=cells is not None, slides=slides)
        self.crops = GridCrops((survey.height, survey.width), config.aug, cells)
        height, width = self.crops.sizes[0]
        self.spec = BackboneSpec(model.arch, self.name, survey.dim, (height, width), 1, model.pos_resample)
        self.transform = None
        self.geometry = {**root.geometry(), "region_cells": [survey.height, survey.width]}
        self.slides, self.origin = slides_of(self.dataset.slide_ids, root.status), origin_of_grids(source)
        self.split = Split("regions", len(self.dataset), len(self.slides["slide_ids"]), held_out)
        self.warnings = root.unknown_partitions()

    @staticmethod
    def training_files(root: Root) -> tuple[Path, list[str]]:
        """Feature grids."""
        folder, entries, _ = root.grids()
        return folder, [entry.path.name for entry in entries]

    @classmethod
    def labelled_reader(
        cls,
        paths: Sequence[Path],
        spec: BackboneSpec,
        config: PretrainConfig | EvaluationConfig,
        model: str,
        origin: Mapping[str, Any],
    ) -> Read:
        """Read feature grids; shapes are those of a ``regions.csv`` beside or above them, else square."""
        other = next((path for path in paths if path.suffix != ".pt"), None)
        if other is not None:
            raise DataError(f"expected .pt feature grids for the level-2 model {model}, found {other}")
        check_grids(paths, origin, model)
        shapes = shapes_of_grids(paths)
        order: str = getattr(config, "grid_order")  # noqa: B009 - of every config of this level

        def read(path: Path) -> Tensor:
            regions, _, dim = open_grids(path).shape
            if regions != 1 or dim != spec.input_dim:
                raise DataError(f"expected one region of D={spec.input_dim} in {path}, found {regions} of D={dim}")
            return read_grid(path, order, shapes.get(path.name))

        return read

    @classmethod
    def normaliser(cls, transform: Transform | None, patch_size: int) -> Normalise:
        """Feature grids are the backbone's input."""
        return identity

    @classmethod
    def baseline_features(cls, batch: Tensor) -> Tensor:
        """Mean of the cells of each grid."""
        return batch.mean((2, 3))


LEVELS: Mapping[str, type[Level]] = {level.name: level for level in (PatchLevel, RegionLevel)}


def level_named(name: str) -> type[Level]:
    """The level of a name.

    Raises:
        ConfigError: If there is none.
    """
    if name not in LEVELS:
        raise ConfigError(f"expected a level {' or '.join(LEVELS)}, found '{name}'; was it written by a newer version?")
    return LEVELS[name]


def level_of(config: PretrainConfig) -> type[Level]:
    """The level that settings are for."""
    return next(level for level in LEVELS.values() if level.schema is type(config))


def build_level(config: PretrainConfig) -> Level:
    """Find the data of a run and build its dataset, crops and backbone spec.

    Args:
        config: Settings of a run; their type decides the level.

    Raises:
        DataError: If the folder is missing, empty, or contains what cannot be trained on.
        ConfigError: If sizes do not fit.
    """
    if not config.data_dir:
        raise ConfigError("expected a data folder, found none; name ROOT (data_dir=…)")
    for folder in (config.data_dir, *getattr(config, "more_data_dirs", ())):
        if not Path(folder).is_dir():
            raise DataError(f"expected a data folder at {folder}, found nothing; check the path")
    return level_of(config)(config)
