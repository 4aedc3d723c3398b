import pytest

from dino.errors import DataError
from dino.evaluate.labels import read_labels, slide_of_name
from dino.evaluate.leakage import Pretraining, check_leakage


@pytest.fixture
def write(tmp_path):
    """Write a table and the images that it names; returns the table's path."""

    def make(text, files=True):
        path = tmp_path / "labels.csv"
        path.write_text(text)
        for line in text.splitlines()[1:]:
            if files:
                (tmp_path / line.split(",")[0]).write_text(line.split(",")[0])
        return path

    return make


def test_labels_of_any_kind_are_read_and_paths_resolve_from_the_table(write, tmp_path, monkeypatch):
    monkeypatch.chdir("/")
    table = read_labels(write("image_path,label,partition\na.png,tumour,reference\nb.png,001 b,test\nc.png,x,Train\n"))
    assert table.labels == ["tumour", "001 b", "x"]
    assert table.partition == ["train", "test", "train"]
    assert table.paths == [tmp_path / "a.png", tmp_path / "b.png", tmp_path / "c.png"]
    assert (table.rows("train"), table.rows("test")) == ([0, 2], [1])
    assert table.slide_ids is None and table.patient_ids is None


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_columns_are_separated_by_commas_semicolons_or_tabs(tmp_path, delimiter):
    for name in ("a.png", "b,1;2.png"):
        (tmp_path / name).write_text(name)
    rows = [
        ["\ufeffimage_path", "label", "partition", "slide_id"],  # spreadsheets begin the file with a byte-order mark
        ["a.png", "x", "train", "s1"],
        ['"b,1;2.png"', "y", "test", "s2"],
    ]
    path = tmp_path / "labels.csv"
    path.write_text("".join(delimiter.join(row) + "\n" for row in rows))
    table = read_labels(path)
    assert table.paths == [tmp_path / "a.png", tmp_path / "b,1;2.png"]
    assert (table.labels, table.slide_ids) == (["x", "y"], ["s1", "s2"])


def test_a_missing_column_is_reported_with_the_columns_found(write):
    with pytest.raises(DataError, match=r"missing label, partition; found image_path, class$"):
        read_labels(write("image_path;class\na;x\n", files=False))


def test_further_columns_are_read_if_they_are_asked_for(write):
    path = write("image_path,label,partition,centre\na,x,train,A\nb,y,test,1.0\n")
    assert read_labels(path, columns=("centre",)).columns == {"centre": ["A", "1.0"]}
    assert read_labels(path).columns == {}


@pytest.mark.parametrize(
    ("header", "values", "message"),
    [
        (
            "center",
            "A,B",
            r"expected a column centre, found image_path, label, partition, center; did you mean 'center'",
        ),
        ("lab", "A,B", r"expected a column centre, found image_path, label, partition, lab$"),
        ("centre", "A,", r"expected a centre in every row, found 1 blank ones \(line 3\)"),
    ],
)
def test_a_further_column_that_is_missing_or_has_blanks_is_an_error(write, header, values, message):
    first, second = values.split(",")
    path = write(f"image_path,label,partition,{header}\na,x,train,{first}\nb,y,test,{second}\n")
    with pytest.raises(DataError, match=message):
        read_labels(path, columns=("centre",))


@pytest.mark.parametrize(
    ("first", "second", "third", "classes"),
    [("1", "1.0", "2", ["1", "2"]), ("True", "true", "False", ["false", "true"]), ("a", "b", "1", ["1", "a", "b"])],
)
def test_one_class_has_one_spelling(write, first, second, third, classes):
    text = f"image_path,label,partition\na,{first},train\nb,{second},test\nc,{third},test\n"
    assert read_labels(write(text)).classes == classes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image_path,label\na,x\n", "missing partition"),
        ("image_path,label,partition\n", "no row"),
        ("image_path,label,partition\na,x,train\nb,y,train\n", "none of test"),
        ("image_path,label,partition\na,x,test\nb,y,test\n", "none of train"),
        ("image_path,label,partition\na,x,train\nb,x,test\n", "only 'x'"),
        ("image_path,label,partition\na,,train\nb,x,test\n", r"blank ones \(line 2\)"),
        ("image_path,label,partition\na,1,train\nb,nan,test\n", r"blank ones \(line 3\)"),
        ("image_path,label,partition\na,x,train\nb,y,dev\n", r"train, val or test as partition.*line 3"),
    ],
)
def test_invalid_tables_are_one_line_errors(write, text, message):
    with pytest.raises(DataError, match=message) as caught:
        read_labels(write(text))
    assert "\n" not in str(caught.value)


def test_missing_files_are_named_and_counted(write):
    rows = "".join(f"gone_{i}.png,{i % 2},train\n" for i in range(5))
    with pytest.raises(
        DataError, match=r"5 of 5 missing .*gone_0\.png, .*gone_1\.png, .*gone_2\.png, \.\.\."
    ) as caught:
        read_labels(write("image_path,label,partition\n" + rows, files=False))
    assert "gone_3" not in str(caught.value)


def test_a_missing_table_is_an_error(tmp_path):
    with pytest.raises(DataError, match="found none"):
        read_labels(tmp_path / "labels.csv")


SEEN = {"slide_ids": ["s1", "s2"], "patient_ids": ["p1"]}


def test_test_slides_of_the_pretraining_are_an_error(write):
    table = read_labels(write("image_path,label,partition,slide_id\na,x,train,s1\nb,y,test,s2\nc,y,test,s3\n"))
    with pytest.raises(DataError, match=r"1 that it has \(s2\).*allow_leakage=true"):
        check_leakage(table, Pretraining(SEEN), allow=False)
    facts = check_leakage(table, Pretraining(SEEN), allow=True)
    assert facts["seen_slides"] == ["s2"] and facts["allowed"]


def test_reference_slides_may_be_seen(write):
    table = read_labels(write("image_path,label,partition,slide_id\na,x,train,s1\nb,y,test,s3\n"))
    facts = check_leakage(table, Pretraining(SEEN), allow=False)
    assert facts["compared"] == "slides by slide_id" and not facts["allowed"]


def test_patients_are_compared(write):
    table = read_labels(write("image_path,label,partition,slide_id,patient_id\na,x,train,s,p\nb,y,test,s9,p1\n"))
    with pytest.raises(DataError, match=r"patients .*\(p1\)"):
        check_leakage(table, Pretraining(SEEN), allow=False)


def test_without_slide_ids_the_file_names_are_compared(write):
    table = read_labels(write("image_path,label,partition\na.jpg,x,train\ns1_256_0.jpg,y,test\n"))
    with pytest.raises(DataError, match=r"\(s1\)"):
        check_leakage(table, Pretraining(SEEN), allow=False)


@pytest.mark.parametrize("training_slides", [None, {}, {"slide_ids": [], "patient_ids": []}])
def test_a_model_without_recorded_slides_is_accepted(write, training_slides):
    table = read_labels(write("image_path,label,partition\na,x,train\nb,y,test\n"))
    assert check_leakage(table, Pretraining(training_slides or {}), allow=False)["compared"].startswith("nothing")


def test_names_are_parsed_from_the_right():
    assert slide_of_name("TCGA_a_1_512_1024.jpg") == "TCGA_a_1"
    assert slide_of_name("image_AC_1650.jpg") == "image_AC_1650"
