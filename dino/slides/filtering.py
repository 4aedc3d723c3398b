"""Filters of tiles: conditions on the columns of tiles.csv and of the slides, in the syntax of pandas' ``query``."""

import ast
import difflib
import io
import operator
import tokenize
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from dino.errors import ConfigError, DataError
from dino.files import printable
from dino.slides.places import PlacedTiles, read_places  # noqa: F401 -- of roots, before a filter
from dino.slides.tables import (
    ANNOTATION_COLUMNS,
    TILE_COLUMNS,
    TILES_TABLE,
    SlideStatus,
    tile_chunks,
    tile_header,
)

SLIDE_TEXTS = ("patient_id", "partition", "centre", "scanner", "stain")
SLIDE_NUMBERS = ("tiles", "regions", "width", "height")
TEXTS = {"slide_id", ANNOTATION_COLUMNS[0], *SLIDE_TEXTS}
NUMBERS = {*TILE_COLUMNS, ANNOTATION_COLUMNS[1], *SLIDE_NUMBERS} - TEXTS
LONGEST = 2000  # letters of an expression
LARGEST = 2**53  # of numbers: integers up to it are exact in float64

COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.In: np.isin,
    ast.NotIn: lambda left, right: ~np.isin(left, right),
}
ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}


@dataclass(frozen=True, eq=False)
class Selection:
    """The tiles that a filter keeps.

    Attributes:
        expression: The filter.
        places: Of each slide, int64 ``y << 32 | x`` of the tiles that are kept, in the order of tiles.csv.
        tiles: Number of tiles that it was applied to.
        left_out: Number of tiles that each condition left out; a tile counts for the first that it does not meet.
    """

    expression: str
    places: Mapping[str, np.ndarray]
    tiles: int
    left_out: Mapping[str, int]

    @property
    def samples(self) -> int:
        """Number of tiles that are kept."""
        return self.tiles - sum(self.left_out.values())

    def __str__(self) -> str:
        """One line for the first lines of a run."""
        reasons = "; ".join(f"{count:,} without {condition}" for condition, count in self.left_out.items() if count)
        return f"filter: {self.samples:,} of {self.tiles:,} tiles are kept; left out: {reasons or 'none'}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for ``status.json``."""
        return {"expression": self.expression, "tiles": self.tiles, "left_out": dict(self.left_out)}

    def of_listed(self, tiles: Sequence[PlacedTiles]) -> list[PlacedTiles]:
        """The tiles of some slides that are kept; slides without any are left out."""
        kept = [(one, self.places[one.slide_id]) for one in tiles if len(self.places.get(one.slide_id, ()))]
        return [one.some(np.isin(one.coords[:, 1] << 32 | one.coords[:, 0], places)) for one, places in kept]

    def of_files(
        self, names: Sequence[str], place_of: Callable[[str], tuple[str, int, int] | None]
    ) -> tuple[list[int], "Selection"]:
        """Indices of the tile files that are kept, and the selection without those that tiles.csv does not list.

        Args:
            names: Names of the files, those of a slide after one another.
            place_of: Returns slide, x and y of a file.
        """
        kept, slide, places = [], None, set()
        for index, name in enumerate(names):
            found = place_of(name)
            if found is None:
                continue
            if found[0] != slide:
                slide = found[0]
                places = {*self.places.get(slide, np.zeros(0)).tolist()}
            if found[2] << 32 | found[1] in places:
                kept.append(index)
        unlisted = {f"a row in {TILES_TABLE}": len(names) - self.tiles} if len(names) > self.tiles else {}
        return kept, replace(self, tiles=max(self.tiles, len(names)), left_out={**self.left_out, **unlisted})


