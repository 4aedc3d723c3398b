"""The verbs of this package, for Python: the same ones as on the command line, with typed configs.

Each takes a config of :mod:`dino.config.schema` and builds everything it needs from it; this is the only place where
settings meet constructors.
"""

from dino.api.exporting import export, info, load_backbone
from dino.api.extracting import extract
from dino.api.judging import evaluate_knn
from dino.api.pretraining import pretrain
from dino.api.tiling import tile

__all__ = ["evaluate_knn", "export", "extract", "info", "load_backbone", "pretrain", "tile"]
