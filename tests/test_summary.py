"""data.summary: what is said of a folder before training, that nothing breaks it, and that it stays cheap."""

import dataclasses
import io
import shutil
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from miniclip.image_text import PRESETS
from miniclip.image_text import Preset as TowerPreset
from minidiff.text_to_image import Preset
from train import train_clip, train_diffusion
from train.data import summary as module
from train.data.summary import in_colour, summary
from train.data.table import list_captioned
from train.errors import DataError

DATA = Path(__file__).parent.parent / "data"


def picture(path, mode="L", size=(64, 64), color="black", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color).save(path, **options)


def lines(root, size=64, channels=1):
    found = list_captioned(root)
    return summary(root, [str(p.path) for p in found], {"caption": [p.caption for p in found]}, size,
                   channels)


def line(said, start):
    return next((text.strip() for text in said if text.strip().startswith(start)), None)


def warnings(said):
    return [text.strip() for text in said if "warning:" in text]


def test_the_committed_pictures_are_without_a_warning():
    assert lines(DATA / "calligraphy") == [
        "data: 20 pictures", "  sizes: 128 x 128; read as 64 x 64",
        "  colours: 0 in colour, 20 grey", "  captions (caption): 20 different, each once"]


@pytest.fixture
def mixed(tmp_path):
    tmp_path = tmp_path / "data"
    for i in range(3):
        picture(tmp_path / "red" / f"{i}.png", "RGB", (100 + i, 80), (200, 10, 10 + i))
    picture(tmp_path / "ink" / "grey.jpg", "RGB", (128, 128), (90, 90, 90))
    picture(tmp_path / "ink" / "small.png", size=(20, 31))
    picture(tmp_path / "ink" / "scroll.png", size=(64, 129))
    shutil.copy(tmp_path / "red" / "0.png", tmp_path / "ink" / "twin.png")
    (tmp_path / "ink" / "broken.png").write_bytes(b"no picture")
    for name in ("a.HEIC", "b.heic", "notes.txt", "plain", ".hidden"):
        (tmp_path / "ink" / name).write_bytes(b"x")
    return tmp_path


def test_what_is_said_of_a_mixed_folder(mixed):
    said = lines(mixed)
    assert said[0] == "data: 8 pictures"
    sizes = "sizes: 20 x 31 to 128 x 128; read as 64 x 64, all of each, with white at the sides"
    assert line(said, "sizes") == sizes
    assert line(said, "colours") == "colours: 4 in colour, 3 grey"
    assert line(said, "left out") == "left out: 2 .heic, 1 .txt, 1 without ending"
    counted = "captions (caption): 2 different, most often 'ink' (5), least often 'red' (3)"
    assert line(said, "captions") == counted
    small, long, grey, twin, bad, heic = warnings(said)
    assert "1 picture to be enlarged more than twice" in small and "--size" in small
    assert "1 picture with one side more than twice" in long
    assert "4 pictures in colour, to be trained as grey; --channels 3" in grey
    assert "1 picture the same as another, byte for byte: red/0.png = ink/twin.png" in twin
    assert "1 picture cannot be read" in bad and "broken.png" in bad
    assert "2 .heic cannot be read; save as JPEG or PNG" in heic
    assert not any("grey;" in text for text in warnings(lines(mixed, channels=3)))


def test_a_table_leaves_out_what_it_does_not_name(tmp_path):
    for i in range(4):
        picture(tmp_path / f"{i}.png")
    text = "file,caption\n0.png,one\n0.png,another\nsub/../1.png,one\n"
    (tmp_path / "sub").mkdir()
    (tmp_path / "captions.csv").write_text(text, encoding="utf-8")
    said = lines(tmp_path)
    assert said[0] == "data: 2 pictures in 3 rows"
    assert line(said, "left out") == "left out: 2 .png not in captions.csv"
    assert line(said, "captions").endswith("most often 'one' (2), least often 'another' (1)")


@pytest.mark.parametrize("mode, color, answer", [
    ("RGB", (90, 90, 90), False), ("RGB", (100, 90, 95), False), ("RGB", (200, 90, 90), True),
    ("L", 7, False),
    ("RGBA", (255, 0, 0, 0), False), ("RGBA", (255, 0, 0, 255), True), ("CMYK", (0, 255, 0, 0), True),
    ("1", 1, False), ("I;16", 700, False),
])
def test_what_counts_as_colour(mode, color, answer):
    assert in_colour(Image.new(mode, (50, 40), color)) is answer


