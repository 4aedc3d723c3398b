"""Disks for tests: what fills them."""

from pathlib import Path


def fill(folder: Path) -> None:
    """Fill the disk that ``folder`` is on, with a file ``filler`` that gives the room back when it is removed."""
    with (folder / "filler").open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass
