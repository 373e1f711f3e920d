"""What all samplers share: the noise schedule, the spacings of timesteps, noising,
reading and writing their config.

Read after config.py, before samplers/ddpm.py. Papers: Ho 2020 (DDPM), Nichol 2021 (the cosine schedule),
Lin 2023 (spacings; zero terminal SNR, Algorithm 1), Salimans 2022 (v), Saharia 2022 (dynamic thresholding).
Mirrors: diffusers' scheduling_utils.py and the parts that its scheduler files repeat.
Symbols: beta_t; alpha_t = 1 - beta_t; alpha_bar_t, their product up to t; x_t = sqrt(alpha_bar_t) x0 +
sqrt(1 - alpha_bar_t) eps.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor

from miniclip.config import Config, ConfigError, Fraction, Range
from miniclip.files import read_json, shown
from minidiff.habits import SchedulerHabits, by_name, overriding

Steps = Annotated[int, Range(1, 100_000)]       # T; 1,000 in every release
Offset = Annotated[int, Range(0, 100_000)]      # 0 or 1 in every release
Sigma = Annotated[float, Range(0, 1e6)]         # a level of noise
Clip = Annotated[float, Range(1e-6, 1e6)]       # what x0 is clipped to
Generators = torch.Generator | list[torch.Generator] | None

# Fields of some sampler of the family. A sampler that does not have one carries it along unread, so that
# `EulerDiscreteScheduler.from_config(pndm.config)` works as upstream; any other unknown field is an error.
FAMILY_FIELDS = frozenset("""
    algorithm_type base_image_seq_len base_shift beta_end beta_schedule beta_start clip_sample
    clip_sample_range dynamic_shifting dynamic_thresholding_ratio euler_at_final final_sigmas_type flow_shift
    interpolation_type invert_sigmas lambda_min_clipped lower_order_final max_image_seq_len max_shift
    num_train_timesteps original_inference_steps prediction_type rescale_betas_zero_snr sample_max_value
    set_alpha_to_one shift shift_terminal sigma_max sigma_min skip_prk_steps solver_order solver_type
    steps_offset stochastic_sampling thresholding time_shift_type timestep_scaling timestep_spacing
    timestep_type trained_betas use_beta_sigmas use_dynamic_shifting use_exponential_sigmas use_flow_sigmas
    use_karras_sigmas use_lu_lambdas variance_type""".split())


@dataclass(frozen=True, eq=False, repr=False)
class SamplerConfig(Config):
    """The field common to all samplers, and how configs travel between them.

    Which of them were given and which are defaults stays apart, because only what was given travels into
    another sampler. As in upstream's config, the entry `_use_default_values` lists the defaults, and fields
    of other samplers are entries, though no attributes.
    """

    num_train_timesteps: Steps = 1000

    @classmethod
    def from_dict(cls, values: dict[str, Any], source: str = "scheduler") -> SamplerConfig:
        """Strict as Config.from_dict, but fields of other samplers pass, unread, and stay entries."""
        defaults = values.get("_use_default_values", ())
        given = {k: plain(v) for k, v in values.items() if not k.startswith("_") and k not in defaults}
        own = {f.name for f in fields(cls)} | set(cls.inert)
        config = super().from_dict({k: v for k, v in given.items() if k in own or k not in FAMILY_FIELDS},
                                   source)
        config._remember(given)
        return config

    def __post_init__(self) -> None:
        super().__post_init__()
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        self._remember({f.name: values[f.name] for f in fields(self) if values[f.name] != f.default})

    def _remember(self, given: dict[str, Any]) -> None:
        own = [f.name for f in fields(self)]
        dict.update(self, {name: value for name, value in given.items() if name not in own})
        dict.pop(self, "_use_default_values", None)     # as upstream, an entry only where there are defaults
        if defaults := [name for name in own if name not in given]:
            dict.update(self, _use_default_values=defaults)

    @property
    def given(self) -> dict[str, Any]:
        """What was set explicitly, fields of other samplers included: all that another sampler takes over."""
        defaults = self.get("_use_default_values", ())
        return {k: v for k, v in self.items() if not k.startswith("_") and k not in defaults}

    def changed(self, **entries: Any) -> SamplerConfig:
        """A copy with other values, in which defaults are still defaults."""
        copy = super().changed(**entries)
        defaults = [name for name in self.get("_use_default_values", ()) if name in entries]
        copy._remember({**self.given, **{k: v for k, v in entries.items() if k not in defaults}})
        return copy

    def to_dict(self) -> dict[str, Any]:
        """All fields, JSON-ready, and the fields of other samplers that were given."""
        return {**super().to_dict(), **{k: v for k, v in self.given.items() if not hasattr(self, k)}}


@dataclass(frozen=True, eq=False, repr=False)
class ScheduleConfig(SamplerConfig):
    """Fields common to the samplers of diffusion models, whose noise is scheduled by betas."""

    beta_start: Fraction = 0.0001
    beta_end: Fraction = 0.02
    beta_schedule: str = "linear"
    trained_betas: Annotated[tuple[Fraction, ...], Range(1, 100_000)] | None = None
    prediction_type: Literal["epsilon", "sample", "v_prediction"] = "epsilon"

    def check(self) -> None:
        """The schedule exists, and its noise does not fall."""
        if self.beta_start > self.beta_end:
            raise ConfigError(f"beta_start = {self.beta_start} is above beta_end = {self.beta_end}")
        if self.trained_betas is None and self.beta_schedule not in BETA_SCHEDULES:
            raise ConfigError(f"beta_schedule = {shown(self.beta_schedule)} is not one of "
                              f"{', '.join(BETA_SCHEDULES)}")


def plain(value: Any) -> Any:
    """A numpy array or number as Python's own; anything else as it is."""
    return value.tolist() if hasattr(value, "tolist") else value


