"""Reading checkpoint files: never running code from them, and saying in one line what is wrong with a bad one."""

import argparse
import hashlib
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dino.errors import CheckpointError
from dino.progress import say

RUN_CHOICES = ("best.pt", "last.pt")
# In torch's message: "Unsupported global: GLOBAL pathlib.Path was not ...", "unsupported GLOBAL posix.system whose ..."
REFUSED = re.compile(r"GLOBAL ([\w.]+)")

OTHER_KINDS = {"TorchScript": "a TorchScript archive", ".tar": "a file of the old tar format"}  # in torch's messages


def read_checkpoint(path: Path, mmap: bool = False) -> dict[str, Any]:
    """Read a ``torch.save`` or safetensors file onto the CPU, allowing tensors, plain values and ``Namespace`` alone.

    Args:
        path: The file.
        mmap: Leave tensors on disk until they are used (zip files only): for readers that need few of them.

    Returns:
        The dictionary in the file.

    Raises:
        CheckpointError: There is no such file, it is damaged, it holds no dictionary, or reading it would run code.
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
                f"{path}: expected every tensor to lie in the file, found '{name}' of {tuple(tensor.shape)} that is "
                "spread out from less: save .contiguous() tensors"
            )
    return content


def is_backed(tensor: Tensor) -> bool:
    """Whether a tensor holds as many bytes as its shape says; one that does not may claim any size at no cost."""
    if tensor.layout != torch.strided:
        return False
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


def _tensors(content: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor in nested dictionaries and lists; each of these is looked at once, however often it is named."""
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
    """Compare the checksum of every record, which ``torch.load`` leaves out; CheckpointError where one differs.

    ``torch.save`` compresses nothing: a file whose records unpack to more than it holds is refused before that is done.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked, size = sum(record.file_size for record in archive.infolist()), path.stat().st_size
            damaged = archive.testzip() if unpacked <= size else None
    except Exception as error:  # flipped bits also look like passwords or unknown compressions, each with its error
        raise CheckpointError(f"{path}: the file is damaged or cut off ({_first_line(error)})") from error
    if unpacked > size:
        raise CheckpointError(
            f"{path}: expected a file of torch.save, which packs nothing, found {size:,} bytes that unpack to "
            f"{unpacked:,}: save its tensors again"
        )
    if damaged is not None:
        raise CheckpointError(f"{path}: the file is damaged (checksum of {damaged} differs): copy it again")


def resolve_run(path: Path) -> Path:
    """The checkpoint that a run folder stands for: ``best.pt`` where there is one, else ``last.pt``; printed.

    Raises:
        CheckpointError: The folder holds neither.
    """
    for name in RUN_CHOICES:
        candidate = path / "checkpoints" / name
        if candidate.is_file():
            say(f"{path}: taking checkpoints/{name}")
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


def _reason(path: Path, error: Exception) -> str:
    refused = REFUSED.search(str(error))
    if refused:
        return (
            f"{path}: reading it would run code ({refused.group(1)}), which is refused: save its tensors alone, "
            "where you trust it, with torch.save(torch.load(file, weights_only=False)['teacher'], new_file)"
        )
    for sign, kind in OTHER_KINDS.items():
        if sign in str(error):
            return f"{path}: expected a checkpoint, found {kind}, which can hold code: save its state_dict() instead"
    return f"{path}: expected a checkpoint, found a file that is damaged, cut off or none ({type(error).__name__})"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
