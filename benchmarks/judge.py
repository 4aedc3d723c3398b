"""What share of the time of training do evaluations of labelled tiles take, at their default interval?

    DINO_TEST_DATA=… python -m benchmarks.judge OUTPUT.json [--cases tiny,tiny_small_crops,small] [--rows 500]

A run of 100 epochs on the 2,500 training tiles of crc5 begins; some of its steps are timed, then two evaluations of
teacher and student (kNN of labelled tiles), the first of which decodes the tiles. The share is that of the second one
in the steps from one evaluation to the next. Times are processor time of the process with all its threads, which also
reads the training tiles, and wall-clock time.
"""

import argparse
import csv
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.crc5 import RECIPE
from benchmarks.results import environment
from dino import api
from dino.config.load import load_config
from dino.config.schema import PatchConfig
from dino.files import write_json
from dino.train.evaluator import Evaluator
from dino.train.loop import StepReport, Trainer

CASES: dict[str, dict[str, Any]] = {  # beside the recipe patch_pathology
    "tiny": {"model.arch": "vit_tiny", "training.batch_size_per_gpu": 16},
    "tiny_small_crops": {
        key: value for key, value in RECIPE.items() if key.startswith(("model.", "aug.", "training."))
    },
    "small": {"model.arch": "vit_small", "training.batch_size_per_gpu": 8},
}
WARM_UP, STEPS = 1, 4


class Measured(BaseException):
    """Ends a run when enough is known; not an error that the run would record."""

    def __init__(self, found: dict[str, Any]) -> None:
        super().__init__()
        self.found = found


def timed_after_step() -> Callable[[Evaluator, Trainer, StepReport], None]:
    """A method that times a few steps, then evaluations, and raises :class:`Measured`."""
    began = (0.0, 0.0)

    def after_step(evaluator: Evaluator, trainer: Trainer, report: StepReport) -> None:
        nonlocal began
        trainer.settle(report)
        if report.step == WARM_UP:
            began = now()
        if report.step < WARM_UP + STEPS:
            return
        step = [seconds / STEPS for seconds in since(began)]
        networks = trainer.model.teacher.backbone, trainer.model.student.backbone
        evaluations = []
        for _ in range(2):
            then = now()
            scores = [evaluator.measure.score(network) for network in networks]
            evaluations.append(since(then))
        every = evaluator.every_steps
        shares = [evaluation / (every * one) for evaluation, one in zip(evaluations[1], step, strict=True)]
        raise Measured(
            {
                "steps_between_evaluations": every,
                "epochs_between_evaluations": round(trainer.length.epoch(every), 2),
                "seconds_per_step": named(step),
                "first_evaluation_seconds": named(evaluations[0]),
                "evaluation_seconds": named(evaluations[1]),
                "share_of_training": named(shares),
                "scores": scores[0],
            }
        )

    return after_step


def named(numbers: Sequence[float]) -> dict[str, float]:
    """Processor time and wall-clock time by name."""
    return {name: round(number, 4) for name, number in zip(("processor", "wall"), numbers, strict=True)}


def now() -> tuple[float, float]:
    """Processor time and wall-clock time in s."""
    return time.process_time(), time.perf_counter()


def since(then: tuple[float, float]) -> list[float]:
    """The same since ``then``."""
    return [one - other for one, other in zip(now(), then, strict=True)]


def measure(case: str, data: Path, rows: int) -> dict[str, Any]:
    """Times of a case with so many labelled tiles."""
    replaced = patch.multiple(Evaluator, start=lambda *_: None, after_step=timed_after_step())  # no baselines
    with tempfile.TemporaryDirectory() as folder, replaced:
        labels = Path(folder) / "labels.csv"
        with (data / "labels.csv").open(newline="") as file:
            table = [row for row in csv.DictReader(file) if row["partition"] == "train"]
        chosen = table[:: max(1, len(table) // rows)][:rows]
        with labels.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["image_path", "label", "partition"])
            writer.writerows([data / row["image_path"], row["label"], "train"] for row in chosen)
        settings = {
            **CASES[case],
            **{"data_dir": str(data / "train"), "output_dir": str(Path(folder) / "run"), "training.nepochs": 100},
            **{"evaluate.labels": str(labels), "evaluate.allow_leakage": True, "speed.num_workers": 0},
            **{"logging.tensorboard": False, "logging.report": False},
        }
        load = os.getloadavg()[0]
        try:
            api.pretrain(load_config(PatchConfig, recipe="patch_pathology", overrides=settings))
        except Measured as measured:
            loads = {"load": [round(load, 2), round(os.getloadavg()[0], 2)]}
            return {"case": case, "settings": CASES[case], "rows": len(chosen), **measured.found, **loads}
    raise RuntimeError("expected the run to be measured, found that it ended")


def main() -> None:
    """Parse arguments, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--rows", type=int, default=500)
    arguments = parser.parse_args()
    data = Path(os.environ.get("DINO_TEST_DATA", "."), "crc5")
    if not data.is_dir():
        parser.error(f"expected the tiles at {data}, found nothing; set DINO_TEST_DATA to the folder that holds crc5/")
    found = []
    for case in arguments.cases.split(","):
        found.append(measure(case, data, arguments.rows))
        print(json.dumps(found[-1]), flush=True)
    write_json(arguments.output, {"benchmark": "judge", **environment(torch.device("cpu")), "measured": found})


if __name__ == "__main__":
    main()
