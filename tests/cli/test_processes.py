"""The command line in a separate process: entry points by path, light imports, exit codes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def _python(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=cwd, env=clean | environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("script", ["patch", "region", "extract_features"])
def test_entry_points_run_by_path_from_any_folder(script, tmp_path):
    result = _python(str(ROOT / "dino" / f"{script}.py"), "--help", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split("[OPTIONS]")[0].split("Usage: ")[1].startswith(f"{script}.py ")


def test_an_entry_point_run_by_path_exits_with_2_and_one_line(tmp_path):
    result = _python(str(ROOT / "dino" / "patch.py"), "data_dir=a", "output_dir=b", "model.outdim=3", cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert "did you mean 'model.out_dim'?" in result.stderr


@pytest.mark.parametrize("script", ["patch", "region", "extract_features"])
def test_entry_points_keep_the_package_folder_off_the_path(script, tmp_path):
    """Also in a spawned worker, which runs the file again under another name with the parent's path list."""
    program = f"""
import runpy, sys
folder = {str(ROOT / "dino")!r}
sys.path[0] = folder
for name in ("__mp_main__", "__mp_main__"):
    runpy.run_path(folder + "/{script}.py", run_name=name)
    assert folder not in sys.path, sys.path
    assert sys.path.count({str(ROOT)!r}) == 1, sys.path
import dino.cli.main
assert dino.__file__ == folder + "/__init__.py"
"""
    result = _python("-c", program, cwd=tmp_path)
    assert result.returncode == 0, result.stderr


def test_help_does_not_import_heavy_packages(tmp_path):
    heavy = {
        "torch",
        "timm",
        "hs2p",
        "openslide",
        "cv2",
        "matplotlib",
        "sklearn",
        "h5py",
        "pandas",
        "tensorboard",
        "wandb",
    }
    arguments = ("-X", "importtime", "-m", "dino", "pretrain", "patch", "--help")
    result = _python(*arguments, cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert result.returncode == 0 and "model.arch" in result.stdout
    imported = {
        line.rsplit("|", 1)[-1].strip() for line in result.stderr.splitlines() if line.startswith("import time:")
    }
    assert "typer" in imported and not heavy & imported


def test_the_module_is_the_command(tmp_path):
    result = _python("-m", "dino", "--version", cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert result.stdout.startswith("dino ")
