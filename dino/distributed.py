"""The only module that uses ``torch.distributed``; on one process every function is a no-op.

Launched by ``torchrun``, :func:`process_group` joins the process group (NCCL on GPUs, gloo on CPUs). The rest of
the package never branches on its rank: rank 0 decides, then broadcasts.
"""

import os
import re
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dino.errors import ConfigError, DinoError, ProcessesLost

T = TypeVar("T")
PARENT = os.getppid()  # the launcher, unless it has ended already
POLL_SECONDS = 0.02  # between two checks of rank 0 for processes that have joined
COLLECTIVE = re.compile("gloo|nccl|process ?group", re.IGNORECASE)  # matches the error messages of collectives


def launched() -> bool:
    """True under ``torchrun`` (also with a single process)."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def launch_id() -> str | None:
    """Identifier of the job that this process belongs to: torchrun's run id, or its SLURM step."""
    job, step = os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_STEP_ID")
    return os.environ.get("TORCHELASTIC_RUN_ID") or (f"slurm-{job}.{step}" if job and step else None)


def restarted() -> bool:
    """True on every process if ``torchrun`` itself restarted all of them; False if a user started any of them."""
    return all(gather(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0))


def is_orphan() -> bool:
    """True once the ``torchrun`` that started this process has ended, so that nothing would stop or restart it."""
    return "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != PARENT


def rank() -> int:
    """Rank of this process, 0 if there is only one."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", 1))


def is_main() -> bool:
    """True on the process that prints and writes the logs."""
    return rank() == 0


def local_rank() -> int:
    """Rank of this process on its machine, the index of its GPU."""
    return int(os.environ.get("LOCAL_RANK", 0))


def local_world_size() -> int:
    """Number of processes of the job on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


@contextmanager
def process_group(device: torch.device, timeout_minutes: float = 30.0) -> Iterator[None]:
    """Join the process group during the block, if launched by ``torchrun``.

    Args:
        device: Device of this process; decides between NCCL and gloo.
        timeout_minutes: How long a collective waits for the other processes.

    Raises:
        ProcessesLost: If another process ended or did not join in time.
    """
    if not launched() or dist.is_initialized():
        yield
        return
    try:
        _join(device, timedelta(minutes=timeout_minutes))
        yield
    except RuntimeError as error:
        if process_lost(error):
            raise ProcessesLost(process_lost_message(error)) from error
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _join(device: torch.device, timeout: timedelta) -> None:
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)
    store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        store=dist.PrefixStore(_start_name(store, rank, world_size, timeout), store),
        rank=rank,
        world_size=world_size,
        timeout=timeout,
        device_id=device if on_gpu else None,
    )


def _start_name(store: dist.Store, rank: int, world_size: int, timeout: timedelta) -> str:
    """A key prefix of the store: the same on all processes of this start, and different from earlier starts.

    torchrun keeps one store for all restarts of a job, which still contains the addresses of ended processes, and each
    host counts restarts separately (pytorch/pytorch#135712). Therefore rank 0 generates a name and replies to every
    request for it, under a random key from the request, until all processes have confirmed the name.
    """
    own = uuid.uuid4().hex
    if rank > 0:
        store.set(f"request/{rank}", own)
        name = store.get(f"reply/{own}").decode()
        store.set(f"{name}/confirmed/{rank}", own)
        return name
    missing, until = set(range(1, world_size)), time.monotonic() + timeout.total_seconds()
    while missing:
        for other in missing:
            if store.check([f"request/{other}"]):  # perhaps from an earlier start: then no process reads the reply
                store.set(f"reply/{store.get(f'request/{other}').decode()}", own)
        time.sleep(POLL_SECONDS)
        missing = {other for other in missing if not store.check([f"{own}/confirmed/{other}"])}
        if missing and time.monotonic() > until:
            raise ProcessesLost(
                f"expected {world_size} processes, found that {len(missing)} of them did not join within "
                f"{timeout.total_seconds() / 60:g} minutes; check their output, then start all of them again"
            )
    return own


def process_lost(error: BaseException) -> bool:
    """Whether an error is that of a failed collective, as when another process has ended or does not respond."""
    return launched() and (isinstance(error, dist.DistError) or COLLECTIVE.search(str(error)) is not None)


def process_lost_message(error: BaseException) -> str:
    """One-line message for the error of a failed collective."""
    reason = str(error).partition("\n")[0].rpartition("] ")[2].partition(". ")[0] or type(error).__name__
    return (
        f"expected {world_size()} running processes, found that one has ended or does not respond ({reason}); "
        "check the output of the other processes and the network, then run the same command again"
    )


