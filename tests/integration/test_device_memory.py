"""A GPU whose memory does not suffice, and what a run computes whatever is done about it."""

import json
import subprocess
from pathlib import Path

import pytest
import torch
from tiny_runs import assert_same_bits, command, config, last, metrics

from dino.api import pretrain
from dino.api.pretraining import memory_advice
from dino.errors import ConfigError, OutOfMemory
from dino.precision import check_precision

REASON = "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.10 GiB"


def run_out_of_memory(monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    """Let the backbone's ``call``-th pass fail as torch does on a GPU."""
    from dino.models.backbone import Backbone

    calls, honest = [], Backbone.embed

    def embed(self: Backbone, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        calls.append(1)
        if len(calls) == call:
            raise torch.OutOfMemoryError(REASON)
        return honest(self, x, mask)

    monkeypatch.setattr(Backbone, "embed", embed)


def test_out_of_memory_prints_advice_and_loses_nothing(
    tiles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretrain(config(tiles, tmp_path / "whole", **{"speed.precision": "fp64"}))
    settings = config(tiles, tmp_path / "run", **{"speed.precision": "fp64"})
    with monkeypatch.context() as patch, pytest.raises(OutOfMemory) as caught:
        run_out_of_memory(patch, 3 * 5 + 2)  # a step is one pass of the teacher and two of the student
        pretrain(settings)
    message = str(caught.value)
    assert caught.value.exit_code == 2 and "\n" not in message and "CUDA out of memory" in message
    assert "training.batch_size_per_gpu=2 training.gradient_accumulation=2" in message
    assert "speed.checkpointing=true" in message
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["state"] == "failed" and status["error"] == message and status["step"] == 5
    assert last(tmp_path / "run")["step"] == 3

    # What the message says is the same run, and it goes on.
    ways = {"training.batch_size_per_gpu": 2, "training.gradient_accumulation": 2, "speed.checkpointing": True}
    assert pretrain(config(tiles, tmp_path / "run", **{"speed.precision": "fp64"}, **ways)).state == "finished"
    for one, other in zip(metrics(tmp_path / "whole"), metrics(tmp_path / "run"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-9)


@pytest.mark.parametrize("rehearsal", ["dry_run", "profile"])
def test_a_rehearsal_finds_it_out_first(
    rehearsal: str, tiles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_out_of_memory(monkeypatch, 1)
    with pytest.raises(OutOfMemory, match=r"training\.batch_size_per_gpu=2"):
        pretrain(config(tiles, tmp_path / "run", **{rehearsal: True}))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("size", "accumulation", "checkpointing", "said"),
    [
        (64, 1, False, "training.batch_size_per_gpu=32 training.gradient_accumulation=2 (the same global batch) or"),
        (
            15,
            2,
            True,
            "set training.batch_size_per_gpu=5 training.gradient_accumulation=6 (the same global batch), and",
        ),
        (1, 64, False, "set speed.checkpointing=true (slower steps), and"),
        (1, 64, True, "only a smaller model needs less"),
    ],
)
def test_advice_keeps_the_global_batch(
    size: int, accumulation: int, checkpointing: bool, said: str, tmp_path: Path
) -> None:
    changes = {
        "training.batch_size_per_gpu": size,
        "training.gradient_accumulation": accumulation,
        "speed.checkpointing": checkpointing,
    }
    assert said in memory_advice(config(tmp_path, tmp_path / "run", **changes))


@pytest.mark.parametrize("level", ["tiles", "grids"])
def test_checkpointing_gives_the_same_bits(level: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    data = request.getfixturevalue(level)
    pretrain(config(data, tmp_path / "plain"))
    pretrain(config(data, tmp_path / "less", **{"speed.checkpointing": True}))
    assert_same_bits(tmp_path / "plain", tmp_path / "less")


def test_bf16_on_an_old_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from contextlib import nullcontext

    old = torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    with pytest.raises(ConfigError, match=r"compute capability 8\.0.*Tesla V100 as cuda:1.*precision=fp32"):
        check_precision("bf16", old)
    check_precision("fp32", old)
    check_precision("bf16", torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    check_precision("bf16", old)


def compiled_by(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    from functools import partial

    from dino.models.backbone import compile_blocks
    from dino.train import distill

    monkeypatch.setattr(distill, "compile_blocks", partial(compile_blocks, backend=backend))


def test_a_run_goes_on_compiled_or_not(tiles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling is a matter of speed: it rounds differently, as another device does, and is no other run."""
    from tiny_runs import Crash, crash_after

    compiled_by(monkeypatch, "aot_eager")
    double = {"speed.precision": "fp64"}
    pretrain(config(tiles, tmp_path / "plain", **double))
    for name, first in (("on", "true"), ("off", "false")):
        with monkeypatch.context() as patch, pytest.raises(Crash):
            crash_after(patch, 4)
            pretrain(config(tiles, tmp_path / name, **double, **{"speed.compile": first}))
        pretrain(config(tiles, tmp_path / name, **double, **{"speed.compile": "false" if first == "true" else "true"}))
        assert last(tmp_path / name)["student"].keys() == last(tmp_path / "plain")["student"].keys()
        for one, other in zip(metrics(tmp_path / "plain"), metrics(tmp_path / name), strict=True):
            assert one["loss"] == pytest.approx(other["loss"], rel=1e-9)


@pytest.mark.slow
def test_two_processes_train_compiled_as_one_does_not(tiles: Path, tmp_path: Path) -> None:
    few_graphs = {"model.arch": "vit:dim=32,depth=1,heads=2", "aug.local_crops_number": 0, "training.max_steps": 4}
    same = {"speed.precision": "fp64", **few_graphs}
    pretrain(config(tiles, tmp_path / "one", **same))
    shared = {"training.batch_size_per_gpu": 2, "speed.compile": "true"}
    two = config(tiles, tmp_path / "two", **same, **shared)
    subprocess.run(command(two, tmp_path, processes=2), check=True, timeout=900)
    status = json.loads((tmp_path / "two" / "status.json").read_text())
    assert not [warning for warning in status.get("warnings", []) if "compile" in warning]
    for one, other in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-9)
