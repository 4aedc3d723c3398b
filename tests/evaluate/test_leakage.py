"""Leakage that ids do not show: the same file under another path or name, and patients that only ROOT knows."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from dino.errors import DataError
from dino.evaluate.contents import find_copies, find_in_folder, find_in_stored
from dino.evaluate.labels import LabelTable, read_labels
from dino.evaluate.leakage import Pretraining, check_leakage


def write(folder: Path, **contents: str) -> list[Path]:
    folder.mkdir(exist_ok=True)
    for name, content in contents.items():
        (folder / f"{name}.png").write_text(content)
    return [folder / f"{name}.png" for name in contents]


def table_of(paths: list[Path], **columns: list[str]) -> LabelTable:
    return LabelTable(paths, ["x", "y"] * (len(paths) // 2), ["train", "test"] * (len(paths) // 2), **columns)


def test_copies_are_found_by_content_whatever_their_names_and_sizes(tmp_path: Path) -> None:
    paths = write(tmp_path, a="same", b="other", c="same", d="also", e="longer")
    assert find_copies(paths) == [(0, 2)]
    assert find_copies([*paths, paths[4]]) == [(0, 2), (4, 5)]
    assert find_copies(paths[3:]) == []


def test_files_of_a_folder_are_found_by_path_link_and_content(tmp_path: Path) -> None:
    inside = write(tmp_path / "tiles", a="one", b="two", c="three")
    outside = write(tmp_path / "test", copy="two", size="six", new="something else")
    link = tmp_path / "test" / "link.png"
    link.symlink_to(inside[0])
    names = [path.name for path in inside]
    tested = [*outside, link, inside[2]]
    assert find_in_folder(tested, tmp_path / "tiles", names) == [outside[0], link, inside[2]]
    assert find_in_folder(tested, tmp_path / "tiles", ["b.png", "gone.png"]) == [outside[0]]


@pytest.mark.parametrize("how", ["path", "link", "copy"])
def test_test_files_that_were_trained_on_are_refused_although_no_id_tells(how: str, tmp_path: Path) -> None:
    (tile,) = write(tmp_path / "tiles", p_0_0="pixels")
    (reference,) = write(tmp_path / "labelled", r="reference")
    tested = tile if how == "path" else tmp_path / "labelled" / "renamed.png"
    if how == "link":
        os.link(tile, tested)
    elif how == "copy":
        shutil.copy(tile, tested)
    table, trained = table_of([reference, tested]), Pretraining({}, {}, [(tile.parent, [tile.name])])
    with pytest.raises(DataError, match=f"test files that the model has not .*{tested.name}.*allow_leakage=true"):
        check_leakage(table, trained, allow=False)
    facts = check_leakage(table, trained, allow=True)
    assert facts["seen_files"] == [str(tested)] and facts["allowed"]
    assert facts["compared"] == "files by path and content"
    unseen = Pretraining({}, {}, [(tile.parent, [])])  # the tile's slide is held out
    assert check_leakage(table, unseen, allow=False)["seen_files"] == []


def test_test_files_that_lie_in_shards_are_found_by_content(tmp_path: Path) -> None:
    tested = write(tmp_path / "test", copy="two", same_size="six", new="something else")
    stored = [b"one", b"two", b"threes", b"lost"]
    read: list[int] = []

    def content(index: int) -> bytes:
        read.append(index)
        return stored[index]

    sizes = np.array([len(one) for one in stored], np.int32)
    assert find_in_stored(tested, sizes, content) == [tested[0]]
    assert read == [0, 1]  # the others have the size of no tested file
    trained = Pretraining({}, {}, stored=[(sizes, content)])
    with pytest.raises(DataError, match="test files that the model has not .*copy"):
        check_leakage(table_of([tmp_path / "reference.png", tested[0]]), trained, allow=False)
    facts = check_leakage(table_of([tmp_path / "reference.png", tested[2]]), trained, allow=False)
    assert facts["seen_files"] == [] and facts["compared"] == "files by content"


def test_a_patient_is_that_of_the_slide_where_the_labels_do_not_name_one(tmp_path: Path) -> None:
    table = table_of(write(tmp_path, r_0_0="r", s2_0_0="s"))
    record = {"slide_ids": ["s1"], "patient_ids": ["anna"]}
    assert check_leakage(table, Pretraining(record), allow=False)["seen_patients"] == []
    with pytest.raises(DataError, match=r"test patients that .*found 1 that it has \(anna\)"):
        check_leakage(table, Pretraining(record, {"s1": "anna", "s2": "anna"}), allow=False)
    other = Pretraining(record, {"s1": "anna", "s2": "berta"})
    assert check_leakage(table, other, allow=False)["compared"] == "slides by file name and patients of the slides"


@pytest.mark.parametrize(("second", "lines"), [("a.png,y,test", "2 and 3"), ("b.png,y,test", "2 and 3")])
def test_images_in_two_rows_are_refused(second: str, lines: str, tmp_path: Path) -> None:
    write(tmp_path, a="pixels", b="pixels", c="others")
    table = tmp_path / "labels.csv"
    table.write_text(f"image_path,label,partition\na.png,x,train\n{second}\nc.png,y,test\n")
    with pytest.raises(DataError, match=rf"every image once.*1 rows.*lines {lines}.*remove"):
        read_labels(table)
