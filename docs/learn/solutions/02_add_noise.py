import torch


def add_noise(x0: torch.Tensor, eps: torch.Tensor, alpha_bar: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    a = alpha_bar[t].reshape(-1, 1, 1, 1)
    return a.sqrt() * x0 + (1 - a).sqrt() * eps
