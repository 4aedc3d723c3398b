"""Flips and quarter turns, folded into three yes-or-no answers."""

from torch import Tensor


def fold_turns(flip_x: Tensor, flip_y: Tensor, turns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Express "flip, then turn counter-clockwise by ``turns`` quarters" as "flip, then transpose".

    Args:
        flip_x: (...) bool, left-right flip before the turn.
        flip_y: (...) bool, up-down flip before the turn.
        turns: (...) int64, 0 to 3, as in ``torch.rot90(x, turns, (-2, -1))``.

    Returns:
        Three (...) bool tensors: left-right flip, up-down flip, and whether to swap rows and columns afterwards.
    """
    return flip_x ^ ((turns == 1) | (turns == 2)), flip_y ^ (turns >= 2), turns % 2 == 1
