"""Tables of labelled slides or patients: what is predicted of each, from which slides, and how they are split."""

import difflib
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from dino.errors import ConfigError, DataError
from dino.evaluate.labels import PARTITIONS
from dino.evaluate.outcomes import Classes, Numbers, Outcome, Survival
from dino.evaluate.tables import MISSING, canonical, check_columns, first_few, read_rows, refuse_lines
from dino.evaluate.task import Fold, grouped_folds, single_fold

TASKS = ("classification", "regression", "survival")
UNITS = ("slide", "patient")
EVENTS = {"1": True, "1.0": True, "true": True, "0": False, "0.0": False, "false": False}


@dataclass(frozen=True)
class Case:
    """One labelled slide or patient.

    Attributes:
        name: Its id.
        patient: The patient; the slide where that is unknown.
        slides: Its slides; none where a table names patients alone.
        values: What the table has of it, by column.
        partition: ``train``, ``val`` or ``test``; blank without that column.
    """

    name: str
    patient: str
    slides: tuple[str, ...]
    values: Mapping[str, str]
    partition: str = ""


@dataclass(frozen=True)
class CaseTable:
    """Labelled slides or patients.

    Attributes:
        path: The table.
        task: One of :data:`TASKS`.
        unit: One of :data:`UNITS`.
        cases: The rows; with unit ``patient``, one for each patient.
    """

    path: Path
    task: str
    unit: str
    cases: Sequence[Case]

    @property
    def groups(self) -> list[str]:
        """Patient of each case."""
        return [case.patient for case in self.cases]

    def outcome(self) -> Outcome:
        """What is predicted.

        Raises:
            DataError: If there is one class or value only, or no event.
        """
        outcome = OUTCOMES[self.task](self)
        if lacking := outcome.lacking(np.arange(len(self.cases))):
            found = f"only {_only(self)}" if self.task != "survival" else f"{len(self.cases)} censored cases"
            raise DataError(f"{self.path}: expected {lacking} among the labels, found {found}")
        return outcome

    def with_slides(self, slides_of: Mapping[str, Sequence[str]]) -> "CaseTable":
        """The table with the slides of each patient, where it names patients alone.

        Args:
            slides_of: Slides by patient.
        """
        return replace(
            self,
            cases=[
                case if case.slides else replace(case, slides=tuple(slides_of.get(case.name, ())))
                for case in self.cases
            ],
        )

    def with_features(self, available: Collection[str], where: str, max_missing: int) -> "CaseTable":
        """The cases of which there are features; of a patient, the slides of which there are.

        Args:
            available: Slides with features.
            where: The folder of the features, for the message.
            max_missing: How many cases without features, or with fewer slides than named, are accepted.

        Raises:
            DataError: If there are more.
        """
        found = [replace(case, slides=tuple(one for one in case.slides if one in available)) for case in self.cases]
        lacking = [
            old for old, new in zip(self.cases, found, strict=True) if not new.slides or new.slides != old.slides
        ]
        if len(lacking) > max_missing:
            missing = [one for case in lacking for one in case.slides or [case.name] if one not in available]
            close = difflib.get_close_matches(missing[0], available, 1, 0.6)
            hint = f" (the nearest to '{missing[0]}' is '{close[0]}')" if close else ""
            if any(case.slides == (case.name,) for case in lacking) and self.unit == "patient":
                hint += "; say which slides are theirs in a CSV, slides=FILE"
            raise DataError(
                f"{self.path}: expected features of every labelled {self.unit} in {where}, found none of "
                f"{len(missing)} ({first_few(missing)}){hint}; extract them, or leave them out with "
                f"max_missing={len(lacking)}"
            )
        return replace(self, cases=[case for case in found if case.slides])


OUTCOMES = {
    "classification": lambda table: Classes(canonical([case.values["label"] for case in table.cases])),
    "regression": lambda table: Numbers([float(case.values["label"]) for case in table.cases]),
    "survival": lambda table: Survival(
        [float(case.values["time"]) for case in table.cases],
        [EVENTS[case.values["event"].lower()] for case in table.cases],
    ),
}


def read_cases(path: Path, task: str | None = None, unit: str | None = None) -> CaseTable:
    """Read ``slide_id|patient_id`` and ``label``, or ``time,event``, and optionally ``partition``.

    Args:
        path: A CSV.
        task: One of :data:`TASKS`; None: classification, or survival of a table without a column label.
        unit: One of :data:`UNITS`; None: slides, or patients of a table without a column slide_id.

    Raises:
        DataError: If a column is missing, a value is blank or of another kind, a slide or patient is in two rows that
            do not agree, a patient in two partitions, or there is one class or value only, or no event.
        ConfigError: If there is no such task or unit.
    """
    rows = read_rows(path, ())
    columns = [name for name in rows[0] if any(row[name] for row in rows)]
    task = task or ("classification" if "label" in columns or "time" not in columns else "survival")
    unit = unit or ("slide" if "slide_id" in columns or "patient_id" not in columns else "patient")
    for name, value, known in (("task", task, TASKS), ("unit", unit, UNITS)):
        if value not in known:
            raise ConfigError(f"expected {', '.join(known)} as {name}, found '{value}'")
    predicted = ["time", "event"] if task == "survival" else ["label"]
    check_columns(path, columns, [f"{unit}_id", *predicted])
    _check_values(path, rows, task)
    refuse_lines(path, [i for i, row in enumerate(rows) if not row[f"{unit}_id"]], f"a {unit}_id", "blank ones")
    cases = [_case(row, unit, predicted, "partition" in columns) for row in rows]
    if "partition" in columns:
        unknown = [i for i, case in enumerate(cases) if not case.partition]
        refuse_lines(path, unknown, "train, val or test as partition", "others")
    table = CaseTable(
        path, task, unit, _merged(path, cases, unit, mergeable="slide_id" in columns and unit == "patient")
    )
    _check_partitions(table)
    table.outcome()
    return table


