"""Models of the runs that the viewer was given: loaded while it serves, for their attention over what is clicked."""

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dino.errors import DataError, DinoError
from dino.extraction.catalogue import Catalogue
from dino.extraction.folders import grid_path, tile_folder
from dino.extraction.record import check_made_by
from dino.viewer.attention import AttentionFiles
from dino.viewer.runs import Runs

if TYPE_CHECKING:  # imports torch
    from torch import Tensor

    from dino.models.weights import LoadedBackbone


class ModelAttention:
    """Attention of a model over single inputs, computed when it is asked for.

    Args:
        catalogue: The ROOT.
        loaded: The model.
    """

    def __init__(self, catalogue: Catalogue, loaded: "LoadedBackbone") -> None:
        self._catalogue, self._loaded, self._lock = catalogue, loaded, threading.Lock()

    def _of(self, one: "Tensor", size: tuple[int, int] | None = None) -> np.ndarray:
        """Attention over one input, ``(1 + heads, h, w)`` float32: the mean over heads, then each head."""
        import torch

        from dino.extraction.attention import maps_of

        with self._lock:  # one at a time: the network is moved and cast while it computes
            (maps,) = maps_of(self._loaded, [one[None]], torch.device("cpu"), "fp32", size=size)
        return maps[0]


class TileAttention(ModelAttention):
    """Attention of a level-1 model over tiles."""

    def maps(self, slide_id: str, tile: int) -> np.ndarray:
        """Attention of the cls token over the tokens of a tile, relative to uniform attention.

        Args:
            slide_id: The slide.
            tile: Index of the tile.

        Returns:
            ``(1 + heads, h, w)`` float32: the mean over heads, then each head.

        Raises:
            DataError: If the slide cannot be read.
        """
        from dino.data.slide_tiles import cell_tensor

        tiles = self._catalogue.tiles[slide_id]
        x, y = tiles.coords[tile].tolist()
        with self._catalogue.slides.open(slide_id, tiles.step_lv0) as reader:
            pixels = cell_tensor(reader, x, y)
        return self._of(pixels)


class RegionAttention(ModelAttention):
    """Attention of a level-2 model over regions, from their grids of level-1 features.

    Args:
        catalogue: The ROOT.
        loaded: The model.
        grids: Folder of the grids.
    """

    def __init__(self, catalogue: Catalogue, loaded: "LoadedBackbone", grids: Path) -> None:
        super().__init__(catalogue, loaded)
        self._grids = grids

    def maps(self, slide_id: str, region: int) -> np.ndarray:
        """Attention of the cls token over the cells of a region, relative to uniform attention.

        Args:
            slide_id: The slide.
            region: Index of the region among those of the slide.

        Returns:
            ``(1 + heads, h, w)`` float32: the mean over heads, then each head.

        Raises:
            DataError: If there is no grid of the region, or it is damaged or of other features.
        """
        from dino.data.grids import read_grid

        record = self._catalogue.regions[slide_id][region]
        path = grid_path(self._grids, record)
        if not path.is_file():
            raise DataError(
                f"expected the features of this region, found none ({path.name}); run `dino extract` with the level-1 "
                "run, which computes what is missing"
            )
        grid = read_grid(path, "yx", record.grid)  # (D, h, w)
        expected = self._loaded.backbone.spec.input_dim
        if len(grid) != expected:
            raise DataError(
                f"expected {expected} features per cell in {path.name}, found {len(grid)}; extract it again"
            )
        return self._of(grid, record.grid)


class RunModels:
    """Loads the models of the runs beside the server, since importing torch takes longer than all else at the start.

    Args:
        catalogue: The ROOT.
        runs: The runs.
        attention: Attention maps by encoder.

    Attributes:
        tiles: Models of level 1 by encoder; None while they are being loaded.
        regions: Models of level 2 by the encoder whose grids they read; None while they are being loaded.
    """

    def __init__(self, catalogue: Catalogue, runs: Runs, attention: Mapping[str, AttentionFiles] | None = None) -> None:
        self.tiles: dict[str, TileAttention | None] = dict.fromkeys(runs.tiles)
        self.regions: dict[str, RegionAttention | None] = dict.fromkeys(runs.regions)
        self._catalogue, self._runs, self._attention = catalogue, runs, attention or {}
        self._error: DinoError | None = None

    def start(self, end: Callable[[], None]) -> None:
        """Load them in a thread, which calls ``end`` if one cannot be loaded, or did not make what is shown of it."""

        def load() -> None:
            from dino.models.weights import load_backbone_file

            try:
                for name, run in self._runs.tiles.items():
                    model = _tile_model(self._catalogue, name, run)
                    self._check_maps(name, run, model, level_2=False)
                    self.tiles[name] = TileAttention(self._catalogue, model)
                for name, (run, grids) in self._runs.regions.items():
                    model = load_backbone_file(run)
                    self._check_maps(name, run, model, level_2=True)
                    self.regions[name] = RegionAttention(self._catalogue, model, grids)
            except DinoError as error:
                self._error = error
                end()

        if self.tiles or self.regions:
            threading.Thread(target=load, name="models", daemon=True).start()

    def _check_maps(self, name: str, run: str, model: "LoadedBackbone", level_2: bool) -> None:
        """Raise DataError if the maps of an encoder are of another model than the run."""
        if name in self._attention:
            self._attention[name].check_made_by({"model": run, "fingerprint": model.fingerprint}, run, level_2)

    def check(self) -> None:
        """Raise the error that ended the server, if one did."""
        if self._error is not None:
            raise self._error


def _tile_model(catalogue: Catalogue, name: str, run: str) -> "LoadedBackbone":
    """The level-1 model of a run, which must have made the features of that name.

    Raises:
        CheckpointError: If it cannot be loaded.
        DataError: If it is of level 2, or the features are of another model.
    """
    from dino.models.weights import load_backbone_file

    loaded, folder = load_backbone_file(run), tile_folder(catalogue.root, name)
    if loaded.transform is None:  # of feature grids
        raise DataError(
            f"expected the level-1 run that made the features in {folder}, found {run}, which is of level 2; pass the "
            f"level-1 run first: dino view {catalogue.root} LEVEL1 {run}"
        )
    check_made_by(folder, loaded, f"view '{name}' alone")
    return loaded
