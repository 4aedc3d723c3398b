"""The format of checkpoints: how files are read safely, and what a checkpoint of this package contains.

A checkpoint is a dictionary: the entries of :class:`Description`, ``teacher`` and ``student`` (state dicts under
facebookresearch/dino's names), and what training needs to resume. An export has the description in its
``config.json``. Nothing here ever unpickles code.
"""

import argparse
import hashlib
import re
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dino.errors import CheckpointError, DinoError
from dino.models.spec import BackboneSpec
from dino.models.transforms import Transform
from dino.progress import say

PACKAGE = "histodino"
FORMAT = f"{PACKAGE}/1"
RUN_CHOICES = ("best.pt", "last.pt")
# In torch's message: "Unsupported global: GLOBAL pathlib.Path was not ...", "unsupported GLOBAL posix.system whose ..."
UNSAFE_GLOBAL = re.compile(r"GLOBAL ([\w.]+)")
TEACHER = ("teacher_weights", "teacher_transform")  # of the frozen network that a model was distilled from
# Further keys of a description.
TRAINING = ("total_steps", "segments", "versions", "training_slides", "selection", "grids", *TEACHER)
OTHER_KINDS = {"TorchScript": "a TorchScript archive", ".tar": "a file of the old tar format"}  # in torch's messages

# ------------------------------------------------------------------------------------------------- description


@dataclass(frozen=True)
class Description:
    """What a checkpoint or an export of this package contains besides tensors.

    Attributes:
        spec: How to build the backbone.
        transform: Normalization of its images; None for feature grids.
        step: Optimizer steps of training, where known.
        geometry: ``spacing_um`` (µm/px) and ``tile_size_px`` of the tiles trained on, ``spacings_um`` where they had
            several; at level 2 also ``region_cells``, (height, width) of the grids in cells. None where unknown.
        config: Settings of the run; None where unknown.
        training: ``total_steps``, ``segments`` (by which the run was extended, as
            :class:`dino.train.optimizer.Segment`), ``versions`` (of packages), ``training_slides`` (``slide_ids`` and
            ``patient_ids``, or hashes as :func:`dino.privacy.hash_record` returns), ``selection`` (the sets of labelled
            rows that chose it, as :func:`dino.evaluate.selection.row_set` returns), ``teacher_weights`` and
            ``teacher_transform`` (fingerprint and transform of the frozen network that it was distilled from) and, at
            level 2, ``grids``
            (:class:`~dino.models.grid_source.GridSource`), as far as they are known.
    """

    spec: BackboneSpec
    transform: Transform | None = None
    step: int | None = None
    geometry: Mapping[str, Any] = field(default_factory=dict)
    config: dict[str, Any] | None = None
    training: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {
            "format": FORMAT,
            "level": self.spec.level,
            "step": self.step,
            "spec": self.spec.to_dict(),
            "transform": self.transform.to_dict() if self.transform else None,
            "geometry": dict(self.geometry),
            "config": self.config,
            **self.training,
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], source: str) -> "Description":
        """The description in a checkpoint, or in the section of an export's ``config.json``.

        Raises:
            CheckpointError: It is of another version, or its values are not those of a description.
        """
        if content.get("format") != FORMAT:
            raise CheckpointError(
                f"{source}: expected format {FORMAT}, found {content.get('format')}: update this package"
            )
        with readable(source):
            transform, slides = _mapping(content, "transform"), _mapping(content, "training_slides")
            for key, ids in slides.items():
                if not isinstance(ids, str if key == "salt" else list):
                    raise TypeError(f"training_slides.{key} is {type(ids).__name__}")
            return cls(
                BackboneSpec.from_dict(dict(_mapping(content, "spec"))),
                Transform.from_dict(transform) if transform else None,
                content.get("step"),
                _mapping(content, "geometry"),
                dict(_mapping(content, "config")) or None,
                {key: content[key] for key in TRAINING if key in content},
            )


def is_own(content: Mapping[str, Any]) -> bool:
    """Whether a checkpoint is one of this package, of any version."""
    return str(content.get("format", "")).startswith(f"{PACKAGE}/")


def check_resumable(content: Mapping[str, Any]) -> None:
    """Raise CheckpointError unless training can resume from a checkpoint."""
    if content.get("format") != FORMAT or "optimizer" not in content:
        raise CheckpointError(f"expected a checkpoint of this version to resume from, found {content.get('format')!r}")


@contextmanager
def readable(source: str) -> Iterator[None]:
    """Turn the errors of code that parses a description into CheckpointError."""
    try:
        yield
    except DinoError:
        raise
    except (TypeError, ValueError, LookupError, AttributeError, RuntimeError, ArithmeticError) as error:
        raise CheckpointError(
            f"{source}: expected a description of the model as this package writes it, found values of another kind "
            f"({type(error).__name__}: {' '.join(str(error).split())[:120]}): copy or export it again"
        ) from error


