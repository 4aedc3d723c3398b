"""Words of tiles: k-means in float64, names that survive, and features that do not belong to them."""

import csv
import json
import shutil
import threading

import numpy as np
import pytest
import torch

from dino import api
from dino.config.load import load_config
from dino.config.schema import GeojsonConfig, WordsConfig
from dino.errors import ConfigError, DataError
from dino.extraction.catalogue import read_catalogue
from dino.extraction.colours import Clusters
from dino.extraction.encoder_features import EncoderFeatures
from dino.extraction.prototypes import chosen_prototypes, mean_of_prototypes
from dino.extraction.word_table import TableChanged, read_table, replace
from dino.extraction.words import read_words
from dino.models.head import DINOHead
from tests.forked import fork
from tests.viewer.conftest import HOSTILE, PATIENTS, write_features

COUNT = 4


@pytest.fixture
def root(painted, features, tmp_path):
    """A ROOT of its own, with the features of encoder "random"."""
    return shutil.copytree(painted, tmp_path / "root")


def _find(root, **settings):
    return api.find_words("random", root, load_config(WordsConfig, overrides={"count": COUNT, **settings}))


def _rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _unit(rows):
    rows = rows.astype(np.float64)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def _lloyd(rows, centres):
    """k-means of Lloyd in float64, to the end."""
    for _ in range(500):
        nearest = ((rows[:, None] - centres[None]) ** 2).sum(2).argmin(1)
        moved = np.stack([rows[nearest == i].mean(0) for i in range(len(centres))])
        if np.array_equal(moved, centres):
            break
        centres = moved
    return centres


def test_refined_centres_are_those_of_lloyd_in_float64_whatever_the_blocks():
    rng = np.random.default_rng(3)
    rows = _unit(np.repeat(np.eye(6)[:4], 30, axis=0) + 0.2 * rng.normal(size=(120, 6)))
    start = rows[[5, 40, 70, 100]].astype(np.float32)  # one of each group
    expected = _lloyd(rows, start.astype(np.float64))
    for pieces in (1, 7):
        blocks = np.array_split(rows.astype(np.float32), pieces)
        found = Clusters(start).refined(lambda blocks=blocks: iter(blocks))
        np.testing.assert_allclose(found.centres, expected, atol=1e-3)


def test_tables_agree_with_the_features(root, features):
    found = _find(root)
    centres = found.words.clusters.centres.astype(np.float64)
    nearest = {
        slide: ((_unit(rows)[:, None] - centres[None]) ** 2).sum(2).argmin(1) for slide, rows in features.items()
    }
    tiles = read_catalogue(root).tiles
    expected = [
        (slide, str(x), str(y), str(word + 1))
        for slide, words in nearest.items()
        for (x, y), word in zip(tiles[slide].coords.tolist(), words.tolist(), strict=True)
    ]
    assigned = [tuple(row.values()) for row in _rows(root / "words_random" / "tiles.csv")]
    assert sorted(assigned) == sorted(expected)
    total = len(expected)
    for number, row in enumerate(_rows(root / "words_random" / "words.csv")):
        slides = [slide for slide, words in nearest.items() if number in words]
        count = sum((words == number).sum() for words in nearest.values())
        assert row == {
            "word": str(number + 1),
            "tiles": str(count),
            "slides": str(len(slides)),
            "patients": str(len({PATIENTS[slide] for slide in slides})),
            "share": f"{count / total:.4f}",
            "name": "",
        }
    counts = [count.tiles for count in found.counts]
    assert counts == sorted(counts, reverse=True)


def test_the_same_command_writes_the_same_bytes(root):
    _find(root)
    folder = root / "words_random"
    first = {path.name: path.read_bytes() for path in folder.iterdir()}
    shutil.rmtree(folder)
    _find(root)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == first
    (folder / "tiles.csv").unlink()  # as if killed before the tables were written
    (folder / "words.csv").unlink()
    _find(root)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == first


