"""Where the cls token of the last block looks: attention over tiles and over regions."""

from collections.abc import Sequence

import numpy as np

from dino.report.sheets import Cell, sheet

COLOURS = "OrRd"  # from light to dark: strong attention stands out on pale glass as well as on grey tissue
EVENLY_TWICE = 2.0  # times the even share: less than that is no focus
STRONGEST = 0.85  # opacity of the strongest attention: the tissue below stays visible


def overlay(pixels: np.ndarray, attention: np.ndarray, *, smooth: bool = True) -> np.ndarray:
    """Attention laid over a picture: grey tissue, the redder the more the token looks there.

    Attention is taken relative to an even share, 1 / (h w) of the total: up to there nothing is coloured, and the
    deepest red is the map's 99th percentile, but at least twice the even share. An even map stays pale that way,
    where stretching it to its own range would show noise.

    Args:
        pixels: uint8, (H, W, 3).
        attention: Non-negative weights on a grid, (h, w).
        smooth: Interpolate between grid cells; False shows the cells themselves.

    Returns:
        uint8, (H, W, 3).
    """
    from matplotlib import colormaps
    from PIL import Image

    height, width = pixels.shape[:2]
    ratio = attention / max(float(attention.mean()), 1e-12)
    deepest = max(EVENLY_TWICE, float(np.percentile(ratio, 99)))
    stretched = np.clip((ratio - 1) / (deepest - 1), 0.0, 1.0).astype(np.float32)
    resample = Image.Resampling.BICUBIC if smooth else Image.Resampling.NEAREST
    weight = np.clip(np.asarray(Image.fromarray(stretched).resize((width, height), resample)), 0.0, 1.0)
    grey = pixels.astype(np.float32) @ np.array([0.299, 0.587, 0.114], dtype=np.float32)  # (H, W)
    pale = (255 - (255 - grey) * 0.75)[..., None]
    colour = colormaps[COLOURS](0.25 + 0.7 * weight)[..., :3].astype(np.float32) * 255
    share = (STRONGEST * weight)[..., None]
    return np.rint(pale * (1 - share) + colour * share).astype(np.uint8)


def attention_sheet(
    pictures: Sequence[np.ndarray],
    trained: np.ndarray,
    untrained: np.ndarray | None,
    um_per_px: float,
    *,
    heads: Sequence[int] = (0, 1, 2),
    smooth: bool = True,
) -> bytes:
    """One row per picture: the tissue, the mean over heads, single heads, and the untrained mean.

    Args:
        pictures: uint8, (H, W, 3) each.
        trained: Attention weights of the trained model, (n, heads, h, w).
        untrained: The same before training, or None.
        um_per_px: µm per px of the pictures.
        heads: Heads that are shown singly; those the model does not have are skipped.
        smooth: Interpolate between grid cells.

    Returns:
        JPEG.
    """
    heads = [head for head in heads if head < trained.shape[1]]
    rows = []
    for index, pixels in enumerate(pictures):
        maps = [trained[index].mean(0), *(trained[index, head] for head in heads)]
        maps += [untrained[index].mean(0)] if untrained is not None else []
        rows.append([Cell(pixels, um_per_px=um_per_px), *(Cell(overlay(pixels, m, smooth=smooth)) for m in maps)])
    titles = ["tissue", "mean over heads", *(f"head {head + 1}" for head in heads)]
    titles += ["untrained, mean"] if untrained is not None else []
    # Room for at least six columns: three columns of huge pictures would say no more.
    width = min(11.0, 11.0 * len(titles) / 6)
    return sheet(rows, titles, width=width, split=len(titles) - 1 if untrained is not None else None)
