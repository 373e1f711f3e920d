"""Files of strokes: what is read, to which numbers, and that whatever is hostile ends in one line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from train.data.strokes import (
    Character,
    Outlined,
    Stroke,
    centred,
    inside,
    polygon,
    read_character,
    read_kai,
    read_outlined,
    resample,
    write_character,
)
from train.errors import DataError

STROKES = Path(__file__).parent.parent / "data" / "strokes"
SQUARE = "M 0 900 L 1024 900 L 1024 800 L 0 800 Z"


def hanzi(tmp_path: Path, **changes) -> Path:
    path = tmp_path / "一.json"
    values = {"strokes": [SQUARE], "medians": [[[100, 850], [900, 850]]], **changes}
    path.write_text(json.dumps(values), encoding="utf-8")
    return path


@pytest.mark.parametrize("char, count", [("春", 9), ("滿", 14), ("乾", 11), ("坤", 8)])
def test_the_committed_characters(char: str, count: int) -> None:
    character = read_kai(STROKES / f"{char}.json")
    assert character.char == char and len(character.strokes) == count
    for stroke in character.strokes:
        assert stroke.points.dtype == stroke.widths.dtype == np.float32
        assert stroke.points.min() > 0 and stroke.points.max() < 1
        assert 0 < stroke.widths.min() and 0.02 < stroke.widths.max() < 0.2


def test_the_first_stroke_of_spring_is_its_upper_horizontal() -> None:
    first = read_kai(STROKES / "春.json").strokes[0].points
    assert first[0, 0] < 0.4 < 0.6 < first[-1, 0] and (first[:, 1] < 0.25).all()


def test_units_become_boxes_and_y_points_down(tmp_path: Path) -> None:
    (stroke,) = read_outlined(hanzi(tmp_path))
    assert np.allclose(stroke.median, [[100 / 1024, 50 / 1024], [900 / 1024, 50 / 1024]])
    assert np.allclose(stroke.outline[0], [0, 0]) and np.allclose(stroke.outline[2], [1, 100 / 1024])


def test_a_median_moves_to_the_middle_and_gets_the_width() -> None:
    bar = np.array([[0, 0.4], [1, 0.4], [1, 0.5], [0, 0.5]], np.float32)
    stroke = centred(Outlined(np.array([[0.1, 0.43], [0.9, 0.43]], np.float32), bar))
    middle = slice(6, -6)
    assert np.allclose(stroke.points[middle, 1], 0.45, atol=0.005)
    assert np.allclose(stroke.widths[middle], 0.1, atol=0.01)


def test_curves_end_where_they_should() -> None:
    corners = polygon("M 0 0 Q 100 200 200 0 C 200 -50 100 -50 0 0 Z", "here")
    assert [200.0, 0.0] in corners.tolist() and corners[:, 1].max() == 100
    assert corners.shape == (1 + 8 + 8, 2)       # Z closes it without a corner of its own


def test_resampling_keeps_ends_and_equal_steps() -> None:
    line = resample(np.array([[0, 0], [1, 0], [1, 3]], np.float32), 9)
    assert line.shape == (9, 2) and line[-1].tolist() == [1, 3]
    assert np.allclose(np.linalg.norm(np.diff(line, axis=0), axis=1), 0.5)


def test_inside() -> None:
    square = np.array([[0, 0], [1, 0], [1, 1], [0, 1]], float)
    assert inside(square, np.array([[0.5, 0.5], [1.5, 0.5], [0.5, -0.1]])).tolist() == [True, False, False]


def test_written_and_read_again(tmp_path: Path) -> None:
    stroke = Stroke(np.array([[0.1, 0.2], [0.5, 0.25]], np.float32), np.array([0.05, 0.1], np.float32))
    write_character(Character("一", "楷書", [stroke, stroke]), tmp_path / "a.json", notice="changed")
    again = read_character(tmp_path / "a.json")
    assert again.char == "一" and again.hand == "楷書" and len(again.strokes) == 2
    assert np.allclose(again.strokes[1].points, stroke.points)
    assert json.loads((tmp_path / "a.json").read_text("utf-8"))["notice"] == "changed"


def test_what_is_committed_of_the_hands_is_read_and_has_its_notice() -> None:
    paths = list(STROKES.glob("*/*.json"))
    assert len(paths) >= 8
    for path in paths:
        character = read_character(path)
        assert (character.char, character.hand) == (path.stem, path.parent.name)
        assert len(character.strokes) == len(read_outlined(STROKES / path.name))
        assert "Arphic" in json.loads(path.read_text("utf-8"))["notice"]


@pytest.mark.parametrize("changes, words", [
    ({"strokes": []}, "strokes must be a list of 1 to 64"),
    ({"strokes": [SQUARE] * 65}, "strokes must be"),
    ({"medians": {}}, "medians must be"),
    ({"medians": [[[1, 2], [3, 4]]] * 2}, "1 outlines but 2 medians"),
    ({"medians": [[[1, 2]]]}, "2 to 512 points"),
    ({"medians": [[[1, 2]] * 513]}, "2 to 512 points"),
    ({"medians": [[[1, 2], [1, 2]]]}, "all of its points are one"),
    ({"medians": [[[1, 2], [1, 2, 3]]]}, r"a point must be \[x, y\]"),
    ({"medians": [[[1, True], [1, 2]]]}, "True is not a number"),
    ({"medians": [[[1, "2"], [1, 2]]]}, "2 is not a number"),
    ({"medians": [[[1, float("nan")], [1, 2]]]}, "nan is not a number"),
    ({"medians": [[[1, float("inf")], [1, 2]]]}, "inf is not a number"),
    ({"medians": [[[1, 10 ** 39], [1, 2]]]}, "is not a number from -1024 to 2048"),
    ({"strokes": [7]}, "must be a text"),
    ({"strokes": ["M 0 0 " + "L 1 1 " * 5000 + "Z"]}, "at most 20000 characters"),
    ({"strokes": [""]}, "must be M"),
    ({"strokes": ["M 0 0 L 5 5"]}, "must be M"),
    ({"strokes": ["m 0 0 l 5 5 z"]}, "must be M"),
    ({"strokes": ["M 0 0 A 1 1 0 0 0 5 5 Z"]}, "must be M"),
    ({"strokes": ["M 0 0 L 5 Z"]}, "L out of place"),
    ({"strokes": ["M 0 0 L 5 5 6 6 Z"]}, "6 out of place"),
    ({"strokes": ["M 0 0 L 5 5 Z M 1 1 Z"]}, "Z out of place"),
    ({"strokes": ["M 0 0 L 9e9 5 Z"]}, "not a number from"),
    ({"strokes": ["M 0 0 L " + "9" * 400 + " 5 Z"]}, "not a number from"),
])  # fmt: skip
def test_hostile_files_are_one_line(changes: dict, words: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=words) as error:
        read_outlined(hanzi(tmp_path, **changes))
    assert "一.json" in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 400


@pytest.mark.parametrize("values, words", [
    ({"char": "春春", "hand": ""}, "char must be one character"),
    ({"hand": 5}, "char must be one character"),
    ({"strokes": [5]}, "must be an object"),
    ({"strokes": [{"points": [[0, 0], [1, 1]], "widths": [0.1]}]}, "2 points need a list of as many widths"),
    ({"strokes": [{"points": [[0, 0], [9, 1]], "widths": [0.1, 0.1]}]}, "9 is not a number from -1 to 2"),
    ({"strokes": [{"points": [[0, 0], [1, 1]], "widths": [0.1, -1]}]}, "-1 is not a number from 0 to 1"),
])  # fmt: skip
def test_hostile_files_of_ours_are_one_line(values: dict, words: str, tmp_path: Path) -> None:
    good = {"char": "春", "hand": "", "strokes": [{"points": [[0, 0], [1, 1]], "widths": [0.1, 0.1]}]}
    path = tmp_path / "a.json"
    path.write_text(json.dumps({**good, **values}), encoding="utf-8")
    with pytest.raises(DataError, match=words):
        read_character(path)


def test_a_name_that_is_no_character(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="must be the one character"):
        read_kai(hanzi(tmp_path).rename(tmp_path / "abc.json"))
