"""``pretrain``: one run of self-distillation, of either level."""

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from dino import distributed, progress
from dino.api.judges import build_judge, final_verdict
from dino.api.levels import build_level
from dino.api.memory import memory_explained
from dino.api.profiling import data_advice, profile
from dino.api.run import Run, restore
from dino.config.load import to_dict, to_yaml
from dino.config.schema import PatchConfig, RegionConfig
from dino.errors import ConfigError, DinoError, ProcessesLost, Stopped
from dino.files import oserror_to_data_error
from dino.models.export import export_backbone
from dino.models.weights import load_backbone_file
from dino.report.terminal import run_panel
from dino.train.callbacks import Checkpoints, MetricsLog, SaveClock
from dino.train.checkpoint import BEST, LAST, START, CheckpointFolder
from dino.train.collapse import CollapseWatch
from dino.train.failure import record_failure
from dino.train.judge import Judge
from dino.train.loop import Callback, NonFiniteStep, NoState, StepReport, Trainer
from dino.train.profiling import DATA, StarvationWatch, Stopwatch, clock_of
from dino.train.run_folder import RunFolder
from dino.train.trackers import build_trackers

DRY_STEPS = 3  # the first warms up, the others are timed


@dataclasses.dataclass(frozen=True)
class RunSummary:
    """What a run came to.

    Attributes:
        output_dir: The run folder.
        state: ``finished``, ``early_stopped``, ``dry_run`` or ``profile``.
        steps: Steps done (dry run: steps that would be done).
        numbers: Last metrics and verdict, or what the dry run or the profile found.
    """

    output_dir: Path
    state: str
    steps: int
    numbers: dict[str, Any]


def pretrain(config: PatchConfig | RegionConfig) -> RunSummary:
    """Train one level, or go on with a run that was interrupted.

    Args:
        config: Settings of the level: :class:`PatchConfig` (level 1) or :class:`RegionConfig` (level 2).

    Returns:
        The run's summary. A run that is over already is reported as such and left alone.

    Raises:
        ConfigError: If settings contradict each other, or the folder belongs to another run or is in use.
        DataError: If the data cannot be trained on.
        Stopped: If a signal asked for it; the state is saved.
        TrainingFault: If the loss broke down.
        OutOfMemory: If the GPU's memory does not suffice.
        ProcessesLost: If another process of the job ended or fell silent.
    """
    rehearsal = config.dry_run or config.profile
    if config.speed.timeout_minutes <= 0:
        raise ConfigError(f"expected speed.timeout_minutes above 0, found {config.speed.timeout_minutes}")
    if not config.output_dir and not rehearsal:
        raise ConfigError("expected a run folder, found none; name RUN (output_dir=…)")
    device = distributed.choose_device(config.speed.device)
    with distributed.process_group(device, config.speed.timeout_minutes), memory_explained(config):
        if rehearsal:
            return _rehearse(Run(config, build_level(config), device))
        folder = RunFolder(Path(config.output_dir))
        if folder.was_ended_by_this_launch():
            return _report_end(folder)
        run = Run(config, build_level(config), device)
        folder.check(run.identity())
        if folder.is_over():
            progress.say(f"{folder.path}: this run is {folder.status()['state']}; nothing to do")
            progress.show(run_panel(folder, config))
            return _report_end(folder)
        trainer = run.trainer()  # before the folder is claimed: what cannot be built leaves nothing behind
        with oserror_to_data_error(folder.path), folder.lock.held(), _losses(folder):
            folder.check(run.identity())  # once more: another run may have come and gone since
            folder.claim(run.identity(), to_yaml(config))
            return _train(run, trainer, folder)


@contextmanager
def _losses(folder: RunFolder) -> Iterator[None]:
    """Turn the loss of other processes into one line that says where a restart goes on, here and in ``status.json``."""
    try:
        yield
    except RuntimeError as error:
        if not distributed.process_lost(error):
            raise
        message = f"{distributed.process_lost_message(error)}: it goes on after step {folder.safe_step()}"
        folder.update_status(state="crashed", error=message)
        raise ProcessesLost(message) from error


def _report_end(folder: RunFolder) -> RunSummary:
    status = folder.status()
    if status["state"] == "stopped":
        raise Stopped(f"{folder.path} was stopped after step {status.get('step')}; run the command again to go on")
    if status["state"] == "failed":
        raise DinoError(f"{folder.path} failed: {status.get('error')}")
    return RunSummary(folder.path, status["state"], status.get("step", 0), status)


