"""Level 1: features of the tiles of each slide in one ``.h5`` file, and feature grids of regions, one ``.pt`` each."""

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dino.extraction import folders, tile_files
from dino.extraction.embed import CLS_MEAN, PATCHES, Normalise, normaliser_of
from dino.extraction.extractor import Extractor, ExtractSummary
from dino.extraction.inputs import PixelSource, check_settings, find_inputs
from dino.extraction.pixels import REGIONS, TILES
from dino.extraction.record import (
    RECORD,
    check_folder,
    differences,
    model_record,
    prepare_folders,
    read_record,
    write_record,
)
from dino.extraction.regions import Reading, copy_known, write_regions
from dino.extraction.tile_files import Layout
from dino.extraction.work import Outputs, SlideCells, split_by_slide
from dino.files import oserror_to_data_error
from dino.slides.tables import write_regions as write_regions_table


class TileExtractor(Extractor):
    """Writes tile files and feature grids of regions with a level-1 model; every cell is embedded once.

    ``ROOT/features_<encoder>/<slide>.h5``, ``ROOT/region_4096_pretraining[_<encoder>]/<slide>_<x>_<y>.pt``.
    """

    title = "embed tiles"
    plan: tuple[PixelSource, Outputs, list[SlideCells]]

    @property
    def embed_dim(self) -> int:
        """Dimension of a tile's features."""
        return self.loaded.backbone.embed_dim * (2 if self.config.features == CLS_MEAN else 1)

    @property
    def features(self) -> str:
        """See :class:`Extractor`."""
        return self.config.features

    def prepare(self) -> tuple[PixelSource, Outputs, list[SlideCells]]:
        """See :class:`Extractor`."""
        config = self.config
        check_settings(config)
        inputs = find_inputs(self.root, config, self.loaded)
        source, records = inputs.source, inputs.records
        grids = read_record(folders.grid_record(self.root, config.encoder))
        record = self._record(source)
        outputs = Outputs(
            self.root,
            config.encoder or folders.encoder_name(self.loaded.source),
            config.encoder,
            self._layout(source),
            tiles=bool(inputs.tiles),
            regions=bool(records) and config.what != TILES,
            reuse=config.features != PATCHES and not differences(grids, record),
        )
        kinds = self._kinds(outputs, record)
        before = {folder: check_folder(path, made, folder, suffix) for folder, path, made, suffix in kinds}
        slides = split_by_slide(inputs, outputs, grids)
        if not config.dry_run:
            with oserror_to_data_error(self.root):  # here, so that every process receives the error
                for folder, path, made, _ in kinds:
                    parents = {outputs.grid_path(r).parent for r in records} if folder == outputs.grid_folder else set()
                    prepare_folders({folder, *parents}, path)
                    pixels = {
                        s.slide_id: s.pixels
                        for s in slides
                        if (s.tiles if folder == outputs.tile_folder else s.records)
                    }
                    write_record(path, made | {"pixels": pixels}, before[folder])
                if source.slides is None:
                    write_regions_table(self.root, records)
        return source, outputs, slides

    def slides(self) -> Sequence[SlideCells]:
        """See :class:`Extractor`."""
        return self.plan[2]

    def size(self, slide: SlideCells) -> int:
        """Number of cells, each counted once."""
        return slide.cells

    def pending(self, slide: SlideCells) -> bool:
        """See :class:`Extractor`."""
        return slide.files > 0

    def example(self) -> Tensor | None:
        """See :class:`Extractor`."""
        size = self.plan[0].tile_size_px
        cells = sum(self.size(slide) for slide in self.slides())
        return torch.zeros(min(self.config.batch_size, max(cells, 1)), 3, size, size, dtype=torch.uint8)

    def normalise(self) -> Normalise:
        """See :class:`Extractor`."""
        return normaliser_of(self.loaded)

    def process(self, slide: SlideCells, advance: Callable[[int], None]) -> None:
        """See :class:`Extractor`."""
        source, outputs, _ = self.plan
        plan, config = slide.plan(), self.config
        ahead = max(1, config.num_workers) if slide.pixels == REGIONS else 2 * config.batch_size
        reading = Reading(config.batch_size, config.num_workers, ahead)
        with ExitStack() as stack:
            file = None
            if slide.tiles is not None:
                model = {"name": slide.slide_id, "encoder": outputs.name, **self._model()}
                path, coords = outputs.tile_path(slide.slide_id), slide.tiles.coords
                attributes = source.attributes(slide.tiles)
                file = stack.enter_context(tile_files.create(path, coords, outputs.layout, attributes, model))
                copy_known(plan, [outputs.grid_path(record) for record in slide.done], file)
            if plan.units:
                read = stack.enter_context(slide.open(source, plan))
                paths = [outputs.grid_path(record) for record in slide.records]
                write_regions(plan, paths, read, self.embedder, reading, advance, file)

    def summary(self, slides: Sequence[SlideCells], **fields: Any) -> ExtractSummary:
        """See :class:`Extractor`."""
        _, outputs, found = self.plan
        rows = sum(record.grid[0] * record.grid[1] for slide in slides for record in slide.records)
        tiles = sum(len(slide.tiles.coords) for slide in slides if slide.tiles)
        return ExtractSummary(
            outputs.folders,
            written=sum(slide.files for slide in slides),
            skipped=sum(slide.skipped for slide in found),
            embedded=sum(self.size(slide) for slide in slides),
            pixels=dict(Counter(slide.pixels for slide in found if slide.files)),
            gigabytes=(rows * self.embed_dim * 4 + tiles * outputs.layout.row_bytes) / 1e9,
            **fields,
        )

    def _layout(self, source: PixelSource) -> Layout:
        """A row of the tile files."""
        if self.config.features != PATCHES:
            return Layout(self.embed_dim, self.config.storage)
        empty = torch.zeros(1, 3, source.tile_size_px, source.tile_size_px, dtype=torch.uint8)
        height, width = self.normalise()(empty).shape[-2:]
        patch_size = self.loaded.backbone.spec.patch_size
        return Layout(self.embed_dim, self.config.storage, (height // patch_size, width // patch_size, self.embed_dim))

    def _model(self) -> dict[str, Any]:
        """Attributes of the tile files that identify the model."""
        return {
            "model": self.loaded.source,
            "fingerprint": self.loaded.fingerprint,
            "precision": self.config.precision,
            "token_features": self.config.features,
        }

    def _record(self, source: PixelSource) -> dict[str, Any]:
        return {
            **model_record(self.loaded, self.config.precision, self.embed_dim),
            **source.record(),
            "features": self.config.features,
            "source": self.config.source,
        }

    def _kinds(self, outputs: Outputs, record: dict[str, Any]) -> list[tuple[Path, Path, dict[str, Any], str]]:
        """Folder, path and content of the record, and suffix of the files, for each kind of files that is written."""
        kinds = []
        if outputs.tiles:
            made = {**record, "encoder": outputs.name, "storage": self.config.storage}
            kinds.append((outputs.tile_folder, outputs.tile_folder / RECORD, made, ".h5"))
        if outputs.regions:
            path = folders.grid_record(self.root, outputs.grid_name)
            kinds.append((outputs.grid_folder, path, record, ".pt"))
        return kinds
