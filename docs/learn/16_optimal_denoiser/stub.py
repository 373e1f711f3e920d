"""What would a perfect denoiser of four pictures draw? docs/learn/16_optimal_denoiser/page.md"""

import torch


def denoise(x_t: torch.Tensor, pictures: torch.Tensor, alpha: float, sigma: float) -> torch.Tensor:
    """E[x0 | x_t] for x_t = alpha x0 + sigma eps [B, C, H, W]; x0 is one of the pictures [N, C, H, W]."""
    raise NotImplementedError
