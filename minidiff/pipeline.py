"""StableDiffusionPipeline: text to image, image to image and inpainting, for SD 1, SD 2, SDXL and variants.

Read last: it only puts the parts together.
Papers: Rombach 2022; Ho 2022 (classifier-free guidance, eq. 6); Podell 2023 (SDXL); Meng 2022 (image to
image); Lin 2023, section 3.4 (guidance rescale); Luo 2023 (LCM).
Mirrors: diffusers' pipelines/stable_diffusion and stable_diffusion_xl, their nine classes as one.
No safety checker.
Shapes: B pictures, C = 3 colours, H W their size; L latent channels of h = H/f, w = W/f;
S tokens, D text width.
"""

from __future__ import annotations

import inspect
import math
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miniclip.model import CLIPTextModel, CLIPTextModelWithProjection
from miniclip.output import ModelOutput
from miniclip.tokenizer import CLIPTokenizer
from miniclip.weights import WeightsError, read_json, write_json
from minidiff import samplers
from minidiff.convert import load_single_file, scheduler_config
from minidiff.pil import from_pil, to_pil
from minidiff.schedule import Generators, Scheduler, randn
from minidiff.unet import UNet2DConditionModel
from minidiff.vae import AutoencoderKL

SCHEDULERS: dict[str, type[Scheduler]] = {
    name: getattr(samplers, name) for name in samplers.__all__ if name.endswith("Scheduler")
}
# The parts of a folder, and the classes that each may be; a part that is not here is left aside
PARTS: dict[str, dict[str, Any]] = {
    "unet": {"UNet2DConditionModel": UNet2DConditionModel},
    "vae": {"AutoencoderKL": AutoencoderKL},
    "scheduler": SCHEDULERS,
    "tokenizer": {"CLIPTokenizer": CLIPTokenizer, "CLIPTokenizerFast": CLIPTokenizer},
    "tokenizer_2": {"CLIPTokenizer": CLIPTokenizer, "CLIPTokenizerFast": CLIPTokenizer},
    "text_encoder": {"CLIPTextModel": CLIPTextModel},
    "text_encoder_2": {"CLIPTextModelWithProjection": CLIPTextModelWithProjection},
}
Pictures = Any  # a tensor [B, 3, H, W] in 0 to 1, a Pillow picture, or a list of those


@dataclass
class StableDiffusionPipelineOutput(ModelOutput):
    """What a call of the pipeline returns; its output_type says which kind of images."""

    images: Any  # list of Pillow pictures, or a tensor


@dataclass
class Conditions:
    """What the UNet is given besides the latents and the time, for B pictures; `negative` may be absent."""

    text: Tensor                                # [B, S, D]
    negative: Tensor | None = None              # [B, S, D]
    pooled: Tensor | None = None                # [B, P], SDXL
    negative_pooled: Tensor | None = None       # [B, P]
    # [B, 6], SDXL: original height, width; top, left; target height, width
    sizes: Tensor | None = None
    guidance: Tensor | None = None              # [B, E], LCM: the guidance scale itself, embedded
    mask: Tensor | None = None                  # [B, 1, h, w], inpainting UNets: 1 = paint here
    masked_latents: Tensor | None = None        # [B, L, h, w]


