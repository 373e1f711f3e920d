"""Animations: ink only ever comes, the last frame is the still, and files are small and self-contained."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from train import animate, brush
from train.data.strokes import Character, read_kai

STROKES = Path(__file__).parent.parent / "data" / "strokes"


@pytest.fixture(scope="module")
def full() -> Character:
    return read_kai(STROKES / "滿.json")


@pytest.fixture(scope="module")
def frames(full: Character) -> list[np.ndarray]:
    return animate.animation(full, 256, seed=3)


def test_frames_only_gain_ink_and_end_with_the_still(full: Character, frames: list[np.ndarray]) -> None:
    assert not frames[0].any()
    assert all((after >= before).all() for before, after in zip(frames, frames[1:]))
    assert np.array_equal(frames[-1], brush.write(full, 256, 3))


def test_strokes_come_one_after_the_other(full: Character, frames: list[np.ndarray]) -> None:
    counts, inks = animate.frame_counts(full.strokes), brush.layers(full, 256, 3)
    at = 0
    for k, count in enumerate(counts[:-1]):
        at += count
        assert np.array_equal(frames[at], brush.together(inks[:k + 1]))
        at += animate.LIFTED


def test_the_gif(frames: list[np.ndarray], tmp_path: Path) -> None:
    animate.write_gif(frames, tmp_path / "a.gif")
    assert (tmp_path / "a.gif").stat().st_size < 200 * 1024
    with Image.open(tmp_path / "a.gif") as gif:
        shown = []
        for k in range(gif.n_frames):
            gif.seek(k)
            shown.append(np.asarray(gif.convert("L"), int))
        assert gif.info["duration"] >= animate.HOLD_MS and gif.info["loop"] == 0
    assert all((after <= before).all() for before, after in zip(shown, shown[1:]))
    still = np.asarray(animate.grey(frames[-1]), int)
    assert abs(shown[-1] - still).max() <= 255 / (animate.GREYS - 1) / 2 + 1
    assert (shown[0] == 255).all()


def test_the_same_frames_the_same_bytes(frames: list[np.ndarray], tmp_path: Path) -> None:
    for name in ("a.gif", "b.gif"):
        animate.write_gif(frames[:20], tmp_path / name)
    assert (tmp_path / "a.gif").read_bytes() == (tmp_path / "b.gif").read_bytes()


def test_the_svg_moves_without_script_or_anything_from_outside(full: Character, tmp_path: Path) -> None:
    animate.write_svg(full, tmp_path / "a.svg", seed=3)
    text = (tmp_path / "a.svg").read_text("utf-8")
    root = ElementTree.fromstring(text)
    tags = [element.tag.split("}")[1] for element in root.iter()]
    assert tags.count("animate") == tags.count("clipPath") == 14 and set(tags) == {
        "svg", "rect", "clipPath", "path", "animate"}
    assert "nan" not in text and len(text) < 200_000
    assert re.findall(r'\w+://[^"]*', text) == ["http://www.w3.org/2000/svg"]
    times = [[float(t) for t in e.get("keyTimes").split(";")] for e in root.iter() if e.get("keyTimes")]
    assert all(t == sorted(t) for t in times) and all(a[2] < b[1] for a, b in zip(times, times[1:]))


def test_the_strip_has_a_stage_for_each_stroke(full: Character, tmp_path: Path) -> None:
    animate.write_strip(brush.layers(full, 128), tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as strip:
        assert strip.size == (8 * animate.STAGE, 2 * animate.STAGE)
        first = np.asarray(strip.crop((0, 0, animate.STAGE, animate.STAGE)), int)
    inked = first[first.sum(-1) < 500]
    assert len(inked) and (inked[:, 0] > inked[:, 1] + 40).all()        # the one stroke there is new, so red


def test_a_picture_that_is_not_square(tmp_path: Path) -> None:
    inks = np.zeros((1, 8, 16), np.float32)
    inks[0, 4, 2:14] = 1
    when = np.broadcast_to(np.linspace(0, 1, 16, dtype=np.float32), (1, 8, 16))
    frames = animate.reveal(inks, when, [5])
    assert np.array_equal(frames[-1], inks[0]) and frames[1][4, 2] > 0 and frames[1][4, 13] == 0
    animate.write_gif(frames, tmp_path / "a.gif")
