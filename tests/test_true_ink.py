"""Replay: the picture's own ink, stroke by stroke, and what is said of pictures that cannot be."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from train import brush, registration, replay, true_ink
from train.data.strokes import read_kai
from train.errors import DataError, UserError

STROKES = Path(__file__).parent.parent / "data" / "strokes"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registration, "STEPS", (10, 10, 5, 5))
    monkeypatch.setattr(registration, "SIDES", (16, 16, 24, 24))


@pytest.fixture
def earth() -> np.ndarray:
    return brush.write(read_kai(STROKES / "坤.json"), 64)


def test_ink_is_dealt_out_whole(earth: np.ndarray) -> None:
    strokes = read_kai(STROKES / "坤.json").strokes
    owners, when = true_ink.assigned(earth, strokes)
    assert owners.shape == when.shape == (8, 64, 64)
    assert np.array_equal(owners.sum(0), earth) and ((owners > 0).sum(0) <= 1).all()
    rows = brush.layers(read_kai(STROKES / "坤.json"), 64)
    for mine, drawn in zip(owners, rows, strict=True):              # most of each is where it was drawn
        assert (mine * (drawn > 0.5)).sum() > 0.8 * mine.sum()


def test_a_replay_only_gains_ink_and_ends_with_the_picture(earth: np.ndarray, quick: None) -> None:
    frames = true_ink.replay(earth, "坤", STROKES)
    assert all((after >= before).all() for before, after in zip(frames, frames[1:]))
    assert np.array_equal(frames[-1], earth)


def test_a_picture_that_is_not_square(earth: np.ndarray, quick: None) -> None:
    wide = np.pad(earth, ((0, 0), (16, 33)))
    frames = true_ink.replay(wide, "坤", STROKES)
    assert frames[-1].shape == (64, 113) and np.array_equal(frames[-1], wide)


def test_the_command(earth: np.ndarray, tmp_path: Path, quick: None, capsys) -> None:
    Image.fromarray((230 - 200 * earth).astype(np.uint8)).save(tmp_path / "a.png")
    replay.main(replay.ReplayConfig(of=str(tmp_path / "a.png"), char="坤", strokes=str(STROKES),
                                    out=str(tmp_path / "out")))
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"坤.gif", "坤.png", "坤.json", "坤_stages.png"}
    assert "坤: 8 strokes" in capsys.readouterr().out


def test_grey_paper_becomes_none(tmp_path: Path) -> None:
    picture = np.full((80, 80), 220, np.uint8)
    picture[10:20, 10:30] = 30
    Image.fromarray(picture).save(tmp_path / "a.png")
    ink = true_ink.ink_of(tmp_path / "a.png")
    assert ink.dtype == np.float32 and ink[0, 0] == 0 and ink[15, 15] == 1


@pytest.mark.parametrize("picture, words", [
    (np.full((64, 64), 255), "no ink in it"),
    (np.full((64, 64), 0), "no ink in it"),
    (np.pad(np.full((60, 60), 0), 2, constant_values=255), "is dark|no ink"),
])  # fmt: skip
def test_pictures_without_a_character_are_one_line(picture: np.ndarray, words: str, tmp_path: Path) -> None:
    Image.fromarray(picture.astype(np.uint8)).save(tmp_path / "a.png")
    with pytest.raises(DataError, match=words):
        true_ink.ink_of(tmp_path / "a.png")


@pytest.mark.parametrize("char", ["一", "", "春春", "..", "/"])
def test_characters_without_strokes_are_one_line(char: str) -> None:
    with pytest.raises(UserError, match="no strokes of it in .*乾坤春滿"):
        true_ink.printed_strokes(char, STROKES)


def test_large_pictures_are_made_smaller(tmp_path: Path) -> None:
    Image.fromarray(np.pad(np.zeros((300, 300), np.uint8), 500, constant_values=255)).save(tmp_path / "a.png")
    assert true_ink.ink_of(tmp_path / "a.png").shape == (512, 512)
