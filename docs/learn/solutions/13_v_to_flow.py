import torch


def to_flow(v: torch.Tensor, x_t: torch.Tensor, alpha: float,
            sigma: float) -> tuple[torch.Tensor, float, torch.Tensor]:
    x0, eps = alpha * x_t - sigma * v, sigma * x_t + alpha * v
    return x_t / (alpha + sigma), sigma / (alpha + sigma), eps - x0
