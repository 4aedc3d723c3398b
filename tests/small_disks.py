"""Fills small disks for tests."""

from pathlib import Path


def fill(folder: Path) -> None:
    """Fill the disk of ``folder`` with a file ``filler``; removing the file frees the space."""
    with (folder / "filler").open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass
