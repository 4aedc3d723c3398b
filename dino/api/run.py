"""A run as its settings describe it: networks, schedules, batches and the trainer that drives them."""

import copy
import dataclasses
import math
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch

from dino import distributed, progress
from dino.api.levels import Level
from dino.config.load import identity_of, to_dict
from dino.config.schema import PretrainConfig
from dino.data.loader import Batch, DrawnBatches, DropPath, Layout, load_batches
from dino.environment import versions
from dino.errors import CheckpointError, ConfigError
from dino.models.backbone import build_backbone, compile_blocks, should_compile
from dino.models.head import DINOHead
from dino.models.weights import init_from
from dino.train.distill import DINO, Network, SelfDistillation
from dino.train.loop import DTYPES, Trainer
from dino.train.optimizer import CLIP_MODES, build_optimizer
from dino.train.schedules import Cosine, Length, Ramp, Schedules

FORMAT = "histodino/1"
REFERENCE_BATCH = 256  # optim.lr is given for this many images (Goyal et al. 2017, arXiv 1706.02677)


class Run:
    """Everything that is built from the settings of a run.

    Args:
        config: Its settings.
        level: Its data, crops and backbone.
        device: Where this process computes.

    Raises:
        ConfigError: If settings contradict each other or the data.
    """

    def __init__(self, config: PretrainConfig, level: Level, device: torch.device) -> None:
        self.config, self.level, self.device = config, level, device
        training = config.training
        if training.batch_size_per_gpu < 1 or training.gradient_accumulation < 1:
            raise ConfigError("expected training.batch_size_per_gpu and training.gradient_accumulation of at least 1")
        if config.speed.precision not in DTYPES:
            raise ConfigError(f"expected speed.precision bf16, fp32 or fp64, found '{config.speed.precision}'")
        distributed.check_precision(config.speed.precision, device)
        if training.clip_mode not in CLIP_MODES:
            raise ConfigError(f"expected training.clip_mode {' or '.join(CLIP_MODES)}, found '{training.clip_mode}'")
        if config.model.out_dim < 2:
            raise ConfigError(f"expected model.out_dim of at least 2, found {config.model.out_dim}")
        self.layout = Layout(
            training.batch_size_per_gpu, training.gradient_accumulation, distributed.world_size(), distributed.rank()
        )
        self.length = Length.of(len(level.dataset), self.layout.global_batch, training.nepochs, training.max_steps)
        self.peak_lr = config.optim.lr * self.layout.global_batch / REFERENCE_BATCH

    def identity(self) -> dict[str, Any]:
        """What the run computes: identity settings, the global batch, and the data."""
        dataset = self.level.dataset
        return {
            "level": self.level.name,
            **identity_of(self.config),
            "global_batch": self.layout.global_batch,
            "samples": len(dataset),
            "data": dataset.fingerprint,
        }

    def networks(self) -> SelfDistillation:
        """Student, teacher and objective with their start weights, on the device."""
        model, dtype = self.config.model, DTYPES[self.config.speed.precision]
        backbone = build_backbone(self.level.spec, self.config.seed)
        if model.init:
            init_from(backbone, model.init, model.init_arch)
        head = DINOHead(
            backbone.embed_dim,
            model.out_dim,
            model.hidden_dim,
            model.bottleneck_dim,
            model.use_bn_in_head,
            model.norm_last_layer,
            self.config.seed + 1,
        )
        student = Network(backbone, {DINO.head: head}).to(self.device, dtype)
        objective = DINO(model.out_dim, model.student_temp, model.center_momentum).to(self.device, dtype)
        student.backbone.checkpointing = self.config.speed.checkpointing
        if should_compile(self.config.speed.compile, self.device):
            compile_blocks(student.backbone, progress.warn)
            progress.say("compiling the blocks: the first step takes longer; speed.compile=false goes without")
        return SelfDistillation(student, copy.deepcopy(student), [objective], self.device)

    def schedules(self) -> Schedules:
        """Learning rate, weight decay, momentum and temperature over the run's steps."""
        config, steps, total = self.config, self.length.steps, self.length.total
        model, decay = config.model, config.optim.lr_scheduler
        return Schedules(
            Cosine(self.peak_lr, decay.min_lr, total, steps(config.training.warmup_epochs)),
            Cosine(decay.weight_decay, decay.weight_decay_end, total),
            Cosine(model.momentum_teacher, 1.0, total),
            Ramp(model.warmup_teacher_temp, model.teacher_temp, steps(model.warmup_teacher_temp_epochs)),
            steps(config.training.freeze_last_layer),
        )

    def settled_after(self) -> int:
        """Steps until every warm-up is over."""
        model, training = self.config.model, self.config.training
        return self.length.steps(
            max(training.warmup_epochs, training.freeze_last_layer, model.warmup_teacher_temp_epochs)
        )

    def drawn_batches(self, depth: int, seed: int) -> DrawnBatches:
        """This run's batches by draw number."""
        views, rate = sum(self.level.crops.groups), self.config.model.drop_path_rate
        drop_path = DropPath(rate, depth, views) if rate > 0 else None
        level, size = self.level, self.layout.batch_size
        return DrawnBatches(level.dataset, level.sampler(seed), level.crops.draw, drop_path, size, seed)

    def batches(self, depth: int, first: int, last: int) -> Iterable[Batch]:
        """This process's micro-batches of steps ``first ... last - 1``."""
        speed = self.config.speed
        return load_batches(
            self.drawn_batches(depth, self.config.seed),
            self.layout,
            (first, last),
            workers=speed.num_workers,
            prefetch=speed.prefetch,
            pin=self.device.type == "cuda",
        )

    def trainer(self) -> Trainer:
        """The loop's state before the first step, without callbacks."""
        training = self.config.training
        model = self.networks()
        return Trainer(
            model=model,
            optimizer=build_optimizer(self.config.optim.name, model.student),
            crops=self.level.crops,
            batches=partial(self.batches, model.student.backbone.depth),
            accumulation=self.layout.accumulation,
            schedules=self.schedules(),
            length=self.length,
            device=self.device,
            precision=self.config.speed.precision,
            clip_grad=training.clip_grad,
            clip_mode=training.clip_mode,
            largest_quarantine=math.floor(training.max_bad_fraction * len(self.level.dataset)),
        )

    def content(self, trainer: Trainer) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {
            **self.description(trainer),
            "teacher": trainer.model.teacher.published_state(),
            "student": trainer.model.student.published_state(),
            "objectives": [objective.state_dict() for objective in trainer.model.objectives],
            "optimizer": trainer.optimizer.state_dict(),
            "state": {
                "quarantine": dict(trainer.quarantine),
                "callbacks": {type(callback).__name__: callback.state_dict() for callback in trainer.callbacks},
            },
        }

    def description(self, trainer: Trainer) -> dict[str, Any]:
        """What a checkpoint says about itself besides its weights."""
        transform = self.level.transform
        return {
            "format": FORMAT,
            "level": self.level.name,
            "step": trainer.step,
            "total_steps": self.length.total,
            "spec": trainer.model.teacher.backbone.spec.to_dict(),
            "transform": dataclasses.asdict(transform) if transform else None,
            "geometry": self.level.geometry,
            "config": to_dict(self.config),
            "versions": versions(),
            "training_slides": self.level.slides,
        }


def restore(trainer: Trainer, saved: dict[str, Any]) -> None:
    """Take up a checkpoint: the draw number is an offset, so nothing random has to be restored.

    Args:
        trainer: Freshly built, its callbacks set.
        saved: What :meth:`Run.content` gave.

    Raises:
        CheckpointError: If it is no checkpoint of this version.
    """
    if saved.get("format") != FORMAT or "optimizer" not in saved:
        raise CheckpointError(f"expected a checkpoint of this version to resume from, found {saved.get('format')!r}")
    trainer.model.teacher.load_published(saved["teacher"])
    trainer.model.student.load_published(saved["student"])
    for objective, state in zip(trainer.model.objectives, saved["objectives"], strict=True):
        objective.load_state_dict(state)
    trainer.optimizer.load_state_dict(saved["optimizer"])
    trainer.step = saved["step"]
    trainer.quarantine.update(saved["state"]["quarantine"])
    for callback in trainer.callbacks:
        callback.load_state_dict(saved["state"]["callbacks"].get(type(callback).__name__, {}))
    progress.say(f"resuming after step {trainer.step} of {trainer.length.total}")
