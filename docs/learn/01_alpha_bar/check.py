"""Against the tables of DDPMScheduler."""

import torch
from compare import same

from minidiff import DDPMScheduler


def check(answer) -> str:
    """Both schedules, in two lengths."""
    for name, start, end, T in (("linear", 0.0001, 0.02, 1000), ("scaled_linear", 0.00085, 0.012, 1000),
                                ("linear", 0.01, 0.5, 10), ("scaled_linear", 0.01, 0.5, 10)):
        scheduler = DDPMScheduler(num_train_timesteps=T, beta_start=start, beta_end=end, beta_schedule=name)
        betas = scheduler.betas
        same(answer.alpha_bar(start, end, T, name == "scaled_linear"), scheduler.alphas_cumprod,
             f"alpha_bar of {name}", 1e-5, {
            "these are the alphas, not yet multiplied up": 1 - betas,
            "these are the products of the betas": betas.cumprod(0),
            "alphas are multiplied, their betas are not summed": 1 - betas.cumsum(0),
            "the line goes between square roots, and has to be squared again": (1 - betas.sqrt()).cumprod(0),
            "Stable Diffusion's line goes between the square roots of the ends":
                (1 - torch.linspace(start, end, T)).cumprod(0)})
    releases = (0.0001, 0.02, 1000, False), (0.00085, 0.012, 1000, True)
    last = [answer.alpha_bar(*settings)[-1] ** 0.5 for settings in releases]
    return f"at t = 999 Ho's x_t has {last[0]:.3f} of the picture, Stable Diffusion's {last[1]:.3f}"
