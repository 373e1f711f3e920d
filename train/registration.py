"""Which stroke is which ink: the strokes of a printed character moved onto a picture of it written by brush.

Read after data/strokes.py. The strokes are drawn by a renderer that gradients pass through, and Adam moves
them: all together first, then as a sheet of rubber, then each by itself, then point by point.
Shapes: S strokes, P points of each, h a picture's side in pixels; float32. Points and widths in boxes, so
that the picture is 0..1 x 0..1, x right, y down. Ink is 0 on paper, 1 where it is black.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .data.strokes import Character, Stroke, resample

POINTS = 20                 # of a stroke while it is fitted
SIDES = (32, 32, 64, 64)    # of the picture at each stage, in pixels
STEPS = (60, 120, 100, 160)
RATES = (0.02, 0.02, 0.015, 0.008)
FINE = 200                  # points of a stroke where it is held against the ink
SCALES = (1, 2, 4, 8)       # the pictures are compared at the size and halved, so that strokes feel far ink
STIFF = 0.1                 # what changing a stroke's shape costs, by strain squared
LEAST_IOU = 0.8             # gates; see `problems`
LEAST_ON_INK = 0.75
LENGTHS = (0.4, 2.0)
MOST_UNREACHED = 0.02
LONGEST_GAP = 0.08         # a dry brush leaves gaps, too
MOST_TURN = 45.0


class Plan(NamedTuple):
    """What differs between attempts."""

    pins: int               # the sheet of rubber is held by pins x pins
    lonely: float           # what ink far from any stroke costs, by its distance


PLANS = (Plan(4, 3.0), Plan(4, 30.0))       # the second is tried where the first fails


class Fit(NamedTuple):
    """Strokes on a picture, and how well they lie there."""

    strokes: list[Stroke]
    iou: float              # of strokes and ink, at 128 pixels
    shares: list[float]     # share of each stroke that lies on ink
    lengths: list[float]    # of each stroke, as a multiple of what the printed one became with all others
    turns: list[float]      # degrees, each stroke's direction against the printed one's
    gaps: list[float]       # of each stroke, the longest piece of its middle that is off the ink, in boxes
    unreached: float        # share of the ink that is more than 0.02 boxes from any stroke


# ------------------------------------------------------------------------------------------------- rendering


def pixel_centres(side: int) -> Tensor:
    """[side * side, 2] in boxes, row by row."""
    at = (torch.arange(side) + 0.5) / side
    y, x = torch.meshgrid(at, at, indexing="ij")
    return torch.stack([x, y], -1).reshape(-1, 2)


def depths(points: Tensor, widths: Tensor, places: Tensor) -> Tensor:
    """How deep each of the places [N, 2] lies in each stroke, in boxes: [S, N], below 0 outside.

    points: [S, P, 2]. widths: [S, P]. A stroke is what a disc sweeps that goes along it and changes its size.
    """
    start, edge = points[:, :-1, None], (points[:, 1:] - points[:, :-1])[:, :, None]    # [S, P - 1, 1, 2]
    off_x, off_y = places[:, 0] - start[..., 0], places[:, 1] - start[..., 1]           # [S, P - 1, N]
    length = edge.square().sum(-1).clamp_min(1e-8)
    t = ((off_x * edge[..., 0] + off_y * edge[..., 1]) / length).clamp(0, 1)
    away = ((off_x - t * edge[..., 0]).square() + (off_y - t * edge[..., 1]).square() + 1e-9).sqrt()
    radius = widths / 2
    return (radius[:, :-1, None] * (1 - t) + radius[:, 1:, None] * t - away).amax(1)


def coverage(points: Tensor, widths: Tensor, side: int) -> Tensor:
    """The ink of each stroke, [S, side, side], with soft edges of about a pixel."""
    return inked(depths(points, widths, pixel_centres(side)), side)


def inked(depth: Tensor, side: int) -> Tensor:
    """What `depths` gave for `pixel_centres` as ink, [S, side, side]."""
    return (depth * side * 2).sigmoid().unflatten(1, (side, side))


def together(each: Tensor) -> Tensor:
    """The ink [h, h] of all strokes [S, h, h], one over the other."""
    return 1 - (1 - each).prod(0)


# --------------------------------------------------------------------------------------------------- fitting


def fit(ink: np.ndarray, printed: Character) -> Fit:
    """Moves the strokes of a printed character onto the ink [h, h] of a picture of it. The picture must have
    ink.

    5 s for each of at most two attempts, on one thread. What comes out is always something: `problems` says
    whether to trust it.
    """
    picture = torch.from_numpy(np.ascontiguousarray(ink, np.float32))
    best = None
    for plan in PLANS:
        found = attempt(picture, printed, plan)
        if best is None or len(problems(found)) < len(problems(best)):
            best = found
        if not problems(best):
            break
    return best


def attempt(picture: Tensor, printed: Character, plan: Plan) -> Fit:
    """All four stages from the printed strokes, on a picture's ink [h, h]."""
    rows = [resample(np.column_stack([s.points, s.widths]), POINTS) for s in printed.strokes]
    points, widths = torch.from_numpy(np.stack(rows)).split([2, 1], dim=-1)
    points, widths = on_the_same_box(points, widths[..., 0], picture)
    for stage, side, steps, rate in zip(STAGES, SIDES, STEPS, RATES, strict=True):
        numbers, move = stage(points, widths, plan)
        points, widths = descend(numbers, move, resized(picture, side), steps, rate, plan)
        if stage is sheet:
            before = points
    return measured(*cut_back(points, widths, picture), before, picture)


