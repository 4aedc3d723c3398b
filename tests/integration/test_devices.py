"""What a GPU computes agrees with the CPU, and the host never waits for it.

Each test runs on the CPU as well, where it is trivial: so that an error in the test itself shows without a GPU.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_runs import Crash, assert_same_bits, config, crash_after, metrics

from dino.api.pretraining import pretrain
from dino.api.run import Run
from dino.crops.grids import GridCrops
from dino.extraction.embed import embed, normaliser
from dino.models.backbone import BackboneSpec, build_backbone
from dino.objectives.cross_entropy import dino_loss
from dino.randomness import generator
from dino.signals import StopSignal
from dino.train.loop import Trainer

CPU = torch.device("cpu")
GPU = pytest.param(
    "cuda",
    marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
)
on_each_device = pytest.mark.parametrize("device", ["cpu", GPU])
# Crops are computed in fp32, and a value next to a threshold (solarize) may fall on its other side on another device.
# Tensor cores round the inputs of fp32 convolutions to 10 bits (TF32); bf16 rounds to 8.
TOLERANCE = {"fp64": 1e-3, "fp32": 2e-3, "bf16": 3e-2}


@pytest.fixture(autouse=True)
def deterministic(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Kernels that give the same bits each time; cuBLAS reads the variable when it is first used."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def run_of(data: Path, output: Path, device: str, **changes: object) -> Run:
    settings = config(data, output, **{"speed.device": device, **changes})
    return Run(settings, torch.device(device))


def trainer_of(run: Run) -> tuple[Trainer, Iterator]:
    trainer = run.trainer()
    return trainer, iter(list(trainer.batches(0, run.length.total)))


def losses_of(run: Run, steps: int) -> list[float]:
    trainer, batches = trainer_of(run)
    return [float(trainer._step(batches, StopSignal()).loss) for _ in range(steps)]


@contextmanager
def no_waiting(device: str) -> Iterator[None]:
    """An operation that makes the host wait for a GPU raises."""
    if device == "cpu":
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_each_device
@pytest.mark.parametrize("changes", [{}, {"speed.precision": "bf16"}, {"training.gradient_accumulation": 2}], ids=str)
@pytest.mark.parametrize("level", ["tiles", "grids"])
def test_the_host_never_waits_in_a_step(
    level: str, changes: dict, device: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    run = run_of(request.getfixturevalue(level), tmp_path / "run", device, **{"speed.compile": "false", **changes})
    trainer, batches = trainer_of(run)
    trainer._step(batches, StopSignal())  # fills caches: matrices of positions, constants, the check of the kernel
    with no_waiting(device):
        reports = [trainer._step(batches, StopSignal()) for _ in range(2)]
    assert all(report.loss.isfinite() for report in reports)


@on_each_device
@pytest.mark.parametrize("precision", ["fp64", "fp32", "bf16"])
@pytest.mark.parametrize("level", ["tiles", "grids"])
def test_losses_are_those_of_a_cpu(
    level: str, precision: str, device: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    data, same = request.getfixturevalue(level), {"optim.lr": 0.001, "speed.compile": "false"}
    wanted = losses_of(run_of(data, tmp_path / "wanted", "cpu", **same, **{"speed.precision": "fp64"}), 3)
    found = losses_of(run_of(data, tmp_path / "found", device, **same, **{"speed.precision": precision}), 3)
    assert found == pytest.approx(wanted, rel=TOLERANCE[precision])


@pytest.mark.parametrize(("device", "compiled"), [("cpu", "false"), pytest.param("cuda", "true", marks=GPU.marks)])
def test_compiled_blocks_give_the_losses_of_eager_ones(
    device: str, compiled: str, tiles: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    same = {"optim.lr": 0.001, "speed.precision": "bf16"}
    eager = losses_of(run_of(tiles, tmp_path / "eager", device, **same, **{"speed.compile": "false"}), 3)
    found = losses_of(run_of(tiles, tmp_path / "compiled", device, **same, **{"speed.compile": compiled}), 3)
    assert found == pytest.approx(eager, rel=TOLERANCE["bf16"])
    assert "cannot be compiled" not in capsys.readouterr().out


@on_each_device
@pytest.mark.parametrize(("level", "precision"), [("tiles", "bf16"), ("grids", "fp64")])
def test_a_resumed_run_gives_the_same_bits(
    level: str,
    precision: str,
    device: str,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = request.getfixturevalue(level)
    same = {"speed.device": device, "speed.precision": precision, "training.max_steps": 6, "speed.compile": "false"}
    pretrain(config(data, tmp_path / "whole", **same))
    with monkeypatch.context() as patch, pytest.raises(Crash):
        crash_after(patch, 5)
        pretrain(config(data, tmp_path / "resumed", **same))
    pretrain(config(data, tmp_path / "resumed", **same))
    assert len(metrics(tmp_path / "whole")) == 6
    assert_same_bits(tmp_path / "whole", tmp_path / "resumed")


@on_each_device
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("level", ["tiles", "grids"])
def test_batches_for_a_gpu_are_in_pinned_memory(
    level: str, workers: int, device: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    data = request.getfixturevalue(level)
    run = run_of(data, tmp_path / "run", device, **{"speed.num_workers": workers})
    plain = run_of(data, tmp_path / "run", "cpu")
    for batch, wanted in zip(run.batches(2, 0, 2), plain.batches(2, 0, 2), strict=True):
        tensors = [batch.inputs, batch.keep, *batch.parameters.values()]
        assert all(tensor.is_pinned() == (device == "cuda") for tensor in tensors)
        assert torch.equal(batch.draws, wanted.draws)
        assert all(torch.equal(value, wanted.parameters[key]) for key, value in batch.parameters.items())


@pytest.mark.parametrize(
    ("device", "cache_gb"), [("cpu", None), *(pytest.param("cuda", n, marks=GPU.marks) for n in (0, 1))]
)
def test_views_of_grids_do_not_depend_on_the_gpu_cache(
    device: str, cache_gb: float | None, grids: Path, tmp_path: Path
) -> None:
    views = {}
    for name, where, cache in (("wanted", "cpu", None), ("found", device, cache_gb)):
        run = run_of(grids, tmp_path / name, where, **{"speed.gpu_cache": cache})
        trainer, batches = trainer_of(run)
        views[name] = [view for _ in range(2) for view in trainer.inputs(next(batches)).groups]
    assert all(view.device.type == device for view in views["found"])
    assert all(torch.equal(a, b.cpu()) for a, b in zip(views["wanted"], views["found"], strict=True))


@on_each_device
def test_grid_crops_are_the_same_numbers(device: str) -> None:
    cells = torch.randn(7, 36, 10, generator=torch.Generator().manual_seed(0))
    rows = torch.tensor([3, 0, 6])
    drawn = [GridCrops((6, 6)).draw((6, 6), None, generator(0, i, "crops")) for i in range(len(rows))]
    parameters = {key: torch.from_numpy(np.stack([one[key] for one in drawn])) for key in drawn[0]}
    wanted = GridCrops((6, 6)).apply(cells[rows], parameters)
    held = GridCrops((6, 6), cells=cells.to(device))
    held.apply(rows.to(device), parameters)  # constants are copied once
    there = rows.to(device)
    with no_waiting(device):
        found = held.apply(there, parameters)
    assert all(torch.equal(a, b.cpu()) for a, b in zip(wanted, found, strict=True))


@on_each_device
@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(("views", "prototypes"), [(10, 5001), (4, 257)])
def test_loss_and_gradient_agree_with_double_precision(
    views: int, prototypes: int, overwrite: bool, device: str
) -> None:
    random = torch.Generator().manual_seed(0)
    student = torch.randn(views, 3, prototypes, generator=random)
    targets = (torch.randn(2, 3, prototypes, generator=random) / 0.04).softmax(-1)
    exact = student.double().requires_grad_()
    logs = (exact / 0.1).log_softmax(-1)
    pairs = [(t, v) for t in range(2) for v in range(views) if v != t]
    wanted = torch.stack([-(targets[t].double() * logs[v]).sum(-1).mean() for t, v in pairs]).mean()
    wanted.backward()

    there = student.to(device).requires_grad_()
    loss = dino_loss(there, targets.to(device), 0.1, overwrite=overwrite)
    (gradient,) = torch.autograd.grad(loss, there)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    torch.testing.assert_close(gradient.cpu().double(), exact.grad, rtol=1e-4, atol=1e-8)


@on_each_device
@pytest.mark.parametrize(("precision", "tolerance"), [("fp64", 1e-6), ("fp32", 5e-3), ("bf16", 0.1)])
def test_features_are_those_of_a_cpu(precision: str, tolerance: float, device: str) -> None:
    backbone = build_backbone(BackboneSpec("vit:dim=32,depth=2,heads=2", "patch", 3, (32, 32), 16), seed=0)
    tiles = torch.randint(0, 256, (5, 3, 48, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    normalise = normaliser((0.5, 0.4, 0.3), (0.2, 0.25, 0.3), 16)
    wanted = embed(backbone, [tiles], normalise, CPU, "fp64")
    found = embed(backbone, tiles.split(2), normalise, torch.device(device), precision)
    assert found.device == CPU
    torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance)
