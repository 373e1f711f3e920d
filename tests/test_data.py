"""data.folder: layouts, captions, every kind of picture, every error as one clear line, and the jitter."""

import csv
import json
import os
import struct
import time
import unicodedata
import zlib
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image

from train.data.augment import jitter
from train.data.folder import CaptionedImages
from train.data.image import read_image
from train.data.table import caption_columns, columns_of, list_captioned, list_indexed
from train.errors import DataError

torch.set_num_threads(1)
DATA = Path(__file__).parent.parent / "data"


def picture(path, mode="L", size=(8, 8), color="black", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color).save(path, **options)
    return path


def table(root, text, encoding="utf-8"):
    root.mkdir(parents=True, exist_ok=True)
    (root / "captions.csv").write_bytes(text.encode(encoding))


def fails(call, *words):
    with pytest.raises(DataError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message


# ----------------------------------------------------------------------------------------- the committed sets

def test_the_20_pictures_and_their_captions():
    folder = CaptionedImages(DATA / "calligraphy", size=64)
    assert len(folder) == len(set(folder.captions)) == 20
    assert folder.captions[:5] == ["春 楷書", "春 行書", "春 草書", "春 行楷", "春 重楷"]
    assert [caption[0] for caption in folder.captions] == [c for c in "春滿乾坤" for _ in range(5)]
    pictures = folder.images()
    assert pictures.shape == (20, 1, 64, 64) and pictures.dtype == torch.float32
    assert pictures.max() == 1 and (pictures.amin((1, 2, 3)) < -0.9).all()     # white paper, black ink
    assert 0.5 < pictures.mean() < 0.9
    assert torch.equal(folder[3][0], pictures[3]) and folder[3][1] == "春 行楷"
    assert torch.cdist(pictures.flatten(1), pictures.flatten(1)).fill_diagonal_(99).min() > 5  # no twins


def test_calligraphy_at_its_own_size_is_untouched():
    folder = CaptionedImages(DATA / "calligraphy", size=128)
    with Image.open(folder.entries[0].path) as image:
        assert bytes(folder._bytes(0).numpy()) == image.tobytes()


def test_calligraphy_table_agrees_with_its_files():
    with open(DATA / "calligraphy" / "captions.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["file", "caption", "character", "hand", "style", "package", "licence"]
    for row in rows:
        assert row["file"] == f"{row['character']}/{row['style']}.png"
        assert row["caption"] == f"{row['character']} {row['hand']}"


def test_the_herbs_in_three_languages():
    assert CaptionedImages(DATA / "herbs", 64, 3, caption_column="zh-Hant").captions[2] == "草藥"
    herbs = CaptionedImages(DATA / "herbs", (32, 48), 3, caption_column="en")
    assert herbs.images().shape == (8, 3, 32, 48) and herbs.captions[0] == "ginger root"
    assert (herbs.images()[:, :, 0, 0] == 1).all()                           # transparent became white


# ---------------------------------------------------------------------------------------------------- layouts

def test_class_folders_sorted_nested_and_nfc(tmp_path):
    picture(tmp_path / "乾" / "二.png")
    picture(tmp_path / "乾" / "一.PNG")
    picture(tmp_path / "fruit" / "red  apple" / "1.jpg").rename(tmp_path / "fruit" / "red  apple" / "1.jfif")
    picture(tmp_path / unicodedata.normalize("NFD", "café") / "1.png")
    picture(tmp_path / "乾" / "._一.png")                                       # what macOS leaves behind
    (tmp_path / "乾" / "notes.txt").write_text("x", encoding="utf-8")
    found = list_captioned(tmp_path)
    assert [p.caption for p in found] == ["café", "fruit red apple", "乾", "乾"]
    assert [p.path.name for p in found][2:] == ["一.PNG", "二.png"]


def test_csv_with_bom_alias_other_column_and_backslashes(tmp_path):
    picture(tmp_path / "圖" / "春.png")
    table(tmp_path, "name,image\n  春   草書 ,圖\\春.png\n\n", "utf-8-sig")
    [found] = list_captioned(tmp_path, "name")
    assert found.caption == "春 草書" and found.path.name == "春.png"


def test_csv_finds_a_name_spelled_in_the_other_normal_form(tmp_path):
    picture(tmp_path / unicodedata.normalize("NFD", "é.png"))
    table(tmp_path, "file,caption\n" + unicodedata.normalize("NFC", "é.png") + ",x\n")
    assert list_captioned(tmp_path)[0].caption == "x"


@pytest.mark.parametrize("text", [
    "file;caption;artist\na.png;red, ripe;x\n", "file\tcaption\na.png\tred, ripe\n",
    'File,Caption\na.png,"red, ripe"\n', 'IMAGE;CAPTION\na.png;"red, ripe"\n',
    "caption;file\nred, ripe;a.png\n",
    # commas give a column `file`: commas it is
    'file,caption;note,caption\na.png,x;y,"red, ripe",\n',
])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_the_header_says_how_a_table_is_split_and_in_which_letters(tmp_path, text, encoding):
    picture(tmp_path / "a.png")
    table(tmp_path, text, encoding)
    [found] = list_captioned(tmp_path)
    assert found.caption == "red, ripe" and found.path.name == "a.png"


def test_a_column_written_just_so_goes_before_one_in_other_letters(tmp_path):
    picture(tmp_path / "a.png")
    table(tmp_path, "File,image,Caption,caption\nno,a.png,no,yes\n")
    assert [(p.path.name, p.caption) for p in list_captioned(tmp_path)] == [("a.png", "yes")]
    assert columns_of(tmp_path) == ["File", "image", "Caption", "caption"]


def test_fields_too_many_that_are_blank_lose_nothing(tmp_path):
    picture(tmp_path / "a.png")
    table(tmp_path, "file,caption\na.png,red,, \n")
    assert list_captioned(tmp_path)[0].caption == "red"


@pytest.mark.parametrize("header, columns", [
    ("file,caption,en", ["caption"]), ("Caption;file;en", ["Caption"]),
    ("image,name,english,shop,", ["name", "english"]),
    ("file,en,Licence,SOURCE", ["en"]), ('file,"a,b",en', ["en"]),
])
def test_which_columns_are_captions(tmp_path, header, columns):
    table(tmp_path, header)
    assert caption_columns(tmp_path, besides="shop") == columns
    assert caption_columns(DATA / "herbs") == ["zh-Hant", "zh-Hans", "en"]
    assert caption_columns(DATA) == ["caption"]                                 # no table
    table(tmp_path, "file,artist")
    fails(lambda: caption_columns(tmp_path), "no column 'caption'", "'artist'")


def test_layout_errors(tmp_path):
    fails(lambda: list_captioned(tmp_path / "no"), "no such folder")
    file = picture(tmp_path / "x.png")
    fails(lambda: list_captioned(file), "x.png", "not a folder")
    fails(lambda: list_captioned(tmp_path), "x.png", "one folder a class", "captions.csv")
    (tmp_path / "empty").mkdir()
    fails(lambda: list_captioned(tmp_path / "empty"), "empty", "no pictures")


@pytest.mark.parametrize("text, words", [
    ("", ["no column 'file'", "none"]),
    ("file,caption\n", ["no rows"]),
    ("path,caption\na.png,x\n", ["no column 'file'", "'path', 'caption'"]),
    ("file,name\na.png,x\n", ["no column 'caption'", "'file', 'name'", "--caption-column"]),
    ("file;name\na.png;x\n", ["no column 'caption'", "'file', 'name'"]),
    ("file,caption\na.png,x\na.png,red, ripe\n",
     ["line 3", "row: 3,", "header: 2;", "a comma in double quotes"]),
    ("caption,file\nred, ripe,a.png\n", ["line 2", "row: 3,", "header: 2;", "double quotes"]),
    ('file,caption\na.png, "red, ripe"\n', ["line 2", "double quotes", "no space before them"]),
    ("file;caption\na.png;red; ripe\n", ["line 2", "row: 3,", "header: 2;", "a semicolon in double quotes"]),
    ("file,caption,artist\na.png\n", ["line 2", "empty 'caption'", "row: 1, columns in the header: 3"]),
    ("file,caption\na.png,x\nb.png,y\n", ["line 3", "b.png"]),
    ("file,caption\na.png, \n", ["line 2", "empty 'caption'", "a.png"]),
    ("file,caption\na.png\n", ["line 2", "empty 'caption'"]),
    ("file,caption\n,x\n", ["line 2", "empty file name"]),
    ("file,caption\n../secret.png,x\n", ["line 2", "../secret.png", "outside"]),
    ("file,caption\n/etc/passwd,x\n", ["line 2", "relative"]),
    ("file,caption\nC:\\x.png,x\n", ["line 2", "relative"]),
    ("file,caption\nsub,x\n", ["line 2", "no such file 'sub'"]),
    ("file,caption\n" + "a" * 5000 + ",x\n", ["line 2"]),
    ("file,caption\na\0.png,x\n", ["captions.csv"]),
    ("file,caption\na.png," + "x" * 200_000 + "\n", ["not a CSV"]),
])
def test_csv_errors_name_the_line_and_the_value(tmp_path, text, words):
    picture(tmp_path / "secret.png")
    picture(tmp_path / "set" / "a.png")
    (tmp_path / "set" / "sub").mkdir()
    table(tmp_path / "set", text)
    fails(lambda: list_captioned(tmp_path / "set"), "captions.csv", *words)


@pytest.mark.parametrize("text, words", [
    ("," * 60_000_000, ["captions.csv: more than 8000000 cells"]),
    ("\t" * 60_000_000, ["captions.csv: more than 8000000 cells"]),
    ("," * 7_999_999, ["line 1: 8000000 columns"]),
    ("x," * 1_000, ["line 1: 1001 columns, the limit is 1000"]),
    ("file,caption\n" + "," * 7_999_000, ["line 2", "empty file name"]),
    ("file,caption\na.png,x\n" + '"\n",' * 7_999_000, ["line"]),
])
def test_a_table_of_nothing_but_commas_costs_little(tmp_path, text, words):
    resource = pytest.importorskip("resource")
    picture(tmp_path / "a.png")
    table(tmp_path, text)
    del text
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    fails(lambda: list_captioned(tmp_path), *words)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500 * 2**10            # KiB
    assert time.process_time() - began < 5


@pytest.mark.parametrize("text", [
    "file,caption\n" + "x" * 100_000 + ",y\n", "file,caption\n/" + "x" * 100_000 + ",y\n",
    ",".join(f"column {i}" * 100 for i in range(900)) + "\n", "file," + "x" * 100_000 + "\na.png,x\n",
    "file,caption\n" + "x" * 100_000 + ",\n", "\0" * 100_000,
])
def test_messages_about_tables_are_short(tmp_path, text):
    picture(tmp_path / "a.png")
    table(tmp_path, text)
    with pytest.raises(DataError) as caught:
        list_captioned(tmp_path)
    message = str(caught.value)
    assert len(message) < 900 and "\n" not in message and "captions.csv" in message


@pytest.mark.parametrize("change", [
    {"pictures": 7}, {"pictures": [1]}, {"pictures": [["a.png"]]}, {"pictures": [["a.png", 3]]},
    {"pictures": [["../secret.png", "x"]]}, {"pictures": [["/etc/passwd", "x"]]},
    {"pictures": [["a.png", ""]]}, {"pictures": [["a\0.png", "x"]]}, {"pictures": None},
    {"pictures": [[["a.png"], "x"]]}, {"made_of": 3},
])
def test_a_list_kept_of_a_table_is_made_anew_if_it_is_damaged(tmp_path, change):
    picture(tmp_path / "set" / "a.png")
    table(tmp_path / "set", "file,caption\na.png,x\n")
    index = tmp_path / "index.json"
    wanted = list_indexed(tmp_path / "set", "caption", index)
    good = index.read_text(encoding="utf-8")
    kept = json.loads(good) | {"pictures": [["a.png", "as the index has it"]]}
    index.write_text(json.dumps(kept), encoding="utf-8")
    assert list_indexed(tmp_path / "set", "caption", index)[0][1] == "as the index has it"
    for damaged in (json.dumps(kept | change), "[]", "{", "", "[" * 99_999, '{"a": ' + "9" * 5000 + "}"):
        index.write_text(damaged, encoding="utf-8")
        assert list_indexed(tmp_path / "set", "caption", index) == wanted
        assert index.read_text(encoding="utf-8") == good


def test_csv_not_in_utf8(tmp_path):
    picture(tmp_path / "a.png")
    table(tmp_path, "file,caption\na.png,春\n", "big5")
    fails(lambda: list_captioned(tmp_path), "captions.csv", "not UTF-8", "offset 19")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_a_pipe_and_a_link_that_leaves_the_folder(tmp_path):
    outside = picture(tmp_path / "secret.png")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.png").symlink_to(outside)
    table(tmp_path / "set", "file,caption\na.png,x\n")
    fails(lambda: list_captioned(tmp_path / "set"), "a.png", "outside")
    os.mkfifo(tmp_path / "pipe.png")
    fails(lambda: read_image(tmp_path / "pipe.png", 8, 1), "pipe.png", "plain file")     # and does not hang


# ------------------------------------------------------------------------------------------------ one picture

@pytest.mark.parametrize("mode, color, grey", [
    ("L", 100, 100), ("RGB", (100, 100, 100), 100), ("RGBA", (0, 0, 0, 0), 255), ("RGBA", (0, 0, 0, 255), 0),
    ("LA", (0, 0), 255), ("LA", (80, 255), 80), ("1", 1, 255), ("1", 0, 0), ("I;16", 100 * 256 + 7, 100),
])
def test_modes(tmp_path, mode, color, grey):
    path = picture(tmp_path / "x.png", mode, color=color)
    assert read_image(path, 4, 1).unique().tolist() == [grey]
    assert read_image(path, 4, 3).unique().tolist() == [grey]
    assert read_image(path, 4, 3).shape == (3, 4, 4) and read_image(path, 4, 1).dtype == torch.uint8


def test_palette_with_and_without_transparency(tmp_path):
    image = Image.new("P", (8, 8), 1)
    image.putpalette([10, 20, 30, 200, 100, 0])
    image.save(tmp_path / "opaque.png")
    image.save(tmp_path / "clear.png", transparency=1)
    image.save(tmp_path / "opaque.gif")
    assert read_image(tmp_path / "opaque.png", 2, 3)[:, 0, 0].tolist() == [200, 100, 0]
    assert read_image(tmp_path / "opaque.gif", 2, 3)[:, 0, 0].tolist() == [200, 100, 0]
    assert read_image(tmp_path / "clear.png", 2, 3).unique().tolist() == [255]


@pytest.mark.parametrize("suffix", ["jpg", "webp", "bmp", "tiff"])
def test_formats_and_cmyk(tmp_path, suffix):
    path = picture(tmp_path / f"春.{suffix}", "RGB", (20, 10), (250, 0, 0))
    assert (read_image(path, (10, 20), 3)[:, 5, 5].int() - torch.tensor([250, 0, 0])).abs().max() < 8
    if suffix in ("jpg", "tiff"):
        cmyk = picture(tmp_path / f"cmyk.{suffix}", "CMYK", color=(0, 0, 0, 255))
        assert read_image(cmyk, 4, 1).max() < 8


def test_exif_rotation(tmp_path):
    image = Image.new("L", (20, 10), 255)
    image.paste(0, (0, 0, 10, 10))                  # black on the left half
    exif = Image.Exif()
    exif[0x0112] = 6                                # "turn me 90 degrees clockwise": then black is on top
    image.save(tmp_path / "x.png", exif=exif)
    assert read_image(tmp_path / "x.png", (20, 10), 1)[0, [2, 17], 5].tolist() == [0, 255]


def test_pad_keeps_everything_and_crop_fills(tmp_path):
    path = picture(tmp_path / "wide.png", size=(40, 20))
    padded = read_image(path, 16, 1)
    assert padded[0, :, 8].tolist() == [255] * 4 + [0] * 8 + [255] * 4
    assert read_image(path, 16, 1, fit="crop").max() == 0
    thin = picture(tmp_path / "thin.png", size=(20_000, 1))
    assert read_image(thin, 16, 1).shape == read_image(thin, 16, 1, fit="crop").shape == (1, 16, 16)


def png_header(width, height):
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize("side", [9_000, 12_000, 100_000])      # our limit, Pillow's warning, Pillow's error
def test_a_decompression_bomb_is_refused_from_its_header(tmp_path, side):
    (tmp_path / "bomb.png").write_bytes(png_header(side, side))
    fails(lambda: read_image(tmp_path / "bomb.png", 8, 1), "bomb.png", "pixels", "limit")


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "gif", "tiff"])
def test_truncated_pictures(tmp_path, suffix):
    torch.manual_seed(0)
    noise = Image.frombytes("L", (64, 64), bytes(torch.randint(0, 256, (4096,), dtype=torch.uint8).numpy()))
    noise.save(tmp_path / f"whole.{suffix}")
    data = (tmp_path / f"whole.{suffix}").read_bytes()
    for share in (0.03, 0.3, 0.6):
        path = tmp_path / f"cut.{suffix}"
        path.write_bytes(data[:int(len(data) * share)])
        fails(lambda path=path: read_image(path, 8, 1), f"cut.{suffix}")


