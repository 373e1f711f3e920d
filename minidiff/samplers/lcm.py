"""LCM: four steps with a latent consistency model, which predicts the end of the path from any point of it.

Read after ddim.py. Papers: Luo 2023 (LCM), Song 2023 (consistency models;
multistep sampling is its Algorithm 1).
Mirrors: diffusers' scheduling_lcm.py.
Shapes: x_t, x0, eps all [B, C, H, W] or any other; t a number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from miniclip.config import Fraction
from minidiff.habits import LCM_LEFT_OUT
from minidiff.samplers.base import SchedulerOutput, check_steps, checked_timesteps
from minidiff.samplers.ddpm import DDPMScheduler
from minidiff.schedule import Clip, Generators, Offset, ScheduleConfig, Scheduler, Steps, randn, to_x0

SIGMA_DATA = 0.5  # the data's deviation in the boundary scalings


@dataclass(frozen=True, eq=False, repr=False)
class LCMConfig(ScheduleConfig):
    """Fields and defaults of diffusers' LCMScheduler."""

    beta_start: Fraction = 0.00085
    beta_end: Fraction = 0.012
    beta_schedule: str = "scaled_linear"
    original_inference_steps: Steps = 50        # the timesteps that the distillation knew
    clip_sample: bool = False
    clip_sample_range: Clip = 1.0
    set_alpha_to_one: bool = True               # no effect: the last step goes to the prediction itself
    steps_offset: Offset = 0                    # no effect, as upstream
    thresholding: bool = False
    dynamic_thresholding_ratio: Fraction = 0.995
    sample_max_value: Clip = 1.0
    timestep_spacing: Literal["linspace", "leading", "trailing"] = "leading"  # no effect, as upstream
    timestep_scaling: Clip = 10.0               # of t in the boundary scalings
    rescale_betas_zero_snr: bool = False


@dataclass(eq=False, repr=False)
class LCMSchedulerOutput(SchedulerOutput):
    """prev_sample, noised to the next timestep, and `denoised`, the same picture before that noise."""

    denoised: Tensor | None = None              # the predicted end of the path


class LCMScheduler(Scheduler):
    """Multistep consistency sampling, for distilled models only; 1 to 8 steps are usual."""

    config_class = LCMConfig
    left_out = LCM_LEFT_OUT
    custom_timesteps = False
    step_index: int | None = None
    begin_index: int | None = None

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        original_inference_steps: int | None = None,
        timesteps: Sequence[int] | None = None,
        strength: float = 1.0,
    ) -> None:
        """Chooses n of the timesteps that the distillation knew, or takes a descending list.

        strength: the part of the path to walk, below 1 for image-to-image.
        """
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError("give either num_inference_steps or timesteps")
        T = len(self)
        if timesteps is None:
            original = (self.config.original_inference_steps if original_inference_steps is None
                        else original_inference_steps)
            chosen = self._choose(num_inference_steps, original, strength)
            self.num_inference_steps = num_inference_steps
        else:
            if any(b >= a for a, b in zip(timesteps, timesteps[1:], strict=False)):
                raise ValueError(f"timesteps must be in descending order, got {list(timesteps)[:8]}")
            self.num_inference_steps = n = len(timesteps)
            chosen = timesteps[max(n - min(int(n * strength), n), 0) :]
        self.timesteps = torch.tensor(checked_timesteps([int(t) for t in chosen], T), device=device)
        self.custom_timesteps = timesteps is not None
        self.step_index = self.begin_index = None

    def _choose(self, n: int, original: int, strength: float) -> list[int]:
        """n entries, evenly taken, of the distillation's timesteps k - 1, 2k - 1, ...
        with k = T // original."""
        T = len(self)
        check_steps(n, T)
        check_steps(original, T)
        known = [i * (T // original) - 1 for i in range(1, int(original * strength) + 1)][::-1]
        if n > len(known):
            raise ValueError(f"num_inference_steps = {n} exceeds the {len(known)} steps of the distillation "
                             "to walk")
        return [known[int(i * (len(known) / n))] for i in range(n)]

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Where the walk starts."""
        self.begin_index = begin_index

    previous_timestep = DDPMScheduler.previous_timestep     # as upstream; `step` goes by the place

    def index_for_timestep(self, timestep: int | Tensor, schedule_timesteps: Tensor | None = None) -> int:
        """The place of a timestep in the schedule."""
        schedule = (self.timesteps if schedule_timesteps is None else schedule_timesteps).tolist()
        if int(timestep) not in schedule:
            raise ValueError(f"timestep {int(timestep)} is not in the schedule {schedule[:8]}")
        return schedule.index(int(timestep))

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> LCMSchedulerOutput | tuple[Tensor, Tensor]:
        """x_t -> the predicted end of the path, and from there, but for the last step,
        back up to the next timestep."""
        if self.num_inference_steps is None:
            raise ValueError("call set_timesteps before step")
        if self.step_index is None:
            self.step_index = (self.index_for_timestep(timestep) if self.begin_index is None
                               else self.begin_index)
        alpha_bar = self.alphas_cumprod[int(timestep)]
        x0 = to_x0(self.config.prediction_type, model_output, sample, alpha_bar.sqrt(),
                   (1 - alpha_bar).sqrt())
        c_skip, c_out = self.boundary_scalings(timestep)
        denoised = c_out * self.clip_x0(x0) + c_skip * sample
        x_prev = denoised
        if self.step_index != self.num_inference_steps - 1:
            following = self.step_index + 1
            t_prev = int(self.timesteps[following]) if following < len(self.timesteps) else int(timestep)
            alpha_bar = self.alphas_cumprod[t_prev]
            noise = randn(model_output.shape, generator, model_output.device, denoised.dtype)
            x_prev = alpha_bar.sqrt() * denoised + (1 - alpha_bar).sqrt() * noise
        self.step_index += 1
        return LCMSchedulerOutput(x_prev, denoised=denoised) if return_dict else (x_prev, denoised)

    def boundary_scalings(self, timestep: int | Tensor) -> tuple[Tensor | float, Tensor | float]:
        """c_skip and c_out: 1 and 0 at t = 0, so that the path's end maps to itself (Song 2023, eq. 5)."""
        scaled = timestep * self.config.timestep_scaling
        c_skip = SIGMA_DATA**2 / (scaled**2 + SIGMA_DATA**2)
        return c_skip, scaled / (scaled**2 + SIGMA_DATA**2) ** 0.5

    get_scalings_for_boundary_condition_discrete = boundary_scalings
