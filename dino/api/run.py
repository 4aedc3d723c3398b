"""A pretraining run as its settings describe it: data, model, schedules, and the trainer with its callbacks."""

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from dino import distributed
from dino.api.levels import build_level
from dino.config.load import identity_of, to_dict, to_yaml
from dino.config.schema import ExtendConfig, PretrainConfig
from dino.data import DrawnBatches, DropPath, Layout, PermutationSampler, load_batches
from dino.errors import ConfigError
from dino.train import distill
from dino.train.callbacks import (
    Checkpoints,
    CollapseWatch,
    MetricsLog,
    SaveClock,
    StarvationWatch,
    build_trackers,
)
from dino.train.checkpoint import (
    START,
    CheckpointFolder,
    checkpoint_content,
    export_teacher,
    initial_content,
    restore,
)
from dino.train.loop import Callback, Trainer
from dino.train.optimizer import (
    CLIP_MODES,
    SEGMENTS,
    Cosine,
    Length,
    Schedules,
    Segment,
    SegmentedSchedules,
    build_optimizer,
    scaled_lr,
)
from dino.train.run_folder import RunFolder
from dino.train.shares import SharesLog


class Run:
    """What is built from the settings of a run.

    Args:
        config: Its settings.
        device: Where this process computes.
        segments: Those by which it was extended.

    Attributes:
        level: Its data, crops and backbone.
        layout: How the global batch is split over processes and micro-batches.
        length: Its steps, without further segments.
        peak_lr: Learning rate after the warm-up, for the global batch.
        origin: What the run's checkpoints record of the origin of its samples: that of its first start.
        inherited: The sets of labelled rows that chose the weights it starts from; set by
            :func:`~dino.api.evaluating.build_evaluator`.
        selection: Those, and the rows that choose its checkpoints; set there too.

    Raises:
        ConfigError: If settings contradict each other or the data.
        DataError: If the data cannot be trained on.
    """

    def __init__(self, config: PretrainConfig, device: torch.device, segments: Sequence[Segment] = ()) -> None:
        self.config, self.level, self.device = config, build_level(config), device
        self.origin, self.segments = self.level.origin, list(segments)
        training = config.training
        if training.batch_size_per_gpu < 1 or training.gradient_accumulation < 1:
            raise ConfigError("expected training.batch_size_per_gpu and training.gradient_accumulation of at least 1")
        if training.clip_mode not in CLIP_MODES:
            raise ConfigError(f"expected training.clip_mode {' or '.join(CLIP_MODES)}, found '{training.clip_mode}'")
        self.layout = Layout(
            training.batch_size_per_gpu, training.gradient_accumulation, distributed.world_size(), distributed.rank()
        )
        self.length = Length.of(self.level.samples, self.layout.global_batch, training.nepochs, training.max_steps)
        self.peak_lr = scaled_lr(config.optim, self.layout.global_batch)
        self.inherited: Sequence[Mapping[str, Any]] = ()
        self.selection: Sequence[Mapping[str, Any]] = ()

    @property
    def total(self) -> int:
        """Steps of the run, with all its segments."""
        return self.segments[-1].end if self.segments else self.length.total

    def identity(self) -> dict[str, Any]:
        """What the run computes: identity settings, the global batch, and the data."""
        dataset = self.level.dataset
        return {
            "level": self.level.name,
            **identity_of(self.config),
            "global_batch": self.layout.global_batch,
            "samples": len(dataset),
            "data": dataset.fingerprint,
            **({"groups": self.level.groups.fingerprint} if self.level.groups is not None else {}),
            **self.level.origin,
        }

    def check(self, folder: RunFolder) -> dict[str, Any]:
        """Check that the folder is new or this run's; nothing is written.

        Returns:
            The identity that the run was started with.

        Raises:
            ConfigError: If it holds another run.
            DataError: If it was started on feature grids of another level-1 model.
        """
        defaults = identity_of(self.level.schema())  # of settings that the version that wrote the run did not have
        return folder.check(self.identity(), defaults)

    def claim(self, folder: RunFolder) -> None:
        """Make the folder this run's.

        Raises:
            ConfigError: If it holds another run.
            DataError: If it was started on feature grids of another level-1 model.
        """
        started = self.check(folder)
        if folder.segments() not in (self.segments, self.segments[:-1]):
            raise ConfigError(f"expected {folder.path} as it was a moment ago, found that it was extended; try again")
        further = {SEGMENTS: [segment.to_dict() for segment in self.segments]} if self.segments else {}
        # Absolute, so that it can be resumed from any working directory.
        folders: dict[str, Any] = {"data_dir": str(Path(self.config.data_dir).absolute())}
        if further_folders := getattr(self.config, "more_data_dirs", None):
            folders["more_data_dirs"] = [str(Path(one).absolute()) for one in further_folders]
        folder.claim({**started, **further}, to_yaml(replace(self.config, **folders)))
        self.origin = folder.origin(started, self.level.origin)

    def extend(self, folder: RunFolder, extend: ExtendConfig) -> None:
        """Add the segment that is asked for, unless the run has it: the same settings add it once.

        Raises:
            ConfigError: If the run is not complete without it, is longer already, or has it with other settings.
        """
        path, command = folder.path, f"`dino resume {shlex.quote(str(folder.path))}`"
        over, last = folder.is_over(), self.segments[-1] if self.segments else None
        if last is None and not over:
            raise ConfigError(f"expected a finished run to extend, found {path} unfinished; first run {command}")
        first = self.segments[0].start if self.segments else folder.steps_done()
        make = partial(Segment.of, extend, self.config, self.length, first)
        found = make(last.start if last else first)
        if last is not None and found.end == last.end:
            if found != last:
                raise ConfigError(f"expected the extension that {path} has ({last}), found another one ({found})")
            return
        found = make(self.total if last else first)
        if found.end < found.start:
            raise ConfigError(
                f"expected an extension by more than the {found.start - first} steps that {path} already has, found "
                f"{found.end - first}; extensions are counted from the end of the first schedule, step {first}"
            )
        if not over:
            raise ConfigError(f"expected {path} to have finished ({last}), found that it has not; first run {command}")
        self.segments.append(found)

    def further(self) -> str:
        """The setting that extends the finished run by about ten epochs."""
        extended = self.length.epoch(self.total - self.segments[0].start) if self.segments else 0
        return f"training.nepochs=+{math.ceil(extended) + 10}"

    def warnings(self) -> list[str]:
        """What is likely to be a mistake in the settings."""
        epochs = self.length.epoch(self.length.total)
        longer = "training.nepochs" if self.config.training.max_steps is None else "training.max_steps"
        periods = {
            "training.warmup_epochs": (self.config.training.warmup_epochs, "the learning rate does not reach its peak"),
            "training.freeze_last_layer": (self.config.training.freeze_last_layer, "the last layer is never trained"),
            "training.freeze_backbone": (self.config.training.freeze_backbone, "the backbone is never trained"),
        }
        return [
            f"{key}={value:g} is not shorter than the run of {epochs:.3g} epochs ({self.length.total} steps): "
            f"{effect}; in a new run lower it, or raise {longer}"
            for key, (value, effect) in periods.items()
            if value > 0 and value >= epochs
        ]

    def warmup_steps(self) -> int:
        """Steps until every warm-up is over."""
        model, training = self.config.model, self.config.training
        return self.length.steps(
            max(
                training.warmup_epochs,
                training.freeze_last_layer,
                training.freeze_backbone,
                model.warmup_teacher_temp_epochs,
            )
        )

    def drawn_batches(self, depth: int, seed: int, batch_size: int) -> DrawnBatches:
        """Batches of this run's samples by draw number.

        Args:
            depth: Blocks of the backbone, each with its own drop-path multipliers; 0 for batches that are not trained
                on, which have neither these nor masks.
            seed: Seed of everything that is drawn.
            batch_size: Samples in a batch.
        """
        level, rate = self.level, self.config.model.drop_path_rate
        drop_path = DropPath(rate, depth, sum(level.crops.groups)) if depth and rate > 0 else None
        objective = self.config.objective
        masked = depth > 0 and distill.needs_masks(objective)
        masks = level.crops.masks(objective, level.spec.patch_size) if masked else None
        # Batches that are not trained on are of different samples, which those of a small group are not.
        sampler = level.sampler(seed) if depth else PermutationSampler(len(level.dataset), seed)
        return DrawnBatches(level.dataset, sampler, level.crops.draw, drop_path, batch_size, seed, masks)

    def batches(self, depth: int, first: int, last: int) -> DataLoader:
        """This process's micro-batches of steps ``first ... last - 1``."""
        speed = self.config.speed
        return load_batches(
            self.drawn_batches(depth, self.config.seed, self.layout.batch_size),
            self.layout,
            (first, last),
            workers=speed.num_workers,
            prefetch=speed.prefetch,
            pin=self.device.type == "cuda",
        )

    def trainer(self) -> Trainer:
        """The trainer before the first step, without callbacks."""
        training, optim, decay = self.config.training, self.config.optim, self.config.optim.lr_scheduler
        steps, total = self.length.steps, self.length.total
        model = distill.build(self.config, self.level.spec, self.length, self.device, self.level.teacher)
        return Trainer(
            model=model,
            optimizer=build_optimizer(optim, model.student),
            crops=self.level.crops,
            batches=partial(self.batches, model.student.backbone.depth),
            accumulation=self.layout.accumulation,
            schedules=SegmentedSchedules(
                Schedules(
                    Cosine(self.peak_lr, decay.min_lr, total, steps(training.warmup_epochs)),
                    Cosine(decay.weight_decay, decay.weight_decay_end, total),
                    Cosine(self.config.model.momentum_teacher, 1.0, total),
                    steps(training.freeze_last_layer),
                    steps(training.freeze_backbone),
                ),
                self.segments,
                decay.weight_decay_end,
            ),
            length=replace(self.length, total=self.total),
            device=self.device,
            precision=self.config.speed.precision,
            clip_grad=training.clip_grad,
            clip_mode=training.clip_mode,
            largest_quarantine=math.floor(training.max_bad_fraction * self.level.samples),
        )

    def checkpoints(self, folder: RunFolder) -> Checkpoints:
        """The callback that writes the run's checkpoints."""
        log = self.config.logging
        return Checkpoints(
            CheckpointFolder(folder.checkpoints),
            lambda trainer: checkpoint_content(trainer, self.description(self.selection)),
            folder,
            log.save_every_steps,
            log.keep_every_steps,
        )

    def connect(
        self, trainer: Trainer, folder: RunFolder, checkpoints: Checkpoints, evaluator: Callback | None
    ) -> MetricsLog:
        """Set the trainer's callbacks, and load the newest checkpoint or, in a new run, save the initial weights.

        Args:
            trainer: As :meth:`trainer` returned it.
            folder: The run folder.
            checkpoints: The callback that saves.
            evaluator: The callback that scores the run on labels, if any.

        Returns:
            The callback that writes the log.
        """
        log = self.config.logging
        signs = {text: shows for objective in trainer.model.objectives for text, shows in objective.warnings.items()}
        metrics = MetricsLog(
            folder,
            log.every_steps,
            build_trackers(folder.path, to_dict(self.config), log),
            [
                CollapseWatch(signs, self.warmup_steps(), self.layout.global_batch),
                StarvationWatch(self.config.speed.num_workers),
            ],
        )
        groups = self.level.groups
        shares = SharesLog(groups, folder, log.every_steps) if groups is not None else None
        trainer.callbacks = [one for one in (shares, metrics, evaluator, checkpoints) if one is not None]
        trainer.save_clock = SaveClock(log.save_every_minutes)
        saved = checkpoints.files.load()
        if saved is not None:
            restore(trainer, saved)
        elif distributed.is_main():
            checkpoints.files.save(initial_content(trainer, self.description(self.inherited)), START)
        return metrics

    def export(self, folder: RunFolder) -> None:
        """Write the teacher's backbone of the best checkpoint, or else the last, to ``RUN/backbone``."""
        export_teacher(CheckpointFolder(folder.checkpoints), folder.path / "backbone", self.level.export_size_px)

    def description(self, selection: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """What a checkpoint records of the run besides its state.

        Args:
            selection: The sets of labelled rows that chose it.
        """
        return {
            "transform": self.level.transform,
            "geometry": self.level.geometry,
            "config": to_dict(self.config),
            "training": {"training_slides": self.level.slides, "selection": list(selection), **self.origin},
        }