@pytest.mark.parametrize(("separator", "encoding"), [(",", "utf-8"), (";", "cp1252"), ("\t", "utf-8-sig")])
def test_names_survive_as_spreadsheets_save_them(root, separator, encoding):
    _find(root)
    table = root / "words_random" / "words.csv"
    rows = _rows(table)
    rows[0]["name"], rows[2]["name"] = "Bindegewebe, zellreich – ödem", '"keratin"'
    for row in rows:
        row["comment"] = f"seen {row['word']}"
    with table.open("w", newline="", encoding=encoding) as file:
        lines = csv.DictWriter(file, rows[0], delimiter=separator, lineterminator="\r\n")
        lines.writeheader()
        lines.writerows(reversed(rows))  # sorted otherwise
    found = _find(root)
    assert found.names == ["Bindegewebe, zellreich – ödem", "Word 2", '"keratin"', "Word 4"]
    assert _rows(table) == rows
    content = table.read_bytes()
    assert _find(root).names == found.names
    assert table.read_bytes() == content


TABLES = {
    "as written": b"word,tiles,name,seen by\n1,9,,A\n2,8,fat,B\n3,7,,\n4,6,,\n",
    "semicolons": b"\xef\xbb\xbfname;word;seen by\r\n;3;A\r\nfat;2;\r\n\r\n;1;B;more\r\n;4;",
    "windows": "word;name;note\r\n3;ödem – zellreich;\r\n1;;é\r\n2;fat;\r\n".encode("cp1252"),  # without word 4
    "quoted": b'"word"\t"name"\t"note"\n"1"\t""\t"two\nlines, ""quoted"""\n2\tfat\n"4"\t"" \t=1+1\n3\n',
}


@pytest.mark.parametrize("kind", TABLES)
@pytest.mark.parametrize("word", range(4))
@pytest.mark.parametrize("name", ['keratin; "hard", dry', "Ödem", "角质", ""])
def test_a_name_is_written_and_everything_else_stays(root, kind, word, name):
    """Cells by Python's csv module, which are the same but for one; lines of bytes, which are but for that row."""
    _find(root)
    table, before = root / "words_random" / "words.csv", TABLES[kind]
    table.write_bytes(before)
    words = read_words(root, "random")
    words.write_name(word, name, words.names().version)
    assert words.names().written[word] == name
    after = table.read_bytes()
    assert after.count(b"\xef\xbb\xbf") == int(
        before.startswith(b"\xef\xbb\xbf") or (kind == "windows" and name == "角质")
    )

    def cells(content):
        windows = kind == "windows" and not content.startswith(b"\xef\xbb\xbf")
        text = content.decode("cp1252" if windows else "utf-8-sig")
        separator = {"as written": ",", "quoted": "\t"}.get(kind, ";")
        header, *rows = [row for row in csv.reader(text.splitlines(keepends=True), delimiter=separator) if row]
        return header, {row[header.index("word")]: row for row in rows}

    (header, old), (new_header, new) = cells(before), cells(after)
    assert new_header == header and new.keys() == old.keys() | {str(word + 1)}
    place = header.index("name")
    for number, row in new.items():
        expected = old.get(number, [str(word + 1) if column == "word" else "" for column in header])
        if number == str(word + 1):
            assert row[place] == name
            expected = [*expected, *[""] * (len(header) - len(expected))]
            expected[place] = name
        assert row == expected
    if after[:2] == before[:2]:
        lines = after.splitlines(keepends=True)
        assert sum(line not in lines for line in before.splitlines(keepends=True)) <= (2 if kind == "quoted" else 1)


