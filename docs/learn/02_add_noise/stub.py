"""How is a picture made noisy? docs/learn/02_add_noise/page.md"""

import torch


def add_noise(x0: torch.Tensor, eps: torch.Tensor, alpha_bar: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """x0, eps [B, C, H, W]; alpha_bar [T], the whole table; t [B], one a picture -> x_t [B, C, H, W]."""
    raise NotImplementedError
