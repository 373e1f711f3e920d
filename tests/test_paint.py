"""Writing into a painting: what changes and what does not, room, contrast, seal, animation, own files."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from train.composition import Seal, compose, finished, fitted_ink, grid_of, order, places, write_on
from train.data.image import read_whole
from train.errors import DataError, UserError
from train.ink import blur, lightness
from train.landscape import landscape
from train.paint import PaintConfig, animation, appearing, inks_of, main
from train.placement import EMPTIEST, busyness, emptiest, window_means
from train.seal import CUTS, stamp

ROOT = Path(__file__).parent.parent
SET = ROOT / "data" / "calligraphy"


@pytest.fixture(scope="module")
def inks() -> list[np.ndarray]:
    return [stages[-1] for stages in inks_of(str(SET), "春滿乾坤", "楷書", 0)]


def paintings() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    ramp = np.linspace(0, 255, 300).astype(np.uint8)
    board = (np.add.outer(np.arange(300) // 20, np.arange(300) // 20) % 2 * 230 + 10).astype(np.uint8)
    return {"landscape": landscape(360, 240, 1), "white": np.full((3, 200, 300), 255, np.uint8),
            "black": np.zeros((3, 200, 300), np.uint8), "dusk": np.full((3, 300, 300), 90, np.uint8),
            "ramp": np.broadcast_to(ramp, (3, 300, 300)).copy(), "board": np.stack([board] * 3),
            "noise": rng.integers(0, 256, (3, 300, 300)).astype(np.uint8),
            "tall": np.full((3, 700, 64), 200, np.uint8), "wide": np.full((3, 64, 700), 200, np.uint8),
            "small": np.full((3, 64, 64), 180, np.uint8)}


@pytest.mark.parametrize("name", paintings())
def test_outside_of_ink_halo_and_seal_nothing_changes(name: str, inks: list[np.ndarray]) -> None:
    painting = paintings()[name]
    sheet = write_on(painting, inks, "column", "auto", Seal(inks[2:], CUTS[0]), 5)
    out, mask = finished(painting, sheet), np.zeros(painting.shape[1:], bool)
    h, w = sheet.density.shape
    mask[sheet.y:sheet.y + h, sheet.x:sheet.x + w] = sheet.touched
    assert (out[:, ~mask] == painting[:, ~mask]).all()
    assert (out != painting).any() and mask.mean() < 0.9
    again = compose(painting, inks, "column", "auto", Seal(inks[2:], CUTS[0]), 5)
    assert (out == again).all()
    touched, (height, width) = sheet.touched, painting.shape[1:]
    for edge, at_edge in ((touched[0], sheet.y == 0), (touched[-1], sheet.y + h == height),
                          (touched[:, 0], sheet.x == 0), (touched[:, -1], sheet.x + w == width)):
        assert at_edge or not edge.any()                                # no halo is cut off


@pytest.mark.parametrize("name", ["landscape", "white", "black", "dusk", "ramp", "board", "noise"])
def test_ink_is_45_darker_than_the_paper_around_it(name: str, inks: list[np.ndarray]) -> None:
    painting = paintings()[name]
    sheet = write_on(painting, inks, "column", "auto", None, 5)
    tones = lightness(finished(painting, sheet).astype(np.float32) / 255)
    for cell, ink in zip(sheet.cells, inks, strict=True):
        part = tones[cell.y:cell.y + cell.side, cell.x:cell.x + cell.side]
        core = fitted_ink(ink, cell.side) > 0.8
        around = blur((fitted_ink(ink, cell.side) > 0.1).astype(np.float32), 1.5)
        ring = (around > 0.001) & (around < 0.05)
        assert np.median(part[ring]) - np.median(part[core]) >= 45


def test_no_halo_on_light_calm_paper_and_one_on_dark(inks: list[np.ndarray]) -> None:
    assert write_on(paintings()["white"], inks, "column", "auto", None, 5).halo.max() == 0
    assert write_on(paintings()["black"], inks, "column", "auto", None, 5).halo.max() > 0.5


def test_the_emptiest_place() -> None:
    painting = np.full((3, 200, 300), 210, np.uint8)
    painting[:, :, 150:] = np.random.default_rng(0).integers(0, 256, (3, 200, 150))
    x, y, emptier = emptiest(painting, 120, 40, 8)
    assert x + 40 <= 150 and y < 40 and emptier <= EMPTIEST
    means = window_means(busyness(painting), 120, 40)
    assert (means < means[y, x]).mean() <= EMPTIEST
    even = emptiest(np.full((3, 200, 300), 210, np.uint8), 120, 40, 8)
    assert even[0] > 200 and even[1] < 20 and even[2] == 0               # nothing to choose: the upper right


def test_window_means() -> None:
    values = np.arange(12.0).reshape(3, 4)
    assert window_means(values, 2, 3).tolist() == [[3, 4], [7, 8]]


def test_columns_and_rows_go_from_right_to_left() -> None:
    assert [grid_of(n, "column") for n in (1, 4, 8, 10, 14, 20, 28)] == [
        (1, 1), (4, 1), (8, 1), (5, 2), (7, 2), (5, 4), (7, 4)]
    assert grid_of(4, "row") == (1, 4)
    assert order(3, 2, 2, "column") == [(0, 0), (1, 0), (0, 1)]
    assert order(3, 2, 2, "row") == [(0, 0), (0, 1), (1, 0)]
    cells, seal, _ = places(np.full((3, 400, 400), 200, np.uint8), 14, "column", "auto", True, 1)
    assert cells[0].x > cells[7].x and cells[0].y == cells[7].y < cells[1].y
    assert seal.y > cells[-1].y + cells[-1].side and seal.side < cells[-1].side


@pytest.mark.parametrize("place, words", [("here", "x,y in pixels"), ("1,2,3", "x,y in pixels"),
                                          ("390,0", "x is at most"), ("-1,0", "x is at most")])
def test_places_that_cannot_be(place: str, words: str, inks: list[np.ndarray]) -> None:
    with pytest.raises(UserError, match=words):
        compose(np.full((3, 400, 400), 200, np.uint8), inks, place=place)


def test_a_given_place(inks: list[np.ndarray]) -> None:
    sheet = write_on(np.full((3, 400, 400), 200, np.uint8), inks, "column", "30,20", None, 0)
    assert sheet.cells[0][:2] == (30, 20) and sheet.emptier is None


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_a_seal_is_red_where_it_should_be(count: int, inks: list[np.ndarray]) -> None:
    red, white = (stamp(inks[:count], 80, cut, np.random.default_rng(1)) for cut in CUTS)
    assert red.shape == (80, 80) and 0 <= red.min() and red.max() <= 1
    assert 0.1 < red.mean() < 0.6 < white.mean() + 0.2
    assert white.mean() > red.mean() and red[2:5, 20:60].mean() > 0.4 and red[9:12, 35:45].mean() < 0.6


def test_an_ink_of_any_size() -> None:
    ink = np.zeros((32, 32), np.float32)
    ink[8:24, 8:24] = 1
    for side in (1, 10, 32, 200):
        assert fitted_ink(ink, side).shape == (side, side)
    grown = fitted_ink(ink, 320)
    assert ((grown > 0.1) & (grown < 0.9)).mean() < 0.03                 # its edge stays sharp


# -------------------------------------------------------------------------------------------------- animation


@pytest.mark.parametrize("name", ["landscape", "black", "noise"])
def test_the_animation_only_adds_ink_and_ends_with_the_still(name: str, inks: list[np.ndarray]) -> None:
    painting = paintings()[name]
    sheet = write_on(painting, inks, "column", "auto", Seal(inks[2:], CUTS[1]), 5)
    data = animation(painting, sheet, [appearing(ink) for ink in inks])
    assert len(data) <= 200 * 2**10
    frames = []
    with Image.open(io.BytesIO(data)) as image:
        for i in range(image.n_frames):
            image.seek(i)
            frames.append(np.asarray(image.convert("RGB")).astype(float))
    tones = [frame @ (0.299, 0.587, 0.114) for frame in frames]
    assert len(frames) > 20
    for before, after in zip(tones[:-2], tones[1:-1], strict=True):
        assert (after <= before + 1e-6).all()
    still = Image.fromarray(finished(painting, sheet).transpose(1, 2, 0))
    still = np.asarray(still.resize(image.size, Image.Resampling.BOX))
    assert np.abs(frames[-1] - still).mean() < (25 if name == "noise" else 4)   # 64 colours are few
    assert (np.diff([tone.mean() for tone in tones[:-1]]) <= 1e-9).all()


def test_stages_grow(inks: list[np.ndarray]) -> None:
    stages = appearing(inks[0])
    assert all((a <= b + 1e-6).all() for a, b in zip(stages, stages[1:], strict=False))
    assert (stages[-1] == inks[0]).all() and stages[0].sum() < 0.2 * inks[0].sum()


# ---------------------------------------------------------------------------------------------------- command


def config(tmp_path: Path, **flags) -> PaintConfig:
    return dataclasses.replace(PaintConfig(run=str(SET), width=160, height=240, out=str(tmp_path)), **flags)


def test_the_command_and_the_same_seed_the_same_bytes(tmp_path: Path, capsys) -> None:
    for folder in ("a", "b"):
        main(config(tmp_path / folder, seal="乾坤", animate=True, seed=3))
    for name in ("painting-3.png", "painting-3.gif"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert "of the places are emptier" in capsys.readouterr().out


def test_a_diffusion_run_writes_too(tmp_path: Path) -> None:
    run = ROOT / "tests" / "fixtures" / "run_diffusion"
    main(config(tmp_path, run=str(run), text="春滿", layout="row"))
    assert (tmp_path / "painting-0.png").exists()
    with pytest.raises(UserError, match="never saw 天"):
        main(config(tmp_path, run=str(run), text="天"))


@pytest.mark.parametrize("flags, words", [
    ({"text": ""}, "--text"), ({"text": "春 滿"}, "without spaces"), ({"text": "春" * 57}, "1 to 56"),
    ({"text": "天"}, "no picture of 天"), ({"hand": "隸書"}, "no picture of 春 隸書"),
    ({"seal": "春" * 5}, "at most 4"), ({"run": "nowhere"}, "neither a run"),
    ({"layout": "ring"}, "one of column, row"), ({"scale": 0.0}, "--scale"),
])  # fmt: skip
def test_what_cannot_be_is_one_line(flags: dict, words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words) as caught:
        main(config(tmp_path, **flags))
    assert len(str(caught.value)) < 400 and "\n" not in str(caught.value)


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "CMYK", "I;16"])
def test_a_painting_of_any_mode(mode: str, tmp_path: Path) -> None:
    image = Image.new("L", (150, 100), 200)
    image = Image.fromarray(np.full((100, 150), 50000, np.uint16)) if mode == "I;16" else image.convert(mode)
    image.save(tmp_path / "own.tif")
    main(config(tmp_path, onto=str(tmp_path / "own.tif"), text="春"))
    with Image.open(tmp_path / "painting-0.png") as written:
        assert written.size == (150, 100) and written.mode == "RGB"


def test_a_painting_is_turned_as_its_exif_says(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (150, 100), "white").save(tmp_path / "own.jpg", exif=exif)
    assert read_whole(tmp_path / "own.jpg", 3).shape == (3, 150, 100)


def test_paintings_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"0" * 40)
    Image.new("L", (63, 200)).save(tmp_path / "narrow.png")
    Image.new("L", (8193, 64)).save(tmp_path / "long.png")
    Image.new("1", (8300, 8300)).save(tmp_path / "huge.png")
    for name, words in (("broken", "picture"), ("narrow", "64 to 8192"), ("long", "64 to 8192"),
                        ("huge", "pixels"), ("missing", "cannot be read")):
        with pytest.raises(DataError, match=words):
            main(config(tmp_path, onto=str(tmp_path / f"{name}.png")))
