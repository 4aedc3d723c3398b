"""Groups of tiles by columns of the tables of tiles, against dictionaries of all tiles."""

import csv
import pickle
import random
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from dino.data.datasets import Sample, SlideRanges, TileDataset
from dino.data.groups import Balance, Groups
from dino.data.images import Names
from dino.data.joined import JoinedDataset
from dino.data.samplers import GroupSampler
from dino.data.tile_values import TileValues
from dino.slides.columns import write_parquet
from dino.slides.tables import TILE_NUMBERS

HEADER = ["slide_id", *TILE_NUMBERS, "annotation", "annotation_fraction", "block"]
CENTRES = {"s0": "A", "s1": "A", "s2": "B", "plain": "B"}
Tiles = dict[tuple[str, int, int], tuple[str, str]]  # annotation and block of each listed tile


class Stored:
    """Names of tile files."""

    def __init__(self, names: list[str]) -> None:
        self.names = Names(names)
        self.ranges = SlideRanges.of(name.rpartition("/")[2].split("_")[0] for name in names)

    def read(self, index: int) -> Sample:
        raise NotImplementedError


def write_table(root: Path, tiles: Tiles, kind: str, seed: int) -> None:
    """The table of the tiles of a ROOT, with rows in any order, so that those of a slide are not together."""
    rows = [(slide, x, y, 32, 0.5, 0.5, 1.0, value, 0.5, block) for (slide, x, y), (value, block) in tiles.items()]
    random.Random(seed).shuffle(rows)
    root.mkdir(exist_ok=True)
    if kind == "csv":
        with (root / "tiles.csv").open("w", newline="") as file:
            csv.writer(file).writerows([HEADER, *rows])
    else:
        lines = [",".join(map(str, row)) + "\n" for row in [HEADER, *rows]]
        numbers = {**TILE_NUMBERS, "annotation_fraction": np.float64}
        write_parquet(root / "tiles.parquet", (line.encode() for line in lines), numbers)


def listed(seed: int = 0) -> Tiles:
    """Tiles of three slides; neighbours mostly have one annotation, as on a slide."""
    rng = random.Random(seed)
    tiles: Tiles = {}
    for slide, side in (("s0", 6), ("s1", 9), ("s2", 12)):
        value = ""
        for y in range(side):
            for x in range(side):
                value = rng.choice(["tumour", "stroma", ""]) if rng.random() < 0.3 else value
                tiles[slide, x * 32, y * 32] = (value if slide != "s0" or value != "stroma" else "tumour", f"b{x % 2}")
    return tiles


def dataset_of(tiles: Tiles, *, flat: bool = False) -> tuple[TileDataset, list[tuple[str, int, int]]]:
    """Files of the tiles, and of one that is not listed, sorted by name; and the place of each.

    In a flat folder, where files are given in another order, a slide has several ranges.
    """
    places = sorted([*tiles, ("s1", 9999, 0)], key=lambda at: f"{at[0]}_{at[1]}_{at[2]}")
    if flat:
        places = places[::3] + places[1::3] + places[2::3]
    return TileDataset(Stored([f"{slide}_{x}_{y}.jpg" for slide, x, y in places])), places  # type: ignore[arg-type]


def value(slide: str | None, column: str) -> str:
    return {"slide_id": str(slide), "centre": CENTRES[str(slide)]}[column]


@pytest.mark.parametrize("kind", ["csv", "parquet"])
@pytest.mark.parametrize("flat", [False, True])
def test_values_are_matched_by_slide_and_position(tmp_path: Path, kind: str, flat: bool) -> None:
    if kind == "parquet":
        pytest.importorskip("pyarrow")
    tiles = listed()
    write_table(tmp_path / "root", tiles, kind, seed=1)
    dataset, places = dataset_of(tiles, flat=flat)
    values = TileValues([(tmp_path / "root", dataset)])
    assert values.columns == ["annotation", "block"]
    for columns in (["annotation"], ["block", "annotation"]):
        ranges = values.ranges(columns)
        units = [unit for unit, count in zip(ranges.units, np.diff(ranges.starts), strict=True) for _ in range(count)]
        found = [(slide, *ranges.values[code]) for slide, code in units]
        cells = [dict(zip(("annotation", "block"), tiles.get(place, ("", "")), strict=True)) for place in places]
        expected = [
            (place[0], *(cell[name] or "unknown" for name in columns))
            for place, cell in zip(places, cells, strict=True)
        ]
        assert found == expected
        runs = 1 + sum(one != other for one, other in pairwise(expected))
        assert len(ranges.slide_ids) == runs < len(places)  # memory grows with the runs
    assert TileValues([(tmp_path, dataset)]).columns == []  # no table


