"""StableDiffusionPipeline: text to image, image to image and inpainting, for SD 1, SD 2, SDXL and variants.

Read last: it only puts the parts together. Files are pipeline_folder.py's, what is only a habit
pipeline_habits.py's, LoRA files lora.py's.
Papers: Rombach 2022; Ho 2022 (classifier-free guidance, eq. 6); Podell 2023 (SDXL); Meng 2022 (image to
image); Lin 2023, section 3.4 (guidance rescale); Luo 2023 (LCM).
Mirrors: diffusers' pipelines/stable_diffusion and stable_diffusion_xl, their nine classes as one.
No safety checker.
Shapes: B pictures, n texts for each (2 with guidance, else 1), C = 3 colours, H W their size; L latent
channels of h = H/f, w = W/f; S tokens, D text width.
"""

from __future__ import annotations

import inspect
import math
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from miniclip.habits import settle
from miniclip.model import CLIPTextModel, CLIPTextModelWithProjection
from miniclip.output import ModelOutput
from miniclip.tokenizer import CLIPTokenizer
from minidiff.lora import PipelineLoRA
from minidiff.pil import from_arrays, from_pil, is_pil, to_numpy, to_pil
from minidiff.pipeline_folder import PipelineFolder
from minidiff.pipeline_habits import CALL_REFUSED, NEVER_HERE, PipelineHabits
from minidiff.schedule import Generators, Scheduler, randn, within
from minidiff.unet import UNet2DConditionModel
from minidiff.vae import AutoencoderKL

Pictures = Any  # tensor [B, 3, H, W] in 0 to 1, numpy array [B, H, W, 3], Pillow picture, or a list of those
OUTPUT_TYPES = ("pil", "pt", "np", "latent")


@dataclass(eq=False, repr=False)
class StableDiffusionPipelineOutput(ModelOutput):
    """What a call of the pipeline returns; its output_type says which kind of images."""

    images: Any  # list of Pillow pictures, a tensor or an array
    nsfw_content_detected: None = None  # upstream's field: there is no safety checker here


@dataclass(eq=False, repr=False)
class Conditions:
    """What the UNet is given besides the latents and the time.

    With guidance, a tensor of n B rows holds those of the negative prompt first. The names are those that
    a callback may ask for.
    """

    prompt_embeds: Tensor                       # [n B, S, D]
    negative_prompt_embeds: Tensor | None = None    # [B, S, D], for callbacks to look at
    add_text_embeds: Tensor | None = None       # [n B, P], SDXL: the pooled text
    # [n B, 6], SDXL: original height, width; top, left; target height, width
    add_time_ids: Tensor | None = None
    timestep_cond: Tensor | None = None         # [B, E], LCM: the guidance scale itself, embedded
    mask: Tensor | None = None                  # [B, 1, h, w], inpainting: 1 = paint here
    masked_image_latents: Tensor | None = None  # [B, L, h, w], for inpainting UNets

    def of_the_prompt(self, batch: int) -> Conditions:
        """Without the rows of the negative prompt: n = 1."""
        texts = {name: getattr(self, name) for name in ("prompt_embeds", "add_text_embeds", "add_time_ids")}
        return replace(self, **{name: None if rows is None else rows[-batch:]
                                for name, rows in texts.items()})


