"""UNet2DConditionModel against diffusers: random configurations, inputs of every kind, full sizes,
folders both ways."""

from __future__ import annotations

import random

import diffusers
import pytest
import torch

from minidiff import UNet2DConditionModel
from minidiff.trace import MODELS
from tests.parity.compare import assert_same_function, assert_same_keys

TEXT = 24


def random_config(seed: int) -> dict:
    """A configuration over the arguments that checkpoints use, tiny widths,
    any depth from one to four levels."""
    rng = random.Random(seed)
    levels = rng.randint(1, 4)
    attends = [rng.random() < 0.6 for _ in range(levels)]
    channels = [rng.choice((16, 32, 48)) for _ in range(levels)]
    dims = rng.choice((TEXT, [TEXT] * levels))
    config = {
        "in_channels": rng.choice((3, 4, 9)), "out_channels": rng.choice((3, 4)),
        "block_out_channels": channels, "norm_num_groups": rng.choice((4, 8)),
        "down_block_types": ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends],
        "up_block_types": ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)],
        "mid_block_type": rng.choice(("UNetMidBlock2DCrossAttn", "UNetMidBlock2DCrossAttn", "UNetMidBlock2D",
                                      None)),
        "layers_per_block": rng.choice((1, 2, [rng.randint(1, 2) for _ in range(levels)])),
        "attention_head_dim": rng.choice((1, 2, [rng.choice((1, 2, 4)) for _ in range(levels)])),
        "transformer_layers_per_block": rng.choice((1, 2, [rng.randint(1, 2) for _ in range(levels)])),
        "only_cross_attention": rng.choice((False, False, True, [rng.random() < 0.5 for _ in range(levels)])),
        "cross_attention_dim": dims, "use_linear_projection": rng.random() < 0.5,
        "act_fn": rng.choice(("silu", "silu", "mish", "gelu", "relu", "swish")),
        "flip_sin_to_cos": rng.random() < 0.7, "freq_shift": rng.choice((0, 0, 1)),
        "downsample_padding": rng.choice((1, 1, 0)), "mid_block_scale_factor": rng.choice((1, 1.4)),
        "norm_eps": rng.choice((1e-5, 1e-6)), "center_input_sample": rng.random() < 0.3,
        "time_cond_proj_dim": rng.choice((None, None, 12)), "encoder_hid_dim": rng.choice((None, None, 20)),
    }
    if config["encoder_hid_dim"] is not None:
        config["cross_attention_dim"] = TEXT
    if rng.random() < 0.3:
        config |= {"addition_embed_type": "text_time", "addition_time_embed_dim": 8,
                   "projection_class_embeddings_input_dim": 16 + 6 * 8}
    else:
        config |= rng.choice(({}, {}, {"num_class_embeds": 7}, {"class_embed_type": "timestep"},
                               {"class_embed_type": "projection",
                                "projection_class_embeddings_input_dim": 10},
                               {"class_embed_type": "simple_projection",
                                "projection_class_embeddings_input_dim": 10},
                               {"class_embed_type": "identity"}))
        if len(config) > 22:
            config["class_embeddings_concat"] = rng.random() < 0.3
    return config


def random_inputs(config: dict, seed: int, dtype: torch.dtype) -> tuple[tuple, dict]:
    """Odd sizes, masks, class labels, residuals: whatever the configuration takes, sometimes left out."""
    rng, g = random.Random(seed), torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)

    least = 3 if config["downsample_padding"] else 11      # unpadded halving needs something to halve
    height, width, tokens = rng.randint(least, 17), rng.randint(least, 17), rng.randint(1, 6)
    sample = randn(2, config["in_channels"], height, width)
    text = randn(2, tokens, config["encoder_hid_dim"] or TEXT)
    time = rng.choice((7, 12.5, torch.tensor(500), torch.tensor([3]), torch.tensor([999, 0])))
    extra: dict = {}
    if config["time_cond_proj_dim"]:
        extra["timestep_cond"] = randn(2, 12)
    if "addition_embed_type" in config:
        extra["added_cond_kwargs"] = {"text_embeds": randn(2, 16), "time_ids": randn(2, 6) * 500}
    if "num_class_embeds" in config:
        extra["class_labels"] = torch.tensor([1, 6])
    elif "class_embed_type" in config:
        wide = {"timestep": (), "identity": (4 * config["block_out_channels"][0],
                                             )}.get(config["class_embed_type"], (10,))
        extra["class_labels"] = randn(2, *wide)
    if rng.random() < 0.5:
        keep = torch.rand(2, tokens, generator=g) < 0.7
        keep[:, 0] = True
        extra["encoder_attention_mask"] = rng.choice((keep, keep.long(), keep.to(dtype)))
    return (sample, time, text), extra


@pytest.mark.parametrize("seed", range(60))
def test_random_configuration(seed: int) -> None:
    config = random_config(seed)
    torch.manual_seed(seed)
    theirs, ours = diffusers.UNet2DConditionModel(**config), UNet2DConditionModel(**config)
    dtype = torch.float64 if seed % 3 else torch.float32
    inputs, extra = random_inputs(config, seed, dtype)
    assert_same_function(ours, theirs, lambda model: model(*inputs, **extra).sample, dtype)


