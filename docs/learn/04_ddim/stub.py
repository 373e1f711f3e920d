"""Can DDIM be written from DDPM's step? docs/learn/04_ddim/page.md"""

import torch


def ddpm_mean(x_t: torch.Tensor, eps: torch.Tensor, a: float, a_prev: float) -> torch.Tensor:
    """Where DDPM's step goes before it adds noise. a, a_prev: alpha_bar at t and at the timestep after it."""
    x0 = (x_t - (1 - a) ** 0.5 * eps) / a**0.5
    alpha = a / a_prev
    return (a_prev**0.5 * (1 - alpha) * x0 + alpha**0.5 * (1 - a_prev) * x_t) / (1 - a)


def step(x_t: torch.Tensor, eps: torch.Tensor, a: float, a_prev: float, eta: float) -> torch.Tensor:
    """x_prev but for the fresh noise: eta 0 is DDIM, eta 1 has to be ddpm_mean."""
    raise NotImplementedError
