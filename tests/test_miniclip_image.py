"""miniclip/image.py without transformers, and mostly without Pillow."""

import json
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch

from miniclip import CLIPImageProcessor, CLIPProcessor, CLIPTokenizer, ConfigError, ImageError
from miniclip.image import center_crop, resampling_matrix, resize, tensor_to_rgb
from miniclip.picture import FORMATS, formats, open_picture, picture_file


def noise(*shape):
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_resize_known_numbers():
    """From Pillow: Image.frombytes("L", (4, 1), bytes([0, 85, 170, 255])).resize((2, 1)) and so on."""
    ramp = torch.tensor([[[0, 85, 170, 255]]], dtype=torch.uint8)
    assert resize(ramp, 1, 2, 2).tolist() == [[[61, 194]]]
    assert resize(ramp, 1, 2, 3).tolist() == [[[50, 205]]]
    assert resize(ramp, 1, 6, 3).tolist() == [[[0, 35, 99, 156, 220, 255]]]
    x = noise(3, 9, 7)
    assert torch.equal(resize(x, 9, 7), x)
    flat = torch.full((3, 50, 40), 77, dtype=torch.uint8)
    assert resize(flat, 13, 90).unique().tolist() == [77]


def test_resampling_rows_sum_to_one():
    for old, new in ((90, 7), (7, 90), (5, 5), (1, 9)):
        weights = resampling_matrix(old, new, 3)
        assert weights.shape == (new, old) and (weights.sum(1) - 1).abs().max() < 1e-5


def test_center_crop():
    x = torch.arange(7 * 9).view(1, 7, 9)
    assert torch.equal(center_crop(x, 3, 3), x[:, 2:5, 3:6])
    assert torch.equal(center_crop(x, 4, 4, "floor"), x[:, 1:5, 2:6])
    assert torch.equal(center_crop(x, 4, 4, "round"), x[:, 2:6, 2:6])  # 1.5 -> 2, 2.5 -> 2: half to even
    assert center_crop(x, 8, 9).shape == (1, 8, 9)
    padded = center_crop(x, 11, 11)
    assert torch.equal(padded[:, 2:9, 1:10], x) and padded[:, :2].sum() == 0


def test_shapes_and_numbers():
    processor = CLIPImageProcessor(size=16, crop_size=12)
    out = processor(noise(3, 30, 50))
    assert out.pixel_values.shape == (1, 3, 12, 12) and out.pixel_values.dtype == torch.float32
    pictures = [noise(3, 30, 50), noise(1, 20, 20), noise(19, 40)]
    assert processor(pictures)["pixel_values"].shape == (3, 3, 12, 12)
    assert processor(noise(2, 3, 20, 20)).pixel_values.shape == (2, 3, 12, 12)
    assert [p.shape for p in processor([noise(3, 9, 9)], return_tensors=None).pixel_values] == [(3, 12, 12)]
    gray = torch.full((3, 20, 20), 128, dtype=torch.uint8)
    expected = (128 / 255 - torch.tensor(processor.image_mean)) / torch.tensor(processor.image_std)
    assert torch.allclose(processor(gray).pixel_values[0, :, 5, 5], expected)
    plain = CLIPImageProcessor(size={"height": 8, "width": 10}, do_center_crop=False, do_normalize=False)
    x = plain(noise(3, 30, 50)).pixel_values
    assert x.shape == (1, 3, 8, 10) and 0 <= x.min() and x.max() <= 1


def test_alpha():
    x = torch.cat([torch.zeros(3, 2, 2, dtype=torch.uint8),
                   torch.tensor([[[0, 255], [128, 128]]], dtype=torch.uint8)])
    assert tensor_to_rgb(x, "white")[0].tolist() == [[255, 0], [127, 127]]
    assert tensor_to_rgb(x, "drop")[0].tolist() == [[0, 0], [0, 0]]


