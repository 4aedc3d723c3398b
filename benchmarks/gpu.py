"""Check and measure this package on a machine with a GPU, within nine minutes, and write one JSON and one PNG.

    make gpu                                                     # or: python -m benchmarks.gpu [PART...] [--output DIR]

The parts are the tests marked ``gpu``, a training with two processes (NCCL on two GPUs, else gloo on the CPU), the
benchmarks, and 90 seconds of training a ViT-S/16 with its loss curve. They run one after another in a worker process,
each with a time limit: a part that fails, crashes or exceeds its limit is recorded as failed, and a new worker
continues with the next one. ``gpu.json`` is rewritten after each event, so nothing that was measured is lost.

Neither network, hs2p, openslide nor pytest are needed (without pytest, the tests are recorded as failed). Wheels in
``.whl/`` are unpacked and imported from there. The training reads the tiles in ``DINO_TEST_DATA/crc5``; without them,
tiles of the sample slide in this package. With ``--quick``, tiny sizes run through the same code in a minute, on a CPU
as well.
"""

import argparse
import gc
import importlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

from benchmarks.gpu_report import Event, Report, draw
from benchmarks.measure import Setting, limits
from benchmarks.results import ROOT, environment, gpu_facts, summary, with_limit
from dino import distributed, progress

TOTAL_SECONDS = 530.0  # of all parts; starting and drawing the figure come to less than 10
STARTUP = "startup"
STARTUP_SECONDS = 90.0  # for a worker to import torch and open the device
QUICK_FACTOR = 4  # of all time limits: a quick run may be on a CPU that is shared
GRACE_SECONDS = 5.0  # between SIGTERM and SIGKILL
TRAINING_SECONDS = 90.0
# Stands for the tests of a quick run on a CPU, where all are skipped; `make test` imports the real ones.
QUICK_TEST = "import pytest\n\n@pytest.mark.gpu\n@pytest.mark.skip\ndef test_on_a_gpu():\n    raise AssertionError\n"
WHEELS = ROOT / ".whl"
BENCHMARKS = {"step": 75.0, "loss": 25.0, "optimizer": 20.0, "crops": 30.0, "grids": 45.0}
SLOW_BENCHMARKS = {"endtoend": 75.0, "extraction": 60.0}

# Settings of the training part: the recommended recipe, and a head that a few thousand tiles can fill.
TRAINING = {
    "model.arch": "vit_small",
    "model.out_dim": 4096,
    "model.momentum_teacher": 0.99,
    "training.batch_size_per_gpu": 256,
    "training.max_steps": 3000,
    "training.warmup_epochs": 10,
    "training.freeze_last_layer": 1,
    "optim.lr": 0.001,
    "logging.every_steps": 5,
    "logging.tensorboard": False,
    "logging.report": False,
    "speed.ram_cache": 4,
}
QUICK_TRAINING = {
    **TRAINING,
    "model.arch": "vit:dim=32,depth=2,heads=2",
    "model.out_dim": 64,
    "aug.global_crops_size": 32,
    "aug.local_crops_size": 16,
    "aug.local_crops_number": 2,
    "training.batch_size_per_gpu": 4,
    "training.max_steps": 4,
    "training.warmup_epochs": 0,
    "logging.every_steps": 1,
    "speed.num_workers": 1,
    "speed.ram_cache": 0,
}
# Double precision, so that the two runs differ by no more than the order of sums.
TWO_PROCESSES = {**QUICK_TRAINING, "training.max_steps": 3, "speed.precision": "fp64", "speed.num_workers": 0}


@dataclass(frozen=True)
class Part:
    """One part.

    Attributes:
        name: Its name.
        seconds: Time limit.
        run: Yields events: ``row`` (a benchmark's row), or named results.
    """

    name: str
    seconds: float
    run: Callable[[Setting], Iterator[Event]]


def parts() -> list[Part]:
    """All parts, the most important first: what does not fit into the total time is left out at the end."""
    return [
        Part("tests", 150.0, run_tests),
        *(Part(name, seconds, partial(run_benchmark, name)) for name, seconds in BENCHMARKS.items() if name == "step"),
        Part("training", TRAINING_SECONDS + 75.0, run_training),
        *(Part(name, seconds, partial(run_benchmark, name)) for name, seconds in BENCHMARKS.items() if name != "step"),
        Part("processes", 60.0, run_two_processes),
        *(Part(name, seconds, partial(run_benchmark, name)) for name, seconds in SLOW_BENCHMARKS.items()),
    ]


