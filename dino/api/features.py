"""Folders of features of slides: where they are, whether they are of one encoder, and what that was trained on."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dino.api.labelled import Column, Embedding, facts_of, load_models, unique_names
from dino.api.roots import Root, data_folders
from dino.config.schema import EvaluationConfig
from dino.data.bags import SUBFOLDERS, Bag, find_bags, open_bag
from dino.data.datasets import TILE_NAME
from dino.errors import DataError
from dino.evaluate import MODEL, LabelTable, Pretraining
from dino.evaluate.leakage import check_leakage as compare_with_pretraining
from dino.evaluate.slides import Case, CaseTable, read_slides_of_patients, unknown_patient
from dino.extraction.record import RECORD, read_record
from dino.files import printable
from dino.models.weights import LoadedBackbone, load_backbone_file
from dino.slides.tables import STATUS_TABLE, read_status

OF_ENCODER = ("fingerprint", "encoder")  # attributes of the features
OF_MODELS = ("checkpoints", "config.json", "config.yaml")  # in run folders, exports and folders of timm
ROWS_AT_ONCE = 1 << 14  # of a file of features
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

    def model(self) -> LoadedBackbone | str:
        """Their encoder, if it is recorded and still there; else why it is not known, in words."""
        attributes = next(iter(self.bags.values())).attributes
        model = str(attributes.get("model") or "")
        if not model or not Path(model).exists():
            found = f"it is not at {printable(model)}" if model else "it is not recorded"
            return f"the model of the features is unknown, {found}"
        loaded = load_backbone_file(model)
        known = loaded.fingerprint == attributes.get("fingerprint")
        return loaded if known else f"{printable(model)} is another model than that of the features"

    def of_tiles(self, names: Sequence[str], slides: Sequence[str]) -> Callable[[], np.ndarray]:
        """Find the features of tiles, without reading them.

        Args:
            names: ``<slide>_<x>_<y>.<ext>`` of each, as ``dino tile`` names tile files.
            slides: Their slides.

        Returns:
            A function that reads them, as ``(N, D)`` float16 if all are stored so, else float32. It raises DataError if
            a file has changed or has values that are not finite.

        Raises:
            DataError: If a tile has no features.
        """
        places, of_slide = [_place(name) for name in names], dict[str, list[int]]()
        for i, slide in enumerate(slides):
            of_slide.setdefault(slide, []).append(i)
        found: list[tuple[Bag, np.ndarray, np.ndarray]] = []  # with the tiles of each slide, and their rows in its file
        for slide, tiles in of_slide.items():
            bag = self.bags[slide]
            if bag.coords is None:
                raise DataError(f"expected coordinates of tiles in {printable(bag.path)}, found none")
            row: dict[Any, int] = {(x, y): i for i, (x, y) in enumerate(bag.coords.tolist())}
            absent = [i for i in tiles if places[i] not in row]
            if absent:
                raise DataError(
                    f"expected features of every labelled tile in {printable(bag.path)}, found none of {len(absent)} "
                    f"of {len(tiles)}, the first {printable(names[absent[0]])}; are its x and y those of tiles.csv?"
                )
            rows = np.array([row[places[i]] for i in tiles])
            order = np.argsort(rows)  # neighbours in the file are read together
            found.append((bag, np.array(tiles)[order], rows[order]))
        half = all(bag.features[:0].dtype == np.float16 for bag, _, _ in found)
        return partial(_read_tiles, found, (len(names), found[0][0].dim), np.float16 if half else np.float32)


def _read_tiles(
    found: Sequence[tuple[Bag, np.ndarray, np.ndarray]], shape: tuple[int, int], dtype: type[np.floating]
) -> np.ndarray:
    features = np.empty(shape, dtype)
    for bag, tiles, rows in found:
        for start in range(0, len(tiles), ROWS_AT_ONCE):
            part = slice(start, start + ROWS_AT_ONCE)
            features[tiles[part]] = bag.read(rows[part])
    return features


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


def is_features(model: str) -> bool:
    """Whether a model is given by a folder of its features, or a ROOT that has such folders."""
    folder = Path(model)
    if not folder.is_dir() or any((folder / name).exists() for name in OF_MODELS):
        return False
    inside = (path for pattern in FOLDERS for path in folder.glob(pattern))
    return any(inside) or any(path for sub in SUBFOLDERS for path in (folder / sub).glob("*.h5"))


def with_recorded_patients(table: LabelTable, labels: Path, models: Sequence[str]) -> LabelTable:
    """A table of labels with the patients of its slides that ROOTs record, where it names none itself.

    Args:
        table: The labels.
        labels: Their file; a ROOT that it is in records patients.
        models: Models; so do the ROOTs of folders of features.

    Raises:
        DataError: If the status of a ROOT's slides cannot be read.
    """
    if table.patient_ids:
        return table
    patients: dict[str, str] = {}
    for root in (labels.parent, *(Path(model).parent for model in models if is_features(model))):
        if (root / STATUS_TABLE).is_file():
            patients = {slide: row.patient_id for slide, row in read_status(root).items()} | patients
    found = [patients.get(slide, "") for slide in table.slides]
    return replace(table, patient_ids=found) if any(found) else table


def columns_of(
    table: LabelTable, labels: Path, models: Sequence[str], config: EvaluationConfig, device: torch.device
) -> tuple[list[Column], list[dict[str, Any]]]:
    """Features of the rows of a table by models and their baselines.

    Args:
        table: The rows.
        labels: Their file, for messages.
        models: Models, or folders of features that were extracted.
        config: Settings.
        device: Where to compute.

    Returns:
        A column for each model, in order, then those of the baselines of the first model that is not a folder; and what
        is recorded of each model, see :func:`dino.api.labelled.facts_of`.

    Raises:
        DataError: If rows have no features or files, or a model has seen tested rows.
        CheckpointError: If a model cannot be loaded.
    """
    names = unique_names(models)
    networks = [i for i, model in enumerate(models) if not is_features(model)]
    if networks and not table.stored:
        raise DataError(
            f"{labels}: expected a column image_path for the model {models[networks[0]]}, found tiles by slide_id, x "
            "and y; give a folder of features that `dino extract` wrote instead of the model, or tile files"
        )
    loaded = load_models([models[i] for i in networks], config)
    facts = {i: facts_of(table, labels, one, config.allow_leakage) for i, one in zip(networks, loaded, strict=True)}
    stored = {i: _stored_column(table, names[i], model) for i, model in enumerate(models) if i not in facts}
    for i, (_, encoder) in stored.items():
        unknown = {"compared": f"nothing: {encoder}", "allowed": False}
        known = None if isinstance(encoder, str) else facts_of(table, labels, encoder, config.allow_leakage)
        facts[i] = known or {"leakage": unknown, "selection": unknown}
    embedding = Embedding(table, config, device)
    embedded = iter(embedding.columns([names[i] for i in networks], loaded) if loaded else ())
    columns = [stored[i][0] if i in stored else next(embedded) for i in range(len(models))]
    return [*columns, *embedded], [facts[i] for i in range(len(models))]


def _stored_column(table: LabelTable, name: str, folder: str) -> tuple[Column, LoadedBackbone | str]:
    """Features of the rows of a table from a folder, and :meth:`FeatureSet.model` of them."""
    features = open_features(find_features([folder], None)[0], sorted({*table.slides}))
    load = features.of_tiles([path.name for path in table.paths], table.slides)
    return Column(name, MODEL, load, folder, features.fingerprint), features.model()


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


def open_features(files: Files, slides: Sequence[str]) -> FeatureSet:
    """Open the features of slides.

    Args:
        files: The files.
        slides: The slides.

    Raises:
        DataError: If they are of several encoders or dimensions, not of the recorded one, or a file has no features.
    """
    absent = [slide for slide in slides if slide not in files.paths]
    if absent:
        raise DataError(
            f"expected features of every labelled slide in {files.folder}, found none of {len(absent)} of "
            f"{len(slides)}, the first '{printable(absent[0])}'; extract them, or remove their rows from the labels"
        )
    bags = {slide: open_bag(files.paths[slide]) for slide in slides}
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


def _place(name: str) -> tuple[int, int] | None:
    match = TILE_NAME.fullmatch(name.rpartition(".")[0])
    return (int(match["x"]), int(match["y"])) if match else None


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
    loaded = features.model()
    if isinstance(loaded, str):
        return {"compared": f"nothing: {loaded}", "allowed": False}
    slides = [(slide, case) for case in tested for slide in case.slides]
    rows = LabelTable(
        [Path(slide) for slide, _ in slides],
        ["" for _ in slides],
        ["test" for _ in slides],
        [slide for slide, _ in slides],
        ["" if case.patient == unknown_patient(slide) else case.patient for slide, case in slides],
    )
    patients: dict[str, str] = {}
    for folder in data_folders(loaded.config or {}):
        patients |= Root(folder).patients
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
