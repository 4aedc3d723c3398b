"""Whether a model was pretrained on the files, slides or patients that it is tested on."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dino.errors import DataError
from dino.evaluate.contents import find_in_folder, find_in_stored
from dino.evaluate.labels import LabelTable, slide_of_name
from dino.files import printable
from dino.privacy import count, known

NAMED = 3  # examples listed in an error
KINDS = ("slides", "patients", "files")


@dataclass(frozen=True)
class Pretraining:
    """What a model was pretrained on, as far as it is known.

    Attributes:
        slides: ``slide_ids`` and ``patient_ids`` of the checkpoint, or hashes of them as
            :func:`dino.privacy.hash_record` returns; empty if it records none.
        patients: Patient of each slide of the data folder, also of slides that were held out.
        files: Folders of the files that were trained on and names of the files in each, as far as they are there.
        stored: Sizes in bytes of the files in shards that were trained on, and a function that returns the bytes of
            one of them.
    """

    slides: Mapping[str, Any] = field(default_factory=dict)
    patients: Mapping[str, str] = field(default_factory=dict)
    files: Sequence[tuple[Path, Sequence[str]]] = ()
    stored: Sequence[tuple[np.ndarray, Callable[[int], bytes]]] = ()


def check_leakage(
    table: LabelTable,
    trained: Pretraining,
    allow: bool,
    held_out: Sequence[str] = ("test",),
    setting: str = "allow_leakage",
) -> dict[str, Any]:
    """Check that a model was not pretrained on the files, slides or patients of the test rows.

    Without a ``slide_id`` column the slide is parsed from the file name (``<slide>_<x>_<y>``, from the right); a name
    of any other form is compared as a whole. A row without a patient has that which the data folder records of its
    slide. Files are compared by path and by content.

    Args:
        table: The labels.
        trained: What the model was pretrained on.
        allow: Accept what was pretrained on; it is listed in the result.
        held_out: Partitions that must not have been pretrained on.
        setting: Name of the setting that is ``allow``, for the message.

    Returns:
        ``compared`` (a description), ``seen_slides``, ``seen_patients``, ``seen_files`` and ``allowed``.

    Raises:
        DataError: If test rows were pretrained on, and ``allow`` is False; if a file cannot be read.
    """
    test = [i for partition in held_out for i in table.rows(partition)]
    named = table.slide_ids or [""] * len(table.paths)
    slides = {i: named[i] or slide_of_name(table.paths[i].name) for i in test}
    given = table.patient_ids or [""] * len(table.paths)
    patients = [given[i] or trained.patients.get(slides[i], "") for i in test]
    paths = [table.paths[i] for i in test]
    folders = trained.files if table.stored else []
    found = [path for folder, names in folders for path in find_in_folder(paths, folder, names)]
    for sizes, content in trained.stored if table.stored else ():
        found += find_in_stored(paths, sizes, content)
    files = list(dict.fromkeys(found))
    seen = {
        "slides": sorted(known(slides.values(), trained.slides, "slide")),
        "patients": sorted(known(patients, trained.slides, "patient")),
        "files": [printable(path) for path in files],
    }
    kind = next((kind for kind in KINDS if seen[kind]), None)
    if kind and not allow:
        raise DataError(
            f"expected {' and '.join(held_out)} {kind} that the model has not been pretrained on, found "
            f"{len(seen[kind])} that it has ({_first(seen[kind])}); remove them, or accept an optimistic score with "
            f"{setting}=true"
        )
    return {
        "compared": _compared(table, trained, any(patients)),
        **{f"seen_{name}": found for name, found in seen.items()},
        "allowed": bool(allow and kind),
    }


def _compared(table: LabelTable, trained: Pretraining, patients: bool) -> str:
    slides = count(trained.slides, "slide") > 0
    known_patients = count(trained.slides, "patient") > 0
    compared = table.stored and (trained.files or trained.stored)
    if not slides and not known_patients and not compared:
        return "nothing: the model has no record of the slides it was pretrained on"
    what = []
    if slides:
        what.append("slides by slide_id" if table.slide_ids else "slides by file name")
    if known_patients and patients:
        what.append("patients by patient_id" if table.patient_ids else "patients of the slides")
    if compared:
        what.append("files by path and content" if trained.files else "files by content")
    return " and ".join(what) or "nothing: the labels have no patient_id"


def _first(items: Iterable[object]) -> str:
    items = list(items)
    return ", ".join(str(item) for item in items[:NAMED]) + (", ..." if len(items) > NAMED else "")
