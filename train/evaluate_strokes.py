"""How well does a run write strokes? python -m train.evaluate_strokes --run out/strokes

Read after strokes.py. Counts the strokes, asks whether they come in the right order, and measures how far
they are from their models and from each other. Source of the assignment: Kuhn 1955, as shortest augmenting
paths (Jonker 1987). Distances are in shares of the box's side.
Shapes: S strokes, P points of each.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .data.strokes import Character, resample
from .errors import UserError
from .run.cli import MAX_SEED, check_flags, flag, parse_flags, start
from .run.log import Progress
from .strokes import StrokeWriter, read_strokes

POINTS = 24                     # of a stroke that is compared
BACKWARDS = 0.5                 # what writing a stroke against its direction costs, in boxes
BATCH = 64


@dataclass(frozen=True)
class EvaluateConfig:
    """The flags of train.evaluate_strokes."""

    run: str = flag("out/strokes", "run folder of train.train_diffusion on strokes")
    data: str = flag("data/strokes", "HAND/CHARACTER.json to compare with")
    count: int = flag(160, "how many characters to write, all captions in turn", at_least=1, at_most=100_000)
    guidance: float = flag(1.5, "as in train.sample", at_least=-1000, at_most=1000)
    steps: int = flag(30, "denoising steps", at_least=1, at_most=1000)
    seed: int = flag(0, "one seed, one result", at_least=0, at_most=MAX_SEED)


class Scores(NamedTuple):
    """Shares of all characters, and medians of distances in boxes."""

    count_right: float          # as many strokes as the model of the caption has
    order_right: float          # of those: each stroke is nearest to the one of its own place
    to_model: float             # dynamic time warping, after the best affine change; median
    by_seed: float              # between two seeds of a caption, as they are written; median
    nearest: float              # to the model, the smallest of all


def main(cfg: EvaluateConfig) -> None:
    """Prints a table for the captions that training saw and one for those whose character and hand it saw
    apart. Raises UserError, WeightsError or DataError."""
    check_flags(cfg)
    model = StrokeWriter.load(cfg.run)
    known = {f"{c.char} {c.hand}": c for c in read_strokes(cfg.data)[0]}
    words = {word for caption in model.captions for word in caption.split()}
    seen = [caption for caption in known if caption in model.captions]
    unseen = [caption for caption in known if words.issuperset(caption.split()) and caption not in seen]
    if not seen + unseen:
        raise UserError(f"--data {cfg.data}: holds no character that the run knows")
    for captions, what in ((seen, "captions of the run"), (unseen, "captions it never saw")):
        if captions:
            print(f"{cfg.count} characters of {len(captions)} {what}, {Path(cfg.run)}")
            print_scores(evaluate(model, captions, known, cfg))


def evaluate(model: StrokeWriter, captions: list[str], known: dict[str, Character],
             cfg: EvaluateConfig) -> Scores:
    """Writes the captions in turn and holds them against their models."""
    prompts = [captions[i % len(captions)] for i in range(cfg.count)]
    progress = Progress(cfg.count, unit="character")
    written = model.characters(prompts, cfg.seed, cfg.steps, cfg.guidance, BATCH,
                               lambda done: progress.show(done, ""))
    progress.close()
    return score(written, prompts, known)


def print_scores(scores: Scores) -> None:
    """A line each; no line for what needs two characters of a caption and has one."""
    for name, value in (("stroke count right", scores.count_right), ("order right", scores.order_right),
                        ("distance to the model, median", scores.to_model), ("smallest", scores.nearest),
                        ("distance between seeds, median", scores.by_seed)):
        if not math.isnan(value):
            print(f"  {name:32s}{value:7.2%}")


def score(written: list[Character], prompts: list[str], known: dict[str, Character]) -> Scores:
    """Holds each character against the one of its caption."""
    whole = [len(c.strokes) == len(known[p].strokes) for c, p in zip(written, prompts, strict=True)]
    good = [(c, known[p], p) for c, p, right in zip(written, prompts, whole, strict=True) if right]
    ordered = [in_order(character, model) for character, model, _ in good]
    away = [warped(aligned(lines(c), lines(model)), lines(model)) for c, model, _ in good]
    last: dict[str, np.ndarray] = {}
    apart = []
    for character, _, prompt in good:
        here = lines(character)
        if prompt in last:
            apart.append(warped(here, last[prompt]))
        last[prompt] = here
    median = [float(np.median(values)) if values else float("nan") for values in (away, apart)]
    nearest = min(away, default=float("nan"))
    return Scores(np.mean(whole), np.mean(ordered) if ordered else 0.0, *median, nearest)


# --------------------------------------------------------------------------------------------------- geometry


def lines(character: Character) -> np.ndarray:
    """[S, P, 2]."""
    return np.stack([resample(stroke.points, POINTS) for stroke in character.strokes])


def in_order(character: Character, model: Character) -> bool:
    """Whether pairing strokes at the least cost in all pairs each with the one of its place."""
    return assignment(costs(lines(character), lines(model))) == list(range(len(model.strokes)))


def costs(ours: np.ndarray, models: np.ndarray) -> np.ndarray:
    """[S, S]: mean distance of points, and what a stroke against its direction costs."""
    away = np.linalg.norm(ours[:, None] - models[None], axis=-1).mean(-1)
    ways = [each[:, -1] - each[:, 0] for each in (ours, models)]
    size = np.linalg.norm(ways[0], axis=1)[:, None] * np.linalg.norm(ways[1], axis=1)[None]
    return away + BACKWARDS * ((ways[0] @ ways[1].T) < -0.5 * size)


def assignment(cost: np.ndarray) -> list[int]:
    """The column of each row [n, n] so that the sum is least: each row in turn takes the shortest path of
    exchanges to a free column."""
    n = len(cost)
    rows, row_of, before = np.zeros(n), np.full(n + 1, -1), np.zeros(n + 1, int)
    columns = np.zeros(n + 1)                               # column n stands for the row that begins
    for row in range(n):
        row_of[n], column = row, n
        least, used = np.full(n, np.inf), np.zeros(n + 1, bool)
        while row_of[column] >= 0:
            used[column] = True
            reduced = cost[row_of[column]] - rows[row_of[column]] - columns[:n]
            better = ~used[:n] & (reduced < least)
            least[better], before[:n][better] = reduced[better], column
            free = np.where(used[:n], np.inf, least)
            column, step = int(free.argmin()), free.min()
            rows[row_of[used]] += step
            columns[used] -= step
            least[~used[:n]] -= step
        while column != n:
            row_of[column], column = row_of[before[column]], before[column]
    found = np.argsort(row_of[:n])
    return found.tolist()


def aligned(ours: np.ndarray, models: np.ndarray) -> np.ndarray:
    """Strokes [S, P, 2] after the affine change that brings them nearest to the others, point by point."""
    points = ours.reshape(-1, 2)
    homogeneous = np.column_stack([points, np.ones(len(points))])
    change, *_ = np.linalg.lstsq(homogeneous, models.reshape(-1, 2), rcond=None)
    return (homogeneous @ change).reshape(ours.shape)


def warped(ours: np.ndarray, models: np.ndarray) -> float:
    """Dynamic time warping of each stroke, the mean distance along its path; the mean of all strokes."""
    return float(np.mean([warp(a, b) for a, b in zip(ours, models, strict=True)]))


def warp(a: np.ndarray, b: np.ndarray) -> float:
    """Mean distance of points [P, 2] along the best monotone pairing."""
    away = np.linalg.norm(a[:, None] - b[None], axis=-1)
    total = np.full((len(a) + 1, len(b) + 1), np.inf)
    length = np.zeros(total.shape)
    total[0, 0] = 0
    for i in range(1, len(a) + 1):
        for j in range(1, len(b) + 1):
            k = min(((i - 1, j - 1), (i - 1, j), (i, j - 1)), key=lambda at: total[at])
            total[i, j], length[i, j] = total[k] + away[i - 1, j - 1], length[k] + 1
    return total[-1, -1] / length[-1, -1]


if __name__ == "__main__":
    start(lambda: main(parse_flags(EvaluateConfig, __doc__.split("\n\n")[0])))
