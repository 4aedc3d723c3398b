"""The Python API: the functions behind the commands of ``dino``, with typed configs.

Each function takes a config of :mod:`dino.config.schema`. Functions are imported at their first use, so that training
does not need the packages that read slides.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dino.api.evaluating import evaluate, evaluate_knn
    from dino.api.evaluating_robustness import evaluate_robustness
    from dino.api.evaluating_slides import evaluate_slide
    from dino.api.exporting import export, info, load_backbone
    from dino.api.extracting import extract
    from dino.api.figures import figure
    from dino.api.initial_weights import follow_init
    from dino.api.launching import launch_slurm
    from dino.api.mapping import attention
    from dino.api.overlays import export_overlays
    from dino.api.pretraining import pretrain, resume
    from dino.api.rehearsal import replay
    from dino.api.reporting import report
    from dino.api.results import compare
    from dino.api.tiling import tile, tiling_status
    from dino.api.viewing import export_geojson, view
    from dino.api.words import find_words

__all__ = [
    "attention",
    "compare",
    "evaluate",
    "evaluate_knn",
    "evaluate_robustness",
    "evaluate_slide",
    "export",
    "export_geojson",
    "export_overlays",
    "extract",
    "figure",
    "find_words",
    "follow_init",
    "info",
    "launch_slurm",
    "load_backbone",
    "pretrain",
    "replay",
    "report",
    "resume",
    "tile",
    "tiling_status",
    "view",
]

_MODULES = {
    "attention": "mapping",
    "compare": "results",
    "evaluate": "evaluating",
    "evaluate_knn": "evaluating",
    "evaluate_robustness": "evaluating_robustness",
    "evaluate_slide": "evaluating_slides",
    "export": "exporting",
    "export_geojson": "viewing",
    "export_overlays": "overlays",
    "extract": "extracting",
    "figure": "figures",
    "find_words": "words",
    "follow_init": "initial_weights",
    "info": "exporting",
    "launch_slurm": "launching",
    "load_backbone": "exporting",
    "pretrain": "pretraining",
    "replay": "rehearsal",
    "report": "reporting",
    "resume": "pretraining",
    "tile": "tiling",
    "tiling_status": "tiling",
    "view": "viewing",
}


def __getattr__(name: str) -> Any:
    """Import a function at its first use."""
    if name not in _MODULES:
        raise AttributeError(f"module 'dino.api' has no attribute '{name}'")
    return getattr(importlib.import_module(f"dino.api.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    """The public functions, for tab completion before they are imported."""
    return __all__