SMALL = {"block_out_channels": (16, 32), "norm_num_groups": 8, "cross_attention_dim": TEXT,
         "attention_head_dim": 2,
         "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "layers_per_block": 1,
         "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")}


def skips_of(model: torch.nn.Module, x: torch.Tensor, text: torch.Tensor) -> list[torch.Size]:
    """The shapes a ControlNet's residuals must have: conv_in's map and every resnet's and downsampler's."""
    shapes = []
    hooks = [m.register_forward_hook(lambda _, __, out: shapes.append(out.shape))
             for name, m in model.named_modules()
             if name == "conv_in" or (name.startswith("down_blocks") and name.count(".") == 3
                                      and ("attentions" not in name))]
    model(x, 5, text)
    for hook in hooks:
        hook.remove()
    return shapes


def test_controlnet_residuals() -> None:
    ours, theirs = UNet2DConditionModel(**SMALL), diffusers.UNet2DConditionModel(**SMALL)
    x, text = torch.randn(2, 4, 9, 12).double(), torch.randn(2, 3, TEXT).double()
    shapes = skips_of(ours.double(), x, text)
    down, mid = [torch.randn(s).double() for s in shapes], torch.randn(2, 32, 5, 6).double()
    call = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
    assert_same_function(ours, theirs, lambda model: model(x, 5, text, **call).sample)


@pytest.mark.parametrize("types", [("DownBlock2D", "CrossAttnDownBlock2D"),
                                   ("CrossAttnDownBlock2D", "DownBlock2D")])
@pytest.mark.parametrize("argument", ["down_intrablock_additional_residuals",
                                      "down_block_additional_residuals"])
def test_t2i_adapter_residuals(types: tuple, argument: str) -> None:
    config = {**SMALL, "down_block_types": types,
              "up_block_types": tuple(t.replace("Down", "Up") for t in types[::-1])}
    ours, theirs = UNet2DConditionModel(**config), diffusers.UNet2DConditionModel(**config)
    x, text = torch.randn(2, 4, 8, 8).double(), torch.randn(2, 3, TEXT).double()
    # where a level attends, the residual comes before its halving
    sizes = [8 if "Cross" in types[0] else 4, 4]
    residuals = [torch.randn(2, c, s, s).double() for c, s in zip((16, 32), sizes, strict=True)]
    assert_same_function(ours, theirs, lambda m: m(x, 5, text,
                                                   **{argument: [r.clone() for r in residuals]}).sample)


def test_self_attention_mask() -> None:
    config = {**SMALL, "down_block_types": ("CrossAttnDownBlock2D",),
              "up_block_types": ("CrossAttnUpBlock2D",),
              "block_out_channels": (16,), "mid_block_type": None}
    ours, theirs = UNet2DConditionModel(**config), diffusers.UNet2DConditionModel(**config)
    x, text = torch.randn(2, 4, 3, 5).double(), torch.randn(2, 3, TEXT).double()
    mask = (torch.arange(15) % 4 != 1).expand(2, 15)
    assert_same_function(ours, theirs, lambda m: m(x, 5, text, attention_mask=mask).sample)


def test_gradient_checkpointing_changes_nothing() -> None:
    ours, theirs = UNet2DConditionModel(**SMALL), diffusers.UNet2DConditionModel(**SMALL)
    ours.enable_gradient_checkpointing()
    theirs.enable_gradient_checkpointing()
    x, text = torch.randn(2, 4, 9, 12).double(), torch.randn(2, 3, TEXT).double()
    assert_same_function(ours, theirs, lambda model: model(x, 5, text).sample)


FULL = {
    "sd15": (859_520_964, MODELS["sd15"]), "sd21": (865_910_724, MODELS["sd21"]),
    "sdxl": (2_567_463_684, MODELS["sdxl"]),
    "ssd-1b": (1_331_334_404, {
        **MODELS["sdxl"], "mid_block_type": "UNetMidBlock2D",
        "transformer_layers_per_block": [1, [2, 2], [4, 4]],
        "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 1]}),
}


@pytest.mark.parametrize("name", FULL)
def test_full_size_on_the_meta_device(name: str) -> None:
    count, config = FULL[name]
    with torch.device("meta"):
        ours, theirs = UNet2DConditionModel(**config), diffusers.UNet2DConditionModel(**config)
    assert_same_keys(ours, theirs)
    assert ours.num_parameters() == theirs.num_parameters() == count


def test_folders_open_both_ways(tmp_path) -> None:
    torch.manual_seed(0)
    theirs, ours = diffusers.UNet2DConditionModel(**SMALL), UNet2DConditionModel(**SMALL)
    theirs.save_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    x, text = torch.randn(2, 4, 9, 12), torch.randn(2, 3, TEXT)
    for original, copy in ((theirs, UNet2DConditionModel.from_pretrained(tmp_path / "theirs")),
                           (ours, diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "ours"))):
        assert_same_keys(original, copy)
        assert all(torch.equal(a, b) for a, b in zip(original.state_dict().values(),
                                                     copy.state_dict().values(), strict=True))
        error = (original.eval()(x, 5, text).sample - copy(x, 5, text).sample).abs().max()
        assert error <= 2e-6 * original(x, 5, text).sample.abs().max()
