"""The two objectives that TextToImage learns by, diffusion and rectified flow: each with its schedule and its
sampler.

Read after samplers/ddim.py and flow_match.py, before text_to_image.py.
Papers: Nichol 2021 (the cosine schedule), Salimans 2022 (v), Lin 2023 (zero terminal SNR), Song 2021 (DDIM),
Liu 2022 (rectified flow). Mirrors: nothing upstream.
Shapes: n steps.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from miniclip.files import read_json
from minidiff.samplers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler, LCMScheduler
from minidiff.samplers.base import linspace
from minidiff.schedule import Generators, Sampler

Walk = tuple[Tensor, Callable[..., Any]]        # timesteps [n], from noise on; and the sampler's `step`


def cosine_schedule(clip: bool = True) -> DDPMScheduler:
    """Cosine, v-prediction, zero terminal SNR so that paper comes out white.
    clip: each predicted x0 to -1..1."""
    return DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction",
                         rescale_betas_zero_snr=True, timestep_spacing="trailing",
                         **({} if clip else {"clip_sample": False}))


def straight_paths(clip: bool = True) -> FlowMatchEulerDiscreteScheduler:
    """x_t = (1 - sigma) x0 + sigma eps, without a shift. Whatever clip says, no x0 is clipped."""
    return FlowMatchEulerDiscreteScheduler()


def ddim_walk(scheduler: Sampler, steps: int, generator: Generators) -> Walk:
    """Of what diffusion trained."""
    sampler = DDIMScheduler.from_config(scheduler.config)
    sampler.set_timesteps(steps)
    return sampler.timesteps, partial(sampler.step, use_clipped_model_output=True)


def euler_walk(scheduler: Sampler, steps: int, generator: Generators) -> Walk:
    """Of what flow trained: equal steps from sigma = 1 to 0."""
    sampler = FlowMatchEulerDiscreteScheduler.from_config(scheduler.config)
    sampler.set_timesteps(sigmas=linspace(1.0, 1 / steps, steps))
    return sampler.timesteps, sampler.step


def lcm_walk(scheduler: Sampler, steps: int, generator: Generators) -> Walk:
    """Of what was distilled; the generator draws the noise between the steps. More steps than the
    distillation knew are as many as it knew."""
    sampler = LCMScheduler.from_config(scheduler.config)
    sampler.set_timesteps(min(steps, scheduler.config.original_inference_steps))
    return sampler.timesteps, partial(sampler.step, generator=generator)


class Objective(NamedTuple):
    """What a model is trained by."""

    scheduler: type[Sampler]                    # whose name its scheduler_config.json bears
    # the schedule of a fresh model; clip: as in cosine_schedule. None: not for fresh ones
    fresh: Callable[..., Sampler] | None
    # its scheduler, n and generators, one an image -> how to sample in n steps
    walk: Callable[[Sampler, int, Generators], Walk]
    guided: bool = True                         # a distilled model has its own guidance: no other matters


OBJECTIVES = {"diffusion": Objective(DDPMScheduler, cosine_schedule, ddim_walk),
              "flow": Objective(FlowMatchEulerDiscreteScheduler, straight_paths, euler_walk),
              "consistency": Objective(LCMScheduler, None, lcm_walk, guided=False)}


def objective_of(scheduler: Sampler) -> Objective:
    """By which of them this scheduler trains: flow, if it is flow's."""
    return next((found for found in OBJECTIVES.values() if isinstance(scheduler, found.scheduler)),
                OBJECTIVES["diffusion"])


def objective_in(folder: str | Path) -> str:
    """The name of the objective of a scheduler's folder. What names no scheduler of ours is diffusion's.
    Raises WeightsError."""
    written = read_json(Path(folder) / DDPMScheduler.config_name).get("_class_name")
    return next((name for name, found in OBJECTIVES.items() if found.scheduler.__name__ == written),
                "diffusion")


def load_scheduler(folder: str | Path) -> Sampler:
    """The scheduler that a model was trained with. Raises WeightsError or ConfigError."""
    return OBJECTIVES[objective_in(folder)].scheduler.from_pretrained(folder)
