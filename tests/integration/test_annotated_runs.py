"""Runs whose draws are balanced over the annotation of tiles: every source, errors, resuming, records."""

import json
from collections import Counter
from pathlib import Path

import pytest
from source_files import SMALL, write_list
from tiny_runs import Crash, assert_same_bits, config, crash_after, last, metrics

from dino.api import pretrain
from dino.api.balancing import describe
from dino.api.levels import Level, build_level
from dino.api.tiling import tile
from dino.config.schema import TileConfig
from dino.data.datasets import place_of
from dino.errors import ConfigError, DataError
from dino.slides.tables import read_tiles

BALANCED = {"sampling.balance": ["centre", "annotation"]}


def annotated(folder: Path, storage: str = "none", classes: tuple[str, ...] = ("tumour", "stroma")) -> Path:
    """A ROOT of two slides of 200 x 140 px, the left parts of the first of which are annotated."""
    table = write_list(folder / "slides", {"one": "", "two": ""}, centre="Basel")
    squares = [[64 * i, 0, 64 * (i + 1), 96] for i in range(len(classes))]
    features = [
        {
            "type": "Feature",
            "geometry": {"type": "Polygon", "coordinates": [[[a, b], [c, b], [c, d], [a, d], [a, b]]]},
            "properties": {"objectType": "annotation", "classification": {"name": name, "color": [200, 0, 0]}},
        }
        for name, (a, b, c, d) in zip(classes, squares, strict=True)
    ]
    (table.parent / "one.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    if classes:
        lines = table.read_text().splitlines()
        added = [f"{line},{cell}" for line, cell in zip(lines, ("annotation_path", "one.geojson", ""), strict=True)]
        table.write_text("\n".join(added) + "\n")
    assert tile([table], folder / "root", TileConfig(**SMALL, storage=storage)).exit_code == 0
    return folder / "root"


def level_of(root: Path, **changes: object) -> Level:
    return build_level(config(root, root / "run", **changes))


def drawn(level: Level, annotations: dict[tuple[str, int, int], str], count: int) -> list[tuple[str, str]]:
    """Slide and annotation of each of the first draws, according to a dictionary of all tiles."""
    sampler = level.sampler(0)
    places = [place_of(level.dataset[sampler(draw)].name.rpartition("/")[2]) for draw in range(count)]
    return [(place[0], annotations[place] or "unknown") for place in places if place]


def annotations_of(root: Path) -> dict[tuple[str, int, int], str]:
    return {(tile.slide_id, tile.x, tile.y): tile.annotation for tile in read_tiles(root)}


@pytest.mark.parametrize("storage", ["none", "jpeg", "tar", "parquet"])
def test_every_source_balances_the_classes_of_tiles(tmp_path: Path, storage: str) -> None:
    if storage == "parquet":
        pytest.importorskip("pyarrow")
    root = annotated(tmp_path, storage)
    of_tile = annotations_of(root)
    level = level_of(root, **{"sampling.balance": "annotation"})
    groups = level.groups
    assert groups is not None and level.samples == len(of_tile)
    counts = Counter(value or "unknown" for value in of_tile.values())
    assert dict(zip(groups.names, groups.counts.tolist(), strict=True)) == {(k,): n for k, n in counts.items()}
    assert groups.shares == pytest.approx([1 / 3] * 3, abs=1e-4)
    count = len(of_tile)
    found = drawn(level, of_tile, count)
    assert groups.at([level.sampler(0)(draw) for draw in range(count)]).tolist() == [
        groups.names.index((value,)) for _, value in found
    ]
    assert min(sum(one == value for _, one in found) for value in counts) > count / 6
    assert any("tiles of 2 slides have no annotation; they form group 'unknown'" in line for line in describe(groups))
    # A filter leaves out tiles, and with them their group.
    some = level_of(root, filter="annotation != ''", **{"sampling.balance": "annotation"})
    assert some.groups is not None and some.groups.names == [("stroma",), ("tumour",)]
    assert some.samples == counts["stroma"] + counts["tumour"]
    assert {value for _, value in drawn(some, of_tile, 12)} == {"stroma", "tumour"}


def test_folders_without_annotations_are_unknown(tmp_path: Path) -> None:
    root = annotated(tmp_path / "first")
    table = write_list(tmp_path / "second", {"three": ""}, centre="Zurich")
    assert tile([table], tmp_path / "other", TileConfig(**SMALL, storage="jpeg")).exit_code == 0
    plain = annotations_of(tmp_path / "other")
    level = level_of(root, more_data_dirs=[str(tmp_path / "other")], **BALANCED)
    assert level.groups is not None
    shares = dict(zip(level.groups.names, level.groups.shares.tolist(), strict=True))
    assert shares == {
        ("Zurich", "unknown"): pytest.approx(1 / 2, abs=1e-4),
        **{("Basel", value): pytest.approx(1 / 6, abs=1e-4) for value in ("stroma", "tumour", "unknown")},
    }
    assert level.groups.counts[level.groups.names.index(("Zurich", "unknown"))] == len(plain)


def test_weights_of_classes(tmp_path: Path) -> None:
    root = annotated(tmp_path)
    weights = tmp_path / "weights.csv"
    weights.write_text("annotation,weight\ntumour,3\nunknown,0\n")
    groups = level_of(root, **{"sampling.balance": "annotation", "sampling.weights": str(weights)}).groups
    assert groups is not None and groups.names == [("stroma",), ("tumour",)]
    assert groups.shares == pytest.approx([1 / 4, 3 / 4], abs=1e-4)


@pytest.mark.parametrize(
    ("settings", "weights", "error", "message"),
    [
        ({"sampling.balance": "anotation"}, "", ConfigError, "or tiles (annotation), found 'anotation'; did you mean"),
        ({"sampling.balance": "tissue"}, "", ConfigError, "'tissue'; numbers of tiles are for filter="),
        ({"sampling.balance": "annotation", "sampling.max_tiles_per_slide": 5}, "", ConfigError, "leave one of them"),
        ({"sampling.balance": "annotation", "filter": "annotation == ''"}, "", DataError, "tiles with a value of"),
        ({}, "annotation,weight\ntumor,2\n", DataError, "did you mean 'tumour'?"),
    ],
)
def test_bad_settings_end_in_one_line(
    tmp_path: Path, settings: dict, weights: str, error: type[Exception], message: str
) -> None:
    root = annotated(tmp_path)
    if weights:
        (tmp_path / "weights.csv").write_text(weights)
        settings = {**settings, "sampling.weights": str(tmp_path / "weights.csv")}
    with pytest.raises(error) as found:
        level_of(root, **settings)
    assert message in str(found.value) and "\n" not in str(found.value)


def test_tables_without_annotations_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="found 'annotation'; give annotation_path in slides.csv"):
        level_of(annotated(tmp_path, classes=()), **{"sampling.balance": "annotation"})


