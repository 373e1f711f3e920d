"""DDIM: the deterministic sampler that takes large steps with a model trained by DDPM.

Read after base.py. Paper: Song 2021 (DDIM), equations 12 and 16. Mirrors: diffusers' scheduling_ddim.py.
Kept as upstream, because checkpoints are used so: the previous timestep is t - T // n and not the next entry
of the schedule, which differs by a timestep or two where n does not divide T (`trailing`, `linspace`).
Shapes: x_t, x0, eps all [B, C, H, W] or any other; t a number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from miniclip.config import Fraction
from minidiff.samplers.base import SchedulerOutput, check_steps, checked_timesteps
from minidiff.schedule import (
    Clip,
    Generators,
    Offset,
    ScheduleConfig,
    Scheduler,
    randn,
    spaced_timesteps,
    to_eps,
    to_x0,
)


@dataclass(frozen=True, eq=False, repr=False)
class DDIMConfig(ScheduleConfig):
    """Fields and defaults of diffusers' DDIMScheduler."""

    # clip x0 at every step: for pictures in [-1, 1], not for latents
    clip_sample: bool = True
    set_alpha_to_one: bool = True               # below the first timestep alpha_bar is 1, else alpha_bar_0
    steps_offset: Offset = 0
    thresholding: bool = False                  # dynamic thresholding in place of clipping
    dynamic_thresholding_ratio: Fraction = 0.995
    clip_sample_range: Clip = 1.0
    sample_max_value: Clip = 1.0
    timestep_spacing: Literal["linspace", "leading", "trailing"] = "leading"
    rescale_betas_zero_snr: bool = False


class DDIMScheduler(Scheduler):
    """Song 2021: deterministic with eta 0. Any number of steps up to T; 20 to 50 are usual."""

    config_class = DDIMConfig

    def __init__(self, config: DDIMConfig | None = None, *by_place, **fields):
        super().__init__(config, *by_place, **fields)
        self.final_alpha_cumprod = (torch.tensor(1.0) if self.config.set_alpha_to_one
                                    else self.alphas_cumprod[0])

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        """Chooses `num_inference_steps` of the T training timesteps by the config's spacing."""
        c, T = self.config, len(self)
        check_steps(num_inference_steps, T)
        chosen = spaced_timesteps(c.timestep_spacing, num_inference_steps, T, c.steps_offset)
        self.timesteps = torch.tensor(checked_timesteps(chosen, T), device=device)
        self.num_inference_steps = num_inference_steps

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: Generators = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor, Tensor]:
        """x_t -> x_{t - T // n}. model_output is the UNet's prediction for (sample, timestep).

        eta: 0 adds no noise (DDIM), 1 as much as DDPM;
        `variance_noise` gives the noise, else `generator` draws it.
        use_clipped_model_output: derive eps again from the clipped x0.
        """
        x_t, t, t_prev = sample, int(timestep), self._previous(int(timestep))
        alpha_bar, alpha_bar_prev = self._alpha_bar(t), self._alpha_bar(t_prev)
        kind, a, s = self.config.prediction_type, alpha_bar**0.5, (1 - alpha_bar) ** 0.5
        x0 = self.clip_x0(to_x0(kind, model_output, x_t, a, s))
        eps = to_eps(kind, model_output, x_t, a, s)
        if use_clipped_model_output:
            eps = to_eps("sample", x0, x_t, a, s)
        sigma = eta * self._get_variance(t, t_prev) ** 0.5
        # Song 2021, eq. 12: "pointing to x_t"
        direction = (1 - alpha_bar_prev - sigma**2) ** 0.5 * eps
        x_prev = alpha_bar_prev**0.5 * x0 + direction
        if eta > 0:
            x_prev = x_prev + sigma * self._noise(model_output, generator, variance_noise)
        return SchedulerOutput(x_prev, x0) if return_dict else (x_prev, x0)

    def _previous(self, t: int) -> int:
        if self.num_inference_steps is None:
            raise ValueError("call set_timesteps before step")
        return t - len(self) // self.num_inference_steps

    def _alpha_bar(self, t: int) -> Tensor:
        return self.alphas_cumprod[t] if t >= 0 else self.final_alpha_cumprod

    def _get_variance(self, timestep: int, prev_timestep: int) -> Tensor:
        """sigma^2 at eta = 1 (Song 2021, eq. 16)."""
        alpha_bar, alpha_bar_prev = self._alpha_bar(timestep), self._alpha_bar(prev_timestep)
        return ((1 - alpha_bar_prev) / (1 - alpha_bar)) * (1 - alpha_bar / alpha_bar_prev)

    @staticmethod
    def _noise(like: Tensor, generator: Generators, given: Tensor | None) -> Tensor:
        if given is not None and generator is not None:
            raise ValueError("give either generator or variance_noise")
        return randn(like.shape, generator, like.device, like.dtype) if given is None else given
