"""TextToImage: tokenizer, text tower, UNet and schedule in one module, whose forward is the training loss.

Read after unet.py and objective.py; it needs no VAE.
Papers: Ho 2020 (Algorithm 1 is `forward`), Ho 2022 (guidance, eq. 6), Shi 2016 (pixel unshuffle).
Mirrors: the loop of diffusers' StableDiffusionPipeline, with a pixel unshuffle in place of the VAE: each f x
f square of an image becomes f*f channels.

    model = TextToImage.load("out/calligraphy")                 # a run of train.train_diffusion
    model.draw(["春 草書"], seed=7)[0].save("spring.png")

Shapes: B batch, C image channels, S image size, f fold, L = C*f*f, h = w = S/f, T text tokens, D text width.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miniclip.config import CLIPTextConfig
from miniclip.files import WeightsError, is_texts, read_json, shown, write_json
from miniclip.model import CLIPTextModel
from miniclip.tokenizer import CLIPTokenizer
from minidiff.objective import cosine_schedule, load_scheduler, objective_of
from minidiff.pil import to_pil
from minidiff.schedule import Generators, Sampler, randn, within
from minidiff.unet import UNet2DConditionModel
from minidiff.upscaler import Upscaler

FILE = "writer.json"        # beside the parts' folders: image format and captions
UPSCALER = "upscaler"       # a folder among theirs, if there is one
MAX_SIDE = 4096             # of an image, in pixels: what a stranger's file may ask for
SEED_STRIDE = 1_000_003     # a prime: image i of seed s draws its noise from seed s * stride + i
HEAD_WIDTH = 32             # of fresh models, in the UNet and in the text tower
VOCABULARY = 2048           # the most tokens that a fresh tokenizer learns


class ImageFormat(NamedTuple):
    """How images enter the UNet: [channels, size, size], each fold x fold square folded into channels."""

    size: int
    channels: int
    fold: int


class TextToImage(nn.Module):
    """`loss = model(x0, prompts, t, noise)` trains; `model.sample(prompts)` draws.

    format: of the images; captions: the distinct ones of training, in order,
    which is what the model has seen. upscaler: doubles what is sampled, where there is one; see
    train.train_upscaler.
    """

    max_batch = 64      # images, at most, that evaluation sends through the UNet together
    guidance_interval = 0.0, 1.0    # part of the walk from noise to picture; before and after, guidance is 1
    masks = 1           # of each image, to choose from; an inpainting model has several

    def __init__(self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer,
                 scheduler: Sampler, format: ImageFormat, captions: list[str],
                 upscaler: Upscaler | None = None):
        super().__init__()
        self.unet, self.text_encoder, self.upscaler = unet, text_encoder, upscaler
        self.tokenizer, self.scheduler, self.format = tokenizer, scheduler, format
        self.captions = captions

    @property
    def device(self) -> torch.device:
        """Where the UNet is."""
        return self.unet.conv_in.weight.device

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(L, h, w): an image as the UNet sees it."""
        side = self.format.size // self.format.fold
        return self.unet.config.out_channels, side, side

    @property
    def drawn_size(self) -> int:
        """Pixels a side of what `sample` draws."""
        return self.format.size * (1 if self.upscaler is None else 2)

    def encode(self, images: Tensor) -> Tensor:
        """[B, C, S, S] in [-1, 1] -> [B, L, h, w]."""
        return F.pixel_unshuffle(images, self.format.fold)

    def decode(self, x0: Tensor) -> Tensor:
        """[B, L, h, w] -> [B, C, S, S]."""
        return F.pixel_shuffle(x0, self.format.fold)

    # ---- training

    def to_x0(self, images: Tensor) -> Tensor:
        """Training images as the data holds them -> [B, L, h, w]."""
        return self.encode(images)

    def forward(self, x0: Tensor, prompts: list[str], t: Tensor, noise: Tensor,
                inpaint: dict[str, Tensor] | None = None) -> Tensor:
        """The loss, a scalar: mean squared error of the prediction (Ho 2020, Algorithm 1, line 5).

        x0, noise [B, L, h, w]; t [B]; inpaint: of `inpaint_input`.
        What is predicted, eps, v, x0 or eps - x0, is the scheduler's prediction_kind.
        """
        noise = noise.to(x0)
        x_t = self.scheduler.add_noise(x0, noise, t).contiguous(memory_format=torch.channels_last)
        target = self.scheduler.training_target(x0, noise, t)
        predicted = self.predict(x_t, t, {**self.conditioning(prompts), **(inpaint or {})})
        return F.mse_loss(predicted.to(target), target)

    def predict(self, x_t: Tensor, t: Tensor | int, conditioning: dict[str, Tensor]) -> Tensor:
        """The UNet's prediction [B, L, h, w] for x_t [B, L, h, w], given what `conditioning` returns."""
        if "inpaint" in conditioning:
            x_t = torch.cat([x_t, conditioning["inpaint"]], dim=1)
        added = None
        if "pooled" in conditioning:
            added = {"text_embeds": conditioning["pooled"], "time_ids": conditioning["sizes"]}
        return self.unet(x_t, t, conditioning["text"], added_cond_kwargs=added).sample

    def conditioning(self, prompts: list[str]) -> dict[str, Tensor]:
        """What the UNet is given for B prompts: text [B, T, D]; too long a prompt is cut. SDXL adds more."""
        ids = self.tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        return {"text": self.text_encoder(ids.to(self.device)).last_hidden_state}

    def draw_masks(self, count: int, generator: torch.Generator) -> Tensor:
        """Which of its masks each of `count` images gets, [count];
        nothing is drawn where there is no choice."""
        if self.masks == 1:
            return torch.zeros(count, dtype=torch.long)
        return torch.randint(self.masks, (count,), generator=generator)

    def inpaint_input(self, indices: Tensor, masks: Tensor) -> dict[str, Tensor]:
        """What an inpainting UNet is given of training images [B] under masks [B];
        any other is given nothing."""
        return {}

    # ---- sampling

    @torch.no_grad()
    def sample(self, prompts: list[str], seed: int = 0, steps: int = 30, guidance: float = 1.5,
               batch: int = 20, progress: Callable[[int], None] | None = None) -> Tensor:
        """One image for each prompt, [N, C, S, S] in [-1, 1], on the CPU; of twice the side with an upscaler.

        guidance: 1 follows the prompt, 0 ignores it, more exaggerates it; a distilled model keeps to its own.
        Image i has its own noise, drawn on the CPU from (seed, i): it does not change with the batch or with
        how many are drawn.
        """
        generators = [image_generator(seed, i) for i in range(len(prompts))]
        images = []
        for i in range(0, len(prompts), batch):
            own = generators[i:i + batch]
            noise = randn((len(own), *self.latent_shape), own, self.device, torch.get_default_dtype())
            images.append(self.denoise(noise, prompts[i:i + batch], steps, guidance, own).cpu())
            if progress:
                progress(min(i + batch, len(prompts)))
        return torch.cat(images)

    def draw(self, prompts: list[str], **options: Any) -> list[Any]:
        """`sample` with the same options, as Pillow images."""
        return to_pil((self.sample(prompts, **options) + 1) / 2)

    @torch.no_grad()
    def denoise(self, x: Tensor, prompts: list[str], steps: int, guidance: float,
                generator: Generators = None) -> Tensor:
        """`sample` from given noise [B, L, h, w]; the generator draws what is added between the steps."""
        objective = objective_of(self.scheduler)
        timesteps, step = objective.walk(self.scheduler, steps, generator)
        guidance = guidance if objective.guided else 1
        first = torch.zeros(len(prompts), dtype=torch.long)     # an image's first mask covers all of it
        uncond, cond = ({**self.conditioning(p), **self.inpaint_input(first, first)}
                        for p in ([""] * len(prompts), prompts))
        both = {name: torch.cat([uncond[name], cond[name]]) for name in cond}
        for t in timesteps:
            if guidance == 1 or not within(self.guidance_interval, t, len(self.scheduler)):
                output = self.predict(x, t, cond)
            else:
                free, guided = self.predict(torch.cat([x, x]), t, both).chunk(2)
                output = free + guidance * (guided - free)      # Ho 2022, eq. 6 with w = guidance - 1
            x = step(output, t, x).prev_sample
        images = self.decode(x).clamp(-1, 1)
        return images if self.upscaler is None else self.upscaler(images)

    # ---- prompts

    def completed(self, prompt: str, count: int, seed: int) -> list[str]:
        """`count` prompts: a caption as it is; a part of some captions (a character without its hand), each
        time completed to one of them at random; anything else as it is."""
        words = set(prompt.split())
        fitting = [caption for caption in self.captions if words <= set(caption.split())]
        if not words or prompt in fitting or not fitting:
            return [prompt] * count
        generator = torch.Generator().manual_seed(seed)
        return [fitting[i] for i in torch.randint(len(fitting), (count,), generator=generator).tolist()]

    def known_words(self) -> dict[str, None]:
        """The words of the captions, in order."""
        return dict.fromkeys(word for caption in self.captions for word in caption.split())

    def unknown_words(self, prompt: str) -> list[str]:
        """The words of a prompt that no training caption holds."""
        known = self.known_words()
        return [word for word in prompt.split() if word not in known]

    def spaced(self, prompt: str) -> str:
        """The prompt with each unknown word taken apart that is known ones, written together."""
        known = self.known_words()
        return " ".join(part for word in prompt.split() for part in take_apart(word, known))

    def never_together(self, prompt: str) -> dict[str, list[str]]:
        """The known words of a prompt that share a caption with not all others of them; with whom they do."""
        known, captions = self.known_words(), [caption.split() for caption in self.captions]
        beside = {word: dict.fromkeys(w for caption in captions if word in caption for w in caption)
                  for word in prompt.split() if word in known}
        return {word: [w for w in others if w != word] for word, others in beside.items()
                if not beside.keys() <= others.keys()}

    # ---- files

    def save(self, folder: str | Path) -> None:
        """Folders `unet`, `text_encoder`, `tokenizer`, `scheduler` that diffusers and transformers open,
        and ours."""
        folder = Path(folder)
        for name in ("unet", "text_encoder", "tokenizer", "scheduler"):
            getattr(self, name).save_pretrained(folder / name)
        if self.upscaler is not None:
            self.upscaler.save(folder / UPSCALER)
        write_json(folder / FILE, {**self.format._asdict(), "captions": self.captions})

    @classmethod
    def load(cls, folder: str | Path) -> TextToImage:
        """A run folder or its `model`. Raises WeightsError or ConfigError with one line that names the
        file."""
        folder = model_of(folder) or Path(folder)
        if (folder / "model_index.json").exists():
            raise WeightsError(f"{folder}: a Stable Diffusion folder; python -m minidiff --model {folder} "
                               "draws with it")
        format, captions = read_format(folder / FILE)
        model = cls(UNet2DConditionModel.from_pretrained(folder / "unet"),
                    CLIPTextModel.from_pretrained(folder / "text_encoder"),
                    CLIPTokenizer.from_pretrained(folder / "tokenizer"),
                    load_scheduler(folder / "scheduler"), format, captions)
        if (folder / UPSCALER).is_dir():
            model.upscaler = Upscaler.load(folder / UPSCALER, format.channels)
        channels = model.unet.config.in_channels
        if channels != format.channels * format.fold**2 or format.size % format.fold:
            raise WeightsError(f"{folder / FILE}: {tuple(format)} does not fit a UNet of {channels} channels")
        return model.eval()