def test_a_red_seal_counts_and_a_speck_does_not():
    for side, answer in ((8, True), (2, False)):
        image = Image.new("RGB", (100, 100), "white")
        image.paste((200, 20, 20), (10, 10, 10 + side, 10 + side))
        assert in_colour(image) is answer


def test_no_broken_file_breaks_it(tmp_path):
    """What training refuses too, and more: cut off, changed, gone, a folder, of no pixels."""
    out = io.BytesIO()
    Image.frombytes("RGB", (64, 64), bytes(torch.randint(0, 256, (12288,),
                                                         dtype=torch.uint8).tolist())).save(out, "JPEG")
    for i, raw in enumerate(out.getvalue()[:n] for n in (0, 3, 20, 300, 700)):
        (tmp_path / f"{i}.jpg").write_bytes(raw)
    picture(tmp_path / "f.tif", "F")
    (tmp_path / "folder.png").mkdir()
    files = sorted(map(str, tmp_path.iterdir())) + [str(tmp_path / "gone\n.png")]
    said = summary(tmp_path, files, {"caption": ["x"] * len(files)}, 64, 1)
    assert f"warning: {len(files)} pictures cannot be read" in line(said, "warning")
    assert not line(said, "colours")
    assert all("\n" not in text for text in said)


def test_large_data_is_sampled_and_says_so(tmp_path, monkeypatch):
    for i in range(12):
        picture(tmp_path / ("a" if i < 6 else "b") / f"{i}.png", "RGB", (70, 70), "red" if i < 6 else "grey")
        (tmp_path / ("a" if i < 6 else "b") / "notes.txt").write_bytes(b"x")
    for name, value in (("LOOK", 6), ("PIXELS", 3 * 70 * 70), ("NAMES", 5)):
        monkeypatch.setattr(module, name, value)
    said = lines(tmp_path)
    assert said[0] == ("data: 12 pictures; sizes, colours, copies and broken files are those of 6 of them, "
                       "evenly spaced")
    assert line(said, "colours") in ("colours: 1 in colour, 2 grey (3 decoded)",
                                     "colours: 2 in colour, 1 grey (3 decoded)")
    assert line(said, "left out") == "left out: 1 .txt (of the first 7 files)"
    assert len([text for text in warnings(said) if "the same as another" in text]) == 1
    monkeypatch.setattr(module, "BYTES", 0)
    assert not any("the same" in text for text in lines(tmp_path))


def test_two_hundred_thousand_pictures_take_a_second_or_two(tmp_path):
    """Stands in for them with names of one file: every name is counted, 2,000 are opened."""
    picture(tmp_path / "a" / "0.png", "RGB")
    files = [str(tmp_path / "a" / "0.png")] + [str(tmp_path / "a" / f"{i}.png") for i in range(1, 200_000)]
    opened, began = [], time.process_time()
    look_at = module.look_at
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "look_at", lambda file, left: opened.append(file) or look_at(files[0], left))
        said = summary(tmp_path, files, {"caption": [f"{i % 99}" for i in range(200_000)]}, 64, 1)
    assert time.process_time() - began < 4 and len(opened) == module.LOOK == 2_000
    assert said[0].startswith("data: 200,000 pictures; ")
    assert line(said, "captions").startswith("captions (caption): 99 ")


# ----------------------------------------------------------------------------------------- in the two scripts


def test_both_scripts_say_it_once_before_they_train(mixed, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(train_diffusion.PRESETS, "tiny", Preset((8, 16), (False, True), 1, 32, 1))
    monkeypatch.setitem(PRESETS, "tiny", TowerPreset("resnet", 8, (1, 1, 1, 1), 0, 64, 1, 64))
    common = dict(data=str(mixed), size=32, steps=1, batch=4, device="cpu", stream=True)
    diffusion = train_diffusion.TrainConfig(**common, out=str(tmp_path / "a"), samples=0, sample_steps=1)
    train_diffusion.main(diffusion)
    said = capsys.readouterr().out
    assert said.count("data: 8 pictures\n") == 1
    assert said.index("left out: 2 .heic") < said.index("parameters")
    assert "4 pictures in colour, to be trained as grey" in said
    train_clip.main(train_clip.TrainConfig(**common, out=str(tmp_path / "b"), checks=0))
    said = capsys.readouterr().out
    assert said.count("data: 8 pictures\n") == 1
    assert said.index("left out: 2 .heic") < said.index("parameters")
    assert "trained as grey" not in said
    # which is what it ends with, and says first
    with pytest.raises(DataError, match="broken.png"):
        train_diffusion.main(dataclasses.replace(diffusion, stream=False, overwrite=True))
    assert "1 picture cannot be read" in capsys.readouterr().out
