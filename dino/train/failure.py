"""The record of a step that was not finite, and the examination of its samples in a replay."""

import copy
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
from dino.models.backbone import Tokens
from dino.models.checkpoint import read_checkpoint
from dino.objectives import Masked, Outputs
from dino.train.loop import StepReport, Trainer

RECORD = "failure.json"


@dataclasses.dataclass(frozen=True)
class Failure:
    """Content of ``RUN/failure``: a step that was not finite.

    Attributes:
        step: Number of the step, counted from 1.
        facts: Content of ``failure.json``.
        draws: Draw number of each of the step's samples, over all processes.
        names: Name of each, in the same order.
        parameters: Crop parameters of each by name, (n, V, ...).
    """

    step: int
    facts: Mapping[str, Any]
    draws: list[int]
    names: list[str]
    parameters: Mapping[str, Tensor]


@dataclasses.dataclass(frozen=True)
class SampleFinding:
    """What a replay finds about one sample.

    Attributes:
        name: The sample.
        draw: Its draw number.
        loss: Weighted sum of its losses, computed without the other samples.
        teacher_views: Views whose teacher logits are not finite, counted from 0.
        student_views: Views whose student logits are not finite.
        largest_input: Largest absolute value in its views.
        losses: Each of its losses by name.
    """

    name: str
    draw: int
    loss: float
    teacher_views: list[int]
    student_views: list[int]
    largest_input: float
    losses: dict[str, float]

    @property
    def is_finite(self) -> bool:
        """True when its loss and all its logits are finite."""
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
    own = {name: float(number) for name, number in report.numbers().items()}
    try:
        with atomic_path(folder / f"rank_{distributed.rank()}.pt") as temporary, temporary.open("wb") as file:
            torch.save(_drawn(report.batches), file)
    finally:
        everyone = distributed.gather(own)  # even if the disk is full, because the others wait; and after all files
    if distributed.is_main():
        facts = {
            "step": report.step,
            "processes": everyone,
            "values": {**dataclasses.asdict(report.values), **report.scheduled},
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
    if not (folder / RECORD).exists():
        raise CheckpointError(
            f"expected the record of a failed step at {folder / RECORD}, found none; a run writes RUN/failure when a "
            "loss or gradient is not finite"
        )
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
def examine(trainer: Trainer, batch: Batch, step: int) -> list[SampleFinding]:
    """Compute the losses of every sample of a batch by itself; nothing changes.

    Args:
        trainer: Holds networks, objectives, crops and precision.
        batch: The samples.
        step: Step whose scheduled values to use, counted from 0.
    """
    model, values = trainer.model, trainer.model.scheduled(step)
    inputs = trainer.inputs(batch)
    with trainer.autocast():
        teacher, student = model.teach(inputs), model.student(*inputs)
    largest = torch.stack([views.abs().amax((0, 2, 3, 4)) for views in inputs.groups]).amax(0)  # (B,)
    broken = [(_broken_views(teacher, i), _broken_views(student, i)) for i in range(len(batch.names))]
    model.prepare([teacher], values)
    findings = []
    for i, name in enumerate(batch.names):
        total, losses = 0.0, {}
        for objective in copy.deepcopy(model.objectives):  # copies, because an objective may update its state
            if objective.across_samples:  # it has no loss of a single sample
                continue
            own = objective(_sample(student, i), _sample(teacher, i), values).losses
            losses |= {key: float(loss) for key, loss in own.items()}
            total += objective.weight * sum(float(loss) for loss in own.values())
        findings.append(
            SampleFinding(
                name,
                int(batch.draws[i]),
                total,
                *broken[i],
                float(largest[i]),
                losses,
            )
        )
    return findings


def _sample(outputs: Outputs, index: int) -> Outputs:
    """A copy of the outputs of one sample, with a batch dimension of 1."""
    part = slice(index, index + 1)
    tokens = []
    for group in outputs.tokens:
        rest = (t if t is None else t[:, part].clone() for t in (group.registers, group.patches))
        tokens.append(Tokens(group.cls[:, part].clone(), *rest))
    logits = {name: found[_rows(outputs, found, index)].clone() for name, found in outputs.logits.items()}
    masked = outputs.masked
    if masked is not None:
        masked = Masked.of(masked.mask[:, part].transpose(0, 1).cpu()).to(masked.mask.device)
    return Outputs(tokens, logits, masked)


def _rows(outputs: Outputs, logits: Tensor, index: int) -> Any:
    """Index of a sample's logits: (V, 1, ...), or its masked tokens of (M, K)."""
    if logits.ndim > 2:
        return slice(None), slice(index, index + 1)
    assert outputs.masked is not None
    _, batch, count = outputs.masked.mask.shape
    return (outputs.masked.index // count) % batch == index


def _broken_views(outputs: Outputs, index: int) -> list[int]:
    """Views of a sample whose logits are not finite, of any head."""
    views: set[int] = set()
    for logits in outputs.logits.values():
        rows = _rows(outputs, logits, index)
        broken = ~torch.isfinite(logits[rows]).flatten(1).all(-1)
        if logits.ndim > 2:
            views.update(broken.nonzero()[:, 0].tolist())
        elif outputs.masked is not None:
            views.update((outputs.masked.index[rows][broken] // outputs.masked.mask[0].numel()).tolist())
    return sorted(views)
