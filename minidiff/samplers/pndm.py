"""PNDM: a linear multistep method along the path of DDIM. What Stable Diffusion 1 ships.

Read after ddim.py. Paper: Liu 2022 (PNDM): eq. 9 is `_transfer`, eq. 12 the four-step rule, eq. 13 the
Runge-Kutta start. Mirrors: diffusers' scheduling_pndm.py.
Stable Diffusion skips the Runge-Kutta start (`skip_prk_steps`): the first two steps are then an Euler step
and its correction, so n steps evaluate the model n + 1 times.
Shapes: x_t, eps all [B, C, H, W] or any other; t a number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from minidiff.habits import PNDM_LEFT_OUT
from minidiff.samplers.base import SchedulerOutput, check_steps, checked_timesteps
from minidiff.schedule import Offset, ScheduleConfig, Scheduler, spaced_timesteps, to_eps


@dataclass(frozen=True, eq=False, repr=False)
class PNDMConfig(ScheduleConfig):
    """Fields and defaults of diffusers' PNDMScheduler."""

    skip_prk_steps: bool = False
    set_alpha_to_one: bool = False              # below the first timestep alpha_bar is 1, else alpha_bar_0
    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon"
    timestep_spacing: Literal["linspace", "leading", "trailing"] = "leading"
    steps_offset: Offset = 0


class PNDMScheduler(Scheduler):
    """Deterministic, and with a memory of past steps: call set_timesteps before every walk."""

    config_class = PNDMConfig
    left_out = PNDM_LEFT_OUT
    prk_timesteps: list[int] | None = None      # of the Runge-Kutta start
    plms_timesteps: list[int] | None = None     # of all that follows it

    def __init__(self, config: PNDMConfig | None = None, *by_place, **fields):
        super().__init__(config, *by_place, **fields)
        self.final_alpha_cumprod = (torch.tensor(1.0) if self.config.set_alpha_to_one
                                    else self.alphas_cumprod[0])
        self._restart()

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        """Chooses the timesteps by the config's spacing, some of them twice: the model is asked once for
        each."""
        c, T, n = self.config, len(self), num_inference_steps
        check_steps(n, T)
        spaced = spaced_timesteps(c.timestep_spacing, n, T, c.steps_offset)
        if c.skip_prk_steps:
            prk, plms = [], spaced[:2] + spaced[1:] if n > 1 else spaced    # the second timestep twice
        else:
            prk, plms = self._prk_timesteps(spaced), spaced[3:]
        self.timesteps = torch.tensor(checked_timesteps(prk + plms, T), device=device)
        self.prk_timesteps, self.plms_timesteps, self.num_inference_steps = prk, plms, n
        self._restart()

    def _prk_timesteps(self, spaced: list[int]) -> list[int]:
        """Three Runge-Kutta steps a -> b, each at a, halfway, halfway and b."""
        if len(spaced) < 4:
            raise ValueError(f"{len(spaced)} steps: the Runge-Kutta start needs 4 (or set skip_prk_steps)")
        half = len(self) // len(spaced) // 2
        return [t for a, b in zip(spaced[:3], spaced[1:4], strict=True) for t in (a, b + half, b + half, b)]

    def _restart(self) -> None:
        self.counter = 0
        self.ets: list[Tensor] = []             # the last model outputs e_t, newest last
        self.cur_sample: Tensor | None = None   # x where the current Runge-Kutta or first step began
        self.cur_model_output: Tensor | float = 0

    def _stride(self) -> int:
        if self.num_inference_steps is None:
            raise ValueError("call set_timesteps before step")
        return len(self) // self.num_inference_steps

    def step(
        self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, return_dict: bool = True
    ) -> SchedulerOutput | tuple[Tensor]:
        """The next sample; call it once for each entry of `timesteps`, in order."""
        self._stride()
        rule = self.step_prk if self.counter < len(self.prk_timesteps) else self.step_plms
        return rule(model_output, timestep, sample, return_dict)

    def step_prk(
        self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, return_dict: bool = True
    ) -> SchedulerOutput | tuple[Tensor]:
        """One of the four evaluations of a Runge-Kutta step (Liu 2022, eq. 13),
        weights 1/6, 1/3, 1/3, 1/6."""
        stage = self.counter % 4
        t_prev = int(timestep) - (0 if self.counter % 2 else self._stride() // 2)
        t = self.prk_timesteps[self.counter - stage]
        eps = model_output
        if stage == 0:
            self.cur_model_output = 1 / 6 * eps
            self.ets.append(eps)
            self.cur_sample = sample
        elif stage < 3:
            self.cur_model_output = self.cur_model_output + 1 / 3 * eps
        else:
            eps = self.cur_model_output + 1 / 6 * eps
        x = sample if self.cur_sample is None else self.cur_sample
        return self._finish(x, t, t_prev, eps, return_dict)

    def step_plms(
        self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, return_dict: bool = True
    ) -> SchedulerOutput | tuple[Tensor]:
        """One step of the Adams-Bashforth rule on the last four outputs (Liu 2022, eq. 12),
        fewer at the start."""
        if not self.config.skip_prk_steps and len(self.ets) < 3:
            raise ValueError("step_plms comes after the 12 evaluations of the Runge-Kutta start (step_prk)")
        t, x, eps = int(timestep), sample, model_output
        t_prev = t - self._stride()
        if self.counter == 1:                   # the same step again, with the slope's mean over its two ends
            t, t_prev = t + self._stride(), t
        else:
            self.ets = [*self.ets[-3:], eps]
        e = self.ets[::-1]                      # newest first
        if len(e) == 1 and self.counter == 0:
            self.cur_sample = x
        elif len(e) == 1 and self.counter == 1:
            eps, x, self.cur_sample = (eps + e[0]) / 2, self.cur_sample, None
        elif len(e) == 2:
            eps = (3 * e[0] - e[1]) / 2
        elif len(e) == 3:
            eps = (23 * e[0] - 16 * e[1] + 5 * e[2]) / 12
        else:
            eps = 1 / 24 * (55 * e[0] - 59 * e[1] + 37 * e[2] - 9 * e[3])
        return self._finish(x, t, t_prev, eps, return_dict)

    def _finish(
        self, x: Tensor, t: int, t_prev: int, eps: Tensor, return_dict: bool
    ) -> SchedulerOutput | tuple[Tensor]:
        x_prev = self._transfer(x, t, t_prev, eps)
        self.counter += 1
        return SchedulerOutput(x_prev) if return_dict else (x_prev,)

    def _transfer(self, x: Tensor, t: int, t_prev: int, eps: Tensor) -> Tensor:
        """DDIM's step from t to t_prev along a slope eps (Liu 2022, eq. 9, written with alpha_bar)."""
        a = self.alphas_cumprod[t]
        a_prev = self.alphas_cumprod[t_prev] if t_prev >= 0 else self.final_alpha_cumprod
        eps = to_eps(self.config.prediction_type, eps, x, a**0.5, (1 - a) ** 0.5)
        denominator = a * (1 - a_prev) ** 0.5 + (a * (1 - a) * a_prev) ** 0.5
        return (a_prev / a) ** 0.5 * x - (a_prev - a) * eps / denominator
