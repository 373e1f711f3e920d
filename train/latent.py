"""Fine-tuning SD 1, SD 2, SDXL and their inpainting models behind the face of TextToImage.

Read after text_to_image.py and lora.py.
Papers: Rombach 2022 (diffusion in a VAE's latents; inpainting), Podell 2023 (SDXL).
Only the UNet learns; VAE and text encoders stay as they are, so an image's latents and the conditioning of a
caption never change: they are computed once, in float32, and cached on disk. Jitter and flips would change
images.
Mirrors, for what the UNet is given: diffusers' train_text_to_image_sdxl.py, and the pipelines for inpainting.
Shapes: N images, B batch, S image size, L latent channels, f the VAE's factor, h = w = S/f, M masks of an
image.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from miniclip.weights import WeightsError, load_file, save_file
from minidiff import DDPMScheduler
from minidiff.pipeline import StableDiffusionPipeline
from minidiff.text_to_image import ImageFormat, TextToImage

from .errors import UserError
from .run.state import checksum

# of each image, in inpainting: one covers it all, so a quarter of the training is without an image
MASKS = 4
UNET_MULTIPLE = 8   # three downsamplings: latents have to be a multiple of 2^3


class LatentTextToImage(TextToImage):
    """Encodes by the VAE's encoder (the mean of its Gaussian), decodes by its decoder.
    Call `cache_latents` first."""

    max_batch = 8

    def __init__(self, pipe: StableDiffusionPipeline, size: int, captions: list[str]):
        scheduler = DDPMScheduler.from_config(pipe.scheduler.config, clip_sample=False)      # latents pass 1
        super().__init__(pipe.unet, pipe.text_encoder, pipe.tokenizer, scheduler,
                         ImageFormat(size, 3, pipe.factor), list(dict.fromkeys(captions)))
        self.vae, self.pipe = pipe.vae, pipe
        if pipe.is_xl:
            self.text_encoder_2 = pipe.text_encoder_2
        self.frozen = [model for model in pipe.models() if model is not pipe.unet]
        for model in self.frozen:
            model.requires_grad_(False)
        self.inpaints = pipe.unet.config.in_channels != pipe.vae.config.latent_channels
        self.masks = MASKS if self.inpaints else 1
        self.texts: dict[str, dict[str, Tensor]] = {}   # of each prompt: text [T, D], and for SDXL pooled [P]
        self.inpaint_inputs = torch.empty(0)            # in inpainting, [N, M, 1 + L, h, w]

    @property
    def size_multiple(self) -> int:
        """Images have to be as large as this, or a multiple of it."""
        return self.pipe.factor * UNET_MULTIPLE

    # ---- the VAE, an image at a time: one of 1024 x 1024 takes it gigabytes

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """[B, 3, S, S] in [-1, 1] -> [B, L, h, w], shifted and scaled as the UNet takes them."""
        mean, std = self.pipe.latent_statistics(images)
        means = torch.cat([self.vae.encode(image).latent_dist.mode() for image in images.split(1)])
        return (means - mean) * self.vae.config.scaling_factor / std

    @torch.no_grad()
    def decode(self, x0: Tensor) -> Tensor:
        """[B, L, h, w] -> images [B, 3, S, S] in [-1, 1]."""
        return torch.cat([self.pipe.decode_latents(latents) for latents in x0.split(1)])

    def to_x0(self, images: Tensor) -> Tensor:
        """The data holds latents [B, L, h, w] already: those of `cache_latents`."""
        return images

    # ---- conditioning

    def conditioning(self, prompts: list[str]) -> dict[str, Tensor]:
        """text [B, T, D]; of SDXL also pooled [B, P] and sizes [B, 6]: all images are S x S, and whole."""
        found = {name: values.to(self.device) for name, values in self._texts(prompts).items()}
        if self.pipe.is_xl:
            whole = (self.format.size, self.format.size)
            found["sizes"] = self.pipe.size_conditioning(whole, (0, 0), whole, found["text"])
        return found

    def _texts(self, prompts: list[str]) -> dict[str, Tensor]:
        """As the cache keeps them: text [B, T, D], and for SDXL pooled [B, P]."""
        self.texts.update({prompt: self._encode_prompt(prompt) for prompt in dict.fromkeys(prompts)
                           if prompt not in self.texts})
        texts = [self.texts[prompt] for prompt in prompts]
        return {name: torch.stack([text[name] for text in texts]) for name in texts[0]}

    @torch.no_grad()
    def _encode_prompt(self, prompt: str) -> dict[str, Tensor]:
        """As the pipeline does, an empty prompt like the absent negative one, which may be zeros in SDXL."""
        text, pooled = self.pipe.encode_text([prompt], [prompt], None)
        zeros = self.pipe.is_xl and self.pipe.force_zeros_for_empty_prompt and not prompt
        read = {"text": text, "pooled": pooled} if self.pipe.is_xl else {"text": text}
        return {name: (torch.zeros_like(values) if zeros else values)[0].cpu()
                for name, values in read.items()}

    # ---- inpainting

    def inpaint_input(self, indices: Tensor, masks: Tensor) -> dict[str, Tensor]:
        """In inpainting, of images [B] under masks [B]: inpaint [B, 1 + L, h, w],
        as `mask_and_latents` makes it."""
        return {"inpaint": self.inpaint_inputs[indices, masks].to(self.device)} if self.inpaints else {}

    def mask_and_latents(self, images: Tensor, mask: Tensor) -> Tensor:
        """[B, 3, S, S] and a mask [1 or B, 1, S, S], 1 = paint here -> [B, 1 + L, h, w]: the mask, and the
        latents of the images, grey under it."""
        small = F.interpolate(mask, size=self.latent_shape[1:]).expand(len(images), -1, -1, -1)
        return torch.cat([small, self.encode(images * (1 - mask))], dim=1)

    def _inpaint_inputs(self, images: Tensor) -> Tensor:
        """[N, 3, S, S] -> [N, M, 1 + L, h, w]. An image's first mask covers all of it,
        the others are random."""
        generator, S = torch.Generator().manual_seed(0), self.format.size
        nothing = self.mask_and_latents(torch.zeros_like(images[:1]), torch.ones_like(images[:1, :1]))
        rows = []
        for image in images.split(1):
            masks = torch.stack([random_mask(S, generator) for _ in range(MASKS - 1)]).to(images)
            rows.append(torch.cat([nothing,
                                   self.mask_and_latents(image.expand(MASKS - 1, -1, -1, -1), masks)]).cpu())
        return torch.stack(rows)

    # ---- files

    def save(self, folder: str | Path) -> None:
        """A whole model folder, that minidiff and diffusers open."""
        self.pipe.save_pretrained(folder)

    def cache_latents(self, images: Tensor, cache: Path, key: str) -> Tensor:
        """[N, 3, S, S] -> [N, L, h, w], and all conditioning besides; from the disk if it was made before
        from the same images, captions and models."""
        prompts = list(dict.fromkeys(["", *self.captions]))
        path = cache / f"{key}-{self._checksum(images, prompts):08x}.safetensors"
        rows = {"latents": len(images), "text": len(prompts)}
        rows |= {"pooled": len(prompts)} if self.pipe.is_xl else {}
        rows |= {"surroundings": len(images)} if self.inpaints else {}      # the name that cache files have
        kept = read_cache(path, rows)
        if kept is None:
            kept = {"latents": self.encode(images), **self._texts(prompts)}
            kept |= {"surroundings": self._inpaint_inputs(images)} if self.inpaints else {}
            cache.mkdir(parents=True, exist_ok=True)
            save_file(kept, path)
        texts = [name for name in ("text", "pooled") if name in kept]
        self.texts = {prompt: {name: kept[name][i] for name in texts} for i, prompt in enumerate(prompts)}
        self.inpaint_inputs = kept.get("surroundings", self.inpaint_inputs)
        return kept["latents"].to(self.device)

    def _checksum(self, images: Tensor, prompts: list[str]) -> int:
        """Of everything that latents and texts come from: about a second for SDXL's four gigabytes."""
        tokenizers = [self.pipe.tokenizer] + [self.pipe.tokenizer_2] * self.pipe.is_xl
        ids = [tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
               for tokenizer in tokenizers]
        settings = repr([self.pipe.force_zeros_for_empty_prompt, *(model.config for model in self.frozen)])
        weights = [tensor for model in self.frozen for tensor in model.state_dict().values()]
        return checksum([images, *ids, *weights], settings)


