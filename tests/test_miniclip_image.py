"""miniclip/image.py without transformers, and mostly without Pillow."""

import json
import subprocess
import sys

import pytest
import torch

from miniclip import CLIPImageProcessor, CLIPProcessor, CLIPTokenizer, ConfigError, ImageError
from miniclip.image import center_crop, read_image, resampling_matrix, resize, tensor_to_rgb


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
    assert torch.equal(processor(str(path)).pixel_values, processor(read_image(path)).pixel_values)
    turned = Image.open(path).getexif()
    turned[0x0112] = 6
    Image.open(path).save(tmp_path / "turned.jpg", exif=turned)
    assert read_image(tmp_path / "turned.jpg").size == (30, 40)
    (tmp_path / "broken.png").write_bytes(path.read_bytes()[:60])
    with pytest.raises(ImageError, match="broken.png: not a readable picture"):
        processor(tmp_path / "broken.png")


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
