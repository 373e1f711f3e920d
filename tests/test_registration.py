"""Registration: strokes that were moved are found again, and what is wrong does not pass."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from train import brush, registration
from train.data.strokes import Character, Stroke, resample
from train.registration import Fit, Plan, coverage, depths, fit, own_part, problems, together


def line(*points: tuple[float, float], width: float = 0.08) -> Stroke:
    return Stroke(resample(np.array(points, np.float32), 20), np.full(20, width, np.float32))


@pytest.fixture
def ten() -> Character:
    return Character("十", "", [line((0.15, 0.45), (0.85, 0.45)), line((0.5, 0.1), (0.5, 0.9))])


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registration, "STEPS", (40, 30, 30, 30))
    monkeypatch.setattr(registration, "SIDES", (24, 24, 32, 32))


def test_depths_of_a_line() -> None:
    points, widths = torch.tensor([[[0.2, 0.5], [0.8, 0.5]]]), torch.tensor([[0.1, 0.2]])
    found = depths(points, widths, torch.tensor([[0.2, 0.5], [0.5, 0.5], [0.8, 0.6], [0.9, 0.5], [0.5, 0.9]]))
    assert torch.allclose(found[0], torch.tensor([0.05, 0.075, 0.0, 0.0, -0.325]), atol=1e-3)


def test_the_renderer_has_gradients() -> None:
    points = torch.tensor([[[0.2, 0.5], [0.8, 0.5]]], requires_grad=True)
    together(coverage(points, torch.full((1, 2), 0.1), 16)).mean().backward()
    assert points.grad.isfinite().all() and points.grad.abs().max() > 0


def test_moved_strokes_are_found(ten: Character, quick: None) -> None:
    moved = Character("十", "", [line((0.2, 0.5), (0.9, 0.42)), line((0.55, 0.15), (0.5, 0.95))])
    found = fit(brush.write(moved, 64), ten)
    assert not problems(found) and found.iou > 0.85 and found.unreached < 0.01
    for stroke, wanted in zip(found.strokes, moved.strokes, strict=True):
        assert abs(stroke.points - wanted.points).mean() < 0.03
        assert abs(stroke.widths.mean() - 0.08) < 0.02


def test_the_same_picture_the_same_strokes(ten: Character, quick: None) -> None:
    ink = brush.write(ten, 48)
    one, same = fit(ink, ten), fit(ink, ten)
    assert all(np.array_equal(a.points, b.points) for a, b in zip(one.strokes, same.strokes, strict=True))


def test_another_character_does_not_pass(quick: None) -> None:
    three = Character("三", "", [line((0.2, y), (0.8, y)) for y in (0.2, 0.5, 0.8)])
    ring = np.zeros((64, 64), np.float32)
    ring[8:56, 8:14] = ring[8:56, 50:56] = 1
    assert problems(fit(ring, three))


GOOD = Fit([], 0.9, [0.9], [1.0], [5.0], [0.0], 0.0)


@pytest.mark.parametrize("wrong, words", [
    ({"iou": 0.5}, "overlap 0.50"),
    ({"shares": [0.3]}, "stroke 1: only 30% of it on ink"),
    ({"lengths": [0.2]}, "stroke 1: 0.20 times its length"),
    ({"lengths": [2.5]}, "stroke 1: 2.50 times its length"),
    ({"turns": [60.0]}, "stroke 1: turned by 60 degrees"),
    ({"gaps": [0.2]}, "stroke 1: leaves the ink for 0.20"),
    ({"unreached": 0.1}, "10% of the ink is far"),
])  # fmt: skip
def test_each_gate(wrong: dict, words: str) -> None:
    assert not problems(GOOD)
    assert words in problems(GOOD._replace(**wrong))[0]


def test_an_end_that_crosses_paper_to_another_stroke_is_cut_back() -> None:
    on, taken = np.ones(90, bool), np.zeros(90, bool)
    on[10:20] = False
    assert own_part(on, taken) == slice(0, 90)              # its own ink beyond the gap: a dry brush
    taken[:10] = True
    assert own_part(on, taken) == slice(20, 90)
    assert own_part(on[::-1], taken[::-1]) == slice(0, 70)


def test_the_second_plan_is_tried_where_the_first_fails(ten: Character, monkeypatch) -> None:
    tried = []

    def attempt(picture, printed, plan: Plan) -> Fit:
        tried.append(plan)
        return GOOD if len(tried) == 2 else GOOD._replace(iou=0.1)

    monkeypatch.setattr(registration, "attempt", attempt)
    assert fit(np.ones((8, 8), np.float32), ten) is GOOD and tried == list(registration.PLANS)
