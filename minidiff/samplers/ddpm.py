"""DDPMScheduler: ancestral sampling as in the first diffusion papers, and the forward process of training.

Read after schedule.py, first of samplers/.
Papers: Ho 2020 (equations cited below), Nichol 2021 (learned variances).
Mirrors: diffusers' scheduling_ddpm.py, number for number.
Departures, each held by a test: `fixed_large_log` gives sqrt(beta_t) where upstream gives NaN; a timestep
outside the schedule is a ValueError.
Shapes: x_t, x0, eps all [B, C, H, W] or any other; t a number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from miniclip.config import Fraction
from miniclip.output import ModelOutput
from minidiff.habits import DDPM_LEFT_OUT
from minidiff.schedule import (
    Clip,
    Generators,
    Offset,
    ScheduleConfig,
    Scheduler,
    randn,
    spaced_timesteps,
    to_x0,
)


@dataclass(frozen=True, eq=False, repr=False)
class DDPMConfig(ScheduleConfig):
    """Fields and defaults of diffusers' DDPMScheduler."""

    variance_type: str | None = "fixed_small"   # any unknown name means fixed_small, as upstream
    # clip x0 at every step: for pictures in [-1, 1], not for latents
    clip_sample: bool = True
    thresholding: bool = False                  # dynamic thresholding instead
    dynamic_thresholding_ratio: Fraction = 0.995
    clip_sample_range: Clip = 1.0
    sample_max_value: Clip = 1.0
    timestep_spacing: Literal["linspace", "leading", "trailing"] = "leading"
    steps_offset: Offset = 0
    rescale_betas_zero_snr: bool = False


@dataclass(eq=False, repr=False)
class DDPMSchedulerOutput(ModelOutput):
    """x_{t-1} and the x0 predicted on the way, as attributes, keys or indices."""

    prev_sample: Tensor
    pred_original_sample: Tensor


class DDPMScheduler(Scheduler):
    """Ho 2020, Algorithm 2: fresh noise at every step but the last, so it needs many steps."""

    config_class = DDPMConfig
    left_out = DDPM_LEFT_OUT
    custom_timesteps = False

    def set_timesteps(self, num_inference_steps: int | None = None, device: torch.device | str | None = None,
                      timesteps: Sequence[int] | None = None) -> None:
        """Choose `num_inference_steps` timesteps by the config's spacing, or give them,
        in descending order."""
        T = len(self)
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError("give either num_inference_steps or timesteps")
        if timesteps is None:
            if not 1 <= num_inference_steps <= T:
                raise ValueError(f"num_inference_steps = {num_inference_steps} must lie in 1 .. {T}")
            chosen = spaced_timesteps(self.config.timestep_spacing, num_inference_steps, T,
                                      self.config.steps_offset)
        else:
            chosen = [int(t) for t in timesteps]
        if not chosen or any(b >= a for a, b in zip(chosen, chosen[1:], strict=False)):
            raise ValueError(f"timesteps must be in descending order and not empty, got {chosen[:8]}")
        if chosen[0] >= T or chosen[-1] < 0:
            raise ValueError(f"timesteps run from {chosen[0]} to {chosen[-1]}, but training knew 0 .. "
                             f"{T - 1}")
        self.num_inference_steps = num_inference_steps if timesteps is None else self.num_inference_steps
        self.custom_timesteps = timesteps is not None
        self.timesteps = torch.tensor(chosen, dtype=torch.int64, device=device)

    def previous_timestep(self, timestep: int | Tensor) -> int | Tensor:
        """The next lower entry of the schedule, -1 below the last; t - 1 if no schedule was set."""
        if not (self.custom_timesteps or self.num_inference_steps):
            return timestep - 1
        t = int(timestep)
        schedule = self.timesteps.tolist()
        if t not in schedule:
            raise ValueError(f"timestep {t} is not in the schedule {schedule[:4]} ... {schedule[-1]}")
        following = schedule[schedule.index(t) + 1:]
        return torch.tensor(following[0] if following else -1)

    def step(self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, generator: Generators = None,
             return_dict: bool = True) -> DDPMSchedulerOutput | tuple[Tensor, Tensor]:
        """x_t -> x_{t-1}, drawn from p(x_{t-1} | x_t). model_output is the UNet's prediction for (sample,
        timestep)."""
        t, x_t, predicted_variance = int(timestep), sample, None
        learned = self.config.variance_type in ("learned", "learned_range")
        if learned and model_output.shape[1] == 2 * x_t.shape[1]:
            model_output, predicted_variance = model_output.chunk(2, dim=1)
        alpha_bar, alpha_bar_prev = self._alpha_bars(t)
        alpha = alpha_bar / alpha_bar_prev      # over a respaced stride, not the table's alpha_t
        beta = 1 - alpha

        kind, signal, sigma = self.config.prediction_type, alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        x0 = self.clip_x0(to_x0(kind, model_output, x_t, signal, sigma))
        # The mean of q(x_{t-1} | x_t, x0): Ho 2020, eq. 7
        mean = (alpha_bar_prev.sqrt() * beta / (1 - alpha_bar)) * x0 \
            + (alpha.sqrt() * (1 - alpha_bar_prev) / (1 - alpha_bar)) * x_t
        if t > 0:
            noise = randn(model_output.shape, generator, model_output.device, model_output.dtype)
            mean = mean + self._sigma(t, predicted_variance) * noise
        return DDPMSchedulerOutput(mean, x0) if return_dict else (mean, x0)

    def _alpha_bars(self, t: int) -> tuple[Tensor, Tensor]:
        """alpha_bar at t and at the previous timestep; 1 below the schedule, where x is clean."""
        previous = int(self.previous_timestep(t))
        return self.alphas_cumprod[t], self.alphas_cumprod[previous] if previous >= 0 else torch.tensor(1.0)

    def _get_variance(self, t: int, predicted_variance: Tensor | None = None,
                      variance_type: str | None = None) -> Tensor:
        """What upstream's method of this name returns: a variance, its log,
        or (fixed_small_log) a deviation."""
        alpha_bar, alpha_bar_prev = self._alpha_bars(t)
        beta = 1 - alpha_bar / alpha_bar_prev
        variance = ((1 - alpha_bar_prev) / (1 - alpha_bar) * beta).clamp(min=1e-20)     # Ho 2020, below eq. 7
        kind = variance_type or self.config.variance_type
        if kind == "fixed_small_log":
            return torch.exp(0.5 * variance.log())
        if kind == "fixed_large":
            return beta
        if kind == "fixed_large_log":
            return beta.log()
        if kind in ("learned", "learned_range") and predicted_variance is None:
            raise ValueError(f"variance_type = {kind!r} needs a model that gives twice the channels")
        if kind == "learned":
            return predicted_variance
        if kind == "learned_range":     # between the two bounds, in logs: Nichol 2021, eq. 15
            fraction = (predicted_variance + 1) / 2
            return fraction * beta.log() + (1 - fraction) * variance.log()
        return variance

    def _sigma(self, t: int, predicted_variance: Tensor | None) -> Tensor:
        """The standard deviation of the noise added at step t."""
        value = self._get_variance(t, predicted_variance)
        if self.config.variance_type == "fixed_small_log":
            return value
        if self.config.variance_type in ("learned_range", "fixed_large_log"):   # upstream: sqrt of a log, NaN
            return torch.exp(0.5 * value)
        return value.sqrt()