class StableDiffusionPipeline:
    """The whole model: `pipe = StableDiffusionPipeline.from_pretrained(folder)`,
    then `pipe("a herb shop").images`.

    `scheduler` may be replaced at any time: `pipe.scheduler =
    EulerDiscreteScheduler.from_config(pipe.scheduler.config)`.
    A second text encoder means SDXL. There is no safety checker: what you show to others is yours to check.
    """

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: UNet2DConditionModel,
        scheduler: Scheduler,
        text_encoder_2: CLIPTextModelWithProjection | None = None,
        tokenizer_2: CLIPTokenizer | None = None,
        force_zeros_for_empty_prompt: bool = True,
    ):
        self.vae, self.unet = vae, unet
        self.text_encoder, self.tokenizer = text_encoder, tokenizer
        self.text_encoder_2, self.tokenizer_2 = text_encoder_2, tokenizer_2
        # SDXL: no negative prompt means zeros
        self.force_zeros_for_empty_prompt = force_zeros_for_empty_prompt
        self.is_xl = text_encoder_2 is not None
        self.scheduler = scheduler if self.is_xl else _latent_scheduler(scheduler)
        self.factor = 2 ** (len(vae.config.block_out_channels) - 1)  # f, picture pixels per latent

    # ---- files

    @classmethod
    def from_pretrained(
        cls, folder: str | os.PathLike, variant: str | None = None,
        torch_dtype: torch.dtype | str | None = None
    ) -> StableDiffusionPipeline:
        """Reads a local folder as diffusers writes it: model_index.json and one folder for each part.

        Raises WeightsError or ConfigError. The safety checker and other parts that it may hold are left
        aside.
        """
        folder = os.fspath(folder)
        source = os.path.join(folder, "model_index.json")
        index = read_json(source)
        parts: dict[str, Any] = {}
        for name, classes in PARTS.items():
            if not isinstance(index.get(name), list) or index[name][-1] is None:
                continue
            part = _class_of(index[name][-1], classes, f"{source}: {name}")
            models = {"variant": variant, "torch_dtype": torch_dtype} if issubclass(part, nn.Module) else {}
            parts[name] = part.from_pretrained(folder, subfolder=name, **models)
        if missing := [name for name in ("unet", "vae", "scheduler", "tokenizer", "text_encoder")
                       if name not in parts]:
            raise WeightsError(f"{source}: the part {missing[0]!r} is missing, so this is no text-to-image "
                               "pipeline")
        if index.get("requires_aesthetics_score"):
            raise WeightsError(f"{source}: requires_aesthetics_score (the SDXL refiner) is not supported")
        zeros = index.get("force_zeros_for_empty_prompt", True)
        return cls(**parts, force_zeros_for_empty_prompt=zeros)

    @classmethod
    def from_single_file(
        cls,
        path: str | os.PathLike,
        tokenizer: str | os.PathLike | CLIPTokenizer,
        torch_dtype: torch.dtype | None = None,
    ) -> StableDiffusionPipeline:
        """Reads one .safetensors or .ckpt file in the original layout of SD 1, SD 2 or SDXL.

        tokenizer: such files hold none. A tokenizer, a folder with its files,
        or OpenAI's bpe_simple_vocab_16e6.txt.gz.
        """
        parts: dict[str, Any] = load_single_file(path, torch_dtype)
        if missing := [name for name in ("unet", "vae", "text_encoder") if name not in parts]:
            raise WeightsError(f"{os.fspath(path)}: holds no {missing[0]}, so it makes no pipeline")
        name, config = scheduler_config(parts)
        parts["scheduler"] = SCHEDULERS[name](**config)
        first_pads_with_end = not parts["unet"].config.use_linear_projection or "text_encoder_2" in parts
        parts["tokenizer"] = _tokenizer(tokenizer, {} if first_pads_with_end else {"pad_token": "!"})
        if "text_encoder_2" in parts:
            parts["tokenizer_2"] = _tokenizer(tokenizer, {"pad_token": "!"})
        return cls(**parts)

    def save_pretrained(self, folder: str | os.PathLike, variant: str | None = None) -> None:
        """Writes a folder that diffusers reads."""
        folder = os.fspath(folder)
        index: dict[str, Any] = {"_class_name": f"StableDiffusion{'XL' * self.is_xl}Pipeline",
                                 "_diffusers_version": "0.30.0"}
        for name in PARTS:
            part = getattr(self, name)
            if part is None:
                continue
            target = os.path.join(folder, name)
            options = {"variant": variant} if isinstance(part, nn.Module) else {}
            part.save_pretrained(target, **options)
            library = "transformers" if name.startswith(("text", "token")) else "diffusers"
            index[name] = [library, type(part).__name__]
        absent = ["feature_extractor", "image_encoder"] + ([] if self.is_xl else ["safety_checker"])
        index |= {name: [None, None] for name in absent}
        extra = {"force_zeros_for_empty_prompt": self.force_zeros_for_empty_prompt}
        index |= extra if self.is_xl else {"requires_safety_checker": False}
        write_json(os.path.join(folder, "model_index.json"), index)

    def to(self, *args: Any) -> StableDiffusionPipeline:
        """Moves or casts all models, as `nn.Module.to`: a device, a dtype, or both."""
        for model in self.models():
            model.to(*args)
        return self

    def models(self) -> list[nn.Module]:
        """The parts with weights: UNet, VAE and the text encoders that there are."""
        return [m for m in (self.unet, self.vae, self.text_encoder, self.text_encoder_2) if m is not None]

    @property
    def device(self) -> torch.device:
        """Where the UNet is."""
        return self.unet.device

    # ---- the whole run

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        prompt_2: str | list[str] | None = None,
        image: Pictures = None,
        mask_image: Pictures = None,
        strength: float | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float | None = None,
        negative_prompt: str | list[str] | None = None,
        negative_prompt_2: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: Generators = None,
        latents: Tensor | None = None,
        guidance_rescale: float = 0.0,
        clip_skip: int | None = None,
        original_size: tuple[int, int] | None = None,
        crops_coords_top_left: tuple[int, int] = (0, 0),
        target_size: tuple[int, int] | None = None,
        output_type: str = "pil",
        callback_on_step_end: Callable[..., dict | None] | None = None,
        progress: bool = True,
    ) -> StableDiffusionPipelineOutput:
        """Draws num_images_per_prompt pictures for each prompt.

        image: start from this picture (image to image); with mask_image: paint anew where the mask is white.
        strength: the part of the steps to walk, in (0, 1]; by default 0.8 with an image, 1 with a mask.
        height, width: in pixels, multiples of the VAE's factor;
        by default the model's own size, or the image's.
        guidance_scale: by default 7.5, or 5 for SDXL. 1 is the prompt alone, at half the cost;
        0 is the negative prompt alone and draws nothing of the prompt (upstream takes 0 for 1),
        so it warns. LCM models embed it.
        generator: one for all, or a list with one for each picture, which then does not depend on the batch.
        latents: noise [B, L, h, w] to start from. output_type: "pil", "pt" ([B, 3, H, W] in 0 to 1),
        or "latent".
        callback_on_step_end: called as f(pipe, step, timestep, {"latents": ...});
        may return {"latents": ...} to go on with.
        Raises ValueError for arguments that do not fit.
        Warns of prompts that are cut, with the words that are lost.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        batch = len(prompts) * num_images_per_prompt
        self._check(image, mask_image, strength, output_type, batch, generator)
        scale = (5.0 if self.is_xl else 7.5) if guidance_scale is None else float(guidance_scale)
        for name, value in (("guidance_scale", scale), ("guidance_rescale", guidance_rescale), ("eta", eta)):
            if not math.isfinite(value):
                raise ValueError(f"{name} = {value} is not a finite number")
        if scale == 0 and self.unet.config.time_cond_proj_dim is None:
            warnings.warn("guidance_scale 0 ignores the prompt; for a model without guidance (Turbo) it is 1",
                          stacklevel=2)
        picture = None if image is None else self._pixels(image, height, width)
        height, width = self._size(height, width, picture)

        c = self._conditions(prompts, prompt_2, negative_prompt, negative_prompt_2, num_images_per_prompt,
                             clip_skip)
        c.sizes = self.size_conditioning(original_size or (height, width), crops_coords_top_left,
                                         target_size or (height, width), c.text)
        c.guidance = self._embed_guidance(scale, c.text)
        timesteps = self._timesteps(num_inference_steps, strength, image, mask_image)
        if mask_image is not None:
            known = self._inpaint(c, picture, mask_image, timesteps, strength, (height, width), batch,
                                  generator, latents)
            x = known.start
        elif picture is not None:
            x, known = self._noised(picture, timesteps, batch, generator, c.text), None
        else:
            x = self._noise(latents, batch, height, width, generator, c.text)
            x, known = x * self.scheduler.init_noise_sigma, None

        accepted = inspect.signature(self.scheduler.step).parameters
        extra = {k: v for k, v in (("eta", eta), ("generator", generator)) if k in accepted}
        for i, t in enumerate(timesteps):
            output = self._guided(x, t, c, scale, guidance_rescale)         # [B, L, h, w]
            x = self.scheduler.step(output, t, x, **extra).prev_sample
            # a UNet that was not trained to inpaint
            if known is not None and c.mask is None:
                x = known.keep(self.scheduler, x, timesteps[i + 1 : i + 2])
            if callback_on_step_end is not None:
                x = (callback_on_step_end(self, i, t, {"latents": x}) or {}).get("latents", x)
            if progress and sys.stderr.isatty():
                print(f"\rstep {i + 1}/{len(timesteps)}", end="\n" * (i + 1 == len(timesteps)),
                      file=sys.stderr, flush=True)
        return StableDiffusionPipelineOutput(self._finish(x, output_type))

    def _guided(self, x: Tensor, t: Tensor, c: Conditions, scale: float, rescale: float) -> Tensor:
        """The prediction with classifier-free guidance: e = e_neg + scale (e_text - e_neg) (Ho 2022)."""
        if c.guidance is not None or scale == 1:                            # LCM, or nothing to mix
            return self._predict(x, t, c, ["text"])
        if scale == 0:
            return self._predict(x, t, c, ["negative"])
        negative, text = self._predict(x, t, c, ["negative", "text"]).chunk(2)
        mixed = negative + scale * (text - negative)
        # Lin 2023, eq. 14 to 16: back to the deviation of the text's prediction
        if rescale > 0:
            dims = tuple(range(1, text.ndim))
            narrowed = mixed * (text.std(dims, keepdim=True) / mixed.std(dims, keepdim=True))
            mixed = rescale * narrowed + (1 - rescale) * mixed
        return mixed

    def _predict(self, x: Tensor, t: Tensor, c: Conditions, which: list[str]) -> Tensor:
        """The UNet on the latents once for each of the texts named, as one batch."""
        n = len(which)
        x = self.scheduler.scale_model_input(torch.cat([x] * n), t)        # [n B, L, h, w]
        if c.mask is not None:
            x = torch.cat([x, torch.cat([c.mask] * n), torch.cat([c.masked_latents] * n)], dim=1)
        text = torch.cat([getattr(c, name) for name in which])              # [n B, S, D]
        added = None
        if self.is_xl:
            pooled = {"text": c.pooled, "negative": c.negative_pooled}
            added = {"text_embeds": torch.cat([pooled[name] for name in which]),
                     "time_ids": c.sizes.repeat(n, 1)}
        return self.unet(x, t, text, timestep_cond=c.guidance, added_cond_kwargs=added, return_dict=False)[0]

    # ---- the text

    def _conditions(
        self,
        prompts: list[str],
        prompts_2: str | list[str] | None,
        negative: str | list[str] | None,
        negative_2: str | list[str] | None,
        copies: int,
        clip_skip: int | None,
    ) -> Conditions:
        second = _listed(prompts if prompts_2 is None else prompts_2, len(prompts), "prompt_2")
        text, pooled = self.encode_prompt(prompts, second, clip_skip)
        if self.is_xl and negative is None and self.force_zeros_for_empty_prompt:
            no_text, no_pooled = torch.zeros_like(text), torch.zeros_like(pooled)
        else:
            first = _listed("" if negative is None else negative, len(prompts), "negative_prompt")
            second = _listed(first if negative_2 is None else negative_2, len(prompts), "negative_prompt_2")
            no_text, no_pooled = self.encode_prompt(first, second, None)    # never skips layers, as upstream
        parts = [None if p is None else p.repeat_interleave(copies, dim=0)
                 for p in (text, no_text, pooled, no_pooled)]
        return Conditions(*parts)

    def encode_prompt(
        self, prompts: list[str], prompts_2: list[str], clip_skip: int | None
    ) -> tuple[Tensor, Tensor | None]:
        """Texts -> what the UNet attends to [B, S, D], and for SDXL the pooled text [B, P].

        SD 1 and 2 read the last layer (normalised); SDXL the last but one of both encoders, side by side.
        clip_skip: that many layers earlier.
        """
        ids = self._tokens(self.tokenizer, prompts)                         # [B, S]
        skip = clip_skip or 0
        out = self.text_encoder(ids.to(self.text_encoder.device), output_hidden_states=True)
        if not self.is_xl:
            normalised = self.text_encoder.text_model.final_layer_norm
            return (normalised(out.hidden_states[-skip - 1]) if skip else out.last_hidden_state), None
        ids_2 = self._tokens(self.tokenizer_2, prompts_2)
        out_2 = self.text_encoder_2(ids_2.to(self.text_encoder_2.device), output_hidden_states=True)
        both = [o.hidden_states[-skip - 2] for o in (out, out_2)]
        return torch.cat(both, dim=-1).to(self.text_encoder_2.dtype), out_2.text_embeds

    def _tokens(self, tokenizer: CLIPTokenizer, prompts: list[str]) -> Tensor:
        """Token ids [B, S], S always the greatest length; says which words did not fit."""
        most = tokenizer.model_max_length
        for prompt in prompts:
            ids = tokenizer(prompt).input_ids
            if len(ids) > most:
                lost = tokenizer.decode(ids[most - 1 : -1])
                warnings.warn(f"the prompt takes {len(ids)} tokens of {most}; this part is dropped: {lost!r}",
                              stacklevel=5)
        return tokenizer(prompts, padding="max_length", max_length=most, truncation=True,
                         return_tensors="pt").input_ids

    def size_conditioning(self, original: tuple, corner: tuple, target: tuple, like: Tensor) -> Tensor | None:
        """SDXL's size conditioning for every picture, [B, 6]."""
        if not self.is_xl:
            return None
        return torch.tensor([[*original, *corner, *target]], dtype=like.dtype,
                            device=self.device).repeat(len(like), 1)

    def _embed_guidance(self, scale: float, like: Tensor) -> Tensor | None:
        """LCM: sinusoids of 1000 (scale - 1), [B, E]."""
        width = self.unet.config.time_cond_proj_dim
        if width is None:
            return None
        w = torch.tensor(scale - 1).repeat(len(like)) * 1000.0
        rate = torch.log(torch.tensor(10000.0)) / (width // 2 - 1)
        angles = w[:, None] * torch.exp(torch.arange(width // 2, dtype=torch.float32) * -rate)[None, :]
        embedded = torch.cat([angles.sin(), angles.cos()], dim=1)
        return F.pad(embedded, (0, width % 2)).to(device=self.device, dtype=like.dtype)

    # ---- the latents

    def _timesteps(self, steps: int, strength: float | None, image: Pictures, mask: Pictures) -> Tensor:
        """The timesteps to walk: all, or with an image the last `strength` of them."""
        self.scheduler.set_timesteps(steps, device=self.device)
        if image is None:
            return self.scheduler.timesteps
        strength = (0.8 if mask is None else 1.0) if strength is None else strength
        first = steps - min(int(steps * strength), steps)
        if first == steps:
            raise ValueError(f"strength = {strength} of {steps} steps leaves no step to take")
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(first)
        return self.scheduler.timesteps[first:]

    def _noise(self, given: Tensor | None, batch: int, height: int, width: int, generator: Generators,
               like: Tensor) -> Tensor:
        shape = (batch, self.vae.config.latent_channels, height // self.factor, width // self.factor)
        if given is None:
            return randn(shape, generator, self.device, like.dtype)
        if tuple(given.shape) != shape:
            raise ValueError(f"latents are {list(given.shape)}, not {list(shape)}")
        return given.to(self.device)

    def _noised(self, picture: Tensor, timesteps: Tensor, batch: int, generator: Generators,
                like: Tensor) -> Tensor:
        """Latents of the picture with the noise of the first timestep (Meng 2022)."""
        latents = self._encode(picture, batch, generator, like.dtype)
        noise = randn(latents.shape, generator, self.device, like.dtype)
        return self.scheduler.add_noise(latents, noise, timesteps[:1].repeat(batch))

    def _inpaint(
        self,
        c: Conditions,
        picture: Tensor,
        mask_image: Pictures,
        timesteps: Tensor,
        strength: float | None,
        size: tuple[int, int],
        batch: int,
        generator: Generators,
        given: Tensor | None,
    ) -> InpaintState:
        """Where to start, what to keep; a UNet of 9 channels also gets the mask and the picture around it.

        One order of draws from the generator for both kinds of UNet, upstream's: picture, noise,
        masked picture.
        """
        whole = strength is None or strength == 1
        trained = self.unet.config.in_channels != self.vae.config.latent_channels
        latents = None
        if not trained or not whole:
            latents = self._encode(picture, batch, generator, c.text.dtype)
        noise = self._noise(given, batch, *size, generator, c.text)
        start = noise * self.scheduler.init_noise_sigma
        if not whole and given is None:
            start = self.scheduler.add_noise(latents, noise, timesteps[:1].repeat(batch))
        pixels = (self._pixels(mask_image, *size, mask=True) >= 0.5).to(picture)        # [1, 1, H, W]
        masked = self._encode(picture * (1 - pixels), batch, generator, c.text.dtype)
        small = F.interpolate(pixels, size=start.shape[-2:]).to(start)                  # [1, 1, h, w]
        mask = small.repeat(batch // len(small), 1, 1, 1)
        if trained:
            c.mask, c.masked_latents = mask, masked
        return InpaintState(start, mask, latents, noise)

    def _encode(self, picture: Tensor, batch: int, generator: Generators, dtype: torch.dtype) -> Tensor:
        """Pictures [1 or B, 3, H, W] in -1 to 1 -> scaled latents [B, L, h, w],
        drawn from the VAE's Gaussian."""
        if batch % len(picture):
            raise ValueError(f"{len(picture)} images for {batch} pictures")
        if isinstance(generator, list):
            picture = picture.repeat(batch // len(picture), 1, 1, 1)
        vae, own = self.vae, self.vae.dtype
        if self.is_xl and vae.config.force_upcast:
            # from any dtype, as upstream: the draw below then is float32's
            vae.to(torch.float32)
        z = vae.encode(picture.to(self.device, vae.dtype)).latent_dist.sample(generator).to(dtype)
        vae.to(own)
        mean, std = self.latent_statistics(z)
        z = (z - mean) * vae.config.scaling_factor / std
        return torch.cat([z] * (batch // len(z)))

    def decode_latents(self, z: Tensor) -> Tensor:
        """Scaled latents -> pictures [B, 3, H, W] in -1 to 1.
        SDXL's VAE overflows in half precision: float32."""
        vae, own = self.vae, self.vae.dtype
        if self.is_xl and vae.config.force_upcast and own == torch.float16:
            vae.to(torch.float32)
            z = z.to(torch.float32)
        mean, std = self.latent_statistics(z)
        x = vae.decode(z * std / vae.config.scaling_factor + mean).sample
        vae.to(own)
        return x

    def latent_statistics(self, z: Tensor) -> tuple[Tensor | float, Tensor | float]:
        """What latents are shifted and scaled by beside the scaling factor: nothing, but for a few VAEs."""
        c = self.vae.config
        if c.latents_mean is None or c.latents_std is None:
            return c.shift_factor or 0.0, 1.0
        return tuple(torch.tensor(v).view(1, -1, 1, 1).to(z) for v in (c.latents_mean, c.latents_std))

    def _finish(self, x: Tensor, output_type: str) -> Any:
        if output_type == "latent":
            return x
        pictures = (self.decode_latents(x) * 0.5 + 0.5).clamp(0, 1)                # [B, 3, H, W]
        return pictures if output_type == "pt" else to_pil(pictures)

    # ---- arguments

    def _check(self, image: Any, mask: Any, strength: float | None, output: str, batch: int,
               generator: Generators) -> None:
        channels, latent = self.unet.config.in_channels, self.vae.config.latent_channels
        if mask is not None and image is None:
            raise ValueError("mask_image needs an image to paint in")
        if strength is not None and (image is None or not 0 < strength <= 1):
            raise ValueError(f"strength = {strength} needs an image, and to lie in (0, 1]")
        if channels not in (latent, 2 * latent + 1):
            raise ValueError(f"a UNet with in_channels = {channels} is not supported, only {latent} and "
                             f"{2 * latent + 1}")
        if channels != latent and mask is None:
            raise ValueError("this UNet was trained for inpainting: give image and mask_image")
        if output not in ("pil", "pt", "latent"):
            raise ValueError(f"output_type = {output!r} is not 'pil', 'pt' or 'latent'")
        if batch < 1 or (isinstance(generator, list) and len(generator) != batch):
            given = f"{len(generator)} generators" if isinstance(generator, list) else "no prompt"
            raise ValueError(f"{given} for {batch} pictures")

    def _size(self, height: int | None, width: int | None, picture: Tensor | None) -> tuple[int, int]:
        if picture is not None:
            return tuple(picture.shape[-2:])
        usual = self.unet.config.sample_size
        usual = usual if isinstance(usual, tuple) else (usual, usual)
        size = tuple(u * self.factor if s is None and u else s
                     for s, u in zip((height, width), usual, strict=True))
        if None in size:
            raise ValueError("give height and width: the UNet's config has no sample_size")
        return self._multiple(*size)

    def _multiple(self, height: int, width: int) -> tuple[int, int]:
        if height < 1 or width < 1 or height % self.factor or width % self.factor:
            raise ValueError(f"height = {height} and width = {width} must be multiples of {self.factor}")
        return height, width

    def _pixels(self, image: Pictures, height: int | None, width: int | None, mask: bool = False) -> Tensor:
        """Pictures -> [B, 3, H, W] in -1 to 1; masks -> [B, 1, H, W] in 0 to 1.

        Pillow pictures are resized to height x width, by default to their own size rounded down;
        tensors must fit.
        """
        if not isinstance(image, Tensor):
            images = image if isinstance(image, list) else [image]
            w, h = images[0].size
            h = h - h % self.factor if height is None else height
            w = w - w % self.factor if width is None else width
            image = from_pil(images, *self._multiple(h, w), "L" if mask else "RGB")
        channels = 1 if mask else 3
        if image.ndim != 4 or image.shape[1] != channels:
            name = "mask_image" if mask else "image"
            raise ValueError(f"{name} is {list(image.shape)}, not [batch, {channels}, height, width]")
        given = (image.shape[-2] if height is None else height, image.shape[-1] if width is None else width)
        if tuple(image.shape[-2:]) != self._multiple(*given):
            raise ValueError(f"a picture of {list(image.shape[-2:])} does not fit height and width "
                             f"{list(given)}")
        if image.min() < 0 or image.max() > 1:
            raise ValueError(f"picture values lie in {image.min():.3g} to {image.max():.3g}, not in 0 to 1")
        return image.float() if mask else 2.0 * image.float() - 1.0


@dataclass
class InpaintState:
    """Inpainting: where to start, the mask (1 = paint), the picture's latents,
    and the one noise for all steps."""

    start: Tensor
    mask: Tensor
    latents: Tensor | None
    noise: Tensor

    def keep(self, scheduler: Scheduler, x: Tensor, next_timestep: Tensor) -> Tensor:
        """Outside the mask, the known picture with the noise of the next timestep;
        after the last step without."""
        known = self.latents
        if len(next_timestep):
            known = scheduler.add_noise(known, self.noise, next_timestep)
        return (1 - self.mask) * known + self.mask * x


def _latent_scheduler(scheduler: Scheduler) -> Scheduler:
    """Early SD 1 folders left out steps_offset = 1 and clip_sample = false;
    upstream mends that, and so do we."""
    config, mended = scheduler.config, {}
    if config.get("steps_offset", 1) != 1:
        mended["steps_offset"] = 1
    if config.get("clip_sample", False):
        mended["clip_sample"] = False
    return type(scheduler)(config.mended(**mended)) if mended else scheduler


def _class_of(name: Any, classes: dict[str, Any], source: str) -> Any:
    """The class that a folder names; names from the JAX port mean the same classes."""
    plain = name.removeprefix("Flax") if isinstance(name, str) else name
    if plain not in classes:
        raise WeightsError(f"{source}: {name!r} is not supported, only {', '.join(classes)}")
    return classes[plain]


def _tokenizer(given: Any, options: dict[str, Any]) -> CLIPTokenizer:
    if isinstance(given, CLIPTokenizer):
        return CLIPTokenizer(given.vocab, given.merges, model_max_length=given.model_max_length, **options)
    read = CLIPTokenizer.from_pretrained if os.path.isdir(given) else CLIPTokenizer.from_bpe_file
    return read(given, **options)


def _listed(text: str | list[str], count: int, name: str) -> list[str]:
    texts = [text] * count if isinstance(text, str) else list(text)
    if len(texts) != count:
        raise ValueError(f"{name} has {len(texts)} entries for {count} prompts")
    return texts