def test_a_run_resumes_with_the_same_bits_and_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = annotated(tmp_path)
    settings = {"sampling.balance": ["annotation", "slide"]}
    pretrain(config(root, tmp_path / "whole", **settings))
    with monkeypatch.context() as patch:
        crash_after(patch, 5)
        with pytest.raises(Crash):
            pretrain(config(root, tmp_path / "parts", **settings, **{"speed.num_workers": 1}))
    pretrain(config(root, tmp_path / "parts", **settings, **{"speed.num_workers": 3}))
    assert_same_bits(tmp_path / "whole", tmp_path / "parts")

    counts = last(tmp_path / "whole")["state"]["callbacks"]["SharesLog"]["counts"]
    level = level_of(root, **settings)
    found = Counter(drawn(level, annotations_of(root), 8 * 4))
    assert level.groups is not None and len({slide for slide, _ in found}) == 2
    assert counts.tolist() == [found[slide, value] for value, slide in level.groups.names] and counts.sum() == 32
    record = json.loads((tmp_path / "parts" / "status.json").read_text())["sampling"]
    assert (record["draws"], record["groups"], record["columns"]) == (32, 4, ["annotation", "slide_id"])
    assert [one["realised"] for one in record["shares"]] == (counts / 32).tolist()
    shares = [line["shares"] for line in metrics(tmp_path / "parts") if "shares" in line]
    assert shares[-1]["tumour / one"] == counts[level.groups.names.index(("tumour", "one"))].item() / 32
    # Other annotations are another run.
    table = (root / "tiles.csv").read_text()
    (root / "tiles.csv").write_text(table.replace(",tumour,", ",stroma,", 1))
    with pytest.raises(ConfigError, match="belongs to another run"):
        pretrain(config(root, tmp_path / "whole", **settings))
