"""Reading of tables of labels: rows, columns and values, with errors that name lines and columns."""

import csv
import difflib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from dino.errors import DataError
from dino.files import printable

MISSING = {"", "nan", "<na>"}
DELIMITERS = ",;\t"  # spreadsheets write semicolons where the comma is the decimal separator
NAMED = 3  # examples listed in an error


def read_rows(path: Path, required: Sequence[str]) -> list[dict[str, str]]:
    """Read a table with a header line.

    Args:
        path: A text file of columns separated by commas, semicolons or tabs, whichever the header line contains.
        required: Columns that it must have.

    Returns:
        At least one row, each with its cells by column, without blanks around them.

    Raises:
        DataError: If the table or a column is missing, it cannot be read or has no row.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            header = file.readline()
            file.seek(0)
            reader = csv.DictReader(file, delimiter=max(DELIMITERS, key=header.count))
            rows = [{k: (v or "").strip() for k, v in row.items() if isinstance(k, str)} for row in reader]
            columns = reader.fieldnames or []
    except FileNotFoundError:
        raise DataError(f"expected a table of labels at {path}, found none") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"expected a CSV of labels at {path}, could not read it: {error}") from None
    check_columns(path, columns, required)
    if not rows:
        raise DataError(f"{path}: expected labels, found no row")
    return rows


def check_columns(path: Path, columns: Sequence[str], required: Sequence[str]) -> None:
    """Check that a table has some columns.

    Raises:
        DataError: If one is missing, with the nearest name.
    """
    lacking = [name for name in required if name not in columns]
    if lacking:
        found = ", ".join(printable(name) for name in columns) or "none"
        raise DataError(
            f"{path}: expected columns {', '.join(required)}; missing {', '.join(lacking)}; found {found}"
            + _nearest(lacking[0], [name for name in columns if name not in required])
        )


def _nearest(name: str, columns: Sequence[str]) -> str:
    lower = {column.lower(): column for column in columns}
    close = difflib.get_close_matches(name, lower, 1)
    return f"; did you mean '{printable(lower[close[0]])}'?" if close else ""


def filled_column(path: Path, rows: Sequence[Mapping[str, str]], name: str) -> list[str]:
    """A column that has a value in every row.

    Raises:
        DataError: If it is missing, or blank in a row.
    """
    if name not in rows[0]:
        found = [column for column in rows[0] if column]
        hint = _nearest(name, found)
        raise DataError(f"{path}: expected a column {name}, found {', '.join(map(printable, found))}{hint}")
    values = [row[name] for row in rows]
    refuse_lines(path, [i for i, value in enumerate(values) if value.lower() in MISSING], f"a {name}", "blank ones")
    return values


def canonical(labels: Sequence[str]) -> list[str]:
    """One spelling per class: programs differ in how they write numbers and booleans (1 or 1.0, True or true)."""
    if {label.lower() for label in labels} <= {"true", "false"}:
        return [label.lower() for label in labels]
    try:
        numbers = [float(label) for label in labels]
    except ValueError:
        return list(labels)
    return [f"{number:.12g}" for number in numbers]


def refuse_lines(path: Path, rows: Sequence[int], expected: str, found: str) -> None:
    """Raise DataError if there are rows with something else than what is expected.

    Args:
        path: The table.
        rows: Their indices; none if all is well.
        expected: What is expected in every row.
        found: What these rows have instead.
    """
    if rows:  # line 1 is the header
        lines = first_few([i + 2 for i in rows])
        raise DataError(f"{path}: expected {expected} in every row, found {len(rows)} {found} (line {lines})")


def first_few(items: Iterable[object]) -> str:
    """The first items as text, for a message."""
    items = list(items)
    return ", ".join(str(i) for i in items[:NAMED]) + (", ..." if len(items) > NAMED else "")
