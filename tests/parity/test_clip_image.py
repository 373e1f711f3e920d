"""miniclip's pictures against transformers' Pillow path,
torchvision's transform as OpenAI and OpenCLIP use it, Pillow.

Equal means equal: every comparison is torch.equal, on noise and on odd sizes.
"""

import random

import pytest
import torch

from miniclip.image import CLIPImageProcessor, CLIPProcessor, pillow_to_tensor, resize

transformers = pytest.importorskip("transformers")
Image = pytest.importorskip("PIL.Image")
np = pytest.importorskip("numpy")


def noise(width, height, mode="RGB", seed=0):
    channels = {"RGB": 3, "L": 1, "RGBA": 4, "LA": 2}[mode]
    raw = random.Random(seed).randbytes(width * height * channels)
    return Image.frombytes(mode, (width, height), raw)


SIZES = [(64, 48), (427, 640), (33, 97), (224, 224), (20, 20), (225, 224), (301, 224), (500, 31)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "LA"])
def test_as_transformers(size, mode):
    pil_processor = transformers.models.clip.image_processing_pil_clip.CLIPImageProcessorPil()
    image = noise(*size, mode)
    theirs = torch.as_tensor(np.asarray(pil_processor(image, return_tensors="np")["pixel_values"]))
    assert torch.equal(CLIPImageProcessor()(image).pixel_values, theirs)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P"])
def test_as_openai(size, mode):
    open_clip = pytest.importorskip("open_clip")
    transform = open_clip.transform.image_transform(96, is_train=False)
    image = noise(*size).convert("P") if mode == "P" else noise(*size, mode)
    ours = CLIPImageProcessor.openai(96)(image).pixel_values[0]
    assert torch.equal(ours, transform(image))


@pytest.mark.parametrize("resample", [2, 3])
def test_resize_is_pillows_to_the_bit(resample):
    r = random.Random(0)
    for seed in range(40):
        old, new = (r.randint(1, 90), r.randint(1, 90)), (r.randint(1, 90), r.randint(1, 90))
        image = noise(*old, seed=seed)
        # one axis a call: Pillow 13 may swap the two
        halfway = image.resize((new[0], old[1]), resample=resample)
        theirs = pillow_to_tensor(halfway.resize(new, resample=resample))
        assert torch.equal(resize(pillow_to_tensor(image), new[1], new[0], resample), theirs), (old, new)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
def test_tensors_and_arrays_as_pillow(mode):
    processor = CLIPImageProcessor(size=40, crop_size=36)
    image = noise(61, 83, mode)
    array = np.asarray(image)
    tensor = torch.from_numpy(array.copy())
    tensor = tensor.permute(2, 0, 1) if tensor.ndim == 3 else tensor
    expected = processor(image).pixel_values
    assert torch.equal(processor(array).pixel_values, expected)
    assert torch.equal(processor(tensor).pixel_values, expected)


def test_folders_both_ways(tmp_path):
    ours = CLIPImageProcessor(size=40, crop_size=36, image_mean=(0.5, 0.4, 0.3))
    ours.save_pretrained(tmp_path)
    theirs = transformers.CLIPImageProcessor.from_pretrained(tmp_path)
    image = noise(61, 83)
    other = theirs(image, return_tensors="pt").pixel_values  # torchvision: one level of 255 apart at most
    assert (ours(image).pixel_values - other).abs().max() < 0.016
    theirs.save_pretrained(tmp_path / "back")
    back = CLIPImageProcessor.from_pretrained(tmp_path / "back")
    assert torch.equal(back(image).pixel_values, ours(image).pixel_values)


def test_processor(tmp_path):
    from miniclip import CLIPTokenizer

    tokenizer = CLIPTokenizer.train(["a red cup", "a red bowl"] * 2, vocab_size=540)
    ours = CLIPProcessor(CLIPImageProcessor(), tokenizer)
    ours.save_pretrained(tmp_path)
    theirs = transformers.CLIPProcessor.from_pretrained(tmp_path)
    call = dict(text=["a red cup", "枸杞"], images=[noise(50, 60), noise(70, 40)], padding=True,
                return_tensors="pt")
    a, b = ours(**call), theirs(**call)
    assert set(a) == set(b) and a.input_ids.equal(b.input_ids) and a.attention_mask.equal(b.attention_mask)
    assert (a.pixel_values - b.pixel_values).abs().max() < 0.03
    theirs.save_pretrained(tmp_path / "five")
    again = CLIPProcessor.from_pretrained(tmp_path / "five")(**call)
    assert all(torch.equal(again[k], a[k]) for k in a)


def test_options_of_one_call_and_layouts():
    theirs = transformers.models.clip.image_processing_pil_clip.CLIPImageProcessorPil()
    ours = CLIPImageProcessor()
    array = np.asarray(noise(61, 83, "RGBA"))
    for call in (dict(size=40, crop_size=36), dict(do_normalize=False), dict(do_rescale=False),
                 dict(size={"shortest_edge": 30}, do_center_crop=False, image_mean=[0.5] * 3)):
        for image in (array, array.transpose(2, 0, 1).copy()):
            expected = theirs.preprocess(image, return_tensors="np", **call)["pixel_values"]
            found = ours.preprocess(image, return_tensors="np", **call).pixel_values
            assert np.abs(found - expected).max() < 1e-4 * max(1, np.abs(expected).max())
    four = dict(do_convert_rgb=False, image_mean=[0.0] * 4, image_std=[1.0] * 4)
    expected = transformers.CLIPImageProcessor()(array, return_tensors="pt", **four).pixel_values
    assert (ours(array, **four).pixel_values - expected).abs().max() < 0.005        # one level of 255
