"""landscape.py and what it is painted with: strokes leave the ink they say, each seed another picture."""

from __future__ import annotations

import numpy as np
import pytest

from train import scenery
from train.brushwork import Strokes, cloud, joined, lay_down, resampled, smoothstep, wave
from train.landscape import SILK, landscape
from train.mountains import Fold, crest_of, massif, paint_fold


def rng() -> np.random.Generator:
    return np.random.default_rng(3)


def test_a_stroke_leaves_as_much_ink_as_its_area() -> None:
    stroke = Strokes(np.array([[[10.0, 20.0], [60.0, 20.0]]]), np.full((1, 2), 8.0), np.full((1, 2), 0.5))
    ink = lay_down((40, 80), stroke, rng())
    assert ink.sum() == pytest.approx(50 * 8 * 0.5, rel=1e-3)
    assert ink[18:22, 20:50] == pytest.approx(0.5, abs=0.12)
    assert not ink[:10].any() and not ink[:, :8].any()


def test_strokes_beyond_the_paper_are_cut() -> None:
    stroke = Strokes(np.array([[[-50.0, 5.0], [500.0, 5.0]]]), np.full((1, 2), 2.0), np.ones((1, 2)))
    ink = lay_down((10, 20), stroke, rng(), dry=0.5)
    assert ink.shape == (10, 20) and np.isfinite(ink).all() and ink.max() > 0


def test_joined_strokes_have_one_number_of_points() -> None:
    parts = [Strokes(np.zeros((2, p, 2)), np.ones((2, p)), np.ones((2, p))) for p in (2, 7)]
    assert joined(parts, 5).points.shape == (4, 5, 2)
    assert resampled(np.array([[0.0, 1.0, 4.0]]), 5).tolist() == [[0, 0.5, 1, 2.5, 4]]


def test_noise_has_its_size_and_spread() -> None:
    field = cloud(rng(), (90, 130), (30, 20))
    assert field.shape == (90, 130) and 0.4 < field.std() < 1.6
    curve = wave(rng(), 200, 5)
    assert curve.shape == (200,) and 0.05 < np.abs(curve).max() < 2.5
    assert smoothstep(0, 2, np.array([-1, 1, 3])).tolist() == [0, 0.5, 1]


def test_a_fold_reaches_its_top_and_fades_before_its_base() -> None:
    fold, layers = Fold(100, 80, 40, 160, 0.5), np.zeros((3, 200, 200), np.float32)
    crest = crest_of(fold, np.arange(20, 180) + 0.5, rng(), 0.2)
    assert crest.min() == pytest.approx(40) and crest.max() <= 175
    paint_fold(layers, fold, rng(), 0.2, 1)
    assert layers[0, :36].max() == 0 and layers[0].max() > 0.2
    assert layers[:, 160:].max() == 0                                   # no hard edge at the foot


def test_folds_come_from_far_to_near() -> None:
    folds = massif(rng(), 100, 80, 20, 150, 0.4, 20)
    assert len(folds) == 27 and min(fold.top for fold in folds) == 20
    assert all(fold.base <= 150.001 and fold.half > 0 for fold in folds)


@pytest.mark.parametrize("kind", "pine willow bare_tree leafy_tree pavilion hut boat geese".split())
def test_scenery_stands_where_it_should(kind: str) -> None:
    layers = np.zeros((3, 300, 300), np.float32)
    scenery.paint_parts(layers, getattr(scenery, kind)(rng(), 150, 220, 120), rng())
    y, x = np.nonzero(layers[0] > 0.05)
    assert len(x) > 20 and np.isfinite(layers).all()
    assert 10 < x.mean() < 290 and 60 < y.min() and y.max() < 250


def test_scenery_outside_of_the_paper_does_nothing() -> None:
    layers = np.zeros((3, 50, 50), np.float32)
    scenery.paint_parts(layers, scenery.pine(rng(), 900, 900, 120), rng())
    assert not layers.any()


@pytest.mark.parametrize("size", [(64, 64), (96, 256), (256, 96), (240, 160)])
def test_every_size_and_the_same_seed_the_same_picture(size: tuple[int, int]) -> None:
    first = landscape(*size, 7)
    assert first.shape == (3, *size) and first.dtype == np.uint8
    assert (first == landscape(*size, 7)).all()
    other = landscape(*size, 8)
    assert np.abs(first.astype(int) - other).mean() > 3


@pytest.mark.parametrize("seed", range(3))
def test_there_is_sky_to_write_in_and_something_below(seed: int) -> None:
    picture = landscape(384, 256, seed).mean(0) / 255
    paper = SILK.mean()
    assert (picture[20:45] > 0.7 * paper).mean() > 0.97
    assert (picture[100:] < 0.6 * paper).mean() > 0.03
