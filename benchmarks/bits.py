"""Compare what two commits compute, bit for bit, on this machine: the proof that a refactoring changed nothing.

    python -m benchmarks.bits BASE [HEAD]

Each commit is checked out into a temporary worktree, where another process trains both levels in fp32 and bf16 (with
drop-path, one thread, 12 steps), resumes each run from its checkpoint of step 5, and extracts features. The comparison
covers the tensors of student, teacher, objectives and optimizer, all numbers in ``metrics.jsonl`` except times, those
of the verdict, and the features. Without HEAD the working tree is compared with BASE. The exit code is 1 if anything
differs.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
TIMES = {"seconds", "samples_per_second", "data_wait", "gpu_use", "gpu_watts"}
STEPS, RESUMED_AT = 12, 5

# Run in a process that imports `dino` from the commit's worktree; it uses only names that users of the package use.
PROGRAM = """
import shutil, sys
from pathlib import Path
import numpy as np, torch
from PIL import Image
from dino import api
from dino.config.load import load_config
from dino.config.schema import ExtractConfig, PatchConfig, RegionConfig

out, steps, resumed_at = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
folders = {name: out / name for name in ("tiles", "grids", "regions", "labelled")}
for folder in folders.values():
    folder.mkdir(parents=True)

def picture(side):
    coarse = Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8))
    return coarse.resize((side, side), Image.Resampling.BICUBIC)

for i in range(40):
    picture(72).save(folders["tiles"] / f"slide{i % 4}_{72 * i}_0.png")
    torch.save(torch.randn(36, 10, generator=generator), folders["grids"] / f"slide{i % 4}_{i * 100}_0.pt")
for i in range(2):
    picture(512).save(folders["regions"] / f"slide{i}_0_0.png")
for i in range(40):
    picture(72).save(folders["labelled"] / f"held{i:02d}_0_0.png")
rows = [
    f"{path},{'ab'[i % 2]},{'train' if i < 24 else 'val'},held{i:02d}"
    for i, path in enumerate(sorted(folders["labelled"].iterdir()))
]
(out / "labels.csv").write_text(chr(10).join(["image_path,label,partition,slide_id", *rows]))

settings = {
    "model.arch": "vit:dim=32,depth=3,heads=2", "model.out_dim": 48, "model.hidden_dim": 24, "model.bottleneck_dim": 8,
    "model.drop_path_rate": 0.3, "model.norm_last_layer": False, "model.warmup_teacher_temp_epochs": 1,
    "model.teacher_temp": 0.07, "training.batch_size_per_gpu": 4, "training.gradient_accumulation": 2,
    "training.max_steps": steps, "training.warmup_epochs": 1, "training.freeze_last_layer": 0.4, "optim.lr": 0.02,
    "speed.num_workers": 0, "speed.device": "cpu", "logging.every_steps": 1, "logging.save_every_steps": 5,
    "logging.keep_every_steps": resumed_at, "logging.tensorboard": False, "logging.report": False,
}
levels = {
    "patch": (PatchConfig, "patch_pathology", "tiles", {
        "aug.global_crops_size": 48, "aug.local_crops_size": 32, "aug.local_crops_number": 3, "aug.solarize": 0.3,
        "model.patch_size": 16, "evaluate.labels": str(out / "labels.csv"), "evaluate.every_steps": 4,
        "evaluate.k": [3]}),
    "region": (RegionConfig, "region", "grids", {"aug.local_crops_number": 3, "aug.quarter_turns": True}),
}
for level, (schema, recipe, data, own) in levels.items():
    for precision in ("fp32", "bf16"):
        def train(run):
            values = {**settings, **own, "speed.precision": precision}
            values |= {"data_dir": str(folders[data]), "output_dir": str(run)}
            api.pretrain(load_config(schema, recipe=recipe, overrides=values))
        whole, resumed = out / f"{level}_{precision}", out / f"{level}_{precision}_resumed"
        train(whole)
        shutil.copytree(whole, resumed)
        status = (resumed / "status.json").read_text().replace('"finished"', '"running"')
        (resumed / "status.json").write_text(status)
        for name in ("best.pt", "previous.pt", f"step_{2 * resumed_at}.pt"):
            (resumed / "checkpoints" / name).unlink(missing_ok=True)
        shutil.copy(resumed / "checkpoints" / f"step_{resumed_at}.pt", resumed / "checkpoints" / "last.pt")
        train(resumed)
        if precision == "fp32":
            root = folders["regions"] if level == "patch" else folders["grids"]
            kwargs = {"overrides": {"precision": "fp32", "device": "cpu", "num_workers": 0}}
            api.extract(str(whole), root, load_config(ExtractConfig, **kwargs))