def image_generator(seed: int, index: int) -> torch.Generator:
    """Of all random numbers of one image."""
    return torch.Generator().manual_seed((seed * SEED_STRIDE + index) % 2**63)


def model_of(folder: str | Path) -> Path | None:
    """The folder itself or its `model`, whichever holds a TextToImage; None if neither does."""
    return next((path for path in (Path(folder), Path(folder) / "model") if (path / FILE).is_file()), None)


def read_format(path: Path) -> tuple[ImageFormat, list[str]]:
    """Image format and captions of a model folder. Raises WeightsError."""
    values = read_json(path)
    numbers, captions = [values.get(name) for name in ImageFormat._fields], values.get("captions")
    if not all(type(n) is int and 0 < n <= MAX_SIDE for n in numbers) or numbers[1] not in (1, 3):
        raise WeightsError(f"{path}: size, channels, fold = {shown(numbers)}, not small whole numbers; "
                           "channels are 1 or 3")
    if not is_texts(captions):
        raise WeightsError(f"{path}: captions is not a list of texts")
    return ImageFormat(*numbers), captions


def take_apart(word: str, known: Container[str]) -> list[str]:
    """春草書 -> 春, 草書. Known words stay whole, and those that are known ones in no way or in several."""
    if word in known:
        return [word]
    ways: list[list[list[str]]] = [[[]]]        # for each length up to two ways to write so much of the word
    for end in range(1, len(word) + 1):
        ways.append([[*way, word[begin:end]] for begin in range(end) if word[begin:end] in known
                     for way in ways[begin]][:2])
    return ways[-1][0] if len(ways[-1]) == 1 else [word]


