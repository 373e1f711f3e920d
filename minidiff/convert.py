"""Single files of the original Stable Diffusion layout (.safetensors, .ckpt) to our models;
configs read off shapes.

Read after unet.py and vae.py. Mirrors: diffusers' loaders/single_file_utils.py,
and the layouts of the first releases:
CompVis' latent-diffusion (UNet, VAE), OpenAI's CLIP through transformers, OpenCLIP.
Renaming only: a table from a part's old prefix to its new one is built from the config, and a name is renamed
by the longest prefix that matches.
Symbols: L layers per level; in the old layout every resnet, attention or resampler has one running number.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from miniclip.config import CLIPTextConfig
from miniclip.convert import from_openai, size
from miniclip.files import WeightsError
from miniclip.model import CLIPTextModel, CLIPTextModelWithProjection
from miniclip.weights import listed, load_file, load_pickle, load_strict, skip_init
from minidiff.config import UNet2DConditionConfig
from minidiff.unet import UNet2DConditionModel
from minidiff.vae import AutoencoderKL, AutoencoderKLConfig

Table = dict[str, str]
State = dict[str, Tensor]

UNET = "model.diffusion_model."
VAES = ("first_stage_model.", "vae.")
# Text encoders: prefix, whose layout, and the part of the pipeline that it becomes
TEXTS = (
    ("cond_stage_model.transformer.", "clip", "text_encoder"),          # SD 1
    ("cond_stage_model.model.", "openclip", "text_encoder"),            # SD 2
    ("conditioner.embedders.0.transformer.", "clip", "text_encoder"),   # SDXL
    ("conditioner.embedders.1.model.", "openclip", "text_encoder_2"),   # SDXL
    ("conditioner.embedders.0.model.", "openclip", "text_encoder_2"),   # SDXL refiner
)  # fmt: skip
# What training leaves in a file beside the models: tables of the schedule, the EMA, the VAE's loss
LEFTOVERS = (
    "model_ema.", "first_stage_model.loss.", "first_stage_model.model_ema.", "loss.", "betas",
    "alphas_cumprod",
    "sqrt_", "log_one_minus_alphas_cumprod", "posterior_", "lvlb_weights", "logvar", "scale_factor",
    "denoiser.",
    "v_pred", "ztsnr", "edm_", "low_scale_model.", "global_step",
)  # fmt: skip

RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
VAE_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}


# --------------------------------------------------------------------------------------------- the whole file


def load_single_file(path: str | os.PathLike, torch_dtype: torch.dtype | None = None) -> dict[str, nn.Module]:
    """The models in one file, by their names in a pipeline: unet, vae, text_encoder, text_encoder_2.

    A bare VAE file gives {"vae": ...}. Models are in eval mode and float32, or in `torch_dtype`.
    Raises WeightsError for a file of another kind, and for tensors missing, unexpected or mis-shaped.
    """
    source = os.fspath(path)
    state = load_pickle(path) if source.endswith((".ckpt", ".pt", ".pth", ".bin")) else load_file(path)
    return build_models(state, source, torch_dtype)


def build_models(state: State, source: str, torch_dtype: torch.dtype | None = None) -> dict[str, nn.Module]:
    """The models whose tensors are in `state`, under their names in the original layout."""
    parts = split(state, source)
    models: dict[str, nn.Module] = {}
    for name, (layout, part) in parts.items():
        model_class, config, renamed = CONVERTERS[layout](part, is_sdxl(state), f"{source}: {name}")
        with skip_init():
            model = model_class(config).to(torch_dtype or torch.float32)
        load_strict(model, renamed, f"{source}: {name}", ignore=("position_ids",))
        models[name] = model.eval()
    return models


def split(state: State, source: str) -> dict[str, tuple[str, State]]:
    """The parts of a file: name -> (layout, tensors without their prefix).
    Anything unknown in it is an error."""
    prefixes = [(UNET, "unet", "unet"), *((prefix, "vae", "vae") for prefix in VAES), *TEXTS]
    if "encoder.conv_in.weight" in state and "encoder.down.0.block.0.conv1.weight" in state:
        prefixes = [("", "vae", "vae")]
    parts: dict[str, tuple[str, State]] = {}
    unknown = []
    for name, tensor in state.items():
        if name.startswith(LEFTOVERS):
            continue
        match = next((p for p in prefixes if name.startswith(p[0])), None)
        if match is None:
            unknown.append(name)
        else:
            parts.setdefault(match[2], (match[1], {}))[1][name.removeprefix(match[0])] = tensor
    if not parts:
        raise WeightsError(f"{source}: holds no UNet, VAE or text encoder in Stable Diffusion's original "
                           "layout")
    if unknown:
        raise WeightsError(f"{source}: unexpected tensors {listed(unknown)}")
    return parts


def is_sdxl(state: State) -> bool:
    """By its text encoders, or in a file of the UNet alone by the width of what is embedded beside the
    time."""
    label = state.get(UNET + "label_emb.0.0.weight")
    known = label is not None and label.ndim == 2 and label.shape[1] in (2816, 2560)
    return known or any(name.startswith("conditioner.embedders.") for name in state)


def scheduler_config(models: dict[str, nn.Module]) -> tuple[str, dict[str, Any]]:
    """The sampler that the release came with, as (class name, config), read off the models.

    SD 2 comes as v_prediction at 768 pixels (taken here, as upstream does) and as epsilon at 512;
    no shape tells.
    """
    config = models["unet"].config
    trained = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    if config.addition_embed_type == "text_time":
        return "EulerDiscreteScheduler", {**trained, "timestep_spacing": "leading"}
    if config.use_linear_projection:
        kind = "v_prediction" if config.in_channels == 4 else "epsilon"
        return "DDIMScheduler", {**trained, "prediction_type": kind, "clip_sample": False,
                                 "set_alpha_to_one": False}
    return "PNDMScheduler", {**trained, "skip_prk_steps": True, "set_alpha_to_one": False}


def rename(state: State, table: Table) -> State:
    """Names whose beginning (whole words between dots) is in the table get the new beginning; others stay."""
    renamed, most = {}, max(head.count(".") for head in table) + 1
    for name, tensor in state.items():
        words = name.split(".", most)[:most]
        heads = (".".join(words[:n]) for n in range(len(words), 0, -1))
        head = next((h for h in heads if h in table), None)
        renamed[name if head is None else table[head] + name[len(head) :]] = tensor
    return renamed


def one_or_all(values: list) -> Any:
    """A field that upstream writes as one number where all levels agree."""
    return values[0] if len(set(values)) == 1 else tuple(values)


# --------------------------------------------------------------------------------------------------- the UNet


def convert_unet(state: State, sdxl: bool, source: str) -> tuple[type, UNet2DConditionConfig, State]:
    """Class, config and renamed tensors of a UNet in the original layout. `source`: the file, for errors."""
    config = infer_unet(state, sdxl, source)
    return UNet2DConditionModel, config, rename(state, unet_table(config))


def infer_unet(state: State, sdxl: bool, source: str) -> UNet2DConditionConfig:
    """The config of a UNet from its shapes. Head counts leave no trace in shapes and follow the families'
    habits."""
    levels = list(_down_levels(state, source))          # [[(channels, attention depth), ...] per level]
    ups = list(_up_levels(state, [len(level) for level in levels], source))
    mid = _depth(state, "middle_block.1")
    depths = [[depth for _, depth in level] for level in levels]
    keys = next((name for name in state if name.endswith(".attn2.to_k.weight")), "any attn2.to_k.weight")
    context = size(state, keys, 1, source)
    channels = [level[0][0] for level in levels]
    fields: dict[str, Any] = {
        "in_channels": size(state, "input_blocks.0.0.weight", 1, source),
        "out_channels": size(state, "out.2.weight", 0, source),
        "block_out_channels": channels,
        "layers_per_block": one_or_all([len(level) for level in levels]),
        "down_block_types": ["CrossAttnDownBlock2D" if any(d) else "DownBlock2D" for d in depths],
        "up_block_types": ["CrossAttnUpBlock2D" if any(d) else "UpBlock2D" for d in ups],
        "mid_block_type": _mid_type(state),
        "cross_attention_dim": context,
        **_layer_depths(depths, ups, mid),
        **_attention_fields(state, channels, sdxl, context, source),
        **_label_fields(state, sdxl, source),
    }
    return UNet2DConditionConfig.from_dict(fields, source)


def _down_levels(state: State, source: str) -> Iterator[list[tuple[int, int]]]:
    """(channels, attention depth) of the resnets of each level on the way down;
    a strided convolution ends a level."""
    size(state, "input_blocks.1.0.in_layers.2.weight", 0, source)
    level: list[tuple[int, int]] = []
    for i in range(1, 10_000):
        resnet = f"input_blocks.{i}.0.in_layers.2.weight"
        if resnet in state:
            level.append((size(state, resnet, 0, source), _depth(state, f"input_blocks.{i}.1")))
        elif level:
            yield level
            level = []
            if f"input_blocks.{i}.0.op.weight" not in state:
                return
        else:
            raise WeightsError(f"{source}: input_blocks.{i} is missing, so its config cannot be derived")


def _up_levels(state: State, layers: list[int], source: str) -> Iterator[list[int]]:
    """Attention depths of each level on the way up, where a level has one resnet more."""
    i = 0
    for count in reversed(layers):
        for j in range(i, i + count + 1):
            size(state, f"output_blocks.{j}.0.in_layers.2.weight", 0, source)
        yield [_depth(state, f"output_blocks.{j}.1") for j in range(i, i + count + 1)]
        i += count + 1


def _depth(state: State, prefix: str) -> int:
    """The number of transformer blocks below a prefix."""
    depth = 0
    while f"{prefix}.transformer_blocks.{depth}.norm1.weight" in state:
        depth += 1
    return depth


def _mid_type(state: State) -> str | None:
    if "middle_block.0.in_layers.2.weight" not in state:
        return None
    return "UNetMidBlock2DCrossAttn" if _depth(state, "middle_block.1") else "UNetMidBlock2D"


def _layer_depths(downs: list[list[int]], ups: list[list[int]], mid: int) -> dict[str, Any]:
    """transformer_layers_per_block, and the way up where it is no mirror image.

    A level that does not attend gets the middle's depth at the bottom (the middle reads it there), else 1.
    """
    bottom = len(downs) - 1
    filled = [d if any(d) else [(mid if i == bottom else 0) or 1] for i, d in enumerate(downs)]
    down = [one_or_all(d) for d in filled]
    one_each = all(isinstance(d, int) for d in down)
    if one_each and all(set(u) <= {0, d} for u, d in zip(ups, down[::-1], strict=True)):
        attending = {d for d, depths in zip(down, downs, strict=True) if any(depths)}
        attending |= {mid} if mid else set()
        return {"transformer_layers_per_block": attending.pop() if len(attending) == 1 else down}
    up = [one_or_all(u if any(u) else [1]) for u in ups]
    return {"transformer_layers_per_block": down, "reverse_transformer_layers_per_block": up}


def _attention_fields(state: State, channels: list[int], sdxl: bool, context: int,
                      source: str) -> dict[str, Any]:
    """SD 1 has 8 heads everywhere; SD 2 and SDXL have heads 64 wide;
    the x4 upscaler (a class table) has 8 again."""
    linear = any(name.endswith(".1.proj_in.weight") and tensor.ndim == 2 for name, tensor in state.items())
    wide = linear and "label_emb.weight" not in state
    text_to_image = size(state, "input_blocks.0.0.weight", 1, source) == 4
    heads: Any = [max(c // 64, 1) for c in channels] if wide else 8
    only_cross = [_only_cross(state, i, c, context) for i, c in _first_attentions(state, channels)]
    return {
        "use_linear_projection": linear,
        "attention_head_dim": heads,
        "sample_size": 128 if sdxl or (linear and not wide) else 96 if linear and text_to_image else 64,
        "only_cross_attention": only_cross if any(only_cross) else False,
    }


def _first_attentions(state: State, channels: list[int]) -> Iterator[tuple[int, int]]:
    """For each level: the running number of its first part, and its channels."""
    i, level = 1, 0
    while level < len(channels):
        yield i, channels[level]
        while f"input_blocks.{i}.0.in_layers.2.weight" in state:
            i += 1
        i, level = i + 1, level + 1


def _only_cross(state: State, i: int, channels: int, context: int) -> bool:
    """Whether attn1 looks at the text, which shows where the text is not as wide as the level."""
    key = state.get(f"input_blocks.{i}.1.transformer_blocks.0.attn1.to_k.weight")
    return key is not None and key.ndim == 2 and key.shape[1] == context != channels


def _label_fields(state: State, sdxl: bool, source: str) -> dict[str, Any]:
    """What stands beside the time: SDXL's sizes, an image embedding (unCLIP), a class or noise level."""
    if "label_emb.weight" in state:
        return {"num_class_embeds": size(state, "label_emb.weight", 0, source)}
    if "label_emb.0.0.weight" not in state:
        return {}
    width = {"projection_class_embeddings_input_dim": size(state, "label_emb.0.0.weight", 1, source)}
    if sdxl:
        return {"addition_embed_type": "text_time", "addition_time_embed_dim": 256, **width}
    return {"class_embed_type": "projection", **width}


