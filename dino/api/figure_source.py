"""What single figures are made from: a model, and the tiles or regions that it is applied to."""

from collections.abc import Sequence
from contextlib import ExitStack, closing
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dino import distributed
from dino.api.roots import check_grids, check_level_1
from dino.api.sources import open_tiles
from dino.config.schema import FigureConfig, PatchConfig
from dino.data import Sample, decode
from dino.errors import ConfigError, DataError
from dino.extraction.embed import normaliser_of
from dino.models.weights import LoadedBackbone, load_backbone_file
from dino.report import gather
from dino.report.slides import TiledRoot, TiledSlide
from dino.report.tiles import TileSet, read_some, tile_set
from dino.slides.tables import RegionRecord
from dino.train.run_folder import RunReader

MAPS = 16  # tiles whose attention is computed at a time


class FigureSource:
    """A model, and the tiles or regions of a data folder.

    Args:
        model: Run folder, checkpoint, export or ``timm:NAME``.
        root: ROOT of `dino tile`, or a folder of images.
        config: Settings of the figure.
        stack: Closes what is opened.

    Attributes:
        model: The model.
        networks: The model, and with ``config.untrained`` the network before its training.
        reads_images: Whether it is a level-1 model.

    Raises:
        CheckpointError: If the model cannot be loaded.
        ConfigError: If it is no run, and ``config.untrained`` is set.
        DataError: If a table of ROOT is damaged.
    """

    def __init__(self, model: str, root: Path, config: FigureConfig, stack: ExitStack) -> None:
        if not root.is_dir():
            raise DataError(f"expected a data folder at {root}, found {'a file' if root.exists() else 'nothing'}")
        self.root, self.config, self._stack = root, config, stack
        self.device = distributed.choose_device(config.device)
        self.model = load_backbone_file(model, config.arch, config.transform)
        self.networks = {"trained": self.model}
        if config.untrained:
            if not (Path(model) / "checkpoints").is_dir():
                raise ConfigError(f"expected a run as MODEL for untrained=true, found {model}; leave out untrained")
            self.networks["untrained"] = load_backbone_file(RunReader(Path(model)).initial_checkpoint())
        self.reads_images = self.model.transform is not None

    @cached_property
    def level_1(self) -> LoadedBackbone | None:
        """The level-1 model that the settings name beside a level-2 model; None without one.

        Raises:
            CheckpointError: If it cannot be loaded.
            ConfigError: If it is not one.
            DataError: If the level-2 model was trained on features of another one.
        """
        if self.config.level_1 is None:
            return None
        found, grids = load_backbone_file(self.config.level_1, None, self.config.transform), self.model.grids
        if found.transform is None:
            raise ConfigError(f"expected a level-1 model as level_1, found the level-2 model {found.source}")
        if grids and grids.fingerprint != found.fingerprint:
            raise DataError(
                f"expected level_1 to be {grids.name}, whose features {self.model.source} was trained on, found "
                f"{found.source}, which is another model"
            )
        return found

    @cached_property
    def tables(self) -> TiledRoot:
        """Tables of ROOT.

        Raises:
            DataError: If `dino tile` did not write the folder.
        """
        return TiledRoot(self.root, self.config.slides)

    @cached_property
    def slide(self) -> TiledSlide:
        """The slide to show.

        Raises:
            DataError: If it cannot be read.
        """
        return self._stack.enter_context(closing(TiledSlide(self.tables, self.config.slide)))

    def expect_images(self, kind: str) -> None:
        """Raise ConfigError if the model does not read images."""
        if not self.reads_images:
            raise ConfigError(
                f"expected a level-1 model for the figure '{kind}', found the level-2 model {self.model.source}"
            )

    @cached_property
    def tiles(self) -> TileSet:
        """Tiles of the data folder, spread over its slides; the tile that the settings name comes first.

        Raises:
            DataError: If none can be read.
        """
        dataset = open_tiles(PatchConfig(data_dir=str(self.root), slides=self.config.slides)).dataset
        found = read_some(dataset, self.config.tiles)
        if self.config.tile is not None:
            found = _with(self._named_tile(self.config.tile), found)
        if not found.names:
            raise DataError(f"expected tiles in {self.root} that can be read, found none")
        return found

    def _named_tile(self, tile: str) -> Sample:
        """The tile that the settings name."""
        if Path(tile).is_file():
            pixels = decode(Path(tile))
            height, width = pixels.shape[-2:]
            return Sample(pixels, tile, (height, width))
        x, y = place_of(tile)
        reader = self.slide.reader
        reader.lattice.clamped(x, y)
        width, height = reader.lattice.slide_size
        if max(x, y) < 0 or x + reader.lattice.step_lv0 > width or y + reader.lattice.step_lv0 > height:
            raise ConfigError(
                f"expected tile=X,Y inside slide {self.slide.slide_id} of {width} x {height} px, found {tile}"
            )
        pixels = torch.from_numpy(reader.read_cell(x, y).copy()).permute(2, 0, 1)
        side = pixels.shape[-1]
        return Sample(pixels, f"{self.slide.slide_id}_{x}_{y}", (side, side), self.slide.slide_id)

    def features(self, network: LoadedBackbone, pixels: Sequence[np.ndarray]) -> np.ndarray:
        """Features (N, D) of tiles."""
        return gather.embed_tiles(network, gather.to_tensor(pixels).split(gather.BATCH), self.device)

    def attention(self, network: LoadedBackbone, inputs: Sequence[np.ndarray] | Tensor) -> np.ndarray:
        """Attention of the cls token in the last block: (N, heads, h, w).

        Args:
            network: One of ``networks``.
            inputs: Tiles, uint8 (H, W, 3) each, or grids (N, D, h, w).
        """
        batch = inputs if isinstance(inputs, Tensor) else gather.to_tensor(inputs)
        normalise = normaliser_of(network)
        return np.concatenate(
            [gather.attention_maps(network, normalise(part), self.device) for part in batch.split(MAPS)]
        )

    def regions(self, *, every: bool) -> tuple[list[RegionRecord], Tensor]:
        """Regions of the slide, and their features (n, D, h, w).

        Args:
            every: All regions, not only those that are shown.

        Raises:
            DataError: If there are no features of them, or those of another level-1 model.
        """
        slide, shown = self.slide, list(range(len(self.slide.regions)))
        if not every and self.config.tile is not None:
            place = place_of(self.config.tile)
            shown = [i for i in shown if (slide.regions[i].x, slide.regions[i].y) == place]
            if not shown:
                raise ConfigError(f"expected tile=X,Y of a region of slide {slide.slide_id}, found {self.config.tile}")
        elif not every:
            shown = slide.shown_regions[: self.config.rows]
        slide.shown_regions = shown
        paths = [path for path in slide.grid_paths(self.model.grids, slide.regions) if path.exists()]
        check_grids(paths, self.model.details, self.model.source)
        if self.level_1 is not None:
            check_level_1([path.parent for path in paths], self.level_1.fingerprint, self.level_1.source)
        regions, grids = slide.region_grids("yx", self.model.grids)
        if grids is None:
            raise DataError(
                f"expected feature grids of slide {slide.slide_id} in {self.root}, found none; run `dino extract` first"
            )
        return regions, grids


def place_of(tile: str) -> tuple[int, int]:
    """Level-0 ``(x, y)`` in a setting.

    Raises:
        ConfigError: If it has another form.
    """
    try:
        x, y = (int(word) for word in tile.split(","))
    except ValueError:
        raise ConfigError(f"expected tile=X,Y in level-0 px, or an image file, found '{tile}'") from None
    return x, y


def _with(first: Sample, tiles: TileSet) -> TileSet:
    """A tile, and others of its size."""
    own = tile_set([first])
    kept = [i for i, pixels in enumerate(tiles.pixels) if pixels.shape == own.pixels[0].shape]
    rest = tiles.subset([i for i in kept if tiles.slides[i] != first.slide_id or first.name not in tiles.names[i]])
    owners = {slide: owner for slide, owner in zip(tiles.slides, tiles.owners, strict=True) if slide}
    return TileSet(
        [*own.pixels, *rest.pixels],
        [first.name, *rest.names],
        [first.slide_id, *rest.slides],
        [owners.get(first.slide_id or "", first.slide_id), *rest.owners],
        rest.um_per_px,
    )