def test_a_name_is_not_written_over_what_others_wrote(root):
    _find(root)
    words, table = read_words(root, "random"), root / "words_random" / "words.csv"
    version = words.names().version
    words.write_name(0, "keratin", version)
    with pytest.raises(
        TableChanged, match=r"expected words.csv as it was read, found that someone changed it meanwhile"
    ):
        words.write_name(1, "fat", version)
    assert words.names().written == ["keratin", "", "", ""]
    before = read_table(table, COUNT)
    table.write_bytes(
        theirs := before.raw.replace(b"keratin", b"mucus")
    )  # as a spreadsheet would, between read and write
    with pytest.raises(TableChanged):
        replace(table, before.raw, before.renamed(1, "fat", table))
    assert table.read_bytes() == theirs
    assert sorted(path.name for path in table.parent.iterdir()) == ["tiles.csv", "words.csv", "words.json"]


def test_all_names_survive_that_are_written_at_once(root):
    """By threads of two processes, each of which tries again when another one was first."""
    _find(root)
    table = root / "words_random" / "words.csv"
    rows = _rows(table)

    def write_all(words_of_process):
        words = read_words(root, "random")

        def write(word):
            while True:
                try:
                    return words.write_name(word, f"name {word}", words.names().version)
                except TableChanged:
                    continue

        threads = [threading.Thread(target=write, args=[word]) for word in words_of_process]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    other = fork(lambda: write_all((1, 3)))
    write_all((0, 2))
    other.join()
    assert other.exitcode == 0
    assert _rows(table) == [row | {"name": f"name {word}"} for word, row in enumerate(rows)]


@pytest.mark.parametrize(
    "name", ["a" * 101, "a\nb", "a\tb", "\x00", "\x7f", "a\u202eb", "\ud800", "=1+1", "@SUM(A1)", "-a"]
)
def test_what_is_not_a_name_is_refused(root, name):
    _find(root)
    words, table = read_words(root, "random"), root / "words_random" / "words.csv"
    before = table.read_bytes()
    with pytest.raises(DataError, match=r"expected a name") as caught:
        words.write_name(0, name, words.names().version)
    assert len(str(caught.value).splitlines()) == 1 and table.read_bytes() == before
    words.write_name(0, "  two \u00a0 words ", words.names().version)
    assert words.names().written[0] == "two words"


def test_a_table_in_another_encoding_is_read_and_not_written(root):
    _find(root)
    words, table = read_words(root, "random"), root / "words_random" / "words.csv"
    table.write_bytes(before := b"word,name\n1,a\x81b\n")  # a byte that Windows-1252 does not have
    with pytest.raises(
        DataError, match=r"expected .*words.csv in UTF-8 or Windows-1252, found bytes of another encoding"
    ):
        words.write_name(1, "fat", words.names().version)
    assert table.read_bytes() == before


def test_names_reach_geojson_and_the_same_name_is_one_class(root, tmp_path):
    _find(root)
    table = root / "words_random" / "words.csv"
    rows = _rows(table)
    table.write_text("word,name\n1,keratin\n2,<b>fat</b>\n3,keratin\n")
    config = load_config(GeojsonConfig, overrides={"encoder": "random"})
    words = {(row["slide_id"], row["x"], row["y"]): row["word"] for row in _rows(root / "words_random" / "tiles.csv")}
    names = {"1": "keratin", "2": "<b>fat</b>", "3": "keratin", "4": "Word 4"}
    total = 0
    for path in api.export_geojson(root, tmp_path / "out", config):
        outlines = []
        for one in json.loads(path.read_text())["features"]:
            properties = one["properties"]
            if properties["objectType"] == "tile":
                x, y = (str(int(value)) for value in one["geometry"]["coordinates"][0][0])
                word = words[path.stem, x, y]
                assert properties["measurements"]["Word"] == int(word)
                assert properties["classification"]["name"] == names[word]
            elif "Tiles" in properties["measurements"]:
                outlines.append(properties["name"])
                total += properties["measurements"]["Tiles"]
        assert len(outlines) == len(set(outlines)) <= 3
    assert total == sum(int(row["tiles"]) for row in rows)
    with_clusters = load_config(GeojsonConfig, overrides={"encoder": "random", "clusters": 3})
    texts = [path.read_text() for path in api.export_geojson(root, tmp_path / "clusters", with_clusters)]
    assert all("keratin" not in text and "Cluster 1" in text for text in texts)


