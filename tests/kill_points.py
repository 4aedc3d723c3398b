"""Runs a command of dino in processes that are killed by SIGKILL, each at a different file system call.

``python kill_points.py ROOT POINTS ARGUMENT...`` runs ``dino ARGUMENT...`` once on a copy of ROOT, to its end, and then
on POINTS other copies: on each it is killed at one of POINTS calls, spread evenly over all calls that change something
under ROOT, and run again. ``{root}`` in an argument is replaced by the copy. Prints one line per point.
"""

import importlib
import os
import shutil
import signal
import sys
from pathlib import Path

# Imported once, in the parent, because each child would take seconds for them.
IMPORTED = ["dino.api.extracting", "dino.api.tiling", "dino.cli.main", "h5py", "openslide", "cv2"]
IMPORTED += ["hs2p.artifacts", "hs2p.tile_qc", "hs2p.tiling.coverage", "hs2p.tiling.generate", "hs2p.tiling.mask"]
IMPORTED += ["hs2p.tiling.tar", "hs2p.wsi.reader", "hs2p.wsi.visualization"]
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link"}


def changes(event: str, arguments: tuple, root: str) -> bool:
    """Whether an audited call changes something under ``root``."""
    if event == "open":
        return str(arguments[0]).startswith(root) and bool(arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
    return event in CHANGES and str(arguments[0]).startswith(root)


def run(command: list[str], root: Path, kill_at: int = -1) -> tuple[int, int]:
    """Run ``dino`` in a child that is killed just before change ``kill_at``; its wait status and number of changes."""
    counts, reports = os.pipe()
    child = os.fork()
    if child:
        os.close(reports)
        with os.fdopen(counts, "rb") as pipe:
            seen = len(pipe.read())
        return os.waitpid(child, 0)[1], seen

    def watch(event: str, arguments: tuple) -> None:
        nonlocal kill_at
        if changes(event, arguments, str(root)):
            os.write(reports, b".")
            if kill_at == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            kill_at -= 1

    from dino.cli.main import main

    sys.addaudithook(watch)
    sys.argv = ["dino", *(argument.format(root=root) for argument in command)]
    sys.stdout = sys.stderr
    code = 1
    try:
        main()
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        os._exit(code)


def visible(root: Path) -> dict[str, bytes]:
    """Every file under its final name."""
    paths = [
        p for p in root.rglob("*") if p.is_file() and not any(part[0] == "." for part in p.relative_to(root).parts)
    ]
    return {str(p.relative_to(root)): p.read_bytes() for p in paths if not p.name.endswith(".lock.json")}


def everything(root: Path) -> set[str]:
    """Every path, including hidden ones, except lock files."""
    return {str(p.relative_to(root)) for p in root.rglob("*") if ".lock.json" not in p.name}


def main() -> None:
    """See the module."""
    for name in IMPORTED:
        importlib.import_module(name)
    start, points, arguments = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    complete, root = start.with_name("complete"), start.with_name("killed")
    shutil.copytree(start, complete)
    status, total = run(arguments, complete)
    assert status == 0 and total > points, (status, total)
    wanted = visible(complete)
    for point in range(points):
        moment = (2 * point + 1) * total // (2 * points)
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(start, root)
        status, _ = run(arguments, root, moment)
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, status
        found = visible(root)
        assert all(wanted[name] == content for name, content in found.items()), moment
        status, _ = run(arguments, root)
        assert status == 0, status
        assert visible(root) == wanted and everything(root) == everything(complete), moment
        print(f"killed before change {moment} of {total}, with {len(found)} of {len(wanted)} files", flush=True)


if __name__ == "__main__":
    main()
