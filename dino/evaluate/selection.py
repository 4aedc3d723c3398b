"""Rows of labels that choose the checkpoint of a run, and whether a model is scored on rows that chose it."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dino.errors import DataError
from dino.evaluate.contents import content_hashes
from dino.evaluate.labels import LabelTable, slide_of_name

KEY = "selection"  # of checkpoints and exports: a list of row sets, as row_set() describes them
FRACTION = 0.25  # of the train rows, where no row is of partition val
SEED = 0  # the same part for every run on a table, so that their scores can be compared
DIGITS = 12  # hexadecimal digits of a row's hash: 10,000 rows among 10,000 others coincide in 4 of 10 million cases
NAMED = 3  # examples listed in an error


@dataclass(frozen=True)
class Selection:
    """Which rows of a table score a run during training.

    Attributes:
        references: Indices of the reference rows.
        queries: Indices of the rows that are classified; of none of the references' patients or slides, if possible.
        origin: Where they are from, in words.
    """

    references: list[int]
    queries: list[int]
    origin: str

    def restrict(self, table: LabelTable) -> LabelTable:
        """These rows alone, the references as ``train`` and the queries as ``val``."""
        partition = {**dict.fromkeys(self.references, "train"), **dict.fromkeys(self.queries, "val")}
        rows = sorted(partition)
        return LabelTable(
            [table.paths[i] for i in rows],
            [table.labels[i] for i in rows],
            [partition[i] for i in rows],
            [table.slide_ids[i] for i in rows] if table.slide_ids else None,
            [table.patient_ids[i] for i in rows] if table.patient_ids else None,
            {name: [values[i] for i in rows] for name, values in table.columns.items()},
        )


def select_rows(table: LabelTable) -> Selection:
    """The rows that choose the checkpoint: never test rows.

    Rows of partition ``val`` are classified by those of ``train``. Where there are none, a part of ``train`` is
    classified by the rest: about a quarter of each class, as whole patients; as whole slides if patients are unknown or
    too few; else as single rows.

    Args:
        table: Labels with train rows.

    Raises:
        DataError: If there are too few train rows for that.
    """
    train, val = table.rows("train"), table.rows("val")
    if val:
        return Selection(train, val, f"the {len(val)} rows of partition val")
    for kind, groups in _groupings(table, train).items():
        chosen = _stratified_part(groups, {i: table.labels[i] for i in train})
        if chosen:
            queries = sorted(i for name in chosen for i in groups[name])
            of = (
                f" ({len(chosen)} of {len(groups)} {kind})"
                if kind != "rows"
                else ", which may share slides with others"
            )
            origin = f"{len(queries)} of the {len(train)} train rows{of}, as no row is of partition val"
            return Selection(sorted(set(train) - set(queries)), queries, origin)
    raise DataError(
        "expected rows of partition val, or two classes with at least two train rows, a part of which can choose the "
        f"checkpoint, found {len(train)} train rows; add rows of partition val, or train without evaluate.labels"
    )


def row_set(table: LabelTable, score: str) -> dict[str, Any]:
    """What a checkpoint records of the rows that chose it: hashes of the files' content, salted for this set of rows.

    Neither the names of files nor those of slides and patients are part of it; it identifies a row although the table
    was renamed or the file moved. References chose the checkpoint as well as queries: labels of both decide.

    Args:
        table: The rows, as :meth:`Selection.restrict` returned them.
        score: Name of the score that they choose it by.

    Returns:
        ``score``, ``count``, ``salt`` (the same for the same files, labels and partitions only), and ``rows``: the
        hashes, each of :data:`DIGITS` digits, as one text.

    Raises:
        DataError: If a file cannot be read.
    """
    contents = content_hashes(table.paths)
    rows = sorted(zip(contents, table.labels, table.partition, strict=True))
    salt = hashlib.sha256(repr(rows).encode()).hexdigest()[:16]
    hashes = sorted({_row_hash(salt, content) for content in contents})
    return {"score": score, "count": len(rows), "salt": salt, "rows": "".join(hashes)}


def recorded_selection(training: Mapping[str, Any]) -> list[Mapping[str, Any]] | None:
    """The row sets that a model records among what is known of its training; None where it says nothing."""
    found = training.get(KEY)
    return [one for one in found if isinstance(one, Mapping)] if isinstance(found, list) else None


def check_selection(
    table: LabelTable, recorded: Sequence[Mapping[str, Any]] | None, allow: bool, rows: str = "test"
) -> dict[str, Any]:
    """Check that the rows that a model is scored on did not choose its checkpoint.

    Args:
        table: The labels.
        recorded: The row sets of the checkpoint: its own, and those of the weights that its run started from; None
            where it records nothing.
        allow: Accept such rows; they are counted in the result.
        rows: The partition that is scored.

    Returns:
        ``compared`` (a description), ``seen_rows`` (their number) and ``allowed``.

    Raises:
        DataError: If rows chose the checkpoint and ``allow`` is False, or a file cannot be read.
    """
    if not recorded:
        compared = "unknown: the model has no record of the rows that chose it"
        return {"compared": compared if recorded is None else "no rows chose it", "seen_rows": 0, "allowed": False}
    if not table.stored:
        return {"compared": "nothing: the rows are not files", "seen_rows": 0, "allowed": False}
    scored = [table.paths[i] for i in table.rows(rows)]
    contents = content_hashes(scored)
    sets = [(str(one.get("salt", "")), _split(str(one.get("rows", "")))) for one in recorded]
    chose = [any(_row_hash(salt, content) in hashes for salt, hashes in sets) for content in contents]
    seen = [path for path, chose_it in zip(scored, chose, strict=True) if chose_it]
    if seen and not allow:
        shown = ", ".join(path.name for path in seen[:NAMED]) + (", ..." if len(seen) > NAMED else "")
        raise DataError(
            f"expected {rows} rows that did not choose the checkpoint, found {len(seen)} of {len(scored)} that did "
            f"({shown}): its run compared checkpoints by them; give other rows, or accept an optimistic score with "
            "allow_leakage=true"
        )
    count = sum(int(one.get("count", 0)) for one in recorded)
    return {"compared": f"{count} rows by content", "seen_rows": len(seen), "allowed": bool(seen)}


def _split(hashes: str) -> set[str]:
    return {hashes[i : i + DIGITS] for i in range(0, len(hashes), DIGITS)}


def _row_hash(salt: str, content: str) -> str:
    return hashlib.sha256(f"{salt}:{content}".encode()).hexdigest()[:DIGITS]


def _groupings(table: LabelTable, rows: Iterable[int]) -> dict[str, dict[str, list[int]]]:
    """Rows by patient, by slide, and singly: which of them are on one side of the split together."""
    slides = table.slide_ids or [""] * len(table.paths)
    slide_of = {i: slides[i] or slide_of_name(table.paths[i].name) for i in rows}
    keys: dict[str, Mapping[int, str]] = {"slides": slide_of, "rows": {i: str(i) for i in slide_of}}
    if table.patient_ids:
        patients = {slide_of[i]: table.patient_ids[i] for i in slide_of if table.patient_ids[i]}
        # A slide whose patient no row names is one of its own.
        keys = {"patients": {i: patients.get(slide, f"slide {slide}") for i, slide in slide_of.items()}, **keys}
    groupings: dict[str, dict[str, list[int]]] = {kind: {} for kind in keys}
    for kind, group_of in keys.items():
        for i, name in group_of.items():
            groupings[kind].setdefault(name, []).append(i)
    return groupings


def _stratified_part(groups: Mapping[str, Sequence[int]], labels: Mapping[int, str]) -> list[str]:
    """Groups with about :data:`FRACTION` of the rows of each class, such that every class keeps references.

    Greedy, large groups first, groups of one size in an order drawn by :data:`SEED`: a group is taken if that does not
    move the numbers of rows per class away from the wanted ones. Empty where that gives rows of fewer than two classes.
    """
    total = Counter(labels.values())
    lacking = {name: FRACTION * count for name, count in total.items()}  # rows per class that are still wanted
    taken: Counter[str] = Counter()
    chosen = []
    for name in sorted(groups, key=lambda name: (-len(groups[name]), _row_hash(str(SEED), name))):
        counts = Counter(labels[i] for i in groups[name])
        keeps_references = all(taken[label] + count < total[label] for label, count in counts.items())
        change = sum((lacking[label] - count) ** 2 - lacking[label] ** 2 for label, count in counts.items())
        if keeps_references and change <= 0:
            chosen.append(name)
            taken += counts
            lacking = {label: wanted - counts[label] for label, wanted in lacking.items()}
    return chosen if len(taken) > 1 else []
