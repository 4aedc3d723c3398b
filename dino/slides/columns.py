"""Columns of large tables, a piece of the table at a time: from CSV by pandas, from parquet by pyarrow."""

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dino.environment import import_extra

ROWS = 2**20  # of a piece
PARQUET = ".parquet"
PIECE_BYTES = 2**26  # of a CSV that is written as parquet

Columns = dict[str, np.ndarray]


def read_header(path: Path) -> list[str]:
    """Names of a table's columns.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is damaged.
        ConfigError: If it is parquet, and pyarrow is not installed.
    """
    if path.suffix == PARQUET:
        return list(pyarrow_parquet(path).ParquetFile(path).schema_arrow.names)
    import pandas as pd

    return [str(name) for name in pd.read_csv(path, nrows=0, encoding="utf-8").columns]


def read_columns(path: Path, texts: Sequence[str], numbers: Mapping[str, type], rows: int = ROWS) -> Iterator[Columns]:
    """Columns of a table, piece by piece.

    Args:
        path: The table.
        texts: Columns to read as texts: codes ``name`` (int64) and the texts that they stand for, ``name/values``
            (objects), so that no row needs an object.
        numbers: Columns to read as numbers, with their types.
        rows: Largest number of rows of a piece.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it lacks a column, or a cell is not of its type.
        ConfigError: If it is parquet, and pyarrow is not installed.
    """
    pieces = _parquet_pieces if path.suffix == PARQUET else _csv_pieces
    yield from pieces(path, texts, numbers, rows)


def _csv_pieces(path: Path, texts: Sequence[str], numbers: Mapping[str, type], rows: int) -> Iterator[Columns]:
    import pandas as pd

    types: Any = {**dict.fromkeys(texts, str), **numbers}  # "category" would read 007 as the number 7
    with pd.read_csv(
        path,
        usecols=list(types),
        dtype=types,
        keep_default_na=False,
        encoding="utf-8",
        chunksize=rows,
        low_memory=False,
    ) as pieces:
        for piece in pieces:
            found: Columns = {name: piece[name].to_numpy() for name in numbers}
            for name in texts:
                found[name], values = pd.factorize(piece[name])
                found[f"{name}/values"] = np.array(values, object)
            yield found


def _parquet_pieces(path: Path, texts: Sequence[str], numbers: Mapping[str, type], rows: int) -> Iterator[Columns]:
    parquet, pa = pyarrow_parquet(path), import_extra("pyarrow", str(path), "parquet")
    with parquet.ParquetFile(path, read_dictionary=list(texts)) as file:
        missing = {*texts, *numbers} - {*file.schema_arrow.names}
        if missing:
            raise ValueError(f"no column {', '.join(sorted(missing))}")
        for batch in file.iter_batches(rows, columns=[*texts, *numbers]):
            found: Columns = {}
            for name, kind in numbers.items():
                column = batch.column(name).cast(pa.from_numpy_dtype(kind))  # ValueError for 0.5 as int64
                if column.null_count and kind is not np.float64:  # of float64 it is NaN
                    raise ValueError(f"{column.null_count} empty cells in column {name}")
                found[name] = column.to_numpy(zero_copy_only=False)
            for name in texts:
                column = batch.column(name)
                column = column if hasattr(column, "dictionary") else column.dictionary_encode()
                values = [_as_text(value) for value in column.dictionary.to_pylist()]
                if column.null_count:
                    values.append("")
                codes = column.indices.cast("int64").fill_null(len(values) - 1)
                found[name] = codes.to_numpy(zero_copy_only=False)
                found[f"{name}/values"] = np.array(values, object)
            yield found


def _as_text(value: Any) -> str:
    """A value as pandas writes it into a CSV, so that both kinds of tables have the same texts."""
    return "" if value is None or (isinstance(value, float) and math.isnan(value)) else str(value)


def write_parquet(path: Path, lines: Iterator[bytes], numbers: Mapping[str, type]) -> None:
    """Write a CSV as parquet, piece by piece.

    Args:
        path: The file to write.
        lines: The CSV: its header, then whole lines.
        numbers: Columns of numbers, with their types; all other columns are texts.

    Raises:
        ConfigError: If pyarrow is not installed.
    """
    import pandas as pd

    parquet, pa = pyarrow_parquet(path), import_extra("pyarrow", str(path), "parquet")
    header = next(lines).decode().strip().split(",")
    texts = [name for name in header if name not in numbers]
    schema = pa.schema(
        [(name, pa.string() if name in texts else pa.from_numpy_dtype(numbers[name])) for name in header]
    )
    types: Any = {name: numbers.get(name, str) for name in header}
    with parquet.ParquetWriter(path, schema, compression="zstd", use_dictionary=texts) as file:
        for piece in _pieces_of(lines, PIECE_BYTES):
            rows = pd.read_csv(io.BytesIO(piece), header=None, names=header, dtype=types, keep_default_na=False)
            file.write_table(pa.Table.from_pandas(rows, schema, preserve_index=False))


def _pieces_of(lines: Iterator[bytes], size: int) -> Iterator[bytes]:
    held, length = [], 0
    for chunk in lines:
        held.append(chunk)
        length += len(chunk)
        if length >= size:
            yield b"".join(held)
            held, length = [], 0
    if length:
        yield b"".join(held)


def pyarrow_parquet(path: Path) -> Any:
    """The module ``pyarrow.parquet``.

    Raises:
        ConfigError: If pyarrow is not installed.
    """
    return import_extra("pyarrow.parquet", str(path), "parquet")
