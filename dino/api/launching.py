"""``launch``: submit work to SLURM through submitit; the job is requeued until the work is done."""

import dataclasses
import os
import re
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dino import progress
from dino.config.schema import SlurmConfig
from dino.environment import import_extra
from dino.errors import ConfigError, DinoError, Stopped

CLUSTERS = ("slurm", "local")


@dataclasses.dataclass(frozen=True)
class Submission:
    """A submitted job.

    Attributes:
        job: The scheduler's job id; empty after a dry run.
        folder: Folder of its output.
        parameters: The parameters of submitit's executor.
    """

    job: str
    folder: Path
    parameters: Mapping[str, Any]


def launch_slurm(
    work: Callable[[], object], settings: SlurmConfig, folder: str | Path, *, dry_run: bool = False
) -> Submission:
    """Submit ``work`` to SLURM: one task per GPU, requeued after its time limit or a preemption.

    Args:
        work: Picklable function that each process calls, such as ``functools.partial(api.pretrain, config)``. It must
            be resumable, as pretraining and extraction are.
        settings: The settings of the job.
        folder: Folder on a shared disk for the output of the job and the files of submitit.
        dry_run: Submit nothing.

    Raises:
        ConfigError: If submitit is not installed, or SLURM is not available or rejects the job.
    """
    _check(settings)
    submitit = _submitit()
    parameters, folder = _parameters(settings), Path(folder)
    if dry_run:
        return Submission("", folder, parameters)
    try:
        executor = submitit.AutoExecutor(
            folder,
            cluster=settings.cluster,
            slurm_max_num_timeout=settings.max_restarts,
            local_max_num_timeout=settings.max_restarts,
        )
        executor.update_parameters(**parameters)
        job = executor.submit(Task(work))
    except (RuntimeError, OSError, submitit.core.utils.FailedSubmissionError) as error:
        raise ConfigError(
            f"expected {settings.cluster} to accept the job, found: {' '.join(str(error).split())}; submit from a node "
            "where sbatch works, or try slurm.cluster=local"
        ) from error
    return Submission(str(job.job_id), folder, parameters)


def _check(settings: SlurmConfig) -> None:
    if settings.cluster not in CLUSTERS:
        raise ConfigError(f"expected slurm.cluster {' or '.join(CLUSTERS)}, found '{settings.cluster}'")
    minimums = {"nodes": 1, "gpus_per_node": 0, "cpus_per_gpu": 1, "max_restarts": 0, "warn_seconds": 1}
    for name, minimum in minimums.items():
        if getattr(settings, name) < minimum:
            raise ConfigError(f"expected slurm.{name} of at least {minimum}, found {getattr(settings, name)}")
    if settings.timeout_hours * 3600 <= settings.warn_seconds:
        raise ConfigError(
            f"expected slurm.timeout_hours to be longer than slurm.warn_seconds, found {settings.timeout_hours} h and "
            f"{settings.warn_seconds} s"
        )


def _submitit() -> Any:
    return import_extra("submitit", "`dino launch slurm`", "slurm")


def _parameters(settings: SlurmConfig) -> dict[str, Any]:
    """The parameters of submitit's executor."""
    tasks = max(1, settings.gpus_per_node)  # without GPUs, one process per node
    return {
        "name": settings.name,
        "nodes": settings.nodes,
        "tasks_per_node": tasks,
        "gpus_per_node": settings.gpus_per_node or None,
        "cpus_per_task": settings.cpus_per_gpu,
        "mem_gb": settings.mem_gb,
        "timeout_min": max(1, round(settings.timeout_hours * 60)),
        "slurm_partition": settings.partition,
        "slurm_account": settings.account,
        "slurm_qos": settings.qos,
        "slurm_constraint": settings.constraint,
        "slurm_srun_args": [
            f"--cpus-per-task={settings.cpus_per_gpu}"
        ],  # since SLURM 22.05 srun does not inherit it from sbatch
        "slurm_signal_delay_s": settings.warn_seconds,
        "slurm_setup": list(settings.setup) or None,
        "slurm_additional_parameters": {"requeue": True},
    }


class Task:
    """One process of a job: joins the process group, calls ``work``, and requests a requeue if it was stopped.

    Args:
        work: Function that each process calls.
    """

    def __init__(self, work: Callable[[], object]) -> None:
        self.work = work

    def __call__(self) -> None:
        """Call ``work``; on an error, exit with the exit code of the error, as the command line does."""
        os.environ.update(distributed_environment(_submitit().JobEnvironment()))
        try:
            self.work()
        except Stopped as stop:
            progress.say(str(stop))
            if stop.signal == signal.SIGUSR2:
                # submitit's own handler of this signal: the first task requeues the job.
                signal.raise_signal(stop.signal)
            raise SystemExit(stop.exit_code) from None
        except DinoError as error:
            sys.stderr.write(f"error in process {os.environ['RANK']}: {' '.join(str(error).split())}\n")
            raise SystemExit(error.exit_code) from None

    def checkpoint(self) -> Any:
        """The task that submitit requeues: the same one, because all progress is in the run folder."""
        return _submitit().helpers.DelayedSubmission(self)


def distributed_environment(environment: Any) -> dict[str, str]:
    """The environment variables that ``torchrun`` would set for this process.

    Args:
        environment: submitit's description of the task.
    """
    job = int(re.sub(r"\D", "", environment.job_id))
    return {
        "RANK": str(environment.global_rank),
        "LOCAL_RANK": str(environment.local_rank),
        "WORLD_SIZE": str(environment.num_tasks),
        "MASTER_ADDR": environment.hostnames[0],
        "MASTER_PORT": str(20000 + job % 10000),
    }
