import torch


def x0_from_eps(eps: torch.Tensor, x_t: torch.Tensor, alpha: float, sigma: float) -> torch.Tensor:
    return (x_t - sigma * eps) / alpha


def x0_from_v(v: torch.Tensor, x_t: torch.Tensor, alpha: float, sigma: float) -> torch.Tensor:
    return alpha * x_t - sigma * v


def eps_from_v(v: torch.Tensor, x_t: torch.Tensor, alpha: float, sigma: float) -> torch.Tensor:
    return sigma * x_t + alpha * v
