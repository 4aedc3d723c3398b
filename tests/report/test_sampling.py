"""The report's section on sampling."""

from types import SimpleNamespace

import numpy as np

from dino.data import Balance, Groups, SlideRanges
from dino.report.sampling import sampling_sections
from dino.train.shares import SHOWN, summary


def run_of(slides: list[str], counts: list[int]) -> SimpleNamespace:
    groups = Groups.of(SlideRanges.of(slides), lambda slide, column: str(slide), Balance(["slide_id"]))
    return SimpleNamespace(name="Patch level", status={"sampling": summary(groups, np.array(counts))})


def test_a_table_of_expected_and_realised_shares() -> None:
    (section,) = sampling_sections([run_of(["a", "a", "a", "b"], [30, 10])])  # type: ignore[list-item]
    (table,) = section.items
    assert table.rows == [("a", "3", "50.00%", "75.00%"), ("b", "1", "50.00%", "25.00%")]  # type: ignore[union-attr]
    assert "40 draws of 4 tiles, by slide_id: 2 groups" in table.caption and "25.00%" in table.caption
    assert sampling_sections([SimpleNamespace(name="", status={})]) == []  # type: ignore[list-item]


def test_a_table_of_what_a_filter_left_out() -> None:
    found = {"expression": "tissue > 0.5 and x > 0", "tiles": 200, "left_out": {"tissue > 0.5": 50, "x > 0": 1}}
    (section,) = sampling_sections([SimpleNamespace(name="", status={"data": {"filter": found}})])  # type: ignore[list-item]
    (table,) = section.items
    assert table.rows == [("tissue > 0.5", "50", "25.00%"), ("x > 0", "1", "0.50%")]  # type: ignore[union-attr]


def test_of_many_groups_those_that_deviate_most_are_shown() -> None:
    slides = [f"{number:03}" for number in range(100)]
    (section,) = sampling_sections([run_of(slides, [5 if slide == "042" else 1 for slide in slides])])  # type: ignore[list-item]
    (table,) = section.items
    assert len(table.rows) == SHOWN and "042" in [row[0] for row in table.rows]  # type: ignore[union-attr]
