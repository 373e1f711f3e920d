"""The brush: where its ink lies, that it is the same again, and when it arrives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from train import brush
from train.data.strokes import Character, Stroke, read_kai, resample

STROKES = Path(__file__).parent.parent / "data" / "strokes"


def bar(length: float = 0.6, width: float = 0.1) -> Stroke:
    points = np.array([[0.2, 0.5], [0.2 + length, 0.5]], np.float32)
    return Stroke(resample(points, 12), np.full(12, width, np.float32))


def bent() -> Stroke:
    points = np.array([[0.2, 0.2], [0.8, 0.2], [0.8, 0.8]], np.float32)
    return Stroke(resample(points, 21), np.full(21, 0.1, np.float32))


def test_a_bar_is_as_wide_as_its_data() -> None:
    ink = brush.layer(bar(0.3), 200)
    assert ink.dtype == np.float32 and ink.shape == (200, 200) and 0 <= ink.min() and ink.max() <= 1
    across = (ink[:, 55:85] > 0.5).sum(0)
    assert abs(across.mean() - 20) < 2 and across.std() > 0         # 0.1 of 200 pixels, unevenly


def test_it_is_slanted_where_it_touches_down() -> None:
    ink = brush.layer(bar(0.3, 0.15), 200) > 0.5
    begins = [row.argmax() for row in ink[88:112:23]]
    assert begins[0] < begins[-1]                                   # the upper edge begins farther left


def test_ink_pools_where_it_stops() -> None:
    pools = brush.pools(bar(), 100)
    assert pools[50, 20] > 0.9 and pools[50, 50] < 0.05 and pools[50, 79] > 0.9


def test_a_lifted_end_does_not_pool() -> None:
    lifted = bar()._replace(widths=np.linspace(0.1, 0.005, 12).astype(np.float32))
    assert brush.pools(lifted, 100)[50, 79] < 0.05


def test_a_corner_is_found_and_a_curve_is_none() -> None:
    points, widths = brush.fine(bent())
    (corner,) = brush.corners(points, widths)
    assert np.allclose(points[corner], [0.8, 0.2], atol=0.04)
    angle = np.linspace(0, np.pi, 30)
    arc = np.stack([0.5 + 0.4 * np.cos(angle), 0.5 - 0.4 * np.sin(angle)], 1).astype(np.float32)
    assert not brush.corners(*brush.fine(Stroke(arc, np.full(30, 0.06, np.float32))))


def test_long_strokes_run_dry_and_dots_do_not() -> None:
    assert sum(len(brush.marks(bar(0.75, 0.05), seed).paper) for seed in range(5)) > 5
    assert not brush.marks(bar(0.2)).paper


def area(polygon: np.ndarray) -> float:
    (x, y), (nx, ny) = polygon.T, np.roll(polygon, -1, axis=0).T
    return float((x * ny - nx * y).sum() / 2)


@pytest.mark.parametrize("char", "春滿乾坤")
def test_ink_winds_one_way_and_paper_the_other(char: str) -> None:
    for k, stroke in enumerate(read_kai(STROKES / f"{char}.json").strokes):
        shape = brush.marks(stroke, k)
        signs = {np.sign(area(p)) for p in shape.ink}
        assert len(signs) == 1 and {np.sign(area(p)) for p in shape.paper} <= {-s for s in signs}


def test_no_edge_crosses_itself_in_a_loop() -> None:
    loop = np.array([[0, 0], [4, 0], [4, 2], [5, 1], [4.5, 2.2], [3, 1.5], [0, 4], [-1, 3], [-1, 2], [-1, 1]])
    edge = np.concatenate([np.linspace(a, b, 4, endpoint=False)
                           for a, b in zip(loop, np.roll(loop, -1, axis=0))])
    assert len(brush.without_loops(edge)) < len(edge)
    square = np.array([[0, 0], [1, 0], [1, 1], [0, 1]], float)
    assert len(brush.without_loops(np.repeat(square, 1, 0))) == 4


def test_the_same_seed_the_same_ink() -> None:
    character = Character("一", "", [bar()])
    one, same, other = (brush.write(character, 64, seed) for seed in (1, 1, 2))
    assert np.array_equal(one, same) and not np.array_equal(one, other)


def test_larger_is_the_same_shape() -> None:
    small, large = brush.layer(bent(), 64), brush.layer(bent(), 256)
    assert abs(small - large.reshape(64, 4, 64, 4).mean((1, 3))).mean() < 0.01


def test_the_brush_arrives_from_start_to_end() -> None:
    when, edge = brush.arrival(bar(), brush.centres(50, 50))
    assert (np.diff(when[25, 10:40]) >= 0).all() and when[25, 11] < 0.1 and when[25, 39] > 0.85
    assert edge[25, 25] < 0 < edge[5, 25] and abs(edge[5, 25] - (0.39 - 0.05)) < 0.01


def test_centres_of_a_picture_that_is_not_square() -> None:
    places = brush.centres(2, 4)
    assert places.shape == (2, 4, 2)
    assert np.allclose(places[0, 0], [0.125, 0.375]) and np.allclose(places[1, 3], [0.875, 0.625])
