"""Single files of the original layout, without upstream: written by the tables read backwards, then read."""

import random
import time

import pytest
import torch

from miniclip.config import CLIPTextConfig
from miniclip.convert import to_openai
from miniclip.model import CLIPTextModel, CLIPTextModelWithProjection
from miniclip.weights import WeightsError, save_file
from minidiff import convert
from minidiff.unet import UNet2DConditionModel
from minidiff.vae import AutoencoderKL

torch.set_num_threads(1)

CROSS, DOWN, UP, CROSS_UP = "CrossAttnDownBlock2D", "DownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"
SMALL = {
    "down_block_types": (CROSS, DOWN), "up_block_types": (UP, CROSS_UP), "layers_per_block": 1,
    "sample_size": 64,
    "block_out_channels": (32, 64), "cross_attention_dim": 64, "attention_head_dim": 8,
}  # fmt: skip
LINEAR = {
    **SMALL, "block_out_channels": (64, 128), "attention_head_dim": (1, 2), "use_linear_projection": True,
    "sample_size": 96,
}  # fmt: skip
SDXL = {
    **LINEAR, "cross_attention_dim": 128, "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 64 + 6 * 256, "transformer_layers_per_block": (1, 2),
    "sample_size": 128,
}  # fmt: skip
VAE = {
    "block_out_channels": (32, 64), "down_block_types": ("DownEncoderBlock2D",) * 2, "sample_size": 512,
    "up_block_types": ("UpDecoderBlock2D",) * 2, "layers_per_block": 2,
}  # fmt: skip


def text(layers=2, act="quick_gelu", cls=CLIPTextModel):
    return cls(
        CLIPTextConfig(
            vocab_size=50, hidden_size=64, intermediate_size=80, num_hidden_layers=layers,
            num_attention_heads=1,
            max_position_embeddings=9, projection_dim=64, hidden_act=act, bos_token_id=48, eos_token_id=49,
        )  # fmt: skip
    )


def backwards(state, table):
    return convert.rename(state, {new: old for old, new in table.items()})