def unet_table(c: UNet2DConditionConfig) -> Table:
    """Old prefix -> new prefix, for every part of a UNet of this config."""
    label = "add_embedding" if c.addition_embed_type == "text_time" else "class_embedding"
    table = {
        "time_embed.0": "time_embedding.linear_1",
        "time_embed.2": "time_embedding.linear_2",
        "label_emb.0.0": f"{label}.linear_1",
        "label_emb.0.2": f"{label}.linear_2",
        "label_emb": "class_embedding",
        "input_blocks.0.0": "conv_in",
        "out.0": "conv_norm_out",
        "out.2": "conv_out",
        **_resnet_table("middle_block.0", "mid_block.resnets.0"),
        "middle_block.1": "mid_block.attentions.0",
        **_resnet_table("middle_block.2", "mid_block.resnets.1"),
    }
    layers, last = c.per_level("layers_per_block"), len(c.block_out_channels) - 1
    i = 1
    for level, count in enumerate(layers):
        for j in range(count):
            table |= _resnet_table(f"input_blocks.{i}.0", f"down_blocks.{level}.resnets.{j}")
            table[f"input_blocks.{i}.1"] = f"down_blocks.{level}.attentions.{j}"
            i += 1
        table[f"input_blocks.{i}.0.op"] = f"down_blocks.{level}.downsamplers.0.conv"
        i += level < last
    i = 0
    for level, count in enumerate(reversed(layers)):
        attends = c.up_block_types[level] == "CrossAttnUpBlock2D"
        for j in range(count + 1):
            table |= _resnet_table(f"output_blocks.{i}.0", f"up_blocks.{level}.resnets.{j}")
            if attends:
                table[f"output_blocks.{i}.1"] = f"up_blocks.{level}.attentions.{j}"
            i += 1
        # the upsampler shares the number of the level's last resnet
        table[f"output_blocks.{i - 1}.{1 + attends}.conv"] = f"up_blocks.{level}.upsamplers.0.conv"
    return table


