"""The scripts in examples/, with tiny models, on the sample slide of the package."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SLIDE = ROOT / "dino" / "slides" / "sample" / "CMU-1-Small-Region.svs"
TINY = [
    "model.out_dim=32",
    "model.hidden_dim=16",
    "model.bottleneck_dim=8",
    "training.max_steps=2",
    "training.warmup_epochs=0",
    "training.batch_size_per_gpu=4",
    "speed.device=cpu",
    "speed.precision=fp32",
    "speed.num_workers=0",
    "logging.tensorboard=false",
    "logging.report=false",
]


def _run(*arguments: str | Path) -> str:
    command = [sys.executable, *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize(("code", "requests"), [(75, "requeue 4711\n"), (2, ""), (0, "")])
def test_the_slurm_script_sets_the_rank_of_each_task_and_requeues_a_stopped_job(code, requests, tmp_path):
    """With replacements of SLURM's programs, for the tenth of 16 tasks."""
    programs = {
        "srun": f'echo "$1" > {tmp_path}/srun; shift; SLURM_PROCID=9 SLURM_LOCALID=1 exec "$@"',
        "scontrol": f'if [ "$1" = show ]; then printf "gpu03\\ngpu04\\n"; else echo "$@" > {tmp_path}/requests; fi',
        "python": f'echo $RANK $LOCAL_RANK $WORLD_SIZE $MASTER_ADDR $MASTER_PORT "$@" > {tmp_path}/seen; exit {code}',
    }
    for name, script in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NODELIST": "gpu[03-04]",
        "SLURM_NTASKS": "16",
        "SLURM_CPUS_PER_TASK": "12",
    }
    environment = os.environ | slurm | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "ROOT": "my data", "RUN": "run"}
    script = ROOT / "examples" / "slurm.sbatch"
    assert subprocess.run(["bash", script], env=environment, check=False).returncode == code
    assert (tmp_path / "srun").read_text() == "--cpus-per-task=12\n"
    seen = (tmp_path / "seen").read_text()
    assert seen.startswith("9 1 16 gpu03 24711 -m dino pretrain patch my data run training.")
    assert ((tmp_path / "requests").read_text() if (tmp_path / "requests").exists() else "") == requests


def test_both_levels(tmp_path):
    crops = ["model.arch=vit_tiny", "aug.global_crops_size=32", "aug.local_crops_size=16", "aug.local_crops_number=2"]
    tiles = [
        "tile_size_px=64",
        "spacing_um=2",
        "region_size_px=256",
        "region_overlap_cells=3",
        "num_workers=1",
        "previews=false",
    ]
    extraction = ["device=cpu", "precision=fp32", "num_workers=0"]

    output = _run(
        ROOT / "examples" / "level1.py", SLIDE, "--work", tmp_path, "--tile", *tiles, "--pretrain", *TINY, *crops
    )
    assert "finished after 2 steps" in output
    assert "features (1, 192)" in output

    output = _run(ROOT / "examples" / "level2.py", "--work", tmp_path, "--extract", *extraction, "--pretrain", *TINY)
    assert "finished after 2 steps" in output
    assert "grid (192, 4, 4) to features (1, 192)" in output
    assert json.loads((tmp_path / "region" / "status.json").read_text())["state"] == "finished"
