"""Fine-tuning what others trained: a Stable Diffusion model behind the face of a Writer.

Read after writer.py and lora.py. Papers: Rombach 2022 (diffusion in a VAE's latents).
Only the UNet learns; VAE and text encoder stay as they are, so a picture's latents and a caption's states never change:
they are computed once and kept on the disk. Jitter and flips would change pictures, so they are refused here.
Shapes: N pictures, B batch, S picture size, L latent channels, f the VAE's factor, [B, L, S/f, S/f] in the UNet.
"""

from __future__ import annotations

import zlib
from pathlib import Path

import torch
from torch import Tensor

from miniclip.weights import WeightsError, load_file, save_file
from minidiff import DDPMScheduler
from minidiff.pipeline import StableDiffusionPipeline
from train.common import UserError
from train.writer import PictureFormat, Writer


class LatentWriter(Writer):
    """Folds by the VAE's encoder (the mean of its Gaussian) and unfolds by its decoder."""

    def __init__(self, pipe: StableDiffusionPipeline, size: int, captions: list[str]):
        scheduler = DDPMScheduler.from_config(pipe.scheduler.config, clip_sample=False)      # latents pass 1
        super().__init__(pipe.unet, pipe.text_encoder, pipe.tokenizer, scheduler, PictureFormat(size, 3, pipe.factor),
                         list(dict.fromkeys(captions)))
        self.vae, self.pipe = pipe.vae, pipe
        self.vae.requires_grad_(False)
        self.text_encoder.requires_grad_(False)
        self.states: dict[str, Tensor] = {}         # of each caption, [S, D]

    @torch.no_grad()
    def fold(self, pictures: Tensor) -> Tensor:
        mean, std = self.pipe._statistics(pictures)
        return (self.vae.encode(pictures).latent_dist.mode() - mean) * self.vae.config.scaling_factor / std

    @torch.no_grad()
    def unfold(self, x: Tensor) -> Tensor:
        return self.pipe._decode(x)

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Tensor:
        for prompt in dict.fromkeys(p for p in prompts if p not in self.states):
            self.states[prompt] = super().encode([prompt])[0]
        return torch.stack([self.states[prompt] for prompt in prompts]).to(self.device)

    def save(self, folder: str | Path) -> None:
        """A whole model folder, that minidiff and diffusers open."""
        self.pipe.save_pretrained(folder)

    def latents(self, pictures: Tensor, cache: Path, key: str) -> Tensor:
        """[N, 3, S, S] -> [N, L, S/f, S/f], from the disk if they were made before from the same pictures and VAE."""
        weights = zlib.crc32(b"".join(p.detach().cpu().numpy().tobytes() for p in list(self.vae.parameters())[:4]))
        path = cache / f"{key}-{weights:08x}.safetensors"
        prompts = ["", *self.captions]
        if path.exists():
            try:
                kept = load_file(path, mmap=False)
                self.states = dict(zip(prompts, kept["states"], strict=True))
                return kept["latents"].to(self.device)
            except (WeightsError, KeyError, ValueError):
                print(f"{path}: damaged; encoding again")
        latents = torch.cat([self.fold(part) for part in pictures.split(8)])
        states = self.encode(prompts)
        cache.mkdir(parents=True, exist_ok=True)
        save_file({"latents": latents, "states": states}, path)
        return latents


def load_pipeline(path: str, tokenizer: str) -> StableDiffusionPipeline:
    """A folder with model_index.json, or one file of weights with a tokenizer beside it."""
    if Path(path).is_dir():
        pipe = StableDiffusionPipeline.from_pretrained(path)
    elif not tokenizer:
        raise UserError(f"--init {path}: a single file holds no tokenizer; give --tokenizer")
    else:
        pipe = StableDiffusionPipeline.from_single_file(path, tokenizer)
    if pipe.is_xl or pipe.unet.config.in_channels != pipe.vae.config.latent_channels:
        raise UserError(f"--init {path}: SDXL and inpainting models cannot be fine-tuned here; take an SD 1 or 2")
    return pipe
