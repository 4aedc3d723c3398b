"""How processes join each other, and which errors mean that one was lost."""

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from dino import distributed
from dino.errors import ProcessesLost

MINUTE = timedelta(minutes=1)


def names(store: dist.Store, world_size: int) -> set[str]:
    """The names that the ranks use for this start; the main process joins last."""
    with ThreadPoolExecutor(world_size) as pool:
        ranks = reversed(range(world_size))
        return set(pool.map(lambda rank: distributed._start_name(store, rank, world_size, MINUTE), ranks))


def test_each_start_has_a_unique_name_that_all_its_processes_share() -> None:
    store = dist.HashStore()
    store.set("request/1", "a process that was killed before it got a reply")
    starts = [names(store, 3) for _ in range(3)] + [names(store, 1)]
    assert all(len(start) == 1 for start in starts)
    assert len(set.union(*starts)) == 4


def test_waiting_for_a_process_that_does_not_join_times_out() -> None:
    with pytest.raises(ProcessesLost, match="expected 3 processes, found that 2 of them did not join"):
        distributed._start_name(dist.HashStore(), 0, 3, timedelta(seconds=0.1))


def test_only_errors_of_collectives_mean_that_a_process_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    reset = RuntimeError(
        "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:545] Read error [127.0.0.1]:16277: Connection reset by "
        "peer. This is typically caused by a remote worker"
    )
    assert not distributed.process_lost(reset)  # there is only one process
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert distributed.process_lost(reset)
    assert "expected 2 running processes" in distributed.process_lost_message(reset)
    assert "(Read error [127.0.0.1]:16277: Connection reset by peer)" in distributed.process_lost_message(reset)
    assert distributed.process_lost(dist.DistBackendError("unhandled system error"))
    assert not distributed.process_lost(RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"))


def test_only_torchrun_restarts_count_as_restarted(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not distributed.restarted() and not distributed.is_orphan()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert distributed.restarted()
    monkeypatch.setattr(distributed, "PARENT", 0)
    assert not distributed.is_orphan()  # not started by torchrun
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job7")
    assert distributed.is_orphan()


def test_a_job_is_identified_by_torchruns_id_or_by_its_slurm_step(monkeypatch: pytest.MonkeyPatch) -> None:
    assert distributed.launch_id() is None
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    assert distributed.launch_id() is None  # the batch script itself, or a shell in an allocation
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    assert distributed.launch_id() == "slurm-4711.0"  # the same after the job was requeued, perhaps to other nodes
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job7")
    assert distributed.launch_id() == "job7"
