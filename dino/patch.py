"""Level 1, DINO on tiles with the original's recipe: ``python3 dino/patch.py KEY=VALUE...``."""

import sys
from pathlib import Path

if not __package__:  # run by path, here or in a spawned worker: import from the parent of this folder instead
    here = Path(__file__).resolve().parent
    sys.path[:] = [entry for entry in sys.path if not entry or Path(entry).resolve() not in (here, here.parent)]
    sys.path.insert(0, str(here.parent))

from dino.cli.main import patch_entry_point

if __name__ == "__main__":
    patch_entry_point()