def test_files(tmp_path):
    processor = CLIPImageProcessor(size=32, crop_size=24, image_mean=(0.5, 0.5, 0.5), alpha="drop")
    processor.save_pretrained(tmp_path)
    assert CLIPImageProcessor.from_pretrained(tmp_path) == processor
    old = {"crop_size": 224, "do_center_crop": True, "do_normalize": True, "do_resize": True, "resample": 3,
           "size": 224,
           "feature_extractor_type": "CLIPFeatureExtractor",
           "image_mean": [0.48145466, 0.4578275, 0.40821073],
           "image_std": [0.26862954, 0.26130258, 0.27577711]}  # fmt: skip
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(old))
    assert CLIPImageProcessor.from_pretrained(tmp_path) == CLIPImageProcessor()


def test_pictures_from_disk(tmp_path):
    Image = pytest.importorskip("PIL.Image")
    path = tmp_path / "人蔘.png"
    Image.frombytes("RGB", (40, 30), bytes(noise(3600).tolist())).save(path)
    processor = CLIPImageProcessor(size=16, crop_size=16)
    assert torch.equal(processor(str(path)).pixel_values, processor(open_picture(path)).pixel_values)
    turned = Image.open(path).getexif()
    turned[0x0112] = 6
    Image.open(path).save(tmp_path / "turned.jpg", exif=turned)
    assert open_picture(tmp_path / "turned.jpg").size == (30, 40)
    (tmp_path / "broken.png").write_bytes(path.read_bytes()[:60])
    with pytest.raises(ImageError, match="broken.png: broken picture"):
        processor(tmp_path / "broken.png")


ROOT = Path(__file__).parent.parent
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"


def png(path, width, height, kind=0, depth=8):
    """A PNG of zeros, its rows packed as they are made: a large one takes no memory here."""
    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    row = b"\0" * (1 + (width * depth * {0: 1, 6: 4}[kind] + 7) // 8)
    pack = zlib.compressobj(9)
    body = b"".join(pack.compress(row) for _ in range(height)) + pack.flush()
    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)
    return path


def run_python(code, *arguments):
    """What a fresh interpreter prints; one line of it, as json."""
    done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True,
                          cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_no_reader_of_pictures_starts_a_process(tmp_path):
    """An EPS under a picture's name: Pillow would run Ghostscript on it."""
    pytest.importorskip("PIL.Image")
    (tmp_path / "a.png").write_bytes(EPS)
    said = run_python("""
import contextlib, io, json, os, sys
import PIL.EpsImagePlugin, PIL.Image
os.environ["PATH"] = sys.argv[1]            # a Ghostscript that tells of itself
from miniclip import CLIPImageProcessor
from miniclip.picture import open_picture
from minidiff.__main__ import main
from train.data.image import read_image, read_whole
from train.data.summary import look_at
started = []
starting = "subprocess.Popen os.exec os.posix_spawn os.fork os.forkpty os.system os.startfile".split()
sys.addaudithook(lambda name, args: started.append(name) if name in starting else None)
path, said = sys.argv[1] + "/a.png", []
command = ["--model", "none", "--prompt", "x", "--out", sys.argv[1], "--image", path]
for read in (open_picture, CLIPImageProcessor(), lambda p: read_image(p, 8, 1), lambda p: read_whole(p, 1),
             lambda p: print(look_at(p, 10**6).problem, file=sys.stderr), lambda p: main(command)):
    with contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            read(path)
        except ValueError as error:
            print(error, file=err)
    said.append(err.getvalue())
known = list(started)
PIL.EpsImagePlugin.gs_binary = "gs"
with contextlib.suppress(Exception):        # the trap itself works
    PIL.Image.open(path).load()
print(json.dumps([known, started, said]))
""", tmp_path)
    assert said[0] == [] and said[1], said
    assert len(said[2]) == 6
    assert all("not a picture in one of the formats PNG JPEG" in text for text in said[2])


