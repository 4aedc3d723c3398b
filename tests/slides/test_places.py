"""Compact places of tiles against plain lists of coordinates."""

from pathlib import Path

import numpy as np
import pytest

from dino.errors import DataError
from dino.slides.places import Places, read_places
from dino.slides.tables import TILE_COLUMNS, read_slide_tiles


def scattered(rng: np.random.Generator, kind: str) -> np.ndarray:
    """Different places on a lattice, some of them as an overlap of 2/3 rounds them, in random order."""
    step, count = int(rng.integers(1, 900)), int(rng.integers(1, 400))
    origins = np.arange(30) * step
    if kind == "overlap":
        origins = (2 * step * np.arange(90) + 3) // 6
    if kind == "far":
        origins = origins + 2**31 - 40 * step
    coords = np.unique(rng.choice(np.unique(origins), (count, 2)), axis=0)
    return rng.permutation(coords).astype(np.int64)


@pytest.mark.parametrize("kind", ["lattice", "overlap", "far"])
def test_numbers_and_places_are_those_of_the_sorted_list(kind: str) -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        coords = scattered(rng, kind)
        listed = sorted(map(tuple, coords.tolist()), key=lambda place: (place[1], place[0]))
        places = Places.of(coords)
        assert len(places) == len(listed) and [places[i] for i in range(len(listed))] == listed
        assert places.coords.tolist() == [list(place) for place in listed]
        around = {(x + dx, y + dy) for x, y in listed for dx in (-1, 0, 1) for dy in (-1, 0, 1)}
        around |= {(x, y) for x, _ in listed for _, y in listed}
        assert {place for place in around if place in places} == {*listed}
    assert (-1, 0) not in places and len(Places.of(np.zeros((0, 2), np.int64))) == 0


def table(folder: Path, rows: list[tuple[str, int, int]]) -> Path:
    lines = [",".join(TILE_COLUMNS), *(f"{slide},{x},{y},512,0.5,0.4999,0.7" for slide, x, y in rows)]
    (folder / "tiles.csv").write_text("\n".join(lines) + "\n")
    return folder


def test_a_table_whose_slides_are_not_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    rows = [(f"s{i % 3}", int(x) * 512, int(y) * 512) for i, (x, y) in enumerate(rng.permutation(400).reshape(-1, 2))]
    table(tmp_path, rows)
    monkeypatch.setattr("dino.slides.columns.ROWS", 7)
    found, expected = read_places(tmp_path), read_slide_tiles(tmp_path)
    assert [*found] == [*expected]
    for slide, one in expected.items():
        assert {*map(tuple, found[slide].coords.tolist())} == {*map(tuple, one.coords.tolist())}
        assert (found[slide].step_lv0, found[slide].spacing_um) == (one.step_lv0, one.spacing_um)
        kept = rng.random(len(found[slide].places)) < 0.5
        assert np.array_equal(found[slide].some(kept).coords, found[slide].coords[kept])


def test_places_on_no_lattice_are_refused(tmp_path: Path) -> None:
    """They would need a bit for each pair of their coordinates."""
    table(tmp_path, [("s", 512 * i, 512 * i + i) for i in range(2000)])
    with pytest.raises(DataError, match="other places of slide 's': 2000 tiles in 2000 rows and 2000 columns"):
        read_places(tmp_path)
