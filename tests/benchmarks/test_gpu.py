"""`make gpu` runs through on the CPU with tiny sizes; a part that fails or hangs does not stop the others."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gpu

ABSENT = ("simplejpeg", "h5py", "hs2p", "openslide", "cv2")


def parts_of(folder: Path) -> dict[str, dict]:
    content = json.loads((folder / "gpu.json").read_text())
    return {part["name"]: part for part in content["parts"]}


def test_all_parts_run_on_a_cpu_with_tiny_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And without the packages that a GPU machine may lack."""
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({ABSENT!r}))\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    code = gpu.main(["--quick", "--device", "cpu", "--output", str(tmp_path)])
    content = json.loads((tmp_path / "gpu.json").read_text())
    assert code == 0, content["parts"]
    assert all(part["state"] == "passed" for part in content["parts"]) and len(content["parts"]) == len(gpu.parts())
    assert "no CUDA device" in parts_of(tmp_path)["tests"]["note"]
    assert "NCCL was not run" in parts_of(tmp_path)["processes"]["note"]
    assert {row["benchmark"] for row in content["rows"]} == {*gpu.BENCHMARKS, *gpu.SLOW_BENCHMARKS}
    assert content["rows"][-1]["skipped"] == "hs2p and openslide are not installed here"
    assert [line["step"] for line in content["training"]["curve"]] == [1, 2, 3, 4] and content["training"]["knn"]
    assert (tmp_path / "gpu.png").read_bytes()[:4] == b"\x89PNG"


def test_a_part_that_hangs_or_is_killed_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Workers are replaced by a small program that behaves like one."""
    program = """
import json, os, sys, time
names, events = sys.argv[1:sys.argv.index("--worker")], sys.argv[sys.argv.index("--worker") + 1]
with open(events, "a") as file:
    for name in names:
        print(json.dumps({"part": name, "state": "running"}), file=file, flush=True)
        if name == "tests":
            time.sleep(600)
        if name == "step":
            os.kill(os.getpid(), 9)
        row = {"name": name, "unit": "img/s", "ours": 2.0, "ratio": 1.5, "comparator": "theirs"}
        print(json.dumps({"part": name, "note": "measured", "row": row}), file=file, flush=True)
        print(json.dumps({"part": name, "state": "passed"}), file=file, flush=True)
"""
    start = subprocess.Popen
    monkeypatch.setattr(
        gpu.subprocess,
        "Popen",
        lambda command, **options: start([sys.executable, "-c", program, *command[3:]], **options),
    )
    monkeypatch.setattr(gpu, "QUICK_FACTOR", 1)
    few = [gpu.Part(part.name, 1.0, part.run) for part in gpu.parts()]
    monkeypatch.setattr(gpu, "parts", lambda: few)
    assert gpu.main(["tests", "step", "loss", "--quick", "--device", "cpu", "--output", str(tmp_path)]) == 1
    found = parts_of(tmp_path)
    assert found["tests"]["state"] == "failed" and found["tests"]["note"] == "stopped at its limit of 1 s"
    assert found["step"]["state"] == "failed" and "code -9" in found["step"]["note"]
    assert found["loss"]["state"] == "passed"
    assert "loss" in capsys.readouterr().out


def test_without_omegaconf_the_error_names_the_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Benchmarks run without it, training does not."""
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['omegaconf'] = None\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    command = ["optimizer", "processes", "--quick", "--device", "cpu", "--output", str(tmp_path)]
    assert gpu.main(command) == 1
    found = parts_of(tmp_path)
    assert found["optimizer"]["state"] == "passed" and found["processes"]["state"] == "failed"
    assert found["processes"]["note"].endswith("put the wheel of omegaconf into .whl/")


def test_without_a_gpu_and_without_quick_nothing_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--output", str(tmp_path / "out")]) == 2
    assert not (tmp_path / "out").exists()


def test_wheels_are_unpacked_onto_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import zipfile

    wheels, folder = tmp_path / "wheels", tmp_path / "work"
    wheels.mkdir()
    folder.mkdir()
    with zipfile.ZipFile(wheels / "carried-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("carried/__init__.py", "ANSWER = 42")
    monkeypatch.setattr(gpu, "WHEELS", wheels)
    environment = gpu._environment(folder)
    program = "import carried, benchmarks; print(carried.ANSWER)"
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "42\n"
