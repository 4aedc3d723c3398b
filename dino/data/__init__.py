"""Datasets, samplers and batches of tiles and feature grids."""

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
    "list_images",
    "list_names",
    "load_batches",
    "open_grids",
    "place_of",
    "prepare_grids",
    "read_grid",
    "slide_of",
]