def random_mask(size: int, generator: torch.Generator) -> Tensor:
    """[1, S, S], 1 = paint here: one rectangle or two, which cover 10 to 60 % of an image,
    or less where they overlap."""
    mask, count = torch.zeros(1, size, size), int(torch.randint(1, 3, (), generator=generator))
    for _ in range(count):
        area, shape, top, left = torch.rand(4, generator=generator).tolist()
        side, ratio = size * ((0.1 + 0.5 * area) / count) ** 0.5, 0.8 + 0.45 * shape
        # ratio squared: 0.64 to 1.56
        height, width = round(side * ratio), round(side / ratio)
        y, x = int(top * (size - height + 1)), int(left * (size - width + 1))
        mask[:, y:y + height, x:x + width] = 1
    return mask


def read_cache(path: Path, rows: dict[str, int]) -> dict[str, Tensor] | None:
    """The tensors of a file, if it holds those of `rows`, each with as many rows;
    None if it has to be made."""
    if not path.exists():
        return None
    try:
        kept = load_file(path, mmap=False)
    except WeightsError:
        kept = {}
    expected = {name: (n,) for name, n in rows.items()}
    if {name: tuple(tensor.shape[:1]) for name, tensor in kept.items()} == expected:
        return kept
    print(f"{path}: damaged; encoding again")
    return None


def load_pipeline(path: str, tokenizer: str) -> StableDiffusionPipeline:
    """A folder with model_index.json, or one file of weights with a tokenizer beside it; in float32."""
    one_file = not Path(path).is_dir()
    pipe = (StableDiffusionPipeline.from_single_file(path, tokenizer) if one_file
            else StableDiffusionPipeline.from_pretrained(path))
    channels, latent = pipe.unet.config.in_channels, pipe.vae.config.latent_channels
    if channels not in (latent, 2 * latent + 1):
        raise UserError(f"--init {path}: a UNet of {channels} channels cannot be fine-tuned here, only of "
                        f"{latent} or, for inpainting, {2 * latent + 1}")
    return pipe