# ---------------------------------------------------------------------------------------------------- the parts


def run_tests(setting: Setting) -> Iterator[Event]:
    """The tests marked ``gpu``, from the files that have any.

    Raises:
        RuntimeError: If pytest is absent or a test fails; on a GPU also if none passes.
    """
    if importlib.util.find_spec("pytest") is None:
        raise RuntimeError("pytest is not installed here; put the wheels of pytest, pluggy and iniconfig into .whl/")
    files = [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in path.read_text("utf-8")]
    if setting.quick and not setting.on_gpu:
        files = [setting.folder / "test_quick.py"]
        files[0].write_text(QUICK_TEST)
    found = setting.folder / "tests.xml"
    command = [sys.executable, "-m", "pytest", "-c", "pyproject.toml", "-m", "gpu", "-q", "-p", "no:cacheprovider"]
    command.append(f"--junitxml={found}")
    result = subprocess.run([*command, *map(str, files)], cwd=ROOT, capture_output=True, text=True, check=False)
    if not found.exists():
        raise RuntimeError(f"expected pytest to run, found: {(result.stdout + result.stderr)[-1500:]}")
    outcomes: dict[str, list[str]] = {"passed": [], "failed": [], "error": [], "skipped": []}
    messages = {}
    for case in ElementTree.parse(found).iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        state = next((child.tag for child in case if child.tag in ("failure", "error", "skipped")), "passed")
        outcomes["failed" if state == "failure" else state].append(name)
        if state in ("failure", "error"):
            messages[name] = next(child.get("message", "")[:500] for child in case if child.tag == state)
    counts = ", ".join(f"{len(names)} {state}" for state, names in outcomes.items() if names)
    if not setting.on_gpu:
        counts += " (no CUDA device)"
    yield {"note": counts, "tests": {**outcomes, "messages": messages}}
    failed = outcomes["failed"] + outcomes["error"]
    if failed or result.returncode:
        raise RuntimeError(f"{counts}: {', '.join(failed)}\n{result.stdout[-3000:]}")
    if setting.on_gpu and not outcomes["passed"]:
        raise RuntimeError(f"expected tests to run on this GPU, found {counts}")


def run_benchmark(name: str, setting: Setting) -> Iterator[Event]:
    """The rows of a benchmark, completed by the limits of the hardware."""
    module = importlib.import_module(f"benchmarks.{name}")
    gc.freeze()  # modules are not garbage: the collection before each measurement need not search them
    found = _limits(setting.device, setting.quick)
    for row in module.run(setting):
        done = with_limit(row, found)
        yield {"note": summary(done), "row": {"benchmark": name, **done.to_dict(), "limits": found}}


@cache
def _limits(device: torch.device, quick: bool) -> dict[str, float]:
    """Limits of the machine, measured once per worker."""
    return limits(Setting(device, Path(), quick))


def run_two_processes(setting: Setting) -> Iterator[Event]:
    """Train with one process and with two, each with half of the batch; the losses must agree.

    Raises:
        RuntimeError: If a process fails or a loss differs by more than 1e-9, relative.
    """
    from benchmarks.material import tile_files
    from dino import api
    from dino.config.load import load_config
    from dino.config.schema import PatchConfig

    nccl = setting.on_gpu and torch.cuda.device_count() >= 2
    device = "cuda" if nccl else "cpu"
    backend = "nccl" if nccl else "gloo"
    note = "NCCL on two GPUs" if nccl else f"gloo on the CPU; NCCL was not run ({torch.cuda.device_count()} GPUs)"
    data = tile_files(setting.folder / "few tiles", 16)[0].parent
    one, two = (setting.folder / name for name in ("one process", "two processes"))
    settings = {**TWO_PROCESSES, "speed.device": device}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    process = _pretrain(data, two, {**settings, "training.batch_size_per_gpu": 2}, launcher)
    words = {**settings, "data_dir": str(data), "output_dir": str(one)}
    api.pretrain(load_config(PatchConfig, recipe="patch_pathology", overrides=words))  # as the command does
    _expect_exit(process, (0,), two, setting)
    losses = {count: [line["loss"] for line in _metrics(run)] for count, run in ((1, one), (2, two))}
    error = max(abs(a / b - 1) for a, b in zip(losses[1], losses[2], strict=True))
    yield {"note": note, "processes": {"backend": backend, "losses": losses, "largest_relative_difference": error}}
    if not error < 1e-9:
        raise RuntimeError(f"expected equal losses with one process and two ({note}), found {losses}")


