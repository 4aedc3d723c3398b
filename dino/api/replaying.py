"""``replay``: a step that was not finite, done again from the last checkpoint before it."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from dino import distributed, progress
from dino.api.levels import build_level
from dino.api.run import Run, restore
from dino.config.load import load_config
from dino.config.schema import PatchConfig, RegionConfig
from dino.errors import ConfigError, DataError
from dino.train.checkpoint import CheckpointFolder
from dino.train.failure import Failure, SampleFinding, examine, read_failure
from dino.train.loop import NonFiniteStep, Trainer
from dino.train.run_folder import RunFolder


@dataclasses.dataclass(frozen=True)
class Replay:
    """What a replay found.

    Attributes:
        step: The step that failed.
        again: Whether it was not finite this time either.
        samples: What each of its samples does alone, in the order of their draws.
    """

    step: int
    again: bool
    samples: list[SampleFinding]

    @property
    def suspects(self) -> list[SampleFinding]:
        """Samples that are not finite by themselves."""
        return [sample for sample in self.samples if not sample.is_finite]


def replay(folder: Path, changes: Sequence[str] = ()) -> Replay:
    """Do the step that ``RUN/failure`` describes once more; nothing is written.

    One process trains from the newest checkpoint before the step (or from the start) with the same samples, crops and
    drop-path, looks at each sample of the step alone, and then takes the step.

    Args:
        folder: ``RUN/failure``.
        changes: Settings to change for the replay as ``key=value`` words, e.g. ``["speed.precision=fp32"]``.

    Raises:
        CheckpointError: If the record or the checkpoints are damaged.
        DataError: If the step's samples are not what they were.
        ConfigError: If the run's settings are gone, or its batch cannot be laid out on one process.
    """
    failure = read_failure(folder)
    run = _rebuild(folder.resolve().parent, failure, changes)
    trainer = _before(run, failure, CheckpointFolder(folder.resolve().parent / "checkpoints"))
    batches = list(run.batches(trainer.model.student.backbone.depth, failure.step - 1, failure.step))
    _expect_same(failure, [name for batch in batches for name in batch.names])
    temperature = trainer.schedules.at(failure.step - 1).teacher_temp
    samples = [finding for batch in batches for finding in examine(trainer, batch, temperature)]
    return Replay(failure.step, not _is_finite(trainer, failure.step), samples)


def _rebuild(path: Path, failure: Failure, changes: Sequence[str]) -> Run:
    """The run of the folder on one process, with the same global batch."""
    level = RunFolder(path).identity()["level"]
    schema: type[PatchConfig | RegionConfig] = PatchConfig if level == "patch" else RegionConfig
    config = load_config(schema, file=path / "config.yaml")
    shares = len(failure.facts["processes"]) * config.training.gradient_accumulation
    alone = [f"training.gradient_accumulation={shares}", "speed.num_workers=0", *changes]
    config = load_config(schema, file=path / "config.yaml", overrides=alone)
    run = Run(config, build_level(config), distributed.choose_device(config.speed.device))
    if run.layout.global_batch != len(failure.draws):
        raise ConfigError(
            f"expected a global batch of {len(failure.draws)} as in the failed step, found {run.layout.global_batch}; "
            "set training.batch_size_per_gpu and training.gradient_accumulation so"
        )
    return run


def _before(run: Run, failure: Failure, checkpoints: CheckpointFolder) -> Trainer:
    """The trainer as it stood when the failed step began."""
    trainer = run.trainer()
    saved = checkpoints.load()
    if saved is not None and saved["step"] < failure.step:
        restore(trainer, saved)
    progress.say(f"replaying {failure.step - 1 - trainer.step} steps before step {failure.step}")
    _fit_until(trainer, failure.step - 1)
    return trainer


def _fit_until(trainer: Trainer, step: int) -> None:
    trainer.length = dataclasses.replace(trainer.length, total=step)
    trainer.fit()


def _is_finite(trainer: Trainer, step: int) -> bool:
    try:
        _fit_until(trainer, step)
    except NonFiniteStep:
        return False
    return True


def _expect_same(failure: Failure, names: list[str]) -> None:
    changed = [(old, new) for old, new in zip(failure.names, names, strict=True) if old != new]
    if changed:
        raise DataError(
            f"expected the samples of step {failure.step} as they were, found {changed[0][1]} in the place of "
            f"{changed[0][0]} ({len(changed)} differ); restore the data"
        )
