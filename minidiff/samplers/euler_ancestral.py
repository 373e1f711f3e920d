"""Euler with ancestral noise: an Euler step below the next level, then fresh noise up to it.

Read after euler.py. It is what SDXL Turbo ships.
Source: k-diffusion's sample_euler_ancestral; sigma_up is DDPM's posterior deviation written with sigma (Ho
2020, eq. 7).
Mirrors: diffusers' scheduling_euler_ancestral_discrete.py.
Shapes: x, x0, eps all [B, C, H, W] or any other; sigma a number; x = x0 + sigma eps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from minidiff.samplers.base import EulerBase, SchedulerOutput, check_steps, interpolate
from minidiff.schedule import Generators, Offset, ScheduleConfig, randn, to_x0_unscaled


@dataclass(frozen=True, eq=False, repr=False)
class EulerAncestralDiscreteConfig(ScheduleConfig):
    """Fields and defaults of diffusers' EulerAncestralDiscreteScheduler."""

    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon"
    timestep_spacing: Literal["linspace", "leading", "trailing"] = "linspace"
    steps_offset: Offset = 0
    rescale_betas_zero_snr: bool = False


class EulerAncestralDiscreteScheduler(EulerBase):
    """Stochastic: the picture keeps changing with the number of steps."""

    config_class = EulerAncestralDiscreteConfig

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        """Chooses n timesteps by the config's spacing, and their levels sigma with a 0 at the end."""
        check_steps(num_inference_steps, len(self))
        times = torch.tensor(self._spaced(num_inference_steps), dtype=torch.float32).tolist()
        table = self.train_sigmas.tolist()
        self.num_inference_steps = num_inference_steps
        self._set_levels(times, [*(interpolate(table, t) for t in times), 0.0], device, torch.float32)

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor, Tensor]:
        """x at one level -> x at the next. model_output is the UNet's prediction for
        (scale_model_input(sample), timestep)."""
        i = self._at(timestep)
        x, sigma, to = sample.to(torch.float32), self.sigmas[i], self.sigmas[i + 1]
        x0 = to_x0_unscaled(self.config.prediction_type, model_output, x, sigma, sigma)
        sigma_up = (to**2 * (sigma**2 - to**2) / sigma**2) ** 0.5
        sigma_down = (to**2 - sigma_up**2) ** 0.5
        x_prev = x + (x - x0) / sigma * (sigma_down - sigma)
        noise = randn(model_output.shape, generator, model_output.device, model_output.dtype)
        x_prev = (x_prev + noise * sigma_up).to(model_output.dtype)
        self.step_index = i + 1
        return SchedulerOutput(x_prev, x0) if return_dict else (x_prev, x0)
