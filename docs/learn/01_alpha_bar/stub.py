"""How much of the picture is left at timestep t? docs/learn/01_alpha_bar/page.md"""

import torch


def alpha_bar(beta_start: float, beta_end: float, T: int, scaled: bool) -> torch.Tensor:
    """alpha_bar_t for t = 0 .. T-1, [T]. scaled: sqrt(beta) rises linearly, else beta does."""
    raise NotImplementedError