def _mapping(content: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """A nested dictionary of a description; empty where there is none."""
    value = content.get(key)
    if value is not None and not isinstance(value, Mapping):
        raise TypeError(f"{key} is {type(value).__name__}")
    return value or {}


def resolve_run(path: Path) -> Path:
    """The checkpoint that a run folder means: ``best.pt`` where there is one, else ``last.pt``; it is printed.

    Raises:
        CheckpointError: The folder contains neither.
    """
    for name in RUN_CHOICES:
        candidate = path / "checkpoints" / name
        if candidate.is_file():
            say(f"{path}: using checkpoints/{name}")
            return candidate
    wanted = " or ".join(f"checkpoints/{name}" for name in RUN_CHOICES)
    raise CheckpointError(f"{path}: expected a run folder with {wanted}, or an export with config.json; found neither")


def fingerprint(module: nn.Module, note: str = "") -> str:
    """SHA-256 over names, types, shapes and bytes of all tensors of ``module``, and over ``note``."""
    digest = hashlib.sha256(note.encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------- files


def read_checkpoint(path: Path, mmap: bool = False) -> dict[str, Any]:
    """Read a ``torch.save`` or safetensors file onto the CPU; only tensors, plain values and ``Namespace`` are allowed.

    Args:
        path: The file.
        mmap: Leave tensors on disk until they are used (zip files only), for readers that need few of them.

    Returns:
        The dictionary in the file.

    Raises:
        CheckpointError: There is no such file, it is damaged, it contains no dictionary, or reading it would run code.
    """
    if not path.is_file():
        raise CheckpointError(f"no such checkpoint: {path}")
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    is_zip = zipfile.is_zipfile(path)
    if is_zip:
        check_zip(path)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and is_zip)
    except Exception as error:  # torch raises whatever its parsers do: pickle, zip, runtime and value errors
        raise CheckpointError(_reason(path, error)) from error
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{path}: expected a checkpoint (a dictionary of tensors), found {type(content).__name__}"
        )
    for name, tensor in _tensors(content):
        if not is_backed(tensor):
            raise CheckpointError(
                f"{path}: expected every tensor to be stored completely, found '{name}' of {tuple(tensor.shape)} "
                "expanded from fewer values: save .contiguous() tensors"
            )
    return content


def is_backed(tensor: Tensor) -> bool:
    """Whether a tensor's storage is as large as its shape; an expanded tensor may claim any size at no cost."""
    if tensor.layout != torch.strided:
        return False
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


def _tensors(content: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor in nested dictionaries and lists; each container is visited once, however often it is referenced."""
    seen: set[int] = set()
    waiting: list[tuple[str, Any]] = [("", content)]
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, dict | list | tuple) and id(value) not in seen:
            seen.add(id(value))
            items = value.items() if isinstance(value, dict) else enumerate(value)
            waiting += [(f"{name}.{key}" if name else str(key), item) for key, item in items]


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file; CheckpointError when it is damaged."""
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except Exception as error:
        raise CheckpointError(f"{path}: not a readable safetensors file ({_first_line(error)})") from error


def check_zip(path: Path) -> None:
    """Compare the checksum of every record, which ``torch.load`` does not; CheckpointError where one differs.

    ``torch.save`` compresses nothing: a file whose records unpack to more than its size is rejected before unpacking.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked, size = sum(record.file_size for record in archive.infolist()), path.stat().st_size
            damaged = archive.testzip() if unpacked <= size else None
    except Exception as error:  # flipped bits also look like passwords or unknown compressions, each with its error
        raise CheckpointError(f"{path}: the file is damaged or truncated ({_first_line(error)})") from error
    if unpacked > size:
        raise CheckpointError(
            f"{path}: expected a file of torch.save, which does not compress, found {size:,} bytes that unpack to "
            f"{unpacked:,}: save its tensors again"
        )
    if damaged is not None:
        raise CheckpointError(f"{path}: the file is damaged (checksum of {damaged} differs): copy it again")


def _reason(path: Path, error: Exception) -> str:
    unsafe = UNSAFE_GLOBAL.search(str(error))
    if unsafe:
        return (
            f"{path}: reading it would run code ({unsafe.group(1)}), which is not allowed: if you trust the file, save "
            "its tensors alone with torch.save(torch.load(file, weights_only=False)['teacher'], new_file)"
        )
    for text, kind in OTHER_KINDS.items():
        if text in str(error):
            return f"{path}: expected a checkpoint, found {kind}, which can contain code: save its state_dict() instead"
    return f"{path}: expected a checkpoint, found a damaged, truncated or other file ({type(error).__name__})"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