def test_slides_that_are_added_get_the_words_that_exist(root):
    """Words found without one slide stay what they are when it has features."""
    moved = root / "features_random" / f"{HOSTILE}.h5"
    content = moved.read_bytes()
    moved.unlink()
    before = _find(root)
    (root / "words_random" / "words.csv").write_text("word,name\n1,mucus\n")
    moved.write_bytes(content)
    after = _find(root)
    np.testing.assert_array_equal(after.words.clusters.centres, before.words.clusters.centres)
    assert after.names[0] == "mucus" and after.tiles > before.tiles
    assert all(count.patients == 2 for count in after.counts)


def test_examples_are_of_different_patients_first(root):
    _find(root)
    features = EncoderFeatures(read_catalogue(root), "random")
    for examples in features.examples():
        patients = [PATIENTS[slide] for slide, _ in examples]
        assert set(patients[:2]) == {"P1", "P2"}


def test_words_of_other_features_are_refused(root):
    _find(root)
    shutil.rmtree(root / "features_random")
    write_features(root, "random", seed=1)
    for use in (lambda: _find(root), lambda: EncoderFeatures(read_catalogue(root), "random").labels()):
        with pytest.raises(
            DataError, match="expected words of the features that are in ROOT now, found those of other"
        ):
            use()
    assert EncoderFeatures(read_catalogue(root), "random", 3).labels()[0].name == "Cluster 1"


def test_bad_input_is_one_line_and_loses_nothing(root):
    _find(root)
    table, record = root / "words_random" / "words.csv", root / "words_random" / "words.json"
    with pytest.raises(ConfigError, match="expected count=4, with which the words in .* were found, found 5"):
        _find(root, count=5)
    for content, message in (
        ("word,label\n1,a\n", "expected columns word and name in .*found word, label"),
        ("word,name\n9,a\n", "line 2: expected a word from 1 to 4, found '9'"),
        ("word,name\n1,a\n1,b\n", "line 3: expected each word once, found 1 again"),
        ("name,word\na,1\nb\n", "line 3: expected a word from 1 to 4, found ''"),
        ('word,name\n1,"' + 200_000 * "a" + '"\n', "line 2: expected a table of words, found: field larger"),
    ):
        table.write_text(content)
        with pytest.raises(DataError, match=message):
            _find(root)
        assert table.read_text() == content
    record.write_text("{")
    with pytest.raises(DataError, match="expected .*words.json as written by `dino words`, could not read it"):
        _find(root)
    record.unlink()
    with pytest.raises(DataError, match=r"expected the words of .*words.csv beside it, found none"):
        _find(root)
    with pytest.raises(ConfigError, match="expected count from 2 to 64, found 1"):
        _find(root, count=1)
    with pytest.raises(ConfigError, match="expected method kmeans or prototypes, found 'magic'"):
        _find(root, method="magic")
    with pytest.raises(DataError, match="expected features of 'nothing' in .*found none"):
        api.find_words("nothing", root)


def test_words_of_prototypes_are_the_means_of_the_tiles_that_choose_them(root, features):
    head = DINOHead(8, 12, hidden_dim=16, bottleneck_dim=4, seed=1).eval()
    encoder = EncoderFeatures(read_catalogue(root), "random")
    rows = np.concatenate([features[slide] for slide in encoder.slide_ids])
    with torch.no_grad():
        logits = head.double()(torch.from_numpy(rows).double()).numpy()
    chosen = logits.argmax(1)
    used = np.bincount(chosen, minlength=12)
    most = np.argsort(-used, kind="stable")[:3]
    found = mean_of_prototypes(head.float(), encoder, 3)
    expected = np.stack([_unit(rows)[chosen == one].mean(0) for one in most])
    np.testing.assert_allclose(found.centres, expected, atol=1e-5)
    np.testing.assert_array_equal(chosen_prototypes(head, rows), chosen)
