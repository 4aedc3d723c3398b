"""Parameter groups, clipping, and an optimizer that a non-finite step leaves untouched."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from dino.errors import ConfigError

NAMES = ("adamw", "sgd")
CLIP_MODES = ("per_parameter", "global")


def parameter_groups(module: nn.Module) -> list[dict]:
    """Two groups as in facebookresearch/dino: weights that decay, and biases and 1-D parameters that do not."""
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    fixed = [p for name, p in named if name.endswith(".bias") or p.ndim == 1]
    decayed = [p for name, p in named if not (name.endswith(".bias") or p.ndim == 1)]
    return [{"params": decayed, "decays": True}, {"params": fixed, "decays": False, "weight_decay": 0.0}]


def build_optimizer(name: str, module: nn.Module) -> torch.optim.Optimizer:
    """AdamW or SGD with momentum 0.9, in the fused form that honours ``found_inf``.

    Args:
        name: ``adamw`` or ``sgd``; learning rate and weight decay are set at every step.
        module: The student.

    Raises:
        ConfigError: If the name is unknown.
    """
    if name not in NAMES:
        raise ConfigError(f"expected optim.name {' or '.join(NAMES)}, found '{name}'")
    groups = parameter_groups(module)
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=0.0, fused=True)
    return torch.optim.SGD(groups, lr=0.0, momentum=0.9, fused=True)


def clip_gradients(parameters: Iterable[nn.Parameter], largest: float, mode: str) -> tuple[Tensor, Tensor]:
    """Scale gradients down to a norm of at most ``largest``, in place.

    Args:
        parameters: Those without gradient are left out.
        largest: Largest norm; 0 leaves the gradients as they are.
        mode: ``per_parameter`` clips each tensor on its own (DINO), ``global`` all together.

    Returns:
        Norm over all gradients before clipping, and whether every one is finite; both scalars on the device.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    norms = torch.stack(torch._foreach_norm(gradients))  # (P,)
    total = norms.norm()
    if largest > 0:
        scale = (largest / ((total if mode == "global" else norms) + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(gradients, list(scale.expand(len(gradients)).unbind()))
    return total, torch.isfinite(norms).all()


def gated_step(optimizer: torch.optim.Optimizer, lr: float, weight_decay: float, finite: Tensor) -> None:
    """One optimizer step that changes nothing when ``finite`` is false, without asking the device.

    The fused optimizers take the flag that mixed-precision training uses for the same purpose.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr
        group["weight_decay"] = weight_decay if group["decays"] else 0.0
    optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
    optimizer.step()
    del optimizer.found_inf  # type: ignore[attr-defined]
