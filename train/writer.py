"""The parts that turn a prompt into a picture, held together: tokenizer, text tower, UNet, noise schedule.

Read after minidiff and miniclip, before train_diffusion.py and sample.py, which share it.
Papers: Ho 2022 (classifier-free guidance). Mirrors the loop of diffusers' StableDiffusionPipeline, without a VAE:
instead, a picture [B, C, S, S] is folded so that each f x f square becomes f*f channels, [B, C*f*f, S/f, S/f].
Shapes: B batch, C picture channels, S picture size, f fold, T text tokens, D text width.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miniclip import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from miniclip.weights import WeightsError, read_json, write_json
from minidiff import DDIMScheduler, DDPMScheduler, UNet2DConditionModel
from train.common import command


class PictureFormat(NamedTuple):
    """How pictures enter the UNet: [channels, size, size], each fold x fold square folded into channels."""

    size: int
    channels: int
    fold: int


class Writer(nn.Module):
    at_once = 64        # pictures, at most, that evaluation sends through the UNet together
    masks = 1           # of each picture, to choose from: models for inpainting have several, see latent.py

    def __init__(self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer,
                 scheduler: DDPMScheduler, picture: PictureFormat, captions: list[str]):
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder
        self.tokenizer, self.scheduler, self.picture = tokenizer, scheduler, picture
        self.captions = captions    # the distinct ones of training, in order: what the writer has seen

    @property
    def device(self) -> torch.device:
        return self.unet.conv_in.weight.device

    def fold(self, pictures: Tensor) -> Tensor:
        """[B, C, S, S] -> [B, C*f*f, S/f, S/f]."""
        return F.pixel_unshuffle(pictures, self.picture.fold)

    def unfold(self, x: Tensor) -> Tensor:
        return F.pixel_shuffle(x, self.picture.fold)

    @property
    def code_shape(self) -> tuple[int, int, int]:
        """[C*f*f, S/f, S/f]: a picture as the UNet writes it."""
        side = self.picture.size // self.picture.fold
        return self.unet.config.out_channels, side, side

    def encode(self, prompts: list[str]) -> Tensor:
        """Prompts to what the UNet's cross-attention reads, [B, T, D]; too long a prompt is cut."""
        ids = self.tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        return self.text_encoder(ids.to(self.device)).last_hidden_state

    def told(self, prompts: list[str]) -> dict[str, Tensor]:
        """What the UNet hears of B prompts: text [B, T, D], and SDXL more (latent.py)."""
        return {"text": self.encode(prompts)}

    def draw_masks(self, count: int, dice: torch.Generator) -> Tensor:
        """Which of its masks each of `count` pictures gets, [count]; nothing is drawn where there is no choice."""
        return torch.randint(self.masks, (count,), generator=dice) if self.masks > 1 else torch.zeros(count, dtype=torch.long)

    def around(self, chosen: Tensor, masks: Tensor) -> dict[str, Tensor]:
        """What the UNet sees of B training pictures beside their noise, by indices chosen [B] and masks [B]: nothing,
        but in inpainting (latent.py)."""
        return {}

    def answer(self, x: Tensor, t: Tensor | int, told: dict[str, Tensor]) -> Tensor:
        """The UNet on x [B, C*f*f, S/f, S/f], with what it is told (and sees) under names -> the same shape."""
        if "around" in told:
            x = torch.cat([x, told["around"]], dim=1)
        added = {"text_embeds": told["pooled"], "time_ids": told["sizes"]} if "pooled" in told else None
        return self.unet(x, t, told["text"], added_cond_kwargs=added).sample

    @torch.no_grad()
    def write(self, prompts: list[str], seed: int = 0, steps: int = 30, guidance: float = 1.5, batch: int = 20,
              progress: Callable[[int], None] | None = None) -> Tensor:
        """One picture for each prompt, [N, C, S, S] in [-1, 1], on the CPU.

        guidance 1 follows the prompt, 0 ignores it, more exaggerates it. Picture i has its own noise, drawn on the
        CPU from (seed, i): it does not change with the batch or with how many are written.
        """
        noise = torch.cat([self._noise(seed, i) for i in range(len(prompts))])
        pictures = []
        for i in range(0, len(prompts), batch):
            pictures.append(self._denoise(noise[i:i + batch], prompts[i:i + batch], steps, guidance).cpu())
            if progress:
                progress(min(i + batch, len(prompts)))
        return torch.cat(pictures)

    def _noise(self, seed: int, index: int) -> Tensor:
        generator = torch.Generator().manual_seed((seed * 1_000_003 + index) % 2**63)
        return torch.randn(1, *self.code_shape, generator=generator)

    def _denoise(self, noise: Tensor, prompts: list[str], steps: int, guidance: float) -> Tensor:
        sampler = DDIMScheduler.from_config(self.scheduler.config)
        sampler.set_timesteps(steps)
        x = noise.to(self.device)
        first = torch.zeros(len(prompts), dtype=torch.long)                 # each picture's first mask covers all of it
        silent, told = ({**self.told(p), **self.around(first, first)} for p in ([""] * len(prompts), prompts))
        both = {name: torch.cat([silent[name], told[name]]) for name in told}
        for t in sampler.timesteps:
            if guidance == 1:
                output = self.answer(x, t, told)
            else:
                free, guided = self.answer(torch.cat([x, x]), t, both).chunk(2)
                output = free + guidance * (guided - free)                  # Ho 2022, eq. 6 with w = guidance - 1
            x = sampler.step(output, t, x, use_clipped_model_output=True).prev_sample
        return self.unfold(x).clamp(-1, 1)

    def completed(self, prompt: str, count: int, seed: int) -> list[str]:
        """`count` prompts: a caption as it is; a part of some captions (a character without its hand), each time
        completed to one of them at random; anything else as it is."""
        words = set(prompt.split())
        fitting = [caption for caption in self.captions if words <= set(caption.split())]
        if not words or prompt in fitting or not fitting:
            return [prompt] * count
        dice = torch.Generator().manual_seed(seed)
        return [fitting[i] for i in torch.randint(len(fitting), (count,), generator=dice).tolist()]

    def known_words(self) -> dict[str, None]:
        """The words of the captions, in order."""
        return dict.fromkeys(word for caption in self.captions for word in caption.split())

    def unknown_words(self, prompt: str) -> list[str]:
        known = self.known_words()
        return [word for word in prompt.split() if word not in known]

    def spaced(self, prompt: str) -> str:
        """The prompt with each unknown word taken apart that is known ones, written together."""
        known = self.known_words()
        return " ".join(part for word in prompt.split() for part in take_apart(word, known))

    def strangers(self, prompt: str) -> dict[str, list[str]]:
        """The known words of a prompt that share a caption with not all others of them; with whom they do."""
        known, captions = self.known_words(), [caption.split() for caption in self.captions]
        beside = {word: dict.fromkeys(w for caption in captions if word in caption for w in caption)
                  for word in prompt.split() if word in known}
        return {word: [w for w in others if w != word] for word, others in beside.items()
                if not beside.keys() <= others.keys()}

    def save(self, folder: str | Path) -> None:
        """Folders `unet`, `text_encoder`, `tokenizer`, `scheduler` that diffusers and transformers open, and ours."""
        folder = Path(folder)
        for name in ("unet", "text_encoder", "tokenizer", "scheduler"):
            getattr(self, name).save_pretrained(folder / name)
        write_json(folder / "writer.json", {**self.picture._asdict(), "captions": self.captions})

    @classmethod
    def load(cls, folder: str | Path) -> Writer:
        """Raises WeightsError or ConfigError with one line that names the file and what is wrong in it."""
        folder = Path(folder)
        if (folder / "model_index.json").exists():
            draw = command("minidiff", model=folder)
            raise WeightsError(f"{folder}: a Stable Diffusion folder; {draw} draws with it")
        own = read_json(folder / "writer.json")
        numbers = [own.get(name) for name in PictureFormat._fields]
        captions = own.get("captions")
        if not all(type(n) is int and 0 < n <= 4096 for n in numbers):
            raise WeightsError(f"{folder / 'writer.json'}: size, channels, fold = {numbers}, not small whole numbers")
        if not isinstance(captions, list) or not all(isinstance(c, str) for c in captions):
            raise WeightsError(f"{folder / 'writer.json'}: captions is not a list of texts")
        picture = PictureFormat(*numbers)
        writer = cls(UNet2DConditionModel.from_pretrained(folder / "unet"),
                     CLIPTextModel.from_pretrained(folder / "text_encoder"),
                     CLIPTokenizer.from_pretrained(folder / "tokenizer"),
                     DDPMScheduler.from_pretrained(folder / "scheduler"), picture, captions)
        expected = picture.channels * picture.fold**2
        if writer.unet.config.in_channels != expected or picture.size % picture.fold:
            raise WeightsError(f"{folder / 'writer.json'}: {picture} does not fit a UNet of "
                               f"{writer.unet.config.in_channels} channels")
        return writer.eval()


