"""Filters: equal to pandas' query, harmless for any expression, and errors that say what is wrong."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from dino.errors import ConfigError, DataError
from dino.slides.filtering import LONGEST, parse, select_tiles
from dino.slides.tables import TILES_TABLE, SlideStatus

STATUS = {
    "a": SlideStatus(
        "a", "ok", tiles=40, centre="A", patient_id="7", width=1000, further={"grade": "3", "site": "lung"}
    ),
    "b_1": SlideStatus("b_1", "ok", tiles=60, centre="B's", patient_id="9", width=5000, further={"grade": "1"}),
    "c": SlideStatus("c", "ok", tiles=20, width=20, further={"site": "x == 1"}),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("root")
    rng = np.random.default_rng(0)
    rows = []
    for slide, row in STATUS.items():
        for i in range(row.tiles):
            tissue, kind = rng.random(), rng.choice(["tumour", "stroma", ""])
            blur = f"{rng.random():.3f}" if rng.random() < 0.9 else ""
            rows.append(f"{slide},{i * 256},{i % 3 * 256},256,0.5,0.5,{tissue:.4f},{kind},{blur}")
    header = "slide_id,x,y,step_lv0,spacing_requested_um,spacing_um,tissue,annotation,blur"
    (folder / TILES_TABLE).write_text("\n".join([header, *rows]) + "\n")
    return folder


def joined(root: Path) -> pd.DataFrame:
    """The tiles with the columns of their slides, as pandas joins them."""
    tiles = pd.read_csv(root / TILES_TABLE, dtype={"annotation": str}, keep_default_na=False, na_values={"blur": [""]})
    slides = pd.DataFrame(
        {"slide_id": s.slide_id, "centre": s.centre, "patient_id": s.patient_id, "width": s.width, **s.further}
        for s in STATUS.values()
    )
    slides["grade"] = slides["grade"].astype(float)
    slides["site"] = slides["site"].fillna("")
    return tiles.merge(slides, on="slide_id")


def places(found: Mapping[str, np.ndarray]) -> set[tuple[str, int, int]]:
    return {(slide, int(place) & (2**32 - 1), int(place) >> 32) for slide, kept in found.items() for place in kept}


@pytest.mark.parametrize(
    "expression",
    [
        "tissue > 0.5",
        "tissue > 0.5 & blur < 0.3",
        "tissue > 0.5 and not (blur < 0.3 or annotation == 'stroma')",
        "0.2 < tissue <= 0.8 and slide_id != 'b_1'",
        'annotation in ["tumour", "stroma"] | tissue > 0.9',
        "annotation not in ['tumour'] and grade in [1, 3]",
        '~(centre == "B\'s") and x % 512 == 0',
        "x / 256 + y // 256 * 2 - 1 > -tissue * 10",
        "grade >= 2 or site == 'x == 1'",
        "blur == blur",
        "width * tissue < 500",
        "centre < 'B' and site != ''",
        "tissue > 0.1 and tissue > 0.2 and (tissue > 0.3 and blur != 0.5)",
    ],
)
def test_it_keeps_the_rows_that_pandas_keeps(root: Path, expression: str) -> None:
    table = joined(root)
    expected = table.query(expression, engine="python")
    selection = select_tiles(root, expression, STATUS)
    assert places(selection.places) == {*zip(expected.slide_id, expected.x, expected.y, strict=True)}
    assert (selection.tiles, selection.samples) == (len(table), len(expected))


def test_tiles_are_counted_for_the_first_condition_that_they_do_not_meet(root: Path) -> None:
    table = joined(root)
    selection = select_tiles(root, "tissue > 0.4 and annotation == 'tumour' and centre != ''", STATUS)
    first = table[table.tissue > 0.4]
    second = first[first.annotation == "tumour"]
    third = second[second.centre != ""]
    assert selection.left_out == {
        "tissue > 0.4": len(table) - len(first),
        "annotation == 'tumour'": len(first) - len(second),
        "centre != ''": len(second) - len(third),
    }
    assert f"{len(third)} of {len(table)} tiles are kept" in str(selection)
    assert select_tiles(root, "tissue > 0.4", STATUS, {"a", "c"}).tiles == 60
    assert select_tiles(root, "patient_id in [7, 8]", STATUS).samples == 40  # ids that are numbers


HOSTILE = [
    "__import__('os').system('touch {marker}')",
    "tissue.__class__ == 1",
    "@pd.read_pickle('{marker}') == 1",
    "@tissue > 0",
    "`tissue` > 0",
    "tissue > 0 and open('{marker}', 'w')",
    "(lambda: 1)() == 1",
    "[x for x in (1, 2)] == 1",
    "tissue > 0 if open('{marker}', 'w') else 1",
    'f\'{{open("{marker}", "w")}}\' == slide_id',
    "(y := 3) > 2",
    "tissue[0] > 0",
    "x ** 99999999 > 1",
    "9" * 400 + " > x",
    "1e400 > x",
    "'a' * 999999999999 == slide_id",
    "x << 99999999999 > 1",
    "slide_id in (slide_id, 'a')",
    "tissue > 0; import os",
    "tissue > 0\nimport os",
    "(" * 900 + "tissue > 0" + ")" * 900,
    "~" * 1900 + "(x > 0)",
    "tissue > 0 and " * 150,
    "x > 0" + " or x > 0" * 400,
    "tissue > True",
    "tissue > None",
    "tissue is 1",
    "tissue > 0 # comment",
    "\0",
    "",
    " ",
    "()",
    "tissue",
    "tissue + 1",
    "not tissue",
    "-(tissue > 1) == 1",
    "centre + 'a' == 'Aa'",
    "1 < 2",
    "tissue > 'a'",
    "grade > 2 and grade == 'x'",
    "grade in [1, 'a']",
    "tissue in 0.5",
    "tissue in []",
    "tissue == [0.5]",
    "tisue > 0.5",
    "x == 1j",
    "b'a' == slide_id",
    "... == slide_id",
]


@pytest.mark.parametrize("expression", HOSTILE, ids=lambda text: text[:30])
def test_any_other_expression_is_refused_in_one_line_and_does_nothing(
    root: Path, tmp_path: Path, expression: str
) -> None:
    marker = tmp_path / "marker"
    try:
        kept = select_tiles(root, expression.replace("{marker}", str(marker)), STATUS).samples
    except ConfigError as error:
        assert "\n" not in str(error) and "expected" in str(error)
    else:
        assert expression.startswith(("tissue > 0 #", "((((", "~~~~")) and kept  # harmless
    assert not marker.exists()


def test_errors_say_what_to_write(root: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'tissue'"):
        select_tiles(root, "tisue > 0.5", STATUS)
    with pytest.raises(ConfigError, match="annotation, blur, centre, grade"):
        select_tiles(root, "elephants > 0.5", STATUS)
    with pytest.raises(DataError, match=r"numbers in column site.*'lung'|could not convert string to float: 'lung'"):
        select_tiles(root, "site > 3", STATUS)
    with pytest.raises(DataError, match="found none"):
        select_tiles(root, "tissue > 2", STATUS)
    with pytest.raises(DataError, match=r"tiles\.csv"):
        select_tiles(tmp_path, "tissue > 0.5", STATUS)
    with pytest.raises(ConfigError, match=str(LONGEST)):
        parse("x > 0 or " * 1000)
