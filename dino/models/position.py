"""Resizing a learned position table to another grid, as a fixed matrix.

Every rule in use is linear in the table, so that the matrix is what interpolation makes of the identity. The matrix can
be kept; its product with the table must be taken anew whenever the table trains.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from dino.errors import ConfigError

RULES = ("dino", "recomputed", "timm")


def check_rule(rule: str) -> None:
    """Raise ConfigError when ``rule`` is none of ``RULES``."""
    if rule not in RULES:
        raise ConfigError(f"model.pos_resample: expected one of {', '.join(RULES)}, found {rule!r}")


def resampling_matrix(old: tuple[int, int], new: tuple[int, int], rule: str) -> Tensor:
    """Matrix that resizes a table of ``old`` (height, width) tokens to ``new``.

    Args:
        old: Grid that the table was trained for.
        new: Grid that is wanted.
        rule: ``dino``: bicubic without antialias, the scale (n + 0.1) / n0 taken as given (facebookresearch/dino and
            HIPT). ``recomputed``: the same with the scale n / n0 of the sizes. ``timm``: bicubic with antialias.

    Returns:
        float64 tensor (new tokens, old tokens) on the CPU, both row-major.

    Raises:
        ConfigError: The rule is unknown.
    """
    check_rule(rule)
    tokens = old[0] * old[1]
    identity = torch.eye(tokens, dtype=torch.float64).reshape(1, tokens, *old)
    if tuple(old) == tuple(new):
        return identity.reshape(tokens, tokens)
    if rule == "dino":
        scale = ((new[0] + 0.1) / old[0], (new[1] + 0.1) / old[1])
        resized = F.interpolate(identity, scale_factor=scale, mode="bicubic", align_corners=False)
    else:
        resized = F.interpolate(identity, size=new, mode="bicubic", align_corners=False, antialias=rule == "timm")
    return resized.reshape(tokens, new[0] * new[1]).T.contiguous()
