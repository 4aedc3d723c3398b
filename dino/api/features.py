"""Folders of features of slides: where they are, whether they are of one encoder, and what that was trained on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dino.api.labelled import unique_names
from dino.api.roots import Root
from dino.data.bags import Bag, find_bags, open_bag
from dino.errors import DataError
from dino.evaluate.labels import LabelTable
from dino.evaluate.leakage import Pretraining
from dino.evaluate.leakage import check_leakage as compare_with_pretraining
from dino.evaluate.slides import Case, CaseTable, read_slides_of_patients, unknown_patient
from dino.extraction.record import RECORD, read_record
from dino.files import printable
from dino.models.weights import load_backbone_file
from dino.slides.tables import STATUS_TABLE, read_status

OF_ENCODER = ("fingerprint", "encoder")  # attributes of the features
FOLDERS = ("features_*", "region_features_*", "slide_features*")


@dataclass(frozen=True)
class FeatureSet:
    """The features of one encoder.

    Attributes:
        name: Unique, short.
        folder: Where they are.
        bags: By slide.
    """

    name: str
    folder: Path
    bags: Mapping[str, Bag]

    @property
    def fingerprint(self) -> str:
        """Of the encoder, if it is recorded."""
        return next((str(bag.attributes.get("fingerprint") or "") for bag in self.bags.values()), "")


@dataclass(frozen=True)
class Files:
    """The files of a folder of features.

    Attributes:
        name: Unique, short.
        folder: The folder.
        paths: Its files by slide.
    """

    name: str
    folder: Path
    paths: Mapping[str, Path]


def find_features(given: Sequence[str | Path], encoder: str | None) -> list[Files]:
    """Find folders of features.

    Args:
        given: Folders, or ROOTs.
        encoder: The encoder whose tile features of ROOTs are read.

    Raises:
        DataError: If one is not there or empty, or is a ROOT and no encoder is named.
    """
    folders = [_folder(Path(one), encoder) for one in given]
    names = unique_names([str(folder) for folder in folders])
    return [Files(name, folder, find_bags(folder)) for name, folder in zip(names, folders, strict=True)]


def _folder(given: Path, encoder: str | None) -> Path:
    folder = given / f"features_{encoder}" if encoder else given
    inside = [path.name for pattern in FOLDERS for path in sorted(given.glob(pattern)) if path.is_dir()]
    if not folder.is_dir() or (not encoder and inside):
        hint = f"; it has {', '.join(inside)}: give one of these" if inside else ""
        raise DataError(f"expected a folder of features at {folder}, found {'a ROOT' if inside else 'none'}{hint}")
    return folder


def slides_of_patients(table: CaseTable, found: Sequence[Files], path: str | None) -> dict[str, list[str]]:
    """Slides with features of each patient of a table without slides; a file may also be named after a patient.

    Args:
        table: The labels.
        found: The features; ROOTs above their folders record the patients of their slides.
        path: A table of slides and patients that is read instead.
    """
    if all(case.slides for case in table.cases):
        return {}
    if path:
        slides = read_slides_of_patients(Path(path))
    else:
        slides = {}
        for status in (files.folder.parent / STATUS_TABLE for files in found):
            for row in read_status(status.parent).values() if status.is_file() else ():
                if row.patient_id and row.slide_id not in slides.setdefault(row.patient_id, []):
                    slides[row.patient_id].append(row.slide_id)
    for files in found:
        slides = {patient: [one for one in names if one in files.paths] for patient, names in slides.items()}
    return {case.name: slides.get(case.name) or [case.name] for case in table.cases}


def open_features(files: Files, table: CaseTable) -> FeatureSet:
    """Open the features of all labelled slides.

    Args:
        files: The files.
        table: The labels.

    Raises:
        DataError: If they are of several encoders or dimensions, not of the recorded one, or a file has no features.
    """
    bags = {slide: open_bag(files.paths[slide]) for case in table.cases for slide in case.slides}
    first, *others = bags
    recorded, found = read_record(files.folder / RECORD).get("fingerprint"), bags[first].attributes.get("fingerprint")
    if recorded and recorded != found:
        raise DataError(
            f"expected features of the encoder that {files.folder / RECORD} records ({_short(recorded)}), found "
            f"fingerprint {_short(found)} of '{printable(first)}'; extract again into an empty folder"
        )
    for slide in others:
        pairs = [(kind, *(bags[one].attributes.get(kind) for one in (first, slide))) for kind in OF_ENCODER]
        pairs.append(("D", bags[first].dim, bags[slide].dim))
        for kind, expected, other in pairs:
            if expected != other:
                raise DataError(
                    f"expected features of one encoder in {files.folder}, found {kind} {_short(expected)} of "
                    f"'{printable(first)}' and {_short(other)} of '{printable(slide)}'; move one encoder's away"
                )
    empty = next((slide for slide, bag in bags.items() if not len(bag)), None)
    if empty is not None:
        raise DataError(f"expected features in {printable(bags[empty].path)}, found 0 rows; remove the slide's label")
    return FeatureSet(files.name, files.folder, bags)


def _short(value: Any) -> str:
    return "unknown" if value is None else str(value)[:16]


def check_leakage(features: FeatureSet, tested: Sequence[Case], allow: bool) -> dict[str, Any]:
    """Compare the tested slides and patients with those that the model of the features was pretrained on.

    Args:
        features: The features.
        tested: The cases that are predicted.
        allow: Accept what was pretrained on; it is listed in the result.

    Returns:
        ``compared`` (a description), ``allowed``, and what was seen, as :func:`dino.evaluate.check_leakage`.

    Raises:
        DataError: If it was pretrained on some, and ``allow`` is False.
    """
    attributes = next(iter(features.bags.values())).attributes
    model, fingerprint = str(attributes.get("model") or ""), attributes.get("fingerprint")
    if not model or not Path(model).exists():
        found = f"it is not at {printable(model)}" if model else "it is not recorded"
        return {"compared": f"nothing: the model of the features is unknown, {found}", "allowed": False}
    loaded = load_backbone_file(model)
    if loaded.fingerprint != fingerprint:
        return {"compared": f"nothing: {printable(model)} is another model than that of the features", "allowed": False}
    slides = [(slide, case) for case in tested for slide in case.slides]
    rows = LabelTable(
        [Path(slide) for slide, _ in slides],
        ["" for _ in slides],
        ["test" for _ in slides],
        [slide for slide, _ in slides],
        ["" if case.patient == unknown_patient(slide) else case.patient for slide, case in slides],
    )
    root = Path((loaded.config or {}).get("data_dir") or "")
    patients = Root(root).patients if (root / STATUS_TABLE).is_file() else {}
    trained = Pretraining(loaded.details.get("training_slides") or {}, patients)
    return compare_with_pretraining(rows, trained, allow)


def in_memory(bags: Mapping[str, Bag], limit_gb: float) -> dict[str, Bag]:
    """The bags, as many of them as fit with their features in memory, in the type in which they are stored."""
    left, found = limit_gb * 1e9, {}
    for slide, bag in bags.items():
        size = bag.features[:1].nbytes * len(bag)
        fits = size <= left
        left -= size * fits
        found[slide] = replace(bag, features=bag.features[:]) if fits else bag
    return found
