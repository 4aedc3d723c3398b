"""Precision of forward passes: fp32, fp64, or bf16 by autocast where the device computes in it."""

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch

from dino import progress
from dino.errors import ConfigError

PRECISIONS = ("bf16", "fp32", "fp64")


def check_precision(precision: str, device: torch.device) -> None:
    """Check that ``precision`` is known and that the device supports it; say once if a CPU without bf16 uses fp32.

    Args:
        precision: ``bf16``, ``fp32`` or ``fp64``.
        device: Where to compute.

    Raises:
        ConfigError: If the precision is unknown, or the device is a GPU too old for bf16.
    """
    if precision not in PRECISIONS:
        raise ConfigError(f"expected precision bf16, fp32 or fp64, found '{precision}'")
    if precision != "bf16":
        return
    if device.type != "cuda":
        if not cpu_has_bf16():
            _say_that_fp32_is_used()
        return
    with torch.cuda.device(device):
        supported = torch.cuda.is_bf16_supported(including_emulation=False)
    if not supported:
        raise ConfigError(
            f"expected a GPU that supports bf16 (compute capability 8.0 or higher), found "
            f"{torch.cuda.get_device_name(device)} as {device}; set precision=fp32 (in pretrain speed.precision=fp32)"
        )


def casts_to_bf16(precision: str, device: torch.device) -> bool:
    """Whether forward passes run under autocast to bf16.

    Not on a CPU without it: the setting asks for speed, and there matrix products take 7 to 45 times as long in bf16 as
    in fp32 (docs/performance.md). Like every other change of the device, this changes the rounding of a run, not its
    settings.
    """
    return precision == "bf16" and (device.type != "cpu" or cpu_has_bf16())


def computed_in(precision: str, device: torch.device) -> str:
    """The precision of forward passes: fp32 where the device does not compute in bf16, else the one that is set."""
    return "fp32" if precision == "bf16" and not casts_to_bf16(precision, device) else precision


def autocast(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """Context of forward passes of the given precision."""
    return torch.autocast(device.type, torch.bfloat16) if casts_to_bf16(precision, device) else nullcontext()


@cache
def _say_that_fp32_is_used() -> None:
    progress.say("this CPU does not compute in bf16: using fp32")


@cache
def cpu_has_bf16() -> bool:
    """Whether oneDNN computes matrix products in bf16 on this CPU; else torch uses plain loops."""
    if not torch.backends.mkldnn.is_available():
        return False
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