def select_tiles(
    root: Path, expression: str, status: Mapping[str, SlideStatus], held_out: Collection[str] = ()
) -> Selection:
    """Apply a filter to the tiles that a data folder lists.

    Args:
        root: The data folder.
        expression: Conditions, joined by ``and``: comparisons of columns of tiles.csv and of the slides with numbers
            and texts, ``in`` and ``not in`` with lists, ``and``, ``or``, ``not`` (``&``, ``|``, ``~``) and arithmetic.
        status: What is recorded of the slides.
        held_out: Slides whose tiles are not meant.

    Raises:
        ConfigError: If the expression is not of that form, or names a column that there is not.
        DataError: If the table is absent or damaged, a column has texts where numbers are compared, or no tile is kept.
    """
    conditions = parse(expression)
    header = tile_header(root)
    known = {*header, *SLIDE_TEXTS, *SLIDE_NUMBERS, *(name for row in status.values() for name in row.further)}
    kinds: dict[str, type] = {}
    for condition in conditions.values():
        for name, kind in _kinds(condition, known).items():
            if kinds.setdefault(name, kind) is not kind:
                raise ConfigError(_both(name))
    of_tiles = [name for name in kinds if name in header]
    left_out, tiles = dict.fromkeys(conditions, 0), 0
    places: dict[str, list[np.ndarray]] = defaultdict(list)
    for slide, cells in tile_chunks(root, of_tiles):
        if slide in held_out:
            continue
        columns = {name: _converted(cells[name], name, kinds[name]) for name in of_tiles if name != "slide_id"}
        row = status.get(slide)
        columns |= {name: _cell(slide, row, name, kinds[name]) for name in kinds if name not in columns}
        kept = np.ones(len(cells["x"]), bool)
        for label, condition in conditions.items():
            met = kept & _met(condition, columns, label)
            left_out[label] += int(kept.sum() - met.sum())
            kept = met
        places[slide].append((cells["y"] << 32 | cells["x"])[kept])
        tiles += len(kept)
    selection = Selection(expression, {one: np.concatenate(found) for one, found in places.items()}, tiles, left_out)
    if not selection.samples:
        raise DataError(f"expected tiles that meet filter={expression!r}, found none ({selection}); change the filter")
    return selection


def parse(expression: str) -> dict[str, ast.expr]:
    """The conditions of an expression that all have to be met, by their text.

    Raises:
        ConfigError: If it is no expression, or has parts that are not allowed.
    """
    if not expression.strip() or len(expression) > LONGEST:
        raise ConfigError(f"expected a filter of 1 to {LONGEST} letters, found {len(expression)}")
    try:
        tokens = tokenize.generate_tokens(io.StringIO(" ".join(expression.split())).readline)
        words = {"&": "and", "|": "or"}  # as pandas does, so that `a > 1 & b > 1` means what it seems to
        text = " ".join(words.get(token.string, token.string) for token in tokens)
        tree = ast.parse(text.strip(), mode="eval").body
        conditions = list(_conjuncts(tree))
        for condition in conditions:
            _check(condition)
        return {ast.unparse(condition): condition for condition in conditions}
    except (SyntaxError, tokenize.TokenError, ValueError, RecursionError, MemoryError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise _refused(f"{printable(expression)} ({reason})") from None


def _refused(found: str) -> ConfigError:
    return ConfigError(
        'expected filter to be comparisons of columns with numbers and texts, such as "tissue > 0.5 and centre in '
        f"['A', 'B']\", found {found}"
    )


def _conjuncts(node: ast.expr) -> Iterator[ast.expr]:
    if isinstance(node, ast.BoolOp) and isinstance(node.op, ast.And):
        for value in node.values:
            yield from _conjuncts(value)
    else:
        yield node


def _check(node: ast.AST) -> None:
    """Raise ConfigError for anything but columns, constants, comparisons, logic and arithmetic.

    No function is called and no attribute is read, so an expression from anywhere can do no more than compare.
    """
    match node:
        case ast.BoolOp(values=values):
            inner = list(values)
        case ast.UnaryOp(op=ast.Not() | ast.Invert() | ast.USub(), operand=operand):
            inner = [operand]
        case ast.BinOp(left=left, op=op, right=right) if type(op) in ARITHMETIC:
            inner = [left, right]
        case ast.Compare(left=left, ops=ops, comparators=comparators) if all(type(op) in COMPARISONS for op in ops):
            for op, right in zip(ops, comparators, strict=True):
                if isinstance(op, ast.In | ast.NotIn) != isinstance(right, ast.List | ast.Tuple):
                    raise _refused(f"'{printable(ast.unparse(node))}': `in` needs a list, and only `in` takes one")
                if isinstance(right, ast.List | ast.Tuple) and not (right.elts and all(map(_is_constant, right.elts))):
                    raise _refused(f"'{printable(ast.unparse(node))}', whose list does not consist of values")
            lists = [one.elts if isinstance(one, ast.List | ast.Tuple) else [one] for one in comparators]
            inner = [left, *(one for each in lists for one in each)]
        case ast.Name():
            return
        case ast.Constant(value=str()):
            return
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool) and abs(value) <= LARGEST:
            return
        case _:
            raise _refused(f"'{printable(ast.unparse(node))}'")
    for one in inner:
        _check(one)


def _is_constant(node: ast.expr) -> bool:
    return isinstance(node.operand if isinstance(node, ast.UnaryOp) else node, ast.Constant)


