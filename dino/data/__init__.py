"""Datasets, samplers and batches of tiles and feature grids.

They are imported at their first use, so that what only reads the features of slides does not import torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dino.data.datasets import (
        BadSample,
        Dataset,
        EncodedTiles,
        FolderTiles,
        GridDataset,
        Sample,
        SlideInfo,
        SlideRanges,
        TileDataset,
        place_of,
        slide_of,
    )
    from dino.data.grids import GridEntry, open_grids, read_grid
    from dino.data.groups import Balance, Groups
    from dino.data.images import decode, decode_bytes, list_images, list_names
    from dino.data.loader import Batch, DrawnBatches, DropPath, Layout, load_batches
    from dino.data.packed import GridFiles, grid_dtype, prepare_grids
    from dino.data.samplers import GroupSampler, PermutationSampler, Sampler
    from dino.data.tile_cache import keep_decoded

__all__ = [
    "BadSample",
    "Balance",
    "Batch",
    "Dataset",
    "DrawnBatches",
    "DropPath",
    "EncodedTiles",
    "FolderTiles",
    "GridDataset",
    "GridEntry",
    "GridFiles",
    "GroupSampler",
    "Groups",
    "Layout",
    "PermutationSampler",
    "Sample",
    "Sampler",
    "SlideInfo",
    "SlideRanges",
    "TileDataset",
    "decode",
    "decode_bytes",
    "grid_dtype",
    "keep_decoded",
    "list_images",
    "list_names",
    "load_batches",
    "open_grids",
    "place_of",
    "prepare_grids",
    "read_grid",
    "slide_of",
]

_MODULES = {
    "BadSample": "datasets",
    "Balance": "groups",
    "Batch": "loader",
    "Dataset": "datasets",
    "DrawnBatches": "loader",
    "DropPath": "loader",
    "EncodedTiles": "datasets",
    "FolderTiles": "datasets",
    "GridDataset": "datasets",
    "GridEntry": "grids",
    "GridFiles": "packed",
    "GroupSampler": "samplers",
    "Groups": "groups",
    "Layout": "loader",
    "PermutationSampler": "samplers",
    "Sample": "datasets",
    "Sampler": "samplers",
    "SlideInfo": "datasets",
    "SlideRanges": "datasets",
    "TileDataset": "datasets",
    "decode": "images",
    "decode_bytes": "images",
    "grid_dtype": "packed",
    "keep_decoded": "tile_cache",
    "list_images": "images",
    "list_names": "images",
    "load_batches": "loader",
    "open_grids": "grids",
    "place_of": "datasets",
    "prepare_grids": "packed",
    "read_grid": "grids",
    "slide_of": "datasets",
}


def __getattr__(name: str) -> Any:
    """Import a class or function at its first use."""
    if name not in _MODULES:
        raise AttributeError(f"module 'dino.data' has no attribute '{name}'")
    return getattr(importlib.import_module(f"dino.data.{_MODULES[name]}"), name)