def read_slides_of_patients(path: Path) -> dict[str, list[str]]:
    """Slides by patient, from a table of ``slide_id`` (or hs2p's ``sample_id``) and ``patient_id``.

    Raises:
        DataError: If a column is missing.
    """
    rows = read_rows(path, ())
    slide = "sample_id" if "slide_id" not in rows[0] and "sample_id" in rows[0] else "slide_id"
    check_columns(path, list(rows[0]), [slide, "patient_id"])
    slides: dict[str, list[str]] = {}
    for row in rows:
        if row["patient_id"] and row[slide]:
            slides.setdefault(row["patient_id"], []).append(row[slide])
    return slides


def unknown_patient(slide: str) -> str:
    """What stands for the patient of a slide without one."""
    return f"slide {slide}"


def split(table: CaseTable, outcome: Outcome, folds: int, seed: int) -> list[Fold]:
    """The partitions of a table, or else folds of a cross-validation that are stratified and share no patient.

    Args:
        table: The cases.
        outcome: Of the cases.
        folds: Number of folds.
        seed: Seed of the folds.

    Raises:
        DataError: If there are fewer patients than folds, in all or of a class or with an event.
    """
    if table.cases[0].partition:
        partitions = [case.partition for case in table.cases]
        parts = {part: [i for i, one in enumerate(partitions) if one == part] for part in ("train", "test", "val")}
        if not parts["train"] or not parts["test"]:
            raise DataError(f"{table.path}: expected rows of partition train and test with features, found none of one")
        return [single_fold(parts["train"], parts["test"], parts["val"])]
    if len(set(table.groups)) < folds:
        raise DataError(
            f"{table.path}: expected at least as many patients (or slides) as folds, found {len(set(table.groups))} "
            f"and {folds} folds; set folds=N"
        )
    strata = outcome.strata_of(range(len(table.cases)), table.groups, folds)
    return grouped_folds(strata, table.groups, folds, seed)


def check_folds(table: CaseTable, outcome: Outcome, folds: Sequence[Fold]) -> None:
    """Check that no patient is on two sides of a fold, and that a model can be fitted to each fold's train rows.

    Raises:
        DataError: If it is not so.
    """
    for number, fold in enumerate(folds, 1):
        train, test = ({table.groups[int(row)] for row in rows} for rows in (fold.train, fold.test))
        if both := sorted(train & test):
            raise DataError(
                f"expected folds that share no patient, found {len(both)} in train and test rows of fold {number} "
                f"({first_few(both)}); let an evaluation of these labels write new ones"
            )
        if lacking := outcome.lacking(fold.train):
            raise DataError(
                f"{table.path}: expected {lacking} among the training rows of every fold, found none in fold {number} "
                f"of {len(folds)}; set fewer folds, or give a column partition"
            )


def _check_values(path: Path, rows: Sequence[Mapping[str, str]], task: str) -> None:
    def lines(column: str, good: Callable[[str], bool]) -> list[int]:
        return [i for i, row in enumerate(rows) if not good(row[column])]

    if task == "classification":
        refuse_lines(path, lines("label", lambda text: text.lower() not in MISSING), "a label", "blank ones")
    elif task == "regression":
        refuse_lines(path, lines("label", _is_number), "a number as label", "others")
    else:
        refuse_lines(
            path, lines("time", lambda text: _is_number(text) and float(text) >= 0), "a time of 0 or more", "others"
        )
        refuse_lines(path, lines("event", lambda text: text.lower() in EVENTS), "0 or 1 as event", "others")


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _case(row: Mapping[str, str], unit: str, predicted: Sequence[str], split: bool) -> Case:
    slide, patient = row.get("slide_id", ""), row.get("patient_id", "")
    return Case(
        row[f"{unit}_id"],
        patient or unknown_patient(slide),
        (slide,) if slide else (),
        {name: row[name] for name in predicted},
        PARTITIONS.get(row["partition"].lower(), "") if split else "",
    )


def _merged(path: Path, cases: Sequence[Case], unit: str, mergeable: bool) -> list[Case]:
    """One case for each name; rows of one patient for each of its slides become one."""
    merged: dict[str, Case] = {}
    for line, case in enumerate(cases, 2):
        first = merged.setdefault(case.name, case)
        if first is case:
            continue
        if not mergeable or set(case.slides) & set(first.slides):
            raise DataError(f"{path}: expected every {unit} once, found '{case.name}' again on line {line}")
        if (case.values, case.partition) != (first.values, first.partition):
            raise DataError(
                f"{path}: expected equal labels in all rows of a patient, found others of '{case.name}' on line "
                f"{line}; predict slides with unit=slide"
            )
        merged[case.name] = replace(first, slides=first.slides + case.slides)
    return list(merged.values())


def _check_partitions(table: CaseTable) -> None:
    of: dict[str, str] = {}
    shared = [case.patient for case in table.cases if of.setdefault(case.patient, case.partition) != case.partition]
    if shared:
        raise DataError(
            f"{table.path}: expected every patient in one partition, found {len(set(shared))} in several "
            f"({first_few(dict.fromkeys(shared))})"
        )


def _only(table: CaseTable) -> str:
    return f"'{table.cases[0].values['label']}'" if table.cases else "no case"
