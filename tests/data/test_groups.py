"""Balanced sampling: exact shares, no repetition within a group, against a slow direct implementation."""

import hashlib
import pickle
from collections import Counter
from itertools import product

import numpy as np
import pytest

from dino import randomness
from dino.data.datasets import SlideRanges
from dino.data.groups import Balance, Groups
from dino.data.samplers import GroupSampler

CENTRES = {"a1": "A", "a2": "A", "b1": "B", "c1": "C", None: "unknown"}
PATIENTS = {"a1": "p1", "a2": "p2", "b1": "p3", "c1": "p4", None: "unknown"}
# Slide a1 has two ranges, as in a flat folder.
SLIDES = ["a1"] * 7 + ["b1"] * 40 + ["a1"] * 3 + ["a2"] * 100 + [None] * 5 + ["c1"] * 1
RANGES = SlideRanges.of(SLIDES)


def value(slide: str | None, column: str) -> str:
    return {"slide_id": slide or "unknown", "centre": CENTRES[slide], "patient_id": PATIENTS[slide]}[column]


def groups(slots: int = 1000, **settings: object) -> Groups:
    return Groups.of(RANGES, value, Balance(**settings), slots)  # type: ignore[arg-type]


def reference_shares(balance: Balance) -> dict[tuple[str, ...], float]:
    """Shares by the definition: down a tree of samples, siblings in proportion to samples ** temperature."""

    def down(samples: list[str | None], columns: list[str], prefix: tuple[str, ...], share: float) -> None:
        if not columns:
            found[prefix] = share
            return
        kinds = {value(one, columns[0]) for one in samples}
        parts = {kind: [one for one in samples if value(one, columns[0]) == kind] for kind in kinds}
        mass = {kind: len(part) ** balance.temperature for kind, part in parts.items()}
        if columns[0] == balance.weighted:
            mass = {kind: amount * balance.weights.get(kind, 1) for kind, amount in mass.items()}
        for kind, part in parts.items():
            down(part, columns[1:], (*prefix, kind), share * mass[kind] / sum(mass.values()))

    found: dict[tuple[str, ...], float] = {}
    down(SLIDES, list(balance.columns), (), 1.0)
    return found


@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("columns", [["slide_id"], ["centre"], ["centre", "patient_id", "slide_id"]])
def test_shares_are_those_of_the_definition_to_a_slot(columns: list[str], temperature: float) -> None:
    for weights in ({}, {"A": 3.0, "C": 0.25}):
        balance = Balance(columns, temperature, "centre" if weights and "centre" in columns else None, weights)
        found, slots = Groups.of(RANGES, value, balance, 1000), 1000
        expected = reference_shares(balance)
        assert list(found.names) == sorted(expected) and found.cycle >= slots
        for name, share in zip(found.names, found.shares, strict=True):
            assert abs(share - expected[name]) * slots <= 1.01, name


def test_weights_apply_where_their_column_distinguishes_groups() -> None:
    def share(**settings: object) -> dict[str, float]:
        found = groups(10**6, **settings)
        by_centre: Counter[str] = Counter()
        for slide, number in group_of(found).items():
            by_centre[CENTRES[slide]] += found.shares[number] / np.diff(found.first_slide)[number]
        return by_centre

    weights = {"weighted": "centre", "weights": {"A": 3.0}}
    # Uniform over the 5 slides, those of A times 3: 6 : 1 : 1 : 1.
    assert share(columns=["slide_id"], **weights)["A"] == pytest.approx(6 / 9, abs=1e-5)
    # Each patient has one centre.
    assert share(columns=["patient_id", "slide_id"], **weights)["A"] == pytest.approx(6 / 9, abs=1e-5)
    # Without balance, tiles count times their weight: 110 of A, 46 others.
    assert share(**weights)["A"] == pytest.approx(330 / 376, abs=1e-5)
    # Weights of slides within centres.
    by_slide = groups(10**6, columns=["centre"], weighted="slide_id", weights={"a1": 10.0})
    assert by_slide.names[0] == ("A", "a1")
    assert by_slide.shares[:2] == pytest.approx([0.25 * 100 / 200, 0.25 * 100 / 200], abs=1e-5)
    # Weight 0 leaves a group out.
    assert "B" not in {name[0] for name in groups(columns=["centre"], weighted="centre", weights={"B": 0.0}).names}
    with pytest.raises(ValueError, match="no sample has a positive weight"):
        groups(weighted="centre", weights=dict.fromkeys([*"ABC", "unknown"], 0.0))


