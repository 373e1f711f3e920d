"""DPM-Solver and DPM-Solver++, multistep, orders 1 to 3, as ODE or SDE: good pictures in about 20 steps.

Read after euler.py.
Papers: Lu 2022a (DPM-Solver), Lu 2022b (DPM-Solver++: Algorithm 2 is the second order here).
Mirrors: diffusers' scheduling_dpmsolver_multistep.py.
One step of any kind is one line, x_t = ratio x_s + c0 D0 + c1 D1 + c2 D2 + up noise, where D0, D1, D2 are the
model's prediction and its divided differences in lambda. Only the coefficients differ, and each kind has its
function below.
Symbols: alpha_t, sigma_t with x_t = alpha_t x0 + sigma_t eps; lambda_t = log(alpha_t / sigma_t);
h = lambda_t - lambda_s.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor

from miniclip.config import ConfigError, Fraction, Range
from miniclip.files import shown
from miniclip.habits import settle
from minidiff.habits import DPM_LEFT_OUT, SET_TIMESTEPS_REFUSED
from minidiff.samplers.base import (
    SchedulerOutput,
    SigmaScheduler,
    check_steps,
    checked_timesteps,
    interpolate,
    linspace,
)
from minidiff.schedule import (
    Clip,
    Generators,
    Offset,
    ScheduleConfig,
    randn,
    spaced_timesteps,
    threshold,
    to_eps,
    to_x0,
)

# Solver names of related samplers (DEIS, UniPC) whose configs are handed over: upstream reads them so
ALIASES = {"deis": "dpmsolver++", "logrho": "midpoint", "bh1": "midpoint", "bh2": "midpoint"}


@dataclass(frozen=True, eq=False, repr=False)
class DPMSolverMultistepConfig(ScheduleConfig):
    """Fields and defaults of diffusers' DPMSolverMultistepScheduler; those left out are in `inert`."""

    solver_order: Annotated[int, Range(1, 3)] = 2   # 1 to 3; 2 for guided sampling
    prediction_type: Literal["epsilon", "sample", "v_prediction", "flow_prediction"] = "epsilon"
    thresholding: bool = False                  # dynamic thresholding of x0
    dynamic_thresholding_ratio: Fraction = 0.995
    sample_max_value: Clip = 1.0
    algorithm_type: str = "dpmsolver++"         # dpmsolver++, sde-dpmsolver++, dpmsolver, sde-dpmsolver
    solver_type: str = "midpoint"               # midpoint, heun: two second-order rules
    lower_order_final: bool = True              # below 15 steps, end with lower orders
    euler_at_final: bool = False                # end with first order whatever the number of steps
    use_karras_sigmas: bool = False             # at most one of these spacings
    use_exponential_sigmas: bool = False
    use_beta_sigmas: bool = False
    use_lu_lambdas: bool = False                # evenly spaced in lambda
    use_flow_sigmas: bool = False               # flow matching: x = (1 - sigma) x0 + sigma eps
    flow_shift: Clip = 1.0
    final_sigmas_type: Literal["zero", "sigma_min"] = "zero"
    # leave out the noisiest timesteps (-5.1 for the cosine schedule)
    lambda_min_clipped: Annotated[float, Range(-math.inf, 1e6)] = -math.inf
    variance_type: str | None = None            # learned, learned_range: the model also predicts it; not used
    timestep_spacing: Literal["linspace", "leading", "trailing"] = "linspace"
    steps_offset: Offset = 0
    rescale_betas_zero_snr: bool = False

    inert: ClassVar[dict[str, tuple]] = {"use_dynamic_shifting": (False,),
                                         "time_shift_type": ("exponential",)}

    def check(self) -> None:
        """The kind of solver exists, and has the order asked for."""
        super().check()
        for name, known in (("algorithm_type", tuple(RULES)), ("solver_type", ("midpoint", "heun"))):
            value = ALIASES.get(getattr(self, name), getattr(self, name))
            if value not in known:
                raise ConfigError(f"{name} = {shown(value)} is not one of {', '.join(known)}")
            object.__setattr__(self, name, value)
        orders = (1, 2) if self.algorithm_type == "sde-dpmsolver" else (1, 2, 3)
        if self.solver_order not in orders:
            raise ConfigError(f"solver_order = {self.solver_order} is not one that {self.algorithm_type} has")
        if not self.algorithm_type.endswith("++") and self.final_sigmas_type == "zero":
            raise ConfigError(f"algorithm_type = {self.algorithm_type!r} needs final_sigmas_type = "
                              "'sigma_min'")


