"""``pretrain``: one run of self-distillation, of either level."""

import dataclasses
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from dino import distributed, progress
from dino.api.ending import show_summary, write_report
from dino.api.judging import build_evaluator, final_verdict, verdict_rounds
from dino.api.rehearsal import dry_run, profile
from dino.api.run import Run
from dino.config.schema import ExtendConfig, PatchConfig, PretrainConfig, RegionConfig
from dino.errors import ConfigError, DinoError, OutOfMemory, ProcessesLost, Stopped
from dino.precision import check_precision, computed_in
from dino.train.failure import record_failure
from dino.train.loop import NonFiniteStep, Trainer
from dino.train.run_folder import RunFolder, RunReader


@dataclasses.dataclass(frozen=True)
class RunSummary:
    """Results of a run.

    Attributes:
        output_dir: The run folder.
        state: ``finished``, ``early_stopped``, ``dry_run`` or ``profile``.
        steps: Steps done (dry run: steps that the run would take).
        numbers: Last metrics and verdict, or the numbers of the dry run or the profile.
    """

    output_dir: Path
    state: str
    steps: int
    numbers: dict[str, Any]


def pretrain(config: PatchConfig | RegionConfig, extend: ExtendConfig | None = None) -> RunSummary:
    """Train one level, or resume a run that was interrupted.

    Args:
        config: Settings of the level: :class:`PatchConfig` (level 1) or :class:`RegionConfig` (level 2).
        extend: Train a finished run further, in a segment with a schedule of its own; the same settings extend it once.

    Returns:
        The run's summary. A run that is complete is reported as such and not changed.

    Raises:
        ConfigError: If settings contradict each other, or the folder belongs to another run or is in use; if a run is
            to be extended that is not finished.
        DataError: If the data cannot be trained on.
        Stopped: If a signal asked for it; the state is saved.
        TrainingFault: If a loss or gradient was not finite.
        OutOfMemory: If the GPU's memory does not suffice.
        ProcessesLost: If another process of the job ended or does not answer.
    """
    rehearsal = config.dry_run or config.profile
    if config.speed.timeout_minutes <= 0:
        raise ConfigError(f"expected speed.timeout_minutes above 0, found {config.speed.timeout_minutes}")
    if not config.output_dir and not rehearsal:
        raise ConfigError("expected a run folder, found none; name RUN (output_dir=…)")
    device = distributed.choose_device(config.speed.device)
    check_precision(config.speed.precision, device)
    with distributed.process_group(device, config.speed.timeout_minutes), _memory_advised(config):
        if rehearsal and extend is None:
            return _rehearse(Run(config, device))
        folder = RunFolder(Path(config.output_dir))
        if folder.was_ended_by_this_launch():
            return _report_end(folder)
        run = Run(config, device, folder.segments())
        run.check(folder)
        if extend is not None:
            run.extend(folder, extend)
            progress.say(f"{folder.path} is extended: {run.segments[-1]}")
            if rehearsal:
                return RunSummary(folder.path, "dry_run", run.total, {"segment": run.segments[-1].to_dict()})
        if folder.is_over() and run.segments == folder.segments():
            done = f"{folder.path}: this run is {folder.status()['state']}; nothing to do"
            progress.say(f"{done} (`dino resume {shlex.quote(str(folder.path))} {run.further()}` extends it)")
            show_summary(folder, config)
            return _report_end(folder)
        _announce(run, folder.warn)
        trainer = run.trainer()  # before the folder is claimed, so that a failure here leaves no files
        with folder.held():
            run.claim(folder)  # checks once more: another run may have started and ended since
            with _end_recorded(run, trainer, folder):
                checkpoints = run.checkpoints(folder)
                evaluator = build_evaluator(run, checkpoints)
                metrics = run.connect(trainer, folder, checkpoints, evaluator)
                filtered = run.level.filtered
                data = {**run.level.split.to_dict(), **({"filter": filtered} if filtered else {})}
                counts = {"step": trainer.step, "total_steps": run.total, "processes": distributed.world_size()}
                precision = computed_in(config.speed.precision, device)
                folder.update_status(state="running", error=None, data=data, computed_in=precision, **counts)
                with progress.bar(f"pretrain {run.level.name}", run.total, trainer.step) as metrics.bar:
                    trainer.fit()
                rounds, samples = verdict_rounds(run)
                views = f"{2 * rounds} views of {samples} samples"
                progress.say(f"evaluating: features of {views}, now and at the start …")
                evaluation = final_verdict(run, trainer, folder.initial_checkpoint(), folder.last_metrics(), evaluator)
                summary = _finish(run, trainer, folder, evaluation)
        is_main = distributed.is_main()
    if config.logging.report and is_main:  # after the other processes have ended: none waits for it
        write_report(folder.path, config)
    return summary


def resume(
    run: str | Path, changes: Sequence[str] | Mapping[str, Any] = (), extend: ExtendConfig | None = None
) -> RunSummary:
    """Resume a run with the settings in its folder, or extend it.

    Args:
        run: The run folder; it may have been moved.
        changes: Runtime settings to change, as ``key=value`` words or by dotted key.
        extend: As for :func:`pretrain`.

    Returns:
        As :func:`pretrain`.

    Raises:
        ConfigError: If there is no run, and as for :func:`pretrain`.
        DinoError: As for :func:`pretrain`.
    """
    config = RunReader(Path(run)).config(changes)
    return pretrain(dataclasses.replace(config, output_dir=str(run)), extend)