def take_apart(word: str, known: Container[str]) -> list[str]:
    """春草書 -> 春, 草書. Known words stay whole, and those that are known ones in no way or in several."""
    if word in known:
        return [word]
    ways: list[list[list[str]]] = [[[]]]        # for each length up to two ways to write so much of the word
    for end in range(1, len(word) + 1):
        ways.append([[*way, word[begin:end]] for begin in range(end) if word[begin:end] in known
                     for way in ways[begin]][:2])
    return ways[-1][0] if len(ways[-1]) == 1 else [word]


class Preset(NamedTuple):
    """A size of model. `small` is for CPUs and tens of pictures, the others for a GPU and more pictures."""

    block_out_channels: tuple[int, ...]
    attends: tuple[bool, ...]       # which levels attend to the text; high resolutions are ruinous on a CPU
    layers_per_block: int
    text_width: int
    text_layers: int


PRESETS = {
    "tiny": Preset((32, 64), (False, True), 1, 64, 1),
    "small": Preset((32, 64, 128), (False, False, True), 1, 128, 1),
    "base": Preset((64, 128, 256), (False, True, True), 2, 256, 2),
    "large": Preset((128, 256, 512, 512), (False, True, True, True), 2, 512, 4),
}


def build_writer(preset: Preset, picture: PictureFormat, captions: list[str], scheduler: DDPMScheduler) -> Writer:
    """A fresh writer: a tokenizer learnt from the captions, a text tower and a UNet with random weights."""
    distinct = list(dict.fromkeys(captions))
    words = [word for caption in distinct for word in caption.split()]
    tokenizer = CLIPTokenizer.train(distinct + words, vocab_size=2048)
    longest = max(len(tokenizer.encode(caption)) for caption in distinct)
    tokenizer.model_max_length = min(77, longest)
    text = CLIPTextModel(CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=preset.text_width, intermediate_size=4 * preset.text_width,
        num_hidden_layers=preset.text_layers, num_attention_heads=max(1, preset.text_width // 32),
        max_position_embeddings=tokenizer.model_max_length, projection_dim=preset.text_width,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id))
    channels = picture.channels * picture.fold**2
    unet = UNet2DConditionModel(
        sample_size=picture.size // picture.fold, in_channels=channels, out_channels=channels,
        block_out_channels=preset.block_out_channels, layers_per_block=preset.layers_per_block,
        down_block_types=["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in preset.attends],
        up_block_types=["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(preset.attends)],
        cross_attention_dim=preset.text_width, norm_num_groups=8, use_linear_projection=True,
        attention_head_dim=tuple(max(1, c // 32) for c in preset.block_out_channels))
    return Writer(unet, text, tokenizer, scheduler, picture, distinct)