class StableDiffusionPipeline(PipelineFolder, PipelineHabits, PipelineLoRA):
    """The whole model: `pipe = StableDiffusionPipeline.from_pretrained(folder)`,
    then `pipe("a herb shop").images`.

    `scheduler` may be replaced at any time: `pipe.scheduler =
    EulerDiscreteScheduler.from_config(pipe.scheduler.config)`; diffusers' own are taken as well.
    A UNet with size conditioning means SDXL. There is no safety checker: what you show to others is yours to
    check. Without text encoders the calls need prompt_embeds.

    guidance_interval: guidance only from one to the other fraction of the walk from noise to picture, the
    prompt alone, at half the cost, before and after (Kynkaanniemi 2024). All of it by default.
    """

    guidance_interval: tuple[float, float] = (0.0, 1.0)

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel | None,
        tokenizer: CLIPTokenizer | None,
        unet: UNet2DConditionModel,
        scheduler: Scheduler,
        text_encoder_2: CLIPTextModelWithProjection | None = None,
        tokenizer_2: CLIPTokenizer | None = None,
        force_zeros_for_empty_prompt: bool = True,
        **absent: Any,
    ):
        settle("StableDiffusionPipeline", absent, {}, dict.fromkeys(NEVER_HERE, "it is never used here"))
        self.vae, self.unet = vae, unet
        self.text_encoder, self.tokenizer = text_encoder, tokenizer
        self.text_encoder_2, self.tokenizer_2 = text_encoder_2, tokenizer_2
        # SDXL: no negative prompt means zeros
        self.force_zeros_for_empty_prompt = force_zeros_for_empty_prompt
        self.scheduler = scheduler
        if not self.is_xl:
            mend_early_config(scheduler)
        self.factor = 2 ** (len(vae.config.block_out_channels) - 1)  # f, picture pixels per latent
        self._interrupt, self._guidance_scale, self._num_timesteps = False, 1.0, 0

    @property
    def is_xl(self) -> bool:
        """Whether the UNet is SDXL's."""
        return self.unet.config.addition_embed_type == "text_time"

    # ---- the whole run

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        *,
        prompt_2: str | list[str] | None = None,
        image: Pictures = None,
        mask_image: Pictures = None,
        strength: float | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = 50,
        timesteps: Sequence[int] | None = None,
        sigmas: Sequence[float] | None = None,
        denoising_start: float | None = None,
        denoising_end: float | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | list[str] | None = None,
        negative_prompt_2: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: Generators = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        guidance_rescale: float = 0.0,
        clip_skip: int | None = None,
        original_size: tuple[int, int] | None = None,
        crops_coords_top_left: tuple[int, int] = (0, 0),
        target_size: tuple[int, int] | None = None,
        negative_original_size: tuple[int, int] | None = None,
        negative_crops_coords_top_left: tuple[int, int] = (0, 0),
        negative_target_size: tuple[int, int] | None = None,
        cross_attention_kwargs: dict[str, float] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        progress: bool = True,
        **habits: Any,
    ) -> StableDiffusionPipelineOutput | tuple:
        """Draws num_images_per_prompt pictures for each prompt.

        image: start from this picture (image to image); with mask_image: paint anew where the mask is white.
        Latents [B, L, h, w], already scaled, are taken as they are.
        strength: the part of the steps to walk, in (0, 1]; by default 0.8 with an image, 1 with a mask.
        height, width: in pixels, multiples of the VAE's factor;
        by default the model's own size, or the image's.
        timesteps, sigmas: the walk itself in place of num_inference_steps, for samplers that take one.
        denoising_end, denoising_start: walk the noisier part only, or the cleaner part of another's latents,
        as fractions of the whole: two models in turn.
        guidance_scale: by default 7.5, or 5 for SDXL. 1 is the prompt alone, at half the cost;
        0 is the negative prompt alone and draws nothing of the prompt (upstream takes 0 for 1),
        so it warns. LCM models embed it.
        generator: one for all, or a list with one for each picture, which then does not depend on the batch.
        latents: noise [B, L, h, w] to start from. prompt_embeds and the other three: texts already encoded,
        as encode_prompt returns them, in place of prompts.
        cross_attention_kwargs: {"scale": s}, how much of a loaded LoRA counts.
        output_type: "pil", "pt" ([B, 3, H, W] in 0 to 1), "np" ([B, H, W, 3]) or "latent".
        callback_on_step_end: called as f(pipe, step, timestep, {name: tensor}) with the tensors asked for;
        may return others to go on with, change `pipe._guidance_scale`, or set `pipe._interrupt`.
        Raises ValueError for arguments that do not fit.
        Warns of prompts that are cut, with the words that are lost.
        """
        settle("StableDiffusionPipeline", habits, {}, CALL_REFUSED)
        self._check_prompts(prompt, prompt_embeds, pooled_prompt_embeds, negative_prompt,
                            negative_prompt_embeds, negative_pooled_prompt_embeds)
        prompts = [prompt] if isinstance(prompt, str) else prompt
        batch = len(prompts if prompt_embeds is None else prompt_embeds) * num_images_per_prompt
        self._check(image, mask_image, strength, output_type, batch, generator)
        if denoising_start is not None and (image is None or mask_image is not None):
            raise ValueError("denoising_start needs an image, the latents to go on from, and no mask")
        scale = (5.0 if self.is_xl else 7.5) if guidance_scale is None else float(guidance_scale)
        for name, value in (("guidance_scale", scale), ("guidance_rescale", guidance_rescale), ("eta", eta)):
            if not math.isfinite(value):
                raise ValueError(f"{name} = {value} is not a finite number")
        if scale == 0 and self.unet.config.time_cond_proj_dim is None:
            warnings.warn("guidance_scale 0 ignores the prompt; for a model without guidance (Turbo) it is 1",
                          stacklevel=2)
        self._guidance_scale, self._interrupt = scale, False
        asked = self._asked(callback_on_step_end_tensor_inputs)
        picture = None if image is None else self._pixels(image, height, width)
        height, width = self._size(height, width, picture)

        with self.lora_strength((cross_attention_kwargs or {}).get("scale", 1.0)):
            text = self.encode_prompt(
                prompts, None, num_images_per_prompt, self.do_classifier_free_guidance or scale == 0,
                negative_prompt, prompt_embeds, negative_prompt_embeds, None, clip_skip, prompt_2,
                negative_prompt_2, pooled_prompt_embeds, negative_pooled_prompt_embeds)
            own = (original_size or (height, width), crops_coords_top_left, target_size or (height, width))
            other = (negative_original_size, negative_crops_coords_top_left, negative_target_size)
            c = self._conditions(text, own, other if negative_original_size and negative_target_size else own)
            walk = self._timesteps(num_inference_steps, {"timesteps": timesteps, "sigmas": sigmas}, strength,
                                   image, mask_image, denoising_start, denoising_end)
            x, known = self._start(c, picture, mask_image, walk, strength, (height, width), batch, generator,
                                   latents, denoising_start)
            x = self._denoise(x, walk, c, known, guidance_rescale, {"eta": eta, "generator": generator},
                              callback_on_step_end, asked, progress)
            images = self._finish(x, output_type)
        if return_dict:
            return StableDiffusionPipelineOutput(images)
        return (images,) if self.is_xl else (images, None)

    def _denoise(self, x: Tensor, timesteps: Tensor, c: Conditions, known: InpaintState | None,
                 rescale: float, options: dict[str, Any], callback: Callable[..., dict | None] | None,
                 asked: list[str], progress: bool) -> Tensor:
        """The walk from noise to latents [B, L, h, w]."""
        accepted = inspect.signature(self.scheduler.step).parameters
        options = {name: value for name, value in options.items() if name in accepted}
        show = progress and not self.progress_options.get("disable") and sys.stderr.isatty()
        self._num_timesteps = len(timesteps)
        self.at_work(self.unet)
        for i, t in enumerate(timesteps):
            if self._interrupt:
                continue
            guided = within(self.guidance_interval, t, self.scheduler.config.num_train_timesteps)
            given = c if guided else c.of_the_prompt(len(x))
            output = self._guided(x, t, given, rescale)                     # [B, L, h, w]
            x = self.scheduler.step(output, t, x, **options).prev_sample
            # a UNet that was not trained to inpaint
            if known is not None and not known.trained:
                x = known.keep(self.scheduler, x, timesteps[i + 1 : i + 2])
            if callback is not None:
                seen = {"latents": x, **vars(c)}
                changed = callback(self, i, t, {name: seen[name] for name in asked}) or {}
                x = changed.pop("latents", x)
                for name in changed.keys() & vars(c).keys():
                    setattr(c, name, changed[name])
            if show:
                print(f"\rstep {i + 1}/{len(timesteps)}", end="\n" * (i + 1 == len(timesteps)),
                      file=sys.stderr, flush=True)
        return x

    def _guided(self, x: Tensor, t: Tensor, c: Conditions, rescale: float) -> Tensor:
        """The prediction with classifier-free guidance: e = e_neg + scale (e_text - e_neg) (Ho 2022)."""
        n = len(c.prompt_embeds) // len(x)
        output = self._predict(x, t, c, n)
        if n == 1:                                                          # nothing to mix
            return output
        negative, text = output.chunk(2)
        mixed = negative + self._guidance_scale * (text - negative)
        # Lin 2023, eq. 14 to 16: back to the deviation of the text's prediction
        if rescale > 0:
            dims = tuple(range(1, text.ndim))
            narrowed = mixed * (text.std(dims, keepdim=True) / mixed.std(dims, keepdim=True))
            mixed = rescale * narrowed + (1 - rescale) * mixed
        return mixed

    def _predict(self, x: Tensor, t: Tensor, c: Conditions, n: int) -> Tensor:
        """The UNet on the latents once for each of the n texts, as one batch."""
        x = self.scheduler.scale_model_input(torch.cat([x] * n), t)        # [n B, L, h, w]
        if c.masked_image_latents is not None:
            x = torch.cat([x, torch.cat([c.mask] * n), torch.cat([c.masked_image_latents] * n)], dim=1)
        added = None
        if self.is_xl:
            added = {"text_embeds": c.add_text_embeds, "time_ids": c.add_time_ids}
        return self.unet(x, t, c.prompt_embeds, timestep_cond=c.timestep_cond, added_cond_kwargs=added,
                         return_dict=False)[0]

    # ---- the text

    def encode_prompt(
        self,
        prompt: str | list[str] | None,
        device: torch.device | str | None = None,
        num_images_per_prompt: int = 1,
        do_classifier_free_guidance: bool = True,
        negative_prompt: str | list[str] | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        lora_scale: float | None = None,
        clip_skip: int | None = None,
        prompt_2: str | list[str] | None = None,
        negative_prompt_2: str | list[str] | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
    ) -> tuple[Tensor | None, ...]:
        """(prompt_embeds, negative_prompt_embeds), each [B, S, D], and for SDXL the two pooled ones [B, P]:
        a call takes them in place of prompts. What is given is kept; without guidance the negative ones are
        None."""
        with self.lora_strength(1.0 if lora_scale is None else lora_scale):
            text, pooled = prompt_embeds, pooled_prompt_embeds
            if text is None:
                prompts = [prompt] if isinstance(prompt, str) else list(prompt)
                second = _listed(prompts if prompt_2 is None else prompt_2, len(prompts), "prompt_2")
                text, pooled = self.encode_text(prompts, second, clip_skip)
            no_text, no_pooled = negative_prompt_embeds, negative_pooled_prompt_embeds
            if do_classifier_free_guidance and no_text is None:
                no_text, no_pooled = self._encode_negative(negative_prompt, negative_prompt_2, text, pooled)
        parts = (text, no_text, pooled, no_pooled) if self.is_xl else (text, no_text)
        return tuple(None if p is None else p.repeat_interleave(num_images_per_prompt, dim=0).to(
            self.device if device is None else device, self.unet.dtype) for p in parts)

    def _encode_negative(self, negative: str | list[str] | None, negative_2: str | list[str] | None,
                         text: Tensor, pooled: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The negative prompt's text and pooled text, or what stands for none: zeros in SDXL, else ""."""
        if self.is_xl and negative is None and self.force_zeros_for_empty_prompt:
            return torch.zeros_like(text), torch.zeros_like(pooled)
        first = _listed("" if negative is None else negative, len(text), "negative_prompt")
        second = _listed(first if negative_2 is None else negative_2, len(text), "negative_prompt_2")
        return self.encode_text(first, second, None)            # never skips layers, as upstream

    def encode_text(
        self, prompts: list[str], prompts_2: list[str], clip_skip: int | None
    ) -> tuple[Tensor, Tensor | None]:
        """Texts -> what the UNet attends to [B, S, D], and for SDXL the pooled text [B, P].

        SD 1 and 2 read the last layer (normalised); SDXL the last but one of both encoders, side by side.
        clip_skip: that many layers earlier.
        """
        if self.text_encoder is None or self.tokenizer is None:
            raise ValueError("this pipeline has no text encoder and tokenizer: give prompt_embeds and "
                             "negative_prompt_embeds")
        self.at_work(self.text_encoder, self.text_encoder_2)
        ids = self._tokens(self.tokenizer, prompts)                         # [B, S]
        skip = clip_skip or 0
        out = self.text_encoder(ids.to(self.text_encoder.device), output_hidden_states=True)
        if not self.is_xl:
            normalised = self.text_encoder.text_model.final_layer_norm if skip else None
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

    def _conditions(self, text: tuple[Tensor | None, ...], sizes: tuple, negative_sizes: tuple) -> Conditions:
        """Both texts, or the one that counts, as the rows of one batch."""
        prompt, negative, pooled, no_pooled = (*text, None, None)[:4]
        rows = [(negative, no_pooled, negative_sizes), (prompt, pooled, sizes)]
        if self._guidance_scale == 1 or self.unet.config.time_cond_proj_dim is not None:
            rows = rows[1:]                     # LCM, or nothing to mix
        elif self._guidance_scale == 0:
            rows = rows[:1]
        c = Conditions(torch.cat([row[0] for row in rows]), negative)
        if self.is_xl:
            c.add_text_embeds = torch.cat([row[1] for row in rows])
            c.add_time_ids = torch.cat([self.size_conditioning(*row[2], row[0]) for row in rows])
        c.timestep_cond = self._embed_guidance(self._guidance_scale, prompt)
        return c

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

    def _timesteps(self, steps: int | None, custom: dict[str, Any], strength: float | None, image: Pictures,
                   mask: Pictures, start: float | None, end: float | None) -> Tensor:
        """The timesteps to walk: all, or with an image the last `strength` of them; or between two
        fractions of the whole."""
        given = {name: value for name, value in custom.items() if value is not None}
        if unknown := given.keys() - inspect.signature(self.scheduler.set_timesteps).parameters.keys():
            raise ValueError(f"{type(self.scheduler).__name__} takes no {unknown.pop()}")
        # on the CPU: reading a timestep that lies on a GPU would wait, in each step, for all work before it
        self.scheduler.set_timesteps(**(given or {"num_inference_steps": steps}), device="cpu")
        timesteps = self.scheduler.timesteps
        first = 0
        if start is not None:
            first = int((timesteps >= self._cutoff("denoising_start", start)).sum())
            if getattr(self.scheduler, "order", 1) == 2 and (len(timesteps) - first) % 2 == 0:
                first -= 1                      # Heun's: not between the two halves of a step
        elif image is not None:
            first = self._first(len(timesteps) if given else steps,
                                (0.8 if mask is None else 1.0) if strength is None else strength)
        last = len(timesteps)
        if end is not None:
            last = int((timesteps >= self._cutoff("denoising_end", end)).sum())
        if first >= last:
            raise ValueError(f"denoising_start = {start} and denoising_end = {end} leave no step to take")
        if (first or image is not None) and hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(first)
        return timesteps[first:last]

    def _first(self, steps: int, strength: float) -> int:
        """The place of the first timestep that a strength in (0, 1] leaves; order counts Heun's two."""
        first = steps - min(int(steps * strength), steps)
        if first == steps:
            raise ValueError(f"strength = {strength} of {steps} steps leaves no step to take")
        return first * getattr(self.scheduler, "order", 1)

    def _cutoff(self, name: str, fraction: float) -> int:
        """The training timestep at a fraction of the walk from noise to picture."""
        if not 0 < fraction < 1:
            raise ValueError(f"{name} = {fraction} must lie between 0 and 1")
        T = self.scheduler.config.num_train_timesteps
        return int(round(T - fraction * T))

    def _start(self, c: Conditions, picture: Tensor | None, mask_image: Pictures, timesteps: Tensor,
               strength: float | None, size: tuple[int, int], batch: int, generator: Generators,
               latents: Tensor | None, denoising_start: float | None) -> tuple[Tensor, InpaintState | None]:
        """The first latents, and for inpainting what is known of the picture."""
        like = c.prompt_embeds
        if mask_image is not None:
            known = self._inpaint(c, picture, mask_image, timesteps, strength, size, batch, generator,
                                  latents)
            return known.start, known
        if denoising_start is not None:         # another model's latents, with the noise that they have
            return self._encode(picture, batch, generator, like.dtype), None
        if picture is not None:
            return self._noised(picture, timesteps, batch, generator, like), None
        return self._noise(latents, batch, *size, generator, like) * self.scheduler.init_noise_sigma, None

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
            latents = self._encode(picture, batch, generator, c.prompt_embeds.dtype)
        noise = self._noise(given, batch, *size, generator, c.prompt_embeds)
        start = noise * self.scheduler.init_noise_sigma
        if not whole and given is None:
            start = self.scheduler.add_noise(latents, noise, timesteps[:1].repeat(batch))
        pixels = (self._pixels(mask_image, *size, mask=True) >= 0.5).to(picture)        # [1, 1, H, W]
        masked = self._encode(picture * (1 - pixels), batch, generator, c.prompt_embeds.dtype)
        small = F.interpolate(pixels, size=start.shape[-2:]).to(start)                  # [1, 1, h, w]
        mask = small.repeat(batch // len(small), 1, 1, 1)
        c.mask, c.masked_image_latents = mask, masked if trained else None
        return InpaintState(start, mask, latents, noise, trained)

    def _encode(self, picture: Tensor, batch: int, generator: Generators, dtype: torch.dtype) -> Tensor:
        """Pictures [1 or B, 3, H, W] in -1 to 1 -> scaled latents [B, L, h, w],
        drawn from the VAE's Gaussian."""
        if batch % len(picture):
            raise ValueError(f"{len(picture)} images for {batch} pictures")
        if self._is_latents(picture):
            return picture.repeat(batch // len(picture), 1, 1, 1).to(self.device, dtype)
        if isinstance(generator, list):
            picture = picture.repeat(batch // len(picture), 1, 1, 1)
        self.at_work(self.vae)
        vae, own = self.vae, self.vae.dtype
        if self.is_xl and vae.config.force_upcast:
            # from any dtype, as upstream: the draw below then is float32's
            vae.to(torch.float32)
        coded = vae.encode(picture.to(self.device, vae.dtype))
        # diffusers' AutoencoderTiny has no distribution
        z = coded.latent_dist.sample(generator) if hasattr(coded, "latent_dist") else coded.latents
        z = z.to(dtype)
        if vae.dtype != own:
            vae.to(own)
        mean, std = self.latent_statistics(z)
        z = (z - mean) * vae.config.scaling_factor / std
        return torch.cat([z] * (batch // len(z)))

    def decode_latents(self, z: Tensor) -> Tensor:
        """Scaled latents -> pictures [B, 3, H, W] in -1 to 1.
        SDXL's VAE overflows in half precision: float32."""
        self.at_work(self.vae)
        vae, own = self.vae, self.vae.dtype
        if self.is_xl and vae.config.force_upcast and own == torch.float16:
            vae.to(torch.float32)
            z = z.to(torch.float32)
        mean, std = self.latent_statistics(z)
        x = vae.decode(z * std / vae.config.scaling_factor + mean).sample
        if vae.dtype != own:
            vae.to(own)
        return x

    def latent_statistics(self, z: Tensor) -> tuple[Tensor | float, Tensor | float]:
        """What latents are shifted and scaled by beside the scaling factor: nothing, but for a few VAEs."""
        c = self.vae.config                                 # of another class of VAE, it may lack the fields
        given = [c.get(name) for name in ("latents_mean", "latents_std")]
        if None in given:
            return c.get("shift_factor") or 0.0, 1.0
        return tuple(torch.tensor(v).view(1, -1, 1, 1).to(z) for v in given)

    def _finish(self, x: Tensor, output_type: str) -> Any:
        pictures = x if output_type == "latent" else (self.decode_latents(x) * 0.5 + 0.5).clamp(0, 1)
        self.at_work()
        return {"pil": to_pil, "np": to_numpy}.get(output_type, lambda same: same)(pictures)

    # ---- arguments

    def _check_prompts(self, prompt: Any, embeds: Tensor | None, pooled: Tensor | None, negative: Any,
                       negative_embeds: Tensor | None, negative_pooled: Tensor | None) -> None:
        if (prompt is None) == (embeds is None):
            raise ValueError("give either prompt or prompt_embeds")
        if negative is not None and negative_embeds is not None:
            raise ValueError("give either negative_prompt or negative_prompt_embeds")
        if prompt is not None and not isinstance(prompt, (str, list, tuple)):
            raise ValueError(f"prompt is a {type(prompt).__name__}, not a text or a list of texts")
        if embeds is not None and negative_embeds is not None and embeds.shape != negative_embeds.shape:
            raise ValueError(f"prompt_embeds are {list(embeds.shape)}, negative_prompt_embeds "
                             f"{list(negative_embeds.shape)}")
        for name, text, summary in (("", embeds, pooled), ("negative_", negative_embeds, negative_pooled)):
            if self.is_xl and (text is None) != (summary is None):
                raise ValueError(f"{name}prompt_embeds and {name}pooled_prompt_embeds belong together")

    def _asked(self, names: Sequence[str]) -> list[str]:
        """What a callback wants to see. Raises ValueError for what it may not."""
        if unknown := [name for name in names if name not in self._callback_tensor_inputs]:
            raise ValueError(f"callback_on_step_end_tensor_inputs: {unknown[0]!r} is not one of "
                             f"{', '.join(self._callback_tensor_inputs)}")
        return list(names)

    @property
    def _callback_tensor_inputs(self) -> list[str]:
        """Upstream's documented list of what a callback may see and change."""
        text = ["add_text_embeds", "add_time_ids"] if self.is_xl else ["negative_prompt_embeds"]
        return ["latents", "prompt_embeds", *text, "mask", "masked_image_latents"]

    def _is_latents(self, picture: Tensor) -> bool:
        return picture.shape[1] == self.vae.config.latent_channels != 3

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
        if output not in OUTPUT_TYPES:
            raise ValueError(f"output_type = {output!r} is not one of {', '.join(OUTPUT_TYPES)}")
        if batch < 1 or (isinstance(generator, list) and len(generator) != batch):
            given = f"{len(generator)} generators" if isinstance(generator, list) else "no prompt"
            raise ValueError(f"{given} for {batch} pictures")

    def _size(self, height: int | None, width: int | None, picture: Tensor | None) -> tuple[int, int]:
        if picture is not None:
            f = self.factor if self._is_latents(picture) else 1
            return picture.shape[-2] * f, picture.shape[-1] * f
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
        """Pictures -> [B, 3, H, W] in -1 to 1; masks -> [B, 1, H, W] in 0 to 1; latents stay as they are.

        Pillow pictures are resized to height x width, by default to their own size rounded down;
        tensors and arrays must fit.
        """
        images = image if isinstance(image, list) else [image]
        if images and all(map(is_pil, images)):
            w, h = images[0].size
            h = h - h % self.factor if height is None else height
            w = w - w % self.factor if width is None else width
            image = from_pil(images, *self._multiple(h, w), "L" if mask else "RGB")
        else:
            image = from_arrays(image)
        if not mask and self._is_latents(image):
            return image
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


@dataclass(eq=False, repr=False)
class InpaintState:
    """Inpainting: where to start, the mask (1 = paint), the picture's latents, the one noise for all steps,
    and whether the UNet was trained for it."""

    start: Tensor
    mask: Tensor
    latents: Tensor | None
    noise: Tensor
    trained: bool

    def keep(self, scheduler: Scheduler, x: Tensor, next_timestep: Tensor) -> Tensor:
        """Outside the mask, the known picture with the noise of the next timestep;
        after the last step without."""
        known = self.latents
        if len(next_timestep):
            known = scheduler.add_noise(known, self.noise, next_timestep)
        return (1 - self.mask) * known + self.mask * x


def mend_early_config(scheduler: Scheduler) -> None:
    """Early SD 1 folders left out steps_offset = 1 and clip_sample = false;
    upstream mends that, and so do we."""
    if scheduler.config.get("steps_offset", 1) != 1:
        scheduler.register_to_config(steps_offset=1)
    if scheduler.config.get("clip_sample", False):
        scheduler.register_to_config(clip_sample=False)


def _listed(text: str | list[str], count: int, name: str) -> list[str]:
    texts = [text] * count if isinstance(text, str) else list(text)
    if len(texts) != count:
        raise ValueError(f"{name} has {len(texts)} entries for {count} prompts")
    return texts


# upstream's classes for these tasks and models: one class here
StableDiffusionXLPipeline = StableDiffusionPipeline
StableDiffusionImg2ImgPipeline = StableDiffusionXLImg2ImgPipeline = StableDiffusionPipeline
StableDiffusionInpaintPipeline = StableDiffusionXLInpaintPipeline = StableDiffusionPipeline