# ----------------------------------------------------------------------------------------------- fresh models


class Preset(NamedTuple):
    """A size of model. `small` is for CPUs and tens of images,
    `base` and `large` for a GPU and more images."""

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


def build_text_to_image(preset: Preset, format: ImageFormat, captions: list[str],
                        scheduler: Sampler | None = None) -> TextToImage:
    """A fresh model: a tokenizer trained on the captions, a text tower and a UNet with random weights."""
    distinct = list(dict.fromkeys(captions))
    tokenizer = CLIPTokenizer.of_captions(distinct, VOCABULARY)
    text = CLIPTextModel(CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=preset.text_width, intermediate_size=4 * preset.text_width,
        num_hidden_layers=preset.text_layers, num_attention_heads=max(1, preset.text_width // HEAD_WIDTH),
        max_position_embeddings=tokenizer.model_max_length, projection_dim=preset.text_width,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id))
    channels = format.channels * format.fold**2
    unet = UNet2DConditionModel(
        sample_size=format.size // format.fold, in_channels=channels, out_channels=channels,
        block_out_channels=preset.block_out_channels, layers_per_block=preset.layers_per_block,
        down_block_types=["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in preset.attends],
        up_block_types=["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(preset.attends)],
        cross_attention_dim=preset.text_width, norm_num_groups=8, use_linear_projection=True,
        attention_head_dim=tuple(max(1, c // HEAD_WIDTH) for c in preset.block_out_channels))
    return TextToImage(unet, text, tokenizer, scheduler or cosine_schedule(), format, distinct)
