"""DDPMScheduler is in samplers/ddpm.py, with the other samplers; this name keeps older imports working."""

from minidiff.samplers.ddpm import DDPMConfig, DDPMScheduler, DDPMSchedulerOutput

__all__ = ["DDPMConfig", "DDPMScheduler", "DDPMSchedulerOutput"]
