"""Fine-tuning what others trained: SD 1, SD 2, SDXL and their kin for inpainting behind the face of a Writer.

Read after writer.py and lora.py. Papers: Rombach 2022 (diffusion in a VAE's latents; inpainting), Podell 2023 (SDXL).
Only the UNet learns; VAE and text encoders stay as they are, so a picture's latents and what the UNet hears of a caption
never change: they are computed once, in float32, and kept on the disk. Jitter and flips would change pictures.
Mirrors, for what the UNet is given: diffusers' train_text_to_image_sdxl.py, and the pipelines for inpainting.
Shapes: N pictures, B batch, S picture size, L latent channels, f the VAE's factor, h = w = S/f, M masks of a picture.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from miniclip.weights import WeightsError, load_file, save_file
from minidiff import DDPMScheduler
from minidiff.pipeline import StableDiffusionPipeline
from train.common import UserError
from train.writer import PictureFormat, Writer

MASKS = 4       # of each picture, in inpainting: one covers it all, so a quarter of the training is without a picture


class LatentWriter(Writer):
    """Folds by the VAE's encoder (the mean of its Gaussian) and unfolds by its decoder. Call `latents` before all else."""

    at_once = 8

    def __init__(self, pipe: StableDiffusionPipeline, size: int, captions: list[str]):
        scheduler = DDPMScheduler.from_config(pipe.scheduler.config, clip_sample=False)      # latents pass 1
        super().__init__(pipe.unet, pipe.text_encoder, pipe.tokenizer, scheduler, PictureFormat(size, 3, pipe.factor),
                         list(dict.fromkeys(captions)))
        self.vae, self.pipe = pipe.vae, pipe
        if pipe.is_xl:
            self.text_encoder_2 = pipe.text_encoder_2
        self.frozen = [model for model in pipe.models() if model is not pipe.unet]
        for model in self.frozen:
            model.requires_grad_(False)
        self.inpaints = pipe.unet.config.in_channels != pipe.vae.config.latent_channels
        self.masks = MASKS if self.inpaints else 1
        self.texts: dict[str, dict[str, Tensor]] = {}   # of each prompt: text [T, D], and for SDXL pooled [P]
        self.surroundings = torch.empty(0)              # in inpainting, [N, M, 1 + L, h, w]

    # ---- the VAE, a picture at a time: one of 1024 x 1024 takes it gigabytes

    @torch.no_grad()
    def fold(self, pictures: Tensor) -> Tensor:
        mean, std = self.pipe._statistics(pictures)
        means = torch.cat([self.vae.encode(picture).latent_dist.mode() for picture in pictures.split(1)])
        return (means - mean) * self.vae.config.scaling_factor / std

    @torch.no_grad()
    def unfold(self, x: Tensor) -> Tensor:
        return torch.cat([self.pipe._decode(latents) for latents in x.split(1)])

    # ---- what the UNet hears

    def encode(self, prompts: list[str]) -> Tensor:
        return self.told(prompts)["text"]

    def told(self, prompts: list[str]) -> dict[str, Tensor]:
        """text [B, T, D]; of SDXL also pooled [B, P] and sizes [B, 6]: all pictures are S x S, and whole."""
        told = {name: values.to(self.device) for name, values in self._texts(prompts).items()}
        if self.pipe.is_xl:
            whole = (self.picture.size, self.picture.size)
            told["sizes"] = self.pipe._sizes(whole, (0, 0), whole, told["text"])
        return told

    def _texts(self, prompts: list[str]) -> dict[str, Tensor]:
        """As the disk keeps them: text [B, T, D], and for SDXL pooled [B, P]."""
        self.texts.update({prompt: self._read(prompt) for prompt in dict.fromkeys(prompts) if prompt not in self.texts})
        texts = [self.texts[prompt] for prompt in prompts]
        return {name: torch.stack([text[name] for text in texts]) for name in texts[0]}

    @torch.no_grad()
    def _read(self, prompt: str) -> dict[str, Tensor]:
        """As the pipeline reads it, an empty prompt like the absent negative one, which may be zeros in SDXL."""
        text, pooled = self.pipe.encode_prompt([prompt], [prompt], None)
        silent = self.pipe.is_xl and self.pipe.force_zeros_for_empty_prompt and not prompt
        read = {"text": text, "pooled": pooled} if self.pipe.is_xl else {"text": text}
        return {name: (torch.zeros_like(values) if silent else values)[0].cpu() for name, values in read.items()}

    # ---- what the UNet sees

    def around(self, chosen: Tensor, masks: Tensor) -> dict[str, Tensor]:
        """In inpainting, of pictures chosen [B] under masks [B]: around [B, 1 + L, h, w], as `surround` makes it."""
        return {"around": self.surroundings[chosen, masks].to(self.device)} if self.inpaints else {}

    def surround(self, pictures: Tensor, mask: Tensor) -> Tensor:
        """[B, 3, S, S] and a mask [1 or B, 1, S, S], 1 = paint here -> [B, 1 + L, h, w]: the mask, and the latents of
        the pictures, grey under it."""
        small = F.interpolate(mask, size=self.code_shape[1:]).expand(len(pictures), -1, -1, -1)
        return torch.cat([small, self.fold(pictures * (1 - mask))], dim=1)

    def _surroundings(self, pictures: Tensor) -> Tensor:
        """[N, 3, S, S] -> [N, M, 1 + L, h, w]. A picture's first mask covers all of it, the others are random."""
        dice, S = torch.Generator().manual_seed(0), self.picture.size
        nothing = self.surround(torch.zeros_like(pictures[:1]), torch.ones_like(pictures[:1, :1]))
        rows = []
        for picture in pictures.split(1):
            masks = torch.stack([random_mask(S, dice) for _ in range(MASKS - 1)]).to(pictures)
            rows.append(torch.cat([nothing, self.surround(picture.expand(MASKS - 1, -1, -1, -1), masks)]).cpu())
        return torch.stack(rows)

    # ---- files

    def save(self, folder: str | Path) -> None:
        """A whole model folder, that minidiff and diffusers open."""
        self.pipe.save_pretrained(folder)

    def latents(self, pictures: Tensor, cache: Path, key: str) -> Tensor:
        """[N, 3, S, S] -> [N, L, h, w], and all that the UNet will hear and see besides; from the disk if it was made
        before from the same pictures, captions and models."""
        prompts = list(dict.fromkeys(["", *self.captions]))
        path = cache / f"{key}-{self._checksum(pictures, prompts):08x}.safetensors"
        rows = {"latents": len(pictures), "text": len(prompts)}
        rows |= {"pooled": len(prompts)} if self.pipe.is_xl else {}
        rows |= {"surroundings": len(pictures)} if self.inpaints else {}
        kept = read_cache(path, rows)
        if kept is None:
            kept = {"latents": self.fold(pictures), **self._texts(prompts)}
            kept |= {"surroundings": self._surroundings(pictures)} if self.inpaints else {}
            cache.mkdir(parents=True, exist_ok=True)
            save_file(kept, path)
        texts = [name for name in ("text", "pooled") if name in kept]
        self.texts = {prompt: {name: kept[name][i] for name in texts} for i, prompt in enumerate(prompts)}
        self.surroundings = kept.get("surroundings", self.surroundings)
        return kept["latents"].to(self.device)

    def _checksum(self, pictures: Tensor, prompts: list[str]) -> int:
        """Of everything that latents and texts come from: about a second for SDXL's four gigabytes."""
        tokenizers = [self.pipe.tokenizer] + [self.pipe.tokenizer_2] * self.pipe.is_xl
        ids = [tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
               for tokenizer in tokenizers]
        settings = repr([self.pipe.force_zeros_for_empty_prompt, *(model.config for model in self.frozen)])
        weights = [tensor for model in self.frozen for tensor in model.state_dict().values()]
        return checksum([pictures, *ids, *weights], settings)


