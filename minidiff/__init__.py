from minidiff.config import UNet2DConditionConfig
from minidiff.pipeline import StableDiffusionPipeline
from minidiff.samplers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
)
from minidiff.text_to_image import TextToImage
from minidiff.unet import UNet2DConditionModel
from minidiff.vae import AutoencoderKL, AutoencoderKLConfig

__all__ = [
    "AutoencoderKL",
    "AutoencoderKLConfig",
    "DDIMScheduler",
    "DDPMScheduler",
    "DPMSolverMultistepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "LCMScheduler",
    "PNDMScheduler",
    "StableDiffusionPipeline",
    "TextToImage",
    "UNet2DConditionConfig",
    "UNet2DConditionModel",
]
