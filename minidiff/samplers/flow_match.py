"""Euler for rectified flow: straight paths from noise to picture. What Stable Diffusion 3 and Flux ship.

Read after euler.py. Papers: Liu 2022 (rectified flow), Lipman 2022 (flow matching, section 4.1 with the
optimal-transport path), Esser 2024 (the shift, eq. 23).
Mirrors: diffusers' scheduling_flow_match_euler_discrete.py, to the order and the precision of its operations:
levels of its own choice are computed in float64, given ones in float32.
Symbols: x_t = (1 - sigma) x0 + sigma eps; the model predicts dx/dsigma = eps - x0; t = T sigma, T = 1000.
Shapes: x, x0, eps all [B, C, H, W] or any other; sigma a number.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from miniclip.config import Fraction, Real, Tokens
from minidiff.samplers.base import SchedulerOutput, SigmaWalk, check_steps, linspace
from minidiff.schedule import Clip, Generators, Sampler, SamplerConfig, randn

MOST_STEPS = 100_000        # time is continuous, so there may be more steps than T


@dataclass(frozen=True, eq=False, repr=False)
class FlowMatchEulerDiscreteConfig(SamplerConfig):
    """Fields and defaults of diffusers' FlowMatchEulerDiscreteScheduler."""

    shift: Clip = 1.0                           # above 1: more steps where the noise is; 3 in SD 3
    use_dynamic_shifting: bool = False          # shift by the mu given to set_timesteps, not by `shift`
    base_shift: Real | None = 0.5               # these four are read by pipelines that work mu out
    max_shift: Real | None = 1.15
    base_image_seq_len: Tokens = 256
    max_image_seq_len: Tokens = 4096
    invert_sigmas: bool = False                 # levels rise to 1, for models that count so (Mochi)
    shift_terminal: Fraction | None = None      # where the levels end, before the last 0; None and 0: as is
    use_karras_sigmas: bool = False             # at most one of the three spacings
    use_exponential_sigmas: bool = False
    use_beta_sigmas: bool = False
    time_shift_type: Literal["exponential", "linear"] = "exponential"   # of the dynamic shift
    stochastic_sampling: bool = False           # fresh noise at every step