def linear(c: ScheduleConfig) -> Tensor:
    """Ho 2020's: linear in beta."""
    return torch.linspace(c.beta_start, c.beta_end, c.num_train_timesteps, dtype=torch.float32)


def scaled_linear(c: ScheduleConfig) -> Tensor:
    """Stable Diffusion's: linear in sqrt(beta)."""
    return torch.linspace(c.beta_start**0.5, c.beta_end**0.5, c.num_train_timesteps, dtype=torch.float32) ** 2


def sigmoid(c: ScheduleConfig) -> Tensor:
    """beta rises as a sigmoid from about beta_start to about beta_end."""
    rise = torch.sigmoid(torch.linspace(-6, 6, c.num_train_timesteps))
    return rise * (c.beta_end - c.beta_start) + c.beta_start


def betas_of(alpha_bar: Callable[[float], float], T: int, max_beta: float = 0.999) -> Tensor:
    """beta_t = 1 - alpha_bar(t) / alpha_bar(t - 1), capped so that the last step stays finite (Nichol 2021,
    eq. 17)."""
    return torch.tensor([min(1 - alpha_bar((i + 1) / T) / alpha_bar(i / T), max_beta) for i in range(T)])


def cosine(c: ScheduleConfig) -> Tensor:
    """Nichol 2021, eq. 17: alpha_bar falls as a squared cosine; beta_start and beta_end are not read."""
    return betas_of(lambda t: math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2, c.num_train_timesteps)


def laplace(c: ScheduleConfig) -> Tensor:
    """log SNR drawn as a Laplace variable; alpha_bar holds sqrt(snr / (1 + snr)), as upstream."""

    def alpha_bar(t: float) -> float:
        snr = math.exp(-0.5 * math.copysign(1, 0.5 - t) * math.log(1 - 2 * abs(0.5 - t) + 1e-6))
        return math.sqrt(snr / (1 + snr))

    return betas_of(alpha_bar, c.num_train_timesteps)


BETA_SCHEDULES: dict[str, Callable[[ScheduleConfig], Tensor]] = {
    "linear": linear, "scaled_linear": scaled_linear, "squaredcos_cap_v2": cosine, "sigmoid": sigmoid,
    "laplace": laplace,
}  # fmt: skip