def test_a_folder_without_the_column_has_unknown_values(tmp_path: Path) -> None:
    tiles = listed()
    write_table(tmp_path / "root", tiles, "csv", seed=1)
    dataset, places = dataset_of(tiles)
    other = TileDataset(Stored(["plain_0_0.jpg", "plain_32_0.jpg"]))  # type: ignore[arg-type]
    inner = JoinedDataset([dataset, other])
    assert inner.places(len(places), len(places) + 2).tolist() == [[0, 0], [32, 0]]
    assert inner.places(2, 4).tolist() == [list(place[1:]) for place in places[2:4]]
    for parts in ([(tmp_path / "root", dataset), (tmp_path, other)], [(tmp_path, other), (tmp_path / "root", dataset)]):
        ranges = TileValues(parts).ranges(["annotation"])
        groups = Groups.of(ranges, value, Balance(["annotation"]))
        counts = Counter(tiles.get(place, ("", ""))[0] or "unknown" for place in places)
        counts["unknown"] += 2
        assert dict(zip(groups.names, groups.counts.tolist(), strict=True)) == {(k,): n for k, n in counts.items()}


@pytest.mark.parametrize(
    "settings",
    [
        {"columns": ["annotation"]},
        {"columns": ["centre", "annotation"], "temperature": 0.5},
        {"columns": ["annotation", "slide_id"]},
        {"columns": ["annotation"], "weighted": "annotation", "weights": {"tumour": 3.0, "unknown": 0.0}},
        {"columns": ["slide_id"], "weighted": "annotation", "weights": {"stroma": 2.0}},
    ],
)
def test_draws_are_those_of_a_direct_implementation(tmp_path: Path, settings: dict) -> None:
    """Shares by the definition, exact in each cycle, and no tile of a group again before all others of it."""
    tiles, balance = listed(), Balance(**settings)
    write_table(tmp_path, tiles, "csv", seed=2)
    dataset, places = dataset_of(tiles, flat=True)
    groups = Groups.of(TileValues([(tmp_path, dataset)]).ranges(["annotation"]), value, balance, 500)
    sampler = GroupSampler(groups, seed=5)

    def cell(index: int, column: str) -> str:
        place = places[index]
        return (tiles.get(place, ("", ""))[0] or "unknown") if column == "annotation" else value(place[0], column)

    def weight(index: int) -> float:
        return balance.weights.get(cell(index, balance.weighted), 1.0) if balance.weighted else 1.0

    members: dict[tuple[str, ...], set[int]] = {}
    for index in range(len(places)):
        if weight(index):
            members.setdefault(tuple(cell(index, name) for name in groups.columns), set()).add(index)
    assert dict(zip(groups.names, groups.counts, strict=True)) == {name: len(own) for name, own in members.items()}
    assert len(members) > 1
    shares = reference_shares(members, balance, weight)
    assert groups.shares == pytest.approx([shares[name] for name in groups.names], abs=1.01 / 500)
    left: dict[tuple[str, ...], set[int]] = {}
    for cycle in range(3):
        drawn: Counter[tuple[str, ...]] = Counter()
        for slot in range(groups.cycle):
            index = sampler(cycle * groups.cycle + slot)
            name = tuple(cell(index, column) for column in groups.columns)
            left[name] = left.get(name) or set(members[name])
            left[name].remove(index)  # raises if it was drawn before the others of its group
            drawn[name] += 1
            assert groups.names[groups.at([index])[0]] == name
        assert [drawn[name] for name in groups.names] == groups.slots.tolist()
    again = GroupSampler(pickle.loads(pickle.dumps(groups)), seed=5)
    assert [again(draw, 1) for draw in range(50)] == [sampler(draw, 1) for draw in range(50)]
    assert (groups.at([sampler(draw, 1) for draw in range(50)]) == groups.at([sampler(i) for i in range(50)])).all()


def reference_shares(members: dict, balance: Balance, weight: object) -> dict[tuple[str, ...], float]:
    """Level by level: siblings in proportion to tiles ** temperature, at the level of the weights times them."""
    depth = len(next(iter(members)))
    shares = {(): 1.0}
    for level in range(depth):
        temperature = balance.temperature if level < len(balance.columns) else 1.0
        mass: Counter[tuple[str, ...]] = Counter()
        for name, own in members.items():
            mass[name[: level + 1]] += len(own)
        weighted = balance.weighted is not None and level == depth - 1
        amount = {
            name: count**temperature * (weight(min(members[name])) if weighted else 1.0)  # type: ignore[operator]
            for name, count in mass.items()
        }
        shares |= {
            name: shares[name[:-1]] * one / sum(other for key, other in amount.items() if key[:-1] == name[:-1])
            for name, one in amount.items()
        }
    return {name: shares[name] for name in members}


def test_other_values_are_other_groups(tmp_path: Path) -> None:
    tiles = listed()
    dataset, _ = dataset_of(tiles)
    prints = []
    for number, place in enumerate([None, ("s2", 64, 64), ("s2", 96, 64)]):
        changed = dict(tiles)
        if place:
            changed[place] = ("necrosis", "b0")
        write_table(tmp_path / str(number), changed, "csv", seed=number)
        ranges = TileValues([(tmp_path / str(number), dataset)]).ranges(["annotation"])
        prints.append(Groups.of(ranges, value, Balance(["annotation"])).fingerprint)
    assert len({*prints}) == 3
    write_table(tmp_path / "shuffled", tiles, "csv", seed=9)  # the order of the rows is no matter
    ranges = TileValues([(tmp_path / "shuffled", dataset)]).ranges(["annotation"])
    assert Groups.of(ranges, value, Balance(["annotation"])).fingerprint == prints[0]
