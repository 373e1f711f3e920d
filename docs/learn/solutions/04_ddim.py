import torch


def ddpm_mean(x_t: torch.Tensor, eps: torch.Tensor, a: float, a_prev: float) -> torch.Tensor:
    x0 = (x_t - (1 - a) ** 0.5 * eps) / a**0.5
    alpha = a / a_prev
    return (a_prev**0.5 * (1 - alpha) * x0 + alpha**0.5 * (1 - a_prev) * x_t) / (1 - a)


def step(x_t: torch.Tensor, eps: torch.Tensor, a: float, a_prev: float, eta: float) -> torch.Tensor:
    x0 = (x_t - (1 - a) ** 0.5 * eps) / a**0.5
    variance = eta**2 * (1 - a_prev) / (1 - a) * (1 - a / a_prev)
    return a_prev**0.5 * x0 + (1 - a_prev - variance) ** 0.5 * eps
