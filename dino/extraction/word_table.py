"""The table of words, ``words.csv``: read as spreadsheets save it, and changed without loss of what others wrote.

People edit it in spreadsheets and in the viewer, at once. So a change replaces one row and leaves all other bytes as
they are, and it is made only if the table is still the one whose names were shown.
"""

import csv
import hashlib
import io
import os
import shutil
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from dino import files
from dino.errors import DataError

WORD, NAME = "word", "name"
MAX_NAME = 100  # characters
UTF8, MARKED, WINDOWS = "utf-8", "utf-8-sig", "cp1252"  # encodings of spreadsheets; "sig" is the byte order mark
SEPARATORS = ",;\t"
_writing = threading.Lock()  # the locks of files are those of processes


class TableChanged(DataError):
    """The table is not what it was when its names were read."""


@dataclass(frozen=True)
class Names:
    """The names in a table of words.

    Attributes:
        written: What people wrote, on one line; empty where they did not.
        version: Another one for every content of the table.
    """

    written: Sequence[str]
    version: str

    @property
    def shown(self) -> list[str]:
        """What each word is called: as people wrote, or "Word 3" where they did not."""
        return [name or f"Word {number}" for number, name in enumerate(self.written, 1)]


@dataclass(frozen=True)
class Table:
    """A table as it is in its file.

    Attributes:
        raw: The bytes.
        lines: The text, with the ends of its lines.
        encoding: Its encoding.
        separator: Between cells.
        columns: Names of the columns.
        rows: First line, line behind the last one, and cells of each word that it contains, by index.
    """

    raw: bytes
    lines: Sequence[str]
    encoding: str
    separator: str
    columns: Sequence[str]
    rows: Mapping[int, tuple[int, int, list[str]]]

    def cells(self, count: int) -> list[dict[str, str]]:
        """Cells by column of each of ``count`` words; empty for one that the table does not contain."""
        return [dict(zip(self.columns, self.rows[i][2], strict=False)) if i in self.rows else {} for i in range(count)]

    def names(self, count: int) -> Names:
        """The names of ``count`` words."""
        written = [" ".join(files.printable(row.get(NAME, "")).split()) for row in self.cells(count)]
        return Names(written, hashlib.sha256(self.raw).hexdigest()[:32])

    def renamed(self, word: int, name: str, path: Path) -> bytes:
        """The bytes of this table with another name of a word; all but that row are the same.

        Args:
            word: Its index.
            name: The name; empty for none.
            path: The file, for messages.

        Raises:
            DataError: If its characters cannot be written again as they are.
        """
        if "".join(self.lines).encode(self.encoding, "replace") != self.raw:
            raise DataError(
                f"expected {path} in UTF-8 or Windows-1252, found bytes of another encoding; save it as CSV in UTF-8, "
                "then name the word again"
            )
        lines, end = list(self.lines), _line_end(self.lines[0]) or "\n"
        first, last, cells = self.rows.get(word, (len(lines), len(lines), []))
        cells = [*cells, *[""] * (len(self.columns) - len(cells))]
        by_column = {column: i for i, column in enumerate(self.columns)}  # of two columns of one name the last counts
        cells[by_column[WORD]], cells[by_column[NAME]] = cells[by_column[WORD]] or str(word + 1), name
        text = io.StringIO()
        csv.writer(text, delimiter=self.separator, lineterminator="").writerow(cells)
        if first == len(lines) and not _line_end(lines[-1]):
            lines[-1] += end
        lines[first:last] = [text.getvalue() + (_line_end(lines[last - 1]) if last > first else end)]
        content = "".join(lines)
        try:
            return content.encode(self.encoding)
        except UnicodeEncodeError:  # a name beyond Windows-1252: with the mark, spreadsheets recognise UTF-8
            return content.encode(MARKED)


