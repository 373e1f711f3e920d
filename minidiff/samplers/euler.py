"""Euler: the first-order step along the probability-flow ODE. What SDXL ships.

Read after base.py. Paper: Karras 2022 (EDM), Algorithm 2 without its second-order correction;
`s_churn` and its relatives are that algorithm's. Mirrors: diffusers' scheduling_euler_discrete.py.
Shapes: x, x0, eps all [B, C, H, W] or any other; sigma a number; x = x0 + sigma eps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from minidiff.samplers.base import EulerBase, SchedulerOutput, check_steps, interpolate
from minidiff.schedule import Generators, Offset, ScheduleConfig, Sigma, randn, to_x0_unscaled


@dataclass(frozen=True, eq=False, repr=False)
class EulerDiscreteConfig(ScheduleConfig):
    """Fields and defaults of diffusers' EulerDiscreteScheduler."""

    # how sigma is read between training timesteps
    interpolation_type: Literal["linear", "log_linear"] = "linear"
    use_karras_sigmas: bool = False             # at most one of the three spacings
    use_exponential_sigmas: bool = False
    use_beta_sigmas: bool = False
    sigma_min: Sigma | None = None              # the ends of those spacings, by default the model's own
    sigma_max: Sigma | None = None
    timestep_spacing: Literal["linspace", "leading", "trailing"] = "linspace"
    timestep_type: Literal["discrete", "continuous"] = "discrete"   # continuous: log(sigma) / 4, with v only
    steps_offset: Offset = 0
    rescale_betas_zero_snr: bool = False
    final_sigmas_type: Literal["zero", "sigma_min"] = "zero"


class EulerDiscreteScheduler(EulerBase):
    """One evaluation of the model a step; deterministic unless `step` is given s_churn."""

    config_class = EulerDiscreteConfig

    def __init__(self, config: EulerDiscreteConfig | None = None, *by_place, **fields):
        super().__init__(config, *by_place, **fields)
        if self._continuous():
            self.timesteps = 0.25 * self.sigmas[:-1].log()

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
    ) -> None:
        """Chooses n timesteps and n + 1 levels sigma, or takes one of the two lists (`sigmas` ends with its
        0)."""
        if sum(given is not None for given in (num_inference_steps, timesteps, sigmas)) != 1:
            raise ValueError("give exactly one of num_inference_steps, timesteps and sigmas")
        if timesteps is not None:
            self._check_custom()
        if sigmas is not None:
            levels = torch.tensor(sigmas, dtype=torch.float32).tolist()
            times = [self._sigma_to_t(sigma) for sigma in levels[:-1]]
        else:
            times, levels = self._choose(num_inference_steps, timesteps)
        if self._continuous():
            times = (0.25 * torch.tensor(levels[:-1], dtype=torch.float32).log()).tolist()
        self.num_inference_steps = len(times)
        self._set_levels(times, levels, device, torch.float32)

    def _choose(self, n: int | None, given: Sequence[float] | None) -> tuple[list[float], list[float]]:
        if given is None:
            check_steps(n, len(self))
        times = self._spaced(n) if given is None else [float(t) for t in given]
        n = len(times)
        # sigma is read at the rounded timesteps
        times = torch.tensor(times, dtype=torch.float32).tolist()
        table = self.train_sigmas.tolist()
        levels = [interpolate(table, t) for t in times]
        if self.config.interpolation_type == "log_linear":
            ends = self.train_sigmas.log()
            levels = torch.linspace(ends[-1].item(), ends[0].item(), n + 1).exp().tolist()
        respaced = self._respace(levels, n)
        if respaced is not None:
            times, levels = [self._sigma_to_t(sigma) for sigma in respaced], respaced
        return times, [*levels, self._last_sigma()]

    def _check_custom(self) -> None:
        c = self.config
        if c.use_karras_sigmas or c.use_exponential_sigmas or c.use_beta_sigmas or self._continuous():
            raise ValueError("timesteps cannot be given together with a spacing of sigmas or continuous "
                             "timesteps")

    def _continuous(self) -> bool:
        return self.config.timestep_type == "continuous" and self.config.prediction_type == "v_prediction"

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = math.inf,
        s_noise: float = 1.0,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor, Tensor]:
        """x at one level -> x at the next. model_output is the UNet's prediction for
        (scale_model_input(sample), timestep).

        s_churn > 0 first adds noise up to a level sigma_hat (Karras 2022, Algorithm 2). Computed in float32.
        """
        i = self._at(timestep)
        x, sigma = sample.to(torch.float32), self.sigmas[i]
        churning = s_tmin <= sigma <= s_tmax
        gamma = min(s_churn / (len(self.sigmas) - 1), 2**0.5 - 1) if churning else 0.0
        sigma_hat = sigma * (gamma + 1)
        if gamma > 0:
            noise = randn(model_output.shape, generator, model_output.device, model_output.dtype)
            x = x + noise * s_noise * (sigma_hat**2 - sigma**2) ** 0.5
        x0 = to_x0_unscaled(self.config.prediction_type, model_output, x, sigma, sigma_hat)
        slope = (x - x0) / sigma_hat                                        # dx / dsigma
        x_prev = (x + slope * (self.sigmas[i + 1] - sigma_hat)).to(model_output.dtype)
        self.step_index = i + 1
        return SchedulerOutput(x_prev, x0) if return_dict else (x_prev, x0)