def random_mask(size: int, dice: torch.Generator) -> Tensor:
    """[1, S, S], 1 = paint here: one rectangle or two, which cover 10 to 60 % of a picture, or less where they overlap."""
    mask, count = torch.zeros(1, size, size), int(torch.randint(1, 3, (), generator=dice))
    for _ in range(count):
        area, shape, top, left = torch.rand(4, generator=dice).tolist()
        side, ratio = size * ((0.1 + 0.5 * area) / count) ** 0.5, 0.8 + 0.45 * shape
        height, width = round(side * ratio), round(side / ratio)                    # ratio squared: 0.64 to 1.56
        y, x = int(top * (size - height + 1)), int(left * (size - width + 1))
        mask[:, y:y + height, x:x + width] = 1
    return mask


def read_cache(path: Path, rows: dict[str, int]) -> dict[str, Tensor] | None:
    """The tensors of a file, if it holds those of `rows`, each with as many rows; None if it has to be made."""
    if not path.exists():
        return None
    try:
        kept = load_file(path, mmap=False)
    except WeightsError:
        kept = {}
    if {name: tuple(tensor.shape[:1]) for name, tensor in kept.items()} == {name: (n,) for name, n in rows.items()}:
        return kept
    print(f"{path}: damaged; encoding again")
    return None


def checksum(tensors: Iterable[Tensor], settings: str) -> int:
    """CRC-32 of all bytes."""
    value = zlib.crc32(settings.encode("utf-8"))
    for tensor in tensors:
        value = zlib.crc32(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy(), value)
    return value


def load_pipeline(path: str, tokenizer: str) -> StableDiffusionPipeline:
    """A folder with model_index.json, or one file of weights with a tokenizer beside it; in float32."""
    one_file = not Path(path).is_dir()
    pipe = (StableDiffusionPipeline.from_single_file(path, tokenizer) if one_file
            else StableDiffusionPipeline.from_pretrained(path))
    channels, latent = pipe.unet.config.in_channels, pipe.vae.config.latent_channels
    if channels not in (latent, 2 * latent + 1):
        raise UserError(f"--init {path}: a UNet of {channels} channels cannot be fine-tuned here, only of {latent} or, for "
                        f"inpainting, {2 * latent + 1}")
    return pipe
