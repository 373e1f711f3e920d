"""Does it matter whether a model predicts eps, x0 or v? docs/learn/03_predictions/page.md"""

import torch


def x0_from_eps(eps: torch.Tensor, x_t: torch.Tensor, alpha: float, sigma: float) -> torch.Tensor:
    """The clean picture behind x_t = alpha x0 + sigma eps."""
    raise NotImplementedError


def x0_from_v(v: torch.Tensor, x_t: torch.Tensor, alpha: float, sigma: float) -> torch.Tensor:
    """The same from v = alpha eps - sigma x0."""
    raise NotImplementedError


def eps_from_v(v: torch.Tensor, x_t: torch.Tensor, alpha: float, sigma: float) -> torch.Tensor:
    """And the noise."""
    raise NotImplementedError
