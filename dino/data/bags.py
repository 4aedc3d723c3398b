"""Bags: the feature vectors of one slide, read lazily from files of this package, CLAM, TRIDENT and slide2vec.

==============================  ==================================================================================
``.h5``                         ``features`` (N, D) and ``coords`` (N, 2) with attributes: this package, CLAM, TRIDENT.
                                Older files of CLAM have (1, N, D); one vector per slide is (D,) or (1, D).
``.pt``                         one tensor: (N, D) of CLAM and slide2vec, (R, T, D) of slide2vec, (D,) per slide
``.npz``                        ``features`` as in the ``.pt`` of slide2vec; compressed, so the whole array is read
==============================  ==================================================================================

Beside its features slide2vec writes ``<slide>.meta.json``, which names the ``.npz`` with the coordinates.
"""

import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from dino.errors import DataError
from dino.files import printable, read_json

if TYPE_CHECKING:  # only .pt files need torch, whose import takes seconds
    from torch import Tensor

SUFFIXES = (".h5", ".pt", ".npz")
SUBFOLDERS = ("", "h5_files", "pt_files", "tile_embeddings")  # CLAM writes the second and third, slide2vec the last
GAP = 64  # rows of an HDF5 file that are read with their neighbours, because one more access takes longer

Rows = slice | np.ndarray  # of consecutive rows, or their indices


