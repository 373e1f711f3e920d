"""The same torch.manual_seed gives upstream's first weights: who trains from scratch can compare runs."""

import pytest
import torch

import miniclip
from minidiff import AutoencoderKL, UNet2DConditionModel

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

CROSS, DOWN, UP, CROSS_UP = "CrossAttnDownBlock2D", "DownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"
UNET = {"sample_size": 8, "block_out_channels": (16, 32), "layers_per_block": 2, "cross_attention_dim": 24,
        "down_block_types": (CROSS, DOWN), "up_block_types": (UP, CROSS_UP), "attention_head_dim": 4,
        "norm_num_groups": 8}
VAE = {"block_out_channels": (16, 32), "down_block_types": ("DownEncoderBlock2D",) * 2, "norm_num_groups": 8,
       "up_block_types": ("UpDecoderBlock2D",) * 2}
UNETS = [
    {}, {"use_linear_projection": True, "transformer_layers_per_block": (1, 2)}, {"time_cond_proj_dim": 16},
    {"addition_embed_type": "text_time", "addition_time_embed_dim": 8,
     "projection_class_embeddings_input_dim": 72},
    {"class_embed_type": "timestep"}, {"num_class_embeds": 5}, {"mid_block_type": "UNetMidBlock2D"},
    {"mid_block_type": None}, {"encoder_hid_dim": 12, "encoder_hid_dim_type": "text_proj"},
    {"down_block_types": (CROSS, CROSS), "up_block_types": (CROSS_UP, CROSS_UP),
     "only_cross_attention": (True, False)},
    {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 12},
    {"class_embed_type": "simple_projection", "projection_class_embeddings_input_dim": 12},
    {"block_out_channels": (16, 16, 32), "layers_per_block": (1, 2, 1),
     "down_block_types": (DOWN, CROSS, CROSS), "up_block_types": (CROSS_UP, CROSS_UP, UP)},
]
VAES = [{}, {"layers_per_block": 2}, {"use_quant_conv": False}, {"use_post_quant_conv": False},
        {"mid_block_add_attention": False}]
CASES = [(UNet2DConditionModel, {**UNET, **more}) for more in UNETS]
CASES += [(AutoencoderKL, {**VAE, **more}) for more in VAES]


@pytest.mark.parametrize(("ours", "config"), CASES)
def test_first_weights(ours: type, config: dict) -> None:
    made = []
    for kind in (ours, getattr(diffusers, ours.__name__)):
        torch.manual_seed(3)
        made.append((kind(**config).state_dict(), torch.rand(1)))
    (mine, next_mine), (theirs, next_theirs) = made
    assert list(mine) == list(theirs)
    assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []
    assert torch.equal(next_mine, next_theirs)              # and the generator stands where theirs stands


TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "vocab_size": 100, "projection_dim": 16}
VISION = {**{k: v for k, v in TEXT.items() if k != "vocab_size"}, "image_size": 16, "patch_size": 8}
CLIPS = {"CLIPModel": ("CLIPConfig", {"text_config": TEXT, "vision_config": VISION, "projection_dim": 16}),
         "CLIPTextModel": ("CLIPTextConfig", TEXT), "CLIPTextModelWithProjection": ("CLIPTextConfig", TEXT),
         "CLIPVisionModel": ("CLIPVisionConfig", VISION),
         "CLIPVisionModelWithProjection": ("CLIPVisionConfig", VISION)}


@pytest.mark.parametrize("name", CLIPS)
@pytest.mark.skipif(int(transformers.__version__.split(".")[0]) < 5, reason="transformers 4 drew otherwise")
def test_first_weights_of_clip(name: str) -> None:
    kind, fields = CLIPS[name]
    made = []
    for library in (miniclip, transformers):
        torch.manual_seed(3)
        model = getattr(library, name)(getattr(library, kind)(**fields))
        made.append((model.state_dict(), torch.rand(1)))
    (mine, next_mine), (theirs, next_theirs) = made
    # since transformers 5.6 a lone tower has no prefix
    mine = {key if key in theirs else key.split(".", 1)[1]: value for key, value in mine.items()}
    assert set(mine) == set(theirs)
    assert [key for key in mine if not torch.equal(mine[key], theirs[key])] == []
    assert torch.equal(next_mine, next_theirs)