def resized(picture: Tensor, side: int) -> Tensor:
    """[side, side], each pixel a mean of what was there."""
    return F.interpolate(picture[None, None], (side, side), mode="bilinear", antialias=True)[0, 0]


def on_the_same_box(points: Tensor, widths: Tensor, picture: Tensor) -> tuple[Tensor, Tensor]:
    """Strokes moved and stretched so that their box is that of the picture's ink; widths to its amount."""
    ys, xs = (picture > 0.5).nonzero().T.float()
    low = torch.stack([xs.min(), ys.min()]) / len(picture)
    high = (torch.stack([xs.max(), ys.max()]) + 1) / len(picture)
    margin = widths.mean() / 2
    first, last = points.amin((0, 1)) - margin, points.amax((0, 1)) + margin
    points = low + (points - first) / (last - first) * (high - low)
    area = together(coverage(points, widths, 64)).mean()
    return points, widths * (resized(picture, 64).mean() / area).clamp(0.3, 3)


# A stage gives its numbers, all 0 at first, and what they do: numbers -> (points, widths, penalty).
Move = Callable[[list[Tensor]], tuple[Tensor, Tensor, Tensor]]


def affine(points: Tensor, widths: Tensor, plan: Plan) -> tuple[list[Tensor], Move]:
    """All strokes together: a matrix, a shift, and one factor of all widths."""
    def move(numbers: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        matrix, shift, wider = numbers
        moved = 0.5 + (points - 0.5) @ (torch.eye(2) + matrix).T + shift
        return moved, widths * wider.exp(), 0.1 * matrix.square().sum()
    return [torch.zeros(2, 2), torch.zeros(2), torch.zeros(1)], move


def sheet(points: Tensor, widths: Tensor, plan: Plan) -> tuple[list[Tensor], Move]:
    """All strokes as drawn on rubber: a grid of pins is shifted, and what lies between follows."""
    def move(numbers: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        pins, wider = numbers
        shift = F.grid_sample(pins[None], points[None] * 2 - 1, mode="bilinear", padding_mode="border",
                              align_corners=True)[0].permute(1, 2, 0)
        bent = sum(pins.diff(dim=d).square().sum() for d in (1, 2))
        return points + shift, widths * wider[:, None].exp(), 0.5 * bent + 0.02 * wider.square().mean()
    return [torch.zeros(2, plan.pins, plan.pins), torch.zeros(len(points))], move


def stroke_by_stroke(points: Tensor, widths: Tensor, plan: Plan) -> tuple[list[Tensor], Move]:
    """Each stroke with a matrix and a shift of its own, about its middle."""
    middle = points.mean(1, keepdim=True)

    def move(numbers: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        matrices, shifts, wider = numbers
        turned = torch.einsum("spd,sed->spe", points - middle, torch.eye(2) + matrices)
        moved = middle + turned + shifts[:, None]
        penalty = STIFF * matrices.square().sum((1, 2)).mean() + 1.0 * shifts.square().sum(1).mean()
        return moved, widths * wider[:, None].exp(), penalty + 0.02 * wider.square().mean()
    count = len(points)
    return [torch.zeros(count, 2, 2), torch.zeros(count, 2), torch.zeros(count)], move


def point_by_point(points: Tensor, widths: Tensor, plan: Plan) -> tuple[list[Tensor], Move]:
    """Each point by itself, but as its neighbours go: neither kinks nor crowds, a short stroke no more than a
    long one."""
    pieces = (points.diff(dim=1).norm(dim=-1).mean(1) + 0.003)[:, None, None]

    def move(numbers: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        shifts, wider = numbers
        strain = (shifts.diff(dim=1) / pieces).square().sum(-1).mean()
        bend = (shifts.diff(dim=1).diff(dim=1) / pieces).square().sum(-1).mean()
        uneven = wider.diff(dim=1).square().mean()
        penalty = STIFF * strain + 4 * STIFF * bend + 0.5 * shifts.square().sum(-1).mean()
        return points + shifts, widths * wider.exp(), penalty + 0.05 * uneven + 0.01 * wider.square().mean()
    return [torch.zeros_like(points), torch.zeros_like(widths)], move


STAGES = (affine, sheet, stroke_by_stroke, point_by_point)


def descend(numbers: list[Tensor], move: Move, target: Tensor, steps: int, rate: float,
            plan: Plan) -> tuple[Tensor, Tensor]:
    """Adam on the numbers of a stage, at a rate that falls to 0. Returns the points and widths it ends with.
    """
    for number in numbers:
        number.requires_grad_()
    adam = torch.optim.Adam(numbers, rate, betas=(0.8, 0.95))
    for step in range(steps):
        adam.param_groups[0]["lr"] = rate * (1 - step / steps)
        points, widths, penalty = move(numbers)
        loss = difference(points, widths, target, plan.lonely) + penalty
        adam.zero_grad()
        loss.backward()
        adam.step()
    with torch.no_grad():
        points, widths, _ = move(numbers)
        return points.clone(), widths.clone()


def difference(points: Tensor, widths: Tensor, target: Tensor, weight: float) -> Tensor:
    """How strokes and ink differ: squared at several scales; ink that no stroke is near; middles off the ink.
    """
    depth = depths(points, widths, pixel_centres(len(target)))
    off = (together(inked(depth, len(target))) - target)[None, None]
    apart = sum(F.avg_pool2d(off, scale).square().mean() for scale in SCALES)
    lonely = (target.flatten() * (-depth.amax(0)).clamp_min(0)).mean()
    under = F.grid_sample(target[None, None], points[None] * 2 - 1, align_corners=False)
    return (apart + weight * lonely) / target.mean() + 0.2 * (1 - under).square().mean()


# --------------------------------------------------------------------------------------------------- judging


def cut_back(points: Tensor, widths: Tensor, picture: Tensor) -> tuple[Tensor, Tensor]:
    """Strokes without an end that crosses bare paper to reach the ink of another stroke."""
    ink = resized(picture, 128).numpy() > 0.5
    for k in range(len(points)):
        rows = resample(torch.cat([points[k], widths[k, :, None]], 1).numpy(), FINE)
        others = [j for j in range(len(points)) if j != k]
        if others:
            places = torch.from_numpy(rows[:, :2])
            taken = (depths(points[others], widths[others], places).amax(0) > 0).numpy()
            part = own_part(on_ink(rows, ink), taken)
            if part != slice(0, FINE):
                row = torch.from_numpy(resample(rows[part], POINTS))
                points[k], widths[k] = row[:, :2], row[:, 2]
    return points, widths


def own_part(on: np.ndarray, taken: np.ndarray) -> slice:
    """Of a line's places, bool [n]: without a part at either end, at most two fifths, that is off the ink but
    where other strokes lie, if it holds a gap of a thirtieth or more."""
    n, first, last = len(on), 0, len(on)
    for k in range(n // 30, 2 * n // 5):
        if not on[k - n // 30:k].any() and (taken | ~on)[:k].all():
            first = k
        if not on[n - k:n - k + n // 30].any() and (taken | ~on)[n - k:].all():
            last = n - k
    return slice(first, last)


def on_ink(rows: np.ndarray, ink: np.ndarray) -> np.ndarray:
    """Whether each of the points [n, 2 or more] lies on ink, bool [h, h]."""
    x, y = np.clip((rows[:, :2] * len(ink)).astype(int), 0, len(ink) - 1).T
    return ink[y, x]


def measured(points: Tensor, widths: Tensor, before: Tensor, picture: Tensor) -> Fit:
    """The strokes with their figures; `before`: the points [S, P, 2] as all had moved together."""
    ink = resized(picture, 128) > 0.5
    depth = depths(points, widths, pixel_centres(128)).unflatten(1, (128, 128))
    each, reached = depth > 0, depth.amax(0) > -0.02
    iou = (each.any(0) & ink).sum() / (each.any(0) | ink).sum()
    share = (each & ink).sum((1, 2)) / each.sum((1, 2)).clamp_min(1)
    steps, then = points.diff(dim=1), before.diff(dim=1)
    ends = widths[:, [0, -1]].sum(1) / 2            # a disc reaches beyond the stroke's end
    lengths = (steps.norm(dim=-1).sum(1) + ends) / (then.norm(dim=-1).sum(1) + ends)
    cosines = F.cosine_similarity(steps, then, dim=-1)
    turns = (cosines * then.norm(dim=-1)).sum(1) / then.norm(dim=-1).sum(1)
    strokes = [Stroke(p.numpy(), w.numpy()) for p, w in zip(points, widths, strict=True)]
    return Fit(strokes, iou.item(), share.tolist(), lengths.tolist(),
               turns.clamp(-1, 1).acos().rad2deg().tolist(), [gap(s, ink.numpy()) for s in strokes],
               ((ink & ~reached).sum() / ink.sum()).item())


def gap(stroke: Stroke, ink: np.ndarray) -> float:
    """The longest piece of a stroke's middle that is off the ink, bool [h, h]; in boxes."""
    longest = run = 0
    for on in on_ink(resample(stroke.points, FINE), ink):
        run = 0 if on else run + 1
        longest = max(longest, run)
    return longest / FINE * stroke.length()


def problems(fit: Fit) -> list[str]:
    """Why a fit is not to be trusted, in words; empty if it is fine.

    Much overlap alone proves little: a stroke that shrank to nothing or turned round hides under its
    neighbours.
    """
    found = [] if fit.iou >= LEAST_IOU else [f"overlap {fit.iou:.2f}, less than {LEAST_IOU}"]
    if fit.unreached > MOST_UNREACHED:
        found.append(f"{fit.unreached:.0%} of the ink is far from any stroke")
    each = zip(fit.shares, fit.lengths, fit.turns, fit.gaps, strict=True)
    for k, (share, length, turn, gap) in enumerate(each, 1):
        if share < LEAST_ON_INK:
            found.append(f"stroke {k}: only {share:.0%} of it on ink")
        if not LENGTHS[0] <= length <= LENGTHS[1]:
            found.append(f"stroke {k}: {length:.2f} times its length")
        if turn > MOST_TURN:
            found.append(f"stroke {k}: turned by {turn:.0f} degrees")
        if gap > LONGEST_GAP:
            found.append(f"stroke {k}: leaves the ink for {gap:.2f} boxes")
    return found
