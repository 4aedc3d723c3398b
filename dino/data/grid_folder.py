"""Level 2's source: feature grids of a folder, read file by file or from the packed file."""

from bisect import bisect_right
from itertools import accumulate

import torch
from torch import Tensor

from dino.data.grid_files import GridEntry, Survey
from dino.data.grids import read_cells
from dino.data.names import Names
from dino.data.packed import GridFiles, PackedGrids
from dino.data.sources import BadSample, Sample, index_of, slide_of
from dino.errors import DataError
from dino.files import printable


class GridFolder:
    """Feature grids of a folder; all of one D and one shape.

    Args:
        files: The files, with what is known of each, in a fixed order. A file with several regions is unfolded.
        found: What they hold.
        packed: All of them in one file; None to read each file when it is drawn. The values are the same. Files that
            change or go later are not looked at: a run ends with what it began with.
        by_row: Give a sample's row in the packed grids instead of its cells: for crops that hold all cells themselves.
    """

    def __init__(
        self, files: GridFiles, found: Survey, packed: PackedGrids | None = None, *, by_row: bool = False
    ) -> None:
        self._files, self._packed, self._by_row = files, packed, by_row
        self.height, self.width, self.dim = found.height, found.width, found.dim
        self._names = [str(entry.path.relative_to(files.root)) for entry in files.entries]
        self._slides = [entry.slide_id or slide_of(entry.path) for entry in files.entries]
        self._ends = list(accumulate(found.regions))  # regions up to and with each file

    def __len__(self) -> int:
        """How many regions there are."""
        return self._ends[-1]

    def __call__(self, seed: int, draw: int, attempt: int = 0) -> Sample:
        """The grid of one draw.

        Raises:
            BadSample: If the file cannot be read, or holds values that are not finite.
        """
        row = index_of(seed, draw, attempt, len(self))
        number = bisect_right(self._ends, row)
        region = row - (self._ends[number - 1] if number else 0)
        name, entry = f"{self._names[number]}#{region}", self._files.entries[number]
        try:
            cells = self._read(entry, region, row)
        except DataError as error:
            raise BadSample(printable(name), str(error)) from None
        return Sample(cells, name, self._slides[number], entry.tissue, (self.height, self.width))

    def _read(self, entry: GridEntry, region: int, row: int) -> Tensor:
        packed = self._packed
        if packed is not None and row not in packed.bad:
            return torch.tensor(row) if self._by_row else packed.cells[row]
        cells = read_cells(entry.path, self._files.order, (self.height, self.width), region)
        if cells.shape[1] != self.dim:
            raise DataError(
                f"expected D={self.dim} in {printable(entry.path)}, found {cells.shape[1]}; was it replaced?"
            )
        if packed is not None:
            raise DataError(
                f"expected {printable(entry.path)} as it was when the grids were packed, found another file; start the "
                "command again"
            )
        return cells.to(self._files.dtype)

    @property
    def fingerprint(self) -> str:
        """Hash of the region names in order."""
        starts = [0, *self._ends[:-1]]
        regions = zip(self._names, starts, self._ends, strict=True)
        return Names(f"{name}#{region}" for name, start, end in regions for region in range(end - start)).fingerprint

    @property
    def slide_ids(self) -> set[str]:
        """Slides that the regions belong to, as far as it is known."""
        return {slide for slide in self._slides if slide}