def _resnet_table(old: str, new: str) -> Table:
    return {f"{old}.{a}": f"{new}.{b}" for a, b in RESNET.items()}


# ---------------------------------------------------------------------------------------------------- the VAE


def convert_vae(state: State, sdxl: bool, source: str) -> tuple[type, AutoencoderKLConfig, State]:
    """Class, config and renamed tensors of a VAE in the original layout. `source`: the file, for errors."""
    config = infer_vae(state, sdxl, source)
    renamed = rename(state, vae_table(config))
    for name, tensor in renamed.items():
        if ".attentions.0.to_" in name and tensor.ndim == 4:    # 1x1 convolutions became linear layers
            renamed[name] = tensor.flatten(1)
    return AutoencoderKL, config, renamed


def infer_vae(state: State, sdxl: bool, source: str) -> AutoencoderKLConfig:
    """The config of a VAE from its shapes. The scaling factor leaves no trace and follows the family."""
    channels, layers = [], 0
    while f"encoder.down.{len(channels)}.block.0.conv1.weight" in state:
        channels.append(size(state, f"encoder.down.{len(channels)}.block.0.conv1.weight", 0, source))
    while f"encoder.down.0.block.{layers}.conv1.weight" in state:
        layers += 1
    fields = {
        "in_channels": size(state, "encoder.conv_in.weight", 1, source),
        "out_channels": size(state, "decoder.conv_out.weight", 0, source),
        "down_block_types": ["DownEncoderBlock2D"] * len(channels),
        "up_block_types": ["UpDecoderBlock2D"] * len(channels),
        "block_out_channels": channels,
        "layers_per_block": layers,
        "latent_channels": size(state, "decoder.conv_in.weight", 1, source),
        "scaling_factor": 0.13025 if sdxl else 0.08333 if len(channels) == 3 else 0.18215,
        "sample_size": 1024 if sdxl else 512,
        "use_quant_conv": "quant_conv.weight" in state,
        "use_post_quant_conv": "post_quant_conv.weight" in state,
        "mid_block_add_attention": "encoder.mid.attn_1.norm.weight" in state,
    }
    return AutoencoderKLConfig.from_dict(fields, source)


