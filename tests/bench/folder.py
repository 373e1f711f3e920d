"""A folder of SD 1.5's size and random weights (1.07 billion numbers, 4 GiB), made by diffusers' classes."""

from __future__ import annotations

from pathlib import Path

import torch

from miniclip import CLIPTokenizer
from tests.bench.models import UNET, VAE

TEXT = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
        "vocab_size": 49408, "projection_dim": 768}
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def write_folder(folder: Path) -> None:
    """As StableDiffusionPipeline.save_pretrained leaves one. The tokenizer is of few words."""
    import diffusers
    import transformers

    CLIPTokenizer.train(["a herb shop"] * 2, vocab_size=520).save_pretrained(folder / "tokenizer")
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(sample_size=64, **UNET)
    vae = diffusers.AutoencoderKL(sample_size=512, scaling_factor=0.18215, **VAE)
    text = transformers.CLIPTextModel(transformers.CLIPTextConfig(**TEXT))
    diffusers.StableDiffusionPipeline(
        vae=vae, text_encoder=text, unet=unet, scheduler=diffusers.PNDMScheduler(**SCHEDULE),
        tokenizer=transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer"), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False).save_pretrained(folder)