def single_file(kind):
    """(models by name, the tensors of a single file that holds them)."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**{"sd1": SMALL, "sd2": LINEAR, "sdxl": SDXL}[kind])
    scaling = {"scaling_factor": 0.13025, "sample_size": 1024} if kind == "sdxl" else {}
    vae = AutoencoderKL(**{**VAE, **scaling})
    models = {"unet": unet, "vae": vae}
    state = {convert.UNET + n: t for n, t in backwards(unet.state_dict(),
                                                       convert.unet_table(unet.config)).items()}
    for name, tensor in backwards(vae.state_dict(), convert.vae_table(vae.config)).items():
        is_attention = ".attn_1." in name and ".norm." not in name and tensor.ndim == 2
        state["first_stage_model." + name] = tensor[:, :, None, None] if is_attention else tensor
    if kind == "sd2":
        whole = text(3, "gelu")
        models["text_encoder"] = text(2, "gelu")
        models["text_encoder"].load_state_dict({n: t for n, t in whole.state_dict().items()
                                                if ".layers.2." not in n})
        old = {**to_openai(whole.state_dict()), "text_projection": torch.ones(64, 64),
               "logit_scale": torch.ones(())}
        state |= {"cond_stage_model.model." + n: t for n, t in old.items()}
    else:
        models["text_encoder"] = text()
        prefix = "conditioner.embedders.0.transformer." if kind == "sdxl" else "cond_stage_model.transformer."
        state |= {prefix + n: t for n, t in models["text_encoder"].state_dict().items()}
        state[prefix + "text_model.embeddings.position_ids"] = torch.arange(9)[None]
    if kind == "sdxl":
        models["text_encoder_2"] = text(3, "gelu", CLIPTextModelWithProjection)
        old = to_openai(models["text_encoder_2"].state_dict())
        state |= {"conditioner.embedders.1.model." + n: t for n, t in old.items()}
    state |= {"betas": torch.ones(3), "model_ema.decay": torch.ones(()),
              "model_ema.num_updates": torch.ones(())}
    return models, {n: t.contiguous() for n, t in state.items()}


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
@pytest.mark.parametrize("suffix", ["safetensors", "ckpt"])
def test_single_files(tmp_path, kind, suffix):
    models, state = single_file(kind)
    path = tmp_path / f"model.{suffix}"
    if suffix == "ckpt":
        torch.save({"state_dict": state, "global_step": 7}, path)
    else:
        save_file(state, path)
    read = convert.load_single_file(path)
    assert set(read) == set(models)
    for name, model in models.items():
        assert read[name].config == model.config and not read[name].training
        for key, tensor in model.state_dict().items():
            assert torch.equal(read[name].state_dict()[key], tensor), (name, key)
    half = convert.load_single_file(path, torch.float16)
    assert all(model.dtype == torch.float16 for model in half.values())


def test_the_original_names_are_the_original_names():
    """A few names as they stand in the released files, one of each kind."""
    _, state = single_file("sd1")
    for name in (
        "model.diffusion_model.time_embed.0.weight",
        "model.diffusion_model.input_blocks.0.0.weight",
        "model.diffusion_model.input_blocks.1.0.in_layers.0.weight",
        "model.diffusion_model.input_blocks.1.0.emb_layers.1.weight",
        "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight",
        "model.diffusion_model.input_blocks.2.0.op.weight",
        "model.diffusion_model.input_blocks.3.0.skip_connection.weight",
        "model.diffusion_model.middle_block.1.proj_in.weight",
        "model.diffusion_model.middle_block.2.out_layers.3.weight",
        "model.diffusion_model.output_blocks.1.1.conv.weight",
        "model.diffusion_model.output_blocks.2.1.norm.weight",
        "model.diffusion_model.out.2.bias",
        "first_stage_model.encoder.down.0.downsample.conv.weight",
        "first_stage_model.encoder.mid.attn_1.q.weight",
        "first_stage_model.decoder.up.1.upsample.conv.weight",
        "first_stage_model.decoder.up.0.block.0.nin_shortcut.weight",
        "first_stage_model.decoder.norm_out.weight",
        "first_stage_model.quant_conv.weight",
        "cond_stage_model.transformer.text_model.encoder.layers.0.self_attn.q_proj.weight",
    ):
        assert name in state, name


def test_a_vae_alone(tmp_path):
    models, state = single_file("sd1")
    bare = {n.removeprefix("first_stage_model."): t
            for n, t in state.items() if n.startswith("first_stage_model.")}
    save_file({**bare, "loss.logvar": torch.ones(())}, tmp_path / "vae.safetensors")
    read = convert.load_single_file(tmp_path / "vae.safetensors")
    assert list(read) == ["vae"]
    assert all(torch.equal(t, models["vae"].state_dict()[n]) for n, t in read["vae"].state_dict().items())


def test_samplers_of_the_releases():
    for kind, name in (("sd1", "PNDMScheduler"), ("sd2", "DDIMScheduler"),
                       ("sdxl", "EulerDiscreteScheduler")):
        models, _ = single_file(kind)
        chosen, config = convert.scheduler_config(models)
        assert chosen == name and config["beta_end"] == 0.012 and config["steps_offset"] == 1
        assert config.get("prediction_type") == ("v_prediction" if kind == "sd2" else None)


def broken(change):
    _, state = single_file("sd1")
    change(state)
    return state


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda s: s.pop("model.diffusion_model.out.2.bias"), "1 missing: conv_out.bias"),
        (lambda s: s.update({"model.diffusion_model.extra.weight": torch.ones(1)}),
         "1 unexpected: extra.weight"),
        (lambda s: s.update({"control_model.x": torch.ones(1)}), "unexpected tensors control_model.x"),
        (lambda s: s.update({"model.diffusion_model.out.2.bias": torch.ones(5)}),
         "conv_out.bias [5] for [4]"),
        (lambda s: s.pop("model.diffusion_model.out.2.weight"), "out.2.weight is missing"),
        (lambda s: s.pop("model.diffusion_model.input_blocks.1.0.in_layers.2.weight"),
         "input_blocks.1.0.in_layers.2"),
        (lambda s: s.pop("model.diffusion_model.output_blocks.1.0.in_layers.2.weight"),
         "output_blocks.1.0.in_layers.2"),
        (lambda s: s.pop("first_stage_model.encoder.conv_in.weight"), "encoder.conv_in.weight is missing"),
        (lambda s: s.clear(), "holds no UNet, VAE or text encoder"),
        (lambda s: [s.clear(), s.update({"lora_unet_down.alpha": torch.ones(1)})], "holds no UNet"),
    ],
)
def test_files_that_do_not_fit(tmp_path, change, word):
    save_file(broken(change), tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match="model.safetensors") as caught:
        convert.load_single_file(tmp_path / "model.safetensors")
    assert word in str(caught.value) and "\n" not in str(caught.value)


def test_files_of_no_kind(tmp_path):
    with pytest.raises(WeightsError, match="cannot be read"):
        convert.load_single_file(tmp_path / "none.safetensors")
    (tmp_path / "text.ckpt").write_text("hello")
    with pytest.raises(WeightsError, match="neither a zip archive nor a pickle"):
        convert.load_single_file(tmp_path / "text.ckpt")


def test_fuzzed_files_load_or_raise_one_error():
    """Tensors lost, renamed, reshaped: a ValueError that names the file, and nothing else."""
    rng, (_, good) = random.Random(5), single_file("sdxl")
    outcomes = {"loaded": 0, "refused": 0}
    for _ in range(150):
        state = dict(good)
        for _ in range(rng.choice([1, 1, 2, 50])):
            name = rng.choice(list(state))
            tensor, way = state.pop(name), rng.randrange(5)
            if way == 0:
                state[name.replace(str(rng.randrange(4)), str(rng.randrange(12)))] = tensor
            elif way == 1:
                state[name] = tensor.flatten()
            elif way == 2:
                state[name] = torch.zeros(()) if rng.random() < 0.5 else torch.zeros(0, 3)
            elif way == 3:
                state[name] = tensor[..., None]
        try:
            convert.build_models(state, "file")
            outcomes["loaded"] += 1
        except ValueError as error:
            assert str(error).startswith("file") and "\n" not in str(error)
            outcomes["refused"] += 1
    assert outcomes["refused"] > 100


def test_hostile_names_end_in_one_error(tmp_path):
    """A file may claim endless levels or odd shapes: the reader stops, and says what is wrong."""
    prefix = "model.diffusion_model."
    odd = {f"{prefix}input_blocks.{i}.0.in_layers.2.weight": torch.ones(1) for i in range(1, 60)}
    odd |= {f"{prefix}input_blocks.0.0.weight": torch.ones(()), f"{prefix}out.2.weight": torch.ones(())}
    save_file(odd, tmp_path / "odd.safetensors")
    with pytest.raises(ValueError, match="odd.safetensors"):
        convert.load_single_file(tmp_path / "odd.safetensors")


def test_a_name_of_many_words_takes_linear_time():
    name = "." * 400_000
    began = time.monotonic()
    assert list(convert.rename({name: torch.zeros(1)}, {"a.b": "c"})) == [name]
    assert time.monotonic() - began < 1


@pytest.mark.parametrize("change, words", [
    ({"cond_stage_model.model.transformer.resblocks.x.ln_1.weight": torch.zeros(1)}, "unexpected"),
    ({"cond_stage_model.model.transformer.resblocks.0.attn.in_proj_bias": torch.zeros(())}, "cannot be cut"),
    ({"cond_stage_model.model.token_embedding.weight": torch.zeros(0, 64)}, "has the shape"),
])  # fmt: skip
def test_odd_text_towers_are_one_line(change, words, tmp_path):
    _, state = single_file("sd2")
    save_file({**state, **change}, tmp_path / "a.safetensors")
    with pytest.raises(WeightsError, match=f"a.safetensors.*{words}") as caught:
        convert.load_single_file(tmp_path / "a.safetensors")
    assert "\n" not in str(caught.value)