def _announce(run: Run, warn: Callable[[str], None]) -> None:
    """Say what is trained on and what is held out, warn of likely mistakes, and say which recipe suits it better."""
    progress.say(f"{run.config.data_dir}: training on {run.level.split}")
    for line in run.level.notes:
        progress.say(line)
    for warning in run.level.warnings:
        progress.warn(warning)
    for warning in run.warnings():
        warn(warning)
    if advice := run.level.recommended_recipe(run.config, run.level.samples):
        progress.say(advice)


def _rehearse(run: Run) -> RunSummary:
    """Train some steps without a run folder: to find out what the run would take, or where a step's time goes."""
    _announce(run, progress.warn)
    numbers = profile(run) if run.config.profile else dry_run(run)
    return RunSummary(
        Path(run.config.output_dir), "profile" if run.config.profile else "dry_run", numbers["steps"], numbers
    )


def _report_end(folder: RunFolder) -> RunSummary:
    status = folder.status()
    if status["state"] == "stopped":
        raise Stopped(
            f"{folder.path} was stopped after step {status.get('step')}; run the same command again to resume"
        )
    if status["state"] == "failed":
        raise DinoError(f"{folder.path} failed: {status.get('error')}")
    return RunSummary(folder.path, status["state"], status.get("step", 0), status)


@contextmanager
def _end_recorded(run: Run, trainer: Trainer, folder: RunFolder) -> Iterator[None]:
    """Record in ``status.json`` how the block ends where it does not complete the run."""

    def record(state: str, error: object) -> None:
        folder.update_status(state=state, step=trainer.step, error=str(error))

    try:
        yield
    except Stopped as error:
        record("stopped", error)
        raise
    except NonFiniteStep as error:
        with folder.tolerate_write_errors(folder.failure.name):
            record_failure(folder.failure, error.report, folder.last_metrics())
            command = f"dino replay {shlex.quote(str(folder.failure))}"
            progress.say(f"the step is described in {folder.failure}; `{command}` repeats it")
        folder.update_status(state="failed", step=error.report.step, error=str(error))
        raise
    except torch.OutOfMemoryError as error:
        record("failed", _out_of_memory(error, run.config))
        raise
    except DinoError as error:
        record("failed", error)
        raise
    except (RuntimeError, OSError) as error:
        # "crashed" is no final state: torchrun restarts a process that lost others, and then it has to go on.
        if not distributed.process_lost(error):
            record("crashed", error)
            raise
        message = f"{distributed.process_lost_message(error)}: it goes on after step {folder.safe_step()}"
        record("crashed", message)
        raise ProcessesLost(message) from error
    except KeyboardInterrupt:
        record("crashed", f"interrupted; run the same command again to resume after step {folder.safe_step()}")
        raise
    finally:
        folder.write_quarantine(trainer.quarantine)


def _finish(run: Run, trainer: Trainer, folder: RunFolder, evaluation: Mapping[str, Any]) -> RunSummary:
    """Export the run's backbone, record its end with the evaluation, and show its results."""
    folder.write_quarantine(trainer.quarantine)
    state = "early_stopped" if trainer.stop_early else "finished"
    if distributed.is_main():
        run.export(folder)
    counts = {"step": trainer.step, "segments": len(run.segments), "bad_files": len(trainer.quarantine)}
    folder.update_status(state=state, eta_seconds=0, **counts, **evaluation)
    show_summary(folder, run.config)
    distributed.barrier()
    return RunSummary(folder.path, state, trainer.step, folder.status())


@contextmanager
def _memory_advised(config: PretrainConfig) -> Iterator[None]:
    """Turn a lack of GPU memory in the block into one line that names the settings to change.

    Raises:
        OutOfMemory: If the memory did not suffice.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise _out_of_memory(error, config) from error


def _out_of_memory(error: torch.OutOfMemoryError, config: PretrainConfig) -> OutOfMemory:
    reason = str(error).partition(". ")[0]
    return OutOfMemory(
        f"expected training.batch_size_per_gpu={config.training.batch_size_per_gpu} to fit into the memory of the "
        f"GPU, found that it does not ({reason}); {memory_advice(config)}"
    )


def memory_advice(config: PretrainConfig) -> str:
    """Settings that need less memory, as words to type; first those that do not change the run."""
    training, changes = config.training, []
    size = training.batch_size_per_gpu
    if size > 1:
        # Halves; an odd batch is divided by its smallest factor, so that the global batch stays the same.
        divisor = next(n for n in range(2, size + 1) if size % n == 0)
        changes.append(
            f"training.batch_size_per_gpu={size // divisor} "
            f"training.gradient_accumulation={training.gradient_accumulation * divisor} (the same global batch)"
        )
    if not config.speed.checkpointing:
        changes.append("speed.checkpointing=true (slower steps)")
    if not changes:
        return "only a smaller model needs less: model.arch, model.out_dim, or fewer aug.local_crops_number; a new run"
    return f"set {' or '.join(changes)}, and run the same command again: it goes on from its last checkpoint"
