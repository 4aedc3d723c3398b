"""The verbs of this package, for Python: the same ones as on the command line, with typed configs.

Each takes a config of :mod:`dino.config.schema` and builds everything it needs from it; this is the only place where
settings meet constructors. A verb is imported when it is first asked for, so that training runs where the packages that
read slides are absent.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dino.api.exporting import export, info, load_backbone
    from dino.api.extracting import extract
    from dino.api.judging import evaluate_knn
    from dino.api.launching import launch_slurm
    from dino.api.pretraining import pretrain
    from dino.api.replaying import replay
    from dino.api.reporting import report
    from dino.api.tiling import tile

__all__ = [
    "evaluate_knn",
    "export",
    "extract",
    "info",
    "launch_slurm",
    "load_backbone",
    "pretrain",
    "replay",
    "report",
    "tile",
]

_MODULES = {
    "evaluate_knn": "judging",
    "export": "exporting",
    "extract": "extracting",
    "info": "exporting",
    "launch_slurm": "launching",
    "load_backbone": "exporting",
    "pretrain": "pretraining",
    "replay": "replaying",
    "report": "reporting",
    "tile": "tiling",
}


def __getattr__(name: str) -> Any:
    """Import a verb."""
    if name not in _MODULES:
        raise AttributeError(f"module 'dino.api' has no attribute '{name}'")
    return getattr(importlib.import_module(f"dino.api.{_MODULES[name]}"), name)