def betas(config: ScheduleConfig) -> Tensor:
    """beta_t for t = 0 .. T-1, float32 [T]. T is the number of trained_betas, if they are given."""
    if config.trained_betas is None:
        return BETA_SCHEDULES[config.beta_schedule](config)
    T = len(config.trained_betas)
    if T != config.num_train_timesteps:
        warnings.warn(f"num_train_timesteps = {config.num_train_timesteps}, but there are {T} trained_betas: "
                      f"timesteps lie in 0 .. {T - 1}", stacklevel=3)
    return torch.tensor(config.trained_betas, dtype=torch.float32)


def rescale_zero_terminal_snr(betas: Tensor) -> Tensor:
    """The schedule shifted and stretched so that x_T is pure noise (Lin 2023, Algorithm 1)."""
    root = torch.cumprod(1.0 - betas, dim=0).sqrt()
    first, last = root[0].clone(), root[-1].clone()
    root = (root - last) * (first / (first - last))
    alpha_bar = root**2
    alphas = torch.cat([alpha_bar[:1], alpha_bar[1:] / alpha_bar[:-1]])
    return 1 - alphas


def spaced_timesteps(spacing: str, steps: int, T: int, offset: int) -> list[int]:
    """`steps` of the T training timesteps, from high to low (Lin 2023, table 2).
    Python rounds halves to even."""
    if spacing == "linspace":
        stride = (T - 1) / (steps - 1) if steps > 1 else 0.0
        return [round(i * stride) for i in range(steps)][::-1]
    if spacing == "leading":
        return [i * (T // steps) + offset for i in range(steps)][::-1]
    stride = T - (T - T / steps)  # as numpy's arange accumulates a float stride
    return [round(T - i * stride) - 1 for i in range(steps)]  # trailing


def randn(shape: torch.Size | tuple[int, ...], generator: Generators, device: torch.device,
          dtype: torch.dtype) -> Tensor:
    """Gaussian noise. A CPU generator draws on the CPU, so one seed gives one picture on every device.

    A list holds one generator for each picture of the batch.
    """
    if isinstance(generator, list):
        if len(generator) != shape[0]:
            raise ValueError(f"{len(generator)} generators for a batch of {shape[0]}")
        return torch.cat([randn((1, *shape[1:]), g, device, dtype) for g in generator])
    source = device if generator is None else generator.device
    return torch.randn(shape, generator=generator, device=source, dtype=dtype).to(device)


def within(interval: tuple[float, float], t: Tensor | float, T: int) -> bool:
    """Whether a timestep lies in a part of the walk from noise (0) to picture (1). Raises ValueError."""
    start, end = interval
    if not 0 <= start < end <= 1:
        raise ValueError(f"guidance_interval = {start}, {end}: they must be in order, from 0 to 1")
    return (1 - end) * T <= float(t) <= (1 - start) * T


def threshold(x0: Tensor, ratio: float, max_value: float) -> Tensor:
    """Dynamic thresholding (Saharia 2022, section 2.3): clip to a quantile s of |x0| per picture,
    divide by s."""
    flat = x0.flatten(1)
    flat = flat if flat.dtype in (torch.float32, torch.float64) else flat.float()
    s = torch.quantile(flat.abs(), ratio, dim=1).clamp(min=1, max=max_value)[:, None]
    return (flat.clamp(-s, s) / s).reshape(x0.shape).to(x0.dtype)


# ---------------- eps, x0 and v: with x_t = alpha x0 + sigma eps and x_t known, each of them gives the others
# The one place where a model's prediction is converted; samplers and training call it. `kind` is a config's
# prediction_type; alpha and sigma are numbers or tensors that multiply x_t: sqrt(alpha_bar_t),
# sqrt(1 - alpha_bar_t).


def to_x0(kind: str, output: Tensor, x_t: Tensor, alpha: Tensor | float, sigma: Tensor | float) -> Tensor:
    """The clean image that a prediction stands for."""
    if kind == "epsilon":
        return (x_t - sigma * output) / alpha               # Ho 2020, eq. 4 solved for x0
    if kind == "v_prediction":
        return alpha * x_t - sigma * output                 # Salimans 2022, appendix D
    if kind == "flow_prediction":                           # alpha = 1 - sigma, and the model gives eps - x0
        return x_t - sigma * output
    return output                                           # "sample"


def to_eps(kind: str, output: Tensor, x_t: Tensor, alpha: Tensor | float, sigma: Tensor | float) -> Tensor:
    """The noise that a prediction stands for."""
    if kind == "sample":
        return (x_t - alpha * output) / sigma
    if kind == "v_prediction":
        return alpha * output + sigma * x_t
    if kind == "flow_prediction":
        return x_t + alpha * output
    return output                                           # "epsilon"


def training_target(kind: str, x0: Tensor, eps: Tensor, alpha: Tensor | float,
                    sigma: Tensor | float) -> Tensor:
    """What a model of this kind is trained to predict."""
    if kind == "v_prediction":
        return alpha * eps - sigma * x0                     # Salimans 2022, section 4
    if kind == "flow_prediction":
        return eps - x0
    return x0 if kind == "sample" else eps


def to_x0_unscaled(kind: str, output: Tensor, x: Tensor, sigma: Tensor, sigma_hat: Tensor) -> Tensor:
    """`to_x0` for x = x0 + sigma eps, the form of Karras 2022, in upstream's order of operations.

    sigma_hat: the level after Euler's churn, which upstream uses for eps alone.
    """
    if kind == "epsilon":
        return x - sigma_hat * output
    if kind == "v_prediction":                              # here alpha = 1 / sqrt(sigma^2 + 1)
        return output * (-sigma / (sigma**2 + 1) ** 0.5) + x / (sigma**2 + 1)
    return output


class Sampler(SchedulerHabits):
    """Base of all samplers: config in and out, and the forward process x_t = alpha x0 + sigma eps.

    Built from its config or from the config's fields; SchedulerHabits saves it. `len(scheduler)` is T.
    Nothing here is a module: no training or EMA step can touch a schedule.
    A subclass says what the model predicts (`prediction_kind`), which timesteps training draws
    (`timesteps_at`), and alpha and sigma at one timestep (`signal_and_noise`) and at many
    (`_signal_and_noise`).
    """

    config_class: ClassVar[type[SamplerConfig]] = SamplerConfig
    order = 1

    def __init__(self, config: SamplerConfig | None = None, *by_place: Any, **fields: Any):
        if not isinstance(config, SamplerConfig):
            fields = by_name(type(self).__name__, (config, *by_place), fields, self.by_place)
            config = self.config_class.from_dict(fields, type(self).__name__)
        self.config = config
        self.num_inference_steps: int | None = None

    @classmethod
    def from_config(cls, config: SamplerConfig | dict[str, Any], **overrides: Any) -> Sampler:
        """A sampler from another sampler's config; only what was set explicitly there is taken over."""
        if not isinstance(config, dict):
            raise TypeError(f"{cls.__name__}.from_config takes a config, not {shown(config)}; a folder goes "
                            "into from_pretrained")
        overrides = overriding(f"{cls.__name__}.from_config", overrides)
        defaults = config.get("_use_default_values", ())
        given = {k: v for k, v in config.items() if not k.startswith("_") and k not in defaults}
        return cls(cls.config_class.from_dict({**given, **overrides}, cls.__name__))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, subfolder: str | None = None,
                        **overrides: Any) -> Sampler:
        """Reads `scheduler_config.json` in a local folder, whichever sampler wrote it. Overrides are fields.

        Raises WeightsError for a file that cannot be read, ConfigError for a field that cannot be honoured.
        """
        overrides = overriding(f"{cls.__name__}.from_pretrained", overrides)
        source = cls.config_file(pretrained_model_name_or_path, subfolder)
        values = {k: v for k, v in read_json(source).items() if not k.startswith("_")}
        return cls(cls.config_class.from_dict({**values, **overrides}, source))

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t = alpha x0 + sigma eps. Pictures [B, ...], timesteps [B]."""
        alpha, sigma = self._signal_and_noise(timesteps, original_samples)
        return alpha * original_samples + sigma * noise

    def training_target(self, x0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What training asks of the model at x_t = add_noise(x0, noise, timesteps)."""
        alpha, sigma = self._signal_and_noise(timesteps, x0)
        return training_target(self.prediction_kind, x0, noise, alpha, sigma)

    def predict_x0(self, output: Tensor, x_t: Tensor, timestep: int) -> Tensor:
        """The clean images behind x_t [B, ...] by the model's prediction at one timestep; not clipped."""
        return to_x0(self.prediction_kind, output, x_t, *self.signal_and_noise(timestep))


class Scheduler(Sampler):
    """Base of the samplers of diffusion models: alpha = sqrt(alpha_bar_t), sigma = sqrt(1 - alpha_bar_t).

    The tables `betas`, `alphas`, `alphas_cumprod` [T] are float32 on the CPU.
    """

    config_class: ClassVar[type[ScheduleConfig]] = ScheduleConfig
    init_noise_sigma: float | Tensor = 1.0

    def __init__(self, config: ScheduleConfig | None = None, *by_place: Any, **fields: Any):
        super().__init__(config, *by_place, **fields)
        self.betas = betas(self.config)
        if getattr(self.config, "rescale_betas_zero_snr", False):
            self.betas = rescale_zero_terminal_snr(self.betas)
        self.alphas = 1.0 - self.betas
        self.alphas_cumprod = torch.cumprod(self.alphas, dim=0)
        self.timesteps = torch.arange(len(self)).flip(0)

    def __len__(self) -> int:
        return len(self.betas)

    def scale_model_input(self, sample: Tensor, timestep: Tensor | int | None = None) -> Tensor:
        """What the model is to see at this timestep: here x_t itself; the Euler samplers rescale it."""
        return sample

    @property
    def prediction_kind(self) -> str:
        """The config's prediction_type: epsilon, v_prediction or sample."""
        return self.config.prediction_type

    def timesteps_at(self, fractions: Tensor) -> Tensor:
        """Timesteps of training at fractions [B] in 0..1 of the schedule: whole numbers in 0 .. T-1."""
        return (fractions * len(self)).long().clamp(max=len(self) - 1)

    def signal_and_noise(self, timestep: int) -> tuple[float, float]:
        """alpha and sigma at one timestep (Ho 2020, eq. 4)."""
        alpha_bar = self.alphas_cumprod[timestep].item()
        return alpha_bar**0.5, (1 - alpha_bar) ** 0.5

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """v = sqrt(alpha_bar_t) eps - sqrt(1 - alpha_bar_t) x0 (Salimans 2022, section 4 and appendix D)."""
        alpha, sigma = self._signal_and_noise(timesteps, sample)
        return training_target("v_prediction", sample, noise, alpha, sigma)

    def clip_x0(self, x0: Tensor) -> Tensor:
        """A predicted x0, thresholded or clipped if the config asks for it."""
        c = self.config
        if c.thresholding:
            return threshold(x0, c.dynamic_thresholding_ratio, c.sample_max_value)
        return x0.clamp(-c.clip_sample_range, c.clip_sample_range) if c.clip_sample else x0

    def _signal_and_noise(self, timesteps: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(alpha_bar_t) and sqrt(1 - alpha_bar_t), shaped to multiply x. Cast first, as upstream: in half
        precision that rounds 1 - alpha_bar_t, and real checkpoints were trained so."""
        on_cpu = timesteps.device.type == "cpu"             # elsewhere looking would wait for the device
        if on_cpu and not 0 <= int(timesteps.min()) <= int(timesteps.max()) < len(self):
            raise ValueError(f"timesteps must lie in 0 .. {len(self) - 1}, got "
                             f"{timesteps.flatten()[:8].tolist()}")
        alpha_bar = self.alphas_cumprod.to(device=x.device, dtype=x.dtype)[timesteps.to(x.device)].flatten()
        alpha_bar = alpha_bar.reshape(-1, *[1] * (x.ndim - 1))
        return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