@pytest.mark.parametrize(
    "settings",
    [
        {"columns": ["slide_id"]},
        {"columns": ["centre", "slide_id"], "temperature": 0.5},
        {"columns": ["centre"], "weighted": "slide_id", "weights": {"a1": 2.5, "b1": 0.0}},
        {"columns": ["slide_id"], "per_slide": 6, "seed": 3},
        {"per_slide": 6},
    ],
)
def test_draws_are_those_of_a_direct_implementation(settings: dict) -> None:
    """A list of the items of each group that is used up pass after pass, and shares that are exact in each cycle."""
    found = groups(100, **settings)
    sampler = GroupSampler(found, seed=5)
    items = _members(found)
    kept = found.counts.sum()
    assert sum(map(len, items.values())) == kept == found.samples
    left: dict[int, set[int]] = {}
    for cycle in range(4):
        drawn: Counter[int] = Counter()
        for slot in range(found.cycle):
            index = sampler(cycle * found.cycle + slot)
            group = group_of(found)[SLIDES[index]]
            left[group] = left.get(group) or set(items[group])
            left[group].remove(index)  # raises if it was drawn before the others of its group
            drawn[group] += 1
        assert [drawn[group] for group in range(len(found))] == found.slots.tolist()


def group_of(found: Groups) -> dict[str | None, int]:
    """Group of each slide."""
    numbers = np.repeat(np.arange(len(found)), np.diff(found.first_slide))
    return dict(zip(found.slide_ids, numbers.tolist(), strict=True))


def _members(found: Groups) -> dict[int, list[int]]:
    """Samples of each group, by the definition of the subset: the first of a permutation of each slide's own."""
    members: dict[int, list[int]] = {group: [] for group in range(len(found))}
    for slide in found.slide_ids:
        own = [i for i, one in enumerate(SLIDES) if one == slide]
        position = found.slide_ids.index(slide)
        count = int(found.kept[position + 1] - found.kept[position])
        if count < len(own):
            seed = randomness.mixed(found.seed, f"subset/{slide}")
            own = [own[randomness.permuted(seed, i, len(own))] for i in range(count)]
        members[group_of(found)[slide]] += own
    return members


def test_draws_depend_on_nothing_but_their_number() -> None:
    found = groups(64, columns=["centre", "slide_id"])
    sampler = GroupSampler(found, seed=1)
    in_order = [sampler(draw) for draw in range(300)]
    again = pickle.loads(pickle.dumps(sampler))
    backwards = [again(draw) for draw in reversed(range(300))]
    assert backwards[::-1] == in_order
    assert [GroupSampler(groups(64, columns=["centre", "slide_id"]), 1)(draw) for draw in (250, 3)] == [
        in_order[250],
        in_order[3],
    ]
    assert [GroupSampler(found, seed=2)(draw) for draw in range(300)] != in_order
    first, second = (in_order[i * found.cycle : (i + 1) * found.cycle] for i in range(2))
    assert first != second


def test_replacements_are_of_the_same_group() -> None:
    found = groups(columns=["slide_id"])
    sampler = GroupSampler(found, seed=0)
    replaced = {}
    for draw, attempt in product(range(50), range(1, 6)):
        index = sampler(draw, attempt)
        assert SLIDES[index] == SLIDES[sampler(draw)]
        replaced[draw, attempt] = index
    assert len({*replaced.values()}) > 40
    assert all(sampler(draw, attempt) == index for (draw, attempt), index in replaced.items())


def test_the_subset_of_a_slide_depends_on_the_seed_and_the_slide_alone() -> None:
    def subset(found: Groups, slide: str) -> set[int]:
        group = group_of(found)[slide]
        return {i for i in (found.index(group, item) for item in range(found.counts[group])) if SLIDES[i] == slide}

    by_slide = subset(groups(columns=["slide_id"], per_slide=6), "a2")
    assert len(by_slide) == 6 and by_slide == subset(groups(columns=["centre"], per_slide=6), "a2")
    assert by_slide == subset(groups(per_slide=6), "a2") != subset(groups(per_slide=6, seed=1), "a2")


def test_the_fingerprint_tells_groups_apart() -> None:
    kinds = [
        groups(columns=["slide_id"]),
        groups(columns=["patient_id"]),
        groups(columns=["centre"]),
        groups(columns=["slide_id"], temperature=0.5),
        groups(columns=["slide_id"], weighted="centre", weights={"A": 2.0}),
        groups(per_slide=6),
        groups(per_slide=6, seed=1),
    ]
    assert len({one.fingerprint for one in kinds}) == len(kinds)
    assert groups(columns=["slide_id"]).fingerprint == kinds[0].fingerprint


def test_draws_of_slides_are_those_of_earlier_versions() -> None:
    """Fingerprint and draws that were recorded before columns of tiles could be balanced: runs go on as they began."""
    kinds = {
        "ee8635529dcf610e 736aa0ed3ebc40a5": {"columns": ["centre", "slide_id"], "temperature": 0.5},
        "103ac359a5602e98 48079522727fce7f": {"columns": ["slide_id"], "per_slide": 6, "seed": 3},
        "91eb4fc36fafc6b4 fb8312d7fb4321b4": {
            "columns": ["centre"],
            "weighted": "slide_id",
            "weights": {"a1": 2.5, "b1": 0.0},
        },
    }
    for recorded, settings in kinds.items():
        found = groups(100, **settings)
        sampler = GroupSampler(found, 5)
        draws = np.array([sampler(draw, attempt) for draw in range(1000) for attempt in (0, 1)], np.int64)
        assert f"{found.fingerprint[:16]} {hashlib.sha256(draws.tobytes()).hexdigest()[:16]}" == recorded