def run_training(setting: Setting, seconds: float = TRAINING_SECONDS) -> Iterator[Event]:
    """Train a ViT-S/16 until SIGTERM ends the run after ``seconds`` of training, and score its features by kNN.

    Raises:
        RuntimeError: If the run does not stop as it should (exit code 75, checkpoint saved) or its loss is not finite.
    """
    data, labels, source = _training_tiles(setting)
    run = setting.folder / "run"
    changes = {"speed.device": setting.device} if setting.quick else {"speed.num_workers": min(12, _cores() - 1)}
    settings = {**(QUICK_TRAINING if setting.quick else TRAINING), **changes}
    process = _pretrain(data, run, settings, [])
    try:
        stop_at = None
        while process.poll() is None and (stop_at is None or time.monotonic() < stop_at):
            time.sleep(0.2)
            if stop_at is None and _metrics(run):  # compiled: the training starts now
                stop_at = time.monotonic() + seconds
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        _expect_exit(process, (0, 75), run, setting)
    finally:
        process.kill()
    curve = [{key: line[key] for key in ("step", "loss", "samples_per_second", "data_wait")} for line in _metrics(run)]
    rates = sorted(line["samples_per_second"] for line in curve)
    median = rates[len(rates) // 2]
    facts = {"tiles": source, "settings": settings, "curve": curve, "images_per_second": median}
    note = f"{curve[-1]['step']} steps, loss {curve[0]['loss']:.2f} to {curve[-1]['loss']:.2f}, {median:,.0f} img/s"
    yield {"note": note, "training": facts}
    if not all(line["loss"] == line["loss"] for line in curve):
        raise RuntimeError(f"expected finite losses, found {note}")
    if labels is not None:
        from dino import api
        from dino.config.load import load_config
        from dino.config.schema import KnnConfig

        k = 2 if setting.quick else 20
        # The quick run labels the tiles that it trains on, and reports no score.
        words = [f"k=[{k}]", *([f"device={setting.device}", "allow_leakage=true"] if setting.quick else [])]
        scores = api.evaluate_knn(str(run), labels, load_config(KnnConfig, overrides=words))
        found = {name: scores[name][f"knn_{k}_accuracy"] for name in ("model", "random_initialization", "pixels_8x8")}
        shown = ", ".join(f"{name} {value:.3f}" for name, value in found.items())
        yield {"note": f"{note}; {k}-NN accuracy: {shown}", "training": {**facts, "k": k, "knn": found}}


def _training_tiles(setting: Setting) -> tuple[Path, Path | None, str]:
    """Folder of tiles, their labels if they have any, and where they come from."""
    from benchmarks.material import tile_files

    shared = Path(os.environ.get("DINO_TEST_DATA", "."), "crc5")
    if shared.is_dir() and not setting.quick:
        return shared / "train", shared / "labels.csv", "DINO_TEST_DATA/crc5: 2,500 colorectal tiles"
    paths = tile_files(setting.folder / "training tiles", 2048 if not setting.quick else 16)
    source = "cut from the sample slide, since DINO_TEST_DATA/crc5 was not found"
    if not setting.quick:
        return paths[0].parent, None, source
    labels = setting.folder / "labels.csv"
    rows = [f"{path},{'ab'[i % 2]},{'train' if i < 10 else 'test'},held{i}" for i, path in enumerate(paths)]
    labels.write_text("\n".join(["image_path,label,partition,slide_id", *rows]))
    return paths[0].parent, labels, source


def _pretrain(data: Path, run: Path, settings: dict[str, Any], launcher: list[str]) -> subprocess.Popen:
    """Start ``dino pretrain patch``; its output goes to a file beside the run."""
    words = [f"{key}={value}" for key, value in settings.items()]
    command = [sys.executable, *launcher, "-m", "dino", "pretrain", "patch", str(data), str(run), *words]
    with _log(run).open("wb") as log:
        return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)


