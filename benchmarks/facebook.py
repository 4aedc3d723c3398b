"""A checkout of facebookresearch/dino as a comparator, used through its public modules; no code of it is copied."""

import importlib
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.networks import LR, MOMENTUM, TEACHER_TEMP, WEIGHT_DECAY, Task, load_named
from benchmarks.reference.step import Step
from dino.models.spec import shape_of
from dino.train.loop import Trainer

MODULES = ("utils", "vision_transformer", "main_dino")


@contextmanager
def _modules(checkout: Path) -> Iterator[dict[str, ModuleType]]:
    """Import its modules, and remove them from ``sys.modules`` afterwards: their names are as common as ``utils``."""
    if not (checkout / "main_dino.py").is_file():
        raise FileNotFoundError(f"expected a checkout of facebookresearch/dino at {checkout}, found no main_dino.py")
    sys.path.insert(0, str(checkout))
    try:
        yield {name: importlib.import_module(name) for name in MODULES}
    finally:
        sys.path.remove(str(checkout))
        for name in MODULES:
            sys.modules.pop(name, None)


class FacebookStep(Step):
    """The reference's step with facebookresearch/dino's networks, loss and clipping."""

    def __init__(self, student: nn.Module, loss: nn.Module, precision: str) -> None:
        super().__init__(student, _OneEpoch(loss), precision, LR, WEIGHT_DECAY, MOMENTUM)


class _OneEpoch(nn.Module):
    """Adapter: the loss takes the epoch as a third argument."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return self.loss(student, teacher, 0)


def step(task: Task, trainer: Trainer, checkout: Path, precision: str) -> Step:
    """Its student, teacher and loss with the current weights of ``trainer``.

    Args:
        task: Network, batch and views; level 1 only.
        trainer: This package's trainer.
        checkout: Folder of the checkout.
        precision: ``fp32``, ``bf16`` or ``fp16``.
    """
    shape = shape_of(task.arch)
    if shape is None or task.level != "patch":
        raise ValueError(f"expected a level-1 architecture of this package, found {task.arch}")
    with _modules(checkout) as found:
        vits: Any = found["vision_transformer"]
        backbone = vits.VisionTransformer(
            img_size=[task.spec.img_size[0]],
            patch_size=task.spec.patch_size,
            embed_dim=shape.dim,
            depth=shape.depth,
            num_heads=shape.heads,
            qkv_bias=True,
            norm_layer=lambda dim: nn.LayerNorm(dim, eps=1e-6),
        )
        head = vits.DINOHead(shape.dim, task.out_dim, norm_last_layer=False)
        head.last_layer = nn.utils.parametrizations.weight_norm(
            nn.Linear(head.last_layer.in_features, task.out_dim, bias=False), dim=0
        )  # the older form of weight norm does not support deepcopy
        network = found["utils"].MultiCropWrapper(backbone, head).to(trainer.device)
        loss = found["main_dino"].DINOLoss(task.out_dim, task.views, TEACHER_TEMP, TEACHER_TEMP, 0, 1)
    load_named(network, trainer.model.student.published_state())
    _one_process()
    return FacebookStep(network, loss.to(trainer.device), precision)


def _one_process() -> None:
    """Its loss averages over processes and needs a process group."""
    if not dist.is_initialized():
        store = Path(tempfile.mkdtemp(), "store")
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, init_method=f"file://{store}", rank=0, world_size=1)