def _train(run: Run, trainer: Trainer, folder: RunFolder) -> RunSummary:
    config, log = run.config, run.config.logging
    files = CheckpointFolder(folder.checkpoints)
    checkpoints = Checkpoints(files, run.content, folder, log.save_every_steps, log.keep_every_steps)
    judge = build_judge(run, folder, checkpoints)
    saved = files.load()
    if saved is None and distributed.is_main():
        files.save({**run.description(trainer), "teacher": trainer.model.teacher.published_state()}, START)
    trackers = build_trackers(
        folder.path, to_dict(config), tensorboard=log.tensorboard, wandb=log.wandb, mlflow=log.mlflow
    )
    with ExitStack() as stack:
        done = saved["step"] if saved else 0
        bar = stack.enter_context(progress.bar(f"pretrain {run.level.name}", run.length.total, done))
        stopwatch = Stopwatch(clock_of(run.device), {DATA})
        trainer.span = stopwatch.span
        metrics = MetricsLog(
            folder, log.every_steps, config.model.out_dim, bar, trackers, _watches(run), stopwatch.take
        )
        callbacks: list[Callback] = [metrics, checkpoints] if judge is None else [metrics, judge, checkpoints]
        trainer.callbacks, trainer.save_clock = callbacks, SaveClock(log.save_every_minutes)
        if saved is not None:
            restore(trainer, saved)
        _fit(run, trainer, folder)
    return _finish(run, trainer, folder, judge)


def _watches(run: Run) -> Callable[[Mapping[str, float]], list[str]]:
    """What looks at every line of the log for something to warn of."""
    watches = [CollapseWatch(run.settled_after(), run.layout.global_batch), StarvationWatch(partial(data_advice, run))]
    return lambda line: [sign for watch in watches for sign in watch(line)]


def _fit(run: Run, trainer: Trainer, folder: RunFolder) -> None:
    """Train, and leave the truth in ``status.json`` whatever happens."""
    folder.update_status(state="running", step=trainer.step, total_steps=trainer.length.total, error=None)
    try:
        with memory_explained(run.config):
            trainer.fit()
    except Stopped as error:
        folder.update_status(state="stopped", step=trainer.step, error=str(error))
        raise
    except NonFiniteStep as error:
        with folder.tolerate_write_errors(folder.failure.name):
            record_failure(folder.failure, error.report, folder.last_metrics())
            progress.say(f"the step is described in {folder.failure}; `dino replay {folder.failure}` does it again")
        folder.update_status(state="failed", step=error.report.step, error=str(error))
        raise
    except DinoError as error:
        folder.update_status(state="failed", step=trainer.step, error=str(error))
        raise
    except (RuntimeError, OSError) as error:
        # No final state: a process that lost its peers is started again by torchrun, and then has to go on.
        folder.update_status(state="crashed", step=trainer.step, error=str(error))
        raise
    finally:
        folder.write_quarantine(trainer.quarantine)


def _finish(run: Run, trainer: Trainer, folder: RunFolder, judge: Judge | None) -> RunSummary:
    """Judge the run, export its backbone, and say what it came to."""
    state = "early_stopped" if trainer.stop_early else "finished"
    judgement = final_verdict(run, trainer, folder, judge)
    if distributed.is_main():
        # The checkpoint that RUN means to every command; a best one that the disk has damaged ends no run.
        best_is_whole = CheckpointFolder(folder.checkpoints).step_of(BEST) is not None
        loaded = load_backbone_file(folder.checkpoints / (BEST if best_is_whole else LAST))
        export_backbone(loaded, folder.path / "backbone", run.level.export_size_px)
    folder.update_status(state=state, step=trainer.step, eta_seconds=0, bad_files=len(trainer.quarantine), **judgement)
    progress.show(run_panel(folder, run.config))
    distributed.barrier()
    return RunSummary(folder.path, state, trainer.step, folder.status())


class _StepTimer(NoState):
    """Callback of the dry run: notes when each step ended."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def after_step(self, trainer: Trainer, report: StepReport) -> None:
        """Note the time once the device is done."""
        report.loss.item()
        self.times.append(time.monotonic())


def _rehearse(run: Run) -> RunSummary:
    """Train some steps without a run folder: to see what the run would take, or where a step's time goes."""
    if not run.config.profile:
        return _dry_run(run)
    if run.config.profile_steps < 1:
        raise ConfigError(f"expected profile_steps of at least 1, found {run.config.profile_steps}")
    numbers = profile(run, run.config.profile_steps)
    return RunSummary(Path(run.config.output_dir), "profile", numbers["steps"], numbers)


def _dry_run(run: Run) -> RunSummary:
    """Train a few steps without writing anything, and say what the whole run would take."""
    total = run.length.total
    run.length = dataclasses.replace(run.length, total=min(DRY_STEPS, total))
    trainer, timer = run.trainer(), _StepTimer()
    trainer.callbacks = [timer]
    trainer.fit()
    seconds = (timer.times[-1] - timer.times[0]) / max(1, len(timer.times) - 1) if len(timer.times) > 1 else 0.0
    parameters = sum(p.numel() for p in trainer.model.student.parameters())
    numbers = {
        "level": run.level.name,
        "samples": len(run.level.dataset),
        "slides": len(run.level.slides["slide_ids"]),
        "steps": total,
        "global_batch": run.layout.global_batch,
        "effective_lr": run.peak_lr,
        "student_parameters": parameters,
        "checkpoint_gb": round(parameters * 4 * 4 / 1e9, 3),  # student, teacher and two Adam moments in fp32
        "hours": round(total * seconds / 3600, 3),
        "device": str(run.device),
    }
    for name, value in numbers.items():
        progress.say(f"{name:>20}  {value}")
    return RunSummary(Path(run.config.output_dir), "dry_run", total, numbers)
