from minidiff.config import UNet2DConditionConfig
from minidiff.ddpm import DDPMScheduler
from minidiff.samplers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
)
from minidiff.unet import UNet2DConditionModel

__all__ = [
    "DDIMScheduler",
    "DDPMScheduler",
    "DPMSolverMultistepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "LCMScheduler",
    "PNDMScheduler",
    "UNet2DConditionConfig",
    "UNet2DConditionModel",
]