def mean_over_ranks(tensor: Tensor) -> Tensor:
    """Average of ``tensor`` over all processes, in the dtype of ``tensor``; the tensor itself on one process."""
    return tensor if world_size() == 1 else sum_over_ranks(tensor) / world_size()


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Sum of ``tensor`` over all processes, in the dtype of ``tensor``; the tensor itself on one process."""
    return tensor if world_size() == 1 else _reduced(tensor, dist.ReduceOp.SUM)


def max_over_ranks(tensor: Tensor) -> Tensor:
    """Largest value of ``tensor`` on all processes, a scalar."""
    return tensor.amax() if world_size() == 1 else _reduced(tensor.amax(), dist.ReduceOp.MAX)


def _reduced(tensor: Tensor, operation: Any) -> Tensor:
    result = tensor.clone()
    dist.all_reduce(result, operation)
    return result


def agree(flags: Tensor) -> Tensor:
    """Maximum of each flag over all processes: a flag that is set on one process becomes set on all.

    Args:
        flags: ``(n,)`` float tensor on the training device.

    Returns:
        ``(n,)`` tensor with the same values on every process.
    """
    if world_size() > 1:
        flags = flags.clone()
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    return flags


def broadcast(value: T) -> T:
    """Rank 0's ``value`` on every process (any picklable object)."""
    if world_size() == 1:
        return value
    values: list[Any] = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def run_on_main(function: Callable[[], T]) -> T:
    """Call ``function`` on the main process; its result, or its :class:`DinoError`, on every process."""
    outcome: Any = None
    if is_main():
        try:
            outcome = function()
        except DinoError as error:
            outcome = error
    outcome = broadcast(outcome)
    if isinstance(outcome, DinoError):
        raise outcome
    return outcome


def gather(value: T) -> list[T]:
    """The ``value`` of each process, ordered by rank, on every process."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def barrier() -> None:
    """Wait until every process has reached this point."""
    if world_size() > 1:
        dist.barrier()


def assign(sizes: Sequence[int], processes: int) -> list[list[int]]:
    """Distribute items over processes: the largest first, each to the process with the least work so far.

    Args:
        sizes: Size of each item.
        processes: Number of processes.

    Returns:
        Ascending indices of each process's items; the same on every process.
    """
    loads: list[int] = [0] * processes
    assigned: list[list[int]] = [[] for _ in range(processes)]
    for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        least = loads.index(min(loads))
        loads[least] += sizes[index]
        assigned[least].append(index)
    return [sorted(indices) for indices in assigned]


def parallelize(student: nn.Module, device: torch.device) -> nn.Module:
    """Wrap the student so that its gradients are averaged over all processes.

    Args:
        student: Module whose forward pass computes the loss.
        device: Its device.

    Returns:
        The module itself on one process, else its ``DistributedDataParallel`` wrapper.

    Raises:
        ConfigError: If it has batch normalisation, which torch cannot synchronise on CPUs.
    """
    if world_size() == 1:
        return student
    if any(isinstance(module, nn.BatchNorm1d) for module in student.modules()):
        if device.type != "cuda":
            raise ConfigError("batch normalisation over several processes needs GPUs; set model.use_bn_in_head=false")
        student = nn.SyncBatchNorm.convert_sync_batchnorm(student)
    return DistributedDataParallel(student, device_ids=[device.index] if device.type == "cuda" else None)


def without_gradient_sync(student: nn.Module, skip: bool) -> AbstractContextManager[None]:
    """Context in which backward does not average gradients if ``skip`` is set (for all micro-batches but the last)."""
    if skip and isinstance(student, DistributedDataParallel):
        return student.no_sync()
    return nullcontext()


def choose_device(name: str) -> torch.device:
    """The device with the given name.

    Args:
        name: ``auto`` (this process's GPU where there is one, else the CPU), ``cpu``, ``cuda`` or ``cuda:N``.

    Raises:
        ConfigError: If the name is unknown or there is no such device.
    """
    available = torch.cuda.is_available()
    if name == "auto":
        name = "cuda" if available else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"expected device auto, cpu, cuda or cuda:N, found '{name}'")
    if device.type == "cpu":
        return device
    index = local_rank() if device.index is None else device.index
    if index >= torch.cuda.device_count():
        found = f"{torch.cuda.device_count()} GPUs" if available else "no usable GPU"
        raise ConfigError(
            f"expected the GPU cuda:{index}, found {found}; set device=cpu (in pretrain speed.device=cpu), or start "
            "fewer processes"
        )
    return torch.device("cuda", index)