@pytest.mark.parametrize("width, height, kind, depth, words", [
    (13_300, 13_300, 6, 8, "13300x13300 pixels, not 1 to the limit of 67108864"),
    (100_000, 600, 0, 1, "100000x600 pixels, a side above the limit of 65535"),
    (60_000, 1, 0, 1, "60000x1 pixels: resized to a shortest edge of 2000 it would"),
    (1, 60_000, 0, 1, "1x60000 pixels: resized to a shortest edge of 2000 it would"),
])
def test_small_files_of_large_pictures_take_no_memory(tmp_path, width, height, kind, depth, words):
    pytest.importorskip("PIL.Image")
    pytest.importorskip("resource")
    path = png(tmp_path / "a.png", width, height, kind, depth)
    assert path.stat().st_size < 2**20
    grown, said = run_python("""
import json, resource, sys
import PIL.ImageOps, PIL.PngImagePlugin
from miniclip import CLIPImageProcessor, ImageError
processor = CLIPImageProcessor(size=2000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    processor(sys.argv[1])
except ImageError as error:
    said = str(error)
print(json.dumps([resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, said]))
""", path)
    assert words in said and said.startswith(str(path)) and "\n" not in said
    assert grown < 64 * 2**10                                                                   # KiB


@pytest.mark.parametrize("error", [RuntimeError, NotImplementedError, SyntaxError, struct.error, MemoryError,
                                   OverflowError, ZeroDivisionError, KeyError, RecursionError, EOFError])
def test_whatever_a_decoder_raises_is_one_line(tmp_path, monkeypatch, error):
    Image = pytest.importorskip("PIL.Image")
    path = png(tmp_path / "a\nb.png", 4, 4)
    assert open_picture(path).size == (4, 4)

    def broken(*_, **__):
        raise error("x\n" * 10_000)

    for where in ("PIL.ImageFile.ImageFile.load", "PIL.Image.open"):
        with monkeypatch.context() as patch:
            patch.setattr(where, broken)
            with pytest.raises(ImageError, match=rf"a b.png: broken picture \({error.__name__}: ") as caught:
                CLIPImageProcessor()(path)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    assert Image


def test_the_formats_and_no_others(tmp_path):
    Image = pytest.importorskip("PIL.Image")
    picture = Image.new("RGB", (20, 10), "red")
    for kind in formats():
        picture.save(tmp_path / "a", kind)
        assert open_picture(tmp_path / "a").size == (20, 10)
    for kind in ("PPM", "ICO", "TGA", "PCX", "DIB", "EPS", "PDF", "SGI", "DDS", "JPEG2000"):
        picture.save(tmp_path / "a.png", kind)
        with pytest.raises(ImageError, match="a.png: not a picture in one of the formats PNG JPEG WEBP GIF"):
            open_picture(tmp_path / "a.png")
    assert set(formats()) - set(FORMATS) <= {"AVIF"}


@pytest.mark.parametrize("share", [0, 0.01, 0.05, 0.3, 0.6])
def test_cut_files_of_each_format(tmp_path, share):
    Image = pytest.importorskip("PIL.Image")
    for kind in formats():
        Image.frombytes("L", (64, 64), bytes(noise(4096).tolist())).save(tmp_path / "a", kind)
        whole = (tmp_path / "a").read_bytes()
        (tmp_path / "cut").write_bytes(whole[:int(len(whole) * share)])
        with pytest.raises(ImageError, match=r"cut: [^\n]*$"):
            open_picture(tmp_path / "cut")


def test_what_is_no_plain_file(tmp_path):
    pytest.importorskip("PIL.Image")
    with pytest.raises(ImageError, match="is not a plain file"):
        open_picture(tmp_path)
    for name in ("none", "x" * 300, "a\0b"):
        with pytest.raises(ImageError):
            open_picture(tmp_path / name)
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.png")
        with pytest.raises(ImageError, match="pipe.png: is not a plain file"):        # and does not hang
            open_picture(tmp_path / "pipe.png")
    small = png(tmp_path / "a.png", 30, 40)
    with pytest.raises(ImageError, match="a.png: 30x40 pixels, not 1 to the limit of 1199"):
        open_picture(small, most_pixels=1199)
    with picture_file(small, 1200) as image:
        assert image.size == (30, 40)


