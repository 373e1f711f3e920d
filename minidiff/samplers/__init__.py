"""The samplers, by upstream's names. Read in this order: ddpm, base, ddim, pndm, euler,
euler_ancestral, dpmsolver, lcm, flow_match."""

from minidiff.samplers.base import SchedulerOutput
from minidiff.samplers.ddim import DDIMScheduler
from minidiff.samplers.ddpm import DDPMScheduler
from minidiff.samplers.dpmsolver import DPMSolverMultistepScheduler
from minidiff.samplers.euler import EulerDiscreteScheduler
from minidiff.samplers.euler_ancestral import EulerAncestralDiscreteScheduler
from minidiff.samplers.flow_match import FlowMatchEulerDiscreteScheduler
from minidiff.samplers.lcm import LCMScheduler, LCMSchedulerOutput
from minidiff.samplers.pndm import PNDMScheduler

__all__ = [
    "DDIMScheduler",
    "DDPMScheduler",
    "DPMSolverMultistepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "LCMScheduler",
    "LCMSchedulerOutput",
    "PNDMScheduler",
    "SchedulerOutput",
]
