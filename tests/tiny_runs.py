"""Runs of both levels that take a second, and comparisons of run folders."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dino.config.load import load_config, to_yaml
from dino.config.schema import PatchConfig, RegionConfig

TINY = {
    "model.arch": "vit:dim=32,depth=2,heads=2",
    "model.out_dim": 32,
    "model.hidden_dim": 24,
    "model.bottleneck_dim": 8,
    "model.drop_path_rate": 0.3,
    "training.batch_size_per_gpu": 4,
    "training.max_steps": 8,
    "training.warmup_epochs": 0,
    "training.freeze_last_layer": 0.1,
    "optim.lr": 0.05,
    "speed.num_workers": 0,
    "speed.precision": "fp32",
    "speed.device": "cpu",
    "logging.every_steps": 1,
    "logging.save_every_steps": 3,
    "logging.tensorboard": False,
    "logging.report": False,
}
TINY_PATCH = {**TINY, "aug.global_crops_size": 32, "aug.local_crops_size": 16, "aug.local_crops_number": 2}
WALL_CLOCK = {"seconds", "samples_per_second", "data_wait", "gpu_use", "gpu_watts"}


def config(data: Path, output: Path, **changes: object) -> PatchConfig | RegionConfig:
    region = any(data.glob("*.pt"))
    values = {**(TINY if region else TINY_PATCH), "data_dir": str(data), "output_dir": str(output), **changes}
    return load_config(RegionConfig if region else PatchConfig, overrides=values)


def command(
    settings: PatchConfig | RegionConfig, folder: Path, processes: int = 0, torchrun: Sequence[str] = ("--standalone",)
) -> list[str]:
    """The command that trains with exactly these settings, under torchrun if ``processes`` is given."""
    level = "region" if isinstance(settings, RegionConfig) else "patch"
    (folder / "settings.yaml").write_text(to_yaml(settings))
    launcher = ["-m", "torch.distributed.run", *torchrun, f"--nproc_per_node={processes}"] if processes else []
    return [sys.executable, *launcher, "-m", "dino", "pretrain", level, "--config", str(folder / "settings.yaml")]


def assert_vanishing_data_ends_in_one_line(words: Sequence[str], folder: Path) -> None:
    """Run a command of :func:`command` whose data vanish in the third step, as when a mount is lost."""
    program = (
        "import shutil, sys; from dino.train.loop import Trainer; step = Trainer._step\n"
        "def gone(self, *args):\n"
        f"    if self.step == 2: shutil.rmtree({str(folder)!r}, ignore_errors=True)\n"
        "    return step(self, *args)\n"
        "Trainer._step = gone; sys.argv = ['dino', *sys.argv[1:]]\n"
        "from dino.cli.main import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *words[3:]], capture_output=True, text=True, timeout=120, check=False
    )
    lines = [line for line in done.stderr.splitlines() if "expected usable samples" in line]
    assert done.returncode == 2, done.stderr
    assert len(lines) == 1 and "still there" in lines[0] and "Traceback" not in done.stderr


def last(run: Path) -> dict:
    return torch.load(run / "checkpoints" / "last.pt", weights_only=True)


def metrics(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in WALL_CLOCK} for line in lines]


def assert_same_numbers(first: Path, second: Path) -> None:
    """Two runs in double precision are equal up to the order of sums over processes."""
    for one, other in zip(metrics(first), metrics(second), strict=True):
        assert one.keys() == other.keys()
        differ = {key: (one[key], other[key]) for key in one if one[key] != pytest.approx(other[key], rel=1e-9)}
        assert differ == {}, differ
    for part in ("student", "teacher"):
        one, other = last(first)[part], last(second)[part]
        assert all(torch.allclose(one[name], other[name], rtol=1e-7, atol=1e-9) for name in one)


def assert_same_bits(first: Path, second: Path) -> None:
    """Two runs are identical: checkpoints (step, networks, optimizer, all state), log and quarantine."""
    assert _checkpoints(first) == _checkpoints(second)
    for name in _checkpoints(first):
        one, other = (torch.load(run / "checkpoints" / name, weights_only=True) for run in (first, second))
        for part in ("step", "teacher", "student", "objectives", "optimizer", "state"):
            assert one.keys() == other.keys() and _same(one.get(part), other.get(part)), (name, part)
    assert metrics(first) == metrics(second)
    lists = [run / "quarantine.csv" for run in (first, second)]
    assert len({path.read_text() if path.exists() else "" for path in lists}) == 1


def _checkpoints(run: Path) -> set[str]:
    return {path.name for path in (run / "checkpoints").iterdir()} - {"previous.pt"}


def _same(one: object, other: object) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    return one == other


class Crash(BaseException):
    """Simulates the end of a process without any cleanup."""


def crash_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    from dino.train.loop import Trainer

    original = Trainer._step

    def step(self: Trainer, *args: object) -> object:
        if self.step == steps:
            raise Crash
        return original(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(Trainer, "_step", step)


def make_tiles(folder: Path, count: int = 20) -> Path:
    """Tiles of four slides, with different smooth colours."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        coarse.resize((48, 48), Image.Resampling.BICUBIC).save(folder / f"slide{i % 4}_{i * 48}_0.png")
    return folder


def make_grids(folder: Path, count: int = 12) -> Path:
    """Feature grids of 6 x 6 cells and D = 10."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    for i in range(count):
        torch.save(torch.randn(36, 10, generator=generator), folder / f"slide_{i * 100}_0.pt")
    return folder


def negative(path: Path, folder: Path) -> Path:
    """A tile or grid that is not trained on: the negative of another one."""
    folder.mkdir(exist_ok=True)
    copy = folder / path.name
    if path.suffix == ".pt":
        torch.save(-torch.load(path, weights_only=True), copy)
    else:
        Image.fromarray(255 - np.asarray(Image.open(path).convert("RGB"))).save(copy)
    return copy


def add_bad_files(data: Path) -> None:
    """Add two unusable files to a folder of tiles or grids."""
    if any(data.glob("*.pt")):
        torch.save(torch.full((36, 10), float("nan")), data / "slide_5_0.pt")
        (data / "slide_6_0.pt").write_bytes(b"torn")
    else:
        (data / "slide0_5_0.png").write_bytes(b"torn")
        (data / "slide1_5_0.png").write_bytes(b"")


def with_evaluation(data: Path, every_steps: int = 2, patience: int = 3) -> dict[str, object]:
    """Settings of a run with kNN evaluation on negatives of the usable files of ``data``, in two arbitrary classes."""
    bad = {"slide0_5_0.png", "slide1_5_0.png", "slide_5_0.pt", "slide_6_0.pt"}
    paths = [
        negative(path, data.parent / f"{data.name}_labelled")
        for path in sorted(data.glob("[!.]*"))
        if path.is_file() and path.name not in bad
    ]
    parts = ["train" if i < 0.6 * len(paths) else "test" for i in range(len(paths))]
    rows = [f"{path},{'ab'[i % 2]},{parts[i]},held{i}" for i, path in enumerate(paths)]
    table = data.parent / f"{data.name}.csv"
    table.write_text("\n".join(["image_path,label,partition,slide_id", *rows]))
    return {
        "evaluate.labels": str(table),
        "evaluate.every_steps": every_steps,
        "evaluate.k": [3],
        "evaluate.early_stopping_patience": patience,
    }
