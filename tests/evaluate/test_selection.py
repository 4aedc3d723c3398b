from collections import Counter
from pathlib import Path

import pytest

from dino.errors import DataError
from dino.evaluate.labels import LabelTable
from dino.evaluate.selection import check_selection, row_set, select_rows


def labelled(rows, patients=None, slides=None, folder=Path("x")):
    """A table of (label, partition) rows."""
    labels, partition = zip(*rows, strict=True)
    return LabelTable([folder / f"{i}.png" for i in range(len(rows))], list(labels), list(partition), slides, patients)


@pytest.fixture
def table(tmp_path):
    """Ten train, four val and six test rows of two classes, with files."""
    rows = [("ab"[i % 2], "train" if i < 10 else "val" if i < 14 else "test") for i in range(20)]
    for i in range(20):
        (tmp_path / f"{i}.png").write_bytes(bytes([i]))
    return labelled(rows, folder=tmp_path)


def test_val_rows_choose_where_there_are_any(table):
    selection = select_rows(table)
    assert (selection.references, selection.queries) == (table.rows("train"), table.rows("val"))


@pytest.mark.parametrize("test_rows", [0, 30])
def test_else_a_stratified_part_of_the_train_rows_chooses(test_rows):
    counts = {"a": 40, "b": 12, "c": 4}
    rows = [(name, "train") for name, count in counts.items() for _ in range(count)] + [("a", "test")] * test_rows
    selection = select_rows(labelled(rows))
    queries = Counter(rows[i][0] for i in selection.queries)
    assert queries == {name: count // 4 for name, count in counts.items()}
    assert sorted(selection.references + selection.queries) == list(range(56))
    assert "14 of the 56 train rows" in selection.origin


def test_patients_are_on_one_side_and_none_is_chosen_by_the_order_of_rows():
    patients = [f"p{i // 5}" for i in range(60)]  # twelve, each of one class
    rows = [("ab"[i // 5 % 2], "train") for i in range(60)]
    slides = [f"s{i // 2}" for i in range(60)]  # some slides have rows of two patients' numbers
    slides = [f"{patient}-{slide}" for patient, slide in zip(patients, slides, strict=True)]
    selection = select_rows(labelled(rows, patients, slides))
    sides = [{patients[i] for i in side} for side in (selection.references, selection.queries)]
    assert not sides[0] & sides[1]
    # The wanted 7.5 rows of each class are as far from one patient's 5 as from two patients' 10.
    assert all(5 <= count <= 10 for count in Counter(rows[i][0] for i in selection.queries).values())
    assert {rows[i][0] for i in selection.queries} == {"a", "b"} and "patients" in selection.origin
    backwards = labelled(rows[::-1], patients[::-1], slides[::-1])
    assert {backwards.patient_ids[i] for i in select_rows(backwards).queries} == sides[1]


def test_a_row_without_a_patient_goes_with_those_of_its_slide():
    patients = ["p0", "", "p1", "", "p2", "", "p3", ""]
    slides = ["s0", "s0", "s1", "s1", "s2", "s2", "s3", "s3"]
    selection = select_rows(labelled([("ab"[i // 2 % 2], "train") for i in range(8)], patients, slides))
    assert selection.queries
    assert not {slides[i] for i in selection.queries} & {slides[i] for i in selection.references}


def test_with_one_patient_of_a_class_slides_are_split_and_with_one_slide_rows_are():
    rows = [("ab"[i // 8], "train") for i in range(16)]
    patients, slides = [f"p{i // 8}" for i in range(16)], [f"s{i // 2}" for i in range(16)]
    by_slide = select_rows(labelled(rows, patients, slides))
    assert "slides" in by_slide.origin
    assert not {slides[i] for i in by_slide.queries} & {slides[i] for i in by_slide.references}
    by_row = select_rows(labelled(rows, patients, patients))
    assert Counter(rows[i][0] for i in by_row.queries) == {"a": 2, "b": 2}
    assert "may share slides" in by_row.origin


def test_too_few_train_rows_are_an_error():
    with pytest.raises(DataError, match="add rows of partition val"):
        select_rows(labelled([("a", "train"), ("b", "train"), ("b", "test")]))


def test_rows_that_chose_are_found_under_other_names_and_in_a_subset(table, tmp_path):
    record = row_set(select_rows(table).restrict(table), "knn_20_accuracy")
    assert check_selection(table, [record], allow=False) == {
        "compared": "14 rows by content",
        "seen_rows": 0,
        "allowed": False,
    }
    (tmp_path / "copies").mkdir()
    moved = [tmp_path / "copies" / name for name in ("first.png", "second.png", "third.png")]
    for path, number in zip(moved, (12, 13, 19), strict=True):  # two val rows, and a test row
        path.write_bytes(bytes([number]))
    subset = LabelTable([table.paths[0], *moved], ["a", "a", "b", "b"], ["train", "test", "test", "test"])
    with pytest.raises(DataError, match=r"found 2 of 3 that did \(first\.png, second\.png\).*allow_leakage=true"):
        check_selection(subset, [record], allow=False)
    facts = check_selection(subset, [record], allow=True)
    assert facts["seen_rows"] == 2 and facts["allowed"]


def test_references_of_the_selection_chose_too(table):
    record = row_set(select_rows(table).restrict(table), "knn_20_accuracy")
    swapped = LabelTable(table.paths, table.labels, ["test"] * 10 + ["val"] * 4 + ["train"] * 6)
    with pytest.raises(DataError, match="found 10 of 10"):
        check_selection(swapped, [record], allow=False)


def test_a_record_names_nothing_and_is_small(table):
    record = row_set(select_rows(table).restrict(table), "knn_20_accuracy")
    assert record["count"] == 14 and len(record["rows"]) == 14 * 12
    assert set(record["rows"] + record["salt"]) <= set("0123456789abcdef")
    other = LabelTable(table.paths[1:], table.labels[1:], table.partition[1:])
    again = row_set(select_rows(other).restrict(other), "knn_20_accuracy")
    assert again["salt"] != record["salt"]  # hashes of two records cannot be joined


def test_no_record_is_unknown_and_an_empty_one_is_none(table):
    assert check_selection(table, None, allow=False)["compared"].startswith("unknown")
    assert check_selection(table, [], allow=False)["compared"] == "no rows chose it"