class Matrix(Protocol):
    """What a bag's features are: a matrix whose rows are read when they are indexed."""

    @property
    def shape(self) -> tuple[int, int]:
        """``(N, D)``."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, rows: Rows, /) -> np.ndarray: ...


@dataclass(frozen=True)
class Bag:
    """The features of one slide.

    Attributes:
        path: The file.
        features: ``(N, D)``, read from the file when rows are indexed; it holds no open file and can be pickled.
        coords: ``(N, 2)`` int64 level-0 ``(x, y)`` of each row; None where the file has none.
        attributes: Attributes of the coordinates, the features and the file.
    """

    path: Path
    features: Matrix
    coords: np.ndarray | None = None
    attributes: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.features)

    @property
    def dim(self) -> int:
        """Dimension D of the features."""
        return self.features.shape[1]

    def read(self, rows: Rows = slice(None)) -> np.ndarray:
        """Rows as float32 ``(n, D)``.

        Args:
            rows: Slice or indices.

        Raises:
            DataError: If the file has changed or is damaged, or a value is not finite.
        """
        values = self.features[rows].astype(np.float32, copy=False)
        if not np.isfinite(values).all():
            raise DataError(f"expected finite features in {printable(self.path)}, found NaN or infinity; extract again")
        return values


def open_bag(path: Path) -> Bag:
    """Open the features of a slide without reading them.

    Args:
        path: ``.h5``, ``.pt`` or ``.npz``, see the table above.

    Raises:
        DataError: If the file is damaged or of another kind, has no features, or as many coordinates as features are
            not there.
    """
    path = Path(path)
    openers = {".h5": _open_h5, ".pt": _open_tensor, ".npz": _open_npz}
    if path.suffix not in openers:
        raise DataError(f"expected features of a slide ({', '.join(SUFFIXES)}), found {printable(path)}")
    if not path.is_file():
        raise DataError(f"expected features of a slide at {printable(path)}, found no file; extract them first")
    bag = openers[path.suffix](path)
    if bag.coords is not None and bag.coords.shape != (len(bag), 2):
        raise DataError(
            f"expected coordinates of {len(bag)} rows in {printable(path)}, found {tuple(bag.coords.shape)}; extract "
            "the slide again"
        )
    return bag


def map_features(bag: Bag) -> np.ndarray:
    """The features of a bag as an array ``(N, D)``, memory-mapped where the file stores them in one piece.

    Files of this package do; the compressed ones of other packages are read.

    Raises:
        DataError: If the file has changed or is damaged.
    """
    if bag.path.suffix != ".h5":
        return bag.features[:]
    with _h5(bag.path) as file:
        stored = file["features"]
        offset = stored.id.get_offset()
        if offset is None or not stored.size:
            return bag.features[:]
        return np.memmap(bag.path, stored.dtype, "r", offset, bag.features.shape)


def find_bags(folder: Path) -> dict[str, Path]:
    """The feature files of a folder by slide, the stem of their names.

    Args:
        folder: Folder of the files themselves, or the output folder of CLAM or slide2vec above them.

    Raises:
        DataError: If there are none.
    """
    for name in SUBFOLDERS:
        paths = [path for path in (folder / name).glob("[!.]*") if path.suffix in SUFFIXES]
        if paths:  # where a slide has several files, the first of the table above
            return {path.stem: path for path in sorted(paths, key=lambda path: (-SUFFIXES.index(path.suffix), path))}
    raise DataError(f"expected feature files ({', '.join(SUFFIXES)}) of slides in {folder}, found none; extract first")


@dataclass(frozen=True)
class _H5Rows:
    """``features`` of an ``.h5``; the file is opened for each access, so that no more files are open than in use."""

    path: Path
    shape: tuple[int, int]
    stacked: bool  # (1, N, D)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Rows, /) -> np.ndarray:
        with _h5(self.path) as file:
            stored = file["features"]
            if stored.ndim == 1:
                return stored[:].reshape(self.shape)[rows]
            return _read_rows((lambda part: stored[0, part]) if self.stacked else stored.__getitem__, rows, self.shape)


@dataclass(frozen=True)
class _ArrayRows:
    """A memory-mapped tensor or an array."""

    values: "Tensor | np.ndarray"

    @property
    def shape(self) -> tuple[int, int]:
        return tuple(self.values.shape)  # type: ignore[return-value]

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, rows: Rows, /) -> np.ndarray:
        if isinstance(self.values, np.ndarray):
            return self.values[rows]
        import torch

        part = self.values[rows if isinstance(rows, slice) else torch.from_numpy(np.asarray(rows))]
        return (part.float() if part.dtype == torch.bfloat16 else part).numpy()


def _read_rows(read: Callable[[slice], np.ndarray], rows: Rows, shape: tuple[int, int]) -> np.ndarray:
    """Rows of a matrix that reads slices fast and single rows slowly, as HDF5 does."""
    if isinstance(rows, slice):
        return read(rows)
    wanted = np.arange(shape[0])[rows]  # of indices or a mask
    if not len(wanted):
        return read(slice(0, 0))
    unique, inverse = np.unique(wanted, return_inverse=True)
    runs = np.split(unique, np.flatnonzero(np.diff(unique) > GAP) + 1)
    return np.concatenate([read(slice(run[0], run[-1] + 1))[run - run[0]] for run in runs])[inverse]


@contextmanager
def _h5(path: Path) -> Iterator[Any]:
    """An open HDF5 file; the errors of damaged files become a DataError."""
    import h5py

    try:
        with h5py.File(path, "r") as file:
            yield file
    except (OSError, KeyError, RuntimeError, AttributeError, TypeError, ValueError) as error:
        raise DataError(f"cannot read the features of {printable(path)}: {printable(error)[:200]}") from None


def _open_h5(path: Path) -> Bag:
    with _h5(path) as file:
        if "features" not in file:
            raise DataError(f"expected 'features' in {printable(path)}, found {', '.join(file) or 'nothing'}")
        features = file["features"]
        stacked = features.ndim == 3 and features.shape[0] == 1
        if features.dtype.kind != "f" or not (features.ndim in (1, 2) or stacked):
            raise DataError(
                f"expected float features (N, D) in {printable(path)}, found {features.dtype} {features.shape}"
            )
        shape = features.shape[-2:] if features.ndim > 1 else (min(1, len(features)), len(features))
        coords = file["coords"][:] if "coords" in file and features.ndim > 1 else None  # not of a slide's one vector
        groups = [file, features, *([file["coords"]] if "coords" in file else [])]
        attributes = {name: _plain(value) for group in groups for name, value in group.attrs.items()}
    if coords is not None:
        coords = coords.reshape(-1, 2).astype(np.int64)
        coords = None if len(coords) != shape[0] == 1 else coords  # TRIDENT: those of all tiles beside (1, D)
    return Bag(path, _H5Rows(path, shape, stacked), coords, attributes)


def _open_tensor(path: Path) -> Bag:
    from dino.data.grids import open_tensor

    tensor = open_tensor(path, {1: "[D]", 2: "[N x D]", 3: "[regions x tiles x D]"})
    return _with_sidecar(path, tensor.reshape(-1, tensor.shape[-1]), tensor.ndim == 2)


def _open_npz(path: Path) -> Bag:
    values = _read_npz(path, "features")
    if values.dtype.kind != "f" or values.ndim not in (1, 2, 3):
        raise DataError(f"expected float features (N, D) in {printable(path)}, found {values.dtype} {values.shape}")
    return _with_sidecar(path, values.reshape(-1, values.shape[-1]), values.ndim == 2)


def _with_sidecar(path: Path, values: "Tensor | np.ndarray", with_coords: bool) -> Bag:
    """A bag with what slide2vec wrote beside it, if it did: ``<slide>.meta.json`` and the file of coordinates."""
    sidecar = path.with_name(f"{path.stem}.meta.json")
    attributes: dict[str, Any] = {}
    try:
        attributes = dict(read_json(sidecar)) if sidecar.is_file() else {}
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"expected JSON in {printable(sidecar)}, could not read it: {printable(error)}") from None
    coords = None
    found = next((file for file in _coordinate_files(path, attributes) if file.is_file()), None)
    if with_coords and found is not None:
        coords = np.stack([_read_npz(found, "x"), _read_npz(found, "y")], 1).astype(np.int64)  # (N, 2)
    return Bag(path, _ArrayRows(values), coords, {"name": path.stem, **attributes})


def _coordinate_files(path: Path, attributes: Mapping[str, Any]) -> Iterator[Path]:
    """Where slide2vec's coordinates of a feature file are: as recorded, or beside it if the folder was moved."""
    if isinstance(attributes.get("coordinates_npz_path"), str):
        yield Path(attributes["coordinates_npz_path"])
    for folder in path.parents:
        if folder.name == "tile_embeddings":
            relative = path.relative_to(folder)
            yield folder.parent / "tiles" / relative.with_name(f"{path.stem}.coordinates.npz")


def _read_npz(path: Path, name: str) -> np.ndarray:
    try:
        with np.load(path, allow_pickle=False) as archive:
            return archive[name]
    except (OSError, ValueError, KeyError, EOFError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        raise DataError(
            f"expected '{name}' in {printable(path)}, could not read it: {printable(error)[:200]}"
        ) from None


def _plain(value: Any) -> Any:
    """An attribute of HDF5 as a value of Python."""
    value = value.decode(errors="replace") if isinstance(value, bytes) else value
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value
