"""From the settings of ``sampling`` and the tables of a data folder to groups of tiles."""

import difflib
from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path

import numpy as np

from dino.config.schema import SamplingConfig
from dino.data import Balance, Dataset, Groups, SlideRanges
from dino.data.groups import UNKNOWN_GROUP
from dino.data.tile_values import TileValues
from dino.errors import ConfigError, DataError
from dino.evaluate.tables import read_rows
from dino.files import printable
from dino.slides.tables import ANNOTATION_COLUMNS, TILE_NUMBERS, SlideStatus

NONE = "none"
ANNOTATION = ANNOTATION_COLUMNS[0]
WEIGHT = "weight"
SHORT = {"slide": "slide_id", "patient": "patient_id"}
COLUMNS = ("slide_id", "patient_id", "centre", "scanner", "stain")
SHOWN = 3  # examples in messages

Status = Mapping[str, SlideStatus]


def build_groups(
    sampling: SamplingConfig, parts: Sequence[tuple[Path, Dataset]], status: Status, seed: int
) -> Groups | None:
    """The groups that settings ask for; None where every tile is drawn equally often.

    Args:
        sampling: The settings.
        parts: Each data folder, and its tiles.
        status: What is recorded of the slides.
        seed: The run's seed.

    Raises:
        ConfigError: If a setting is out of range, or names a column that there is not.
        DataError: If the table of weights cannot be used, or a column is blank for all slides or tiles.
    """
    _check_numbers(sampling)
    tiles = TileValues(parts)
    columns = _balanced(sampling.balance, tiles, status)
    if not columns and not sampling.weights and not sampling.max_tiles_per_slide:
        return None
    weighted, weights = read_weights(Path(sampling.weights), tiles, status) if sampling.weights else (None, {})
    named = [column for column in dict.fromkeys([*columns, weighted]) if column is not None]
    of_tiles = [column for column in named if column not in slide_columns(status)]
    if of_tiles and sampling.max_tiles_per_slide:
        raise ConfigError(
            f"expected no sampling.max_tiles_per_slide where '{of_tiles[0]}', a column of tiles, shares the draws, "
            f"found {sampling.max_tiles_per_slide}; leave one of them out"
        )
    ranges = tiles.ranges(of_tiles)
    if weighted is not None:
        _check_values(Path(sampling.weights or ""), weighted, weights, _values_of(ranges, status, weighted))
    _check_blank(named, ranges, status)
    balance = Balance(columns, sampling.temperature, weighted, weights, sampling.max_tiles_per_slide, seed)
    try:
        return Groups.of(ranges, lambda slide, column: value_of(status, slide, column), balance)
    except ValueError:
        raise DataError(f"{sampling.weights}: expected a positive weight of tiles to train on, found only 0") from None


def _check_blank(columns: Sequence[str], ranges: SlideRanges, status: Status) -> None:
    """Raise DataError if a column has no value of any slide or tile."""
    for column in columns:
        if column in ranges.columns:
            place = ranges.columns.index(column)
            if all(ranges.values[code][place] == UNKNOWN_GROUP for _, code in ranges.units):
                raise DataError(
                    f"expected tiles with a value of '{column}' to balance, found none; give annotation_path in "
                    "slides.csv and run `dino tile` again, which cuts nothing twice"
                )
        elif all(value_of(status, slide, column) == UNKNOWN_GROUP for slide in ranges.slide_ids):
            raise DataError(
                f"expected slides with a value of '{column}' to balance, found none; give it in slides.csv and run "
                "`dino tile` again, which cuts nothing twice"
            )


def slide_columns(status: Status) -> set[str]:
    """Columns of the slides, which go before columns of tiles of the same name."""
    return {*COLUMNS, *(name for row in status.values() for name in row.further)}


def _values_of(ranges: SlideRanges, status: Status, column: str) -> set[str]:
    """Values of a column, also of slides and tiles that are not trained on."""
    if column in ranges.columns:
        place = ranges.columns.index(column)
        return {value[place] for value in ranges.values}
    return {value_of(status, slide, column) for slide in (*ranges.slide_ids, *status)}


def value_of(status: Status, slide: str | None, column: str | None) -> str:
    """A slide's value of a column, ``unknown`` where it is blank."""
    if column == "slide_id" or slide is None:
        return slide or UNKNOWN_GROUP
    row = status.get(slide)
    if row is None:
        return UNKNOWN_GROUP
    return str((getattr(row, column) if column in COLUMNS else row.further.get(str(column))) or UNKNOWN_GROUP)


