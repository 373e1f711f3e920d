"""How does a v-prediction become a flow? docs/learn/13_v_to_flow/page.md"""

import torch


def to_flow(v: torch.Tensor, x_t: torch.Tensor, alpha: float,
            sigma: float) -> tuple[torch.Tensor, float, torch.Tensor]:
    """x_s, s and u = eps - x0, out of v = alpha eps - sigma x0 at x_t = alpha x0 + sigma eps."""
    raise NotImplementedError