def test_not_a_picture(tmp_path):
    for name, data, word in [("zero.png", b"", "empty"), ("text.png", b"hello" * 99, "not a picture"),
                             ("eps.png", b"%!PS-Adobe EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a picture"),
                             ("head.png", b"\x89PNG\r\n\x1a\n", "head.png")]:
        (tmp_path / name).write_bytes(data)
        fails(lambda name=name: read_image(tmp_path / name, 8, 1), word)
    fails(lambda: read_image(tmp_path / "gone\n.png", 8, 1), "gone .png", "cannot be read")
    fails(lambda: read_image(tmp_path, 8, 1), "plain file")


def test_bad_arguments():
    path = DATA / "calligraphy" / "春" / "yuji-syuku.png"
    fails(lambda: read_image(path, 0, 1), "size 0")
    fails(lambda: read_image(path, (8, 99_999), 1), "99999")
    fails(lambda: read_image(path, 8, 2), "channels 2")
    fails(lambda: read_image(path, 8, 1, fit="stretch"), "'stretch'")


def test_the_folder_reads_each_file_once(tmp_path):
    picture(tmp_path / "a" / "1.png", color=50)
    folder = CaptionedImages(tmp_path, 4)
    first = folder[0][0]
    (tmp_path / "a" / "1.png").unlink()
    assert torch.equal(folder[0][0], first) and torch.equal(folder[-1][0], first)
    with pytest.raises(IndexError):
        folder[1]


