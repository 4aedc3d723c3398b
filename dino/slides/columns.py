"""Columns of large tables, a piece of the table at a time: from CSV by pandas, from parquet by pyarrow."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dino.environment import import_extra

ROWS = 2**20  # of a piece
PARQUET = ".parquet"

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

    types: Any = {**dict.fromkeys(texts, "category"), **numbers}
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
                found[name] = piece[name].cat.codes.to_numpy().astype(np.int64)
                found[f"{name}/values"] = np.array(piece[name].cat.categories, object)
            yield found


def _parquet_pieces(path: Path, texts: Sequence[str], numbers: Mapping[str, type], rows: int) -> Iterator[Columns]:
    with pyarrow_parquet(path).ParquetFile(path, read_dictionary=list(texts)) as file:
        missing = {*texts, *numbers} - {*file.schema_arrow.names}
        if missing:
            raise ValueError(f"no column {', '.join(sorted(missing))}")
        for batch in file.iter_batches(rows, columns=[*texts, *numbers]):
            found: Columns = {}
            for name, kind in numbers.items():
                found[name] = batch.column(name).to_numpy(zero_copy_only=False).astype(kind)
            for name in texts:
                column = batch.column(name)
                column = column if hasattr(column, "dictionary") else column.dictionary_encode()
                found[name] = column.indices.to_numpy(zero_copy_only=False).astype(np.int64)
                found[f"{name}/values"] = np.array(column.dictionary.to_pylist(), object)
            yield found


def pyarrow_parquet(path: Path) -> Any:
    """The module ``pyarrow.parquet``.

    Raises:
        ConfigError: If pyarrow is not installed.
    """
    return import_extra("pyarrow.parquet", str(path), "parquet")