def _expect_exit(process: subprocess.Popen, codes: tuple[int, ...], run: Path, setting: Setting) -> None:
    seconds = 45 * (QUICK_FACTOR if setting.quick else 1)
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.terminate()
        raise RuntimeError(f"expected the training to end in {seconds} s, found: {_tail(_log(run))}") from None
    if code not in codes:
        raise RuntimeError(f"expected exit code {codes} of the training, found {code}: {_tail(_log(run))}")


def _log(run: Path) -> Path:
    return run.with_name(f"{run.name}.log")


def _tail(path: Path, count: int = 2000) -> str:
    return path.read_text("utf-8", errors="replace")[-count:] if path.exists() else ""


def _metrics(run: Path) -> list[dict[str, float]]:
    path = run / "metrics.jsonl"
    lines = path.read_text("utf-8").split("\n")[:-1] if path.exists() else []  # the last one may be incomplete
    return [json.loads(line) for line in lines]


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# --------------------------------------------------------------------------------------------------- the worker


def work(names: list[str], events: Path, setting: Setting) -> None:
    """Run parts one after another and append what happens to ``events``; the first error ends the process.

    After an error the state of the device is unknown, therefore the supervisor starts a new worker.
    """
    known = {part.name: part for part in parts()}
    with events.open("a", encoding="utf-8") as file:

        def tell(event: Event) -> None:
            file.write(json.dumps(event, default=str) + "\n")
            file.flush()

        for name in names:
            tell({"part": name, "state": "running"})
            share = 0.6 * known[name].seconds  # set-up and the last round take the rest
            bounded = Setting(
                setting.device, setting.folder, setting.quick, None, progress.say, time.monotonic() + share
            )
            try:
                for event in known[name].run(bounded):
                    tell({"part": name, **event})
            except Exception as error:
                hint = ""
                if isinstance(error, ModuleNotFoundError):
                    hint = f"; put the wheel of {error.name} into {WHEELS.name}/"
                detail = traceback.format_exc(limit=-6)
                tell({"part": name, "state": "failed", "note": _first_line(error) + hint, "traceback": detail})
                sys.exit(1)
            tell({"part": name, "state": "passed"})


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


# ----------------------------------------------------------------------------------------------- the supervisor


def supervise(report: Report, arguments: argparse.Namespace, folder: Path) -> None:
    """Start workers until every part is over."""
    factor = QUICK_FACTOR if arguments.quick else 1
    limits_s = {STARTUP: factor * STARTUP_SECONDS, **{part.name: factor * part.seconds for part in parts()}}
    total = factor * arguments.seconds
    deadline = report.started + total
    while report.waiting():
        if time.monotonic() >= deadline:
            for name in report.waiting():
                report.apply({"part": name, "state": "failed", "note": f"not run: {total:.0f} s were over"})
            return
        first, log = report.waiting()[0], folder / "worker.log"
        events = folder / f"events {len(report.waiting())}.jsonl"
        command = [sys.executable, "-m", "benchmarks.gpu", *report.waiting(), "--worker", str(events)]
        command += ["--device", arguments.device, *(["--quick"] if arguments.quick else [])]
        with log.open("wb") as output:
            worker = subprocess.Popen(
                command, cwd=ROOT, env=_environment(folder), stdout=output, stderr=output, start_new_session=True
            )
        try:
            reason = follow(worker, events, report, limits_s, deadline)
        finally:
            stop(worker)
        part = report.running() or (report.part(first) if first in report.waiting() else None)
        if part is not None:
            detail = {"note": reason, "traceback": _tail(log)}
            report.apply({"part": part["name"], "state": "failed", **detail})