# ----------------------------------------------------------------------------------------------------- jitter

def rand(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_jitter_is_decided_by_its_generator_alone():
    x = rand(6, 1, 16, 24)
    a, b, c = (jitter(x, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4))
    assert torch.equal(a, b) and not torch.allclose(a, c) and a.shape == x.shape
    same = jitter(x[:1].expand(6, -1, -1, -1), torch.Generator().manual_seed(3))
    assert len(same.unique(dim=0)) == 6                                         # another change for each


def test_jitter_of_nothing_is_the_identity():
    x = rand(2, 3, 12, 20)
    still = jitter(x, torch.Generator().manual_seed(0), degrees=0, translate=0, scale=0, shear=0)
    assert torch.allclose(still, x, atol=1e-5)


def test_jitter_brings_in_white():
    black = -torch.ones(20, 1, 32, 32)
    moved = jitter(black, torch.Generator().manual_seed(0), degrees=0, translate=0.4, scale=0, shear=0)
    assert moved.max() == 1 and moved.min() == -1
    assert torch.allclose(jitter(-black, torch.Generator().manual_seed(0), degrees=90), -black)


def test_jitter_mirrors_only_when_asked():
    x = rand(40, 1, 8, 8)
    kinds = []
    for flip in (False, True):
        y = jitter(x, torch.Generator().manual_seed(0), degrees=0, translate=0, scale=0, shear=0, flip=flip)
        kinds.append([torch.allclose(b, a.flip(-1), atol=1e-5) for a, b in zip(x, y, strict=True)])
    assert not any(kinds[0]) and 8 < sum(kinds[1]) < 32


def test_jitter_turns_without_stretching_an_oblong_picture():
    # a disc stays a disc under rotation only if the aspect is accounted for
    y, x = torch.meshgrid(torch.arange(40.0) - 19.5, torch.arange(80.0) - 39.5, indexing="ij")
    disc = 1 - 2 * (x**2 + y**2 < 144).float()[None, None].expand(8, -1, -1, -1)
    turned = jitter(disc, torch.Generator().manual_seed(0), degrees=180, translate=0, scale=0, shear=0)
    assert (turned - disc).abs().mean() < 0.02


def test_dataset_with_jitter_and_a_loader():
    moving = partial(jitter, generator=torch.Generator().manual_seed(0))
    folder = CaptionedImages(DATA / "calligraphy", 32, jitter=moving)
    assert not torch.equal(folder[0][0], folder[0][0])
    pictures, captions = next(iter(torch.utils.data.DataLoader(folder, batch_size=4)))
    assert pictures.shape == (4, 1, 32, 32) and len(captions) == 4
    assert torch.equal(folder.images(), folder.images())                     # these stay clean
