"""What is kept of a step that was not finite, and what a replay of it finds."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dino import distributed
from dino.data.loader import Batch
from dino.errors import CheckpointError
from dino.files import atomic_path, read_json, write_json
from dino.models.weights import read_checkpoint
from dino.train.distill import TEACHER_VIEWS
from dino.train.loop import StepReport, Trainer

RECORD = "failure.json"


@dataclasses.dataclass(frozen=True)
class Failure:
    """A step that was not finite, as ``RUN/failure`` holds it.

    Attributes:
        step: Steps done with it, so that it is the ``step``-th of the run.
        facts: Content of ``failure.json``.
        draws: Draw number of each of the step's samples, over all processes.
        names: Name of each, in the same order.
        parameters: Crop parameters of each by name, ``(n, V, ...)``.
    """

    step: int
    facts: Mapping[str, Any]
    draws: list[int]
    names: list[str]
    parameters: Mapping[str, Tensor]


@dataclasses.dataclass(frozen=True)
class SampleFinding:
    """What one sample did to the step.

    Attributes:
        name: The sample.
        draw: Its draw number.
        loss: Its loss alone.
        teacher_views: Views whose teacher logits are not finite, counted from 0.
        student_views: Views whose student logits are not finite.
        largest_input: Largest absolute value that the networks saw of it.
    """

    name: str
    draw: int
    loss: float
    teacher_views: list[int]
    student_views: list[int]
    largest_input: float

    @property
    def is_finite(self) -> bool:
        """True when nothing about the sample is wrong."""
        return math.isfinite(self.loss) and not self.teacher_views and not self.student_views


def record_failure(folder: Path, report: StepReport, last_metrics: Mapping[str, Any]) -> None:
    """Write ``failure.json``, and per process ``rank_<n>.pt`` with draws, names and crop parameters.

    Args:
        folder: ``RUN/failure``.
        report: The step as this process saw it.
        last_metrics: The newest line of the log.

    Raises:
        OSError: If the disk does not take it.
    """
    own = {"loss": float(report.loss), "grad_norm": float(report.grad_norm)}
    try:
        with atomic_path(folder / f"rank_{distributed.rank()}.pt") as temporary, temporary.open("wb") as file:
            torch.save(_drawn(report.batches), file)
    finally:
        everyone = distributed.gather(own)  # also where the disk is full: the others wait; and all files come first
    if distributed.is_main():
        facts = {
            "step": report.step,
            "processes": everyone,
            "values": dataclasses.asdict(report.values),
            "last_metrics": dict(last_metrics),
        }
        write_json(folder / RECORD, facts)


def _drawn(batches: Sequence[Batch]) -> dict[str, Any]:
    keys = batches[0].parameters
    return {
        "draws": torch.cat([batch.draws for batch in batches]),
        "names": [name for batch in batches for name in batch.names],
        "slide_ids": [slide for batch in batches for slide in batch.slide_ids],
        "parameters": {key: torch.cat([batch.parameters[key] for batch in batches]) for key in keys},
    }


def read_failure(folder: Path) -> Failure:
    """Read what :func:`record_failure` wrote.

    Raises:
        CheckpointError: If the record is missing or damaged.
    """
    try:
        facts = read_json(folder / RECORD)
        ranks = [read_checkpoint(folder / f"rank_{rank}.pt") for rank in range(len(facts["processes"]))]
        step = int(facts["step"])
        draws = torch.cat([rank["draws"] for rank in ranks])
        names = [name for rank in ranks for name in rank["names"]]
        keys = ranks[0]["parameters"]
        parameters = {key: torch.cat([rank["parameters"][key] for rank in ranks]) for key in keys}
        order = torch.argsort(draws)
        in_order = {key: value[order] for key, value in parameters.items()}
        return Failure(step, facts, draws[order].tolist(), [names[i] for i in order.tolist()], in_order)
    except (OSError, ArithmeticError, LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise CheckpointError(
            f"expected the record of a failed step in {folder} (RUN/failure), could not read it: {error}"
        ) from None


@torch.no_grad()
def examine(trainer: Trainer, batch: Batch, teacher_temp: float) -> list[SampleFinding]:
    """Look at every sample of a batch alone, with the networks as they are; nothing changes.

    Args:
        trainer: Holds the networks, the crops and the precision.
        batch: The samples.
        teacher_temp: Temperature of the teacher at that step.
    """
    model = trainer.model
    groups, keep = trainer.views(batch)
    with trainer.autocast():
        teacher = model.teacher([groups[0][:TEACHER_VIEWS]])
        student = model.student(groups, keep)
    losses = torch.zeros(len(batch.names), device=trainer.device, dtype=next(iter(student.values())).dtype)
    for objective in model.objectives:
        logits = student[objective.head], teacher[objective.head]  # type: ignore[index]
        losses = losses + objective.sample_losses(*logits, teacher_temp)  # type: ignore[operator]
    teacher_broken, student_broken = _broken_views(teacher), _broken_views(student)  # each (V, B)
    largest = torch.stack([views.abs().amax((0, 2, 3, 4)) for views in groups]).amax(0)  # (B,)
    return [
        SampleFinding(
            name,
            int(batch.draws[i]),
            float(losses[i]),
            teacher_broken[:, i].nonzero().flatten().tolist(),
            student_broken[:, i].nonzero().flatten().tolist(),
            float(largest[i]),
        )
        for i, name in enumerate(batch.names)
    ]


def _broken_views(logits: Mapping[str, Tensor]) -> Tensor:
    """``(V, B)``: whether any of a view's logits is not finite, under any head."""
    return torch.stack([~torch.isfinite(values).all(-1) for values in logits.values()]).any(0)