# ------------------------- the coefficients (ratio, c0, c1 by midpoint, c1 by heun, c2, up) of the four kinds
# The first is that of exact integration with the model's prediction held constant;
# c1 and c2 add its slope and curvature.


def ode_data(alpha_t: Tensor, sigma_t: Tensor, alpha_s: Tensor, sigma_s: Tensor, h: Tensor) -> tuple:
    """dpmsolver++: the model's prediction is x0 (Lu 2022b, eq. 9 and Algorithm 2)."""
    phi = torch.exp(-h) - 1.0
    c2 = -alpha_t * ((phi + h) / h**2 - 0.5)
    return sigma_t / sigma_s, -alpha_t * phi, -0.5 * (alpha_t * phi), alpha_t * (phi / h + 1.0), c2, None


def sde_data(alpha_t: Tensor, sigma_t: Tensor, alpha_s: Tensor, sigma_s: Tensor, h: Tensor) -> tuple:
    """sde-dpmsolver++: the same with noise added back."""
    phi = 1.0 - torch.exp(-2.0 * h)
    c2 = alpha_t * ((phi - 2.0 * h) / (2.0 * h) ** 2 - 0.5)
    heun = alpha_t * (phi / (-2.0 * h) + 1.0)
    ratio = sigma_t / sigma_s * torch.exp(-h)
    return ratio, alpha_t * phi, 0.5 * (alpha_t * phi), heun, c2, sigma_t * torch.sqrt(phi)


def ode_noise(alpha_t: Tensor, sigma_t: Tensor, alpha_s: Tensor, sigma_s: Tensor, h: Tensor) -> tuple:
    """dpmsolver: the model's prediction is eps (Lu 2022a, section 3)."""
    phi = torch.exp(h) - 1.0
    c2 = -sigma_t * ((phi - h) / h**2 - 0.5)
    return alpha_t / alpha_s, -sigma_t * phi, -0.5 * (sigma_t * phi), -sigma_t * (phi / h - 1.0), c2, None


def sde_noise(alpha_t: Tensor, sigma_t: Tensor, alpha_s: Tensor, sigma_s: Tensor, h: Tensor) -> tuple:
    """sde-dpmsolver: the same with noise added back; it has no third order."""
    phi = torch.exp(h) - 1.0
    heun = -2.0 * (sigma_t * (phi / h - 1.0))
    up = sigma_t * torch.sqrt(torch.exp(2 * h) - 1.0)
    return alpha_t / alpha_s, -2.0 * (sigma_t * phi), -sigma_t * phi, heun, None, up


RULES = {"dpmsolver++": ode_data, "sde-dpmsolver++": sde_data, "dpmsolver": ode_noise,
         "sde-dpmsolver": sde_noise}