def vae_table(c: AutoencoderKLConfig) -> Table:
    """Old prefix -> new prefix. The old decoder counts its levels from the picture, ours from the latents."""
    table: Table = {}
    levels = len(c.block_out_channels)
    for i in range(levels):
        for j in range(c.layers_per_block + 1):
            table |= _vae_block(f"encoder.down.{i}.block.{j}", f"encoder.down_blocks.{i}.resnets.{j}")
            table |= _vae_block(f"decoder.up.{i}.block.{j}",
                                f"decoder.up_blocks.{levels - 1 - i}.resnets.{j}")
        table[f"encoder.down.{i}.downsample.conv"] = f"encoder.down_blocks.{i}.downsamplers.0.conv"
        table[f"decoder.up.{i}.upsample.conv"] = f"decoder.up_blocks.{levels - 1 - i}.upsamplers.0.conv"
    for half in ("encoder", "decoder"):
        table |= _vae_block(f"{half}.mid.block_1", f"{half}.mid_block.resnets.0")
        table |= _vae_block(f"{half}.mid.block_2", f"{half}.mid_block.resnets.1")
        attention = f"{half}.mid_block.attentions.0"
        table |= {f"{half}.mid.attn_1.{a}": f"{attention}.{b}" for a, b in VAE_ATTENTION.items()}
        table[f"{half}.norm_out"] = f"{half}.conv_norm_out"
    return table


