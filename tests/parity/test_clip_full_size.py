"""ViT-B/32 and ViT-L/14 at full size against transformers and open_clip: random weights, both precisions.

The two models share the memory of their weights. About a minute on two cores.
"""

import gc

import pytest
import torch

from miniclip import CLIPConfig, CLIPModel, convert

from .test_clip_model import BARS, error

transformers = pytest.importorskip("transformers")

SIZES = {
    "ViT-B-32": (dict(), dict(), 512),
    "ViT-L-14": (
        dict(hidden_size=768, intermediate_size=3072, num_attention_heads=12),
        dict(hidden_size=1024, intermediate_size=4096, num_attention_heads=16, num_hidden_layers=24,
             patch_size=14),
        768,
    ),
}


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)
    gc.collect()


def both(name, dtype):
    text, vision, E = SIZES[name]
    theirs = transformers.CLIPModel(
        transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=E)
    ).to(dtype).eval()
    with torch.device("meta"):
        ours = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=E))
    ours.load_state_dict(theirs.state_dict(), assign=True)
    return ours.requires_grad_().eval(), theirs


def inputs(pairs, dtype):
    ids = torch.randint(0, 49406, (pairs, 77))
    ids[:, 0], ids[:, 20:] = 49406, 49407
    return dict(input_ids=ids, pixel_values=torch.randn(pairs, 3, 224, 224, dtype=dtype))


@pytest.mark.parametrize("name, dtype, pairs",
                         [("ViT-B-32", torch.float64, 2), ("ViT-B-32", torch.float32, 2),
                                                ("ViT-L-14", torch.float32, 1)])  # fmt: skip
def test_features_logits_loss_gradients(name, dtype, pairs):
    ours, theirs = both(name, dtype)
    call = inputs(pairs, dtype)
    a, b = (m(**call, return_loss=True, output_hidden_states=True) for m in (ours, theirs))
    for field in ("loss", "logits_per_image", "text_embeds", "image_embeds"):
        assert error(a[field], b[field]) <= BARS[dtype], field
    for side in ("text_model_output", "vision_model_output"):
        assert error(a[side].last_hidden_state, b[side].last_hidden_state) <= BARS[dtype]
        for x, y in zip(a[side].hidden_states, b[side].hidden_states, strict=True):
            assert error(x, y) <= BARS[dtype]
    for out in (a, b):  # the loss of a single pair is 0 and would say nothing
        (out.loss + out.logits_per_image[0, 0]).backward()
    scale = max(p.grad.abs().max() for p in theirs.parameters())
    for (key, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert ((p.grad - q.grad).abs().max() / scale).item() <= BARS[dtype], key


def test_large_in_double_precision():
    ours, theirs = both("ViT-L-14", torch.float64)
    call = inputs(1, torch.float64)
    with torch.no_grad():
        a, b = ours(**call), theirs(**call)
    for field in ("logits_per_image", "text_embeds", "image_embeds"):
        assert error(a[field], b[field]) <= BARS[torch.float64], field


@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-B-32-quickgelu", "RN50-quickgelu"])
def test_open_clip_at_full_size(name):
    open_clip = pytest.importorskip("open_clip")
    theirs = open_clip.create_model(name).eval()
    state = {k: v.detach() for k, v in theirs.state_dict().items()}
    ours = _loaded(state, name)
    ids = inputs(2, torch.float32)["input_ids"]
    pixels = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        assert error(ours.get_text_features(ids), theirs.encode_text(ids)) <= 2e-6
        assert error(ours.get_image_features(pixels), theirs.encode_image(pixels)) <= 2e-6


def _loaded(state, name):
    """convert.load without the file."""
    convert_read = convert.read_any
    try:
        convert.read_any = lambda path: (dict(state), False)
        return convert.load("open_clip's " + name, name)
    finally:
        convert.read_any = convert_read