def describe(groups: Groups | None) -> list[str]:
    """One line on how groups share the draws, and one on slides that are in none."""
    if groups is None:
        return []
    by = f"{len(groups):,} groups ({', '.join(groups.columns)})" if groups.columns else "all tiles alike"
    order = np.argsort(groups.shares, kind="stable")
    least, most = int(order[0]), int(order[-1])
    shown = f", with shares from {_amount(groups, least)} to {_amount(groups, most)}" if len(groups) > 1 else ""
    lines = [f"sampling: {groups.samples:,} tiles in {by}{shown}"]
    for level, column in enumerate(groups.columns):
        found = [i for i, name in enumerate(groups.names) if name[level] == UNKNOWN_GROUP]
        if found:
            first = groups.first_slide
            slides = len({slide for group in found for slide in groups.slide_ids[first[group] : first[group + 1]]})
            tiles = int(groups.counts[found].sum())
            lines.append(f"sampling: {tiles:,} tiles of {slides:,} slides have no {column}; they form group 'unknown'")
    return lines


def _amount(groups: Groups, group: int) -> str:
    return f"{groups.shares[group]:.3g} ({printable(groups.label(group))}: {int(groups.counts[group]):,} tiles)"


def _check_numbers(sampling: SamplingConfig) -> None:
    if not 0 <= sampling.temperature <= 1:
        raise ConfigError(f"expected sampling.temperature from 0 to 1, found {sampling.temperature:g}")
    if sampling.max_tiles_per_slide < 0:
        raise ConfigError(f"expected sampling.max_tiles_per_slide of at least 0, found {sampling.max_tiles_per_slide}")


def _balanced(names: Sequence[str], tiles: TileValues, status: Status) -> list[str]:
    """The columns to balance.

    Raises:
        ConfigError: If there is no such column, or one is named twice.
    """
    if list(names) in ([], [NONE]):
        return []
    of_slides = slide_columns(status)
    columns = [name if name in of_slides else SHORT.get(name, name) for name in names]
    for name, column in zip(names, columns, strict=True):
        if column not in of_slides and column not in tiles.columns:
            raise _no_such_column(name, sorted(of_slides), tiles.columns)
        if columns.count(column) > 1:
            raise ConfigError(f"expected each column of sampling.balance once, found '{name}' twice")
    return columns


def _no_such_column(name: str, of_slides: Sequence[str], of_tiles: Sequence[str]) -> ConfigError:
    close = difflib.get_close_matches(name, [*of_slides, *of_tiles], 1, 0.6)
    if close:
        hint = f"did you mean '{printable(close[0])}'?"
    elif name in {*TILE_NUMBERS, ANNOTATION_COLUMNS[1]}:
        hint = "numbers of tiles are for filter="
    elif name == ANNOTATION:
        hint = "give annotation_path in slides.csv and run `dino tile` again"
    else:
        hint = "add it to slides.csv and run `dino tile` again"
    found = f"slides ({', '.join(map(printable, of_slides))})"
    if of_tiles:
        found += f" or tiles ({', '.join(map(printable, of_tiles))})"
    return ConfigError(f"expected sampling.balance to name columns of {found}, found '{name}'; {hint}")


def read_weights(path: Path, tiles: TileValues, status: Status) -> tuple[str, dict[str, float]]:
    """The column and the weights of ``sampling.weights``.

    Args:
        path: A CSV with ``weight`` and one column of the slides or the tiles.
        tiles: The tables of the tiles.
        status: What is recorded of the slides.

    Raises:
        DataError: If the table cannot be read, or has values twice, or with a weight that is none.
    """
    rows = read_rows(path, [WEIGHT])
    of_slides = slide_columns(status)
    columns = [name for name in rows[0] if name in {*of_slides, *SHORT}]
    columns = columns or [name for name in rows[0] if name != WEIGHT and name in tiles.columns]
    if len(columns) != 1:
        found = ", ".join(printable(name) for name in rows[0])
        raise DataError(
            f"{path}: expected one column of the slides, such as slide_id or centre, beside weight, found {found}"
        )
    column = columns[0] if columns[0] in of_slides else SHORT.get(columns[0], columns[0])
    weights: dict[str, float] = {}
    for row in rows:
        value = row[columns[0]] or UNKNOWN_GROUP
        if value in weights:
            raise DataError(f"{path}: expected one weight of each {column}, found two of '{printable(value)}'")
        weights[value] = _weight(row[WEIGHT], value, path)
    return column, weights


def _check_values(path: Path, column: str, weights: Mapping[str, float], known: set[str]) -> None:
    """Raise DataError if there are weights of values that no slide or tile has."""
    unknown = [value for value in weights if value not in known]
    if unknown:
        shown = ", ".join(f"'{printable(value)}'" for value in unknown[:SHOWN])
        close = difflib.get_close_matches(unknown[0], known, 1, 0.75)
        hint = f"did you mean '{printable(close[0])}'?" if close else "remove them"
        raise DataError(
            f"{path}: expected values of {column} that slides or tiles have, found {len(unknown)} others: {shown}; "
            f"{hint}"
        )


def _weight(text: str, value: str, path: Path) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = -1.0
    if not (isfinite(weight) and weight >= 0):
        raise DataError(f"{path}: expected a weight of at least 0 for '{printable(value)}', found '{printable(text)}'")
    return weight
