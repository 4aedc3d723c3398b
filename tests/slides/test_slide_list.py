"""The slide list: its columns, and its error messages."""

from pathlib import Path

import pytest

from dino.errors import DataError
from dino.slides.slide_list import SlideRecord, read_slide_list

HEADER = "sample_id,image_path,mask_path,spacing_at_level_0,patient_id,partition,exclude_reason\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("slides/b.svs", "slides/deep/a.tiff", "slides/notes.txt", "masks/b.png"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    return tmp_path


def listed(folder: Path, text: str, encoding: str = "utf-8") -> list[SlideRecord]:
    path = folder / "slides.csv"
    path.write_text(text, encoding=encoding)
    return read_slide_list([path])


def test_files_folders_and_patterns(folder: Path) -> None:
    a, b = folder / "slides/deep/a.tiff", folder / "slides/b.svs"
    assert [r.image_path for r in read_slide_list([b, a])] == [b, a]
    assert [(r.slide_id, r.image_path) for r in read_slide_list([folder / "slides"])] == [("b", b), ("a", a)]
    assert [r.slide_id for r in read_slide_list([folder / "slides/**/*.tiff"])] == ["a"]


def test_all_columns_and_paths_relative_to_the_csv(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    header = (
        "sample_id,image_path,mask_path,spacing_at_level_0,patient_id,centre,scanner,stain,partition,exclude_reason"
    )
    text = (
        f"{header}\r\n x_1 ,slides/b.svs,masks/b.png,0.25,p1,c,s,HE,pretrain,\r\n\r\ny,{folder}/slides/deep/a.tiff\r\n"
    )
    first, second = listed(folder, text, "utf-8-sig")
    assert first == SlideRecord(
        "x_1", folder / "slides/b.svs", folder / "masks/b.png", 0.25, "p1", "c", "s", "HE", "pretrain", ""
    )
    assert second == SlideRecord("y", folder / "slides/deep/a.tiff")


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_separators_that_spreadsheets_write(folder: Path, separator: str) -> None:
    text = "sample_id,image_path,patient_id,spacing_at_level_0\nx,slides/b.svs,p1,0.25\n".replace(",", separator)
    (record,) = listed(folder, text)
    assert record == SlideRecord("x", folder / "slides/b.svs", None, 0.25, "p1")


def test_an_excluded_slide_need_not_exist(folder: Path) -> None:
    (record,) = listed(folder, HEADER + "x,gone.svs,gone.png,,,,out of focus\n")
    assert record.exclude_reason == "out of focus"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "sample_id.*an empty file"),
        (HEADER, "only its header"),
        ("image_path\nslides/b.svs\n", "sample_id"),
        ("sample_id,image_path,image_path\nx,slides/b.svs,\n", "'image_path' 2 times"),
        (HEADER + "x,gone.svs\n", "line 2.*gone.svs"),
        (HEADER + "x,\n", "line 2.*image_path"),
        (HEADER + "x,slides/b.svs,gone.png\n", "mask_path.*gone.png"),
        (HEADER + "x,slides/b.svs,,0\n", "line 2.*spacing_at_level_0.*'0'"),
        (HEADER + 'x,slides/b.svs,,"0,25"\n', "'0,25'"),
        (HEADER + "x,slides/b.svs,,inf\n", "'inf'"),
        (HEADER + "x,slides/b.svs,,,,,,extra\n", "7 cells.*found 8"),
        (HEADER + "x,slides/b.svs\nx,slides/deep/a.tiff\n", "unique.*'x'.*b.svs.*a.tiff"),
        (HEADER + "../x,slides/b.svs\n", "name a folder"),
        (HEADER + "a/b,slides/b.svs\n", "name a folder"),
        (HEADER + ".hidden,slides/b.svs\n", "name a folder"),
        (HEADER + ",slides/b.svs\n", "name a folder"),
        (HEADER + "x,slides/b.svs,,0.5,\x00\n", "line 2.*zero byte"),
        (HEADER + '"x,slides/b.svs\n', "CSV"),
    ],
)
def test_wrong_lists_are_errors_of_one_line(folder: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        listed(folder, text)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_text(folder: Path) -> None:
    path = folder / "slides.csv"
    path.write_bytes(b"sample_id,image_path\n\xff\xfe\x00,x\n")
    with pytest.raises(DataError, match="UTF-8"):
        read_slide_list([path])


def test_further_columns_are_kept_and_likely_mistakes_are_warnings(folder: Path) -> None:
    path = folder / "slides.csv"
    path.write_text("sample_id,image_path,patientid,grade,tissue,her2\nx,slides/b.svs,p1,3,9,\n")
    notes: list[str] = []
    (record,) = read_slide_list([path], notes.append)
    assert record.patient_id == "" and record.further == {"patientid": "p1", "grade": "3"}
    misspelt, taken = notes
    assert "did you mean 'patient_id'?" in misspelt and "'tissue' is ignored" in taken


def test_duplicate_stems_and_empty_inputs(folder: Path) -> None:
    (folder / "slides/deep/b.tif").write_bytes(b"x")
    with pytest.raises(DataError, match="'b'"):
        read_slide_list([folder / "slides"])
    for nothing in ([], [folder / "masks"], [folder / "absent"], [folder / "*.ndpi"], [folder / "absent.csv"]):
        with pytest.raises(DataError):
            read_slide_list(nothing)