def read_table(path: Path, count: int) -> Table:
    """Read a table of words; also as spreadsheets save it, with semicolons or another encoding.

    Args:
        path: The table.
        count: Number of words.

    Raises:
        DataError: If it is absent or not such a table, or names a word twice or one that does not exist.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"expected the names of words in {path}, found none ({error.strerror}); run `dino words` again"
        ) from None
    text, encoding = _decoded(raw)
    separator = max(SEPARATORS, key=text.split("\n", 1)[0].count)
    lines = list(io.StringIO(text, newline=""))
    reader = csv.reader(lines, delimiter=separator)
    rows: dict[int, tuple[int, int, list[str]]] = {}
    try:
        columns = [cell.strip() for cell in next(reader, [])]
        if WORD not in columns or NAME not in columns:
            found = ", ".join(columns)[:200] or "none"
            raise DataError(f"expected columns {WORD} and {NAME} in {path}, found {files.printable(found)}")
        start = reader.line_num
        for cells in reader:
            first, start = start, reader.line_num
            if not any(cell.strip() for cell in cells):
                continue
            number = dict(zip(columns, cells, strict=False)).get(WORD, "").strip()
            where = f"{path}, line {reader.line_num}"
            if not number.isdecimal() or len(number) > len(str(count)) + 3 or not 1 <= int(number) <= count:
                shown = files.printable(number[:50])
                raise DataError(f"{where}: expected a word from 1 to {count}, found '{shown}'")
            if int(number) - 1 in rows:
                raise DataError(f"{where}: expected each word once, found {number} again")
            rows[int(number) - 1] = (first, start, cells)
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: expected a table of words, found: {error}") from None
    return Table(raw, lines, encoding, separator, columns, rows)


def checked_name(name: str) -> str:
    """The name of a word that someone typed, with single spaces.

    Raises:
        DataError: If it is too long, has control characters, or is a formula for spreadsheets.
    """
    parts = name.replace("\u00a0", " ").split(" ")  # keyboards give no-break spaces
    plain = " ".join(part for part in parts if part)
    if len(plain) > MAX_NAME or not plain.isprintable():
        raise DataError(f"expected a name of at most {MAX_NAME} printable characters, found another one")
    if files.is_formula(plain):
        raise DataError(f"expected a name, found what a spreadsheet computes; do not begin it with {plain[0]}")
    return plain


@contextmanager
def writing(folder: Path, held: str) -> Iterator[None]:
    """Hold the table of a folder of words against other threads, and other processes on this machine.

    Args:
        folder: The folder.
        held: Name of the file in it whose lock is used; nothing is written into it.

    Raises:
        OSError: If the folder cannot be written.
    """
    with _writing:
        lock = files.hold_file(folder / held) if (folder / held).is_file() and os.name == "posix" else None
        try:
            yield
        finally:
            if lock is not None:
                lock.close()


def replace(path: Path, before: bytes | None, content: bytes) -> None:
    """Replace a table atomically, if it is still what was read.

    Args:
        path: The table.
        before: What was read; None if there was no table.
        content: What it is to be.

    Raises:
        TableChanged: If it is something else now; then it is not changed.
        OSError: If it cannot be written.
    """

    def check(temporary: Path) -> None:
        if (path.read_bytes() if path.exists() else None) != before:
            raise changed(path)
        if before is not None:
            shutil.copymode(path, temporary)  # a group that may write it still may

    files.write_bytes(path, content, check=check, make_folder=False)


def changed(path: Path) -> TableChanged:
    """The error for a table that someone else changed meanwhile."""
    return TableChanged(
        f"expected {path.name} as it was read, found that someone changed it meanwhile; nothing was written: look at "
        "the names that it has now, then try again"
    )


def _decoded(raw: bytes) -> tuple[str, str]:
    """The text, and its encoding."""
    try:
        encoding = MARKED if raw.startswith(b"\xef\xbb\xbf") else UTF8
        return raw.decode(encoding), encoding
    except UnicodeDecodeError:
        return raw.decode(WINDOWS, errors="replace"), WINDOWS


def _line_end(line: str) -> str:
    return line[len(line.rstrip("\r\n")) :]
