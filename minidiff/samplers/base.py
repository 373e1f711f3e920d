"""What the samplers share beyond schedule.py: their output, and the walk along a list of noise levels sigma.

Read after ddpm.py; then ddim.py, the simplest. Papers: Karras 2022 (eq. 5 for the spacing; x = x0 +
sigma eps, the form that Euler and DPM-Solver use), Lu 2022 (lambda = -log sigma).
Mirrors: the parts that diffusers' scheduling_euler_discrete.py, scheduling_euler_ancestral_discrete.py and
scheduling_dpmsolver_multistep.py repeat.
Symbols: sigma_t = sqrt((1 - alpha_bar_t) / alpha_bar_t); T training timesteps, n sampling steps;
lists run high to low.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from miniclip.config import ConfigError
from miniclip.output import ModelOutput
from minidiff.habits import EULER_LEFT_OUT
from minidiff.schedule import SamplerConfig, ScheduleConfig, Scheduler, spaced_timesteps


@dataclass(eq=False, repr=False)
class SchedulerOutput(ModelOutput):
    """The next, less noisy picture and, where the sampler has it, its guess of x0: as attributes,
    keys or indices."""

    prev_sample: Tensor
    pred_original_sample: Tensor | None = None


def checked_timesteps(chosen: Sequence[int], T: int) -> list[int]:
    """`chosen`, if the tables have an entry for each;
    `leading` spacing with an offset can step over the end."""
    if chosen and 0 <= min(chosen) and max(chosen) < T:
        return list(chosen)
    raise ValueError(f"timesteps {list(chosen)[:4]} ... must lie in 0 .. {T - 1}; lower steps_offset or the "
                     "steps")


def check_steps(steps: Any, T: int) -> None:
    """Raises ValueError unless `steps` is a whole number in 1 .. T; numpy's count as well."""
    if not isinstance(steps, Integral) or not 1 <= steps <= T:
        raise ValueError(f"num_inference_steps = {steps} must be a whole number in 1 .. {T}")


# -------------------------- spacings of sigma: n levels from sigma_max down to sigma_min, in double precision


def linspace(start: float, stop: float, n: int) -> list[float]:
    """n numbers from start to stop, both included, as numpy rounds them."""
    step = (stop - start) / (n - 1) if n > 1 else 0.0
    return [start + i * step for i in range(n - 1)] + [stop] if n > 1 else [start]


def karras_sigmas(sigma_max: float, sigma_min: float, n: int, rho: float = 7.0) -> list[float]:
    """Karras 2022, eq. 5: evenly spaced in sigma^(1/rho)."""
    high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return [(high + ramp * (low - high)) ** rho for ramp in linspace(0, 1, n)]


def exponential_sigmas(sigma_max: float, sigma_min: float, n: int) -> list[float]:
    """Evenly spaced in log sigma."""
    return [math.exp(x) for x in linspace(math.log(sigma_max), math.log(sigma_min), n)]


def beta_sigmas(sigma_max: float, sigma_min: float, n: int) -> list[float]:
    """Quantiles of the Beta(0.6, 0.6) distribution: dense at both ends."""
    return [sigma_min + beta_quantile(1 - x, 0.6, 0.6) * (sigma_max - sigma_min) for x in linspace(0, 1, n)]


def beta_quantile(p: float, a: float, b: float) -> float:
    """The x below which a Beta(a, b) variable falls with probability p, by bisection."""
    if p <= 0.0 or p >= 1.0:
        return min(max(p, 0.0), 1.0)
    low, high = 0.0, 1.0
    while (middle := (low + high) / 2) not in (low, high):
        low, high = (middle, high) if beta_cdf(middle, a, b) < p else (low, middle)
    return middle


def beta_cdf(x: float, a: float, b: float) -> float:
    """The regularised incomplete beta function, by its hypergeometric series, taken from the nearer end."""
    if x > 0.5:
        return 1 - beta_cdf(1 - x, b, a)
    factor = math.exp(a * math.log(x) + math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b))
    total, term, k = 0.0, factor, 0
    while abs(term / (a + k)) > abs(total) * 1e-17:
        total += term / (a + k)
        k += 1
        term *= (k - b) / k * x
    return total


def interpolate(table: Sequence[float], at: float) -> float:
    """The table read between its entries; flat beyond its ends."""
    if at >= len(table) - 1 or at <= 0:
        return table[-1] if at > 0 else table[0]
    j = int(at)
    return (table[j + 1] - table[j]) * (at - j) + table[j]