def _vae_block(old: str, new: str) -> Table:
    return {f"{old}.nin_shortcut": f"{new}.conv_shortcut", old: new}


# ------------------------------------------------------------------------------------------ the text encoders


def convert_clip(state: State, sdxl: bool, source: str) -> tuple[type, CLIPTextConfig, State]:
    """OpenAI's CLIP ViT-L as transformers names it, with or without the prefix text_model."""
    kept = {n: t for n, t in state.items() if not n.startswith(("logit_scale", "text_projection"))}
    kept = {n if n.startswith("text_model.") else f"text_model.{n}": t for n, t in kept.items()}
    return CLIPTextModel, infer_text(kept, source, "quick_gelu"), kept


def convert_openclip(state: State, sdxl: bool, source: str) -> tuple[type, CLIPTextConfig, State]:
    """OpenCLIP's text tower. SD 2 reads the last layer but one, so the last is left out;
    SDXL keeps all of it."""
    layers = 0
    while f"transformer.resblocks.{layers}.ln_1.weight" in state:
        layers += 1
    skipped = () if sdxl else (f"transformer.resblocks.{layers - 1}.", "text_projection")
    kept = {n: t for n, t in state.items() if not n.startswith(("logit_scale", *skipped))}
    renamed = from_openai(kept, source)
    model_class = CLIPTextModelWithProjection if sdxl else CLIPTextModel
    return model_class, infer_text(renamed, source, "gelu"), renamed


def infer_text(state: State, source: str, act: str) -> CLIPTextConfig:
    """The config of a text tower from its shapes; heads are 64 wide in every release."""
    vocabulary, width = (size(state, "text_model.embeddings.token_embedding.weight", axis, source)
                         for axis in (0, 1))
    projection, layers = "text_projection.weight", 0
    while f"text_model.encoder.layers.{layers}.layer_norm1.weight" in state:
        layers += 1
    fields = {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": size(state, "text_model.encoder.layers.0.mlp.fc1.weight", 0, source),
        "projection_dim": size(state, projection, 0, source) if projection in state else width,
        "num_hidden_layers": layers,
        "num_attention_heads": max(width // 64, 1),
        "max_position_embeddings": size(state, "text_model.embeddings.position_embedding.weight", 0, source),
        "hidden_act": act,
        "eos_token_id": vocabulary - 1,
        "bos_token_id": vocabulary - 2,
    }
    return CLIPTextConfig.from_dict(fields, source)


CONVERTERS = {"unet": convert_unet, "vae": convert_vae, "clip": convert_clip, "openclip": convert_openclip}