def follow(worker: subprocess.Popen, events: Path, report: Report, limits_s: dict[str, float], deadline: float) -> str:
    """Record a worker's events until it ends or a limit is exceeded; returns why it ended."""
    position, started = 0, time.monotonic()
    while True:
        code = worker.poll()  # before the last events are read
        if events.exists():
            with events.open("rb") as file:
                file.seek(position)
                *lines, rest = file.read().split(b"\n")
                position = file.tell() - len(rest)
            for line in lines:
                report.apply(json.loads(line))
        if code is not None:
            return f"the worker process ended with code {code}"
        part, now = report.running(), time.monotonic()
        limit = limits_s[part["name"]] if part else limits_s[STARTUP]
        if now - (part["started"] if part else started) > limit:
            return f"stopped at its limit of {limit:.0f} s"
        if now > deadline:
            return "stopped: the total time is over"
        time.sleep(0.1)


def stop(worker: subprocess.Popen) -> None:
    """End a worker and the processes it has started: torchrun passes SIGTERM on to its own."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(worker.pid, sign)
            worker.wait(GRACE_SECONDS)
        except ProcessLookupError:
            break
        except subprocess.TimeoutExpired:
            continue
    worker.wait()


def _environment(folder: Path) -> dict[str, str]:
    """Environment of a worker: this checkout and the unpacked wheels come first on the path."""
    site = folder / "site"
    if not site.exists():
        site.mkdir()
        for wheel in sorted(WHEELS.glob("*.whl")):
            with zipfile.ZipFile(wheel) as content:
                content.extractall(site)
    paths = [str(ROOT), str(site), *filter(None, [os.environ.get("PYTHONPATH")])]
    # cuBLAS gives the same bits in each run only with a workspace of fixed size (tests of resuming).
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}


# ------------------------------------------------------------------------------------------------------- command


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    names = [part.name for part in parts()]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="PART", help=f"parts to run (default: all): {', '.join(names)}")
    parser.add_argument(
        "--output", type=Path, default=ROOT / "output" / "gpu", metavar="DIR", help="default: %(default)s"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: checks that everything runs")
    parser.add_argument("--seconds", type=float, default=TOTAL_SECONDS, help="limit of all parts (%(default)g)")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args(words)
    unknown = [name for name in arguments.names if name not in names]
    if unknown:
        parser.error(f"expected parts from {', '.join(names)}, found {', '.join(unknown)}")
    return arguments


def main(words: list[str] | None = None) -> int:
    """Run the parts and write the results; 1 if a part failed, 2 without a GPU (unless ``--quick``)."""
    arguments = parse(words)
    cuda = torch.cuda.is_available()
    if not cuda and not arguments.quick:
        progress.say("expected a CUDA device, found none; --quick checks on the CPU that everything runs")
        return 2
    device = distributed.choose_device(arguments.device)
    if arguments.worker is not None:
        work(arguments.names, arguments.worker, Setting(device, arguments.worker.parent, arguments.quick))
        return 0
    names = arguments.names or [part.name for part in parts()]
    arguments.output.mkdir(parents=True, exist_ok=True)
    facts = {**environment(device), **gpu_facts(device), "quick": arguments.quick}
    content = {"environment": facts, "parts": [{"name": name, "state": "waiting"} for name in names], "rows": []}
    report = Report(arguments.output / "gpu.json", content)
    report.save()
    progress.say(f"{facts['device']}, torch {facts['versions']['torch']}: {', '.join(names)}")
    with tempfile.TemporaryDirectory() as folder:
        supervise(report, arguments, Path(folder))
    return finish(report)


def finish(report: Report) -> int:
    """Draw the figure, print the table, and return the exit code."""
    for part in report.content["parts"]:
        part.pop("started", None)
    report.save()
    picture = report.path.with_suffix(".png")
    try:
        draw(report.content, picture)
    except Exception as error:  # the numbers are there without it
        progress.warn(f"no figure: {type(error).__name__}: {error}")
        picture = None
    cells = [
        (part["name"], part["state"], f"{part.get('seconds', 0):.0f} s", part.get("note", ""))
        for part in report.content["parts"]
    ]
    progress.table(cells, ("part", "state", "time", "note"))
    progress.say(
        f"{report.content['seconds']:.0f} s; results in {report.path}" + (f" and {picture}" if picture else "")
    )
    return 1 if report.failed() or picture is None else 0


if __name__ == "__main__":
    sys.exit(main())
