"""UNet2DConditionModel without upstream: keys of real checkpoints, inputs, folders, clear errors, kernels."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from miniclip.weights import WeightsError, read_json, write_json
from minidiff import UNet2DConditionConfig, UNet2DConditionModel
from minidiff.attention import Attention, plain_attention
from minidiff.config import ConfigError

SMALL = {"block_out_channels": (16, 32), "norm_num_groups": 8, "cross_attention_dim": 24,
         "attention_head_dim": 2,
         "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "layers_per_block": 1,
         "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")}
GOLDEN = read_json(Path(__file__).parent / "golden" / "unet_keys.json")


def small(**more) -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(**{**SMALL, **more}).eval()


def inputs(batch: int = 2, height: int = 8, width: int = 8) -> tuple:
    g = torch.Generator().manual_seed(1)
    return torch.randn(batch, 4, height, width, generator=g), 5, torch.randn(batch, 3, 24, generator=g)


@pytest.mark.parametrize("name", list(GOLDEN))
def test_keys_shapes_and_order_of_real_checkpoints(name: str) -> None:
    with torch.device("meta"):
        model = UNet2DConditionModel(**GOLDEN[name]["config"])
    keys = "\n".join(f"{k} {'x'.join(map(str, v.shape))}" for k, v in model.state_dict().items())
    assert keys == GOLDEN[name]["keys"]
    assert model.num_parameters() == GOLDEN[name]["parameters"]


def test_output_is_read_in_three_ways() -> None:
    out = small()(*inputs())
    assert out.sample is out[0] is out["sample"]
    assert torch.equal(small()(*inputs(), return_dict=False)[0], out.sample)


@pytest.mark.parametrize("height,width", [(1, 1), (3, 2), (17, 23), (8, 5)])
def test_any_size(height: int, width: int) -> None:
    assert small()(*inputs(2, height, width)).sample.shape == (2, 4, height, width)


def test_timestep_in_every_form_is_the_same() -> None:
    model, (x, _, text) = small(), inputs()
    forms = (7, 7.0, torch.tensor(7), torch.tensor([7]), torch.tensor([7, 7]),
             torch.tensor(7.0, dtype=torch.float64))
    outputs = [model(x, t, text).sample for t in forms]
    assert all(torch.equal(outputs[0], other) for other in outputs[1:])
    apart = model(x, torch.tensor([7, 900]), text).sample
    assert torch.allclose(apart[0], outputs[0][0], atol=1e-6)
    assert not torch.allclose(apart[1], outputs[0][1], atol=1e-3)


def test_a_mask_that_drops_the_last_token_equals_leaving_it_out() -> None:
    model, (x, t, text) = small(), inputs()
    mask = torch.tensor([[1, 1, 0], [1, 1, 0]])
    shorter = model(x, t, text[:, :2]).sample
    assert torch.allclose(model(x, t, text, encoder_attention_mask=mask).sample, shorter, atol=1e-6)


def test_residual_lists_of_the_caller_stay_whole() -> None:
    residuals = [torch.zeros(2, 16, 4, 4), torch.zeros(2, 32, 4, 4)]
    small()(*inputs(), down_intrablock_additional_residuals=residuals)
    assert len(residuals) == 2


def test_fused_attention_is_the_written_out_one() -> None:
    torch.manual_seed(0)
    layer = Attention(32, 24, heads=4).double()
    x, text = torch.randn(2, 9, 32).double(), torch.randn(2, 5, 24).double()
    mask = torch.zeros(2, 1, 5).double().index_fill_(2, torch.tensor([3]), -10000.0)
    q, k, v = layer.split(layer.to_q(x)), layer.split(layer.to_k(text)), layer.split(layer.to_v(text))
    by_hand = layer.to_out(plain_attention(q, k, v, mask[:, None]).transpose(1, 2).flatten(2))
    assert (layer(x, text, mask) - by_hand).abs().max() < 1e-14


def test_dropout_acts_in_training_only() -> None:
    model = small(dropout=0.5)
    assert torch.equal(model(*inputs()).sample, model(*inputs()).sample)
    model.train()
    assert not torch.equal(model(*inputs()).sample, model(*inputs()).sample)


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    plain, saving = small(), small()
    saving.enable_gradient_checkpointing()
    assert saving.is_gradient_checkpointing and not plain.is_gradient_checkpointing
    for model in (plain, saving):
        model.train()(*inputs()).sample.square().mean().backward()
    assert all(torch.allclose(p.grad, q.grad, atol=1e-7) for p, q in
               zip(plain.parameters(), saving.parameters(), strict=True))


def test_a_folder_gives_back_the_same_model(tmp_path) -> None:
    model = small()
    model.save_pretrained(tmp_path)
    copy = UNet2DConditionModel.from_pretrained(tmp_path)
    assert copy.config == model.config and not copy.training
    assert torch.equal(copy(*inputs()).sample, model(*inputs()).sample)
    assert UNet2DConditionModel.from_config(model.config).config == model.config
    half = UNet2DConditionModel.from_pretrained(tmp_path, torch_dtype=torch.float16)
    assert half.dtype == torch.float16


def test_config_reads_as_upstream() -> None:
    config = small().config
    assert config.in_channels == config["in_channels"] == dict(config)["in_channels"] == 4
    assert UNet2DConditionConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize("change,words", [
    ({"frobnicate": 1}, "unknown field 'frobnicate'"),
    ({"norm_eps": "small"}, "norm_eps = 'small'"),
    ({"in_channels": True}, "in_channels = True"),
    ({"attention_head_dim": 5}, "attention_head_dim = 5"),
    ({"norm_num_groups": 7}, "norm_num_groups = 7"),
    ({"block_out_channels": (16, 32, 48)}, "block_out_channels"),
    ({"down_block_types": ("DownBlock2D", "AttnDownBlock2D")}, "unknown block 'AttnDownBlock2D'"),
    ({"mid_block_type": "Mid"}, "unknown block 'Mid'"),
    ({"dual_cross_attention": True}, "dual_cross_attention = True is not supported"),
    ({"resnet_time_scale_shift": "scale_shift"}, "resnet_time_scale_shift"),
    ({"num_attention_heads": 8}, "num_attention_heads"),
    ({"transformer_layers_per_block": (1, (1, 2))}, "reverse_transformer_layers_per_block"),
    ({"class_embed_type": "projection"}, "projection_class_embeddings_input_dim"),
    ({"addition_embed_type": "text_time", "projection_class_embeddings_input_dim": 8},
     "addition_time_embed_dim"),
    ({"encoder_hid_dim_type": "text_proj"}, "encoder_hid_dim"),
    ({"layers_per_block": 0}, "layers_per_block = 0"),
])
def test_what_a_config_cannot_mean_is_one_clear_line(change: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words.replace("(", r"\(")) as error:
        small(**change)
    assert "\n" not in str(error.value)


def test_real_config_files_of_two_generations_are_read() -> None:
    early = {"_class_name": "UNet2DConditionModel", "_diffusers_version": "0.6.0", "act_fn": "silu",
             "sample_size": 64,
             "attention_head_dim": 8, "cross_attention_dim": 768}
    late = {**early, "dual_cross_attention": False, "num_class_embeds": None, "upcast_attention": None,
            "conv_in_kernel": 3, "time_embedding_type": "positional", "num_attention_heads": None}
    assert UNet2DConditionConfig.from_dict(early) == UNet2DConditionConfig.from_dict(late)


@pytest.mark.parametrize("change,words", [
    ({"sample": torch.zeros(2, 3, 8, 8)}, "sample is"),
    ({"encoder_hidden_states": torch.zeros(1, 3, 24)}, "encoder_hidden_states is"),
    ({"encoder_hidden_states": torch.zeros(2, 3, 25)}, "25 wide"),
    ({"timestep": torch.tensor([1, 2, 3])}, "timestep has 3"),
    ({"encoder_attention_mask": torch.ones(2, 4)}, "mask covers 4"),
    ({"down_block_additional_residuals": [torch.zeros(1)], "mid_block_additional_residual": torch.zeros(1)},
     "skips"),
    ({"cross_attention_kwargs": {"gligen": 1}}, "gligen"),
])
def test_inputs_that_do_not_fit_are_one_clear_line(change: dict, words: str) -> None:
    x, t, text = inputs()
    with pytest.raises(ValueError, match=words):
        small()(**{"sample": x, "timestep": t, "encoder_hidden_states": text, **change})


def test_conditions_that_are_missing_are_named() -> None:
    with pytest.raises(ValueError, match="class_labels"):
        small(num_class_embeds=3)(*inputs())
    sdxl = small(addition_embed_type="text_time", addition_time_embed_dim=8,
                 projection_class_embeddings_input_dim=64)
    with pytest.raises(ValueError, match="text_embeds"):
        sdxl(*inputs())
    x, t, _ = inputs()
    with pytest.raises(ValueError, match=r"encoder_hidden_states are missing: .* \[2, tokens, 24\]"):
        small()(x, t)
    with pytest.raises(ValueError, match=r"\[2, tokens, 40\]"):
        small(encoder_hid_dim=40, encoder_hid_dim_type="text_proj")(x, t)
    plain = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    # no text to attend to
    assert small(**plain, mid_block_type="UNetMidBlock2D")(x, t).sample.shape == x.shape


def test_a_broken_folder_is_one_clear_line(tmp_path) -> None:
    small().save_pretrained(tmp_path)
    config = read_json(tmp_path / "config.json")
    write_json(tmp_path / "config.json", {**config, "norm_num_groups": 7})
    with pytest.raises(ConfigError, match=r"config.json.*norm_num_groups = 7"):
        UNet2DConditionModel.from_pretrained(tmp_path)
    write_json(tmp_path / "config.json", {**config, "layers_per_block": 2})
    with pytest.raises(WeightsError, match="missing"):
        UNet2DConditionModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("fields", [
    {"layers_per_block": 10**6}, {"layers_per_block": 2**63}, {"layers_per_block": 0},
    {"transformer_layers_per_block": 10**6}, {"transformer_layers_per_block": [1, 10**6]},
    {"layers_per_block": 60, "transformer_layers_per_block": 250},
    {"transformer_layers_per_block": [[1], [1]], "reverse_transformer_layers_per_block": [[1], [1]]},
    {"transformer_layers_per_block": [1, [[1]]]}, {"block_out_channels": [2**40, 2**40]},
    {"block_out_channels": [-32, -32]}, {"block_out_channels": []}, {"in_channels": 0}, {"in_channels": 1e30},
    {"in_channels": 10**30}, {"norm_num_groups": 0}, {"norm_eps": -1}, {"norm_eps": float("nan")},
    {"dropout": 7}, {"attention_head_dim": 0}, {"sample_size": [64]}, {"freq_shift": float("inf")},
    {"down_block_types": ["DownBlock2D"] * 10**5}, {"num_class_embeds": 2**62}, {"encoder_hid_dim": -1},
    {"cross_attention_dim": "x" * 10**6}, {"mid_block_type": "x" * 10**6}, {"mid_block_scale_factor": 0},
])  # fmt: skip
def test_a_config_that_asks_for_too_much_or_nothing(fields: dict) -> None:
    """One line that names a field, before anything is built."""
    with pytest.raises(ConfigError) as caught:
        UNet2DConditionConfig.from_dict({**SMALL, **fields}, "config.json")
    message = str(caught.value)
    assert message.startswith("config.json: ") and len(message) < 500 and "\n" not in message
    assert any(name in message for name in fields)
