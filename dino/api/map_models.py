"""The models of maps of slides: loaded, and checked to belong to each other and to a ROOT."""

from collections.abc import Sequence
from dataclasses import dataclass

from dino.api.roots import Root, check_level_1
from dino.config.schema import AttentionConfig
from dino.errors import ConfigError, DataError
from dino.extraction.inputs import check_geometry
from dino.models.grid_source import GridSource
from dino.models.weights import LoadedBackbone, load_backbone_file


@dataclass(frozen=True)
class MapModels:
    """Models by level.

    Attributes:
        tile: Level 1.
        region: Level 2, if any.
    """

    tile: LoadedBackbone
    region: LoadedBackbone | None

    def check(self, root: Root) -> GridSource | None:
        """Check that the tiles and the grids of a ROOT are those that the models are for.

        Returns:
            The source of the grids that level 2 reads; None without one, and where it is not recorded.

        Raises:
            DataError: If they are not, or there are no grids.
        """
        if root.tiling is not None:
            check_geometry(root.tiling, self.tile, root.path)
        if self.region is None:
            return None
        folder = root.grids_of(self.region.grids, self.region.source)
        if not any(folder.glob("*.pt")):
            raise DataError(
                f"expected feature grids (*.pt) in {folder} for the level-2 model, found none; run `dino extract "
                f"{self.tile.source} {root.path}` first, or omit the level-2 model"
            )
        return check_level_1([folder], self.tile.fingerprint, self.tile.source)


def load_models(names: Sequence[str], config: AttentionConfig) -> MapModels:
    """Load the models.

    Args:
        names: Runs, checkpoints or exports, in any order.
        config: Settings.

    Raises:
        CheckpointError: If one cannot be loaded.
        ConfigError: If there is not one of level 1, and at most one of level 2.
        DataError: If level 2 was trained on features of another level-1 model.
    """
    return _by_level([load_backbone_file(name, config.arch, config.transform) for name in names])


def _by_level(loaded: Sequence[LoadedBackbone]) -> MapModels:
    """The level-1 and the level-2 model.

    Raises:
        ConfigError: If there is not one of level 1, and at most one of level 2.
        DataError: If level 2 was trained on features of another level-1 model.
    """
    tile = [one for one in loaded if one.transform is not None]
    region = [one for one in loaded if one.transform is None]  # of feature grids
    if len(tile) != 1 or len(region) > 1:
        raise ConfigError(
            f"expected a level-1 model, and at most one level-2 model, found {len(tile)} and {len(region)}: "
            f"{', '.join(one.source for one in loaded)}"
        )
    expected = region[0].grids if region else None
    if expected and expected.fingerprint != tile[0].fingerprint:
        raise DataError(
            f"expected the level-1 model {expected.name} whose features {region[0].source} was trained on, found "
            f"{tile[0].source}, which is another one"
        )
    return MapModels(tile[0], region[0] if region else None)
