"""Feature extraction with the teacher of a run: ``python3 dino/extract_features.py KEY=VALUE...``."""

import sys
from pathlib import Path

if not __package__:  # run by path, here or in a spawned worker: import from the parent of this folder instead
    here = Path(__file__).resolve().parent
    sys.path[:] = [entry for entry in sys.path if not entry or Path(entry).resolve() not in (here, here.parent)]
    sys.path.insert(0, str(here.parent))

from dino.cli.main import extract_entry_point

if __name__ == "__main__":
    extract_entry_point()
