import torch


def alpha_bar(beta_start: float, beta_end: float, T: int, scaled: bool) -> torch.Tensor:
    if scaled:
        betas = torch.linspace(beta_start**0.5, beta_end**0.5, T) ** 2
    else:
        betas = torch.linspace(beta_start, beta_end, T)
    return torch.cumprod(1 - betas, dim=0)