"""


@contextmanager
def checkout(commit: str | None, folder: Path) -> Iterator[Path]:
    """A worktree of a commit for the length of the block; the working tree itself for None."""
    if commit is None:
        yield ROOT
        return
    subprocess.run(["git", "worktree", "add", "--detach", "--quiet", str(folder), commit], cwd=ROOT, check=True)
    try:
        yield folder
    finally:
        subprocess.run(["git", "worktree", "remove", "--force", str(folder)], cwd=ROOT, check=True)


def compute(source: Path, output: Path) -> dict[str, Any]:
    """Run the program on the package in ``source``; every tensor and number that it left, by name."""
    environment = {**os.environ, "PYTHONPATH": str(source), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    # The same folder for both commits: paths are part of what some files hold.
    command = [sys.executable, "-c", PROGRAM, str(output), str(STEPS), str(RESUMED_AT)]
    log = output.with_suffix(".log")
    with log.open("w") as file:
        done = subprocess.run(command, cwd=source, env=environment, stdout=file, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        raise SystemExit(f"{source}: exit code {done.returncode}\n{log.read_text()[-3000:]}")
    return dict(results(output))


def results(output: Path) -> Iterator[tuple[str, Any]]:
    """Names and values of what the program wrote."""
    for run in sorted(path.parent for path in output.glob("*/metrics.jsonl")):
        content = torch.load(run / "checkpoints" / "last.pt", weights_only=True)
        for part in ("student", "teacher", "objectives", "optimizer"):
            for name, value in leaves(content[part]):
                # Containers around the centre may change; its own name may not.
                yield f"{run.name}/{part}/{name if part != 'objectives' else name.rpartition('/')[2]}", value
        for line in (run / "metrics.jsonl").read_text().splitlines():
            entry = json.loads(line)
            for name, value in leaves({key: value for key, value in entry.items() if key not in TIMES}):
                kind = "evaluation" if "evaluation" in entry else "step"
                yield f"{run.name}/log/{kind} {entry['step']}/{name}", value
        for name, value in leaves(json.loads((run / "status.json").read_text()).get("floor", {})):
            yield f"{run.name}/verdict/{name}", value
    for path in sorted(output.glob("regions/region_4096_pretraining/*.pt")):
        yield f"features/{path.name}", torch.load(path, weights_only=True)
    for path in sorted(output.glob("grids/slide_features/*.h5")):
        import h5py

        with h5py.File(path) as file:
            for name in file:
                yield f"features/{path.name}/{name}", torch.from_numpy(np.asarray(file[name]))


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Tensors and plain values of nested containers, with slashes in their names."""
    if isinstance(value, dict | list | tuple):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(item, f"{name}/{key}" if name else str(key))
    else:
        yield name, value


def difference(one: Any, other: Any) -> str:
    """How two values differ, empty where they do not."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        if one.dtype == other.dtype and one.shape == other.shape:
            if torch.equal(one, other):
                return ""
            return f"differs by up to {(one.double() - other.double()).abs().max():.3g}"
        return f"{one.dtype} {tuple(one.shape)} became {other.dtype} {tuple(other.shape)}"
    return "" if one == other else f"{one!r} became {other!r}"


def digest(values: dict[str, Any]) -> str:
    """SHA-256 over all names and values, in the order of the names."""
    sha = hashlib.sha256()
    for name in sorted(values):
        value = values[name]
        sha.update(name.encode())
        sha.update(
            value.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            if isinstance(value, Tensor)
            else repr(value).encode()
        )
    return sha.hexdigest()


def main() -> None:
    """Compare two commits and print what differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base")
    parser.add_argument("head", nargs="?", help="default: the working tree")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder, computed = Path(temporary), []
        for commit in (arguments.base, arguments.head):
            with checkout(commit, folder / "source") as source:
                computed.append(compute(source, folder / "output"))
            (folder / "output").rename(folder / f"output_{len(computed)}")
    base, head = computed
    different = {name: found for name in base.keys() & head.keys() if (found := difference(base[name], head[name]))}
    gone, new = sorted(base.keys() - head.keys()), sorted(head.keys() - base.keys())
    for name in sorted(different)[:40]:
        print(f"{name}: {different[name]}")
    for title, names in (("missing", gone), ("new", new)):
        for name in names[:10]:
            print(f"{title}: {name}")
    shared = base.keys() & head.keys()
    print(f"{len(shared)} values compared, {len(different)} differ, {len(gone)} missing, {len(new)} new")
    print(
        f"SHA-256 of the shared ones: {digest({n: base[n] for n in shared})} -> {digest({n: head[n] for n in shared})}"
    )
    raise SystemExit(1 if different or gone else 0)


if __name__ == "__main__":
    main()
