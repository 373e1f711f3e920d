"""Where in a painting there is room to write: the emptiest window, for choice at the upper right or left.

Read before paint.py.
Shapes: H height, W width of the painting, uint8 [3, H, W].
"""

from __future__ import annotations

import numpy as np
from PIL import Image

LOOKED_AT = 640             # pixels: the longer side of the small picture in which room is looked for
SHADE = 0.12                # so much darker than the light parts is still empty: the borders of old paper
EMPTIEST = 0.10             # the share of windows among which one is chosen by where it lies


def busyness(painting: np.ndarray) -> np.ndarray:
    """How much there is at each place of a small copy of the painting, float64 [h, w]: edges and darkness."""
    image = Image.fromarray(painting.transpose(1, 2, 0)).convert("L")
    image.thumbnail((LOOKED_AT, LOOKED_AT), Image.Resampling.BOX)
    grey = np.asarray(image, np.float64) / 255
    dy, dx = np.gradient(grey)
    return np.hypot(dx, dy) * 4 + 2 * np.maximum(0, np.quantile(grey, 0.9) - SHADE - grey)


def window_means(values: np.ndarray, height: int, width: int) -> np.ndarray:
    """The mean of [h, w] in each window, by its upper left corner: [h - height + 1, w - width + 1]."""
    total = np.pad(values.cumsum(0).cumsum(1), [(1, 0), (1, 0)])
    return (total[height:, width:] - total[:-height, width:] - total[height:, :-width]
            + total[:-height, :-width]) / (height * width)


def emptiest(painting: np.ndarray, height: int, width: int, margin: int) -> tuple[int, int, float]:
    """x and y of a window of this size, in pixels, `margin` from the edges, and the share of all windows that
    are emptier than it, at most EMPTIEST.
    """
    values = busyness(painting)
    scale = values.shape[0] / painting.shape[1]
    size = [max(1, min(round(scale * side), limit))
            for side, limit in zip((height, width), values.shape, strict=True)]
    means = window_means(values, *size)
    edge = [min(int(np.ceil(scale * margin)), (n - 1) // 2) for n in means.shape]
    means = means[edge[0]:means.shape[0] - edge[0], edge[1]:means.shape[1] - edge[1]]
    y, x = chosen(means)
    rank = float((means < means[y, x]).mean())
    limit = painting.shape[1] - height, painting.shape[2] - width
    top, left = (min(round((at + e) / scale), most) for at, e, most in zip((y, x), edge, limit, strict=True))
    return left, top, rank


def chosen(means: np.ndarray) -> tuple[int, int]:
    """Row and column among the emptiest: the nearer to an upper corner the better, for choice the right."""
    rows, columns = means.shape
    y, x = np.linspace(0, 1, rows)[:, None], np.linspace(0, 1, columns)[None]
    from_corner = y + np.minimum(1 - x, x + 0.1) * 1.5
    worst = np.quantile(means, EMPTIEST)
    spread = max(float(worst - means.min()), 1e-9)
    cost = from_corner + (means - means.min()) / spread
    return np.unravel_index(np.argmin(np.where(means <= worst, cost, np.inf)), means.shape)
