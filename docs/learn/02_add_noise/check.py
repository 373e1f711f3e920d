"""Against DDPMScheduler.add_noise, with as many pictures as columns."""

import torch
from compare import same

from minidiff import DDPMScheduler


def check(answer) -> None:
    """Four pictures of four columns, four timesteps."""
    scheduler, t = DDPMScheduler(), torch.tensor([0, 250, 500, 999])
    x0, eps = torch.randn(2, 4, 3, 4, 4)
    table = scheduler.alphas_cumprod
    a = table[t].reshape(-1, 1, 1, 1)
    same(answer.add_noise(x0, eps, table, t), scheduler.add_noise(x0, eps, t), "x_t", 1e-5, {
        "alpha_bar is a share of the variance: the picture wants its square root": a * x0 + (1 - a) * eps,
        "the factor of the noise is sqrt(1 - alpha_bar), not 1 - sqrt(alpha_bar)":
            a.sqrt() * x0 + (1 - a.sqrt()) * eps,
        "the factors changed places": a.sqrt() * eps + (1 - a).sqrt() * x0,
        "each column got a timestep in place of each picture: make the factors [B, 1, 1, 1]":
            table[t].sqrt() * x0 + (1 - table[t]).sqrt() * eps})
    one = torch.tensor([7])
    same(answer.add_noise(x0[:1, :1], eps[:1, :1], table, one),
         scheduler.add_noise(x0[:1, :1], eps[:1, :1], one), "x_t of one picture", 1e-5)