def _kinds(condition: ast.expr, known: set[str]) -> dict[str, type]:
    """Whether the values of each column that a condition compares are texts or numbers.

    Raises:
        ConfigError: If a column does not exist, or is used as both.
    """
    names = [node.id for node in ast.walk(condition) if isinstance(node, ast.Name)]
    if not names:
        raise _refused(f"'{printable(ast.unparse(condition))}', which names no column")
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, 1, 0.6)
            hint = f"did you mean '{printable(close[0])}'?" if close else "such columns are added in slides.csv"
            shown = ", ".join(printable(one) for one in sorted(known))
            raise ConfigError(f"expected filter to name columns of tiles or slides ({shown}), found '{name}'; {hint}")
    kinds: dict[str, type] = {}
    for node in ast.walk(condition):
        if not isinstance(node, ast.Compare):
            continue
        constants = {type(one.value) for one in ast.walk(node) if isinstance(one, ast.Constant)}
        compared = [one.id for one in ast.walk(node) if isinstance(one, ast.Name)]
        if str in constants and len(constants) > 1:
            raise ConfigError(_both(ast.unparse(node)))
        text = str in constants or (not constants and any(name in TEXTS for name in compared))
        for name in compared:
            if kinds.setdefault(name, str if text else float) is not (str if text else float):
                raise ConfigError(_both(name))
            if text and name in NUMBERS:
                raise ConfigError(f"expected filter to compare {name} with numbers, found {ast.unparse(node)}")
    return kinds


def _both(found: str) -> str:
    return f"expected filter to compare a column with texts or with numbers, found both: {printable(found)}"


def _cell(slide: str, row: SlideStatus | None, name: str, kind: type) -> Any:
    """What a column of the slides has for one of them."""
    if name == "slide_id":
        cell = slide
    elif name in (*SLIDE_TEXTS, *SLIDE_NUMBERS):
        cell = str(getattr(row, name)) if row else ""
    else:
        cell = row.further.get(name, "") if row else ""
    return _converted(np.array([cell], object), name, kind)[0]


def _converted(cells: np.ndarray, name: str, kind: type) -> np.ndarray:
    """Texts as they are, or numbers as float64, NaN for blank cells.

    Raises:
        DataError: If a cell is no number.
    """
    if kind is str:
        return cells
    if cells.dtype != object:
        return cells.astype(np.float64)
    try:
        return np.array([float(cell) if cell else np.nan for cell in cells])
    except ValueError as error:
        raise DataError(
            f"expected numbers in column {printable(name)}, which filter compares with numbers, found a text "
            f"({printable(error)}); compare it with texts in quotes"
        ) from None


def _met(condition: ast.expr, columns: Mapping[str, np.ndarray], label: str) -> np.ndarray:
    """Which rows meet a condition.

    Raises:
        ConfigError: If its value is not true or false.
    """
    try:
        with np.errstate(all="ignore"):
            return np.asarray(_logical(condition, columns))
    except TypeError:
        raise _refused(f"'{printable(label)}', which is no comparison of values of one kind") from None


def _logical(node: ast.expr, columns: Mapping[str, np.ndarray]) -> Any:
    match node:
        case ast.BoolOp(op=op, values=values):
            join = np.logical_and if isinstance(op, ast.And) else np.logical_or
            return join.reduce(np.broadcast_arrays(*(_logical(value, columns) for value in values)))
        case ast.UnaryOp(op=ast.Not() | ast.Invert(), operand=operand):
            return np.logical_not(_logical(operand, columns))
        case ast.Compare(left=left, ops=ops, comparators=comparators):
            values = [_value(one, columns) for one in (left, *comparators)]
            pairs = zip(ops, pairwise(values), strict=True)
            results = [COMPARISONS[type(op)](one, other) for op, (one, other) in pairs]
            return np.logical_and.reduce(np.broadcast_arrays(*results))
    raise TypeError


def _value(node: ast.expr, columns: Mapping[str, np.ndarray]) -> Any:
    match node:
        case ast.Name(id=name):
            return columns[name]
        case ast.Constant(value=value):
            return value
        case ast.List(elts=elements) | ast.Tuple(elts=elements):
            return [_value(one, columns) for one in elements]
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_number(_value(operand, columns))
        case ast.BinOp(left=left, op=op, right=right):
            return ARITHMETIC[type(op)](*(_number(_value(one, columns)) for one in (left, right)))
    raise TypeError


def _number(value: Any) -> np.ndarray:
    """A number or a column of numbers; float64, so that no arithmetic overflows or takes long.

    Raises:
        TypeError: If it is something else.
    """
    array = np.asarray(value)
    if array.dtype.kind not in "if":
        raise TypeError
    return array.astype(np.float64)