class SigmaWalk:
    """Mixin of the samplers that walk a list of levels `sigmas` [n + 1] (float32), one a step.

    `step` finds its place by the first timestep it is given, or by `set_begin_index`, and counts from there.
    """

    config: SamplerConfig
    timesteps: Tensor
    sigmas: Tensor
    step_index: int | None = None
    begin_index: int | None = None

    def _check_spacings(self) -> None:
        spacings = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
        if sum(bool(getattr(self.config, name, False)) for name in spacings) > 1:
            raise ConfigError(f"only one of {', '.join(spacings)} can be used")

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Where the walk starts: image-to-image skips the first levels."""
        self.begin_index = begin_index

    def index_for_timestep(self, timestep: Tensor | float, schedule_timesteps: Tensor | None = None) -> int:
        """The place of a timestep in the schedule; the second one if it is there twice, as upstream."""
        schedule = self.timesteps if schedule_timesteps is None else schedule_timesteps
        value = float(timestep)
        places = [i for i, t in enumerate(schedule.tolist()) if t == value]
        if not places:
            raise ValueError(f"timestep {value:g} is not in the schedule")
        return places[min(1, len(places) - 1)]

    def _start(self, timestep: Tensor | float) -> int:
        """The current place in the walk."""
        if self.step_index is None:
            self.step_index = (self.index_for_timestep(timestep) if self.begin_index is None
                               else self.begin_index)
        if self.step_index >= len(self.sigmas) - 1:
            raise IndexError(f"all {len(self.sigmas) - 1} steps are done: call set_timesteps to start again")
        return self.step_index

    def _at(self, timestep: Tensor | float) -> int:
        """The place in the walk; a whole number is refused, since it may be meant as an index."""
        whole_tensor = isinstance(timestep, Tensor) and not timestep.is_floating_point()
        if isinstance(timestep, int) or whole_tensor:
            raise ValueError(f"timestep {timestep} is a whole number: pass an entry of scheduler.timesteps")
        return self._start(timestep)

    def _respace(self, levels: Sequence[float], n: int) -> list[float] | None:
        """n levels between the ends of `levels` in the spacing that the config names;
        None if it names none."""
        c, high, low = self.config, levels[0], levels[-1]
        high = high if getattr(c, "sigma_max", None) is None else c.sigma_max
        low = low if getattr(c, "sigma_min", None) is None else c.sigma_min
        if c.use_karras_sigmas:
            return karras_sigmas(high, low, n)
        if c.use_exponential_sigmas:
            return exponential_sigmas(high, low, n)
        return beta_sigmas(high, low, n) if c.use_beta_sigmas else None

    def sigma_at(self, timesteps: Tensor, x: Tensor) -> Tensor:
        """The levels of schedule timesteps [B], shaped to multiply x;
        all at the walk's place once it has one."""
        timesteps = torch.atleast_1d(timesteps)
        if self.begin_index is None:
            places = [self.index_for_timestep(t) for t in timesteps]
        else:
            places = [self.begin_index if self.step_index is None else self.step_index] * len(timesteps)
        sigma = self.sigmas[places].to(device=x.device, dtype=x.dtype)
        return sigma.reshape(-1, *[1] * (x.ndim - 1))


class SigmaScheduler(SigmaWalk, Scheduler):
    """Base of the samplers of diffusion models that walk levels; `sigmas` stays on the CPU."""

    def __init__(self, config: ScheduleConfig | None = None, *by_place: Any, **fields: Any):
        super().__init__(config, *by_place, **fields)
        self._check_spacings()
        if getattr(self.config, "rescale_betas_zero_snr", False):
            self.alphas_cumprod[-1] = 2**-24  # not 0, so that the first sigma is finite (2^12)
        # sqrt((1 - alpha_bar) / alpha_bar) for t = 0 .. T-1
        self.train_sigmas = ((1 - self.alphas_cumprod) / self.alphas_cumprod) ** 0.5
        self.timesteps = self.timesteps.float()
        self.sigmas = torch.cat([self.train_sigmas.flip(0), torch.zeros(1)])

    def _set_levels(self, timesteps: Sequence[float], sigmas: Sequence[float], device: Any,
                    dtype: torch.dtype) -> None:
        self.timesteps = torch.tensor(timesteps, dtype=dtype).to(device)
        self.sigmas = torch.tensor(sigmas, dtype=torch.float32)
        self.step_index = self.begin_index = None

    def _last_sigma(self) -> float:
        return self.train_sigmas[0].item() if self.config.final_sigmas_type == "sigma_min" else 0.0

    def _sigma_to_t(self, sigma: float) -> float:
        """The timestep, between two training timesteps, whose sigma this is;
        log sigma is taken as linear between."""
        log_sigmas = self.train_sigmas.log()
        log_sigma = math.log(max(sigma, 1e-10))
        below = [i for i, level in enumerate(log_sigmas.tolist()) if level <= log_sigma]
        low = min(below[-1] if below else 0, len(log_sigmas) - 2)
        gap = (log_sigmas[low] - log_sigmas[low + 1]).item()
        w = min(max((log_sigmas[low].item() - log_sigma) / gap, 0.0), 1.0)
        return (1 - w) * low + w * (low + 1)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x = x0 + sigma eps (Karras 2022). Pictures [B, ...], timesteps [B] out of `self.timesteps`."""
        return original_samples + self.sigma_at(timesteps, original_samples) * noise

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """v = (eps - sigma x0) / sqrt(1 + sigma^2), which is Salimans 2022's v written with sigma.

        Upstream's looks alpha_bar up by the place in the schedule in place of the timestep, and is wrong.
        """
        sigma = self.sigma_at(timesteps, sample)
        return (noise - sigma * sample) / (sigma**2 + 1) ** 0.5


class EulerBase(SigmaScheduler):
    """What both Euler samplers do with x = x0 + sigma eps, whose variance grows with sigma."""

    left_out = EULER_LEFT_OUT

    @property
    def init_noise_sigma(self) -> Tensor:
        """Multiply standard normal noise by it to start."""
        most = self.sigmas.max()
        return most if self.config.timestep_spacing in ("linspace", "trailing") else (most**2 + 1) ** 0.5

    def scale_model_input(self, sample: Tensor, timestep: Tensor | float) -> Tensor:
        """x / sqrt(sigma^2 + 1): what the UNet was trained on,
        sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) eps."""
        sigma = self.sigmas[self._start(timestep)]
        return sample / (sigma**2 + 1) ** 0.5

    def _spaced(self, n: int) -> list[float]:
        """Timesteps by the config's spacing; with linspace they are not whole numbers."""
        c, T = self.config, len(self)
        if c.timestep_spacing == "linspace":
            return linspace(0, T - 1, n)[::-1]
        return [float(t) for t in spaced_timesteps(c.timestep_spacing, n, T, c.steps_offset)]