class DPMSolverMultistepScheduler(SigmaScheduler):
    """One evaluation of the model a step; the higher orders reuse the outputs of the steps before."""

    config_class = DPMSolverMultistepConfig
    left_out = DPM_LEFT_OUT

    def __init__(self, config: DPMSolverMultistepConfig | None = None, *by_place, **fields):
        super().__init__(config, *by_place, **fields)
        # of the training timesteps, for lambda_min_clipped
        self.alpha_t, self.sigma_t = self.alphas_cumprod.sqrt(), (1 - self.alphas_cumprod).sqrt()
        self.lambda_t = torch.log(self.alpha_t) - torch.log(self.sigma_t)
        self.model_outputs: list[Tensor] = []   # converted answers of the last steps, newest last

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        mu: float | None = None,
        timesteps: Sequence[int] | None = None,
    ) -> None:
        """Chooses n timesteps by the config's spacing, or takes them; then their levels sigma."""
        settle("set_timesteps", {"mu": mu}, {}, SET_TIMESTEPS_REFUSED)
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError("give either num_inference_steps or timesteps")
        c = self.config
        if timesteps is None:
            check_steps(num_inference_steps, len(self))
        elif c.use_karras_sigmas or c.use_lu_lambdas or c.use_exponential_sigmas or c.use_beta_sigmas:
            raise ValueError("timesteps cannot be given together with a spacing of sigmas")
        times = self._spaced(num_inference_steps) if timesteps is None else [int(t) for t in timesteps]
        times, levels = self._levels(checked_timesteps(times, len(self)), num_inference_steps)
        self.num_inference_steps = len(times)
        self._set_levels([int(t) for t in times], [*levels, self._last_sigma()], device, torch.int64)
        self.model_outputs = []

    def _spaced(self, n: int) -> list[int]:
        """One timestep more than wanted, of which the lowest is dropped, save for `trailing`."""
        c, T = self.config, len(self)
        last = T - bisect.bisect_left(self.lambda_t.flip(0).tolist(), c.lambda_min_clipped)
        if c.timestep_spacing == "trailing":
            stride = last - (last - T / n)                                  # as numpy's arange rounds it
            return [round(last - i * stride) - 1 for i in range(n) if last - i * stride > 0.5]
        return spaced_timesteps(c.timestep_spacing, n + 1, last, c.steps_offset)[:-1]

    def _levels(self, times: list[int], n: int | None) -> tuple[list[float], list[float]]:
        """Levels sigma for the timesteps, or levels in the config's spacing and the timesteps for them."""
        c, table = self.config, self.train_sigmas.tolist()
        if c.use_lu_lambdas:
            logs = self.train_sigmas.log()
            levels = [math.exp(x) for x in linspace(logs[-1].item(), logs[0].item(), n)]
        elif c.use_flow_sigmas:
            noise = [1.0 - a for a in linspace(1, 1 / len(self), (n or len(times)) + 1)]
            levels = [c.flow_shift * s / (1 + (c.flow_shift - 1) * s) for s in noise][:0:-1]
            return [s * len(self) for s in levels], levels
        else:
            levels = self._respace(table[::-1], n)
        if levels is None:
            return times, [interpolate(table, t) for t in times]
        times = [self._sigma_to_t(sigma) for sigma in levels]
        to_nearest = (c.use_karras_sigmas or c.use_lu_lambdas) and c.beta_schedule != "squaredcos_cap_v2"
        return [round(t) for t in times] if to_nearest else times, levels

    def alpha_sigma(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha_t, sigma_t) of a level sigma = sigma_t / alpha_t."""
        if self.config.use_flow_sigmas:
            return 1 - sigma, sigma
        alpha_t = 1 / (sigma**2 + 1) ** 0.5
        return alpha_t, sigma * alpha_t

    def _log_snr(self, i: int) -> Tensor:
        alpha, sigma = self.alpha_sigma(self.sigmas[i])
        return torch.log(alpha) - torch.log(sigma)

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: Generators = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        """x at one timestep -> x at the next, from this prediction of the model and up to two before it.

        The SDE kinds draw noise from `generator`, or take `variance_noise`. Computed in float32.
        """
        if self.num_inference_steps is None:
            raise ValueError("call set_timesteps before step")
        i = self._start(timestep)
        converted = self.convert_model_output(model_output, sample=sample)
        self.model_outputs = [*self.model_outputs, converted][-self.config.solver_order :]
        noise = variance_noise
        if noise is None and self.config.algorithm_type.startswith("sde"):
            noise = randn(converted.shape, generator, converted.device, torch.float32)
        x_prev = self._update(i, self._order(i), sample.to(torch.float32), noise).to(converted.dtype)
        self.step_index = i + 1
        return SchedulerOutput(x_prev) if return_dict else (x_prev,)

    def _order(self, i: int) -> int:
        """The order of step i: as many as there are answers, fewer at the end, where the last level is 0."""
        c, n = self.config, len(self.timesteps)
        few = c.lower_order_final and n < 15
        if i == n - 1 and (c.euler_at_final or few or c.final_sigmas_type == "zero"):
            return 1
        return min(len(self.model_outputs), 2 if few and i == n - 2 else 3)

    def _update(self, i: int, order: int, x: Tensor, noise: Tensor | None) -> Tensor:
        """x_t = ratio x_s + c0 D0 + c1 D1 + c2 D2 + up noise, from level i to level i + 1."""
        c, m = self.config, self.model_outputs[::-1]                        # newest first
        h = self._log_snr(i + 1) - self._log_snr(i)
        levels = *self.alpha_sigma(self.sigmas[i + 1]), *self.alpha_sigma(self.sigmas[i])
        ratio, c0, midpoint, heun, c2, up = RULES[c.algorithm_type](*levels, h)
        out = ratio * x + c0 * m[0]
        if order > 1:
            r0 = (self._log_snr(i) - self._log_snr(i - 1)) / h
            D1 = 1.0 / r0 * (m[0] - m[1])
        if order == 2:
            out = out + (midpoint if c.solver_type == "midpoint" else heun) * D1
        if order == 3:
            r1 = (self._log_snr(i - 1) - self._log_snr(i - 2)) / h
            bend = D1 - 1.0 / r1 * (m[1] - m[2])
            out = out + heun * (D1 + r0 / (r0 + r1) * bend) + c2 * (1.0 / (r0 + r1) * bend)
        return out if up is None else out + up * noise.to(out.device)

    def convert_model_output(self, model_output: Tensor, sample: Tensor) -> Tensor:
        """The model's prediction as x0 (the ++ kinds) or as eps, whatever it predicts."""
        c, output = self.config, model_output
        alpha_t, sigma_t = self.alpha_sigma(self.sigmas[self.step_index])
        if c.prediction_type == "epsilon" and c.variance_type in ("learned", "learned_range"):
            output = output[:, :3]              # the other channels are the variance
        if not c.algorithm_type.endswith("++"):
            return self._as_eps(output, sample, alpha_t, sigma_t)
        if c.prediction_type == "flow_prediction":
            # the level itself, as upstream, even without use_flow_sigmas
            sigma_t = self.sigmas[self.step_index]
        x0 = to_x0(c.prediction_type, output, sample, alpha_t, sigma_t)
        return self._threshold(x0) if c.thresholding else x0

    def _as_eps(self, output: Tensor, x: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
        if self.config.prediction_type == "flow_prediction":
            raise ValueError("flow_prediction needs algorithm_type 'dpmsolver++' or 'sde-dpmsolver++'")
        eps = to_eps(self.config.prediction_type, output, x, alpha_t, sigma_t)
        if self.config.thresholding:
            x0 = self._threshold(to_x0("epsilon", eps, x, alpha_t, sigma_t))
            eps = to_eps("sample", x0, x, alpha_t, sigma_t)
        return eps

    def _threshold(self, x0: Tensor) -> Tensor:
        return threshold(x0, self.config.dynamic_thresholding_ratio, self.config.sample_max_value)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t = alpha_t x0 + sigma_t eps. Pictures [B, ...], timesteps [B] out of `self.timesteps`."""
        alpha_t, sigma_t = self.alpha_sigma(self.sigma_at(timesteps, original_samples))
        return alpha_t * original_samples + sigma_t * noise