def test_sizes_that_memory_is_not_taken_for(tmp_path):
    (tmp_path / "preprocessor_config.json").write_text('{"size": 100000000}')
    with pytest.raises(ConfigError, match="preprocessor_config.json: size = .*from 1 to 4096"):
        CLIPImageProcessor.from_pretrained(tmp_path)
    for values in ({"size": {"height": 10**9, "width": 10**9}}, {"crop_size": 2**63}, {"size": 0},
                   {"crop_size": {"height": 8, "width": True}}, {"size": {"x" * 10_000: 1}},
                   {"image_mean": [0.5] * 1000}, {"image_std": [float("nan")]}, {"rescale_factor": 10**39},
                   {"alpha": "x" * 10_000}):
        with pytest.raises(ConfigError) as caught:
            CLIPImageProcessor.from_dict(values)
        assert len(str(caught.value)) < 500
    long = torch.zeros(3, 1, 60_000, dtype=torch.uint8)
    with pytest.raises(ImageError, match="60000x1 pixels: resized to a shortest edge of 1200"):
        CLIPImageProcessor(size=1200)(long)
    with pytest.raises(ImageError, match=r"picture of \[3, 100, 60000\] is too large to be resized"):
        resize(torch.zeros(1, 1, 1, dtype=torch.uint8).expand(3, 100, 60_000), 4096, 4096)
    with pytest.raises(ImageError, match="0x5 pixels"):
        CLIPImageProcessor()(torch.zeros(3, 5, 0, dtype=torch.uint8))


def test_processor(tmp_path):
    tokenizer = CLIPTokenizer.train(["枸杞", "人蔘"] * 2, vocab_size=530)
    processor = CLIPProcessor(CLIPImageProcessor(size=16, crop_size=16), tokenizer)
    out = processor(text=["枸杞", "a b"], images=[noise(3, 20, 20)], padding=True)
    assert set(out) == {"input_ids", "attention_mask", "pixel_values"} and out.input_ids.shape[0] == 2
    processor.save_pretrained(tmp_path)
    back = CLIPProcessor.from_pretrained(tmp_path)
    assert torch.equal(back(text="枸杞").input_ids, processor(text="枸杞").input_ids)
    assert set(back(images=noise(3, 20, 20))) == {"pixel_values"}
    with pytest.raises(ValueError, match="both missing"):
        processor()


def test_errors():
    processor = CLIPImageProcessor()
    with pytest.raises(ImageError, match=r"float32, shape \[3, 5, 5\]: expected uint8"):
        processor(torch.zeros(3, 5, 5))
    with pytest.raises(ImageError, match="int is not a picture"):
        processor(3)
    with pytest.raises(ConfigError, match="size = 'big'"):
        CLIPImageProcessor(size="big")
    with pytest.raises(ConfigError, match="resample = 7"):
        CLIPImageProcessor(resample=7)
    with pytest.raises(ConfigError, match="unknown field 'colour'"):
        CLIPImageProcessor.from_dict({"colour": 1})


def test_options_of_one_call():
    processor = CLIPImageProcessor(size=16, crop_size=12)
    x = noise(3, 30, 50)
    other = CLIPImageProcessor(size=20, crop_size=8, do_normalize=False)
    out = processor(x, size=20, crop_size={"height": 8, "width": 8}, do_normalize=False, resample=None)
    assert torch.equal(out.pixel_values, other(x).pixel_values) and processor.size == {"shortest_edge": 16}
    assert torch.equal(processor.preprocess([x]).pixel_values, processor(x).pixel_values)
    assert processor([[x], [x]]).pixel_values.shape[0] == 2
    assert processor(x, data_format="channels_last").pixel_values.shape == (1, 12, 12, 3)
    with pytest.raises(TypeError, match="unexpected keyword argument 'colour'"):
        processor(x, colour=1)
    with pytest.raises(ConfigError, match="size = 'big'"):
        processor(x, size="big")