class FlowMatchEulerDiscreteScheduler(SigmaWalk, Sampler):
    """One evaluation of the model a step. `timesteps` are T sigma, and are no whole numbers."""

    config_class = FlowMatchEulerDiscreteConfig
    by_place = tuple(field.name for field in dataclasses.fields(FlowMatchEulerDiscreteConfig))
    prediction_kind = "flow_prediction"

    def __init__(self, config: FlowMatchEulerDiscreteConfig | None = None, *by_place: Any, **fields: Any):
        super().__init__(config, *by_place, **fields)
        self._check_spacings()
        self.shift = self.config.shift
        sigmas = torch.arange(len(self), 0, -1, dtype=torch.float32) / len(self)
        self.sigmas = sigmas if self.config.use_dynamic_shifting else shifted(sigmas, self.shift)
        self.timesteps = self.sigmas * len(self)
        self.sigma_max, self.sigma_min = self.sigmas[0].item(), self.sigmas[-1].item()

    def set_shift(self, shift: float) -> None:
        """The shift of the next set_timesteps."""
        self.shift = shift

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
        timesteps: Sequence[float] | None = None,
    ) -> None:
        """Chooses n timesteps and n + 1 levels sigma, or takes n of the one, of the other, or of both.

        Levels are shifted whether given or not; given timesteps stay, so give levels that suit them.
        As upstream, n levels run from sigma_max to sigma_min before they are shifted, although sigma_min is
        shifted already; and where it is 1 / T the last step does next to nothing, so `sigmas=[1, ..., 1/n]`
        spends n steps better. mu: the dynamic shift, with use_dynamic_shifting only.
        """
        c, T = self.config, len(self)
        given = [values for values in (sigmas, timesteps) if values is not None]
        n = len(given[0]) if given and num_inference_steps is None else num_inference_steps
        check_steps(n, MOST_STEPS)
        if any(len(values) != n for values in given):
            raise ValueError(f"sigmas and timesteps must be num_inference_steps = {n} each")
        if c.use_dynamic_shifting and mu is None:
            raise ValueError("use_dynamic_shifting needs mu, the shift for this size of picture")
        levels = self._levels(n, sigmas, timesteps)
        levels = self.time_shift(mu, 1.0, levels) if c.use_dynamic_shifting else shifted(levels, self.shift)
        if c.shift_terminal:
            levels = self.stretch_shift_to_terminal(levels)
        respaced = self._respace(levels.tolist(), n)
        levels = (levels if respaced is None else torch.tensor(respaced, dtype=torch.float64)).float()
        times = levels * T if timesteps is None else torch.as_tensor(timesteps, dtype=torch.float32)
        if c.invert_sigmas:                     # then given timesteps are not read, as upstream
            levels = 1.0 - levels
            times = levels * T
        self.num_inference_steps = n
        self.timesteps = times.to(device)
        self.sigmas = torch.cat([levels, torch.full((1,), float(c.invert_sigmas))]).to(device)
        self.step_index = self.begin_index = None

    def _levels(self, n: int, sigmas: Sequence[float] | None, timesteps: Sequence[float] | None) -> Tensor:
        """n levels [n] before any shift."""
        T = len(self)
        if sigmas is not None:
            return torch.as_tensor(sigmas, dtype=torch.float32)
        if timesteps is not None:
            return torch.as_tensor(timesteps, dtype=torch.float32) / T
        return torch.tensor(linspace(self.sigma_max * T, self.sigma_min * T, n), dtype=torch.float64) / T

    def time_shift(self, mu: float, sigma: float, t: Tensor) -> Tensor:
        """The dynamic shift of levels t: m / (m + (1/t - 1)^sigma) with m = exp(mu), or mu where linear."""
        m = math.exp(mu) if self.config.time_shift_type == "exponential" else mu
        return torch.full_like(t, m) / (m + (1 / t - 1) ** sigma)

    def stretch_shift_to_terminal(self, t: Tensor) -> Tensor:
        """Levels t, stretched away from 1 so that the last one is shift_terminal."""
        if t[-1] == 1:
            raise ValueError("shift_terminal stretches levels that fall: take two steps or more")
        scale = (1 - t[-1]) / (1 - self.config.shift_terminal)
        return 1 - (1 - t) / scale

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
        per_token_timesteps: Tensor | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        """x at one level -> x at the next, by the model's eps - x0 for (sample, timestep). In float32.

        s_churn, s_tmin, s_tmax, s_noise: no effect, as upstream.
        per_token_timesteps [B, L], for x [B, L, C]: a level for each token, and the next is the highest of
        the schedule below it. As upstream, its step then has the other sign, and its output is not cast.
        """
        i, x = self._at(timestep), sample.to(torch.float32)
        if per_token_timesteps is None:
            sigma, sigma_next = self.sigmas[i], self.sigmas[i + 1]
            d = sigma_next - sigma
        else:
            sigma, sigma_next = self._token_levels(per_token_timesteps)
            d = sigma - sigma_next
        if self.config.stochastic_sampling:
            noise = randn(x.shape, generator, x.device, x.dtype)
            x_prev = (1.0 - sigma_next) * (x - sigma * model_output) + sigma_next * noise
        else:
            x_prev = x + d * model_output
        if per_token_timesteps is None:
            x_prev = x_prev.to(model_output.dtype)
        self.step_index = i + 1
        return SchedulerOutput(x_prev) if return_dict else (x_prev,)

    def _token_levels(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """sigma [B, L, 1] of each token, and the next of the schedule below it."""
        sigma, levels = timesteps / len(self), self.sigmas.to(timesteps.device)[:, None, None]
        below = ((levels < sigma - 1e-6) * levels).amax(dim=0)
        return sigma[..., None], below[..., None]

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """x = (1 - sigma) x0 + sigma eps. Pictures [B, ...], timesteps [B] out of `self.timesteps`."""
        sigma = self.sigma_at(timestep, sample)
        return sigma * noise + (1.0 - sigma) * sample

    # ---- training, at any time between 0 and T: upstream leaves it to its scripts

    def timesteps_at(self, fractions: Tensor) -> Tensor:
        """Timesteps of training at fractions [B] in 0..1 of the schedule, shifted as it is."""
        return shifted(fractions, self.shift) * len(self)

    def signal_and_noise(self, timestep: float) -> tuple[float, float]:
        """1 - sigma and sigma at one timestep."""
        sigma = timestep / len(self)
        return 1 - sigma, sigma

    def _signal_and_noise(self, timesteps: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        on_cpu = timesteps.device.type == "cpu"             # elsewhere looking would wait for the device
        if on_cpu and not 0 <= timesteps.min() <= timesteps.max() <= len(self):
            raise ValueError(f"timesteps must lie in 0 .. {len(self)}, got "
                             f"{timesteps.flatten()[:8].tolist()}")
        sigma = (timesteps.to(x.device) / len(self)).to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))
        return 1 - sigma, sigma


def shifted(t: Tensor, shift: float) -> Tensor:
    """Levels t in 0..1 moved towards 1 for a shift above 1 (Esser 2024, eq. 23)."""
    return shift * t / (1 + (shift - 1) * t)
