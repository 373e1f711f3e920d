"""The original single-file layout: names against diffusers' own converters,
configs against the released ones."""

import pytest
import torch

from miniclip.weights import save_file
from minidiff import convert
from minidiff.unet import UNet2DConditionModel
from minidiff.vae import AutoencoderKL

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
from diffusers.loaders import single_file_utils as upstream  # noqa: E402

torch.set_num_threads(1)

CROSS, DOWN, UP, CROSS_UP = "CrossAttnDownBlock2D", "DownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"
SD1 = {"sample_size": 64, "cross_attention_dim": 768}
SD2 = {
    "sample_size": 96, "cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20],
    "use_linear_projection": True,
}  # fmt: skip
SDXL = {
    "sample_size": 128, "down_block_types": [DOWN, CROSS, CROSS], "up_block_types": [CROSS_UP, CROSS_UP, UP],
    "block_out_channels": [320, 640, 1280], "attention_head_dim": [5, 10, 20], "cross_attention_dim": 2048,
    "transformer_layers_per_block": [1, 2, 10], "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip
FAMILIES = {
    "SD 1.5": SD1,
    "SD 1.5 inpainting": {**SD1, "in_channels": 9},
    "SD 2.1": SD2,
    "SD 2 inpainting": {**SD2, "in_channels": 9, "sample_size": 64},
    "SDXL": SDXL,
    "SDXL refiner": {
        **SDXL, "block_out_channels": [384, 768, 1536, 1536], "attention_head_dim": [6, 12, 24, 24],
        "down_block_types": [DOWN, CROSS, CROSS, DOWN], "up_block_types": [UP, CROSS_UP, CROSS_UP, UP],
        "cross_attention_dim": 1280, "transformer_layers_per_block": 4,
        "projection_class_embeddings_input_dim": 2560,
    },
    "x4 upscaler": {
        "sample_size": 128, "in_channels": 7, "block_out_channels": [256, 512, 512, 1024],
        "attention_head_dim": 8,
        "down_block_types": [DOWN, CROSS, CROSS, CROSS], "up_block_types": [CROSS_UP, CROSS_UP, CROSS_UP, UP],
        "cross_attention_dim": 1024, "use_linear_projection": True, "num_class_embeds": 1000,
        "only_cross_attention": [False, True, True, False],
    },
    "BK-SDM small": {**SD1, "layers_per_block": 1, "mid_block_type": None},
}  # fmt: skip
VAE = {
    "block_out_channels": [128, 256, 512, 512], "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4, "layers_per_block": 2, "sample_size": 512,
}  # fmt: skip


def to_original(state, table):
    """Our names -> the original ones, by the table read backwards."""
    return convert.rename(state, {new: old for old, new in table.items()})


def original_unet(model):
    return to_original(model.state_dict(), convert.unet_table(model.config))


def original_vae(model):
    state = to_original(model.state_dict(), convert.vae_table(model.config))
    attention = (".q.weight", ".k.weight", ".v.weight", "attn_1.proj_out.weight")
    return {n: t[:, :, None, None] if n.endswith(attention) else t for n, t in state.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_unet_names_and_config(family):
    with torch.device("meta"):
        model = UNet2DConditionModel(**FAMILIES[family])
    old = original_unet(model)
    assert len(old) == len(model.state_dict()) and "input_blocks.1.0.in_layers.0.weight" in old
    # theirs: the old names through upstream's converter give our names, tensor by tensor
    config = model.export_config()
    if config["mid_block_type"] is not None:  # their converter needs a middle
        theirs = upstream.convert_ldm_unet_checkpoint({convert.UNET + n: t for n, t in old.items()}, config)
        ours = convert.rename(old, convert.unet_table(model.config))
        assert set(theirs) == set(ours) and all(theirs[name] is ours[name] for name in ours)
    # ours: names and config from the file alone
    sdxl = convert.is_sdxl({convert.UNET + n: t for n, t in old.items()})
    assert sdxl == ("XL" in family)
    _, inferred, renamed = convert.convert_unet(old, sdxl, family)
    assert {n: t.shape for n, t in renamed.items()} == {n: t.shape for n, t in model.state_dict().items()}
    assert inferred == model.config


def test_uneven_unets():
    """SSD-1B: depths differ on the way up, and the middle does not attend."""
    with torch.device("meta"):
        model = UNet2DConditionModel(
            **{**SDXL, "transformer_layers_per_block": [1, 2, 4], "mid_block_type": "UNetMidBlock2D",
               "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 1]}
        )  # fmt: skip
    _, inferred, renamed = convert.convert_unet(original_unet(model), True, "SSD-1B")
    assert inferred == model.config and set(renamed) == set(model.state_dict())


@pytest.mark.parametrize("quant", [True, False])
def test_vae_names_and_config(quant):
    with torch.device("meta"):
        model = AutoencoderKL(**VAE, use_quant_conv=quant, use_post_quant_conv=quant)
    old = original_vae(model)
    theirs = upstream.convert_ldm_vae_checkpoint({f"first_stage_model.{n}": t for n, t in old.items()},
                                                 model.export_config())
    _, inferred, ours = convert.convert_vae(old, False, "vae")
    assert inferred == model.config
    assert {n: t.shape for n, t in ours.items()} == {n: t.shape for n, t in theirs.items()}
    assert {n: t.shape for n, t in ours.items()} == {n: t.shape for n, t in model.state_dict().items()}


def test_vae_tensors():
    """A small VAE with numbers: queries, keys and values have one shape,
    so shapes alone would not tell them apart."""
    small = {"block_out_channels": [32, 64], "layers_per_block": 1, "sample_size": 512}
    types = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    model = AutoencoderKL(**small, **types)
    old = original_vae(model)
    theirs = upstream.convert_ldm_vae_checkpoint({f"first_stage_model.{n}": t for n, t in old.items()},
                                                 model.export_config())
    _, _, ours = convert.convert_vae(old, False, "vae")
    assert set(ours) == set(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)


def openclip(layers, width, seed):
    """Random tensors in OpenCLIP's layout of a text tower."""
    torch.manual_seed(seed)
    state = {"token_embedding.weight": torch.randn(60, width), "positional_embedding": torch.randn(9, width)}
    for i in range(layers):
        block = {
            "ln_1": (width,), "ln_2": (width,), "attn.out_proj": (width, width),
            "mlp.c_fc": (4 * width, width),
            "mlp.c_proj": (width, 4 * width),
        }  # fmt: skip
        for name, size in block.items():
            state[f"transformer.resblocks.{i}.{name}.weight"] = torch.randn(size)
            state[f"transformer.resblocks.{i}.{name}.bias"] = torch.randn(size[0])
        state[f"transformer.resblocks.{i}.attn.in_proj_weight"] = torch.randn(3 * width, width)
        state[f"transformer.resblocks.{i}.attn.in_proj_bias"] = torch.randn(3 * width)
    state |= {"ln_final.weight": torch.randn(width), "ln_final.bias": torch.randn(width)}
    return {**state, "text_projection": torch.randn(width, width), "logit_scale": torch.tensor(1.0)}


@pytest.mark.parametrize("sdxl", [True, False])
def test_openclip_text_encoders(sdxl):
    old = openclip(24, 64, 0)  # upstream's list of what SD 2 leaves out names layer 23
    prefix = "conditioner.embedders.1.model." if sdxl else "cond_stage_model.model."
    config = transformers.CLIPTextConfig(
        vocab_size=60, hidden_size=64, intermediate_size=256, num_hidden_layers=24 if sdxl else 23,
        num_attention_heads=1, max_position_embeddings=9, projection_dim=64, hidden_act="gelu",
        bos_token_id=58, eos_token_id=59,
    )  # fmt: skip
    their_class = transformers.CLIPTextModelWithProjection if sdxl else transformers.CLIPTextModel
    theirs = their_class(config).eval()
    converted = upstream.convert_open_clip_checkpoint(theirs, {prefix + n: t for n, t in old.items()}, prefix)
    our_class, our_config, renamed = convert.convert_openclip(old, sdxl, "text")
    assert {n for n in renamed} == {n for n in converted if sdxl or "text_projection" not in n}
    assert all(torch.equal(renamed[n], converted[n]) for n in renamed)
    for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                 # fmt: skip
                 "max_position_embeddings", "projection_dim", "hidden_act", "bos_token_id", "eos_token_id"):
        assert getattr(our_config, name) == getattr(config, name), name
    ours = our_class(our_config).eval()
    convert.load_strict(ours, renamed, "text")
    bare = set(theirs.state_dict()) & {n.removeprefix("text_model.") for n in converted}
    theirs.load_state_dict({n.removeprefix("text_model.") if bare - set(converted) else n: t
                            for n, t in converted.items()
                            if sdxl or "text_projection" not in n})  # fmt: skip
    ids = torch.tensor([[58, 3, 7, 59, 59], [58, 2, 9, 11, 59]])
    with torch.no_grad():
        a, b = ours(ids, output_hidden_states=True), theirs(ids, output_hidden_states=True)
    assert torch.allclose(a.hidden_states[-2], b.hidden_states[-2], rtol=1e-5, atol=1e-5)
    assert torch.allclose(a[0], b[0], rtol=1e-5, atol=1e-5)


def test_models_from_a_file_open_in_diffusers_too(tmp_path):
    """A small SD 1 UNet in a single file: diffusers (given its config) and we read the same model from it."""
    torch.manual_seed(0)
    model = UNet2DConditionModel(block_out_channels=(32, 64), down_block_types=(CROSS, DOWN), sample_size=64,
                                 # fmt: skip
                                 up_block_types=(UP, CROSS_UP), cross_attention_dim=24, layers_per_block=1)
    state = {convert.UNET + n: t for n, t in original_unet(model).items()}
    save_file(state, tmp_path / "model.safetensors")
    ours = convert.load_single_file(tmp_path / "model.safetensors")["unet"]
    assert ours.config == model.config
    model.save_pretrained(tmp_path / "unet")
    theirs = diffusers.UNet2DConditionModel.from_single_file(
        str(tmp_path / "model.safetensors"), config=str(tmp_path), subfolder="unet", local_files_only=True
    )
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(tensor, ours.state_dict()[name])