def test_layouts_and_channels():
    processor = CLIPImageProcessor(size=16, crop_size=12)
    x = noise(3, 30, 50)
    assert torch.equal(processor(x.permute(1, 2, 0)).pixel_values, processor(x).pixel_values)
    thin = noise(3, 20, 3)
    assert processor(thin, do_resize=False, do_center_crop=False).pixel_values.shape == (1, 3, 20, 3)
    last = processor(thin, do_resize=False, do_center_crop=False, input_data_format="channels_last")
    assert last.pixel_values.shape == (1, 3, 3, 20)
    four = dict(do_convert_rgb=False, image_mean=[0.0] * 4, image_std=[1.0] * 4)
    assert processor(noise(4, 20, 20), **four).pixel_values.shape == (1, 4, 12, 12)
    with pytest.raises(ImageError, match="a picture of 4 channels, but 3 in image_mean"):
        processor(noise(4, 20, 20), do_convert_rgb=False)


def test_numpy_and_json(tmp_path):
    np = pytest.importorskip("numpy")
    processor = CLIPImageProcessor(size=16, crop_size=12)
    x = noise(3, 30, 50)
    out = processor(x, return_tensors="np").pixel_values
    assert isinstance(out, np.ndarray) and torch.equal(torch.from_numpy(out), processor(x).pixel_values)
    processor.to_json_file(tmp_path / "a.json")
    assert CLIPImageProcessor.from_json_file(tmp_path / "a.json") == processor
    assert json.loads(processor.to_json_string())["size"] == {"shortest_edge": 16}
    (path,) = processor.save_pretrained(tmp_path)
    assert path.endswith("preprocessor_config.json")
    assert CLIPImageProcessor.from_pretrained(tmp_path, size=9, use_fast=True).size == {"shortest_edge": 9}
    assert CLIPImageProcessor.from_dict(processor.to_dict(), do_resize=None).do_resize is None
    with pytest.raises(AttributeError, match="rescale is left out"):
        processor.rescale(x, 0.5)


def test_processor_in_both_orders(tmp_path):
    tokenizer = CLIPTokenizer.train(["a b"] * 2, 520)
    processor = CLIPProcessor(CLIPImageProcessor(size=16, crop_size=12), tokenizer)
    x, texts = noise(3, 20, 20), ["a", "b"]
    out = processor(text=texts, images=x, do_normalize=False, text_kwargs={"padding": True})
    for other in (processor(texts, x, do_normalize=False), processor(x, texts, do_normalize=False)):
        assert all(torch.equal(out[name], other[name]) for name in out)
    assert set(processor(x)) == {"pixel_values"} and set(processor("a")) == {"input_ids", "attention_mask"}
    assert processor.model_input_names == ["input_ids", "attention_mask", "pixel_values"]
    with pytest.raises(ValueError, match="padding is given twice"):
        processor(texts, padding=True, text_kwargs={"padding": False})
    assert len(processor.save_pretrained(tmp_path)) == 6
    back = CLIPProcessor.from_pretrained(tmp_path, crop_size=9, padding_side="left", local_files_only=True)
    assert back.image_processor.crop_size["width"] == 9 and back.tokenizer.padding_side == "left"


def test_no_pillow_needed_for_tensors():
    code = (
        "import sys; sys.modules['PIL'] = None; import torch; from miniclip import CLIPImageProcessor;"
        "print(tuple(CLIPImageProcessor()(torch.zeros(3, 30, 40, dtype=torch.uint8)).pixel_values.shape))"
    )
    import miniclip

    root = miniclip.__path__[0].rsplit("miniclip", 1)[0]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    assert done.stdout.strip() == "(1, 3, 224, 224)"
